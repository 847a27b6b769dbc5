"""How the page looks in Chromium: on a phone and a desktop, light and dark, with text, Chinese and boards."""

import itertools

import pytest
from recordings import denoised

from nanollada.scripts.tracing.page import trace_page

pytestmark = pytest.mark.slow
WIDTHS, SCHEMES = (390, 1280), ("light", "dark")
PUZZLE, ANSWER = "2003100000040000", "2413134231244231"
NINE = "530070000600195000098000060800060003400803001700020006060000280000419005000080079"
TEXT = "def add(first, second):\n    return first + second 今天天气很好 " + "W" * 60
# Boxes of the tokens, with whatever is painted around them; a token that is broken across lines has several.
BOXES = """spans => spans.map(span => {
  const style = getComputedStyle(span);
  const outline = style.outlineStyle === "none" ? 0
    : Math.max(parseFloat(style.outlineWidth) + parseFloat(style.outlineOffset), 0);
  const shadow = style.boxShadow === "none" || style.boxShadow.includes("inset") ? 0 : 99;
  const more = Math.max(outline, shadow);
  return [...span.getClientRects()].map(box => [box.left - more, box.top - more, box.right + more, box.bottom + more]);
})"""
# Colours of letters and of what lies behind them, as a canvas paints them.
INKS = """spans => {
  const paint = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const draw = (colours) => {
    for (const colour of ["white", ...colours]) { paint.fillStyle = colour; paint.fillRect(0, 0, 1, 1); }
    return [...paint.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  return spans.filter(span => span.textContent.trim() && !span.matches(".mask, .absent")).map(span => {
    const grounds = [];
    for (let node = span; node; node = node.parentElement) grounds.unshift(getComputedStyle(node).backgroundColor);
    return [span.className, draw(grounds), draw([...grounds, getComputedStyle(span).color])];
  });
}"""


@pytest.fixture
def show(browser_page, tmp_path):
    """Opens a trace's page, which doesn't play by itself, in a window."""

    def show(trace, width, scheme="light", title="What is it?"):
        (tmp_path / "page.html").write_text(trace_page(trace, title, {"model": "a/" + "b" * 60}), encoding="utf-8")
        browser_page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        browser_page.set_viewport_size({"width": width, "height": 800})
        browser_page.goto(f"file://{tmp_path}/page.html")
        return browser_page

    return show


def text_trace(tokenizer):
    ids = tokenizer(TEXT).input_ids
    order = [range(step, len(ids), 6) for step in range(6)]
    return denoised(tokenizer, tokenizer("user\nWhat is 天气?\n").input_ids, ids, order)


def board_trace(tokenizer, puzzle, answer):
    ids = [*tokenizer(answer).input_ids, tokenizer.eos_token_id]
    order = [range(step, len(ids), 5) for step in range(5)]
    return denoised(tokenizer, tokenizer(f"Sudoku {puzzle}\n").input_ids, ids, order)


