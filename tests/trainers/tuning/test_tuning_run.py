"""A whole run of TRL's trainers: files, records, refusals, and a resumption that is like no break."""

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from trl import DPOTrainer, GRPOTrainer
from tuning_cases import DPO, GRPO, PlainTRL, checkpoint, tune

from nanollada.modeling_nanollada import NanoLLaDAForCausalLM
from nanollada.modeling_nanollada.loading_nanollada import load_adapted, load_model, load_tokenizer
from nanollada.trainers.console.callbacks import read_metrics
from nanollada.trainers.records import file_digest, read_json
from nanollada.trainers.resuming.checkpoints import fault_of
from nanollada.trainers.resuming.stopping import Interrupted
from nanollada.trainers.tuning.trainer import resumable


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


def test_ctrl_c_ends_behind_a_checkpoint_and_a_finished_run_stays(policy, tmp_path, monkeypatch):
    settings = {"max_steps": 3, "per_device_train_batch_size": 2, "save_strategy": "no"}
    whole = tune(DPO, policy, tmp_path / "whole", **settings)
    step = PlainTRL.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(PlainTRL, "training_step", interrupted)
        with pytest.raises(Interrupted, match="interrupted after step 2: .*checkpoint-2 is saved"):
            tune(DPO, policy, tmp_path / "part", **settings)
    assert not (tmp_path / "part" / "run.json").exists() and fault_of(tmp_path / "part" / "checkpoint-2") is None
    part = tune(DPO, policy, tmp_path / "part", resume_from_checkpoint="last", **settings)
    assert part["sha256"] == whole["sha256"]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "part").iterdir()}
    assert tune(DPO, policy, tmp_path / "part", resume_from_checkpoint="last", **settings)["steps"] == 3
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "part").iterdir()} == times


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"seed": 7}, "the run's `seed`"),
        ({"per_device_train_batch_size": 4}, "the run's rows per step"),
        ({"count": 10}, "rows"),
        ({"other": True}, "rows"),
    ],
)
def test_a_run_goes_on_with_its_own_rows(changed, match, policy, tmp_path):
    settings = {"max_steps": 1, "save_steps": 1, "per_device_train_batch_size": 2}
    tune(DPO, policy, tmp_path / "run", **settings)
    with pytest.raises(ValueError, match=match):
        tune(DPO, policy, tmp_path / "run", **{**settings, "max_steps": 2, **changed}, resume_from_checkpoint="last")


def test_an_adapter_is_trained_alone(policy, tmp_path):
    facts = tune(DPO, policy, tmp_path / "run", max_steps=2, use_peft=True, lora_r=4)
    folder = tmp_path / "run"
    assert facts["adapter"]["trained_parameters"] < facts["parameters"] / 2
    assert "adapter_model.safetensors" in facts["sha256"] and not (folder / "model.safetensors").exists()
    assert read_json(folder / "adapter_config.json")["base_model_name_or_path"] == str(policy)
    ids = torch.arange(5, 15)[None]
    base, loaded = load_model(NanoLLaDAForCausalLM, policy), load_adapted(folder)
    assert not torch.equal(loaded(ids).logits, base(ids).logits)
    with loaded.disable_adapter():
        assert torch.equal(loaded(ids).logits, base(ids).logits)


def test_another_reference(policy, tmp_path, tokenizer):
    torch.manual_seed(5)
    other = NanoLLaDAForCausalLM(load_model(NanoLLaDAForCausalLM, policy).config)
    other.save_pretrained(tmp_path / "other")
    load_tokenizer(policy).save_pretrained(tmp_path / "other")
    tune(DPO, policy, tmp_path / "run", max_steps=1, ref_model_name_or_path=tmp_path / "other")
    assert abs(read_metrics(tmp_path / "run")[0]["rewards/chosen"]) > 1e-3  # at the policy's own it is 0
    checkpoint(tmp_path / "masked", tokenizer, diffusion=True)
    with pytest.raises(ValueError, match="`ref_model_name_or_path` must hold a NanoLLaDAForCausalLM of"):
        tune(DPO, policy, tmp_path / "no", ref_model_name_or_path=tmp_path / "masked")
    with pytest.raises(ValueError, match="`ref_model_name_or_path` must be left out: these settings compare with no"):
        tune(GRPO, policy, tmp_path / "no", ref_model_name_or_path=tmp_path / "other")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"push_to_hub": True}, "`push_to_hub` must be False: publishing is hub_upload"),
        ({"hub_model_id": "me/mine"}, "`hub_model_id` must be None: publishing is hub_upload"),
        ({"trust_remote_code": True}, "`trust_remote_code` must be False: the policy is loaded by"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` must be 0.0"),
        ({"ignore_data_skip": True}, "`ignore_data_skip` must be False"),
        ({"hidden_dropout": 0.1}, "`hidden_dropout` must be left out: the same text is scored more than once"),
        ({"use_peft": True, "lora_dropout": 0.1}, "`lora_dropout` must be 0: the same text is scored more than once"),
        ({"hidden_size": 16}, "`hidden_size` is the checkpoint's own"),
        ({"max_length": 99999}, "`max_length` must be at most"),
    ],
)
def test_what_does_nothing_is_refused_by_name(settings, match, policy, tmp_path):
    with pytest.raises(ValueError, match=match):
        tune(DPO, policy, tmp_path / "run", max_steps=1, **settings)
    assert not (tmp_path / "run").exists()


def test_an_option_that_there_is_not_names_the_nearest(policy, tmp_path, capsys):
    with pytest.raises(SystemExit):
        tune(DPO, policy, tmp_path / "run", bta=0.1)
    assert "unknown option `--bta`: did you mean `--beta`" in capsys.readouterr().err


def test_nothing_is_told_to_anybody(policy, tmp_path, monkeypatch):
    sent = []
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda **kwargs: sent.append(kwargs))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    tune(DPO, policy, tmp_path / "run", max_steps=1)
    assert sent == []


def test_trl_computes_what_it_computes_alone():
    """Nothing of a loss, a score or a batch is between a run and TRL."""
    for kind in (DPOTrainer, GRPOTrainer):
        ours = resumable(kind)
        for name in ("compute_loss", "_compute_loss", "_prepare_inputs", "get_train_dataloader", "prediction_step"):
            assert getattr(ours, name) is getattr(kind, name)


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
