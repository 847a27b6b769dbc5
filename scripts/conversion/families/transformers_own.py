"""Models of transformers whose forward pass is nanollada's: Qwen3, Llama, Qwen2 and Mistral."""

from collections.abc import Callable
from pathlib import Path

from nanollada.scripts.conversion.families.family import Family, Source
from nanollada.scripts.conversion.shape import PRIVATE, rope_of

SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "attention_dropout",
)
# Keys of a config.json that say nothing about the forward pass and that its config class does not know.
HARMLESS = {
    *("do_sample", "max_length", "temperature", "top_k", "top_p"),  # generation settings of old times
    "head_dim",  # Qwen2's class has no such field, its attention reads it
    "pretraining_tp",
    "rope_scaling",
    "rope_theta",
    "tokenizer_class",
    "unk_token_id",
    "torch_dtype",
    "unsloth_fixed",
    "unsloth_version",
}


def of_transformers(
    name: str, model_class: str, switches: Callable, architecture: dict, writes: Callable | None = None
) -> Family:
    """
    A family that transformers has, with Llama's names of tensors.

    Args:
        switches (`Callable`): `switches(config)`: `qk_norm` and the three biases of a config of transformers.
        architecture, writes: See [`Family`].
    """

    def understand(tensors: dict, raw: dict, beside: dict, given: dict, to: str) -> Source:
        return Source(name, foreign_shape(name, raw, switches), tensors, {}, raw)

    return Family(
        name=name,
        help=f"a folder of transformers' {model_class}",
        understand=understand,
        model_class=model_class,
        architecture=architecture,
        reference=load_reference,
        writes=writes,
    )


def load_reference(folder: Path):
    """The foreign model in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def foreign_shape(kind: str, raw: dict, switches: Callable) -> dict:
    """
    Arguments of [`NanoLLaDAConfig`] for a config.json of transformers, in either spelling of RoPE.

    Raises:
        `ValueError`: naming the key: unknown ones, windows, scaled or partial RoPE that nanollada lacks, activations.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING
    from transformers.activations import ACT2FN

    config_class = CONFIG_MAPPING[kind]
    known = {*config_class().to_dict(), *HARMLESS}
    if raw.get("is_causal") not in (None, True):
        raise ValueError(f"`is_causal` must be true or absent: nanollada's class decides, got {raw['is_causal']!r}")
    known |= {*PRIVATE, "is_causal"}
    odd = [key for key in raw if key not in known and raw[key] is not None]
    odd = [key for key in odd if not (key.startswith("_") and isinstance(raw[key], str))]  # where something came from
    if odd:
        raise ValueError(
            f"config.json must hold keys of transformers' {kind} only, got {odd[0]!r}: if it changes nothing in the "
            "forward pass, remove it"
        )
    try:
        config = config_class.from_dict(
            {key: value for key, value in raw.items() if key in known and key != "is_causal"}
        )
    except StrictDataclassError as error:
        raise ValueError(f"config.json must be a valid one of transformers' {kind}: {error}") from error
    shape = {name: getattr(config, name) for name in SHARED}
    if shape["hidden_act"] not in ACT2FN:
        raise ValueError(f"`hidden_act` must be an activation of transformers, got {shape['hidden_act']!r}")
    if set(getattr(config, "layer_types", None) or []) - {"full_attention"}:
        raise window_in_use(config)
    return {
        **shape,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "rope_parameters": rope_of(config.rope_parameters),
        **switches(config),
    }


def window_in_use(config) -> ValueError:
    """What is said of a config whose attention does not see everything before it."""
    return ValueError(
        "`sliding_window` must not be in use, got "
        f"{config.sliding_window} (`max_position_embeddings` {config.max_position_embeddings})"
    )


def must_have(family: str, config, **needed) -> None:
    """
    Raises:
        `ValueError`: naming a switch of the config that the family has otherwise.
    """
    for name, value in needed.items():
        if (given := getattr(config, name)) != value:
            raise ValueError(
                f"{family} has `{name}` {value} where the rest is as here, got {given}: choose another target"
            )


# ---- the four


def _biases(attention: bool, output: bool, mlp: bool = False, qk_norm: bool = False) -> dict:
    return {
        "qk_norm": qk_norm,
        "attention_bias": bool(attention),
        "attention_output_bias": bool(output),
        "mlp_bias": bool(mlp),
    }


def _qwen3(config) -> dict:
    must_have("qwen3", config, qk_norm=True, mlp_bias=False, attention_output_bias=config.attention_bias)
    return {"attention_bias": config.attention_bias}


def _llama(config) -> dict:
    must_have("llama", config, qk_norm=False, attention_output_bias=config.attention_bias)
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            "llama needs `num_attention_heads` to divide `hidden_size`, "
            f"got {config.num_attention_heads} and {config.hidden_size}"
        )
    return {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}


def _qwen2(config) -> dict:
    must_have("qwen2", config, **_biases(attention=True, output=False))
    return {}


def _mistral_switches(config) -> dict:
    if config.sliding_window is not None and config.sliding_window < config.max_position_embeddings:
        raise window_in_use(config)
    return _biases(False, False)


# The last dicts are what tensors alone must show. Whose forward pass they stand for they do not tell (Gemma's and
# Granite's names are Llama's).
MEMBERS = (
    of_transformers(
        "qwen3",
        "Qwen3ForCausalLM",
        lambda config: _biases(config.attention_bias, config.attention_bias, qk_norm=True),
        {"qk_norm": True, "mlp_bias": False},
        _qwen3,
    ),
    of_transformers(
        "llama",
        "LlamaForCausalLM",
        lambda config: _biases(config.attention_bias, config.attention_bias, config.mlp_bias),
        {"qk_norm": False},
        _llama,
    ),
    of_transformers("qwen2", "Qwen2ForCausalLM", lambda config: _biases(True, False), _biases(True, False), _qwen2),
    of_transformers("mistral", "MistralForCausalLM", _mistral_switches, _biases(False, False)),
)
