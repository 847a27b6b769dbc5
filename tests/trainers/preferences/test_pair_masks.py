"""The masks of a score: how many tokens, which of them, and what their keys are."""

import itertools
import math

import pytest
import torch
from preference_cases import build_model

from nanollada.trainers.noise.blocks import block_ids_of
from nanollada.trainers.preferences.masks import ESTIMATORS, EVALUATION, draw_masks

LENGTH, PROMPT = 14, 3


def drawn(answers, *, block=None, index=None, step=0, draws=8, estimator="elbo", **settings):
    """The corruption of rows whose answers have these numbers of tokens, and its masks `[draws, rows, length]`."""
    columns = torch.arange(LENGTH)
    targets = (columns >= PROMPT) & (columns < PROMPT + torch.tensor(answers)[:, None])
    ids = (columns + 4).expand(len(answers), LENGTH).contiguous()
    index = torch.arange(len(answers)) if index is None else torch.tensor(index)
    noise = draw_masks(
        ids,
        targets,
        build_model().config,
        **{"estimator": estimator, "draws": draws, "seed": 1, "index": index, "step": step, **settings},
        block_ids=block_ids_of(block, None, None, ids.shape),
    )
    masked = noise.supervised.view(draws, len(answers), LENGTH)
    assert not (masked & ~targets).any()
    assert (noise.noisy_input_ids.view(masked.shape) == torch.where(masked, 3, ids)).all()
    return noise, masked


@pytest.mark.parametrize("step", [EVALUATION, 0, 7])
def test_with_as_many_draws_as_targets_each_count_is_drawn_once(step):
    noise, masked = drawn([8, 8, 8], step=step)
    counts = masked.sum(-1)  # [D, R]
    assert (counts.sort(0).values == torch.arange(1, 9)[:, None]).all()
    weights = noise.weights.view(masked.shape)
    assert torch.equal(weights[masked], (8 / counts.double())[..., None].expand_as(weights)[masked])


def test_counts_are_spread_evenly_whatever_the_number_of_targets():
    """Of n targets and D draws each stratum of D has one position: a count k comes floor or ceil of D/n times, ± 1."""
    for targets, draws in itertools.product((1, 3, 5, 11), (1, 2, 4, 8, 16)):
        counts = drawn([targets], draws=draws)[1].sum(-1)[:, 0]
        cells = (
            (torch.arange(draws) / draws * targets).long() + 1,
            ((torch.arange(draws) + 1) / draws * targets).ceil(),
        )
        assert (counts >= cells[0]).all() and (counts <= cells[1]).all()


def test_blocks_have_their_own_strata():
    """Two blocks of a row stand half a cycle apart, and each goes through all counts."""
    masked = drawn([9], block=4, draws=4)[1][:, 0]  # blocks of 1 (behind the prompt), 4 and 4 targets
    for start in (4, 8):
        counts = masked[:, start : start + 4].sum(-1)
        assert len(set(counts.tolist())) >= 3 and (counts.float().mean() - 2.5).abs() <= 0.5
    assert masked[:, 3].all()  # a block of one token is always masked


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_masks_depend_on_seed_row_draw_and_step_alone(estimator):
    together = drawn([5, 9, 7], index=[4, 5, 40], estimator=estimator)[1]
    alone = drawn([7], index=[40], estimator=estimator)[1]
    assert torch.equal(together[:, 2], alone[:, 0])
    others = [{"step": 1}, {"step": EVALUATION}, {"seed": 2}, {"index": [41]}]
    for change in others:
        assert not torch.equal(alone, drawn([7], **{"index": [40], "estimator": estimator, **change})[1]), change
    assert len({tuple(mask.tolist()) for mask in drawn([11], estimator=estimator)[1][:, 0]}) > 5


def test_the_reference_has_the_same_masks_and_with_the_naive_estimator_others():
    for estimator, same in (("elbo", True), ("naive", False)):
        policy, reference = (drawn([9, 9], estimator=estimator, reference=which)[0] for which in (False, True))
        assert torch.equal(policy.noisy_input_ids, reference.noisy_input_ids) is same
    own = drawn([9] * 40, estimator="naive")[0]
    other = drawn([9] * 40, estimator="naive", reference=True)[0]
    rates = torch.stack([noise.supervised.sum(-1) / 9 for noise in (own, other)])
    assert torch.corrcoef(rates)[0, 1].abs() < 0.2  # 320 draws


def test_every_set_of_a_size_is_as_probable_as_the_others():
    steps = 3000
    index, size = list(range(steps)), 4
    masked = drawn([size] * steps, index=index, draws=4)[1][..., PROMPT : PROMPT + size]
    codes = (masked * 2 ** torch.arange(size)).sum(-1).flatten()
    drawn_of = torch.bincount(codes, minlength=2**size)
    for count in range(1, size + 1):
        sets = [sum(2**place for place in places) for places in itertools.combinations(range(size), count)]
        expected = steps / math.comb(size, count)  # each count once a row
        chi = ((drawn_of[sets] - expected) ** 2 / expected).sum().item()
        assert drawn_of[sets].sum() == steps and chi < 20, (count, chi)  # at most 5 degrees of freedom: p > .001
    assert drawn_of[0] == 0


def test_naive_masks_are_bernoulli_at_a_uniform_rate_and_weighed_by_it():
    noise, masked = drawn([11] * 2000, draws=1, estimator="naive")
    share = masked.double().sum(-1)[0] / 11
    assert abs(share.mean().item() - 0.5) < 0.02 and share.var().item() > 1 / 12  # of the rate, and of the coins
    weights = noise.weights[noise.supervised]
    assert weights.min() >= 1
    total = noise.weights.sum(-1) / 11  # its mean is one a target, with a heavy tail
    assert abs(total.mean().item() - 1) < 4 * total.std().item() / 2000**0.5
