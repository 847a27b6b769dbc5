"""The tables and the plot of a study of editing: quality against forward passes, and plain decoding at equal ones."""

from collections.abc import Iterator
from pathlib import Path

from nanollada.scripts.reporting.plots import panels, save_figure
from nanollada.scripts.reporting.tables import NONE, markdown, percent, with_error
from nanollada.scripts.studies.editing.arms import ARMS, BASELINE, PARTS
from nanollada.scripts.studies.editing.decoders import DECODERS, Decoder
from nanollada.scripts.studies.gains import RUN_FACTS, run_facts, summary
from nanollada.trainers.records import read_json, write_json

MARKERS = {"": "o", "edit": "^", "sync": "s", "remask": "D", "gibbs": "P", "preset": "*", "expand": "^"}
CLEAR = 2  # standard errors
GAINS = ("draft", "plain_draft", "matched", "matched_fixed")
EXTRAS = ("distinct", "length_error", "log_probability")  # columns that only some parts have

# ---- numbers


def mixture(points: dict[str, tuple[float, float]], forwards: float) -> dict[str, float]:
    """
    The best that decoders, each used on a share of the rows, do with so many forward passes on average.

    Args:
        points (`dict[str, tuple[float, float]]`): Forward passes and quality by decoder.
        forwards (`float`): The most on average.

    Returns:
        `dict[str, float]`: the share of one decoder or two; empty where all need more.
    """
    best, shares = None, {}
    for one, (cost, quality) in points.items():
        if cost <= forwards and (best is None or quality > best):
            best, shares = quality, {one: 1.0}
    for one, (low, poor) in points.items():
        for other, (high, good) in points.items():
            if not low <= forwards < high:
                continue
            share = (forwards - low) / (high - low)
            if (value := poor + share * (good - poor)) > best:
                best, shares = value, {one: 1 - share, other: share}
    return shares


def matched(runs: dict[str, dict[str, dict[int, list]]], forwards: float, like: str, fixed: bool = False) -> dict:
    """
    Quality of decoders without edits, mixed to so many forward passes.

    Args:
        runs (`dict`): Of [`by_decoder`].
        forwards (`float`): The most on average.
        like (`str`): A decoder: those that don't draw as it does are left out.
        fixed (`bool`, defaults to `False`): Only those with as many steps for every row.

    Returns:
        `dict[int, list[float]]`: by seed; empty where all need more.
    """
    kind, points = (DECODERS[like].masks, DECODERS[like].settings.get("temperature")), {}
    for name, columns in runs.items():
        decoder = DECODERS[name]
        same = (decoder.masks, decoder.settings.get("temperature")) == kind
        if not decoder.kind and same and (is_steady(decoder) or not fixed):
            points[name] = tuple(summary(columns[of])["value"] for of in ("forwards", "quality"))
    parts = [(share, runs[name]["quality"]) for name, share in mixture(points, forwards).items()]
    seeds = set.intersection(*(set(quality) for _, quality in parts)) if parts else set()
    found = {}
    for seed in sorted(seeds):
        columns = [[share * value for value in quality[seed]] for share, quality in parts]
        found[seed] = [sum(row) for row in zip(*columns, strict=True)]
    return found


def is_steady(decoder: Decoder) -> bool:
    """Whether it takes as many steps for every row."""
    return decoder.settings.keys() <= {"steps", "temperature"}


def by_decoder(records: list[dict]) -> dict[str, dict[str, dict[int, list]]]:
    """By decoder and column the numbers of every seed."""
    found = {}
    for record in records:
        for name, columns in record["decoders"].items():
            for of, values in columns.items():
                found.setdefault(name, {}).setdefault(of, {})[record["seed"]] = values
    return found


