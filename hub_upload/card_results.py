"""Results in the card, from evaluation.json alone: the evaluation section and the `model-index`.

Above its functions this file imports the standard library and its neighbour only, so that verify.py has it where
nanollada is not installed.
"""

import itertools
import json
import re
import shlex
from urllib.parse import quote

if __package__:
    from nanollada.hub_upload.evaluation_file import EVALUATION, results_of
else:  # verify.py runs by its path, without nanollada
    from evaluation_file import EVALUATION, results_of

# What stands between these two lines of a card is checked; prose belongs outside.
START = "<!-- made from evaluation.json and checked before every upload: do not edit -->"
END = "<!-- end of what is made from evaluation.json -->"
# Where a `model-index` result says it is from. Only the repository's name differs between folder and Hub.
SOURCE = "https://huggingface.co/{repo_id}/blob/{revision}/" + EVALUATION
SOURCE_URL = re.compile(r"https://huggingface\.co/[^\s'\"]+/blob/[^\s'\"]+/" + re.escape(EVALUATION))

NAMES = {
    "bits_per_byte": "bits per byte",
    "acc": "accuracy",
    "acc_norm": "accuracy, normalised by length",
    "exact_match": "exact match",
    "f1": "F1",
    "tokens_per_second": "tokens per second",
}
COLUMNS = ("Task", "Language", "Metric", "Value ± s.e.", "Chance", "Scored on", "Data", "How")
# What a recorded command may begin with: our programs, by folder, and what starts them.
PROGRAMS = {
    "scripts": "benchmark compare convert_checkpoint demo editing_study evaluate generate lm_eval_nanollada "
    "merge_checkpoints pairs post_training_study puzzles quickstart study technical_report train_tokenizer",
    "trainers": "causal diffusion dpo grpo",
    "hub_upload": "export upload verify",
}
PROGRAMS = {room: [f"{name}.py" for name in names.split()] for room, names in PROGRAMS.items()}
RUNNERS = ("accelerate", "python", "torchrun", "nanollada")
WIDTH = 100  # of a command that stays on one line
SHA_SHOWN = 12  # hexadecimal digits in the table; the `model-index` has all


def sentence(template: str, *values) -> str | None:
    """The template with its values; `None` if one is missing."""
    return None if None in values else template.format(*values)


def number(value) -> str | None:
    """Four digits of a float, all of an integer; `None` for `None`."""
    if value is None:
        return None
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


# ---- commands


def command_block(command: str) -> str:
    """
    A recorded command as a block of shell, run from the repository's root: an option a line if it is long. What no
    program of the package computed (a notebook, `python -c`) is said instead.
    """
    try:
        words = shlex.split(command)
    except ValueError:  # an open quote
        words = [command]
    room = next((room for room, names in PROGRAMS.items() if words and words[0] in names), None)
    if room is not None:
        words = ["python", f"{room}/{words[0]}", *words[1:]]
    elif not words or words[0] not in RUNNERS:
        return f"By Python code (`{words[0] if words else ''}`), not by a command of nanollada."
    line = shlex.join(words)
    if len(line) > WIDTH:
        starts = [0, *(place for place, word in enumerate(words) if place and word.startswith("--")), len(words)]
        line = " \\\n  ".join(shlex.join(words[a:b]) for a, b in itertools.pairwise(starts))
    return f"```bash\n{line}\n```"


# ---- one result


def metric_name(result: dict) -> str:
    """The metric's name for a reader."""
    metric, _, preset = result["metric"].partition("/")  # "accuracy/on": of one of several decoding settings
    parts = [NAMES.get(metric, metric.replace("_", " ")), preset, "upper bound" if result["bound"] else ""]
    return ", ".join(part for part in parts if part)


def _data_of(result: dict) -> str:
    """The data's name; a task that makes its own rows is its own data."""
    return result["task"] if result.get("data") is None else result["data"]


def _has_interval(result: dict) -> bool:
    """Whether Wilson's interval says more than the standard error: where all or none hit, that is 0."""
    return bool(result.get("interval")) and not result["standard_error"]


