"""4×4 sudoku: boards and puzzles against brute force, and the split of the boards."""

import random
from itertools import combinations

import pytest
from boards import brute_force

from nanollada.trainers.puzzles import sudoku


def test_there_are_288_solutions_and_brute_force_finds_the_same():
    assert len(sudoku.solutions()) == 288
    assert list(sudoku.solutions()) == brute_force("0" * 16)


def test_count_solutions_agrees_with_brute_force():
    rng = random.Random(0)
    counts = []
    for _ in range(150):
        board = [digit if rng.random() < 0.45 else "0" for digit in rng.choice(sudoku.solutions())]
        if rng.random() < 0.3:
            board[rng.randrange(16)] = rng.choice("1234")  # often contradicts the rest
        counts.append(sudoku.count_solutions("".join(board)))
        assert counts[-1] == len(brute_force("".join(board))), board
    assert {0, 1} < set(counts)  # the boards tried cover none, one and several


def test_fewer_than_four_clues_never_have_one_solution():
    for grid in (sudoku.solutions()[0], sudoku.solutions()[1]):
        for clues in combinations(range(16), 3):
            puzzle = "".join(digit if cell in clues else "0" for cell, digit in enumerate(grid))
            assert sudoku.count_solutions(puzzle) > 1


def test_two_essentially_different_boards_as_the_docstring_says():
    transpose = [4 * (cell % 4) + cell // 4 for cell in range(16)]
    moves = [[4, 5, 6, 7, 0, 1, 2, 3, *range(8, 16)], [*range(8, 16), *range(8)], transpose]
    renamings = [str.maketrans("1234", "2341"), str.maketrans("1234", "2134")]

    def neighbours(grid):
        yield from ("".join(grid[cell] for cell in move) for move in moves)
        yield from (grid.translate(renaming) for renaming in renamings)

    left, sizes = set(sudoku.solutions()), []
    while left:
        orbit = [left.pop()]
        for grid in orbit:
            new = set(neighbours(grid)) & left
            left -= new
            orbit += new
        sizes.append(len(orbit))
    assert sorted(sizes) == [96, 192]


def test_rows_have_one_solution_the_asked_blanks_and_no_repeats():
    training, _ = sudoku.split_grids(3)
    rows = sudoku.sudoku_rows(500, training, seed=3)
    assert len({row["puzzle"] for row in rows}) == 500
    assert {row["puzzle"].count("0") for row in rows} == {8, 9, 10, 11, 12}
    for row in rows:
        assert brute_force(row["puzzle"]) == [row["answer"]]
        assert row["answer"] in training
        assert row["messages"] == [
            {"role": "user", "content": "Sudoku " + row["puzzle"]},
            {"role": "assistant", "content": row["answer"]},
        ]
    assert rows == sudoku.sudoku_rows(500, training, seed=3)
    assert rows != sudoku.sudoku_rows(500, training, seed=4)
    assert {row["puzzle"].count("0") for row in sudoku.sudoku_rows(20, training, 3, 5, 5)} == {5}


def test_split_is_by_board_and_depends_on_the_seed():
    training, held_out = sudoku.split_grids(1, held_out=30)
    assert (len(training), len(held_out)) == (258, 30)
    assert sorted(training + held_out) == list(sudoku.solutions())
    assert (training, held_out) == sudoku.split_grids(1, held_out=30)
    assert held_out != sudoku.split_grids(2, held_out=30)[1]


def test_is_valid_solution():
    puzzle, answer = "1200340021004300", "1234341221434321"
    assert sudoku.is_valid_solution(puzzle, answer)
    assert not sudoku.is_valid_solution(puzzle, "1234341221434312")  # a column repeats
    assert not sudoku.is_valid_solution(puzzle, "2134341212434321")
    assert not sudoku.is_valid_solution(puzzle, "2143432112343412")  # a solved board, but not of these clues
    assert not sudoku.is_valid_solution(puzzle, answer + "1")
    assert not sudoku.is_valid_solution(puzzle, "")
    assert not sudoku.is_valid_solution(puzzle, puzzle)
    with pytest.raises(ValueError, match="`puzzle` must be 16 digits from 0 to 4, got '12'"):
        sudoku.is_valid_solution("12", answer)


def test_wrong_sudoku_arguments_are_refused():
    grids = sudoku.solutions()[:1]
    with pytest.raises(ValueError, match="`held_out` must be between 1 and 287, got 288"):
        sudoku.split_grids(0, held_out=288)
    with pytest.raises(ValueError, match="`count` must not be negative, got -1"):
        sudoku.sudoku_rows(-1, grids, 0)
    with pytest.raises(ValueError, match="`grids` must be solved 4×4 boards, at least one, got \\['1111"):
        sudoku.sudoku_rows(1, ["1" * 16], 0)
    with pytest.raises(ValueError, match="`grids` must be solved"):
        sudoku.sudoku_rows(1, [], 0)
    with pytest.raises(ValueError, match="0 < min ≤ max ≤ 12, got 8 and 13"):
        sudoku.sudoku_rows(1, grids, 0, 8, 13)
    with pytest.raises(
        ValueError, match=r"`count` must not exceed the puzzles on `grids` \(1 blanks ran out\), got 17"
    ):
        sudoku.sudoku_rows(17, grids, 0, 1, 1)
    assert len(sudoku.sudoku_rows(16, grids, 0, 1, 1)) == 16
