"""Results in the card, from evaluation.json alone: the evaluation section and the `model-index`.

Which results are good, and of which model they are, is decided here, too; card_check.py compares a card with them.
Above its functions this file imports the standard library only, so that verify.py has it where nanollada is not
installed.
"""

import hashlib
import json
import math
import os
import re
from pathlib import Path
from urllib.parse import quote

EVALUATION = "evaluation.json"
# What stands between these two lines of a card is checked; prose belongs outside.
START = "<!-- made from evaluation.json and checked before every upload: do not edit -->"
END = "<!-- end of what is made from evaluation.json -->"
# Where a `model-index` result says it is from. Only the repository's name differs between folder and Hub.
SOURCE = "https://huggingface.co/{repo_id}/blob/{revision}/" + EVALUATION
SOURCE_URL = re.compile(r"https://huggingface\.co/[^\s'\"]+/blob/[^\s'\"]+/" + re.escape(EVALUATION))

METRICS = {"nll": "bits per byte", "nelbo": "bits per byte, upper bound", "exact_match": "exact match"}
SUITE_METRICS = {
    "bits_per_byte": "bits per byte",
    "acc": "accuracy",
    "acc_norm": "accuracy, normalised by length",
    "exact_match": "exact match",
    "f1": "F1",
    "tokens_per_second": "tokens per second",
}
COLUMNS = ("Data", "Metric", "Value", "Standard errors", "Scored on", "How")
SUITE_COLUMNS = ("Task", "Language", "Metric", "Value ± s.e.", "Chance", "Rows", "Data", "How")
SHA_SHOWN = 12  # hexadecimal digits in the table; the `model-index` has all
# Of config.json: who wrote it, from where its code is loaded, and the dtype, for all is measured in float32.
BOOKKEEPING = ("transformers_version", "auto_map", "dtype", "torch_dtype", "_name_or_path")
# Nats and bits of a text: exact of a causal class, a bound of a masked one.
LIKELIHOODS = ("nll", "nelbo", "bits_per_byte", "nats_per_token", "nats_per_answer")


def sentence(template: str, *values) -> str | None:
    """The template with its values; `None` if one is missing."""
    return None if None in values else template.format(*values)


