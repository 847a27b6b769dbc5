"""An adapter's folder on the Hub, used by who has transformers and PEFT alone; and a merged adapter's."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_hub import FakeHub
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from nanollada.configuration_nanollada import NanoLLaDAConfig
from nanollada.hub_upload import upload as upload_module
from nanollada.hub_upload import verify as verify_module
from nanollada.hub_upload.evaluation_file import VERSION, check_model, model_digests
from nanollada.hub_upload.export import export
from nanollada.hub_upload.recompute import base_folder
from nanollada.hub_upload.upload import upload
from nanollada.hub_upload.verify import VerificationError, check_files, verify
from nanollada.modeling_nanollada import NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM
from nanollada.scripts.decoding.checkpoint import load_checkpoint
from nanollada.trainers.weights import adapters

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CLASSES = {"ar": NanoLLaDAForCausalLM, "diffusion": NanoLLaDAForMaskedLM}
FOUND = {"task": "held_out", "data": "held-out", "metric": "bits_per_byte", "value": 2.5, "standard_error": 0.1}
BASE = "someone/base"


@pytest.fixture(scope="module")
def runs(tokenizer, tmp_path_factory) -> Path:
    """`ar` and `diffusion` (tied, in blocks), and adapters of them, with records: `ar-lora`, `diffusion-lora`."""
    root = tmp_path_factory.mktemp("runs")
    for name, model_class in CLASSES.items():
        torch.manual_seed(0)
        options = {"tie_word_embeddings": name != "ar", "block_length": None if name == "ar" else 8}
        config = NanoLLaDAConfig(vocab_size=len(tokenizer), initializer_range=0.2, **SHAPE, **options)
        base, folder = root / name, root / f"{name}-lora"
        model_class(config).save_pretrained(base)
        settings = LoraConfig(r=4, init_lora_weights=False)
        model = adapters.adapted(model_class.from_pretrained(base), settings, 1)
        model.save_pretrained(folder)
        model.generation_config.max_new_tokens = 6
        model.generation_config.save_pretrained(folder)
        for place in (base, folder):
            tokenizer.save_pretrained(place)
        run = {"init": str(base), "model_class": model_class.__name__, "adapter": adapters.describe(model)}
        run |= {"data": {"format": "preference"}, "objective": {"name": "DPO", "loss_type": ["sigmoid", "sft"]}}
        (folder / "run.json").write_text(json.dumps(run))
        results = [{**FOUND, "bound": name != "ar"}]
        evaluation = {"version": VERSION, **model_digests(folder), "results": results}
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return root


@pytest.fixture(scope="module")
def exports(runs, tmp_path_factory) -> dict[str, Path]:
    root, options = tmp_path_factory.mktemp("exports"), {"license": "mit", "language": "en", "base_model": BASE}
    return {name: export(runs / f"{name}-lora", root / f"{name}-lora", **options) for name in CLASSES}


@pytest.fixture
def exported(exports, tmp_path) -> Path:
    """A copy of the diffusion model's, to be broken."""
    return Path(shutil.copytree(exports["diffusion"], tmp_path / "broken"))


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(4, 20)[None]).logits


# ---- an adapter


@pytest.mark.parametrize("name", [pytest.param("ar", marks=pytest.mark.slow), "diffusion"])
def test_an_adapter_s_repository(name, runs, exports):
    """The adapter's own bytes, its model's name on the Hub, and no model; the clean process computes the same."""
    folder, source = exports[name], runs / f"{name}-lora"
    there = {path.name for path in folder.iterdir()}
    assert {"README.md", "generation_config.json", "tokenizer.json", "golden.json", "recompute.py"} <= there
    assert not {"config.json", "model.safetensors", "modeling_nanollada.py"} & there
    weights = "adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (source / weights).read_bytes()
    given, sent = (json.loads((place / "adapter_config.json").read_text()) for place in (source, folder))
    assert sent == {**given, "base_model_name_or_path": BASE, "revision": None}
    text = " ".join(path.read_text() for path in folder.iterdir() if path.suffix in (".md", ".json"))
    assert str(runs) not in text
    base = json.loads((folder / "evaluation.json").read_text())["base"]
    assert base == {**model_digests(source)["base"], "name": BASE}
    report = verify(folder, base_model=runs / name)
    assert report["auto_classes"] == ["PeftModel", "AutoPeftModelForCausalLM"] and report["not_checked"] == []
    assert report["class"] == CLASSES[name].__name__ and report["max_logit_difference"] == 0
    assert all(report[key][0] == report[key][1] > 0 for key in ("generated_tokens", "golden_tokens"))
    model, _ = load_checkpoint(str(source), device="cpu")
    assert report["parameters"] == model.num_parameters()


