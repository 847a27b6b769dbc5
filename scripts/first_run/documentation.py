"""What an installation documents: prose of the language reference, the standard library and known packages.

Nothing is downloaded and no module is imported to be read: docstrings are taken from source files with `ast`, long
descriptions from the packages' metadata.
"""

import ast
import gc
import hashlib
import importlib.metadata
import inspect
import itertools
import os
import platform
import random
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

# The packages that are read where installed: public projects that nanollada or its requirements need. Anything else in
# an environment, perhaps private, adds nothing to a corpus that may be published.
PACKAGES = """torch transformers numpy datasets trl accelerate peft huggingface-hub pandas sympy networkx tqdm jinja2
tokenizers safetensors pyarrow fsspec mpmath filelock packaging psutil regex rich pydantic click setuptools""".split()
# Folders that hold tests, generated or vendored code: their docstrings say little or are somebody else's.
SKIPPED_FOLDERS = """test tests testing _testing test_utils idlelib lib2to3 turtledemo encodings ensurepip pydoc_data
site-packages dist-packages __pycache__ _vendor _internal ..""".split()
MIN_CHARACTERS, MAX_CHARACTERS = 200, 4000
FUNCTION_WORDS = """a an and are as at be been but by can do does each for from has have if in into is it its may more
must no not of on one only or other should so such than that the their them then there these they this to used using
was when where which will with you your""".split()


class DocumentedObject(NamedTuple):
    """A module, class, function or method and its docstring. `arguments` is None for modules and classes."""

    kind: str
    name: str
    module: str
    docstring: str
    arguments: tuple[str, ...] | None = None


class Documentation(NamedTuple):
    """What was read: `{"text", "source"}` rows, documented objects, versions, licenses and counts of packages."""

    documents: list[dict[str, str]]
    objects: list[DocumentedObject]
    packages: dict[str, dict]
    unreadable_files: list[str]


class _Unit(NamedTuple):
    """One thing to read: a source file (`path`, `module`) or a `text` that is already in hand."""

    package: str
    name: str
    module: str = ""
    path: Path | None = None
    text: str = ""


def plain_text(markup: str) -> str:
    """Markdown, Sphinx and Hugging Face markup reduced to text with `code`; images, comments and code blocks go."""
    text = re.sub(r"^ *(```|~~~).*?^ *\1[^\n]*$|<!--.*?-->", "\n\n", inspect.cleandoc(markup), flags=re.S | re.M)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)  # Markdown images
    text = re.sub(r"\[([^\]\n]+)\]\([^)\s]+\)", r"\1", text)  # Markdown links
    text = re.sub(r"\[(`[^`\n]+`)\]", r"\1", text)  # [`Class`] of Hugging Face docstrings
    text = re.sub(r":[a-zA-Z:]+:`[~!.]*([^`<]+?)(?:\s*<[^`>]*>)?`", r"`\1`", text)  # Sphinx roles
    text = re.sub(r"`([^`<]+?)\s*<[^`>]*>`__?", r"\1", text)  # reST links
    return re.sub(r"``([^`]+)``", r"`\1`", text).replace("::\n", ":\n")


def prose_paragraphs(docstring: str) -> list[str]:
    """The paragraphs of a docstring or README that read as English sentences, markup simplified, lines joined.

    Code, doctests, tables, headings and anything with a URL or a special token (`<|…|>`) are left out.
    """
    paragraphs = (joined_lines(part) for part in re.split(r"\n\s*\n", plain_text(docstring)))
    return [paragraph for paragraph in paragraphs if _is_prose(paragraph)]


def joined_lines(paragraph: str) -> str:
    """Lines joined but before list items and `name (type):`; empty for what its first signs show as code or table."""
    lines = [line.strip() for line in paragraph.strip().splitlines()]
    if any(re.match(r">>>|\.\. |[|+#<@$]|:\w+|[-=~^*_]{3,}", line) for line in lines):
        return ""
    text = re.sub(r"(\w-)\n(?=[a-z])", r"\1", "\n".join(lines))  # fixed-\npoint
    text = re.sub(r"\n(?![-*•] |\d+[.)] |[`*]*[\w.]+[`*]*( \([^)\n]*\))?:(\s|$))", " ", text)
    return re.sub(r"[ \t]+", " ", text).strip()


