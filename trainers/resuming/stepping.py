"""A `Trainer` whose rows come by optimizer step: its data loader, its micro-batches, and what a checkpoint keeps."""

import logging
from dataclasses import asdict

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import AcceleratorConfig

from nanollada.trainers.data.collator import pad_batch
from nanollada.trainers.data.keyed import (
    Anchor,
    MicroBatches,
    PreparedSteps,
    StepCollator,
    StepShape,
    StreamedSteps,
    digest_of,
)
from nanollada.trainers.resuming.stopping import leave_signals_alone

logger = logging.getLogger(__name__)

DIVIDED_BY_ACCELERATE = ("split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler")


def check_data_path(args) -> None:
    """
    Raises:
        `ValueError`: for settings of training arguments that contradict rows by optimizer step.
    """
    default = AcceleratorConfig()
    for name in DIVIDED_BY_ACCELERATE:
        value = getattr(args.accelerator_config, name)
        if value != getattr(default, name):
            raise ValueError(
                f"`accelerator_config` must leave {name} at {getattr(default, name)}: the trainer divides the rows "
                f"among the ranks itself, got {value}"
            )
    if args.world_size > 1 and not args.average_tokens_across_devices:
        raise ValueError(
            "`average_tokens_across_devices` must be True: a step is normalised by the targets of all ranks, got False"
        )


class StepRecord(TrainerCallback, ExportableState):
    """
    What `trainer_state.json` keeps of the data path.

    Attributes:
        run (`dict`): What decides the rows of a step: `rows_per_step`, `seed`, `drop_last`, and of map-style rows
            `rows` (their number) and `content` (their digest).
        loss_sum (`float`), loss_steps (`int`): The losses of `loss_steps` steps, summed.
        anchor (`dict`, *optional*): Of a stream, where the pass of the next step begins.
        steps_per_pass (`int`, *optional*): Of a stream, the steps of its last whole pass.
        counts (`dict`, *optional*): Of a stream, what was read up to the last step.
    """

    def __init__(self):
        self.run, self.loss_sum, self.loss_steps = {}, 0.0, 0
        self.anchor, self.steps_per_pass, self.counts = None, None, None

    def state(self) -> dict:
        return {"args": {}, "attributes": dict(vars(self))}


