"""An evaluation suite's tables and plot, from the content of its `suite.json` alone."""

from pathlib import Path

from nanollada.scripts.evaluation.kinds import KINDS, metric_of
from nanollada.scripts.reporting.plots import panels, save_figure
from nanollada.scripts.reporting.tables import markdown, share_with_error, with_error
from nanollada.trainers.scoring.estimates import wilson

# ---- tables


def cell(result: dict | None) -> str:
    """A figure with its error: `≤` before a bound, Wilson's interval where all or none hit."""
    if result is None:
        return "–"
    value, error, unit = result["value"], result["standard_error"], result["unit"]
    if unit == "share, difference":
        return f"{100 * value:+.1f}" + ("" if error is None else f" ± {100 * error:.1f}")
    if unit == "share":
        text = share_with_error(result)
        return text + (f" (open {100 * result['open_share']:.1f} %)" if result.get("open_share") else "")
    digits = metric_of(result["kind"], result["metric"]).digits
    text = with_error(value, error, digits, result["bound"])
    return text + (f" (masks ± {result['mask_error']:.{digits}f})" if result.get("mask_error") else "")


def tables(found: dict) -> str:
    """
    Markdown: a table per kind of task, a column per model; the models; what the figures mean, and how they came.

    Args:
        found (`dict`): The content of `suite.json`.
    """
    parts = [f"# {found['protocol']['description'] or found['protocol']['suite']}\n"]
    parts += [f"## {title}\n\n{text}" for title, text in kind_tables(found)]
    parts.append(f"## Models\n\n{_model_table(found['models'])}")
    parts.append(_notes(found))
    return "\n".join(parts)


def kind_tables(found: dict) -> list[tuple[str, str]]:
    """Title and table of each kind of task, and of its groups."""
    models, made = [model["name"] for model in found["models"]], []
    for kind, entry in KINDS.items():
        results = [result for result in found["results"] if result["kind"] == kind]
        for heading, grouped in ((entry.title, False), (f"{entry.title}, by group", True)):
            if chosen := [result for result in results if ("group" in result) == grouped]:
                made.append((heading, _kind_table(chosen, models)))
    return made


def _kind_table(results: list[dict], models: list[str]) -> str:
    lines: dict[tuple, dict] = {}
    for result in results:
        lines.setdefault((result["task"], result["metric"]), {})[result["model"]] = result
    rows = []
    for (task, metric), by_model in lines.items():
        first = next(iter(by_model.values()))
        unit = {"share": "", "share, difference": ", points"}.get(first["unit"], f", {first['unit']}")
        counts = sorted({result["rows"] for result in by_model.values()})
        chance = "" if first["chance"] is None else f"{100 * first['chance']:.1f} %"
        named = [task, first["language"] or "", metric + unit, " / ".join(map(str, counts)), chance]
        rows.append(named + [cell(by_model.get(model)) for model in models])
    return markdown(["task", "language", "figure", "rows", "chance", *models], rows)


def _model_table(models: list[dict]) -> str:
    kinds = {"ar": "AR", "diffusion": "diffusion", None: "–"}
    rows = [
        [model["name"], kinds[model["kind"]], f"{model['parameters'] or 0:,}", f"`{model['weights_sha256'][:16]}`"]
        for model in models
    ]
    return markdown(["model", "kind", "parameters", "weights, SHA-256"], rows)


