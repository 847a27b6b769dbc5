"""A policy before it is trained by rewards: what of it goes, and what of TRL's trainer is not put on it."""

import copy
from contextlib import contextmanager

from nanollada.modeling_nanollada.rules_nanollada import RULES

_BY_CONFIDENCE = [name for rule in RULES.values() if rule.ranks for name in rule.settings]


def drop_thresholds(model) -> dict:
    """
    Takes from a model's generation config what decides several tokens at once by their confidence: it was chosen for
    the model as it was, and training by rewards raises confidence.

    Returns:
        `dict`: the settings that went, with their values.
    """
    settings = model.generation_config
    dropped = {name: value for name in _BY_CONFIDENCE if (value := getattr(settings, name, None)) is not None}
    for name in dropped:
        setattr(settings, name, None)
    return dropped


def switch_off_dropout(model) -> None:
    """
    No dropout in the layers of our own models, whose config keeps its rates for other training. TRL's
    `disable_dropout` knows `torch.nn.Dropout` alone, and in evaluation mode there is no gradient checkpointing.
    """
    for module in model.modules():
        if hasattr(module, "hidden_dropout"):
            module.hidden_dropout = 0.0
        if hasattr(module, "is_causal") and hasattr(module, "scaling"):  # an attention layer, which reads its config
            module.config = copy.copy(module.config)
            module.config.attention_dropout = 0.0


@contextmanager
def replaced(module, **names):
    """Other values for `names` of a module, for a while; `AttributeError` for a name that it doesn't have."""
    before = {name: getattr(module, name) for name in names}
    try:
        for name, value in names.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
