"""The models. Importing this package registers them with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from .configuration_nanollada import NanoLLaDAConfig
from .generation_config_nanollada import NanoLLaDAGenerationConfig
from .generation_nanollada import NanoLLaDAGenerationOutput
from .modeling_nanollada import (
    NanoLLaDAForCausalLM,
    NanoLLaDAForMaskedLM,
    NanoLLaDAModel,
    NanoLLaDAPreTrainedModel,
)

# Of a tuple, the Auto classes take the one that `config.architectures` names.
AutoConfig.register("nanollada", NanoLLaDAConfig)
AutoModel.register(NanoLLaDAConfig, (NanoLLaDAModel, NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM))
AutoModelForCausalLM.register(NanoLLaDAConfig, (NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM))
AutoModelForMaskedLM.register(NanoLLaDAConfig, NanoLLaDAForMaskedLM)

__all__ = [
    "NanoLLaDAConfig",
    "NanoLLaDAForCausalLM",
    "NanoLLaDAForMaskedLM",
    "NanoLLaDAGenerationConfig",
    "NanoLLaDAGenerationOutput",
    "NanoLLaDAModel",
    "NanoLLaDAPreTrainedModel",
]
