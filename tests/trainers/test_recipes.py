"""Every recipe is parsed by the trainer that its head names, with nothing left over, and trains; launchers, too."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from ranks import allow_shards_without_a_gpu
from trl import TrlParser

from nanollada.modeling_nanollada import NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM, layers_nanollada
from nanollada.modeling_nanollada.loading_nanollada import load_model
from nanollada.trainers.console.callbacks import read_metrics
from nanollada.trainers.data.prepare import DataArguments
from nanollada.trainers.diffusion import DiffusionTrainer
from nanollada.trainers.models import SHAPE, ModelArguments, config_for
from nanollada.trainers.noise.block_lengths import BlockLengthSchedule
from nanollada.trainers.registry import TRAINERS
from nanollada.trainers.run import main

FOLDER = Path(__file__).parents[2] / "scripts" / "recipes"
TUNING = ("_dpo.yaml", "_grpo.yaml")  # see tuning/test_tuning_recipes.py
RECIPES = sorted(path for path in FOLDER.glob("*.yaml") if not path.name.endswith(TUNING))
LAUNCHERS = sorted((FOLDER / "accelerate").glob("*.yaml"))
KINDS = {entry.program: entry for entry in TRAINERS.values()}
TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def name_of(path):
    return path.name


def kind_of(recipe):
    """Trainer, config and model of a recipe, by the command in its head."""
    head = recipe.read_text().splitlines()[1]
    launcher = "--config_file scripts/recipes/accelerate/ddp_8gpu.yaml " if "8gpu" in recipe.name else ""
    script = f"trainers/{'diffusion' if 'diffusion' in recipe.name else 'causal'}.py"
    assert head == f"# accelerate launch {launcher}{script} --config scripts/recipes/{recipe.name}"
    return KINDS[script]


def test_there_are_recipes():
    names = {f"{run}_{stage}.yaml" for run in ("quickstart", "minimind") for stage in ("ar", "ar_sft", "diffusion")}
    names |= {f"llada2_{n}gpu_{stage}.yaml" for n in (1, 8) for stage in ("ar", "diffusion", "diffusion_sft")}
    assert names <= {recipe.name for recipe in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_recipe_parses(recipe, tmp_path, tokenizer):
    settings = yaml.safe_load(recipe.read_text())
    parser = TrlParser((ModelArguments, DataArguments, kind_of(recipe).config_class))
    machine = ["--bf16", "false"] if settings.get("bf16") else []  # the recipes for a GPU, on whatever runs the tests
    arguments = ["--config", str(recipe), "--output_dir", str(tmp_path), "--max_steps", "7000", *machine]
    model, data, training = parser.parse_args_and_config(arguments, fail_with_unknown_args=True)
    assert training.max_steps == 7000 and training.output_dir == str(tmp_path)  # the command line wins
    assert data.data == settings["data"] and data.max_length == settings["max_length"]
    for name, value in settings.items():
        if name not in ("output_dir", "max_steps", "bf16"):
            assert getattr(next(part for part in (model, data, training) if hasattr(part, name)), name) == value
    if model.model_name_or_path is None:
        shape = {name: getattr(model, name) for name in SHAPE if getattr(model, name) is not None}
        assert config_for(tokenizer, **shape).num_hidden_layers > 0


@pytest.mark.parametrize("stage", ["ar", "diffusion", "diffusion_sft"])
def test_eight_gpus_take_the_step_of_one(stage):
    one, eight = (yaml.safe_load((FOLDER / f"llada2_{n}gpu_{stage}.yaml").read_text()) for n in (1, 8))
    assert 8 * eight.pop("per_device_train_batch_size") == one.pop("per_device_train_batch_size")
    assert eight.pop("ddp_find_unused_parameters") is False
    for settings in (one, eight):
        settings.pop("dataloader_num_workers")
        settings.pop("output_dir"), settings.pop("model_name_or_path", None)
    assert one == eight


@pytest.mark.parametrize("path", LAUNCHERS, ids=name_of)
def test_launcher_is_accelerates(path):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(path))
    assert config.num_processes == 8 and config.num_machines == 1 and not config.use_cpu
    assert config.mixed_precision == "no"  # the recipe's `bf16` decides
    assert config.distributed_type == ("FSDP" if path.name.startswith("fsdp") else "MULTI_GPU")
    known = vars(launch_command_parser().parse_args(["script.py"]))
    assert set(config.fsdp_config) <= set(known)  # accelerate itself passes over a name that it doesn't know
    if config.fsdp_config:
        assert config.fsdp_config["fsdp_version"] == 2
        assert hasattr(layers_nanollada, config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"])


def test_there_are_launchers():
    assert [path.name for path in LAUNCHERS] == ["ddp_8gpu.yaml", "fsdp2_8gpu.yaml"]


@pytest.fixture(scope="module")
def stage(tmp_path_factory, tokenizer):
    """What a recipe finds on a disk: texts, chats, a tokenizer and a checkpoint of each kind, all tiny."""
    folder = tmp_path_factory.mktemp("stage")
    words = "the cat sat on a mat and the dog sang to it of rain sun wind snow".split()
    texts = [" ".join(words[(i * j) % len(words)] for j in range(1, 14)) for i in range(60)]
    chats = [[{"role": "user", "content": text[:8]}, {"role": "assistant", "content": text[8:40]}] for text in texts]
    rows = {"texts": [{"text": text} for text in texts], "chats": [{"messages": chat} for chat in chats]}
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, model_class in (("ar", NanoLLaDAForCausalLM), ("diffusion", NanoLLaDAForMaskedLM)):
        model_class(config_for(tokenizer, **TINY)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def on_this_machine(recipe, settings, stage, folder):
    """The command line that brings a recipe down to a machine without its data, its checkpoints and its GPU."""
    rows = str(stage / ("chats.jsonl" if "sft" in recipe.name else "texts.jsonl"))
    # a schedule's phases need their share of the steps
    steps = 20 if "block_length_schedule" in settings else 2
    ours = {
        "data": rows,
        "eval_data": rows,
        "held_out_fraction": 0.2,
        "tokenizer_name_or_path": stage / "ar",
        "model_name_or_path": stage / ("diffusion" if "diffusion_sft" in recipe.name else "ar"),
        "max_length": 64,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 8,
        "eval_steps": steps // 2,
        "save_steps": steps // 2,
        "merge_top_k": 2,
        "bf16": False,
        "attn_implementation": "sdpa",
        "dataloader_num_workers": 1,
        **TINY,
    }
    if not settings.get("held_out_fraction", 1):
        ours.pop("held_out_fraction")
    if "model_name_or_path" not in settings:
        settings = {**settings, **TINY}
    ours = {name: value for name, value in ours.items() if name in settings}
    ours |= {"output_dir": folder, "max_steps": steps, "logging_steps": 1, "use_cpu": True}
    ours |= {"plot_loss": False, "disable_tqdm": True}
    return [part for name, value in ours.items() for part in (f"--{name}", str(value))]


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_recipe_trains(recipe, stage, tmp_path, monkeypatch):
    """Its own objective, schedules and files on a tiny model, with all else as it stands in the recipe."""
    settings = yaml.safe_load(recipe.read_text())
    lengths, begin_step = [], DiffusionTrainer.begin_step
    monkeypatch.setattr(
        DiffusionTrainer, "begin_step", lambda self: begin_step(self) or lengths.append(self.block_length)
    )
    folder = tmp_path / "run"
    facts = main(kind_of(recipe), ["--config", str(recipe), *on_this_machine(recipe, settings, stage, folder)])
    assert json.loads((folder / "run.json").read_text())["steps"] == facts["steps"] >= 2
    metrics = read_metrics(folder)
    losses = [line[name] for line in metrics for name in ("loss", "eval_loss") if name in line]
    assert len([line for line in metrics if "loss" in line]) == facts["steps"]
    assert all(math.isfinite(loss) for loss in losses)
    if settings.get("eval_strategy") == "steps":
        assert math.isfinite(facts["evaluation"]["nats_per_token"])
    phases = BlockLengthSchedule(settings.get("block_length_schedule") or [[1.0, settings.get("block_length") or 0]])
    assert json.loads((folder / "config.json").read_text())["block_length"] == (phases.last or None)
    if "diffusion" in recipe.name:
        expected = [block for _, block in phases.phases]
        assert [block for i, block in enumerate(lengths) if lengths[i - 1 : i] != [block]] == [
            block for i, block in enumerate(expected) if expected[i - 1 : i] != [block]
        ]


def train_in_processes(processes, environment, arguments):
    """`main` on `processes` ranks of gloo, under the environment that `accelerate launch` would set."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(Path(__file__)), *arguments]
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    environment = {**os.environ, **environment, **own}
    process = subprocess.Popen(launch, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        output, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:  # ranks that wait for each other; killed outright, torchrun would leave them
        process.terminate()
        output, _ = process.communicate()
    assert process.returncode == 0, output[-8000:]


@pytest.mark.slow
@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-5), (True, 3e-4)])
def test_shards_train_as_one_rank(bf16, tolerance, stage, tmp_path):
    """fsdp2_8gpu.yaml on two processes: losses, held-out bounds and the saved model of one process with their rows."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    launcher = str(FOLDER / "accelerate" / "fsdp2_8gpu.yaml")
    options = launch_command_parser().parse_args(["--config_file", launcher, "--num_processes", "2", "script.py"])
    environment = prepare_multi_gpu_env(_validate_launch_command(options)[0])
    sharded = {name: value for name, value in environment.items() if name.startswith(("ACCELERATE", "FSDP"))}
    assert sharded["FSDP_VERSION"] == "2"
    sharded["HF_DATASETS_CACHE"] = str(tmp_path / "cache")

    recipe = FOLDER / "llada2_8gpu_diffusion.yaml"
    command = on_this_machine(recipe, yaml.safe_load(recipe.read_text()), stage, tmp_path / "shards")
    command += ["--config", str(recipe), "--merge_top_k", "0", "--load_best_model_at_end", "true", "--bf16", str(bf16)]
    command += ["--per_device_eval_batch_size", "1", "--max_held_out_documents", "7"]
    command += ["--dataloader_num_workers", "0"]
    train_in_processes(2, sharded, command)
    facts = main(
        kind_of(recipe), [*command, "--output_dir", str(tmp_path / "one"), "--per_device_train_batch_size", "4"]
    )
    shards, one = tmp_path / "shards", tmp_path / "one"
    assert json.loads((shards / "run.json").read_text())["evaluation"]["rows"] % 2, "ranks must get unequal shares"
    for name in ("loss", "eval_loss"):
        values = [[line[name] for line in read_metrics(folder) if name in line] for folder in (shards, one)]
        assert len(values[0]) == (20 if name == "loss" else 2)
        assert values[0] == pytest.approx(values[1], rel=tolerance)
    loaded = load_model(NanoLLaDAForMaskedLM, shards)
    assert loaded.config.block_length == 32 and loaded.num_parameters() == facts["parameters"]
    reference = load_model(NanoLLaDAForMaskedLM, one).state_dict()
    if not bf16:
        assert all(torch.allclose(reference[name], value, atol=1e-4) for name, value in loaded.state_dict().items())


def main_of_a_rank(arguments):
    from torch.distributed.tensor import DTensor

    class ShardedTrainer(DiffusionTrainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            assert any(isinstance(parameter, DTensor) for parameter in self.model.parameters())
            return loss

    allow_shards_without_a_gpu()
    main(dataclasses.replace(TRAINERS["diffusion"], trainer_class=ShardedTrainer), arguments)


if __name__ == "__main__":
    main_of_a_rank(sys.argv[1:])
