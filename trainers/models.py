"""From arguments to a model and a tokenizer that fit each other, and the facts of a run that its files report."""

import gc
import json
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

import torch
from trl import ModelConfig, get_peft_config

from nanollada.configuration_nanollada import NanoLLaDAConfig
from nanollada.modeling_nanollada.loading_nanollada import (
    EDIT_TOKENS,
    check_place,
    check_tokenizer,
    load_model,
    load_tokenizer,
)
from nanollada.trainers.arguments import default_of
from nanollada.trainers.data.tokenizers import edit_tokens_of, ensure_edit_tokens, ensure_mask_token
from nanollada.trainers.weights.adapters import check_whole

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
_QUANTIZED = "a quantised model is none of ours"
# Fields of trl's `ModelConfig` that do nothing here: the reason. The only value is the default's.
REFUSED = {
    "dtype": "weights are trained in float32 (`bf16` computes in less)",
    "lora_task_type": "both models write",
    "load_in_8bit": _QUANTIZED,
    "load_in_4bit": _QUANTIZED,
    "bnb_4bit_quant_type": _QUANTIZED,
    "use_bnb_nested_quant": _QUANTIZED,
    "bnb_4bit_quant_storage": _QUANTIZED,
}
LORA = ("lora_", "use_rslora", "use_dora")  # how their names begin


