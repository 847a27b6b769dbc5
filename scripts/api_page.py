"""Writes scripts/API.md, the public names with the first sentences of their docstrings.

python scripts/api_page.py
"""

import argparse
from pathlib import Path

from nanollada.scripts.reporting.api import api_page
from nanollada.trainers.records import write_whole


def main(argv: list[str] | None = None) -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default=Path(__file__).with_name("API.md"), help="The page.")
    args = parser.parse_args(argv)
    write_whole(args.output, api_page())
    print(f"names: {args.output}")


if __name__ == "__main__":
    main()
