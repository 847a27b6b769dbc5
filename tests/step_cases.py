"""Training runs for `test_keyed.py` and its ranks: the same rows, however they are divided, read and interrupted."""

import functools
import itertools
import os
import shutil
import sys
from pathlib import Path

import torch
from ranks import allow_shards_without_a_gpu, rank
from transformers import TrainerCallback

from nanollada.modeling_nanollada import NanoLLaDAConfig
from nanollada.trainers.data.collator import Collator
from nanollada.trainers.data.keyed import COUNTS, RowStream
from nanollada.trainers.models import own_process_group
from nanollada.trainers.registry import TRAINERS
from nanollada.trainers.run import use_fork_server

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SETTINGS = {
    "optim": "sgd",
    "learning_rate": 0.3,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "use_cpu": True,
    "report_to": "none",
    "plot_loss": False,
    "disable_tqdm": True,
}
KINDS = ("causal", "diffusion", "block")
DATA = ("pretrain", "sft", "partial")
ROWS_PER_STEP, STEPS = 6, 7
# After which of seven steps a run is broken off: in pass 1, on the border, in pass 2.
BREAKS = {"pretrain": (1, 2, 3), "sft": (1, 2, 3), "partial": (2, 3, 4)}


def make_rows(data):
    """`pretrain`: packed rows; `sft`: rows of unequal lengths; `partial`: both, with a last step of one row."""
    generator = torch.Generator().manual_seed(DATA.index(data))
    rows = []
    for index in range(13 if data == "partial" else 12):
        length = 12 if data == "pretrain" else (3, 6, 15, 9)[index % 4]
        border = (length, 5, 8)[index % 3] if data != "sft" and length > 8 else length  # of two documents
        ids = torch.randint(4, 30, (length,), generator=generator).tolist()
        row = {
            "input_ids": ids,
            "labels": [-100, *ids[1:]],
            "document_ids": [int(place >= border) for place in range(length)],
            "position_ids": [*range(border), *range(length - border)],
        }
        if border < length:
            row["labels"][border] = -100
        rows.append({**row, "index": index, "num_bytes": length})
    return rows


def read(rows, report):
    """One pass of a stream, with a count as `prepare_data` has it."""
    for row in rows:
        report["documents"] += 1
        report["rows"] += 1
        report["target_tokens"] += sum(label != -100 for label in row["labels"])
        yield row
    report["dropped_tokens"] += 3


def stream_of(rows):
    return RowStream(functools.partial(read, rows), {**dict.fromkeys(COUNTS, 0), "skipped_rows": {}})


