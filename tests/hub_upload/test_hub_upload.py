"""Export, verification and upload, the last against a Hub on the loopback interface. The card: test_model_card.py."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_hub import FakeHub
from interpreters import INTERPRETERS
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, Qwen3Config, Qwen3ForCausalLM

import nanollada.hub_upload as hub_upload
from nanollada.configuration_nanollada import NanoLLaDAConfig
from nanollada.hub_upload import export as export_module
from nanollada.hub_upload import upload as upload_module
from nanollada.hub_upload import verify as verify_module
from nanollada.hub_upload.evaluation_file import VERSION, model_digests
from nanollada.hub_upload.export import export, main
from nanollada.hub_upload.upload import files_to_upload, upload
from nanollada.hub_upload.verify import VerificationError, check_files, verify
from nanollada.modeling_nanollada import NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
RUN = {"model_class": "NanoLLaDAForMaskedLM", "data": {"sources": ["/home/me/a.txt"], "format": "pretrain", "rows": 3}}
FOUND = {"task": "held_out", "data": "held-out", "metric": "bits_per_byte", "bound": True, "value": 2.5}
FOUND |= {"standard_error": 0.1}


def save(folder: Path, model_class, tokenizer, **shape) -> Path:
    torch.manual_seed(0)
    config = NanoLLaDAConfig(vocab_size=len(tokenizer), initializer_range=0.2, **SHAPE, **shape)
    model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write(folder: Path, **records) -> None:
    for name, record in records.items():
        (folder / f"{name}.json").write_text(json.dumps(record))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, tokenizer) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    ar = save(root / "ar", NanoLLaDAForCausalLM, tokenizer)
    diffusion = save(root / "diffusion", NanoLLaDAForMaskedLM, tokenizer)
    write(diffusion, run=RUN, evaluation={"version": VERSION, **model_digests(diffusion), "results": [FOUND]})
    write(diffusion, trainer_state={"global_step": 3})
    return {"ar": ar, "diffusion": diffusion}


@pytest.fixture(scope="module")
def exports(checkpoints, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    options = {"license": "apache-2.0", "language": ["en"]}
    return {name: export(folder, root / f"small-{name}", **options) for name, folder in checkpoints.items()}


@pytest.fixture
def exported(exports, tmp_path) -> Path:
    """A copy of the diffusion export, to be broken."""
    return Path(shutil.copytree(exports["diffusion"], tmp_path / "broken"))


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# ------------------------------------------------------------------------------------------------------------ export


@pytest.mark.parametrize("name", ["ar", "diffusion"])
def test_export_is_complete_and_equal(exports, checkpoints, name):
    folder = exports[name]
    check_files(folder)
    names = {path.name for path in folder.iterdir()}
    assert {"README.md", "tokenizer.json", "chat_template.jinja", "model.safetensors"} <= names
    assert {"verify.py", "recompute.py", "golden.json"} <= names
    assert not {"trainer_state.json", "training_args.bin"} & names
    if name == "diffusion":
        assert json.loads((folder / "run.json").read_text())["data"]["sources"] == ["a.txt"]
        evaluation = json.loads((folder / "evaluation.json").read_text())
        assert evaluation == {"version": VERSION, **model_digests(folder), "results": [FOUND]}
    ours = AutoModelForCausalLM.from_pretrained(checkpoints[name]).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (checkpoints[name], folder)]
    assert len({(tokenizer("The cat, 12").input_ids[0], tokenizer.chat_template) for tokenizer in tokenizers}) == 1
    assert sorted(path.name for path in folder.parent.iterdir()) == ["small-ar", "small-diffusion"]  # nothing partial


def test_dtype_and_generation_settings_survive(checkpoints, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoints["diffusion"], dtype=torch.bfloat16)
    model.generation_config.steps = 5
    model.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(checkpoints["diffusion"]).save_pretrained(tmp_path / "half")
    loaded = AutoModelForCausalLM.from_pretrained(export(tmp_path / "half", tmp_path / "out"))
    assert loaded.dtype == torch.bfloat16
    assert loaded.generation_config.steps == 5


def test_output_is_never_destroyed_by_accident(checkpoints, tmp_path):
    output = export(checkpoints["ar"], tmp_path / "out")
    with pytest.raises(ValueError, match="`output` must be new or empty"):
        export(checkpoints["ar"], output)
    (output / "old.txt").touch()
    before = sorted(output.iterdir())
    with pytest.raises(ValueError, match="`prompt` must be text"):
        export(checkpoints["ar"], output, overwrite=True, prompt="")
    assert sorted(output.iterdir()) == before
    export(checkpoints["ar"], output, overwrite=True)
    assert not (output / "old.txt").exists()
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").touch()
    with pytest.raises(ValueError, match="`output` must be an earlier export"):
        export(checkpoints["ar"], precious, overwrite=True)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(VerificationError, match="incomplete"):
        patch.setattr(export_module, "check_files", lambda folder: verify_module._require(False, "incomplete"))
        export(checkpoints["ar"], output, overwrite=True)
    check_files(output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "precious"]
    for inside in (checkpoints["ar"], checkpoints["ar"] / "hub", checkpoints["ar"].parent):
        with pytest.raises(ValueError, match="`output` must lie outside `checkpoint`"):
            export(checkpoints["ar"], inside, overwrite=True)


def test_broken_checkpoints_are_refused(checkpoints, tokenizer, char_tokenizer, tmp_path):
    def broken(name: str) -> Path:
        return Path(shutil.copytree(checkpoints["ar"], tmp_path / name))

    def refuse(folder: Path, match: str):
        with pytest.raises(ValueError, match=match):
            export(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refuse(tmp_path / "nowhere", "`checkpoint` must be a folder with config.json")
    Qwen3ForCausalLM(Qwen3Config(vocab_size=8, **SHAPE, num_key_value_heads=2)).save_pretrained(tmp_path / "qwen")
    refuse(tmp_path / "qwen", "`checkpoint` must hold a nanollada model, got the model type qwen3")
    backbone = broken("backbone")
    AutoModelForCausalLM.from_pretrained(backbone).model.save_pretrained(backbone)
    refuse(backbone, "`checkpoint` must hold exactly the tensors of .*missing: lm_head.weight")
    reshaped = broken("reshaped")
    edit(reshaped / "config.json", '"intermediate_size": 48', '"intermediate_size": 40')
    refuse(reshaped, "`checkpoint` must hold exactly the tensors of .*shape: .*gate_proj")
    other = broken("other")
    char_tokenizer.save_pretrained(other)
    refuse(other, r"tokenizer and model do not fit: `vocab_size` must be \d+ \(the tokenizer's length\)")
    renamed = broken("renamed")
    swapped = copy.deepcopy(tokenizer)
    swapped.eos_token = "<|im_start|>"
    swapped.save_pretrained(renamed)
    refuse(renamed, r"`eos_token_id` must be 1 \(the tokenizer's\), got 2")
    bare = broken("bare")
    (bare / "tokenizer_config.json").unlink()
    refuse(bare, "`checkpoint` must hold its tokenizer")
    nan = broken("nan")
    model = AutoModelForCausalLM.from_pretrained(nan)
    model.lm_head.weight.data[0, 0] = torch.nan
    model.save_pretrained(nan)
    refuse(nan, "`checkpoint` must hold finite weights, got NaN or infinity in lm_head.weight")


def test_export_command_says_what_is_missing(checkpoints, tmp_path, capsys):
    folder = Path(shutil.copytree(checkpoints["ar"], tmp_path / "checkpoint-9"))
    write(folder, trainer_state={"global_step": 9, "epoch": 0.5, "num_input_tokens_seen": 0})
    main([str(folder), str(tmp_path / "out"), "--license", "mit", "--language", "en", "zh", "--repo_id", "me/model"])
    printed = capsys.readouterr()
    assert "no run.json beside the weights" in printed.err
    assert "neither evaluation.json" in printed.err
    assert "--license" not in printed.err
    assert not {"run.json", "evaluation.json"} & {path.name for path in (tmp_path / "out").iterdir()}
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'repo_id = "me/model"' in card and "# model\n" in card and "license: mit" in card
    assert "| Length | 9 steps, 0.5 epochs |" in card
    assert "What it was trained on is not on record." in card and "No evaluation is on record." in card
    for absent in ("## Evaluation", "model-index", "Seed", "Tokens seen", "None"):
        assert absent not in card


# ------------------------------------------------------------------------------------------------------------ verify


def test_verify_loads_generates_and_compares(exports):
    report = verify(exports["ar"])
    assert report["ok"] and report["folder"] == "small-ar"
    assert report["class"] == "NanoLLaDAForCausalLM"
    assert report["auto_classes"] == ["AutoModel", "AutoModelForCausalLM"]
    assert report["max_logit_difference"] <= 1e-5
    assert (report["snippets"], report["generate_calls"]) == (2, 1)


def test_verify_sees_code_that_computes_something_else(exported):
    """A diffusion model whose shipped code attends causally loads and generates; without golden tokens and a card that
    says what it printed only the logits tell."""
    (exported / "golden.json").unlink()
    edit(exported / "README.md", "It printed:", "Perhaps:")
    edit(exported / "modeling_nanollada.py", "NanoLLaDAModel(config, is_causal=False)", "NanoLLaDAModel(config)")
    with pytest.raises(VerificationError, match="logits: the clean process must agree .* within 1e-05, got"):
        verify(exported)


def test_verify_command_reports_a_code_that_needs_nanollada(exported, capsys):
    edit(exported / "modeling_nanollada.py", "import torch\n", "import torch\nimport nanollada.modeling_nanollada\n")
    assert verify_module.main([str(exported)]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    report = json.loads(line)
    assert report["ok"] is False and "nanollada" in report["error"] and report["error"].startswith("models: ")


@pytest.mark.parametrize(
    ("file", "old", "new", "match"),
    [
        ("README.md", None, None, r"`folder` must hold README.md, .*, got none of \['README.md'\]"),
        ("model.safetensors", None, None, "`folder` must hold safetensors weights"),
        ("modeling_nanollada.py", None, None, "`auto_map` of config.json names modeling_nanollada, got no"),
        ("config.json", '"AutoModelForMaskedLM": ', '"AutoOther": ', "`auto_map` of config.json must be"),
        ("config.json", "ForMaskedLM", "ForQuestionAnswering", "`architectures` of config.json must be one of"),
    ],
)
def test_incomplete_folders_are_refused(exported, file, old, new, match):
    (exported / file).unlink() if old is None else edit(exported / file, old, new)
    for check in (check_files, verify, files_to_upload):
        with pytest.raises(VerificationError, match=match):
            check(exported)


def test_the_bridge_is_refused(exported):
    bridge = Path(hub_upload.__file__).parents[1] / "modeling_nanollada" / "configuration_nanollada.py"
    shutil.copy(bridge, exported)
    with pytest.raises(VerificationError, match="must be the configuration itself, got the bridge"):
        check_files(exported)


@pytest.mark.parametrize(
    ("check", "file", "old", "new", "match"),
    [
        ("card", "README.md", "library_name: transformers", "library_name: other", "`library_name` of README.md"),
        ("card", "README.md", "- custom_code\n", "", "`tags` of README.md must hold 'custom_code'"),
        ("card", "README.md", "      value: 2.5\n", "", "model_index"),
        ("card", "README.md", "## Limits", "[More Information Needed]", "README.md must be complete"),
        ("snippets", "README.md", "repo_id = ", "name = ", "must set `repo_id`"),
        ("snippets", "README.md", "max_new_tokens=32, ", "max_new_token=32, ", "max_new_token"),
        ("snippets", "README.md", "```python\n", "```py\n", "must set `repo_id`"),
        ("tokenizer", "tokenizer_config.json", '"<|im_end|>"', '"<|im_start|>"', "`eos_token_id` must be the"),
    ],
)  # fmt: skip
def test_checks_of_the_clean_process(exported, tmp_path, monkeypatch, check, file, old, new, match):
    """Run here, one by one: a process each would take too long."""
    clean = verify_module._CleanProcess(exported, tmp_path)
    clean.settings = AutoModelForCausalLM.from_pretrained(exported).config
    monkeypatch.setattr(GenerationMixin, "generate", GenerationMixin.generate)  # the check replaces it
    getattr(clean, check)()
    edit(exported / file, old, new)
    with pytest.raises(Exception, match=match):
        getattr(clean, check)()


def test_verify_wants_a_card_that_generates(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(GenerationMixin, "generate", GenerationMixin.generate)
    (exported / "README.md").write_text('```python\nrepo_id = "x"\n```\n')
    with pytest.raises(VerificationError, match="a python block of README.md must call `generate`"):
        verify_module._CleanProcess(exported, tmp_path).snippets()


def test_verify_sees_mask_tokens_in_the_output(exported, tmp_path, monkeypatch):
    clean = verify_module._CleanProcess(exported, tmp_path)
    clean.settings = AutoModelForCausalLM.from_pretrained(exported).config
    mask = clean.settings.mask_token_id
    monkeypatch.setattr(GenerationMixin, "generate", lambda model, *_, input_ids, **kwargs: input_ids * 0 + mask)
    with pytest.raises(VerificationError, match="`generate` must leave no mask or edit token, got"):
        clean.snippets()


def test_logits_must_be_equal_and_suppressed_alike(tmp_path):
    reference = torch.tensor([[0.0, -torch.inf, 1.0]])
    for logits, match in (
        (reference, None),
        (reference + 1e-6, None),
        (reference + 1e-4, "within 1e-05, got 0.0001"),
        (torch.tensor([[0.0, -3e38, 1.0]]), None),  # another floor
        (torch.tensor([[0.0, 2.0, 1.0]]), "suppress the same tokens"),
        (torch.tensor([[torch.nan, -torch.inf, 1.0]]), "suppress the same tokens, and never give NaN"),
        (torch.tensor([[torch.inf, -torch.inf, 1.0]]), "within 1e-05, got inf"),
        (reference[:, :2], "the shapes must agree"),
    ):
        torch.save(logits, tmp_path / "logits.pt")
        if match is None:
            assert verify_module._compare(tmp_path / "logits.pt", reference) <= 1e-5
            continue
        with pytest.raises(VerificationError, match=match):
            verify_module._compare(tmp_path / "logits.pt", reference)


def test_a_process_that_dies_is_an_error(tmp_path):
    with pytest.raises(VerificationError, match="must end with a report, got exit status -9 and:\nKilled"):
        verify_module._read_report(tmp_path, -9, "Killed\n")


# ------------------------------------------------------------------------------------------------------------ upload


def test_upload_refuses(exported, monkeypatch):
    monkeypatch.setattr(upload_module, "verify", lambda folder, **options: pytest.fail("too late"))
    for name, match in (("model", "`repo_id` must be 'user/name', got 'model'"), ("a/b/c", "namespace/repo_name")):
        with pytest.raises(ValueError, match=match):
            upload(exported, name)
    (exported / "training_args.bin").touch()
    with pytest.raises(
        ValueError, match="`folder` must be an export, not a training checkpoint, got training_args.bin"
    ):
        upload(exported, "me/model")


def test_dry_run_sends_nothing(exported, monkeypatch, capsys):
    monkeypatch.setattr(upload_module, "verify", lambda folder, **options: {})
    monkeypatch.setattr(upload_module, "_push", lambda *args: pytest.fail("pushed"))
    (exported / ".cache").mkdir()
    (exported / ".cache" / "x").touch()
    before = (exported / "README.md").read_text()
    assert upload_module.main([str(exported), "me/model", "--private"]) == 0
    printed = capsys.readouterr().out
    size = (exported / "model.safetensors").stat().st_size
    assert f"{size:,}  model.safetensors" in printed and ".cache" not in printed
    assert "for me/model, private" in printed and "Dry run" in printed
    assert (exported / "README.md").read_text() == before


LOADER = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("verify", sys.argv[1])
verify = importlib.util.module_from_spec(spec)
spec.loader.exec_module(verify)
verify.block_nanollada()

import torch
from huggingface_hub import ModelCard
from transformers import pipeline

card = ModelCard.load("someone/published")
namespace = {}
for snippet in verify.SNIPPET.findall(str(card)):  # as they stand: the card names the repository
    exec(snippet, namespace)
model, tokenizer = namespace["model"], namespace["tokenizer"]
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(4, 20)[None]).logits, "logits.pt")
generator = pipeline("text-generation", model="someone/published", trust_remote_code=True)
text = generator("The", max_new_tokens=4, return_full_text=False)[0]["generated_text"]
model.save_pretrained("again")
tokenizer.save_pretrained("again")
print(json.dumps({"module": type(model).__module__, "text": text, "output": namespace["output"].tolist()}))
"""


