"""A trainer of averages: the exponential moving average of its weights, and the mean of its best states."""

import logging
import math
import os
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from nanollada.trainers.resuming.trainer import ResumingTrainer
from nanollada.trainers.weights.merging import MergeCandidates, save_whole_tensors

logger = logging.getLogger(__name__)

EMA_FILE = "ema.safetensors"
MERGE_FOLDER = "merge"


class ExponentialMovingAverage:
    """
    The exponential moving average of what is trained: `average ← decay · average + (1 − decay) · weights`.

    It begins at the weights it is made from, without bias correction: after n updates these still count `decay**n`, so
    that 1 / (1 − decay) should be well below the number of steps. Tied weights are averaged once; buffers (constants
    in nanollada's models) are not averaged.

    Args:
        model (`torch.nn.Module`): Where the average begins.
        decay (`float`): In [0, 1); 0 is the weights themselves.

    Attributes:
        weights (`dict[str, torch.Tensor]`): The average by parameter name, in float32 or the model's wider dtype.
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        self._update = get_ema_multi_avg_fn(decay)
        self.weights = {
            name: parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
            for name, parameter in trained(model).items()
        }

    @torch.no_grad()
    def update(self, model: torch.nn.Module):
        """Counts the model's present weights in."""
        pairs = [(self.weights[name], parameter) for name, parameter in trained(model).items()]
        averages = [average for average, _ in pairs]
        self._update(averages, [parameter.to(average.dtype) for average, parameter in pairs], None)

    @contextmanager
    def in_place_of(self, model: torch.nn.Module):
        """
        The model computes with the average inside, with its own weights, bit for bit, afterwards.

        Values are copied into the parameters, whose identity and address optimizer, DDP and compiled code rely on.
        """
        own = {name: parameter.detach().clone() for name, parameter in trained(model).items()}
        try:
            copy_weights(model, self.weights)
            yield
        finally:
            copy_weights(model, own)

    def save(self, folder: str | os.PathLike):
        """Writes `ema.safetensors`; the file appears only when it is complete."""
        save_whole_tensors(self.weights, Path(folder) / EMA_FILE)

    def load(self, folder: str | os.PathLike):
        """
        Goes on from the average in a checkpoint.

        Raises:
            `ValueError`: if it has no `ema.safetensors`, and if that holds other tensors than this average.
        """
        path = Path(folder) / EMA_FILE
        if not path.is_file():
            raise ValueError(f"`ema_decay` needs the average in the checkpoint, got no {EMA_FILE} in {path.parent}")
        found = load_file(path)
        layout, expected = _layout(found), _layout(self.weights)
        if layout != expected:
            odd = sorted(name for name in layout | expected if layout.get(name) != expected.get(name))
            raise ValueError(f"{path} must hold the average of this model's parameters, got a difference in {odd[0]}")
        for name, average in self.weights.items():
            average.copy_(found[name])


