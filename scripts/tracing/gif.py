"""Draws traces as an animated GIF: a frame per step, every token coloured by the step that decided it."""

import warnings
from functools import cache
from pathlib import Path
from typing import NamedTuple

from nanollada.scripts.tracing.pieces import Cell, trace_cells
from nanollada.scripts.tracing.recorder import NOTHING, StepRecorder

WIDTH = 800  # of all text, in pixels; more if a single token is longer
MARGIN, GAP, SIZE, LINE, PADDING = 16, 32, 18, 30, 2
SHADES = 24  # colours of the steps: with the shades of their letters they fit into a GIF's 256
TOTAL_SECONDS, LAST_SECONDS = 10, 3
PAPER, INK, SOFT, BLOCK = (255, 255, 255), (22, 24, 29), (125, 131, 144), (201, 205, 214)


class Place(NamedTuple):
    """Where a column stands: top left corner and width, in pixels, the same in every frame."""

    x: int
    y: int
    width: int


class Panel(NamedTuple):
    """
    One trace of a picture.

    Attributes:
        title (`str`): Its heading; empty for a trace that stands alone.
        left, right (`int`): Its edges, in pixels.
        states (`list[list[Cell]]`): The row at the start and after each step.
        places (`list[Place]`): Of the columns.
        prompt_length (`int`): So many of them are the prompt's.
    """

    title: str
    left: int
    right: int
    states: list[list[Cell]]
    places: list[Place]
    prompt_length: int


class Pen:
    """
    Measures and writes text, each character in the first font that has it: DejaVu Sans, which comes with matplotlib,
    then the system's fonts. A character that no font has is spelt `⟨U+4F60⟩` and kept in `missing`.
    """

    def __init__(self):
        from matplotlib import font_manager

        self.paths = [font_manager.findfont("DejaVu Sans"), *_system_fonts()]
        self.missing: set[str] = set()
        self.fonts: dict[str, object] = {}

    def spell(self, text: str) -> str:
        """The text in characters that can be drawn on one line."""
        text = text.replace("\n", "↵").replace("\t", "⇥")
        return "".join(character if self._font(character) else f"⟨U+{ord(character):04X}⟩" for character in text)

    def width(self, text: str) -> int:
        """Of a spelt text, in pixels."""
        return round(sum(self._font(character).getlength(character) for character in text))

    def write(self, draw, x: float, y: int, text: str, fill) -> None:
        """Writes a spelt text into a Pillow drawing; `y` is the baseline."""
        for character in text:
            font = self._font(character)
            draw.text((x, y), character, font=font, fill=fill, anchor="ls")
            x += font.getlength(character)

    def _font(self, character: str):
        if character not in self.fonts:
            path = None
            if character.isprintable():
                path = next((path for path in self.paths if ord(character) in _characters(path)), None)
                self.missing |= set() if path else {character}
            self.fonts[character] = path and _load(path)
        return self.fonts[character]


def _system_fonts() -> list[str]:
    """The system's upright fonts, normal weights first; neither matplotlib's symbols nor fonts of mere boxes."""
    import matplotlib
    from matplotlib import font_manager

    def usable(entry):
        own = Path(entry.fname).is_relative_to(matplotlib.get_data_path())
        boxes = "lastresort" in entry.name.replace(" ", "").lower()
        return not own and not boxes and entry.style == "normal" and not getattr(entry, "index", 0)

    def order(entry):
        return abs(int(entry.weight) - 400), entry.name, entry.fname

    return [entry.fname for entry in sorted(filter(usable, font_manager.fontManager.ttflist), key=order)]


@cache
def _characters(path: str) -> frozenset[int]:
    """What a font can draw in one colour and any size: nothing of bitmap fonts and of coloured emoji."""
    from matplotlib.ft2font import FaceFlags, FT2Font

    face = FT2Font(path)
    if FaceFlags.SCALABLE not in face.face_flags or FaceFlags.COLOR in face.face_flags:
        return frozenset()
    return frozenset(face.get_charmap())


@cache
def _load(path: str):
    from PIL import ImageFont

    return ImageFont.truetype(path, SIZE, layout_engine=ImageFont.Layout.BASIC)


def write_gif(traces: StepRecorder | dict[str, StepRecorder], path: str | Path) -> None:
    """
    Writes a trace, or several side by side, as an animated GIF: a frame per step, about ten seconds in all, the last
    frame held for three more. Side by side a step is a forward pass of each; who has ended waits for the others.

    The whole row is shown, prompt first, however long it is. What is undecided is a grey block, a decided token has
    the colour of its step (one of at most 24), the newest ones a frame. Nothing moves: a column is as wide as the
    widest that stands in it. Characters are drawn with DejaVu Sans, and what that lacks (Chinese, say) with whichever
    font of the system has them. Where none has, a character is spelt by its code point, `⟨U+4F60⟩`, never drawn as an
    empty box, and a warning says so; `apt-get install fonts-noto-cjk` brings Chinese. Emoji of coloured fonts and
    control characters are spelt, too.

    Args:
        traces ([`StepRecorder`] or `dict[str, StepRecorder]`): After their `generate` calls; by title.
        path (`str` or `Path`): The file.

    Raises:
        `ValueError`: if nothing was recorded.
    """
    traces = traces if isinstance(traces, dict) else {"": traces}
    if not all(trace.steps for trace in traces.values()):
        raise ValueError(NOTHING)
    pen = Pen()
    picture = _Picture(pen, _panels(pen, traces))
    frames = (picture.frame(step) for step in range(1, picture.steps + 1))
    hold = min(max(round(100 * TOTAL_SECONDS / picture.steps) * 10, 40), 500)  # milliseconds, in hundredths
    durations = [hold] * (picture.steps - 1) + [LAST_SECONDS * 1000]
    next(frames).save(path, save_all=True, append_images=frames, duration=durations, loop=0)
    if pen.missing:
        shown = " ".join(f"U+{ord(character):04X}" for character in sorted(pen.missing))
        warnings.warn(f"{path}: no font of this system has {shown}; they are spelt by their code points", stacklevel=2)


