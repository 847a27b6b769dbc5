"""Tasks that let a model write: verdicts, rooms, presets and their paired differences, free text, the judge, speed."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nanollada.modeling_nanollada import NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM
from nanollada.scripts.decoding.checkpoint import prompt_ids
from nanollada.scripts.decoding.writing import generate, keyed_seed
from nanollada.scripts.evaluation.bench import Bench, Row
from nanollada.scripts.evaluation.kinds import KINDS
from nanollada.scripts.evaluation.metrics import distinct, repetition, unigram_entropy
from nanollada.scripts.evaluation.rows import rows_of
from nanollada.scripts.evaluation.suite_file import parse_task
from nanollada.scripts.evaluation.tasks import free_text, generation
from nanollada.scripts.evaluation.tasks.free_text import judge_nats, run_statistics
from nanollada.scripts.evaluation.tasks.generation import run_generation
from nanollada.scripts.evaluation.tasks.presets import run_presets
from nanollada.scripts.evaluation.tasks.speed import run_speed
from nanollada.scripts.evaluation.tasks.written import write_answers
from nanollada.trainers.data.files import DataError
from nanollada.trainers.models import config_for

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
CLASSES = {"ar": NanoLLaDAForCausalLM, "diffusion": NanoLLaDAForMaskedLM}


def bench(name, tokenizer, **options):
    torch.manual_seed(0)
    overrides = {key: options.pop(key) for key in ("max_position_embeddings",) if key in options}
    return Bench(
        CLASSES[name](config_for(tokenizer, initializer_range=0.5, **SHAPE, **overrides)).eval(), tokenizer, **options
    )


def task(kind, **settings):
    return parse_task({"name": "t", "kind": kind, "data": "x", **settings}, "suite, task 1")


def rows(task, *values):
    rows = [Row("x.jsonl", number, value) for number, value in enumerate(values, start=1)]
    return [Row(row.source, row.number, KINDS[task.kind].check_row(row, task)) for row in rows]


def scripted(monkeypatch, replies):
    """`write_answers` that says these texts; `None`: does not end."""

    def write(bench, task, prompts, decoding):
        assert len(prompts) == len(replies)
        return [(bench.tokenizer(reply.rstrip("…")).input_ids, not reply.endswith("…")) for reply in replies]

    for module in (generation, free_text):
        monkeypatch.setattr(module, "write_answers", write)


# ---- verdicts


@pytest.mark.parametrize("name", CLASSES)
def test_verdicts_are_counted(tokenizer, name, monkeypatch):
    own, exact = bench(name, tokenizer), task("generation")
    scripted(monkeypatch, ["7", " 8\n", "9…", "the 9"])
    values = [{"prompt": f"q{i}", "answer": answer} for i, answer in enumerate(("7", "8", "9", "9"))]
    outcome = run_generation(own, exact, rows(exact, *values))
    (result,) = outcome.results
    assert (result["metric"], result["value"], result["rows"], result["truncated"]) == ("exact_match", 0.75, 4, 1)
    assert [record["exact_match"] for record in outcome.records] == [True, True, True, False]
    assert outcome.records[0]["answer"] == "7" and outcome.records[3]["references"] == ["9"]
    assert outcome.settings["generate"]["max_new_tokens"] == len(tokenizer("9<|im_end|>").input_ids)


def test_questions_on_a_context(tokenizer, monkeypatch):
    own, qa = bench("ar", tokenizer), task("generation", verify="qa", language="en")
    scripted(monkeypatch, ["A cat.", "dog cat"])
    values = [{"context": "c", "question": q, "answers": ["the cat", "dog"]} for q in ("one", "two")]
    match, f1 = run_generation(own, qa, rows(qa, *values)).results
    assert (match["metric"], match["value"]) == ("exact_match", 0.5)
    assert (f1["metric"], f1["value"]) == ("f1", pytest.approx((1 + 2 / 3) / 2))


def test_puzzles_are_verified(tokenizer, monkeypatch):
    made = parse_task({"name": "t", "kind": "generation", "puzzle": "countdown", "rows": 3}, "")
    asked, _ = rows_of(made, None, 0)
    answers = [row.values["answers"][0] for row in asked]
    scripted(monkeypatch, [answers[0], answers[0], f"({answers[2]})"])
    (result,) = run_generation(bench("ar", tokenizer), made, asked).results
    assert (result["metric"], result["value"]) == ("accuracy", pytest.approx(2 / 3))


def test_the_room_for_answers(tokenizer):
    own = bench("diffusion", tokenizer, max_position_embeddings=40)
    values = [{"prompt": "q", "answer": "12345"}]
    for settings, room in (({}, 6), ({"decoding": {"block_length": 4}}, 6), ({"max_new_tokens": 7}, 7)):
        asked = task("generation", **settings)
        outcome = run_generation(own, asked, rows(asked, *values))
        assert outcome.settings["generate"]["max_new_tokens"] == room
    short, long = task("generation", max_new_tokens=3), task("generation", max_new_tokens=30)
    with pytest.raises(DataError, match="x.jsonl, row 1: its answer must fit into `max_new_tokens` of t, got 6 and 3"):
        run_generation(own, short, rows(short, *values))
    with pytest.raises(DataError, match="row 1: prompt and answer must fit into `max_position_embeddings`, got"):
        run_generation(own, long, rows(long, *values))


# ---- answers


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batches_do_not_change_answers(tokenizer, name, temperature):
    prompts = [prompt_ids(tokenizer, "The cat " * (i % 4 + 1)) for i in range(20)]
    settings, of = {"max_new_tokens": 4, "temperature": temperature}, task("statistics", max_new_tokens=4)
    said = [write_answers(bench(name, tokenizer, batch_size=size), of, prompts, settings) for size in (1, 7, 32)]
    assert said[0] == said[1] == said[2]
    if temperature:
        assert write_answers(bench(name, tokenizer, seed=1), of, prompts, settings) != said[0]
        alike = write_answers(bench(name, tokenizer), of, prompts[:1] * 32, settings)
        assert alike[:16] != alike[16:]  # each group has a seed of its own,
        other = write_answers(bench(name, tokenizer, seed=16), of, prompts[:1] * 16, settings)
        assert other != alike[16:]  # and no other run's has it,
        renamed = task("statistics", name="u", max_new_tokens=4)
        assert write_answers(bench(name, tokenizer), renamed, prompts, settings) != said[0]  # nor another task's
    else:
        own = bench(name, tokenizer)
        one = generate(own.model, tokenizer, prompts[3], max_new_tokens=4, temperature=0.0).text
        assert tokenizer.decode(said[0][3][0], skip_special_tokens=True) == one


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_canvas_loses_nothing_to_a_longer_prompt(tokenizer, temperature):
    """Of a total length, drawn or not: as many tokens as each prompt alone leaves room for."""
    own = bench("diffusion", tokenizer, batch_size=8)
    prompts = [prompt_ids(tokenizer, text) for text in ("The", "The cat sat on the mat", "The")]
    own.model.generation_config.update(max_length=40, eos_policy="forbid")
    said = write_answers(own, task("statistics", max_new_tokens=4), prompts, {"temperature": temperature})
    assert [len(ids) for ids, _ in said] == [40 - len(prompt) for prompt in prompts]


# ---- presets


def test_presets_are_paired(tokenizer, monkeypatch):
    presets = {"one": {"steps": 1}, "all": {"block_length": 4}}
    settings = task("presets", presets=presets, decoding={"cfg_scale": 0.5})
    asked = rows(settings, *({"prompt": f"q{i}", "answer": "7"} for i in range(4)))
    said, seen = {"one": ["7", "7", "1", "1"], "all": ["7", "1", "1", "1"]}, []

    def write(model, tokenizer, prompt, seed, **options):
        which = "one" if "steps" in options else "all"
        seen.append((which, seed, options["max_new_tokens"], options["cfg_scale"], options["temperature"]))
        text = said[which][sum(name == which for name, *_ in seen) - 1]
        from nanollada.scripts.decoding.writing import Generated

        return Generated(text, 2, True, 0.1, 0.1, 2.0 if which == "one" else 1.0)

    monkeypatch.setattr("nanollada.scripts.evaluation.tasks.presets.generate", write)
    outcome = run_presets(bench("diffusion", tokenizer, seed=5), settings, asked)
    found = {result["metric"]: result for result in outcome.results}
    assert found["exact_match/one"]["value"] == 0.5 and found["exact_match/all"]["value"] == 0.25
    assert found["tokens_per_forward/one"]["value"] == 2.0 and found["tokens_per_forward/all"]["value"] == 1.0
    difference = found["exact_match/all − one"]
    assert difference["value"] == -0.25
    assert difference["standard_error"] == pytest.approx(math.sqrt((3 * 0.25**2 + 0.75**2) / 3 / 4))
    assert [item[1:] for item in seen[:4]] == [item[1:] for item in seen[4:]]  # the same room and seeds
    assert [item[1] for item in seen[:4]] == [keyed_seed(5, "t", place) for place in range(4)]  # of run, task, row
    assert {item[2:] for item in seen} == {(2, 0.5, 0.0)}
    assert [record["preset"] for record in outcome.records] == ["one"] * 4 + ["all"] * 4
    assert found["exact_match/all"]["generate"]["block_length"] == 4


def test_presets_with_a_real_model(tokenizer):
    settings = task("presets", presets={"slow": {}, "fast": {"steps": 1}})
    asked = rows(settings, *({"prompt": f"q{i}", "answer": "777"} for i in range(3)))
    found = {
        result["metric"]: result for result in run_presets(bench("diffusion", tokenizer), settings, asked).results
    }
    assert found["tokens_per_forward/fast"]["value"] > found["tokens_per_forward/slow"]["value"]
    same = task("presets", presets={"a": {}, "b": {"remasking": "low_confidence"}})
    results = run_presets(bench("diffusion", tokenizer), same, asked).results
    (difference,) = [result for result in results if "−" in result["metric"]]
    assert difference["value"] == difference["standard_error"] == 0


# ---- free text


@pytest.mark.parametrize("name", CLASSES)
def test_statistics_are_those_of_the_texts(tokenizer, name):
    own = bench(name, tokenizer, seed=2)
    settings = parse_task({"name": "t", "kind": "statistics", "rows": 5, "max_new_tokens": 12}, "")
    drawn, _ = rows_of(settings, None, 0)
    outcome = run_statistics(own, settings, drawn)
    found = {result["metric"]: result for result in outcome.results}
    texts = [record["tokens"] for record in outcome.records]
    assert len({tuple(text) for text in texts}) == 5
    for metric, measure in (
        ("distinct_2", lambda t: distinct(t, 2)), ("unigram_entropy", unigram_entropy), ("repetition_4", repetition),
    ):  # fmt: skip
        values = [value for text in texts if (value := measure(text)) is not None]
        assert found[metric]["value"] == pytest.approx(sum(values) / len(values))
        assert found[metric]["rows"] == len(values)
    assert found["tokens"]["value"] == sum(map(len, texts)) / 5 and "judge_perplexity" not in found
    assert run_statistics(own, settings, drawn).records == outcome.records
    assert outcome.settings["generate"]["temperature"] == 1.0


def test_texts_without_tokens_are_left_out_of_a_figure(tokenizer, monkeypatch):
    scripted(monkeypatch, ["", "a", "a b a b a b"])
    settings = parse_task({"name": "t", "kind": "statistics", "rows": 3}, "")
    judge = (bench("ar", tokenizer).model, tokenizer)
    drawn = rows_of(settings, None, 0)[0]
    found = {r["metric"]: r for r in run_statistics(bench("ar", tokenizer, judge=judge), settings, drawn).results}
    assert (found["distinct_1"]["rows"], found["distinct_3"]["rows"], found["tokens"]["rows"]) == (2, 1, 3)
    scripted(monkeypatch, ["", "", ""])
    metrics = [r["metric"] for r in run_statistics(bench("ar", tokenizer, judge=judge), settings, drawn).results]
    assert metrics == ["tokens", "ended"]


def test_prompts_are_continued(tokenizer):
    own, settings = bench("ar", tokenizer, max_position_embeddings=30), task("statistics", max_new_tokens=4, chat=True)
    asked = rows(settings, {"prompt": "Why?"}, {"messages": [{"role": "user", "content": "Why?"}]})
    greedy = task("statistics", max_new_tokens=4, chat=True, decoding={"temperature": 0.0})
    outcome = run_statistics(own, greedy, asked)
    assert outcome.records[0] == outcome.records[1]  # the same chat
    with pytest.raises(DataError, match="row 1: prompt and text must fit into `max_position_embeddings`, got"):
        run_statistics(own, settings, rows(settings, {"prompt": "The cat sat on the mat. " * 9}))


@pytest.mark.parametrize("name", CLASSES)
def test_the_checkpoints_own_draws_do_not_depend_on_the_batch(tokenizer, name):
    """Free text is drawn at temperature 1, whatever else `decoding` says; elsewhere the checkpoint may draw."""
    asked = task("statistics", max_new_tokens=6, decoding={"repetition_penalty": 1.1})
    outcome = run_statistics(bench(name, tokenizer), asked, rows(asked, *[{"prompt": "The cat"}] * 8))
    assert len({record["text"] for record in outcome.records}) > 4
    assert outcome.settings["generate"]["temperature"] == 1.0
    said = []
    for size in (3, 16):
        own = bench(name, tokenizer, batch_size=size)
        if name == "ar":
            own.model.generation_config.do_sample = True
        else:
            own.model.generation_config.remasking = "random"
        said.append(write_answers(own, asked, [prompt_ids(tokenizer, "The cat")] * 8, {"max_new_tokens": 6}))
    assert said[0] == said[1]


@pytest.mark.parametrize("kind", ["statistics", "speed"])
def test_a_prompt_that_the_vocabulary_lacks_is_named(char_tokenizer, kind):
    asked = task(kind, max_new_tokens=4)
    run = run_statistics if kind == "statistics" else run_speed
    with pytest.raises(DataError, match="x.jsonl, row 2: `prompt` must be spelt by the tokenizer's vocabulary, got"):
        run(bench("ar", char_tokenizer), asked, rows(asked, {"prompt": "a"}, {"prompt": "€"}))


# ---- the judge


def test_the_judge_says_what_the_loss_of_hf_says(tokenizer):
    ours = bench("ar", tokenizer).model
    torch.manual_seed(1)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    other = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.5, **shape)).eval()
    for model, start in ((ours, tokenizer.pad_token_id), (other, tokenizer.bos_token_id)):
        ids = tokenizer("The cat sat on 你好").input_ids
        row = torch.tensor([[start, *ids]])
        with torch.no_grad():
            loss = model(row, labels=row).loss.item()
        nats, count = judge_nats(model, tokenizer, "The cat sat on 你好")
        assert count == len(ids) and nats / count == pytest.approx(loss, rel=1e-6)
    assert judge_nats(ours, tokenizer, "") == (0.0, 0)
    whole, part = judge_nats(ours, tokenizer, "The cat sat on"), judge_nats(ours, tokenizer, "The cat")
    behind, count = judge_nats(ours, tokenizer, " sat on", "The cat")  # the chain rule
    assert (behind, count) == (pytest.approx(whole[0] - part[0], rel=1e-5), whole[1] - part[1])


def test_a_text_is_judged_behind_its_prompt(tokenizer, char_tokenizer, monkeypatch):
    own = bench("ar", tokenizer, judge=(bench("ar", tokenizer).model, tokenizer))
    scripted(monkeypatch, [" sat on"])
    for chat, context in ((False, "The cat"), (True, "")):
        asked = task("statistics", max_new_tokens=9, chat=chat)
        (record,) = run_statistics(own, asked, rows(asked, {"prompt": "The cat"})).records
        assert record["judge_nats"] == judge_nats(*own.judge, record["text"], context)[0]
    own.judge = (own.judge[0], char_tokenizer)
    scripted(monkeypatch, ["a", "é"])
    with pytest.raises(DataError, match="x.jsonl, row 2: `judge` must spell prompt and drawn text with its"):
        run_statistics(own, asked, rows(asked, {"prompt": "The cat"}, {"prompt": "The cat"}))


def test_what_a_judge_cannot_read(tokenizer):
    import copy

    model = bench("ar", tokenizer, max_position_embeddings=4).model
    with pytest.raises(ValueError, match="`judge` must have room for a text, got 8 tokens and 4 positions"):
        judge_nats(model, tokenizer, "1234567")
    other, plain = LlamaForCausalLM(LlamaConfig(vocab_size=8, **SHAPE)), copy.deepcopy(tokenizer)
    plain.bos_token = plain.eos_token = None
    with pytest.raises(ValueError, match="`judge` must have a token that begins a text"):
        judge_nats(other, plain, "1")


def test_the_perplexity_is_over_all_texts(tokenizer, monkeypatch):
    scripted(monkeypatch, ["The cat", "你好 sat on the mat", "a"])
    own = bench("ar", tokenizer, judge=(bench("ar", tokenizer).model, tokenizer))
    settings = parse_task({"name": "t", "kind": "statistics", "rows": 3}, "")
    outcome = run_statistics(own, settings, rows_of(settings, None, 0)[0])
    found = {result["metric"]: result for result in outcome.results}
    texts = [record["text"] for record in outcome.records]
    nats, tokens = zip(*(judge_nats(*own.judge, text) for text in texts), strict=True)
    assert found["judge_nats_per_token"]["value"] == pytest.approx(sum(nats) / sum(tokens))
    size = len("".join(texts).encode())
    assert found["judge_bits_per_byte"]["value"] == pytest.approx(sum(nats) / math.log(2) / size)
    perplexity = found["judge_perplexity"]
    assert perplexity["value"] == pytest.approx(math.exp(sum(nats) / sum(tokens)))
    error = found["judge_nats_per_token"]["standard_error"]
    assert perplexity["standard_error"] == pytest.approx(perplexity["value"] * error)


# ---- speed


@pytest.mark.parametrize("name", CLASSES)
def test_speed_is_measured_as_compare_does(tokenizer, name):
    own = bench(name, tokenizer)
    settings = task("speed", max_new_tokens=6, repeats=2, decoding={"steps": 2}, chat=False)
    outcome = run_speed(own, settings, rows(settings, {"prompt": "Why?"}, {"prompt": "The cat"}))
    found = {result["metric"]: result for result in outcome.results}
    tokens, seconds = ([record[key] for record in outcome.records] for key in ("tokens", "seconds"))
    assert found["tokens_per_second"]["value"] == pytest.approx(sum(tokens) / sum(seconds))
    assert found["seconds"]["value"] == pytest.approx(sum(seconds) / 2)
    per_forward = found["tokens_per_forward"]["value"]
    assert per_forward == 1.0 if name == "ar" else per_forward > 1.0
    expected = generate(own.model, tokenizer, prompt_ids(tokenizer, "Why?"), max_new_tokens=6, temperature=0.0,
                        **({"steps": 2} if name == "diffusion" else {}))  # fmt: skip
    assert outcome.records[0]["text"] == expected.text and tokens[0] == expected.tokens
