"""Reads and checks rows: files, folders and `datasets` names go in, one [`Example`] per good row comes out."""

import glob
import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nanollada.trainers.data.files import (
    SUFFIXES,
    BadRow,
    DataError,
    TextFile,
    TextFolder,
    file_digest,
    kind_of,
    parquet_rows,
    table_rows,
)

logger = logging.getLogger(__name__)

ROLES = ("system", "user", "assistant", "tool")
SHOWN_REJECTIONS = 10


@dataclass
class RowPolicy:
    """What happens to broken rows: "stop" raises [`DataError`], "skip" counts them per reason and logs the first."""

    on_bad_rows: str = "stop"
    counts: Counter = field(default_factory=Counter)
    quiet: bool = False

    def reject(self, source: str, row: int, error: BadRow) -> None:
        message = f"{source}, row {row}: {error}"
        if self.on_bad_rows == "stop":
            raise DataError(message) from error
        self.counts[error.reason] += 1
        if not self.quiet and self.counts.total() <= SHOWN_REJECTIONS:
            more = "; further ones are counted, not shown" if self.counts.total() == SHOWN_REJECTIONS else ""
            logger.warning("skipped %s%s", message, more)


@dataclass
class SourceArguments:
    """Where rows come from, and what is done with broken ones."""

    data: list[str] | None = field(
        default=None,
        metadata={
            "help": "Sources: files or globs (.jsonl, .txt, both also .gz or .xz; .json, .parquet, .csv), local "
            "folders, names of datasets on the Hub, or one file of such a dataset (hf://datasets/<owner>/<name>/<file>)."
        },
    )
    data_config: str | None = field(
        default=None, metadata={"help": "Configuration of the `datasets` sources (their `name` argument)."}
    )
    data_split: str = field(default="train", metadata={"help": "Split of the `datasets` sources."})
    streaming: bool = field(
        default=False, metadata={"help": "Read rows when they are needed instead of all of them first."}
    )
    sample_by: Literal["paragraph", "line", "document"] = field(
        default="paragraph",
        metadata={"help": "What one document of a .txt file is: text between blank lines, one line, or the file."},
    )
    on_bad_rows: Literal["stop", "skip"] = field(
        default="stop", metadata={"help": "Stop at the first broken row, or skip, count and report broken rows."}
    )

    def __post_init__(self):
        self.data = [self.data] if isinstance(self.data, str) else self.data
        if self.sample_by not in ("paragraph", "line", "document"):
            raise ValueError(f"`sample_by` must be 'paragraph', 'line' or 'document', got {self.sample_by!r}")
        if self.on_bad_rows not in ("stop", "skip"):
            raise ValueError(f"`on_bad_rows` must be 'stop' or 'skip', got {self.on_bad_rows!r}")


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


def parse_row(row: Any) -> dict[str, Any]:
    """
    Checks one row and brings it to the canonical form: the content fields of [`Example`].

    The first of these that has a value decides what the row is: `messages`, `conversations`, `completion` with
    `prompt`, `output` with `instruction`, `text`. A field that is null counts as absent. Beside a chat, `tools` are a
    list of objects or its JSON.

    Raises:
        BadRow: With the reason; [`RowPolicy`] adds the place.
    """
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise BadRow("wrong type", f"a row must be an object, got {type(row).__name__}")
    row = {name: value for name, value in row.items() if value is not None}
    tools = _checked_tools(row.pop("tools", None))
    found = _content(row)
    if not tools:
        return found
    if "messages" not in found:
        raise BadRow("wrong type", f"`tools` belong to a chat, got them beside {', '.join(sorted(found))}")
    return {**found, "tools": tools}


def _content(row: dict) -> dict[str, Any]:
    if "messages" in row or "conversations" in row:
        name = "messages" if "messages" in row else "conversations"
        return {"messages": _checked_chat(_checked_messages(row[name], name))}
    if "completion" in row or "prompt" in row:
        return _prompt_completion(_required(row, "prompt"), _required(row, "completion"))
    if "output" in row or "instruction" in row:
        return _instruction(_required(row, "instruction"), row.get("input", ""), _required(row, "output"))
    if "text" not in row:
        formats = "`text`, `conversations`, `messages`, `prompt` with `completion`, `instruction` with `output`"
        raise BadRow("missing field", f"expected {formats}, got {sorted(row)}")
    return {"text": _checked_text(row["text"], "text")}


def _required(row: dict, name: str) -> Any:
    if name not in row:
        raise BadRow("missing field", f"`{name}`")
    return row[name]