def _is_prose(paragraph: str) -> bool:
    """Whether a joined paragraph is English prose: sentence-like ends, mostly letters, a fair part function words."""
    if len(paragraph) > MAX_CHARACTERS - MIN_CHARACTERS - 2 or re.search(r"://|<\||\|>", paragraph):
        return False
    if not paragraph.replace("\n", "").isprintable() or not re.match(r"[A-Z`\"'(*-]|\d+[.)] ", paragraph):
        return False
    words = re.findall(r"[A-Za-z']+", paragraph)
    letters = len(re.sub(r"[^A-Za-z\s]+", "", paragraph))
    function_words = sum(word.lower() in FUNCTION_WORDS for word in words)
    ends = re.search(r"[.!?)]['\"`)]*$", paragraph) is not None
    return ends and len(words) >= 8 and letters >= 0.85 * len(paragraph) and function_words >= 0.22 * len(words)


def _new_paragraphs(docstring: str, seen: set[str]) -> list[str]:
    """Prose not in `seen`; copied docstrings often differ in names and numbers only, so plain words are compared."""
    new = {}
    for paragraph in prose_paragraphs(docstring):
        words = re.findall(r"(?<![\w`.])[a-z]+(?![\w`])", paragraph)
        key = hashlib.sha256(" ".join(words).encode()).hexdigest()
        if key not in seen:
            new[key] = paragraph
            seen.add(key)
    return list(new.values())


def _walk(node: ast.AST, name: str, module: str) -> Iterator[DocumentedObject]:
    """The module, its top-level classes and functions, and the classes' methods, in source order."""
    docstring = ast.get_docstring(node, clean=False)
    function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    if docstring:
        kind = {ast.Module: "module", ast.ClassDef: "class"}.get(type(node), "function")
        kind = "method" if kind == "function" and name.count(".") > module.count(".") + 1 else kind
        yield DocumentedObject(kind, name, module, docstring, _argument_names(node.args) if function else None)
    if function:
        return
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _walk(child, f"{name}.{child.name}", module)


