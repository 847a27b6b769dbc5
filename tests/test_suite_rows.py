"""Suites and rows: what is read, what it becomes, and that every error names its task or its file and row."""

import json

import pytest
import yaml

from nanollada.scripts.suite_rows import KINDS, Task, limited, parse_task, read_rows, read_suite, rows_of
from nanollada.trainers.rows import DataError


def task(kind, **settings):
    return parse_task({"name": "t", "kind": kind, "data": "rows.jsonl", **settings}, "suite.yaml, task 1")


def rows(tmp_path, kind, *values, **settings):
    lines = [value if isinstance(value, str) else json.dumps(value) for value in values]
    (tmp_path / "rows.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return [row.values for row in read_rows(task(kind, **settings), str(tmp_path))[0]]


# ---- the file


def test_tasks_have_defaults_of_their_kind(tmp_path):
    path = tmp_path / "suite.yaml"
    path.write_text(
        "description: ours\ntasks:\n"
        "  - {name: a, kind: choice, data: x.jsonl, language: zh, limit: 7}\n"
        "  - {name: b, kind: presets, puzzle: sudoku}\n"
    )
    description, (a, b) = read_suite(path)
    assert description == "ours" and (a.name, a.language, a.limit) == ("a", "zh", 7)
    assert a.options == {"delimiter": None, "suffix": "", "eval_block_length": None} and a.settings() == {"limit": 7}
    assert b.options["verify"] == "sudoku" and list(b.options["presets"]) == ["off", "on"]
    path.write_text(json.dumps({"tasks": [{"name": "c", "kind": "speed"}]}))
    assert read_suite(path)[1] == [
        Task("c", "speed", {name: default for name, (default, _) in KINDS["speed"].items()})
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("tasks: [", "`suite` must be a YAML or JSON file, got .*suite.yaml: "),
        ("tasks: []", "`suite` must hold a list of `tasks`, got none in .*suite.yaml"),
        ("[1]", "`suite` must hold a list of `tasks`"),
        ({"tasks": [{"name": "a", "kind": "speed"}], "more": 1}, "`suite` must hold .*, got `more` in"),
        ([{"name": "a", "kind": "speed"}, {"name": "A", "kind": "speed"}], "`name` must be another .*, got 'a' twice"),
        ([3], "task 1: must be a mapping, got int"),
        ([{"kind": "speed"}], "task 1: `name` must be of letters.*, got None"),
        ([{"name": "../a", "kind": "speed"}], "task 1: `name` must be of letters.*, got '../a'"),
        ([{"name": "a", "kind": "quiz"}], r"task 1 \(a\): `kind` must be one of text, .*, got 'quiz'"),
        ([{"name": "a", "kind": "text"}], r"`data` must be given, got None"),
        ([{"name": "a", "kind": "text", "data": "x", "suffix": ""}], "`suffix` must be no setting of a text task"),
        (
            [{"name": "a", "kind": "text", "data": "x", "max_length": 0}],
            "`max_length` must be a whole number from 1 on",
        ),
        ([{"name": "a", "kind": "text", "data": "x", "limit": True}], "`limit` must be a whole number .*, got True"),
        ([{"name": "a", "kind": "text", "data": "x", "language": "de"}], "`language` must be one of en, zh, got 'de'"),
        ([{"name": "a", "kind": "generation"}], "`puzzle` must be given where there is no `data`, .* got None"),
        ([{"name": "a", "kind": "generation", "data": "x", "rows": 3}], "`rows` must be of a `puzzle`, got 3"),
        ([{"name": "a", "kind": "generation", "puzzle": "chess"}], "`puzzle` must be one of arithmetic, .*'chess'"),
        (
            [{"name": "a", "kind": "generation", "puzzle": "sudoku", "verify": "qa"}],
            "`verify` must be that of the puzzle, 'sudoku', got 'qa'",
        ),
        ([{"name": "a", "kind": "statistics", "data": "x", "rows": 3}], "`rows` must be left out where `data`"),
        (
            [{"name": "a", "kind": "presets", "puzzle": "sudoku", "presets": "best"}],
            "`presets` must be .*, got 'best'",
        ),
        (
            [{"name": "a", "kind": "presets", "puzzle": "sudoku", "presets": {False: {}, True: {}}}],
            "`presets` must be mappings by name .in quotes, .*, got False",
        ),
        (
            [{"name": "a", "kind": "presets", "puzzle": "sudoku", "presets": {"one": {}}}],
            "`presets` must be two or more mappings",
        ),
    ],
)
def test_suites_that_are_refused(tmp_path, content, message):
    path = tmp_path / "suite.yaml"
    content = {"tasks": content} if isinstance(content, list) else content
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        read_suite(path)