def _checked_text(value: Any, name: str, allow_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise BadRow("wrong type", f"`{name}` must be a string, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which is no character
        raise BadRow("invalid UTF-8", f"`{name}`: {error}") from error
    if not allow_empty and not value.strip():
        raise BadRow("empty text", f"`{name}`")
    return value


def _checked_messages(value: Any, name: str) -> tuple[dict, ...]:
    if not isinstance(value, list | tuple):
        raise BadRow("wrong type", f"`{name}` must be a list of messages, got {type(value).__name__}")
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise BadRow("wrong type", f"`{name}[{i}]` must be an object, got {type(message).__name__}")
        message = {key: part for key, part in message.items() if part is not None}
        role = _checked_text(_required_of(message, name, i, "role"), f"{name}[{i}].role")
        if role not in ROLES:
            raise BadRow("unknown role", f"`{name}[{i}].role` must be one of {', '.join(ROLES)}, got {role!r}")
        calls = message.get("tool_calls")
        if calls is not None:
            _check_calls(calls, f"{name}[{i}].tool_calls", role)
        if calls:  # which may be all that is said; templates find no text easier to read than no field
            message.setdefault("content", "")
        content = _required_of(message, name, i, "content")
        _checked_text(content, f"{name}[{i}].content", allow_empty=role == "system" or bool(calls))
        messages.append(message)
    return tuple(messages)


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
        _checked_text(function["name"], f"{place}.name")
        _check_arguments(function["arguments"], f"{place}.arguments")


def _check_arguments(arguments: Any, name: str) -> None:
    given = arguments
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise BadRow("bad JSON", f"`{name}`: {error}") from error
    if not isinstance(given, dict):
        raise BadRow("wrong type", f"`{name}` must be an object or its JSON, got {arguments!r}")


def _checked_tools(tools: Any) -> tuple[dict, ...]:
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise BadRow("bad JSON", f"`tools`: {error}") from error
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


def _required_of(message: dict, name: str, i: int, key: str) -> Any:
    if key not in message:
        raise BadRow("missing field", f"`{name}[{i}].{key}`")
    return message[key]


def _checked_chat(messages: tuple[dict, ...], num_context: int = 0) -> tuple[dict, ...]:
    if not any(message["role"] == "assistant" for message in messages[num_context:]):
        raise BadRow("no answer", "no assistant message to learn from")
    return messages


def _prompt_completion(prompt: Any, completion: Any) -> dict[str, Any]:
    if isinstance(prompt, str) and isinstance(completion, str):
        return {
            "prompt": _checked_text(prompt, "prompt"),
            "completion": _checked_text(completion, "completion"),
        }
    if isinstance(prompt, str) or isinstance(completion, str):
        raise BadRow("wrong type", "`prompt` and `completion` must both be strings or both be lists of messages")
    prompt = _checked_messages(prompt, "prompt")
    messages = prompt + _checked_messages(completion, "completion")
    return {"messages": _checked_chat(messages, len(prompt)), "num_context": len(prompt)}


def _instruction(instruction: Any, given: Any, output: Any) -> dict[str, Any]:
    parts = (_checked_text(instruction, "instruction"), _checked_text(given, "input", allow_empty=True))
    question = "\n".join(part for part in parts if part)
    answer = _checked_text(output, "output")
    return {"messages": ({"role": "user", "content": question}, {"role": "assistant", "content": answer})}


@dataclass(frozen=True)
class Source:
    """One entry of `data`: its spelling, and the files it stands for or the dataset it names."""

    spec: str
    args: SourceArguments
    files: tuple[str, ...] = ()
    folder: str | None = None

    @property
    def idle(self) -> tuple[str, ...]:
        """Settings that this source has no use for: files and saved tables have no splits, saved splits no configs."""
        if self.files or self._has("state.json"):
            return ("data_split", "data_config")
        return ("data_config",) if self._has("dataset_dict.json") else ()

    def _has(self, file: str) -> bool:
        return self.folder is not None and (Path(self.folder) / file).exists()

    def identity(self) -> list:
        """What the rows depend on, for cache keys: the files' contents, or the dataset's own fingerprint."""
        if self.files:
            return [[file, file_digest(file)] for file in self.files]
        folder = self._text_folder()
        if folder is not None:
            return [self.spec, folder.identity(self.args.data_split)]
        return [self.spec, self.load(streaming=False)._fingerprint]

    def _text_folder(self) -> TextFolder | None:
        """The files to split of a folder or a name; None for tables with types."""
        if self._has("state.json") or self._has("dataset_dict.json"):
            return None
        return TextFolder.find(self.spec, self.folder or self.spec, self.args.data_config)

    def load(self, streaming: bool):
        """The `datasets` object of a folder or a name."""
        import datasets

        args = self.args
        if self.folder is None:
            return datasets.load_dataset(self.spec, name=args.data_config, split=args.data_split, streaming=streaming)
        if self._has("state.json"):  # by `Dataset.save_to_disk`
            return datasets.load_from_disk(self.folder)
        if self._has("dataset_dict.json"):
            splits = datasets.load_from_disk(self.folder)
            if args.data_split not in splits:
                raise ValueError(
                    f"`data_split` must be one of {sorted(splits)} for {self.spec}, got {args.data_split!r}"
                )
            return splits[args.data_split]
        return datasets.load_dataset(self.folder, name=args.data_config, split=args.data_split, streaming=streaming)

    def raw_rows(self, all_columns: bool = False) -> Iterator[tuple[str, int, Any]]:
        """
        (file, 1-based row, row) in order; in the place of a row that can't be read stands the [`BadRow`] that it is.
        Tables are cut down to their text columns, but for `all_columns`.
        """
        args = self.args
        for file in self.files:
            if kind_of(file) == ".parquet":
                rows = enumerate(parquet_rows(file, args.streaming, all_columns), start=1)
            else:
                rows = TextFile(file, file, kind_of(file)).rows(args.sample_by)
            yield from ((file, number, row) for number, row in rows)
        if self.files:
            return
        folder = self._text_folder()
        if folder is not None:
            yield from folder.rows(args.data_split, args.sample_by, args.streaming)
            return
        rows = table_rows(self._loaded(), self.spec, all_columns)
        yield from ((self.spec, number, row) for number, row in enumerate(rows, start=1))

    def _loaded(self):
        import datasets

        try:
            return self.load(self.args.streaming)
        except datasets.exceptions.DatasetGenerationError as error:  # it does not know the row
            raise DataError(f"{self.spec}: {error.__cause__ or error}") from error


def resolve_source(spec: str, args: SourceArguments) -> Source:
    """
    Finds out what an entry of `data` is: a glob, a file, a folder, a file on the Hub, or a dataset's name.

    Raises:
        ValueError: If nothing matches, or a file's type is not read.
    """
    if spec.startswith("hf://"):
        return Source(spec, args, files=(_checked_file(_download(spec)),))
    path = os.path.expanduser(spec)
    if glob.has_magic(path):
        files = sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
        if not files:
            raise ValueError(f"`data` names no file: {spec!r} matches nothing")
        return Source(spec, args, files=tuple(_checked_file(file) for file in files))
    if os.path.isdir(path):
        return Source(spec, args, folder=path)
    if os.path.exists(path):
        return Source(spec, args, files=(_checked_file(path),))
    if kind_of(path) or path.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise ValueError(f"`data` names a file that does not exist: {spec!r}")
    return Source(spec, args)


def resolve_sources(specs: list[str], args: SourceArguments) -> list[Source]:
    """[`resolve_source`] of each; raises as that and [`refuse_idle`] do."""
    sources = [resolve_source(spec, args) for spec in specs]
    refuse_idle(sources)
    return sources


def refuse_idle(sources: list[Source]) -> None:
    """
    Refuses `data_split` and `data_config` where no source has any.

    Raises:
        ValueError: naming the setting and the sources.
    """
    defaults = SourceArguments()
    for name, kind in (("data_split", "splits"), ("data_config", "configurations")):
        given = [value for source in sources if (value := getattr(source.args, name)) != getattr(defaults, name)]
        if given and all(name in source.idle for source in sources):
            named = ", ".join(source.spec for source in sources)
            raise ValueError(f"`{name}` must be left out where no source has {kind}, got {given[0]!r} for {named}")


def read_examples(source: Source, policy: RowPolicy) -> Iterator[Example]:
    """
    The good rows of a source in order.

    Raises:
        DataError: At a broken row, unless the policy skips them.
    """
    for name, number, row in source.raw_rows():
        try:
            yield Example(name, number, **parse_row(row))
        except BadRow as error:
            policy.reject(name, number, error)


def _checked_file(file: str) -> str:
    if not kind_of(file):
        raise ValueError(f"`data` must hold files of these types: {SUFFIXES}; got {file!r}")
    return file


def _download(uri: str) -> str:
    from huggingface_hub import hf_hub_download

    match = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)", uri)
    if match is None:
        raise ValueError(f"`data` must spell a file on the Hub hf://datasets/<owner>/<name>/<file>, got {uri!r}")
    return hf_hub_download(match[1], match[3], repo_type="dataset", revision=match[2])
