"""4×4 sudoku: boards, puzzles with one solution, and the split of the boards."""

import itertools
import random
import re
from collections.abc import Iterable
from functools import cache

from nanollada.trainers.puzzles.puzzle import Puzzle, needed, whole

GRID_SEED = 42  # the quickstart's split of the boards
PROMPT = "Sudoku "  # before a puzzle's digits


@cache
def solutions() -> tuple[str, ...]:
    """All 288 solved 4×4 boards in lexicographic order, each as 16 digits row by row, without a repeat in any unit."""
    rows = ["".join(row) for row in itertools.permutations("1234")]
    bands = [a + b for a in rows for b in rows if not set(a[:2]) & set(b[:2]) and not set(a[2:]) & set(b[2:])]
    grids = (top + bottom for top in bands for bottom in bands)
    return tuple(grid for grid in grids if all(len(set(grid[column::4])) == 4 for column in range(4)))


@cache
def _grids_with(cell: int, digit: str) -> int:
    """The set of solved boards with `digit` in `cell` as the bits of an integer; a blank fits all."""
    return sum(1 << index for index, grid in enumerate(solutions()) if digit in ("0", grid[cell]))


def count_solutions(puzzle: str) -> int:
    """The number of solved boards that agree with the clues of `puzzle`.

    Raises a ValueError if `puzzle` is not 16 digits from 0 (blank) to 4.
    """
    if not re.fullmatch(r"[0-4]{16}", puzzle):
        raise ValueError(f"`puzzle` must be 16 digits from 0 to 4, got {puzzle!r}")
    fitting = (1 << len(solutions())) - 1
    for cell, digit in enumerate(puzzle):
        fitting &= _grids_with(cell, digit)
    return fitting.bit_count()


def stated_puzzle(text: str) -> str | None:
    """The digits of the last puzzle in a text that is put as [`sudoku_rows`] does; 81 of a 9×9 board count, too."""
    stated = re.findall(rf"\b{PROMPT}([0-4]{{16}}|[0-9]{{81}})(?![0-9])", text)
    return stated[-1] if stated else None


def is_valid_solution(puzzle: str, answer: str) -> bool:
    """Whether `answer` is a solved board that keeps the clues of `puzzle`; malformed answers are just not valid."""
    solvable = count_solutions(puzzle) > 0  # raises for a malformed puzzle
    return solvable and answer in solutions() and all(c in ("0", a) for c, a in zip(puzzle, answer, strict=True))


def split_grids(seed: int, held_out: int = 48) -> tuple[list[str], list[str]]:
    """Splits the 288 solved boards into (training, held out) lists without a common board.

    A held-out board is never an answer in training, and as every puzzle has one solution, no held-out puzzle is a
    training puzzle. More than that it does not mean: 4×4 sudoku has only two essentially different boards (96 and 192
    of the 288); renaming digits, swapping rows, columns or bands and transposing turn a held-out board into training
    boards. A high score shows rules applied to unseen boards, not to a new kind of board.

    Raises a ValueError if `held_out` is not between 1 and 287.
    """
    if not 1 <= held_out < len(solutions()):
        raise ValueError(f"`held_out` must be between 1 and 287, got {held_out}")
    grids = random.Random(f"{seed}/grids").sample(solutions(), len(solutions()))
    return sorted(grids[held_out:]), sorted(grids[:held_out])


