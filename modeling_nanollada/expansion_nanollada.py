"""Infilling of unknown length (DreamOn, github.com/DreamLM/DreamOn): masks that become two, and masks that go.

Where a prompt's masks are fewer than the tokens that are missing, the model predicts `<|insert|>` at some of them, and
`<|delete|>` where they are more. The rows of a batch grow and shrink each for itself.
"""

import torch

from .canvas_nanollada import Canvas
from .commit_nanollada import best
from .generation_config_nanollada import require
from .rule_nanollada import Decision, Step

NEW, NOTHING = -1, -2  # in the place of a column's origin: a mask that comes in; behind the end of a shorter row


class Expander:
    """
    What is left of the rows' expansions, and their execution.

    Args:
        canvas ([`Canvas`]): The rows, all of them prompts with masks.
        sampler ([`Sampler`]): For its settings and the ids of the control tokens.
        config ([`NanoLLaDAConfig`]): Of the model: no row grows beyond its positions.

    Raises:
        `ValueError`: for models in blocks, for new tokens behind the prompt, and for rows that could not be padded.
    """

    def __init__(self, canvas: Canvas, sampler, config):
        name = "`max_expansions` fills the masks of whole prompts"
        found = f"{name}: `config.block_length` must be None, got {config.block_length}"
        require(config.block_length is None, found)
        new = canvas.length - canvas.prompt_length
        require(new == 0, f"{name}: `max_new_tokens` must be 0 with it, got {new}")
        found = f"`pad_token_id` must be set for `max_expansions` of several rows, got None and {len(canvas.ids)} rows"
        require(canvas.pad_token_id is not None or len(canvas.ids) == 1, found)
        self.canvas, (self.delete, self.insert) = canvas, sampler.edit_token_ids
        self.block = canvas.undecided.clone()  # [B, W], what is generated
        room = config.max_position_embeddings - canvas.visible.sum(1)  # [B]
        self.left = room.clamp(min=0, max=sampler.settings.max_expansions)

    def exclude(self, rows: torch.LongTensor, row_of: torch.LongTensor, logits: torch.Tensor) -> torch.Tensor:
        """The logits, `[N, V]`, of positions in `rows[row_of]`: where no expansion is left, none is predicted."""
        spent = self.left[rows[row_of]] == 0  # [N]
        never = torch.nn.functional.one_hot(torch.tensor(self.insert), logits.shape[1]).bool().to(logits.device)
        return logits.masked_fill(spent[:, None] & never, -torch.inf)

    def limit(self, step: Step, decision: Decision) -> Decision:
        """Of the expansions that a step selected the likeliest, as many as are left; the others' masks stay."""
        chosen = decision.selected & (decision.tokens == self.insert)  # [R, w]
        share = step.logits.log_softmax(-1, dtype=torch.double)[:, self.insert]  # [N]
        kept = best(step.spread(share, -torch.inf).masked_fill(~chosen, -torch.inf), self.left[step.rows])
        self.left[step.rows] -= kept.sum(1)
        decision.selected = decision.selected & (kept | ~chosen)
        return decision

    def execute(self) -> torch.LongTensor | None:
        """Moves what stands behind the control tokens in the block; `origins`, or `None` where nothing moves."""
        block, ids = self.block, self.canvas.ids
        inserted, deleted = (block & (ids == token) for token in (self.insert, self.delete))
        if not bool((inserted | deleted).any()):
            return None
        origin = origins(inserted, deleted, self.canvas.columns <= self.canvas.last[:, None])
        self.canvas.move(origin, reopened=inserted)
        kept = block.gather(1, origin.clamp(min=0)) & (origin >= 0)
        self.block = kept | (origin == NEW)
        return origin


def origins(inserted: torch.BoolTensor, deleted: torch.BoolTensor, inside: torch.BoolTensor) -> torch.LongTensor:
    """
    The column, `[B, W']`, that each column's content has come from, all `[B, W]`: what is `inserted` stays, with
    `NEW` behind it, and what is `deleted` goes. `NOTHING` fills rows that end sooner than the longest.
    """
    count = inside.long() + inserted.long() - deleted.long()  # [B, W]
    first = count.cumsum(1) - count
    width = int(count.sum(1).max())
    columns = torch.arange(count.shape[1], device=count.device).expand_as(count)
    origin = count.new_full((len(count), width + 1), NOTHING)  # the last column takes what goes nowhere
    origin = origin.scatter(1, first.where(inside & ~deleted, width), columns)
    origin[:, width] = NOTHING
    return origin.scatter(1, (first + 1).where(inserted, width), NEW)[:, :width]
