"""The head and its loss in one: cross-entropy of a linear layer's logits, which are never all in memory.

The logits of a chunk of tokens live until their loss and both gradients are taken, then the next chunk has their place
(the idea of Cut Cross-Entropy, arXiv 2411.09009, and of Liger's fused linear cross-entropy, arXiv 2410.10989, in plain
torch). The gradients are taken in the forward pass, so the backward pass computes no logits again.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# The logit of a token that must not be predicted. Finite, so that differences of two such logits, as in guidance, are
# numbers; so low that its probability is exactly 0 in every dtype: float64's numbers end at exp(-746).
FLOOR = -1e4
# Logits of a chunk, in elements. On the CPU they stay in the cache; a GPU wants large products and has the memory.
_CHUNK_LOGITS = {"cpu": 2**21, "other": 2**26}


@torch.compiler.disable  # the number of tokens depends on the data: better one known graph break than a recompilation
def linear_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.LongTensor,
    weights: torch.Tensor | None = None,
    suppressed_token_ids: Sequence[int] = (),
    chunk_size: int | None = None,
) -> torch.Tensor:
    """
    Σ weights · cross-entropy(hidden_states @ weightᵀ, targets), in nats.

    The products run in the autocast type where autocast is on, as `F.linear` would; softmax and loss in float32 or
    better, and the gradient of `weight` is accumulated there. Differentiable once.

    Args:
        hidden_states (`torch.FloatTensor` of shape `(tokens, hidden_size)`): What goes into the head. May be empty.
        weight (`torch.FloatTensor` of shape `(vocab_size, hidden_size)`): The head's matrix; without a bias.
        targets (`torch.LongTensor` of shape `(tokens,)`): The right tokens.
        weights (`torch.Tensor` of shape `(tokens,)`, *optional*): Their weights; one each by default.
        suppressed_token_ids (`Sequence[int]`, *optional*): The tokens whose logit is −inf: they get no probability and
            no gradient. As a target their loss is infinite.
        chunk_size (`int`, *optional*): Tokens per chunk. By default as many as keep the logits of a chunk in a CPU's
            cache, and on other devices as many as fill them.

    Returns:
        `torch.Tensor`: a scalar, float32 or better.

    Raises:
        `ValueError`: for shapes that don't fit together, and for a `chunk_size` below 1.
    """
    tokens = hidden_states.shape[:1]
    if hidden_states.dim() != 2 or weight.dim() != 2 or hidden_states.shape[1] != weight.shape[1]:
        raise ValueError(
            "`hidden_states` must be (tokens, hidden_size) and `weight` (vocab_size, hidden_size), "
            f"got {tuple(hidden_states.shape)} and {tuple(weight.shape)}"
        )
    for name, tensor in (("targets", targets), ("weights", weights)):
        if tensor is not None and tensor.shape != tokens:
            raise ValueError(f"`{name}` must have the shape {tuple(tokens)}, got {tuple(tensor.shape)}")
    if chunk_size is None:
        chunk_size = default_chunk_size(weight.shape[0], hidden_states.device.type)
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be >= 1, got {chunk_size}")
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
    if hidden_states.dtype == torch.float64:
        dtype = torch.float64  # autocast leaves it alone
    if weights is None:
        weights = hidden_states.new_ones(tokens, dtype=torch.float32)
    # inside the function grad mode is always off, so whether gradients are wanted is decided here
    wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden_states, weight)]
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(
            hidden_states, weight, targets, weights, suppressed_token_ids, chunk_size, dtype, wanted
        )


def default_chunk_size(vocab_size: int, device_type: str) -> int:
    """Tokens per chunk (a multiple of 64, if more than one such): see `linear_cross_entropy`."""
    rows = _CHUNK_LOGITS.get(device_type, _CHUNK_LOGITS["other"]) // vocab_size
    return max(64, rows // 64 * 64)


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients chunk by chunk; the backward pass only scales the gradients."""

    @staticmethod
    def forward(ctx, hidden_states, weight, targets, weights, suppressed_token_ids, chunk_size, dtype, wanted):
        exact = torch.promote_types(dtype, torch.float32)
        # float16 has no room for small probabilities, and a loss scale comes only after these products
        product = torch.float32 if dtype == torch.float16 else dtype
        head = weight.to(dtype)  # [V, hidden]
        losses = torch.empty(targets.shape, dtype=exact, device=weight.device)  # [N]
        weights = weights.to(exact)
        d_hidden = torch.empty_like(hidden_states, dtype=exact) if wanted[0] else None  # [N, hidden]
        d_weight = torch.zeros_like(weight, dtype=exact) if wanted[1] else None  # [V, hidden]
        for start in range(0, len(targets), chunk_size):
            chunk = slice(start, start + chunk_size)
            hidden = hidden_states[chunk].to(dtype)  # [C, hidden]
            logits = F.linear(hidden, head)  # [C, V]
            for token_id in suppressed_token_ids:
                logits[:, token_id] = -torch.inf
            log_probs = logits.log_softmax(-1, dtype=exact)
            del logits
            target = targets[chunk, None]  # [C, 1]
            losses[chunk] = -log_probs.gather(1, target)[:, 0]
            if not any(wanted):
                continue
            slope = log_probs.exp_()  # of the loss, by logit: probability − [is the target]
            slope.scatter_add_(1, target, slope.new_full((), -1).expand_as(target))
            slope = slope.to(product)
            # the weights go onto the short rows of `hidden`, not onto the long ones of the logits
            scale = weights[chunk, None]  # [C, 1]
            if wanted[0]:
                torch.mul(slope @ head.to(product), scale, out=d_hidden[chunk])
            if wanted[1]:
                d_weight += slope.T @ (hidden * scale).to(product)
        ctx.save_for_backward(losses, d_hidden, d_weight)
        return (losses * weights).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        losses, d_hidden, d_weight = ctx.saved_tensors
        d_hidden, d_weight = (None if slope is None else slope * gradient for slope in (d_hidden, d_weight))
        return d_hidden, d_weight, None, losses * gradient if ctx.needs_input_grad[3] else None, *[None] * 4


