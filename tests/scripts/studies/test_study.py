"""The study: its plan and commands, a tiny one in this process, and (slow) the program itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanollada.scripts.studies import runs as study
from nanollada.scripts.studies.cells import listed
from nanollada.scripts.studies.runs import PARTS, VARIANTS, Study, StudyArguments, needs

SCRIPT = Path(__file__).parents[3] / "scripts" / "study.py"
GIVEN = {"data": ["a.jsonl"], "eval_data": ["b.jsonl"]}
TINY = "--hidden_size 16 --intermediate_size 32 --num_hidden_layers 1 --num_attention_heads 2 --max_length 32"
TINY += " --per_device_train_batch_size 4 --bf16 false"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": "7b"}, "`size` must be among small, 32m, got '7b'"),
        ({"part": ["e"]}, "`part` must be among a, b, c, d, got 'e'"),
        ({"runs": ["block5"]}, "`runs` must be among .*, got 'block5'"),
        ({"data": None}, "`data` must be given, got None"),
        ({"tokens": 0}, "`tokens` must be at least 1, got 0"),
        ({"eval_data": ["x/a.jsonl", "y/a.jsonl"]}, "`eval_data` must have files with different names"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        StudyArguments(**{**GIVEN, **settings})


def test_a_folder_serves_one_study(tmp_path):
    Study(StudyArguments(**GIVEN, output=str(tmp_path), part=["a"], seeds=[1]), ["--learning_rate", "1e-3"])
    written = (tmp_path / "settings.json").stat()
    Study(StudyArguments(**GIVEN, output=str(tmp_path), part=["b"], seeds=[2], jobs=2), ["--learning_rate", "1e-3"])
    assert (tmp_path / "settings.json").stat().st_ino == written.st_ino  # not again: runs start at the same time
    with pytest.raises(ValueError, match="`output` holds a study with another `options`"):
        Study(StudyArguments(**GIVEN, output=str(tmp_path)))
    with pytest.raises(ValueError, match="`output` holds a study with another `tokens`"):
        Study(StudyArguments(**GIVEN, output=str(tmp_path), tokens=7), ["--learning_rate", "1e-3"])


def test_options_have_values(tmp_path):
    with pytest.raises(ValueError, match=r"must be `--name value`, got \['--bf16'\]"):
        study.main(["--data", "a", "--eval_data", "b", "--output", str(tmp_path), "--bf16"])


def test_plan_puts_a_run_behind_what_it_needs(tmp_path):
    run = Study(StudyArguments(**GIVEN, output=str(tmp_path), part=["a", "b"], seeds=[2, 1]))
    plan = run.plan()
    assert len(plan) == len(set(plan)) == 2 * len({*PARTS["a"], *PARTS["b"]})
    for name, seed in plan:
        assert needs(name) is None or plan.index((needs(name), seed)) < plan.index((name, seed))
    assert [seed for _, seed in plan] == sorted([seed for _, seed in plan], reverse=True)
    only = Study(StudyArguments(**GIVEN, output=str(tmp_path), runs=["ar_wsd"]))
    assert only.plan() == [("ar_half", 1), ("ar_wsd", 1)]
    for file in ("run.json", "scores.json"):
        assert only.plan()[0] == ("ar_half", 1)
        (tmp_path / "ar_half-1").mkdir(exist_ok=True)
        (tmp_path / "ar_half-1" / file).write_text("{}")
    assert only.plan() == [("ar_wsd", 1)]


def chosen(run, name):
    """A run's overrides by name; of a list the first."""
    parts = run.overrides(name, 3)
    return {parts[i].removeprefix("--"): parts[i + 1] for i in range(len(parts)) if parts[i].startswith("--")}


def test_all_models_get_the_same_tokens_and_schedule(tmp_path):
    options = ["--learning_rate", "7e-4", "--hidden_size", "64"]
    run = Study(StudyArguments(**GIVEN, output=str(tmp_path), tokens=2_048_000), options)
    assert run.steps("ar_unbroken") == run.steps("mdlm") == run.steps("block4_bernoulli") == 1000
    assert run.steps("ar_half") == run.steps("ar") == run.steps("ar_mdlm") == run.steps("ar_wsd") == 500
    for name, variant in VARIANTS.items():
        given = chosen(run, name)
        assert given["learning_rate"] == "7e-4" and given["seed"] == "3"
        assert given["output_dir"] == str(tmp_path / f"{name}-3")
        assert ("hidden_size" in given) == (variant.init is None)
        assert given.get("model_name_or_path") == (variant.init and str(tmp_path / f"{variant.init}-3"))
        if variant.rows != "small":  # as many steps of warm-up and decay for half a run
            decay = float(given["lr_decay_ratio"]) * int(given["max_steps"])
            assert (given["warmup_steps"], decay) == ("30", pytest.approx(200))
    assert chosen(run, "mdlm")["hidden_size"] == "64" and chosen(run, "block16")["block_length"] == "16"
    assert run.files("all") == run.files("first") + run.files("second")