def number(value) -> str | None:
    """Four digits of a float, all of an integer; `None` for `None`."""
    if value is None:
        return None
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


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
    [`BOOKKEEPING`], so that a key that is new here counts.

    Raises:
        `ValueError`: for a config.json that is not there or no JSON object.
    """
    config = {name: value for name, value in _read_config(folder).items() if name not in BOOKKEEPING}
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _read_config(folder: str | os.PathLike) -> dict:
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"`folder` must hold a readable config.json, got {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"`folder` must hold a JSON object in config.json, got {type(config).__name__}")
    return config


def model_digests(folder: str | os.PathLike) -> dict[str, str]:
    """What evaluation.json says of the model: `weights_sha256` and `config_sha256`."""
    return {"weights_sha256": weights_digest(folder), "config_sha256": config_digest(folder)}


def check_model(evaluation: dict, folder: Path, file: str = EVALUATION) -> None:
    """
    Whether results are of the model in a folder.

    Args:
        evaluation (`dict`): Content of evaluation.json.
        folder (`Path`): With config.json and safetensors.
        file (`str`): What messages call the evaluation.

    Raises:
        `ValueError`: if a digest is missing or another's, for results that such a class does not have, and as
            `results_of`.
    """
    for name, digest in model_digests(folder).items():
        got = evaluation.get(name)
        if got is None:
            raise ValueError(f"{file} must name its model by `{name}`, got none (of an older version? measure again)")
        if got != digest:
            raise ValueError(f"{file} must be of the model in {folder.name}, got `{name}` {got}")
    architecture = str((_read_config(folder).get("architectures") or [None])[0])
    for result in results_of(evaluation):
        bound, likelihood = bool(result.get("bound")), result["metric"] in LIKELIHOODS
        if bound != ("MaskedLM" in architecture) and (bound or likelihood):
            kind = "upper bounds of a masked class and exact likelihoods of a causal one"
            raise ValueError(f"{file} must hold {kind}, got {metric_name(result)} of {architecture}")


# ---- one result


def _finite(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _name(value) -> bool:
    return isinstance(value, str) and re.fullmatch(r"\S(.*\S)?", value, re.DOTALL) is not None


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
TRUE, FALSE = ("true", lambda value: value is True), ("false", lambda value: value is False)
OBJECT = ("an object", lambda value: isinstance(value, dict))
DIGEST = ("64 hexadecimal digits", lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value))

RUN = {"command": _or_null(NAME), "seed": _or_null(SEED)}
OF_DATA = {"data": NAME, "settings": _or_null(OBJECT), **RUN}
LIKELIHOOD = {"bits_per_byte": SIZE, "nats_per_token": _or_null(SIZE), "standard_error": SIZE, **OF_DATA}
LIKELIHOOD |= {"sampling_error": _or_null(SIZE), "estimator": _or_null(NAME)}
LIKELIHOOD |= dict.fromkeys(("tokens", "bytes", "documents", "rows", "samples", "max_length"), _or_null(COUNT))
FIELDS = {
    "nll": {**LIKELIHOOD, "bound": FALSE},
    "nelbo": {**LIKELIHOOD, "bound": TRUE},
    "exact_match": {"value": SHARE, "standard_error": SIZE, "bound": _or_null(FALSE), "rows": COUNT, **OF_DATA},
}
FIELDS["exact_match"] |= dict.fromkeys(("correct", "truncated"), _or_null(AMOUNT))
SUITE_FIELDS = {"task": NAME, "metric": NAME, "standard_error": _or_null(SIZE), "bound": FLAG, "rows": COUNT}
SUITE_FIELDS |= {**OF_DATA, "data": _or_null(NAME), "data_sha256": _or_null(DIGEST), "chance": _or_null(SHARE)}
SUITE_FIELDS |= {"language": _or_null(NAME), "unit": _or_null(NAME)}
SHARES = ("acc", "acc_norm", "acc_bytes", "accuracy", "exact_match", "f1", "greedy_match", "ended")  # or by their unit


def results_of(evaluation: dict) -> list[dict]:
    """
    The results of an evaluation, each checked by the rules of its kind.

    Raises:
        `ValueError`: for any other, naming the field; one that is missing counts as null.
    """
    results = evaluation.get("results")
    if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
        raise ValueError(f"`evaluation` must hold a list of `results`, got {type(results).__name__}")
    _check_fields(evaluation, {**RUN, "of": _or_null(NAME)}, "the run")
    for result in results:
        _check_result(result)
    return results


def _check_result(result: dict) -> None:
    metric = result.get("metric")
    if not is_suite(result):
        if not isinstance(metric, str) or metric not in METRICS:
            raise ValueError(f"`metric` in `evaluation` must be one of {', '.join(METRICS)}, got {metric!r}")
        _check_fields(result, FIELDS[metric], f"{metric} on {result.get('data')}")
        return
    _check_fields(result, SUITE_FIELDS, f"task {result['task']!r}")
    if "standard_error" not in result:  # null says that none is defined
        raise ValueError(f"`evaluation` must give `standard_error` of task {result['task']!r}, or null, got none")
    kind, _, variant = metric.partition("/")
    share = kind in SHARES or str(result.get("unit")).startswith("share")
    value = SIZE if not share else DIFFERENCE if " − " in variant else SHARE  # of one decoding setting to another
    _check_fields(result, {"value": value}, f"{metric} of task {result['task']!r}")


def _check_fields(given: dict, rules: dict, of: str) -> None:
    for name, (kind, good) in rules.items():
        if not good(given.get(name)):
            raise ValueError(f"`evaluation` must give `{name}` of {of} as {kind}, got {given.get(name)!r}")


def is_suite(result: dict) -> bool:
    """Whether a result is a row of the suite, which names its task; likelihood and exact match of `data` name none."""
    return "task" in result


def metric_type(result: dict) -> str:
    """The metric's name on the Hub."""
    if is_suite(result):
        return result["metric"]
    return "exact_match" if result["metric"] == "exact_match" else "bits_per_byte"


