"""The demo's page: what it shows is what `generate` gives, step by step; bad settings come back as messages."""

import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from colours import contrast

from nanollada.modeling_nanollada import NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM
from nanollada.scripts.decoding.checkpoint import load_pair, prompt_ids
from nanollada.scripts.decoding.demo_page import (
    FIELDS,
    LARGEST_SEED,
    TOKEN,
    DemoArguments,
    build_page,
    count_steps,
    first_values,
    prepare,
    read_fields,
    write_all,
)
from nanollada.scripts.decoding.examples import answers_chats, example_prompts
from nanollada.scripts.decoding.writing import generate
from nanollada.scripts.tracing.pieces import trace_cells
from nanollada.scripts.tracing.recorder import TraceRecorder
from nanollada.trainers.models import config_for
from nanollada.trainers.puzzles.sudoku import count_solutions

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
CLASSES = {"ar": NanoLLaDAForCausalLM, "diffusion": NanoLLaDAForMaskedLM}
ROOT = Path(__file__).parents[3]
EOS = 2
QUESTION = "What is it?"
PROMPT = "The {{cat}} ${1 + 1} <b>&amp;"  # markup of pages and templates is text


@pytest.fixture(scope="module")
def names(tokenizer, tmp_path_factory):
    """Folders of an AR and a diffusion model with random weights."""
    folder = tmp_path_factory.mktemp("demo")
    for name, model_class in CLASSES.items():
        torch.manual_seed(0)
        model = model_class(config_for(tokenizer, initializer_range=0.6, **SHAPE))
        model.lm_head.weight.data[EOS] = 0  # texts go on to their limit
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    asked = [{"prompt": [{"role": "user", "content": QUESTION}], "answer": "It is a test"}]
    evaluation = {"version": 2, "results": [{"task": "questions", "examples": asked}]}
    (folder / "diffusion" / "evaluation.json").write_text(json.dumps(evaluation))
    return {name: str(folder / name) for name in CLASSES}


@pytest.fixture(scope="module")
def pair(names):
    return load_pair(names["ar"], names["diffusion"])


class View(HTMLParser):
    """Of a view's HTML the cells (class, style, title, text), the figures, and the text without colours."""

    def __init__(self, source):
        super().__init__()
        self.cells, self.terms, self.values, self.text = [], [], [], None
        self.canvas, self.into = False, None
        self.feed(source)
        self.figures = dict(zip(self.terms, self.values, strict=True))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.canvas = self.canvas and tag in ("span", "b", "i") or "canvas" in given.get("class", "").split()
        if self.canvas and tag == "span":
            self.cells.append([given.get("class"), given.get("style"), given.get("title"), ""])
        self.into = {"dt": self.terms, "dd": self.values}.get(tag)
        if self.into is not None:
            self.into.append("")
        if tag == "pre":
            self.text, self.into = "", "text"

    def handle_endtag(self, tag):
        self.canvas = self.canvas and tag not in ("p", "div")
        self.into = None

    def handle_data(self, data):
        if self.canvas:
            self.cells[-1][3] += data
        elif self.into == "text":
            self.text += data
        elif self.into is not None:
            self.into[-1] += data


def expected(pair, name, step=None, prompt=PROMPT, **given):
    """`generate` by itself: what it gives, and what its trace has at a step."""
    model, tokenizer = pair[name]
    seed = given.pop("seed")
    if name == "ar":
        given = {key: value for key, value in given.items() if key in ("max_new_tokens", "temperature")}
    recorder = TraceRecorder(tokenizer)
    made = generate(model, tokenizer, prompt_ids(tokenizer, prompt), seed=seed, recorder=recorder, **given)
    last = len(recorder.steps)
    return made, recorder, trace_cells(recorder, last if step is None else min(step, last))[0]


