"""A suite's file and its rows: tasks are parsed, rows are read and checked; every error names its task or its row."""

import glob
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanollada.scripts.evaluation.suite_file import COMMON, KINDS, checked_options, read_content
from nanollada.trainers.data.sources import (
    BadRow,
    DataError,
    SourceArguments,
    _checked_text,
    parse_row,
    resolve_source,
)

FILE = re.compile(r"\.(jsonl|txt|json|parquet|csv)(\.gz|\.xz)?$", re.I)


@dataclass(frozen=True)
class Task:
    """
    One entry of a suite's `tasks`.

    Attributes:
        name (`str`): Of letters, digits, `_`, `-`, `.`; a file's name, too.
        kind (`str`): What is measured, see `KINDS`.
        language (`str`, *optional*): "en" or "zh": how contexts and answers are joined and compared.
        data (`str`, *optional*): File, glob, folder or name of a dataset; none where the rows are made.
        data_split, data_config (`str`, *optional*): Of a dataset; by default "train", and its only configuration.
        columns (`dict`): This protocol's column names to the data's.
        match (`str`, *optional*): Only rows whose JSON has this regular expression.
        limit (`int`, *optional*): At most so many rows, evenly spread over all of them.
        options (`dict`): Of the kind, with its defaults.
    """

    name: str
    kind: str
    options: dict
    language: str | None = None
    data: str | None = None
    data_split: str | None = None
    data_config: str | None = None
    columns: dict | None = None
    match: str | None = None
    limit: int | None = None

    def settings(self) -> dict:
        """What the results depend on beside model and data: all but what is nothing, and is so by default."""
        names = ("data_split", "data_config", "columns", "match", "limit")
        values = {**{name: getattr(self, name) for name in names}, **self.options}
        nothing = {name: default for name, (default, _) in KINDS[self.kind].items() if default in ("", {})}
        return {name: value for name, value in values.items() if value != nothing.get(name)}


@dataclass(frozen=True)
class Row:
    """One row as it was read, its place (file and 1-based row), and what a check made of it."""

    source: str
    number: int
    values: dict

    def error(self, reason: str) -> DataError:
        return DataError(f"{self.source}, row {self.number}: {reason}")


# ---- the file of a suite


def read_suite(path: str | Path) -> tuple[str, list[Task]]:
    """
    The description and the tasks of a YAML or JSON file `{"description": …, "tasks": [{…}, …]}`.

    Raises:
        `ValueError`: naming file and task, for whatever is missing, unknown, of another type, without effect, or there
            twice.
    """
    content = read_content(path)
    tasks = [parse_task(item, f"{path}, task {number}") for number, item in enumerate(content["tasks"], start=1)]
    names = [task.name.lower() for task in tasks]  # some file systems don't know case
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"`name` must be another for each task, got {twice[0]!r} twice in {path}")
    return str(content.get("description", "")), tasks


def parse_task(item: Any, place: str) -> Task:
    """One task from its mapping; `place` begins the messages of its errors, see `checked_options`."""
    options = checked_options(item, place)
    return Task(**{key: item[key] for key in COMMON if item.get(key) is not None}, options=options)


# ---- rows


SPEED_PROMPTS = {None: "What is it?", "en": "What is it?", "zh": "这是什么？"}


def rows_of(task: Task, base: str | None, seed: int) -> tuple[list[Row], str]:
    """
    The rows of a task, read or made, limited, and the SHA-256 of its data.

    Args:
        task ([`Task`]): The task.
        base (`str`, *optional*): Folder in which files are looked for.
        seed (`int`): Of the problems of a puzzle.

    Raises:
        `DataError`: at a broken row. `ValueError`: for no data or no rows; and as `puzzles.make_rows`.
    """
    from nanollada.trainers.puzzles.registry import make_rows

    if task.data is not None:
        return read_rows(task, base)
    options = task.options
    if options.get("puzzle"):
        try:
            made = make_rows(options["puzzle"], options["rows"], seed, **options["puzzle_options"])
        except ValueError as error:
            raise ValueError(f"task {task.name}: {error}") from error
    else:
        made = [{"prompt": ""}] * options["rows"] if "rows" in options else [{"prompt": SPEED_PROMPTS[task.language]}]
    rows = [Row(f"task {task.name}", number, values) for number, values in enumerate(made, start=1)]
    if options.get("puzzle"):
        rows = [Row(row.source, row.number, CHECKS[task.kind](row, task)) for row in rows]
    return limited(rows, task.limit), digest_of(made)