class _StepCallback(TrainerCallback):
    """Tells the trainer of passes and steps."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.begin_steps(state)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.micro_batches.begin(state.global_step)

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.begin_step()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.end_step(args, state, control)


class SteppingTrainer(Trainer):
    """
    Trainer whose optimizer step s has the rows of (seed, s), see `keyed`.

    A stream counts its own passes: `epoch` is the number of whole passes and, as soon as one has shown how long it is,
    the share of the running one; `on_epoch_end` and `on_epoch_begin` are called between two passes. `train_loss` is
    the mean over all steps of the run and all ranks, those before a resumption included.

    Args:
        train_dataset: Rows with a length (map-style), or a stream of rows.

    Raises:
        `ValueError`: as `check_data_path`; and for a checkpoint of a run with other rows per step, other rows,
            another seed or another `dataloader_drop_last`.
    """

    def __init__(self, model, args, train_dataset, **kwargs):
        check_data_path(args)
        shape = StepShape(
            batch=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            rank=args.process_index,
            ranks=args.world_size,
            seed=args.seed,
            drop_last=args.dataloader_drop_last,
        )
        self.streaming = not hasattr(train_dataset, "__len__")
        steps = (StreamedSteps if self.streaming else PreparedSteps)(train_dataset, shape)
        self.micro_batches = MicroBatches(shape.accumulation, None if self.streaming else steps.per_pass)
        self._step_window, self._step_loss = None, 0.0
        callbacks = [StepRecord(), _StepCallback(self), *(kwargs.pop("callbacks", None) or [])]
        super().__init__(model=model, args=args, train_dataset=steps, callbacks=callbacks, **kwargs)

    @property
    def record(self) -> StepRecord:
        """What a checkpoint keeps of the data path."""
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, StepRecord))

    def get_train_dataloader(self) -> DataLoader:
        """The micro-batches of this rank. accelerate has no part in it: it would divide them once more."""
        args, workers = self.args, self.args.dataloader_num_workers
        if self.streaming and workers > 1:
            logger.warning("`dataloader_num_workers`: a stream has one reader, so one is started, not %d", workers)
            workers = 1
        return DataLoader(
            self.train_dataset,
            batch_sampler=self.micro_batches,
            collate_fn=StepCollator(self.data_collator),
            num_workers=workers,
            worker_init_fn=leave_signals_alone,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context if workers else None,
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """
        A step's micro-batches and its number of targets over all ranks.

        A micro-batch is as long on every rank as on the one with the longest row: what follows from the length
        (whether rows fit into one block) then follows alike, and all ranks run the same collectives.
        """
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        self._step_window = batches[0]["share"].window
        targets = sum((batch["labels"] != -100).sum() for batch in batches)
        if self.args.world_size > 1:
            facts = torch.tensor([[targets, *(batch["labels"].shape[1] for batch in batches)]], device=device)
            facts = self.accelerator.gather(facts)  # [ranks, 1 + micro-batches]
            targets = facts[:, 0].sum()
            lengths = facts[:, 1:].amax(0).tolist()
            batches = [pad_batch(*pair, self.pad_token_id) for pair in zip(batches, lengths, strict=True)]
        non_blocking = self.args.accelerator_config.non_blocking
        batches = [send_to_device(batch, device, non_blocking=non_blocking) for batch in batches]
        return batches, targets.to(device)

    def training_step(self, model, inputs, *args, **kwargs):
        """Leaves out a micro-batch without a row on any rank; one without a row on this rank counts as 0."""
        share = inputs.pop("share")
        if share.idle:
            return torch.zeros((), device=self.args.device)
        if not share.rows:  # attention needs something to see
            inputs = {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._step_loss = self._step_loss + loss
        return loss

    def begin_steps(self, state) -> None:
        """Begins at step 0, or goes on behind a checkpoint."""
        record, dataset = self.record, self.train_dataset
        saved = state.stateful_callbacks.setdefault("StepRecord", StepRecord().state())["attributes"]
        vars(record).update(vars(StepRecord()))
        record.run = {
            "rows_per_step": dataset.shape.rows,
            "seed": dataset.shape.seed,
            "rows": None if self.streaming else len(dataset),
            "drop_last": dataset.shape.drop_last,
            "content": None if self.streaming else digest_of(dataset.rows),
        }
        self._step_loss = 0.0
        if state.global_step and saved["run"]:
            check_same_run(saved["run"], record.run, state.global_step)
            vars(record).update(saved)
        if self.streaming:
            anchor = Anchor(**record.anchor) if record.anchor else dataset.beginning
            dataset.start(anchor)
        if record.counts is not None:  # where no step follows, nothing else says them
            dataset.rows.set_counts(record.counts)

    def begin_step(self) -> None:
        """Once before the first micro-batch of an optimizer step; `state.global_step` steps are done."""

    def end_step(self, args, state, control) -> None:
        """Counts a finished step in, and of a stream its pass."""
        record, window = self.record, self._step_window
        if window.step + 1 != state.global_step:
            raise RuntimeError(f"step {state.global_step} must have its own rows, got those of {window.step + 1}")
        loss = torch.as_tensor(self._step_loss, device=args.device)
        record.loss_sum += self.accelerator.reduce(loss, "mean").item()
        record.loss_steps += 1
        self._step_loss = 0.0
        if not self.streaming:
            return
        record.anchor = asdict(window.anchor)
        record.counts = window.counts
        if window.counts is not None:
            self.train_dataset.rows.set_counts(window.counts)
        if window.last:
            record.steps_per_pass = window.number + 1
        known = record.steps_per_pass is not None
        state.epoch = window.epoch + (min(1.0, (window.number + 1) / record.steps_per_pass) if known else 0.0)
        if window.last and state.global_step < state.max_steps:
            self.callback_handler.on_epoch_end(args, state, control)
            self.callback_handler.on_epoch_begin(args, state, control)

    def log(self, logs, *args, **kwargs):
        """`train_loss` is the mean over the run's steps and over ranks."""
        if "train_loss" in logs and self.record.loss_steps:
            logs["train_loss"] = self.record.loss_sum / self.record.loss_steps
        super().log(logs, *args, **kwargs)

    def train(self, *args, **kwargs):
        """As transformers'; `training_loss` is the logged `train_loss`."""
        output = super().train(*args, **kwargs)
        return output._replace(training_loss=output.metrics["train_loss"])


def check_same_run(saved: dict, now: dict, step: int) -> None:
    """
    Checks that a run goes on with the rows that its checkpoint had.

    Args:
        saved, now (`dict`): What decides the rows of a step, see [`StepRecord`]: of the checkpoint, and now.
        step (`int`): Of the checkpoint.

    Raises:
        `ValueError`: naming what is another.
    """
    names = {
        "rows_per_step": "the run's rows per step (`per_device_train_batch_size` · `gradient_accumulation_steps` · "
        "processes)",
        "seed": "the run's `seed`",
        "rows": "the run's number of rows",
        "drop_last": "the run's `dataloader_drop_last`",
        "content": "the run's rows, in their order (SHA-256)",
    }
    for name, words in names.items():
        if saved.get(name, now[name]) != now[name]:  # older checkpoints don't know all
            raise ValueError(
                f"`resume_from_checkpoint` needs {words}, or rows would be repeated and left out: checkpoint-{step} "
                f"has {saved[name]}, got {now[name]}"
            )
