"""The rows of a first run: the built-in ones or the user's, and their split into training and test rows."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

TEST_SHARE, MOST_TEST_ROWS = 0.02, 200
MOST_QA_CHARACTERS = 90  # longer ones would pad every sudoku of their batch


def builtin_rows(folder: Path, size: str, seed: int) -> tuple[list[dict], list[dict]]:
    """Documentation, and short questions with sudokus; the corpus is built in the folder, with its test sudokus."""
    from nanollada.scripts.first_run.corpus import build_corpus

    most = 6_000_000 if size == "32m" else 1_200_000
    build_corpus(folder, seed=seed, max_bytes=most, sudoku_train=20_000, sudoku_test=200, qa_rows=4_000)
    texts = [{"text": row["text"]} for row in read_rows(folder / "pretrain.jsonl")]
    chats = [row["messages"] for row in read_rows(folder / "sft.jsonl")]
    short = [chat for chat in chats if sum(len(message["content"]) for message in chat) <= MOST_QA_CHARACTERS]
    return texts, [{"messages": chat} for chat in short]


def users_rows(data: list[str], on_bad_rows: str) -> tuple[list[dict], list[dict]]:
    """The user's texts and the rows with answers, in the plainest format of each."""
    from nanollada.trainers.data.sources import RowPolicy, SourceArguments, read_examples, resolve_source

    rows = {"pretrain": [], "sft": []}
    options = SourceArguments(data=data, on_bad_rows=on_bad_rows)
    for spec in data:
        for example in read_examples(resolve_source(spec, options), RowPolicy(on_bad_rows)):
            rows[example.format].append(_plain_row(example))
    return rows["pretrain"], rows["sft"]


def _plain_row(example) -> dict:
    if example.format == "pretrain":
        return {"text": example.text}
    if example.messages:
        return {"messages": [dict(message) for message in example.messages]}
    return {"prompt": example.prompt, "completion": example.completion}


def read_rows(path: Path) -> list[dict]:
    """The rows of a .jsonl file that the first run wrote."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts_of(row: dict) -> Iterable[str]:
    """What a tokenizer learns from in a row."""
    if "messages" in row:
        return [message["content"] for message in row["messages"]]
    return [row[name] for name in ("text", "prompt", "completion") if name in row]


def split_rows(rows: list[dict], folder: Path, name: str) -> dict[str, int]:
    """
    Writes `<name>_test.jsonl`, the 2 % of rows with the smallest content hash (1 to 200 rows), and
    `<name>_train.jsonl`, the others. Equal rows fall on the same side.

    Raises:
        `ValueError`: if nothing would be left to train on.
    """
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    hashes = [hashlib.sha256(line.encode()).hexdigest() for line in lines]
    count = min(max(round(len(set(hashes)) * TEST_SHARE), 1), MOST_TEST_ROWS)
    limit = sorted(set(hashes))[count - 1] if hashes else ""
    parts = {"test": [], "train": []}
    for line, digest in zip(lines, hashes, strict=True):
        parts["test" if digest <= limit else "train"].append(line)
    if not parts["train"]:
        raise ValueError(f"`data` must hold at least two different {name} rows, got {len(lines)}")
    folder.mkdir(parents=True, exist_ok=True)
    for part, kept in parts.items():
        (folder / f"{name}_{part}.jsonl").write_text("".join(line + "\n" for line in kept))
    return {part: len(kept) for part, kept in parts.items()}
