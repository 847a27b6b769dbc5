"""Scored tasks against enumeration, exact likelihoods and real generation; the rows and the noise that they share."""

import math

import pytest
import torch

from nanollada.modeling_nanollada import NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM
from nanollada.scripts.decoding.writing import generate
from nanollada.scripts.evaluation.bench import Bench, Row
from nanollada.scripts.evaluation.checkpoint import evaluate_checkpoint
from nanollada.scripts.evaluation.metrics import win_probability
from nanollada.scripts.evaluation.suite_file import parse_task
from nanollada.scripts.evaluation.tasks.choice import run_choice
from nanollada.scripts.evaluation.tasks.cloze import check_cloze, cloze_pairs, run_cloze
from nanollada.scripts.evaluation.tasks.pairs import run_pairs, text_pairs
from nanollada.scripts.evaluation.tasks.text import run_text
from nanollada.trainers.data.files import DataError
from nanollada.trainers.models import config_for
from nanollada.trainers.scoring.continuations import conditional_rows, encode_pair
from nanollada.trainers.scoring.likelihood import causal_nll, exact_nelbo

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CLASSES = {"ar": NanoLLaDAForCausalLM, "diffusion": NanoLLaDAForMaskedLM}
PAD = 0
CHOICES = [
    {"ctx": "The cat", "choices": ["sat", "on a log", "é"], "label": 1},
    {"ctx": "What is it? ", "choices": ["test", "the mat."], "label": 0},
    {"ctx": "今天", "choices": ["天气很好", "散步", "a b"], "label": 2},
    {"ctx": "def add(first", "choices": ["return", "second)"], "label": 1},
]
PAIRS = [
    {"good": "The cat sat.", "bad": "The cat sit.", "group": "a"},
    {"good": "你好吗", "bad": "好你吗", "group": "b"},
    {"good": "The dog", "bad": "dog The", "group": "a"},
]


def bench(name, tokenizer, **options):
    torch.manual_seed(0)
    overrides = {key: options.pop(key) for key in ("block_length", "max_position_embeddings") if key in options}
    model = CLASSES[name](config_for(tokenizer, initializer_range=0.5, **SHAPE, **overrides)).eval()
    return Bench(model, tokenizer, **options)


def task(kind, **settings):
    return parse_task({"name": "t", "kind": kind, "data": "x", **settings}, "suite, task 1")


def rows(values):
    return [Row("x.jsonl", number, value) for number, value in enumerate(values, start=1)]


@torch.no_grad()
def truth(bench, context, continuation):
    """Nats by enumeration of every mask, or exactly; pair by pair, through the likelihood's own functions."""
    (batch,) = conditional_rows([context], [continuation], PAD)
    return (exact_nelbo if bench.is_diffusion else causal_nll)(bench.model, batch).item()


