"""What a trace records against what `generate` returns, and the page that shows it."""

import io
import json
import random
from html.parser import HTMLParser

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from nanollada.modeling_nanollada import NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM
from nanollada.scripts.tracing.page import trace_fragment, trace_page, trace_view
from nanollada.scripts.tracing.pieces import UNDECIDED, Piece, TokenPieces, trace_cells
from nanollada.scripts.tracing.recorder import ABSENT, StepRecorder, TraceRecorder
from nanollada.scripts.tracing.terminal import TerminalWatcher
from nanollada.trainers.models import config_for

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
PAD, EOS, MASK = 0, 2, 3


def build(model_class, tokenizer, **shape):
    torch.manual_seed(0)
    return model_class(config_for(tokenizer, initializer_range=0.6, **{**SHAPE, **shape})).eval()


def record(model, tokenizer, prompt, recorder=None, **settings):
    """The recorder of a call, and what the call returned."""
    recorder = recorder or TraceRecorder(tokenizer)
    ids = torch.tensor([prompt])
    settings = {"attention_mask": torch.ones_like(ids), "return_dict_in_generate": True, **settings}
    return recorder, model.generate(ids, streamer=recorder, **settings)


def by_hand(tokenizer, prompt, drafts, finished):
    """A recorder that was given a diffusion model's drafts."""
    recorder = TraceRecorder(tokenizer)
    for value, put in [(prompt, recorder.put), *[(draft, recorder.put_draft) for draft in drafts]]:
        put(torch.tensor([value]))
    recorder.put(torch.tensor([finished]))
    recorder.end()
    return recorder


# ---- recording


@pytest.mark.parametrize("grid", [None, 4])
def test_a_diffusion_trace_agrees_with_what_generate_returns(tokenizer, grid):
    model = build(NanoLLaDAForMaskedLM, tokenizer, block_length=grid)
    model.lm_head.weight.data[EOS] *= 2  # some rows end early
    draw = random.Random(0)
    ended = 0
    for case in range(30):
        prompt = [draw.choice([MASK, *range(4, 300)]) for _ in range(draw.randint(1, 6))]
        new = draw.choice([0, 8]) if MASK in prompt else 8
        settings = {"block_length": draw.choice([None, 2, 4]), "steps": draw.choice([None, 1, 3])}
        generator = torch.Generator().manual_seed(case)
        settings |= {"temperature": 1.5, "max_new_tokens": new, "generator": generator}
        recorder, output = record(model, tokenizer, prompt, **settings)
        row = output.sequences[0].tolist()
        assert recorder.prompt == prompt
        assert recorder.ids[: recorder.kept] == row[: recorder.kept]
        assert set(row[recorder.kept :]) <= {PAD}
        assert recorder.tokens_per_forward == pytest.approx(output.tokens_per_forward.item())
        rows = list(recorder.rows())
        assert rows[0] == prompt + [MASK] * new and rows[-1] == recorder.ids
        assert all(now != before for before, now in zip(rows, rows[1:], strict=False))  # every step decides something
        assert recorder.seconds == sorted(recorder.seconds) and len(recorder.seconds) == len(recorder.steps)
        ended += recorder.kept < len(row)
    assert 0 < ended < 30


def test_an_autoregressive_trace_has_one_token_per_step(tokenizer):
    model = build(NanoLLaDAForCausalLM, tokenizer)
    recorder, output = record(model, tokenizer, [0, 7, 8], max_new_tokens=6, eos_token_id=None)
    row = output.sequences[0].tolist()
    assert recorder.steps == [[(column, row[column])] for column in range(3, 9)]
    assert (recorder.ids, recorder.kept, recorder.decided, recorder.tokens_per_forward) == (row, 9, 6, 1.0)
    assert not recorder.is_diffusion
    assert list(recorder.rows())[1] == row[:4] + [ABSENT] * 5


