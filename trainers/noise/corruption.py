"""What a way of corrupting rows is, and what it gives back."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch


@dataclass
class Corruption:
    """
    A corrupted batch: noisy ids, labels and weights, drawn together so that they can't disagree.

    Attributes:
        noisy_input_ids (`torch.LongTensor` of shape `(copies * batch, length)`): What the model reads.
        labels (`torch.LongTensor` of shape `(copies * batch, length)`): The clean ids that it predicts, and −100.
        weights (`torch.DoubleTensor` of shape `(copies * batch, length)`): What a label's cross-entropy counts.
            Their expectation is one per target, so that a sum over labels divided by the number of *targets*
            estimates the loss per token.
        copies (`int`): How often each row is there: first all rows once, then all again.
    """

    noisy_input_ids: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    copies: int = 1

    @property
    def supervised(self) -> torch.BoolTensor:
        """`(copies * batch, length)`: where a label stands."""
        return self.labels != -100


@dataclass(frozen=True)
class CorruptionKind:
    """
    A way of corrupting, as `CORRUPTIONS` of `noise/registry.py` names it.

    Attributes:
        corrupt (`Callable`): `corrupt(input_ids, targets, config, *, seed, index, rank, epoch, block_ids, **settings)`
            to a `Corruption`; see `masking.corrupt`.
        settings (`type`): A dataclass of its settings: fields with defaults and `metadata["help"]`, which become
            options of `DiffusionConfig` and its program, and a method `check`, which raises `ValueError`.
        objective (`str`): What the loss is then, as `run.json` and the model card name it.
        help (`str`): What is hidden or changed, in a line.
    """

    corrupt: Callable[..., Corruption]
    settings: type
    objective: str
    help: str

    def settings_of(self, args) -> dict:
        """Of training arguments what this way reads, by name."""
        return {field.name: getattr(args, field.name) for field in fields(self.settings)}
