"""A suite's file and its rows: tasks are parsed, rows are read and checked; every error names its task or its row."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanollada.trainers.rows import BadRow, DataError, SourceArguments, parse_row, resolve_source

LANGUAGES = ("en", "zh")
VERIFIERS = ("exact", "qa", "arithmetic", "countdown", "sudoku")
PRESETS = {
    "cfg": {"off": {"cfg_scale": 0.0}, "on": {"cfg_scale": 1.5}},
    # LLaDA 1.0 decides one token a step in blocks; 2.0 all that is surer than a threshold (2512.15745, §3.5)
    "llada_styles": {"llada_1": {"block_length": 32}, "llada_2": {"block_length": 32, "threshold": 0.95}},
}
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
        data_split, data_config (`str`, *optional*): Of a dataset.
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
    data_split: str = "train"
    data_config: str | None = None
    columns: dict | None = None
    match: str | None = None
    limit: int | None = None

    def settings(self) -> dict:
        """What the results depend on beside model and data: everything that is set."""
        names = ("data_split", "data_config", "columns", "match", "limit")
        own = {name: getattr(self, name) for name in names if getattr(self, name) not in (None, "train")}
        return {**own, **{name: value for name, value in self.options.items() if value not in (None, "", {})}}


@dataclass(frozen=True)
class Row:
    """One row as it was read, its place (file and 1-based row), and what a check made of it."""

    source: str
    number: int
    values: dict

    def error(self, reason: str) -> DataError:
        return DataError(f"{self.source}, row {self.number}: {reason}")


# ---- the file of a suite

COUNT, TEXT, FLAG, SETTINGS, NAME = "a whole number from 1 on", "a string", "true or false", "a mapping", "one of "
SCORED = {"eval_block_length": (None, "a whole number from 0 on")}
ASKED = {
    "puzzle": (None, f"{NAME}arithmetic, countdown, sudoku"),
    "rows": (100, COUNT),
    "puzzle_options": ({}, SETTINGS),
    "verify": (None, NAME + ", ".join(VERIFIERS)),
    "chat": (True, FLAG),
    "template": ("{context}\n{question}", TEXT),
    "max_new_tokens": (None, COUNT),
    "decoding": ({}, SETTINGS),
}
KINDS = {
    "text": {"max_length": (512, COUNT), "rolling_context": (None, COUNT), **SCORED},
    "choice": {"delimiter": (None, TEXT), "suffix": ("", TEXT), **SCORED},
    "cloze": {"delimiter": (None, TEXT), **SCORED},
    "pairs": {**SCORED},
    "generation": ASKED,
    "presets": {**ASKED, "presets": ("cfg", SETTINGS)},
    "statistics": {
        **{"rows": (32, COUNT), "max_new_tokens": (128, COUNT), "chat": (False, FLAG)},
        "decoding": ({"temperature": 1.0}, SETTINGS),
    },
    "speed": {
        **{"max_new_tokens": (128, COUNT), "repeats": (3, COUNT), "chat": (True, FLAG)},
        "decoding": ({}, SETTINGS),
    },
}
COMMON = ("name", "kind", "language", "data", "data_split", "data_config", "columns", "match", "limit")


def read_suite(path: str | Path) -> tuple[str, list[Task]]:
    """
    The description and the tasks of a YAML or JSON file `{"description": …, "tasks": [{…}, …]}`.

    Raises:
        `ValueError`: naming file and task, for whatever is missing, unknown, of another type, or there twice.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"`suite` must be a YAML or JSON file, got {path}, which does not exist")
    try:
        content = yaml.safe_load(path.read_text("utf-8"))  # JSON is YAML
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"`suite` must be a YAML or JSON file, got {path}: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("tasks"), list) or not content["tasks"]:
        raise ValueError(f"`suite` must hold a list of `tasks`, got none in {path}")
    if unknown := sorted(set(content) - {"description", "tasks"}):
        raise ValueError(f"`suite` must hold `description` and `tasks`, got `{unknown[0]}` in {path}")
    tasks = [parse_task(item, f"{path}, task {number}") for number, item in enumerate(content["tasks"], start=1)]
    names = [task.name.lower() for task in tasks]  # some file systems don't know case
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"`name` must be another for each task, got {twice[0]!r} twice in {path}")
    return str(content.get("description", "")), tasks


