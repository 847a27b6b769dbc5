"""Countdown: numbers to be made into a target."""

import ast
import random
import re
from fractions import Fraction

from nanollada.trainers.puzzles.puzzle import DRAWS, Puzzle, whole

OPERATORS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


def countdown(rng: random.Random, numbers: int = 3, largest: int = 20, target: int = 100) -> dict:
    """
    Numbers to be made into a target of 1 to `target` with + - * / and parentheses, each used exactly once:
    `{"prompt": "Countdown 3 7 12 target 33", "answer": "3*7+12", "numbers": [3, 7, 12], "target": 33}`.

    Raises:
        `ValueError`: if draws in vain find no numbers that make such a target.
    """
    for _ in range(DRAWS):
        given = [rng.randint(1, largest) for _ in range(numbers)]
        value, text = _combined(rng, [(Fraction(number), str(number), 3) for number in given])
        if value is not None and value.denominator == 1 and 1 <= value <= target:
            break
    else:
        missed = f"none in {DRAWS:,} draws of {numbers} numbers up to {largest}"
        raise ValueError(f"`target` must be within reach, got {target} and {missed}")
    prompt = f"Countdown {' '.join(map(str, sorted(given)))} target {value}"
    return {"prompt": prompt, "answer": text, "numbers": sorted(given), "target": int(value)}


def _combined(rng: random.Random, parts: list[tuple[Fraction, str, int]]) -> tuple[Fraction | None, str]:
    """Value and text of the parts (value, text, how tightly it binds) put together two by two, in a random order."""
    while len(parts) > 1:
        rng.shuffle(parts)
        (left, left_text, left_bond), (right, right_text, right_bond), *parts = parts
        sign = rng.choice("+-*/")
        if sign == "/" and right == 0:
            return None, ""
        value = {"+": left + right, "-": left - right, "*": left * right, "/": left / right if right else None}[sign]
        bond = 1 if sign in "+-" else 2
        left_text = left_text if left_bond >= bond else f"({left_text})"
        right_text = right_text if right_bond > bond or (sign in "+*" and right_bond == bond) else f"({right_text})"
        parts.append((value, left_text + sign + right_text, bond))
    return parts[0][0], parts[0][1]


def verify(row: dict, answer: str) -> bool:
    """Whether the answer is a formula of the target, or one with "= target" behind it, and uses each number once."""
    formula, _, stated = answer.partition("=")
    if stated and stated.strip() != str(row["target"]):
        return False
    return evaluated(formula.strip()) == (row["target"], sorted(row["numbers"]))


def has_form(row: dict, answer: str) -> bool:
    """Whether the answer is a formula, with "= target" behind it or without."""
    formula, _, stated = answer.partition("=")
    return evaluated(formula.strip()) is not None and stated.strip() in ("", str(row["target"]))


def columns(row: dict) -> dict:
    """`numbers`, a list, and `target`."""
    numbers, target = row.get("numbers"), row.get("target")
    if not isinstance(numbers, list) or not all(type(number) is int for number in [*numbers, target]):
        raise ValueError(f"`numbers` and `target` must be whole numbers, got {numbers!r} and {target!r}")
    return {"numbers": numbers, "target": target}


def evaluated(formula: str) -> tuple[Fraction, list[int]] | None:
    """The exact value of a formula of whole numbers, + - * / and parentheses, and its numbers; `None` for others."""
    if len(formula) > 200 or not re.fullmatch(r"[0-9+\-*/() ]+", formula):
        return None
    try:
        numbers: list[int] = []
        value = _value(ast.parse(formula, mode="eval").body, numbers)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None
    return value, sorted(numbers)


def _value(node: ast.AST, numbers: list[int]) -> Fraction:
    if isinstance(node, ast.Constant):
        numbers.append(node.value)
        return Fraction(node.value)
    if not isinstance(node, ast.BinOp) or type(node.op) not in OPERATORS:
        raise ValueError("not a formula")  # a sign, a power, a whole division
    left, right = _value(node.left, numbers), _value(node.right, numbers)
    sign = OPERATORS[type(node.op)]
    return left / right if sign == "/" else {"+": left + right, "-": left - right, "*": left * right}[sign]


PUZZLE = Puzzle(
    name="countdown",
    help="numbers to be made into a target with + - * / and parentheses",
    draw=countdown,
    verify=verify,
    columns=columns,
    has_form=has_form,
    options={"numbers": whole(2, 6), "largest": whole(2, 1000), "target": whole(1, 10_000)},
)
