"""Preference pairs by a program: a model answers each prompt several times, and the verifier says which are right."""

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from nanollada.scripts.decoding.checkpoint import CheckpointArguments, load_checkpoint
from nanollada.scripts.decoding.settings import DecodingArguments, draws, generation_settings
from nanollada.scripts.decoding.writing import keyed_seed
from nanollada.scripts.evaluation.answers import answers_to, batches_of_prompts
from nanollada.trainers.data.chats import special_tokens
from nanollada.trainers.data.feedback.prompts import PromptArguments, PromptReader, prepare_prompts
from nanollada.trainers.puzzles.registry import solves
from nanollada.trainers.records import write_whole

CHUNK = 64  # prompts whose pairs are written at once


@dataclass
class PairArguments(CheckpointArguments):
    """Which problems are answered how often, and where the pairs go."""

    data: list[str] = field(
        default_factory=list,
        metadata={"help": "Rows with `prompt` and `verify`, as `puzzles --format prompts` writes them."},
    )
    output: str = field(default="", metadata={"help": "The .jsonl file of pairs."})
    samples: int = field(default=8, metadata={"help": "Answers to each prompt."})
    pairs_per_prompt: int = field(default=1, metadata={"help": "At most so many pairs; no answer is in two of them."})
    batch_size: int = field(default=64, metadata={"help": "Answers that are written at once."})
    seed: int = field(default=0, metadata={"help": "Of the draws, which also depend on the batch size."})
    on_bad_rows: Literal["stop", "skip"] = field(
        default="stop", metadata={"help": "Stop at the first broken row, or skip, count and report broken rows."}
    )

    def __post_init__(self):
        for name in ("data", "output"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` must be given, got none")
        for name, least in (("samples", 2), ("pairs_per_prompt", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}")


def write_pairs(args: PairArguments, decoding: DecodingArguments | None = None) -> Counter:
    """
    Lets a checkpoint, AR or diffusion, answer each prompt `samples` times, and writes pairs of a right and a wrong
    answer of its own: rows `{"prompt", "chosen", "rejected", "source"}`, which the trainers read.

    Of a prompt's answers only those count that ended, that say something, and that hold no control token. Equal ones
    count once. The first right one is paired with the first wrong one, the second with the second, up to
    `pairs_per_prompt`. A prompt that stands twice in the data is answered once. The file is written anew after each
    64 prompts, whole: what an interrupted run has made so far is in it.

    Args:
        args ([`PairArguments`]): Checkpoint, prompts, and the file.
        decoding ([`DecodingArguments`], *optional*): What is not given is the checkpoint's to say.

    Returns:
        `Counter`: `prompts`, `repeated` prompts; `answers`, of them `right`, `wrong`, `unfinished`, `empty`,
            `with_control_tokens`; `pairs`, and prompts with pairs (`paired`), without a right answer (`none_right`, of
            either `none_usable`) or without a wrong one (`none_wrong`).

    Raises:
        `ValueError`: for decoding that draws nothing, as all answers would be the same; and as `generate` and
            [`~trainers.data.feedback.prompts.prepare_prompts`].
    """
    from tqdm.auto import tqdm

    model, tokenizer = load_checkpoint(args.checkpoint, args.trust_remote_code, args.device)
    options = {} if decoding is None else decoding.given()
    settings = generation_settings(model, **options)
    if not draws(model, **options):
        raise ValueError(
            f"`temperature` must be above 0: {args.samples} answers would be the same, got a greedy choice"
        )
    rows, counts = _prompts(args, model, tokenizer, settings)
    reader, lines = PromptReader(tokenizer), []
    bar = tqdm(total=len(rows) * args.samples, desc="Answering", unit=" answers")
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        prompts = [ids for row in chunk for ids in [reader.ids(row["prompt"])] * args.samples]
        said = {}
        for places in batches_of_prompts(model, prompts, args.batch_size, settings):
            seed = keyed_seed(args.seed, start, len(said))
            answers = answers_to(model, tokenizer, [prompts[place] for place in places], seed, settings)
            said.update(zip(places, answers, strict=True))
            bar.update(len(places))
        for number, row in enumerate(chunk):
            own = [said[number * args.samples + sample] for sample in range(args.samples)]
            lines += pairs_of(row, _texts(tokenizer, own, counts), args.pairs_per_prompt, counts)
        write_whole(args.output, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    bar.close()
    return counts


def _prompts(args: PairArguments, model, tokenizer, settings: dict) -> tuple[list[dict], Counter]:
    """The rows whose prompts differ, with room for an answer, and how many there are."""
    own = model.generation_config
    limit = settings.get("max_new_tokens", own.max_new_tokens)
    longest = own.max_length - 1 if limit is None else model.config.max_position_embeddings - limit
    data = PromptArguments(data=args.data, held_out_fraction=0.0, on_bad_rows=args.on_bad_rows)
    rows = prepare_prompts(data, tokenizer, longest, needs_puzzle=True).train.to_list()
    different = {json.dumps(row["prompt"], sort_keys=True): row for row in rows}
    return list(different.values()), Counter(prompts=len(different), repeated=len(rows) - len(different))


def _texts(tokenizer, answers: list[tuple[list[int], bool]], counts: Counter) -> list[str]:
    """The answers that count, in the order in which they were drawn."""
    control, texts = special_tokens(tokenizer).keys(), []
    for ids, ended in answers:
        text = tokenizer.decode(ids, skip_special_tokens=True)
        faults = {
            "unfinished": not ended,
            "with_control_tokens": not control.isdisjoint(ids),
            "empty": not text.strip(),
        }
        fault = next((name for name, holds in faults.items() if holds), None)
        counts.update(["answers", fault] if fault else ["answers"])
        texts += [] if fault else [text]
    return texts


def pairs_of(row: dict, texts: list[str], most: int, counts: Counter) -> list[dict]:
    """
    The pairs of one prompt, counted.

    Args:
        row (`dict`): `prompt`, `verify` and what the puzzle's verifier reads.
        texts (`list[str]`): Answers that count, in the order in which they were drawn.
        most (`int`): Pairs at most.
        counts (`Counter`): Of `write_pairs`.
    """
    sides: dict[bool, dict[str, str]] = {True: {}, False: {}}
    for text in texts:
        right = solves(row["verify"], row, text)
        counts["right" if right else "wrong"] += 1
        sides[right].setdefault(text.strip(), text)
    if not all(sides.values()):
        counts["none_usable" if not any(sides.values()) else "none_wrong" if sides[True] else "none_right"] += 1
        return []
    pairs = list(zip(sides[True].values(), sides[False].values(), strict=False))[:most]
    counts["paired"] += 1
    counts["pairs"] += len(pairs)
    is_chat = not isinstance(row["prompt"], str)
    return [
        {
            "prompt": row["prompt"],
            **{name: _answer(text, is_chat) for name, text in zip(("chosen", "rejected"), pair, strict=True)},
            "source": row["verify"],
        }
        for pair in pairs
    ]


def _answer(text: str, is_chat: bool) -> str | list[dict]:
    return [{"role": "assistant", "content": text}] if is_chat else text


def summary(counts: Counter, output: str) -> str:
    """What came of it, in three lines."""
    total = counts["answers"]
    shares = ", ".join(
        f"{100 * counts[name] / total:.1f} % {name.replace('_', ' ')}"
        for name in ("right", "wrong", "unfinished", "empty", "with_control_tokens")
    )
    without = ", ".join(
        f"{counts[name]:,} {name.replace('_', ' ')}" for name in ("none_right", "none_wrong", "none_usable")
    )
    repeated = f" ({counts['repeated']:,} rows repeat a prompt)" if counts["repeated"] else ""
    return (
        f"{total:,} answers to {counts['prompts']:,} prompts{repeated}: {shares}\n"
        f"prompts without a pair: {without}\n"
        f"{counts['pairs']:,} pairs of {counts['paired']:,} prompts: {output}"
    )


def main(argv: list[str] | None = None) -> Counter:
    """Parses arguments (or `--config file.yaml`), writes the pairs, and prints what came of it."""
    from nanollada.trainers.commands.parser import Parser

    args, decoding = Parser((PairArguments, DecodingArguments)).parse_args_and_config(argv)
    counts = write_pairs(args, decoding)
    print(summary(counts, args.output))
    return counts
