"""The console command: `nanollada NAME …`, and `python -m nanollada NAME …`."""

import sys
from importlib import import_module
from importlib.metadata import version

from nanollada.trainers.commands.ending import end, run_program
from nanollada.trainers.commands.programs import CONSOLE, PROGRAMS, nearest


def overview() -> str:
    """The programs with a line each."""
    width = max(map(len, PROGRAMS)) + 2
    lines = [f"  {name:<{width}}{program.help}" for name, program in PROGRAMS.items()]
    head = [f"usage: {CONSOLE} NAME [--help] [--option value …]", "", *lines, ""]
    return "\n".join([*head, f"`{CONSOLE} NAME --help` lists a program's options."])


def main() -> None:
    """Runs the program that the first word names with the others."""
    name, *words = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
    elif name == "--version":
        print(version(CONSOLE))
    elif name in PROGRAMS:
        run_program(import_module(PROGRAMS[name].module).main, words)
    else:
        near = nearest(name.replace("_", "-"), PROGRAMS)
        end(f"unknown program `{name}`{near or f'; `{CONSOLE} --help` lists them'}")


if __name__ == "__main__":
    main()
