"""Small language models, autoregressive and masked diffusion: the classes to train, sample, evaluate and publish them.

`import nanollada` alone imports no other package; a name is imported when it is first asked for.
"""

from importlib import import_module
from importlib.metadata import version

__version__ = version("nanollada")

_MODULES = {
    "configuration_nanollada": ["NanoLLaDAConfig"],
    "modeling_nanollada": [
        "NanoLLaDAForCausalLM",
        "NanoLLaDAForMaskedLM",
        "NanoLLaDAGenerationConfig",
        "NanoLLaDAGenerationOutput",
        "NanoLLaDAModel",
        "NanoLLaDAPreTrainedModel",
    ],
    "trainers.causal": ["CausalConfig", "CausalTrainer"],
    "trainers.diffusion": ["DiffusionConfig", "DiffusionTrainer"],
    "trainers.data.prepare": ["DataArguments", "prepare_data"],
    "trainers.data.tokenizers": ["train_tokenizer"],
    "trainers.models": ["ModelArguments"],
    "trainers.registry": ["TRAINERS"],
    "trainers.run": ["train"],
    "trainers.scoring.likelihood": ["evaluate_likelihood"],
    "scripts.evaluation.checkpoint": ["evaluate_checkpoint"],
    "hub_upload.export": ["export"],
    "hub_upload.verify": ["verify"],
    "hub_upload.upload": ["upload"],
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'nanollada' has no attribute {name!r}")
    value = getattr(import_module(f"nanollada.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