def gains_of(name: str, runs: dict, plain: dict | None) -> Iterator[dict]:
    """For each decoder that edits what it gains: over its draft, over that of plain training, and at equal cost."""
    for decoder, columns in runs.items():
        draft, quality = DECODERS[decoder].draft, columns["quality"]
        if draft is None:
            continue
        others = {"draft": runs.get(draft, {}).get("quality")}
        if plain is not None:
            others["plain_draft"] = plain.get(draft, {}).get("quality")
            forwards = summary(columns["forwards"])["value"]
            others["matched"] = matched(plain, forwards, decoder)
            others["matched_fixed"] = matched(plain, forwards, decoder, fixed=True)
        figures = {over: summary(quality, other) for over, other in others.items() if set(quality) & set(other or ())}
        yield {"run": name, "decoder": decoder, "figures": figures}


def record_of(part: str, finished: dict[str, list[Path]]) -> dict:
    """Rows by arm and decoder, gains of editing, and what visible tokens say."""
    scores = {name: [read_json(folder / "scores.json") for folder in folders] for name, folders in finished.items()}
    measured = {name: by_decoder(records) for name, records in scores.items()}
    record = {"part": part, "frontier": [], "gains": [], "beliefs": []}
    for name, runs in measured.items():
        for decoder, columns in runs.items():
            figures = {of: summary(values) for of, values in columns.items()}
            record["frontier"].append({"run": name, "decoder": decoder, "figures": figures})
        record["gains"] += gains_of(name, runs, measured.get(BASELINE))
        said = {one["seed"]: one["beliefs"] for one in scores[name]}
        figures = {kind: summary({seed: each[kind] for seed, each in said.items()}) for kind in ("replaced", "kept")}
        record["beliefs"].append({"run": name, "figures": figures})
    return record


# ---- tables


def shown(figure: dict | None, unit: str) -> str:
    if figure is None:
        return NONE
    numbers = figure["value"], figure["standard_error"]
    return percent(*numbers) if unit == "share" else with_error(*numbers)


def frontier_table(record: dict) -> str:
    """A line per decoder, a column per arm: quality @ forward passes, and edits where there are any."""
    unit, rows = PARTS[record["part"]].unit, record["frontier"]
    found = {(row["run"], row["decoder"]): row["figures"] for row in rows}
    names = list(dict.fromkeys(row["run"] for row in rows))
    lines = []
    for decoder in dict.fromkeys(row["decoder"] for row in rows):
        cells = []
        for name in names:
            figures = found.get((name, decoder))
            if figures is None:
                cells.append(NONE)
                continue
            cell = f"{shown(figures['quality'], unit)} @ {figures['forwards']['value']:.1f}"
            cell += f", {figures['edits']['value']:.2f} edits" if figures["edits"]["value"] else ""
            cells.append(
                cell + "".join(f", {extra} {figures[extra]['value']:.2f}" for extra in EXTRAS if extra in figures)
            )
        lines.append([DECODERS[decoder].title, *cells])
    seeds = [max(len(row["figures"]["quality"]["seeds"]) for row in rows if row["run"] == name) for name in names]
    header = [f"{ARMS[name].title} ({count} seeds)" for name, count in zip(names, seeds, strict=True)]
    return markdown(["decoder", *header], lines)


def gains_table(record: dict) -> str:
    """What edits gain: over the same draft, and over plain training's decoders at as many forward passes."""
    unit = PARTS[record["part"]].unit
    header = ["edited", "− its draft", f"− {BASELINE}, same draft"]
    header += [f"− {BASELINE}, no edits, equal forwards", "of them, fixed steps alone"]
    lines = []
    for row in record["gains"]:
        if not ARMS[row["run"]].trains:
            continue
        cells = (shown(row["figures"].get(over), unit) for over in GAINS)
        lines.append([f"{ARMS[row['run']].title}: {DECODERS[row['decoder']].title}", *cells])
    return markdown(header, lines) if lines else ""


def beliefs_table(record: dict) -> str:
    header = ["arm", "KL(masked ‖ visible), token replaced, nats", "right token, nats"]
    rows = [
        [ARMS[row["run"]].title, *(shown(row["figures"][kind], "nats") for kind in ("replaced", "kept"))]
        for row in record["beliefs"]
    ]
    return markdown(header, rows)


