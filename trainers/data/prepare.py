"""The data room: sources in, training and evaluation rows out; [`Collator`] makes batches of them."""

import copy
import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nanollada.trainers.data.encoding import RowEncoder
from nanollada.trainers.data.files import BadRow, DataError
from nanollada.trainers.data.formats import Example
from nanollada.trainers.data.keyed import RowStream
from nanollada.trainers.data.packing import (
    IGNORE,
    EosPadding,
    answer_rows,
    count_targets,
    pack_documents,
    tokenized_row,
)
from nanollada.trainers.data.sources import (
    HeldOutArguments,
    RowPolicy,
    Source,
    SourceArguments,
    read_examples,
    refuse_idle,
    resolve_source,
)
from nanollada.trainers.data.stored import counted, document_features, row_features, stored_rows


@dataclass
class DataArguments(HeldOutArguments, SourceArguments):
    """Which rows are trained and evaluated on. Their format decides between pretraining (texts) and SFT (answers)."""

    data_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "One weight per source: documents are drawn from the sources in these proportions until every "
            "source has been read once (small ones repeat). Without weights every document comes once, in order."
        },
    )
    max_length: int = field(default=512, metadata={"help": "Tokens of a row."})
    assistant_turns: Literal["all", "last"] = field(
        default="all",
        metadata={"help": "Which answers of a chat are targets. 'last': the row ends with it, nothing later is seen."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.max_length < 2:
            raise ValueError(f"`max_length` must be at least 2, got {self.max_length}")
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


# What of [`DataArguments`] says where rows come from, and nothing of how they are made.
OF_SOURCES = ("data", "data_config", "data_split", "sample_by", "data_weights", "eval_data", "eval_split")
OF_SOURCES += ("held_out_fraction", "max_held_out_documents")


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
    given: Mapping[str, Any] | None = None,
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
        given (`Mapping[str, Dataset]`, *optional*): Datasets by the names that `data` and `eval_data` call them.

    Raises:
        DataError: At a broken row (with `on_bad_rows="stop"`), or where pretraining and SFT rows meet.
        ValueError: If arguments contradict each other, or nothing is left to train or evaluate on.
    """
    plan = _Plan(args, tokenizer, eos_padding, block_length, seed, given)
    if args.streaming:
        return plan.stream()
    train, held_out, report = stored_rows(plan)
    return PreparedData(train, held_out, report["format"], report)


def prepare_datasets(
    train, evaluation, args: DataArguments | None, tokenizer, formatting_func: Callable | None = None, **settings
) -> PreparedData:
    """
    [`prepare_data`] of datasets that a caller has: of texts, chats or prompts with completions, as in files; or of
    rows with `input_ids`, taken as they are, see [`~trainers.data.packing.tokenized_row`]. Nothing is held out.

    Args:
        train (`datasets.Dataset` or `datasets.IterableDataset`): Or rows of `prepare_data`, map-style or a stream.
        evaluation (`datasets.Dataset`, *optional*): Or such rows.
        args (`DataArguments`, *optional*): How rows are made of text. What names sources in it must be left out.
        tokenizer (`PreTrainedTokenizerFast`, *optional*): Not needed for rows of `prepare_data`.
        formatting_func (`Callable`, *optional*): Makes a text of a row.
        settings: Those of `prepare_data`.

    Raises:
        DataError: As `prepare_data`, and at a broken row of `input_ids`.
        ValueError: For what is no such dataset, for sources in `args`, and for `args` without a row that they make.
    """
    given = {"train_dataset": train, "eval_dataset": evaluation}
    given = {name: checked_dataset(dataset, name) for name, dataset in given.items() if dataset is not None}
    if formatting_func is not None:
        given = {name: formatted(dataset, name, formatting_func) for name, dataset in given.items()}
    raw = {name: dataset for name, dataset in given.items() if not is_tokenized(dataset)}
    if args is not None and not raw:
        changed = {item.name: getattr(args, item.name) for item in dataclasses.fields(args)}
        changed = {name: value for name, value in changed.items() if value != getattr(DataArguments(), name)}
        got = ", ".join(f"{name}={value!r}" for name, value in changed.items())
        raise ValueError(f"`data_args` make rows of text: they must be left out for rows with `input_ids`, got {got}")
    defaults = DataArguments()
    args = defaults if args is None else args
    for name in OF_SOURCES:
        if getattr(args, name) != getattr(defaults, name):
            raise ValueError(
                f"`{name}` is for sources: it must be left out beside datasets, got {getattr(args, name)!r}"
            )
    rows = PreparedData(None, None, "", {})
    if raw:
        streaming = args.streaming or not hasattr(raw.get("train_dataset", ()), "__len__")
        names = {"data": "train_dataset", "eval_data": "eval_dataset"}
        sources = {name: [spec] if spec in raw else None for name, spec in names.items()}
        args = dataclasses.replace(args, **sources, streaming=streaming, held_out_fraction=0.0)
        rows = prepare_data(args, tokenizer, given=raw, **settings)
    if "eval_dataset" in given and "eval_dataset" not in raw:
        rows.eval = tokenized_rows(given["eval_dataset"], "eval_dataset", tokenizer)
    if "train_dataset" in given and "train_dataset" not in raw:
        rows.train = tokenized_rows(train, "train_dataset", tokenizer)
    return rows


def without_sources(args: DataArguments) -> DataArguments:
    """How rows are made, without where they come from."""
    defaults = DataArguments()
    return dataclasses.replace(args, streaming=False, **{name: getattr(defaults, name) for name in OF_SOURCES})


def checked_dataset(dataset, name: str):
    """
    Raises:
        ValueError: Naming what is a dictionary of splits, a name, or a list of texts; and a stream to evaluate.
    """
    rows = dataset if isinstance(dataset, list | tuple) else ()
    if isinstance(dataset, dict | str) or any("input_ids" not in row for row in rows):
        kind = f"{type(dataset).__name__} {sorted(dataset)}" if isinstance(dataset, dict) else type(dataset).__name__
        raise ValueError(f"`{name}` must be one `datasets.Dataset` (or rows with `input_ids`), got a {kind}")
    if name == "eval_dataset" and not hasattr(dataset, "__len__"):
        raise ValueError(f"`{name}` must have a length: it is read anew at each evaluation, got a stream")
    return dataset


def is_tokenized(dataset) -> bool:
    """Whether rows have `input_ids`; what is no dataset of `datasets` has none to be made of."""
    return not _is_dataset(dataset) or "input_ids" in _columns(dataset)


def formatted(dataset, name: str, function: Callable):
    """The texts that a function makes of a dataset's rows."""
    if is_tokenized(dataset):
        raise ValueError(f"`formatting_func` makes texts: `{name}` must have no `input_ids`, got {dataset}")
    return dataset.map(_format, fn_kwargs={"function": function}, remove_columns=_columns(dataset))


def _format(row: dict, function: Callable) -> dict:
    return {"text": function(row)}


def tokenized_rows(dataset, name: str, tokenizer):
    """Rows of `input_ids` with all columns that training needs; those that have them stay as they are."""
    if not _is_dataset(dataset) or {*row_features()} <= {*_columns(dataset)}:
        return dataset
    kwargs = {"name": name, "tokenizer": tokenizer}
    dataset = dataset.with_format(None) if hasattr(dataset, "__len__") else dataset
    columns = {"remove_columns": _columns(dataset), "features": row_features()}
    return dataset.map(_tokenized, with_indices=True, fn_kwargs=kwargs, **columns)


def _tokenized(row: dict, index: int, name: str, tokenizer) -> dict:
    try:
        return tokenized_row(row, index, tokenizer)
    except BadRow as error:
        raise DataError(f"{name}, row {index + 1}: {error}") from error


def format_of(rows) -> str:
    """ "pretrain" if in the first all but documents' first tokens are targets, else "sft"; "" of streams."""
    if isinstance(rows, RowStream) or not hasattr(rows, "__len__"):
        return getattr(rows, "report", {}).get("format", "")
    row = next(iter(rows))
    context = [int(place) == 0 for place in row["position_ids"]]
    return "pretrain" if context == [int(label) == IGNORE for label in row["labels"]] else "sft"


def needs_tokenizer(*given) -> bool:
    """Whether one of these datasets has rows that are not made yet."""
    return any(_is_dataset(dataset) and not {*row_features()} <= {*_columns(dataset)} for dataset in given)


def _is_dataset(dataset) -> bool:
    import datasets

    return isinstance(dataset, datasets.Dataset | datasets.IterableDataset)


def _columns(dataset) -> list[str]:
    return list(next(iter(dataset), ())) if dataset.column_names is None else dataset.column_names


class _Plan:
    """One call of [`prepare_data`]: its checked arguments, and the report that grows while rows are made."""

    def __init__(self, args: DataArguments, tokenizer, eos_padding: str, block_length: int | None, seed: int, given):
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
        self.sources = [resolve_source(spec, args, given) for spec in args.data or []]
        self.eval_sources = [resolve_source(spec, eval_args, given, "eval_data") for spec in args.eval_data or []]
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
            rows = answer_rows(documents, self.padding if training else None)
        else:
            rows = pack_documents(documents, self.args.max_length, self.tokenizer.pad_token_id, not training)
        for row in rows:
            if row["index"] < 0:
                report["dropped_tokens"] += count_targets(row)
                continue
            report["rows"] += 1
            report["target_tokens"] += count_targets(row)
            report["bytes"] += row["num_bytes"]
            yield row

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

    # ---- streams

    def stream(self) -> PreparedData:
        import datasets

        self.find_format()
        train = held_out = None
        if self.sources:
            given = [source.dataset for source in self.sources if hasattr(source.dataset, "set_epoch")]
            train = RowStream(functools.partial(_stream_rows, self), self.report, given)
        if self.fraction or self.eval_sources:
            held_out = datasets.Dataset.from_list(list(self._eval_rows()), features=row_features())
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
            kept = self.documents(source, unseen, self.is_held_out)
            documents += [document for _, (_, document) in zip(range(self.share), kept, strict=False)]
        return self.rows((counted(document, report) for document in documents), report, training=False)


def _stream_rows(plan: _Plan, report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    import datasets

    plan = copy.copy(plan)
    plan.report = report
    parts = [
        datasets.IterableDataset.from_generator(
            _stream_documents, document_features(plan.format), gen_kwargs={"plan": plan, "number": number}
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
        yield counted(document, plan.report)
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
