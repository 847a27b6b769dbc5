"""Bits per byte of both models on the same tokens, exact match against scripted and learnt answers, and the file."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from nanollada.hub_upload.card_facts import read_facts
from nanollada.hub_upload.evaluation_file import save_evaluation
from nanollada.modeling_nanollada import NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM
from nanollada.scripts.evaluation.answers import exact_match
from nanollada.scripts.evaluation.checkpoint import (
    EvaluateArguments,
    evaluate_checkpoint,
    evaluation_table,
    main,
)
from nanollada.trainers.data.collator import Collator
from nanollada.trainers.data.formats import Example, parse_row
from nanollada.trainers.data.prepare import DataArguments, prepare_data
from nanollada.trainers.models import config_for

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
CLASSES = {"ar": NanoLLaDAForCausalLM, "diffusion": NanoLLaDAForMaskedLM}
PAD, EOS = 0, 2
TEXTS = ["The cat sat on the mat.", "你好,世界。", "def add(first, second):\n    return first + second\n", "é 🎉"]


def messages(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


QUESTIONS = [messages("One?", "11"), messages("And two, then?", "22"), {"prompt": "1+1=", "completion": "3 3"}]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """Random checkpoints `ar` and `diffusion`, `texts.jsonl` and `questions.jsonl`."""
    folder = tmp_path_factory.mktemp("evaluate")
    for name, model_class in CLASSES.items():
        torch.manual_seed(0)
        model_class(config_for(tokenizer, initializer_range=0.3, **SHAPE)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    write_rows(folder / "texts.jsonl", [{"text": text} for text in TEXTS])
    write_rows(folder / "questions.jsonl", QUESTIONS)
    return folder


def build(model_class, tokenizer):
    torch.manual_seed(0)
    return model_class(config_for(tokenizer, initializer_range=0.3, **SHAPE)).eval()


def figures(*arguments, **options):
    """Bits per byte and nats per token of the one source."""
    bits, nats = evaluate_checkpoint(*arguments, **options)["results"]
    assert (bits["metric"], nats["metric"]) == ("bits_per_byte", "nats_per_token")
    return bits, nats


# ---- likelihood


@pytest.mark.parametrize(("file", "documents"), [("texts.jsonl", 4), ("questions.jsonl", 3)])
def test_both_models_are_scored_on_the_same_tokens_and_bytes(folder, file, documents):
    results = {}
    for name in CLASSES:
        options = {"samples": 4, "max_length": 24 if file == "texts.jsonl" else 64, "batch_size": 2}
        results[name], _ = figures(str(folder / name), str(folder / file), **options)
    ar, diffusion = results["ar"], results["diffusion"]
    assert ar["settings"]["max_length"] == diffusion["settings"]["max_length"] == options["max_length"]
    for name in ("tokens", "bytes", "documents", "data", "data_sha256", "task"):
        assert ar[name] == diffusion[name]
    scored = TEXTS if file == "texts.jsonl" else ["11", "22", "3 3"]
    assert ar["bytes"] == sum(len(text.encode()) for text in scored) and ar["documents"] == documents
    assert (ar["bound"], ar["mask_error"]) == (False, 0.0) and "samples" not in ar["settings"]
    assert (diffusion["bound"], diffusion["settings"]["samples"]) == (True, 4)
    assert diffusion["mask_error"] > 0 and ar["standard_error"] > 0


def test_a_uniform_model_has_ln_v_nats_per_token(folder, tokenizer, tmp_path):
    for name, model_class in CLASSES.items():
        model = build(model_class, tokenizer)
        model.lm_head.weight.data.zero_()
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        result, nats = figures(str(tmp_path / name), str(folder / "texts.jsonl"), samples=2)
        choices = len(tokenizer) - (name == "diffusion")  # the mask token can't be said
        assert nats["value"] == pytest.approx(math.log(choices), rel=1e-6)
        assert result["value"] == pytest.approx(nats["value"] / math.log(2) * result["tokens"] / result["bytes"])
        assert result["tokens"] == sum(len(tokenizer(text).input_ids) + 1 for text in TEXTS)
        assert result["standard_error"] is None  # one packed row


def test_batches_do_not_change_the_score_and_seeds_change_the_masks(folder):
    scores = {}
    for size, seed in ((1, 0), (4, 0), (4, 1)):
        options = {"samples": 4, "max_length": 24, "batch_size": size, "seed": seed}
        scores[size, seed] = figures(str(folder / "diffusion"), str(folder / "texts.jsonl"), **options)[0]["value"]
    assert scores[1, 0] == pytest.approx(scores[4, 0], rel=1e-6) and abs(scores[4, 1] / scores[4, 0] - 1) > 1e-5


def test_what_is_left_out_is_counted(folder, tmp_path):
    rows = [QUESTIONS[0], {"messages": []}, messages("One?", "The cat sat on the mat. " * 4)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    result, _ = figures(str(folder / "ar"), file, max_length=40, on_bad_rows="skip")
    assert (result["truncated_rows"], result["skipped_rows"], result["documents"]) == (1, {"no answer": 1}, 2)
    with pytest.raises(ValueError, match="row 2: no answer"):
        evaluate_checkpoint(str(folder / "ar"), file)


@pytest.mark.parametrize("name", CLASSES)
def test_texts_are_rolled_over(folder, name):
    """Every token of every text once: as packed rows count them, and with their scores where each text fits."""

    def score(**options):
        options = {"samples": 64, "batch_size": 3, **options}
        return figures(str(folder / name), str(folder / "texts.jsonl"), **options)[1]

    packed, fitting, rolled = score(), score(rolling_context=1), score(rolling_context=8, max_length=16)
    for result in (fitting, rolled):
        assert [result[key] for key in ("tokens", "bytes", "documents")] == [packed["tokens"], packed["bytes"], 4]
    assert (rolled["settings"]["rolling_context"], rolled["settings"]["max_length"]) == (8, 16)
    assert "rolling_context" not in packed["settings"] and rolled["value"] != fitting["value"]
    assert rolled["standard_error"] > 0  # over rows; the packed texts are one
    if name == "ar":
        assert fitting["value"] == pytest.approx(packed["value"], rel=1e-6)
        one = score(rolling_context=8, max_length=16, batch_size=1)
        assert one["value"] == pytest.approx(rolled["value"], rel=1e-6)


def test_rolled_texts_have_noise_of_their_own(folder, tmp_path):
    file = write_rows(tmp_path / "twice.jsonl", [{"text": TEXTS[2]}] * 2)
    result, _ = figures(str(folder / "diffusion"), file, samples=2, rolling_context=4)
    assert result["documents"] == 2 and result["standard_error"] > 0


def test_likelihood_is_scored_in_blocks(folder, tmp_path, tokenizer):
    """The checkpoint's, those that are asked for, or whole rows; rolled windows hold whole blocks."""
    model = build(NanoLLaDAForMaskedLM, tokenizer)
    model.config.block_length = 4
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    def score(checkpoint=tmp_path, **options):
        return figures(str(checkpoint), str(folder / "texts.jsonl"), samples=2, **options)[0]

    own, four = score(), score(folder / "diffusion", eval_block_length=4)
    assert own["settings"]["block_length"] == four["settings"]["block_length"] == 4
    assert own["settings"]["estimator"].endswith("blocks of 4")
    assert own["value"] == pytest.approx(four["value"], rel=1e-6)
    whole = score(eval_block_length=0)
    assert whole["value"] == pytest.approx(score(folder / "diffusion")["value"], rel=1e-6)
    assert "block_length" not in whole["settings"]
    one = score(eval_block_length=1)
    assert one["mask_error"] == 0 and one["bound"]
    rolled = score(eval_block_length=1, rolling_context=200)  # every text fits
    assert rolled["value"] == pytest.approx(one["value"], rel=1e-6)
    assert score(rolling_context=4, max_length=10)["tokens"] == own["tokens"]
    with pytest.raises(ValueError, match="`context` must .* got 6 with rows of 10 and blocks of 4"):
        score(rolling_context=6, max_length=10)


