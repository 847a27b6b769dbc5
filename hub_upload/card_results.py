"""Results in the card, from evaluation.json alone: the evaluation section, the `model-index`, and their check.

[`card_faults`] makes both again from the evaluation.json that lies beside a README.md, and compares: a card cannot say
a number that no file holds. Above its functions this file imports the standard library only, so that verify.py has it
where nanollada is not installed.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
from difflib import SequenceMatcher
from itertools import zip_longest
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


def weights_digest(folder: str | os.PathLike) -> str:
    """SHA-256 over the SHA-256 of each of a folder's safetensors files, sorted by name, as in evaluation.json."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        with open(path, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def sentence(template: str, *values) -> str | None:
    """The template with its values; `None` if one is missing."""
    return None if None in values else template.format(*values)


def number(value) -> str | None:
    """Four digits of a float, all of an integer; `None` for `None`."""
    if value is None:
        return None
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


# ---- one result


def is_suite(result: dict) -> bool:
    """Whether a result is a row of the suite, which names its task; likelihood and exact match of `data` name none."""
    return "task" in result


def metric_type(result: dict) -> str:
    """The metric's name on the Hub. `ValueError` for a metric that is unknown, or no name."""
    metric = result.get("metric")
    if is_suite(result):
        if not isinstance(metric, str) or not re.fullmatch(r"\S(.*\S)?", metric):
            raise ValueError(f"`metric` in `evaluation` must be a name, got {metric!r}")
        return metric
    if metric not in METRICS:
        raise ValueError(f"`metric` in `evaluation` must be one of {', '.join(METRICS)}, got {metric!r}")
    return "exact_match" if metric == "exact_match" else "bits_per_byte"


def metric_name(result: dict) -> str:
    """The metric's name for a reader."""
    kind, _, preset = metric_type(result).partition("/")  # "accuracy/on": of one of several decoding settings
    if not is_suite(result):
        return METRICS[result["metric"]]
    parts = [SUITE_METRICS.get(kind, kind.replace("_", " ")), preset, "upper bound" if result.get("bound") else ""]
    return ", ".join(part for part in parts if part)


def value_of(result: dict) -> float:
    """
    The result's number.

    Raises:
        `ValueError`: if value or standard error is no finite number (a suite's error may be `None`: undefined), and
            for a suite's row without task or rows.
    """
    suite, metric = is_suite(result), result.get("metric")
    key = "value" if suite or metric == "exact_match" else "bits_per_byte"
    for name in (key, "standard_error"):
        undefined = suite and name == "standard_error" and result.get(name, 0) is None
        if not undefined and not _finite(result.get(name)):
            raise ValueError(
                f"`evaluation` must give `{name}` of {metric} as a number, got {result.get(name)!r} for "
                f"{result['task'] if suite else result.get('data')}"
            )
    if suite:
        _check_suite_row(result)
    return result[key]


