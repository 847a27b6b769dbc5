"""The configuration: defaults, derived fields, refusals, and the round trip."""

import json
import re
from dataclasses import fields

import pytest
import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig

from nanollada.configuration_nanollada import NanoLLaDAConfig
from nanollada.configuration_nanollada.configuration_nanollada import _FIXED
from nanollada.modeling_nanollada import NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM


def test_defaults_are_the_seeds():
    config = NanoLLaDAConfig()
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (
        6400,
        512,
        8,
        8,
    )
    assert (config.intermediate_size, config.head_dim, config.num_key_value_heads) == (1408, 64, 8)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
    assert config.mask_token_id < config.vocab_size and not config.tie_word_embeddings
    assert config.block_length is None


def edits(delete, insert):
    return {"delete_token_id": delete, "insert_token_id": insert}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"hidden_size": 100, "num_attention_heads": 7},
            "`num_attention_heads` must divide `hidden_size`.*got 7 and 100",
        ),
        ({"num_key_value_heads": 3}, "`num_key_value_heads` must divide `num_attention_heads`, got 3 and 8"),
        ({"head_dim": 7}, "`head_dim` must be even.*got 7"),
        ({"vocab_size": 0}, "`vocab_size` must be > 0, got 0"),
        ({"tokenizer_length": 6401}, r"`tokenizer_length` must lie in \(0, `vocab_size`\], got 6401 and 6400"),
        ({"num_attention_heads": 0}, "`num_attention_heads` must be > 0, got 0"),
        ({"block_length": 0}, "`block_length` must be > 0, got 0"),
        ({"rms_norm_eps": 0.0}, "`rms_norm_eps` must be > 0, got 0.0"),
        ({"hidden_dropout": 1.0}, r"`hidden_dropout` must lie in \[0, 1\), got 1.0"),
        ({"attention_dropout": -0.1}, r"`attention_dropout` must lie in \[0, 1\), got -0.1"),
        ({"mask_token_id": 6400}, r"`mask_token_id` must lie in \[0, `vocab_size`\), got 6400 and 6400"),
        ({"mask_token_id": 2}, "`mask_token_id` must differ from `eos_token_id`, got 2 for both"),
        ({"eos_token_id": [2, 3]}, "`mask_token_id` must differ from `eos_token_id`, got 3 for both"),
        ({"delete_token_id": 5}, "`delete_token_id` and `insert_token_id` must be given together, got 5 and None"),
        ({"insert_token_id": 5}, "`delete_token_id` and `insert_token_id` must be given together, got None and 5"),
        (edits(5, 5), "`delete_token_id` must differ from `insert_token_id`, got 5 for both"),
        (edits(3, 5), "`mask_token_id` must differ from `delete_token_id`, got 3 for both"),
        (edits(5, 3), "`mask_token_id` must differ from `insert_token_id`, got 3 for both"),
        (edits(0, 5), "`delete_token_id` must differ from `pad_token_id`, got 0 for both"),
        (edits(5, 1), "`insert_token_id` must differ from `bos_token_id`, got 1 for both"),
        ({**edits(5, 6), "eos_token_id": [2, 6]}, "`insert_token_id` must differ from `eos_token_id`, got 6 for both"),
        (edits(6400, 5), r"`delete_token_id` must lie in \[0, `vocab_size`\), got 6400 and 6400"),
        ({"rope_parameters": {"rope_type": "circle"}}, "`rope_type` must be one of default.*got 'circle'"),
        (
            {"rope_parameters": {"rope_type": "linear", "factr": 2.0}},
            r"`rope_parameters` must not hold 'factr' \(did you mean `factor`\?\), got 2.0",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "`partial_rotary_factor` must be unset or 1, got 0.5",
        ),
        ({"partial_rotary_factor": 0.5}, "`partial_rotary_factor` must be unset or 1, got 0.5"),
        ({"hiden_size": 64}, r"`hiden_size` is no field of NanoLLaDAConfig \(did you mean `hidden_size`\?\), got 64"),
        ({"sliding_window": None}, "`sliding_window` is no field of NanoLLaDAConfig, got None"),
        ({"temperature": 0.5}, "`temperature` is no field of NanoLLaDAConfig, got 0.5"),
        ({"per_layer_config": {0: {}}}, "`per_layer_config` is no field of NanoLLaDAConfig"),
        ({"return_dict": False}, "`return_dict` must be True in a NanoLLaDAConfig, got False"),
        ({"is_decoder": True}, "`is_decoder` must be False in a NanoLLaDAConfig, got True"),
        ({"chunk_size_feed_forward": 4}, "`chunk_size_feed_forward` must be 0 in a NanoLLaDAConfig, got 4"),
    ],
)
def test_wrong_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        NanoLLaDAConfig(**arguments)


