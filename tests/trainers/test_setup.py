"""Model and tokenizer from arguments: the mask token of a foreign tokenizer, and refusals."""

import pytest
import torch
from safetensors.torch import load_file

from nanollada.modeling_nanollada import NanoLLaDAConfig, NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM
from nanollada.trainers import run
from nanollada.trainers.models import (
    ModelArguments,
    config_for,
    load_model_and_tokenizer,
    own_process_group,
)
from nanollada.trainers.records import hardware, versions
from nanollada.trainers.registry import TRAINERS

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def saved(tmp_path, tokenizer):
    """An AR checkpoint with its tokenizer."""
    torch.manual_seed(0)
    NanoLLaDAForCausalLM(config_for(tokenizer, **SHAPE)).save_pretrained(tmp_path / "ar")
    tokenizer.save_pretrained(tmp_path / "ar")
    return tmp_path / "ar"


def test_ar_checkpoint_starts_diffusion(saved):
    model, _ = load_model_and_tokenizer(NanoLLaDAForMaskedLM, ModelArguments(model_name_or_path=str(saved)), 0)
    expected = load_file(saved / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_a_fresh_model_follows_the_tokenizer(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    arguments = ModelArguments(tokenizer_name_or_path=str(tmp_path), **SHAPE, hidden_dropout=0.25)
    model, loaded = load_model_and_tokenizer(NanoLLaDAForMaskedLM, arguments, seed=3)
    assert model.config.vocab_size == len(loaded) and model.config.mask_token_id == loaded.mask_token_id
    assert model.config.hidden_dropout == 0.25 and model.config.hidden_size == 16
    again, _ = load_model_and_tokenizer(NanoLLaDAForMaskedLM, arguments, seed=3)
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)


def test_a_fresh_model_of_another_architecture(tmp_path, tokenizer):
    """Without QK norm it goes to Llama, with biases that the output lacks to Qwen2 (test_convert_checkpoint)."""
    tokenizer.save_pretrained(tmp_path)
    qwen2 = {"qk_norm": False, "attention_bias": True, "attention_output_bias": False}
    for chosen in ({}, {"qk_norm": False}, qwen2):
        arguments = ModelArguments(tokenizer_name_or_path=str(tmp_path), **SHAPE, **chosen)
        model, _ = load_model_and_tokenizer(NanoLLaDAForCausalLM, arguments, seed=3)
        names = {name.split("self_attn.")[1] for name, _ in model.named_parameters() if "self_attn" in name}
        expected = {f"{kind}_proj.weight" for kind in "qkvo"}
        expected |= {f"{kind}_proj.bias" for kind in "qkv"} if "attention_bias" in chosen else set()
        assert names == expected | (set() if chosen else {"q_norm.weight", "k_norm.weight"})


def test_a_foreign_tokenizer_gains_the_mask_and_the_model_follows(tmp_path, tokenizer):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel({"<pad>": 0, "<bos>": 1, "<eos>": 2, "a": 3, "b": 4}, unk_token="<pad>"))
    backend.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    foreign = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    foreign.save_pretrained(tmp_path / "tokenizer")
    fresh = ModelArguments(tokenizer_name_or_path=str(tmp_path / "tokenizer"), **SHAPE)
    model, gained = load_model_and_tokenizer(NanoLLaDAForCausalLM, fresh, 0)
    assert gained.mask_token_id == 5 and model.config.vocab_size == len(gained) == 6

    old = NanoLLaDAForCausalLM(NanoLLaDAConfig(vocab_size=5, mask_token_id=4, **SHAPE))  # trained without the mask
    old.save_pretrained(tmp_path / "old")
    arguments = ModelArguments(
        model_name_or_path=str(tmp_path / "old"), tokenizer_name_or_path=str(tmp_path / "tokenizer")
    )
    grown, _ = load_model_and_tokenizer(NanoLLaDAForMaskedLM, arguments, 0)
    assert grown.config.vocab_size == 6 and grown.config.mask_token_id == 5
    assert torch.equal(grown.lm_head.weight[:5], old.lm_head.weight)
    writer, _ = load_model_and_tokenizer(NanoLLaDAForCausalLM, arguments, 0)
    assert writer.generation_config.suppress_tokens == [5]  # 4 is a word like others


def test_a_tokenizer_that_does_not_fit_is_refused(saved, tmp_path, char_tokenizer):
    char_tokenizer.save_pretrained(tmp_path / "other")
    arguments = ModelArguments(model_name_or_path=str(saved), tokenizer_name_or_path=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="tokenizer and model do not fit: `vocab_size` must be"):
        load_model_and_tokenizer(NanoLLaDAForMaskedLM, arguments, 0)


def test_arguments_that_contradict_are_refused():
    with pytest.raises(ValueError, match="`tokenizer_name_or_path` is needed without `model_name_or_path`"):
        ModelArguments()
    with pytest.raises(ValueError, match="`hidden_size` is the checkpoint's own with `model_name_or_path`"):
        ModelArguments(model_name_or_path="somewhere", hidden_size=64)
    rope = ModelArguments(tokenizer_name_or_path="t", rope_parameters='{"rope_type": "linear", "factor": 2.0}')
    assert rope.rope_parameters["factor"] == 2.0


def test_facts_of_the_machine():
    assert "CPU" in hardware() or "×" in hardware()
    assert versions()["torch"] == torch.__version__ and versions()["nanollada"]


def test_rope_parameters_on_the_command_line():
    from trl import TrlParser

    given = ["--tokenizer_name_or_path", "x", "--rope_parameters", '{"rope_type": "default", "rope_theta": 5e5}']
    (arguments,) = TrlParser((ModelArguments,)).parse_args_and_config(given)
    assert arguments.rope_parameters == {"rope_type": "default", "rope_theta": 5e5}


def start_group(*args, **kwargs):
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)


def test_main_ends_the_process_group_that_it_started(tmp_path, monkeypatch):
    """Its threads too: test_trainers' and test_averaging's ranks."""
    monkeypatch.setattr(run, "train", start_group)
    command = ["--tokenizer_name_or_path", "t", "--data", "d", "--output_dir", str(tmp_path), "--use_cpu", "true"]
    run.main(TRAINERS["ar"], command)
    assert not torch.distributed.is_initialized()


def test_a_process_group_of_somebody_elses_is_left():
    start_group()
    try:
        with own_process_group():
            pass
        assert torch.distributed.is_initialized()
    finally:
        torch.distributed.destroy_process_group()
