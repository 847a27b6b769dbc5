"""The settings of the diffusion `generate`."""

import copy
import difflib
import textwrap

from transformers import GenerationConfig

from .presets_nanollada import PRESET_HELP, PRESETS, expand_preset
from .rule_nanollada import AT_LEAST_ONE, BELOW_ONE, NOT_NEGATIVE, POSITIVE, PROBABILITY, SHARE, Setting
from .rules_nanollada import OWN_SETTINGS, RULES, SHARED, editor_of, expander_of, is_set, rule_of

# What the diffusion `generate` does with each field of transformers' `GenerationConfig`: works, refused, or harmless.
UNSUPPORTED = (
    "num_beams num_beam_groups early_stopping length_penalty diversity_penalty penalty_alpha dola_layers constraints "
    "force_words_ids use_mtp prompt_lookup_num_tokens max_matching_ngram_size is_assistant num_assistant_tokens "
    "num_assistant_tokens_schedule assistant_confidence_threshold assistant_early_exit assistant_lookbehind "
    "target_lookbehind assistant_ensemble_weight speculation_type guidance_scale min_length min_new_tokens "
    "no_repeat_ngram_size encoder_no_repeat_ngram_size encoder_repetition_penalty decoder_start_token_id "
    "bad_words_ids sequence_bias forced_bos_token_id forced_eos_token_id exponential_decay_length_penalty "
    "begin_suppress_tokens remove_invalid_values watermarking_config token_healing output_scores output_logits "
    "output_attentions output_hidden_states cache_config max_cache_len prefill_chunk_size low_memory compile_config "
    "continuous_batching_config"
).split()
HARMLESS = {
    "renormalize_logits": "every distribution here is normalised",
    "disable_compile": "nothing is compiled behind the caller's back",
    "transformers_version": "transformers' own note of who wrote the file",
}
# Values that switch a refused field off, beside `None` and transformers' own defaults.
_OFF = {
    "guidance_scale": 1,
    "min_new_tokens": 0,
    "penalty_alpha": 0,
    **dict.fromkeys("output_attentions output_hidden_states output_logits".split(), False),
    **dict.fromkeys("use_mtp is_assistant token_healing low_memory".split(), False),
}

