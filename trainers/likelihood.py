"""How probable a text is: exactly for AR, as an upper bound of the negative log-likelihood for diffusion.

Both models are scored on the same rows and so on the same tokens and bytes. What is not a target (label −100) is
condition: a prompt, or the token before a document. The unit inside this file is nats, summed over a row's targets.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from .corruption import STREAM_MASK, STREAM_RATE, choose_smallest, keyed_uniform
from .objectives import token_cross_entropy

MAX_EXACT_TARGETS = 12
MODEL_INPUTS = ("attention_mask", "position_ids", "document_ids")


@dataclass
class Likelihood:
    """
    Negative log-likelihood of a set of rows, or an upper bound of it.

    Attributes:
        nats (`float`): The total over all targets.
        standard_error (`float`): Of `nats`, from the Monte Carlo draws alone; 0 where nothing is drawn.
        tokens (`int`), bytes (`int`), rows (`int`): What was scored. `bytes` counts UTF-8 bytes of the scored text.
        row_moments (`tuple[float, float, float]`): Σ nats², Σ nats·tokens and Σ tokens² over rows.
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
        if self.rows < 2:
            return None
        mean, (nn, nt, tt) = self.nats_per_token, self.row_moments
        residual = max(nn - 2 * mean * nt + mean**2 * tt, 0.0) * self.rows / (self.rows - 1)  # ratio estimator
        return math.sqrt(residual) / math.log(2) / max(self.bytes, 1)

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


def masked_nats(model, batch: dict, masked: torch.BoolTensor) -> torch.Tensor:
    """
    Cross-entropy of the masked tokens given all others, summed per row: `(batch,)` nats in float64.

    Args:
        model ([`NanoLLaDAForMaskedLM`]): The model.
        batch (`dict`): As in `causal_nll`.
        masked (`torch.BoolTensor` of shape `(batch, length)`): What to hide.
    """
    noisy = batch["input_ids"].masked_fill(masked, model.config.mask_token_id)
    logits = model(noisy, logits_to_keep=masked, **model_inputs(batch)).logits  # [N, V]
    nats = torch.zeros(masked.shape, dtype=torch.double, device=masked.device)
    nats[masked] = token_cross_entropy(logits, batch["input_ids"][masked]).double()
    return nats.sum(-1)


def exact_nelbo(model, batch: dict, batch_size: int = 256) -> torch.Tensor:
    """
    The bound by enumeration of all masks: Σ_S w(|S|) Σ_{i∈S} CE_i with w(k) = 1 / (k·C(L, k)), over the 2^L − 1
    non-empty subsets S of the L targets. Any noise schedule has this same bound (only the count matters).

    Args:
        model ([`NanoLLaDAForMaskedLM`]): The model.
        batch (`dict`): As in `causal_nll`.
        batch_size (`int`, defaults to 256): Masks per forward.

    Returns:
        `torch.DoubleTensor` of shape `(batch,)`: nats.

    Raises:
        `ValueError`: for a row with more than 12 targets.
    """
    totals = []
    for row in range(batch["input_ids"].shape[0]):
        single = {name: value[row : row + 1] for name, value in batch.items() if torch.is_tensor(value)}
        places = (single["labels"][0] != -100).nonzero()[:, 0]  # [L]
        length = len(places)
        if length > MAX_EXACT_TARGETS:
            raise ValueError(f"Exact enumeration takes at most {MAX_EXACT_TARGETS} target tokens, got {length}")
        subsets = torch.arange(1, 2**length, device=places.device)
        chosen = (subsets[:, None] >> torch.arange(length, device=places.device)) & 1  # [2^L − 1, L]
        masked = torch.zeros(len(subsets), single["input_ids"].shape[1], dtype=torch.bool, device=places.device)
        masked[:, places] = chosen.bool()
        total = torch.zeros((), dtype=torch.double, device=places.device)
        for part in masked.split(batch_size):
            repeated = {name: value.expand(len(part), *value.shape[1:]) for name, value in single.items()}
            count = part.sum(-1)
            weight = torch.tensor([1 / (k * math.comb(length, k)) for k in count.tolist()], dtype=torch.double)
            total = total + (weight.to(total.device) * masked_nats(model, repeated, part)).sum()
        totals.append(total)
    return torch.stack(totals)


