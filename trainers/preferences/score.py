"""The score of an answer under a diffusion model: its ELBO, as a sum of weighted log-probabilities of its tokens."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from nanollada.trainers.noise.corruption import Corruption
from nanollada.trainers.objectives import token_cross_entropy

# A CPU is as fast with few, and holds few logits at a time; a GPU wants large products.
TOKENS_PER_FORWARD = {"cpu": 2**13, "other": 2**16}


@dataclass
class Score:
    """
    What the masked forwards of a batch give.

    Attributes:
        log_probs (`torch.Tensor` of shape `(rows, length)`): Weighted log-probabilities of the targets, the mean over
            the draws: a row's sum is the estimate of its ELBO in nats. 0 elsewhere.
        draws (`torch.Tensor` of shape `(draws, rows)`): The estimates of the single draws, without gradient.
        right, masked (`torch.LongTensor` of shape `(rows,)`): Over the draws, how many masked tokens were the most
            probable at their places, and how many there were.
    """

    log_probs: torch.Tensor
    draws: torch.Tensor
    right: torch.Tensor
    masked: torch.Tensor


def score_masks(
    forward: Callable,
    noise: Corruption,
    clean: torch.LongTensor,
    attention_mask: torch.LongTensor,
    block_length: int | None,
    tokens_per_forward: int | None = None,
) -> Score:
    """
    Runs a model on corrupted rows, in parts of similar length.

    The parts hang on the rows' lengths alone, so that two models, or two calls of one, compute alike to the last bit.

    Args:
        forward (`Callable`): That of a [`NanoLLaDAForMaskedLM`].
        noise (`Corruption`): Of all rows, draw by draw, as `draw_masks` makes it.
        clean (`torch.LongTensor` of shape `(rows, length)`): The ids.
        attention_mask (`torch.LongTensor` of shape `(rows, length)`): 1 for tokens, 0 for padding on the right.
        block_length (`int`, *optional*): Each block is predicted from itself and the clean ones before it; `None`:
            rows as a whole.
        tokens_per_forward (`int`, *optional*): A part has no more tokens than this, or is one row.
    """
    (rows, length), device = clean.shape, clean.device
    if tokens_per_forward is None:
        tokens_per_forward = TOKENS_PER_FORWARD.get(device.type, TOKENS_PER_FORWARD["other"])
    lengths, draws = attention_mask.sum(-1), len(noise.labels) // len(clean)
    values, places, right = [], [], []
    for part in _parts(lengths.repeat(draws), tokens_per_forward, 1 if block_length is None else 2):
        labels, row = noise.labels[part.rows, : part.length], part.rows % rows
        keep = labels != -100  # [P, l]
        options = _block_inputs(block_length, part.length, clean[row, : part.length])
        if (lengths[row] < part.length).any():
            options["attention_mask"] = attention_mask[row, : part.length]
        logits = forward(noise.noisy_input_ids[part.rows, : part.length], logits_to_keep=keep, **options).logits
        targets = labels[keep]  # [N]
        losses = token_cross_entropy(logits, targets)
        values.append(-losses * noise.weights[part.rows, : part.length][keep].to(losses.dtype))
        right.append(logits.detach().argmax(-1) == targets)
        where, column = keep.nonzero(as_tuple=True)
        places.append(part.rows[where] * length + column)
    places, values = torch.cat(places), torch.cat(values)  # [N]
    scattered = values.new_zeros(draws * rows * length).index_copy(0, places, values).view(draws, rows, length)
    hits = torch.zeros(draws * rows * length, dtype=torch.long, device=device)
    hits = hits.index_copy(0, places, torch.cat(right).long()).view(draws, rows, length)
    masked = noise.supervised.view(draws, rows, length)
    return Score(scattered.mean(0), scattered.detach().sum(-1), hits.sum((0, 2)), masked.sum((0, 2)))


def score_variance(log_ratios: torch.Tensor, beta: float) -> torch.Tensor:
    """
    The variance of each pair's preference score that its masks cause, `(pairs,)`.

    Half the mean square of the differences of successive draws, over the number of draws: the variance of their mean
    if they are independent, and more if they come from strata.

    Args:
        log_ratios (`torch.Tensor` of shape `(draws, 2 * pairs)`): Policy − reference in nats, draw by draw, all chosen
            answers first. At least two draws.
        beta (`float`): Of the score; the variance has the unit nats² · β².
    """
    chosen, rejected = log_ratios.chunk(2, dim=1)
    scores = beta * (chosen - rejected)  # [D, B]
    return (scores[1:] - scores[:-1]).square().mean(0) / 2 / len(scores)


def _block_inputs(block_length: int | None, length: int, clean: torch.LongTensor) -> dict:
    """What the model needs to predict every block from itself and the clean blocks before it."""
    if block_length is None or block_length >= length:
        return {} if block_length is None else {"block_length": length}
    return {"block_length": block_length, "clean_input_ids": clean}


@dataclass(frozen=True)
class _Part:
    rows: torch.LongTensor
    length: int


def _parts(lengths: torch.LongTensor, most_tokens: int, halves: int) -> Iterator[_Part]:
    """Rows in the order of their lengths, as many as have `most_tokens` with their padding."""
    order = lengths.argsort(stable=True, descending=True)
    start, ordered = 0, lengths[order].tolist()
    while start < len(ordered):
        count = max(1, most_tokens // (ordered[start] * halves))
        yield _Part(order[start : start + count], ordered[start])
        start += count
