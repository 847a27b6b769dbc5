"""The study of editing: its arms and commands, and tiny ones in this process."""

import json

import pytest
import torch

from nanollada.modeling_nanollada import NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM
from nanollada.scripts.studies.cells import options_by_name, options_of
from nanollada.scripts.studies.editing.arms import ARMS, PARTS
from nanollada.scripts.studies.editing.decoders import DECODERS
from nanollada.scripts.studies.editing.study import Editing, EditingArguments, editing, main
from nanollada.trainers.models import config_for
from nanollada.trainers.puzzles.registry import make_rows, solves

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SUDOKU = {"part": "sudoku", "diffusion": "a"}
TEXT = {"part": "text", "diffusion": "a", "ar": "b", "data": ["c"], "eval_data": ["d"]}


@pytest.fixture(scope="module")
def starts(tmp_path_factory, tokenizer):
    """Untrained checkpoints of both kinds."""
    folders = {}
    for kind, model_class in (("ar", NanoLLaDAForCausalLM), ("diffusion", NanoLLaDAForMaskedLM)):
        torch.manual_seed(0)
        folders[kind] = str(tmp_path_factory.mktemp(kind))
        model_class(config_for(tokenizer, initializer_range=0.3, **SHAPE)).save_pretrained(folders[kind])
        tokenizer.save_pretrained(folders[kind])
    return folders


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**SUDOKU, "runs": ["vrpo"]}, "`runs` must be among start, plain, .*, got 'vrpo'"),
        ({**SUDOKU, "decoders": ["one", "two"]}, "`decoders` must be among one, .*, got 'two'"),
        ({**SUDOKU, "steps": 0}, "`steps` must be at least 1, got 0"),
        ({**SUDOKU, "eval_rows": 0}, "`eval_rows` must be at least 1, got 0"),
        ({**SUDOKU, "seeds": []}, "`seeds` must be given"),
        (
            {**SUDOKU, "puzzle_options": '{"max_blanks": 99}'},
            "`max_blanks` must be a whole number from 1 to 12, got 99",
        ),
        ({**TEXT, "ar": None}, "`ar` must be given in part text, got None"),
        ({**TEXT, "part": "infill", "eval_data": []}, r"`eval_data` must be given in part infill, got \[\]"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EditingArguments(**settings)


def test_every_part_has_decoders_and_arms_and_measures_what_its_edits_add_to():
    for part in PARTS.values():
        assert set(part.arms) <= ARMS.keys() and "plain" in part.arms
        drafts = {DECODERS[name].draft for name in part.decoders} - {None}
        assert drafts <= set(part.decoders) and len(set(part.decoders)) == len(part.decoders)


def test_arms_differ_in_their_corruption_and_in_nothing_else(tmp_path):
    study = Editing(EditingArguments(**SUDOKU, output=str(tmp_path), steps=6), ["--learning_rate", "1e-3"])
    plain, *others = (options_by_name(study.overrides(name, 2)) for name in PARTS["sudoku"].arms)
    common = {"seed": "2", "max_steps": "6", "block_length": "0", "learning_rate": "1e-3", "model_name_or_path": "a"}
    assert common.items() <= plain.items() and plain["data"] == str(tmp_path / "problems.jsonl")
    assert "corruption" not in plain
    sources = []
    for chosen in others:
        differing = {name for name in chosen if chosen[name] != plain.get(name)}
        assert differing == {"output_dir", "corruption", "edit_rate", "edit_source"} and plain.keys() <= chosen.keys()
        sources.append(chosen["edit_source"])
    assert sources == ["self", "unigram", "uniform", "mixed"]
    again = options_by_name(study.arguments())  # of a run's own process: they make the same study
    assert again["part"] == "sudoku" and again["steps"] == "6" and "seeds" not in again


def test_a_folder_serves_one_study(tmp_path):
    Editing(EditingArguments(**SUDOKU, output=str(tmp_path)))
    with pytest.raises(ValueError, match="`output` holds a study with another `part`"):
        Editing(EditingArguments(**TEXT, output=str(tmp_path)))
    Editing(EditingArguments(**SUDOKU, output=str(tmp_path), seeds=[3], runs=["plain"]))  # more runs


OPTIONS = {"per_device_train_batch_size": 2, "learning_rate": "1e-2", "logging_steps": 1}


def test_a_tiny_study_of_a_puzzle(tmp_path, starts, capsys):
    settings = {**SUDOKU, "diffusion": starts["diffusion"], "output": str(tmp_path / "run"), "steps": 2}
    settings |= {"training_rows": 6, "eval_rows": 5, "belief_rows": 2, "puzzle_options": '{"max_blanks": 9}'}
    settings |= {"decoders": ["one", "all", "all+edit"], "runs": ["start", "plain", "mixed"]}
    Editing(EditingArguments(**settings), options_of(OPTIONS)).prepare()
    for name in settings["runs"]:
        editing(EditingArguments(**settings, only=f"{name}-1"), **OPTIONS)
    record = editing(EditingArguments(**settings), **OPTIONS)["sudoku"]
    folder = tmp_path / "run"
    assert record == json.loads((folder / "sudoku.json").read_text())
    assert (folder / "sudoku.md").read_text() in capsys.readouterr().out and (folder / "sudoku.png").exists()
    asked = [
        json.loads(line)["messages"][0]["content"] for line in (folder / "problems.jsonl").read_text().splitlines()
    ]
    assert len(asked) == 6 and not set(asked) & {row["prompt"] for row in make_rows("sudoku", 5, 0, max_blanks=9)}
    rows = {(row["run"], row["decoder"]): row["figures"] for row in record["frontier"]}
    assert rows.keys() == {(name, decoder) for name in settings["runs"] for decoder in settings["decoders"]}
    assert all(figures["quality"]["items"] == 5 for figures in rows.values())
    for name in settings["runs"]:
        passes = [rows[name, decoder]["forwards"]["value"] for decoder in settings["decoders"]]
        assert passes[0] > passes[2] >= passes[1] == 1 and rows[name, "all"]["edits"]["value"] == 0
        assert (folder / f"{name}-1" / "run.json").exists() == (name != "start")
    objectives = {
        name: json.loads((folder / f"{name}-1" / "run.json").read_text())["objective"] for name in ("plain", "mixed")
    }
    assert objectives["plain"]["corruption"] == "masking" and objectives["mixed"]["corruption"] == "editing"
    assert {line["run"] for line in record["gains"]} == set(settings["runs"])
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.json")}
    assert editing(EditingArguments(**settings), **OPTIONS)["sudoku"] == record  # nothing is left to do
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("*/*.json")}
    study = Editing(
        EditingArguments(**settings | {"decoders": ["all", "steps2"], "runs": ["plain"]}), options_of(OPTIONS)
    )
    assert study.plan() == [("plain", 1)]
    old = study.scores("plain", 1)["decoders"]
    study.do("plain", 1)
    new = study.scores("plain", 1)["decoders"]
    assert study.plan() == [] and {name: new[name] for name in old} == old and new.keys() - old == {"steps2"}


