"""The configuration: defaults, derived fields, refusals, and the round trip."""

import json

import pytest

from nanollada.configuration_nanollada import NanoLLaDAConfig


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
        ({"rope_parameters": {"rope_type": "circle"}}, "`rope_type` must be one of default.*got 'circle'"),
    ],
)
def test_wrong_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        NanoLLaDAConfig(**arguments)


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
