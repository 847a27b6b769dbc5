"""What a checkpoint's generation config says is a default: how a call outranks it."""

from transformers import GenerationConfig, GenerationMixin

from .rules_nanollada import RULES

LENGTHS = ("max_new_tokens", "max_length")
_RULES = tuple(name for rule in RULES.values() for name in rule.settings)
_DECIDING = ("remasking", "position_score", "commit_schedule", "ramp_start", "ramp_end", "max_commits", "steps")
# What a checkpoint says about deciding tokens, and a call may contradict. The less of it yields, the better.
YIELDING = ((), ("eos_policy",), _RULES, ("eos_policy", *_RULES), ("eos_policy", *_RULES, *_DECIDING))


class SavedLengthsMixin(GenerationMixin):
    """
    A call's length, be it `max_new_tokens` or `max_length`, replaces the checkpoint's; without one nothing is written
    beyond the model's positions.
    """

    def _prepare_generation_config(self, generation_config, **kwargs):
        settings, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        prefer_the_calls_length(settings, generation_config, kwargs)
        return settings, model_kwargs

    def _prepare_generated_length(self, generation_config, **kwargs):
        settings = super()._prepare_generated_length(generation_config=generation_config, **kwargs)
        if getattr(settings, "_length_is_saved", False):
            settings.max_length = min(settings.max_length, self.config.max_position_embeddings)
        return settings


def prefer_the_calls_length(settings: GenerationConfig, given: GenerationConfig | None, kwargs: dict) -> None:
    """Of `LENGTHS` the one that a call says by keyword, or else by its config, and only then the checkpoint's."""
    layers = (kwargs, {} if given is None else vars(given))
    said = next(filter(None, ([name for name in LENGTHS if layer.get(name) is not None] for layer in layers)), [])
    for name in LENGTHS if said else ():
        if name not in said:
            setattr(settings, name, None)
    settings._length_is_saved = not said
