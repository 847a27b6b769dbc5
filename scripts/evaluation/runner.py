"""Runs an evaluation suite: one protocol for AR and diffusion checkpoints, in Chinese and English.

    python scripts/evaluate.py --suite scripts/suites/quickstart.yaml --suite_data runs/quickstart/corpus \\
        --checkpoints runs/quickstart/ar_sft runs/quickstart/diffusion_sft --output runs/evaluation

Every (model, task) leaves a result and a record of each row behind; a run that was killed goes on where it stopped.
`suite.json`, `suite.md` and `suite.png` have it all, and each checkpoint's `evaluation.json` its own figures.
"""

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from nanollada.hub_upload.evaluation_file import (
    EVALUATION,
    model_digests,
    old_evaluation,
    save_evaluation,
    weights_digest,
)
from nanollada.hub_upload.recompute import ADAPTER, base_folder, read_adapter
from nanollada.scripts.evaluation.bench import Bench, Outcome, Planned, Task
from nanollada.scripts.evaluation.kinds import KINDS, definitions, results_of
from nanollada.scripts.evaluation.rows import rows_of
from nanollada.scripts.evaluation.suite_file import read_suite
from nanollada.trainers.commands.programs import named_file
from nanollada.trainers.data.files import DataError
from nanollada.trainers.records import command, file_digest, read_json, write_json, write_whole

