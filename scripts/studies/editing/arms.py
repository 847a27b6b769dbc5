"""The arms of a study of editing, and its parts."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Arm:
    """
    A kind of run.

    Attributes:
        title (`str`): Its name in tables.
        settings (`dict`): What it tells the trainer.
        trains (`bool`): Whether it trains at all, or is the start as it is.
    """

    title: str
    settings: dict = field(default_factory=dict)
    trains: bool = True


EDITING = {"corruption": "editing", "edit_rate": 0.3}
ARMS = {
    "start": Arm("before", trains=False),
    "plain": Arm("plain"),
    **{name: Arm(f"edits of {name}", {**EDITING, "edit_source": name}) for name in ("self", "unigram", "uniform")},
    "mixed": Arm("edits of all", {**EDITING, "edit_source": "mixed"}),
    "structural": Arm("insertions, deletions", {**EDITING, "corruption": "structural"}),
    "expansion": Arm("expansion", {"corruption": "expansion"}),
}
BASELINE = "plain"
DRAFTING = ("self", "mixed")  # values of `edit_source`


@dataclass(frozen=True)
class Part:
    """
    A task.

    Attributes:
        title (`str`): Its name.
        decoders (`tuple[str, ...]`): Names of `DECODERS`, from the most forward passes to the fewest.
        arms (`tuple[str, ...]`): Names of `ARMS`.
        puzzle (`str`, *optional*): Of which its problems are; rows of text come from files.
        settings (`dict`): What all arms tell the trainer.
        drafts (`dict`): What those that edit drafts of the model's tell it, too.
        unit (`str`): Of its quality: "share" or "nats".
        measure (`str`): What that is, a sentence.
    """

    title: str
    decoders: tuple[str, ...]
    arms: tuple[str, ...] = ("plain", "self", "unigram", "uniform", "mixed")
    puzzle: str | None = None
    settings: dict = field(default_factory=dict)
    drafts: dict = field(default_factory=dict)
    unit: str = "share"
    measure: str = "Quality: problems solved."


WHOLE_ROWS = {"block_length": 0, "eos_padding": "max_length"}
ADAPTIVE = ("one", "t0.995", "t0.98", "t0.95", "t0.9", "t0.7", "t0.5", "all")
AT_ALL = ("edit", "sync", "remask")
PUZZLE = (
    *ADAPTIVE,
    *("steps4", "steps2", "steps2+edit"),
    *(f"{draft}+edit" for draft in ADAPTIVE[:4]),
    *(f"{draft}+{kind}" for draft in ADAPTIVE[4:] for kind in AT_ALL),
    *("llada2.1-quality", "llada2.1-speed"),
)
FIXED = ("one", "steps16", "steps8", "steps4", "steps2", "all")
TEXT = (
    "reference",
    *FIXED,
    *("t0.7", "t0.5"),
    *(f"{draft}+edit" for draft in FIXED[1:]),
    *(f"{draft}+{kind}" for draft in ("steps8", "all") for kind in ("sync", "remask")),
    *(f"{draft}@1{edits}" for draft in FIXED for edits in ("", "+gibbs")),
    *("llada2.1-quality", "llada2.1-speed"),
)
INFILL = ("reference", "right", "single", "single+expand", "double", "double+expand", "right+expand")
PARTS = {
    "sudoku": Part("4×4 sudoku", PUZZLE, puzzle="sudoku", settings=WHOLE_ROWS),
    "sudoku9": Part("9×9 sudoku", PUZZLE, puzzle="sudoku9", settings=WHOLE_ROWS),
    "countdown": Part("Countdown", PUZZLE, puzzle="countdown", settings=WHOLE_ROWS),
    "text": Part(
        *("Text under the AR twin", TEXT),
        drafts={"draft_rate": 0.5},  # of what is hidden at once, a draft says nothing
        unit="nats",
        measure="Quality: mean log-probability of what was written under the AR twin, nats a token.",
    ),
    "infill": Part(
        *("Gaps of unknown length", INFILL, ("plain", "expansion")),
        settings={"block_length": 0},
        measure="Quality: gaps filled as they were.",
    ),
}
