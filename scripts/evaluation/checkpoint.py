"""Scores a checkpoint: bits per byte on any data, and exact match of generated answers on prompt/answer rows."""

import json
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path

from nanollada.scripts.decoding.writing import CheckpointArguments, DecodingArguments
from nanollada.scripts.evaluation.answers import exact_match
from nanollada.scripts.evaluation.kinds import documentation
from nanollada.scripts.evaluation.runner import SuiteArguments, run_suite
from nanollada.scripts.evaluation.tasks.text import refuse_answers, rolled
from nanollada.trainers.data.sources import SourceArguments

METRICS = ("likelihood", "exact_match")
EVALUATION = "evaluation.json"


@dataclass
class EvaluateArguments(SourceArguments, CheckpointArguments):
    """What is scored on what. Each source of `data` gives results of its own."""

    metrics: list[str] = field(
        default_factory=lambda: ["likelihood"],
        metadata={"help": "likelihood: score the rows. exact_match: generate the answers of prompt/answer rows."},
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
            raise ValueError(f"`output` must be given for a checkpoint that is no local folder, got {self.checkpoint}")


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
    Scores a checkpoint on data, in the form of `evaluation.json`; [`save_evaluation`] writes it.

    Args:
        checkpoint (`str`): Folder or name on the Hub; AR or diffusion.
        data (`str` or `list[str]`): Sources, as for [`~trainers.data.DataArguments`]. Each is scored by itself.
        metrics (`Iterable[str]`, defaults to `("likelihood",)`): "likelihood", "exact_match".
        samples (`int`, defaults to 16): Monte Carlo masks per row of a diffusion model, even.
        seed (`int`, defaults to 0): Of these masks, and of whatever is drawn for exact match.
        batch_size (`int`, defaults to 16): Rows per forward pass.
        max_length (`int`, defaults to 512): Tokens of a scored row. Longer answer rows are truncated, and counted.
        eval_block_length (`int`, *optional*): Blocks in which a diffusion model's likelihood is scored; by default
            the checkpoint's, 0 for whole rows. (Exact match decodes in `decoding`'s own `block_length`.)
        rolling_context (`int`, *optional*): Scores each text by itself, in rows of `max_length` tokens that roll over
            it with at least so many tokens of context, see [`~trainers.rolling.rolling_rows`]. By default texts are
            packed into rows.
        decoding (`dict`, *optional*): Options of exact match's `generate`, see [`exact_match`].
        trust_remote_code (`bool`, defaults to `False`), device (`str`, *optional*): As for `load_checkpoint`.
        source_options: `data_config`, `data_split`, `sample_by`, `on_bad_rows`, `streaming` of the sources.

    Returns:
        `dict`: `checkpoint`, `weights_sha256` and `config_sha256` (`None` for a name on the Hub), `command`, `seed`,
            `results`; each result names its `data`, `metric`, `command` and `seed`. `standard_error` is that of the
            random masks; `sampling_error` that of bits per byte as an estimate for other rows of the kind (`None` for
            a single row).

    Raises:
        `ValueError`: for unknown metrics, for a `batch_size` below 1, for rows longer than the model's positions, for
            `decoding` without exact match, for exact match on rows without an answer, for `rolling_context` on rows
            with one, and as `load_checkpoint`, `prepare_data`, `rolling_rows` and `evaluate_likelihood`.
    """
    from nanollada.hub_upload.card_results import model_digests
    from nanollada.scripts.decoding.writing import generation_settings, load_checkpoint
    from nanollada.trainers.data.sources import RowPolicy, read_examples, resolve_sources
    from nanollada.trainers.run import check_length
    from nanollada.trainers.scoring.likelihood import scored_block_length

    _check(metrics, batch_size, decoding)
    digests = {"weights_sha256": None, "config_sha256": None}
    digests |= model_digests(checkpoint) if Path(checkpoint).is_dir() else {}
    model, tokenizer = load_checkpoint(checkpoint, trust_remote_code, device)
    generation_settings(model, **(decoding or {}))  # before anything takes long
    if "likelihood" in metrics:
        check_length(max_length, model.config)
    blocks = scored_block_length(model, eval_block_length)
    run = {"command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]), "seed": seed}
    results = []
    for source in [data] if isinstance(data, str) else data:
        options = {"max_length": max_length, **source_options}
        if "likelihood" in metrics:
            if rolling_context is None:
                rows, report = _packed(tokenizer, source, options)
            else:
                rows, report = _rolling(tokenizer, source, options, rolling_context, blocks)
            noise = {"samples": samples, "seed": seed, "block_length": eval_block_length}
            result = _likelihood(model, tokenizer, source, rows, report, batch_size, noise)
            shape = {"max_length": max_length, "block_length": blocks, "rolling_context": rolling_context}
            shape = {name: value for name, value in shape.items() if value is not None}
            results.append({"data": source, **result, **shape, **run})
        if "exact_match" in metrics:
            arguments = SourceArguments(data=[source], **source_options)
            (rows,) = resolve_sources([source], arguments)
            examples = read_examples(rows, RowPolicy(arguments.on_bad_rows))
            result = exact_match(model, tokenizer, examples, batch_size=batch_size, seed=seed, **(decoding or {}))
            results.append({"data": source, **result, **run})
    return {"checkpoint": checkpoint, **digests, **run, "results": results}


def _check(metrics: Iterable[str], batch_size: int, decoding: dict | None) -> None:
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise ValueError(f"`metrics` must be among {', '.join(METRICS)}, got {unknown or 'none'}")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}")
    if decoding and "exact_match" not in metrics:
        raise ValueError(f"`{next(iter(decoding))}` needs 'exact_match' in `metrics`, got {list(metrics)}")


def _packed(tokenizer, source: str, options: dict):
    """Rows of the data room, and what they leave out."""
    from nanollada.trainers.data.prepare import DataArguments, prepare_data

    data = prepare_data(DataArguments(eval_data=[source], **options), tokenizer)
    return data.eval, data.report["eval"]


def _rolling(tokenizer, source: str, options: dict, context: int, block_length: int | None):
    """As `_packed`, with rows that roll over each text."""
    from collections import Counter

    from nanollada.trainers.data.encoding import RowEncoder
    from nanollada.trainers.data.sources import RowPolicy, read_examples, resolve_sources

    options = dict(options)
    max_length, arguments = options.pop("max_length"), SourceArguments(data=[source], **options)
    report = {"truncated_rows": 0, "skipped_rows": Counter()}
    policy = RowPolicy(arguments.on_bad_rows, report["skipped_rows"])
    encoder = RowEncoder(tokenizer, max_length=sys.maxsize)
    documents = []
    (found,) = resolve_sources([source], arguments)
    for example, document in encoder.encode(read_examples(found, policy), policy):
        refuse_answers(example)
        documents.append(document)
    report["documents"] = len(documents)
    return rolled(documents, max_length, context, tokenizer.pad_token_id, block_length), report


def _likelihood(model, tokenizer, source: str, rows, report: dict, batch_size: int, noise: dict) -> dict:
    from tqdm.auto import tqdm

    from nanollada.trainers.data.prepare import Collator
    from nanollada.trainers.scoring.likelihood import evaluate_likelihood

    collate = Collator(tokenizer.pad_token_id)
    starts = tqdm(range(0, len(rows), batch_size), desc=f"Scoring {source}", unit="batch")
    batches = (collate([rows[i] for i in range(at, min(at + batch_size, len(rows)))]) for at in starts)
    found = evaluate_likelihood(model, batches, **noise)
    left_out = {name: dict(report[name]) if name == "skipped_rows" else report[name] for name in _LEFT_OUT}
    return {
        "metric": "nelbo" if found.bound else "nll",
        "bound": found.bound,
        "nats_per_token": found.nats_per_token,
        "bits_per_byte": found.bits_per_byte,
        "standard_error": found.bits_per_byte_standard_error,
        "sampling_error": found.bits_per_byte_sampling_error,
        "tokens": found.tokens,
        "bytes": found.bytes,
        "documents": report["documents"],
        "samples": noise["samples"] if "Monte Carlo" in found.estimator else None,
        "estimator": found.estimator,
        **{name: count for name, count in left_out.items() if count},
    }


_LEFT_OUT = ("truncated_rows", "skipped_rows")


# ---- the file and the table


def save_evaluation(evaluation: dict, path: str | Path) -> dict:
    """
    Writes results, and keeps those that the file has of the same weights and config: a new result takes the place of
    the one with the same data, metric, rows, block length and generation settings; of a suite, with the same task and
    settings. Of others (of another model, of an older version) it says on stderr how many it dropped.

    Returns:
        `dict`: what the file now says. `command` and `seed` at its top are the latest; every result has its own.
    """
    path = Path(path)
    old = json.loads(path.read_text("utf-8")) if path.exists() else {}
    names = ("checkpoint",) if evaluation["weights_sha256"] is None else ("weights_sha256", "config_sha256")
    new = {_identity(result) for result in evaluation["results"]}
    kept = []
    if all(old.get(name) == evaluation.get(name) for name in names):
        kept = [result for result in old["results"] if _identity(result) not in new]
    elif old.get("results"):
        others = f"{len(old['results'])} results, which don't name this model by {' and '.join(names)}"
        print(f"{path}: dropped {others}", file=sys.stderr)
    merged = {**evaluation, "results": [*kept, *evaluation["results"]]}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial")  # a killed run leaves no half file
    beside.write_text(json.dumps(merged, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)
    return merged


def _identity(result: dict) -> str:
    names = ("data", "metric", "max_length", "settings", "block_length", "rolling_context", "task")
    return json.dumps([result.get(name) for name in names], sort_keys=True)


def evaluation_table(evaluation: dict):
    """The results as a `rich.table.Table`; errors are standard errors."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=evaluation["checkpoint"])
    for name, justify in (("data", "left"), ("metric", "left"), ("value", "right"), ("of", "left")):
        table.add_column(name, justify=justify, overflow="fold")
    for result in evaluation["results"]:
        counts = ", ".join(f"{result[name]:,} {name}" for name in ("tokens", "bytes", "documents") if name in result)
        if result["metric"] == "exact_match":
            value = f"{result['value']:.2%} ± {result['standard_error']:.2%}"
            counts = f"{result['rows']:,} rows, {result['truncated']:,} answers cut off"
        elif result["bound"]:
            value = f"≤ {result['bits_per_byte']:.4f} ± {result['standard_error']:.4f} bits/byte"
        else:
            value = f"{result['bits_per_byte']:.4f} bits/byte (exact)"
        if "nats_per_token" in result:
            value += f"\n{result['nats_per_token']:.4f} nats/token"
            if result["sampling_error"] is not None:
                counts += f"\n± {result['sampling_error']:.4f} bits/byte over rows"
        metric = result["metric"]
        metric += f"\nblocks of {result['block_length']}" if "block_length" in result else ""
        metric += f"\ncontext of {result['rolling_context']}" if "rolling_context" in result else ""
        table.add_row(Text(result["data"]), metric, value, counts)
    return table


