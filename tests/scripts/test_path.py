"""What a program finds by a bare name: the libraries, and never its neighbours in the folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOOK = (
    "import sys, runpy; sys.path.insert(0, {folder!r}); import nanollada.{room}; import {name}; print({name}.__file__)"
)


@pytest.mark.parametrize(("room", "name"), [("scripts", "evaluate"), ("scripts", "study"), ("trainers", "data")])
def test_a_library_with_a_neighbours_name_is_found(room, name, tmp_path):
    """As under `python scripts/evaluate.py`, whose folder stands first on the path."""
    (tmp_path / f"{name}.py").write_text("")
    code = LOOK.format(folder=str(ROOT / room), room=room, name=name)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.stdout.strip() == str(tmp_path / f"{name}.py"), done.stderr


def test_trace_is_the_standard_librarys():
    code = LOOK.format(folder=str(ROOT / "scripts"), room="scripts", name="trace")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).parent == Path(os.__file__).parent
