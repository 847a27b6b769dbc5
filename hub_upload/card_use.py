"""The card's use of the model: snippets that ask what it knows, what they print, and its own decoding settings."""

import contextlib
import io
import json
import math
from typing import NamedTuple

from nanollada.hub_upload.card_facts import Facts

PROMPTS = ("The", "1", "a")
CHAT_PROMPTS = ("What is a list?", "Hello")
CHATS = ("sft", "preference", "prompt")  # formats of rows that are chats
MOST_CHARACTERS = 400  # of a recorded prompt; a document's is no example
NEW_TOKENS, BLOCK_LENGTH, INFILLED = 32, 16, 4  # of snippets for a checkpoint without settings of its own
EDITED = "With structural edits: tokens of the block at work are replaced and removed, and room is made between them."
INFILLING = "Infilling: mask tokens inside the prompt are filled, and everything else stays as it is."
SETTINGS = {  # of transformers, in words; the others say themselves what they do
    "max_new_tokens": "tokens written at most.",
    "max_length": "tokens of a row at most, the prompt's included.",
    "do_sample": "whether tokens are drawn.",
    "temperature": "0: always the likeliest token.",
    "top_k": "draws are from so many of the likeliest tokens.",
    "top_p": "draws are from the likeliest tokens of this total mass.",
    "repetition_penalty": "above 1: less of what was said.",
}


class Example(NamedTuple):
    """
    What the snippets ask.

    Attributes:
        prompt (`str` or `list[dict]`): A text to go on from, or messages.
        answer (`str`, *optional*): The reference's.
    """

    prompt: str | list[dict]
    answer: str | None = None


def use_of(model, tokenizer, facts: Facts, repo_id: str, prompt: str | None, base: tuple | None = None) -> dict:
    """
    What the template's "Use" needs: python blocks that run one after the other, and what each of them printed here.
    `base` is of an adapter's model: its name on the Hub, and a revision or `None`.

    Raises:
        `ValueError`: for a `prompt` that the tokenizer can't express.
    """
    example = choose_example(tokenizer, facts, prompt)
    namespace = {"model": model, "tokenizer": tokenizer}
    blocks = [("", _ask(model, example))]
    printed = [run_snippet(blocks[0][1], namespace)]
    if edits_structurally(model, facts) and not model.generation_config.structural_edits:
        blocks.append((EDITED, _edit(model)))
        printed.append(run_snippet(blocks[1][1], namespace))
    if model.is_diffusion:
        blocks.append((INFILLING, _infill(model, tokenizer, example, printed[0])))
        printed.append(run_snippet(blocks[-1][1], namespace))
    return {
        "repo_id": _literal(repo_id),
        "base": base and [part and _literal(part) for part in base],
        "blocks": [
            {"about": about, "code": code, "printed": fenced(text)}
            for (about, code), text in zip(blocks, printed, strict=True)
        ],
        "settings": own_settings(model),
    }


def edits_structurally(model, facts: Facts) -> bool:
    """Whether a model was trained to say `<|delete|>` and `<|insert|>` of tokens that are visible."""
    return model.is_diffusion and bool(model.config.edit_token_ids) and "structural" in corruptions(facts)


def corruptions(facts: Facts) -> set[str | None]:
    """How the rows of a model's trainings were corrupted, by the names of `--corruption`."""
    return {(stage.get("objective") or {}).get("corruption") for stage in facts.stages}


def choose_example(tokenizer, facts: Facts, prompt: str | None = None) -> Example:
    """
    The given prompt; else the first of those that the evaluation asked; else one that any vocabulary can spell.

    Raises:
        `ValueError`: if the tokenizer can't express `prompt`.
    """
    seen = (facts.stages[-1].get("data") or {}).get("format") if facts.stages else None
    chat = seen in CHATS and bool(tokenizer.chat_template)
    results = (facts.evaluation or {}).get("results", []) if prompt is None else []
    for item in (item for result in results for item in result.get("examples") or []):
        if len(json.dumps(item["prompt"])) <= MOST_CHARACTERS and _is_askable(tokenizer, item["prompt"]):
            return Example(item["prompt"], item["answer"])
    text = choose_prompt(tokenizer, CHAT_PROMPTS if chat else PROMPTS, prompt)
    messages = [{"role": "user", "content": text}]
    return Example(messages if chat and _is_askable(tokenizer, messages) else text)


def choose_prompt(tokenizer, candidates: tuple[str, ...], prompt: str | None = None) -> str:
    """
    The given prompt, or the first candidate that survives encoding and decoding; else the first text token that does.

    Raises:
        `ValueError`: if the tokenizer can't express `prompt`.
    """
    if prompt is not None:
        if not _survives(tokenizer, prompt):
            raise ValueError(f"`prompt` must be text that the tokenizer can express, got {prompt!r}")
        return prompt
    special = set(tokenizer.all_special_ids)
    tokens = (tokenizer.decode([index]) for index in range(len(tokenizer)) if index not in special)
    for text in (*candidates, *(token for token in tokens if token.strip())):
        if _survives(tokenizer, text):
            return text
    raise ValueError("`tokenizer` must be able to express some text, got none that survives encoding and decoding")


