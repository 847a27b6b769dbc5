"""Measures what this machine makes of the package; every figure with its spread, beside what the hardware can do.

python scripts/benchmark.py train --data rows.jsonl --size 32m --max_length 256
python scripts/benchmark.py generate --model checkpoint --ar_model its_twin --score_data answers.jsonl
python scripts/benchmark.py length --models checkpoint --score_data answers.jsonl
"""

import importlib
import sys

from nanollada.trainers.commands.ending import run_program
from nanollada.trainers.commands.programs import nearest

COMMANDS = {
    "train": "nanollada.scripts.benchmarks.training",
    "generate": "nanollada.scripts.benchmarks.decoding",
    "length": "nanollada.scripts.benchmarks.lengths",
}


def main(argv: list[str] | None = None):
    """Hands over to the command that the first argument names, and returns what it returns."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["--help"], ["-h"]):
        helps = [importlib.import_module(module).parser().format_help() for module in COMMANDS.values()]
        return print(__doc__, *helps, sep="\n")
    if not argv or argv[0] not in COMMANDS:
        word = argv[0] if argv else "none"
        raise ValueError(f"the first word must be one of {', '.join(COMMANDS)}, got {word}{nearest(word, COMMANDS)}")
    return importlib.import_module(COMMANDS[argv[0]]).main(argv[1:])


if __name__ == "__main__":
    run_program(main)
