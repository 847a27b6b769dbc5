"""No number stands in a card without its source: whatever is changed in card, file or model is found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cards import (
    BOARDS,
    BOUND,
    CHOICE,
    COMMAND,
    CONFIG,
    EXACT,
    RESULTS,
    TABLE,
    TEXT,
    card_of,
    configure,
    edit,
    evaluation_of,
    rewrite,
)
from huggingface_hub import EvalResult, ModelCard
from safetensors.torch import save_file

from nanollada.hub_upload import upload as upload_module
from nanollada.hub_upload import verify as verify_module
from nanollada.hub_upload.card_check import card_faults
from nanollada.hub_upload.card_results import (
    END,
    START,
    with_source,
)
from nanollada.hub_upload.evaluation_file import model_digests
from nanollada.hub_upload.verify import VerificationError, check_results, verify


@pytest.fixture
def folder(tmp_path) -> Path:
    """Weights, their results, and the card of these."""
    path = tmp_path / "small"
    path.mkdir()
    save_file({"weight": torch.arange(4.0)}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG))
    evaluation = evaluation_of(path)
    (path / "evaluation.json").write_text(json.dumps(evaluation))
    (path / "README.md").write_text(card_of(evaluation))
    return path


def test_a_card_of_its_file_passes_with_prose_and_another_name(folder):
    check_results(folder)
    card = folder / "README.md"
    edit(card, "## Limits\n", "## Limits\n\nOf 200 boards 95 % look right: 0.95.\n\n| a | b |\n|--|--|\n| 1 | 2 |\n")
    edit(card, "# small\n", "# small\n\nIt scores 12 here.\n")
    edit(card, "| 0.7950 ± 0.0285 |", "|  0.7950 ± 0.0285   |")  # a formatter of Markdown
    edit(card, "| --- ", "| -------- ")
    check_results(folder)
    card.write_text(with_source(card.read_text(), "you/other model", "trial"))
    assert "https://huggingface.co/you/other%20model/blob/trial/evaluation.json" in card.read_text()
    check_results(folder)
    before, _, rest = card.read_text().partition(START)
    card.write_text(before + rest.partition(END)[2])  # the table is left out; the index has its source still
    check_results(folder)


def test_addresses_in_prose_are_the_writers_own():
    link = "https://huggingface.co/me/base/blob/main/evaluation.json"
    assert link in with_source(card_of({"results": RESULTS}, prose=f"See {link}."), "you/model")


def test_a_card_without_numbers_needs_no_file(folder):
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# small\n\n0.95 is a number in prose.\n")
    check_results(folder)
    rewrite(folder, weights_sha256="0" * 64)  # what is there must be good all the same
    with pytest.raises(VerificationError, match="must be of the model in small, got .*; README.md says no number"):
        check_results(folder)
    (folder / "evaluation.json").unlink()
    check_results(folder)


SOURCES = [
    (
        "      value: 0.795\n",
        "      value: 0.95\n",
        "README.md says exact_match 0.95 ± 0.02855 on boards .sudoku., evaluation.json has exact_match 0.795 ± ",
    ),
    (
        "        standard_error: 0.02855\n",
        "        standard_error: 0.001\n",
        r"says exact_match 0.795 ± 0.001 on boards .sudoku., evaluation.json has exact_match 0.795 ± 0.02855 on",
    ),
    (
        "      value: 0.31\n",
        "      value: 0.41\n",
        r"says acc_norm 0.41 ± 0.02 on arc\|easy \(arc\), evaluation.json has acc_norm 0.31 ± 0.02 on arc\|easy",
    ),
    ("    - type: acc_norm\n", "    - type: acc\n", "says acc 0.31 .*, evaluation.json has no such result"),
    ("      name: boards\n", "      name: gsm8k\n", "says exact_match 0.795 ± 0.02855 on gsm8k .sudoku., .* no such"),
    ("      config: arc\n", "      config: piqa\n", r"says acc_norm 0.31 ± 0.02 on arc\|easy \(piqa\), .* no such"),
    ("        bound: true\n", "", "`metrics.args` {'standard_error': 0.0123, .*'bound': True.* and not {"),
    (f"revision: {'f' * 64}", f"revision: {'e' * 64}", "`dataset.revision` 'f+' and not 'e+'"),
    (
        "      name: evaluation.json\n",
        "      name: leaderboard\n",
        "has exact_match 0.795 .* on boards .sudoku., but .*`source.name` None and not 'leaderboard'",
    ),
    ("/me/small/blob/main/evaluation.json", "/me/small/blob/main/other.json", "but `source.url` None and not"),
    (
        "| 0.7950 ± 0.0285 |",
        "| 0.9500 ± 0.0285 |",
        "says 0.9500 ± 0.0285 for sudoku, –, exact match; .* has 0.7950",
    ),
    (" (masks ± 0.0045)", " (masks ± 0.0001)", r"README.md says ≤ 1.8765 ± 0.0123 \(masks ± 0.0001\) for wiki_en, "),
    ("| ≤ 1.8765 ±", "| 1.8765 ±", "README.md says 1.8765 ± 0.0123 .* for wiki_en, en, .* has ≤ 1.8765 ± 0.0123"),
    ("| samples = 16, ", "| samples = 128, ", r"says samples = 128, order = \[1, None\] for wiki_en"),
    ("| 0.25 |", "| 0.20 |", "README.md says 0.20 for arc, en, .*; evaluation.json has 0.25"),
    (
        f"{COMMAND}\n",
        f"{COMMAND} --seed 9\n",
        f"README.md says 'python scripts/{COMMAND} --seed 9', .* has 'python scripts/{COMMAND}'",
    ),
    ("Seed 7:", "Seed 8:", "README.md says 'Seed 8:', evaluation.json has 'Seed 7:'"),
    (END, f"Perplexity is 3.\n\n{END}", "README.md says 'Perplexity is 3.', evaluation.json has no such line"),
    (TABLE.splitlines()[5] + "\n", "", r"README.md leaves out '\|arc\|en\|.* of evaluation.json"),
    (START, "", "README.md must hold the marks of the evaluation once, in order, got 0 and 1"),
    (END, END + "\n\n" + START + END, "README.md must hold the marks of the evaluation once, in order, got 2 and 2"),
    (
        "## Limits",
        TABLE + "## Limits",
        "README.md must keep the table of results between its marks, got one outside",
    ),
    (
        "      value: 0.795\n",
        "",
        "README.md says exact_match None ± 0.02855 on boards .sudoku., evaluation.json has exact_match",
    ),
    (
        "model-index:",
        "model-index: []\nmodel-index:",
        "metadata, got `model-index` more than once",
    ),
    ("      value: 0.795\n", "      value: 0.9\n      value: 0.795\n", "metadata, got `value` more than once"),
    ("---\n\n# small", "a: [\n---\n\n# small", "README.md must have readable metadata, got"),
    ("      value: 0.795\n", "      value: 0.795\n      best: 0.1\n", "but `metrics.best` None and not 0.1"),
    ("  - task:\n", "  - score: 0.99\n    task:\n", "but `score` None and not 0.99"),
    ("      type: text-gen", "      name: 99.9%\n      type: text-gen", "but `task.name` None and not '99.9%'"),
    ("- name: small\n", "- name: small\n  best: 1\n", "`model-index` must hold `name` and `results`, got `best`"),
    ("      value: 0.795\n", "      value: '0.795'\n", "but `metrics.value` 0.795 and not '0.795'"),
    ("        rows: 1200\n", "        rows: 02260\n", "got '02260', which is neither text nor a plain JSON number"),
    ("        rows: 1200\n", "        rows: 20:00\n", "got '20:00', which is neither text nor a plain JSON number"),
    ("        rows: 1200\n", "        rows: 1_200\n", "got '1_200', which is neither text nor a plain JSON number"),
    ("        rows: 1200\n", "        rows: 1200.0\n", "`metrics.args` {.*1200, .*} and not {.*1200.0, "),
    ("        bound: true\n", "        bound: yes\n", "got 'yes', which is neither text nor"),
    ("        bound: true\n", "        bound: 1\n", "`metrics.args` {.*'bound': True.* and not {.*'bound': 1"),
    ("model-index:", "<<: {a: 1}\nmodel-index:", "README.md must have readable metadata, got the merge key `<<`"),
    ("  results:\n", "  result:\n", "got `result`"),
    ("model-index:", "model-index: 3\nother:", "`model-index` must be a list of mappings, got 3"),
]


@pytest.mark.parametrize(("old", "new", "match"), SOURCES)
def test_a_card_that_says_something_else_is_refused(folder, old, new, match):
    edit(folder / "README.md", old, new, 1)
    with pytest.raises(VerificationError, match=match):
        check_results(folder)


@pytest.mark.parametrize(
    "head",
    [
        "| Task | Language | Metric | Value ± s.e. | Chance | Scored on | Data | How |",
        "Task | Language | Metric | Value ± s.e. | Chance | Scored on | Data | How",
        "|task|LANGUAGE|metric|value ± s.e.|chance|scored on|data|how|",
        "| **Task** | __Language__ | **Metric** | *Value ± s.e.* | Chance | Scored  on | Data | How |",
        "> | Task | Language | Metric | value ± s.e. | Chance | Scored on | Data | How |",
    ],
)
def test_a_second_table_is_found_however_it_is_written(folder, head):
    """Of the tables of results; the writer's own have other heads."""
    edit(folder / "README.md", "## Limits", "| Data | Metric | Value |\n|---|---|---|\n| a | b | 9 |\n\n## Limits")
    check_results(folder)
    edit(folder / "README.md", "## Limits", f"{head}\n## Limits")
    with pytest.raises(VerificationError, match="README.md must keep the table of results between its marks"):
        check_results(folder)


