"""Problems with checkable answers, made from a seed: arithmetic, countdown and 4×4 sudoku, and rows to train on.

python scripts/puzzles.py --puzzle countdown --rows 20000 --output runs/countdown.jsonl

A problem belongs to the "train" or to the "test" side by its content, whatever the seed: what `evaluate.py --suite`
asks is never among the rows that this program writes.
"""

import ast
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal

TEST_SHARE = 0.1
DRAWS = 10_000  # in vain, before the problems count as used up
GRID_SEED = 42  # the quickstart's split of the boards
OPERATORS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


# ---- the three puzzles


def arithmetic(rng: random.Random, digits: int = 2, operators: str = "+-*") -> dict:
    """`{"prompt": "23+45=", "answer": "68"}`, both numbers of at most `digits` digits."""
    one, other, sign = rng.randrange(10**digits), rng.randrange(10**digits), rng.choice(operators)
    value = {"+": one + other, "-": one - other, "*": one * other}[sign]
    return {"prompt": f"{one}{sign}{other}=", "answer": str(value)}


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
        found = f"none in {DRAWS:,} draws of {numbers} numbers up to {largest}"
        raise ValueError(f"`target` must be within reach, got {target} and {found}")
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


def sudoku(rng: random.Random, side: str, min_blanks: int = 8, max_blanks: int = 12) -> dict:
    """The quickstart's puzzles: the solutions of training ones are training boards, those of test ones are not."""
    from nanollada.scripts.first_run.corpus import split_grids, sudoku_rows

    boards = split_grids(GRID_SEED)[side == "test"]
    (row,) = sudoku_rows(1, boards, rng.getrandbits(64), min_blanks, max_blanks)
    return {"prompt": row["messages"][0]["content"], "answer": row["answer"], "puzzle": row["puzzle"]}


PUZZLES: dict[str, Callable] = {"arithmetic": arithmetic, "countdown": countdown, "sudoku": sudoku}


def make_rows(puzzle: str, count: int, seed: int, side: str = "test", /, **options) -> list[dict]:
    """
    Different problems of one side, the same ones for the same arguments.

    Args:
        puzzle (`str`): "arithmetic", "countdown", "sudoku".
        count (`int`): How many.
        seed (`int`): Of the draws.
        side (`str`, defaults to `"test"`): "test" or "train". No problem is on both.
        options: Of the puzzle: `digits`, `operators`; `numbers`, `largest`, `target`; `min_blanks`, `max_blanks`.

    Raises:
        `ValueError`: for another name, a `count` below 1, options that the puzzle does not have or that are out of
            range, and if there are fewer such problems than `count`, or too few to be found.
    """
    _check(puzzle, count, side, options)
    rng, found = random.Random(f"{seed}/{puzzle}/{side}"), {}
    for row in _drawn(puzzle, rng, side, options):
        found[row["prompt"]] = row
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"`rows` must not exceed the {side} problems of {puzzle} with {options}, got {count}")


def _drawn(puzzle: str, rng: random.Random, side: str, options: dict) -> Iterator[dict]:
    """Problems of the side, until so many draws in a row have given nothing new."""
    seen, vain = set(), 0
    while vain < DRAWS:
        row = sudoku(rng, side, **options) if puzzle == "sudoku" else PUZZLES[puzzle](rng, **options)
        right_side = puzzle == "sudoku" or side_of(row["prompt"]) == side  # a sudoku's side is its board's
        vain = vain + 1 if row["prompt"] in seen or not right_side else 0
        seen.add(row["prompt"])
        if not vain:
            yield row


def side_of(prompt: str) -> str:
    """The side of an arithmetic or countdown problem, by its text alone."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") < TEST_SHARE * 2**64 else "train"


RANGES = {
    "arithmetic": {"digits": (1, 9), "operators": None},
    "countdown": {"numbers": (2, 6), "largest": (2, 1000), "target": (1, 10_000)},
    "sudoku": {"min_blanks": (1, 12), "max_blanks": (1, 12)},
}


def _check(puzzle: str, count: int, side: str, options: dict) -> None:
    if puzzle not in PUZZLES:
        raise ValueError(f"`puzzle` must be among {', '.join(PUZZLES)}, got {puzzle!r}")
    if side not in ("test", "train"):
        raise ValueError(f"`side` must be 'test' or 'train', got {side!r}")
    if count < 1:
        raise ValueError(f"`rows` must be at least 1, got {count}")
    for name, value in options.items():
        if name not in RANGES[puzzle]:
            raise ValueError(f"`{name}` must be an option of {puzzle} ({', '.join(RANGES[puzzle])}), got {value!r}")
        if name == "operators":
            if not isinstance(value, str) or not value or set(value) - set("+-*"):
                raise ValueError(f"`operators` must be some of + - *, got {value!r}")
            continue
        low, high = RANGES[puzzle][name]
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"`{name}` must be a whole number from {low} to {high}, got {value!r}")


# ---- verdicts


def solves(puzzle: str, row: dict, answer: str) -> bool:
    """Whether an answer solves the problem; any right one does, malformed ones are just wrong."""
    answer = answer.strip()
    if puzzle == "sudoku":
        from nanollada.scripts.first_run.corpus import is_valid_solution

        return is_valid_solution(row["puzzle"], answer)
    if puzzle == "arithmetic":
        return re.fullmatch(r"-?[0-9]{1,40}", answer) is not None and int(answer) == int(row["answer"])
    formula, _, stated = answer.partition("=")
    if stated and stated.strip() != str(row["target"]):
        return False
    return evaluated(formula.strip()) == (row["target"], sorted(row["numbers"]))


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


# ---- rows to train on


@dataclass
class PuzzleArguments:
    """Which rows are written, as TRL `messages`."""

    puzzle: Literal["arithmetic", "countdown", "sudoku"] = field(metadata={"help": "What is asked."})
    rows: int = field(metadata={"help": "How many."})
    output: str = field(metadata={"help": "The .jsonl file."})
    seed: int = field(default=42, metadata={"help": "Of the draws."})
    options: str = field(
        default="{}", metadata={"help": 'Of the puzzle, as JSON: {"digits": 3}, {"numbers": 4, "target": 60}.'}
    )


def main(argv: list[str] | None = None) -> None:
    """Writes training rows."""
    from trl import TrlParser

    (args,) = TrlParser((PuzzleArguments,)).parse_args_and_config(argv)
    rows = make_rows(args.puzzle, args.rows, args.seed, "train", **json.loads(args.options))
    turns = ([("user", row["prompt"]), ("assistant", row["answer"])] for row in rows)
    chats = [[{"role": role, "content": content} for role, content in turn] for turn in turns]
    lines = [json.dumps({"messages": chat, "source": args.puzzle}, ensure_ascii=False) + "\n" for chat in chats]
    path = Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{len(lines):,} rows: {path}")


if __name__ == "__main__":
    main()
