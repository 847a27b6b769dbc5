"""Checkpoints as remote code: the same logits in a process without nanollada, before and after fine-tuning there.

The clean processes run with this interpreter, and, slow, in a fresh environment with the oldest supported
transformers, installed by pip.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interpreters import INTERPRETERS, OLDEST
from packaging.version import Version
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, Trainer, TrainingArguments

from nanollada.configuration_nanollada import NanoLLaDAConfig
from nanollada.hub_upload import verify
from nanollada.modeling_nanollada import NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM, NanoLLaDAModel

ROOMS = (
    *("configuration", "modeling", "layers", "attention", "loss", "generation", "generation_config", "canvas"),
    *("sampling", "commit", "prediction", "cache", "versions", "denoising", "rule", "rules", "saved"),
    *("joint", "structural", "presets", "editing", "expansion"),
)
CODE = {f"{name}_nanollada.py" for name in ROOMS}
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VARIANTS = {
    "ar": (NanoLLaDAForCausalLM, {"num_key_value_heads": 2}),
    "diffusion": (NanoLLaDAForMaskedLM, {"tie_word_embeddings": True}),
    "ar-trainer": (NanoLLaDAForCausalLM, {"attention_bias": True}),
    "diffusion-trainer": (NanoLLaDAForMaskedLM, {"block_length": 4}),
}
IDS = torch.arange(4, 36).view(2, 16)

# Loads folders as a stranger does, and says what came out. With a target it also fine-tunes and saves them there.
STRANGER = """
import importlib.util, json, sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("verify", sys.argv[1])
verify = importlib.util.module_from_spec(spec)
spec.loader.exec_module(verify)
verify.block_nanollada()

import torch, transformers
from transformers import AutoConfig, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

ids = torch.arange(4, 36).view(2, 16)
report = {"transformers": transformers.__version__, "python": sys.executable}
for source, target in json.loads(sys.argv[2]).items():
    source = Path(source)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
    names = [name for name in AutoConfig.from_pretrained(source, trust_remote_code=True).auto_map if "Model" in name]
    logits = []
    for name in names:
        model = getattr(transformers, name).from_pretrained(source, trust_remote_code=True)
        with torch.no_grad():
            logits.append(model(input_ids=ids).logits)
    output = model.generate(ids[:1, :5], max_new_tokens=4, do_sample=False)
    facts = {"class": type(model).__name__, "module": type(model).__module__}
    facts |= {"names": names, "output": output.tolist(), "is_diffusion": model.is_diffusion}
    if model.is_diffusion:
        where = "generation_config_nanollada.NanoLLaDAGenerationConfig"
        for settings in (model.generation_config_class, get_class_from_dynamic_module(where, str(source))):
            chosen = settings(max_new_tokens=4, do_sample=False, eos_policy="none")
            facts["output"] += model.generate(ids[:1, :5], generation_config=chosen).tolist()
        facts["settings"] = type(model.generation_config) is model.generation_config_class
        facts["help"] = model.generate.__doc__
    if target is not None:
        optimizer = torch.optim.SGD(model.train().parameters(), lr=1.0)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        model.eval().save_pretrained(target)
        tokenizer.save_pretrained(target)
        with torch.no_grad():
            logits.append(model(input_ids=ids).logits)
    torch.save(logits, sys.argv[3] + "/" + source.name + ".pt")
    report[source.name] = facts
report["leaked"] = [name for name in sys.modules if name.split(".")[0] == "nanollada"]
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, tokenizer) -> dict[str, Path]:
    """Folders by variant: from `save_pretrained`, and from transformers' Trainer."""
    root, folders = tmp_path_factory.mktemp("checkpoints"), {}
    for name, (model_class, shape) in VARIANTS.items():
        torch.manual_seed(0)
        model = model_class(NanoLLaDAConfig(vocab_size=len(tokenizer), initializer_range=0.2, **SHAPE, **shape))
        if name.endswith("trainer"):
            folders[name] = trained(model, tokenizer, root / name).rename(root / f"{name}-1")
        else:
            model.save_pretrained(root / name)
            tokenizer.save_pretrained(root / name)
            folders[name] = root / name
    return folders


def trained(model, tokenizer, folder: Path) -> Path:
    args = TrainingArguments(
        output_dir=folder, max_steps=1, save_steps=1, report_to=[], use_cpu=True, learning_rate=0.1, disable_tqdm=True
    )
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    Trainer(model, args, train_dataset=rows, processing_class=tokenizer).train()
    return folder / "checkpoint-1"


