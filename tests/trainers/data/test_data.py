"""From sources to prepared rows: formats, splits, weights, streams, the cache and the report."""

import copy
import json
import os
import pickle
import random

import datasets
import pytest
import yaml

from nanollada.trainers.data import stored
from nanollada.trainers.data.collator import Collator
from nanollada.trainers.data.files import DataError
from nanollada.trainers.data.keyed import RowStream
from nanollada.trainers.data.prepare import DataArguments, prepare_data
from nanollada.trainers.data.tokenizers import train_tokenizer

CONTEXT, EOS = 0, 2


def write_texts(path, count, name="cat", start=0):
    path.write_text("".join(json.dumps({"text": f"The {name} {i} sat."}) + "\n" for i in range(start, start + count)))
    return str(path)


def write_chats(path, count, **last):
    rows = [
        {"conversations": [{"role": "user", "content": f"Is it {i}?"}, {"role": "assistant", "content": "It is " * 3}]}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *([last] if last else [])]))
    return str(path)


def arguments(*data, **kwargs):
    return DataArguments(data=list(data), **{"max_length": 16, "held_out_fraction": 0.0, **kwargs})


def texts_of(rows, tokenizer):
    """Documents that end in rows of any packing, in order."""
    targets = [label for row in rows for label in row["labels"] if label != -100]
    return tokenizer.decode(targets).split(tokenizer.eos_token)[:-1]


# ---- pretraining and SFT


@pytest.mark.parametrize("streaming", [False, True])
def test_pretraining(tmp_path, tokenizer, streaming):
    path = write_texts(tmp_path / "a.jsonl", 50)
    data = prepare_data(arguments(path, streaming=streaming), tokenizer)
    rows = list(data.train)
    assert data.format == "pretrain" and data.eval is None
    assert isinstance(data.train, RowStream if streaming else datasets.Dataset)
    columns = ["document_ids", "index", "input_ids", "labels", "num_bytes", "position_ids"]
    assert all(sorted(row) == columns and len(row["input_ids"]) == 16 for row in rows)
    assert [row["index"] for row in rows] == list(range(len(rows)))
    assert all(row["input_ids"][0] == CONTEXT or row["labels"][0] == -100 for row in rows)
    complete = texts_of(rows, tokenizer)
    assert complete == [f"The cat {i} sat." for i in range(len(complete))] and len(complete) > 45
    ids = tokenizer([f"The cat {i} sat." for i in range(50)]).input_ids
    report = data.report
    assert report["target_tokens"] + report["dropped_tokens"] == sum(len(document) + 1 for document in ids)
    assert report["target_tokens"] == sum(label != -100 for row in rows for label in row["labels"])
    cut = len(f"The cat {len(complete)} sat.")  # a part of it is in the last row, the rest is dropped
    whole = sum(len(text) for text in complete)
    assert whole <= report["bytes"] == sum(row["num_bytes"] for row in rows) <= whole + cut
    expected = {"sources": [path], "format": "pretrain", "documents": 50, "rows": len(rows), "max_length": 16}
    assert expected.items() <= report.items()
    assert report["skipped_rows"] == {} and report["truncated_rows"] == 0
    json.dumps(report)


@pytest.mark.parametrize("streaming", [False, True])
def test_sft(tmp_path, tokenizer, streaming):
    path = write_chats(tmp_path / "a.jsonl", 5, prompt="1 + 1 =", completion=" 2 " * 40)
    data = prepare_data(
        arguments(path, streaming=streaming, max_length=60), tokenizer, eos_padding="block", block_length=8
    )
    rows = list(data.train)
    assert data.format == "sft" and [row["index"] for row in rows] == list(range(6))
    for i, row in enumerate(rows[:5]):
        assert len(row["input_ids"]) % 8 == 0 and row["labels"][-1] == EOS
        text = tokenizer.decode(row["input_ids"])
        turns = f"<|im_start|>user\nIs it {i}?<|im_end|>\n<|im_start|>assistant\n" + "It is " * 3
        assert text.startswith(turns) and set(text[len(turns) :].split("<|im_end|>")) == {""}
    assert len(rows[5]["input_ids"]) == 60 and rows[5]["labels"][-1] != EOS
    assert data.report["truncated_rows"] == 1 and data.report["dropped_tokens"] == 0
    assert data.report["rows"] == data.report["documents"] == 6
    assert data.report["bytes"] == 5 * 18 + rows[5]["num_bytes"]


