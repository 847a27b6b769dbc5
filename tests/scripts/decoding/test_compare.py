"""Side by side: the same prompts for both models, honest times, and what is refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from rich.console import Console

from nanollada.modeling_nanollada import NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM
from nanollada.scripts.decoding import comparison
from nanollada.scripts.decoding.checkpoint import load_checkpoint, prompt_ids
from nanollada.scripts.decoding.comparison import (
    CompareArguments,
    compare,
    comparison_table,
    main,
    read_prompts,
)
from nanollada.scripts.decoding.settings import DecodingArguments
from nanollada.scripts.decoding.writing import Generated, generate
from nanollada.scripts.tracing.pieces import TokenPieces, trace_cells
from nanollada.trainers.models import config_for

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
CLASSES = {"ar": NanoLLaDAForCausalLM, "diffusion": NanoLLaDAForMaskedLM}


@pytest.fixture(scope="module")
def folder(tokenizer, char_tokenizer, tmp_path_factory):
    """Random checkpoints `ar`, `diffusion`, and `other`, an AR model with another tokenizer."""
    folder = tmp_path_factory.mktemp("compare")
    for name, kind, vocabulary in (
        ("ar", "ar", tokenizer), ("diffusion", "diffusion", tokenizer), ("other", "ar", char_tokenizer),
    ):  # fmt: skip
        torch.manual_seed(0)
        CLASSES[kind](config_for(vocabulary, initializer_range=0.6, **SHAPE)).save_pretrained(folder / name)
        vocabulary.save_pretrained(folder / name)
    return folder


def pair(folder):
    return str(folder / "ar"), str(folder / "diffusion")


def compared(pair, prompts, repeats=1, seed=0, chat=False, **decoding):
    return compare(CompareArguments(*pair, prompts, chat, repeats, seed), DecodingArguments(**decoding))


def test_both_models_go_on_from_the_same_prompts(folder, tokenizer):
    prompts = ["The cat", [{"role": "user", "content": "Why?"}]]
    decoding = {"max_new_tokens": 8, "temperature": 0.7, "steps": 2, "block_length": None}
    records = compared(pair(folder), prompts, repeats=2, seed=3, **decoding)
    assert [(record["prompt"], record["model"]) for record in records] == [
        (prompt, model) for prompt in prompts for model in CLASSES
    ]
    for record in records:
        name = record["model"]
        model, _ = load_checkpoint(str(folder / name))
        given = {key: value for key, value in decoding.items() if name == "diffusion" or key not in ("steps",)}
        ids = prompt_ids(tokenizer, record["prompt"])
        expected = generate(model, tokenizer, ids, seed=3, **given)
        for key in ("text", "tokens", "finished", "tokens_per_forward"):
            assert record[key] == getattr(expected, key)
        assert 0 < record["first_token_seconds"] < record["seconds"]
        assert record["tokens_per_second"] == pytest.approx(record["tokens"] / record["seconds"])
        assert (record["repeats"], record["seed"], record["checkpoint"]) == (2, 3, str(folder / name))
    assert records[0]["settings"] == {"max_new_tokens": 8, "temperature": 0.7, "do_sample": True, "top_k": 0}
    assert records[1]["settings"]["steps"] == 2
    assert records[0]["tokens_per_forward"] == 1.0 and records[1]["tokens_per_forward"] > 1.0


def test_texts_may_be_messages(folder):
    asked = compared(pair(folder), ["Why?"], chat=True, repeats=1, max_new_tokens=4)
    written = compared(pair(folder), [[{"role": "user", "content": "Why?"}]], repeats=1, max_new_tokens=4)
    assert [record["text"] for record in asked] == [record["text"] for record in written]
    assert asked[0]["prompt"] == "Why?"


def test_times_are_medians_without_the_warm_up(folder, monkeypatch):
    clock = iter([(90.0, 50.0), (4.0, 1.0), (1.0, 3.0), (2.0, 2.0), (6.0, 1.0), (8.0, 2.0), (7.0, 3.0)] * 2)

    def fake(*args, **kwargs):
        seconds, first = next(clock)
        return Generated("text", 10, True, seconds, first, 2.0)

    monkeypatch.setattr(comparison, "generate", fake)
    records = compared(pair(folder), ["a", "b"], repeats=3)
    times = [(record["seconds"], record["first_token_seconds"], record["tokens_per_second"]) for record in records]
    assert times == [(2.0, 2.0, 5.0)] * 2 + [(7.0, 2.0, 10 / 7)] * 2
    assert next(clock, None) is None  # one warm-up run per model, none per prompt


def test_what_cannot_be_compared(folder):
    ar, diffusion = pair(folder)
    for checkpoints, prompts, options, message in (
        ((ar, ar), ["a"], {}, "`diffusion` must be a diffusion checkpoint, got NanoLLaDAForCausalLM"),
        ((diffusion, diffusion), ["a"], {}, "`ar` must be an autoregressive checkpoint, got NanoLLaDAForMaskedLM"),
        ((str(folder / "other"), diffusion), ["a"], {}, "`ar` and `diffusion` must have the same tokenizer"),
        ((ar, diffusion), [], {}, "`prompts` must hold at least one prompt, got none"),
        ((ar, diffusion), ["a"], {"repeats": 0}, "`repeats` must be at least 1, got 0"),
        ((ar, diffusion), ["a"], {"steps": 0}, "`steps` must be an integer >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            compared(checkpoints, prompts, **options)
    with pytest.raises(ValueError, match=r"`trace_gif` must be a file that ends in \.gif, got 'a.html'"):
        CompareArguments(ar, diffusion, ["a"], trace_gif="a.html")
    for options, message in (
        ({"font": "DejaVu Sans"}, "`font` draws a .gif: it needs `trace_gif` with one, got 'DejaVu Sans' and None"),
        ({"font": "nowhere", "trace_gif": "a.gif"}, "`font` must be a font file or .* family, got 'nowhere'"),
    ):
        with pytest.raises(ValueError, match=message):
            CompareArguments(ar, diffusion, ["a"], **options)
    with pytest.raises(ValueError, match="`trace_gif` shows one prompt: `prompts` must hold one, got 2"):
        compare(CompareArguments(ar, diffusion, ["a", "b"], trace_gif="a.gif"))


@pytest.mark.filterwarnings("ignore:.*no font of this system")
def test_a_picture_of_both(folder, tokenizer, tmp_path, monkeypatch, capsys):
    """Left diffusion and right AR write what was compared, a frame per forward pass of the slower one."""
    from nanollada.scripts.tracing import gif

    drawn, original = [], gif.write_gif
    monkeypatch.setattr(
        gif, "write_gif", lambda traces, *rest: (drawn.append((traces, *rest)), original(traces, *rest))
    )
    words = ["--ar", pair(folder)[0], "--diffusion", pair(folder)[1], "--prompts", "The cat", "--repeats", "1"]
    words += ["--max_new_tokens", "8", "--steps", "2", "--temperature", "0.7", "--seed", "3"]
    records = main([*words, "--trace_gif", str(tmp_path / "out.gif"), "--font", "dejavu sans"])
    assert f"animation: {tmp_path / 'out.gif'}" in capsys.readouterr().out
    with Image.open(tmp_path / "out.gif") as animation:
        assert animation.n_frames == 8  # the AR model's passes
    ((traces, path, font),) = drawn
    assert (path, font) == (str(tmp_path / "out.gif"), "dejavu sans")
    assert list(traces) == ["Diffusion", "AR"] and [len(trace.steps) for trace in traces.values()] == [2, 8]
    start = len(prompt_ids(tokenizer, "The cat"))
    for record, trace in zip(records, [traces["AR"], traces["Diffusion"]], strict=True):
        new = trace.ids[start : trace.kept]
        assert tokenizer.decode(new, skip_special_tokens=True) == record["text"] and len(new) == record["tokens"]
        assert [cell.piece for cell in trace_cells(trace)[-1][start:]] == TokenPieces(tokenizer)(new)


def test_prompts_from_files(tmp_path):
    assert read_prompts(["one", "two.txt"]) == ["one", "two.txt"] and read_prompts(["one"]) == ["one"]
    text, rows = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text("one\n\ntwo é\n", encoding="utf-8")
    assert read_prompts([str(text)]) == ["one", "two é"]
    user, answer = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
    lines = [{"prompt": "one"}, {"prompt": [user], "completion": [answer]}, {"messages": [user, answer, user, answer]}]
    rows.write_text("\n".join(json.dumps(line) for line in lines))
    assert read_prompts([str(rows)]) == ["one", [user], [user, answer, user]]
    for content, message in (
        ("", "`prompts` must hold at least one prompt, got none in .*a.jsonl"),
        ('{"prompt": "a"}\n{"text": "b"}', "`prompts` must hold `prompt` or `messages`, got .*a.jsonl, row 2 without"),
        ("[1]", "`prompts` must hold `prompt` or `messages`, got .*a.jsonl, row 1 without"),
        ("{", "`prompts` must hold JSON, got .*a.jsonl, row 1"),
    ):
        rows.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_prompts([str(rows)])
    with pytest.raises(ValueError, match="`prompts` names a file that does not exist: .*b.txt"):
        read_prompts([str(tmp_path / "b.txt")])


def test_the_program(folder, tmp_path, capsys):
    ar, diffusion = pair(folder)
    words = ["--ar", ar, "--diffusion", diffusion, "--prompts", "The cat", "[red]a[/red]", "--repeats", "1"]
    records = main([*words, "--max_new_tokens", "4", "--steps", "2", "--output", str(tmp_path / "out.json")])
    written = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert written["results"] == records and len(records) == 4
    assert written["command"] and written["hardware"] and written["versions"]["torch"]
    assert "medians of 1 runs" in capsys.readouterr().out


def test_the_table_takes_texts_as_they_are():
    facts = {"seconds": 1.5, "tokens_per_second": 20.0, "first_token_seconds": 0.25, "tokens_per_forward": 4.0}
    facts["edits"] = {}
    rows = [
        {"prompt": "[red]a[/red]", "model": "ar", "text": "[b]", "finished": True, "repeats": 3, **facts},
        {"prompt": [{"role": "user", "content": "Why?"}], "model": "ar", "text": "c", "finished": False, **facts},
    ]
    console = Console(width=140, record=True, file=SimpleNamespace(write=lambda text: None, flush=lambda: None))
    console.print(comparison_table(rows))
    shown = console.export_text()
    for part in ("[red]a[/red]", "[b]", "Why?", "c …", "1.500", "20.0", "0.250", "4.00", "medians of 3 runs"):
        assert part in shown
    assert "edits" not in shown
    console.print(comparison_table([{**rows[0], "edits": {"edited": 3}}, rows[1]]))
    assert "3 edited" in console.export_text()