PROTOCOL = 2  # raised whenever the same arguments would give other numbers
# What of a checkpoint decides its numbers beside the weights.
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass
class SuiteArguments:
    """With `--suite`: which models are measured, by which tasks."""

    suite: str = field(
        metadata={"help": "YAML or JSON file of tasks, or the name of a suite of the package (quickstart)."}
    )
    checkpoints: list[str] = field(metadata={"help": "Folders of the models, AR or diffusion."})
    suite_data: str | None = field(
        default=None, metadata={"help": "Folder of the data files that the suite names. Default: where you are."}
    )
    output: str = field(default="runs/evaluation", metadata={"help": "Folder of the results."})
    names: list[str] | None = field(
        default=None, metadata={"help": "What the models are called. Default: the names of their folders."}
    )
    tasks: list[str] | None = field(default=None, metadata={"help": "Only these tasks of the suite."})
    limit: int | None = field(
        default=None, metadata={"help": "At most so many rows of each task, evenly spread over its data."}
    )
    samples: int = field(default=128, metadata={"help": "Diffusion: Monte Carlo masks per scored text, even."})
    seed: int = field(default=0, metadata={"help": "Of the masks, of puzzles, and of what is drawn."})
    batch_size: int = field(default=16, metadata={"help": "Rows per forward pass; changes rounding alone."})
    judge: str | None = field(
        default=None, metadata={"help": "Folder of a causal model: gives the drawn texts' perplexity."}
    )
    check_errors: int | None = field(
        default=None,
        metadata={
            "help": "Instead of the tasks: of so many answers of at most 12 tokens the bound by these samples against "
            "its enumeration. Are the standard errors what they say?"
        },
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that comes with the checkpoints."})
    device: str | None = field(default=None, metadata={"help": "Default: cuda if there is one, else cpu."})

    def __post_init__(self):
        self.suite = str(named_file(self.suite, "suite", "suite"))
        for name in ("batch_size", "limit", "check_errors"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        if self.samples < 2 or self.samples % 2:
            raise ValueError(f"`samples` must be a positive even number, got {self.samples}")
        for name, folders in (("checkpoints", self.checkpoints), ("judge", [self.judge] if self.judge else [])):
            for folder in folders:
                adapter = read_adapter(folder) is not None
                if adapter and name == "judge":
                    raise ValueError(f"`judge` must be a model, got {folder}, which holds an adapter (merge it first)")
                if not adapter and not (Path(folder) / "config.json").is_file():
                    raise ValueError(f"`{name}` must be folders with a config.json, got {folder}")
        if self.names is not None and len(self.names) != len(self.checkpoints):
            raise ValueError(
                f"`names` must hold a name per checkpoint, got {len(self.names)} for {len(self.checkpoints)}"
            )
        self.names = self.names or [Path(folder).resolve().name for folder in self.checkpoints]
        if twice := [name for name in self.names if self.names.count(name) > 1]:
            raise ValueError(
                f"`names` must be given for checkpoints whose folders have one name, got {twice[0]!r} twice"
            )
        if bad := [name for name in self.names if "/" in name or name.startswith(".") or not name]:
            raise ValueError(f"`names` must be names of folders, got {bad[0]!r}")


def plan(args: SuiteArguments) -> tuple[str, list[Planned]]:
    """The suite's description, and its chosen tasks with all of their rows, before any model is loaded."""
    description, tasks = read_suite(args.suite)
    names = [task.name for task in tasks]
    if unknown := [name for name in args.tasks or [] if name not in names]:
        raise ValueError(f"`tasks` must be among {', '.join(names)}, got {unknown[0]!r}")
    tasks = [task for task in tasks if args.tasks is None or task.name in args.tasks]
    if args.limit is not None:
        tasks = [replace(task, limit=min(task.limit or args.limit, args.limit)) for task in tasks]
    return description, [Planned(task, *rows_of(task, args.suite_data, args.seed)) for task in tasks]


# ---- models


def digest_files(folder: str | Path) -> str:
    """SHA-256 over the files that decide a model's numbers beside its weights."""
    digest = hashlib.sha256()
    for path in (Path(folder) / name for name in (*FILES, *([ADAPTER] if read_adapter(folder) else []))):
        digest.update(hashlib.sha256(path.read_bytes() if path.exists() else b"").digest())
    return digest.hexdigest()


def machine(device: str | None) -> dict:
    """What the speed of a model depends on beside the model."""
    import torch

    from nanollada.trainers.records import hardware, versions

    libraries = {name: version for name, version in versions().items() if name in ("torch", "transformers")}
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return {"hardware": hardware(), "device": device, "versions": libraries}


def load_judge(folder: str, trust_remote_code: bool, device: str | None) -> tuple:
    """
    A causal model, ours or another, and its tokenizer.

    Raises:
        `ValueError`: for a diffusion model; as `load_model` and `usable_device`.
    """
    from transformers import AutoModelForCausalLM

    from nanollada.modeling_nanollada.loading_nanollada import load_model, load_tokenizer, usable_device
    from nanollada.trainers.scoring.kind import is_diffusion

    place = usable_device(device)
    model = load_model(AutoModelForCausalLM, folder, "judge", trust_remote_code=trust_remote_code)
    if is_diffusion(model):
        raise ValueError(f"`judge` must be a causal model, got {type(model).__name__} in {folder}")
    tokenizer = load_tokenizer(folder, "judge", trust_remote_code=trust_remote_code)
    return model.to(place).eval(), tokenizer


# ---- one task of one model, once


class Runner:
    """
    Runs what is not finished yet. A result counts as finished if its identity is the one that is asked for (weights,
    files beside them, data, settings, seed, protocol; of speed the machine) and its records are whole.

    Args:
        args ([`SuiteArguments`]): The run.
        planned (`list[Planned]`): Its tasks.
    """

    def __init__(self, args: SuiteArguments, planned: list[Planned]):
        self.args, self.planned, self.judge = args, planned, None
        self.folder = Path(args.output)
        self.command_and_seed = {"command": command(), "seed": args.seed}
        self.judge_digest = args.judge and [weights_digest(args.judge), digest_files(args.judge)]

    def run(self) -> tuple[list[dict], list[dict]]:
        """What is known of the models, and all results."""
        models, results = [], []
        for name, checkpoint in zip(self.args.names, self.args.checkpoints, strict=True):
            model, own = self.run_model({"name": name, "checkpoint": checkpoint, **model_digests(checkpoint)})
            models.append(model)
            results += [{"model": name, **result} for result in own]
        return models, results

    def save(self, models: list[dict], results: list[dict]) -> None:
        """Each model's own results, without those of groups, into its checkpoint's `evaluation.json`."""
        for model in models:
            own = [result for result in results if result["model"] == model["name"] and "group" not in result]
            own = [{name: value for name, value in result.items() if name != "model"} for result in own]
            names = ("checkpoint", "weights_sha256", "config_sha256", "base")
            digests = {name: model[name] for name in names if name in model}
            save_evaluation(
                {**digests, **self.command_and_seed, "results": own}, Path(model["checkpoint"]) / EVALUATION
            )

    def run_model(self, model: dict) -> tuple[dict, list[dict]]:
        """Everything of one model, which is loaded only if something is left to do."""
        bench, results, files = None, [], [digest_files(model["checkpoint"])]
        if read_adapter(model["checkpoint"]):
            base = base_folder(model["checkpoint"])
            files += [weights_digest(base), digest_files(base)]
        model |= {"kind": None, "parameters": None}
        for item in self.planned:
            identity = self.identity(item, model["weights_sha256"], files)
            content = self.finished(model["name"], item.task, identity)
            if content is None:
                bench = bench or self.load(model["checkpoint"])
                content = self.measure(model["name"], item, identity, bench)
            model |= {name: content[name] for name in ("kind", "parameters")}
            results += content["results"]
        return model, results

    def load(self, checkpoint: str):
        """A bench of the checkpoint, and of the judge, who is loaded once."""
        from nanollada.scripts.decoding.checkpoint import load_checkpoint

        args = self.args
        if args.judge is not None and self.judge is None:
            self.judge = load_judge(args.judge, args.trust_remote_code, args.device)
        model, tokenizer = load_checkpoint(checkpoint, args.trust_remote_code, args.device)
        return Bench(model, tokenizer, args.samples, args.seed, args.batch_size, self.judge)

    def identity(self, item: Planned, weights: str, files: list[str]) -> dict:
        """All that a result depends on. AR takes no samples, but is asked before that is known."""
        files, *base = files  # of an adapter also the model under it
        task, kind = item.task, KINDS[item.task.kind]
        identity = {"protocol": PROTOCOL, "weights_sha256": weights, "files_sha256": files, "seed": self.args.seed}
        identity |= {"base_sha256": base} if base else {}
        identity |= {"kind": task.kind, "language": task.language, "data_sha256": item.digest}
        identity |= {"settings": task.settings(), "rows": len(item.rows)}
        identity |= {"samples": self.args.samples} if kind.scored else {}
        identity |= {"judge": self.judge_digest} if kind.judged else {}
        identity |= machine(self.args.device) if kind.timed else {}
        return json.loads(json.dumps(identity))  # as it will be read back

    def paths(self, model: str, task: str) -> tuple[Path, Path]:
        """Of a result and of its records."""
        return self.folder / model / f"{task}.json", self.folder / model / f"{task}.jsonl"

    def finished(self, model: str, task: Task, identity: dict) -> dict | None:
        """An earlier result of the same identity, if its files are whole."""
        path, records = self.paths(model, task.name)
        try:
            content = read_json(path)
            complete = file_digest(records) == content["records_sha256"]
            return content if complete and content["identity"] == identity else None
        except (FileNotFoundError, ValueError, KeyError):  # never finished, or not by this program
            return None

    def measure(self, model: str, item: Planned, identity: dict, bench) -> dict:
        """Runs the task, and writes its records and then, as the sign that all is there, its result."""
        from tqdm.auto import tqdm

        kind = KINDS[item.task.kind]
        skipped = kind.diffusion_only and not bench.is_diffusion
        with tqdm(total=kind.steps(item.task, item.rows), desc=f"{model}: {item.task.name}", unit=" rows") as bar:
            bench.progress = bar.update
            try:
                outcome = Outcome([], []) if skipped else kind.run(bench, item.task, item.rows)
            except DataError:
                raise
            except ValueError as error:
                raise ValueError(f"task {item.task.name} of {model}: {error}") from error
        settings = machine(self.args.device) if kind.timed else {}
        settings |= {"judge": Path(self.args.judge).name} if kind.judged and self.args.judge is not None else {}
        path, records = self.paths(model, item.task.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(records, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in outcome.records))
        content = {
            "identity": identity,
            "records_sha256": file_digest(records),
            "kind": "diffusion" if bench.is_diffusion else "ar",
            "parameters": sum(parameter.numel() for parameter in bench.model.parameters()),
            "results": results_of(item, bench, outcome, self.command_and_seed, **settings),
        }
        write_json(path, content)
        return content


# ---- the program


def run_suite(args: SuiteArguments) -> dict:
    """
    Measures the models and writes `suite.json`, `suite.md`, `suite.png`, and then each checkpoint's `evaluation.json`.

    Returns:
        `dict`: what `suite.json` says: `protocol`, `command`, `seed`, `hardware`, `versions`, `models`, `results`.

    Raises:
        `ValueError`: for a suite, rows, models or an `evaluation.json` that cannot be used; `DataError` names file and
            row.
    """
    from nanollada.scripts.evaluation.report import draw, tables
    from nanollada.trainers.records import provenance

    description, planned = plan(args)
    runner = Runner(args, planned)
    for checkpoint in args.checkpoints:
        old_evaluation(Path(checkpoint) / EVALUATION)
    models, results = runner.run()
    tasks = [
        {"name": item.task.name, "kind": item.task.kind, "language": item.task.language, "data": item.source}
        | {"data_sha256": item.digest, "rows": len(item.rows), "settings": item.task.settings()}
        for item in planned
    ]
    protocol = {"suite": Path(args.suite).name, "description": description, "version": PROTOCOL, "limit": args.limit}
    protocol |= {"samples": args.samples, "definitions": definitions(results), "tasks": tasks}
    content = {"protocol": protocol, **provenance(), "seed": args.seed, "models": models, "results": results}
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "suite.json", content)
    write_whole(folder / "suite.md", tables(content))
    draw(folder / "suite.png", content)
    runner.save(models, results)
    return content
