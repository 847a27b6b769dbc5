"""minimind's and Nano-LLaDA's own files against forwards written from their structure."""

import argparse
import json
from types import SimpleNamespace

import pytest
import torch
from conversions import (
    BARE,
    DIFFUSION_ARGS,
    MODELS,
    SEED_ARGS,
    SIZES,
    difference,
    edit,
    logits_of,
    randomise,
    run,
    save_foreign,
    some_ids,
)
from published_models import minimind_logits, minimind_weights, nano_llada_logits, nano_llada_weights
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GemmaConfig, GemmaForCausalLM

from nanollada.modeling_nanollada import NanoLLaDAForCausalLM
from nanollada.scripts.conversion.shape import SHAPE

# ---- minimind

MINIMIND = {
    "model_type": "minimind",
    "architectures": ["MiniMindForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "inference_rope_scaling": False,
    "rope_scaling": None,
    "use_moe": False,
    "dropout": 0.0,
    "auto_map": {
        "AutoConfig": "model_minimind.MiniMindConfig",
        "AutoModelForCausalLM": "model_minimind.MiniMindForCausalLM",
    },
}
SCALED = {"beta_fast": 32, "beta_slow": 1, "factor": 16, "original_max_position_embeddings": 2048, "type": "yarn"}
SCALED["attention_factor"] = 1.0


@pytest.mark.parametrize("qk_norm", [True, False], ids=["minimind-3", "minimind2"])
@pytest.mark.parametrize("scaled", [False, True])
def test_minimind_folders(qk_norm, scaled, plain_tokenizer, tmp_path):
    folder = tmp_path / "theirs"
    plain_tokenizer.save_pretrained(folder)
    weights = minimind_weights(qk_norm=qk_norm)
    torch.save(weights, folder / "pytorch_model.bin")
    scaling = {"inference_rope_scaling": scaled, "rope_scaling": SCALED if scaled else None}
    (folder / "config.json").write_text(json.dumps(MINIMIND | scaling))
    record = run(folder, "causal", tmp_path / "ours")
    ours = NanoLLaDAForCausalLM.from_pretrained(tmp_path / "ours")
    assert ours.config.qk_norm == qk_norm and ours.config.tie_word_embeddings
    assert record["verified"]["max_logit_difference"] is None and "every tensor" in record["verified"]["says"]
    ids = some_ids(length=40)
    expected = minimind_logits(weights, ids, scaled=scaled)
    assert difference(logits_of(ours, ids)[..., :300], expected) <= 1e-5
    assert difference(minimind_logits(weights, ids, scaled=not scaled), expected) > 1e-4  # RoPE is seen in the logits


def test_minimind_files_and_what_they_lack(plain_tokenizer, tmp_path):
    plain_tokenizer.save_pretrained(tmp_path / "tokenizer")
    weights = minimind_weights()
    torch.save(weights, tmp_path / "full_sft_16.pth")
    options = {"tokenizer": str(tmp_path / "tokenizer")}
    with pytest.raises(ValueError, match="do not say num_attention_heads, hidden_act.* nothing is guessed"):
        run(tmp_path / "full_sft_16.pth", "causal", tmp_path / "ours", **options)
    run(tmp_path / "full_sft_16.pth", "causal", tmp_path / "ours", **options, **BARE)
    ours, ids = NanoLLaDAForCausalLM.from_pretrained(tmp_path / "ours"), some_ids()
    assert difference(logits_of(ours, ids)[..., :300], minimind_logits(weights, ids)) <= 1e-5
    with pytest.raises(
        ValueError, match="`num_attention_heads` must divide the rows of .*q_proj.weight, got 3 and 16"
    ):
        run(tmp_path / "full_sft_16.pth", "causal", tmp_path / "x", **options, **{**BARE, "num_attention_heads": 3})
    for rope, absent in (
        ({"rope_type": "linear", "factor": 2.0}, "theta"),
        ({"rope_theta": 1e4, "factor": 2.0}, "type"),
    ):
        with pytest.raises(ValueError, match=f"`rope_parameters` must say rope_{absent}, and nothing is guessed"):
            run(tmp_path / "full_sft_16.pth", "causal", tmp_path / "x", **options, **{**BARE, "rope_parameters": rope})
    torch.save({**weights, "model.layers.0.mlp.experts.0.gate_proj.weight": torch.ones(1)}, tmp_path / "moe.pth")
    with pytest.raises(ValueError, match=r"got model\.layers\.0\.mlp\.experts\.0"):
        run(tmp_path / "moe.pth", "causal", tmp_path / "x", **options, **BARE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": "REMOVED"}, "must hold .* got none of num_key_value_heads"),
        (
            {"inference_rope_scaling": True, "rope_scaling": {**SCALED, "factor": 4, "beta_fast": 4}},
            "an older formula",
        ),
        (
            {"inference_rope_scaling": True, "max_position_embeddings": 2048},
            "depends on the length of a table, got 2048",
        ),
        ({"inference_rope_scaling": True, "rope_theta": 100.0}, "`rope_theta` is too small .* got 100"),
        ({"inference_rope_scaling": True, "rope_scaling": {"type": "yarn", "attention_factor": 1.0}}, "older formula"),
        ({"rope_scaling": SCALED}, "`rope_scaling` must be null without `inference_rope_scaling`, got"),
        ({"logit_scale": 0.1}, "must hold what minimind's dense model has, got 'logit_scale'"),
        ({"sliding_window": 4}, "must hold what minimind's dense model has, got 'sliding_window'"),
        ({"use_moe": True}, "must hold what minimind's dense model has, got 'use_moe'"),
        ({"num_hidden_layers": 3}, r"missing: model\.layers\.2"),
        (
            {"rope_scaling": {**SCALED, "rope_theta": 5.0}, "inference_rope_scaling": True},
            "`rope_theta` must be the same",
        ),
        (
            {"architectures": ["MiniMindForEmbedding"]},
            "`architectures` of a minimind model must be .'MiniMindForCausalLM",
        ),
        ({"auto_map": {"AutoModelForCausalLM": "own.Own"}}, "dense model has, got 'AutoModelForCausalLM: own.Own'"),
        ({"auto_map": {"AutoTokenizer": ["own.Own", None]}}, "dense model has, got \"AutoTokenizer: .'own.Own"),
    ],
)
def test_minimind_configs_that_are_refused(changes, message, plain_tokenizer, tmp_path):
    plain_tokenizer.save_pretrained(tmp_path / "theirs")
    torch.save(minimind_weights(), tmp_path / "theirs" / "pytorch_model.bin")
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(MINIMIND))
    edit(tmp_path / "theirs" / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "theirs", "causal", tmp_path / "ours")


