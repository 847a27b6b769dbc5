"""The tasks of a suite that score what is written: bits per byte, multiple choice, cloze, minimal pairs.

AR and diffusion take the same rows through the same functions of `trainers/scoring/likelihood.py`; the model's class
decides between exact nats and an upper bound.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nanollada.scripts.evaluation.metrics import decisions, mean, ratio, share
from nanollada.scripts.evaluation.rows import Row, Task


@dataclass
class Bench:
    """
    A model under test, and how it is tested.

    Attributes:
        model, tokenizer: Of `load_checkpoint`.
        samples (`int`): Monte Carlo masks per scored text of a diffusion model, even.
        seed (`int`): Of the masks, and of whatever is drawn.
        batch_size (`int`): Rows per forward.
        judge (`tuple`, *optional*): A causal model and its tokenizer.
        progress (`Callable[[int], None]`): Is told how many rows were done.
    """

    model: Any
    tokenizer: Any
    samples: int = 128
    seed: int = 0
    batch_size: int = 16
    judge: tuple | None = None
    progress: Callable[[int], Any] = field(default=lambda count: None)

    @property
    def is_diffusion(self) -> bool:
        from nanollada.trainers.scoring.likelihood import is_causal

        return not is_causal(self.model)

    def noise(self, task: Task) -> dict:
        """What `score_rows` and `score_continuations` get for the masks."""
        block_length = task.options["eval_block_length"] if self.is_diffusion else None  # AR has none
        return {"samples": self.samples, "seed": self.seed, "block_length": block_length}

    def require_room(self, row: Row, tokens: int, what: str) -> None:
        """Raises a `DataError` for what is longer than the model's positions; nothing is cut."""
        most = self.model.config.max_position_embeddings
        if tokens > most:
            raise row.error(f"{what} must fit into `max_position_embeddings`, got {tokens} tokens and {most}")


@dataclass
class Outcome:
    """The figures of a task, a record of each row, and the settings that decided them beside the task's own."""

    results: list[dict]
    records: list[dict]
    settings: dict = field(default_factory=dict)


# ---- bits per byte


def run_text(bench: Bench, task: Task, rows: list[Row]) -> Outcome:
    """
    Bits per byte and nats per token of texts or answers. `standard_error` is over the scored rows (the masks' noise
    in it), `mask_error` that of the masks alone.
    """
    from nanollada.trainers.data.prepare import Collator
    from nanollada.trainers.data.sources import parse_row
    from nanollada.trainers.scoring.likelihood import score_rows

    scored, documents = _token_rows(bench, task, rows)
    collate, size = Collator(bench.tokenizer.pad_token_id), bench.batch_size
    batches = (collate(scored[start : start + size]) for start in range(0, len(scored), size))
    records, estimators = [], set()
    for batch, nats, variance, how in score_rows(bench.model, batches, **bench.noise(task)):
        tokens = (batch["labels"] != -100).sum(-1)
        columns = (batch["index"], nats, variance, tokens, batch["num_bytes"])
        for values in zip(*(column.tolist() for column in columns), strict=True):
            records.append(dict(zip(("row", "nats", "variance", "tokens", "bytes"), values, strict=True)))
        estimators |= how
        bench.progress(len(nats))
    records.sort(key=lambda record: record["row"])
    if odd := [record for record in records if not math.isfinite(record["nats"])]:
        reason, number = f"the model must give finite nats, got {odd[0]['nats']}", odd[0]["row"]
        if "text" not in parse_row(rows[0].values):  # an answer is a row, texts are packed into others
            raise rows[number].error(reason)
        raise ValueError(f"{reason} in packed row {number}")
    nats, variance, tokens, num_bytes = (
        [record[name] for record in records] for name in ("nats", "variance", "tokens", "bytes")
    )
    masks = math.sqrt(math.fsum(variance))
    per_token = {**ratio(nats, tokens), "mask_error": masks / sum(tokens)}
    bits = [value / math.log(2) for value in nats]
    per_byte = {**ratio(bits, num_bytes), "mask_error": masks / math.log(2) / sum(num_bytes)}
    facts = {"bound": bench.is_diffusion, "rows": len(records)}
    facts |= {"documents": documents, "tokens": sum(tokens), "bytes": sum(num_bytes)}
    results = [
        {"metric": "bits_per_byte", "unit": "bits/byte", **per_byte, **facts},
        {"metric": "nats_per_token", "unit": "nats/token", **per_token, **facts},
    ]
    return Outcome(results, records, {"estimator": "; ".join(sorted(estimators))})


