"""Preferences: a prompt with a better and a worse answer, in any shape, as the token ids that SFT makes of them."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nanollada.trainers.data.encoding import RowEncoder
from nanollada.trainers.data.feedback.reading import prepared
from nanollada.trainers.data.files import BadRow, DataError
from nanollada.trainers.data.formats import Example, FilledRow, checked_messages, checked_text, checked_tools
from nanollada.trainers.data.packing import IGNORE
from nanollada.trainers.data.prepare import PreparedData
from nanollada.trainers.data.sources import HeldOutArguments

ANSWERS = ("chosen", "rejected")
QUESTION = ("context", "instruction", "question", "input")  # parts of a user's message, a line each
COLUMNS = ("prompt", "messages", "conversations", "system", "tools", *QUESTION, *ANSWERS)
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")  # as TRL calls them


@dataclass
class PreferenceArguments(HeldOutArguments):
    """Which pairs of answers are learnt from, and which are evaluated on."""

    @property
    def columns(self) -> dict[str, str]:
        return {name: name for name in COLUMNS}


@dataclass(frozen=True)
class Preference:
    """
    One good row in canonical form.

    Attributes:
        prompt (`str` or `tuple[dict]`): Plain text, to which no chat template applies, or messages.
        chosen, rejected (`str` or `dict`): Plain text, or an assistant's message.
        tools (`tuple[dict]`): What the model may call in a chat.
    """

    prompt: str | tuple[dict, ...]
    chosen: str | dict
    rejected: str | dict
    tools: tuple[dict, ...] = ()

    def example(self, name: str) -> Example:
        """What SFT would train on of the answer with this name."""
        answer = getattr(self, name)
        if isinstance(self.prompt, str):
            return Example("", 0, prompt=self.prompt, completion=answer)
        return Example("", 0, messages=(*self.prompt, answer), num_context=len(self.prompt), tools=self.tools)


def parse_preference(row: Any) -> Preference:
    """
    Checks one row and brings it to the canonical form.

    The first of these that has a value is the prompt: `messages`, `conversations`, `prompt`, and else `context`,
    `instruction`, `question`, `input` as the lines of a user's message. Texts in `prompt`, `chosen` and `rejected` are
    plain text (TRL's standard format), unless there is a `system`: all else is a chat, in which a text is the user's
    message or the assistant's answer. Without a prompt `chosen` and `rejected` are chats that differ in their last
    message alone; with one they may repeat it.

    Raises:
        BadRow: With the reason.
    """
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise BadRow("wrong type", f"a row must be an object, got {type(row).__name__}")
    row = FilledRow(row)
    tools = checked_tools(row.get("tools"))
    prompt = _prompt(row)
    given = {name: _side(row.required(name), name) for name in ANSWERS}
    if prompt is None:
        prompt = _common_prompt(given)
    kinds = {isinstance(side, str) for side in given.values()}
    if len(kinds) > 1:
        raise BadRow("wrong type", "`chosen` and `rejected` must both be strings or both be lists of messages")
    if isinstance(prompt, str) and (kinds == {False} or tools):
        prompt = ({"role": "user", "content": prompt},)
    answers = {name: side if isinstance(prompt, str) else _answer(side, name, prompt) for name, side in given.items()}
    if answers["chosen"] == answers["rejected"]:
        raise BadRow("equal answers", "`chosen` and `rejected` say the same")
    return Preference(prompt, **answers, tools=tools)


def _prompt(row: FilledRow) -> str | tuple[dict, ...] | None:
    name = next((name for name in ("messages", "conversations", "prompt") if name in row), None)
    if name is None:
        parts = [
            checked_text(row[part], part, allow_empty=part in ("context", "input")) for part in QUESTION if part in row
        ]
        prompt, name = "\n".join(part for part in parts if part), "prompt"
        if not parts:
            if "system" in row:
                raise BadRow("missing field", "`prompt` beside `system`")
            return None
        prompt = ({"role": "user", "content": checked_text(prompt, "question")},)
    elif name == "prompt" and isinstance(row[name], str):
        prompt = checked_text(row[name], name)
    else:
        prompt = checked_messages(row[name], name)
    if "system" not in row:
        return _checked_prompt(prompt, name)
    system = checked_text(row["system"], "system", allow_empty=True)
    prompt = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
    if any(message["role"] == "system" for message in prompt):
        raise BadRow("wrong role", f"`system` must stand in its field or in `{name}`, got both")
    return _checked_prompt(({"role": "system", "content": system}, *prompt) if system else prompt, name)


def _checked_prompt(prompt: str | tuple[dict, ...], name: str) -> str | tuple[dict, ...]:
    if not isinstance(prompt, str) and (not prompt or prompt[-1]["role"] == "assistant"):
        raise BadRow("no prompt", f"`{name}` must end with what is to be answered")
    return prompt


def _side(value: Any, name: str) -> str | tuple[dict, ...]:
    if isinstance(value, str):
        return checked_text(value, name)
    messages = checked_messages([value] if isinstance(value, dict) else value, name)
    if not messages or messages[-1]["role"] != "assistant":
        raise BadRow("no answer", f"`{name}` must end with an assistant message")
    return messages


def _common_prompt(given: dict[str, str | tuple[dict, ...]]) -> tuple[dict, ...]:
    for name, side in given.items():
        if isinstance(side, str):
            raise BadRow("no prompt", f"`{name}` is a text: a `prompt` must stand beside it, or it must be a chat")
    prompts = [side[:-1] for side in given.values()]
    if prompts[0] != prompts[1]:
        raise BadRow(
            "no common prompt", "`chosen` and `rejected` must be chats that differ in their last message alone"
        )
    return _checked_prompt(prompts[0], "chosen")


def _answer(side: str | tuple[dict, ...], name: str, prompt: tuple[dict, ...]) -> dict:
    """The one message that follows the prompt."""
    if isinstance(side, str):
        return {"role": "assistant", "content": side}
    rest = side[len(prompt) :] if side[: len(prompt)] == prompt else side
    if len(rest) != 1:
        raise BadRow("no common prompt", f"`{name}` must be one answer to the prompt, got {len(rest)} messages")
    return rest[0]


@dataclass(frozen=True)
class PreferenceEncoder:
    """
    Token ids of preferences: prompt and answer are those of SFT's row of the same text or chat.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): A fast tokenizer with pad and eos tokens.
        max_length (`int`, *optional*): Most tokens of a prompt with an answer. Nothing is cut.
    """

    tokenizer: Any
    max_length: int | None = None

    def __call__(self, row: Any) -> tuple[Any, dict[str, Any]]:
        """
        The prompt as it stands in the row, and `prompt_ids`, `chosen_ids`, `rejected_ids`.

        Raises:
            BadRow: For a row that cannot be used; "too long" is one that exceeds `max_length`.
            ValueError: If the tokenizer has no usable template.
        """
        preference = parse_preference(row)
        encoder = RowEncoder(self.tokenizer, sys.maxsize, assistant_turns="last")
        prompt, chosen = _halves(encoder.answer_row(preference.example("chosen")), "chosen")
        other, rejected = _halves(encoder.answer_row(preference.example("rejected")), "rejected")
        if prompt != other:
            raise BadRow("chat template", "the template writes the prompt of `chosen` and of `rejected` differently")
        ids = dict(zip(IDS, (prompt, chosen, rejected), strict=True))
        self.check(ids)
        return preference.prompt, ids

    def check(self, ids: dict[str, list[int]]) -> None:
        """
        Raises:
            BadRow: For token ids of equal answers, and too many.
        """
        if ids["chosen_ids"] == ids["rejected_ids"]:
            raise BadRow("equal answers", "`chosen` and `rejected` have the same tokens")
        for name in ANSWERS:
            length = len(ids["prompt_ids"]) + len(ids[f"{name}_ids"])
            if self.max_length is not None and length > self.max_length:
                room = f"the prompt with `{name}` has {length} tokens, `max_length` is {self.max_length}"
                raise BadRow("too long", f"{room} (`--on_bad_rows skip` leaves such rows out)")


def _halves(document: dict[str, Any], name: str) -> tuple[list[int], list[int]]:
    """The tokens before the answer, and those of the answer, all of them targets."""
    ids, labels = document["input_ids"], document["labels"]
    start = next(place for place, label in enumerate(labels) if label != IGNORE)
    if IGNORE in labels[start:]:
        raise BadRow("chat template", f"the template must mark `{name}` as one piece, got others between its parts")
    if not start:
        raise BadRow("no prompt", f"no token stands before `{name}`")
    return ids[:start], ids[start:]


def prepare_preferences(args: PreferenceArguments, tokenizer, max_length: int | None = None) -> PreparedData:
    """
    Reads, checks, splits and tokenizes the pairs of a run.

    Rows have TRL's `prompt_ids`, `chosen_ids` and `rejected_ids`, and `index`. An answer ends with the end of text
    that SFT teaches. Which rows are held out is decided by their prompts: all answers to one are on one side.

    Args:
        args ([`PreferenceArguments`]): The sources and their treatment.
        tokenizer (`PreTrainedTokenizerFast`): With pad and eos tokens.
        max_length (`int`, *optional*): Most tokens of a prompt with an answer; more is a broken row.

    Raises:
        DataError: At a broken row, unless `on_bad_rows="skip"`.
        ValueError: For no sources, and if nothing is left to train or evaluate on.
    """
    read = PreferenceEncoder(tokenizer, max_length)
    return prepared("preference", args, max_length, read, _features(), _targets)


def _features():
    from datasets import List, Value

    return {name: List(Value("int32")) for name in IDS}


def _targets(row: dict[str, Any]) -> int:
    return len(row["chosen_ids"]) + len(row["rejected_ids"])


def preference_rows(dataset, tokenizer, max_length: int | None = None, name: str = "train_dataset"):
    """
    The rows of `prepare_preferences` of a dataset that a caller has: in any shape that files may have, or of token
    ids, which are checked and stay as they are, with the columns that stand beside them.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): The rows.
        tokenizer, max_length: As of `prepare_preferences`.
        name (`str`): What errors call the dataset.

    Raises:
        DataError: At a broken row, naming it.
    """
    from datasets import Features, Value

    columns = dataset.column_names or list(next(iter(dataset), ()))
    dataset = dataset.with_format(None) if hasattr(dataset, "__len__") else dataset
    kwargs = {"name": name, "read": PreferenceEncoder(tokenizer, max_length)}
    if set(IDS) <= set(columns):
        return dataset.map(_checked, with_indices=True, fn_kwargs=kwargs)
    features = Features({**_features(), "index": Value("int64")})
    return dataset.map(_encoded, with_indices=True, fn_kwargs=kwargs, remove_columns=columns, features=features)


def _placed(function: Callable[[], Any], name: str, index: int) -> Any:
    try:
        return function()
    except BadRow as error:
        raise DataError(f"{name}, row {index + 1}: {error}") from error


def _checked(row: dict, index: int, name: str, read: PreferenceEncoder) -> dict:
    _placed(lambda: read.check(row), name, index)
    return {"index": row.get("index", index)}


def _encoded(row: dict, index: int, name: str, read: PreferenceEncoder) -> dict:
    return {**_placed(lambda: read(dict(row)), name, index)[1], "index": index}


class PreparedRows:
    """What our preference trainers are before they are TRL's: rows become tokens as in SFT, and prepared ones stay."""

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name: str):
        return preference_rows(dataset, processing_class, args.max_length, f"{dataset_name}_dataset")