# Of transformers' fields, what works: alone to be checked by range or choice, or token ids.
_THEIRS = {
    **dict.fromkeys(("max_new_tokens", "top_k"), Setting(int, NOT_NEGATIVE)),
    **dict.fromkeys(("max_length", "num_return_sequences"), Setting(int, AT_LEAST_ONE)),
    **dict.fromkeys(("temperature", "max_time"), Setting(float, NOT_NEGATIVE)),
    **dict.fromkeys(("top_p", "top_h", "typical_p"), Setting(float, SHARE)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff"), Setting(float, BELOW_ONE)),
    **dict.fromkeys("do_sample return_dict_in_generate renormalize_logits disable_compile".split(), Setting(bool)),
    "min_p": Setting(float, PROBABILITY),
    "repetition_penalty": Setting(float, POSITIVE),
    "cache_implementation": Setting(str, ("dynamic", "static")),
    "use_cache": Setting(bool, default=True),
}
_TOKENS = {
    "pad_token_id": "an integer",
    "bos_token_id": "an integer",
    "eos_token_id": "an integer or a list of integers, not empty",
    "suppress_tokens": "a list of integers",
}
WORKING = [name for name in (*_THEIRS, *_TOKENS, "stop_strings") if name not in HARMLESS]
OWN_FIELDS = {  # what the class has beside transformers' fields; the last says something about the model
    **OWN_SETTINGS,
    "trained_length": Setting(
        int, AT_LEAST_ONE, "tokens of the longest row in training; a longer canvas is warned of."
    ),
}
_CHECKED = {**_THEIRS, **OWN_FIELDS}
_DEFAULTS = {name: setting.default for name, setting in _CHECKED.items() if setting.default is not None}
# They decide without scores.
_ALONE = [rule.switch for rule in RULES.values() if not rule.ranks and rule.refines is None]


def _unset(settings, names) -> bool:
    return not any(is_set(getattr(settings, name)) for name in names)


def ticked(names, between: str = ", ") -> str:
    """Names in backticks."""
    return between.join(f"`{name}`" for name in names)


# What only some decoding reads: the fields with the value that does nothing, what decides about them, what they need.
_CONDITIONAL = (
    (
        {"top_k": 0, "top_p": 1, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0, "min_p": 0, "top_h": None},
        ("do_sample", "temperature"),
        "needs a `temperature` above 0",
        lambda settings: settings.get_temperature() > 0,
    ),
    (
        {name: _DEFAULTS[name] for name in ("ramp_start", "ramp_end")},
        ("commit_schedule",),
        "needs the `commit_schedule` 'ramp'",
        lambda settings: settings.commit_schedule == "ramp",
    ),
    *(
        (
            {name: setting.default for name, setting in rule.settings.items() if name != rule.switch},
            (rule.switch,),
            f"needs `{rule.switch}`",
            lambda settings, rule=rule: not _unset(settings, [rule.switch]),
        )
        for rule in RULES.values()
        if rule.switch
    ),
    *(
        (
            {name: setting.default},
            switches,
            f"needs {ticked(switches, ' or ')}",
            lambda settings, switches=switches: not _unset(settings, switches),
        )
        for name, (switches, setting) in SHARED.items()
    ),
    (
        {"edit_margin": _DEFAULTS["edit_margin"]},
        ("do_sample", "temperature"),
        "is for greedy edits: it needs a `temperature` of 0",
        lambda settings: settings.get_temperature() == 0,
    ),
    (
        {"max_edits": _DEFAULTS["max_edits"]},
        ("edit_rule", "do_sample", "temperature"),
        "is for greedy edits by `edit_rule` 'replace'",
        lambda settings: settings.get_temperature() == 0 and settings.edit_rule != "remask",
    ),
    (
        {"early_stop": _DEFAULTS["early_stop"]},
        ("eos_policy",),
        "needs another `eos_policy` than 'cut'",
        lambda settings: settings.eos_policy != "cut",
    ),
    (
        {"position_score": _DEFAULTS["position_score"]},
        ("remasking", *_ALONE),
        f"needs the `remasking` 'low_confidence' and no {ticked(_ALONE, ' or ')}",
        lambda settings: _unset(settings, _ALONE) and settings.remasking != "random",
    ),
    (
        {"remasking": _DEFAULTS["remasking"]},
        tuple(_ALONE),
        f"needs decoding without {ticked(_ALONE, ' or ')}",
        lambda settings: _unset(settings, _ALONE),
    ),
)


class NanoLLaDAGenerationConfig(GenerationConfig):
    r"""
    Settings of the diffusion `generate`; also accepted as its keyword arguments. Saved as `generation_config.json`.

    Args:
        max_new_tokens (`int`, *optional*): Mask tokens appended to the prompt; with 0 only the prompt's own masks are
            filled. As in transformers, `max_length` is the alternative and 20 new tokens are the default.
        block_length (`int`, *optional*): Tokens per block; blocks are decoded left to right. Defaults to the model's
            `config.block_length`, else to `max_new_tokens` (one block: pure diffusion). Without
            `config.block_length` the last block may be shorter. With it, blocks are cut at multiples of
            `block_length` from the row's first token, as in training, so the first and the last block may be partial;
            it must divide `config.block_length`, since a longer one would show the model half-decoded context.
        steps (`int`, *optional*): Denoising steps *per block*; a block of m masks commits ⌊m/steps⌋ tokens a step and
            one more in the first m mod `steps`. More steps than masks, and `None`, mean one token per step. LLaDA
            counts the steps of all blocks: its `steps=S, gen_length=G, block_length=b` is `steps=S * b // G` here.
        temperature (`float`, *optional*): 0 is greedy, as is leaving both `temperature` and `do_sample` unset. With
            `do_sample=True` the default is 1.0. Tokens are drawn by Gumbel-max in float64 (arXiv 2409.02908).
        do_sample (`bool`, *optional*): `False` is the same as `temperature=0`. Unset, the temperature decides.
        top_k (`int`, *optional*), top_p (`float`, *optional*): Truncate each draw's distribution. Off by default.
            So do transformers' `min_p`, `top_h`, `typical_p`, `epsilon_cutoff` and `eta_cutoff`. A call that sets one
            and decodes greedily is refused; what a checkpoint saved for draws is passed over, as in transformers.
        remasking (`str`, *optional*, defaults to `"low_confidence"`): Which positions to commit: those with the best
            `position_score`, or `"random"` ones (the reverse process of LLaDA's eq. 3, which has no `position_score`).
        position_score (`str`, *optional*, defaults to `"max_prob"`): `"max_prob"`: the largest probability;
            `"margin"`: its distance to the second; `"entropy"`: the lowest entropy first; `"sampled_prob"`: the
            probability of the drawn token, LLaDA's rule, which at temperatures above 0 distorts the samples towards
            likely tokens. Scores come from the distribution before temperature, `top_k` and `top_p` (and after all
            else), as in LLaDA. Ties go to the leftmost position.
        commit_schedule (`str`, *optional*, defaults to `"equal"`): How many tokens a step commits at least (with the
            rules below) or exactly (without): `"equal"` shares of `steps`; `"ratio"`: of n masks round(n·s/t) stay
            masked; `"ramp"`: a growing share of the open masks, and with the rules below the most that they may take.
        ramp_start (`float`, *optional*, defaults to 0.08), ramp_end (`float`, *optional*, defaults to 0.5): The ramp's
            share for a block without and with nearly all positions decided.
        max_commits (`int`, *optional*): Never more tokens per step and row; a block takes as many steps as it needs.
        cfg_scale (`float`, *optional*, defaults to 0.0): Classifier-free guidance w: logits become
            z_u + (w + 1)(z_c − z_u), with z_u from a row whose prompt is masked. 0 is off. Masks inside the prompt are
            no part of it: once filled, z_u sees them as it sees new tokens.
        repetition_penalty (`float`, *optional*): As in transformers; counts the tokens visible in the row.
        eos_policy (`str`, *optional*, defaults to `"none"`): `"last"`: positions whose likeliest token (drawn token,
            with `"sampled_prob"`) is an EOS are committed after all others of the block. `"cut"`: what the output
            lacks is left out as soon as it is known: behind an EOS that is decided nothing is, and of a block's open
            positions those behind the first that is likelier an EOS than not wait for it. `"forbid"`: never an EOS.
        early_stop (`bool`, *optional*, defaults to `True`): Stop working on a row once an EOS has nothing masked
            before it. What comes after is padded in any case, so this saves time and changes no token that is kept.
        grow_length (`bool`, *optional*, defaults to `False`): Show the model no masks behind the current block ("block
            diffusion LLaDA"). A model with `config.block_length` never sees them.
        use_cache (`bool`, *optional*, defaults to `True`): Keep keys and values of finished blocks where that is
            exact: in models with `config.block_length`.
        approximate_cache (`str`, *optional*): For models without: freeze keys and values outside the current block
            while it is decoded, those before it (`"prefix"`) or all (`"dual"`; Fast-dLLM). Changes results.
        cache_implementation (`str`, *optional*): `"dynamic"` (default): the cache grows. `"static"`: it has its final
            size at once, so that a compiled forward sees one shape. Without a cache neither means anything.
        trained_length (`int`, *optional*): Tokens of the longest row in the model's training, its masks included; the
            trainer writes it. A model without `config.block_length` that is shown more at once, which it never
            learned to fill, warns once. Changes no result.
        preset (`str`, *optional*): A publication's way of decoding, one of `PRESETS`: its settings are those that are
            not given. No field: what is saved are the settings.

    Raises:
        `ValueError`: for unknown names, for values out of range, for `do_sample` and `temperature` that contradict
            each other, for commit rules that exclude each other, and for settings that the others leave without a use
            (`top_k` beside `do_sample=False`, `ramp_start` beside another `commit_schedule`). A checkpoint's plain
            `generation_config.json` may hold unknown names; then `generate` refuses them.
    """

    def __init__(self, **kwargs):
        kwargs = expand_preset(kwargs)
        known = {*vars(GenerationConfig()), *OWN_FIELDS}
        for name, value in kwargs.items():
            fine = name in known or name.startswith("_") or value is None
            require(fine, f"`{name}` is no setting of the diffusion `generate`{near_miss(name, known)}, got {value!r}")
        for name in OWN_FIELDS:
            setattr(self, name, kwargs.get(name))
        super().__init__(**{name: value for name, value in kwargs.items() if name not in OWN_FIELDS})
        refuse_idle(self, {name: value for name, value in kwargs.items() if value is not None}, by_word=True)

    @classmethod
    def from_config(cls, config: GenerationConfig) -> "NanoLLaDAGenerationConfig":
        """The same settings as this class. A plain config's `_from_model_config` would drop our fields on reload."""
        settings = cls()
        given = {key: value for key, value in config.to_dict().items() if not key.startswith("_")}
        settings.update(**given, allow_custom_entries=True)
        return settings

    @classmethod
    def from_model_config(cls, model_config) -> "NanoLLaDAGenerationConfig":
        """As in transformers: the special tokens. The base method fails for subclasses with fields of their own."""
        return cls.from_config(GenerationConfig.from_model_config(model_config))

    @staticmethod
    def _get_default_generation_params() -> dict:
        defaults = GenerationConfig._get_default_generation_params()
        for name in ("do_sample", "temperature", "top_k", "top_p"):  # unset means greedy, and no truncation
            del defaults[name]
        return {**defaults, **_DEFAULTS}

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
            if not contradict(**{name: kwargs.get(name), other: getattr(self, other)}):
                continue
            if defaults_only:
                del kwargs[name]  # what is set stays
            elif kwargs.get(other) is None:
                setattr(self, other, None)  # the later word counts
        return super().update(defaults_only, allow_custom_entries, **kwargs)

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None) -> None:
        self._validate_values()
        self._validate_rule()
        rule = "`do_sample` must be False where `temperature` is 0 and True where it is not"
        message = f"{rule}, got {self.do_sample} and {self.temperature}"
        require(not contradict(self.do_sample, self.temperature), message)
        # The base class takes an unset `do_sample` for greedy, and knows no prompt that holds masks.
        view = copy.copy(self)
        view.do_sample = self.get_temperature() > 0
        view.temperature = self.temperature if view.do_sample else None
        view.max_new_tokens = self.max_new_tokens or None
        super(NanoLLaDAGenerationConfig, view).validate(strict=strict, user_set_attributes=user_set_attributes)

    def _validate_values(self) -> None:
        """Each setting for itself."""
        for name, setting in _CHECKED.items():
            refusal = setting.refusal(name, getattr(self, name))
            require(not refusal, refusal)
        for name, kind in _TOKENS.items():
            value = getattr(self, name)
            several = isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) > 0
            fits = value is None or ("list" if several else "an integer") in kind
            fits = fits and (value is None or bool(token_ids(value)) or "not empty" not in kind)
            require(fits and all(map(is_integer, token_ids(value))), f"`{name}` must be {kind}, got {value!r}")
        texts = [self.stop_strings] if isinstance(self.stop_strings, str) else self.stop_strings
        good = texts is None or (isinstance(texts, (list, tuple)) and texts and all(map(is_text, texts)))
        require(good, f"`stop_strings` must be a string or a list of them, none empty, got {self.stop_strings!r}")

    def check_tokens(self, vocab_size: int, mask_token_id: int) -> None:
        """Compares the token ids with a model's: in the vocabulary, none the mask token, something left to predict."""
        for name in _TOKENS:
            value = getattr(self, name)
            good = all(0 <= token < vocab_size for token in token_ids(value))
            require(good, f"`{name}` must lie in [0, `vocab_size`), got {value!r} and {vocab_size}")
            masked = name != "suppress_tokens" and mask_token_id in token_ids(value)
            require(not masked, f"`{name}` must differ from the model's `mask_token_id`, got {mask_token_id} for both")
        never = {mask_token_id, *token_ids(self.suppress_tokens)}
        never.update(token_ids(self.eos_token_id) if self.eos_policy == "forbid" else ())
        message = f"`suppress_tokens` must leave a token of {vocab_size} to predict, got {len(never)} that may not be"
        require(len(never) < vocab_size, message)

    def check_edit_tokens(self, config) -> None:
        """A rule that removes and inserts needs a model that knows how to say so."""
        tokens = (config.delete_token_id, config.insert_token_id)
        for rule in filter(None, (rule_of(self), expander_of(self))):
            message = f"`{rule.switch}` needs a model with `config.delete_token_id` and `config.insert_token_id`"
            require(not rule.edit_tokens or None not in tokens, f"{message}, got {tokens[0]} and {tokens[1]}")

    def _validate_rule(self) -> None:
        """One commit rule at a time, with all that it needs."""
        switched = [rule for rule in RULES.values() if rule.switch]
        bases = [rule.switch for rule in switched if rule.refines is None and not rule.beside]
        named = [name for name in bases if not _unset(self, [name])]
        require(len(named) < 2, f"Only one of {ticked(bases)} may be set, got {named}")
        refining = [rule for rule in switched if rule.refines and not _unset(self, [rule.switch])]
        for rule in refining:
            base = RULES[rule.refines].switch
            require(not _unset(self, [base]), f"`{rule.switch}` refines `{base}`, which must be set, got None")
        names = [rule.switch for rule in refining]
        values = " and ".join(str(getattr(self, name)) for name in names)
        require(len(names) < 2, f"Only one of {ticked(names, ' and ')} may be set, got {values}")
        for rule in filter(None, (editor_of(self), expander_of(self), rule_of(self))):
            require(not rule.check(self), rule.check(self))
        probability = self.remasking != "random" and self.position_score != "entropy"
        needing = [rule.switch for rule in switched if rule.needs_probability]
        message = f"{ticked(needing, ' and ')} need probabilities: `remasking` must not be 'random', nor"
        found = f"`position_score` 'entropy', got {self.remasking!r} and {self.position_score!r}"
        require(probability or _unset(self, needing), f"{message} {found}")
        alone = f"`{rule.switch}` decides itself what a step commits:"
        scheduled = self.commit_schedule not in (None, "equal") or self.max_commits is not None
        message = f"`commit_schedule` and `max_commits` must be unset, got {self.commit_schedule!r} and"
        require(rule.ranks or not scheduled, f"{alone} {message} {self.max_commits}")
        late = self.eos_policy in ("last", "cut") and not rule.ranks
        require(not late, f"{alone} `eos_policy` must not be {self.eos_policy!r}, got {self.eos_policy!r}")
        good = self.steps is None or not rule.reads_all
        require(good, f"{alone} `steps` must be unset, got {self.steps}")
        message = f"`{rule.switch}` takes decisions back: `eos_policy` must not be 'cut', got 'cut'"
        require(not rule.revises or self.eos_policy != "cut", message)
        ramp = self.commit_schedule == "ramp" and self.steps is not None
        require(not ramp, f"`steps` must be unset where `commit_schedule` is 'ramp', got {self.steps}")


