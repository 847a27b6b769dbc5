"""Records how a text comes about, forward pass by forward pass, and shows it: in the terminal, or as an HTML page.

Animated GIFs are `trace_gif.py`'s.
"""

import hashlib
import json
import math
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.generation.streamers import BaseStreamer

from nanollada.scripts.reporting.tables import require_rich

TEMPLATE = "trace_page.html"
ABSENT = -1  # a place of an AR row that nothing was written to yet
UNDECIDED = "░"
NOTHING = "`trace` must have recorded a `generate` call, got one without a forward pass"
SHOWN_BYTES = 4  # UTF-8 needs no more for a character


class Piece(NamedTuple):
    """
    What is shown of one token.

    Attributes:
        text (`str`): May be empty.
        kind (`str`): "text"; "special"; "mask" (undecided); "bytes" (part of a character whose rest is undecided, in
            hexadecimal); "part" (the rest of a character, which stands with its first token); "absent".
    """

    text: str
    kind: str


class TokenPieces:
    """
    Turns token ids into [`Piece`]s, one per token.

    Byte-level tokens may hold parts of characters: these are shown together where all parts of a character are
    decided and side by side, and as bytes where they are not.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): With a mask token, unless there are only AR rows.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.special_ids = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.texts: dict[int, str] = {}
        self.byte_of = {character: byte for byte, character in bytes_to_unicode().items()}

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether entries of the vocabulary spell bytes as byte-level BPE does."""
        return '"ByteLevel"' in json.dumps(json.loads(self.tokenizer.backend_tokenizer.to_str())["decoder"])

    def __call__(self, ids: list[int]) -> list[Piece]:
        pieces: list[Piece] = []
        while len(pieces) < len(ids):
            pieces += self._next(ids, len(pieces))
        return pieces

    def _next(self, ids: list[int], at: int) -> list[Piece]:
        token = ids[at]
        if token == ABSENT:
            return [Piece("", "absent")]
        if token == self.tokenizer.mask_token_id:
            return [Piece(UNDECIDED, "mask")]
        if token in self.special_ids:
            return [Piece(self.tokenizer.convert_ids_to_tokens(token), "special")]
        if token not in self.texts:
            self.texts[token] = self._decode([token])
        if "\ufffd" not in self.texts[token]:
            return [Piece(self.texts[token], "text")]
        for end in range(at + 2, min(at + SHOWN_BYTES, len(ids)) + 1):  # the other parts of the character
            if ids[end - 1] == ABSENT:
                break
            text = self._decode(ids[at:end])
            if "\ufffd" not in text:
                return [Piece(text, "text"), *[Piece("", "part")] * (end - at - 1)]
        return [Piece(self._bytes(token), "bytes")]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def _bytes(self, token: int) -> str:
        """`⟨E4·BD⟩`; the vocabulary's own spelling where that isn't bytes (`<0xE4>`, or a real U+FFFD)."""
        spelling = self.tokenizer.convert_ids_to_tokens(token)
        if not self.is_byte_level or not self.byte_of.keys() >= set(spelling):
            return spelling
        return "⟨" + "·".join(f"{self.byte_of[character]:02X}" for character in spelling) + "⟩"