def test_a_changed_token_is_recorded_again(tokenizer):
    """A later step may edit a token or mask it again; what counts is the row at the end."""
    drafts = [[9, MASK, MASK], [10, 11, MASK], [MASK, 11, 12], [13, 11, 12]]
    recorder = by_hand(tokenizer, [5], drafts, [13, 11, 12])
    assert recorder.steps == [[(1, 9)], [(1, 10), (2, 11)], [(1, MASK), (3, 12)], [(1, 13)]]
    assert [row[1:] for row in recorder.rows()] == [[MASK] * 3, *drafts]
    assert (recorder.decided, recorder.tokens_per_forward) == (3, 0.75)


def test_a_batch_is_refused(tokenizer):
    with pytest.raises(ValueError, match="`input_ids` must have batch size 1, got 2"):
        TraceRecorder(tokenizer).put(torch.zeros(2, 3))


@pytest.mark.parametrize("grid", [None, 4])
def test_confidence_is_kept_where_something_was_open(tokenizer, grid):
    """Greedy, one token a step: the surest open column is the one that was decided, as the model alone says, too."""
    model = build(NanoLLaDAForMaskedLM, tokenizer, block_length=grid)
    prompt = [5, 6, MASK, 7]
    recorder, output = record(model, tokenizer, prompt, max_new_tokens=8, block_length=4, eos_policy="forbid")
    assert len(recorder.confidence) == len(recorder.steps) == 9
    rows = list(recorder.rows())
    for before, known, changes in zip(rows, recorder.confidence, recorder.steps, strict=False):
        assert known and all(before[column] == MASK and 0 < value <= 1 for column, value in known.items())
        assert [column for column, _ in changes] == [max(known, key=known.get)]
    assert set(recorder.confidence[0]) == ({2} if grid else {2, 4, 5, 6, 7})
    plain, other = record(model, tokenizer, prompt, StepRecorder(tokenizer), max_new_tokens=8, block_length=4,
                          eos_policy="forbid")  # fmt: skip
    assert plain.steps == recorder.steps and plain.confidence == [{}] * 9
    assert torch.equal(other.sequences, output.sequences)
    autoregressive, _ = record(build(NanoLLaDAForCausalLM, tokenizer), tokenizer, [0, 7], max_new_tokens=3)
    assert autoregressive.confidence == [{}] * 3


def with_confidence(tokenizer, ended=True):
    """Three columns behind the prompt; the second is masked again in the third step, the third ends as no text."""
    nan = float("nan")
    drafts = [[9, MASK, MASK], [9, 10, MASK], [9, MASK, MASK], [9, 11, MASK]]
    sure = [[0.9, 0.25, nan], [nan, 0.5, nan], [nan, nan, 0.125], [nan, 0.75, 0.0625]]
    recorder = TraceRecorder(tokenizer)
    recorder.put(torch.tensor([5]))
    for draft, values in zip(drafts, sure, strict=True):
        recorder.put_confidence(torch.tensor([values]))
        recorder.put_draft(torch.tensor([draft]))
    if ended:
        recorder.put(torch.tensor([9, 11]))
        recorder.end()
    return recorder


def test_cells_of_a_step(tokenizer):
    recorder = with_confidence(tokenizer)
    rows = trace_cells(recorder)
    shown = [[(cell.piece.kind, cell.when, cell.confidence and round(cell.confidence, 4)) for cell in row[1:]]
             for row in rows]  # fmt: skip
    assert shown == [
        [("mask", 0, None)] * 3,
        [("text", 1, 0.9), ("mask", 0, 0.25), ("mask", 0, None)],
        [("text", 1, 0.9), ("text", 2, 0.5), ("mask", 0, None)],
        [("text", 1, 0.9), ("mask", 0, None), ("mask", 0, 0.125)],
        [("text", 1, 0.9), ("text", 4, 0.75), ("absent", 0, None)],
    ]
    assert [trace_cells(recorder, step)[0] for step in range(5)] == rows
    assert trace_cells(with_confidence(tokenizer, ended=False))[-1][-1].confidence == 0.0625  # more may come


# ---- pieces


def test_pieces_of_whole_tokens(tokenizer):
    ids = tokenizer("The<|im_end|> <|mask|>").input_ids
    pieces = TokenPieces(tokenizer)([*ids, ABSENT])
    assert "".join(piece.text for piece in pieces if piece.kind == "text") == "The "
    assert Piece("<|im_end|>", "special") in pieces and Piece(UNDECIDED, "mask") in pieces
    assert pieces[-1] == Piece("", "absent")


