"""The masks under which an answer is scored: several a row, keyed, the same for policy and reference."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nanollada.trainers.noise.blocks import block_shifts, block_sums
from nanollada.trainers.noise.corruption import Corruption
from nanollada.trainers.noise.keys import STREAM_RATE, keyed_uniform
from nanollada.trainers.noise.masking import corrupt

EVALUATION = -1  # the step in the keys of held-out pairs: their masks are always the same


@dataclass(frozen=True)
class ScoreEstimator:
    """
    A way of estimating the ELBO of an answer, as `ESTIMATORS` names it.

    Attributes:
        mask_count (`str`): As in `masking.corrupt`.
        positions (`Callable`): From `(inside, draw, draws, shifts)` to the blocks' positions in time: a uniform
            number and the draw's number, `(rows, 1)` each, the number of draws, and `block_shifts`.
        shared (`bool`): Whether policy and reference have the same masks.
        help (`str`): In a line.
    """

    mask_count: str
    positions: Callable
    shared: bool
    help: str


ESTIMATORS: dict[str, ScoreEstimator] = {
    "elbo": ScoreEstimator(
        "exact",
        lambda inside, draw, draws, shifts: ((draw + inside) / draws + shifts) % 1.0,
        shared=True,
        help="counts of masked tokens in even strata, the same masks for policy and reference (VRPO)",
    ),
    "naive": ScoreEstimator(
        "bernoulli",
        lambda inside, draw, draws, shifts: inside.expand_as(shifts),
        shared=False,
        help="Bernoulli masks at a random rate, others for the reference, for comparison",
    ),
}


def draw_masks(
    input_ids: torch.LongTensor,
    targets: torch.BoolTensor,
    config,
    *,
    estimator: str,
    draws: int,
    seed: int,
    index: torch.LongTensor,
    step: int,
    block_ids: torch.LongTensor | None = None,
    reference: bool = False,
) -> Corruption:
    """
    Several corruptions of each row, of weights whose labels' mean cross-entropy is the bound of the row's targets.

    They depend on `(seed, row, draw, step)` alone. "elbo" cuts [0, 1) into `draws` strata and takes a position from
    each: k of a block's n targets are masked and weigh n/k (LLaDA, 2502.09992, Eq. 6), and over the draws the counts
    are spread evenly over 1..n, with n draws each of them once. A row's blocks stand evenly apart, so that all have
    their share of every stratum. "naive" is the papers' Algorithm: for each draw a time t for the row, each target
    masked with probability t and weighed by 1/t.

    Args:
        input_ids (`torch.LongTensor` of shape `(rows, length)`): The clean ids.
        targets (`torch.BoolTensor` of shape `(rows, length)`): The answers.
        config ([`NanoLLaDAConfig`]): Of the model.
        estimator (`str`): One of `ESTIMATORS`.
        draws (`int`): Masks per row.
        index (`torch.LongTensor` of shape `(rows,)`): The rows' keys, not negative.
        step (`int`): Of the run, or any number that stays the same for the same masks.
        block_ids (`torch.LongTensor` of shape `(rows, length)`, *optional*): See `block_ids_of`.
        reference (`bool`): Whether the masks are the reference's.

    Returns:
        `Corruption` of `draws * rows` rows: first all rows with their first mask.
    """
    law = ESTIMATORS[estimator]
    if reference and not law.shared:
        index = -1 - index  # keys that no row of a policy has
    blocks = torch.zeros_like(input_ids) if block_ids is None else block_ids
    shifts = block_shifts(seed, index, torch.full_like(index, step), block_sums(targets, blocks), blocks)  # [R, L]
    draw = torch.arange(draws, device=index.device).repeat_interleave(len(index))  # [D·R]
    row, key = index.repeat(draws), step * draws + draw
    inside = keyed_uniform(seed, row, key, STREAM_RATE, 1)  # [D·R, 1]
    return corrupt(
        input_ids.repeat(draws, 1),
        targets.repeat(draws, 1),
        config,
        seed=seed,
        index=row,
        epoch=key,
        block_ids=blocks.repeat(draws, 1),
        position=law.positions(inside, draw[:, None], draws, shifts.repeat(draws, 1)),
        mask_count=law.mask_count,
    )
