"""Infilling of unknown length (DreamOn, github.com/DreamLM/DreamOn): fewer or more masks than there are tokens.

A run of m masks that stands for n tokens is a gap. Its i-th mask is to predict, from 1,

    token i      where i <= min(n, 2m − n),
    `<|delete|>` where i > n, and
    `<|insert|>` where i > 2m − n: the mask becomes two.

So the labels are a function of n and m: the tokens come first, and the last n − m masks expand, or all of them. When a
round of labels is carried out, m masks become min(n, 2m): ⌈log₂(n / m)⌉ rounds and n − m expansions are enough.
DreamOn merges pairs of masks anywhere in a gap: there a mask can't know which token is its own, even where n is known.
"""

from dataclasses import dataclass, field, fields

import torch

from nanollada.trainers.noise import masking
from nanollada.trainers.noise.corruption import Corruption, special_ids
from nanollada.trainers.noise.keys import (
    STREAM_EXPAND_CHOICE,
    STREAM_EXPAND_COUNT,
    STREAM_EXPAND_ROW,
    keyed_uniform,
)


@dataclass
class ExpansionSettings:
    """Which rows have a hole, and how many masks it has; see `corrupt`."""

    expand_rows: float = field(
        default=0.5, metadata={"help": "Share of the rows of which one stretch is to be filled, with its length."}
    )
    merge_rate: float = field(default=0.5, metadata={"help": "Share of the gaps with fewer masks than tokens."})
    extra_rate: float = field(default=0.25, metadata={"help": "Share of the gaps with more masks than tokens."})
    max_extra: int = field(default=16, metadata={"help": "Most masks that a row gets beyond its tokens."})

    def check(self) -> None:
        """Raises `ValueError` for values out of range."""
        for name in ("expand_rows", "merge_rate", "extra_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie in [0, 1], got {getattr(self, name)}")
        if self.merge_rate + self.extra_rate > 1:
            raise ValueError(
                f"`merge_rate` and `extra_rate` must be at most 1 together, got {self.merge_rate} and "
                f"{self.extra_rate}"
            )
        if self.max_extra < 1:
            raise ValueError(f"`max_extra` must be >= 1 (`extra_rate` 0 adds none), got {self.max_extra}")


def check(args) -> None:
    """Raises `ValueError` for what has no meaning where rows change their length."""
    lengths = "expansions change the length of rows"
    for name, why in (
        ("complementary", "a gap has no complement"),
        ("block_length", lengths),
        ("block_length_schedule", lengths),
        ("attention_annealing_steps", lengths),
        ("repetition_penalty_weight", "the model's draft has another length than the row"),
    ):
        if value := getattr(args, name):
            raise ValueError(f"`{name}` must be unset with `corruption` expansion: {why}, got {value!r}")


