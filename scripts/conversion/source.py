"""Reads a checkpoint of any family in nanollada's terms."""

from pathlib import Path

from nanollada.scripts.conversion.families.family import Family, Source
from nanollada.scripts.conversion.families.registry import FAMILIES, named, names, with_config
from nanollada.scripts.conversion.shape import SHAPE, derived_shape, require_given
from nanollada.scripts.conversion.tensors import digests, read_weights, weight_files
from nanollada.trainers.records import read_json


def read_source(source: str | Path, given: dict, to: str) -> Source:
    """
    Reads a foreign checkpoint.

    Args:
        source (`str` or `Path`): A folder with config.json, or a file of weights.
        given (`dict`): What the user says of the shape (`SHAPE`) and of the `architecture`, for weights that come
            without a config.
        to (`str`): "causal" or "masked".

    Raises:
        `ValueError`: for whatever is not understood, naming the key of the config or the tensor.
    """
    source = Path(source)
    if not source.exists():
        raise ValueError(f"`source` must be a folder or a file, got {source}, which is not there")
    files = weight_files(source)
    folder = source if source.is_dir() else source.parent
    has_config = (folder / "config.json").is_file()
    tensors, beside = read_weights(files)
    raw = read_json(folder / "config.json") if has_config else None
    owner = next((family for family in FAMILIES.values() if family.owns is not None and family.owns(tensors)), None)
    if owner is not None:
        read = owner.understand(tensors, raw, beside, given, to)
    elif has_config:
        if given:
            raise ValueError(f"`{next(iter(given))}` is for weights without a config.json, got one in {folder}")
        family = family_of(raw)
        read = family.understand(tensors, raw, beside, given, to)
        if source.is_file() and family.reference is not None:
            raise ValueError(f"`source` must be the folder of a {family.name} model, got its file {source.name}")
    else:
        read = _state_dict(tensors, given)
    read.files = digests(files)
    read.folder = folder if has_config and owner is None else None
    return read


def family_of(raw: dict) -> Family:
    """
    The family that a config.json names.

    Raises:
        `ValueError`: for quantised weights, unknown families, other classes, and a RoPE that is spelt twice.
    """
    kind = raw.get("model_type")
    if raw.get("quantization_config"):
        raise ValueError("quantised weights are not converted, got `quantization_config` in config.json")
    if kind not in names(with_config):
        raise ValueError(f"`model_type` of the source must be one of {', '.join(names(with_config))}, got {kind!r}")
    own = [FAMILIES[kind].model_class]
    if (classes := raw.get("architectures") or own) != own:
        raise ValueError(f"`architectures` of a {kind} model must be {own} or absent, got {classes}")
    _refuse_two_ropes(raw)
    return FAMILIES[kind]


def _refuse_two_ropes(raw: dict) -> None:
    """Where RoPE is spelt twice, transformers takes one and drops the other without a word: they must agree."""
    ropes = [raw.get(name) for name in ("rope_parameters", "rope_scaling")]
    ropes = [rope for rope in ropes if rope and isinstance(rope, dict)]
    theta, names = raw.get("rope_theta"), (("rope_type", "type"), ("type", "rope_type"))
    thetas = [rope.get("rope_theta", theta) for rope in ropes] + ([] if theta is None else [theta])
    apart = {"rope_theta", "rope_type", "type"}
    said = {
        "rope_theta": thetas,
        "rope_type": [rope.get(one) or rope.get(other) or "default" for rope in ropes for one, other in names],
        "rope_scaling": [{key: value for key, value in rope.items() if key not in apart} for rope in ropes],
    }
    for name, values in said.items():
        if differing := [value for value in values if value != values[0]]:
            raise ValueError(
                f"`{name}` must be the same wherever config.json has it, got {values[0]} and {differing[0]}"
            )


def _state_dict(tensors: dict, given: dict) -> Source:
    require_given(given, (*SHAPE, "architecture"))
    kind = given["architecture"]
    if kind not in names(named):
        raise ValueError(f"`architecture` must be one of {', '.join(names(named))}, got {kind!r}")
    embedding, head = tensors.get("model.embed_tokens.weight"), tensors.get("lm_head.weight")
    if embedding is None:
        raise ValueError(f"a state dict must have model.embed_tokens.weight or token_emb.weight, got {min(tensors)}")
    shape = derived_shape(tensors, given, tied=head is None or head.equal(embedding))
    for name, value in FAMILIES[kind].architecture.items():
        if shape[name] != value:
            raise ValueError(f"`architecture` {kind!r} has `{name}` {value}, got tensors that have it {shape[name]}")
    return Source("state dict", shape, tensors, {}, dict(given))