def test_last_turn(tmp_path, tokenizer):
    turns = [{"role": role, "content": f"{role} {i}"} for i in range(2) for role in ("user", "assistant")]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns}))
    for which, expected in [("all", ["assistant 0", "assistant 1"]), ("last", ["assistant 1"])]:
        args = arguments(str(tmp_path / "a.jsonl"), assistant_turns=which, max_length=200)
        assert texts_of(prepare_data(args, tokenizer).train, tokenizer) == expected


def test_evaluation_rows_have_no_eos_padding(tmp_path, tokenizer):
    path = write_chats(tmp_path / "a.jsonl", 3)
    data = prepare_data(arguments(path, eval_data=[path], max_length=64), tokenizer, eos_padding="max_length")
    assert all(len(row["input_ids"]) == 64 for row in data.train)
    for trained, scored in zip(data.train, data.eval, strict=True):
        size = len(scored["input_ids"])
        assert scored["input_ids"] == trained["input_ids"][:size] and size < 64
        assert scored["input_ids"][-2] != EOS
    assert data.report["bytes"] == data.report["eval"]["bytes"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("on_bad_rows", ["stop", "skip"])
@pytest.mark.parametrize("eval_too", [False, True])
def test_mixed_formats_are_an_error(tmp_path, tokenizer, streaming, on_bad_rows, eval_too):
    texts = write_texts(tmp_path / "a.jsonl", 20)
    chats = write_chats(tmp_path / "b.jsonl", 3)
    sources = {"eval_data": [chats]} if eval_too else {}
    args = arguments(texts, *([] if eval_too else [chats]), streaming=streaming, on_bad_rows=on_bad_rows, **sources)
    with pytest.raises(DataError, match="b.jsonl, row 1: mixed formats: a row for sft in a run that .* pretrain"):
        list(prepare_data(args, tokenizer).train)


# ---- broken rows


BAD = [b'{"text"', b'{"txt": "a"}', b'{"text": 1}', b'{"text": ""}', b'{"text": "\xff"}']
REASONS = ["bad JSON", "missing field", "wrong type", "empty text", "invalid UTF-8"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("line", "reason"), list(zip(BAD, REASONS, strict=True)))
def test_broken_row_stops(tmp_path, tokenizer, streaming, line, reason):
    path = write_texts(tmp_path / "a.jsonl", 30)
    with open(path, "ab") as stream:
        stream.write(line + b"\n")
    with pytest.raises(DataError, match=f"a.jsonl, row 31: {reason}"):
        list(prepare_data(arguments(path, streaming=streaming), tokenizer).train)


@pytest.mark.parametrize("streaming", [False, True])
def test_broken_rows_are_counted(tmp_path, tokenizer, streaming, caplog):
    path = write_texts(tmp_path / "a.jsonl", 30)
    good = prepare_data(arguments(path), tokenizer)
    lines = open(path, "rb").read().splitlines()
    with open(path, "wb") as stream:
        stream.write(b"\n".join([*BAD, *lines[:10], *BAD, BAD[0], *lines[10:]]))
    data = prepare_data(arguments(path, streaming=streaming, on_bad_rows="skip", held_out_fraction=0.0), tokenizer)
    assert list(data.train) == list(good.train)
    assert data.report["skipped_rows"] == {**dict.fromkeys(REASONS, 2), "bad JSON": 3}
    assert "a.jsonl, row 1: bad JSON" in caplog.text
    assert good.report["target_tokens"] == data.report["target_tokens"]


def test_cached_rows_report_what_was_skipped(tmp_path, tokenizer, caplog):
    path = write_texts(tmp_path / "a.jsonl", 30)
    with open(path, "ab") as stream:
        stream.write(BAD[0])
    args = arguments(path, on_bad_rows="skip")
    first = prepare_data(args, tokenizer)
    caplog.clear()
    second = prepare_data(args, tokenizer)
    assert second.report == first.report
    assert "skipped 1 broken rows: {'bad JSON': 1}" in caplog.text


# ---- the held-out split


def split(tokenizer, *paths, **kwargs):
    args = arguments(*paths, **{"held_out_fraction": 0.3, "max_length": 4, **kwargs})
    data = prepare_data(args, tokenizer, seed=random.randrange(99))
    return texts_of(data.train, tokenizer), texts_of(data.eval, tokenizer), data


def test_held_out_rows_depend_on_content_alone(tmp_path, tokenizer):
    path = write_texts(tmp_path / "a.jsonl", 100)
    train, held_out, data = split(tokenizer, path)
    every = {f"The cat {i} sat." for i in range(100)}
    assert 15 <= len(held_out) <= 45
    assert not set(train) & set(held_out) and len(set(train) | set(held_out)) >= 99  # one may lie in the dropped row
    assert set(train) | set(held_out) <= every
    assert data.report["documents"] + data.report["eval"]["documents"] == 100
    lines = open(path).read().splitlines()
    random.Random(0).shuffle(lines)
    (tmp_path / "b.jsonl").write_text("\n".join(lines[:60]))
    (tmp_path / "c.txt").write_text("\n\n".join(json.loads(line)["text"] for line in lines[60:]))
    _, other, _ = split(tokenizer, str(tmp_path / "c.txt"), str(tmp_path / "b.jsonl"))
    assert sorted(other) == sorted(held_out)
    _, more, _ = split(tokenizer, path, held_out_fraction=0.6)
    assert set(held_out) < set(more)


def test_duplicates_are_on_one_side(tmp_path, tokenizer):
    paths = [write_texts(tmp_path / f"{name}.jsonl", 40) for name in "ab"]
    train, held_out, _ = split(tokenizer, *paths)
    assert not set(train) & set(held_out)
    assert all(held_out.count(text) == 2 for text in held_out)


@pytest.mark.parametrize("streaming", [False, True])
def test_limit_of_held_out_documents(tmp_path, tokenizer, streaming):
    paths = [write_texts(tmp_path / f"{name}.jsonl", 60, name) for name in ("dog", "mat")]
    train, every, _ = split(tokenizer, *paths)
    fewer, held_out, data = split(tokenizer, *paths, max_held_out_documents=8, streaming=streaming)
    assert [text for text in held_out if "dog" in text] == [text for text in every if "dog" in text][:4]
    assert [text for text in held_out if "mat" in text] == [text for text in every if "mat" in text][:4]
    assert fewer == train  # the others are not trained on
    assert data.report["eval"]["documents"] == 8
    if not streaming:
        assert data.report["eval"]["unused_documents"] == len(every) - 8


def test_evaluation_keeps_the_partial_row(tmp_path, tokenizer):
    path = write_texts(tmp_path / "a.jsonl", 3)
    data = prepare_data(DataArguments(eval_data=[path], max_length=16), tokenizer)
    assert data.train is None
    assert texts_of(data.eval, tokenizer) == [f"The cat {i} sat." for i in range(3)]
    report = data.report["eval"]
    assert report["target_tokens"] == sum(len(tokenizer(f"The cat {i} sat.").input_ids) + 1 for i in range(3))
    assert report["bytes"] == 3 * len("The cat 0 sat.") and report["documents"] == 3


def test_eval_data_replaces_the_held_out_part(tmp_path, tokenizer):
    path, other = write_texts(tmp_path / "a.jsonl", 60), write_texts(tmp_path / "b.jsonl", 30, "dog")
    data = prepare_data(arguments(path, eval_data=[other], held_out_fraction=0.5), tokenizer)
    assert data.report["documents"] == 60 and data.report["eval"]["documents"] == 30
    assert data.report["eval"]["sources"] == [other]


# ---- several sources


def test_sources_without_weights_come_in_order(tmp_path, tokenizer):
    paths = [write_texts(tmp_path / f"{name}.jsonl", 20, name) for name in ("dog", "cat")]
    texts = texts_of(prepare_data(arguments(*paths, max_length=4), tokenizer).train, tokenizer)
    names = [text.split()[1] for text in texts]
    assert names == ["dog"] * 20 + ["cat"] * (len(names) - 20) and len(names) >= 39


def weighted(tmp_path, tokenizer, seed=1, **kwargs):
    paths = [write_texts(tmp_path / f"{name}.jsonl", count, name) for name, count in (("dog", 40), ("cat", 200))]
    args = arguments(*paths, data_weights=[3, 1], max_length=4, **kwargs)
    return texts_of(prepare_data(args, tokenizer, seed=seed).train, tokenizer)


def test_weights(tmp_path, tokenizer):
    texts = weighted(tmp_path, tokenizer)
    dogs = [text for text in texts if "dog" in text]
    assert set(texts) >= {f"The dog {i} sat." for i in range(40)} | {f"The cat {i} sat." for i in range(199)}
    assert len(texts) - len(dogs) in (199, 200)  # the last source to be read through is read once
    share = len(dogs) / len(texts)
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / len(texts)) ** 0.5
    assert [text.split()[2] for text in dogs] == [str(i % 40) for i in range(len(dogs))]
    assert weighted(tmp_path, tokenizer, seed=2) != texts


