"""From token ids to rows: packed documents, and answers with their EOS padding."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from nanollada.trainers.data.files import BadRow
from nanollada.trainers.data.tokenizers import no_text

IGNORE = -100  # the label of what is no target
_OF_TOKENIZED = ("input_ids", "labels", "completion_mask", "assistant_masks", "attention_mask")


@dataclass(frozen=True)
class EosPadding:
    """
    EOS tokens behind an answer, all of them targets, so that diffusion learns where to end. A row whose answer was
    truncated gets none.

    Args:
        kind (`str`): "none"; "block": until the row's length is a multiple of `block_length`, at most `max_length`;
            "max_length" (LLaDA, arXiv 2502.09992, §2.3; its pads reach to the longest row of the batch, but here a row
            does not depend on its batch).
        eos_token_id (`int`): The token.
        max_length (`int`): Longest row, in tokens.
        block_length (`int`, *optional*): For "block".

    Raises:
        ValueError: At an unknown kind, and if `block_length` is missing or useless.
    """

    kind: str
    eos_token_id: int
    max_length: int
    block_length: int | None = None

    def __post_init__(self):
        if self.kind not in ("none", "block", "max_length"):
            raise ValueError(f"`eos_padding` must be 'none', 'block' or 'max_length', got {self.kind!r}")
        wanted = self.kind == "block"
        if wanted != (self.block_length is not None) or (wanted and self.block_length < 1):
            raise ValueError(
                "`block_length` must be given with `eos_padding='block'`, positive, and only then; "
                f"got {self.block_length} with {self.kind!r}"
            )

    def tokens(self, length: int) -> list[int]:
        """What follows a row of `length` tokens."""
        if self.kind == "none":
            return []
        end = self.max_length
        if self.kind == "block":
            end = min(end, -(-length // self.block_length) * self.block_length)
        return [self.eos_token_id] * (end - length)


def answer_rows(documents: Iterable[dict[str, Any]], padding: EosPadding | None = None) -> Iterator[dict[str, Any]]:
    """SFT rows, one per conversation, with the columns that packed rows have."""
    for index, document in enumerate(documents):
        length = len(document["input_ids"])
        pads = [] if padding is None or document["truncated"] else padding.tokens(length)
        length += len(pads)
        yield {
            "input_ids": document["input_ids"] + pads,
            "labels": document["labels"] + pads,
            "document_ids": [0] * length,
            "position_ids": list(range(length)),
            "num_bytes": document["num_bytes"],
            "index": index,
        }


def pack_documents(
    documents: Iterable[dict[str, Any]], max_length: int, context_token_id: int, keep_partial: bool = False
) -> Iterator[dict[str, Any]]:
    """
    Packs documents into rows of `max_length` tokens; every token of a document is a target exactly once.

    A row is made of segments, pieces of documents. A segment begins with one context token that is never a target:
    `context_token_id` where a document begins, the row before's last token where a document continues. Thus AR, which
    predicts the next token, and diffusion, which predicts the token itself, are scored on the same tokens. Each
    segment has its own document id, and positions restart. A document's bytes are shared among its rows by tokens.
    Where one place is left in a row, the next document's context token stands there alone, and again in the next row.

    Args:
        documents (`Iterable[dict]`): With `input_ids` (closing EOS included) and `num_bytes`.
        max_length (`int`): Tokens of a row, at least 2.
        context_token_id (`int`): The pad id, `<|endoftext|>`.
        keep_partial (`bool`, *optional*, defaults to `False`): Yield the last row although it is not full. Otherwise
            it is yielded with `index` −1, so that the caller can count its targets before it drops the row.
    """
    index, row = 0, _empty_row()
    for document in documents:
        tokens, start, context = document["input_ids"], 0, context_token_id
        while start < len(tokens):
            piece = tokens[start : start + max_length - len(row["input_ids"]) - 1]
            _append_segment(row, context, piece)
            start += len(piece)
            context = piece[-1] if piece else context
            row["num_bytes"] += share_of_bytes(document["num_bytes"], start - len(piece), start, len(tokens))
            if len(row["input_ids"]) == max_length:
                yield {**row, "index": index}
                index, row = index + 1, _empty_row()
    if count_targets(row):
        yield {**row, "index": index if keep_partial else -1}


def share_of_bytes(num_bytes: int, start: int, end: int, length: int) -> int:
    """The bytes of a document's tokens [start, end) of `length`, as if all had as many. Parts add up."""
    return num_bytes * end // length - num_bytes * start // length


