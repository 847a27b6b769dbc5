"""What is shown of a trace: a piece of text per token, a cell per column and step."""

import json
from functools import cached_property
from typing import NamedTuple

from transformers.convert_slow_tokenizer import bytes_to_unicode

from nanollada.scripts.tracing.recorder import ABSENT, StepRecorder

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
