"""The animated GIF of a trace: frames, times, colours, and characters that fonts have or lack."""

import warnings

import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image

from nanollada.scripts.tracing import gif as trace_gif
from nanollada.scripts.tracing.gif import BLOCK, INK, LINE, PADDING, PAPER, SOFT, Pen, write_gif
from nanollada.scripts.tracing.pieces import trace_cells
from nanollada.scripts.tracing.recorder import TraceRecorder

MASK = 3


def record(tokenizer, prompt, text, order):
    """A recorder that was given a text whose tokens were decided in this order; a group of places for each step."""
    recorder, row = TraceRecorder(tokenizer), [MASK] * len(text)
    recorder.put(torch.tensor(prompt))
    for places in order:
        for place in places:
            row[place] = text[place]
        recorder.put_draft(torch.tensor([row]))
    recorder.put(torch.tensor(row))
    recorder.end()
    return recorder


def frames(path):
    """Every frame in RGB, and for how many milliseconds it stands."""
    shown = []
    with Image.open(path) as animation:
        for number in range(animation.n_frames):
            animation.seek(number)
            shown.append((animation.convert("RGB"), animation.info["duration"]))
    return shown


def picture(*recorders):
    """Of one trace, or of several with titles."""
    traces = {f"model {n}": item for n, item in enumerate(recorders)} if len(recorders) > 1 else {"": recorders[0]}
    return trace_gif._Picture(Pen(), trace_gif._panels(Pen(), traces))


def layout(recorder):
    return picture(recorder).panels[0].places


def colours(image, place):
    """The colours inside a column's frame."""
    box = (place.x + 1, place.y + 3, place.x + place.width - 1, place.y + LINE - 4)
    return {colour for _, colour in image.crop(box).getcolors(10_000)}


def test_a_frame_per_step(tokenizer, tmp_path):
    prompt, text = tokenizer("The cat").input_ids, tokenizer("sat on the mat").input_ids
    order = [[place] for place in reversed(range(len(text)))]
    recorder = record(tokenizer, prompt, text, order)
    write_gif(recorder, tmp_path / "out.gif")
    shown = frames(tmp_path / "out.gif")
    assert len(shown) == len(order) and {image.size for image, _ in shown} == {shown[0][0].size}
    assert [time for _, time in shown] == [500] * (len(order) - 1) + [3000]
    places = layout(recorder)
    shades = [picture(recorder).shade(step) for step in range(1, len(order) + 1)]
    assert len(set(shades)) == len(order)
    for step, (image, _) in enumerate(shown, start=1):
        for column, place in enumerate(places):
            seen = colours(image, place)
            decided = len(text) - (column - len(prompt))  # its step
            if column < len(prompt):
                blank = not tokenizer.decode(prompt[column]).strip()
                assert PAPER in seen and INK not in seen and (blank or SOFT in seen)
            elif decided > step:
                assert seen <= {BLOCK, PAPER} and BLOCK in seen
            else:
                assert shades[decided - 1] in seen and BLOCK not in seen
            corner = image.getpixel((place.x, place.y + 2))
            assert (corner == INK) == (column >= len(prompt) and decided == step)  # the newest has a frame


def test_two_traces_share_a_clock(tokenizer, tmp_path):
    """Side by side: each panel holds its own row at every step, ends with its own text, and then waits."""
    prompt, text = tokenizer("The cat").input_ids, tokenizer("sat on the mat").input_ids
    quick = record(tokenizer, prompt, text, [range(0, len(text), 2), range(1, len(text), 2)])
    slow = TraceRecorder(tokenizer)  # left to right, as an AR model
    slow.put(torch.tensor(prompt))
    for token in text[:-1]:
        slow.put(torch.tensor([token]))
    slow.end()
    write_gif({"model 0": quick, "model 1": slow}, tmp_path / "out.gif")
    shown, drawn = frames(tmp_path / "out.gif"), picture(quick, slow)
    assert len(shown) == drawn.steps == len(text) - 1 and {image.size for image, _ in shown} == {drawn.size}
    assert drawn.size[0] == trace_gif.WIDTH + 2 * trace_gif.MARGIN
    left, right = drawn.panels
    assert left.right + trace_gif.GAP == right.left and all(place.x >= right.left for place in right.places)
    assert all(place.x + place.width <= left.right for place in left.places)
    for panel, trace, count in ((left, quick, 2), (right, slow, len(text) - 1)):
        assert len(panel.states) == count + 1
        assert "".join(cell.piece.text for cell in panel.states[-1]) == tokenizer.decode(trace.ids)
        for step, (image, _) in enumerate(shown, start=1):
            cells = zip(panel.places, panel.states[min(step, count)], strict=True)
            for place, cell in [(place, cell) for place, cell in cells if place.width]:
                seen = colours(image, place)
                assert BLOCK in seen if cell.piece.kind == "mask" else not cell.when or BLOCK not in seen
                assert not cell.when or drawn.shade(cell.when) in seen
                assert (image.getpixel((place.x, place.y + 2)) == INK) == (cell.when == step)
    headings = [image.crop((0, trace_gif.MARGIN + LINE, drawn.size[0], left.places[0].y)) for image, _ in shown]
    half = (0, 0, left.right, headings[0].height)
    assert headings[1].crop(half).tobytes() == headings[-1].crop(half).tobytes()  # "2 of 2 forward passes"
    assert len({heading.tobytes() for heading in headings}) == len(shown)


