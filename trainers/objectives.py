"""Losses as pure functions of logits: sums over tokens, to be divided by the step's number of *targets*."""

import torch
from torch.nn import functional as F


def token_cross_entropy(logits: torch.Tensor, targets: torch.LongTensor) -> torch.Tensor:
    """
    Cross-entropy of each token in nats, in float32 or better.

    Args:
        logits (`torch.FloatTensor` of shape `(tokens, vocab_size)`): Scores, finite also for what can't be predicted.
        targets (`torch.LongTensor` of shape `(tokens,)`): The right tokens.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return F.cross_entropy(logits, targets, reduction="none")  # [N]


def weighted_loss(
    logits: torch.Tensor,
    targets: torch.LongTensor,
    weights: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | int,
) -> torch.Tensor:
    """
    Σ weight·CE / `num_items_in_batch`: the one reduction of the package, for AR (weight 1) and diffusion alike.

    The denominator is the number of target tokens of the whole optimizer step, over accumulation and ranks, so that
    the gradient does not depend on how the step was split. It is never the number of masked tokens: that ratio
    estimates another objective, ∫ 2t·ℓ(t) dt.

    Args:
        logits (`torch.FloatTensor` of shape `(tokens, vocab_size)`): Scores at the supervised positions only.
        targets (`torch.LongTensor` of shape `(tokens,)`): The right tokens there.
        weights (`torch.Tensor` of shape `(tokens,)`, *optional*): Their weights; one each by default.
        num_items_in_batch (`torch.Tensor` or `int`): Target tokens of the optimizer step.
    """
    losses = token_cross_entropy(logits, targets)  # [N]
    if weights is not None:
        losses = losses * weights.to(losses.dtype)
    return losses.sum() / num_items_in_batch


def confidence_entropy(
    logits: torch.Tensor, targets: torch.LongTensor, rows: torch.LongTensor, row_targets: torch.Tensor
) -> torch.Tensor:
    """
    Entropy of what is predicted rightly: the confidence-aware loss (CAP) of LLaDA 2.0 (2512.15745, §4.2).

    In each row the mean entropy, in nats, over the masked tokens whose argmax is right; others have no gradient, and
    neither has the choice itself. A row without one gives 0. Rows count by their targets, so that the loss does not
    depend on how an optimizer step was split.

    Args:
        logits (`torch.FloatTensor` of shape `(tokens, vocab_size)`): Scores at the masked positions.
        targets (`torch.LongTensor` of shape `(tokens,)`): The right tokens.
        rows (`torch.LongTensor` of shape `(tokens,)`): The row of each.
        row_targets (`torch.Tensor` of shape `(rows,)`): Target tokens of each row.

    Returns:
        `torch.Tensor`: the sum over rows, to be divided by the step's targets like every loss.
    """
    right = logits.argmax(-1) == targets
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    log_probs = logits[right].log_softmax(-1)  # [C, V]
    probs = logits[right].softmax(-1)
    entropy = -(probs * log_probs).sum(-1)  # [C]
    count = torch.zeros_like(row_targets, dtype=entropy.dtype).index_add_(0, rows[right], torch.ones_like(entropy))
    weight = row_targets.to(entropy.dtype) / count.clamp(min=1)
    return (entropy * weight[rows[right]]).sum()


def repetition_unlikelihood(
    logits: torch.Tensor, noisy_input_ids: torch.LongTensor, labels: torch.LongTensor, min_run: int = 2
) -> torch.Tensor:
    """
    Unlikelihood (Welleck et al., 2019) of runs that the model itself would write.

    The draft is what the model would commit now: its argmax where a label stands, and what it reads elsewhere. A
    label's position is penalised with −log(1 − p(draft token)) if it ends a run of at least `min_run` equal draft
    tokens *and* the draft token is wrong there. Right repeats ("ha ha") are never pushed down.

    Args:
        logits (`torch.FloatTensor` of shape `(tokens, vocab_size)`): Scores where labels stand.
        noisy_input_ids (`torch.LongTensor` of shape `(batch, length)`): What the model reads.
        labels (`torch.LongTensor` of shape `(batch, length)`): The right tokens, and −100.
        min_run (`int`, defaults to 2): Shortest run that counts.

    Returns:
        `torch.Tensor`: the sum over penalised positions, to be divided by the step's targets like every loss.
    """
    draft, supervised = noisy_input_ids.clone(), labels != -100
    draft[supervised] = logits.argmax(-1)
    run = torch.ones_like(draft, dtype=torch.bool)  # whether the last `min_run` draft tokens are equal, at each place
    for distance in range(1, min_run):
        same = torch.zeros_like(run)
        same[:, distance:] = draft[:, distance:] == draft[:, :-distance]
        run = run & same
    penalised = (run & (draft != labels))[supervised]  # [N]
    log_probs = logits[penalised].log_softmax(-1)
    chosen = log_probs.gather(-1, draft[supervised][penalised][:, None])[:, 0]
    # log(1 − p) by log1p, away from p = 1, where it has no gradient worth taking
    return -torch.log1p(-chosen.exp().clamp(max=1 - 1e-6)).sum()
