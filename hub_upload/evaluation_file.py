"""The schema of evaluation.json: reads, checks and writes what was measured of a model.

A result is one figure of one task, as a row of `results`. This file imports the standard library and its neighbour
only, so that verify.py has it where nanollada is not installed.
"""

import hashlib
import json
import math
import os
import re
import sys
import uuid
from pathlib import Path

if __package__:
    from nanollada.hub_upload.recompute import ADAPTER, base_folder, read_adapter
else:  # verify.py runs by its path, without nanollada
    from recompute import ADAPTER, base_folder, read_adapter

EVALUATION = "evaluation.json"
VERSION = 2
# Of config.json: who wrote it, from where its code is loaded, and the dtype, for all is measured in float32.
BOOKKEEPING = ("transformers_version", "auto_map", "dtype", "torch_dtype", "_name_or_path")
PLACE = ("base_model_name_or_path", "revision", "inference_mode", "peft_version")  # so of adapter_config.json
# Nats and bits of a text: exact of a causal class, a bound of a masked one.
LIKELIHOODS = ("bits_per_byte", "nats_per_token", "nats_per_answer")
SHARES = ("acc", "acc_norm", "acc_bytes", "accuracy", "exact_match", "f1", "greedy_match", "ended")  # or by their unit
DIGESTS = ("weights_sha256", "config_sha256")
SAMPLED = ("samples", "estimator")  # settings of a better measurement of the same thing


# ---- the file


