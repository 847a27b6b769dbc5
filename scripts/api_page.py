"""Writes scripts/API.md, the public names with the first sentences of their docstrings.

python scripts/api_page.py
"""

from pathlib import Path

from nanollada.scripts.reporting.api import api_page
from nanollada.trainers.commands.ending import run_program
from nanollada.trainers.records import write_whole


def main(argv: list[str] | None = None) -> None:
    """Writes the page."""
    from nanollada.trainers.commands.parser import PlainParser

    parser = PlainParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default=Path(__file__).with_name("API.md"), help="The page.")
    args = parser.parse_args(argv)
    write_whole(args.output, api_page())
    print(f"names: {args.output}")


if __name__ == "__main__":
    run_program(main)
