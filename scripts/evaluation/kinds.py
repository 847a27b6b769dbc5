"""The kinds of tasks: a kind is a file in `tasks/` and an entry here."""

from nanollada.scripts.evaluation.bench import Bench, Kind, Metric, Outcome, Planned, default_of, rule_of
from nanollada.scripts.evaluation.tasks import choice, cloze, free_text, generation, pairs, presets, speed, text

KINDS: dict[str, Kind] = {
    "text": text.KIND,
    "choice": choice.KIND,
    "cloze": cloze.KIND,
    "pairs": pairs.KIND,
    "generation": generation.KIND,
    "presets": presets.KIND,
    "statistics": free_text.KIND,
    "speed": speed.KIND,
}


def metric_of(kind: str, name: str) -> Metric:
    """What a kind says of a figure by its name in a result, with its group or preset ("accuracy/on")."""
    return KINDS[kind].metrics[name.partition("/")[0]]


def results_of(item: Planned, bench: Bench, outcome: Outcome, run: dict, **settings) -> list[dict]:
    """
    The figures of a task as `evaluation.json` has them, each with all that it takes to read and to repeat it.

    Args:
        item, bench, outcome: What was measured, on what, and what came of it.
        run (`dict`): `command` and `seed`.
        settings: What else decided the figures.
    """
    task, kind = item.task, KINDS[item.task.kind]
    settings = {**task.settings(), **outcome.settings, **settings}
    if kind.scored:
        settings["score"] = "upper bound of the NLL" if bench.is_diffusion else "exact NLL"
        settings |= {"samples": bench.samples} if bench.is_diffusion else {}
    shared = {"data": item.source, "data_sha256": item.digest}
    results = []
    for figure in outcome.results:
        figure = dict(figure)
        generate = {"generate": figure.pop("generate")} if "generate" in figure else {}
        result = {"task": task.name, "kind": task.kind, "language": task.language}
        result |= {name: figure.pop(name) for name in ("metric", "value", "standard_error")}
        result |= {"bound": False, "unit": metric_of(task.kind, result["metric"]).unit, "chance": None}
        results.append({**result, **figure, **shared, "settings": {**settings, **generate}, **run})
    return results


def definitions(results: list[dict]) -> dict[str, str]:
    """What the figures of these results mean, in the words of the kinds that gave them."""
    texts: dict[str, dict[str, None]] = {}
    given = {(result["kind"], result["metric"].partition("/")[0]) for result in results}
    for kind, entry in KINDS.items():
        for name, metric in entry.metrics.items():
            if (kind, name) in given:
                texts.setdefault(name, {})[metric.definition] = None
    return {name: " / ".join(found) for name, found in texts.items()}


def documentation() -> str:
    """Every kind with its settings (default and rule) and its figures, as `evaluate.py --help` shows them."""
    parts = []
    for name, kind in KINDS.items():
        lines = [f"{name}: {kind.title}"]
        lines += [f"  {key} ({default_of(item)}): {rule_of(item)}" for key, item in kind.task.own().items()]
        lines.append(f"  gives {', '.join(kind.metrics)}")
        parts.append("\n".join(lines))
    return "\n".join(parts)