def check(view, cells, recorder, step):
    """A view against a trace: tokens, the steps that decided them, confidence."""
    assert [cell[3] for cell in view.cells] == [
        TOKEN if cell.piece.kind == "special" else cell.piece.text for cell in cells
    ]
    titles = [cell[2] or "" for cell in view.cells]
    assert [int((re.findall(r"step (\d+)", title) or [0])[0]) for title in titles] == [cell.when for cell in cells]
    shown = [re.findall(r"confidence ([\d.]+)", title) for title in titles]
    assert shown == [[] if cell.confidence is None else [f"{cell.confidence:.3f}"] for cell in cells]
    assert view.figures["forward passes"] == f"{min(step, len(recorder.steps))} of {len(recorder.steps)}"
    assert view.figures["tokens"] == str(sum(cell.when > 0 for cell in cells))


# ---- without a browser


def test_fields_are_options():
    given = read_fields(seed=" 3 ", steps="", block_length=" ", max_new_tokens="8", temperature="0.7")
    assert given == {"seed": 3, "max_new_tokens": 8, "temperature": 0.7} and isinstance(given["seed"], int)
    assert read_fields(seed="0", steps="2.5")["steps"] == 2.5  # not rounded: `generate` says what is wrong
    with pytest.raises(ValueError, match="`steps` must be a number or empty, got 'two'"):
        read_fields(seed="0", steps="two")
    given = read_fields(seed="0", edit_threshold="0", edit_rule="remask", preset="", edit_margin="")
    assert given == {"seed": 0, "edit_threshold": 0, "edit_rule": "remask"}


@pytest.mark.parametrize("seed", ["", "-1", "0.5", str(LARGEST_SEED + 1)])
def test_bad_seeds(seed):
    with pytest.raises(ValueError, match=rf"`seed` must be an integer between 0 and {LARGEST_SEED}, got "):
        read_fields(seed=seed)


@pytest.mark.parametrize("port", [0, 65536])
def test_bad_ports(port):
    with pytest.raises(ValueError, match=f"`server_port` must be between 1 and 65535, got {port}"):
        DemoArguments(diffusion="x", server_port=port)


def test_bad_settings_are_refused_before_anything_is_written(pair, names, tokenizer, monkeypatch):
    with pytest.raises(ValueError, match="`steps` must be an integer >= 1, got 2.5"):
        prepare(pair, names, "The", False, 0, steps=2.5)
    with pytest.raises(ValueError, match="`temperature` must be a number >= 0, got -1"):
        prepare(pair, names, "The", False, 0, temperature=-1)
    with pytest.raises(ValueError, match=r"`prompt` must not hold <\|mask\|> for an autoregressive model"):
        prepare(pair, names, "The <|mask|>", False, 0)
    assert list(prepare({"diffusion": pair["diffusion"]}, names, "The <|mask|>", False, 0)) == ["diffusion"]


def test_both_models_write_what_generate_gives(pair, names):
    given = {"max_new_tokens": 12, "temperature": 0.8, "steps": 3, "block_length": 6, "seed": 5}
    writings = prepare(pair, names, PROMPT, False, **given)
    last = {}
    for new in write_all(writings):
        last |= new
    assert list(last) == ["diffusion", "ar"] and count_steps(writings) == 12
    for name, source in last.items():
        made, recorder, cells = expected(pair, name, **given)
        view = View(source)
        check(view, cells, recorder, len(recorder.steps))
        assert view.text == made.text
        assert view.figures["tokens per forward"] == f"{made.tokens_per_forward:.2f}"
        assert (view.figures["model"], view.figures["seed"]) == (names[name], "5")
        assert ("block_length" in view.figures) == (name == "diffusion")
        for step in range(14):
            _, recorder, cells = expected(pair, name, step, **given)
            check(View(writings[name].show(step)), cells, recorder, step)


@pytest.mark.parametrize("given", [{"steps": 2, "edit_threshold": 0, "edit_rule": "remask", "edit_margin": 0},
                                   {"preset": "llada2.1-speed"}])  # fmt: skip
def test_edits_are_shown_as_generate_makes_them(pair, names, given):
    given = {"max_new_tokens": 12, "seed": 5, **given}
    writings = prepare(pair, names, PROMPT, False, **given)
    list(write_all(writings))
    made, recorder, cells = expected(pair, "diffusion", **given)
    view, steps = View(writings["diffusion"].show()), len(recorder.steps)
    check(view, cells, recorder, steps)
    assert made.edits["edited"] == int(view.figures["edited"]) > 0
    for step in range(1, steps):
        view = View(writings["diffusion"].show(step))
        assert view.figures["this step"] == recorder.caption(step)