def test_edit_tokens_are_both_or_neither(tmp_path):
    NanoLLaDAConfig().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    older = {name: value for name, value in saved.items() if name not in PAIR}  # of before there were any
    assert len(older) == len(saved) - 2
    (tmp_path / "config.json").write_text(json.dumps(older))
    assert NanoLLaDAConfig.from_pretrained(tmp_path).edit_token_ids == []
    NanoLLaDAConfig(**edits(9, 8)).save_pretrained(tmp_path)
    assert NanoLLaDAConfig.from_pretrained(tmp_path).edit_token_ids == [9, 8]
    with pytest.raises(ValueError, match=r"`delete_token_id` must lie in \[0, `vocab_size`\), got 9 and 9"):
        NanoLLaDAConfig(**edits(9, 8)).check_vocab_size(9)


def test_wrong_type_is_refused():
    with pytest.raises(Exception, match="Field 'vocab_size' expected int, got str"):
        NanoLLaDAConfig(vocab_size="6400")


def test_yarn_and_the_callers_dictionary():
    rope = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 2048}
    config = NanoLLaDAConfig(rope_parameters=rope)
    assert config.rope_parameters["rope_theta"] == 1e6
    assert "rope_theta" not in rope


def test_is_causal_is_never_kept(tmp_path):
    NanoLLaDAConfig(hidden_dropout=0.1, num_key_value_heads=2, block_length=4).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "is_causal" not in saved
    (tmp_path / "config.json").write_text(json.dumps({**saved, "is_causal": False}))
    config = NanoLLaDAConfig.from_pretrained(tmp_path)
    assert not hasattr(config, "is_causal")
    assert (config.hidden_dropout, config.num_key_value_heads, config.block_length) == (0.1, 2, 4)


def check_names(names):
    """Every name of transformers passes with what it means by default, or is refused on purpose."""
    for name in sorted(names - {"per_layer_config", "use_return_dict"}):
        try:
            NanoLLaDAConfig(**{name: _FIXED.get(name, getattr(PreTrainedConfig(), name, None))})
        except ValueError as error:
            if f"`{name}` is no field" not in str(error):
                raise
            where = "_TRANSFORMERS_KEYS of configuration_nanollada.py"
            raise AssertionError(
                f"transformers {transformers.__version__} has a new {name}: decide it, in {where}"
            ) from error


def test_each_field_of_transformers_is_decided():
    documented = set(re.findall(r"^        (\w+) \(`", PreTrainedConfig.__doc__, re.M))
    assert {"name_or_path", "output_attentions", "problem_type", "dtype"} <= documented
    names = {field.name for field in fields(PreTrainedConfig)} | documented
    names |= {name for name in vars(PreTrainedConfig()) if not name.startswith("_")}
    names |= {name for name, value in vars(PreTrainedConfig).items() if isinstance(value, property) and value.fset}
    check_names({name for name in names if not name.startswith("_")})
    with pytest.raises(AssertionError, match="has a new brand_new: decide it"):
        check_names({"brand_new"})


