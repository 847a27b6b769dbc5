"""The technical report, scripts/REPORT.md, from the JSON files of finished runs.

    python scripts/technical_report.py
    python scripts/technical_report.py --collect runs/study/a.json runs/evaluation/suite.json --names study_a suite_dev

`--collect` first copies runs' files into the folder of results, with paths cut to their last two parts. Every number
of the report is read from there; its prose is technical_report_template.md.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from nanollada.scripts.reporting.tables import as_markdown, markdown
from nanollada.trainers.commands.ending import run_program

HERE = Path(__file__).parent
TEMPLATE = HERE / "technical_report_template.md"


@dataclass
class ReportArguments:
    """What is read and written."""

    results: str = field(default=str(HERE / "results"), metadata={"help": "Folder of the results' JSON files."})
    output: str = field(default=str(HERE / "REPORT.md"), metadata={"help": "The report."})
    collect: list[str] = field(default_factory=list, metadata={"help": "Files of runs to copy into `results` first."})
    names: list[str] = field(default_factory=list, metadata={"help": "Their names there, without .json."})

    def __post_init__(self):
        if len(self.collect) != len(self.names):
            raise ValueError(
                f"`names` must name each file of `collect`, got {len(self.names)} for {len(self.collect)} files"
            )
        if twice := [name for name in self.names if self.names.count(name) > 1]:
            raise ValueError(f"`names` must differ, got {twice[0]!r} twice")


def portable(value):
    """
    A JSON value without its machine: absolute paths keep their last two parts, recipes the repository's.

    Raises:
        `ValueError`: for two keys of an object that would become one.
    """
    if isinstance(value, dict):
        keys = [portable(key) for key in value]
        if twice := [key for key, short in zip(value, keys, strict=True) if keys.count(short) > 1]:
            raise ValueError(f"`collect` must have keys that differ in their last two parts, got {', '.join(twice)}")
        return dict(zip(keys, map(portable, value.values()), strict=True))
    if isinstance(value, list):
        return [portable(item) for item in value]
    if not isinstance(value, str):
        return value
    value = re.sub(r"[^\s'\"=]*/(scripts/recipes/)", r"\1", value)
    return re.sub(r"(?<![\w.:/])/(?:[^\s'\"/]+/)+([^\s'\"/]+/[^\s'\"/]+)", r"\1", value)


def collect(path: Path, target: Path) -> None:
    """
    Copies a run's JSON file into the folder of results.

    Raises:
        `ValueError`: if it is no result of a kind that the report knows, or has two keys that are one without the
            folders before them.
    """
    content = portable(json.loads(path.read_text(encoding="utf-8")))
    kind_of(content, path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def kind_of(content: dict, path: Path) -> str:
    """Of which program a file is."""
    for kind, (sign, _) in KINDS.items():
        if sign in content:
            return kind
    raise ValueError(f"`results` must be files of a study, a suite or a benchmark, got {path.name}")


# ---- the parts


PARTS = {
    "a": "Objectives and block lengths at equal parameters and tokens",
    "b": "Exact counts against Bernoulli masks",
    "c": "Many epochs over little text",
    "d": "What an AR start may keep",
}


def every(values) -> str:
    """All different ones."""
    return " / ".join(dict.fromkeys(values))


def training_tokens(content: dict) -> str:
    """
    How many tokens the models of a study's rows were trained on, before their start from another run, too.

    Raises:
        `ValueError`: if such a run is not in the file.
    """
    from nanollada.scripts.studies.runs import VARIANTS

    seen = {run["run"]: run["tokens_seen"] for run in content["runs"]}

    def total(name: str, seed: int) -> int:
        if f"{name}-{seed}" not in seen:
            raise ValueError(f"`results` must have the runs that others start from, got no {name}-{seed}")
        init = VARIANTS[name].init
        return seen[f"{name}-{seed}"] + (total(init, seed) if init else 0)

    titles = {}  # by number of tokens
    for name, title in dict.fromkeys((row["run"], row["title"]) for row in content["rows"]):
        seeds = [run["seed"] for run in content["runs"] if run["run"] == f"{name}-{run['seed']}"]
        titles.setdefault(every(f"{total(name, seed) / 1e6:.2f}M" for seed in seeds), []).append(title)
    *few, most = sorted(titles.items(), key=lambda pair: len(pair[1]))
    parts = [f"{tokens} ({'; '.join(names)})" for tokens, names in few]
    return ", ".join([*parts, f"{most[0]} ({'all others' if few else 'all'})"])


def study_part(content: dict) -> tuple[str, str]:
    """Title and text of a part of the study."""
    from nanollada.scripts.studies import report as study_report

    part = content["part"]
    parameters = every(f"{run['parameters'] / 1e6:.2f}M" for run in content["runs"])
    text = f"{parameters} parameters. Training tokens, with those of the run that one starts from: "
    text += training_tokens(content)
    if part == "c":
        text += f"; the text has {content['corpus']['small']['tokens']:,}"
    text += ". ± is over the held-out texts, and over seeds where there are several; the masks' noise is in it.\n\n"
    if part == "c":
        return PARTS[part], text + study_report.curve_table(content["rows"])
    reference = study_report.VARIANTS[study_report.REFERENCES.get(part, "ar")].title
    text += study_report.score_table(content["rows"], reference) if content["rows"] else ""
    if part == "b":
        text += "\n" + study_report.noise_table(content["noise"])
    return PARTS[part], text


POST_TRAINING = {
    "preferences": (
        "Preference learning: shared masks, naive masks, AR",
        "Held-out pairs whose chosen answer has the larger implicit reward (log-ratio to the start), is likelier, and "
        "is the longer one. Length balanced: pairs with a longer and with a shorter chosen answer count equally.",
    ),
    "problems": (
        "GRPO: replay against ELBO",
        "Fresh problems solved; cos is that of the policy gradients of ELBO and replay on one batch.",
    ),
}


def post_training_part(content: dict) -> tuple[str, str]:
    """Title and text of a part of the study of post-training."""
    from nanollada.scripts.studies.gains import tables

    title, text = POST_TRAINING[content["part"]]
    parameters = every(f"{run['parameters'] / 1e6:.2f}M" for run in content["runs"] if "parameters" in run)
    errors = "± is over the held-out items and over seeds; differences are paired."
    title += f", {content['settings']['puzzle']}" if content["part"] == "problems" else ""
    return title, f"{parameters} parameters. {text} {errors}\n\n{tables(content)}"


def editing_part(content: dict) -> tuple[str, str]:
    """Title and text of a part of the study of editing."""
    from nanollada.scripts.studies.editing.arms import PARTS as TASKS
    from nanollada.scripts.studies.editing.frontier import tables

    settings = content["settings"]
    text = every(f"{run['parameters'] / 1e6:.2f}M" for run in content["runs"] if "parameters" in run)
    text += f" parameters, {settings['steps']} further steps each from one checkpoint. Quality @ forward passes an "
    text += f"answer, edits an answer. {TASKS[content['part']].measure} ± is over the held-out rows and over seeds; "
    text += "differences are paired. Equal forwards: plain training's decoders without edits, mixed to the same mean."
    return f"Editing: {TASKS[content['part']].title}", f"{text}\n\n{tables(content)}"


def decoding(content: dict) -> tuple[str, str]:
    from nanollada.scripts.benchmarks.decoding import table

    arguments = content["arguments"]
    model = Path(arguments["model"]).name if arguments["model"] else f"{arguments['size']} with random weights"
    text = f"Model: {model}. Medians, in brackets the range over {arguments['repeats']} repeats; "
    text += "± is binomial over the scored rows, whose answers are as long as they need.\n\n"
    return "Decoding", text + as_markdown(table(content))


def training(content: dict) -> tuple[str, str]:
    from nanollada.scripts.benchmarks.training import tables

    text = f"{content['parameters'] / 1e6:.0f}M parameters. Medians, in brackets the range over repeats.\n"
    return "Training speed", text + "".join(f"\n{table.title}\n\n{as_markdown(table)}" for table in tables(content))


def suite(content: dict) -> tuple[str, str]:
    from nanollada.scripts.evaluation.report import kind_tables

    protocol = content["protocol"]
    sizes = ", ".join(f"{model['name']} {model['parameters'] / 1e6:.2f}M" for model in content["models"])
    rows = "all rows" if protocol["limit"] is None else f"at most {protocol['limit']} rows of a task, evenly spread"
    text = f"Parameters: {sizes}; {protocol['samples']} masks per scored text, {rows}, seed {content['seed']}. "
    text += "± is over the rows, [a, b] Wilson's 95 % interval; `masks ±` is the masks' part of the error, `open` the "
    text += "expected share of decisions that they got wrong.\n\n"
    tables = [f"**{title}**\n\n{table}" for title, table in kind_tables(content) if not title.endswith("by group")]
    return f"Evaluation: {protocol['description']}", text + "\n".join(tables)


# What a file must hold to be of a kind, in the order of the report.
KINDS = {
    "study": ("corpus", study_part),
    "post-training": ("contrasts", post_training_part),
    "editing": ("frontier", editing_part),
    "suite": ("protocol", suite),
    "decoding": ("slopes", decoding),
    "training": ("block_over_mdlm", training),
}


def provenance(name: str, content: dict) -> list[str]:
    """Where a file's numbers come from: file, hardware, versions, command; a study's runs have their own."""
    makers = [*content["runs"], *content.get("noise", [])] if "part" in content else [content]
    versions = every(
        ", ".join(f"{key} {value}" for key, value in maker["versions"].items() if key in ("torch", "transformers"))
        for maker in makers
    )
    commands = list(dict.fromkeys(maker.get("scored_by") or maker["command"] for maker in makers))
    many = f"{len(commands)} commands, the first: " if len(commands) > 1 else ""
    command = many + f"`{commands[0]}`".replace("|", "\\|")
    return [f"`results/{name}.json`", every(maker["hardware"] for maker in makers), versions, command]


def report(results: Path) -> str:
    """
    The report's text.

    Raises:
        `ValueError`: for an empty folder, and for a file of an unknown kind.
    """
    from jinja2 import Environment, StrictUndefined

    files = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))}
    if not files:
        raise ValueError(f"`results` must hold JSON files, got none in {results}")
    kinds = {path: kind_of(content, path) for path, content in files.items()}
    order = sorted(files, key=lambda path: (list(KINDS).index(kinds[path]), path.name))
    parts = []
    for path in order:
        title, text = KINDS[kinds[path]][1](files[path])
        parts.append(f"### {title}\n\nFrom `results/{path.name}`. {text.rstrip()}")
    rows = [provenance(path.stem, files[path]) for path in order]
    setup = markdown(["results", "hardware", "versions", "command"], rows).rstrip()
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(setup=setup, results="\n\n".join(parts))


def main(argv: list[str] | None = None) -> None:
    """Collects, and writes the report."""
    from nanollada.trainers.commands.parser import Parser

    (args,) = Parser(ReportArguments).parse_args_and_config(argv)
    for path, name in zip(args.collect, args.names, strict=True):
        collect(Path(path), Path(args.results) / f"{name}.json")
    Path(args.output).write_text(report(Path(args.results)), encoding="utf-8")
    print(f"report: {args.output}")


if __name__ == "__main__":
    run_program(main)