def test_a_suite_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="`suite` must be a YAML or JSON file, got .*x.yaml, which does not exist"):
        read_suite(tmp_path / "x.yaml")


# ---- rows

CHOICE = {"ctx": "a", "choices": ["b", "c"], "label": 1}
ARC = {"ctx": "a", "choices": {"text": ["b", "c"], "label": ["A", "B"]}, "label": "B"}
TURN = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "7"}]


def test_rows_of_every_kind(tmp_path):
    hub = {"premise": "a", "endings": ["b", "c"], "gold": "1", "more": None}
    names = {"ctx": "premise", "choices": "endings", "label": "gold"}
    assert rows(tmp_path, "choice", hub, columns=names) == rows(tmp_path, "choice", CHOICE) == [CHOICE]
    assert rows(tmp_path, "choice", ARC) == [CHOICE]
    cloze = [{"ctx": "He saw a", "answer": "cat."}]
    assert rows(tmp_path, "cloze", {"text": "He saw a cat.\n"}) == rows(tmp_path, "cloze", *cloze) == cloze
    assert rows(tmp_path, "cloze", {"context": "He saw a", "answer": "cat."}) == cloze
    assert rows(tmp_path, "pairs", {"good": "a", "bad": "b", "group": "g", "more": 1}) == [
        {"good": "a", "bad": "b", "group": "g"}
    ]
    assert rows(tmp_path, "speed", {"messages": TURN}) == [{"prompt": TURN[:1]}]
    assert rows(tmp_path, "text", {"text": "a"}) == [{"text": "a"}]


def test_questions_are_asked_as_in_training(tmp_path):
    asked = {"asked": {"messages": tuple(TURN)}, "answers": ["7"]}
    for row in ({"prompt": "q", "answer": "7"}, {"messages": TURN}, {"prompt": TURN[:1], "answer": "7"}):
        assert rows(tmp_path, "generation", row) == [asked]
    plain = {"asked": {"prompt": "q", "completion": "7"}, "answers": ["7"]}
    assert rows(tmp_path, "generation", {"prompt": "q", "answer": "7"}, chat=False) == [plain]
    question = {"context": "c {question}", "question": "q", "answers": {"text": ["7", "8"], "answer_start": [0, 1]}}
    (found,) = rows(tmp_path, "generation", question, verify="qa")
    assert found["answers"] == ["7", "8"] and found["asked"]["messages"][0]["content"] == "c {question}\nq"
    (found,) = rows(tmp_path, "generation", {"question": "q", "answer": "7"}, template="Q: {question}", verify="qa")
    assert found["asked"]["messages"][0]["content"] == "Q: q"


@pytest.mark.parametrize(
    ("kind", "row", "settings", "message"),
    [
        ("choice", {**CHOICE, "label": 2}, {}, "`label` must be from 0 to 1, got 2"),
        ("choice", {**CHOICE, "label": True}, {}, "`label` must be from 0 to 1, got True"),
        ("choice", {**CHOICE, "label": None}, {}, "`label` must be from 0 to 1, got None"),
        ("choice", {**CHOICE, "choices": ["b", " "]}, {}, r"`choices\[1\]` must not be empty, got ' '"),
        ("choice", {**CHOICE, "choices": ["b", 3]}, {}, r"`choices\[1\]` must be a string, got int"),
        ("choice", {**CHOICE, "choices": ["b", "b"]}, {}, "`choices` must differ"),
        ("choice", {**CHOICE, "choices": ["b"]}, {}, "`choices` must be a list of two or more"),
        ("choice", {"choices": ["b", "c"], "label": 0}, {}, "missing field: `ctx`; there are choices, label"),
        ("choice", CHOICE, {"columns": {"ctx": "x"}}, r"missing field: `x` \(`ctx` of task t\)"),
        ("choice", "{", {}, "bad JSON"),
        ("choice", "[1]", {}, "a row must be an object, got list"),
        ("cloze", {"text": "word"}, {}, "`text` must have two words or more"),
        ("cloze", {"ctx": "a", "answer": ""}, {}, "`answer` must not be empty"),
        ("pairs", {"good": "a", "bad": "a"}, {}, "`good` and `bad` must differ, got 'a' for both"),
        ("pairs", {"good": "a", "bad": "b", "group": 3}, {}, "`group` must be a string, got int"),
        ("text", {"text": " "}, {}, "empty text"),
        ("generation", {"text": "a"}, {}, "it must have an answer to compare with, got a plain `text`"),
        ("generation", {"messages": [*TURN, TURN[0]]}, {}, "`messages` must end with the answer"),
        (
            "generation",
            {"question": "q", "context": "c", "answers": []},
            {},
            "`answers` must be a list of one or more",
        ),
        ("generation", {"question": "q", "answers": ["a"]}, {}, "missing field: `context`"),
        ("generation", {"messages": TURN}, {"verify": "sudoku"}, "missing field: `puzzle`"),
        ("generation", {"prompt": "q", "answer": "x"}, {"verify": "arithmetic"}, "`answer` must be a whole number"),
        ("generation", {"prompt": "q", "answer": "1"}, {"verify": "countdown"}, "`numbers` and `target` must be"),
        (
            "generation",
            {"prompt": "q", "answer": "1", "puzzle": "0" * 16},
            {"verify": "sudoku"},
            "`puzzle` must be 16 digits from 0 to 4 with one solution",
        ),
        ("statistics", {"prompt": 3}, {}, "`prompt` must be a string, got int"),
    ],
)
def test_rows_that_are_refused(tmp_path, kind, row, settings, message):
    good = {
        **CHOICE, "text": "some words", "good": "x", "bad": "y", "messages": TURN, "answer": "7",
        "puzzle": "1234341221434320", "numbers": [1], "target": 1, "x": "a",
    }  # fmt: skip
    if kind == "text":
        good = {"text": "some words"}
    with pytest.raises(DataError, match=f"rows.jsonl, row 2: {message}"):
        rows(tmp_path, kind, good, row, **settings)