@pytest.mark.parametrize("name", CLASSES)
def test_its_card(name, exports):
    from huggingface_hub import ModelCard

    card = ModelCard.load(exports[name] / "README.md")
    data, text = card.data, card.text
    assert (data.library_name, data.base_model, data.base_model_relation) == ("peft", BASE, "adapter")
    assert {"nanollada", "custom_code", "lora"} <= set(data.tags)
    assert "is an adapter (LORA) of [someone/base](https://huggingface.co/someone/base).\nTogether they are a" in text
    assert "- Adapter: LORA, 1,024 parameters of these, on q_proj, v_proj\n" in text
    assert "| Kind | preference learning, `NanoLLaDA" in text and "| DPO (loss_type = sigmoid, sft) |" in text
    assert "LORA (r = 4; target_modules = q_proj, v_proj; " in text.replace("task_type = CAUSAL_LM; ", "")
    assert 'base_model = "someone/base"\n' in text and "revision" not in text


@pytest.mark.slow
def test_a_name_on_the_hub_keeps_its_revision(runs, tmp_path, monkeypatch):
    """A run on a downloaded model needs no `base_model`; the revision travels to file and snippet."""
    folder = Path(shutil.copytree(runs / "ar-lora", tmp_path / "lora"))
    (folder / "evaluation.json").unlink()
    home = tmp_path / "cache" / "models--someone--base"
    (home / "refs").mkdir(parents=True)
    (home / "snapshots").mkdir()
    (home / "snapshots" / ("1" * 40)).symlink_to(runs / "ar")
    (home / "refs" / "trial").write_text("1" * 40)
    config = {**json.loads((folder / "adapter_config.json").read_text()), "base_model_name_or_path": BASE}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "revision": "trial"}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert base_folder(folder) == (runs / "ar").resolve()
    output = export(folder, tmp_path / "out")
    assert json.loads((output / "adapter_config.json").read_text())["revision"] == "trial"
    assert (
        'from_pretrained(base_model, revision="trial", trust_remote_code=True)' in (output / "README.md").read_text()
    )
    assert verify(output)["ok"]  # by itself: the model lies in the cache of downloads


