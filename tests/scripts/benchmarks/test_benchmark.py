"""The benchmark: rows, the plain loop against the trainers, FLOPs, and the report, in tiny shapes."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nanollada.modeling_nanollada import NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM
from nanollada.scripts import benchmark as program
from nanollada.scripts.benchmarks import machine as benchmark
from nanollada.scripts.benchmarks import training as benchmark_train
from nanollada.scripts.benchmarks import training_run as benchmark_measure
from nanollada.scripts.benchmarks.training import (
    TrainBenchmarkArguments,
    block_over_mdlm,
    count_parameters,
    flops_per_token,
    make_rows,
    summary,
)
from nanollada.scripts.benchmarks.training_run import CONFIGURATIONS, GAINS, SIZES, Window, full_width, measure
from nanollada.trainers.models import config_for

LENGTH, BATCH, STEPS, WARMUP, BLOCK = 32, 4, 2, 1, 8
ROWS = (STEPS + WARMUP) * BATCH
TEXTS = [f"Text {i} is {'short' if i % 3 else 'long, ' * 9}. " for i in range(200)]
RUN = {"size": "tiny", "max_length": LENGTH, "block_length": BLOCK}
RUN |= {"batch_size": BATCH, "steps": STEPS, "warmup_steps": WARMUP}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of texts."""
    path = tmp_path_factory.mktemp("benchmark") / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


