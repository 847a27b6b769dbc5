"""What a run leaves behind while it goes: `metrics.jsonl` and the loss curve."""

import json
import os
from pathlib import Path

from transformers import TrainerCallback
from transformers.utils import is_matplotlib_available

from nanollada.trainers.records import strict_json, write_whole

METRICS = "metrics.jsonl"
LOSS = ("loss", "nats per token")


class MetricsCallback(TrainerCallback):
    """
    Appends every log to `metrics.jsonl`, a line each, and draws `loss.png` at every save and at the end.

    A resumed run keeps the lines that its checkpoint knows (and writes those that are gone anew), so that a killed and
    resumed run reads like an unbroken one. A number that is not finite is `null`.

    Args:
        plot_loss (`bool`, *optional*): Whether to draw, with matplotlib (the extra `plots`). Defaults to whether that
            is installed.
        curve (`tuple[str, str]`, *optional*): The number that is drawn, which names the file, and its axis.

    Raises:
        `ValueError`: if `plot_loss` is set and matplotlib is missing.
    """

    def __init__(self, plot_loss: bool | None = None, curve: tuple[str, str] = LOSS):
        if plot_loss and not is_matplotlib_available():
            raise ValueError("`plot_loss` needs matplotlib (pip install 'nanollada[plots]'), got True without it")
        self.plot_loss = is_matplotlib_available() if plot_loss is None else plot_loss
        self.curve = curve

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir) / METRICS
        known = [{"step": entry["step"], **entry} for entry in state.log_history] if state.global_step else []
        lines = read_metrics(args.output_dir)[: len(known)] if known else []
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = lines if lines == known else known  # equal as JSON; the file's have the order they were logged in
        write_whole(path, "".join(strict_json(line) + "\n" for line in kept))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            with open(Path(args.output_dir) / METRICS, "a") as file:
                file.write(strict_json({"step": state.global_step, **logs}) + "\n")

    def on_save(self, args, state, control, **kwargs):
        self._draw(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        self._draw(args, state)

    def _draw(self, args, state):
        if self.plot_loss and state.is_world_process_zero:
            path = Path(args.output_dir) / f"{self.curve[0]}.png"
            draw_loss(read_metrics(args.output_dir), path, curve=self.curve)


def read_metrics(folder: str | os.PathLike) -> list[dict]:
    """The lines of a run's `metrics.jsonl`; a last line that a kill cut off is left out."""
    path = Path(folder) / METRICS
    lines = path.read_text().splitlines() if path.exists() else []
    metrics = []
    for number, line in enumerate(lines):
        try:
            metrics.append(json.loads(line))
        except ValueError:
            if number + 1 < len(lines):
                raise
    return metrics


def draw_loss(
    metrics: list[dict], path, format: str = "png", size: tuple[float, float] = (7, 4), curve: tuple[str, str] = LOSS
) -> None:
    """Draws training loss and evaluation loss (nats per token) over steps, to a path or an open file, in inches."""
    number, axis = curve
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel=axis)
    for name, label, style in ((number, "training", "-"), (f"eval_{number}", "held out", "o-")):
        points = [(line["step"], line[name]) for line in metrics if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=3)
    if axes.lines:
        axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, format=format)
