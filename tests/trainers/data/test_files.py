"""What a file spells is what is read: from CSV, JSON, parquet and text, from files, folders and names, in any size."""

import csv
import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from nanollada.trainers.data.files import DataError
from nanollada.trainers.data.sources import RowPolicy, SourceArguments, read_examples, resolve_source

# What readers of tables take for numbers, dates, truths or nothing.
VALUES = ["007", "1.10", "True", "1e3", "+5", "null", "NA", "None", "N/A", "nan", "NaN", "#N/A", "inf", "-0", "1_000"]
VALUES += [
    "2024-01-01",
    "2024-01-01T00:00:00Z",
    "12:30",
    "9" * 30,
    " 5",
    "5 ",
    "0x1F",
    "1,5",
    'a "b"',
    "<NA>",
    "\ttab",
]
VALUES += [
    "two\nlines",
    "two\r\nlines",
    "one\rtwo",
    "line\u2028separator",
    "nul\x00byte",
    "ﬁ ﷺ 汉字 🙂",
    "=1+1",
    "#a",
    "a\\b",
]
MANY = 10_000  # rows in which `datasets` reads a CSV file at a time
AGAIN = [*VALUES, "word"]


def read(spec, policy=None, **kwargs):
    args = SourceArguments(data=[str(spec)], **kwargs)
    return list(read_examples(resolve_source(str(spec), args), policy or RowPolicy()))


def write_csv(path, *records):
    with open(path, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(records)
    return path


@pytest.fixture(params=["all", "streaming"])
def streaming(request):
    return request.param == "streaming"


@pytest.mark.parametrize("before", [[], ["word"] * MANY, ["7"] * MANY], ids=["alone", "words", "numbers"])
@pytest.mark.parametrize(
    "place", ["rows.csv", "folder/train.csv", "folder/train.tsv", "rows.json", "folder/train.json"]
)
def test_what_is_written_is_what_is_read(tmp_path, place, before, streaming):
    path, texts = tmp_path / place, [*before, *AGAIN]
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps([{"text": text} for text in texts]))
    else:
        with open(path, "w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([["id", "text"], *enumerate(texts)])
    spec = path if path.parent == tmp_path else path.parent
    examples = read(spec, streaming=streaming)
    assert [example.text for example in examples] == texts
    assert (examples[-1].source, examples[-1].row) == (str(path), len(texts))


@pytest.mark.parametrize("fields", [("prompt", "completion"), ("instruction", "input", "output")])
def test_every_field_is_text(tmp_path, fields, streaming):
    """Values of all kinds in a column, and columns that are all dates or all numbers."""
    for rows in ([[value] * len(fields) for value in VALUES], [["2024-01-01"] * len(fields)], [["1"] * len(fields)]):
        write_csv(tmp_path / "a.csv", fields, *rows)
        for example, row in zip(read(tmp_path / "a.csv", streaming=streaming), rows, strict=True):
            if fields[0] == "prompt":
                assert [example.prompt, example.completion] == row
            else:
                assert [message["content"] for message in example.messages] == ["\n".join(row[:2]), row[2]]


def test_an_empty_cell_is_absent(tmp_path, streaming):
    (tmp_path / "a.csv").write_text('instruction,input,output,text\nAdd.,,3,\nAdd.,"",3,\n\n,,,a\n"",1,3,\n')
    with pytest.raises(DataError, match="a.csv, row 4: null value: `instruction` is null"):
        read(tmp_path / "a.csv", streaming=streaming)
    policy = RowPolicy("skip")
    first, second, third = read(tmp_path / "a.csv", policy, streaming=streaming)
    assert first.messages == second.messages and first.messages[0]["content"] == "Add."
    assert third.text == "a" and policy.counts == {"null value": 1}


def test_marks_and_ends_of_lines(tmp_path):
    for start in (b"", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n"):
        for end in (b"\n", b"\r\n", b"\r"):
            (tmp_path / "a.csv").write_bytes(start + end.join([b"text", b'"a ""b"""', b"", b"c"]))
            assert [(example.row, example.text) for example in read(tmp_path / "a.csv")] == [(1, 'a "b"'), (2, "c")]
    (tmp_path / "a.csv").write_text("text\n" + "long " * 50_000 + "\n")  # more than `csv` takes of itself
    assert len(read(tmp_path / "a.csv")[0].text) == 250_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.csv: a .csv file must begin with the names of its columns, got an empty file"),
        (b"text,text\na,b\n", "a.csv: the header must name each column once, got 'text' twice"),
        (b"instruction,output, input\na,b,c\n", "a.csv: the header must name columns without spaces .*, got ' input'"),
        (b"\xff\xfet\x00e\x00x\x00t\x00\n\x00a\x00", r"a.csv: the header must be UTF-8, got '\\udcff\\udcfet"),
        (b"text,id\na,1\nb,2,3\n", "a.csv, row 2: wrong number of cells: 3 for 2 columns"),
        (b"text,id\na,1,\nb,2,\n", "a.csv, row 1: wrong number of cells: 3 for 2 columns"),
        (b"text,id\na,1\nb\n", "a.csv, row 2: wrong number of cells: 1 for 2 columns"),
        (b"text;id\na;1\n", r"a.csv, row 1: missing field: expected .* got \['text;id'\]"),
        (b'text\na\n"b\nc\n', "a.csv, row 2: broken CSV at line 4: unexpected end of data"),
        (b'text\na\n"b"c\n', "a.csv, row 2: broken CSV at line 3: ',' expected after '\"'"),
        (b"text\na\nb\xe4d\n", "a.csv, row 2: invalid UTF-8: `text`"),
        (b'messages\n"[{""role"": ""user"", ""content"": ""a""}]"\n', "row 1: .*`messages` must be a list .* got str"),
    ],
)
def test_broken_csv_is_named(tmp_path, content, message, streaming):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.csv", streaming=streaming)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=f"folder.{message}" if message.startswith("a.csv") else message):
        read(tmp_path / "folder", streaming=streaming)


