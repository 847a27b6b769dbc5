"""How tokens are chosen: the options of a call, what a checkpoint makes of them, and what is reported."""

import contextlib
import sys
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Literal

from nanollada.trainers.scoring.kind import is_diffusion


def _without_torch(name: str) -> ModuleType:
    """A module of the models' package, which is not imported with it: help needs no torch."""
    if "_nanollada_rules" not in sys.modules:
        package = sys.modules["_nanollada_rules"] = ModuleType("_nanollada_rules")
        package.__path__ = find_spec("nanollada.modeling_nanollada").submodule_search_locations
    return import_module(f"_nanollada_rules.{name}")


OWN_SETTINGS = _without_torch("rules_nanollada").OWN_SETTINGS
_PRESETS = _without_torch("presets_nanollada")
PRESETS = _PRESETS.PRESETS
DIFFUSION_ONLY = ("preset", *OWN_SETTINGS)
DEFAULT_NEW_TOKENS = 128  # where neither the call nor the checkpoint says; transformers' 20 cuts most answers


@dataclass
class _DecodingArguments:
    max_new_tokens: int | None = field(
        default=None, metadata={"help": f"Tokens to write; {DEFAULT_NEW_TOKENS} where the checkpoint doesn't say."}
    )
    temperature: float | None = field(default=None, metadata={"help": "0: always the likeliest token."})
    top_k: int | None = field(default=None, metadata={"help": "Draw from the k likeliest tokens; 0: from all."})
    top_p: float | None = field(default=None, metadata={"help": "Draw from the likeliest tokens of this total mass."})
    repetition_penalty: float | None = field(default=None, metadata={"help": "Above 1: less of what was said."})
    use_cache: bool | None = field(
        default=None, metadata={"help": "Keep keys and values where that is exact (default)."}
    )

    def given(self) -> dict:
        """The options that were set, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def _option(name: str, kind, meaning: str) -> tuple:
    return name, kind | None, field(default=None, metadata={"help": f"Diffusion: {meaning}"})


DecodingArguments = make_dataclass(
    "DecodingArguments",
    [
        _option("preset", Literal[tuple(PRESETS)], _PRESETS.PRESET_HELP),
        *(
            _option(name, Literal[setting.allowed] if setting.type is str else setting.type, setting.help)
            for name, setting in OWN_SETTINGS.items()
        ),
    ],
    bases=(_DecodingArguments,),
    namespace={
        "__doc__": "How tokens are chosen. What is not given is the checkpoint's `generation_config.json`'s to say.",
        "__module__": __name__,
    },
)


def split_options(decoding: dict) -> dict[str, dict]:
    """The options for each model: those that only diffusion knows go to the diffusion model alone."""
    shared = {name: value for name, value in decoding.items() if name not in DIFFUSION_ONLY}
    return {"ar": shared, "diffusion": decoding}


def generation_settings(model, **given) -> dict:
    """
    What `model.generate` gets for the options that were given (`None`: not given); the rest is left to the checkpoint.

    An AR model gets `do_sample` to fit the temperature, and no truncation to 50 tokens (transformers' default for
    sampling) unless somebody asked for it: AR and diffusion shall draw from the same distribution.

    Raises:
        `ValueError`: for values out of range, options that an AR model has no use for, and `top_k` or `top_p` where
            nothing is drawn.
    """
    from nanollada.modeling_nanollada import NanoLLaDAGenerationConfig

    settings = {name: value for name, value in given.items() if value is not None}
    NanoLLaDAGenerationConfig(**settings)  # checks the values, for AR models, too
    config = model.generation_config
    if is_diffusion(model):
        settings = _PRESETS.expand_preset(settings)
        temperature = settings.get("temperature", config.get_temperature())
    else:
        for name in DIFFUSION_ONLY:
            if name in settings:
                raise ValueError(f"`{name}` is for diffusion models, got {settings[name]!r} for an autoregressive one")
        temperature = settings.pop("temperature", None)
        if temperature is None:
            temperature = (1.0 if config.temperature is None else config.temperature) if config.do_sample else 0
        else:
            settings |= {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        if temperature and config.top_k is None:
            settings.setdefault("top_k", 0)
    for name in ("top_k", "top_p"):
        if given.get(name) and not temperature:
            raise ValueError(f"`{name}` needs a `temperature` above 0, got {given[name]} and a greedy choice")
    if not has_own_limit(model):
        settings.setdefault("max_new_tokens", DEFAULT_NEW_TOKENS)
    return settings


def has_own_limit(model) -> bool:
    """Whether the checkpoint says how much it writes at most."""
    return model.generation_config.max_new_tokens is not None or model.generation_config.max_length is not None


def new_tokens_limit(model, prompt_length: int, default: int = DEFAULT_NEW_TOKENS) -> int:
    """
    The most tokens that a checkpoint writes of its own accord behind a prompt; `default` where it doesn't say.

    Raises:
        `ValueError`: for a prompt that leaves no room in the checkpoint's `max_length`.
    """
    config = model.generation_config
    if config.max_new_tokens is not None or config.max_length is None:
        return default if config.max_new_tokens is None else config.max_new_tokens
    if prompt_length >= config.max_length:
        raise ValueError(
            f"`max_new_tokens` must be given for a prompt of {prompt_length} tokens: the checkpoint's `max_length`, "
            f"prompt included, is {config.max_length}"
        )
    return config.max_length - prompt_length


def effective_settings(model, **given) -> dict:
    """What decides the text, to be reported: the options that were given, and what the checkpoint adds to them."""
    names = [item.name for item in fields(DecodingArguments)]
    names = [name for name in names if name not in ("preset", "use_cache")]  # is other settings; changes no text
    own = {name: getattr(model.generation_config, name, None) for name in names}
    settings = generation_settings(model, **given)
    if is_diffusion(model):  # some of the checkpoint's yields to what was given
        used = model._prepare_generation_config(None, **settings)[0]
        own |= {name: getattr(used, name, None) for name in OWN_SETTINGS if own[name] is not None}
    if settings.get("max_new_tokens", own["max_new_tokens"]) is None:
        own["max_length"] = model.generation_config.max_length
    return {name: value for name, value in {**own, **settings}.items() if value is not None}


def draws(model, **given) -> bool:
    """Whether what `generate` writes with these options depends on a seed."""
    from nanollada.modeling_nanollada.rules_nanollada import rule_of

    settings = generation_settings(model, **given)
    if not is_diffusion(model):
        return bool(settings.get("do_sample", model.generation_config.do_sample))
    used = model._prepare_generation_config(None, **settings)[0]
    return bool(used.temperature or used.remasking == "random" or rule_of(used).draws)


@contextlib.contextmanager
def default_decoding(model):
    """Within it `model.generate` knows the special tokens of the checkpoint's generation config, and nothing else."""
    own = model.generation_config
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    plain = type(own)(**{name: getattr(own, name) for name in names})
    if not is_diffusion(model):  # one that samples excludes the mask by itself
        plain.suppress_tokens = [model.config.mask_token_id]
    model.generation_config = plain
    try:
        yield
    finally:
        model.generation_config = own
