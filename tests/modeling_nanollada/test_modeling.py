"""The models against transformers' Qwen3 with the same weights, and the promises of their signatures."""

import copy

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, Qwen3Config, Qwen3ForCausalLM

from nanollada.modeling_nanollada import (
    NanoLLaDAConfig,
    NanoLLaDAForCausalLM,
    NanoLLaDAForMaskedLM,
    NanoLLaDAModel,
)
from nanollada.modeling_nanollada.loss_nanollada import FLOOR

SHAPE = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 12,
}
VARIANTS = {
    "plain": {},
    "gqa": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 32, "attention_bias": True},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}},
}


def build(model_class, **overrides):
    torch.manual_seed(0)
    model = model_class(NanoLLaDAConfig(**{**SHAPE, **overrides})).eval()
    with torch.no_grad():  # norms away from 1, so that their place in the network shows
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def qwen3(model, **overrides):
    """transformers' Qwen3 with this model's state dict."""
    fields = {
        **SHAPE,
        "rms_norm_eps": 1e-5,
        "rope_parameters": copy.deepcopy(model.config.rope_parameters),
        **overrides,
    }
    fields["rope_parameters"] = copy.deepcopy(model.config.rope_parameters)
    fields["max_position_embeddings"] = model.config.max_position_embeddings
    reference = Qwen3ForCausalLM(Qwen3Config(pad_token_id=None, **fields)).eval()
    reference.load_state_dict(model.state_dict())
    return reference


def tokens(rows=3, length=11):
    return torch.randint(4, 101, (rows, length), generator=torch.Generator().manual_seed(1))


def assert_close(ours, theirs):
    mask = torch.ones(ours.shape[-1], dtype=torch.bool)
    mask[3] = False  # the diffusion model never predicts the mask token; compared on the other columns
    torch.testing.assert_close(ours[..., mask], theirs[..., mask], atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_same_logits_as_qwen3(variant):
    causal, masked = build(NanoLLaDAForCausalLM, **VARIANTS[variant]), build(NanoLLaDAForMaskedLM, **VARIANTS[variant])
    reference, ids = qwen3(causal, **VARIANTS[variant]), tokens()
    assert_close(causal(ids).logits, reference(ids).logits)
    assert_close(masked(ids).logits, reference(ids, is_causal=False).logits)
    assert (causal(ids).logits - masked(ids).logits)[..., 4:].abs().max() > 1e-2  # or nothing was compared

    padding = torch.ones_like(ids)
    padding[0, :4] = padding[1, :1] = 0
    positions = (padding.cumsum(-1) - 1).clamp(min=0)
    for model, is_causal in ((causal, True), (masked, False)):
        ours = model(ids, attention_mask=padding).logits
        theirs = reference(ids, attention_mask=padding, position_ids=positions, is_causal=is_causal).logits
        assert_close(ours[padding.bool()], theirs[padding.bool()])
        assert_close(ours[0, 4:], model(ids[:1, 4:]).logits[0])  # left-padded batch = single

    first = causal(ids[:, :6], use_cache=True)
    cached = causal(ids[:, 6:], past_key_values=first.past_key_values).logits
    assert_close(torch.cat((first.logits, cached), 1), reference(ids).logits)
    ours = causal.generate(ids, max_new_tokens=6, do_sample=False, suppress_tokens=None)
    assert ours.tolist() == reference.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0).tolist()


@pytest.mark.parametrize("model_class", [NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM])
@pytest.mark.parametrize("implementation", ["eager", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_attention_implementations_agree(model_class, implementation):
    model, ids = build(model_class).requires_grad_(False), tokens()  # flex attention has no backward on CPU
    padding = torch.ones_like(ids)
    padding[0, :3] = 0
    documents = torch.tensor([[0] * 5 + [1] * 6] * 3)
    positions = torch.tensor([[*range(5), *range(6)]] * 3)
    calls = [{}, {"attention_mask": padding}, {"document_ids": documents, "position_ids": positions}]
    if model_class is NanoLLaDAForMaskedLM:
        calls.append({"block_length": 3, "document_ids": documents, "position_ids": positions})
    expected = [model(ids, **call).logits for call in calls]
    model.set_attn_implementation(implementation)
    for call, logits in zip(calls, expected, strict=True):
        keep = call.get("attention_mask", torch.ones_like(ids)).bool()
        assert_close(model(ids, **call).logits[keep], logits[keep])


def test_flash_attention_with_documents_is_refused():
    model, ids = build(NanoLLaDAForMaskedLM), tokens()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="`attn_implementation` must be 'sdpa'.*got 'flash_attention_2'"):
        model(ids, document_ids=torch.zeros_like(ids))


def test_documents_and_cache_are_refused():
    model, ids = build(NanoLLaDAForCausalLM), tokens()
    past = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="the cache must be empty, got 11 cached tokens"):
        model(ids, past_key_values=past, document_ids=torch.zeros_like(ids))


def test_one_backbone_parameter_names_and_size():
    causal, masked = NanoLLaDAForCausalLM(NanoLLaDAConfig()), NanoLLaDAForMaskedLM(NanoLLaDAConfig())
    assert list(causal.state_dict()) == list(masked.state_dict())
    assert "model.layers.0.self_attn.q_proj.weight" in causal.state_dict()
    assert causal.num_parameters() == masked.num_parameters()
    assert 31e6 < causal.num_parameters() < 33e6


