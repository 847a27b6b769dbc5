"""Every recipe is parsed by the trainer that its head names, with nothing left over."""

from pathlib import Path

import pytest
import yaml
from trl import TrlParser

from nanollada.trainers.causal import CausalConfig
from nanollada.trainers.data import DataArguments
from nanollada.trainers.diffusion import DiffusionConfig
from nanollada.trainers.setup import SHAPE, ModelArguments, config_for

RECIPES = sorted((Path(__file__).parent.parent / "scripts" / "recipes").glob("*.yaml"))
CONFIGS = {"trainers/causal.py": CausalConfig, "trainers/diffusion.py": DiffusionConfig}


def config_of(recipe):
    head = recipe.read_text().splitlines()[1]
    command = f"# accelerate launch trainers/{'diffusion' if 'diffusion' in recipe.name else 'causal'}.py"
    assert head == f"{command} --config scripts/recipes/{recipe.name}"
    return CONFIGS[command.split()[-1]]


def test_there_are_recipes():
    names = {f"{run}_{stage}.yaml" for run in ("quickstart", "minimind") for stage in ("ar", "ar_sft", "diffusion")}
    assert names <= {recipe.name for recipe in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_recipe_parses(recipe, tmp_path, tokenizer):
    settings = yaml.safe_load(recipe.read_text())
    parser = TrlParser((ModelArguments, DataArguments, config_of(recipe)))
    machine = ["--bf16", "false"] if settings.get("bf16") else []  # the recipes for a GPU, on whatever runs the tests
    arguments = ["--config", str(recipe), "--output_dir", str(tmp_path), "--max_steps", "7", *machine]
    model, data, training = parser.parse_args_and_config(arguments, fail_with_unknown_args=True)
    assert training.max_steps == 7 and training.output_dir == str(tmp_path)  # the command line wins
    assert data.data == settings["data"] and data.max_length == settings["max_length"]
    for name, value in settings.items():
        if name not in ("output_dir", "max_steps", "bf16"):
            assert getattr(next(part for part in (model, data, training) if hasattr(part, name)), name) == value
    if model.model_name_or_path is None:
        shape = {name: getattr(model, name) for name in SHAPE if getattr(model, name) is not None}
        assert config_for(tokenizer, **shape).num_hidden_layers > 0
