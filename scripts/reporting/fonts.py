"""Which installed font has a character, and what stands for one that none has."""

import contextlib
import difflib
import unicodedata
import warnings
from functools import cache
from pathlib import Path
from typing import NamedTuple

PREFERRED = (  # for Chinese, before what else is installed
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "Source Han Sans CN",
    "PingFang SC",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
    "SimHei",
)
PACKAGES = "apt-get install fonts-noto-cjk, or the smaller fonts-wqy-microhei"
EAST_ASIAN = ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "FULLWIDTH")  # Unicode's names
SHOWN = 8
FONT_HELP = "Of a .gif: a font file or an installed family. Default: what is installed."


class Face(NamedTuple):
    """
    A typeface.

    Attributes:
        family (`str`): Its name.
        path (`str`): Its file.
        index (`int`): Its place in a file of several.
    """

    family: str
    path: str
    index: int


class Fonts:
    """
    The first face for each character: the one asked for, DejaVu Sans, which comes with matplotlib, then the system's,
    those for Chinese first. A character that none has is spelt `⟨U+4F60⟩`, never drawn as an empty box.

    Args:
        font (`str`, *optional*): A font file, or the name of an installed family.

    Attributes:
        missing (`set[str]`): Characters that were spelt for want of a font.

    Raises:
        `ValueError`: for a `font` that there is not.
    """

    def __init__(self, font: str | None = None):
        own = [] if font is None else [find_face(font)]
        self.first = [*own, _dejavu()]
        self.system: list[Face] | None = None  # looked for when it is needed
        self.faces: dict[str, Face | None] = {}
        self.missing: set[str] = set()

    def face(self, character: str) -> Face | None:
        """The face to draw a character with."""
        if character not in self.faces:
            self.faces[character] = self._search(character) if character.isprintable() else None
        return self.faces[character]

    def spell(self, text: str) -> str:
        """The text in characters that can be drawn."""
        return "".join(character if self.face(character) else f"⟨U+{ord(character):04X}⟩" for character in text)

    def warn(self, what: str) -> None:
        """One warning about all that was spelt, if anything was."""
        if not self.missing:
            return
        codes = [f"U+{ord(character):04X}" for character in sorted(self.missing)]
        more = f" and {len(codes) - SHOWN} more" if len(codes) > SHOWN else ""
        names = [unicodedata.name(character, "") for character in self.missing]
        cure = f"install one ({PACKAGES})" if any(name.startswith(EAST_ASIAN) for name in names) else "install one"
        message = f"{what}: no font of this system has {' '.join(codes[:SHOWN])}{more}; they are spelt by their code"
        warnings.warn(f"{message} points: {cure}, or name one with `font`", stacklevel=3)

    def _search(self, character: str) -> Face | None:
        if found := next((face for face in self.first if ord(character) in characters(face)), None):
            return found
        if self.system is None:
            self.system = system_faces()
        found = next((face for face in self.system if ord(character) in characters(face)), None)
        self.missing |= set() if found else {character}
        return found


def find_face(font: str) -> Face:
    """
    A face by its file or family.

    Raises:
        `ValueError`: for a file that is no font, or none of outlines in one colour, and for a family not installed.
    """
    from matplotlib import font_manager

    if Path(font).is_file():
        with contextlib.suppress(OSError, RuntimeError):
            font_manager.fontManager.addfont(font)
        entries = [entry for entry in font_manager.fontManager.ttflist if Path(entry.fname) == Path(font)]
        face = _face(entries[0]) if entries else None
        if face is None or not characters(face):
            raise ValueError(f"`font` must be a font of outlines in one colour, got the file {font!r}")
        return face
    families = {face.family.lower(): face for face in reversed(system_faces())}
    families["dejavu sans"] = _dejavu()
    if font.lower() not in families:
        near = difflib.get_close_matches(font.lower(), families, n=1)
        hint = f" (did you mean {families[near[0]].family!r}?)" if near else ""
        raise ValueError(f"`font` must be a font file or the name of an installed family, got {font!r}{hint}")
    return families[font.lower()]


def check_font(font: str | None, name: str, picture: str | None) -> None:
    """
    Refuses a font before anything is computed.

    Args:
        font (`str`, *optional*): As for [`find_face`].
        name, picture (`str`): The argument that names the file to be drawn, and its value.

    Raises:
        `ValueError`: as [`find_face`], and if no .gif is to be drawn.
    """
    if font is None:
        return
    if picture is None or Path(picture).suffix != ".gif":
        raise ValueError(f"`font` draws a .gif: it needs `{name}` with one, got {font!r} and {picture!r}")
    find_face(font)


def system_faces() -> list[Face]:
    """
    The system's upright faces as they are now: those for Chinese first, then normal weights; neither matplotlib's
    own symbols nor fonts of mere boxes. What was installed since matplotlib last looked is among them.
    """
    import matplotlib
    from matplotlib import font_manager

    known = {entry.fname for entry in font_manager.fontManager.ttflist}
    for path in font_manager.findSystemFonts():
        if path not in known:
            with contextlib.suppress(OSError, RuntimeError):  # a broken one, or of bitmaps
                font_manager.fontManager.addfont(path)

    def usable(entry):
        own = Path(entry.fname).is_relative_to(matplotlib.get_data_path())
        boxes = "lastresort" in entry.name.replace(" ", "").lower()
        return not own and not boxes and entry.style == "normal" and Path(entry.fname).exists()

    def order(entry):
        rank = PREFERRED.index(entry.name) if entry.name in PREFERRED else len(PREFERRED)
        return rank, abs(int(entry.weight) - 400), entry.name, entry.fname

    return [_face(entry) for entry in sorted(filter(usable, font_manager.fontManager.ttflist), key=order)]


@cache
def characters(face: Face) -> frozenset[int]:
    """Code points that a face can draw in one colour and any size: none of bitmap fonts and of coloured emoji."""
    from matplotlib.ft2font import FaceFlags, FT2Font

    opened = FT2Font(face.path, **({"face_index": face.index} if face.index else {}))
    if FaceFlags.SCALABLE not in opened.face_flags or FaceFlags.COLOR in opened.face_flags:
        return frozenset()
    return frozenset(opened.get_charmap())


def use_installed_fonts(figure, what: str) -> None:
    """
    Gives each text of a matplotlib figure the fonts that it needs, right before the figure is written.

    Args:
        figure (`matplotlib.figure.Figure`): With all its texts.
        what (`str`): The picture, for the warning about characters that no font has.
    """
    from matplotlib.text import Text

    fonts = Fonts()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        labels = [label.get_text() for label in axis.get_ticklabels()]
        if (spelt := [_spell_lines(fonts, label) for label in labels]) != labels:
            axis.set_ticks(axis.get_majorticklocs(), labels=spelt)
    for text in figure.findobj(Text):
        text.set_text(_spell_lines(fonts, text.get_text()))
        faces = [fonts.face(character) for character in text.get_text().replace("\n", "")]
        if others := dict.fromkeys(face.family for face in faces if face != fonts.first[0]):
            text.set_fontfamily([*text.get_fontfamily(), *others])
    fonts.warn(what)


def _spell_lines(fonts: Fonts, text: str) -> str:
    return "\n".join(fonts.spell(line) for line in text.split("\n"))


def _dejavu() -> Face:
    from matplotlib import font_manager

    return Face("DejaVu Sans", str(font_manager.findfont("DejaVu Sans")), 0)


def _face(entry) -> Face:
    return Face(entry.name, entry.fname, getattr(entry, "index", 0))
