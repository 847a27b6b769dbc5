"""GRPO of adapters, on several ranks, of AR models, and where the best policy is known."""

import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from ranks import rank
from rollout_cases import evenness, gradients_of, logged, policy, prompts, trainer_of
from trl import GRPOTrainer

from nanollada.modeling_nanollada import NanoLLaDAConfig, NanoLLaDAForCausalLM
from nanollada.trainers import grpo
from nanollada.trainers.data.prepare import PreparedData
from nanollada.trainers.data.tokenizers import train_tokenizer
from nanollada.trainers.grpo import TRAINER, DiffusionGRPOConfig, DiffusionGRPOTrainer
from nanollada.trainers.tuning.trainer import resumable

HERE = Path(__file__).resolve().parents[1]
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def test_an_adapter_is_trained_against_the_policy_without_it(tmp_path, char_tokenizer, monkeypatch):
    kept, write = [], grpo.write_rollouts
    monkeypatch.setattr(grpo, "write_rollouts", lambda *args: kept.append(write(*args)) or kept[-1])
    model = policy(char_tokenizer)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    config = peft.LoraConfig(**LORA)
    trainer = trainer_of(tmp_path, char_tokenizer, model, peft_config=config, beta=0.1, max_steps=3, learning_rate=0.5)
    assert trainer.ref_model is None and trainer.base_model is model
    trainer.train()
    first, second, third = logged(trainer, "kl")
    assert first == 0 and second > 0 and third > 0
    base = {name.replace("base_layer.", ""): p for name, p in model.named_parameters() if "lora_" not in name}
    assert base.keys() == before.keys() and all(torch.equal(base[name], before[name]) for name in base)
    # The trained adapter takes part in what is written.
    canvas, mask = kept[0][0].canvas, kept[0][0].attention_mask.long()
    with torch.no_grad():
        adapted = model(canvas, attention_mask=mask).logits
        with trainer.model.disable_adapter():
            plain = model(canvas, attention_mask=mask).logits
    assert (adapted - plain).abs().max() > 1e-3
    with pytest.raises(ValueError, match="`ref_model` must be left out with an adapter"):
        trainer_of(
            tmp_path, char_tokenizer, ref_model=policy(char_tokenizer), beta=0.1, peft_config=peft.LoraConfig(**LORA)
        )


def test_an_adapters_first_ratio_is_one(tmp_path, char_tokenizer):
    settings = {"num_iterations": 2, "max_steps": 2, "learning_rate": 0.5, "epsilon": 1e-6}
    trainer = trainer_of(tmp_path, char_tokenizer, peft_config=peft.LoraConfig(**LORA), **settings)
    trainer.train()
    first, second = logged(trainer, "clip_ratio/region_mean")
    assert first == 0 and second > 0


# ---------------------------------------------------------------------------------------------------------------------
# Ranks.


def first_step(folder, tokenizer, batch):
    """The gradient of a step over all eight rollouts, which are the same however many ranks write them."""
    write = grpo.write_rollouts

    def in_groups(model, ids, mask, settings, generator):
        parts = []
        for group, visible in zip(ids.split(4), mask.split(4), strict=True):  # a prompt's, of its own draws
            fixed = torch.Generator().manual_seed(int(group[0].sum()))
            parts.append(write(model, group, visible, settings, fixed))
        tensors = ("canvas", "commit_steps", "attention_mask")
        rollouts = [torch.cat([getattr(part[0], name) for part in parts]) for name in tensors]
        return grpo.Rollouts(*rollouts, parts[0][0].prompt_length), sum((part[1] for part in parts), [])

    grpo.write_rollouts = in_groups
    try:
        settings = {"score_steps": 3, "num_iterations": 2, "loss_type": "dapo", "beta": 0.1}
        trainer = trainer_of(folder, tokenizer, per_device_train_batch_size=batch, shuffle_dataset=False, **settings)
        return {"gradients": gradients_of(trainer), "log": trainer.state.log_history[0]}
    finally:
        grpo.write_rollouts = write


def test_ranks_change_neither_gradient_nor_metrics(tmp_path, char_tokenizer):
    """Two processes of `torchrun` (gloo) with a prompt's four rollouts each, against eight in one."""
    alone, target = first_step(tmp_path, char_tokenizer, 8), tmp_path / "step.pt"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", __file__, str(target)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    done = subprocess.run(launch, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    together = torch.load(target)
    assert len(alone["gradients"]) > 20
    for name, gradient in alone["gradients"].items():
        assert torch.allclose(gradient, together["gradients"][name], rtol=1e-6, atol=1e-10), name
    for name, value in alone["log"].items():
        if name != "step_time":
            assert together["log"][name] == pytest.approx(value, rel=1e-5, abs=1e-9), name


# ---------------------------------------------------------------------------------------------------------------------
# AR models.


def causal(tokenizer):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return NanoLLaDAForCausalLM(NanoLLaDAConfig(vocab_size=len(tokenizer), initializer_range=0.3, **shape))