# ---- what tensors do not say


def bare_file(folder, model, tokenizer):
    """A state dict without its config, and what is said of its shape."""
    tokenizer.save_pretrained(folder / "tokenizer")
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "bare.safetensors")
    names = [name for name in SHAPE if name != "rope_parameters"]
    said = {name: getattr(model.config, name) for name in names}
    said["rope_parameters"] = {name: value for name, value in model.config.rope_parameters.items() if value}
    return folder / "bare.safetensors", {"tokenizer": str(folder / "tokenizer"), **said}


def test_tensors_alone_do_not_say_whose_they_are(plain_tokenizer, tmp_path):
    """Gemma's have Llama's names and shapes, and other logits."""
    config = GemmaConfig(**SIZES, head_dim=4, hidden_act="gelu_pytorch_tanh")
    file, said = bare_file(tmp_path, randomise(GemmaForCausalLM(config)), plain_tokenizer)
    with pytest.raises(ValueError, match="do not say architecture, and nothing is guessed: give --architecture"):
        run(file, "causal", tmp_path / "ours", **said)
    with pytest.raises(ValueError, match="`architecture` must be one of qwen3, .* minimind, got 'gemma'"):
        run(file, "causal", tmp_path / "ours", **said, architecture="gemma")


@pytest.mark.parametrize("name", ["qwen3", "llama-linear-bias", "qwen2", "mistral"])
def test_tensors_of_a_stated_architecture(name, plain_tokenizer, tmp_path):
    model_class, config = MODELS[name]
    theirs, architecture = randomise(model_class(config)), name.partition("-")[0]
    file, said = bare_file(tmp_path, theirs, plain_tokenizer)
    record = run(file, "causal", tmp_path / "ours", **said, architecture=architecture)
    assert record["config"]["architecture"] == architecture
    ours, ids = NanoLLaDAForCausalLM.from_pretrained(tmp_path / "ours"), some_ids()
    assert difference(logits_of(ours, ids)[..., :300], logits_of(theirs, ids)) <= 1e-5
    wrong = {"qwen3": "llama", "llama": "minimind", "qwen2": "mistral", "mistral": "qwen3"}[architecture]
    with pytest.raises(ValueError, match=f"`architecture` '{wrong}' has `.*` (True|False), got tensors that have it"):
        run(file, "causal", tmp_path / "x", **said, architecture=wrong)


LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
TWO_ROPES = {
    "theta": ({"rope_theta": 5.0}, "`rope_theta` must be the same .* got 10000.0 and 5.0"),
    "no theta": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "`rope_theta` must be .* got 10000.0 and None"),
    "type": (
        {"rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "`rope_type` must be .* got linear and dynamic",
    ),
    "factor": (
        {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 8.0}},
        "`rope_scaling` must be .*2.0.* and .*8.0",
    ),
    "none": (
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "linear", "factor": 2.0}},
        "`rope_type` must be .* got default and linear",
    ),
    "in one": ({"rope_parameters": {**LINEAR, "type": "dynamic"}}, "`rope_type` must be .* got linear and dynamic"),
}


@pytest.mark.parametrize("case", TWO_ROPES)
def test_two_spellings_of_rope_that_disagree(case, tokenizer, tmp_path):
    changes, message = TWO_ROPES[case]
    save_foreign(tmp_path / "theirs", "llama-linear-bias", tokenizer, rope_parameters=LINEAR)
    edit(tmp_path / "theirs" / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "theirs", "causal", tmp_path / "ours", verify=False)


def test_two_spellings_of_rope_that_agree(tokenizer, tmp_path):
    save_foreign(tmp_path / "theirs", "llama-linear-bias", tokenizer, rope_parameters=LINEAR)
    twice = {"rope_theta": 10000, "rope_scaling": {"type": "linear", "factor": 2}}
    edit(tmp_path / "theirs" / "config.json", **twice)
    run(tmp_path / "theirs", "causal", tmp_path / "ours")
    assert NanoLLaDAForCausalLM.from_pretrained(tmp_path / "ours").config.rope_parameters == LINEAR


CODE = {
    "head": (
        {"architectures": ["LlamaForSequenceClassification"]},
        "`architectures` of a llama model must be .*Causal",
    ),
    "encoder": ({"architectures": ["LlamaEncoderModel"]}, "`architectures` of a llama .* got .'LlamaEncoderModel"),
    "code": ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "of transformers' llama only, got 'auto_map'"),
}


@pytest.mark.parametrize("case", CODE)
def test_classes_of_ones_own_are_refused(case, tokenizer, tmp_path):
    changes, message = CODE[case]
    save_foreign(tmp_path / "theirs", "llama-llama3", tokenizer)
    edit(tmp_path / "theirs" / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "theirs", "causal", tmp_path / "ours", verify=False)
    edit(tmp_path / "theirs" / "config.json", architectures="REMOVED", auto_map="REMOVED")
    run(tmp_path / "theirs", "causal", tmp_path / "ours", verify=False)


# ---- Nano-LLaDA


def seed_checkpoint(folder, tokenizer, arguments, vocab=301, **beside):
    tokenizer.save_pretrained(folder / "tokenizer")
    weights = nano_llada_weights(vocab)
    content = {
        "model_state_dict": weights,
        "optimizer_state_dict": {"state": {}},
        "step": 7,
        "epoch": 1,
        "args": arguments,
    }
    torch.save(content | beside, folder / "run.pt")
    return weights, {"tokenizer": str(folder / "tokenizer")}


