"""
Files as they stand: lines of .jsonl, objects of .json, documents of .txt, cells of .csv, text columns of tables.

What a file spells is what comes out, whatever the column, the chunk, the size or the folder: nothing is guessed or
converted. `datasets` finds the files of folders and of names on the Hub, and reads what has types of its own (parquet,
saved tables); its readers of CSV and JSON guess types, so text is split here, by `csv` and `json`.
"""

import csv
import gzip
import io
import json
import logging
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from nanollada.trainers.records import file_digest

logger = logging.getLogger(__name__)

# Fields that are read, unless `--text_field` and its like name others; a table is cut down to what is read, so that
# images and audio beside it stay undecoded.
FIELDS = ("text", "conversations", "messages", "prompt", "completion", "instruction", "input", "output", "tools")
# May be lists of messages, or of tools.
CHATS = ("conversations", "messages", "prompt", "completion", "chosen", "rejected", "tools")
OPENERS: dict[str, Callable] = {".gz": gzip.open, ".xz": lzma.open}
LINES = (".jsonl", ".txt")  # also compressed
SUFFIXES = ".jsonl, .txt (both also with .gz or .xz), .json, .parquet, .csv"
KINDS = (*LINES, ".json", ".csv", ".parquet")
# Settings of a dataset's card that change nothing here: how much is read at once, and the types that are not guessed.
UNREAD = ("features", "chunksize", "block_size", "use_threads", "on_mixed_types", "parse_agent_traces")
UNREAD += ("keep_default_na", "na_filter")
SPACE, EMPTY, NEXT = (re.compile(rule) for rule in (r"\s*", r"\s*(\])", r"\s*([,\]])\s*"))  # of JSON
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class DataError(ValueError):
    """A file or row that cannot be used; the message names file, row and reason."""


