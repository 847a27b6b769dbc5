"""Every format and every kind of broken row, from every kind of source."""

import gzip
import json
import lzma
import re

import datasets
import pytest

from nanollada.trainers.data.files import DataError
from nanollada.trainers.data.formats import Example, parse_row
from nanollada.trainers.data.prepare import DataArguments, prepare_data
from nanollada.trainers.data.sources import (
    SHOWN_REJECTIONS,
    RowPolicy,
    SourceArguments,
    read_examples,
    resolve_source,
    resolve_sources,
)

USER = {"role": "user", "content": "Hi?"}
ANSWER = {"role": "assistant", "content": "Yes."}


def calling(call):
    return {"role": "assistant", "tool_calls": [call]}


def read(spec, policy=None, **kwargs):
    args = SourceArguments(data=[str(spec)], **kwargs)
    return list(read_examples(resolve_source(str(spec), args), policy or RowPolicy()))


def write_jsonl(path, *lines):
    lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


GOOD = [
    ({"text": "a", "source": 1, "messages": None}, {"text": "a"}),
    ({"conversations": [USER, ANSWER]}, {"messages": (USER, ANSWER)}),
    ({"messages": [USER, ANSWER], "text": "rendered"}, {"messages": (USER, ANSWER)}),
    ({"prompt": "2+2=", "completion": "4"}, {"prompt": "2+2=", "completion": "4"}),
    ({"prompt": [USER], "completion": [ANSWER]}, {"messages": (USER, ANSWER), "num_context": 1}),
    ({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}, {"num_context": 3}),
    ({"instruction": "Hi?", "output": "Yes."}, {"messages": (USER, ANSWER)}),
    ({"instruction": "Hi?", "input": "", "output": "Yes."}, {"messages": (USER, ANSWER)}),
    ({"instruction": "Add.", "input": "1 2", "output": "3"}, {"messages": ("Add.\n1 2", "3")}),
    ({"messages": [{"role": "system", "content": ""}, {**USER, "tool_calls": None}, ANSWER]}, {}),
]


@pytest.mark.parametrize(("row", "expected"), GOOD)
def test_formats(tmp_path, row, expected):
    (example,) = read(write_jsonl(tmp_path / "rows.jsonl", row))
    for name, value in expected.items():
        if name == "messages" and isinstance(value[0], str):
            assert tuple(message["content"] for message in example.messages) == value
        else:
            assert getattr(example, name) == value
    assert example.format == ("pretrain" if example.text else "sft")
    assert all(None not in message.values() for message in example.messages or ())


