"""What a run prints: one block before, one behind, short lines between, and nothing else."""

import json
import re
import shlex
from types import SimpleNamespace

import pytest
from training_cases import KINDS, build_trainer, fresh_model_and_rows, make_rows, run
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from nanollada.trainers.causal import CausalConfig
from nanollada.trainers.console.lines import LinesCallback, line_of
from nanollada.trainers.console.overview import beginning, clock, commands_for, ending, figures, say, schedule_in_words


@pytest.fixture
def job(tmp_path, tokenizer):
    return {
        **fresh_model_and_rows(tmp_path, tokenizer),
        "output_dir": tmp_path / "a run",
        "tie_word_embeddings": True,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "load_best_model_at_end": True,
        "use_cpu": True,
        "plot_loss": False,
    }


def fields(text, title):
    """Names and values of a block."""
    lines = text.splitlines()
    at = lines.index(title) + 1
    pairs = {}
    for line in lines[at:]:
        if not line.startswith("  "):
            break
        name, _, value = line[2:].partition("  ")
        pairs[name] = value.strip()
    return pairs


@pytest.mark.parametrize("kind", ["causal", "diffusion"])
def test_a_run_says_what_run_json_says(kind, job, tmp_path, capsys, monkeypatch):
    """And transformers warns of nothing: a tied head is not missing in the best model's file, times are not asked."""
    warned = []
    for module in ("trainer", "trainer_utils"):
        for name in ("warning", "warning_once"):
            monkeypatch.setattr(f"transformers.{module}.logger.{name}", lambda message, *rest: warned.append(message))
    facts = run(kind, {**job, "save_total_limit": 2})
    assert warned == []
    output = capsys.readouterr().out
    assert json.loads((tmp_path / "a run" / "run.json").read_text())["training"] == facts["training"]
    data, first = facts["data"], fields(output, "Training")
    assert first["model"] == f"{facts['model_class']}, {facts['parameters']:,} parameters, fresh"
    assert first["objective"] == facts["objective"]["name"]
    packed = f"{data['rows']} to train on, {data['eval']['rows']} held out: texts, packed into rows of 32 tokens"
    assert first["rows"] == packed and first["epoch"] == f"{data['target_tokens']:,} target tokens"
    assert first["steps"] == f"4 ({4 * 4 / data['rows']:.3g} epochs)"
    tokens = round(4 * data["target_tokens"] / data["rows"])
    expected = f"4 rows (2 a device × 2 accumulated × 1 process), about {tokens} target tokens"
    assert first["a step"] == expected and first["device"] == f"{facts['hardware']}; float32"
    assert first["learning rate"] == "0.0003: warm-up over 1 step, constant, then falling to 10% over the last 1"
    assert first["writes to"] == str(tmp_path / "a run") and "goes on from" not in first

    last, evaluation = fields(output, "Done"), facts["evaluation"]
    assert last["model"] == str(tmp_path / "a run")
    sign = "≤ " if kind == "diffusion" else ""
    assert last["held out"].startswith(f"{sign}{evaluation['nats_per_token']:.3f} nats per token, {sign}")
    assert last["time"] == f"{clock(facts['seconds'])} for 4 steps, {facts['tokens_seen']:,} tokens"
    commands = {name: shlex.split(command) for name, command in fields(output, "Next").items()}
    assert commands["write"][1].endswith("scripts/generate.py")
    assert commands["write"][2:5] == ["--checkpoint", str(tmp_path / "a run"), "--prompt"]
    assert commands["score"][1].endswith("evaluate.py") and commands["score"][2:4] == commands["write"][2:4]

    between = output.split("\n\n")[1].splitlines()
    forms = [
        r"step \d/4  loss \d\.\d+  lr [\d.e-]+  grad [\d.]+(  masked \d+%)?  [\d,]+ tokens/s  \d+:\d\d left",
        r"step \d/4  held out \d\.\d+ nats/token  \d\.\d+ bits/byte(  ± [\d.]+)?",
        r"step \d/4  mean loss \d\.\d+",
    ]
    odd = [line for line in between if not any(re.fullmatch(form, line) for form in forms)]
    assert odd == [] and len(between) == 5 and all(len(line) < 100 for line in between)


def test_a_resumed_run_says_from_where(job, tmp_path, capsys):
    run("causal", job)
    run("causal", job, resume_from_checkpoint=tmp_path / "a run" / "checkpoint-2", max_steps=6)
    first = fields(capsys.readouterr().out.split("\nNext\n")[1], "Training")
    assert first["goes on from"] == str(tmp_path / "a run" / "checkpoint-2") and first["steps"].startswith("6 (")


@pytest.mark.slow
def test_no_steps_to_report_of_a_stream_and_no_next_ones(job, capsys):
    from nanollada.trainers.run import main

    words = [part for name, value in job.items() for part in (f"--{name}", str(value))]
    facts = main(KINDS["causal"], [*words, "--streaming", "true"], next_steps=False)
    output = capsys.readouterr().out
    assert facts["training"]["epochs"] is None and "\nNext\n" not in output
    first = fields(output, "Training")
    assert first["rows"].startswith("a stream to train on, ") and "epoch" not in first and first["steps"] == "4"


@pytest.mark.parametrize(("level", "rank", "shown"), [("passive", 0, True), ("error", 0, False), ("info", 1, False)])
def test_who_speaks(level, rank, shown, tmp_path, capsys, monkeypatch):
    """The first process, unless `log_level` asks for errors alone."""
    args = CausalConfig(output_dir=str(tmp_path), use_cpu=True, plot_loss=False, log_level=level)
    monkeypatch.setattr(type(args), "process_index", rank)
    say(args, "something")
    assert ("something" in capsys.readouterr().out) == shown


