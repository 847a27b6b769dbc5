"""The same questions under several decoding settings."""

from nanollada.scripts.decoding.settings import effective_settings
from nanollada.scripts.decoding.writing import generate, keyed_seed
from nanollada.scripts.evaluation.bench import Bench, Kind, Metric, Outcome, Row, Task, setting, settings
from nanollada.scripts.evaluation.tasks.generation import (
    METRICS,
    GenerationTask,
    check_question,
    length_for,
    puzzle_rows,
    questions,
    scored,
    verdict,
)
from nanollada.trainers.scoring.estimates import mean, ratio

PRESETS = {
    "cfg": {"off": {"cfg_scale": 0.0}, "on": {"cfg_scale": 1.5}},
    # LLaDA 1.0 decides one token a step in blocks (nothing is surer than 1); 2.0 all that is surer than a threshold
    # (2512.15745, §3.5)
    "llada_styles": {
        "llada_1": {"block_length": 32, "threshold": 1.0},
        "llada_2": {"block_length": 32, "threshold": 0.95},
    },
}
RULE = f"two or more mappings by name, or {' or '.join(PRESETS)}"


@settings
class PresetsTask(GenerationTask):
    """As a generation task, with the decoding settings that are compared."""

    presets: str | dict = setting("cfg", RULE, lambda value: isinstance(value, dict) or value in PRESETS)

    def check_decoding(self, wrong, presets: dict | None = None) -> None:
        """Presets by name, and what each of them changes."""
        if isinstance(self.presets, str):
            self.presets = PRESETS[self.presets]
        if bare := [name for name in self.presets if not isinstance(name, str)]:  # YAML's off and on are no words
            raise wrong("presets", "mappings by name (in quotes, where YAML reads a name otherwise)", bare[0])
        if len(self.presets) < 2 or not all(isinstance(part, dict) for part in self.presets.values()):
            raise wrong("presets", RULE, self.presets)
        super().check_decoding(wrong, {f"presets.{name}": part for name, part in self.presets.items()})


def run_presets(bench: Bench, task: Task, rows: list[Row]) -> Outcome:
    """
    The same questions under several decoding settings, one row at a time: each one's score and tokens per forward
    pass, and the paired differences from the first.
    """
    presets = {name: {**task.greedy, **task.decoding, **part} for name, part in task.presets.items()}
    asked = questions(bench, task, rows)
    length = length_for(bench, task, rows, asked)
    results, records, columns = [], [], {}
    for name, options in presets.items():
        options |= length
        answers = [_one(bench, task, place, rows[place], asked[place][0], options) for place in range(len(rows))]
        records += [{"preset": name, **record} for record in answers]
        own = {"preset": name, "generate": effective_settings(bench.model, **options)}
        figures = scored(answers)
        columns[name] = {figure["metric"]: [record[figure["metric"]] for record in answers] for figure in figures}
        tokens, forwards = [record["tokens"] for record in answers], [record["forwards"] for record in answers]
        figures.append({"metric": "tokens_per_forward", "rows": len(answers), **ratio(tokens, forwards)})
        results += [{**figure, **own, "metric": f"{figure['metric']}/{name}"} for figure in figures]
    first, *others = columns
    for name in others:
        for metric, values in columns[name].items():
            differences = [float(a) - float(b) for a, b in zip(values, columns[first][metric], strict=True)]
            own = {"metric": f"{metric}/{name} − {first}", "unit": "share, difference", "preset": name}
            results.append({**own, **mean(differences)})
    return Outcome(results, records)


def _one(bench: Bench, task: Task, place: int, row: Row, prompt: list[int], options: dict) -> dict:
    """One prompt's answer and verdict, and what it took; a forward pass with guidance counts once."""
    seed = keyed_seed(bench.seed, task.name, place)
    said = generate(bench.model, bench.tokenizer, prompt, seed=seed, **options)
    bench.progress(1)
    record = {"source_row": row.number, "answer": said.text, "ended": said.finished, "tokens": said.tokens}
    return {**record, "forwards": said.tokens / said.tokens_per_forward, **verdict(task, row, said.text)}


PER_FORWARD = "tokens kept by forward passes; a pass with guidance reads the row twice and counts once."

KIND = Kind(
    "Decoding presets",
    task=PresetsTask,
    check_row=check_question,
    run=run_presets,
    metrics={**METRICS, "tokens_per_forward": Metric(PER_FORWARD, "tokens/forward")},
    make_rows=puzzle_rows,
    steps=lambda task, rows: len(rows) * len(task.presets),
    short=questions,
    diffusion_only=True,
)