@pytest.mark.parametrize(
    "line",
    ["Exact match on boards: 99.9 %", "boards | exact match | 0.9990", "> | boards | 0.999 |", "<td>0.999</td>"],
)
def test_whatever_stands_between_the_marks_needs_its_file(folder, line):
    (folder / "README.md").write_text(f"---\nlicense: mit\n---\n# small\n\n{START}\n\n{END}\n")
    (folder / "evaluation.json").unlink()
    check_results(folder)
    edit(folder / "README.md", END, f"{line}\n\n{END}")
    with pytest.raises(VerificationError, match=r"got none in small; README.md says \S+"):
        check_results(folder)


def test_metadata_that_is_not_results_may_be_any_yaml(folder):
    edit(folder / "README.md", "model-index:", "released: 2026-01-01\nbig: no\nmodel-index:")
    check_results(folder)


def test_a_byte_order_mark_hides_nothing(folder):
    edit(folder / "README.md", "      value: 0.795\n", "      value: 0.95\n")
    (folder / "README.md").write_text("\ufeff" + (folder / "README.md").read_text())
    with pytest.raises(VerificationError, match="README.md says exact_match 0.95"):
        check_results(folder)


def test_texts_that_look_like_numbers_stay_texts(folder):
    """What our own YAML writes is read back: nothing in it is taken for another kind."""
    words = ["1e-05", "0o10", "010", "1:30", "true", "null", "2026-01-01", "no", "1_8", "é: ‘x’", "a\nb"]
    odd = {**CHOICE, "data": "1e-05", "settings": {"words": words, "small": 1e-05, "flag": True, "one": 1}}
    evaluation = evaluation_of(folder, [odd, {**odd, "metric": "acc", "value": 1}])
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "README.md").write_text(card_of(evaluation))
    check_results(folder)
    edit(folder / "README.md", "      value: 1\n", "      value: true\n")
    with pytest.raises(VerificationError, match="README.md says acc True ± 0.02 on .*has acc 1 ± 0.02"):
        check_results(folder)