FACTS = {
    "model_class": "NanoLLaDAForMaskedLM",
    "init": "runs/ar",
    "parameters": 1000,
    "objective": {"name": "masked diffusion bound"},
    "hardware": "8 × H100",
    "seconds": 3661,
    "steps": 10,
    "tokens_seen": 5000,
    "evaluation": None,
    "data": {
        "format": "sft",
        "max_length": 64,
        "rows": 100,
        "target_tokens": 900,
        "sources": ["my data.jsonl"],
        "eval": {"rows": 0, "sources": []},
    },
    "training": {
        "steps": 10,
        "epochs": 3.2,
        "rows_per_step": 32,
        "device_rows": 4,
        "accumulation": 1,
        "processes": 8,
        "step_tokens": 288,
        "precision": "bf16, weights float32",
        "learning_rate": 1e-4,
        "schedule": "constant",
    },
}


def test_many_ranks_answers_and_nothing_held_out():
    first = fields(beginning(FACTS, None, "out"), "Training")
    assert first["a step"] == "32 rows (4 a device × 1 accumulated × 8 processes), about 288 target tokens"
    assert first["rows"] == "100 to train on, none held out: prompts with answers, rows of up to 64 tokens"
    assert first["model"].endswith("from runs/ar") and first["device"] == "8 × H100; bf16, weights float32"
    last = fields(ending(FACTS, "out"), "Done")
    assert last["held out"].startswith("no rows were held out") and last["time"].startswith("1:01:01 for 10 steps")
    commands = fields(commands_for(FACTS, "my out", "x"), "Next")
    assert commands["write"].endswith("--checkpoint 'my out' --chat")
    assert len(commands_for(FACTS, "o " * 200, "x").splitlines()) == 3  # a command is copied: one line
    assert commands["score"].endswith("--data 'my data.jsonl' --max_length 64")


def test_figures_of_a_bound_and_of_a_single_row():
    one = {"nats_per_token": 2.0, "bits_per_byte": 1.0, "bits_per_byte_sampling_error": None, "bound": False}
    assert figures({**one, "bits_per_byte_standard_error": 0.0}) == "2.000 nats per token, 1.000 bits per byte (exact)"
    bound = {**one, "bound": True, "bits_per_byte_standard_error": 0.01, "bits_per_byte_sampling_error": 0.2}
    expected = "≤ 2.000 nats per token, ≤ 1.000 bits per byte (a bound, ± 0.010 over masks, ± 0.200 over rows)"
    assert figures(bound) == expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "warm-up over 2 steps, constant, then falling to 10% over the last 20"),
        (
            {"lr_decay_ratio": 0.5, "min_lr_ratio": 0.0},
            "warm-up over 2 steps, constant, then falling to 0% over the last 50",
        ),
        (
            {"lr_scheduler_kwargs": {"num_decay_steps": 7}},
            "warm-up over 2 steps, constant, then falling to 10% over the last 7",
        ),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "warmup_steps": 1},
            "warm-up over 1 step, then a cosine down to 10%",
        ),
        ({"lr_scheduler_type": "constant", "warmup_steps": 0}, "constant"),
    ],
)
def test_schedules_in_words(settings, words, tmp_path):
    args = CausalConfig(output_dir=str(tmp_path), use_cpu=True, plot_loss=False, **settings)
    assert schedule_in_words(args, 100) == words


# ---- lines


def test_a_line():
    logs = {"loss": 1.23456, "grad_norm": None, "learning_rate": 3e-4, "epoch": 0.5, "mine": 0.25, "other": 3}
    expected = "step  7/100  loss 1.235  lr 0.0003  grad_norm: not finite  mine 0.25  other 3  1:05 left"
    assert line_of(logs, 7, 100, 65.2).replace("step   7", "step  7") == expected


def test_ours_stands_where_transformers_own_would(tmp_path):
    """Neither a notebook's table nor a caller's callback is touched."""

    class Mine(ProgressCallback):
        pass

    for quiet in (True, False):
        trainer = build_trainer("causal", tmp_path, disable_tqdm=quiet)
        kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
        assert kinds.count(LinesCallback) == 1 and PrinterCallback not in kinds and ProgressCallback not in kinds
    trainer = build_trainer("causal", tmp_path)
    trainer.callback_handler.callbacks = [Mine(), TrainerCallback()]
    from nanollada.trainers.console.lines import show_lines

    show_lines(trainer)
    assert [type(callback) for callback in trainer.callback_handler.callbacks] == [Mine, TrainerCallback]


def test_the_bar_is_for_terminals(monkeypatch, capsys):
    state = SimpleNamespace(max_steps=3, global_step=0, is_world_process_zero=True)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    for quiet in (False, True):
        callback = LinesCallback()
        callback.on_train_begin(SimpleNamespace(disable_tqdm=quiet), state, None)
        assert (callback.training_bar is None) == quiet
        callback.on_step_end(None, SimpleNamespace(**{**vars(state), "global_step": 1}), None)
        callback.on_train_end(None, state, None)
    assert "1/3" in capsys.readouterr().err


def test_logs_are_numbers(tmp_path):
    trainer = build_trainer("causal", tmp_path, max_steps=2, logging_steps=1, held_out=make_rows(4))
    trainer.train()
    trainer.evaluate()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) >= 4 and all(isinstance(value, (int, float)) for line in lines for value in line.values())
    assert all(isinstance(value, (int, float)) for line in trainer.state.log_history for value in line.values())
