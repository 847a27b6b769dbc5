"""minimind's dense model: folders with its own code, whose structure is known."""

import math

from nanollada.scripts.conversion.families.family import Family, Source
from nanollada.scripts.conversion.shape import PRIVATE, SHAPE, derived_shape

# minimind's folders come with its code, whose structure is known.
MINIMIND_CODE = {
    "AutoConfig": "MiniMindConfig",
    "AutoModel": "MiniMindModel",
    "AutoModelForCausalLM": "MiniMindForCausalLM",
}
# What minimind's config.json may hold beside the shape, and the one value that is understood, where there is but one.
MINIMIND_REST = {
    **dict.fromkeys(("model_type", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version")),
    **dict.fromkeys(("vocab_size", "num_hidden_layers", "num_key_value_heads", "head_dim", "intermediate_size")),
    **dict.fromkeys(("rope_theta", "rope_scaling", "inference_rope_scaling", "dropout", "flash_attn", "use_cache")),
    **dict.fromkeys(("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")),
    **dict.fromkeys(("num_experts_per_tok", "n_routed_experts", "n_shared_experts", "scoring_func", "aux_loss_alpha")),
    **dict.fromkeys(("seq_aux", "norm_topk_prob", "num_experts", "moe_intermediate_size", "router_aux_loss_coef")),
    "use_moe": False,
}
# Nano-LLaDA's and minimind's only scaled RoPE (minimind since 2025-12-01; before that it had a formula of its own).
YARN = {
    "rope_type": "yarn",
    "factor": 16.0,
    "original_max_position_embeddings": 2048,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "attention_factor": 1.0,
}
# What minimind's config.json always holds; a key that is not there would have to be guessed.
MINIMIND = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "inference_rope_scaling",
)


def understand(tensors: dict, raw: dict, beside: dict, given: dict, to: str) -> Source:
    """A folder of minimind's."""
    return Source("minimind", _minimind_shape(tensors, raw), tensors, {}, raw)


def _minimind_shape(tensors: dict, raw: dict) -> dict:
    absent = [name for name in MINIMIND if name not in raw]
    if absent:
        raise ValueError(f"a minimind config.json must hold {', '.join(MINIMIND)}, got none of {', '.join(absent)}")
    known = {*MINIMIND, *MINIMIND_REST, *SHAPE, *PRIVATE} - {"rope_parameters"}
    odd = [key for key in raw if key not in known and raw[key] is not None]
    odd += [key for key, value in MINIMIND_REST.items() if value is not None and raw.get(key, value) != value]
    code = (raw.get("auto_map") or {}).items()
    odd += [f"{auto}: {name}" for auto, name in code if str(name).rpartition(".")[2] != MINIMIND_CODE.get(auto)]
    if odd:
        raise ValueError(f"a minimind config.json must hold what minimind's dense model has, got {odd[0]!r}")
    found = raw.get("rope_scaling")
    if found is not None and not raw["inference_rope_scaling"]:
        raise ValueError(f"`rope_scaling` must be null without `inference_rope_scaling`, got {found}")
    if raw["inference_rope_scaling"] and found is not None:
        expected = {**YARN, "type": "yarn", "rope_type": "yarn"}
        odd = {key: value for key, value in found.items() if expected.get(key) != value and key != "rope_theta"}
        if odd or not YARN.keys() - {"rope_type"} <= found.keys():
            raise ValueError(f"`rope_scaling` of minimind must be {YARN}, got {found}: an older formula")
    heads = raw["num_attention_heads"]
    given = {name: raw[name] for name in SHAPE if name != "rope_parameters"}
    given["rope_parameters"] = minimind_rope(
        raw["rope_theta"], raw["inference_rope_scaling"], raw["max_position_embeddings"], raw["hidden_size"] // heads
    )
    derived = derived_shape(tensors, given, tied=raw.get("tie_word_embeddings", True))
    stated = {name: raw[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_key_value_heads")}
    for name in ("head_dim", "intermediate_size"):
        if raw.get(name) is not None:
            stated[name] = raw[name]
    stated["num_key_value_heads"] = stated["num_key_value_heads"] or heads
    dropout = raw.get("dropout", 0.0)  # of probabilities, and of what attention and MLP add
    return {**derived, **stated, "attention_dropout": dropout, "hidden_dropout": dropout}


def minimind_rope(theta: float, scaled: bool, max_position_embeddings: int, head_dim: int) -> dict:
    """
    RoPE of minimind and Nano-LLaDA. Their tables have `max_position_embeddings` rows, and YaRN is on if these are more
    than the original 2048.

    Raises:
        `ValueError`: where their YaRN is not transformers' (the ramp would end behind the last pair).
    """
    if not scaled:
        return {"rope_type": "default", "rope_theta": float(theta)}
    original = YARN["original_max_position_embeddings"]
    if max_position_embeddings <= original:
        raise ValueError(
            f"`inference_rope_scaling` with `max_position_embeddings` up to {original} depends on the length of a "
            f"table, got {max_position_embeddings}"
        )
    if math.ceil(head_dim * math.log(original / (2 * math.pi)) / (2 * math.log(theta))) > head_dim // 2 - 1:
        raise ValueError(f"`rope_theta` is too small for this YaRN to be transformers', got {theta}")
    return {**YARN, "rope_theta": float(theta)}


MEMBERS = (
    Family(
        name="minimind",
        help="a folder or .pt file of minimind's dense model",
        understand=understand,
        model_class=MINIMIND_CODE["AutoModelForCausalLM"],
        architecture={"attention_bias": False, "attention_output_bias": False, "mlp_bias": False},
        plain_tokenizer=True,
    ),
)
