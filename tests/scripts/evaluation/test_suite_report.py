"""Tables and plot of a suite: errors, bounds, chance, and what a cell says where nothing can be said."""

import pytest
from matplotlib.figure import Figure

from nanollada.scripts.evaluation.report import bar, cell, draw, tables


def result(model, kind, metric, unit, value, error=0.01, **facts):
    base = {
        "task": f"my_{kind}",
        "language": "en",
        "bound": False,
        "chance": None,
        "rows": 10,
        "command": "evaluate.py",
    }
    return {
        **base,
        "model": model,
        "kind": kind,
        "metric": metric,
        "unit": unit,
        "value": value,
        "standard_error": error,
        **facts,
    }


FOUND = {
    "protocol": {
        "suite": "s.yaml", "description": "Ours", "version": 1, "limit": None, "samples": 128,
        "definitions": {"acc": "share"},
        "tasks": [{"name": "my_choice", "data": "c.jsonl", "data_sha256": "ab" * 32}],
    },
    "seed": 3, "hardware": "CPU", "versions": {"torch": "2"},
    "models": [
        {"name": "ar", "kind": "ar", "parameters": 1234, "weights_sha256": "cd" * 32},
        {"name": "diffusion", "kind": "diffusion", "parameters": 1234, "weights_sha256": "ef" * 32},
    ],
    "results": [
        result("ar", "text", "bits_per_byte", "bits/byte", 1.5, 0.05, mask_error=0.0),
        result("diffusion", "text", "bits_per_byte", "bits/byte", 1.6, 0.05, bound=True, mask_error=0.004),
        result("ar", "choice", "acc", "share", 0.25, chance=0.25, open_share=0.0),
        result("diffusion", "choice", "acc", "share", 0.5, chance=0.25, open_share=0.031),
        result("ar", "pairs", "accuracy/g", "share", 1.0, 0.0, chance=0.5, group="g"),
        result("diffusion", "presets", "accuracy/on − off", "share, difference", -0.031, 0.02),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (None, "–"),
        (
            result("m", "text", "bits_per_byte", "bits/byte", 1.23456, 0.01234, bound=True, mask_error=0.002),
            "≤ 1.235 ± 0.012 (masks ± 0.002)",
        ),
        (result("m", "text", "bits_per_byte", "bits/byte", 1.23456, None, mask_error=0.0), "1.235"),
        (result("m", "choice", "acc", "share", 0.6251, 0.0217, open_share=0.012), "62.5 % ± 2.2 (open 1.2 %)"),
        (result("m", "choice", "acc", "share", 0.0, 0.0, rows=100), "0.0 % [0.0, 3.7]"),
        (result("m", "presets", "d", "share, difference", 0.031, 0.02), "+3.1 ± 2.0"),
        (result("m", "speed", "tokens_per_second", "tokens/s", 158.4612, None), "158.46"),
    ],
)  # fmt: skip
def test_cells(found, text):
    assert cell(found) == text


def test_tables_have_a_column_per_model():
    text = tables(FOUND)
    for line in (
        "# Ours",
        "| task | language | figure | rows | chance | ar | diffusion |",
        "| my_text | en | bits_per_byte, bits/byte | 10 |  | 1.500 ± 0.050 | ≤ 1.600 ± 0.050 (masks ± 0.004) |",
        "| my_choice | en | acc | 10 | 25.0 % | 25.0 % ± 1.0 | 50.0 % ± 1.0 (open 3.1 %) |",
        "## Minimal pairs, by group",
        "| my_pairs | en | accuracy/g | 10 | 50.0 % | 100.0 % [72.2, 100.0] | – |",
        "| my_presets | en | accuracy/on − off, points | 10 |  | – | -3.1 ± 2.0 |",
        "| ar | AR | 1,234 | `cdcdcdcdcdcdcdcd` |",
        "- my_choice: c.jsonl, SHA-256 `abababababababab`",
        "- `evaluate.py`",
    ):
        assert line in text.splitlines()
    assert "Seed 3, 128 masks per scored text, protocol 1, all rows; CPU; torch 2." in text


def test_the_plot(tmp_path, monkeypatch):
    drawn = {}
    real = Figure.savefig

    def save(self, *arguments, **options):
        drawn["figure"] = self
        return real(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", save)
    draw(tmp_path / "suite.png", FOUND)
    assert [path.name for path in tmp_path.iterdir()] == ["suite.png"]
    text, choice, pairs = drawn["figure"].axes
    assert [label.get_text() for label in choice.get_yticklabels()] == ["my_choice: acc"]
    assert "upper bound" in text.get_title() and "upper bound" not in choice.get_title()
    (chance,) = [
        c
        for c in choice.collections
        if len(c.get_segments()) == 1 and c.get_segments()[0][0][0] == 25.0 == c.get_segments()[0][1][0]
    ]
    assert chance.get_segments()[0][0][0] == 25.0
    dots = [line.get_xdata()[0] for line in choice.lines if line.get_marker() == "o"]
    assert dots == [25.0, 50.0]
    assert [line.get_marker() for line in text.lines if len(line.get_xdata()) and line.get_marker() in "o<"] == [
        "o",
        "<",
    ]
    assert len(pairs.get_yticklabels()) == 1
    draw(tmp_path / "none.png", {**FOUND, "results": FOUND["results"][-1:]})
    assert not (tmp_path / "none.png").exists()  # a difference alone is no plot


def test_error_bars():
    assert bar({"value": 0.5, "standard_error": 0.1, "rows": 5, "unit": "share"}, 100) == (10.0, 10.0)
    below = 100 * 1.959964**2 / (5 + 1.959964**2)  # Wilson's, of 5 of 5
    assert bar({"value": 1.0, "standard_error": 0.0, "rows": 5, "unit": "share"}, 100) == (pytest.approx(below), 0.0)
    assert bar({"value": 1.0, "standard_error": 0.2, "rows": 5, "unit": "bits/byte"}, 1) == (0.2, 0.2)
    assert bar({"value": 1.0, "standard_error": None}, 1) == (0.0, 0.0)
