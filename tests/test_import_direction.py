"""The rooms of the package: who may import whom, and what may ship to the Hub."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "configuration_nanollada": set(),
    "modeling_nanollada": {"configuration_nanollada"},
    "trainers": {"configuration_nanollada", "modeling_nanollada"},
    "hub_upload": {"configuration_nanollada", "modeling_nanollada"},
    "scripts": {"configuration_nanollada", "modeling_nanollada", "trainers", "hub_upload"},
}
FILES = [path for room in MAY_IMPORT for path in sorted((ROOT / room).glob("*.py"))]
HUB_FILES = [path for path in FILES if path.parent.name in ("configuration_nanollada", "modeling_nanollada")]


def imports(path):
    """`(level, module)` of every import statement, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_imports_point_one_way(path):
    room = path.parent.name
    for level, module in imports(path):
        assert level <= 1, f"{path}: imports from outside its folder by dots"
        parts = module.split(".")
        if level == 0 and parts[0] == "nanollada" and len(parts) > 1:
            assert parts[1] == room or parts[1] in MAY_IMPORT[room], f"{path} imports {module}"
        assert level == 1 or parts[0] not in MAY_IMPORT, f"{path}: {module} is not an installed name"


@pytest.mark.parametrize("path", [p for p in HUB_FILES if p.name != "__init__.py"], ids=lambda path: path.name)
def test_what_ships_imports_torch_and_transformers_only(path):
    bridge = path.name == "configuration_nanollada.py" and path.parent.name == "modeling_nanollada"
    allowed = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names} | (
        {"nanollada"} if bridge else set()
    )
    for level, module in imports(path):
        assert level == 1 or module.split(".")[0] in allowed, f"{path} imports {module}"
        assert level == 0 or "." not in module, f"{path}: remote code is flat, not {module}"


@pytest.mark.parametrize("path", FILES + sorted((ROOT / "tests").glob("*.py")), ids=lambda path: path.name)
def test_budgets(path):
    """Files of at most 500 lines, functions of at most 60, nesting of at most 3."""
    source = path.read_text()
    if path.parent.name != "tests":
        assert len(source.splitlines()) <= 500
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            documented = ast.get_docstring(node) is not None
            first = node.body[1].lineno if documented and len(node.body) > 1 else node.lineno
            assert node.end_lineno - first < 60, f"{path.name}:{node.lineno} {node.name} is too long"
            assert depth(node) <= 3, f"{path.name}:{node.lineno} {node.name} is nested too deeply"


def depth(node, level=0):
    nesting = (ast.For, ast.While, ast.If, ast.With, ast.Try)
    deepest = level
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                continue
            chained = isinstance(node, ast.If) and name == "orelse" and isinstance(child, ast.If)  # elif
            deepest = max(deepest, depth(child, level + (isinstance(child, nesting) and not chained)))
    return deepest


def test_importing_the_models_loads_nothing_heavy():
    """`import nanollada.modeling_nanollada` pays for torch and transformers only."""
    code = "import sys, nanollada.modeling_nanollada; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in loaded and "transformers" in loaded
    heavy = {"trl", "datasets", "peft", "accelerate", "matplotlib", "pandas", "pyarrow", "rich", "scipy", "sklearn"}
    before = "import sys, torch; from transformers import PreTrainedModel, GenerationMixin; "
    code = before + "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    base = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not (heavy & set(loaded)) - set(base)