# ---- choice


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("language", ["en", "zh"])
def test_choices_are_those_of_the_enumeration(tokenizer, name, language):
    own = bench(name, tokenizer, samples=2**13, batch_size=3)  # enumerates up to twelve tokens
    outcome = run_choice(own, task("choice", language=language, suffix=" ?"), rows(CHOICES))
    picked = {"acc": [], "acc_norm": [], "acc_bytes": []}
    for row, record in zip(CHOICES, outcome.records, strict=True):
        gap = "" if language == "zh" else " "
        nats = [truth(own, *encode_pair(tokenizer, row["ctx"] + " ?", gap + choice)) for choice in row["choices"]]
        assert record["nats"] == pytest.approx(nats, rel=1e-5) and record["variance"] == [0.0] * len(nats)
        for metric, size in (("acc", lambda c: 1), ("acc_norm", len), ("acc_bytes", lambda c: len(c.encode()))):
            values = [value / size(choice) for value, choice in zip(nats, row["choices"], strict=True)]
            picked[metric].append(min(range(len(values)), key=values.__getitem__))
            assert record[f"chosen_{metric}"] == picked[metric][-1]
    for result in outcome.results:
        hits = [one == row["label"] for one, row in zip(picked[result["metric"]], CHOICES, strict=True)]
        assert (result["value"], result["rows"], result["open_share"]) == (sum(hits) / 4, 4, 0)
        assert result["chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert len({tuple(places) for places in picked.values()}) > 1  # the normalisations differ here


def test_the_noise_of_decisions_is_that_of_the_scores(tokenizer):
    own = bench("diffusion", tokenizer, samples=2)
    outcome = run_choice(own, task("choice"), rows(CHOICES))
    records = outcome.records
    assert any(any(record["variance"]) for record in records)
    closed = {result["metric"]: result["open_share"] for result in outcome.results}
    for metric, size in (("acc", lambda c: 1), ("acc_norm", len)):
        wrong = 0.0
        for row, record in zip(CHOICES, records, strict=True):
            sizes = [size(choice) for choice in row["choices"]]
            scores = [value / by for value, by in zip(record["nats"], sizes, strict=True)]
            noise = [value / by**2 for value, by in zip(record["variance"], sizes, strict=True)]
            wrong += 1 - win_probability(scores.index(min(scores)), scores, noise)
        assert closed[metric] == pytest.approx(wrong / 4) and closed[metric] > 0


@pytest.mark.parametrize("name", CLASSES)
def test_batches_and_neighbours_do_not_change_a_score(tokenizer, name):
    kinds = ((run_choice, "choice", CHOICES), (run_pairs, "pairs", PAIRS))
    for run, kind, values in kinds:
        flat = []
        for size, part in ((1, values), (16, values), (16, values[:2])):
            own = bench(name, tokenizer, samples=4, batch_size=size)
            records = run(own, task(kind), rows(part)).records
            flat.append([value for record in records for value in record["nats"]])
        assert flat[0] == pytest.approx(flat[1], rel=1e-5)
        assert flat[2] == pytest.approx(flat[1][: len(flat[2])], rel=1e-5)


# ---- pairs


@pytest.mark.parametrize("name", CLASSES)
def test_pairs_by_group(tokenizer, name):
    own = bench(name, tokenizer, samples=2**13)
    outcome = run_pairs(own, task("pairs"), rows(PAIRS))
    right = []
    for pair, record in zip(PAIRS, outcome.records, strict=True):
        nats = [truth(own, [PAD], tokenizer(pair[side]).input_ids) for side in ("good", "bad")]
        assert record["nats"] == pytest.approx(nats, rel=1e-5)
        right.append(nats[0] < nats[1])
    overall, first, second = outcome.results
    assert overall["value"] == sum(right) / 3 and overall["chance"] == 0.5 and "group" not in overall
    assert (first["metric"], first["group"], first["rows"]) == ("accuracy/a", "a", 2)
    assert first["value"] == (right[0] + right[2]) / 2 and (second["rows"], second["value"]) == (1, right[1])


def test_a_tie_is_no_preference(tokenizer):
    own = bench("ar", tokenizer)
    own.model.lm_head.weight.data.zero_()
    values = [{"good": "The cat", "bad": "cat The"}]  # as many tokens, all of them equally probable
    assert len({len(ids) for _, ids in text_pairs(own, task("pairs"), rows(values))}) == 1
    assert run_pairs(own, task("pairs"), rows(values)).results[0]["value"] == 0


def test_both_texts_of_a_pair_have_the_same_masks(tokenizer):
    """Two texts that the model cannot tell apart get the same bound from the same draws, whatever their place."""
    own = bench("diffusion", tokenizer, samples=2)
    one, other = tokenizer("a").input_ids[0], tokenizer("b").input_ids[0]
    for weight in (own.model.get_input_embeddings().weight, own.model.lm_head.weight):
        weight.data[other] = weight.data[one]
    values = [{"good": "The dog sang a log", "bad": "The dog sang b log"}] * 3
    outcome = run_pairs(own, task("pairs"), rows(values))
    assert all(record["nats"][0] == pytest.approx(record["nats"][1], rel=1e-6) for record in outcome.records)
    assert outcome.records[0]["nats"][0] != pytest.approx(outcome.records[1]["nats"][0], rel=1e-3)  # noise of its own


# ---- cloze

CLOZE = [
    {"ctx": "The cat sat on the", "answer": "mat."},
    {"ctx": "It is", "answer": "a"},
    {"ctx": "Is it", "answer": "so"},
]


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("batch_size", [1, 8])
def test_cloze_nats_and_greedy_answers(tokenizer, name, batch_size):
    own = bench(name, tokenizer, samples=2**13, batch_size=batch_size)
    encoded = [encode_pair(tokenizer, row["ctx"], " " + row["answer"]) for row in CLOZE]
    said = [
        generate(own.model, tokenizer, prompt, max_new_tokens=len(ids), temperature=0.0).text
        for prompt, ids in encoded
    ]
    values = [*CLOZE, {"ctx": "The cat", "answer": "x"}]
    outcome = run_cloze(own, task("cloze"), rows(values))
    nats = [truth(own, *encode_pair(tokenizer, row["ctx"], " " + row["answer"])) for row in values]
    assert [record["nats"] for record in outcome.records] == pytest.approx(nats, rel=1e-5)
    mean, match = outcome.results
    assert mean["value"] == pytest.approx(sum(nats) / 4) and mean["bound"] == (name == "diffusion")
    spread = math.sqrt(sum((value - mean["value"]) ** 2 for value in nats) / 3 / 4)
    assert mean["standard_error"] == pytest.approx(spread, rel=1e-5) and mean["mask_error"] == 0
    plain = [
        tokenizer.decode(tokenizer(record["said"]).input_ids, skip_special_tokens=True) for record in outcome.records
    ]
    assert plain[:3] == said and match["rows"] == 4


@pytest.mark.parametrize("name", CLASSES)
def test_what_the_model_says_itself_matches(tokenizer, name):
    own = bench(name, tokenizer)
    for token in range(len(tokenizer)):  # only letters, which decode and encode to themselves
        if tokenizer.decode([token]) not in "abcdefgh":
            own.model.lm_head.weight.data[token] = 0
    prompt, _ = encode_pair(tokenizer, "The cat", "x")
    said = generate(own.model, tokenizer, prompt, max_new_tokens=2, temperature=0.0).text
    assert len(tokenizer(said).input_ids) == 2
    settings = task("cloze", delimiter="")
    values = [{"ctx": "The cat", "answer": said}, {"ctx": "The cat", "answer": said[0] + "i"}]
    outcome = run_cloze(own, settings, rows(values))
    assert [record["right"] for record in outcome.records] == [True, False]
    assert outcome.results[1]["value"] == 0.5


# ---- text


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    "settings", [{"max_length": 24}, {"max_length": 24, "rolling_context": 8}, {"max_length": 64}]
)
def test_texts_have_the_likelihood_of_evaluate(tokenizer, name, settings, tmp_path):
    import json

    own = bench(name, tokenizer, samples=4, seed=3)
    values = [{"text": text} for text in ("The cat sat on the mat.", "你好,世界。", "é 🎉", "def add(a, b)")]
    if settings == {"max_length": 64}:
        turns = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": row["text"]}] for row in values]
        values = [{"messages": turn} for turn in turns]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    own.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    options = {"samples": 4, "seed": 3, **settings}
    expected = evaluate_checkpoint(str(tmp_path), str(tmp_path / "x.jsonl"), **options)["results"]
    outcome = run_text(own, task("text", **settings), rows(values))
    bits, nats = outcome.results
    for figure, same in zip((bits, nats), expected, strict=True):
        for key in ("value", "standard_error", "mask_error"):
            assert figure[key] == pytest.approx(same[key], rel=1e-6)
        assert all(figure[key] == same[key] for key in ("metric", "bound", "tokens", "bytes", "documents"))
    assert sum(record["tokens"] for record in outcome.records) == bits["tokens"] and bits["rows"] == len(
        outcome.records
    )