def test_a_chat_is_rendered(pair, names):
    writings = prepare(pair, names, "Why?", True, 0, max_new_tokens=4)
    list(write_all(writings))
    ids = prompt_ids(pair["ar"][1], [{"role": "user", "content": "Why?"}])
    assert [writing.recorder.prompt for writing in writings.values()] == [ids, ids]


def test_the_clock_starts_with_the_call(pair, names):
    writings = prepare(pair, names, "The", False, 0, max_new_tokens=2)
    time.sleep(1)
    list(write_all(writings))
    assert all(writing.recorder.seconds[0] < 1 for writing in writings.values())


def test_errors_of_the_call_reach_who_follows_it(pair, names):
    writings = prepare(pair, names, "The", False, 0, max_new_tokens=0)
    with pytest.raises(ValueError, match="`max_new_tokens` must be > 0 for a prompt without mask tokens, got 0"):
        list(write_all(writings))


def test_fields_start_as_the_checkpoint_says(pair, monkeypatch):
    config = pair["diffusion"][0].generation_config
    assert first_values(pair) == {**dict.fromkeys(FIELDS, ""), "max_new_tokens": "128", "seed": "0"}
    for name, value in {"max_new_tokens": 48, "block_length": 16, "threshold": 0.9}.items():
        monkeypatch.setattr(config, name, value)
    own = {"max_new_tokens": "48", "block_length": "16", "threshold": "0.9", "seed": "0"}
    assert first_values(pair) == {**dict.fromkeys(FIELDS, ""), **own}


def test_examples_are_of_the_checkpoints_world(names, tokenizer, char_tokenizer, tmp_path):
    assert example_prompts(names["diffusion"], tokenizer, True) == [QUESTION]
    assert QUESTION not in example_prompts(names["diffusion"], tokenizer, False)  # a message is no beginning of a text
    assert QUESTION not in example_prompts(names["ar"], tokenizer, True)
    (tmp_path / "evaluation.json").write_text(json.dumps({"results": [{"task": "sudoku_test"}]}))
    boards = [prompt.removeprefix("Sudoku ") for prompt in example_prompts(str(tmp_path), tokenizer, True)]
    assert len(boards) == 3 and [count_solutions(board) for board in boards] == [1, 1, 1]
    spelt = example_prompts(names["ar"], char_tokenizer, False)
    assert spelt and all(prompt_ids(char_tokenizer, prompt) for prompt in spelt)


def test_chat_is_on_for_who_answers_messages(names, tokenizer, plain_tokenizer, tmp_path):
    assert answers_chats(names["diffusion"], tokenizer) and not answers_chats(names["diffusion"], plain_tokenizer)
    for kind, chats in (("pretrain", False), ("sft", True)):
        (tmp_path / "run.json").write_text(json.dumps({"data": {"format": kind}}))
        assert answers_chats(str(tmp_path), tokenizer) == chats


def test_no_token_is_called_by_its_name(pair, names):
    """Of a chat's template, and of the end that a model writes."""
    for writing in prepare(pair, names, "Why?", True, 0, max_new_tokens=4).values():
        list(write_all({"x": writing}))
        view = View(writing.show())
        assert TOKEN in [cell[3] for cell in view.cells] and not any("<|" in cell[3] for cell in view.cells)


def test_the_page_asks_nobody(pair, names):
    """No analytics, and a column for each model that there is."""
    page = build_page(pair, names)
    assert not page.analytics_enabled
    alone = build_page({"diffusion": pair["diffusion"]}, names)
    columns = [{block.elem_id for block in item.blocks.values()} & {"ar", "diffusion"} for item in (page, alone)]
    assert columns == [{"ar", "diffusion"}, {"diffusion"}]


