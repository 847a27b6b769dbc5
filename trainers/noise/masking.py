"""The forward process of masked diffusion: which tokens are hidden, and with which weight they count.

Everything is a pure function of `(seed, row index, epoch)`, see `keys`.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch

from nanollada.trainers.noise.blocks import block_positions, block_sums, choose_smallest
from nanollada.trainers.noise.corruption import Corruption
from nanollada.trainers.noise.keys import STREAM_MASK, keyed_uniform
from nanollada.trainers.noise.schedules import NOISE_SCHEDULES

MASK_COUNTS = ("exact", "bernoulli")
WEIGHTINGS = ("elbo", "unweighted")


@dataclass
class MaskingSettings:
    """How many targets are masked, and what each counts; see `corrupt`."""

    mask_count: Literal[MASK_COUNTS] = field(
        default="exact", metadata={"help": "exact: k of n masked, k uniform (less noise); bernoulli: the papers'."}
    )
    noise_schedule: Literal[tuple(NOISE_SCHEDULES)] = field(
        default="linear",
        metadata={"help": "By formula: " + "; ".join(f"{k}: alpha = {v.formula}" for k, v in NOISE_SCHEDULES.items())},
    )
    weighting: Literal[WEIGHTINGS] = field(
        default="elbo",
        metadata={"help": "elbo: the likelihood bound; unweighted: every masked token alike (a `random` mask rate)."},
    )
    time_epsilon: float = field(default=1e-3, metadata={"help": "Smallest time of the bernoulli masks (LLaDA's eps)."})
    mask_rate_band: list[float] = field(
        default_factory=lambda: [0.0, 1.0],
        metadata={"help": "Lowest and highest mask rate of training (BD3-LM's clipped schedules); not of evaluation."},
    )
    complementary: bool = field(
        default=False, metadata={"help": "Train each row twice, with a mask and its complement (LLaDA 2.0's SFT)."}
    )

    def check(self) -> None:
        """Raises `ValueError` for names that `corrupt` does not know, and for values out of range."""
        choices = {"mask_count": MASK_COUNTS, "noise_schedule": NOISE_SCHEDULES, "weighting": WEIGHTINGS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not 0 < self.time_epsilon < 0.5:
            raise ValueError(f"`time_epsilon` must lie strictly between 0 and 0.5, got {self.time_epsilon}")
        band = list(self.mask_rate_band)
        if len(band) != 2 or not 0 <= band[0] < band[1] <= 1:
            raise ValueError(f"`mask_rate_band` must be two rates 0 <= lo < hi <= 1, got {band}")


def corrupt(
    input_ids: torch.Tensor,
    targets: torch.Tensor,
    config,
    *,
    seed: int,
    index: torch.Tensor,
    rank: torch.Tensor | None = None,
    epoch: torch.Tensor,
    block_ids: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
    **settings,
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
        config ([`NanoLLaDAConfig`]): Of the model, for its `mask_token_id`.
        index, rank, epoch (`torch.LongTensor` of shape `(batch,)`): The rows' keys, see `keyed_uniform` and
            `row_positions`.
        block_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): Blocks, see `block_ids_of`.
        position (`torch.DoubleTensor` of shape `(batch, length)`, *optional*): The blocks' positions in [0, 1), at
            each place; by default those of `block_positions`, which needs `rank`.
        **settings: Those of `MaskingSettings`.

    Returns:
        `Corruption`, of two copies if `complementary`: all first masks, then all complements.

    Raises:
        `ValueError`: as `MaskingSettings.check`.
    """
    settings = MaskingSettings(**settings)
    settings.check()
    schedule, band, complementary = (
        NOISE_SCHEDULES[settings.noise_schedule],
        settings.mask_rate_band,
        settings.complementary,
    )
    blocks = block_ids if block_ids is not None else torch.zeros_like(input_ids)
    sums = block_sums(targets, blocks)  # [B, K]
    if position is None:
        position = block_positions(seed, index, rank, epoch, sums, blocks)  # [B, L]
    keys = keyed_uniform(seed, index, epoch, STREAM_MASK, input_ids.shape[-1])  # [B, L]
    if settings.mask_count == "exact":
        total = sums.gather(-1, blocks).clamp(min=1)  # [B, L]: n at each place
        law = _CountLaw(schedule, total, band, complementary)
        counts = law.draw(position)
        masked = choose_smallest(keys, targets, counts, blocks)
        weights = law.weights(counts, settings.weighting)
    else:
        law = _TimeLaw(schedule, settings.time_epsilon, band, complementary)
        time = law.draw(position)
        masked = targets & (keys < schedule.mask_rate(time))
        weights = law.weights(time, settings.weighting)
    masks = [masked, targets & ~masked] if complementary else [masked]
    masked, clean = torch.cat(masks), input_ids.repeat(len(masks), 1)
    return Corruption(
        noisy_input_ids=clean.masked_fill(masked, config.mask_token_id),
        labels=clean.masked_fill(~masked, -100),
        weights=torch.cat([torch.where(mask, weight, 0.0) for weight, mask in zip(weights, masks, strict=False)]),
        copies=len(masks),
    )


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
