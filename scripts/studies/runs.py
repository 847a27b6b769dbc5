"""Evidence on your text: AR, masked and block diffusion with equal parameters, training tokens and tokenizer."""

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

PROGRAM = Path(__file__).parents[1] / "study.py"
RECIPES = Path(os.path.relpath(Path(__file__).parents[1] / "recipes"))  # as in the command of a run
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
    part: list[str] = field(default_factory=lambda: ["a"], metadata={"help": "a, b, c, d."})
    runs: list[str] | None = field(
        default=None, metadata={"help": f"Only these: {', '.join([*VARIANTS, *NOISE])}. Default: those of the parts."}
    )
    seeds: list[int] = field(default_factory=lambda: [1], metadata={"help": "Of weights, order and noise."})
    size: str = field(default="small", metadata={"help": "small (3M parameters) or 32m."})
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
        if len({Path(source).stem for source in self.eval_data}) < len(self.eval_data):
            raise ValueError(f"`eval_data` must have files with different names, got {self.eval_data}")


# What may differ between two calls for the same folder; everything else belongs to its numbers.
FREE = ("output", "part", "runs", "seeds", "eval_blocks", "draws", "jobs", "minutes", "only")


class Study:
    """
    The runs of a study.

    Args:
        args ([`StudyArguments`]): The settings; kept in the folder, which serves no other ones.
        options (`list[str]`): Command-line arguments for every training.

    Raises:
        `ValueError`: if the folder holds a study with other settings.
    """

    def __init__(self, args: StudyArguments, options: list[str] | None = None):
        self.args, self.options = args, list(options or [])
        self.folder = Path(args.output)
        settings = {name: value for name, value in asdict(args).items() if name not in FREE}
        settings["options"] = self.options
        path = self.folder / "settings.json"
        if path.exists() and (earlier := json.loads(path.read_text())) != settings:
            changed = [name for name in settings if settings[name] != earlier.get(name)]
            raise ValueError(
                f"`output` holds a study with another `{changed[0]}`: choose another folder, got {self.folder}"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)

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
            facts = split_texts(self.args.data, self.tokenizer, corpus, self.args.tokens, self.args.small_tokens)
            for source in self.args.eval_data:
                facts[Path(source).stem] = held_out_texts(source, self.eval_file(source), self.args.eval_documents)
            write_json(corpus / "facts.json", facts)

    def eval_file(self, source: str) -> Path:
        return self.folder / "corpus" / f"eval_{Path(source).stem}.jsonl"

    def files(self, rows: str) -> list[str]:
        """The files of a variant's rows."""
        names = {"all": ("first", "second")}.get(rows, (rows,))
        return [str(self.folder / "corpus" / f"{name}.jsonl") for name in names]

    # ---- one run

    def run_folder(self, name: str, seed: int) -> Path:
        return self.folder / f"{name}-{seed}"

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
            run = json.loads((self.run_folder(NOISE[name], seed) / "run.json").read_text())
            length, batch = run["data"]["max_length"], self.setting("diffusion", "per_device_train_batch_size")
            rows = self.files("first")
            found = loss_noise(self.run_folder(NOISE[name], seed), rows, self.args.draws, batch, length, seed)
            folder.mkdir(exist_ok=True)
            return write_json(folder / "noise.json", {"of": NOISE[name], "seed": seed, **self.command(), **found})
        if not (folder / "run.json").exists():
            self.train(name, seed)
        if not self.done(name, seed):
            run = json.loads((folder / "run.json").read_text())
            sources = {Path(source).stem: self.eval_file(source) for source in self.args.eval_data}
            size = self.setting(VARIANTS[name].kind, "per_device_eval_batch_size")
            options = {"samples": self.args.samples, "max_length": run["data"]["max_length"], "batch_size": size}
            blocks = [None] if VARIANTS[name].settings.get("label_shift") else [None, *self.args.eval_blocks]
            write_json(
                folder / "scores.json", {**self.command(), "results": score(folder, sources, blocks, **options)}
            )

    def command(self) -> dict:
        """The command of this process and what it runs on, for its numbers."""
        from nanollada.trainers.models import hardware, versions

        command = shlex.join(["python", "scripts/study.py", *sys.argv[1:]])
        return {"command": command, "hardware": hardware(), "versions": versions()}

    def train(self, name: str, seed: int) -> None:
        import nanollada.modeling_nanollada as models
        from nanollada.trainers import causal, diffusion, run

        trainer, config, model = {
            "ar": (causal.CausalTrainer, causal.CausalConfig, models.NanoLLaDAForCausalLM),
            "diffusion": (diffusion.DiffusionTrainer, diffusion.DiffusionConfig, models.NanoLLaDAForMaskedLM),
        }[VARIANTS[name].kind]
        recipe = RECIPES / f"study_{VARIANTS[name].kind}.yaml"
        run.main(trainer, config, model, ["--config", str(recipe), *self.overrides(name, seed)])

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
        whole = steps * (2 if variant.rows in ("first", "second") else 1)
        chosen = {"output_dir": self.run_folder(name, seed), "seed": seed, "max_steps": steps, "bf16": True}
        chosen |= {
            "data": self.files(variant.rows),
            "held_out_fraction": 0.0,
            "use_cpu": not torch.cuda.is_available(),
        }
        # half runs warm up and decay for as many steps as whole ones
        chosen["warmup_steps"] = max(1, round(self.setting(variant.kind, "warmup_steps") * whole))
        chosen["lr_decay_ratio"] = self.setting(variant.kind, "lr_decay_ratio") * whole / steps
        chosen |= SIZES[self.args.size]
        if variant.rows == "small":
            whole = steps / variant.share
            chosen |= {"eval_strategy": "steps", "eval_steps": max(1, round(whole / self.args.small_evaluations))}
            chosen["eval_data"] = [str(self.eval_file(source)) for source in self.args.eval_data]
        chosen["tokenizer_name_or_path"] = self.tokenizer
        if variant.init is not None:
            chosen["model_name_or_path"] = self.run_folder(variant.init, seed)
        chosen |= variant.settings
        options = dict(zip(self.options[::2], self.options[1::2], strict=True))
        chosen |= {name.removeprefix("--"): value for name, value in options.items()}
        given = {key: value for key, value in chosen.items() if variant.init is None or key not in SHAPE}
        return [part for key, value in given.items() for part in (f"--{key}", *listed(value))]

    # ---- all runs

    def plan(self) -> list[tuple[str, int]]:
        """The runs of this call, seed by seed, each behind the one that it starts from; finished ones are left out."""
        names = self.args.runs or [name for part in self.args.part for name in PARTS[part]]
        order = []
        for seed in self.args.seeds:
            for name in names:
                order += [(needed, seed) for needed in (needs(name), name) if needed]
        return [run for run in dict.fromkeys(order) if not self.done(*run)]

    def run(self) -> None:
        """
        Prepares, runs what is not done, as many at a time as `jobs`, and reports on all that is.

        Raises:
            `RuntimeError`: with the end of its log, if a run failed; the others that were running are finished first.
        """
        self.prepare()
        waiting, running, failed = self.plan(), {}, []
        started, count = time.perf_counter(), len(waiting)
        while waiting or running:
            late = self.args.minutes is not None and time.perf_counter() - started > 60 * self.args.minutes
            if late or failed:
                waiting = []
            ready = [run for run in waiting if not needs(run[0]) or self.done(needs(run[0]), run[1])]
            for run in ready[: self.args.jobs - len(running)]:
                waiting.remove(run)
                running[run] = self.start(*run)
                print(f"{time.perf_counter() - started:7.0f} s  {count - len(waiting)}/{count}  {run[0]}-{run[1]}")
            time.sleep(0.2)
            for run in [run for run, process in running.items() if process.poll() is not None]:
                if running.pop(run).returncode:
                    failed.append(run)
        if failed:
            log = self.run_folder(*failed[0]).with_suffix(".log")
            raise RuntimeError(f"{failed[0][0]}-{failed[0][1]} failed: {log}\n{log.read_text()[-2000:]}")
        self.report()

    def start(self, name: str, seed: int) -> subprocess.Popen:
        """A run in a process of its own, with its share of the cores; what it prints goes to `<name>-<seed>.log`."""
        threads = max(1, (os.cpu_count() or 1) // self.args.jobs)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, str(PROGRAM), *self.arguments(), "--only", f"{name}-{seed}"]
        with open(self.run_folder(name, seed).with_suffix(".log"), "w") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def arguments(self) -> list[str]:
        """This study's settings as command-line arguments, without those of the whole call."""
        skipped = ("part", "runs", "seeds", "jobs", "minutes", "only")
        given = {name: value for name, value in asdict(self.args).items() if name not in skipped and value}
        return [part for name, value in given.items() for part in (f"--{name}", *listed(value))] + self.options

    def report(self) -> None:
        """`<part>.json`, `<part>.md` and `<part>.png` from all finished runs of the folder."""
        from nanollada.scripts.studies.report import write_part

        for part in self.args.part:
            found = {}
            for name in PARTS[part] + OPTIONAL[part]:
                folders = sorted(self.folder.glob(f"{name}-*/"), key=lambda path: path.name)
                found[name] = [folder for folder in folders if self.done(name, int(folder.name.rpartition("-")[2]))]
            if any(found.values()):
                print(write_part(self.folder, part, {name: paths for name, paths in found.items() if paths}))


def needs(name: str) -> str | None:
    """The run whose weights a run starts from or measures."""
    return NOISE[name] if name in NOISE else VARIANTS[name].init


def listed(value) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def write_json(path: Path, value) -> None:
    """Writes beside and renames: a file that exists is whole."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    os.replace(partial, path)


def main(argv: list[str] | None = None) -> None:
    """Parses the command line and runs everything, or the one run of `--only`."""
    from trl import TrlParser

    parser = TrlParser(StudyArguments, allow_abbrev=False)
    args, options = parser.parse_args_and_config(argv, return_remaining_strings=True)
    if len(options) % 2 or any(not name.startswith("--") for name in options[::2]):
        raise ValueError(f"options for the trainers must be pairs `--name value`, got {options}")
    study = Study(args, options)
    if args.only is None:
        return study.run()
    name, _, seed = args.only.rpartition("-")
    study.do(name, int(seed))
