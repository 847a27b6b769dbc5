"""The forward process: its law, its weights, and that a row's noise belongs to the row."""

import math
import re
from types import SimpleNamespace

import pytest
import torch

from nanollada.trainers.noise.keys import keyed_uniform, row_positions
from nanollada.trainers.noise.masking import MASK_COUNTS, WEIGHTINGS, corrupt
from nanollada.trainers.noise.schedules import NOISE_SCHEDULES

MASK = 3
MODEL = SimpleNamespace(mask_token_id=MASK)
FORMULA = {"t": 0.3, "cos": math.cos, "pi": math.pi}


def draw(rows, length=9, prompt=2, seed=1, epoch=0, **settings):
    """Corrupts `rows` rows of `length` targets behind a prompt."""
    index = torch.arange(rows)
    targets = torch.ones(rows, prompt + length, dtype=torch.bool)
    targets[:, :prompt] = False
    ids = torch.full(targets.shape, 7)
    keys = {"index": index, "rank": index, "epoch": torch.full_like(index, epoch)}
    return corrupt(ids, targets, MODEL, seed=seed, **keys, **settings), targets


def mean_and_error(values):
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


def test_keyed_uniform_is_uniform_and_independent():
    index = torch.arange(4000)
    uniform = keyed_uniform(0, index, torch.zeros_like(index), 0, 50)
    assert uniform.min() >= 0 and uniform.max() < 1
    counts = torch.histc(uniform.flatten().float(), 100, 0, 1)
    chi2 = ((counts - 2000).square() / 2000).sum().item()
    assert abs(chi2 - 99) < 4 * math.sqrt(2 * 99)
    others = [
        keyed_uniform(1, index, torch.zeros_like(index), 0, 50),
        keyed_uniform(0, index + 1, torch.zeros_like(index), 0, 50),
        keyed_uniform(0, index, torch.ones_like(index), 0, 50),
        keyed_uniform(0, index, torch.zeros_like(index), 1, 50),
        uniform.roll(1, 1),
    ]
    for other in others:
        correlation = torch.corrcoef(torch.stack((uniform.flatten(), other.flatten())))[0, 1].item()
        assert abs(correlation) < 4 / math.sqrt(uniform.numel())


def test_keyed_uniform_is_what_it_was():
    """Evaluation noise is quoted by its seed: the numbers must not change between versions."""
    values = keyed_uniform(42, torch.tensor([0, 7]), torch.tensor([0, 1]), 2, 2)
    expected = torch.tensor([[0.0952081, 0.3634696], [0.0915343, 0.5290896]], dtype=torch.double)
    torch.testing.assert_close(values, expected, atol=1e-6, rtol=0)


def test_noise_belongs_to_the_row():
    whole, _ = draw(12)
    again, _ = draw(12)
    assert torch.equal(whole.noisy_input_ids, again.noisy_input_ids)
    index = torch.tensor([7, 2])
    ids, targets = torch.full((2, 11), 7), torch.arange(11).expand(2, -1) >= 2
    part = corrupt(ids, targets, MODEL, seed=1, index=index, rank=index, epoch=torch.zeros_like(index))
    assert torch.equal(part.noisy_input_ids, whole.noisy_input_ids[index])
    assert torch.equal(part.weights, whole.weights[index])
    other_epoch, _ = draw(12, epoch=1)
    assert not torch.equal(whole.noisy_input_ids, other_epoch.noisy_input_ids)


def test_padding_does_not_change_a_rows_masks():
    short, _ = draw(40)
    index = torch.arange(40)
    targets = torch.zeros(40, 30, dtype=torch.bool)
    targets[:, 2:11] = True
    ids = torch.full(targets.shape, 7)
    padded = corrupt(ids, targets, MODEL, seed=1, index=index, rank=index, epoch=torch.zeros_like(index))
    assert torch.equal(padded.supervised[:, :11], short.supervised)


@pytest.mark.parametrize("mask_count", MASK_COUNTS)
def test_prompts_stay_and_the_parts_agree(mask_count):
    noise, targets = draw(500, mask_count=mask_count)
    assert not noise.supervised[~targets].any()
    assert torch.equal(noise.noisy_input_ids == MASK, noise.supervised)
    assert torch.equal(noise.weights > 0, noise.supervised)


