"""Prepared rows on the disk: built once, found again in the cache of `datasets`."""

import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nanollada.trainers.data.collator import ROW_COLUMNS
from nanollada.trainers.data.sources import RowPolicy, Source

logger = logging.getLogger(__name__)

ROWS_VERSION = 1  # Of what this folder makes of given data: raise it with every change of a row, a split or a report.


def stored_rows(plan) -> tuple:
    """
    Training rows, evaluation rows (or `None`) and report of a plan: from the cache, or built; in memory without one.

    Raises as [`~trainers.data.prepare.prepare_data`]; a build that fails leaves nothing.
    """
    import datasets

    if not datasets.is_caching_enabled():
        with tempfile.TemporaryDirectory() as folder:
            build(plan, Path(folder))
            return _load(Path(folder), in_memory=True)
    root = Path(datasets.config.HF_DATASETS_CACHE) / "nanollada"
    folder = root / key(plan)
    if (folder / "report.json").exists():
        logger.info("rows from cache: %s", folder)
        return _load(folder)
    root.mkdir(parents=True, exist_ok=True)
    building = root / f"building-{uuid.uuid4().hex}"
    building.mkdir()
    try:
        build(plan, building)
        if not folder.exists():  # another process may have been faster, with the same rows
            os.replace(building, folder)
    except OSError:
        if not (folder / "report.json").exists():
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return _load(folder)


def key(plan) -> str:
    """Whatever the rows depend on: contents of the files, tokenizer, arguments, versions, `ROWS_VERSION`."""
    backend = json.loads(plan.tokenizer.backend_tokenizer.to_str())
    backend = {name: part for name, part in backend.items() if name not in ("truncation", "padding")}
    parts = {
        "args": dataclasses.asdict(plan.args),
        "sources": [source.identity() for source in [*plan.sources, *plan.eval_sources]],
        "tokenizer": [backend, plan.tokenizer.chat_template, plan.tokenizer.special_tokens_map],
        "padding": dataclasses.asdict(plan.padding),
        "seed": plan.seed if plan.args.data_weights else None,
        "versions": [importlib.metadata.version(name) for name in ("transformers", "tokenizers", "datasets", "trl")],
        "rows_version": ROWS_VERSION,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def build(plan, folder: Path) -> None:
    """Writes `train.arrow`, `eval.arrow` and `report.json`, by way of one file of documents per source."""
    plan.find_format()
    with tempfile.TemporaryDirectory(dir=folder) as documents:
        train, held_out = _write_documents(plan, Path(documents))
        if train:
            rows = plan.rows(_bar(plan.combined(train)), plan.report, training=True)
            _write(folder / "train.arrow", row_features(), rows)
        if held_out:
            rows = plan.rows(itertools.chain(*held_out), plan.report["eval"], training=False)
            _write(folder / "eval.arrow", row_features(), rows)
    plan.check_filled()
    (folder / "report.json").write_text(json.dumps(plan.report))


def _write_documents(plan, folder: Path) -> tuple[list, list]:
    policy = RowPolicy(plan.args.on_bad_rows, plan.report["skipped_rows"])
    sides = [_write_sides(plan, folder, number, source, policy) for number, source in enumerate(plan.sources)]
    train, held_out = [side[0] for side in sides], [side[1] for side in sides]
    eval_policy = RowPolicy(plan.args.on_bad_rows, plan.report["eval"]["skipped_rows"])
    for number, source in enumerate(plan.eval_sources):
        documents = plan.documents(source, eval_policy, lambda example: True)
        documents = (counted(document, plan.report["eval"]) for _, document in documents)
        held_out.append(_write(folder / f"eval-{number}.arrow", document_features(plan.format), _bar(documents)))
    return train, held_out if plan.fraction or plan.eval_sources else []


def _write_sides(plan, folder: Path, number: int, source: Source, policy: RowPolicy) -> list:
    """One pass over a source, for both of its sides."""
    import datasets

    left = plan.share
    features = document_features(plan.format)
    paths = [str(folder / f"{side}-{number}.arrow") for side in ("train", "held-out")]
    writers = [datasets.arrow_writer.ArrowWriter(path=path, features=features) for path in paths]
    for example, document in _bar(plan.documents(source, policy, lambda example: True), source.spec):
        side = plan.is_held_out(example)
        if side and not left:
            plan.report["eval"]["unused_documents"] += 1
            continue
        left -= side
        writers[side].write(counted(document, plan.report["eval"] if side else plan.report))
    for writer in writers:
        writer.finalize()
    sides = [datasets.Dataset.from_file(path) for path in paths]
    if not len(sides[0]):
        raise ValueError(f"`data` must hold rows to train on, got none that can be used in {source.spec}")
    return sides


def _load(folder: Path, in_memory: bool = False) -> tuple:
    import datasets

    sides = []
    for name in ("train", "eval"):
        path = folder / f"{name}.arrow"
        sides.append(datasets.Dataset.from_file(str(path), in_memory=in_memory) if path.exists() else None)
    report = json.loads((folder / "report.json").read_text())
    if report["skipped_rows"]:
        logger.warning("skipped %d broken rows: %s", sum(report["skipped_rows"].values()), report["skipped_rows"])
    return *sides, report


def counted(document: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """A document that is in the report from now on."""
    report["documents"] += 1
    report["truncated_rows"] += document.get("truncated", False)
    return document


def document_features(format: str):
    """The columns of tokenized documents of a format, "pretrain" or "sft"."""
    from datasets import Features, List, Value

    features = {"input_ids": List(Value("int32")), "num_bytes": Value("int64")}
    if format == "sft":
        features |= {"labels": List(Value("int32")), "truncated": Value("bool")}
    return Features(features)


def row_features():
    """The columns of rows."""
    from datasets import Features, List, Value

    numbers = {"num_bytes": Value("int64"), "index": Value("int64")}
    return Features({**{name: List(Value("int32")) for name in ROW_COLUMNS}, **numbers})


def _write(path: Path, features, items: Iterable[dict[str, Any]]):
    import datasets

    writer = datasets.arrow_writer.ArrowWriter(path=str(path), features=features)
    for item in items:
        writer.write(item)
    writer.finalize()
    return datasets.Dataset.from_file(str(path))


def _bar(items: Iterable, source: str = "") -> Iterable:
    from datasets.utils import tqdm

    # On a terminal alone, and only where there is something to wait for.
    return tqdm(items, desc=f"Reading {source}" if source else "Rows", unit=" rows", disable=None, delay=1)
