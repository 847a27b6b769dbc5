"""How often a model, or what it has learnt since its reference, prefers the better answer of held-out pairs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from nanollada.trainers.data.packing import EosPadding
from nanollada.trainers.preferences.pairs import PAIR, padded
from nanollada.trainers.scoring.likelihood import score_rows


@dataclass
class PairScores:
    """
    Log-likelihoods of pairs in nats: exact for AR, their bounds (ELBOs) for diffusion. `[N, 2]`: chosen, rejected.

    Attributes:
        scores (`torch.DoubleTensor` of shape `(pairs, 2)`): The model's.
        variances (`torch.DoubleTensor` of shape `(pairs, 2)`): Of these, from their masks; 0 for AR.
        reference (`torch.DoubleTensor` of shape `(pairs, 2)`, *optional*): The reference's scores, of the same masks.
    """

    scores: torch.Tensor
    variances: torch.Tensor
    reference: torch.Tensor | None = None

    @property
    def margins(self) -> torch.DoubleTensor:
        """`(pairs,)`: score of chosen − score of rejected; with a reference the difference of both models' margins."""
        ratios = self.scores if self.reference is None else self.scores - self.reference
        return ratios[:, 0] - ratios[:, 1]

    @property
    def accuracy(self) -> float:
        """The share of pairs with a margin above 0; one of exactly 0 counts half."""
        return self._wins().mean().item()

    @property
    def accuracy_standard_error(self) -> float | None:
        """Of `accuracy` as an estimate for other pairs of the kind; `None` for a single pair."""
        wins = self._wins()
        return (wins.std() / len(wins) ** 0.5).item() if len(wins) > 1 else None

    def _wins(self) -> torch.DoubleTensor:
        return (self.margins > 0).double() + (self.margins == 0).double() / 2


def score_pairs(
    model,
    rows: Sequence[Mapping],
    *,
    reference=None,
    padding: EosPadding | None = None,
    samples: int = 64,
    seed: int = 0,
    batch_size: int = 8,
    block_length: int | None = None,
) -> PairScores:
    """
    Scores both answers of held-out pairs, with or without a reference.

    Without one the margin says which answer the model finds likelier; with one, as DPO does, which of them it has come
    to find likelier than the reference did.

    Args:
        model, reference (`PreTrainedModel`): Both AR or both diffusion, adapted or not.
        rows (`Sequence`): Pairs of `prompt_ids`, `chosen_ids`, `rejected_ids`.
        padding (`EosPadding`, *optional*): Behind answers, see `padding_for`.
        samples (`int`, *optional*): Masks per answer, even; few targets are enumerated, see `score_rows`.
        seed (`int`, *optional*): Of the masks, which model and reference share.
        batch_size (`int`, *optional*): Pairs per forward.
        block_length (`int`, *optional*): As in `exact_nelbo`.

    Raises:
        `ValueError`: for no rows, and as `score_rows`.
    """
    if not len(rows):
        raise ValueError("`rows` must hold at least one pair to score, got none")
    settings = {"samples": samples, "seed": seed, "block_length": block_length}
    scores, variances = _scores(model, rows, padding, batch_size, settings)
    other = None if reference is None else _scores(reference, rows, padding, batch_size, settings)[0]
    return PairScores(scores, variances, other)


def _scores(model, rows, padding, batch_size, settings) -> tuple[torch.DoubleTensor, torch.DoubleTensor]:
    batches = _batches(rows, padding, batch_size, model.config.pad_token_id or 0)
    parts = [(nats, variance) for _, nats, variance, _ in score_rows(model, batches, **settings)]
    nats, variances = (torch.cat(column).cpu().view(-1, 2) for column in zip(*parts, strict=True))
    return -nats, variances


def _batches(rows, padding, batch_size: int, pad_token_id: int) -> Iterator[dict[str, torch.Tensor]]:
    """Rows of `score_rows`: chosen and rejected of each pair side by side."""
    for start in range(0, len(rows), batch_size):
        ids, prompts = [], []
        for number in range(start, min(start + batch_size, len(rows))):
            pair = padded({name: list(rows[number][name]) for name in PAIR}, padding)
            ids += [torch.tensor(pair["prompt_ids"] + pair[name]) for name in PAIR[1:]]
            prompts += 2 * [len(pair["prompt_ids"])]
        lengths = torch.tensor([len(row) for row in ids])
        padded_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad_token_id)  # [2B, L]
        columns = torch.arange(padded_ids.shape[1])
        tokens = columns < lengths[:, None]
        answer = tokens & (columns >= torch.tensor(prompts)[:, None])
        yield {
            "input_ids": padded_ids,
            "labels": padded_ids.masked_fill(~answer, -100),
            "attention_mask": tokens.long(),
            "index": torch.arange(2 * start, 2 * start + len(ids)),
        }
