"""Adapters of PEFT on our models: their defaults, an adapted model to train, and an adapter's folder as a model.

Importing this tells PEFT what of a nanollada model it adapts by default.
"""

import copy
import os
from pathlib import Path

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import constants
from transformers import set_seed

from nanollada.modeling_nanollada.loading_nanollada import ADAPTER_CONFIG, is_adapter, load_adapted, load_tokenizer
from nanollada.modeling_nanollada.loss_nanollada import FLOOR
from nanollada.trainers.commands.programs import command_of
from nanollada.trainers.records import command, file_digest, read_json, versions, write_json
from nanollada.trainers.weights.merging import new_folder

OURS, THEIRS = "nanollada", "qwen3"  # the modules have the same names
TOLERANCE = 1e-5  # of a merge's logits, relative to the largest

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
    name_base(model)
    return model


def name_base(model: "peft.PeftModel") -> None:
    """Names the folder of the model under an adapter so that it is there also from another folder."""
    config = model.active_peft_config
    if os.path.isdir(config.base_model_name_or_path or ""):
        config.base_model_name_or_path = os.path.abspath(config.base_model_name_or_path)


def is_adapted(model: torch.nn.Module) -> bool:
    """Whether a model has an adapter of PEFT."""
    return isinstance(model, peft.PeftModel)


def bare(model: torch.nn.Module) -> torch.nn.Module:
    """The model itself, without an adapter's wrapper."""
    return model.get_base_model() if is_adapted(model) else model


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


def check_whole(path: str | os.PathLike, argument: str = "model_name_or_path") -> None:
    """
    Checks that what is to be trained is a model: a second adapter on an adapted one could be neither saved nor loaded.

    Raises:
        `ValueError`: for an adapter's folder, with the command that merges it.
    """
    if is_adapter(path):
        merged = f"{os.fspath(path).rstrip('/')}-merged"
        again = command_of("merge", "--adapter", path, "--output_dir", merged)
        raise ValueError(
            f"`{argument}` must be a model, got {path}, which holds an adapter of one: merge it ({again}) and train "
            f"{merged}"
        )


def describe(model) -> dict | None:
    """What `run.json` says of an adapter: its settings that are not PEFT's defaults, and how much of it is trained."""
    if not is_adapted(model):
        return None
    config = model.active_peft_config
    defaults = vars(type(config)())
    elsewhere = ("base_model_name_or_path", "inference_mode")  # `init` in the same file, and nothing of the adapter
    defaults |= {name: getattr(config, name) for name in elsewhere} | {"peft_type": None}
    chosen = {name: value for name, value in config.to_dict().items() if value != defaults.get(name)}
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    chosen = {name: sorted(value) if isinstance(value, set) else value for name, value in chosen.items()}
    return {**chosen, "trained_parameters": trained}


def merge_adapter(adapter: str | os.PathLike, output: str | os.PathLike, trust_remote_code: bool = False):
    """
    Puts an adapter into its model's weights (of LoRA W + α/r·BA, arXiv 2106.09685), in float64.

    Args:
        adapter (`str` or `os.PathLike`): Folder of an adapter; its model must be where it says.
        output (`str` or `os.PathLike`): New folder for a checkpoint, in float32, with the adapter's tokenizer and
            generation settings, and `run.json` of its training. Appears only when it is complete.
        trust_remote_code (`bool`, defaults to `False`): Run the code that comes with the model.

    Returns:
        `PreTrainedModel`: the merged model.

    Raises:
        `ValueError`: for a folder without an adapter, for one that no weights can stand for (prompts, or what depends
            on the input), for weights that are not finite, for an `output` that is not empty, and as `load_adapted`.
    """
    adapter = Path(adapter)
    if not is_adapter(adapter):
        raise ValueError(f"`adapter` must be a folder with {ADAPTER_CONFIG}, got {adapter}")
    with new_folder(output) as folder:
        model = load_adapted(adapter, "adapter", trust_remote_code=trust_remote_code).eval()
        config, base = model.active_peft_config, model.get_base_model().name_or_path
        own = peft.get_peft_model_state_dict(model, save_embedding_layers=False).values()
        settings = {**describe(model), "trained_parameters": sum(tensor.numel() for tensor in own)}
        run = {"init": base, "adapter": settings}
        merged = _merged(model)
        has_tokenizer = (adapter / "tokenizer_config.json").is_file()
        tokenizer = load_tokenizer(adapter if has_tokenizer else base, "adapter", trust_remote_code=trust_remote_code)
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if (adapter / "run.json").is_file():  # whose scores and digests are of other files
            record = read_json(adapter / "run.json").items()
            run |= {name: value for name, value in record if name not in ("evaluation", "sha256")}
        files = [adapter / ADAPTER_CONFIG, *sorted(adapter.glob("adapter_model*.safetensors"))]
        run["parameters"] = merged.num_parameters()
        run["merged"] = {
            **{"adapter": os.fspath(adapter), "base_model": config.base_model_name_or_path},
            **{"sha256": {file.name: file_digest(file) for file in files}},
            **{"command": command(), "versions": {**versions(), "peft": peft.__version__}},
        }
        write_json(folder / "run.json", run)
    return merged


@torch.no_grad()
def _merged(model: "peft.PeftModel"):
    """The model with the adapter in its weights, which computes what both computed together."""
    config = model.get_base_model().config
    ids = (torch.arange(32)[None] * 7919 + 13) % config.vocab_size  # (1, 32)
    before = model(input_ids=ids).logits
    _untie(model)
    dtype = model.dtype
    try:
        merged = model.double().merge_and_unload(safe_merge=True).to(dtype)
    except (AttributeError, NotImplementedError, ValueError) as error:
        kind = model.active_peft_config.peft_type.value
        raise ValueError(f"`adapter` must be one that can be merged, got a {kind} adapter: {error}") from error
    difference = (merged(input_ids=ids).logits - before).abs().max().item()
    if not difference <= TOLERANCE * before[before > FLOOR].abs().max().item():
        raise ValueError(f"`adapter` must be one that can be merged, got logits that differ by {difference:.3g}")
    return merged


def _untie(model: "peft.PeftModel") -> None:
    """An adapter of the embedding or the head is of that one alone: with tied weights the merge has two of them."""
    base = model.get_base_model()
    ends = base.get_input_embeddings(), base.get_output_embeddings()
    if base.config.tie_word_embeddings and any(isinstance(end, BaseTunerLayer) for end in ends):
        head = getattr(ends[1], "base_layer", ends[1])
        head.weight = torch.nn.Parameter(head.weight.clone())
        base.config.tie_word_embeddings = False
