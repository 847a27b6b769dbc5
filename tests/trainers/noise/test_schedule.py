"""The block length over a run."""

import pytest

from nanollada.trainers.noise.block_lengths import BlockLengthSchedule

PHASES = [[0.1, 1], [0.2, 4], [0.5, 0], [0.2, 32]]


@pytest.mark.parametrize("phases", [PHASES, "[[0.1, 1], [0.2, 4], [0.5, 0], [0.2, 32]]"])
def test_phases_take_their_share_of_the_steps(phases):
    schedule = BlockLengthSchedule(phases)
    assert [schedule.at(step, 50) for step in range(50)] == [1] * 5 + [4] * 10 + [0] * 25 + [32] * 10
    assert schedule.at(50, 50) == schedule.last == 32


def test_no_step_is_lost_to_rounding():
    schedule = BlockLengthSchedule([[1 / 3, 1], [1 / 3, 4], [1 / 3, 0]])
    assert [schedule.at(step, 10) for step in range(10)] == [1] * 3 + [4] * 4 + [0] * 3


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ("[[1.0, 4]", "`block_length_schedule` must be JSON, got"),
        ([[0.5, 4], [0.4, 0]], "must have shares that sum to 1, got 0.9"),
        ([[1.0, 2.5]], r"a block length >= 0 .*got \[1.0, 2.5\]"),
        ([[1.0, -1]], r"got \[1.0, -1\]"),
        ([[0.0, 1], [1.0, 4]], r"a share in \(0, 1\].*got \[0.0, 1\]"),
        ([[1.0]], r"must hold pairs.*got \[1.0\]"),
        ([], "sum to 1, got 0"),
    ],
)
def test_wrong_schedules_are_refused(phases, message):
    with pytest.raises(ValueError, match=message):
        BlockLengthSchedule(phases)
