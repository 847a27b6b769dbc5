"""From sources to training and evaluation rows, where a row needs no packing: split by content, counted, checked."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanollada.trainers.data.files import BadRow
from nanollada.trainers.data.prepare import PreparedData
from nanollada.trainers.data.sources import HeldOutArguments, RowPolicy, Source, refuse_idle, resolve_source
from nanollada.trainers.records import file_digest

BATCH = 1000
# What a reader makes of a row: the content that decides between training and evaluation, and the columns.
Reader = Callable[[Any], tuple[Any, dict[str, Any]]]


def read_rows(
    args: HeldOutArguments,
    read: Reader,
    features=None,
    targets: Callable[[dict], int] | None = None,
) -> tuple[Any, Any, dict[str, Any]]:
    """
    Training rows, evaluation rows (`None` without any) and a report as of [`~trainers.data.prepare.PreparedData`].

    Args:
        args ([`~trainers.data.sources.HeldOutArguments`]): The sources.
        read (`Callable`): See `Reader`; raises [`~trainers.data.files.BadRow`].
        features (`datasets.Features`, *optional*): Of the columns, without `index`; by default what they hold.
        targets (`Callable`, *optional*): How many tokens of a row are learnt from, where rows say so.

    Raises:
        DataError: At a broken row, unless `on_bad_rows="skip"`.
        ValueError: For no sources, and if nothing is left to train or evaluate on.
    """
    if not args.data and not args.eval_data:
        raise ValueError("`data` or `eval_data` must name at least one source, got none")
    eval_args = replace(args, data_split=args.eval_split or args.data_split)
    sources = [resolve_source(spec, args) for spec in args.data or []]
    eval_sources = [resolve_source(spec, eval_args, argument="eval_data") for spec in args.eval_data or []]
    refuse_idle([*sources, *eval_sources])
    held_out = args.data if args.held_out_fraction and not args.eval_data else []
    train, evaluation = _Side(args.data or [], features, targets), _Side(args.eval_data or held_out, features, targets)
    unused = _split(args, sources, read, train, evaluation)
    policy = RowPolicy(args.on_bad_rows, evaluation.skipped)
    for _, row in (pair for source in eval_sources for pair in _read(source, policy, read)):
        evaluation.add(row)
    if sources and not train.count:
        raise ValueError(f"`data` must hold rows to train on, got none that can be used in {args.data}")
    if (held_out or eval_sources) and not evaluation.count:
        raise ValueError(
            "nothing to evaluate on: raise `held_out_fraction` (0 turns evaluation off) or name rows in `eval_data`, "
            f"got {args.held_out_fraction} of {train.count} rows and {args.eval_data}"
        )
    report = {**train.report(sources), "eval": {**evaluation.report(eval_sources), "unused_documents": unused}}
    return train.dataset(), evaluation.dataset(), report


def prepared(format: str, args: HeldOutArguments, max_length: int | None, *read) -> PreparedData:
    """[`read_rows`] as the trainers know prepared data."""
    train, evaluation, report = read_rows(args, *read)
    length = {} if max_length is None else {"max_length": max_length}
    return PreparedData(train, evaluation, format, {"format": format, **length, **report})


class _Side:
    """Rows for training or for evaluation while they are read, in batches: lists of Python's integers are large."""

    def __init__(self, specs: list[str], features, targets: Callable[[dict], int] | None):
        self.specs, self.features, self.targets = specs, features, targets
        self.skipped: Counter = Counter()
        self.count = self.target_tokens = 0
        self._batch: list[dict[str, Any]] = []
        self._parts: list = []

    def add(self, row: dict[str, Any]) -> None:
        self._batch.append({**row, "index": self.count})
        self.count += 1
        if self.targets is not None:
            self.target_tokens += self.targets(row)
        if self.features is not None and len(self._batch) == BATCH:
            self._store()

    def _store(self) -> None:
        import datasets

        features = self.features and datasets.Features({**self.features, "index": datasets.Value("int64")})
        if features is None:
            self._batch = _even(self._batch)
        self._parts.append(datasets.Dataset.from_list(self._batch, features=features))
        self._batch = []

    def dataset(self):
        """The rows with their `index`; `None` without any."""
        import datasets

        if self._batch:
            self._store()
        return datasets.concatenate_datasets(self._parts) if self._parts else None

    def report(self, sources: list[Source]) -> dict[str, Any]:
        """What `run.json` says of them."""
        return {
            "sources": self.specs,
            "digests": {Path(file).name: file_digest(file) for source in sources for file in source.files},
            "documents": self.count,
            "rows": self.count,
            **({} if self.targets is None else {"target_tokens": self.target_tokens}),
            "skipped_rows": self.skipped,
        }


def _read(source: Source, policy: RowPolicy, read: Reader) -> Iterator[tuple[Any, dict[str, Any]]]:
    for name, number, value in source.raw_rows():
        try:
            yield read(value)
        except BadRow as error:
            policy.reject(name, number, error)
        except ValueError as error:
            raise ValueError(f"{name}, row {number}: {error}") from error


def _split(args: HeldOutArguments, sources: list[Source], read: Reader, train: _Side, evaluation: _Side) -> int:
    """Puts rows on their sides, on the held-out one as many of each source at most; how many are left over."""
    policy = RowPolicy(args.on_bad_rows, train.skipped)
    fraction, unused = 0.0 if args.eval_data else args.held_out_fraction, 0
    share = math.ceil(args.max_held_out_documents / max(1, len(sources)))
    for source in sources:
        left = share
        for content, row in _read(source, policy, read):
            if _position(content) >= fraction:
                train.add(row)
            elif left:
                left -= 1
                evaluation.add(row)
            else:
                unused += 1
    return unused


def _position(content) -> float:
    """A number in [0, 1) made from the content alone, as [`~trainers.data.formats.Example.position`]."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) * 2.0**-53


def _even(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that all have the same columns, null where one has none; a column of a table holds one type."""
    kinds: dict[str, set[str]] = {}
    for name, value in ((name, value) for row in rows for name, value in row.items()):
        kinds.setdefault(name, set()).add(type(value).__name__)
    if mixed := [name for name, types in kinds.items() if len(types) > 1]:
        raise ValueError(
            f"column `{mixed[0]}` must hold one type in all rows, got {', '.join(sorted(kinds[mixed[0]]))}"
        )
    return [{name: row.get(name) for name in kinds} for row in rows]
