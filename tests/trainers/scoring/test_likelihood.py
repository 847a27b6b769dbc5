"""Likelihoods against definitions: orders, sums over all texts, and each other."""

import itertools
import math

import pytest
import torch

from nanollada.modeling_nanollada import NanoLLaDAConfig, NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM
from nanollada.trainers.noise.masking import MASK_COUNTS, corrupt
from nanollada.trainers.noise.schedules import NOISE_SCHEDULES
from nanollada.trainers.scoring import likelihood
from nanollada.trainers.scoring.continuations import conditional_rows
from nanollada.trainers.scoring.likelihood import (
    Likelihood,
    causal_nll,
    evaluate_likelihood,
    exact_nelbo,
    masked_nats,
    monte_carlo_nelbo,
    scored_block_length,
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
        inputs,
        targets,
        model.config,
        seed=0,
        index=index,
        rank=index,
        epoch=index * 0,
        mask_count=mask_count,
        time_epsilon=1e-5,
    )
    nats = [table.get(tuple(row.nonzero()[:, 0].tolist()), 0.0) for row in noise.supervised]
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
    for n, batch in enumerate(batches):
        batch["num_bytes"] += 3 * (n % 5)  # a token is not always as long
    whole = evaluate_likelihood(model, batches)
    parts = [evaluate_likelihood(model, batches[at::2]) for at in (0, 1)]
    sums = [sum(pair) for pair in zip(*(part.sums() for part in parts), strict=True)]
    together = Likelihood.from_sums(sums, False, "exact")
    assert together.sums() == pytest.approx(whole.sums())
    assert together.to_dict()["bits_per_byte"] == whole.to_dict()["bits_per_byte"] == whole.bits_per_byte
    pairs = [(causal_nll(model, batch).item(), batch["num_bytes"].item()) for batch in batches]
    ratio = whole.nats / whole.bytes
    residual = sum((nats - ratio * size) ** 2 for nats, size in pairs) * 40 / 39
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


# ---- blocks

TEXTS = [[0, 4, 6, 5, 4, 6, 1, 2, 5], [0, 6, 6, 1, 2, 5, 4, 4, 1]]


def pick(batch, chosen):
    return {name: value[chosen] for name, value in batch.items()}


def packed(*parts, width):
    """A row that packs documents, and padding up to `width`."""
    ids = [token for part in parts for token in part]
    labels = [label for part in parts for label in (-100, *part[1:])]
    documents = [number for number, part in enumerate(parts) for _ in part]
    positions = [place for part in parts for place in range(len(part))]
    pads = width - len(ids)
    columns = {"input_ids": (ids, 0), "labels": (labels, -100), "document_ids": (documents, -1)}
    columns |= {"position_ids": (positions, 0), "attention_mask": ([1] * len(ids), 0)}
    row = {name: torch.tensor([column + [fill] * pads]) for name, (column, fill) in columns.items()}
    return {**row, "index": torch.tensor([len(ids)]), "num_bytes": torch.tensor([1])}


def block_loop(model, ids, labels, block_length):
    """Nats of one document, by definition: block after block, with its clean prefix and nothing behind it."""
    total = 0.0
    for start in range(0, len(ids), block_length):
        block = range(start, min(start + block_length, len(ids)))
        targets = [place for place in block if labels[place] != -100]
        for k in range(1, len(targets) + 1):
            weight = math.factorial(k - 1) * math.factorial(len(targets) - k) / math.factorial(len(targets))
            for subset in itertools.combinations(targets, k):
                noisy = torch.tensor([[3 if i in subset else ids[i] for i in range(block[-1] + 1)]])
                logits = model(noisy, block_length=block_length).logits[0].log_softmax(-1)
                total -= weight * sum(logits[i, ids[i]].item() for i in subset)
    return total


@pytest.mark.parametrize("block_length", [1, 2, 4, 7, 9])
@pytest.mark.parametrize("prompt", [1, 3])
def test_exact_block_bound_is_the_loop_over_blocks(block_length, prompt):
    """Also where blocks do not divide the row (2, 4, 7) and where the prompt ends inside a block."""
    model, batch = build(NanoLLaDAForMaskedLM), rows(TEXTS, prompt)
    pairs = zip(TEXTS, batch["labels"].tolist(), strict=True)
    loop = [block_loop(model, ids, labels, block_length) for ids, labels in pairs]
    exact = exact_nelbo(model, batch, block_length)
    assert (exact - torch.tensor(loop, dtype=torch.double)).abs().max() <= 1e-10
    torch.testing.assert_close(exact_nelbo(model, batch, block_length, batch_size=5), exact, atol=1e-10, rtol=0)


