"""Evidence on post-training: the runs of `scripts/post_training_study.py`."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nanollada.scripts.studies.cells import Cells, options_by_name, options_of
from nanollada.trainers.puzzles.registry import PUZZLES
from nanollada.trainers.records import read_json, write_json

TRAINED = {"preferences": "dpo", "problems": "grpo"}  # the trainer of a part


@dataclass(frozen=True)
class Arm:
    """
    A kind of run.

    Attributes:
        title (`str`): Its name in tables.
        part (`str`): "preferences" or "problems".
        start (`str`): The checkpoint that it starts from: "diffusion" or "ar".
        settings (`dict`): What it tells the trainer.
        share (`float`): Of the study's steps; 0 trains nothing and judges the start.
        steps_scored (`bool`): Whether the study says how many steps, or masks, of a rollout are scored.
    """

    title: str
    part: str
    start: str = "diffusion"
    settings: dict = field(default_factory=dict)
    share: float = 1.0
    steps_scored: bool = False


ARMS = {
    "vrpo": Arm("VRPO: shared masks, 8", "preferences", settings={"estimator": "elbo", "num_masks": 8}),
    "naive": Arm("naive masks, 8", "preferences", settings={"estimator": "naive", "num_masks": 8}),
    "naive_one": Arm(
        "naive masks, 1, 8 × the steps", "preferences", settings={"estimator": "naive", "num_masks": 1}, share=8
    ),
    "vrpo_one": Arm(
        "VRPO: shared masks, 1, 8 × the steps", "preferences", settings={"estimator": "elbo", "num_masks": 1}, share=8
    ),
    "ar_dpo": Arm("AR, DPO", "preferences", "ar"),
    "start": Arm("before GRPO", "problems", share=0),
    "replay": Arm("GRPO, replay", "problems", settings={"estimator": "replay"}, steps_scored=True),
    "elbo": Arm("GRPO, ELBO", "problems", settings={"estimator": "elbo"}, steps_scored=True),
    "mean_field": Arm("GRPO, mean field", "problems", settings={"estimator": "mean_field"}),
    "ar_start": Arm("AR, before GRPO", "problems", "ar", share=0),
    "ar_grpo": Arm("AR, GRPO", "problems", "ar"),
}
PARTS = {"preferences": ("vrpo", "naive", "ar_dpo"), "problems": ("start", "replay", "elbo")}  # others by `runs`
AT_LEAST_ONE = ("steps", "prompts", "rollouts", "training_problems", "eval_problems", "max_new_tokens", "jobs")


@dataclass
class PostTrainingArguments:
    """What is studied, and on what."""

    part: Literal[tuple(PARTS)] = field(metadata={"help": "preferences: DPO. problems: GRPO."})
    diffusion: str | None = field(default=None, metadata={"help": "Checkpoint that diffusion runs start from."})
    ar: str | None = field(default=None, metadata={"help": "Checkpoint that AR runs start from."})
    output: str = field(default="runs/post_training", metadata={"help": "Folder of the study."})
    runs: list[str] | None = field(
        default=None, metadata={"help": f"Only these: {', '.join(ARMS)}. Default: {PARTS}."}
    )
    seeds: list[int] = field(default_factory=lambda: [1], metadata={"help": "Of order, noise and rollouts."})
    steps: int = field(default=300, metadata={"help": "Optimizer steps of a run."})
    data: list[str] | None = field(default=None, metadata={"help": "preferences: pairs to train on. Required."})
    eval_data: list[str] | None = field(default=None, metadata={"help": "preferences: held-out pairs. Required."})
    on_bad_rows: Literal["stop", "skip"] = field(
        default="stop", metadata={"help": "preferences: skip leaves out pairs that are longer than `max_length`."}
    )
    max_length: int | None = field(default=None, metadata={"help": "preferences: most tokens of a prompt and answer."})
    samples: int = field(default=64, metadata={"help": "preferences: masks per held-out answer, even."})
    puzzle: Literal[tuple(PUZZLES)] = field(default="sudoku", metadata={"help": "problems: of which kind."})
    puzzle_options: str = field(default="{}", metadata={"help": "problems: options of the puzzle, as JSON."})
    unlike: list[str] = field(
        default_factory=list, metadata={"help": "problems: rows of SFT; their problems are in no rollout."}
    )
    training_problems: int = field(default=2400, metadata={"help": "problems: different ones to train on."})
    eval_problems: int = field(default=400, metadata={"help": "problems: to judge by, of the puzzle's test side."})
    prompts: int = field(default=8, metadata={"help": "problems: prompts of a step."})
    rollouts: int = field(default=8, metadata={"help": "problems: rollouts of a prompt."})
    score_steps: int = field(
        default=4, metadata={"help": "problems: steps (replay) or masks (ELBO) of a rollout that are scored; 0: all."}
    )
    max_new_tokens: int = field(default=17, metadata={"help": "problems: places of an answer, its end included."})
    jobs: int = field(default=1, metadata={"help": "Runs at a time, which share the cores."})
    minutes: float | None = field(default=None, metadata={"help": "Start no further run after so many minutes."})
    only: str | None = field(default=None, metadata={"help": "Do this one run, <name>-<seed>, in this process."})

    def __post_init__(self):
        for name in AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if self.score_steps < 0:
            raise ValueError(f"`score_steps` must be >= 0, got {self.score_steps}")
        if self.rollouts < 2:
            raise ValueError(f"`rollouts` must be at least 2, which are compared, got {self.rollouts}")
        if not self.seeds:
            raise ValueError(f"`seeds` must be given, got {self.seeds}")
        arms = [name for name, arm in ARMS.items() if arm.part == self.part]
        if unknown := [name for name in self.runs or () if name not in arms]:
            raise ValueError(f"`runs` must be among {', '.join(arms)} in part {self.part}, got {unknown[0]!r}")
        runs = [self.only.rpartition("-")[0]] if self.only else self.runs or PARTS[self.part]
        needed = {ARMS[name].start for name in runs}
        needed |= {"data", "eval_data"} if self.part == "preferences" else set()
        for name in sorted(needed):
            if not getattr(self, name):
                raise ValueError(f"`{name}` must be given for these runs, got {getattr(self, name)}")


class PostTraining(Cells):
    """The runs of a part."""

    program = "post_training_study.py"
    free = (*(name for name in Cells.free if name != "part"), "ar")  # added to a folder when its runs are

    def names(self) -> tuple[str, ...]:
        return PARTS[self.args.part]

    def needs(self, name: str) -> None:
        """Nothing: all start from given checkpoints."""

    def done(self, name: str, seed: int) -> bool:
        return (self.run_folder(name, seed) / "scores.json").exists()

    @property
    def problems(self) -> Path:
        return self.folder / "problems.jsonl"

    def prepare(self) -> None:
        """The problems to train on, which no row of `unlike` has."""
        from nanollada.trainers.data.feedback.prompts import texts_of
        from nanollada.trainers.puzzles.registry import write_rows

        if self.args.part == "problems" and not self.problems.exists():
            given, options = texts_of(self.args.unlike, "unlike"), json.loads(self.args.puzzle_options)
            write_rows(self.args.puzzle, self.args.training_problems, self.problems, 1, "prompts", given, **options)

    def do(self, name: str, seed: int) -> None:
        """A run with its measurements, in this process."""
        from nanollada.scripts.studies import judged
        from nanollada.trainers import run
        from nanollada.trainers.registry import TRAINERS

        args, arm, folder = self.args, ARMS[name], self.run_folder(name, seed)
        if arm.share and not (folder / "run.json").exists():
            run.main(TRAINERS[TRAINED[arm.part]], self.overrides(name, seed))
        start = getattr(args, arm.start)
        trained = str(folder) if arm.share else start
        folder.mkdir(exist_ok=True)
        if arm.part == "preferences":
            settings = (args.eval_data, args.samples, args.max_length)
            before = self.folder / f"start_{arm.start}.json"
            if not before.exists():
                write_json(before, judged.preferences(start, *settings))
            scores = {**judged.preferences(trained, *settings), "start": read_json(before)["pairs"]}
        else:
            options = json.loads(args.puzzle_options)
            scores = judged.problems(trained, args.puzzle, args.eval_problems, options, args.max_new_tokens, seed)
            if arm.start == "diffusion":
                scores["gradients"] = judged.agreement(
                    trained, str(self.problems), args.rollouts, args.max_new_tokens, seed
                )
        write_json(folder / "scores.json", {"run": name, "seed": seed, **self.command(), **scores})

    def overrides(self, name: str, seed: int) -> list[str]:
        """Command-line arguments of a run's trainer."""
        import torch

        args, arm = self.args, ARMS[name]
        chosen = {"model_name_or_path": getattr(args, arm.start), "output_dir": self.run_folder(name, seed)}
        chosen |= {"seed": seed, "max_steps": round(args.steps * arm.share), "held_out_fraction": 0.0}
        chosen |= {"use_cpu": not torch.cuda.is_available(), "save_strategy": "no", "logging_steps": 10}
        if arm.part == "preferences":
            chosen |= {"data": args.data, "on_bad_rows": args.on_bad_rows}
            chosen |= {} if args.max_length is None else {"max_length": args.max_length}
        else:
            chosen |= {"data": [str(self.problems)], "num_generations": args.rollouts}
            chosen |= {"per_device_train_batch_size": args.prompts * args.rollouts}
            chosen |= {"max_completion_length": args.max_new_tokens}
            chosen |= {"score_steps": args.score_steps} if arm.steps_scored and args.score_steps else {}
        return options_of(chosen | arm.settings | options_by_name(self.options))

    def report(self) -> dict[str, dict]:
        """`<part>.json` and `<part>.md` from all finished runs of the folder; the former by part."""
        from nanollada.scripts.studies.gains import write_gains

        arms = {name: arm for name, arm in ARMS.items() if arm.part == self.args.part}
        if not (finished := self.finished(arms)):
            return {}
        print(write_gains(self.folder, self.args.part, finished, {name: arm.title for name, arm in arms.items()}))
        return {self.args.part: read_json(self.folder / f"{self.args.part}.json")}