_RULES = "".join(
    f"        {name} (`{setting.type.__name__}`, *optional*): {source}: {setting.help}\n"
    for name, setting, source in (
        *((name, setting, rule.source) for rule in RULES.values() for name, setting in rule.settings.items()),
        *((name, setting, f"Of {ticked(switches, ' and ')}") for name, (switches, setting) in SHARED.items()),
    )
)
if NanoLLaDAGenerationConfig.__doc__:  # `python -OO` has none
    NanoLLaDAGenerationConfig.__doc__ = NanoLLaDAGenerationConfig.__doc__.replace("\n    Ra", f"{_RULES}\n    Ra")


def describe_settings() -> str:
    """A list of all settings for the docstring of `generate`: ours with a line each, transformers' by name."""
    lines = [f"as in transformers: {ticked(WORKING)}"]
    for name, setting in OWN_FIELDS.items():
        choices = f", one of {', '.join(map(repr, setting.allowed))}" if setting.type is str else ""
        default = "" if setting.default is None else f", defaults to {setting.default!r}"
        lines.append(f"`{name}` ({setting.type.__name__}{choices}{default}): {setting.help}")
    lines.append(f"`preset` (str, one of {', '.join(map(repr, PRESETS))}): {PRESET_HELP}")
    first, rest = " " * 16 + "- ", " " * 18
    return "\n".join(textwrap.fill(line, 117, initial_indent=first, subsequent_indent=rest) for line in lines)


