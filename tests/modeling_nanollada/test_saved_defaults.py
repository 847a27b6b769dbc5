"""A call on a checkpoint that says how it decodes: the call outranks it, whatever it sets."""

import pytest
import torch
from generation_models import EOS, MASK, PAD, PROMPT, SHAPE, VOCABULARY, build, left_padded

from nanollada.modeling_nanollada import (
    NanoLLaDAConfig,
    NanoLLaDAForCausalLM,
    NanoLLaDAForMaskedLM,
    NanoLLaDAGenerationConfig,
)
from nanollada.modeling_nanollada.rules_nanollada import OWN_SETTINGS

TOKENS = {"eos_token_id": EOS, "pad_token_id": PAD}
ANSWERS = {"trained_length": 16, "eos_policy": "cut", "threshold": 0.9}
# What the trainers write: whole rows that grow, whole canvases, blocks, and plain text.
SAVED = {
    "growing": {**ANSWERS, "max_new_tokens": 12, "block_length": 4, "grow_length": True},
    "canvas": {**ANSWERS, "max_length": 16},
    "block": {**ANSWERS, "max_new_tokens": 12},
    "text": {"trained_length": 16, "max_new_tokens": 8},
}
CALLS = (
    *({"position_score": value} for value in OWN_SETTINGS["position_score"].allowed),
    *({"eos_policy": value} for value in OWN_SETTINGS["eos_policy"].allowed),
    *({"remasking": value} for value in OWN_SETTINGS["remasking"].allowed),
    *({"commit_schedule": value} for value in OWN_SETTINGS["commit_schedule"].allowed),
    *({"remdm": value, "remdm_eta": 0.5, "steps": 3} for value in OWN_SETTINGS["remdm"].allowed),
    {"commit_schedule": "ramp", "ramp_start": 0.2, "ramp_end": 0.6},
    {"block_length": 2},
    {"block_length": 4, "grow_length": False},
    {"grow_length": True},
    {"steps": 2},
    {"max_commits": 1},
    {"threshold": 0.5},
    {"threshold": 0.5, "low_threshold": 0.2},
    {"threshold": 0.5, "kl_threshold": 0.01},
    {"factor": 1.0},
    {"entropy_bound": 0.1},
    {"joint_threshold": 0.5},
    {"joint_threshold": 0.7, "joint_edit_threshold": 0.5, "joint_penalty": 1.0, "max_post_steps": 2},
    {"joint_threshold": 0.5, "structural_edits": True},
    {"edit_threshold": 0.0},
    {"edit_threshold": 0.2, "edit_margin": 0.1, "max_edits": 2, "max_post_steps": 2},
    {"edit_threshold": 0.0, "edit_rule": "remask", "threshold": 0.5},
    {"cfg_scale": 1.0},
    {"early_stop": False},
    {"approximate_cache": "prefix"},
    {"approximate_cache": "dual", "factor": 1.0},
    {"use_cache": False},
    {"do_sample": True, "top_k": 3},
    {"temperature": 0.7},
    {"repetition_penalty": 1.3},
    {"max_new_tokens": 5},
    {"max_length": 9},
)
# What of the checkpoint's yields: by the name of the call's first setting, where that is not its own.
NO_RULE = ("factor", "entropy_bound", "remdm", "joint_threshold")


def saved_model(kind):
    model = build(block_length=4 if kind == "block" else None, delete_token_id=62, insert_token_id=63)
    model.generation_config = NanoLLaDAGenerationConfig(**TOKENS, **SAVED[kind])
    return model


@pytest.fixture(scope="module")
def models():
    return {kind: saved_model(kind) for kind in SAVED}


def test_every_setting_is_called():
    for_masks_of_prompts = {"max_expansions"}  # see test_expansion_decoding.py
    assert {*OWN_SETTINGS} - for_masks_of_prompts == {name for call in CALLS for name in call} & {*OWN_SETTINGS}