def test_streamed_weights_are_the_same(tmp_path, tokenizer):
    assert weighted(tmp_path, tokenizer, streaming=True) == weighted(tmp_path, tokenizer)


def test_held_out_rows_are_not_repeated_by_weights(tmp_path, tokenizer):
    paths = [write_texts(tmp_path / f"{name}.jsonl", count, name) for name, count in (("dog", 40), ("cat", 200))]
    data = prepare_data(arguments(*paths, data_weights=[3, 1], max_length=4, held_out_fraction=0.3), tokenizer)
    train, held_out = texts_of(data.train, tokenizer), texts_of(data.eval, tokenizer)
    assert len(train) > len(set(train)) and len(held_out) == len(set(held_out))
    assert not set(train) & set(held_out)


# ---- streams


def test_stream_has_the_rows_and_counts_of_prepared_data(tmp_path, tokenizer):
    paths = [write_texts(tmp_path / f"{name}.jsonl", 300, name) for name in ("dog", "cat")]
    prepared = prepare_data(arguments(*paths, held_out_fraction=0.1), tokenizer)
    streamed = prepare_data(arguments(*paths, held_out_fraction=0.1, streaming=True), tokenizer)
    assert list(streamed.eval) == list(prepared.eval)
    assert list(streamed.train) == list(prepared.train)
    assert streamed.report == prepared.report
    assert list(streamed.train) == list(prepared.train)  # a second pass
    assert streamed.report["rows"] == 2 * prepared.report["rows"]


