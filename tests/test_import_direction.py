"""The house: who may import whom, what may ship to the Hub, and how large a thing may grow.

Each rule reads a tree of files and returns its faults. The repository has none, and every rule is seen to fail on a
tree that breaks it.
"""

import ast
import importlib.metadata
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    "configuration_nanollada": set(),
    "modeling_nanollada": {"configuration_nanollada"},
    "trainers": {"configuration_nanollada", "modeling_nanollada"},
    "hub_upload": {"configuration_nanollada", "modeling_nanollada"},
    "scripts": {"configuration_nanollada", "modeling_nanollada", "trainers", "hub_upload"},
}
GROUND = "nanollada.trainers.commands"  # of the programs in all rooms; it stands on nothing
FLAT = ("configuration_nanollada", "modeling_nanollada")  # ship to the Hub
REGISTRY = "trainers/registry.py"
MOST_FILES, MOST_LINES, LONGEST, DEEPEST = 12, 500, 60, 3


def sources(root, *rooms):
    return [path for room in rooms or FLOORS for path in sorted((root / room).rglob("*.py"))]


def name_of(root, path):
    """`nanollada.trainers.data.prepare`; a folder's `__init__.py` bears the folder's name."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(("nanollada", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def statements(path):
    """`(level, module, names)` of every import statement, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", tuple(alias.name for alias in node.names)


def graph(root):
    """Of every module of the house, the modules that it imports: `{name: {name, …}}`."""
    files = {name_of(root, path): path for path in sources(root)}
    edges = {}
    for name, path in files.items():
        edges[name] = reached = set()
        for level, module, names in statements(path):
            if level:
                parent = name if path.name == "__init__.py" else name.rpartition(".")[0]
                module = f"{parent}.{module}".strip(".")
            inner = {f"{module}.{word}" for word in names} & files.keys()  # `from package import module`
            reached |= inner or {module} & files.keys()
        reached.discard(name)
    return edges


def is_program(path):
    return 'if __name__ == "__main__":' in path.read_text()


def back_up(root):
    """Imports that run against the floors, or by a name that is not installed."""
    for path in sources(root):
        room = path.relative_to(root).parts[0]
        for level, module, names in statements(path):
            parts = module.split(".")
            rooms = (parts[1:2] or names) if level == 0 and parts[0] == "nanollada" else ()
            if room not in FLAT and module.startswith(GROUND):
                continue
            yield from (
                f"{path.relative_to(root)} imports nanollada.{target}"
                for target in rooms
                if target not in {room, *FLOORS[room]}
            )
            if level > 1 or level == 1 and room not in FLAT:
                yield f"{path.relative_to(root)} imports by dots"
            if level == 0 and parts[0] in FLOORS:
                yield f"{path.relative_to(root)}: {module} is not an installed name"


def ground(root):
    """What the common ground of all programs imports from the house."""
    for name, targets in graph(root).items():
        if name.startswith(GROUND):
            yield from (f"{name} imports {target}" for target in sorted(targets) if not target.startswith(GROUND))


def circles(root):
    """Circles of files, and circles of the folders inside `trainers/` and `scripts/`."""
    edges = graph(root)
    rooms = {name: ".".join(name.split(".")[:3]) for name in edges if name.count(".") > 2}
    folders = {}
    for name, targets in edges.items():
        if name in rooms:
            reached = {rooms[target] for target in targets if target in rooms} - {rooms[name]}
            folders.setdefault(rooms[name], set()).update(reached)
    for level in (edges, folders):
        try:
            TopologicalSorter(level).prepare()
        except CycleError as fault:
            yield " -> ".join(fault.args[1])


def imported_programs(root):
    """A program is run, not imported. The trainers' programs hold their classes, which the registry names."""
    programs = {name_of(root, path) for path in sources(root, "trainers", "scripts") if is_program(path)}
    registry = name_of(root, root / REGISTRY)
    for name, targets in graph(root).items():
        for target in sorted(targets & programs):
            if not (name == registry and target.startswith("nanollada.trainers.")):
                yield f"{name} imports the program {target}"