def read_rows(task: Task, base: str | None) -> tuple[list[Row], str]:
    """
    As [`rows_of`], of a task with `data`; the SHA-256 is that of the file if there is one, else of all rows.

    Args:
        task ([`Task`]): With `data`.
        base (`str`, *optional*): Folder in which files are looked for.

    Raises:
        `DataError`: at a broken row. `ValueError`: for no data or no rows, and settings that files don't have.
    """
    spec = task.data
    local = FILE.search(spec) or glob.has_magic(spec) or (Path(base or "") / spec).exists()
    if base is not None and local and not spec.startswith("hf://"):
        spec = str(Path(base) / spec)
    arguments = SourceArguments(data_config=task.data_config, data_split=task.data_split or "train")
    source = resolve_source(spec, arguments)
    for name in ("data_split", "data_config"):
        if name in source.idle and getattr(task, name) is not None:
            kind = "files" if source.files else "a saved dataset without them"
            raise ValueError(f"task {task.name}: `{name}` must be left out for {kind}, got {getattr(task, name)!r}")
    found = source.raw_rows(all_columns=True)
    rows = [_renamed(Row(name, number, _object(name, number, value)), task) for name, number, value in found]
    if len(source.files) == 1:
        digest = source.identity()[0][1]
    else:
        digest = digest_of([row.values for row in rows])
    rows = rows if task.match is None else [row for row in rows if re.search(task.match, _json(row.values))]
    if not rows:
        raise ValueError(f"`data` must hold rows, got none that {task.name} can use in {spec}")
    check = CHECKS[task.kind]
    checked = [Row(row.source, row.number, check(row, task)) for row in rows]
    if task.kind != "text":
        _refuse_twins(checked)
    return limited(checked, task.limit), digest


def limited(rows: list, limit: int | None) -> list:
    """At most `limit` rows, evenly spread: row ⌊i·n / limit⌋ for each i."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[i * len(rows) // limit] for i in range(limit)]


def digest_of(values: Any) -> str:
    return hashlib.sha256(_json(values).encode("utf-8", "surrogatepass")).hexdigest()


def _json(values: Any) -> str:
    return json.dumps(values, ensure_ascii=False, sort_keys=True, default=str)


def _object(name: str, number: int, value: Any) -> dict:
    if isinstance(value, BadRow):
        raise DataError(f"{name}, row {number}: {value}") from value
    if not isinstance(value, dict):
        raise DataError(f"{name}, row {number}: a row must be an object, got {type(value).__name__}")
    return {key: part for key, part in value.items() if part is not None}


def _renamed(row: Row, task: Task) -> Row:
    for ours, theirs in (task.columns or {}).items():
        if theirs not in row.values:
            raise row.error(f"missing field: `{theirs}` (`{ours}` of task {task.name})")
    others = {name: value for name, value in row.values.items() if name not in (task.columns or {}).values()}
    return Row(row.source, row.number, {**others, **{o: row.values[t] for o, t in (task.columns or {}).items()}})


def _refuse_twins(rows: list[Row]) -> None:
    seen: dict[str, Row] = {}
    for row in rows:
        first = seen.setdefault(_json(row.values), row)
        if first is not row:
            raise row.error(f"it repeats row {first.number} of {first.source}")


# ---- checks of one row, by kind


def _text(row: Row, name: str, allow_empty: bool = False) -> str:
    if name not in row.values:
        raise row.error(f"missing field: `{name}`; there are {', '.join(sorted(row.values))}")
    return _string(row, name, row.values[name], allow_empty)


def _string(row: Row, name: str, value: Any, allow_empty: bool = False) -> str:
    try:
        return _checked_text(value, name, allow_empty)
    except BadRow as error:
        raise row.error(str(error)) from error


def _check_text(row: Row, task: Task) -> dict:
    try:
        parse_row(row.values)
    except BadRow as error:
        raise row.error(str(error)) from error
    return row.values


def _check_choice(row: Row, task: Task) -> dict:
    """`ctx`, `choices` and `label`; also `choices` as `{"text", "label"}` and a label's name or digits (ARC)."""
    context, choices, label = _text(row, "ctx"), row.values.get("choices"), row.values.get("label")
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
    choices = [_string(row, f"choices[{i}]", choice) for i, choice in enumerate(choices)]
    if len(set(choices)) < len(choices):
        raise row.error(f"`choices` must differ, got {choices!r}")
    label = int(label) if isinstance(label, str) and re.fullmatch(r"[0-9]{1,3}", label) else label
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(choices):
        raise row.error(f"`label` must be from 0 to {len(choices) - 1}, got {label!r}")
    return {"ctx": context, "choices": choices, "label": label}


def _check_cloze(row: Row, task: Task) -> dict:
    """
    `ctx` (or `context`) and `answer`; or LAMBADA's own `text`, whose last word is the answer, and whose own `gap`
    before it stands in the delimiter's place.
    """
    if "answer" not in row.values and "text" in row.values:
        parts = re.fullmatch(r"(.*\S)(\s+)(\S+)", _text(row, "text").strip(), re.S)
        if parts is None:
            raise row.error("`text` must have two words or more to ask for the last one")
        if task.options["delimiter"] is not None:
            raise row.error(f"`delimiter` of task {task.name} must be left out for a `text`, which has its own")
        return {"ctx": parts[1], "gap": parts[2], "answer": parts[3]}
    return {"ctx": _text(row, "ctx" if "ctx" in row.values else "context"), "answer": _text(row, "answer")}