class _AveragingCallback(TrainerCallback):
    """Tells the trainer of steps and checkpoints."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.start_averaging(state)

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer.ema is not None and not self.trainer.accelerator.optimizer_step_was_skipped:
            self.trainer.ema.update(self.trainer.plain_model)

    def on_save(self, args, state, control, **kwargs):
        if self.trainer.candidates is not None:
            self.trainer.candidates.saved(state.global_step)


class AveragingTrainer(ResumingTrainer):
    """
    Trainer with `args.ema_decay` and `args.merge_top_k`.

    With an average, whatever leaves the training uses it: evaluation, `save_model`, the states to merge and, with
    `load_best_model_at_end`, the best model, whose average comes back with its weights. Training itself, and
    `model.safetensors` in a `checkpoint-N`, keep the raw weights; their average lies beside them in `ema.safetensors`.

    Raises:
        `ValueError`: for FSDP and DeepSpeed with either, and for resuming from a checkpoint that lacks the average, or
            has one that `ema_decay` of 0 would drop.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.ema, self.candidates = None, None
        if not self.args.ema_decay and not self.args.merge_top_k:
            return
        sharded = {"FSDP": self.is_fsdp_enabled, "DeepSpeed": self.is_deepspeed_enabled}
        for name in (name for name, enabled in sharded.items() if enabled):
            raise ValueError(f"`ema_decay` and `merge_top_k` need whole weights on every rank, got {name}")
        if self.args.merge_top_k:
            folder = Path(self.args.output_dir) / MERGE_FOLDER
            self.candidates = MergeCandidates(folder, self.args.merge_top_k, self.args.process_index == 0)
        self.add_callback(_AveragingCallback(self))

    def averaged_weights(self):
        """Context in which the model computes with the average, if there is one."""
        return nullcontext() if self.ema is None else self.ema.in_place_of(self.plain_model)

    def start_averaging(self, state):
        """Begins both averages, or goes on with them, before the first step."""
        if state.global_step == 0 and self.args.ema_decay:
            self.ema = ExponentialMovingAverage(self.plain_model, self.args.ema_decay)
        if self.candidates is not None:
            check_evaluations(self.args, state.max_steps, state.num_train_epochs)
            self.candidates.start(state.global_step)

    def offer_for_merge(self, loss: float):
        """A candidate for the merge: the weights that were just evaluated in training."""
        if self.candidates is None or not self.control.should_evaluate:  # also called by hand, and before training
            return
        with self.averaged_weights():
            self.candidates.add(self.state.global_step, loss, trained(self.plain_model))

    def final_evaluation(self, rows) -> dict:
        """
        Scores what `save_model` will save; with `merge_top_k` that is the merge, which the model then holds.

        Args:
            rows (`Sequence[dict]`, *optional*): Held-out rows; needed for a merge.

        Returns:
            `dict`: For `run.json`: `evaluation` and, with `merge_top_k`, `merge` with `k` (states that were merged),
                their `steps` and `eval_losses`, and `evaluation_last`, of the weights at the end of training.
        """
        evaluation = self.likelihood(rows).to_dict() if rows is not None else None
        if self.candidates is None:
            return {"evaluation": evaluation}
        steps = self.candidates.best()
        losses = [self.candidates.losses[step] for step in steps]
        merge = {"k": len(steps), "steps": steps, "eval_losses": losses, "evaluation_last": evaluation}
        if len(steps) < self.candidates.k:
            logger.warning("`merge_top_k` of %d found only %d evaluated states", self.candidates.k, len(steps))
        if not steps:
            return {"evaluation": evaluation, "merge": merge}
        self._load_merge()
        return {"evaluation": self.likelihood(rows).to_dict(), "merge": merge}

    def _load_merge(self):
        """The first rank has the files; the others get the weights from it."""
        self.ema = None
        if self.candidates.writes:
            copy_weights(self.plain_model, self.candidates.mean())
        if self.args.world_size > 1:
            for parameter in self.plain_model.parameters():
                torch.distributed.broadcast(parameter.data, 0)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """Saves the weights that evaluation sees; the checkpoints of a run hold the raw ones."""
        checkpoint = _internal_call and output_dir is not None
        with nullcontext() if checkpoint else self.averaged_weights():
            super().save_model(output_dir, _internal_call)

    def begin_checkpoint(self, folder: Path):
        """The average comes first; the manifest, which makes the checkpoint complete, last."""
        super().begin_checkpoint(folder)
        if self.ema is not None:
            self.ema.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint, *args, **kwargs):
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        if self.args.ema_decay:
            self.ema = ExponentialMovingAverage(self.plain_model, self.args.ema_decay)
            self.ema.load(resume_from_checkpoint)
        elif (Path(resume_from_checkpoint) / EMA_FILE).is_file():
            raise ValueError(f"`ema_decay` must be > 0 to resume from a checkpoint with {EMA_FILE}, got 0")

    def _load_best_model(self):
        super()._load_best_model()
        if self.ema is not None:
            self.ema.load(self.state.best_model_checkpoint)


def check_averaging(args) -> None:
    """
    Checks `ema_decay` and `merge_top_k` of training arguments.

    Raises:
        `ValueError`: for values out of range; for a merge without evaluation, beside `load_best_model_at_end`, or of
            more states than the run evaluates, where the arguments alone say so.
    """
    if not 0 <= args.ema_decay < 1:
        raise ValueError(f"`ema_decay` must lie in [0, 1), got {args.ema_decay}")
    if args.merge_top_k < 0:
        raise ValueError(f"`merge_top_k` must be >= 0, got {args.merge_top_k}")
    if not args.merge_top_k:
        return
    if args.eval_strategy == IntervalStrategy.NO:
        raise ValueError(f"`merge_top_k` needs `eval_strategy` steps or epoch, got {args.merge_top_k} and no")
    if args.load_best_model_at_end:
        raise ValueError(
            "`merge_top_k` and `load_best_model_at_end` both choose the weights that are saved: give one, "
            f"got {args.merge_top_k} and True"
        )
    check_evaluations(args, args.max_steps, math.ceil(args.num_train_epochs) if args.max_steps <= 0 else math.inf)


def check_evaluations(args, max_steps: int, epochs: float) -> None:
    """
    Compares `merge_top_k` with the number of evaluations in a run of `max_steps` steps (≤ 0: unknown) and `epochs`.

    Raises:
        `ValueError`: if there are certainly fewer.
    """
    if args.eval_strategy == IntervalStrategy.EPOCH:
        evaluations = epochs - max(0, math.ceil(args.eval_delay) - 1)
    elif max_steps > 0:
        every = args.eval_steps if args.eval_steps >= 1 else math.ceil(max_steps * args.eval_steps)
        evaluations = math.ceil(max_steps / every) - max(0, math.ceil(args.eval_delay / every) - 1)  # also at the end
    else:
        return
    if evaluations < args.merge_top_k:
        raise ValueError(
            f"`merge_top_k` must be at most the number of evaluations, {max(0, evaluations)} in this run, "
            f"got {args.merge_top_k}"
        )


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that training changes, by name: of an adapted model its adapter's."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def copy_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Copies values into all trained parameters, rounding them to the parameters' dtype."""
    for name, parameter in trained(model).items():
        parameter.copy_(weights[name])


def _layout(weights: dict[str, torch.Tensor]) -> dict[str, tuple]:
    return {name: (weight.shape, weight.dtype) for name, weight in weights.items()}
