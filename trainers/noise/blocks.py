"""The blocks of a batch: where they are cut, what is chosen in each, and its stratified position in time."""

import torch

from nanollada.trainers.noise.keys import STREAM_BLOCK, keyed_uniform, row_positions


def choose_smallest(
    keys: torch.Tensor, candidates: torch.Tensor, counts: torch.Tensor, blocks: torch.Tensor
) -> torch.Tensor:
    """
    The `counts` candidates with the smallest keys of each block: a uniform subset of that size.

    Args:
        keys (`torch.Tensor` of shape `(batch, length)`): Uniform numbers in [0, 1).
        candidates (`torch.BoolTensor` of shape `(batch, length)`): What may be chosen.
        counts (`torch.LongTensor` of shape `(batch, length)`): At each place, how many its block gets.
        blocks (`torch.LongTensor` of shape `(batch, length)`): The places' blocks, non-decreasing in a row.

    Returns:
        `torch.BoolTensor` of shape `(batch, length)`.
    """
    order = (torch.where(candidates, keys, 1.5) + 2 * blocks).argsort(-1)  # blocks keep their order and their places
    places = torch.arange(keys.shape[-1], device=keys.device).expand_as(order)
    start = torch.ones_like(candidates)
    start[:, 1:] = blocks[:, 1:] != blocks[:, :-1]
    first = torch.where(start, places, 0).cummax(-1).values  # [B, L]
    place = torch.empty_like(order).scatter_(-1, order, places)
    return candidates & (place - first < counts)


def block_ids_of(
    block_length: int | None,
    position_ids: torch.Tensor | None,
    document_ids: torch.Tensor | None,
    shape: tuple[int, int],
    device: torch.device | None = None,
) -> torch.Tensor | None:
    """
    The blocks of a batch as attention cuts them: at multiples of `block_length` from each document's start.

    Args:
        block_length (`int`, *optional*): `None` or 0: a row is one block, whatever it packs. (A block that is longer
            than the row still ends with its document; which of the two must not hang on the batch's padding.)
        position_ids, document_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): Positions that restart
            in each document, and documents. Without positions the cut is on the row, and a block may hold the end of
            a document and the beginning of the next.

    Returns:
        `torch.LongTensor` of shape `(batch, length)`, rising by one from block to block, or `None` for whole rows.
    """
    if not block_length:
        return None
    if position_ids is None:
        return (torch.arange(shape[1], device=device) // block_length).expand(shape)
    new = torch.zeros(shape, dtype=torch.bool, device=position_ids.device)
    block = position_ids // block_length
    new[:, 1:] = block[:, 1:] != block[:, :-1]
    if document_ids is not None:
        new[:, 1:] |= document_ids[:, 1:] != document_ids[:, :-1]
    return new.long().cumsum(-1)


def block_sums(values: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """`[B, K]`: the sum over each block, K the row's length."""
    return torch.zeros_like(blocks).scatter_add_(-1, blocks, values.long())


def block_positions(seed, index, rank, epoch, sums, blocks):
    """
    `[B, L]`: at each place its block's stratified position in [0, 1): frac(row position + j/K), with j the place of
    the block in a random order of the row's K blocks that hold targets.
    """
    row = row_positions(seed, rank, epoch)[:, None]  # [B, 1]
    return torch.remainder(row + block_shifts(seed, index, epoch, sums, blocks), 1.0)


def block_shifts(seed, index, epoch, sums, blocks):
    """`[B, L]`: how far each place's block stands from the row's position in time: j/K, see `block_positions`."""
    used = sums > 0  # [B, K]
    draws = keyed_uniform(seed, index, epoch, STREAM_BLOCK, blocks.shape[-1]).masked_fill(~used, 2.0)
    order = draws.argsort(-1)
    places = torch.arange(blocks.shape[-1], device=blocks.device).expand_as(order)
    place = torch.empty_like(order).scatter_(-1, order, places)  # the blocks with targets come first
    return place.gather(-1, blocks) / used.sum(-1, keepdim=True).clamp(min=1).double()
