"""PEFT's ways with a model, on both of ours: which modules it adapts, saving and loading, merging, generating."""

import pytest
import torch
from generation_models import EOS, PAD, SHAPE, VOCABULARY, seeded
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, PeftModel, TaskType, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as qwen3
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from nanollada.hub_upload.card_facts import Facts
from nanollada.hub_upload.model_card import build_card
from nanollada.modeling_nanollada import NanoLLaDAConfig, NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM
from nanollada.scripts.decoding.settings import generation_settings
from nanollada.trainers.scoring.kind import is_diffusion
from nanollada.trainers.scoring.likelihood import evaluate_likelihood
from nanollada.trainers.weights import adapters

assert adapters.OURS == "nanollada"  # whose import tells PEFT
CLASSES = {"ar": NanoLLaDAForCausalLM, "diffusion": NanoLLaDAForMaskedLM, "block": NanoLLaDAForMaskedLM}
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
RUN = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": EOS, "pad_token_id": PAD}
PROMPT = torch.randint(4, VOCABULARY, (2, 6), generator=seeded(0))


def build(name, **overrides):
    torch.manual_seed(1)
    block_length = 4 if name == "block" else None
    shape = {"vocab_size": VOCABULARY, "initializer_range": 0.6, **SHAPE, "block_length": block_length, **overrides}
    return CLASSES[name](NanoLLaDAConfig(**shape)).eval()


def adapted(model, **options):
    """With an adapter that changes something."""
    config = LoraConfig(r=2, lora_alpha=8, target_modules="all-linear", task_type=TaskType.CAUSAL_LM, **options)
    wrapped = get_peft_model(model, config).eval()
    for name, value in wrapped.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            torch.nn.init.normal_(value, generator=seeded(2))
    return wrapped


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=PROMPT).logits


@pytest.mark.parametrize("name", CLASSES)
def test_the_modules_that_peft_adapts(name):
    """All linear layers are the projections, never the head; the trainers tell PEFT its defaults for Qwen3."""
    wrapped = adapted(build(name))
    found = {name.rpartition(".")[2] for name, module in wrapped.named_modules() if hasattr(module, "lora_A")}
    assert found == PROJECTIONS
    trained = {name for name, value in wrapped.named_parameters() if value.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    by_default = get_peft_model(build(name), LoraConfig(r=2))
    assert by_default.active_peft_config.target_modules == {"q_proj", "v_proj"} == {*qwen3["qwen3"]}
    assert get_peft_model(build(name), IA3Config()).active_peft_config.feedforward_modules == {"down_proj"}


@pytest.mark.parametrize("name", CLASSES)
def test_saved_loaded_merged(name, tmp_path):
    wrapped = adapted(build(name))
    expected, tokens = logits_of(wrapped), wrapped.generate(input_ids=PROMPT, **RUN)
    assert not torch.allclose(expected, logits_of(build(name)))
    assert not torch.equal(tokens, build(name).generate(PROMPT, **RUN))
    wrapped.save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert stored and all("lora_" in name for name in stored)
    loaded = PeftModel.from_pretrained(build(name), tmp_path / "adapter").eval()
    assert torch.equal(logits_of(loaded), expected)
    assert torch.equal(loaded.generate(input_ids=PROMPT, **RUN), tokens)
    merged = loaded.merge_and_unload()
    assert type(merged) is CLASSES[name]
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(merged.generate(PROMPT, **RUN), tokens)
    merged.save_pretrained(tmp_path / "merged")
    again = CLASSES[name].from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits_of(again), logits_of(merged))


@pytest.mark.parametrize("name", ["ar", "diffusion"])
def test_an_adapter_finds_its_model(name, tmp_path):
    """The adapter's folder names its checkpoint, which the Auto class loads as what it was."""
    build(name).save_pretrained(tmp_path / "model")
    wrapped = adapted(CLASSES[name].from_pretrained(tmp_path / "model").eval())
    wrapped.save_pretrained(tmp_path / "adapter")
    found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert type(found.get_base_model()) is CLASSES[name]
    assert torch.equal(logits_of(found), logits_of(wrapped))


