"""A trace drawn in pixels, at any of its steps: text without gaps, sudokus as boards."""

from collections import Counter
from functools import cache
from typing import NamedTuple

from nanollada.scripts.reporting.fonts import Face, Fonts
from nanollada.scripts.tracing.boards import find_board
from nanollada.scripts.tracing.pieces import Cell, trace_cells
from nanollada.scripts.tracing.recorder import NOTHING, StepRecorder

SIZE, LINE, BAR = 18, 30, 3  # of letters, of a line, and of what underlines the newest, in pixels
BOLD = 1  # pixels from stroke to stroke
BLOCK_WIDTH = 11  # of a place that no text ever stands in
END = "∎"  # for an answer's end of text, which may fill many places behind it
SQUARES = {4: 34, 9: 26}  # of a board's cells, by how many stand in a row
SHADES = 24  # colours of the steps: with the shades of their letters they fit into a GIF's 256
PAPER, INK, SOFT, BLOCK, WRONG = (255, 255, 255), (22, 24, 29), (125, 131, 144), (201, 205, 214), (224, 49, 49)
EDITED = (255, 179, 204)  # under tokens that replaced others, around blocks that were masked again


class Place(NamedTuple):
    """Where a column stands: top left corner, width and height, in pixels, the same at every step."""

    x: int
    y: int
    width: int
    height: int


class Pen:
    """
    Measures and writes text, each character in the first face that [`Fonts`] has for it.

    Args:
        font (`str`, *optional*): As for [`Fonts`].
    """

    def __init__(self, font: str | None = None):
        self.fonts = Fonts(font)

    def spell(self, text: str) -> str:
        """The text in characters that can be drawn on one line."""
        return self.fonts.spell(text.replace("\n", "↵").replace("\t", "⇥"))

    def width(self, text: str) -> int:
        """Of a spelt text, in pixels."""
        return round(sum(self._load(character).getlength(character) for character in text))

    def write(self, draw, x: float, y: int, text: str, fill, bold: bool = False) -> None:
        """Writes a spelt text into a Pillow drawing; `y` is the baseline, and bold is written twice."""
        for character in text:
            font = self._load(character)
            for shift in (0, BOLD)[: 1 + bold]:
                draw.text((x + shift, y), character, font=font, fill=fill, anchor="ls")
            x += font.getlength(character)

    def _load(self, character: str):
        return _load(self.fonts.face(character))


@cache
def _load(face: Face):
    from PIL import ImageFont

    return ImageFont.truetype(face.path, SIZE, index=face.index, layout_engine=ImageFont.Layout.BASIC)


class Shades:
    """
    The colours of the steps, light enough for dark letters.

    Args:
        steps (`int`): How many there are.
    """

    def __init__(self, steps: int):
        from matplotlib import colormaps

        self.steps = steps
        shades = [colormaps["viridis"](index / (SHADES - 1))[:3] for index in range(SHADES)]
        self.colours = [tuple(round(255 * (0.45 * part + 0.55)) for part in shade) for shade in shades]

    def __getitem__(self, step: int) -> tuple[int, int, int]:
        return self.colours[round((step - 1) / max(self.steps - 1, 1) * (SHADES - 1))]


