"""How probable continuations are given their contexts: multiple choice, minimal pairs, cloze, lm-eval's loglikelihood.

One rule for AR and diffusion: the same token ids, scored by `likelihood.score_rows`. A row begins with
`<|endoftext|>`, as every training document does.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from nanollada.trainers.data.encoding import encode_spans
from nanollada.trainers.data.files import BadRow
from nanollada.trainers.data.packing import IGNORE
from nanollada.trainers.scoring.kind import is_diffusion
from nanollada.trainers.scoring.likelihood import score_rows


@dataclass(frozen=True)
class ContinuationScores:
    """
    Attributes:
        nats (`torch.DoubleTensor` of shape `(pairs,)`): −log p(continuation | context) of an AR model, an upper bound
            of it for a diffusion model.
        variance (`torch.DoubleTensor` of shape `(pairs,)`): Of these estimates; 0 where nothing is drawn.
        tokens (`torch.LongTensor` of shape `(pairs,)`): Tokens of the continuations.
        bound (`bool`): Whether `nats` are upper bounds.
        estimator (`str`): How they were computed.
    """

    nats: torch.DoubleTensor
    variance: torch.DoubleTensor
    tokens: torch.LongTensor
    bound: bool
    estimator: str


def context_ids(tokenizer, text: str) -> list[int]:
    """
    The token ids of a plain text as the beginning of a document, `<|endoftext|>` first.

    Raises:
        `ValueError`: for text that the vocabulary lacks.
    """
    return [tokenizer.pad_token_id, *split_ids(tokenizer, text, 0)[1]]


def split_ids(tokenizer, text: str, cut: int, literal=None) -> tuple[list[int], list[int]]:
    """
    Token ids of what stands before and behind `cut`, as `encode_spans` makes them: control tokens in it are text,
    unless `literal` says where they are.

    Raises:
        `ValueError`: for text that the vocabulary lacks.
    """
    try:
        ids, labels = encode_spans(tokenizer, text, [(cut, len(text))], literal)
    except BadRow as error:
        raise ValueError(f"the text is {error}") from error
    size = labels.count(IGNORE)
    return ids[:size], ids[size:]


def encode_pair(tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """
    Token ids of a context (with `<|endoftext|>`) and of its continuation, cut where the context ends.

    Both are encoded together, as in text, with whitespace between them on the continuation's side (lm-eval's rule).
    Where a token would cross the border, each is encoded alone: lm-eval then cuts behind as many tokens as the context
    has, and scores a text that is not the continuation.

    Raises:
        `ValueError`: for a continuation that is empty, and for text that the vocabulary lacks.
    """
    cut, whole = len(context.rstrip()), context + continuation
    if not continuation:
        raise ValueError(f"`continuation` must add a token to its context, got {continuation!r} behind {context!r}")
    before, behind = split_ids(tokenizer, whole, cut)
    return [tokenizer.pad_token_id, *before], behind


def score_continuations(
    model,
    pairs: Sequence[tuple[list[int], list[int]]],
    *,
    pad_token_id: int,
    samples: int = 128,
    seed: int = 0,
    batch_size: int = 16,
    block_length: int | None = None,
    numbers: Sequence[int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> ContinuationScores:
    """
    Scores token ids given others, the longest pairs first. A pair's score depends on neither its neighbours nor
    `batch_size`, up to float rounding: its noise is keyed by its number.

    Args:
        model ([`NanoLLaDAForCausalLM`] or [`NanoLLaDAForMaskedLM`]): The model, or a foreign causal one.
        pairs (`Sequence[tuple[list[int], list[int]]]`): (context, continuation), none empty; of `encode_pair`, or a
            rendered chat and its answer.
        pad_token_id (`int`): Fills the rows of a batch; never seen.
        samples (`int`, defaults to 128): Monte Carlo masks per pair of a diffusion model, even. Short continuations
            (2^n − 1 <= `samples`) are enumerated.
        seed (`int`, defaults to 0): Of these masks.
        batch_size (`int`, defaults to 16): Pairs per forward.
        block_length (`int`, *optional*): As in `likelihood.exact_nelbo`.
        numbers (`Sequence[int]`, *optional*): Of the pairs, in [0, 2⁶³); by default their places in `pairs`.
        progress (`Callable[[int], None]`, *optional*): Is told how many pairs were scored.

    Raises:
        `ValueError`: for an empty context or continuation, no pairs, another number of `numbers`, and as
            `likelihood.score_rows`.
    """
    if not pairs:
        raise ValueError("`pairs` must hold at least one pair to score, got none")
    prompts, targets = (list(column) for column in zip(*pairs, strict=True))
    order = sorted(range(len(pairs)), key=lambda place: -len(prompts[place]) - len(targets[place]))
    nats = torch.zeros(len(pairs), dtype=torch.double)
    variance, how, done = torch.zeros_like(nats), set(), 0
    batches = conditional_rows(prompts, targets, pad_token_id, batch_size, order, numbers)
    for _, found, error, estimators in score_rows(
        model, batches, samples=samples, seed=seed, block_length=block_length
    ):
        places = order[done : done + len(found)]
        nats[places], variance[places] = found.cpu(), error.cpu()
        how |= estimators
        done += len(found)
        if progress is not None:
            progress(len(found))
    tokens = torch.tensor([len(target) for target in targets])
    return ContinuationScores(nats, variance, tokens, is_diffusion(model), "; ".join(sorted(how)))


def conditional_rows(
    prompts: list[list[int]],
    targets: list[list[int]],
    pad_token_id: int,
    batch_size: int = 32,
    order: Sequence[int] | None = None,
    numbers: Sequence[int] | None = None,
) -> Iterator[dict]:
    """
    Batches that score `targets` given `prompts`, for `likelihood`'s functions.

    Args:
        prompts (`list[list[int]]`): Token ids of the conditions, none of them empty (an unconditional score starts
            from `<|endoftext|>`).
        targets (`list[list[int]]`): Token ids to score.
        pad_token_id (`int`): Fills the rows.
        batch_size (`int`, defaults to 32): Rows per batch.
        order (`Sequence[int]`, *optional*): In which the pairs come.
        numbers (`Sequence[int]`, *optional*): The rows' `index`, by default their places in the lists.

    Raises:
        `ValueError`: for an empty prompt or target, and for lists of different lengths.
    """
    numbers = range(len(prompts)) if numbers is None else numbers
    if len(numbers) != len(prompts):
        raise ValueError(f"`numbers` must be one for each pair, got {len(numbers)} for {len(prompts)}")
    if len(prompts) != len(targets):
        raise ValueError(f"`prompts` and `targets` must pair up, got {len(prompts)} and {len(targets)}")
    for number, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        if not prompt or not target:
            raise ValueError(f"`prompts` and `targets` must not be empty, got an empty one in pair {number}")
    order = range(len(prompts)) if order is None else order
    for start in range(0, len(order), batch_size):
        places = list(order[start : start + batch_size])
        ids = [torch.tensor(prompts[place] + targets[place]) for place in places]
        labels = [torch.tensor([-100] * len(prompts[place]) + targets[place]) for place in places]
        yield {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_token_id),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "index": torch.tensor([numbers[place] for place in places]),
            "num_bytes": torch.zeros(len(places), dtype=torch.long),
        }
