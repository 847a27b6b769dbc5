"""Writes text with an AR or a diffusion checkpoint, from a seed of its own."""

import hashlib
import json
from dataclasses import dataclass, field

from nanollada.scripts.decoding.checkpoint import eos_ids, refuse_masks
from nanollada.scripts.decoding.settings import generation_settings
from nanollada.trainers.scoring.kind import is_diffusion

DRAWN_TOGETHER = 16  # rows of a task that share a generator where tokens are drawn, whatever the batch size


@dataclass
class Generated:
    """
    What one `generate` call gave.

    Attributes:
        text (`str`): The new text without special tokens; of an infilled prompt the whole text.
        tokens (`int`): Tokens decided and kept, the end of text included.
        finished (`bool`): Whether the model ended the text itself (EOS).
        seconds (`float`): Wall time of the call.
        first_token_seconds (`float`): Wall time until the first forward pass had decided something.
        tokens_per_forward (`float`): `tokens` by forward passes, those that edit included; 1.0 for AR.
        edits (`dict[str, int]`): What else was done to tokens, and how often, such as `{"edited": 3}`.
    """

    text: str
    tokens: int
    finished: bool
    seconds: float
    first_token_seconds: float
    tokens_per_forward: float
    edits: dict[str, int] = field(default_factory=dict)


def keyed_seed(*key) -> int:
    """A generator's seed that belongs to the key: numbers, texts, `None`."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seeded_generate(model, input_ids, attention_mask, seed: int, **settings):
    """`model.generate` whose draws depend on `seed` alone; the global random state stays as it is."""
    import torch

    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "return_dict_in_generate": False}
    if is_diffusion(model):
        return model.generate(**inputs, generator=torch.Generator().manual_seed(seed), **settings)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        return model.generate(**inputs, **settings)


def generate(model, tokenizer, ids: list[int], *, seed: int = 0, recorder=None, **given) -> Generated:
    """
    Generates from one prompt.

    Args:
        model, tokenizer: Of `load_checkpoint`.
        ids (`list[int]`): The prompt, of `prompt_ids`.
        seed (`int`, defaults to 0): Of whatever is drawn.
        recorder ([`~scripts.tracing.recorder.StepRecorder`], *optional*): To keep or show the steps; made right
            before the call.
        given: Options, see `generation_settings`.

    Raises:
        `ValueError`: as `generation_settings` and `model.generate`; for mask tokens in the prompt of an AR model.
    """
    import time

    import torch

    from nanollada.scripts.tracing.recorder import StepRecorder

    infill = tokenizer.mask_token_id in ids
    refuse_masks(model, tokenizer, ids)
    settings = generation_settings(model, **given)
    input_ids = torch.tensor([ids], device=model.device)
    # Without a mask, transformers would take the leading <|endoftext|> for padding.
    attention_mask = torch.ones_like(input_ids)
    started = time.perf_counter()
    recorder = StepRecorder(tokenizer) if recorder is None else recorder
    output = seeded_generate(model, input_ids, attention_mask, seed, streamer=recorder, **settings)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    row = output[0].tolist()
    start = 0 if infill else len(ids)
    return Generated(
        text=tokenizer.decode(row[start:], skip_special_tokens=True),
        tokens=recorder.decided,
        finished=not eos_ids(model).isdisjoint(row[len(ids) :]),
        seconds=seconds,
        first_token_seconds=recorder.seconds[0],
        tokens_per_forward=recorder.tokens_per_forward,
        edits=recorder.edits(),
    )
