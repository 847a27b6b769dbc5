"""Which positions of a block a denoising step commits: one small pure function per rule of the literature.

All take `[rows, width]` tensors of one block. Rows may hold fewer open positions than others: what is not open has
the score −∞ (or, for entropies, +∞) and is never selected. No rule draws random numbers, but for ReMDM.
"""

import torch


def commit_quota(masked: torch.Tensor, steps: torch.Tensor, step: int) -> torch.Tensor:
    """
    Tokens to commit in `step` (from 0) of a block: equal shares, the remainder one by one on the first steps (LLaDA,
    arXiv 2502.09992, its published sampler).

    Args:
        masked (`torch.LongTensor` of shape `(rows,)`): Masks of the block before its first step.
        steps (`torch.LongTensor` of shape `(rows,)`): Its steps, at most `masked`.
    """
    share, remainder = masked // steps.clamp(min=1), masked % steps.clamp(min=1)
    return (share + (step < remainder)) * (step < steps)


def commit_ratio(open_count: torch.Tensor, steps: torch.Tensor, step: int) -> torch.Tensor:
    """
    LLaDA's reverse process with its remask ratio s/t rounded at every step, as Nano-LLaDA does: of n masks
    round(n·s/t) stay, t = 1 − step / steps and s = t − 1 / steps. The last step commits the rest.

    Args:
        open_count (`torch.LongTensor` of shape `(rows,)`): Masks of the block now.
    """
    left = (steps - step).clamp(min=1)  # t and s in units of 1 / steps
    stay = (open_count * (left - 1) / left.double()).round().long()
    return (open_count - stay) * (step < steps)


def commit_ramp(masked: torch.Tensor, open_count: torch.Tensor, start_ratio: float, end_ratio: float) -> torch.Tensor:
    """
    Nano-LLaDA's growing budget: max(1, round(ratio · open)), the ratio going from `start_ratio` to `end_ratio` with
    the decided share of the block's `masked` positions.
    """
    progress = 1 - open_count.double() / masked.clamp(min=1)
    ratio = start_ratio + (end_ratio - start_ratio) * progress
    return (open_count * ratio).round().long().clamp(min=1)


def best(scores: torch.Tensor, count: torch.Tensor) -> torch.BoolTensor:
    """The `count` (`[rows]`) best-scored positions of each row; the leftmost of equals."""
    ranks = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (ranks < count[:, None]) & (scores > -torch.inf)


def above_threshold(confidence: torch.Tensor, threshold: float) -> torch.BoolTensor:
    """Every position more confident than `threshold` (Fast-dLLM, arXiv 2505.22618; LLaDA 2.0, arXiv 2512.15745)."""
    return confidence > threshold


def within_factor(confidence: torch.Tensor, factor: float) -> torch.BoolTensor:
    """
    The n most confident positions for the largest n with (n + 1)(1 − c₍ₙ₎) < `factor`, c₍ₙ₎ the n-th best confidence
    (Fast-dLLM, its factor rule after theorem 1).
    """
    ranked, order = confidence.sort(dim=1, descending=True, stable=True)
    count = torch.arange(1, ranked.shape[1] + 1, device=ranked.device)
    fits = (count + 1) * (1 - ranked) < factor  # (n + 1)(1 − c₍ₙ₎) grows with n, so these are the first n
    return torch.zeros_like(fits).scatter(1, order, fits)


def within_entropy(entropy: torch.Tensor, bound: float) -> torch.BoolTensor:
    """
    The largest set of lowest entropies with Σ H − max H ≤ `bound` nats, which bounds what the tokens say about each
    other (EB-Sampler, arXiv 2505.24857).
    """
    ranked, order = entropy.sort(dim=1, stable=True)
    others = torch.where(ranked.isinf(), torch.inf, ranked.cumsum(1) - ranked)  # the last is the largest
    return torch.zeros_like(order, dtype=torch.bool).scatter(1, order, others <= bound)


def hierarchical(confidence: torch.Tensor, threshold: float, low_threshold: float) -> torch.BoolTensor:
    """
    All above `threshold`, and of every run of neighbouring open positions its best one, if above `low_threshold`:
    commits that lie apart depend less on each other (dInfer, arXiv 2510.08666).
    """
    is_open = confidence > -torch.inf
    starts = is_open & ~torch.nn.functional.pad(is_open, (1, 0))[:, :-1]
    run = torch.where(is_open, starts.cumsum(1), 0)  # [R, W], 0 is no run
    floor = confidence.new_full((len(confidence), confidence.shape[1] + 1), -torch.inf)
    top = floor.scatter_reduce(1, run, confidence, "amax").gather(1, run)  # of the position's own run
    leader = is_open & (confidence == top) & (confidence > low_threshold)
    index = torch.arange(confidence.shape[1], device=run.device).expand_as(run)
    first = torch.full_like(floor, confidence.shape[1], dtype=torch.long)
    first = first.scatter_reduce(1, run, index.where(leader, confidence.shape[1]), "amin").gather(1, run)
    return (leader & (index == first)) | above_threshold(confidence, threshold)


def stable(confidence: torch.Tensor, divergence: torch.Tensor, threshold: float, kl_threshold: float):
    """
    Confident positions whose distribution did not move: KL to the step before below `kl_threshold` nats (KLASS, arXiv
    2511.05664, with a history of one step). `divergence` is +∞ where there was no step before.
    """
    return above_threshold(confidence, threshold) & (divergence < kl_threshold)


def remdm_rates(steps: torch.Tensor, step: int, schedule: str, eta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """
    ReMDM (arXiv 2503.00307, Eq. 5 and §4.1) on the linear schedule α_t = 1 − t: the probabilities with which a step
    t → s = t − 1 / steps masks a decided token again, and decides a masked one.

    σ ≤ σ_max = min(1, (1 − α_s) / α_t): "cap" takes min(`eta`, σ_max), "rescale" `eta`·σ_max. Whatever σ is, tokens
    are masked at s with probability 1 − α_s, and nothing is after the last step.

    Args:
        steps (`torch.LongTensor` of shape `(rows,)`): The block's steps.

    Returns:
        two `torch.DoubleTensor` of shape `(rows,)`.
    """
    left = (steps - step).clamp(min=1).double()
    masked_now, masked_next = left / steps, (left - 1) / steps  # t = 1 − α_t, and s
    visible = 1 - masked_now
    largest = torch.where(visible > 0, (masked_next / visible.clamp(min=1e-300)).clamp(max=1), 0)
    sigma = largest.clamp(max=eta) if schedule == "cap" else eta * largest
    decide = (1 - masked_next - (1 - sigma) * visible) / masked_now
    return sigma, torch.where(left > 1, decide.clamp(max=1), 1)  # the last step's rounding would leave a mask


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """`[N]`, nats."""
    return torch.special.entr(logits.softmax(-1, dtype=torch.double)).sum(-1)
