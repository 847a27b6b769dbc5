"""Questions with answers that can be checked."""

import re

from nanollada.scripts.decoding.settings import effective_settings, has_own_limit, new_tokens_limit
from nanollada.scripts.evaluation.answers import questions_of
from nanollada.scripts.evaluation.bench import (
    Bench,
    Kind,
    Metric,
    Outcome,
    Row,
    Task,
    mapping,
    one_of,
    setting,
    settings,
    whole,
)
from nanollada.scripts.evaluation.metrics import answer_f1, answer_match
from nanollada.scripts.evaluation.tasks.written import WrittenTask, own_settings, training_row, write_answers
from nanollada.trainers.data.formats import Example
from nanollada.trainers.puzzles.registry import PUZZLES, make_rows, solves
from nanollada.trainers.scoring.estimates import mean, share

TEXTS = ("exact", "qa")  # how texts are compared; a puzzle has its own verifier


def _asks(template: str) -> bool:
    names = re.findall(r"\{(\w+)\}", template)
    return "question" in names and set(names) <= {"context", "question"}


@settings
class GenerationTask(WrittenTask):
    """Rows of `data`, or those of a `puzzle`; `verify` says what a right answer is."""

    puzzle: str | None = one_of(PUZZLES)
    rows: int | None = whole(1, 100)
    puzzle_options: dict = mapping()
    verify: str | None = setting(
        None, f"one of {', '.join([*TEXTS, *PUZZLES])}", lambda value: value in {*TEXTS, *PUZZLES}
    )
    template: str | None = setting(
        None, "a string that asks the {question}, with the {context} or without, and has no other {name}", _asks
    )
    max_new_tokens: int | None = whole(1)

    def complete(self, given: dict, wrong) -> None:
        """The verifier may follow from the puzzle."""
        if (self.puzzle is None) == (self.data is None):
            raise wrong("puzzle", "given where there is no `data`, and only there", self.puzzle)
        if self.puzzle is None and (idle := [name for name in ("rows", "puzzle_options") if name in given]):
            raise wrong(idle[0], "of a `puzzle`", given[idle[0]])
        self.verify = self.verify or self.puzzle or "exact"
        if self.puzzle not in (None, self.verify):
            raise wrong("verify", f"that of the puzzle, {self.puzzle!r}", self.verify)
        if self.puzzle is None:
            self.rows = None
        super().complete(given, wrong)


def puzzle_rows(task: Task, seed: int) -> list[dict]:
    """The problems of the task's puzzle."""
    return make_rows(task.puzzle, task.rows, seed, **task.puzzle_options)


def check_question(row: Row, task: Task) -> dict:
    """`prompt` of a question (a text or messages), its `answers`, and what a puzzle's verifier needs."""
    values, template = row.values, task.template
    if template is not None and "question" not in values:
        raise row.error(f"`template` of task {task.name} must be left out for a row without `question`")
    if "question" in values:
        template = template or "{context}\n{question}"
        context = row.text("context") if "{context}" in template else ""
        parts = {"context": context, "question": row.text("question")}
        prompt = re.sub(r"\{(context|question)\}", lambda name: parts[name[1]], template)
        answers = values.get("answers", values.get("answer"))
        answers = answers.get("text") if isinstance(answers, dict) else answers  # as SQuAD and CMRC nest them
        answers = [answers] if isinstance(answers, str) else answers
        if not isinstance(answers, list) or not answers:
            raise row.error(f"`answers` must be a list of one or more strings, got {answers!r}")
        answers = [row.string(f"answers[{i}]", answer) for i, answer in enumerate(answers)]
    elif "answer" in values and "prompt" in values and "completion" not in values:
        prompt, answers = values["prompt"], [row.text("answer")]
    else:
        return {**training_row(row, task), **_puzzle(row, task)}
    turn = {"role": "assistant", "content": answers[0]}
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": row.string("prompt", prompt)}]
    plain = task.chat is False and isinstance(prompt, str)
    asked = {"prompt": prompt, "completion": answers[0]} if plain else {"messages": [*messages, turn]}
    return {**training_row(row, task, asked), "answers": answers, **_puzzle(row, task)}


