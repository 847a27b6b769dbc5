"""What `benchmark.py` does is one import and one call, as in a notebook: with the options' names."""

import json

import pytest

from nanollada.scripts.benchmarks import decoding, training
from nanollada.scripts.benchmarks.decoding import GenerateBenchmarkArguments
from nanollada.scripts.benchmarks.machine import matmul_rates
from nanollada.scripts.benchmarks.training import TrainBenchmarkArguments
from nanollada.trainers.records import read_json


@pytest.fixture
def here(monkeypatch):
    """Measures in this process, and no product at all."""

    def run(function, **arguments):
        return {"fp32": 1e9, "bf16": 2e9} if function is matmul_rates else function(**arguments)

    monkeypatch.setattr(training, "run", run)
    monkeypatch.setattr(decoding, "run", run)


def test_generate(here, tmp_path, capsys):
    shape = {"size": "tiny", "model_block_length": 4, "new_tokens": [4], "repeats": 1, "calls": 1}
    output = str(tmp_path / "out.json")
    record = decoding.benchmark(GenerateBenchmarkArguments(decoders=["quota"], output=output, **shape))
    assert [result["decoder"] for result in record["results"]] == ["quota"] and "generate" in capsys.readouterr().out
    assert read_json(output)["results"] == record["results"]


def test_train(here, tokenizer, tmp_path, capsys):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"Text {i}. " * 9}) + "\n" for i in range(99)))
    shape = {
        "size": "tiny",
        "max_length": 32,
        "block_length": 8,
        "batch_size": 2,
        "steps": 1,
        "warmup_steps": 1,
        "repeats": 1,
    }
    args = TrainBenchmarkArguments(
        data=[str(tmp_path / "rows.jsonl")],
        tokenizer_name_or_path=str(tmp_path / "tokenizer"),
        objectives=["mdlm"],
        configurations=["plain"],
        output=str(tmp_path / "out.json"),
        **shape,
    )
    record = training.benchmark(args)
    assert (
        record["results"][0]["ratio"]["median"] == pytest.approx(1)
        and "large matrix product" in capsys.readouterr().out
    )
    assert read_json(tmp_path / "out.json")["results"] == record["results"]
