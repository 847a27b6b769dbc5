"""The nanollada language model: one backbone, an autoregressive head and a masked-diffusion head.

Both heads have the same parameters under the same names (Qwen3's), so that an AR checkpoint initialises a diffusion
model by `NanoLLaDAForMaskedLM.from_pretrained(ar_checkpoint)`, and transformers' Qwen3 with the same state dict gives
the same logits. The class decides between causal and bidirectional attention, never the checkpoint.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, MaskedLMOutput
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple, logging
from transformers.utils.output_capturing import capture_outputs

from .attention_nanollada import create_attention_mask
from .configuration_nanollada import NanoLLaDAConfig
from .generation_nanollada import NanoLLaDAGenerationConfig, NanoLLaDAGenerationMixin

logger = logging.get_logger(__name__)


class NanoLLaDARMSNorm(nn.Module):
    """Root-mean-square norm with a learnt scale, computed in float32."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = hidden_states.float()
        normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * normed.to(hidden_states.dtype)


class NanoLLaDARotaryEmbedding(nn.Module):
    """Rotary position tables from `config.rope_parameters`."""

    def __init__(self, config: NanoLLaDAConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        initialise = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = initialise(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: NanoLLaDAConfig, **kwargs) -> tuple[torch.Tensor, float]:
        """Inverse frequencies of plain RoPE; `PreTrainedModel._init_weights` calls it after loading."""
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return config.rope_parameters["rope_theta"] ** -exponent, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.LongTensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.to(x.device).float()  # [B, L, head_dim / 2]
        angles = torch.cat((angles, angles), dim=-1)  # [B, L, head_dim]
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out; the only implementation that returns its probabilities."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)  # [B, H, K, D]
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling  # [B, H, Q, K]
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    probabilities = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


class NanoLLaDAAttention(nn.Module):
    """Grouped-query attention with RMSNorm on queries and keys, before RoPE."""

    def __init__(self, config: NanoLLaDAConfig, layer_idx: int, is_causal: bool):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = is_causal
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        query_size = config.num_attention_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_bias)
        self.q_norm = NanoLLaDARMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = NanoLLaDARMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        heads = (*input_shape, -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(heads)).transpose(1, 2)  # [B, H, L, D]
        key = self.k_norm(self.k_proj(hidden_states).view(heads)).transpose(1, 2)  # [B, KV, L, D]
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)

        cos, sin = (table.unsqueeze(1) for table in position_embeddings)  # [B, 1, L, D]
        query = query * cos + rotate_half(query) * sin
        key = key * cos + rotate_half(key) * sin
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, probabilities = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(*input_shape, -1).contiguous()), probabilities


class NanoLLaDAMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: NanoLLaDAConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class NanoLLaDADecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and MLP on the residual stream."""

    def __init__(self, config: NanoLLaDAConfig, layer_idx: int, is_causal: bool):
        super().__init__()
        self.self_attn = NanoLLaDAAttention(config, layer_idx, is_causal)
        self.mlp = NanoLLaDAMLP(config)
        self.input_layernorm = NanoLLaDARMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = NanoLLaDARMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_dropout = config.hidden_dropout

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + nn.functional.dropout(attended, self.hidden_dropout, self.training)
        transformed = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + nn.functional.dropout(transformed, self.hidden_dropout, self.training)


class NanoLLaDAPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by all nanollada models."""

    config: NanoLLaDAConfig
    config_class = NanoLLaDAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NanoLLaDADecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": NanoLLaDADecoderLayer, "attentions": NanoLLaDAAttention}
    _auto_classes = ("AutoModel",)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.__name__.startswith("FSDP"):  # torch's fully_shard makes a class of its own; saving must see ours
            base = cls.__mro__[2]
            cls.__name__, cls.__qualname__, cls.__module__ = base.__name__, base.__qualname__, base.__module__

    def save_pretrained(self, *args, **kwargs):
        """As in transformers; the saved config names every Auto class that loads the model as remote code."""
        model = f"modeling_nanollada.{type(self).__name__}"
        self.config.auto_map = {
            "AutoConfig": "configuration_nanollada.NanoLLaDAConfig",
            **dict.fromkeys(self._auto_classes, model),
        }
        return super().save_pretrained(*args, **kwargs)


