"""Which answers are sudoku boards, and their grids as HTML."""

import re

import pytest
from recordings import denoised, written

from nanollada.scripts.tracing.boards import Board, board_html, find_board
from nanollada.scripts.tracing.page import trace_fragment, trace_page, trace_view
from nanollada.trainers.puzzles.sudoku import stated_puzzle

PUZZLE, ANSWER = "2003100000040000", "2413134231244231"
NINE = "53007000060019500009800006080006000340080300170002000606000028000041900500008007" + "9"


@pytest.fixture(scope="module")
def ids(tokenizer):
    """Token ids of a text, each digit a token."""
    assert all(len(tokenizer(text).input_ids) == len(text) for text in ("0123456789", ANSWER))
    return lambda text: tokenizer(text).input_ids


@pytest.mark.parametrize(
    ("text", "puzzle"),
    [
        (f"Sudoku {PUZZLE}", PUZZLE),
        (f"user\nSudoku {PUZZLE}\nassistant\n", PUZZLE),
        (f"Sudoku {PUZZLE} Sudoku {PUZZLE[::-1]}", PUZZLE[::-1]),  # the last of a conversation
        (f"Sudoku {NINE}", NINE),
        (f"Sudoku {PUZZLE}0", None),
        (f"Sudoku {PUZZLE.replace('4', '5')}", None),
        (PUZZLE, None),
        ("Sudoku, please", None),
    ],
)
def test_a_prompt_states_a_puzzle(text, puzzle):
    assert stated_puzzle(text) == puzzle


def test_a_finished_board(tokenizer, ids):
    prompt, end = ids(f"user\nSudoku {PUZZLE}\n"), tokenizer.eos_token_id
    board = Board(PUZZLE, len(prompt))
    for trace in (
        denoised(tokenizer, prompt, ids(ANSWER)),
        denoised(tokenizer, prompt, [*ids(ANSWER), end]),
        written(tokenizer, prompt, [*ids(ANSWER), end]),
        written(tokenizer, prompt, ids(ANSWER + "\n")),
    ):
        assert find_board(trace) == board
    assert (board.side, board.box, board.end) == (4, 2, len(prompt) + 16)
    assert [board.clue(board.start + cell) for cell in (0, 1, 3)] == ["2", "", "3"] and board.clue(0) == ""
    assert board.is_wrong(board.start, "1") and not board.is_wrong(board.start + 1, "1")
    nine = denoised(tokenizer, ids(f"Sudoku {NINE}"), ids("1" * 81), order=[range(81)])
    assert (find_board(nine).side, find_board(nine).box) == (9, 3)


def test_what_is_no_board_stays_text(tokenizer, ids):
    prompt, end = ids(f"Sudoku {PUZZLE}\n"), tokenizer.eos_token_id
    for answer in (ids(ANSWER + "4"), ids(ANSWER[:-1]), [*ids(ANSWER[:-1]), end], ids("2a" + ANSWER[2:]), ids("no")):
        for trace in (denoised(tokenizer, prompt, answer), written(tokenizer, prompt, answer)):
            assert find_board(trace) is None
            assert '<b class="nanollada-board' not in trace_page(trace, "a")
    assert find_board(written(tokenizer, ids("What is 1 + 1?"), ids(ANSWER))) is None
    assert find_board(written(tokenizer, [*prompt, tokenizer.mask_token_id], ids(ANSWER))) is None


def test_a_board_in_the_making(tokenizer, ids):
    """A grid from the first step on; of an AR row also where no column is yet."""
    prompt = ids(f"Sudoku {PUZZLE}\n")
    trace = denoised(tokenizer, prompt, [*ids(ANSWER), 7], order=[[3], [5, 16]], ended=False)
    assert find_board(trace).start == len(prompt)
    trace = written(tokenizer, prompt, ids(ANSWER[:3]), ended=False)
    html = trace_view(trace, "a")
    (grid,) = re.findall(r'<b class="nanollada-board size-4">(.*?)</b>', html)
    assert grid.count("<span") == 3 and grid.count("<i") == 13
    clues = re.findall(r'data-clue="(\d)"', grid)
    assert clues == [digit for digit in PUZZLE if digit != "0"]
    assert find_board(written(tokenizer, prompt, ids("no"), ended=False)) is None


def test_pages_hold_the_grid(tokenizer, ids):
    """Every column stands in the page once and in its order, so that the script finds it; a changed clue is marked."""
    prompt, wrong = ids(f"Sudoku {PUZZLE}\n"), "3" + ANSWER[1:]
    trace = denoised(tokenizer, prompt, [*ids(wrong), tokenizer.eos_token_id])
    for html in (trace_page(trace, "a"), trace_fragment(trace, "a"), trace_view(trace, "a")):
        (canvas,) = re.findall(r'<p class="canvas[^"]*">(.*?)</p>', html, re.DOTALL)
        assert len(re.findall("<span", canvas)) == len(trace.ids)
        (grid,) = re.findall(r'<b class="nanollada-board size-4">(.*?)</b>', canvas)
        assert "".join(re.findall(r">(\d)</span>", grid)) == wrong
        assert re.findall(r'class="([^"]*) wrong"', grid) == ["text decided"]
        assert html.count(".nanollada-board.size-9 {") == 1
    first = trace_view(trace, "a", step=0)
    assert 'class="mask" data-clue="2"' in first and "wrong" not in first.split("</style>")[1]


def test_a_grid_of_two_texts():
    html = board_html(f"Sudoku {PUZZLE}", f"\n{ANSWER} ")
    assert html.count("<span") == 17 and "wrong" not in html and "size-4" in html
    assert re.findall(r'data-clue="(\d)">(\d)<', html) == [(digit, digit) for digit in PUZZLE if digit != "0"]
    assert "".join(re.findall(r">(\d)</span>", html)) == ANSWER
    assert f'role="img" aria-label="Sudoku {PUZZLE}: {ANSWER}"' in html
    assert board_html(f"Sudoku {PUZZLE}", "1" * 16).count('class="wrong"') == 3
    assert board_html(f"Sudoku {NINE}", "1" * 81).count("<span") == 82
    for prompt, answer in (
        (PUZZLE, ANSWER),
        (f"Sudoku {PUZZLE}", ANSWER + "1"),
        (f"Sudoku {PUZZLE}", "<b>" + "1" * 13),
    ):
        assert board_html(prompt, answer) is None