def settings_of(result: dict) -> dict:
    """The settings that were set."""
    return {key: item for key, item in (result.get("settings") or {}).items() if item is not None}


# ---- the model-index


def eval_results(evaluation: dict, repo_id: str, revision: str = "main") -> list:
    """
    Every result as huggingface_hub's `EvalResult`, its source being evaluation.json in the repository. A `repo_id`
    without an owner is no repository, and gives no source: uploading adds it.

    The task is the `dataset_config`, the SHA-256 of its data the `dataset_revision` (both keep results of other
    tasks and other data apart in the index); what else makes the number stands in `metric_args`.

    Raises:
        `ValueError`: as `results_of`.
    """
    source = {"source_name": EVALUATION, "source_url": _source_url(repo_id, revision)} if "/" in repo_id else {}
    return [_eval_result(result, source) for result in results_of(evaluation)]


def _eval_result(result: dict, source: dict):
    from huggingface_hub import EvalResult

    data, error = _data_of(result), result["standard_error"]
    arguments = {} if error is None else {"standard_error": round(error, 6)}
    arguments |= {"interval": [round(end, 6) for end in result["interval"]]} if _has_interval(result) else {}
    named = {name: result.get(name) for name in ("language", "chance", "rows", "unit")}
    arguments |= {name: item for name, item in named.items() if item is not None}
    arguments |= {"bound": True} if result["bound"] else {}
    arguments |= {"settings": settings_of(result)} if settings_of(result) else {}
    return EvalResult(
        task_type="text-generation",
        dataset_type=re.sub(r"[^\w.-]+", "-", data),
        dataset_name=data,
        dataset_config=result["task"],
        dataset_revision=result.get("data_sha256"),
        metric_type=result["metric"],
        metric_value=round(result["value"], 6),
        metric_name=metric_name(result),
        metric_args=arguments or None,
        **source,
    )


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
    The section's text between [`START`] and [`END`]: a table of the results, what its signs mean, and the commands.
    Empty without results.

    Raises:
        `ValueError`: as `results_of`.
    """
    results = results_of(evaluation)
    if not results:
        return ""
    parts = [_table([_row(result) for result in results])]
    parts.append(
        "± is one standard error over the rows, in brackets that of the random masks alone; where there is none, none "
        "is defined. Chance is the score of guessing."
    )
    if any(map(_has_interval, results)):
        parts.append("[a, b] is Wilson's 95 % interval of a share that is 0 or 1, whose standard error would be 0.")
    if any(result["bound"] for result in results):
        parts.append(
            "≤ marks an upper bound (the negated evidence lower bound of a diffusion model): the exact number is at "
            "most that."
        )
    if evaluation.get("of"):
        parts.append(f"Measured at {evaluation['of']}.")
    for run in _commands(evaluation):
        parts += [] if run.get("seed") is None else [f"Seed {run['seed']}:"]
        parts.append(command_block(run["command"]))
    return "\n\n".join([START, *parts, END])


def _table(rows: list[list[str]]) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _row(result: dict) -> list[str]:
    name, value, error = metric_name(result), result["value"], result["standard_error"]
    digits = 4 if abs(value) < 100 or 0 < (error or 0) < 0.1 else 1  # shares and bits; tokens per second
    shown = f"{'≤ ' if result['bound'] else ''}{value:,.{digits}f}"
    if _has_interval(result):
        shown += " [{:.4f}, {:.4f}]".format(*result["interval"])
    else:
        shown += "" if error is None else f" ± {error:,.{digits}f}"
    shown += f" (masks ± {result['mask_error']:,.{digits}f})" if result.get("mask_error") else ""
    digest = result.get("data_sha256")
    counts = [f"{result[name]:,} {name}" for name in ("rows", "tokens", "bytes", "documents") if result.get(name)]
    return [
        result["task"],
        result.get("language") or "–",
        f"{name} ({result['unit']})" if result.get("unit") else name,
        shown,
        number(result.get("chance")) or "–",
        ", ".join(counts) or "–",
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
