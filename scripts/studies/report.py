"""A study's tables and plots. Everything in them is read from the files of its finished runs."""

import math
from pathlib import Path

from nanollada.scripts.reporting.plots import panels, save_figure
from nanollada.scripts.reporting.tables import NONE, markdown, with_error
from nanollada.scripts.studies.variants import NOISE, VARIANTS
from nanollada.trainers.records import read_json, write_json
from nanollada.trainers.scoring.estimates import mean, ratio

REFERENCES = {"a": "ar", "d": "ar_mdlm"}  # what a part's models are compared with
RUN_FACTS = ("command", "seed", "hardware", "versions", "parameters", "steps", "epochs", "tokens_seen", "seconds")


# ---- numbers


def bits_per_byte(chunks: list[list[float]]) -> dict:
    """`value` and its `standard_error` over the texts, of `[nats, variance, tokens, bytes]` parts."""
    return ratio([chunk[0] / math.log(2) for chunk in chunks], [chunk[3] for chunk in chunks])


def mean_chunks(runs: list[list[list[float]]]) -> list[list[float]]:
    """The same parts, averaged over seeds."""
    return [[sum(values) / len(runs) for values in zip(*parts, strict=True)] for parts in zip(*runs, strict=True)]


def summary(runs: dict[int, list], reference: dict[int, list] | None = None) -> dict:
    """
    One figure over seeds: bits per byte of a model on a source, or how many more than a reference on the same texts.

    Args:
        runs (`dict[int, list]`): The parts of each seed.
        reference (`dict[int, list]`, *optional*): The same of the reference; seeds that it lacks are left out.

    Returns:
        `dict`: `value`, `seeds`, and the errors: `sampling_error` over the texts (with the noise of the masks in it),
            `mask_error` of the masks alone, `seed_error`, and `standard_error` of all.
    """
    if reference is not None:
        runs = {
            seed: [[a[0] - b[0], a[1] + b[1], *a[2:]] for a, b in zip(runs[seed], reference[seed], strict=True)]
            for seed in sorted(set(runs) & set(reference))
        }
    chunks = mean_chunks(list(runs.values()))
    total, variance = bits_per_byte(chunks), sum(chunk[1] for chunk in chunks) / len(runs)
    errors = {
        "sampling_error": total["standard_error"],
        "mask_error": math.sqrt(variance) / math.log(2) / sum(chunk[3] for chunk in chunks),
        "seed_error": mean([bits_per_byte(parts)["value"] for parts in runs.values()])["standard_error"],
    }
    known = [errors[name] for name in ("sampling_error", "seed_error") if errors[name] is not None]
    errors["standard_error"] = math.hypot(*known) if known else None
    return {"value": total["value"], "seeds": sorted(runs), **errors}


def scored(folders: list[Path]) -> dict[tuple, dict[int, list]]:
    """The parts of a variant's scores by (source, block length, own) and seed."""
    parts = {}
    for folder in folders:
        seed = read_json(folder / "run.json")["seed"]
        for result in read_json(folder / "scores.json")["results"]:
            key = (result["data"], result["block_length"], result["own"])
            parts.setdefault(key, {})[seed] = result["chunks"]
    return parts


def score_rows(finished: dict[str, list[Path]], reference: str | None) -> list[dict]:
    """A row per model and block length: its figures on every source, and over the reference."""
    rows = []
    known = scored(finished.get(reference, [])) if reference else {}
    base = {source: runs for (source, _, own), runs in known.items() if own}
    for name, folders in finished.items():
        scores = scored(folders)
        for block, own in dict.fromkeys((block, own) for _, block, own in scores):
            sources = {key[0]: runs for key, runs in scores.items() if key[1:] == (block, own)}
            row = {"run": name, "title": VARIANTS[name].title, "block_length": block, "own": own}
            row["bound"] = VARIANTS[name].kind == "diffusion" and block != 1
            row["bits_per_byte"] = {source: summary(runs) for source, runs in sources.items()}
            row["over_reference"] = {
                source: summary(runs, base[source])
                for source, runs in sources.items()
                if name != reference and source in base and set(runs) & set(base[source])
            }
            rows.append(row)
    return rows


def run_facts(folders: list[Path]) -> list[dict]:
    records = []
    for folder in folders:
        run = read_json(folder / "run.json")
        records.append({"run": folder.name, **{name: run[name] for name in RUN_FACTS}})
        if (folder / "scores.json").exists():
            records[-1]["scored_by"] = read_json(folder / "scores.json")["command"]
    return records