def test_a_base_that_is_not_there_or_has_no_name(runs, exports, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="`base_model` must be the Hub name of the model under the adapter, got none"):
        export(runs / "ar-lora", tmp_path / "out")
    with pytest.raises(ValueError, match="`base_model` must be"):
        export(runs / "ar-lora", tmp_path / "out", base_model=str(runs / "ar"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(
        VerificationError, match="`base_model` must be the folder of someone/base, which ar-lora adapts"
    ):
        verify(exports["ar"])
    with pytest.raises(VerificationError, match="`base_model` must be a folder with config.json, got"):
        verify(exports["ar"], base_model=tmp_path)
    with pytest.raises(VerificationError, match="`base_model` is for an adapter, got .* for ar"):
        verify(export(runs / "ar", tmp_path / "ar"), base_model=runs / "ar")


@pytest.mark.slow
def test_another_base_is_noticed(exported, runs, tmp_path):
    """The same shape, other weights: the golden tokens are of the two together."""
    other = Path(shutil.copytree(runs / "diffusion", tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    moved = {name: value + torch.randn(value.shape, generator=generator) * 0.1 for name, value in tensors.items()}
    save_file(moved, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match="golden: .*the recomputation must give the golden tokens"):
        verify(exported, base_model=other)


def test_a_broken_adapter_is_named(exported, runs):
    path = exported / "adapter_model.safetensors"
    whole = load_file(path)
    first = sorted(whole)[0]
    (exported / "golden.json").unlink()
    (exported / "evaluation.json").unlink()
    card = (exported / "README.md").read_text()
    start, end = card.index("model-index:"), card.index("---\n\n#")
    section = card[card.index("## Evaluation") : card.index("## Limits")]
    (exported / "README.md").write_text((card[:start] + card[end:]).replace(section, ""))
    save_file({name: value for name, value in whole.items() if name != first}, path, metadata={"format": "pt"})
    with pytest.raises(VerificationError, match="must hold the adapter's tensors"):
        verify(exported, base_model=runs / "diffusion")
    config = json.loads((exported / "adapter_config.json").read_text())
    (exported / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/a/b"}))
    with pytest.raises(VerificationError, match="adapter_config.json must name a model on the Hub, got '/a/b'"):
        check_files(exported)


def test_its_numbers_are_of_both(exports, runs, exported):
    """Another adapter, or one on another model, has other numbers."""
    evaluation = json.loads((exported / "evaluation.json").read_text())
    for change, match in (
        ({"weights_sha256": "0"}, "must be of the model in broken, got `weights_sha256` 0"),
        ({"base": {**evaluation["base"], "name": "a/b"}}, "must be of the adapter on someone/base, got"),
        ({"base": None}, "must be of the adapter on someone/base, got `base` None"),
    ):
        with pytest.raises(ValueError, match=match):
            check_model({**evaluation, **change}, exported)
    source = runs / "diffusion-lora"
    measured = json.loads((source / "evaluation.json").read_text())
    check_model(measured, source)
    odd = {**measured, "base": {**measured["base"], "weights_sha256": "0"}}
    with pytest.raises(ValueError, match="must be of the model that diffusion-lora adapts, got another `weights_sha"):
        check_model(odd, source)


@pytest.mark.slow
def test_dry_runs(exports, runs, tmp_path, capsys):
    adapters.merge_adapter(runs / "ar-lora", tmp_path / "merged")
    assert upload(export(tmp_path / "merged", tmp_path / "out", base_model=BASE), "me/merged") is None
    assert upload_module.main([str(exports["ar"]), "me/lora", "--base_model", str(runs / "ar")]) == 0
    printed = capsys.readouterr().out
    assert "adapter_model.safetensors" in printed and "recompute.py" in printed and "for me/lora" in printed


USER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("verify", sys.argv[1])
verify = importlib.util.module_from_spec(spec)
spec.loader.exec_module(verify)
verify.block_nanollada()

import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM

namespace = {}
for snippet in verify.SNIPPET.findall(str(ModelCard.load("someone/lora"))):  # as they stand
    exec(snippet, namespace)
other = AutoPeftModelForCausalLM.from_pretrained("someone/lora", trust_remote_code=True)
with torch.no_grad():
    models = [namespace["model"], other.eval()]
    torch.save([model(input_ids=torch.arange(4, 20)[None]).logits for model in models], "logits.pt")
torch.save(namespace["model"].generation_config.max_new_tokens, "new.pt")
"""


def test_round_trip_through_a_hub(exported, runs, tmp_path, monkeypatch):
    """Model and adapter are loaded by their names, as the card says, where there is no nanollada."""
    with FakeHub() as hub:
        for name in ("base", "lora"):
            hub.create({"name": name})
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        online = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        hub.files(BASE).update({path.name: path.read_bytes() for path in (runs / "diffusion").iterdir()})
        card = exported / "README.md"
        card.write_text(verify_module.REPO_ID.sub('repo_id = "someone/lora"', card.read_text()))
        hub.files("someone/lora").update({path.name: path.read_bytes() for path in exported.iterdir()})
        command = [sys.executable, "-I", "-c", USER, verify_module.__file__]
        environment = {**verify_module.clean_environment(tmp_path), **online}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr[-3000:]
    expected = logits_of(load_checkpoint(str(runs / "diffusion-lora"), device="cpu")[0])
    for logits in torch.load(tmp_path / "logits.pt", weights_only=True):
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
    assert torch.load(tmp_path / "new.pt", weights_only=True) == 6


# ---- a merged one


def test_a_merged_adapter_s_repository(runs, tmp_path, capsys):
    """A whole model, whose card says what it comes from and which adapter is in it."""
    from huggingface_hub import ModelCard

    merged = tmp_path / "merged"
    adapters.merge_adapter(runs / "ar-lora", merged)
    export(merged, tmp_path / "unnamed")
    assert "leaves out base_model: --base_model is not given" in capsys.readouterr().err
    output = export(merged, tmp_path / "out", base_model=BASE)
    assert "base_model" not in capsys.readouterr().err
    card = ModelCard.load(output / "README.md")
    data, text = card.data, card.text
    assert (data.library_name, data.base_model, data.base_model_relation) == ("transformers", BASE, "finetune")
    assert "| Adapter | LORA (r = 4; target_modules = q_proj, v_proj" in text.replace("task_type = CAUSAL_LM; ", "")
    assert str(tmp_path) not in text + (output / "run.json").read_text()
    check_files(output)
    both = (load_checkpoint(str(place), device="cpu")[0] for place in (runs / "ar-lora", output))
    first, second = map(logits_of, both)
    assert (first - second)[first > -1e4].abs().max() <= 1e-5
