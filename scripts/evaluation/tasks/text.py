"""Bits per byte of texts and answers."""

import math
import sys
from dataclasses import dataclass

from huggingface_hub.dataclasses import strict

from nanollada.scripts.evaluation.bench import Bench, Kind, Metric, Outcome, Row, Task, whole
from nanollada.scripts.evaluation.metrics import ratio
from nanollada.scripts.evaluation.tasks.scored import text_ids
from nanollada.trainers.data.sources import BadRow, parse_row

CONTEXT = 16  # tokens before an answer that is cut out of a text


@strict
@dataclass
class TextTask(Task):
    """Texts, packed into rows of `max_length` tokens or rolled over, or answers, one a row."""

    max_length: int = whole(2, 512)
    rolling_context: int | None = whole(1)
    eval_block_length: int | None = whole(0)


def check_text(row: Row, task: Task) -> dict:
    """Any row that training reads."""
    try:
        parse_row(row.values)
    except BadRow as error:
        raise row.error(str(error)) from error
    return row.values


def run_text(bench: Bench, task: Task, rows: list[Row]) -> Outcome:
    """
    Bits per byte and nats per token of texts or answers. `standard_error` is over the scored rows (the masks' noise
    in it), `mask_error` that of the masks alone.
    """
    scored, documents = token_rows(bench, task, rows)
    answers = "text" not in parse_row(rows[0].values)  # an answer is a row, texts are packed into others
    return score_token_rows(bench, task, scored, documents, rows if answers else None)


def score_token_rows(bench: Bench, task: Task, scored, documents: int, sources: list[Row] | None = None) -> Outcome:
    """
    As `run_text`, of rows that are tokenised.

    Args:
        bench, task: The model and the task.
        scored (`Sequence[dict]`): Rows for the collator.
        documents (`int`): How many texts or answers they hold.
        sources (`list[Row]`, *optional*): Of each row, if it has one of its own: an error names it.
    """
    from nanollada.trainers.data.collator import Collator
    from nanollada.trainers.scoring.likelihood import score_rows

    collate, size = Collator(bench.tokenizer.pad_token_id), bench.batch_size
    batches = (
        collate([scored[place] for place in range(start, min(start + size, len(scored)))])
        for start in range(0, len(scored), size)
    )
    records, estimators = [], set()
    for batch, nats, variance, estimator in score_rows(bench.model, batches, **bench.noise(task)):
        tokens = (batch["labels"] != -100).sum(-1)
        columns = (batch["index"], nats, variance, tokens, batch["num_bytes"])
        for values in zip(*(column.tolist() for column in columns), strict=True):
            records.append(dict(zip(("row", "nats", "variance", "tokens", "bytes"), values, strict=True)))
        estimators |= estimator
        bench.progress(len(nats))
    if not records:
        raise ValueError("`data` must hold at least one row to score, got none")
    records.sort(key=lambda record: record["row"])
    if odd := [record for record in records if not math.isfinite(record["nats"])]:
        reason, number = f"the model must give finite nats, got {odd[0]['nats']}", odd[0]["row"]
        if sources is not None:
            raise sources[number].error(reason)
        raise ValueError(f"{reason} in packed row {number}")
    nats, variance, tokens, num_bytes = (
        [record[name] for record in records] for name in ("nats", "variance", "tokens", "bytes")
    )
    masks = math.sqrt(math.fsum(variance))
    per_token = {**ratio(nats, tokens), "mask_error": masks / sum(tokens)}
    bits = [value / math.log(2) for value in nats]
    per_byte = {**ratio(bits, num_bytes), "mask_error": masks / math.log(2) / sum(num_bytes)}
    scope = {"bound": bench.is_diffusion, "rows": len(records), "documents": documents}
    scope |= {"tokens": sum(tokens), "bytes": sum(num_bytes)}
    results = [{"metric": "bits_per_byte", **per_byte, **scope}, {"metric": "nats_per_token", **per_token, **scope}]
    return Outcome(results, records, {"estimator": "; ".join(sorted(estimators))})


def token_rows(bench: Bench, task: Task, rows: list[Row]) -> tuple[list[dict], int]:
    """Rows to score, as training evaluates them (packed, or an answer a row) or rolling; and how many texts."""
    from nanollada.trainers.data.encoding import RowEncoder, answer_rows, pack_documents
    from nanollada.trainers.data.sources import Example, RowPolicy
    from nanollada.trainers.scoring.likelihood import scored_block_length

    length, context = task.max_length, task.rolling_context
    examples = [Example(row.source, row.number, **parse_row(row.values)) for row in rows]
    for row, example in zip(rows, examples, strict=True):
        if context is not None:
            refuse_answers(example)
        if example.format != examples[0].format:
            raise row.error(f"mixed formats: {example.format} in a task that the first row made {examples[0].format}")
    encoder = RowEncoder(bench.tokenizer, max_length=sys.maxsize)
    documents = [document for _, document in encoder.encode(examples, RowPolicy("stop"))]
    pad = bench.tokenizer.pad_token_id
    if context is not None:
        blocks = scored_block_length(bench.model, bench.noise(task)["block_length"])
        scored = rolled(documents, length, context, pad, blocks)
    elif examples[0].format == "sft":
        for row, document in zip(rows, documents, strict=True):
            if len(document["input_ids"]) > length:
                size = len(document["input_ids"])
                raise row.error(f"it must fit into `max_length` of task {task.name}, got {size} tokens and {length}")
        scored = sorted(answer_rows(documents), key=lambda row: -len(row["input_ids"]))
    else:
        scored = list(pack_documents(documents, length, pad, keep_partial=True))
    most, longest = bench.model.config.max_position_embeddings, max(scored, key=lambda row: len(row["input_ids"]))
    if examples[0].format == "sft":
        bench.require_room(rows[longest["index"]], len(longest["input_ids"]), "it")
    elif len(longest["input_ids"]) > most:
        rule = f"`max_length` of task {task.name} must fit into `max_position_embeddings`"
        raise ValueError(f"{rule}, got {length} and {most}")
    return scored, len(documents)


def refuse_answers(example) -> None:
    """Raises a ValueError for a row that is no plain text."""
    if example.format == "sft":
        raise ValueError(
            "`rolling_context` is for rows that are a plain `text`, got an answer in "
            f"{example.source}, row {example.row}"
        )


def rolled(documents: list[dict], max_length: int, context: int, pad_token_id: int, block_length: int | None) -> list:
    """Rows that roll over each of the encoded documents, the longest first (little padding)."""
    from nanollada.trainers.scoring.rolling import rolling_rows

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
    title="Text: bits per byte",
    task=TextTask,
    check_row=check_text,
    run=run_text,
    metrics={
        "bits_per_byte": Metric(
            "bits/byte",
            "nats of all scored tokens by UTF-8 bytes, in bits; ± over scored rows, in brackets of the masks alone.",
            digits=3,
            drawn=True,
        ),
        "nats_per_token": Metric(
            "nats/token", "nats of all scored tokens, ends of text included, by their number.", digits=3
        ),
    },
    steps=lambda task, rows: None,  # texts are packed first
    short=pieces,
    scored=True,
    may_repeat=True,
)
