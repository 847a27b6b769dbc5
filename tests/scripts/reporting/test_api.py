"""The API page is what its command writes, and names what there is."""

import importlib

from nanollada.scripts import api_page as program
from nanollada.scripts.reporting.api import ROOT, api_page, first_sentence


def test_the_page_is_up_to_date():
    page = (ROOT / "scripts" / "API.md").read_text(encoding="utf-8")
    assert page == api_page(), "run `python scripts/api_page.py`"


def test_the_command_writes_the_page(tmp_path):
    program.main(["--output", str(tmp_path / "API.md")])
    assert (tmp_path / "API.md").read_text(encoding="utf-8") == api_page()


def test_its_names_can_be_imported():
    """A sample: the first name of every room's modules."""
    modules = [part.splitlines() for part in api_page().split("\n## ")[1:]]
    for lines in modules[::6]:
        module = importlib.import_module("nanollada." + lines[0].strip("`"))
        assert hasattr(module, lines[2].split("`")[1].split("(")[0]), lines[:3]


def test_first_sentences():
    assert first_sentence("Makes a row.\n\nArgs: x") == "Makes a row."
    assert first_sentence("Of e.g. two\nrows. They are long.") == "Of e.g. two rows."
    assert first_sentence(None) == ""
