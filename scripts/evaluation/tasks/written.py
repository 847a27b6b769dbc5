"""The tasks of a suite that let a model write: checked answers, decoding presets, free text, speed."""

import math
from collections.abc import Callable

from nanollada.scripts.decoding.writing import DRAWN_TOGETHER
from nanollada.scripts.evaluation.metrics import (
    answer_f1,
    answer_match,
    distinct,
    mean,
    ratio,
    repetition,
    share,
    unigram_entropy,
)
from nanollada.scripts.evaluation.rows import Row, Task
from nanollada.scripts.evaluation.tasks.scored import Bench, Outcome

# ---- questions with answers that can be checked


def questions(bench: Bench, task: Task, rows: list[Row]) -> list[tuple[list[int], list[int]]]:
    """Token ids of prompt and reference answer, rendered as in training."""
    from nanollada.scripts.evaluation.checkpoint import questions_of
    from nanollada.trainers.data.sources import Example

    asked = questions_of(bench.tokenizer, [Example(row.source, row.number, **row.values["asked"]) for row in rows])
    for row, (_, answer) in zip(rows, asked, strict=True):
        most = task.options["max_new_tokens"]
        if most is not None and len(answer) > most:
            raise row.error(f"its answer must fit into `max_new_tokens` of {task.name}, got {len(answer)} and {most}")
    return asked


