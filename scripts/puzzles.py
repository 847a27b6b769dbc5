"""Problems with checkable answers, made from a seed, as rows to train on.

python scripts/puzzles.py --puzzle countdown --rows 20000 --output runs/countdown.jsonl

A problem belongs to the "train" or to the "test" side by its content, whatever the seed: what `evaluate.py --suite`
asks is never among the rows that this program writes.
"""

import json
from dataclasses import dataclass, field
from typing import Literal

from nanollada.trainers.commands.ending import run_program
from nanollada.trainers.puzzles.registry import PUZZLES, write_rows

OPTIONS = "; ".join(
    f"{name}: {', '.join(f'{key} ({option.rule})' for key, option in puzzle.options.items())}"
    for name, puzzle in PUZZLES.items()
)


@dataclass
class PuzzleArguments:
    """Which rows are written, as TRL `messages`."""

    puzzle: Literal[tuple(PUZZLES)] = field(
        metadata={"help": "; ".join(f"{puzzle.name}: {puzzle.help}" for puzzle in PUZZLES.values())}
    )
    rows: int = field(metadata={"help": "How many."})
    output: str = field(metadata={"help": "The .jsonl file."})
    seed: int = field(default=42, metadata={"help": "Of the draws."})
    options: str = field(default="{}", metadata={"help": f"Of the puzzle, as JSON: {OPTIONS}."})


def main(argv: list[str] | None = None) -> None:
    """Writes training rows."""
    from nanollada.trainers.commands.parser import Parser

    (args,) = Parser(PuzzleArguments).parse_args_and_config(argv)
    path = write_rows(args.puzzle, args.rows, args.output, args.seed, **json.loads(args.options))
    print(f"{args.rows:,} rows: {path}")


if __name__ == "__main__":
    run_program(main)
