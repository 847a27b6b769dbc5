"""Problems with checkable answers, made from a seed, as rows to train on.

python scripts/puzzles.py --puzzle countdown --rows 20000 --output runs/countdown.jsonl
python scripts/puzzles.py --puzzle countdown --rows 2000 --format prompts --unlike runs/countdown.jsonl \\
    --output runs/countdown_prompts.jsonl   # problems that the first file does not have, to be rewarded

A problem belongs to the "train" or to the "test" side by its content, whatever the seed: what `evaluate.py --suite`
asks is never among the rows that this program writes.
"""

import json
from dataclasses import dataclass, field
from typing import Literal

from nanollada.trainers.commands.ending import run_program
from nanollada.trainers.puzzles.registry import FORMATS, PUZZLES, write_rows

OPTIONS = "; ".join(
    f"{name}: {', '.join(f'{key} ({option.rule})' for key, option in puzzle.options.items())}"
    for name, puzzle in PUZZLES.items()
)


@dataclass
class PuzzleArguments:
    """Which rows are written."""

    puzzle: Literal[tuple(PUZZLES)] = field(
        metadata={"help": "; ".join(f"{puzzle.name}: {puzzle.help}" for puzzle in PUZZLES.values())}
    )
    rows: int = field(metadata={"help": "How many."})
    output: str = field(metadata={"help": "The .jsonl file."})
    seed: int = field(default=42, metadata={"help": "Of the draws."})
    format: Literal[tuple(FORMATS)] = field(
        default="messages",
        metadata={"help": "messages: problem and answer, for SFT. prompts: problem and verifier, for train-grpo."},
    )
    unlike: list[str] = field(
        default_factory=list, metadata={"help": "Files of rows (any format) whose problems are left out."}
    )
    options: str = field(default="{}", metadata={"help": f"Of the puzzle, as JSON: {OPTIONS}."})


def _options(puzzle: str, text: str) -> dict:
    try:
        options = json.loads(text)
    except ValueError as error:
        raise ValueError(f"`options` must be JSON, got {text!r}: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"`options` must be an object of JSON, got {text!r}")
    PUZZLES[puzzle].check_options(options)
    return options


def main(argv: list[str] | None = None) -> None:
    """Writes training rows."""
    from nanollada.trainers.commands.parser import Parser
    from nanollada.trainers.data.feedback.prompts import texts_of

    (args,) = Parser(PuzzleArguments).parse_args_and_config(argv)
    options, given = _options(args.puzzle, args.options), texts_of(args.unlike, "unlike")
    path = write_rows(args.puzzle, args.rows, args.output, args.seed, args.format, given, **options)
    print(f"{args.rows:,} rows: {path}")


if __name__ == "__main__":
    run_program(main)