def monte_carlo_nelbo(model, batch: dict, samples: int, seed: int, batch_size: int | None = None):
    """
    The bound by exact-count Monte Carlo (LLaDA, Eq. 6): k of L targets masked, their cross-entropy times L/k.

    k is stratified: `samples / 2` equal strata of [0, 1), two independent draws in each, which gives an unbiased
    variance of the stratified mean. The draws depend on `(seed, row index)` alone.

    Args:
        model ([`NanoLLaDAForMaskedLM`]): The model.
        batch (`dict`): As in `causal_nll`, plus `index` of shape `(batch,)`, the rows' numbers.
        samples (`int`): Masks per row, even.
        seed (`int`): Seed of the noise.
        batch_size (`int`, *optional*): Masked rows per forward. Defaults to the batch's own size.

    Returns:
        Two `torch.DoubleTensor` of shape `(batch,)`: the rows' nats and the variances of these estimates.

    Raises:
        `ValueError`: if `samples` is not a positive even number.
    """
    if samples < 2 or samples % 2:
        raise ValueError(f"`samples` must be a positive even number (two draws in each stratum), got {samples}")
    targets = batch["labels"] != -100  # [B, L]
    length = targets.sum(-1)  # [B]
    rows = len(length)
    index = batch["index"].repeat(samples)  # [S·B], draw by draw
    draw = torch.arange(samples, device=index.device).repeat_interleave(rows)
    uniform = keyed_uniform(seed, index, draw, STREAM_RATE, 1)[:, 0]
    position = (draw // 2 + uniform) / (samples // 2)  # [S·B] in [0, 1)
    count = (position * length.repeat(samples)).long().clamp(max=length.repeat(samples) - 1) + 1
    keys = keyed_uniform(seed, index, draw, STREAM_MASK, targets.shape[1])
    masked = choose_smallest(keys, targets.repeat(samples, 1), count)
    repeated = {name: batch[name].repeat(samples, 1) for name in ("input_ids", *model_inputs(batch))}
    nats = []
    for part in torch.arange(samples * rows, device=index.device).split(batch_size or rows):
        nats.append(masked_nats(model, {name: value[part] for name, value in repeated.items()}, masked[part]))
    weight = length.repeat(samples).double() / count.clamp(min=1)
    estimates = (torch.cat(nats) * weight).view(samples // 2, 2, rows)  # [strata, 2, B]
    variance = (estimates[:, 0] - estimates[:, 1]).square().sum(0) / 4 / (samples // 2) ** 2
    return estimates.mean((0, 1)), variance


@torch.no_grad()
def evaluate_likelihood(model, batches: Iterable[dict], *, samples: int = 16, seed: int = 0) -> Likelihood:
    """
    Scores rows with whichever model it is given: exact NLL for a causal one, the bound for a diffusion model.

    Diffusion rows with at most 12 targets are enumerated exactly if that is not more work than `samples` masks.

    Args:
        model ([`NanoLLaDAForCausalLM`] or [`NanoLLaDAForMaskedLM`]): The model; its mode is put back afterwards.
        batches (`Iterable[dict]`): Collated rows with `input_ids`, `labels`, `index`, `num_bytes` and the model's
            inputs, on any device.
        samples (`int`, defaults to 16): Monte Carlo masks per row, even.
        seed (`int`, defaults to 0): Seed of the evaluation noise, fixed so that checkpoints see the same masks.

    Returns:
        [`Likelihood`]
    """
    causal = getattr(model.model, "is_causal", True)
    was_training = model.training
    model.eval()
    scored, estimators = [], set()
    for batch in batches:
        batch = {name: value.to(model.device) for name, value in batch.items() if torch.is_tensor(value)}
        lengths = (batch["labels"] != -100).sum(-1)
        nats, variance, estimator = _score(model, batch, causal, int(lengths.max()), samples, seed)
        scored.append([column.cpu() for column in (nats, variance, lengths, batch["num_bytes"])])
        estimators.add(estimator)
    model.train(was_training)
    if not scored:
        raise ValueError("`batches` must hold at least one row to score, got none")
    nats, variances, tokens, num_bytes = map(torch.cat, zip(*scored, strict=True))
    sums = [column.sum().item() for column in (nats, variances, tokens, num_bytes)]
    moments = [column.sum().item() for column in (nats * nats, nats * tokens, tokens * tokens)]
    return Likelihood.from_sums([*sums, len(nats), *moments], not causal, "; ".join(sorted(estimators)))


def _score(model, batch, causal, longest, samples, seed):
    """Nats of each row, their variances, and how they came about."""
    if causal:
        nats = causal_nll(model, batch)
        return nats, torch.zeros_like(nats), "exact"
    if longest <= MAX_EXACT_TARGETS and 2**longest - 1 <= samples:
        nats = exact_nelbo(model, batch)
        return nats, torch.zeros_like(nats), "exact enumeration of all masks"
    nats, variance = monte_carlo_nelbo(model, batch, samples, seed)
    return nats, variance, f"exact-count Monte Carlo, {samples} stratified masks a row, seed {seed}"


def conditional_rows(
    prompts: list[list[int]], targets: list[list[int]], pad_token_id: int, batch_size: int = 32
) -> Iterator[dict]:
    """
    Batches that score `targets` given `prompts`, for `causal_nll`, `exact_nelbo` or `evaluate_likelihood`.

    Args:
        prompts (`list[list[int]]`): Token ids of the conditions, none of them empty (an unconditional score starts
            from `<|endoftext|>`).
        targets (`list[list[int]]`): Token ids to score.
        pad_token_id (`int`): Fills the rows.
        batch_size (`int`, defaults to 32): Rows per batch.

    Raises:
        `ValueError`: for an empty prompt or target, and for lists of different lengths.
    """
    if len(prompts) != len(targets):
        raise ValueError(f"`prompts` and `targets` must pair up, got {len(prompts)} and {len(targets)}")
    for number, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        if not prompt or not target:
            raise ValueError(f"`prompts` and `targets` must not be empty, got an empty one in pair {number}")
    for start in range(0, len(prompts), batch_size):
        pairs = list(zip(prompts, targets, strict=True))[start : start + batch_size]
        ids = [torch.tensor(prompt + target) for prompt, target in pairs]
        labels = [torch.tensor([-100] * len(prompt) + target) for prompt, target in pairs]
        yield {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_token_id),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "index": torch.arange(start, start + len(pairs)),
            "num_bytes": torch.zeros(len(pairs), dtype=torch.long),
        }
