"""Evidence on your text: AR, masked and block diffusion with equal parameters, training tokens and tokenizer."""

import os
from pathlib import Path

from nanollada.scripts.studies.cells import Cells, options_by_name, options_of
from nanollada.scripts.studies.variants import (
    NOISE,
    OPTIONAL,
    PARTS,
    SIZES,
    TOKENIZER_TEXTS,
    VARIANTS,
    StudyArguments,
    needs,
)
from nanollada.trainers.records import read_json, write_json

RECIPES = Path(os.path.relpath(Path(__file__).parents[1] / "recipes"))  # as in the command of a run


class Study(Cells):
    """The runs of `scripts/study.py`."""

    program = "study.py"
    free = (*Cells.free, "eval_blocks", "draws")  # everything else belongs to the folder's numbers

    def names(self) -> list[str]:
        return [name for part in self.args.part for name in PARTS[part]]

    def needs(self, name: str) -> str | None:
        return needs(name)

    # ---- rows and tokenizer

    @property
    def tokenizer(self) -> str:
        return self.args.tokenizer or str(self.folder / "tokenizer")

    def prepare(self) -> None:
        """The tokenizer, the training texts by halves, the small part, and the held-out documents."""
        from nanollada.scripts.studies.rows import held_out_texts, make_tokenizer, split_texts

        if not (Path(self.tokenizer) / "tokenizer.json").exists():
            make_tokenizer(self.args.data, Path(self.tokenizer), TOKENIZER_TEXTS)
        corpus = self.folder / "corpus"
        if not (corpus / "facts.json").exists():
            corpus.mkdir(exist_ok=True)
            sizes = split_texts(self.args.data, self.tokenizer, corpus, self.args.tokens, self.args.small_tokens)
            for source in self.args.eval_data:
                sizes[Path(source).stem] = held_out_texts(source, self.eval_file(source), self.args.eval_documents)
            write_json(corpus / "facts.json", sizes)

    def eval_file(self, source: str) -> Path:
        return self.folder / "corpus" / f"eval_{Path(source).stem}.jsonl"

    def files(self, rows: str) -> list[str]:
        """The files of a variant's rows."""
        names = {"all": ("first", "second")}.get(rows, (rows,))
        return [str(self.folder / "corpus" / f"{name}.jsonl") for name in names]

    # ---- one run

    def done(self, name: str, seed: int) -> bool:
        files = ("noise.json",) if name in NOISE else ("run.json",)
        if name in VARIANTS and VARIANTS[name].rows != "small":
            files += ("scores.json",)
        return all((self.run_folder(name, seed) / file).exists() for file in files)

    def do(self, name: str, seed: int) -> None:
        """A run with its measurements, in this process."""
        from nanollada.scripts.studies.measure import loss_noise, score

        folder = self.run_folder(name, seed)
        if name in NOISE:
            run = read_json(self.run_folder(NOISE[name], seed) / "run.json")
            length, batch = run["data"]["max_length"], self.setting("diffusion", "per_device_train_batch_size")
            rows = self.files("first")
            noise = loss_noise(self.run_folder(NOISE[name], seed), rows, self.args.draws, batch, length, seed)
            folder.mkdir(exist_ok=True)
            return write_json(folder / "noise.json", {"of": NOISE[name], "seed": seed, **self.command(), **noise})
        if not (folder / "run.json").exists():
            self.train(name, seed)
        if not self.done(name, seed):
            run = read_json(folder / "run.json")
            sources = {Path(source).stem: self.eval_file(source) for source in self.args.eval_data}
            size = self.setting(VARIANTS[name].kind, "per_device_eval_batch_size")
            options = {"samples": self.args.samples, "max_length": run["data"]["max_length"], "batch_size": size}
            blocks = [None] if VARIANTS[name].settings.get("label_shift") else [None, *self.args.eval_blocks]
            write_json(
                folder / "scores.json", {**self.command(), "results": score(folder, sources, blocks, **options)}
            )

    def train(self, name: str, seed: int) -> None:
        from nanollada.trainers import run
        from nanollada.trainers.registry import TRAINERS

        kind = VARIANTS[name].kind
        run.main(TRAINERS[kind], ["--config", str(RECIPES / f"study_{kind}.yaml"), *self.overrides(name, seed)])

    def setting(self, kind: str, name: str):
        """A number of the trainings: of the options, the size or the recipe, in this order."""
        import yaml

        if f"--{name}" in self.options:
            return yaml.safe_load(self.options[self.options.index(f"--{name}") + 1])
        recipe = yaml.safe_load((RECIPES / f"study_{kind}.yaml").read_text())
        return (recipe | SIZES[self.args.size]).get(name, 1)

    def steps(self, name: str) -> int:
        """Optimizer steps of a run."""
        variant = VARIANTS[name]
        number = [self.setting(variant.kind, part) for part in ("per_device_train_batch_size", "max_length")]
        per_step = number[0] * number[1] * self.setting(variant.kind, "gradient_accumulation_steps")
        if variant.rows == "small":
            return max(2, round(variant.share * self.args.small_epochs * self.args.small_tokens / per_step))
        total = max(4, round(self.args.tokens / per_step / 2) * 2)
        return total // 2 if variant.rows in ("first", "second") else total

    def overrides(self, name: str, seed: int) -> list[str]:
        """What a run changes in its recipe, as command-line arguments."""
        import torch

        from nanollada.trainers.models import SHAPE

        variant, steps = VARIANTS[name], self.steps(name)
        full = steps * (2 if variant.rows in ("first", "second") else 1)
        chosen = {"output_dir": self.run_folder(name, seed), "seed": seed, "max_steps": steps, "bf16": True}
        chosen |= {"data": self.files(variant.rows), "held_out_fraction": 0.0}
        chosen["use_cpu"] = not torch.cuda.is_available()
        # half runs warm up and decay for as many steps as full ones
        chosen["warmup_steps"] = max(1, round(self.setting(variant.kind, "warmup_steps") * full))
        chosen["lr_decay_ratio"] = self.setting(variant.kind, "lr_decay_ratio") * full / steps
        chosen |= SIZES[self.args.size]
        if variant.rows == "small":
            full = steps / variant.share
            chosen |= {"eval_strategy": "steps", "eval_steps": max(1, round(full / self.args.small_evaluations))}
            chosen["eval_data"] = [str(self.eval_file(source)) for source in self.args.eval_data]
        chosen["tokenizer_name_or_path"] = self.tokenizer
        if variant.init is not None:
            chosen["model_name_or_path"] = self.run_folder(variant.init, seed)
        chosen |= variant.settings
        chosen |= options_by_name(self.options)
        return options_of({key: value for key, value in chosen.items() if variant.init is None or key not in SHAPE})

    def report(self) -> dict[str, dict]:
        """`<part>.json`, `<part>.md` and `<part>.png` from all finished runs of the folder; the former by part."""
        from nanollada.scripts.studies.report import write_part

        records = {}
        for part in self.args.part:
            if finished := self.finished(PARTS[part] + OPTIONAL[part]):
                print(write_part(self.folder, part, finished))
                records[part] = read_json(self.folder / f"{part}.json")
        return records


def study(args: StudyArguments, **options) -> dict[str, dict]:
    """
    Everything that a study does: prepares, trains, measures and reports; what is done is not done again.

    Args:
        args ([`StudyArguments`]): What is studied; `args.only` does this one run here, and reports on nothing.
        options: Of the trainers, by name, for every training.

    Returns:
        `dict[str, dict]`: the record of each part that has a finished run, as in `<part>.json`.
    """
    runs = Study(args, options_of(options))
    if args.only is None:
        return runs.run()
    name, _, seed = args.only.rpartition("-")
    runs.do(name, int(seed))
    return {}


def trainer_options() -> list[str]:
    """The names of all options of the trainers."""
    from nanollada.trainers.commands.parser import Parser
    from nanollada.trainers.registry import TRAINERS

    kinds = dict.fromkeys(variant.kind for variant in VARIANTS.values())
    return list(dict.fromkeys(name for kind in kinds for name in Parser(TRAINERS[kind].arguments).names()))


def main(argv: list[str] | None = None) -> None:
    """Parses the command line and runs everything, or the one run of `--only`."""
    from nanollada.trainers.commands.parser import Parser

    args, options = Parser(StudyArguments, trainer_options).parse_args_and_config(argv)
    study(args, **options_by_name(options))
