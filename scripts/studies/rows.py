"""The rows of a study: its tokenizer, as many training texts as a run needs, and a choice of held-out ones."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path


def texts_of(sources: list[str]) -> Iterator[str]:
    """
    The texts of all sources, one of each in turn until all are read.

    Raises:
        `ValueError`: for rows that are not plain texts.
    """
    from nanollada.trainers.data.sources import RowPolicy, SourceArguments, read_examples, resolve_source

    options = SourceArguments(data=sources)
    streams = [read_examples(resolve_source(source, options), RowPolicy()) for source in sources]
    for examples in itertools.zip_longest(*streams):
        for example in filter(None, examples):
            if example.format != "pretrain":
                raise ValueError(f"a study trains on plain texts, got {example.source}, row {example.row}")
            yield example.text


def make_tokenizer(sources: list[str], folder: Path, count: int) -> None:
    """6,400 byte-level BPE tokens from the first `count` texts."""
    from nanollada.trainers.data.tokenizers import train_tokenizer

    train_tokenizer(itertools.islice(texts_of(sources), count)).save_pretrained(folder)


def split_texts(sources: list[str], tokenizer: str, folder: Path, tokens: int, small_tokens: int) -> dict:
    """
    Writes `first.jsonl` and `second.jsonl`, which together hold the first `tokens` tokens and a little more, so that a
    row's rest does not begin a second epoch, and `small.jsonl`, the first `small_tokens` of them.

    Returns:
        `dict`: `documents`, `tokens` and `bytes` of each. Fewer tokens than asked for are many epochs.

    Raises:
        `ValueError`: for fewer than two texts.
    """
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(tokenizer)
    texts, total, goal = [], 0, 1.01 * tokens
    for text in texts_of(sources):
        length = len(encode(text).input_ids) + 1  # with the end of text before it
        texts.append((text, length))
        total += length
        if total >= goal:
            break
    if len(texts) < 2:
        raise ValueError(f"`data` must hold at least two texts, got {len(texts)}")
    starts = list(itertools.accumulate((length for _, length in texts), initial=0))[:-1]
    middle = min(goal, total) / 2
    parts = {
        "first": [text for text, start in zip(texts[:-1], starts, strict=False) if start < middle],
        "small": [text for text, start in zip(texts, starts, strict=True) if start < small_tokens],
    }
    parts["second"] = texts[len(parts["first"]) :]
    return {name: write_texts(folder / f"{name}.jsonl", chosen) for name, chosen in parts.items()}


def write_texts(path: Path, texts: list[tuple[str, int]]) -> dict:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text, _ in texts), "utf-8")
    sizes = [(length, len(text.encode())) for text, length in texts]
    return {"documents": len(texts), "tokens": sum(a for a, _ in sizes), "bytes": sum(b for _, b in sizes)}


def held_out_texts(source: str, path: Path, count: int) -> dict:
    """
    Writes the `count` texts of a source with the smallest content hash, whatever their order in the file.

    Returns:
        `dict`: `documents` and `bytes`.
    """
    from nanollada.trainers.data.sources import RowPolicy, SourceArguments, read_examples, resolve_source

    examples = read_examples(resolve_source(source, SourceArguments(data=[source])), RowPolicy())
    chosen = sorted(examples, key=lambda example: example.position)[:count]
    counts = write_texts(path, [(example.text, 0) for example in chosen])
    return {name: counts[name] for name in ("documents", "bytes")}