def crowded_folders(root):
    """Folders of more than twelve files, but the flat one that ships and the programs' own."""
    for folder in sorted({path.parent for path in sources(root)} - {root / "modeling_nanollada", root / "scripts"}):
        if (count := len(list(folder.glob("*.py")))) > MOST_FILES:
            yield f"{folder.relative_to(root)} holds {count} files"


def long_texts(root):
    """Files of more than 500 lines, functions of more than 60, nesting of more than 3."""
    for path in [*sources(root), *sorted((root / "tests").rglob("*.py"))]:
        text, name = path.read_text(), path.relative_to(root)
        if (lines := len(text.splitlines())) > MOST_LINES:
            yield f"{name} has {lines} lines"
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef):
                continue
            documented = ast.get_docstring(node) is not None
            first = node.body[1].lineno if documented and len(node.body) > 1 else node.lineno
            if node.end_lineno - first >= LONGEST:
                yield f"{name}:{node.lineno} {node.name} has {node.end_lineno - first + 1} lines"
            if (depth := depth_of(node)) > DEEPEST:
                yield f"{name}:{node.lineno} {node.name} is nested {depth} deep"


def depth_of(node, level=0):
    nesting = (ast.For, ast.While, ast.If, ast.With, ast.Try)
    deepest = level
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                continue
            chained = isinstance(node, ast.If) and name == "orelse" and isinstance(child, ast.If)  # elif
            deepest = max(deepest, depth_of(child, level + (isinstance(child, nesting) and not chained)))
    return deepest


def taken_names(root):
    """Names in `scripts/` and `trainers/` that a package or the standard library bears; programs keep theirs."""
    own = {"nanollada", "nano_llada", *FLOORS, "tests"}
    taken = (set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())) - own
    for room in ("scripts", "trainers"):
        for path in sorted((root / room).iterdir()):
            program = path.suffix == ".py" and is_program(path)
            if path.stem in taken and path.suffix in ("", ".py") and not program:
                yield f"{path.relative_to(root)} has the name of a package"


def foreign_imports(root):
    """What ships to the Hub imports torch, transformers and flat siblings only."""
    for path in sources(root, *FLAT):
        bridge = path.relative_to(root).as_posix() == "modeling_nanollada/configuration_nanollada.py"
        allowed = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names} | (
            {"nanollada"} if bridge else set()
        )
        for level, module, _ in statements(path):
            if path.name == "loading_nanollada.py":
                allowed = allowed | {"peft", "safetensors", "tokenizers"}  # does not ship
            if level == 0 and module.split(".")[0] not in allowed:
                yield f"{path.relative_to(root)} imports {module}"
            if level and "." in module:
                yield f"{path.relative_to(root)}: remote code is flat, not {module}"


def imported_tests(root):
    """What tests share is a helper module; a test file stands alone."""
    names = {path.stem for path in (root / "tests").rglob("test_*.py")}
    for path in sorted((root / "tests").rglob("*.py")):
        for _, module, _ in statements(path):
            if module in names:
                yield f"{path.relative_to(root)} imports {module}"


