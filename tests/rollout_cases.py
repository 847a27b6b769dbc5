"""Policies, prompts and trainers of the smallest size: what the tests of GRPO share."""

import torch
from datasets import Dataset

from nanollada.modeling_nanollada import NanoLLaDAConfig, NanoLLaDAForMaskedLM
from nanollada.trainers.grpo import DiffusionGRPOConfig, DiffusionGRPOTrainer

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
PROMPTS = ["The cat", "The bird sang", "The mat", "The dog sat on"]  # of several lengths


def policy(tokenizer, seed=0, **overrides):
    """A tiny model of opinions, in float64."""
    torch.manual_seed(seed)
    shape = {"vocab_size": len(tokenizer), "initializer_range": 0.3, **SHAPE, **overrides}
    return NanoLLaDAForMaskedLM(NanoLLaDAConfig(**shape)).double()


def prompts(count=4):
    return Dataset.from_list([{"prompt": PROMPTS[i % len(PROMPTS)], "number": i} for i in range(count)])


def evenness(completion_ids, **kwargs):
    """A reward that most rollouts differ in: the share of even ids."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def trainer_of(folder, tokenizer, model=None, reward=evenness, train=None, kind=DiffusionGRPOTrainer, **settings):
    """A trainer of two prompts and four rollouts of six tokens; `trainer` holds what it did in `log_history`."""
    given = {name: settings.pop(name) for name in ("ref_model", "peft_config", "eval_dataset") if name in settings}
    defaults = {
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": 1e-3,
        "max_grad_norm": 0.0,
    }
    args = DiffusionGRPOConfig(str(folder), **{**defaults, **settings})
    model = policy(tokenizer) if model is None else model
    return kind(model, reward, args, train or prompts(), processing_class=tokenizer, **given)


def gradients_of(trainer):
    """Trains, and gives the gradients of the first optimizer step, by name."""
    kept = {}

    def keep(optimizer, *args, **kwargs):
        if not kept:
            kept.update({name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None})

    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    return kept


def logged(trainer, name):
    """A metric's values, in order."""
    return [line[name] for line in trainer.state.log_history if name in line]