def _empty_row() -> dict[str, Any]:
    return {"input_ids": [], "labels": [], "document_ids": [], "position_ids": [], "num_bytes": 0}


def _append_segment(row: dict[str, Any], context: int, piece: list[int]) -> None:
    document_id = row["document_ids"][-1] + 1 if row["document_ids"] else 0
    row["input_ids"] += [context, *piece]
    row["labels"] += [IGNORE, *piece]
    row["document_ids"] += [document_id] * (1 + len(piece))
    row["position_ids"] += range(1 + len(piece))


def count_targets(row: dict[str, Any]) -> int:
    """How many tokens of a row are targets."""
    return len(row["labels"]) - row["labels"].count(IGNORE)


def tokenized_row(row: dict[str, Any], index: int, tokenizer) -> dict[str, Any]:
    """
    A row that was tokenized elsewhere, with the columns that rows of this house have.

    Its targets are its `labels`, else the tokens that `completion_mask` and `assistant_masks` mark with 1, else all. A
    document's first token is context and never a target: AR has nothing to predict it from. The bytes are those of
    the targets' text.

    Args:
        row (`dict`): With `input_ids`, not padded.
        index (`int`): Its place.
        tokenizer (`PreTrainedTokenizerBase`): The text's, whose mask and edit tokens are in no row.

    Raises:
        BadRow: For null columns and what are no integers, columns of unequal length, padding, unknown ids, a mask
            or edit token, and a row without a target.
    """
    for name in _OF_TOKENIZED:
        if name in row:
            _check_integers(name, row[name])
    ids, length = [int(token) for token in row["input_ids"]], len(row["input_ids"])
    masks = [row[name] for name in ("completion_mask", "assistant_masks") if row.get(name) is not None]
    labels, attention = row.get("labels"), row.get("attention_mask")
    if labels is None:
        labels = [token if all(marks) else IGNORE for token, *marks in zip(ids, *masks, strict=False)]
    documents, places = row.get("document_ids") or [0] * length, row.get("position_ids") or list(range(length))
    if len({length, *map(len, (labels, documents, places, *masks))}) > 1:
        raise BadRow("wrong length", f"every column must be as long as `input_ids`, {length}")
    if attention is not None and not all(attention):
        raise BadRow("padding", "`input_ids` must not be padded, but `attention_mask` holds zeros")
    for token in ids:
        if not 0 <= token < len(tokenizer):
            raise BadRow("not in the vocabulary", f"`input_ids` must be 0 to {len(tokenizer) - 1}, got {token}")
    if found := no_text(tokenizer, ids):
        raise BadRow(f"{found[0]} token", f"`input_ids` hold {found[1]!r}")
    labels = [int(label) if place else IGNORE for label, place in zip(labels, places, strict=True)]
    targets = [label for label in labels if label != IGNORE]
    if not targets:
        raise BadRow("no target", "no token of the row is a target")
    text = tokenizer.decode(targets, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    columns = {"input_ids": ids, "labels": labels, "document_ids": list(documents), "position_ids": list(places)}
    return {**columns, "num_bytes": len(text.encode()), "index": index}


def _check_integers(name: str, values) -> None:
    if values is None:
        raise BadRow("null value", f"`{name}` is null")
    for value in [values] if isinstance(values, str) else values:
        if value is None or isinstance(value, str | list):
            raise BadRow("no integers", f"`{name}` must hold integers, got {value!r}")
