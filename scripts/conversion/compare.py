"""Loads what a conversion wrote, and compares it with what it came from."""

from pathlib import Path

from nanollada.scripts.conversion.families.registry import FAMILIES

TOLERANCE = 1e-5
ROWS, LENGTH = 2, 48


def verify_written(folder: Path, model_class, tensors: dict, source, path: Path, vocabulary: dict) -> dict:
    """
    Loads a nanollada checkpoint that was written. Every tensor must have the bits it shall have and, where
    transformers has a model for the source, its logits must be the source's (those of the AR model: both kinds of
    model have the same tensors).

    Returns:
        `dict`: `max_logit_difference` and `max_logit` (`None` where transformers has no such model), and `says`, a
            line about it.

    Raises:
        `ValueError`: naming a tensor, or with the greatest difference of two logits in float32, if it is above 1e-5.
    """
    from nanollada.modeling_nanollada import NanoLLaDAForCausalLM
    from nanollada.modeling_nanollada.loading_nanollada import load_model

    compare_tensors(load_model(model_class, folder, dtype="auto"), tensors)
    family = FAMILIES.get(source.kind)
    if family is None or family.reference is None:
        return {
            "max_logit_difference": None,
            "max_logit": None,
            "says": f"every tensor (transformers has no {source.kind} to compare)",
        }
    ours, theirs = load_model(NanoLLaDAForCausalLM, folder), family.reference(path if path.is_dir() else path.parent)
    excluded = vocabulary["mask_token_id"] if vocabulary["mask"] == "new row" else None
    return compare_logits(ours, theirs, vocabulary["rows"], excluded)


def compare_tensors(model, tensors: dict) -> None:
    """
    Raises:
        `ValueError`: naming a tensor that the model does not have, bit for bit.
    """
    found = dict(model.named_parameters())
    if found.keys() != tensors.keys():
        raise ValueError(
            f"the output must load with all tensors, got a difference in {sorted(found ^ tensors.keys())}"
        )
    for name, tensor in tensors.items():
        if found[name].dtype != tensor.dtype or not found[name].equal(tensor):
            raise ValueError(f"the output must load with the tensors that were written, got another {name}")


def compare_logits(ours, theirs, rows: int, excluded: int | None) -> dict:
    """
    Logits of two AR models in float32, on random ids.

    Args:
        rows (`int`): The vocabulary that ids are drawn from.
        excluded (`int`, *optional*): The mask's column, where one of the two lacks it; it is behind all others.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(rows, (ROWS, min(LENGTH, ours.config.max_position_embeddings)), generator=generator)
    with torch.no_grad():
        one, other = (model.eval()(ids, use_cache=False).logits.float() for model in (ours, theirs))
    if excluded is not None:
        one, other = one[..., :excluded], other[..., :excluded]
    difference, size = float((one - other).abs().max()), float(other.abs().max())
    if not difference <= TOLERANCE:  # NaN is none, either
        raise ValueError(f"the output's logits must be the source's to {TOLERANCE}, got {difference:.3g} between them")
    beside = "" if excluded is None else ", the mask's column aside"
    says = f"every tensor; logits differ by {difference:.1e} at most (float32, up to {size:.3g}{beside})"
    return {"max_logit_difference": difference, "max_logit": size, "says": says}
