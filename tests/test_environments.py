"""The versions of what we build on: written down alike everywhere, and (slow) tested at both ends of their ranges."""

import shutil
import subprocess
import warnings

import interpreters
import pytest
import raise_versions
from interpreters import (
    CORE,
    OLDEST,
    PACKAGES,
    ROOT,
    beyond_failure,
    minor,
    read_constraints,
    requirements,
)
from packaging.utils import canonicalize_name
from packaging.version import Version

from nanollada.modeling_nanollada import versions_nanollada

PLACES = ("pyproject.toml", "tests/constraints.txt", "modeling_nanollada/versions_nanollada.py")


def check_agreement(bounds, pins, newest_tested):
    """Each range ends behind the minor version that the constraints hold."""
    for name in PACKAGES:
        (below,) = (clause.version for clause in bounds[name].specifier if clause.operator == "<")
        major, middle = Version(pins[name]).release[:2]
        assert Version(below) == Version(f"{major}.{middle + 1}"), name
    assert minor(pins["transformers"]) == newest_tested


def test_bounds_constraints_and_the_shipped_constant_agree():
    check_agreement(requirements(), read_constraints(), versions_nanollada.NEWEST_TESTED)
    assert minor(OLDEST["transformers"]) == versions_nanollada.OLDEST_TESTED


def test_the_constraints_pin_all_that_the_commands_install():
    pins = read_constraints()
    needed = {**requirements(), **requirements("dev")}
    assert {"gradio", "lm-eval", "matplotlib", "pytest", "torch"} <= needed.keys()
    for name, requirement in needed.items():
        assert requirement.specifier.contains(pins[canonicalize_name(name)]), name
    assert not any(Version(version).local for version in pins.values())  # neither of a CPU nor of a GPU
    assert not [name for name in pins if name.startswith(("nvidia", "cuda", "triton"))]


def test_the_core_set_is_whole():
    for test in CORE:
        file, _, name = test.partition("::")
        assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8") or not name, test


@pytest.mark.parametrize("kind", [FutureWarning, DeprecationWarning])
def test_what_our_own_calls_are_told_to_change_is_an_error(kind):
    """By the filters of pyproject.toml; libraries may tell each other."""
    for module in ("nanollada.modeling_nanollada.x", "transformers_modules.a.x", "transformers.x", "test_core"):
        with pytest.raises(kind, match="^old$"):
            warnings.warn_explicit("old", kind, "x.py", 1, module)
    with pytest.warns(kind, match="^old$"):
        warnings.warn_explicit("old", kind, "x.py", 1, "peft.x")


# ------------------------------------------------------------------------------------------------ raising, on copies


@pytest.fixture
def copied(tmp_path):
    for place in PLACES:
        (tmp_path / place).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / place, tmp_path / place)
    return tmp_path


def test_raising_writes_all_places(copied, monkeypatch):
    later = {name: f"{Version(read_constraints()[name]).major}.97.3" for name in PACKAGES}
    more = {"nanollada": "0.1.0", "pip": "26.0", "nvidia-cublas": "13.1", "numpy": "2.9.9", "torch": "2.13.0+cu130"}
    said = raise_versions.raise_to({**later, **more}, copied)
    old, pins = read_constraints(), read_constraints(copied / "tests" / "constraints.txt")
    assert pins == {**later, "numpy": "2.9.9", "torch": "2.13.0"}
    assert f"transformers {old['transformers']} -> {later['transformers']}" in said
    assert f"pytest {old['pytest']} -> None" in said
    code = {}
    exec((copied / "modeling_nanollada" / "versions_nanollada.py").read_text(), code)
    monkeypatch.setattr(interpreters, "ROOT", copied)
    check_agreement(requirements(), pins, code["NEWEST_TESTED"])
    kept = requirements()["torch"]
    monkeypatch.undo()
    assert kept == requirements()["torch"]


def test_nothing_is_raised_where_the_core_set_fails(monkeypatch, capsys):
    found = {**read_constraints(), "transformers": "6.1.0"}
    failing = subprocess.CompletedProcess([], 1, "FAILED tests/test_core.py::test_a - assert False\n", "")
    monkeypatch.setattr(raise_versions, "make_beyond", lambda folder, extra: "python")
    monkeypatch.setattr(raise_versions, "installed", lambda python: found)
    monkeypatch.setattr(raise_versions, "run_core", lambda python: failing)
    monkeypatch.setattr(raise_versions, "raise_to", lambda found: pytest.fail("files were written"))
    assert raise_versions.main() == 1
    tested = versions_nanollada.NEWEST_TESTED
    said = f"transformers 6.1.0 (newest in the registry, tested: {tested}) fails the core set:\nFAILED tests/test_core"
    assert said in capsys.readouterr().out


def test_an_unreadable_place_is_named(copied):
    (copied / "modeling_nanollada" / "versions_nanollada.py").write_text("NEWEST = 1\n")
    before = (copied / "pyproject.toml").read_bytes()
    with pytest.raises(ValueError, match="NEWEST_TESTED.* must match once, got 0 matches"):
        raise_versions.raise_to(read_constraints(), copied)
    assert (copied / "pyproject.toml").read_bytes() == before


# ------------------------------------------------------------------------------------- fresh environments, by pip


@pytest.mark.slow
@pytest.mark.parametrize("which", ["oldest_python", "newest_python"])
def test_the_core_set_passes(which, request):
    """With the lower bounds of pyproject.toml, and with the newest that it allows: what a user without constraints
    gets today."""
    python = request.getfixturevalue(which)
    done = interpreters.run_core(python)
    found = {name: interpreters.installed(python)[name] for name in PACKAGES}
    assert which != "oldest_python" or all(Version(found[name]) == Version(OLDEST[name]) for name in PACKAGES)
    assert done.returncode == 0, f"the core set fails with {found}:\n{done.stdout[-5000:]}{done.stderr[-2000:]}"


@pytest.mark.slow
def test_releases_beyond_the_tested_range_are_reported(newest_python, tmp_path):
    """A release that nobody has tested must be seen, loudly, but may not stop a change that has nothing to do with
    it: the bounds keep it from users, who are stopped by `raise_versions.py` alone."""
    newer = interpreters.newer_releases(newest_python)
    if not newer:
        return  # the index has nothing beyond the environment that `test_the_core_set_passes` has run on
    done = interpreters.run_core(interpreters.make_beyond(tmp_path / "beyond"))
    if done.returncode:
        pytest.xfail(beyond_failure(newer, done))
    warnings.warn(f"the core set passes with {newer}, newer than tested: tests/raise_versions.py", stacklevel=1)
