"""Pairs of a model's own right and wrong answers: the rules, both kinds of model, and the rows that training reads."""

import json
from collections import Counter

import pytest
import torch

from nanollada.modeling_nanollada import NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM
from nanollada.scripts.sampling import pairs as script
from nanollada.scripts.sampling.pairs import PairArguments, main, pairs_of, summary, write_pairs
from nanollada.trainers.data.feedback.preferences import PreferenceArguments, prepare_preferences
from nanollada.trainers.models import config_for
from nanollada.trainers.puzzles.registry import solves, write_rows

CLASSES = {"ar": NanoLLaDAForCausalLM, "diffusion": NanoLLaDAForMaskedLM}
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def checkpoints(tokenizer, tmp_path_factory):
    """An AR and a diffusion model that say digits and ends, so that answers of one digit are right at times."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, model_class in CLASSES.items():
        torch.manual_seed(0)
        model = model_class(config_for(tokenizer, initializer_range=0.02, tie_word_embeddings=False, **SHAPE))
        said = [*tokenizer("0123", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        model.generation_config.suppress_tokens = [i for i in range(len(tokenizer)) if i not in said]
        model.generation_config.max_new_tokens = 2
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "prompts.jsonl"
    write_rows("arithmetic", 40, path, format="prompts", digits=1, operators="-")
    return path


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("kind", CLASSES)
def test_a_model_makes_pairs_that_training_reads(kind, checkpoints, prompts, tmp_path, tokenizer, capsys):
    output = tmp_path / "pairs.jsonl"
    words = ["--checkpoint", str(checkpoints / kind), "--data", str(prompts), "--temperature", "1", "--samples", "16"]
    counts = main([*words, "--output", str(output)])
    rows, given = rows_of(output), {row["prompt"][0]["content"]: row for row in rows_of(prompts)}
    assert 1 < len(rows) == counts["pairs"] == counts["paired"]
    for row in rows:
        problem = given[row["prompt"][0]["content"]]
        (chosen,), (rejected,) = row["chosen"], row["rejected"]
        assert solves("arithmetic", problem, chosen["content"]) and chosen["role"] == "assistant"
        assert not solves("arithmetic", problem, rejected["content"]) and rejected["content"].strip()
    assert counts["prompts"] == 40 and counts["answers"] == 40 * 16
    used = sum(counts[name] for name in ("right", "wrong", "unfinished", "empty", "with_control_tokens"))
    assert used == counts["answers"] and counts["with_control_tokens"] == 0 < counts["unfinished"]
    assert counts["paired"] + counts["none_right"] + counts["none_wrong"] + counts["none_usable"] == 40
    shown = capsys.readouterr().out
    assert f"640 answers to 40 prompts: {100 * counts['right'] / 640:.1f} % right" in shown
    assert f"{len(rows)} pairs of {len(rows)} prompts: {output}" in shown
    data = prepare_preferences(PreferenceArguments(data=[str(output)], held_out_fraction=0.0), tokenizer, 200)
    assert len(data.train) == len(rows) and not data.report["skipped_rows"]
    first = output.read_text()
    main([*words, "--output", str(output)])
    assert output.read_text() == first
    main([*words, "--output", str(output), "--seed", "1"])
    assert output.read_text() != first


def test_the_rules_of_pairs():
    row = {"prompt": [{"role": "user", "content": "2+3="}], "verify": "arithmetic", "answer": "5"}
    counts = Counter()
    texts = ["4", " 5", "5", "05", "6", "4 ", "seven"]
    (one,) = pairs_of(row, texts, 1, counts)
    assert one["chosen"] == [{"role": "assistant", "content": " 5"}] and one["prompt"] == row["prompt"]
    assert one["rejected"] == [{"role": "assistant", "content": "4"}] and one["source"] == "arithmetic"
    pairs = pairs_of(row, texts, 9, Counter())
    said = [(pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in pairs]
    assert said == [(" 5", "4"), ("05", "6")]  # equal answers count once, none is in two pairs
    assert counts == {"right": 3, "wrong": 4, "paired": 1, "pairs": 1}
    for given, name in ((["5"], "none_wrong"), (["4"], "none_right"), ([], "none_usable")):
        counts = Counter()
        assert pairs_of(row, given, 1, counts) == [] and counts[name] == 1 and not counts["pairs"]
    (plain,) = pairs_of({**row, "prompt": "2+3="}, ["5", "4"], 1, Counter())
    assert plain == {"prompt": "2+3=", "chosen": "5", "rejected": "4", "source": "arithmetic"}


def test_answers_that_do_not_count(tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|im_start|>")
    ids = tokenizer("5", add_special_tokens=False)["input_ids"]
    counts = Counter()
    answers = [(ids, True), (ids, False), ([*ids, end], True), ([], True)]
    assert script._texts(tokenizer, answers, counts) == ["5"]
    assert counts == {"answers": 4, "unfinished": 1, "with_control_tokens": 1, "empty": 1}
    assert "25.0 % unfinished, 25.0 % empty, 25.0 % with control tokens" in summary(counts, "x")


def test_prompts_are_asked_once_and_pairs_are_kept_as_they_come(checkpoints, prompts, tmp_path, monkeypatch):
    output, twice = tmp_path / "pairs.jsonl", tmp_path / "twice.jsonl"
    twice.write_text(prompts.read_text() * 2)
    monkeypatch.setattr(script, "CHUNK", 16)
    written, asked = [], []
    answers_to, write_whole = script.answers_to, script.write_whole
    monkeypatch.setattr(script, "answers_to", lambda *args: (asked.append(len(args[2])), answers_to(*args))[1])
    monkeypatch.setattr(script, "write_whole", lambda *args: (written.append(args[1]), write_whole(*args)))
    args = PairArguments(str(checkpoints / "ar"), data=[str(twice)], output=str(output), samples=3, batch_size=20)
    counts = write_pairs(args, script.DecodingArguments(temperature=1.0))
    assert counts["prompts"] == counts["repeated"] == 40 and sum(asked) == 120 and max(asked) == 20
    assert len(written) == 3 and written[-1] == output.read_text() and written[1].startswith(written[0])


@pytest.mark.parametrize(
    ("given", "decoding", "message"),
    [
        ({"samples": 1}, {}, "`samples` must be at least 2, got 1"),
        ({"output": ""}, {}, "`output` must be given, got none"),
        ({"data": []}, {}, "`data` must be given, got none"),
        ({}, {"temperature": 0.0}, "`temperature` must be above 0: 8 answers would be the same"),
        ({}, {"temperature": 1.0, "threshold": 0.9}, "`threshold` is for diffusion models, got 0.9"),
        ({"data": ["bare.jsonl"]}, {"temperature": 1.0}, "bare.jsonl, row 1: missing field: `verify`"),
    ],
)
def test_what_is_refused(given, decoding, message, checkpoints, prompts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(ValueError, match=message):
        args = {"data": [str(prompts)], "output": "pairs.jsonl", **given}
        write_pairs(PairArguments(str(checkpoints / "ar"), **args), script.DecodingArguments(**decoding))
    assert not (tmp_path / "pairs.jsonl").exists()
