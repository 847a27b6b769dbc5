"""Keyed noise: numbers that depend on (seed, row index, epoch) alone.

No generator state is kept, so that resuming, ranks, gradient accumulation and the batch size do not change a row's
noise.
"""

import torch

# One stream per use, so that draws made for different purposes are independent.
STREAM_LENGTH, STREAM_RATE, STREAM_MASK, STREAM_BLOCK, STREAM_EMBEDDING, STREAM_ATTENTION = range(6)
STREAM_STEP, STREAM_CONDITION = range(6, 8)
STREAM_EDIT_ROW, STREAM_EDIT_PLACE, STREAM_EDIT_TOKEN, STREAM_DRAFT = range(8, 12)
STREAM_EXPAND_ROW, STREAM_EXPAND_CHOICE, STREAM_EXPAND_COUNT = range(24, 27)

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_GOLDEN_RATIO = 0.6180339887498949


def _logical_shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64 (Steele, Lea & Flood, 2014): a bijection of int64 with full avalanche."""
    x = (x ^ _logical_shift(x, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ _logical_shift(x, 27)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ _logical_shift(x, 31)


def mix_keys(parts: torch.LongTensor) -> torch.LongTensor:
    """int64 numbers, scattered: for keys that hash what a row holds."""
    return _mix(parts + _GOLDEN)


def keyed_uniform(seed: int, index: torch.Tensor, epoch: torch.Tensor, stream: int, n: int) -> torch.Tensor:
    """
    Uniform numbers that depend on their key alone: counter-based, the same on every device and in every batch.

    Args:
        seed (`int`): The run's seed.
        index (`torch.LongTensor` of shape `(batch,)`): The row's number in the data.
        epoch (`torch.LongTensor` of shape `(batch,)`): The pass over the data.
        stream (`int`): What the numbers are for (`STREAM_*`).
        n (`int`): How many numbers a row gets.

    Returns:
        `torch.DoubleTensor` of shape `(batch, n)` in [0, 1).
    """
    key = _mix(torch.full_like(index, seed) + _GOLDEN)
    for part in (index, epoch, torch.full_like(index, stream)):
        key = _mix((key ^ part) + _GOLDEN)
    counter = torch.arange(1, n + 1, device=index.device) * _GOLDEN
    bits = _mix(key[:, None] + counter)  # [B, n]
    return _logical_shift(bits, 11).double() * 2.0**-53


def row_positions(seed: int, rank: torch.Tensor, epoch: torch.Tensor) -> torch.Tensor:
    """
    Stratified positions in [0, 1): frac(u₀(seed, epoch) + φ·rank), a low-discrepancy sequence over the epoch's order.

    Any run of consecutive rows is spread evenly, without a row knowing its batch mates.

    Args:
        rank (`torch.LongTensor` of shape `(batch,)`): The rows' places in the epoch's order.

    Returns:
        `torch.DoubleTensor` of shape `(batch,)`.
    """
    start = keyed_uniform(seed, torch.zeros_like(rank), epoch, STREAM_RATE, 1)[:, 0]
    return torch.remainder(start + _GOLDEN_RATIO * rank.double(), 1.0)
