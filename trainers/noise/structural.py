"""Structural editing (LLaDA 2.2): drafts in which tokens are missing or too many, and labels that remove and insert.

A share of the rows is spoilt in this way, the others are those of `editing.corrupt`. The length of a block does not
change, nor does what is attended to: a stretch of targets (an answer's part of a block) that has lost tokens ends in
masks, and one that has gained some is cut at its end.
"""

from dataclasses import dataclass, field, fields

import torch

from nanollada.trainers.noise import editing, masking
from nanollada.trainers.noise.corruption import Corruption
from nanollada.trainers.noise.editing import EditingSettings
from nanollada.trainers.noise.keys import keyed_uniform

# Of `keys`: is a row spoilt, and how much; where tokens are missing, too many, other ones; which.
STREAM_ROW, STREAM_MISSING, STREAM_EXTRA, STREAM_OTHER, STREAM_EXTRA_TOKEN, STREAM_OTHER_TOKEN = range(16, 22)


@dataclass
class StructuralSettings:
    """Which rows lose and gain tokens, how many, and what the labels count; see `corrupt`."""

    structural_rows: float = field(
        default=0.5, metadata={"help": "Share of the rows in which tokens are missing or too many."}
    )
    drop_rate: float = field(
        default=0.1, metadata={"help": "Largest share of such a row's targets that is missing; labels: <|insert|>."}
    )
    insert_rate: float = field(
        default=0.1, metadata={"help": "Largest number of tokens too many, by its targets; labels: <|delete|>."}
    )
    site_weight: float = field(
        default=1.0, metadata={"help": "What a visible token that is to change counts in such a row, beside a target."}
    )
    anchor_weight: float = field(
        default=1.0,
        metadata={"help": "What one counts that is to stay. As much: calibrated choices; less: eager ones."},
    )

    def check(self) -> None:
        """Raises `ValueError` for values out of range."""
        for name in ("structural_rows", "drop_rate", "insert_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie in [0, 1], got {getattr(self, name)}")
        if self.site_weight <= 0:
            raise ValueError(f"`site_weight` must be above 0 (`structural_rows` 0: none), got {self.site_weight}")
        if self.anchor_weight < 0:
            raise ValueError(f"`anchor_weight` must be >= 0, got {self.anchor_weight}")


def check(args) -> None:
    """Raises `ValueError` for settings that don't go together."""
    editing.check(args)
    _refuse_complements(args.complementary, args.structural_rows)
    if args.repetition_penalty_weight and needs_edit_tokens(args):
        raise ValueError(
            "`repetition_penalty_weight` punishes repeated tokens, and labels repeat `<|delete|>`: it must be 0 with "
            f"`structural_rows`, got {args.repetition_penalty_weight}"
        )


def needs_edit_tokens(args) -> bool:
    """Whether tokens are missing or too many."""
    return args.structural_rows > 0 and (args.drop_rate > 0 or args.insert_rate > 0)


def _refuse_complements(complementary: bool, share: float) -> None:
    if complementary and share:
        raise ValueError(
            "`complementary` masks what its other copy shows, and a spoilt row has no such places: `structural_rows` "
            f"must be 0 with it, got {share}"
        )


