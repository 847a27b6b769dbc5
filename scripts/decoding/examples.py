"""What a checkpoint is for: whether it chats, and prompts of the kind that it was scored on."""

import contextlib

from nanollada.scripts.decoding.checkpoint import prompt_ids
from nanollada.trainers.puzzles.registry import PUZZLES, make_rows
from nanollada.trainers.records import read_json

MOST_PROMPTS = 6
CHATS = ("What is a list?", "What does the function `len` do?", "Who are you?")
TEXTS = ("The", "Return the", "1, 2, 3,")


def read_record(checkpoint: str, name: str) -> dict:
    """A record beside a checkpoint's weights, in its folder or on the Hub; empty where there is none."""
    from transformers.utils.hub import cached_file

    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    path = cached_file(checkpoint, name, **quiet)
    return read_json(path) if path else {}


def answers_chats(checkpoint: str, tokenizer) -> bool:
    """Whether a checkpoint answers messages: it has a template, and its last run was no pretraining."""
    kind = read_record(checkpoint, "run.json").get("data", {}).get("format", "sft")
    return bool(tokenizer.chat_template) and kind == "sft"


def example_prompts(checkpoint: str, tokenizer, is_chat: bool) -> list[str]:
    """
    Prompts for a checkpoint: what `evaluation.json` says that it was asked; else problems of a puzzle that it was
    scored on, each with one answer; else anything that its vocabulary can spell.
    """
    results = read_record(checkpoint, "evaluation.json").get("results", [])
    prompts = [_text(example["prompt"], is_chat) for result in results for example in result.get("examples") or []]
    prompts = list(dict.fromkeys(filter(None, prompts)))
    if not prompts:
        puzzle = next((name for name in PUZZLES if any(name in result["task"] for result in results)), None)
        prompts = [row["prompt"] for row in make_rows(puzzle, 3, 0)] if puzzle else []
    prompts = prompts or [prompt for prompt in (CHATS if is_chat else TEXTS) if _is_spelt(tokenizer, prompt)]
    return prompts[:MOST_PROMPTS]


def _text(prompt: str | list[dict], is_chat: bool) -> str | None:
    """The text to type for a prompt; `None` for a chat of several messages, and for the other kind."""
    if isinstance(prompt, str) or not is_chat:
        return None if is_chat or not isinstance(prompt, str) else prompt
    return prompt[0]["content"] if len(prompt) == 1 else None


def _is_spelt(tokenizer, prompt: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(prompt_ids(tokenizer, prompt))
    return False