def built(folder, tokenizer, model, monkeypatch, reference=None, **settings):
    monkeypatch.setattr(grpo, "reward_functions", lambda names: [evenness])
    defaults = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    defaults |= {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 6, "max_steps": 2}
    args = DiffusionGRPOConfig(str(folder), **{**defaults, "learning_rate": 1e-2, **settings})
    rows = PreparedData(train=prompts(), eval=None, format="prompt", report={})
    return TRAINER.build(
        policy=model, reference=reference, tokenizer=tokenizer, rows=rows, data=None, args=args, peft_config=None
    )


def test_an_ar_policy_is_trained_by_trls_own_class(tmp_path, char_tokenizer, monkeypatch):
    reference = causal(char_tokenizer)
    trainer = built(tmp_path, char_tokenizer, causal(char_tokenizer), monkeypatch, reference, beta=0.1)
    assert isinstance(trainer, GRPOTrainer) and not isinstance(trainer, DiffusionGRPOTrainer)
    own = [name for part in type(trainer).__mro__[1 : type(trainer).__mro__.index(GRPOTrainer)] for name in vars(part)]
    scoring = ("_compute_loss", "compute_loss", "_generate", "_get_per_token_logps_and_entropies", "_prepare_inputs")
    assert not set(own) & {*scoring, "_generate_and_score_completions", "_generate_single_turn", "training_step"}
    assert trainer.accelerator.unwrap_model(trainer.ref_model) is reference
    trainer.train()
    first, second = logged(trainer, "kl")
    assert abs(first) < 1e-6 and second > 0
    assert all(value is not None for value in logged(trainer, "reward"))
    assert trainer.tokens_seen > 0


def test_the_run_of_a_diffusion_policy_is_ours_and_says_what_it_dropped(tmp_path, char_tokenizer, monkeypatch):
    model = policy(char_tokenizer).float()
    model.generation_config.threshold = 0.9
    trainer = built(tmp_path, char_tokenizer, model, monkeypatch, score_steps=2)
    assert isinstance(trainer, DiffusionGRPOTrainer)
    trainer.train()
    facts = TRAINER.objective(trainer)
    assert facts["dropped_decoding"] == {"threshold": 0.9} and model.generation_config.threshold is None
    assert (facts["estimator"], facts["score_steps"], facts["decoding"]) == ("replay", 2, {})


@pytest.mark.parametrize("settings", [{"estimator": "replay"}, {"score_steps": 2}])
def test_an_ar_policy_has_no_estimator(tmp_path, char_tokenizer, monkeypatch, settings):
    with pytest.raises(ValueError, match=f"`{next(iter(settings))}` is a diffusion policy's: it must not be given"):
        built(tmp_path, char_tokenizer, causal(char_tokenizer), monkeypatch, **settings)


# ---------------------------------------------------------------------------------------------------------------------
# A reward whose best policy is known.


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"estimator": "replay", "score_steps": 2}, {"estimator": "elbo"}])
def test_the_rewarded_token_takes_over(tmp_path, char_tokenizer, settings):
    """Reward 1 for a first token that is `a`, else 0, from a policy of no opinion."""
    wanted = char_tokenizer.convert_tokens_to_ids("a")

    def first_is_wanted(completion_ids, **kwargs):
        return [float(ids[0] == wanted) for ids in completion_ids]

    model = policy(char_tokenizer, initializer_range=0.02)
    trainer = trainer_of(
        tmp_path, char_tokenizer, model, first_is_wanted, max_completion_length=3, max_steps=30, learning_rate=0.02,
        per_device_train_batch_size=64, num_generations=32, lr_scheduler_type="constant", **settings,
    )  # fmt: skip
    trainer.train()
    rewards = logged(trainer, "reward")
    assert rewards[0] < 0.2 and sum(rewards[-5:]) / 5 > 0.9


if __name__ == "__main__":
    from conftest import TEXTS

    with rank():
        step = first_step(Path(sys.argv[1]).parent / "ranks", train_tokenizer(TEXTS, kind="char"), 4)
        if int(os.environ["RANK"]) == 0:
            torch.save(step, sys.argv[1])


def test_a_run_that_nothing_rewards_ends_with_an_error(tmp_path, char_tokenizer):
    """TRL warns, and goes on learning nothing; an answer without a reward is fine beside others that have one."""
    kind = resumable(DiffusionGRPOTrainer)
    some = lambda completions, **columns: [None, 1.0] * (len(completions) // 2)  # noqa: E731
    trainer_of(tmp_path, char_tokenizer, reward=some, kind=kind).train()
    none = lambda completions, **columns: [None] * len(completions)  # noqa: E731
    with pytest.raises(ValueError, match="`reward_funcs` must reward some answer of each step, got None for all 8 of"):
        trainer_of(tmp_path, char_tokenizer, reward=none, kind=kind).train()
