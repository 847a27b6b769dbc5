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
