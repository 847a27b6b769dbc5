"""A run that is called again: finished is finished, and what a kill left behind is finished as it would have been."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from ranks import rank
from training_cases import build_trainer, fresh_model_and_rows, run, weights

from nanollada.trainers.causal import CausalTrainer
from nanollada.trainers.console.callbacks import read_metrics
from nanollada.trainers.resuming.finished import checkpoint_to_resume

TIMES = ("runtime", "per_second")


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
EARLY = {
    "max_steps": 30,
    "early_stopping_patience": 2,
    "early_stopping_min_delta": 100,
    "load_best_model_at_end": True,
}
ENDINGS = {
    "max_steps": ({}, "`max_steps` is reached at step 6"),
    "half_an_epoch": ({"max_steps": -1, "num_train_epochs": 0.5}, "`num_train_epochs` is reached at step [1-9]"),
    "stream": ({"streaming": True}, "`max_steps` is reached at step 6"),
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


@pytest.mark.parametrize("damage", ["model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_a_finished_runs_last_files_are_written_again(damage, job, tmp_path, caplog):
    job |= {"output_dir": tmp_path / "run", "save_total_limit": 1}
    run("causal", job)
    expected = {name: weight.clone() for name, weight in weights(tmp_path / "run").items()}  # not a map of the file
    path = tmp_path / "run" / damage
    if damage == "tokenizer_config.json":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100])
    run("causal", job, resume_from_checkpoint="last")
    assert re.search(f"run is finished, but {damage}.*: its last files are written again", caplog.text)
    assert all(expected[name].equal(found) for name, found in weights(tmp_path / "run").items())
    before = bytes_of(tmp_path / "run")
    run("causal", job, resume_from_checkpoint="last")
    assert bytes_of(tmp_path / "run") == before

    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    path.unlink()
    with pytest.raises(ValueError, match="must hold the files of the finished run, which left no checkpoint"):
        run("causal", job, resume_from_checkpoint="last")


def test_other_lengths_of_a_finished_run(job, tmp_path, caplog):
    """Shorter is refused; longer goes on, and says that its schedule is another; two logs lie around a checkpoint."""
    job |= {"output_dir": tmp_path / "run", "eval_strategy": "no"}
    run("causal", job)
    before = bytes_of(tmp_path / "run")
    with pytest.raises(ValueError, match=r"`max_steps` must not end before the checkpoint, got 5 .*checkpoint-6"):
        run("causal", job, resume_from_checkpoint="last", max_steps=5)
    with pytest.raises(
        ValueError, match=r"`num_train_epochs` must not end before .*got 0.1 \(2 steps\) and checkpoint"
    ):
        run("causal", job, resume_from_checkpoint="last", max_steps=-1, num_train_epochs=0.1)
    explicit = tmp_path / "run" / "checkpoint-6"
    assert run("causal", job, resume_from_checkpoint=explicit)["steps"] == 6
    assert bytes_of(tmp_path / "run") == before
    assert run("causal", job, resume_from_checkpoint="last", max_steps=9)["steps"] == 9
    assert "goes on from step 6 to 9, but was planned for 6 steps: learning rate" in caplog.text
    assert json.loads((tmp_path / "run" / "run.json").read_text())["steps"] == 9


def test_a_run_that_early_stopping_ended_goes_on_with_more_patience(job, tmp_path):
    """And counts on: two evaluations were without improvement, the third and fourth end it."""
    job |= {**EARLY, "output_dir": tmp_path / "run"}
    assert run("causal", job)["steps"] == 9
    facts = run("causal", job, resume_from_checkpoint="last", early_stopping_patience=4)
    assert facts["steps"] == 15


def test_a_resumed_run_stops_as_early_as_an_unbroken_one(job, tmp_path):
    """The count of bad evaluations, and the losses since the last log, are in the checkpoint."""
    job |= {**EARLY, "logging_steps": 4}
    facts = run("causal", job, output_dir=tmp_path / "unbroken")
    shutil.copytree(tmp_path / "unbroken" / "checkpoint-6", tmp_path / "killed" / "checkpoint-6")
    shutil.copytree(tmp_path / "unbroken" / "checkpoint-3", tmp_path / "killed" / "checkpoint-3")
    again = run("causal", job, output_dir=tmp_path / "killed", resume_from_checkpoint="last")
    assert again["steps"] == facts["steps"] == 9
    lines = [[untimed(line) for line in read_metrics(tmp_path / name)] for name in ("unbroken", "killed")]
    assert lines[0] == lines[1] and any(line["step"] == 8 and "loss" in line for line in lines[0])


def test_a_finished_run_without_checkpoints(job, tmp_path, caplog):
    job |= {"output_dir": tmp_path / "run", "save_strategy": "no", "eval_strategy": "no"}
    run("causal", job, resume_from_checkpoint="last")
    assert re.search("run holds no checkpoint, so the run starts from the beginning$", caplog.text, re.MULTILINE)
    before = bytes_of(tmp_path / "run")
    run("causal", job, resume_from_checkpoint="last")
    with pytest.raises(ValueError, match="`max_steps` must be that of the finished run.*ended at step 6, got 8 steps"):
        run("causal", job, resume_from_checkpoint="last", max_steps=8)
    assert bytes_of(tmp_path / "run") == before


def test_the_folder_that_was_meant_is_named(tmp_path, caplog):
    (tmp_path / "sudoku_small" / "checkpoint-4").mkdir(parents=True)
    (tmp_path / "else" / "checkpoint-4").mkdir(parents=True)
    args = SimpleNamespace(output_dir=str(tmp_path / "sudoku_smal"), resume_from_checkpoint="last")
    assert checkpoint_to_resume(args) is None
    assert "sudoku_small holds checkpoints: was it meant?" in caplog.text and "else" not in caplog.text


def test_rows_longer_than_the_models_positions_are_refused(job, tmp_path):
    message = "`max_length` must be at most the model's `max_position_embeddings`, got 32 and 16"
    with pytest.raises(ValueError, match=message):
        run("diffusion", job, output_dir=tmp_path / "run", max_position_embeddings=16)


def test_the_block_length_of_a_run_that_only_lacks_its_files(job, tmp_path):
    """No step is trained that would set it."""
    job |= {"output_dir": tmp_path / "run", "eval_strategy": "no", "block_length_schedule": "[[0.5, 4], [0.5, 8]]"}
    run("diffusion", job)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    as_if_killed(tmp_path / "run")
    run("diffusion", job, resume_from_checkpoint="last")
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == config and config["block_length"] == 8


# ---- divergence


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_a_diverged_run_says_so(what, job, tmp_path, monkeypatch):
    """Step 5 of two micro-batches, of which the second has a NaN: the checkpoint of step 3 is the last thing kept."""
    job |= {"output_dir": tmp_path / "run", "gradient_accumulation_steps": 2, "logging_steps": 4}
    compute, calls = CausalTrainer.micro_batch_loss, []

    def poisoned(self, model, inputs, num_items_in_batch):
        loss, supervised = compute(self, model, inputs, num_items_in_batch)
        calls.append(None)
        if len(calls) != 10:
            return loss, supervised
        if what == "gradient norm":
            loss.register_hook(lambda gradient: gradient * float("nan"))
            return loss, supervised
        return loss + float("inf"), supervised

    monkeypatch.setattr(CausalTrainer, "micro_batch_loss", poisoned)
    message = f"step 5 diverged: the {what} is not finite. Nothing.*the last whole checkpoint is .*checkpoint-3"
    with pytest.raises(FloatingPointError, match=message):
        run("causal", job)
    assert not (tmp_path / "run" / "run.json").exists() and not (tmp_path / "run" / "model.safetensors").exists()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    lines = read_metrics(tmp_path / "run")
    assert max(line["step"] for line in lines) == 4 and all(line["loss"] > 0 for line in lines if "loss" in line)
    calls.clear()
    assert run("causal", job, resume_from_checkpoint="last", seed=42)["steps"] == 6  # three steps, without the NaN


def test_weights_that_are_not_finite_are_not_saved(job, tmp_path, monkeypatch):
    """An update can make them so, behind a finite gradient."""
    job |= {"output_dir": tmp_path / "run", "eval_strategy": "no", "save_steps": 6}
    clip = CausalTrainer._get_grad_norm

    def overflow(self, model, *args, **kwargs):
        if self.state.global_step == 5:
            self.optimizer.param_groups[0]["lr"] = float("inf")
        return clip(self, model, *args, **kwargs)

    monkeypatch.setattr(CausalTrainer, "_get_grad_norm", overflow)
    with pytest.raises(
        FloatingPointError, match=r"step 6 diverged: the weights are not finite \(model.*no checkpoint"
    ):
        run("causal", job)
    assert not list((tmp_path / "run").glob("**/*.safetensors"))


def test_a_step_that_the_scaler_skips_is_no_divergence(job, tmp_path, monkeypatch):
    """float16: an overflow of the scaled gradient halves the scale. It is logged as `null`, and training goes on."""
    scaler = SimpleNamespace(is_enabled=lambda: True, get_scale=lambda: 65536.0)
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda *args, **kwargs: torch.tensor(float("inf")))
    trainer = build_trainer("causal", tmp_path / "run", max_steps=1)
    monkeypatch.setattr(trainer.accelerator, "scaler", scaler)
    trainer._tr_loss = torch.tensor(2.0)
    assert trainer._get_grad_norm(trainer.model) == float("inf")
    trainer.log({"grad_norm": float("inf")})
    assert trainer.state.log_history[-1]["grad_norm"] is None
    scaler.get_scale = lambda: 1.0
    with pytest.raises(FloatingPointError, match="step 1 diverged: the gradient norm is not finite"):
        trainer._get_grad_norm(trainer.model)


@pytest.mark.slow
def test_all_ranks_stop_together(tmp_path):
    """One of two processes has the loss that is not finite; the checkpoint holds what both wrote."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", __file__, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(launch, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    messages = [(tmp_path / f"rank-{number}.txt").read_text() for number in range(2)]
    assert messages[0] == messages[1]
    assert re.search("step 3 diverged: the loss is not finite.*whole checkpoint is .*checkpoint-2", messages[0])
    files = json.loads((tmp_path / "run" / "checkpoint-2" / "manifest.json").read_text())["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"} < files.keys()


def diverge(folder):
    """A rank of `test_all_ranks_stop_together`."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
    trainer = build_trainer("causal", folder / "run", **settings)
    compute = trainer.micro_batch_loss

    def poisoned(*args):
        loss, supervised = compute(*args)
        odd = trainer.args.process_index == 1 and trainer.state.global_step == 2
        return (loss.detach() * float("inf") if odd else 0) + loss, supervised

    trainer.micro_batch_loss = poisoned
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    (folder / f"rank-{trainer.args.process_index}.txt").write_text(str(error.value))


if __name__ == "__main__":
    with rank():
        diverge(Path(sys.argv[1]))
