"""Fonts made for a test, and what a picture shows of them."""

from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager


def make_font(path, family, characters):
    """A font file: each character a bar of its own height, what it lacks (`.notdef`) a full square."""
    heights = {".notdef": 1000} | {f"g{n}": 100 + 120 * (n % 7) for n in range(len(characters))}
    glyphs = {}
    for name, height in heights.items():
        pen = TTGlyphPen(None)
        for number, corner in enumerate([(100, 0), (100, height), (900, height), (900, 0)]):
            (pen.lineTo if number else pen.moveTo)(corner)
        pen.closePath()
        glyphs[name] = pen.glyph()
    builder = FontBuilder(1000)
    builder.setupGlyphOrder(list(glyphs))
    builder.setupCharacterMap({ord(character): f"g{n}" for n, character in enumerate(characters)})
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics({name: (1000, 100) for name in glyphs})
    builder.setupHorizontalHeader(ascent=1000, descent=-200)
    builder.setupNameTable({"familyName": family, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return str(path)


def install(monkeypatch, *paths):
    """The system has these fonts and no others, and matplotlib has not seen them yet."""
    own = [entry for entry in font_manager.fontManager.ttflist if "mpl-data" in entry.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda *args, **kwargs: list(paths))


def cropped(image):
    """The dark parts' size and shape, wherever they stand."""
    mask = image.convert("L").point(lambda value: 255 * (value < 110))
    box = mask.getbbox()
    return None if box is None else (mask.crop(box).size, mask.crop(box).tobytes())
