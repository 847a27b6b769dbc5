"""From a row's text to token ids: documents, and answers with their spans, cut where they are too long."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any

from nanollada.trainers.data.chats import render_chat, special_tokens
from nanollada.trainers.data.files import BadRow
from nanollada.trainers.data.formats import Example
from nanollada.trainers.data.packing import IGNORE
from nanollada.trainers.data.sources import RowPolicy
from nanollada.trainers.data.tokenizers import no_text

BATCH = 256


def encode_spans(
    tokenizer, text: str, spans: Sequence[tuple[int, int]], literal: Sequence[tuple[int, int]] | None = None
) -> tuple[list[int], list[int]]:
    """
    Tokenizes a text up to the end of its last span, with the tokens inside the spans as targets.

    The text before a span becomes the tokens that it becomes alone, as it will at generation: where a token would
    cross the border, the text is tokenized in pieces.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): A fast tokenizer.
        text (`str`): The text.
        spans (`Sequence[tuple[int, int]]`): (start, end) of characters, in order.
        literal (`Sequence[tuple[int, int]]`, *optional*): Where control tokens that stand in the text are text, see
            [`~trainers.data.chats.RenderedChat`]. By default everywhere: only what a chat template wrote is control.

    Returns:
        `tuple[list[int], list[int]]`: `input_ids`, and `labels` with −100 outside the spans.

    Raises:
        BadRow: For text that the vocabulary lacks, or that it turns into a control token.
    """
    literal = [(0, len(text))] if literal is None else literal
    cuts = [cut for span in spans for cut in span]
    whole, *prefixes = _range_ids(tokenizer, text, [(0, cut) for cut in reversed(cuts)], literal)
    prefixes = [[], *reversed(prefixes), whole]
    if all(whole[: len(prefix)] == prefix for prefix in prefixes):
        pieces = [whole[len(left) : len(right)] for left, right in pairwise(prefixes)]
    else:
        pieces = _range_ids(tokenizer, text, list(pairwise([0, *cuts])), literal)
    input_ids = [token for piece in pieces for token in piece]
    labels = [token if i % 2 else IGNORE for i, piece in enumerate(pieces) for token in piece]
    return input_ids, labels


def _range_ids(tokenizer, text: str, ranges: list[tuple[int, int]], literal) -> list[list[int]]:
    """Token ids of text[start:end] for each of the ranges."""
    parts = [_parts(text, start, end, literal) for start, end in ranges]
    found = {}
    for kind in (False, True):
        texts = list(dict.fromkeys(piece for pieces in parts for piece, is_literal in pieces if is_literal is kind))
        found[kind] = dict(zip(texts, _ids(tokenizer, texts, kind), strict=True)) if texts else {}
    return [
        [
            token
            for number, (piece, kind) in enumerate(pieces)
            for token in (_inner_ids(tokenizer, piece, kind) if number else found[kind][piece])
        ]
        for pieces in parts
    ]


def _parts(text: str, start: int, end: int, literal) -> list[tuple[str, bool]]:
    """(piece, whether it is literal) of text[start:end], at least one."""
    parts, place = [], start
    for left, right in literal:
        left, right = max(left, start), min(right, end)
        if left < right:
            parts += [(text[place:left], False), (text[left:right], True)]
            place = right
    parts = [part for part in [*parts, (text[place:end], False)] if part[0]]
    return parts or [("", False)]


def _inner_ids(tokenizer, piece: str, literal: bool) -> list[int]:
    """Of a piece that does not begin a text: without the space that some tokenizers put before a text's first word."""
    try:
        (newline,), (ids,) = (_ids(tokenizer, [text], literal) for text in ("\n", "\n" + piece))
    except BadRow:  # a vocabulary without the newline
        newline, ids = [], []
    return ids[len(newline) :] if newline and ids[: len(newline)] == newline else _ids(tokenizer, [piece], literal)[0]


def _ids(tokenizer, texts: list[str], literal: bool = True) -> list[list[int]]:
    """Token ids of texts; special tokens that stand in them are text (`literal`) or themselves."""
    try:
        encoded = tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
            split_special_tokens=literal,
        )["input_ids"]
    except Exception as error:  # `tokenizers` raises the base class: a character that the vocabulary lacks
        unknown = _unknown_characters(tokenizer, texts[0], literal)
        raise BadRow("not in the vocabulary", unknown or str(error)) from error
    if literal:
        _refuse_control(tokenizer, encoded)
    return encoded


def _refuse_control(tokenizer, encoded: list[list[int]]) -> None:
    control = special_tokens(tokenizer)
    if tokenizer.unk_token_id not in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id):
        control.pop(tokenizer.unk_token_id, None)  # what the vocabulary lacks is one in some foreign tokenizers
    for ids in encoded:
        if not control.keys().isdisjoint(ids):
            token = next(control[index] for index in ids if index in control)
            raise BadRow("control token", f"the tokenizer makes {token!r} of a text, which must be tokens of its own")


def _unknown_characters(tokenizer, text: str, literal: bool) -> str:
    for token in () if literal else tokenizer.all_special_tokens:
        text = text.replace(token, "")
    vocabulary = tokenizer.get_vocab()
    return ", ".join(repr(character) for character in sorted(set(text)) if character not in vocabulary)