def visit(python, folders: dict[Path, Path | None], scratch: Path) -> tuple[dict, dict[str, list[torch.Tensor]]]:
    """Runs `STRANGER`; its report, and logits by folder name."""
    (scratch / "cwd").mkdir(parents=True)
    sources = json.dumps({str(source): target and str(target) for source, target in folders.items()})
    done = subprocess.run(
        [python, "-I", "-c", STRANGER, verify.__file__, sources, str(scratch)],
        cwd=scratch / "cwd",
        env=verify.clean_environment(scratch),
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    logits = {path.name: torch.load(scratch / f"{path.name}.pt", weights_only=True) for path in folders}
    return json.loads(done.stdout.splitlines()[-1]), logits


@pytest.fixture(scope="module", params=INTERPRETERS)
def visits(request, checkpoints, tmp_path_factory):
    """Two clean processes: one that loads, fine-tunes and saves, one that loads what the first has saved."""
    python = sys.executable if request.param == "this" else request.getfixturevalue("oldest_python")
    scratch = tmp_path_factory.mktemp("visits")
    tuned = {folder: scratch / f"{folder.name}-tuned" for folder in checkpoints.values()}
    first, logits = visit(python, tuned, scratch / "first")
    second, logits_again = visit(python, dict.fromkeys(tuned.values()), scratch / "second")
    if request.param != "this":
        assert first["transformers"] == second["transformers"]
        assert Version(first["transformers"]) == Version(OLDEST["transformers"])
    return {"first": first, "second": second, "logits": {**logits, **logits_again}, "tuned": tuned}


def local_logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=IDS).logits


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    finite = left.isfinite()
    assert torch.equal(left[~finite], right[~finite])  # the mask token's −inf
    return (left - right)[finite].abs().max().item()


def check_files(folder: Path, model_class) -> None:
    names = {path.name for path in folder.iterdir()}
    assert CODE | {"config.json", "model.safetensors", "generation_config.json"} <= names
    assert {name for name in names if name.endswith(".py")} == CODE
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    model = f"modeling_nanollada.{model_class.__name__}"
    assert auto_map == {
        "AutoConfig": "configuration_nanollada.NanoLLaDAConfig",
        "AutoModel": model,
        "AutoModelForCausalLM": model,
        **({"AutoModelForMaskedLM": model} if model_class is NanoLLaDAForMaskedLM else {}),
    }
    assert 'model_type = "nanollada"' in (folder / "configuration_nanollada.py").read_text()  # not the bridge


@pytest.mark.parametrize("name", VARIANTS)
def test_every_save_is_complete(checkpoints, name):
    check_files(checkpoints[name], VARIANTS[name][0])


@pytest.mark.parametrize("name", VARIANTS)
def test_same_logits_without_nanollada(visits, checkpoints, name):
    folder = checkpoints[name]
    facts = visits["first"][folder.name]
    assert facts["class"] == VARIANTS[name][0].__name__
    assert facts["module"].startswith("transformers_modules.")
    assert facts["is_diffusion"] is name.startswith("diffusion")
    assert visits["first"]["leaked"] == visits["second"]["leaked"] == []
    logits, expected = visits["logits"][folder.name], local_logits(folder)
    assert len(logits) == len(facts["names"]) + 1 == (3 if name.startswith("ar") else 4)  # by Auto class, and tuned
    for got in logits[:-1]:
        assert difference(got, expected) <= 1e-5
    assert difference(logits[-1], expected) > 1e-3  # the step did something


@pytest.mark.parametrize("name", VARIANTS)
def test_generates_without_nanollada(visits, checkpoints, name):
    for visit_name, folder in (("first", checkpoints[name]), ("second", visits["tuned"][checkpoints[name]])):
        output, *again = visits[visit_name][folder.name]["output"]
        assert all(row == output for row in again) and len(again) == (2 if name.startswith("diffusion") else 0)
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert output == model.generate(IDS[:1, :5], max_new_tokens=4, do_sample=False)[0].tolist()
        assert output[:5] == IDS[0, :5].tolist()
        assert model.config.mask_token_id not in output


@pytest.mark.parametrize("name", ["diffusion", "diffusion-trainer"])
def test_the_arguments_of_generate_are_documented_without_nanollada(visits, checkpoints, name):
    facts = visits["first"][checkpoints[name].name]
    assert facts["settings"] is True and facts["help"] == NanoLLaDAForMaskedLM.generate.__doc__
    assert "- `block_length` (int): tokens per block, left to right." in facts["help"]


@pytest.mark.parametrize("name", VARIANTS)
def test_fine_tuned_remote_checkpoint_saves_and_loads_again(visits, checkpoints, name):
    tuned = visits["tuned"][checkpoints[name]]
    check_files(tuned, VARIANTS[name][0])
    at_saving = visits["logits"][checkpoints[name].name][-1]
    for got in (*visits["logits"][tuned.name], local_logits(tuned)):
        assert difference(got, at_saving) <= 1e-5


def test_auto_classes_follow_the_architecture_of_the_checkpoint(checkpoints, tmp_path):
    assert type(AutoModel.from_pretrained(checkpoints["ar"])) is NanoLLaDAForCausalLM
    assert type(AutoModel.from_pretrained(checkpoints["diffusion"])) is NanoLLaDAForMaskedLM
    assert type(AutoModelForMaskedLM.from_pretrained(checkpoints["diffusion"])) is NanoLLaDAForMaskedLM
    AutoModelForCausalLM.from_pretrained(checkpoints["ar"]).model.save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is NanoLLaDAModel
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "modeling_nanollada.NanoLLaDAModel"


@pytest.mark.parametrize("model_class", [NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM])
def test_sharded_model_saves_its_own_code(model_class, tokenizer, tmp_path):
    """`fully_shard` swaps the model's class for one of torch's own modules, whose files transformers would save."""
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = model_class(NanoLLaDAConfig(vocab_size=len(tokenizer), **SHAPE))
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        assert type(model) is not model_class
        model.save_pretrained(tmp_path, state_dict=dict(state))
    finally:
        torch.distributed.destroy_process_group()
    check_files(tmp_path, model_class)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [model_class.__name__]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is model_class
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
