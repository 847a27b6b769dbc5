"""The score of an answer is its ELBO: enumerated, in blocks, part by part, with the right gradient."""

import itertools

import pytest
import torch
from preference_cases import build_model, likelihood_batch, make_pairs, nudged

from nanollada.trainers.noise.blocks import block_ids_of
from nanollada.trainers.noise.corruption import Corruption
from nanollada.trainers.preferences.masks import draw_masks
from nanollada.trainers.preferences.score import score_masks
from nanollada.trainers.scoring.likelihood import exact_nelbo

PAIRS = make_pairs(3, longest=5)


def scored(model, rows=PAIRS, step=0, tokens=None, **settings):
    batch = likelihood_batch(rows)
    ids, block_length = batch["input_ids"], model.config.block_length
    noise = draw_masks(
        ids,
        batch["labels"] != -100,
        model.config,
        **{"estimator": "elbo", "draws": 8, "seed": 0, "index": batch["index"], **settings},
        step=step,
        block_ids=block_ids_of(block_length, None, None, ids.shape),
    )
    return score_masks(model.forward, noise, ids, batch["attention_mask"], block_length, tokens)


def all_masks(batch, row, block_length, mask_token_id):
    """Every set of an answer's targets (of each of its blocks), with n/k as weight, and the law's probability."""
    ids, labels = batch["input_ids"][row : row + 1], batch["labels"][row : row + 1]
    places = (labels[0] != -100).nonzero()[:, 0]
    blocks = [list(group) for _, group in itertools.groupby(places.tolist(), lambda place: place // block_length)]
    for block in blocks:
        n = len(block)
        for count in range(1, n + 1):
            sets = list(itertools.combinations(block, count))
            for chosen in sets:
                masked = torch.zeros_like(ids, dtype=torch.bool)
                masked[0, list(chosen)] = True
                noise = Corruption(
                    ids.masked_fill(masked, mask_token_id),
                    ids.masked_fill(~masked, -100),
                    masked.double() * (n / count),
                )
                yield noise, 1 / (n * len(sets))


@pytest.mark.parametrize("block_length", [None, 2, 3])
def test_mean_over_all_masks_is_the_enumerated_elbo(block_length):
    model = build_model(block_length=block_length)
    batch = likelihood_batch(PAIRS)
    expected = exact_nelbo(model, batch)
    for row in range(len(expected)):
        ids, tokens = batch["input_ids"][row : row + 1], batch["attention_mask"][row : row + 1]
        mean = sum(
            probability * score_masks(model.forward, noise, ids, tokens, block_length).log_probs.sum().item()
            for noise, probability in all_masks(batch, row, block_length or ids.shape[1], model.config.mask_token_id)
        )
        assert mean == pytest.approx(-expected[row].item(), rel=1e-10)


@pytest.mark.parametrize("estimator", ["elbo", "naive"])
@pytest.mark.parametrize("block_length", [None, 3])
@torch.no_grad()
def test_drawn_masks_estimate_the_elbo(estimator, block_length):
    model = build_model(block_length=block_length)
    expected = -exact_nelbo(model, likelihood_batch(PAIRS))
    runs = scored(model, PAIRS * 150, estimator=estimator).draws.mean(0).view(150, 6)
    error = runs.std(0) / len(runs) ** 0.5
    assert ((runs.mean(0) - expected).abs() < 4 * error).all()
    assert (error / expected.abs()).max() < 0.1


def test_a_block_as_long_as_the_row_is_the_whole_row():
    model = build_model()
    whole = scored(model)
    for block_length in (9, 64):
        model.config.block_length = block_length
        assert torch.equal(scored(model).log_probs, whole.log_probs)
    model.config.block_length = 3
    assert not torch.allclose(scored(model).log_probs.sum(-1), whole.log_probs.sum(-1))


@pytest.mark.parametrize("block_length", [None, 4])
def test_parts_change_neither_score_nor_gradient(block_length):
    results = []
    for tokens in (1, 40, None):
        model = build_model(block_length=block_length)
        score = scored(model, make_pairs(), tokens=tokens)
        (score.log_probs.sum(-1) ** 2).sum().backward()
        results.append((score, [parameter.grad for parameter in model.parameters()]))
    (one, gradients), *others = results
    assert torch.isfinite(one.log_probs).all() and one.draws.shape == (8, 16)
    for score, other in others:
        for name in vars(one):
            assert torch.allclose(getattr(one, name), getattr(score, name), rtol=1e-10, atol=1e-12), name
        assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-10) for a, b in zip(gradients, other, strict=True))


@pytest.mark.parametrize("block_length", [None, 4])
def test_score_and_gradient_are_those_of_the_definition(block_length):
    """Σ weight · log p of masked tokens, one row and one draw at a time, in plain PyTorch."""
    rows, model = make_pairs(2), build_model(block_length=block_length)
    batch = likelihood_batch(rows)
    score = scored(model, rows)
    score.log_probs.sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    ids, lengths = batch["input_ids"], batch["attention_mask"].sum(-1)
    noise = draw_masks(
        ids,
        batch["labels"] != -100,
        model.config,
        **{"estimator": "elbo", "draws": 8, "seed": 0, "index": batch["index"], "step": 0},
        block_ids=block_ids_of(block_length, None, None, ids.shape),
    )
    for draw, row in itertools.product(range(8), range(len(ids))):
        at, length = draw * len(ids) + row, lengths[row]
        noisy, labels = noise.noisy_input_ids[at : at + 1, :length], noise.labels[at, :length]
        blocks = {} if block_length is None else {"clean_input_ids": ids[row : row + 1, :length]}
        log_probs = model(noisy, **blocks).logits[0].log_softmax(-1)
        masked = labels != -100
        terms = noise.weights[at, :length][masked] * log_probs[masked].gather(-1, labels[masked][:, None])[:, 0]
        assert terms.sum().item() == pytest.approx(score.draws[draw, row].item(), rel=1e-9)
        (terms.sum() / 8).backward()
        right = (log_probs.argmax(-1)[masked] == labels[masked]).sum()
        score.right[row] -= right
        score.masked[row] -= masked.sum()
    assert not score.right.any() and not score.masked.any()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, gradients[name], rtol=1e-8, atol=1e-10), name


def test_log_probs_are_float32_where_the_model_computes_in_bfloat16():
    model = build_model().bfloat16()
    score = scored(model)
    assert score.log_probs.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert scored(build_model().float()).log_probs.dtype == torch.float32


@torch.no_grad()
def variance(model, reference, count, draws, estimator="elbo"):
    """Of the log-ratio of an answer, over independent draws of all its masks: the mean over answers."""
    rows = make_pairs(4) * count  # each answer again and again, under other keys
    settings = {"draws": draws, "estimator": estimator}
    ratios = scored(model, rows, **settings).draws - scored(reference, rows, reference=True, **settings).draws
    return ratios.mean(0).view(count, 8).var(0).mean().item()


def test_shared_masks_take_the_noise_away_and_twice_the_masks_half_of_the_rest():
    model = build_model()
    reference = nudged(model, 0.02)
    four = variance(model, reference, 400, 4)
    assert variance(model, reference, 100, 4, "naive") > 100 * four
    assert variance(model, reference, 400, 8) == pytest.approx(four / 2, rel=0.2)
    assert variance(model, model, 3, 2) == 0
