"""Labels of structural editing (LLaDA 2.2's report): a round of what turns a draft into its target."""

import torch


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
    gain = torch.where(draft[:, :, None] == target[:, None], width + 2, 0)  # so many masks don't outweigh a token
    gain = gain.masked_fill((draft == mask_id)[:, :, None], width + 1)
    gain = gain.masked_fill(~(inside[:, :, None] & inside[:, None]), 0)  # [N, w, w]
    best = draft.new_zeros(pairs, width + 1, width + 1)  # of what is left from (i, j) on
    for diagonal in range(2 * width - 2, -1, -1):
        i = torch.arange(max(0, diagonal - width + 1), min(diagonal, width - 1) + 1, device=draft.device)
        j = diagonal - i
        skip = torch.maximum(best[:, i + 1, j], best[:, i, j + 1])
        best[:, i, j] = torch.maximum(skip, best[:, i + 1, j + 1] + gain[:, i, j])
    matched = torch.full_like(draft, -1)
    rows, i, j = torch.arange(pairs, device=draft.device), torch.zeros_like(length), torch.zeros_like(length)
    for _ in range(2 * width):
        here, open_ = best[rows, i, j], (i < width) & (j < width)
        own = gain[rows, i.clamp(max=width - 1), j.clamp(max=width - 1)]
        after = best[rows, (i + 1).clamp(max=width), (j + 1).clamp(max=width)]
        take = open_ & (own > 0) & (here == after + own)
        down = open_ & ~take & (best[rows, (i + 1).clamp(max=width), j] == here)
        matched[rows[take], i[take]] = j[take]
        i, j = i + (take | down).long(), j + (open_ & ~down).long()
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