def test_what_cannot_be_rolled_or_cut_into_blocks(folder, tmp_path):
    checkpoint = str(folder / "ar")
    with pytest.raises(ValueError, match="`rolling_context` is for rows that are a plain `text`.*row 1"):
        evaluate_checkpoint(checkpoint, str(folder / "questions.jsonl"), rolling_context=4)
    with pytest.raises(ValueError, match="`block_length` is for diffusion models, got 4 with a causal one"):
        evaluate_checkpoint(checkpoint, str(folder / "texts.jsonl"), eval_block_length=4)
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "The cat"}, {"text": ""}, {"text": 2}])
    result, _ = figures(checkpoint, file, rolling_context=4, on_bad_rows="skip")
    assert result["documents"] == 1 and sum(result["skipped_rows"].values()) == 2


# ---- exact match


class Scripted:
    """Answers prompts from a table of token ids; keeps what it was asked."""

    def __init__(self, model, table, width):
        self.model, self.table, self.width, self.batches = model, table, width, []

    def __call__(self, input_ids, attention_mask, **settings):
        self.batches.append((input_ids, attention_mask, settings))
        rows = []
        for ids, visible in zip(input_ids, attention_mask, strict=True):
            answer = self.table[tuple(ids[visible.bool()].tolist())]
            rows.append(ids.tolist() + answer + [PAD] * (self.width - len(answer)))
        return torch.tensor(rows)


