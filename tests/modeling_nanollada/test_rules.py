"""The registry of decoding rules: what follows from an entry, shown by one more rule; and what a step decides."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy_law
from generation_models import MASK, VOCABULARY, build

from nanollada.modeling_nanollada import NanoLLaDAGenerationConfig
from nanollada.modeling_nanollada.canvas_nanollada import Canvas
from nanollada.modeling_nanollada.rule_nanollada import Decision, Step
from nanollada.modeling_nanollada.rules_nanollada import OWN_SETTINGS, RULES

ROOT = Path(__file__).parents[2]
ROOMS = ("configuration_nanollada", "modeling_nanollada", "trainers", "scripts", "hub_upload")

# A rule that decides the leftmost mask and, in its last step, moves every token that it has decided by `rotate`.
RULE = """
from .rule_nanollada import AT_LEAST_ONE, Decision, Rule, Setting


def _rotate(step, sampler):
    leftmost = step.active & (step.active.cumsum(1) == 1)
    moved = 4 + (step.ids - 4 + sampler.settings.rotate * sampler.settings.rotate_factor) % 60
    return Decision(leftmost, moved, replaced=(step.index + 1 == step.steps)[:, None] & step.decided)


ROTATE = Rule(
    "from the left, and turns round in the end",
    "nobody",
    _rotate,
    {
        "rotate": Setting(int, AT_LEAST_ONE, "how far tokens turn in a block's last step."),
        "rotate_factor": Setting(int, AT_LEAST_ONE, "how many times as far.", 1),
    },
    check=lambda settings: "`rotate` must not be 13, got 13" if settings.rotate == 13 else "",
    ranks=False,
    revises=True,
)
"""
USE = """
import json, sys
import torch
from generation_models import build
from nanollada.modeling_nanollada import NanoLLaDAGenerationConfig

def refusal(function, **settings):
    try:
        function(**settings)
    except ValueError as error:
        return str(error)

networks = {"rows": build(0, initializer_range=0.4), "blocks": build(1, initializer_range=0.4, block_length=4)}
prompt = torch.tensor([[5, 6, 7, 8]])
run = {"max_new_tokens": 8, "block_length": 4, "steps": 6, "rotate": 7, "rotate_factor": 2, "eos_token_id": None}
report = {name: model.generate(prompt, **run)[0].tolist() for name, model in networks.items()}
report["uncached"] = networks["blocks"].generate(prompt, use_cache=False, **run)[0].tolist()
calls = [{"rotate": 0}, {"rotate": 1, "threshold": 0.5}, {"rotate": 13}, {"rotate": 1, "max_commits": 2}]
report["refused"] = [refusal(NanoLLaDAGenerationConfig, **call) for call in calls]
generate = networks["rows"].generate
for call in ({"rotate_factor": 3}, {"rotate": 1, "position_score": "margin"}):
    report["refused"].append(refusal(lambda **call: generate(prompt, **run | {"rotate": None} | call), **call))
report["documentation"] = NanoLLaDAGenerationConfig.__doc__
networks["rows"].generation_config.rotate = 5
networks["rows"].save_pretrained(sys.argv[1])
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """Runs a command with a copy of the package that has one file and one entry more."""
    folder = tmp_path_factory.mktemp("extended")
    for room in ROOMS:
        shutil.copytree(ROOT / room, folder / "nanollada" / room, ignore=shutil.ignore_patterns("__pycache__"))
    models = folder / "nanollada" / "modeling_nanollada"
    (models / "rotate_nanollada.py").write_text(RULE)
    registry = (models / "rules_nanollada.py").read_text()
    registry = registry.replace("\nRULES = {\n", '\nRULES = {\n    "rotate": ROTATE,\n')
    registry = registry.replace(
        "\nfrom .rule_nanollada", "\nfrom .rotate_nanollada import ROTATE\nfrom .rule_nanollada"
    )
    (models / "rules_nanollada.py").write_text(registry)
    path = os.pathsep.join((str(folder), str(ROOT / "tests")))

    def run(*command):
        environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200", "HF_MODULES_CACHE": str(folder / "hub")}
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, cwd=folder)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return run


def plain_loop(model, prompt, turn):
    """Blocks of four from the left, one token at a time; what is decided turns in the last of six steps."""
    row = prompt + [MASK] * 8
    for begin in (4, 8):
        for column in range(begin, begin + 4):
            end = begin + 4 if model.config.block_length else len(row)
            row[column] = int(model(torch.tensor([row[:end]])).logits[0, column].argmax())
        row[begin : begin + 4] = [4 + (token - 4 + turn) % 60 for token in row[begin : begin + 4]]
    return row


