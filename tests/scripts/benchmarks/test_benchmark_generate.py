"""The decoding benchmark: plain decoders against `generate`, FLOPs against a counter, slopes, and a whole tiny run."""

import json
import math

import pytest
import torch
from generation_models import EOS, MASK, PAD, build, left_padded
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer

from nanollada.modeling_nanollada import NanoLLaDAConfig, NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM
from nanollada.scripts.benchmarks import decoding as benchmark_generate
from nanollada.scripts.benchmarks.decoding import GenerateBenchmarkArguments, flops, slopes, summary
from nanollada.scripts.benchmarks.decoding_run import (
    DECODERS,
    decoder_of,
    decoder_settings,
    generate_settings,
    measure,
    plain_llada,
    prompts,
    questions,
)
from nanollada.trainers.models import config_for

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
RUN = {"size": "tiny", "model_block_length": 4, "data": None, "prompt_length": 8, "new_tokens": 8, "batch_size": 2}
RUN |= {"block_length": None, "calls": 2, "threads": None, "seed": 0}


@pytest.mark.parametrize("block_length", [None, 4])
@pytest.mark.parametrize("per_step", [1, 2, 4])
def test_plain_llada_is_what_generate_does(block_length, per_step):
    """One prompt length, one block grid: the plain loop's tokens are those of `generate` with as many steps."""
    for seed in range(4):
        model = build(seed, initializer_range=0.3, num_hidden_layers=2)
        ids, mask = left_padded([[5, 6, 7, 8], [9, 10, 11], [12, 13]])
        plain = plain_llada(model, ids, mask, 12, block_length, per_step)
        settings = generate_settings({"tokens_per_step": per_step}, model.config, 12, block_length)
        found = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=12,
            eos_token_id=EOS,
            pad_token_id=PAD,
            eos_policy="forbid",
            **settings,
        )
        assert (plain[:, 4:] != MASK).all() and (plain[:, 4:] != EOS).all()
        assert torch.equal(plain, found), seed


@pytest.mark.parametrize("decoder", [*DECODERS, '{"threshold": 0.3, "steps": 2}'])
def test_every_decoder_decodes_all(decoder):
    block_length = 0 if decoder.startswith(("prefix", "dual")) else 4
    found = measure(decoder, None, **RUN | {"model_block_length": block_length})
    assert len(found["seconds"]) == 2 and min(found["seconds"]) > 0
    assert found["tokens"] == 16 and found["prompt_tokens"] == 8 and found["peak_bytes"] > 0
    assert 1 <= found["tokens_per_forward"] <= 8
    expected = {"llada/2": 2, "2 a step": 2, "4 a step": 4, "llada": 1, "ar": 1, "quota": 1, "8 a step": 4}
    assert found["tokens_per_forward"] == expected.get(decoder, found["tokens_per_forward"])


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("decoder", ["llada", "llada/2", "quota, no cache", "quota", "4 a step", "ar"])
def test_flops_are_those_of_the_passes(decoder):
    """Within what the formula leaves out: half-filled contexts, and the head where only open positions need it."""
    config = NanoLLaDAConfig(**SHAPE, vocab_size=64, block_length=8, tie_word_embeddings=False, eos_token_id=None)
    causal = decoder == "ar"
    torch.manual_seed(0)
    network = (NanoLLaDAForCausalLM if causal else NanoLLaDAForMaskedLM)(config).eval()
    network.set_attn_implementation("eager")  # whose products the counter knows
    ids = torch.randint(4, 60, (2, 32))
    decode = decoder_of(decoder, network, 32, None)
    facts = measure_facts(network, decode(ids, torch.ones_like(ids))[1], ids)
    need = flops(facts, decoder, 32, 2)
    assert counted(lambda: decode(ids, torch.ones_like(ids))) == pytest.approx(need, rel=0.25)


def measure_facts(network, per_forward, ids):
    config = network.config
    parameters = sum(value.numel() for name, value in network.named_parameters() if "embed_tokens" not in name)
    width = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    facts = {"parameters": parameters, "attention_width": width, "block_length": config.block_length}
    return facts | {"tokens_per_forward": per_forward, "prompt_tokens": ids.shape[1]}


def test_slopes():
    results = [
        {"decoder": "quota", "prompt_length": 0, "batch_size": 1, "new_tokens": n, "flops": n**2}
        | {"seconds": {"median": n**1.2}}
        for n in (256, 1024, 4096)
    ]
    (found,) = slopes([*results, {**results[0], "decoder": "ar"}])
    assert (
        found["decoder"] == "quota" and found["seconds"] == pytest.approx(1.2) and found["flops"] == pytest.approx(2)
    )


