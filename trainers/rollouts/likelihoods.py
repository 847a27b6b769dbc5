"""`ESTIMATORS`: what a policy gradient takes for the likelihood of a rollout. A new one is a function and an entry."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from nanollada.trainers.noise.blocks import block_shifts, block_sums, choose_smallest
from nanollada.trainers.noise.keys import STREAM_CONDITION, STREAM_MASK, STREAM_RATE, keyed_uniform
from nanollada.trainers.rollouts.decoding import Decoding
from nanollada.trainers.rollouts.passes import Scores, States, read
from nanollada.trainers.rollouts.replay import replay
from nanollada.trainers.rollouts.rollouts import Rollouts

PROMPT_MASK_RATE = 0.15  # d1's


@dataclass(frozen=True)
class Estimator:
    """
    A likelihood of rollouts.

    Attributes:
        score (`Callable`): `score(model, rollouts, decoding, *, steps=None, seed=0, entropy=False)` to [`Scores`].
        ratio (`str`): Whether two policies' log-probabilities have a ratio at each token, or one for the sequence.
        exact (`bool`): Whether they are the decoder's own; then a KL by their samples (k3) is one, and
            `check_replayable` must hold.
        help (`str`): What it is, in a line.
    """

    score: Callable[..., Scores]
    ratio: Literal["token", "sequence"]
    exact: bool
    help: str


def elbo(
    model,
    rollouts: Rollouts,
    decoding: Decoding,
    *,
    steps: int | None = None,
    seed: int = 0,
    entropy: bool = False,
) -> Scores:
    """
    The sequence's bound as ESPO (2512.03759) and EBPO (LLaDA 2.1, 2602.08676) take it: pieces of positions that
    sum to a Monte Carlo estimate of it, each the mean over masks of (n/k)·log p with k of a block's n decided tokens
    hidden. A piece alone is no probability: ratios are for the sequence.

    Counts are exact and stratified, in each of `steps` equal parts of 1 … n one mask. Masks depend on (seed, row key)
    alone. What was never decided stays masked; blocks are those of the model, one pass for all of them.

    Args:
        steps (`int`, *optional*): Masks of a row. By default as many as its largest block has decided tokens, one for
            each count; as many passes as a decoder has with a token a step.

    Raises:
        `ValueError`: for `steps` below 1.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}")
    blocks, decided = rollouts.blocks(decoding.grid), rollouts.decided
    masks = block_sums(decided, blocks).amax(-1)  # [B]
    masks = masks if steps is None else torch.where(masks > 0, steps, 0)
    columns = torch.arange(int(masks.max()), device=masks.device)
    draws, rows = (columns[:, None] < masks).nonzero(as_tuple=True)  # [P], draw by draw

    def states(some):
        row, canvas = rows[some], rollouts.canvas[rows[some]]
        masked, factors = draw_masks(rollouts, blocks, row, draws[some], masks[row], seed)
        noisy = canvas.masked_fill(masked, decoding.mask_token_id)
        return States(noisy, masked, canvas, factors / masks[row, None])

    pieces, entropies = read(model, rollouts, decoding, rows, states, entropy)
    return Scores(pieces, decided.to(pieces.dtype), entropies)


def draw_masks(rollouts, blocks, row, draw, draws, seed):
    """
    Masks of the decided positions: which, `[C, W]`, and by what each counts, n/k of its block.

    Args:
        rollouts ([`Rollouts`]): The rows.
        blocks (`torch.LongTensor` of shape `(batch, width)`): Their blocks.
        row, draw, draws (`torch.LongTensor` of shape `(C,)`): The mask's row, its number, and how many the row gets.
        seed (`int`): Of the noise.
    """
    keys, positions, targets = rollouts.keys[row], rollouts.positions[row], rollouts.decided[row]
    sizes = block_sums(targets, blocks[row])  # [C, U]
    total = sizes.gather(1, blocks[row]).clamp(min=1)  # [C, W]
    ahead = block_shifts(seed, keys, torch.zeros_like(keys), sizes, blocks[row])
    time = (draw[:, None] + keyed_uniform(seed, keys, draw, STREAM_RATE, 1)) / draws[:, None]
    count = torch.minimum(((time + ahead) % 1.0 * total).long(), total - 1) + 1
    noise = keyed_uniform(seed, keys, draw, STREAM_MASK, positions.shape[1]).gather(1, positions)
    return choose_smallest(noise, targets, count, blocks[row]), total.double() / count


def mean_field(
    model,
    rollouts: Rollouts,
    decoding: Decoding,
    *,
    steps: int | None = None,
    seed: int = 0,
    entropy: bool = False,
) -> Scores:
    """
    All tokens at once from an empty answer, as diffu-GRPO (d1, 2504.12216) takes it: one pass with every decided
    position masked and each prompt token hidden with probability 0.15. A model with blocks is shown the earlier ones.

    Args:
        steps (`int`, *optional*): 1, if anything.
        seed (`int`, defaults to 0): With a row's key it decides which prompt tokens are hidden.

    Raises:
        `ValueError`: for other `steps`: there is one pass.
    """
    if steps not in (None, 1):
        raise ValueError(f"`steps` must be 1 or unset for mean_field, which has one pass, got {steps}")
    keys, positions, decided = rollouts.keys, rollouts.positions, rollouts.decided
    draws = keyed_uniform(seed, keys, torch.zeros_like(keys), STREAM_CONDITION, positions.shape[1])
    hidden = rollouts.given & (draws.gather(1, positions) < PROMPT_MASK_RATE)
    clean = rollouts.canvas.masked_fill(hidden, decoding.mask_token_id)
    noisy = clean.masked_fill(decided, decoding.mask_token_id)
    rows = decided.any(1).nonzero()[:, 0]

    def states(some):
        return States(noisy[rows[some]], decided[rows[some]], clean[rows[some]])

    log_probs, entropies = read(model, rollouts, decoding, rows, states, entropy)
    return Scores(log_probs, decided.to(log_probs.dtype), entropies)


ESTIMATORS = {
    "replay": Estimator(replay, "token", True, "the decoder's own trajectory, all its steps or some"),
    "elbo": Estimator(elbo, "sequence", False, "the bound of the sequence by shared masks (ESPO, EBPO)"),
    "mean_field": Estimator(mean_field, "token", False, "one pass over an empty answer (d1's diffu-GRPO)"),
}
