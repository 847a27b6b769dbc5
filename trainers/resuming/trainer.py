"""A `Trainer` that saves whole checkpoints, goes on from them like an unbroken run, and stops where it diverges."""

import contextlib
import json
import logging
import math
from pathlib import Path

import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import has_length

from nanollada.modeling_nanollada.loading_nanollada import without_bars
from nanollada.trainers.resuming.checkpoints import (
    MANIFEST,
    STATE,
    checkpoints_of,
    fault_of,
    rotate_checkpoints,
    write_manifest,
)
from nanollada.trainers.resuming.stopping import Interrupted, StopSignals

logger = logging.getLogger(__name__)


class EarlyStopping(EarlyStoppingCallback):
    """transformers' early stopping, whose count of bad evaluations goes on after a resumption."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.early_stopping_patience_counter = bad_evaluations(state.stateful_callbacks)
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())

    @property
    def reached(self) -> bool:
        """Whether the run is over."""
        return self.early_stopping_patience_counter >= self.early_stopping_patience


def bad_evaluations(stateful_callbacks: dict) -> int:
    """The evaluations without improvement in a row, as a checkpoint's `trainer_state.json` counts them."""
    saved = stateful_callbacks.get("EarlyStopping") or stateful_callbacks.get("EarlyStoppingCallback") or {}
    return saved.get("attributes", {}).get("early_stopping_patience_counter", 0)


class LossWindow(TrainerCallback, ExportableState):
    """
    The losses since the last log, in `trainer_state.json`: a checkpoint may lie between two logs.

    Attributes:
        loss (`float`): Their sum, the mean over ranks.
        logged (`int`): The step of the last log.
    """

    def __init__(self, trainer=None):
        self._trainer, self.loss, self.logged = trainer, 0.0, 0

    def state(self) -> dict:
        return {"args": {}, "attributes": {"loss": self.loss, "logged": self.logged}}

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())["attributes"]
        if state.global_step and saved["logged"] <= state.global_step:
            self._trainer.set_loss_window(saved["loss"], saved["logged"])