def room_for(bench: Bench, task: Task, rows: list[Row], asked: list, decoding: list[dict]) -> int:
    """Tokens to write: as set, else of the longest reference with its end, in whole blocks of every setting."""
    unit = math.lcm(*(options.get("block_length") or 1 for options in decoding))
    room = task.options["max_new_tokens"] or max(len(answer) for _, answer in asked)
    room = -(-room // unit) * unit
    for row, (prompt, _) in zip(rows, asked, strict=True):
        bench.require_room(row, len(prompt) + room, "prompt and answer")
    return room


def write_answers(bench: Bench, task: Task, prompts: list[list[int]], decoding: dict) -> list[tuple[list[int], bool]]:
    """
    The new token ids of each prompt up to the first EOS, and whether there was one. Greedy answers come in batches of
    prompts of like length; drawn ones in fixed groups in order, each with a seed of its own.
    """
    from nanollada.scripts.decoding.writing import draws, generation_settings, keyed_seed
    from nanollada.scripts.evaluation.checkpoint import answers_to

    settings, drawn = generation_settings(bench.model, **decoding), draws(bench.model, **decoding)
    order = range(len(prompts)) if drawn else sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    size, said = DRAWN_TOGETHER if drawn else bench.batch_size, {}
    for start in range(0, len(prompts), size):
        places = list(order[start : start + size])
        batch = [prompts[place] for place in places]
        found = answers_to(bench.model, bench.tokenizer, batch, keyed_seed(bench.seed, task.name, start), settings)
        said.update(zip(places, found, strict=True))
        bench.progress(len(places))
    return [said[place] for place in range(len(prompts))]


def verdict(task: Task, row: Row, answer: str) -> dict[str, float]:
    """What an answer is worth, by metric."""
    from nanollada.trainers.puzzles.registry import PUZZLES, solves

    verify, values = task.options["verify"], row.values
    if verify in PUZZLES:
        return {"accuracy": solves(verify, values, answer)}
    if verify == "exact":
        return {"exact_match": answer.strip() in {reference.strip() for reference in values["answers"]}}
    hit = answer_match(answer, values["answers"], task.language)
    return {"exact_match": hit, "f1": answer_f1(answer, values["answers"], task.language)}


def own_settings(bench: Bench, decoding: dict) -> dict:
    """The options that this kind of model has; those of diffusion go to diffusion models alone."""
    from nanollada.scripts.decoding.comparison import split_options

    return split_options(decoding)["diffusion" if bench.is_diffusion else "ar"]


def run_generation(bench: Bench, task: Task, rows: list[Row]) -> Outcome:
    """How often the answer is right, and for extractive questions also F1. Greedy unless `decoding` draws."""
    from nanollada.scripts.decoding.writing import effective_settings

    decoding = own_settings(bench, {"temperature": 0.0, **task.options["decoding"]})
    asked = questions(bench, task, rows)
    decoding["max_new_tokens"] = room_for(bench, task, rows, asked, [task.options["decoding"]])
    said = write_answers(bench, task, [prompt for prompt, _ in asked], decoding)
    records = []
    for row, (ids, ended) in zip(rows, said, strict=True):
        answer = bench.tokenizer.decode(ids, skip_special_tokens=True)
        facts = {"source_row": row.number, "answer": answer, "references": row.values["answers"], "ended": ended}
        records.append({**facts, "tokens": len(ids) + ended, **verdict(task, row, answer)})
    truncated = sum(not record["ended"] for record in records)
    results = [{**result, "truncated": truncated} for result in _scored(records)]
    return Outcome(results, records, {"generate": effective_settings(bench.model, **decoding)})


def _scored(records: list[dict]) -> list[dict]:
    """A figure for each metric that the records have."""
    results = []
    for metric, estimate in (("accuracy", share), ("exact_match", share), ("f1", mean)):
        if metric in records[0]:
            found = estimate([record[metric] for record in records])
            results.append({"metric": metric, "unit": "share", **found})
    return results


# ---- decoding presets


def run_presets(bench: Bench, task: Task, rows: list[Row]) -> Outcome:
    """
    The same questions under several decoding settings, one row at a time: each one's score and tokens per forward
    pass, and the paired differences from the first.
    """
    from nanollada.scripts.decoding.writing import effective_settings

    presets = {name: {"temperature": 0.0, **task.options["decoding"], **part} for name, part in _presets(task)}
    asked = questions(bench, task, rows)
    room = room_for(bench, task, rows, asked, list(presets.values()))
    results, records, columns = [], [], {}
    for name, options in presets.items():
        options["max_new_tokens"] = room
        made = [_one(bench, task, place, rows[place], asked[place][0], options) for place in range(len(rows))]
        records += [{"preset": name, **record} for record in made]
        facts = {"preset": name, "generate": effective_settings(bench.model, **options)}
        scored = _scored(made)
        columns[name] = {result["metric"]: [record[result["metric"]] for record in made] for result in scored}
        tokens, forwards = [record["tokens"] for record in made], [record["forwards"] for record in made]
        scored.append({"metric": "tokens_per_forward", "unit": "tokens/forward", "rows": len(made)})
        scored[-1] |= ratio(tokens, forwards)
        results += [{**result, **facts, "metric": f"{result['metric']}/{name}"} for result in scored]
    first, *others = columns
    for name in others:
        for metric, values in columns[name].items():
            differences = [float(a) - float(b) for a, b in zip(values, columns[first][metric], strict=True)]
            facts = {"metric": f"{metric}/{name} − {first}", "unit": "share, difference", "preset": name}
            results.append({**facts, **mean(differences)})
    return Outcome(results, records)


def _presets(task: Task):
    return task.options["presets"].items()


def _one(bench: Bench, task: Task, place: int, row: Row, prompt: list[int], options: dict) -> dict:
    """One prompt's answer and verdict, and what it took; a forward pass with guidance counts once."""
    from nanollada.scripts.decoding.writing import generate, keyed_seed

    seed = keyed_seed(bench.seed, task.name, place)
    made = generate(bench.model, bench.tokenizer, prompt, seed=seed, **options)
    bench.progress(1)
    facts = {"source_row": row.number, "answer": made.text, "ended": made.finished, "tokens": made.tokens}
    return {**facts, "forwards": made.tokens / made.tokens_per_forward, **verdict(task, row, made.text)}


# ---- free text


def run_statistics(bench: Bench, task: Task, rows: list[Row]) -> Outcome:
    """
    Variety of drawn texts, each by itself and averaged (a text too short for an n-gram is left out of that figure,
    whose `rows` says so): distinct-1 to -3 and unigram entropy over the model's own tokens, the share of 4-grams that
    stand earlier in the text; and a judge's nats, over all texts.
    """
    from nanollada.scripts.decoding.writing import effective_settings

    decoding = {"temperature": 1.0, **task.options["decoding"], "max_new_tokens": task.options["max_new_tokens"]}
    decoding = own_settings(bench, decoding)
    said = write_answers(bench, task, _prompts(bench, task, rows), decoding)
    records = [
        {"text": bench.tokenizer.decode(ids, skip_special_tokens=True), "tokens": ids, "ended": ended}
        for ids, ended in said
    ]
    results = []
    for metric, unit, measure in STATISTICS:
        values = [value for record in records if (value := measure(record["tokens"])) is not None]
        results += [{"metric": metric, "unit": unit, **mean(values)}] if values else []
    ended = share([record["ended"] for record in records])
    results.append({"metric": "ended", "unit": "share", **ended})
    if bench.judge is not None:
        results += _judged(bench, task, rows, records)
    return Outcome(results, records, {"generate": effective_settings(bench.model, **decoding)})


STATISTICS: list[tuple[str, str, Callable]] = [
    ("distinct_1", "share", lambda tokens: distinct(tokens, 1)),
    ("distinct_2", "share", lambda tokens: distinct(tokens, 2)),
    ("distinct_3", "share", lambda tokens: distinct(tokens, 3)),
    ("repetition_4", "share", repetition),
    ("unigram_entropy", "nats", unigram_entropy),
    ("tokens", "tokens/text", lambda tokens: float(len(tokens))),
]


def _prompts(bench: Bench, task: Task, rows: list[Row]) -> list[list[int]]:
    """Token ids of the prompts, checked; with `chat` a text is a user's message."""
    from nanollada.scripts.decoding.writing import prompt_ids

    prompts = []
    for row in rows:
        prompt = row.values["prompt"]
        prompt = [{"role": "user", "content": prompt}] if task.options["chat"] and isinstance(prompt, str) else prompt
        try:
            prompts.append(prompt_ids(bench.tokenizer, prompt))
        except ValueError as error:
            raise row.error(str(error)) from error
        bench.require_room(row, len(prompts[-1]) + task.options["max_new_tokens"], "prompt and text")
    return prompts


def _judged(bench: Bench, task: Task, rows: list[Row], records: list[dict]) -> list[dict]:
    """
    The judge's nats by its tokens and by bytes, and the perplexity exp(nats per token); of a text given its prompt,
    but of an answer in a chat by itself: the judge knows no chats.
    """
    found = []
    for row, record in zip(rows, records, strict=True):
        prompt = row.values["prompt"]
        context = prompt if isinstance(prompt, str) and not task.options["chat"] else ""
        try:
            found.append(judge_nats(*bench.judge, record["text"], context))
        except ValueError as error:
            raise row.error(str(error)) from error
    for record, (nats, tokens) in zip(records, found, strict=True):
        record |= {"judge_nats": nats, "judge_tokens": tokens}
    nats, tokens = zip(*found, strict=True)
    sizes = [len(record["text"].encode()) for record in records]
    if not sum(tokens):
        return []
    facts = {"rows": len(records)}
    per_token, per_byte = ratio(nats, tokens), ratio([value / math.log(2) for value in nats], sizes)
    perplexity = math.exp(per_token["value"])
    error = per_token["standard_error"]
    error = None if error is None else error * perplexity
    named = {"metric": "judge_perplexity", "unit": "perplexity", "value": perplexity, "standard_error": error}
    return [
        {"metric": "judge_nats_per_token", "unit": "nats/judge token", **per_token, **facts},
        {"metric": "judge_bits_per_byte", "unit": "bits/byte", **per_byte, **facts},
        {**named, **facts},
    ]


def judge_nats(model, tokenizer, text: str, context: str = "") -> tuple[float, int]:
    """
    −log p of a text behind its context under a causal model, and the number of the text's tokens. In front of both
    stands what begins the judge's documents: ours begin with `<|endoftext|>`, others with their BOS, or else their
    EOS.

    Raises:
        `ValueError`: for a text longer than the judge's positions, or that its vocabulary lacks, and for a judge
            without such a token.
    """
    import torch

    from nanollada.trainers.data.encoding import IGNORE, encode_spans
    from nanollada.trainers.data.sources import BadRow

    ours = model.config.model_type == "nanollada"
    names = ("pad_token_id",) if ours else ("bos_token_id", "eos_token_id")
    start = next((token for name in names if (token := getattr(tokenizer, name)) is not None), None)
    if start is None:
        raise ValueError("`judge` must have a token that begins a text (BOS or EOS), got a tokenizer with none")
    try:
        ids, labels = encode_spans(tokenizer, context + text, [(len(context), len(context + text))])
    except BadRow as error:
        raise ValueError(f"`judge` must spell prompt and drawn text with its vocabulary, got {error}") from error
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and len(ids) + 1 > most:
        raise ValueError(f"`judge` must have room for a text, got {len(ids) + 1} tokens and {most} positions")
    count = len(ids) - labels.count(IGNORE)
    if not count:
        return 0.0, 0
    row = torch.tensor([[start, *ids]], device=model.device)
    with torch.no_grad():
        logits = model(row, attention_mask=torch.ones_like(row)).logits[0, -count - 1 : -1].double()  # [count, V]
    return torch.nn.functional.cross_entropy(logits, row[0, -count:], reduction="sum").item(), count


# ---- speed


def run_speed(bench: Bench, task: Task, rows: list[Row]) -> Outcome:
    """
    One row at a time, as `compare.py` measures it: of each prompt the median of `repeats` runs, after one run that
    does not count. Tokens per second are all tokens by all seconds; errors are over prompts.
    """
    from tqdm.auto import tqdm

    from nanollada.scripts.decoding.comparison import measure
    from nanollada.scripts.decoding.writing import effective_settings, generation_settings

    options = {"temperature": 0.0, **task.options["decoding"], "max_new_tokens": task.options["max_new_tokens"]}
    options = own_settings(bench, options)
    generation_settings(bench.model, **options)
    records, quiet, repeats = [], tqdm(disable=True), task.options["repeats"]
    for row, ids in zip(rows, _prompts(bench, task, rows), strict=True):
        found = measure(bench.model, bench.tokenizer, ids, repeats, bench.seed, not records, quiet, options)
        records.append({"prompt": row.values["prompt"], **found})
        bench.progress(1)
    tokens, seconds = ([record[name] for record in records] for name in ("tokens", "seconds"))
    forwards = [record["tokens"] / record["tokens_per_forward"] for record in records]
    first = [record["first_token_seconds"] for record in records]
    results = [
        {"metric": "tokens_per_second", "unit": "tokens/s", **ratio(tokens, seconds)},
        {"metric": "seconds", "unit": "s/text", **mean(seconds)},
        {"metric": "first_token_seconds", "unit": "s/text", **mean(first)},
        {"metric": "tokens_per_forward", "unit": "tokens/forward", **ratio(tokens, forwards)},
    ]
    results = [{**result, "rows": len(records)} for result in results]
    return Outcome(results, records, {"generate": effective_settings(bench.model, **options)})
