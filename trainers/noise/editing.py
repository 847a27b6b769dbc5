"""Token editing (LLaDA 2.1, 2602.08676, §3): visible tokens that may be wrong, and are to be put right.

A share of the rows is edited; the others are masked as ever. What takes a token's place does not hang on that token:
given the row's other tokens, the noise's law then cancels out of the posterior, and the model learns how probable each
token is there, p(x_i | the others), whatever stands there now. For the same reason a token may be replaced by itself.
"""

from dataclasses import dataclass, field, fields
from typing import Literal

import torch

from nanollada.trainers.noise import masking
from nanollada.trainers.noise.corruption import Corruption
from nanollada.trainers.noise.keys import (
    STREAM_DRAFT,
    STREAM_EDIT_PLACE,
    STREAM_EDIT_ROW,
    STREAM_EDIT_TOKEN,
    keyed_uniform,
)

EDIT_SOURCES = ("mixed", "self", "unigram", "uniform")
_DRAFTED = {"self": 1.0, "mixed": 0.5}  # share of the edited rows


@dataclass
class EditingSettings:
    """Which rows are edited, how, and what an edit counts; see `corrupt`."""

    edit_rows: float = field(default=0.5, metadata={"help": "Share of the rows that are edited."})
    edit_source: Literal[EDIT_SOURCES] = field(
        default="mixed",
        metadata={
            "help": "What takes a token's place. self: the model's own draft of a few masked tokens; unigram: a token "
            "as frequent as in the data; uniform: any; mixed: self in half of the rows, unigram in the others."
        },
    )
    edit_rate: float = field(
        default=0.1, metadata={"help": "unigram, uniform: largest share of a row's visible targets that is replaced."}
    )
    draft_rate: float = field(
        default=1.0, metadata={"help": "self: largest share of a row's targets that is drafted."}
    )
    draft_temperature: float = field(
        default=0.0, metadata={"help": "self: 0 drafts the most probable token, above it one is drawn."}
    )
    draft_turns: int = field(
        default=1,
        metadata={"help": "self: a draft is read and rewritten up to so many times less one (multi-turn forward)."},
    )
    edit_weight: float = field(
        default=1.0, metadata={"help": "Weight of a row's mean cross-entropy at its replaced tokens."}
    )
    keep_weight: float = field(
        default=0.0, metadata={"help": "Weight of an edited row's mean cross-entropy at visible tokens left alone."}
    )

    def check(self) -> None:
        """Raises `ValueError` for names that `corrupt` does not know, and for values out of range."""
        if self.edit_source not in EDIT_SOURCES:
            raise ValueError(f"`edit_source` must be one of {', '.join(EDIT_SOURCES)}, got {self.edit_source!r}")
        for name in ("edit_rows", "edit_rate", "draft_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie in [0, 1], got {getattr(self, name)}")
        for name in ("draft_temperature", "keep_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be >= 0, got {getattr(self, name)}")
        if self.edit_weight <= 0:
            raise ValueError(f"`edit_weight` must be above 0 (`edit_rows` 0 edits nothing), got {self.edit_weight}")
        if self.draft_turns < 1:
            raise ValueError(f"`draft_turns` must be >= 1, got {self.draft_turns}")


def check(args) -> None:
    """Raises `ValueError` for what the source doesn't read, and for complements larger than a draft may be."""
    if args.edit_source not in _DRAFTED:
        for name in ("draft_rate", "draft_temperature", "draft_turns"):
            if getattr(args, name) != getattr(EditingSettings, name):
                rule = f"`{name}` is for `edit_source` {' or '.join(_DRAFTED)}"
                raise ValueError(f"{rule}, got {getattr(args, name)} with {args.edit_source}")
    if args.complementary and needs_drafts(args) and args.draft_rate < 1:
        raise ValueError(
            "`complementary` drafts a row's masks, and their complement: `draft_rate` must be 1 with it, got "
            f"{args.draft_rate}"
        )


def needs_drafts(args) -> bool:
    """Whether the model has to draft."""
    return args.edit_source in ("self", "mixed") and args.edit_rows > 0 and args.draft_rate > 0


