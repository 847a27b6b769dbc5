"""The data room: sources in, training and evaluation rows out; [`Collator`] makes batches of them."""

import copy
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import shutil
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nanollada.trainers.data.collator import ROW_COLUMNS
from nanollada.trainers.data.encoding import RowEncoder
from nanollada.trainers.data.files import DataError
from nanollada.trainers.data.formats import Example
from nanollada.trainers.data.keyed import RowStream
from nanollada.trainers.data.packing import EosPadding, answer_rows, count_targets, pack_documents
from nanollada.trainers.data.sources import (
    RowPolicy,
    Source,
    SourceArguments,
    read_examples,
    refuse_idle,
    resolve_source,
)

logger = logging.getLogger(__name__)

ROWS_VERSION = 1  # Of what this folder makes of given data: raise it with every change of a row, a split or a report.


@dataclass
class DataArguments(SourceArguments):
    """Which rows are trained and evaluated on. Their format decides between pretraining (texts) and SFT (answers)."""

    data_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "One weight per source: documents are drawn from the sources in these proportions until every "
            "source has been read once (small ones repeat). Without weights every document comes once, in order."
        },
    )
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
    max_length: int = field(default=512, metadata={"help": "Tokens of a row."})
    assistant_turns: Literal["all", "last"] = field(
        default="all",
        metadata={"help": "Which answers of a chat are targets. 'last': the row ends with it, nothing later is seen."},
    )

    def __post_init__(self):
        super().__post_init__()
        self.eval_data = [self.eval_data] if isinstance(self.eval_data, str) else self.eval_data
        if self.max_length < 2:
            raise ValueError(f"`max_length` must be at least 2, got {self.max_length}")
        if not 0 <= self.held_out_fraction < 1:
            raise ValueError(f"`held_out_fraction` must be in [0, 1), got {self.held_out_fraction}")
        if self.max_held_out_documents < 1:
            raise ValueError(f"`max_held_out_documents` must be at least 1, got {self.max_held_out_documents}")
        if self.assistant_turns not in ("all", "last"):
            raise ValueError(f"`assistant_turns` must be 'all' or 'last', got {self.assistant_turns!r}")
        if self.data_weights is not None:
            if len(self.data_weights) != len(self.data or []):
                raise ValueError(
                    f"`data_weights` must hold one weight per source of `data`, got {len(self.data_weights)} weights "
                    f"for {len(self.data or [])} sources"
                )
            if not all(0 < weight < math.inf for weight in self.data_weights):
                raise ValueError(f"`data_weights` must be positive, got {self.data_weights}")


@dataclass
class PreparedData:
    """
    What [`prepare_data`] returns.

    Attributes:
        train (`datasets.Dataset` or `RowStream`, *optional*): Training rows; `None` without `data`.
        eval (`datasets.Dataset`, *optional*): Evaluation rows; `None` without any.
        format (`str`): "pretrain" or "sft".
        report (`dict`): Plain numbers for `run.json`: `sources`, `format`, `max_length`; of training `documents`
            (source rows used), `rows`, `target_tokens`, `bytes`, `dropped_tokens` (targets in the last, partial row),
            `truncated_rows`; `skipped_rows` (reason → count); and `eval`, the same of the evaluation rows, with
            `unused_documents` (held out, beyond the limit). The counts of a stream grow while it is read, over all
            passes; a trainer sets them to what its optimizer steps have read.
    """

    train: Any
    eval: Any
    format: str
    report: dict[str, Any]


def prepare_data(
    args: DataArguments,
    tokenizer,
    eos_padding: Literal["none", "block", "max_length"] = "none",
    block_length: int | None = None,
    seed: int = 42,
) -> PreparedData:
    """
    Reads, checks, splits, tokenizes and packs the data of a run.

    Rows have `input_ids`, `labels` (−100 = never a target; not shifted), `document_ids`, `position_ids`, `index`, and
    `num_bytes`: UTF-8 bytes of the text whose tokens are the row's targets (a packed document's are shared among its
    rows by tokens).
    Pretraining documents are packed, see [`~trainers.data.packing.pack_documents`]; SFT gives one row per source row,
    which ends with its last target.

    Prepared rows are kept in the cache of `datasets` under a key made from the contents of the files, the tokenizer
    and every argument; nothing is written beside the data. `datasets.disable_caching()` is respected.

    Args:
        args (`DataArguments`): The sources and their treatment.
        tokenizer (`PreTrainedTokenizerFast`): With pad and eos tokens. Text with its mask token is a broken row.
        eos_padding (`str`, *optional*, defaults to `"none"`): EOS targets behind the SFT answers of training rows, see
            [`~trainers.data.packing.EosPadding`]. Evaluation rows have none: every model is scored on the same tokens.
        block_length (`int`, *optional*): For `eos_padding="block"`.
        seed (`int`, *optional*, defaults to 42): Of the draws from weighted sources.

    Raises:
        DataError: At a broken row (with `on_bad_rows="stop"`), or where pretraining and SFT rows meet.
        ValueError: If arguments contradict each other, or nothing is left to train or evaluate on.
    """
    plan = _Plan(args, tokenizer, eos_padding, block_length, seed)
    return plan.stream() if args.streaming else plan.prepared()