def test_a_table_without_marks_is_refused(folder):
    """Without its marks the table would be checked by nothing."""
    edit(folder / "README.md", START, "")
    edit(folder / "README.md", END, "")
    with pytest.raises(VerificationError, match="README.md must keep the table of results between its marks"):
        check_results(folder)


def test_results_of_other_tools_are_refused_by_name(folder):
    """A leaderboard's entry, and a token by which the Hub would vouch for ours."""
    card = ModelCard.load(folder / "README.md")
    foreign = {"task_type": "text-generation", "dataset_type": "ai2_arc", "dataset_name": "ARC", "metric_type": "acc"}
    source = {"source_name": "Leaderboard", "source_url": "https://huggingface.co/spaces/me/leaderboard"}
    card.data.eval_results.append(EvalResult(**foreign, metric_value=0.99, **source))
    card.save(folder / "README.md")
    match = r"says acc 0.99 on ARC, evaluation.json has no such result \(what other tools measured is prose"
    with pytest.raises(VerificationError, match=match):
        check_results(folder)
    card.data.eval_results.pop()
    card.data.eval_results[0].verify_token = "x"
    card.save(folder / "README.md")
    with pytest.raises(VerificationError, match="but `metrics.verifyToken` None and not 'x'"):
        check_results(folder)


