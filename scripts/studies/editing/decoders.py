"""The ways to write that a study of editing compares."""

import itertools
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Decoder:
    """
    A way to write.

    Attributes:
        title (`str`): Its name in tables.
        settings (`dict`): Of `generate`.
        draft (`str`, *optional*): The decoder that it adds edits to.
        kind (`str`): What it adds: "edit", "sync", "remask", "gibbs", "preset", "expand"; empty for none. "reference":
            nothing is written, the held-out answer stands.
        masks (`float`): Infilling: masks in a gap, by its tokens; 0 is one mask.
    """

    title: str
    settings: dict = field(default_factory=dict)
    draft: str | None = None
    kind: str = ""
    masks: float = 1.0

    @property
    def edit_tokens(self) -> bool:
        """Whether the model must know tokens that insert and delete."""
        return self.kind == "expand" or self.settings.get("preset") == "llada2.2"


ONE_EDIT = {"edit_threshold": 0.0, "edit_margin": 0.7, "max_edits": 1, "max_post_steps": 8}
DRAFTS = {
    "one": ("one per step", {}),
    **{f"t{value}": (f"threshold {value}", {"threshold": value}) for value in (0.995, 0.98, 0.95, 0.9, 0.7, 0.5)},
    **{f"steps{count}": (f"{count} steps", {"steps": count}) for count in (16, 8, 4, 2)},
    "all": ("all at once", {"steps": 1}),
}
EDITS = {
    "edit": ("edits", ONE_EDIT),
    "sync": ("synchronous edits", {**ONE_EDIT, "max_edits": 1000}),
    "remask": ("re-masking", {**ONE_EDIT, "edit_rule": "remask"}),
}
DRAWN = {"temperature": 1.0}
GIBBS = {"edit_threshold": 0.0, "max_post_steps": 32}  # a sweep of 32 tokens


def _decoders() -> dict[str, Decoder]:
    found = {name: Decoder(title, settings) for name, (title, settings) in DRAFTS.items()}
    for (name, draft), (kind, (title, settings)) in itertools.product(list(found.items()), EDITS.items()):
        found[f"{name}+{kind}"] = Decoder(f"{draft.title} + {title}", draft.settings | settings, name, kind)
    for name, (title, settings) in DRAFTS.items():
        if not name.startswith("t"):
            found[f"{name}@1"] = Decoder(f"{title}, drawn", settings | DRAWN)
            settings = settings | DRAWN | GIBBS
            found[f"{name}@1+gibbs"] = Decoder(f"{title}, drawn + Gibbs", settings, f"{name}@1", "gibbs")
    for preset, draft in (("llada2.1-speed", "t0.5"), ("llada2.1-quality", "t0.7"), ("llada2.2", "t0.5")):
        found[preset] = Decoder(preset, {"preset": preset}, draft, "preset")
    for name, title, masks in (
        ("right", "as many masks", 1.0),
        ("single", "one mask", 0.0),
        ("double", "twice as many", 2.0),
    ):
        found[name] = Decoder(title, masks=masks)
        found[f"{name}+expand"] = Decoder(f"{title} + expand", {"max_expansions": 32}, name, "expand", masks)
    return found | {"reference": Decoder("held-out text itself", kind="reference")}


DECODERS = _decoders()
