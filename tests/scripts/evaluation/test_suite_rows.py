"""Suites and rows: what is read, what it becomes, and that every error names its task or its file and row."""

import json

import pytest
import yaml

from nanollada.scripts.evaluation.rows import limited, read_rows, rows_of
from nanollada.scripts.evaluation.suite_file import parse_task, read_suite
from nanollada.scripts.evaluation.tasks.speed import SpeedTask
from nanollada.trainers.data.files import DataError


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
    assert (a.delimiter, a.suffix, a.eval_block_length) == (None, "", None) and a.settings() == {"limit": 7}
    assert b.verify == "sudoku" and list(b.presets) == ["off", "on"]
    path.write_text(json.dumps({"tasks": [{"name": "c", "kind": "speed"}]}))
    assert read_suite(path)[1] == [SpeedTask("c", "speed")]


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
            [{"name": "a", "kind": "text", "data": "x", "max_length": 1}],
            "`max_length` must be a whole number from 2 on, got 1",
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


ASKED = {"name": "a", "kind": "generation", "data": "x"}
PUZZLE = {"name": "a", "kind": "generation", "puzzle": "sudoku"}


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({**ASKED, "kind": ["generation"]}, r"`kind` must be one of text, .*, got \['generation'\]"),
        ({**ASKED, "match": "(a"}, r"`match` must be a regular expression, got '\(a'"),
        ({**ASKED, "columns": {"ctx": ["a"]}}, r"`columns` must be a mapping of names to names, got .'ctx': \['a'\]"),
        ({**ASKED, "columns": {True: "a"}}, "`columns` must be a mapping of names to names, got .True: 'a'"),
        ({**ASKED, "template": "Q: {qestion}"}, "`template` must be a string that asks the .question., .* got 'Q: "),
        ({**ASKED, "template": "{context}"}, "`template` must be a string that asks .* got '.context.'"),
        ({**ASKED, "template": "{contxt} {question}"}, "`template` must be a string that .* got '.contxt. "),
        (
            {**PUZZLE, "template": "{question}"},
            "`template` must be left out where there is no `data`, got '.question.'",
        ),
        ({**PUZZLE, "columns": {"a": "b"}}, "`columns` must be left out where there is no `data`"),
        ({**PUZZLE, "match": "a"}, "`match` must be left out where there is no `data`, got 'a'"),
        ({**PUZZLE, "data_split": "test"}, "`data_split` must be left out where there is no `data`, got 'test'"),
        (
            {"name": "a", "kind": "speed", "data_config": "b"},
            "`data_config` must be left out where there is no `data`",
        ),
        (
            {**ASKED, "decoding": {"temprature": 0.7}},
            "`decoding.temprature` must be an option of decoding: temp.* got 0.7",
        ),
        (
            {**ASKED, "decoding": {"num_return_sequences": 2}},
            "`decoding.num_return_sequences` must be an option of .* 2",
        ),
        ({**ASKED, "decoding": {"seed": 3}}, "`decoding.seed` must be an option of decoding: .*, got 3"),
        (
            {**ASKED, "decoding": {"eos_token_id": 3}},
            "`decoding.eos_token_id` must be an option of decoding: .*, got 3",
        ),
        ({**ASKED, "decoding": {"temperature": None}}, "`decoding.temperature` must be left out or set, got None"),
        (
            {**ASKED, "decoding": {"max_new_tokens": 3}},
            "`decoding.max_new_tokens` must be left out: .* of the task .* 3",
        ),
        (
            {**ASKED, "decoding": {"steps": "3"}},
            r"`decoding` must be valid \(`steps` must be an integer >= 1, got '3'",
        ),
        (
            {**ASKED, "decoding": {"low_threshold": 0.3}},
            r"`decoding` must be valid \(`low_threshold` refines `threshold`",
        ),
        (
            {**ASKED, "decoding": {"top_k": 3}},
            r"`decoding` must be valid \(`top_k` needs a `temperature` above 0\), got",
        ),
        (
            {**ASKED, "kind": "presets", "presets": {"a": {}, "b": {"max_new_tokens": 3}}},
            "`presets.b.max_new_tokens` must be left out: it is a setting of the task itself, got 3",
        ),
        (
            {**ASKED, "kind": "presets", "decoding": {"factor": 1.0}, "presets": {"a": {}, "b": {"threshold": 0.9}}},
            r"`presets.b` must be valid \(Only one of `threshold`, `factor`",
        ),
    ],
)
def test_settings_that_are_refused(item, message):
    with pytest.raises(ValueError, match=rf"s.yaml, task 3( \(a\))?: {message}"):
        parse_task(item, "s.yaml, task 3")


