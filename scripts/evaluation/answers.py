"""Answers: what a model is asked, what it writes, and how often that is the reference."""

import sys
from collections.abc import Iterable, Iterator
from itertools import groupby

from tqdm.auto import tqdm

from nanollada.scripts.decoding.checkpoint import eos_ids
from nanollada.scripts.decoding.settings import (
    default_decoding,
    effective_settings,
    generation_settings,
    has_own_limit,
    new_tokens_limit,
)
from nanollada.scripts.decoding.writing import seeded_generate
from nanollada.trainers.data.encoding import RowEncoder
from nanollada.trainers.data.files import BadRow
from nanollada.trainers.data.formats import Example, parse_row
from nanollada.trainers.data.packing import IGNORE
from nanollada.trainers.data.sources import RowPolicy
from nanollada.trainers.scoring.estimates import share
from nanollada.trainers.scoring.kind import is_diffusion

EXAMPLES = 3  # of what was asked, kept with the figures: cards and the demo show them


def exact_match(model, tokenizer, rows: Iterable, *, batch_size: int = 16, seed: int = 0, **generation) -> dict:
    """
    How often the generated answer is the reference answer, both without special tokens and surrounding whitespace.

    The prompt is rendered as in training. Of a chat the last assistant message is the answer, all before it is prompt.

    Args:
        model, tokenizer: Of `load_checkpoint`.
        rows (`Iterable`): Rows with answers, in any format of the data room: dicts, or its `Example`s.
        batch_size (`int`, defaults to 16): Rows per `generate` call.
        seed (`int`, defaults to 0): Of what is drawn, if `generation` sets a temperature.
        generation: Options of `generate`. Greedy unless `temperature` says otherwise. Without `max_new_tokens` the
            checkpoint's own limit holds. Where it has none, that is the length of the longest reference answer with
            its EOS: the same for every row and both kinds of model. (A diffusion model must be told it beforehand.)

    Returns:
        `dict`: `metric`, `value` (the share p), `standard_error` (√(p(1 − p) / n)), `interval` (Wilson's for 95 %),
            `rows` (n), `correct`, `truncated` (answers that had not ended within `max_new_tokens`), `examples` (the
            first rows' `prompt` and `answer`), and the `settings` of `generate`.

    Raises:
        `ValueError`: for rows without an answer or that cannot be read, if there are none, and, before anything is
            written, for a prompt that leaves no room in the checkpoint's own limit.
    """
    examples = list(_examples(rows))
    questions = questions_of(tokenizer, examples)
    if not has_own_limit(model):
        generation.setdefault("max_new_tokens", max(len(answer) for _, answer in questions))
    generation.setdefault("temperature", 0.0)
    settings = generation_settings(model, **generation)
    if not shares_length(model, settings):
        for number, (prompt, _) in enumerate(questions, start=1):
            try:
                new_tokens_limit(model, len(prompt))
            except ValueError as error:
                raise ValueError(f"`rows`, row {number}: {error}") from error
    correct, truncated, start = 0, 0, 0
    bar = tqdm(total=len(questions), desc="Answering", unit=" rows")
    for places in batches_of_prompts(model, [prompt for prompt, _ in questions], batch_size, settings):
        batch = [questions[place] for place in places]
        answers = answers_to(model, tokenizer, [prompt for prompt, _ in batch], seed + start, settings)
        start += len(places)
        for (_, reference), (answer, ended) in zip(batch, answers, strict=True):
            correct += _text(tokenizer, answer) == _text(tokenizer, reference)
            truncated += not ended
        bar.update(len(batch))
    bar.close()
    estimate = share([True] * correct + [False] * (len(questions) - correct))
    figures = {name: estimate[name] for name in ("value", "standard_error", "interval", "rows")}
    counts = {"correct": correct, "truncated": truncated, "examples": list(map(_shown, examples[:EXAMPLES]))}
    return {"metric": "exact_match", **figures, **counts, "settings": effective_settings(model, **generation)}


def _examples(rows: Iterable) -> Iterator[Example]:
    """Rows as examples with answers."""
    for number, row in enumerate(rows, start=1):
        try:
            example = row if isinstance(row, Example) else Example("`rows`", number, **parse_row(row))
        except BadRow as error:
            raise ValueError(f"`rows`, row {number}: {error}") from error
        if example.format != "sft":
            raise ValueError(f"exact match needs answers: {example.source}, row {example.row} is a plain `text`")
        yield example


