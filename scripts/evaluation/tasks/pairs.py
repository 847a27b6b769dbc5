"""Minimal pairs: which of two texts is the likelier one."""

from nanollada.scripts.evaluation.bench import Bench, Kind, Metric, Outcome, Row, Task, settings, whole
from nanollada.scripts.evaluation.metrics import decisions
from nanollada.scripts.evaluation.tasks.scored import require_room, score, text_ids
from nanollada.trainers.scoring.estimates import share


@settings
class PairsTask(Task):
    """A good and a bad text."""

    eval_block_length: int | None = whole(0)


def check_pairs(row: Row, task: Task) -> dict:
    """`good`, `bad`, and whose they are: `task`, `group`."""
    good, bad = row.text("good"), row.text("bad")
    if good == bad:
        raise row.error(f"`good` and `bad` must differ, got {good!r} for both")
    return {"good": good, "bad": bad, **{name: row.text(name) for name in ("task", "group") if name in row.values}}


def text_pairs(bench: Bench, task: Task, rows: list[Row], sizes: range | None = None) -> list:
    """(`<|endoftext|>`, text) as token ids, the good and the bad text of every row."""
    pairs = []
    for row in rows:
        for name in ("good", "bad"):
            start, *ids = text_ids(bench, row, row.values[name])
            pairs.append(([start], ids))
            require_room(bench, row, pairs[-1])
    return pairs


def run_pairs(bench: Bench, task: Task, rows: list[Row]) -> Outcome:
    """
    How often the good text of a pair is the likelier one, each scored whole from `<|endoftext|>`, without its end;
    overall and by group. Both texts of a pair get the same random numbers for their masks, so that `open_share` and
    `mask_error`, which take them for independent, are on the safe side.
    """
    pairs = text_pairs(bench, task, rows)
    good, bad = score(bench, task, pairs[::2], rows), score(bench, task, pairs[1::2], rows)
    scores = list(zip(good.nats.tolist(), bad.nats.tolist(), strict=True))
    noise = list(zip(good.variance.tolist(), bad.variance.tolist(), strict=True))
    records, groups = [], {}
    for place, (row, nats, variance) in enumerate(zip(rows, scores, noise, strict=True)):
        named = {name: row.values[name] for name in ("task", "group") if name in row.values}
        columns = {"nats": list(nats), "variance": list(variance), "right": nats[0] < nats[1]}
        records.append({"source_row": row.number, **named, **columns})
        groups.setdefault(row.values.get("group"), []).append(place)

    def result(places: list[int], **named) -> dict:
        figures = decisions([scores[i] for i in places], [noise[i] for i in places], [0] * len(places))
        # A tie is no preference: `decisions` takes the first of equal ones, which is the good text.
        figures |= share([records[i]["right"] for i in places])
        return {"metric": "accuracy", "chance": 0.5, **figures, **named}

    results = [result(list(range(len(rows))))]
    named = [group for group in groups if group is not None]
    results += [result(groups[group], metric=f"accuracy/{group}", group=group) for group in named]
    return Outcome(results, records, {"estimator": "; ".join(sorted({good.estimator, bad.estimator}))})


KIND = Kind(
    "Minimal pairs",
    task=PairsTask,
    check_row=check_pairs,
    run=run_pairs,
    metrics={"accuracy": Metric("share of pairs whose good text has fewer nats.")},
    steps=lambda task, rows: 2 * len(rows),
    short=text_pairs,
    scored=True,
)
