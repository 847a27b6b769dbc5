"""What is shown of a trace: a piece of text per token, a cell per column and step."""

import json
from functools import cached_property
from typing import NamedTuple

from transformers.convert_slow_tokenizer import bytes_to_unicode

from nanollada.scripts.tracing.recorder import ABSENT, DECIDED, StepRecorder, moved

UNDECIDED = "░"
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


class Cell(NamedTuple):
    """
    What is shown of a column after one step.

    Attributes:
        piece ([`Piece`]): The token.
        when (`int`): The step that decided it; 0 for the prompt and for what is undecided.
        confidence (`float` or `None`): The largest probability there in this step if it was read in it, else in the
            step that decided it.
        sure (`float` or `None`): In the step that decided it.
        was (`str` or `None`): What stood here before, where the token replaced another, or was masked again.
        struck (`str`): What this step took away, here and right before.
    """

    piece: Piece
    when: int
    confidence: float | None
    sure: float | None = None
    was: str | None = None
    struck: str = ""


NOTHING_THERE = Cell(Piece("", "absent"), 0, None)


def trace_cells(trace: StepRecorder, step: int | None = None) -> list[list[Cell]]:
    """
    A row of cells for the start and for each step, or of `step` alone; all rows are as long as the longest. In the
    last one, of a finished call, all that is no part of the text is absent: what is undecided at the end, or was
    decided behind the end of the text.
    """
    replay, shown, width = Replay(trace), [], 0
    for number, ids in enumerate(trace.rows()):
        width = max(width, len(ids))
        cells = replay.take(number, ids, step in (None, number))
        if step in (None, number):
            shown.append(cells)
    if trace.ended and step in (None, len(trace.steps)):
        del shown[-1][trace.kept :]
    return [cells + [NOTHING_THERE] * (width - len(cells)) for cells in shown]


class Replay:
    """
    What is known of each column while a trace is gone through, or while it comes about.

    Args:
        trace ([`StepRecorder`]): Of which at each step no more need be recorded than that.
    """

    def __init__(self, trace: StepRecorder):
        self.trace, self.pieces, self.ids = trace, TokenPieces(trace.tokenizer), []
        self.mask = trace.tokenizer.mask_token_id
        self.when, self.sure = [], []
        self.held: list[tuple[int, str] | None] = []  # the last other token of a column, and its text

    def take(self, number: int, ids: list[int], wanted: bool) -> list[Cell]:
        """Goes on to a step, from 0 (the start) one by one, and to its `ids`; its cells, if they are wanted."""
        struck: dict[int, str] = {}
        if number == 0:
            self.when, self.sure, self.held = [0] * len(ids), [None] * len(ids), [None] * len(ids)
        else:
            self._change(number, ids, struck)
        self.ids = ids
        return self._cells(number, struck) if wanted else []

    def _change(self, number: int, ids: list[int], struck: dict[int, str]) -> None:
        trace, old = self.trace, self.ids
        gives_way = any(name != DECIDED for name in trace.counts[number - 1])
        texts = [piece.text for piece in self.pieces(old)] if gives_way else []
        moves = trace.moves[number - 1]
        if moves is not None:
            for column, text in _removed(moves, len(old)):
                struck[column] = struck.get(column, "") + texts[text] * (old[text] != self.mask)
            lists = (self.when, 0), (self.sure, None), (self.held, None), (texts, ""), (old, self.mask)
            self.when, self.sure, self.held, texts, old = (moved(values, moves, fill) for values, fill in lists)
        confidence = trace.confidence[number - 1]
        for column, new in trace.steps[number - 1]:
            if old[column] not in (self.mask, ABSENT):
                self.held[column] = (old[column], texts[column])
                struck[column] = struck.get(column, "") + texts[column]
            self.when[column] = number if new != self.mask else 0
            self.sure[column] = confidence.get(column) if new != self.mask else None

    def _cells(self, number: int, struck: dict[int, str]) -> list[Cell]:
        confidence = self.trace.confidence[number - 1] if number else {}
        cells = []
        for column, piece in enumerate(self.pieces(self.ids)):
            sure, held = self.sure[column], self.held[column]
            was = held[1] if held is not None and held[0] != self.ids[column] else None
            known = confidence.get(column, sure)
            cells.append(Cell(piece, self.when[column], known, sure, was, struck.get(column, "")))
        return cells


def _removed(moves: list[int], width: int) -> list[tuple[int, int]]:
    """Each column that is gone, behind the new one that it stood before; the last one if it stood at the end."""
    gone, places = sorted(set(range(width)) - set(moves)), []
    for old in gone:
        behind = (column for column, other in enumerate(moves) if other > old)
        places.append((next(behind, len(moves) - 1), old))
    return places