def read_object(path: str | os.PathLike) -> dict:
    """
    A JSON object from a file.

    Raises:
        `ValueError`: naming the file, if it is not there, no JSON, or something else.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name} must be readable JSON, got {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} must hold a JSON object, got {type(content).__name__}")
    return content


def read_evaluation(path: str | os.PathLike) -> dict:
    """
    The content of an evaluation.json.

    Raises:
        `ValueError`: for a file that is not there, no JSON object, or of another version: it names the commands that
            measure anew.
    """
    evaluation = read_object(path)
    version = evaluation.get("version", 1)
    if version != VERSION:
        results = evaluation.get("results")
        runs = [evaluation, *(results if isinstance(results, list) else ())]
        commands = dict.fromkeys(run["command"] for run in runs if isinstance(run, dict) and run.get("command"))
        again = "; ".join(f"python scripts/{command}" for command in commands or ["evaluate.py"])
        raise ValueError(f"{path} must be of version {VERSION}, got {version}: measure again ({again})")
    return evaluation


def save_evaluation(evaluation: dict, path: str | os.PathLike) -> dict:
    """
    Writes results, and keeps those that the file has of the same weights and config: a new result takes the place of
    the one with the same task, data, metric and settings. Of others (of another model, of an older version) it says on
    stderr how many it dropped.

    Returns:
        `dict`: what the file now says. `command` and `seed` at its top are the latest; every result has its own.

    Raises:
        `ValueError`: for a file that is no JSON object with `results`.
    """
    path = Path(path)
    names = ("checkpoint",) if evaluation["weights_sha256"] is None else DIGESTS
    new = {_identity(result) for result in evaluation["results"]}
    old, kept = old_evaluation(path), []
    same = old.get("base") == evaluation.get("base") and all(old.get(name) == evaluation.get(name) for name in names)
    if old.get("version") == VERSION and same:
        kept = [result for result in old["results"] if _identity(result) not in new]
    elif old.get("results"):
        version = old.get("version", 1)
        why = (
            f"of version {version}" if version != VERSION else f"which don't name this model by {' and '.join(names)}"
        )
        print(f"{path}: dropped {len(old['results'])} results, {why}", file=sys.stderr)
    merged = {**evaluation, "version": VERSION, "results": [*kept, *evaluation["results"]]}
    path.parent.mkdir(parents=True, exist_ok=True)
    # A killed run leaves no half file, and two at once don't write the same one.
    beside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    beside.write_text(json.dumps(merged, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)
    return merged


def old_evaluation(path: Path) -> dict:
    """
    What results are to be saved into, of any version; empty where there is nothing.

    Raises:
        `ValueError`: for a file that is no JSON object with a list of `results`.
    """
    if not path.exists():
        return {}
    try:
        content = read_object(path)
        _listed_results(content)
    except ValueError as error:
        rule = f"must hold no {EVALUATION}, or one with `results`"
        raise ValueError(f"`checkpoints` {rule}, got {path}: {error}") from error
    return content


def _identity(result: dict) -> str:
    settings = {name: value for name, value in (result.get("settings") or {}).items() if name not in SAMPLED}
    return json.dumps([*(result.get(name) for name in ("task", "data", "metric")), settings], sort_keys=True)


# ---- the model that results are of


def weights_digest(folder: str | os.PathLike) -> str:
    """
    SHA-256 over the SHA-256 of each of a folder's safetensors files, sorted by name, as in evaluation.json.

    Raises:
        `ValueError`: for a folder without any: pickled weights would all be the same nothing.
    """
    digests = [bytes.fromhex(file_digest(path)) for path in sorted(Path(folder).glob("*.safetensors"))]
    if not digests:
        raise ValueError(f"{Path(folder).name} must hold safetensors, got none")
    return hashlib.sha256(b"".join(digests)).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def config_digest(folder: str | os.PathLike) -> str:
    """
    SHA-256 of what of a folder's config.json decides the computation: all (the class in `architectures`, too) but
    [`BOOKKEEPING`], so that a key that is new here counts. Of an adapter's folder so its adapter_config.json.

    Raises:
        `ValueError`: for a file that is not there or no JSON object.
    """
    name, dropped = ("config.json", BOOKKEEPING) if read_adapter(folder) is None else (ADAPTER, PLACE)
    config = {key: value for key, value in read_object(Path(folder) / name).items() if key not in dropped}
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def model_digests(folder: str | os.PathLike) -> dict[str, str | dict]:
    """
    What evaluation.json says of the model: `weights_sha256` and `config_sha256`; of an adapter's folder these are of
    the adapter, and `base` says the same of the model under it, with its `name` and `architecture`.

    Raises:
        `ValueError`: as `weights_digest` and `base_folder`.
    """
    digests = {"weights_sha256": weights_digest(folder), "config_sha256": config_digest(folder)}
    adapter = read_adapter(folder)
    if adapter is None:
        return digests
    base = base_folder(folder)
    names = {"name": adapter["base_model_name_or_path"], "architecture": _architecture(base)}
    return {**digests, "base": {**names, **model_digests(base)}}


def _architecture(folder: str | os.PathLike) -> str:
    return str((read_object(Path(folder) / "config.json").get("architectures") or [None])[0])


def check_model(evaluation: dict, folder: Path, file: str = EVALUATION) -> None:
    """
    Whether results are of the model in a folder.

    Args:
        evaluation (`dict`): Content of evaluation.json.
        folder (`Path`): With config.json and safetensors, or an adapter's; then also whether they are of the model
            that it names and, if that is a folder here, of its weights.
        file (`str`): What messages call the evaluation.

    Raises:
        `ValueError`: if a digest is missing or another's, for results that such a class does not have, and as
            `results_of`.
    """
    for name, digest in {"weights_sha256": weights_digest(folder), "config_sha256": config_digest(folder)}.items():
        got = evaluation.get(name)
        if got is None:
            raise ValueError(f"{file} must name its model by `{name}`, got none (of an older version? measure again)")
        if got != digest:
            raise ValueError(f"{file} must be of the model in {folder.name}, got `{name}` {got}")
    architecture = _architecture(folder) if read_adapter(folder) is None else _check_base(evaluation, folder, file)
    for result in results_of(evaluation):
        bound, metric = result["bound"], result["metric"]
        if bound != ("MaskedLM" in architecture) and (bound or metric in LIKELIHOODS):
            kinds = "upper bounds of a masked class and exact likelihoods of a causal one"
            kind = "upper bound" if bound else "exact"
            raise ValueError(f"{file} must hold {kinds}, got {metric}, {kind}, of {architecture}")


def _check_base(evaluation: dict, folder: Path, file: str) -> str:
    """The class of the model under an adapter, which results must be of, too."""
    base, name = evaluation.get("base"), read_adapter(folder)["base_model_name_or_path"]
    if not isinstance(base, dict) or base.get("name") != name:
        raise ValueError(f"{file} must be of the adapter on {name}, got `base` {base}")
    if Path(name).is_dir() and base != (there := model_digests(folder)["base"]):
        odd = next(key for key in {**there, **base} if base.get(key) != there.get(key))
        raise ValueError(f"{file} must be of the model that {folder.name} adapts, got another `{odd}` of {name}")
    return str(base.get("architecture"))


# ---- one result


def _finite(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _name(value) -> bool:
    return isinstance(value, str) and re.fullmatch(r"\S(.*\S)?", value, re.DOTALL) is not None


def _listed(value, rule: tuple) -> bool:
    return isinstance(value, list) and all(map(rule[1], value))


def _example(value) -> bool:
    prompt = value.get("prompt") if isinstance(value, dict) else None
    said = prompt if isinstance(prompt, list) else [{"content": prompt}]
    said = [message.get("content") if isinstance(message, dict) else None for message in said]
    return bool(said) and all(isinstance(text, str) for text in (*said, value.get("answer")))


def _or_null(rule: tuple) -> tuple:
    return f"{rule[0]} or null", lambda value: value is None or rule[1](value)


# What a field must be: in words, and as a test.
SIZE = ("a number >= 0", lambda value: _finite(value) and value >= 0)
SHARE = ("a share in [0, 1]", lambda value: _finite(value) and 0 <= value <= 1)
DIFFERENCE = ("a difference of shares in [-1, 1]", lambda value: _finite(value) and -1 <= value <= 1)
COUNT = ("a whole number >= 1", lambda value: _whole(value) and value >= 1)
AMOUNT = ("a whole number >= 0", lambda value: _whole(value) and value >= 0)
SEED = ("a whole number", _whole)
NAME = ("a name", _name)
FLAG = ("true or false", lambda value: isinstance(value, bool))
OBJECT = ("an object", lambda value: isinstance(value, dict))
INTERVAL = (
    "two shares in ascending order",
    lambda value: _listed(value, SHARE) and len(value) == 2 and value[0] <= value[1],
)
EXAMPLES = ("objects with `prompt`, a text or messages, and `answer`", lambda value: _listed(value, ("", _example)))
DIGEST = ("64 hexadecimal digits", lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value))

RUN = {"command": _or_null(NAME), "seed": _or_null(SEED)}
FIELDS = {"task": NAME, "metric": NAME, "standard_error": _or_null(SIZE), "mask_error": _or_null(SIZE), "bound": FLAG}
FIELDS |= dict.fromkeys(("rows", "tokens", "bytes", "documents"), _or_null(COUNT))
FIELDS |= dict.fromkeys(("correct", "truncated"), _or_null(AMOUNT))
FIELDS |= {**dict.fromkeys(("kind", "language", "unit", "data"), _or_null(NAME)), "chance": _or_null(SHARE)}
FIELDS |= {"interval": _or_null(INTERVAL), "examples": _or_null(EXAMPLES)}
FIELDS |= {"data_sha256": _or_null(DIGEST), "settings": _or_null(OBJECT), **RUN}


def results_of(evaluation: dict) -> list[dict]:
    """
    The results of an evaluation, each checked.

    Raises:
        `ValueError`: for any other, naming the field; one that is missing counts as null.
    """
    results = _listed_results(evaluation)
    _check_fields(evaluation, {**RUN, "of": _or_null(NAME)}, "the run")
    for result in results:
        task = f"task {result.get('task')!r}"
        _check_fields(result, FIELDS, task)
        if "standard_error" not in result:  # null says that none is defined
            raise ValueError(f"`evaluation` must give `standard_error` of {task}, or null, got none")
        metric, _, variant = result["metric"].partition("/")
        share = metric in SHARES or str(result.get("unit")).startswith("share")
        value = SIZE if not share else DIFFERENCE if " − " in variant else SHARE  # of one decoding setting to another
        _check_fields(result, {"value": value}, f"{result['metric']} of {task}")
    return results


def _listed_results(evaluation: dict) -> list[dict]:
    results = evaluation.get("results")
    if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
        raise ValueError(f"`evaluation` must hold a list of `results`, got {type(results).__name__}")
    return results


def _check_fields(given: dict, rules: dict, of: str) -> None:
    for name, (kind, good) in rules.items():
        if not good(given.get(name)):
            raise ValueError(f"`evaluation` must give `{name}` of {of} as {kind}, got {given.get(name)!r}")
