"""The figures of a study of post-training, by hand."""

import pytest

from nanollada.scripts.studies.gains import balanced, preference_numbers, summary, wins


def test_a_figure_is_the_mean_over_items_and_seeds():
    figure = summary({1: [1.0, 0.0, 1.0, 1.0], 2: [1.0, 0.0, 0.0, 0.0]})
    assert (figure["value"], figure["items"], figure["seeds"]) == (0.5, 4, [1, 2])
    # over items: means 1, 0, .5, .5, s.d. √(1/6), / √4; over seeds: .75 and .25, s.d. √(1/8), / √2
    assert figure["sampling_error"] == pytest.approx((1 / 6) ** 0.5 / 2)
    assert figure["seed_error"] == pytest.approx(0.25)
    assert figure["standard_error"] == pytest.approx((1 / 24 + 1 / 16) ** 0.5)
    assert summary({3: [1.0, 0.0]})["seed_error"] is None


def test_differences_are_paired():
    one, other = {1: [1.0, 1.0, 0.0], 2: [1.0, 1.0, 0.0, 1.0]}, {2: [0.0, 1.0, 1.0, 0.0], 3: [9.0, 9.0, 9.0]}
    figure = summary(one, other)  # of seed 2 alone: 1, 0, −1, 1
    assert (figure["value"], figure["seeds"]) == (0.25, [2])
    assert figure["sampling_error"] == pytest.approx((11 / 12) ** 0.5 / 2)
    assert summary({1: [1.0, 0.0]}, {1: [1.0, 0.0]})["standard_error"] == 0
    with pytest.raises(ValueError):
        summary({1: [1.0]}, {1: [1.0, 2.0]})


PAIRS = [  # chosen and rejected: log-probability, tokens
    [[-10.0, 5], [-9.0, 3]],  # longer; less likely; −2 a token against −3
    [[-8.0, 4], [-20.0, 8]],  # shorter; likelier; −2 against −2.5
    [[-7.0, 7], [-6.0, 6]],  # longer; less likely; −1 and −1
    [[-5.0, 6], [-4.0, 2]],  # longer; less likely; −0.8 against −2
]
START = [  # the same before
    [[-12.0, 5], [-9.0, 3]],  # learnt: +2 against 0
    [[-8.0, 4], [-23.0, 8]],  # unlearnt: 0 against +3
    [[-8.0, 7], [-7.0, 6]],  # +1 and +1
    [[-9.0, 6], [-5.0, 2]],  # learnt: +4 against +1
]


def test_who_wins_a_pair():
    figures = preference_numbers(PAIRS, START)
    assert figures["implicit"] == [1, 0, 0.5, 1] and figures["longer"] == [1, 0, 1, 1]
    assert figures["raw"] == [0, 1, 0, 0] and figures["start_raw"] == [0, 1, 0, 0]
    assert figures["raw_per_token"] == [1, 1, 0.5, 1]
    assert figures["start_per_token"] == [1, 1, 1, 1]
    assert figures["margin"] == [2, -3, 0, 3]
    assert wins([0.5, 0.0, -0.1]) == [1, 0.5, 0]


def test_a_judge_of_length_is_no_better_than_chance():
    longer = preference_numbers(PAIRS, START)["longer"]
    figures = balanced(longer, longer)  # right about all pairs whose chosen answer is longer, wrong about all others
    assert sum(figures) / len(figures) == pytest.approx(0.5)
    # three longer ones with 2.5 hits, one shorter with none: (2.5 / 3 + 0) / 2
    figures = preference_numbers(PAIRS, START)["implicit_balanced"]
    assert sum(figures) / len(figures) == pytest.approx(2.5 / 6)
    assert balanced([1.0, 0.0, 1.0], [1.0, 0.5, 0.0]) == pytest.approx([1.0, 1.0])  # equal lengths are left out
    assert balanced([1.0, 0.0], [1.0, 1.0]) == []  # there is nothing to balance with


def test_the_error_of_a_balanced_share_is_that_of_its_two_sides():
    longer = [1.0] * 8 + [0.0] * 2
    assert summary({1: balanced([1.0] * 10, longer)})["sampling_error"] == pytest.approx(
        0.0
    )  # right about all of them
    hits = [1.0] * 6 + [0.0] * 2 + [1.0, 0.0]  # 3/4 of eight, 1/2 of two
    figure = summary({1: balanced(hits, longer)})
    assert figure["value"] == pytest.approx(5 / 8)
    assert figure["sampling_error"] ** 2 == pytest.approx((3 / 16 / 8 + 1 / 4 / 2) / 4 * 10 / 9)
