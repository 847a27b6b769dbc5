"""The shape of a model, as far as tensors and a user's words tell it; nothing is guessed."""

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
# What a state dict alone cannot tell.
SHAPE = ("num_attention_heads", "hidden_act", "rms_norm_eps", "max_position_embeddings", "rope_parameters")
PRIVATE = ("_name_or_path", "_commit_hash", "_attn_implementation", "_attn_implementation_autoset")  # of transformers


def rope_of(given: dict) -> dict:
    """RoPE as transformers spells it, of a kind that is computed here."""
    rope = dict(given)
    rope.pop("type", None)
    kind, partial = rope.get("rope_type"), rope.pop("partial_rotary_factor", None)
    if kind not in ROPE_TYPES:
        raise ValueError(f"`rope_type` must be one of {', '.join(ROPE_TYPES)}, got {kind!r}")
    if partial not in (None, 1, 1.0):
        raise ValueError(f"`partial_rotary_factor` must be 1, got {partial}")
    return rope


def require_given(given: dict, names: tuple[str, ...] = SHAPE) -> None:
    """Everything that nobody says is asked for."""
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


def derived_shape(tensors: dict, given: dict, tied: bool) -> dict:
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
        "rope_parameters": rope_of({"rope_type": "default", **given["rope_parameters"]}),
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
