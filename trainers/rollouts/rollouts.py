"""What a decoder wrote, as its model saw it: the rows, and the step in which each position was decided."""

from dataclasses import dataclass

import torch

from nanollada.trainers.noise.keys import mix_keys


@dataclass
class Rollouts:
    """
    Rows that `generate` wrote, B of them, of any padding.

    Attributes:
        canvas (`torch.LongTensor` of shape `(batch, width)`): As in [`NanoLLaDAGenerationOutput`].
        commit_steps (`torch.LongTensor` of shape `(batch, width)`): As there.
        attention_mask (`torch.Tensor` of shape `(batch, width)`): 1 for what the model saw.
        prompt_length (`int`): Columns of the prompts, padding included.
        keys (`torch.LongTensor` of shape `(batch,)`): Of the rows' noise; by default their `row_keys`.
    """

    canvas: torch.Tensor
    commit_steps: torch.Tensor
    attention_mask: torch.Tensor
    prompt_length: int
    keys: torch.Tensor | None = None

    def __post_init__(self):
        shape = tuple(self.canvas.shape)
        for name in ("commit_steps", "attention_mask"):
            if tuple(getattr(self, name).shape) != shape:
                found = f"{tuple(getattr(self, name).shape)} and {shape}"
                raise ValueError(f"`{name}` must have the shape of `canvas`, got {found}")
        if not 0 <= self.prompt_length <= shape[1]:
            raise ValueError(f"`prompt_length` must lie in [0, {shape[1]}], got {self.prompt_length}")
        self.attention_mask = self.attention_mask.bool()
        if (self.decided & ~self.attention_mask).any():
            raise ValueError("`commit_steps` must be -1 where `attention_mask` is 0, got a step at padding")
        if self.keys is None:
            self.keys = row_keys(self.canvas, self.attention_mask)

    @classmethod
    def of(cls, output, attention_mask: torch.Tensor, config) -> "Rollouts":
        """
        Of what `generate(return_dict_in_generate=True)` returned.

        Args:
            output ([`NanoLLaDAGenerationOutput`]): The output.
            attention_mask (`torch.Tensor` of shape `(batch, prompt_length)`): The prompts', one row for each of the
                output's.
            config ([`NanoLLaDAConfig`]): The model's.
        """
        rows, length = output.sequences.shape
        if len(attention_mask) != rows:
            raise ValueError(
                f"`attention_mask` must have a row for each sequence, got {len(attention_mask)} and {rows}"
            )
        prompt_length, width = attention_mask.shape[1], output.canvas.shape[1]
        new = attention_mask.new_ones(rows, length - prompt_length)
        seen = torch.cat((attention_mask, new), dim=1).bool()  # [B, L]
        lacking = -seen.sum(1, keepdim=True) % (config.block_length or 1)  # [B, 1], to the end of the row's last block
        behind = torch.arange(width - length, device=seen.device) < lacking
        return cls(output.canvas, output.commit_steps, torch.cat((seen, behind), dim=1), prompt_length)

    @property
    def decided(self) -> torch.BoolTensor:
        """`(batch, width)`: positions that a step decided."""
        return self.commit_steps >= 0

    @property
    def given(self) -> torch.BoolTensor:
        """`(batch, width)`: what the model was told: the prompt, without the places in it that were to fill."""
        columns = torch.arange(self.canvas.shape[1], device=self.canvas.device)
        return self.attention_mask & ~self.decided & (columns < self.prompt_length)

    @property
    def positions(self) -> torch.LongTensor:
        """`(batch, width)`: counted from each row's first token; padding before it is 0."""
        return (self.attention_mask.long().cumsum(-1) - 1).clamp(min=0)

    def blocks(self, grid: int | None) -> torch.LongTensor:
        """`(batch, width)`: the block of each position on the grid of a model's `config.block_length`."""
        return self.positions // grid if grid else torch.zeros_like(self.canvas)


def row_keys(canvas: torch.LongTensor, attention_mask: torch.Tensor) -> torch.LongTensor:
    """`(batch,)`: a hash of each row's tokens and their positions. Padding on either side does not count."""
    seen = attention_mask.bool()
    positions = (seen.long().cumsum(-1) - 1).clamp(min=0)
    return mix_keys(mix_keys(positions) ^ canvas).masked_fill(~seen, 0).sum(-1)
