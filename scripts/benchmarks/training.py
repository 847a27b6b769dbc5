"""`benchmark.py train`: training throughput of each objective against a plain loop, and what each gain is worth alone.

`training_run.py` says what the plain loop is. Each run has a fresh process, and repeats go round all
configurations, so that a slow minute of the machine hits every one; ratios are taken inside a round.

A model's FLOPs are those that its objective needs, per token that is no padding, backward twice the forward:
6 × (layers × (weights of a layer + 2 × heads × head_dim × max_length) + weights of the head × supervised share).
Blocks have a noisy and a clean half: all of that twice, with twice the keys for a noisy query, less what nobody reads
of the last layer's clean half (all but its keys and values). Attention is counted dense as in PaLM's MFU (arXiv
2204.02311, appendix B): no mask of documents, blocks or causality is deducted.
"""

import itertools
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from nanollada.scripts.benchmarks.machine import device_name, in_fresh_process, matmul_rates, spread
from nanollada.scripts.benchmarks.training_run import CONFIGURATIONS, SIZES, measure
from nanollada.scripts.reporting.tables import ranged, require_rich, rich_table
from nanollada.trainers.commands.programs import shown_name
from nanollada.trainers.data.sources import RowPolicy, SourceArguments, read_examples, resolve_sources
from nanollada.trainers.records import provenance, write_json

OBJECTIVES = ("ar", "mdlm", "block")


