"""The registry of trainers: one entry says program, classes and help, and a run's record says what was really run."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
from training_cases import SHAPE, command_line, corpus

from nanollada.trainers.data.prepare import DataArguments
from nanollada.trainers.diffusion import DiffusionConfig, DiffusionTrainer
from nanollada.trainers.models import ModelArguments
from nanollada.trainers.registry import TRAINERS
from nanollada.trainers.run import main, train

ROOT = Path(__file__).parents[2]
MAIN = 'if __name__ == "__main__":'


class DiffusionDPOTrainer(DiffusionTrainer):
    """A trainer of somebody's own."""


class DPOConfig(DiffusionConfig):
    """And its config."""


@pytest.fixture
def settings(tmp_path, tokenizer):
    """Of a run of two steps, by the arguments that take them."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = {"data": str(corpus(tmp_path / "data.jsonl")), "held_out_fraction": 0.1, "max_length": 32}
    model = {"tokenizer_name_or_path": str(tmp_path / "tokenizer"), **SHAPE}
    training = {"output_dir": str(tmp_path / "run"), "max_steps": 2, "use_cpu": True, "report_to": "none"}
    return {"data": data, "model": model, "args": {**training, "plot_loss": False, "disable_tqdm": True}}


def test_every_program_that_trains_is_an_entry():
    programs = {path.name for path in (ROOT / "trainers").glob("*.py") if MAIN in path.read_text()}
    assert {Path(entry.program).name for entry in TRAINERS.values()} == programs
    for name, entry in TRAINERS.items():
        assert entry.name == name and (ROOT / entry.program).is_file()
        models = getattr(entry, "model_class", None)  # what tunes a checkpoint takes either
        assert models is None if name in ("dpo", "grpo") else models.is_diffusion is (name == "diffusion")


def test_the_help_says_what_is_trained(monkeypatch, capsys):
    for entry in TRAINERS.values():
        with pytest.raises(SystemExit):
            main(entry, ["--help"])
        assert entry.help in capsys.readouterr().out


def test_one_call_does_what_the_program_does(settings, tmp_path):
    entry = TRAINERS["diffusion"]
    args = entry.config_class(**settings["args"])
    data, model = DataArguments(**{**settings["data"], "data": [settings["data"]["data"]]}), settings["model"]
    called = train(entry, data=data, model=ModelArguments(**model), args=args)
    assert called["command"].split()[0] == Path(sys.argv[0]).name  # this process's
    argv = command_line({**settings["data"], **model, **settings["args"]}, output_dir=tmp_path / "program")
    run = main(entry, argv)
    assert run["command"].startswith("accelerate launch trainers/diffusion.py --data ")
    assert run["sha256"] == called["sha256"] and run["evaluation"] == called["evaluation"]


@pytest.mark.parametrize("change", [{"trainer_class": DiffusionDPOTrainer}, {"config_class": DPOConfig}])
def test_what_no_program_of_ours_runs_is_recorded_as_it_was_run(change, settings, tmp_path, monkeypatch):
    entry = TRAINERS["diffusion"]
    monkeypatch.setattr(sys, "argv", ["/home/me/dpo.py", "--beta", "0.1"])
    argv = command_line({**settings["data"], **settings["model"], **settings["args"]})
    main(dataclasses.replace(entry, **change), argv)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["command"] == "dpo.py --beta 0.1"
