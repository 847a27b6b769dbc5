"""Adapters scored: what a suite, evaluation.json, a comparison and lm-eval say of a folder is what they say of the
merged model."""

import json

import pytest
import torch
import yaml
from lm_eval_models import CLASSES, TEXTS, load, requests, save_checkpoints
from peft import LoraConfig

from nanollada.scripts.decoding.checkpoint import load_pair
from nanollada.scripts.evaluation import runner
from nanollada.scripts.evaluation.checkpoint import evaluate_checkpoint, main
from nanollada.trainers.weights import adapters

ROWS = [{"text": "The cat sat on the mat."}, {"text": "A dog sang."}]
TASKS = [
    {"name": "text", "kind": "text", "data": "text.jsonl", "max_length": 24},
    {"name": "sums", "kind": "generation", "puzzle": "arithmetic", "rows": 3},
    {"name": "free", "kind": "statistics", "rows": 3, "max_new_tokens": 5},
]


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """Checkpoints of each kind, an adapter of each (`ar-lora`, …) and the merged model (`ar-merged`, …)."""
    root = save_checkpoints(tokenizer, tmp_path_factory.mktemp("adapters"))
    for name, model_class in CLASSES.items():
        settings = LoraConfig(r=2, init_lora_weights=False)
        model = adapters.adapted(model_class.from_pretrained(root / name), settings, 1)
        model.save_pretrained(root / f"{name}-lora")
        tokenizer.save_pretrained(root / f"{name}-lora")
        adapters.merge_adapter(root / f"{name}-lora", root / f"{name}-merged")
    (root / "data").mkdir()
    (root / "data" / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (root / "suite.yaml").write_text(yaml.safe_dump({"description": "Ours", "tasks": TASKS}))
    return root


def suite(folder, output, *names, more=()):
    options = ["--suite", folder / "suite.yaml", "--suite_data", folder / "data", "--output", output, "--samples", 4]
    return main([str(word) for word in (*options, "--checkpoints", *(folder / name for name in names), *more)])


def scores(found, name):
    return {
        (result["task"], result["metric"]): (result["value"], result["standard_error"])
        for result in found["results"]
        if result["model"] == name
    }


@pytest.mark.parametrize("name", CLASSES)
def test_a_suite_of_an_adapter_is_that_of_the_merged_model(name, folder, tmp_path):
    found = suite(folder, tmp_path / "out", name, f"{name}-lora", f"{name}-merged")
    base, lora, merged = (scores(found, model["name"]) for model in found["models"])
    assert lora.keys() == merged.keys() and len(lora) > 5
    for key in lora:
        value, error = merged[key]
        assert lora[key][0] == pytest.approx(value, rel=1e-5, abs=1e-9), key
        assert lora[key][1] == (error and pytest.approx(error, rel=1e-4, abs=1e-9)), key
    assert any(base[key][0] != pytest.approx(lora[key][0], rel=1e-3) for key in lora)
    first, second, _ = found["models"]
    written = json.loads((folder / f"{name}-lora" / "evaluation.json").read_text())
    assert second["base"]["weights_sha256"] == first["weights_sha256"] == written["base"]["weights_sha256"]
    assert second["base"]["architecture"] == CLASSES[name].__name__ and "base" not in first
    assert written["weights_sha256"] == second["weights_sha256"] != first["weights_sha256"]


def test_a_result_is_of_adapter_and_model(folder, tmp_path, monkeypatch):
    """Finished ones are kept; another model under the same adapter is measured again."""
    first = suite(folder, tmp_path / "out", "diffusion-lora", more=["--tasks", "text"])
    calls = []
    measure = runner.Runner.measure
    monkeypatch.setattr(runner.Runner, "measure", lambda *args: calls.append(args) or measure(*args))
    assert suite(folder, tmp_path / "out", "diffusion-lora", more=["--tasks", "text"])["results"] == first["results"]
    assert calls == []
    config = json.loads((folder / "diffusion-lora" / "adapter_config.json").read_text())
    other = tmp_path / "diffusion-lora"
    other.mkdir()
    for path in (folder / "diffusion-lora").glob("*[!n].*"):
        (other / path.name).write_bytes(path.read_bytes())
    config["base_model_name_or_path"] = str(folder / "block")
    (other / "adapter_config.json").write_text(json.dumps(config))
    for name in ("data", "suite.yaml"):
        (tmp_path / name).symlink_to(folder / name)
    again = suite(tmp_path, tmp_path / "out", "diffusion-lora", more=["--tasks", "text"])
    assert len(calls) == 1 and again["results"][0]["value"] != first["results"][0]["value"]


def test_held_out_rows_of_an_adapter(folder):
    """`evaluate.py --data`: digests of both, and the merged model's number."""
    rows = [str(folder / "data" / "text.jsonl")]
    lora, merged = (
        evaluate_checkpoint(str(folder / f"diffusion-{kind}"), rows, max_length=24, samples=4)
        for kind in ("lora", "merged")
    )
    assert lora["base"]["name"] == str(folder / "diffusion") and "base" not in merged
    first, second = (result["results"][0]["value"] for result in (lora, merged))
    assert first == pytest.approx(second, rel=1e-5)


def test_an_adapter_cannot_judge(folder, tmp_path):
    with pytest.raises(ValueError, match="`judge` must be a model, got .*ar-lora, which holds an adapter .merge it"):
        suite(folder, tmp_path / "out", "ar", more=["--judge", folder / "ar-lora"])


@pytest.mark.parametrize("name", CLASSES)
def test_lm_eval_scores_an_adapter_as_the_merged_model(name, folder):
    asked = requests("loglikelihood", ("The cat", " sat"), ("The dog sat ", "on"))
    texts = requests("loglikelihood_rolling", (TEXTS[0],))
    lora, merged = (load(folder, f"{name}-{kind}") for kind in ("lora", "merged"))
    for kind, items in (("loglikelihood", asked), ("loglikelihood_rolling", texts)):
        found, expected = (getattr(lm, kind)(items) for lm in (lora, merged))
        flat = [torch.tensor(values, dtype=torch.float64).flatten() for values in (found, expected)]
        torch.testing.assert_close(*flat, rtol=1e-5, atol=1e-6)


def test_a_pair_of_adapters(folder):
    """compare.py and demo.py load by this: kinds are those of the models underneath."""
    names = [str(folder / f"{name}-lora") for name in ("ar", "diffusion")]
    pair = load_pair(*names)
    assert [type(model.get_base_model()) for model, _ in pair.values()] == [CLASSES["ar"], CLASSES["diffusion"]]
    with pytest.raises(ValueError, match="`ar` must be an autoregressive checkpoint, got"):
        load_pair(names[1], names[1])
