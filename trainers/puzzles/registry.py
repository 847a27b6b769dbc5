"""The puzzles there are. A new one is a file with a `PUZZLE`, and its name here."""

import json
from pathlib import Path

from nanollada.trainers.puzzles import arithmetic, countdown, sudoku
from nanollada.trainers.puzzles.puzzle import Puzzle
from nanollada.trainers.records import write_whole

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


def write_rows(puzzle: str, rows: int, output: str | Path, seed: int = 42, **options) -> Path:
    """Writes training rows of a puzzle by name as TRL `messages`, a line each, as `scripts/puzzles.py` does."""
    lines = []
    for row in make_rows(puzzle, rows, seed, "train", **options):
        turns = (("user", row["prompt"]), ("assistant", row["answer"]))
        messages = [{"role": role, "content": content} for role, content in turns]
        lines.append(json.dumps({"messages": messages, "source": puzzle}, ensure_ascii=False) + "\n")
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(lines))
    return path


def solves(puzzle: str, row: dict, answer: str) -> bool:
    """Whether an answer solves a problem of a puzzle by name; any right one does, malformed ones are just wrong."""
    return PUZZLES[puzzle].verify(row, answer.strip())
