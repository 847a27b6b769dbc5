"""Traces as pictures: an animated GIF of a frame per step, and a PNG of all steps."""

from pathlib import Path

from nanollada.scripts.tracing.picture import (
    BLOCK,
    EDITED,
    INK,
    LINE,
    PAPER,
    SHADES,
    SIZE,
    SOFT,
    WRONG,
    Pen,
    Shades,
    Strip,
)
from nanollada.scripts.tracing.recorder import StepRecorder
from nanollada.trainers.records import written_beside

WIDTH, MARGIN, GAP = 800, 16, 32  # of all text, around it, and between two traces, in pixels
TOTAL_SECONDS, LAST_SECONDS = 10, 3


def write_gif(traces: StepRecorder | dict[str, StepRecorder], path: str | Path, font: str | None = None) -> None:
    """
    Writes a trace, or several side by side, as an animated GIF: a frame per step, about ten seconds in all, the last
    frame held for three more. Side by side a step is a forward pass of each; who has ended waits for the others.

    The whole row is shown, prompt first, however long it is, as [`~scripts.tracing.picture.Strip`] draws it: the
    answer to a sudoku as a board. Where tokens were edited, a line says what a step did, `1 edited: dog → cat`.
    Characters are drawn with DejaVu Sans, and what that lacks (Chinese, say) with the first font of the system that
    has them. Where none has, a character is spelt by its code point, `⟨U+4F60⟩`, never drawn as an empty box, and one
    warning says so and which package brings a font. Emoji of coloured fonts and control characters are spelt, too.

    Args:
        traces ([`StepRecorder`] or `dict[str, StepRecorder]`): After their `generate` calls; by title.
        path (`str` or `Path`): The file.
        font (`str`, *optional*): A font file or an installed family, to be asked first.

    Raises:
        `ValueError`: if nothing was recorded, and for a font that there is not.
    """
    traces = traces if isinstance(traces, dict) else {"": traces}
    pen = Pen(font)
    share = (WIDTH - GAP * (len(traces) - 1)) // len(traces)
    picture = _Picture(pen, {title: Strip(pen, trace, share) for title, trace in traces.items()})
    frames = (picture.frame(step) for step in range(1, picture.steps + 1))
    hold = min(max(round(100 * TOTAL_SECONDS / picture.steps) * 10, 40), 500)  # milliseconds, in hundredths
    durations = [hold] * (picture.steps - 1) + [LAST_SECONDS * 1000]
    options = {"save_all": True, "append_images": frames, "duration": durations, "loop": 0}
    with written_beside(path) as beside:
        next(frames).save(beside, format="GIF", **options)
    pen.fonts.warn(str(path))


def write_png(trace: StepRecorder, path: str | Path, font: str | None = None) -> None:
    """
    Writes all steps of a trace's answer into one picture, numbered: a line each, or a board each for a sudoku.

    Args:
        trace ([`StepRecorder`]): After its `generate` call.
        path (`str` or `Path`): The file, written beside and renamed.
        font (`str`, *optional*): As for [`write_gif`].

    Raises:
        `ValueError`: if nothing was recorded, and for a font that there is not.
    """
    from PIL import Image, ImageDraw

    pen = Pen(font)
    strip, numbers = Strip(pen, trace, WIDTH, answer_only=True), pen.width(str(len(trace.steps))) + SIZE
    width, height = strip.size[0] + numbers + GAP // 2, strip.size[1] + (GAP // 2 if strip.board else 0)
    columns = max((WIDTH + numbers + GAP) // width, 1) if strip.board else 1
    rows = -(-(strip.steps + 1) // columns)
    image = Image.new("RGB", (2 * MARGIN + columns * width, 2 * MARGIN + rows * height), PAPER)
    draw, shades = ImageDraw.Draw(image), Shades(strip.steps)
    for step in range(strip.steps + 1):
        x, y = MARGIN + step % columns * width, MARGIN + step // columns * height
        pen.write(draw, x, y + LINE - 10, str(step), SOFT)
        image.paste(strip.draw(step, shades), (x + numbers, y))
    with written_beside(path) as beside:
        image.save(beside, format="PNG", optimize=True)
    pen.fonts.warn(str(path))


class _Picture:
    """Draws frames of the same size and palette."""

    def __init__(self, pen: Pen, strips: dict[str, Strip]):
        from PIL import Image

        self.pen, self.strips = pen, strips
        self.steps = max(strip.steps for strip in strips.values())
        self.shades = Shades(self.steps)
        self.titles, self.edited = any(strips), any(strip.captions for strip in strips.values())
        self.top = MARGIN + LINE * (1 + self.titles + self.edited)
        self.lefts, left = {}, MARGIN
        for title, strip in strips.items():
            self.lefts[title] = left
            left += strip.size[0] + GAP
        lowest = max(strip.size[1] for strip in strips.values())
        self.size = left - GAP + MARGIN, self.top + lowest + MARGIN
        grounds = (PAPER, BLOCK, *self.shades.colours)
        palette = [_mix(ground, INK, part / 8) for ground in grounds for part in range(9)]
        palette += [_mix(PAPER, SOFT, part / 8) for part in range(9)] + [WRONG]
        palette += [_mix(EDITED, INK, part / 8) for part in range(9)] * self.edited
        self.palette = Image.new("P", (1, 1))
        self.palette.putpalette([part for colour in palette for part in colour])

    def frame(self, step: int):
        """All rows after a step."""
        from PIL import Image, ImageDraw

        image = Image.new("RGB", self.size, PAPER)
        draw = ImageDraw.Draw(image)
        self.pen.write(draw, MARGIN, MARGIN + SIZE, f"step {step} of {self.steps}", INK)
        self._legend(draw)
        for title, strip in self.strips.items():
            if title:
                heading = f"{self.pen.spell(title)}, {min(step, strip.steps)} of {strip.steps} forward passes"
                self.pen.write(draw, self.lefts[title], MARGIN + LINE + SIZE, heading, INK)
            if self.edited:
                caption = strip.captions[step] if step < len(strip.captions) else ""
                self.pen.write(draw, self.lefts[title], self.top - LINE + SIZE, caption, INK)
            image.paste(strip.draw(step, self.shades), (self.lefts[title], self.top))
        return image.quantize(palette=self.palette, dither=Image.Dither.NONE)

    def _legend(self, draw) -> None:
        pad, y = 8, MARGIN
        last = str(self.steps)
        left = self.size[0] - MARGIN - SHADES * 6 - self.pen.width(last) - pad
        label = "decided in step 1 "
        start = left - self.pen.width(label)
        self.pen.write(draw, start, y + SIZE, label, SOFT)
        if self.edited:
            start -= self.pen.width("edited") + 4 * pad
            draw.rectangle((start - SIZE - pad, y + 3, start - pad, y + SIZE), EDITED)
            self.pen.write(draw, start, y + SIZE, "edited", SOFT)
        for index, shade in enumerate(self.shades.colours):
            draw.rectangle((left + index * 6, y + 3, left + index * 6 + 5, y + SIZE), shade)
        self.pen.write(draw, left + SHADES * 6 + pad, y + SIZE, last, SOFT)


def _mix(one, other, part: float) -> tuple[int, int, int]:
    return tuple(round(a + (b - a) * part) for a, b in zip(one, other, strict=True))