def test_broken_records_are_skipped(tmp_path):
    policy = RowPolicy("skip")
    (tmp_path / "a.csv").write_bytes(b"text,id\na,1\nb\nc,1,2\nd\xff,4\ne,5\n")
    assert [(example.row, example.text) for example in read(tmp_path / "a.csv", policy)] == [(1, "a"), (5, "e")]
    assert policy.counts == {"wrong number of cells": 2, "invalid UTF-8": 1}


# ---- JSON


def in_json(path, lines, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows, indent=2), encoding="utf-8")
    return path


@pytest.mark.parametrize("place", ["rows.json", "folder/rows.json"])
@pytest.mark.parametrize("lines", [True, False])
@pytest.mark.parametrize(
    ("last", "message"),
    [
        ({"text": 5}, "wrong type: `text` must be a string, got int"),
        ({"text": 1.5}, "wrong type: `text` must be a string, got float"),
        ({"text": True}, "wrong type: `text` must be a string, got bool"),
        ({"prompt": "a", "completion": 10**30}, "wrong type: `prompt` and `completion` must both be strings"),
        ({"instruction": "a", "input": 5, "output": "b"}, "wrong type: `input` must be a string, got int"),
        (
            {"messages": [{"role": "user", "content": 5}]},
            r"wrong type: `messages\[0\].content` must be a string, got int",
        ),
        ("a", "wrong type: a row must be an object, got str"),
        ([{"text": "a"}], "wrong type: a row must be an object, got list"),
    ],
)
def test_a_number_in_json_is_no_text(tmp_path, place, lines, last, message, streaming):
    path = in_json(tmp_path / place, lines, [{"text": "word"}, {"text": "007"}, last])
    spec = path if path.parent == tmp_path else path.parent
    with pytest.raises(DataError, match=f"rows.json, row 3: {message}"):
        read(spec, streaming=streaming)


def test_large_json_has_no_chunks(tmp_path, streaming):
    """Behind 10 MB of words `datasets` casts to what it saw there: 5 → "5", "2024-01-01" → '"2024-01-01"'."""
    path = in_json(tmp_path / "a.json", True, [{"text": "word" * 1000}] * 3000 + [{"text": "2024-01-01"}, {"text": 5}])
    with pytest.raises(DataError, match="a.json, row 3002: wrong type: `text` must be a string, got int"):
        read(path, streaming=streaming)
    assert read(path, RowPolicy("skip"), streaming=streaming)[-1].text == "2024-01-01"


