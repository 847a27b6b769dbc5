"""A whole run of TRL's trainers: files, records, refusals, and a resumption that is like no break."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tuning_cases import DPO, GRPO, checkpoint, tune

from nanollada.modeling_nanollada import NanoLLaDAForCausalLM
from nanollada.modeling_nanollada.loading_nanollada import load_model, load_tokenizer
from nanollada.trainers.console.callbacks import read_metrics
from nanollada.trainers.records import file_digest, read_json
from nanollada.trainers.resuming.checkpoints import fault_of


@pytest.fixture(scope="module")
def policy(tmp_path_factory, tokenizer):
    return checkpoint(tmp_path_factory.mktemp("policy"), tokenizer)


def test_a_run_leaves_its_files(policy, tmp_path, capsys):
    facts = tune(DPO, policy, tmp_path / "run", max_steps=3, save_steps=2, eval_strategy="steps", eval_steps=3)
    folder = tmp_path / "run"
    assert read_json(folder / "run.json") == json.loads(json.dumps(facts))
    assert facts["sha256"] == {name: file_digest(folder / name) for name in ("config.json", "model.safetensors")}
    assert facts["model_class"] == "NanoLLaDAForCausalLM" and facts["init"] == str(policy) and facts["steps"] == 3
    assert facts["objective"] == {"name": "a test's", "beta": 0.1} and facts["adapter"] is None
    assert facts["metrics"]["eval_loss"] > 0 and "eval_rewards/accuracies" in facts["metrics"]
    assert facts["evaluation"] is None and facts["tokens_seen"] > 0 and facts["data"]["format"] == "preference"
    assert facts["training"]["rows_per_step"] == 8 and facts["training"]["epochs"] == 3
    assert not (folder / "README.md").exists() and not (folder / "checkpoint-2" / "README.md").exists()
    assert fault_of(folder / "checkpoint-2") is None
    lines = read_metrics(folder)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert lines[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    model = load_model(NanoLLaDAForCausalLM, folder)
    before = load_model(NanoLLaDAForCausalLM, policy)
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)
    assert model.generation_config.to_dict() == before.generation_config.to_dict()
    assert load_tokenizer(folder).get_vocab() == load_tokenizer(policy).get_vocab()
    shown = capsys.readouterr().out
    assert "8 to train on, 4 held out: prompts with a better and a worse answer" in shown
    assert "held out  loss" in shown.replace("  ", "  ") and "step 3/3" in shown


@pytest.mark.parametrize("entry", [DPO, GRPO], ids=lambda entry: entry.name)
@pytest.mark.parametrize("between", [2, 3])
def test_a_resumed_run_is_like_an_unbroken_one(entry, between, policy, tmp_path):
    """Bit for bit, also where a checkpoint lies between two logs and between two uses of the same rollouts."""
    settings = {"save_steps": between, "logging_steps": 2, "max_steps": 5}
    settings |= {"num_iterations": 2} if entry is GRPO else {"per_device_train_batch_size": 2}
    whole = tune(entry, policy, tmp_path / "whole", **settings)
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{between}", tmp_path / "part" / f"checkpoint-{between}")
    torch.manual_seed(77)
    part = tune(entry, policy, tmp_path / "part", resume_from_checkpoint="last", **settings)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "part"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert whole["sha256"] == part["sha256"] and whole["tokens_seen"] == part["tokens_seen"]
    timed = ("time", "runtime", "per_second")
    records = [
        [{k: v for k, v in line.items() if not any(word in k for word in timed)} for line in read_metrics(folder)]
        for folder in (tmp_path / "whole", tmp_path / "part")
    ]
    assert records[0] == records[1]
