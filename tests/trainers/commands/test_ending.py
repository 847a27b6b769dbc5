"""How a program ends: one line and status 2 for a user's mistake, a traceback for ours."""

import json
import os
import re
import sys

import pytest

from nanollada.trainers.commands import ending
from nanollada.trainers.commands.ending import run_program
from nanollada.trainers.data.sources import SourceArguments


def raising(error):
    def main(words):
        raise error

    return main


def ended(main, capsys, words=()):
    """Exit status, output and errors of a program."""
    with pytest.raises(SystemExit) as end:
        run_program(main, list(words))
    return end.value.code, *capsys.readouterr()


def wrong_value(words):
    SourceArguments(on_bad_rows="ask")


def missing_file(words):
    open("/nowhere/my file.yaml")


def library(words):
    json.loads("{")


@pytest.mark.parametrize(
    ("main", "line"),
    [
        (wrong_value, "error: `on_bad_rows` must be 'stop' or 'skip', got 'ask'"),
        (library, "error: Expecting property name .* \\(JSONDecodeError; --traceback shows where\\)"),
        (missing_file, "error: No such file or directory: /nowhere/my file.yaml.*"),
        (raising(FloatingPointError("step 3:\n  the loss is nan")), "error: step 3: the loss is nan .*"),
    ],
)
def test_a_mistake_is_one_line(main, line, capsys):
    status, out, err = ended(main, capsys)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert re.fullmatch(line, err.strip()), err


def test_the_traceback_is_shown_when_it_is_asked_for(capsys):
    status, _, err = ended(wrong_value, capsys, ["--traceback"])
    assert status == 2 and err.startswith("Traceback") and "in wrong_value" in err
    assert err.splitlines()[-1] == "error: `on_bad_rows` must be 'stop' or 'skip', got 'ask'"


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), AssertionError("x"), RuntimeError("x")])
def test_a_fault_of_ours_is_no_mistake_of_the_user(error):
    with pytest.raises(type(error)):
        run_program(raising(error), [])


def test_status_and_words(capsys):
    words = []
    assert ended(lambda given: words.extend(given), capsys, ["a", "--traceback", "b"])[0] == 0
    assert words == ["a", "b"]
    assert ended(lambda given: 3, capsys)[0] == 3 and ended(lambda given: {"a": 1}, capsys)[0] == 0


def test_ctrl_c_is_no_traceback(capsys, monkeypatch):
    assert ended(raising(KeyboardInterrupt()), capsys) == (130, "", "interrupted\n")
    assert ended(raising(KeyboardInterrupt("saved\ngo on with x")), capsys)[2] == "saved\ngo on with x\n"
    monkeypatch.setenv("RANK", "1")
    assert ended(raising(KeyboardInterrupt()), capsys) == (130, "", "")


def test_a_rank_waits_for_the_first_one_to_speak(capsys, monkeypatch):
    waits = []
    monkeypatch.setattr(ending.time, "sleep", lambda seconds: waits.append((seconds, capsys.readouterr().err)))
    monkeypatch.setenv("RANK", "0")
    assert ended(wrong_value, capsys)[2].startswith("error: ") and not waits
    monkeypatch.setenv("RANK", "1")
    assert ended(wrong_value, capsys)[2].startswith("error: ") and waits == [(ending.PATIENCE, "")]


def test_a_reader_who_leaves_is_no_error(capsys, monkeypatch, tmp_path):
    with open(tmp_path / "out", "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        status, _, err = ended(raising(BrokenPipeError(32, "Broken pipe")), capsys)
        assert (status, err) == (1, "") and os.readlink(f"/proc/self/fd/{out.fileno()}") == os.devnull