def test_of_several_settings_the_changed_one_is_named(folder):
    """Two results of a metric and a task: the card's other number is not held against the one that is right."""
    twin = {**CHOICE, "settings": {"shots": 5}, "value": 0.35}
    evaluation = evaluation_of(folder, [CHOICE, twin])
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "README.md").write_text(card_of(evaluation).replace("      value: 0.35\n", "      value: 0.95\n"))
    with pytest.raises(VerificationError, match=r"says acc_norm 0.95 [^;]*, evaluation.json has acc_norm 0.35 [^;]*$"):
        check_results(folder)


def test_every_fault_counts_and_the_first_are_named(folder):
    edit(folder / "README.md", "± 0.02", "± 0.01")
    edit(folder / "README.md", "      value: ", "      value: 9")
    assert len(card_faults(folder)) == 6
    with pytest.raises(VerificationError, match="README.md says .*; and 1 more$"):
        check_results(folder)


@pytest.mark.parametrize("results", [[EXACT], [{**TEXT, "bound": False}]])
def test_exact_numbers_are_not_of_a_masked_class(folder, results):
    rewrite(folder, results=results)
    match = "evaluation.json must hold upper bounds of a masked .*, got bits_per_byte, exact, of NanoLLaDAForMaskedLM"
    with pytest.raises(VerificationError, match=match):
        check_results(folder)
    configure(folder, architectures=["NanoLLaDAForCausalLM"])
    rewrite(folder, **model_digests(folder))
    (folder / "README.md").write_text(card_of(json.loads((folder / "evaluation.json").read_text())))
    check_results(folder)


@pytest.mark.parametrize("results", [[BOUND], [TEXT]])
def test_bounds_are_not_of_a_causal_class(folder, results):
    configure(folder, architectures=["NanoLLaDAForCausalLM"])
    rewrite(folder, **model_digests(folder), results=results)
    match = "must hold .*, got bits_per_byte, upper bound, of NanoLLaDAForCausalLM"
    with pytest.raises(VerificationError, match=match):
        check_results(folder)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda folder: rewrite(folder, config_sha256=None),
            "must name its model by `config_sha256`, got none .*again",
        ),
        (
            lambda folder: configure(folder, block_length=4),
            "evaluation.json must be of the model in small, got `config_sha256` [0-9a-f]{64}; README.md says ex",
        ),
        (lambda folder: configure(folder, rope_parameters={"rope_theta": 10.0}), "in small, got `config_sha256`"),
        (lambda folder: (folder / "config.json").unlink(), "config.json must be readable JSON, got"),
        (lambda folder: (folder / "model.safetensors").unlink(), "small must hold safetensors, got none"),
        (lambda folder: (folder / "evaluation.json").write_text("[]"), "must hold a JSON object, got list"),
        (
            lambda folder: (folder / "evaluation.json").unlink(),
            "`folder` must hold evaluation.json, got none in small; README.md says exact_match 0.795 ± 0.02855 on "
            "boards .sudoku.; bits_per_byte .* and 1 more",
        ),
        (
            lambda folder: save_file({"weight": torch.ones(4)}, folder / "model.safetensors"),
            "evaluation.json must be of the model in small, got `weights_sha256` [0-9a-f]{64}; README.md says ex",
        ),
        (
            lambda folder: rewrite(folder, weights_sha256=None),
            "evaluation.json must name its model by `weights_sha256`, got none .*; README",
        ),
        (lambda folder: rewrite(folder, results=None), "`evaluation` must hold a list of `results`, got NoneType"),
        (lambda folder: rewrite(folder, results=[3]), "`evaluation` must hold a list of `results`, got list"),
        (lambda folder: rewrite(folder, results=[]), "says exact_match 0.795 .*, evaluation.json has no such result"),
        (
            lambda folder: rewrite(folder, results=[{**BOARDS, "value": "0.795"}]),
            r"must give `value` of exact_match of task 'sudoku' as a share in \[0, 1\], got '0.795'; README",
        ),
        (lambda folder: (folder / "evaluation.json").write_text("{"), "evaluation.json must be readable JSON, got"),
    ],
)
def test_a_file_that_cannot_be_the_source_is_refused(folder, change, match):
    change(folder)
    with pytest.raises(VerificationError, match=match):
        check_results(folder)


