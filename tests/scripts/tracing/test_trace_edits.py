"""Traces of calls that take tokens back: replaced, masked again, removed, moved; in every view."""

import io
import json
import re
from collections import Counter
from itertools import islice

import pytest
import torch
from colours import contrast
from PIL import Image
from recordings import denoised, written
from rich.console import Console

from nanollada.modeling_nanollada import NanoLLaDAForMaskedLM
from nanollada.scripts.tracing.gif import MARGIN, write_gif, write_png
from nanollada.scripts.tracing.page import trace_page, trace_view
from nanollada.scripts.tracing.picture import BLOCK, EDITED, INK, LINE, WRONG, Pen, Shades, Strip
from nanollada.scripts.tracing.pieces import trace_cells
from nanollada.scripts.tracing.recorder import TraceRecorder
from nanollada.scripts.tracing.terminal import TerminalWatcher
from nanollada.trainers.models import config_for

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
MASK, NAN = 3, float("nan")
DECODINGS = {
    "replace": {"steps": 2, "edit_threshold": 0.0, "edit_margin": 0.0},
    "remask": {"steps": 2, "edit_threshold": 0.0, "edit_margin": 0.0, "edit_rule": "remask", "block_length": 4},
    "several": {"steps": 1, "edit_threshold": 0.0, "edit_margin": 0.0, "max_edits": 3},
    "gibbs": {"steps": 2, "edit_threshold": 0.0, "temperature": 1.0},
    "joint": {"preset": "llada2.1-speed"},
    "remdm": {"steps": 12, "remdm": "rescale", "remdm_eta": 0.5, "temperature": 1.0},
}


def feed(trace, prompt, steps, finished=None):
    """Puts (draft, confidence or None, moves or None) of each step into a trace, and ends it if it is finished."""
    trace.put(torch.tensor(prompt))
    for draft, confidence, moves in steps:
        if confidence is not None:
            trace.put_confidence(torch.tensor([confidence]))
        if moves is not None:
            trace.put_moves(torch.tensor([moves]))
        trace.put_draft(torch.tensor([draft]))
    if finished is not None:
        trace.put(torch.tensor(finished))
        trace.end()
    return trace


def words(tokenizer, *texts):
    """One token each."""
    ids = [tokenizer(text).input_ids for text in texts]
    assert all(len(item) == 1 for item in ids)
    return [item[0] for item in ids]


@pytest.fixture
def edited(tokenizer):
    """`a b c` becomes `a d c`; then `a` is masked again and comes back, and `c` is masked again and becomes `e`."""
    a, b, c, d, e = words(tokenizer, *"abcde")
    steps = [
        ([a, MASK, MASK], [0.9, 0.5, 0.5], None),
        ([a, b, c], [NAN, 0.6, 0.8], None),
        ([a, d, c], [0.9, 0.7, 0.95], None),
        ([MASK, d, MASK], [NAN, NAN, NAN], None),
        ([a, d, e], [0.3, NAN, 0.4], None),
        ([a, d, e], [0.31, 0.71, 0.41], None),
    ]
    return feed(TraceRecorder(tokenizer), words(tokenizer, "x"), steps, [a, d, e])


# ---- recording


def test_what_a_step_did_is_counted(edited):
    did = ["1 decided", "2 decided", "1 edited", "2 masked again", "2 decided", "no change"]
    assert [edited.caption(step) for step in range(1, 7)] == did
    assert edited.edits() == {"edited": 1, "masked again": 2}
    assert [edited.edits(step) for step in (2, 3)] == [{}, {"edited": 1}]
    assert (edited.decided, edited.tokens_per_forward) == (3, 0.5)  # an edit is a pass, and no token more
    assert edited.when == [0, 5, 3, 5]