def test_chats_of_json_are_as_written(tmp_path, streaming):
    chat = [{"role": "user", "content": "2024-01-01"}, {"role": "assistant", "content": "7", "n": 10**30, "at": "1:2"}]
    for lines in (True, False):
        path = in_json(
            tmp_path / "a.json", lines, [{"messages": chat}, {"messages": chat[:1] + [{**chat[1], "n": "x"}]}]
        )
        first, second = read(path, streaming=streaming)
        assert first.messages == tuple(chat) and second.messages[1]["n"] == "x"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"}, {"te', "row 2: bad JSON: Unterminated string"),
        ('[{"text": "a"} {"text": "b"}]', "row 1: bad JSON: neither comma nor ] after it"),
        ('[{"text": "a"},]', "row 2: bad JSON: Expecting value"),
        ('[{"text": "a"}', "row 1: bad JSON: neither comma nor ] after it"),
        ('[{"text": "a"}] {"text": "b"}', "row 2: bad JSON: more text after the array"),
        ("[" * 100_000, "row 1: bad JSON: maximum recursion depth"),
        ('[{"text": "a", "text": "b"}]', "row 1: bad JSON: `text` stands twice in one object"),
        ('{"text": "a", "text": "b"}', "row 1: bad JSON: `text` stands twice in one object"),
        ('{\n"text": ["a", "b"]\n}', "row 1: bad JSON"),
    ],
)
def test_broken_json_is_named(tmp_path, content, message, streaming):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=f"a.json, {message}"):
        read(tmp_path / "a.json", streaming=streaming)


def test_json_without_rows_and_with_space(tmp_path):
    for content, texts in (
        (b" [ ] ", []),
        (b"", []),
        (b'\xef\xbb\xbf \n[ {"text": "a"}\n,\n{"text":"b"} ]\n', ["a", "b"]),
    ):
        (tmp_path / "a.json").write_bytes(content)
        assert [example.text for example in read(tmp_path / "a.json")] == texts
    (tmp_path / "a.json").write_bytes(b'[{"text": "a\xff"}, {"text": "b"}]')
    with pytest.raises(DataError, match="a.json, row 1: invalid UTF-8"):
        read(tmp_path / "a.json")


# ---- tables with types


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, 2], "int64"),
        ([1.5, None], "float64"),
        ([True, False], "bool"),
        ([b"a", b"b"], "binary"),
        ([["a"], []], "List"),
    ],
)
@pytest.mark.parametrize("column", ["text", "input"])
def test_columns_of_parquet_are_text_or_refused(tmp_path, column, values, kind, streaming):
    table = {"instruction": ["a", "b"], "output": ["a", "b"], column: values, "number": [1, 2]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    message = f"a.parquet: column `{column}` must hold text, got .*{kind}"
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.parquet", streaming=streaming)
    saved = datasets.Dataset.from_parquet(str(tmp_path / "a.parquet"))
    saved.save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=f"saved: column `{column}` must hold text, got .*{kind}"):
        read(tmp_path / "saved", streaming=streaming)


def test_parquet_keeps_its_text(tmp_path, streaming):
    kinds = (
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.dictionary("int32", pyarrow.string()),
    )
    for number, kind in enumerate(kinds):
        table = pyarrow.table({"text": pyarrow.array(["007", "NA", "2024-01-01"], pyarrow.string()).cast(kind)})
        pyarrow.parquet.write_table(table, tmp_path / f"{number}.parquet")
        examples = read(tmp_path / f"{number}.parquet", streaming=streaming)
        assert [example.text for example in examples] == ["007", "NA", "2024-01-01"]


# ---- folders and names


