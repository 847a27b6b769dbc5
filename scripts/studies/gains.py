"""The tables of a study of post-training. Everything in them is read from the files of its finished runs."""

import math
from pathlib import Path

from nanollada.scripts.reporting.tables import NONE, markdown, percent, with_error
from nanollada.trainers.console.callbacks import read_metrics
from nanollada.trainers.records import read_json, write_json
from nanollada.trainers.scoring.estimates import mean

# What is subtracted from what: (the better one by the claim, the other).
CONTRASTS = {
    "preferences": (("vrpo", "naive"), ("vrpo", "naive_one"), ("vrpo", "vrpo_one"), ("vrpo", "ar_dpo")),
    "problems": (
        *(("replay", "elbo"), ("replay", "start"), ("elbo", "start")),
        *(("mean_field", "start"), ("replay", "mean_field"), ("ar_grpo", "ar_start")),
    ),
}
RUN_FACTS = ("command", "seed", "hardware", "versions", "parameters", "steps", "epochs", "seconds")
LOGGED = ("score/variance", "rewards/margins", "rewards/accuracies", "reward", "loss")
LAST = 10  # records of a log that a figure is the mean of


# ---- numbers


def summary(runs: dict[int, list[float]], other: dict[int, list[float]] | None = None) -> dict:
    """
    The mean over items and seeds, or of the differences from another arm on the same items and seeds.

    Args:
        runs (`dict[int, list[float]]`): A number per item (pair, problem), by seed.
        other (`dict[int, list[float]]`, *optional*): The same of the other arm; seeds that one of them lacks are left
            out.

    Returns:
        `dict`: `value`, `seeds`, and the errors: `sampling_error` over items, `seed_error` over seeds (`None` for
            one), and `standard_error` of both.
    """
    if other is not None:
        common = sorted(set(runs) & set(other))
        runs = {seed: [a - b for a, b in zip(runs[seed], other[seed], strict=True)] for seed in common}
    items = mean([sum(values) / len(runs) for values in zip(*runs.values(), strict=True)])
    errors = {
        "sampling_error": items["standard_error"],
        "seed_error": mean([sum(values) / len(values) for values in runs.values()])["standard_error"],
    }
    known = [error for error in errors.values() if error is not None]
    errors["standard_error"] = math.hypot(*known) if known else None
    return {"value": items["value"], "items": items["rows"], "seeds": sorted(runs), **errors}


def wins(gaps: list[float]) -> list[float]:
    """1 for a gap above 0, 0 for one below, 0.5 for none."""
    return [(gap > 0) + (gap == 0) / 2 for gap in gaps]


def balanced(hits: list[float], longer: list[float]) -> list[float]:
    """
    Hits weighted so that pairs whose chosen answer is the longer one count as much as those whose rejected one is:
    their mean is the accuracy of a judge whom length does not help. Pairs of equal length are left out.

    A value is that mean plus the pair's share in the errors of the two sides' means (linearised), so that the values'
    standard error is the mean's, √(Σ_side s²/n) / 2.
    """
    sides = {side: [hit for hit, where in zip(hits, longer, strict=True) if where == side] for side in (0.0, 1.0)}
    if not all(sides.values()):
        return []
    total, means = sum(map(len, sides.values())), {side: sum(own) / len(own) for side, own in sides.items()}
    centre = sum(means.values()) / 2
    return [
        centre + (hit - means[side]) * total / 2 / len(sides[side])
        for hit, side in zip(hits, longer, strict=True)
        if side in sides
    ]


def gaps(pairs: list, measure) -> list[float]:
    """What a measure of `(log-probability, tokens)` says of the chosen answer, over what it says of the rejected."""
    return [measure(*chosen) - measure(*rejected) for chosen, rejected in pairs]


def preference_numbers(pairs: list, start: list) -> dict[str, list[float]]:
    """A number per pair for each column of the table, of the scores of a model and of the one that it began as."""
    own, before = (gaps(each, lambda score, tokens: score) for each in (pairs, start))
    margins = [a - b for a, b in zip(own, before, strict=True)]
    longer = wins(gaps(pairs, lambda score, tokens: float(tokens)))
    return {
        "implicit": wins(margins),
        "implicit_balanced": balanced(wins(margins), longer),
        "raw": wins(own),
        "raw_per_token": wins(gaps(pairs, lambda score, tokens: score / tokens)),
        "start_raw": wins(before),
        "start_per_token": wins(gaps(start, lambda score, tokens: score / tokens)),
        "longer": longer,
        "margin": margins,
    }


def numbers_of(part: str, scores: dict) -> dict[str, list[float]]:
    return preference_numbers(scores["pairs"], scores["start"]) if part == "preferences" else scores["solved"]


def logged(folder: Path) -> dict[str, float]:
    """Means of the last records of a training's log."""
    if not (folder / "metrics.jsonl").exists():
        return {}
    lines, figures = read_metrics(folder), {}
    for name in LOGGED:
        if values := [line[name] for line in lines if name in line][-LAST:]:
            figures[name] = sum(values) / len(values)
    return figures


