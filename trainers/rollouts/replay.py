"""The likelihood of a decoder's own trajectory, step by step: what it wrote, given what it saw when it wrote it."""

import torch

from nanollada.trainers.noise.keys import STREAM_STEP, keyed_uniform
from nanollada.trainers.rollouts.decoding import Decoding
from nanollada.trainers.rollouts.passes import Scores, States, read
from nanollada.trainers.rollouts.rollouts import Rollouts


def replay(
    model,
    rollouts: Rollouts,
    decoding: Decoding,
    *,
    steps: int | None = None,
    seed: int = 0,
    entropy: bool = False,
) -> Scores:
    """
    log π(y | x) = Σ_k Σ_{i ∈ S_k} log p(y_i | s_{k−1}) of the decoder that wrote y, S_k its choice of positions in
    step k and s_{k−1} the row before it.

    Where S_k is a function of the state (`check_replayable`), rows and trajectories are one to one, and π sums to 1
    over all rows. Where positions are drawn at random, this is the likelihood given the order; the order's law holds
    no parameter, so the gradient is the same. d2 (2509.21474) and TraceRL (2509.06949) score traces, too.

    All steps take one forward pass each. With `steps` = n, a row's n steps are drawn without replacement and stand for
    its K: `weights` is K/n, the sum is unbiased, and log-probabilities are exact where they are computed. A model with
    blocks reads step k of all blocks in one pass, and n steps are drawn for each block. With a gradient, all passes'
    activations live until the backward pass.

    Args:
        model (`Callable`): The masked-diffusion model, or a wrapper around it.
        rollouts ([`Rollouts`]): What it, or an earlier one, wrote.
        decoding ([`Decoding`]): How.
        steps (`int`, *optional*): n. All by default.
        seed (`int`, defaults to 0): With a row's key it decides which: every policy replays the same ones.
        entropy (`bool`, defaults to `False`): Whether to compute entropies.

    Raises:
        `ValueError`: for `steps` below 1.
    """
    present = steps_of(rollouts, decoding)
    chosen = present if steps is None else sample_steps(present, rollouts.keys, steps, seed)
    return replay_steps(model, rollouts, decoding, chosen, entropy)


def steps_of(rollouts: Rollouts, decoding: Decoding) -> torch.BoolTensor:
    """`(batch, blocks, steps)`: in which of the row's steps each block was decided; whole rows are one block."""
    blocks, steps = rollouts.blocks(decoding.grid), rollouts.commit_steps
    present = torch.zeros(len(steps), int(blocks.max()) + 1, max(int(steps.max()) + 1, 1), dtype=torch.bool)
    present = present.to(steps.device)
    row, column = rollouts.decided.nonzero(as_tuple=True)
    present[row, blocks[row, column], steps[row, column]] = True
    return present


def sample_steps(present: torch.BoolTensor, keys: torch.LongTensor, steps: int, seed: int) -> torch.BoolTensor:
    """`(batch, blocks, steps)`: a uniform subset of at most `steps` of each block's steps, by the rows' keys."""
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}")
    rows, blocks, width = present.shape
    block = torch.arange(blocks, device=keys.device).repeat(rows)
    draws = keyed_uniform(seed, keys.repeat_interleave(blocks), block, STREAM_STEP, width).view(present.shape)
    return present & (draws.masked_fill(~present, 2.0).argsort(-1).argsort(-1) < steps)


def replay_steps(
    model, rollouts: Rollouts, decoding: Decoding, chosen: torch.BoolTensor, entropy: bool = False
) -> Scores:
    """
    As `replay`, of the `chosen` steps, `(batch, blocks, steps)`: each state is the canvas with all masked that was
    decided in this step of its block or later.
    """
    blocks, commits = rollouts.blocks(decoding.grid), rollouts.commit_steps
    never = chosen.shape[2]
    row, block, step = chosen.nonzero(as_tuple=True)
    passes = chosen.sum(-1)  # [B, U]
    table = torch.full((*passes.shape, max(int(passes.max()), 1)), never, device=commits.device)
    table[row, block, (chosen.cumsum(-1) - 1)[row, block, step]] = step  # [B, U, J], the steps that a pass replays
    number, rows = (table < never).any(1).T.nonzero(as_tuple=True)  # [P], pass by pass

    def states(some):
        at = table[rows[some], :, number[some]].gather(1, blocks[rows[some]])  # [C, W]
        canvas, commit = rollouts.canvas[rows[some]], commits[rows[some]]
        return States(canvas.masked_fill(commit >= at, decoding.mask_token_id), commit == at, canvas)

    log_probs, entropies = read(model, rollouts, decoding, rows, states, entropy)
    scored = rollouts.decided & chosen[torch.arange(len(blocks), device=blocks.device)[:, None], blocks, commits]
    share = steps_of(rollouts, decoding).sum(-1) / passes.clamp(min=1)  # [B, U]
    weights = share.gather(1, blocks).to(log_probs.dtype).masked_fill(~scored, 0)
    return Scores(log_probs, weights, entropies)
