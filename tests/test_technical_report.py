"""The technical report: it is what its sources say, and its sources name no machine."""

import json
import re
from pathlib import Path

import pytest

from nanollada.scripts.technical_report import collect, kind_of, main, portable, report

SCRIPTS = Path(__file__).parent.parent / "scripts"
RESULTS = SCRIPTS / "results"


def test_the_committed_report_is_made_of_the_committed_results(tmp_path):
    assert (SCRIPTS / "REPORT.md").read_text(encoding="utf-8") == report(RESULTS)
    main(["--output", str(tmp_path / "again.md")])
    assert (tmp_path / "again.md").read_text(encoding="utf-8") == report(RESULTS)


def test_every_kind_of_result_is_in_it():
    kinds = {kind_of(json.loads(path.read_text(encoding="utf-8")), path) for path in RESULTS.glob("*.json")}
    assert kinds == {"study", "suite", "decoding", "training"}
    text = report(RESULTS)
    for path in RESULTS.glob("*.json"):
        assert f"From `results/{path.name}`" in text and f"| `results/{path.name}` |" in text


def test_numbers_come_from_the_files(tmp_path):
    found = json.loads((RESULTS / "study_a.json").read_text(encoding="utf-8"))
    figure = next(row for row in found["rows"] if row["run"] == "mdlm")["bits_per_byte"]
    figure[next(iter(figure))]["value"] = 9.8765
    (tmp_path / "study_a.json").write_text(json.dumps(found))
    assert "≤ 9.877" in report(tmp_path) and "9.877" not in report(RESULTS)


def test_results_name_no_machine():
    for path in [*RESULTS.glob("*.json"), SCRIPTS / "REPORT.md"]:
        assert not re.search(r"(?<![\w.:/<])/(?:tmp|home|work|root|mnt|data)/", path.read_text(encoding="utf-8")), path


def test_portable_paths():
    command = "python a.py --data /home/me/train/x.jsonl.xz --config ../me/scripts/recipes/r.yaml --lr 1/2 and/or"
    assert portable(command) == "python a.py --data train/x.jsonl.xz --config scripts/recipes/r.yaml --lr 1/2 and/or"
    assert portable({"/a/b/c": ["/a/b/c/d", 3, None]}) == {"b/c": ["c/d", 3, None]}
    assert portable("https://example.org/a/b/c") == "https://example.org/a/b/c"


def test_collecting(tmp_path):
    run = {"part": "c", "settings": {"output": "/home/me/runs/study"}}
    (tmp_path / "c.json").write_text(json.dumps(run))
    collect(tmp_path / "c.json", tmp_path / "results" / "study_c.json")
    kept = json.loads((tmp_path / "results" / "study_c.json").read_text())
    assert kept == {"part": "c", "settings": {"output": "runs/study"}}
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="must be files of a study, a suite or a benchmark, got other.json"):
        collect(tmp_path / "other.json", tmp_path / "results" / "other.json")
    assert not (tmp_path / "results" / "other.json").exists()


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="`results` must hold JSON files, got none in"):
        report(tmp_path)
    with pytest.raises(ValueError, match="`names` must name each file of `collect`, got 1 for 2 files"):
        main(["--collect", "a.json", "b.json", "--names", "a"])
