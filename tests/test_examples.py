"""The sudokus that documents and sources show: each has one solution, and no training row has it."""

from pathlib import Path

import pytest
from boards import brute_force, shown_sudokus

from nanollada.trainers.puzzles.sudoku import GRID_SEED, split_grids

ROOT = Path(__file__).parent.parent
ROOMS = ("configuration_nanollada", "modeling_nanollada", "trainers", "scripts", "hub_upload", "tests")
KINDS = (".md", ".py", ".html", ".yaml", ".json", ".ipynb", ".txt")


def files():
    inside = (path for room in ROOMS for path in (ROOT / room).rglob("*"))
    return [ROOT / "README.md", *sorted(path for path in inside if path.suffix in KINDS and path != Path(__file__))]


SHOWN = sorted(
    {
        (path.relative_to(ROOT).as_posix(), puzzle)
        for path in files()
        for puzzle in shown_sudokus(path.read_text(encoding="utf-8"))
    }
)


def test_the_readmes_show_one():
    assert {"README.md", "scripts/README_zh.md", "scripts/decoding/README.md"} <= {name for name, _ in SHOWN}


@pytest.mark.parametrize(("name", "puzzle"), SHOWN)
def test_a_sudoku_that_is_shown_can_be_solved(name, puzzle):
    assert len(puzzle) in (16, 81) and "0" in puzzle and max(puzzle) <= ("4" if len(puzzle) == 16 else "9")
    solved = brute_force(puzzle, most=2)
    assert len(solved) == 1, f"{name}: {puzzle} has {len(solved) or 'no'} solutions"
    if len(puzzle) == 16 and not name.startswith("tests/"):  # the quickstart's models shall not have seen its board
        assert solved[0] in split_grids(GRID_SEED)[1], f"{name}: {puzzle} has a board of the training rows"


def test_wrong_ones_are_seen():
    assert shown_sudokus('--prompt "Sudoku 1020040000100201"') == ["1020040000100201"]
    assert brute_force("1020040000100201") == []  # two ones in a box
    assert len(brute_force("1" + "0" * 15, most=2)) == 2
    easy = "530070000600195000098000060800060003400803001700020006060000280000419005000080079"
    assert [board[:9] for board in brute_force(easy, most=2)] == ["534678912"]
