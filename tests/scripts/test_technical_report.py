"""The technical report: it is what its sources say, and its sources name no machine."""

import json
import re
from pathlib import Path

import pytest

from nanollada.hub_upload.evaluation_file import results_of
from nanollada.scripts.technical_report import collect, kind_of, main, portable, report

SCRIPTS = Path(__file__).parents[2] / "scripts"
RESULTS = SCRIPTS / "results"


def test_the_committed_report_is_made_of_the_committed_results(tmp_path):
    assert (SCRIPTS / "REPORT.md").read_text(encoding="utf-8") == report(RESULTS)
    main(["--output", str(tmp_path / "again.md")])
    assert (tmp_path / "again.md").read_text(encoding="utf-8") == report(RESULTS)


def test_every_kind_of_result_is_in_it():
    kinds = {kind_of(json.loads(path.read_text(encoding="utf-8")), path) for path in RESULTS.glob("*.json")}
    assert kinds == {"study", "post-training", "editing", "suite", "decoding", "training"}
    text = report(RESULTS)
    for path in RESULTS.glob("*.json"):
        assert f"From `results/{path.name}`" in text and f"| `results/{path.name}` |" in text


@pytest.mark.parametrize("path", sorted(RESULTS.glob("suite_*.json")), ids=lambda path: path.name)
def test_a_suite_s_results_are_those_of_evaluation_json(path):
    """One schema: the suites that are kept here have its rows, and only the model's name besides."""
    content = json.loads(path.read_text(encoding="utf-8"))
    assert results_of({"results": content["results"]}) and all(row["model"] for row in content["results"])


def test_numbers_come_from_the_files(tmp_path):
    found = json.loads((RESULTS / "study_a.json").read_text(encoding="utf-8"))
    figure = next(row for row in found["rows"] if row["run"] == "mdlm")["bits_per_byte"]
    figure[next(iter(figure))]["value"] = 9.8765
    (tmp_path / "study_a.json").write_text(json.dumps(found))
    assert "≤ 9.877" in report(tmp_path) and "9.877" not in report(RESULTS)


def row_of(text, name):
    return next(line for line in text.splitlines() if line.startswith(f"| `results/{name}.json` |"))


def test_the_set_up_is_that_of_all_runs(tmp_path):
    found = json.loads((RESULTS / "study_b.json").read_text(encoding="utf-8"))
    alone = {"hardware": "one", "versions": {"torch": "1", "transformers": "2"}}
    for run in (*found["runs"], *found["noise"]):
        run |= alone
    (tmp_path / "study_b.json").write_text(json.dumps(found))
    commands = [run["scored_by"] for run in found["runs"]] + [noise["command"] for noise in found["noise"]]
    cells = f"one | torch 1, transformers 2 | {len(commands)} commands, the first: `{commands[0]}` |"
    assert row_of(report(tmp_path), "study_b").endswith(f" | {cells}")
    found["runs"][-1]["hardware"], found["noise"][-1]["hardware"] = "two", "three"
    found["runs"][-1]["versions"] = {"torch": "3", "transformers": "2"}
    (tmp_path / "study_b.json").write_text(json.dumps(found))
    row = row_of(report(tmp_path), "study_b")
    assert "| one / two / three | torch 1, transformers 2 / torch 3, transformers 2 |" in row


def test_tokens_are_those_of_each_row(tmp_path):
    """What a run saw, and what the run saw that it starts from."""
    found = json.loads((RESULTS / "study_d.json").read_text(encoding="utf-8"))
    for run in found["runs"]:
        half = run["run"].startswith("ar_half")
        run["tokens_seen"] = 2_000_000 if half else 3_000_000
    (tmp_path / "study_d.json").write_text(json.dumps(found))
    line = "with those of the run that one starts from: 2.00M (AR, first half only (no decay)), 5.00M (all others). ±"
    assert line in report(tmp_path)
    found["runs"][-1]["parameters"] = 4_000_000
    found["runs"][-1]["tokens_seen"] = 1_000_000
    (tmp_path / "study_d.json").write_text(json.dumps(found))
    text = report(tmp_path)
    assert "3.05M / 4.00M parameters." in text and "3.00M (AR → MDLM, both), 5.00M (all others). ±" in text
    found["runs"] = [run for run in found["runs"] if run["run"] != "ar_half-2"]
    (tmp_path / "study_d.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match="must have the runs that others start from, got no ar_half-2"):
        report(tmp_path)


def test_epochs_have_their_texts_tokens():
    assert ": 3.95M (MDLM), 1.98M (all others); the text has 100,294. ±" in report(RESULTS)


def test_results_name_no_machine():
    for path in [*RESULTS.glob("*.json"), SCRIPTS / "REPORT.md"]:
        assert not re.search(r"(?<![\w.:/<])/(?:tmp|home|work|root|mnt|data)/", path.read_text(encoding="utf-8")), path


def test_portable_paths():
    command = "python a.py --data /home/me/train/x.jsonl.xz --config ../me/scripts/recipes/r.yaml --lr 1/2 and/or"
    assert portable(command) == "python a.py --data train/x.jsonl.xz --config scripts/recipes/r.yaml --lr 1/2 and/or"
    assert portable({"/a/b/c": ["/a/b/c/d", 3, None]}) == {"b/c": ["c/d", 3, None]}
    assert portable("https://example.org/a/b/c") == "https://example.org/a/b/c"
    with pytest.raises(ValueError, match="keys that differ in their last two parts, got /one/b/c, /other/b/c"):
        portable([{"/one/b/c": 1, "/other/b/c": 2, "d": 3}])


def test_collecting(tmp_path):
    run = {"part": "c", "corpus": {}, "settings": {"output": "/home/me/runs/study"}}
    (tmp_path / "c.json").write_text(json.dumps(run))
    collect(tmp_path / "c.json", tmp_path / "results" / "study_c.json")
    kept = json.loads((tmp_path / "results" / "study_c.json").read_text())
    assert kept == {"part": "c", "corpus": {}, "settings": {"output": "runs/study"}}
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="must be files of a study, a suite or a benchmark, got other.json"):
        collect(tmp_path / "other.json", tmp_path / "results" / "other.json")
    assert not (tmp_path / "results" / "other.json").exists()


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="`results` must hold JSON files, got none in"):
        report(tmp_path)
    with pytest.raises(ValueError, match="`names` must name each file of `collect`, got 1 for 2 files"):
        main(["--collect", "a.json", "b.json", "--names", "a"])
    with pytest.raises(ValueError, match="`names` must differ, got 'x' twice"):
        main(["--collect", "a.json", "b.json", "--names", "x", "x"])
