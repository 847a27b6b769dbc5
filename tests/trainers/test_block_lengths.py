"""The block length over a run is an event of each optimizer step; everything else reads it."""

import json

import pytest
from training_cases import SHAPE, build_trainer, make_rows, packed_batch

from nanollada.modeling_nanollada import NanoLLaDAConfig, NanoLLaDAForMaskedLM
from nanollada.trainers.diffusion import DiffusionTrainer

PHASES = [1, 4, 4, None, None, 4]  # of six steps under the schedule below
SCHEDULE = {"block_length_schedule": "[[0.2, 1], [0.3, 4], [0.3, 0], [0.2, 4]]", "max_steps": 6}


def trained(folder, monkeypatch, batch=8, accumulation=1, resume=None, **settings):
    """The block length and the config's of every forward in training, and the number of events."""
    settings = {**SCHEDULE, "per_device_train_batch_size": batch, "logging_steps": 1, **settings}
    settings |= {"gradient_accumulation_steps": accumulation, "held_out": make_rows(2)}
    trainer = build_trainer("block", folder, **settings)
    seen, events, event = [], [], DiffusionTrainer.set_block_length
    trainer.model.register_forward_pre_hook(
        lambda model, args, kwargs: seen.append(
            (model.training, kwargs.get("block_length"), model.config.block_length)
        ),
        with_kwargs=True,
    )
    monkeypatch.setattr(DiffusionTrainer, "set_block_length", lambda self: events.append(event(self)))
    trainer.train(resume_from_checkpoint=resume)
    monkeypatch.undo()
    return trainer, seen, len(events)


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (4, 2), (1, 8)])
def test_one_event_a_step(batch, accumulation, tmp_path, monkeypatch):
    """Of all its micro-batches; and the config, which each checkpoint carries, has it too."""
    settings = {"save_strategy": "steps", "save_steps": 1}
    _, seen, events = trained(tmp_path, monkeypatch, batch, accumulation, **settings)
    expected = [phase for phase in PHASES for _ in range(accumulation)]
    assert [config for _, _, config in seen] == expected and events == 6
    assert [length or None for _, length, _ in seen] == expected
    for step, phase in enumerate(PHASES, 1):
        saved = json.loads((tmp_path / f"checkpoint-{step}" / "config.json").read_text())
        assert saved["block_length"] == phase


def test_evaluation_has_its_own_and_leaves_the_phase(tmp_path, monkeypatch):
    _, seen, _ = trained(tmp_path, monkeypatch, eval_strategy="steps", eval_steps=1, eval_block_length=2)
    assert {length for training, length, _ in seen if not training} == {2}
    assert [config for training, _, config in seen if training] == PHASES


def test_a_resumed_run_goes_on_in_its_phase(tmp_path, monkeypatch):
    trained(tmp_path, monkeypatch, save_strategy="steps", save_steps=1)
    for step in (2, 3, 6):
        trainer, seen, events = trained(tmp_path, monkeypatch, resume=str(tmp_path / f"checkpoint-{step}"))
        assert [config for _, _, config in seen] == PHASES[step:] and events == 6 - step
        assert trainer.model.config.block_length == PHASES[-1]


def test_a_loss_reads_the_block_length_and_writes_nothing(tmp_path):
    trainer = build_trainer("block", tmp_path)
    batch = packed_batch(trainer)
    trainer.model.config.block_length = 7
    trainer.compute_loss(trainer.model, batch)
    assert trainer.model.config.block_length == 7 and trainer.block_length == 4


def test_the_checkpoint_decides_the_block(tmp_path):
    model = NanoLLaDAForMaskedLM(NanoLLaDAConfig(vocab_size=30, block_length=5, **SHAPE))
    trainer = build_trainer("diffusion", tmp_path, model=model)
    assert trainer.schedule.phases == [(1.0, 5)] and trainer.eval_block_length == 5
    trainer = build_trainer("diffusion", tmp_path, model=model, block_length=0, eval_block_length=3)
    assert trainer.schedule.phases == [(1.0, 0)] and trainer.eval_block_length == 3
