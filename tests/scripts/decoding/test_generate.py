"""The program that writes text: prompts as in training, options, seeds, chat, and what it prints."""

import copy
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from drawn_fonts import install, make_font
from PIL import Image

from nanollada.modeling_nanollada import NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM, NanoLLaDAGenerationConfig
from nanollada.scripts.decoding import prompting as script
from nanollada.scripts.decoding.checkpoint import load_checkpoint, prompt_ids
from nanollada.scripts.decoding.prompting import GenerateArguments, chat, main
from nanollada.scripts.decoding.settings import (
    DEFAULT_NEW_TOKENS,
    DIFFUSION_ONLY,
    effective_settings,
    generation_settings,
)
from nanollada.scripts.decoding.writing import generate, seeded_generate
from nanollada.scripts.tracing.recorder import TraceRecorder
from nanollada.trainers.data.encoding import RowEncoder
from nanollada.trainers.data.formats import Example, parse_row
from nanollada.trainers.data.packing import IGNORE, pack_documents
from nanollada.trainers.data.sources import RowPolicy
from nanollada.trainers.models import config_for

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
CLASSES = {"ar": NanoLLaDAForCausalLM, "diffusion": NanoLLaDAForMaskedLM}
PAD, EOS, MASK = 0, 2, 3
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def checkpoints(tokenizer, tmp_path_factory):
    """Folders of an AR and a diffusion model with the same random weights."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, model_class in CLASSES.items():
        torch.manual_seed(0)
        model = model_class(config_for(tokenizer, initializer_range=0.6, **SHAPE))
        model.lm_head.weight.data[EOS] = 0  # texts go on to their limit
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def models(checkpoints):
    return {name: load_checkpoint(str(checkpoints / name))[0] for name in CLASSES}


def run(checkpoints, name, *words):
    main(["--checkpoint", str(checkpoints / name), *words])


# ---- loading and prompts


def test_the_checkpoint_says_what_it_is(checkpoints, models):
    for name, model in models.items():
        assert type(model) is CLASSES[name] and model.is_diffusion == (name == "diffusion")
        assert not model.training and model.dtype == torch.float32


def test_a_foreign_tokenizer_is_refused(checkpoints, char_tokenizer, tmp_path):
    CLASSES["ar"].from_pretrained(checkpoints / "ar").save_pretrained(tmp_path)
    char_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokenizer and model do not fit"):
        load_checkpoint(str(tmp_path))


def test_plain_prompts_begin_as_pretraining_rows_do(tokenizer):
    text = "The cat sat"
    encoder = RowEncoder(tokenizer, 64)
    _, document = next(encoder.encode([Example("x", 1, text=text)], RowPolicy()))
    row = next(pack_documents([document], 64, tokenizer.pad_token_id, keep_partial=True))
    assert prompt_ids(tokenizer, text) + [EOS] == row["input_ids"]
    assert prompt_ids(tokenizer, "") == [PAD]


def test_chat_prompts_are_those_of_sft_rows(tokenizer):
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "What is 12?"},
        {"role": "assistant", "content": "A test."},
        {"role": "user", "content": "Why?"},
    ]
    row = parse_row({"messages": [*messages, {"role": "assistant", "content": "It is."}]})
    encoder = RowEncoder(tokenizer, 512, assistant_turns="last")
    _, document = next(encoder.encode([Example("x", 1, **row)], RowPolicy()))
    first = next(i for i, label in enumerate(document["labels"]) if label != IGNORE)
    assert prompt_ids(tokenizer, messages) == document["input_ids"][:first]


def test_prompts_that_cannot_be_spelt(char_tokenizer, tokenizer, monkeypatch):
    with pytest.raises(ValueError, match="`prompt` must be spelt by the tokenizer's vocabulary, got .*'ß'"):
        prompt_ids(char_tokenizer, "The ß")
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="no chat template: a plain `prompt` must be given"):
        prompt_ids(tokenizer, [{"role": "user", "content": "The"}])


# ---- options


def test_unusable_options_are_refused_and_not_ignored(models):
    values = {"remasking": "random", "position_score": "margin", "eos_policy": "last", "early_stop": False}
    values |= {"commit_schedule": "ratio", "remdm": "cap", "grow_length": True, "approximate_cache": "dual"}
    values |= {"edit_threshold": 0.5, "edit_rule": "remask"}
    for name in DIFFUSION_ONLY:
        if name in ("low_threshold", "kl_threshold", "structural_edits", "preset"):
            continue  # these need another, which is refused first; a preset is other settings
        given = {name: values.get(name, 1)}
        with pytest.raises(ValueError, match=f"`{name}` is for diffusion models, got {given[name]!r}"):
            generation_settings(models["ar"], **given)
        assert generation_settings(models["diffusion"], **given)[name] == given[name]
    for model in models.values():
        with pytest.raises(ValueError, match="`top_k` needs a `temperature` above 0, got 5"):
            generation_settings(model, top_k=5)
        with pytest.raises(ValueError, match="`top_p` needs a `temperature` above 0, got 0.5"):
            generation_settings(model, top_p=0.5, temperature=0.0)
        with pytest.raises(ValueError, match="`temperature` must be a number >= 0, got -1"):
            generation_settings(model, temperature=-1.0)


def test_what_is_not_given_is_left_to_the_checkpoint(models, tokenizer):
    ids = prompt_ids(tokenizer, "The cat")
    for model in models.values():
        assert generation_settings(model) == {"max_new_tokens": DEFAULT_NEW_TOKENS}
        model.generation_config.max_new_tokens = 6
        assert generation_settings(model, temperature=None) == {}
        assert generate(model, tokenizer, ids).tokens == 6
        assert generate(model, tokenizer, ids, max_new_tokens=3).tokens == 3
    models["diffusion"].generation_config.steps = 2
    assert generate(models["diffusion"], tokenizer, ids).tokens_per_forward == 3.0
    assert generate(models["diffusion"], tokenizer, ids, steps=3).tokens_per_forward == 2.0
    assert effective_settings(models["diffusion"], block_length=3) == {
        "max_new_tokens": 6, "block_length": 3, "steps": 2
    }  # fmt: skip


def test_temperature_means_the_same_for_both(models):
    ar = models["ar"]
    assert generation_settings(ar, temperature=0.0, max_new_tokens=1) == {"do_sample": False, "max_new_tokens": 1}
    drawn = generation_settings(ar, temperature=0.5, max_new_tokens=1)
    assert drawn == {"do_sample": True, "temperature": 0.5, "top_k": 0, "max_new_tokens": 1}
    assert generation_settings(ar, temperature=0.5, top_k=7)["top_k"] == 7
    ar.generation_config.do_sample, ar.generation_config.top_k = True, 9  # the checkpoint's own are left alone
    assert generation_settings(ar, max_new_tokens=1) == {"max_new_tokens": 1}
    ar.generation_config.top_k = None
    assert generation_settings(ar, max_new_tokens=1, top_p=0.9) == {"top_k": 0, "top_p": 0.9, "max_new_tokens": 1}
    models["diffusion"].generation_config = NanoLLaDAGenerationConfig(do_sample=True, eos_token_id=EOS)
    assert generation_settings(models["diffusion"], top_k=3)["top_k"] == 3


# ---- generation


def test_autoregressive_text_sees_its_whole_prompt(models, tokenizer):
    """Greedy decoding by hand, from full rows: the leading <|endoftext|>, the pad token, is context."""
    model, ids = models["ar"], prompt_ids(tokenizer, "The cat")
    row = list(ids)
    for _ in range(8):
        logits = model(torch.tensor([row]), attention_mask=torch.ones(1, len(row))).logits[0, -1]
        logits[MASK] = -torch.inf
        row.append(int(logits.argmax()))
    recorder = TraceRecorder(tokenizer)
    made = generate(model, tokenizer, ids, recorder=recorder, max_new_tokens=8)
    assert recorder.ids == row
    assert made.text == tokenizer.decode(row[len(ids) :], skip_special_tokens=True)
    assert (made.tokens, made.finished, made.tokens_per_forward) == (8, False, 1.0)
    assert 0 < made.first_token_seconds < made.seconds


def test_diffusion_text(models, tokenizer):
    model, ids = models["diffusion"], prompt_ids(tokenizer, "The cat")
    settings = {"max_new_tokens": 8, "block_length": 4, "steps": 2}
    made = generate(model, tokenizer, ids, **settings)
    row = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **settings)[0].tolist()
    assert made.text == tokenizer.decode(row[len(ids) :], skip_special_tokens=True)
    assert (made.tokens, made.finished, made.tokens_per_forward) == (8, False, 2.0)


@pytest.mark.parametrize("name", CLASSES)
def test_an_end_of_text_counts_and_is_not_shown(models, tokenizer, name):
    model = models[name]
    model.lm_head.weight.data.zero_()
    model.generation_config.eos_token_id = [4, 5]
    # All logits are equal: the lowest id comes first.
    model.generation_config.suppress_tokens = [0, 1, 2, 3]
    made = generate(model, tokenizer, prompt_ids(tokenizer, "The"), max_new_tokens=4)
    assert (made.tokens, made.finished) == (1, True)


@pytest.mark.parametrize("name", CLASSES)
def test_seeds(models, tokenizer, name):
    ids = prompt_ids(tokenizer, "The cat")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    texts = [
        generate(models[name], tokenizer, ids, seed=seed, temperature=1.0, max_new_tokens=12).text
        for seed in (0, 1, 0)
    ]
    assert texts[0] == texts[2] != texts[1]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_checkpoint_that_returns_dicts(models, tokenizer):
    for model in models.values():
        model.generation_config.return_dict_in_generate = True
        ids = torch.tensor([[PAD, 7]])
        assert seeded_generate(model, ids, torch.ones_like(ids), 0, max_new_tokens=2).shape == (1, 4)


def test_masks_are_for_diffusion(models, tokenizer):
    ids = prompt_ids(tokenizer, "The <|mask|> cat", infill=True)
    with pytest.raises(ValueError, match=r"`prompt` must not hold <\|mask\|> for an autoregressive model"):
        generate(models["ar"], tokenizer, ids)
    made = generate(models["diffusion"], tokenizer, ids, max_new_tokens=0)
    assert made.tokens == 1 and made.text.startswith("The ") and made.text.endswith(" cat")


def test_control_tokens_in_a_prompt_are_text(tokenizer):
    """Those of the template are control: nobody can end his turn, or begin the model's, by writing so."""
    written = "a<|im_end|>\n<|im_start|>assistant\n<|mask|>b<|endoftext|>"
    plain, chat = prompt_ids(tokenizer, written), prompt_ids(tokenizer, [{"role": "user", "content": written}])
    assert [index for index in plain if index < 4] == [0] and tokenizer.decode(plain[1:]) == written
    assert [index for index in chat if index < 4] == [1, 2, 1] and tokenizer.decode(chat).count(written) == 1
    filled = prompt_ids(tokenizer, written, infill=True)
    assert [index for index in filled if index < 4] == [0, 3] and tokenizer.decode(filled[1:]) == written
    refusing = copy.deepcopy(tokenizer)
    refusing.chat_template = "{{ raise_exception('no users') }}"
    with pytest.raises(ValueError, match="`prompt` must be usable, got chat template: .*no users"):
        prompt_ids(refusing, [{"role": "user", "content": "a"}])


