"""References computed beforehand, and runs of several processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import load_from_disk
from peft import LoraConfig
from preference_cases import batch_of, build_model, build_trainer, make_pairs, nudged
from ranks import rank

from nanollada.trainers.dpo import DiffusionDPOTrainer
from nanollada.trainers.preferences.masks import EVALUATION

HERE = Path(__file__).parents[1]
COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


def precomputed(folder, **settings):
    return build_trainer(folder, build_model(), precompute_ref_log_probs=True, **settings)


@torch.no_grad()
def live(trainer, model, rows, seed, step):
    """The reference's scores as a live one has them: `[2, pairs]`."""
    batch = batch_of(trainer, rows)
    labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
    trainer._calls.begin(reference_only=True)
    scores = model(**batch, labels=labels, fused_lm_head=True, seed=seed, step=step).log_probs
    return scores.sum(-1).view(2, -1)


@pytest.mark.parametrize("estimator", ["elbo", "naive"])
def test_precomputed_scores_are_live_ones_under_keys_without_a_step(estimator, tmp_path):
    reference = nudged(build_model(), 0.1)
    settings = {"estimator": estimator, "ref_model": reference, "eval_dataset": make_pairs(3), "eval_seed": 5}
    trainer = precomputed(tmp_path, **settings)
    for dataset, rows, key in (
        (trainer.train_dataset, make_pairs(), (42, 0)),
        (trainer.eval_dataset, make_pairs(3), (5, EVALUATION)),
    ):
        stored = torch.tensor([dataset[name] for name in COLUMNS])
        assert torch.allclose(stored.double(), live(trainer, trainer.ref_model, rows, *key), rtol=1e-5)
    assert trainer.noise_key(True) == {"seed": 42, "step": 0}
    trainer.state.global_step = 9
    assert trainer.noise_key(True) == {"seed": 42, "step": 0}
    trainer.evaluate()
    assert "score/variance" not in trainer.state.log_history[-1]


def test_with_a_precomputed_reference_every_loss_before_learning_is_ln_2(tmp_path):
    trainer = precomputed(tmp_path, max_steps=6, learning_rate=0.0, eval_dataset=make_pairs(3))
    trainer.train()
    assert trainer.ref_model is None
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx([0.6931] * 6, abs=1e-4)  # three epochs
    assert trainer.evaluate()["eval_loss"] == pytest.approx(0.693147, abs=1e-5)
    with pytest.raises(ValueError, match="Cannot compute reference log-probs"):  # TRL's own: the policy has moved
        trainer.evaluate(trainer.eval_dataset.remove_columns(COLUMNS))


def test_an_adapter_s_reference_is_precomputed_without_it(tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = precomputed(tmp_path, max_steps=2, learning_rate=0.1, peft_config=lora)
    trainer.train()
    history = trainer.state.log_history
    assert history[0]["rewards/margins"] == pytest.approx(0, abs=1e-5) and history[1]["rewards/margins"] != 0


def test_the_cache_knows_what_a_score_hangs_on(tmp_path, monkeypatch):
    """The same rows and weights with another score are scored anew, the same score is read."""
    calls = []
    score = DiffusionDPOTrainer.compute_ref_log_probs
    monkeypatch.setattr(DiffusionDPOTrainer, "compute_ref_log_probs", lambda *args: calls.append(args) or score(*args))
    build_trainer(tmp_path).train_dataset.save_to_disk(tmp_path / "rows")  # TRL's cache lies beside rows on a disk
    changes = [{}, {"num_masks": 4}, {"estimator": "naive"}, {"seed": 1}, {"eos_padding": "block"}]
    scores = []
    for change in [*changes, {}]:
        calls.clear()
        settings = {"precompute_ref_log_probs": True, "eos_padding": "none", **change}
        trainer = build_trainer(tmp_path, build_model(block_length=4), load_from_disk(tmp_path / "rows"), **settings)
        scores.append(tuple(trainer.train_dataset["ref_chosen_logps"]))
        assert bool(calls) is (len(scores) <= len(changes)), change
    assert len(set(scores)) == len(changes) and scores[0] == scores[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Ranks.


def first_step(folder, batch):
    """The gradient of a step over all eight pairs, and what is logged of it."""
    reference = nudged(build_model(), 0.1)
    trainer = build_trainer(folder, ref_model=reference, per_device_train_batch_size=batch, max_steps=1)
    gradients = {}

    def keep(optimizer, *args, **kwargs):
        gradients.update({n: p.grad.clone() for n, p in trainer.model.named_parameters()})

    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    return {"gradients": gradients, "log": trainer.state.log_history[0]}


def test_ranks_change_neither_gradient_nor_metrics(tmp_path):
    """Two processes of `torchrun` (gloo) with four pairs each, against eight pairs in one."""
    alone, target = first_step(tmp_path, 8), tmp_path / "step.pt"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", __file__, str(target)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    done = subprocess.run(launch, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    together = torch.load(target)
    assert len(alone["gradients"]) > 20
    for name, gradient in alone["gradients"].items():
        assert torch.allclose(gradient, together["gradients"][name], rtol=1e-6, atol=1e-9), name
    for name, value in alone["log"].items():
        assert together["log"][name] == pytest.approx(value, rel=1e-5), name


if __name__ == "__main__":
    with rank():
        step = first_step(Path(sys.argv[1]).parent / "ranks", 4)
        if int(os.environ["RANK"]) == 0:
            torch.save(step, sys.argv[1])
