"""Pictures of traces: frames, times, colours, boards, text without gaps, characters that fonts have or lack."""

import warnings

import pytest
from drawn_fonts import cropped, install, make_font
from PIL import Image, ImageDraw, ImageFont
from recordings import denoised, written

from nanollada.scripts.tracing.gif import GAP, MARGIN, WIDTH, write_gif, write_png
from nanollada.scripts.tracing.picture import (
    BAR,
    BLOCK,
    END,
    INK,
    LINE,
    PAPER,
    SIZE,
    SOFT,
    SQUARES,
    WRONG,
    Pen,
    Shades,
    Strip,
)  # fmt: skip
from nanollada.scripts.tracing.pieces import trace_cells
from nanollada.scripts.tracing.recorder import TraceRecorder

PUZZLE, ANSWER = "2003100000040000", "2413134231244231"
TOP = MARGIN + LINE  # of a trace that stands alone


def frames(path):
    """Every frame in RGB, and for how many milliseconds it stands."""
    shown = []
    with Image.open(path) as animation:
        for number in range(animation.n_frames):
            animation.seek(number)
            shown.append((animation.convert("RGB"), animation.info["duration"]))
    return shown


def strip(trace, **options):
    return Strip(Pen(), trace, WIDTH, **options)


def colours(image, place, left=MARGIN, top=TOP):
    """The colours of a column."""
    box = (place.x, place.y + 3, place.x + place.width, place.y + place.height - 3)
    box = tuple(edge + (top if number % 2 else left) for number, edge in enumerate(box))
    return {colour for _, colour in image.crop(box).getcolors(10_000)}