def test_pieces_of_half_characters(tokenizer):
    ids = tokenizer("🎉é").input_ids
    assert len(ids) >= 4 and "\ufffd" in tokenizer.decode(ids[:1])  # or this test shows nothing
    pieces = TokenPieces(tokenizer)
    whole = pieces(ids)
    assert "".join(piece.text for piece in whole) == "🎉é"
    assert {piece.kind for piece in whole} == {"text", "part"} and len(whole) == len(ids)
    broken = pieces([ids[0], MASK, *ids[2:]])
    assert broken[0].kind == "bytes" and broken[0].text.startswith("⟨F0") and broken[1].kind == "mask"
    assert "\ufffd" not in "".join(piece.text for piece in broken)
    assert pieces(ids[:1])[0].text == broken[0].text  # also at the end of the row
    assert pieces([ids[0], EOS])[0].kind == "bytes"


def test_pieces_of_characters(char_tokenizer):
    assert [piece.text for piece in TokenPieces(char_tokenizer)(char_tokenizer("你好 a").input_ids)] == list("你好 a")


# ---- the page


class Page(HTMLParser):
    """Elements with attributes, texts by element, and whether tags are balanced."""

    VOID = {"meta", "link", "input", "br"}

    def __init__(self, html):
        super().__init__()
        self.stack, self.elements, self.texts = [], [], []
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.stack.append(tag)
            self.texts.append([tag, dict(attributes), ""])

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.texts and self.stack and self.texts[-1][0] == self.stack[-1]:
            self.texts[-1][2] += data

    def find(self, tag, **attributes):
        found = [item for item in self.texts if item[0] == tag]
        return [item for item in found if all(item[1].get(name) == value for name, value in attributes.items())]

    def data(self, index=0):
        return json.loads(self.find("script", type="application/json")[index][2])


@pytest.fixture
def recorder(tokenizer):
    """A prompt full of markup, a text with a half character on the way, and places behind the end of the text."""
    prompt = [PAD, *tokenizer("</script><b>&amp;\n").input_ids]
    text = [*tokenizer("🎉 cat<!--").input_ids, EOS]
    order = random.Random(0).sample(range(len(text)), len(text))
    drafts = [[text[i] if i in order[:done] else MASK for i in range(len(text))] + [MASK] * 3 for done in (2, 5)]
    return by_hand(tokenizer, prompt, [*drafts, text + [MASK] * 3], text)


def test_the_page_escapes_and_needs_nothing_from_elsewhere(recorder):
    html = trace_page(recorder, "</title><script>alert(1)</script>", {"model": "a<b", "steps": None, "seed": 0})
    page = Page(html)
    assert page.find("title")[0][2] == page.find("h2")[0][2] == "</title><script>alert(1)</script>"
    assert [item[2] for item in page.find("dd")][:2] == ["a<b", "0"]
    assert "steps" not in [item[2] for item in page.find("dt")]
    assert html.count("<script") == 2 == html.count("</script>") and "<b>&amp;" not in html
    loading = {"src", "href", "srcset", "action", "data"}
    links = [attributes[name] for _, attributes in page.elements for name in loading & attributes.keys()]
    assert links == ["data:,"]
    assert "url(" not in html and "@import" not in html and "http:" not in html and "https:" not in html
    assert "default-src 'none'" in html


def test_the_page_shows_the_end_without_its_script(recorder, tokenizer):
    page = Page(trace_page(recorder, "title"))
    spans = page.find("span")[: len(recorder.ids)]
    kept = [span for span in spans if span[1]["class"] != "absent"]
    assert "".join(span[2] for span in kept) == "<|endoftext|></script><b>&amp;\n🎉 cat<!--<|im_end|>"
    assert [span[1]["class"] for span in spans[-3:]] == ["absent"] * 3
    decided_in = {column: number for number, step in enumerate(recorder.steps, start=1) for column, _ in step}
    for column, span in enumerate(spans):
        assert span[1].get("title") == (f"step {decided_in[column]}" if column in decided_in else None)
        assert ("decided" in span[1]["class"]) == (column in decided_in)
        assert ("given" in span[1]["class"]) == (column < len(recorder.prompt))
    assert {span[1]["style"] for span in spans if "style" in span[1]} == {
        "--when:0.000",
        "--when:0.500",
        "--when:1.000",
    }
    assert page.find("output")[0][2] == "step 3 of 3"
    facts = {name[2]: value[2] for name, value in zip(page.find("dt"), page.find("dd"), strict=True)}
    assert (facts["forward passes"], facts["tokens per forward"]) == ("3", f"{recorder.decided / 3:.2f}")
    assert page.find("pre")[0][2] == "🎉 cat<!--"