@pytest.mark.parametrize(
    ("to", "scaled", "act"),
    [("causal", False, "silu"), ("causal", True, "gelu"), ("masked", False, "relu"), ("masked", True, "silu")],
)
def test_nano_llada(to, scaled, act, plain_tokenizer, tmp_path):
    args = {**(SEED_ARGS if to == "causal" else DIFFUSION_ARGS), "inference_rope_scaling": scaled, "hidden_act": act}
    weights, options = seed_checkpoint(tmp_path, plain_tokenizer, args | {"dropout": 0.1})
    record = run(tmp_path / "run.pt", to, tmp_path / "ours", **options)
    ours, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "ours"), some_ids(length=40)
    expected = nano_llada_logits(weights, ids, args, causal=to == "causal")
    assert difference(logits_of(ours, ids)[..., :300], expected[..., :300]) <= 1e-5
    other = nano_llada_logits(weights, ids, {**args, "inference_rope_scaling": not scaled}, causal=to == "causal")
    assert difference(other, expected) > 1e-4
    assert ours.config.mask_token_id == 300 and record["vocabulary"]["mask"] == "own"
    assert ours.lm_head.weight.equal(weights["lm_head.weight"])
    dropouts = (ours.config.attention_dropout, ours.config.hidden_dropout)
    assert dropouts == ((0.1, 0.1) if to == "causal" else (0.0, 0.1))
    if to == "causal":  # and on to where Qwen3 runs
        run(tmp_path / "ours", "qwen3", tmp_path / "qwen3")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen3")
        assert difference(logits_of(theirs, ids), expected) <= 1e-5


def test_nano_llada_weights_alone(plain_tokenizer, tmp_path):
    """`*_state_dict.pt`: the heads are an argument or an error; so is a vocabulary without the mask no error."""
    weights, options = seed_checkpoint(tmp_path, plain_tokenizer, SEED_ARGS, vocab=300)
    torch.save({f"_orig_mod.{name}": tensor for name, tensor in weights.items()}, tmp_path / "run_state_dict.pt")
    with pytest.raises(ValueError, match="do not say num_attention_heads"):
        run(tmp_path / "run_state_dict.pt", "causal", tmp_path / "ours", **options)
    given = {name: SEED_ARGS[name] for name in SHAPE if name != "rope_parameters"}
    with pytest.raises(ValueError, match="`architecture` is said by Nano-LLaDA's tensors, got 'llama'"):
        run(tmp_path / "run.pt", "causal", tmp_path / "x", **options, architecture="llama")
    run(
        tmp_path / "run_state_dict.pt",
        "causal",
        tmp_path / "ours",
        **options,
        **given,
        rope_parameters={"rope_theta": 1e6},
    )
    ours, ids = NanoLLaDAForCausalLM.from_pretrained(tmp_path / "ours"), some_ids()
    assert difference(logits_of(ours, ids)[..., :300], nano_llada_logits(weights, ids, SEED_ARGS, True)) <= 1e-5
    with pytest.raises(ValueError, match="`num_attention_heads` is in the checkpoint's `args`: 2, got 4"):
        run(tmp_path / "run.pt", "causal", tmp_path / "x", **options, num_attention_heads=4)


def test_nano_llada_that_is_refused(plain_tokenizer, tmp_path):
    weights, options = seed_checkpoint(tmp_path, plain_tokenizer, DIFFUSION_ARGS)
    with pytest.raises(ValueError, match="`to` must be 'masked' for a diffusion checkpoint"):
        run(tmp_path / "run.pt", "causal", tmp_path / "ours", **options)
    with pytest.raises(ValueError, match="`tokenizer` must be a folder"):
        run(tmp_path / "run.pt", "masked", tmp_path / "ours")
    tied = {**weights, "lm_head.weight": weights["token_emb.weight"]}
    cases = {
        "lm_head.weight must not be tied": {"model_state_dict": tied},
        r"unknown tensor blocks\.0\.attn\.gate\.weight": {
            "model_state_dict": {**weights, "blocks.0.attn.gate.weight": torch.ones(2)}
        },
        r"missing: .*self_attn\.v_proj": {
            "model_state_dict": {n: t for n, t in weights.items() if n != "blocks.1.attn.c_v.weight"}
        },
        "a character vocabulary is not in the checkpoint": {"args": {**DIFFUSION_ARGS, "use_tokenizer": False}},
        "weights_only=True.*`args` as `vars": {"args": argparse.Namespace(**DIFFUSION_ARGS)},
        "`args` of the checkpoint must be a dict, got list": {"args": [1]},
        "tensors, got NoneType under 'model_state_dict'": {"model_state_dict": None},
    }
    for message, beside in cases.items():
        seed_checkpoint(tmp_path, plain_tokenizer, DIFFUSION_ARGS, **beside)
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "run.pt", "masked", tmp_path / "ours", **options)
    torch.save(SimpleNamespace(weights=1), tmp_path / "run.pt")
    with pytest.raises(ValueError, match="must load with torch.load.weights_only=True., which runs no code"):
        run(tmp_path / "run.pt", "masked", tmp_path / "ours", **options)
