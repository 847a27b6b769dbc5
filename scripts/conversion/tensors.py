"""Weights of checkpoints in any of the formats that `convert_checkpoint.py` knows: read safely, fitted strictly."""

import pickle
from pathlib import Path

from nanollada.trainers.records import file_digest, read_json

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
TORCH_FILES = (".pt", ".pth", ".bin")
INV_FREQ = "rotary_emb.inv_freq"


def weight_files(source: Path) -> list[Path]:
    """
    The files that hold a checkpoint's tensors: the file itself, or what a folder has, a shard each.

    Raises:
        `ValueError`: if there are none, if the folder holds a LoRA adapter, or for a file of another kind.
    """
    if source.is_file():
        if source.suffix not in (*TORCH_FILES, ".safetensors"):
            raise ValueError(f"`source` must be a folder, .safetensors, .pt, .pth or .bin, got {source.name}")
        return [source]
    found = next((source / name for name in WEIGHT_FILES if (source / name).is_file()), None)
    if found is None:
        adapter = " but a LoRA adapter (merge it first)" if (source / "adapter_config.json").is_file() else ""
        raise ValueError(f"`source` must hold one of {', '.join(WEIGHT_FILES)}, got none in {source}{adapter}")
    if found.suffix != ".json":
        return [found]
    shards = sorted(set(read_json(found)["weight_map"].values()))
    absent = [name for name in shards if not (source / name).is_file()]
    if absent:
        raise ValueError(f"{found.name} of {source} names {absent[0]}, which must be there, got no such file")
    return [source / name for name in shards]


def read_weights(files: list[Path]) -> tuple[dict, dict]:
    """
    Reads tensors, never code: pickles go through `torch.load(weights_only=True)` alone.

    Returns:
        `tuple[dict, dict]`: tensors by name; and what else the file holds (`args`, …), for a `.pt` of a training run
            that keeps its weights under `model_state_dict`.

    Raises:
        `ValueError`: for files that cannot be read safely, a name in two shards, and tensors that are quantised, of
            experts, or not finite.
    """
    tensors, beside = {}, {}
    for file in files:
        found = _load(file)
        if isinstance(found.get("model_state_dict"), dict):
            beside = {name: value for name, value in found.items() if name != "model_state_dict"}
            found = found["model_state_dict"]
        twice = sorted(set(found) & set(tensors))
        if twice:
            raise ValueError(f"a tensor must stand in one shard, got {twice[0]} in {file.name} again")
        tensors |= found
    _check_tensors(tensors)
    return _without_wrappers(tensors), beside


def _load(file: Path) -> dict:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ValueError(f"{file.name} must be a whole safetensors file: {error}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{file.name} must load with torch.load(weights_only=True), which runs no code. Where you trust the file, "
            "load it yourself and save it again with plain tensors, dicts and numbers (`args` as `vars(args)`): "
            f"{str(error).splitlines()[0] if str(error) else 'an empty file'}"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{file.name} must hold a dict of tensors, got {type(found).__name__}")
    return found


def _check_tensors(tensors: dict) -> None:
    import torch

    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"the weights must be tensors, got {type(tensor).__name__} under {name!r}")
        if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"quantised or integer weights are not converted, got {name} in {tensor.dtype}")
        if "expert" in name or ".mlp.gate." in name:
            raise ValueError(f"mixtures of experts are not converted, got {name}")
        if not tensor.isfinite().all():
            raise ValueError(f"the weights must be finite, got NaN or infinity in {name}")


def _without_wrappers(tensors: dict) -> dict:
    """Names without what `torch.compile` and DDP put before every one of them."""
    for prefix in ("_orig_mod.", "module."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def digests(files: list[Path]) -> dict[str, str]:
    """SHA-256 of each file, by its name."""
    return {path.name: file_digest(path) for path in files}


def fit_weights(tensors: dict, config, model_class) -> tuple[dict, list[str]]:
    """
    Holds tensors against the model that they shall be, name by name and shape by shape.

    Args:
        tensors (`dict[str, torch.Tensor]`): Under the names of `model_class`.
        config (`PreTrainedConfig`): The model's.
        model_class (`type`): Of transformers or of nanollada.

    Returns:
        `tuple[dict, list[str]]`: all tensors of the model (a tied head is left out), and the names of buffers that
            were left out because the model computes the same values.

    Raises:
        `ValueError`: naming tensors that are unknown, missing or mis-shaped, in a second dtype, a head
            that is tied and yet another, and rotary frequencies that the model would not compute.
    """
    expected = _expected(config, model_class)
    buffers = [name for name in tensors if name.endswith(INV_FREQ)]
    _check_frequencies({name: tensors[name] for name in buffers}, config)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in buffers}
    if config.tie_word_embeddings:
        head, embedding = tensors.pop("lm_head.weight", None), tensors.get("model.embed_tokens.weight")
        expected.pop("lm_head.weight")
        if head is not None and embedding is not None and not head.equal(embedding):
            raise ValueError("`tie_word_embeddings` is true, so lm_head.weight must be the embedding, got another")
    faults = [
        f"unknown: {_some(tensors.keys() - expected.keys())}",
        f"missing: {_some(expected.keys() - tensors.keys())}",
    ]
    shapes = [
        f"{name} {list(tensor.shape)}, not {list(expected[name])}"
        for name, tensor in tensors.items()
        if name in expected and tensor.shape != expected[name]
    ]
    faults = [fault for fault in (*faults, f"shape: {_some(shapes)}") if not fault.endswith(": ")]
    if faults:
        raise ValueError(
            f"the weights must be exactly those of the config ({config.model_type}), got {'; '.join(faults)}"
        )
    first = next(iter(tensors.values())).dtype
    other = next((name for name, tensor in tensors.items() if tensor.dtype != first), None)
    if other is not None:
        raise ValueError(f"the weights must have one dtype, got {first} and {other} in {tensors[other].dtype}")
    return tensors, buffers


def _some(names) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _expected(config, model_class) -> dict:
    return {name: tensor.shape for name, tensor in meta_model(config, model_class).state_dict().items()}


def meta_model(config, model_class):
    """A model without storage: its names and shapes, and what `load_state_dict(assign=True)` fills."""
    import torch

    with torch.device("meta"):
        return model_class(config)


def filled(model, tensors: dict):
    """A model without storage, with these tensors as its parameters."""
    if model.config.tie_word_embeddings:
        tensors = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    model.load_state_dict(tensors, strict=True, assign=True)
    model.tie_weights()
    return model


def our_generation_config(settings: dict, config):
    """Generation settings of another model for ours: the mask is never drawn, and padding is the tokenizer's."""
    from transformers import GenerationConfig

    generation = GenerationConfig.from_dict(settings)
    generation.suppress_tokens = sorted({*(generation.suppress_tokens or []), config.mask_token_id})
    generation.pad_token_id = config.pad_token_id
    return generation


def _check_frequencies(buffers: dict, config) -> None:
    import torch

    from nanollada.modeling_nanollada.layers_nanollada import NanoLLaDARotaryEmbedding

    for name, found in buffers.items():
        ours = NanoLLaDARotaryEmbedding(config).inv_freq
        tolerance = 4 * torch.finfo(found.dtype).eps
        same = found.shape == ours.shape and torch.allclose(found.double(), ours.double(), rtol=tolerance, atol=0)
        if not same:
            raise ValueError(
                f"{name} must be the frequencies of `rope_parameters` {config.rope_parameters}, got others"
            )
