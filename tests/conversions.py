"""What the conversion tests share: foreign models of random weights, and short calls."""

import json

import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nanollada.scripts.conversion.arguments import ConvertArguments
from nanollada.scripts.conversion.to_ours import convert

SIZES = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 16
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
MODELS = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=6, tie_word_embeddings=True, rms_norm_eps=1e-4)),
    "qwen3-yarn-bias": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=8, attention_bias=True, rope_parameters=YARN)),
    "llama-llama3": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=LLAMA3, head_dim=6)),
    "llama-linear-bias": (
        LlamaForCausalLM,
        LlamaConfig(
            **SIZES,
            attention_bias=True,
            mlp_bias=True,
            rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        ),
    ),
    "llama-dynamic": (
        LlamaForCausalLM,
        LlamaConfig(
            **{**SIZES, "max_position_embeddings": 12},
            tie_word_embeddings=True,
            hidden_act="gelu",
            rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0},
        ),
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=None)),
}
BARE = {
    "num_attention_heads": 4,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_theta": 1e6},
    "architecture": "minimind",
}
SEED_ARGS = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "inference_rope_scaling": False,
    "dropout": 0.0,
}
DIFFUSION_ARGS = {**SEED_ARGS, "iid_mask_eps": 1e-3, "mask_schedule": "iid_t", "use_tokenizer": True}


def randomise(model, seed=0):
    """Biases and norms, too, which begin at zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = 0.2 * torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_((1 + noise if "norm" in name else noise).to(parameter.dtype))
    return model.eval()


def save_foreign(folder, name, tokenizer, dtype=torch.float32, **changes):
    model_class, config = MODELS[name]
    config = type(config)(**{**config.to_dict(), **changes})
    model = randomise(model_class(config)).to(dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if name == "qwen2":  # whatever the files say, transformers reads such a folder's tokenizer as Qwen2's
        AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
        edit(folder / "tokenizer_config.json", is_local="REMOVED", local_files_only="REMOVED")
    return model


def run(source, to, output, **options):
    return convert(ConvertArguments(source=str(source), to=to, output=str(output), **options))


def edit(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value != "REMOVED"}))


def some_ids(vocab=300, length=20):
    return torch.randint(vocab, (2, length), generator=torch.Generator().manual_seed(1))


def logits_of(model, ids, **kwargs):
    with torch.no_grad():
        return model.eval()(ids, **kwargs).logits.double()


def difference(one, other):
    return (one - other).abs().max().item()
