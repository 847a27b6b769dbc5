"""The replay against a decoder that is followed by hand through every draw that it can make."""

import itertools
import math

import pytest
import torch
from decoder_laws import CASES, GRID_CASES, KINDS, MASK, NEW, PROMPT, law, tensors, toy
from generation_models import seeded

from nanollada.modeling_nanollada import NanoLLaDAGenerationConfig
from nanollada.trainers.rollouts.decoding import Decoding
from nanollada.trainers.rollouts.replay import replay, replay_steps, sample_steps, steps_of
from nanollada.trainers.rollouts.rollouts import Rollouts

ALL = [(name, settings, None) for name, settings in CASES.items()]
ALL += [(name, settings, 2) for name, settings in GRID_CASES.items()]
ALL += [("wide grid", {}, 8), ("grid behind a part of the prompt", {"threshold": 0.6}, 3)]
parametrized = pytest.mark.parametrize(("settings", "grid"), [case[1:] for case in ALL], ids=[case[0] for case in ALL])


def decoding_of(model, settings):
    config = NanoLLaDAGenerationConfig(**{"do_sample": True, **settings, "max_new_tokens": NEW, "eos_token_id": None})
    return Decoding.of(config, model.config)


def enumerated(model, settings):
    """All rows of a decoder, as rollouts, and their probabilities."""
    with torch.no_grad():
        rows, steps, probabilities = tensors(law(model, **settings))
    return Rollouts(rows, steps, torch.ones_like(rows), len(PROMPT)), probabilities


@parametrized
def test_a_replay_is_the_decoders_law(settings, grid):
    """log π of every row, and Σ π = 1."""
    model = toy(grid=grid)
    rollouts, probabilities = enumerated(model, settings)
    with torch.no_grad():
        scores = replay(model, rollouts, decoding_of(model, settings))
    kinds = KINDS - len(settings.get("suppress_tokens", ()))
    assert len(probabilities) == kinds**NEW
    assert float(scores.total().exp().sum()) == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(scores.total(), probabilities.log(), rtol=0, atol=1e-10)
    assert torch.equal(scores.weights, rollouts.decided.double())
    assert (scores.log_probs[~rollouts.decided] == 0).all()


@parametrized
def test_generate_draws_from_that_law(settings, grid):
    """χ² of its samples, and the steps that it reports."""
    model, count = toy(grid=grid), 5000
    rollouts, probabilities = enumerated(model, settings)
    prompts = torch.tensor([PROMPT]).expand(count, -1)
    run = {"max_new_tokens": NEW, "do_sample": True, "eos_token_id": None, **settings}
    out = model.generate(prompts, generator=seeded(5), return_dict_in_generate=True, **run)
    place = (KINDS + 1) ** torch.arange(rollouts.canvas.shape[1])
    number = {int(code): i for i, code in enumerate((rollouts.canvas * place).sum(1))}
    drawn = torch.tensor([number[int(code)] for code in (out.canvas * place).sum(1)])
    assert torch.equal(out.commit_steps, rollouts.commit_steps[drawn])
    observed, expected = torch.bincount(drawn, minlength=len(probabilities)).double(), count * probabilities
    rare = expected < 5  # one cell together
    observed, expected = (torch.cat((x[~rare], x[rare].sum(0, keepdim=True))) for x in (observed, expected))
    keep = expected > 0
    statistic, freedom = float(((observed - expected)[keep].square() / expected[keep]).sum()), int(keep.sum()) - 1
    assert statistic < freedom + 3.5 * math.sqrt(2 * freedom), (statistic, freedom)


@pytest.mark.parametrize("grid", [None, 2])
@pytest.mark.parametrize("settings", [{}, {"threshold": 0.6}, {"temperature": 0.7}], ids=str)
def test_the_policy_gradient_is_that_of_the_expected_reward(settings, grid):
    """Σ π R ∇log π by replay against finite differences of J = Σ π R, along a random direction."""
    model, generator = toy(grid=grid), seeded(1)
    rewards = torch.rand(KINDS**NEW, generator=generator, dtype=torch.double)
    rollouts, probabilities = enumerated(model, settings)
    (replay(model, rollouts, decoding_of(model, settings)).total() * probabilities * rewards).sum().backward()
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()]
    slope = sum((p.grad * d).sum() for p, d in zip(model.parameters(), directions, strict=True))
    order, values = rollouts.canvas.tolist(), []
    with torch.no_grad():
        for move in (1e-5, -2e-5):
            for parameter, direction in zip(model.parameters(), directions, strict=True):
                parameter += move * direction
            finished = law(model, **settings)
            values.append(float((torch.stack([finished[tuple(row)][0] for row in order]) * rewards).sum()))
    assert float(slope) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)
    assert abs(float(slope)) > 1e-3


