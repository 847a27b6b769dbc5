"""The puzzles there are. A new one is a file with a `PUZZLE`, and its name here."""

from nanollada.trainers.puzzles import arithmetic, countdown, sudoku
from nanollada.trainers.puzzles.puzzle import Puzzle

PUZZLES: dict[str, Puzzle] = {member.PUZZLE.name: member.PUZZLE for member in (arithmetic, countdown, sudoku)}


def make_rows(puzzle: str, count: int, seed: int, side: str = "test", /, **options) -> list[dict]:
    """
    Different problems of a puzzle by name, as [`~trainers.puzzles.puzzle.Puzzle.make_rows`].

    Raises:
        `ValueError`: for a name that no puzzle has, and as `Puzzle.make_rows`.
    """
    if puzzle not in PUZZLES:
        raise ValueError(f"`puzzle` must be among {', '.join(PUZZLES)}, got {puzzle!r}")
    return PUZZLES[puzzle].make_rows(count, seed, side, **options)


def solves(puzzle: str, row: dict, answer: str) -> bool:
    """Whether an answer solves a problem of a puzzle by name; any right one does, malformed ones are just wrong."""
    return PUZZLES[puzzle].verify(row, answer.strip())
