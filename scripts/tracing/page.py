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
    cells, newest = trace_cells(trace, step)[0], trace.newest(step) if step else set()
    if special is not None:
        cells = [
            cell._replace(piece=cell.piece._replace(text=special)) if cell.piece.kind == "special" else cell
            for cell in cells
        ]
    values |= {**_figures(trace, cells, step), "final": cells, "newest": newest, "autoplay": False, "playable": False}
    return _fragment(values)


def _figures(trace: StepRecorder, cells: list[Cell], step: int) -> dict:
    """Tokens decided, time and tokens per forward up to a step; at the end of the call what [`StepRecorder`] says."""
    decided = sum(cell.when > 0 for cell in cells)
    return {
        "step": step,
        "decided": decided,
        "tokens_per_forward": decided / max(step, 1),
        "seconds": trace.seconds[step - 1] if step else 0.0,
        "edits": trace.edits(step),
        "caption": trace.caption(step) if step and trace.edits() else "",
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
        "all_edits": trace.edits(),
        "ended": trace.ended,
        "board": find_board(trace),
        "board_style": BOARD_STYLE,
        "text": trace.tokenizer.decode(trace.ids[first : trace.kept], skip_special_tokens=True),
    }


def _content(trace: StepRecorder, title: str, settings: dict | None) -> dict:
    """All that a page shows."""
    if not trace.steps:
        raise ValueError(NOTHING)
    shown, count, edits = trace_cells(trace), len(trace.steps), trace.edits()
    states = [[_state(cell) for cell in row] for row in shown]
    frames = []
    for before, now in zip(states, states[1:], strict=False):
        frames.append([[i, *state] for i, (was, state) in enumerate(zip(before, now, strict=True)) if was != state])
    confidence = [[[i, round(value, 3)] for i, value in known.items()] for known in trace.confidence]
    numbers = range(1, count + 1)
    data = {
        "start": states[0],
        "changes": [sorted(trace.newest(number)) for number in numbers],
        "frames": frames,
        "confidence": confidence if any(confidence) else [],
        "struck": [[[i, cell.struck] for i, cell in enumerate(row) if cell.struck] for row in shown[1:]] * bool(edits),
        "captions": [trace.caption(number) for number in numbers] * bool(edits),
    }
    values = {**_common(trace, title, settings, count), **_figures(trace, shown[-1], count)}
    return {**values, "final": shown[-1], "newest": set(), "data": data, "playable": True}


def _state(cell: Cell) -> list:
    """What the page's script has to know of a cell, but for what is read anew in each step; short where it can be."""
    state = [*cell.piece, cell.when, None if cell.sure is None else round(cell.sure, 3), cell.was]
    return state if cell.was is not None else state[:-1]
