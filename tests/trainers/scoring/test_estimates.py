"""Standard errors against closed forms, the delta method by covariances, a bootstrap and repeated draws."""

import math
import random
from statistics import NormalDist, covariance, variance

import pytest

from nanollada.trainers.scoring.estimates import mean, ratio, share, wilson
from nanollada.trainers.scoring.likelihood import Likelihood


def test_a_share_and_its_errors():
    found = share([True] * 3 + [False])
    assert (found["value"], found["rows"]) == (0.75, 4)
    assert found["standard_error"] == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    none, every = share([False] * 100), share([True] * 100)
    assert none["standard_error"] == every["standard_error"] == 0
    z2 = NormalDist().inv_cdf(0.975) ** 2  # Wilson at p = 0: z² / (n + z²)
    assert none["interval"] == [pytest.approx(0), pytest.approx(z2 / (100 + z2))]
    assert every["interval"] == [pytest.approx(100 / (100 + z2)), pytest.approx(1)]
    low, high = share([True] * 81 + [False] * 182)["interval"]
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)  # Newcombe 1998, Table I, 81 of 263, score method


def test_wilsons_ends_are_where_the_share_is_a_standard_error_s_quantile_away():
    """Roots of |p - q| = z √(q(1 - q)/n), with the ends themselves at none and all."""
    z = NormalDist().inv_cdf(0.975)
    for count in (1, 2, 10, 200):
        for right in range(count + 1):
            share_of = right / count
            low, high = wilson(share_of, count)
            assert 0 <= low <= share_of <= high <= 1 and (low == 0) == (right == 0) and (high == 1) == (right == count)
            for end in {low, high} - {0.0, 1.0}:
                assert abs(share_of - end) == pytest.approx(z * math.sqrt(end * (1 - end) / count))


def test_means_and_ratios():
    assert mean([1.0, 2.0, 6.0]) == {"value": 3.0, "standard_error": pytest.approx(math.sqrt(7 / 3)), "rows": 3}
    assert mean([5.0]) == {"value": 5.0, "standard_error": None, "rows": 1}
    assert ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == {"value": 2.0, "standard_error": 0.0}
    rng, values = random.Random(0), []
    for _ in range(2000):  # the error is the spread over repeated draws of 50 rows
        bottoms = [rng.uniform(1, 9) for _ in range(50)]
        values.append(ratio([3 * size + rng.gauss(0, 2) * size**0.5 for size in bottoms], bottoms))
    spread = math.sqrt(sum((found["value"] - 3) ** 2 for found in values) / 2000)
    stated = math.sqrt(sum(found["standard_error"] ** 2 for found in values) / 2000)
    assert stated == pytest.approx(spread, rel=0.06)


def rows_of(count, seed=0):
    """Nats and bytes of so many texts; longer ones have more of both."""
    rng = random.Random(seed)
    sizes = [float(rng.randint(20, 400)) for _ in range(count)]
    return [1.3 * size + rng.gauss(0, 4) * size**0.5 for size in sizes], sizes


def likelihood_of(nats, sizes):
    moments = [
        math.fsum(a * b for a, b in zip(*pair, strict=True)) for pair in ((nats, nats), (nats, sizes), (sizes, sizes))
    ]
    return Likelihood.from_sums([math.fsum(nats), 0.0, 100, math.fsum(sizes), len(nats), *moments], False, "exact")


@pytest.mark.parametrize("count", [2, 3, 50])
def test_the_delta_method_by_covariances(count):
    """Var(T / B) ≈ (s_tt − 2 R s_tb + R² s_bb) / (n · mean(B)²)."""
    nats, sizes = rows_of(count)
    found, value = ratio(nats, sizes), sum(nats) / sum(sizes)
    assert found["value"] == pytest.approx(value)
    spread = variance(nats) - 2 * value * covariance(nats, sizes) + value**2 * variance(sizes)
    assert found["standard_error"] == pytest.approx(math.sqrt(spread / count) / (sum(sizes) / count))


def test_a_bootstrap_finds_the_same_error():
    nats, sizes = rows_of(200)
    rng, values = random.Random(1), []
    for _ in range(2000):
        chosen = rng.choices(range(200), k=200)
        values.append(sum(nats[i] for i in chosen) / sum(sizes[i] for i in chosen))
    assert ratio(nats, sizes)["standard_error"] == pytest.approx(math.sqrt(variance(values)), rel=0.06)


@pytest.mark.parametrize("count", [1, 2, 50])
def test_sums_of_squares_say_what_rows_say(count):
    """A likelihood keeps moments alone, which add up over processes: the same error, in bits."""
    nats, sizes = rows_of(count)
    found, error = likelihood_of(nats, sizes), ratio(nats, sizes)["standard_error"]
    expected = None if error is None else pytest.approx(error / math.log(2), rel=1e-9)
    assert found.bits_per_byte_sampling_error == expected


def test_rounding_below_zero_is_no_error():
    proportional = [0.1 * size for size in range(1, 200)]
    assert likelihood_of(proportional, [float(size) for size in range(1, 200)]).bits_per_byte_sampling_error < 1e-6