@pytest.mark.parametrize("mask_count", MASK_COUNTS)
@pytest.mark.parametrize("schedule", NOISE_SCHEDULES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_every_target_has_expected_weight_one(mask_count, schedule, weighting):
    """So a uniform predictor's loss is ln(V − 1), by whatever rule."""
    noise, targets = draw(20000, mask_count=mask_count, noise_schedule=schedule, weighting=weighting)
    mean, error = mean_and_error(noise.weights.sum(-1) / targets.sum(-1))
    assert abs(mean - 1) <= 3 * error + 1e-12


def test_exact_count_gives_weight_one_in_every_row():
    noise, targets = draw(300)
    torch.testing.assert_close(noise.weights.sum(-1), targets.sum(-1).double())


@pytest.mark.parametrize("schedule", NOISE_SCHEDULES)
@pytest.mark.parametrize("mask_count", MASK_COUNTS)
def test_expected_subset_weight_is_the_closed_form(mask_count, schedule):
    """E[weight · 1(mask = S)] = 1 / (k·C(L, k)) for every subset S, up to ε: the bound by its definition."""
    rows, length = 60000, 4
    noise, targets = draw(rows, length, mask_count=mask_count, noise_schedule=schedule, time_epsilon=1e-6)
    chosen = noise.supervised[:, 2:]
    code = (chosen * 2 ** torch.arange(length)).sum(-1)
    weight = noise.weights.amax(-1)
    for subset in range(1, 2**length):
        k = subset.bit_count()
        mean, error = mean_and_error(weight * (code == subset))
        assert abs(mean - 1 / (k * math.comb(length, k))) <= 4 * error, (subset, mean)


def test_counts_are_uniform_and_stratified():
    noise, _ = draw(900)
    counts = noise.supervised.sum(-1)
    assert counts.min() == 1 and counts.max() == 9
    frequency = torch.bincount(counts, minlength=10)[1:]
    assert (frequency - 100).abs().max() <= 3  # iid draws would scatter by ±10
    for start in range(0, 900, 90):  # and so in any run of consecutive rows
        assert (torch.bincount(counts[start : start + 90], minlength=10)[1:] - 10).abs().max() <= 3


def test_bernoulli_rate_is_the_papers():
    noise, _ = draw(4000, time_epsilon=0.25, mask_count="bernoulli")
    index = torch.arange(4000)
    rate = 0.25 + 0.75 * row_positions(1, index, index * 0)  # p = (1 − ε)t + ε
    expected = (1 / rate)[:, None].expand_as(noise.weights)
    torch.testing.assert_close(noise.weights[noise.supervised], expected[noise.supervised])
    mean, error = mean_and_error(noise.supervised[:, 2:].double().mean(-1) - rate)
    assert abs(mean) <= 3 * error


@pytest.mark.parametrize("schedule", NOISE_SCHEDULES)
def test_schedules_are_consistent(schedule):
    schedule = NOISE_SCHEDULES[schedule]
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.double, requires_grad=True)
    torch.testing.assert_close(schedule.time(schedule.mask_rate(t)), t)
    (slope,) = torch.autograd.grad(schedule.mask_rate(t).sum(), t)
    torch.testing.assert_close(slope, schedule.slope(t))
    (rate,) = torch.autograd.grad(schedule.integral(t).sum(), t)
    torch.testing.assert_close(rate, schedule.mask_rate(t))
    ends = schedule.mask_rate(torch.tensor([0.0, 1.0], dtype=torch.double))
    torch.testing.assert_close(ends, torch.tensor([0.0, 1.0], dtype=torch.double))
    alpha = eval(re.sub(r"pi \(", "pi * (", schedule.formula.replace("^", "**").replace("pi t", "pi * t")), FORMULA)
    assert schedule.mask_rate(torch.tensor(0.3)).item() == pytest.approx(1 - alpha)


def test_variance_of_the_exact_count_is_lower():
    """The point of the default: with a random predictor the loss of a batch of 32 rows scatters less."""
    spread = {}
    for mask_count in MASK_COUNTS:
        noise, _ = draw(32 * 200, 64, mask_count=mask_count)
        losses = torch.linspace(2, 5, 66, dtype=torch.double)
        spread[mask_count] = (noise.weights * losses).sum(-1).view(200, 32).mean(-1).std().item()
    assert spread["exact"] < 0.5 * spread["bernoulli"]


def test_rows_without_targets_are_left_alone():
    index = torch.arange(2)
    ids = torch.full((2, 5), 7)
    for mask_count in MASK_COUNTS:
        noise = corrupt(ids, ids == 0, MODEL, seed=0, index=index, rank=index, epoch=index * 0, mask_count=mask_count)
        assert torch.equal(noise.noisy_input_ids, ids) and noise.weights.sum() == 0


def test_row_positions_start_elsewhere_in_each_epoch():
    rank = torch.arange(5)
    first, second = (row_positions(0, rank, torch.full_like(rank, epoch)) for epoch in (0, 1))
    assert (first - second).abs().min() > 1e-6
    assert row_positions(0, rank[3:], torch.zeros(2, dtype=torch.long)).tolist() == first[3:].tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_count": "some"}, "`mask_count` must be one of exact, bernoulli, got 'some'"),
        ({"noise_schedule": "cosine"}, "`noise_schedule` must be one of linear.*got 'cosine'"),
        ({"weighting": "none"}, "`weighting` must be one of elbo, unweighted, got 'none'"),
        ({"time_epsilon": 0.0}, "`time_epsilon` must lie strictly between 0 and 0.5, got 0.0"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        draw(2, **settings)