def luminance(colour):
    parts = [part / 255 for part in colour]
    parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(one, other):
    """WCAG's ratio of two colours."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def overlap(one, other):
    """By how many pixels two boxes overlap, both ways."""
    return min(min(one[2], other[2]) - max(one[0], other[0]), min(one[3], other[3]) - max(one[1], other[1]))


@pytest.mark.parametrize("width", WIDTHS)
def test_the_newest_stay_within_their_boxes(tokenizer, show, width):
    """At each step what marks the newest tokens, and the picked one, lies over no neighbour."""
    page = show(text_trace(tokenizer), width)
    page.locator(".canvas span").nth(9).evaluate("span => span.classList.add('picked')")
    for step in range(1, 7):
        page.locator("input[type=range]").fill(str(step))
        assert page.locator(".canvas .new").count() > 5
        boxes = page.locator(".canvas span").evaluate_all(BOXES)
        for one, other in itertools.combinations(range(len(boxes)), 2):
            worst = max([overlap(a, b) for a in boxes[one] for b in boxes[other]], default=0)
            assert worst <= 0.5, (step, one, other)
    shadows = "all => all.map(span => getComputedStyle(span).boxShadow)"
    assert all("inset" in shadow for shadow in page.locator(".canvas .new").evaluate_all(shadows))


def test_pieces_of_a_word_touch(tokenizer, show):
    """No space stands between two decided tokens of a line that was not written there."""
    page = show(text_trace(tokenizer), 1280)
    cells = page.locator(".canvas span.text, .canvas span.part")
    boxes = [box[0] for box in cells.evaluate_all(BOXES) if len(box) == 1]
    gaps = [after[0] - box[2] for box, after in itertools.pairwise(boxes) if abs(after[1] - box[1]) < 1]
    assert len(gaps) > 40 and max(gaps) < 0.5


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_pages_are_legible_and_fit(tokenizer, show, width, scheme):
    traces = [text_trace(tokenizer), board_trace(tokenizer, PUZZLE, ANSWER), board_trace(tokenizer, NINE, "1" * 81)]
    for trace in traces:
        page = show(trace, width, scheme, title=TEXT)
        for step in (0, 3, len(trace.steps)):
            page.locator("input[type=range]").fill(str(step))
            assert page.evaluate("document.documentElement.scrollWidth") == width
            wide = page.locator(".canvas").evaluate("canvas => canvas.scrollWidth - canvas.clientWidth")
            assert wide == 0, step
            inks = page.locator(".canvas span").evaluate_all(INKS)
            assert min(contrast(ground, ink) for _, ground, ink in inks) >= 4.5, (step, inks)
        (ground,) = {tuple(ground) for _, ground, _ in page.locator("h2").evaluate_all(INKS)}
        assert (luminance(ground) < 0.1) == (scheme == "dark")


@pytest.mark.parametrize(("puzzle", "answer", "side"), [(PUZZLE, ANSWER, 4), (NINE, "1" * 81, 9)])
@pytest.mark.parametrize("width", WIDTHS)
def test_boards_are_square_at_each_step(tokenizer, show, width, puzzle, answer, side):
    page = show(board_trace(tokenizer, puzzle, answer), width)
    cells = page.locator(".nanollada-board > *")
    for step in range(6):
        page.locator("input[type=range]").fill(str(step))
        boxes = [box for (box,) in cells.evaluate_all(BOXES)]
        assert len(boxes) == side * side
        lefts, tops = [[box[edge] for box in boxes] for edge in (0, 1)]
        assert len({round(left) for left in lefts}) == len({round(top) for top in tops}) == side
        sizes = [(box[2] - box[0], box[3] - box[1]) for box in boxes]
        assert all(abs(wide - high) <= 2.5 and wide > 20 for wide, high in sizes)
        read = "all => all.map(cell => [cell.className, getComputedStyle(cell, '::after').content.replace(/`/g, '')])"
        for (kind, clue), digit in zip(cells.evaluate_all(read.replace("`", '"')), puzzle, strict=True):
            undecided = "" if digit == "0" else digit
            assert clue == (undecided if kind.startswith("mask") else "none")
        edges = cells.evaluate_all("all => all.map(cell => getComputedStyle(cell).borderRightWidth)")
        lines = cells.evaluate_all("all => all.map(cell => getComputedStyle(cell).borderRightColor)")
        assert set(lines) == {page.locator(".nanollada-trace").evaluate("part => getComputedStyle(part).color")}
        box = {4: 2, 9: 3}[side]
        thick = [column % box == box - 1 and column < side - 1 for column in range(side)] * side
        assert [edge == "2px" for edge in edges] == thick
    wrong = [digit not in ("0", own) for digit, own in zip(puzzle, answer, strict=True)]
    assert cells.evaluate_all("all => all.map(cell => cell.classList.contains('wrong'))") == wrong
