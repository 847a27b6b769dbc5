"""`generate` for the masked-diffusion model: LLaDA 1.0's sampling (arXiv 2502.09992, §2.4 and appendix B.3, B.4).

The row is the prompt followed by mask tokens. Block by block, left to right, each denoising step (1) predicts every
masked position of the block, (2) ranks these positions, (3) commits the best few to a token drawn from their own
distribution, and (4) leaves the others masked. Ranking looks at distributions and never at the token that was drawn,
so that with one token per step and temperature 1 an exact denoiser gives exact samples (`position_score`).
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch.nn.functional import pad
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput, MaxLengthCriteria, MaxTimeCriteria
from transformers.generation import logits_process as processors

_OWN_FIELDS = ("block_length", "steps", "remasking", "position_score", "cfg_scale", "eos_policy", "early_stop")
_CHOICES = {
    "remasking": ("low_confidence", "random"),
    "position_score": ("max_prob", "margin", "entropy", "sampled_prob"),
    "eos_policy": ("none", "last", "forbid"),
}
# Of transformers' logits processors, those whose rule needs one position's scores alone. The rest reads left to right.
_SHAPERS = (processors.SuppressTokensLogitsProcessor, processors.LogitNormalization)
_WARPERS = tuple(
    getattr(processors, f"{name}LogitsWarper")
    for name in ("Temperature", "TopK", "TopP", "TopH", "MinP", "Typical", "Epsilon", "Eta")
)
# Settings of transformers' `generate` that diffusion has no meaning for, or that are not built.
_UNSUPPORTED = (
    "num_beams num_beam_groups early_stopping length_penalty diversity_penalty penalty_alpha dola_layers constraints "
    "force_words_ids use_mtp prompt_lookup_num_tokens assistant_early_exit guidance_scale min_length min_new_tokens "
    "no_repeat_ngram_size encoder_no_repeat_ngram_size encoder_repetition_penalty bad_words_ids sequence_bias "
    "forced_bos_token_id forced_eos_token_id exponential_decay_length_penalty begin_suppress_tokens "
    "remove_invalid_values watermarking_config token_healing cache_implementation output_scores output_logits "
    "output_attentions output_hidden_states"
).split()


class NanoLLaDAGenerationConfig(GenerationConfig):
    r"""
    Settings of the diffusion `generate`; also accepted as its keyword arguments. Saved as `generation_config.json`.

    Args:
        max_new_tokens (`int`, *optional*): Mask tokens appended to the prompt; with 0 only the prompt's own masks are
            filled. As in transformers, `max_length` is the alternative and 20 new tokens are the default.
        block_length (`int`, *optional*): Tokens per block; blocks are decoded left to right. Defaults to the model's
            `config.block_length`, else to `max_new_tokens` (one block: pure diffusion). Without
            `config.block_length` it must divide `max_new_tokens`. With it, blocks are cut at multiples of
            `block_length` from the row's first token, as in training, so the first and the last block may be partial;
            it must divide `config.block_length`, since a longer one would show the model half-decoded context.
        steps (`int`, *optional*): Denoising steps *per block*; a block of m masks commits ⌊m/steps⌋ tokens a step and
            one more in the first m mod `steps`. More steps than masks, and `None`, mean one token per step. LLaDA
            counts the steps of all blocks: its `steps=S, gen_length=G, block_length=b` is `steps=S * b // G` here.
        temperature (`float`, *optional*): 0 is greedy, as is leaving both `temperature` and `do_sample` unset. With
            `do_sample=True` the default is 1.0. Tokens are drawn by Gumbel-max in float64 (arXiv 2409.02908).
        do_sample (`bool`, *optional*): `False` is the same as `temperature=0`. Unset, the temperature decides.
        top_k (`int`, *optional*), top_p (`float`, *optional*): Truncate each draw's distribution. Off by default.
        remasking (`str`, *optional*, defaults to `"low_confidence"`): Which positions to commit: those with the best
            `position_score`, or `"random"` ones (the reverse process of LLaDA's eq. 3; `position_score` is not used).
        position_score (`str`, *optional*, defaults to `"max_prob"`): `"max_prob"`: the largest probability;
            `"margin"`: its distance to the second; `"entropy"`: the lowest entropy first; `"sampled_prob"`: the
            probability of the drawn token, LLaDA's rule, which at temperatures above 0 distorts the samples towards
            likely tokens. Scores come from the distribution before temperature, `top_k` and `top_p` (and after all
            else), as in LLaDA. Ties go to the leftmost position.
        cfg_scale (`float`, *optional*, defaults to 0.0): Classifier-free guidance w: logits become
            z_u + (w + 1)(z_c − z_u), with z_u from a row whose prompt is masked. 0 is off.
        repetition_penalty (`float`, *optional*): As in transformers; counts the tokens visible in the row.
        eos_policy (`str`, *optional*, defaults to `"none"`): `"last"`: positions whose likeliest token (drawn token,
            with `"sampled_prob"`) is an EOS are committed after all others of the block. `"forbid"`: never an EOS.
        early_stop (`bool`, *optional*, defaults to `True`): Stop working on a row once an EOS has nothing masked
            before it. What comes after is padded in any case, so this saves time and changes no token that is kept.

    Raises:
        `ValueError`: for values out of range, and for `do_sample` and `temperature` that contradict each other.
    """

    def __init__(self, **kwargs):
        for name in _OWN_FIELDS:
            setattr(self, name, kwargs.pop(name, None))
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, config: GenerationConfig) -> "NanoLLaDAGenerationConfig":
        """The same settings as this class. A plain config's `_from_model_config` would drop our fields on reload."""
        return cls(**{key: value for key, value in config.to_dict().items() if not key.startswith("_")})

    @classmethod
    def from_model_config(cls, model_config) -> "NanoLLaDAGenerationConfig":
        """As in transformers: the special tokens. The base method fails for subclasses with fields of their own."""
        return cls.from_config(GenerationConfig.from_model_config(model_config))

    @staticmethod
    def _get_default_generation_params() -> dict:
        defaults = GenerationConfig._get_default_generation_params()
        for name in ("do_sample", "temperature", "top_k", "top_p"):  # unset means greedy, and no truncation
            del defaults[name]
        own = {"remasking": "low_confidence", "position_score": "max_prob", "cfg_scale": 0.0}
        return {**defaults, **own, "eos_policy": "none", "early_stop": True}

    def get_temperature(self) -> float:
        """The temperature that `temperature` and `do_sample` mean together; 0.0 is greedy."""
        return float(bool(self.do_sample) if self.temperature is None else self.temperature)

    def to_diff_dict(self) -> dict:
        settings = {name: value for name, value in super().to_diff_dict().items() if value is not None}
        if self.temperature is not None:
            settings["do_sample"] = self.get_temperature() > 0  # or pipelines would add their own
        return settings

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **kwargs) -> dict:
        """As in transformers. Of `do_sample` and `temperature`, what the new value contradicts goes."""
        for name, other in (("do_sample", "temperature"), ("temperature", "do_sample")):
            if not _contradict(**{name: kwargs.get(name), other: getattr(self, other)}):
                continue
            if defaults_only:
                del kwargs[name]  # what is set stays
            elif kwargs.get(other) is None:
                setattr(self, other, None)  # the later word counts
        return super().update(defaults_only, allow_custom_entries, **kwargs)

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None) -> None:
        for name, low in (("max_new_tokens", 0), ("block_length", 1), ("steps", 1), ("top_k", 0)):
            value = getattr(self, name)
            good = value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= low)
            _require(good, f"`{name}` must be an integer >= {low}, got {value!r}")
        for name, rule, test in (
            ("temperature", ">= 0", lambda x: 0 <= x < math.inf),
            ("cfg_scale", ">= 0", lambda x: 0 <= x < math.inf),
            ("repetition_penalty", "> 0", lambda x: 0 < x < math.inf),
            ("top_p", "in (0, 1]", lambda x: 0 < x <= 1),
        ):
            value = getattr(self, name)
            good = value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and test(value))
            _require(good, f"`{name}` must be a number {rule}, got {value!r}")
        for name, choices in (*_CHOICES.items(), ("early_stop", (True, False)), ("do_sample", (True, False))):
            value = getattr(self, name)
            _require(value is None or value in choices, f"`{name}` must be one of {choices}, got {value!r}")
        rule = "`do_sample` must be False where `temperature` is 0 and True where it is not"
        message = f"{rule}, got {self.do_sample} and {self.temperature}"
        _require(not _contradict(self.do_sample, self.temperature), message)
        # The base class takes an unset `do_sample` for greedy, and knows no prompt that holds masks.
        view = copy.copy(self)
        view.do_sample = self.get_temperature() > 0
        view.temperature = self.temperature if view.do_sample else None
        view.max_new_tokens = self.max_new_tokens or None
        super(NanoLLaDAGenerationConfig, view).validate(strict=strict, user_set_attributes=user_set_attributes)


