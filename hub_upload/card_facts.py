"""What is on record about a checkpoint, for its card: its runs and its evaluation, without paths of the machine."""

import os
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from nanollada.hub_upload.evaluation_file import (
    EVALUATION,
    VERSION,
    check_model,
    file_digest,
    read_evaluation,
    read_object,
)

# A path that is absolute, or climbs out of the working folder, at the start of a word (a URL's stands inside one).
LOCAL_PATH = re.compile(r"(?<![^\s='\",:;\[({])(?:~[\w-]*/|/(?!/)|\.\./|[A-Za-z]:[\\/](?!/))[^\s'\",;\])}]+")
RECIPES = ("scripts", "recipes")
PATH_KEYS = ("init", "sources", "data", "checkpoint")  # whose strings are one path or name each, blanks and all


@dataclass
class Facts:
    """
    What is on record about a checkpoint.

    Attributes:
        stages (`list[dict]`): `run.json` of the runs that led to it, the oldest first.
        run (`dict`, *optional*): The last of them, unless only its trainer's state is there.
        evaluation (`dict`, *optional*): `evaluation.json`, or what `run.json` says of the held-out rows.
        missing (`list[str]`): What is not on record, and why.
    """

    stages: list[dict] = field(default_factory=list)
    run: dict | None = None
    evaluation: dict | None = None
    missing: list[str] = field(default_factory=list)


def read_facts(checkpoint: str | os.PathLike, evaluation: str | os.PathLike | None = None) -> Facts:
    """
    Collects `run.json` of the checkpoint and, as long as they are still there, of the checkpoints it started from;
    steps from `trainer_state.json`; and the evaluation. Local paths become bare names.

    Args:
        checkpoint (`str` or `os.PathLike`): Folder of the checkpoint.
        evaluation (`str` or `os.PathLike`, *optional*): File. Defaults to the checkpoint's `evaluation.json`.

    Raises:
        `ValueError`: for a file that is not there or not JSON, for an evaluation that names no model or another than
            the checkpoint's, and if the files that `run.json` evaluated are not those of the checkpoint.
    """
    folder = Path(checkpoint).resolve()
    facts = Facts(stages=_read_stages(folder))
    if not (folder / "run.json").is_file():
        facts.missing.append("data, objective, seed, command, hardware, versions: no run.json beside the weights")
    file = Path(evaluation) if evaluation is not None else folder / EVALUATION
    if evaluation is not None or file.is_file():
        facts.evaluation = read_evaluation(file)
        check_model(facts.evaluation, folder, file.name)
    elif not facts.stages or not facts.stages[-1].get("evaluation"):
        facts.missing.append("evaluation: neither evaluation.json nor an evaluation in run.json")
    elif not facts.stages[-1].get("sha256"):
        facts.missing.append("evaluation: that of run.json is of unknown weights (no `sha256`), measure again")
    else:
        _check_saved(facts.stages[-1]["sha256"], folder)
        facts.evaluation = _evaluation_of_run(facts.stages[-1])
    facts.stages, facts.evaluation = without_paths(facts.stages), without_paths(facts.evaluation)
    facts.run = facts.stages[-1] if (folder / "run.json").is_file() else None
    return facts


def _check_saved(saved: dict, folder: Path) -> None:
    """The files that the run scored and saved must be those that are there, by their SHA-256."""
    patterns = ("*.safetensors", "config.json", "adapter_config.json")
    there = {path.name: file_digest(path) for pattern in patterns for path in folder.glob(pattern)}
    if odd := [name for name in {**saved, **there} if saved.get(name) != there.get(name)]:
        raise ValueError(
            f"run.json must be of the model in {folder.name}, got an `evaluation` of another {odd[0]} (measure again)"
        )


def _read_stages(folder: Path) -> list[dict]:
    stages, seen = [], set()
    while folder not in seen:
        seen.add(folder)
        files = (folder / "run.json", folder / "trainer_state.json")
        run, state = (read_object(file) if file.is_file() else {} for file in files)
        if run or state:
            stages.insert(0, {**_facts_of_state(state), **run})
        init = run.get("init")
        if not init or not Path(init).is_dir():
            break
        folder = Path(init).resolve()
    return stages


def _facts_of_state(state: dict) -> dict:
    step, best = state.get("best_global_step"), state.get("best_metric")
    logs = [log for log in state.get("log_history") or [] if log.get("step") == step]
    names = [name for log in logs for name, value in log.items() if value == best and name.startswith("eval_")]
    facts = {
        "steps": state.get("global_step"),
        "epochs": state.get("epoch"),
        "tokens_seen": state.get("num_input_tokens_seen") or None,
        "best": {"metric": names[0], "value": best, "step": step} if names else None,
    }
    return {name: value for name, value in facts.items() if value is not None}


def _evaluation_of_run(run: dict) -> dict:
    scores = run["evaluation"]
    shared = {name: scores.get(name) for name in ("bound", "rows", "tokens", "bytes")}
    shared |= {"task": "held_out", "kind": "text", "data": "held-out rows of the training data"}
    shared |= {"settings": {"estimator": scores.get("estimator")}}
    result = {
        "metric": "bits_per_byte",
        "unit": "bits/byte",
        "value": scores.get("bits_per_byte"),
        "standard_error": scores.get("bits_per_byte_sampling_error"),
        "mask_error": scores.get("bits_per_byte_standard_error"),
    }
    return {
        "version": VERSION,
        "of": "the end of the last training run above",
        "results": [{**shared, **result}],
    }


def without_paths(value: Any, key: str | None = None) -> Any:
    """Every local path inside (absolute, or climbing out of the working folder) cut to its last part."""
    if isinstance(value, dict):
        return {name: without_paths(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item, key) for item in value]
    if not isinstance(value, str):
        return value
    if key in PATH_KEYS:
        return _base(value) if LOCAL_PATH.match(value) else value
    if key == "command":
        return shlex.join(_base_of_word(word) for word in shlex.split(value))
    return LOCAL_PATH.sub(lambda match: _base(match[0]), value)


def _base_of_word(word: str) -> str:
    """A word of a command: a path, `--option=path`, or anything else."""
    option, equals, path = word.rpartition("=")
    if LOCAL_PATH.match(path):
        return option + equals + _base(path)
    return LOCAL_PATH.sub(lambda match: _base(match[0]), word)


def _base(path: str) -> str:
    path = PureWindowsPath(path) if "\\" in path else PurePosixPath(path)
    kept = path.parts[-3:] if path.parts[-3:-1] == RECIPES else (path.name,)  # a recipe is in every clone
    return "/".join(kept) or "."