def parse_task(item: Any, place: str) -> Task:
    """One task from its mapping; `place` begins the messages of its errors."""

    def wrong(name: str, rule: str, value: Any) -> ValueError:
        return ValueError(f"{place}: `{name}` must be {rule}, got {value!r}")

    if not isinstance(item, dict):
        raise ValueError(f"{place}: must be a mapping, got {type(item).__name__}")
    name, kind = item.get("name"), item.get("kind")
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name, re.A):
        raise wrong("name", "of letters, digits, _, - and .", name)
    place = f"{place} ({name})"
    if kind not in KINDS:
        raise wrong("kind", f"one of {', '.join(KINDS)}", kind)
    if unknown := [key for key in item if key not in KINDS[kind] and key not in COMMON]:
        raise wrong(unknown[0], f"no setting of a {kind} task: its own are {', '.join(KINDS[kind])}", item[unknown[0]])
    rules = {key: TEXT for key in ("data", "data_split", "data_config", "match")}
    rules |= {"limit": COUNT, "columns": SETTINGS, "language": f"{NAME}{', '.join(LANGUAGES)}"}
    rules |= {key: rule for key, (_, rule) in KINDS[kind].items()}
    for key, rule in rules.items():
        if key in item and not _fits(item[key], rule) and not (key == "presets" and item[key] in PRESETS):
            raise wrong(key, rule, item[key])
    options = {key: item.get(key, default) for key, (default, _) in KINDS[kind].items()}
    common = {key: item[key] for key in COMMON if item.get(key) is not None}
    task = Task(**common, options=_completed(kind, options, item, wrong))
    if task.data is None and kind in ("text", "choice", "cloze", "pairs"):
        raise wrong("data", "given", None)
    return task


def _fits(value: Any, rule: str) -> bool:
    if rule.startswith("a whole number"):
        return isinstance(value, int) and not isinstance(value, bool) and value >= (1 if rule == COUNT else 0)
    if rule.startswith(NAME):
        return value in rule.removeprefix(NAME).split(", ")
    return isinstance(value, {TEXT: str, FLAG: bool, SETTINGS: dict}[rule])