def in_process(python: str, arguments: list[str], folder: Path, **environment) -> str:
    done = subprocess.run(
        [python, *arguments],
        cwd=folder,
        env={**verify_module.clean_environment(folder), **environment},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("python", INTERPRETERS)
def test_round_trip_through_a_hub(exported, tmp_path, python, request):
    """Uploads by command, loads by name in a clean process that runs the card, saves there, and loads that."""
    python = sys.executable if python == "this" else request.getfixturevalue("oldest_python")
    (tmp_path / "nanollada").mkdir()  # also for an interpreter without it
    for name in ("configuration_nanollada", "modeling_nanollada", "hub_upload"):
        (tmp_path / "nanollada" / name).symlink_to(Path(hub_upload.__file__).parents[1] / name)
    with FakeHub() as hub:
        online = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": hub.token}
        hub.create({"name": "published"})
        hub.files("someone/published").update({"model-00001-of-00002.safetensors": b"old", "notes.md": b"mine"})
        command = [upload_module.__file__, str(exported), "someone/published", "--push", "--commit_message", "First"]
        printed = in_process(python, command, tmp_path, PYTHONPATH=str(tmp_path), **online)
        assert printed.splitlines()[-1].startswith(f"{hub.url}/someone/published/commit/")
        assert hub.messages == ["First"]
        sent = hub.files("someone/published")
        local = {path.name: path.read_bytes() for path in exported.iterdir()}
        assert sent == {**local, ".gitattributes": b"", "notes.md": b"mine"}  # stale weights are gone
        assert b'repo_id = "someone/published"' in sent["README.md"]
        assert b"url: https://huggingface.co/someone/published/blob/main/evaluation.json" in sent["README.md"]
        stranger = tmp_path / "stranger"
        stranger.mkdir()
        arguments = ["-I", "-c", LOADER, verify_module.__file__]
        report = json.loads(in_process(python, arguments, stranger, **online).splitlines()[-1])
        assert set(hub.cards) == {sent["README.md"].decode()}
        loaded = [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]
        assert any(path.endswith("/modeling_nanollada.py") for path in loaded)
        assert any(path.endswith("/model.safetensors") for path in loaded)
    assert report["module"].startswith("transformers_modules.someone.published")
    assert report["text"] and 3 not in report["output"][0]
    with torch.no_grad():
        ids = torch.arange(4, 20)[None]
        expected = AutoModelForCausalLM.from_pretrained(exported)(input_ids=ids).logits
        again = AutoModelForCausalLM.from_pretrained(stranger / "again")(input_ids=ids).logits
    got = torch.load(stranger / "logits.pt", weights_only=True)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-5)
    shutil.copy(exported / "README.md", stranger / "again")
    check_files(stranger / "again")