def _puzzle(row: Row, task: Task) -> dict:
    """The columns that the verifier reads, checked."""
    with row.faults():
        return PUZZLES[task.verify].columns(row.values) if task.verify in PUZZLES else {}


def questions(bench: Bench, task: Task, rows: list[Row], sizes: range | None = None) -> list:
    """Token ids of prompt and reference answer, rendered as in training."""
    asked = questions_of(bench.tokenizer, [Example(row.source, row.number, **row.values["asked"]) for row in rows])
    for row, (_, answer) in zip(rows, asked, strict=True):
        most = task.max_new_tokens
        if most is not None and len(answer) > most:
            raise row.error(f"its answer must fit into `max_new_tokens` of {task.name}, got {len(answer)} and {most}")
    return asked


def length_for(bench: Bench, task: Task, rows: list[Row], asked: list) -> dict:
    """
    `max_new_tokens`: as set, else of the longest reference with its end; nothing where it is not set and the
    checkpoint has a limit of its own.
    """
    if task.max_new_tokens is None and has_own_limit(bench.model):
        for row, (prompt, _) in zip(rows, asked, strict=True):
            with row.faults():
                new_tokens_limit(bench.model, len(prompt))
            bench.require_room(row, len(prompt) + 1, "prompt and answer")
        return {}
    length = task.max_new_tokens or max(len(answer) for _, answer in asked)
    for row, (prompt, _) in zip(rows, asked, strict=True):
        bench.require_room(row, len(prompt) + length, "prompt and answer")
    return {"max_new_tokens": length}


def verdict(task: Task, row: Row, answer: str) -> dict[str, float]:
    """What an answer is worth, by metric."""
    if task.verify in PUZZLES:
        return {"accuracy": solves(task.verify, row.values, answer)}
    answers = row.values["answers"]
    if task.verify == "exact":
        return {"exact_match": answer.strip() in {reference.strip() for reference in answers}}
    hit = answer_match(answer, answers, task.language)
    return {"exact_match": hit, "f1": answer_f1(answer, answers, task.language)}


def scored(records: list[dict]) -> list[dict]:
    """A figure for each metric that the records have."""
    return [
        {"metric": metric, **estimate([record[metric] for record in records])}
        for metric, estimate in (("accuracy", share), ("exact_match", share), ("f1", mean))
        if metric in records[0]
    ]


def run_generation(bench: Bench, task: Task, rows: list[Row]) -> Outcome:
    """How often the answer is right, and for extractive questions also F1. Greedy unless `decoding` draws."""
    decoding = own_settings(bench, {**task.greedy, **task.decoding})
    asked = questions(bench, task, rows)
    decoding |= length_for(bench, task, rows, asked)
    said = write_answers(bench, task, [prompt for prompt, _ in asked], decoding)
    records = []
    for row, (ids, ended) in zip(rows, said, strict=True):
        answer = bench.tokenizer.decode(ids, skip_special_tokens=True)
        record = {"source_row": row.number, "answer": answer, "references": row.values["answers"], "ended": ended}
        records.append({**record, "tokens": len(ids) + ended, **verdict(task, row, answer)})
    truncated = sum(not record["ended"] for record in records)
    results = [{**result, "truncated": truncated} for result in scored(records)]
    return Outcome(results, records, {"generate": effective_settings(bench.model, **decoding)})


METRICS = {
    "accuracy": Metric("share of answers that the verifier accepts."),
    "exact_match": Metric(
        "share of answers that equal a reference; of questions on a context without case, punctuation and articles "
        "(SQuAD), in Chinese without case, spaces and what CMRC's script deletes."
    ),
    "f1": Metric(
        "mean of 2·common / (units of answer and reference); SQuAD's common words, in Chinese CMRC's longest common "
        "run of characters."
    ),
}

KIND = Kind(
    "Checked answers",
    task=GenerationTask,
    check_row=check_question,
    run=run_generation,
    metrics=METRICS,
    make_rows=puzzle_rows,
    short=questions,
)