def test_cells_know_what_stood_there(edited):
    rows = [[(cell.was, cell.struck) for cell in row[1:]] for row in trace_cells(edited)]
    none, replaced = (None, ""), ("b", "")
    assert rows == [
        [none] * 3,
        [none] * 3,
        [none] * 3,
        [none, ("b", "b"), none],
        [("a", "a"), replaced, ("c", "c")],
        [none, replaced, ("c", "")],  # what came back replaced nothing
        [none, replaced, ("c", "")],
    ]
    assert [trace_cells(edited, step)[0] for step in range(7)] == trace_cells(edited)
    sure = [[cell.confidence and round(cell.confidence, 4) for cell in row[1:]] for row in trace_cells(edited)]
    assert sure[2:] == [[0.9, 0.6, 0.8], [0.9, 0.7, 0.95], [None, 0.7, None], [0.3, 0.7, 0.4], [0.31, 0.71, 0.41]]


@pytest.mark.parametrize("case", DECODINGS)
@pytest.mark.parametrize("grid", [None, 4])
def test_a_trace_agrees_with_what_generate_returns(tokenizer, case, grid):
    """Row, passes and tokens; what a pass read has a confidence, whether it was masked or not."""
    torch.manual_seed(0)
    model = NanoLLaDAForMaskedLM(config_for(tokenizer, initializer_range=0.6, block_length=grid, **SHAPE)).eval()
    model.generation_config.eos_token_id = None
    total, edits, passes = {}, 0, 0
    for seed in range(6):
        ids = torch.randint(4, 300, (1, 5), generator=torch.Generator().manual_seed(seed))
        calls = []
        hook = model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trace = TraceRecorder(tokenizer)
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=7, streamer=trace, return_dict_in_generate=True,
            generator=torch.Generator().manual_seed(seed), use_cache=False, **DECODINGS[case],
        )  # fmt: skip
        hook.remove()
        rows = list(trace.rows())
        assert rows[-1] == trace.ids == output.sequences[0].tolist() and rows[0] == trace.start
        assert trace.tokens_per_forward == pytest.approx(output.tokens_per_forward.item())
        assert trace.decided == 7 and [step - 1 for step in trace.when] == output.commit_steps[0, :12].tolist()
        read = [step for step in trace.confidence if step]
        assert len(read) == len(calls)  # a pass that edits, or finds nothing to edit, is a pass
        for before, now, counts in zip(rows, rows[1:], trace.counts, strict=False):
            pairs = [(old, new) for old, new in zip(before, now, strict=True) if old != new]
            assert counts["decided"] == sum(old == MASK for old, _ in pairs)
            assert counts["masked again"] == sum(new == MASK for _, new in pairs)
            assert counts["edited"] == len(pairs) - counts["decided"] - counts["masked again"]
        total = {name: total.get(name, 0) + count for name, count in trace.edits().items()}
        cells = trace_cells(trace)[-1]
        edits += sum(cell.was is not None for cell in cells)
        passes += len(read)
    assert total and edits and passes > 12, total
    assert set(total) == ({"masked again"} if case == "remdm" else {"edited"})


# ---- moves


def moving(tokenizer, ended=True):
    """`a b c` without `b`, a mask before `c`, and one in place of it: rows of 3, 3 and 4 places behind the prompt."""
    a, b, c, d, e = words(tokenizer, *"abcde")
    steps = [
        ([a, b, c], [0.1, 0.2, 0.3], None),
        ([a, c, MASK], [0.4, 0.5, 0.6], [1, 3, -1]),  # b removed
        ([a, c, d], [NAN, NAN, 0.7], None),
        ([e, MASK, c, d], [0.8, 0.9, NAN], [1, -1, 2, 3]),  # the row grows, and a is replaced in the same step
        ([e, b, c, d], [NAN, 0.95, NAN, NAN], None),
    ]
    return feed(TraceRecorder(tokenizer), words(tokenizer, "x"), steps, [e, b, c, d] if ended else None)


