"""Problems and their verifiers: every reference answer is right by independent means, and wrong ones are wrong."""

import hashlib
import itertools
import json
import runpy
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from nanollada.scripts.puzzles import main
from nanollada.trainers.puzzles.countdown import evaluated
from nanollada.trainers.puzzles.puzzle import side_of
from nanollada.trainers.puzzles.registry import PUZZLES, make_rows, solves, write_rows
from nanollada.trainers.puzzles.sudoku import count_solutions, split_grids

DIGESTS = {  # of 30 rows with seed 7, "test" and "train": rows that are published in figures
    "arithmetic": ["5b55b3785cdf4ad3", "b3bbbd9836298c56"],
    "countdown": ["d086bfb481167f98", "1b80b74a8d6cfc24"],
    "sudoku": ["71c8c2a62cb4ba8d", "64bd41afe1286aee"],
}


@pytest.mark.parametrize("puzzle", PUZZLES)
def test_rows_are_made_from_the_seed(puzzle):
    rows = make_rows(puzzle, 40, 3)
    assert rows == make_rows(puzzle, 40, 3) and rows != make_rows(puzzle, 40, 4)
    assert rows[:10] == make_rows(puzzle, 10, 3)
    assert len({row["prompt"] for row in rows}) == 40 and all(solves(puzzle, row, row["answer"]) for row in rows)
    count = 20 if puzzle == "sudoku9" else 100  # boards take their time
    training = {row["prompt"] for seed in range(3) for row in make_rows(puzzle, count, seed, "train")}
    assert not training & {row["prompt"] for row in rows}
    if not PUZZLES[puzzle].has_sides:
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
        (("chess", 1, 0), "`puzzle` must be among arithmetic, countdown, sudoku, sudoku9, got 'chess'"),
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
    called = write_rows("countdown", 30, tmp_path / "called.jsonl", numbers=4)  # the same, in Python
    assert called.read_text() == path.read_text()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 30 and all(side_of(row["messages"][0]["content"]) == "train" for row in rows)
    assert rows[0]["source"] == "countdown" and [turn["role"] for turn in rows[0]["messages"]] == ["user", "assistant"]


def test_the_rows_are_those_of_the_figures():
    for puzzle, digests in DIGESTS.items():
        rows = [make_rows(puzzle, 30, 7, side) for side in ("test", "train")]
        assert [hashlib.sha256(json.dumps(part).encode()).hexdigest()[:16] for part in rows] == digests, puzzle


@pytest.mark.parametrize(
    ("puzzle", "row", "message"),
    [
        ("arithmetic", {"answer": "1.5"}, "`answer` must be a whole number, got '1.5'"),
        ("countdown", {"numbers": [1, 2.0], "target": 3}, "`numbers` and `target` must be whole numbers, got"),
        ("countdown", {"numbers": [1, 2]}, "`numbers` and `target` must be whole numbers, got .* and None"),
        ("sudoku", {"puzzle": "1" * 16}, "`puzzle` must be 16 digits from 0 to 4 with one solution, got '1111"),
        ("sudoku", {}, "missing field: `puzzle`"),
    ],
)
def test_columns_of_a_verifier_are_checked(puzzle, row, message):
    with pytest.raises(ValueError, match=message):
        PUZZLES[puzzle].columns(row)


def test_rows_unlike_others():
    every = make_rows("countdown", 30, 7, "train")
    left_out = {row["prompt"] for row in every[:20]}
    others = make_rows("countdown", 25, 7, "train", left_out)
    assert others[:10] == every[20:] and not left_out & {row["prompt"] for row in others}
    message = "`rows` must not exceed the test problems of arithmetic with .* that are left, got 1"
    with pytest.raises(ValueError, match=message):
        prompts = {f"{one}+{other}=" for one in range(10) for other in range(10)}
        make_rows("arithmetic", 1, 0, "test", prompts, digits=1, operators="+")
    with pytest.raises(ValueError, match="`format` must be among messages, prompts, got 'text'"):
        write_rows("countdown", 1, "x.jsonl", format="text")


def test_the_program_writes_prompts_that_no_other_row_has(tmp_path, capsys):
    sft, prompts = tmp_path / "sft.jsonl", tmp_path / "prompts.jsonl"
    words = ["--puzzle", "sudoku", "--options", '{"min_blanks": 5, "max_blanks": 6}']
    main([*words, "--rows", "40", "--output", str(sft)])
    main([*words, "--rows", "20", "--output", str(prompts), "--format", "prompts", "--unlike", str(sft)])
    asked = {json.loads(line)["messages"][0]["content"] for line in sft.read_text().splitlines()}
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    assert len(rows) == 20 and not asked & {row["prompt"][0]["content"] for row in rows}
    boards, _ = split_grids(42)
    for row in rows:
        assert row["prompt"] == [{"role": "user", "content": f"Sudoku {row['puzzle']}"}] and row["verify"] == "sudoku"
        assert row["answer"] in boards and row["puzzle"].count("0") in (5, 6)
    same = tmp_path / "same.jsonl"
    main([*words, "--rows", "20", "--output", str(same), "--format", "prompts"])
    assert {json.loads(line)["prompt"][0]["content"] for line in same.read_text().splitlines()} <= asked


REVERSAL = """
from nanollada.trainers.puzzles.puzzle import Puzzle, whole


def draw(rng, letters=4):
    word = "".join(rng.choice("abcdef") for _ in range(letters))
    return {"prompt": f"Reverse {word}", "answer": word[::-1], "word": word}


PUZZLE = Puzzle(
    name="reversal",
    help="a word, to be written backwards",
    draw=draw,
    verify=lambda row, answer: answer == row["word"][::-1],
    columns=lambda row: {"word": row["word"]},
    has_form=lambda row, answer: answer.isalpha(),
    options={"letters": whole(1, 9)},
)
"""


def test_a_new_puzzle_is_a_file_and_an_entry(tmp_path, monkeypatch, capsys):
    """The program offers it, with its help and options, and writes its rows."""
    (tmp_path / "reversal.py").write_text(REVERSAL)
    puzzle = runpy.run_path(str(tmp_path / "reversal.py"))["PUZZLE"]
    monkeypatch.setitem(PUZZLES, "reversal", puzzle)
    program = Path(sys.modules[main.__module__].__file__)
    output = tmp_path / "rows.jsonl"
    words = ["--puzzle", "reversal", "--rows", "20", "--options", '{"letters": 3}', "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [str(program), *words])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(program), run_name="__main__")
    chats = [json.loads(line)["messages"] for line in output.read_text().splitlines()]
    assert len(chats) == 20 and all(side_of(chat[0]["content"]) == "train" for chat in chats)
    assert all(chat[0]["content"].split()[1][::-1] == chat[1]["content"] for chat in chats)
    assert solves("reversal", {"word": "abc"}, " cba\n") and not solves("reversal", {"word": "abc"}, "abc")
    monkeypatch.setattr(sys, "argv", [str(program), "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(program), run_name="__main__")
    shown = " ".join(capsys.readouterr().out.split())
    assert "reversal: a word, to be written backwards" in shown and "letters (a whole number from 1 to 9)" in shown
    monkeypatch.setattr(sys, "argv", [str(program), *words[:5], '{"letters": 10}', *words[6:]])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(program), run_name="__main__")
    assert "error: `letters` must be a whole number from 1 to 9, got 10" in capsys.readouterr().err
