"""`benchmark.py length`: what an answer is worth, and what it costs, by how much a model may write.

A right answer has the same length whatever the limit is. How many answers of `--score_data` are right, and the
seconds of one `generate` call, one row at a time, are measured for every limit and every way of decoding.
"""

import itertools
import json
import time
from dataclasses import asdict, dataclass, field

from nanollada.scripts.benchmarks.decoding_run import questions
from nanollada.scripts.benchmarks.machine import device_name, in_fresh_process, spread, synchronize
from nanollada.scripts.reporting.tables import percent, require_rich, rich_table
from nanollada.trainers.commands.programs import shown_name
from nanollada.trainers.records import provenance, write_json
from nanollada.trainers.scoring.estimates import share

DEFAULTS = "defaults"  # the checkpoint's own limit, and its own way of decoding

run = in_fresh_process


@dataclass
class LengthBenchmarkArguments:
    """
    What is answered, and how long it may get.

    Raises:
        `ValueError`: for settings that are no JSON object, and values out of range.
    """

    models: list[str] = field(metadata={"help": "Checkpoints, AR or diffusion."})
    score_data: str = field(metadata={"help": "Rows with answers."})
    new_tokens: list[int] = field(
        default_factory=lambda: [0, 20, 32, 48, 64, 128, 256, 512],
        metadata={"help": "Limits, `max_new_tokens`. 0: none is given, so the checkpoint's own."},
    )
    settings: list[str] = field(
        default_factory=lambda: [DEFAULTS],
        metadata={
            "help": f'"{DEFAULTS}", or settings of `generate` as JSON; what they leave out is the checkpoint\'s.'
        },
    )
    rows: int = field(default=100, metadata={"help": "How many answers, from the first row."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads. Default: torch's."})
    output: str | None = field(default=None, metadata={"help": "JSON file."})

    def __post_init__(self):
        for text in self.settings:
            settings_of(text)
        if not self.new_tokens or min(self.new_tokens) < 0:
            raise ValueError(f"`new_tokens` must hold numbers >= 0, got {self.new_tokens}")
        if self.rows < 1:
            raise ValueError(f"`rows` must be at least 1, got {self.rows}")


def settings_of(text: str) -> dict:
    """Settings of `generate`, from JSON."""
    try:
        settings = {} if text == DEFAULTS else json.loads(text)
    except json.JSONDecodeError:
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"`settings` must be {DEFAULTS!r} or a JSON object, got {text!r}")
    return settings


def benchmark(args: LengthBenchmarkArguments) -> list[dict]:
    """
    Measures, prints the table, and saves what `args.output` asks for.

    Returns:
        `list[dict]`: For every model, way of decoding and limit `value` (share of right answers), `standard_error`,
            `rows`, `seconds` of a call (median, lowest, highest) and `forwards`, passes of a call on average.
    """
    require_rich("the table of results")
    from rich.console import Console
    from tqdm.auto import tqdm

    cells = list(itertools.product(args.models, args.settings, args.new_tokens))
    results = []
    for model, settings, new_tokens in tqdm(cells, desc="Measuring", unit=" limits"):
        options = {"settings": settings, "new_tokens": new_tokens, "rows": args.rows, "threads": args.threads}
        figures = run(measure, model=model, data=args.score_data, **options)
        results.append({"model": model, "settings": settings, "new_tokens": new_tokens, **figures})
    Console().print(table(results))
    if args.output is not None:
        write_json(args.output, {**provenance(), "arguments": asdict(args), "results": results})
        print(f"results: {args.output}")
    return results


def measure(model: str, data: str, settings: str, new_tokens: int, rows: int, threads: int | None) -> dict:
    """One process: the first `rows` answers, one call each, after one that doesn't count."""
    import torch

    from nanollada.scripts.decoding.checkpoint import load_checkpoint
    from nanollada.scripts.decoding.settings import generation_settings
    from nanollada.scripts.evaluation.answers import answers_to

    if threads:
        torch.set_num_threads(threads)
    network, tokenizer = load_checkpoint(model)
    forwards, right, seconds = CountedForwards(network), [], []
    options = generation_settings(network, max_new_tokens=new_tokens or None, **settings_of(settings))
    asked = list(itertools.islice(questions(tokenizer, data), rows))
    for number, (prompt, reference) in enumerate([asked[0], *asked]):
        started = time.perf_counter()
        ((answer, _),) = answers_to(network, tokenizer, [prompt], 0, options)
        synchronize(device_name())
        if number:  # the first is warm-up
            seconds.append(time.perf_counter() - started)
            texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in (answer, reference)]
            right.append(texts[0] == texts[1])
    figures = {name: value for name, value in share(right).items() if name in ("value", "standard_error", "rows")}
    return {**figures, "seconds": spread(seconds), "forwards": forwards.count / (len(asked) + 1)}


class CountedForwards:
    """How often a model's backbone ran."""

    def __init__(self, network):
        self.count = 0
        network.base_model.register_forward_hook(self._add)

    def _add(self, *_) -> None:
        self.count += 1


def table(results: list[dict]):
    """The results as a `rich` table: medians of the seconds, with their range."""
    header = ["model", "settings", "new tokens", "right", "of", "seconds", "range", "passes"]
    rows = []
    for result in results:
        seconds = result["seconds"]
        rows.append(
            [
                result["model"],
                result["settings"],
                str(result["new_tokens"] or "own"),
                percent(result["value"], result["standard_error"]),
                str(result["rows"]),
                f"{seconds['median']:.3g}",
                f"{seconds['low']:.3g}–{seconds['high']:.3g}",
                f"{result['forwards']:.1f}",
            ]
        )
    return rich_table("answers by how long they may get", header, rows)


def parser():
    """Of the command `length`."""
    from nanollada.trainers.commands.parser import Parser

    return Parser(LengthBenchmarkArguments, prog=f"{shown_name()} length")


def main(argv: list[str] | None = None) -> list[dict]:
    """Parses arguments (or `--config file.yaml`) and measures."""
    return benchmark(*parser().parse_args_and_config(argv))
