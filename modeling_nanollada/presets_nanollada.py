"""Settings of publications, by name. Needs no torch."""

_GREEDY = {"temperature": 0.0}
PRESETS = {
    # arXiv 2602.08676 and its model card: S trades quality for speed.
    "llada2.1-speed": {"joint_threshold": 0.5, "joint_edit_threshold": 0.0, **_GREEDY},
    "llada2.1-quality": {"joint_threshold": 0.7, "joint_edit_threshold": 0.5, **_GREEDY},
    # The defaults of SGLang's `JointThresholdInDel`.
    "llada2.2": {"joint_threshold": 0.5, "joint_edit_threshold": 0.0, "structural_edits": True, **_GREEDY},
}
PRESET_HELP = "a publication's way of decoding: sets what the call leaves unset."


def expand_preset(settings: dict) -> dict:
    """
    Settings, `None` being unset, with those of their `preset` where they have none. The name itself goes.

    Raises:
        `ValueError`: for a name that is none of `PRESETS`.
    """
    given = {name: value for name, value in settings.items() if name != "preset"}
    name = settings.get("preset")
    if name is None:
        return given
    if name not in tuple(PRESETS):
        raise ValueError(f"`preset` must be one of {tuple(PRESETS)}, got {name!r}")
    own = [name for name, value in given.items() if value is not None]
    own += ["temperature"] if "do_sample" in own else []  # which says the same
    return given | {name: value for name, value in PRESETS[name].items() if name not in own}
