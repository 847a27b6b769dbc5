"""The parts of the backbone: norm, rotary positions, attention, MLP, and the layer made of them."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_nanollada import NanoLLaDAConfig


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
        return 1.0 / config.rope_parameters["rope_theta"] ** exponent, 1.0  # rounds as transformers' models do

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
    """Grouped-query attention, by default with RMSNorm on queries and keys before RoPE."""

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
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_output_bias)
        norm = partial(NanoLLaDARMSNorm, config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(), norm()

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        noisy_length: int | None = None,
        noisy_only: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            noisy_length (`int`, *optional*): Length of the noisy half, if a clean one stands behind it under the dense
                mask of `create_attention_mask`. Clean queries see clean keys only, so that a quarter of the
                scores is left out.
            noisy_only (`bool`, defaults to `False`): Only the noisy half's output is wanted.
        """
        queries = hidden_states[:, :noisy_length] if noisy_only else hidden_states
        input_shape, heads = queries.shape[:-1], (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(queries).view(*input_shape, -1, self.head_dim)).transpose(1, 2)  # [B, H, L, D]
        key = self.k_norm(self.k_proj(hidden_states).view(heads)).transpose(1, 2)  # [B, KV, L, D]
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)

        cos, sin = (table.unsqueeze(1) for table in position_embeddings)  # [B, 1, L, D]
        query_cos, query_sin = cos[:, :, : query.shape[2]], sin[:, :, : query.shape[2]]
        query = query * query_cos + rotate_half(query) * query_sin
        key = key * cos + rotate_half(key) * sin
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)

        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        attend = partial(attention, self, dropout=dropout, scaling=self.scaling, **kwargs)
        if noisy_length is None:
            output, probabilities = attend(query, key, value, attention_mask)  # [B, L, H, D]
        else:
            n, probabilities = noisy_length, None
            output, _ = attend(query[:, :, :n], key, value, attention_mask[:, :, :n])
            if not noisy_only:
                clean = (part[:, :, n:] for part in (query, key, value))
                output = torch.cat((output, attend(*clean, attention_mask[:, :, n:, n:])[0]), dim=1)
        return self.o_proj(output.reshape(*input_shape, -1).contiguous()), probabilities


class NanoLLaDAMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: NanoLLaDAConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
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

    def forward(self, hidden_states: torch.Tensor, noisy_only: bool = False, **kwargs) -> torch.Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), noisy_only=noisy_only, **kwargs)
        hidden_states = hidden_states[:, : attended.shape[1]] if noisy_only else hidden_states
        hidden_states = hidden_states + nn.functional.dropout(attended, self.hidden_dropout, self.training)
        transformed = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + nn.functional.dropout(transformed, self.hidden_dropout, self.training)


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


def predicted_from_before(
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.LongTensor | None = None,
    document_ids: torch.LongTensor | None = None,
) -> torch.Tensor:
    """
    `config.label_shift`: at each position the hidden state of the one before it, `(batch, length, hidden_size)`. A
    document's first position, which has none before it, keeps its own (as in Dream's code). Arguments as in
    [`NanoLLaDAModel.forward`].
    """
    batch, length, _ = hidden_states.shape
    first = torch.zeros(batch, length, dtype=torch.bool, device=hidden_states.device)
    first[:, 0] = True
    if position_ids is not None:
        first |= position_ids == 0
    elif attention_mask is not None and attention_mask.dim() == 2:
        first |= attention_mask.long().cumsum(-1) <= 1  # left padding, and the token behind it
    if document_ids is not None:
        first[:, 1:] |= document_ids[:, 1:] != document_ids[:, :-1]
    return torch.where(first[..., None], hidden_states, hidden_states.roll(1, dims=1))
