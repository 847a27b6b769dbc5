"""Likelihoods against definitions: orders, sums over all texts, and each other."""

import itertools
import math

import pytest
import torch

from nanollada.modeling_nanollada import NanoLLaDAConfig, NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM
from nanollada.trainers.corruption import MASK_COUNTS, NOISE_SCHEDULES, corrupt
from nanollada.trainers.likelihood import (
    Likelihood,
    causal_nll,
    conditional_rows,
    evaluate_likelihood,
    exact_nelbo,
    masked_nats,
    monte_carlo_nelbo,
)


def build(model_class, vocabulary=7, scale=8.0):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = model_class(NanoLLaDAConfig(vocab_size=vocabulary, **shape)).double().eval()
    with torch.no_grad():  # a model with opinions
        for parameter in model.parameters():
            parameter.mul_(scale) if parameter.dim() == 2 else None
    return model.requires_grad_(False)


def rows(ids, prompt=1):
    ids = torch.tensor(ids)
    labels = ids.clone()
    labels[:, :prompt] = -100
    return {
        "input_ids": ids,
        "labels": labels,
        "index": torch.arange(len(ids)),
        "num_bytes": torch.full((len(ids),), 2 * (ids.shape[1] - prompt)),
    }


def all_texts(length, tokens):
    return [[0, *text] for text in itertools.product(tokens, repeat=length)]


def subset_table(model, ids):
    """Nats of every subset of the targets 1..L being masked at once: {subset: Σ CE}."""
    length = len(ids) - 1
    subsets = [s for k in range(1, length + 1) for s in itertools.combinations(range(1, length + 1), k)]
    masked = torch.zeros(len(subsets), len(ids), dtype=torch.bool)
    for row, subset in enumerate(subsets):
        masked[row, list(subset)] = True
    nats = masked_nats(model, rows([ids] * len(subsets)), masked)
    return dict(zip(subsets, nats.tolist(), strict=True))


def test_exact_bound_is_the_mean_over_orders():
    """The any-order autoregressive identity (LLaDA, Section 2.1)."""
    model, ids = build(NanoLLaDAForMaskedLM), [0, 4, 6, 5, 4]
    total, orders = 0.0, list(itertools.permutations(range(1, 5)))
    for order in orders:
        hidden = torch.tensor([[False, True, True, True, True]])
        for place in order:
            logits = model(torch.tensor([ids]).masked_fill(hidden, 3)).logits
            total -= logits[0, place].log_softmax(-1)[ids[place]].item()
            hidden[0, place] = False
    assert exact_nelbo(model, rows([ids])).item() == pytest.approx(total / len(orders), abs=1e-9)


@pytest.mark.parametrize("schedule", NOISE_SCHEDULES)
def test_exact_bound_is_the_papers_integral_for_every_schedule(schedule):
    """Eq. 3 by quadrature over t, and Eq. 6 by summation over counts: the same number."""
    model, ids = build(NanoLLaDAForMaskedLM), [0, 4, 6, 5, 4]
    table, schedule, length = subset_table(model, ids), NOISE_SCHEDULES[schedule], 4
    exact = exact_nelbo(model, rows([ids])).item()
    t = (torch.arange(20001, dtype=torch.double) + 0.5) / 20001
    rate, weight = schedule.mask_rate(t), schedule.slope(t) / schedule.mask_rate(t)
    eq3 = sum((weight * rate ** len(s) * (1 - rate) ** (length - len(s))).mean().item() * n for s, n in table.items())
    eq6 = sum(n / len(s) / math.comb(length, len(s)) for s, n in table.items())
    assert eq3 == pytest.approx(exact, rel=1e-6)
    assert eq6 == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("mask_count", MASK_COUNTS)