@pytest.mark.parametrize("kind", SAVED)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_a_call_outranks_the_checkpoint(kind, call, models):
    """What it says is in force, what contradicts it is not, all else is the checkpoint's, and `generate` writes."""
    model, saved = models[kind], SAVED[kind]
    if kind == "block" and "approximate_cache" in call:
        with pytest.raises(ValueError, match=f"`approximate_cache` is for .*, got '{call['approximate_cache']}'"):
            model.generate(PROMPT, **call)
        return
    settings, _ = model._prepare_generation_config(None, **call)
    assert {name: getattr(settings, name) for name in call} == call
    rule = {*call} & {*NO_RULE} or "random" in call.values() or call.get("position_score") == "entropy"
    yielding = {"threshold"} if rule else set()
    if call.get("early_stop") is False or {*call} & {"remdm", "joint_threshold"}:
        yielding |= {"eos_policy"}
    if "max_new_tokens" in call or "max_length" in call:
        yielding |= {"max_new_tokens", "max_length"}
    kept = {name: value for name, value in saved.items() if name not in {*call, *yielding}}
    assert {name: getattr(settings, name) for name in kept} == kept
    assert all(getattr(settings, name) != saved.get(name) for name in yielding & saved.keys() - call.keys())
    if kind == "text":
        return
    out = model.generate(PROMPT, **call)
    longest = call.get("max_length") or PROMPT.shape[1] + call.get("max_new_tokens", saved.get("max_new_tokens", 11))
    assert out.shape[1] == longest and out[:, :5].equal(PROMPT) and not (out == MASK).any()


@pytest.mark.parametrize("kind", SAVED)
def test_a_call_alone_is_told_what_is_wrong_with_it(kind, models):
    for call, message in (
        ({"factor": 1.0, "threshold": 0.5}, "Only one of .* may be set, got .'threshold', 'factor'."),
        ({"low_threshold": 0.5, "threshold": 0.2}, "`low_threshold` must not exceed `threshold`, got 0.5 and 0.2"),
        ({"low_threshold": 0.95}, "`low_threshold` refines `threshold`, which must be set, got None"),
        ({"remdm": "cap", "eos_policy": "last"}, "`eos_policy` must not be 'last'"),
        ({"eos_policy": "cut", "early_stop": False}, "`early_stop` needs another `eos_policy` than 'cut', got False"),
        ({"top_k": 3}, "`top_k` needs a `temperature` above 0, got 3"),
        ({"steps": 2, "commit_schedule": "ramp"}, "`steps` must be unset where `commit_schedule` is 'ramp', got 2"),
        ({"factor": -1.0}, "`factor` must be a number > 0, got -1.0"),
        ({"treshold": 0.5}, "treshold"),
    ):
        with pytest.raises(ValueError, match=message):
            models[kind].generate(PROMPT, **call)


def test_the_later_word_decides_how_much_is_written(models, caplog):
    """A keyword before a config before the checkpoint, and no warning of two lengths."""
    config = NanoLLaDAGenerationConfig(max_length=9)
    causal = NanoLLaDAForCausalLM(NanoLLaDAConfig(vocab_size=VOCABULARY, **SHAPE)).eval()
    causal.generation_config.update(max_new_tokens=12, eos_token_id=None)
    canvas = saved_model("canvas")
    for model in (models["growing"], canvas, causal):
        model.generation_config.eos_policy = None
        for call, width in (
            ({}, 16 if model is canvas else 17),
            ({"max_new_tokens": 3}, 8),
            ({"max_length": 7}, 7),
            ({"generation_config": type(model.generation_config)(max_length=9)}, 9),
        ):
            given = {"eos_token_id": None, **call} if "generation_config" not in call else call
            assert model.generate(PROMPT, **given).shape[1] == width, call
    settings, _ = canvas._prepare_generation_config(config, max_new_tokens=2)
    assert (settings.max_new_tokens, settings.max_length) == (2, None)
    assert "seem to have been set" not in caplog.text


def test_a_saved_limit_ends_at_the_last_position():
    """A prompt and the checkpoint's own limit together fit into the model's positions; what a call says is its own."""
    full = "Input length of input_ids is 10, but `max_length` is set to 10"
    nothing = "`max_length` must exceed a prompt without mask tokens, got 10 for 10"  # nobody said `max_new_tokens=0`
    for model_class, tokens, message in (
        (NanoLLaDAForCausalLM, {}, full),
        (NanoLLaDAForMaskedLM, {"pad_token_id": PAD}, nothing),
    ):
        model = model_class(NanoLLaDAConfig(vocab_size=VOCABULARY, max_position_embeddings=10, **SHAPE)).eval()
        model.generation_config.update(max_new_tokens=8, **tokens)
        ids, attention_mask = left_padded([[4, 5, 6, 7, 8], [9, 10]])
        assert model.generate(ids, attention_mask=attention_mask).shape == (2, 10)
        assert model.generate(PROMPT[:, :1]).shape[1] == 9
        assert model.generate(PROMPT, max_new_tokens=8).shape[1] == 13
        with pytest.raises(ValueError, match=message):
            model.generate(torch.full((1, 10), 5))