def test_blocks_of_the_whole_row_are_the_whole_row():
    model, batch = build(NanoLLaDAForMaskedLM), rows(TEXTS)
    for length in (9, 100, 0):
        assert torch.equal(exact_nelbo(model, batch, length), exact_nelbo(model, batch))
        for whole, block in zip(
            monte_carlo_nelbo(model, batch, 6, 0),
            monte_carlo_nelbo(model, batch, 6, 0, block_length=length),
            strict=True,
        ):
            assert torch.equal(whole, block)
    assert (exact_nelbo(model, batch, 4) - exact_nelbo(model, batch)).abs().max() > 0.1


def test_block_one_is_the_chain_rule_of_the_mask_query_model():
    """By definition: −Σ log p(x_i | x_<i, M) of the same weights under causal attention."""
    model, causal = build(NanoLLaDAForMaskedLM), build(NanoLLaDAForCausalLM)
    assert causal.load_state_dict(model.state_dict())
    totals = []
    for ids in TEXTS:
        total = 0.0
        for place in range(1, len(ids)):
            logits = causal(torch.tensor([[*ids[:place], 3]]), use_cache=False).logits[0, -1]
            logits[3] = -torch.inf
            total -= logits.log_softmax(-1)[ids[place]].item()
        totals.append(total)
    assert (exact_nelbo(model, rows(TEXTS), 1) - torch.tensor(totals, dtype=torch.double)).abs().max() <= 1e-6


@pytest.mark.parametrize(("block_length", "low", "high"), [(1, 1 - 1e-9, 1 + 1e-9), (2, 0.05, 1), (3, 0.05, 1)])
def test_block_probabilities_do_not_sum_to_more_than_one(block_length, low, high):
    batch = rows(all_texts(4, [0, 1, 2, 4, 5, 6]))  # all but the mask
    mass = (-exact_nelbo(build(NanoLLaDAForMaskedLM), batch, block_length)).exp().sum().item()
    assert low <= mass <= high


@pytest.mark.parametrize("block_length", [1, 2, 4, 9])
def test_monte_carlo_agrees_with_block_enumeration(block_length):
    model, batch = build(NanoLLaDAForMaskedLM), rows(TEXTS)
    exact = exact_nelbo(model, batch, block_length)
    estimate, variance = monte_carlo_nelbo(model, batch, 1000, seed=0, batch_size=500, block_length=block_length)
    assert ((estimate - exact).abs() <= 3 * variance.sqrt() + 1e-9).all()
    assert (variance.sqrt() < 0.05 * exact).all()
    if block_length == 1:
        assert variance.max() < 1e-20
        one, _ = monte_carlo_nelbo(model, batch, 2, seed=0, block_length=1)
        torch.testing.assert_close(one, exact, atol=1e-10, rtol=0)


@pytest.mark.parametrize("block_length", [2, 4])
def test_block_standard_error_is_calibrated(block_length):
    model, batch = build(NanoLLaDAForMaskedLM), rows(TEXTS[:1])
    many = {name: value.expand(600, *value.shape[1:]) for name, value in batch.items()}
    many["index"] = torch.arange(600)
    estimates, variances = monte_carlo_nelbo(model, many, samples=4, seed=3, block_length=block_length)
    assert variances.mean().sqrt().item() == pytest.approx(estimates.std().item(), rel=0.15)
    exact = exact_nelbo(model, batch, block_length).item()
    assert abs(estimates.mean().item() - exact) <= 3 * estimates.std().item() / math.sqrt(600)


def masks_of(monkeypatch, batch, samples, seed=3, **options):
    """The masks that Monte Carlo asks for, `[samples, B, L]`."""
    seen = []

    def record(model, batch, masked, *rest):
        seen.append(masked)
        return torch.zeros(len(masked), dtype=torch.double)

    with monkeypatch.context() as patch:
        patch.setattr(likelihood, "masked_nats", record)
        monte_carlo_nelbo(build(NanoLLaDAForMaskedLM), batch, samples, seed, **options)
    return torch.stack(seen)