@pytest.mark.parametrize("way", ["file", "module"])
def test_help_is_quick(way):
    start = [str(ROOT / "scripts" / "demo.py")] if way == "file" else ["-m", "nanollada.scripts.demo"]
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", *start, "--help"], capture_output=True, text=True, timeout=60
    )
    assert shown.returncode == 0 and "--server_port" in shown.stdout, shown.stderr[-2000:]
    imported = {line.split("|")[-1].strip() for line in shown.stderr.splitlines() if line.startswith("import time:")}
    assert "dataclasses" in imported and not imported & {"torch", "gradio", "matplotlib", "PIL"}


# ---- in a browser


@pytest.fixture
def address(names, tmp_path):
    """Where the program serves both models."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "scripts" / "demo.py"), "--server_port", str(port)]
    command += ["--diffusion", names["diffusion"], "--ar", names["ar"]]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait(f"http://127.0.0.1:{port}", process, tmp_path / "log")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(timeout=30)


def _wait(address, process, log, seconds=120):
    for _ in range(10 * seconds):
        assert process.poll() is None, log.read_text()
        try:
            return urllib.request.urlopen(address, timeout=5).close()
        except OSError:
            time.sleep(0.1)
    pytest.fail(f"no page at {address}: {log.read_text()}")


def fill(page, **values):
    """Types into fields; an empty string clears one."""
    for name, value in values.items():
        page.locator(f"#{name} textarea, #{name} input").first.fill(str(value))


def view_of(page, name):
    return View(page.locator(f"#{name} .nanollada-trace").evaluate("element => element.outerHTML"))


def write(page, forwards):
    """Clicks, and waits for both texts; `forwards` passes each."""
    page.locator("#write").click()
    for name, count in forwards.items():
        page.locator(f"#{name} dd", has_text=re.compile(f"^{count} of {count}$")).wait_for()
        page.locator(f"#{name} pre").wait_for(state="attached")
    page.wait_for_function("() => !document.querySelector('#step input[type=range]').disabled")


@pytest.mark.slow
def test_the_page_shows_what_generate_gives(address, pair, browser_page):
    page, asked, errors = browser_page, [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    page.locator("#prompt textarea").wait_for()
    page.locator("#chat input").uncheck()
    given = {"max_new_tokens": 24, "temperature": 0.8, "steps": 4, "block_length": 12, "seed": 5}
    fill(page, prompt=PROMPT, **given)
    write(page, {"diffusion": 8, "ar": 24})
    for name in CLASSES:
        made, recorder, cells = expected(pair, name, **given)
        view = view_of(page, name)
        check(view, cells, recorder, len(recorder.steps))
        assert view.text == made.text
        assert view.figures["tokens per forward"] == f"{made.tokens_per_forward:.2f}"
        assert float(view.figures["seconds"]) < 60
    for step in (3, 0, 11, 24):
        page.locator("#step input[type=number]").fill(str(step))
        for name, last in {"diffusion": 8, "ar": 24}.items():
            page.locator(f"#{name} dd", has_text=re.compile(f"^{min(step, last)} of {last}$")).wait_for()
            _, recorder, cells = expected(pair, name, step, **given)
            check(view_of(page, name), cells, recorder, step)
    assert_shades(page)
    assert not errors
    foreign = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert not foreign


def assert_shades(page):
    """At a step, undecided cells are the more orange, the surer the model."""
    page.locator("#step input[type=number]").fill("1")
    page.locator("#diffusion dd", has_text=re.compile("^1 of 8$")).wait_for()
    masks = page.locator("#diffusion .canvas .mask").evaluate_all(
        "all => all.map(cell => [cell.style.getPropertyValue('--sure'), getComputedStyle(cell).backgroundColor])"
    )
    shades = {float(sure or 0): colour for sure, colour in masks}
    assert len(masks) == 24 - 3 and len(shades) > 2
    assert len(set(shades.values())) == len(shades)


@pytest.mark.slow
def test_the_page_streams_stops_and_complains(address, pair, browser_page):
    page = browser_page
    page.goto(address)
    page.locator("#prompt textarea").wait_for()
    page.locator("#chat input").uncheck()
    # A setting that only `generate` finds out, and one that is refused at once: both messages come to the page.
    fill(page, prompt="The", max_new_tokens=0)
    for message in ("`max_new_tokens` must be > 0 for a prompt without", "`prompt` must not hold <|mask|> for"):
        page.locator("#write").click()
        page.get_by_text(message).wait_for()
        fill(page, prompt="The <|mask|>")
    # A long text comes step by step, and can be stopped.
    fill(page, prompt="The", max_new_tokens=1500)
    page.locator("#write").click()
    masks = page.locator("#diffusion .canvas .mask")
    page.wait_for_function("() => document.querySelectorAll('#diffusion .canvas .mask').length > 0")
    first = masks.count()
    page.wait_for_function(f"() => document.querySelectorAll('#diffusion .canvas .mask').length < {first}")
    assert masks.count() > 0 and page.locator("#diffusion pre").count() == 0
    page.locator("#stop").click()
    page.wait_for_function("() => !document.querySelector('#step input[type=range]').disabled")
    made = []
    for step in (1, 2, 3):
        page.locator("#step input[type=number]").fill(str(step))
        page.locator("#diffusion dd", has_text=re.compile(f"^{step} of ")).wait_for()
        made.append(int(view_of(page, "diffusion").figures["forward passes"].split()[-1]))
        time.sleep(1)
    assert made[0] <= made[1] == made[2]  # nothing goes on behind the page
    assert masks.count() > 0 and page.locator("#ar .canvas").count() == 0
    # Nothing of it is left: the next text is as if it had been the first; an empty field leaves its setting alone.
    given = {"max_new_tokens": 8, "seed": 0}
    fill(page, **given)
    write(page, {"diffusion": 8, "ar": 8})
    for name in CLASSES:
        made, recorder, cells = expected(pair, name, prompt="The", **given)
        check(view_of(page, name), cells, recorder, 8)
        assert view_of(page, name).text == made.text


# Every text outside of the traces, with its colour and the first opaque colour behind it.
TEXTS = """() => [...document.querySelectorAll('.gradio-container *')].flatMap(element => {
  const own = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
  if (!own || element.closest('.nanollada-trace, style, script') || !element.checkVisibility()) return [];
  let behind = element;
  while (behind && /^rgba\\(.*, 0\\)$/.test(getComputedStyle(behind).backgroundColor)) behind = behind.parentElement;
  const paper = behind ? getComputedStyle(behind).backgroundColor : 'rgb(255, 255, 255)';
  return [[element.textContent.trim().slice(0, 40), getComputedStyle(element).color, paper]];
})"""


@pytest.mark.slow
def test_the_page_explains_itself_at_any_width_and_in_the_dark(address, pair, browser_page):
    page = browser_page
    ids = prompt_ids(pair["diffusion"][1], [{"role": "user", "content": QUESTION}])
    texts = {name: generate(*pair[name], ids, max_new_tokens=12).text for name in CLASSES}
    for scheme, widths in {"light": (390, 699, 1280), "dark": (390, 1280)}.items():
        page.emulate_media(color_scheme=scheme)
        for width in widths:
            page.set_viewport_size({"width": width, "height": 900})
            page.goto(address)
            page.get_by_role("heading", name="nanollada").wait_for()
            page.locator("#examples").get_by_text(QUESTION).click()
            page.wait_for_function(f"() => document.querySelector('#prompt textarea').value === {QUESTION!r}")
            assert page.locator("#chat input").is_checked()
            fill(page, max_new_tokens=12)
            page.locator("#prompt textarea").press("Enter")
            for name in CLASSES:
                page.locator(f"#{name} dd", has_text=re.compile("^12 of 12$")).wait_for()
                page.locator(f"#{name} pre").wait_for(state="attached")
                assert view_of(page, name).text == texts[name]
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            one, other = (page.locator(f"#{name}").bounding_box() for name in ("diffusion", "ar"))
            if width < 700:
                assert other["y"] >= one["y"] + one["height"] and min(one["width"], other["width"]) > width - 120
            else:
                assert other["y"] == one["y"] and other["x"] >= one["x"] + one["width"]
            assert "<|" not in page.locator("#views").inner_text()
            shades = page.evaluate(TEXTS)
            assert {"Of whatever is drawn", "Write", "Prompt"} <= {text for text, _, _ in shades}
            faint = [shade for shade in shades if contrast(*shade[1:]) < 4.5]
            assert not faint, (scheme, width)
