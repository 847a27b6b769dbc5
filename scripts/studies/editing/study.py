"""Evidence on editing: the runs of `scripts/editing_study.py`."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nanollada.scripts.studies.cells import Cells, options_by_name, options_of
from nanollada.scripts.studies.editing.arms import ARMS, DRAFTING, PARTS, Part
from nanollada.scripts.studies.editing.decoders import DECODERS
from nanollada.trainers.puzzles.registry import PUZZLES
from nanollada.trainers.records import read_json, write_json

AT_LEAST_ONE = ("steps", "training_rows", "eval_rows", "max_new_tokens", "prompt_tokens", "belief_rows", "jobs")


@dataclass
class EditingArguments:
    """What is studied, and on what."""

    part: Literal[tuple(PARTS)] = field(metadata={"help": "; ".join(f"{n}: {p.title}" for n, p in PARTS.items())})
    diffusion: str = field(metadata={"help": "Checkpoint that all arms start from."})
    ar: str | None = field(default=None, metadata={"help": "text, infill: the AR twin that judges."})
    output: str = field(default="runs/editing", metadata={"help": "Folder of the study."})
    runs: list[str] | None = field(
        default=None, metadata={"help": f"Only these: {', '.join(ARMS)}. Default: the part's."}
    )
    decoders: list[str] | None = field(
        default=None, metadata={"help": f"Only these: {', '.join(DECODERS)}. Default: the part's."}
    )
    seeds: list[int] = field(default_factory=lambda: [1], metadata={"help": "Of order and noise."})
    steps: int = field(default=300, metadata={"help": "Optimizer steps of a run."})
    data: list[str] = field(default_factory=list, metadata={"help": "text, infill: texts to train on."})
    eval_data: list[str] = field(default_factory=list, metadata={"help": "text, infill: held-out texts."})
    puzzle_options: str = field(default="{}", metadata={"help": "Of the puzzle, as JSON."})
    training_rows: int = field(default=20000, metadata={"help": "Puzzles: different problems to train on."})
    eval_rows: int = field(default=200, metadata={"help": "Held-out rows that every decoder writes."})
    belief_rows: int = field(default=48, metadata={"help": "Of these, whose visible tokens are asked about."})
    max_new_tokens: int = field(default=17, metadata={"help": "Places of an answer; infill: of the longest gap."})
    prompt_tokens: int = field(default=16, metadata={"help": "text: given tokens. infill: of a row with its gap."})
    jobs: int = field(default=1, metadata={"help": "Runs at a time, which share the cores."})
    minutes: float | None = field(default=None, metadata={"help": "Start no further run after so many minutes."})
    only: str | None = field(default=None, metadata={"help": "Do this one run, <name>-<seed>, in this process."})

    def __post_init__(self):
        for name in AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if not self.seeds:
            raise ValueError(f"`seeds` must be given, got {self.seeds}")
        part = PARTS[self.part]
        for name, known in (("runs", ARMS), ("decoders", DECODERS)):
            if unknown := [item for item in getattr(self, name) or () if item not in known]:
                raise ValueError(f"`{name}` must be among {', '.join(known)}, got {unknown[0]!r}")
        needed = () if part.puzzle else ("ar", "data", "eval_data")
        for name in needed:
            if not getattr(self, name):
                raise ValueError(f"`{name}` must be given in part {self.part}, got {getattr(self, name)}")
        if part.puzzle:
            PUZZLES[part.puzzle].check_options(json.loads(self.puzzle_options))


class Editing(Cells):
    """The runs of a part."""

    program = "editing_study.py"
    free = (*(name for name in Cells.free if name != "part"), "decoders")  # others may be added

    @property
    def part(self) -> Part:
        return PARTS[self.args.part]

    def names(self) -> tuple[str, ...]:
        return self.part.arms

    def needs(self, name: str) -> None:
        """Nothing: all start from a given checkpoint."""

    def done(self, name: str, seed: int) -> bool:
        return set(self.decoders) <= set(self.scores(name, seed).get("asked", ()))

    @property
    def decoders(self) -> tuple[str, ...] | list[str]:
        return self.args.decoders or self.part.decoders

    def scores(self, name: str, seed: int) -> dict:
        """What was measured at a run so far."""
        path = self.run_folder(name, seed) / "scores.json"
        return read_json(path) if path.exists() else {}

    @property
    def problems(self) -> Path:
        return self.folder / "problems.jsonl"

    def prepare(self) -> None:
        """The problems to train on."""
        from nanollada.trainers.puzzles.registry import write_rows

        args, puzzle = self.args, self.part.puzzle
        if puzzle and not self.problems.exists():
            write_rows(puzzle, args.training_rows, self.problems, 1, **json.loads(args.puzzle_options))

    def do(self, name: str, seed: int) -> None:
        """A run with its measurements, in this process."""
        from nanollada.scripts.studies.editing import measures
        from nanollada.trainers import run
        from nanollada.trainers.registry import TRAINERS

        args, arm, folder = self.args, ARMS[name], self.run_folder(name, seed)
        if arm.trains and not (folder / "run.json").exists():
            run.main(TRAINERS["diffusion"], self.overrides(name, seed))
        folder.mkdir(exist_ok=True)
        scores = self.scores(name, seed)
        asked = scores.get("asked", [])
        missing = [decoder for decoder in self.decoders if decoder not in asked]
        trained, task = str(folder) if arm.trains else args.diffusion, self.part.puzzle or args.part
        found = measures.measure(trained, missing, task, args, seed)
        found["decoders"] = scores.get("decoders", {}) | found["decoders"]
        found["asked"] = [*asked, *missing]
        write_json(folder / "scores.json", {"run": name, "seed": seed, **self.command(), **found})

    def overrides(self, name: str, seed: int) -> list[str]:
        """Command-line arguments of a run's trainer."""
        import torch

        args = self.args
        chosen = {"model_name_or_path": args.diffusion, "output_dir": self.run_folder(name, seed), "seed": seed}
        chosen |= {"data": [str(self.problems)] if self.part.puzzle else args.data, "max_steps": args.steps}
        chosen |= {"held_out_fraction": 0.0, "threshold_rows": 0, "save_strategy": "no", "logging_steps": 10}
        chosen |= {"use_cpu": not torch.cuda.is_available()}
        arm = ARMS[name].settings
        chosen |= self.part.settings | arm | (self.part.drafts if arm.get("edit_source") in DRAFTING else {})
        return options_of(chosen | options_by_name(self.options))

    def report(self) -> dict[str, dict]:
        """`<part>.json`, `.md` and `.png` from all finished runs of the folder; the first by part."""
        from nanollada.scripts.studies.editing.frontier import write_frontier

        if not (finished := self.finished(ARMS)):
            return {}
        print(write_frontier(self.folder, self.args.part, finished))
        return {self.args.part: read_json(self.folder / f"{self.args.part}.json")}


def editing(args: EditingArguments, **options) -> dict[str, dict]:
    """
    Everything that a study of editing does: trains, measures and reports; what is done is not done again.

    Args:
        args ([`EditingArguments`]): What is studied; `args.only` does this one run here, and reports on nothing.
        options: Of the trainer, by name, for every training.

    Returns:
        `dict[str, dict]`: the record of the part, if it has a finished run, as in `<part>.json`.
    """
    runs = Editing(args, options_of(options))
    if args.only is None:
        return runs.run()
    name, _, seed = args.only.rpartition("-")
    runs.do(name, int(seed))
    return {}


def trainer_options() -> list[str]:
    """The names of the trainer's options."""
    from nanollada.trainers.commands.parser import Parser
    from nanollada.trainers.registry import TRAINERS

    return Parser(TRAINERS["diffusion"].arguments).names()


def main(argv: list[str] | None = None) -> None:
    """Parses the command line and runs everything, or the one run of `--only`."""
    from nanollada.trainers.commands.parser import Parser

    args, options = Parser(EditingArguments, trainer_options).parse_args_and_config(argv)
    editing(args, **options_by_name(options))
