"""A run's log as short lines and, on a terminal, a progress bar."""

import sys
import time

from transformers import PrinterCallback, ProgressCallback

from nanollada.trainers.console.overview import clock, say

# Of a log entry: how it is shown, in this order. `metrics.jsonl` and `trainer_state.json` hold the numbers themselves.
SHOWN = {
    "loss": "loss {:.4g}",
    "learning_rate": "lr {:.3g}",
    "grad_norm": "grad {:.3g}",
    "masked_rate": "masked {:.0%}",
    "replaced_rate": "replaced {:.0%}",
    "edit_loss": "edits {:.4g} nats",
    "edit_accuracy": "right {:.0%}",
    "target_tokens_per_second": "{:,.0f} tokens/s",
    "train_loss": "mean loss {:.4g}",
    "reward": "reward {:.3g}",
    "rewards/accuracies": "right order {:.0%}",
    "rewards/margins": "margin {:.3g}",
    "score/variance": "variance {:.2g}",
    "eval_loss": "held out {:.4g} nats/token",
    "eval_reward": "held-out reward {:.3g}",
    "eval_rewards/accuracies": "right order {:.0%}",
    "eval_rewards/margins": "margin {:.3g}",
    "eval_bits_per_byte": "{:.4g} bits/byte",
    "eval_bits_per_byte_standard_error": "± {:.2g}",
}
# Known, and in the blocks before and behind training or in the line already.
# TRL's many others, with a slash or here, are in the file.
LEFT_OUT = {"epoch", "step", "num_input_tokens_seen", "total_flos", "eval_tokens", "eval_bytes"}
LEFT_OUT |= {f"{side}{name}" for side in ("", "eval_") for name in ("entropy", "num_tokens", "mean_token_accuracy")}
LEFT_OUT |= {f"{side}{name}" for side in ("", "eval_") for name in ("reward_std", "frac_reward_zero_std", "step_time")}
LEFT_OUT |= {f"eval_{name}" for name in ("runtime", "samples_per_second", "steps_per_second")}
LEFT_OUT |= {f"train_{name}" for name in ("runtime", "tokens_per_second", "samples_per_second", "steps_per_second")}


def line_of(logs: dict, step: int, steps: int, left: float | None) -> str:
    """
    A log entry in a line: the step, what is shown of it, whatever else it holds, and the time left.

    Args:
        logs (`dict`): The entry; a number that was not finite is `None` and is named so.
        left (`float`, *optional*): Seconds.
    """
    parts, preference = [f"step {step:>{len(str(steps))}}/{steps}"], "eval_rewards/accuracies" in logs
    for name, form in SHOWN.items():
        form = "held out {:.4g}" if name == "eval_loss" and (preference or "eval_reward" in logs) else form
        if name in logs and (logs[name] or not name.endswith("error")):
            parts.append(f"{name}: not finite" if logs[name] is None else form.format(logs[name]))
    for name in (name for name in logs if name not in SHOWN and name not in LEFT_OUT and "/" not in name):
        parts.append(f"{name} {logs[name]:.4g}" if isinstance(logs[name], float) else f"{name} {logs[name]}")
    if left is not None:
        parts.append(f"{clock(left)} left")
    return "  ".join(parts)


class LinesCallback(ProgressCallback):
    """
    Shows each log entry as a line on stdout, in place of transformers' `ProgressCallback` and `PrinterCallback`.

    The bar is drawn where stderr is a terminal, unless `disable_tqdm` is set: a file gets lines alone.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        self._started, self._first = time.perf_counter(), state.global_step
        if not args.disable_tqdm and sys.stderr.isatty():
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args, state, control, **kwargs):
        if not args.disable_tqdm and sys.stderr.isatty():
            super().on_prediction_step(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and not logs.keys() <= LEFT_OUT:
            left = self._left(state) if "loss" in logs else None
            say(args, line_of(logs, state.global_step, state.max_steps, left))

    def on_train_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    def _left(self, state) -> float:
        """Seconds to the last step, at the pace so far, evaluations included."""
        pace = (time.perf_counter() - self._started) / max(state.global_step - self._first, 1)
        return pace * (state.max_steps - state.global_step)


def show_lines(trainer) -> None:
    """Puts [`LinesCallback`] in the place of transformers' own; a notebook keeps its table, and callers theirs."""
    shown = [own for own in trainer.callback_handler.callbacks if type(own) in (ProgressCallback, PrinterCallback)]
    for callback in shown:
        trainer.remove_callback(callback)
        trainer.add_callback(LinesCallback())