@dataclass
class RowEncoder:
    """
    Turns examples into token ids: documents for packing, or whole rows for SFT.

    Control tokens that are written out in a document, a prompt, a completion or a message (`<|im_end|>`,
    `<|endoftext|>`, `<|mask|>`) are text, spelt with ordinary tokens: they end nothing and begin no turn. The mask
    token and the edit tokens are in no row.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): A fast tokenizer with pad and eos tokens.
        max_length (`int`): Longest SFT row, in tokens.
        assistant_turns (`str`): "all" or "last": which answers of a chat are targets.
    """

    tokenizer: Any
    max_length: int
    assistant_turns: str = "all"
    special_ids: frozenset[int] = field(init=False)

    def __post_init__(self):
        self.special_ids = frozenset(special_tokens(self.tokenizer))

    def encode(self, examples: Iterable[Example], policy: RowPolicy) -> Iterator[tuple[Example, dict[str, Any]]]:
        """
        Encodes examples in order; rows that cannot be used go to the policy.

        Yields:
            `tuple[Example, dict]`: The dict has `input_ids` (with the closing EOS) and `num_bytes`; for SFT also
            `labels` and `truncated`.
        """
        examples = iter(examples)
        while batch := list(islice(examples, BATCH)):
            if batch[0].format == "pretrain":
                documents = self._documents([example.text for example in batch])
            else:
                documents = [self._attempt(self.answer_row, example) for example in batch]
            for example, document in zip(batch, documents, strict=True):
                if not isinstance(document, BadRow):
                    yield example, document
                else:
                    policy.reject(example.source, example.row, document)

    def _attempt(self, function, example) -> dict[str, Any] | BadRow:
        try:
            return function(example)
        except BadRow as error:
            return error
        except ValueError as error:
            raise ValueError(f"{example.source}, row {example.row}: {error}") from error

    def _documents(self, texts: list[str]) -> list[dict[str, Any] | BadRow]:
        try:
            encoded = _ids(self.tokenizer, texts)
        except BadRow as error:
            if len(texts) == 1:
                return [error]
            return [document for text in texts for document in self._documents([text])]
        return [self._document(text, ids) for text, ids in zip(texts, encoded, strict=True)]

    def _document(self, text: str, ids: list[int]) -> dict[str, Any] | BadRow:
        if error := self._no_text(ids):
            return error
        return {"input_ids": [*ids, self.tokenizer.eos_token_id], "num_bytes": len(text.encode())}

    def answer_row(self, example: Example) -> dict[str, Any]:
        """
        What `encode` yields of an example with answers.

        Raises:
            BadRow: If it cannot be used.
            ValueError: If the tokenizer has no usable template.
        """
        if example.messages is None:
            text = example.prompt + example.completion
            spans, literal = [(len(example.prompt), len(text))], None
        else:
            given = (example.num_context, self.assistant_turns, example.tools)
            chat = render_chat(self.tokenizer, example.messages, *given)
            text, spans, literal = chat.text, chat.spans, chat.literal
        input_ids, labels = encode_spans(self.tokenizer, text, spans, literal)
        if error := self._no_text(input_ids):
            raise error
        markers = self.tokenizer.convert_ids_to_tokens([label for label in labels if label in self.special_ids])
        num_bytes = sum(len(text[start:end].encode()) for start, end in spans)
        num_bytes -= sum(len(marker.encode()) for marker in markers)
        if example.messages is None:
            input_ids.append(self.tokenizer.eos_token_id)
            labels.append(self.tokenizer.eos_token_id)
        if len(input_ids) > self.max_length:
            return self._truncated(input_ids, labels)
        return {"input_ids": input_ids, "labels": labels, "num_bytes": num_bytes, "truncated": False}

    def _truncated(self, input_ids: list[int], labels: list[int]) -> dict[str, Any]:
        """
        Keeps what fits, from the left, up to the last target; no EOS stands where the answer was cut. It is cut behind
        a whole character, so that the bytes that are counted are those of the tokens.
        """
        kept = [i for i, label in enumerate(labels[: self.max_length]) if label != IGNORE]
        first = next(i for i, label in enumerate(labels) if label != IGNORE)
        whole, text = self._text_of(labels), self._text_of([labels[i] for i in kept])
        while kept and not whole.startswith(text):  # its last character lost bytes
            text = self._text_of([labels[i] for i in kept[:-1]])
            del kept[-1]
        if not kept:
            room = f"its prompt has {first} tokens, `max_length` is {self.max_length}"
            raise BadRow("no room for an answer", f"{room} (`--on_bad_rows skip` leaves such rows out)")
        end, num_bytes = kept[-1] + 1, len(text.encode())
        return {"input_ids": input_ids[:end], "labels": labels[:end], "num_bytes": num_bytes, "truncated": True}

    def _text_of(self, labels: list[int]) -> str:
        ids = [label for label in labels if label != IGNORE]
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _no_text(self, ids: list[int]) -> BadRow | None:
        found = no_text(self.tokenizer, ids)
        return BadRow(f"{found[0]} token", f"the text contains {found[1]!r}") if found else None
