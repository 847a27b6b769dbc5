"""From sources to training and evaluation rows, where a row needs no packing: split by content, counted, checked."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from nanollada.trainers.data.files import BadRow
from nanollada.trainers.data.prepare import PreparedData
from nanollada.trainers.data.sources import HeldOutArguments, RowPolicy, Source, refuse_idle, resolve_source

BATCH = 1000
# What a reader makes of a row: the content that decides between training and evaluation, and the columns.
Reader = Callable[[Any], tuple[Any, dict[str, Any]]]


def read_rows(
    args: HeldOutArguments,
    read: Reader,
    features=None,
    targets: Callable[[dict], int] = lambda row: 0,
) -> tuple[Any, Any, dict[str, Any]]:
    """
    Training rows, evaluation rows (`None` without any) and a report as of [`~trainers.data.prepare.PreparedData`].

    Args:
        args ([`~trainers.data.sources.HeldOutArguments`]): The sources.
        read (`Callable`): See `Reader`; raises [`~trainers.data.files.BadRow`].
        features (`datasets.Features`, *optional*): Of the columns, without `index`; by default what they hold.
        targets (`Callable`): How many tokens of a row are learnt from.

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
    report = {**_counts(args.data or []), "eval": {**_counts(args.eval_data or held_out or []), "unused_documents": 0}}
    sides = _split(args, sources, read, report)
    policy = RowPolicy(args.on_bad_rows, report["eval"]["skipped_rows"])
    sides[1] += [row for source in eval_sources for _, row in _read(source, policy, read)]
    for side, counts in zip(sides, (report, report["eval"]), strict=True):
        counts["documents"] = counts["rows"] = len(side)
        counts["target_tokens"] = sum(map(targets, side))
    if sources and not sides[0]:
        raise ValueError(f"`data` must hold rows to train on, got none that can be used in {args.data}")
    if (held_out or eval_sources) and not sides[1]:
        raise ValueError(
            "nothing to evaluate on: raise `held_out_fraction` (0 turns evaluation off) or name rows in `eval_data`, "
            f"got {args.held_out_fraction} of {len(sides[0])} rows and {args.eval_data}"
        )
    train, evaluation = (_dataset(side, features) if side else None for side in sides)
    return train, evaluation, report


def prepared(format: str, args: HeldOutArguments, max_length: int | None, *read) -> PreparedData:
    """[`read_rows`] as the trainers know prepared data."""
    train, evaluation, report = read_rows(args, *read)
    return PreparedData(train, evaluation, format, {"format": format, "max_length": max_length, **report})


def _counts(sources: list[str]) -> dict[str, Any]:
    return {"sources": sources, "documents": 0, "rows": 0, "target_tokens": 0, "skipped_rows": Counter()}


def _read(source: Source, policy: RowPolicy, read: Reader) -> Iterator[tuple[Any, dict[str, Any]]]:
    for name, number, value in source.raw_rows():
        try:
            yield read(value)
        except BadRow as error:
            policy.reject(name, number, error)
        except ValueError as error:
            raise ValueError(f"{name}, row {number}: {error}") from error


def _split(args: HeldOutArguments, sources: list[Source], read: Reader, report: dict) -> list[list[dict]]:
    """Training rows and held-out ones, at most the same number of each source."""
    policy = RowPolicy(args.on_bad_rows, report["skipped_rows"])
    fraction = 0.0 if args.eval_data else args.held_out_fraction
    share = math.ceil(args.max_held_out_documents / max(1, len(sources)))
    sides: list[list[dict]] = [[], []]
    for source in sources:
        left = share
        for content, row in _read(source, policy, read):
            side = _position(content) < fraction
            if side and not left:
                report["eval"]["unused_documents"] += 1
                continue
            left -= side
            sides[side].append(row)
    return sides


def _position(content) -> float:
    """A number in [0, 1) made from the content alone, as [`~trainers.data.formats.Example.position`]."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) * 2.0**-53


def _dataset(rows: Iterable[dict[str, Any]], features):
    """Rows with their `index`, in batches: lists of Python's integers are large."""
    import datasets

    rows, parts = iter(enumerate(rows)), []
    if features is not None:
        features = datasets.Features({**features, "index": datasets.Value("int64")})
    while batch := [{**row, "index": index} for index, row in islice(rows, BATCH if features else None)]:
        parts.append(datasets.Dataset.from_list(batch, features=features))
    return datasets.concatenate_datasets(parts)