@torch.compiler.disable  # how many positions have a weight depends on the data: one known graph break
def weighted_head_loss(
    head: nn.Module,
    hidden_states: torch.Tensor,
    labels: torch.LongTensor,
    weights: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    suppressed_token_ids: Sequence[int] = (),
) -> torch.Tensor:
    """
    Σ weight·CE / `num_items_in_batch` (default: the number of labels) without logits of all positions in memory.

    Args:
        head (`nn.Module`): The LM head. One that is no plain `nn.Linear` (an adapter around it) is called as it is.
        hidden_states (`torch.FloatTensor` of shape `(batch, length, hidden_size)`): Where each label is predicted.
        labels (`torch.LongTensor` of shape `(batch, length)`): The tokens there; −100 is none.
        weights (`torch.Tensor` of shape `(batch, length)`): Their weights; zero leaves a position out.
        suppressed_token_ids (`Sequence[int]`, *optional*): The tokens that are never predicted.
    """
    keep = (weights != 0) & (labels != -100)
    hidden_states, targets, weights = hidden_states[keep], labels[keep], weights[keep]  # [N, hidden], [N], [N]
    if type(head) is nn.Linear and head.bias is None:
        loss = linear_cross_entropy(hidden_states, head.weight, targets, weights, suppressed_token_ids)
    else:
        logits = head(hidden_states)  # [N, V]
        for token_id in suppressed_token_ids:
            logits[..., token_id] = -torch.inf
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = nn.functional.cross_entropy(logits, targets, reduction="none")
        loss = (losses * weights.to(losses.dtype)).sum()
    return loss / (num_items_in_batch if num_items_in_batch is not None else (labels != -100).sum())
