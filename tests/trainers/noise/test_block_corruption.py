"""Noise by blocks: counts, weights, bands and complements, by their closed forms."""

import math
from types import SimpleNamespace

import pytest
import torch

from nanollada.trainers.noise.blocks import block_ids_of, block_positions, block_sums, choose_smallest
from nanollada.trainers.noise.masking import MASK_COUNTS, WEIGHTINGS, corrupt
from nanollada.trainers.noise.schedules import NOISE_SCHEDULES

MODEL = SimpleNamespace(mask_token_id=3)
MASK, PROMPT, LENGTH = 3, 2, 13
SIZES = (2, 4, 4, 3)  # targets of the blocks of four behind a prompt of two


def draw(rows, length=LENGTH, block_length=4, prompt=PROMPT, padding=0, **settings):
    index = torch.arange(rows)
    targets = torch.zeros(rows, prompt + length + padding, dtype=torch.bool)
    targets[:, prompt : prompt + length] = True
    ids = torch.full(targets.shape, 7)
    blocks = block_ids_of(block_length, None, None, targets.shape)
    keys = {"index": index, "rank": index, "epoch": index * 0}
    return corrupt(ids, targets, MODEL, seed=1, block_ids=blocks, **keys, **settings), targets, blocks


def by_block(values, blocks):
    """`[rows, number of blocks]`: sums."""
    return torch.stack([(values * (blocks == b)).sum(-1) for b in range(int(blocks.max()) + 1)], 1)


def mean_and_error(values):
    return values.mean(0), values.std(0) / math.sqrt(len(values))


def test_each_block_has_its_own_uniform_count():
    noise, _, blocks = draw(4000)
    counts = by_block(noise.supervised, blocks)
    for block, size in enumerate(SIZES):
        frequency = torch.bincount(counts[:, block], minlength=size + 1)
        assert frequency[0] == 0
        assert (frequency[1:] - 4000 / size).abs().max() <= 4 * math.sqrt(4000 / size)
    correlation = torch.corrcoef(counts.T.double())  # t is not shared by a row's blocks
    assert (correlation - torch.eye(4)).abs().max() < 0.6


def test_blocks_of_a_row_are_stratified():
    """With 64 blocks of 8 the counts of a single row are spread evenly: iid draws would scatter by ±2.6."""
    noise, _, blocks = draw(50, 512, 8, prompt=0)
    for counts in by_block(noise.supervised, blocks):
        assert (torch.bincount(counts, minlength=9)[1:] - 8).abs().max() <= 1
    first = by_block(noise.supervised, blocks)[:, 0]
    assert first.unique().numel() >= 6  # a block's rate does not hang on its place


def test_a_uniform_predictor_has_the_right_loss_in_every_block():
    noise, _, blocks = draw(300)
    expected = torch.tensor(SIZES, dtype=torch.double).expand(300, -1)
    torch.testing.assert_close(by_block(noise.weights, blocks), expected)


def test_blocks_of_one_token_are_ar_training():
    noise, targets, _ = draw(30, block_length=1)
    assert torch.equal(noise.supervised, targets)
    assert torch.equal(noise.weights, targets.double())


