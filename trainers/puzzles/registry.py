"""The puzzles there are. A new one is a file with a `PUZZLE`, and its name here."""

import json
from collections.abc import Callable, Container
from pathlib import Path

from nanollada.trainers.puzzles import arithmetic, countdown, sudoku, sudoku9
from nanollada.trainers.puzzles.puzzle import Puzzle
from nanollada.trainers.records import write_whole

MEMBERS = (arithmetic, countdown, sudoku, sudoku9)
PUZZLES: dict[str, Puzzle] = {member.PUZZLE.name: member.PUZZLE for member in MEMBERS}


def make_rows(
    puzzle: str, count: int, seed: int, side: str = "test", unlike: Container[str] = (), /, **options
) -> list[dict]:
    """
    Different problems of a puzzle by name, as [`~trainers.puzzles.puzzle.Puzzle.make_rows`].

    Raises:
        `ValueError`: for a name that no puzzle has, and as `Puzzle.make_rows`.
    """
    if puzzle not in PUZZLES:
        raise ValueError(f"`puzzle` must be among {', '.join(PUZZLES)}, got {puzzle!r}")
    return PUZZLES[puzzle].make_rows(count, seed, side, unlike, **options)


def _messages_row(puzzle: str, row: dict) -> dict:
    """To learn from: the problem and its answer, as TRL `messages`."""
    turns = (("user", row["prompt"]), ("assistant", row["answer"]))
    return {"messages": [{"role": role, "content": content} for role, content in turns], "source": puzzle}


def _prompts_row(puzzle: str, row: dict) -> dict:
    """To be rewarded: TRL's `prompt`, the puzzle whose verifier decides, and what that reads."""
    columns = {name: value for name, value in row.items() if name != "prompt"}
    return {"prompt": [{"role": "user", "content": row["prompt"]}], "verify": puzzle, **columns}


FORMATS: dict[str, Callable[[str, dict], dict]] = {"messages": _messages_row, "prompts": _prompts_row}


def write_rows(
    puzzle: str,
    rows: int,
    output: str | Path,
    seed: int = 42,
    format: str = "messages",
    unlike: Container[str] = (),
    **options,
) -> Path:
    """
    Writes training rows of a puzzle by name, a line each, as `scripts/puzzles.py` does.

    Args:
        puzzle, rows, seed, unlike, options: As of `make_rows`.
        output (`str` or `Path`): The .jsonl file; its folder is made.
        format (`str`): "messages" for SFT or "prompts" for reinforcement learning.

    Raises:
        `ValueError`: as `make_rows`, and for another format.
    """
    if format not in FORMATS:
        raise ValueError(f"`format` must be among {', '.join(FORMATS)}, got {format!r}")
    lines = []
    for row in make_rows(puzzle, rows, seed, "train", unlike, **options):
        lines.append(json.dumps(FORMATS[format](puzzle, row), ensure_ascii=False) + "\n")
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(lines))
    return path


def solves(puzzle: str, row: dict, answer: str) -> bool:
    """Whether an answer solves a problem of a puzzle by name; any right one does, malformed ones are just wrong."""
    return PUZZLES[puzzle].verify(row, answer.strip())
