"""How probable a text is: exactly for AR, as an upper bound of the negative log-likelihood for diffusion.

Both models are scored on the same rows and so on the same tokens and bytes. What is not a target (label −100) is
condition: a prompt, or the token before a document. The unit inside this file is nats, summed over a row's targets.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import torch

from nanollada.trainers.noise.blocks import block_ids_of, choose_smallest
from nanollada.trainers.noise.keys import STREAM_BLOCK, STREAM_MASK, STREAM_RATE, keyed_uniform
from nanollada.trainers.objectives import token_cross_entropy
from nanollada.trainers.scoring.estimates import ratio_error
from nanollada.trainers.scoring.kind import is_diffusion

MAX_EXACT_TARGETS = 12
TOKENS_PER_FORWARD = 16384
MODEL_INPUTS = ("attention_mask", "position_ids", "document_ids")


@dataclass
class Likelihood:
    """
    Negative log-likelihood of a set of rows, or an upper bound of it.

    Attributes:
        nats (`float`): The total over all targets.
        standard_error (`float`): Of `nats`, from the Monte Carlo draws alone; 0 where nothing is drawn.
        tokens (`int`), bytes (`int`), rows (`int`): What was scored. `bytes` counts UTF-8 bytes of the scored text.
        row_moments (`tuple[float, float, float]`): Σ nats², Σ nats·bytes and Σ bytes² over rows.
        bound (`bool`): Whether `nats` is an upper bound (diffusion) or exact (AR).
        estimator (`str`): How it was computed.
    """

    nats: float
    standard_error: float
    tokens: int
    bytes: int
    rows: int
    row_moments: tuple[float, float, float]
    bound: bool
    estimator: str

    @property
    def nats_per_token(self) -> float:
        return self.nats / max(self.tokens, 1)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / max(self.bytes, 1)

    @property
    def bits_per_byte_standard_error(self) -> float:
        """Monte Carlo error of `bits_per_byte` on these very rows."""
        return self.standard_error / math.log(2) / max(self.bytes, 1)

    @property
    def bits_per_byte_sampling_error(self) -> float | None:
        """Standard error of `bits_per_byte` as an estimate for other rows of the kind; `None` for a single row."""
        mean, (nn, nb, bb) = self.nats / max(self.bytes, 1), self.row_moments
        squares = max(nn - 2 * mean * nb + mean**2 * bb, 0.0)
        error = ratio_error(self.rows, squares, max(self.bytes, 1))
        return None if error is None else error / math.log(2)

    def to_dict(self) -> dict:
        derived = ("bits_per_byte", "bits_per_byte_standard_error", "bits_per_byte_sampling_error", "nats_per_token")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}

    def sums(self) -> list[float]:
        """What adds up over parts of the rows, for `from_sums`."""
        return [self.nats, self.standard_error**2, self.tokens, self.bytes, self.rows, *self.row_moments]

    @classmethod
    def from_sums(cls, sums: list[float], bound: bool, estimator: str) -> "Likelihood":
        """The likelihood of all rows from the added `sums` of its parts."""
        nats, variance, tokens, num_bytes, rows, *moments = sums
        return cls(nats, math.sqrt(variance), int(tokens), int(num_bytes), int(rows), tuple(moments), bound, estimator)


def model_inputs(batch: dict) -> dict:
    """What of a collated batch goes to the model beside the ids."""
    return {name: batch[name] for name in MODEL_INPUTS if batch.get(name) is not None}


def causal_nll(model, batch: dict) -> torch.Tensor:
    """
    Exact negative log-likelihood of an AR model.

    Args:
        model ([`NanoLLaDAForCausalLM`]): The model.
        batch (`dict`): `input_ids` and `labels` of shape `(batch, length)` (labels unshifted, −100 is condition), and
            optionally `attention_mask`, `position_ids`, `document_ids`.

    Returns:
        `torch.DoubleTensor` of shape `(batch,)`: nats, summed over each row's targets.

    Raises:
        `ValueError`: if a row's first position is a target: it has no context to be predicted from.
    """
    labels = batch["labels"]
    if (labels[:, 0] != -100).any():
        raise ValueError(
            "`labels` must be -100 at position 0: an AR model predicts a first token from <|endoftext|>, which the "
            f"row must hold, got {labels[:, 0].tolist()}"
        )
    following = torch.cat((labels[:, 1:], torch.full_like(labels[:, :1], -100)), dim=1)  # [B, L]
    keep = following != -100
    logits = model(batch["input_ids"], logits_to_keep=keep, use_cache=False, **model_inputs(batch)).logits  # [N, V]
    nats = torch.zeros(labels.shape, dtype=torch.double, device=labels.device)
    nats[keep] = token_cross_entropy(logits, following[keep]).double()
    return nats.sum(-1)


def masked_nats(
    model,
    batch: dict,
    masked: torch.BoolTensor,
    block_length: int | None = None,
    weights: torch.DoubleTensor | None = None,
) -> torch.Tensor:
    """
    Cross-entropy of the masked tokens, summed per row: `(batch,)` nats in float64. Each is given its block's other
    tokens and the clean blocks before it; with one block per row, all other tokens.

    Args:
        model ([`NanoLLaDAForMaskedLM`]): The model.
        batch (`dict`): As in `causal_nll`.
        masked (`torch.BoolTensor` of shape `(batch, length)`): What to hide.
        block_length (`int`, *optional*): As in `exact_nelbo`.
        weights (`torch.DoubleTensor` of shape `(batch, length)`, *optional*): Of each masked token; one by default.
    """
    noisy = batch["input_ids"].masked_fill(masked, model.config.mask_token_id)
    options = {**model_inputs(batch), **_block_inputs(model, batch, block_length)}
    logits = model(noisy, logits_to_keep=masked, **options).logits  # [N, V]
    nats = torch.zeros(masked.shape, dtype=torch.double, device=masked.device)
    nats[masked] = token_cross_entropy(logits, batch["input_ids"][masked]).double()
    return (nats if weights is None else nats * weights).sum(-1)


def scored_block_length(model, block_length: int | None = None) -> int | None:
    """
    Tokens of the blocks in which a model is scored: `block_length`, by default `config.block_length`. `None`: whole
    rows (also asked for by 0), and all that a causal model can do.

    Raises:
        `ValueError`: for a negative `block_length`, and for any with a causal model.
    """
    if block_length is not None and block_length < 0:
        raise ValueError(f"`block_length` must be at least 1, or 0 for whole rows, got {block_length}")
    if not is_diffusion(model):
        if block_length is not None:
            raise ValueError(f"`block_length` is for diffusion models, got {block_length} with a causal one")
        return None
    return (model.config.block_length if block_length is None else block_length) or None


def _block_inputs(model, batch: dict, block_length: int | None) -> dict:
    """What the model needs to predict every block from itself and the clean blocks before it."""
    length = batch["input_ids"].shape[1]
    block_length = scored_block_length(model, block_length)
    if block_length is not None and block_length < length:
        return {"block_length": block_length, "clean_input_ids": batch["input_ids"]}
    return {} if model.config.block_length is None else {"block_length": length}


class _Blocks:
    """
    The blocks of a batch's rows, cut by position from each document's start. Whole rows are one block, whatever they
    pack: documents don't see each other, and the bound of a row is the sum of theirs.

    Attributes:
        ids (`torch.LongTensor` of shape `(batch, length)`): The block of each place.
        targets (`torch.BoolTensor` of shape `(batch, length)`): What is scored.
        sizes (`torch.LongTensor` of shape `(batch, blocks)`): The targets of each block.
        total (`torch.LongTensor` of shape `(batch, length)`): The same at each place of the block, at least 1.
    """

    def __init__(self, model, batch: dict, block_length: int | None):
        self.targets = batch["labels"] != -100
        block_length, tokens = scored_block_length(model, block_length), batch.get("attention_mask")
        positions = batch.get("position_ids")
        if positions is None and tokens is not None:
            positions = (tokens.long().cumsum(-1) - 1).clamp(min=0)
        shape, device = self.targets.shape, self.targets.device
        ids = block_ids_of(block_length, positions, batch.get("document_ids"), shape, device)
        if ids is None:
            ids = torch.zeros(shape, dtype=torch.long, device=device)
        self.ids = ids
        self.sizes = torch.zeros(shape, dtype=torch.long, device=device).scatter_add_(1, ids, self.targets.long())
        self.total = self.sizes.gather(1, ids).clamp(min=1)

    @property
    def largest(self) -> torch.LongTensor:
        """`(batch,)`: the most targets that a block of the row has."""
        return self.sizes.amax(-1)

    def ordinals(self) -> torch.LongTensor:
        """`(batch, length)`: each target's number among those of its block, from 0."""
        before = (self.sizes.cumsum(-1) - self.sizes).gather(1, self.ids)
        return self.targets.long().cumsum(-1) - 1 - before

    def shifts(self, seed: int, index: torch.LongTensor, strata: int) -> tuple[torch.LongTensor, torch.DoubleTensor]:
        """
        How far each place's block is ahead, `(batch, length)` each: whole strata, and the rest as a part of one. It is
        j/K of all strata for block j in a random order of the row's K with targets.
        """
        used = self.sizes > 0
        draws = keyed_uniform(seed, index, torch.zeros_like(index), STREAM_BLOCK, used.shape[1])
        ahead = draws.masked_fill(~used, 2.0).argsort(-1).argsort(-1).gather(1, self.ids) * strata
        number = used.sum(-1, keepdim=True).clamp(min=1)
        return ahead // number, ahead % number / number.double()


