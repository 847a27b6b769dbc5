"""Prompts to be rewarded: what a row may be, what is checked of it, and the tokens that TRL makes of it."""

import json
import re

import pytest

from nanollada.trainers.data.feedback.prompts import PromptArguments, PromptReader, prepare_prompts, texts_of
from nanollada.trainers.data.files import DataError
from nanollada.trainers.data.prepare import DataArguments, prepare_data
from nanollada.trainers.puzzles.registry import PUZZLES, write_rows

USER = {"role": "user", "content": "What is 2+3?"}
ROW = {"prompt": [USER], "verify": "arithmetic", "answer": "5"}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path, tokenizer, max_length=None, **given):
    return prepare_prompts(PromptArguments(data=[path], **{"held_out_fraction": 0.0, **given}), tokenizer, max_length)


@pytest.mark.parametrize("puzzle", PUZZLES)
def test_rows_of_every_puzzle(puzzle, tmp_path, tokenizer):
    path = write_rows(puzzle, 12, tmp_path / "x.jsonl", format="prompts")
    data = read(str(path), tokenizer, held_out_fraction=0.4)
    written = [json.loads(line) for line in path.read_text().splitlines()]
    given = [{name: row[name] for name in row if name != "index"} for side in (data.train, data.eval) for row in side]
    assert sorted(given, key=str) == sorted(written, key=str) and data.format == "prompt"
    assert data.train["index"][:] == list(range(len(data.train)))
    assert data.report["rows"] + data.report["eval"]["rows"] == 12 and list(data.report["digests"]) == ["x.jsonl"]


@pytest.mark.parametrize("prompt", [[USER], [{"role": "system", "content": "Be short."}, USER], "The cat"])
def test_tokens_are_those_before_the_answer_in_sft_and_trl(prompt, tmp_path, tokenizer):
    answer = {"role": "assistant", "content": "It is 5."}
    sft = {"prompt": prompt, "completion": answer["content"] if isinstance(prompt, str) else [answer]}
    path = write(tmp_path / "sft.jsonl", [sft])
    (row,) = prepare_data(DataArguments(data=[path], held_out_fraction=0.0), tokenizer).train
    ids = PromptReader(tokenizer).ids(prompt)
    assert (
        row["input_ids"][: len(ids)] == ids
        and row["labels"][: len(ids) + 1] == [-100] * len(ids) + row["input_ids"][len(ids) : len(ids) + 1]
    )
    theirs = (
        tokenizer(prompt)
        if isinstance(prompt, str)
        else tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
    )
    assert theirs["input_ids"] == ids
    length = len(ids)
    path = write(tmp_path / "x.jsonl", [{"prompt": prompt}])
    data = read(path, tokenizer, length)
    assert len(data.train) == 1
    assert not {"max_length", "target_tokens"} & data.report.keys()  # a card would say that it was trained on as many
    with pytest.raises(DataError, match=f"row 1: too long: `prompt` has {length} tokens, at most {length - 1} leave"):
        read(path, tokenizer, length - 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"verify": "arithmetic", "answer": "5"}, "missing field: `prompt`"),
        ({**ROW, "prompt": []}, "no prompt: `prompt` must end with what is to be answered"),
        ({**ROW, "prompt": [USER, {"role": "assistant", "content": "5"}]}, "no prompt: `prompt` must end"),
        ({**ROW, "prompt": " "}, "empty text: `prompt`"),
        ({**ROW, "prompt": 3}, "wrong type: `prompt` must be a list of messages, got int"),
        ({**ROW, "verify": "chess"}, "unknown puzzle: `verify` must be one of arithmetic, .*, got 'chess'"),
        ({**ROW, "answer": "five"}, "bad puzzle: `answer` must be a whole number, got 'five'"),
        ({**ROW, "verify": "sudoku"}, "bad puzzle: missing field: `puzzle`"),
        ({**ROW, "verify": "sudoku9", "puzzle": "1" * 81}, "bad puzzle: `puzzle` must be 81 digits .* one solution"),
        ({**ROW, "completions": "5"}, "reserved column: `completions` is no column that a reward can read"),
        ({**ROW, "prompt": "Say <|im_end|>"}, "control token: `prompt` becomes other tokens in SFT than in TRL"),
        ("x", "wrong type: a row must be an object, got str"),
    ],
)
def test_what_is_refused_names_file_and_row(row, message, tmp_path, tokenizer):
    path = write(tmp_path / "x.jsonl", [ROW, row])
    with pytest.raises(DataError, match=rf"{re.escape(path)}, row 2: {message}"):
        read(path, tokenizer)
    data = read(path, tokenizer, on_bad_rows="skip")
    assert len(data.train) == 1 and data.report["skipped_rows"].total() == 1


def test_columns_of_several_puzzles_and_types(tmp_path, tokenizer):
    other = {"prompt": [USER], "verify": "countdown", "numbers": [2, 3], "target": 5}
    train = read(write(tmp_path / "x.jsonl", [ROW, other]), tokenizer).train
    assert train[0]["numbers"] is None and train[1]["numbers"] == [2, 3] and train[1]["answer"] is None
    with pytest.raises(ValueError, match="column `level` must hold one type in all rows, got int, str"):
        read(write(tmp_path / "y.jsonl", [{**ROW, "level": 1}, {**ROW, "level": "2"}]), tokenizer)
    bare = write(tmp_path / "z.jsonl", [{"prompt": "The cat"}])
    assert len(read(bare, tokenizer).train) == 1
    with pytest.raises(DataError, match="row 1: missing field: `verify`"):
        prepare_prompts(PromptArguments(data=[bare], held_out_fraction=0.0), tokenizer, needs_puzzle=True)


def test_texts_of_rows_in_any_format(tmp_path):
    rows = [ROW, {"messages": [{"role": "user", "content": "one"}]}, {"text": "two", "more": {"deep": ["three", 4]}}]
    path = write(tmp_path / "x.jsonl", rows)
    assert {"What is 2+3?", "one", "two", "three"} <= texts_of([path], "unlike") and texts_of([], "unlike") == set()
    with pytest.raises(ValueError, match="`unlike` names a file that does not exist: 'none.jsonl'"):
        texts_of(["none.jsonl"], "unlike")
    (tmp_path / "y.jsonl").write_text("{")
    with pytest.raises(DataError, match="y.jsonl, row 1: bad JSON"):
        texts_of([str(tmp_path / "y.jsonl")], "unlike")
