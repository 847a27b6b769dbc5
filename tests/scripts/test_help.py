"""`--help` of every program: it ends well, says what the options' help says, and shows a per cent sign as one."""

import dataclasses
import re
import runpy
import sys
from pathlib import Path

import pytest

from nanollada.trainers.diffusion import DiffusionConfig

ROOT = Path(__file__).parents[2]
ROOMS = ("trainers", "scripts", "hub_upload")
FILES = [path for room in ROOMS for path in sorted((ROOT / room).glob("*.py"))]
PROGRAMS = [path.relative_to(ROOT).as_posix() for path in FILES if 'if __name__ == "__main__":' in path.read_text()]
COMMANDS = [
    ("scripts/benchmark.py", "train"),
    ("scripts/benchmark.py", "generate"),
    ("scripts/benchmark.py", "length"),
    ("scripts/lm_eval_nanollada.py", "run"),
]


def help_of(program, monkeypatch, capsys, *words):
    """As a process of its own would show it, but for the time that imports take; spaces and line ends are one."""
    monkeypatch.setattr(sys, "argv", [str(ROOT / program), *words, "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / program), run_name="__main__")
        raise SystemExit  # a program may also return
    assert not ended.value.code
    return re.sub(r"\s+", " ", capsys.readouterr().out)


@pytest.mark.parametrize("words", [(program,) for program in PROGRAMS] + COMMANDS, ids=" ".join)
def test_help_is_shown(words, monkeypatch, capsys):
    shown = help_of(words[0], monkeypatch, capsys, *words[1:])
    assert "usage: " in shown or "--" in shown
    assert "%%" not in shown and not re.search(r"%\(\w+\)", shown)


def test_the_programs_are_found():
    assert {"trainers/diffusion.py", "scripts/quickstart.py", "hub_upload/verify.py"} < set(PROGRAMS)
    assert len(PROGRAMS) >= 18


def test_every_help_text_is_shown_as_it_is_meant(monkeypatch, capsys):
    """Of the trainer with the per cent sign, all help texts of its own options."""
    shown = help_of("trainers/diffusion.py", monkeypatch, capsys)
    assert "share of rows cut to a random length (LLaDA: 1 %)." in shown
    own = set(DiffusionConfig.__annotations__)
    texts = {item.name: item.metadata["help"] for item in dataclasses.fields(DiffusionConfig) if item.name in own}
    assert len(texts) > 10
    for name, text in texts.items():
        assert f"--{name}" in shown and re.sub(r"\s+", " ", text % {}) in shown, name
