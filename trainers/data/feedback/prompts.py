"""Prompts for reinforcement learning: a chat or a text to be answered, and the columns that rewards read."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nanollada.trainers.data.chats import render_prompt
from nanollada.trainers.data.encoding import encode_spans
from nanollada.trainers.data.feedback.reading import prepared
from nanollada.trainers.data.files import BadRow
from nanollada.trainers.data.formats import FilledRow, checked_messages, checked_text
from nanollada.trainers.data.prepare import PreparedData
from nanollada.trainers.data.sources import HeldOutArguments, RowArguments, RowPolicy, resolve_source
from nanollada.trainers.puzzles.registry import PUZZLES

# What TRL's reward functions get under these names is no column of a row; the last ones make TRL do something else.
RESERVED = ("prompts", "completion", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
RESERVED += ("environments", "index", "image", "images", "tools", "chat_template_kwargs")
FIELDS = {"role", "content"}  # a table gives every message what one of them has, and templates would read it


@dataclass
class PromptArguments(HeldOutArguments):
    """Which prompts are answered in training, and which in evaluation."""


@dataclass(frozen=True)
class PromptReader:
    """
    Checks rows of a `prompt` and columns for rewards.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's.
        max_length (`int`, *optional*): Most tokens of a prompt. Nothing is cut.
        needs_puzzle (`bool`): Whether every row must name its puzzle.
    """

    tokenizer: Any
    max_length: int | None = None
    needs_puzzle: bool = False

    def __call__(self, row: Any) -> tuple[Any, dict[str, Any]]:
        """
        The prompt, and the row: `prompt`, a text or messages, and the columns as they are. Those of a puzzle, which
        `verify` names, are checked.

        Raises:
            BadRow: For a row that cannot be used, and for a prompt that TRL would not tokenize as SFT does.
            ValueError: If the tokenizer has no usable template.
        """
        if isinstance(row, BadRow):
            raise row
        if not isinstance(row, dict):
            raise BadRow("wrong type", f"a row must be an object, got {type(row).__name__}")
        row = FilledRow(row)
        prompt = row.required("prompt")
        prompt = checked_text(prompt, "prompt") if isinstance(prompt, str) else checked_messages(prompt, "prompt")
        if not isinstance(prompt, str) and (not prompt or prompt[-1]["role"] == "assistant"):
            raise BadRow("no prompt", "`prompt` must end with what is to be answered")
        if more := [name for message in prompt if not isinstance(prompt, str) for name in message.keys() - FIELDS]:
            raise BadRow("unknown field", f"messages of `prompt` must have role and content alone, got `{min(more)}`")
        if clash := [name for name in RESERVED if name in row]:
            raise BadRow("reserved column", f"`{clash[0]}` is no column that a reward can read: rename or remove it")
        if self.needs_puzzle:
            row.required("verify")
        check_puzzle(row)
        self._check_tokens(prompt)
        return prompt, {**row, "prompt": prompt if isinstance(prompt, str) else list(prompt)}

    def ids(self, prompt: str | Sequence[dict]) -> list[int]:
        """The tokens of a prompt that stand before the answer in SFT's row."""
        if isinstance(prompt, str):
            return encode_spans(self.tokenizer, prompt, [(0, len(prompt))])[0]
        chat = render_prompt(self.tokenizer, prompt)
        return encode_spans(self.tokenizer, chat.text, [(0, len(chat.text))], chat.literal)[0]

    def _check_tokens(self, prompt: str | tuple[dict, ...]) -> None:
        ids = self.ids(prompt)
        if isinstance(prompt, str):
            theirs = self.tokenizer(prompt)
        else:
            theirs = self.tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, return_dict=True)
        if ids != theirs["input_ids"]:
            raise BadRow(
                "control token", "`prompt` becomes other tokens in SFT than in TRL: it spells a control token"
            )
        if self.max_length is not None and len(ids) > self.max_length:
            raise BadRow("too long", f"`prompt` has {len(ids)} tokens, at most {self.max_length} leave room to answer")


def check_puzzle(row: dict[str, Any]) -> None:
    """
    Checks the columns of a row's puzzle, if it names one in `verify`.

    Raises:
        BadRow: For a name that no puzzle has, and columns that its verifier cannot read.
    """
    if "verify" not in row:
        return
    if row["verify"] not in PUZZLES:
        raise BadRow("unknown puzzle", f"`verify` must be one of {', '.join(PUZZLES)}, got {row['verify']!r}")
    try:
        PUZZLES[row["verify"]].columns(row)
    except ValueError as error:
        raise BadRow("bad puzzle", str(error)) from error


def prepare_prompts(
    args: PromptArguments, tokenizer, max_length: int | None = None, needs_puzzle: bool = False
) -> PreparedData:
    """
    Reads, checks and splits the prompts of a run.

    Rows have `prompt`, a text or messages, every other column as it is (null in rows without it), and `index`. Which
    rows are held out is decided by their prompts.

    Args:
        args ([`PromptArguments`]): The sources and their treatment.
        tokenizer (`PreTrainedTokenizerFast`): The model's.
        max_length (`int`, *optional*): Most tokens of a prompt; more is a broken row.
        needs_puzzle (`bool`): Whether every row must have a `verify`.

    Raises:
        DataError: At a broken row, unless `on_bad_rows="skip"`.
        ValueError: For no sources, for columns whose values are of several types, and if nothing is left to train or
            evaluate on.
    """
    # A report has neither `max_length` nor `target_tokens`: how long a prompt may be is no length that was trained on.
    return prepared("prompt", args, None, PromptReader(tokenizer, max_length, needs_puzzle))


def texts_of(specs: list[str], argument: str) -> set[str]:
    """
    Every text that stands somewhere in the rows of sources, whatever their format.

    Raises:
        DataError: For a row that cannot be read.
        ValueError: For a source that there is not, naming the `argument`.
    """
    args = RowArguments()
    sources = [resolve_source(spec, args, argument=argument) for spec in specs]
    texts: set[str] = set()
    for name, number, row in (place for source in sources for place in source.raw_rows()):
        if isinstance(row, BadRow):
            RowPolicy().reject(name, number, row)
        texts.update(_texts(row))
    return texts


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)
