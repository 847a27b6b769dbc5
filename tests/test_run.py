"""A run that is called again: finished is finished, and what a kill left behind is finished as it would have been."""

import hashlib
import json
import re
from pathlib import Path

import pytest
from test_trainers import fresh_model_and_rows, run, weights

from nanollada.trainers.callbacks import read_metrics

TIMES = ("runtime", "per_second", "train_loss")


@pytest.fixture
def job(tmp_path, tokenizer):
    """A short run's settings as a command line, without `output_dir`."""
    return {
        **fresh_model_and_rows(tmp_path, tokenizer),
        "hidden_dropout": 0.1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_steps": 6,
        "logging_steps": 2,
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "use_cpu": True,
        "disable_tqdm": True,
        "plot_loss": False,
    }


def bytes_of(folder):
    """Every file of a folder and its digest, and when it was written."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    digests = {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in files
    }
    assert len(digests) > 5
    return digests


def untimed(entry):
    return {name: value for name, value in entry.items() if not name.endswith(TIMES)}


def as_if_killed(folder, *files):
    """The folder of a run that was killed between its last checkpoint and its last files."""
    for name in ("run.json", "trainer_state.json", "model.safetensors", "config.json", *files):
        (folder / name).unlink()


# No evaluation is better than the first by so much.
EARLY = {"max_steps": 30, "early_stopping_patience": 2, "early_stopping_min_delta": 100, "load_best_model_at_end": True}
ENDINGS = {
    "max_steps": ({}, "`max_steps` is reached at step 6"),
    "half_an_epoch": ({"max_steps": -1, "num_train_epochs": 0.5}, "`num_train_epochs` is reached at step [1-9]"),
    "early": (EARLY, "early stopping ended it at step 9"),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_finished_run_is_finished(ending, job, tmp_path, caplog):
    """Called again it changes no byte; without its last files it ends with the same ones."""
    settings, message = ENDINGS[ending]
    job |= {**settings, "output_dir": tmp_path / "run"}
    facts = run("causal", job)
    before = bytes_of(tmp_path / "run")
    for _ in range(2):
        assert run("causal", job, resume_from_checkpoint="last") == json.loads(json.dumps(facts))
    assert bytes_of(tmp_path / "run") == before
    assert re.search(f"the run in .*run is finished: {message}. Nothing is changed", caplog.text)

    expected, metrics = weights(tmp_path / "run"), read_metrics(tmp_path / "run")
    as_if_killed(tmp_path / "run")
    again = run("causal", job, resume_from_checkpoint="last")
    resumed = weights(tmp_path / "run")
    assert all(expected[name].equal(resumed[name]) for name in expected)
    different = {name for name in facts if facts[name] != again[name]}
    assert different <= {"seconds", "command"}
    assert [untimed(line) for line in read_metrics(tmp_path / "run")] == [untimed(line) for line in metrics]
