"""One HTML page of a quickstart run, and the table at its end. Everything on it is read from the run's files."""

import base64
import io
import json
from pathlib import Path

from nanollada.scripts.first_run.expected import DISTRUST, NAMES, doubts, figures
from nanollada.scripts.reporting.tables import NONE, rich_table, share_with_error, with_error
from nanollada.trainers.records import read_json

COLUMNS = (
    ("text", "text, bits/byte"),
    ("sft", "answers, bits/byte"),
    ("exact_match", "sudokus solved"),
)

LEGEND = "± one standard error, [a, b] Wilson's 95 % interval; ≤ marks an upper bound"
TEMPLATE = Path(__file__).parent / "report_page.html"


def shown_prompt(prompt) -> str:
    """A prompt as text: a chat by its messages."""
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)


def result_cell(result: dict | None) -> str:
    """A result with its error: an exact number has none from masks, a bound is marked as one."""
    if result is None:
        return NONE
    if result["metric"] == "exact_match":
        return share_with_error(result)
    return with_error(result["value"], result["mask_error"] if result["bound"] else None, bound=result["bound"])


def result_rows(folder: Path, stages: list[str]) -> list[list[str]]:
    """The table: a row per model with its results, size, steps and training time."""
    rows, results = [], read_json(folder / "results.json")
    for stage in stages:
        run, own = read_json(folder / stage / "run.json"), figures(results[stage]["results"])
        cells = [result_cell(own.get(key)) for key, _ in COLUMNS]
        size = f"{run['parameters'] / 1e6:.2f}M"
        rows.append([NAMES[stage], *cells, size, f"{run['steps']:,}", f"{run['seconds']:.0f} s"])
    return rows


def results_table(folder: Path, stages: list[str]):
    """The same for the terminal, a rich table that fits into 80 columns: the models and their results."""
    from rich.box import SIMPLE
    from rich.table import Column

    header = [Column(name, no_wrap=True) for name in ("model", *(title for _, title in COLUMNS))]
    rows = [row[: len(header)] for row in result_rows(folder, stages)]
    return rich_table(LEGEND, header, rows, box=SIMPLE)


def loss_svg(folder: Path) -> str:
    """The loss curve of a run as an inline SVG in the page's colours: its ink, and `--paper` behind it."""
    from nanollada.trainers.console.callbacks import draw_loss, read_metrics

    buffer = io.StringIO()
    draw_loss(read_metrics(folder), buffer, format="svg", size=(4.6, 3))
    svg = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    svg = svg.replace("<svg ", '<svg fill="currentColor" ', 1)  # letters have no colour of their own
    return svg.replace("#ffffff", "var(--paper)").replace("#000000", "currentColor")


def record(checkpoint: Path, prompt, seed: int, **decoding):
    """The denoising of one prompt, greedy and one token a step, as a [`~scripts.tracing.recorder.TraceRecorder`]."""
    from nanollada.scripts.decoding.checkpoint import load_checkpoint, prompt_ids
    from nanollada.scripts.decoding.writing import generate
    from nanollada.scripts.tracing.recorder import TraceRecorder

    model, tokenizer = load_checkpoint(str(checkpoint))
    recorder = TraceRecorder(tokenizer)
    generate(model, tokenizer, prompt_ids(tokenizer, prompt), seed=seed, recorder=recorder, **decoding)
    return recorder


def draw_denoising(trace, path: Path) -> None:
    """
    Draws a denoising: the answer after each step, coloured by the steps that decided it, a sudoku as boards.

    Args:
        trace ([`~scripts.tracing.recorder.TraceRecorder`]): After its `generate` call.
        path (`Path`): A PNG file.
    """
    from nanollada.scripts.tracing.gif import write_png

    write_png(trace, path)


def write_report(path: Path, folder: Path, stages: list[str], trace, title: str) -> None:
    """
    Writes the page.

    Args:
        path (`Path`): The page.
        folder (`Path`): The run: a folder per stage, `settings.json`, `results.json`, `comparison.json` and
            `denoising.png`.
        stages (`list[str]`): The stages to show.
        trace ([`~scripts.tracing.recorder.TraceRecorder`]): A denoising to show.
        title (`str`): What was denoised.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    from nanollada.scripts.tracing.boards import board_html
    from nanollada.scripts.tracing.page import trace_fragment

    comparison = json.loads((folder / "comparison.json").read_text())
    for answer in comparison:
        answer["shown"] = shown_prompt(answer["prompt"])
        board = board_html(answer["shown"], answer["text"])
        answer["board"] = board and Markup(board)
    last = read_json(folder / stages[-1] / "run.json")
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(TEMPLATE.read_text(encoding="utf-8"))
    text = page.render(
        title="nanollada quickstart",
        distrust=DISTRUST,
        doubts=doubts(folder),
        columns=[title for _, title in COLUMNS],
        rows=result_rows(folder, stages),
        notes=f"Seed {last['seed']}; {last['hardware']}; torch {last['versions']['torch']}, transformers "
        f"{last['versions']['transformers']}. Each model's run.json and evaluation.json name the commands.",
        legend=LEGEND,
        picture=base64.b64encode((folder / "denoising.png").read_bytes()).decode(),
        curves=[(NAMES[stage], Markup(loss_svg(folder / stage))) for stage in stages],
        trace=Markup(trace_fragment(trace, title, {"seed": last["seed"]})),
        comparison=comparison,
    )
    path.write_text(text)
