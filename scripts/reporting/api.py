"""The API page: every public name of the package with the first sentence of its docstring."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("configuration_nanollada", "modeling_nanollada", "trainers", "scripts", "hub_upload")
HEAD = """# Public names

Made by `python scripts/api_page.py` from the docstrings; a test compares. Installed names begin with `nanollada.`.
"""


def first_sentence(docstring: str | None) -> str:
    """The first sentence of a docstring, on one line."""
    paragraph = " ".join((docstring or "").strip().split("\n\n")[0].split())
    return re.split(r"(?<=[.!?]) (?=[A-Z`\[])", paragraph)[0]


def public_names(path: Path) -> Iterator[tuple[str, str]]:
    """`(name, first sentence)` of a file's classes and functions that have a docstring and no leading underscore."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
            docstring = ast.get_docstring(node)
            if docstring and first_sentence(docstring) not in ("Raises:", "Args:", "Returns:"):
                arguments = "" if isinstance(node, ast.ClassDef) else f"({', '.join(_arguments(node.args))})"
                yield f"{node.name}{arguments}", first_sentence(docstring)


def _arguments(arguments: ast.arguments) -> list[str]:
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    names += [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    names += [argument.arg for argument in arguments.kwonlyargs]
    return names + ([f"**{arguments.kwarg.arg}"] if arguments.kwarg else [])


def api_page() -> str:
    """The page as it should be."""
    parts = [HEAD]
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            rows = [f"- `{name}`: {sentence}" for name, sentence in public_names(path)]
            if rows:
                module = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
                parts.append("\n".join([f"## `{module}`\n", *rows, ""]))
    return "\n".join(parts)