def test_what_moves_is_no_edit(tokenizer):
    trace = moving(tokenizer)
    captions = ["3 decided", "1 removed, 1 added", "1 decided", "1 edited, 1 added", "1 decided"]
    assert [trace.caption(step) for step in range(1, 6)] == captions
    assert trace.when == [0, 4, 5, 1, 3] and trace.decided == 4
    a, b, c, d, e = words(tokenizer, *"abcde")
    x = words(tokenizer, "x")
    assert list(trace.rows()) == [
        x + row for row in ([MASK] * 3, [a, b, c], [a, c, MASK], [a, c, d], [e, MASK, c, d], [e, b, c, d])
    ]
    rows = trace_cells(trace)
    assert {len(row) for row in rows} == {5}
    assert [[cell.when for cell in row[1:]] for row in rows[1:]] == [
        [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 3, 0], [4, 0, 1, 3], [4, 5, 1, 3]
    ]  # fmt: skip
    assert [cell.struck for cell in rows[2]] == ["", "", "b", "", ""]  # before what follows it
    assert [(cell.was, cell.struck) for cell in rows[4]][1] == ("a", "a")
    sure = [[cell.confidence and round(cell.confidence, 4) for cell in row[1:]] for row in rows[1:]]
    assert sure[:2] == [[0.1, 0.2, 0.3, None], [0.4, 0.6, None, None]]  # of the places as they are afterwards
    assert sure[4] == [0.8, 0.95, 0.3, 0.7]  # of those that moved what it was when they were decided
    assert [sorted(trace.newest(step)) for step in (2, 4)] == [[3], [1, 2]]


def test_a_structural_trace_agrees_with_what_generate_returns(tokenizer):
    """LLaDA 2.2's loop: a token that only moved keeps the step that decided it, in the trace as in the output."""
    torch.manual_seed(0)
    ids = {"delete_token_id": 298, "insert_token_id": 299}
    model = NanoLLaDAForMaskedLM(config_for(tokenizer, initializer_range=0.6, block_length=8, **ids, **SHAPE)).eval()
    model.generation_config.eos_token_id = None
    model.lm_head.weight.data[298:] *= 1.5
    total = Counter()
    for seed in range(8):
        prompt = torch.randint(4, 298, (1, 5), generator=torch.Generator().manual_seed(seed))
        trace = TraceRecorder(tokenizer)
        output = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, preset="llada2.2", streamer=trace,
            return_dict_in_generate=True,
        )  # fmt: skip
        assert list(trace.rows())[-1] == trace.ids == output.sequences[0].tolist()
        assert [step - 1 for step in trace.when] == output.commit_steps[0, : len(trace.ids)].tolist()
        assert trace.tokens_per_forward == pytest.approx(output.tokens_per_forward.item())
        for before, now, moves, changes in zip(
            trace.rows(), islice(trace.rows(), 1, None), trace.moves, trace.steps, strict=False
        ):
            kept = [column for column, old in enumerate(moves or ()) if old >= 0 and column not in dict(changes)]
            assert all(now[column] == before[moves[column]] for column in kept)
        total += sum(trace.counts, Counter())
        trace_page(trace, "title")
    assert total["removed"] and total["added"] and total["edited"] and total["decided"], total


def test_a_trace_of_expansions_agrees_with_what_generate_returns(tokenizer):
    """Rows that grow and shrink while their gap is filled; the prompt behind it moves, and stays the prompt."""
    torch.manual_seed(0)
    ids = {"delete_token_id": 298, "insert_token_id": 299}
    model = NanoLLaDAForMaskedLM(config_for(tokenizer, initializer_range=0.6, **ids, **SHAPE)).eval()
    model.generation_config.eos_token_id = None
    model.lm_head.weight.data[298:] *= 6
    total = Counter()
    for seed in range(8):
        prompt = torch.randint(4, 298, (1, 9), generator=torch.Generator().manual_seed(seed))
        prompt[0, 3:6] = MASK
        trace = TraceRecorder(tokenizer)
        output = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=0, max_expansions=4, streamer=trace,
            return_dict_in_generate=True,
        )  # fmt: skip
        assert trace.start == prompt[0].tolist()
        assert list(trace.rows())[-1] == trace.ids == output.sequences[0].tolist()
        assert [step - 1 for step in trace.when] == output.commit_steps[0].tolist()
        assert trace.tokens_per_forward == pytest.approx(output.tokens_per_forward.item())
        total += sum(trace.counts, Counter())
    assert total["removed"] and total["added"] and total["decided"] and not total["edited"], total


