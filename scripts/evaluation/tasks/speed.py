"""Speed, one row at a time."""

from tqdm.auto import tqdm

from nanollada.scripts.decoding.comparison import measure
from nanollada.scripts.decoding.settings import effective_settings, generation_settings
from nanollada.scripts.evaluation.bench import Bench, Kind, Metric, Outcome, Row, Task, settings, whole
from nanollada.scripts.evaluation.tasks.presets import PER_FORWARD
from nanollada.scripts.evaluation.tasks.written import WrittenTask, check_prompt, own_settings, prompts_of
from nanollada.trainers.scoring.estimates import mean, ratio

PROMPTS = {None: "What is it?", "en": "What is it?", "zh": "这是什么？"}


@settings
class SpeedTask(WrittenTask):
    """Prompts of `data`, or one question."""

    max_new_tokens: int = whole(1, 128)
    repeats: int = whole(1, 3)
    chat: bool | None = True


def run_speed(bench: Bench, task: Task, rows: list[Row]) -> Outcome:
    """
    One row at a time, as `compare.py` measures it: of each prompt the median of `repeats` runs, after one run that
    does not count. Tokens per second are all tokens by all seconds; errors are over prompts.
    """
    options = {**task.greedy, **task.decoding, "max_new_tokens": task.max_new_tokens}
    options = own_settings(bench, options)
    generation_settings(bench.model, **options)
    records, quiet, repeats = [], tqdm(disable=True), task.repeats
    for row, ids in zip(rows, prompts_of(bench, task, rows), strict=True):
        measured = measure(bench.model, bench.tokenizer, ids, repeats, bench.seed, not records, quiet, options)
        records.append({"prompt": row.values["prompt"], **measured})
        bench.progress(1)
    tokens, seconds = ([record[name] for record in records] for name in ("tokens", "seconds"))
    forwards = [record["tokens"] / record["tokens_per_forward"] for record in records]
    first = [record["first_token_seconds"] for record in records]
    results = [
        {"metric": "tokens_per_second", **ratio(tokens, seconds)},
        {"metric": "seconds", **mean(seconds)},
        {"metric": "first_token_seconds", **mean(first)},
        {"metric": "tokens_per_forward", **ratio(tokens, forwards)},
    ]
    results = [{**result, "rows": len(records)} for result in results]
    return Outcome(results, records, {"generate": effective_settings(bench.model, **options)})


KIND = Kind(
    "Speed, one row at a time",
    task=SpeedTask,
    check_row=check_prompt,
    run=run_speed,
    metrics={
        "tokens_per_second": Metric("tokens kept by the seconds of `generate`, medians of repeats.", "tokens/s"),
        "seconds": Metric("seconds of a `generate` call, medians of repeats.", "s/text", drawn=False),
        "first_token_seconds": Metric(
            "seconds until the first pass has decided something, medians of repeats.", "s/text", drawn=False
        ),
        "tokens_per_forward": Metric(PER_FORWARD, "tokens/forward", drawn=False),
    },
    make_rows=lambda task, seed: [{"prompt": PROMPTS[task.language]}],
    timed=True,
)
