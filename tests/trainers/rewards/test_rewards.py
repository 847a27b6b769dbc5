"""Rewards: what each says of right and wrong answers, TRL's signature and trainer, and names that are refused."""

import re
from types import SimpleNamespace

import pytest

from nanollada.trainers.puzzles.registry import PUZZLES, make_rows
from nanollada.trainers.rewards.registry import REWARDS, reward_functions

WRONG = "no answer at all"


def chats(answers):
    return [[{"role": "assistant", "content": answer}] for answer in answers]


def columns_of(rows):
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names if name != "prompt"}


def called(name, completions, columns):
    """As TRL calls a reward."""
    (function,) = reward_functions([name])
    extra = {
        "trainer_state": object(),
        "log_extra": print,
        "log_metric": print,
        "completion_ids": [[1]] * len(completions),
    }
    return function(prompts=[""] * len(completions), completions=completions, **extra, **columns)


@pytest.mark.parametrize("puzzle", PUZZLES)
@pytest.mark.parametrize("form", [list, chats])
def test_right_and_wrong_answers(puzzle, form):
    rows = [{**row, "verify": puzzle} for row in make_rows(puzzle, 6, 0)]
    answers = [f" {row['answer']}\n" for row in rows[:3]] + [WRONG] * 3
    expected = [1.0] * 3 + [0.0] * 3
    assert called("puzzle", form(answers), columns_of(rows)) == expected
    assert called("format", form(answers), columns_of(rows)) == expected
    defined = puzzle.startswith("sudoku")
    assert called("share", form(answers), columns_of(rows)) == (expected if defined else [None] * 6)


@pytest.mark.parametrize("puzzle", ["sudoku", "sudoku9"])
def test_the_share_of_right_blanks(puzzle):
    for row in make_rows(puzzle, 5, 1):
        row["verify"], right = puzzle, row["answer"]
        blanks = [cell for cell, digit in enumerate(row["puzzle"]) if digit == "0"]
        clue = next(cell for cell, digit in enumerate(row["puzzle"]) if digit != "0")

        def changed(*cells, right=right):
            return "".join("21"[digit == "2"] if cell in cells else digit for cell, digit in enumerate(right))

        answers = [changed(*blanks[:count]) for count in range(len(blanks) + 1)]
        answers += [changed(clue), right + "1", right[:-1]]
        shares = called("share", answers, columns_of([row] * len(answers)))
        assert shares == pytest.approx([1 - count / len(blanks) for count in range(len(blanks) + 1)] + [0, 0, 0])
        solved = called("puzzle", answers, columns_of([row] * len(answers)))
        assert [share == 1 for share in shares] == [right == 1 for right in solved]


def test_rows_of_several_puzzles_share_a_batch():
    rows = [{**make_rows(puzzle, 1, 0)[0], "verify": puzzle} for puzzle in PUZZLES]
    answers = [row["answer"] for row in rows]
    assert called("puzzle", answers, columns_of(rows)) == [1.0] * len(rows)
    assert called("puzzle", answers[1:] + answers[:1], columns_of(rows)) == [0.0] * len(rows)


@pytest.mark.parametrize(
    ("puzzle", "answer", "has_form"),
    [
        ("arithmetic", "-17", 1),
        ("arithmetic", "17.0", 0),
        ("countdown", "1+1", 1),  # a formula, if a wrong one
        ("countdown", "1+1=", 1),
        ("countdown", "1++1", 0),
        ("sudoku", "1" * 16, 1),
        ("sudoku", "1" * 15 + "5", 0),
        ("sudoku9", "1" * 81, 1),
        ("sudoku9", "0" * 81, 0),
    ],
)
def test_the_form_of_answers(puzzle, answer, has_form):
    row = {**make_rows(puzzle, 1, 0)[0], "verify": puzzle}
    assert called("format", [answer], columns_of([row])) == [has_form]
    assert called("puzzle", [answer], columns_of([row])) == [0]


def test_a_form_of_ones_own():
    assert called("format:<a>.*</a>", ["<a>1\n2</a>", " <a></a> ", "x<a></a>"], {}) == [1, 1, 0]
    (function,) = reward_functions(["format:[0-9]+"])
    assert function.__name__ == "format:[0-9]+"


