"""GRPO of a diffusion policy: what is written, what is scored, and the gradient that comes of it."""

import copy
from dataclasses import replace

import pytest
import torch
from rollout_cases import evenness, gradients_of, logged, policy, prompts, trainer_of
from training_cases import assert_same_gradients

from nanollada.trainers import grpo
from nanollada.trainers.rollouts.rollouts import Rollouts

EOS, MASK = 2, 3


def recorded(monkeypatch):
    """The rollouts that are written from now on."""
    kept, write = [], grpo.write_rollouts
    monkeypatch.setattr(grpo, "write_rollouts", lambda *args: kept.append(write(*args)) or kept[-1])
    return kept


def log_likelihood(model, rollouts, row):
    """Of one rollout, step by step, from the model alone."""
    total, steps = 0.0, rollouts.commit_steps[row]
    for step in range(int(steps.max()) + 1):
        ids = rollouts.canvas[row].masked_fill(steps >= step, MASK)
        logits = model(ids[None], attention_mask=rollouts.attention_mask[row][None].long()).logits[0]
        for place in (steps == step).nonzero()[:, 0].tolist():
            total = total + logits[place].log_softmax(-1)[rollouts.canvas[row, place]]
    return total


@pytest.mark.parametrize("block_length", [None, 4])
@pytest.mark.parametrize("loss_type", ["dr_grpo", "dapo"])
def test_the_gradient_is_the_policy_gradient(tmp_path, char_tokenizer, monkeypatch, block_length, loss_type):
    """Sum over rollouts of advantage · gradient of log π, by hand, from states that are built anew."""
    kept = recorded(monkeypatch)
    model = policy(char_tokenizer, block_length=block_length)
    twin = copy.deepcopy(model)
    trainer = trainer_of(tmp_path, char_tokenizer, model, loss_type=loss_type)
    found = gradients_of(trainer)
    rollouts, completions = kept[0]
    rewards = torch.tensor(evenness(completions)).view(2, 4)
    advantages = (rewards - rewards.mean(1, keepdim=True)).flatten()
    size = 8 * 6 if loss_type == "dr_grpo" else int((rollouts.commit_steps >= 0).sum())
    loss = -sum(advantage * log_likelihood(twin, rollouts, row) for row, advantage in enumerate(advantages)) / size
    loss.backward()
    expected = {name: parameter.grad for name, parameter in twin.named_parameters() if parameter.grad is not None}
    assert_same_gradients(found, expected)


