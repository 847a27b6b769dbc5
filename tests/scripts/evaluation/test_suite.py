"""The whole suite on tiny checkpoints: what it writes, that it goes on, that it repeats itself, what it refuses."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml

from nanollada.modeling_nanollada import NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM
from nanollada.scripts.evaluation import checkpoint as evaluate
from nanollada.scripts.evaluation import runner as suite
from nanollada.scripts.evaluation.checkpoint import main
from nanollada.scripts.evaluation.kinds import KINDS
from nanollada.scripts.evaluation.runner import SuiteArguments, plan
from nanollada.scripts.evaluation.suite_file import read_suite
from nanollada.trainers.models import config_for

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
CLASSES = {"ar": NanoLLaDAForCausalLM, "diffusion": NanoLLaDAForMaskedLM}
DATA = {
    "text.jsonl": [{"text": "The cat sat on the mat."}, {"text": "你好,世界。"}, {"text": "A dog sang."}],
    "choice.jsonl": [{"ctx": "The cat", "choices": ["sat", "on"], "label": i % 2, "n": i} for i in range(2)],
    "pairs.jsonl": [{"good": "The cat", "bad": "cat The", "group": "g"}, {"good": "a b", "bad": "b a", "group": "h"}],
    "qa.jsonl": [{"context": "c", "question": f"q{i}", "answers": ["7"]} for i in range(3)],
}
TASKS = [
    {"name": "text", "kind": "text", "data": "text.jsonl", "max_length": 24},
    {"name": "choice", "kind": "choice", "language": "en", "data": "choice.jsonl"},
    {"name": "cloze", "kind": "cloze", "language": "en", "data": "text.jsonl", "match": "The|dog"},
    {"name": "pairs", "kind": "pairs", "data": "pairs.jsonl"},
    {"name": "sums", "kind": "generation", "puzzle": "arithmetic", "rows": 3},
    {"name": "qa", "kind": "generation", "language": "zh", "data": "qa.jsonl", "verify": "qa"},
    {"name": "cfg", "kind": "presets", "puzzle": "arithmetic", "rows": 2},
    {"name": "free", "kind": "statistics", "rows": 3, "max_new_tokens": 5},
]


FEW = [task for task in TASKS if task["name"] in ("text", "choice", "sums", "free")]


@pytest.fixture(scope="module")
def checkpoints(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    for name, model_class in CLASSES.items():
        torch.manual_seed(0)
        model_class(config_for(tokenizer, initializer_range=0.4, **SHAPE)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def folder(checkpoints, tmp_path):
    """Checkpoints `ar` and `diffusion`, the data in `data`, and the suite."""
    for name in CLASSES:
        shutil.copytree(checkpoints / name, tmp_path / name)
    (tmp_path / "data").mkdir()
    for name, rows in DATA.items():
        (tmp_path / "data" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"description": "Ours", "tasks": TASKS}))
    return tmp_path


def words(folder, output="out", *more, checkpoints=("ar", "diffusion")):
    folders = [str(folder / name) for name in checkpoints]
    start = ["--suite", str(folder / "suite.yaml"), "--suite_data", str(folder / "data"), "--checkpoints", *folders]
    return [*start, "--output", str(folder / output), "--samples", "4", *more]


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_everything_is_written(folder):
    found = evaluate.main(words(folder, "out", "--judge", str(folder / "ar")))
    assert found == json.loads((folder / "out" / "suite.json").read_text())
    ar, diffusion = found["models"]
    assert (ar["name"], ar["kind"], diffusion["kind"]) == ("ar", "ar", "diffusion")
    assert ar["parameters"] == sum(p.numel() for p in NanoLLaDAForCausalLM.from_pretrained(folder / "ar").parameters())
    assert len({model["weights_sha256"] for model in found["models"]}) == 1  # the seed is one, and so are the weights
    told = {(result["model"], result["task"]) for result in found["results"]}
    assert told == {(m, t["name"]) for m in CLASSES for t in TASKS} - {("ar", "cfg")}
    for result in found["results"]:
        assert {"metric", "value", "standard_error", "bound", "rows", "data", "data_sha256", "unit", "chance"} <= set(
            result
        )
        assert {"settings", "command", "seed", "kind", "language"} <= set(result) and result["seed"] == 0
        bounded = result["metric"] in ("bits_per_byte", "nats_per_token", "nats_per_answer")
        assert result["bound"] == (bounded and result["model"] == "diffusion")
        assert result["settings"].get("samples") == (
            4 if KINDS[result["kind"]].scored and result["model"] == "diffusion" else None
        )
    assert {"protocol", "command", "seed", "hardware", "versions", "models", "results"} == set(found)
    assert set(found["protocol"]["definitions"]) >= {r["metric"].partition("/")[0] for r in found["results"]}
    assert (folder / "out" / "suite.png").read_bytes()[:4] == b"\x89PNG"
    for name in CLASSES:
        for task in TASKS:
            records = (folder / "out" / name / f"{task['name']}.jsonl").read_text().splitlines()
            assert bool(records) != (name == "ar" and task["name"] == "cfg")


def test_each_checkpoint_gets_its_own_results(folder):
    path = folder / "diffusion" / "evaluation.json"
    own = evaluate.evaluate_checkpoint(str(folder / "diffusion"), str(folder / "data" / "text.jsonl"), samples=2)
    evaluate.save_evaluation(own, path)
    found = main(words(folder))
    again = json.loads(path.read_text())["results"]
    assert again[:2] == own["results"]
    told = [{k: v for k, v in r.items() if k != "model"} for r in found["results"] if r["model"] == "diffusion"]
    assert again[2:] == [result for result in told if "group" not in result]
    main(words(folder))
    assert json.loads(path.read_text())["results"] == again  # in the place of the earlier ones
    main(words(folder, "out", "--limit", "1", "--tasks", "qa"))
    more = json.loads(path.read_text())["results"]
    assert len(more) == len(again) + 2 and [r["rows"] for r in more if r.get("task") == "qa"][-1] == 1


def test_the_same_run_gives_the_same_bytes(folder, monkeypatch):
    monkeypatch.setattr("sys.argv", ["evaluate.py"])
    main(words(folder, "one")), main(words(folder, "two"))
    one, two = files(folder / "one"), files(folder / "two")
    assert one == two and len(one) == 3 + 2 * 2 * len(TASKS)


def test_batches_change_rounding_alone(folder, monkeypatch):
    monkeypatch.setattr("nanollada.scripts.evaluation.report.draw", lambda *_: None)
    runs = [main(words(folder, f"out{size}", "--batch_size", str(size)))["results"] for size in (1, 16)]
    for one, other in zip(*runs, strict=True):
        for name in ("value", "standard_error", "mask_error", "open_share"):
            assert (one.get(name) or 0) == pytest.approx(other.get(name) or 0, rel=1e-5, abs=1e-9)


# ---- going on


@pytest.fixture
def measured(folder, monkeypatch):
    """Names of what was really measured, as it happens, of a smaller suite without its plot."""
    (folder / "suite.yaml").write_text(yaml.safe_dump({"description": "Ours", "tasks": FEW}))
    monkeypatch.setattr("nanollada.scripts.evaluation.report.draw", lambda *_: None)
    seen, real = [], suite.Runner.measure

    def measure(self, model, item, *rest):
        seen.append((model, item.task.name))
        return real(self, model, item, *rest)

    monkeypatch.setattr(suite.Runner, "measure", measure)
    return seen


def test_a_killed_run_goes_on(folder, measured, monkeypatch):
    main(words(folder, "whole"))
    expected = files(folder / "whole")
    measured.clear()
    entry = KINDS["choice"]

    def killed(bench, task, rows):
        if bench.is_diffusion:
            raise KeyboardInterrupt
        return entry.run(bench, task, rows)

    monkeypatch.setitem(KINDS, "choice", replace(entry, run=killed))
    with pytest.raises(KeyboardInterrupt):
        main(words(folder))
    monkeypatch.setitem(KINDS, "choice", entry)
    before = len(measured)
    main(words(folder))
    assert measured[before:] == [("diffusion", task["name"]) for task in FEW[1:]]
    assert files(folder / "out") == expected
    measured.clear()
    monkeypatch.setattr(suite.Runner, "load", lambda *_: pytest.fail("nothing is left to do"))
    main(words(folder))
    assert not measured and files(folder / "out") == expected


def test_whatever_changed_is_measured_again(folder, measured, tokenizer):
    main(words(folder))

    def again(*more):
        measured.clear()
        main(words(folder, "out", *more))
        return measured

    assert again() == []
    assert again("--samples", "6") == [(m, t["name"]) for m in CLASSES for t in FEW if KINDS[t["kind"]].scored]
    assert len(again("--samples", "6", "--seed", "1")) == 2 * len(FEW)
    assert {task for _, task in again("--samples", "6", "--seed", "1", "--judge", str(folder / "ar"))} == {"free"}
    again()
    rows = [DATA["choice.jsonl"][0], {"ctx": "A", "choices": ["x", "y"], "label": 0}]
    (folder / "data" / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert again() == [("ar", "choice"), ("diffusion", "choice")]
    other = [{**task, "max_length": 16} if task["name"] == "text" else task for task in FEW]
    (folder / "suite.yaml").write_text(yaml.safe_dump({"tasks": other}))
    assert again() == [("ar", "text"), ("diffusion", "text")]
    torch.manual_seed(9)
    NanoLLaDAForMaskedLM(config_for(tokenizer, **SHAPE)).save_pretrained(folder / "diffusion")
    assert again() == [("diffusion", task["name"]) for task in FEW]
    config = json.loads((folder / "ar" / "config.json").read_text())
    (folder / "ar" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1000}))
    assert again() == [("ar", task["name"]) for task in FEW]


def test_speed_belongs_to_a_machine(folder, measured, monkeypatch):
    speed = {"name": "speed", "kind": "speed", "max_new_tokens": 2, "repeats": 1, "chat": False}
    (folder / "suite.yaml").write_text(yaml.safe_dump({"tasks": [FEW[0], speed]}))

    def again():
        measured.clear()
        main(words(folder, checkpoints=["ar"]))
        return [task for _, task in measured]

    assert again() == ["text", "speed"] and again() == []
    kept = json.loads((folder / "ar" / "evaluation.json").read_text())["results"]
    told = {result["task"]: result["settings"] for result in kept}
    assert told["speed"]["hardware"].startswith("CPU, ") and told["speed"]["device"] == "cpu"
    assert set(told["speed"]["versions"]) == {"torch", "transformers"} and "hardware" not in told["text"]
    monkeypatch.setattr("nanollada.trainers.records.hardware", lambda: "1 × a faster one")
    assert again() == ["speed"] and again() == []
    versions = {"torch": "9", "transformers": "9", "datasets": "9"}
    monkeypatch.setattr("nanollada.trainers.records.versions", lambda: versions)
    assert again() == ["speed"]
    versions["datasets"] = "10"
    assert again() == []
    args = SuiteArguments(str(folder / "suite.yaml"), [str(folder / "ar")], str(folder / "data"), device="meta")
    item = plan(args)[1][1]
    elsewhere = suite.Runner(args, []).identity(item, "w", "f")
    assert elsewhere["device"] == "meta" and elsewhere["hardware"] == "1 × a faster one"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"results": [1]}', b"\xff"])
def test_a_broken_evaluation_stops_before_any_model_is_loaded(folder, measured, content):
    path = folder / "diffusion" / "evaluation.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(
        ValueError, match="`checkpoints` must hold no evaluation.json, or one .* got .*diffusion/evalua"
    ):
        main(words(folder))
    assert not measured


def test_the_results_of_the_run_are_written_first(folder, measured, monkeypatch):
    monkeypatch.setattr(suite, "save_evaluation", lambda *_: (_ for _ in ()).throw(OSError("read-only")))
    with pytest.raises(OSError, match="read-only"):
        main(words(folder))
    assert {model for model, _ in measured} == set(CLASSES)
    assert len(json.loads((folder / "out" / "suite.json").read_text())["models"]) == 2


def test_errors_of_a_model_name_the_task(folder):
    frozen = {"approximate_cache": "dual", "use_cache": False}
    blocks = {"name": "odd", "kind": "statistics", "rows": 1, "max_new_tokens": 5, "decoding": frozen}
    (folder / "suite.yaml").write_text(yaml.safe_dump({"tasks": [blocks]}))
    with pytest.raises(ValueError, match="task odd of diffusion: `approximate_cache` needs `use_cache`, got"):
        main(words(folder, checkpoints=["diffusion"]))


@pytest.mark.parametrize("damage", ["no records", "half records", "half result", "another protocol"])
def test_partial_files_are_not_believed(folder, measured, damage, monkeypatch):
    main(words(folder, checkpoints=["diffusion"]))
    path, records = (folder / "out" / "diffusion" / f"choice.{suffix}" for suffix in ("json", "jsonl"))
    if damage == "no records":
        records.unlink()
    elif damage == "half records":
        records.write_bytes(records.read_bytes()[:-9])
    elif damage == "half result":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        monkeypatch.setattr(suite, "PROTOCOL", suite.PROTOCOL + 1)
    measured.clear()
    main(words(folder, checkpoints=["diffusion"]))
    assert [task for _, task in measured] == ([t["name"] for t in FEW] if damage == "another protocol" else ["choice"])


# ---- arguments


def test_tasks_and_limits(folder):
    args = SuiteArguments(
        str(folder / "suite.yaml"), [str(folder / "ar")], str(folder / "data"), limit=2, tasks=["qa", "sums"]
    )
    _, planned = plan(args)
    assert [(item.task.name, len(item.rows), item.source) for item in planned] == [
        ("sums", 2, "puzzle: arithmetic"), ("qa", 2, "qa.jsonl"),
    ]  # fmt: skip
    assert planned[0].task.settings()["limit"] == 2
    with pytest.raises(ValueError, match="`tasks` must be among text, .*, got 'none'"):
        plan(SuiteArguments(str(folder / "suite.yaml"), [str(folder / "ar")], str(folder / "data"), tasks=["none"]))


def test_broken_rows_stop_before_any_model_is_loaded(folder, monkeypatch):
    monkeypatch.setattr(suite.Runner, "load", lambda *_: pytest.fail("a model was loaded"))
    with open(folder / "data" / "qa.jsonl", "a") as stream:
        stream.write('{"question": "q", "answers": []}\n')
    with pytest.raises(ValueError, match="qa.jsonl, row 4: "):
        main(words(folder))


def test_arguments_are_checked(folder):
    def arguments(**changes):
        given = {"suite": "dev", "checkpoints": [str(folder / "ar"), str(folder / "diffusion")], **changes}
        return SuiteArguments(**given)

    assert arguments().names == ["ar", "diffusion"] and arguments(names=["a", "b"]).names == ["a", "b"]
    shutil.copytree(folder / "ar", folder / "more" / "ar")
    for changes, message in (
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"limit": 0}, "`limit` must be at least 1, got 0"),
        ({"samples": 3}, "`samples` must be a positive even number, got 3"),
        ({"checkpoints": ["x/y"]}, "`checkpoints` must be folders with a config.json, got x/y"),
        ({"judge": "x/y"}, "`judge` must be folders with a config.json, got x/y"),
        ({"names": ["a"]}, "`names` must hold a name per checkpoint, got 1 for 2"),
        ({"names": ["a", "../b"]}, "`names` must be names of folders, got '../b'"),
        (
            {"checkpoints": [str(folder / "ar"), str(folder / "more" / "ar")]},
            "`names` must be given .*, got 'ar' twice",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            arguments(**changes)
    with pytest.raises(ValueError, match="`judge` must be a causal model, got NanoLLaDAForMaskedLM in"):
        suite.load_judge(str(folder / "diffusion"), False, None)


def test_the_help_has_both(capsys):
    for argv in (["--help"], ["--suite", "x.yaml", "--help"]):
        with pytest.raises(SystemExit) as stop:
            evaluate.main(argv)
        assert stop.value.code == 0
        shown = capsys.readouterr().out
        assert "--suite_data" in shown and "--check_errors" in shown
        assert ("--rolling_context" in shown) == (argv == ["--help"])


def test_errors_are_checked(folder, capsys):
    (folder / "data" / "text.jsonl").write_text(json.dumps({"text": "The dog sat on the log. " * 9}) + "\n")
    found = main(words(folder, "out", "--samples", "8", "--check_errors", "5"))
    assert list(found["models"]) == ["diffusion"] and found["models"]["diffusion"]["pairs"] == 5
    assert json.loads((folder / "out" / "errors.json").read_text()) == found
    shown = capsys.readouterr().out
    assert "ar: autoregressive, its scores are exact" in shown and "diffusion: of 5 bounds with 8 masks" in shown
    with pytest.raises(
        ValueError, match="`suite` must hold answers of at most 12 tokens for `check_errors`, got none"
    ):
        main(words(folder, "out", "--check_errors", "5", "--tasks", "free"))


# ---- the suites that come with it

SUITES = sorted((suite.Path(suite.__file__).parents[1] / "suites").glob("*.yaml"))


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.name)
def test_suites_that_come_with_it(path):
    description, tasks = read_suite(path)
    assert description and {task.kind for task in tasks} <= set(KINDS)
    head = path.read_text().splitlines()[0]
    assert head.startswith(f"# python scripts/evaluate.py --suite scripts/suites/{path.name} ")


def test_there_are_suites():
    assert {path.name for path in SUITES} >= {"dev.yaml", "nano_llada.yaml", "quickstart.yaml"}
    kinds = {task.kind for path in SUITES for task in read_suite(path)[1]}
    assert kinds == set(KINDS)
    assert {task.language for path in SUITES for task in read_suite(path)[1]} >= {"en", "zh"}