def texts(path, count, start=0):
    rows = [{"text": f"Number {i} comes before {i + 1}, and after {i - 1}. " * 3} for i in range(start, start + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def arguments(folder, tokenizer):
    """A study of seconds; a copy of the tokenizer is saved in the folder."""
    tokenizer.save_pretrained(folder / "tokenizer")
    return {
        "data": [texts(folder / "train.jsonl", 60)],
        "eval_data": [texts(folder / "near.jsonl", 8, 300), texts(folder / "far.jsonl", 8, 900)],
        "output": str(folder / "run"),
        "tokenizer": str(folder / "tokenizer"),
        "tokens": 1024,
        "small_tokens": 300,
        "small_epochs": 4,
        "small_evaluations": 3,
        "samples": 2,
        "draws": 3,
    }


def test_a_tiny_study(tmp_path, tokenizer, capsys):
    runs = ["ar_half", "ar", "mdlm", "block4", "ar_wsd", "noise_block4", "small_ar", "small_mdlm"]
    runs += ["ar_mdlm", "ar_mdlm_both"]
    settings = arguments(tmp_path, tokenizer)
    settings |= {"runs": runs, "part": ["a", "b", "c", "d"], "eval_blocks": [2]}
    options = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    options |= {"max_length": 32, "per_device_train_batch_size": 4, "bf16": "false"}
    run = Study(StudyArguments(**settings), TINY.split())
    run.prepare()
    for name, seed in run.plan():
        assert study.study(StudyArguments(**settings, only=f"{name}-{seed}"), **options) == {}
    assert run.plan() == []
    records = study.study(StudyArguments(**settings), **options)  # nothing is left but the report
    tables = capsys.readouterr().out
    assert records == {part: json.loads((tmp_path / "run" / f"{part}.json").read_text()) for part in "abcd"}
    assert "AR → 1, 4, 32, row, 32" in tables and "bernoulli" in tables and "diffusion below from epoch" in tables
    for part in "abcd":
        facts = json.loads((tmp_path / "run" / f"{part}.json").read_text())
        assert (tmp_path / "run" / f"{part}.png").read_bytes()[1:4] == b"PNG"
        assert (tmp_path / "run" / f"{part}.md").read_text() in tables
        for fact in facts["runs"]:
            assert fact["command"].startswith("accelerate launch trainers/") and fact["seed"] == 1
    facts = json.loads((tmp_path / "run" / "a.json").read_text())
    assert [(row["run"], row["block_length"]) for row in facts["rows"]] == [
        *[("ar_half", None), ("ar", None), ("mdlm", 0), ("mdlm", 2)],
        *[("block4", 4), ("block4", 2), ("ar_mdlm", 0), ("ar_mdlm", 2), ("ar_wsd", 32), ("ar_wsd", 2)],
    ]
    counts = set()  # every model is scored on the same tokens and bytes
    for name in ("ar", "mdlm", "ar_wsd"):
        for result in json.loads((tmp_path / "run" / f"{name}-1" / "scores.json").read_text())["results"]:
            counts.add((result["data"], tuple(sum(chunk[i] for chunk in result["chunks"]) for i in (2, 3))))
    assert len(counts) == 2
    assert json.loads((tmp_path / "run" / "block4-1" / "config.json").read_text())["block_length"] == 4
    facts = json.loads((tmp_path / "run" / "d.json").read_text())
    shifted = next(row for row in facts["rows"] if row["run"] == "ar_mdlm_both")
    plain = next(row for row in facts["rows"] if row["run"] == "ar_mdlm" and row["own"])
    difference = shifted["bits_per_byte"]["near"]["value"] - plain["bits_per_byte"]["near"]["value"]
    assert shifted["over_reference"]["near"]["value"] == pytest.approx(difference) != 0
    assert json.loads((tmp_path / "run" / "ar_mdlm_both-1" / "config.json").read_text())["label_shift"]
    half, ar = (json.loads((tmp_path / "run" / f"{name}-1" / "run.json").read_text()) for name in ("ar_half", "ar"))
    assert half["steps"] == ar["steps"] == 4 and half["epochs"] < 1 and ar["init"].endswith("ar_half-1")


@pytest.mark.slow
def test_the_program_in_two_processes_and_again(tmp_path, tokenizer):
    settings = {**arguments(tmp_path, tokenizer), "runs": ["mdlm", "ar"], "jobs": 2}
    options = [part for name, value in settings.items() for part in (f"--{name}", *listed(value))]
    command = [sys.executable, str(SCRIPT), *options, *TINY.split()]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*/run.json")}
    assert {path.parent.name for path in made} == {"ar_half-1", "ar-1", "mdlm-1"}
    (tmp_path / "run" / "mdlm-1" / "scores.json").unlink()
    (tmp_path / "run" / "mdlm-1" / "model.safetensors").unlink()
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert again.returncode and "mdlm-1 failed" in again.stderr and "model.safetensors" in again.stderr
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*/run.json")}  # none twice
