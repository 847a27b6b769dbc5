"""The registry of kinds: what every entry has, and that a new kind is a new file and an entry."""

import importlib
import json
import sys

import pytest
import torch
import yaml

from nanollada.modeling_nanollada import NanoLLaDAForCausalLM
from nanollada.scripts.evaluation.checkpoint import main
from nanollada.scripts.evaluation.kinds import KINDS, definitions, documentation
from nanollada.trainers.models import config_for

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
VOWELS = '''
"""How many of a text's letters are vowels; a kind that no release has."""

from typing import Literal

from nanollada.scripts.evaluation.bench import Bench, Kind, Metric, Outcome, Row, Task, settings, whole
from nanollada.trainers.scoring.estimates import share


@settings
class VowelTask(Task):
    """Texts, of which the first letters are looked at."""

    letters: int = whole(2, 40)
    case: Literal["keep", "lower"] = "lower"


def check_row(row: Row, task: Task) -> dict:
    return {"text": row.text("text")[: task.letters]}


def run(bench: Bench, task: Task, rows: list[Row]) -> Outcome:
    texts = [row.values["text"].lower() if task.case == "lower" else row.values["text"] for row in rows]
    hits = [letter in "aeiou" for text in texts for letter in text]
    bench.progress(len(rows))
    return Outcome([{"metric": "vowels", **share(hits)}], [{"text": text} for text in texts])


KIND = Kind(
    title="Vowels of a text",
    task=VowelTask,
    check_row=check_row,
    run=run,
    metrics={"vowels": Metric("share of letters that are vowels.")},
)
'''


@pytest.fixture
def vowels(tmp_path, monkeypatch):
    """The kind "vowels" in a file of its own, and in the registry."""
    (tmp_path / "vowel_kind.py").write_text(VOWELS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(KINDS, "vowels", importlib.import_module("vowel_kind").KIND)
    yield KINDS["vowels"]
    del sys.modules["vowel_kind"]


def suite(folder, tokenizer, **settings):
    torch.manual_seed(0)
    NanoLLaDAForCausalLM(config_for(tokenizer, **SHAPE)).save_pretrained(folder / "ar")
    tokenizer.save_pretrained(folder / "ar")
    (folder / "rows.jsonl").write_text('{"text": "Ada sat"}\n{"text": "Bob ran"}\n')
    task = {"name": "mine", "kind": "vowels", "data": "rows.jsonl", **settings}
    (folder / "suite.yaml").write_text(yaml.safe_dump({"description": "Letters", "tasks": [task]}))
    words = ["--suite", str(folder / "suite.yaml"), "--suite_data", str(folder), "--checkpoints", str(folder / "ar")]
    return [*words, "--output", str(folder / "out")]


def test_a_new_kind_is_a_file_and_an_entry(vowels, tmp_path, tokenizer, capsys):
    """Settings, figures, records, table, plot, definitions and the checkpoint's file follow."""
    content = main(suite(tmp_path, tokenizer, letters=3))
    (result,) = content["results"]
    assert (result["metric"], result["value"], result["unit"], result["rows"]) == ("vowels", 0.5, "share", 6)
    assert result["settings"] == {"letters": 3, "case": "lower"} and result["kind"] == "vowels"
    shown = capsys.readouterr().out
    assert "## Vowels of a text" in shown and "| mine |  | vowels | 6 |  | 50.0 % ± 20.4 |" in shown
    assert "- `vowels`: share of letters that are vowels." in shown
    assert (tmp_path / "out" / "suite.png").exists()
    assert (tmp_path / "out" / "ar" / "mine.jsonl").read_text().splitlines() == ['{"text": "ada"}', '{"text": "bob"}']
    assert json.loads((tmp_path / "ar" / "evaluation.json").read_text())["results"][0]["task"] == "mine"


def test_a_new_kind_is_documented(vowels, capsys):
    with pytest.raises(SystemExit):
        main(["--suite", "x.yaml", "--help"])
    shown = capsys.readouterr().out
    assert (
        "vowels: Vowels of a text\n  letters (40): a whole number from 2 on\n  case (lower): one of keep, lower"
        in shown
    )
    assert "  gives vowels" in shown


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"letters": 1}, "`letters` must be a whole number from 2 on, got 1"),
        ({"letters": True}, "`letters` must be a whole number from 2 on, got True"),
        ({"letters": None}, "`letters` must be a whole number from 2 on, got None"),
        ({"case": "upper"}, "`case` must be one of keep, lower, got 'upper'"),
        ({"suffix": "a"}, "`suffix` must be no setting of a vowels task: its own are letters, case, got 'a'"),
        ({"data": None}, "`data` must be a string, got None"),
    ],
)
def test_errors_of_a_new_kind_follow_from_its_settings(vowels, tmp_path, tokenizer, settings, message):
    words = suite(tmp_path, tokenizer, **settings)
    with pytest.raises(ValueError, match=rf"suite.yaml, task 1 \(mine\): {message}"):
        main(words)


def test_rows_of_a_new_kind_are_checked(vowels, tmp_path, tokenizer):
    words = suite(tmp_path, tokenizer)
    (tmp_path / "rows.jsonl").write_text('{"text": "Ada"}\n{"text": ""}\n')
    with pytest.raises(ValueError, match="rows.jsonl, row 2: empty text: `text`"):
        main(words)


def test_every_kind_says_what_it_needs_to():
    for name, kind in KINDS.items():
        assert kind.title and kind.metrics and kind.task.own(), name
        assert kind.task.needs_data == (kind.make_rows is None), name
        assert all(metric.unit and metric.definition.endswith(".") for metric in kind.metrics.values()), name
    text = documentation()
    for name, kind in KINDS.items():
        assert f"{name}: {kind.title}\n" in text
    assert "  verify (None): one of exact, qa, arithmetic" in text and "  chat (True): true or false" in text


def test_figures_are_defined_by_the_kinds_that_gave_them():
    results = [{"kind": "pairs", "metric": "accuracy/group"}, {"kind": "speed", "metric": "seconds"}]
    told = definitions(results)
    assert told["accuracy"] == "share of pairs whose good text has fewer nats." and list(told) == [
        "accuracy",
        "seconds",
    ]
    both = definitions([*results, {"kind": "presets", "metric": "accuracy/on"}])["accuracy"]
    assert both == "share of pairs whose good text has fewer nats. / share of answers that the verifier accepts."
