"""Figures that need no window, and files of them that are whole."""

from pathlib import Path

from nanollada.scripts.reporting.fonts import use_installed_fonts
from nanollada.trainers.records import written_beside


def panels(rows: int = 1, columns: int = 1, size: tuple[float, float] = (7, 4), **options):
    """
    A figure and its axes, row by row.

    Args:
        rows, columns (`int`, default to 1): Of the panels.
        size (`tuple[float, float]`, defaults to (7, 4)): Width and height of the figure in inches.
        options: As `matplotlib.figure.Figure.subplots` takes them.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def save_figure(figure, path: str | Path, dpi: int = 120) -> None:
    """
    Writes a PNG file beside and renames it: a killed run leaves no half picture. Names and titles in any script are
    drawn with the fonts that are installed, as [`use_installed_fonts`] does.
    """
    use_installed_fonts(figure, str(path))
    with written_beside(path) as beside:
        figure.savefig(beside, dpi=dpi, format="png")
