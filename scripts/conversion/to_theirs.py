"""An autoregressive nanollada checkpoint as Qwen3, Llama or Qwen2, for programs that know these."""

from pathlib import Path

from nanollada.scripts.conversion.arguments import RECORD
from nanollada.scripts.conversion.families.registry import FAMILIES
from nanollada.scripts.conversion.families.transformers_own import SHARED
from nanollada.scripts.conversion.tensors import (
    digests,
    filled,
    fit_weights,
    meta_model,
    our_generation_config,
    read_weights,
    weight_files,
)
from nanollada.scripts.conversion.tokenizers import compare_tokenizers, drop_mask_token, load_tokenizer
from nanollada.trainers.records import read_json


def to_foreign(source: str, to: str, folder: Path, verify: bool) -> dict:
    """
    Writes an AR checkpoint of nanollada as a model of transformers. A mask that the conversion to nanollada brought in
    goes again, with its row where it got one, so that there and back is the same bits; any other mask stays, and
    `suppress_tokens` of the generation config keeps it from being generated.

    Args:
        source (`str`): Folder of a [`NanoLLaDAForCausalLM`].
        to (`str`): The name of a family that is written.
        folder (`Path`): Where to.
        verify (`bool`): Whether to load the result and compare logits.

    Returns:
        `dict`: the record.

    Raises:
        `ValueError`: for a diffusion model, for one with edit tokens, for what the other architecture has no place
            for, and if the result is found to compute something else.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    from nanollada.modeling_nanollada import NanoLLaDAForCausalLM

    path = Path(source)
    config = _our_config(path)
    switches = FAMILIES[to].writes(config)
    history = read_json(path / RECORD) if (path / RECORD).is_file() else None
    files = weight_files(path)
    tensors, _ = fit_weights(read_weights(files)[0], config, NanoLLaDAForCausalLM)
    added = _added_mask(config, history)
    if added == "new row":
        tensors = _without_last_row(tensors)
    rows = tensors["model.embed_tokens.weight"].shape[0]
    tokenizer = load_tokenizer(path)
    back = history is not None and history["source"]["kind"] == to and added is not None
    found = foreign_config(config, to, rows, switches, history if back else None)
    model = filled(meta_model(found, MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[to]]), tensors)
    model.generation_config = _generation_config(path, config, history if back else None, keep_mask=added is None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if added is not None:
        drop_mask_token(folder, tokenizer.mask_token, history["vocabulary"]["pad_token"])
    record = _record(path, to, files, tensors, tokenizer, added, config)
    if verify:
        compare_tokenizers(folder, tokenizer)
        record["verified"] = _verify(path, folder, model, tensors, rows, config if added == "new row" else None)
    return record


def _our_config(path: Path):
    from nanollada.configuration_nanollada import NanoLLaDAConfig

    raw = read_json(path / "config.json") if path.is_dir() else {}
    if raw.get("model_type") != "nanollada":
        raise ValueError(
            f"`source` must be a folder of nanollada for this target, got {raw.get('model_type')} in {path}"
        )
    kinds = raw.get("architectures") or []
    if kinds != ["NanoLLaDAForCausalLM"]:
        raise ValueError(
            "`source` must be autoregressive: a diffusion model attends in both directions and its logits are of the "
            f"same position, which no program that runs the target does, got {kinds}"
        )
    config = NanoLLaDAConfig.from_pretrained(path)
    if config.edit_token_ids:
        raise ValueError(
            "`source` must be without edit tokens: here <|delete|> and <|insert|> are never predicted, and the target "
            f"would predict them as it does words, got a vocabulary with {config.edit_token_ids}"
        )
    return config


def _added_mask(config, history: dict | None) -> str | None:
    """How a conversion to nanollada brought the mask in ("new row", "unused row"), or `None`: it stays."""
    if history is None or history["to"] not in ("causal", "masked"):
        return None
    facts = history["vocabulary"]
    grown = facts["rows"] + (facts["mask"] == "new row")
    if (config.vocab_size, config.mask_token_id) != (grown, facts["mask_token_id"]):
        raise ValueError(
            f"{RECORD} must be of these weights: `vocab_size` and `mask_token_id` must be {grown} and "
            f"{facts['mask_token_id']}, got {config.vocab_size} and {config.mask_token_id}"
        )
    return None if facts["mask"] == "own" else facts["mask"]


def _without_last_row(tensors: dict) -> dict:
    grown = ("model.embed_tokens.weight", "lm_head.weight")
    return {name: tensor[:-1].clone() if name in grown else tensor for name, tensor in tensors.items()}


def foreign_config(config, to: str, rows: int, switches: dict, history: dict | None):
    """The target's config; on the way back the original one, except for what has another value by now."""
    from transformers import CONFIG_MAPPING

    shape = {name: getattr(config, name) for name in SHARED} | {"vocab_size": rows, "head_dim": config.head_dim}
    shape["rope_parameters"] = dict(config.rope_parameters)
    shape |= {"dtype": config.dtype, **switches}
    if history is None:
        ids = {name: getattr(config, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        return CONFIG_MAPPING[to](**shape, **ids)
    original = CONFIG_MAPPING[to].from_dict(history["config"])
    if getattr(original, "head_dim", None) is None and "head_dim" not in history["config"]:
        shape.pop("head_dim")  # Qwen2 says it by its other sizes
    for name, value in shape.items():
        if getattr(original, name, None) != value:
            setattr(original, name, value)
    return original


def _generation_config(path: Path, config, history: dict | None, keep_mask: bool):
    """The folder's; on the way back the original one, except for what has another value by now."""
    from transformers import GenerationConfig

    file = path / "generation_config.json"
    generation = GenerationConfig.from_dict(read_json(file) if file.is_file() else {})
    others = [token for token in generation.suppress_tokens or [] if token != config.mask_token_id]
    settings = history["generation_config"] if history is not None else None
    if settings is not None:
        now, then = generation.to_dict(), our_generation_config(settings, config).to_dict()
        edited = {name for name in now if now[name] != then.get(name)} - {"transformers_version", "suppress_tokens"}
        generation = GenerationConfig.from_dict(settings)
        for name in edited if file.is_file() else ():
            setattr(generation, name, now[name])
        if file.is_file() and now["suppress_tokens"] != then["suppress_tokens"]:
            generation.suppress_tokens = others or None
        return generation
    kept = [config.mask_token_id] if keep_mask else []
    generation.suppress_tokens = sorted([*others, *kept]) or None
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(generation, name) is None:
            setattr(generation, name, getattr(config, name))
    return generation


def _record(path: Path, to: str, files: list[Path], tensors: dict, tokenizer, added: str | None, config) -> dict:
    notes = []
    if config.hidden_dropout:
        notes.append(f"`hidden_dropout` {config.hidden_dropout} is for training, and {to} has none")
    mask = {
        None: "stays; `suppress_tokens` keeps it from being generated",
        "new row": "goes again, with its row",
        "unused row": "goes again; its row was there before it",
    }
    tokens, rows = len(tokenizer) - (added is not None), tensors["model.embed_tokens.weight"].shape[0]
    return {
        "source": {"name": path.resolve().name, "kind": "nanollada", "sha256": digests(files)},
        "to": to,
        "dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch."),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "vocabulary": {
            "rows": rows,
            "tokens": tokens,
            "unused_rows": rows - tokens,
            "mask": mask[added],
            "mask_token_id": config.mask_token_id,
        },
        "notes": notes,
    }


def _verify(path: Path, folder: Path, model, tensors: dict, rows: int, grown) -> dict:
    import torch
    from transformers import AutoModelForCausalLM

    from nanollada.modeling_nanollada import NanoLLaDAForCausalLM
    from nanollada.modeling_nanollada.loading_nanollada import load_model
    from nanollada.scripts.conversion.compare import compare_logits, compare_tensors

    compare_tensors(type(model).from_pretrained(folder, dtype="auto"), tensors)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = load_model(NanoLLaDAForCausalLM, path)
    return compare_logits(ours, theirs, rows, None if grown is None else grown.mask_token_id)
