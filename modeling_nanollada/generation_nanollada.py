"""`generate` for the masked-diffusion model: LLaDA 1.0's sampling (arXiv 2502.09992, §2.4 and appendix B.3, B.4).

The row is the prompt followed by mask tokens. Block by block, left to right, each denoising step (1) predicts every
masked position of the block, (2) ranks these positions, (3) commits the best few to a token drawn from their own
distribution, and (4) leaves the others masked. Ranking looks at distributions and never at the token that was drawn,
so that with one token per step and temperature 1 an exact denoiser gives exact samples (`position_score`).
"""

import copy
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput
from transformers.generation import logits_process as processors
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from .canvas_nanollada import Canvas, check_prompt
from .denoising_nanollada import Denoiser
from .generation_config_nanollada import (
    UNSUPPORTED,
    NanoLLaDAGenerationConfig,
    describe_settings,
    refuse,
    refuse_idle,
    refuse_unused,
    require,
    set_by_the_call,
)
from .prediction_nanollada import predictor
from .presets_nanollada import expand_preset
from .sampling_nanollada import SHAPERS, WARPERS, Sampler
from .saved_nanollada import YIELDING, prefer_the_calls_length
from .versions_nanollada import SPELLINGS, read_under_both_names

logger = logging.get_logger(__name__)


@dataclass
class NanoLLaDAGenerationOutput(GenerateDecoderOnlyOutput):
    """
    What `generate(return_dict_in_generate=True)` returns. Scores, logits, attentions and hidden states stay `None`.

    Args:
        sequences (`torch.LongTensor` of shape `(batch, prompt_length + max_new_tokens)`): Prompt and new tokens; the
            pad token after the first generated EOS.
        tokens_per_forward (`torch.FloatTensor` of shape `(batch,)`): Tokens decoded and kept (no pads), by forward
            passes made while the row was at work. The two passes of guidance count as one.
        canvas (`torch.LongTensor` of shape `(batch, width)`): The rows as the model saw them last: prompt, decided
            tokens, also those behind an EOS, and the mask token where nothing was decided. A model with
            `config.block_length` sees masks to the end of its last block, so `width` may exceed `sequences`'.
        commit_steps (`torch.LongTensor` of shape `(batch, width)`): The denoising step in which each position was
            decided (for good, where decisions are taken back). Each row counts its own steps, over all its blocks,
            from 0. −1 is what was given and what was never decided.
        cache, past_key_values (`None`): The cache is the call's own and ends with it.
    """

    tokens_per_forward: torch.FloatTensor | None = None
    canvas: torch.LongTensor | None = None
    commit_steps: torch.LongTensor | None = None


read_under_both_names(NanoLLaDAGenerationOutput)


