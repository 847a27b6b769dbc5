"""9×9 sudoku: boards drawn at random, cells hidden while there is one solution, and the split by board."""

import random
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache

from nanollada.trainers.puzzles.puzzle import Puzzle, needed, side_of, whole
from nanollada.trainers.puzzles.sudoku import PROMPT, share_of_blanks

CELLS = range(81)
ALL = 0b111111111  # digits as bits, 1 the lowest
# Of each cell the units that it stands in: its row, 9 + its column, 18 + its box.
UNITS = tuple((cell // 9, 9 + cell % 9, 18 + cell // 27 * 3 + cell % 9 // 3) for cell in CELLS)
PEERS = tuple(tuple(other for other in CELLS if set(UNITS[cell]) & set(UNITS[other])) for cell in CELLS)
TRIES = 200  # boards; of 100 that were drawn, 99 had a puzzle with 54 blanks


def solutions(board: Sequence[int], order: Sequence[int] = range(1, 10)) -> Iterator[list[int]]:
    """
    Every solved board with the digits of `board` (81 numbers, 0 for a blank), one by one: the blank with the fewest
    digits that fit is filled first, with its digits tried in the given `order`.
    """
    taken, blanks, board = [0] * 27, [], list(board)
    for cell, digit in enumerate(board):
        bit = 1 << digit >> 1
        if any(taken[unit] & bit for unit in UNITS[cell]):
            return
        for unit in UNITS[cell]:
            taken[unit] |= bit
        if not digit:
            blanks.append(cell)
    yield from _filled(board, taken, blanks, order)


def _filled(board: list[int], taken: list[int], blanks: list[int], order: Sequence[int]) -> Iterator[list[int]]:
    if not blanks:
        yield board.copy()
        return
    best, fewest = 0, 10
    for place, cell in enumerate(blanks):
        row, column, box = UNITS[cell]
        count = (ALL & ~(taken[row] | taken[column] | taken[box])).bit_count()
        if count < fewest:
            best, fewest = place, count
            if count < 2:
                break
    cell = blanks.pop(best)
    row, column, box = UNITS[cell]
    free = ALL & ~(taken[row] | taken[column] | taken[box])
    for digit in order:
        bit = 1 << digit >> 1
        if not free & bit:
            continue
        board[cell] = digit
        for unit in (row, column, box):
            taken[unit] |= bit
        yield from _filled(board, taken, blanks, order)
        for unit in (row, column, box):
            taken[unit] ^= bit
    board[cell] = 0
    blanks.insert(best, cell)


@lru_cache(maxsize=8192)
def solution(puzzle: str) -> str | None:
    """The only solution of a puzzle of 81 digits; `None` if there is none, or another one."""
    boards = solutions([int(digit) for digit in puzzle])
    first, second = next(boards, None), next(boards, None)
    return None if first is None or second is not None else "".join(map(str, first))


def _board(rng: random.Random, side: str) -> list[int]:
    """A solved board of one side, which its digits decide."""
    while True:
        top = rng.sample(range(1, 10), 9)
        board = next(solutions(top + [0] * 72, rng.sample(range(1, 10), 9)))
        board = _shuffled(rng, board)
        if side_of("".join(map(str, board))) == side:
            return board


def _shuffled(rng: random.Random, board: list[int]) -> list[int]:
    """Rows, columns and their bands of three in another order, which hides how the board was searched."""
    rows, columns = (
        [3 * band + line for band in rng.sample(range(3), 3) for line in rng.sample(range(3), 3)] for _ in range(2)
    )
    return [board[9 * row + column] for row in rows for column in columns]


def _hidden(rng: random.Random, board: list[int], count: int) -> list[int] | None:
    """The board with `count` blanks and no other solution; `None` if the order of cells that is drawn has none."""
    puzzle = board.copy()
    for cell in rng.sample(CELLS, 81):
        puzzle[cell] = 0
        others = set(range(1, 10)) - {board[cell]} - {puzzle[peer] for peer in PEERS[cell]}
        if any(_fits(puzzle, cell, digit) for digit in sorted(others)):
            puzzle[cell] = board[cell]
        if puzzle.count(0) == count:
            return puzzle
    return None


def _fits(puzzle: list[int], cell: int, digit: int) -> bool:
    """Whether there is a solution with a digit in a cell."""
    return next(solutions([*puzzle[:cell], digit, *puzzle[cell + 1 :]]), None) is not None


def sudoku9(rng: random.Random, side: str, min_blanks: int = 30, max_blanks: int = 45) -> dict:
    """
    `{"prompt": "Sudoku 0300…", "answer": "4312…", "puzzle": "0300…"}`: 81 digits row by row, 0 for a blank.

    Raises:
        `ValueError`: for `min_blanks` above `max_blanks`, and if no board that is drawn has so many.
    """
    if min_blanks > max_blanks:
        raise ValueError(f"`min_blanks` must not exceed `max_blanks`, got {min_blanks} and {max_blanks}")
    blanks = rng.randint(min_blanks, max_blanks)
    for _ in range(TRIES):
        board = _board(rng, side)
        hidden = _hidden(rng, board, blanks)
        if hidden is not None:
            answer, puzzle = ("".join(map(str, digits)) for digits in (board, hidden))
            return {"prompt": PROMPT + puzzle, "answer": answer, "puzzle": puzzle}
    raise ValueError(f"`max_blanks` must leave one solution, got none with {blanks} blanks in {TRIES} boards")


def verify(row: dict, answer: str) -> bool:
    """Whether the answer is a solved board with the puzzle's clues."""
    if not has_form(row, answer) or any(c not in ("0", a) for c, a in zip(row["puzzle"], answer, strict=True)):
        return False
    units = [set() for _ in range(27)]
    for cell, digit in enumerate(answer):
        for unit in UNITS[cell]:
            units[unit].add(digit)
    return all(len(unit) == 9 for unit in units)


def has_form(row: dict, answer: str) -> bool:
    """Whether the answer is 81 digits from 1 to 9."""
    return re.fullmatch("[1-9]{81}", answer) is not None


def columns(row: dict) -> dict:
    """`puzzle`, 81 digits with one solution."""
    puzzle = needed(row, "puzzle")
    if not isinstance(puzzle, str) or not re.fullmatch(r"[0-9]{81}", puzzle) or solution(puzzle) is None:
        raise ValueError(f"`puzzle` must be 81 digits from 0 to 9 with one solution, got {puzzle!r}")
    return {"puzzle": puzzle}


PUZZLE = Puzzle(
    name="sudoku9",
    help="9×9 boards with blanks and one solution",
    draw=sudoku9,
    verify=verify,
    columns=columns,
    has_form=has_form,
    share=lambda row, answer: share_of_blanks(row["puzzle"], solution(row["puzzle"]), answer),
    options={"min_blanks": whole(1, 54), "max_blanks": whole(1, 54)},
    has_sides=True,
)