@pytest.mark.parametrize("name", ["ar", "diffusion"])
def test_disabled_and_switched(name):
    plain, wrapped = logits_of(build(name)), adapted(build(name))
    first = logits_of(wrapped)
    with wrapped.disable_adapter():
        torch.testing.assert_close(logits_of(wrapped), plain)
    wrapped.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], task_type=TaskType.CAUSAL_LM))
    wrapped.set_adapter("second")
    torch.testing.assert_close(logits_of(wrapped), plain)  # a fresh adapter changes nothing
    wrapped.set_adapter("default")
    assert torch.equal(logits_of(wrapped), first)


@pytest.mark.parametrize("name", ["ar", "diffusion"])
@pytest.mark.parametrize("tied", [False, True])
def test_only_the_adapter_learns(name, tied):
    """Gradient checkpointing and a head that is trained whole go with it."""
    modules = None if tied else ["lm_head"]
    wrapped = adapted(build(name, tie_word_embeddings=tied), modules_to_save=modules).train()
    wrapped.activation_checkpointing_enable()
    wrapped.enable_input_require_grads()
    before = {name: value.detach().clone() for name, value in wrapped.named_parameters()}
    optimizer = torch.optim.SGD([value for value in wrapped.parameters() if value.requires_grad], lr=0.1)
    wrapped(input_ids=PROMPT, labels=PROMPT).loss.backward()
    optimizer.step()
    changed = {name for name, value in wrapped.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {name for name, value in wrapped.named_parameters() if value.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in changed)
    assert tied or any("modules_to_save" in name for name in changed)


@pytest.mark.parametrize("name", ["ar", "diffusion"])
def test_an_adapters_model_is_scored_decoded_and_carded_as_what_it_wraps(name, tokenizer):
    wrapped, denoises = adapted(build(name)), name == "diffusion"
    assert is_diffusion(wrapped) is denoises
    row = {"input_ids": PROMPT, "labels": PROMPT.clone(), "index": torch.arange(2), "num_bytes": torch.ones(2).long()}
    row["labels"][:, 0] = -100
    score = evaluate_likelihood(wrapped, [row], samples=2)
    assert score.bound is denoises and (score.estimator == "exact") is not denoises
    if denoises:
        assert generation_settings(wrapped, steps=4)["steps"] == 4
    else:
        with pytest.raises(ValueError, match="`steps` is for diffusion models, got 4"):
            generation_settings(wrapped, steps=4)
    card = str(build_card(adapted(build(name, vocab_size=len(tokenizer))), tokenizer, Facts(), model_name="name"))
    assert ("masked-diffusion" in card) is denoises and ("autoregressive" in card) is not denoises


def test_a_foreign_model_that_writes_is_ar_and_others_are_refused():
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    assert is_diffusion(LlamaForCausalLM(LlamaConfig(vocab_size=8, **shape))) is False
    older = type("NanoLLaDAForMaskedLM", (LlamaForCausalLM,), {})(LlamaConfig(vocab_size=8, **shape))
    older.config.model_type = "nanollada"  # remote code of before heads said what they are
    bert, backbone = BertForMaskedLM(BertConfig(vocab_size=8, **shape)), build("diffusion").model
    for neither in (bert, backbone, older, torch.nn.Linear(1, 1)):
        with pytest.raises(ValueError, match=f"`model` must be a causal.*got {type(neither).__name__}"):
            is_diffusion(neither)


@pytest.mark.parametrize("name", ["ar", "diffusion"])
def test_a_model_says_whether_it_denoises(name):
    assert CLASSES[name].is_diffusion is adapted(build(name)).is_diffusion is (name == "diffusion")
