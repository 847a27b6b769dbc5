"""Raises the tested versions to the newest that the package index has, if the core set passes with them.

python tests/raise_versions.py

Makes a fresh environment without the upper bounds of pyproject.toml, runs the core set of interpreters.py there, and,
when it passes, writes the exact versions to tests/constraints.txt, the bounds to pyproject.toml, and the newest tested
transformers to modeling_nanollada/versions_nanollada.py. Otherwise no file changes. torch is the running
environment's: its bounds are raised by hand. Afterwards: .ci/run.
"""

import re
import sys
import tempfile
from pathlib import Path

from interpreters import (
    CONSTRAINTS,
    PACKAGES,
    ROOT,
    TORCH,
    beyond_failure,
    installed,
    make_beyond,
    minor,
    read_constraints,
    run_core,
)

HEADER = """\
# What README's commands install: the exact versions with which the tests passed.
# Written by tests/raise_versions.py.
"""
OURS = ("nanollada", "pip")


def main() -> int:
    """Exit status 1, and no file touched, if the core set fails."""
    with tempfile.TemporaryDirectory(prefix="nanollada-versions-") as scratch:
        print("making an environment with the newest versions")
        python = make_beyond(Path(scratch) / "newest", extra="dev")
        found = installed(python)
        print("running the core set with", ", ".join(f"{name} {found[name]}" for name in PACKAGES))
        done = run_core(python)
    if done.returncode:
        print(beyond_failure({name: found[name] for name in PACKAGES}, done))
        print("No file was changed.")
        return 1
    for line in raise_to(found):
        print(line)
    print("The core set passes. Now the whole of it: .ci/run")
    return 0


def raise_to(found: dict[str, str], root: Path = ROOT) -> list[str]:
    """Writes the three places that hold versions; what changed, a line per package."""
    constraints = root / CONSTRAINTS.relative_to(ROOT)
    old = read_constraints(constraints) if constraints.exists() else {}
    pins = {name: exact(version) for name, version in sorted(found.items()) if is_pinned(name)}
    lines = "".join(f"{name}=={version}\n" for name, version in pins.items())
    bounds = (root / "pyproject.toml").read_text(encoding="utf-8")
    for name in PACKAGES:
        below = ".".join((minor(found[name]).split(".")[0], str(int(minor(found[name]).split(".")[1]) + 1)))
        bounds = replace_once(rf'("{name}>=[^,"]+,<)[^"]+', rf"\g<1>{below}", bounds)
    shipped = root / "modeling_nanollada" / "versions_nanollada.py"
    newest = f'NEWEST_TESTED = "{minor(found["transformers"])}"'
    code = replace_once(r'^NEWEST_TESTED = "[^"]+"', newest, shipped.read_text(encoding="utf-8"))
    constraints.write_text(HEADER + lines, encoding="utf-8")
    (root / "pyproject.toml").write_text(bounds, encoding="utf-8")
    shipped.write_text(code, encoding="utf-8")
    names = sorted(old.keys() | pins.keys())
    return [f"{name} {old.get(name)} -> {pins.get(name)}" for name in names if old.get(name) != pins.get(name)]


def is_pinned(name: str) -> bool:
    """torch itself pins what its accelerator needs, which differs between machines."""
    return name not in OURS and (name == "torch" or not TORCH.fullmatch(name))


def exact(version: str) -> str:
    """Without the build: 2.13.0 is also 2.13.0+cpu."""
    return version.partition("+")[0]


def replace_once(pattern: str, replacement: str, text: str) -> str:
    text, count = re.subn(pattern, replacement, text, flags=re.MULTILINE)
    if count != 1:
        raise ValueError(f"`{pattern}` must match once, got {count} matches")
    return text


if __name__ == "__main__":
    sys.exit(main())