class BadRow(Exception):
    """Raised by the checks of one row, where its place is not known; `RowPolicy` turns it into a [`DataError`]."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def kind_of(file: str) -> str:
    """The suffix that decides the reader, "" where there is none."""
    suffixes = [suffix.lower() for suffix in Path(file).suffixes[-2:]]
    if suffixes and suffixes[-1] in OPENERS:
        return suffixes[0] if suffixes[0] in LINES else ""
    return suffixes[-1] if suffixes and suffixes[-1] in KINDS else ""


@dataclass(frozen=True)
class TextFile:
    """
    A file that is split here.

    Attributes:
        name (`str`): What messages call it.
        path (`str`): Where it is opened; also an address that `fsspec` knows.
        kind (`str`): One of .jsonl, .json, .txt, .csv.
        delimiter (`str`): What stands between a .csv's cells.
    """

    name: str
    path: str
    kind: str
    delimiter: str = ","

    def rows(self, sample_by: str) -> Iterator[tuple[int, Any]]:
        """
        (1-based row, its value or, in the place of one that can't be read, the [`BadRow`] that it is). A row is a line
        of a .jsonl file or of a .json file that is no array, an array's element, a .txt file's document (numbered by
        its first line), or a .csv file's record after the header.

        Raises:
            DataError: Where nothing can be read any more: broken compression, quotes or arrays; a bad header.
        """
        number = 0
        try:
            for number, row in self._rows(sample_by):  # noqa: B007
                yield number, row
        except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
            raise DataError(f"{self.name}, row {number + 1}: broken compression: {error}") from error

    def _rows(self, sample_by: str) -> Iterator[tuple[int, Any]]:
        if self.kind == ".csv":
            return self._records()
        if self.kind == ".txt":
            return ((number, _text(document)) for number, document in _documents(self._lines(), sample_by))
        if self.kind == ".json" and self._is_array():
            return self._elements()
        return ((number, _value(line)) for number, line in self._lines() if line.strip())

    def _open(self):
        if "://" not in self.path:
            return OPENERS.get(Path(self.path).suffix.lower(), open)(self.path, "rb")
        from datasets.utils.file_utils import xopen

        return xopen(self.path, "rb")

    def _characters(self) -> io.TextIOWrapper:
        """Characters, line ends as they are; a byte that is none becomes half a surrogate pair, for a row's check."""
        return io.TextIOWrapper(self._open(), encoding="utf-8-sig", errors="surrogateescape", newline="")

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """(1-based number, line without its end); a byte order mark at the start is removed."""
        with self._open() as stream:
            for number, line in enumerate(stream, start=1):
                yield number, (line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line).rstrip(b"\r\n")

    # ---- .json

    def _is_array(self) -> bool:
        with self._open() as stream:
            return stream.read(4096).removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"[")

    def _elements(self) -> Iterator[tuple[int, Any]]:
        """The elements of an array, each parsed by itself, so that errors have a row."""
        with self._characters() as stream:
            text = stream.read()
        number, place, decoder = 0, text.index("[") + 1, json.JSONDecoder(object_pairs_hook=_object)
        after = EMPTY.match(text, place)
        while after is None or after[1] == ",":
            number, place = number + 1, after.end() if after else SPACE.match(text, place).end()
            try:
                row, place = decoder.raw_decode(text, place)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{self.name}, row {number}: bad JSON: {error}") from error
            after = NEXT.match(text, place)
            if after is None:
                raise DataError(f"{self.name}, row {number}: bad JSON: neither comma nor ] after it")
            yield number, row
        if text[after.end() :].strip():
            raise DataError(f"{self.name}, row {number + 1}: bad JSON: more text after the array")

    # ---- .csv

    def _records(self) -> Iterator[tuple[int, Any]]:
        csv.field_size_limit(2**31 - 1)  # the module's own would refuse a text of 128 KiB
        number = 0
        with self._characters() as stream:
            records = csv.reader(stream, delimiter=self.delimiter, strict=True)
            try:
                filled = (cells for cells in records if cells)  # a blank line is no record
                header = self._header(next(filled, None))
                for number, cells in enumerate(filled, start=1):
                    yield number, _record(header, cells)
            except csv.Error as error:
                place = f"{self.name}, row {number + 1}" if number else self.name
                raise DataError(f"{place}: broken CSV at line {records.line_num}: {error}") from error

    def _header(self, names: list[str] | None) -> list[str]:
        """Checked column names; columns without a name are nobody's."""
        if names is None:
            raise DataError(f"{self.name}: a .csv file must begin with the names of its columns, got an empty file")
        for name in names:
            if re.search("[\ud800-\udfff]", name):
                raise DataError(f"{self.name}: the header must be UTF-8, got {name!r}")
            if name and names.count(name) > 1:
                raise DataError(f"{self.name}: the header must name each column once, got {name!r} twice")
            if name != name.strip() and name.strip() in FIELDS:
                raise DataError(f"{self.name}: the header must name columns without spaces around, got {name!r}")
        return names


def _value(line: bytes) -> Any:
    """What a line of JSON says."""
    try:
        return json.loads(line.decode(), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        return BadRow("invalid UTF-8", str(error))
    except (ValueError, RecursionError) as error:
        return BadRow("bad JSON", str(error))


def _text(document: bytes) -> dict[str, str] | BadRow:
    try:
        return {"text": document.decode()}
    except UnicodeDecodeError as error:
        return BadRow("invalid UTF-8", str(error))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"`{next(name for name in names if names.count(name) > 1)}` stands twice in one object")
    return made


def _record(header: list[str], cells: list[str]) -> dict[str, str | None] | BadRow:
    """A cell is a text; an empty one is absent."""
    if len(cells) != len(header):
        return BadRow("wrong number of cells", f"{len(cells)} for {len(header)} columns")
    return {name: cell or None for name, cell in zip(header, cells, strict=True) if name}