def test_decoding_that_is_accepted():
    presets = {"one": {"threshold": 0.9}, "two": {"threshold": 0.8}}
    refined = parse_task({**ASKED, "kind": "presets", "decoding": {"low_threshold": 0.3}, "presets": presets}, "")
    assert refined.presets == presets
    assert parse_task({**ASKED, "decoding": {"temperature": 1, "top_p": 0.9}}, "").decoding["top_p"] == 0.9
    drawn = {"name": "a", "kind": "statistics", "decoding": {"top_k": 5}}  # the checkpoint may have a temperature
    assert parse_task(drawn, "").decoding == {"top_k": 5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "tasks:\n  - {name: a, kind: speed, limit: 5,\n     limit: 50}\n",
            "`limit` must be there once, .* of line 2 of",
        ),
        (
            "tasks:\n  - name: a\n    kind: presets\n    presets: {'x': {}, x: {}}\n",
            "`x` .* got it twice .* of line 4 of",
        ),
        ('{"tasks": [], "tasks": [{"name": "a", "kind": "speed"}]}', "`tasks` must be there once, .* of line 1 of"),
    ],
)
def test_a_key_that_is_there_twice(tmp_path, text, message):
    path = tmp_path / "suite.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{message} .*suite.yaml"):
        read_suite(path)


def test_other_settings_are_other_identities():
    """Nothing that differs from its default is left out, however empty it is."""
    choice, asked = {"name": "a", "kind": "choice", "data": "x"}, {**ASKED, "kind": "statistics"}
    told = [parse_task({**choice, **more}, "").settings() for more in (
        {}, {"delimiter": ""}, {"match": "train"}, {"match": ""}, {"data_config": "train"}, {"data_split": "train"},
        {"suffix": "train"}, {"eval_block_length": 0},
    )]  # fmt: skip
    told += [parse_task({**asked, **more}, "").settings() for more in ({}, {"decoding": {}}, {"chat": False})]
    assert len({json.dumps(settings) for settings in told}) == len(told)
    assert told[:3] == [{}, {"delimiter": ""}, {"match": "train"}]
    assert told[8] == {"max_new_tokens": 128, "decoding": {"temperature": 1.0}}
    assert parse_task({**choice, "suffix": ""}, "").settings() == {}


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
    assert rows(tmp_path, "cloze", {"context": "He saw a", "answer": "cat."}) == cloze
    assert rows(tmp_path, "cloze", *cloze) == cloze
    assert rows(tmp_path, "pairs", {"good": "a", "bad": "b", "group": "g", "more": 1}) == [
        {"good": "a", "bad": "b", "group": "g"}
    ]
    assert rows(tmp_path, "speed", {"messages": TURN}) == [{"prompt": TURN[:1]}]
    assert rows(tmp_path, "text", {"text": "a"}) == [{"text": "a"}]


@pytest.mark.parametrize(
    ("text", "ctx", "gap", "answer"),
    [
        ("He saw a cat.\n", "He saw a", " ", "cat."),
        ("a line ends here.\n\nSecond\nthird", "a line ends here.\n\nSecond", "\n", "third"),
        ("one\n\n two", "one", "\n\n ", "two"),
        ("你好 世界", "你好", " ", "世界"),
        ("你好\u3000世界", "你好", "\u3000", "世界"),
    ],
)
def test_the_last_word_is_behind_the_last_gap(tmp_path, text, ctx, gap, answer):
    for language in ("en", "zh"):
        (row,) = rows(tmp_path, "cloze", {"text": text}, language=language)
        assert row == {"ctx": ctx, "gap": gap, "answer": answer}


