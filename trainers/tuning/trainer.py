"""TRL's trainers as a whole run needs them: whole checkpoints, a stop at a signal, and a resumption like no break."""

import functools
import logging
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from nanollada.trainers.data.keyed import digest_of_columns
from nanollada.trainers.resuming.stepping import check_same_run
from nanollada.trainers.resuming.trainer import ResumingTrainer

logger = logging.getLogger(__name__)

ROLLOUTS = "rollouts_{}.pt"


class TuningRecord(TrainerCallback, ExportableState):
    """
    What TRL's trainers keep in memory between two steps, in `trainer_state.json`.

    Attributes:
        metrics (`dict[str, list]`): Numbers since the last log, which a log then averages.
        total_loss (`float`): The losses of the run up to the last log, summed.
        tokens (`int`): DPO's count of tokens.
        micro_batch (`int`): GRPO's count of micro-batches, which says when it samples anew.
        run (`dict`): What decides the rows of a step, as in [`~trainers.resuming.stepping.StepRecord`].
    """

    def __init__(self, trainer):
        self._trainer = trainer

    def state(self) -> dict:
        trainer = self._trainer
        attributes = {
            "metrics": {name: list(values) for name, values in trainer._metrics["train"].items()},
            "total_loss": getattr(trainer, "_total_loss_scalar", 0.0),
            "tokens": trainer._total_train_tokens,
            "micro_batch": getattr(trainer, "_step", 0),
            "run": trainer.decides_rows,
        }
        return {"args": {}, "attributes": attributes}

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())["attributes"]
        if state.global_step:
            check_same_run(saved["run"], self._trainer.decides_rows, state.global_step)
            self._trainer.go_on_with(**{name: value for name, value in saved.items() if name != "run"})


class _Resumable(ResumingTrainer):
    """
    In front of a trainer of TRL's: our checkpoints, signals and divergence errors, and no model card and no telemetry
    of TRL's. What it computes is untouched.

    A checkpoint also holds what TRL forgets: the numbers since the last log and, where a batch of rollouts is used by
    more than one optimizer step, the rollouts themselves. A resumed run then goes on like an unbroken one.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.args.logging_nan_inf_filter = False  # a loss that is not finite ends the run, and is not hidden
        self.add_callback(TuningRecord(self))

    @property
    def tokens_seen(self) -> int:
        return max(super().tokens_seen, int(self._total_train_tokens))

    @property
    def uses_of_a_row(self) -> int:
        """How often a row takes part in a pass: GRPO samples a group of answers, and may train on it repeatedly."""
        return getattr(self, "num_generations", 1) * getattr(self, "num_iterations", 1)

    @functools.cached_property
    def decides_rows(self) -> dict:
        """What decides the rows of a step; a run that goes on must have the same."""
        args = self.args
        return {
            "rows_per_step": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "seed": args.seed,
            "rows": len(self.train_dataset),
            "drop_last": args.dataloader_drop_last,
            "content": digest_of_columns(self.train_dataset),
        }

    def log(self, logs, *args, **kwargs):
        """`train_loss` is the mean over the run's steps, also those before a resumption."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, *args, **kwargs)

    def create_model_card(self, *args, **kwargs):
        """`hub_upload` writes the card, of the run's own record."""

    def _send_telemetry(self):
        """A run says nothing about itself to anybody."""

    def _calculate_rewards(self, *args, **kwargs):
        """GRPO's, `[B, functions]` of all ranks; where nothing is rewarded TRL goes on, and learns nothing."""
        rewards = super()._calculate_rewards(*args, **kwargs)
        if rewards.isnan().all():
            raise ValueError(
                f"`reward_funcs` must reward some answer of each step, got None for all {len(rewards)} of step "
                f"{self.state.global_step + 1}"
            )
        return rewards

    def choose_decoding(self) -> dict:
        """The model decodes as its checkpoint did."""
        return {"generation_config": {}}

    def final_evaluation(self, rows) -> dict:
        """
        Scores what `save_model` will save.

        Returns:
            `dict`: For `run.json`: `metrics` of the held-out rows, `None` without any; `evaluation`, a likelihood, is
                none of this objective's.
        """
        metrics = None
        if rows is not None:
            last = self.state.log_history[-1:] if not self.args.load_best_model_at_end else []
            last += self.state.log_history[-2:-1]  # the summary of the run stands behind it
            known = [entry for entry in last if entry["step"] == self.state.global_step and "eval_loss" in entry]
            metrics = known[0] if known else self.evaluate()
            metrics = {name: value for name, value in metrics.items() if name.startswith("eval_")}
        return {"evaluation": None, "metrics": metrics}

    # ---- what a resumption needs

    def go_on_with(self, metrics: dict, total_loss: float, tokens: int, micro_batch: int) -> None:
        """Takes up what a checkpoint kept."""
        self._total_loss_scalar = total_loss
        self._metrics["train"].update({name: list(values) for name, values in metrics.items()})
        self._total_train_tokens = tokens
        if hasattr(self, "_step"):
            self._step = micro_batch

    @property
    def _between_rollouts(self) -> bool:
        """Whether the next micro-batch is of rollouts that are there already."""
        if getattr(self, "_buffered_inputs", None) is None:
            return False
        return self._step % (self.args.steps_per_generation * self.num_iterations) != 0

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        if self._between_rollouts:
            path = Path(output_dir) / ROLLOUTS.format(self.args.process_index)
            torch.save(self._buffered_inputs, path)

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        path = Path(checkpoint or "") / ROLLOUTS.format(self.args.process_index)
        if checkpoint is not None and path.is_file():
            self._buffered_inputs = torch.load(path, map_location=self.args.device, weights_only=True)


@functools.cache
def resumable(trainer_class: type) -> type:
    """
    A trainer of TRL's, or a subclass of one, for a whole run.

    Args:
        trainer_class (`type`): [`~trl.DPOTrainer`], [`~trl.GRPOTrainer`] or a subclass.

    Returns:
        `type`: A subclass of the same name.
    """
    return type(trainer_class.__name__, (_Resumable, trainer_class), {"__doc__": _Resumable.__doc__})
