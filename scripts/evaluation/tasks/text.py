"""Bits per byte of texts and answers."""

import math
import sys
from collections.abc import Iterable, Iterator

from nanollada.scripts.evaluation.bench import Bench, Kind, Metric, Outcome, Row, Task, settings, whole
from nanollada.scripts.evaluation.tasks.scored import text_ids
from nanollada.trainers.data.encoding import RowEncoder
from nanollada.trainers.data.files import DataError
from nanollada.trainers.data.formats import Example, parse_row
from nanollada.trainers.data.packing import answer_rows, pack_documents
from nanollada.trainers.data.sources import RowPolicy
from nanollada.trainers.scoring.estimates import ratio
from nanollada.trainers.scoring.rolling import rolling_rows

CONTEXT = 16  # tokens before an answer that is cut out of a text


@settings
class TextTask(Task):
    """Texts, packed into rows of `max_length` tokens or rolled over, or answers, one a row."""

    max_length: int = whole(2, 512)
    rolling_context: int | None = whole(1)
    eval_block_length: int | None = whole(0)


def check_text(row: Row, task: Task) -> dict:
    """Any row that training reads."""
    with row.faults():
        parse_row(row.values)
    return row.values


def run_text(bench: Bench, task: Task, rows: list[Row]) -> Outcome:
    """
    Bits per byte and nats per token of texts or answers. `standard_error` is over the scored rows (the masks' noise
    in it), `mask_error` that of the masks alone.
    """
    return score_text(bench, task, (Example(row.source, row.number, **parse_row(row.values)) for row in rows))


def score_text(bench: Bench, task: Task, examples: Iterable[Example], skipped: RowPolicy | None = None) -> Outcome:
    """
    As `run_text`, of rows of the data room.

    Args:
        bench, task: The model and the task.
        examples (`Iterable[Example]`): Texts, or answers.
        skipped (`RowPolicy`, *optional*): What is done with rows that cannot be encoded; with one, answers that are
            longer than `max_length` are cut, and both are counted. By default either is an error.

    Raises:
        `ValueError`: for no rows, rows without positions, and nats that are not finite; `DataError` names the row.
    """
    from nanollada.trainers.data.collator import Collator
    from nanollada.trainers.scoring.likelihood import score_rows

    scored, owners, counts = token_rows(bench, task, examples, skipped)
    collate, size = Collator(bench.tokenizer.pad_token_id), bench.batch_size
    batches = (collate(scored[start : start + size]) for start in range(0, len(scored), size))
    records, estimators = [], set()
    for batch, nats, variance, estimator in score_rows(bench.model, batches, **bench.noise(task)):
        tokens = (batch["labels"] != -100).sum(-1)
        columns = (batch["index"], nats, variance, tokens, batch["num_bytes"])
        for values in zip(*(column.tolist() for column in columns), strict=True):
            records.append(dict(zip(("row", "nats", "variance", "tokens", "bytes"), values, strict=True)))
        estimators |= estimator
        bench.progress(len(nats))
    records.sort(key=lambda record: record["row"])
    if odd := [record for record in records if not math.isfinite(record["nats"])]:
        reason, number = f"the model must give finite nats, got {odd[0]['nats']}", odd[0]["row"]
        if owners is not None:
            raise _error(owners[number], reason)
        raise ValueError(f"{reason} in packed row {number}")
    nats, variance, tokens, num_bytes = (
        [record[name] for record in records] for name in ("nats", "variance", "tokens", "bytes")
    )
    masks = math.sqrt(math.fsum(variance))
    bits = [value / math.log(2) for value in nats]
    per_byte = {**ratio(bits, num_bytes), "mask_error": masks / math.log(2) / sum(num_bytes)}
    per_token = {**ratio(nats, tokens), "mask_error": masks / sum(tokens)}
    scope = {"bound": bench.is_diffusion, "rows": len(records), "tokens": sum(tokens), "bytes": sum(num_bytes)}
    results = [
        {"metric": metric, **figure, **scope, **counts}
        for metric, figure in (("bits_per_byte", per_byte), ("nats_per_token", per_token))
    ]
    return Outcome(results, records, {"estimator": "; ".join(sorted(estimators))})