def test_training_estimators_have_the_exact_bound_as_expectation(mask_count):
    model, ids, draws = build(NanoLLaDAForMaskedLM), [0, 4, 6, 5, 4, 6], 20000
    table = subset_table(model, ids)
    index = torch.arange(draws)
    inputs = torch.tensor(ids).expand(draws, -1)
    targets = torch.arange(6).expand(draws, -1) > 0
    noise = corrupt(
        inputs, targets, 3, seed=0, index=index, rank=index, epoch=index * 0, mask_count=mask_count, time_epsilon=1e-5
    )
    nats = [table.get(tuple(row.nonzero()[:, 0].tolist()), 0.0) for row in noise.masked_indices]
    losses = torch.tensor(nats, dtype=torch.double) * noise.weights.amax(-1)
    error = losses.std().item() / math.sqrt(draws)
    assert abs(losses.mean().item() - exact_nelbo(model, rows([ids])).item()) <= 3 * error


def test_probabilities_do_not_sum_to_more_than_one():
    """Over all texts of three tokens: AR sums to one, the bound to less. An ELBO above it would be mis-normalised."""
    tokens = [0, 1, 2, 4, 5, 6]  # all but the mask
    batch = rows(all_texts(3, tokens))
    bound = exact_nelbo(build(NanoLLaDAForMaskedLM), batch)
    assert 0.05 < (-bound).exp().sum().item() <= 1
    batch = rows(all_texts(3, [*tokens, 3]))
    assert (-causal_nll(build(NanoLLaDAForCausalLM), batch)).exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_monte_carlo_agrees_with_enumeration():
    model = build(NanoLLaDAForMaskedLM)
    batch = rows([[0, 4, 6, 5, 4, 6, 1], [0, 6, 6, 1, 2, 5, 4], [0, 1, 2, 1, 2, 1, 2]])
    exact = exact_nelbo(model, batch)
    estimate, variance = monte_carlo_nelbo(model, batch, samples=2000, seed=0, batch_size=1500)
    assert ((estimate - exact).abs() <= 3 * variance.sqrt()).all()
    assert (variance.sqrt() < 0.05 * exact).all()


def test_monte_carlo_standard_error_is_calibrated():
    """Over many seeds the estimates scatter as their own errors say."""
    model, batch = build(NanoLLaDAForMaskedLM), rows([[0, 4, 6, 5, 4, 6, 1]])
    many = {name: value.expand(600, *value.shape[1:]) for name, value in batch.items()}
    many["index"] = torch.arange(600)  # 600 rows with the same text and other noise
    estimates, variances = monte_carlo_nelbo(model, many, samples=8, seed=3)
    assert variances.mean().sqrt().item() == pytest.approx(estimates.std().item(), rel=0.15)
    exact = exact_nelbo(model, batch).item()
    assert abs(estimates.mean().item() - exact) <= 3 * estimates.std().item() / math.sqrt(600)


def test_monte_carlo_noise_belongs_to_the_row():
    model, batch = build(NanoLLaDAForMaskedLM), rows([[0, 4, 6, 5, 4], [0, 6, 6, 1, 2]])
    both, _ = monte_carlo_nelbo(model, batch, samples=6, seed=1)
    one, _ = monte_carlo_nelbo(
        model, {name: value[1:] for name, value in batch.items()}, samples=6, seed=1, batch_size=2
    )
    torch.testing.assert_close(one, both[1:])


def test_conditions_are_not_scored():
    """−100 is condition: scoring the rest adds up by the chain rule for AR."""
    model, ids = build(NanoLLaDAForCausalLM), [[0, 4, 6, 5, 4]]
    first = rows(ids)
    first["labels"] = first["labels"].masked_fill(torch.arange(5) > 2, -100)
    torch.testing.assert_close(
        causal_nll(model, rows(ids)), causal_nll(model, first) + causal_nll(model, rows(ids, prompt=3))
    )


def test_one_target_is_the_cross_entropy_itself():
    model, ids = build(NanoLLaDAForMaskedLM), [[0, 4, 6, 5]]
    logits = model(torch.tensor([[0, 4, 6, 3]])).logits
    assert exact_nelbo(model, rows(ids, prompt=3)).item() == pytest.approx(-logits[0, 3].log_softmax(-1)[5].item())


