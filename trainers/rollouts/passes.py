"""Scores of rollouts: states of rows through the model, a bounded number of tokens at a time."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import distributed

from nanollada.trainers.objectives import token_cross_entropy
from nanollada.trainers.rollouts.decoding import Decoding
from nanollada.trainers.rollouts.rollouts import Rollouts

TOKENS_PER_FORWARD = {"cpu": 8192, "other": 32768}


@dataclass
class Scores:
    """
    What a policy says of rollouts.

    Attributes:
        log_probs (`torch.Tensor` of shape `(batch, width)`): Log-probabilities, in nats and float32 or better, with a
            gradient; 0 where nothing was scored.
        weights (`torch.Tensor` of shape `(batch, width)`): What a position counts in the row's sum: 1, more where it
            stands for others that were not scored, 0 where it was not scored itself.
        entropies (`torch.Tensor` of shape `(batch, width)`, *optional*): Of the distributions, in nats, with a
            gradient; 0 where nothing was scored.
    """

    log_probs: torch.Tensor
    weights: torch.Tensor
    entropies: torch.Tensor | None = None

    def total(self) -> torch.Tensor:
        """`(batch,)`: Σ weight · log-probability."""
        return (self.log_probs * self.weights).sum(-1)


@dataclass
class States:
    """
    What the model is shown of C rows.

    Attributes:
        ids (`torch.LongTensor` of shape `(C, width)`): The rows, masks included.
        keep (`torch.BoolTensor` of shape `(C, width)`): The positions to score: masks in `ids`.
        clean (`torch.LongTensor` of shape `(C, width)`): What earlier blocks show to a model with blocks.
        scale (`torch.Tensor` of shape `(C, width)`, *optional*): Factors of the log-probabilities; one by default.
    """

    ids: torch.Tensor
    keep: torch.Tensor
    clean: torch.Tensor
    scale: torch.Tensor | None = None


def read(
    model,
    rollouts: Rollouts,
    decoding: Decoding,
    rows: torch.LongTensor,
    states: Callable[[torch.LongTensor], States],
    entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Log-probabilities of the canvas's tokens in P states, under the decoder's own transform of logits: its temperature,
    and no probability for what it could not draw. Gradients flow if they are on.

    A state shows what `generate` showed: of a model with blocks, or with `grow_length`, nothing behind the block.

    Args:
        model (`Callable`): The masked-diffusion model, or a wrapper around it.
        rollouts ([`Rollouts`]): The rows.
        decoding ([`Decoding`]): How they were drawn.
        rows (`torch.LongTensor` of shape `(P,)`): The row of each state.
        states (`Callable`): From some of the numbers 0 … P − 1 to their [`States`].
        entropy (`bool`, defaults to `False`): Whether to compute the entropies.

    Returns:
        `torch.Tensor` of shape `(batch, width)`: the sum over states of scale · log-probability; and of the same shape
        the mean entropy over the states that score a position, or `None`.

    Raises:
        `ValueError`: if there is no state.
    """
    if not len(rows):
        raise ValueError("`rollouts` must hold a decided position to score, got none")
    width, canvas = rollouts.canvas.shape[1], rollouts.canvas
    shown = _blocks_shown(rollouts, decoding)
    tokens = TOKENS_PER_FORWARD.get(canvas.device.type, TOKENS_PER_FORWARD["other"])
    size = max(1, tokens // (width if decoding.grid is None or decoding.grid >= width else 2 * width))
    chunks = list(torch.arange(len(rows), device=canvas.device).split(size))
    parts, entropies, places = [], [], []
    for number in range(_most_of_all_ranks(len(chunks), canvas.device)):
        idle = number >= len(chunks)  # this rank is done, another is not: it reads a row and scores nothing
        chunk = torch.zeros(1, dtype=torch.long, device=canvas.device) if idle else chunks[number]
        row, state = rows[chunk], states(chunk)
        keep = state.keep & (not idle)
        logits = _logits(model, state, keep, rollouts.attention_mask[row], shown[row], decoding)  # [N, V]
        where = keep.nonzero()
        log_probs = -token_cross_entropy(logits, canvas[row][keep])  # [N]
        if state.scale is not None:
            log_probs = log_probs * state.scale[keep].to(log_probs.dtype)
        parts.append(log_probs)
        places.append(row[where[:, 0]] * width + where[:, 1])
        if entropy:
            entropies.append(_entropy(logits))
    place, values = torch.cat(places), torch.cat(parts)
    sums = values.new_zeros(canvas.numel()).index_add(0, place, values).view(canvas.shape)
    if not entropy:
        return sums, None
    values = torch.cat(entropies)
    count = values.new_zeros(canvas.numel()).index_add(0, place, torch.ones_like(values)).clamp(min=1)
    return sums, (values.new_zeros(canvas.numel()).index_add(0, place, values) / count).view(canvas.shape)


def _blocks_shown(rollouts, decoding):
    """`[B, W]`: numbers of the parts of a row that the model was shown one after the other."""
    if decoding.grid is not None:
        return rollouts.blocks(decoding.grid)
    if not decoding.grow_length:
        return torch.zeros_like(rollouts.canvas)
    new = rollouts.canvas.shape[1] - rollouts.prompt_length
    if new == 0:
        raise ValueError("`grow_length` must come with new tokens to be scored, got prompts alone")
    columns = torch.arange(rollouts.canvas.shape[1], device=rollouts.canvas.device) - rollouts.prompt_length
    return (columns.clamp(min=0) // (decoding.block_length or new)).expand_as(rollouts.canvas)


def _logits(model, state, keep, visible, shown, decoding):
    """`[N, V]`: of the positions `keep`, as tokens were drawn by them."""
    limit = shown.masked_fill(~keep, 0).amax(1, keepdim=True)  # [C, 1]
    visible = visible & (shown <= limit)
    columns = visible.any(0).nonzero()[:, 0]
    columns = slice(int(columns[0]), int(columns[-1]) + 1)
    visible, keep, ids = visible[:, columns], keep[:, columns], state.ids[:, columns]
    options = {} if visible.all() else {"attention_mask": visible.long()}
    if decoding.grid is not None:
        changed = ids != state.clean[:, columns]
        first = shown[:, columns].masked_fill(~changed, shown.shape[1]).amin(1, keepdim=True)
        if (first < limit).any():  # masks in two blocks: the later one sees the clean tokens of the earlier
            options["clean_input_ids"] = state.clean[:, columns]
    logits = model(input_ids=ids, logits_to_keep=keep, **options).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # autocast's types are too coarse
    never = torch.tensor(decoding.never, dtype=torch.long, device=logits.device)
    return logits.index_fill(1, never, -torch.inf) / decoding.temperature


def _entropy(logits):
    """`[N]`, nats; what can't be drawn, at −∞, has no part in it and gets no gradient."""
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs.masked_fill(log_probs.isneginf(), 0)).sum(-1)


def _most_of_all_ranks(count, device):
    """Ranks that share a model must call it equally often."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return count
    most = torch.tensor(count, device=device)
    distributed.all_reduce(most, distributed.ReduceOp.MAX)
    return int(most)
