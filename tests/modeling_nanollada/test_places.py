"""A folder that is not there is named at once; what may be a model on the Hub is asked for once."""

import huggingface_hub
import pytest
from fake_hub import FakeHub
from huggingface_hub.errors import HfHubHTTPError

from nanollada.modeling_nanollada import NanoLLaDAForCausalLM
from nanollada.modeling_nanollada.loading_nanollada import check_place, load_model, load_tokenizer, usable_device

RULE = "`checkpoint` must be a folder or a model on the Hub, got"


@pytest.fixture
def questions(monkeypatch, tmp_path):
    """What is asked of a Hub that can't be reached, in a folder that holds `runs/`."""
    asked = []

    def model_info(name, **kwargs):
        asked.append(name)
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "model_info", model_info)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    return asked


@pytest.mark.parametrize(
    "name", ["runs/ar", "./ar", "../ar", "~/ar", "/nowhere/ar", "other/runs/ar", "other/ar/", "my ar"]
)
def test_a_path_is_not_asked_for(name, questions):
    with pytest.raises(ValueError, match=f"^{RULE} {name}: there is no such folder$"):
        check_place(name, "checkpoint")
    for load in (
        lambda: load_model(NanoLLaDAForCausalLM, name, "checkpoint"),
        lambda: load_tokenizer(name, "checkpoint"),
    ):
        with pytest.raises(ValueError, match=RULE):
            load()
    assert not questions


def test_a_file_and_an_empty_folder_are_not_asked_for(questions, tmp_path):
    (tmp_path / "rows.jsonl").touch()
    for load in (lambda path: load_model(NanoLLaDAForCausalLM, path, "checkpoint"), lambda path: load_tokenizer(path)):
        with pytest.raises(ValueError, match="must be a folder or .*, got .*rows.jsonl, which is a file"):
            load(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="`tokenizer_name_or_path` must be a folder with a tokenizer, got .*runs"):
        load_tokenizer(tmp_path / "runs")
    (tmp_path / "runs" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json of .*runs must be JSON"):
        load_tokenizer(tmp_path / "runs")
    assert not questions


@pytest.mark.parametrize("device", ["tpu9", "cuda:77", "meta:x"])
def test_a_device_that_is_not_there(device):
    with pytest.raises(ValueError, match=f"`device` must be one that torch has here, got '{device}'"):
        usable_device(device)
    assert usable_device("cpu").type == "cpu"


def test_a_name_is_asked_for_once(questions, tmp_path):
    check_place(tmp_path / "runs", "checkpoint")
    for name in ("owner/model", "gpt2"):
        with pytest.raises(ValueError, match=rf"{RULE} {name}: .*, and the Hub can't be reached \(no route\)"):
            check_place(name, "checkpoint")
    assert questions == ["owner/model", "gpt2"]


def test_what_is_cached_is_there(questions, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: f"/cache/{name}/{file}")
    check_place("owner/model", "checkpoint")
    assert not questions


def test_what_the_hub_answers(monkeypatch):
    from huggingface_hub import constants

    with FakeHub() as hub:
        hub.repos["someone/model"] = {"private": False, "branches": {"main": {"config.json": b"{}"}}}
        api = huggingface_hub.HfApi(endpoint=hub.url)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub, "model_info", api.model_info)
        check_place("someone/model", "checkpoint")
        with pytest.raises(ValueError, match=f"{RULE} someone/other: .*, and no such model that you may see"):
            check_place("someone/other", "checkpoint")


def test_a_hub_with_troubles_of_its_own_is_left_to_the_download(monkeypatch):
    def model_info(name, **kwargs):
        raise error

    error = HfHubHTTPError.__new__(HfHubHTTPError)
    monkeypatch.setattr(huggingface_hub, "model_info", model_info)
    check_place("owner/model", "checkpoint")


def test_a_folder_of_checkpoints_names_one(tmp_path):
    (tmp_path / "ar").mkdir()
    with pytest.raises(ValueError, match=f"`x` must be a folder with config.json, got {tmp_path}$"):
        load_model(NanoLLaDAForCausalLM, tmp_path, "x")
    (tmp_path / "ar" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"got {tmp_path}; one is {tmp_path / 'ar'}$"):
        load_model(NanoLLaDAForCausalLM, tmp_path, "x")