def _token_rows(bench: Bench, task: Task, rows: list[Row]) -> tuple[list[dict], int]:
    """Rows to score, as training evaluates them (packed, or an answer a row) or rolling; and how many texts."""
    from nanollada.scripts.evaluation.checkpoint import refuse_answers, rolled
    from nanollada.trainers.data.encoding import RowEncoder, answer_rows, pack_documents
    from nanollada.trainers.data.sources import Example, RowPolicy, parse_row
    from nanollada.trainers.scoring.likelihood import scored_block_length

    length, context = task.options["max_length"], task.options["rolling_context"]
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
        made = rolled(
            documents, length, context, pad, scored_block_length(bench.model, bench.noise(task)["block_length"])
        )
    elif examples[0].format == "sft":
        for row, document in zip(rows, documents, strict=True):
            if len(document["input_ids"]) > length:
                size = len(document["input_ids"])
                raise row.error(f"it must fit into `max_length` of task {task.name}, got {size} tokens and {length}")
        made = sorted(answer_rows(documents), key=lambda row: -len(row["input_ids"]))
    else:
        made = list(pack_documents(documents, length, pad, keep_partial=True))
    most, longest = bench.model.config.max_position_embeddings, max(made, key=lambda row: len(row["input_ids"]))
    if examples[0].format == "sft":
        bench.require_room(rows[longest["index"]], len(longest["input_ids"]), "it")
    elif len(longest["input_ids"]) > most:
        rule = f"`max_length` of task {task.name} must fit into `max_position_embeddings`"
        raise ValueError(f"{rule}, got {length} and {most}")
    return made, len(documents)


# ---- given a context


def _score(bench: Bench, task: Task, pairs: list, rows: list[Row]):
    """Scores of pairs, of which `rows` are the owners, one each; all finite."""
    from nanollada.trainers.scoring.continuations import score_continuations

    options = {"batch_size": bench.batch_size, "progress": bench.progress, **bench.noise(task)}
    found = score_continuations(bench.model, pairs, pad_token_id=bench.tokenizer.pad_token_id, **options)
    for row, nats in zip(rows, found.nats.tolist(), strict=True):
        if not math.isfinite(nats):  # the least of several would be any
            raise row.error(f"the model must give finite nats, got {nats}")
    return found


def _encoded(bench: Bench, row: Row, context: str, continuation: str) -> tuple[list[int], list[int]]:
    from nanollada.trainers.scoring.continuations import encode_pair

    try:
        pair = encode_pair(bench.tokenizer, context, continuation)
    except ValueError as error:
        raise row.error(str(error)) from error
    _check_room(bench, row, pair)
    return pair


def text_ids(bench: Bench, row: Row, text: str) -> list[int]:
    """`context_ids`, whose errors here name the row."""
    from nanollada.trainers.scoring.continuations import context_ids

    try:
        return context_ids(bench.tokenizer, text)
    except ValueError as error:
        raise row.error(str(error)) from error


def _check_room(bench: Bench, row: Row, pair: tuple[list[int], list[int]]) -> None:
    bench.require_room(row, len(pair[0]) + len(pair[1]), "context and answer")


def delimiter_of(task: Task) -> str:
    """What stands between context and answer: lm-eval's space, nothing in Chinese."""
    given = task.options["delimiter"]
    return given if given is not None else "" if task.language == "zh" else " "


def encoded_pairs(bench: Bench, task: Task, rows: list[Row]) -> list[tuple[list[int], list[int]]]:
    """(context, continuation) as token ids, row by row: every choice, or the answer, or the good and the bad text."""
    pairs, gap = [], delimiter_of(task) if "delimiter" in task.options else ""
    for row in rows:
        values = row.values
        if task.kind == "pairs":
            for text in (values["good"], values["bad"]):
                start, *ids = text_ids(bench, row, text)
                pairs.append(([start], ids))
                _check_room(bench, row, pairs[-1])
        else:
            context = values["ctx"] + task.options.get("suffix", "")
            answers = values["choices"] if task.kind == "choice" else [values["answer"]]
            pairs += [_encoded(bench, row, context, values.get("gap", gap) + answer) for answer in answers]
    return pairs


def run_choice(bench: Bench, task: Task, rows: list[Row]) -> Outcome:
    """
    Accuracy of the likeliest choice: by summed nats (`acc`), by nats per character (`acc_norm`) and by nats per UTF-8
    byte (`acc_bytes`) of the choice without its delimiter; lm-eval's three.
    """
    pairs = encoded_pairs(bench, task, rows)
    found = _score(bench, task, pairs, [row for row in rows for _ in row.values["choices"]])
    nats, variance, tokens = found.nats.tolist(), found.variance.tolist(), found.tokens.tolist()
    labels = [row.values["label"] for row in rows]
    records, start = [], 0
    for row in rows:
        end = start + len(row.values["choices"])
        columns = {"nats": nats[start:end], "variance": variance[start:end], "tokens": tokens[start:end]}
        records.append({"source_row": row.number, "label": row.values["label"], **columns})
        start = end
    sizes = {
        "acc": lambda choice: 1.0,
        "acc_norm": lambda choice: float(len(choice)),
        "acc_bytes": lambda choice: float(len(choice.encode())),
    }
    chance = math.fsum(1 / len(row.values["choices"]) for row in rows) / len(rows)
    results = []
    for metric, size in sizes.items():
        lengths = [[size(choice) for choice in row.values["choices"]] for row in rows]
        scores = [_over(record["nats"], by, 1) for record, by in zip(records, lengths, strict=True)]
        noise = [_over(record["variance"], by, 2) for record, by in zip(records, lengths, strict=True)]
        for record, values in zip(records, scores, strict=True):
            record[f"chosen_{metric}"] = values.index(min(values))
        results.append({"metric": metric, "unit": "share", "chance": chance, **decisions(scores, noise, labels)})
    return Outcome(results, records, {"estimator": found.estimator})


