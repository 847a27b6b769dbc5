"""Every program at its command line: help, a mistyped option, an abbreviation, a folder that is not there."""

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest

from nanollada.trainers.commands.ending import run_program
from nanollada.trainers.commands.programs import PROGRAMS, ROOT


@dataclass
class Case:
    """An option of a program's own, words before the options, and a mistake in what is given with its error."""

    option: str
    mistake: str
    error: str
    first: tuple[str, ...] = ()


NOWHERE = "got outputs/nope: there is no such folder"
CASES = {
    "quickstart": Case("--steps_share", "--steps_share 2", r"`steps_share` must lie in \(0, 1\], got 2.0"),
    "train-tokenizer": Case("--vocab_size", "--data nope.jsonl --output_dir x", ".*nope.jsonl.*"),
    "train-causal": Case(
        "--held_out_fraction",
        "--model_name_or_path outputs/nope --data x.jsonl --output_dir run --use_cpu",
        f"`model_name_or_path` .*, {NOWHERE}",
    ),
    "train-diffusion": Case(
        "--eos_padding_block",
        "--tokenizer_name_or_path outputs/nope --data x.jsonl --output_dir run --use_cpu",
        f"`tokenizer_name_or_path` .*, {NOWHERE}",
    ),
    "train-dpo": Case(
        "--precompute_ref_batch_size",
        "--model_name_or_path outputs/nope --data x.jsonl --output_dir run --use_cpu",
        f"`model_name_or_path` .*, {NOWHERE}",
    ),
    "train-grpo": Case(
        "--max_completion_length",
        "--model_name_or_path outputs/nope --data x.jsonl --output_dir run --use_cpu",
        f"`model_name_or_path` .*, {NOWHERE}",
    ),
    "generate": Case("--watch_delay", "--checkpoint outputs/nope --prompt x", f"`checkpoint` .*, {NOWHERE}"),
    "compare": Case("--repeats", "--ar outputs/nope --diffusion y --prompts x", f"`ar` .*, {NOWHERE}"),
    "demo": Case("--server_port", "--diffusion outputs/nope", f"`diffusion` .*, {NOWHERE}"),
    "evaluate": Case("--rolling_context", "--checkpoint outputs/nope --data x", f"`checkpoint` .*, {NOWHERE}"),
    "benchmark": Case(
        "--warmup_steps", "--tokenizer_name_or_path outputs/nope --data rows.jsonl", f".*, {NOWHERE}", ("train",)
    ),
    "study": Case("--small_epochs", "--data a --eval_data b --tokenizer nope", "`tokenizer` must be .*, got nope"),
    "post-training-study": Case(
        "--score_steps", "--part problems --output x", "`diffusion` must be given for these runs, got None"
    ),
    "editing-study": Case("--belief_rows", "--part text --diffusion x", "`ar` must be given in part text, got None"),
    "puzzles": Case("--options", "--puzzle sudoku --rows 0 --output x.jsonl", ".*rows.*0.*"),
    "pairs": Case(
        "--pairs_per_prompt", "--checkpoint outputs/nope --data x --output y", f"`checkpoint` .*, {NOWHERE}"
    ),
    "convert": Case("--rms_norm_eps", "--source nope --to masked --output x", "`source` must .*, got nope, .*"),
    "merge": Case("--checkpoints", "--checkpoints nope nope2 --output_dir x", ".*nope.*"),
    "export": Case("--base_model", "nope out", "`checkpoint` must be a folder with config.json, got nope"),
    "verify": Case("--python", "nope", "`folder` must be a folder made by export.py, got nope, which is not there"),
    "upload": Case("--commit_message", "nope me/mine", "`folder` must be a folder made by export.py, got nope, .*"),
}


@pytest.fixture
def program(request, monkeypatch, tmp_path):
    """Runs a program as its console command does, in an empty folder: `(status, output, errors)`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    Path("outputs").mkdir()
    Path("rows.jsonl").write_text('{"text": "a"}\n' * 9)
    capsys = request.getfixturevalue("capsys")

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", ["/bin/nanollada", name, *words])
        with pytest.raises(SystemExit) as end:
            run_program(import_module(PROGRAMS[name].module).main, list(words))
        return end.value.code or 0, *capsys.readouterr()

    return run


def test_every_program_has_a_case():
    assert CASES.keys() == PROGRAMS.keys() - {"lm-eval"}  # whose command line is lm-eval's


@pytest.mark.parametrize("name", CASES)
def test_options(name, program):
    case = CASES[name]
    status, shown, _ = program(name, "--help")
    assert status == 0 and case.option in shown
    assert f"usage: nanollada {name} " in shown or name == "verify"
    assert "--traceback" in shown or name == "verify"  # which runs alone, in a download
    mistyped = case.option[:-3] + case.option[-2:]
    for word in (mistyped, case.option[:-2]):
        status, shown, errors = program(name, *case.first, word, "1")
        line = f"error: unknown option `{word}`: did you mean `{case.option}`"
        assert (status, shown) == (2, "") and errors.startswith(line) and errors.count("\n") == 1


@pytest.mark.parametrize("name", CASES)
def test_a_mistake(name, program):
    case = CASES[name]
    words = [*case.first, *shlex.split(case.mistake)]
    status, _, errors = program(name, *words)
    assert status == 2 and re.fullmatch(f"error: {case.error}", errors.splitlines()[-1]), errors
    assert "Traceback" not in errors and errors.count("error: ") == 1
    if name != "verify":
        status, _, errors = program(name, *words, "--traceback")
        assert status == 2 and "Traceback (most recent call last)" in errors
        assert errors.splitlines()[-1].startswith("error: ")


def test_a_program_started_as_a_file(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "generate.py"), "--max_new", "3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == "error: unknown option `--max_new`: did you mean `--max_new_tokens` or `--max_edits`?\n"
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.slow
def test_a_trainer_started_as_a_file(tmp_path):
    """One line of its own; accelerate adds its traceback unless it is told to be quiet."""
    for start in (["-m", "accelerate.commands.launch", "--quiet", "--cpu"], []):
        command = [sys.executable, *start, str(ROOT / "trainers" / "causal.py"), "--config", "quikstart_ar"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "did you mean `quickstart_ar`" in lines[0] and "Traceback" not in done.stderr
        assert done.returncode == (1 if start else 2)  # accelerate has one status for all


@pytest.mark.slow
def test_of_two_ranks_one_speaks(tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    words = ["--tokenizer_name_or_path", "./nope", "--data", "x.jsonl", "--output_dir", "run", "--use_cpu"]
    command = [sys.executable, *launch, str(ROOT / "trainers" / "causal.py"), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode and done.stderr.count("error: `tokenizer_name_or_path` must be a folder") == 1, done.stderr
