"""Rows of pairs on their way to a batch: their keys, and the learnt EOS behind their answers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from trl.trainer.dpo_trainer import DataCollatorForPreference

from nanollada.trainers.data.packing import EosPadding

PAIR = ("prompt_ids", "chosen_ids", "rejected_ids")


def padding_for(
    kind: str | None, config, generation_config, eos_token_id: int, max_length: int | None
) -> EosPadding | None:
    """
    What follows the answers of a model's pairs.

    A score is the bound that SFT trained, on answers that learnt EOS fill up: what the decoder writes, too.

    Args:
        kind (`str`, *optional*): `eos_padding` of SFT. By default "block" for what decodes in blocks, in those (a
            model in blocks; whole rows that grow), and "none" for other models.
        config, generation_config: The model's.
        max_length (`int`, *optional*): Most tokens of a row; no limit without.

    Returns:
        `EosPadding`, or `None` for none.

    Raises:
        `ValueError`: for "block" with a model that doesn't say of which length, and for "max_length" without one.
    """
    block_length = config.block_length
    if block_length is None and getattr(generation_config, "grow_length", None):
        block_length = generation_config.block_length
    if kind is None:
        kind = "none" if block_length is None else "block"
    if kind == "block" and block_length is None:
        raise ValueError("`eos_padding` 'block' is for a model that decodes in blocks, got one of whole rows")
    if kind == "max_length" and max_length is None:
        raise ValueError("`eos_padding` 'max_length' needs `max_length`, got None")
    if kind == "none":
        return None
    return EosPadding(kind, eos_token_id, max_length or 2**31, block_length if kind == "block" else None)


def padded(row: dict[str, Any], padding: EosPadding | None) -> dict[str, Any]:
    """A row of `PAIR` with EOS behind its answers; `None` leaves it as it is."""
    if padding is None:
        return row
    prompt = len(row["prompt_ids"])
    answers = {name: list(row[name]) for name in PAIR[1:]}
    return row | {name: ids + padding.tokens(prompt + len(ids)) for name, ids in answers.items()}


def trl_collator(args, pad_token_id: int) -> DataCollatorForPreference:
    """The collator that TRL's `DPOTrainer` makes of a `DPOConfig`."""
    return DataCollatorForPreference(
        pad_token_id=pad_token_id,
        max_length=args.max_length,
        truncation_mode=args.truncation_mode,
        pad_to_multiple_of=args.pad_to_multiple_of,
    )


@dataclass
class KeyedCollator:
    """
    Makes batches of pairs as `collator` does, with EOS padding, and the key of each row: 2i of pair i's chosen answer,
    2i + 1 of its rejected one.

    Attributes:
        collator (`Callable`): TRL's: first all chosen answers, then all rejected ones.
        padding (`EosPadding`, *optional*): Behind answers.

    Raises:
        `ValueError`: for rows without an `index`.
    """

    collator: Callable
    padding: EosPadding | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        missing = [number for number, row in enumerate(rows) if row.get("index") is None]
        if missing:
            raise ValueError(f"`index` must be a column of the rows: masks are keyed by it, got {', '.join(rows[0])}")
        batch = self.collator([padded(row, self.padding) for row in rows])
        index = 2 * torch.tensor([int(row["index"]) for row in rows])
        return dict(batch) | {"index": torch.cat((index, index + 1))}  # [2B]