@pytest.mark.parametrize("options", [[], ["--push"]])
def test_a_number_without_a_source_is_not_uploaded(exported, tmp_path, options):
    """The Hub is not even asked."""
    edit(exported / "README.md", "      value: 2.5\n", "      value: 1.5\n")
    command = [sys.executable, upload_module.__file__, str(exported), "someone/published", *options]
    with FakeHub() as hub:
        online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": hub.token}
        environment = {**verify_module.clean_environment(tmp_path), **online}
        done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 1 and hub.requests == []
    says = "bits_per_byte 1.5 ± 0.1 on held-out (held_out), evaluation.json has bits_per_byte 2.5 ± 0.1 on"
    assert f"not uploaded: results: README.md says {says}" in done.stderr


def test_an_export_checks_its_own_card(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "model_digests", lambda folder: {"weights_sha256": "0" * 64})
    with pytest.raises(VerificationError, match="evaluation.json must be of the model in .*, got `weights_sha256` 0"):
        export(checkpoints["diffusion"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [{"block_length": 4}, {"rope_parameters": {"rope_theta": 10.0}}])
def test_a_config_that_was_changed_after_the_export_is_refused(exported, change):
    """The number in the card is of the model as it was measured."""
    config = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(VerificationError, match="evaluation.json must be of the model in broken, got `config_sha256`"):
        verify(exported)


def test_push_makes_private_repositories_and_branches(exported, monkeypatch):
    """The arguments that reach huggingface_hub."""
    calls = []

    class Api:
        def __getattr__(self, name):
            return lambda *args, **kwargs: (
                calls.append((name, args, kwargs)) or type("Commit", (), {"commit_url": "u"})
            )

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr(upload_module, "verify", lambda folder, **options: {})
    assert upload(exported, "me/model", push=True, private=True, revision="trial") == "u"
    (create, branch, folder) = calls
    assert create == ("create_repo", ("me/model",), {"private": True, "exist_ok": True})
    assert branch == ("create_branch", ("me/model",), {"branch": "trial", "exist_ok": True})
    address = "url: https://huggingface.co/me/model/blob/trial/evaluation.json"
    assert address in (exported / "README.md").read_text()
    assert folder[2]["revision"] == "trial" and folder[2]["commit_message"] == "Upload broken with nanollada"
