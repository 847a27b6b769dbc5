"""What training for edits is for: a draft written all at once, and put right. Slow."""

import json

import pytest

from nanollada.scripts.studies.editing.study import Editing, EditingArguments, editing

pytestmark = pytest.mark.slow
MINUTES = "--per_device_train_batch_size 32 --learning_rate 1e-3 --max_length 48 --lr_scheduler_type linear".split()


@pytest.fixture(scope="module")
def sft(quickstart):
    """A model that knows 4×4 sudoku, one cell per step."""
    return str(quickstart / "runs" / "quickstart" / "diffusion_sft")


def test_edits_put_a_draft_right_after_two_minutes_of_training(sft, tmp_path):
    """At least 15 points over the same draft without edits, which one forward pass writes."""
    settings = {
        "part": "sudoku",
        "diffusion": sft,
        "output": str(tmp_path),
        "steps": 240,
        "decoders": ["all", "all+edit"],
    }
    study = Editing(EditingArguments(**settings, training_rows=8000, belief_rows=24), MINUTES)
    study.prepare()
    study.do("start", 1)
    study.do("self", 1)
    record = study.report()["sudoku"]
    gains = {row["run"]: row["figures"]["draft"] for row in record["gains"]}
    assert gains["self"]["value"] - 2 * gains["self"]["standard_error"] > 0 and gains["self"]["value"] >= 0.15, gains
    assert gains["self"]["value"] > gains["start"]["value"] + 0.1, gains  # whoever copies visible tokens edits nothing
    beliefs = {row["run"]: row["figures"]["replaced"]["value"] for row in record["beliefs"]}
    assert beliefs["self"] < beliefs["start"] / 2
    passes = {
        row["decoder"]: row["figures"]["forwards"]["value"] for row in record["frontier"] if row["run"] == "self"
    }
    assert passes["all"] == 1 and 1 < passes["all+edit"] <= 9


def test_the_smallest_study_in_processes_of_its_own(sft, tmp_path, capsys):
    settings = {"part": "sudoku", "diffusion": sft, "output": str(tmp_path / "study"), "steps": 2, "training_rows": 50}
    settings |= {"eval_rows": 10, "belief_rows": 2, "decoders": ["one", "all", "all+edit"], "runs": ["plain", "self"]}
    options = {"per_device_train_batch_size": 8, "learning_rate": "1e-5", "max_length": 48}
    record = editing(EditingArguments(**settings, jobs=2), **options)["sudoku"]
    printed, folder = capsys.readouterr().out, tmp_path / "study"
    lines = (folder / "sudoku.md").read_text().splitlines()
    assert lines[0] == "| decoder | plain (1 seeds) | edits of self (1 seeds) |" and lines[0] in printed
    assert [line.split(" | ")[0] for line in lines[2:5]] == [
        "| one per step",
        "| all at once",
        "| all at once + edits",
    ]
    for row in record["frontier"]:
        scores = json.loads((folder / f"{row['run']}-1" / "scores.json").read_text())["decoders"][row["decoder"]]
        share, passes = (sum(scores[of]) / 10 for of in ("quality", "forwards"))
        (line,) = [line for line in lines if line.startswith(f"| {TITLES[row['decoder']]} |")]
        cell = line.split(" | ")[["plain", "self"].index(row["run"]) + 1]
        assert cell.startswith(f"{100 * share:.1f} % ±") and f" @ {passes:.1f}" in cell
    assert {run["run"] for run in record["runs"]} == {"plain-1", "self-1"}
    commands = [run["command"] for run in record["runs"]]
    assert all(command.startswith("accelerate launch trainers/diffusion.py") for command in commands)


TITLES = {"one": "one per step", "all": "all at once", "all+edit": "all at once + edits"}
