"""One run of `benchmark.py train`, in a process of its own: a trainer with some gains, or the plain loop.

The plain loop is what Nano-LLaDA's training scripts do: float32, one document a row, padded or cut to `max_length`,
the logits of all positions, AdamW as torch builds it, nothing compiled. All else runs through the package's own
trainers: `Trainer.train` with the trainer's loss, its optimizer and its data loader.
"""

import tempfile
import time
from functools import partial
from pathlib import Path

from nanollada.scripts.benchmarks.machine import device_name, peak_memory, synchronize

GAINS = {
    "packing": "rows are full of documents instead of padded",
    "head": "only targets go through the LM head, in chunks, instead of all positions",
    "dtype": "bf16 autocast instead of fp32",
    "compile": "torch.compile instead of eager",
    "fused": "fused AdamW instead of torch's default",
}
# None is the plain loop. "trainer" is our trainer without any gain: what the plain loop's own loop is worth.
CONFIGURATIONS = {
    "plain": None,
    "trainer": [],
    **{gain: [gain] for gain in GAINS},
    "all": list(GAINS),
    **{f"all but {gain}": [other for other in GAINS if other != gain] for gain in ("packing", "compile")},
}
SIZES = {
    "32m": {},  # the config's defaults
    "4m": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 3},
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
}
LEARNING_RATE, BETAS, WEIGHT_DECAY, MAX_GRAD_NORM = 3e-4, (0.9, 0.95), 0.1, 1.0


def measure(
    folder: str,
    objective: str,
    configuration: str,
    *,
    size: str = "32m",
    max_length: int = 256,
    block_length: int = 32,
    batch_size: int = 8,
    steps: int = 5,
    warmup_steps: int = 2,
    threads: int | None = None,
    dataloader_num_workers: int = 0,
    attn_implementation: str | None = None,
    seed: int = 0,
    profile: bool = False,
) -> dict:
    """
    Trains for `warmup_steps + steps` optimizer steps and times the last `steps`.

    Args:
        folder (`str`): Holds `rows.pt` ([`make_rows`]) and the tokenizer.
        objective (`str`), configuration (`str`): See `OBJECTIVES` and `CONFIGURATIONS`.

    Returns:
        `dict`: of the timed `steps` their `seconds`, `tokens` (no padding), `slots` (with padding) and `supervised`
            (positions with a loss); `first_step_seconds`; `loss`, the mean of all steps; `peak_bytes`, and
            `base_bytes` before the model was built; with `profile`, its table.
    """
    import torch

    device = device_name()
    if threads:
        torch.set_num_threads(threads)
    gains = CONFIGURATIONS[configuration]
    rows = torch.load(Path(folder) / "rows.pt")["packed" if "packing" in (gains or []) else "unpacked"]
    base = peak_memory(device)
    with tempfile.TemporaryDirectory() as output:
        settings = {"output_dir": output, "max_steps": warmup_steps + steps, "per_device_train_batch_size": batch_size}
        settings |= {"seed": seed, "dataloader_num_workers": dataloader_num_workers}
        attention = attn_implementation if "compile" in (gains or []) else None
        shape = SIZES[size] | ({"attn_implementation": attention} if attention else {})
        trainer = build_trainer(folder, objective, gains or [], rows, shape, max_length, block_length, settings)
        window = trainer.window = Window(device, warmup_steps, steps, profile)
        loss = plain_loop(trainer) if gains is None else trainer.train().training_loss
    return {"loss": loss, "steps": steps, "peak_bytes": peak_memory(device), "base_bytes": base, **window.facts()}