def _argument_names(arguments: ast.arguments) -> tuple[str, ...]:
    names = [argument.arg for argument in arguments.posonlyargs + arguments.args]
    names += [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    names += [argument.arg for argument in arguments.kwonlyargs]
    names += [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    return tuple(name for name in names if name not in ("self", "cls", "mcs"))


def _read_objects(unit: _Unit) -> list[DocumentedObject]:
    """Raises OSError, SyntaxError, ValueError or RecursionError for a file that cannot be read or parsed."""
    source = unit.path.read_bytes()
    # Parsing is the slow part, so a file is parsed only if a fair part of it looks like docstrings.
    documented = sum(len(match.group()) for match in re.finditer(rb'("""|\'\'\').+?\1', source, re.S))
    if documented < 400 or documented < 0.08 * len(source):
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's sources
        return list(_walk(ast.parse(source), unit.module, unit.module))


def _texts(named: Iterable[tuple[str, list[str]]]) -> Iterator[str]:
    """Documents of 200–4000 characters from (name, paragraphs): short entries share one, long ones are split."""
    short = []
    for name, paragraphs in named:
        if sum(map(len, paragraphs)) < MIN_CHARACTERS:
            short += [f"`{name}`: {paragraph}" for paragraph in paragraphs[:1]] + paragraphs[1:]
            continue
        yield from _pieces([name, *paragraphs])
    yield from _pieces(short)


def _pieces(paragraphs: list[str]) -> Iterator[str]:
    piece = ""
    for paragraph in paragraphs:
        if len(piece) + len(paragraph) + 2 > MAX_CHARACTERS:
            yield piece
            piece = ""
        piece = f"{piece}\n\n{paragraph}" if piece else paragraph
    if len(piece) >= MIN_CHARACTERS:
        yield piece


def _source_unit(package: str, file: Path, path: Path) -> _Unit:
    parts = file.parent.parts if file.stem == "__init__" else file.with_suffix("").parts
    return _Unit(package, file.as_posix(), ".".join(parts), path)


def _library_units(root: Path) -> list[_Unit]:
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = set(subfolders).difference(SKIPPED_FOLDERS)
        files += [Path(folder, name).relative_to(root) for name in names if name.endswith(".py")]
    return [_source_unit("python", file, root / file) for file in sorted(files)]


def _topic_units(root: Path) -> list[_Unit]:
    """The language reference's topics, as `help("for")` shows them; none where Python comes without them."""
    path = root / "pydoc_data" / "topics.py"
    if not path.exists():
        return []
    tables = [
        node.value for node in ast.parse(path.read_bytes()).body if isinstance(getattr(node, "value", 0), ast.Dict)
    ]
    topics = [item for table in tables for item in ast.literal_eval(table).items()]
    return [_Unit("python", f"topics/{name}", text=text) for name, text in sorted(topics)]


def _package_units(name: str, distribution: importlib.metadata.Distribution) -> list[_Unit]:
    description = distribution.metadata.get("Description") or distribution.metadata.get_payload() or ""
    sources = sorted(file for file in map(Path, distribution.files or ()) if file.suffix == ".py")
    sources = [file for file in sources if not set(SKIPPED_FOLDERS).intersection(file.parts)]
    units = [_source_unit(name, file, Path(distribution.locate_file(file))) for file in sources]
    return [_Unit(name, "description", text=description), *units]


def _stated_license(distribution: importlib.metadata.Distribution) -> str:
    metadata = distribution.metadata
    classifiers = [c.split(" :: ")[-1] for c in metadata.get_all("Classifier") or () if c.startswith("License ::")]
    first_line = (metadata.get("License") or "").strip().split("\n")[0][:80]
    return metadata.get("License-Expression") or first_line or ", ".join(classifiers) or "not stated"


def read_documentation(max_bytes: int, seed: int = 42) -> Documentation:
    """Reads documents until `max_bytes` (UTF-8) of text are found or the sources end.

    Sources take turns: topics of the language reference, files of the standard library, and files of `PACKAGES`. A
    paragraph that was seen before (names and numbers aside) is left out.

    Raises a ValueError if `max_bytes` is negative.
    """
    if max_bytes < 0:
        raise ValueError(f"`max_bytes` must not be negative, got {max_bytes}")
    rng = random.Random(f"{seed}/documentation")
    library = Path(sysconfig.get_paths()["stdlib"])
    installed = ((name, next(iter(importlib.metadata.distributions(name=name)), None)) for name in PACKAGES)
    distributions = {name: distribution for name, distribution in installed if distribution is not None}
    queues = [_topic_units(library), _library_units(library)]
    queues += [_package_units(name, distribution) for name, distribution in distributions.items()]
    for queue in queues:
        rng.shuffle(queue)
    stated = {name: {"version": d.version, "license": _stated_license(d)} for name, d in distributions.items()}
    stated["python"] = {"version": platform.python_version(), "license": "PSF-2.0"}
    gathered = Documentation(
        [], [], {name: facts | {"documents": 0, "bytes": 0} for name, facts in stated.items()}, []
    )
    packages = itertools.chain.from_iterable(itertools.zip_longest(*queues[2:]))
    units = itertools.chain.from_iterable(itertools.zip_longest(*queues[:2], filter(None, packages)))
    collecting = gc.isenabled()
    gc.disable()  # parsing allocates many small nodes: it takes two thirds of the time without the collector
    try:
        _collect(filter(None, units), max_bytes, gathered)
    finally:
        if collecting:
            gc.enable()
    rng.shuffle(gathered.documents)
    return gathered


def _collect(units: Iterable[_Unit], left: int, gathered: Documentation) -> None:
    """Adds to `gathered` until `left` bytes are used up."""
    seen: set[str] = set()
    progress = tqdm(total=left, desc="documentation", unit="B", unit_scale=True)
    for unit in units:
        if left < MIN_CHARACTERS:
            break
        try:
            objects = _read_objects(unit) if unit.path else []
        except (OSError, SyntaxError, ValueError, RecursionError):  # e.g. a template, or syntax of a newer Python
            gathered.unreadable_files.append(f"{unit.package}: {unit.name}")
            continue
        gathered.objects.extend(objects)
        entries = [(o.name, o.docstring) for o in objects] or [(unit.name.removeprefix("topics/"), unit.text)]
        for text in _texts([(name, _new_paragraphs(markup, seen)) for name, markup in entries]):
            size = len(text.encode())
            if size <= left:  # else a later, shorter one may still fit
                left -= size
                progress.update(size)
                gathered.documents.append({"text": text, "source": f"{unit.package}: {unit.name}"})
                gathered.packages[unit.package]["documents"] += 1
                gathered.packages[unit.package]["bytes"] += size
    progress.close()
