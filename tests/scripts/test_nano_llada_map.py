"""NANO_LLADA.md: every flag of Nano-LLaDA is on it, and every argument that it names as ours is what it says."""

import ast
import functools
import re
from pathlib import Path

import pytest
import yaml
from transformers import HfArgumentParser

from nanollada.configuration_nanollada import NanoLLaDAConfig
from nanollada.modeling_nanollada import NanoLLaDAGenerationConfig
from nanollada.scripts.decoding.comparison import CompareArguments
from nanollada.scripts.decoding.prompting import GenerateArguments
from nanollada.scripts.decoding.settings import DecodingArguments
from nanollada.scripts.evaluation.checkpoint import EvaluateArguments
from nanollada.scripts.evaluation.runner import SuiteArguments
from nanollada.scripts.evaluation.suite_file import parse_task
from nanollada.scripts.merge_checkpoints import MergeArguments
from nanollada.trainers.causal import CausalConfig
from nanollada.trainers.data.prepare import DataArguments
from nanollada.trainers.data.tokenizers import TokenizerArguments
from nanollada.trainers.diffusion import DiffusionConfig
from nanollada.trainers.models import ModelArguments
from nanollada.trainers.registry import TRAINERS
from nanollada.trainers.tuning.policy import PolicyArguments

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "scripts" / "NANO_LLADA.md").read_text(encoding="utf-8")

ARCHITECTURE = (
    "hidden-size num-hidden-layers num-attention-heads intermediate-size dropout hidden-act rms-norm-eps rope-theta "
    "max-position-embeddings inference-rope-scaling"
).split()
TRAINING = (
    "data tokenizer-dir save-dir run-name load-from epochs batch-size num-workers max-seq-len learning-rate "
    "weight-decay warmup-steps accumulation-steps grad-clip log-interval save-interval dtype device seed"
).split()
DECAY = "final-decay-ratio final-lr-ratio resume-optimizer-state mask-token iid-mask-eps".split()
SAMPLER = (
    "gen-temp gen-confidence-threshold gen-top-k gen-repeat-penalty gen-repeat-window gen-cap-start-ratio "
    "gen-cap-end-ratio gen-max-decode-per-step"
).split()
STEPS = ["gen-steps", "gen-cfg-scale"]
PARALLEL = "llada2-enable-parallel-decoding"
BLOCKS = ["llada2-block-size", "llada2-alpha-min", "llada2-alpha-max", "llada2-quantize-effective-length"]
PAIR = "tokenizer-dir minimind-checkpoint diffusion-checkpoint device max-new-tokens seq-len ar-temperature ar-top-k"
PAIR = [*PAIR.split(), "mask-token"]