def test_one_config_object_serves_both_classes():
    config, ids = NanoLLaDAConfig(**SHAPE), tokens()
    causal = NanoLLaDAForCausalLM(config).eval()
    before = causal(ids).logits
    NanoLLaDAForMaskedLM(config)
    torch.testing.assert_close(causal(ids).logits, before)
    changed = ids.clone()
    changed[:, -1] = 5
    torch.testing.assert_close(causal(changed).logits[:, :-1], before[:, :-1])


def test_is_causal_per_call_is_refused():
    with pytest.raises(ValueError, match="`is_causal` is decided by the model class, got False"):
        build(NanoLLaDAForCausalLM)(tokens(), is_causal=False)


def test_bidirectional_attention_sees_the_last_token():
    model, ids = build(NanoLLaDAForMaskedLM), tokens()
    changed = ids.clone()
    changed[:, -1] = 5
    assert (model(changed).logits - model(ids).logits)[:, 0, 4:].abs().max() > 1e-4


def test_mask_token_is_never_predicted():
    model, ids = build(NanoLLaDAForMaskedLM), tokens()
    logits = model(ids).logits
    assert (logits[..., model.config.mask_token_id] == FLOOR).all()
    assert (logits.softmax(-1)[..., model.config.mask_token_id] == 0).all()
    with pytest.raises(ValueError, match="`labels` must not hold the mask token, got 3"):
        model(ids, labels=torch.full_like(ids, 3))
    with pytest.raises(ValueError, match="`shift_labels` are an AR model's: .* `labels` are not shifted"):
        model(ids, labels=ids, shift_labels=ids)


def test_masked_lm_loss_is_not_shifted_and_honours_the_count():
    model, ids = build(NanoLLaDAForMaskedLM), tokens()
    labels = ids.clone()
    labels[:, :4] = -100
    expected = torch.nn.functional.cross_entropy(model(ids).logits[:, 4:].reshape(-1, 101), ids[:, 4:].reshape(-1))
    torch.testing.assert_close(model(ids, labels=labels).loss, expected)
    counted = model(ids, labels=labels, num_items_in_batch=7).loss
    torch.testing.assert_close(counted, expected * (labels != -100).sum() / 7)


def test_causal_loss_is_shifted():
    model, ids = build(NanoLLaDAForCausalLM), tokens()
    expected = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].reshape(-1, 101), ids[:, 1:].reshape(-1))
    torch.testing.assert_close(model(ids, labels=ids).loss, expected)


@pytest.mark.parametrize("model_class", [NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM])
def test_logits_to_keep(model_class):
    model, ids = build(model_class), tokens()
    logits = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, logits[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, logits[:, [1, 4]])
    keep = ids % 3 == 0
    torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, logits[keep])
    with pytest.raises(ValueError, match="`logits_to_keep` must be 0, got 2"):
        model(ids, labels=ids, logits_to_keep=2)


@pytest.mark.parametrize("model_class", [NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM])
def test_hidden_states_attentions_and_tuples(model_class):
    model, ids = build(model_class), tokens()
    model.set_attn_implementation("eager")
    outputs = model(ids, output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == 4 and outputs.hidden_states[0].shape == (3, 11, 48)
    assert len(outputs.attentions) == 3 and outputs.attentions[0].shape == (3, 4, 11, 11)
    torch.testing.assert_close(outputs.attentions[0].sum(-1), torch.ones(3, 4, 11))
    torch.testing.assert_close(model(ids, return_dict=False)[0], outputs.logits)


@pytest.mark.parametrize("model_class", [NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM])
def test_gradient_checkpointing_gives_the_same_gradients(model_class):
    model, ids = build(model_class).train(), tokens()
    model(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_dropout_options_act_in_training_only():
    ids = tokens()
    for name in ("hidden_dropout", "attention_dropout"):
        model = build(NanoLLaDAForMaskedLM, **{name: 0.5})
        torch.testing.assert_close(model(ids).logits, build(NanoLLaDAForMaskedLM)(ids).logits)
        model.train()
        assert (model(ids).logits - model(ids).logits)[..., 4:].abs().max() > 1e-3


def test_inputs_embeds_and_its_refusal():
    model, ids = build(NanoLLaDAForMaskedLM), tokens()
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(ids).logits)
    with pytest.raises(ValueError, match="Exactly one of `input_ids` and `inputs_embeds`"):
        model(ids, inputs_embeds=embeds)


def test_auto_classes_follow_the_architecture(tmp_path):
    for model_class, autos in (
        (NanoLLaDAForCausalLM, (AutoModel, AutoModelForCausalLM)),
        (NanoLLaDAForMaskedLM, (AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM)),
        (NanoLLaDAModel, (AutoModel,)),
    ):
        build(model_class).save_pretrained(tmp_path / model_class.__name__)
        for auto in autos:
            assert type(auto.from_pretrained(tmp_path / model_class.__name__)) is model_class


def test_ar_checkpoint_initialises_diffusion(tmp_path):
    causal, ids = build(NanoLLaDAForCausalLM), tokens()
    causal.save_pretrained(tmp_path)
    masked, report = NanoLLaDAForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_close(masked(ids).logits, qwen3(causal)(ids, is_causal=False).logits)


def test_the_rotary_tables_survive_loading(tmp_path):
    model, ids = build(NanoLLaDAForMaskedLM, **VARIANTS["yarn"]), tokens()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(NanoLLaDAForMaskedLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_a_shifting_trainer_is_refused():
    from trl.trainer.utils import add_fused_lm_head

    with pytest.raises(ValueError, match="`model` is a NanoLLaDAForMaskedLM.*got a TRL trainer"):
        add_fused_lm_head(build(NanoLLaDAForMaskedLM))
    add_fused_lm_head(build(NanoLLaDAForCausalLM))
