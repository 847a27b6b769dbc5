"""The rows in the making: what is decided, what is open, where rows end."""

import torch
from torch.nn.functional import pad
from transformers import StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria

from .generation_config_nanollada import require


class Canvas:
    """
    The rows in the making, `[B, W]`: the prompt, then masks, then, for a model with `config.block_length`, what its
    last block lacks: masks that are seen and never decoded, so that the block looks as it did in training.
    """

    def __init__(self, input_ids, attention_mask, settings, config):
        rows, self.prompt_length = input_ids.shape
        self.length = settings.max_length
        new_tokens = self.length - self.prompt_length
        grid = config.block_length
        block_length = settings.block_length or grid or new_tokens or 1
        message = f"`block_length` must divide the model's `config.block_length`, got {block_length} and {grid}"
        require(grid is None or grid % block_length == 0, message)
        visible = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.device)
        visible = pad(visible.bool(), (0, new_tokens), value=True)
        lacking = -visible.sum(1) % (grid or 1)  # [B]
        width = int(lacking.max())
        self.ids = pad(input_ids, (0, new_tokens + width), value=config.mask_token_id)  # [B, W]
        self.visible = torch.cat((visible, torch.arange(width, device=input_ids.device) < lacking[:, None]), dim=1)
        self.all_visible = bool(self.visible.all())
        self.undecided = (self.ids == config.mask_token_id) & self.visible
        self.undecided[:, self.length :] = False
        wanted = f"`max_new_tokens` must be > 0 for a prompt without mask tokens, got {new_tokens}"
        if settings.max_new_tokens != 0:  # the call's `max_length`, the checkpoint's, or the last position
            wanted = (
                f"`max_length` must exceed a prompt without mask tokens, got {self.length} for {self.prompt_length}"
            )
        require(bool(self.undecided.any()), wanted)
        self.given = self.visible & (self.ids != config.mask_token_id)  # the prompt, for guidance
        self.columns = torch.arange(self.length, device=input_ids.device)
        positions = torch.arange(self.ids.shape[1], device=input_ids.device) - self.prompt_length
        if grid is not None:  # the grid of training, from the row's first token
            positions = self.visible.long().cumsum(1) - 1
        self.blocks = (positions.clamp(min=0) // block_length).expand_as(self.ids)
        self.ended = torch.zeros_like(self.undecided[:, 0])  # [B], rows that were stopped
        pad_token_id = settings._pad_token_tensor
        self.pad_token_id = None if pad_token_id is None else pad_token_id.to(input_ids.device)
        self.mask_token_id = config.mask_token_id
        self.commit_steps = torch.full_like(self.ids, -1)  # [B, W], the step that decided a position; −1: none did
        self.forwards = torch.zeros(rows, dtype=torch.long, device=input_ids.device)
        self.last = torch.full_like(self.forwards, self.length - 1)  # [B], the last column that is kept
        self.checked = torch.full_like(self.forwards, self.prompt_length)  # [B], columns the criteria have seen
        self.put = int(self.decided_columns().min())  # columns that the streamer has

    def refuse_masks_inside_prompts(self, name: str) -> None:
        """For the rule of the setting `name`, which moves what stands behind a token."""
        found = self.undecided[:, : self.prompt_length].any(1)  # [B]
        message = f"`{name}` moves tokens: there must be no mask tokens inside a prompt, got some in row"
        require(not bool(found.any()), f"{message} {int(found.int().argmax())}")

    def next_block(self):
        """Each row's first block that holds undecided positions: these positions, `[B, W]`."""
        first = self.blocks.masked_fill(~self.undecided, self.ids.shape[1]).amin(1, keepdim=True)
        return self.undecided & (self.blocks == first)

    def apply(self, rows, columns, decision):
        """Writes what a step decided, a [`Decision`] about `rows` in the slice `columns`; after one forward pass."""
        if decision.rewritten is not None:
            self.rewrite(rows, columns, decision.rewritten, decision.origin)
            return
        selected, reopened = decision.selected, decision.reopened
        ids = self.ids[rows, columns].masked_fill(reopened, self.mask_token_id)
        self.ids[rows, columns] = decision.tokens.where(selected | decision.replaced, ids)
        self.undecided[rows, columns] = self.undecided[rows, columns] & ~selected | reopened
        steps = self.commit_steps[rows, columns].masked_fill(reopened, -1)
        self.commit_steps[rows, columns] = self.forwards[rows, None].where(selected | decision.replaced, steps)
        self.forwards[rows] += 1

    def tokens_before(self, rows, columns):
        """`[R, w]`: the token before each of the `columns` that stands in the same block; −1 where none does."""
        blocks = self.blocks[rows].masked_fill(~self.visible[rows], -1)
        same = pad(blocks[:, 1:] == blocks[:, :-1], (1, 0))
        return pad(self.ids[rows, :-1], (1, 0)).where(same, -1)[:, columns]

    def rewrite(self, rows, columns, new, origin):
        """
        Writes all ids `new`, `[R, w]`, of the `rows` in the slice `columns`; after one forward pass. `origin`, as in
        [`Decision`].
        """
        before, steps = self.ids[rows, columns], self.commit_steps[rows, columns]
        masked = new == self.mask_token_id
        self.undecided[rows, columns] = masked.where(new != before, self.undecided[rows, columns])
        self.ids[rows, columns] = new
        if origin is not None:  # a token that only moved keeps its step
            before, steps = (part.gather(1, origin.clamp(min=0)) for part in (before, steps))
            before = before.masked_fill(origin < 0, -1)
        steps = self.forwards[rows, None].where(new != before, steps)
        self.commit_steps[rows, columns] = steps.masked_fill(masked, -1)
        self.forwards[rows] += 1

    def move(self, origin, reopened):
        """
        Gives each column what stood in another, `[B, W']`; −1 is a mask that comes in, −2 the end of a shorter row.
        What was `reopened`, `[B, W]`, is masked again. Of canvases that are prompts alone.
        """
        self.ids = self.ids.masked_fill(reopened, self.mask_token_id)
        self.undecided = self.undecided | reopened
        self.commit_steps = self.commit_steps.masked_fill(reopened, -1)
        source, old, new = origin.clamp(min=0), origin >= 0, origin == -1  # [B, W']
        self.ids = self.ids.gather(1, source).where(old, self.mask_token_id)
        if self.pad_token_id is not None:
            self.ids = self.ids.where(old | new, self.pad_token_id)
        self.commit_steps = self.commit_steps.gather(1, source).where(old, -1)
        self.visible, self.undecided = (part.gather(1, source) & old | new for part in (self.visible, self.undecided))
        self.given, self.blocks = self.given.gather(1, source) & old, torch.zeros_like(origin)
        self.all_visible = bool(self.visible.all())
        self.length = self.prompt_length = origin.shape[1]
        self.columns = torch.arange(self.length, device=origin.device)
        self.checked, self.last = torch.full_like(self.last, self.length), (old | new).sum(1) - 1

    def editable(self, block, eos_ids):
        """
        Of the generated positions `block` the tokens that an edit may change, before an end of text, and what is
        behind one: both `[B, W]`.
        """
        is_eos = torch.isin(self.ids, eos_ids)
        columns = torch.arange(self.ids.shape[1], device=self.ids.device)
        first = first_column(is_eos & (columns >= self.prompt_length))[:, None]  # [B, 1]
        places = block & (self.ids != self.mask_token_id) & ~is_eos & (columns < first)
        return places, block & (columns > first)

    def end(self, rows):
        """No more work on these rows, a mask `[B]`."""
        self.ended |= rows
        self.undecided &= ~rows[:, None]

    def decided_columns(self):
        """`[B]`: columns before the first undecided one."""
        return first_column(self.undecided[:, : self.length])

    def stop_at_eos(self, eos_ids, release, cut=False):
        """
        Ends rows at their first generated EOS, if nothing is masked before it; `release`: their work, too; `cut`: no
        more work behind it in any case.
        """
        if len(eos_ids) == 0:
            return
        is_eos = torch.isin(self.ids[:, : self.length], eos_ids) & (self.columns >= self.prompt_length)
        first = first_column(is_eos)  # [B]
        if cut:
            self.undecided[:, : self.length] &= self.columns <= first[:, None]
        ended = first < self.decided_columns()
        self.last = torch.where(ended, torch.minimum(first, self.last), self.last)
        if release:
            self.end(ended)

    def stop_by(self, criteria):
        """Asks the stopping criteria about the columns decided since the last call, one after the other."""
        done_here = (EosTokenCriteria, MaxLengthCriteria if criteria.max_length == self.length else EosTokenCriteria)
        criteria = [item for item in criteria if not isinstance(item, done_here)]
        decided = torch.minimum(self.decided_columns(), self.last + 1)  # [B]
        if not criteria or int(decided.min()) < self.prompt_length:
            return
        require(self.pad_token_id is not None, "`pad_token_id` must be set for `stopping_criteria`, got None")
        timers = StoppingCriteriaList(item for item in criteria if isinstance(item, MaxTimeCriteria))
        others = StoppingCriteriaList(item for item in criteria if not isinstance(item, MaxTimeCriteria))
        stopped = torch.zeros_like(decided, dtype=torch.bool)
        for offset in range(int((decided - self.checked).max()) if others else 0):
            end = torch.minimum(self.checked + offset, decided - 1)  # [B], the prefix's last column
            width = int(end.max()) + 1
            index = self.columns[:width] - (width - 1 - end)[:, None]
            prefixes = self.ids.gather(1, index.clamp(min=0)).where(index >= 0, self.pad_token_id)  # flush right
            done = others(prefixes, None) & (self.checked + offset < decided) & ~stopped
            self.last = torch.where(done, torch.minimum(end, self.last), self.last)
            stopped |= done
        out_of_time = timers(self.ids, None)
        self.last = torch.where(out_of_time, torch.minimum(decided - 1, self.last), self.last)
        self.end(stopped | out_of_time)
        self.checked = decided

    def take_finished_columns(self):
        """`[B, n]`: columns final in all rows and new to the streamer; none after the last row's end."""
        final = torch.where(self.undecided.any(1), self.decided_columns(), self.length).amin()
        start, self.put = self.put, max(self.put, int(torch.minimum(final, self.last.amax() + 1)))
        return self.output()[:, start : self.put]

    def output(self):
        ids, after = self.ids[:, : self.length], self.columns > self.last[:, None]
        return ids if self.pad_token_id is None else ids.where(~after, self.pad_token_id)

    def tokens_per_forward(self):
        kept = (self.commit_steps[:, : self.length] >= 0) & (self.columns <= self.last[:, None])
        return kept.sum(1) / self.forwards.clamp(min=1)


def check_prompt(input_ids, attention_mask, vocab_size: int, empty: bool = True) -> None:
    """
    Refuses prompts that are no ids `[B, L]` of the vocabulary, and masks that don't fit.

    Args:
        input_ids: What the caller gave.
        attention_mask: The same, or `None`.
        vocab_size (`int`): Of the model.
        empty (`bool`, defaults to `True`): Whether a prompt of length 0 is one.

    Raises:
        `ValueError`: naming the argument.
    """
    name = type(input_ids).__name__
    require(isinstance(input_ids, torch.Tensor), f"`input_ids` must be a tensor of token ids, got {name}")
    shape, dtype = tuple(input_ids.shape), input_ids.dtype
    integers = not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
    nothing = "" if input_ids.numel() else ": an empty prompt"
    require(integers, f"`input_ids` must be integers, got {dtype} of shape {shape}{nothing}")
    require(len(shape) == 2, f"`input_ids` must have the shape (batch, length), got {shape}{nothing}")
    require(shape[0] > 0, f"`input_ids` must hold at least one row, got shape {shape}")
    require(empty or shape[1] > 0, f"`input_ids` must hold at least one token, got shape {shape}: an empty prompt")
    if input_ids.numel():
        low, high = (int(value) for value in input_ids.aminmax())
        good = 0 <= low and high < vocab_size
        require(good, f"`input_ids` must lie in [0, `vocab_size`), got {low} to {high} and {vocab_size}")
    if attention_mask is None:
        return
    name = type(attention_mask).__name__
    require(isinstance(attention_mask, torch.Tensor), f"`attention_mask` must be a tensor, got {name}")
    found = f"got {tuple(attention_mask.shape)} and {shape}"
    require(tuple(attention_mask.shape) == shape, f"`attention_mask` must have the shape of `input_ids`, {found}")
    good = bool(((attention_mask == 0) | (attention_mask == 1)).all())
    require(good, "`attention_mask` must hold zeros and ones, got other values")


def first_column(mask):
    """`[B]`: the first True column of each row, or the number of columns."""
    return torch.where(mask.any(1), mask.int().argmax(1), mask.shape[1])
