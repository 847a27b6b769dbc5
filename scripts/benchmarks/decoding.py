"""`benchmark.py generate`: what each way of decoding costs, and what it is worth.

Decoders are measured in one run, round by round: `generate` under each commit rule; `llada`, LLaDA's published
sampler as a plain loop (the whole canvas through the model, all logits, one token a step; `llada/2` commits two); and
`ar`, the AR twin under transformers' `generate` with its cache. Timed calls forbid EOS, so that all emit the same
number of tokens. Scores (exact match on answers, `--score_data`) have the normal EOS. Without a checkpoint the weights
are random: speed only.

A pass of Q queries over K keys needs Q · (2 · weights of layers and head + 4 · layers · heads · head_dim · K) FLOPs.
"""

import itertools
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import linear_regression
from typing import Literal

from nanollada.scripts.benchmarks.decoding_run import DECODERS, PLAIN, decoder_settings, measure, score
from nanollada.scripts.benchmarks.machine import in_fresh_process, spread
from nanollada.scripts.benchmarks.training_run import SIZES
from nanollada.scripts.evaluation.report import bar
from nanollada.scripts.reporting.plots import panels, save_figure
from nanollada.scripts.reporting.tables import ranged, require_rich, rich_table, share_with_error
from nanollada.trainers.commands.programs import shown_name
from nanollada.trainers.records import provenance, write_json

run = in_fresh_process


