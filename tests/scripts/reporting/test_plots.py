"""Figures: their panels, and files that a killed run leaves whole."""

import pytest
from PIL import Image

from nanollada.scripts.reporting.plots import panels, save_figure


def test_panels_are_a_list_whatever_their_number(tmp_path):
    figure, axes = panels(2, 2, size=(4, 2), gridspec_kw={"height_ratios": [1, 2]})
    assert len(axes) == 4 and len(panels()[1]) == 1
    axes[3].plot([1, 2], [3, 4])
    save_figure(figure, tmp_path / "a.png", dpi=50)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG" and picture.size == (200, 100)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_picture_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    figure, _ = panels()
    (tmp_path / "a.png").write_bytes(b"old")

    def broken(path, **options):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", broken)
    with pytest.raises(OSError, match="disk full"):
        save_figure(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == b"old"