def test_summary_takes_ratios_inside_a_round():
    cell = {"prompt_length": 0, "new_tokens": 8, "batch_size": 1}
    facts = {"tokens": 8, "tokens_per_forward": 2.0, "peak_bytes": 1, "prompt_tokens": 4, "parameters": 10}
    facts |= {"attention_width": 4, "block_length": 4}
    runs = [
        {**cell, **facts, "decoder": name, "repeat": repeat, "seconds": [seconds, seconds * 2]}
        for repeat, both in enumerate([(4.0, 1.0), (9.0, 3.0), (10.0, 2.0)])
        for name, seconds in zip(("llada", "quota"), both, strict=True)
    ]
    found = summary(runs, **cell, decoder="quota")
    assert found["times_llada"] == {"median": 4.0, "low": 3.0, "high": 5.0} and found["times_ar"] is None
    assert found["seconds"] == {"median": 2.0, "low": 1.0, "high": 3.0}
    assert found["tokens_per_second"] == {"median": 4.0, "low": 8 / 3, "high": 8.0}


# ---- a checkpoint


@pytest.fixture(scope="module")
def checkpoints(tokenizer, tmp_path_factory):
    """A diffusion and an AR model of random weights, and rows with answers."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, network in (("diffusion", NanoLLaDAForMaskedLM), ("ar", NanoLLaDAForCausalLM)):
        network(config_for(tokenizer, **SHAPE)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [{"prompt": f"What is {i}? ", "completion": f"It is {i}."} for i in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_prompts(checkpoints):
    tokenizer, data = AutoTokenizer.from_pretrained(checkpoints / "ar"), str(checkpoints / "rows.jsonl")
    asked = questions(tokenizer, data)
    ids, mask = prompts(tokenizer, data, 8, 0, 300, 0)
    for row, visible, (question, _) in zip(ids, mask, [*asked, *asked[:2]], strict=True):
        assert row[visible.bool()].tolist() == question
    ids, mask = prompts(tokenizer, data, 3, 50, 300, 0)
    stream = [token for question, answer in asked for token in question + answer] * 10
    assert ids.flatten().tolist() == stream[:150] and mask.all()


def test_a_whole_run(checkpoints, monkeypatch, capsys):
    def here(function, **arguments):
        return json.loads(json.dumps(function(**arguments)))

    monkeypatch.setattr(benchmark_generate, "run", here)
    output = checkpoints / "result.json"
    line = f"--model {checkpoints}/diffusion --ar_model {checkpoints}/ar --score_data {checkpoints}/rows.jsonl"
    line += f" --new_tokens 4 8 --repeats 2 --calls 1 --score_rows 4 --output {output} --decoders llada ar quota"
    line = f"--score_new_tokens 8 {line}"
    found = benchmark_generate.main([*line.split(), "threshold 0.5"])
    assert len(found["results"]) == 8 and len(found["runs"]) == 16 and len(found["slopes"]) == 4
    assert {item["rows"] for item in found["scores"].values()} == {4}
    assert {item["new_tokens"] for item in found["scores"].values()} == {8}
    assert all(item["times_llada"]["median"] > 0 and item["flops"] > 0 for item in found["results"])
    saved = json.loads(output.read_text())
    assert saved["results"] == found["results"] and saved["arguments"]["new_tokens"] == [4, 8]
    assert output.with_suffix(".png").stat().st_size > 5000
    printed = capsys.readouterr().out
    assert "quota, batch 1: seconds ~ tokens^" in printed and "results:" in printed
    assert benchmark_generate.score_title(found["scores"]) == "score (8 new)"
    assert math.isfinite(found["slopes"][0]["seconds"])


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"decoders": ["fast"]}, "`decoders` must be among llada, .* or settings as JSON, got 'fast'"),
        ({"decoders": ["[1]"]}, r"`decoders` must be among .* got '\[1\]'"),
        ({"new_tokens": []}, r"`new_tokens` must hold numbers >= 1, got \[\]"),
        ({"batch_sizes": [0]}, r"`batch_sizes` must hold numbers >= 1, got \[0\]"),
        ({"prompt_lengths": [-1]}, r"`prompt_lengths` must hold numbers >= 0, got \[-1\]"),
        ({"repeats": 0}, "`repeats` must be >= 1, got 0"),
        ({"size": "7b"}, "`size` must be one of .* got '7b'"),
        ({"model": "x"}, "`ar_model` must be set for the decoder 'ar' beside a `model`, got None"),
    ],
)
def test_bad_arguments(changed, match):
    with pytest.raises(ValueError, match=match):
        GenerateBenchmarkArguments(**changed)


def test_settings_as_json():
    assert decoder_settings('{"threshold": 0.8}') == {"threshold": 0.8}
    config = NanoLLaDAConfig(block_length=32)
    assert generate_settings({"tokens_per_step": 4}, config, 128, None) == {"steps": 8}
    assert generate_settings({"tokens_per_step": 4}, config, 128, 16) == {"block_length": 16, "steps": 4}
    assert generate_settings({"steps": 3}, NanoLLaDAConfig(), 128, None) == {"steps": 3}
