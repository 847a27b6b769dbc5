"""minimind's and Nano-LLaDA's models as they are published, written out: random weights, and logits by hand.

jingyaogong/minimind, model/model_minimind.py (minimind2: commit 04616c4, minimind-3: 101d7df) and
JayCheng113/Nano-LLaDA, core/model_minimind.py and scripts/train/diffusion.py. float64 throughout.
"""

import math

import torch
from torch.nn.functional import gelu, relu, silu, softmax

ACTIVATIONS = {"silu": silu, "relu": relu, "gelu": gelu}


def rms(x, eps, weight=1.0):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def tables(length, head_dim, theta, scaled):
    """cos and sin, `(length, head_dim)`; scaled is YaRN by 16 from 2048 positions, β 32 and 1."""
    pairs = head_dim // 2
    frequencies = torch.tensor([theta ** (-2 * i / head_dim) for i in range(pairs)], dtype=torch.double)
    if scaled:

        def pair(turns):
            return head_dim * math.log(2048 / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = max(math.floor(pair(32)), 0), min(math.ceil(pair(1)), pairs - 1)
        ramp = ((torch.arange(pairs).double() - low) / max(high - low, 0.001)).clamp(0, 1)
        frequencies = frequencies * (1 - ramp + ramp / 16)
    angles = torch.arange(length).double()[:, None] * frequencies
    return torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()


def turn(x, cos, sin):
    """x: `(batch, heads, length, head_dim)`; halves are the pairs."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def attend(query, key, value, causal):
    key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for part in (key, value))
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if causal:
        length = query.shape[2]
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
    return (softmax(scores, -1) @ value).transpose(1, 2).flatten(2)


def heads_of(x, count):
    return x.view(*x.shape[:2], count, -1).transpose(1, 2)


def normal(generator, *shape, scale=0.2, mean=0.0):
    return mean + scale * torch.randn(*shape, generator=generator)


def minimind_weights(vocab=300, hidden=16, layers=2, heads=4, kv=2, inner=24, qk_norm=True, seed=0):
    """A bare state dict, as `full_sft_768.pth` is: with the head, which is the embedding."""
    g, head = torch.Generator().manual_seed(seed), hidden // heads
    found = {"model.embed_tokens.weight": normal(g, vocab, hidden), "model.norm.weight": normal(g, hidden, mean=1.0)}
    found["lm_head.weight"] = found["model.embed_tokens.weight"]
    shapes = {
        "q": (heads * head, hidden),
        "k": (kv * head, hidden),
        "v": (kv * head, hidden),
        "o": (hidden, heads * head),
    }
    mlp = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        found |= {f"{at}self_attn.{name}_proj.weight": normal(g, *shape) for name, shape in shapes.items()}
        found |= {f"{at}mlp.{name}_proj.weight": normal(g, *shape) for name, shape in mlp.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{at}{name}.weight"] = normal(g, hidden, mean=1.0)
        if qk_norm:
            found |= {f"{at}self_attn.{name}_norm.weight": normal(g, head, mean=1.0) for name in "qk"}
    return found


def minimind_logits(weights, ids, heads=4, kv=2, eps=1e-6, theta=1e6, scaled=False):
    w = {name: tensor.double() for name, tensor in weights.items()}
    x = w["model.embed_tokens.weight"][ids]
    cos, sin = tables(ids.shape[1], x.shape[-1] // heads, theta, scaled)
    for layer in range(sum(name.endswith("input_layernorm.weight") for name in w)):
        at = f"model.layers.{layer}."
        h = rms(x, eps, w[f"{at}input_layernorm.weight"])
        parts = {n: heads_of(h @ w[f"{at}self_attn.{n}_proj.weight"].T, heads if n == "q" else kv) for n in "qkv"}
        for n in "qk":
            if f"{at}self_attn.{n}_norm.weight" in w:
                parts[n] = rms(parts[n], eps, w[f"{at}self_attn.{n}_norm.weight"])
            parts[n] = turn(parts[n], cos, sin)
        x = x + attend(parts["q"], parts["k"], parts["v"], causal=True) @ w[f"{at}self_attn.o_proj.weight"].T
        h = rms(x, eps, w[f"{at}post_attention_layernorm.weight"])
        gate = silu(h @ w[f"{at}mlp.gate_proj.weight"].T) * (h @ w[f"{at}mlp.up_proj.weight"].T)
        x = x + gate @ w[f"{at}mlp.down_proj.weight"].T
    return rms(x, eps, w["model.norm.weight"]) @ w["lm_head.weight"].T


def nano_llada_weights(vocab=301, hidden=16, layers=2, inner=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    found = {"token_emb.weight": normal(g, vocab, hidden), "lm_head.weight": normal(g, vocab, hidden)}
    for layer in range(layers):
        found |= {
            f"blocks.{layer}.attn.{n}.weight": normal(g, hidden, hidden) for n in ("c_q", "c_k", "c_v", "c_proj")
        }
        found |= {f"blocks.{layer}.mlp.{n}_proj.weight": normal(g, inner, hidden) for n in ("gate", "up")}
        found[f"blocks.{layer}.mlp.down_proj.weight"] = normal(g, hidden, inner)
    return found


def nano_llada_logits(weights, ids, args, causal):
    w = {name: tensor.double() for name, tensor in weights.items()}
    heads, eps = args["num_attention_heads"], args["rms_norm_eps"]
    x = rms(w["token_emb.weight"][ids], eps)
    cos, sin = tables(ids.shape[1], x.shape[-1] // heads, args["rope_theta"], args["inference_rope_scaling"])
    for layer in range(args["num_hidden_layers"]):
        at, h = f"blocks.{layer}.", rms(x, eps)
        query, key, value = (heads_of(h @ w[f"{at}attn.c_{n}.weight"].T, heads) for n in "qkv")
        query, key = (rms(turn(part, cos, sin), eps) for part in (query, key))  # RoPE first
        x = x + attend(query, key, value, causal) @ w[f"{at}attn.c_proj.weight"].T
        h, act = rms(x, eps), ACTIVATIONS[args["hidden_act"]]
        gate = act(h @ w[f"{at}mlp.gate_proj.weight"].T) * (h @ w[f"{at}mlp.up_proj.weight"].T)
        x = x + gate @ w[f"{at}mlp.down_proj.weight"].T
    return rms(x, eps) @ w["lm_head.weight"].T