BROKEN = [
    (b'{"text": "a"', "bad JSON"),
    (b"not json", "bad JSON"),
    (b"[" * 100_000, "bad JSON"),
    (b'{"text": "\xff"}', "invalid UTF-8"),
    (b'{"text": "\\ud83d"}', "invalid UTF-8: `text`"),
    (["text"], "wrong type: a row must be an object, got list"),
    ({"content": "a"}, r"missing field: expected .* got \['content'\]"),
    ({"text": None}, "null value: `text` is null"),
    ({"text": None, "messages": None, "id": None}, "null value: `text` is null, `messages` is null"),
    ({"prompt": "a", "completion": None}, "null value: `completion` is null"),
    ({"prompt": "a"}, "missing field: `completion`"),
    ({"completion": "a"}, "missing field: `prompt`"),
    ({"instruction": "a"}, "missing field: `output`"),
    ({"output": "a"}, "missing field: `instruction`"),
    ({"messages": [{"role": "user"}]}, r"missing field: `messages\[0\].content`"),
    ({"conversations": [{"from": "human", "value": "a"}]}, "no answer"),
    ({"conversations": [{"from": "human"}]}, r"missing field: `conversations\[0\].value`"),
    (
        {"conversations": [{"from": 1, "value": "a"}]},
        r"wrong type: `conversations\[0\].from` must be a string, got int",
    ),
    (
        {"conversations": [{"from": "function_call", "value": "{}"}]},
        r"unknown role: `conversations\[0\].from` must be one of human, gpt, .*, got 'function_call'",
    ),
    ({"messages": [{"from": "human", "value": " "}, ANSWER]}, r"empty text: `messages\[0\].content`"),
    ({"text": 5}, "wrong type: `text` must be a string, got int"),
    ({"text": ["a"]}, "wrong type: `text` must be a string, got list"),
    ({"messages": "a"}, "wrong type: `messages` must be a list of messages, got str"),
    ({"messages": ["a"]}, r"wrong type: `messages\[0\]` must be an object, got str"),
    ({"messages": [USER, {"role": "assistant", "content": 1}]}, r"wrong type: `messages\[1\].content`"),
    ({"prompt": "a", "completion": [ANSWER]}, "wrong type: `prompt` and `completion` must both be"),
    ({"instruction": "a", "input": 3, "output": "b"}, "wrong type: `input`"),
    ({"text": ""}, "empty text: `text`"),
    ({"text": " \n\t"}, "empty text: `text`"),
    ({"prompt": "", "completion": "a"}, "empty text: `prompt`"),
    ({"prompt": "a", "completion": " "}, "empty text: `completion`"),
    ({"messages": [USER, {"role": "assistant", "content": ""}]}, r"empty text: `messages\[1\].content`"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "unknown role: .* got 'robot'"),
    ({"messages": [USER, calling({"name": "f"})]}, r"missing field: `messages\[1\].tool_calls\[0\].arguments`"),
    ({"messages": [USER, calling({"function": 1})]}, r"wrong type: `messages\[1\].tool_calls\[0\].function`"),
    ({"messages": [USER, calling({"name": "f", "arguments": "{"})]}, r"bad JSON: `messages\[1\].tool_calls\[0\].arg"),
    ({"messages": [USER, calling({"name": "f", "arguments": "1"})]}, r"wrong type: .* an object or its JSON, got '1'"),
    ({"messages": [{**USER, "tool_calls": [{}]}, ANSWER]}, r"wrong role: `messages\[0\].tool_calls` .* 'user'"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": []}]}, r"missing field: `messages\[1\].content`"),
    ({"messages": [USER]}, "no answer"),
    ({"messages": []}, "no answer"),
    ({"prompt": [USER, ANSWER], "completion": [USER]}, "no answer"),
]


@pytest.mark.parametrize(("line", "message"), BROKEN)
def test_broken_rows_stop(tmp_path, line, message):
    path = write_jsonl(tmp_path / "rows.jsonl", {"text": "good"}, b"", line)
    with pytest.raises(DataError, match=f"rows.jsonl, row 3: {message}"):
        read(path)


@pytest.mark.parametrize(("line", "message"), BROKEN)
def test_broken_rows_are_skipped_and_counted(tmp_path, line, message, caplog):
    policy = RowPolicy("skip")
    path = write_jsonl(tmp_path / "rows.jsonl", {"text": "good"}, line, {"text": "also good"}, line)
    assert [example.text for example in read(path, policy)] == ["good", "also good"]
    assert dict(policy.counts) == {message.split(":")[0]: 2}
    assert "rows.jsonl, row 2" in caplog.text and "rows.jsonl, row 4" in caplog.text


def test_only_the_first_skipped_rows_are_logged(tmp_path, caplog):
    policy = RowPolicy("skip")
    read(write_jsonl(tmp_path / "rows.jsonl", *[{"text": ""}] * 30), policy)
    assert policy.counts["empty text"] == 30
    assert len(caplog.records) == SHOWN_REJECTIONS
    assert "counted, not shown" in caplog.records[-1].message


def test_invalid_utf8_in_txt(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\n\nb\xe4d\n")
    with pytest.raises(DataError, match="a.txt, row 3: invalid UTF-8"):
        read(tmp_path / "a.txt")


TEXT = "\ufeffone\n two \n\n\nthree\r\n   \nfour"


@pytest.mark.parametrize(
    ("sample_by", "expected"),
    [
        ("paragraph", [(1, "one\n two "), (5, "three"), (7, "four")]),
        ("line", [(1, "one"), (2, " two "), (5, "three"), (7, "four")]),
        ("document", [(1, "one\n two \n\n\nthree\n   \nfour")]),
    ],
)
def test_txt(tmp_path, sample_by, expected):
    (tmp_path / "a.txt").write_bytes(TEXT.encode())
    assert [(ex.row, ex.text) for ex in read(tmp_path / "a.txt", sample_by=sample_by)] == expected


def test_byte_order_mark_and_blank_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}')
    assert [(ex.source, ex.row, ex.text) for ex in read(path)] == [(str(path), 1, "a"), (str(path), 3, "b")]


@pytest.mark.parametrize(("suffix", "opener"), [(".gz", gzip.open), (".xz", lzma.open)])
def test_compressed(tmp_path, suffix, opener):
    path = tmp_path / f"a.jsonl{suffix}"
    with opener(path, "wb") as stream:
        stream.write(b'{"text": "a"}\n' * 1000)
    assert [ex.text for ex in read(path)] == ["a"] * 1000
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match=f"a.jsonl{suffix}, row .*: broken compression"):
        read(path)


