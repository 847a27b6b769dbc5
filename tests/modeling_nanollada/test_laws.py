"""Commit rules one by one against their definitions, and their laws on the toy chain against the table in the docs."""

import itertools
import math
from pathlib import Path

import pytest
import torch
import toy_law
from generation_models import PAD, Oracle, build, seeded

from nanollada.modeling_nanollada import NanoLLaDAGenerationConfig, commit_nanollada
from nanollada.modeling_nanollada.rules_nanollada import RULES, rule_of

DOCUMENT = Path(__file__).parents[2] / "modeling_nanollada" / "DECODING.md"
CLOSED = -math.inf


def random_scores(seed, rows=40, width=7, closed=0.3):
    scores = torch.rand(rows, width, generator=seeded(seed)).double()
    return scores.masked_fill(torch.rand(rows, width, generator=seeded(seed + 1)) < closed, CLOSED)


# ---- rules


def test_equal_shares_sum_to_the_masks():
    for masked, steps in itertools.product(range(1, 20), repeat=2):
        steps = min(steps, masked)
        counts = [
            int(commit_nanollada.commit_quota(torch.tensor([masked]), torch.tensor([steps]), step)[0])
            for step in range(steps + 1)
        ]
        assert sum(counts) == masked and counts[-1] == 0
        assert counts[:steps] == sorted(counts[:steps], reverse=True) and max(counts) - min(counts[:steps]) <= 1


def test_ratio_leaves_the_rounded_share():
    for masked, steps in itertools.product(range(1, 20), repeat=2):
        still_open = masked
        for step in range(steps):
            expected = round(still_open * (1 - (step + 1) / steps) / (1 - step / steps) - 1e-12)
            still_open -= int(
                commit_nanollada.commit_ratio(torch.tensor([still_open]), torch.tensor([steps]), step)[0]
            )
            assert abs(still_open - expected) <= (0 if (steps - step) % 2 else 1)  # halves may round either way
        assert still_open == 0


def test_ramp():
    ramp = commit_nanollada.commit_ramp(torch.tensor([100] * 4), torch.tensor([100, 50, 10, 1]), 0.08, 0.5)
    assert ramp.tolist() == [8, round(50 * 0.29), round(10 * (0.08 + 0.42 * 0.9)), 1]


@pytest.mark.parametrize("seed", range(5))
def test_best_are_the_best(seed):
    scores = random_scores(seed).round(decimals=1)  # with ties
    counts = torch.arange(len(scores)) % 5
    for row, chosen, count in zip(scores, commit_nanollada.best(scores, counts), counts, strict=True):
        order = sorted(range(len(row)), key=lambda index: (-row[index], index))
        expected = [index for index in order if row[index] > CLOSED][: int(count)]
        assert sorted(expected) == chosen.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("factor", [0.2, 0.9, 1.7, 4.0])
def test_factor_takes_the_largest_n(factor):
    for row in random_scores(7):
        chosen = commit_nanollada.within_factor(row[None], factor)[0]
        confidence = sorted((float(value) for value in row if value > CLOSED), reverse=True)
        sizes = [n for n in range(1, len(confidence) + 1) if (n + 1) * (1 - confidence[n - 1]) < factor]
        assert int(chosen.sum()) == max(sizes, default=0)
        assert set(row[chosen].tolist()) == set(confidence[: int(chosen.sum())])


@pytest.mark.parametrize("bound", [0.0, 0.3, 1.0, 10.0])
def test_entropy_bound_takes_the_largest_set(bound):
    for row in random_scores(9):
        entropy = torch.where(row > CLOSED, row, math.inf)
        chosen = commit_nanollada.within_entropy(entropy[None], bound)[0]
        values = sorted(float(value) for value in row if value > CLOSED)
        sizes = [n for n in range(1, len(values) + 1) if sum(values[: n - 1]) <= bound + 1e-15]
        assert int(chosen.sum()) == max(sizes, default=0) and not chosen[entropy.isinf()].any()
        assert sorted(row[chosen].tolist()) == values[: int(chosen.sum())]


def test_hierarchical_takes_the_best_of_every_run():
    for row in random_scores(11, rows=200):
        chosen = commit_nanollada.hierarchical(row[None], 0.9, 0.4)[0]
        expected = {index for index, value in enumerate(row) if value > 0.9}
        for is_open, group in itertools.groupby(range(len(row)), key=lambda index: bool(row[index] > CLOSED)):
            leader = max(group, key=lambda index: float(row[index]))
            if is_open and row[leader] > 0.4:
                expected.add(leader)
        assert set(chosen.nonzero()[:, 0].tolist()) == expected


