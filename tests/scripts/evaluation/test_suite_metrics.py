"""Figures of an evaluation against closed forms, hand-counted answers and simulated noise."""

import math
import random
from statistics import NormalDist

import pytest

from nanollada.scripts.evaluation.metrics import (
    answer_f1,
    answer_match,
    decisions,
    distinct,
    repetition,
    unigram_entropy,
    units,
    win_probability,
)

# ---- decisions under noise


def test_how_often_noise_decides():
    two = win_probability(0, [1.0, 2.0], [0.25, 0.75])
    assert two == pytest.approx(NormalDist().cdf(1.0))  # difference 1, variance 1
    assert sum(win_probability(i, [1.0, 1.5, 1.2], [0.1, 0.2, 0.3]) for i in range(3)) == pytest.approx(1, abs=0.005)
    scores, variances = [1.0, 1.4, 1.2, 3.0], [0.09, 0.25, 0.0, 1.0]
    rng = random.Random(0)
    draws = [[rng.gauss(s, math.sqrt(v)) for s, v in zip(scores, variances, strict=True)] for _ in range(20_000)]
    for place in range(4):
        simulated = sum(row.index(min(row)) == place for row in draws) / len(draws)
        assert win_probability(place, scores, variances) == pytest.approx(simulated, abs=0.012)
    assert win_probability(0, [1.0, 2.0, 3.0], [0.0] * 3) == 1 and win_probability(1, [1.0, 2.0, 3.0], [0.0] * 3) == 0


def test_decisions_count_the_first_of_the_lowest():
    scores, noise = [[1.0, 2.0], [2.0, 1.0], [3.0, 3.0], [1.0, 2.0]], [[0.0, 0.0]] * 4
    found = decisions(scores, noise, [0, 0, 0, 1])
    assert found["value"] == 0.5 and found["open_share"] == found["mask_error"] == 0
    noisy = decisions(scores, [[0.5, 0.5]] * 4, [0, 0, 0, 1])
    right = [NormalDist().cdf(1), NormalDist().cdf(-1), 0.5, NormalDist().cdf(-1)]
    assert noisy["open_share"] == pytest.approx((3 * NormalDist().cdf(-1) + 0.5) / 4)
    assert noisy["mask_error"] == pytest.approx(math.sqrt(sum(q * (1 - q) for q in right)) / 4)
    assert (noisy["value"], noisy["standard_error"]) == (found["value"], found["standard_error"])


# ---- answers


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("The cat, a well-known one!", "en", ["cat", "wellknown", "one"]),
        ("An apple costs $3.50", "en", ["apple", "costs", "350"]),
        ("范廷颂是什么？", "zh", list("范廷颂是什么")),
        ("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』", "zh", []),  # all of CMRC's list,
        (".,%$()'\"!?;‘…—", "zh", [".,%$()'\"!?;‘…—"]),  # and nothing else
        ("GPT-4模型,在2023年。", "zh", ["gpt4", "模", "型", ",", "在", "2023", "年"]),
        ("3.14%，约1,000", "zh", ["3.14%", "约", "1,000"]),
        ("10–20 €5", "en", ["10–20", "€5"]),  # SQuAD deletes ASCII punctuation alone,
        ("The’s a–b", "en", ["’s", "–b"]),  # and articles beside any other
        ("the 张伟 of A", "en", ["张", "伟", "of"]),  # mixed text: articles go, characters stand alone
        ("the A座", "zh", ["the", "a", "座"]),  # no articles in Chinese
        ("  ·、  ", "zh", []),
    ],
)
def test_units(text, language, expected):
    assert units(text, language) == expected


@pytest.mark.parametrize(
    ("answer", "references", "language", "match", "f1"),
    [
        ("the Denver Broncos", ["Denver Broncos"], "en", True, 1.0),
        ("Broncos of Denver", ["Denver Broncos"], "en", False, 2 * 2 / (3 + 2)),  # whatever the order
        ("in 1963, maybe", ["1963"], "en", False, 2 * 1 / (3 + 1)),
        ("Berlin", ["Paris", "Berlin wall"], "en", False, 2 / 3),  # the best reference
        ("London", ["Paris"], "en", False, 0.0),
        ("the", ["a"], "en", True, 1.0),  # both empty
        ("", ["Paris"], "en", False, 0.0),
        ("1963 年。", ["1963年"], "zh", True, 1.0),
        ("他在1963年出生", ["1963年"], "zh", False, 2 * 2 / (6 + 2)),  # 他 在 1963 年 出 生
        ("生出年1963", ["1963年"], "zh", False, 2 * 1 / (4 + 2)),  # the longest run, not the units in common
        ("GPT-4", ["gpt4"], "zh", True, 1.0),
        ("1.5", ["15"], "zh", False, 0.0),
        ("50%", ["50"], "zh", False, 0.0),
        ("3.14", ["3.15"], "zh", False, 0.0),
        ("New York", ["newyork"], "zh", True, 1.0),
    ],
)
def test_answers(answer, references, language, match, f1):
    assert answer_match(answer, references, language) == match
    assert answer_f1(answer, references, language) == pytest.approx(f1)


# ---- variety


def test_variety():
    assert [distinct([1, 2, 1, 2, 1], n) for n in (1, 2, 3, 5)] == [2 / 5, 2 / 4, 2 / 3, 1.0]
    assert distinct([1, 2], 3) is None and unigram_entropy([]) is None and repetition([1, 2, 3]) is None
    assert unigram_entropy([1, 2, 3, 4]) == pytest.approx(math.log(4)) and unigram_entropy([7, 7]) == 0
    assert unigram_entropy([1, 1, 1, 2]) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert repetition([1, 2, 3, 4, 5]) == 0 and repetition([1] * 10) == pytest.approx(6 / 7)
