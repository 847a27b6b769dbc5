"""Foreign checkpoints in nanollada's terms: Qwen3, Llama, Qwen2 and Mistral folders, minimind, Nano-LLaDA."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from nanollada.scripts.conversion.tensors import digests, read_weights, weight_files
from nanollada.trainers.records import read_json

RECORD = "conversion.json"
# The class that computes what is computed here; others (a classifier, an encoder) have the same tensors.
FOREIGN = {
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "mistral": "MistralForCausalLM",
}
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
# What a state dict alone cannot tell.
SHAPE = ("num_attention_heads", "hidden_act", "rms_norm_eps", "max_position_embeddings", "rope_parameters")
# Nor whose forward pass its names stand for (Gemma's and Granite's are Llama's), only what these need to look like.
PLAIN = {"attention_bias": False, "attention_output_bias": False, "mlp_bias": False}
ARCHITECTURES = {
    "qwen3": {"qk_norm": True, "mlp_bias": False},
    "llama": {"qk_norm": False},
    "qwen2": {**PLAIN, "qk_norm": False, "attention_bias": True},
    "mistral": {**PLAIN, "qk_norm": False},
    "minimind": PLAIN,
}
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
PRIVATE = ("_name_or_path", "_commit_hash", "_attn_implementation", "_attn_implementation_autoset")  # of transformers
TOKENIZER_PARTS = ("normalizer", "pre_tokenizer", "model", "post_processor", "decoder")
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


@dataclass
class Source:
    """
    A checkpoint that has been understood.

    Attributes:
        kind (`str`): "qwen3", "llama", "qwen2", "mistral", "minimind", "nano-llada" or "state dict".
        shape (`dict`): Arguments of [`NanoLLaDAConfig`], without the token ids.
        tensors (`dict[str, torch.Tensor]`): Under nanollada's names.
        files (`dict[str, str]`): SHA-256 of each weights file by its name.
        config (`dict`): The source's own config or arguments, as they were.
        folder (`Path`, *optional*): Where tokenizer and generation settings are.
        notes (`list[str]`): What a user should know.
    """

    kind: str
    shape: dict
    tensors: dict
    files: dict
    config: dict
    folder: Path | None = None
    notes: list[str] = field(default_factory=list)


def read_source(source: str | Path, given: dict, to: str) -> Source:
    """
    Reads a foreign checkpoint.

    Args:
        source (`str` or `Path`): A folder with config.json, or a file of weights.
        given (`dict`): What the user says of the shape (`SHAPE`) and of the `architecture`, for weights that come
            without a config.
        to (`str`): "causal" or "masked".

    Raises:
        `ValueError`: for whatever is not understood, naming the key of the config or the tensor.
    """
    source = Path(source)
    if not source.exists():
        raise ValueError(f"`source` must be a folder or a file, got {source}, which is not there")
    files = weight_files(source)
    folder = source if source.is_dir() else source.parent
    has_config = (folder / "config.json").is_file()
    tensors, beside = read_weights(files)
    if "token_emb.weight" in tensors or "model.token_emb.weight" in tensors:
        if "architecture" in given:
            raise ValueError(f"`architecture` is said by Nano-LLaDA's tensors, got {given['architecture']!r}")
        found = _nano_llada(tensors, beside, given, to)
    elif has_config:
        if given:
            raise ValueError(f"`{next(iter(given))}` is for weights without a config.json, got one in {folder}")
        found = _with_config(tensors, read_json(folder / "config.json"))
        if source.is_file() and found.kind in FOREIGN:
            raise ValueError(f"`source` must be the folder of a {found.kind} model, got its file {source.name}")
    else:
        found = _state_dict(tensors, given)
    found.files = digests(files)
    found.folder = folder if has_config and found.kind != "nano-llada" else None
    return found


def _with_config(tensors: dict, raw: dict) -> Source:
    kind = raw.get("model_type")
    if raw.get("quantization_config"):
        raise ValueError("quantised weights are not converted, got `quantization_config` in config.json")
    if kind not in ARCHITECTURES:
        raise ValueError(f"`model_type` of the source must be one of {', '.join(ARCHITECTURES)}, got {kind!r}")
    own = FOREIGN.get(kind, MINIMIND_CODE["AutoModelForCausalLM"])
    if (classes := raw.get("architectures") or [own]) != [own]:
        raise ValueError(f"`architectures` of a {kind} model must be [{own!r}] or absent, got {classes}")
    _refuse_two_ropes(raw)
    if kind == "minimind":
        return Source(kind, _minimind_shape(tensors, raw), tensors, {}, raw)
    return Source(kind, foreign_shape(kind, raw), tensors, {}, raw)


def _refuse_two_ropes(raw: dict) -> None:
    """Where RoPE is spelt twice, transformers takes one and drops the other without a word: they must agree."""
    ropes = [raw.get(name) for name in ("rope_parameters", "rope_scaling")]
    ropes = [rope for rope in ropes if rope and isinstance(rope, dict)]
    theta, names = raw.get("rope_theta"), (("rope_type", "type"), ("type", "rope_type"))
    thetas = [rope.get("rope_theta", theta) for rope in ropes] + ([] if theta is None else [theta])
    apart = {"rope_theta", "rope_type", "type"}
    said = {
        "rope_theta": thetas,
        "rope_type": [rope.get(one) or rope.get(other) or "default" for rope in ropes for one, other in names],
        "rope_scaling": [{key: value for key, value in rope.items() if key not in apart} for rope in ropes],
    }
    for name, values in said.items():
        if differing := [value for value in values if value != values[0]]:
            raise ValueError(
                f"`{name}` must be the same wherever config.json has it, got {values[0]} and {differing[0]}"
            )


def load_tokenizer(path: str | Path, kind: str):
    """A tokenizer, without what loading notes down about this machine."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # minimind's config.json is no config of transformers, which AutoTokenizer would read first.
    tokenizer_class = PreTrainedTokenizerFast if kind == "minimind" else AutoTokenizer
    tokenizer = tokenizer_class.from_pretrained(path)
    if altered_part(
        path, tokenizer
    ):  # transformers 5 rebuilds a qwen2 folder's, and some classes', from the vocabulary
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        if part := altered_part(path, tokenizer):
            raise ValueError(f"the tokenizer must load as {path}/tokenizer.json has it, got another `{part}`")
    for name in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)
    return tokenizer


