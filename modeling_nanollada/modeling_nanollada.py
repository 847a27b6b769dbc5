"""The nanollada language model: one backbone, an autoregressive head and a masked-diffusion head.

Both heads have the same parameters under the same names (Qwen3's), so that an AR checkpoint initialises a diffusion
model by `NanoLLaDAForMaskedLM.from_pretrained(ar_checkpoint)`, and transformers' Qwen3 with the same state dict gives
the same logits. The class decides between causal and bidirectional attention, never the checkpoint.
"""

from functools import wraps
from types import MethodType

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import MaskedLMOutput
from transformers.utils import can_return_tuple, logging
from transformers.utils.output_capturing import capture_outputs

from .attention_nanollada import create_attention_mask
from .canvas_nanollada import check_prompt
from .configuration_nanollada import NanoLLaDAConfig
from .generation_config_nanollada import NanoLLaDAGenerationConfig
from .generation_nanollada import NanoLLaDAGenerationMixin
from .layers_nanollada import (
    NanoLLaDAAttention,
    NanoLLaDADecoderLayer,
    NanoLLaDARMSNorm,
    NanoLLaDARotaryEmbedding,
    predicted_from_before,
    select_positions,
)
from .loss_nanollada import FLOOR, weighted_head_loss
from .saved_nanollada import SavedLengthsMixin
from .versions_nanollada import (
    CACHE,
    SPELLINGS,
    NanoLLaDACausalLMOutput,
    NanoLLaDAModelOutput,
    must_verify,
    one_cache,
    refuse_batching,
    refuse_paged,
    refuse_unknown,
    verify_autoregressive,
    warn_if_untested,
)

logger = logging.get_logger(__name__)
warn_if_untested()


class NanoLLaDAPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by all nanollada models."""

    config: NanoLLaDAConfig
    config_class = NanoLLaDAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NanoLLaDADecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
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

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True):
        """As in transformers; `ValueError` for a size below a special token's id, which could not be read any more."""
        if new_num_tokens is not None:
            step = pad_to_multiple_of if isinstance(pad_to_multiple_of, int) and pad_to_multiple_of else 1
            size = -(-new_num_tokens // step) * step
            if size < self.config.vocab_size:
                self.config.check_vocab_size(size)
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)


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
        clean_input_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> NanoLLaDAModelOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): Token ids, or `inputs_embeds`.
            attention_mask (`torch.Tensor` of shape `(batch, key_length)`, *optional*): 1 for tokens, 0 for padding.
            position_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): Positions, restarting in each
                document. By default counted from the first token that is no padding.
            cache, past_key_values (`Cache`, *optional*): Keys and values of earlier tokens: one argument, under the
                name that transformers uses since 5.24, or before.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, length, hidden_size)`, *optional*): Embeddings.
            use_cache (`bool`, *optional*): Whether to return the cache. Defaults to `config.use_cache` when causal
                and not training, else `False`.
            document_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): Documents of packed rows.
            block_length (`int`, *optional*): Overrides `config.block_length` (bidirectional models only); 0 is the
                whole row.
            clean_input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): Block diffusion in one forward
                (BD3-LM, 2503.09573, §3.2): `input_ids` are the noisy ids, and every block of them is predicted from
                itself and from the *clean* blocks before it. The hidden states are those of the noisy half. A block
                that covers the row sees nothing clean, and the clean half is left out.

        Raises:
            `ValueError`: unless exactly one of `input_ids` and `inputs_embeds` is given; for `is_causal`, which the
                class decides; for `block_length` and `clean_input_ids` of a causal model; for `clean_input_ids` of
                another shape or with a cache; for a cache that holds keys, in training with gradient checkpointing;
                and as `create_attention_mask`.
            `TypeError`: for an argument that is not known, and for a cache under both names.
        """
        cache = one_cache(cache, past_key_values)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of `input_ids` and `inputs_embeds` must be given")
        if kwargs.pop("is_causal", self.is_causal) != self.is_causal:
            raise ValueError(f"`is_causal` is decided by the model class, got {not self.is_causal} for a call")
        if block_length is not None and self.is_causal:
            raise ValueError(
                f"`block_length` is a diffusion model's: it must not be given to an AR one, got {block_length}"
            )
        refuse_unknown(type(self).__name__, kwargs, self.config._attn_implementation)
        block_length = (self.config.block_length if block_length is None else block_length) or None
        shape = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        length = shape[1]
        if clean_input_ids is not None:
            self._check_clean_half(clean_input_ids, shape, cache, use_cache)
        clean_half = clean_input_ids is not None and block_length is not None and block_length < length
        inputs_embeds = self._embed(input_ids, inputs_embeds, clean_input_ids if clean_half else None)
        cache, use_cache = self._cache_of(cache, use_cache)
        if position_ids is None:
            position_ids = self._default_positions(inputs_embeds[:, :length], attention_mask, cache)

        mask = create_attention_mask(
            self.config,
            inputs_embeds,
            is_causal=self.is_causal,
            block_length=block_length,
            attention_mask=attention_mask,
            document_ids=document_ids,
            position_ids=position_ids,
            cache=cache,
            clean_half=clean_half,
        )
        hidden_states = inputs_embeds
        position_ids = position_ids.repeat(1, 2) if clean_half else position_ids
        # What a mask of our own leaves out need not be computed: clean → noisy, and the last layer's clean half.
        split = clean_half and self.config._attn_implementation == "sdpa" and mask is not attention_mask
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        depth = self.config.num_hidden_layers  # which an early exit's draft lowers for a while
        for index, layer in enumerate(self.layers[:depth]):
            hidden_states = layer(
                hidden_states,
                noisy_only=split and index + 1 == depth,
                noisy_length=length if split else None,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                cache=cache,
                position_ids=position_ids,
                **kwargs,
            )
        return NanoLLaDAModelOutput(
            last_hidden_state=self.norm(hidden_states[:, :length]), **{CACHE: cache if use_cache else None}
        )

    def _embed(self, input_ids, inputs_embeds, clean_input_ids):
        """`[B, L, hidden]`, or `[B, 2L, hidden]` with a clean half. One look-up: FSDP's ranks must agree in number."""
        if inputs_embeds is None:
            return self.embed_tokens(
                input_ids if clean_input_ids is None else torch.cat((input_ids, clean_input_ids), 1)
            )
        if clean_input_ids is None:
            return inputs_embeds
        return torch.cat((inputs_embeds, self.embed_tokens(clean_input_ids)), dim=1)

    def _cache_of(self, cache, use_cache):
        """The cache to read and write, and whether to return it."""
        if use_cache is None:
            use_cache = self.config.use_cache and self.is_causal and not self.training
        if self.gradient_checkpointing and self.training:
            if cache is not None and cache.get_seq_length():
                raise ValueError(
                    "Gradient checkpointing computes layers twice and would write a cache twice: the cache must be "
                    f"empty in training, got {cache.get_seq_length()} cached tokens"
                )
            if use_cache:
                logger.warning_once("`use_cache=True` does not go with gradient checkpointing: no cache is kept.")
            return None, False
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        return cache, use_cache

    def _check_clean_half(self, clean_input_ids, shape, cache, use_cache):
        if self.is_causal:
            raise ValueError("`clean_input_ids` are for block diffusion: the model must not be causal, got an AR one")
        if cache is not None or use_cache:
            raise ValueError("`clean_input_ids` hold the prefix themselves: they must come without a cache, got one")
        if clean_input_ids.shape != shape:
            raise ValueError(
                "`clean_input_ids` must have the shape of the noisy ids, got "
                f"{tuple(clean_input_ids.shape)} and {tuple(shape)}"
            )

    @staticmethod
    def _default_positions(inputs_embeds, attention_mask, cache):
        """`[B, L]` or `[1, L]`: left padding does not count, so a padded batch equals its rows alone."""
        past_length = cache.get_seq_length() if cache is not None else 0
        length = inputs_embeds.shape[1]
        if attention_mask is not None and len(attention_mask.shape) == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past_length : past_length + length]
        return torch.arange(past_length, past_length + length, device=inputs_embeds.device)[None]


class NanoLLaDAForCausalLM(NanoLLaDAPreTrainedModel, SavedLengthsMixin, GenerationMixin):
    """The autoregressive model: causal attention, next-token loss, transformers' own `generate` with a cache."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _auto_classes = ("AutoModel", "AutoModelForCausalLM")
    is_diffusion = False  # asked by all who score or decode; passes through PEFT's wrappers and remote code

    def __init__(self, config: NanoLLaDAConfig):
        super().__init__(config)
        self.model = NanoLLaDAModel(config, is_causal=True)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self.generation_config.suppress_tokens = [config.mask_token_id, *config.edit_token_ids]

    def _prepare_model_inputs(self, inputs, bos_token_id, model_kwargs):
        inputs, name, model_kwargs = super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)
        if name == "input_ids":
            check_prompt(inputs, None, self.config.vocab_size, empty=False)
        return inputs, name, model_kwargs

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
        loss_weights: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> NanoLLaDACausalLMOutput:
        """
        As [`NanoLLaDAModel.forward`], with logits. Those of a diffusion model's edit tokens, which its AR twin has as
        well, are `FLOOR`: they take nothing from a text.

        Args:
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): Targets, not shifted: position i is
                predicted from positions before i. −100 is no target. With `num_items_in_batch` the summed loss is
                divided by it, otherwise by the number of targets.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0): See `select_positions`.
            loss_weights (`torch.Tensor` of shape `(batch, length)`, *optional*): For training: the loss is
                Σ weight·CE over the labels, each with the weight at its own place, over the same denominator. No
                logits are returned: only weighted positions go through the head, a chunk at a time.

        Raises:
            `ValueError`: for `labels` with `logits_to_keep`, and for `loss_weights` without `labels` or with
                `shift_labels` (labels that context parallelism has shifted before it cut the row, as in transformers).
        """
        _check_labels(labels, logits_to_keep, loss_weights)
        num_items_in_batch, shift_labels = kwargs.pop("num_items_in_batch", None), kwargs.pop("shift_labels", None)
        if shift_labels is not None and loss_weights is not None:
            raise ValueError("`loss_weights` weigh unshifted labels: `shift_labels` must not be given, got both")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=one_cache(cache, past_key_values),
            **kwargs,
        )
        if loss_weights is not None:
            hidden_states = outputs.last_hidden_state[:, :-1]  # position i predicts label i + 1
            labels, weights, never = labels[:, 1:], loss_weights[:, 1:], self.config.edit_token_ids
            loss = weighted_head_loss(self.lm_head, hidden_states, labels, weights, num_items_in_batch, never)
            return NanoLLaDACausalLMOutput(loss=loss, hidden_states=outputs.hidden_states)
        logits = self.lm_head(select_positions(outputs.last_hidden_state, logits_to_keep))  # [B, L, V]
        _floor(logits, self.config.edit_token_ids)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits, labels, self.vocab_size, num_items_in_batch=num_items_in_batch, shift_labels=shift_labels
            )
        return NanoLLaDACausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: outputs.cache},
        )

    @wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args, **kwargs):
        # without what transformers hands on to every forward: tokenizers, of stop strings and assistants
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        return {name: value for name, value in inputs.items() if name not in ("tokenizer", "assistant_tokenizer")}

    def generate(self, *args, **kwargs):
        """
        transformers' `generate`, with a cache under either name. On a version that nobody has tested, the first call
        with a cache is checked.
        """
        given = one_cache(*(kwargs.pop(name, None) for name in SPELLINGS))
        kwargs |= {} if given is None else {CACHE: given}
        refuse_paged(kwargs)
        settings = kwargs.get("generation_config") or self.generation_config
        use_cache = kwargs.get("use_cache", settings.use_cache)
        if use_cache is not False and must_verify("autoregressive"):
            verify_autoregressive(self, super().generate)
        return super().generate(*args, **kwargs)

    init_continuous_batching = generate_batch = continuous_batching_context_manager = refuse_batching


class NanoLLaDAForMaskedLM(NanoLLaDAPreTrainedModel, NanoLLaDAGenerationMixin, SavedLengthsMixin):
    """The masked-diffusion model: predicts every hidden token from all visible ones; `generate` denoises."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _auto_classes = ("AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM")
    generation_config_class = NanoLLaDAGenerationConfig
    is_diffusion = True

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

    def _install_forward(self, forward=None):
        """Puts `forward(self, …)`, of a trainer that knows what a diffusion model is, in place of the class's own."""
        self.__dict__.pop("forward", None)
        if forward is not None:
            object.__setattr__(self, "forward", MethodType(forward, self))

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
        clean_input_ids: torch.LongTensor | None = None,
        loss_weights: torch.Tensor | None = None,
        edit_tokens: bool = False,
        **kwargs,
    ) -> MaskedLMOutput:
        """
        As [`NanoLLaDAModel.forward`], with logits. The mask token's logit is `FLOOR` (−10,000): its probability is 0
        in every dtype, it is never predicted (SUBS, MDLM), and differences of logits, as in guidance, are numbers.
        So are those of `config.edit_token_ids`, unless asked for: a likelihood and a decoder are of text.

        Args:
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): The token at the same position (no
                shift). −100 is no target. Plain cross-entropy, without the weights of a diffusion objective; with
                `num_items_in_batch` the summed loss is divided by it, otherwise by the number of targets.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0): See `select_positions`.
            block_length (`int`, *optional*): Overrides `config.block_length` for this call; 0 is the whole row.
            clean_input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): Vectorised block diffusion.
            loss_weights (`torch.Tensor` of shape `(batch, length)`, *optional*): For training: the loss is
                Σ weight·CE over the labels, over the same denominator. No logits are returned: only weighted
                positions go through the head, a chunk at a time.
            edit_tokens (`bool`, defaults to `False`): Whether `<|delete|>` and `<|insert|>` may be predicted: in
                training on labels that hold them, and for a decoder that executes them.

        Raises:
            `ValueError`: for `labels` with `logits_to_keep`, for `labels` that hold a token which may not be
                predicted, for `edit_tokens` of a model that has none, for `shift_labels`, for `loss_weights` without
                `labels`, and for blocks or a cache with `config.label_shift`.
        """
        _check_labels(labels, logits_to_keep, loss_weights)
        if edit_tokens and not self.config.edit_token_ids:
            raise ValueError("`edit_tokens` needs a model with `config.delete_token_id`, got None")
        cached = any(kwargs.get(name) is not None for name in SPELLINGS)
        if self.config.label_shift and (block_length or clean_input_ids is not None or cached):
            raise ValueError(
                "`config.label_shift` is for whole rows: `block_length`, `clean_input_ids` and a cache must "
                f"not be given, got `block_length` {block_length}"
            )
        if kwargs.pop("shift_labels", None) is not None:
            raise ValueError("`shift_labels` are an AR model's: this one's `labels` are not shifted, got some")
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            document_ids=document_ids,
            block_length=block_length,
            clean_input_ids=clean_input_ids,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if self.config.label_shift:
            hidden_states = predicted_from_before(hidden_states, attention_mask, position_ids, document_ids)
        never = [self.config.mask_token_id, *([] if edit_tokens else self.config.edit_token_ids)]
        if loss_weights is not None:  # a label that is one of these has an infinite loss here
            loss = weighted_head_loss(self.lm_head, hidden_states, labels, loss_weights, num_items_in_batch, never)
            return MaskedLMOutput(loss=loss, hidden_states=outputs.hidden_states)
        logits = self.lm_head(select_positions(hidden_states, logits_to_keep))  # [B, L, V]
        _floor(logits, never)
        loss = None
        if labels is not None:
            for token_id, name in zip(never, ("the mask token", "an edit token", "an edit token"), strict=False):
                if (labels == token_id).any():
                    raise ValueError(f"`labels` must not hold {name}, got {token_id}")
            loss = self.loss_function(logits, labels, self.vocab_size, num_items_in_batch=num_items_in_batch)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def _floor(logits, token_ids):
    for token_id in token_ids:
        logits[..., token_id] = FLOOR


def _check_labels(labels, logits_to_keep, loss_weights):
    if labels is None and loss_weights is not None:
        raise ValueError("`loss_weights` weigh `labels`, which must be given, got None")
    if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
        raise ValueError(f"`labels` need all logits: `logits_to_keep` must be 0, got {logits_to_keep}")


NanoLLaDAModel.register_for_auto_class("AutoModel")
NanoLLaDAForCausalLM.register_for_auto_class("AutoModelForCausalLM")
NanoLLaDAForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