def exact_nelbo(model, batch: dict, block_length: int | None = None, batch_size: int | None = None) -> torch.Tensor:
    """
    The bound by enumeration of all masks: Σ_S w(|S|) Σ_{i∈S} CE_i with w(k) = 1 / (k·C(n, k)), over the 2^n − 1
    non-empty subsets S of a block's n targets, summed over the row's blocks, each given the clean blocks before it
    (BD3-LM, 2503.09573, Eq. 8; one block per row: LLaDA, 2502.09992, Eq. 6). Any noise schedule has this same bound
    (only the count matters). A forward takes one subset of every block of a row: noisy blocks don't see each other.

    Args:
        model ([`NanoLLaDAForMaskedLM`]): The model.
        batch (`dict`): As in `causal_nll`.
        block_length (`int`, *optional*): Tokens of a block, cut by position from each document's start. Defaults to
            `config.block_length`; 0, `None` there, or a block no shorter than the row: one block.
        batch_size (`int`, *optional*): Masks per forward. Defaults to as many as have 16,384 tokens.

    Returns:
        `torch.DoubleTensor` of shape `(batch,)`: nats.

    Raises:
        `ValueError`: for a block with more than 12 targets, and for a negative `block_length`.
    """
    blocks = _Blocks(model, batch, block_length)
    largest = blocks.largest
    if (largest > MAX_EXACT_TARGETS).any():
        row = int(largest.argmax())
        raise ValueError(
            f"`batch` must have at most {MAX_EXACT_TARGETS} target tokens a block to enumerate their masks, got "
            f"{int(largest[row])} in block {int(blocks.sizes[row].argmax())} of row {row}"
        )
    device = largest.device
    counts = (2**largest - 1).clamp(min=1)  # a row without targets has a mask of nothing
    row_of = torch.arange(len(counts), device=device).repeat_interleave(counts)  # [M]
    subset_of = torch.arange(len(row_of), device=device) - (counts.cumsum(0) - counts)[row_of] + 1  # [M], from 1
    bits, ordinals = torch.arange(MAX_EXACT_TARGETS, device=device), blocks.ordinals()
    weights, nats = _subset_weights(device), []
    batch_size = batch_size or max(1, TOKENS_PER_FORWARD // (2 * blocks.ids.shape[1]))
    for row, subset in zip(row_of.split(batch_size), subset_of.split(batch_size), strict=True):
        size = blocks.total[row]  # [M, L]
        chosen = (subset[:, None] >> ordinals[row].clamp(min=0)) & 1
        masked = blocks.targets[row] & chosen.bool() & (subset[:, None] < 2**size)
        count = ((subset[:, None] >> bits) & 1).sum(-1, keepdim=True).expand_as(size)  # of the masks in a block
        part = {name: batch[name][row] for name in ("input_ids", *model_inputs(batch))}
        nats.append(masked_nats(model, part, masked, block_length, weights[size, count]))
    return torch.stack([part.sum() for part in torch.cat(nats).split(counts.tolist())])


def _subset_weights(device) -> torch.DoubleTensor:
    """`[13, 13]`: w(k) = 1 / (k·C(n, k)) at [n, k], 0 where there is no such subset."""
    sizes = range(MAX_EXACT_TARGETS + 1)
    table = [[1 / (k * math.comb(n, k)) if 0 < k <= n else 0.0 for k in sizes] for n in sizes]
    return torch.tensor(table, dtype=torch.double, device=device)


def monte_carlo_nelbo(
    model, batch: dict, samples: int, seed: int, batch_size: int | None = None, block_length: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The bound by exact-count Monte Carlo (LLaDA, Eq. 6): k of a block's n targets masked, their cross-entropy times
    n/k, summed over blocks.

    k is stratified over draws: `samples / 2` equal strata of [0, 1), two independent draws in each, which gives an
    unbiased variance of the stratified mean. It is stratified over blocks too: in each draw the K blocks of a row
    stand 1/K apart, in a random order that the row keeps. The draws depend on `(seed, row index)` alone.

    Args:
        model ([`NanoLLaDAForMaskedLM`]): The model.
        batch (`dict`): As in `causal_nll`, plus `index` of shape `(batch,)`, the rows' numbers.
        samples (`int`): Masks per row, even.
        seed (`int`): Seed of the noise.
        batch_size (`int`, *optional*): Masked rows per forward. Defaults to the batch's own size.
        block_length (`int`, *optional*): As in `exact_nelbo`.

    Returns:
        Two `torch.DoubleTensor` of shape `(batch,)`: the rows' nats and the variances of these estimates.

    Raises:
        `ValueError`: if `samples` is not a positive even number, and for a negative `block_length`.
    """
    if samples < 2 or samples % 2:
        raise ValueError(f"`samples` must be a positive even number (two draws in each stratum), got {samples}")
    blocks = _Blocks(model, batch, block_length)
    rows, strata = len(blocks.ids), samples // 2
    whole, part_of = blocks.shifts(seed, batch["index"], strata)
    row_of = torch.arange(rows, device=whole.device).repeat(samples)  # [S·B], draw by draw
    draw_of = torch.arange(samples, device=whole.device).repeat_interleave(rows)
    nats = []
    for row, draw in zip(row_of.split(batch_size or rows), draw_of.split(batch_size or rows), strict=True):
        index, total = batch["index"][row], blocks.total[row]
        stratum = ((draw // 2)[:, None] + whole[row]) % strata  # [M, L]
        inside = (keyed_uniform(seed, index, draw, STREAM_RATE, 1) + part_of[row]) % 1.0
        count = torch.minimum(((stratum + inside) / strata * total).long(), total - 1) + 1
        keys = keyed_uniform(seed, index, draw, STREAM_MASK, total.shape[1])
        masked = choose_smallest(keys, blocks.targets[row], count, blocks.ids[row])
        part = {name: batch[name][row] for name in ("input_ids", *model_inputs(batch))}
        nats.append(masked_nats(model, part, masked, block_length, total.double() / count))
    estimates = torch.cat(nats).view(strata, 2, rows)
    variance = (estimates[:, 0] - estimates[:, 1]).square().sum(0) / 4 / strata**2
    return estimates.mean((0, 1)), variance


@torch.no_grad()
def evaluate_likelihood(
    model, batches: Iterable[dict], *, samples: int = 16, seed: int = 0, block_length: int | None = None
) -> Likelihood:
    """
    Scores rows with whichever model it is given: exact NLL for a causal one, the bound for a diffusion model. The
    bound is that of all mask rates, however the model was trained.

    A diffusion row is enumerated exactly if that is not more work than `samples` masks: with blocks of one token
    always (one mask), with n targets in the largest block if 2^n − 1 <= `samples`.

    Args:
        model ([`NanoLLaDAForCausalLM`] or [`NanoLLaDAForMaskedLM`]): The model; its mode is put back afterwards.
        batches (`Iterable[dict]`): Collated rows with `input_ids`, `labels`, `index`, `num_bytes` and the model's
            inputs, on any device.
        samples (`int`, defaults to 16): Monte Carlo masks per row, even.
        seed (`int`, defaults to 0): Seed of the evaluation noise, fixed so that checkpoints see the same masks.
        block_length (`int`, *optional*): As in `exact_nelbo`; for diffusion models.

    Returns:
        [`Likelihood`]

    Raises:
        `ValueError`: for no rows, for `block_length` with a causal model, and as `causal_nll`, `exact_nelbo` and
            `monte_carlo_nelbo`.
    """
    scored, estimators, bound = [], set(), is_diffusion(model)
    for batch, nats, variance, how in score_rows(
        model, batches, samples=samples, seed=seed, block_length=block_length
    ):
        lengths = (batch["labels"] != -100).sum(-1)
        scored.append([column.cpu() for column in (nats, variance, lengths, batch["num_bytes"])])
        estimators |= how
    if not scored:
        raise ValueError("`batches` must hold at least one row to score, got none")
    nats, variances, tokens, num_bytes = map(torch.cat, zip(*scored, strict=True))
    sums = [column.sum().item() for column in (nats, variances, tokens, num_bytes)]
    moments = [column.sum().item() for column in (nats * nats, nats * num_bytes, num_bytes * num_bytes)]
    return Likelihood.from_sums([*sums, len(nats), *moments], bound, "; ".join(sorted(estimators)))


@torch.no_grad()
def score_rows(
    model, batches: Iterable[dict], *, samples: int = 16, seed: int = 0, block_length: int | None = None
) -> Iterator[tuple[dict, torch.DoubleTensor, torch.DoubleTensor, set[str]]]:
    """
    As `evaluate_likelihood`, row by row: for each batch the batch itself on the model's device, its rows' nats and the
    variances of these, `(batch,)` each, and how they came about.
    """
    scored_block_length(model, block_length)  # refuses what does not fit
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            batch = {name: value.to(model.device) for name, value in batch.items() if torch.is_tensor(value)}
            if is_diffusion(model):
                yield batch, *_bounds(model, batch, samples, seed, block_length)
            else:
                nats = causal_nll(model, batch)
                yield batch, nats, torch.zeros_like(nats), {"exact"}
    finally:
        model.train(was_training)


def _bounds(model, batch, samples, seed, block_length):
    """The rows' bounds, their variances, and how they came about: for each row the cheaper way, whatever its batch."""
    largest = _Blocks(model, batch, block_length).largest
    few = (largest <= MAX_EXACT_TARGETS) & (2**largest - 1 <= samples)  # [B]
    nats = torch.zeros(len(few), dtype=torch.double, device=few.device)
    variance, how = torch.zeros_like(nats), set()
    length = scored_block_length(model, block_length)
    blocks = "" if length is None else f", blocks of {length}"
    if few.any():
        nats[few] = exact_nelbo(model, _rows(batch, few), block_length)
        how.add(f"exact enumeration of all masks{blocks}")
    if not few.all():
        nats[~few], variance[~few] = monte_carlo_nelbo(
            model, _rows(batch, ~few), samples, seed, block_length=block_length
        )
        how.add(f"exact-count Monte Carlo, {samples} stratified masks a row, seed {seed}{blocks}")
    return nats, variance, how


def _rows(batch: dict, chosen: torch.BoolTensor) -> dict:
    return {name: value[chosen] for name, value in batch.items()}