RULES = (
    back_up,
    ground,
    circles,
    imported_programs,
    crowded_folders,
    long_texts,
    taken_names,
    foreign_imports,
    imported_tests,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_stands(rule):
    assert list(rule(ROOT)) == []


MAIN = 'if __name__ == "__main__":\n    pass\n'
DEEP = "def f():\n    if 1:\n        if 1:\n            if 1:\n                if 1:\n                    pass\n"
BROKEN = [
    (back_up, {"trainers/x.py": "def f():\n    from nanollada.scripts.y import z\n"}, "imports nanollada.scripts"),
    (back_up, {"trainers/x.py": "from nanollada import hub_upload\n"}, "imports nanollada.hub_upload"),
    (back_up, {"hub_upload/x.py": "import nanollada.trainers.base\n"}, "imports nanollada.trainers"),
    (back_up, {"modeling_nanollada/x.py": "from nanollada.trainers import y\n"}, "imports nanollada.trainers"),
    (back_up, {"scripts/rooms/x.py": "from .y import z\n"}, "by dots"),
    (back_up, {"scripts/x.py": "import trainers.base\n"}, "not an installed name"),
    (
        back_up,
        {"modeling_nanollada/x.py": "import nanollada.trainers.commands.ending\n"},
        "imports nanollada.trainers",
    ),
    (
        ground,
        {
            "trainers/commands/x.py": "from nanollada.trainers.records import y\n",
            "trainers/records.py": "y = 1\n",
            "hub_upload/x.py": "from nanollada.trainers.commands import x\n",
        },
        "nanollada.trainers.commands.x imports nanollada.trainers.records",
    ),
    (
        circles,
        {
            "scripts/x.py": "import nanollada.scripts.y\n",
            "scripts/y.py": "def f():\n    from nanollada.scripts import x\n",
        },
        "nanollada.scripts.x",
    ),
    (
        circles,
        {
            "trainers/a/x.py": "from nanollada.trainers.b.x import f\n",
            "trainers/b/x.py": "f = 1\n",
            "trainers/b/y.py": "from nanollada.trainers.a.z import g\n",
            "trainers/a/z.py": "g = 1\n",
        },
        "nanollada.trainers.a -> nanollada.trainers.b",
    ),
    (
        imported_programs,
        {"scripts/x.py": MAIN, "scripts/rooms/y.py": "from nanollada.scripts import x\n"},
        "imports the program nanollada.scripts.x",
    ),
    (
        imported_programs,
        {"trainers/x.py": MAIN, "trainers/base.py": "from nanollada.trainers.x import y\n"},
        "imports the program nanollada.trainers.x",
    ),
    (crowded_folders, {f"trainers/data/x{i}.py": "" for i in range(13)}, "trainers/data holds 13 files"),
    (long_texts, {"scripts/x.py": "x = 1\n" * 501}, "has 501 lines"),
    (long_texts, {"tests/rooms/x.py": "x = 1\n" * 501}, "has 501 lines"),
    (long_texts, {"scripts/x.py": "def f():\n" + "    x = 1\n" * 60}, "f has 61 lines"),
    (long_texts, {"trainers/a/x.py": DEEP}, "nested 4 deep"),
    (taken_names, {"scripts/trace.py": "x = 1\n"}, "scripts/trace.py has the name"),
    (taken_names, {"scripts/torch/x.py": "x = 1\n"}, "scripts/torch has the name"),
    (foreign_imports, {"modeling_nanollada/x.py": "import numpy\n"}, "imports numpy"),
    (foreign_imports, {"modeling_nanollada/x.py": "from .a.b import c\n"}, "remote code is flat"),
    (
        imported_tests,
        {"tests/test_x.py": "", "tests/a/test_y.py": "from test_x import z\n"},
        "imports test_x",
    ),
]


@pytest.mark.parametrize(("rule", "files", "fault"), BROKEN, ids=lambda value: getattr(value, "__name__", None))
def test_each_rule_fails_where_it_is_broken(rule, files, fault, tmp_path):
    for room in FLOORS:
        (tmp_path / room).mkdir()
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    faults = list(rule(tmp_path))
    assert len(faults) == 1 and fault in faults[0], faults


def test_every_folder_of_the_house_is_installed():
    """A folder that `pyproject.toml` does not list is missing from the wheel."""
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in sources(ROOT)} - {Path("scripts/package")}
    assert sorted(listed) == ["nanollada", *sorted(".".join(("nanollada", *folder.parts)) for folder in folders)]


def test_importing_the_models_loads_nothing_heavy():
    """`import nanollada.modeling_nanollada` pays for torch and transformers only."""
    heavy = {"trl", "datasets", "peft", "accelerate", "matplotlib", "pandas", "pyarrow", "rich", "scipy", "sklearn"}
    loaded = []
    for first in (
        "import nanollada.modeling_nanollada",
        "import torch; from transformers import PreTrainedModel, GenerationMixin",
    ):
        code = f"{first}; import sys; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        loaded.append(set(done.stdout.split()))
    assert {"torch", "transformers", "nanollada"} <= loaded[0]
    assert not heavy & loaded[0] - loaded[1]