@pytest.fixture(scope="module")
def folder(data, tokenizer, tmp_path_factory):
    """What `measure` reads."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer.save_pretrained(folder)
    torch.save(make_rows(arguments(data), tokenizer), folder / "rows.pt")
    return folder


def arguments(data, **changed):
    return TrainBenchmarkArguments(data=[data], **{**RUN, "repeats": 1, **changed})


# ---- rows


def test_rows_are_the_same_documents_packed_and_alone(data, tokenizer):
    rows = make_rows(arguments(data), tokenizer)
    assert len(rows["packed"]) == len(rows["unpacked"]) == ROWS
    assert all(len(row["input_ids"]) == LENGTH for row in rows["packed"])
    assert any(len(set(row["document_ids"])) > 1 for row in rows["packed"])
    lengths = set()
    for index, (row, text) in enumerate(zip(rows["unpacked"], TEXTS, strict=False)):
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id][: LENGTH - 1]
        assert row["input_ids"] == [tokenizer.pad_token_id, *ids]
        assert row["labels"] == [-100, *ids] and row["index"] == index
        lengths.add(len(row["input_ids"]))
    assert len(lengths) > 1 and max(lengths) == LENGTH  # some are padded, some were cut


def test_rows_that_are_too_few_or_of_another_kind(data, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="`data` must fill 1600 rows of 32 tokens, got 200 documents"):
        make_rows(arguments(data, steps=399), tokenizer)
    path = tmp_path / "sft.jsonl"
    path.write_text(json.dumps({"prompt": "1+1=", "completion": "2"}) + "\n")
    with pytest.raises(ValueError, match="`data` must hold plain texts, got a row for SFT: .*sft.jsonl, row 1"):
        make_rows(arguments(str(path)), tokenizer)


def test_batches_of_the_plain_loop_are_max_length_wide(data, tokenizer):
    rows = [{**row, "rank": 0, "epoch": 0} for row in make_rows(arguments(data), tokenizer)["unpacked"]]
    short = sorted(rows, key=lambda row: len(row["input_ids"]))[:3]
    batch = full_width(LENGTH, tokenizer.pad_token_id)(short)
    assert batch["input_ids"].shape == batch["labels"].shape == (3, LENGTH) and batch["index"].shape == (3,)
    assert batch["attention_mask"].sum(1).tolist() == [len(row["input_ids"]) for row in short]
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert "document_ids" not in batch


# ---- runs


@pytest.mark.parametrize("objective", benchmark_train.OBJECTIVES)
def test_the_plain_loop_and_the_trainer_have_the_same_losses_on_the_same_rows(folder, objective, monkeypatch):
    monkeypatch.setattr(benchmark_measure, "LEARNING_RATE", 0.02)  # the later steps' losses show the earlier updates
    monkeypatch.setattr(benchmark_measure, "WEIGHT_DECAY", 0.0)  # which the trainer spares the norms
    plain, trainer, head = (measure(folder, objective, name, **RUN) for name in ("plain", "trainer", "head"))
    for facts in (trainer, head):
        assert facts["loss"] == pytest.approx(plain["loss"], rel=1e-5)
        assert all(facts[name] == plain[name] for name in ("tokens", "slots", "supervised"))
    assert plain["slots"] == STEPS * BATCH * LENGTH > plain["tokens"] > plain["supervised"] > 0
    if objective == "ar":
        assert plain["supervised"] == plain["tokens"] - STEPS * BATCH  # all but the context tokens


def test_the_block_objective_is_another_one_than_mdlm(folder):
    losses = [measure(folder, "block", "head", **{**RUN, "block_length": length})["loss"] for length in (8, 9)]
    assert abs(losses[0] - losses[1]) > 1e-3


def test_each_gain_does_what_it_says(folder, monkeypatch):
    built = []
    original = benchmark_measure.plain_loop, NanoLLaDAForMaskedLM.forward

    def forward(self, *args, **kwargs):
        built.append({"chunked": kwargs.get("loss_weights") is not None, "bf16": torch.is_autocast_enabled("cpu")})
        return original[1](self, *args, **kwargs)

    monkeypatch.setattr(NanoLLaDAForMaskedLM, "forward", forward)
    found = {name: (measure(folder, "mdlm", name, **RUN), built.pop()) for name in ("trainer", "head", "dtype")}
    assert [call["chunked"] for _, call in found.values()] == [False, True, False]
    assert [call["bf16"] for _, call in found.values()] == [False, False, True]
    assert found["dtype"][0]["loss"] == pytest.approx(found["trainer"][0]["loss"], rel=1e-2)
    packed, called = measure(folder, "mdlm", "packing", **RUN), built.pop()
    assert packed["tokens"] == packed["slots"] == STEPS * BATCH * LENGTH and not called["chunked"]


def test_settings_of_the_trainer_follow_the_gains(folder):
    def settings(gains):
        rows = torch.load(folder / "rows.pt")["packed"]
        options = {"output_dir": str(folder), "max_steps": 1, "seed": 0}
        trainer = benchmark_measure.build_trainer(folder, "mdlm", gains, rows, SIZES["tiny"], LENGTH, BLOCK, options)
        return trainer.args.bf16, trainer.args.torch_compile, trainer.args.optim == "adamw_torch_fused"

    assert settings([]) == (False, False, False)
    assert settings(["dtype"]) == (True, False, False)
    assert settings(["compile"]) == (False, True, False)
    assert settings(["fused"]) == (False, False, True)


def test_configurations():
    assert CONFIGURATIONS["plain"] is None and CONFIGURATIONS["trainer"] == []
    assert all(CONFIGURATIONS[gain] == [gain] for gain in GAINS)
    assert set(CONFIGURATIONS["all"]) - set(CONFIGURATIONS["all but packing"]) == {"packing"}


def test_the_window_leaves_the_warm_up_out(monkeypatch):
    clock = iter([0.0, 5.0, 6.0, 8.0, 11.0])  # start, and the end of each step
    monkeypatch.setattr(benchmark_measure.time, "perf_counter", lambda: next(clock))
    window = Window("cpu", warmup_steps=2, steps=2)
    for step in range(4):
        mask = torch.tensor([[1, 1, 0]]) if step % 2 else None
        window.count({"input_ids": torch.zeros(1, 3), "attention_mask": mask}, torch.tensor(step))
        window.tick()
    facts = window.facts()
    assert facts == {"tokens": 5, "slots": 6, "supervised": 5, "seconds": 5.0, "first_step_seconds": 5.0}


def test_profile(folder):
    facts = measure(folder, "ar", "head", **RUN, profile=True)
    assert "aten::mm" in facts["profile"]


# ---- processes, memory, the matrix product


def test_a_fresh_process_has_its_own_memory():
    ballast = torch.ones(250_000_000)  # 1 GB, which `ru_maxrss` of a child would count
    peak = benchmark.in_fresh_process(benchmark.peak_memory, device="cpu")
    assert 50e6 < peak < ballast.nbytes <= benchmark.peak_memory("cpu")


def test_a_failure_in_a_process_is_told():
    with pytest.raises(RuntimeError, match=r"(?s)machine:spread failed for .*empty"):
        benchmark.in_fresh_process(benchmark.spread, values=[])


def test_spread_and_matmul_rates():
    assert benchmark.spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0}
    rates = benchmark.matmul_rates("cpu", size=64, seconds=0.01)
    assert set(rates) == {"fp32", "bf16"} and all(1e6 < rate < 1e15 for rate in rates.values())


# ---- FLOPs


@pytest.mark.parametrize("objective", benchmark_train.OBJECTIVES)
def test_flops_are_those_that_torch_counts(objective, tokenizer):
    config = config_for(tokenizer, **SIZES["tiny"], num_key_value_heads=1)
    model = (NanoLLaDAForCausalLM if objective == "ar" else NanoLLaDAForMaskedLM)(config)
    ids = torch.randint(4, 300, (3, LENGTH))
    inputs = {"clean_input_ids": ids, "block_length": BLOCK} if objective == "block" else {}
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # attention as products that count
        model(ids, labels=ids, **inputs).loss.backward()
    expected = counter.get_total_flops() / ids.numel()
    assert flops_per_token(config, objective, LENGTH, 1.0) == pytest.approx(expected, rel=1e-12)
    saved = flops_per_token(config, objective, LENGTH, 1.0) - flops_per_token(config, objective, LENGTH, 0.25)
    assert saved == pytest.approx(6 * 0.75 * config.hidden_size * config.vocab_size)


def test_parameters(tokenizer):
    config = config_for(tokenizer, **SIZES["tiny"])
    assert count_parameters(config) == NanoLLaDAForCausalLM(config).num_parameters()


# ---- the figures


def fake_run(objective, configuration, tokens, seconds, repeat=0):
    facts = {"tokens": tokens, "slots": 2 * tokens, "supervised": tokens // 2, "seconds": seconds, "steps": 4}
    facts |= {"loss": 5.0, "first_step_seconds": 9.0, "peak_bytes": 7, "base_bytes": 3}
    return {"objective": objective, "configuration": configuration, "repeat": repeat, **facts}


def test_figures_of_a_configuration(tokenizer):
    config = config_for(tokenizer, **SIZES["tiny"])
    runs = [fake_run("mdlm", "plain", 100, seconds, i) for i, seconds in enumerate((1.0, 2.0, 1.0))]
    runs += [fake_run("mdlm", "dtype", 100, seconds, i) for i, seconds in enumerate((0.5, 0.5, 0.25))]
    matmul = {"fp32": benchmark.spread([1e9]), "bf16": benchmark.spread([4e9])}
    found = summary(runs, "mdlm", "dtype", config, LENGTH, matmul)
    assert found["tokens_per_second"] == {"median": 200, "low": 200, "high": 400}
    assert found["ratio"] == {"median": 4, "low": 2, "high": 4}  # inside each repeat
    flops = flops_per_token(config, "mdlm", LENGTH, 0.5)
    assert found["matmul_share"]["median"] == pytest.approx(200 * flops / 4e9)
    assert found["padding"] == found["supervised"] == 0.5 and found["seconds_per_step"] == 0.125
    plain = summary(runs, "mdlm", "plain", config, LENGTH, matmul)
    assert plain["ratio"]["median"] == 1 and plain["matmul_share"]["median"] == pytest.approx(100 * flops / 1e9)
    assert summary(runs[3:], "mdlm", "dtype", config, LENGTH, matmul)["ratio"] is None


def test_block_is_compared_with_mdlm_in_the_fastest_configuration(tokenizer):
    config, matmul = config_for(tokenizer, **SIZES["tiny"]), {"fp32": benchmark.spread([1e9])}
    matmul["bf16"] = matmul["fp32"]
    runs = [fake_run("mdlm", "plain", 100, 1.0), fake_run("mdlm", "all", 100, 0.5)]
    runs += [fake_run("block", "plain", 100, 1.0), fake_run("block", "all", 100, 1.25)]
    results = [summary(runs, run["objective"], run["configuration"], config, LENGTH, matmul) for run in runs]
    found = block_over_mdlm(results)
    assert found["configuration"] == "all" and found["measured"] == pytest.approx(0.4)
    mdlm, block = (flops_per_token(config, name, LENGTH, 0.5) for name in ("mdlm", "block"))
    assert found["flop_ceiling"] == pytest.approx(mdlm / block) and 0.25 < found["flop_ceiling"] < 1
    assert block_over_mdlm(results[:2]) is None


def test_the_command(data, tokenizer, tmp_path, monkeypatch, capsys):
    def here(function, **options):
        if function is benchmark.matmul_rates:
            return {"fp32": 1e9, "bf16": 2e9}
        return json.loads(json.dumps(function(**options)))

    monkeypatch.setattr(benchmark_train, "run", here)
    copy.deepcopy(tokenizer).save_pretrained(tmp_path / "tokenizer")
    options = {**RUN, "data": data, "repeats": 2, "tokenizer_name_or_path": tmp_path / "tokenizer"}
    options |= {"output": tmp_path / "found.json"}
    argv = ["train", *(str(part) for name, value in options.items() for part in (f"--{name}", value))]
    argv += ["--objectives", "mdlm", "block", "--configurations", "plain", "all but compile", "--profile"]
    found = program.main(argv)
    printed = capsys.readouterr().out
    assert "block over mdlm" in printed and "aten::mm" in printed and "× plain" in printed
    saved = json.loads((tmp_path / "found.json").read_text())
    assert saved["results"] == json.loads(json.dumps(found["results"])) and len(saved["runs"]) == 8
    assert saved["arguments"]["max_length"] == LENGTH and saved["hardware"] and saved["command"]
    for result in saved["results"]:
        mine = [run for run in saved["runs"] if all(run[key] == result[key] for key in ("objective", "configuration"))]
        assert len(mine) == 2 and mine[0]["loss"] == mine[1]["loss"] == result["loss"]
        speeds = sorted(run["tokens"] / run["seconds"] for run in mine)
        assert [result["tokens_per_second"][name] for name in ("low", "high")] == pytest.approx(speeds)


def test_commands():
    with pytest.raises(ValueError, match="the first word must be one of train.*, got tain: did you mean `train`"):
        program.main(["tain"])
    with pytest.raises(ValueError, match="got none"):
        program.main([])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": []}, "`data` must name at least one source, got none"),
        ({"objectives": ["arr"]}, r"`objectives` must be among ar, mdlm, block, got \['arr'\]"),
        ({"configurations": []}, "`configurations` must be among plain, .* got none"),
        ({"size": "33m"}, "`size` must be one of 32m, 4m, tiny, got '33m'"),
        ({"steps": 0}, "`steps` must be >= 1, got 0"),
        ({"block_length": LENGTH}, r"`block_length` must be below `max_length` .*, got 32 and 32"),
    ],
)
def test_errors(data, changed, message):
    with pytest.raises(ValueError, match=message):
        TrainBenchmarkArguments(**{"data": [data], **RUN, **changed})


@pytest.mark.slow
def test_every_configuration_in_its_own_process(data, tmp_path):
    root = Path(__file__).parents[3]
    output = tmp_path / "found.json"
    command = [sys.executable, root / "scripts" / "benchmark.py", "train", "--data", data, "--output", output]
    command += [str(part) for name, value in {**RUN, "repeats": 1}.items() for part in (f"--{name}", value)]
    subprocess.run([*map(str, command), "--objectives", "block"], check=True, cwd=tmp_path)
    results = {result["configuration"]: result for result in json.loads(output.read_text())["results"]}
    assert set(results) == set(CONFIGURATIONS)
    assert results["compile"]["loss"] == pytest.approx(results["plain"]["loss"], rel=2e-5)
    assert results["all"]["loss"] == pytest.approx(results["all but compile"]["loss"], rel=1e-2)
    assert all(result["peak_bytes"] > result["base_bytes"] > 0 for result in results.values())