def test_a_row_may_grow_at_once_and_shrink(tokenizer):
    """An infilled prompt: its end moves with the masks before it, and stays the prompt's."""
    a, b = words(tokenizer, *"ab")
    grown = feed(
        TraceRecorder(tokenizer),
        [a, MASK, b],
        [([MASK, MASK, b], None, [1, -1, 2]), ([a, a, b], None, None)],
        [a, a, b],
    )
    assert list(grown.rows()) == [[a, MASK, b], [a, MASK, MASK, b], [a, a, a, b]]
    assert (grown.decided, grown.when, grown.edits()) == (2, [0, 2, 2, 0], {"added": 1})
    assert [cell.piece.kind for cell in trace_cells(grown)[0]] == ["text", "mask", "text", "absent"]
    shrunk = feed(
        TraceRecorder(tokenizer), [a, MASK, MASK, b], [([MASK, b], None, [1, 3]), ([a, b], None, None)], [a, b]
    )
    assert list(shrunk.rows())[1:] == [[a, MASK, b], [a, a, b]]
    assert (shrunk.decided, shrunk.edits()) == (1, {"removed": 1})
    classes = re.findall(r'<span class="([^"]*)"', trace_view(shrunk, "title"))[:4]
    assert classes == ["text given", "text decided new", "text given", "absent"]


# ---- the page


def spans(html):
    """Class, struck text and title of each cell."""
    canvas = html[html.index('<p class="canvas') :]
    found = re.findall(r'<span class="([^"]*)"([^>]*)>', canvas[: canvas.index("</p>")])
    attribute = {name: re.compile(rf'{name}="([^"]*)"') for name in ("data-struck", "title")}
    return [(kind, *((pattern.findall(rest) or [""])[0] for pattern in attribute.values())) for kind, rest in found]


def test_the_page_says_what_each_step_did(edited, tokenizer):
    html = trace_page(edited, "title")
    data = json.loads(re.search(r'class="data">(.*?)</script>', html, re.S)[1])
    assert data["captions"] == [edited.caption(step) for step in range(1, 7)]
    assert data["struck"] == [[], [], [[2, "b"]], [[1, "a"], [3, "c"]], [], []]
    assert "step 6 of 6: no change</output>" in html
    assert "<dt>edited</dt><dd>1</dd>" in html and "<dt>masked again</dt><dd>2</dd>" in html
    assert "<dt>tokens</dt><dd>3</dd>" in html and "<dt>tokens per forward</dt><dd>0.50</dd>" in html
    assert "a token that replaced another" in html
    assert spans(html)[2] == ("text decided edited", "", "step 3, confidence 0.710, was b")
    plain = trace_page(denoised(tokenizer, [5], [7, 8]), "title")
    data = json.loads(re.search(r'class="data">(.*?)</script>', plain, re.S)[1])
    assert data["captions"] == data["struck"] == [] and "replaced another" not in plain
    assert "<output>step 2 of 2</output>" in plain


def test_a_view_shows_what_its_step_took_away(edited):
    assert spans(trace_view(edited, "title", step=3))[1:] == [
        ("text decided", "", "step 1, confidence 0.900"),
        ("text decided edited new", "b", "step 3, confidence 0.700, was b"),
        ("text decided", "", "step 2, confidence 0.950"),
    ]
    assert "<dt>this step</dt><dd>1 edited</dd>" in trace_view(edited, "title", step=3)
    fourth = trace_view(edited, "title", step=4)
    assert [kind for kind, _, _ in spans(fourth)[1:]] == ["mask edited new", "text decided edited", "mask edited new"]
    assert "<dt>tokens</dt><dd>1</dd>" in fourth and "<dt>masked again</dt><dd>2</dd>" in fourth
    assert "<dt>edited</dt>" not in trace_view(edited, "title", step=2)
    assert [kind for kind, _, _ in spans(trace_view(edited, "title", step=0))[1:]] == ["mask"] * 3


# ---- in a browser