def main(argv: list[str] | None = None) -> dict:
    """
    Parses arguments (or `--config file.yaml`), evaluates, saves, prints, and returns the new results; with `--suite`
    what `run_suite` or `check_suite` returns.
    """
    from trl import TrlParser

    words = sys.argv[1:] if argv is None else argv
    if any(word == "--suite" or word.startswith("--suite=") for word in words):
        return _suite(argv, words)
    if {"-h", "--help"} & set(words):
        print(_suite_help(), end="\n\nWithout --suite:\n\n")
    args, decoding = TrlParser((EvaluateArguments, DecodingArguments)).parse_args_and_config(argv)
    from nanollada.scripts.tracing.recorder import require_rich

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
    from trl import TrlParser

    from nanollada.scripts.evaluation.errors import check_suite

    if {"-h", "--help"} & set(words):
        print(_suite_help())
        raise SystemExit(0)
    (args,) = TrlParser((SuiteArguments,)).parse_args_and_config(argv, fail_with_unknown_args=True)
    if args.check_errors is not None:
        return check_suite(args)
    content = run_suite(args)
    print(Path(args.output, "suite.md").read_text("utf-8"))
    print(f"results: {args.output}")
    return content


def _suite_help() -> str:
    """The suite's options, and what its file may say of each kind of task."""
    from trl import TrlParser

    options = TrlParser((SuiteArguments,)).format_help()
    return f"{options}\nkinds of tasks, their settings (defaults) and figures:\n\n{documentation()}"
