"""`import nanollada`, and the console command."""

import subprocess
import sys
from importlib.metadata import entry_points, version

import pytest

import nanollada
from nanollada.trainers.commands.programs import PROGRAMS

HEAVY = ("torch", "transformers", "trl", "datasets", "peft", "accelerate", "numpy", "matplotlib", "rich", "yaml")


def python(*words, **kwargs):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, **kwargs)


def test_every_public_name_is_there():
    assert nanollada.__version__ == version("nanollada")
    for name in nanollada.__all__:
        assert getattr(nanollada, name) is not None and name in dir(nanollada)
    from nanollada.modeling_nanollada import NanoLLaDAForMaskedLM
    from nanollada.trainers.diffusion import DiffusionTrainer

    assert nanollada.NanoLLaDAForMaskedLM is NanoLLaDAForMaskedLM
    assert nanollada.DiffusionTrainer is DiffusionTrainer
    with pytest.raises(AttributeError, match="module 'nanollada' has no attribute 'DifusionTrainer'"):
        nanollada.DifusionTrainer  # noqa: B018


def test_importing_it_pays_for_nothing():
    code = f"import nanollada, sys; dir(nanollada); print(*set(sys.modules) & set({HEAVY}))"
    done = python("-c", code, check=True)
    assert done.stdout == "\n"


def test_the_console_command():
    (entry,) = (entry for entry in entry_points(group="console_scripts") if entry.name == "nanollada")
    assert entry.load().__module__ == "nanollada.__main__"
    done = python("-X", "importtime", "-m", "nanollada", "--help", check=True)
    assert all(f"  {name} " in done.stdout and program.help in done.stdout for name, program in PROGRAMS.items())
    assert not [name for name in HEAVY if f"| {name}\n" in done.stderr.replace("|   ", "| ")]


def test_words_of_the_console_command(monkeypatch, capsys):
    from nanollada.__main__ import main

    for words, status, out, err in (
        (["--version"], 0, f"{version('nanollada')}\n", ""),
        (
            ["train_difusion"],
            2,
            "",
            "error: unknown program `train_difusion`: did you mean `train-diffusion` or `train-dpo` or "
            "`train-causal`?\n",
        ),
        (["xyz"], 2, "", "error: unknown program `xyz`; `nanollada --help` lists them\n"),
        (["puzzles", "--rows", "x"], 2, "", "error: argument --rows: invalid int value: 'x'\n"),
    ):
        monkeypatch.setattr(sys, "argv", ["nanollada", *words])
        with pytest.raises(SystemExit) as end:
            main()
            raise SystemExit(0)
        assert (end.value.code, *capsys.readouterr()) == (status, out, err)
