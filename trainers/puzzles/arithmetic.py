"""Arithmetic: two numbers and a sign."""

import random
import re

from nanollada.trainers.puzzles.puzzle import Option, Puzzle, needed, whole

NUMBER = r"-?[0-9]{1,40}"


def arithmetic(rng: random.Random, digits: int = 2, operators: str = "+-*") -> dict:
    """`{"prompt": "23+45=", "answer": "68"}`, both numbers of at most `digits` digits."""
    one, other, sign = rng.randrange(10**digits), rng.randrange(10**digits), rng.choice(operators)
    value = {"+": one + other, "-": one - other, "*": one * other}[sign]
    return {"prompt": f"{one}{sign}{other}=", "answer": str(value)}


def verify(row: dict, answer: str) -> bool:
    """Whether the answer is the number."""
    return re.fullmatch(NUMBER, answer) is not None and int(answer) == int(row["answer"])


def columns(row: dict) -> dict:
    """`answer`, a whole number in a string."""
    answer = needed(row, "answer")
    if not isinstance(answer, str) or not re.fullmatch(NUMBER, answer):
        raise ValueError(f"`answer` must be a whole number, got {answer!r}")
    return {"answer": answer}


def _are_signs(value) -> bool:
    return isinstance(value, str) and bool(value) and not set(value) - set("+-*")


PUZZLE = Puzzle(
    name="arithmetic",
    help="two numbers and a sign, 23+45=",
    draw=arithmetic,
    verify=verify,
    columns=columns,
    has_form=lambda row, answer: re.fullmatch(NUMBER, answer) is not None,
    options={"digits": whole(1, 9), "operators": Option("some of + - *", _are_signs)},
)