def test_arc_labels_are_names_before_they_are_places(tmp_path):
    texts = ["b", "c", "d", "e"]
    for names, label, place in (
        (["1", "2", "3", "4"], 2, 1),
        (["1", "2", "3", "4"], "2", 1),
        ([1, 2, 3, 4], "4", 3),
        (["A", "B", "C", "D"], "C", 2),
        (["A", "B", "C", "D"], 2, 2),
    ):
        (row,) = rows(tmp_path, "choice", {"ctx": "a", "choices": {"text": texts, "label": names}, "label": label})
        assert row == {"ctx": "a", "choices": texts, "label": place}


def test_the_suffix_of_the_file_decides_what_a_row_is(tmp_path):
    folder = tmp_path / "my.txt_files"
    folder.mkdir()
    (folder / "t.jsonl").write_text('{"text": "a"}\n')
    (folder / "U.TXT").write_text("one\n\ntwo\n")
    for name, texts in (("t.jsonl", ["a"]), ("U.TXT", ["one", "two"]), ("*.*", ["one", "two", "a"])):
        found = read_rows(task("text", data=str(folder / name)), None)[0]
        assert [row.values for row in found] == [{"text": text} for text in texts]


def test_files_of_several_kinds_are_one_data_set(tmp_path):
    import datasets

    rows(tmp_path, "choice", CHOICE)
    datasets.Dataset.from_list([{**CHOICE, "ctx": "z"}]).to_parquet(tmp_path / "rows.parquet")
    found = read_rows(task("choice", data=str(tmp_path / "rows.*")), None)[0]
    assert [row.values["ctx"] for row in found] == ["a", "z"]


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
        ("choice", {**CHOICE, "choices": ["b", " "]}, {}, r"empty text: `choices\[1\]`"),
        ("choice", {**CHOICE, "choices": ["b", 3]}, {}, r"wrong type: `choices\[1\]` must be a string, got int"),
        ("choice", {**CHOICE, "choices": ["b", "b"]}, {}, "`choices` must differ"),
        ("choice", {**CHOICE, "choices": ["b"]}, {}, "`choices` must be a list of two or more"),
        ("choice", {"choices": ["b", "c"], "label": 0}, {}, "missing field: `ctx`; there are choices, label"),
        ("choice", CHOICE, {"columns": {"ctx": "x"}}, r"missing field: `x` \(`ctx` of task t\)"),
        ("choice", "{", {}, "bad JSON"),
        ("choice", "[1]", {}, "a row must be an object, got list"),
        (
            "choice",
            {**ARC, "label": 0, "choices": {"text": ["b", "c"], "label": [1, 2]}},
            {},
            "`label` must be among .* 1, 2 ",
        ),
        (
            "choice",
            {**ARC, "choices": {"text": ["b", "c"], "label": None}},
            {},
            "`choices` must have a label for each",
        ),
        ("choice", {**CHOICE, "ctx": "a\ud800"}, {}, "invalid UTF-8: `ctx`: "),
        ("cloze", {"text": "some words"}, {"delimiter": ""}, "`delimiter` of task t must be left out for a `text`"),
        (
            "generation",
            {"messages": TURN},
            {"chat": False},
            "`chat` of task t must be left out for messages, got False",
        ),
        (
            "generation",
            {"prompt": TURN[:1], "answer": "7"},
            {"chat": False},
            "`chat` of task t must be left out for me",
        ),
        (
            "generation",
            {"prompt": "q", "completion": "7"},
            {"chat": True},
            "`chat` of task t must be left out for a `p",
        ),
        (
            "generation",
            {"messages": TURN},
            {"template": "{question}"},
            "`template` of task t must be left out for a row",
        ),
        (
            "statistics",
            {"messages": TURN},
            {"chat": False},
            "`chat` of task t must be left out for messages, got False",
        ),
        ("cloze", {"text": "word"}, {}, "`text` must have two words or more"),
        ("cloze", {"ctx": "a", "answer": ""}, {}, "empty text: `answer`"),
        ("pairs", {"good": "a", "bad": "a"}, {}, "`good` and `bad` must differ, got 'a' for both"),
        ("pairs", {"good": "a", "bad": "b", "group": 3}, {}, "wrong type: `group` must be a string, got int"),
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
        ("statistics", {"prompt": 3}, {}, "wrong type: `prompt` must be a string, got int"),
    ],
)
def test_rows_that_are_refused(tmp_path, kind, row, settings, message):
    good = {
        **CHOICE, "text": "some words", "good": "x", "bad": "y", "messages": TURN, "answer": "7",
        "puzzle": "1234341221434320", "numbers": [1], "target": 1, "x": "a",
    }  # fmt: skip
    if kind == "text":
        good = {"text": "some words"}
    if "delimiter" in settings:
        good = {"ctx": "some", "answer": "words"}
    if "chat" in settings:
        good = {"prompt": "q", "answer": "1"}
    if "template" in settings:
        good = {"question": "q", "answer": "1"}
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
    (tmp_path / "rows2.jsonl").write_text(json.dumps({**CHOICE, "more": "\ud800"}) + "\n")  # what nobody reads
    assert len(read_rows(task("choice", data="rows*.jsonl", match="more"), str(tmp_path))[0]) == 1
    for name in ("data_split", "data_config"):
        with pytest.raises(ValueError, match=f"task t: `{name}` must be left out for files, got 'train'"):
            read_rows(task("choice", **{name: "train"}), str(tmp_path))
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
    for name in ("data_split", "data_config"):
        rule = f"task t: `{name}` must be left out for a saved dataset without them, got 'train'"
        with pytest.raises(ValueError, match=rule):
            read_rows(task("generation", data="saved", **{name: "train"}), str(tmp_path))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", "ctx,label\n1,2\n1,2,3\n", ", row 2: wrong number of cells: 3 for 2 columns"),
        ("a.parquet", "PAR1", ": "),
        ("a.json", '[{"', ", row 1: bad JSON"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=f"{name}{message}"):
        read_rows(task("choice", data=name), str(tmp_path))


