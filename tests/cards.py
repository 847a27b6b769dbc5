"""Results of every kind, a card that says them, and its folder: what the tests of cards share."""

import json
from pathlib import Path

from huggingface_hub import ModelCardData

from nanollada.hub_upload.card_results import eval_results, evaluation_section
from nanollada.hub_upload.evaluation_file import VERSION, model_digests

COMMAND = "evaluate.py --checkpoint small --suite small"
BOARDS = {"task": "sudoku", "kind": "generation", "language": None, "metric": "exact_match", "value": 0.795}
BOARDS |= {"standard_error": 0.02855, "bound": False, "rows": 200, "data": "boards", "truncated": 0}
BOARDS |= {"settings": {"generate": {"steps": 8, "top_k": None}}, "command": "evaluate.py boards", "seed": 0}
TEXT = {
    "task": "wiki_en",
    "kind": "text",
    "language": "en",
    "metric": "bits_per_byte",
    "value": 1.8765432,
    "standard_error": 0.0123,
    "mask_error": 0.0045,
    "bound": True,
    "data": "wiki.jsonl",
    "data_sha256": "0123456789abcdef" * 4,
    "rows": 1200,
    "chance": None,
    "unit": "bits/byte",
    "settings": {"samples": 16, "block_length": None, "order": [1, None]},
    "command": COMMAND,
    "seed": 7,
}
CHOICE = {**TEXT, "task": "arc", "kind": "choice", "metric": "acc_norm", "value": 0.31, "standard_error": 0.02}
CHOICE |= {
    "bound": False,
    "mask_error": None,
    "data": "arc|easy",
    "chance": 0.25,
    "unit": None,
    "settings": {},
    "data_sha256": "f" * 64,
}
SPEED = {**CHOICE, "task": "speed", "kind": "speed", "metric": "tokens_per_second", "value": 1234.56, "chance": None}
SPEED |= {"language": None, "standard_error": None, "unit": "tokens/s", "data": None, "data_sha256": None}
RESULTS = [BOARDS, TEXT, CHOICE, SPEED]
EXACT = {"task": "held_out", "kind": "text", "metric": "bits_per_byte", "value": 1.8, "standard_error": None}
EXACT |= {"mask_error": 0.0, "bound": False, "data": "held-out", "rows": 3, "tokens": 10}
BOUND = {**EXACT, "mask_error": 0.004, "bound": True}
CONFIG = {"architectures": ["NanoLLaDAForMaskedLM"], "block_length": None, "rope_parameters": {"rope_theta": 1e6}}
CONFIG |= {"transformers_version": "5.17.0", "dtype": "float32"}

TABLE = """
| Task | Language | Metric | Value ± s.e. | Chance | Scored on | Data | How |
| --- | --- | --- | --- | --- | --- | --- | --- |
| sudoku | – | exact match | 0.7950 ± 0.0285 | – | 200 rows | `boards` | steps = 8 |
| wiki_en | en | bits per byte, upper bound (bits/byte) | ≤ 1.8765 ± 0.0123 (masks ± 0.0045) | – | 1,200 rows \
| `wiki.jsonl` (SHA-256 0123456789ab…) | samples = 16, order = [1, None] |
| arc | en | accuracy, normalised by length | 0.3100 ± 0.0200 | 0.25 | 1,200 rows | `arc\\|easy` (SHA-256 \
ffffffffffff…) | – |
| speed | – | tokens per second (tokens/s) | 1,234.6 | – | 1,200 rows | `speed` | – |
"""


def evaluation_of(folder: Path | None = None, results: list | None = None) -> dict:
    """What evaluation.json holds."""
    digests = model_digests(folder) if folder else {}
    return {"version": VERSION, **digests, "results": RESULTS if results is None else results}


def card_of(evaluation: dict, prose: str = "") -> str:
    data = ModelCardData(model_name="small", eval_results=eval_results(evaluation, "me/small"))
    return f"---\n{data.to_yaml()}\n---\n\n# small\n\n{evaluation_section(evaluation)}\n\n## Limits\n{prose}"


def edit(path: Path, old: str, new: str, count: int = -1) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, count))


def rewrite(folder: Path, **changes) -> None:
    path = folder / "evaluation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def configure(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