# What the argument parsers of Nano-LLaDA's two branches hold; the numbers beside are theirs.
SEED = {
    "train_pretrain.py": (
        34,
        "data jsonl-field tokenizer-dir tokenizer-json retrain-tokenizer retrained-tokenizer-json-name "
        "tokenizer-vocab-size tokenizer-train-max-lines mask-token target-vocab-size save-dir run-name load-from "
        "epochs batch-size num-workers max-seq-len lr weight-decay grad-clip log-interval save-interval dtype "
        "seed".split()
        + ARCHITECTURE,
    ),
    "diffusion.py": (
        64,
        "train learning-rate lr-schedule warmup-steps lr-stable-ratio min-lr-ratio weight-decay use-tokenizer "
        "tokenizer-dir target-vocab-size data jsonl-field jsonl-sep seq-len batch-size max-iters weights-path "
        "run-name init-from-minimind early-stop-patience early-stop-min-delta repeat-penalty-weight "
        "repeat-penalty-min-run repeat-penalty-delay-steps repeat-penalty-warmup-steps mask-schedule iid-mask-eps "
        "variable-length-prob wsd-min-mask-ratio wsd-max-mask-ratio wsd-warmup-ratio wsd-stable-ratio "
        "use-block-curriculum wsd-phase-ratios wsd-block-sizes-up wsd-block-sizes-down time-weighted-loss "
        "time-weight-eps use-doc-attention-mask eval-interval sample-interval llada2-topk-merge "
        "llada2-topk-merge-k".split()
        + [*ARCHITECTURE, *SAMPLER, *STEPS, PARALLEL],
    ),
    "train_sft_minimind.py": (32, [*TRAINING, *ARCHITECTURE, "streaming", "steps-per-epoch", "min-lr-ratio"]),
    "train_sft_diffusion.py": (
        44,
        [*TRAINING, *ARCHITECTURE, *DECAY, *BLOCKS, "streaming", "steps-per-epoch", "llada2-enable-block-diffusion"]
        + ["llada2-enable-cap", "llada2-cap-lambda", "llada2-enable-complementary-masking"],
    ),
    "train_dpo_diffusion.py": (30, [*TRAINING, *DECAY, *BLOCKS, "reference-from", "dpo-beta"]),
    "eval_minimind.py": (
        12,
        "checkpoint tokenizer-dir prompt max-new-tokens temperature top-k device eval-data jsonl-field max-seq-len "
        "eval-batch-size eval-max-batches".split(),
    ),
    "eval_diffusion.py": (
        24,
        "checkpoint tokenizer-dir seq-len prompt max-new-tokens eval-data jsonl-field eval-batch-size "
        "eval-max-batches eval-mask-ratio cond-ll-response cond-ll-nmc device".split()
        + [*SAMPLER, *STEPS, PARALLEL],
    ),
    "eval_sft_one_prompt.py": (22, [*PAIR, *SAMPLER, *STEPS, PARALLEL, "prompt", "no-chat-wrap"]),
    "eval_sft_hf_qa.py": (
        30,
        "dataset dataset-config split question-field context-field answers-field num-samples seed include-context "
        "output".split()
        + [*PAIR, *SAMPLER, *STEPS, PARALLEL],
    ),
    "compare_cfg.py": (
        13,
        "checkpoint tokenizer-dir prompt seq-len max-new-tokens gen-steps cfg-on-scale cfg-off-scale "
        "gen-repeat-penalty gen-repeat-window mask-token no-chat-wrap device".split(),
    ),
    "compare_llada_styles.py": (
        23,
        "checkpoint tokenizer-dir seq-len prompt prompt-file prompt-field max-samples max-new-tokens task "
        "no-chat-wrap mask-token output device".split()
        + [*SAMPLER, *STEPS],
    ),
}

PROGRAMS = {
    "trainers/dpo.py": [TRAINERS["dpo"].arguments],
    "trainers/causal.py": [(ModelArguments, DataArguments, CausalConfig)],
    "trainers/diffusion.py": [(ModelArguments, DataArguments, DiffusionConfig)],
    "scripts/train_tokenizer.py": [(TokenizerArguments,)],
    "scripts/merge_checkpoints.py": [(MergeArguments,)],
    "scripts/generate.py": [(GenerateArguments, DecodingArguments)],
    "scripts/compare.py": [(CompareArguments, DecodingArguments)],
    "scripts/evaluate.py": [(EvaluateArguments, DecodingArguments), (SuiteArguments,)],  # without and with --suite
}
CONFIGS = {
    "NanoLLaDAConfig": NanoLLaDAConfig(),
    "NanoLLaDAGenerationConfig": NanoLLaDAGenerationConfig._get_default_generation_params(),
}
ARGUMENT = re.compile(r"`((?:trainers|scripts)/\w+\.py) --(\w+)(?: ([^`]+))?` \(([^)]*)\)")
FIELD = re.compile(r"`(NanoLLaDA\w*Config)\.(\w+)` \(([^)]*)\)")
TASK = re.compile(r"`(\{kind: [^`]+\})`")


def sections() -> list[tuple[list[str], list[list[str]]]]:
    """The seed's scripts that a heading names, and the rows of the table below it: flag, default, ours, remark."""
    found = []
    for section in PAGE.split("\n## ")[1:]:
        heading, _, body = section.partition("\n")
        lines = [line for line in body.splitlines() if line.startswith("| `--")]
        rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
        if rows:
            found.append((re.findall(r"`(\w+\.py)`", heading), rows))
    return found


ROWS = [row for _, rows in sections() for row in rows]


def unique(pattern: re.Pattern) -> list:
    return list(dict.fromkeys(pattern.findall(PAGE)))


@functools.cache
def parser_of(classes: tuple) -> HfArgumentParser:
    return HfArgumentParser(classes)


def options_of(classes: tuple) -> dict:
    return {action.dest: action for action in parser_of(classes)._actions}


def modes_with(name: str, option: str) -> list[tuple]:
    """The argument classes of a program's modes that have the option."""
    modes = [classes for classes in PROGRAMS[name] if option in options_of(classes)]
    assert modes, f"{name} has no --{option}"
    return modes


def said(text: str):
    """A default as the page writes it."""
    words = {"none": None, "off": False, "on": True}
    if text in words:
        return words[text]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


