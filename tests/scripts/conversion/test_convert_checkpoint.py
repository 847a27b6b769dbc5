"""Foreign checkpoints there and back: the same logits, the same bits, and a name for what is refused."""

import json
import subprocess
import sys

import pytest
import torch
from conversions import MODELS, SIZES, YARN, difference, edit, logits_of, randomise, run, save_foreign, some_ids
from published_models import minimind_weights
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from nanollada.modeling_nanollada import NanoLLaDAConfig, NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM
from nanollada.scripts.conversion import compare as convert_verify
from nanollada.scripts.conversion.arguments import ConvertArguments
from nanollada.scripts.conversion.families import transformers_own
from nanollada.scripts.conversion.to_ours import main
from nanollada.scripts.conversion.tokenizers import altered_part
from nanollada.trainers.causal import CausalConfig, CausalTrainer
from nanollada.trainers.models import ModelArguments, load_model_and_tokenizer
from nanollada.trainers.scoring.likelihood import causal_nll

# ---- transformers' models


SLOW = {name: pytest.mark.slow for name in ("llama-linear-bias", "mistral", "qwen3-yarn-bias")}


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in MODELS])
def test_there_and_back(name, plain_tokenizer, tmp_path):
    """Logits, then every tensor, every field of the config and the tokenizer's file."""
    theirs = save_foreign(tmp_path / "theirs", name, plain_tokenizer)
    run(tmp_path / "theirs", "causal", tmp_path / "ours")
    ours = NanoLLaDAForCausalLM.from_pretrained(tmp_path / "ours")
    ids = some_ids()
    assert difference(logits_of(ours, ids)[..., :300], logits_of(theirs, ids)) <= 1e-5

    target = "llama" if name == "mistral" else name.partition("-")[0]
    run(tmp_path / "ours", target, tmp_path / "back")
    one, other = (load_file(tmp_path / where / "model.safetensors") for where in ("theirs", "back"))
    assert one.keys() == other.keys() and len(one) > 18
    assert all(one[key].equal(other[key]) and one[key].dtype == other[key].dtype for key in one)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert difference(logits_of(back, ids), logits_of(theirs, ids)) <= 1e-6
    files = [(tmp_path / where / "tokenizer.json").read_text() for where in ("theirs", "back")]
    assert json.loads(files[0]) == json.loads(files[1])
    settings = [json.loads((tmp_path / where / "tokenizer_config.json").read_text()) for where in ("theirs", "back")]
    assert settings[0] == settings[1]
    if name != "mistral":
        for file in ("config.json", "generation_config.json"):
            one, other = (json.loads((tmp_path / where / file).read_text()) for where in ("theirs", "back"))
            assert one == other, file


@pytest.mark.parametrize("name", ["llama-linear-bias", "qwen2"])
def test_masked_is_the_same_model_that_sees_both_ways(name, plain_tokenizer, tmp_path):
    theirs = save_foreign(tmp_path / "theirs", name, plain_tokenizer)
    run(tmp_path / "theirs", "masked", tmp_path / "ours")
    ours, ids = NanoLLaDAForMaskedLM.from_pretrained(tmp_path / "ours"), some_ids()
    everywhere = torch.zeros(2, 1, 20, 20)
    found = logits_of(ours, ids)
    assert difference(found[..., :300], logits_of(theirs, ids, attention_mask=everywhere)) <= 1e-5
    assert ours.config.mask_token_id == 300 and not found.softmax(-1)[..., 300].any()