def _panels(pen: Pen, traces: dict[str, StepRecorder]) -> list[Panel]:
    """The traces from left to right. A panel is wider than its share where a single token is."""
    share = (WIDTH - GAP * (len(traces) - 1)) // len(traces)
    panels, left = [], MARGIN
    for title, trace in traces.items():
        states = trace_cells(trace)
        places = _layout(pen, states, left, share, MARGIN + LINE * (2 if title else 1))
        right = max(place.x + place.width for place in [*places, Place(left, 0, share)])
        panels.append(Panel(title, left, right, states, places, len(trace.prompt)))
        left = right + GAP
    return panels


def _text(pen: Pen, cell: Cell) -> str:
    return "" if cell.piece.kind in ("mask", "absent") else pen.spell(cell.piece.text)


def _layout(pen: Pen, states: list[list[Cell]], left: int, share: int, top: int) -> list[Place]:
    """Columns from left to right, wrapped at a width of `share`; a new line also after a token that ends one."""
    places, x, y = [], left, top
    for column in zip(*states, strict=True):
        drawn = max(pen.width(_text(pen, cell)) for cell in column)
        block = SIZE // 2 if any(cell.piece.kind == "mask" for cell in column) else 0
        width = max(drawn, block) + 2 * PADDING * bool(drawn or block)
        if x + width > left + share and x > left:
            x, y = left, y + LINE
        places.append(Place(x, y, width))
        x += width
        if any("\n" in cell.piece.text for cell in column):
            x, y = left, y + LINE
    return places


class _Picture:
    """Draws frames of the same size and palette."""

    def __init__(self, pen: Pen, panels: list[Panel]):
        from matplotlib import colormaps
        from PIL import Image

        self.pen, self.panels = pen, panels
        self.steps = max(len(panel.states) for panel in panels) - 1
        lowest = max(place.y for panel in panels for place in panel.places)
        self.size = panels[-1].right + MARGIN, lowest + 2 * LINE + MARGIN
        shades = [colormaps["viridis"](index / (SHADES - 1))[:3] for index in range(SHADES)]
        # Light enough for dark letters.
        self.shades = [tuple(round(255 * (0.45 * part + 0.55)) for part in shade) for shade in shades]
        palette = [_mix(ground, INK, part / 8) for ground in (PAPER, BLOCK, *self.shades) for part in range(9)]
        palette += [_mix(PAPER, SOFT, part / 8) for part in range(9)]
        self.palette = Image.new("P", (1, 1))
        self.palette.putpalette([part for colour in palette for part in colour])

    def shade(self, step: int) -> tuple[int, int, int]:
        """The colour of a step."""
        return self.shades[round((step - 1) / max(self.steps - 1, 1) * (SHADES - 1))]

    def frame(self, step: int):
        """All rows after a step."""
        from PIL import Image, ImageDraw

        image = Image.new("RGB", self.size, PAPER)
        draw = ImageDraw.Draw(image)
        self.pen.write(draw, MARGIN, MARGIN + SIZE, f"step {step} of {self.steps}", INK)
        self._legend(draw)
        for panel in self.panels:
            own = min(step, len(panel.states) - 1)
            if panel.title:
                heading = f"{panel.title}, {own} of {len(panel.states) - 1} forward passes"
                self.pen.write(draw, panel.left, MARGIN + LINE + SIZE, heading, INK)
            for column, (place, cell) in enumerate(zip(panel.places, panel.states[own], strict=True)):
                self._cell(draw, place, cell, newest=cell.when == step, is_prompt=column < panel.prompt_length)
        return image.quantize(palette=self.palette, dither=Image.Dither.NONE)

    def _cell(self, draw, place: Place, cell: Cell, newest: bool, is_prompt: bool) -> None:
        if cell.piece.kind == "absent":
            return
        box = (place.x, place.y + 2, place.x + place.width - 1, place.y + LINE - 4)
        if cell.piece.kind == "mask":
            draw.rectangle((box[0] + PADDING, box[1] + 2, box[2] - PADDING, box[3] - 2), BLOCK)
            return
        if cell.when:
            draw.rectangle(box, self.shade(cell.when), outline=INK if newest else None)
        ink = SOFT if is_prompt and not cell.when else INK
        self.pen.write(draw, place.x + PADDING, place.y + LINE - 10, _text(self.pen, cell), ink)

    def _legend(self, draw) -> None:
        x, y = self.size[0] - MARGIN - SHADES * 6, MARGIN
        last = str(self.steps)
        left = x - self.pen.width(last) - PADDING * 4
        self.pen.write(draw, left - self.pen.width("decided in step 1 "), y + SIZE, "decided in step 1 ", SOFT)
        for index, shade in enumerate(self.shades):
            draw.rectangle((left + index * 6, y + 3, left + index * 6 + 5, y + SIZE), shade)
        self.pen.write(draw, left + SHADES * 6 + PADDING * 4, y + SIZE, last, SOFT)


def _mix(one, other, part: float) -> tuple[int, int, int]:
    return tuple(round(a + (b - a) * part) for a, b in zip(one, other, strict=True))
