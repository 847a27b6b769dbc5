"""The forward process of masked diffusion: which tokens are hidden, and with which weight they count.

Everything is a pure function of `(seed, row index, epoch)`: no generator state is kept, so that resuming, ranks,
gradient accumulation and the batch size do not change a row's noise. A corruption returns the noisy ids, the mask
*and* the weights, drawn together (weight and mask can't disagree).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

# One stream per use, so that draws made for different purposes are independent.
STREAM_LENGTH, STREAM_RATE, STREAM_MASK, STREAM_BLOCK, STREAM_EMBEDDING, STREAM_ATTENTION = range(6)
MASK_COUNTS = ("exact", "bernoulli")
WEIGHTINGS = ("elbo", "unweighted")

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_GOLDEN_RATIO = 0.6180339887498949


def _logical_shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64 (Steele, Lea & Flood, 2014): a bijection of int64 with full avalanche."""
    x = (x ^ _logical_shift(x, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ _logical_shift(x, 27)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ _logical_shift(x, 31)


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


@dataclass(frozen=True)
class NoiseSchedule:
    """
    A noise schedule by its formula: `alpha(t)` is the probability that a token is still clean at time t in [0, 1].

    Attributes:
        formula (`str`): alpha(t), as printed in logs and model cards.
        mask_rate (`Callable`): m(t) = 1 − alpha(t), rising from m(0) = 0 to m(1) = 1.
        slope (`Callable`): m'(t) = −alpha'(t).
        time (`Callable`): the inverse of m.
        integral (`Callable`): the integral of m from 0 to t.
    """

    formula: str
    mask_rate: Callable[[torch.Tensor], torch.Tensor]
    slope: Callable[[torch.Tensor], torch.Tensor]
    time: Callable[[torch.Tensor], torch.Tensor]
    integral: Callable[[torch.Tensor], torch.Tensor]


# Two different schedules are called "cosine" in the field, so each is named by its formula here.
_HALF_PI = math.pi / 2
NOISE_SCHEDULES = {
    "linear": NoiseSchedule("1 - t", lambda t: t, torch.ones_like, lambda m: m, lambda t: t**2 / 2),
    "cosine_squared": NoiseSchedule(
        "cos(pi t / 2)^2",
        lambda t: torch.sin(_HALF_PI * t) ** 2,
        lambda t: _HALF_PI * torch.sin(math.pi * t),
        lambda m: torch.asin(m.sqrt()) / _HALF_PI,
        lambda t: t / 2 - torch.sin(math.pi * t) / (2 * math.pi),
    ),
    "one_minus_cosine": NoiseSchedule(
        "1 - cos(pi (1 - t) / 2)",
        lambda t: torch.sin(_HALF_PI * t),
        lambda t: _HALF_PI * torch.cos(_HALF_PI * t),
        lambda m: torch.asin(m) / _HALF_PI,
        lambda t: (1 - torch.cos(_HALF_PI * t)) / _HALF_PI,
    ),
}


@dataclass
class Corruption:
    """
    A corrupted batch.

    Attributes:
        noisy_input_ids (`torch.LongTensor` of shape `(batch, length)`): The ids with the masked ones replaced.
        masked_indices (`torch.BoolTensor` of shape `(batch, length)`): Where the mask token stands.
        p_mask (`torch.DoubleTensor` of shape `(batch, length)`): The probability with which each target was masked.
        weights (`torch.DoubleTensor` of shape `(batch, length)`): What each masked token's cross-entropy counts; zero
            elsewhere. Their expectation is one per target, so that a sum over the masked tokens divided by the number
            of *targets* estimates the loss per token.
    """

    noisy_input_ids: torch.Tensor
    masked_indices: torch.Tensor
    p_mask: torch.Tensor
    weights: torch.Tensor


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


def choose_smallest(
    keys: torch.Tensor, candidates: torch.Tensor, counts: torch.Tensor, blocks: torch.Tensor
) -> torch.Tensor:
    """
    The `counts` candidates with the smallest keys of each block: a uniform subset of that size.

    Args:
        keys (`torch.Tensor` of shape `(batch, length)`): Uniform numbers in [0, 1).
        candidates (`torch.BoolTensor` of shape `(batch, length)`): What may be chosen.
        counts (`torch.LongTensor` of shape `(batch, length)`): At each place, how many its block gets.
        blocks (`torch.LongTensor` of shape `(batch, length)`): The places' blocks, non-decreasing in a row.

    Returns:
        `torch.BoolTensor` of shape `(batch, length)`.
    """
    order = (torch.where(candidates, keys, 1.5) + 2 * blocks).argsort(-1)  # blocks keep their order and their places
    places = torch.arange(keys.shape[-1], device=keys.device).expand_as(order)
    start = torch.ones_like(candidates)
    start[:, 1:] = blocks[:, 1:] != blocks[:, :-1]
    first = torch.where(start, places, 0).cummax(-1).values  # [B, L]
    place = torch.empty_like(order).scatter_(-1, order, places)
    return candidates & (place - first < counts)


def block_ids_of(
    block_length: int | None,
    position_ids: torch.Tensor | None,
    document_ids: torch.Tensor | None,
    shape: tuple[int, int],
    device: torch.device | None = None,
) -> torch.Tensor | None:
    """
    The blocks of a batch as attention cuts them: at multiples of `block_length` from each document's start.

    Args:
        block_length (`int`, *optional*): `None` or 0: a row is one block, whatever it packs. (A block that is longer
            than the row still ends with its document; which of the two must not hang on the batch's padding.)
        position_ids, document_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): Positions that restart
            in each document, and documents. Without positions the cut is on the row, and a block may hold the end of
            a document and the beginning of the next.

    Returns:
        `torch.LongTensor` of shape `(batch, length)`, rising by one from block to block, or `None` for whole rows.
    """
    if not block_length:
        return None
    if position_ids is None:
        return (torch.arange(shape[1], device=device) // block_length).expand(shape)
    new = torch.zeros(shape, dtype=torch.bool, device=position_ids.device)
    block = position_ids // block_length
    new[:, 1:] = block[:, 1:] != block[:, :-1]
    if document_ids is not None:
        new[:, 1:] |= document_ids[:, 1:] != document_ids[:, :-1]
    return new.long().cumsum(-1)


def corrupt(
    input_ids: torch.Tensor,
    targets: torch.Tensor,
    mask_token_id: int,
    *,
    seed: int,
    index: torch.Tensor,
    rank: torch.Tensor,
    epoch: torch.Tensor,
    block_ids: torch.Tensor | None = None,
    mask_count: str = "exact",
    noise_schedule: str = "linear",
    weighting: str = "elbo",
    time_epsilon: float = 1e-3,
    mask_rate_band: tuple[float, float] = (0.0, 1.0),
    complementary: bool = False,
) -> Corruption:
    """
    Masks targets at a rate drawn per block and weighs them so that the loss is the bound of BD3-LM (2503.09573, Eq. 8)
    per token; with one block per row that of LLaDA (2502.09992, Eq. 3), with blocks of one token AR training.

    With t a block's stratified position, `mask_count="bernoulli"` masks each target with p = m((1−ε)t + ε) and weight
    1/p for the linear schedule (LLaDA, Algorithm 1; in general −alpha'/(1−alpha)); `"exact"` draws the number of
    masks k in 1..n of the block's n targets instead and weighs by n/k (LLaDA, Eq. 6): the same expectation, less
    variance, no block without a mask, and for the linear schedule a uniform predictor's loss is exact in every block.
    A row that is one block counts as one sequence, however many documents it packs (under a document mask the bound of
    the row is the sum of its documents').

    `weighting="unweighted"`: every masked token counts the same, one over the mean rate. This is the `random`
    mask-rate objective, which estimates ∫ 2t·ℓ(t) dt for the linear schedule (not a likelihood), and with
    `mask_rate_band` the SFT mean of LLaDA 2.0's code. The seed's time-weighted loss is `"bernoulli"` masks with
    `noise_schedule="cosine_squared"` and `weighting="elbo"`: π·cot(πt/2), of the t that drew the mask.

    `mask_rate_band` keeps rates inside [lo, hi] (BD3-LM's clipped schedules; counts: ⌈lo·n⌉..⌊hi·n⌋, at least one);
    the weights' expectation stays one per target, and the bound becomes the band's part of it.

    `complementary=True` gives each row twice, with a mask and with the complement of it among each block's targets
    (LLaDA 2.0, §4.2): each target is masked exactly once in a pair. Both copies are weighted by their own rate; to
    that end k is drawn from 0..n.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, length)`): The clean ids.
        targets (`torch.BoolTensor` of shape `(batch, length)`): What may be masked.
        index, rank, epoch (`torch.LongTensor` of shape `(batch,)`): The rows' keys, see `keyed_uniform` and
            `row_positions`.
        block_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): Blocks, see `block_ids_of`.

    Returns:
        `Corruption`, of `2 * batch` rows if `complementary`: all first masks, then all complements.

    Raises:
        `ValueError`: as `check_settings`.
    """
    check_settings(mask_count, noise_schedule, weighting, time_epsilon, mask_rate_band)
    schedule = NOISE_SCHEDULES[noise_schedule]
    blocks = block_ids if block_ids is not None else torch.zeros_like(input_ids)
    sums = _block_sums(targets, blocks)  # [B, K]
    position = _block_positions(seed, index, rank, epoch, sums, blocks)  # [B, L]
    keys = keyed_uniform(seed, index, epoch, STREAM_MASK, input_ids.shape[-1])  # [B, L]
    if mask_count == "exact":
        total = sums.gather(-1, blocks).clamp(min=1)  # [B, L]: n at each place
        law = _CountLaw(schedule, total, mask_rate_band, complementary)
        counts = law.draw(position)
        masked = choose_smallest(keys, targets, counts, blocks)
        rates = [counts / total, (total - counts) / total]
        weights = law.weights(counts, weighting)
    else:
        law = _TimeLaw(schedule, time_epsilon, mask_rate_band, complementary)
        time = law.draw(position)
        masked = targets & (keys < schedule.mask_rate(time))
        rates = [schedule.mask_rate(time), 1 - schedule.mask_rate(time)]
        weights = law.weights(time, weighting)
    masks = [masked, targets & ~masked] if complementary else [masked]
    masked = torch.cat(masks)
    return Corruption(
        noisy_input_ids=input_ids.repeat(len(masks), 1).masked_fill(masked, mask_token_id),
        masked_indices=masked,
        p_mask=torch.cat([rate * targets for rate, _ in zip(rates, masks, strict=False)]),
        weights=torch.cat([torch.where(mask, weight, 0.0) for weight, mask in zip(weights, masks, strict=False)]),
    )


def _block_sums(values: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """`[B, K]`: the sum over each block, K the row's length."""
    return torch.zeros_like(blocks).scatter_add_(-1, blocks, values.long())


def _block_positions(seed, index, rank, epoch, sums, blocks):
    """
    `[B, L]`: at each place its block's stratified position in [0, 1): frac(row position + j/K), with j the place of
    the block in a random order of the row's K blocks that hold targets.
    """
    row = row_positions(seed, rank, epoch)[:, None]  # [B, 1]
    used = sums > 0  # [B, K]
    draws = keyed_uniform(seed, index, epoch, STREAM_BLOCK, blocks.shape[-1]).masked_fill(~used, 2.0)
    order = draws.argsort(-1)
    places = torch.arange(blocks.shape[-1], device=blocks.device).expand_as(order)
    place = torch.empty_like(order).scatter_(-1, order, places)  # the blocks with targets come first
    shift = place / used.sum(-1, keepdim=True).clamp(min=1).double()
    return torch.remainder(row + shift.gather(-1, blocks), 1.0)


def check_settings(
    mask_count: str,
    noise_schedule: str,
    weighting: str,
    time_epsilon: float,
    mask_rate_band: tuple[float, float] = (0.0, 1.0),
) -> None:
    """Raises `ValueError` for names that `corrupt` does not know, and for values out of range."""
    choices = {
        "mask_count": (mask_count, MASK_COUNTS),
        "noise_schedule": (noise_schedule, tuple(NOISE_SCHEDULES)),
        "weighting": (weighting, WEIGHTINGS),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {value!r}")
    if not 0 < time_epsilon < 0.5:
        raise ValueError(f"`time_epsilon` must lie strictly between 0 and 0.5, got {time_epsilon}")
    if len(mask_rate_band) != 2 or not 0 <= mask_rate_band[0] < mask_rate_band[1] <= 1:
        raise ValueError(f"`mask_rate_band` must be two rates 0 <= lo < hi <= 1, got {list(mask_rate_band)}")


class _CountLaw:
    """
    The law of the number of masks k among n targets: `cells` values from `low` on, the schedule's shape over them.

    With w(k) = n / (positive · k · P(k)), `positive` the number of k that mask anything, the expected weight of a
    target is one, and over all of 1..n the expected loss is Σ_k (1/k) E[Σ_masked CE | k], the bound. A pair of
    complements shares the weight, where both can mask something.
    """

    def __init__(self, schedule, total, band, complementary):
        inside = 1e-9  # 0.3 · 10 is 3
        self.low = (band[0] * total - inside).ceil().long().clamp(min=0 if complementary else 1)  # [B, L]
        self.high = torch.maximum((band[1] * total + inside).floor().long(), self.low)
        self.schedule, self.total, self.cells = schedule, total, self.high - self.low + 1
        self.positive = self.high - self.low.clamp(min=1) + 1
        self.complement_positive = torch.minimum(self.high, total - 1) - self.low + 1
        self.copies = (self.positive > 0).long() + (complementary & (self.complement_positive > 0)).long()

    def draw(self, position):
        cell = (self.schedule.mask_rate(position) * self.cells).long()
        return self.low + torch.minimum(cell, self.cells - 1)

    def weights(self, counts, weighting):
        """`[B, L]` each: for the targets that k = `counts` masks, and for those that it leaves."""
        if weighting == "elbo":
            probability = self._cdf(counts - self.low + 1) - self._cdf(counts - self.low)
            means = (
                self.positive * counts * probability,
                self.complement_positive * (self.total - counts) * probability,
            )
        else:
            mean = self._mean_count()
            means = mean, self.total - mean
        return [self.total / (self.copies * mean) for mean in means]  # infinite where nothing is masked

    def _cdf(self, cell):
        return self.schedule.time((cell / self.cells.double()).clamp(0, 1))

    def _mean_count(self):
        """E[k] = low + Σ_{c>=1} P(cell >= c), from a table over the number of cells."""
        size = self.total.shape[-1] + 1
        cells = torch.arange(1, size + 1, device=self.total.device)[:, None].double()  # [C, 1]
        cell = torch.arange(1, size + 1, device=self.total.device)[None]  # [1, C]
        above = 1 - self.schedule.time((cell / cells).clamp(max=1))
        table = torch.where(cell < cells, above, 0.0).sum(-1)  # [C]
        return self.low + table[self.cells - 1]


class _TimeLaw:
    """The law of a block's time under Bernoulli masks: uniform where the mask rate lies in the band and t >= ε."""

    def __init__(self, schedule, epsilon, band, complementary):
        lo, hi = (float(schedule.time(torch.tensor(rate, dtype=torch.double))) for rate in band)
        self.schedule, self.copies = schedule, 2 if complementary else 1
        self.low, self.high = max(lo, epsilon), min(hi, 1 - epsilon if complementary else 1.0)
        if self.low >= self.high:
            raise ValueError(f"`mask_rate_band` must reach beyond `time_epsilon`, got {list(band)} and {epsilon}")

    def draw(self, position):
        return self.low + (self.high - self.low) * position

    def weights(self, time, weighting):
        """`[B, L]` each: for the targets that are masked at `time`, and for those that are not."""
        if weighting == "elbo":
            rate, scale = self.schedule.mask_rate(time), self._mean(self.schedule.mask_rate) * self.copies
            slope = self.schedule.slope(time)
            return slope / (rate * scale), slope / ((1 - rate) * scale)
        mean = self._mean(self.schedule.integral)
        return [torch.full_like(time, 1 / (self.copies * rate)) for rate in (mean, 1 - mean)]

    def _mean(self, function):
        """Mean over the band of the derivative of `function`."""
        values = function(torch.tensor([self.low, self.high], dtype=torch.double))
        return float(values[1] - values[0]) / (self.high - self.low)