@pytest.mark.parametrize("script", SEED)
def test_every_flag_is_on_the_page(script):
    count, flags = SEED[script]
    assert len(flags) == len(set(flags)) == count
    listed = [row[0].strip("`") for scripts, rows in sections() if script in scripts for row in rows]
    assert len(listed) == len(set(listed)), f"{script}: a flag stands twice"
    assert set(listed) == {f"--{flag}" for flag in flags}


def test_every_heading_and_file_is_known():
    assert {script for scripts, _ in sections() for script in scripts} == set(SEED)
    ours = 0
    for name in re.findall(r"`([a-z_]+/[\w/]*(?:\.py)?)[` ]", PAGE):
        if name.startswith(("core/", "scripts/train/", "scripts/eval/")):
            continue  # Nano-LLaDA's own
        assert (ROOT / name).exists(), name
        ours += 1
    assert ours > 100


def test_every_row_says_where_or_why():
    assert len(ROWS) > 200
    for row in ROWS:
        assert len(row) == 4, row
        flag, default, ours, remark = row
        assert re.fullmatch(r"`--[a-z0-9-]+`", flag) and default, row
        assert len(remark.split()) <= 15, f"{flag}: {remark}"
        rest = ours
        for pattern in (ARGUMENT, FIELD, TASK):
            rest = pattern.sub("", rest)
        assert rest.strip(" ,") in ("", "–"), f"{flag}: {rest!r} is nothing that is checked"
        assert remark or "–" not in ours, f"{flag} is gone without a reason"


def test_nothing_is_to_come():
    assert "to come" not in PAGE


@pytest.mark.parametrize("name", PROGRAMS)
def test_arguments_exist_with_the_default_that_the_page_says(name):
    named = [found for found in unique(ARGUMENT) if found[0] == name]
    assert named
    for _, option, _, default in named:
        actions = [options_of(classes)[option] for classes in modes_with(name, option)]
        defaults = ["required" if action.required else action.default for action in actions]
        assert said(default) in defaults or default in map(str, defaults), f"{option}: {defaults}, not {default}"


def test_values_are_accepted(tmp_path):
    """By the parsers themselves."""
    (tmp_path / "config.json").write_text("{}")
    needed = {
        ModelArguments: ["--tokenizer_name_or_path", "x"],
        PolicyArguments: ["--model_name_or_path", "x"],
        GenerateArguments: ["--checkpoint", "x"],
        EvaluateArguments: ["--checkpoint", str(tmp_path), "--data", "x"],
        CompareArguments: ["--ar", "x", "--diffusion", "x", "--prompts", "x"],
        MergeArguments: ["--checkpoints", "x", "--output_dir", "x"],
        SuiteArguments: ["--suite", "x", "--checkpoints", str(tmp_path)],
    }
    for name, option, value, _ in unique(ARGUMENT):
        if not value:
            continue
        classes = modes_with(name, option)[0]
        arguments = [word for kind in classes for word in needed.get(kind, [])]
        if name.startswith("trainers/"):
            arguments += ["--output_dir", str(tmp_path), "--eval_strategy", "steps", "--eval_steps", "1"]
        values = [value] if value[0] in "{[" else value.split()
        parsed = parser_of(classes).parse_args_into_dataclasses([*arguments, f"--{option}", *values])
        (got,) = [getattr(item, option) for item in parsed if hasattr(item, option)]
        assert got is not None


def test_config_fields_have_their_defaults():
    assert unique(FIELD)
    for config, field, default in unique(FIELD):
        values = CONFIGS[config]
        got = values[field] if isinstance(values, dict) else getattr(values, field)
        assert got == said(default), f"{config}.{field}: {got}"


def test_the_suites_tasks_are_tasks():
    named = unique(TASK)
    kinds = set()
    for text in named:
        task = {"data": "my.jsonl", **yaml.safe_load(text)}
        kinds.add((task["kind"], task.get("verify") or str(task.get("presets"))))
        presets = getattr(parse_task({"name": "t", **task}, "NANO_LLADA.md"), "presets", {})
        assert all(isinstance(name, str) for name in presets)  # YAML's off and on are no names
    assert {("generation", "qa"), ("presets", "cfg"), ("presets", "llada_styles")} <= kinds


def test_recipes_have_the_learning_rate_and_decay_that_the_page_says():
    for kind in ("ar_sft", "diffusion_sft"):
        recipe = yaml.safe_load((ROOT / "scripts" / "recipes" / f"minimind_{kind}.yaml").read_text())
        assert (recipe["learning_rate"], recipe["lr_decay_ratio"]) == (2.5e-5, 0.1)