def rows_of(part: str, finished: dict[str, list[Path]], titles: dict[str, str]) -> tuple[list[dict], list[dict]]:
    """A row per arm, and one per contrast that both arms of have runs."""
    measured, rows = {}, []
    for name, folders in finished.items():
        records = [read_json(folder / "scores.json") for folder in folders]
        numbers = {record["seed"]: numbers_of(part, record) for record in records}
        columns = next(iter(numbers.values()))
        measured[name] = {
            column: {seed: by_column[column] for seed, by_column in numbers.items()}
            for column in columns
            if columns[column]
        }
        row = {"run": name, "title": titles[name]}
        row["figures"] = {column: summary(runs) for column, runs in measured[name].items()}
        row["logged"] = {record["seed"]: logged(folder) for record, folder in zip(records, folders, strict=True)}
        for extra in ("gradients", "mask_variance"):
            if extra in records[0]:
                row[extra] = {record["seed"]: record[extra] for record in records}
        rows.append(row)
    contrasts = []
    for one, other in CONTRASTS[part]:
        if one in measured and other in measured:
            shared = [column for column in measured[one] if column in measured[other]]
            figures = {column: summary(measured[one][column], measured[other][column]) for column in shared}
            contrasts.append({"run": one, "minus": other, "figures": figures})
    return rows, contrasts


def run_facts(folders: list[Path]) -> list[dict]:
    records = []
    for folder in folders:
        scores = read_json(folder / "scores.json")
        run = read_json(folder / "run.json") if (folder / "run.json").exists() else scores
        record = {"run": folder.name, **{name: run[name] for name in RUN_FACTS if name in run}}
        records.append({**record, "scored_by": scores["command"]})
    return records


# ---- tables

HEADERS = {
    "preferences": {
        "implicit": "implicit reward",
        "implicit_balanced": "of it, length balanced",
        "raw": "log-likelihood",
        "raw_per_token": "per token",
        "start_raw": "before: log-likelihood",
        "start_per_token": "per token",
        "longer": "the longer one",
    },
    "problems": {"greedy": "greedy, one a step", "threshold": "threshold 0.9", "sampled": "sampled, T = 1"},
}


def shown(figure: dict | None) -> str:
    return NONE if figure is None else percent(figure["value"], figure["standard_error"])


def arm_table(part: str, rows: list[dict]) -> str:
    names = HEADERS[part]
    header = ["run", *names.values(), *(["margin, nats", "score variance"] if part == "preferences" else ["cos"])]
    cells = []
    for row in rows:
        cell = [row["title"], *(shown(row["figures"].get(name)) for name in names)]
        if part == "preferences":
            margin, variances = (
                row["figures"]["margin"],
                [line.get("score/variance") for line in row["logged"].values()],
            )
            cell.append(with_error(margin["value"], margin["standard_error"], digits=2))
            cell.append(over_seeds(variances, 4))
        else:
            cell.append(over_seeds([agreed["cosine"] for agreed in row.get("gradients", {}).values()], 2))
        cells.append([*cell, str(len(row["logged"]))])
    return markdown([*header, "seeds"], cells)


def over_seeds(values: list[float | None], digits: int) -> str:
    """Mean and its error over the seeds that have a value."""
    known = [value for value in values if value is not None]
    if not known:
        return NONE
    figure = mean(known)
    return with_error(figure["value"], figure["standard_error"], digits=digits)


def contrast_table(part: str, contrasts: list[dict], titles: dict[str, str]) -> str:
    names = [name for name in HEADERS[part] if not name.startswith(("start", "longer"))]
    header = ["difference, points", *(HEADERS[part][name] for name in names), "seeds"]
    cells = []
    for line in contrasts:
        figures = [line["figures"].get(name) for name in names]
        seeds = str(len(next(iter(line["figures"].values()))["seeds"]))
        cells.append([f"{titles[line['run']]} − {titles[line['minus']]}", *map(shown, figures), seeds])
    return markdown(header, cells)


def tables(record: dict) -> str:
    """The figures of a part in Markdown."""
    text, titles = arm_table(record["part"], record["rows"]), {row["run"]: row["title"] for row in record["rows"]}
    if record["contrasts"]:
        text += "\n" + contrast_table(record["part"], record["contrasts"], titles)
    return text


def write_gains(folder: Path, part: str, finished: dict[str, list[Path]], titles: dict[str, str]) -> str:
    """
    Writes `<part>.json` and `<part>.md`.

    Args:
        folder (`Path`): The study.
        part (`str`): "preferences" or "problems".
        finished (`dict[str, list[Path]]`): The folders of the finished runs by name.
        titles (`dict[str, str]`): Of the arms.

    Returns:
        `str`: the tables.
    """
    record = {"part": part, "settings": read_json(folder / "settings.json")}
    record["runs"] = [run for folders in finished.values() for run in run_facts(folders)]
    record["rows"], record["contrasts"] = rows_of(part, finished, titles)
    text = tables(record)
    text += "\n" + "".join(f"- {run['run']}: `{run['command']}`\n" for run in record["runs"])
    write_json(folder / f"{part}.json", record)
    (folder / f"{part}.md").write_text(text, encoding="utf-8")
    return text
