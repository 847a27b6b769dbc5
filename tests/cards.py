"""Results of every kind, a card that says them, and its folder: what the tests of cards share."""

import json
from pathlib import Path

from huggingface_hub import ModelCardData

from nanollada.hub_upload.card_results import eval_results, evaluation_section

COMMAND = "evaluate.py --checkpoint small --suite small"
BOARDS = {"data": "boards", "metric": "exact_match", "value": 0.795, "standard_error": 0.02855, "rows": 200}
BOARDS |= {"settings": {"steps": 8, "top_k": None}, "command": "evaluate.py boards", "seed": 0}
TEXT = {
    "task": "wiki_en",
    "kind": "text",
    "language": "en",
    "metric": "bits_per_byte",
    "value": 1.8765432,
    "standard_error": 0.0123,
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
CHOICE |= {"bound": False, "data": "arc|easy", "chance": 0.25, "unit": None, "settings": {}, "data_sha256": "f" * 64}
SPEED = {**CHOICE, "task": "speed", "kind": "speed", "metric": "tokens_per_second", "value": 1234.56, "chance": None}
SPEED |= {"language": None, "standard_error": None, "unit": "tokens/s", "data": None, "data_sha256": None}
RESULTS = [BOARDS, TEXT, CHOICE, SPEED]
NLL = {"data": "held-out", "metric": "nll", "bound": False, "bits_per_byte": 1.8, "standard_error": 0.0, "tokens": 10}
NELBO = {**NLL, "metric": "nelbo", "bound": True}
CONFIG = {"architectures": ["NanoLLaDAForMaskedLM"], "block_length": None, "rope_parameters": {"rope_theta": 1e6}}
CONFIG |= {"transformers_version": "5.17.0", "dtype": "float32"}

SUITE_TABLE = """
| Task | Language | Metric | Value ± s.e. | Chance | Rows | Data | How |
| --- | --- | --- | --- | --- | --- | --- | --- |
| wiki_en | en | bits per byte, upper bound (bits/byte) | ≤ 1.8765 ± 0.0123 | – | 1,200 | `wiki.jsonl` (SHA-256 \
0123456789ab…) | samples = 16, order = [1, None] |
| arc | en | accuracy, normalised by length | 0.3100 ± 0.0200 | 0.25 | 1,200 | `arc\\|easy` (SHA-256 \
ffffffffffff…) | – |
| speed | – | tokens per second (tokens/s) | 1,234.6 | – | 1,200 | `speed` | – |
"""


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
