"""Cloze: nats of an answer given its context, and whether greedy decoding writes it."""

import math
import re

from nanollada.scripts.decoding.settings import default_decoding, effective_settings
from nanollada.scripts.evaluation.answers import greedy_answers, until_end
from nanollada.scripts.evaluation.bench import Bench, Kind, Metric, Outcome, Row, Task, settings, whole
from nanollada.scripts.evaluation.tasks.scored import answer_pairs, score
from nanollada.trainers.scoring.estimates import mean, share


@settings
class ClozeTask(Task):
    """A context and its one answer, `delimiter` between them."""

    delimiter: str | None = None
    eval_block_length: int | None = whole(0)


def check_cloze(row: Row, task: Task) -> dict:
    """
    `ctx` (or `context`) and `answer`; or LAMBADA's own `text`, whose last word is the answer, and whose own `gap`
    before it stands in the delimiter's place.
    """
    if "answer" not in row.values and "text" in row.values:
        parts = re.fullmatch(r"(.*\S)(\s+)(\S+)", row.text("text").strip(), re.S)
        if parts is None:
            raise row.error("`text` must have two words or more to ask for the last one")
        if task.delimiter is not None:
            raise row.error(f"`delimiter` of task {task.name} must be left out for a `text`, which has its own")
        return {"ctx": parts[1], "gap": parts[2], "answer": parts[3]}
    return {"ctx": row.text("ctx" if "ctx" in row.values else "context"), "answer": row.text("answer")}


def cloze_pairs(bench: Bench, task: Task, rows: list[Row], sizes: range | None = None) -> list:
    """(context, answer) as token ids."""
    return answer_pairs(bench, task, rows, "answer")


def run_cloze(bench: Bench, task: Task, rows: list[Row]) -> Outcome:
    """
    Nats of the answer given its context, and how often the greedy tokens in its place are the answer's own. Both kinds
    of model write exactly as many tokens as the answer has; a diffusion model so learns its length from the canvas
    (its surest position first, one token a step), an AR model does not.
    """
    pairs = cloze_pairs(bench, task, rows)
    scores = score(bench, task, pairs, rows)
    said = greedy_answers(bench.model, pairs, bench.tokenizer.pad_token_id, bench.batch_size)
    said = [until_end(bench.model, ids)[0] for ids in said]
    columns = zip(rows, scores.nats.tolist(), scores.variance.tolist(), pairs, said, strict=True)
    records = [
        {"source_row": row.number, "nats": nats, "variance": variance, "tokens": len(answer)}
        | {"said": bench.tokenizer.decode(ids), "right": ids == answer}
        for row, nats, variance, (_, answer), ids in columns
    ]
    with default_decoding(bench.model):
        generate = effective_settings(bench.model, temperature=0.0)
    del generate["max_new_tokens"]  # the lengths are the answers'
    nats = mean([record["nats"] for record in records])
    nats["mask_error"] = math.sqrt(math.fsum(record["variance"] for record in records)) / len(records)
    results = [
        {"metric": "nats_per_answer", "bound": scores.bound, **nats},
        {"metric": "greedy_match", "generate": generate, **share([record["right"] for record in records])},
    ]
    return Outcome(results, records, {"estimator": scores.estimator})


KIND = Kind(
    "Cloze",
    task=ClozeTask,
    check_row=check_cloze,
    run=run_cloze,
    metrics={
        "nats_per_answer": Metric(
            "nats of the answer given its context, mean over rows; in brackets the masks' error.", "nats/answer"
        ),
        "greedy_match": Metric(
            "share of answers whose tokens are the greedy ones; diffusion sees how many there are."
        ),
    },
    short=cloze_pairs,
    scored=True,
)