STATES = """all => all.map(cell => [cell.textContent, cell.className, cell.dataset.struck || "", cell.title])"""
# The colours of struck and of edited text and of what is right behind them, as CSS has them.
INKS = """all => all.map(cell => {
  const own = getComputedStyle(cell), before = getComputedStyle(cell, "::before"), clear = "rgba(0, 0, 0, 0)";
  const ground = before.backgroundColor === clear ? own.backgroundColor : before.backgroundColor;
  return [own.color, own.backgroundColor, before.color, ground, before.textDecorationLine];
})"""


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda trace, tokenizer: trace, lambda trace, tokenizer: moving(tokenizer)])
def test_the_script_shows_what_a_view_shows(edited, tokenizer, tmp_path, browser_page, make):
    """At every step, class for class and word for word."""
    trace, page, errors = make(edited, tokenizer), browser_page, []
    page.on("pageerror", lambda error: errors.append(str(error)))
    (tmp_path / "page.html").write_text(trace_page(trace, "title"), encoding="utf-8")
    page.emulate_media(reduced_motion="reduce")
    page.goto(f"file://{tmp_path}/page.html")
    for step in range(len(trace.steps) + 1):
        page.locator(".controls input[type=range]").fill(str(step))
        shown = page.locator(".canvas > span").evaluate_all(STATES)
        view = spans(trace_view(trace, "title", step=step))
        assert [(set(kind.split()), struck, title) for _, kind, struck, title in shown] == [
            (set(kind.split()), struck, title) for kind, struck, title in view
        ], step
        assert [text for text, *_ in shown] == [cell.piece.text for cell in trace_cells(trace, step)[0]]
        caption = f"step {step} of {len(trace.steps)}" + (f": {trace.caption(step)}" if step else "")
        assert page.locator(".controls output").inner_text() == caption
    assert not errors


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_edits_can_be_read(tokenizer, tmp_path, browser_page, scheme, width):
    """Text: new, edited and struck; a sudoku: the same within its squares. Nothing is wider than the window."""
    page = browser_page
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.set_viewport_size({"width": width, "height": 800})
    long = words(tokenizer, *"abcdefghijklmnop") * 4
    text = feed(
        TraceRecorder(tokenizer), [5], [(long, None, None), (long[::-1], None, None), ([MASK, *long[1:]], None, None)]
    )
    board = board_trace(tokenizer)
    for trace, steps in ((text, (2, 3)), (board, (2, 3))):
        (tmp_path / "page.html").write_text(trace_page(trace, "title"), encoding="utf-8")
        page.goto(f"file://{tmp_path}/page.html")
        for step in steps:
            page.locator(".controls input[type=range]").fill(str(step))
            assert page.evaluate("document.documentElement.scrollWidth") == width
            assert page.locator(".canvas").evaluate("canvas => canvas.scrollWidth - canvas.clientWidth") == 0
            struck = page.locator(".canvas [data-struck]").evaluate_all(INKS)
            assert struck and {line for *_, line in struck} == {"line-through"}
            assert min(contrast(ink, ground) for _, _, ink, ground, _ in struck) >= 4.5, (step, struck)
            edits = page.locator(".canvas .edited:not(.mask)").evaluate_all(INKS)
            assert all(contrast(ink, ground) >= 4.5 for ink, ground, *_ in edits)
        legend = page.locator(".legend .edited").evaluate_all(INKS)
        assert legend[0][1] == edits[0][1] and contrast(*legend[0][:2]) >= 4.5
    boxes = page.locator(".nanollada-board > *").evaluate_all(
        "all => all.map(cell => cell.getBoundingClientRect().width)"
    )
    assert max(boxes) - min(boxes) < 2.5  # a struck digit widens no square


# ---- pictures


def board_trace(tokenizer):
    """All at once, a clue of it wrong; that is replaced; another is masked again, and comes otherwise."""
    prompt, answer = tokenizer("Sudoku 2003100000040000\n").input_ids, list("3413134231244231")
    rows = [answer, ["2", *answer[1:]], ["2", None, *answer[2:]], ["2", "3", *answer[2:]], ["2", "3", *answer[2:]]]
    digits = dict(zip("1234", words(tokenizer, *"1234"), strict=True)) | {None: MASK}
    drafts = [[digits[digit] for digit in row] for row in rows]
    return feed(TraceRecorder(tokenizer), prompt, [(draft, None, None) for draft in drafts], drafts[-1])


