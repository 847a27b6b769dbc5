"""Strict loading, and whether a tokenizer fits a model."""

import copy
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nanollada.modeling_nanollada import NanoLLaDAConfig, NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM
from nanollada.modeling_nanollada.loading_nanollada import check_tokenizer, load_model

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def saved(tmp_path):
    """An AR checkpoint."""
    torch.manual_seed(0)
    NanoLLaDAForCausalLM(NanoLLaDAConfig(vocab_size=9, mask_token_id=8, **SHAPE)).save_pretrained(tmp_path / "ar")
    return tmp_path / "ar"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "missing: model.norm.weight"),
        (lambda tensors: tensors.update(more=torch.ones(2)), "unexpected: more"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(5)}), "shape: .*model.norm.weight"),
    ],
)
def test_wrong_tensors_are_refused(saved, change, message):
    tensors = load_file(saved / "model.safetensors")
    change(tensors)
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"`model_name_or_path` must hold exactly the tensors of.*{message}"):
        load_model(NanoLLaDAForMaskedLM, saved)
    rule = "`judge` must hold exactly the tensors of NanoLLaDAForCausalLM"
    with pytest.raises(ValueError, match=f"{rule}.*{message}"):
        load_model(AutoModelForCausalLM, saved, "judge")


def test_half_precision_checkpoints_load_in_float32(saved):
    NanoLLaDAForCausalLM.from_pretrained(saved).bfloat16().save_pretrained(saved)
    assert load_model(NanoLLaDAForMaskedLM, saved).dtype == torch.float32
    assert load_model(NanoLLaDAForMaskedLM, saved, dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "rule"),
    [("generation_config.json", "must be JSON"), ("model.safetensors", "must be a whole safetensors")],
)
def test_broken_files_are_named(saved, name, rule):
    (saved / name).write_text('{"eos_token_id": ')
    with pytest.raises(ValueError, match=f"{name} of .* {rule}"):
        load_model(NanoLLaDAForMaskedLM, saved)


def test_loading_does_not_ship(saved):
    NanoLLaDAForMaskedLM.from_pretrained(saved).save_pretrained(saved / "hub")
    shipped = {path.name for path in (saved / "hub").glob("*.py")}
    assert "modeling_nanollada.py" in shipped and "loading_nanollada.py" not in shipped


# ---- tokenizer against model


def config_of(tokenizer, **changes):
    names = ("pad_token_id", "eos_token_id", "mask_token_id")
    values = {"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in names}}
    return SimpleNamespace(**{**values, **changes})


def model_of(config, rows):
    return SimpleNamespace(config=config, get_input_embeddings=lambda: torch.nn.Embedding(rows, 2))


def test_fitting_tokenizer(tokenizer):
    config = config_of(tokenizer)
    check_tokenizer(config, tokenizer)
    check_tokenizer(model_of(config, 300), tokenizer)
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    check_tokenizer(config, bare)
    check_tokenizer(model_of(config_of(tokenizer, vocab_size=304, tokenizer_length=300), 304), tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 301}, r"`vocab_size` must be 300 \(the tokenizer's length\), got 301"),
        ({"vocab_size": 304, "tokenizer_length": 302}, "`tokenizer_length` must be 300 .*, got 302"),
        ({"pad_token_id": 1}, r"`pad_token_id` must be 0 \(the tokenizer's\), got 1"),
        ({"eos_token_id": None}, r"`eos_token_id` must be 2 \(the tokenizer's\), got None"),
        ({"mask_token_id": 299}, r"`mask_token_id` must be 3 \(the tokenizer's\), got 299"),
        ({"pad_token_id": 5, "eos_token_id": 6}, "`pad_token_id` must be 0 .*; `eos_token_id` must be 2"),
    ],
)
def test_mismatch_of_config_and_tokenizer(tokenizer, changes, message):
    with pytest.raises(ValueError, match=message):
        check_tokenizer(config_of(tokenizer, **changes), tokenizer)


def test_mismatch_of_model_and_tokenizer(tokenizer):
    with pytest.raises(ValueError, match="embedding must have 300 rows .*, got 299"):
        check_tokenizer(model_of(config_of(tokenizer), 299), tokenizer)
    foreign = copy.deepcopy(tokenizer)
    foreign.mask_token = None
    with pytest.raises(ValueError, match="the tokenizer must have a `mask_token_id`, got None"):
        check_tokenizer(config_of(foreign), foreign)
    foreign.mask_token = foreign.eos_token
    with pytest.raises(ValueError, match="`mask_token_id` must differ from the pad and eos ids, got 2"):
        check_tokenizer(config_of(foreign), foreign)
