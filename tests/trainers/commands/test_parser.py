"""The parsers: full names only, the nearest for any other, and recipes by name."""

import os
from dataclasses import dataclass, field
from typing import Literal

import pytest

from nanollada.trainers.commands.parser import Parser, PlainParser


@dataclass
class Arguments:
    """Of a program."""

    max_new_tokens: int = field(default=8, metadata={"help": "How many."})
    kind: Literal["bpe", "char"] = field(default="bpe", metadata={"help": "Which."})
    delta: float = field(default=0.0, metadata={"help": "May be negative."})
    words: list[str] | None = field(default=None, metadata={"help": "Some."})
    label: str = field(default="x", metadata={"help": "A name."})


@dataclass
class Outputs:
    """Of a program that writes."""

    output_dir: str = field(default="runs/x", metadata={"help": "A folder."})
    trace: str | None = field(default=None, metadata={"help": "A file."})


def test_what_will_be_written_has_a_place(tmp_path, monkeypatch):
    """Before the work, not after it; nothing is made."""
    file, locked = tmp_path / "file", tmp_path / "locked"
    file.write_text("")
    locked.mkdir()
    parse, rule = Parser(Outputs).parse_args_and_config, "must be a place to write to, got"
    parse(["--output_dir", str(tmp_path / "new" / "run"), "--trace", str(file)])
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match=f"`output_dir` {rule} {file}: {file} is a file"):
        parse(["--output_dir", str(file)])
    with pytest.raises(ValueError, match=f"`trace` {rule} {file}/a.html: {file} is a file"):
        parse(["--trace", str(file / "a.html")])
    monkeypatch.setattr(os, "access", lambda path, mode: path != locked)  # root may write everywhere
    with pytest.raises(ValueError, match=f"`output_dir` {rule} {locked}/run: {locked} can't be written to"):
        parse(["--output_dir", str(locked / "run")])


def refused(capsys, *words, parser=None):
    """The line that a wrong command line gets."""
    with pytest.raises(SystemExit, match="2"):
        (parser or Parser(Arguments)).parse_args_and_config(words)
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
    return err.removesuffix("\n")


def test_names_are_whole(capsys):
    near = ": did you mean `--max_new_tokens`?"
    assert refused(capsys, "--max_new", "4") == f"error: unknown option `--max_new`{near}"
    assert refused(capsys, "--max-new-tokns=4") == f"error: unknown option `--max-new-tokns`{near}"
    assert refused(capsys, "-max_new_tokens", "4") == f"error: unknown option `-max_new_tokens`{near}"
    assert refused(capsys, "--colour", "x") == "error: unknown option `--colour`; `--help` lists them all"
    assert refused(capsys, "--tracebak") == "error: unknown option `--tracebak`: did you mean `--traceback`?"
    (args,) = Parser(Arguments).parse_args_and_config(["--max-new-tokens", "4", "--delta", "-1.5", "--words", "a - b"])
    assert (args.max_new_tokens, args.delta, args.words) == (4, -1.5, ["a - b"])


def test_values_and_words(capsys):
    assert "invalid choice: 'bpo' (choose from" in refused(capsys, "--kind", "bpo")
    assert "invalid int value: 'x'" in refused(capsys, "--max_new_tokens", "x")
    assert refused(capsys, "stray") == "error: options begin with `--`, got stray"
    assert "expected one argument" in refused(capsys, "--config")


def test_recipes(capsys, tmp_path, monkeypatch):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("max_new_tokens: 5\nkind: char\n")
    for words in (["--config", recipe], [f"--config={recipe}"]):
        (args,) = Parser(Arguments).parse_args_and_config([*words, "--kind", "bpe"])
        assert (args.max_new_tokens, args.kind) == (5, "bpe")
    recipe.write_text("max_new_token: 5\n")
    line = f"error: {recipe} has an unknown option `max_new_token`: did you mean `max_new_tokens`?"
    assert refused(capsys, "--config", recipe) == line
    recipe.write_text("traceback: true\n")
    assert "unknown option `traceback`" in refused(capsys, "--config", recipe)
    recipe.write_text("a: [1\n")
    with pytest.raises(ValueError, match="mine.yaml must be YAML: while parsing"):
        Parser(Arguments).parse_args_and_config(["--config", recipe])
    with pytest.raises(ValueError, match="`config` must be a file or the name of a recipe, got min.yaml"):
        Parser(Arguments).parse_args_and_config(["--config", "min.yaml"])
    monkeypatch.chdir(tmp_path)
    assert "quickstart_ar has an unknown option `" in refused(capsys, "--config", "quickstart_ar")


def test_a_file_of_arguments_beside_the_program_is_not_read(monkeypatch, tmp_path):
    """HfArgumentParser's own habit, in silence."""
    (tmp_path / "program.args").write_text("--label hidden")
    monkeypatch.setattr("sys.argv", [str(tmp_path / "program.py")])
    assert Parser(Arguments).parse_args_and_config([])[0].label == "x"


def test_what_is_passed_on(tmp_path, capsys):
    def options():
        return ["--other", "--learning_rate"]

    recipe = tmp_path / "x.yaml"
    recipe.write_text("other: 1\n")
    words = ["--label", "a", "--learning_rate", "1", "--config", recipe]
    args, others = Parser(Arguments, options).parse_args_and_config(words)
    assert args.label == "a" and others == ["--other", "1", "--learning_rate", "1"]
    line = refused(capsys, "--lerning_rate", "1", parser=Parser(Arguments, options))
    assert line == "error: unknown option `--lerning_rate`: did you mean `--learning_rate`?"
    recipe.write_text("othr: 1\n")
    assert "did you mean `other`" in refused(capsys, "--config", recipe, parser=Parser(Arguments, options))


def test_help_shows_defaults_and_choices():
    shown = Parser(Arguments).format_help()
    assert "{bpe,char}" in shown and "(default: 8)" in shown
    assert "--traceback" in shown and "--config RECIPE" in shown and "SUPPRESS" not in shown


def test_the_plain_parser(capsys):
    parser = PlainParser()
    parser.add_argument("folder")
    parser.add_argument("--language", nargs="+")
    for words in (["x", "--lang", "en"], ["x", "--langage", "en"]):
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args(words)
        assert "did you mean `--language`?" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--lnguage", "en"])  # named before what is missing is
    assert capsys.readouterr().err == "error: unknown option `--lnguage`: did you mean `--language`?\n"
    assert parser.parse_args(["x", "--language", "en", "zh"]).language == ["en", "zh"]
