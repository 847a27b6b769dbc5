"""Configuration of nanollada's language models: one `model_type` for the AR and the diffusion variant."""

import copy
import difflib
from dataclasses import fields

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# What a config.json of transformers may hold beside the fields: written by one version, unknown to another or moved.
_TRANSFORMERS_KEYS = (
    *"model_type architectures auto_map transformers_version name_or_path dtype torch_dtype".split(),
    *"attn_implementation experts_implementation output_attentions output_hidden_states return_dict".split(),
    *"use_return_dict torchscript num_labels id2label label2id problem_type tie_last_hidden_states".split(),
    *"is_encoder_decoder is_decoder add_cross_attention chunk_size_feed_forward tokenizer_class".split(),
    *"quantization_config rope_scaling rope_theta partial_rotary_factor".split(),
)
# Of these, what no nanollada model does anything with; the value that asks for nothing is the only one.
_FIXED = {
    "return_dict": True,  # of `forward`, not of the config: transformers' own models break, too
    "chunk_size_feed_forward": 0,
    **dict.fromkeys(("is_encoder_decoder", "is_decoder", "add_cross_attention", "torchscript"), False),
}
# The keys of `rope_parameters` for some `rope_type`. transformers warns of those that are another type's.
_ROPE_KEYS = (
    "rope_type type rope_theta factor original_max_position_embeddings attention_factor beta_fast beta_slow "
    "short_factor long_factor low_freq_factor high_freq_factor mscale mscale_all_dim truncate partial_rotary_factor"
).split()

# Tokens that are nothing else as well.
_ALONE = ("mask_token_id", "delete_token_id", "insert_token_id")


