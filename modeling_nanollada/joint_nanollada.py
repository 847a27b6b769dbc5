"""LLaDA 2.1's decoding loop (arXiv 2602.08676; `JointThreshold` in SGLang): a step fills masks and replaces tokens.

All edits of a step are made at once, each on the evidence of tokens that others replace. So steps may go in circles,
and what ends them is a budget.
"""

import torch

from .commit_nanollada import above_threshold, best
from .rule_nanollada import Decision, Step


def joint(step: Step, sampler) -> Decision:
    """The rule "joint"; it remembers the steps of a block that found no mask, `[B]`."""
    settings, memory = sampler.settings, sampler.memory
    if step.index == 0:
        memory["passes"] = step.rows.new_zeros(sampler.block_shape[0])
    logits = step.logits
    if settings.joint_penalty:
        logits = less_of_the_one_before(logits, step.before[step.read], settings.joint_penalty)
    tokens, probability = likeliest(logits, step.read)
    new = joint_step(
        step.ids, step.active, step.read, tokens, probability, settings.joint_threshold, settings.joint_edit_threshold
    )
    memory["passes"][step.rows] += ~step.active.any(1)
    spent = memory["passes"][step.rows] > settings.max_post_steps
    new = step.ids.where(spent[:, None], new)
    return Decision(rewritten=new, finished=(new == step.ids).all(1))


def joint_step(ids, masked, block, tokens, probability, threshold: float, edit_threshold: float) -> torch.LongTensor:
    """
    The new ids, `[R, w]`: masks get the tokens that are likelier than `threshold`, or else the surest one does;
    visible tokens of the block give way to any other that is likeliest, and likelier than `edit_threshold`.

    Args:
        ids (`torch.LongTensor` of shape `(rows, width)`): The tokens now.
        masked, block (`torch.BoolTensor` of shape `(rows, width)`): The masks; all that is generated in the block.
        tokens, probability (`torch.Tensor` of shape `(rows, width)`): The likeliest token of each position.
    """
    confidence = probability.masked_fill(~masked, -torch.inf)
    commits = above_threshold(confidence, threshold)
    commits = commits | best(confidence, (~commits.any(1)).long())
    edits = block & ~masked & (tokens != ids) & (probability > edit_threshold)
    return tokens.where(commits | edits, ids)


def less_of_the_one_before(logits, before, penalty: float) -> torch.FloatTensor:
    """`[N, V]`: `penalty` off the logit of the token that stands `before` each position, `[N]`, −1 being none."""
    cost = (penalty * (before >= 0)).to(logits.dtype)
    return logits.scatter_add(1, before.clamp(min=0)[:, None], -cost[:, None])


def likeliest(logits, read) -> tuple[torch.LongTensor, torch.DoubleTensor]:
    """The likeliest token and its probability, both on the places `read`, `[R, w]`, of the `logits`, `[N, V]`."""
    logits = logits.double()  # float32 would tie what is nearly certain
    highest, tokens = logits.max(-1)
    probability = (highest - logits.logsumexp(-1)).exp()
    return on_places(tokens, read, 0), on_places(probability, read, 0.0)


def on_places(values, read, fill) -> torch.Tensor:
    """Values of the N positions `read`, on their places, `[R, w]`."""
    return values.new_full(read.shape, fill).masked_scatter(read, values)
