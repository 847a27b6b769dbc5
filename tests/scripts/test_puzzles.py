"""Problems and their verifiers: every reference answer is right by independent means, and wrong ones are wrong."""

import itertools
import json
from fractions import Fraction

import pytest

from nanollada.scripts.first_run.corpus import count_solutions, split_grids
from nanollada.scripts.puzzles import PUZZLES, evaluated, main, make_rows, side_of, solves


@pytest.mark.parametrize("puzzle", PUZZLES)
def test_rows_are_made_from_the_seed(puzzle):
    rows = make_rows(puzzle, 40, 3)
    assert rows == make_rows(puzzle, 40, 3) and rows != make_rows(puzzle, 40, 4)
    assert rows[:10] == make_rows(puzzle, 10, 3)
    assert len({row["prompt"] for row in rows}) == 40 and all(solves(puzzle, row, row["answer"]) for row in rows)
    training = {row["prompt"] for seed in range(3) for row in make_rows(puzzle, 100, seed, "train")}
    assert not training & {row["prompt"] for row in rows}
    if puzzle != "sudoku":  # whose boards decide
        assert {side_of(row["prompt"]) for row in rows} == {"test"} and {side_of(row) for row in training} == {"train"}


def test_arithmetic():
    for row in make_rows("arithmetic", 60, 0, digits=3):
        assert eval(row["prompt"].rstrip("=")) == int(row["answer"])
        assert solves("arithmetic", row, f" {row['answer']}\n")
        for wrong in (str(int(row["answer"]) + 1), row["answer"] + ".", "", f"={row['answer']}", "9" * 50):
            assert not solves("arithmetic", row, wrong)
    assert all("*" in row["prompt"] for row in make_rows("arithmetic", 5, 0, operators="*"))


def reachable(numbers):
    """Every value that the numbers make, each used once; by brute force."""
    if len(numbers) == 1:
        return {Fraction(numbers[0])}
    found = set()
    for size in range(1, len(numbers)):
        for left in itertools.combinations(range(len(numbers)), size):
            ones = reachable([numbers[i] for i in left])
            others = reachable([numbers[i] for i in range(len(numbers)) if i not in left])
            for a, b in itertools.product(ones, others):
                found |= {a + b, a - b, a * b} | ({a / b} if b else set())
    return found


def test_countdown():
    for row in make_rows("countdown", 60, 0):
        assert Fraction(row["target"]) in reachable(row["numbers"])
        assert eval(row["answer"]) == pytest.approx(row["target"])
        assert row["prompt"] == f"Countdown {' '.join(map(str, row['numbers']))} target {row['target']}"
        assert solves("countdown", row, f"{row['answer']} = {row['target']}")
        assert not solves("countdown", row, f"{row['answer']}={row['target'] + 1}")
        assert not solves("countdown", row, str(row["target"])) and not solves("countdown", row, row["answer"] + "+0")
    assert all(len(row["numbers"]) == 5 for row in make_rows("countdown", 5, 0, numbers=5))


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("3*7+12", True),
        ("12 + 7 * 3", True),
        ("(12+3*7)", True),
        ("12+7*3=33", True),
        ("(12/3+7)*3", False),  # 3 twice
        ("33", False),
        ("21+12", False),  # a number that is not given
        ("3*7", False),
        ("3*7+12=", True),
        ("12--3*7", False),  # no signs
        ("3**7", False),
        ("12//3+7", False),
        ("__import__('os')", False),
        ("3*(7+12", False),
        ("12/(3-3)", False),
        ("(" * 300, False),
        ("", False),
    ],
)
def test_countdown_answers(answer, right):
    assert solves("countdown", {"numbers": [3, 7, 12], "target": 33}, answer) == right


def test_formulas_are_exact():
    assert evaluated("1/3*3") == (Fraction(1), [1, 3, 3]) and evaluated("1/0") is None and evaluated("07+1") is None


def test_sudokus_are_of_held_out_boards():
    boards, held_out = split_grids(42)
    for row in make_rows("sudoku", 20, 5):
        assert row["answer"] in held_out and count_solutions(row["puzzle"]) == 1
        assert not solves("sudoku", row, row["answer"][::-1]) and not solves("sudoku", row, "")
    assert all(row["answer"] in boards for row in make_rows("sudoku", 20, 5, "train"))


def test_sides_do_not_meet():
    sides = [side_of(f"{a}+{b}=") for a in range(100) for b in range(100)]
    assert sides.count("test") == pytest.approx(1000, abs=100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("chess", 1, 0), "`puzzle` must be among arithmetic, countdown, sudoku, got 'chess'"),
        (("arithmetic", 0, 0), "`rows` must be at least 1, got 0"),
        (("arithmetic", 1, 0, "both"), "`side` must be 'test' or 'train', got 'both'"),
        (("arithmetic", 2000, 0), "`rows` must not exceed the test problems of arithmetic .* got 2000"),
    ],
)
def test_what_is_refused(arguments, message):
    options = {"digits": 1} if arguments[1] == 2000 else {}
    with pytest.raises(ValueError, match=message):
        make_rows(*arguments, **options)


def test_options_that_are_refused():
    for puzzle, options, message in (
        ("arithmetic", {"numbers": 3}, r"`numbers` must be an option of arithmetic \(digits, operators\), got 3"),
        ("arithmetic", {"operators": "/"}, "`operators` must be some of .*, got '/'"),
        ("countdown", {"side": "train"}, r"`side` must be an option of countdown \(numbers, .*\), got 'train'"),
        ("arithmetic", {"digits": True}, "`digits` must be a whole number from 1 to 9, got True"),
        (
            "countdown",
            {"numbers": 6, "largest": 1000, "target": 1},
            "`target` must be within reach, got 1 and none in 1",
        ),
        ("countdown", {"numbers": 9}, "`numbers` must be a whole number from 2 to 6, got 9"),
    ):
        with pytest.raises(ValueError, match=message):
            make_rows(puzzle, 1, 0, **options)


def test_the_program_writes_training_rows(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    main(["--puzzle", "countdown", "--rows", "30", "--output", str(path), "--options", '{"numbers": 4}'])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 30 and all(side_of(row["messages"][0]["content"]) == "train" for row in rows)
    assert rows[0]["source"] == "countdown" and [turn["role"] for turn in rows[0]["messages"]] == ["user", "assistant"]