def _documents(lines: Iterator[tuple[int, bytes]], sample_by: str) -> Iterator[tuple[int, bytes]]:
    """Documents of a .txt file with the number of their first line; blank lines between documents are no documents."""
    if sample_by == "line":
        yield from ((number, line) for number, line in lines if line.strip())
        return
    start, document = 0, []
    for number, line in lines:
        if line.strip() or (document and sample_by == "document"):
            start = start if document else number
            document.append(line)
        elif document:
            yield start, b"\n".join(document)
            document = []
    if document:
        yield start, b"\n".join(document)


# ---- what `datasets` reads


def table_rows(dataset, source: str, columns: Mapping[str, str] | None = None) -> Iterator[dict]:
    """
    The rows of a table with types: `columns` of it alone, by what each of [`FIELDS`] is called; without any as it is.

    Raises:
        DataError: For one of these columns that holds no text, naming it and its type.
    """
    if columns is not None:
        _check_types(dataset.features or {}, source, columns)
        names = [name for name in dataset.column_names or () if name in columns.values()]
        epoch = getattr(dataset, "epoch", None)
        dataset = dataset.select_columns(names) if names else dataset
        if epoch is not None:  # of a stream that is shuffled anew at each pass; the selection begins at pass 0
            dataset.set_epoch(epoch)
    yield from dataset


def _check_types(features: dict, source: str, columns: Mapping[str, str]) -> None:
    import datasets

    texts = ("string", "large_string", "string_view", "null")
    for field, name in columns.items():
        kind = features.get(name)
        text = isinstance(kind, datasets.Value) and kind.dtype in texts
        chat = field in CHATS and isinstance(kind, datasets.List | datasets.LargeList | list)
        if kind is not None and not text and not chat and not isinstance(kind, datasets.Json):  # JSON: the row decides
            expected = "text or messages" if field in CHATS else "text"
            raise DataError(f"{source}: column `{name}` must hold {expected}, got {kind}")


def parquet_rows(file: str, streaming: bool, columns: Mapping[str, str] | None = None) -> Iterator[dict]:
    """
    Rows of a .parquet file, with the columns of [`table_rows`].

    Raises:
        DataError: As [`table_rows`], and for a file that is none.
    """
    import datasets

    try:
        dataset = datasets.load_dataset("parquet", data_files=file, split="train", streaming=streaming)
        yield from table_rows(dataset, file, columns)
    except DataError:
        raise
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        raise DataError(f"{file}: {error.__cause__ or error}") from error