class Strip:
    """
    A trace, or its answer alone, in a picture of one size. What is undecided is a grey block, a decided token has the
    colour of its step, the newest ones a bar under them. A token that replaced another is pink, and so is the frame of
    what was masked again. Pieces of a word touch, and nothing moves: a column is as
    wide as the widest text that stands in it; tokens that are parts of one character share its width, and are mere
    colour until it is whole. The end of the text is a `∎`. The answer to a sudoku is a board: its clues bold, framed
    in red where the answer changed one.

    Args:
        pen ([`Pen`]): To write with.
        trace ([`StepRecorder`]): After its `generate` call.
        width (`int`): Of the text, in pixels; more if a single token is longer.
        answer_only (`bool`): Leave out the prompt, and what lies behind the end of the text.

    Raises:
        `ValueError`: if nothing was recorded.
    """

    def __init__(self, pen: Pen, trace: StepRecorder, width: int, answer_only: bool = False):
        if not trace.steps:
            raise ValueError(NOTHING)
        first, last = (len(trace.prompt), trace.kept) if answer_only else (0, None)
        self.pen, self.steps = pen, len(trace.steps)
        self.ends = {trace.tokenizer.eos_token, trace.tokenizer.pad_token}
        self.prompt_length = len(trace.prompt) - first
        self.states = [self._short(row[first:last]) for row in trace_cells(trace)]
        self.owners: list[int] = []  # of each column the one with its text: of a character the first of its parts
        for column, cell in enumerate(self.states[-1]):
            is_part = cell.piece.kind == "part" and column > 0
            self.owners.append(self.owners[-1] if is_part else column)
        self.parts = Counter(self.owners)
        board = find_board(trace)
        self.board = board and board._replace(start=board.start - first)
        self.places = self._layout(width)
        right = max((place.x + place.width for place in self.places), default=0)
        bottom = max((place.y + place.height for place in self.places), default=LINE)
        self.size = right if answer_only else max(right, width), bottom
        self.captions = [self._caption(trace, step, width) for step in range(self.steps + 1)] * bool(trace.edits())

    def _caption(self, trace: StepRecorder, step: int, width: int) -> str:
        """What a step did and which tokens it replaced, as far as it fits."""
        if step == 0:
            return ""
        replaced = [cell for cell in self.states[step] if cell.struck and cell.was and cell.piece.kind == "text"]
        words = ", ".join(f"{cell.was.strip()} → {cell.piece.text.strip()}" for cell in replaced)
        text = self.pen.spell(": ".join(filter(None, (trace.caption(step), words))))
        while len(text) > 1 and self.pen.width(text) > width:
            text = text[:-2] + "…"
        return text

    def _short(self, row: list[Cell]) -> list[Cell]:
        """With `∎` for the ends of text in the answer."""
        answer = [
            cell._replace(piece=cell.piece._replace(text=END))
            if cell.piece.kind == "special" and cell.piece.text in self.ends
            else cell
            for cell in row[self.prompt_length :]
        ]
        return row[: self.prompt_length] + answer

    def _layout(self, share: int) -> list[Place]:
        """Columns from left to right, wrapped at a width of `share`; a new line also after a token that ends one."""
        widths, places, x, y = self._widths(), [], 0, 0
        for number, column in enumerate(zip(*self.states, strict=True)):
            if self._is_square(number):
                y += LINE if x and number == self.board.start else 0
                x = 0
                places.append(self._square(number - self.board.start, y))
                y = places[-1].y + places[-1].height + BAR if number == self.board.end - 1 else y
                continue
            character = sum(widths[number : number + self.parts[number]])
            if x + character > share and x > 0 and self.owners[number] == number:
                x, y = 0, y + LINE
            places.append(Place(x, y, widths[number], LINE))
            x += widths[number]
            if any("\n" in cell.piece.text for cell in column):
                x, y = 0, y + LINE
        return places

    def _is_square(self, column: int) -> bool:
        return self.board is not None and self.board.start <= column < self.board.end

    def _square(self, cell: int, top: int) -> Place:
        square, side = SQUARES[self.board.side], self.board.side
        return Place(1 + cell % side * square, top + 1 + cell // side * square, square, square)

    def _widths(self) -> list[int]:
        widths, last = [], [self._text(cell, column) for column, cell in enumerate(self.states[-1])]
        for column, owner in enumerate(self.owners):
            total, part, parts = self.pen.width(last[owner]), column - owner, self.parts[owner]
            own = total * (part + 1) // parts - total * part // parts
            cells = [state[column] for state in self.states]
            others = {self._text(cell, column) for cell in cells} - {last[owner]}
            has_block = any(cell.piece.kind == "mask" for cell in cells)
            widths.append(max(own, *map(self.pen.width, others), 0) or BLOCK_WIDTH * has_block)
        return widths

    def _text(self, cell: Cell, column: int) -> str:
        """What is written in a column; parts of a character are not, where the whole stands there in the end."""
        is_part = cell.piece.kind == "bytes" and self.parts[self.owners[column]] > 1
        return "" if is_part or cell.piece.kind in ("mask", "absent") else self.pen.spell(cell.piece.text)

    def draw(self, step: int, shades: Shades):
        """The row after a step, by its last one if that is earlier, as a Pillow image."""
        from PIL import Image, ImageDraw

        image = Image.new("RGB", (self.size[0] + 1, self.size[1] + 2), PAPER)
        draw = ImageDraw.Draw(image)
        row = list(enumerate(zip(self.places, self.states[min(step, self.steps)], strict=True)))
        for column, (place, cell) in row:
            if self._is_square(column):
                self._draw_square(draw, place, cell, column, step, shades)
            elif place.width and cell.piece.kind != "absent":
                self._draw_ground(draw, place, cell, step, shades)
        for column, (place, cell) in row:  # over all grounds, for a character may stand on several
            if not self._is_square(column):
                ink = INK if cell.when else SOFT
                self.pen.write(draw, place.x, place.y + LINE - 10, self._text(cell, column), ink)
        if self.board:
            self._draw_lines(draw)
        return image

    def _draw_ground(self, draw, place: Place, cell: Cell, step: int, shades: Shades) -> None:
        left, top, right, bottom = place.x, place.y + 2, place.x + place.width - 1, place.y + LINE - 3
        if cell.piece.kind == "mask":
            frame = {} if cell.was is None else {"outline": EDITED, "width": 3}
            draw.rectangle((left + (place.width > 2), top + 2, max(right - 1, left), bottom - 2), BLOCK, **frame)
        elif cell.when:
            draw.rectangle((left, top, right, bottom), shades[cell.when] if cell.was is None else EDITED)
            if cell.when == step:
                draw.rectangle((left + (place.width > 4), bottom - BAR + 1, right, bottom), INK)

    def _draw_square(self, draw, place: Place, cell: Cell, column: int, step: int, shades: Shades) -> None:
        left, top, right, bottom = place.x, place.y, place.x + place.width - 1, place.y + place.height - 1
        clue, text = self.board.clue(column), self._text(cell, column)
        if cell.when:
            draw.rectangle((left, top, right, bottom), shades[cell.when] if cell.was is None else EDITED)
        elif cell.was is not None:
            draw.rectangle((left + 3, top + 3, right - 3, bottom - 3), outline=EDITED, width=3)
        if cell.when == step > 0:
            draw.rectangle((left + 3, bottom - BAR - 1, right - 3, bottom - 2), INK)
        if text and self.board.is_wrong(column, text):
            draw.rectangle((left + 2, top + 2, right - 2, bottom - 2), outline=WRONG, width=2)
        shown = text or clue
        x, y = left + (place.width - self.pen.width(shown)) // 2, top + place.height // 2 + SIZE // 3
        self.pen.write(draw, x, y, shown, INK if text else SOFT, bold=bool(clue))

    def _draw_lines(self, draw) -> None:
        corner, square = self.places[self.board.start], SQUARES[self.board.side]
        end = self.board.side * square
        for line in sorted(range(self.board.side + 1), key=lambda line: line % self.board.box == 0):  # thick ones last
            thick, at = line % self.board.box == 0, line * square
            ink, width = (INK, 2) if thick else (BLOCK, 1)
            draw.line((corner.x + at, corner.y, corner.x + at, corner.y + end), ink, width)
            draw.line((corner.x, corner.y + at, corner.x + end, corner.y + at), ink, width)
