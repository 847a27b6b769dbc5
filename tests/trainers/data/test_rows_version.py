"""Prepared rows are cached under `ROWS_VERSION`: fixed data give the rows that the version stands for."""

import copy
import hashlib
import json
import re
from pathlib import Path

import pytest

from nanollada.trainers.data import stored
from nanollada.trainers.data.prepare import DataArguments, prepare_data

TURNS = [
    {"role": "system", "content": "The cat."},
    {"role": "user", "content": "What is <|im_end|> it?"},
    {"role": "assistant", "content": "It is a test."},
    {"role": "user", "content": "Is it?"},
    {"role": "assistant", "content": "It is, and the test is long."},
]
TEXTS = [{"text": f"The cat sat {'on the mat ' * (n % 5)}in {n}."} for n in range(60)]
ANSWERS = [
    {"messages": TURNS},
    {"conversations": TURNS[1:3]},
    {"prompt": TURNS[:3], "completion": TURNS[3:]},
    {"prompt": "The dog sat ", "completion": "on the log."},
    {"instruction": "What is it?", "input": "test", "output": "It is a test 🎉"},
    {"messages": [*TURNS[:2], {"role": "assistant", "content": "It is long. " * 9}]},
]
TXT = "The cat sat.\nThe dog sat.\n\n\nThe bird sang.\n你好,世界。\n"
CSV = 'text,other\n"The cat\nsat on the mat.",1\nThe fish did not.,2\n'
KEPT = {"held_out_fraction": 0.0}
HELD_OUT = {"held_out_fraction": 0.2, "max_held_out_documents": 4}
LONG = {**KEPT, "max_length": 120}
CASES = {
    "packed": ("a.jsonl", TEXTS, HELD_OUT, {}),
    "json": ("a.json", TEXTS[:20], KEPT, {}),
    "weights": ("a.jsonl", TEXTS, {**KEPT, "data_weights": [1.0]}, {"seed": 3}),
    "paragraphs": ("a.txt", TXT, KEPT, {}),
    "lines": ("a.txt", TXT, {**KEPT, "sample_by": "line"}, {}),
    "document": ("a.txt", TXT, {**KEPT, "sample_by": "document"}, {}),
    "csv": ("a.csv", CSV, KEPT, {}),
    "answers": ("a.jsonl", ANSWERS, LONG, {}),
    "last answers": ("a.jsonl", ANSWERS, {**KEPT, "max_length": 90, "assistant_turns": "last"}, {}),
    "unmarked answers": ("a.jsonl", ANSWERS, LONG, {}),
    "padded answers": ("a.jsonl", ANSWERS, LONG, {"eos_padding": "block", "block_length": 8}),
    "held-out answers": (
        "a.jsonl",
        ANSWERS * 9,
        {**LONG, "held_out_fraction": 0.4},
        {"eos_padding": "max_length"},
    ),
}
# Per version and case: the digest of train rows, evaluation rows and report.
PINNED = {
    1: {
        "packed": "00761b6d27323d17",
        "json": "ab0c0407a0aa8332",
        "weights": "52c8cd37757fb0af",
        "paragraphs": "ffb4e8a361b458a8",
        "lines": "d1ba959ec1465297",
        "document": "678d1093a22dc6b6",
        "csv": "881f69280c6c5ed8",
        "answers": "3cdab9023b4750a5",
        "last answers": "1a2e8c7d428527cf",
        "unmarked answers": "3cdab9023b4750a5",
        "padded answers": "65cd20c6228fa010",
        "held-out answers": "2c48679bacd1f716",
    }
}


def digest(folder, case, tokenizer):
    """SHA-256 of all that a case's data become."""
    name, content, settings, options = CASES[case]
    text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
    (folder / name).write_text(f"[{','.join(map(json.dumps, content))}]" if name == "a.json" else text)
    arguments = DataArguments(data=[str(folder / name)], **{"max_length": 16, **settings})
    if case == "unmarked answers":
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = re.sub(r"\{% (end)?generation %\}", "", tokenizer.chat_template)
    data = prepare_data(arguments, tokenizer, **options)
    report = {**data.report, "sources": None, "eval": {**data.report["eval"], "sources": None}}
    parts = [list(data.train), list(data.eval or []), report]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@pytest.mark.parametrize("case", CASES)
def test_rows_are_those_of_their_version(tmp_path, tokenizer, case):
    got, pinned = digest(tmp_path, case, tokenizer), PINNED.get(stored.ROWS_VERSION, {}).get(case)
    assert got == pinned, (
        f"{case}: the rows of fixed data are others than those of ROWS_VERSION {stored.ROWS_VERSION}, so that caches "
        f"made before would be taken for them: raise ROWS_VERSION in trainers/data/stored.py, and pin {got} here"
    )


def test_the_version_decides_whether_cached_rows_are_taken(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "a.jsonl").write_text(json.dumps(TEXTS[0]) + "\n")
    builds, build, read = [], stored.build, Path.read_text
    monkeypatch.setattr(stored, "build", lambda plan, folder: builds.append(1) or build(plan, folder))

    def read_more(path, *args, **kwargs):
        return read(path, *args, **kwargs) + "# more" * (path.suffix == ".py")

    for commented, version in ((False, 1), (True, 1), (True, 2)):
        with monkeypatch.context() as patch:
            patch.setattr(stored, "ROWS_VERSION", stored.ROWS_VERSION + version)
            if commented:
                patch.setattr(Path, "read_text", read_more)
            prepare_data(DataArguments(data=[str(tmp_path / "a.jsonl")], max_length=8, **KEPT), tokenizer)
        assert len(builds) == version