@dataclass(frozen=True)
class TextFolder:
    """
    The files of a folder, or of a dataset on the Hub, that are split here: `datasets` finds them and their splits.

    Attributes:
        spec (`str`): The folder or name.
        splits (`dict`): The files of each split.
        kind (`str`): .csv, .json or .txt; lines of JSON are told by each file's suffix.
        delimiter (`str`): As of [`TextFile`].
    """

    spec: str
    splits: dict[str, Any]
    kind: str
    delimiter: str

    @classmethod
    def find(cls, spec: str, path: str, config: str | None) -> "TextFolder | None":
        """
        What there is to split in a folder or under a name; None for what `datasets` reads.

        Raises:
            ValueError: For settings of the dataset's card that are not read here, and as `load_dataset_builder`.
        """
        import datasets

        builder = datasets.load_dataset_builder(path, name=config)
        _tell_left_out(spec, path, builder.config.data_files or {})
        kind = _reader(builder)
        if kind is None:
            return None
        if not builder.config.data_files:  # a cache without its files
            rule = "`data` must have its files at hand, to be read as text"
            raise ValueError(f"{rule}, got only the copy of {spec} in the cache of `datasets`")
        defaults = type(builder.config)()
        known = [item.name for item in fields(datasets.BuilderConfig)] + ["sep", "delimiter", *UNREAD]
        for name in (item.name for item in fields(defaults) if item.name not in known):
            if (value := getattr(builder.config, name)) != getattr(defaults, name):
                raise ValueError(f"`data` must be read without `{name}`, got {value!r} in the card of {spec}")
        return cls(spec, builder.config.data_files, kind, getattr(builder.config, "sep", ","))

    def identity(self, split: str) -> list:
        """What the rows depend on: contents of local files, and of others the versions that `datasets` tells."""
        found = [self.kind, self.delimiter]
        for name in self._names(split):
            files = self.splits[name]
            remote = any("://" in file for file in files)
            origin = [list(part) for part in files.origin_metadata] if remote else None
            found.append([name, [file if remote else [file, file_digest(file)] for file in files], origin])
        return found

    def rows(self, split: str, sample_by: str, streaming: bool) -> Iterator[tuple[str, int, Any]]:
        """
        (file, row, value) of a split, or of a part of one, such as "train[:10%]": all rows of its files in order.

        Raises:
            ValueError: For a split that there isn't; and as [`TextFile.rows`].
        """
        import datasets

        if split in self.splits:
            yield from self._split(split, sample_by, streaming)
            return
        counts = {name: sum(1 for _ in self._split(name, sample_by, streaming)) for name in self._names(split)}
        for part in datasets.ReadInstruction.from_spec(split).to_absolute(counts):
            yield from islice(self._split(part.splitname, sample_by, streaming), part.from_, part.to)

    def _names(self, split: str) -> list[str]:
        """The splits that a `data_split` names."""
        parts = [re.fullmatch(r"\s*([\w.-]+)\s*(\[.*\])?.*", part) for part in split.split("+")]
        names = [part[1] if part else split for part in parts]
        if unknown := [name for name in names if name not in self.splits]:
            rule = f"`data_split` must be one of {sorted(map(str, self.splits))} for {self.spec}"
            raise ValueError(f"{rule}, got {unknown[0]!r}")
        return names

    def _split(self, name: str, sample_by: str, streaming: bool) -> Iterator[tuple[str, int, Any]]:
        for file in self.splits[name]:
            for found in self._opened(file, streaming):
                yield from ((found.name, number, row) for number, row in found.rows(sample_by))

    def _opened(self, file: str, streaming: bool) -> list[TextFile]:
        """A file, or what an archive holds; what is not local is downloaded, unless rows are streamed."""
        import datasets

        if streaming or "://" not in file:
            manager = datasets.StreamingDownloadManager()
        else:
            manager = datasets.DownloadManager(record_checksums=False)
        paths = list(manager.iter_files([manager.download_and_extract(file)]))
        kind = ".jsonl" if self.kind == ".json" and re.search(r"\.(jsonl|ndjson)(\.\w+)?$", file, re.I) else self.kind
        names = [file] if len(paths) == 1 else [f"{file}: {path.split('::')[0]}" for path in paths]
        return [TextFile(name, path, kind, self.delimiter) for name, path in zip(names, paths, strict=True)]


def _tell_left_out(spec: str, path: str, splits: dict) -> None:
    """Warns of data files in a folder that no split has: `datasets` takes one kind, or what is named after splits."""
    taken = {os.path.realpath(file) for files in splits.values() for file in files}
    found = (file for file in sorted(Path(path).rglob("*")) if kind_of(file.name) and file.is_file())
    left = [str(file.relative_to(path)) for file in found if os.path.realpath(file) not in taken]
    if taken and left:
        _warn_once(
            f"{spec}: no split has {', '.join(left[:5])}{' …' if left[5:] else ''}; a glob would read all files"
        )


@lru_cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _reader(builder) -> str | None:
    """Which of our kinds a builder would read, or (from its cache) has read."""
    from datasets.packaged_modules.csv.csv import Csv
    from datasets.packaged_modules.json.json import Json
    from datasets.packaged_modules.text.text import Text

    kinds = {Csv: (".csv", "csv"), Json: (".json", "json"), Text: (".txt", "text")}
    for kind, (suffix, name) in kinds.items():
        if isinstance(builder, kind) or (not builder.config.data_files and builder.info.builder_name == name):
            return suffix
    return None