def test_whole_row_noise_is_what_it_was(monkeypatch):
    """Scores are quoted by their seed: the masks must not change between versions."""
    batch = rows([[0, 4, 6, 5, 4, 6, 1], [0, 6, 6, 1, 2, 5, 4]]) | {"index": torch.tensor([0, 7])}
    masks = [["".join(map(str, row)) for row in draw] for draw in masks_of(monkeypatch, batch, 4).long().tolist()]
    assert masks == [["0000001", "0000100"], ["0100101", "0100000"], ["0110101", "0111101"], ["0111101", "0111010"]]


def test_counts_are_spread_over_draws_and_over_blocks(monkeypatch):
    """Eight blocks of four targets: every draw has each count twice, and so has every block over eight draws."""
    batch = rows([[5] * 32] * 3, prompt=0)
    counts = masks_of(monkeypatch, batch, 8, block_length=4).view(8, 3, 8, 4).sum(-1)  # [S, B, K]
    expected = torch.tensor([1, 1, 2, 2, 3, 3, 4, 4])
    assert torch.equal(counts.sort(-1).values, expected.expand(8, 3, -1))
    assert torch.equal(counts.permute(1, 2, 0).sort(-1).values, expected.expand(3, 8, -1))
    assert not torch.equal(counts[:, 0], counts[:, 1])
    counts = masks_of(monkeypatch, batch, 2, block_length=4).view(2, 3, 8, 4).sum(-1)  # a single stratum of draws
    assert torch.equal(counts.sort(-1).values, expected.expand(2, 3, -1))


def test_packed_documents_score_like_documents_alone():
    model, parts = build(NanoLLaDAForMaskedLM), ([0, 4, 6, 5, 4, 6], [0, 1], [0, 2, 2, 5, 1, 1, 4])
    for block_length in (1, 2, 4, 7):
        alone = sum(exact_nelbo(model, rows([part]), block_length).item() for part in parts)
        loop = sum(block_loop(model, part, [-100, *part[1:]], block_length) for part in parts)
        together = exact_nelbo(model, packed(*parts, width=18), block_length).item()
        assert together == pytest.approx(alone, abs=1e-10) and together == pytest.approx(loop, abs=1e-10)
    estimate, variance = monte_carlo_nelbo(
        model, packed(*parts, width=18), 400, seed=0, batch_size=200, block_length=4
    )
    exact = exact_nelbo(model, packed(*parts, width=18), 4)
    assert (estimate - exact).abs() <= 3 * variance.sqrt()


@pytest.mark.parametrize("block_length", [0, 1, 5, 8])
def test_scores_do_not_depend_on_the_batch(block_length):
    """Rows of several documents and lengths, shorter and longer than a block, padded and not."""
    model = build(NanoLLaDAForMaskedLM)
    parts = [([0, 4, 6, 5, 4, 6], [0, 1], [0, 2, 2, 5, 1, 1]), ([0, 4, 4], [0, 2, 5]), ([0, 4, 6, 5, 4, 6, 1, 2, 5],)]
    padded = [packed(*part, width=14) for part in parts]
    batch = {name: torch.cat([row[name] for row in padded]) for name in padded[0]}
    whole = evaluate_likelihood(model, [batch], samples=8, block_length=block_length)
    alone = [packed(*part, width=sum(map(len, part))) for part in parts]
    for row in alone:
        del row["attention_mask"]
    singles = evaluate_likelihood(model, alone, samples=8, block_length=block_length)
    assert singles.sums() == pytest.approx(whole.sums(), rel=1e-10, abs=1e-18)


