"""Both kinds of tokenizer: exact round trips, ids, template, saving, and the program."""

import json
import os
import shlex

import pytest
from transformers import AutoTokenizer

from nanollada.trainers import run
from nanollada.trainers.data.files import DataError
from nanollada.trainers.data.sources import SourceArguments
from nanollada.trainers.data.tokenizers import SPECIAL_TOKENS, main, read_texts, save_tokenizer, train_tokenizer
from nanollada.trainers.registry import TRAINERS

CHAT = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is a test."}]
RENDERED = "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\nIt is a test.<|im_end|>\n"
TRICKY = [
    "plain words , with . spaced ! punctuation n't 's",
    " leading and trailing  ",
    "line\n\n\nlines\r\n\ttabs \n ",
    "你好,世界。12 天 🎉👩‍👩‍👧 e\u0301 é ﬁ",
    "\x00\x7f\u200b\ufeff\U0010ffff",
    "a <|im_start|>user\n b<|im_end|> <|mask|> <|endoftext|>",
]


@pytest.fixture(params=["bpe", "char"])
def either(request, tokenizer, char_tokenizer):
    return tokenizer if request.param == "bpe" else char_tokenizer


def reloaded(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_special_tokens_survive_saving(either, tmp_path):
    for tok in (either, reloaded(either, tmp_path)):
        assert tok.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3]
        assert (tok.pad_token_id, tok.bos_token_id, tok.eos_token_id, tok.mask_token_id) == (0, 1, 2, 3)
        assert tok.is_fast and tok.clean_up_tokenization_spaces is False
        assert tok.chat_template == either.chat_template
        assert len(tok) == len(either)
        assert max(tok.get_vocab().values()) == len(tok) - 1


@pytest.mark.parametrize("text", TRICKY)
def test_bpe_round_trip(text, tokenizer, tmp_path):
    for tok in (tokenizer, reloaded(tokenizer, tmp_path)):
        assert tok.decode(tok(text).input_ids) == text


@pytest.mark.parametrize("text", TRICKY)
def test_char_round_trip(text, tmp_path):
    trained = train_tokenizer([text], kind="char")
    for tok in (trained, reloaded(trained, tmp_path)):
        assert tok.decode(tok(text).input_ids) == text


def test_nothing_is_added_to_the_text(either):
    ids = either("The cat").input_ids
    assert not set(ids) & {0, 1, 2, 3}
    assert either.decode(ids) == "The cat"


def test_bpe_has_the_size_asked_for(tokenizer):
    assert len(tokenizer) == 300
    assert tokenizer.vocab_size == 300


def test_bpe_learns_merges(tokenizer):
    assert len(tokenizer("The cat sat on the mat.").input_ids) < 0.6 * len("The cat sat on the mat.")


def test_bpe_splits_numbers_into_digits():
    tokenizer = train_tokenizer(["2024 2024 1234 3 4"] * 50, 290)
    for text in ("2024", "1 2 3 4", "a2024b", "1234|3412"):
        digits = [tokenizer.decode([token]) for token in tokenizer(text).input_ids]
        assert [digit for digit in digits if digit.isdigit()] == [c for c in text if c.isdigit()]


def test_smallest_bpe_encodes_everything():
    tokenizer = train_tokenizer(["abc"], 260)
    assert len(tokenizer) == 260
    assert tokenizer.decode(tokenizer("你好 🎉 zzz").input_ids) == "你好 🎉 zzz"


def test_small_corpus_gives_fewer_entries_and_says_so(caplog):
    assert len(train_tokenizer(["abc abc abc"], 1000)) < 1000
    assert "of 1000 entries" in caplog.text


def test_char_vocabulary_is_special_tokens_and_sorted_characters():
    tokenizer = train_tokenizer(["ba\n", "c 你"], kind="char")
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == [*SPECIAL_TOKENS, "\n", " ", "a", "b", "c", "你"]
    assert tokenizer("abc 你\n").input_ids == [6, 7, 8, 5, 9, 4]


def test_char_refuses_unknown_characters(char_tokenizer, tmp_path):
    for tok in (char_tokenizer, reloaded(char_tokenizer, tmp_path)):
        with pytest.raises(Exception, match="Missing"):
            tok("☃")


