"""Nano-LLaDA's `.pt` files, AR and diffusion."""

from nanollada.scripts.conversion.families.family import Family, Source
from nanollada.scripts.conversion.families.minimind import minimind_rope
from nanollada.scripts.conversion.shape import SHAPE, derived_shape, require_given


def owns(tensors: dict) -> bool:
    """Whether the tensors bear Nano-LLaDA's names."""
    return "token_emb.weight" in tensors or "model.token_emb.weight" in tensors


def understand(tensors: dict, raw: dict | None, beside: dict, given: dict, to: str) -> Source:
    """
    Nano-LLaDA (AR and diffusion have the same tensors): norms without weights, a normed embedding, RoPE before the
    QK norm. A norm without weight is one with ones; a rotation keeps a vector's length, so that the norm may as well
    come first; and the embedding's norm is the same for a token wherever it stands, so that it goes into its row.
    """
    if "architecture" in given:
        raise ValueError(f"`architecture` is said by Nano-LLaDA's tensors, got {given['architecture']!r}")
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
    derived = derived_shape(converted, shape, tied=False)
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
    require_given(shape)
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


MEMBERS = (
    Family(
        name="nano-llada",
        help="a .pt file of Nano-LLaDA, AR or diffusion",
        understand=understand,
        owns=owns,
        adds_mask=True,
    ),
)