def test_one_file_and_one_entry_make_a_rule(extended, tmp_path):
    """Its settings, checks and documentation, and `generate` with it; decided tokens change, with the cache, too."""
    report = json.loads(extended("-c", USE, str(tmp_path)).splitlines()[-1])
    assert report["rows"] == plain_loop(build(0, initializer_range=0.4), [5, 6, 7, 8], 14)
    expected = plain_loop(build(1, initializer_range=0.4, block_length=4), [5, 6, 7, 8], 14)
    assert report["blocks"] == report["uncached"] == expected
    assert report["refused"] == [
        "`rotate` must be an integer >= 1, got 0",
        "Only one of `rotate`, `threshold`, `factor`, `entropy_bound`, `remdm`, `joint_threshold` may be set, "
        "got ['rotate', 'threshold']",
        "`rotate` must not be 13, got 13",
        "`rotate` decides itself what a step commits: `commit_schedule` and `max_commits` must be unset, "
        "got None and 2",
        "`rotate_factor` needs `rotate`, got 3 with `rotate` None",
        "`position_score` needs the `remasking` 'low_confidence' and no `rotate` or `remdm` or "
        "`joint_threshold`, got 'margin' with `remasking` 'low_confidence', `rotate` 1, `remdm` None, "
        "`joint_threshold` None",
    ]
    assert "rotate (`int`, *optional*): nobody: how far tokens turn in a block's last step." in report["documentation"]
    assert json.loads((tmp_path / "generation_config.json").read_text())["rotate"] == 5
    assert (tmp_path / "rotate_nanollada.py").read_text() == RULE  # ships


@pytest.mark.parametrize("program", ["generate", "compare", "evaluate"])
def test_the_rule_is_an_option(extended, program):
    shown = " ".join(extended("-m", f"nanollada.scripts.{program}", "--help").split())
    assert "--rotate ROTATE Diffusion: how far tokens turn in a block's last step." in shown
    assert "--rotate_factor ROTATE_FACTOR" in shown and "Diffusion: how many times as far." in shown


def test_each_rule_is_documented():
    document = (ROOT / "modeling_nanollada" / "DECODING.md").read_text(encoding="utf-8")
    for name, rule in RULES.items():
        base = RULES[rule.refines].settings if rule.refines else {}
        fields = ", ".join(f"`{field}`" for field in (*base, *rule.settings))
        row = f"| {fields or '`steps=n` (default: one token a step)'} | {rule.help} | {rule.source} |"
        assert row in document, (name, row)
    assert set(OWN_SETTINGS) <= {word for word in NanoLLaDAGenerationConfig.__doc__.replace(",", " ").split()}


def test_late_positions_are_told_and_not_guessed_from_their_scores():
    """However low scores are: an entropy bound takes what is open and not late."""
    sampler = toy_law.sampler_for({"entropy_bound": 100.0})
    active, none = torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.bool)
    three = torch.tensor([3])
    step = Step(torch.tensor([0]), three, three, 0, active, none, torch.full((1, 3), 3), torch.zeros(3, 4))
    step.ranked, step.late = torch.tensor([[-700.0, -800.0, -900.0]]).double(), torch.tensor([[False, True, False]])
    assert sampler.choose(step).selected.tolist() == [[True, False, True]]


def test_a_decision_is_applied_as_it_says():
    settings = NanoLLaDAGenerationConfig(max_length=7)
    settings._pad_token_tensor = None
    config = build().config
    canvas = Canvas(torch.tensor([[5, 6, 7], [8, 9, 10]]), None, settings, config)
    rows, columns, none = torch.tensor([1]), slice(3, 7), torch.zeros(1, 4, dtype=torch.bool)
    chosen = torch.tensor([[True, True, False, False]])
    canvas.apply(rows, columns, Decision(chosen, torch.tensor([[20, 21, 22, 23]]), none, none))
    assert canvas.ids.tolist() == [[5, 6, 7] + [MASK] * 4, [8, 9, 10, 20, 21, MASK, MASK]]
    first, second, third = torch.eye(4, dtype=torch.bool)[:3, None]
    canvas.apply(rows, columns, Decision(third, torch.tensor([[30, 31, 32, 33]]), reopened=first, replaced=second))
    assert canvas.ids.tolist() == [[5, 6, 7] + [MASK] * 4, [8, 9, 10, MASK, 31, 32, MASK]]
    assert canvas.undecided[:, 3:].tolist() == [[True] * 4, [True, False, False, True]]
    assert canvas.commit_steps[:, 3:].tolist() == [[-1] * 4, [-1, 1, 1, -1]]
    assert canvas.forwards.tolist() == [0, 2] and VOCABULARY > 33


def test_docstrings_may_be_stripped():
    """The config's is completed from the registry; `python -OO` has none."""
    command = [sys.executable, "-OO", "-c", "import nanollada.modeling_nanollada"]
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == 0