class NanoLLaDAModel(NanoLLaDAPreTrainedModel):
    """
    The backbone: token ids to hidden states.

    Args:
        config ([`NanoLLaDAConfig`]): The shape.
        is_causal (`bool`, defaults to `True`): Token-causal attention, or bidirectional (inside blocks of
            `config.block_length`). Set by the class of the head.
    """

    def __init__(self, config: NanoLLaDAConfig, is_causal: bool = True):
        super().__init__(config)
        self.is_causal = is_causal
        # No padding_idx: it would freeze a row, and the pad token must stay learnable where a head is tied to it.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [NanoLLaDADecoderLayer(config, index, is_causal) for index in range(config.num_hidden_layers)]
        )
        self.norm = NanoLLaDARMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = NanoLLaDARotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        document_ids: torch.LongTensor | None = None,
        block_length: int | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): Token ids, or `inputs_embeds`.
            attention_mask (`torch.Tensor` of shape `(batch, key_length)`, *optional*): 1 for tokens, 0 for padding.
            position_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): Positions, restarting in each
                document. By default counted from the first token that is no padding.
            past_key_values (`Cache`, *optional*): Keys and values of earlier tokens.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, length, hidden_size)`, *optional*): Embeddings.
            use_cache (`bool`, *optional*): Whether to return the cache. Defaults to `config.use_cache` when causal
                and not training, else `False`.
            document_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): Documents of packed rows.
            block_length (`int`, *optional*): Overrides `config.block_length` (bidirectional models only).

        Raises:
            `ValueError`: unless exactly one of `input_ids` and `inputs_embeds` is given; for `is_causal`, which the
                class decides; and as `create_attention_mask`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of `input_ids` and `inputs_embeds` must be given")
        if kwargs.pop("is_causal", self.is_causal) != self.is_causal:
            raise ValueError(f"`is_causal` is decided by the model class, got {not self.is_causal} for a call")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)  # [B, L, hidden]
        if use_cache is None:
            use_cache = self.config.use_cache and self.is_causal and not self.training
        if use_cache and self.gradient_checkpointing and self.training:
            logger.warning_once("`use_cache=True` does not go with gradient checkpointing: no cache is kept.")
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = self._default_positions(inputs_embeds, attention_mask, past_key_values)

        mask = create_attention_mask(
            self.config,
            inputs_embeds,
            is_causal=self.is_causal,
            block_length=block_length if block_length is not None else self.config.block_length,
            attention_mask=attention_mask,
            document_ids=document_ids,
            position_ids=position_ids,
            past_key_values=past_key_values,
        )
        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                position_ids=position_ids,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values if use_cache else None
        )

    @staticmethod
    def _default_positions(inputs_embeds, attention_mask, past_key_values):
        """`[B, L]` or `[1, L]`: left padding does not count, so a padded batch equals its rows alone."""
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        length = inputs_embeds.shape[1]
        if attention_mask is not None and attention_mask.dim() == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past_length : past_length + length]
        return torch.arange(past_length, past_length + length, device=inputs_embeds.device)[None]


def select_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """
    The hidden states that go through the head.

    Args:
        hidden_states (`torch.FloatTensor` of shape `(batch, length, hidden_size)`): All of them.
        logits_to_keep (`int` or `torch.Tensor`): The last n positions (0: all), the positions of a 1-D index, or a
            boolean mask of shape `(batch, length)`, whose True positions come out flattened.
    """
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]  # [N, hidden]
    return hidden_states[:, logits_to_keep]


class NanoLLaDAForCausalLM(NanoLLaDAPreTrainedModel, GenerationMixin):
    """The autoregressive model: causal attention, next-token loss, transformers' own `generate` with a cache."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _auto_classes = ("AutoModel", "AutoModelForCausalLM")

    def __init__(self, config: NanoLLaDAConfig):
        super().__init__(config)
        self.model = NanoLLaDAModel(config, is_causal=True)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self.generation_config.suppress_tokens = [config.mask_token_id]

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """
        As [`NanoLLaDAModel.forward`], with logits.

        Args:
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): Targets, not shifted: position i is
                predicted from positions before i. −100 is no target. With `num_items_in_batch` the summed loss is
                divided by it, otherwise by the number of targets.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0): See `select_positions`.

        Raises:
            `ValueError`: for `labels` with `logits_to_keep`.
        """
        _refuse_labels_for_some_logits(labels, logits_to_keep)
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(select_positions(outputs.last_hidden_state, logits_to_keep))  # [B, L, V]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, num_items_in_batch=num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class NanoLLaDAForMaskedLM(NanoLLaDAPreTrainedModel, NanoLLaDAGenerationMixin):
    """The masked-diffusion model: predicts every hidden token from all visible ones; `generate` denoises."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _auto_classes = ("AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM")
    generation_config_class = NanoLLaDAGenerationConfig

    def __init__(self, config: NanoLLaDAConfig):
        super().__init__(config)
        self.model = NanoLLaDAModel(config, is_causal=False)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def __setattr__(self, name, value):
        # TRL replaces `forward` by one that scores the *next* token. That would train another objective in silence.
        code = getattr(getattr(value, "__func__", value), "__code__", None) if name == "forward" else None
        if code is not None and "fused_lm_head" in code.co_varnames:
            raise ValueError(
                "`model` is a NanoLLaDAForMaskedLM, whose labels are not shifted, but the trainer scores next tokens: "
                "train it with nanollada's DiffusionTrainer, got a TRL trainer"
            )
        super().__setattr__(name, value)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        document_ids: torch.LongTensor | None = None,
        block_length: int | None = None,
        **kwargs,
    ) -> MaskedLMOutput:
        """
        As [`NanoLLaDAModel.forward`], with logits. The mask token's logit is −inf: it is never predicted (SUBS, MDLM).

        Args:
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): The token at the same position (no
                shift). −100 is no target. Plain cross-entropy, without the weights of a diffusion objective; with
                `num_items_in_batch` the summed loss is divided by it, otherwise by the number of targets.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0): See `select_positions`.
            block_length (`int`, *optional*): Overrides `config.block_length` for this call.

        Raises:
            `ValueError`: for `labels` with `logits_to_keep`, and for `labels` that hold the mask token.
        """
        _refuse_labels_for_some_logits(labels, logits_to_keep)
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            document_ids=document_ids,
            block_length=block_length,
            **kwargs,
        )
        logits = self.lm_head(select_positions(outputs.last_hidden_state, logits_to_keep))  # [B, L, V]
        logits[..., self.config.mask_token_id] = -torch.inf
        loss = None
        if labels is not None:
            if (labels == self.config.mask_token_id).any():
                raise ValueError(f"`labels` must not hold the mask token, got {self.config.mask_token_id}")
            loss = self.loss_function(logits, labels, self.vocab_size, num_items_in_batch=num_items_in_batch)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def _refuse_labels_for_some_logits(labels, logits_to_keep):
    if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
        raise ValueError(f"`labels` need all logits: `logits_to_keep` must be 0, got {logits_to_keep}")


NanoLLaDAModel.register_for_auto_class("AutoModel")
NanoLLaDAForCausalLM.register_for_auto_class("AutoModelForCausalLM")
NanoLLaDAForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
