"""The quickstart's page and table: what is exact, what is a bound, and that nothing comes from elsewhere."""

import base64
import json

import pytest
from colours import contrast
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


@pytest.mark.parametrize(("value", "cell"), [(0.0, "0.0 % [0.0, 1.9]"), (1.0, "100.0 % [98.1, 100.0]")])
def test_none_or_all_of_the_sudokus_has_wilsons_interval(value, cell):
    """A standard error of 0 would say that nothing is uncertain; 1.9 % is z² / (n + z²) for 200 rows."""
    assert result_cell({**SOLVED, "value": value, "standard_error": 0.0, "rows": 200}) == cell


@pytest.fixture
def run(tmp_path, tokenizer):
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
    long = {**record, "prompt": "Which_" * 4 + " a question of some more words", "text": "some_long_word " * 12}
    sudoku = {**record, "prompt": "Sudoku 1000400030402031", "text": "1324421331422431"}
    answers = [{**record, "prompt": chat, "text": "a & b"}, long, sudoku]
    (tmp_path / "comparison.json").write_text(json.dumps(answers))
    draw_denoising(recorded(tokenizer), tmp_path / "denoising.png")
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
    assert page.count("src=") == page.count('src="data:image/png;base64,') == 1 and "@import" not in page
    picture = page.split("data:image/png;base64,")[1].split('"')[0]
    assert base64.b64decode(picture) == (run / "denoising.png").read_bytes()
    assert 'class="nanollada-board size-4"' in page and "<pre>1324421331422431</pre>" not in page


def test_denoising_is_drawn(run):
    assert (run / "denoising.png").read_bytes()[1:4] == b"PNG"


# What a reader sees: the page's own width, its boxes that scroll, the words that stand in more lines than one, and the
# least contrast of letters of a curve to its paper.
LOOK = """() => {
  const broken = [...document.querySelectorAll('td, th')].flatMap(cell => {
    const walker = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT), words = [];
    for (let node; (node = walker.nextNode());) for (const match of node.data.matchAll(/\\S+/g)) {
      const range = document.createRange();
      range.setStart(node, match.index);
      range.setEnd(node, match.index + match[0].length);
      if (range.getClientRects().length > 1) words.push(match[0]);
    }
    return words;
  });
  const scrolls = [...document.querySelectorAll('.scroll')].map(box => box.scrollWidth > box.clientWidth);
  const letters = [...document.querySelectorAll('.curves svg [id^=text_] use')].map(use => getComputedStyle(use).fill);
  const papers = [...document.querySelectorAll('.curves svg #patch_1 path')].map(path => getComputedStyle(path).fill);
  return {width: document.documentElement.scrollWidth, broken, scrolls, letters, papers};
}"""


@pytest.mark.slow
def test_the_page_fits_a_phone_and_the_dark(run, tokenizer, browser_page):
    write_report(run / "report.html", run, ["ar", "diffusion_sft"], recorded(tokenizer), "the cat")
    papers = {}
    for scheme in ("light", "dark"):
        browser_page.emulate_media(color_scheme=scheme)
        for width in (390, 1280):
            browser_page.set_viewport_size({"width": width, "height": 900})
            browser_page.goto(f"file://{run / 'report.html'}")
            look = browser_page.evaluate(LOOK)
            assert look["width"] <= width and not look["broken"], (scheme, width)
            assert look["scrolls"] == [width == 390, width == 390, width == 390], (scheme, width)
            papers[scheme] = set(look["papers"])
            pairs = [(letter, paper) for letter in set(look["letters"]) for paper in papers[scheme]]
            assert pairs and all(contrast(*pair) >= 4.5 for pair in pairs), (scheme, pairs)
    assert papers["light"] == {"rgb(255, 255, 255)"} and papers["light"] != papers["dark"]
