"""A corpus from what every Python installation has: documentation as prose, questions about it, and 4×4 sudoku.

For a given seed and environment the files come out byte for byte the same.
"""

import hashlib
import json
import os
import random
import sys
from pathlib import Path

from nanollada.scripts.first_run.documentation import read_documentation
from nanollada.scripts.first_run.questions import question_answer_rows
from nanollada.trainers.puzzles.sudoku import split_grids, sudoku_rows
from nanollada.trainers.records import file_digest, write_whole

# Raised whenever these files would write other rows for the same arguments, so that an old folder is built anew.
CORPUS_VERSION = 1


def build_corpus(
    folder: str | os.PathLike,
    seed: int = 42,
    max_bytes: int = 3_000_000,
    sudoku_train: int = 20_000,
    sudoku_test: int = 500,
    qa_rows: int = 4_000,
    held_out_grids: int = 48,
    sudoku_text_share: float = 0.0,
) -> dict:
    """Writes `pretrain.jsonl`, `sft.jsonl`, `sudoku_test.jsonl` and, last, `facts.json`; returns the last.

    A folder whose record names the same arguments and whose files still have the recorded digests is left as it is.

    Args:
        max_bytes: most UTF-8 bytes of documentation in `pretrain.jsonl`.
        sudoku_train, sudoku_test: number of training puzzles (`sft.jsonl`) and of puzzles on held-out boards.
        qa_rows: most rows about the standard library in `sft.jsonl`; the record says how many there were.
        held_out_grids: number of the 288 solved boards that only `sudoku_test.jsonl` uses.
        sudoku_text_share: part of the training puzzles, 0 to 1, that also stand, solved, in `pretrain.jsonl`.

    Raises a ValueError for an argument that is out of range.
    """
    arguments = {**locals(), "corpus_version": CORPUS_VERSION}
    folder = Path(arguments.pop("folder"))
    if not 0 <= sudoku_text_share <= 1:
        raise ValueError(f"`sudoku_text_share` must be between 0 and 1, got {sudoku_text_share}")
    if (record := _finished(folder, arguments)) is not None:
        return record
    training, held_out = split_grids(seed, held_out_grids)
    puzzles, tests = sudoku_rows(sudoku_train, training, seed), sudoku_rows(sudoku_test, held_out, seed)
    for row in tests:  # prompt/completion rows, so that the answer can be scored as well as compared
        row["prompt"], row["completion"] = row["messages"][:1], row.pop("messages")[1:]
    documentation = read_documentation(max_bytes, seed)
    library = [item for item in documentation.objects if item.module.split(".")[0] in sys.stdlib_module_names]
    questions = question_answer_rows(library, qa_rows, seed)
    solved = [f"Sudoku {row['puzzle']}\n{row['answer']}" for row in puzzles[: round(sudoku_text_share * len(puzzles))]]
    record = {
        "arguments": arguments,
        "text_bytes": sum(len(row["text"].encode()) for row in documentation.documents),
        "solved_in_pretrain": len(solved),
        "question_rows": len(questions),
        "held_out_grids": held_out,
        "unreadable_files": documentation.unreadable_files,
        "packages": {name: counts for name, counts in sorted(documentation.packages.items()) if counts["documents"]},
    }
    pretrain = documentation.documents + [{"text": text, "source": "sudoku"} for text in solved]
    sft = questions + [{"messages": row["messages"], "source": "sudoku"} for row in puzzles]
    _write_folder(folder, record, {"pretrain": pretrain, "sft": sft, "sudoku_test": tests})
    return record


def _write_folder(folder: Path, record: dict, tables: dict[str, list[dict]]) -> None:
    """Writes the tables, shuffled, and the record, which tells that all is there, last."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "facts.json").unlink(missing_ok=True)
    record["files"] = {}
    for name, rows in tables.items():
        random.Random(f"{record['arguments']['seed']}/{name}").shuffle(rows)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        record["files"][f"{name}.jsonl"] = _write(folder / f"{name}.jsonl", text) | {"rows": len(rows)}
    _write(folder / "facts.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def _write(path: Path, text: str) -> dict:
    """A whole file, and what it is."""
    write_whole(path, text)
    return {"bytes": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _finished(folder: Path, arguments: dict) -> dict | None:
    """The record of an earlier run with the same arguments, if all its files are as it left them."""
    try:
        record = json.loads((folder / "facts.json").read_bytes())
        same = record["arguments"] == arguments
        digests = {name: file_digest(folder / name) for name in record["files"]}
        return (
            record if same and all(record["files"][n]["sha256"] == digest for n, digest in digests.items()) else None
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # never built, or half written by something else
        return None
