"""What a run leaves behind: metrics that survive a kill, and the curve."""

import json
from types import SimpleNamespace

import pytest

from nanollada.trainers.console import callbacks
from nanollada.trainers.console.callbacks import MetricsCallback, draw_loss, read_metrics
from nanollada.trainers.records import strict_json


def state(step, first=True, history=()):
    return SimpleNamespace(global_step=step, is_world_process_zero=first, log_history=list(history))


def log(callback, args, step, **logs):
    callback.on_log(args, state(step), None, logs=logs)


def test_a_resumed_run_reads_like_an_unbroken_one(tmp_path):
    args, callback = SimpleNamespace(output_dir=str(tmp_path)), MetricsCallback(plot_loss=False)
    callback.on_train_begin(args, state(0), None)
    for step in (1, 2, 3):
        log(callback, args, step, loss=float(step))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    known = [{"loss": 1.0, "step": 1}, {"loss": 2.0, "step": 2}]  # to the checkpoint of step 2
    callback.on_train_begin(args, state(2, history=known), None)
    log(callback, args, 3, loss=3.5)
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 3.5}]
    (tmp_path / "metrics.jsonl").unlink()  # or another folder
    callback.on_train_begin(args, state(2, history=known), None)
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}]
    callback.on_train_begin(args, state(0), None)  # a new run starts a new file
    assert read_metrics(tmp_path) == []


def test_numbers_that_are_not_finite_are_null(tmp_path):
    args, callback = SimpleNamespace(output_dir=str(tmp_path)), MetricsCallback(plot_loss=False)
    log(callback, args, 1, grad_norm=float("inf"), error=float("nan"), loss=1.5)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "grad_norm": null, "error": null, "loss": 1.5}\n'
    assert strict_json({"a": [1.0, (float("-inf"), "x")]}) == '{"a": [1.0, [null, "x"]]}'


def test_only_the_first_rank_writes(tmp_path):
    args, callback = SimpleNamespace(output_dir=str(tmp_path)), MetricsCallback(plot_loss=True)
    callback.on_train_begin(args, state(0, first=False), None)
    callback.on_log(args, state(1, first=False), None, logs={"loss": 1.0})
    callback.on_train_end(args, state(1, first=False), None)
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_not_read_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nbroken\n{"step": 2}\n')
    with pytest.raises(json.JSONDecodeError):
        read_metrics(tmp_path)


def test_the_curve_is_drawn(tmp_path):
    draw_loss([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5, "eval_loss": 1.7}], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes()[1:4] == b"PNG"
    draw_loss([], tmp_path / "loss.svg", format="svg")
    assert "<svg" in (tmp_path / "loss.svg").read_text()


def test_plots_need_matplotlib(monkeypatch):
    monkeypatch.setattr(callbacks, "is_matplotlib_available", lambda: False)
    with pytest.raises(ValueError, match="`plot_loss` needs matplotlib.*got True without it"):
        MetricsCallback(plot_loss=True)
    assert not MetricsCallback(plot_loss=False).plot_loss and not MetricsCallback().plot_loss
    monkeypatch.setattr(callbacks, "is_matplotlib_available", lambda: True)
    assert MetricsCallback().plot_loss