@pytest.mark.parametrize("mask_count", MASK_COUNTS)
@pytest.mark.parametrize("schedule", NOISE_SCHEDULES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("complementary", [False, True])
@pytest.mark.parametrize("band", [(0.0, 1.0), (0.3, 0.8), (0.0, 0.5)])
def test_every_target_has_expected_weight_one(mask_count, schedule, weighting, complementary, band):
    settings = {"mask_count": mask_count, "noise_schedule": schedule, "weighting": weighting}
    noise, _, blocks = draw(12000, complementary=complementary, mask_rate_band=band, **settings)
    weights = by_block(noise.weights, blocks.repeat(1 + complementary, 1)) / torch.tensor(SIZES)
    if complementary:
        weights = weights[:12000] + weights[12000:]
    mean, error = mean_and_error(weights)
    # Bernoulli weights near rate 0 have a heavy tail: t stops at ε
    assert ((mean - 1).abs() <= 4 * error + 1e-9).all(), (mean, error)


@pytest.mark.parametrize("schedule", NOISE_SCHEDULES)
@pytest.mark.parametrize("mask_count", MASK_COUNTS)
@pytest.mark.parametrize("complementary", [False, True])
def test_expected_subset_weight_is_the_closed_form(mask_count, schedule, complementary):
    """E[weight · 1(mask of the block = S)] = 1 / (k·C(n, k)) for every subset S of a block: the bound's definition."""
    rows, size = 30000, 3
    settings = {"mask_count": mask_count, "noise_schedule": schedule, "time_epsilon": 1e-6}
    noise, _, blocks = draw(rows, 2 * size, size, prompt=0, complementary=complementary, **settings)
    copies = 1 + complementary
    for block in range(2):
        inside = blocks[0] == block
        chosen = noise.supervised[:, inside]
        code = (chosen * 2 ** torch.arange(size)).sum(-1)
        weight = noise.weights[:, inside].amax(-1)
        for subset in range(1, 2**size):
            k = subset.bit_count()
            values = (weight * (code == subset)).view(copies, rows).sum(0)
            mean, error = mean_and_error(values)
            assert abs(mean - 1 / (k * math.comb(size, k))) <= 4 * error, (subset, mean, error)


@pytest.mark.parametrize("mask_count", MASK_COUNTS)
@pytest.mark.parametrize("block_length", [1, 4, None])
def test_complements_mask_each_target_exactly_once(mask_count, block_length):
    noise, targets, _ = draw(200, block_length=block_length or 99, mask_count=mask_count, complementary=True)
    first, second = noise.supervised.chunk(2)
    assert torch.equal(first ^ second, targets) and not (first & second).any()
    assert first.any() and second.any()
    assert torch.equal(noise.noisy_input_ids == MASK, noise.supervised)
    assert torch.isfinite(noise.weights).all() and torch.equal(noise.weights > 0, noise.supervised)


def test_complements_have_their_own_weights():
    noise, _, _ = draw(400, 9, 99, prompt=0, complementary=True)
    counts = noise.supervised.sum(-1)
    weights = noise.weights.amax(-1)
    some = counts > 0
    torch.testing.assert_close(weights[some], 10 / 2 / counts[some].double())  # k is uniform on 0..9
    assert set(counts.tolist()) == set(range(10))


def test_a_block_that_only_one_of_the_pair_can_mask_counts_whole():
    """One target and rates of at least 0.3: the first mask always hides it."""
    noise, targets, _ = draw(50, block_length=1, complementary=True, mask_rate_band=(0.3, 0.8))
    assert torch.equal(noise.weights[:50], targets.double()) and noise.weights[50:].sum() == 0


def test_band_of_counts():
    noise, _, blocks = draw(500, 40, 20, prompt=0, mask_rate_band=(0.3, 0.8))
    counts = by_block(noise.supervised, blocks)
    assert counts.min() == 6 and counts.max() == 16  # ⌈0.3 · 20⌉, ⌊0.8 · 20⌋
    assert (torch.bincount(counts.flatten())[6:] - 1000 / 11).abs().max() < 12
    torch.testing.assert_close(by_block(noise.weights, blocks), torch.full((500, 2), 20.0).double())


def test_band_of_rates():
    noise, _, _ = draw(500, mask_count="bernoulli", mask_rate_band=(0.3, 0.8))
    rates = 1 / noise.weights[noise.supervised]
    assert rates.min() >= 0.3 and rates.max() <= 0.8 and rates.min() < 0.31 and rates.max() > 0.79
    assert noise.supervised[:, PROMPT:].double().mean().item() == pytest.approx(0.55, abs=0.02)


def test_unweighted_band_is_llada2s_sft_mean():
    """Every masked token counts the same: one over the mean rate, 0.55."""
    noise, _, _ = draw(500, mask_count="bernoulli", mask_rate_band=(0.3, 0.8), weighting="unweighted")
    weights = noise.weights[noise.supervised]
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 0.55))


