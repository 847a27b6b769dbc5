"""A diffusion model's DPO and GRPO, stopped and resumed, are like the unbroken run: noise, rollouts, logs, weights."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tuning_cases import checkpoint, tune

from nanollada.trainers import dpo, grpo
from nanollada.trainers.console.callbacks import read_metrics

TIMED = ("time", "runtime", "per_second")
WORDS = "the cat sat on a mat and the dog ran to see it".split()
COMMON = {"held_out_fraction": 0.0, "seed": 3}
# What each run resumes with at risk: a step's masks, an adapter, the rollouts that two optimizer steps share.
RUNS = {
    "dpo": (dpo, {"num_masks": 2, "per_device_train_batch_size": 2, "max_length": 48}),
    "dpo_adapter": (
        dpo,
        {"num_masks": 2, "per_device_train_batch_size": 2, "max_length": 48, "use_peft": True, "lora_r": 2},
    ),
    "grpo_replay": (grpo, {"num_iterations": 2, "reward_funcs": "format:.*e.*", "score_steps": 2}),
    "grpo_elbo": (grpo, {"estimator": "elbo", "score_steps": 2, "reward_funcs": "format:.*e.*", "loss_type": "grpo"}),
}


@pytest.fixture(scope="module")
def policy(tmp_path_factory, tokenizer):
    return checkpoint(tmp_path_factory.mktemp("policy"), tokenizer, diffusion=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Ten pairs, and ten prompts."""
    folder, say = tmp_path_factory.mktemp("rows"), lambda role, text: {"role": role, "content": text}
    pairs, prompts = [], []
    for number in range(10):
        prompt = [say("user", f"{WORDS[number]} {number}")]
        answers = (WORDS[number + 1], WORDS[number + 2] + " " + WORDS[number])
        chosen, rejected = ([say("assistant", answer)] for answer in answers)
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        prompts.append({"prompt": prompt})
    for name, rows in {"dpo": pairs, "grpo": prompts}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def untimed(folder):
    return [{k: v for k, v in line.items() if not any(word in k for word in TIMED)} for line in read_metrics(folder)]


@pytest.mark.parametrize("name", RUNS)
def test_resumed_like_unbroken(name, policy, files, tmp_path):
    module, own = RUNS[name]
    settings = {**COMMON, "data": files / f"{module.TRAINER.name}.jsonl", "max_steps": 5, "save_steps": 3, **own}
    settings |= {"logging_steps": 2}  # the checkpoint lies between two logs
    whole = tune(module.TRAINER, policy, tmp_path / "whole", **settings)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "part" / "checkpoint-3")
    torch.manual_seed(77)
    part = tune(module.TRAINER, policy, tmp_path / "part", resume_from_checkpoint="last", **settings)
    weights = "adapter_model.safetensors" if "use_peft" in own else "model.safetensors"
    one, two = (load_file(tmp_path / run / weights) for run in ("whole", "part"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert whole["sha256"] == part["sha256"] and whole["tokens_seen"] == part["tokens_seen"]
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "part")
    trained = load_file(tmp_path / "whole" / weights)
    early = load_file(tmp_path / "whole" / "checkpoint-3" / weights)
    assert any(not torch.equal(trained[key], early[key]) for key in trained)  # something was learnt behind it