def _check_pairs(row: Row, task: Task) -> dict:
    good, bad = _text(row, "good"), _text(row, "bad")
    if good == bad:
        raise row.error(f"`good` and `bad` must differ, got {good!r} for both")
    named = {name: _string(row, name, row.values[name]) for name in ("task", "group") if name in row.values}
    return {"good": good, "bad": bad, **named}


def _check_question(row: Row, task: Task) -> dict:
    """`prompt` of a question (a text or messages), its `answers`, and what a puzzle's verifier needs."""
    values, chat, template = row.values, task.options["chat"], task.options["template"]
    if template is not None and "question" not in values:
        raise row.error(f"`template` of task {task.name} must be left out for a row without `question`")
    if "question" in values:
        template = template or "{context}\n{question}"
        context = _text(row, "context") if "{context}" in template else ""
        parts = {"context": context, "question": _text(row, "question")}
        prompt = re.sub(r"\{(context|question)\}", lambda name: parts[name[1]], template)
        answers = values.get("answers", values.get("answer"))
        answers = answers.get("text") if isinstance(answers, dict) else answers  # as SQuAD and CMRC nest them
        answers = [answers] if isinstance(answers, str) else answers
        if not isinstance(answers, list) or not answers:
            raise row.error(f"`answers` must be a list of one or more strings, got {answers!r}")
        answers = [_string(row, f"answers[{i}]", answer) for i, answer in enumerate(answers)]
    elif "answer" in values and "prompt" in values and "completion" not in values:
        prompt, answers = values["prompt"], [_text(row, "answer")]
    else:
        return {**_data_room(row, task), **_puzzle(row, task)}
    turn = {"role": "assistant", "content": answers[0]}
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": _string(row, "prompt", prompt)}]
    plain = chat is False and isinstance(prompt, str)
    asked = {"prompt": prompt, "completion": answers[0]} if plain else {"messages": [*messages, turn]}
    return {**_data_room(Row(row.source, row.number, asked), task), "answers": answers, **_puzzle(row, task)}


def _data_room(row: Row, task: Task) -> dict:
    """A row with an answer in the training formats: `asked`, as the data room reads it, and the `answers`."""
    try:
        asked = parse_row(row.values)
    except BadRow as error:
        raise row.error(str(error)) from error
    if "text" in asked:
        raise row.error("it must have an answer to compare with, got a plain `text`")
    answer = asked["messages"][-1]["content"] if "messages" in asked else asked["completion"]
    if "messages" in asked and asked["messages"][-1]["role"] != "assistant":
        raise row.error("`messages` must end with the answer of the assistant")
    if task.options["chat"] not in (None, "messages" in asked):
        kind = "messages" if "messages" in asked else "a `prompt` and `completion` of strings"
        raise row.error(f"`chat` of task {task.name} must be left out for {kind}, got {task.options['chat']}")
    return {"asked": asked, "answers": [answer]}


def _puzzle(row: Row, task: Task) -> dict:
    """The columns that the verifier reads, checked."""
    from nanollada.trainers.puzzles.sudoku import count_solutions

    verify, values = task.options["verify"], row.values
    if verify == "sudoku":
        puzzle = _text(row, "puzzle")
        if not re.fullmatch(r"[0-4]{16}", puzzle) or count_solutions(puzzle) != 1:
            raise row.error(f"`puzzle` must be 16 digits from 0 to 4 with one solution, got {puzzle!r}")
        return {"puzzle": puzzle}
    if verify == "countdown":
        numbers, target = values.get("numbers"), values.get("target")
        if not isinstance(numbers, list) or not all(type(number) is int for number in [*numbers, target]):
            raise row.error(f"`numbers` and `target` must be whole numbers, got {numbers!r} and {target!r}")
        return {"numbers": numbers, "target": target}
    if verify == "arithmetic":
        answer = _text(row, "answer")
        if not re.fullmatch(r"-?[0-9]{1,40}", answer):
            raise row.error(f"`answer` must be a whole number, got {answer!r}")
        return {"answer": answer}
    return {}


def _check_prompt(row: Row, task: Task) -> dict:
    """`prompt`: a text, or messages that end before the answer."""
    messages = row.values.get("messages", row.values.get("conversations"))
    prompt = row.values.get("prompt", row.values.get("text", messages))
    if isinstance(prompt, list):
        while prompt and isinstance(prompt[-1], dict) and prompt[-1].get("role") == "assistant":
            prompt = prompt[:-1]
        _data_room(Row(row.source, row.number, {"messages": [*prompt, {"role": "assistant", "content": "."}]}), task)
        return {"prompt": prompt}
    return {"prompt": _string(row, "prompt", prompt)}


CHECKS = {
    "text": _check_text,
    "choice": _check_choice,
    "cloze": _check_cloze,
    "pairs": _check_pairs,
    "generation": _check_question,
    "presets": _check_question,
    "statistics": _check_prompt,
    "speed": _check_prompt,
}