def curves(finished: dict[str, list[Path]]) -> list[dict]:
    """Held-out bits per byte over epochs for each run of part c."""
    from nanollada.trainers.console.callbacks import read_metrics

    lines = []
    for name, folders in finished.items():
        for folder in folders:
            points = [line for line in read_metrics(folder) if "eval_bits_per_byte" in line]
            points = {line["step"]: line["eval_bits_per_byte"] for line in points}
            run = read_json(folder / "run.json")
            line = {"run": name, "title": VARIANTS[name].title, "seed": run["seed"]}
            line["epochs"] = [step / (run["steps"] / run["epochs"]) for step in points]
            lines.append({**line, "bits_per_byte": list(points.values())})
    return lines


def crossing(first: dict, second: dict) -> float | None:
    """The first epoch, linearly between evaluations, from which the second curve is below the first; `None`: none."""
    gaps = [
        (epoch, a - second["bits_per_byte"][second["epochs"].index(epoch)])
        for epoch, a in zip(first["epochs"], first["bits_per_byte"], strict=True)
        if epoch in second["epochs"]
    ]
    for (before, low), (after, high) in zip(gaps, gaps[1:], strict=False):
        if low <= 0 < high:
            return before + (after - before) * -low / (high - low)
    return None


def verdicts(lines: list[dict]) -> list[dict]:
    """Part c in figures: each AR curve's and the diffusion curve's best, and where they cross."""
    rows = []
    for line in lines:
        best = min(line["bits_per_byte"])
        row = {"run": line["run"], "title": line["title"], "seed": line["seed"], "best": best}
        row["best_epoch"] = line["epochs"][line["bits_per_byte"].index(best)]
        row["last"], row["last_epoch"] = line["bits_per_byte"][-1], line["epochs"][-1]
        rivals = [other for other in lines if other["run"] == "small_mdlm" and other["seed"] == line["seed"]]
        if line["run"] != "small_mdlm" and rivals:
            row["diffusion_below_from_epoch"] = crossing(line, rivals[0])
            row["gap_of_bests"] = min(rivals[0]["bits_per_byte"]) - best
        rows.append(row)
    return rows


# ---- tables


def cell(figure: dict | None, bound: bool = False) -> str:
    return with_error(figure["value"], figure["standard_error"], bound=bound) if figure else NONE


def score_table(rows: list[dict], reference: str = "AR") -> str:
    sources = list(rows[0]["bits_per_byte"])
    header = ["model", "scored at block", *(f"{source}, bits/byte" for source in sources)]
    header += [*(f"{source}, over {reference}" for source in sources), "seeds"]
    cells = []
    for row in rows:
        block = {None: NONE, 0: "row"}.get(row["block_length"], str(row["block_length"]))
        figures = [cell(row["bits_per_byte"].get(source), row["bound"]) for source in sources]
        over = [cell(row["over_reference"].get(source)) for source in sources]
        seeds = len(next(iter(row["bits_per_byte"].values()))["seeds"])
        cells.append([row["title"], block, *figures, *over, str(seeds)])
    return markdown(header, cells)


def noise_table(measured: list[dict]) -> str:
    header = ["model", "masks", "loss, nats/token", "s.d. of a step's loss", "variance of its gradient"]
    cells = []
    for entry in measured:
        for kind in ("exact", "bernoulli"):
            part = entry[kind]
            loss = with_error(part["mean"], part["standard_error"])
            name = f"{VARIANTS[entry['of']].title}, seed {entry['seed']}"
            cells.append([name, kind, loss, f"{part['standard_deviation']:.4f}", f"{part['gradient_variance']:.4f}"])
    return markdown(header, cells)


def curve_table(rows: list[dict]) -> str:
    header = ["model", "seed", "best bits/byte", "at epoch", "last", "at epoch", "diffusion below from epoch"]
    cells = []
    for row in rows:
        crossed = row.get("diffusion_below_from_epoch")
        place = f"{crossed:.1f}" if crossed is not None else "never" if "gap_of_bests" in row else NONE
        numbers = [f"{row['best']:.3f}", f"{row['best_epoch']:.1f}", f"{row['last']:.3f}", f"{row['last_epoch']:.1f}"]
        cells.append([row["title"], str(row["seed"]), *numbers, place])
    return markdown(header, cells)


# ---- plots