def _over(values: list[float], lengths: list[float], power: int) -> list[float]:
    return [value / length**power for value, length in zip(values, lengths, strict=True)]


def run_pairs(bench: Bench, task: Task, rows: list[Row]) -> Outcome:
    """
    How often the good text of a pair is the likelier one, each scored whole from `<|endoftext|>`, without its end;
    overall and by group. Both texts of a pair get the same random numbers for their masks, so that `open_share` and
    `mask_error`, which take them for independent, are on the safe side.
    """
    pairs = encoded_pairs(bench, task, rows)
    good, bad = _score(bench, task, pairs[::2], rows), _score(bench, task, pairs[1::2], rows)
    scores = list(zip(good.nats.tolist(), bad.nats.tolist(), strict=True))
    noise = list(zip(good.variance.tolist(), bad.variance.tolist(), strict=True))
    records, groups = [], {}
    for place, (row, nats, variance) in enumerate(zip(rows, scores, noise, strict=True)):
        named = {name: row.values[name] for name in ("task", "group") if name in row.values}
        columns = {"nats": list(nats), "variance": list(variance), "right": nats[0] < nats[1]}
        records.append({"source_row": row.number, **named, **columns})
        groups.setdefault(row.values.get("group"), []).append(place)

    def result(places: list[int], **facts) -> dict:
        found = decisions([scores[i] for i in places], [noise[i] for i in places], [0] * len(places))
        # A tie is no preference: `decisions` takes the first of equal ones, which is the good text.
        found |= share([records[i]["right"] for i in places])
        return {"metric": "accuracy", "unit": "share", "chance": 0.5, **found, **facts}

    results = [result(list(range(len(rows))))]
    named = [group for group in groups if group is not None]
    results += [result(groups[group], metric=f"accuracy/{group}", group=group) for group in named]
    estimators = sorted({good.estimator, bad.estimator})
    return Outcome(results, records, {"estimator": "; ".join(estimators)})


def run_cloze(bench: Bench, task: Task, rows: list[Row]) -> Outcome:
    """
    Nats of the answer given its context, and how often the greedy tokens in its place are the answer's own. Both kinds
    of model write exactly as many tokens as the answer has; a diffusion model so learns its length from the canvas
    (its surest position first, one token a step), an AR model does not.
    """
    pairs = encoded_pairs(bench, task, rows)
    found = _score(bench, task, pairs, rows)
    said, how = _greedy(bench, pairs)
    records = [
        {
            "source_row": row.number,
            "nats": nats,
            "variance": variance,
            "tokens": len(pair[1]),
            "said": text,
            "right": hit,
        }
        for row, nats, variance, pair, (text, hit) in zip(
            rows, found.nats.tolist(), found.variance.tolist(), pairs, said, strict=True
        )
    ]
    nats = mean([record["nats"] for record in records])
    nats["mask_error"] = math.sqrt(math.fsum(record["variance"] for record in records)) / len(records)
    results = [
        {"metric": "nats_per_answer", "unit": "nats/answer", "bound": found.bound, **nats},
        {"metric": "greedy_match", "unit": "share", "generate": how, **share([record["right"] for record in records])},
    ]
    return Outcome(results, records, {"estimator": found.estimator})


def _greedy(bench: Bench, pairs: list[tuple[list[int], list[int]]]) -> tuple[list[tuple[str, bool]], dict]:
    """
    For each pair the greedy text in the answer's place, and whether its tokens are the answer's; whatever the
    checkpoint's generation config says. And the settings, but for the lengths, which are the answer's.
    """
    from nanollada.scripts.decoding.writing import default_decoding, effective_settings, generation_settings
    from nanollada.scripts.evaluation.checkpoint import answers_to, batches_of_length

    said: dict[int, tuple[str, bool]] = {}
    for places in batches_of_length(pairs, bench.batch_size):
        length = len(pairs[places[0]][1])
        whole = {"block_length": length} if bench.is_diffusion and bench.model.config.block_length is None else {}
        prompts = [pairs[place][0] for place in places]
        with default_decoding(bench.model):
            settings = generation_settings(bench.model, max_new_tokens=length, temperature=0.0, **whole)
            answers = answers_to(bench.model, bench.tokenizer, prompts, 0, settings)
        for place, (ids, _) in zip(places, answers, strict=True):
            said[place] = (bench.tokenizer.decode(ids), ids == pairs[place][1])
    with default_decoding(bench.model):
        how = effective_settings(bench.model, temperature=0.0)
    del how["max_new_tokens"]
    return [said[place] for place in range(len(pairs))], how
