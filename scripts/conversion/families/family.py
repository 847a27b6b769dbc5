"""What a family of models is to the conversion."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Source:
    """
    A checkpoint that has been understood.

    Attributes:
        kind (`str`): The family's name, or "state dict".
        shape (`dict`): Arguments of [`NanoLLaDAConfig`], without the token ids.
        tensors (`dict[str, torch.Tensor]`): Under nanollada's names.
        files (`dict[str, str]`): SHA-256 of each weights file by its name.
        config (`dict`): The source's own config or arguments, as they were.
        folder (`Path`, *optional*): Where tokenizer and generation settings are.
        notes (`list[str]`): What a user should know.
    """

    kind: str
    shape: dict
    tensors: dict
    files: dict
    config: dict
    folder: Path | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Family:
    """
    A family of models; [`~scripts.conversion.families.registry.FAMILIES`] has them all.

    Args:
        name (`str`): Its name, and the `model_type` of its config.json.
        help (`str`): What is read, in a line.
        understand (`Callable`): `understand(tensors, raw, beside, given, to)` makes a [`Source`] of the tensors, the
            config.json (`None` without), what stood beside the tensors in their file, what the user said of the shape,
            and the target. Raises a `ValueError` for whatever it does not understand, naming key or tensor.
        model_class (`str`, *optional*): The one class in `architectures` that computes what is computed here.
        owns (`Callable`, *optional*): `owns(tensors)`, whether the tensors' names alone are this family's. Without it
            config.json decides.
        architecture (`dict`, *optional*): Switches of [`NanoLLaDAConfig`] that tensors alone must show, where the user
            names the family by `--architecture`; without it nobody can.
        reference (`Callable`, *optional*): `reference(folder)` loads the foreign model in float32, to compare logits.
        writes (`Callable`, *optional*): `writes(config)`: what the target's config has beside the shape. Raises a
            `ValueError` naming what the family has no place for. Without it nothing is written as this family.
        plain_tokenizer (`bool`, defaults to `False`): Whether transformers cannot read its config.json, and with it
            the tokenizer's class.
        adds_mask (`bool`, defaults to `False`): Whether its own code adds a mask token behind the tokenizer's last.
    """

    name: str
    help: str
    understand: Callable[..., Source]
    model_class: str | None = None
    owns: Callable[[dict], bool] | None = None
    architecture: dict | None = None
    reference: Callable[[Path], object] | None = None
    writes: Callable[[object], dict] | None = None
    plain_tokenizer: bool = False
    adds_mask: bool = False