def test_functions_by_dotted_name(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def long(completions, **columns):\n    return [9.0] * len(completions)\n")
    monkeypatch.chdir(tmp_path)
    for name in ("my_rewards:long", "my_rewards.long"):
        (function,) = reward_functions([name])
        assert function(completions=["x", "y"]) == [9.0, 9.0] and function.__name__ == "long"
    assert [function.__name__ for function in reward_functions("math.sqrt")] == ["sqrt"]


def test_functions_that_fail_are_named(tmp_path, monkeypatch):
    text = "def broken(completions, **columns):\n    return [columns['no_such_column']]\n"
    text += "def odd(completions, **columns):\n    return [None, float('nan')]\n"
    text += "class Length:\n    def __call__(self, completions, **columns):\n        return map(len, completions)\n"
    text += "length = Length()\n"
    (tmp_path / "failing_rewards.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    broken, odd, length = reward_functions([f"failing_rewards:{name}" for name in ("broken", "odd", "length")])
    with pytest.raises(ValueError, match="`reward_funcs` failing_rewards:broken must .*raised KeyError: 'no_such_col"):
        broken(completions=["a"], prompts=["b"])
    with pytest.raises(ValueError, match="failing_rewards:odd must give a finite number or None, got nan .*'second'"):
        odd(completions=["first", "second"], prompts=["b", "b"])
    assert length(completions=["a", "bcd"], prompts=["b", "b"]) == [1, 3]
    assert (length.__name__, odd.__name__) == ("failing_rewards:length", "odd")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "`reward_funcs` must name at least one reward, among puzzle, share, format, got none"),
        (["speed"], "`reward_funcs` must be among puzzle, share, format, or package.module:function, got 'speed'"),
        (
            ["no_such_module:f"],
            "`reward_funcs` must name a module that can be imported, got 'no_such_module:f': No module",
        ),
        (["math:nothing"], "`reward_funcs` must name a function of math, got 'math:nothing'"),
        (["math.pi"], "`reward_funcs` must name a function, got 'math.pi', which is a float"),
        (["puzzle:x"], "`reward_funcs` puzzle takes nothing behind a colon, got 'puzzle:x'"),
        (["format:("], "`reward_funcs` format: must be followed by a regular expression .*, got 'format:\\('"),
        (["puzzle", "share", "puzzle"], "`reward_funcs` must have different names, .* got \\['puzzle', 'puzzle'\\]"),
    ],
)
def test_names_that_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        reward_functions(names)


@pytest.mark.parametrize("name", REWARDS)
def test_a_row_without_its_puzzle_is_named(name):
    message = re.escape(f"the reward `{name}` needs rows whose `verify` is one of {', '.join(PUZZLES)}, got None")
    with pytest.raises(ValueError, match=message):
        called(name, ["5"], {"answer": ["5"]})


def test_trl_sums_them():
    """Its own `_calculate_rewards`, on rows as its sampler gives them."""
    import torch
    from trl import GRPOTrainer

    class Trainer:
        _calculate_rewards = GRPOTrainer._calculate_rewards
        reward_funcs = reward_functions(["puzzle", "share"])
        reward_processing_classes, reward_func_names = [None, None], ["puzzle", "share"]
        environments = _log_completion_extra = _log_metric = None
        state, args = SimpleNamespace(global_step=0), SimpleNamespace(report_to=[])

        class accelerator:
            device, is_main_process = torch.device("cpu"), False
            gather = staticmethod(lambda tensor: tensor)

        class model:
            training = True

    rows = [{**make_rows(puzzle, 1, 0)[0], "verify": puzzle} for puzzle in ("sudoku", "countdown")]
    columns = columns_of(rows)
    inputs = [{"prompt": "", **{name: column[place] for name, column in columns.items()}} for place in range(2)]
    completions = chats([rows[0]["answer"], rows[1]["answer"]])
    rewards = Trainer()._calculate_rewards(inputs, ["", ""], completions, [[1], [1]])
    assert rewards[:, 0].tolist() == [1, 1] and rewards[0, 1] == 1 and rewards[1, 1].isnan()