def test_long_traces_take_ten_seconds(tokenizer, tmp_path):
    text = [7] * 100
    write_gif(record(tokenizer, [5], text, [[place] for place in range(100)]), tmp_path / "out.gif")
    times = [time for _, time in frames(tmp_path / "out.gif")]
    assert times == [100] * 99 + [3000]


def test_nothing_leaves_the_picture(tokenizer, tmp_path):
    """Long rows wrap, line ends break them, and a token longer than a line widens the picture."""
    text = tokenizer(
        "The cat sat on the mat. The dog sat on the log. The bird sang, the fish did not.\n" * 4 + "a"
    ).input_ids
    recorder = record(tokenizer, [5], text, [range(len(text))])
    places = layout(recorder)
    write_gif(recorder, tmp_path / "out.gif")
    ((image, _),) = frames(tmp_path / "out.gif")
    assert len({place.y for place in places}) >= 8
    assert image.width == trace_gif.WIDTH + 2 * trace_gif.MARGIN
    assert all(
        0 < place.x <= place.x + place.width < image.width and place.y + LINE < image.height for place in places
    )
    boxes = [(place.y, place.x, place.x + place.width) for place in places]
    assert boxes == sorted(boxes)
    assert all(one[2] <= other[1] for one, other in zip(boxes, boxes[1:], strict=False) if one[0] == other[0])
    ends = [column for column, cell in enumerate(trace_cells(recorder)[-1]) if "\n" in cell.piece.text]
    assert ends and all(places[column + 1].y > places[column].y for column in ends)
    wide = Pen().width("W" * 80)
    cell = trace_cells(recorder)[-1][0]
    cells = [[cell._replace(piece=cell.piece._replace(text="W" * 80))]]
    (place,) = trace_gif._layout(Pen(), cells, trace_gif.MARGIN, trace_gif.WIDTH, 0)
    assert place.width == wide + 2 * PADDING > trace_gif.WIDTH


def test_a_character_that_no_font_has_is_spelt(char_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(trace_gif, "_system_fonts", list)
    pen = Pen()
    assert pen.spell("a你\n\t\x07é") == "a⟨U+4F60⟩↵⇥⟨U+0007⟩é" and pen.missing == {"你"}
    recorder = record(char_tokenizer, [5], char_tokenizer("你好a").input_ids, [[0, 1, 2]])
    with pytest.warns(UserWarning, match=r"no font of this system has U\+4F60 U\+597D; they are spelt"):
        write_gif(recorder, tmp_path / "out.gif")


def test_a_character_that_some_font_has_is_drawn(char_tokenizer, tmp_path, monkeypatch):
    """A font made here has 你 as a full square; its glyph and nothing else stands in the picture."""
    builder, pen = FontBuilder(1000), TTGlyphPen(None)
    for number, corner in enumerate([(100, 0), (100, 800), (900, 800), (900, 0)]):
        (pen.lineTo if number else pen.moveTo)(corner)
    pen.closePath()
    square = pen.glyph()
    builder.setupGlyphOrder([".notdef", "you"])
    builder.setupCharacterMap({ord("你"): "you"})
    builder.setupGlyf({".notdef": square, "you": square})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "you": (1000, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Square", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "square.ttf")
    monkeypatch.setattr(font_manager.fontManager, "ttflist", list(font_manager.fontManager.ttflist))
    font_manager.fontManager.addfont(tmp_path / "square.ttf")
    assert Pen().spell("你") == "你" and Pen().width("你") == trace_gif.SIZE
    recorder = record(char_tokenizer, [5], char_tokenizer("你").input_ids, [[0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_gif(recorder, tmp_path / "out.gif")
    place = layout(recorder)[-1]
    ((image, _),) = frames(tmp_path / "out.gif")
    box = (place.x + 1, place.y + 3, place.x + place.width - 1, place.y + LINE - 4)
    ink = sum(count for count, colour in image.crop(box).getcolors(10_000) if colour == INK)
    assert ink >= 13 * 13  # 0.8 of 18 pixels each way, less blurred edges


def test_fonts_that_draw_only_boxes_or_symbols_are_not_asked():
    own = {entry.fname for entry in font_manager.fontManager.ttflist if "mpl-data" in entry.fname}
    assert own and not own & set(trace_gif._system_fonts())


def test_nothing_recorded_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="`trace` must have recorded a `generate` call"):
        write_gif(TraceRecorder(tokenizer), tmp_path / "out.gif")
    with pytest.raises(ValueError, match="`trace` must have recorded a `generate` call"):
        write_gif({"a": record(tokenizer, [5], [7], [[0]]), "b": TraceRecorder(tokenizer)}, tmp_path / "out.gif")