def test_a_file_is_read_as_strictly_as_a_call(tmp_path):
    NanoLLaDAConfig(block_length=4).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())

    def load(**more):
        (tmp_path / "config.json").write_text(json.dumps({**saved, **more}))
        return NanoLLaDAConfig.from_pretrained(tmp_path)

    other_versions = {"transformers_version": "9.0", "_commit_hash": "a", "_new": 1, "torch_dtype": "float16"}
    config = load(**other_versions, torchscript=False, tie_last_hidden_states=None, quantization_config={"bits": 4})
    assert (config.block_length, config.dtype) == (4, torch.float16)
    for name, guess in (("blok_length", r" \(did you mean `block_length`\?\)"), ("sliding_window", "")):
        with pytest.raises(ValueError, match=f"`{name}` is no field of NanoLLaDAConfig{guess}, got 8"):
            load(**{name: 8})
    load()
    assert NanoLLaDAConfig.from_pretrained(tmp_path, block_length=8).block_length == 8
    with pytest.raises(ValueError, match=r"`blok_length` is no field .* \(did you mean `block_length`\?\), got 8"):
        NanoLLaDAConfig.from_pretrained(tmp_path, blok_length=8)
    _, unused = NanoLLaDAConfig.from_pretrained(tmp_path, blok_length=8, return_unused_kwargs=True)
    assert unused == {"blok_length": 8}
    AutoConfig.register("nanollada", NanoLLaDAConfig, exist_ok=True)
    assert AutoConfig.from_pretrained(tmp_path, dtype="float16", attn_implementation="eager").block_length == 4


SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 2, "initializer_range": 0.5}
OTHER = {
    **{"vocab_size": 80, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 1, "head_dim": 4, "hidden_act": "gelu", "initializer_range": 0.1, "rms_norm_eps": 1.0},
    **{"use_cache": False, "tie_word_embeddings": True, "qk_norm": False, "attention_bias": True, "mlp_bias": True},
    **{"attention_output_bias": True, "attention_dropout": 0.5, "hidden_dropout": 0.5, "block_length": 2},
    **{"label_shift": True, "mask_token_id": 9, "pad_token_id": 9, "bos_token_id": 9, "eos_token_id": [2, 9]},
    **{"delete_token_id": 10, "insert_token_id": 11},
    "rope_parameters": {"rope_type": "default", "rope_theta": 2.0},
}
PAIR = {"delete_token_id": 12, "insert_token_id": 13}  # given together
# Limits and sizes that others read: `max_position_embeddings` training, lm-eval and `generate`, both the converters.
ELSEWHERE = {"max_position_embeddings", "tokenizer_length"}


def test_each_field_does_something():
    own = {field.name for field in fields(NanoLLaDAConfig)} - {field.name for field in fields(PreTrainedConfig)}
    assert own == {*OTHER, *ELSEWHERE}

    def facts(**changed):
        found, ids = [], torch.tensor([[4, 5, 6, 7, 8, 3]])
        for network in (NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM):
            torch.manual_seed(0)
            model = network(NanoLLaDAConfig(**{**SMALL, **changed}))
            for mode in (True, False):
                torch.manual_seed(0)
                output = model.train(mode)(ids)
                found.append((output.logits[..., 4:8].tolist(), len(output)))
            tokens = [getattr(model.generation_config, f"{name}_token_id") for name in ("pad", "bos", "eos")]
            found.append((len(model.state_dict()), len(set(model.parameters())), model.lm_head.weight.shape, tokens))
            found.append(model.generation_config.suppress_tokens)
        return found

    base = facts()
    assert base == facts()
    given = {name: {**PAIR, name: value} if name in PAIR else {name: value} for name, value in OTHER.items()}
    bases = {name: facts(**PAIR) if name in PAIR else base for name in OTHER}
    assert [name for name in OTHER if facts(**given[name]) == bases[name]] == []
    assert facts(**PAIR) != base


def test_what_a_loader_leaves_unset_is_no_field(tmp_path):
    """lm-eval passes `gguf_file=None`; set, nobody here reads it."""
    NanoLLaDAConfig(vocab_size=20).save_pretrained(tmp_path)
    assert NanoLLaDAConfig.from_pretrained(tmp_path, gguf_file=None).vocab_size == 20
    with pytest.raises(ValueError, match="`gguf_fil` is no field of NanoLLaDAConfig"):
        NanoLLaDAConfig.from_pretrained(tmp_path, gguf_fil="a")
