"""Rewards of the puzzles, which a row's `verify` names: right or wrong, how much is right, and the form."""

import re

from nanollada.trainers.puzzles.puzzle import Puzzle
from nanollada.trainers.puzzles.registry import PUZZLES
from nanollada.trainers.rewards.reward import Reward, Score


def puzzle_of(row: dict, reward: str) -> Puzzle:
    """
    The puzzle that a row names.

    Raises:
        `ValueError`: naming the reward, for a row that names none.
    """
    name = row.get("verify")
    if name not in PUZZLES:
        rule = f"the reward `{reward}` needs rows whose `verify` is one of {', '.join(PUZZLES)}"
        raise ValueError(f"{rule}, got {name!r} among the columns {', '.join(sorted(row))}")
    return PUZZLES[name]


def is_right(row: dict, answer: str) -> float:
    """1 for an answer that solves the row's problem, 0 for any other."""
    return float(puzzle_of(row, "puzzle").verify(row, answer))


def share_right(row: dict, answer: str) -> float | None:
    """How much of an answer is right, from 0 to 1; `None` for puzzles whose answers have no parts."""
    share = puzzle_of(row, "share").share
    return None if share is None else share(row, answer)


def has_form(row: dict, answer: str) -> float:
    """1 for an answer that has the form of the puzzle's answers, 0 for any other."""
    return float(puzzle_of(row, "format").has_form(row, answer))


def matches(pattern: str) -> Score:
    """1 for an answer that a regular expression describes as a whole, 0 for any other."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"a regular expression ({error})") from error
    return lambda row, answer: float(compiled.fullmatch(answer) is not None)


MEMBERS = (
    Reward("puzzle", "1 for a right answer, by the verifier of the row's puzzle", is_right),
    Reward("share", "share of a sudoku's blanks that are right", share_right),
    Reward("format", "1 for the form of the puzzle's answers; format:REGEX: for a match", has_form, matches),
)
