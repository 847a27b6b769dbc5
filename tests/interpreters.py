"""Interpreters for clean processes: this one, and fresh environments with the oldest and the newest packages.

A fresh environment shares torch with this one, which is large and whose bounds are its own matter. Everything else in
it pip chooses on the day, from the package index, as it does for a user.
"""

import json
import os
import re
import subprocess
import sys
import tomllib
import venv
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
CONSTRAINTS = ROOT / "tests" / "constraints.txt"
PACKAGES = ("transformers", "trl", "peft", "accelerate", "datasets")  # what must pass at both ends of its range
CORE = (  # what must hold with every version: loading, decoding, training, publishing
    "test_core.py",
    "modeling_nanollada/test_versions.py::test_both_names_of_the_cache",
    "modeling_nanollada/test_versions.py::test_generate_makes_no_warning_of_its_own",
    "modeling_nanollada/test_modeling.py::test_same_logits_as_qwen3",
    "modeling_nanollada/test_remote_code.py::test_same_logits_without_nanollada",
    "modeling_nanollada/test_remote_code.py::test_generates_without_nanollada",
    "modeling_nanollada/test_remote_code.py::test_fine_tuned_remote_checkpoint_saves_and_loads_again",
    "trainers/test_trainers.py::test_gradient_is_that_of_the_definition",
    "trainers/test_trainers.py::test_accumulation_does_not_change_the_gradient",
    "trainers/test_trainers.py::test_sft_rows_train_on_answers",
    "trainers/test_dpo.py::test_policy_and_reference_alike_have_the_loss_ln_2_without_noise",
    "trainers/test_dpo_contract.py",
    "trainers/test_grpo.py::test_the_gradient_is_the_policy_gradient",
    "trainers/test_grpo_contract.py",
    "modeling_nanollada/test_peft.py::test_saved_loaded_merged",
    "hub_upload/test_hub_upload.py::test_verify_loads_generates_and_compares",
)
TORCH = re.compile(r"(torch|triton|(nvidia|cuda)[-_].*)", re.IGNORECASE)
TIMEOUT = 900  # seconds


def requirements(extra: str | None = None) -> dict[str, Requirement]:
    """The base dependencies of pyproject.toml by name, or those of an extra, with the extras that it names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = {}
    for line in project["dependencies"] if extra is None else project["optional-dependencies"][extra]:
        needed = Requirement(line)
        inner = needed.extras if needed.name == project["name"] else ()
        found |= {needed.name: needed} if not inner else {}
        for other in sorted(inner):
            found |= requirements(other)
    return found


def lower_bound(requirement: Requirement) -> str:
    (bound,) = (clause.version for clause in requirement.specifier if clause.operator == ">=")
    return bound


OLDEST = {name: lower_bound(requirements()[name]) for name in PACKAGES}
INTERPRETERS = [
    "this",
    pytest.param("oldest", marks=pytest.mark.slow, id=f"transformers-{OLDEST['transformers']}"),
]


def make_environment(folder: Path, *arguments: str) -> str:
    """
    The interpreter of a new environment with torch, pytest, and what `pip install` makes of the arguments.

    Raises:
        `RuntimeError`: with pip's own words, if it can't.
    """
    venv.create(folder, symlinks=os.name != "nt")
    python = str(folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    share_torch(folder)
    pip(python, "install", "pytest", *arguments)
    return python


def make_oldest(folder: Path) -> str:
    """With each of `PACKAGES`, and what else is required, at its lower bound."""
    bounds = folder.with_name(f"{folder.name}.txt")
    pins = [f"{name}=={lower_bound(needed)}" for name, needed in requirements().items() if name != "torch"]
    bounds.write_text("\n".join(pins) + "\n")
    return make_environment(folder, "--constraint", str(bounds), "--editable", str(ROOT))


def make_newest(folder: Path) -> str:
    """With what a user's `pip install` gives today: the newest that pyproject.toml allows."""
    return make_environment(folder, "--editable", str(ROOT))


def make_beyond(folder: Path, extra: str | None = None) -> str:
    """With the newest of each of `PACKAGES` that the index has, whatever pyproject.toml allows."""
    more = [] if extra is None else map(str, requirements(extra).values())
    python = make_environment(folder, *without_upper_bounds(), *more)
    pip(python, "install", "--no-deps", "--editable", str(ROOT))
    return python


def without_upper_bounds() -> list[str]:
    return [
        f"{name}>={lower_bound(needed)}" if name in PACKAGES else str(needed)
        for name, needed in requirements().items()
    ]


def newer_releases(python: str) -> dict[str, str]:
    """Those of `PACKAGES` that pip would take instead of the environment's, were there no upper bounds."""
    arguments = ("install", "--quiet", "--dry-run", "--upgrade", "--report", "-", *without_upper_bounds())
    chosen = [found["metadata"] for found in json.loads(pip(python, *arguments))["install"]]
    return {found["name"]: found["version"] for found in chosen if found["name"] in PACKAGES}


def pip(python: str, *arguments: str) -> str:
    """Runs pip on the environment; its output."""
    command = [sys.executable, "-m", "pip", "--python", python, *arguments]
    done = subprocess.run(command, env=surroundings(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`pip {' '.join(arguments)}` failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def surroundings() -> dict[str, str]:
    """This process's environment variables, without those that would lead Python to other packages or settings."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}


def share_torch(folder: Path) -> None:
    """Links torch, and the packages of its accelerators, into a folder outside the environment's own, where pip sees
    them and leaves them alone."""
    shared = folder.with_name(f"{folder.name}-torch")
    shared.mkdir()
    links = {}
    for found in distributions():
        if TORCH.fullmatch(found.name):
            links |= {file.parts[0]: found.locate_file(file.parts[0]) for file in found.files}
    for name in links.keys() - {"..", "__pycache__"}:
        (shared / name).symlink_to(links[name])
    (next(folder.glob("**/site-packages")) / "torch.pth").write_text(f"{shared}\n")


def installed(python: str) -> dict[str, str]:
    """Versions by normalised name."""
    listed = json.loads(pip(python, "list", "--format", "json"))
    return {canonicalize_name(found["name"]): found["version"] for found in listed}


def read_constraints(path: Path = CONSTRAINTS) -> dict[str, str]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def run_core(python: str) -> subprocess.CompletedProcess:
    """The core set in that environment, without this process's settings."""
    tests = [str(ROOT / "tests" / test) for test in CORE]
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=ROOT, env=surroundings(), capture_output=True, text=True, timeout=TIMEOUT)


def minor(version: str) -> str:
    return ".".join(map(str, Version(version).release[:2]))


def beyond_failure(newer: dict[str, str], done: subprocess.CompletedProcess) -> str:
    """That releases which nobody has tested fail, and where."""
    tested = read_constraints()
    named = [
        f"{name} {version} (newest in the registry, tested: {minor(tested[name])})"
        for name, version in newer.items()
        if minor(version) != minor(tested[name])
    ]
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    said = "\n".join(failed) or f"{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return f"{', '.join(named) or 'what the registry has now'} fails the core set:\n{said}"
