"""Multiple choice by likelihood."""

import math
import re

from nanollada.scripts.evaluation.bench import Bench, Kind, Metric, Outcome, Row, Task, settings, whole
from nanollada.scripts.evaluation.metrics import decisions
from nanollada.scripts.evaluation.tasks.scored import answer_pairs, score


@settings
class ChoiceTask(Task):
    """A context and choices; `suffix` goes behind the context, `delimiter` before a choice."""

    delimiter: str | None = None
    suffix: str = ""
    eval_block_length: int | None = whole(0)


def check_choice(row: Row, task: Task) -> dict:
    """`ctx`, `choices` and `label`; also `choices` as `{"text", "label"}` and a label's name or digits (ARC)."""
    context, choices, label = row.text("ctx"), row.values.get("choices"), row.values.get("label")
    if isinstance(choices, dict) and {"text", "label"} <= set(choices):
        names, choices = choices["label"], choices["text"]
        if not (isinstance(names, list) and isinstance(choices, list) and len(names) == len(choices)):
            raise row.error(f"`choices` must have a label for each text, got {names!r} and {choices!r}")
        names = [str(name) for name in names]
        if str(label) in names:
            label = names.index(str(label))
        elif any(name.isdecimal() for name in names):  # is it a place, or a name that is not there?
            raise row.error(f"`label` must be among the labels {', '.join(names)} of `choices`, got {label!r}")
    if not isinstance(choices, list) or len(choices) < 2:
        raise row.error(f"`choices` must be a list of two or more, got {choices!r}")
    choices = [row.string(f"choices[{i}]", choice) for i, choice in enumerate(choices)]
    if len(set(choices)) < len(choices):
        raise row.error(f"`choices` must differ, got {choices!r}")
    label = int(label) if isinstance(label, str) and re.fullmatch(r"[0-9]{1,3}", label) else label
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(choices):
        raise row.error(f"`label` must be from 0 to {len(choices) - 1}, got {label!r}")
    return {"ctx": context, "choices": choices, "label": label}


def choice_pairs(bench: Bench, task: Task, rows: list[Row], sizes: range | None = None) -> list:
    """(context, choice) as token ids, every choice of every row."""
    return answer_pairs(bench, task, rows, "choices", task.suffix)


SIZES = {
    "acc": lambda choice: 1.0,
    "acc_norm": lambda choice: float(len(choice)),
    "acc_bytes": lambda choice: float(len(choice.encode())),
}


def run_choice(bench: Bench, task: Task, rows: list[Row]) -> Outcome:
    """
    Accuracy of the likeliest choice: by summed nats (`acc`), by nats per character (`acc_norm`) and by nats per UTF-8
    byte (`acc_bytes`) of the choice without its delimiter; lm-eval's three.
    """
    counts = [len(row.values["choices"]) for row in rows]
    owners = [row for row, count in zip(rows, counts, strict=True) for _ in range(count)]
    scores = score(bench, task, choice_pairs(bench, task, rows), owners)
    columns = {name: iter(getattr(scores, name).tolist()) for name in ("nats", "variance", "tokens")}
    records = [
        {"source_row": row.number, "label": row.values["label"]}
        | {name: [next(values) for _ in range(count)] for name, values in columns.items()}
        for row, count in zip(rows, counts, strict=True)
    ]
    chance = math.fsum(1 / count for count in counts) / len(rows)
    results = []
    for metric, size in SIZES.items():
        lengths = [[size(choice) for choice in row.values["choices"]] for row in rows]
        nats = [_over(record["nats"], by, 1) for record, by in zip(records, lengths, strict=True)]
        noise = [_over(record["variance"], by, 2) for record, by in zip(records, lengths, strict=True)]
        for record, values in zip(records, nats, strict=True):
            record[f"chosen_{metric}"] = values.index(min(values))
        labels = [record["label"] for record in records]
        results.append({"metric": metric, "chance": chance, **decisions(nats, noise, labels)})
    return Outcome(results, records, {"estimator": scores.estimator})


def _over(values: list[float], lengths: list[float], power: int) -> list[float]:
    return [value / length**power for value, length in zip(values, lengths, strict=True)]


KIND = Kind(
    "Multiple choice",
    task=ChoiceTask,
    check_row=check_choice,
    run=run_choice,
    metrics={
        "acc": Metric("share of rows whose right choice has the least nats, or the least bound (lm-eval's acc)."),
        "acc_norm": Metric("the same by nats per character of the choice (lm-eval's acc_norm)."),
        "acc_bytes": Metric("the same by nats per UTF-8 byte of the choice (lm-eval's acc_bytes).", drawn=False),
    },
    steps=lambda task, rows: sum(len(row.values["choices"]) for row in rows),
    short=choice_pairs,
    scored=True,
)
