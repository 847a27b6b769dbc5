"""Checkpoints ready to write: one, or an AR and a diffusion model of one tokenizer; prompts as they know them."""

import re
from dataclasses import dataclass, field

from nanollada.trainers.scoring.kind import is_diffusion


@dataclass
class CheckpointArguments:
    """Which model."""

    checkpoint: str = field(metadata={"help": "Folder of a checkpoint, or a model's name on the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that comes with the checkpoint."})
    device: str | None = field(default=None, metadata={"help": "Default: cuda if there is one, else cpu."})


def load_checkpoint(
    checkpoint: str, trust_remote_code: bool = False, device: str | None = None, argument: str = "checkpoint"
):
    """
    The model, AR or diffusion as its config says, in float32 and ready to evaluate; and its tokenizer. An adapter's
    folder is the model that it names, with the adapter on it.

    Raises:
        `ValueError`: if the checkpoint lacks tensors or has others, or the tokenizer is not the model's; as
            `usable_device`.
    """
    from transformers import AutoModelForCausalLM

    from nanollada.modeling_nanollada.loading_nanollada import (
        check_tokenizer,
        is_adapter,
        load_adapted,
        load_model,
        load_tokenizer,
        usable_device,
    )

    place = usable_device(device)
    if is_adapter(checkpoint):
        model = load_adapted(checkpoint, argument, trust_remote_code=trust_remote_code)
    else:
        model = load_model(AutoModelForCausalLM, checkpoint, argument, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(checkpoint, argument, trust_remote_code=trust_remote_code)
    check_tokenizer(model, tokenizer)
    return model.to(place).eval(), tokenizer


def load_pair(ar: str | None, diffusion: str, trust_remote_code: bool = False, device: str | None = None) -> dict:
    """
    `{"ar": (model, tokenizer), "diffusion": (model, tokenizer)}`; without `ar` the second alone.

    Raises:
        `ValueError`: for a checkpoint of the other kind, and tokenizers that differ; and as `load_checkpoint`.
    """
    paths = {"ar": ar, "diffusion": diffusion}
    places = {name: path for name, path in paths.items() if path is not None}
    pair = {name: load_checkpoint(path, trust_remote_code, device, name) for name, path in places.items()}
    for name, (model, _) in pair.items():
        if is_diffusion(model) != (name == "diffusion"):
            kind = {"ar": "an autoregressive", "diffusion": "a diffusion"}[name]
            raise ValueError(f"`{name}` must be {kind} checkpoint, got {type(model).__name__}")
    one, *_, other = (tokenizer for _, tokenizer in (*pair.values(), pair["diffusion"]))
    if one.get_vocab() != other.get_vocab() or one.chat_template != other.chat_template:
        raise ValueError(
            f"`ar` and `diffusion` must have the same tokenizer and chat template, got others in {ar} and {diffusion}"
        )
    return pair


def prompt_ids(tokenizer, prompt: str | list[dict], infill: bool = False) -> list[int]:
    """
    Token ids of a prompt, as the model met such text in training: control tokens that somebody wrote out in it
    (`<|im_end|>`) are text, and those of the chat template are control.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's.
        prompt (`str` or `list[dict]`): Plain text, or messages, which the chat template renders.
        infill (`bool`, defaults to `False`): Mask tokens in plain text are places to fill, not text.

    Raises:
        `ValueError`: for messages without a chat template or that it refuses, and for text that the vocabulary cannot
            spell.
    """
    from nanollada.trainers.data.chats import render_prompt
    from nanollada.trainers.data.encoding import encode_spans
    from nanollada.trainers.data.files import BadRow

    # Pretraining rows begin every document with <|endoftext|> (the pad token), for both models: AR predicts the first
    # token from it, and diffusion saw it as visible context. SFT rows begin with the template's own first token.
    context = [tokenizer.pad_token_id] if isinstance(prompt, str) else []
    text, literal = prompt, None
    try:
        if not isinstance(prompt, str):
            if not tokenizer.chat_template:
                raise ValueError("the tokenizer has no chat template: a plain `prompt` must be given, got a chat")
            rendered = render_prompt(tokenizer, prompt)
            text, literal = rendered.text, rendered.literal
        elif infill:
            literal = _around(text, tokenizer.mask_token)
        return context + encode_spans(tokenizer, text, [(0, len(text))], literal)[0]
    except BadRow as error:
        rule = "be spelt by the tokenizer's vocabulary" if error.reason == "not in the vocabulary" else "be usable"
        raise ValueError(f"`prompt` must {rule}, got {error}") from error


def _around(text: str, token: str) -> list[tuple[int, int]]:
    """(start, end) of what stands around a token in a text."""
    places = [(match.start(), match.end()) for match in re.finditer(re.escape(token), text)]
    starts, ends = [0, *(end for _, end in places)], [*(start for start, _ in places), len(text)]
    return list(zip(starts, ends, strict=True))


def refuse_masks(model, tokenizer, ids: list[int]) -> None:
    """Raises a ValueError for mask tokens in the prompt of an AR model."""
    if tokenizer.mask_token_id in ids and not is_diffusion(model):
        raise ValueError(f"`prompt` must not hold {tokenizer.mask_token} for an autoregressive model, got it")


def eos_ids(model) -> set[int]:
    """Token ids that end a text."""
    ids = model.generation_config.eos_token_id
    return set(ids) if isinstance(ids, list) else set() if ids is None else {ids}