@pytest.mark.parametrize("grid", [None, 2])
def test_some_steps_stand_for_all_of_them(grid):
    """The mean over all subsets of two steps: value and gradient of the whole."""
    model, rewards = toy(grid=grid), torch.tensor([1.0, -0.5, 0.25]).double()
    rollouts, _ = enumerated(model, {})
    rollouts = Rollouts(rollouts.canvas[20:23], rollouts.commit_steps[20:23], rollouts.attention_mask[20:23], 2)
    decoding = decoding_of(model, {})
    present = steps_of(rollouts, decoding)
    assert present.shape == ((3, 1, 4) if grid is None else (3, 3, 4))
    size = 2 if grid is None else 1

    def gradient(total):
        return torch.autograd.grad((total * rewards).sum(), list(model.parameters()))

    whole = replay_steps(model, rollouts, decoding, present).total()
    full, total, count = [torch.zeros_like(g) for g in gradient(whole)], torch.zeros_like(whole), 0
    block = present.any(-1).nonzero()[:, 1].unique()  # the blocks with steps; all rows have the same
    subsets = [itertools.combinations(present[0, b].nonzero()[:, 0].tolist(), size) for b in block.tolist()]
    for subset in itertools.product(*subsets):
        chosen = torch.zeros_like(present)
        for b, steps in zip(block.tolist(), subset, strict=True):
            chosen[:, b, list(steps)] = True
        scores = replay_steps(model, rollouts, decoding, chosen)
        assert sorted(set(scores.weights.flatten().tolist())) == [0.0, 2.0]
        total, count = total + scores.total().detach(), count + 1
        full = [g + h for g, h in zip(full, gradient(scores.total()), strict=True)]
    assert count == (6 if grid is None else 4)
    torch.testing.assert_close(total / count, whole.detach(), rtol=0, atol=1e-10)
    whole = replay_steps(model, rollouts, decoding, present).total()
    for mean, exact in zip(full, gradient(whole), strict=True):
        torch.testing.assert_close(mean / count, exact, rtol=0, atol=1e-10)


def test_steps_are_drawn_alike_and_by_the_rows_keys():
    present = torch.ones(6000, 1, 4, dtype=torch.bool)
    keys = torch.arange(6000)
    chosen = sample_steps(present, keys, 2, seed=3)
    assert (chosen.sum(-1) == 2).all()
    counts = torch.bincount((chosen[:, 0] * 2 ** torch.arange(4)).sum(1), minlength=16)
    counts = counts[[3, 5, 6, 9, 10, 12]]
    assert int(counts.sum()) == 6000 and float(((counts - 1000.0) ** 2 / 1000).sum()) < 20  # 5 degrees of freedom
    again = sample_steps(present[:50], keys[:50], 2, seed=3)
    assert torch.equal(again, chosen[:50]) and not torch.equal(sample_steps(present, keys, 2, seed=4), chosen)
    few = present.clone()
    few[:, :, 1:] = False
    assert torch.equal(sample_steps(few, keys, 2, seed=3), few)
    with pytest.raises(ValueError, match="`steps` must be at least 1, got 0"):
        sample_steps(present, keys, 0, seed=3)


def test_random_positions_have_the_likelihood_given_their_order():
    """In any order Σ_y p(y | order) = 1, and a replay is that: the order's own law holds no parameter."""
    model, rows = toy(), torch.tensor(list(itertools.product(range(KINDS), repeat=NEW)))
    rows = torch.cat((torch.tensor([PROMPT]).expand(len(rows), -1), rows), dim=1)
    decoding = decoding_of(model, {"remasking": "random"})
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 0, 0, 1]):
        steps = torch.tensor([[-1, -1, *order]]).expand_as(rows).contiguous()
        with torch.no_grad():
            total = replay(model, Rollouts(rows, steps, torch.ones_like(rows), 2), decoding).total()
        assert float(total.exp().sum()) == pytest.approx(1, abs=1e-12)
        state, probability = rows[40].masked_fill(rows[40] >= 0, MASK), 1.0
        state[:2] = rows[40, :2]
        for step in range(4):
            places = [2 + i for i, at in enumerate(order) if at == step]
            with torch.no_grad():
                table = model(state[None]).logits[0].softmax(-1)
            for place in places:
                probability *= float(table[place, rows[40, place]])
                state[place] = rows[40, place]
        assert float(total[40].exp()) == pytest.approx(probability, rel=1e-10)


@pytest.mark.parametrize("settings", [{"eos_policy": "cut"}, {"eos_policy": "last"}, {"eos_policy": "none"}], ids=str)
@pytest.mark.parametrize("grid", [None, 2])
def test_rows_that_end_early_have_a_law_too(settings, grid):
    """What was never decided has no factor; over all outcomes of many draws Σ π = 1, and each is as frequent."""
    model, count, eos = toy(grid=grid), 8000, 2
    run = {"max_new_tokens": NEW, "do_sample": True, "eos_token_id": eos, "pad_token_id": 0, **settings}
    prompts = torch.tensor([PROMPT]).expand(count, -1)
    run["attention_mask"] = torch.ones_like(prompts)  # a pad token may be a token of the prompt
    out = model.generate(prompts, generator=seeded(6), return_dict_in_generate=True, **run)
    both, times = torch.cat((out.canvas, out.commit_steps), 1).unique(dim=0, return_counts=True)
    rows, steps = both.chunk(2, dim=1)
    assert len(rows.unique(dim=0)) == len(rows), "one trajectory for each row"
    assert ((rows == MASK) & (steps < 0))[:, len(PROMPT) : len(PROMPT) + NEW].any()
    decoding = decoding_of(model, settings)
    with torch.no_grad():
        law = replay(model, Rollouts(rows, steps, torch.ones_like(rows), len(PROMPT)), decoding).total().exp()
    assert 0.995 < float(law.sum()) < 1 + 1e-12
    common = count * law > 20
    statistic = float(((times - count * law).square() / (count * law))[common].sum())
    assert statistic < int(common.sum()) + 4 * math.sqrt(2 * int(common.sum()))
