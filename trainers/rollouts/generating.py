"""Rollouts: prompts in, what the decoder wrote and when."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from trl.trainer.utils import pad

from nanollada.trainers.noise.keys import keyed_uniform
from nanollada.trainers.rollouts.rollouts import Rollouts


def left_padded(
    prompts: list[list[int]], pad_token_id: int, multiple: int | None = None
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Prompts of several lengths as one batch, `[B, P]`, and its attention mask."""
    rows = [torch.tensor(ids, dtype=torch.long) for ids in prompts]
    settings = {"padding_side": "left", "pad_to_multiple_of": multiple}
    ids = pad(rows, padding_value=pad_token_id, **settings)
    return ids, pad([torch.ones_like(row) for row in rows], padding_value=0, **settings)


def write_rollouts(
    model, prompts: torch.LongTensor, attention_mask: torch.LongTensor, settings, generator: torch.Generator
) -> tuple[Rollouts, list[list[int]]]:
    """
    Decodes prompts as `settings` say; nothing of the checkpoint's own generation config has a part in it.

    Args:
        model ([`NanoLLaDAForMaskedLM`]): The policy.
        prompts (`torch.LongTensor` of shape `(batch, length)`): Padded on the left.
        settings ([`NanoLLaDAGenerationConfig`]): See `options.rollout_settings`.

    Returns:
        The rollouts, and each one's completion up to its first EOS, as ids.
    """
    own = model.generation_config
    model.generation_config = type(own)()  # a call's unset fields would be read there
    try:
        output = model.generate(
            prompts, attention_mask=attention_mask, generation_config=settings, generator=generator
        )
    finally:
        model.generation_config = own
    completions = output.sequences[:, prompts.shape[1] :].cpu()  # [B, C]
    is_end = torch.isin(completions, torch.tensor(settings.eos_token_id))
    lengths = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, completions.shape[1]).tolist()
    texts = [row[:length].tolist() for row, length in zip(completions, lengths, strict=True)]
    return Rollouts.of(output, attention_mask, model.config), texts


def split(rollouts: Rollouts, rows: int) -> Iterator[Rollouts]:
    """The rollouts, so many rows at a time."""
    for start in range(0, len(rollouts.canvas), rows):
        part = slice(start, start + rows)
        yield replace(
            rollouts,
            canvas=rollouts.canvas[part],
            commit_steps=rollouts.commit_steps[part],
            attention_mask=rollouts.attention_mask[part],
            keys=None if rollouts.keys is None else rollouts.keys[part],
        )


def seed_of(seed: int, step: int, purpose: int, stream: int) -> int:
    """A seed of its own for each (seed, step, purpose, stream); 32 bits, for torch reads no more on a CPU."""
    uniform = keyed_uniform(seed, torch.tensor([step]), torch.tensor([purpose]), stream, 1)
    return int(uniform * 2**32)