def sudoku_rows(count: int, grids: Iterable[str], seed: int, min_blanks: int = 8, max_blanks: int = 12) -> list[dict]:
    """`count` different puzzles with exactly one solution, which is one of `grids`.

    Board, number of blanks and blank cells are drawn uniformly; a draw with a second solution is drawn again with the
    same number of blanks. Cells stand side by side without spaces, so that each is one token where digits are split.

    Returns:
        Rows `{"messages", "puzzle", "answer", "source"}`: the user's message is "Sudoku " and the puzzle's 16 digits,
        the assistant's the 16 digits of the solution, which are the answer too.

    Raises:
        ValueError: `count` is negative, `grids` holds no or a wrong board, `min_blanks` and `max_blanks` are not
            0 < min ≤ max ≤ 12 (fewer than four clues never have one solution), or there are not `count` such puzzles.
    """
    grids = list(grids)
    if count < 0:
        raise ValueError(f"`count` must not be negative, got {count}")
    if not grids or not set(grids) <= set(solutions()):
        raise ValueError(f"`grids` must be solved 4×4 boards, at least one, got {grids[:3]}")
    if not 0 < min_blanks <= max_blanks <= 12:
        raise ValueError(f"`min_blanks`, `max_blanks` must be 0 < min ≤ max ≤ 12, got {min_blanks} and {max_blanks}")
    rng = random.Random(f"{seed}/sudoku")
    rows: dict[str, dict] = {}
    while len(rows) < count:
        blanks = rng.randint(min_blanks, max_blanks)
        for _ in range(5000):  # far beyond bad luck: at 12 blanks one draw in twenty has one solution
            grid, hidden = rng.choice(grids), set(rng.sample(range(16), blanks))
            puzzle = "".join("0" if cell in hidden else digit for cell, digit in enumerate(grid))
            if puzzle not in rows and count_solutions(puzzle) == 1:
                break
        else:
            raise ValueError(f"`count` must not exceed the puzzles on `grids` ({blanks} blanks ran out), got {count}")
        turns = (("user", PROMPT + puzzle), ("assistant", grid))
        messages = [{"role": role, "content": content} for role, content in turns]
        rows[puzzle] = {"messages": messages, "puzzle": puzzle, "answer": grid, "source": "sudoku"}
    return list(rows.values())


def sudoku(rng: random.Random, side: str, min_blanks: int = 8, max_blanks: int = 12) -> dict:
    """The quickstart's puzzles: the solutions of training ones are training boards, those of test ones are not."""
    boards = split_grids(GRID_SEED)[side == "test"]
    (row,) = sudoku_rows(1, boards, rng.getrandbits(64), min_blanks, max_blanks)
    return {"prompt": row["messages"][0]["content"], "answer": row["answer"], "puzzle": row["puzzle"]}


def verify(row: dict, answer: str) -> bool:
    """Whether the answer is a solved board with the puzzle's clues."""
    return is_valid_solution(row["puzzle"], answer)


def share_of_blanks(puzzle: str, solution: str, answer: str) -> float:
    """The share of a puzzle's blanks that an answer fills as the solution; 0 if it has other cells or other clues."""
    cells = list(zip(puzzle, solution, answer, strict=False))
    if len(answer) != len(puzzle) or any(clue not in ("0", digit) for clue, _, digit in cells):
        return 0.0
    blanks = [digit == right for clue, right, digit in cells if clue == "0"]
    return sum(blanks) / len(blanks) if blanks else 1.0  # nothing to fill, and all clues kept


def share(row: dict, answer: str) -> float:
    """[`share_of_blanks`] of a puzzle with one solution."""
    fits = (grid for grid in solutions() if all(c in ("0", a) for c, a in zip(row["puzzle"], grid, strict=True)))
    return share_of_blanks(row["puzzle"], next(fits), answer)


def columns(row: dict) -> dict:
    """`puzzle`, 16 digits with one solution."""
    puzzle = needed(row, "puzzle")
    if not isinstance(puzzle, str) or not re.fullmatch(r"[0-4]{16}", puzzle) or count_solutions(puzzle) != 1:
        raise ValueError(f"`puzzle` must be 16 digits from 0 to 4 with one solution, got {puzzle!r}")
    return {"puzzle": puzzle}


PUZZLE = Puzzle(
    name="sudoku",
    help="4×4 boards with blanks and one solution",
    draw=sudoku,
    verify=verify,
    columns=columns,
    has_form=lambda row, answer: re.fullmatch("[1-4]{16}", answer) is not None,
    share=share,
    options={"min_blanks": whole(1, 12), "max_blanks": whole(1, 12)},
    has_sides=True,
)