def build(kind, data, folder, streaming=False, ranks=1, accumulation=1, **settings):
    """A trainer whose steps have six rows."""
    entry = TRAINERS["ar" if kind == "causal" else "diffusion"]
    torch.manual_seed(settings.pop("init", 0))
    model = entry.model_class(NanoLLaDAConfig(vocab_size=30, **SHAPE))
    block = {"block_length": 4} if kind == "block" else {}
    batch = {"per_device_train_batch_size": ROWS_PER_STEP // accumulation // ranks}
    settings = {**SETTINGS, "max_steps": STEPS, "save_strategy": "no", **batch, **block, **settings}
    args = entry.config_class(output_dir=str(folder), gradient_accumulation_steps=accumulation, **settings)
    use_fork_server(args)
    rows = make_rows(data)
    collator = Collator(0, 0.3 if kind == "diffusion" else 0.0, args.seed)
    return entry.trainer_class(model, args, collator, stream_of(rows) if streaming else rows)


def weights_of(model):
    parameters = [parameter.detach() for parameter in model.parameters()]
    whole = [parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter for parameter in parameters]
    return torch.cat([parameter.flatten() for parameter in whole])


def facts_of(trainer):
    history = trainer.state.log_history
    return {
        "weights": weights_of(trainer.accelerator.unwrap_model(trainer.model)),
        "losses": [line["loss"] for line in history if "loss" in line],
        "epochs": [line["epoch"] for line in history if "loss" in line],
        "train_loss": history[-1]["train_loss"],
        "tokens": trainer.state.num_input_tokens_seen,
        "counts": getattr(trainer.train_dataset.rows, "report", None),
    }


class SaveBefore(TrainerCallback):
    """Checkpoints after the given steps alone."""

    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step in self.steps


def run_and_resume(kind, data, folder, workers, **settings):
    """
    Facts of an unbroken run and of those that go on behind its checkpoints from new weights, by (step, workers).

    All checkpoints are the run's without workers.
    """
    found, run = {}, Path(folder) / "run"
    for step, number in itertools.product((None, *BREAKS[data]), workers):
        trainer = build(kind, data, run, init=1 if step else 0, dataloader_num_workers=number, **settings)
        if not found:
            trainer.add_callback(SaveBefore(BREAKS[data]))
        trainer.train(resume_from_checkpoint=str(run / f"checkpoint-{step}") if step else None)
        found[step, number] = facts_of(trainer)
    trainer.accelerator.wait_for_everyone()
    if trainer.args.process_index == 0:
        shutil.rmtree(run)
    return found


def cases(accumulations=(1, 3), streams=(False, True), data=DATA, kinds=KINDS):
    return list(itertools.product(accumulations, streams, data, kinds))


def run_cases(folder, ranks, which, workers=(0, 2)):
    """The facts of each case, by case."""
    found = {}
    for case in which:
        accumulation, streaming, data, kind = case
        settings = {"streaming": streaming, "ranks": ranks, "accumulation": accumulation}
        found[case] = run_and_resume(kind, data, folder, workers, **settings)
    return found


def plain_run(kind, data, folder, streaming, **settings):
    """Weights and losses of a plain loop: a step's rows, by the definition of the order, are one batch."""
    trainer, rows = build(kind, data, folder, **settings), make_rows(data)
    model, collate = trainer.model.train(), trainer.data_collator
    trainer.state.max_steps = STEPS
    passes = []
    for epoch in range(STEPS):
        order = list(range(len(rows)))
        if not streaming:
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed((42 << 20) + epoch)).tolist()
        keyed = [{**rows[place], "rank": rank, "epoch": epoch} for rank, place in enumerate(order)]
        passes += [keyed[at : at + ROWS_PER_STEP] for at in range(0, len(keyed), ROWS_PER_STEP)]
    losses = []
    for step in passes[:STEPS]:
        batch = collate(step)
        loss, _ = trainer.micro_batch_loss(model, batch, (batch["labels"] != -100).sum())
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= SETTINGS["learning_rate"] * parameter.grad
        losses.append(loss.item())
        trainer.state.global_step += 1
    return weights_of(model), losses


def shards(folder):
    """FSDP2 with one row a rank and micro-batch, of which some fit into one block and some don't."""
    allow_shards_without_a_gpu()
    found = {}
    for data in ("sft", "partial"):
        trainer = build("block", data, folder, ranks=2, accumulation=3, block_length=8)
        trainer.train()
        assert trainer.is_fsdp_enabled and hasattr(next(trainer.model.parameters()), "full_tensor")
        found[data] = facts_of(trainer)
    return found


def ranks(folder):
    """All cases, and a run that one process began."""
    found = run_cases(folder, 2, cases())
    trainer = build("causal", "sft", folder, ranks=2, init=1)
    trainer.train(resume_from_checkpoint=f"{folder}/one/checkpoint-3")
    return {**found, "resumed": facts_of(trainer)}


if __name__ == "__main__":  # a rank; of shards, torch's own caches keep gloo's threads
    with own_process_group() if sys.argv[1] == "shards" else rank():
        results = {"ranks": ranks, "shards": shards}[sys.argv[1]](sys.argv[2])
    if os.environ["RANK"] == "0":
        torch.save(results, Path(sys.argv[2]) / "results.pt")