# ---- what does not fit


def test_what_is_too_long_is_refused(tokenizer):
    own = bench("ar", tokenizer, max_position_embeddings=20)
    long = "The cat sat on the mat. " * 3
    fits = "must fit into `max_position_embeddings`, got .* tokens and 20"
    for run, kind, values in (
        (run_choice, "choice", [CHOICES[2], {**CHOICES[0], "ctx": long}]),
        (run_cloze, "cloze", [{"ctx": "It is", "answer": "a"}, {"ctx": long, "answer": "a"}]),
        (run_pairs, "pairs", [{"good": "a", "bad": "b"}, {"good": "a", "bad": long}]),
    ):
        with pytest.raises(DataError, match=f"x.jsonl, row 2: .* {fits}"):
            run(own, task(kind), rows(values))
    with pytest.raises(ValueError, match="`max_length` of task t must fit into `max_position_embeddings`, got .* 20"):
        run_text(own, task("text"), rows([{"text": long}]))
    turn = [{"role": "user", "content": "q"}, {"role": "assistant", "content": long}]
    with pytest.raises(DataError, match="x.jsonl, row 1: it must fit into `max_length` of task t, got .* and 20"):
        run_text(bench("ar", tokenizer), task("text", max_length=20), rows([{"messages": turn}]))
    short = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(DataError, match=f"x.jsonl, row 2: it {fits}"):
        run_text(own, task("text"), rows([{"messages": short}, {"messages": turn}]))


def test_scores_that_are_no_numbers_are_refused(tokenizer):
    """The least of them would be the first choice, which may be the right one."""
    own = bench("ar", tokenizer)
    own.model.lm_head.weight.data[:] = math.nan
    for run, kind, values in (
        (run_choice, "choice", CHOICES[:1]),
        (run_cloze, "cloze", [{"ctx": "It is", "answer": "a"}]),
        (run_pairs, "pairs", [{"good": "a", "bad": "b"}]),
    ):
        with pytest.raises(DataError, match="x.jsonl, row 1: the model must give finite nats, got nan"):
            run(own, task(kind), rows(values))
    with pytest.raises(ValueError, match="the model must give finite nats, got nan in packed row 0"):
        run_text(own, task("text"), rows([{"text": "The cat"}]))