@pytest.mark.parametrize("part", ["text", "infill"])
def test_a_tiny_study_of_text(part, tmp_path, starts):
    text = "The cat sat on the mat. The dog sat on the log, the bird sang in the log."
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for _ in range(4)))
    files = {name: [str(tmp_path / "texts.jsonl")] for name in ("data", "eval_data")}
    settings = {**TEXT, **starts, **files, "part": part, "output": str(tmp_path / "run"), "steps": 1, "eval_rows": 3}
    settings |= {"belief_rows": 2, "max_new_tokens": 4, "prompt_tokens": 10, "runs": ["plain"]}
    settings["decoders"] = {
        "text": ["reference", "one", "steps2@1", "all"],
        "infill": ["reference", "right", "single", "single+expand"],
    }[part]
    study = Editing(EditingArguments(**settings), [*"--per_device_train_batch_size 2 --max_length 16".split()])
    study.prepare()
    study.do("plain", 1)
    assert study.plan() == []
    record = study.report()[part]
    figures = {row["decoder"]: row["figures"] for row in record["frontier"]}
    assert list(figures) == [name for name in settings["decoders"] if name != "single+expand"]  # no token for it
    if part == "text":
        assert all(0 < each["distinct"]["value"] <= 1 and each["quality"]["value"] < 0 for each in figures.values())
        assert all(
            each["forwards"]["value"] <= most for each, most in zip(figures.values(), (0, 4, 2, 1), strict=True)
        )
    else:
        assert figures["reference"]["quality"]["value"] == 1
        assert figures["single"]["quality"]["value"] == 0  # a gap of one mask has no two tokens
        assert figures["single"]["forwards"]["value"] == 1 and figures["right"]["forwards"]["value"] == 3  # 2, 3, 4
        assert all(each["log_probability"]["value"] < 0 for each in figures.values())


def test_the_right_answers_count(starts, monkeypatch):
    """Which problems are solved is known where the answers are put in."""
    from nanollada.scripts.decoding.checkpoint import load_checkpoint
    from nanollada.scripts.studies.editing import measures

    model, tokenizer = load_checkpoint(starts["diffusion"])
    args = EditingArguments(**SUDOKU, eval_rows=4, belief_rows=1)
    rows = make_rows("sudoku", 4, 0, "test")

    def said(model, prompts, pad_token_id, seed, **settings):
        answers = [row["answer"] if i % 2 else row["answer"][::-1] for i, row in enumerate(rows)]
        ids = [tokenizer(answer).input_ids + [tokenizer.eos_token_id, 7] for answer in answers]
        return [prompt + each for prompt, each in zip(prompts, ids, strict=True)], [settings["steps"]] * 4, [2] * 4

    monkeypatch.setattr(measures, "write", said)
    scores = measures.measure(starts["diffusion"], ["all"], "sudoku", args, 1)["decoders"]["all"]
    right = [int(solves("sudoku", row, row["answer"][::-1])) for row in rows[::2]]
    assert scores == {"quality": [right[0], 1, right[1], 1], "forwards": [1] * 4, "edits": [2] * 4}
    assert 0 in right


def test_the_command_line(tmp_path):
    with pytest.raises(ValueError, match="`ar` must be given in part text"):
        main(["--part", "text", "--diffusion", "x", "--output", str(tmp_path)])
