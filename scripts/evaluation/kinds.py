"""The kinds of tasks: a kind is a file in `tasks/` and an entry here."""

from nanollada.scripts.evaluation.bench import Kind, Metric, default_of, rule_of
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
