"""The study of post-training: its arms and commands, tiny ones in this process, and what is judged."""

import json

import pytest
import torch

from nanollada.modeling_nanollada import NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM
from nanollada.scripts.studies import cells, judged
from nanollada.scripts.studies.cells import options_by_name
from nanollada.scripts.studies.post_training import (
    ARMS,
    PARTS,
    PostTraining,
    PostTrainingArguments,
    main,
    post_training,
)
from nanollada.trainers.data.feedback.preferences import PreferenceArguments, prepare_preferences
from nanollada.trainers.models import config_for
from nanollada.trainers.preferences.judging import score_pairs
from nanollada.trainers.preferences.pairs import padding_for
from nanollada.trainers.puzzles.registry import make_rows, write_rows

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
PAIRS = {"part": "preferences", "diffusion": "a", "ar": "b", "data": ["c"], "eval_data": ["d"]}
PROBLEMS = {"part": "problems", "diffusion": "a"}


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


@pytest.fixture
def pairs(tmp_path):
    def file(name, numbers):
        rows = [
            {"prompt": f"Is {i} odd?", "chosen": "yes" if i % 2 else "no", "rejected": "no" if i % 2 else "yes it is"}
            for i in numbers
        ]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [str(tmp_path / name)]

    return {"data": file("train.jsonl", range(8)), "eval_data": file("dev.jsonl", range(10, 15))}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**PAIRS, "runs": ["replay"]}, "`runs` must be among vrpo, .* in part preferences, got 'replay'"),
        ({**PROBLEMS, "runs": ["vrpo"]}, "`runs` must be among start, .* in part problems, got 'vrpo'"),
        ({**PAIRS, "ar": None}, "`ar` must be given for these runs, got None"),
        ({**PAIRS, "eval_data": None}, "`eval_data` must be given"),
        ({"part": "problems"}, "`diffusion` must be given"),
        ({**PROBLEMS, "steps": 0}, "`steps` must be at least 1, got 0"),
        ({**PROBLEMS, "score_steps": -1}, "`score_steps` must be >= 0, got -1"),
        ({**PROBLEMS, "rollouts": 1}, "`rollouts` must be at least 2, which are compared, got 1"),
        ({**PROBLEMS, "seeds": []}, "`seeds` must be given"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PostTrainingArguments(**settings)


def test_options_have_names_and_values():
    assert options_by_name("--reward_funcs puzzle share --beta 0.1".split()) == {
        "reward_funcs": ["puzzle", "share"],
        "beta": "0.1",
    }
    for words in (["--bf16"], ["puzzle", "--beta", "1"]):
        with pytest.raises(ValueError, match="options for the trainers must be `--name value`, got"):
            options_by_name(words)
    assert options_by_name([]) == {}


def test_arms_of_a_part_differ_in_what_they_compare_and_in_nothing_else(tmp_path):
    study = PostTraining(PostTrainingArguments(**PAIRS, output=str(tmp_path / "p"), steps=6), ["--beta", "0.3"])
    chosen = {
        name: options_by_name(study.overrides(name, 2)) for name, arm in ARMS.items() if arm.part == "preferences"
    }
    common = {"seed": "2", "max_steps": "6", "data": "c", "beta": "0.3", "model_name_or_path": "a"}
    assert common.items() <= chosen["vrpo"].items() and common.items() <= chosen["naive"].items()
    differing = {name for name in chosen["vrpo"] if chosen["vrpo"][name] != chosen["naive"].get(name)}
    assert differing == {"output_dir", "estimator"} and chosen["naive"]["num_masks"] == "8"
    assert (chosen["naive_one"]["max_steps"], chosen["naive_one"]["num_masks"]) == ("48", "1")  # as many passes
    assert chosen["ar_dpo"].keys() == chosen["vrpo"].keys() - {"estimator", "num_masks"}
    assert chosen["ar_dpo"]["model_name_or_path"] == "b"
    for scored in (8, 0):
        args = PostTrainingArguments(**PROBLEMS, output=str(tmp_path / f"r{scored}"), score_steps=scored)
        study = PostTraining(args, ["--reward_funcs", "puzzle", "share"])
        replay, elbo, free = (options_by_name(study.overrides(name, 1)) for name in ("replay", "elbo", "mean_field"))
        assert replay.get("score_steps") == elbo.get("score_steps") == (str(scored) if scored else None)
        assert {name for name in replay if replay[name] != elbo.get(name)} == {"output_dir", "estimator"}
        assert replay["reward_funcs"] == ["puzzle", "share"] and replay["per_device_train_batch_size"] == "64"
        assert "score_steps" not in free
        words = study.arguments()  # of a run's own process: they make the same study
        again = options_by_name(words)
        assert again["score_steps"] == str(scored) and again["part"] == "problems" and "seeds" not in again


def test_a_folder_serves_one_study_of_one_part(tmp_path):
    PostTraining(PostTrainingArguments(**PROBLEMS, output=str(tmp_path)))
    with pytest.raises(ValueError, match="`output` holds a study with another `part`"):
        PostTraining(PostTrainingArguments(**PAIRS, output=str(tmp_path)))
    PostTraining(PostTrainingArguments(**PROBLEMS, ar="b", output=str(tmp_path), seeds=[3]))  # more runs


def test_a_run_has_its_share_of_the_cores_or_the_threads_that_it_is_told(tmp_path, monkeypatch):
    study = PostTraining(PostTrainingArguments(**PROBLEMS, output=str(tmp_path), jobs=2))
    monkeypatch.setattr(cells.subprocess, "Popen", lambda command, env, **kwargs: (command, env))
    monkeypatch.setattr(cells.os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    command, environment = study.start("replay", 3)
    assert command[-2:] == ["--only", "replay-3"] and environment["OMP_NUM_THREADS"] == "4"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert study.start("replay", 3)[1]["OMP_NUM_THREADS"] == "1"


def test_answers_of_a_block_model_are_judged_up_to_their_blocks_end(tmp_path, tokenizer, pairs):
    """As DPO trains them; the row without that end has another score."""
    torch.manual_seed(0)
    model = NanoLLaDAForMaskedLM(config_for(tokenizer, initializer_range=0.3, block_length=16, **SHAPE))
    model.save_pretrained(tmp_path / "blocks")
    tokenizer.save_pretrained(tmp_path / "blocks")
    sources = pairs["eval_data"]
    rows = prepare_preferences(PreferenceArguments(eval_data=sources), tokenizer, None).eval
    padding = padding_for("block", model.config, model.generation_config, tokenizer.eos_token_id, None)
    own = [
        score for pair in judged.preferences(str(tmp_path / "blocks"), sources, 4, None)["pairs"] for score, _ in pair
    ]
    ended, bare = (score_pairs(model, rows, padding=end, samples=4).scores.flatten() for end in (padding, None))
    assert own == pytest.approx(ended.tolist()) and own != pytest.approx(bare.tolist())


def test_a_tiny_study_of_preferences(tmp_path, tokenizer, starts, pairs, capsys):
    settings = {**PAIRS, **starts, **pairs, "output": str(tmp_path / "run"), "steps": 2, "samples": 4}
    options = {"per_device_train_batch_size": 2, "learning_rate": "1e-2", "logging_steps": 1}
    for name in PARTS["preferences"]:
        post_training(PostTrainingArguments(**settings, only=f"{name}-1"), **options)
    folder = tmp_path / "run"
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.json")}
    record = post_training(PostTrainingArguments(**settings), **options)["preferences"]  # nothing is left to do
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("*/*.json")}
    assert record == json.loads((folder / "preferences.json").read_text())
    assert (folder / "preferences.md").read_text() in capsys.readouterr().out
    assert [row["run"] for row in record["rows"]] == ["vrpo", "naive", "ar_dpo"]
    assert [(line["run"], line["minus"]) for line in record["contrasts"]] == [("vrpo", "naive"), ("vrpo", "ar_dpo")]
    rows = prepare_preferences(PreferenceArguments(eval_data=pairs["eval_data"]), tokenizer, None).eval
    for row in record["rows"]:  # the file has what the judge says of these checkpoints
        kind = ARMS[row["run"]].start
        model_class = {"ar": NanoLLaDAForCausalLM, "diffusion": NanoLLaDAForMaskedLM}[kind]
        trained, start = (model_class.from_pretrained(path) for path in (folder / f"{row['run']}-1", starts[kind]))
        scores = score_pairs(trained, rows, reference=start, samples=4)
        assert row["figures"]["implicit"]["value"] == pytest.approx(scores.accuracy)
        assert row["figures"]["margin"]["value"] == pytest.approx(scores.margins.mean().item(), abs=1e-4) != 0
        assert row["logged"]["1"]["loss"] > 0
    assert {run["steps"] for run in record["runs"]} == {2}
    commands = [run["command"] for run in record["runs"]]
    assert all(command.startswith("accelerate launch trainers/dpo.py") for command in commands)


def test_a_tiny_study_of_problems(tmp_path, starts, capsys):
    settings = {**PROBLEMS, "diffusion": starts["diffusion"], "output": str(tmp_path / "run"), "puzzle": "arithmetic"}
    settings |= {"puzzle_options": '{"digits": 1}', "training_problems": 6, "eval_problems": 4, "max_new_tokens": 3}
    settings |= {"steps": 2, "prompts": 2, "rollouts": 2, "score_steps": 2}
    seen = write_rows("arithmetic", 3, tmp_path / "seen.jsonl", 1, digits=1)
    study = PostTraining(PostTrainingArguments(**settings, unlike=[str(seen)]), ["--learning_rate", "1e-2"])
    study.prepare()
    asked = [json.loads(line)["prompt"][0]["content"] for line in study.problems.read_text().splitlines()]
    known = {json.loads(line)["messages"][0]["content"] for line in seen.read_text().splitlines()}
    tests = {row["prompt"] for row in make_rows("arithmetic", 4, 0, "test", digits=1)}
    assert len(set(asked)) == 6 and not set(asked) & (known | tests)
    for name in PARTS["problems"]:
        study.do(name, 1)
    assert study.plan() == []
    record = study.report()["problems"]
    assert [row["run"] for row in record["rows"]] == ["start", "replay", "elbo"]
    for row in record["rows"]:
        assert row["figures"].keys() == {"greedy", "threshold", "sampled"}
        assert all(figure["items"] == 4 for figure in row["figures"].values())
        assert (tmp_path / "run" / f"{row['run']}-1" / "run.json").exists() == (row["run"] != "start")
    assert "GRPO, replay − GRPO, ELBO" in capsys.readouterr().out
    objectives = [json.loads(path.read_text())["objective"] for path in sorted(tmp_path.glob("run/*-1/run.json"))]
    assert [(one["estimator"], one["score_steps"]) for one in objectives] == [("elbo", 2), ("replay", 2)]


def test_the_right_answers_count(starts, monkeypatch):
    """Which problems are solved is known where the answers are put in."""
    from nanollada.scripts.decoding.checkpoint import load_checkpoint
    from nanollada.scripts.evaluation import answers

    rows = make_rows("arithmetic", 5, 0, "test", digits=1)
    _, tokenizer = load_checkpoint(starts["ar"])

    def said(model, prompts, pad_token_id, seed, settings):
        return [tokenizer(next(sayings)).input_ids + [tokenizer.eos_token_id, 7] for _ in prompts]

    monkeypatch.setattr(answers, "new_tokens", said)
    monkeypatch.setattr(answers, "batches_of_prompts", lambda model, prompts, size, settings: [range(len(prompts))])
    for kind, names in (("ar", ["greedy", "sampled"]), ("diffusion", ["greedy", "threshold", "sampled"])):
        sayings = iter([row["answer"] if i % 2 else "no" for _ in names for i, row in enumerate(rows)])
        solved = judged.problems(starts[kind], "arithmetic", 5, {"digits": 1}, 4, 1)["solved"]
        assert solved == dict.fromkeys(names, [0, 1, 0, 1, 0])


@pytest.mark.parametrize("places", [1, 4])
def test_gradients_of_one_token_agree_and_of_several_do_not(places, starts, tmp_path, monkeypatch):
    """With one place ELBO and replay are the same likelihood."""
    from nanollada.trainers.puzzles import registry

    path = write_rows("arithmetic", 3, tmp_path / "prompts.jsonl", 1, "prompts", digits=1)
    monkeypatch.setattr(registry, "solves", lambda puzzle, row, text: len(text.encode()) % 2)
    agreed = judged.agreement(starts["diffusion"], str(path), 6, places, seed=1)
    assert 0 < agreed["reward"] < 1
    if places == 1:
        assert agreed["cosine"] == pytest.approx(1, abs=1e-5) and agreed["norm_ratio"] == pytest.approx(1, abs=1e-5)
    else:
        assert -1 < agreed["cosine"] < 0.999
    monkeypatch.setattr(registry, "solves", lambda puzzle, row, text: False)
    nothing = judged.agreement(starts["diffusion"], str(path), 2, places, seed=1)
    assert nothing == {"cosine": None, "norm_ratio": None, "reward": 0.0}


def test_the_command_line(tmp_path):
    with pytest.raises(ValueError, match="`diffusion` must be given"):
        main(["--part", "problems", "--output", str(tmp_path)])
