"""What a study can run: kinds of runs, the parts that they make up, and the arguments of a study."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

# The shape of a fresh model, and the step that suits it. The small one has two input and output tables, because the
# input's third of the parameters costs no products, and few wide heads, which a CPU's attention is fastest with.
SIZES = {
    "small": {
        "hidden_size": 160,
        "intermediate_size": 480,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "tie_word_embeddings": False,
        "max_length": 128,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 16,
        "learning_rate": 2e-3,
    },
    "32m": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "tie_word_embeddings": False,
        "max_length": 256,
        "per_device_train_batch_size": 128,
        "per_device_eval_batch_size": 64,
        "learning_rate": 1e-3,
    },
}
TOKENIZER_TEXTS = 20_000


@dataclass(frozen=True)
class Variant:
    """
    A kind of run.

    Attributes:
        title (`str`): Its name in tables.
        kind (`str`): The trainer: "ar" or "diffusion".
        settings (`dict`): What it changes in the recipe.
        init (`str`, *optional*): The variant from whose weights it starts.
        rows (`str`): What it reads: "all" texts, the "first" or "second" half of them (half of the steps), or "small".
        share (`float`): The part of the steps that it takes of those of its rows.
    """

    title: str
    kind: str
    settings: dict = field(default_factory=dict)
    init: str | None = None
    rows: str = "all"
    share: float = 1.0


CONSTANT = {"lr_scheduler_type": "constant_with_warmup"}
BERNOULLI = {"mask_count": "bernoulli"}
SHIFT, ANNEALED = {"label_shift": True}, {"attention_annealing_steps": 0.3}
WSD = "[[0.1, 1], [0.1, 4], [0.1, 32], [0.4, 0], [0.3, 32]]"
VARIANTS = {
    "ar_half": Variant("AR, first half only (no decay)", "ar", CONSTANT, rows="first"),
    "ar": Variant("AR", "ar", init="ar_half", rows="second"),
    "ar_unbroken": Variant("AR, in one go", "ar"),
    "mdlm": Variant("MDLM from scratch", "diffusion", {"block_length": 0}),
    "block1": Variant("block 1 (AR order) from scratch", "diffusion", {"block_length": 1}),
    "block4": Variant("block 4 from scratch", "diffusion", {"block_length": 4}),
    "block16": Variant("block 16 from scratch", "diffusion", {"block_length": 16}),
    "block32": Variant("block 32 from scratch", "diffusion", {"block_length": 32}),
    "ar_mdlm": Variant("AR → MDLM", "diffusion", {"block_length": 0}, "ar_half", "second"),
    "ar_block32": Variant("AR → block 32", "diffusion", {"block_length": 32}, "ar_half", "second"),
    "ar_wsd": Variant("AR → 1, 4, 32, row, 32", "diffusion", {"block_length_schedule": WSD}, "ar_half", "second"),
    "ar_mdlm_shift": Variant("AR → MDLM, label shift", "diffusion", {"block_length": 0, **SHIFT}, "ar_half", "second"),
    "ar_mdlm_annealed": Variant(
        "AR → MDLM, attention annealed", "diffusion", {"block_length": 0, **ANNEALED}, "ar_half", "second"
    ),
    "ar_mdlm_both": Variant(
        "AR → MDLM, both", "diffusion", {"block_length": 0, **SHIFT, **ANNEALED}, "ar_half", "second"
    ),
    "mdlm_bernoulli": Variant("MDLM, Bernoulli masks", "diffusion", {"block_length": 0, **BERNOULLI}),
    "block4_bernoulli": Variant("block 4, Bernoulli masks", "diffusion", {"block_length": 4, **BERNOULLI}),
    "block32_bernoulli": Variant("block 32, Bernoulli masks", "diffusion", {"block_length": 32, **BERNOULLI}),
    "small_ar": Variant("AR", "ar", CONSTANT, rows="small", share=0.5),
    "small_ar_dropout": Variant(
        "AR, dropout 0.1", "ar", {**CONSTANT, "hidden_dropout": 0.1, "attention_dropout": 0.1}, rows="small", share=0.5
    ),
    "small_mdlm": Variant("MDLM", "diffusion", {**CONSTANT, "block_length": 0}, rows="small"),
}
NOISE = {f"noise_{name}": name for name in ("mdlm", "block4", "block32")}  # part b: measured at these trained models
FROM_SCRATCH = ("mdlm", "block4", "block16", "block32")
PARTS = {
    "a": ("ar_half", "ar", *FROM_SCRATCH, "ar_mdlm", "ar_block32", "ar_wsd"),
    "b": ("mdlm", "mdlm_bernoulli", "block4", "block4_bernoulli", "noise_mdlm", "noise_block4"),
    "c": ("small_ar", "small_ar_dropout", "small_mdlm"),
    "d": ("ar_half", "ar", "ar_mdlm", "ar_mdlm_shift", "ar_mdlm_annealed", "ar_mdlm_both"),
}
OPTIONAL = {
    "a": ("ar_unbroken", "block1"),
    "b": ("block32", "block32_bernoulli", "noise_block32"),
    "c": (),
    "d": (),
}  # named by `runs`


@dataclass
class StudyArguments:
    """What is studied, and on what."""

    data: list[str] | None = field(default=None, metadata={"help": "Texts to train on. Required."})
    eval_data: list[str] | None = field(
        default=None, metadata={"help": "Held-out texts; each source is a column. Required."}
    )
    output: str = field(default="runs/study", metadata={"help": "Folder of the study."})
    part: list[str] = field(default_factory=lambda: ["a"], metadata={"help": "Which parts.", "choices": tuple(PARTS)})
    runs: list[str] | None = field(
        default=None, metadata={"help": f"Only these: {', '.join([*VARIANTS, *NOISE])}. Default: those of the parts."}
    )
    seeds: list[int] = field(default_factory=lambda: [1], metadata={"help": "Of weights, order and noise."})
    size: Literal[tuple(SIZES)] = field(default="small", metadata={"help": "small (3M parameters) or 32m."})
    tokens: int = field(default=3_000_000, metadata={"help": "Training tokens of a run of the parts a and b."})
    small_tokens: int = field(default=200_000, metadata={"help": "Part c: tokens of the small part."})
    small_epochs: int = field(default=30, metadata={"help": "Part c: epochs over it; AR runs take half of them."})
    small_evaluations: int = field(default=15, metadata={"help": "Part c: evaluations of the longest run."})
    tokenizer: str | None = field(default=None, metadata={"help": "Default: 6,400 BPE tokens, trained here."})
    eval_documents: int = field(default=100, metadata={"help": "Documents of each held-out source."})
    eval_blocks: list[int] = field(
        default_factory=list,
        metadata={"help": "Also score diffusion models (without label shift) at these block lengths; 0 is the row."},
    )
    samples: int = field(default=8, metadata={"help": "Masks per held-out row, even."})
    draws: int = field(default=64, metadata={"help": "Part b: draws of the noise on one batch."})
    jobs: int = field(default=1, metadata={"help": "Runs at a time, which share the cores."})
    minutes: float | None = field(default=None, metadata={"help": "Start no further run after so many minutes."})
    only: str | None = field(default=None, metadata={"help": "Do this one run, <name>-<seed>, in this process."})

    def __post_init__(self):
        known = {"size": (SIZES, [self.size]), "part": (PARTS, self.part)}
        known["runs"] = ([*VARIANTS, *NOISE], self.runs or [])
        for name, (allowed, given) in known.items():
            if unknown := [value for value in given if value not in allowed]:
                raise ValueError(f"`{name}` must be among {', '.join(allowed)}, got {unknown[0]!r}")
        for name in ("data", "eval_data", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` must be given, got {getattr(self, name)}")
        for name in ("tokens", "small_tokens", "small_epochs", "small_evaluations", "eval_documents", "draws", "jobs"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if self.tokenizer is not None and not (Path(self.tokenizer) / "tokenizer.json").is_file():
            raise ValueError(f"`tokenizer` must be a folder with tokenizer.json, got {self.tokenizer}")
        if len({Path(source).stem for source in self.eval_data}) < len(self.eval_data):
            raise ValueError(f"`eval_data` must have files with different names, got {self.eval_data}")


def needs(name: str) -> str | None:
    """The run whose weights a run starts from or measures."""
    return NOISE[name] if name in NOISE else VARIANTS[name].init