def _completed(kind: str, options: dict, item: dict, wrong: Callable) -> dict:
    """What follows from other options: the verifier, the presets by name; and what contradicts them."""
    if "puzzle" in options:
        if (options["puzzle"] is None) == (item.get("data") is None):
            raise wrong("puzzle", "given where there is no `data`, and only there", options["puzzle"])
        if options["puzzle"] is None and (made := [name for name in ("rows", "puzzle_options") if name in item]):
            raise wrong(made[0], "of a `puzzle`", item[made[0]])
        options["verify"] = options["verify"] or options["puzzle"] or "exact"
        if options["puzzle"] not in (None, options["verify"]):
            raise wrong("verify", f"that of the puzzle, {options['puzzle']!r}", options["verify"])
        if options["puzzle"] is None:
            options.update(rows=None)
    if kind == "statistics" and item.get("data") is not None:
        if "rows" in item:
            raise wrong("rows", "left out where `data` has the prompts", item["rows"])
        options.update(rows=None)
    if "presets" in options:
        presets = options["presets"]
        options["presets"] = PRESETS[presets] if isinstance(presets, str) else presets
        if bare := [
            name for name in options["presets"] if not isinstance(name, str)
        ]:  # YAML's off and on are no words
            raise wrong("presets", "mappings by name (in quotes, where YAML reads a name otherwise)", bare[0])
        if len(options["presets"]) < 2 or not all(isinstance(part, dict) for part in options["presets"].values()):
            raise wrong("presets", f"two or more mappings by name, or {' or '.join(PRESETS)}", presets)
    return options


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
    from nanollada.scripts.puzzles import make_rows

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
        `DataError`: at a broken row. `ValueError`: for no data or no rows.
    """
    spec = task.data
    if base is not None and (FILE.search(spec) or (Path(base) / spec).exists()):
        spec = str(Path(base) / spec)
    source = resolve_source(spec, SourceArguments(data_config=task.data_config, data_split=task.data_split))
    rows = [_renamed(Row(name, number, _decoded(name, number, raw)), task) for name, number, raw in _raw(source)]
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
    return hashlib.sha256(_json(values).encode()).hexdigest()


def _json(values: Any) -> str:
    return json.dumps(values, ensure_ascii=False, sort_keys=True, default=str)


def _raw(source):
    """(file, row, raw row); datasets with all of their columns."""
    if source.files and all(re.search(r"\.(jsonl|txt)(\.gz|\.xz)?$", file, re.I) for file in source.files):
        yield from source.raw_rows()
        return
    import datasets

    for file in source.files or (None,):
        kind = Path(file or "").suffix.lstrip(".").lower()
        table = source.load(False) if file is None else datasets.load_dataset(kind, data_files=file, split="train")
        yield from ((file or source.spec, number, row) for number, row in enumerate(table, start=1))


def _decoded(name: str, number: int, raw: Any) -> dict:
    try:
        value = raw if not isinstance(raw, bytes) else {"text": raw.decode()} if ".txt" in name else json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}, row {number}: bad JSON: {error}") from error
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
    if not isinstance(value, str):
        raise row.error(f"`{name}` must be a string, got {type(value).__name__}")
    if not allow_empty and not value.strip():
        raise row.error(f"`{name}` must not be empty, got {value!r}")
    return value


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
        names, choices = list(choices["label"]), choices["text"]
        label = names.index(label) if label in names else label
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
    """`ctx` (or `context`) and `answer`; or LAMBADA's own `text`, whose last word is the answer."""
    if "answer" not in row.values and "text" in row.values:
        context, blank, answer = _text(row, "text").strip().rpartition(" ")
        if not blank:
            raise row.error("`text` must have two words or more to ask for the last one")
        return {"ctx": context, "answer": answer}
    return {"ctx": _text(row, "ctx" if "ctx" in row.values else "context"), "answer": _text(row, "answer")}


def _check_pairs(row: Row, task: Task) -> dict:
    good, bad = _text(row, "good"), _text(row, "bad")
    if good == bad:
        raise row.error(f"`good` and `bad` must differ, got {good!r} for both")
    named = {name: _string(row, name, row.values[name]) for name in ("task", "group") if name in row.values}
    return {"good": good, "bad": bad, **named}


def _check_question(row: Row, task: Task) -> dict:
    """`prompt` of a question (a text or messages), its `answers`, and what a puzzle's verifier needs."""
    values, chat = row.values, task.options["chat"]
    if "question" in values:
        context = _text(row, "context") if "{context}" in task.options["template"] else ""
        parts = {"context": context, "question": _text(row, "question")}
        prompt = re.sub(r"\{(context|question)\}", lambda name: parts[name[1]], task.options["template"])
        answers = values.get("answers", values.get("answer"))
        answers = answers.get("text") if isinstance(answers, dict) else answers  # as SQuAD and CMRC nest them
        answers = [answers] if isinstance(answers, str) else answers
        if not isinstance(answers, list) or not answers:
            raise row.error(f"`answers` must be a list of one or more strings, got {answers!r}")
        answers = [_string(row, f"answers[{i}]", answer) for i, answer in enumerate(answers)]
    elif "answer" in values and "prompt" in values and "completion" not in values:
        prompt, answers = values["prompt"], [_text(row, "answer")]
    else:
        return {**_data_room(row), **_puzzle(row, task)}
    turn = {"role": "assistant", "content": answers[0]}
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": _string(row, "prompt", prompt)}]
    plain = not chat and isinstance(prompt, str)
    asked = {"prompt": prompt, "completion": answers[0]} if plain else {"messages": [*messages, turn]}
    return {**_data_room(Row(row.source, row.number, asked)), "answers": answers, **_puzzle(row, task)}


def _data_room(row: Row) -> dict:
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
    return {"asked": asked, "answers": [answer]}


def _puzzle(row: Row, task: Task) -> dict:
    """The columns that the verifier reads, checked."""
    from nanollada.scripts.corpus import count_solutions

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
        _data_room(Row(row.source, row.number, {"messages": [*prompt, {"role": "assistant", "content": "."}]}))
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