def test_stream_through_a_data_loader(tmp_path, tokenizer):
    from torch.utils.data import DataLoader

    data = prepare_data(arguments(write_texts(tmp_path / "a.jsonl", 100), streaming=True), tokenizer)
    size = len(prepare_data(arguments(str(tmp_path / "a.jsonl")), tokenizer).train)
    batches = list(DataLoader(data.train, batch_size=4, collate_fn=Collator(0), num_workers=1))
    assert [index for batch in batches for index in batch["index"].tolist()] == list(range(size))
    assert list(pickle.loads(pickle.dumps(data.train))) == list(data.train)  # as a worker that isn't forked gets it


def test_stream_is_lazy(tmp_path, tokenizer):
    path = write_texts(tmp_path / "a.jsonl", 2000)
    with open(path, "ab") as stream:
        stream.write(BAD[0])
    data = prepare_data(arguments(path, streaming=True), tokenizer)
    assert next(iter(data.train))["index"] == 0  # the broken last row is far away


# ---- the cache


def test_cache_is_used_and_never_stale(tmp_path, tokenizer, monkeypatch):
    builds = []
    build = stored.build
    monkeypatch.setattr(stored, "build", lambda plan, folder: builds.append(1) or build(plan, folder))
    path = write_texts(tmp_path / "a.jsonl", 40)
    other_template = copy.deepcopy(tokenizer)
    other_template.chat_template = tokenizer.chat_template + " "
    smaller = train_tokenizer(["the cat sat"] * 9, 265)
    padded = copy.deepcopy(tokenizer)
    padded(["a", "b c"], padding=True, truncation=True, max_length=4)  # leaves its settings in the backend

    def made(args=None, tok=tokenizer, **kwargs):
        before = len(builds)
        rows = list(prepare_data(args or arguments(path), tok, **kwargs).train)
        return rows, len(builds) > before

    first, built = made()
    assert built
    assert made() == (first, False)
    assert made(tok=padded) == (first, False)
    assert made(seed=7) == (first, False)  # nothing is drawn without weights
    assert made(arguments(path, max_length=8))[1]
    assert made(arguments(path, held_out_fraction=0.2))[1]
    assert made(tok=smaller)[1]
    assert made(tok=other_template)[1]
    assert made(eos_padding="max_length")[1]
    stat = os.stat(path)
    write_texts(tmp_path / "a.jsonl", 40, "dog")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed, built = made()
    assert built and changed != first and os.stat(path).st_size == stat.st_size