def corrupt(
    input_ids: torch.Tensor,
    targets: torch.Tensor,
    config,
    *,
    seed: int,
    index: torch.Tensor,
    epoch: torch.Tensor,
    block_ids: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    lexicon,
    **settings,
) -> Corruption:
    """
    Corrupts as `editing.corrupt`, and a share `structural_rows` of the rows in another way.

    Of such a row each target is missing with probability ρ·`drop_rate`, and has a token too many before it with
    probability ρ·`insert_rate`, ρ uniform in [0, 1) for the row; of those left each is masked where `masking.corrupt`
    masks it, else replaced with probability ρ·`edit_rate`. Tokens come from the data's unigram law, or for
    `edit_source` "uniform" from the vocabulary. Each stretch of targets that touch, of one block and document, is as
    long as before. Labels are those of [`edit_labels`].

    Its masks count as their mean times the row's targets, as under "exact" masks. A visible token counts `site_weight`
    where something is to be done and `anchor_weight` where it is to stay; where both are equal, the optimum is the
    probability of each operation.

    Args:
        input_ids, targets, config, seed, index, epoch, block_ids, lexicon: As in `editing.corrupt`.
        document_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): Documents of packed rows.
        **settings: Those of `MaskingSettings`, `EditingSettings` and `StructuralSettings`; and `rank`, `draft`.

    Raises:
        `ValueError`: as the settings' `check` and `editing.corrupt`.
    """
    own = StructuralSettings(**{field.name: settings.pop(field.name) for field in fields(StructuralSettings)})
    own.check()
    _refuse_complements(settings.get("complementary", False), own.structural_rows)
    keys = {"seed": seed, "index": index, "epoch": epoch}
    noise = editing.corrupt(input_ids, targets, config, **keys, block_ids=block_ids, lexicon=lexicon, **settings)
    if not needs_edit_tokens(own):
        return noise
    draws = keyed_uniform(seed, index, epoch, STREAM_ROW, 2)  # [B, 2]: is it spoilt; ρ
    rows = ((draws[:, 0] < own.structural_rows) & targets.any(-1)).nonzero()[:, 0]  # [R]
    if noise.edited is None:
        noise.edited = torch.zeros_like(targets)
    if len(rows) == 0:
        return noise
    clean, own_targets, rate = input_ids[rows], targets[rows], draws[rows, 1:]
    edits = {field.name: settings.pop(field.name) for field in fields(EditingSettings)}
    settings.pop("draft", None)
    hidden = masking.corrupt(input_ids, targets, config, **keys, block_ids=block_ids, **settings).supervised[rows]

    def uniform(stream: int) -> torch.DoubleTensor:
        return keyed_uniform(seed, index[rows], epoch[rows], stream, clean.shape[1])  # [R, L]

    source = "uniform" if edits["edit_source"] == "uniform" else "unigram"
    extra, other = (lexicon.draw(uniform(stream), source) for stream in (STREAM_EXTRA_TOKEN, STREAM_OTHER_TOKEN))
    replaced = lexicon.text[clean] & (uniform(STREAM_OTHER) < rate * edits["edit_rate"])
    shown = torch.where(replaced, other, clean).masked_fill(hidden, config.mask_token_id)
    parts = [None if ids is None else ids[rows] for ids in (block_ids, document_ids)]
    stretch = Stretches(own_targets, *parts)
    missing, too_many = uniform(STREAM_MISSING) < rate * own.drop_rate, uniform(STREAM_EXTRA) < rate * own.insert_rate
    draft = spoil(*map(stretch.cut, (shown, missing, too_many, extra)), stretch.inside, config.mask_token_id)
    controls = (config.delete_token_id, config.insert_token_id)
    labels = edit_labels(draft, stretch.cut(clean), stretch.length, config.mask_token_id, *controls)

    noisy, labels = stretch.put(clean, draft), stretch.put(torch.full_like(clean, -100), labels)  # [R, L]
    masked = own_targets & (noisy == config.mask_token_id)
    site = own_targets & ~masked & (labels != noisy)
    share = own_targets.sum(-1, keepdim=True).double() / masked.sum(-1, keepdim=True).clamp(min=1)  # [R, 1]
    weights = torch.where(masked, share, torch.where(site, own.site_weight, own.anchor_weight)) * own_targets
    noise.noisy_input_ids[rows], noise.labels[rows], noise.weights[rows] = noisy, labels, weights
    noise.edited = noise.edited.index_copy(0, rows, site)
    return noise


