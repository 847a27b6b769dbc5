"""Makes batches of rows; what changes the number of targets happens here, before they are counted."""

from typing import Any

import torch

from nanollada.trainers.data.packing import IGNORE
from nanollada.trainers.noise import keys

ROW_COLUMNS = ("input_ids", "labels", "document_ids", "position_ids")


class Collator:
    """
    Makes a batch: pads on the right to the longest row.

    A batch holds `input_ids`, `labels` (−100 at pads), `attention_mask` (only if something is padded), `document_ids`
    (−1 at pads) and `position_ids` (both absent if every row is one document that starts at 0), each `[B, L]`; and
    `index`, `num_bytes` and, if the rows have them, `rank` and `epoch`, each `[B]`.

    Args:
        pad_token_id (`int`): What fills `input_ids`.
        variable_length_probability (`float`, *optional*, defaults to 0.0): Chance that a row is cut to its first k
            targets, k uniform on 1..number of targets, everything behind them becoming padding (LLaDA, arXiv
            2502.09992, §2.2: 1 % of the data). Drawn from (seed, row index, epoch), whatever the other rows are;
            `num_bytes` stays the whole row's.
        seed (`int`, *optional*, defaults to 42): The run's.

    Raises:
        ValueError: If rows are to be cut and have no `epoch`.
    """

    def __init__(self, pad_token_id: int, variable_length_probability: float = 0.0, seed: int = 42):
        if not 0 <= variable_length_probability <= 1:
            raise ValueError(f"`variable_length_probability` must be in [0, 1], got {variable_length_probability}")
        self.pad_token_id = pad_token_id
        self.variable_length_probability = variable_length_probability
        self.seed = seed

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        names = [name for name in ("index", "num_bytes", "rank", "epoch") if name in rows[0]]
        batch = {name: torch.tensor([int(row[name]) for row in rows]) for name in names}  # [B]
        if self.variable_length_probability:
            rows = self._shortened(rows, batch)
        lengths = [len(row["input_ids"]) for row in rows]
        batch["input_ids"] = self._padded(rows, "input_ids", self.pad_token_id)  # [B, L]
        batch["labels"] = self._padded(rows, "labels", IGNORE)
        if min(lengths) < max(lengths):
            columns = torch.arange(max(lengths))
            batch["attention_mask"] = (columns < torch.tensor(lengths)[:, None]).long()
        if any(row["document_ids"][-1] or row["position_ids"][-1] != len(row["input_ids"]) - 1 for row in rows):
            batch["document_ids"] = self._padded(rows, "document_ids", -1)
            batch["position_ids"] = self._padded(rows, "position_ids", 0)
        return batch

    def _padded(self, rows: list[dict[str, Any]], name: str, value: int) -> torch.Tensor:
        columns = [torch.as_tensor(row[name], dtype=torch.long) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=value)

    def _shortened(self, rows: list[dict[str, Any]], batch: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
        if "epoch" not in batch:
            raise ValueError("`variable_length_probability` needs rows with an `epoch`, got rows without")
        draws = keys.keyed_uniform(self.seed, batch["index"], batch["epoch"], keys.STREAM_LENGTH, 2)
        shortened = []
        for row, (coin, length) in zip(rows, draws.tolist(), strict=True):
            if coin < self.variable_length_probability:
                targets = [i for i, label in enumerate(row["labels"]) if label != IGNORE]
                end = targets[int(length * len(targets))] + 1
                row = {name: row[name][:end] for name in ROW_COLUMNS}
            shortened.append(row)
        return shortened


def pad_batch(batch: dict[str, Any], length: int, pad_token_id: int) -> dict[str, Any]:
    """A collated batch, padded on the right to `length` as `Collator` pads."""
    missing = length - batch["input_ids"].shape[1]
    if missing <= 0:
        return batch
    mask = batch.get("attention_mask", torch.ones_like(batch["labels"]))
    fillings = {
        "input_ids": pad_token_id,
        "labels": IGNORE,
        "attention_mask": 0,
        "document_ids": -1,
        "position_ids": 0,
    }
    padded = {**batch, "attention_mask": mask}
    for name in {*ROW_COLUMNS, "attention_mask"} & padded.keys():
        padded[name] = torch.nn.functional.pad(padded[name], (0, missing), value=fillings.get(name, 0))
    return padded