def altered_part(path: str | Path, tokenizer) -> str | None:
    """The first part of a folder's tokenizer.json that the loaded tokenizer has otherwise; a part makes token ids."""
    from tokenizers import Tokenizer

    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        return None
    ours, theirs = (json.loads(one.to_str()) for one in (tokenizer.backend_tokenizer, Tokenizer.from_file(str(file))))
    return next((part for part in TOKENIZER_PARTS if ours[part] != theirs[part]), None)


# ---- transformers' own models


def foreign_shape(kind: str, raw: dict) -> dict:
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
    _refuse_windows(kind, config)
    bias = kind == "qwen2" or bool(getattr(config, "attention_bias", False))
    return {
        **shape,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "rope_parameters": _rope(config.rope_parameters),
        "qk_norm": kind == "qwen3",
        "attention_bias": bias,
        "attention_output_bias": bias and kind != "qwen2",
        "mlp_bias": bool(getattr(config, "mlp_bias", False)),
    }


def _refuse_windows(kind: str, config) -> None:
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    window = config.sliding_window if kind == "mistral" else None
    if kinds or (window is not None and window < config.max_position_embeddings):
        raise ValueError(
            "`sliding_window` must not be in use, got "
            f"{config.sliding_window} (`max_position_embeddings` {config.max_position_embeddings})"
        )


def _rope(found: dict) -> dict:
    rope = dict(found)
    rope.pop("type", None)
    kind, partial = rope.get("rope_type"), rope.pop("partial_rotary_factor", None)
    if kind not in ROPE_TYPES:
        raise ValueError(f"`rope_type` must be one of {', '.join(ROPE_TYPES)}, got {kind!r}")
    if partial not in (None, 1, 1.0):
        raise ValueError(f"`partial_rotary_factor` must be 1, got {partial}")
    return rope