class _Plan:
    """One call of [`prepare_data`]: its checked arguments, and the report that grows while rows are made."""

    def __init__(self, args: DataArguments, tokenizer, eos_padding: str, block_length: int | None, seed: int):
        if not args.data and not args.eval_data:
            raise ValueError("`data` or `eval_data` must name at least one source, got none")
        if not tokenizer.is_fast or tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
            raise ValueError(
                "`tokenizer` must be a fast tokenizer with pad and eos tokens, got "
                f"is_fast={tokenizer.is_fast}, pad_token={tokenizer.pad_token}, eos_token={tokenizer.eos_token}"
            )
        self.args, self.tokenizer, self.seed = args, tokenizer, seed
        self.padding = EosPadding(eos_padding, tokenizer.eos_token_id, args.max_length, block_length)
        self.encoder = RowEncoder(tokenizer, args.max_length, args.assistant_turns)
        eval_args = dataclasses.replace(args, data_split=args.eval_split or args.data_split, streaming=False)
        self.sources = [resolve_source(spec, args) for spec in args.data or []]
        self.eval_sources = [resolve_source(spec, eval_args) for spec in args.eval_data or []]
        refuse_idle([*self.sources, *self.eval_sources])
        self.fraction = 0.0 if args.eval_data else args.held_out_fraction
        self.share = math.ceil(args.max_held_out_documents / max(1, len(self.sources)))
        self.format = ""
        self.report = _empty_report(args)

    def __deepcopy__(self, memo):
        return self  # a stream copies its arguments; the report must stay the caller's

    # ---- documents

    def find_format(self) -> None:
        """The first good row decides."""
        source = (self.sources or self.eval_sources)[0]
        examples = read_examples(source, RowPolicy(self.args.on_bad_rows, quiet=True))
        first = next(examples, None)
        if first is None:
            raise ValueError(f"`data` must hold rows, got none that can be used in {source.spec}")
        self.format = self.report["format"] = first.format

    def documents(
        self, source: Source, policy: RowPolicy, keep: Callable[[Example], bool]
    ) -> Iterator[tuple[Example, dict[str, Any]]]:
        """The kept examples of a source with their tokens."""
        return self.encoder.encode((ex for ex in self._alike(read_examples(source, policy)) if keep(ex)), policy)

    def _alike(self, examples: Iterable[Example]) -> Iterator[Example]:
        for example in examples:
            if example.format != self.format:
                raise DataError(
                    f"{example.source}, row {example.row}: mixed formats: a row for {example.format} in a run "
                    f"that the first row made {self.format}"
                )
            yield example

    def is_held_out(self, example: Example) -> bool:
        return example.position < self.fraction

    def combined(self, parts: list):
        """One sequence of documents from one per source."""
        import datasets

        if self.args.data_weights is None:
            return datasets.concatenate_datasets(parts)
        total = sum(self.args.data_weights)
        probabilities = [weight / total for weight in self.args.data_weights]
        return datasets.interleave_datasets(parts, probabilities, seed=self.seed, stopping_strategy="all_exhausted")

    def rows(self, documents: Iterable[dict[str, Any]], report: dict, training: bool) -> Iterator[dict[str, Any]]:
        """Rows from documents, counted in the report."""
        if self.format == "sft":
            made = answer_rows(documents, self.padding if training else None)
        else:
            made = pack_documents(documents, self.args.max_length, self.tokenizer.pad_token_id, not training)
        for row in made:
            if row["index"] < 0:
                report["dropped_tokens"] += count_targets(row)
                continue
            report["rows"] += 1
            report["target_tokens"] += count_targets(row)
            report["bytes"] += row["num_bytes"]
            yield row

    # ---- prepared data

    def prepared(self) -> PreparedData:
        import datasets

        if not datasets.is_caching_enabled():
            with tempfile.TemporaryDirectory() as folder:
                self.build(Path(folder))
                return self.load(Path(folder), in_memory=True)
        root = Path(datasets.config.HF_DATASETS_CACHE) / "nanollada"
        folder = root / self.key()
        if (folder / "report.json").exists():
            logger.info("rows from cache: %s", folder)
            return self.load(folder)
        root.mkdir(parents=True, exist_ok=True)
        building = root / f"building-{uuid.uuid4().hex}"
        building.mkdir()
        try:
            self.build(building)
            if not folder.exists():  # another process may have been faster, with the same rows
                os.replace(building, folder)
        except OSError:
            if not (folder / "report.json").exists():
                raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
        return self.load(folder)

    def key(self) -> str:
        """Whatever the rows depend on: contents of the files, tokenizer, arguments, versions, `ROWS_VERSION`."""
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
        backend = {name: part for name, part in backend.items() if name not in ("truncation", "padding")}
        parts = {
            "args": dataclasses.asdict(self.args),
            "sources": [source.identity() for source in [*self.sources, *self.eval_sources]],
            "tokenizer": [backend, self.tokenizer.chat_template, self.tokenizer.special_tokens_map],
            "padding": dataclasses.asdict(self.padding),
            "seed": self.seed if self.args.data_weights else None,
            "versions": [
                importlib.metadata.version(name) for name in ("transformers", "tokenizers", "datasets", "trl")
            ],
            "rows_version": ROWS_VERSION,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def build(self, folder: Path) -> None:
        """Writes `train.arrow`, `eval.arrow` and `report.json`, by way of one file of documents per source."""
        self.find_format()
        with tempfile.TemporaryDirectory(dir=folder) as documents:
            train, held_out = self._write_documents(Path(documents))
            if train:
                _write_rows(folder / "train.arrow", self.rows(_bar(self.combined(train)), self.report, training=True))
            if held_out:
                report = self.report["eval"]
                made = self.rows((document for part in held_out for document in part), report, training=False)
                _write_rows(folder / "eval.arrow", made)
        self.check_filled()
        (folder / "report.json").write_text(json.dumps(self.report))

    def _write_documents(self, folder: Path) -> tuple[list, list]:
        policy = RowPolicy(self.args.on_bad_rows, self.report["skipped_rows"])
        train, held_out = [], []
        for number, source in enumerate(self.sources):
            sides = self._write_sides(folder, number, source, policy)
            train.append(sides[0])
            held_out.append(sides[1])
        eval_policy = RowPolicy(self.args.on_bad_rows, self.report["eval"]["skipped_rows"])
        for number, source in enumerate(self.eval_sources):
            made = self.documents(source, eval_policy, lambda example: True)
            made = (_counted(document, self.report["eval"]) for _, document in made)
            held_out.append(_write(folder / f"eval-{number}.arrow", _document_features(self.format), _bar(made)))
        return train, held_out if self.fraction or self.eval_sources else []

    def _write_sides(self, folder: Path, number: int, source: Source, policy: RowPolicy) -> list:
        """One pass over a source, for both of its sides."""
        import datasets

        left = self.share
        features = _document_features(self.format)
        paths = [str(folder / f"{side}-{number}.arrow") for side in ("train", "held-out")]
        writers = [datasets.arrow_writer.ArrowWriter(path=path, features=features) for path in paths]
        for example, document in _bar(self.documents(source, policy, lambda example: True), source.spec):
            side = self.is_held_out(example)
            if side and not left:
                self.report["eval"]["unused_documents"] += 1
                continue
            left -= side
            writers[side].write(_counted(document, self.report["eval"] if side else self.report))
        for writer in writers:
            writer.finalize()
        sides = [datasets.Dataset.from_file(path) for path in paths]
        if not len(sides[0]):
            raise ValueError(f"`data` must hold rows to train on, got none that can be used in {source.spec}")
        return sides

    def check_filled(self) -> None:
        report = self.report
        if self.sources and not report["rows"]:
            raise ValueError(
                f"`max_length` must be small enough to fill one row, got {self.args.max_length} for "
                f"{report['dropped_tokens']} training tokens"
            )
        if (self.fraction or self.eval_sources) and not report["eval"]["rows"]:
            raise ValueError(
                "nothing to evaluate on: raise `held_out_fraction` (0 turns evaluation off) or name rows in "
                f"`eval_data`, got {self.fraction} of {report['documents']} documents and {self.args.eval_data}"
            )

    def load(self, folder: Path, in_memory: bool = False) -> PreparedData:
        import datasets

        sides = []
        for name in ("train", "eval"):
            path = folder / f"{name}.arrow"
            sides.append(datasets.Dataset.from_file(str(path), in_memory=in_memory) if path.exists() else None)
        report = json.loads((folder / "report.json").read_text())
        if report["skipped_rows"]:
            logger.warning("skipped %d broken rows: %s", sum(report["skipped_rows"].values()), report["skipped_rows"])
        return PreparedData(*sides, report["format"], report)

    # ---- streams

    def stream(self) -> PreparedData:
        import datasets

        self.find_format()
        train = held_out = None
        if self.sources:
            train = RowStream(functools.partial(_stream_rows, self), self.report)
        if self.fraction or self.eval_sources:
            held_out = datasets.Dataset.from_list(list(self._eval_rows()), features=_row_features())
            if not len(held_out):
                raise ValueError(f"nothing to evaluate on in {[source.spec for source in self.sources]}")
        return PreparedData(train, held_out, self.format, self.report)

    def _eval_rows(self) -> Iterator[dict[str, Any]]:
        """Read before training begins, from a stream until its share is full."""
        report = self.report["eval"]
        policy = RowPolicy(self.args.on_bad_rows, report["skipped_rows"])
        documents = []
        for source in self.eval_sources:
            documents += [document for _, document in self.documents(source, policy, lambda example: True)]
        unseen = RowPolicy(self.args.on_bad_rows, quiet=True)  # training meets and counts these broken rows
        for source in self.sources if self.fraction else []:
            made = self.documents(source, unseen, self.is_held_out)
            documents += [document for _, (_, document) in zip(range(self.share), made, strict=False)]
        return self.rows((_counted(document, report) for document in documents), report, training=False)


def _stream_rows(plan: _Plan, report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    import datasets

    plan = copy.copy(plan)
    plan.report = report
    parts = [
        datasets.IterableDataset.from_generator(
            _stream_documents, _document_features(plan.format), gen_kwargs={"plan": plan, "number": number}
        )
        for number in range(len(plan.sources))
    ]
    yield from plan.rows(plan.combined(parts), plan.report, training=True)


def _stream_documents(plan: _Plan, number: int) -> Iterator[dict[str, Any]]:
    policy = RowPolicy(plan.args.on_bad_rows, plan.report["skipped_rows"])
    made = plan.documents(plan.sources[number], policy, lambda example: not plan.is_held_out(example))
    empty = True
    for _, document in made:
        empty = False
        yield _counted(document, plan.report)
    if empty:
        raise ValueError(
            f"`data` must hold rows to train on, got none that can be used in {plan.sources[number].spec}"
        )


def _empty_report(args: DataArguments) -> dict[str, Any]:
    def counts(sources: list[str], *names: str) -> dict[str, Any]:
        zeros = dict.fromkeys(("documents", "rows", "target_tokens", "bytes", "truncated_rows", *names), 0)
        return {"sources": sources, **zeros, "skipped_rows": Counter()}

    report = {"format": "", "max_length": args.max_length, **counts(args.data or [], "dropped_tokens")}
    held_out = args.data if args.held_out_fraction else None
    return {**report, "eval": counts(args.eval_data or held_out or [], "unused_documents")}


def _counted(document: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    report["documents"] += 1
    report["truncated_rows"] += document.get("truncated", False)
    return document


def _document_features(format: str):
    from datasets import Features, List, Value

    features = {"input_ids": List(Value("int32")), "num_bytes": Value("int64")}
    if format == "sft":
        features |= {"labels": List(Value("int32")), "truncated": Value("bool")}
    return Features(features)


def _row_features():
    from datasets import Features, List, Value

    numbers = {"num_bytes": Value("int64"), "index": Value("int64")}
    return Features({**{name: List(Value("int32")) for name in ROW_COLUMNS}, **numbers})


def _write_rows(path: Path, made: Iterable[dict[str, Any]]) -> None:
    _write(path, _row_features(), made)


def _write(path: Path, features, made: Iterable[dict[str, Any]]):
    import datasets

    writer = datasets.arrow_writer.ArrowWriter(path=str(path), features=features)
    for row in made:
        writer.write(row)
    writer.finalize()
    return datasets.Dataset.from_file(str(path))


def _bar(items: Iterable, source: str = "") -> Iterable:
    from datasets.utils import tqdm

    return tqdm(items, desc=f"Reading {source}" if source else "Rows", unit=" rows")