class ResumingTrainer(Trainer):
    """
    Trainer whose checkpoints end with a manifest, see `checkpoints`.

    A run that goes on from its last step, or from the evaluation that early stopping ended it with, trains no further
    step and writes its last files. A loss, a gradient norm or weights that aren't finite end the run on all ranks
    before anything of them is saved. SIGINT (Ctrl-C) and SIGTERM, on any rank, end it behind a checkpoint of the step.

    Raises:
        `FloatingPointError`: in `train`, naming the step, what is not finite, and the newest whole checkpoint.
        [`Interrupted`]: in `train`, a `KeyboardInterrupt` that names the checkpoint.
        `ValueError`: if the best model's checkpoint is gone or damaged.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._stop_signals, self._saved = StopSignals(), None
        self.add_callback(LossWindow(self))
        if getattr(self.args, "early_stopping_patience", 0):  # TRL's configs have none
            self.add_callback(EarlyStopping(self.args.early_stopping_patience, self.args.early_stopping_min_delta))

    @property
    def plain_model(self) -> torch.nn.Module:
        """The model without the wrappers of ranks and compilation."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def tokens_seen(self) -> int:
        """The tokens of the run so far."""
        return int(self.state.num_input_tokens_seen)

    def planned_steps(self) -> int:
        """The optimizer steps of the whole run, from `max_steps` or `num_train_epochs`."""
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    @property
    def is_over(self) -> bool:
        """Whether the last step is done, or early stopping has ended the run."""
        stopping = [callback for callback in self.callback_handler.callbacks if isinstance(callback, EarlyStopping)]
        return self.state.global_step >= self.state.max_steps or any(callback.reached for callback in stopping)

    def _run_epoch(self, *args, **kwargs):
        """transformers would take a step before it asks whether the run was over when it was resumed."""
        if self.is_over:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)
        self._stop_if_asked()

    # ---- interruption

    def train(self, *args, **kwargs):
        """As transformers'; a signal ends it behind a checkpoint."""
        self._stop_signals = StopSignals(announce=self.is_world_process_zero())
        with self._stop_signals:
            return super().train(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.state.epoch % 1 or not has_length(self.train_dataset):  # else what a pass ends with is still to come
            self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        """All ranks together, if a signal came to one; `save_strategy` and `save_only_model` may have saved less."""
        asked = self._stop_signals.requested
        if self.args.world_size > 1:
            count = torch.tensor(float(asked), device=self.args.device)
            asked = self.accelerator.reduce(count, "sum").item() > 0
        if not asked:
            return
        step = self.state.global_step
        if self._saved != (step, len(self.state.log_history)) or self.args.save_only_model:
            self.args.save_only_model = False
            self._save_checkpoint(self.model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        self.callback_handler.on_train_end(self.args, self.state, self.control)  # closes bars and loggers
        folder = str(Path(self.args.output_dir) / f"checkpoint-{step}")
        raise Interrupted(f"interrupted after step {step}: {folder} is saved", folder)

    # ---- divergence

    def _get_grad_norm(self, *args, **kwargs):
        norm = super()._get_grad_norm(*args, **kwargs)
        scaler = getattr(self.accelerator, "scaler", None)
        skipped = scaler is not None and scaler.is_enabled() and scaler.get_scale() > 1  # float16: the next is smaller
        loss = self._tr_loss.detach()
        number = loss.new_zeros(()) if norm is None or skipped else torch.as_tensor(norm).detach().to(loss)
        facts = torch.stack([loss, getattr(number, "full_tensor", lambda: number)()]).float()
        bad = self.accelerator.reduce((~facts.isfinite()).float(), "sum").tolist()
        names = [f"{name} is not finite" for name, count in zip(("loss", "gradient norm"), bad, strict=True) if count]
        if names:
            raise self._diverged(self.state.global_step + 1, " and the ".join(names))
        return norm

    def _diverged(self, step: int, what: str) -> FloatingPointError:
        whole = next((path for path in checkpoints_of(self.args.output_dir) if fault_of(path) is None), None)
        kept = f"the last whole checkpoint is {whole}" if whole else "there is no checkpoint to go back to"
        return FloatingPointError(f"step {step} diverged: the {what}. Nothing of it was saved; {kept}")

    def check_weights(self) -> None:
        """
        Raises:
            `FloatingPointError`: on all ranks, if a weight of this or another rank is not finite.
        """
        odd = []
        for name, parameter in self.model.named_parameters():
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            if not local.isfinite().all():
                odd.append(name)
        count = torch.tensor(float(len(odd)), device=self.args.device)
        if self.accelerator.reduce(count, "sum").item():
            raise self._diverged(self.state.global_step, f"weights are not finite ({', '.join(odd[:3]) or 'a rank'})")

    def log(self, logs, *args, **kwargs):
        """Numbers that aren't finite are `None` in all records, so that they are JSON; a loss must be finite."""
        for name, value in list(logs.items()):
            if isinstance(value, float) and not math.isfinite(value):
                if name.endswith("loss"):
                    raise self._diverged(self.state.global_step, f"{name} is not finite")
                logs[name] = None
        super().log(logs, *args, **kwargs)

    # ---- checkpoints

    def _save_checkpoint(self, model, *args, **kwargs):
        """
        The manifest comes last, and older checkpoints go only after it.

        Without both, a kill in between would leave no checkpoint that is known to be whole.
        """
        self.check_weights()
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        self._note_loss_window()
        if self.args.should_save:
            self.begin_checkpoint(folder)
        with self._without_rotation() as limit:
            super()._save_checkpoint(model, *args, **kwargs)
        self.accelerator.wait_for_everyone()  # each rank writes its own generators
        if self.args.should_save:
            write_manifest(folder, self.state.global_step)
            rotate_checkpoints(folder, limit, self.state.best_model_checkpoint)
        self._saved = (self.state.global_step, len(self.state.log_history))

    def _save(self, *args, **kwargs):
        with without_bars():
            super()._save(*args, **kwargs)

    def begin_checkpoint(self, folder: Path) -> None:
        """The first process's part before anything else is written."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in (MANIFEST, STATE):  # of an earlier attempt at these steps
            (folder / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _without_rotation(self):
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield limit
        finally:
            self.args.save_total_limit = limit

    def _note_loss_window(self) -> None:
        window = next(callback for callback in self.callback_handler.callbacks if isinstance(callback, LossWindow))
        window.loss = self.accelerator.reduce(self._tr_loss.detach().clone(), "mean").item()
        window.logged = self._globalstep_last_logged

    def set_loss_window(self, loss: float, logged: int) -> None:
        """Goes on with the losses since the last log."""
        self._tr_loss.fill_(loss)
        self._globalstep_last_logged = logged

    def _load_from_checkpoint(self, resume_from_checkpoint, *args, **kwargs):
        """Also the block length that the checkpoint ended with: where no step follows, the last files name it."""
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        path = Path(resume_from_checkpoint) / "config.json"
        if path.is_file():  # none is an adapter's, which changes nothing of it
            self.model.config.block_length = json.loads(path.read_text(encoding="utf-8")).get("block_length")

    def _issue_warnings_after_load(self, load_result):
        """A tied head is not in the file, and so is not missing."""
        tied = self.model.all_tied_weights_keys
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _load_rng_state(self, checkpoint):
        own = "rng_state.pth" if self.args.world_size <= 1 else f"rng_state_{self.args.process_index}.pth"
        if checkpoint is not None and not (Path(checkpoint) / own).is_file():
            logger.warning("%s has no %s: another number of processes wrote it, so dropout differs", checkpoint, own)
        super()._load_rng_state(checkpoint)

    def _load_best_model(self):
        fault = fault_of(self.state.best_model_checkpoint, needed=("model.safetensors",))
        if fault:
            raise ValueError(
                "`load_best_model_at_end` needs the best model's checkpoint, got "
                f"{self.state.best_model_checkpoint}: {fault}"
            )
        super()._load_best_model()
