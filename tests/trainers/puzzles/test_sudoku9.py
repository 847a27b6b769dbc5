"""9×9 sudoku: boards and puzzles against brute force, the verifier, and the split of the boards."""

import random

import pytest
from boards import brute_force

from nanollada.trainers.puzzles import sudoku9
from nanollada.trainers.puzzles.puzzle import side_of
from nanollada.trainers.puzzles.registry import make_rows, solves
from nanollada.trainers.puzzles.sudoku import stated_puzzle

KNOWN = "530070000600195000098000060800060003400803001700020006060000280000419005000080079"
SOLVED = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"


def test_a_published_puzzle():
    assert sudoku9.solution(KNOWN) == SOLVED == brute_force(KNOWN)[0]
    row = {"puzzle": KNOWN}
    assert solves("sudoku9", row, f" {SOLVED}\n") and sudoku9.columns(row) == row
    swapped = SOLVED.translate(str.maketrans("12", "21"))  # a solved board of other clues
    repeated = SOLVED[:2] + SOLVED[3] + SOLVED[2] + SOLVED[4:]  # the row holds, two columns do not
    for wrong in (swapped, repeated, SOLVED[:-1], SOLVED + "1", KNOWN, "", SOLVED.replace("1", "0")):
        assert not solves("sudoku9", row, wrong)


def test_any_right_answer_is_right():
    blank = {"puzzle": "0" * 81}
    assert solves("sudoku9", blank, SOLVED) and solves("sudoku9", blank, SOLVED[::-1])
    assert sudoku9.solution("0" * 81) is None and sudoku9.solution("11" + "0" * 79) is None


def test_solutions_are_those_of_brute_force():
    rng = random.Random(0)
    counts = []
    for _ in range(12):
        board = [digit if rng.random() < 0.45 else "0" for digit in SOLVED]
        if rng.random() < 0.4:
            board[rng.randrange(81)] = rng.choice("123456789")  # often contradicts the rest
        expected = brute_force("".join(board), most=4000)
        found = ["".join(map(str, solved)) for solved in sudoku9.solutions([int(digit) for digit in board])]
        assert sorted(found) == expected and len(expected) < 4000
        counts.append(len(found))
    assert {0, 1} <= set(counts) and max(counts) > 1, counts


@pytest.mark.parametrize("blanks", [1, 30, 54])
def test_puzzles_have_the_asked_blanks_and_one_solution(blanks):
    for row in make_rows("sudoku9", 4, 5, min_blanks=blanks, max_blanks=blanks):
        assert row["puzzle"].count("0") == blanks and stated_puzzle(row["prompt"]) == row["puzzle"]
        assert brute_force(row["puzzle"], most=2) == [row["answer"]]


def test_the_board_decides_the_side():
    for side in ("test", "train"):
        rows = make_rows("sudoku9", 10, 3, side)
        assert {side_of(row["answer"]) for row in rows} == {side} and len({row["answer"] for row in rows}) == 10
        assert {row["puzzle"].count("0") for row in rows} <= set(range(30, 46))


def test_options_that_contradict():
    with pytest.raises(ValueError, match="`min_blanks` must not exceed `max_blanks`, got 40 and 20"):
        make_rows("sudoku9", 1, 0, min_blanks=40, max_blanks=20)
    with pytest.raises(ValueError, match="`max_blanks` must be a whole number from 1 to 54, got 60"):
        make_rows("sudoku9", 1, 0, max_blanks=60)
