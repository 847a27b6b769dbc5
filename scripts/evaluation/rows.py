"""The rows of a task, read or made, and checked; every error names its file and row."""

import glob
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from nanollada.scripts.evaluation.bench import Row, Task
from nanollada.scripts.evaluation.kinds import KINDS
from nanollada.trainers.data.files import BadRow, DataError
from nanollada.trainers.data.sources import SourceArguments, resolve_source

FILE = re.compile(r"\.(jsonl|txt|json|parquet|csv)(\.gz|\.xz)?$", re.I)


def rows_of(task: Task, base: str | None, seed: int) -> tuple[list[Row], str]:
    """
    The rows of a task, read or made, limited, and the SHA-256 of its data.

    Args:
        task ([`Task`]): The task.
        base (`str`, *optional*): Folder in which files are looked for.
        seed (`int`): Of the problems of a puzzle.

    Raises:
        `DataError`: at a broken row. `ValueError`: for no data or no rows; and as `puzzles.make_rows`.
    """
    if task.data is not None:
        return read_rows(task, base)
    try:
        values = KINDS[task.kind].make_rows(task, seed)
    except ValueError as error:
        raise ValueError(f"task {task.name}: {error}") from error
    rows = [Row(f"task {task.name}", number, row) for number, row in enumerate(values, start=1)]
    rows = _checked(rows, task) if getattr(task, "puzzle", None) else rows
    return limited(rows, task.limit), digest_of(values)


def read_rows(task: Task, base: str | None) -> tuple[list[Row], str]:
    """
    As [`rows_of`], of a task with `data`; the SHA-256 is that of the file if there is one, else of all rows.

    Args:
        task ([`Task`]): With `data`.
        base (`str`, *optional*): Folder in which files are looked for.

    Raises:
        `DataError`: at a broken row. `ValueError`: for no data or no rows, and settings that files don't have.
    """
    spec = task.data
    local = FILE.search(spec) or glob.has_magic(spec) or (Path(base or "") / spec).exists()
    if base is not None and local and not spec.startswith("hf://"):
        spec = str(Path(base) / spec)
    arguments = SourceArguments(data_config=task.data_config, data_split=task.data_split or "train")
    source = resolve_source(spec, arguments)
    for name in ("data_split", "data_config"):
        if name in source.idle and getattr(task, name) is not None:
            kind = "files" if source.files else "a saved dataset without them"
            raise ValueError(f"task {task.name}: `{name}` must be left out for {kind}, got {getattr(task, name)!r}")
    rows = [
        _renamed(Row(name, number, _object(name, number, value)), task)
        for name, number, value in source.raw_rows(all_columns=True)
    ]
    if len(source.files) == 1:
        digest = source.identity()[0][1]
    else:
        digest = digest_of([row.values for row in rows])
    rows = rows if task.match is None else [row for row in rows if re.search(task.match, _json(row.values))]
    if not rows:
        raise ValueError(f"`data` must hold rows, got none that {task.name} can use in {spec}")
    checked = _checked(rows, task)
    if not KINDS[task.kind].may_repeat:
        _refuse_twins(checked)
    return limited(checked, task.limit), digest


def _checked(rows: list[Row], task: Task) -> list[Row]:
    return [Row(row.source, row.number, KINDS[task.kind].check_row(row, task)) for row in rows]


def limited(rows: list, limit: int | None) -> list:
    """At most `limit` rows, evenly spread: row ⌊i·n / limit⌋ for each i."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[i * len(rows) // limit] for i in range(limit)]


def digest_of(values: Any) -> str:
    return hashlib.sha256(_json(values).encode("utf-8", "surrogatepass")).hexdigest()


def _json(values: Any) -> str:
    return json.dumps(values, ensure_ascii=False, sort_keys=True, default=str)


def _object(name: str, number: int, value: Any) -> dict:
    if isinstance(value, BadRow):
        raise DataError(f"{name}, row {number}: {value}") from value
    if not isinstance(value, dict):
        raise DataError(f"{name}, row {number}: a row must be an object, got {type(value).__name__}")
    return {key: part for key, part in value.items() if part is not None}


def _renamed(row: Row, task: Task) -> Row:
    for ours, theirs in (task.columns or {}).items():
        if theirs not in row.values:
            raise row.error(f"missing field: `{theirs}` (`{ours}` of task {task.name})")
    others = {name: value for name, value in row.values.items() if name not in (task.columns or {}).values()}
    return Row(row.source, row.number, {**others, **{o: row.values[t] for o, t in (task.columns or {}).items()}})


def _refuse_twins(rows: list[Row]) -> None:
    seen: dict[str, Row] = {}
    for row in rows:
        first = seen.setdefault(_json(row.values), row)
        if first is not row:
            raise row.error(f"it repeats row {first.number} of {first.source}")