def test_a_folder_reads_as_its_files_do(tmp_path, streaming):
    """Lines of JSON, compressed too, and documents of .txt by `sample_by`, which `datasets` reads line by line."""
    for name, content in (
        ("a/train.jsonl.gz", b'{"text": "1"}\n\n{"text": 5}'),
        ("b/train.txt", b"one\ntwo\n\nthree"),
    ):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(DataError, match="train.jsonl.gz, row 3: wrong type: `text` must be a string, got int"):
        read(tmp_path / "a", streaming=streaming)
    for sample_by, texts in (("paragraph", ["one\ntwo", "three"]), ("line", ["one", "two", "three"])):
        folder, file = (read(spec, sample_by=sample_by) for spec in (tmp_path / "b", tmp_path / "b" / "train.txt"))
        assert [ex.text for ex in folder] == [ex.text for ex in file] == texts
    (tmp_path / "a" / "train.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-12])
    with pytest.raises(DataError, match="train.jsonl.gz, row .*: broken compression"):
        read(tmp_path / "a", streaming=streaming)


def test_splits_of_a_folder(tmp_path, streaming):
    for split in ("train", "test"):
        write_csv(tmp_path / f"{split}.csv", ["text"], *[[f"{split} {i:03}"] for i in range(10)])
    texts = [example.text for example in read(tmp_path, data_split="train[1:3]+test[:10%]", streaming=streaming)]
    assert texts == ["train 001", "train 002", "test 000"]
    for split in ("dev", "train+dev", "dev[:3]"):
        with pytest.raises(ValueError, match=r"`data_split` must be one of \['test', 'train'\] for .*, got 'dev"):
            read(tmp_path, data_split=split, streaming=streaming)
    source = resolve_source(str(tmp_path), SourceArguments(data_split="train[1:3]"))
    before = source.identity()
    write_csv(tmp_path / "test.csv", ["text"], ["a"])
    assert source.identity() == before
    write_csv(tmp_path / "train.csv", ["text"], *[[f"train {i:04}"] for i in range(10)])
    assert source.identity() != before


def test_files_that_no_split_has_are_told(tmp_path, caplog):
    """`datasets` leaves out what is of another kind, and what is not named after a split where others are."""
    for name in ("train.csv", "more.csv", "other.jsonl", "notes.pdf"):
        write_csv(tmp_path / name, ["text"], ["007"])
    assert [example.text for example in read(tmp_path)] == [example.text for example in read(tmp_path)] == ["007"]
    (record,) = [record for record in caplog.records if record.name.endswith("files")]
    assert record.message == f"{tmp_path}: no split has more.csv, other.jsonl; a glob would read all files"


def test_settings_of_a_card(tmp_path):
    """Its delimiter is taken, another setting is refused by name."""
    (tmp_path / "rows.csv").write_text("text;id\n007;1\n")
    card = "---\nconfigs:\n- config_name: one\n  data_files: rows.csv\n  sep: ';'\n  keep_default_na: false\n"
    (tmp_path / "README.md").write_text(f"{card}---\n")
    assert [example.text for example in read(tmp_path, data_config="one")] == ["007"]
    (tmp_path / "README.md").write_text(f"{card}  skiprows: 1\n---\n")
    with pytest.raises(ValueError, match="`data` must be read without `skiprows`, got 1 in the card of"):
        read(tmp_path, data_config="one")


def test_a_name_reads_as_its_files_do(tmp_path, monkeypatch, streaming):
    """A dataset on the Hub, whose files are not local: downloaded, or opened where they lie."""
    import fsspec

    asked = []
    with fsspec.open("memory://me/set/train.csv", "wb") as stream:
        stream.write(b"text,id\n007,1\nNA,2\n2024-01-01\n")
    builder = datasets.load_dataset_builder("csv", data_files={"train": "memory://me/set/train.csv"})
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *a, **k: asked.append((a, k)) or builder)
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", str(tmp_path))
    policy = RowPolicy("skip")
    texts = [example.text for example in read("me/set", policy, streaming=streaming, data_config="en")]
    assert texts == ["007", "NA"] and policy.counts == {"wrong number of cells": 1}
    assert asked == [(("me/set",), {"name": "en"})]
    assert any(tmp_path.iterdir()) != streaming  # downloaded once, or not at all
    assert "memory:///me/set/train.csv" in json.dumps(resolve_source("me/set", SourceArguments()).identity())


def test_what_was_guessed_before_is_not_read_from_the_cache(tmp_path, monkeypatch):
    """Offline `datasets` falls back on its own tables of an earlier run, in which 007 is 7."""
    from datasets.packaged_modules.cache.cache import Cache

    write_csv(tmp_path / "train.csv", ["text"], ["007"])
    made = datasets.load_dataset_builder(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    made.download_and_prepare()
    options = {"dataset_name": made.dataset_name, "hash": "auto", "version": "auto"}
    cached = Cache(cache_dir=str(tmp_path / "cache"), **options)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *a, **k: cached)
    with pytest.raises(ValueError, match="`data` must have its files at hand, .* got only the copy of me/set in the"):
        read("me/set")
