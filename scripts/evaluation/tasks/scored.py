"""What the kinds share that score an answer given its context.

AR and diffusion take the same rows through the same functions of `trainers/scoring/likelihood.py`; the model's class
decides between exact nats and an upper bound.
"""

import math

from nanollada.scripts.evaluation.bench import Bench, Row, Task


def score(bench: Bench, task: Task, pairs: list, rows: list[Row]):
    """Scores of pairs, of which `rows` are the owners, one each; all finite."""
    from nanollada.trainers.scoring.continuations import score_continuations

    options = {"batch_size": bench.batch_size, "progress": bench.progress, **bench.noise(task)}
    scores = score_continuations(bench.model, pairs, pad_token_id=bench.tokenizer.pad_token_id, **options)
    for row, nats in zip(rows, scores.nats.tolist(), strict=True):
        if not math.isfinite(nats):  # the least of several would be any
            raise row.error(f"the model must give finite nats, got {nats}")
    return scores


def answer_pairs(
    bench: Bench, task: Task, rows: list[Row], answers: str, suffix: str = ""
) -> list[tuple[list[int], list[int]]]:
    """(context, answer) as token ids, for every text in the rows' column `answers`, row by row."""
    from nanollada.trainers.scoring.continuations import encode_pair

    pairs = []
    for row in rows:
        texts, gap = row.values[answers], row.values.get("gap", delimiter_of(task))
        for text in [texts] if isinstance(texts, str) else texts:
            with row.faults():
                pairs.append(encode_pair(bench.tokenizer, row.values["ctx"] + suffix, gap + text))
            require_room(bench, row, pairs[-1])
    return pairs


def require_room(bench: Bench, row: Row, pair: tuple[list[int], list[int]]) -> None:
    """Raises a `DataError` for a pair that is longer than the model's positions."""
    bench.require_room(row, len(pair[0]) + len(pair[1]), "context and answer")


def text_ids(bench: Bench, row: Row, text: str) -> list[int]:
    """`context_ids`, whose errors here name the row."""
    from nanollada.trainers.scoring.continuations import context_ids

    with row.faults():
        return context_ids(bench.tokenizer, text)


def delimiter_of(task: Task) -> str:
    """What stands between context and answer: lm-eval's space, nothing in Chinese."""
    return task.delimiter if task.delimiter is not None else "" if task.language == "zh" else " "
