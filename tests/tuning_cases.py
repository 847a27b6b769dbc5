"""Whole runs of TRL's trainers of the smallest size: checkpoints, rows, and entries that need no program."""

from dataclasses import dataclass, field

import torch
from datasets import Dataset
from training_cases import SHAPE, command_line
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from nanollada.modeling_nanollada import NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM
from nanollada.trainers.data.prepare import PreparedData
from nanollada.trainers.models import config_for
from nanollada.trainers.run import main
from nanollada.trainers.tuning.entry import TuningEntry
from nanollada.trainers.tuning.trainer import resumable

QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1}


@dataclass
class PairConfig(DPOConfig):
    """TRL's, without what it turns on."""

    bf16: bool | None = False
    gradient_checkpointing: bool | None = None  # transformers warns of every other value


@dataclass
class RewardConfig(GRPOConfig):
    """TRL's, without what it turns on."""

    bf16: bool | None = False
    gradient_checkpointing: bool | None = None


@dataclass
class Rows:
    """Options of rows that the test makes itself."""

    count: int = field(default=12, metadata={"help": "Rows."})
    other: bool = field(default=False, metadata={"help": "Other ones."})


class PlainTRL(DPOTrainer):
    """TRL's own, of rows with tokens."""

    def _prepare_dataset(self, dataset, *args):
        return dataset


def preferences(data, tokenizer, args, config):
    generator = torch.Generator().manual_seed(4 if data.other else 3)
    draw = lambda n: torch.randint(4, len(tokenizer) - 4, (n,), generator=generator).tolist()  # noqa: E731
    rows = [{"prompt_ids": draw(3), "chosen_ids": draw(4), "rejected_ids": draw(3)} for _ in range(data.count)]
    report = {"sources": ["pairs.jsonl"], "format": "preference", "rows": data.count - 4}
    report["eval"] = {"sources": [], "rows": 4}
    return PreparedData(Dataset.from_list(rows[4:]), Dataset.from_list(rows[:4]), "preference", report)


def prompts(data, tokenizer, args, config):
    rows = [{"prompt": f"the cat {number}"} for number in range(data.count)]
    report = {"sources": ["prompts.jsonl"], "format": "prompt", "rows": data.count, "eval": {"sources": [], "rows": 0}}
    return PreparedData(Dataset.from_list(rows), None, "prompt", report)


def longer_is_better(completions, **kwargs):
    return [float(len(text) % 7) for text in completions]


def build_dpo(*, policy, reference, tokenizer, rows, data, args, peft_config):
    return resumable(PlainTRL)(
        policy, reference, args, None, rows.train, rows.eval, tokenizer, peft_config=peft_config
    )


def build_grpo(*, policy, reference, tokenizer, rows, data, args, peft_config):
    return resumable(GRPOTrainer)(
        policy, longer_is_better, args, rows.train, processing_class=tokenizer, peft_config=peft_config
    )


def objective(trainer):
    return {"name": "a test's", "beta": trainer.beta}


DPO = TuningEntry("dpo", "Trains on pairs.", PairConfig, Rows, preferences, build_dpo, objective, lambda args: True)
GRPO = TuningEntry(
    "grpo",
    "Trains on rewards.",
    RewardConfig,
    Rows,
    prompts,
    build_grpo,
    objective,
    lambda args: False,
    ("reward", "r"),
)


def checkpoint(folder, tokenizer, diffusion=False):
    """A tiny model and its tokenizer on disk."""
    torch.manual_seed(0)
    model = (NanoLLaDAForMaskedLM if diffusion else NanoLLaDAForCausalLM)(config_for(tokenizer, **SHAPE))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tune(entry, policy, folder, **settings):
    options = {"model_name_or_path": policy, "output_dir": folder, **QUIET, "learning_rate": 1e-2, **settings}
    if entry.name == "grpo":
        own = {"num_generations": 4, "per_device_train_batch_size": 4, "max_completion_length": 4}
        options = {**own, **options}
    return main(entry, command_line(options))
