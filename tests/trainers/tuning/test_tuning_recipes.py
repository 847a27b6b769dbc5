"""Every recipe of post-training is headed by commands that parse, and trains."""

import json
import math
import shlex
from pathlib import Path

import pytest
import yaml
from tuning_cases import checkpoint

from nanollada.scripts.decoding.settings import DecodingArguments
from nanollada.scripts.puzzles import PuzzleArguments
from nanollada.scripts.sampling.pairs import PairArguments
from nanollada.trainers.commands.parser import Parser
from nanollada.trainers.console.callbacks import read_metrics
from nanollada.trainers.puzzles.registry import write_rows
from nanollada.trainers.registry import TRAINERS
from nanollada.trainers.run import main

FOLDER = Path(__file__).parents[3] / "scripts" / "recipes"
RECIPES = sorted(path for path in FOLDER.glob("*.yaml") if path.stem.endswith(("_dpo", "_grpo")))
PROGRAMS = {"scripts/puzzles.py": PuzzleArguments, "scripts/pairs.py": (PairArguments, DecodingArguments)}


def name_of(path):
    return path.stem


def commands_of(recipe):
    lines = [line[2:] for line in recipe.read_text().splitlines() if line.startswith("# ")]
    return [shlex.split(line) for line in lines if line.startswith(("python ", "accelerate "))]


def test_there_are_recipes():
    kinds = [f"{kind}_{stage}" for kind in ("ar", "diffusion") for stage in ("dpo", "grpo")]
    assert {recipe.stem for recipe in RECIPES} == {
        f"{run}_{kind}" for run in ("quickstart", "minimind") for kind in kinds
    }


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_its_commands_make_what_it_reads(recipe):
    """Each command parses, and what the recipe reads is what a command before it writes."""
    settings, written = yaml.safe_load(recipe.read_text()), {"runs/quickstart/corpus/sft_train.jsonl"}
    *before, last = commands_of(recipe)
    program = f"trainers/{recipe.stem.rpartition('_')[2]}.py"
    assert last == ["accelerate", "launch", program, "--config", f"scripts/recipes/{recipe.name}"]
    for words in before:
        if words[0] == "accelerate":
            entry = next(entry for entry in TRAINERS.values() if entry.program == words[2])
            parsed = Parser(entry.arguments).parse_args_and_config([*words[3:], "--bf16", "false"])
            written.add(parsed[-1].output_dir)
            assert set(parsed[1].data) <= written
        else:
            args, *_ = Parser(PROGRAMS[words[1]]).parse_args_and_config(words[2:])
            written.add(args.output)
    assert all(path in written for path in settings["data"] if not path.startswith("hf://"))
    start = settings["model_name_or_path"]
    sft = recipe.with_stem(f"{recipe.stem.rpartition('_')[0]}_sft")
    assert start in written or start == yaml.safe_load(sft.read_text())["output_dir"]
    assert settings["output_dir"] == f"runs/{recipe.stem.partition('_')[0]}/{recipe.stem.partition('_')[2]}"


@pytest.fixture(scope="module")
def stage(tmp_path_factory, tokenizer):
    """A tiny checkpoint of each kind, pairs, and prompts."""
    folder = tmp_path_factory.mktemp("stage")
    checkpoint(folder / "ar", tokenizer)
    checkpoint(folder / "diffusion", tokenizer, diffusion=True)
    pairs = [{"prompt": f"the cat {i}", "chosen": f" sat {i}", "rejected": f" ran {i} {i}"} for i in range(20)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    write_rows("arithmetic", 20, folder / "prompts.jsonl", 0, "prompts", set())
    return folder


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_recipe_trains(recipe, stage, tmp_path):
    """Its own objective and schedule for two steps of a tiny model, with all else as it stands in the recipe."""
    settings = yaml.safe_load(recipe.read_text())
    pairs = recipe.stem.endswith("dpo")
    ours = {
        "model_name_or_path": stage / ("diffusion" if "diffusion" in recipe.stem else "ar"),
        "data": stage / ("pairs.jsonl" if pairs else "prompts.jsonl"),
        "held_out_fraction": 0.2,
        "per_device_train_batch_size": 2 if pairs else 8,
        "per_device_eval_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_completion_length": 4,
        "eval_steps": 2,
        "save_steps": 2,
    }
    ours = {name: value for name, value in ours.items() if name in settings}
    ours |= {"output_dir": tmp_path / "run", "max_steps": 2, "logging_steps": 1, "use_cpu": True, "bf16": False}
    words = [part for name, value in ours.items() for part in (f"--{name}", str(value))]
    facts = main(TRAINERS["dpo" if pairs else "grpo"], ["--config", str(recipe), *words])
    assert facts["steps"] == 2 and facts["model_class"].endswith(
        "MaskedLM" if "diffusion" in recipe.stem else "CausalLM"
    )
    lines = read_metrics(tmp_path / "run")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    if pairs:
        assert losses[0] == pytest.approx(math.log(2), abs=1e-6)  # policy and reference are one, under the same masks
        assert math.isfinite(facts["metrics"]["eval_loss"])
