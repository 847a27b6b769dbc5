"""`--report_to`: the same numbers as in metrics.jsonl, read back by the tools' own readers; nothing unasked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from training_cases import build_trainer, command_line, fresh_model_and_rows, make_rows

from nanollada.trainers import arguments
from nanollada.trainers.causal import CausalConfig
from nanollada.trainers.console.callbacks import read_metrics

ROOT = Path(__file__).parents[3]


def test_nothing_is_reported_unasked(tmp_path):
    args = CausalConfig(output_dir=str(tmp_path), use_cpu=True, plot_loss=False)
    assert args.report_to == []


@pytest.mark.parametrize("name", ["tensorboard", "trackio"])
def test_a_missing_package_is_named_by_its_extra(name, tmp_path, monkeypatch):
    monkeypatch.setitem(arguments.REPORTERS, name, lambda: False)
    with pytest.raises(ValueError, match=rf"`report_to` {name} needs .*pip install 'nanollada\[logging\]'"):
        CausalConfig(output_dir=str(tmp_path), use_cpu=True, plot_loss=False, report_to=[name])
    assert CausalConfig(output_dir=str(tmp_path), use_cpu=True, plot_loss=False, report_to="none").report_to == []


def test_tensorboard_has_the_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"max_steps": 3, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 3}
    build_trainer("causal", tmp_path, report_to="tensorboard", held_out=make_rows(4), **settings).train()
    (folder,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    metrics = read_metrics(tmp_path)
    for tag, name in (("train/loss", "loss"), ("train/grad_norm", "grad_norm"), ("eval/loss", "eval_loss")):
        expected = [(line["step"], pytest.approx(line[name])) for line in metrics if name in line]
        assert expected and [(event.step, event.value) for event in events.Scalars(tag)] == expected


@pytest.mark.slow
def test_trackio_has_the_numbers_without_a_network(tmp_path, tokenizer):
    """In a folder; no address can be reached."""
    job = {
        **fresh_model_and_rows(tmp_path, tokenizer),
        "output_dir": tmp_path / "run",
        "project": "nano",
        "max_steps": 3,
    }
    job |= {"run_name": "one", "report_to": "trackio", "logging_steps": 1, "use_cpu": True, "save_strategy": "no"}
    nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    environment = {**os.environ, **nowhere, "TRACKIO_DIR": str(tmp_path / "trackio"), "OMP_NUM_THREADS": "1"}
    environment |= {"NO_PROXY": "127.0.0.1,localhost", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, str(ROOT / "trainers" / "causal.py"), *command_line(job)]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    read = "get metric --project nano --run one --metric train/loss --json".split()
    command = [str(Path(sys.executable).with_name("trackio")), *read]
    answer = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=120).stdout
    values = [entry["value"] for entry in json.loads(answer)["values"]]
    assert values == [pytest.approx(line["loss"]) for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert len(values) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [("tensorbord", "must be none, all or some of .*tensorboard"), ("neptune", "neptune needs its")],
)
def test_an_unknown_reporter_is_named_before_rows_are_made(name, message, tmp_path):
    with pytest.raises(ValueError, match=f"`report_to` {message}"):
        CausalConfig(output_dir=str(tmp_path), use_cpu=True, report_to=name)
