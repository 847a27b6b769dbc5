"""Interpreters for clean processes: this one, and a fresh environment with the oldest supported transformers."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

OLDEST = "5.17.0"
INTERPRETERS = ["this", pytest.param("oldest", marks=pytest.mark.slow, id=f"transformers-{OLDEST}")]


def make_oldest(folder: Path) -> str:
    """The interpreter of a new environment whose own transformers and huggingface_hub hide those of this one."""
    venv.create(folder, symlinks=os.name != "nt")
    python = str(folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    packages = next(folder.glob("**/site-packages"))
    (packages / "this_environment.pth").write_text(str(Path(torch.__file__).parents[1]))  # pip installs what differs
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    subprocess.run([*pip, f"transformers=={OLDEST}"], check=True)
    return python