def test_the_data_replay_to_every_step(recorder, tokenizer):
    data = Page(trace_page(recorder, "title")).data()
    pieces, rows = TokenPieces(tokenizer), list(recorder.rows())
    shown = [cell[:2] for cell in data["start"]]
    assert shown == [list(piece) for piece in pieces(rows[0])]
    for number, frame in enumerate(data["frames"], start=1):
        for column, *piece, when, sure in frame:
            shown[column] = piece
            assert when <= number and sure is None
        expected = [list(piece) for piece in pieces(rows[number])]
        end = recorder.kept if number == len(recorder.steps) else len(expected)
        assert shown[:end] == expected[:end]
        assert data["changes"][number - 1] == [column for column, _ in recorder.steps[number - 1]]
    assert shown[recorder.kept :] == [["", "absent"]] * 3


def test_fragments_fit_into_one_page(recorder, tokenizer):
    model = build(NanoLLaDAForCausalLM, tokenizer)
    autoregressive, _ = record(model, tokenizer, [0, 7, 8], max_new_tokens=4)
    parts = [trace_fragment(recorder, "one"), trace_fragment(autoregressive, "two")]
    parts.append(trace_fragment(autoregressive, "two", identifier="third"))
    page = Page("".join(parts))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) == 6 and ids[-2:] == ["third", "third-title"]
    labels = [attributes["aria-labelledby"] for tag, attributes in page.elements if tag == "section"]
    assert set(labels) <= set(ids)
    assert not page.find("html") and not page.find("main")
    assert page.data(1)["changes"] == [[3], [4], [5], [6]] and parts[1] == trace_fragment(autoregressive, "two")
    assert "if (false &&" in parts[0] and "if (true &&" in trace_page(recorder, "one")  # only a page plays itself


def test_an_infilled_prompt_is_shown_whole(tokenizer):
    recorder = by_hand(tokenizer, [5, MASK, 6], [[9, 6]], [9, 6])
    page = Page(trace_page(recorder, "title"))
    classes = [span[1]["class"] for span in page.find("span")[:3]]
    assert classes == ["text given", "text decided", "text given"]
    assert page.find("pre")[0][2] == tokenizer.decode([5, 9, 6])


def test_nothing_recorded_is_refused(tokenizer):
    with pytest.raises(ValueError, match="`trace` must have recorded a `generate` call"):
        trace_page(TraceRecorder(tokenizer), "title")


def test_the_page_shows_confidence_if_there_is_any(tokenizer):
    page = Page(trace_page(with_confidence(tokenizer), "title"))
    assert page.data()["confidence"] == [[[1, 0.9], [2, 0.25]], [[2, 0.5]], [[3, 0.125]], [[2, 0.75], [3, 0.062]]]
    replaced = tokenizer.decode([10])
    assert [span[1].get("title") for span in page.find("span")[:4]] == [
        None, "step 1, confidence 0.900", f"step 4, confidence 0.750, was {replaced}", None
    ]  # fmt: skip
    assert any(tag == "input" and item.get("class") == "confidence" for tag, item in page.elements)
    assert "confidence (the largest probability in this step)" in "".join(item[2] for item in page.find("span"))
    autoregressive, _ = record(build(NanoLLaDAForCausalLM, tokenizer), tokenizer, [0, 7, 8], max_new_tokens=4)
    html = trace_page(autoregressive, "title")
    page = Page(html)
    assert page.data()["confidence"] == []
    assert not [item for tag, item in page.elements if "confidence" in (item.get("class") or "")]
    assert "Confidence" not in html and not page.find("p", **{"class": "readout"})


