"""The rows of a study: halves that share nothing, a small part of the first, held-out texts of any order."""

import json

import pytest

from nanollada.scripts.studies.rows import held_out_texts, make_tokenizer, split_texts, texts_of


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "texts.jsonl", [{"text": f"text {i}: the cat sat on the mat"} for i in range(40)])


def test_sources_take_turns_and_must_be_texts(tmp_path):
    sources = [write(tmp_path / f"{name}.jsonl", [{"text": name * n} for n in (1, 2)]) for name in "ab"]
    sources.append(write(tmp_path / "c.jsonl", [{"text": "c"}]))
    assert list(texts_of(sources)) == ["a", "b", "c", "aa", "bb"]
    chat = write(tmp_path / "chat.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(ValueError, match="a study trains on plain texts, got .*chat.jsonl, row 1"):
        list(texts_of([chat]))


def test_halves_share_nothing_and_hold_enough(tmp_path, source, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    lengths = [len(tokenizer(text).input_ids) + 1 for text in texts_of([source])]
    goal = sum(lengths[:20])
    facts = split_texts([source], str(tmp_path / "tokenizer"), tmp_path, goal, lengths[0] + 1)
    first, second, small = (read(tmp_path / f"{name}.jsonl") for name in ("first", "second", "small"))
    assert first + second == list(texts_of([source]))[: len(first) + len(second)]
    assert small == first[:2]
    for name in ("first", "second"):
        assert goal / 2 - max(lengths) <= facts[name]["tokens"] <= goal / 2 + 2 * max(lengths)
    assert goal <= facts["first"]["tokens"] + facts["second"]["tokens"] == sum(lengths[: len(first) + len(second)])
    assert facts["first"] == {
        "documents": len(first),
        "tokens": sum(lengths[: len(first)]),
        "bytes": sum(len(text.encode()) for text in first),
    }


def test_few_texts_are_read_often(tmp_path, source, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    facts = split_texts([source], str(tmp_path / "tokenizer"), tmp_path, 10**6, 10**6)
    assert facts["first"]["documents"] + facts["second"]["documents"] == facts["small"]["documents"] == 40
    assert min(facts["first"]["documents"], facts["second"]["documents"]) >= 19
    single = write(tmp_path / "one.jsonl", [{"text": "one"}])
    with pytest.raises(ValueError, match="`data` must hold at least two texts, got 1"):
        split_texts([single], str(tmp_path / "tokenizer"), tmp_path, 10, 10)


def test_held_out_texts_do_not_depend_on_their_order(tmp_path, source):
    rows = [{"text": text} for text in texts_of([source])]
    backwards = write(tmp_path / "backwards.jsonl", rows[::-1])
    facts = [held_out_texts(path, tmp_path / f"{i}.jsonl", 7) for i, path in enumerate((source, backwards))]
    assert read(tmp_path / "0.jsonl") == read(tmp_path / "1.jsonl") and facts[0] == facts[1]
    assert facts[0] == {"documents": 7, "bytes": sum(len(text) for text in read(tmp_path / "0.jsonl"))}
    assert read(tmp_path / "0.jsonl") != [row["text"] for row in rows[:7]]


def test_tokenizer_is_made_from_the_first_texts(tmp_path):
    from transformers import AutoTokenizer

    source = write(tmp_path / "texts.jsonl", [{"text": "abab"}] * 3 + [{"text": "zqzq"}] * 9)
    make_tokenizer([source], tmp_path / "tokenizer", 3)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert len(tokenizer("abab").input_ids) == 1 and len(tokenizer("zqzq").input_ids) == 4
