"""Damaged checkpoints: passed over by `last`, refused by name, and never gone on from in silence."""

import json
import shutil

import pytest
import torch
from training_cases import build_trainer, fresh_model_and_rows, run, weights

from nanollada.hub_upload.export import export
from nanollada.trainers.resuming.checkpoints import (
    MANIFEST,
    check_checkpoint,
    fault_of,
    last_complete_checkpoint,
    rotate_checkpoints,
    write_manifest,
)
from nanollada.trainers.weights.merging import MergeCandidates

FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "ema.safetensors", "trainer_state.json")


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """Step 2 and step 4 of a run with an average."""
    folder = tmp_path_factory.mktemp("run")
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "ema_decay": 0.5}
    build_trainer("causal", folder, **settings).train()
    return folder


def missing(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


def truncated(path):
    path.write_bytes(path.read_bytes()[:-20])


def overwritten(path):
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 3, 2 * len(content) // 3):
        content[place] ^= 1
    path.write_bytes(content)


DAMAGES = {
    missing: "is missing",
    empty: r"is broken \(0 of",
    truncated: "is broken",
    overwritten: "is broken .*SHA-256",
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_refused(damage, name, two_checkpoints, tmp_path, caplog):
    folder = shutil.copytree(two_checkpoints, tmp_path / "run")
    assert last_complete_checkpoint(folder).endswith("checkpoint-4") and not caplog.messages
    damage(folder / "checkpoint-4" / name)
    assert last_complete_checkpoint(folder).endswith("checkpoint-2")
    assert f"checkpoint-4 is passed over: {name} is " in caplog.text
    message = f"`resume_from_checkpoint` must be a whole checkpoint, got .*checkpoint-4: {name} {DAMAGES[damage]}"
    with pytest.raises(ValueError, match=message):
        check_checkpoint(folder / "checkpoint-4")


@pytest.mark.parametrize("name", [name for name in FILES if name != "ema.safetensors"])
@pytest.mark.parametrize("damage", [missing, empty, truncated, overwritten])
def test_without_a_manifest_files_must_be_there_and_open(damage, name, two_checkpoints, tmp_path, caplog):
    """Of an older nanollada. Archives have checksums of their own; changed tensors can't be seen in safetensors."""
    folder = shutil.copytree(two_checkpoints, tmp_path / "run")
    (folder / "checkpoint-4" / MANIFEST).unlink()
    assert last_complete_checkpoint(folder).endswith("checkpoint-4")
    assert "checkpoint-4 has no manifest.json (an older nanollada wrote it)" in caplog.text
    damage(folder / "checkpoint-4" / name)
    seen = damage is not overwritten or name != "model.safetensors"
    assert last_complete_checkpoint(folder).endswith("checkpoint-2" if seen else "checkpoint-4")


def test_a_manifest_that_is_no_manifest(two_checkpoints, tmp_path):
    folder = shutil.copytree(two_checkpoints / "checkpoint-4", tmp_path / "checkpoint-4")
    assert fault_of(folder) is None and fault_of(tmp_path / "checkpoint-5") == "there is no such folder"
    for content in ("", '{"files": ', "[]", "{}", '{"files": {"model.safetensors": {}}}'):
        (folder / MANIFEST).write_text(content)
        assert fault_of(folder).startswith("manifest.json is broken")
    write_manifest(folder, 4)
    assert fault_of(folder) is None and set(FILES) < json.loads((folder / MANIFEST).read_text())["files"].keys()


def test_a_half_written_checkpoint_is_passed_over(two_checkpoints, tmp_path, caplog):
    """A kill while the first checkpoint was written: the run starts anew. Damage behind that is no beginning."""
    for step, state in ((8, '{"global_st'), (12, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_complete_checkpoint(tmp_path) is None
    assert "checkpoint-12 is passed over: trainer_state.json is missing" in caplog.text
    shutil.copytree(two_checkpoints / "checkpoint-4", tmp_path / "checkpoint-4")
    assert last_complete_checkpoint(tmp_path).endswith("checkpoint-4")
    (tmp_path / "checkpoint-4" / "scheduler.pt").unlink()
    with pytest.raises(ValueError, match="`output_dir` must hold a whole .*checkpoint-4: scheduler.pt is missing"):
        last_complete_checkpoint(tmp_path)
    assert last_complete_checkpoint(tmp_path / "nowhere") is None


def test_older_checkpoints_go_after_the_manifest(tmp_path, monkeypatch):
    """A kill while the manifest is written leaves the one before, also with `save_total_limit` of 1."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}

    def killed(folder, step):
        if step == 4:
            raise KeyboardInterrupt
        write_manifest(folder, step)

    monkeypatch.setattr("nanollada.trainers.resuming.trainer.write_manifest", killed)
    trainer = build_trainer("causal", tmp_path, **settings)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert fault_of(tmp_path / "checkpoint-2") is None and trainer.args.save_total_limit == 1
    monkeypatch.undo()
    build_trainer("causal", tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    assert fault_of(tmp_path / "checkpoint-4") is None


def test_a_checkpoint_of_the_model_alone_is_none_to_go_on_from(tmp_path):
    build_trainer("causal", tmp_path, max_steps=2, save_strategy="steps", save_steps=2, save_only_model=True).train()
    with pytest.raises(ValueError, match="checkpoint-2: optimizer.pt is missing"):
        last_complete_checkpoint(tmp_path)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path, tokenizer):
    """To the same weights, also with states to merge."""
    job = {
        **fresh_model_and_rows(tmp_path, tokenizer),
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_steps": 8,
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "merge_top_k": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "plot_loss": False,
    }
    run("causal", job, output_dir=tmp_path / "run")
    expected = weights(tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()  # as if it had been killed at its end
    (tmp_path / "run" / "checkpoint-8" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="checkpoint-8: optimizer.pt is missing"):
        run("causal", job, output_dir=tmp_path / "run", resume_from_checkpoint=tmp_path / "run" / "checkpoint-8")
    run("causal", job, output_dir=tmp_path / "run", resume_from_checkpoint="last")
    resumed = weights(tmp_path / "run")
    assert all(expected[name].equal(resumed[name]) for name in expected)
    assert fault_of(tmp_path / "run" / "checkpoint-8") is None


def test_the_states_to_merge_of_the_last_two_checkpoints_stay(tmp_path):
    kept = MergeCandidates(tmp_path, 1)
    kept.start(0)
    for step, loss in ((1, 3.0), (2, 2.0), (3, 1.0)):
        kept.add(step, loss, {"weight": torch.ones(1)})
        kept.saved(step)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-2.safetensors", "step-3.safetensors"]
    MergeCandidates(tmp_path, 1).start(2)


def test_the_best_models_checkpoint_must_be_whole(tmp_path):
    trainer = build_trainer("causal", tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-2")
    for name in ("optimizer.pt", "model.safetensors"):
        with pytest.raises(ValueError, match="`load_best_model_at_end` needs the best.*is missing"):
            (tmp_path / "checkpoint-2" / name).unlink()
            trainer._load_best_model()


def test_an_export_takes_a_checkpoint_and_leaves_its_records_behind(tmp_path, tokenizer):
    job = fresh_model_and_rows(tmp_path, tokenizer)
    settings = {"max_steps": 2, "use_cpu": True, "disable_tqdm": True, "plot_loss": False}
    run("causal", job, output_dir=tmp_path / "run", **settings)
    assert (tmp_path / "run" / "checkpoint-2" / MANIFEST).is_file()
    export(tmp_path / "run" / "checkpoint-2", tmp_path / "hub")
    assert (tmp_path / "hub" / "model.safetensors").is_file() and not (tmp_path / "hub" / MANIFEST).exists()


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [(None, None, [1, 2, 3, 4, 8, 9]), (0, None, [1, 2, 3, 4, 8, 9]), (1, None, [4]), (3, None, [2, 3, 4])]
    + [
        (4, None, [1, 2, 3, 4]),
        (1, 2, [2, 4]),
        (2, 9, [4, 9]),
        (3, 1, [1, 3, 4]),
        (1, 4, [4]),
        (9, 1, [1, 2, 3, 4, 8, 9]),
    ],
)
def test_which_checkpoints_stay(limit, best, left, tmp_path):
    """Of a run that went back from step 9 and has just written step 4: the later ones go first, then the oldest."""
    for step in (1, 2, 3, 8, 9, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    rotate_checkpoints(tmp_path / "checkpoint-4", limit, best and str(tmp_path / f"checkpoint-{best}"))
    assert sorted(int(path.name.removeprefix("checkpoint-")) for path in tmp_path.iterdir()) == left
