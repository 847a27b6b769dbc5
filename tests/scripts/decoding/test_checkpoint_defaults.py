"""Programs leave to the checkpoint what nobody said, and report what was really used."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from nanollada.modeling_nanollada import NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM
from nanollada.scripts.benchmarks import decoding_run
from nanollada.scripts.decoding.settings import draws, effective_settings, generation_settings, new_tokens_limit
from nanollada.scripts.evaluation.answers import batches_of_prompts, exact_match
from nanollada.scripts.evaluation.tasks.generation import length_for
from nanollada.trainers.models import config_for

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
GROWING = {"max_new_tokens": 12, "block_length": 4, "grow_length": True, "threshold": 0.9, "eos_policy": "cut"}
ROWS = [{"prompt": "The", "completion": " cat"}, {"prompt": "The dog sat", "completion": " on the mat"}]


@pytest.fixture
def build(tokenizer):
    def make(model_class=NanoLLaDAForMaskedLM, **saved):
        torch.manual_seed(0)
        model = model_class(config_for(tokenizer, **SHAPE)).eval()
        model.generation_config.update(**saved)
        return model

    return make


def test_nothing_is_added_to_what_the_checkpoint_says(build):
    assert generation_settings(build()) == {"max_new_tokens": 128}
    assert generation_settings(build(**GROWING)) == generation_settings(build(max_length=20)) == {}
    assert effective_settings(build(**GROWING)) == GROWING
    assert effective_settings(build(max_length=20)) == {"max_length": 20}
    assert effective_settings(build(max_length=20), max_new_tokens=3) == {"max_new_tokens": 3}


def test_what_yields_to_a_call_is_not_reported(build):
    rest = {name: value for name, value in GROWING.items() if name != "threshold"}
    assert effective_settings(build(**GROWING), factor=1.0) == {**rest, "factor": 1.0}
    assert not draws(build(**GROWING))
    assert draws(build(**GROWING), remdm="cap") and draws(build(**GROWING), remasking="random")


def test_how_much_a_checkpoint_writes(build):
    assert new_tokens_limit(build(), 5) == 128 and new_tokens_limit(build(**GROWING), 5) == 12
    assert new_tokens_limit(build(max_length=20), 5) == 15
    message = "`max_new_tokens` must be given for a prompt of 20 tokens: the checkpoint's `max_length`.* is 20"
    with pytest.raises(ValueError, match=message):
        new_tokens_limit(build(max_length=20), 20)


def test_answers_are_as_long_as_the_checkpoint_says(build, tokenizer):
    """The longest reference only where the checkpoint doesn't say; a call goes first."""
    longest = max(len(tokenizer(row["completion"]).input_ids) for row in ROWS) + 1
    for saved, given, expected in (
        ({}, {}, {"max_new_tokens": longest}),
        (GROWING, {}, {"max_new_tokens": 12}),
        ({"max_length": 30}, {}, {"max_length": 30}),
        (GROWING, {"max_new_tokens": 5}, {"max_new_tokens": 5}),
    ):
        used = exact_match(build(**saved), tokenizer, ROWS, **given)["settings"]
        assert {name: used[name] for name in used if name.startswith("max_")} == expected
    used = exact_match(build(NanoLLaDAForCausalLM, max_new_tokens=6), tokenizer, ROWS)["settings"]
    assert used["max_new_tokens"] == 6
    bench = SimpleNamespace(model=build(**GROWING), require_room=lambda *args: None)
    rows, asked = [SimpleNamespace(faults=nullcontext)], [([1, 2], [3] * 7)]
    assert length_for(bench, SimpleNamespace(max_new_tokens=None), rows, asked) == {}
    assert length_for(bench, SimpleNamespace(max_new_tokens=9), rows, asked) == {"max_new_tokens": 9}
    bench.model = build()
    assert length_for(bench, SimpleNamespace(max_new_tokens=None), rows, asked) == {"max_new_tokens": 7}


def test_a_prompt_without_room_is_named_before_anything_is_written(build, tokenizer, monkeypatch):
    model = build(max_length=8)
    monkeypatch.setattr(model, "generate", lambda *args, **kwargs: pytest.fail("it was asked"))
    rows = [*ROWS, {"prompt": "the cat sat on a mat " * 20, "completion": "."}]
    with pytest.raises(ValueError, match=r"`rows`, row 3: `max_new_tokens` must be given .* `max_length`.* is 8"):
        exact_match(model, tokenizer, rows)


def test_padding_takes_nothing_from_a_canvas(build):
    """Of a total length prompts of one length share a batch."""
    prompts = [[1] * length for length in (5, 3, 5, 3, 3)]
    assert list(batches_of_prompts(build(**GROWING), prompts, 4, {})) == [[1, 3, 4, 0], [2]]
    assert list(batches_of_prompts(build(max_length=9), prompts, 2, {})) == [[1, 3], [4], [0, 2]]
    assert list(batches_of_prompts(build(max_length=9), prompts, 4, {"max_new_tokens": 4})) == [[1, 3, 4, 0], [2]]


def test_a_named_decoder_is_itself(build, monkeypatch):
    """The benchmark's "quota" decides one token a step, whatever threshold the checkpoint has."""
    options = dict.fromkeys(("model", "data", "block_length", "threads")) | {"size": "tiny", "model_block_length": 0}
    options |= {"prompt_length": 4, "new_tokens": 8, "batch_size": 1, "calls": 1, "seed": 0}
    monkeypatch.setattr(decoding_run, "load", lambda *args: (build(**{**GROWING, "threshold": 0.0}), None))
    assert decoding_run.measure("quota", **options)["tokens_per_forward"] == 1.0
