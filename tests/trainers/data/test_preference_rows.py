"""Preference rows: every shape, the tokens of SFT, TRL's own collator and trainer, and what is refused."""

import copy
import json
import lzma
import re

import pytest
from datasets import Dataset, IterableDataset
from trl.trainer.dpo_trainer import DataCollatorForPreference

from nanollada.trainers.data.feedback.preferences import (
    IDS,
    PreferenceArguments,
    PreparedRows,
    parse_preference,
    preference_rows,
    prepare_preferences,
)
from nanollada.trainers.data.files import BadRow, DataError
from nanollada.trainers.data.prepare import DataArguments, prepare_data

SYSTEM = {"role": "system", "content": "Be short."}
USER = {"role": "user", "content": "What is it?"}
GOOD = {"role": "assistant", "content": "It is a test, and the test is long."}
BAD = {"role": "assistant", "content": "The cat sat."}
CHAT = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
LONG = [SYSTEM, USER, BAD, {"role": "user", "content": "The <|im_end|> is text."}]
SHAPES = {
    "explicit chats": CHAT,
    "implicit prompt": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "the prompt repeated": {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "a text beside chats": {"prompt": USER["content"], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "answers as one message": {"prompt": [USER], "chosen": GOOD, "rejected": BAD},
    "messages": {"messages": [USER], "chosen": GOOD["content"], "rejected": BAD["content"]},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": USER["content"]}],
        "chosen": {"from": "gpt", "value": GOOD["content"]},
        "rejected": {"from": "gpt", "value": BAD["content"]},
    },
    **{
        name: {name: USER["content"], "chosen": GOOD["content"], "rejected": BAD["content"]}
        for name in ("instruction", "question", "input", "context")
    },
    "other columns": {**CHAT, "source": "x", "score_chosen": 7.5, "messages": None},
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def arguments(path, **given):
    return PreferenceArguments(data=[path], **{"held_out_fraction": 0.0, **given})


def sft_row(tmp_path, row, tokenizer):
    """Ids and the places of the targets that SFT makes of a row."""
    path = write(tmp_path / "sft.jsonl", [row])
    (row,) = prepare_data(DataArguments(data=[path], held_out_fraction=0.0, max_length=400), tokenizer).train
    return row["input_ids"], [label != -100 for label in row["labels"]]


@pytest.mark.parametrize("prompt", [[USER], [SYSTEM, USER], LONG], ids=["short", "system", "turns and control tokens"])
def test_tokens_are_those_of_sft(prompt, tmp_path, tokenizer):
    path = write(tmp_path / "x.jsonl", [{"prompt": prompt, "chosen": [GOOD], "rejected": [BAD]}])
    (row,) = prepare_preferences(arguments(path), tokenizer).train
    for name, answer in (("chosen_ids", GOOD), ("rejected_ids", BAD)):
        ids, targets = sft_row(tmp_path, {"prompt": prompt, "completion": [answer]}, tokenizer)
        assert row["prompt_ids"] + row[name] == ids
        assert [False] * len(row["prompt_ids"]) + [True] * len(row[name]) == targets
    assert row["chosen_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(row["prompt_ids"]).endswith("<|im_start|>assistant\n")


def test_plain_texts_are_those_of_sft_whose_border_no_token_crosses(tmp_path, tokenizer):
    given = {"prompt": "The cat sat on th", "chosen": "e mat.", "rejected": "e dog."}
    (row,) = prepare_preferences(arguments(write(tmp_path / "x.jsonl", [given])), tokenizer).train
    for name in ("chosen", "rejected"):
        sft = {"prompt": given["prompt"], "completion": given[name]}
        ids, targets = sft_row(tmp_path, sft, tokenizer)
        assert row["prompt_ids"] + row[f"{name}_ids"] == ids and sum(targets) == len(row[f"{name}_ids"])
    assert row["prompt_ids"] == tokenizer(given["prompt"])["input_ids"]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_the_same_pair(shape):
    preference = parse_preference(SHAPES[shape])
    assert (preference.prompt, preference.chosen, preference.rejected) == ((USER,), GOOD, BAD)


def test_shapes_with_more_in_the_prompt(tmp_path, tokenizer):
    answers = {"chosen": GOOD["content"], "rejected": BAD["content"]}
    row = {"system": SYSTEM["content"], "prompt": USER["content"], **answers}
    assert parse_preference(row).prompt == (SYSTEM, USER)
    row = {"context": "The cat.", "question": "What?", **answers}
    assert parse_preference(row).prompt == ({"role": "user", "content": "The cat.\nWhat?"},)
    row = {"instruction": "Add", "input": "1, 2", **answers}
    assert parse_preference(row).prompt == ({"role": "user", "content": "Add\n1, 2"},)
    whole = {"chosen": [*LONG, GOOD], "rejected": [*LONG, BAD]}
    assert parse_preference(whole).prompt == tuple(LONG)
    assert parse_preference({"prompt": "The", "chosen": " cat", "rejected": " dog"}).prompt == "The"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**CHAT, "rejected": [GOOD]}, "equal answers: `chosen` and `rejected` say the same"),
        (
            {"chosen": [USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
            "no common prompt: .* differ in their last message",
        ),
        ({"chosen": [GOOD], "rejected": [BAD]}, "no prompt: `chosen` must end with what is to be answered"),
        ({"chosen": "It is", "rejected": "It was"}, "no prompt: `chosen` is a text: a `prompt` must stand beside it"),
        ({**CHAT, "prompt": []}, "no prompt: `prompt` must end with what is to be answered"),
        ({**CHAT, "prompt": [USER, GOOD]}, "no prompt: `prompt` must end with"),
        ({**CHAT, "chosen": [USER]}, "no answer: `chosen` must end with an assistant message"),
        ({**CHAT, "chosen": []}, "no answer: `chosen` must end with"),
        ({**CHAT, "rejected": [BAD, USER, GOOD]}, "no common prompt: `rejected` must be one answer .* got 3 messages"),
        ({**CHAT, "chosen": " "}, "empty text: `chosen`"),
        ({"prompt": "x", "chosen": "y", "rejected": ""}, "empty text: `rejected`"),
        (
            {"prompt": "x", "chosen": "y", "rejected": [BAD]},
            "wrong type: `chosen` and `rejected` must both be strings or",
        ),
        ({"prompt": "x", "chosen": "y"}, "missing field: `rejected`"),
        ({"prompt": "x", "chosen": None, "rejected": "z"}, "null value: `chosen` is null"),
        (
            {**CHAT, "system": "x", "prompt": [SYSTEM, USER]},
            "wrong role: `system` must stand in its field or in `prompt`",
        ),
        ({"system": "x", "chosen": "y", "rejected": "z"}, "missing field: `prompt` beside `system`"),
        ({"text": "x"}, "missing field: `chosen`"),
        ("x", "wrong type: a row must be an object, got str"),
        (
            {**CHAT, "prompt": [{"role": "user", "content": 3}]},
            r"wrong type: `prompt\[0\].content` must be a string, got int",
        ),
    ],
)
def test_what_is_refused_names_file_and_row(row, message, tmp_path, tokenizer):
    with pytest.raises(BadRow, match=message):
        parse_preference(row)
    path = write(tmp_path / "x.jsonl", [CHAT, row])
    with pytest.raises(DataError, match=rf"{re.escape(path)}, row 2: {message}"):
        prepare_preferences(arguments(path), tokenizer)
    data = prepare_preferences(arguments(path, on_bad_rows="skip"), tokenizer)
    assert len(data.train) == 1 and data.report["skipped_rows"].total() == 1


def test_long_rows_are_refused_and_never_cut(tmp_path, tokenizer):
    path = write(tmp_path / "x.jsonl", [CHAT, {**CHAT, "rejected": [{**BAD, "content": "The dog sat. " * 40}]}])
    rows = prepare_preferences(arguments(path), tokenizer).train
    longest = max(len(row["prompt_ids"]) + max(len(row[name]) for name in IDS[1:]) for row in rows)
    assert len(prepare_preferences(arguments(path), tokenizer, longest).train) == 2
    message = f"row 2: too long: the prompt with `rejected` has {longest} tokens, `max_length` is {longest - 1} "
    with pytest.raises(DataError, match=message):
        prepare_preferences(arguments(path), tokenizer, longest - 1)
    data = prepare_preferences(arguments(path, on_bad_rows="skip"), tokenizer, longest - 1)
    assert data.train[0] == rows[0] and data.report["skipped_rows"] == {"too long": 1}


def test_answers_that_the_template_makes_equal_are_refused(tmp_path, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", "message['content'] | trim")
    assert "trim" in tokenizer.chat_template
    path = write(tmp_path / "x.jsonl", [{**CHAT, "rejected": [{**GOOD, "content": f" {GOOD['content']} "}]}])
    with pytest.raises(DataError, match="row 1: equal answers: `chosen` and `rejected` have the same tokens"):
        prepare_preferences(arguments(path), tokenizer)


def pairs(count):
    prompts = [{"role": "user", "content": f"What is {number // 2}?"} for number in range(count)]
    answers = [[{"role": "assistant", "content": f"It is {number}."}] for number in range(count)]
    return [{**CHAT, "prompt": [prompt], "chosen": answer} for prompt, answer in zip(prompts, answers, strict=True)]


def test_rows_are_held_out_by_their_prompts(tmp_path, tokenizer):
    path = write(tmp_path / "x.jsonl", pairs(60))
    data = prepare_preferences(arguments(path, held_out_fraction=0.3), tokenizer)
    assert len(data.train) + len(data.eval) == 60 and 6 <= len(data.eval) <= 30
    sides = [{tuple(row["prompt_ids"]) for row in side} for side in (data.train, data.eval)]
    assert not sides[0] & sides[1]  # both pairs of a prompt are on one side
    assert [row["index"] for row in data.train] == list(range(len(data.train)))
    assert [row["index"] for row in data.eval] == list(range(len(data.eval)))
    again = prepare_preferences(
        arguments(write(tmp_path / "y.jsonl", pairs(60)[::-1]), held_out_fraction=0.3), tokenizer
    )
    assert {tuple(row["chosen_ids"]) for row in again.eval} == {tuple(row["chosen_ids"]) for row in data.eval}
    few = prepare_preferences(arguments(path, held_out_fraction=0.3, max_held_out_documents=4), tokenizer)
    assert len(few.eval) == 4 and few.report["eval"]["unused_documents"] == len(data.eval) - 4
    assert len(few.train) == len(data.train)
    report = data.report
    assert report["rows"] == report["documents"] == len(data.train) and report["format"] == data.format == "preference"
    assert report["target_tokens"] == sum(len(row[name]) for row in data.train for name in IDS[1:])
    assert list(report["digests"]) == ["x.jsonl"] and report["eval"]["sources"] == [path]


def test_sources_are_those_of_other_data(tmp_path, tokenizer):
    folder = tmp_path / "saved"
    rows = pairs(4)
    Dataset.from_list(rows).save_to_disk(folder)
    Dataset.from_list([{**row, "picture": b"x"} for row in rows]).to_parquet(tmp_path / "x.parquet")
    packed = tmp_path / "x.jsonl.xz"
    packed.write_bytes(lzma.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    (tmp_path / "x.json").write_text(json.dumps(rows))
    read = [
        prepare_preferences(arguments(str(path)), tokenizer).train.to_list()
        for path in (folder, tmp_path / "x.parquet", packed, tmp_path / "x.json")
    ]
    assert read[0] == read[1] == read[2] == read[3] and len(read[0]) == 4
    data = prepare_preferences(PreferenceArguments(data=[str(packed)], eval_data=str(tmp_path / "x.json")), tokenizer)
    assert data.train.to_list() == data.eval.to_list() == read[0]


def test_arguments_that_are_refused(tmp_path, tokenizer):
    path = write(tmp_path / "x.jsonl", [CHAT])
    for given, message in (
        ({"data": None}, "`data` or `eval_data` must name at least one source, got none"),
        ({"data": ["none.jsonl"]}, "`data` names a file that does not exist: 'none.jsonl'"),
        ({"eval_data": ["none.jsonl"]}, "`eval_data` names a file that does not exist"),
        ({"data_split": "dpo"}, "`data_split` must be left out where no source has splits, got 'dpo'"),
        (
            {"held_out_fraction": 0.5, "data": [write(tmp_path / "y.jsonl", pairs(1))]},
            "nothing to evaluate on|to train on",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            prepare_preferences(PreferenceArguments(**{"data": [path], "held_out_fraction": 0.0, **given}), tokenizer)
    for given, message in (
        ({"on_bad_rows": "cut"}, "`on_bad_rows` must be 'stop' or 'skip', got 'cut'"),
        ({"held_out_fraction": 1}, r"`held_out_fraction` must be in \[0, 1\), got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            PreferenceArguments(**given)


def test_datasets_of_a_caller(tmp_path, tokenizer):
    rows = pairs(4)
    expected = prepare_preferences(arguments(write(tmp_path / "x.jsonl", rows)), tokenizer).train
    texts = [
        {"messages": row["prompt"], "chosen": row["chosen"][0]["content"], "rejected": BAD["content"]} for row in rows
    ]
    given = Dataset.from_list(texts)
    assert preference_rows(given, tokenizer).to_list() == expected.to_list()
    assert list(preference_rows(IterableDataset.from_generator(lambda: iter(texts)), tokenizer)) == expected.to_list()
    assert preference_rows(expected, tokenizer).to_list() == expected.to_list()  # prepared ones stay
    bare = expected.remove_columns("index").add_column("ref_chosen_logps", [0.0] * 4)
    made = preference_rows(bare, tokenizer)
    assert made["index"][:] == [0, 1, 2, 3] and made["ref_chosen_logps"][:] == [0.0] * 4
    with pytest.raises(DataError, match="eval_dataset, row 1: too long: the prompt with `chosen` has"):
        preference_rows(expected, tokenizer, 10, name="eval_dataset")
    with pytest.raises(DataError, match="train_dataset, row 2: equal answers"):
        preference_rows(Dataset.from_list([texts[0], {**texts[1], "chosen": BAD["content"]}]), tokenizer)


def test_trl_takes_the_rows(tmp_path, tokenizer):
    """Its collator's batches hold them whole; its `_prepare_dataset` would not: the reason for `PreparedRows`."""
    from trl import DPOConfig, DPOTrainer

    class Args:
        max_length, dataset_num_proc, truncation_mode = 400, None, "keep_start"

    rows = prepare_preferences(arguments(write(tmp_path / "x.jsonl", pairs(3))), tokenizer, 400).train
    kept = PreparedRows()._prepare_dataset(rows, tokenizer, Args, "train")
    assert kept.to_list() == rows.to_list() and DPOConfig.__dataclass_fields__["max_length"]
    with pytest.raises(KeyError, match="chosen"):
        DPOTrainer._prepare_dataset(object(), rows, tokenizer, Args, "train")
    batch = DataCollatorForPreference(tokenizer.pad_token_id, max_length=400)(kept.to_list())
    for number, row in enumerate(rows):
        for place, name in ((number, "chosen_ids"), (number + 3, "rejected_ids")):
            answer = batch["input_ids"][place][batch["completion_mask"][place].bool()]
            assert answer.tolist() == row[name]
            whole = batch["input_ids"][place][batch["attention_mask"][place].bool()]
            assert whole.tolist() == row["prompt_ids"] + row[name]