@pytest.mark.parametrize("name", CLASSES)
def test_exact_match_counts(tokenizer, name, monkeypatch):
    questions = ["One?", "Two, then?", "3?", "4?", "5?"]
    references = ["11", "22", "3 3", "44", "55"]
    replies = ["11<|im_end|>", " 22\n<|im_end|>", "3 4<|im_end|>", "44<|im_end|>9", "55"]  # 5 does not end
    rows = [messages(question, answer) for question, answer in zip(questions, references, strict=True)]
    width = max(len(tokenizer(answer + "<|im_end|>").input_ids) for answer in references)
    table = {}
    for question, reply in zip(questions, replies, strict=True):
        prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        table[tuple(tokenizer(prompt).input_ids)] = tokenizer(reply).input_ids
    model = build(CLASSES[name], tokenizer)
    scripted = Scripted(model, table, 8)
    monkeypatch.setattr(model, "generate", scripted)
    found = exact_match(model, tokenizer, rows, batch_size=2)
    assert (found["rows"], found["correct"], found["truncated"]) == (5, 4, 1)
    assert found["value"] == 0.8 and found["standard_error"] == pytest.approx(math.sqrt(0.8 * 0.2 / 5))
    assert found["settings"]["max_new_tokens"] == width
    assert [len(ids) for ids, _, _ in scripted.batches] == [2, 2, 1]
    ids, visible, settings = scripted.batches[-1]
    assert settings["max_new_tokens"] == width and not settings.get("do_sample") and not settings.get("temperature")
    padded = [mask for _, mask, _ in scripted.batches if not mask.all()]
    assert all(mask[:, -1].all() for mask in padded) and padded  # on the left


def test_the_room_for_answers(tokenizer, monkeypatch):
    model = build(NanoLLaDAForMaskedLM, tokenizer)
    asked = []

    def silent(input_ids, max_new_tokens, **settings):
        asked.append((max_new_tokens, settings.get("temperature")))
        return torch.cat((input_ids, torch.full((len(input_ids), max_new_tokens), EOS)), dim=1)

    monkeypatch.setattr(model, "generate", silent)
    rows = [messages("One?", "12345")]  # six tokens with the end
    assert exact_match(model, tokenizer, rows)["settings"]["max_new_tokens"] == 6
    exact_match(model, tokenizer, rows, block_length=4, temperature=0.5)
    exact_match(model, tokenizer, rows, max_new_tokens=11)
    assert asked == [(6, 0.0), (6, 0.5), (11, 0.0)]  # not rounded up to blocks


@pytest.mark.parametrize("name", CLASSES)
def test_batches_of_answers_equal_singles(tokenizer, name):
    """Real generation; references are what the model itself says, one row at a time."""
    from nanollada.scripts.decoding.checkpoint import prompt_ids
    from nanollada.scripts.decoding.writing import generate

    model = build(CLASSES[name], tokenizer)
    for token in range(len(tokenizer)):  # answers of plain letters, which decode and encode to themselves
        if tokenizer.decode([token]) not in "abcdefgh" and token != EOS:
            model.lm_head.weight.data[token] = 0
    rows = []
    for question in ("One?", "And two, then?", "Why is it 3?", "4"):
        prompt = [{"role": "user", "content": question}]
        said = generate(model, tokenizer, prompt_ids(tokenizer, prompt), max_new_tokens=5).text
        rows.append(messages(question, said.strip() or "none"))
    found = exact_match(model, tokenizer, rows, batch_size=3, max_new_tokens=5)
    assert found == exact_match(model, tokenizer, rows, batch_size=1, max_new_tokens=5)
    said_something = [row for row in rows if row["messages"][1]["content"] != "none"]
    assert found["correct"] >= len(said_something) > 0
    drawn = [exact_match(model, tokenizer, rows, temperature=1.0, seed=3) for _ in range(2)]
    assert drawn[0] == drawn[1] and drawn[0]["settings"]["temperature"] == 1.0


