"""LLaDA 2.2's decoding loop (`JointThresholdInDel` in SGLang): LLaDA 2.1's, and a block's tokens may go or make room.

`<|delete|>` as the choice of a position removes it, and a mask comes in at the block's end; `<|insert|>` puts a mask
before it, and what is pushed over the block's end is lost. So the block keeps its length, and caches stay exact.
"""

import torch

from .commit_nanollada import above_threshold, best
from .joint_nanollada import likeliest, on_places
from .rule_nanollada import Decision, Step


class Memory:
    """
    What the loop remembers of a block's B rows and w columns.

    Args:
        masked (`torch.BoolTensor` of shape `(rows, width)`): The masks before the first step. They are the original
            ones: the mark moves with its token, and masks that come in later have none.
    """

    def __init__(self, masked: torch.BoolTensor):
        self.original = masked.clone()
        self.updates = torch.zeros_like(masked[:, 0], dtype=torch.long)  # [B], steps
        self.passes = torch.zeros_like(self.updates)  # [B], those of them without an original mask
        self.states, self.written = [], []  # per step [B, w]: the ids that it saw, what it wrote; −1 where nothing


def structural(step: Step, sampler) -> Decision:
    """The rule "structural"."""
    if step.index == 0:
        masked = step.active.new_zeros(sampler.block_shape)
        masked[step.rows] = step.active
        sampler.memory["structural"] = Memory(masked)
    settings, ids = sampler.settings, (sampler.mask_token_id, sampler.edit_token_ids)
    limits = (settings.joint_threshold, settings.joint_edit_threshold, settings.max_post_steps)
    return structural_step(step, sampler.memory["structural"], *ids, *limits)


def structural_step(
    step: Step, memory: Memory, mask: int, controls: tuple, threshold: float, edit_threshold: float, max_passes: int
) -> Decision:
    """
    One step of the R rows: the new ids, and which rows are done.

    While original masks are left, as many masks as came in and one more are decided at least, the surest first; then
    all that come in, at once. The step after `max_passes` of that kind, or after as many more as the block is long,
    is the last: it decides what is masked, and neither removes nor inserts. A row without a change is done.

    Args:
        step ([`Step`]): Its logits are of all that is generated in the block, the mask's −∞.
        memory ([`Memory`]): Of the block.
        mask (`int`), controls (`tuple[int, int]`): The ids of `<|mask|>`, and of `<|delete|>` and `<|insert|>`.
    """
    block, rows = step.read, step.rows
    tokens, probability = likeliest(step.logits, block)
    masked = step.active
    original = memory.original[rows] & masked
    filling = original.any(1)  # [R]
    memory.updates[rows] += 1
    memory.passes[rows] += ~filling
    last = (memory.passes[rows] > max_passes) | (memory.updates[rows] > block.sum(1) + max_passes)

    confidence = probability.masked_fill(~masked, -torch.inf)
    needed = (masked & ~original).sum(1) + 1
    sure = above_threshold(confidence, threshold)
    sure = torch.where((sure.sum(1) >= needed)[:, None], sure, best(confidence, needed))
    commits = torch.where((filling & ~last)[:, None], sure, masked)
    writes = commits | (block & ~masked & (tokens != step.ids) & (probability > edit_threshold))

    plain = step.logits.index_fill(1, torch.tensor(controls, device=step.ids.device), -torch.inf).argmax(-1)
    tokens = torch.where(last[:, None], on_places(plain, block, 0), tokens)
    tokens = another_way(step, memory, tokens, probability.masked_fill(~writes, torch.inf), last)
    for past, now in ((memory.states, step.ids), (memory.written, tokens.masked_fill(~writes, -1))):
        past.append(now.new_full(memory.original.shape, -1).index_copy(0, rows, now))
    chosen = tokens.where(writes, step.ids)
    new, memory.original[rows], origin = restructure(step.ids, chosen, block, memory.original[rows], mask, controls)
    return Decision(rewritten=new, origin=origin, finished=last | ~writes.any(1))


def another_way(step, memory, tokens, confidence, last) -> torch.LongTensor:
    """
    The tokens, `[R, w]`, with another one in rows that were in this state before: where the change is the least sure,
    the best of those that no step wrote there. `confidence`, `[R, w]`, is +∞ where nothing is written.
    """
    if not memory.states:
        return tokens
    seen = (torch.stack(memory.states)[:, step.rows] == step.ids).all(2).any(0)  # [R]
    confidence = confidence.masked_fill(tokens == step.ids, torch.inf)
    again = (seen & ~last & confidence.isfinite().any(1)).nonzero()[:, 0]  # [A]
    column = confidence[again].argmin(1)
    number = step.read.flatten().cumsum(0).view_as(step.read)[again, column] - 1  # among the N
    logits = step.logits[number]  # [A, V]
    tried = torch.stack(memory.written, 1)[step.rows[again], :, column]  # [A, steps]
    tried = tried.masked_fill(tried < 0, logits.shape[1])
    closed = logits.new_zeros(len(again), logits.shape[1] + 1, dtype=torch.bool).scatter(1, tried, True)
    logits = logits.masked_fill(closed[:, :-1], -torch.inf)
    other = torch.where(logits.isneginf().all(1), tokens[again, column], logits.argmax(-1))
    return tokens.index_put((again, column), other)


def restructure(ids, chosen, block, original, mask: int, controls) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Executes what was chosen; ids, marks and the columns that these stood in (−1: none), afterwards, `[R, w]`.

    Args:
        ids, chosen (`torch.LongTensor` of shape `(rows, width)`): The tokens before, and what to put there, the
            `controls` among it.
        block (`torch.BoolTensor` of shape `(rows, width)`): One run in each row. What is outside stays.
        original (`torch.BoolTensor` of shape `(rows, width)`): Marks, which move with their tokens.
    """
    width = ids.shape[1]
    deleted, inserted = (block & (chosen == token) for token in controls)
    count = block.long() - deleted.long() + inserted.long()
    place = block.int().argmax(1, keepdim=True) + count.cumsum(1) - count  # of the first that becomes of a position
    first = place.where(block & ~deleted, 2 * width)  # the last column takes what goes nowhere
    second = (place + 1).where(inserted, 2 * width)

    def move(single, of_two, fill, outside):
        """What stands on each place afterwards: of a token that stays `single`, of one behind a new mask `of_two`."""
        moved = single.new_full((len(ids), 2 * width + 1), fill)
        moved = moved.scatter(1, first, single.masked_fill(inserted, fill)).scatter(1, second, of_two)
        return moved[:, :width].where(block, outside)

    columns = torch.arange(width, device=ids.device).expand_as(ids)
    nothing = torch.zeros_like(original)
    return (
        move(chosen, ids, mask, ids),
        move(original, original, False, nothing),
        move(columns, columns, -1, columns),
    )