class NanoLLaDAGenerationMixin(GenerationMixin):
    """Diffusion behind transformers' own `generate`: its length settings, batches, streamers, criteria, pipelines."""

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        *,
        streamer: BaseStreamer | None = None,
        generator: torch.Generator | None = None,
        **kwargs,
    ) -> "NanoLLaDAGenerationOutput | torch.LongTensor":
        r"""
        Writes behind a prompt by denoising, and fills the mask tokens inside it.

        The row is the prompt followed by mask tokens; block by block, left to right, each step decides a few of them.
        What a call does not set is the checkpoint's to say (`model.generation_config`, of the class
        `model.generation_config_class`), then the default named here.

        Args:
            inputs (`torch.LongTensor` of shape `(batch, length)`, *optional*): Prompts, of any integer dtype; also as
                `input_ids=`. Pad on the left and pass the `attention_mask`. Mask tokens inside a prompt are filled,
                all else stays. They belong to the first block; in a model with `config.block_length` to the blocks in
                which they lie, which come first. With length 0, of a single row, all of it is generated; unset is the
                BOS token.
            generation_config ([`NanoLLaDAGenerationConfig`] or [`~transformers.GenerationConfig`], *optional*):
                Settings together; keyword arguments of the same names override them.
            logits_processor ([`~transformers.LogitsProcessorList`], *optional*): Called with the scores of all masked
                positions of the block, `(N, vocab_size)`, and for each of them its whole row, mask tokens included,
                `(N, length)`. Processors of transformers that read the row left to right are refused; repetitions have
                `repetition_penalty`. Its warpers shape draws and need some.
            stopping_criteria ([`~transformers.StoppingCriteriaList`], *optional*): Asked after each block, for every
                prefix that ends in it, as if it had come token by token (`max_time` once per block); the first that
                stops ends the row there.
            streamer ([`~transformers.generation.streamers.BaseStreamer`], *optional*): Gets the finished columns after
                each block. A `put_draft` method gets, after each step, all columns from the first that was not put
                (with masks in the prompt: from the first mask) to the row's last one, with the mask token where
                nothing is decided. So a draft of n columns is the last n of the row. A `put_confidence` method gets,
                before that, the same columns' largest probabilities, NaN where nothing was read in the step. Where
                tokens were removed or inserted, a `put_moves` method gets, between the two, the column of the row
                that each of these columns stood in before, −1 being a mask that came in.
            generator (`torch.Generator`, *optional*): Of all draws: same seed, same output. Rows are independent where
                nothing is drawn. Draws of all rows come from one generator, step by step: a sampled row depends on its
                batch mates and on their order.
            kwargs: `attention_mask` (`(batch, length)`), `tokenizer` (for `stop_strings`), and the settings:

        Returns:
            `torch.LongTensor` of shape `(batch, length + new tokens)`: prompts and new tokens, the pad token behind
            the first new EOS; with `return_dict_in_generate=True` a [`NanoLLaDAGenerationOutput`].

        Raises:
            `ValueError`: for settings of transformers without a meaning here (beams, assistants, given caches,
                `inputs_embeds`, scores as output, …) and unknown ones, saved or given; for settings that the call
                makes and its decoding doesn't read (`top_k` without draws); for ids and masks of a wrong shape, type
                or range; for a `block_length` that doesn't divide `config.block_length`, and for prompts with nothing
                to decode.
        """
        kwargs |= {} if generator is None else {"generator": generator}
        return super().generate(
            inputs,
            generation_config=generation_config,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            streamer=streamer,
            **kwargs,
        )

    if generate.__doc__:  # `python -OO` has none
        generate.__doc__ = generate.__doc__.replace("        Returns:", f"{describe_settings()}\n\n        Returns:")

    _warned_of_a_long_canvas = False

    def adjust_generation_fn(self, *args, **kwargs):
        super().adjust_generation_fn(*args, **kwargs)
        self.generation_config = NanoLLaDAGenerationConfig.from_config(self.generation_config)
        self.generation_config._original_object_hash = hash(self.generation_config)  # as loaded

    def _prepare_generation_config(self, generation_config, **kwargs):
        """
        What the call says, then the given config, then the model's, then the defaults. Of what the model's says about
        deciding tokens, as much goes as contradicts the call (`threshold` beside a call's `factor`).
        """
        kwargs = expand_preset(kwargs)
        refuse_unused({name: kwargs[name] for name in kwargs if name in UNSUPPORTED})  # before transformers reads them
        for yielding in YIELDING:
            try:
                settings, model_kwargs = self._combined_settings(generation_config, kwargs, yielding)
                break
            except ValueError:
                if yielding is YIELDING[-1]:  # the call contradicts itself
                    raise
        settings.check_tokens(self.config.vocab_size, self.config.mask_token_id)
        settings.check_edit_tokens(self.config)
        settings.temperature = settings.get_temperature()
        settings.do_sample = settings.temperature > 0
        prefer_the_calls_length(settings, generation_config, kwargs)
        return settings, model_kwargs

    def _combined_settings(self, generation_config, kwargs, yielding):
        """All settings, but those of the model's own config that are `yielding`; and the other `kwargs`."""
        settings = NanoLLaDAGenerationConfig.from_config(generation_config or GenerationConfig())
        own = {name: value for name, value in self.generation_config.to_dict().items() if name not in yielding}
        settings.update(**own, defaults_only=True, allow_custom_entries=True)
        model_kwargs = settings.update(**kwargs)
        settings.update(**settings._get_default_generation_params(), defaults_only=True)
        refuse_unused(vars(settings))
        refuse_idle(settings, set_by_the_call(generation_config, kwargs))
        return settings, model_kwargs

    def _validate_model_kwargs(self, model_kwargs):
        generator = model_kwargs.pop("generator", None)
        for name in SPELLINGS:
            refuse(name, model_kwargs.pop(name, None))
        super()._validate_model_kwargs(model_kwargs)  # unknown names
        good = generator is None or isinstance(generator, torch.Generator)
        require(good, f"`generator` must be a torch.Generator, got {generator!r}")
        for name, value in model_kwargs.items():
            if name not in ("input_ids", "attention_mask"):
                refuse(name, value)

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        for name in ("assistant_model", "assistant_tokenizer"):
            refuse(name, generation_mode_kwargs.get(name))
        refuse("synced_gpus", generation_mode_kwargs.get("synced_gpus") or None)
        streamer = generation_mode_kwargs.get("streamer")
        good = streamer is None or all(callable(getattr(streamer, name, None)) for name in ("put", "end"))
        require(good, f"`streamer` must have the methods `put` and `end`, got {type(streamer).__name__}")
        stops = generation_config.stop_strings
        good = stops is None or "tokenizer" in generation_mode_kwargs
        require(good, f"`stop_strings` need the `tokenizer`, which must be given, got {stops!r} alone")
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def _prepare_model_inputs(self, inputs, bos_token_id, model_kwargs):
        ids, name, model_kwargs = super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)
        check_prompt(ids, model_kwargs.get("attention_mask"), self.config.vocab_size)
        several = ids.shape[1] == 0 and len(ids) > 1  # transformers looks at the rows' last ids
        message = "`input_ids` of length 0 must be one row (`num_return_sequences` makes more), got shape"
        require(not several, f"{message} {tuple(ids.shape)}")
        return ids.long(), name, model_kwargs

    def init_continuous_batching(self, *args, **kwargs):
        """Refused: it would decode left to right, one token at a time. `generate` takes batches."""
        raise ValueError("`generate_batch` decodes left to right: a diffusion model must use `generate`, got a call")

    generate_batch = continuous_batching_context_manager = init_continuous_batching

    def _validate_generated_length(self, generation_config, input_ids_length, has_default_max_length):
        if input_ids_length != generation_config.max_length:  # equal: only the prompt's own masks are filled
            super()._validate_generated_length(generation_config, input_ids_length, has_default_max_length)

    def _prepare_cache_for_generation(self, *args, **kwargs):
        """None: the decoder makes its own, see `prediction_nanollada.py`."""

    def _get_logits_processor(self, generation_config, **kwargs):
        for name in ("prefix_allowed_tokens_fn", "negative_prompt_ids", "negative_prompt_attention_mask"):
            refuse(name, kwargs.pop(name, None))
        view = copy.copy(generation_config)
        view.repetition_penalty = None  # transformers' would count masks and padding; see `_Sampler.shape`
        found = super()._get_logits_processor(view, **kwargs)
        for item in found:
            good = type(item).__module__ != processors.__name__ or isinstance(item, SHAPERS + WARPERS)
            name = type(item).__name__
            require(good, f"`logits_processor` must not read the row left to right, got {name}")
            idle = (
                isinstance(item, WARPERS) and not generation_config.do_sample
            )  # the caller's: settings add none then
            require(not idle, f"`logits_processor` {name} shapes draws: it needs a `temperature` above 0, got none")
        return found

    def _sample(self, input_ids, logits_processor, stopping_criteria, generation_config, streamer=None, **kwargs):
        eos = [criterion.eos_token_id for criterion in stopping_criteria if isinstance(criterion, EosTokenCriteria)]
        eos_ids = torch.cat(eos).to(self.device) if eos else torch.empty(0, dtype=torch.long, device=self.device)
        canvas = Canvas(input_ids.to(self.device), kwargs.get("attention_mask"), generation_config, self.config)
        self._warn_of_a_long_canvas(canvas, generation_config)
        generator = kwargs.get("generator")  # the other kwargs prepare autoregressive decoding
        edit_ids = (self.config.delete_token_id, self.config.insert_token_id)
        mask_id = self.config.mask_token_id
        sampler = Sampler(generation_config, logits_processor, eos_ids, mask_id, generator, edit_ids)
        Denoiser(canvas, predictor(self, canvas, generation_config), sampler, stopping_criteria, streamer).run()
        sequences = canvas.output().to(input_ids.device)
        if not generation_config.return_dict_in_generate:
            return sequences
        return NanoLLaDAGenerationOutput(
            sequences=sequences,
            tokens_per_forward=canvas.tokens_per_forward(),
            canvas=canvas.ids.to(input_ids.device),
            commit_steps=canvas.commit_steps.to(input_ids.device),
        )

    def _warn_of_a_long_canvas(self, canvas, settings):
        """Once per model, and only where the masks of the whole row are seen from the first step on."""
        known, shown = settings.trained_length, int(canvas.visible.sum(1).max())
        in_blocks = self.config.block_length is not None or (settings.grow_length and int(canvas.blocks.max()) > 0)
        if known is None or shown <= known or in_blocks or self._warned_of_a_long_canvas:
            return
        self._warned_of_a_long_canvas = True
        new_tokens = known - (shown - (canvas.length - canvas.prompt_length))
        fits = f"`max_new_tokens` to at most {new_tokens} for this prompt, or " if new_tokens > 0 else ""
        logger.warning(
            f"The model is shown {shown} tokens at once, prompt and masks, but none of the rows that it was trained "
            f"on had more than {known} (`trained_length`): what it writes may be wrong. Set {fits}`block_length` "
            "(16, say) with `grow_length=True`, which shows it one block of masks at a time."
        )