class StepRecorder(BaseStreamer):
    """
    A streamer that keeps what each forward pass decided; for one `generate` call with one row, AR or diffusion.

    It asks for no confidence, which costs the model another softmax per step: for calls that are timed.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's.

    Attributes:
        prompt (`list[int]`): Token ids of the prompt, masks included.
        ids (`list[int]`): The row as it is now, undecided places as mask tokens.
        steps (`list[list[tuple[int, int]]]`): For each forward pass (column, token id) of what it changed.
        confidence (`list[dict[int, float]]`): For each forward pass, by column, the largest probability of what was
            open in it; empty of an AR model, and where nobody asked for it ([`TraceRecorder`] does).
        seconds (`list[float]`): For each forward pass the seconds since this object was made: make it right before
            `generate` is called.
        kept (`int`): Columns of the row that are final. When generation has ended, later ones are no part of the text.
        ended (`bool`): Whether it has.

    Raises:
        `ValueError`: for a batch of several rows.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.started = time.perf_counter()
        self.prompt: list[int] | None = None
        self.ids: list[int] = []
        self.steps: list[list[tuple[int, int]]] = []
        self.confidence: list[dict[int, float]] = []
        self.seconds: list[float] = []
        self.pending: list[float] = []  # the confidence of the step whose draft comes next
        self.kept = 0
        self.is_diffusion = False
        self.ended = False

    def put(self, value):
        """The prompt, then finished columns: of an AR model one per forward pass."""
        ids = _single_row(value)
        if self.prompt is None:
            self.prompt, self.ids = ids, list(ids)
            mask = self.tokenizer.mask_token_id
            self.kept = ids.index(mask) if mask in ids else len(ids)
            return
        if not self.is_diffusion:
            self.kept = len(self.ids)
            self._change(self.kept, ids)
        self.kept += len(ids)

    def put_draft(self, value):
        """The undecided end of the row, or more of it, after each denoising step."""
        ids = _single_row(value)
        if not self.is_diffusion:
            self.is_diffusion = True
            new = self.kept + len(ids) - len(self.ids)  # a draft reaches to the row's last column
            self.ids += [self.tokenizer.mask_token_id] * new
        self._change(len(self.ids) - len(ids), ids)

    def end(self):
        """What was put is all that counts."""
        self.ended = True

    def _change(self, start: int, ids: list[int]) -> None:
        old = self.ids[start:] + [ABSENT] * (start + len(ids) - len(self.ids))
        changes = [(start + i, new) for i, (was, new) in enumerate(zip(old, ids, strict=True)) if was != new]
        known = enumerate(self.pending, start=start)
        self.ids[start:] = ids
        self.confidence.append({column: value for column, value in known if not math.isnan(value)})
        self.pending = []
        self.seconds.append(time.perf_counter() - self.started)
        self.steps.append(changes)  # last: who looks on from another thread counts these

    @property
    def decided(self) -> int:
        """Tokens that were decided and kept."""
        columns = {column for changes in self.steps for column, _ in changes if column < self.kept}
        return sum(self.ids[column] != self.tokenizer.mask_token_id for column in columns)

    @property
    def tokens_per_forward(self) -> float:
        """Tokens kept, by forward passes; 0.0 before the first."""
        return self.decided / max(len(self.steps), 1)

    def rows(self) -> Iterator[list[int]]:
        """The row before the first forward pass and after each; columns not written to yet are −1."""
        fill = self.tokenizer.mask_token_id if self.is_diffusion else ABSENT
        steps = list(self.steps)  # before the length: `generate` may be at work in another thread
        ids = self.prompt + [fill] * (len(self.ids) - len(self.prompt))
        yield list(ids)
        for changes in steps:
            for column, token in changes:
                ids[column] = token
            yield list(ids)


class TraceRecorder(StepRecorder):
    """A [`StepRecorder`] that also keeps the model's confidence in what is open, for pages that show it."""

    def put_confidence(self, value):
        """Of the columns of the draft that comes next the largest probability, NaN where nothing was open."""
        self.pending = _single_row(value)


def _single_row(value) -> list:
    if value.dim() > 1 and value.shape[0] > 1:
        raise ValueError(f"a trace shows one row: `input_ids` must have batch size 1, got {value.shape[0]}")
    return value.reshape(-1).tolist()


# ---- the terminal