@dataclass
class GenerateBenchmarkArguments:
    """
    What is decoded, and how.

    Raises:
        `ValueError`: for unknown decoders and values out of range.
    """

    model: str | None = field(default=None, metadata={"help": "Diffusion checkpoint. Default: random weights."})
    ar_model: str | None = field(default=None, metadata={"help": "Its AR twin, for the decoder `ar`."})
    size: Literal[tuple(SIZES)] = field(default="32m", metadata={"help": "Shape of random weights."})
    model_block_length: int = field(default=32, metadata={"help": "Its blocks; 0: the whole row."})
    decoders: list[str] = field(
        default_factory=lambda: ["llada", "llada/2", "ar", "quota", "threshold 0.9"],
        metadata={"help": f"Of {', '.join(DECODERS)}; or settings of `generate` as JSON."},
    )
    prompt_lengths: list[int] = field(
        default_factory=lambda: [0],
        metadata={"help": "Tokens of the prompt, questions and answers of `score_data` in a row. 0: one question."},
    )
    new_tokens: list[int] = field(default_factory=lambda: [128], metadata={"help": "Tokens to decode."})
    batch_sizes: list[int] = field(default_factory=lambda: [1], metadata={"help": "Rows at once."})
    block_length: int | None = field(default=None, metadata={"help": "`block_length` of `generate`, and of `llada`."})
    score_data: str | None = field(default=None, metadata={"help": "Rows with answers, for prompts and scores."})
    score_rows: int = field(default=100, metadata={"help": "How many of them are scored; 0: none."})
    score_new_tokens: int = field(
        default=0, metadata={"help": "Tokens that a scored answer may have. 0: the longest answer's, with its EOS."}
    )
    score_batch_size: int = field(default=16, metadata={"help": "Rows at once in scoring."})
    repeats: int = field(default=3, metadata={"help": "Processes for each measurement."})
    calls: int = field(default=3, metadata={"help": "Timed calls in each, after one that is not timed."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads. Default: torch's."})
    seed: int = field(default=0, metadata={"help": "Of random weights and prompts."})
    output: str | None = field(default=None, metadata={"help": "JSON file; a plot goes beside it."})

    def __post_init__(self):
        for name in self.decoders:
            decoder_settings(name)
        for name, low in (("prompt_lengths", 0), ("new_tokens", 1), ("batch_sizes", 1)):
            values = getattr(self, name)
            if not values or min(values) < low:
                raise ValueError(f"`{name}` must hold numbers >= {low}, got {values}")
        for name, low in (
            ("repeats", 1),
            ("calls", 1),
            ("score_rows", 0),
            ("score_new_tokens", 0),
            ("model_block_length", 0),
        ):
            if getattr(self, name) < low:
                raise ValueError(f"`{name}` must be >= {low}, got {getattr(self, name)}")
        if self.size not in SIZES:
            raise ValueError(f"`size` must be one of {', '.join(SIZES)}, got {self.size!r}")
        if "ar" in self.decoders and self.model is not None and self.ar_model is None:
            raise ValueError("`ar_model` must be set for the decoder 'ar' beside a `model`, got None")


# ---- all of them


def benchmark(args: GenerateBenchmarkArguments) -> dict:
    """
    Measures every decoder, prints the table, and saves what `args.output` asks for.

    Returns:
        `dict`: `results`, a record for each decoder, prompt length, number of new tokens and batch size ([`summary`]);
            `scores` by decoder; `slopes` ([`slopes`]); and `runs` (what `measure` returned).
    """
    require_rich("the table of results")
    results = measured(args)
    from rich.console import Console

    Console().print(table(results))
    for item in results["slopes"]:
        print(
            "{decoder}, batch {batch_size}: seconds ~ tokens^{seconds:.2f}, FLOPs ~ tokens^{flops:.2f}".format(**item)
        )
    if args.output is not None:
        write_json(args.output, {**provenance(), "arguments": asdict(args), **results})
        print(f"results: {args.output}")
        if results["scores"]:
            picture = Path(args.output).with_suffix(".png")
            plot(results, picture)
            print(f"plot: {picture}")
    return results


def measured(args: GenerateBenchmarkArguments) -> dict:
    """What `benchmark` returns, in processes of their own, round by round."""
    from tqdm.auto import tqdm

    grid = list(itertools.product(args.prompt_lengths, args.new_tokens, args.batch_sizes, args.decoders))
    shared = {name: getattr(args, name) for name in ("size", "model_block_length", "block_length", "calls", "threads")}
    shared |= {"seed": args.seed, "data": args.score_data}
    runs, scores = [], {}
    for repeat, cell in tqdm(list(itertools.product(range(args.repeats), grid)), desc="Measuring", unit=" runs"):
        names = dict(zip(("prompt_length", "new_tokens", "batch_size", "decoder"), cell, strict=True))
        model = args.ar_model if names["decoder"] == "ar" else args.model
        runs.append({**names, "repeat": repeat, **run(measure, model=model, **names, **shared)})
    if args.model is not None and args.score_data is not None and args.score_rows:
        options = {"data": args.score_data, "rows": args.score_rows, "batch_size": args.score_batch_size}
        options |= {"block_length": args.block_length, "threads": args.threads, "new_tokens": args.score_new_tokens}
        for name in tqdm(args.decoders, desc="Scoring", unit=" decoders"):
            model = args.ar_model if name == "ar" else args.model
            scores[name] = run(score, decoder=name, model=model, **options)
    results = [summary(runs, *cell) for cell in grid]
    return {"results": results, "scores": scores, "slopes": slopes(results), "runs": runs}


def summary(runs: list[dict], prompt_length: int, new_tokens: int, batch_size: int, decoder: str) -> dict:
    """Medians over repeats (of each process's fastest call), and ratios to the plain decoders of the same repeat."""
    cell = {"prompt_length": prompt_length, "new_tokens": new_tokens, "batch_size": batch_size}
    here = [record for record in runs if all(record[name] == value for name, value in cell.items())]
    times = {}
    for record in here:
        times.setdefault(record["decoder"], []).append(min(record["seconds"]))
    mine = next(record for record in here if record["decoder"] == decoder)
    speed = spread([mine["tokens"] / seconds for seconds in times[decoder]])
    record = {**cell, "decoder": decoder, "seconds": spread(times[decoder]), "tokens_per_second": speed}
    for name in PLAIN:
        pairs = list(zip(times.get(name, []), times[decoder], strict=False))
        record[f"times_{name}"] = spread([base / seconds for base, seconds in pairs]) if pairs else None
    names = ("tokens_per_forward", "peak_bytes", "prompt_tokens")
    return {**record, **{name: mine[name] for name in names}, "flops": flops(mine, decoder, new_tokens, batch_size)}


def flops(run: dict, decoder: str, new_tokens: int, batch_size: int) -> float:
    """FLOPs that the decoder's passes need, by the formula at the top."""
    prompt, steps = run["prompt_tokens"], new_tokens / run["tokens_per_forward"]
    total = prompt + new_tokens

    def passes(queries, keys):
        return queries * (2 * run["parameters"] + 4 * run["attention_width"] * keys)

    if decoder == "ar":
        need = passes(prompt, prompt / 2) + new_tokens * passes(1, prompt + new_tokens / 2)
    elif decoder in PLAIN or not run["block_length"]:
        need = steps * passes(total, total)
    elif (decoder_settings(decoder) or {}).get("use_cache") is False:  # rows up to the block at work
        need = steps * passes(prompt + new_tokens / 2, prompt + new_tokens / 2)
    else:  # each step a block, and each finished block once more
        block = run["block_length"]
        need = passes(prompt, prompt / 2) + (steps + new_tokens / block) * passes(block, prompt + new_tokens / 2)
    return need * batch_size


def slopes(results: list[dict]) -> list[dict]:
    """For decoders measured at several lengths: d log(seconds) / d log(new tokens), and that of the FLOPs."""
    exponents = []
    for key, group in itertools.groupby(sorted(results, key=_not_length), key=lambda item: _not_length(item)):
        group = list(group)
        if len(group) > 1:
            lengths = [math.log(item["new_tokens"]) for item in group]
            cells = dict(zip(("decoder", "prompt_length", "batch_size"), key, strict=True))
            times, need = (
                linear_regression(lengths, [math.log(value) for value in values]).slope
                for values in ([item["seconds"]["median"] for item in group], [item["flops"] for item in group])
            )
            exponents.append({**cells, "seconds": times, "flops": need})
    return exponents


def _not_length(item: dict) -> tuple:
    return item["decoder"], item["prompt_length"], item["batch_size"]


# ---- report


def table(record: dict):
    """The results as a `rich` table: medians, in brackets the range over repeats."""
    header = ["decoder", "prompt", "new", "batch", "seconds", "tokens/s", "per pass", "× llada", "× ar", "peak MB"]
    rows = []
    for result in record["results"]:
        scored = record["scores"].get(result["decoder"])
        rows.append(
            [
                result["decoder"],
                *(str(result[name]) for name in ("prompt_tokens", "new_tokens", "batch_size")),
                f"{result['seconds']['median']:.3g}",
                f"{result['tokens_per_second']['median']:,.0f}",
                f"{result['tokens_per_forward']:.2f}",
                *(ranged(result[f"times_{name}"]) for name in ("llada", "ar")),
                f"{result['peak_bytes'] / 1e6:,.0f}",
                share_with_error(scored) if scored else "",
            ]
        )
    return rich_table("generate", [*header, score_title(record["scores"])], rows)


def score_title(scores: dict) -> str:
    """Over the scores' column: with the tokens that an answer may have, which timed calls have their own number of."""
    room = sorted({scored["new_tokens"] for scored in scores.values() if "new_tokens" in scored})
    return f"score ({', '.join(map(str, room))} new)" if room else "score"


def plot(record: dict, path: str | Path) -> None:
    """Score against tokens per second, a point per decoder, at the first prompt length, number of tokens and batch."""
    first = record["results"][0]
    cell = ("prompt_length", "new_tokens", "batch_size")
    points = [item for item in record["results"] if all(item[name] == first[name] for name in cell)]
    figure, (axes,) = panels(size=(7, 4.5))
    for item in points:
        scored, speed = record["scores"][item["decoder"]], item["tokens_per_second"]
        reach = [[speed["median"] - speed["low"]], [speed["high"] - speed["median"]]]
        spread = [[side] for side in bar(scored, 1.0)]
        axes.errorbar(speed["median"], scored["value"], xerr=reach, yerr=spread, marker="o", capsize=2)
        axes.annotate(item["decoder"], (speed["median"], scored["value"]), textcoords="offset points", xytext=(5, 5))
    axes.set(xscale="log", xlabel="new tokens per second", ylabel="exact match")
    axes.set_title(
        f"{first['new_tokens']} new tokens, batch {first['batch_size']}; bars: range of runs, standard error"
    )
    save_figure(figure, path, dpi=110)


def parser():
    """Of the command `generate`."""
    from nanollada.trainers.commands.parser import Parser

    return Parser(GenerateBenchmarkArguments, prog=f"{shown_name()} generate")


def main(argv: list[str] | None = None) -> dict:
    """Parses arguments (or `--config file.yaml`) and measures."""
    return benchmark(*parser().parse_args_and_config(argv))
