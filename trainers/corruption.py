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
STREAM_LENGTH, STREAM_RATE, STREAM_MASK = 0, 1, 2
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


def choose_smallest(keys: torch.Tensor, candidates: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The `counts[b]` candidates with the smallest keys in each row: a uniform subset of that size. `[B, L]` bool."""
    order = keys.masked_fill(~candidates, torch.inf).argsort(-1)  # [B, L]
    places = torch.arange(keys.shape[-1], device=keys.device).expand_as(order)
    place = torch.empty_like(order).scatter_(-1, order, places)
    return candidates & (place < counts[:, None])


def corrupt(
    input_ids: torch.Tensor,
    targets: torch.Tensor,
    mask_token_id: int,
    *,
    seed: int,
    index: torch.Tensor,
    rank: torch.Tensor,
    epoch: torch.Tensor,
    mask_count: str = "exact",
    noise_schedule: str = "linear",
    weighting: str = "elbo",
    time_epsilon: float = 1e-3,
) -> Corruption:
    """
    Masks targets at a rate drawn per row and weighs them so that the loss is the bound of LLaDA (Eq. 3) per token.

    With t the row's stratified position, `mask_count="bernoulli"` masks each target with p = m((1−ε)t + ε) and weight
    1/p for the linear schedule (LLaDA, Algorithm 1; in general −alpha'/(1−alpha)); `"exact"` draws the number of
    masks k in 1..L instead and weighs by L/k (Eq. 6): the same expectation, less variance, and for the linear schedule
    a uniform predictor's loss is exact in every row. A row counts as one sequence of `L` targets, however many
    documents it packs (under a document mask the bound of the row is the sum of its documents').

    `weighting="unweighted"` is the `random` mask-rate objective: every masked token counts the same (one over the mean
    rate), which estimates ∫ 2t·ℓ(t) dt for the linear schedule: not a likelihood.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, length)`): The clean ids.
        targets (`torch.BoolTensor` of shape `(batch, length)`): What may be masked.
        index, rank, epoch (`torch.LongTensor` of shape `(batch,)`): The rows' keys, see `keyed_uniform` and
            `row_positions`.

    Returns:
        `Corruption`

    Raises:
        `ValueError`: for an unknown `mask_count`, `noise_schedule` or `weighting`, and for `time_epsilon` outside
            (0, 1).
    """
    check_settings(mask_count, noise_schedule, weighting, time_epsilon)
    schedule = NOISE_SCHEDULES[noise_schedule]
    position = row_positions(seed, rank, epoch)  # [B]
    keys = keyed_uniform(seed, index, epoch, STREAM_MASK, input_ids.shape[-1])  # [B, L]
    if mask_count == "exact":
        length = targets.sum(-1).clamp(min=1)  # [B]
        counts = (schedule.mask_rate(position) * length).long().clamp(max=length - 1) + 1  # [B], in 1..L
        masked = choose_smallest(keys, targets, counts)
        rate = counts / length.double()
        weight = _exact_count_weights(schedule, counts, length, weighting)
    else:
        time = (1 - time_epsilon) * position + time_epsilon
        rate = schedule.mask_rate(time)
        masked = targets & (keys < rate[:, None])
        weight = _bernoulli_weights(schedule, time, time_epsilon, weighting)
    return Corruption(
        noisy_input_ids=input_ids.masked_fill(masked, mask_token_id),
        masked_indices=masked,
        p_mask=rate[:, None] * targets,
        weights=weight[:, None] * masked,
    )


def check_settings(mask_count: str, noise_schedule: str, weighting: str, time_epsilon: float) -> None:
    """Raises `ValueError` for settings that `corrupt` does not know."""
    choices = {
        "mask_count": (mask_count, MASK_COUNTS),
        "noise_schedule": (noise_schedule, tuple(NOISE_SCHEDULES)),
        "weighting": (weighting, WEIGHTINGS),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {value!r}")
    if not 0 < time_epsilon < 1:
        raise ValueError(f"`time_epsilon` must lie strictly between 0 and 1, got {time_epsilon}")


def _exact_count_weights(schedule, counts, length, weighting):
    """`[B]`: L/k for the bound; with a schedule, k is not uniform and its probability is divided out."""
    time, length = schedule.time, length.double()
    if weighting == "elbo":
        probability = time(counts / length) - time((counts - 1) / length)
        return 1 / (counts * probability)
    steps = torch.arange(int(length.max()), device=counts.device, dtype=torch.double)  # [Lmax]
    before = (steps / length[:, None]).clamp(max=1)  # [B, Lmax]
    mean_count = length - (time(before) * (steps < length[:, None])).sum(-1)  # E[k] by summation by parts
    return length / mean_count


def _bernoulli_weights(schedule, time, time_epsilon, weighting):
    """`[B]`: −alpha'/(1−alpha) at `time`, scaled so that the expected weight of a target is one with ε > 0 as well."""
    epsilon, one = time.new_tensor(time_epsilon), time.new_tensor(1.0)
    if weighting == "elbo":
        mean = (one - schedule.mask_rate(epsilon)) / (1 - epsilon)
        return schedule.slope(time) / (schedule.mask_rate(time) * mean)
    mean_rate = (schedule.integral(one) - schedule.integral(epsilon)) / (1 - epsilon)
    return torch.ones_like(time) / mean_rate
