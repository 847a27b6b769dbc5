"""The notebook runs from its first cell to its last, and its models have learnt what they were taught."""

import ast
import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "scripts" / "quickstart.ipynb"


def test_the_notebook_is_small_and_clean():
    """No outputs, no paths of a clone: it runs where the wheel is installed."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert len(cells) <= 15 and not any(cell.get("outputs") for cell in cells)
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    for source in code:
        ast.parse(source)
        assert not re.search(r"runs/|scripts/|trainers/|sys.path|\.\.", source)


@pytest.mark.slow
def test_the_notebook_trains_shows_and_compares(tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(book, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [cell.outputs for cell in book.cells if cell.cell_type == "code"]
    data = [output.data for part in outputs for output in part if "data" in output]
    losses = {}
    for name in ("ar", "diffusion"):
        lines = [
            json.loads(line) for line in (tmp_path / "notebook" / name / "metrics.jsonl").read_text().splitlines()
        ]
        losses[name] = [line["loss"] for line in lines if "loss" in line]
        assert losses[name][-1] < losses[name][0] / 2
    scores = next(ast.literal_eval(part["text/plain"]) for part in data if "forward passes" in part["text/plain"])
    assert scores["AR"]["right"] >= 0.9 and scores["diffusion"]["right"] >= 0.9
    assert any("image/gif" in part for part in data)
    (page,) = [part["text/html"] for part in data if "<section" in part.get("text/html", "")]
    assert "Diffusion writes" in page
    streams = "".join(output.text for part in outputs for output in part if output.output_type == "stream")
    passes = int(re.search(r"in (\d+) forward passes", streams)[1])
    assert passes < scores["diffusion"]["forward passes"]
    assert (tmp_path / "notebook" / "diffusion" / "model.safetensors").is_file()