def verdict(record: dict) -> str:
    """Where editing wins at equal forward passes, and where not: beyond two standard errors."""
    sides = {"Ahead of": {}, "Behind": {}, "Not apart from": {}}
    for row in record["gains"]:
        gap = row["figures"].get("matched")
        if gap is None or not ARMS[row["run"]].trains:
            continue
        apart = abs(gap["value"]) > CLEAR * (gap["standard_error"] or 0)
        side = "Not apart from" if not apart else "Ahead of" if gap["value"] > 0 else "Behind"
        sides[side].setdefault(ARMS[row["run"]].title, []).append(DECODERS[row["decoder"]].title)
    lines = []
    for side, arms in sides.items():
        if names := "; ".join(f"{arm} ({', '.join(decoders)})" for arm, decoders in arms.items()):
            lines.append(f"{side} plain decoding at equal forwards, by 2 s.e.: {names}.")
    return "\n\n".join(lines)


def tables(record: dict) -> str:
    """The figures of a part in Markdown."""
    parts = (frontier_table(record), gains_table(record), verdict(record), beliefs_table(record))
    return "\n".join(part.rstrip("\n") + "\n" for part in parts if part)


# ---- plot


def draw(path: Path, record: dict) -> None:
    """Quality against forward passes: lines are decoders without edits (dashed: fixed steps), marks those with."""
    figure, (axes,) = panels(size=(9, 4.6))
    names = [name for name in dict.fromkeys(row["run"] for row in record["frontier"]) if ARMS[name].trains]
    for number, name in enumerate(names):
        rows = [row for row in record["frontier"] if row["run"] == name and row["figures"]["forwards"]["value"]]
        groups = {}
        for row in rows:
            decoder = DECODERS[row["decoder"]]
            line = "" if decoder.kind else "--" if is_steady(decoder) else "-"
            groups.setdefault((decoder.kind, line, "temperature" in decoder.settings), []).append(row["figures"])
        for (kind, line, drawn), figures in groups.items():
            figures = sorted(figures, key=lambda each: each["forwards"]["value"])
            across, up = ([each[of]["value"] for each in figures] for of in ("forwards", "quality"))
            errors = [each["quality"]["standard_error"] or 0 for each in figures]
            said = [ARMS[name].title, kind or {"--": "fixed steps", "-": "thresholds"}[line], "drawn" if drawn else ""]
            style = {
                "linestyle": line,
                "marker": MARKERS[kind],
                "color": f"C{number}",
                "label": ", ".join(filter(None, said)),
            }
            axes.errorbar(across, up, yerr=errors, markersize=5, linewidth=1, elinewidth=0.5, **style)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    unit = {"share": "share right", "nats": "log-probability, nats per token"}[PARTS[record["part"]].unit]
    axes.set(xlabel="forward passes per answer", ylabel=unit, title=PARTS[record["part"]].title)
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper", fontsize=6)
    save_figure(figure, path)


def write_frontier(folder: Path, part: str, finished: dict[str, list[Path]]) -> str:
    """
    Writes `<part>.json`, `<part>.md` and `<part>.png`.

    Args:
        folder (`Path`): The study.
        part (`str`): A name of `PARTS`.
        finished (`dict[str, list[Path]]`): The folders of the finished runs by name.

    Returns:
        `str`: the tables.
    """
    record = record_of(part, finished)
    record["settings"] = read_json(folder / "settings.json")
    record["runs"] = [run for folders in finished.values() for run in run_facts(folders)]
    start = Path(record["settings"].get("diffusion", "")) / "run.json"
    record["start"] = (
        [{name: value for name, value in read_json(start).items() if name in RUN_FACTS}] if start.is_file() else []
    )  # a name on the Hub has none here
    made = [("start", run) for run in record["start"]] + [(run["run"], run) for run in record["runs"]]
    text = tables(record) + "\n" + "".join(f"- {name}: `{run['command']}`\n" for name, run in made)
    write_json(folder / f"{part}.json", record)
    (folder / f"{part}.md").write_text(text, encoding="utf-8")
    draw(folder / f"{part}.png", record)
    return text
