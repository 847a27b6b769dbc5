"""What the programs do is one import and one call, as in a notebook: with the names that the command line has."""

import pytest
import torch

from nanollada.modeling_nanollada import NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM
from nanollada.scripts.decoding.comparison import CompareArguments, compare, comparison_table
from nanollada.scripts.decoding.demo_page import DemoArguments, open_page
from nanollada.scripts.decoding.prompting import GenerateArguments, run
from nanollada.scripts.decoding.settings import DecodingArguments
from nanollada.trainers.models import config_for
from nanollada.trainers.records import read_json


@pytest.fixture(scope="module")
def pair(tokenizer, tmp_path_factory):
    """Folders of two random models."""
    folder = tmp_path_factory.mktemp("pair")
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    for name, model_class in (("ar", NanoLLaDAForCausalLM), ("diffusion", NanoLLaDAForMaskedLM)):
        torch.manual_seed(0)
        model_class(config_for(tokenizer, initializer_range=0.6, **shape)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("ar", "diffusion")}


def test_generate(pair, tmp_path, capsys):
    args = GenerateArguments(checkpoint=pair["diffusion"], prompt="The cat", trace=str(tmp_path / "out.html"))
    written = run(args, DecodingArguments(max_new_tokens=8, steps=2))
    assert written.tokens == 8 and written.tokens_per_forward == 4.0 and written.text in capsys.readouterr().out
    assert "<title>The cat</title>" in (tmp_path / "out.html").read_text("utf-8")
    assert run(GenerateArguments(checkpoint=pair["ar"], prompt="The cat")).tokens == 128  # decoding need not be given


def test_a_chat(pair, monkeypatch):
    lines = iter(["Hello", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    history = run(GenerateArguments(checkpoint=pair["ar"]), DecodingArguments(max_new_tokens=2))
    assert [message["role"] for message in history] == ["user", "assistant"]


def test_compare(pair, tmp_path):
    args = CompareArguments(**pair, prompts=["The cat"], repeats=1, output=str(tmp_path / "out.json"))
    records = compare(args, DecodingArguments(max_new_tokens=4))
    assert [record["model"] for record in records] == ["ar", "diffusion"]
    assert read_json(tmp_path / "out.json")["results"] == records and comparison_table(records).row_count == 2


def test_demo(pair):
    pytest.importorskip("gradio")
    page = open_page(DemoArguments(diffusion=pair["diffusion"]))
    assert type(page).__name__ == "Blocks"


def test_an_unknown_option_is_named():
    with pytest.raises(TypeError, match="step_count"):
        DecodingArguments(step_count=4)
