"""From arguments to a model and a tokenizer that fit each other, and the facts of a run that its files report."""

import gc
import json
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from nanollada.configuration_nanollada import NanoLLaDAConfig
from nanollada.modeling_nanollada.loading_nanollada import check_place, check_tokenizer, load_model, load_tokenizer
from nanollada.trainers.data.tokenizers import ensure_mask_token

# What only a fresh model may choose, by the config's own names.
SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rope_parameters",
    "qk_norm",
    "attention_bias",
    "attention_output_bias",
    "tie_word_embeddings",
)
DROPOUTS = ("attention_dropout", "hidden_dropout")


@dataclass
class ModelArguments:
    """
    The model: a checkpoint to go on from, or a tokenizer and a shape to start with.

    Raises:
        `ValueError`: if there is neither a checkpoint nor a tokenizer, and if a shape is given beside a checkpoint.
    """

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint to start from. For diffusion an AR checkpoint is the AR→diffusion initialisation."
        },
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer. Default: the checkpoint's. Gains <|mask|> if it has none."}
    )
    hidden_size: int | None = field(default=None, metadata={"help": "Width of a fresh model (512)."})
    intermediate_size: int | None = field(default=None, metadata={"help": "Width of its SwiGLU layer (1408)."})
    num_hidden_layers: int | None = field(default=None, metadata={"help": "Its layers (8)."})
    num_attention_heads: int | None = field(default=None, metadata={"help": "Its query heads (8)."})
    num_key_value_heads: int | None = field(default=None, metadata={"help": "Its key/value heads (as query heads)."})
    head_dim: int | None = field(default=None, metadata={"help": "Width of a head (hidden_size / heads)."})
    max_position_embeddings: int | None = field(default=None, metadata={"help": "Longest sequence (32768)."})
    rope_parameters: dict | str | None = field(
        default=None, metadata={"help": 'RoPE of a fresh model, as JSON, e.g. {"rope_type": "yarn", "factor": 16.0}.'}
    )
    qk_norm: bool | None = field(
        default=None, metadata={"help": "RMSNorm on queries and keys (true). Without: Llama's, with biases Qwen2's."}
    )
    attention_bias: bool | None = field(default=None, metadata={"help": "Biases in the attention (false)."})
    attention_output_bias: bool | None = field(
        default=None, metadata={"help": "A bias of its output projection (as attention_bias; Qwen2: false)."}
    )
    tie_word_embeddings: bool | None = field(default=None, metadata={"help": "Whether the head is the embedding."})
    attention_dropout: float | None = field(default=None, metadata={"help": "Also for a checkpoint."})
    hidden_dropout: float | None = field(default=None, metadata={"help": "Also for a checkpoint."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa (default), eager, flex_attention, or a flash attention (no packing)."}
    )

    def __post_init__(self):
        if isinstance(self.rope_parameters, str):
            self.rope_parameters = json.loads(self.rope_parameters)
        if self.model_name_or_path is None and self.tokenizer_name_or_path is None:
            raise ValueError("`tokenizer_name_or_path` is needed without `model_name_or_path`, got None for both")
        given = [name for name in SHAPE if getattr(self, name) is not None]
        if self.model_name_or_path is not None and given:
            raise ValueError(f"`{given[0]}` is the checkpoint's own with `model_name_or_path`, got {given}")


def load_model_and_tokenizer(model_class, args: ModelArguments, seed: int):
    """
    The model to train and its tokenizer.

    A fresh model takes its vocabulary and special tokens from the tokenizer. A tokenizer without a mask token gains it
    once; a checkpoint with the smaller vocabulary grows by that one row, and any other difference is an error.

    Raises:
        `ValueError`: as `load_model` and `check_tokenizer`.
    """
    if args.model_name_or_path is not None:
        check_place(args.model_name_or_path, "model_name_or_path")
    tokenizer = load_tokenizer(args.tokenizer_name_or_path or args.model_name_or_path)
    added = ensure_mask_token(tokenizer)
    chosen = {name: getattr(args, name) for name in DROPOUTS if getattr(args, name) is not None}
    if args.attn_implementation is not None:
        chosen["attn_implementation"] = args.attn_implementation
    if args.model_name_or_path is not None:
        model = load_model(model_class, args.model_name_or_path, **chosen)
        if added and model.config.vocab_size == len(tokenizer) - added:
            model.resize_token_embeddings(len(tokenizer))
            _move_mask(model, tokenizer.mask_token_id)
    else:
        chosen |= {name: getattr(args, name) for name in SHAPE if getattr(args, name) is not None}
        torch.manual_seed(seed)
        model = model_class(config_for(tokenizer, **chosen))
    check_tokenizer(model, tokenizer)
    return model, tokenizer


def _move_mask(model, mask_token_id: int) -> None:
    """The mask has another id: the AR model's `generate` suppresses that one, and no longer the one before."""
    settings, old = model.generation_config, model.config.mask_token_id
    if settings.suppress_tokens is not None:
        settings.suppress_tokens = [mask_token_id if token == old else token for token in settings.suppress_tokens]
    model.config.mask_token_id = mask_token_id


def config_for(tokenizer, **shape) -> NanoLLaDAConfig:
    """A config whose vocabulary and special tokens are the tokenizer's."""
    special = ("mask_token_id", "pad_token_id", "bos_token_id", "eos_token_id")
    return NanoLLaDAConfig(vocab_size=len(tokenizer), **{name: getattr(tokenizer, name) for name in special}, **shape)


@contextmanager
def own_process_group():
    """
    Ends the process group that its body started, together with the group's threads; one that stood before is left.

    `destroy_process_group` alone frees nothing that a dead `Trainer` still refers to (its objects form cycles). gloo's
    threads would then outlive the interpreter, and one that asks it to free a tensor aborts the process: a run whose
    files are all written ends with "terminate called without an active exception" (pytorch/pytorch#65237). Of a run
    with FSDP2, torch's own caches of sharded tensors keep the group.
    """
    available = torch.distributed.is_available()
    given = available and torch.distributed.is_initialized()
    yield
    if available and torch.distributed.is_initialized() and not given:
        gc.collect()
        torch.distributed.destroy_process_group()
