"""Scores a checkpoint: bits per byte on any data, and exact match of generated answers on prompt/answer rows."""

import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path

from tqdm.auto import tqdm

from nanollada.hub_upload.evaluation_file import EVALUATION, VERSION, model_digests, save_evaluation
from nanollada.scripts.decoding.checkpoint import CheckpointArguments
from nanollada.scripts.decoding.settings import DecodingArguments
from nanollada.scripts.evaluation.answers import exact_match
from nanollada.scripts.evaluation.bench import Bench, Outcome, Planned, Task
from nanollada.scripts.evaluation.kinds import documentation, results_of
from nanollada.scripts.evaluation.runner import SuiteArguments, run_suite
from nanollada.scripts.evaluation.suite_file import parse_task
from nanollada.scripts.evaluation.tasks.text import score_text
from nanollada.scripts.reporting.tables import require_rich, share_with_error
from nanollada.trainers.data.sources import RowPolicy, SourceArguments, read_examples, resolve_sources
from nanollada.trainers.records import command

METRICS = ("likelihood", "exact_match")


@dataclass
class EvaluateArguments(SourceArguments, CheckpointArguments):
    """What is scored on what. Each source of `data` gives results of its own."""

    metrics: list[str] = field(
        default_factory=lambda: ["likelihood"],
        metadata={
            "help": "likelihood: score the rows. exact_match: generate the answers of prompt/answer rows.",
            "choices": METRICS,
        },
    )
    samples: int = field(default=16, metadata={"help": "Diffusion: Monte Carlo masks per row, even."})
    seed: int = field(default=0, metadata={"help": "Of the masks, and of what is drawn for exact match."})
    batch_size: int = field(default=16, metadata={"help": "Rows per forward pass."})
    max_length: int = field(default=512, metadata={"help": "Tokens of a scored row: as in training, to compare."})
    eval_block_length: int | None = field(
        default=None,
        metadata={
            "help": "Diffusion: blocks in which likelihood is scored. Default: the checkpoint's; 0: whole rows."
        },
    )
    rolling_context: int | None = field(
        default=None,
        metadata={
            "help": "Score each text by itself, in rows that roll over it: tokens that a row repeats from the one "
            "before as context. Default: texts are packed, and those that are cut go on with one token of context."
        },
    )
    output: str | None = field(
        default=None, metadata={"help": f"JSON file that gets the results. Default: <checkpoint>/{EVALUATION}."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.data:
            raise ValueError("`data` must name at least one source, got none")
        if self.output is None and not Path(self.checkpoint).is_dir():
            raise ValueError(
                f"`checkpoint` must be a folder, or `output` given for a model on the Hub, got {self.checkpoint}: "
                "there is no such folder"
            )


def evaluate_checkpoint(
    checkpoint: str,
    data: str | list[str],
    *,
    metrics: Iterable[str] = ("likelihood",),
    samples: int = 16,
    seed: int = 0,
    batch_size: int = 16,
    max_length: int = 512,
    eval_block_length: int | None = None,
    rolling_context: int | None = None,
    decoding: dict | None = None,
    trust_remote_code: bool = False,
    device: str | None = None,
    **source_options,
) -> dict:
    """
    Scores a checkpoint on data, in the form of `evaluation.json`; `save_evaluation` writes it.

    Args:
        checkpoint (`str`): Folder or name on the Hub; AR or diffusion.
        data (`str` or `list[str]`): Sources. Each is scored by itself.
        metrics, samples, seed, batch_size, max_length, eval_block_length, rolling_context: As in
            [`EvaluateArguments`]. Longer answer rows are truncated, and counted; rows roll as by `rolling_rows`.
        decoding (`dict`, *optional*): Options of exact match's `generate`, see [`exact_match`].
        trust_remote_code (`bool`, defaults to `False`), device (`str`, *optional*): As for `load_checkpoint`.
        source_options: `data_config`, `data_split`, `sample_by`, `on_bad_rows`, `streaming` of the sources.

    Returns:
        `dict`: `version`, `checkpoint`, `weights_sha256` and `config_sha256` (`None` for a name on the Hub; for an
            adapter also `base`), `command`, `seed`, `results`: those of a suite with a task "text" and a task
            "generation" per source.
            `standard_error` is over the scored rows (`None` for a single one), `mask_error` that of the masks alone.

    Raises:
        `ValueError`: for unknown metrics, for a `batch_size` below 1, for rows longer than the model's positions, for
            `decoding` without exact match, for exact match on rows without an answer, for `rolling_context` on rows
            with one, and as `load_checkpoint`, `read_examples`, `rolling_rows` and `score_rows`.
    """
    from nanollada.scripts.decoding.checkpoint import load_checkpoint
    from nanollada.scripts.decoding.settings import generation_settings
    from nanollada.trainers.models import check_length
    from nanollada.trainers.scoring.likelihood import scored_block_length

    _check(metrics, batch_size, decoding)
    decoding = decoding or {}
    digests = {"weights_sha256": None, "config_sha256": None}
    model, tokenizer = load_checkpoint(checkpoint, trust_remote_code, device)
    digests |= model_digests(checkpoint) if Path(checkpoint).is_dir() else {}
    generation_settings(model, **decoding)  # before anything takes long
    if "likelihood" in metrics:
        check_length(max_length, model.config)
    blocks = scored_block_length(model, eval_block_length)
    bench = Bench(model, tokenizer, samples, seed, batch_size)
    run = {"command": command(), "seed": seed}
    scoring = {"max_length": max_length, "rolling_context": rolling_context, "eval_block_length": eval_block_length}
    results = []
    arguments = SourceArguments(data=[data] if isinstance(data, str) else data, **source_options)
    for spec in arguments.data:
        (source,) = resolve_sources([spec], arguments)
        named = {} if source.files else {"data_config": arguments.data_config, "data_split": arguments.data_split}
        digest = source.identity()[0][1] if len(source.files) == 1 else None
        policy = RowPolicy(arguments.on_bad_rows)
        if "likelihood" in metrics:
            task = _task("text", spec, **named, **scoring)
            with tqdm(desc=f"Scoring {spec}", unit=" rows") as bar:
                bench.progress = bar.update
                outcome = score_text(bench, task, read_examples(source, policy), policy)
            outcome.settings |= {"block_length": blocks} if blocks is not None else {}
            results += results_of(Planned(task, [], digest), bench, outcome, run)
        if "exact_match" in metrics:
            options = {name: value for name, value in decoding.items() if name != "max_new_tokens"}
            task = _task("generation", spec, **named, verify="exact", decoding=options)
            rows = read_examples(source, RowPolicy(arguments.on_bad_rows))
            figures = exact_match(model, tokenizer, rows, batch_size=batch_size, seed=seed, **decoding)
            outcome = Outcome([figures], [], {"generate": figures.pop("settings")})
            results += results_of(Planned(task, [], digest), bench, outcome, run)
    return {"version": VERSION, "checkpoint": checkpoint, **digests, **run, "results": results}


def _task(kind: str, source: str, **settings) -> Task:
    """The task that a source is, by the name of its file."""
    name = re.sub(r"[^\w.-]+", "_", Path(source).name.partition(".")[0], flags=re.A).strip("_.-") or "data"
    given = {key: value for key, value in settings.items() if value is not None}
    return parse_task({"name": name, "kind": kind, "data": source, **given}, "`data`")


def _check(metrics: Iterable[str], batch_size: int, decoding: dict | None) -> None:
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise ValueError(f"`metrics` must be among {', '.join(METRICS)}, got {unknown or 'none'}")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}")
    if decoding and "exact_match" not in metrics:
        raise ValueError(f"`{next(iter(decoding))}` needs 'exact_match' in `metrics`, got {list(metrics)}")


# ---- the table and the program


def evaluation_table(evaluation: dict):
    """The results as a `rich.table.Table`; errors are standard errors."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=evaluation["checkpoint"])
    for name, justify in (("data", "left"), ("metric", "left"), ("value", "right"), ("of", "left")):
        table.add_column(name, justify=justify, overflow="fold")
    nats = {_place(result): result for result in evaluation["results"] if result["metric"] == "nats_per_token"}
    for result in evaluation["results"]:
        if result["metric"] != "nats_per_token":
            table.add_row(Text(result["data"]), *_cells(result, nats.get(_place(result))))
    return table


def _place(result: dict) -> tuple:
    """What the figures of one measurement have in common."""
    return result["data"], json.dumps(result["settings"])


def _cells(result: dict, nats: dict | None) -> tuple[str, str, str]:
    """Metric, value and scope of a share, or of bits per byte with its nats per token."""
    if nats is None:
        return (
            result["metric"],
            share_with_error(result, 2),
            f"{result['rows']:,} rows, {result['truncated']:,} answers cut off",
        )
    value = f"{result['value']:.4f} bits/byte (exact)"
    if result["bound"]:
        value = f"≤ {result['value']:.4f} ± {result['mask_error']:.4f} bits/byte"
    scope = ", ".join(f"{result[name]:,} {name}" for name in ("tokens", "bytes", "documents"))
    if result["standard_error"] is not None:
        scope += f"\n± {result['standard_error']:.4f} bits/byte over rows"
    metric, settings = "nelbo" if result["bound"] else "nll", result["settings"]
    metric += f"\nblocks of {settings['block_length']}" if "block_length" in settings else ""
    metric += f"\ncontext of {settings['rolling_context']}" if "rolling_context" in settings else ""
    return metric, f"{value}\n{nats['value']:.4f} nats/token", scope


def main(argv: list[str] | None = None) -> dict:
    """
    Parses arguments (or `--config file.yaml`), evaluates, saves, prints, and returns the new results; with `--suite`
    what `run_suite` or `check_suite` returns.
    """
    from nanollada.trainers.commands.parser import Parser

    words = sys.argv[1:] if argv is None else argv
    if any(word == "--suite" or word.startswith("--suite=") for word in words):
        return _suite(argv, words)
    if {"-h", "--help"} & set(words):
        print(_suite_help(), end="\n\nWithout --suite:\n\n")
    args, decoding = Parser((EvaluateArguments, DecodingArguments)).parse_args_and_config(argv)
    require_rich("the table of results")
    options = {item.name: getattr(args, item.name) for item in fields(args) if item.name != "output"}
    evaluation = evaluate_checkpoint(**options, decoding=decoding.given())
    path = args.output or Path(args.checkpoint) / EVALUATION
    save_evaluation(evaluation, path)
    from rich.console import Console

    Console().print(evaluation_table(evaluation))
    print(f"results: {path}")
    return evaluation


def _suite(argv: list[str] | None, words: list[str]) -> dict:
    """Runs a suite, or checks its errors, and prints."""
    from nanollada.scripts.evaluation.errors import check_suite
    from nanollada.trainers.commands.parser import Parser

    if {"-h", "--help"} & set(words):
        print(_suite_help())
        raise SystemExit(0)
    (args,) = Parser(SuiteArguments).parse_args_and_config(argv)
    if args.check_errors is not None:
        return check_suite(args)
    content = run_suite(args)
    print(Path(args.output, "suite.md").read_text("utf-8"))
    print(f"results: {args.output}")
    return content


def _suite_help() -> str:
    """The suite's options, and what its file may say of each kind of task."""
    from nanollada.trainers.commands.parser import Parser

    options = Parser(SuiteArguments).format_help()
    return f"{options}\nkinds of tasks, their settings (defaults) and figures:\n\n{documentation()}"