def _shown(example: Example) -> dict:
    """What was asked, a text or messages, and the reference answer."""
    if example.messages is None:
        return {"prompt": example.prompt, "answer": example.completion}
    *prompt, last = (dict(message) for message in example.messages)
    return {"prompt": prompt, "answer": last["content"]}


def questions_of(tokenizer, rows: Iterable) -> list[tuple[list[int], list[int]]]:
    """Token ids of (prompt, answer), split where training splits them."""
    questions = []
    encoder = RowEncoder(tokenizer, max_length=sys.maxsize, assistant_turns="last")
    for _, document in encoder.encode(_examples(rows), RowPolicy("stop")):
        ids, labels = document["input_ids"], document["labels"]
        start = next(i for i, label in enumerate(labels) if label != IGNORE)
        questions.append((ids[:start], ids[start:]))
    if not questions:
        raise ValueError("`rows` must hold at least one row, got none")
    return questions


def new_tokens(model, prompts: list[list[int]], pad_token_id: int, seed: int, settings: dict) -> list[list[int]]:
    """What `generate` writes behind each prompt, to the end of the row."""
    import torch

    width = max(map(len, prompts))
    padded = [[pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts]
    visible = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    ids, mask = torch.tensor(padded, device=model.device), torch.tensor(visible, device=model.device)  # [B, width]
    return seeded_generate(model, ids, mask, seed, **settings)[:, width:].tolist()


def until_end(model, ids: list[int]) -> tuple[list[int], bool]:
    """Token ids up to the first EOS, and whether there was one."""
    ends = eos_ids(model)
    end = next((place for place, token in enumerate(ids) if token in ends), None)
    return ids[:end], end is not None


def answers_to(model, tokenizer, prompts: list[list[int]], seed: int, settings: dict) -> list[tuple[list[int], bool]]:
    """For each prompt the new token ids up to the first EOS, and whether there was one."""
    return [until_end(model, ids) for ids in new_tokens(model, prompts, tokenizer.pad_token_id, seed, settings)]


def greedy_answers(
    model, pairs: list[tuple[list[int], list[int]]], pad_token_id: int, batch_size: int
) -> list[list[int]]:
    """
    For each (context, answer) the greedy tokens in the answer's place, as many as it has, whatever the checkpoint's
    generation config says. A diffusion model without blocks fills the whole answer, its surest position first.
    """
    written: dict[int, list[int]] = {}
    for places in batches_of_length(pairs, batch_size):
        length = len(pairs[places[0]][1])
        row = {"block_length": length} if is_diffusion(model) and model.config.block_length is None else {}
        with default_decoding(model):
            settings = generation_settings(model, max_new_tokens=length, temperature=0.0, **row)
            rows = new_tokens(model, [pairs[place][0] for place in places], pad_token_id, 0, settings)
        written |= zip(places, rows, strict=True)
    return [written[place] for place in range(len(pairs))]


def shares_length(model, settings: dict) -> bool:
    """Whether as many tokens follow every prompt; not where the checkpoint says `max_length`, and the call nothing."""
    config = model.generation_config
    return "max_new_tokens" in settings or config.max_new_tokens is not None or config.max_length is None


def batches_of_prompts(model, prompts: list[list[int]], batch_size: int, settings: dict) -> Iterator[list[int]]:
    """
    Places of the prompts in batches of like length. Where the checkpoint says `max_length`, prompt included, and the
    settings say nothing, only prompts of one length share a batch: its padding would be taken from their canvas.
    """
    shared = shares_length(model, settings)
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    for _, group in groupby(order, key=lambda place: shared or len(prompts[place])):
        places = list(group)
        yield from (places[start : start + batch_size] for start in range(0, len(places), batch_size))


def batches_of_length(pairs: list[tuple[list[int], list[int]]], batch_size: int) -> Iterator[list[int]]:
    """Places of (context, continuation) in batches whose continuations have one length: they share a canvas."""
    order = sorted(range(len(pairs)), key=lambda place: (len(pairs[place][1]), len(pairs[place][0])))
    for _, group in groupby(order, key=lambda place: len(pairs[place][1])):
        places = list(group)
        yield from (places[start : start + batch_size] for start in range(0, len(places), batch_size))


def _text(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True).strip()