def frames(path):
    with Image.open(path) as animation:
        for number in range(animation.n_frames):
            animation.seek(number)
            yield animation.convert("RGB")


def seen(image, place, top):
    box = (MARGIN + place.x, top + place.y + 3, MARGIN + place.x + place.width, top + place.y + place.height - 3)
    return {colour for _, colour in image.crop(box).getcolors(10_000)}


def test_edits_are_pink_in_pictures(edited, tokenizer, tmp_path):
    write_gif(edited, tmp_path / "a.gif")
    places, top = Strip(Pen(), edited, 800).places, MARGIN + 2 * LINE  # a line for captions
    shades = Shades(6)
    for step, image in enumerate(frames(tmp_path / "a.gif"), start=1):
        for column, cell in enumerate(trace_cells(edited, step)[0]):
            colours = seen(image, places[column], top)
            assert (EDITED in colours) == (cell.was is not None), (step, column)
            if cell.piece.kind == "mask":
                assert BLOCK in colours
            elif cell.when and cell.was is None:
                assert shades[cell.when] in colours
    assert contrast(*(f"rgb{colour}" for colour in (EDITED, INK))) >= 4.5
    captions = Strip(Pen(), edited, 800).captions
    assert captions[3] == "1 edited: b → d" and captions[4] == "2 masked again"
    assert (
        Strip(Pen(), edited, 60).captions[3].endswith("…") and Pen().width(Strip(Pen(), edited, 60).captions[3]) <= 60
    )
    assert Strip(Pen(), denoised(tokenizer, [5], [7]), 800).captions == []
    write_png(edited, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert EDITED in {colour for _, colour in picture.getcolors(100_000)}


def test_an_edited_board_in_pictures(tokenizer, tmp_path):
    trace = board_trace(tokenizer)
    write_gif({"Diffusion": trace, "AR": written(tokenizer, [5], [7] * 3)}, tmp_path / "b.gif")
    strip, top, start = Strip(Pen(), trace, 384), MARGIN + 3 * LINE, len(trace.prompt)
    images = list(frames(tmp_path / "b.gif"))
    first, second = ([seen(image, strip.places[start + cell], top) for image in images] for cell in (0, 1))
    assert [WRONG in colours for colours in first] == [True, False, False, False, False]
    assert [EDITED in colours for colours in first] == [False, True, True, True, True]
    assert [EDITED in colours for colours in second] == [False, False, True, True, True]
    assert all(len(image.getcolors(10_000)) <= 256 for image in images)
    header = [image.crop((0, MARGIN + 2 * LINE, image.width // 2, MARGIN + 3 * LINE)).tobytes() for image in images]
    assert len(set(header)) == 5  # what each step did


# ---- the terminal


def watched(tokenizer, terminal):
    console = Console(
        file=io.StringIO(), force_terminal=terminal, width=80, color_system="truecolor" if terminal else None
    )
    a, b, c, d = words(tokenizer, *"abcd")
    steps = [([a, b, MASK], None, None), ([d, b, c], None, None), ([d, MASK, c], None, None)]
    feed(TerminalWatcher(tokenizer, console), words(tokenizer, "x"), steps, [d])
    return console.file.getvalue()


def test_watching_edits(tokenizer):
    lines = watched(tokenizer, False).splitlines()
    assert lines == [
        "step 1, 2 of 3 tokens: ab░",
        "step 2, 3 of 3 tokens, 1 edited: a→dbc",
        "step 3, 2 of 3 tokens, 1 masked again: db→░c",
    ]
    first, second, third = watched(tokenizer, True).split("step ")[1:4]
    assert "\x1b[9;95ma\x1b[0m\x1b[30;105md" in second  # struck, then what replaced it
    assert "\x1b[30;105md" in third and "\x1b[9;95mb\x1b[0m\x1b[30;105m░" in third and "\x1b[9" not in first
