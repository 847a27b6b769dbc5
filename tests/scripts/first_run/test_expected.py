"""The quickstart distrusts itself; and its own results stay apart from what other programs add to evaluation.json."""

import json
import shlex

import pytest
import torch
from recordings import recorded

from nanollada.modeling_nanollada import NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM
from nanollada.scripts.evaluation.checkpoint import main as evaluate
from nanollada.scripts.first_run import stages
from nanollada.scripts.first_run.expected import DISTRUST, EXPECTED, NAMES, RECORDED_WITH, doubts
from nanollada.scripts.first_run.page import draw_denoising, result_rows, write_report
from nanollada.scripts.first_run.stages import Quickstart, QuickstartArguments
from nanollada.trainers.models import config_for
from nanollada.trainers.resuming.stopping import Interrupted

# A run with transformers 5.24, and its diffusion SFT in blocks of 64 (modeling_nanollada/DECODING.md, "Length").
RECORDED = {
    "ar": {"text": 2.519},
    "diffusion": {"text": 2.615},
    "ar_sft": {"text": 3.433, "sft": 0.206, "exact_match": 0.715},
    "diffusion_sft": {"text": 3.562, "sft": 0.257, "exact_match": 1.0},
}


def result(stage, name, value):
    if name == "exact_match":
        return {"data": "corpus/sudoku_test.jsonl", "metric": name, "value": value, "standard_error": 0.03}
    kind = {"metric": "bits_per_byte", "bound": "diffusion" in stage}
    return {"data": f"corpus/{name}_test.jsonl", **kind, "value": value, "mask_error": 0.01}