class Stretches:
    """
    The runs of neighbouring targets, each of one row, block and document; N of them, w wide.

    Args:
        targets (`torch.BoolTensor` of shape `(rows, length)`): What may change.
        *parts (`torch.LongTensor` of shape `(rows, length)`, *optional*): What also ends a run: blocks, documents.
    """

    def __init__(self, targets, *parts):
        begins = targets.clone()
        begins[:, 1:] &= ~targets[:, :-1]
        for part in parts:
            if part is not None:
                begins[:, 1:] |= targets[:, 1:] & (part[:, 1:] != part[:, :-1])
        self.row, start = begins.nonzero().unbind(-1)  # [N]
        number = begins.flatten().cumsum(0).view_as(targets)[targets] - 1
        self.length = torch.bincount(number, minlength=len(start))  # [N]
        places = torch.arange(int(self.length.max()), device=targets.device)
        self.inside = places < self.length[:, None]  # [N, w]
        self.column = (start[:, None] + places).clamp(max=targets.shape[1] - 1)

    def cut(self, values: torch.Tensor) -> torch.Tensor:
        """`[N, w]` of `[rows, length]`."""
        return values[self.row[:, None], self.column]

    def put(self, values: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """`[rows, length]` with the runs' `new` values, `[N, w]`."""
        rows = self.row[:, None].expand_as(self.column)[self.inside]
        return values.index_put((rows, self.column[self.inside]), new[self.inside])


def spoil(shown, missing, too_many, extra, inside, mask_id: int) -> torch.LongTensor:
    """
    Leaves tokens out and puts others in; masks fill the end, and what is pushed over it is lost.

    Args:
        shown (`torch.LongTensor` of shape `(runs, width)`): The tokens, masks among them.
        missing, too_many (`torch.BoolTensor` of shape `(runs, width)`): The tokens to leave out, and those before
            which one of `extra`, `(runs, width)`, comes in.
        inside (`torch.BoolTensor` of shape `(runs, width)`): What belongs to a run.
    """
    width = shown.shape[1]
    stays, comes = inside & ~missing, inside & too_many
    count = stays.long() + comes.long()
    place = count.cumsum(1) - count  # of the first that becomes of a token
    nowhere = 2 * width
    spoilt = shown.new_full((len(shown), 2 * width + 1), mask_id)
    spoilt = spoilt.scatter(1, place.where(comes, nowhere), extra)
    spoilt = spoilt.scatter(1, (place + comes).where(stays, nowhere), shown)
    return spoilt[:, :width].where(inside, shown)


def matches(draft: torch.LongTensor, target: torch.LongTensor, length: torch.LongTensor, mask_id: int):
    """
    A longest common subsequence of each pair, in which a mask matches any token.

    Of equally long ones it has the fewest masks, and each match comes as early in the target as may be.

    Args:
        draft, target (`torch.LongTensor` of shape `(pairs, width)`): Tokens; only the first `length` of each count.
        length (`torch.LongTensor` of shape `(pairs,)`): Their lengths.
        mask_id (`int`): The mask token.

    Returns:
        `torch.LongTensor` of shape `(pairs, width)`: what each draft position matches, a place in the target, or −1.
    """
    pairs, width = draft.shape
    places = torch.arange(width, device=draft.device)
    inside = places < length[:, None]  # [N, w]
    best = torch.zeros(
        pairs, width + 1, width + 1, dtype=torch.int, device=draft.device
    )  # of what is left from (i, j)

    def matching(i):
        """`[N, w]`: the best of what is left with draft token i matched at each place, or −1."""
        token = draft[:, i : i + 1]
        gain = torch.where(token == mask_id, width + 1, width + 2)  # so many masks don't outweigh a token
        fits = inside & inside[:, i : i + 1] & ((token == target) | (token == mask_id))
        return torch.where(fits, best[:, i + 1, 1:] + gain, -1).int()

    for i in range(width - 1, -1, -1):
        here = torch.maximum(best[:, i + 1, :-1], matching(i))
        best[:, i, :-1] = here.flip(1).cummax(1).values.flip(1)
    matched, first = torch.full_like(draft, -1), torch.zeros_like(length)[:, None]
    for i in range(width):
        take = matching(i) == best[:, i, :-1]
        stop = (take | (best[:, i + 1, :-1] == best[:, i, :-1])) & (places >= first)  # matched there, or left out
        found, j = stop.any(1, keepdim=True), stop.int().argmax(1, keepdim=True)
        taken = found & take.gather(1, j)
        matched[:, i] = j.where(taken, -1)[:, 0]
        first = torch.where(found, j + taken.long(), width)
    return matched


def edit_labels(draft, target, length, mask_id: int, delete_id: int, insert_id: int) -> torch.LongTensor:
    """
    What each position of a draft should be predicted as.

    A match keeps its token, or the target's where a mask matched. In a gap before a match the first draft tokens take
    the gap's target tokens one for one; the rest is removed (`delete_id`); a target token too many makes the match the
    place before which room is made (`insert_id`), one token a round. What stands behind the last match is removed.

    Args:
        draft, target, length, mask_id: As of [`matches`].

    Returns:
        `torch.LongTensor` of shape `(pairs, width)`: −100 behind `length`.
    """
    matched = matches(draft, target, length, mask_id)
    width = draft.shape[1]
    places = torch.arange(width, device=draft.device).expand_as(draft)
    anchor = matched >= 0
    last = torch.where(anchor, places, -1).cummax(-1).values  # the match at or before each position
    before = torch.cat((torch.full_like(last[:, :1], -1), last[:, :-1]), 1)  # [N, w], strictly before
    following = torch.where(anchor, places, width).flip(-1).cummin(-1).values.flip(-1)  # at or behind
    ended = torch.where(before >= 0, matched.gather(1, before.clamp(min=0)), -1)  # of the target, before the gap
    begins = matched.gather(1, following.clamp(max=width - 1)).masked_fill(following == width, 0)
    room = begins - ended - 1  # target tokens of the gap, [N, w]
    rank = places - before - 1  # of a draft token in the gap; of a match the gap's draft tokens
    taken = target.gather(1, (ended + 1 + rank).clamp(0, width - 1))
    labels = torch.where((following < width) & (rank < room), taken, delete_id)
    kept = torch.where(room > rank, insert_id, target.gather(1, matched.clamp(min=0)))
    labels = torch.where(anchor, kept, labels)
    return labels.masked_fill(places >= length[:, None], -100)
