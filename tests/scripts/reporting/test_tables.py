"""Tables and their cells: what a reader sees, in a terminal and in Markdown."""

import importlib.util
import io

import pytest
from rich.console import Console
from rich.table import Column

from nanollada.scripts.reporting.tables import (
    as_markdown,
    markdown,
    percent,
    ranged,
    require_rich,
    rich_table,
    with_error,
)


def shown(table, width=60):
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_cells_are_shown_as_they_are():
    table = rich_table("runs", ["model", "s"], [["[red]a[/red]", "1.5"], ["b", "10.25"]])
    assert "[red]a[/red]" in shown(table) and "runs" in shown(table)
    assert [column.justify for column in table.columns] == ["left", "right"]
    assert as_markdown(table) == "| model | s |\n| --- | --- |\n| [red]a[/red] | 1.5 |\n| b | 10.25 |\n"


def test_a_column_may_be_of_the_callers_own():
    table = rich_table("", [Column("text", no_wrap=True), "n"], [["a b " * 30, "1"]], left=0, show_lines=True)
    assert table.columns[0].no_wrap and table.columns[1].justify == "right" and table.show_lines
    assert shown(table).count("a b") < 30


def test_markdown_has_a_line_a_row():
    assert markdown(["a", "b"], iter([("1", "2")])) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"
    assert markdown(["a"], []) == "| a |\n| --- |\n"


def test_figures():
    assert with_error(None) == "–" and with_error(1.23456) == "1.235"
    assert with_error(1.2, 0.0, digits=2, bound=True) == "≤ 1.20 ± 0.00"
    assert percent(0.715, 0.0319) == "71.5 % ± 3.2" and percent(1) == "100.0 %"
    values = {"median": 2.0, "low": 1.5, "high": 1234.5}
    assert ranged(values) == "2.00 [1.50, 1234.50]" and ranged(values, "{:.2g}") == "2 [1.5, 1.2e+03]"
    assert ranged(None) == ""


def test_a_missing_package_is_named(monkeypatch):
    require_rich("a table")
    monkeypatch.setattr("nanollada.scripts.reporting.tables.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"a table needs the package rich \(pip install 'nanollada\[demo\]'\)"):
        require_rich("a table")
    assert importlib.util.find_spec("rich")