def test_the_time_weighted_loss_has_the_weight_of_its_own_mask():
    """cos² noise: π·cot(πt/2) at the t whose rate sin²(πt/2) drew the mask (up to the ε of the smallest time)."""
    noise, targets, blocks = draw(500, mask_count="bernoulli", noise_schedule="cosine_squared", time_epsilon=1e-6)
    index = torch.arange(500)
    position = block_positions(1, index, index, index * 0, block_sums(targets, blocks), blocks)[noise.supervised]
    time = 1e-6 + (1 - 1e-6) * position
    expected = math.pi / torch.tan(math.pi * time / 2)
    torch.testing.assert_close(noise.weights[noise.supervised], expected, rtol=1e-5, atol=1e-8)


def test_padding_does_not_change_a_rows_masks():
    short, *_ = draw(40)
    padded, *_ = draw(40, padding=9)
    assert torch.equal(padded.supervised[:, : PROMPT + LENGTH], short.supervised)
    assert torch.equal(padded.weights[:, : PROMPT + LENGTH], short.weights)


def test_one_block_is_the_whole_row():
    index = torch.arange(20)
    ids = torch.full((20, 9), 7)
    keys = {"seed": 1, "index": index, "rank": index, "epoch": index * 0}
    one = corrupt(ids, ids == 7, MODEL, **keys)
    other = corrupt(ids, ids == 7, MODEL, block_ids=torch.zeros_like(ids), **keys)
    assert torch.equal(one.weights, other.weights) and torch.equal(one.supervised, other.supervised)


def test_blocks_are_cut_at_document_starts_or_on_the_row():
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0, 1, 2]])
    document_ids = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 2, 2, 2]])
    assert block_ids_of(2, position_ids, document_ids, (1, 10)).tolist() == [[0, 0, 1, 1, 2, 3, 3, 4, 4, 5]]
    assert block_ids_of(8, position_ids, document_ids, (1, 10)).tolist() == [[0, 0, 0, 0, 0, 1, 1, 2, 2, 2]]
    assert block_ids_of(4, None, document_ids, (1, 10)).tolist() == [[0, 0, 0, 0, 1, 1, 1, 1, 2, 2]]
    assert block_ids_of(99, position_ids, document_ids, (1, 10)).tolist() == document_ids.tolist()
    assert block_ids_of(0, position_ids, document_ids, (1, 10)) is None
    assert block_ids_of(None, position_ids, document_ids, (1, 10)) is None


def test_choose_smallest_in_blocks():
    keys = torch.tensor([[0.9, 0.1, 0.5, 0.2, 0.3, 0.1]])
    candidates = torch.tensor([[True, True, False, True, True, False]])
    blocks = torch.tensor([[0, 0, 0, 1, 1, 1]])
    counts = torch.tensor([[1, 1, 1, 2, 2, 2]])
    assert choose_smallest(keys, candidates, counts, blocks).tolist() == [[False, True, False, True, True, False]]
    one = torch.zeros_like(blocks)
    assert choose_smallest(keys, candidates, one + 1, one).tolist() == [[False, True] + [False] * 4]


@pytest.mark.parametrize("band", [(0.5,), (0.8, 0.3), (-0.1, 1.0), (0.0, 1.1), (0.5, 0.5)])
def test_wrong_bands_are_refused(band):
    with pytest.raises(ValueError, match="`mask_rate_band` must be two rates 0 <= lo < hi <= 1, got"):
        draw(2, mask_rate_band=band)


def test_a_band_below_the_smallest_time_is_refused():
    with pytest.raises(ValueError, match=r"must reach beyond `time_epsilon`, got \[0.0, 0.1\] and 0.2"):
        draw(2, mask_count="bernoulli", mask_rate_band=(0.0, 0.1), time_epsilon=0.2)
