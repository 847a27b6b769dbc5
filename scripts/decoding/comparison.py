"""An AR and a diffusion checkpoint side by side on the same prompts: texts, times, tokens per forward pass."""

import json
import statistics
from dataclasses import dataclass, field, fields
from pathlib import Path

from nanollada.scripts.decoding.checkpoint import load_pair, prompt_ids
from nanollada.scripts.decoding.settings import (
    DecodingArguments,
    effective_settings,
    generation_settings,
    split_options,
)
from nanollada.scripts.decoding.writing import generate
from nanollada.scripts.reporting.tables import require_rich, rich_table


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


def read_prompts(prompts: list[str]) -> list[str | list[dict]]:
    """
    The prompts themselves, or those of a file if a single one names a `.txt` or `.jsonl` file.

    In a `.jsonl` file a row's `prompt` may be a string or messages; of `messages` the last answer is left out.

    Raises:
        `ValueError`: for a file that is not there or has no prompts, and for rows without one.
    """
    path = Path(prompts[0]) if len(prompts) == 1 else None
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


def compare(
    ar: str,
    diffusion: str,
    prompts: list[str | list[dict]],
    *,
    chat: bool = False,
    repeats: int = 3,
    seed: int = 0,
    trust_remote_code: bool = False,
    device: str | None = None,
    **decoding,
) -> list[dict]:
    """
    Lets both models go on from the same prompts.

    Each prompt runs `repeats` times, one row at a time, after one run of the model that does not count. `seconds` is
    the median wall time of the `generate` call (each step's copy of the ids to the host included),
    `first_token_seconds` the median until the first forward pass has decided something (diffusion: tokens anywhere in
    the row). `tokens_per_second` is the tokens that were kept, an end of text included, by `seconds`.

    Args:
        ar, diffusion (`str`): Checkpoints, with the same tokenizer.
        prompts (`list[str | list[dict]]`): Plain texts, or chats as messages.
        chat (`bool`, defaults to `False`): Take texts for user messages.
        repeats (`int`, defaults to 3): Timed runs per prompt and model, all with the same seed.
        seed (`int`, defaults to 0): Of whatever is drawn.
        trust_remote_code, device: As for `load_checkpoint`.
        decoding: Options of `generate`; those that only diffusion knows go to the diffusion model alone.

    Returns:
        `list[dict]`: For each prompt a record of each model: `prompt`, `model` ("ar", "diffusion"), `checkpoint`,
            `text`, `tokens`, `finished`, `seconds`, `tokens_per_second`, `first_token_seconds`, `tokens_per_forward`,
            `repeats`, `seed`, `settings`.

    Raises:
        `ValueError`: for a checkpoint of the other kind, tokenizers that differ, `repeats` below 1, no prompt; and as
            `generate`.
    """
    from tqdm.auto import tqdm

    _check(prompts, repeats)
    pair = load_pair(ar, diffusion, trust_remote_code, device)
    options = split_options(decoding)
    for name, (model, _) in pair.items():
        generation_settings(model, **options[name])  # before anything takes long
    tokenizer = pair["ar"][1]
    rendered = [prompt_ids(tokenizer, _message(item) if chat else item) for item in prompts]
    records = {}
    bar = tqdm(total=2 * (len(prompts) * repeats + 1), desc="Comparing", unit=" runs")
    for name, (model, _) in pair.items():
        for number, ids in enumerate(rendered):
            measured = measure(model, tokenizer, ids, repeats, seed, number == 0, bar, options[name])
            facts = {"prompt": prompts[number], "model": name, "checkpoint": ar if name == "ar" else diffusion}
            how = {"repeats": repeats, "seed": seed, "settings": effective_settings(model, **options[name])}
            records[number, name] = {**facts, **measured, **how}
    bar.close()
    return [records[number, name] for number in range(len(prompts)) for name in pair]


def _check(prompts: list, repeats: int) -> None:
    if repeats < 1:
        raise ValueError(f"`repeats` must be at least 1, got {repeats}")
    if not prompts:
        raise ValueError("`prompts` must hold at least one prompt, got none")


def _message(prompt: str | list[dict]) -> list[dict]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


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
    }


def comparison_table(records: list[dict]):
    """The records as a `rich.table.Table`."""
    from rich.table import Column

    header = ["prompt", "model", Column("text", overflow="fold", ratio=3)]
    header += ["s", "tokens/s", "first token, s", "tokens/forward"]
    rows = [
        [
            record["prompt"] if isinstance(record["prompt"], str) else record["prompt"][-1]["content"],
            record["model"],
            record["text"] if record["finished"] else record["text"] + " …",
            f"{record['seconds']:.3f}",
            f"{record['tokens_per_second']:.1f}",
            f"{record['first_token_seconds']:.3f}",
            f"{record['tokens_per_forward']:.2f}",
        ]
        for record in records
    ]
    title = f"medians of {records[0]['repeats']} runs, one row at a time"
    return rich_table(title, header, rows, left=2, show_lines=True)


def main(argv: list[str] | None = None) -> list[dict]:
    """Parses arguments (or `--config file.yaml`), compares, prints, saves, and returns the records."""
    from trl import TrlParser

    args, decoding = TrlParser((CompareArguments, DecodingArguments)).parse_args_and_config(argv)
    from nanollada.trainers.records import provenance, write_json

    require_rich("the table of results")
    options = {item.name: getattr(args, item.name) for item in fields(args) if item.name not in ("prompts", "output")}
    records = compare(prompts=read_prompts(args.prompts), **options, **decoding.given())
    from rich.console import Console

    Console().print(comparison_table(records))
    if args.output is not None:
        write_json(args.output, {**provenance(), "results": records})
        print(f"results: {args.output}")
    return records
