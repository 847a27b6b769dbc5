"""Which font draws a character; that one installed a moment ago is found; and that no empty box is ever drawn."""

import warnings

import pytest
from drawn_fonts import cropped, install, make_font
from matplotlib import font_manager
from PIL import Image

from nanollada.scripts.reporting.fonts import Fonts, check_font, find_face, system_faces
from nanollada.scripts.reporting.plots import panels, save_figure


def test_a_font_that_was_just_installed_is_found(tmp_path, monkeypatch):
    """Matplotlib keeps a list of what it saw first; whoever follows the warning's advice has a newer font."""
    install(monkeypatch)
    assert Fonts().face("你") is None
    path = make_font(tmp_path / "a.ttf", "Chinese", "你好")
    install(monkeypatch, path)
    fonts = Fonts()
    assert fonts.face("你") == ("Chinese", path, 0) and fonts.face("a").family == "DejaVu Sans"
    assert fonts.spell("a你🎉\x07") == "a你⟨U+1F389⟩⟨U+0007⟩" and fonts.missing == {"🎉"}


def test_latin_text_looks_for_no_fonts(monkeypatch):
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda *args, **kwargs: pytest.fail("looked"))
    assert Fonts().spell("façade ░ ≤") == "façade ░ ≤"


def test_fonts_for_chinese_come_first(tmp_path, monkeypatch):
    """Not the first of the alphabet, which may be Japanese or a serif with half of the characters."""
    names = ["A Serif", "Noto Sans CJK SC", "WenQuanYi Micro Hei"]
    install(monkeypatch, *[make_font(tmp_path / f"{name}.ttf", name, "你") for name in names])
    assert [face.family for face in system_faces()] == ["Noto Sans CJK SC", "WenQuanYi Micro Hei", "A Serif"]
    assert not [face for face in system_faces() if "mpl-data" in face.path]  # symbols
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"no font")
    install(monkeypatch, str(broken))
    assert system_faces() == []


def test_a_font_may_be_named(tmp_path, monkeypatch):
    path = make_font(tmp_path / "a.ttf", "My Hand", "ab你")
    assert find_face(path) == ("My Hand", path, 0)
    install(monkeypatch, path)
    assert find_face("my hand") == find_face(path)
    fonts = Fonts("My Hand")
    assert [fonts.face(character).family for character in "a你c"] == ["My Hand", "My Hand", "DejaVu Sans"]
    with pytest.raises(ValueError, match=r"`font` must be a font file or .*, got 'My Hands' \(did you mean 'My Hand'"):
        Fonts("My Hands")
    with pytest.raises(ValueError, match="`font` must be a font file or the name of an installed family, got 'x.ttf'"):
        Fonts("x.ttf")
    (tmp_path / "b.ttf").write_bytes(b"no font")
    with pytest.raises(ValueError, match="`font` must be a font of outlines in one colour, got the file .*b.ttf"):
        Fonts(str(tmp_path / "b.ttf"))


def test_a_font_goes_with_a_gif():
    check_font(None, "trace", None)
    check_font("DejaVu Sans", "trace", "a.gif")
    for picture in (None, "a.html"):
        with pytest.raises(ValueError, match="`font` draws a .gif: it needs `trace` with one, got 'DejaVu Sans' and"):
            check_font("DejaVu Sans", "trace", picture)
    with pytest.raises(ValueError, match="`font` must be .*, got 'nowhere'"):
        check_font("nowhere", "trace", "a.gif")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("你", r"^a.gif: no font of this system has U\+4F60; they.*: install one \(apt-get install fonts-noto-cjk"),
        ("🎉", r"U\+1F389; they are spelt by their code points: install one, or name one with `font`$"),
        ("今天气很好我们去公", r"U\+4ECA .* and 1 more; they .*fonts-noto-cjk"),
    ],
)
def test_one_warning_says_what_to_install(monkeypatch, text, message):
    install(monkeypatch)
    fonts = Fonts()
    fonts.spell(text * 3)
    with pytest.warns(UserWarning, match=message) as caught:
        fonts.warn("a.gif")
    assert len(caught) == 1


def test_no_font_missed_no_warning(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fonts = Fonts()
        fonts.spell("abc")
        fonts.warn("a.gif")


# ---- plots


def title_of(text, path):
    """A picture of nothing but a title."""
    figure, (axes,) = panels(size=(3, 1))
    axes.axis("off")
    axes.set_title(text)
    save_figure(figure, path)
    with Image.open(path) as picture:
        return cropped(picture)


def test_plots_draw_what_dejavu_lacks(tmp_path, monkeypatch):
    path = make_font(tmp_path / "a.ttf", "Chinese", "你好")
    install(monkeypatch, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        you, good = (title_of(character, tmp_path / "a.png") for character in "你好")
    assert you is not None and good[0][0] == you[0][0] and good[0][1] > you[0][1]  # bars of their own heights


def test_plots_spell_what_no_font_has(tmp_path, monkeypatch):
    """Titles, legends and labels of ticks; nothing is an empty box, and matplotlib has nothing to warn of."""
    install(monkeypatch)
    figure, (axes,) = panels()
    axes.barh(["甲", "b"], [1, 2], label="你")
    axes.set(title="a\n你", xlabel="loss")
    axes.legend()
    with pytest.warns(UserWarning) as caught:
        save_figure(figure, tmp_path / "a.png")
    assert [str(item.message).partition(";")[0] for item in caught] == [
        f"{tmp_path / 'a.png'}: no font of this system has U+4F60 U+7532"
    ]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["⟨U+7532⟩", "b"]
    assert axes.get_title() == "a\n⟨U+4F60⟩" and axes.get_legend().get_texts()[0].get_text() == "⟨U+4F60⟩"


# ---- a real font


@pytest.mark.slow
def test_plots_draw_chinese(tmp_path, chinese_face):
    """Two characters look differently, and neither looks like the box that stands for what a font lacks."""
    figure, (axes,) = panels(size=(3, 1))
    axes.axis("off")
    axes.set_title("你")
    with pytest.warns(UserWarning, match="missing from font"):
        figure.savefig(tmp_path / "box.png", dpi=120)
    with Image.open(tmp_path / "box.png") as picture:
        box = cropped(picture)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shapes = [title_of(character, tmp_path / "a.png") for character in "你好"]
    assert None not in [box, *shapes] and len({box, *shapes}) == 3