def test_cells_of_a_csv_file_are_text(tmp_path):
    (tmp_path / "a.csv").write_text("ctx,good,bad\n1,007,NA\n2,1.10,2024-01-01\n")
    found = read_rows(task("pairs", data="a.csv"), str(tmp_path))[0]
    assert [(row.values["good"], row.values["bad"]) for row in found] == [("007", "NA"), ("1.10", "2024-01-01")]
    (tmp_path / "b.csv").write_text("ctx,answer\n1,007\n2,null\n")
    found = read_rows(task("cloze", data="b.csv"), str(tmp_path))[0]
    assert [row.values["answer"] for row in found] == ["007", "null"]


def test_globs_are_of_the_suite_s_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for number in range(2):
        (tmp_path / "data" / f"{number}.jsonl").write_text(json.dumps({**CHOICE, "ctx": str(number)}) + "\n")
    for data in ("*.jsonl", "*", "[01].json*"):
        assert len(read_rows(task("choice", data=data), str(tmp_path / "data"))[0]) == 2
    uri = "hf://datasets/me/set/a.jsonl"
    monkeypatch.setattr(
        "nanollada.trainers.data.sources._download", lambda spec: spec == uri and str(tmp_path / "data/0.jsonl")
    )
    assert len(read_rows(task("choice", data=uri), str(tmp_path / "data"))[0]) == 1


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
    for name in ("numbers", "side", "count", "seed", "puzzle"):
        settings = {"puzzle": "sudoku", "puzzle_options": {name: "train"}}
        with pytest.raises(
            ValueError, match=f"task p: `{name}` must be an option of sudoku .min_blanks, .* got 'train'"
        ):
            rows_of(parse_task({"name": "p", "kind": "generation", **settings}, ""), None, 0)
