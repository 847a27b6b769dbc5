"""Tables for a terminal and as Markdown, and the figures in their cells."""

from collections.abc import Iterable, Sequence
from importlib.util import find_spec

from nanollada.trainers.scoring.estimates import wilson

NONE = "–"


def require_rich(what: str) -> None:
    """Raises a ValueError that says how to get rich, if it is missing."""
    if find_spec("rich") is None:
        raise ValueError(f"{what} needs the package rich (pip install 'nanollada[demo]'), which is not installed")


def rich_table(title: str, header: Sequence, rows: Iterable[Sequence[str]], left: int = 1, **options):
    """
    A `rich.table.Table` whose cells are shown as they are: nothing in them is markup.

    Args:
        title (`str`): Over the table.
        header (`Sequence[str | rich.table.Column]`): The columns; a name makes one that wraps.
        rows (`Iterable[Sequence[str]]`): A text per column.
        left (`int`, defaults to 1): So many columns by name stand to the left, the others, numbers, to the right.
        options: As `rich.table.Table` takes them.
    """
    from rich.table import Column, Table
    from rich.text import Text

    columns = [
        Column(name, justify="left" if place < left else "right", overflow="fold") if isinstance(name, str) else name
        for place, name in enumerate(header)
    ]
    table = Table(*columns, title=title, **options)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, with its last line's end."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def as_markdown(table) -> str:
    """A `rich.table.Table` in Markdown."""
    rows = zip(*([str(cell) for cell in column.cells] for column in table.columns), strict=True)
    return markdown([str(column.header) for column in table.columns], rows)


def with_error(value: float | None, error: float | None = None, digits: int = 3, bound: bool = False) -> str:
    """`≤ 1.234 ± 0.005`: a figure, before it whether it is an upper bound, behind it its standard error."""
    if value is None:
        return NONE
    return f"{'≤ ' if bound else ''}{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def percent(share: float, error: float | None = None, digits: int = 1) -> str:
    """`71.5 % ± 3.2`: a share with its standard error."""
    return f"{100 * share:.{digits}f} %" + ("" if error is None else f" ± {100 * error:.{digits}f}")


def share_with_error(result: dict, digits: int = 1) -> str:
    """
    A measured share, `71.5 % ± 3.2`; where all or none hit, its error would be 0, and Wilson's interval stands there,
    `0.0 % [0.0, 1.9]`.

    Args:
        result (`dict`): `value`, `standard_error` and `rows`.
        digits (`int`, defaults to 1): Behind the point.
    """
    share = result["value"]
    if share not in (0, 1) or not result.get("rows"):
        return percent(share, result["standard_error"], digits)
    low, high = (f"{100 * end:.{digits}f}" for end in wilson(share, result["rows"]))
    return f"{percent(share, digits=digits)} [{low}, {high}]"


def ranged(values: dict | None, form: str = "{:.2f}") -> str:
    """`median [low, high]` of a measurement's repeats; empty without one."""
    if not values:
        return ""
    median, low, high = (form.format(values[name]) for name in ("median", "low", "high"))
    return f"{median} [{low}, {high}]"
