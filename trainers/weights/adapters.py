"""Adapters of PEFT on our models: their defaults, an adapted model to train, and an adapter's folder as a model.

Importing this tells PEFT what of a nanollada model it adapts by default.
"""

import copy
import os
from pathlib import Path

import peft
import torch
from peft.utils import constants
from transformers import AutoModelForCausalLM, set_seed

from nanollada.modeling_nanollada.loading_nanollada import check_files, load_model
from nanollada.trainers.records import read_json

CONFIG = "adapter_config.json"
OURS, THEIRS = "nanollada", "qwen3"  # the modules have the same names

for _table in [value for name, value in vars(constants).items() if name.startswith("TRANSFORMERS_MODELS_TO_")]:
    if THEIRS in _table:
        _table.setdefault(OURS, _table[THEIRS])


def adapted(model, config: "peft.PeftConfig", seed: int) -> "peft.PeftModel":
    """
    The model with a fresh adapter, which alone is trained.

    Args:
        model (`PreTrainedModel`): Ours.
        config (`peft.PeftConfig`): Without `target_modules`, PEFT's defaults for Qwen3; without `task_type`,
            CAUSAL_LM.
        seed (`int`): Of the adapter's weights.

    Raises:
        `ValueError`: for a `config` that is none, for a model with an adapter, and for one whose checkpoint holds the
            other kind of model: whoever loads the adapter would put it on that one.
    """
    if not isinstance(config, peft.PeftConfig):
        raise ValueError(f"`peft_config` must be PEFT's, such as a LoraConfig, got {type(config).__name__}")
    if isinstance(model, peft.PeftModel):
        raise ValueError("`peft_config` must be left out for a model that has an adapter, got both")
    own, saved = type(model).__name__, model.config.architectures
    if saved and own not in saved:
        raise ValueError(
            f"`peft_config` needs a checkpoint of the model that it adapts: {model.name_or_path} must hold a {own}, "
            f"got {saved[0]} (train one run without an adapter first)"
        )
    if config.task_type is None:  # else PEFT's Auto class would look for ours where a checkpoint's code isn't
        config = copy.copy(config)
        config.task_type = peft.TaskType.CAUSAL_LM
    set_seed(seed)
    model = peft.get_peft_model(model, config)
    if os.path.isdir(model.active_peft_config.base_model_name_or_path or ""):  # also from another folder
        model.active_peft_config.base_model_name_or_path = os.path.abspath(model.name_or_path)
    return model


def is_adapted(model: torch.nn.Module) -> bool:
    """Whether a model has an adapter of PEFT."""
    return isinstance(model, peft.PeftModel)


def check_unchanged(model, **settings) -> None:
    """
    Checks that an adapted model's config stays its checkpoint's: an adapter's folder holds no config of a model.

    Raises:
        `ValueError`: naming a setting of the run that would change it.
    """
    for name, value in settings.items() if is_adapted(model) else ():
        if value != (own := getattr(model.config, name)):
            raise ValueError(
                f"`{name}` must be the checkpoint's with an adapter, which carries none of its own, got {value} and "
                f"{own} in {model.config.name_or_path or 'the model'}"
            )


def is_adapter(path: str | os.PathLike) -> bool:
    """Whether a folder holds an adapter."""
    return (Path(path) / CONFIG).is_file()


def load_adapted(path: str | os.PathLike, argument: str = "checkpoint", **kwargs) -> "peft.PeftModel":
    """
    The model that an adapter's folder names, strictly loaded, with the adapter on it.

    Args:
        path (`str` or `os.PathLike`): A folder with `adapter_config.json`.
        argument (`str`, *optional*, defaults to `"checkpoint"`): What the caller calls it, for errors.
        kwargs: Those of `from_pretrained` for the model.

    Raises:
        `ValueError`: naming a model that is not there, and as `load_model`.
    """
    check_files(path)
    base = read_json(Path(path) / CONFIG)["base_model_name_or_path"]
    if not base or (os.path.isabs(base) and not os.path.isdir(base)):
        raise ValueError(f"`{argument}` must be an adapter whose model is there, got {path}, which adapts {base!r}")
    model = load_model(AutoModelForCausalLM, base, argument, **kwargs)
    if (Path(path) / "generation_config.json").is_file():  # what the adapted model was trained for
        model.generation_config = type(model.generation_config).from_pretrained(path)
    return peft.PeftModel.from_pretrained(model, str(path))


def describe(model) -> dict | None:
    """What `run.json` says of an adapter: its settings that are not PEFT's defaults, and how much of it is trained."""
    if not is_adapted(model):
        return None
    config = model.active_peft_config
    defaults = vars(type(config)())
    defaults["base_model_name_or_path"] = config.base_model_name_or_path  # `init` in the same file
    chosen = {name: value for name, value in config.to_dict().items() if value != defaults.get(name)}
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    chosen = {name: sorted(value) if isinstance(value, set) else value for name, value in chosen.items()}
    return {**chosen, "trained_parameters": trained}
