"""The length benchmark: right answers are counted under each limit, and so are the passes and seconds they took."""

import json

import pytest
import torch

from nanollada.modeling_nanollada import NanoLLaDAForMaskedLM
from nanollada.scripts.benchmarks import lengths
from nanollada.scripts.benchmarks.lengths import LengthBenchmarkArguments, benchmark, settings_of
from nanollada.scripts.decoding.checkpoint import load_checkpoint, prompt_ids
from nanollada.scripts.decoding.writing import generate
from nanollada.trainers.models import config_for
from nanollada.trainers.records import read_json

ONE_A_STEP, AT_ONCE = {"eos_policy": "forbid"}, {"eos_policy": "forbid", "threshold": 0.0}


@pytest.fixture
def checkpoint(tokenizer, tmp_path):
    """A random model, and rows whose answers are what it writes in six tokens: it is right by that limit alone."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    network = NanoLLaDAForMaskedLM(config_for(tokenizer, initializer_range=0.4, **shape))
    network.generation_config.max_new_tokens = 3
    network.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model, tokenizer = load_checkpoint(str(tmp_path / "model"))
    rows = []
    for word in ("cat", "dog", "bird"):
        asked = [{"role": "user", "content": word}]
        written = generate(model, tokenizer, prompt_ids(tokenizer, asked), max_new_tokens=6, **ONE_A_STEP)
        rows.append({"messages": [*asked, {"role": "assistant", "content": written.text}]})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_answers_passes_and_seconds(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(lengths, "run", lambda function, **arguments: function(**arguments))
    results = benchmark(
        LengthBenchmarkArguments(
            models=[str(checkpoint / "model")],
            score_data=str(checkpoint / "rows.jsonl"),
            new_tokens=[0, 6, 9],
            settings=[json.dumps(ONE_A_STEP), json.dumps(AT_ONCE)],
            rows=3,
            output=str(checkpoint / "out.json"),
        )
    )
    assert [result["value"] for result in results[:3]] == [0, 1, 0]
    assert [result["forwards"] for result in results] == [3, 6, 9, 1, 1, 1]  # 0 new tokens: the checkpoint's three
    assert all(result["rows"] == 3 and 0 < result["seconds"]["low"] for result in results)
    assert read_json(checkpoint / "out.json")["results"] == results
    shown = capsys.readouterr().out
    assert "own" in shown and "100.0 %" in shown


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"settings": ["fast"]}, "`settings` must be 'defaults' or a JSON object, got 'fast'"),
        ({"settings": ["[1]"]}, r"`settings` must be 'defaults' or a JSON object, got '\[1\]'"),
        ({"new_tokens": []}, r"`new_tokens` must hold numbers >= 0, got \[\]"),
        ({"new_tokens": [-1]}, r"`new_tokens` must hold numbers >= 0, got \[-1\]"),
        ({"rows": 0}, "`rows` must be at least 1, got 0"),
    ],
)
def test_bad_arguments(changed, match):
    with pytest.raises(ValueError, match=match):
        LengthBenchmarkArguments(models=["x"], score_data="y", **changed)


def test_the_checkpoints_own_settings():
    assert settings_of("defaults") == {} and settings_of('{"threshold": 0.9}') == {"threshold": 0.9}