@pytest.fixture
def finished(tmp_path):
    """A finished run's files; call it with the figures that are not those of README's table."""

    def write(changes=(), settings=(), versions=RECORDED_WITH):
        for stage in RECORDED:
            (tmp_path / stage).mkdir(exist_ok=True)
            facts = {"parameters": 1_070_000, "steps": 765, "seconds": 61.2, "seed": 42, "hardware": "CPU"}
            (tmp_path / stage / "run.json").write_text(json.dumps({**facts, "versions": versions}))
            (tmp_path / stage / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n')
        figures = {stage: {**RECORDED[stage], **dict(changes).get(stage, {})} for stage in RECORDED}
        told = {
            stage: {"results": [result(stage, *item) for item in of.items() if item[1] is not None]}
            for stage, of in figures.items()
        }
        (tmp_path / "results.json").write_text(json.dumps(told))
        given = {"size": "1m", "data": None, "steps_share": 1.0, "seed": 7, **dict(settings)}
        (tmp_path / "settings.json").write_text(json.dumps(given))
        (tmp_path / "comparison.json").write_text(
            '[{"seconds": 1, "tokens_per_second": 1, "tokens_per_forward": 1,'
            '"repeats": 2, "model": "ar", "prompt": "a", "text": "b"}]'
        )
        return tmp_path

    return write


def page_of(folder, tokenizer):
    draw_denoising(recorded(tokenizer), folder / "denoising.png")
    write_report(folder / "report.html", folder, list(NAMES), recorded(tokenizer), "the cat")
    return (folder / "report.html").read_text()


def test_recorded_runs_are_believed(finished, tokenizer):
    folder = finished()
    assert doubts(folder) == [] and "Don't trust" not in page_of(folder, tokenizer)
    others = {"ar_sft": {"exact_match": 0.51, "text": 3.419}, "diffusion_sft": {"exact_match": 0.975, "text": 3.567}}
    assert doubts(finished(others)) == []
    assert {stage: set(rules) for stage, rules in EXPECTED["1m"].items()} == {s: set(of) for s, of in RECORDED.items()}


@pytest.mark.parametrize(
    ("stage", "name", "value", "told"),
    [
        ("ar_sft", "exact_match", 0.0, "AR + SFT: share of sudokus solved 0.000, expected 0.3 to 1.0."),
        (
            "diffusion_sft",
            "exact_match",
            0.795,
            "diffusion + SFT: share of sudokus solved 0.795, expected 0.8 to 1.0.",
        ),
        ("ar", "text", 1.2, "AR: bits/byte of text 1.200, expected 2.1 to 3.0."),
        ("diffusion", "text", float("nan"), "diffusion: bits/byte of text nan, expected 2.1 to 3.1."),
        ("diffusion_sft", "sft", 9.7, "diffusion + SFT: bits/byte of answers 9.700, expected 0.1 to 0.55."),
        ("ar_sft", "exact_match", None, "AR + SFT: share of sudokus solved none, expected 0.3 to 1.0."),
    ],
)
def test_a_run_far_outside_is_doubted(finished, tokenizer, stage, name, value, told):
    folder = finished({stage: {name: value}}, versions={**RECORDED_WITH, "transformers": "5.99.0"})
    first, *causes = doubts(folder)
    assert first == told
    assert any("transformers 5.99.0 (recorded with 5.24.0)" in cause for cause in causes)
    assert all(any(word in cause for cause in causes) for word in ("recipes", "resumed", "AR + SFT 765"))
    page = page_of(folder, tokenizer)
    assert page.index("Don&#39;t trust this run") < page.index(told) < page.index("recorded with 5.24.0")
    assert page.index("recorded with 5.24.0") < page.index("<h2>Results</h2>")


@pytest.mark.parametrize("settings", [{"steps_share": 0.5}, {"data": ["my.jsonl"]}, {"size": "32m"}])
def test_nothing_is_known_of_other_settings(finished, settings):
    assert doubts(finished({"ar_sft": {"exact_match": 0.0}}, settings)) == []


@pytest.mark.parametrize(("solved", "status"), [(0.0, 3), (0.715, 0)])
def test_the_end_says_so(finished, capsys, monkeypatch, solved, status):
    """On the console and by the exit status, after all is done."""
    folder = finished({"ar_sft": {"exact_match": solved}}, {"on_bad_rows": "stop", "digests": {}, "seed": 42})
    (folder / "corpus").mkdir()
    (folder / "corpus" / "sft_train.jsonl").write_text("")
    (folder / "corpus" / "sudoku_test.jsonl").write_text(json.dumps(SUDOKU))
    for name in ("make_corpus", "make_tokenizer", "evaluate", "compare", "export", "report"):
        monkeypatch.setattr(Quickstart, name, lambda self: None)
    assert stages.main(["--output", str(folder)]) == status
    shown = capsys.readouterr().out
    assert (DISTRUST in shown) == ("share of sudokus solved 0.000" in shown) == (status == 3)
    _, *lines = shown[shown.index("\nNext:\n") + 1 :].splitlines()
    options = ["--checkpoint", str(folder / "diffusion_sft"), "--watch", "--chat"]
    assert shlex.split(lines[0])[-6:] == [*options, "--prompt", "Sudoku 1234341221434320"]
    assert shlex.split(lines[1])[-4:] == options


@pytest.mark.parametrize(
    ("stop", "said"),
    [
        (Interrupted("interrupted after step 37", "x", "accelerate …"), "interrupted after step 37"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_ctrl_c_names_the_command_that_goes_on(tmp_path, capsys, monkeypatch, stop, said):
    def raises(self):
        raise stop

    monkeypatch.setattr(Quickstart, "make_corpus", raises)
    assert stages.main(["--output", str(tmp_path / "my run")]) == 130
    first, command = capsys.readouterr().err.splitlines()[-2:]
    assert first == said and command.startswith("Go on with: ")
    assert shlex.split(command)[-2:] == ["--output", str(tmp_path / "my run")]


# ---- results of several programs in one evaluation.json


TURNS = [{"role": "user", "content": "Sudoku 1234341221434320"}, {"role": "assistant", "content": "1"}]
SUDOKU = {"prompt": TURNS[:1], "completion": TURNS[1:], "answer": "1", "puzzle": "1234341221434320"}


@pytest.fixture
def trained(tmp_path, tokenizer):
    """A quickstart whose models are trained, in tiny."""
    run = Quickstart(QuickstartArguments(output=str(tmp_path / "run"), steps_share=0.5))
    run.corpus.mkdir()
    rows = {"text_test": {"text": "The cat sat on the mat."}, "sft_test": {"messages": TURNS}, "sudoku_test": SUDOKU}
    for name, row in {**rows, "sft_train": rows["sft_test"]}.items():
        (run.corpus / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    for stage, model in (("ar_sft", NanoLLaDAForCausalLM), ("diffusion_sft", NanoLLaDAForMaskedLM)):
        torch.manual_seed(0)
        model(config_for(tokenizer, initializer_range=0.4, **shape)).save_pretrained(run.folder / stage)
        tokenizer.save_pretrained(run.folder / stage)
        facts = {"data": {"max_length": 48}, "parameters": 1, "steps": 1, "seconds": 1}
        (run.folder / stage / "run.json").write_text(json.dumps(facts))
    return run


def measure_suite(run, tmp_path):
    """README's suite command, its tasks with the names of the quickstart's data and metrics."""
    checkpoints = [str(run.folder / stage) for stage in ("ar_sft", "diffusion_sft")]
    words = ["--suite", str(stages.RECIPES.parent / "suites" / "quickstart.yaml"), "--checkpoints", *checkpoints]
    words += ["--suite_data", str(run.corpus), "--output", str(tmp_path / "suite"), "--samples", "2"]
    evaluate([*words, "--tasks", "text", "answers", "sudoku"])


@pytest.mark.parametrize("first", ["quickstart", "suite"])
def test_the_quickstart_goes_on_after_the_suite(trained, tmp_path, first):
    stages = ["ar_sft", "diffusion_sft"]
    if first == "quickstart":
        trained.evaluate()
        before = result_rows(trained.folder, stages)
    measure_suite(trained, tmp_path)
    trained.evaluate()
    rows = result_rows(trained.folder, stages)
    assert first == "suite" or rows == before
    for stage, row in zip(stages, rows, strict=True):
        own = json.loads((trained.folder / "results.json").read_text())[stage]["results"]
        kept = json.loads((trained.folder / stage / "evaluation.json").read_text())["results"]
        assert [r["metric"] for r in own] == ["bits_per_byte", "nats_per_token"] * 2 + ["exact_match"]
        assert {r["bound"] for r in own[:4]} == {"diffusion" in stage}
        assert f"{own[0]['value']:.3f}" in row[1] and "%" in row[3] and "–" not in row
        assert all(result in kept for result in own)
        assert {r["task"] for r in kept if r not in own} == {"text", "answers", "sudoku"}


def test_a_model_trained_anew_is_evaluated_anew(trained, tokenizer):
    trained.evaluate()
    assert trained.evaluated("ar_sft")
    torch.manual_seed(1)
    config = NanoLLaDAForCausalLM.from_pretrained(trained.folder / "ar_sft").config
    NanoLLaDAForCausalLM(config).save_pretrained(trained.folder / "ar_sft")
    assert not trained.evaluated("ar_sft") and trained.evaluated("diffusion_sft")
    (trained.folder / "diffusion_sft" / "evaluation.json").unlink()
    assert not trained.evaluated("diffusion_sft")


def test_results_of_version_1_are_measured_anew(trained, capsys):
    trained.evaluate()
    files = [trained.folder / "results.json", trained.folder / "ar_sft" / "evaluation.json"]
    for file in files:
        file.write_text(file.read_text().replace('"version": 2', '"version": 1'))
    assert not trained.evaluated("ar_sft")
    capsys.readouterr()
    trained.evaluate()
    assert trained.evaluated("ar_sft") and "dropped 5 results, " in (said := capsys.readouterr().err)
    assert ", of version 1\n" in said