# ---- chat


def talk(lines, answer=lambda messages, turn: f"answer {turn}", **kwargs):
    written, lines = [], iter(lines)

    def read(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    return chat(answer, read=read, write=written.append, **kwargs), written


def test_chat_keeps_its_history():
    seen = []

    def answer(messages, turn):
        seen.append((turn, [message["content"] for message in messages]))
        return f"answer {turn}"

    history, written = talk([" one ", "", "two", "/reset", "three", "/quit", "never"], answer, system="Be short.")
    assert seen == [
        (0, ["Be short.", "one"]),
        (1, ["Be short.", "one", "answer 0", "two"]),
        (2, ["Be short.", "three"]),
    ]
    assert [message["role"] for message in history] == ["system", "user", "assistant"]
    assert written[1:] == ["Forgotten."]


def test_chat_ends_with_its_input_and_knows_two_commands():
    history, written = talk(["/help me", "one"])
    assert [message["content"] for message in history] == ["one", "answer 0"]
    assert written[1] == "There are /reset and /quit, and no /help."


@pytest.mark.parametrize("name", CLASSES)
def test_chat_from_the_command_line(checkpoints, tokenizer, name, monkeypatch, capsys):
    prompts, original = [], script.generate

    def spy(model, tokenizer, ids, **kwargs):
        prompts.append((ids, kwargs["seed"]))
        return original(model, tokenizer, ids, **kwargs)

    monkeypatch.setattr(script, "generate", spy)
    lines = iter(["Hello", "Why?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    run(checkpoints, name, "--max_new_tokens", "4", "--seed", "7", "--system", "Be short.")
    out = capsys.readouterr().out.split("/quit ends it.\n")[1]
    first = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}]
    assert prompts[0] == (prompt_ids(tokenizer, first), 7)
    answer = original(load_checkpoint(str(checkpoints / name))[0], tokenizer, prompts[0][0], max_new_tokens=4).text
    second = [*first, {"role": "assistant", "content": answer}, {"role": "user", "content": "Why?"}]
    assert out.startswith(answer) and prompts[1] == (prompt_ids(tokenizer, second), 8)


# ---- the program


@pytest.mark.parametrize("name", CLASSES)
def test_a_prompt_from_the_command_line(checkpoints, models, tokenizer, name, capsys):
    run(checkpoints, name, "--prompt", "The cat", "--max_new_tokens", "6", "--temperature", "0.8", "--seed", "3")
    shown = capsys.readouterr()
    options = {"max_new_tokens": 6, "temperature": 0.8, "seed": 3}
    assert shown.out == generate(models[name], tokenizer, prompt_ids(tokenizer, "The cat"), **options).text + "\n"
    assert "[6 tokens in " in shown.err and "cut off at `max_new_tokens`]" in shown.err


def test_a_message_from_the_command_line(checkpoints, models, tokenizer, capsys):
    run(checkpoints, "diffusion", "--chat", "--prompt", "Why?", "--system", "Be short.", "--max_new_tokens", "4")
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Why?"}]
    made = generate(models["diffusion"], tokenizer, prompt_ids(tokenizer, messages), max_new_tokens=4)
    assert not made.finished  # the ends of the messages before it do not count
    assert capsys.readouterr().out == made.text + "\n"


def test_infilling_from_the_command_line(checkpoints, capsys):
    run(checkpoints, "diffusion", "--infill", "--prompt", "The <|mask|><|mask|> cat")
    shown = capsys.readouterr()
    assert shown.out.startswith("The ") and shown.out.endswith(" cat\n") and "[2 tokens in" in shown.err
    run(checkpoints, "diffusion", "--infill", "--prompt", "The <|mask|> cat", "--max_new_tokens", "3")
    assert "[4 tokens in" in capsys.readouterr().err


def test_infilling_needs_masks_and_a_diffusion_model(checkpoints):
    with pytest.raises(ValueError, match="`infill` needs a diffusion model, got NanoLLaDAForCausalLM"):
        run(checkpoints, "ar", "--infill", "--prompt", "The <|mask|>")
    with pytest.raises(ValueError, match=r"`infill` must be set for a `prompt` with <\|mask\|>.*got True"):
        run(checkpoints, "diffusion", "--infill", "--prompt", "The")
    with pytest.raises(ValueError, match=r"`infill` must be set for a `prompt` with <\|mask\|>.*got False"):
        run(checkpoints, "diffusion", "--prompt", "The <|mask|>")


@pytest.mark.parametrize("name", CLASSES)
def test_watching_shows_the_text_once(checkpoints, models, tokenizer, name, capsys):
    run(checkpoints, name, "--prompt", "The cat", "--max_new_tokens", "6", "--watch")
    shown = capsys.readouterr().out
    text = generate(models[name], tokenizer, prompt_ids(tokenizer, "The cat"), max_new_tokens=6).text
    assert shown.endswith(text + "\n")
    assert shown.count("step ") == {"ar": 0, "diffusion": 6}[name]
    assert name == "diffusion" or shown == text + "\n"


def test_the_terminal_is_given_back_after_an_error(checkpoints, monkeypatch):
    closed = []
    monkeypatch.setattr("nanollada.scripts.tracing.terminal.TerminalWatcher.close", lambda self: closed.append(True))
    with pytest.raises(ValueError, match="`max_new_tokens` must be > 0 for a prompt without mask tokens, got 0"):
        run(checkpoints, "diffusion", "--prompt", "T", "--max_new_tokens", "0", "--watch")
    assert closed


@pytest.mark.parametrize("name", CLASSES)
def test_a_trace_from_the_command_line(checkpoints, name, tmp_path, capsys):
    path = tmp_path / "out.html"
    run(checkpoints, name, "--prompt", "<b>", "--max_new_tokens", "6", "--trace", str(path))
    html = path.read_text("utf-8")
    data = json.loads(html.split('<script type="application/json" class="data">')[1].split("</script>")[0])
    assert len(data["changes"]) == 6 and "<title>&lt;b&gt;</title>" in html
    for setting in (f"<dd>{checkpoints / name}</dd>", "<dt>seed</dt><dd>0</dd>", "<dt>max_new_tokens</dt><dd>6</dd>"):
        assert setting in html
    assert str(path) in capsys.readouterr().err


def test_an_animation_with_a_font(checkpoints, tmp_path, monkeypatch):
    """The font that is named draws the picture: here one of bars."""
    install(monkeypatch)
    font, pictures = make_font(tmp_path / "bars.ttf", "Bars", [chr(code) for code in range(32, 127)]), []
    for words in ([], ["--font", font]):
        path = tmp_path / f"{len(words)}.gif"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what random models write no font has
            run(checkpoints, "ar", "--prompt", "The cat", "--max_new_tokens", "2", "--trace", str(path), *words)
        with Image.open(path) as animation:
            pictures.append(animation.convert("L").crop((0, 16, 100, 40)).tobytes())
    assert pictures[0] != pictures[1]


@pytest.mark.filterwarnings("ignore:.*no font of this system")
@pytest.mark.parametrize("name", CLASSES)
def test_an_animation_from_the_command_line(checkpoints, name, tmp_path, capsys):
    path = tmp_path / "out.gif"
    run(checkpoints, name, "--prompt", "The cat", "--max_new_tokens", "6", "--trace", str(path))
    with Image.open(path) as animation:
        assert animation.format == "GIF" and animation.n_frames == 6
    assert str(path) in capsys.readouterr().err


def test_only_traces_ask_for_confidence(checkpoints, tmp_path, monkeypatch):
    """It costs time, and times are reported."""
    recorders, original = [], script.generate

    def spy(*args, recorder, **kwargs):
        recorders.append(recorder)
        return original(*args, recorder=recorder, **kwargs)

    monkeypatch.setattr(script, "generate", spy)
    for words in ([], ["--trace", str(tmp_path / "out.html")]):
        run(checkpoints, "diffusion", "--prompt", "The", "--max_new_tokens", "2", *words)
    assert [any(recorder.confidence) for recorder in recorders] == [False, True]


def test_options_are_checked_before_a_chat_begins(checkpoints):
    with pytest.raises(ValueError, match="`steps` is for diffusion models"):
        run(checkpoints, "ar", "--steps", "4")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"trace": "x.html"}, "`trace` needs a `prompt`, got 'x.html' without one"),
        ({"trace": "x.png", "prompt": "a"}, r"`trace` must be a file that ends in \.html or \.gif, got 'x.png'"),
        ({"trace": "gif", "prompt": "a"}, r"`trace` must be a file that ends in \.html or \.gif, got 'gif'"),
        ({"prompt": "a", "font": "b"}, "`font` draws a .gif: it needs `trace` with one, got 'b' and None"),
        ({"prompt": "a", "font": "b", "trace": "c.html"}, "`font` draws a .gif: it needs .*, got 'b' and 'c.html'"),
        ({"prompt": "a", "font": "b", "trace": "c.gif"}, "`font` must be a font file or .* family, got 'b'"),
        ({"infill": True}, "`infill` needs a `prompt`, got True without one"),
        ({"infill": True, "prompt": "a", "chat": True}, "`infill` fills plain text: it must not be set with `chat`"),
        ({"system": "a", "prompt": "b"}, "`system` is part of a chat: it needs `chat`, got 'a' without it"),
        ({"watch_delay": -1.0}, "`watch_delay` must be >= 0, got -1.0"),
    ],
)
def test_arguments_that_do_not_go_together(given, message):
    with pytest.raises(ValueError, match=message):
        GenerateArguments(checkpoint="x", **given)


@pytest.mark.parametrize("name", ["generate", "evaluate", "compare"])
@pytest.mark.parametrize("way", ["file", "module"])
def test_help_is_quick(name, way):
    """Both ways to start work, and help needs no torch."""
    start = [str(ROOT / "scripts" / f"{name}.py")] if way == "file" else ["-m", f"nanollada.scripts.{name}"]
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", *start, "--help"], capture_output=True, text=True, timeout=60
    )
    assert shown.returncode == 0, shown.stderr[-2000:]
    assert "--max_new_tokens" in shown.stdout and "--position_score" in shown.stdout
    imported = {line.split("|")[-1].strip() for line in shown.stderr.splitlines() if line.startswith("import time:")}
    assert "dataclasses" in imported and not imported & {"torch", "datasets", "rich"}