def build_trainer(folder, objective, gains, rows, shape, max_length, block_length, settings):
    """The package's trainer for an objective, with the gains that are given and without the others."""
    import torch
    from transformers import AutoTokenizer

    from nanollada.trainers.data.collator import Collator
    from nanollada.trainers.models import config_for
    from nanollada.trainers.registry import TRAINERS

    causal = objective == "ar"
    entry = TRAINERS["ar" if causal else "diffusion"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(settings["seed"])
    model = entry.model_class(config_for(tokenizer, **shape))
    args = entry.config_class(
        learning_rate=LEARNING_RATE,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_GRAD_NORM,
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim="adamw_torch_fused" if "fused" in gains else "adamw_torch",
        bf16="dtype" in gains,
        torch_compile="compile" in gains,
        use_cpu=device_name() == "cpu",
        report_to="none",
        save_strategy="no",
        plot_loss=False,
        disable_tqdm=True,
        **({} if causal else {"block_length": block_length if objective == "block" else 0}),
        **settings,
    )
    packed = "packing" in gains
    collator = Collator(tokenizer.pad_token_id) if packed else full_width(max_length, tokenizer.pad_token_id)
    return measured(entry.trainer_class, "head" in gains)(model, args, collator, rows, processing_class=tokenizer)


def measured(trainer_class, chunked_head: bool):
    """`trainer_class`, watched; without the gain `head` its loss is taken from all logits."""
    from transformers import TrainerCallback

    class Measured(trainer_class):
        window = None

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback(Tick(self))

        def micro_batch_loss(self, model, inputs, num_items_in_batch):
            compute = super().micro_batch_loss if chunked_head else partial(full_logits_loss, self)
            loss, supervised = compute(model, inputs, num_items_in_batch)
            self.window.count(inputs, supervised)
            return loss, supervised

    class Tick(TrainerCallback):
        def __init__(self, trainer):
            self.trainer = trainer

        def on_step_end(self, *args, **kwargs):
            self.trainer.window.tick()

    return Measured


def full_logits_loss(trainer, model, inputs: dict, num_items_in_batch):
    """The trainer's loss with the logits of every position in memory, and how many positions it supervises."""
    import torch
    from torch.nn import functional as F

    from nanollada.trainers.scoring.likelihood import model_inputs

    context, labels = model_inputs(inputs), inputs["labels"]
    if not trainer.masks:
        logits = model(inputs["input_ids"], use_cache=False, **context).logits[:, :-1]
        labels, weights = labels[:, 1:], (labels[:, 1:] != -100).float()
    else:
        noise = trainer.corruption(inputs, context)
        logits = model(noise.noisy_input_ids, **trainer.block_inputs(inputs["input_ids"]), **context).logits
        labels, weights = noise.labels, noise.weights
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")  # [B * L]
    weights = torch.where(labels != -100, weights, 0).flatten()
    return (losses * weights).sum() / num_items_in_batch, (weights != 0).sum()


def plain_loop(trainer) -> float:
    """
    The loop of Nano-LLaDA's scripts, on the trainer's model, rows and noise; its losses' mean.

    Its hyper-parameters are the trainer's. Like theirs, its AdamW decays every tensor.
    """
    import torch

    args, model = trainer.args, trainer.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY)
    losses = []
    for inputs in trainer.get_train_dataloader():
        inputs.pop("share")  # whose rows these are: all are this process's
        inputs = {name: value.to(args.device) for name, value in inputs.items()}
        loss, supervised = full_logits_loss(trainer, model, inputs, (inputs["labels"] != -100).sum())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        trainer.window.count(inputs, supervised)
        trainer.window.tick()
    return torch.stack(losses).mean().item()


class Window:
    """
    Counts and times the steps after the warm-up.

    Args:
        device (`str`): "cpu" or "cuda"; a GPU is waited for where the window opens and closes, and nowhere between.
        warmup_steps (`int`), steps (`int`): Steps before the window, and in it.
        profile (`bool`, *optional*): Whether torch's profiler watches the window.
    """

    def __init__(self, device: str, warmup_steps: int, steps: int, profile: bool = False):
        from torch.profiler import profile as profiler

        self.device, self.opens, self.closes = device, warmup_steps, warmup_steps + steps
        self.profiler = profiler() if profile else None
        self.counts, self.ends, self.start = [], [], time.perf_counter()

    def count(self, inputs: dict, supervised) -> None:
        """One step's batch; the counts stay on the device until the end."""
        mask, slots = inputs.get("attention_mask"), inputs["input_ids"].numel()
        self.counts.append((slots if mask is None else mask.sum(), slots, supervised))

    def tick(self) -> None:
        """The end of a step."""
        done = len(self.ends) + 1
        if done in (1, self.opens, self.closes):
            synchronize(self.device)
        self.ends.append(time.perf_counter())
        if self.profiler is not None and done == self.opens:
            self.profiler.start()
        elif self.profiler is not None and done == self.closes:
            self.profiler.stop()

    def facts(self) -> dict:
        """See `measure`."""
        counts = zip(*self.counts[self.opens : self.closes], strict=True)
        timing = dict(
            zip(("tokens", "slots", "supervised"), (sum(map(int, column)) for column in counts), strict=True)
        )
        timing["seconds"] = self.ends[self.closes - 1] - self.ends[self.opens - 1]
        timing["first_step_seconds"] = self.ends[0] - self.start
        if self.profiler is not None:
            order = f"self_{self.device}_time_total"
            timing["profile"] = self.profiler.key_averages().table(sort_by=order, row_limit=25)
        return timing


def full_width(max_length: int, pad_token_id: int):
    """A collator that pads every batch to `max_length`, as the plain loop does."""
    from nanollada.trainers.data.collator import Collator
    from nanollada.trainers.data.packing import IGNORE

    class FullWidth(Collator):
        def __call__(self, rows):
            widest = {
                **rows[0],
                "input_ids": [pad_token_id] * max_length,
                "labels": [IGNORE] * max_length,
                "document_ids": [0] * max_length,
                "position_ids": list(range(max_length)),
            }
            return {name: value[:-1] for name, value in super().__call__([*rows, widest]).items()}

    return FullWidth(pad_token_id)
