"""A trace as an HTML page, or as a part of one."""

import hashlib
import json
from pathlib import Path

from nanollada.scripts.tracing.boards import BOARD_STYLE, find_board
from nanollada.scripts.tracing.pieces import Cell, trace_cells
from nanollada.scripts.tracing.recorder import NOTHING, StepRecorder

TEMPLATE = "trace_page.html"


def trace_page(trace: StepRecorder, title: str, settings: dict | None = None) -> str:
    """
    An animated HTML page of a trace. It is one file that asks for nothing from elsewhere, and it plays itself once.
    The answer to a sudoku is shown as a board.

    Args:
        trace ([`StepRecorder`]): After its `generate` call; of a [`TraceRecorder`] the page shows the confidence, too.
        title (`str`): Heading.
        settings (`dict`, *optional*): Shown as they are, such as model, seed, steps; values of `None` are not.

    Raises:
        `ValueError`: if nothing was recorded.
    """
    return _template().render(_content(trace, title, settings), autoplay=True)


def trace_fragment(
    trace: StepRecorder, title: str, settings: dict | None = None, identifier: str | None = None
) -> str:
    """
    The same as a `<section>` with its style and script, to be put into a page. It waits for its play button.

    Args:
        trace, title, settings: As for [`trace_page`].
        identifier (`str`, *optional*): The section's id, for links to it; must occur once in the page. By default it
            is made from the content. Nothing else of the fragment depends on it, and any number fit into a page.

    Raises:
        `ValueError`: if nothing was recorded.
    """
    values = _content(trace, title, settings)
    values["identifier"] = identifier or values["identifier"]
    return _fragment({**values, "autoplay": False})


def trace_view(
    trace: StepRecorder,
    title: str,
    settings: dict | None = None,
    step: int | None = None,
    special: str | None = None,
) -> str:
    """
    One step as a `<section>` with its style and no script; also of a trace in the making.

    Args:
        trace, title, settings: As for [`trace_page`].
        step (`int`, *optional*): From 0 (the start) to the last step, which is the default.
        special (`str`, *optional*): What stands in place of the names of special tokens.

    Raises:
        `ValueError`: if nothing was recorded, or for a step that there is not.
    """
    if not trace.steps:
        raise ValueError(NOTHING)
    last = len(trace.steps)
    step = last if step is None else step
    if not 0 <= step <= last:
        raise ValueError(f"`step` must be between 0 and {last}, got {step}")
    values = _common(trace, title, settings, last)
    cells = trace_cells(trace, step)[0]
    if special is not None:
        cells = [
            cell._replace(piece=cell.piece._replace(text=special)) if cell.piece.kind == "special" else cell
            for cell in cells
        ]
    return _fragment({**values, **_figures(trace, cells, step), "final": cells, "autoplay": False, "playable": False})


def _figures(trace: StepRecorder, cells: list[Cell], step: int) -> dict:
    """Tokens decided, time and tokens per forward up to a step; at the end of the call what [`StepRecorder`] says."""
    decided = sum(cell.when > 0 for cell in cells)
    return {
        "step": step,
        "decided": decided,
        "tokens_per_forward": decided / max(step, 1),
        "seconds": trace.seconds[step - 1] if step else 0.0,
    }


def _template():
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template(TEMPLATE)


def _fragment(values: dict) -> str:
    template = _template()
    return "".join(template.blocks["fragment"](template.new_context(values)))


def _common(trace: StepRecorder, title: str, settings: dict | None, count: int) -> dict:
    """What a section says of any step; `count` steps are known, more may come meanwhile."""
    first = len(trace.prompt) if trace.tokenizer.mask_token_id not in trace.prompt else 0
    digest = hashlib.sha256(json.dumps([title, settings, trace.prompt, trace.steps[:count]], default=str).encode())
    return {
        "identifier": f"trace-{digest.hexdigest()[:12]}",
        "title": title,
        "settings": {name: value for name, value in (settings or {}).items() if value is not None},
        "steps": count,
        "has_confidence": any(trace.confidence),
        "ended": trace.ended,
        "prompt_length": len(trace.prompt),
        "board": find_board(trace),
        "board_style": BOARD_STYLE,
        "text": trace.tokenizer.decode(trace.ids[first : trace.kept], skip_special_tokens=True),
    }


def _content(trace: StepRecorder, title: str, settings: dict | None) -> dict:
    """All that a page shows."""
    if not trace.steps:
        raise ValueError(NOTHING)
    shown, count = trace_cells(trace), len(trace.steps)
    states = [[cell.piece for cell in row] for row in shown]
    frames = []
    for before, now in zip(states, states[1:], strict=False):
        frames.append([[i, *piece] for i, (was, piece) in enumerate(zip(before, now, strict=True)) if was != piece])
    confidence = [[[i, round(value, 3)] for i, value in known.items()] for known in trace.confidence]
    data = {
        "start": [list(piece) for piece in states[0]],
        "changes": [[column for column, _ in changes] for changes in trace.steps],
        "frames": frames,
        "confidence": confidence if any(confidence) else [],
    }
    values = {**_common(trace, title, settings, count), **_figures(trace, shown[-1], count)}
    return {**values, "final": shown[-1], "data": data, "playable": True}