# ---- minimind


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
    derived = _derived(tensors, given, tied=raw.get("tie_word_embeddings", True))
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


# ---- weights alone


def _state_dict(tensors: dict, given: dict) -> Source:
    _require_given(given, (*SHAPE, "architecture"))
    kind = given["architecture"]
    if kind not in ARCHITECTURES:
        raise ValueError(f"`architecture` must be one of {', '.join(ARCHITECTURES)}, got {kind!r}")
    embedding, head = tensors.get("model.embed_tokens.weight"), tensors.get("lm_head.weight")
    if embedding is None:
        raise ValueError(f"a state dict must have model.embed_tokens.weight or token_emb.weight, got {min(tensors)}")
    shape = _derived(tensors, given, tied=head is None or head.equal(embedding))
    for name, value in ARCHITECTURES[kind].items():
        if shape[name] != value:
            raise ValueError(f"`architecture` {kind!r} has `{name}` {value}, got tensors that have it {shape[name]}")
    return Source("state dict", shape, tensors, {}, dict(given))


def _require_given(given: dict, names: tuple[str, ...] = SHAPE) -> None:
    absent = [name for name in names if given.get(name) is None]
    if absent:
        options = " ".join(f"--{name} …" for name in absent)
        raise ValueError(
            f"weights without config and `args` do not say {', '.join(absent)}, and nothing is guessed: give {options}"
        )
    rope = given["rope_parameters"]
    wanted = ["rope_theta"] if rope.keys() <= {"rope_theta"} else ["rope_theta", "rope_type"]
    if missing := [name for name in wanted if name not in rope]:
        raise ValueError(f"`rope_parameters` must say {missing[0]}, and nothing is guessed, got {rope}")


