"""Scores a checkpoint: bits per byte on any data, and exact match of generated answers on prompt/answer rows."""

import json
import math
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from itertools import groupby
from pathlib import Path

from nanollada.scripts.decoding.writing import CheckpointArguments, DecodingArguments
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


def refuse_answers(example) -> None:
    """Raises a ValueError for a row that is no plain text."""
    if example.format == "sft":
        raise ValueError(
            "`rolling_context` is for rows that are a plain `text`, got an answer in "
            f"{example.source}, row {example.row}"
        )


def rolled(documents: list[dict], max_length: int, context: int, pad_token_id: int, block_length: int | None) -> list:
    """Rows that roll over each of the encoded documents, the longest first (little padding)."""
    from nanollada.trainers.scoring.rolling import rolling_rows

    rows = []
    for document in documents:
        place = {"num_bytes": document["num_bytes"], "index": len(rows), "block_length": block_length}
        rows += rolling_rows(document["input_ids"], max_length, context, pad_token_id, **place)
    return sorted(rows, key=lambda row: -len(row["input_ids"]))


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


def exact_match(model, tokenizer, rows: Iterable, *, batch_size: int = 16, seed: int = 0, **generation) -> dict:
    """
    How often the generated answer is the reference answer, both without special tokens and surrounding whitespace.

    The prompt is rendered as in training. Of a chat the last assistant message is the answer, all before it is prompt.

    Args:
        model, tokenizer: Of `load_checkpoint`.
        rows (`Iterable`): Rows with answers as dicts, in any format of the data room, or as
            [`~trainers.rows.Example`]s.
        batch_size (`int`, defaults to 16): Rows per `generate` call.
        seed (`int`, defaults to 0): Of what is drawn, if `generation` sets a temperature.
        generation: Options of `generate`. Greedy unless `temperature` says otherwise. `max_new_tokens` is the length
            of the longest reference answer with its EOS, rounded up to a multiple of `block_length` if that is given:
            the same room for every row and both kinds of model. (A diffusion model must be told the room beforehand.)

    Returns:
        `dict`: `metric`, `value` (the share p), `standard_error` (√(p(1 − p) / n)), `rows` (n), `correct`, `truncated`
            (answers that had not ended within `max_new_tokens`), and the `settings` of `generate`.

    Raises:
        `ValueError`: for rows without an answer or that cannot be read, and if there are none.
    """
    from tqdm.auto import tqdm

    from nanollada.scripts.decoding.writing import effective_settings, generation_settings

    questions = questions_of(tokenizer, rows)
    room = max(len(answer) for _, answer in questions)
    block_length = generation.get("block_length") or 1
    generation.setdefault("max_new_tokens", -(-room // block_length) * block_length)
    generation.setdefault("temperature", 0.0)
    settings = generation_settings(model, **generation)
    questions.sort(key=lambda question: len(question[0]))  # little padding
    correct = truncated = 0
    bar = tqdm(total=len(questions), desc="Answering", unit=" rows")
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        answers = answers_to(model, tokenizer, [prompt for prompt, _ in batch], seed + start, settings)
        for (_, reference), (answer, ended) in zip(batch, answers, strict=True):
            correct += _text(tokenizer, answer) == _text(tokenizer, reference)
            truncated += not ended
        bar.update(len(batch))
    bar.close()
    share = correct / len(questions)
    return {
        "metric": "exact_match",
        "value": share,
        "standard_error": math.sqrt(share * (1 - share) / len(questions)),
        "rows": len(questions),
        "correct": correct,
        "truncated": truncated,
        "settings": effective_settings(model, **generation),
    }


def questions_of(tokenizer, rows: Iterable) -> list[tuple[list[int], list[int]]]:
    """Token ids of (prompt, answer), split where training splits them."""
    from nanollada.trainers.data.encoding import IGNORE, RowEncoder
    from nanollada.trainers.data.sources import BadRow, Example, RowPolicy, parse_row

    def examples():
        for number, row in enumerate(rows, start=1):
            try:
                example = row if isinstance(row, Example) else Example("`rows`", number, **parse_row(row))
            except BadRow as error:
                raise ValueError(f"`rows`, row {number}: {error}") from error
            if example.format != "sft":
                raise ValueError(f"exact match needs answers: {example.source}, row {example.row} is a plain `text`")
            yield example

    questions = []
    encoder = RowEncoder(tokenizer, max_length=sys.maxsize, assistant_turns="last")
    for _, document in encoder.encode(examples(), RowPolicy("stop")):
        ids, labels = document["input_ids"], document["labels"]
        start = next(i for i, label in enumerate(labels) if label != IGNORE)
        questions.append((ids[:start], ids[start:]))
    if not questions:
        raise ValueError("`rows` must hold at least one row, got none")
    return questions


def answers_to(model, tokenizer, prompts: list[list[int]], seed: int, settings: dict) -> list[tuple[list[int], bool]]:
    """For each prompt the new token ids up to the first EOS, and whether there was one."""
    import torch

    from nanollada.scripts.decoding.writing import eos_ids, seeded_generate

    width = max(map(len, prompts))
    padded = [[tokenizer.pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts]
    visible = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    ids, mask = torch.tensor(padded, device=model.device), torch.tensor(visible, device=model.device)  # [B, width]
    answers, ends = [], eos_ids(model)
    for row in seeded_generate(model, ids, mask, seed, **settings)[:, width:].tolist():
        end = next((i for i, token in enumerate(row) if token in ends), None)
        answers.append((row[:end], end is not None))
    return answers


def batches_of_length(pairs: list[tuple[list[int], list[int]]], batch_size: int) -> Iterator[list[int]]:
    """Places of (context, continuation) in batches whose continuations have one length: they share a canvas."""
    order = sorted(range(len(pairs)), key=lambda place: (len(pairs[place][1]), len(pairs[place][0])))
    for _, group in groupby(order, key=lambda place: len(pairs[place][1])):
        places = list(group)
        yield from (places[start : start + batch_size] for start in range(0, len(places), batch_size))


def _text(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


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
    what `suite.main` returns.
    """
    from trl import TrlParser

    from nanollada.scripts.evaluation import runner as suite

    words = sys.argv[1:] if argv is None else argv
    if any(word == "--suite" or word.startswith("--suite=") for word in words):
        return suite.main(argv)
    if {"-h", "--help"} & set(words):
        print(TrlParser((suite.SuiteArguments,)).format_help(), end="\n\nWithout --suite:\n\n")
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
