"""What depends on the version of transformers: which are tested, how they name the cache, what they pass to `forward`.

transformers 5.24 renamed `past_key_values` to `cache`, in `forward`, in masks and in outputs. A model that takes any
keyword would have swallowed the new name and decoded every token without its past, in silence. So both names work
here, a name that nobody knows is refused, and on a transformers that nobody has tested the first cached step is
compared with a recomputation.
"""

import warnings
from dataclasses import dataclass, fields

import torch
import transformers
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

# The range that the tests ran on; `pyproject.toml` has the same.
OLDEST_TESTED = "5.17"
NEWEST_TESTED = "5.24"

SPELLINGS = ("cache", "past_key_values")
# The one that this transformers uses.
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"

# What transformers passes to any model's `forward`. It reads the first two itself, around ours; the others describe
# documents to flash attention, and would be ignored by any other implementation.
_RECORDED = ("output_attentions", "output_hidden_states")
_FLASH = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def is_tested() -> bool:
    """Whether the running transformers is in the tested range, by its minor version."""
    oldest, newest, running = map(_minor, (OLDEST_TESTED, NEWEST_TESTED, transformers.__version__))
    return oldest <= running <= newest


def describe_versions() -> str:
    """The running version and the tested ones, for messages."""
    return f"transformers {transformers.__version__} (tested: {OLDEST_TESTED} to {NEWEST_TESTED})"


def warn_if_untested() -> None:
    """A `UserWarning` on a transformers outside the tested range."""
    if not is_tested():
        warnings.warn(
            f"nanollada has not been tested with {describe_versions()}. The first `generate` with a cache compares "
            "its first cached step with a recomputation, and stops if they differ.",
            stacklevel=2,
        )


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """
    The cache under either of its names. Of two, one may be empty: PEFT's prefix beside the new one of `generate`.

    Raises:
        `TypeError`: if caches with keys are given under both.
    """
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        if cache.get_seq_length() and past_key_values.get_seq_length():
            raise TypeError(
                "`cache` and `past_key_values` are two names of one argument: only one may hold keys, got both"
            )
        return cache if cache.get_seq_length() else past_key_values
    return past_key_values if cache is None else cache


def refuse_unknown(name: str, kwargs: dict, attn_implementation: str = "sdpa") -> None:
    """
    Refuses keyword arguments of a `forward` that nobody reads.

    Args:
        name (`str`): The class, for the message.
        kwargs (`dict`): What is left of the call's keyword arguments.
        attn_implementation (`str`, *optional*): Flash attention alone reads `cu_seq_lens_q` and its like.

    Raises:
        `TypeError`: naming the first.
    """
    known = _RECORDED + (_FLASH if "flash" in attn_implementation else ())
    for argument in kwargs:
        if argument in known:
            continue
        hint = f" with `attn_implementation` {attn_implementation!r}" if argument in _FLASH else ""
        raise TypeError(
            f"{name}.forward() got an unexpected keyword argument '{argument}'{hint}; running {describe_versions()}"
        )


def refuse_batching(model, *args, **kwargs):
    """In the place of `generate_batch` and its like, whose paged cache is not built here. Raises `ValueError`."""
    raise ValueError(
        "Continuous batching needs a paged cache, which is not built: `generate` must be used, got a call"
    )


def refuse_paged(kwargs: dict) -> None:
    """Raises `ValueError` where `generate` would hand over to continuous batching, and give back bare prompts."""
    settings = kwargs.get("generation_config")
    kind = kwargs.get("cache_implementation", getattr(settings, "cache_implementation", None))
    if kind == "paged":
        raise ValueError("`cache_implementation` must not be 'paged', which is not built, got 'paged'")


_verified: set[str] = set()


def must_verify(kind: str) -> bool:
    """Whether cached decoding of this kind is still to be compared with a recomputation in this process."""
    return not is_tested() and kind not in _verified


def verify_cached(kind: str, cached: torch.Tensor, recomputed: torch.Tensor) -> None:
    """
    Compares the logits of a cached step with recomputed ones, and remembers that they agreed.

    Raises:
        `RuntimeError`: naming the versions, if they differ.
    """
    precision = {torch.float64: 1e-6, torch.float32: 1e-3}.get(cached.dtype, 0.1)
    if cached.shape != recomputed.shape or not torch.allclose(cached, recomputed, atol=precision, rtol=precision):
        raise RuntimeError(cache_fault("its logits differ from those recomputed without a cache"))
    _verified.add(kind)


@torch.no_grad()
def verify_autoregressive(model, generate) -> None:
    """
    Greedy tokens behind a short prompt: the logits of the cached steps against those of the whole row.

    Args:
        model ([`NanoLLaDAForCausalLM`]): The model.
        generate (`Callable`): transformers' own, bound to it.

    Raises:
        `RuntimeError`: as `verify_cached`, and if the model refuses what it is called with.
    """
    ids = torch.arange(model.config.vocab_size, device=model.device)
    ids = ids[ids != model.config.mask_token_id][:5][None]  # [1, P]
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "use_cache": True, "num_beams": 1}
    settings |= {"num_return_sequences": 1, "return_dict_in_generate": True, "output_logits": True}
    training = model.training
    model.eval()
    try:
        generated = generate(ids, attention_mask=torch.ones_like(ids), **settings)
        rows = model(generated.sequences[:, :-1], use_cache=False).logits  # [1, P + 2, V]
    except TypeError as error:
        raise RuntimeError(cache_fault(str(error))) from error
    finally:
        model.train(training)
    cached = torch.stack(generated.logits, dim=1)  # [1, 3, V]
    verify_cached("autoregressive", cached, rows[:, ids.shape[1] - 1 :].to(cached.dtype))


def cache_fault(what: str) -> str:
    """The message of cached decoding that must not go on."""
    return (
        f"`generate` with a cache is wrong on {describe_versions()}: {what}. Install a tested version, or call it "
        "with `use_cache=False`"
    )


def _minor(version: str) -> tuple[int, int]:
    major, minor, *_ = version.split(".")
    return int(major), int(minor)


@dataclass
class NanoLLaDAModelOutput(BaseModelOutputWithPast):
    """transformers' output of a backbone; the cache can be read as `cache` and as `past_key_values`."""


@dataclass
class NanoLLaDACausalLMOutput(CausalLMOutputWithPast):
    """transformers' output of an AR model; the cache can be read as `cache` and as `past_key_values`."""


def read_under_both_names(output_class: type) -> type:
    """Gives an output class the name of its cache that this transformers does not use."""
    (other,) = (name for name in SPELLINGS if name != CACHE)
    setattr(output_class, other, property(lambda self: getattr(self, CACHE)))
    return output_class


for _output_class in (NanoLLaDAModelOutput, NanoLLaDACausalLMOutput):
    read_under_both_names(_output_class)