def _survives(tokenizer, text: str) -> bool:
    try:
        ids = tokenizer(text, add_special_tokens=False).input_ids
    except Exception:  # the Rust tokenizers raise bare exceptions, a character tokenizer for every unknown character
        return False
    return bool(ids) and tokenizer.decode(ids) == text


def _is_askable(tokenizer, prompt: str | list[dict]) -> bool:
    if isinstance(prompt, str):
        return _survives(tokenizer, prompt)
    if not tokenizer.chat_template:
        return False
    return _survives(tokenizer, tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False))


# ---- snippets


def _literal(value: str | list[dict]) -> str:
    """Python source of a string in double quotes, or of messages."""
    return json.dumps(value, ensure_ascii=False)


def _ask(model, example: Example) -> str:
    render = 'add_generation_prompt=True, return_tensors="pt", return_dict=True'
    lines = [f'inputs = tokenizer({_literal(example.prompt)}, return_tensors="pt")']
    if not isinstance(example.prompt, str):
        lines = [
            f"messages = {_literal(example.prompt)}",
            f"inputs = tokenizer.apply_chat_template(messages, {render})",
        ]
    return "\n".join(
        [
            *lines,
            f"output = model.generate({', '.join(['**inputs', *_length(model)])})",
            'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        ]
    )


def _edit(model) -> str:
    """LLaDA 2.2's loop has steps of its own."""
    given = [word for word in _length(model) if not word.startswith("steps=")]
    arguments = ["**inputs", *given, 'preset="llada2.2"']
    return "\n".join(
        [
            f"edited = model.generate({', '.join(arguments)})",
            'print(tokenizer.decode(edited[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        ]
    )


def _length(model) -> list[str]:
    """What `generate` must be told: nothing where the checkpoint says it."""
    config, block_length = model.generation_config, model.config.block_length
    if config.max_new_tokens is not None or config.max_length is not None:
        return []
    if not model.is_diffusion:
        return [f"max_new_tokens={NEW_TOKENS}"]
    if block_length is None:
        return [f"max_new_tokens={NEW_TOKENS}", f"block_length={BLOCK_LENGTH}", f"steps={BLOCK_LENGTH}"]
    new_tokens = math.ceil(NEW_TOKENS / block_length) * block_length
    return [f"max_new_tokens={new_tokens}", f"steps={min(block_length, NEW_TOKENS)}"]


def _infill(model, tokenizer, example: Example, printed: str) -> str:
    """Of a chat the answer's middle is left out, of a text what stands between the prompt and its end."""
    fixed = ", structural_edits=False" if model.generation_config.structural_edits else ""  # else tokens would move
    fill = f"filled = model.generate(**inputs, max_new_tokens=0{fixed})"
    if isinstance(example.prompt, str):
        text = f"{_literal(example.prompt)} + tokenizer.mask_token * {INFILLED}"
        after = _literal(choose_prompt(tokenizer, (".", example.prompt)))
        show = "print(tokenizer.decode(filled[0], skip_special_tokens=True))"
        return "\n".join([f'inputs = tokenizer({text} + {after}, return_tensors="pt")', fill, show])
    before, masks, after = _parted(tokenizer, example.answer or printed)
    text = f"prompt + {_literal(before)} + tokenizer.mask_token * {masks} + {_literal(after)} + tokenizer.eos_token"
    return "\n".join(
        [
            'start = inputs["input_ids"].shape[1]',
            "prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)",
            f'inputs = tokenizer({text}, return_tensors="pt")',
            fill,
            "print(tokenizer.decode(filled[0, start:], skip_special_tokens=True))",
        ]
    )


def _parted(tokenizer, answer: str) -> tuple[str, int, str]:
    """What stands before and after the middle half of an answer's tokens, and how many these are."""
    ids = tokenizer(answer, add_special_tokens=False).input_ids if _survives(tokenizer, answer) else []
    first, last = len(ids) // 4, len(ids) - len(ids) // 4
    before, after = (tokenizer.decode(part) if part else "" for part in (ids[:first], ids[last:]))
    if not all(not text or _survives(tokenizer, text) for text in (before, after)):
        before, after = "", ""  # a character's bytes were parted
        first, last = 0, len(ids)
    return before, last - first or INFILLED, after


def run_snippet(code: str, namespace: dict) -> str:
    """What a python block prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "README.md", "exec"), namespace)
    return printed.getvalue().rstrip("\n")


def fenced(text: str) -> str:
    """
    A text as a block of Markdown. Empty for one that shows nothing, that holds what files and terminals change, and
    that has a fence of its own: python blocks of a card are run, and none of them may be a model's.
    """
    shown = all(character.isprintable() or character in "\n\t" for character in text) and "```" not in text
    return f"```text\n{text}\n```" if text.strip() and shown else ""


# ---- settings


def own_settings(model) -> list[tuple[str, str, str]]:
    """Name, value and meaning of what the checkpoint's generation config sets."""
    from nanollada.modeling_nanollada.rules_nanollada import OWN_SETTINGS

    config = model.generation_config
    plain = type(config)()
    meanings = {**SETTINGS, **({name: item.help for name, item in OWN_SETTINGS.items()} if model.is_diffusion else {})}
    values = {name: getattr(config, name, None) for name in meanings}
    return [
        (name, str(value), meanings[name])
        for name, value in values.items()
        if value is not None and value != getattr(plain, name, None)
    ]