@pytest.mark.parametrize("name", CLASSES)
def test_learnt_answers_match(tokenizer, name, tmp_path):
    """Prompts at evaluation are those of training: a model that has learnt its rows by heart answers them all."""
    rows = [messages("One?", "12"), messages("And two, then?", "34"), messages("Why?", "56")]
    data = prepare_data(DataArguments(eval_data=[write_rows(tmp_path / "rows.jsonl", rows)]), tokenizer)
    batch = Collator(PAD)([data.eval[i] for i in range(3)])
    model = build(CLASSES[name], tokenizer).train()
    inputs = batch["input_ids"].clone()
    if name == "diffusion":
        inputs[batch["labels"] != -100] = tokenizer.mask_token_id
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(60):
        model(inputs, attention_mask=batch["attention_mask"], labels=batch["labels"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = exact_match(model.eval(), tokenizer, rows, **({"steps": 1} if name == "diffusion" else {}))
    assert (found["value"], found["truncated"], found["standard_error"]) == (1.0, 0, 0.0)
    rows[0]["messages"][1]["content"] = "13"
    assert exact_match(model, tokenizer, rows, **found["settings"])["correct"] == 2


def test_the_last_answer_of_a_chat_is_asked_for(tokenizer, monkeypatch):
    turns = [*messages("One?", "11")["messages"], *messages("Two?", "22")["messages"]]
    prompt = "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n11<|im_end|>\n"
    prompt += "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n"
    model = build(NanoLLaDAForCausalLM, tokenizer)
    table = {tuple(tokenizer(prompt).input_ids): tokenizer("22<|im_end|>").input_ids}
    monkeypatch.setattr(model, "generate", Scripted(model, table, 3))
    row = {"messages": turns}
    assert exact_match(model, tokenizer, [row])["correct"] == 1
    assert exact_match(model, tokenizer, [Example("x", 1, **parse_row(row))])["correct"] == 1


def test_rows_that_cannot_be_asked(tokenizer):
    model = build(NanoLLaDAForCausalLM, tokenizer)
    for rows, message in (
        ([], "`rows` must hold at least one row, got none"),
        ([{"text": "The cat"}], "exact match needs answers: `rows`, row 1 is a plain `text`"),
        ([QUESTIONS[0], {"prompt": "a"}], "`rows`, row 2: missing field: `completion`"),
        ([messages("A", "\U0010fffc")], "row 1: reserved character"),
    ):
        with pytest.raises(ValueError, match=message):
            exact_match(model, tokenizer, rows)
    with pytest.raises(ValueError, match="`steps` is for diffusion models"):
        exact_match(model, tokenizer, QUESTIONS, steps=2)


# ---- the file, the table, the program


def test_the_program_writes_what_the_model_card_reads(folder, tmp_path, capsys):
    checkpoint = tmp_path / "diffusion"
    (folder / "diffusion").rename(checkpoint)
    try:
        words = ["--checkpoint", str(checkpoint), "--data", str(folder / "questions.jsonl")]
        made = main(
            [*words, "--metrics", "likelihood", "exact_match", "--samples", "2", "--steps", "1", "--seed", "4"]
        )
        words = ["--checkpoint", str(checkpoint), "--data", str(folder / "texts.jsonl"), "--samples", "2"]
        main(words)
        rolled, _ = main([*words, "--rolling_context", "4", "--eval_block_length", "2"])["results"]
        assert (rolled["settings"]["rolling_context"], rolled["settings"]["block_length"]) == (4, 2)
        written = json.loads((checkpoint / "evaluation.json").read_text())
        assert written["version"] == 2
        scores = ["bits_per_byte", "nats_per_token"]
        assert [result["metric"] for result in written["results"]] == [*scores, "exact_match", *scores, *scores]
        assert written["results"][:3] == made["results"]
        assert [result["seed"] for result in written["results"]] == [4] * 3 + [0] * 4 and written["seed"] == 0
        assert all(result["command"] for result in written["results"])
        assert made["results"][2]["settings"]["generate"]["steps"] == 1
        assert len(read_facts(checkpoint).evaluation["results"]) == 7
        shown = capsys.readouterr().out
        assert "bits/byte" in shown and "±" in shown and "evaluation.json" in shown
    finally:
        checkpoint.rename(folder / "diffusion")


def test_results_are_merged(tmp_path):
    def evaluation(weights, *results):
        return {"checkpoint": "a", "weights_sha256": weights, "command": "c", "seed": 0, "results": list(results)}

    def result(value, task="one", data="d", **settings):
        settings = {"steps": 1, **settings}
        return {"task": task, "data": data, "metric": "exact_match", "value": value, "settings": settings}

    path = tmp_path / "new" / "evaluation.json"
    save_evaluation(evaluation("w", result(0.1), result(0.2, data="e")), path)
    save_evaluation(evaluation("w", result(0.3)), path)
    merged = save_evaluation(evaluation("w", result(0.4, steps=2)), path)
    assert merged == json.loads(path.read_text())
    assert [item["value"] for item in merged["results"]] == [0.2, 0.3, 0.4]
    save_evaluation(evaluation("w", result(0.8, rolling_context=8), result(0.9, block_length=4)), path)
    merged = save_evaluation(evaluation("w", result(1.0, block_length=4)), path)  # other rows, other blocks
    assert [item["value"] for item in merged["results"]] == [0.2, 0.3, 0.4, 0.8, 1.0]
    save_evaluation(evaluation("w", result(0.7, "two", samples=2, estimator="2 masks")), path)  # of another task
    merged = save_evaluation(
        evaluation("w", result(0.5, "two", samples=4, estimator="4 masks")), path
    )  # measured better
    assert [item["value"] for item in merged["results"]] == [0.2, 0.3, 0.4, 0.8, 1.0, 0.5]
    other = save_evaluation(evaluation("other weights", result(0.5)), path)  # of a model that was trained further
    assert [item["value"] for item in other["results"]] == [0.5]
    save_evaluation(evaluation(None, result(0.6)), path)
    unnamed = save_evaluation(evaluation(None, result(0.7, data="e")), path)  # weights that lie elsewhere: by name
    assert [item["value"] for item in unnamed["results"]] == [0.6, 0.7]
    assert [file.name for file in path.parent.iterdir()] == ["evaluation.json"]


def test_the_table_shows_bounds_and_errors(folder):
    from rich.console import Console

    scored = {"tokens": 1000, "bytes": 4000, "documents": 7}
    bits = {"metric": "bits_per_byte", "value": 1.23456, "bound": True, "mask_error": 0.001, "standard_error": 0.02}
    match = {"metric": "exact_match", "value": 0.9, "standard_error": 0.03, "rows": 100, "truncated": 2}

    def pair(data, nats, settings=(), **changes):
        shared = {"data": data, **bits, **scored, "settings": dict(settings), **changes}
        return [shared, {**shared, "metric": "nats_per_token", "value": nats}]

    alone = {"standard_error": None}
    results = [
        *pair("[a].jsonl", 2.5),
        *pair("b.jsonl", 2.4, value=1.2, bound=False, mask_error=0.0, **alone),
        {"data": "c.jsonl", **match, "settings": {}},
        *pair("d", 2, {"block_length": 4, "rolling_context": 9}, **alone),
    ]
    console = Console(width=140, record=True, file=SimpleNamespace(write=lambda text: None, flush=lambda: None))
    console.print(evaluation_table({"checkpoint": "outputs/x", "results": results}))
    shown = console.export_text()
    for part in (
        "[a].jsonl",
        "≤ 1.2346 ± 0.0010 bits/byte",
        "± 0.0200 bits/byte over rows",
        "1.2000 bits/byte (exact)",
        "2.4000 nats/token",
        "90.00 % ± 3.00",
        "100 rows, 2 answers cut off",
        "1,000 tokens, 4,000 bytes, 7 documents",
        "blocks of 4",
        "context of 9",
    ):
        assert part in shown
    assert shown.count("over rows") == 1


def test_arguments_are_checked_before_anything_is_loaded(folder):
    with pytest.raises(ValueError, match="`data` must name at least one source, got none"):
        EvaluateArguments(checkpoint=str(folder))
    with pytest.raises(ValueError, match="`checkpoint` must be a folder, or `output` .*, got a/b: there is no such"):
        EvaluateArguments(checkpoint="a/b", data=["x.jsonl"])
    for options, message in (
        ({"metrics": ["accuracy"]}, r"`metrics` must be among likelihood, exact_match, got \['accuracy'\]"),
        ({"metrics": []}, "`metrics` must be among likelihood, exact_match, got none"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"decoding": {"steps": 2}}, r"`steps` needs 'exact_match' in `metrics`, got \['likelihood'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_checkpoint("a/b", "x.jsonl", **{"metrics": ["likelihood"], **options})