def test_hierarchical_takes_the_first_of_equals():
    assert commit_nanollada.hierarchical(torch.tensor([[0.5, 0.5, CLOSED, 0.5]]), 0.9, 0.4).tolist() == [[1, 0, 0, 1]]


def test_klass_needs_confidence_and_rest():
    confidence = torch.tensor([[0.95, 0.95, 0.5, 0.95]])
    divergence = torch.tensor([[0.01, 0.2, 0.01, math.inf]])
    assert commit_nanollada.stable(confidence, divergence, 0.9, 0.1).tolist() == [[True, False, False, False]]


def test_klass_divergence_is_that_of_consecutive_steps():
    sampler = toy_law.sampler_for({"threshold": 0.5, "kl_threshold": 0.1})
    first, second = torch.randn(2, 3, 5, generator=seeded(1)).log_softmax(-1).double()
    active = torch.tensor([[True, False, True], [False, True, False]])
    sampler.start_block(4, 3)
    assert sampler.divergence(first, active, torch.tensor([0, 3])).isinf().all()
    active[0, 0] = False
    found = sampler.divergence(second[1:], active, torch.tensor([0, 3]))
    expected = torch.nn.functional.kl_div(first[1:], second[1:], reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("schedule", ["cap", "rescale"])
@pytest.mark.parametrize("eta", [0.0, 0.05, 0.7])
def test_remdm_keeps_the_marginal(schedule, eta):
    """P(masked) after a step to s is 1 − α_s = s whatever σ is, and rates are probabilities."""
    steps = torch.tensor([1, 2, 7, 30])
    for index in range(30):
        sigma, decide = commit_nanollada.remdm_rates(steps, index, schedule, eta)
        now = (steps - index).clamp(min=1) / steps.double()
        later = now - 1 / steps.double()
        going = steps > index
        assert ((0 <= sigma) & (sigma <= 1) & (0 <= decide) & (decide <= 1))[going].all()
        torch.testing.assert_close((now * (1 - decide) + (1 - now) * sigma)[going], later[going], atol=1e-12, rtol=0)
        if eta == 0:
            assert (sigma == 0).all()


# ---- the laws


def test_the_oracle_is_exact():
    rows, law = toy_law.chain()
    assert float(law.sum()) == pytest.approx(1, abs=1e-12)
    masked = torch.full((toy_law.LENGTH,), toy_law.MASK)
    first = toy_law.TABLE[(masked * toy_law.WEIGHTS).sum()][0, :3]
    torch.testing.assert_close(first, toy_law.FIRST)
    known = rows[5].clone()
    known[3] = toy_law.MASK
    exact = toy_law.NEXT[known[2]] * toy_law.NEXT[:, known[4]]
    torch.testing.assert_close(toy_law.TABLE[(known * toy_law.WEIGHTS).sum()][3, :3], exact / exact.sum())


def test_the_documented_table_is_the_computed_one():
    lines = toy_law.table_rows()
    document = DOCUMENT.read_text(encoding="utf-8")
    assert all(line in document for line in lines), "\n".join(line for line in lines if line not in document)
    exact = [name for name in toy_law.RULES if name.startswith("quota, 1") and "LLaDA" not in name]
    assert len(exact) == 4 and all(f"| {name} | 0.000 | 6.00 |" in lines for name in exact)


@pytest.mark.parametrize(
    "name",
    ["quota, 2 a step", "threshold 0.55", "quota, 1 a step, sampled_prob (LLaDA)", "KLASS 0.7, KL 0.05"]
    + ["ReMDM cap 0.1, 6 steps", "ReMDM rescale 0.5, 24 steps"],
)
def test_the_propagated_law_is_that_of_generate(name):
    """The same rule through `generate`, sampled: as far from the propagated law as samples of that law are."""
    rows, law = toy_law.chain()
    oracle = Oracle(rows + 4, law)
    samples = oracle.generate(
        torch.full((20_000, 1), 1), max_new_tokens=6, temperature=1.0, generator=seeded(3), **toy_law.RULES[name]
    )[:, 1:]
    found = torch.bincount(((samples - 4) * toy_law.WEIGHTS).sum(1), minlength=4**6) / 20_000
    expected, _ = toy_law.propagate(toy_law.RULES[name])
    draws = torch.multinomial(expected, 20_000, replacement=True, generator=seeded(4))
    noise = (torch.bincount(draws, minlength=4**6) / 20_000 - expected).abs().sum() / 2
    assert float((found - expected).abs().sum() / 2) < float(noise) + 0.006


# ---- through `generate`


def test_threshold_one_commits_one_token_a_step():
    model, prompt = build(eos_token_id=None), torch.tensor([[5, 6, 7]])
    plain = model.generate(prompt, max_new_tokens=8, return_dict_in_generate=True)
    for settings in ({"threshold": 1.0}, {"factor": 1e-9}, {"threshold": 1.0, "low_threshold": 1.0}):
        found = model.generate(prompt, max_new_tokens=8, return_dict_in_generate=True, **settings)
        assert torch.equal(found.sequences, plain.sequences) and found.tokens_per_forward.tolist() == [1.0]
    everything = model.generate(prompt, max_new_tokens=8, threshold=0.0, return_dict_in_generate=True)
    assert everything.tokens_per_forward.tolist() == [8.0]


def test_max_commits_bounds_every_step():
    model, prompt = build(eos_token_id=None), torch.tensor([[5, 6, 7]])
    for settings in ({"threshold": 0.0}, {"steps": 1}, {"entropy_bound": 100.0}):
        found = model.generate(prompt, max_new_tokens=9, max_commits=3, return_dict_in_generate=True, **settings)
        assert found.tokens_per_forward.tolist() == [3.0], settings


def test_late_eos_waits_for_every_rule():
    model = build(eos_token_id=None)
    run = {"max_new_tokens": 12, "eos_token_id": list(range(4, 34)), "eos_policy": "last", "pad_token_id": PAD}
    for settings in ({"threshold": 0.0}, {"entropy_bound": 100.0}, {"factor": 100.0}):
        found = model.generate(torch.tensor([[40, 41]]), return_dict_in_generate=True, **run, **settings)
        assert float(found.tokens_per_forward) < 12, settings  # EOS-like ones come in a later step


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"threshold": 0.9, "factor": 1.0}, r"Only one of `threshold`, `factor`, .* got \['threshold', 'factor'\]"),
        ({"entropy_bound": 1.0, "remdm": "cap"}, r"Only one of .* got \['entropy_bound', 'remdm'\]"),
        ({"low_threshold": 0.5}, "`low_threshold` refines `threshold`, which must be set, got None"),
        ({"kl_threshold": 0.5}, "`kl_threshold` refines `threshold`, which must be set, got None"),
        ({"threshold": 0.9, "low_threshold": 0.5, "kl_threshold": 0.1}, "Only one of `low_threshold` and `kl_thr"),
        ({"threshold": 0.5, "low_threshold": 0.9}, "`low_threshold` must not exceed `threshold`, got 0.9 and 0.5"),
        ({"threshold": 0.9, "remasking": "random"}, "need probabilities: .* got 'random' and None"),
        ({"factor": 1.0, "position_score": "entropy"}, "need probabilities: .* got None and 'entropy'"),
        ({"remdm": "cap", "max_commits": 2}, "`remdm` decides itself .* got None and 2"),
        ({"remdm": "cap", "eos_policy": "last"}, "`remdm` decides itself .* `eos_policy` must not be 'last', got"),
        ({"remdm": "loop"}, "`remdm` must be one of .* got 'loop'"),
        ({"commit_schedule": "ramp", "steps": 4}, "`steps` must be unset where `commit_schedule` is 'ramp', got 4"),
        ({"commit_schedule": "linear"}, "`commit_schedule` must be one of .* got 'linear'"),
        ({"threshold": -0.1}, "`threshold` must be a number >= 0, got -0.1"),
        ({"max_commits": 0}, "`max_commits` must be an integer >= 1, got 0"),
        ({"remdm_eta": 1.5}, r"`remdm_eta` must be a number in \[0, 1\], got 1.5"),
        ({"ramp_start": 0.0}, r"`ramp_start` must be a number in \(0, 1\], got 0.0"),
    ],
)
def test_refusals(settings, match):
    with pytest.raises(ValueError, match=match):
        build().generate(torch.tensor([[5, 6]]), max_new_tokens=4, **settings)


def test_settings_survive_saving(tmp_path):
    settings = {"threshold": 0.9, "low_threshold": 0.3, "max_commits": 7, "commit_schedule": "ramp", "ramp_end": 0.6}
    NanoLLaDAGenerationConfig(**settings).save_pretrained(tmp_path)
    loaded = NanoLLaDAGenerationConfig.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in settings} == settings
    assert rule_of(loaded) is RULES["hierarchical"]
