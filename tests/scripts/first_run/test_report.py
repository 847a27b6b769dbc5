"""The quickstart's page and table: what is exact, what is a bound, and that nothing comes from elsewhere."""

import json

import pytest
from recordings import recorded

from nanollada.scripts.first_run.page import draw_denoising, result_cell, result_rows, results_table, write_report

EXACT = {"data": "corpus/text_test.jsonl", "metric": "bits_per_byte", "bound": False, "value": 1.23456}
BOUND = {**EXACT, "bound": True, "mask_error": 0.0123}
SOLVED = {"data": "corpus/sudoku_test.jsonl", "metric": "exact_match", "value": 0.915, "standard_error": 0.02}


def test_cells_say_what_a_number_is():
    assert result_cell(EXACT) == "1.235"
    assert result_cell(BOUND) == "≤ 1.235 ± 0.012"
    assert result_cell(SOLVED) == "91.5 % ± 2.0"
    assert result_cell(None) == "–"


@pytest.fixture
def run(tmp_path):
    """The files of a run with two models, as the quickstart leaves them."""
    facts = {"parameters": 1_070_000, "steps": 110, "seconds": 61.2, "seed": 42, "hardware": "CPU"}
    facts["versions"] = {"torch": "2.13", "transformers": "5.23"}
    stages = {"ar": [EXACT], "diffusion_sft": [BOUND, SOLVED]}
    (tmp_path / "results.json").write_text(json.dumps({stage: {"results": stages[stage]} for stage in stages}))
    (tmp_path / "settings.json").write_text(json.dumps({"size": "1m", "data": ["my.jsonl"], "steps_share": 1.0}))
    for stage in stages:
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "run.json").write_text(json.dumps(facts))
        lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}, {"step": 2, "eval_loss": 2.6}]
        (tmp_path / stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = {"seconds": 0.5, "tokens_per_second": 12.0, "tokens_per_forward": 1.0, "repeats": 2, "model": "ar"}
    chat = [{"role": "user", "content": "<script>alert(1)</script>"}]
    (tmp_path / "comparison.json").write_text(json.dumps([{**record, "prompt": chat, "text": "a & b"}]))
    return tmp_path


def test_table_has_a_row_per_model(run):
    rows = result_rows(run, ["ar", "diffusion_sft"])
    assert rows[0] == ["AR", "1.235", "–", "–", "1.07M", "110", "61 s"]
    assert rows[1][:4] == ["diffusion + SFT", "≤ 1.235 ± 0.012", "–", "91.5 % ± 2.0"]
    table = results_table(run, ["ar", "diffusion_sft"])
    assert table.row_count == 2 and len(table.columns) == 4


def test_page_holds_everything_and_escapes_what_models_write(run, tokenizer):
    write_report(run / "report.html", run, ["ar", "diffusion_sft"], recorded(tokenizer), "the cat")
    page = (run / "report.html").read_text()
    assert page.count("<svg") >= 2 and "≤ 1.235 ± 0.012" in page and "a &amp; b" in page
    assert "<script>alert(1)" not in page and "&lt;script&gt;alert(1)" in page
    assert "src=" not in page and "@import" not in page


def test_denoising_is_drawn(run, tokenizer):
    draw_denoising(recorded(tokenizer), run / "denoising.png")
    assert (run / "denoising.png").read_bytes()[1:4] == b"PNG"