def test_accumulation_changes_nothing(tmp_path, char_tokenizer):
    """Eight rows at once, and two at a time, of prompts of several lengths."""
    whole = gradients_of(trainer_of(tmp_path, char_tokenizer))
    parts = gradients_of(
        trainer_of(tmp_path, char_tokenizer, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    )
    assert_same_gradients(whole, parts)


@pytest.mark.parametrize("settings", [{"score_steps": 2}, {"estimator": "elbo", "score_steps": 3}])
def test_accumulation_changes_no_draw_of_steps_and_masks(tmp_path, char_tokenizer, settings):
    settings = {**settings, "loss_type": "dr_grpo", "num_iterations": 2, "beta": 0.0}
    whole = gradients_of(trainer_of(tmp_path, char_tokenizer, **settings))
    parts = gradients_of(
        trainer_of(tmp_path, char_tokenizer, per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings)
    )
    assert_same_gradients(whole, parts)


def spied_ratios(trainer, monkeypatch):
    """New over old probabilities of each loss, at the places that count."""
    ratios, real = [], trainer.estimator.score

    def score(model, rollouts, *args, **kwargs):
        scores = real(model, rollouts, *args, **kwargs)
        trainer.last = scores.log_probs.detach()
        return scores

    trainer.estimator = replace(trainer.estimator, score=score)
    loss = grpo.GRPOTrainer._compute_loss

    def compute(self, model, inputs):
        value = loss(self, model, inputs)
        old = inputs.get("old_per_token_logps", self.last)
        ratios.append((self.last - old).exp()[inputs["completion_mask"] > 0])
        return value

    monkeypatch.setattr(grpo.GRPOTrainer, "_compute_loss", compute)
    return ratios


@pytest.mark.parametrize("settings", [{}, {"score_steps": 2}, {"estimator": "mean_field"}])
def test_the_second_iteration_has_other_ratios(tmp_path, char_tokenizer, monkeypatch, settings):
    trainer = trainer_of(
        tmp_path, char_tokenizer, num_iterations=2, max_steps=4, learning_rate=0.05, epsilon=0.05, **settings
    )
    ratios = spied_ratios(trainer, monkeypatch)
    trainer.train()
    clipped = logged(trainer, "clip_ratio/region_mean")
    assert len(ratios) == 4
    for first, second in (ratios[:2], ratios[2:]):
        assert (first - 1).abs().max() < 1e-12 and (second - 1).abs().min() > 1e-9
    assert clipped[0] == clipped[2] == 0 and clipped[1] > 0 and clipped[3] > 0
    outside = ((ratios[1] < 0.95) | (ratios[1] > 1.05)).float().mean()
    assert clipped[1] <= outside  # a ratio outside is clipped on the side of its advantage


def test_under_elbo_a_ratio_is_that_of_the_row(tmp_path, char_tokenizer):
    trainer = trainer_of(
        tmp_path, char_tokenizer, estimator="elbo", num_iterations=2, max_steps=2, learning_rate=0.05, epsilon=1e-4
    )
    assert trainer.importance_sampling_level == "sequence"
    trainer.train()
    first, second = logged(trainer, "clip_ratio/region_mean")
    assert first == 0 and second > 0 and second * 8 == round(second * 8)  # rows of eight
    assert not logged(trainer, "entropy")  # it is not that of the draws


def test_the_kl_is_zero_at_first_and_then_not(tmp_path, char_tokenizer):
    trainer = trainer_of(tmp_path, char_tokenizer, beta=0.1, max_steps=2, learning_rate=0.05)
    assert all((a == b).all() for a, b in zip(trainer.model.parameters(), trainer.ref_model.parameters(), strict=True))
    assert trainer.ref_model is not trainer.model
    trainer.train()
    first, second = logged(trainer, "kl")
    assert first == 0 and second > 0


def test_a_given_reference_is_the_one(tmp_path, char_tokenizer):
    other = policy(char_tokenizer, seed=1)
    trainer = trainer_of(tmp_path, char_tokenizer, ref_model=other, beta=0.1)
    assert trainer.accelerator.unwrap_model(trainer.ref_model) is other
    trainer.train()
    assert logged(trainer, "kl")[0] > 0


def test_what_is_scored_is_the_canvas_and_not_the_cut_completion(tmp_path, char_tokenizer, monkeypatch):
    """A token behind an EOS was decided before it: all the same it was seen, and is an action."""
    kept = recorded(monkeypatch)
    model = policy(char_tokenizer)
    with torch.no_grad():  # ends come early and often
        state = model.model(torch.full((1, 9), MASK)).last_hidden_state.mean(1)[0]
        model.lm_head.weight[EOS] = 3 * state / state.square().sum()
    trainer = trainer_of(tmp_path, char_tokenizer, model)
    seen, real = [], trainer.estimator.score

    def score(model, rollouts, *args, **kwargs):
        seen.append((rollouts, real(model, rollouts, *args, **kwargs)))
        return seen[-1][1]

    trainer.estimator = replace(trainer.estimator, score=score)
    twin = copy.deepcopy(trainer.model)
    trainer.train()
    rollouts, completions = kept[0]
    decided = (rollouts.commit_steps >= 0).sum(1).tolist()
    behind = [row for row in range(8) if decided[row] > len(completions[row])]
    assert behind
    scored, scores = seen[0]
    assert int((scores.weights > 0).sum()) == sum(decided)
    for row in range(8):
        mine = (scored.canvas == rollouts.canvas[row]).all(1) & (
            scored.commit_steps == rollouts.commit_steps[row]
        ).all(1)
        value = float(scores.total()[mine.nonzero()[0, 0]])
        assert value == pytest.approx(float(log_likelihood(twin, rollouts, row)), abs=1e-9)
        if row in behind:
            assert value != pytest.approx(cut_likelihood(twin, rollouts, row, len(completions[row])), abs=1e-3)
    assert logged(trainer, "rollouts/tokens") == [pytest.approx(sum(decided) / 8)]


def cut_likelihood(model, rollouts, row, length):
    """Of the row as TRL has it: up to its end, and as if nothing had been behind it."""
    width = rollouts.prompt_length + length
    parts = (rollouts.canvas, rollouts.commit_steps, rollouts.attention_mask)
    return float(log_likelihood(model, Rollouts(*(part[:, :width] for part in parts), rollouts.prompt_length), row))


def test_rollouts_are_written_in_the_rows_of_training_and_by_no_rule_of_the_checkpoint(tmp_path, char_tokenizer):
    model = policy(char_tokenizer)
    rows, rules = {"eos_policy": "cut", "block_length": 2, "grow_length": True}, {"threshold": 0.01}
    model.generation_config.update(**rows, **rules, top_k=1, steps=1, temperature=0.1)
    trainer = trainer_of(tmp_path, char_tokenizer, model)
    assert trainer.dropped_decoding == rules
    settings = trainer.generation_config
    assert {name: getattr(settings, name) for name in rows} == rows
    assert (settings.threshold, settings.top_k, settings.steps, settings.temperature) == (None, None, None, 1)
    own = trainer.model.generation_config
    assert own.threshold is None and {name: getattr(own, name) for name in rows} == rows


def test_nothing_else_of_the_checkpoints_decoding_has_a_part_in_rollouts(tmp_path, char_tokenizer, monkeypatch):
    kept, saved = recorded(monkeypatch), {"threshold": 0.01, "top_k": 1, "steps": 1, "position_score": "margin"}
    for number, settings in enumerate((saved, {})):
        model = policy(char_tokenizer)
        model.generation_config.update(**settings, eos_policy="cut")
        trainer_of(tmp_path / str(number), char_tokenizer, model).train()
    assert torch.equal(kept[1][0].canvas, kept[0][0].canvas)
    assert torch.equal(kept[1][0].commit_steps, kept[0][0].commit_steps)


def test_generation_kwargs_are_the_users_to_set(tmp_path, char_tokenizer, monkeypatch):
    kept = recorded(monkeypatch)
    trainer = trainer_of(tmp_path, char_tokenizer, generation_kwargs={"steps": 2, "eos_policy": "forbid"})
    trainer.train()
    assert logged(trainer, "rollouts/steps") == [2] and logged(trainer, "rollouts/tokens") == [6]
    assert not (kept[0][0].canvas[:, kept[0][0].prompt_length :] == EOS).any()


def test_the_temperature_is_drawn_and_scored(tmp_path, char_tokenizer, monkeypatch):
    kept, found = recorded(monkeypatch), []
    for temperature in (1.0, 0.1):
        trainer = trainer_of(tmp_path, char_tokenizer, temperature=temperature)
        trainer.train()
        found.append(logged(trainer, "rollouts/log_likelihood")[0])
    assert found[1] > found[0] / 3  # sharper draws are likelier
    assert not torch.equal(kept[0][0].canvas, kept[1][0].canvas)


def test_truncated_completions_can_be_left_out(tmp_path, char_tokenizer, monkeypatch):
    kept = recorded(monkeypatch)
    trainer = trainer_of(tmp_path, char_tokenizer, mask_truncated_completions=True)
    masks, loss = [], grpo.GRPOTrainer._compute_loss
    monkeypatch.setattr(
        grpo.GRPOTrainer, "_compute_loss", lambda self, *a: masks.append(a[1]["completion_mask"]) or loss(self, *a)
    )
    trainer.train()
    ended = [EOS in ids for ids in kept[0][1]]
    assert sorted(masks[0].any(1).tolist()) == sorted(ended) and 0 < sum(ended) < 8


@pytest.mark.parametrize(
    "estimator, loss_type",
    [("replay", loss) for loss in "grpo dr_grpo dapo bnpo cispo sapo luspo vespo".split()]
    + [("elbo", loss) for loss in "grpo dapo cispo vespo".split()],
)
def test_every_loss_of_trl_trains(tmp_path, char_tokenizer, estimator, loss_type):
    level = "sequence" if loss_type == "luspo" or estimator == "elbo" else "token"
    trainer = trainer_of(
        tmp_path, char_tokenizer, estimator=estimator, loss_type=loss_type, importance_sampling_level=level
    )
    gradients = gradients_of(trainer)
    assert any(gradient.abs().max() > 1e-6 for gradient in gradients.values())


def test_evaluation_writes_rollouts_of_held_out_prompts_always_with_the_same_draws(tmp_path, char_tokenizer):
    trainer = trainer_of(tmp_path, char_tokenizer, eval_dataset=prompts(2), per_device_eval_batch_size=4)
    first, second = trainer.evaluate(), trainer.evaluate()
    names = ("eval_reward", "eval_completions/mean_length", "eval_rollouts/steps", "eval_entropy")
    assert [first[name] for name in names] == [second[name] for name in names]


def test_evaluation_does_not_change_training(tmp_path, char_tokenizer):
    plain = trainer_of(tmp_path, char_tokenizer, max_steps=2)
    plain.train()
    evaluated = trainer_of(
        tmp_path, char_tokenizer, max_steps=2, eval_dataset=prompts(2), per_device_eval_batch_size=4,
        eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    evaluated.train()
    assert logged(plain, "reward") == logged(evaluated, "reward")
    pairs = zip(plain.model.parameters(), evaluated.model.parameters(), strict=True)
    assert all(torch.allclose(one, other, rtol=0, atol=1e-9) for one, other in pairs)


def test_an_entropy_bonus_raises_entropy(tmp_path, char_tokenizer):
    """Without any reward, from a policy of opinions."""
    trainer = trainer_of(
        tmp_path, char_tokenizer, reward=lambda completion_ids, **kwargs: [0.0] * len(completion_ids),
        entropy_coef=1.0, max_steps=8, learning_rate=0.02,
    )  # fmt: skip
    trainer.train()
    entropies = logged(trainer, "entropy")
    assert entropies[-1] > entropies[0] + 0.1


def test_tokens_of_high_entropy_are_those_above_the_quantile_whatever_they_weigh(
    tmp_path, char_tokenizer, monkeypatch
):
    """A step that stands for several has a weight above 1, which is no entropy."""
    trainer = trainer_of(tmp_path, char_tokenizer, score_steps=2, top_entropy_quantile=0.25)
    kept, choose = [], trainer.get_high_entropy_mask

    def spy(entropies, mask, threshold):
        kept.append((entropies, mask, choose(entropies, mask, threshold)))
        return kept[-1][2]

    monkeypatch.setattr(trainer, "get_high_entropy_mask", spy)
    trainer.train()
    [(entropies, weights, high)] = kept
    scored = weights > 0
    assert (weights[scored] > 1).any()
    assert torch.equal(high, scored & (entropies >= entropies[scored].quantile(0.75)))


def test_completions_are_logged(tmp_path, char_tokenizer):
    trainer = trainer_of(tmp_path, char_tokenizer, log_completions=True)
    trainer.train()
    import pandas

    table = pandas.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert len(table) == 8 and {"prompt", "completion", "evenness", "advantage"} <= set(table.columns)


def test_dropout_is_off(tmp_path, char_tokenizer):
    model = policy(char_tokenizer, hidden_dropout=0.5, attention_dropout=0.5)
    trainer = trainer_of(tmp_path, char_tokenizer, model, beta=0.1)
    trainer.train()
    assert logged(trainer, "kl")[0] == 0
    assert trainer.model.config.hidden_dropout == trainer.model.config.attention_dropout == 0.5  # is saved


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(en|dis)able` is deprecated:FutureWarning")  # TRL asks
def test_gradient_checkpointing_has_the_same_gradient(tmp_path, char_tokenizer):
    one = gradients_of(trainer_of(tmp_path, char_tokenizer))
    other = gradients_of(trainer_of(tmp_path, char_tokenizer, activation_checkpointing=True))
    assert_same_gradients(one, other)