def test_the_new_row_is_the_mean_and_the_others_keep_their_bits(plain_tokenizer, tmp_path):
    theirs = save_foreign(tmp_path / "theirs", "llama-llama3", plain_tokenizer, torch.bfloat16)
    record = run(tmp_path / "theirs", "causal", tmp_path / "ours")
    found = load_file(tmp_path / "ours" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old = theirs.state_dict()[name]
        assert found[name].dtype == torch.bfloat16 and found[name][:300].equal(old)
        assert found[name][300].equal(old.double().mean(0).bfloat16())
    assert record["vocabulary"] == {
        "rows": 300,
        "tokens": 301,
        "unused_rows": 0,
        "mask": "new row",
        "mask_token_id": 300,
        "pad_token": None,
    }
    assert record["dtype"] == "bfloat16" and record["source"]["kind"] == "llama"


def test_what_was_converted_is_what_the_trainers_ask_for(plain_tokenizer, tmp_path):
    save_foreign(tmp_path / "theirs", "llama-llama3", plain_tokenizer)
    run(tmp_path / "theirs", "causal", tmp_path / "ours")
    for model_class in (NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM):
        args = ModelArguments(model_name_or_path=str(tmp_path / "ours"))
        model, tokenizer = load_model_and_tokenizer(model_class, args, seed=0)
        assert len(tokenizer) == model.config.vocab_size == 301
        assert tokenizer.pad_token_id == tokenizer.eos_token_id == model.config.pad_token_id == 2
    remote = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", trust_remote_code=True)
    assert remote.generation_config.suppress_tokens == [300]


def test_a_padded_vocabulary_keeps_its_rows(plain_tokenizer, tmp_path):
    """Qwen's way: more rows than tokens. The mask takes one that is there; nothing changes, there or back."""
    theirs = save_foreign(tmp_path / "theirs", "qwen3", plain_tokenizer, vocab_size=320)
    record = run(tmp_path / "theirs", "causal", tmp_path / "ours")
    facts = record["vocabulary"]
    assert (facts["mask"], facts["mask_token_id"], facts["unused_rows"]) == ("unused row", 300, 19)
    ours = NanoLLaDAForCausalLM.from_pretrained(tmp_path / "ours")
    assert ours.config.vocab_size == 320 and ours.model.embed_tokens.weight.equal(theirs.model.embed_tokens.weight)
    assert difference(logits_of(ours, some_ids(320)), logits_of(theirs, some_ids(320))) <= 1e-5
    assert ours.config.tokenizer_length == 301  # so that the trainers take it, and no tokenizer of another length
    load_model_and_tokenizer(NanoLLaDAForMaskedLM, ModelArguments(model_name_or_path=str(tmp_path / "ours")), seed=0)
    run(tmp_path / "ours", "qwen3", tmp_path / "back")
    files = [(tmp_path / where / "model.safetensors").read_bytes() for where in ("theirs", "back")]
    assert files[0] == files[1]
    assert AutoTokenizer.from_pretrained(tmp_path / "back").get_vocab() == plain_tokenizer.get_vocab()


def test_the_tokenizer_is_that_of_the_file(plain_tokenizer, tmp_path):
    """transformers rebuilds a qwen2 folder's tokenizer from its vocabulary; the texts' ids must be the file's."""
    save_foreign(tmp_path / "theirs", "qwen2", plain_tokenizer)
    plain_tokenizer.save_pretrained(tmp_path / "theirs")  # not what AutoTokenizer makes of it
    text, file = "The cat sat in 2024.\n", Tokenizer.from_file(str(tmp_path / "theirs" / "tokenizer.json"))
    assert altered_part(tmp_path / "theirs", AutoTokenizer.from_pretrained(tmp_path / "theirs")) == "normalizer"
    run(tmp_path / "theirs", "causal", tmp_path / "ours")
    converted = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert altered_part(tmp_path / "theirs", converted) is None
    assert converted(text).input_ids == file.encode(text).ids


@pytest.mark.parametrize("scaling", [{"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0}])
def test_the_old_spelling_of_rope(scaling, tokenizer, tmp_path):
    theirs = save_foreign(tmp_path / "theirs", "llama-linear-bias", tokenizer)
    changes = {"rope_parameters": "REMOVED", "rope_theta": 1e4, "rope_scaling": scaling, "torch_dtype": "float32"}
    edit(tmp_path / "theirs" / "config.json", **changes)
    run(tmp_path / "theirs", "causal", tmp_path / "ours")
    ours = NanoLLaDAForCausalLM.from_pretrained(tmp_path / "ours")
    assert ours.config.rope_parameters == {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    assert difference(logits_of(ours, some_ids()), logits_of(theirs, some_ids())) <= 1e-5


@pytest.mark.parametrize("kind", ["shards", "bin", "bin shards"])
def test_files_of_weights(kind, tokenizer, tmp_path):
    folder = tmp_path / "theirs"
    theirs = save_foreign(folder, "llama-llama3", tokenizer)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a": names[:9], "b": names[9:]} if "shards" in kind else {"": names}
    stem, end = ("pytorch_model", "bin") if "bin" in kind else ("model", "safetensors")
    places = {}
    for part, held in parts.items():
        file = f"{stem}{part and '-' + part}.{end}"
        places |= dict.fromkeys(held, file)
        content = {name: tensors[name] for name in held}
        (torch.save if end == "bin" else save_file)(content, folder / file)
    if "shards" in kind:
        (folder / f"{stem}.{end}.index.json").write_text(json.dumps({"weight_map": places, "metadata": {}}))
    record = run(folder, "causal", tmp_path / "ours")
    ours = NanoLLaDAForCausalLM.from_pretrained(tmp_path / "ours")
    assert difference(logits_of(ours, some_ids()), logits_of(theirs, some_ids())) <= 1e-5
    assert sorted(record["source"]["sha256"]) == sorted(set(places.values()))
    if kind == "shards":
        save_file(tensors, folder / "model-b.safetensors")
        with pytest.raises(ValueError, match=r"must stand in one shard, got .* in model-b\.safetensors again"):
            run(folder, "causal", tmp_path / "again")
        (folder / "model-b.safetensors").unlink()
        with pytest.raises(ValueError, match="names model-b.safetensors, which must be there"):
            run(folder, "causal", tmp_path / "again")


def test_frequencies_of_old_checkpoints(tokenizer, tmp_path):
    file = tmp_path / "theirs" / "model.safetensors"
    save_foreign(tmp_path / "theirs", "llama-llama3", tokenizer, head_dim=8, rope_parameters={"rope_theta": 1e4})
    tensors = load_file(file)
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    right = 1e4 ** (-torch.arange(0, 8, 2) / 8)
    save_file({**tensors, name: right}, file, metadata={"format": "pt"})
    assert run(tmp_path / "theirs", "causal", tmp_path / "ours")["left_out"] == [name]
    save_file({**tensors, name: right * 1.001}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.1.*inv_freq must be the frequencies of .*10000"):
        run(tmp_path / "theirs", "causal", tmp_path / "again")


# ---- what is refused

CONFIGS = {
    "window": (
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": None},
        "sliding_window",
    ),
    "partial rotary": (
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor",
    ),
    "rope type": (
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "spiral"}},
        "`rope_type` must be one of .*'spiral'",
    ),
    "switched off": ({"use_rope": False}, "got 'use_rope'"),
    "private": ({"_attn_scale": 3.0}, "got '_attn_scale'"),
    "both ways": ({"is_causal": False}, "`is_causal` must be true or absent"),
    "both ways, as a number": ({"is_causal": 0}, "`is_causal` must be true or absent"),
    "softcap": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    "activation": ({"hidden_act": "snake"}, "`hidden_act` must be .*'snake'"),
    "quantised": ({"quantization_config": {"bits": 4}}, "`quantization_config`"),
    "model type": ({"model_type": "gemma3"}, "`model_type` of the source must be one of .*'gemma3'"),
    "tie": ({"tie_word_embeddings": True, "head_dim": 8}, "lm_head.weight must be the embedding"),
    "sizes": ({"intermediate_size": 32}, r"shape: .*down_proj.weight \[16, 24\], not \[16, 32\]"),
    "layers": ({"num_hidden_layers": 1, "layer_types": None}, r"unknown: model\.layers\.1\."),
    "more layers": ({"num_hidden_layers": 3, "layer_types": None}, r"missing: model\.layers\.2\."),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_are_refused(case, tokenizer, tmp_path):
    changes, message = CONFIGS[case]
    save_foreign(tmp_path / "theirs", "qwen3-yarn-bias", tokenizer)
    edit(tmp_path / "theirs" / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "theirs", "causal", tmp_path / "ours")
    assert not (tmp_path / "ours").exists() and [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_mistral_with_a_window(tokenizer, tmp_path):
    save_foreign(tmp_path / "theirs", "mistral", tokenizer, sliding_window=64)
    run(tmp_path / "theirs", "causal", tmp_path / "ours")  # as long as any row: it hides nothing
    save_foreign(tmp_path / "theirs", "mistral", tokenizer, sliding_window=32)
    with pytest.raises(ValueError, match=r"`sliding_window` must not be in use, got 32"):
        run(tmp_path / "theirs", "causal", tmp_path / "again")


TENSORS = {
    "experts": (
        lambda t: {"model.layers.0.mlp.experts.0.up_proj.weight": t},
        r"experts are not converted, got .*experts\.0",
    ),
    "router": (lambda t: {"model.layers.0.mlp.gate.weight": t}, r"experts are not converted, got .*mlp\.gate"),
    "integers": (lambda t: {"model.norm.weight": t.to(torch.int8)}, r"got model\.norm\.weight in torch\.int8"),
    "float8": (lambda t: {"model.norm.weight": t.to(torch.float8_e4m3fn)}, "float8"),
    "infinite": (lambda t: {"model.norm.weight": t / 0}, r"must be finite, got .* in model\.norm\.weight"),
    "two dtypes": (lambda t: {"model.norm.weight": t.half()}, r"model\.norm\.weight in torch\.float16"),
    "unknown": (lambda t: {"model.layers.0.self_attn.sinks": t}, r"unknown: .*sinks"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_refused(case, tokenizer, tmp_path):
    make, message = TENSORS[case]
    save_foreign(tmp_path / "theirs", "llama-llama3", tokenizer)
    file = tmp_path / "theirs" / "model.safetensors"
    save_file({**load_file(file), **make(torch.ones(16))}, file)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "theirs", "causal", tmp_path / "ours")


def test_tokenizers_that_are_refused(tokenizer, plain_tokenizer, tmp_path):
    save_foreign(tmp_path / "theirs", "llama-llama3", tokenizer, vocab_size=299)
    with pytest.raises(ValueError, match="not have more ids than the embedding has rows, got id 299 and 299"):
        run(tmp_path / "theirs", "causal", tmp_path / "ours")
    endless = PreTrainedTokenizerFast(tokenizer_object=plain_tokenizer.backend_tokenizer, pad_token="<|endoftext|>")
    save_foreign(tmp_path / "theirs", "llama-llama3", endless)
    with pytest.raises(ValueError, match="`tokenizer` must have an eos token"):
        run(tmp_path / "theirs", "causal", tmp_path / "ours")
    (tmp_path / "theirs" / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=r"`tokenizer` must be a folder with tokenizer_config\.json"):
        run(tmp_path / "theirs", "causal", tmp_path / "ours")


def test_arguments_that_are_refused(tokenizer, tmp_path):
    save_foreign(tmp_path / "theirs", "qwen3", tokenizer)
    for options, message in (
        ({"to": "gpt2"}, "`to` must be one of causal, masked, qwen3, llama, qwen2, got 'gpt2'"),
        ({"to": "qwen3", "tokenizer": "x"}, "`tokenizer` is the nanollada checkpoint's own"),
        ({"to": "causal", "output": str(tmp_path)}, "`output` must be new or empty"),
    ):
        with pytest.raises(ValueError, match=message):
            ConvertArguments(**{"source": "x", "output": str(tmp_path / "new"), **options})
    with pytest.raises(ValueError, match="`num_attention_heads` is for weights without a config"):
        run(tmp_path / "theirs", "causal", tmp_path / "ours", num_attention_heads=4)
    with pytest.raises(ValueError, match=r"the folder of a qwen3 model, got its file model\.safetensors"):
        run(tmp_path / "theirs" / "model.safetensors", "causal", tmp_path / "ours")
    with pytest.raises(ValueError, match="got .*nowhere, which is not there"):
        run(tmp_path / "nowhere", "causal", tmp_path / "ours")
    (tmp_path / "model.gguf").touch()
    with pytest.raises(
        ValueError, match=r"`source` must be a folder, .safetensors, .pt, .pth or .bin, got model\.gguf"
    ):
        run(tmp_path / "model.gguf", "causal", tmp_path / "ours")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").touch()
    with pytest.raises(ValueError, match="a LoRA adapter"):
        run(tmp_path / "adapter", "causal", tmp_path / "ours")


def test_what_is_written_is_checked(tokenizer, tmp_path, monkeypatch):
    """A conversion that is wrong: another RoPE base, and a tensor that is written with other bits."""
    save_foreign(tmp_path / "theirs", "qwen3", tokenizer)
    right = transformers_own.rope_of
    monkeypatch.setattr(transformers_own, "rope_of", lambda found: {**right(found), "rope_theta": 100.0})
    with pytest.raises(ValueError, match="logits must be the source's"):
        run(tmp_path / "theirs", "causal", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    assert "verified" not in run(tmp_path / "theirs", "causal", tmp_path / "unverified", verify=False)
    monkeypatch.undo()
    model = randomise(NanoLLaDAForCausalLM(NanoLLaDAConfig(**SIZES)))
    tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    convert_verify.compare_tensors(model, tensors)
    tensors["model.norm.weight"][3] += 1e-6
    with pytest.raises(ValueError, match=r"got another model\.norm\.weight"):
        convert_verify.compare_tensors(model, tensors)
    with pytest.raises(ValueError, match=r"a difference in \['model\.norm\.weight'\]"):
        convert_verify.compare_tensors(model, {n: t for n, t in tensors.items() if n != "model.norm.weight"})


# ---- from nanollada


def native(folder, tokenizer, model_class=NanoLLaDAForCausalLM, **shape):
    config = NanoLLaDAConfig(**{**SIZES, **shape})
    model = randomise(model_class(config))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


TARGETS = {
    "qwen3": {"head_dim": 6, "tie_word_embeddings": True},
    "llama": {"qk_norm": False, "mlp_bias": True, "attention_bias": True},
    "qwen2": {"qk_norm": False, "attention_bias": True, "attention_output_bias": False, "rope_parameters": YARN},
}


@pytest.mark.parametrize("to", TARGETS)
def test_our_own_models_become_theirs(to, tokenizer, tmp_path):
    ours = native(tmp_path / "ours", tokenizer, **TARGETS[to])
    if to == "qwen2":
        with pytest.raises(ValueError, match="got another `normalizer`: transformers takes it for the target's own"):
            run(tmp_path / "ours", to, tmp_path / "theirs")
    record = run(tmp_path / "ours", to, tmp_path / "theirs", verify=to != "qwen2")
    theirs, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs"), some_ids()
    assert theirs.config.model_type == to
    assert to == "qwen2" or record["verified"]["max_logit_difference"] <= 1e-5
    assert difference(logits_of(theirs, ids), logits_of(ours, ids)) <= 1e-5
    assert theirs.generation_config.suppress_tokens == [3] and theirs.config.eos_token_id == 2
    again = run(tmp_path / "theirs", "causal", tmp_path / "again")
    assert again["vocabulary"]["mask"] == "own"
    one, other = (load_file(tmp_path / where / "model.safetensors") for where in ("ours", "again"))
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


REFUSED = {
    "llama has `qk_norm` False": ("llama", {}),
    "qwen2 has `qk_norm` False": ("qwen2", {}),
    "qwen3 has `qk_norm` True": ("qwen3", {"qk_norm": False}),
    "qwen3 has `mlp_bias` False": ("qwen3", {"mlp_bias": True}),
    "llama has `attention_output_bias` True": (
        "llama",
        {"qk_norm": False, "attention_bias": True, "attention_output_bias": False},
    ),
    "qwen2 has `attention_bias` True": ("qwen2", {"qk_norm": False}),
    "llama needs `num_attention_heads` to divide": (
        "llama",
        {"qk_norm": False, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 6},
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_the_target_cannot_say(message, tokenizer, tmp_path):
    to, shape = REFUSED[message]
    native(tmp_path / "ours", tokenizer, **shape)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "ours", to, tmp_path / "theirs")


def test_a_diffusion_model_is_not_causal(tokenizer, tmp_path):
    native(tmp_path / "ours", tokenizer, NanoLLaDAForMaskedLM)
    with pytest.raises(ValueError, match="`source` must be autoregressive.*NanoLLaDAForMaskedLM"):
        run(tmp_path / "ours", "qwen3", tmp_path / "theirs")
    save_foreign(tmp_path / "llama", "llama-llama3", tokenizer)
    with pytest.raises(ValueError, match="`source` must be a folder of nanollada for this target, got llama"):
        run(tmp_path / "llama", "qwen3", tmp_path / "theirs")


def test_edit_tokens_would_be_words_there(tokenizer, tmp_path):
    native(tmp_path / "ours", tokenizer, delete_token_id=298, insert_token_id=299)
    with pytest.raises(ValueError, match=r"`source` must be without edit tokens.*got a vocabulary with \[298, 299\]"):
        run(tmp_path / "ours", "qwen3", tmp_path / "theirs")


def test_a_record_of_other_weights(plain_tokenizer, tmp_path):
    save_foreign(tmp_path / "theirs", "qwen3", plain_tokenizer)
    run(tmp_path / "theirs", "causal", tmp_path / "ours")
    path = tmp_path / "ours" / "conversion.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "vocabulary": {**record["vocabulary"], "rows": 299}}))
    with pytest.raises(ValueError, match=r"conversion\.json must be of these weights: .* got 301"):
        run(tmp_path / "ours", "qwen3", tmp_path / "back")


def test_the_way_back_has_what_was_changed_since(plain_tokenizer, tmp_path):
    save_foreign(tmp_path / "theirs", "qwen3", plain_tokenizer)
    run(tmp_path / "theirs", "causal", tmp_path / "ours")
    edit(tmp_path / "ours" / "config.json", attention_dropout=0.25)
    run(tmp_path / "ours", "qwen3", tmp_path / "back")
    one, other = (json.loads((tmp_path / where / "config.json").read_text()) for where in ("theirs", "back"))
    assert other == {**one, "attention_dropout": 0.25}


# ---- the whole way


def documents(tokenizer, count=48, length=24):
    """Rows of a language with a rule: counting in steps of 1 to 4."""
    rows = torch.arange(length)[None] * (1 + torch.arange(count) % 4)[:, None] + 10 * torch.arange(count)[:, None]
    return torch.cat((torch.zeros(count, 1, dtype=torch.long), 4 + rows % 50), dim=1)


def test_training_goes_on(tokenizer, tmp_path):
    """A Llama that plain transformers code trained has the same loss here, and our trainer goes on below it."""
    config = LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    torch.manual_seed(0)
    theirs, rows = LlamaForCausalLM(config), documents(tokenizer)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2)
    train, held_out = rows[:40], rows[40:]
    for _ in range(40):
        theirs(train, labels=train).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    run(tmp_path / "theirs", "causal", tmp_path / "ours")

    def loss(model):
        batch = {"input_ids": held_out, "labels": torch.where(torch.arange(25) == 0, -100, held_out)}
        with torch.no_grad():
            return causal_nll(model.eval(), batch).sum().item() / held_out[:, 1:].numel()

    args = ModelArguments(model_name_or_path=str(tmp_path / "ours"))
    ours, _ = load_model_and_tokenizer(NanoLLaDAForCausalLM, args, seed=0)
    with torch.no_grad():
        before = theirs.eval()(held_out, labels=held_out).loss.item()
    assert loss(ours) == pytest.approx(before, abs=1e-5) and before < 3.0
    data = [
        {"input_ids": row, "labels": [-100, *row[1:]], "document_ids": [0] * 25, "position_ids": list(range(25))}
        for row in train.tolist()
    ]
    data = [{**row, "index": index, "num_bytes": 24} for index, row in enumerate(data)]
    quiet = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "plot_loss": False, "disable_tqdm": True}
    settings = CausalConfig(
        str(tmp_path / "run"), max_steps=15, learning_rate=5e-3, per_device_train_batch_size=20, **quiet
    )
    from nanollada.trainers.data.collator import Collator

    CausalTrainer(ours, settings, Collator(0, 0.0, 42), data).train()
    assert loss(ours) < before - 0.1


def test_the_command_line(tokenizer, tmp_path, capsys):
    save_foreign(tmp_path / "theirs", "qwen3", tokenizer)
    record = main(["--source", str(tmp_path / "theirs"), "--to", "masked", "--output", str(tmp_path / "ours")])
    said = capsys.readouterr().out
    assert "theirs (qwen3)" in said and "id 3, own" in said and "logits differ by" in said
    assert json.loads((tmp_path / "ours" / "conversion.json").read_text()) == record
    code = "import sys, nanollada.scripts.conversion.to_ours; sys.exit(bool({'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0  # --help is fast
    given = ["--rope_parameters", '{"rope_theta": 1e6}', "--num_attention_heads", "4", "--hidden_act", "silu"]
    given += ["--rms_norm_eps", "1e-6", "--max_position_embeddings", "64", "--verify", "false"]
    given += ["--architecture", "minimind"]
    torch.save(minimind_weights(), tmp_path / "a.pth")
    paths = [
        "--source",
        str(tmp_path / "a.pth"),
        "--output",
        str(tmp_path / "b"),
        "--tokenizer",
        str(tmp_path / "theirs"),
    ]
    main([*paths, "--to", "causal", *given])
    assert "verified    no" in capsys.readouterr().out