@pytest.mark.parametrize("name", CLASSES)
def test_the_row_of_infinite_nats_is_named(tokenizer, name):
    """A model that rules a token out; the row before it, which lacks that token, is in order."""
    own, odd = bench(name, tokenizer), tokenizer("z").input_ids[0]
    ruled_out = torch.nn.functional.one_hot(torch.tensor(odd), len(tokenizer)).bool()
    own.model.lm_head.register_forward_hook(lambda module, args, out: out.masked_fill(ruled_out, -math.inf))
    for run, kind, values in (
        (run_choice, "choice", [CHOICES[1], {**CHOICES[0], "choices": ["a", "z"]}]),
        (run_cloze, "cloze", [{"ctx": "It is", "answer": "a"}, {"ctx": "It is", "answer": "z"}]),
        (run_pairs, "pairs", [{"good": "a", "bad": "b"}, {"good": "a", "bad": "z"}]),
    ):
        with pytest.raises(DataError, match="x.jsonl, row 2: the model must give finite nats, got inf"):
            run(own, task(kind), rows(values))
    chats = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}] for answer in "aza"]
    with pytest.raises(DataError, match="x.jsonl, row 2: the model must give finite nats, got inf"):
        run_text(own, task("text"), rows([{"messages": chat} for chat in chats]))


def test_text_that_the_vocabulary_lacks_is_named(char_tokenizer):
    own = bench("ar", char_tokenizer)
    for run, kind, values in (
        (run_choice, "choice", [{**CHOICES[0], "choices": ["a", "€"]}]),
        (run_cloze, "cloze", [{"ctx": "€", "answer": "a"}]),
        (run_pairs, "pairs", [{"good": "a", "bad": "€"}]),
    ):
        with pytest.raises(DataError, match="x.jsonl, row 1: the text is not in the vocabulary: '€'"):
            run(own, task(kind), rows(values))


def test_a_cloze_knows_nothing_of_the_generation_config(tokenizer):
    for name in CLASSES:
        own = bench(name, tokenizer)
        values = rows([{"ctx": "The cat", "answer": " sat on the mat and sat."}])
        outcome = run_cloze(own, task("cloze"), values)
        (plain,), how = outcome.records, outcome.results[1]["generate"]
        assert how == ({"do_sample": False} if name == "ar" else {"temperature": 0.0})
        own.model.generation_config.update(repetition_penalty=5.0, do_sample=True, temperature=9.0)
        if name != "ar":
            own.model.generation_config.update(steps=1, remasking="random")
        outcome = run_cloze(own, task("cloze"), values)
        assert outcome.records == [plain] and outcome.results[1]["generate"] == how
        certain = 99.0 * torch.nn.functional.one_hot(torch.tensor(tokenizer.mask_token_id), len(tokenizer))
        own.model.lm_head.register_forward_hook(lambda module, args, out, certain=certain: out + certain)
        assert "<|mask|>" not in run_cloze(own, task("cloze"), values).records[0]["said"]


def test_rows_that_cannot_be_scored(tokenizer):
    own = bench("diffusion", tokenizer)
    mixed = [{"text": "a"}, {"prompt": "a", "completion": "b"}]
    with pytest.raises(DataError, match="row 2: mixed formats: sft in a task that the first row made pretrain"):
        run_text(own, task("text"), rows(mixed))
    with pytest.raises(ValueError, match="`rolling_context` is for rows that are a plain `text`"):
        run_text(own, task("text", rolling_context=8), rows([mixed[1]]))


def test_blocks_are_for_diffusion(tokenizer):
    settings = task("choice", eval_block_length=1)
    scored = run_choice(bench("diffusion", tokenizer, samples=2), settings, rows(CHOICES))
    assert not any(any(record["variance"]) for record in scored.records)  # a block of one token is enumerated
    own = run_choice(bench("diffusion", tokenizer, samples=2, block_length=1), task("choice"), rows(CHOICES))
    assert [record["nats"] for record in own.records] == [pytest.approx(record["nats"]) for record in scored.records]
    assert run_choice(bench("ar", tokenizer), settings, rows(CHOICES)).results  # AR has no blocks: left out


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("text", ["One line ends here.\n\nSecond\nthird", "你好 世界", "He sat."])
def test_the_last_word_of_a_text_keeps_what_stands_before_it(tokenizer, text, language):
    own, of = bench("ar", tokenizer), task("cloze", language=language)
    row = Row("x.jsonl", 1, {"text": text})
    ((prompt, target),) = cloze_pairs(own, of, [Row(row.source, row.number, check_cloze(row, of))])
    assert tokenizer.decode([*prompt[1:], *target]) == text
    assert tokenizer.decode(target).strip() == text.split()[-1]
