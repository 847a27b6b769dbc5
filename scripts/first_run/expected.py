"""What the quickstart's recipes gave when they were recorded, and whether a run is far outside of that."""

from pathlib import Path

from nanollada.trainers.records import read_json

NAMES = {"ar": "AR", "diffusion": "diffusion", "ar_sft": "AR + SFT", "diffusion_sft": "diffusion + SFT"}
FIGURES = {"text": "bits/byte of text", "sft": "bits/byte of answers", "exact_match": "share of sudokus solved"}
# By size, stage and figure: the lowest and highest that is still believed. Sources: README's table and
# scripts/LOG.md ("Does a longer SFT steady the quickstart's sudokus?", "What does one rounding do to the
# quickstart?"). Recorded were, over seeds, roundings and numbers of steps: AR + SFT 51.0 to 71.5 % of the sudokus,
# diffusion + SFT in whole rows 97.5 to 100 %, in blocks of 64 (modeling_nanollada/DECODING.md, "Length") 100 %; text
# 2.519 to 2.549 (AR) and 2.615 to 2.650 (diffusion), after SFT 3.419 to 3.522 and 3.375 to 3.787; answers 0.206 to
# 0.223 and 0.246 to 0.269. The margin is several times that spread, as another Python has another documentation; a
# figure that is much too good is no better sign than one that is too bad.
EXPECTED = {
    "1m": {
        "ar": {"text": (2.1, 3.0)},
        "diffusion": {"text": (2.1, 3.1)},
        "ar_sft": {"text": (2.4, 4.8), "sft": (0.1, 0.45), "exact_match": (0.30, 1.0)},
        "diffusion_sft": {"text": (2.4, 5.2), "sft": (0.1, 0.55), "exact_match": (0.80, 1.0)},
    }
}
RECORDED_WITH = {"torch": "2.13.0", "transformers": "5.24.0"}
DISTRUST = "These figures are far outside what the recorded runs of this recipe gave. Don't trust this run:"


def figures(results: list[dict]) -> dict[str, dict]:
    """A stage's own results by figure: of the held-out text, of the held-out answers, of the sudokus."""
    return {
        "exact_match" if result["metric"] == "exact_match" else Path(result["data"]).stem.removesuffix("_test"): result
        for result in results
        if result["metric"] in ("bits_per_byte", "exact_match")
    }


def doubts(folder: Path) -> list[str]:
    """
    What of a run is far outside of what was expected, and likely causes.

    Args:
        folder (`Path`): The quickstart's, with its `settings.json` and `results.json`.

    Returns:
        `list[str]`: A sentence each; none for a run that is as expected, and for one with settings of its own (another
            size, other data, a share of the steps), of which nothing is known.
    """
    settings, results = (read_json(folder / name) for name in ("settings.json", "results.json"))
    if settings["data"] or settings["steps_share"] != 1:
        return []
    against = [
        doubt
        for stage, rules in EXPECTED.get(settings["size"], {}).items()
        for doubt in _doubts_of(stage, rules, figures(results.get(stage, {}).get("results", [])))
    ]
    return [*against, *_causes(folder)] if against else []


def _doubts_of(stage: str, rules: dict[str, tuple[float, float]], results: dict[str, dict]) -> list[str]:
    sentences = []
    for name, (lowest, highest) in rules.items():
        value = results.get(name, {}).get("value")
        if value is None or not lowest <= value <= highest:  # NaN, too
            got = "none" if value is None else f"{value:.3f}"
            sentences.append(f"{NAMES[stage]}: {FIGURES[name]} {got}, expected {lowest} to {highest}.")
    return sentences


def _causes(folder: Path) -> list[str]:
    """Likely causes; of versions, steps and interruptions what the stages' files say."""
    runs = {stage: read_json(folder / stage / "run.json") for stage in NAMES if (folder / stage).exists()}
    versions = []
    for name, recorded in RECORDED_WITH.items():
        here = sorted({run["versions"][name] for run in runs.values()})
        versions.append(f"{name} {', '.join(here)} (recorded with {recorded})")
    steps = ", ".join(f"{NAMES[stage]} {run['steps']}" for stage, run in runs.items())
    return [
        f"Likely causes: versions of libraries: {'; '.join(versions)}.",
        f"Edited recipes (scripts/recipes/quickstart_*.yaml) or code; steps here: {steps}.",
        "A run that was interrupted and resumed, perhaps with another version in between: give a new --output.",
        "Another Python (the corpus is its documentation), other arithmetic here, or rarely an unlucky --seed.",
    ]
