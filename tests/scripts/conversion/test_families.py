"""A model family is a file and an entry: it is read, written, named in help and documentation, and verified."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from conversions import SIZES, difference, logits_of, randomise, some_ids
from transformers import AutoModelForCausalLM, SeedOssConfig, SeedOssForCausalLM

from nanollada.modeling_nanollada import NanoLLaDAForCausalLM
from nanollada.scripts.conversion.families import registry
from nanollada.scripts.conversion.families.registry import FAMILIES, documentation, names, with_config

ROOT = Path(__file__).parents[3]
PROGRAM = ROOT / "scripts" / "convert_checkpoint.py"
SEED_OSS = """
from nanollada.scripts.conversion.families.transformers_own import must_have, of_transformers


def switches(config):
    biases = {"attention_bias": config.attention_bias, "attention_output_bias": config.attention_out_bias}
    return {"qk_norm": False, **biases, "mlp_bias": config.mlp_bias}


def writes(config):
    must_have("seed_oss", config, qk_norm=False)
    biases = {"attention_bias": config.attention_bias, "attention_out_bias": config.attention_output_bias}
    return {**biases, "mlp_bias": config.mlp_bias}


MEMBERS = (of_transformers("seed_oss", "SeedOssForCausalLM", switches, {"qk_norm": False}, writes),)
"""


def program(monkeypatch, *words):
    """Its exit status."""
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), *map(str, words)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(PROGRAM), run_name="__main__")
    return end.value.code or 0


@pytest.fixture
def seed_oss(tmp_path, monkeypatch):
    (tmp_path / "seed_oss.py").write_text(SEED_OSS)
    for family in runpy.run_path(str(tmp_path / "seed_oss.py"))["MEMBERS"]:
        monkeypatch.setitem(registry.FAMILIES, family.name, family)
    for name in [name for name in sys.modules if name.startswith("nanollada.scripts.conversion.arguments")]:
        monkeypatch.delitem(sys.modules, name)  # help texts are made when the arguments are defined
        monkeypatch.delitem(sys.modules, "nanollada.scripts.conversion.to_ours", raising=False)


def test_a_new_family_is_a_file_and_an_entry(seed_oss, tokenizer, tmp_path, monkeypatch, capsys):
    """There and back through the program, with the same logits; help and table name it."""
    config = SeedOssConfig(**SIZES, head_dim=6, attention_bias=True, attention_out_bias=False, mlp_bias=True)
    model = randomise(SeedOssForCausalLM(config))
    model.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    for source, kind, output in (("theirs", "causal", "ours"), ("ours", "seed_oss", "back")):
        assert program(monkeypatch, "--source", tmp_path / source, "--to", kind, "--output", tmp_path / output) == 0
    ids = some_ids()
    ours = NanoLLaDAForCausalLM.from_pretrained(tmp_path / "ours")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(back) is SeedOssForCausalLM and ours.config.attention_bias and not ours.config.attention_output_bias
    assert difference(logits_of(model, ids), logits_of(ours, ids)[..., :300]) < 1e-5
    for name, parameter in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], parameter), name
    capsys.readouterr()
    assert program(monkeypatch, "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "causal or masked (nanollada's AR and diffusion model), qwen3, llama, qwen2, seed_oss." in shown
    assert "mistral, minimind, seed_oss." in shown
    assert "| seed_oss | a folder of transformers' SeedOssForCausalLM | yes |" in documentation()
    edited = json.loads((tmp_path / "theirs" / "config.json").read_text()) | {"model_type": "gemma"}
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(edited))
    words = ("--source", tmp_path / "theirs", "--to", "causal", "--output", tmp_path / "other")
    assert program(monkeypatch, *words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: `model_type` of the source must be one of ") and ", seed_oss, got 'gemma'" in error


def test_what_it_has_no_place_for_is_named(seed_oss, tokenizer, tmp_path, monkeypatch, capsys):
    from nanollada.configuration_nanollada import NanoLLaDAConfig

    config = NanoLLaDAConfig(**{**SIZES, "vocab_size": len(tokenizer)}, mask_token_id=tokenizer.mask_token_id)
    NanoLLaDAForCausalLM(config).save_pretrained(tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    words = ("--source", tmp_path / "ours", "--to", "seed_oss", "--output", tmp_path / "out")
    assert program(monkeypatch, *words) == 2
    assert "seed_oss has `qk_norm` False where the rest is as here, got True" in capsys.readouterr().err


def test_the_readme_has_the_table():
    assert documentation() in (ROOT / "scripts" / "conversion" / "README.md").read_text(encoding="utf-8")
    assert names(with_config) == [name for name in FAMILIES if name != "nano-llada"]