def test_ar_and_diffusion_count_the_same_tokens_and_bytes():
    batches = [rows([[0, 4, 6, 5, 4], [0, 6, 6, 1, 2]]), rows([[0, 4, 5, 1, 1]])]
    causal = evaluate_likelihood(build(NanoLLaDAForCausalLM), batches)
    masked = evaluate_likelihood(build(NanoLLaDAForMaskedLM), batches, samples=4)
    assert (causal.tokens, causal.bytes, causal.rows) == (masked.tokens, masked.bytes, masked.rows) == (12, 24, 3)
    assert not causal.bound and causal.standard_error == 0 and causal.estimator == "exact"
    assert masked.bound and masked.standard_error > 0 and "4 stratified masks a row" in masked.estimator
    nats = sum(causal_nll(build(NanoLLaDAForCausalLM), batch).sum().item() for batch in batches)
    assert causal.bits_per_byte == pytest.approx(nats / math.log(2) / 24)
    assert causal.nats_per_token == pytest.approx(nats / 12)


def test_few_targets_are_enumerated():
    model, batch = build(NanoLLaDAForMaskedLM), rows([[0, 4, 6, 5]])
    result = evaluate_likelihood(model, [batch], samples=8)
    assert result.estimator == "exact enumeration of all masks" and result.standard_error == 0
    assert result.nats == pytest.approx(exact_nelbo(model, batch).item())


def test_parts_add_up_and_the_sampling_error_is_the_ratio_estimators():
    model = build(NanoLLaDAForCausalLM)
    torch.manual_seed(1)
    batches = [rows(torch.randint(4, 7, (1, 3 + n % 4)).tolist()) for n in range(40)]
    whole = evaluate_likelihood(model, batches)
    parts = [evaluate_likelihood(model, batches[at::2]) for at in (0, 1)]
    sums = [sum(pair) for pair in zip(*(part.sums() for part in parts), strict=True)]
    together = Likelihood.from_sums(sums, False, "exact")
    assert together.sums() == pytest.approx(whole.sums())
    assert together.to_dict()["bits_per_byte"] == whole.to_dict()["bits_per_byte"] == whole.bits_per_byte
    pairs = [(causal_nll(model, batch).item(), batch["input_ids"].shape[1] - 1) for batch in batches]
    ratio = whole.nats_per_token
    residual = sum((nats - ratio * tokens) ** 2 for nats, tokens in pairs) * 40 / 39
    expected = math.sqrt(residual) / math.log(2) / whole.bytes
    assert whole.bits_per_byte_sampling_error == pytest.approx(expected)


def test_conditional_rows_score_targets_given_prompts():
    model = build(NanoLLaDAForCausalLM)
    batches = list(conditional_rows([[0, 4], [0], [5, 5, 5]], [[6], [1, 2], [4]], pad_token_id=0, batch_size=2))
    nats = torch.cat([causal_nll(model, batch) for batch in batches])
    alone = [causal_nll(model, rows(ids, prompt=p)).item() for ids, p in (([[0, 4, 6]], 2), ([[0, 1, 2]], 1))]
    torch.testing.assert_close(nats[:2], torch.tensor(alone, dtype=torch.double))
    assert len(nats) == 3
    masked = torch.cat([exact_nelbo(build(NanoLLaDAForMaskedLM), batch) for batch in batches])
    assert torch.isfinite(masked).all()


def test_refusals():
    model, batch = build(NanoLLaDAForMaskedLM), rows([[0, *([4] * 13)]])
    with pytest.raises(ValueError, match="at most 12 target tokens, got 13"):
        exact_nelbo(model, batch)
    with pytest.raises(ValueError, match="`samples` must be a positive even number.*got 3"):
        monte_carlo_nelbo(model, batch, samples=3, seed=0)
    with pytest.raises(ValueError, match="`labels` must be -100 at position 0"):
        causal_nll(build(NanoLLaDAForCausalLM), rows([[4, 5]], prompt=0))
    with pytest.raises(ValueError, match="`batches` must hold at least one row"):
        evaluate_likelihood(model, [])
    with pytest.raises(ValueError, match="`prompts` and `targets` must pair up, got 1 and 0"):
        list(conditional_rows([[0]], [], 0))
    with pytest.raises(ValueError, match="must not be empty, got an empty one in pair 1"):
        list(conditional_rows([[0], []], [[1], [1]], 0))