def needs_edit_tokens(args) -> bool:
    """Whether a stretch may have fewer or more masks than tokens."""
    return args.expand_rows > 0 and (args.merge_rate > 0 or args.extra_rate > 0)


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
    **settings,
) -> Corruption:
    """
    Masks as `masking.corrupt`, and in a share `expand_rows` of the rows one stretch of text, with wrong numbers of
    masks.

    The stretch lies between two targets, uniform in a run of targets that are text. One half of these rows hides it
    all, as a decoder finds it; the others hide k of its tokens, as `masking.corrupt`. Of each run of n hidden tokens,
    m = 1..n − 1 (uniform) masks are left with probability `merge_rate`; with `extra_rate` it gets 1..`max_extra`
    (uniform) more, and so do, in that share of the rows, one or a few places where nothing is hidden: in half of them
    nothing is hidden elsewhere either. Labels are those of the module's law.
    Such a row counts as its labels' mean cross-entropy, times its targets, as rows do everywhere.

    Rows so become shorter or longer, at most by `max_extra`: `origin` says what came from where, and nothing is lost
    but the tokens whose masks were merged.

    Args:
        input_ids, targets, config, index, rank, epoch, block_ids: As in `masking.corrupt`; `config` knows
            `<|delete|>` and `<|insert|>`.
        **settings: Those of `MaskingSettings` and `ExpansionSettings`.

    Returns:
        `Corruption`, of other columns than the batch's, see `origin`.

    Raises:
        `ValueError`: as `ExpansionSettings.check` and `masking.corrupt`, and for a model in blocks.
    """
    own = ExpansionSettings(**{field.name: settings.pop(field.name) for field in fields(ExpansionSettings)})
    own.check()
    if config.block_length is not None:
        raise ValueError(
            f"`corruption` expansion is for whole rows: `config.block_length` must be None, got {config.block_length}"
        )
    keys, length = (seed, index, epoch), input_ids.shape[1]
    places = {"seed": seed, "index": index, "rank": rank, "epoch": epoch, "block_ids": block_ids, **settings}
    noise = masking.corrupt(input_ids, targets, config, **places)
    draws = keyed_uniform(*keys, STREAM_EXPAND_ROW, 6)  # [B, 6]: hole?, its ends, all hidden?, extra masks
    special = torch.tensor(sorted(special_ids(config)), device=input_ids.device)
    text = targets & ~torch.isin(input_ids, special)
    hole = (draws[:, :1] < own.expand_rows) & text.any(-1, keepdim=True)  # [B, 1]
    if not hole.any():
        return noise

    # 1. The tokens that are hidden, in gaps of n, with their number in the gap from 1.
    span = stretch(text, draws[:, 1:3]) & hole  # [B, L]
    some = masking.corrupt(input_ids, span, config, **places).supervised
    hidden = torch.where(draws[:, 3:4] < 0.5, span, some) & (draws[:, 4:5] >= own.extra_rate / 2)
    size, number = gaps(hidden)  # [B, L]
    # 2. The masks that stand for them: m, and those beyond n.
    choice, amount = (keyed_uniform(*keys, stream, length) for stream in (STREAM_EXPAND_CHOICE, STREAM_EXPAND_COUNT))
    merged = (choice < own.merge_rate) & (size > 1)
    masks = of_the_gap(torch.where(merged, 1 + (amount * (size - 1)).long(), size), number)
    more = torch.where(choice >= 1 - own.extra_rate, 1 + (amount * own.max_extra).long(), 0)
    extra = of_the_gap(more, number).where(hidden & (number == size), 0)  # behind the last
    free = (text | _before(text)) & ~hidden & ~_before(hidden) & hole
    places_left = free.sum(-1, keepdim=True)
    behind = free & ((free.cumsum(-1) == (draws[:, 5:6] * places_left).long() + 1) | (choice * places_left < 1))
    behind = behind & (draws[:, 4:5] < own.extra_rate)
    extra = (extra + (1 + (amount * own.max_extra).long()).where(behind, 0)).cumsum(-1).clamp(max=own.max_extra)
    extra = extra.diff(dim=-1, prepend=extra.new_zeros(len(extra), 1))
    # 3. Labels, and how many columns become of each.
    own_token = number <= torch.minimum(size, 2 * masks - size)
    labels = input_ids.where(own_token, config.insert_token_id).where(hidden, -100)
    labels = torch.where(hole, labels, noise.labels)
    noisy = torch.where(hole, input_ids.masked_fill(hidden, config.mask_token_id), noise.noisy_input_ids)
    count = torch.where(hidden, (number <= masks).long(), 1) + extra
    noisy, labels, origin = _moved(noisy, labels, count, config)
    # 4. Weights: those of the rows without a hole are as they were, and where they were.
    weights = noise.weights.gather(-1, origin.clamp(min=0)).where(labels != -100, 0.0)
    shares = targets.sum(-1, keepdim=True).double() / (labels != -100).sum(-1, keepdim=True).clamp(min=1)
    weights = torch.where(hole, shares.where(labels != -100, 0.0), weights)
    return Corruption(noisy, labels, weights, origin=origin)


def stretch(text: torch.Tensor, draws: torch.Tensor) -> torch.BoolTensor:
    """
    From one of the positions `text`, `[B, L]`, to another of the same run, both uniform by the `draws`, `[B, 2]`.
    """
    columns = torch.arange(text.shape[1], device=text.device)
    chosen = (draws[:, :1] * text.sum(-1, keepdim=True)).long()
    one = (text & (text.cumsum(-1) == chosen + 1)).int().argmax(-1, keepdim=True)  # [B, 1]
    size, number = (values.gather(-1, one) for values in gaps(text))
    other = one - number + 1 + (draws[:, 1:2] * size).long()
    return (columns >= torch.minimum(one, other)) & (columns <= torch.maximum(one, other)) & text


def gaps(hidden: torch.Tensor) -> tuple[torch.LongTensor, torch.LongTensor]:
    """`[B, L]` each: the length of the run of `hidden` positions, and each one's number in it from 1; 0 elsewhere."""
    numbers = []
    for mask in (hidden, hidden.flip(-1)):
        columns = torch.arange(1, mask.shape[1] + 1, device=mask.device).expand(mask.shape)
        numbers.append(columns - columns.where(~mask, 0).cummax(-1).values)
    size = numbers[0] + numbers[1].flip(-1) - 1
    return size.where(hidden, 0), numbers[0]


def of_the_gap(values: torch.Tensor, number: torch.LongTensor) -> torch.Tensor:
    """`[B, L]`: at each position of a gap the value at its first one; 0 elsewhere."""
    columns = torch.arange(values.shape[1], device=values.device)
    return values.gather(-1, (columns - number + 1).clamp(max=len(columns) - 1)).where(number > 0, 0)


def _before(hidden):
    """`[B, L]`: the columns before a hidden one."""
    return torch.nn.functional.pad(hidden[:, 1:], (0, 1))


def _moved(noisy, labels, count, config):
    """Ids, labels and `origin`, `[B, L']`, with `count` columns, `[B, L]`, of each: one, and masks to be deleted."""
    ends = count.cumsum(-1)  # [B, L]
    columns = torch.arange(int(ends[:, -1].max()), device=count.device).expand(len(count), -1).contiguous()  # [B, L']
    source = torch.searchsorted(ends, columns, right=True).clamp(max=count.shape[1] - 1)
    inside = columns < ends[:, -1:]
    added = inside & (columns > (ends - count).gather(-1, source))
    noisy = noisy.gather(-1, source).masked_fill(added, config.mask_token_id)
    labels = labels.gather(-1, source).masked_fill(added, config.delete_token_id).masked_fill(~inside, -100)
    return noisy.where(inside, config.pad_token_id), labels, source.where(inside, -1)