def test_a_view_is_one_step_without_a_script(tokenizer):
    recorder = with_confidence(tokenizer)
    views = [Page(trace_view(recorder, "<b>", {"seed": 7}, step)) for step in range(5)]
    for step, page in enumerate(views):
        spans = page.find("span")[:4]
        cells = trace_cells(recorder, step)[0]
        assert [span[2] for span in spans] == [cell.piece.text for cell in cells]
        facts = {name[2]: value[2] for name, value in zip(page.find("dt"), page.find("dd"), strict=True)}
        assert facts["forward passes"] == f"{step} of 4" and facts["seed"] == "7"
        assert facts["tokens"] == str(sum(cell.when > 0 for cell in cells))
        assert not page.find("script") and not page.find("button") and page.find("h2")[0][2] == "<b>"
    assert "--sure:0.250" in views[1].find("span")[2][1]["style"]
    assert trace_view(recorder, "a") == trace_view(recorder, "a", step=4)
    assert "<pre>" in trace_view(recorder, "a") and "<pre>" not in trace_view(with_confidence(tokenizer, False), "a")
    for step in (-1, 5):
        with pytest.raises(ValueError, match=f"`step` must be between 0 and 4, got {step}"):
            trace_view(recorder, "a", step=step)
    with pytest.raises(ValueError, match="`trace` must have recorded a `generate` call"):
        trace_view(TraceRecorder(tokenizer), "title")


@pytest.mark.slow
def test_the_page_tells_confidence_in_a_browser(tokenizer, tmp_path, browser_page):
    """The script shows at each step what the recorder has: on pointing, as a shade, and of a clicked token."""
    recorder, page = with_confidence(tokenizer), browser_page
    (tmp_path / "page.html").write_text(trace_page(recorder, "title"), encoding="utf-8")
    page.emulate_media(reduced_motion="reduce")  # it doesn't play by itself
    page.goto(f"file://{tmp_path}/page.html")
    slider, cells = page.locator("input[type=range]"), page.locator(".canvas > span")
    for step, row in enumerate(trace_cells(recorder)):
        slider.fill(str(step))
        for column, cell in enumerate(row):
            words = [f"step {cell.when}"] if cell.when else []
            words += [] if cell.confidence is None else [f"confidence {cell.confidence:.3f}"]
            words += [f"was {cell.was}"] if cell.was else []
            assert (cells.nth(column).get_attribute("title") or "") == ", ".join(words), (step, column)
            shade = cells.nth(column).evaluate("cell => cell.style.getPropertyValue('--sure')")
            assert float(shade) == pytest.approx(cell.confidence or 0, abs=1e-3), (step, column)
    assert page.locator(".readout").is_hidden()
    slider.fill("1")
    colour = "all => all.map(cell => getComputedStyle(cell).backgroundColor)"
    sure, unread = page.locator(".canvas .mask").evaluate_all(colour)
    page.locator("input.confidence").uncheck()
    assert len(set(page.locator(".canvas .mask").evaluate_all(colour))) == 1 and sure != unread
    page.locator("input.confidence").check()
    assert page.locator(".canvas .mask").evaluate_all(colour) == [sure, unread]
    cells.nth(2).click()
    readout = page.locator(".readout output")
    assert readout.inner_text() == "Token 3, step 1: confidence 0.250"
    bars = page.locator(".readout .bars i")
    assert bars.evaluate_all("all => all.map(bar => bar.title)") == ["step 1: 0.250", "step 2: 0.500", "step 4: 0.750"]
    slider.fill("3")
    assert readout.inner_text() == "Token 3, step 3: not read" and page.locator(".picked").count() == 1
    page.locator("h2").click()
    page.keyboard.press("Shift+ArrowLeft")
    assert readout.inner_text() == "Token 2, step 3: not read"


