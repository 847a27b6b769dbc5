"""Pairs, a tokenizer of thirty words, and the smallest trainers: what the tests of preference learning share."""

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from nanollada.modeling_nanollada import NanoLLaDAConfig, NanoLLaDAForMaskedLM
from nanollada.trainers.dpo import DiffusionDPOConfig, DiffusionDPOTrainer
from nanollada.trainers.preferences.pairs import PAIR

VOCABULARY, EOS = 30, 2
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def words():
    """Its special tokens have the ids of a config's defaults."""
    special = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|eos|>", "mask_token": "<|mask|>"}
    vocabulary = {word: n for n, word in enumerate([*special.values(), *(f"w{n}" for n in range(4, VOCABULARY))])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w4"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def build_model(seed=0, **config):
    torch.manual_seed(seed)
    shape = {"vocab_size": VOCABULARY, "initializer_range": 0.3, **SHAPE, **config}
    return NanoLLaDAForMaskedLM(NanoLLaDAConfig(**shape)).double()


def nudged(model, size, seed=1):
    """A copy whose every weight is off by this share of its tensor's size."""
    other = type(model)(model.config).to(model.dtype)
    other.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter += size * parameter.std() * noise if parameter.numel() > 1 else 0
    return other


def make_pairs(count=8, longest=9):
    """Prompts and answers of unequal length, each answer with its EOS."""
    generator = torch.Generator().manual_seed(0)

    def ids(length):
        return torch.randint(4, VOCABULARY, (length,), generator=generator).tolist()

    rows = []
    for number in range(count):
        chosen, rejected = 2 + (3 * number) % (longest - 2), 2 + (5 * number + 1) % (longest - 2)
        rows.append({"prompt_ids": ids(1 + number % 3), "chosen_ids": ids(chosen) + [EOS]})
        rows[-1]["rejected_ids"] = ids(rejected) + [EOS]
    return rows


def build_trainer(folder, model=None, rows=None, trainer_class=DiffusionDPOTrainer, **settings):
    own = {name: settings.pop(name, None) for name in ("ref_model", "eval_dataset", "peft_config", "data_collator")}
    defaults = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    defaults |= {"per_device_train_batch_size": 4, "logging_steps": 1, "max_grad_norm": 0.0}
    args = DiffusionDPOConfig(str(folder), **{**defaults, **settings})
    own["train_dataset"] = make_pairs() if rows is None else rows
    own |= {name: Dataset.from_list(value) for name, value in own.items() if isinstance(value, list)}
    model = build_model() if model is None else model
    return trainer_class(model, args=args, processing_class=words(), **own)


def batch_of(trainer, rows=None):
    """The trainer's own batch of rows of token ids."""
    rows = make_pairs() if rows is None else rows
    return trainer.data_collator([{"index": number, **row} for number, row in enumerate(rows)])


def likelihood_batch(rows):
    """The batch that `scoring/likelihood.py` reads: for each pair the chosen answer, then the rejected one."""
    ids = [row["prompt_ids"] + row[name] for row in rows for name in PAIR[1:]]
    prompts = [len(row["prompt_ids"]) for row in rows for _ in range(2)]
    width = max(map(len, ids))
    labels = [[-100] * p + one[p:] + [-100] * (width - len(one)) for p, one in zip(prompts, ids, strict=True)]
    return {
        "input_ids": torch.tensor([one + [0] * (width - len(one)) for one in ids]),
        "labels": torch.tensor(labels),
        "attention_mask": torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in ids]),
        "index": torch.arange(len(ids)),
    }
