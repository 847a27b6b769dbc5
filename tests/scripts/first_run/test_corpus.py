"""`first_run/corpus.py`: documentation is prose and reproducible, questions have one answer."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
from boards import brute_force

from nanollada.scripts.first_run import corpus, documentation, questions

SMALL = {"max_bytes": 60_000, "sudoku_train": 60, "sudoku_test": 20, "qa_rows": 40, "sudoku_text_share": 0.5}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return folder, corpus.build_corpus(folder, seed=7, **SMALL)


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


# Documentation


def test_prose_is_kept_and_code_tables_and_special_tokens_are_not():
    docstring = """Return the :class:`~a.b.Thing` that is used for the ``name`` which you have given to it.

    >>> this is not the prose that we want to have in the text of it.

    Parameters
    ----------
    x : int
        The number of the things that are to be made for you.

    ```python
    # This is a comment, and it is in the code, so it should not be in the text.
    ```

    See [the guide](https://example.org) for all of the things that you can do with it.

    The <|mask|> token is not a text that can be in the data of the model at all.

    alpha beta gamma delta epsilon zeta eta theta iota kappa.

    The page at https://example.org is for those of you who want to have more of it.

    Args:
        size (`int`): The number of the fixed-
            size things that are to be in the box."""
    assert documentation.prose_paragraphs(docstring) == [
        "Return the `a.b.Thing` that is used for the `name` which you have given to it.",
        "See the guide for all of the things that you can do with it.",
        "Args:\nsize (`int`): The number of the fixed-size things that are to be in the box.",
    ]


def test_lone_surrogates_and_control_characters_are_left_out():
    sentence = "This is a sentence with a {} in it that is long enough to be kept."
    assert documentation.prose_paragraphs(sentence.format("word"))
    assert documentation.prose_paragraphs(sentence.format("\ud800")) == []
    assert documentation.prose_paragraphs(sentence.format("\x00")) == []
    (separated,) = documentation.prose_paragraphs(sentence.format("\u2028"))
    assert "\u2028" not in separated  # would break jsonl for splitlines


def test_documents_are_well_formed_unique_and_within_the_budget(built):
    folder, facts = built
    rows = read(folder / "pretrain.jsonl")
    documents = [row for row in rows if row["source"] != "sudoku"]
    assert len(documents) > 20
    assert all(200 <= len(row["text"]) <= 4000 for row in documents)
    assert not any("<|" in row["text"] or ">>>" in row["text"] for row in documents)
    paragraphs = [part for row in documents for part in row["text"].split("\n\n") if len(part.split()) > 8]
    assert max(Counter(paragraphs).values()) == 1
    assert 50_000 < facts["text_bytes"] == sum(len(row["text"].encode()) for row in documents) <= 60_000
    assert facts["text_bytes"] == sum(package["bytes"] for package in facts["packages"].values())
    assert len(documents) == sum(package["documents"] for package in facts["packages"].values())
    assert facts["packages"]["python"]["version"] == sys.version.split()[0].rstrip("+")
    assert all(package["license"] for package in facts["packages"].values())
    assert {row["source"].split(": ")[0] for row in documents} == set(facts["packages"])


def test_copied_docstrings_that_differ_in_names_only_are_kept_once():
    seen = set()
    text = "This is the `{}` that is used to be the {} of the {} models."
    assert documentation._new_paragraphs(text.format("BertModel", "first", 12), seen)
    assert not documentation._new_paragraphs(text.format("LlamaModel", "first", 48), seen)
    assert documentation._new_paragraphs(text.format("LlamaModel", "last", 48), seen)


def test_unreadable_files_are_named_and_the_rest_is_read(tmp_path):
    sentence = "This is the text that is to be read from the file of the module, which is long enough to be kept. "
    (tmp_path / "good.py").write_text(f'"""{sentence * 5}"""\n')
    (tmp_path / "bad.py").write_text(f'"""{sentence * 5}"""\nprint "no"\n')
    found = documentation.Documentation([], [], {"python": {"documents": 0, "bytes": 0}}, [])
    documentation._collect(documentation._library_units(tmp_path), 10_000, found)
    assert found.unreadable_files == ["python: bad.py"]
    assert [row["source"] for row in found.documents] == ["python: good.py"]
    assert found.documents[0]["text"] == "good\n\n" + (sentence * 5).strip()


def test_long_documents_are_split_and_short_entries_share_one():
    paragraph = "a" * 1500
    texts = list(documentation._texts([("m.long", [paragraph] * 3), ("m.f", ["b" * 120]), ("m.g", ["c" * 120])]))
    assert [len(text) for text in texts] == [len("m.long") + 2 * 1502, 1500, 2 * 120 + 2 * len("`m.f`: ") + 2]
    assert texts[2].startswith("`m.f`: b") and "\n\n`m.g`: c" in texts[2]


def test_documentation_refuses_a_negative_budget_and_gives_nothing_for_none():
    assert documentation.read_documentation(0).documents == []
    with pytest.raises(ValueError, match="`max_bytes` must not be negative, got -1"):
        documentation.read_documentation(-1)


# Questions


def item(kind, name, docstring, arguments=None):
    module = name.rsplit(".", 1)[0] if kind != "module" else name
    return documentation.DocumentedObject(kind, name, module, docstring, arguments)


def pairs(objects, count=1000):
    rows = questions.question_answer_rows(objects, count)
    return {row["messages"][0]["content"]: row["messages"][1]["content"] for row in rows}


def test_questions_about_a_function_and_a_module():
    dedent = item("function", "textwrap.dedent", "Remove common whitespace.  And\nmore of it.", ("text",))
    assert pairs([dedent, item("module", "textwrap", "Text wrapping and filling.\n")]) == {
        "What does the function `textwrap.dedent` do?": "Remove common whitespace.",
        "Which function has this description: Remove common whitespace.": "`textwrap.dedent`",
        "In which module is the function `dedent` defined?": "`textwrap`",
        "Which arguments does the function `textwrap.dedent` take?": "`text`",
        "What is the module `textwrap` for?": "Text wrapping and filling.",
        "Which module has this description: Text wrapping and filling.": "`textwrap`",
    }


def test_ambiguous_leaking_and_private_questions_are_not_asked():
    summary = "Copies all of it."
    asked = pairs([item("function", name, summary, ()) for name in ("a.copy", "b.copy", "glob.glob", "a._hidden")])
    assert "In which module is the function `copy` defined?" not in asked
    assert f"Which function has this description: {summary}" not in asked
    assert "In which module is the function `glob` defined?" not in asked  # "`glob`" stands in the question
    assert not any("_hidden" in question for question in asked)
    assert asked["What does the function `a.copy` do?"] == asked["What does the function `b.copy` do?"] == summary
    assert asked["Which arguments does the function `a.copy` take?"] == "None."


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return the ``name`` of :func:`os.path.join`", "Return the `name` of `os.path.join`."),
        ("Return one. Then two.", ""),  # too short to say anything
        ("f(a, b) -> the sum of both", ""),
        ("Build a table:\n\nwith rows", ""),
        ("A" + " very" * 40 + " long sentence.", ""),
        ("Return 1.5 times the value. More.", "Return 1.5 times the value."),
    ],
)
def test_first_sentence(docstring, sentence):
    assert questions.first_sentence(docstring) == sentence


def test_question_count_is_a_limit_and_negative_is_refused():
    objects = [item("function", f"m.f{number}", f"Does the thing {number}.", ()) for number in range(10)]
    assert len(questions.question_answer_rows(objects, 7)) == 7
    with pytest.raises(ValueError, match="`count` must not be negative, got -2"):
        questions.question_answer_rows(objects, -2)


# The folder


def test_rows_of_the_folder_are_well_formed_and_no_prompt_holds_its_answer(built):
    folder, facts = built
    sft, tests = read(folder / "sft.jsonl"), read(folder / "sudoku_test.jsonl")
    assert Counter(row["source"] for row in sft) == {"sudoku": 60, "documentation": 40}
    assert facts["question_rows"] == 40 and len(tests) == 20
    for row in sft:
        assert set(row) == {"messages", "source"}
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        question, answer = (message["content"] for message in row["messages"])
        assert question and 0 < len(answer) <= 120 and answer not in question
    answers = {}
    for row in sft:
        question, answer = (message["content"] for message in row["messages"])
        assert answers.setdefault(question, answer) == answer
    assert len(answers) == len(sft)
    for row in tests:
        assert row["prompt"] == [{"role": "user", "content": f"Sudoku {row['puzzle']}"}]
        assert row["completion"] == [{"role": "assistant", "content": row["answer"]}]
        assert row["puzzle"].count("0") >= 8 and brute_force(row["puzzle"]) == [row["answer"]]


def test_held_out_boards_are_nowhere_in_training(built):
    folder, facts = built
    held_out = set(facts["held_out_grids"])
    assert len(held_out) == 48
    assert {row["answer"] for row in read(folder / "sudoku_test.jsonl")} <= held_out
    solved = [row["text"] for row in read(folder / "pretrain.jsonl") if row["source"] == "sudoku"]
    assert len(solved) == facts["solved_in_pretrain"] == 30
    boards = {text.split("\n")[1] for text in solved}
    boards |= {row["messages"][1]["content"] for row in read(folder / "sft.jsonl") if row["source"] == "sudoku"}
    assert boards and not boards & held_out
    training = (folder / "pretrain.jsonl").read_text() + (folder / "sft.jsonl").read_text()
    assert not any(board in training for board in held_out)


def test_another_process_writes_the_same_bytes_and_imports_nothing_it_reads(built, tmp_path):
    folder, facts = built
    code = (
        "import json, sys; from nanollada.scripts.first_run.corpus import build_corpus;"
        "build_corpus(sys.argv[1], seed=7, **json.loads(sys.argv[2]));"
        "assert not {'torch', 'numpy', 'transformers', 'tkinter', 'sympy'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "123"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path), json.dumps(SMALL)], check=True, env=environment)
    names = ["facts.json", "pretrain.jsonl", "sft.jsonl", "sudoku_test.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_a_finished_folder_is_left_alone_and_a_changed_one_is_built_anew(tmp_path, monkeypatch):
    settings = {"max_bytes": 0, "sudoku_train": 10, "sudoku_test": 5, "qa_rows": 0}
    reads = []
    monkeypatch.setattr(
        corpus, "read_documentation", lambda *_: reads.append(1) or documentation.Documentation([], [], {}, [])
    )
    facts = corpus.build_corpus(tmp_path, **settings)
    assert corpus.build_corpus(tmp_path, **settings) == facts and len(reads) == 1
    original = (tmp_path / "sft.jsonl").read_bytes()
    (tmp_path / "sft.jsonl").write_bytes(original[:-5])  # cut off
    assert corpus.build_corpus(tmp_path, **settings) == facts and len(reads) == 2
    assert (tmp_path / "sft.jsonl").read_bytes() == original
    (tmp_path / "facts.json").write_text("{")
    assert corpus.build_corpus(tmp_path, **settings) == facts and len(reads) == 3
    assert corpus.build_corpus(tmp_path, **settings | {"sudoku_test": 6})["files"]["sudoku_test.jsonl"]["rows"] == 6
    assert len(reads) == 4


def test_a_build_that_dies_half_way_is_not_taken_for_finished(tmp_path, monkeypatch):
    settings = {"max_bytes": 0, "sudoku_train": 10, "sudoku_test": 5, "qa_rows": 0}
    monkeypatch.setattr(corpus, "read_documentation", lambda *_: documentation.Documentation([], [], {}, []))
    facts = corpus.build_corpus(tmp_path, **settings)
    with monkeypatch.context() as patch:
        write = corpus._write
        patch.setattr(corpus, "_write", lambda path, text: 1 / 0 if path.name[:3] == "sft" else write(path, text))
        with pytest.raises(ZeroDivisionError):
            corpus.build_corpus(tmp_path, seed=1, **settings)
    assert not (tmp_path / "facts.json").exists()
    assert corpus.build_corpus(tmp_path, **settings) == facts


def test_wrong_share_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="`sudoku_text_share` must be between 0 and 1, got 1.5"):
        corpus.build_corpus(tmp_path / "new", sudoku_text_share=1.5)
    assert not (tmp_path / "new").exists()