def draw_scores(path: Path, rows: list[dict]) -> None:
    """Bits per byte of every model at its own block length, a panel per source."""
    rows = [row for row in rows if row["own"]]
    sources = list(rows[0]["bits_per_byte"])
    figure, all_axes = panels(1, len(sources), size=(4.5 * len(sources), 0.34 * len(rows) + 1.2))
    for axes, source in zip(all_axes, sources, strict=True):
        figures = [row["bits_per_byte"][source] for row in rows]
        places = range(len(rows))
        errors = [entry["standard_error"] or 0 for entry in figures]
        axes.errorbar([entry["value"] for entry in figures], places, xerr=errors, fmt="o", capsize=3, markersize=4)
        axes.set_yticks(places, [row["title"] for row in rows] if axes is all_axes[0] else [""] * len(rows))
        axes.invert_yaxis()
        axes.set_xlabel(f"{source}: bits per byte (diffusion: upper bound)")
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def draw_noise(path: Path, measured: list[dict], rows: list[dict]) -> None:
    """What the masks' noise is, and what it costs at equal steps."""
    figure, (left, right) = panels(1, 2, size=(10, 3.6))
    places = range(len(measured))
    for shift, kind in ((-0.2, "exact"), (0.2, "bernoulli")):
        heights = [entry[kind]["standard_deviation"] for entry in measured]
        left.bar([place + shift for place in places], heights, width=0.38, label=kind)
    left.set_xticks(places, [f"block {entry['block_length'] or 'row'}" for entry in measured])
    left.set_ylabel("s.d. of a step's loss, nats per token")
    left.legend()
    rows = [row for row in rows if row["own"]]
    for source in rows[0]["bits_per_byte"] if rows else []:
        figures = [row["bits_per_byte"][source] for row in rows]
        errors = [entry["seed_error"] or entry["mask_error"] for entry in figures]
        right.errorbar([entry["value"] for entry in figures], range(len(rows)), xerr=errors, fmt="o", label=source)
    right.set_yticks(range(len(rows)), [row["title"] for row in rows])
    right.set_xlabel("bits per byte after the same steps (± seeds)")
    if rows:
        right.legend()
    save_figure(figure, path)


def draw_curves(path: Path, lines: list[dict]) -> None:
    """Held-out bits per byte over epochs."""
    figure, (axes,) = panels(size=(7, 3.6))
    names = list(dict.fromkeys(line["run"] for line in lines))
    for line in lines:
        colour, first = f"C{names.index(line['run'])}", line["seed"] == lines[0]["seed"]
        label = line["title"] if first else None
        axes.plot(line["epochs"], line["bits_per_byte"], "o-", color=colour, markersize=3, linewidth=1, label=label)
    axes.set(xlabel="epochs over the small part", ylabel="bits per byte, held out (≤ for diffusion)")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    save_figure(figure, path)


# ---- a part


def write_part(folder: Path, part: str, finished: dict[str, list[Path]]) -> str:
    """
    Writes `<part>.json`, `<part>.md` and `<part>.png`.

    Args:
        folder (`Path`): The study.
        part (`str`): "a", "b", "c" or "d".
        finished (`dict[str, list[Path]]`): The folders of the finished runs by name.

    Returns:
        `str`: the tables.
    """
    trained = {name: paths for name, paths in finished.items() if name in VARIANTS}
    record = {"part": part, "settings": read_json(folder / "settings.json")}
    record["corpus"] = read_json(folder / "corpus" / "facts.json")
    record["runs"] = [run for paths in trained.values() for run in run_facts(paths)]
    picture = folder / f"{part}.png"
    if part == "c":
        record["curves"] = curves(trained)
        record["rows"] = verdicts(record["curves"])
        text = curve_table(record["rows"])
        draw_curves(picture, record["curves"])
    else:
        reference = REFERENCES.get(part)
        record["rows"] = score_rows(trained, reference)
        text = score_table(record["rows"], VARIANTS[reference or "ar"].title) if record["rows"] else ""
        if part in REFERENCES:
            draw_scores(picture, record["rows"])
        else:
            record["noise"] = [read_json(path / "noise.json") for name in NOISE for path in finished.get(name, [])]
            text += "\n" + noise_table(record["noise"])
            draw_noise(picture, record["noise"], record["rows"])
    text += "\n" + commands(record)
    write_json(folder / f"{part}.json", record)
    (folder / f"{part}.md").write_text(text, encoding="utf-8")
    return text


def commands(record: dict) -> str:
    """The commands behind the tables, one a run."""
    lines = [f"{run['run']}: `{run['command']}`" for run in record["runs"]]
    return "\n".join(f"- {line}" for line in lines) + "\n"
