"""Answers that are sudoku boards: which they are, and as a grid of HTML."""

import math
from html import escape
from typing import NamedTuple

from nanollada.scripts.tracing.pieces import trace_cells
from nanollada.scripts.tracing.recorder import StepRecorder
from nanollada.trainers.puzzles.sudoku import stated_puzzle

BLANK = "0"
BOARD_STYLE = """
.nanollada-board { display: inline-grid; vertical-align: top; margin: .3rem 0; border: 2px solid currentColor;
  white-space: normal; font: 1.05rem/2.1rem ui-monospace, "Cascadia Mono", Menlo, Consolas, monospace; }
.nanollada-board.size-4 { grid-template-columns: repeat(4, 2.1rem); }
.nanollada-board.size-9 { grid-template-columns: repeat(9, 1.75rem); font-size: .95rem; line-height: 1.75rem; }
.nanollada-board > * { box-sizing: border-box; overflow: hidden; height: 1lh; text-align: center; font-style: normal;
  border: 0 solid var(--ink, currentColor);
  box-shadow: inset 0 0 0 .5px color-mix(in srgb, var(--ink, currentColor) 35%, transparent); }
.nanollada-board [data-clue] { font-weight: 700; }
.nanollada-board .wrong { box-shadow: inset 0 0 0 3px #e03131; }
.nanollada-board.size-4 > :nth-child(4n+2), .nanollada-board.size-9 > :nth-child(9n+3),
.nanollada-board.size-9 > :nth-child(9n+6) { border-right-width: 2px; }
.nanollada-board.size-4 > :nth-child(n+5):nth-child(-n+8), .nanollada-board.size-9 > :nth-child(n+19):nth-child(-n+27),
.nanollada-board.size-9 > :nth-child(n+46):nth-child(-n+54) { border-bottom-width: 2px; }
"""


class Board(NamedTuple):
    """
    A sudoku that is answered.

    Attributes:
        puzzle (`str`): Its digits row by row, 0 for a blank; 16 or 81.
        start (`int`): The row's column that answers the first of them; the others follow, a digit each.
    """

    puzzle: str
    start: int

    @property
    def side(self) -> int:
        """Cells in a row."""
        return math.isqrt(len(self.puzzle))

    @property
    def box(self) -> int:
        """Cells in a row of a box."""
        return math.isqrt(self.side)

    @property
    def end(self) -> int:
        """The column behind the last cell's."""
        return self.start + len(self.puzzle)

    def clue(self, column: int) -> str:
        """The digit that the puzzle gives in a column of the row; empty for a blank, and outside the board."""
        digit = self.puzzle[column - self.start] if self.start <= column < self.end else BLANK
        return "" if digit == BLANK else digit

    def is_wrong(self, column: int, text: str) -> bool:
        """Whether a text in that column changes the puzzle's clue."""
        return self.clue(column) not in ("", text)


def find_board(trace: StepRecorder) -> Board | None:
    """
    The board of a row that answers a sudoku as its prompt asks, `Sudoku 1020…`, with a digit in each cell and no more;
    of a row in the making one that may become so. Anything else is text.
    """
    tokenizer, start = trace.tokenizer, len(trace.prompt)
    puzzle = stated_puzzle(tokenizer.decode(trace.prompt, skip_special_tokens=True))
    if puzzle is None or tokenizer.mask_token_id in trace.prompt:
        return None
    board = Board(puzzle, start)
    pieces = [cell.piece for cell in trace_cells(trace, len(trace.steps))[0]]
    digits = [piece.text for piece in pieces[board.start : board.end] if piece.kind == "text"]
    if not all(len(text) == 1 and text in "0123456789" for text in digits):
        return None
    undecided = {"text", "mask", "absent"} if not trace.ended else {"text"}
    whole = len(pieces) >= board.end or not trace.ended
    if not whole or not {piece.kind for piece in pieces[board.start : board.end]} <= undecided:
        return None
    more = "".join(piece.text for piece in pieces[board.end :] if piece.kind not in ("special", "absent"))
    return None if trace.ended and more.strip() else board


def board_html(prompt: str, answer: str) -> str | None:
    """
    An answer to a sudoku as a grid, its clues bold, a clue that it changed marked; the page needs `BOARD_STYLE` once.

    Args:
        prompt (`str`): The last `Sudoku 1020…` in it is the puzzle.
        answer (`str`): What was answered.

    Returns:
        `str` or `None`: HTML that may stand in a line of text; None for what is no sudoku, or answered otherwise than
            by as many digits.
    """
    puzzle, answer = stated_puzzle(prompt), answer.strip()
    if puzzle is None or len(answer) != len(puzzle) or not (answer.isascii() and answer.isdigit()):
        return None
    board, cells = Board(puzzle, 0), []
    for column, digit in enumerate(answer):
        clue = f' data-clue="{board.clue(column)}"' if board.clue(column) else ""
        wrong = ' class="wrong"' if board.is_wrong(column, digit) else ""
        cells.append(f"<span{clue}{wrong}>{digit}</span>")
    label = escape(f"Sudoku {puzzle}: {answer}")
    return f'<span class="nanollada-board size-{board.side}" role="img" aria-label="{label}">{"".join(cells)}</span>'
