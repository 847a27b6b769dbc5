"""Every inherited field of `TrainingArguments` works, is refused by name, or is listed as transformers' own."""

import dataclasses

import pytest
import torch
from training_cases import build_trainer
from transformers import TrainingArguments

from nanollada.trainers import arguments
from nanollada.trainers.arguments import REFUSED, TRANSFORMERS_OWN, WORKING, default_of
from nanollada.trainers.causal import CausalConfig
from nanollada.trainers.diffusion import DiffusionConfig

FIELDS = {field.name: field for field in dataclasses.fields(CausalConfig)}
INHERITED = {field.name for field in dataclasses.fields(TrainingArguments)}
NEWER = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # since transformers 5.23
# Another value than the default of what decides numbers.
EFFECTS = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "lr_scheduler_kwargs": {"num_decay_steps": 1},
    "warmup_steps": 2,
    "optim": "adagrad",
    "weight_decay": 0.9,
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "adam_epsilon": 1e-3,
    "max_grad_norm": 1e-3,
    "neftune_noise_alpha": 5.0,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 1,
    "max_steps": 1,
    "seed": 1,
}


def test_every_inherited_field_is_on_one_list():
    """A new one of a newer transformers fails here: look what it does under our trainers, and list it."""
    lists = [*WORKING, *TRANSFORMERS_OWN, *REFUSED]
    assert len(lists) == len(set(lists))
    assert INHERITED <= set(lists), f"look at {INHERITED - set(lists)}"
    assert set(lists) - INHERITED <= NEWER


@pytest.mark.parametrize("config", [CausalConfig, DiffusionConfig])
def test_refused_fields_are_refused_by_name(config, tmp_path):
    config(output_dir=str(tmp_path), **{name: default_of(FIELDS[name]) for name in REFUSED})
    for name, reason in REFUSED.items():
        default = default_of(FIELDS[name])
        other = not default if isinstance(default, bool) else "other"
        message = rf"`{name}` must be {default!r}: {reason}, got {other!r}"
        with pytest.raises(ValueError, match=message.replace("[", r"\[").replace("(", r"\(")):
            config(output_dir=str(tmp_path), **{name: other})


def test_a_field_that_nobody_has_looked_at_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(arguments, "WORKING", WORKING - {"adam_beta1"})
    CausalConfig(output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="`adam_beta1` is new in this transformers.*got 0.5"):
        CausalConfig(output_dir=str(tmp_path), adam_beta1=0.5)


def trained(folder, **settings):
    settings = {"max_steps": -1, "num_train_epochs": 3, "per_device_train_batch_size": 4, **settings}
    trainer = build_trainer("causal", folder, **settings)
    torch.manual_seed(0)
    trainer.train()
    return trainer.state.global_step, torch.cat([weight.flatten() for weight in trainer.model.parameters()])


def test_working_fields_decide_the_numbers(tmp_path):
    assert EFFECTS.keys() <= WORKING
    steps, usual = trained(tmp_path)
    assert trained(tmp_path)[1].equal(usual) and steps == 6
    for name, value in EFFECTS.items():
        steps, other = trained(tmp_path, **{name: value})
        assert not other.equal(usual), name


def test_the_schedules_own_settings(tmp_path, caplog):
    for name in ("lr_decay_ratio", "min_lr_ratio"):
        CausalConfig(output_dir=str(tmp_path), lr_scheduler_type="linear", **{name: 0.5})
        assert f"`{name}` of 0.5 does nothing under linear: it is for warmup_stable_decay" in caplog.text
    for name, twin in (("lr_decay_ratio", "num_decay_steps"), ("min_lr_ratio", "min_lr_ratio")):
        with pytest.raises(ValueError, match=f"`{name}` must not be given with `lr_scheduler_kwargs` {twin}"):
            CausalConfig(output_dir=str(tmp_path), lr_scheduler_kwargs={twin: 1}, **{name: 0.5})


@pytest.mark.parametrize("schedule", ["warmup_stable_decay", "cosine_with_min_lr"])
def test_min_lr_ratio_is_due_one_step_after_the_last(schedule, tmp_path):
    """As the help says. Of three decay steps the last is at 2/3 of a half cosine."""
    settings = {"lr_scheduler_type": schedule, "warmup_steps": 0, "learning_rate": 1.0, "min_lr_ratio": 0.2}
    trainer = build_trainer("causal", tmp_path, max_steps=3, **settings)
    if schedule == "warmup_stable_decay":
        trainer.args.lr_decay_ratio = 1.0
    trainer.create_optimizer()
    scheduler, rates = trainer.create_scheduler(3), []
    for _ in range(4):
        rates.append(scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([1.0, 0.8, 0.4, 0.2])
    assert "the last of n decay steps is at (n - 1)/n" in FIELDS["min_lr_ratio"].metadata["help"]


def test_what_happens_anyway_may_be_asked_for(tmp_path):
    CausalConfig(output_dir=str(tmp_path), do_train=True, prediction_loss_only=True, label_names=["labels"])
    with pytest.raises(ValueError, match="`label_names` must be None: the targets are `labels`, got .'other'."):
        CausalConfig(output_dir=str(tmp_path), label_names=["other"])