def metric_name(result: dict) -> str:
    """The metric's name for a reader."""
    kind, _, preset = metric_type(result).partition("/")  # "accuracy/on": of one of several decoding settings
    if not is_suite(result):
        return METRICS[result["metric"]]
    parts = [SUITE_METRICS.get(kind, kind.replace("_", " ")), preset, "upper bound" if result["bound"] else ""]
    return ", ".join(part for part in parts if part)


def value_of(result: dict) -> float:
    """The result's number."""
    return result["value" if is_suite(result) or result["metric"] == "exact_match" else "bits_per_byte"]


def _data_of(result: dict) -> str:
    """The data's name; a task that makes its own rows is its own data."""
    return result["task"] if is_suite(result) and result.get("data") is None else str(result.get("data"))


def settings_of(result: dict) -> dict:
    """The settings that were set."""
    return {key: item for key, item in (result.get("settings") or {}).items() if item is not None}


# ---- the model-index


def eval_results(evaluation: dict, repo_id: str, revision: str = "main") -> list:
    """
    Every result as huggingface_hub's `EvalResult`, its source being evaluation.json in the repository. A `repo_id`
    without an owner is no repository, and gives no source: uploading adds it.

    A suite's task is the `dataset_config`, the SHA-256 of its data the `dataset_revision` (both keep results of other
    tasks and other data apart in the index); what else makes the number stands in `metric_args`.

    Raises:
        `ValueError`: as `results_of`.
    """
    from huggingface_hub import EvalResult

    source = {"source_name": EVALUATION, "source_url": _source_url(repo_id, revision)} if "/" in repo_id else {}
    found = []
    for result in results_of(evaluation):
        value, error, data = value_of(result), result["standard_error"], _data_of(result)
        arguments = {} if error is None else {"standard_error": round(error, 6)}
        of_suite = {}
        if is_suite(result):
            of_suite = {"dataset_config": result["task"], "dataset_revision": result.get("data_sha256")}
            named = {name: result.get(name) for name in ("language", "chance", "rows", "unit")}
            arguments |= {name: item for name, item in named.items() if item is not None}
            arguments |= {"bound": True} if result.get("bound") else {}
            arguments |= {"settings": settings_of(result)} if settings_of(result) else {}
        found.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=re.sub(r"[^\w.-]+", "-", data),
                dataset_name=data,
                metric_type=metric_type(result),
                metric_value=round(value, 6),
                metric_name=metric_name(result),
                metric_args=arguments or None,
                **of_suite,
                **source,
            )
        )
    return found


def with_source(card: str, repo_id: str, revision: str = "main") -> str:
    """
    The card's text with `repo_id` in the addresses of evaluation.json in its metadata. Results of its `model-index`
    without a source get that one.
    """
    from huggingface_hub import ModelCard

    url = _source_url(repo_id, revision)
    metadata, end, text = card.partition("\n---")
    card = SOURCE_URL.sub(lambda _: url, metadata) + end + text
    model_card = ModelCard(card)
    bare = [result for result in model_card.data.eval_results or [] if result.source_url is None]
    for result in bare:
        result.source_name, result.source_url = EVALUATION, url
    return str(model_card) if bare else card


def _source_url(repo_id: str, revision: str) -> str:
    return SOURCE.format(repo_id=quote(repo_id), revision=quote(revision))


# ---- the section