def test_a_prompt_is_seen_inside_its_block_and_before_it():
    model, prompts = build(NanoLLaDAForMaskedLM), [[0, 4, 6, 5, 4, 6], [0, 4]]
    answers = [[1, 2, 5], [6, 6, 1, 2, 4]]
    (batch,) = conditional_rows(prompts, answers, pad_token_id=0)
    exact = exact_nelbo(model, batch, 4)
    pairs = zip(prompts, answers, strict=True)
    loop = [block_loop(model, p + a, [-100] * len(p) + a, 4) for p, a in pairs]
    assert (exact - torch.tensor(loop, dtype=torch.double)).abs().max() <= 1e-10
    for place in (1, 5):  # in the block before, and in the block of the answer's beginning
        changed = batch["input_ids"].clone()
        changed[0, place] = 2
        other = exact_nelbo(model, {**batch, "input_ids": changed}, 4)
        assert (other[0] - exact[0]).abs() > 1e-3 and other[1] == exact[1]
    left = {name: value.clone() for name, value in batch.items()}  # the grid is the row's, whatever stands before it
    for name in ("input_ids", "labels", "attention_mask"):
        left[name][1] = batch[name][1].roll(2)
    torch.testing.assert_close(exact_nelbo(model, left, 4), exact, atol=1e-10, rtol=0)
    estimate, variance = monte_carlo_nelbo(model, left, 200, seed=0, block_length=4)
    assert ((estimate - exact).abs() <= 3 * variance.sqrt()).all()
    assert exact_nelbo(model, {**batch, "labels": torch.full_like(batch["labels"], -100)}, 4).tolist() == [0, 0]


def test_evaluation_takes_the_checkpoints_blocks():
    model, batch = build(NanoLLaDAForMaskedLM), rows(TEXTS)
    whole = evaluate_likelihood(model, [batch], samples=4)
    blocks = evaluate_likelihood(model, [batch], samples=4, block_length=4)
    assert "blocks" not in whole.estimator and blocks.estimator.endswith(
        "4 stratified masks a row, seed 0, blocks of 4"
    )
    assert blocks.standard_error > 0
    model.config.block_length = 4
    assert evaluate_likelihood(model, [batch], samples=4).sums() == blocks.sums()
    assert evaluate_likelihood(model, [batch], samples=4, block_length=0).sums() == pytest.approx(whole.sums())
    exact = evaluate_likelihood(model, [batch], samples=16)
    assert exact.estimator == "exact enumeration of all masks, blocks of 4" and exact.standard_error == 0
    assert exact.nats == pytest.approx(exact_nelbo(model, batch, 4).sum().item())


def test_one_forward_is_exact_at_block_one(monkeypatch):
    model, calls = build(NanoLLaDAForMaskedLM), []
    model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(len(args[0])), with_kwargs=True)
    found = evaluate_likelihood(model, [rows(TEXTS)], samples=2, block_length=1)
    assert calls == [2] and found.estimator == "exact enumeration of all masks, blocks of 1"
    assert found.standard_error == 0


def test_each_row_is_scored_in_its_own_cheaper_way():
    """A short answer is enumerated beside a long one: the score of a row does not depend on its batch."""
    model = build(NanoLLaDAForMaskedLM)
    (batch,) = conditional_rows([[0, 4], [0, 4]], [[6, 5], [6, 6, 1, 2, 4]], pad_token_id=0)
    found = evaluate_likelihood(model, [batch], samples=4)
    assert "exact enumeration" in found.estimator and "Monte Carlo" in found.estimator
    long = monte_carlo_nelbo(model, pick(batch, [1]), 4, seed=0)
    assert found.nats == pytest.approx((exact_nelbo(model, pick(batch, [0])) + long[0]).item())
    assert found.standard_error == pytest.approx(long[1].sqrt().item())


def test_refusals_of_blocks():
    model, causal = build(NanoLLaDAForMaskedLM), build(NanoLLaDAForCausalLM)
    batch = rows([[0, *[4] * 30]])
    with pytest.raises(
        ValueError, match="`batch` must have at most 12 target tokens a block.*got 14 in block 1 of row 0"
    ):
        exact_nelbo(model, batch, 14)
    for call in (exact_nelbo, evaluate_likelihood):
        with pytest.raises(ValueError, match="`block_length` must be at least 1, or 0 for whole rows, got -1"):
            call(model, batch if call is exact_nelbo else [batch], block_length=-1)
    with pytest.raises(ValueError, match="`block_length` is for diffusion models, got 4 with a causal one"):
        evaluate_likelihood(causal, [batch], block_length=4)
    causal.config.block_length = 4  # of the diffusion model that it will become
    assert scored_block_length(causal) is None


def test_refusals():
    model, batch = build(NanoLLaDAForMaskedLM), rows([[0, *([4] * 13)]])
    with pytest.raises(ValueError, match="at most 12 target tokens a block.*got 13 in block 0 of row 0"):
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
