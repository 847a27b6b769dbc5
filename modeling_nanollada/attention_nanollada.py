"""Who may attend to whom: every attention mask of the package, from documents, blocks, halves and padding.

One rule serves all: a query sees a key if both belong to the same document, if the key's block does not come after the
query's, and if the key is no padding. AR is the rule with blocks of one token (plain causal attention), LLaDA 1.0 and
MDLM the rule with one block, block diffusion everything between. Training on blocks runs on a noisy and a clean half
at once: a noisy block sees itself and the clean blocks before it.

A rule is a function of (batch, head, query, key) indices, written once: FlexAttention compiles it, and the dense mask
of the other implementations is its value on all indices.
"""

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import and_masks, create_bidirectional_mask, create_causal_mask

from .versions_nanollada import CACHE


def create_attention_mask(
    config,
    inputs_embeds: torch.Tensor,
    *,
    is_causal: bool,
    block_length: int | None = None,
    attention_mask: torch.Tensor | None = None,
    document_ids: torch.LongTensor | None = None,
    position_ids: torch.LongTensor | None = None,
    cache: Cache | None = None,
    clean_half: bool = False,
):
    """
    The mask for transformers' attention interface, in the form that `config._attn_implementation` takes.

    Args:
        config ([`NanoLLaDAConfig`]): Only its attention implementation is read.
        inputs_embeds (`torch.FloatTensor` of shape `(batch, query_length, hidden_size)`): Gives sizes and device.
        is_causal (`bool`): Token-causal attention (AR). Otherwise blocks decide.
        block_length (`int`, *optional*): Block length of the block-causal rule; blocks are cut at multiples of it from
            each document's start, by `position_ids`. `None` or a block that covers every position: full attention.
        attention_mask (`torch.Tensor` of shape `(batch, key_length)`, *optional*): 1 for tokens, 0 for padding. A
            mask of four dimensions is taken as it is.
        document_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): Documents of a packed row; attention
            stays inside one.
        position_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): Positions inside the document.
        cache (`Cache`, *optional*): Keys that come before the queries.
        clean_half (`bool`, defaults to `False`): The queries are a noisy half and, behind it, the clean one
            (`query_length = 2 * length`; the other arguments describe one half). The mask is that of BD3-LM
            (2503.09573, §3.2) and LLaDA 2.0 (2512.15745, Eq. 2): noisy → noisy inside a block, noisy → clean to the
            blocks before, clean → clean block-causal, clean → noisy never.

    Returns:
        `torch.Tensor`, `BlockMask` or `None` (nothing is hidden, or the kernel does plain causal attention itself).

    Raises:
        `ValueError`: for documents or blocks with an attention implementation that can't express them (flash
            attention), and for documents together with a cache.
    """
    if attention_mask is not None and len(attention_mask.shape) == 4:  # a `BlockMask`, too, has a shape
        return attention_mask
    past_length = cache.get_seq_length() if cache is not None else 0
    rules = []
    if document_ids is not None:
        if past_length:
            raise ValueError(
                "`document_ids` mark packed rows, which have no past: the cache must be empty, "
                f"got {past_length} cached tokens"
            )
        rules.append(_same_document(document_ids))
    if not is_causal and block_length is not None:
        # A block without padding behind whole cached blocks sees every key.
        offset = past_length % block_length if past_length and attention_mask is None else block_length
        if offset + inputs_embeds.shape[1] > block_length:
            positions = _key_positions(inputs_embeds, attention_mask, position_ids, past_length, clean_half)  # [B, K]
            rules.append((_noisy_and_clean if clean_half else _block_causal)(positions // block_length))
    if rules and config._attn_implementation.startswith(("flash", "kernels-community")):
        raise ValueError(
            "`attn_implementation` must be 'sdpa', 'eager' or 'flex_attention' for packed documents and for blocks, "
            f"got {config._attn_implementation!r}"
        )
    if rules and config._attn_implementation != "flex_attention":
        rules += [_causal] if is_causal else []
        rules += [_no_padding(attention_mask)] if attention_mask is not None else []
        keys = past_length + inputs_embeds.shape[1]
        if attention_mask is not None and cache is not None:
            keys = max(keys, attention_mask.shape[1])  # a static cache has room behind the queries
        return _dense(and_masks(*rules), inputs_embeds, past_length, keys, config._attn_implementation)
    if clean_half and attention_mask is not None:
        attention_mask = attention_mask.repeat(1, 2)  # [B, 2L]
    build = create_causal_mask if is_causal else create_bidirectional_mask
    return build(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        **{CACHE: cache},
        and_mask_function=and_masks(*rules) if rules else None,
    )


def _dense(rule, inputs_embeds, past_length, keys, implementation):
    """`[B, 1, Q, K]`: the rule on all indices. Every query sees itself at least, or padding would give NaN."""
    batch, length, _ = inputs_embeds.shape
    query = torch.arange(past_length, past_length + length, device=inputs_embeds.device)[None, None, :, None]
    key = torch.arange(keys, device=inputs_embeds.device)[None, None, None]
    rows = torch.arange(batch, device=inputs_embeds.device)[:, None, None, None]
    visible = rule(rows, 0, query, key) | (query == key)
    if implementation != "eager":
        return visible
    lowest = torch.finfo(inputs_embeds.dtype).min
    return torch.zeros_like(visible, dtype=inputs_embeds.dtype).masked_fill(~visible, lowest)


def _key_positions(inputs_embeds, attention_mask, position_ids, past_length, clean_half):
    """`[B, K]` (or `[1, K]`): every key's position in its document, cached ones included; padding counts as 0."""
    keys = 0 if attention_mask is None else attention_mask.shape[1]
    if past_length == 0 and position_ids is not None and keys <= position_ids.shape[1]:
        return position_ids
    if attention_mask is not None:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    length = inputs_embeds.shape[1] // (2 if clean_half else 1)
    return torch.arange(past_length + length, device=inputs_embeds.device)[None]


def _causal(batch, head, query, key):
    return key <= query


def _no_padding(attention_mask: torch.Tensor):
    """Mask function: the key is a token. Indices of a clean half count from its own start."""
    tokens, length = attention_mask.bool(), attention_mask.shape[1]

    def rule(batch, head, query, key):
        return tokens[batch, key % length]

    return rule


def _same_document(document_ids: torch.LongTensor):
    """Mask function of transformers' masking interface; indices broadcast, a clean half's from its own start."""
    length = document_ids.shape[1]

    def rule(batch, head, query, key):
        return document_ids[batch, query % length] == document_ids[batch, key % length]

    return rule


def _block_causal(block_ids: torch.LongTensor):
    """Mask function: the key's block is the query's or an earlier one."""
    rows = block_ids.shape[0]

    def rule(batch, head, query, key):
        row = batch % rows  # positions shared by the whole batch come as one row
        return block_ids[row, key] <= block_ids[row, query]

    return rule


def _noisy_and_clean(block_ids: torch.LongTensor):
    """Mask function over two halves: the first half's indices are noisy, those from `length` on clean."""
    rows, length = block_ids.shape

    def rule(batch, head, query, key):
        row = batch % rows
        query_block, key_block = block_ids[row, query % length], block_ids[row, key % length]
        noisy_query, noisy_key = query < length, key < length
        inside = noisy_query & noisy_key & (key_block == query_block)
        before = ~noisy_key & (key_block < query_block)
        return inside | before | (~noisy_query & ~noisy_key & (key_block == query_block))

    return rule
