"""Weight averages: closed forms, what evaluation and files hold, and runs that are stopped and go on bit for bit."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import rank
from safetensors.torch import load_file, save_file
from training_cases import KINDS, SHAPE, command_line, fresh_model_and_rows, make_rows
from transformers import TrainerCallback

from nanollada.modeling_nanollada import NanoLLaDAConfig
from nanollada.trainers.causal import CausalConfig
from nanollada.trainers.data.collator import Collator
from nanollada.trainers.diffusion import DiffusionConfig
from nanollada.trainers.resuming.checkpoints import last_complete_checkpoint
from nanollada.trainers.run import main
from nanollada.trainers.weights import averaging
from nanollada.trainers.weights.averaging import ExponentialMovingAverage
from nanollada.trainers.weights.merging import MergeCandidates

HELD_OUT = make_rows(11)[8:]  # not those that are trained, so that the loss rises again


class Script(TrainerCallback):
    """Keeps the weights after every step, and stops the run like a kill would."""

    def __init__(self, kill_at=None):
        self.kill_at, self.weights = kill_at, []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(copied(model))

    def on_evaluate(self, args, state, control, **kwargs):
        if state.global_step == self.kill_at:  # evaluated, not yet saved
            raise KeyboardInterrupt


def copied(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def small_model(dtype=torch.float32, tied=False, kind="causal"):
    torch.manual_seed(0)
    config = NanoLLaDAConfig(vocab_size=30, hidden_dropout=0.1, tie_word_embeddings=tied, **SHAPE)
    return KINDS[kind].model_class(config).to(dtype)


def build(folder, kind="causal", model=None, kill_at=None, **settings):
    defaults = {
        "use_cpu": True,
        "report_to": "none",
        "plot_loss": False,
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        "max_steps": 8,
        "logging_steps": 100,
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    args = KINDS[kind].config_class(output_dir=str(folder), **{**defaults, **settings})
    model = model or small_model(kind=kind)
    trainer = KINDS[kind].trainer_class(model, args, Collator(0, 0.0, args.seed), make_rows(), eval_dataset=HELD_OUT)
    trainer.script = Script(kill_at)
    trainer.add_callback(trainer.script)
    return trainer


def assert_same(one, other):
    assert one.keys() == other.keys() and len(one) > 10
    for name in one:
        assert torch.equal(one[name], other[name]), name


def losses_of(trainer):
    return {line["step"]: line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line}


def close(one, other, tolerance):
    return all((one[name] - other[name]).abs().max() <= tolerance for name in one)


@pytest.mark.parametrize("tied", [False, True])
def test_the_average_is_the_geometric_sum(tied, tmp_path):
    """Float64, so that the recursion and the sum agree closely."""
    model, decay, steps = small_model(torch.double, tied), 0.9, 8
    start = copied(model)
    trainer = build(tmp_path, model=model, ema_decay=decay, save_strategy="no")
    trainer.train()
    seen = trainer.script.weights
    assert len(seen) == steps and not close(seen[0], seen[-1], 1e-3)
    for name in start:
        expected = decay**steps * start[name]
        expected += sum((1 - decay) * decay ** (steps - 1 - i) * weights[name] for i, weights in enumerate(seen))
        assert (trainer.ema.weights[name] - expected).abs().max() < 1e-14, name
    assert_same(copied(model), seen[-1])  # training went on with the raw weights


def test_the_average_of_low_precision_is_kept_in_float32():
    model = small_model(torch.bfloat16)
    average, start = ExponentialMovingAverage(model, 0.999), copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    shifted = copied(model)
    average.update(model)
    name = "model.layers.0.mlp.up_proj.weight"
    expected = 0.999 * start[name].float() + 0.001 * shifted[name].float()
    assert average.weights[name].dtype == torch.float32
    assert torch.allclose(average.weights[name], expected, atol=1e-6) and not expected.equal(start[name].float())
    with average.in_place_of(model):
        assert model.get_parameter(name).equal(average.weights[name].bfloat16())
    assert_same(copied(model), shifted)


def test_evaluation_and_what_is_saved_use_the_average(tmp_path):
    trainer = build(tmp_path, ema_decay=0.7, save_steps=8)
    trainer.train()
    raw, average = copied(trainer.model), trainer.ema.weights
    versions = [parameter.data_ptr() for parameter in trainer.model.parameters()]
    scored = trainer.evaluate()["eval_loss"]
    assert_same(copied(trainer.model), raw)
    assert versions == [parameter.data_ptr() for parameter in trainer.model.parameters()]
    assert scored == losses_of(trainer)[8] == trainer.final_evaluation(HELD_OUT)["evaluation"]["nats_per_token"]
    trainer.save_model(tmp_path / "final")
    assert_same(load_file(tmp_path / "final" / "model.safetensors"), average)
    assert_same(load_file(tmp_path / "checkpoint-8" / "model.safetensors"), raw)
    assert_same(load_file(tmp_path / "checkpoint-8" / "ema.safetensors"), average)
    assert not (tmp_path / "final" / "ema.safetensors").exists()
    averaging.copy_weights(trainer.model, average)
    trainer.ema = None
    assert trainer.evaluate()["eval_loss"] == scored
    averaging.copy_weights(trainer.model, raw)
    assert trainer.evaluate()["eval_loss"] != scored


def test_the_raw_weights_come_back_after_an_error():
    model = small_model()
    average, raw = ExponentialMovingAverage(model, 0.5), copied(model)
    average.weights["model.norm.weight"].fill_(3.0)
    with pytest.raises(RuntimeError, match="in between"), average.in_place_of(model):
        assert model.model.norm.weight.eq(3).all()
        raise RuntimeError("in between")
    assert_same(copied(model), raw)


@pytest.mark.parametrize(("kind", "tied"), [("causal", True), ("diffusion", False)])
def test_a_stopped_run_goes_on_bit_for_bit(kind, tied, tmp_path):
    """Stopped after step 8 was evaluated, with checkpoint 6 as the newest: weights, average and merge."""
    settings = {"kind": kind, "ema_decay": 0.8, "merge_top_k": 2, "max_steps": 12, "save_total_limit": 1}
    whole = build(tmp_path / "whole", model=small_model(tied=tied, kind=kind), **settings)
    whole.train()
    stopped = build(tmp_path / "stopped", model=small_model(tied=tied, kind=kind), kill_at=8, **settings)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert (tmp_path / "stopped/merge/step-8.safetensors").exists()
    newest = last_complete_checkpoint(tmp_path / "stopped")
    assert newest.endswith("checkpoint-6")

    resumed = build(tmp_path / "stopped", model=small_model(tied=tied, kind=kind), **settings)
    resumed.train(resume_from_checkpoint=newest)
    assert_same(copied(whole.model), copied(resumed.model))
    assert_same(whole.ema.weights, resumed.ema.weights)
    assert losses_of(whole) == losses_of(resumed)
    kept = [
        {path.name: path.read_bytes() for path in (tmp_path / name / "merge").iterdir()}
        for name in ("whole", "stopped")
    ]
    assert kept[0] == kept[1] and len(kept[0]) in (3, 4)  # index.json, the best two, one of checkpoint 9
    facts = [trainer.final_evaluation(HELD_OUT) for trainer in (whole, resumed)]
    assert facts[0] == facts[1]
    assert_same(copied(whole.model), copied(resumed.model))


@pytest.mark.slow
def test_ranks_average_and_merge_alike(tmp_path):
    """Two processes of `torchrun` (gloo) against one, in float64; the two hold the same bits."""
    alone = averaged_and_merged(tmp_path / "alone", 8)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d"]
    launch += ["--rdzv-endpoint", "localhost:0", str(Path(__file__)), str(tmp_path / "ranks")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(launch, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"ranks/rank-{rank}.pt") for rank in range(2))
    for kind in ("average", "merge"):
        assert_same(first[kind], second[kind])
        assert close(alone[kind], first[kind], 1e-12)


def averaged_and_merged(folder, batch):
    """`average` and `merge` at the end of a run, by parameter name."""
    model = small_model(torch.double)
    for module in model.modules():
        module.hidden_dropout = 0.0  # ranks draw their own
    trainer = build(folder, model=model, ema_decay=0.8, merge_top_k=2, per_device_train_batch_size=batch)
    trainer.train()
    average = trainer.ema.weights
    trainer.final_evaluation(HELD_OUT)
    return {"average": average, "merge": copied(trainer.plain_model)}


def test_a_kill_while_saving_leaves_no_checkpoint_that_looks_complete(tmp_path, monkeypatch):
    """At every stage of writing the average, also when an older attempt had written the whole folder."""
    build(tmp_path, ema_decay=0.5, max_steps=3).train()
    state, replace = (tmp_path / "checkpoint-3/trainer_state.json").read_text(), os.replace

    def killed_writing(tensors, path, **kwargs):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    def killed_renaming(source, target):
        replace(source, target)
        if str(target).endswith("ema.safetensors"):
            raise KeyboardInterrupt

    for name, stage in (("save_file", killed_writing), ("os.replace", killed_renaming)):
        (tmp_path / "checkpoint-3/trainer_state.json").write_text(state)
        assert last_complete_checkpoint(tmp_path).endswith("checkpoint-3")
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(f"nanollada.trainers.weights.merging.{name}", stage)
            build(tmp_path, ema_decay=0.5, max_steps=3).train()
        assert last_complete_checkpoint(tmp_path) is None
        assert len(load_file(tmp_path / "checkpoint-3/ema.safetensors")) > 10  # whole, whichever it is


def test_the_best_model_comes_back_with_its_average(tmp_path):
    settings = {"ema_decay": 0.5, "load_best_model_at_end": True, "save_steps": 2, "learning_rate": 0.3}
    trainer = build(tmp_path, **settings)
    trainer.train()
    losses = losses_of(trainer)
    best = min(losses, key=losses.get)
    assert best < 8, losses  # else the last state is the best one and this test shows nothing
    assert_same(trainer.ema.weights, load_file(tmp_path / f"checkpoint-{best}/ema.safetensors"))
    assert_same(copied(trainer.model), load_file(tmp_path / f"checkpoint-{best}/model.safetensors"))
    assert trainer.final_evaluation(HELD_OUT)["evaluation"]["nats_per_token"] == losses[best]


def test_resuming_needs_the_average(tmp_path):
    build(tmp_path, ema_decay=0.5, max_steps=3).train()
    checkpoint = str(tmp_path / "checkpoint-3")
    with pytest.raises(ValueError, match="`ema_decay` must be > 0 to resume.*ema.safetensors, got 0"):
        build(tmp_path).train(resume_from_checkpoint=checkpoint)
    path = tmp_path / "checkpoint-3/ema.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "model.norm.weight": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="ema.safetensors must hold the average.*difference in model.norm.weight"):
        build(tmp_path, ema_decay=0.5).train(resume_from_checkpoint=checkpoint)
    path.unlink()
    with pytest.raises(ValueError, match="`ema_decay` needs the average.*no ema.safetensors in .*checkpoint-3"):
        build(tmp_path, ema_decay=0.5).train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("ema_decay", [0.0, 0.8])
def test_the_merge_is_the_mean_of_the_best_states(ema_decay, tmp_path):
    trainer = build(tmp_path, merge_top_k=3, ema_decay=ema_decay, learning_rate=0.1, eval_on_start=True, max_steps=12)
    states, evaluate = {}, trainer.likelihood
    context = trainer.averaged_weights

    def remembering(rows):
        with context():
            states[trainer.state.global_step] = copied(trainer.model)
        return evaluate(rows)

    trainer.likelihood = remembering
    trainer.train()
    last = copied(trainer.model)
    losses = losses_of(trainer)
    del losses[0]  # the start is no result of training
    best = sorted(losses, key=losses.get)[:3]
    assert set(best) != {8, 10, 12} and len(losses) == 6, losses  # else the last three would do
    facts = trainer.final_evaluation(HELD_OUT)
    mean = {name: (sum(states[step][name].double() for step in sorted(best)) / 3).float() for name in last}
    assert_same(copied(trainer.model), mean)
    assert facts["merge"]["steps"] == best and facts["merge"]["k"] == 3
    assert facts["merge"]["eval_losses"] == [losses[step] for step in best]
    assert facts["merge"]["evaluation_last"]["nats_per_token"] == losses[12]
    assert facts["evaluation"] == evaluate(HELD_OUT).to_dict() != facts["merge"]["evaluation_last"]
    trainer.save_model(tmp_path / "final")
    assert_same(load_file(tmp_path / "final/model.safetensors"), mean)


def test_a_run_from_the_command_line_merges(tmp_path, tokenizer):
    settings = {
        **fresh_model_and_rows(tmp_path, tokenizer),
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_steps": 6,
        "save_strategy": "no",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "ema_decay": 0.5,
        "merge_top_k": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "plot_loss": False,
        "output_dir": tmp_path / "run",
    }
    facts = main(KINDS["diffusion"], command_line(settings))
    assert json.loads((tmp_path / "run/run.json").read_text()) == json.loads(json.dumps(facts))
    assert facts["merge"]["steps"] == [6, 4] and facts["ema_decay"] == 0.5
    merged = merge_files(tmp_path / "run/merge", facts["merge"]["steps"])
    assert_same(load_file(tmp_path / "run/model.safetensors"), merged)


def merge_files(folder, steps):
    found = [load_file(folder / f"step-{step}.safetensors") for step in steps]
    return {name: (sum(one[name].double() for one in found) / len(found)).float() for name in found[0]}


def candidates(folder, k=2):
    return MergeCandidates(folder, k)


def add(kept, losses):
    for step, loss in losses.items():
        kept.add(step, loss, {"weight": torch.tensor([float(step)])})


def steps_on_disk(folder):
    return sorted(int(path.stem.removeprefix("step-")) for path in folder.glob("step-*.safetensors"))


def test_what_a_resumed_run_may_still_need_stays_on_disk(tmp_path):
    kept = candidates(tmp_path)
    kept.start(0)
    add(kept, {1: 5.0, 2: 4.0, 3: 3.0})
    assert steps_on_disk(tmp_path) == [2, 3]
    kept.saved(3)
    add(kept, {4: 2.0, 5: 1.0, 6: 9.0})
    assert kept.best() == [5, 4] and steps_on_disk(tmp_path) == [2, 3, 4, 5]
    again = candidates(tmp_path)
    again.start(3)  # killed after step 6; steps 4 to 6 are done again, with another result
    assert again.best() == [3, 2] and steps_on_disk(tmp_path) == [2, 3]
    add(again, {4: 7.0})
    assert again.best() == [3, 2] and again.mean()["weight"].item() == 2.5
    again.start(0)  # a new run in the same folder
    assert again.best() == [] and steps_on_disk(tmp_path) == []


def test_equal_losses_keep_the_earlier_state_and_others_are_left_out(tmp_path, caplog):
    kept = candidates(tmp_path)
    kept.start(0)
    with caplog.at_level(logging.WARNING):
        add(kept, {1: 2.0, 2: float("nan"), 3: 2.0, 4: 2.0, 5: float("inf")})
    assert kept.best() == [1, 3] and steps_on_disk(tmp_path) == [1, 3]
    assert "The state of step 2 cannot be merged: its `eval_loss` is nan" in caplog.text


def test_resuming_needs_the_candidates(tmp_path):
    with pytest.raises(ValueError, match="`merge_top_k` needs the states evaluated before.*got no .*index.json"):
        candidates(tmp_path).start(4)
    kept = candidates(tmp_path)
    kept.start(0)
    add(kept, {1: 3.0, 2: 2.0})
    with pytest.raises(
        ValueError, match="must be the newest checkpoint.*got step 2, and .*step-1.safetensors is gone"
    ):
        (tmp_path / "step-1.safetensors").unlink()
        candidates(tmp_path).start(2)


def test_other_ranks_write_nothing(tmp_path):
    kept = MergeCandidates(tmp_path / "merge", 1, writes=False)
    kept.start(0)
    add(kept, {1: 3.0, 2: 2.0})
    kept.saved(2)
    assert kept.best() == [2] and not (tmp_path / "merge").exists()


def test_too_few_states_are_said(tmp_path, caplog):
    trainer = build(tmp_path, merge_top_k=3, max_steps=6, save_strategy="no")
    trainer.train()
    trainer.candidates.losses = {4: trainer.candidates.losses[4]}  # as after an early stop
    with caplog.at_level(logging.WARNING):
        facts = trainer.final_evaluation(HELD_OUT)
    assert "`merge_top_k` of 3 found only 1 evaluated states" in caplog.text
    assert facts["merge"]["k"] == 1 and facts["merge"]["steps"] == [4]
    assert_same(copied(trainer.model), load_file(tmp_path / "merge/step-4.safetensors"))


EVALUATED = {"eval_strategy": "steps", "eval_steps": 4, "max_steps": 10}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ema_decay": 1.0}, r"`ema_decay` must lie in \[0, 1\), got 1.0"),
        ({"ema_decay": -0.1}, r"`ema_decay` must lie in \[0, 1\), got -0.1"),
        ({"merge_top_k": -1}, "`merge_top_k` must be >= 0, got -1"),
        ({"merge_top_k": 2}, "`merge_top_k` needs `eval_strategy` steps or epoch, got 2 and no"),
        (
            {"merge_top_k": 2, "eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True},
            "`merge_top_k` and `load_best_model_at_end` both choose the weights.*got 2 and True",
        ),
        (
            {"merge_top_k": 4, **EVALUATED},
            "`merge_top_k` must be at most the number of evaluations, 3 in this run, got 4",
        ),
        ({"merge_top_k": 3, **EVALUATED, "eval_delay": 5}, "evaluations, 2 in this run, got 3"),
        ({"merge_top_k": 6, **EVALUATED, "eval_steps": 0.2}, "evaluations, 5 in this run, got 6"),
        ({"merge_top_k": 4, "eval_strategy": "epoch", "num_train_epochs": 2.5}, "evaluations, 3 in this run, got 4"),
    ],
)
def test_wrong_settings_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        CausalConfig(output_dir=str(tmp_path), **settings)


def test_settings_that_may_fit_are_not_refused(tmp_path):
    for settings in (
        {"merge_top_k": 3, **EVALUATED},
        {"merge_top_k": 9, "eval_strategy": "epoch", "max_steps": 100},
        {"merge_top_k": 9, "eval_strategy": "steps", "eval_steps": 100},
        {"merge_top_k": 2, "early_stopping_patience": 2, **EVALUATED},
    ):
        DiffusionConfig(output_dir=str(tmp_path), **settings)


def test_the_number_of_evaluations_is_checked_before_training(tmp_path):
    trainer = build(tmp_path, merge_top_k=3, max_steps=-1, num_train_epochs=4, per_device_train_batch_size=8)
    with pytest.raises(
        ValueError, match="`merge_top_k` must be at most the number of evaluations, 2 in this run, got 3"
    ):
        trainer.train()
    assert trainer.script.weights == []


@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_sharded_weights_are_refused(name, tmp_path, monkeypatch):
    prepare = averaging.ResumingTrainer.create_accelerator_and_postprocess

    def pretend(self):
        prepare(self)
        setattr(self, f"is_{name}_enabled", True)

    monkeypatch.setattr(averaging.ResumingTrainer, "create_accelerator_and_postprocess", pretend)
    label = {"fsdp": "FSDP", "deepspeed": "DeepSpeed"}[name]
    for settings in ({"ema_decay": 0.5}, {"merge_top_k": 1}):
        with pytest.raises(ValueError, match=f"need whole weights on every rank, got {label}"):
            build(tmp_path, **settings)


if __name__ == "__main__":  # a rank of `test_ranks_average_and_merge_alike`
    target = Path(sys.argv[1])
    with rank():
        found = averaged_and_merged(target, 4)
    torch.save(found, target / f"rank-{os.environ['RANK']}.pt")