def _notes(found: dict) -> str:
    protocol, computed = found["protocol"], dict.fromkeys(result["command"] for result in found["results"])
    rows = "all rows" if protocol["limit"] is None else f"at most {protocol['limit']} rows of each task"
    lines = [
        "± is one standard error over the rows; [a, b] is Wilson's 95 % interval, where all or none hit. ≤ marks an "
        "upper bound of the negative log-likelihood (diffusion); AR figures are exact. `masks ±` is the part of the "
        "error that the random masks alone have, `open` the expected share of decisions that they got wrong.",
        f"Seed {found['seed']}, {protocol['samples']} masks per scored text, protocol {protocol['version']}, "
        f"{rows}; {found['hardware']}; {', '.join(f'{name} {number}' for name, number in found['versions'].items())}.",
    ]  # fmt: skip
    terms = [f"- `{name}`: {text}" for name, text in protocol["definitions"].items()]
    data = [f"- {task['name']}: {task['data']}, SHA-256 `{task['data_sha256'][:16]}`" for task in protocol["tasks"]]
    commands = [f"- `{command}`" for command in computed]
    parts = ["## How to read it", *lines, "\n".join(terms), "Data:", "\n".join(data), "Commands:", "\n".join(commands)]
    return "\n\n".join(parts) + "\n"


# ---- the plot


def draw(path: Path, found: dict) -> None:
    """Dots with error bars, a panel per kind and unit, a colour per model; a grey mark is chance."""
    groups: dict[tuple, list[dict]] = {}
    for result in found["results"]:
        unit = result["unit"]
        if metric_of(result["kind"], result["metric"]).drawn and unit != "share, difference":
            groups.setdefault((result["kind"], unit), []).append(result)
    if not groups:
        return
    order = list(KINDS)
    keys = sorted(groups, key=lambda key: (order.index(key[0]), key[1]))
    models = [model["name"] for model in found["models"]]
    heights = [0.9 + len(_lines(groups[key])) * (0.12 + 0.13 * len(models)) for key in keys]
    size, ratios = (8, sum(heights) + 0.5), {"height_ratios": heights}
    figure, axes = panels(len(keys), size=size, gridspec_kw=ratios)
    for one, key in zip(axes, keys, strict=True):
        _draw_panel(one, key, groups[key], models)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(models), 4), frameon=False)
    save_figure(figure, path)


def _lines(results: list[dict]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((result["task"], result["metric"]) for result in results))


def _draw_panel(axes, key: tuple[str, str], results: list[dict], models: list[str]) -> None:
    kind, unit = key
    lines, scale = _lines(results), 100 if unit == "share" else 1
    for number, model in enumerate(models):
        own = {(result["task"], result["metric"]): result for result in results if result["model"] == model}
        shift = (number - (len(models) - 1) / 2) * 0.7 / len(models)
        places = [place + shift for place, line in enumerate(lines) if line in own]
        values = [scale * own[line]["value"] for line in lines if line in own]
        errors = [bar(own[line], scale) for line in lines if line in own]
        errors = [[low for low, _ in errors], [high for _, high in errors]]
        marker = "<" if any(result["bound"] for result in own.values()) else "o"  # a bound: the truth is further left
        axes.errorbar(
            values, places, xerr=errors, fmt=marker, color=f"C{number}", capsize=2, markersize=4, label=model
        )
    for place, line in enumerate(lines):
        chance = next(result["chance"] for result in results if (result["task"], result["metric"]) == line)
        if chance is not None:
            axes.vlines(scale * chance, place - 0.42, place + 0.42, color="0.6", linewidth=1.5, zorder=0)
    axes.set_yticks(range(len(lines)), [f"{task}: {metric}" for task, metric in lines], fontsize=8)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_xlabel({"share": "per cent"}.get(unit, unit), fontsize=8)
    axes.set_title(
        KINDS[kind].title + (" (◂: upper bound)" if any(result["bound"] for result in results) else ""), fontsize=9
    )
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", alpha=0.3)


def bar(result: dict, scale: float) -> tuple[float, float]:
    """How far the error bar reaches to both sides: a standard error, or Wilson's interval where there is none."""
    value, error = result["value"], result["standard_error"]
    if value in (0, 1) and result.get("rows") and result.get("unit", "share") == "share":
        low, high = wilson(value, result["rows"])
        return scale * (value - low), scale * (high - value)
    return scale * (error or 0.0), scale * (error or 0.0)