def test_nothing_is_written_beside_the_data(tmp_path, tokenizer):
    path = write_texts(tmp_path / "a.jsonl", 40)
    folder = tmp_path / "saved"
    datasets.Dataset.from_list([{"text": f"The dog {i}"} for i in range(40)]).save_to_disk(folder)
    before = sorted(str(file) for file in tmp_path.rglob("*"))
    prepare_data(arguments(path, str(folder)), tokenizer)
    assert sorted(str(file) for file in tmp_path.rglob("*")) == before


def test_failed_builds_leave_nothing(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = write_texts(tmp_path / "a.jsonl", 40)
    with open(path, "ab") as stream:
        stream.write(BAD[0])
    with pytest.raises(DataError, match="row 41"):
        prepare_data(arguments(path), tokenizer)
    assert list((tmp_path / "cache" / "nanollada").iterdir()) == []


def test_disabled_caching_is_respected(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = write_texts(tmp_path / "a.jsonl", 40)
    expected = list(prepare_data(arguments(path, max_length=7), tokenizer).train)
    datasets.disable_caching()
    try:
        before = sorted((tmp_path / "cache").rglob("*"))
        assert list(prepare_data(arguments(path, max_length=7), tokenizer).train) == expected
        assert sorted((tmp_path / "cache").rglob("*")) == before
    finally:
        datasets.enable_caching()


# ---- arguments


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_length": 1}, "`max_length` must be at least 2, got 1"),
        ({"held_out_fraction": 1.0}, r"`held_out_fraction` must be in \[0, 1\), got 1.0"),
        ({"max_held_out_documents": 0}, "`max_held_out_documents` must be at least 1, got 0"),
        ({"assistant_turns": "first"}, "`assistant_turns` must be 'all' or 'last', got 'first'"),
        (
            {"data": ["a", "b"], "data_weights": [1.0]},
            "`data_weights` must hold one weight per source .* 1 weights for 2",
        ),
        ({"data": ["a"], "data_weights": [0.0]}, r"`data_weights` must be positive, got \[0.0\]"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**kwargs)


def test_arguments_that_do_not_fit_the_data(tmp_path, tokenizer):
    path = write_texts(tmp_path / "a.jsonl", 3)
    with pytest.raises(ValueError, match="`data` or `eval_data` must name at least one source"):
        prepare_data(DataArguments(), tokenizer)
    with pytest.raises(
        ValueError, match="`max_length` must be small enough to fill one row, got 999 for [0-9]+ train"
    ):
        prepare_data(arguments(path, max_length=999), tokenizer)
    with pytest.raises(ValueError, match="nothing to evaluate on: raise `held_out_fraction`"):
        prepare_data(arguments(path, held_out_fraction=1e-9), tokenizer)
    with pytest.raises(ValueError, match="`block_length` must be given with `eos_padding='block'`"):
        prepare_data(arguments(path), tokenizer, eos_padding="block")
    for settings in ({"data_split": "dev"}, {"data_config": "en"}, {"eval_split": "dev", "eval_data": [str(path)]}):
        name = next(iter(settings)).replace("eval_split", "data_split")
        with pytest.raises(ValueError, match=f"`{name}` must be left out where no source has"):
            prepare_data(arguments(path, **settings), tokenizer)
    without_pad = copy.deepcopy(tokenizer)
    without_pad.pad_token = None
    with pytest.raises(ValueError, match="`tokenizer` must be a fast tokenizer with pad and eos tokens"):
        prepare_data(arguments(path), without_pad)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_sources_without_usable_rows(tmp_path, tokenizer, streaming, first):
    good, empty = write_texts(tmp_path / "a.jsonl", 30), tmp_path / "empty.jsonl"
    empty.touch()
    args = arguments(*([empty, good] if first else [good, empty]), streaming=streaming)
    args.data = [str(path) for path in args.data]
    with pytest.raises(ValueError, match="`data` must hold rows.* got none that can be used in .*empty.jsonl"):
        list(prepare_data(args, tokenizer).train)


def test_arguments_from_yaml(tmp_path):
    from trl import TrlParser

    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"data": "a.jsonl", "data_weights": [2], "max_length": 64, "eval_data": ["b"]}))
    (args,) = TrlParser(DataArguments).parse_args_and_config(["--config", str(config), "--max_length", "32"])
    assert (args.data, args.data_weights, args.max_length, args.eval_data) == (["a.jsonl"], [2], 32, ["b"])
