"""What the first steps after an AR start do to the model beside masking: noise on embeddings, a growing attention."""

import contextlib

import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import pad


@contextlib.contextmanager
def noisy_embeddings(model, noise: torch.FloatTensor | None):
    """
    Within it, `noise` (`[B, L, hidden]`, or `None`) is added to the embeddings of the first L positions that a model
    reads: the noisy half.
    """

    def add(module, args, embeddings):
        return embeddings + pad(noise.to(embeddings.dtype), (0, 0, 0, embeddings.shape[1] - noise.shape[1]))

    handle = None if noise is None else model.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def partly_causal_mask(
    visible_future: torch.BoolTensor,
    config,
    dtype: torch.dtype,
    attention_mask: torch.Tensor | None = None,
    document_ids: torch.LongTensor | None = None,
):
    """
    The `attention_mask`, `[B, 1, L, L]` or a `BlockMask`, of a query that sees, of the keys behind it, the visible
    ones alone (attention annealing, DiffuLLaMA, 2410.17891, §3.2).

    Args:
        visible_future (`torch.BoolTensor` of shape `(batch, length, length)`): By query and key.
        config, dtype: The model's: the attention implementation says what form a mask has.
        attention_mask, document_ids (`torch.Tensor` of shape `(batch, length)`, *optional*): Padding and documents.

    Raises:
        `ValueError`: for an attention implementation that takes no such mask (flash attention).
    """
    implementation = config._attn_implementation
    if implementation not in ("sdpa", "eager", "flex_attention"):
        raise ValueError(
            "`attn_implementation` must be 'sdpa', 'eager' or 'flex_attention' while attention is annealed, "
            f"got {implementation!r}"
        )
    visible = visible_future | torch.ones_like(visible_future).tril()
    if document_ids is not None:
        visible &= document_ids[:, :, None] == document_ids[:, None]
    if attention_mask is not None:
        visible &= attention_mask.bool()[:, None]
    visible = visible | torch.eye(visible.shape[1], dtype=torch.bool, device=visible.device)
    if implementation == "flex_attention":
        batch, length = visible.shape[:2]
        padded = pad(visible, (0, -length % 128, 0, -length % 128))  # the kernel's blocks reach behind the row

        def rule(row, head, query, key):
            return padded[row, query, key]

        return create_block_mask(rule, batch, None, length, length, visible.device)
    visible = visible[:, None]
    if implementation == "sdpa":
        return visible
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