def post_training(args: PostTrainingArguments, **options) -> dict[str, dict]:
    """
    Everything that a study of post-training does: trains, judges and reports; what is done is not done again.

    Args:
        args ([`PostTrainingArguments`]): What is studied; `args.only` does this one run here, and reports on nothing.
        options: Of the trainer, by name, for every training.

    Returns:
        `dict[str, dict]`: the record of the part, if it has a finished run, as in `<part>.json`.
    """
    runs = PostTraining(args, options_of(options))
    if args.only is None:
        return runs.run()
    name, _, seed = args.only.rpartition("-")
    runs.do(name, int(seed))
    return {}


def trainer_options() -> list[str]:
    """The names of all options of the trainers."""
    from nanollada.trainers.commands.parser import Parser
    from nanollada.trainers.registry import TRAINERS

    parsers = [Parser(TRAINERS[name].arguments) for name in TRAINED.values()]
    return list(dict.fromkeys(name for parser in parsers for name in parser.names()))


def main(argv: list[str] | None = None) -> None:
    """Parses the command line and runs everything, or the one run of `--only`."""
    from nanollada.trainers.commands.parser import Parser

    args, options = Parser(PostTrainingArguments, trainer_options).parse_args_and_config(argv)
    post_training(args, **options_by_name(options))