def refuse_unused(settings: dict) -> None:
    """Fields of transformers that diffusion has no use for, and unknown ones, must be unset (or at their default)."""
    off = {**vars(GenerationConfig()), **GenerationConfig._get_default_generation_params(), **_OFF}
    known = {*WORKING, *HARMLESS, *OWN_FIELDS}
    for name, value in settings.items():
        if name not in known and not name.startswith("_") and not is_same(value, off.get(name)):
            refuse(name, value, "is not supported by" if name in UNSUPPORTED else "is not known to")


def refuse_idle(settings: NanoLLaDAGenerationConfig, given: dict, by_word: bool = False) -> None:
    """
    What was set and will not be read is refused: the fields of `_CONDITIONAL` in `given`.

    Args:
        settings ([`NanoLLaDAGenerationConfig`]): All settings of the decoding.
        given (`dict`): Those that were set by hand.
        by_word (`bool`, defaults to `False`): Only if what decides about them is in `given`, too: the rest may follow.
    """
    for fields, deciders, rule, used in _CONDITIONAL:
        if used(settings) or (by_word and not any(name in given for name in deciders)):
            continue
        for name in fields:
            idle = given.get(name) is not None and not is_same(given[name], fields[name])
            found = ", ".join(f"`{decider}` {getattr(settings, decider)!r}" for decider in deciders)
            require(not idle, f"`{name}` {rule}, got {given.get(name)!r} with {found}")


