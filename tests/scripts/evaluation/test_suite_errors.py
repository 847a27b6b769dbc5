"""The standard errors of Monte Carlo bounds on short answers are what they say: many bounds, drawn and enumerated."""

import math

import pytest
import torch

from nanollada.modeling_nanollada import NanoLLaDAForMaskedLM
from nanollada.scripts.evaluation.bench import Bench, Planned, Row
from nanollada.scripts.evaluation.errors import check_errors, short_pairs
from nanollada.scripts.evaluation.kinds import KINDS
from nanollada.scripts.evaluation.suite_file import parse_task
from nanollada.trainers.data.files import DataError
from nanollada.trainers.models import config_for

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def bench(tokenizer):
    torch.manual_seed(0)
    model = NanoLLaDAForMaskedLM(config_for(tokenizer, initializer_range=0.6, **SHAPE)).eval()
    return Bench(model, tokenizer, samples=128, batch_size=50)


def drawn_pairs(count, lengths):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 300, (count, 16), generator=generator).tolist()
    return [([0, *row[:3]], row[3 : 3 + lengths[i % len(lengths)]]) for i, row in enumerate(ids)]


def test_errors_cover_the_truth(bench):
    """200 answers: about 95 % within two standard errors, errors of the stated size, and no bias."""
    covers(check_errors(bench, drawn_pairs(200, (2, 3, 4, 5, 6, 7, 8))))


@pytest.mark.slow
def test_errors_cover_the_truth_of_answers_that_are_drawn(bench):
    """The lengths that the protocol does not enumerate itself."""
    covers(check_errors(bench, drawn_pairs(200, (8, 9, 10, 11, 12))))


def covers(found):
    assert found["pairs"] == 200 and 0.9 <= found["within_2"] <= 0.995
    assert found["mean_squared_z"] == pytest.approx(1, abs=0.3)
    assert abs(found["mean_z"]) < 3 / math.sqrt(200)
    assert found["rms_error"] == pytest.approx(found["rms_standard_error"], rel=0.25)
    assert found["rms_error"] > 0.01  # a model of opinions: there is noise to speak of


def test_text_that_the_vocabulary_lacks_is_named(char_tokenizer):
    model = NanoLLaDAForMaskedLM(config_for(char_tokenizer, **SHAPE)).eval()
    task = parse_task({"name": "t", "kind": "text", "data": "x"}, "")
    rows = [Row("x.jsonl", number, {"text": text}) for number, text in enumerate("a€", start=1)]
    with pytest.raises(DataError, match="x.jsonl, row 2: the text is not in the vocabulary: '€'"):
        short_pairs(Bench(model, char_tokenizer), [Planned(task, rows, "d")], 128)


def test_wrong_errors_are_found(bench, monkeypatch):
    from nanollada.trainers.scoring import likelihood

    real = likelihood.monte_carlo_nelbo

    def proud(*arguments):
        nats, variance = real(*arguments)
        return nats, variance / 4  # half of the error

    monkeypatch.setattr(likelihood, "monte_carlo_nelbo", proud)
    found = check_errors(bench, drawn_pairs(60, (3, 4, 5)))
    assert found["within_2"] < 0.85 and found["mean_squared_z"] > 2


def test_blocks_of_a_token_leave_nothing_to_chance(bench):
    found = check_errors(bench, drawn_pairs(4, (3, 5)), block_length=1)
    assert found["within_2"] == 1 and found["mean_squared_z"] == 0 and found["rms_error"] < 1e-4


def test_short_answers_of_every_kind(bench, tokenizer):
    def planned(kind, *values, **settings):
        task = parse_task({"name": "t", "kind": kind, "data": "x", **settings}, "")
        rows = [Row("x", i, value) for i, value in enumerate(values, start=1)]
        return Planned(task, [Row(row.source, row.number, KINDS[kind].check_row(row, task)) for row in rows], "d")

    text = "The dog sat on the log, the cat sang to the bird and the fish did not. " * 3
    items = [
        planned("choice", {"ctx": "a", "choices": ["123456789", "1"], "label": 0}),
        planned("pairs", {"good": "12345678", "bad": "1234567"}),
        planned("generation", {"prompt": "q", "answer": "12345678"}),
        planned("text", {"text": text}),
    ]
    pairs = short_pairs(bench, items, 128)
    assert all(8 <= len(answer) <= 12 for _, answer in pairs)
    answers = [tokenizer.decode(answer) for _, answer in pairs]
    assert answers[:3] == [" 123456789", "12345678", "12345678<|im_end|>"]
    whole = [0, *tokenizer(text).input_ids]
    assert [len(answer) for _, answer in pairs[3:6]] == [8, 9, 10] and len(pairs[3:]) == (len(whole) - 29) // 16 + 1
    assert pairs[4] == (whole[16:32], whole[32:41])
    assert {len(answer) for _, answer in short_pairs(bench, items, 6)} >= {3, 4}
    with pytest.raises(ValueError, match="`samples` must be below 4095 to check errors, got 5000"):
        short_pairs(bench, items, 5000)
