"""Sources: files, folders and `datasets` names go in, one [`Example`] per good row comes out."""

import glob
import logging
import os
import re
import types
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nanollada.trainers.data.files import (
    FIELDS,
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
from nanollada.trainers.data.formats import Example, parse_row

logger = logging.getLogger(__name__)

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
class RowArguments:
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
    on_bad_rows: Literal["stop", "skip"] = field(
        default="stop", metadata={"help": "Stop at the first broken row, or skip, count and report broken rows."}
    )
    # Settings of some kinds of rows alone.
    streaming = False
    sample_by = "paragraph"
    fields = types.MappingProxyType({})

    @property
    def columns(self) -> dict[str, str] | None:
        """What is read of a table, by what it is; `None` for all of it."""
        return None

    def __post_init__(self):
        self.data = [self.data] if isinstance(self.data, str) else self.data
        if self.on_bad_rows not in ("stop", "skip"):
            raise ValueError(f"`on_bad_rows` must be 'stop' or 'skip', got {self.on_bad_rows!r}")


@dataclass
class HeldOutArguments(RowArguments):
    """Which rows are evaluated on."""

    eval_data: list[str] | None = field(
        default=None,
        metadata={"help": "Sources to evaluate on, spelt as `data`; instead of a held-out part of `data`."},
    )
    eval_split: str | None = field(
        default=None, metadata={"help": "Split of the `datasets` sources in `eval_data`; default: `data_split`."}
    )
    held_out_fraction: float = field(
        default=0.01,
        metadata={
            "help": "Share of the source rows kept for evaluation, chosen by their content alone; 0 turns it off. Not "
            "used with `eval_data`."
        },
    )
    max_held_out_documents: int = field(
        default=500,
        metadata={
            "help": "At most this many held-out source rows are evaluated on, the same number of each source; "
            "the others are reported, and never trained on."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self.eval_data = [self.eval_data] if isinstance(self.eval_data, str) else self.eval_data
        if not 0 <= self.held_out_fraction < 1:
            raise ValueError(f"`held_out_fraction` must be in [0, 1), got {self.held_out_fraction}")
        if self.max_held_out_documents < 1:
            raise ValueError(f"`max_held_out_documents` must be at least 1, got {self.max_held_out_documents}")


@dataclass
class SourceArguments(RowArguments):
    """Where texts, chats and answers come from, and how they are read."""

    streaming: bool = field(
        default=False, metadata={"help": "Read rows when they are needed instead of all of them first."}
    )
    sample_by: Literal["paragraph", "line", "document"] = field(
        default="paragraph",
        metadata={"help": "What one document of a .txt file is: text between blank lines, one line, or the file."},
    )
    text_field: str | None = field(
        default=None, metadata={"help": "The field that holds a row's text, if not `text`; others are not read then."}
    )
    messages_field: str | None = field(
        default=None, metadata={"help": "The field that holds a chat, if not `messages` or `conversations`."}
    )
    prompt_field: str | None = field(
        default=None, metadata={"help": "The field that holds a prompt, if not `prompt` (with `completion_field`)."}
    )
    completion_field: str | None = field(
        default=None, metadata={"help": "The field that holds its completion, if not `completion`."}
    )

    @property
    def fields(self) -> dict[str, str]:
        """What a row calls the content that is read, where that was said, see [`~trainers.data.formats.parse_row`]."""
        names = ("text", "messages", "prompt", "completion")
        given = {name: value for name in names if (value := getattr(self, f"{name}_field")) is not None}
        if given.keys() & {"prompt", "completion"}:
            given = {"prompt": "prompt", "completion": "completion"} | given
        return given

    @property
    def columns(self) -> dict[str, str]:
        columns = self.fields or {name: name for name in FIELDS}
        return columns | {"tools": "tools"} if "messages" in columns else columns

    def __post_init__(self):
        super().__post_init__()
        if self.sample_by not in ("paragraph", "line", "document"):
            raise ValueError(f"`sample_by` must be 'paragraph', 'line' or 'document', got {self.sample_by!r}")
        if (names := self.fields) and names.keys() not in ({"text"}, {"messages"}, {"prompt", "completion"}):
            raise ValueError(
                "`text_field`, `messages_field` and `prompt_field` with `completion_field` are three formats: one of "
                f"them must be given, got {names}"
            )


@dataclass(frozen=True)
class Source:
    """One entry of `data`: its spelling, and the files it stands for, the dataset it names, or a dataset itself."""

    spec: str
    args: RowArguments
    files: tuple[str, ...] = ()
    folder: str | None = None
    dataset: Any = None

    @property
    def idle(self) -> tuple[str, ...]:
        """Settings that this source has no use for: files and saved tables have no splits, saved splits no configs."""
        if self.files or self.dataset is not None or self._has("state.json"):
            return ("data_split", "data_config")
        return ("data_config",) if self._has("dataset_dict.json") else ()

    def _has(self, file: str) -> bool:
        return self.folder is not None and (Path(self.folder) / file).exists()

    def identity(self) -> list:
        """What the rows depend on, for cache keys: the files' contents, or the dataset's own fingerprint."""
        if self.files:
            return [[file, file_digest(file)] for file in self.files]
        if self.dataset is not None:
            return [self.dataset._fingerprint]
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
        if self.dataset is not None:
            return self.dataset
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
        columns = None if all_columns else args.columns
        for file in self.files:
            if kind_of(file) == ".parquet":
                rows = enumerate(parquet_rows(file, args.streaming, columns), start=1)
            else:
                rows = TextFile(file, file, kind_of(file)).rows(args.sample_by)
            yield from ((file, number, row) for number, row in rows)
        if self.files:
            return
        folder = self._text_folder() if self.dataset is None else None
        if folder is not None:
            yield from folder.rows(args.data_split, args.sample_by, args.streaming)
            return
        rows = table_rows(self._loaded(), self.spec, columns)
        yield from ((self.spec, number, row) for number, row in enumerate(rows, start=1))

    def _loaded(self):
        import datasets

        try:
            return self.load(self.args.streaming)
        except datasets.exceptions.DatasetGenerationError as error:  # it does not know the row
            raise DataError(f"{self.spec}: {error.__cause__ or error}") from error


def resolve_source(
    spec: str, args: RowArguments, given: Mapping[str, Any] | None = None, argument: str = "data"
) -> Source:
    """
    Finds out what an entry of `data` (or another `argument`) is: a glob, a file, a folder, a file on the Hub, a
    dataset's name, or the name of a dataset that is `given`.

    Raises:
        ValueError: If nothing matches, or a file's type is not read.
    """
    if given and spec in given:
        return Source(spec, args, dataset=given[spec].with_format(None))  # strings as strings
    if spec.startswith("hf://"):
        return Source(spec, args, files=(_checked_file(_download(spec), argument),))
    path = os.path.expanduser(spec)
    if glob.has_magic(path):
        files = sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
        if not files:
            raise ValueError(f"`{argument}` names no file: {spec!r} matches nothing")
        return Source(spec, args, files=tuple(_checked_file(file, argument) for file in files))
    if os.path.isdir(path):
        return Source(spec, args, folder=path)
    if os.path.exists(path):
        return Source(spec, args, files=(_checked_file(path, argument),))
    if kind_of(path) or path.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise ValueError(f"`{argument}` names a file that does not exist: {spec!r}")
    return Source(spec, args)


def resolve_sources(specs: list[str], args: RowArguments) -> list[Source]:
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
    defaults = RowArguments()
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
            yield Example(name, number, **parse_row(row, source.args.fields))
        except BadRow as error:
            policy.reject(name, number, error)


def _checked_file(file: str, argument: str) -> str:
    if not kind_of(file):
        raise ValueError(f"`{argument}` must hold files of these types: {SUFFIXES}; got {file!r}")
    return file


def _download(uri: str) -> str:
    from huggingface_hub import hf_hub_download

    match = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)", uri)
    if match is None:
        raise ValueError(f"`data` must spell a file on the Hub hf://datasets/<owner>/<name>/<file>, got {uri!r}")
    return hf_hub_download(match[1], match[3], repo_type="dataset", revision=match[2])