def bar(image, place, left=MARGIN, top=TOP):
    """The colour in the middle of the bar under a column."""
    return image.getpixel((left + place.x + place.width // 2, top + place.y + LINE - 3 - BAR // 2))


def test_a_frame_per_step(tokenizer, tmp_path):
    prompt, text = tokenizer("The cat").input_ids, tokenizer("sat on the mat").input_ids
    order = [[place] for place in reversed(range(len(text)))]
    trace = denoised(tokenizer, prompt, text, order)
    write_gif(trace, tmp_path / "out.gif")
    shown = frames(tmp_path / "out.gif")
    assert len(shown) == len(order) and {image.size for image, _ in shown} == {shown[0][0].size}
    assert [time for _, time in shown] == [500] * (len(order) - 1) + [3000]
    shades = [Shades(len(order))[step] for step in range(1, len(order) + 1)]
    assert len(set(shades)) == len(order)
    for step, (image, _) in enumerate(shown, start=1):
        for column, place in enumerate(strip(trace).places):
            seen = colours(image, place)
            decided = len(text) - (column - len(prompt))  # its step
            if column < len(prompt):
                blank = not tokenizer.decode(prompt[column]).strip()
                assert PAPER in seen and INK not in seen and (blank or SOFT in seen)
            elif decided > step:
                assert seen <= {BLOCK, PAPER} and BLOCK in seen
            else:
                assert shades[decided - 1] in seen and BLOCK not in seen
            is_newest = column >= len(prompt) and decided == step
            assert (bar(image, place) == INK) == is_newest


def test_two_traces_share_a_clock(tokenizer, tmp_path):
    """Side by side: each panel holds its own row at every step, ends with its own text, and then waits."""
    prompt, text = tokenizer("The cat").input_ids, tokenizer("sat on the mat").input_ids
    quick = denoised(tokenizer, prompt, text, [range(0, len(text), 2), range(1, len(text), 2)])
    slow = written(tokenizer, prompt, text[:-1])
    write_gif({"model 0": quick, "model 1": slow}, tmp_path / "out.gif")
    shown, share = frames(tmp_path / "out.gif"), (WIDTH - GAP) // 2
    assert len(shown) == len(text) - 1 and {image.width for image, _ in shown} == {WIDTH + 2 * MARGIN}
    shades = Shades(len(text) - 1)
    for left, trace, count in ((MARGIN, quick, 2), (MARGIN + share + GAP, slow, len(text) - 1)):
        drawn = Strip(Pen(), trace, share)
        assert drawn.size[0] == share and all(place.x + place.width <= share for place in drawn.places)
        assert len(drawn.states) == count + 1
        assert "".join(cell.piece.text for cell in drawn.states[-1]) == tokenizer.decode(trace.ids)
        for step, (image, _) in enumerate(shown, start=1):
            for place, cell in zip(drawn.places, drawn.states[min(step, count)], strict=True):
                seen = colours(image, place, left, TOP + LINE)
                assert BLOCK in seen if cell.piece.kind == "mask" else not cell.when or BLOCK not in seen
                assert not cell.when or shades[cell.when] in seen
                assert (bar(image, place, left, TOP + LINE) == INK) == (cell.when == step)
    headings = [image.crop((0, TOP, image.width, TOP + LINE)) for image, _ in shown]
    half = (0, 0, MARGIN + share, LINE)
    assert headings[1].crop(half).tobytes() == headings[-1].crop(half).tobytes()  # "2 of 2 forward passes"
    assert len({heading.tobytes() for heading in headings}) == len(shown)


def test_long_traces_take_ten_seconds(tokenizer, tmp_path):
    write_gif(denoised(tokenizer, [5], [7] * 100), tmp_path / "out.gif")
    times = [time for _, time in frames(tmp_path / "out.gif")]
    assert times == [100] * 99 + [3000]


def test_nothing_leaves_the_picture(tokenizer, tmp_path):
    """Long rows wrap, line ends break them, and a token longer than a line widens the picture."""
    line = "The cat sat on the mat. The dog sat on the log. " * 3 + "The bird sang, the fish did not.\n"
    text = tokenizer(line * 4 + "a").input_ids
    trace = denoised(tokenizer, [5], text, [range(len(text))])
    places = strip(trace).places
    write_gif(trace, tmp_path / "out.gif")
    ((image, _),) = frames(tmp_path / "out.gif")
    assert len({place.y for place in places}) >= 8
    assert image.width == WIDTH + 2 * MARGIN
    assert all(0 <= place.x <= place.x + place.width <= WIDTH for place in places)
    assert image.height == TOP + max(place.y for place in places) + LINE + MARGIN
    boxes = [(place.y, place.x, place.x + place.width) for place in places]
    assert boxes == sorted(boxes)
    ends = [column for column, cell in enumerate(trace_cells(trace)[-1]) if "\n" in cell.piece.text]
    assert ends and all(places[column + 1].y > places[column].y for column in ends)
    narrow = Strip(Pen(), trace, 10)
    assert narrow.size[0] == max(place.width for place in narrow.places) > 10


def test_pieces_of_a_word_touch(tokenizer, char_tokenizer):
    """No column is wider than its text, though a mask stood there: "us er" would read as a typo."""
    for vocabulary, words in ((tokenizer, "user assistant ill fig 1il"), (char_tokenizer, "The fish 天气 is il")):
        text = vocabulary(words).input_ids
        drawn = strip(denoised(vocabulary, [5], text))
        assert len(text) > len(words.split())
        for place, after, cell in zip(drawn.places[1:], drawn.places[2:], drawn.states[-1][1:], strict=False):
            assert place.width == Pen().width(drawn.pen.spell(cell.piece.text)) and after.x == place.x + place.width
        right = drawn.places[-1].x + drawn.places[-1].width - drawn.places[1].x
        assert abs(right - Pen().width(drawn.pen.spell(words))) <= len(text) / 2  # rounded once a token


def test_parts_of_a_character_share_its_width(tokenizer, tmp_path, monkeypatch):
    """散 of three byte tokens: three colours under one character; nothing is written until it is whole."""
    install(monkeypatch, make_font(tmp_path / "a.ttf", "Chinese", "散步"))
    text = tokenizer("散步").input_ids
    parts = [cell.piece.kind for cell in trace_cells(denoised(tokenizer, [5], text))[-1][1:]]
    assert parts.count("text") == 2 and parts.count("part") == len(text) - 2 >= 2
    drawn = strip(denoised(tokenizer, [5], text, [[place] for place in reversed(range(len(text)))]))
    widths = [place.width for place in drawn.places[1:]]
    assert sum(widths) == 2 * SIZE and min(widths) >= SIZE // 3
    write_gif(denoised(tokenizer, [5], text, [[place] for place in reversed(range(len(text)))]), tmp_path / "a.gif")
    shown, shades = frames(tmp_path / "a.gif"), Shades(len(text))
    for column, place in enumerate(drawn.places[1:]):
        assert shades[len(text) - column] in colours(shown[-1][0], place)
    half = shown[0][0].crop((MARGIN + drawn.places[-1].x, TOP, MARGIN + drawn.places[-1].x + widths[-1], TOP + LINE))
    assert {colour for _, colour in half.getcolors()} == {PAPER, shades[1], INK}  # a decided place and its bar
    narrow = Strip(Pen(), denoised(tokenizer, [5], text * 3), 3 * SIZE)
    for column, (place, owner) in enumerate(zip(narrow.places, narrow.owners, strict=True)):
        assert place.y == narrow.places[owner].y, column  # no line ends within a character


def test_the_end_of_text_is_short(tokenizer):
    end = tokenizer.eos_token_id
    drawn = strip(denoised(tokenizer, [5, end], [7, end, end]))
    assert [cell.piece.text for cell in drawn.states[-1][2:]] == [tokenizer.decode(7), END, END]
    assert drawn.states[-1][1].piece.text == tokenizer.eos_token  # the prompt's are shown as they are


# ---- boards


def board_trace(tokenizer, answer, order=None, more=()):
    prompt, ids = tokenizer(f"Sudoku {PUZZLE}\n").input_ids, [*tokenizer(answer).input_ids, *more]
    return denoised(tokenizer, prompt, ids, order), len(prompt)


def test_a_sudoku_is_drawn_as_a_board(tokenizer, tmp_path):
    wrong = "3" + ANSWER[1:]  # the first clue is changed
    trace, start = board_trace(tokenizer, wrong, [range(8), range(8, 16), [16]], [tokenizer.eos_token_id])
    places, square = strip(trace).places, SQUARES[4]
    cells = places[start : start + 16]
    assert len({place.x for place in cells}) == len({place.y for place in cells}) == 4
    assert {(place.width, place.height) for place in cells} == {(square, square)}
    assert cells[0].y > places[start - 1].y and places[start + 16].y >= cells[-1].y + square
    write_gif(trace, tmp_path / "out.gif")
    (first, _), (second, _), _ = frames(tmp_path / "out.gif")
    shades = Shades(3)
    for cell, place in enumerate(cells):
        seen = colours(first, place)
        assert (shades[1] in seen) == (cell < 8) and shades[2] not in seen
        if cell >= 8:  # undecided: blank but for its clue
            assert (cropped(middle(first, place)) is not None) == (PUZZLE[cell] != "0")
        assert (WRONG in seen) == (cell == 0)
        assert cropped(middle(second, place)) is not None
    assert square_line(first, cells[1], square) == INK and square_line(first, cells[0], square) != INK


def middle(image, place):
    """The inside of a square, without its lines and its bar."""
    left, top = MARGIN + place.x, TOP + place.y
    return image.crop((left + 6, top + 6, left + place.width - 6, top + place.height - 7)).point(
        lambda v: 255 * (v > 150)
    )


def square_line(image, place, square):
    """The colour of the line right of a square: thick around the boxes of four."""
    return image.getpixel((MARGIN + place.x + square, TOP + place.y + 9))


def test_all_steps_in_one_picture(tokenizer, tmp_path):
    """A board per step, side by side; a line per step of text; and nothing behind the end of the text."""
    trace, _ = board_trace(tokenizer, ANSWER)
    write_png(trace, tmp_path / "board.png")
    with Image.open(tmp_path / "board.png") as picture:
        assert WIDTH < picture.width < WIDTH + 200 and 3 * 140 < picture.height < 6 * 200  # 17 boards
        full = [shade for shade in Shades(16).colours[:1] if shade in {c for _, c in picture.getcolors(100_000)}]
        assert full
    text = tokenizer("sat on the mat").input_ids
    trace = denoised(tokenizer, [5], [*text, tokenizer.eos_token_id, *[7] * 99], [range(len(text) + 100)])
    trace.kept = 1 + len(text)
    write_png(trace, tmp_path / "text.png")
    with Image.open(tmp_path / "text.png") as picture:
        assert picture.height == 2 * MARGIN + 2 * LINE and picture.width < WIDTH // 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["board.png", "text.png"]


# ---- fonts


def test_a_character_that_no_font_has_is_spelt(char_tokenizer, tmp_path, monkeypatch):
    install(monkeypatch)
    pen = Pen()
    assert pen.spell("a你\n\t\x07é") == "a⟨U+4F60⟩↵⇥⟨U+0007⟩é" and pen.fonts.missing == {"你"}
    trace = denoised(char_tokenizer, [5], char_tokenizer("你好a").input_ids)
    for write, name in ((write_gif, "out.gif"), (write_png, "out.png")):
        with pytest.warns(UserWarning, match=rf"{name}: no font .* has U\+4F60 U\+597D; .*fonts-noto-cjk") as caught:
            write(trace, tmp_path / name)
        assert len(caught) == 1


def last_glyphs(trace, path, font=None):
    """The shapes of the answer's tokens in the last frame."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_gif(trace, path, font)
    image, places = frames(path)[-1][0], Strip(Pen(font), trace, WIDTH).places[len(trace.prompt) :]
    boxes = [(MARGIN + p.x, TOP + p.y + 3, MARGIN + p.x + p.width, TOP + p.y + LINE - 3 - BAR) for p in places]
    return [cropped(image.crop(box)) for box in boxes]


def test_a_character_that_some_font_has_is_drawn(char_tokenizer, tmp_path, monkeypatch):
    path = make_font(tmp_path / "a.ttf", "Chinese", "你好")
    install(monkeypatch, path)
    trace = denoised(char_tokenizer, [5], char_tokenizer("你好a").input_ids)
    you, good, latin = last_glyphs(trace, tmp_path / "a.gif")
    assert you is not None and good[0][0] == you[0][0] and good[0][1] > you[0][1]  # bars of their own heights
    install(monkeypatch)
    named = last_glyphs(trace, tmp_path / "b.gif", path)
    assert named[:2] == [you, good] and named[2] == latin
    other = make_font(tmp_path / "b.ttf", "Latin", "a")
    assert last_glyphs(denoised(char_tokenizer, [5], char_tokenizer("a").input_ids), tmp_path / "c.gif", other) != [
        latin
    ]
    with pytest.raises(ValueError, match="`font` must be .*, got 'nowhere'"):
        write_gif(trace, tmp_path / "d.gif", "nowhere")


@pytest.mark.slow
def test_chinese_is_drawn(char_tokenizer, tmp_path, chinese_face):
    """Characters look like themselves: not like each other, and not like the box of what the font lacks."""
    trace = denoised(char_tokenizer, [5], char_tokenizer("你好今天a").input_ids)
    shapes = last_glyphs(trace, tmp_path / "a.gif")
    font = ImageFont.truetype(chinese_face.path, SIZE, index=chinese_face.index)
    image = Image.new("RGB", (60, 60), PAPER)
    ImageDraw.Draw(image).text((9, 40), "\U0010fffe", font=font, fill=INK, anchor="ls")
    assert None not in shapes and len({*shapes, cropped(image)}) == 6


def test_nothing_recorded_is_refused(tokenizer, tmp_path):
    for traces in (TraceRecorder(tokenizer), {"a": denoised(tokenizer, [5], [7]), "b": TraceRecorder(tokenizer)}):
        with pytest.raises(ValueError, match="`trace` must have recorded a `generate` call"):
            write_gif(traces, tmp_path / "out.gif")
    with pytest.raises(ValueError, match="`trace` must have recorded a `generate` call"):
        write_png(TraceRecorder(tokenizer), tmp_path / "out.png")
