"""Row formats: what a row may be, and one [`Example`] in canonical form out of each."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanollada.trainers.data.files import FIELDS, BadRow

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT = {"human": "user", "gpt": "assistant"}  # what its `from` calls two of them


@dataclass(frozen=True)
class Example:
    """
    One good row in canonical form: a text, a prompt and its completion, or a chat.

    Attributes:
        source (`str`): File or dataset.
        row (`int`): 1-based; the line of a .jsonl file, the first line of a document in a .txt file.
        text (`str`, *optional*): A pretraining document.
        prompt, completion (`str`, *optional*): Plain strings; no chat template applies.
        messages (`tuple[dict]`, *optional*): A chat.
        num_context (`int`): How many leading messages are never targets (a conversational `prompt`).
        tools (`tuple[dict]`, *optional*): What the model may call, as the chat template gets it.
    """

    source: str
    row: int
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[dict, ...] | None = None
    num_context: int = 0
    tools: tuple[dict, ...] | None = None

    @property
    def format(self) -> str:
        return "sft" if self.text is None else "pretrain"

    @property
    def position(self) -> float:
        """A number in [0, 1) made from the content alone, for splits that no order, file or seed can change."""
        content = [self.text, self.prompt, self.completion, self.messages]
        content += [self.tools] if self.tools else []
        digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).digest()
        return (int.from_bytes(digest[:8], "big") >> 11) * 2.0**-53


def parse_row(row: Any, fields: Mapping[str, str] | None = None) -> dict[str, Any]:
    """
    Checks one row and brings it to the canonical form: the content fields of [`Example`].

    The first of these that has a value decides what the row is: `messages`, `conversations`, `completion` with
    `prompt`, `output` with `instruction`, `text`. A field that is null counts as absent. Beside a chat, `tools` are a
    list of objects or its JSON. A chat's messages have `role` and `content`, or ShareGPT's `from` and `value`.

    Args:
        row: Of a source.
        fields (`Mapping[str, str]`, *optional*): What the row calls "text", or "messages", or "prompt" and
            "completion". It is read as that alone, whatever else it holds.

    Raises:
        BadRow: With the reason; [`RowPolicy`] adds the place.
    """
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise BadRow("wrong type", f"a row must be an object, got {type(row).__name__}")
    row, fields = FilledRow(row), fields or {}
    tools = checked_tools(row.pop("tools", None)) if fields.keys() <= {"messages"} else ()
    content = _named_content(row, fields) if fields else _content(row)
    if not tools:
        return content
    if "messages" not in content:
        raise BadRow("wrong type", f"`tools` belong to a chat, got them beside {', '.join(sorted(content))}")
    return {**content, "tools": tools}


class FilledRow(dict):
    """The fields of a row that have a value; an error tells one that is null from one that there isn't."""

    def __init__(self, row: dict):
        super().__init__({name: value for name, value in row.items() if value is not None})
        self.nulls = [name for name in row if name not in self]

    def required(self, name: str) -> Any:
        if name not in self:
            raise (
                BadRow("null value", f"`{name}` is null")
                if name in self.nulls
                else BadRow("missing field", f"`{name}`")
            )
        return self[name]


def _named_content(row: FilledRow, fields: Mapping[str, str]) -> dict[str, Any]:
    """Of a row whose fields have other names."""
    values = {name: row.required(field) for name, field in fields.items()}
    if "text" in values:
        return {"text": checked_text(values["text"], fields["text"])}
    if "messages" in values:
        return {"messages": _checked_chat(checked_messages(values["messages"], fields["messages"]))}
    return _prompt_completion(values["prompt"], values["completion"], fields["prompt"], fields["completion"])


def _content(row: FilledRow) -> dict[str, Any]:
    if "messages" in row or "conversations" in row:
        name = "messages" if "messages" in row else "conversations"
        return {"messages": _checked_chat(checked_messages(row[name], name))}
    if "completion" in row or "prompt" in row:
        return _prompt_completion(row.required("prompt"), row.required("completion"))
    if "output" in row or "instruction" in row:
        return _instruction(row.required("instruction"), row.get("input", ""), row.required("output"))
    if "text" not in row:
        if nulls := [name for name in FIELDS if name in row.nulls]:
            raise BadRow("null value", ", ".join(f"`{name}` is null" for name in nulls))
        formats = "`text`, `conversations`, `messages`, `prompt` with `completion`, `instruction` with `output`"
        raise BadRow("missing field", f"expected {formats}, got {sorted(row)}")
    return {"text": checked_text(row["text"], "text")}


def _required(row: dict, name: str, place: str) -> Any:
    if name not in row:
        raise BadRow("missing field", f"`{place}{name}`")
    return row[name]