def token_rows(
    bench: Bench, task: Task, examples: Iterable[Example], skipped: RowPolicy | None
) -> tuple[list[dict], list[Example] | None, dict]:
    """
    Rows to score, as training evaluates them (packed, or an answer a row) or rolling; whose each is, if it has one
    owner; and how many texts there are, and how many were cut and skipped.
    """
    from nanollada.trainers.scoring.likelihood import scored_block_length

    length, pad = task.max_length, bench.tokenizer.pad_token_id
    cut = length if skipped is not None and task.rolling_context is None else sys.maxsize
    encoder = RowEncoder(bench.tokenizer, max_length=cut)
    pairs = list(encoder.encode(_alike(task, examples), skipped or RowPolicy("stop")))
    if not pairs:
        raise ValueError("`data` must hold at least one row to score, got none")
    used, documents = (list(column) for column in zip(*pairs, strict=True))
    owners = used if used[0].format == "sft" else None
    counts = {"documents": len(documents)}
    if task.rolling_context is not None:
        blocks = scored_block_length(bench.model, bench.noise(task)["block_length"])
        scored = rolled(documents, length, task.rolling_context, pad, blocks)
    elif owners:
        for example, document in zip(owners, documents, strict=True):
            if (size := len(document["input_ids"])) > length:
                rule = f"it must fit into `max_length` of task {task.name}"
                raise _error(example, f"{rule}, got {size} tokens and {length}")
        counts["truncated_rows"] = sum(document["truncated"] for document in documents)
        scored = sorted(answer_rows(documents), key=lambda row: -len(row["input_ids"]))
    else:
        scored = list(pack_documents(documents, length, pad, keep_partial=True))
    most, longest = bench.model.config.max_position_embeddings, max(scored, key=lambda row: len(row["input_ids"]))
    if (size := len(longest["input_ids"])) > most and owners:
        raise _error(
            owners[longest["index"]], f"it must fit into `max_position_embeddings`, got {size} tokens and {most}"
        )
    if size > most:
        rule = f"`max_length` of task {task.name} must fit into `max_position_embeddings`"
        raise ValueError(f"{rule}, got {length} and {most}")
    counts["skipped_rows"] = dict(skipped.counts) if skipped else {}
    return scored, owners, {name: count for name, count in counts.items() if count}


def _alike(task: Task, examples: Iterable[Example]) -> Iterator[Example]:
    """The examples, all of one format, and texts where they are to be rolled over."""
    first = None
    for example in examples:
        first = first or example.format
        if task.rolling_context is not None and example.format == "sft":
            place = f"{example.source}, row {example.row}"
            raise ValueError(f"`rolling_context` is for rows that are a plain `text`, got an answer in {place}")
        if example.format != first:
            raise _error(example, f"mixed formats: {example.format} in a task that the first row made {first}")
        yield example


def _error(example: Example, reason: str) -> DataError:
    return DataError(f"{example.source}, row {example.row}: {reason}")


def rolled(documents: list[dict], max_length: int, context: int, pad_token_id: int, block_length: int | None) -> list:
    """Rows that roll over each of the encoded documents, the longest first (little padding)."""
    rows = []
    for document in documents:
        place = {"num_bytes": document["num_bytes"], "index": len(rows), "block_length": block_length}
        rows += rolling_rows(document["input_ids"], max_length, context, pad_token_id, **place)
    return sorted(rows, key=lambda row: -len(row["input_ids"]))


def pieces(bench: Bench, task: Task, rows: list[Row], sizes: range) -> list[tuple[list[int], list[int]]]:
    """Pieces of the texts, of every size in turn, with 16 tokens before each."""
    pairs = []
    for row in rows:
        ids = text_ids(bench, row, row.values.get("text", ""))
        for number, start in enumerate(range(0, len(ids) - CONTEXT - sizes[-1], CONTEXT)):
            cut = start + CONTEXT
            pairs.append((ids[start:cut], ids[cut : cut + sizes[number % len(sizes)]]))
    return pairs


KIND = Kind(
    "Text: bits per byte",
    task=TextTask,
    check_row=check_text,
    run=run_text,
    metrics={
        "bits_per_byte": Metric(
            "nats of all scored tokens by UTF-8 bytes, in bits; ± over scored rows, in brackets of the masks alone.",
            "bits/byte",
        ),
        "nats_per_token": Metric(
            "nats of all scored tokens, ends of text included, by their number.", "nats/token", drawn=False
        ),
    },
    steps=lambda task, rows: None,  # texts are packed first
    short=pieces,
    scored=True,
    may_repeat=True,
)