def test_a_row_that_is_there_twice(tmp_path):
    other = {**CHOICE, "label": 0}
    with pytest.raises(DataError, match="rows.jsonl, row 3: it repeats row 1 of .*rows.jsonl"):
        rows(tmp_path, "choice", CHOICE, other, CHOICE)
    assert len(rows(tmp_path, "text", {"text": "a"}, {"text": "a"})) == 2  # a text may


def test_rows_are_chosen(tmp_path):
    values = [{"ctx": str(i), "choices": ["a", "b"], "label": 0} for i in range(10)]
    chosen = rows(tmp_path, "choice", *values, limit=4)
    assert [row["ctx"] for row in chosen] == ["0", "2", "5", "7"]
    assert [row["ctx"] for row in rows(tmp_path, "choice", *values, match='"ctx": "[37]"')] == ["3", "7"]
    assert limited([1, 2], 5) == [1, 2] and limited(list(range(1000)), 1) == [0]
    with pytest.raises(ValueError, match="`data` must hold rows, got none that t can use in .*rows.jsonl"):
        rows(tmp_path, "choice", *values, match="nothing")


def test_digests_name_the_data(tmp_path):
    import hashlib

    rows(tmp_path, "choice", CHOICE)
    path = tmp_path / "rows.jsonl"
    assert read_rows(task("choice"), str(tmp_path))[1] == hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "rows2.jsonl").write_text(json.dumps({**CHOICE, "label": 0}) + "\n")
    both, digest = read_rows(task("choice", data="rows*.jsonl"), str(tmp_path))
    assert len(both) == 2
    (tmp_path / "rows2.jsonl").write_text(json.dumps({**CHOICE, "ctx": "z"}) + "\n")
    assert read_rows(task("choice", data="rows*.jsonl"), str(tmp_path))[1] != digest
    with pytest.raises(ValueError, match="`data` names a file that does not exist: .*missing.jsonl"):
        read_rows(task("choice", data="missing.jsonl"), str(tmp_path))


def test_datasets_keep_all_of_their_columns(tmp_path):
    import datasets

    table = datasets.Dataset.from_list([{"prompt": "q", "answer": "7", "text": "more"}])
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "saved")
    for data in ("rows.parquet", "saved"):
        (row,) = read_rows(task("generation", data=data), str(tmp_path))[0]
        assert row.values["answers"] == ["7"]


def test_rows_that_are_made():
    made, digest = rows_of(parse_task({"name": "p", "kind": "generation", "puzzle": "sudoku", "rows": 5}, ""), None, 0)
    assert len(made) == 5 and set(made[0].values) == {"asked", "answers", "puzzle"}
    assert (
        rows_of(parse_task({"name": "p", "kind": "generation", "puzzle": "sudoku", "rows": 5}, ""), None, 1)[1]
        != digest
    )
    drawn, _ = rows_of(parse_task({"name": "s", "kind": "statistics", "rows": 9, "limit": 3}, ""), None, 0)
    assert [row.values["prompt"] for row in drawn] == [""] * 3
    asked, _ = rows_of(parse_task({"name": "s", "kind": "speed", "language": "zh"}, ""), None, 0)
    assert [row.values["prompt"] for row in asked] == ["这是什么？"]
    with pytest.raises(ValueError, match="task p: `numbers` must be an option of sudoku"):
        settings = {"puzzle": "sudoku", "puzzle_options": {"numbers": 3}}
        rows_of(parse_task({"name": "p", "kind": "generation", **settings}, ""), None, 0)