@strict
class NanoLLaDAConfig(PreTrainedConfig):
    r"""
    Shape of a nanollada model. Nano-LLaDA's is the default: 32M parameters, 8 layers, width 512, 6,400 tokens.

    Whether attention is causal is decided by the model class ([`NanoLLaDAForCausalLM`], [`NanoLLaDAForMaskedLM`]) and
    by `block_length`; a key `is_causal` is neither kept nor read.

    Args:
        vocab_size (`int`, defaults to 6400): Number of tokens, `mask_token_id` included.
        tokenizer_length (`int`, *optional*): Tokens of the tokenizer, where the tables have rows behind them that no
            token uses (Qwen's checkpoints). Defaults to `vocab_size`.
        hidden_size (`int`, defaults to 512): Width of the residual stream.
        intermediate_size (`int`, defaults to 1408): Width of the SwiGLU layer.
        num_hidden_layers (`int`, defaults to 8): Number of blocks.
        num_attention_heads (`int`, defaults to 8): Number of query heads.
        num_key_value_heads (`int`, *optional*): Number of key/value heads; fewer than query heads is grouped-query
            attention. Defaults to `num_attention_heads`.
        head_dim (`int`, *optional*): Width of a head. Defaults to `hidden_size // num_attention_heads`.
        hidden_act (`str`, defaults to `"silu"`): Activation of the gate.
        max_position_embeddings (`int`, defaults to 32768): Longest sequence the model is meant for.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the initial weights.
        rms_norm_eps (`float`, defaults to 1e-5): Epsilon of every RMSNorm.
        use_cache (`bool`, defaults to `True`): Whether the AR model returns its key/value cache.
        tie_word_embeddings (`bool`, defaults to `False`): Whether the head shares the embedding's weight.
        rope_parameters (`dict`, *optional*): RoPE, transformers' dictionary: `rope_type` ("default", "linear",
            "dynamic", "yarn", "llama3", "longrope"), `rope_theta` (1e6) and the type's own keys, e.g. YaRN's
            `{"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 2048}`. All of a head is turned
            (no `partial_rotary_factor`).
        qk_norm (`bool`, defaults to `True`): Whether queries and keys go through an RMSNorm (Qwen3), or not (Llama).
        attention_bias (`bool`, defaults to `False`): Whether the attention projections have a bias.
        attention_output_bias (`bool`, *optional*): The same for the output projection alone. Defaults to
            `attention_bias`; Qwen2 has biases on queries, keys and values only.
        mlp_bias (`bool`, defaults to `False`): Whether the MLP's projections have a bias.
        attention_dropout (`float`, defaults to 0.0): Dropout on the attention probabilities.
        hidden_dropout (`float`, defaults to 0.0): Dropout on what each attention and MLP adds to the residual stream.
        block_length (`int`, *optional*): Block length of a block-diffusion model, the default of `forward` and
            `generate`: full attention inside a block, and to all blocks before it. `None` is one block, the full row.
        label_shift (`bool`, defaults to `False`): Whether the diffusion model predicts a token from the hidden state
            of the position before it, as the AR model it began as did (DiffuLLaMA, 2410.17891; Dream, 2508.15487).
            Labels and logits keep their own positions either way. Whole rows only.
        mask_token_id (`int`, defaults to 3): The token that stands for a hidden one. Never predicted.
        delete_token_id, insert_token_id (`int`, *optional*): What a model that edits structurally (LLaDA 2.2) predicts
            where a token is too many, and where one is missing. Both or neither; in no text.
        pad_token_id, bos_token_id, eos_token_id (`int`, defaults to 0, 1, 2): As everywhere in transformers.

    RMSNorm and RoPE are computed in float32 whatever the `dtype`, as in Qwen3: the logits of a float64 model have
    float32's error (about 3e-6), too.

    Raises:
        `ValueError`: for names that neither this class nor transformers knows, in a call as in a file; for sizes that
            are not positive or don't divide, probabilities outside [0, 1), `label_shift` with a `block_length`, one of
            the two edit tokens without the other, and token ids outside the vocabulary or used twice.
    """

    model_type = "nanollada"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    default_theta = 1e6
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 6400
    tokenizer_length: int | None = None
    hidden_size: int = 512
    intermediate_size: int = 1408
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    qk_norm: bool = True
    attention_bias: bool = False
    attention_output_bias: bool | None = None
    mlp_bias: bool = False
    attention_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    block_length: int | None = None
    label_shift: bool = False
    mask_token_id: int = 3
    delete_token_id: int | None = None
    insert_token_id: int | None = None
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs):
        kwargs.pop("is_causal", None)  # derived from the class, so a stale key must not reach the attention
        self._check_names(kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.attention_output_bias is None:
            self.attention_output_bias = self.attention_bias
        if self.head_dim is None and self.num_attention_heads > 0:
            _require(
                self.hidden_size % self.num_attention_heads == 0,
                "`num_attention_heads` must divide `hidden_size` when `head_dim` is not given, "
                f"got {self.num_attention_heads} and {self.hidden_size}",
            )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.rope_parameters is not None:
            self.rope_parameters = dict(self.rope_parameters)  # completed in place below; the caller's stays as it is
        super().__post_init__(**kwargs)
        for name, value in _FIXED.items():
            found = getattr(self, name, value)
            _require(found == value, f"`{name}` must be {value} in a {type(self).__name__}, got {found!r}")
        self._check_shape()
        self._check_special_tokens()

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers; also of the keyword arguments, none is dropped in silence."""
        whole = kwargs.pop("return_unused_kwargs", False)
        config, unused = super().from_dict(config_dict, return_unused_kwargs=True, **kwargs)
        if whole:
            return config, unused
        cls._check_names({name: value for name, value in unused.items() if value is not None})  # loaders' own, unset
        return config

    @classmethod
    def _check_names(cls, kwargs):
        """Names starting with an underscore, and what `PreTrainedConfig` itself knows, are transformers' own."""
        ours = [field.name for field in fields(cls)]
        for name, value in kwargs.items():
            if not (name.startswith("_") or name in ours or name in _TRANSFORMERS_KEYS):
                _require(False, f"`{name}` is no field of {cls.__name__}{_near_miss(name, ours)}, got {value!r}")

    def _check_shape(self):
        positive = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for name in (*positive, "num_key_value_heads", "head_dim", "max_position_embeddings", "block_length"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"`{name}` must be > 0, got {value}")
        for name in ("rms_norm_eps", "initializer_range"):
            _require(getattr(self, name) > 0, f"`{name}` must be > 0, got {getattr(self, name)}")
        for name in ("attention_dropout", "hidden_dropout"):
            _require(0 <= getattr(self, name) < 1, f"`{name}` must lie in [0, 1), got {getattr(self, name)}")
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "`num_key_value_heads` must divide `num_attention_heads`, "
            f"got {self.num_key_value_heads} and {self.num_attention_heads}",
        )
        _require(self.head_dim % 2 == 0, f"`head_dim` must be even (RoPE turns pairs), got {self.head_dim}")
        _require(
            self.tokenizer_length is None or 0 < self.tokenizer_length <= self.vocab_size,
            f"`tokenizer_length` must lie in (0, `vocab_size`], got {self.tokenizer_length} and {self.vocab_size}",
        )
        _require(
            not self.label_shift or self.block_length is None,
            f"`label_shift` is for whole rows: `block_length` must be None, got {self.block_length}",
        )
        rope_types = ("default", *ROPE_INIT_FUNCTIONS)
        rope_type = self.rope_parameters["rope_type"]
        _require(rope_type in rope_types, f"`rope_type` must be one of {', '.join(rope_types)}, got {rope_type!r}")
        for name, value in self.rope_parameters.items():
            message = f"`rope_parameters` must not hold {name!r}{_near_miss(name, _ROPE_KEYS)}, got {value!r}"
            _require(name in _ROPE_KEYS, message)
        share = self.rope_parameters.get("partial_rotary_factor")
        _require(share in (None, 1), f"`partial_rotary_factor` must be unset or 1, got {share}")

    def check_vocab_size(self, vocab_size: int) -> None:
        """Raises `ValueError` unless the tokens would fit into a vocabulary of `vocab_size`."""
        resized = copy.deepcopy(self)
        resized.vocab_size = vocab_size
        resized._check_shape()
        resized._check_special_tokens()

    @property
    def edit_token_ids(self) -> list[int]:
        """`<|delete|>` and `<|insert|>`, or nothing: what only a decoder that executes it may predict."""
        return [] if self.delete_token_id is None else [self.delete_token_id, self.insert_token_id]

    def _check_special_tokens(self):
        edits = (self.delete_token_id, self.insert_token_id)
        message = f"`delete_token_id` and `insert_token_id` must be given together, got {edits[0]} and {edits[1]}"
        _require((edits[0] is None) == (edits[1] is None), message)
        owners = {getattr(self, name): name for name in reversed(_ALONE)}  # of pad, bos and eos one may do for two
        for name in (*_ALONE, "pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            ids = value if isinstance(value, list) else [] if value is None else [value]
            for token_id in ids:
                _require(
                    0 <= token_id < self.vocab_size,
                    f"`{name}` must lie in [0, `vocab_size`), got {value} and {self.vocab_size}",
                )
                owner = owners.get(token_id, name)
                _require(owner == name, f"`{owner}` must differ from `{name}`, got {token_id} for both")


def _near_miss(name: str, known) -> str:
    found = difflib.get_close_matches(name, sorted(known), n=1)
    return f" (did you mean `{found[0]}`?)" if found else ""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


NanoLLaDAConfig.register_for_auto_class()