def test_a_file_of_version_1_is_refused_with_the_commands_that_measure_anew(folder):
    """Its card, too: nobody could tell what its errors are over."""
    old = {"data": "a", "metric": "nelbo", "bits_per_byte": 1.8, "command": "evaluate.py --data a"}
    for version in (None, 1):
        changes = {} if version is None else {"version": version}
        content = {**model_digests(folder), **changes, "command": "evaluate.py --data b", "results": [old, old]}
        (folder / "evaluation.json").write_text(json.dumps(content))
        match = (
            r"evaluation.json must be of version 2, got 1: measure again \(python scripts/evaluate.py --data b; .*a\)"
        )
        with pytest.raises(VerificationError, match=match):
            check_results(folder)


def test_a_table_alone_needs_its_file_too(folder):
    """Without a `model-index` the numbers are read from the table."""
    card = folder / "README.md"
    card.write_text("---\nlicense: mit\n---\n" + card.read_text().partition("\n---\n")[2])
    check_results(folder)
    (folder / "evaluation.json").unlink()
    with pytest.raises(VerificationError, match=r"got none in small; README.md says sudoku, –, exact match, 0.7950 ±"):
        check_results(folder)


def test_verify_and_the_dry_run_check(folder, monkeypatch, capsys):
    """Before anything of the folder is run, and whether or not it would be pushed."""
    monkeypatch.setattr(verify_module, "check_files", lambda folder: {})
    monkeypatch.setattr(upload_module, "check_files", lambda folder: {})
    monkeypatch.setattr(verify_module, "_start_clean_process", lambda *args: pytest.fail("too late"))
    monkeypatch.setattr(upload_module, "_push", lambda *args: pytest.fail("pushed"))
    edit(folder / "README.md", "      value: 0.795\n", "      value: 0.95\n")
    match = "results: README.md says exact_match 0.95 .*, evaluation.json has exact_match 0.795"
    with pytest.raises(VerificationError, match=match):
        verify(folder)
    for options in ([], ["--push"]):
        assert upload_module.main([str(folder), "me/small", *options]) == 1
        assert "not uploaded: results: README.md says exact_match 0.95" in capsys.readouterr().err


def test_the_check_needs_no_nanollada(folder):
    """verify.py runs by its path where nanollada is not installed."""
    code = "import sys, verify, pathlib; verify.block_nanollada(); verify.check_results(pathlib.Path(sys.argv[1]))"
    environment = {**os.environ, "PYTHONPATH": str(Path(verify_module.__file__).parent)}
    for value, status in (("0.795", 0), ("0.95", 1)):
        edit(folder / "README.md", "      value: 0.795\n", f"      value: {value}\n")
        done = subprocess.run([sys.executable, "-c", code, folder], env=environment, capture_output=True, text=True)
        assert done.returncode == status and ("exact_match 0.95" in done.stderr) == status, done.stderr