def _parsed(value: Any, name: str) -> Any:
    """A value, or what its JSON says."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise BadRow("bad JSON", f"`{name}`: {error}") from error


def checked_text(value: Any, name: str, allow_empty: bool = False) -> str:
    """
    A text that stands under a name.

    Raises:
        BadRow: For what is no string, no UTF-8, or blank (unless `allow_empty`).
    """
    if not isinstance(value, str):
        raise BadRow("wrong type", f"`{name}` must be a string, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which is no character
        raise BadRow("invalid UTF-8", f"`{name}`: {error}") from error
    if not allow_empty and not value.strip():
        raise BadRow("empty text", f"`{name}`")
    return value


def checked_messages(value: Any, name: str) -> tuple[dict, ...]:
    """
    A chat that stands under a name, ShareGPT's with the names of everybody else.

    Raises:
        BadRow: For what is no list of messages, naming the part.
    """
    if not isinstance(value, list | tuple):
        raise BadRow("wrong type", f"`{name}` must be a list of messages, got {type(value).__name__}")
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise BadRow("wrong type", f"`{name}[{i}]` must be an object, got {type(message).__name__}")
        message = _renamed({key: part for key, part in message.items() if part is not None}, f"{name}[{i}]")
        role = checked_text(_required(message, "role", f"{name}[{i}]."), f"{name}[{i}].role")
        if role not in ROLES:
            raise BadRow("unknown role", f"`{name}[{i}].role` must be one of {', '.join(ROLES)}, got {role!r}")
        calls = message.get("tool_calls")
        if calls is not None:
            _check_calls(calls, f"{name}[{i}].tool_calls", role)
        if calls:  # which may be all that is said; templates find no text easier to read than no field
            message.setdefault("content", "")
        content = _required(message, "content", f"{name}[{i}].")
        checked_text(content, f"{name}[{i}].content", allow_empty=role == "system" or bool(calls))
        messages.append(message)
    return tuple(messages)


def _renamed(message: dict, place: str) -> dict:
    """A message of ShareGPT, `from` and `value`, with the names of everybody else; others as they are."""
    if "from" not in message or "role" in message:
        return message
    name = checked_text(message["from"], f"{place}.from")
    if name not in ROLES and name not in SHAREGPT:
        known = ", ".join((*SHAREGPT, *ROLES))
        raise BadRow("unknown role", f"`{place}.from` must be one of {known}, got {name!r}")
    rest = {key: part for key, part in message.items() if key not in ("from", "value")}
    return {"role": SHAREGPT.get(name, name), "content": _required(message, "value", f"{place}."), **rest}


def _check_calls(calls: Any, name: str, role: str) -> None:
    """Raises a BadRow for calls that are not as chat templates read them; `arguments` may also be an object's JSON."""
    if role != "assistant" and calls:
        raise BadRow("wrong role", f"`{name}` must be an assistant's, got them of {role!r}")
    if not isinstance(calls, list | tuple):
        raise BadRow("wrong type", f"`{name}` must be a list, got {type(calls).__name__}")
    for i, call in enumerate(calls):
        place, function = f"{name}[{i}]", call
        if isinstance(call, dict) and "function" in call:
            place, function = f"{place}.function", call["function"]
        if not isinstance(function, dict):
            raise BadRow("wrong type", f"`{place}` must be an object, got {type(function).__name__}")
        for key in ("name", "arguments"):
            if function.get(key) is None:
                raise BadRow("missing field", f"`{place}.{key}`")
        checked_text(function["name"], f"{place}.name")
        arguments = function["arguments"]
        if not isinstance(_parsed(arguments, f"{place}.arguments"), dict):
            raise BadRow("wrong type", f"`{place}.arguments` must be an object or its JSON, got {arguments!r}")


def checked_tools(tools: Any) -> tuple[dict, ...]:
    """
    A row's `tools`, objects or their JSON; none for `None`.

    Raises:
        BadRow: For what are no tools.
    """
    if isinstance(tools, str) and tools.strip():
        tools = _parsed(tools, "tools")
    if not tools:
        return ()
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("wrong type", f"`tools` must be a list of objects or its JSON, got {type(tools).__name__}")
    tools = tuple(_without_nulls(tool) for tool in tools)
    for i, tool in enumerate(tools):
        if not isinstance(tool.get("function", tool), dict) or not isinstance(tool_name(tool), str):
            raise BadRow("missing field", f"`tools[{i}].function.name`")
    return tools


def tool_name(tool: dict) -> str | None:
    """What calls say: tools are functions by themselves, or objects with one."""
    return tool.get("function", tool).get("name")


def _without_nulls(value: Any) -> Any:
    """Arrow gives every object of a column all fields that one of them has."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list | tuple) else value


def _checked_chat(messages: tuple[dict, ...], num_context: int = 0) -> tuple[dict, ...]:
    if not any(message["role"] == "assistant" for message in messages[num_context:]):
        raise BadRow("no answer", "no assistant message to learn from")
    return messages


def _prompt_completion(
    prompt: Any, completion: Any, name: str = "prompt", completion_name: str = "completion"
) -> dict[str, Any]:
    if isinstance(prompt, str) and isinstance(completion, str):
        return {"prompt": checked_text(prompt, name), "completion": checked_text(completion, completion_name)}
    if isinstance(prompt, str) or isinstance(completion, str):
        raise BadRow(
            "wrong type", f"`{name}` and `{completion_name}` must both be strings or both be lists of messages"
        )
    prompt = checked_messages(prompt, name)
    messages = prompt + checked_messages(completion, completion_name)
    return {"messages": _checked_chat(messages, len(prompt)), "num_context": len(prompt)}


def _instruction(instruction: Any, given: Any, output: Any) -> dict[str, Any]:
    parts = (checked_text(instruction, "instruction"), checked_text(given, "input", allow_empty=True))
    question = "\n".join(part for part in parts if part)
    answer = checked_text(output, "output")
    return {"messages": ({"role": "user", "content": question}, {"role": "assistant", "content": answer})}