class TerminalWatcher(TraceRecorder):
    """
    Also shows the text while it comes about: in a terminal the whole row, redrawn after each denoising step, with
    undecided tokens as dim blocks and the newest ones highlighted; elsewhere a line per denoising step. The tokens of
    an AR model are just written. The finished text is left to the caller (an AR model's stands there already).

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's.
        console (`rich.console.Console`, *optional*): Where to. Defaults to the standard output.
        delay (`float`, defaults to 0.0): Seconds to wait after each redrawn step.

    Raises:
        `ValueError`: if rich is missing; and as [`TraceRecorder`].
    """

    def __init__(self, tokenizer, console=None, delay: float = 0.0):
        require_rich("`watch`")
        from rich.console import Console

        super().__init__(tokenizer)
        self.pieces = TokenPieces(tokenizer)
        self.console = console or Console()
        self.delay = delay
        self.live = None
        self.written = ""

    def put(self, value):
        super().put(value)
        if self.steps and not self.is_diffusion:
            self._write()

    def put_draft(self, value):
        super().put_draft(value)
        if not self.console.is_terminal:
            self.console.print(self.render(with_prompt=False), soft_wrap=True)
            return
        if self.live is None:
            from rich.live import Live

            self.live = Live(console=self.console, auto_refresh=False, transient=True)
            self.live.start()
        self.live.update(self.render(), refresh=True)
        time.sleep(self.delay)

    def end(self):
        super().end()
        self.close()
        if self.steps and not self.is_diffusion:
            self._write(last=True)

    def close(self):
        """Gives the terminal back; also to be called when `generate` was interrupted."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _write(self, last: bool = False) -> None:
        """What is new, up to the last whole character."""
        text = self.tokenizer.decode(self.ids[len(self.prompt) :], skip_special_tokens=True)
        text = text if last else text.rstrip("\ufffd")
        self.console.file.write(
            text[len(self.written) :] + "\n" * last
        )  # as it is: rich would drop control characters
        self.console.file.flush()
        self.written = text

    def render(self, with_prompt: bool = True):
        """Counts and the row as `rich.text.Text`; without the prompt (unless it is filled) all in one line."""
        from rich.text import Text

        newest = {column for column, _ in self.steps[-1]}
        decided = {column for changes in self.steps for column, _ in changes}
        mask = self.tokenizer.mask_token_id
        places = len(self.ids) - len(self.prompt) + self.prompt.count(mask)
        text = Text().append(f"step {len(self.steps)}, {places - self.ids.count(mask)} of {places} tokens", "bold")
        text.append("\n" if with_prompt else ": ")
        styles = {"mask": "dim", "special": "dim italic", "bytes": "dim"}
        for column, piece in enumerate(self.pieces(self.ids)):
            given = column < len(self.prompt) and column not in decided and piece.kind != "mask"
            if given and not with_prompt and mask not in self.prompt:
                continue
            style = "bold black on bright_yellow" if column in newest else styles.get(piece.kind, "dim" * given)
            text.append(piece.text if with_prompt else piece.text.replace("\n", "↵"), style)
        return text


# ---- the page


class Cell(NamedTuple):
    """
    What is shown of a column after one step.

    Attributes:
        piece ([`Piece`]): The token.
        when (`int`): The step that decided it; 0 for the prompt and for what is undecided.
        confidence (`float` or `None`): The largest probability there in this step if it was open in it, else in the
            step that decided it.
    """

    piece: Piece
    when: int
    confidence: float | None


def trace_cells(trace: StepRecorder, step: int | None = None) -> list[list[Cell]]:
    """
    A row of cells for the start and for each step, or of `step` alone. In the last one, of a finished call, all that
    is no part of the text is absent: what is undecided at the end, or was decided behind the end of the text.
    """
    pieces, rows = TokenPieces(trace.tokenizer), []
    when, sure, mask = {}, {}, trace.tokenizer.mask_token_id
    for number, ids in enumerate(trace.rows()):
        confidence = trace.confidence[number - 1] if number else {}
        for column, token in trace.steps[number - 1] if number else []:
            when[column] = number if token != mask else 0
            sure[column] = confidence.get(column)
        if step not in (None, number):
            continue
        row = enumerate(pieces(ids))
        rows.append([Cell(piece, when.get(i, 0), confidence.get(i, sure.get(i))) for i, piece in row])
    if trace.ended and step in (None, len(trace.steps)):
        absent = Cell(Piece("", "absent"), 0, None)
        rows[-1][trace.kept :] = [absent] * (len(rows[-1]) - trace.kept)
    return rows


def trace_page(trace: StepRecorder, title: str, settings: dict | None = None) -> str:
    """
    An animated HTML page of a trace. It is one file that asks for nothing from elsewhere, and it plays itself once.

    Args:
        trace ([`StepRecorder`]): After its `generate` call; of a [`TraceRecorder`] the page shows the confidence, too.
        title (`str`): Heading.
        settings (`dict`, *optional*): Shown as they are, such as model, seed, steps; values of `None` are not.

    Raises:
        `ValueError`: if nothing was recorded.
    """
    return _template().render(_facts(trace, title, settings), autoplay=True)


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
    facts = _facts(trace, title, settings)
    facts["identifier"] = identifier or facts["identifier"]
    return _fragment({**facts, "autoplay": False})


def trace_view(trace: StepRecorder, title: str, settings: dict | None = None, step: int | None = None) -> str:
    """
    One step as a `<section>` with its style and no script; also of a trace in the making.

    Args:
        trace, title, settings: As for [`trace_page`].
        step (`int`, *optional*): From 0 (the start) to the last step, which is the default.

    Raises:
        `ValueError`: if nothing was recorded, or for a step that there is not.
    """
    if not trace.steps:
        raise ValueError(NOTHING)
    last = len(trace.steps)
    step = last if step is None else step
    if not 0 <= step <= last:
        raise ValueError(f"`step` must be between 0 and {last}, got {step}")
    facts = _common(trace, title, settings, last)
    cells = trace_cells(trace, step)[0]
    return _fragment({**facts, **_figures(trace, cells, step), "final": cells, "autoplay": False, "playable": False})


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


def _fragment(facts: dict) -> str:
    template = _template()
    return "".join(template.blocks["fragment"](template.new_context(facts)))


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
        "text": trace.tokenizer.decode(trace.ids[first : trace.kept], skip_special_tokens=True),
    }


def _facts(trace: StepRecorder, title: str, settings: dict | None) -> dict:
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
    facts = {**_common(trace, title, settings, count), **_figures(trace, shown[-1], count)}
    return {**facts, "final": shown[-1], "data": data, "playable": True}
