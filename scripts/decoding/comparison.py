"""An AR and a diffusion checkpoint side by side on the same prompts: texts, times, tokens per forward pass."""

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from nanollada.scripts.decoding.checkpoint import load_pair, prompt_ids
from nanollada.scripts.decoding.settings import DecodingArguments, effective_settings, split_options
from nanollada.scripts.decoding.writing import generate
from nanollada.scripts.reporting.fonts import FONT_HELP, check_font
from nanollada.scripts.reporting.tables import require_rich, rich_table

TITLES = {"diffusion": "Diffusion", "ar": "AR"}  # of a GIF's panels, from left to right


@dataclass
class CompareArguments:
    """What is compared on what."""

    ar: str = field(metadata={"help": "Folder or Hub name of the autoregressive checkpoint."})
    diffusion: str = field(metadata={"help": "Folder or Hub name of the diffusion checkpoint."})
    prompts: list[str] = field(
        metadata={"help": "Prompts; or one .txt file of a prompt per line, or .jsonl of `prompt` or `messages` rows."}
    )
    chat: bool = field(default=False, metadata={"help": "Prompts are messages, to be answered."})
    repeats: int = field(default=3, metadata={"help": "Timed runs per prompt; medians are reported."})
    seed: int = field(default=0, metadata={"help": "Of whatever is drawn; every run has the same."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that comes with the checkpoints."})
    device: str | None = field(default=None, metadata={"help": "Default: cuda if there is one, else cpu."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})
    trace_gif: str | None = field(
        default=None, metadata={"help": "A .gif file: both models write the prompt side by side, pass by pass."}
    )
    font: str | None = field(default=None, metadata={"help": FONT_HELP})

    def __post_init__(self):
        if self.repeats < 1:
            raise ValueError(f"`repeats` must be at least 1, got {self.repeats}")
        if self.trace_gif is not None and Path(self.trace_gif).suffix != ".gif":
            raise ValueError(f"`trace_gif` must be a file that ends in .gif, got {self.trace_gif!r}")
        check_font(self.font, "trace_gif", self.trace_gif)


def read_prompts(prompts: list[str | list[dict]]) -> list[str | list[dict]]:
    """
    The prompts themselves, texts or chats; or those of a file if a single one names a `.txt` or `.jsonl` file.

    In a `.jsonl` file a row's `prompt` may be a string or messages; of `messages` the last answer is left out.

    Raises:
        `ValueError`: for no prompts, for a file that is not there or has none, and for rows without one.
    """
    if not prompts:
        raise ValueError("`prompts` must hold at least one prompt, got none")
    path = Path(prompts[0]) if len(prompts) == 1 and isinstance(prompts[0], str) else None
    if path is None or path.suffix not in (".txt", ".jsonl"):
        return prompts
    if not path.is_file():
        raise ValueError(f"`prompts` names a file that does not exist: {path}")
    lines = [(i, line) for i, line in enumerate(path.read_text("utf-8").splitlines(), start=1) if line.strip()]
    if not lines:
        raise ValueError(f"`prompts` must hold at least one prompt, got none in {path}")
    if path.suffix == ".txt":
        return [line for _, line in lines]
    return [_prompt_of(line, f"{path}, row {number}") for number, line in lines]


def _prompt_of(line: str, place: str) -> str | list[dict]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"`prompts` must hold JSON, got {place}: {error}") from error
    row = row if isinstance(row, dict) else {}
    messages = row.get("messages") or []
    while messages and messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    prompt = row.get("prompt") or messages
    if not prompt:
        raise ValueError(f"`prompts` must hold `prompt` or `messages`, got {place} without")
    return prompt


def compare(args: CompareArguments, decoding: DecodingArguments | None = None) -> list[dict]:
    """
    Lets both models go on from the same prompts, and writes the files that the arguments name.

    Each prompt runs `repeats` times, one row at a time, after one run of the model that does not count. `seconds` is
    the median wall time of the `generate` call (each step's copy of the ids to the host included),
    `first_token_seconds` the median until the first forward pass has decided something (diffusion: tokens anywhere in
    the row). `tokens_per_second` is the tokens that were kept, an end of text included, by `seconds`.

    Args:
        args ([`CompareArguments`]): Checkpoints with the same tokenizer, and prompts: texts, or chats as messages.
        decoding ([`DecodingArguments`], *optional*): What only diffusion knows goes to the diffusion model alone.

    Returns:
        `list[dict]`: For each prompt a record of each model: `prompt`, `model` ("ar", "diffusion"), `checkpoint`,
            `text`, `tokens`, `finished`, `seconds`, `tokens_per_second`, `first_token_seconds`, `tokens_per_forward`,
            `edits` (of tokens that were decided, by kind), `repeats`, `seed`, `settings`.

    Raises:
        `ValueError`: for a checkpoint of the other kind, tokenizers that differ, no prompt, and several ones of which
            a GIF is wanted; and as `generate`.
    """
    from tqdm.auto import tqdm

    from nanollada.trainers.records import provenance, write_json

    prompts = read_prompts(args.prompts)
    if args.trace_gif is not None and len(prompts) > 1:
        raise ValueError(f"`trace_gif` shows one prompt: `prompts` must hold one, got {len(prompts)}")
    pair = load_pair(args.ar, args.diffusion, args.trust_remote_code, args.device)
    options = split_options({} if decoding is None else decoding.given())
    settings = {name: effective_settings(model, **options[name]) for name, (model, _) in pair.items()}
    tokenizer = pair["ar"][1]
    rendered = [prompt_ids(tokenizer, _message(item) if args.chat else item) for item in prompts]
    records = {}
    bar = tqdm(total=2 * (len(prompts) * args.repeats + 1), desc="Comparing", unit=" runs")
    for name, (model, _) in pair.items():
        origin = {"model": name, "checkpoint": getattr(args, name), "repeats": args.repeats, "seed": args.seed}
        for number, ids in enumerate(rendered):
            measured = measure(model, tokenizer, ids, args.repeats, args.seed, number == 0, bar, options[name])
            records[number, name] = {"prompt": prompts[number], **origin, **measured, "settings": settings[name]}
    bar.close()
    results = [records[number, name] for number in range(len(prompts)) for name in pair]
    if args.output is not None:
        write_json(args.output, {**provenance(), "results": results})
    if args.trace_gif is not None:
        _write_gif(pair, rendered[0], args, options)
    return results


def _message(prompt: str | list[dict]) -> list[dict]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _write_gif(pair: dict, ids: list[int], args: CompareArguments, options: dict[str, dict]) -> None:
    """Both write the prompt once more, as the runs that were timed did, and not at the price of their times."""
    from nanollada.scripts.tracing.gif import write_gif
    from nanollada.scripts.tracing.recorder import StepRecorder

    traces = {}
    for name, title in TITLES.items():
        model, tokenizer = pair[name]
        traces[title] = StepRecorder(tokenizer)
        generate(model, tokenizer, ids, seed=args.seed, recorder=traces[title], **options[name])
    write_gif(traces, args.trace_gif, args.font)


def measure(model, tokenizer, ids, repeats, seed, warm_up, bar, options) -> dict:
    """Text and median times of one prompt; `warm_up`: after a run that is not counted."""
    runs = []
    for _ in range(repeats + warm_up):
        runs.append(generate(model, tokenizer, ids, seed=seed, **options))
        bar.update()
    runs = runs[warm_up:]
    seconds = statistics.median(run.seconds for run in runs)
    return {
        "text": runs[-1].text,
        "tokens": runs[-1].tokens,
        "finished": runs[-1].finished,
        "seconds": seconds,
        "tokens_per_second": runs[-1].tokens / seconds,
        "first_token_seconds": statistics.median(run.first_token_seconds for run in runs),
        "tokens_per_forward": runs[-1].tokens_per_forward,
        "edits": runs[-1].edits,
    }


def comparison_table(records: list[dict]):
    """The records as a `rich.table.Table`."""
    from rich.table import Column

    header = ["prompt", "model", Column("text", overflow="fold", ratio=3)]
    header += ["s", "tokens/s", "first token, s", "tokens/forward"]
    edited = any(record.get("edits") for record in records)  # older records have none
    header += ["edits"] * edited
    rows = [
        [
            record["prompt"] if isinstance(record["prompt"], str) else record["prompt"][-1]["content"],
            record["model"],
            record["text"] if record["finished"] else record["text"] + " …",
            f"{record['seconds']:.3f}",
            f"{record['tokens_per_second']:.1f}",
            f"{record['first_token_seconds']:.3f}",
            f"{record['tokens_per_forward']:.2f}",
            *[", ".join(f"{count} {name}" for name, count in record.get("edits", {}).items())] * edited,
        ]
        for record in records
    ]
    title = f"medians of {records[0]['repeats']} runs, one row at a time"
    return rich_table(title, header, rows, left=2, show_lines=True)


def main(argv: list[str] | None = None) -> list[dict]:
    """Parses arguments (or `--config file.yaml`), compares, prints, and returns the records."""
    from nanollada.trainers.commands.parser import Parser

    args, decoding = Parser((CompareArguments, DecodingArguments)).parse_args_and_config(argv)
    require_rich("the table of results")
    records = compare(args, decoding)
    from rich.console import Console

    Console().print(comparison_table(records))
    for name, path in (("results", args.output), ("animation", args.trace_gif)):
        if path is not None:
            print(f"{name}: {path}")
    return records
