"""Trainers, rows and whole runs of the smallest size: what the tests of training share."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from nanollada.modeling_nanollada import NanoLLaDAConfig
from nanollada.trainers.data.collator import Collator
from nanollada.trainers.registry import TRAINERS
from nanollada.trainers.run import main

KINDS = {"causal": TRAINERS["ar"], "diffusion": TRAINERS["diffusion"], "block": TRAINERS["diffusion"]}
SETTINGS = {"block": {"block_length_schedule": "[[0.2, 1], [0.3, 4], [0.3, 0], [0.2, 4]]"}}
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def make_rows(count=8):
    """Rows of unequal length, with prompts of unequal length."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(count):
        length, prompt = 6 + 3 * (index % 4), 1 + index % 3
        ids = torch.randint(4, 30, (length,), generator=generator).tolist()
        labels = [-100] * prompt + ids[prompt:]
        places = list(range(length))
        row = {"input_ids": ids, "labels": labels, "document_ids": [0] * length, "position_ids": places}
        rows.append({**row, "index": index, "num_bytes": 2 * (length - prompt)})
    return rows


def build_trainer(kind, folder, model=None, rows=None, held_out=None, **settings):
    entry = KINDS[kind]
    if model is None:
        torch.manual_seed(0)
        model = entry.model_class(NanoLLaDAConfig(vocab_size=30, **SHAPE)).double()
    defaults = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "plot_loss": False, "disable_tqdm": True}
    args = entry.config_class(output_dir=str(folder), **{**defaults, **SETTINGS.get(kind, {}), **settings})
    probability = settings.get("variable_length_probability", 0.0)
    collator = Collator(0, probability, args.seed)
    return entry.trainer_class(model, args, collator, rows or make_rows(), eval_dataset=held_out)


def one_step(kind, folder, batch, accumulation, **settings):
    """The gradient of the first optimizer step over all eight rows, by name."""
    trainer = build_trainer(
        kind,
        folder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        max_grad_norm=0.0,
        **settings,
    )
    gradients = {}

    def keep(optimizer, *args, **kwargs):
        gradients.update({n: p.grad.clone() for n, p in trainer.model.named_parameters()})

    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    return gradients, trainer.state.log_history[0].get("loss", trainer.state.log_history[0].get("train_loss"))


def assert_same_gradients(one, other):
    assert one.keys() == other.keys() and len(one) > 20
    for name in one:
        scale = one[name].abs().max().clamp(min=1e-12)
        assert ((one[name] - other[name]).abs().max() / scale).item() <= 1e-6, name


def corpus(path, count=60):
    words = "the cat sat on a mat and the dog sang to it of rain sun wind snow".split()
    generator = torch.Generator().manual_seed(1)
    lines = []
    for _ in range(count):
        places = torch.randint(0, len(words), (12,), generator=generator).tolist()
        lines.append(json.dumps({"text": " ".join(words[place] for place in places) + "."}))
    path.write_text("\n".join(lines) + "\n")
    return path


def fresh_model_and_rows(folder, tokenizer):
    """The part of a run's settings that names its rows and its untrained model."""
    tokenizer.save_pretrained(folder / "tokenizer")
    rows = {"data": corpus(folder / "data.jsonl"), "held_out_fraction": 0.1, "max_length": 32}
    return {**rows, "tokenizer_name_or_path": folder / "tokenizer", **SHAPE}


def command_line(settings, **overrides):
    return [part for name, value in {**settings, **overrides}.items() for part in (f"--{name}", str(value))]


def run(kind, settings, **overrides):
    return main(KINDS[kind], command_line({**settings, **SETTINGS.get(kind, {})}, **overrides))


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def packed_batch(trainer, count=4):
    """Rows of two documents, six and nine tokens, each behind its context token."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(count):
        ids = torch.randint(4, 30, (15,), generator=generator).tolist()
        labels = [-100, *ids[1:6], -100, *ids[7:]]
        places = {"document_ids": [0] * 6 + [1] * 9, "position_ids": [*range(6), *range(9)]}
        rows.append({"input_ids": ids, "labels": labels, **places, "index": index, "num_bytes": 1})
    batch = trainer.data_collator([{**row, "rank": row["index"], "epoch": 0} for row in rows])
    trainer.state.max_steps = 10
    return batch