def test_globs_are_sorted_and_one_source(tmp_path):
    for name in ("b", "a", "sub/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / f"{name}.jsonl", {"text": name})
    assert [ex.text for ex in read(tmp_path / "*.jsonl")] == ["a", "b"]
    assert [ex.text for ex in read(tmp_path / "**" / "*.jsonl")] == ["a", "b", "sub/c"]


def test_a_missing_file_to_evaluate_on_is_called_so(tmp_path, tokenizer):
    write_jsonl(tmp_path / "a.jsonl", {"text": "a"})
    args = DataArguments(data=[str(tmp_path / "a.jsonl")], eval_data=["none.jsonl"])
    with pytest.raises(ValueError, match="`eval_data` names a file that does not exist: 'none.jsonl'"):
        prepare_data(args, tokenizer)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{}/*.jsonl", "`data` names no file: .* matches nothing"),
        ("{}/none.jsonl", "`data` names a file that does not exist"),
        ("none.txt", "`data` names a file that does not exist"),
        ("./none", "`data` names a file that does not exist"),
        ("{}/a.pdf", "`data` must hold files of these types: .jsonl, .txt"),
        ("{}/a.pdf.gz", "`data` must hold files of these types: .jsonl, .txt"),
        ("hf://models/a/b/c.jsonl", "`data` must spell a file on the Hub hf://datasets/"),
    ],
)
def test_sources_that_are_none(tmp_path, spec, message):
    (tmp_path / "a.pdf").touch()
    (tmp_path / "a.pdf.gz").touch()
    with pytest.raises(ValueError, match=message):
        read(spec.format(tmp_path))


def test_bad_arguments():
    with pytest.raises(ValueError, match="`sample_by` must be 'paragraph', 'line' or 'document', got 'page'"):
        SourceArguments(sample_by="page")
    with pytest.raises(ValueError, match="`on_bad_rows` must be 'stop' or 'skip', got 'fix'"):
        SourceArguments(on_bad_rows="fix")


def test_file_on_the_hub(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "a"})
    calls = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, **k: calls.append((a, k)) or str(path))
    assert [ex.text for ex in read("hf://datasets/me/set@v1/sub/a.jsonl")] == ["a"]
    assert calls == [(("me/set", "sub/a.jsonl"), {"repo_type": "dataset", "revision": "v1"})]


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_name(tmp_path, monkeypatch, streaming):
    made = datasets.Dataset.from_list([{"text": "a", "other": 1}, {"text": None, "other": 2}])
    made.to_parquet(tmp_path / "a.parquet")
    builder = datasets.load_dataset_builder("parquet", data_files=str(tmp_path / "a.parquet"))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *a, **k: builder)
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: calls.append((a, k)) or made)
    with pytest.raises(DataError, match="me/set, row 2: null value: `text` is null"):
        read("me/set", streaming=streaming, data_config="en", data_split="test")
    assert calls == [(("me/set",), {"name": "en", "split": "test", "streaming": streaming})]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["json", "parquet", "csv"])
def test_files_read_by_datasets(tmp_path, kind, streaming):
    made = datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}])
    path = tmp_path / f"a.{kind}"
    if kind == "json":
        path.write_text(json.dumps(made.to_list()))  # an array, as Alpaca's
    else:
        getattr(made, f"to_{kind}")(path)
    examples = read(path, streaming=streaming)
    assert [(ex.row, ex.prompt, ex.completion) for ex in examples] == [(1, "a", "b"), (2, "c", "d")]


@pytest.mark.parametrize("streaming", [False, True])
def test_broken_json_file_is_named(tmp_path, streaming):
    (tmp_path / "a.json").write_text('[{"text": "a"}, {"te')
    with pytest.raises(DataError, match="a.json, row 2: bad JSON: Unterminated string"):
        read(tmp_path / "a.json", streaming=streaming)


def test_saved_folders(tmp_path):
    chat = datasets.Dataset.from_list([{"messages": [USER, {**ANSWER, "extra": "x"}], "id": 1}])
    chat.save_to_disk(tmp_path / "one")
    (example,) = read(tmp_path / "one")
    assert example.messages == (USER, {**ANSWER, "extra": "x"})
    datasets.DatasetDict({"dev": chat}).save_to_disk(tmp_path / "splits")
    assert len(read(tmp_path / "splits", data_split="dev")) == 1
    with pytest.raises(ValueError, match=r"`data_split` must be one of \['dev'\] .* got 'train'"):
        read(tmp_path / "splits")


def test_splits_that_no_source_has(tmp_path):
    """Settings without effect; one source that has splits is enough for them to have one."""
    write_jsonl(tmp_path / "a.jsonl", {"text": "a"})
    table = datasets.Dataset.from_list([{"text": "b"}])
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"dev": table}).save_to_disk(tmp_path / "splits")
    one, splits, file = (str(tmp_path / name) for name in ("one", "splits", "a.jsonl"))
    for sources, idle in (
        ([file], {"data_split": "dev", "data_config": "en"}),
        ([file, one], {"data_split": "dev", "data_config": "en"}),
        ([file, one, splits], {"data_config": "en"}),
        ([file, "me/set"], {}),
    ):
        for name, value in {"data_split": "dev", "data_config": "en"}.items():
            options = SourceArguments(data=sources, **{name: value})
            if name not in idle:
                assert len(resolve_sources(sources, options)) == len(sources)
                continue
            with pytest.raises(ValueError, match=f"`{name}` must be left out .*, got '{value}' for {re.escape(file)}"):
                resolve_sources(sources, options)


@pytest.mark.parametrize("streaming", [False, True])
def test_folder_of_files(tmp_path, streaming):
    write_jsonl(tmp_path / "train.jsonl", {"text": "a"}, {"text": " "})
    with pytest.raises(DataError, match="train.jsonl, row 2: empty text"):
        read(tmp_path, streaming=streaming)


def test_identity_follows_contents(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "a"})
    source = resolve_source(str(path), SourceArguments())
    before = source.identity()
    assert source.identity() == before
    write_jsonl(path, {"text": "b"})  # same size
    assert source.identity() != before


def test_position_depends_on_content_alone():
    chat = parse_row({"messages": [USER, ANSWER]})
    same = parse_row({"instruction": "Hi?", "input": "", "output": "Yes.", "source": "x"})
    assert Example("a", 1, **chat).position == Example("b", 9, **same).position
    positions = [Example("a", i, text=str(i)).position for i in range(4000)]
    assert all(0 <= position < 1 for position in positions)
    assert 360 < sum(position < 0.1 for position in positions) < 440  # 400 ± 2 s.d.