def set_by_the_call(given: GenerationConfig | None, kwargs: dict) -> dict:
    """
    What a call itself set: its keywords, and of its `generation_config` what these don't decide about. For that may be
    the model's own one (as in pipelines), whose `top_k` is passed over under `do_sample=False`.
    """
    found = {} if given is None else {name: value for name, value in given.to_dict().items() if value is not None}
    for fields, deciders, *_ in _CONDITIONAL:
        if any(kwargs.get(name) is not None or name in found for name in deciders):
            found = {name: value for name, value in found.items() if name not in fields}
    return {**found, **{name: value for name, value in kwargs.items() if value is not None}}


def refuse(name: str, value, how: str = "is not supported by") -> None:
    """Raises for what must be unset."""
    shown = repr(value) if isinstance(value, (int, float, str, list, dict, tuple)) else type(value).__name__
    require(value is None, f"`{name}` {how} the diffusion `generate`: it must be unset, got {shown}")


def near_miss(name: str, known) -> str:
    """ "" or " (did you mean `…`?)"."""
    found = difflib.get_close_matches(name, sorted(known), n=1)
    return f" (did you mean `{found[0]}`?)" if found else ""


def token_ids(value) -> list:
    """Token ids, one or several, as a list: of an integer, a list, a tensor, or `None`."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def is_same(value, other) -> bool:
    """Equality of plain values, 1 and True being two."""
    if value is None or other is None:
        return value is other
    plain = isinstance(value, (int, float, str)) and isinstance(value, bool) == isinstance(other, bool)
    return plain and value == other


def is_integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_text(value) -> bool:
    return isinstance(value, str) and bool(value)


def contradict(do_sample, temperature) -> bool:
    """Whether the two can't both be meant."""
    return do_sample is not None and isinstance(temperature, (int, float)) and bool(do_sample) != (temperature > 0)


def require(condition: bool, message: str) -> None:
    """Raises `ValueError(message)` unless `condition`."""
    if not condition:
        raise ValueError(message)