@pytest.mark.slow
def test_the_page_plays_in_a_browser(recorder, tmp_path, browser_page):
    """The script runs to the last step, and draws what the page showed without it."""
    html = trace_page(recorder, "title")
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    errors = []
    browser_page.on("pageerror", lambda error: errors.append(str(error)))
    browser_page.goto(f"file://{tmp_path}/page.html")
    browser_page.get_by_text("❚❚ Pause").wait_for()  # it plays by itself
    browser_page.get_by_text("▶ Play").wait_for()
    dom = browser_page.content()
    assert 'class="controls" role="group" aria-label="Animation">' in dom  # not hidden any more
    assert 'aria-valuetext="step 3 of 3"' in dom and not errors  # played to the end
    before, after = (
        [(item[2], set(item[1]["class"].split()) - {"new"}) for item in Page(text).find("span")[: len(recorder.ids)]]
        for text in (html, dom)
    )
    assert before == after


# ---- the terminal


def watch(tokenizer, model, terminal, prompt, **settings):
    colours = "truecolor" if terminal else None
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80, color_system=colours)
    recorder, output = record(model, tokenizer, prompt, TerminalWatcher(tokenizer, console), **settings)
    return recorder, output, console.file.getvalue()


def test_watching_in_a_terminal(tokenizer):
    model = build(NanoLLaDAForMaskedLM, tokenizer)
    recorder, _, shown = watch(tokenizer, model, True, [0, 7], max_new_tokens=6, steps=3, eos_policy="forbid")
    frames = shown.split("step ")
    assert [frame.split(",")[0] for frame in frames[1:4]] == ["1", "2", "3"]
    assert "2 of 6 tokens" in frames[1] and frames[1].count(UNDECIDED) == 4 and UNDECIDED not in frames[3]
    assert frames[1].count("\x1b[1;30;103m") == 2  # the newest are highlighted
    assert "\x1b[2m" in frames[1] and shown.endswith("\x1b[2K")  # blocks are dim, and in the end all is wiped away
    assert recorder.live is None


def test_watching_elsewhere_takes_a_line_per_step(tokenizer):
    model = build(NanoLLaDAForMaskedLM, tokenizer)
    settings = {"max_new_tokens": 6, "steps": 3, "eos_policy": "forbid"}
    _, _, shown = watch(tokenizer, model, False, [0, 7], **settings)
    lines = shown.splitlines()
    assert len(lines) == 3 and lines[0].startswith("step 1, 2 of 6 tokens: ") and "\x1b" not in shown
    assert "<|endoftext|>" not in shown
    _, _, shown = watch(tokenizer, model, False, [0, 7, MASK], max_new_tokens=0)
    assert "<|endoftext|>" in shown  # a filled text makes no sense without what was given


def test_chinese_takes_two_cells_a_character(char_tokenizer):
    """The redrawn row must be as many lines as the terminal shows, or the next one starts at a wrong place."""
    console = Console(file=io.StringIO(), force_terminal=True, width=21, height=50)
    watcher = TerminalWatcher(char_tokenizer, console)
    ids = char_tokenizer("今天天气很好,我们去公园散步。" * 4).input_ids
    watcher.put(torch.tensor(ids))
    for done in (1, 2):
        watcher.put_draft(torch.tensor([ids[:done] + [MASK] * (30 - done)]))
    shown = console.file.getvalue()
    lines = [Text.from_ansi(line).plain for line in shown.partition("\x1b[2K\x1b[1A")[0].splitlines()]
    assert all(cell_len(line) <= 21 for line in lines) and sum(cell_len(line) > 19 for line in lines) >= 5
    assert shown.count("\x1b[1A") == len(lines) - 1  # up again to the first
    watcher.close()


def test_watching_an_autoregressive_model_writes_its_text(tokenizer):
    model = build(NanoLLaDAForCausalLM, tokenizer)
    model.lm_head.weight.data.zero_()
    text = iter(tokenizer("The 🎉 cat").input_ids)

    def forced(ids, scores):
        return scores.index_fill(1, torch.tensor([next(text, EOS)]), 100.0)

    recorder, _, shown = watch(tokenizer, model, True, [0, 7], max_new_tokens=40, logits_processor=[forced])
    assert shown == "The 🎉 cat\n"
    assert recorder.ids[-1] == EOS


def test_watching_needs_rich(tokenizer, monkeypatch):
    monkeypatch.setattr("nanollada.scripts.reporting.tables.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="`watch` needs the package rich"):
        TerminalWatcher(tokenizer)