def evaluation_section(evaluation: dict) -> str:
    """
    The section's text between [`START`] and [`END`]: a table of the results on data, a table of the suite's, what ≤
    means, and the commands. Empty without results.

    Raises:
        `ValueError`: as `results_of`.
    """
    results = results_of(evaluation)
    if not results:
        return ""
    rows = [_data_row(result) for result in results if not is_suite(result)]
    suite = [_suite_row(result) for result in results if is_suite(result)]
    parts = [_table(COLUMNS, rows), _table(SUITE_COLUMNS, suite)]
    if suite:
        parts.append("± is one standard error; where there is none, none is defined. Chance is the score of guessing.")
    if any(result.get("bound") for result in results):
        parts.append(
            "≤ marks an upper bound (the negated evidence lower bound of a diffusion model): the exact number is at "
            "most that."
        )
    if evaluation.get("of"):
        parts.append(f"Measured at {evaluation['of']}.")
    for run in _commands(evaluation):
        parts.append(sentence("Seed {}:", run.get("seed")))
        parts.append(f"```bash\n{run['command']}\n```")
    return "\n\n".join([START, *(part for part in parts if part), END])


def _table(columns: tuple[str, ...], rows: list[list[str]]) -> str | None:
    if not rows:
        return None
    lines = [columns, ["---"] * len(columns), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _data_row(result: dict) -> list[str]:
    scored = [sentence("{} " + key, number(result.get(key))) for key in ("tokens", "bytes", "documents", "rows")]
    settings = [f"{key} = {item}" for key, item in settings_of(result).items()]
    samples = sentence("{} samples", number(result.get("samples")))
    length = sentence("at most {} tokens a row", number(result.get("max_length")))
    how = [result.get("estimator") or samples, length, *settings]
    return [
        f"`{result.get('data')}`",
        metric_name(result),
        f"{'≤ ' if result.get('bound') else ''}{value_of(result):.4f}",
        _errors(result),
        ", ".join(part for part in scored if part) or "–",
        ", ".join(part for part in how if part) or "–",
    ]


def _errors(result: dict) -> str:
    """Standard errors, each with what it is over: the random masks, or other rows of the same kind."""
    error, sampling = result["standard_error"], result.get("sampling_error")
    if result["metric"] == "exact_match":
        return f"± {error:.4f} (rows)"
    noise = f"± {error:.4f} (masks)" if error else "0 (nothing is drawn)"
    return noise if sampling is None else f"{noise}, ± {sampling:.4f} (rows)"


def _suite_row(result: dict) -> list[str]:
    name, value, error = metric_name(result), value_of(result), result["standard_error"]
    digits = 4 if abs(value) < 100 or 0 < (error or 0) < 0.1 else 1  # shares and bits; tokens per second
    shown = f"{'≤ ' if result.get('bound') else ''}{value:,.{digits}f}"
    shown += "" if error is None else f" ± {error:,.{digits}f}"
    digest = result.get("data_sha256")
    return [
        result["task"],
        result.get("language") or "–",
        f"{name} ({result['unit']})" if result.get("unit") else name,
        shown,
        number(result.get("chance")) or "–",
        number(result["rows"]),
        f"`{_data_of(result)}`" + (f" (SHA-256 {digest[:SHA_SHOWN]}…)" if digest else ""),
        _settings_shown(settings_of(result)) or "–",
    ]


def _settings_shown(settings: dict) -> str:
    """
    A list; mappings as JSON. What `generate` was given stands in it by its own names, in place of the mappings of the
    task that this follows from.
    """
    generate = settings.get("generate")
    if isinstance(generate, dict):
        settings = {key: item for key, item in settings.items() if key not in ("generate", "decoding", "presets")}
        settings |= {key: item for key, item in generate.items() if item is not None}
    items = settings.items()
    shown = ((key, json.dumps(item, ensure_ascii=False) if isinstance(item, dict) else item) for key, item in items)
    return ", ".join(f"{key} = {item}" for key, item in shown)


def _commands(evaluation: dict) -> list[dict]:
    """Every command that results came from, once; older files have one for all."""
    runs = [{name: result.get(name) for name in ("command", "seed")} for result in evaluation["results"]]
    runs = [run for run in runs if run["command"]] or [evaluation]
    return [run for place, run in enumerate(runs) if run.get("command") and run not in runs[:place]]
