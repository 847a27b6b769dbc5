"""Rows that score a text longer than a row: windows that roll over it, each token a target exactly once."""

from collections.abc import Iterator
from typing import Any

from nanollada.trainers.data.packing import IGNORE, share_of_bytes


def rolling_rows(
    tokens: list[int],
    max_length: int,
    context: int,
    context_token_id: int,
    *,
    block_length: int | None = None,
    num_bytes: int = 0,
    index: int = 0,
) -> Iterator[dict[str, Any]]:
    """
    Rows for [`~trainers.data.collator.Collator`] and `evaluate_likelihood`, of AR and diffusion models alike. The
    first begins with `context_token_id`, every other with tokens that the rows before have scored: at least `context`
    of them. A text that fits into one row is scored in one.

    For a block model windows lie on the block grid of the whole text: they begin and end at multiples of
    `block_length`, the last one at the text's end. So each block is scored whole, in the model's own factorisation.

    Args:
        tokens (`list[int]`): The text, its closing EOS included.
        max_length (`int`): Tokens of a row; rounded down to whole blocks.
        context (`int`): Tokens before a row's first target, except where the text begins; rounded up to whole
            blocks.
        context_token_id (`int`): What stands before the text, `<|endoftext|>`; never scored.
        block_length (`int`, *optional*): The block model's, see `scored_block_length`. `None`, or at least
            `max_length`: no grid.
        num_bytes (`int`, defaults to 0): UTF-8 bytes of the text, shared among its rows by tokens.
        index (`int`, defaults to 0): Number of the first row.

    Raises:
        `ValueError`: if `context` is below 1 or leaves no room for a target (with blocks: for a block).
    """
    unit = block_length if block_length is not None and block_length < max_length else 1
    window, kept = max_length // unit * unit, -(-context // unit) * unit
    if context < 1 or kept >= window:
        blocks = f" and blocks of {unit}" if unit > 1 else ""
        raise ValueError(
            "`context` must be at least 1 and leave room for targets in a row, "
            f"got {context} with rows of {max_length}{blocks}"
        )
    ids, start, done = [context_token_id, *tokens], 0, 1
    while done < len(ids):
        end = len(ids) if len(ids) - start <= max_length else start + window
        yield {
            "input_ids": ids[start:end],
            "labels": [IGNORE] * (done - start) + ids[done:end],
            "document_ids": [0] * (end - start),
            "position_ids": list(range(end - start)),
            "num_bytes": share_of_bytes(num_bytes, done - 1, end - 1, len(tokens)),
            "index": index,
        }
        done, start, index = end, end - kept, index + 1