@dataclass
class ModelArguments(ModelConfig):
    """
    The model: a checkpoint to go on from, or a tokenizer and a shape to start with. The fields of `trl.ModelConfig`
    make an adapter (`use_peft`).

    Raises:
        `ValueError`: if there is neither a checkpoint nor a tokenizer; if a shape is given beside a checkpoint; for an
            adapter without a checkpoint, and settings of one without `use_peft`; and for a field that does nothing
            here, naming it.
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
        self._check_inherited()
        super().__post_init__()
        if isinstance(self.rope_parameters, str):
            self.rope_parameters = json.loads(self.rope_parameters)
        if self.model_name_or_path is None and self.tokenizer_name_or_path is None:
            raise ValueError("`tokenizer_name_or_path` is needed without `model_name_or_path`, got None for both")
        given = [name for name in SHAPE if getattr(self, name) is not None]
        if self.model_name_or_path is not None and given:
            raise ValueError(f"`{given[0]}` is the checkpoint's own with `model_name_or_path`, got {given}")
        for name in ("use_peft", "model_revision"):
            if self.model_name_or_path is None and getattr(self, name) != getattr(ModelConfig, name):
                raise ValueError(f"`{name}` needs `model_name_or_path`, got {getattr(self, name)} without")

    def _check_inherited(self) -> None:
        """The fields of `trl.ModelConfig`, as they were given."""
        inherited = {item.name for item in fields(ModelConfig)}
        for item in fields(self):
            name, value = item.name, getattr(self, item.name)
            if name not in inherited or value == default_of(item):
                continue
            if name in REFUSED:
                raise ValueError(f"`{name}` must be {default_of(item)!r}: {REFUSED[name]}, got {value!r}")
            if name.startswith(LORA) and not self.use_peft:
                raise ValueError(f"`{name}` is for `use_peft`, got {value!r} without")


def load_model_and_tokenizer(model_class, args: ModelArguments, seed: int, tokenizer=None):
    """
    The model to train and its tokenizer.

    A fresh model takes its vocabulary and special tokens from the tokenizer. A tokenizer without a mask token gains it
    once; a checkpoint with the smaller vocabulary grows by that one row, and any other difference is an error.

    Args:
        tokenizer (`PreTrainedTokenizerBase`, *optional*): In place of the one that `args` name.

    Raises:
        `ValueError`: for an adapter in place of a model, for `use_peft` with a checkpoint that has to grow, and as
            `load_model` and `check_tokenizer`.
    """
    if args.model_name_or_path is not None:
        check_place(args.model_name_or_path, "model_name_or_path")
        check_whole(args.model_name_or_path)
    revision = {} if args.model_revision == "main" else {"revision": args.model_revision}
    if tokenizer is None:
        own = args.tokenizer_name_or_path is None
        name = args.model_name_or_path if own else args.tokenizer_name_or_path
        tokenizer = load_tokenizer(name, **(revision if own else {}))
    added = ensure_mask_token(tokenizer)
    chosen = {name: getattr(args, name) for name in DROPOUTS if getattr(args, name) is not None}
    if args.attn_implementation is not None:
        chosen["attn_implementation"] = args.attn_implementation
    if args.model_name_or_path is not None:
        model = load_model(model_class, args.model_name_or_path, **chosen, **revision)
        if added and args.use_peft:
            raise ValueError(
                "`use_peft` needs a checkpoint whose tokenizer has a mask token: an adapter does not carry a new row "
                f"of the embedding, got {args.model_name_or_path}"
            )
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


def add_edit_tokens(model, tokenizer) -> int:
    """
    Teaches a model and its tokenizer that there are `<|delete|>` and `<|insert|>`; one that knows them stays as it is.

    A new row of the embedding and of the head is the mean of the rows of all tokens that the model may predict. Its
    logit is then the mean of theirs, so it is predicted with at most their average probability, 1/V, wherever it
    stands (Jensen; Hewitt, 2021). The other rows, and so the other logits, stay as they are.

    Args:
        model (`PreTrainedModel`): Changed in place: tables (rows behind the tokenizer's are used first), config, and
            what an AR model's generation config suppresses.
        tokenizer (`PreTrainedTokenizerBase`): The model's; changed in place.

    Returns:
        `int`: How many tokens the tokenizer gained.

    Raises:
        `ValueError`: for a model with an adapter that does not know them: an adapter does not carry new rows.
    """
    config, tokens = model.config, len(tokenizer)
    if config.edit_token_ids:
        return 0
    if hasattr(model, "peft_config"):
        raise ValueError(
            "`model` must know <|delete|> and <|insert|> before it gets an adapter, which does not carry new rows of "
            "the embedding: got a PeftModel without them"
        )
    check_tokenizer(model, tokenizer)
    known = torch.arange(tokens) != config.mask_token_id  # [V]
    config_ids = ensure_edit_tokens(tokenizer)
    grown = len(tokenizer) - tokens
    if len(tokenizer) > config.vocab_size:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if config.tokenizer_length is not None:
        config.tokenizer_length = len(tokenizer)
    with torch.no_grad():
        for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            rows = table[:tokens][known.to(table.device)]
            table[tokens : len(tokenizer)] = rows.mean(0, dtype=torch.double).to(table.dtype)
    config.delete_token_id, config.insert_token_id = config_ids
    if model.generation_config.suppress_tokens is not None:
        model.generation_config.suppress_tokens += config.edit_token_ids
    return grown


def config_for(tokenizer, **shape) -> NanoLLaDAConfig:
    """A config whose vocabulary and special tokens are the tokenizer's."""
    special = ("mask_token_id", "pad_token_id", "bos_token_id", "eos_token_id")
    ids = {name: getattr(tokenizer, name) for name in special}
    known = edit_tokens_of(tokenizer)
    if len(known) == len(EDIT_TOKENS):
        ids |= dict(zip(("delete_token_id", "insert_token_id"), map(known.get, EDIT_TOKENS), strict=True))
    return NanoLLaDAConfig(vocab_size=len(tokenizer), **ids, **shape)


def check_length(max_length: int, config) -> None:
    """
    Raises:
        `ValueError`: for rows that are longer than the model's positions.
    """
    if max_length > config.max_position_embeddings:
        raise ValueError(
            "`max_length` must be at most the model's `max_position_embeddings`, got "
            f"{max_length} and {config.max_position_embeddings}"
        )


def peft_config_of(args: ModelArguments):
    """PEFT's config of the adapter that is asked for, or `None`; trl makes it."""
    config = get_peft_config(args)
    if config is not None and args.model_revision != "main":
        config.revision = args.model_revision
    return config


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
