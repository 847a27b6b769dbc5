"""What is published runs on strangers' machines: it imports torch and transformers and touches nothing else."""

import ast
import json
import subprocess
import sys

import pytest
import torch

from nanollada.modeling_nanollada import NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM
from nanollada.scripts.decoding.checkpoint import load_checkpoint
from nanollada.trainers.models import config_for

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
ALLOWED = {
    "torch",
    "transformers",
    "copy",
    "math",
    "itertools",
    "dataclasses",
    "collections",
    "functools",
    "difflib",
    "textwrap",
    "warnings",
    "types",
    "typing",
    "__future__",
}
FORBIDDEN = {"open", "eval", "exec", "compile", "__import__", "input", "breakpoint", "globals", "getattr_static"}
WATCHED = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM

folder, causal = sys.argv[1], sys.argv[2] == "ar"
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = torch.arange(8, 20).view(2, 6)
run = {"max_new_tokens": 6, "do_sample": True}
kinds = [{}] if causal else [{}, {"threshold": 0.5}, {"remdm": "cap"}, {"cfg_scale": 0.5}]
seen = []

def watch(event, args):
    if event.split(".")[0] in ("socket", "subprocess", "shutil", "ctypes", "urllib", "ftplib", "smtplib"):
        seen.append(event)
    if event in ("open", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.remove", "os.rename", "os.mkdir"):
        name = str(args[0]) if args else ""
        if event != "open" or not name.endswith((".py", ".pyc", ".so")):  # lazy imports of libraries
            seen.append(f"{event} {name}")

def use():
    model(ids, labels=ids).loss.backward()
    for settings in kinds:
        model.generate(ids, **run, **settings)

use()
sys.addaudithook(watch)
use()
if len(sys.argv) > 3:
    open(sys.argv[3], "w").close()
print(json.dumps(seen))
"""


@pytest.fixture(scope="module", params=["ar", "diffusion"])
def folder(request, tokenizer, tmp_path_factory):
    """A checkpoint as it is published, with its code."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    network = NanoLLaDAForCausalLM if request.param == "ar" else NanoLLaDAForMaskedLM
    network(config_for(tokenizer, **SHAPE)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def shipped(folder):
    found = sorted(folder.glob("*.py"))
    assert len(found) >= 6
    return {path.name: ast.parse(path.read_text(encoding="utf-8")) for path in found}


def test_it_imports_torch_and_transformers_only(folder):
    for name, tree in shipped(folder).items():
        for node in ast.walk(tree):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level <= 1, f"{name} imports from outside its folder"
                modules = [node.module] if node.level == 0 else []
                assert node.level == 0 or (folder / f"{node.module}.py").exists(), f"{name} lacks {node.module}"
            for module in modules:  # `strict` is the decorator of transformers' own configs
                good = module.split(".")[0] in ALLOWED or module == "huggingface_hub.dataclasses"
                assert good, f"{name} imports {module}"


def test_it_calls_nothing_that_opens_or_runs(folder):
    for name, tree in shipped(folder).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = node.func.id if isinstance(node.func, ast.Name) else ""
                assert called not in FORBIDDEN, f"{name}:{node.lineno} calls {called}"
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("load", "save", "hub", "system", "popen"), (
                    f"{name}:{node.lineno} .{node.attr}"
                )


@pytest.mark.slow
def test_it_touches_nothing_while_it_runs(folder, tmp_path):
    """The interpreter's own audit events, over forward, backward and `generate` of the loaded remote code."""
    kind = "ar" if (folder.name).startswith("ar") else "diffusion"
    command = [sys.executable, "-c", WATCHED, str(folder), kind]
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == []
    touching = subprocess.run([*command, "touched"], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert json.loads(touching.stdout.splitlines()[-1]) == ["open touched"], "the watch must see an open file"


# ---- broken files


BROKEN = {
    "truncated": lambda raw: raw[: len(raw) // 2],
    "garbage": lambda raw: b"\x00\xff" * 100 + raw[200:],
    "empty": lambda raw: b"",
}
FILES = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_is_named(folder, tmp_path, name, kind):
    for path in folder.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_bytes(BROKEN[kind]((folder / name).read_bytes()))
    rule = "must be a whole safetensors file" if name.endswith("safetensors") else "must be JSON, got a broken file"
    with pytest.raises(ValueError, match=f"{name} of .* {rule}"):
        load_checkpoint(str(tmp_path))


def test_a_checkpoint_in_order_loads(folder):
    model, tokenizer = load_checkpoint(str(folder))
    assert model.config.vocab_size == len(tokenizer)