def _finite(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_suite_row(result: dict) -> None:
    """The protocol without which a number of the suite says nothing."""
    rules = {
        "task": ("a name", lambda value: isinstance(value, str) and value),
        "data": ("a name or null", lambda value: value is None or (isinstance(value, str) and value)),
        "rows": ("a number of rows", lambda value: isinstance(value, int) and value is not True and value > 0),
        "chance": ("a number or null", lambda value: value is None or _finite(value)),
        "settings": ("an object", lambda value: value is None or isinstance(value, dict)),
    }
    for name, (kind, good) in rules.items():
        if not good(result.get(name)):
            raise ValueError(
                f"`evaluation` must give `{name}` of task {result['task']!r} as {kind}, got {result.get(name)!r}"
            )


def _data_of(result: dict) -> str:
    """The data's name; a task that makes its own rows is its own data."""
    return result["task"] if is_suite(result) and result.get("data") is None else str(result.get("data"))


def settings_of(result: dict) -> dict:
    """The settings that were set."""
    return {key: item for key, item in (result.get("settings") or {}).items() if item is not None}


# ---- the model-index


def eval_results(evaluation: dict, repo_id: str, revision: str = "main") -> list:
    """
    Every result as huggingface_hub's `EvalResult`, its source being evaluation.json in the repository.

    A suite's task is the `dataset_config`, the SHA-256 of its data the `dataset_revision` (both keep results of other
    tasks and other data apart in the index); what else makes the number stands in `metric_args`.
    """
    from huggingface_hub import EvalResult

    source = {"source_name": EVALUATION, "source_url": _source_url(repo_id, revision)}
    found = []
    for result in evaluation.get("results", []):
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
    """The card's text with `repo_id` in the addresses of evaluation.json in its metadata."""
    metadata, end, text = card.partition("\n---")
    return SOURCE_URL.sub(lambda _: _source_url(repo_id, revision), metadata) + end + text


def _source_url(repo_id: str, revision: str) -> str:
    return SOURCE.format(repo_id=quote(repo_id), revision=quote(revision))


# ---- the section


def evaluation_section(evaluation: dict) -> str:
    """
    The section's text between [`START`] and [`END`]: a table of the results on data, a table of the suite's, what ≤
    means, and the commands. Empty without results.

    Raises:
        `ValueError`: as `value_of` and `metric_type`.
    """
    results = evaluation.get("results", [])
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
    name = metric_name(result)  # before the value: an unknown metric is named as such
    return [
        f"`{result.get('data')}`",
        name,
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
    runs = [{name: result.get(name) for name in ("command", "seed")} for result in evaluation.get("results", [])]
    runs = [run for run in runs if run["command"]] or [evaluation]
    return [run for place, run in enumerate(runs) if run.get("command") and run not in runs[:place]]


# ---- the check


def card_faults(folder: str | os.PathLike) -> list[str]:
    """
    Compares a folder's card with the evaluation.json beside it.

    Every result of the card's `model-index` must be one of the file's: same value, metric, dataset, error and
    settings; that some are left out is no fault. The marked section must be the file's, line by line (blank lines and
    the padding of table cells don't count). The file must be of the folder's weights. Prose outside the marks is the
    writer's own. Results of other tools in the `model-index` are faults, too: nobody could check them.

    Args:
        folder (`str` or `os.PathLike`): With README.md.

    Returns:
        `list[str]`: the faults, each naming the number or the line; empty for a good card.
    """
    folder = Path(folder)
    text = (folder / "README.md").read_text(encoding="utf-8")
    section, faults = _marked(text)
    try:
        found = _index_of(text)
    except Exception as error:  # whatever the YAML parser and huggingface_hub raise
        return [*faults, f"README.md must have readable metadata, got {error}"]
    said = [_say(result) for result in found] or _values_said(section)
    try:
        evaluation = _read_evaluation(folder)
    except ValueError as error:
        needed = said or (folder / EVALUATION).is_file()  # what is there must be good, even if no number is said
        return [*faults, f"{error}; README.md says {_some(said)}"] if needed else faults
    try:
        expected, source = _through_index(eval_results(evaluation, "any/name")), evaluation_section(evaluation)
    except ValueError as error:
        return [*faults, f"{EVALUATION} must hold results, got {error}"]
    return [*faults, *_index_faults(found, expected), *_section_faults(section, source)]


def _read_evaluation(folder: Path) -> dict:
    path = folder / EVALUATION
    if not path.is_file():
        raise ValueError(f"`folder` must hold {EVALUATION}, got none in {folder.name}")
    try:
        evaluation = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{EVALUATION} must be JSON, got {error}") from error
    results = evaluation.get("results") if isinstance(evaluation, dict) else None
    if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
        raise ValueError(f"{EVALUATION} must hold a list of `results`, got {type(results).__name__}")
    if evaluation.get("weights_sha256") != weights_digest(folder):
        digest = evaluation.get("weights_sha256")
        raise ValueError(f"{EVALUATION} must be of the weights in {folder.name}, got `weights_sha256` {digest}")
    return evaluation


def _marked(text: str) -> tuple[list[str], list[str]]:
    """The lines between the marks, and what is wrong with the marks."""
    marks, section = (text.count(START), text.count(END)), ""
    faults = []
    if marks == (1, 1) and text.index(START) < text.index(END):
        before, _, rest = text.partition(START)
        section, _, after = rest.partition(END)
        text = before + after
    elif marks != (0, 0):
        faults.append(f"README.md must hold the marks of the evaluation once, in order, got {marks[0]} and {marks[1]}")
    outside = {_canonical(line) for line in text.splitlines()}
    tables = [columns for columns in (COLUMNS, SUITE_COLUMNS) if _canonical(f"| {' | '.join(columns)} |") in outside]
    if tables and not faults:
        faults.append("README.md must keep the table of results between its marks, got one outside (export again?)")
    return [_canonical(line) for line in section.splitlines() if line.strip()], faults


def _canonical(line: str) -> str:
    """Without what formatters of Markdown change in a table."""
    line = line.strip()
    return re.sub(r"-{3,}", "---", re.sub(r"\s*\|\s*", "|", line)) if line.startswith("|") else line


def _cells(line: str) -> list[str]:
    return re.split(r"(?<!\\)\|", line)[1:-1] if line.startswith("|") else []


def _values_said(section: list[str]) -> list[str]:
    """Lines of the tables, without their heads."""
    rows = [", ".join(_cells(line)) for line in section if line.startswith("|")]
    heads = [", ".join(columns) for columns in (COLUMNS, SUITE_COLUMNS)]
    return [row for row in rows if row not in heads and not row.startswith("---")]


def _index_of(text: str) -> list:
    from huggingface_hub import ModelCard

    _check_keys(text)
    return ModelCard(text).data.eval_results or []


def _check_keys(text: str) -> None:
    """`ValueError` for a key that stands twice: huggingface_hub reads the last of its values, others the first."""
    import yaml
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    block = REGEX_YAML_BLOCK.search(text)
    nodes = [yaml.compose(block.group(2))] if block else []
    while nodes:
        node = nodes.pop()
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        keys = [key.value for key, _ in pairs]
        twice = [key for place, key in enumerate(keys) if key in keys[:place]]
        if twice:
            raise ValueError(f"`{twice[0]}` more than once")
        nodes += [value for _, value in pairs]
        nodes += node.value if isinstance(node, yaml.SequenceNode) else []


def _through_index(results: list) -> list:
    """As they come back from a card: what is `None` is gone."""
    from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

    return model_index_to_eval_results(eval_results_to_model_index("any", results))[1]


def _say(result) -> str:
    """A result of the index in words."""
    arguments = result.metric_args if isinstance(result.metric_args, dict) else {}
    error = arguments.get("standard_error")
    error = "" if error is None else f" ± {error}"
    config = f" ({result.dataset_config})" if result.dataset_config else ""
    return f"{result.metric_type} {result.metric_value}{error} on {result.dataset_name}{config}"


def _some(texts: list[str], shown: int = 3) -> str:
    more = f" and {len(texts) - shown} more" if len(texts) > shown else ""
    return "; ".join(texts[:shown]) + more if texts else "no number"


def _fields(result) -> dict:
    """What must agree; a source that is our file may have any repository's name, or be left out."""
    fields = dataclasses.asdict(result)
    name, url = fields.pop("source_name"), fields.pop("source_url")
    ours = (name, url) == (None, None) or (name == EVALUATION and SOURCE_URL.fullmatch(str(url)))
    return fields if ours else {**fields, "source": f"{name} ({url})"}


def _index_faults(found: list, expected: list) -> list[str]:
    def place(result):
        return result.dataset_name, result.dataset_config, result.metric_type

    source = [_fields(result) for result in expected]
    said = [_fields(result) for result in found]
    faults = []
    for result, fields in zip(found, said, strict=True):
        if fields in source:
            continue
        alike = [other for other in expected if place(other) == place(result)]
        alike = [other for other in alike if _fields(other) not in said] or alike
        has = " and ".join(_say(other) for other in alike) or "no such result"
        if alike and _say(alike[0]) == _say(result):
            other = _fields(alike[0])
            odd = [name for name in fields if fields[name] != other.get(name)]
            has += f", but {', '.join(f'`{name}` {other.get(name)!r} and not {fields[name]!r}' for name in odd)}"
        elif not alike:
            has += " (what other tools measured is prose: write it outside `model-index` and the marks)"
        faults.append(f"README.md says {_say(result)}, {EVALUATION} has {has}")
    return faults


def _section_faults(section: list[str], source: str) -> list[str]:
    """A card may leave the whole section out, and no line of it."""
    if not section:
        return []
    expected = [_canonical(line) for line in source.splitlines() if line.strip()][1:-1]  # without the marks
    faults = []
    for tag, start, end, other, other_end in SequenceMatcher(None, section, expected, False).get_opcodes():
        pairs = zip_longest(section[start:end], expected[other:other_end]) if tag != "equal" else ()
        faults += [_difference(mine, theirs) for mine, theirs in pairs]
    return faults


def _difference(mine: str | None, theirs: str | None) -> str:
    if mine is None:
        return f"README.md leaves out {theirs!r} of {EVALUATION}"
    cells, others = _cells(mine), _cells(theirs or "")
    if not cells or len(cells) != len(others) or cells[0] != others[0]:
        return f"README.md says {mine!r}, {EVALUATION} has {'no such line' if theirs is None else repr(theirs)}"
    same = [cell for cell, other in zip(cells, others, strict=True) if cell == other][:3]
    odd = [(cell, other) for cell, other in zip(cells, others, strict=True) if cell != other]
    says, has = (", ".join(side) for side in zip(*odd, strict=True))
    return f"README.md says {says} for {', '.join(same)}; {EVALUATION} has {has}"