def _derived(tensors: dict, given: dict, tied: bool) -> dict:
    """The shape: what was given, and what the tensors' own shapes leave no choice about."""
    first = "model.layers.0."
    wanted = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "mlp.gate_proj.weight")
    names = [first + name for name in wanted]
    absent = [name for name in names if name not in tensors]
    if absent:
        raise ValueError(f"the weights must have {absent[0]}, got none")
    query, key, gate = (tensors[name] for name in names)
    heads, rows = given["num_attention_heads"], query.shape[0]
    if rows % heads:
        raise ValueError(f"`num_attention_heads` must divide the rows of {names[0]}, got {heads} and {rows}")
    head_dim = rows // heads
    vocab_size, hidden_size = tensors["model.embed_tokens.weight"].shape
    return {
        **{name: given[name] for name in SHAPE if name != "rope_parameters"},
        "rope_parameters": _rope({"rope_type": "default", **given["rope_parameters"]}),
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": gate.shape[0],
        "num_hidden_layers": len({name.split(".")[2] for name in tensors if name.startswith("model.layers.")}),
        "num_key_value_heads": max(key.shape[0] // head_dim, 1),
        "head_dim": head_dim,
        "tie_word_embeddings": bool(tied),
        "qk_norm": f"{first}self_attn.q_norm.weight" in tensors,
        "attention_bias": f"{first}self_attn.q_proj.bias" in tensors,
        "attention_output_bias": f"{first}self_attn.o_proj.bias" in tensors,
        "mlp_bias": f"{first}mlp.gate_proj.bias" in tensors,
    }


# ---- Nano-LLaDA


def _nano_llada(tensors: dict, beside: dict, given: dict, to: str) -> Source:
    """
    Nano-LLaDA (AR and diffusion have the same tensors): norms without weights, a normed embedding, RoPE before the
    QK norm. A norm without weight is one with ones; a rotation keeps a vector's length, so that the norm may as well
    come first; and the embedding's norm is the same for a token wherever it stands, so that it goes into its row.
    """
    args = beside.get("args")
    if args is not None and not isinstance(args, dict):
        raise ValueError(f"`args` of the checkpoint must be a dict, got {type(args).__name__}")
    args = args or {}
    if to == "causal" and "iid_mask_eps" in args:
        raise ValueError("`to` must be 'masked' for a diffusion checkpoint of Nano-LLaDA, got 'causal'")
    if args.get("use_tokenizer") is False and "mask_schedule" in args:
        raise ValueError("`use_tokenizer` must be true: a character vocabulary is not in the checkpoint, got False")
    shape = _nano_llada_shape(args, given)
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    converted = _nano_llada_tensors(tensors, shape["rms_norm_eps"], shape["num_attention_heads"])
    derived = _derived(converted, shape, tied=False)
    dropout = args.get("dropout", 0.0)
    dropouts = {"attention_dropout": 0.0 if to == "masked" else dropout, "hidden_dropout": dropout}
    notes = ["norms became weights of one, the embedding's norm went into the embedding"]
    if dropout:
        notes.append(f"dropout {dropout} also falls on what attention adds, Nano-LLaDA's on what the MLP adds alone")
    return Source("nano-llada", {**derived, **dropouts}, converted, {}, {**args, **given}, notes=notes)


def _nano_llada_shape(args: dict, given: dict) -> dict:
    names = [name for name in SHAPE if name != "rope_parameters"]
    found = {name: args[name] for name in names if name in args}
    if {"rope_theta", "max_position_embeddings", "hidden_size", "num_attention_heads"} <= args.keys():
        head_dim = args["hidden_size"] // args["num_attention_heads"]
        scaled = bool(args.get("inference_rope_scaling"))
        found["rope_parameters"] = minimind_rope(args["rope_theta"], scaled, args["max_position_embeddings"], head_dim)
    twice = [name for name in given if name in found and found[name] != given[name]]
    if twice:
        raise ValueError(f"`{twice[0]}` is in the checkpoint's `args`: {found[twice[0]]}, got {given[twice[0]]}")
    shape = {**found, **given}
    _require_given(shape)
    return shape


def _nano_llada_tensors(tensors: dict, eps: float, heads: int) -> dict:
    import torch

    embedding, head = tensors["token_emb.weight"], tensors.get("lm_head.weight")
    if head is None or head.equal(embedding):
        raise ValueError(
            "lm_head.weight must not be tied to token_emb.weight, whose norm is folded into it, got a tie"
        )
    width = embedding.shape[1]
    dtype = torch.promote_types(embedding.dtype, torch.float32)  # a product with the norm does not fit into less
    scale = torch.rsqrt(embedding.double().pow(2).mean(-1, keepdim=True) + eps)
    found = {"model.embed_tokens.weight": (embedding.double() * scale).to(dtype), "lm_head.weight": head.to(dtype)}
    found["model.norm.weight"] = torch.ones(width, dtype=dtype)
    parts = {"attn.c_q": "self_attn.q_proj", "attn.c_k": "self_attn.k_proj", "attn.c_v": "self_attn.v_proj"}
    parts |= {"attn.c_proj": "self_attn.o_proj"} | {
        f"mlp.{name}_proj": f"mlp.{name}_proj" for name in ("gate", "up", "down")
    }
    for name, tensor in tensors.items():
        if name in ("token_emb.weight", "lm_head.weight"):
            continue
        room, _, rest = name.partition(".")
        layer, _, part = rest.partition(".")
        if room != "blocks" or not layer.isdigit() or part.removesuffix(".weight") not in parts or part in parts:
            raise ValueError(f"the weights must be Nano-LLaDA's, got the unknown tensor {name}")
        found[f"model.layers.{layer}.{parts[part.removesuffix('.weight')]}.weight"] = tensor.to(dtype)
    for layer in {name.split(".")[2] for name in found if name.startswith("model.layers.")}:
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{layer}.{norm}.weight"] = torch.ones(width, dtype=dtype)
        for norm in ("q_norm", "k_norm"):
            found[f"model.layers.{layer}.self_attn.{norm}.weight"] = torch.ones(width // heads, dtype=dtype)
    return found