@dataclass
class NanoLLaDAGenerationOutput(GenerateDecoderOnlyOutput):
    """
    What `generate(return_dict_in_generate=True)` returns. Scores, logits, attentions and hidden states stay `None`.

    Args:
        sequences (`torch.LongTensor` of shape `(batch, prompt_length + max_new_tokens)`): Prompt and new tokens; the
            pad token after the first generated EOS.
        tokens_per_forward (`torch.FloatTensor` of shape `(batch,)`): Tokens decoded and kept (no pads), by forward
            passes made while the row was at work. The two passes of guidance count as one.
        past_key_values (`None`): No cache is kept.
    """

    tokens_per_forward: torch.FloatTensor | None = None


class NanoLLaDAGenerationMixin(GenerationMixin):
    """
    Diffusion behind transformers' own `generate`: its length settings, batches, streamers, criteria, pipelines.

    On top of [`NanoLLaDAGenerationConfig`], `generate` takes `generator` (a `torch.Generator`: same seed, same
    output). What differs from an autoregressive model:

    - *Infilling.* Mask tokens inside the prompt are filled, all else stays. They belong to the first block; in a model
      with `config.block_length` to the blocks in which they lie, which come first.
    - *Batches.* Rows are independent: pad on the left and pass the `attention_mask`.
    - *`logits_processor`* is called with the scores of all masked positions of the block, `(N, vocab_size)`, and for
      each of them its whole row, mask tokens included, `(N, length)`. Processors of transformers that read the row
      left to right are refused; repetitions have `repetition_penalty`.
    - *`stopping_criteria`* are asked after each block, for every prefix that ends in it, as if it had come token by
      token (`max_time` once per block); the first that stops ends the row there.
    - *Streamers* get the finished columns after each block. A `put_draft` method gets, after each step, all columns
      from the first that was not put (with masks in the prompt: from the first mask) to the row's last one, with the
      mask token where nothing is decided. So a draft of n columns is the last n of the row.

    Raises:
        `ValueError`: for settings of transformers without a meaning here (beams, assistants, caches, `inputs_embeds`,
            scores as output, …), for a `block_length` that doesn't divide, and for prompts with nothing to decode.
    """

    def adjust_generation_fn(self, *args, **kwargs):
        super().adjust_generation_fn(*args, **kwargs)
        self.generation_config = NanoLLaDAGenerationConfig.from_config(self.generation_config)
        self.generation_config._original_object_hash = hash(self.generation_config)  # as loaded

    def _prepare_generation_config(self, generation_config, **kwargs):
        """What the call says, then the given config, then the model's, then the defaults."""
        settings = NanoLLaDAGenerationConfig.from_config(generation_config or GenerationConfig())
        settings.update(**self.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
        model_kwargs = settings.update(**kwargs)
        settings.update(**settings._get_default_generation_params(), defaults_only=True)
        off = {**GenerationConfig._get_default_generation_params(), "guidance_scale": 1}
        for name in _UNSUPPORTED:
            value = getattr(settings, name, None)
            _refuse(name, None if value == off.get(name) else value)
        settings.temperature = settings.get_temperature()
        settings.do_sample = settings.temperature > 0
        return settings, model_kwargs

    def _validate_model_kwargs(self, model_kwargs):
        generator = model_kwargs.pop("generator", None)
        super()._validate_model_kwargs(model_kwargs)  # unknown names
        good = generator is None or isinstance(generator, torch.Generator)
        _require(good, f"`generator` must be a torch.Generator, got {generator!r}")
        for name, value in model_kwargs.items():
            if name not in ("input_ids", "attention_mask"):
                _refuse(name, value)

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        for name in ("assistant_model", "synced_gpus"):
            _refuse(name, generation_mode_kwargs.get(name))
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def _validate_generated_length(self, generation_config, input_ids_length, has_default_max_length):
        if input_ids_length != generation_config.max_length:  # equal: only the prompt's own masks are filled
            super()._validate_generated_length(generation_config, input_ids_length, has_default_max_length)

    def _prepare_cache_for_generation(self, *args, **kwargs):
        """None: every step reads the whole row again."""

    def _get_logits_processor(self, generation_config, **kwargs):
        for name in ("prefix_allowed_tokens_fn", "negative_prompt_ids", "negative_prompt_attention_mask"):
            _refuse(name, kwargs.pop(name, None))
        view = copy.copy(generation_config)
        view.repetition_penalty = None  # transformers' would count masks and padding; see `_Sampler.shape`
        found = super()._get_logits_processor(view, **kwargs)
        for item in found:
            good = type(item).__module__ != processors.__name__ or isinstance(item, _SHAPERS + _WARPERS)
            name = type(item).__name__
            _require(good, f"`logits_processor` must not read the row left to right, got {name}")
        return found

    def _sample(self, input_ids, logits_processor, stopping_criteria, generation_config, streamer=None, **kwargs):
        eos = [criterion.eos_token_id for criterion in stopping_criteria if isinstance(criterion, EosTokenCriteria)]
        eos_ids = torch.cat(eos).to(self.device) if eos else torch.empty(0, dtype=torch.long, device=self.device)
        canvas = _Canvas(input_ids.to(self.device), kwargs.get("attention_mask"), generation_config, self.config)
        generator = kwargs.get("generator")  # the other kwargs prepare autoregressive decoding
        sampler = _Sampler(generation_config, logits_processor, eos_ids, self.config.mask_token_id, generator)
        while canvas.undecided.any():
            self._denoise_block(canvas, canvas.next_block(), sampler, generation_config, streamer)
            canvas.stop_by(stopping_criteria)
            if streamer is not None and (finished := canvas.take_finished_columns()).numel():
                streamer.put(finished.cpu())
        if streamer is not None:
            streamer.end()
        sequences = canvas.output().to(input_ids.device)
        if not generation_config.return_dict_in_generate:
            return sequences
        return NanoLLaDAGenerationOutput(sequences=sequences, tokens_per_forward=canvas.tokens_per_forward())

    def _denoise_block(self, canvas, block, sampler, settings, streamer):
        """Decodes the positions `block`, `[B, W]`, of all rows; each row has its own masks, steps and quota."""
        masked = block.sum(1)  # [B]
        steps = masked if settings.steps is None else masked.clamp(max=settings.steps)
        for step in range(int(steps.max())):
            active = block & canvas.undecided  # [B, W]
            rows = active.any(1).nonzero()[:, 0]  # [R]
            if len(rows) == 0:
                break
            active, ids = active[rows], canvas.ids[rows]
            # 1. Predict the masked positions of the block, N over all rows.
            logits = self._predict(canvas, rows, active, settings.cfg_scale)  # [N, V]
            logits = sampler.shape(logits, ids[:, : canvas.length], active, canvas.visible[rows, : canvas.length])
            # 2. Rank them, and draw the tokens of the best.
            quota = commit_quota(masked[rows], steps[rows], step)
            selected, tokens = sampler.select(logits, ids[:, : canvas.length], active, quota)
            # 3. Commit these; the others stay masked.
            canvas.commit(rows, selected, tokens)
            canvas.stop_at_eos(sampler.eos_ids, settings.early_stop)
            if hasattr(streamer, "put_draft"):
                streamer.put_draft(canvas.ids[:, canvas.put : canvas.length].cpu())

    def _predict(self, canvas, rows, active, cfg_scale):
        """Logits `[N, V]` of the positions `active`, `[R, W]`, row by row; with guidance from two rows in one pass."""
        ids, visible = canvas.ids[rows], canvas.visible[rows]
        if cfg_scale:
            ids = torch.cat((ids, ids.masked_fill(canvas.given[rows], self.config.mask_token_id)))  # [2R, W]
            visible, active = visible.repeat(2, 1), active.repeat(2, 1)
        attention_mask = None if canvas.all_visible else visible.long()
        logits = self(input_ids=ids, attention_mask=attention_mask, logits_to_keep=active, return_dict=True).logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if cfg_scale:
            conditional, unconditional = logits.chunk(2)
            guided = unconditional + (cfg_scale + 1) * (conditional - unconditional)
            logits = torch.where(conditional.isneginf(), conditional, guided)  # −inf − −inf is no number
        return logits


def commit_quota(masked: torch.Tensor, steps: torch.Tensor, step: int) -> torch.Tensor:
    """Tokens to commit in `step` (from 0) of a block: equal shares, the remainder one by one on the first steps."""
    share, remainder = masked // steps.clamp(min=1), masked % steps.clamp(min=1)
    return (share + (step < remainder)) * (step < steps)


class _Sampler:
    """The choices of a step: which distribution, which positions, which tokens. Holds settings, no state but noise."""

    def __init__(self, settings, logits_processor, eos_ids, mask_token_id, generator):
        good = settings.eos_policy == "none" or len(eos_ids) > 0
        _require(good, f"`eos_policy` must be 'none' without an `eos_token_id`, got {settings.eos_policy!r}")
        self.settings, self.eos_ids, self.mask_token_id, self.generator = settings, eos_ids, mask_token_id, generator
        self.shapers = LogitsProcessorList(item for item in logits_processor if not isinstance(item, _WARPERS))
        self.warpers = LogitsProcessorList(item for item in logits_processor if isinstance(item, _WARPERS))
        self.by_sample = settings.remasking == "low_confidence" and settings.position_score == "sampled_prob"

    def shape(self, logits, ids, active, visible):
        """The model's distribution as positions are ranked by: repetition penalty, processors, EOS policy. `[N, V]`"""
        row_of = active.nonzero()[:, 0]  # [N]
        penalty = self.settings.repetition_penalty
        if penalty != 1:
            seen = logits.new_zeros(len(ids), logits.shape[1] + 1, dtype=torch.bool)  # [R, V + 1]
            hidden = (ids == self.mask_token_id) | ~visible
            seen = seen.scatter(1, ids.masked_fill(hidden, logits.shape[1]), True)[row_of, :-1]
            logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
        if self.shapers:
            logits = self.shapers(ids[row_of], logits)
        never = [torch.tensor([self.mask_token_id], device=logits.device)]
        if self.settings.eos_policy == "forbid":
            never.append(self.eos_ids)
        return logits.index_fill(1, torch.cat(never), -torch.inf)

    def select(self, logits, ids, active, quota):
        """The best `quota` (`[R]`) positions of each row as a mask `[R, W]`, and their tokens, row by row."""
        row_of = active.nonzero()[:, 0]  # [N]
        tokens = self.draw(logits, ids[row_of]) if self.by_sample else None
        scores = self.score(logits, tokens)  # [N]
        if self.settings.eos_policy == "last":
            likely = tokens if self.by_sample else logits.argmax(-1)
            scores = scores - 1e3 * torch.isin(likely, self.eos_ids)  # no score spans more than ln V
        ranked = torch.full(active.shape, -torch.inf, dtype=torch.double, device=logits.device)
        ranked[active] = scores
        ranks = ranked.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        selected = active & (ranks < quota[:, None])  # [R, W]
        chosen = selected[active]  # [N]
        return selected, tokens[chosen] if self.by_sample else self.draw(logits[chosen], ids[row_of[chosen]])

    def score(self, logits, tokens):
        """`[N]`, the higher the sooner."""
        if self.settings.remasking == "random":
            return self.noise((len(logits),), logits.device)
        probabilities = logits.softmax(-1, dtype=torch.double)  # float32 would tie what is nearly certain
        if self.settings.position_score == "entropy":
            return -torch.special.entr(probabilities).sum(-1)
        if self.settings.position_score == "sampled_prob":
            return probabilities.gather(1, tokens[:, None])[:, 0]
        best, second = probabilities.topk(2).values.unbind(-1)
        return best - second if self.settings.position_score == "margin" else best

    def draw(self, logits, ids):
        """One token from each distribution, `[N]`: argmax of z/T + Gumbel noise, in float64; T = 0 has no noise."""
        if self.settings.temperature == 0:
            return logits.argmax(-1)
        logits = self.warpers(ids, logits.double())
        return (logits - (-self.noise(logits.shape, logits.device).log()).log()).argmax(-1)

    def noise(self, shape, device):
        """Uniform on [0, 1), float64, from the caller's generator wherever it lives."""
        source = device if self.generator is None else self.generator.device
        return torch.rand(shape, generator=self.generator, dtype=torch.double, device=source).to(device)


class _Canvas:
    """
    The rows in the making, `[B, W]`: the prompt, then masks, then, for a model with `config.block_length`, what its
    last block lacks: masks that are seen and never decoded, so that the block looks as it did in training.
    """

    def __init__(self, input_ids, attention_mask, settings, config):
        rows, self.prompt_length = input_ids.shape
        self.length = settings.max_length
        new_tokens = self.length - self.prompt_length
        whole, name = config.block_length, "the model's `config.block_length`"
        if whole is None:
            whole, name = new_tokens, "`max_new_tokens`"
        block_length = settings.block_length or whole or 1
        _require(whole % block_length == 0, f"`block_length` must divide {name}, got {block_length} and {whole}")
        visible = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.device)
        visible = pad(visible.bool(), (0, new_tokens), value=True)
        lacking = -visible.sum(1) % (config.block_length or 1)  # [B]
        width = int(lacking.max())
        self.ids = pad(input_ids, (0, new_tokens + width), value=config.mask_token_id)  # [B, W]
        self.visible = torch.cat((visible, torch.arange(width, device=input_ids.device) < lacking[:, None]), dim=1)
        self.all_visible = bool(self.visible.all())
        self.undecided = (self.ids == config.mask_token_id) & self.visible
        self.undecided[:, self.length :] = False
        message = f"`max_new_tokens` must be > 0 for a prompt without mask tokens, got {new_tokens}"
        _require(bool(self.undecided.any()), message)
        self.given = self.visible & (self.ids != config.mask_token_id)  # the prompt, for guidance
        self.columns = torch.arange(self.length, device=input_ids.device)
        positions = torch.arange(self.ids.shape[1], device=input_ids.device) - self.prompt_length
        if config.block_length is not None:  # the grid of training, from the row's first token
            positions = self.visible.long().cumsum(1) - 1
        self.blocks = (positions.clamp(min=0) // block_length).expand_as(self.ids)
        pad_token_id = settings._pad_token_tensor
        self.pad_token_id = None if pad_token_id is None else pad_token_id.to(input_ids.device)
        self.committed = torch.zeros_like(self.undecided)
        self.forwards = torch.zeros(rows, dtype=torch.long, device=input_ids.device)
        self.last = torch.full_like(self.forwards, self.length - 1)  # [B], the last column that is kept
        self.checked = torch.full_like(self.forwards, self.prompt_length)  # [B], columns the criteria have seen
        self.put = int(self.decided_columns().min())  # columns that the streamer has

    def next_block(self):
        """Each row's first block that holds undecided positions: these positions, `[B, W]`."""
        first = self.blocks.masked_fill(~self.undecided, self.ids.shape[1]).amin(1, keepdim=True)
        return self.undecided & (self.blocks == first)

    def commit(self, rows, selected, tokens):
        committed = torch.zeros_like(self.undecided)
        committed[rows] = selected
        self.ids[committed] = tokens
        self.undecided &= ~committed
        self.committed |= committed
        self.forwards[rows] += 1

    def decided_columns(self):
        """`[B]`: columns before the first undecided one."""
        return _first(self.undecided[:, : self.length])

    def stop_at_eos(self, eos_ids, release):
        """Ends rows at their first generated EOS, if nothing is masked before it; `release`: their work, too."""
        if len(eos_ids) == 0:
            return
        is_eos = torch.isin(self.ids[:, : self.length], eos_ids) & (self.columns >= self.prompt_length)
        first = _first(is_eos)  # [B]
        ended = first < self.decided_columns()
        self.last = torch.where(ended, torch.minimum(first, self.last), self.last)
        if release:
            self.undecided &= ~ended[:, None]

    def stop_by(self, criteria):
        """Asks the stopping criteria about the columns decided since the last call, one after the other."""
        done_here = (EosTokenCriteria, MaxLengthCriteria if criteria.max_length == self.length else EosTokenCriteria)
        criteria = [item for item in criteria if not isinstance(item, done_here)]
        decided = torch.minimum(self.decided_columns(), self.last + 1)  # [B]
        if not criteria or int(decided.min()) < self.prompt_length:
            return
        _require(self.pad_token_id is not None, "`pad_token_id` must be set for `stopping_criteria`, got None")
        timers = StoppingCriteriaList(item for item in criteria if isinstance(item, MaxTimeCriteria))
        others = StoppingCriteriaList(item for item in criteria if not isinstance(item, MaxTimeCriteria))
        stopped = torch.zeros_like(decided, dtype=torch.bool)
        for offset in range(int((decided - self.checked).max()) if others else 0):
            end = torch.minimum(self.checked + offset, decided - 1)  # [B], the prefix's last column
            width = int(end.max()) + 1
            index = self.columns[:width] - (width - 1 - end)[:, None]
            prefixes = self.ids.gather(1, index.clamp(min=0)).where(index >= 0, self.pad_token_id)  # flush right
            done = others(prefixes, None) & (self.checked + offset < decided) & ~stopped
            self.last = torch.where(done, torch.minimum(end, self.last), self.last)
            stopped |= done
        out_of_time = timers(self.ids, None)
        self.last = torch.where(out_of_time, torch.minimum(decided - 1, self.last), self.last)
        self.undecided &= ~(stopped | out_of_time)[:, None]
        self.checked = decided

    def take_finished_columns(self):
        """`[B, n]`: columns final in all rows and new to the streamer; none after the last row's end."""
        final = torch.where(self.undecided.any(1), self.decided_columns(), self.length).amin()
        start, self.put = self.put, max(self.put, int(torch.minimum(final, self.last.amax() + 1)))
        return self.output()[:, start : self.put]

    def output(self):
        ids, after = self.ids[:, : self.length], self.columns > self.last[:, None]
        return ids if self.pad_token_id is None else ids.where(~after, self.pad_token_id)

    def tokens_per_forward(self):
        kept = self.committed[:, : self.length] & (self.columns <= self.last[:, None])
        return kept.sum(1) / self.forwards.clamp(min=1)


def _first(mask):
    """`[B]`: the first True column of each row, or the number of columns."""
    return torch.where(mask.any(1), mask.int().argmax(1), mask.shape[1])


def _contradict(do_sample, temperature):
    return do_sample is not None and isinstance(temperature, (int, float)) and bool(do_sample) != (temperature > 0)


def _refuse(name, value):
    """For what is supported only unset."""
    plain = isinstance(value, (int, float, str, list))
    shown = value if plain else type(value).__name__
    message = f"`{name}` is not supported by the diffusion `generate`: it must be unset, got {shown}"
    _require(value is None or (plain and not value), message)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
