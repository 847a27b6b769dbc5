"""What `DiffusionGRPOTrainer` takes TRL to be. A test that fails here says where TRL has changed."""

import dataclasses
import inspect

import pytest
import torch
from rollout_cases import policy, prompts, trainer_of
from transformers import TrainingArguments
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer

from nanollada.modeling_nanollada import NanoLLaDAForMaskedLM
from nanollada.trainers import grpo
from nanollada.trainers.rollouts.options import REFUSED, WORKING

SIGNATURES = {
    "_generate_single_turn": "self prompt_ids images multimodal_fields num_generations has_tool_images",
    "_generate_and_score_completions": "self inputs",
    "_compute_loss": "self model inputs",
    "_get_per_token_logps_and_entropies": (
        "self model input_ids attention_mask logits_to_keep batch_size compute_entropy compute_aux_loss pixel_values "
        "image_grid_thw num_images pixel_attention_mask spatial_shapes num_tiles image_sizes token_type_ids "
        "mm_token_type_ids image_position_ids"
    ),
}
BATCH = "prompt_ids prompt_mask completion_ids completion_mask advantages num_items_in_batch"


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_overridden_methods_have_these_parameters(name):
    assert list(inspect.signature(getattr(GRPOTrainer, name)).parameters) == SIGNATURES[name].split()


@pytest.mark.parametrize("theirs, ours", [("add_fused_lm_head", "_leave_forward")])
def test_what_stands_in_has_the_signature_of_trls(theirs, ours):
    parameters = inspect.signature(getattr(grpo_trainer, theirs)).parameters.values()
    mine = inspect.signature(getattr(grpo, ours)).parameters.values()
    assert [(p.name, p.default) for p in parameters] == [(p.name, p.default) for p in mine]


def test_every_field_of_trls_config_works_or_is_refused():
    theirs = {field.name for field in dataclasses.fields(GRPOConfig)}
    own = theirs - {field.name for field in dataclasses.fields(TrainingArguments)}
    assert own == WORKING | set(REFUSED) and not WORKING & set(REFUSED)


def test_trl_puts_its_forward_on_policy_and_reference_and_we_do_not(tmp_path, char_tokenizer, monkeypatch):
    calls = []
    monkeypatch.setattr(grpo, "_leave_forward", lambda model, **kwargs: calls.append((model, kwargs)))
    before = grpo_trainer.add_fused_lm_head, grpo_trainer.create_model_from_path
    trainer = trainer_of(tmp_path, char_tokenizer, beta=0.1)
    assert [model for model, _ in calls] == [trainer.model, trainer.ref_model]
    assert calls[0][1] == {"temperature": 1.0, "cast_lm_head_to_fp32": False, "outputs": ("log_probs", "entropy")}
    assert (grpo_trainer.add_fused_lm_head, grpo_trainer.create_model_from_path) == before
    assert trainer.model.forward.__func__ is NanoLLaDAForMaskedLM.forward


def test_the_names_are_put_back_behind_an_error(tmp_path, char_tokenizer):
    before = grpo_trainer.add_fused_lm_head
    with pytest.raises(TypeError, match="train_dataset"):
        trainer_of(tmp_path, char_tokenizer, train=["no dataset"])
    assert grpo_trainer.add_fused_lm_head is before


def test_trls_own_trainer_still_refuses_the_model(tmp_path, char_tokenizer):
    args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=None)
    with pytest.raises(ValueError, match="labels are not shifted"):
        GRPOTrainer(policy(char_tokenizer), len, args, prompts(), processing_class=char_tokenizer)


def test_trl_hands_over_these_tensors_and_calls_what_we_override(tmp_path, char_tokenizer, monkeypatch):
    batches, calls = [], []
    generate = GRPOTrainer._generate_and_score_completions
    monkeypatch.setattr(
        GRPOTrainer,
        "_generate_and_score_completions",
        lambda self, inputs: batches.append(generate(self, inputs)) or batches[-1],
    )
    trainer = trainer_of(tmp_path, char_tokenizer, beta=0.1, num_iterations=2, max_steps=2)
    for name in ("_generate_single_turn", "_get_per_token_logps_and_entropies", "_compute_loss"):
        real = getattr(trainer, name)
        monkeypatch.setattr(
            trainer, name, lambda *args, real=real, name=name, **kwargs: calls.append(name) or real(*args, **kwargs)
        )
    trainer.train()
    assert set(batches[0]) == {*BATCH.split(), "old_per_token_logps", "ref_per_token_logps"}
    assert batches[0]["num_items_in_batch"].ndim == 0 and len(batches) == 1
    score, loss = "_get_per_token_logps_and_entropies", "_compute_loss"
    assert calls == ["_generate_single_turn", score, score, loss, score, loss, score]


def test_one_iteration_scores_once(tmp_path, char_tokenizer, monkeypatch):
    trainer = trainer_of(tmp_path, char_tokenizer, max_steps=2)
    scored, real = [], trainer.estimator.score
    trainer.estimator = dataclasses.replace(
        trainer.estimator, score=lambda *args, **kwargs: scored.append(len(args[1].canvas)) or real(*args, **kwargs)
    )
    trainer.train()
    assert scored == [8, 8]


def test_a_micro_batch_carries_its_own_rollouts(tmp_path, char_tokenizer, monkeypatch):
    """Through TRL's shuffle and split."""
    trainer = trainer_of(tmp_path, char_tokenizer, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    kept, seen = [], []
    write, score = grpo.write_rollouts, trainer.estimator.score
    monkeypatch.setattr(grpo, "write_rollouts", lambda *args: kept.append(write(*args)) or kept[-1])
    trainer.estimator = dataclasses.replace(
        trainer.estimator,
        score=lambda model, rollouts, *args, **kw: seen.append(rollouts) or score(model, rollouts, *args, **kw),
    )
    trainer.train()
    rollouts = kept[0][0]
    for name in ("canvas", "commit_steps", "attention_mask"):
        parts = torch.cat([getattr(part, name) for part in seen])
        assert len(seen) == 4 and sorted(parts.tolist()) == sorted(getattr(rollouts, name).tolist())
    pairs = [torch.cat((part.canvas, part.commit_steps), 1).tolist() for part in seen]
    assert sorted(sum(pairs, [])) == sorted(torch.cat((rollouts.canvas, rollouts.commit_steps), 1).tolist())