@dataclass
class TrainBenchmarkArguments(SourceArguments):
    """
    What is measured, on which rows of plain text.

    Raises:
        `ValueError`: for unknown names and values out of range.
    """

    size: Literal[tuple(SIZES)] = field(default="32m", metadata={"help": "Shape of the model."})
    max_length: int = field(default=256, metadata={"help": "Tokens of a row."})
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer. By default one of 6,400 entries is trained on `data`."}
    )
    objectives: list[str] = field(
        default_factory=lambda: list(OBJECTIVES), metadata={"help": "Which are trained.", "choices": OBJECTIVES}
    )
    block_length: int = field(default=32, metadata={"help": "Block length of the objective `block`."})
    configurations: list[str] = field(
        default_factory=lambda: list(CONFIGURATIONS),
        metadata={"help": "Ratios need `plain`.", "choices": tuple(CONFIGURATIONS)},
    )
    batch_size: int = field(default=8, metadata={"help": "Rows per optimizer step."})
    steps: int = field(default=5, metadata={"help": "Optimizer steps that are timed in each run."})
    warmup_steps: int = field(default=2, metadata={"help": "Steps before them; compilation falls into the first two."})
    repeats: int = field(default=3, metadata={"help": "Runs of each configuration."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads. Default: torch's."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Data workers of the trainers."})
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention of the compiled configurations, e.g. flex_attention. Default: sdpa."},
    )
    profile: bool = field(
        default=False, metadata={"help": "Also profile each objective's last configuration: where the time goes."}
    )
    seed: int = field(default=0, metadata={"help": "Of weights, row order and noise."})
    output: str | None = field(default=None, metadata={"help": "JSON file that gets every figure."})

    def __post_init__(self):
        super().__post_init__()
        if not self.data:
            raise ValueError("`data` must name at least one source, got none")
        for name, allowed in (("objectives", OBJECTIVES), ("configurations", CONFIGURATIONS)):
            unknown = [value for value in getattr(self, name) if value not in allowed]
            if unknown or not getattr(self, name):
                raise ValueError(f"`{name}` must be among {', '.join(allowed)}, got {unknown or 'none'}")
        if self.size not in SIZES:
            raise ValueError(f"`size` must be one of {', '.join(SIZES)}, got {self.size!r}")
        for name, least in (("max_length", 2), ("batch_size", 1), ("steps", 1), ("warmup_steps", 1), ("repeats", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be >= {least}, got {getattr(self, name)}")
        if not 0 < self.block_length < self.max_length:
            raise ValueError(
                f"`block_length` must be below `max_length` (else it is mdlm), got {self.block_length} and "
                f"{self.max_length}"
            )


# ---- rows


def make_rows(args: TrainBenchmarkArguments, tokenizer) -> dict[str, list[dict]]:
    """
    As many rows as a run trains on, from the first documents: `packed`, and `unpacked`, one document each.

    Raises:
        `ValueError`: for rows that are no plain texts, and if there are too few.
    """
    from nanollada.trainers.data.encoding import RowEncoder
    from nanollada.trainers.data.packing import pack_documents

    rows, length, pad = (args.warmup_steps + args.steps) * args.batch_size, args.max_length, tokenizer.pad_token_id
    policy = RowPolicy(args.on_bad_rows)
    examples = (row for source in resolve_sources(args.data, args) for row in read_examples(source, policy))
    documents, tokens = [], 0
    for example, document in RowEncoder(tokenizer, length).encode(examples, policy):
        if example.format != "pretrain":
            raise ValueError(f"`data` must hold plain texts, got a row for SFT: {example.source}, row {example.row}")
        documents.append(document)
        tokens += len(document["input_ids"])
        if len(documents) >= rows and tokens >= rows * length:
            break
    else:
        raise ValueError(
            f"`data` must fill {rows} rows of {length} tokens, got {len(documents)} documents, {tokens} tokens"
        )
    alone = []
    for index, document in enumerate(documents[:rows]):
        cut = {**document, "input_ids": document["input_ids"][: length - 1]}  # one place is the context token's
        alone.append({**next(pack_documents([cut], length, pad, keep_partial=True)), "index": index})
    return {"packed": list(itertools.islice(pack_documents(documents, length, pad), rows)), "unpacked": alone}


# ---- FLOPs


def flops_per_token(config, objective: str, max_length: int, supervised_share: float) -> float:
    """
    The FLOPs of a training step that the objective needs, per token that is no padding; the formula stands at the top.

    Args:
        config ([`NanoLLaDAConfig`]): The shape.
        objective (`str`): "ar", "mdlm" or "block".
        supervised_share (`float`): Positions that go through the head, over tokens.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    heads, pairs = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    queries, values = hidden * (2 * heads + 3 * config.intermediate_size), hidden * 2 * pairs  # of a layer
    attention = 2 * heads * max_length  # scores and output, for the keys of one half
    products = layers * (queries + values + attention)
    if objective == "block":
        products += layers * attention + (layers - 1) * (queries + attention) + layers * values
    return 6 * (products + hidden * config.vocab_size * supervised_share)


# ---- all runs


def benchmark(args: TrainBenchmarkArguments) -> dict:
    """
    Measures every configuration of every objective, `args.repeats` times, prints the tables, and saves them.

    Returns:
        `dict`: `matmul` (FLOP/s by precision), `results` (one record per objective and configuration, see
            [`summary`]), `block_over_mdlm`, `profiles`, and `runs` (what `measure` returned).
    """
    require_rich("the table of results")
    record = measured(args)
    from rich.console import Console

    console = Console()
    for table in tables(record):
        console.print(table)
    rates = ", ".join(f"{name} {ranged(rate, '{:.4g}')} FLOP/s" for name, rate in record["matmul"].items())
    print(f"{record['parameters']:,} parameters; large matrix product: {rates}")
    if record["block_over_mdlm"]:
        print(
            "block over mdlm ({configuration}): {measured:.2f}, by FLOPs {flop_ceiling:.2f}".format_map(
                record["block_over_mdlm"]
            )
        )
    for objective, text in record["profiles"].items():
        print(f"{objective}, {args.configurations[-1]}:\n{text}")
    if args.output is not None:
        write_json(args.output, {**provenance(), "arguments": asdict(args), **record})
        print(f"results: {args.output}")
    return record


def measured(args: TrainBenchmarkArguments) -> dict:
    """What `benchmark` returns, in processes of their own, round by round."""
    import torch
    from tqdm.auto import tqdm

    from nanollada.trainers.models import config_for

    tokenizer = tokenizer_for(args)
    config = config_for(tokenizer, **SIZES[args.size])
    runs, rates, profiles = [], [], {}
    plan = list(itertools.product(range(args.repeats), args.objectives, args.configurations))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        torch.save(make_rows(args, tokenizer), Path(folder) / "rows.pt")
        for repeat, objective, configuration in tqdm(plan, desc="Measuring", unit=" runs"):
            if len(rates) == repeat:
                rates.append(run(matmul_rates, device=device_name(), threads=args.threads))
            timing = run(measure, folder=folder, **options(args, objective, configuration))
            runs.append({"objective": objective, "configuration": configuration, "repeat": repeat, **timing})
        for objective in args.objectives if args.profile else []:
            timing = run(measure, folder=folder, profile=True, **options(args, objective, args.configurations[-1]))
            profiles[objective] = timing["profile"]
    matmul = {name: spread([rate[name] for rate in rates]) for name in rates[0]}
    results = [
        summary(runs, objective, configuration, config, args.max_length, matmul)
        for objective in args.objectives
        for configuration in args.configurations
    ]
    record = {"parameters": count_parameters(config), "matmul": matmul, "results": results}
    return {**record, "block_over_mdlm": block_over_mdlm(results), "profiles": profiles, "runs": runs}


run = in_fresh_process


def options(args: TrainBenchmarkArguments, objective: str, configuration: str) -> dict:
    """What one run is told."""
    names = "size max_length block_length batch_size steps warmup_steps threads dataloader_num_workers"
    shared = {name: getattr(args, name) for name in [*names.split(), "attn_implementation", "seed"]}
    return {"objective": objective, "configuration": configuration, **shared}


def tokenizer_for(args: TrainBenchmarkArguments):
    """The tokenizer that was asked for, or a BPE trained on the first texts."""
    from nanollada.modeling_nanollada.loading_nanollada import load_tokenizer
    from nanollada.trainers.data.tokenizers import ensure_mask_token, read_texts, train_tokenizer

    if args.tokenizer_name_or_path is None:
        return train_tokenizer(read_texts(args, max_rows=4000))
    tokenizer = load_tokenizer(args.tokenizer_name_or_path)
    ensure_mask_token(tokenizer)
    return tokenizer


def count_parameters(config) -> int:
    """Parameters of the model, without building it in memory."""
    import torch

    from nanollada.modeling_nanollada import NanoLLaDAForMaskedLM

    with torch.device("meta"):
        return NanoLLaDAForMaskedLM(config).num_parameters()


def summary(runs: list[dict], objective: str, configuration: str, config, max_length: int, matmul: dict) -> dict:
    """
    The repeats of one configuration.

    Returns:
        `dict`: `tokens_per_second`, `ratio` (to the plain loop of the same repeat; `None` without one) and
            `matmul_share` (FLOPs per second over the rate that a large product reaches in the same precision), each
            with median, low and high; medians of `seconds_per_step`, `first_step_seconds`, `peak_bytes` and
            `base_bytes`; `padding` and `supervised` shares; `flops_per_token`; and `loss`, the same in every repeat.
    """
    gains = CONFIGURATIONS[configuration]
    mine = [run for run in runs if (run["objective"], run["configuration"]) == (objective, configuration)]
    plain = [run for run in runs if (run["objective"], run["configuration"]) == (objective, "plain")]
    speeds = [run["tokens"] / run["seconds"] for run in mine]
    supervised = mine[0]["supervised"] / mine[0]["tokens"]
    flops = flops_per_token(config, objective, max_length, supervised)
    rate = matmul["bf16" if "dtype" in (gains or []) else "fp32"]["median"]
    ratios = [speed * base["seconds"] / base["tokens"] for speed, base in zip(speeds, plain, strict=False)]
    return {
        "objective": objective,
        "configuration": configuration,
        "gains": gains,
        "tokens_per_second": spread(speeds),
        "ratio": spread(ratios) if ratios else None,
        "matmul_share": spread([speed * flops / rate for speed in speeds]),
        "flops_per_token": flops,
        "padding": 1 - mine[0]["tokens"] / mine[0]["slots"],
        "supervised": supervised,
        "loss": mine[0]["loss"],
        "seconds_per_step": spread([run["seconds"] / run["steps"] for run in mine])["median"],
        **{name: spread([run[name] for run in mine])["median"] for name in MEDIANS},
    }


MEDIANS = ("first_step_seconds", "peak_bytes", "base_bytes")


def block_over_mdlm(results: list[dict]) -> dict | None:
    """Throughput of the block objective over full-row diffusion, same configuration, and the ratio of their FLOPs."""
    by_key = {(result["objective"], result["configuration"]): result for result in results}
    names = [name for objective, name in by_key if objective == "block" and ("mdlm", name) in by_key]
    if not names:
        return None
    best = max(names, key=lambda name: by_key["mdlm", name]["tokens_per_second"]["median"])
    block, mdlm = by_key["block", best], by_key["mdlm", best]
    measured = block["tokens_per_second"]["median"] / mdlm["tokens_per_second"]["median"]
    ceiling = mdlm["flops_per_token"] / block["flops_per_token"]
    return {"configuration": best, "measured": measured, "flop_ceiling": ceiling}


# ---- report


def tables(record: dict) -> list:
    """The results as `rich` tables, one per objective: medians, and in brackets the range over repeats."""
    header = ("configuration", "tokens/s", "× plain", "matmul rate", "peak MB", "s/step", "first step")
    rows = {}
    for result in record["results"]:
        rows.setdefault(result["objective"], []).append(cells(result))
    return [rich_table(objective, header, lines) for objective, lines in rows.items()]


def cells(result: dict) -> list[str]:
    """One row of the table."""
    return [
        result["configuration"],
        f"{result['tokens_per_second']['median']:,.0f}",
        ranged(result["ratio"]),
        f"{result['matmul_share']['median']:.0%}",
        f"{result['peak_bytes'] / 1e6:,.0f}",
        f"{result['seconds_per_step']:.3g}",
        f"{result['first_step_seconds']:.3g}",
    ]


def parser():
    """Of the command `train`."""
    from nanollada.trainers.commands.parser import Parser

    return Parser(TrainBenchmarkArguments, prog=f"{shown_name()} train")


def main(argv: list[str] | None = None) -> dict:
    """Parses arguments (or `--config file.yaml`) and measures."""
    return benchmark(*parser().parse_args_and_config(argv))