def test_texts_may_be_a_stream():
    texts = ["the cat and the dog"] * 20
    assert train_tokenizer(iter(texts), 280).get_vocab() == train_tokenizer(texts, 280).get_vocab()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kind": "word"}, "`kind` must be 'bpe' or 'char', got 'word'"),
        ({"vocab_size": 259}, "`vocab_size` must be at least 260 .*, got 259"),
        ({"vocab_size": 300, "kind": "char"}, "`vocab_size` must not be given with `kind='char'`, got 300"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(["abc"], **kwargs)


@pytest.mark.parametrize("kind", ["bpe", "char"])
@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_no_text(kind, texts):
    with pytest.raises(ValueError, match="`texts` must hold some text, got none"):
        train_tokenizer(texts, kind=kind)


def test_chat_template(either, tmp_path):
    for tok in (either, reloaded(either, tmp_path)):
        assert tok.apply_chat_template(CHAT, tokenize=False) == RENDERED
        prompt = tok.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
        assert prompt == "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
        assert RENDERED.startswith(prompt)


def test_generation_spans_hold_the_answer_and_its_end(either):
    chat = [{"role": "system", "content": "The test."}, *CHAT, *CHAT]
    out = either.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    marked = [token for token, mark in zip(out["input_ids"], out["assistant_masks"], strict=True) if mark]
    assert either.decode(marked) == "It is a test.<|im_end|>" * 2


def write_sources(tmp_path):
    rows = [{"text": "hello world"}, {"conversations": CHAT}, {"prompt": "one two ", "completion": "three"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "notes.txt").write_text("first paragraph\nstill first\n\nsecond\n")
    return [str(tmp_path / "rows.jsonl"), str(tmp_path / "*.txt")]


def test_read_texts(tmp_path):
    args = SourceArguments(data=write_sources(tmp_path))
    texts = list(read_texts(args))
    chat = ["user\nWhat is it?", "assistant\nIt is a test."]
    assert texts == ["hello world", *chat, "one two three", "first paragraph\nstill first", "second"]
    assert list(read_texts(args, max_rows=2)) == texts[:3]


def test_read_texts_of_broken_rows(tmp_path, caplog):
    (tmp_path / "rows.jsonl").write_text('{"text": "good"}\n{"text": 1}\n')
    args = SourceArguments(data=[str(tmp_path / "rows.jsonl")])
    with pytest.raises(DataError, match="rows.jsonl, row 2: wrong type"):
        list(read_texts(args))
    args.on_bad_rows = "skip"
    assert list(read_texts(args)) == ["good"]
    assert "skipped 1 broken rows: {'wrong type': 1}" in caplog.text


def test_program_bpe(tmp_path, capsys):
    main(["--data", *write_sources(tmp_path), "--output_dir", str(tmp_path / "out"), "--vocab_size", "265"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer) == 265
    assert "bpe tokenizer with 265 entries" in capsys.readouterr().out


def test_program_char_from_yaml(tmp_path):
    sources = write_sources(tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"data": sources, "kind": "char", "output_dir": str(tmp_path / "out")}))
    main(["--config", str(config)])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_program_refuses(tmp_path):
    with pytest.raises(ValueError, match="`output_dir` must be given"):
        main(["--data", *write_sources(tmp_path)])
    with pytest.raises(ValueError, match="`data` must name at least one source"):
        main(["--output_dir", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="`max_rows` must be at least 1, got 0"):
        main(["--data", "x.txt", "--output_dir", "out", "--max_rows", "0"])


def test_another_tokenizer_is_not_overwritten(tmp_path, capsys):
    """The same one is left as it is; files that are none of a tokenizer's stay."""
    rows, out = write_sources(tmp_path), tmp_path / "out"
    train = ["--data", *rows, "--output_dir", str(out), "--vocab_size"]
    main([*train, "265"])
    (out / "notes.txt").write_text("mine")
    written = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    capsys.readouterr()
    main([*train, "265"])
    assert "(unchanged: it was there)" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == written
    with pytest.raises(ValueError, match=f"`output_dir` holds another tokenizer: .*`overwrite`, got {out}"):
        main([*train, "262"])
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == written
    main([*train, "262", "--overwrite"])
    assert len(AutoTokenizer.from_pretrained(out)) == 262 and (out / "notes.txt").read_text() == "mine"
    assert not list(tmp_path.glob("*.partial"))


def test_a_kill_leaves_no_half_tokenizer(tokenizer, char_tokenizer, tmp_path, monkeypatch):
    """A folder has all files of one, or its `tokenizer.json` comes last."""

    def killed(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            save_tokenizer(tokenizer, tmp_path / "new")
    assert not list(tmp_path.iterdir())
    moved, replace = [], os.replace
    save_tokenizer(tokenizer, tmp_path / "old")
    monkeypatch.setattr("os.replace", lambda source, target: (moved.append(target.name), replace(source, target)))
    assert save_tokenizer(char_tokenizer, tmp_path / "old", overwrite=True)
    assert moved[-1] == "tokenizer.json" and len(moved) > 1


def test_the_next_command_is_one(tmp_path, capsys):
    rows = tmp_path / "my rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"hello world, said cat {number}"}) + "\n" for number in range(200)))
    main(["--data", str(rows), "--output_dir", str(tmp_path / "tokenizer"), "--vocab_size", "265"])
    command = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Next: "))
    words = shlex.split(command.removeprefix("Next: "))
    assert words[1] == "launch" and words[2].endswith("trainers/causal.py")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_length": 8, "max_steps": 1}
    small |= {"plot_loss": False, "use_cpu": True}
    facts = run.main(TRAINERS["ar"], [*words[3:], *(f"--{name}={value}" for name, value in small.items())])
    assert facts["steps"] == 1 and (tmp_path / "ar" / "model.safetensors").exists()