def corrupt(
    input_ids: torch.Tensor,
    targets: torch.Tensor,
    config,
    *,
    seed: int,
    index: torch.Tensor,
    rank: torch.Tensor | None = None,
    epoch: torch.Tensor,
    block_ids: torch.Tensor | None = None,
    lexicon,
    draft=None,
    **settings,
) -> Corruption:
    """
    Masks as `masking.corrupt`, and in a share `edit_rows` of the rows replaces visible targets.

    Of an edited row with a noise source, each visible target is replaced with probability ρ, ρ uniform in
    [0, `edit_rate`] for the row. A row with the source "self" has no mask left: targets are masked as ever (the same
    law, at most a share `draft_rate`) and all of them are filled with the model's prediction, all at once. With
    `draft_turns` a draft is rewritten: it is that of turn u, u uniform in 1..`draft_turns`, where the model reads the
    draft of the turn before and predicts all its places anew.

    Labels stand at the masks, with their own weights, and at all replaced places R of a row, with
    `edit_weight` · targets / |R| each: a row's edits count as its mean cross-entropy on them, and rows by their
    targets, as everywhere. With `keep_weight` also at the visible targets that are left alone, likewise. Only text is
    replaced, drafted or kept: a decoder neither proposes nor edits special tokens, and the EOS that fill an answer up
    would be most of R.

    `complementary=True`: both copies of a row are edited, each at what is visible in it, with half the weight; a draft
    is that of the mask in one and of its complement in the other.

    Args:
        input_ids, targets, config, index, rank, epoch, block_ids: As in `masking.corrupt`.
        lexicon ([`Lexicon`]): The tokens that may be put in.
        draft (`Callable`, *optional*): The model's predictions, see [`CorruptionKind`]; for "self" and "mixed".
        **settings: Those of `MaskingSettings` and `EditingSettings`.

    Returns:
        `Corruption`, with `edited`.

    Raises:
        `ValueError`: as `EditingSettings.check` and `masking.corrupt`.
    """
    own = EditingSettings(**{field.name: settings.pop(field.name) for field in fields(EditingSettings)})
    own.check()
    noise = masking.corrupt(
        input_ids, targets, config, seed=seed, index=index, rank=rank, epoch=epoch, block_ids=block_ids, **settings
    )
    drafts = needs_drafts(own)
    if not own.edit_rows or not (drafts or own.edit_rate and own.edit_source != "self"):
        return noise
    rows = torch.arange(len(input_ids), device=input_ids.device).repeat(noise.copies)  # [C·B]
    keys, length = (seed, index[rows], epoch[rows]), input_ids.shape[1]
    draws = keyed_uniform(*keys, STREAM_EDIT_ROW, 4)  # [C·B, 4]: is it edited, drafted; ρ; turns
    text = targets & lexicon.text[input_ids]  # [B, L]
    edited = (draws[:, :1] < own.edit_rows) & text.any(-1, keepdim=True)[rows]  # [C·B, 1]
    drafted = edited & (draws[:, 1:2] < _DRAFTED.get(own.edit_source, 0.0))
    edited = edited & (~drafted | drafts)

    # 1. tokens of the lexicon in place of visible ones
    noisy, masks = noise.noisy_input_ids, noise.supervised  # [C·B, L]
    rate = own.edit_rate * draws[:, 2:3] * (edited & ~drafted)
    replaced = text[rows] & ~masks & (keyed_uniform(*keys, STREAM_EDIT_PLACE, length) < rate)
    source = "uniform" if own.edit_source == "uniform" else "unigram"
    noisy = torch.where(replaced, lexicon.draw(keyed_uniform(*keys, STREAM_EDIT_TOKEN, length), source), noisy)

    # 2. rows that the model drafts
    if drafts:
        settings["mask_rate_band"] = [0.0, own.draft_rate]
        hidden = masking.corrupt(
            input_ids, text, config, seed=seed, index=index, rank=rank, epoch=epoch, block_ids=block_ids, **settings
        )
        noisy = torch.where(drafted, hidden.noisy_input_ids, noisy)
        masks, replaced = masks & ~drafted, torch.where(drafted, hidden.supervised, replaced)
        turns = 1 + (draws[:, 3] * own.draft_turns).long()
        noisy = _drafted(noisy, replaced & drafted, turns, draft, lexicon.text, own.draft_temperature, keys)

    # 3. labels and weights
    kept = text[rows] & edited & ~masks & ~replaced if own.keep_weight else torch.zeros_like(masks)
    count = targets.sum(-1, keepdim=True)[rows].double() / noise.copies  # [C·B, 1]
    weights = torch.where(masks, noise.weights, 0.0)
    for weight, places in ((own.edit_weight, replaced), (own.keep_weight, kept)):
        weights = torch.where(places, weight * count / places.sum(-1, keepdim=True).clamp(min=1), weights)
    labels = input_ids[rows].masked_fill(~(masks | replaced | kept), -100)
    return Corruption(noisy, labels, weights, noise.copies, replaced)


def _drafted(noisy, where, turns, draft, text, temperature, keys):
    """`[C·B, L]`: the ids with the model's predictions at `where`, after as many turns as each row has."""
    seed, index, epoch = keys
    rows = where.any(-1).nonzero()[:, 0]
    for turn in range(1, max(turns[rows].tolist(), default=0) + 1):
        rows = rows[turns[rows] >= turn]
        here = where[rows]  # [R, L]
        logits = draft(noisy[rows], here, rows).masked_fill(~text, -torch.inf)  # [N, V]
        tokens = logits.argmax(-1)
        if temperature:
            uniform = keyed_uniform(seed, index[rows], epoch[rows], STREAM_DRAFT + (turn << 32), where.shape[1])[here]
            law = (logits / temperature).softmax(-1, dtype=torch.double).cumsum(-1)
            tokens = torch.searchsorted(law, uniform[:, None] * law[:, -1:], right=True)[:, 0]
        noisy = noisy.index_copy(0, rows, noisy[rows].masked_scatter(here, tokens))
    return noisy
