"""Presets: what they expand to, what outranks them, and what of them is saved."""

import json

import pytest
import torch
from generation_models import EOS, PAD, PROMPT, VOCABULARY, build
from joint_loops import CONTROLS, Table
from transformers import pipeline

from nanollada.modeling_nanollada import NanoLLaDAForMaskedLM, NanoLLaDAGenerationConfig
from nanollada.modeling_nanollada.presets_nanollada import PRESETS, expand_preset

SETTINGS = {  # as published
    "llada2.1-speed": {"joint_threshold": 0.5, "joint_edit_threshold": 0.0},
    "llada2.1-quality": {"joint_threshold": 0.7, "joint_edit_threshold": 0.5},
    "llada2.2": {"joint_threshold": 0.5, "joint_edit_threshold": 0.0, "structural_edits": True},
}
RUN = {"max_new_tokens": 8, "eos_token_id": EOS, "pad_token_id": PAD, "use_cache": False}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_settings(name):
    assert set(PRESETS) == set(SETTINGS)
    model = Table(4, 2)
    settings, _ = model._prepare_generation_config(None, preset=name)
    assert {field: getattr(settings, field) for field in SETTINGS[name]} == SETTINGS[name]
    assert (settings.max_post_steps, settings.get_temperature()) == (16, 0)
    expected = model.generate(PROMPT, **RUN, **SETTINGS[name])
    assert torch.equal(model.generate(PROMPT, preset=name, **RUN), expected)
    config = NanoLLaDAGenerationConfig(preset=name, **RUN)
    assert torch.equal(model.generate(PROMPT, generation_config=config), expected)
    others = [model.generate(PROMPT, preset=other, **RUN).tolist() for other in PRESETS]
    assert len({str(other) for other in others}) == 3, "they should differ here"


def test_what_the_call_says_itself_counts():
    expanded = {"joint_threshold": 0.9, "joint_edit_threshold": 0.0, "temperature": 0.0, "steps": None}
    assert expand_preset({"preset": "llada2.1-speed", "joint_threshold": 0.9, "steps": None}) == expanded
    assert expand_preset({"preset": "llada2.1-speed", "joint_threshold": None})["joint_threshold"] == 0.5
    assert expand_preset({"preset": None, "steps": 2}) == expand_preset({"steps": 2}) == {"steps": 2}
    config = NanoLLaDAGenerationConfig(preset="llada2.2", structural_edits=False, max_post_steps=3)
    assert (config.joint_threshold, config.structural_edits, config.max_post_steps) == (0.5, False, 3)
    model = Table(4, 2)
    config = NanoLLaDAGenerationConfig(joint_threshold=0.9, **RUN)
    settings, _ = model._prepare_generation_config(config, preset="llada2.1-quality", joint_edit_threshold=0.2)
    assert (settings.joint_threshold, settings.joint_edit_threshold) == (0.7, 0.2)  # keywords override the config
    for call in ({"temperature": 1.0}, {"do_sample": True}):
        with pytest.raises(ValueError, match="`joint_threshold` .*`temperature` must be 0, got 1.0"):
            model.generate(PROMPT, preset="llada2.1-speed", **RUN, **call)
    assert model.generate(PROMPT, preset="llada2.1-speed", do_sample=False, **RUN).shape == (1, 13)
    with pytest.raises(ValueError, match="Only one of .*`threshold`.* may be set, got .*'threshold'"):
        model.generate(PROMPT, preset="llada2.1-speed", threshold=0.9, **RUN)


@pytest.mark.parametrize("name", ["llada2.3", "", 5, ["llada2.2"]], ids=repr)
def test_an_unknown_preset_is_refused(name):
    message = r"`preset` must be one of \('llada2.1-speed', 'llada2.1-quality', 'llada2.2'\), got "
    for call in (NanoLLaDAGenerationConfig, lambda **given: build().generate(PROMPT, max_new_tokens=2, **given)):
        with pytest.raises(ValueError, match=message):
            call(preset=name)


def test_the_settings_are_saved_and_not_the_name(tmp_path):
    NanoLLaDAGenerationConfig(preset="llada2.2", **RUN).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert "preset" not in saved and SETTINGS["llada2.2"].items() <= saved.items()
    loaded = NanoLLaDAGenerationConfig.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in SETTINGS["llada2.2"]} == SETTINGS["llada2.2"]
    model = build(block_length=4, **CONTROLS)
    model.generation_config = loaded
    model.save_pretrained(tmp_path / "model")
    again = NanoLLaDAForMaskedLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    assert torch.equal(again.generate(PROMPT), model.generate(PROMPT))
    assert torch.equal(
        again.generate(PROMPT), build(block_length=4, **CONTROLS).generate(PROMPT, preset="llada2.2", **RUN)
    )


def test_a_checkpoint_yields_to_a_preset():
    """What it says of deciding tokens: rule, EOS policy, schedule, draws; the rest stays."""
    model = build(block_length=4)
    own = {"threshold": 0.99, "eos_policy": "cut", "do_sample": True, "max_commits": 2, "max_new_tokens": 6}
    model.generation_config.update(**own, eos_token_id=None)
    out = model.generate(PROMPT, preset="llada2.1-speed")
    plain = build(block_length=4).generate(PROMPT, max_new_tokens=6, eos_token_id=None, **SETTINGS["llada2.1-speed"])
    assert torch.equal(out, plain) and out.shape == (1, 11)


def test_a_checkpoint_that_saved_a_preset_yields_to_a_call():
    model = build(block_length=4)
    model.generation_config = NanoLLaDAGenerationConfig(preset="llada2.1-quality", **RUN)
    assert torch.equal(
        model.generate(PROMPT, threshold=0.9), build(block_length=4).generate(PROMPT, threshold=0.9, **RUN)
    )
    settings, _ = model._prepare_generation_config(None, preset="llada2.1-speed")
    assert (settings.joint_threshold, settings.joint_edit_threshold) == (0.5, 0.0)


def test_pipelines_take_it(tokenizer):
    model = build(vocab_size=len(tokenizer), block_length=4, eos_token_id=None).float()
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    run = {"max_new_tokens": 8, "return_tensors": True, "do_sample": False}  # or pipelines draw
    found = write("The cat", preset="llada2.1-speed", **run)
    assert found == write("The cat", **run, **SETTINGS["llada2.1-speed"])
    assert found != write("The cat", **run)
    assert VOCABULARY < len(tokenizer)


def test_it_is_documented():
    for text in (NanoLLaDAGenerationConfig.__doc__, NanoLLaDAForMaskedLM.generate.__doc__):
        assert "preset" in text
    assert all(f"'{name}'" in " ".join(NanoLLaDAForMaskedLM.generate.__doc__.split()) for name in PRESETS)
