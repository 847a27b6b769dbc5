"""The stages of a first run: from text to two models, their numbers, a page and Hub folders."""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from nanollada.scripts.first_run.rows import builtin_rows, read_rows, split_rows, texts_of, users_rows
from nanollada.trainers.commands.programs import command_of
from nanollada.trainers.records import file_digest, read_json, write_json

RECIPES = Path(__file__).parents[1] / "recipes"
STAGES = ("ar", "diffusion", "ar_sft", "diffusion_sft")
FULL_SIZE = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "tie_word_embeddings": False,
    "learning_rate": 1e-3,
}
MOST_NEW_TOKENS = 32
PROMPTS = ("What does the function `os.path.join` do?", "In which module is the class `Counter` defined?")


@dataclass
class QuickstartArguments:
    """Where the run goes and what it is made of."""

    output: str = field(default="runs/quickstart", metadata={"help": "Folder of the run."})
    data: list[str] | None = field(
        default=None,
        metadata={
            "help": "Your rows instead of the built-in ones: texts pretrain, chats or prompt/answer rows are SFT."
        },
    )
    size: Literal["1m", "32m"] = field(default="1m", metadata={"help": "32m: Nano-LLaDA's shape, hours on a CPU."})
    steps_share: float = field(default=1.0, metadata={"help": "Share of the recipes' steps, for a quick look."})
    on_bad_rows: Literal["stop", "skip"] = field(default="stop", metadata={"help": "stop, or skip and count them."})
    seed: int = field(default=42, metadata={"help": "Of the corpus, the weights, the noise and the evaluation."})

    def __post_init__(self):
        if self.size not in ("1m", "32m"):
            raise ValueError(f"`size` must be 1m or 32m, got {self.size!r}")
        if not 0 < self.steps_share <= 1:
            raise ValueError(f"`steps_share` must lie in (0, 1], got {self.steps_share}")


class Quickstart:
    """
    The stages of a run. Each leaves its files behind and is not done again.

    Args:
        args ([`QuickstartArguments`]): The settings; kept in the folder, which serves no other ones.

    Raises:
        `ValueError`: if the folder holds a run with other settings.
    """

    def __init__(self, args: QuickstartArguments):
        from rich.console import Console

        self.args, self.console, self.started = args, Console(), time.perf_counter()
        self.folder = Path(args.output)
        self.corpus = self.folder / "corpus"
        self._check_settings()

    def _check_settings(self) -> None:
        settings = asdict(self.args)
        files = [Path(path) for path in self.args.data or [] if Path(path).is_file()]
        digests = {str(path): file_digest(path) for path in files}
        settings = {name: value for name, value in settings.items() if name != "output"} | {"digests": digests}
        path = self.folder / "settings.json"
        if path.exists() and (earlier := read_json(path)) != settings:
            changed = [name for name in settings if settings[name] != earlier.get(name)]
            raise ValueError(
                f"`output` holds a run with another `{changed[0]}`: choose another folder, got {self.folder}"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)

    def run(self) -> list[str]:
        """All stages, each announced with its place and the time so far; returns what speaks against the run."""
        stages: list[tuple[str, Callable[[], None]]] = [
            ("corpus", self.make_corpus),
            ("tokenizer", self.make_tokenizer),
            ("AR pretraining", lambda: self.train("ar")),
            ("diffusion pretraining, from the AR model", lambda: self.train("diffusion")),
            ("AR SFT", lambda: self.train("ar_sft")),
            ("diffusion SFT", lambda: self.train("diffusion_sft")),
            ("evaluation of both", self.evaluate),
            ("comparison on prompts", self.compare),
            ("export and verification of both", self.export),
            ("report", self.report),
        ]
        for number, (name, stage) in enumerate(stages, 1):
            self.console.rule(f"[bold]{number}/{len(stages)} {name}[/bold]  {self.time()}")
            stage()
        return self.finish()

    def time(self) -> str:
        """Since this object was made, as minutes and seconds."""
        minutes, seconds = divmod(int(time.perf_counter() - self.started), 60)
        return f"{minutes}:{seconds:02d}"

    # 1: rows

    def make_corpus(self) -> None:
        """`text_train.jsonl`, `text_test.jsonl` and the same for `sft`; a test row is never a training row."""
        if (self.corpus / "split.json").exists():
            return
        texts, answers = users_rows(self.args.data, self.args.on_bad_rows) if self.args.data else ([], [])
        if not texts:  # then the built-in ones pretrain
            texts, own = builtin_rows(self.corpus, self.args.size, self.args.seed)
            answers = answers if self.args.data else own
        split = {"text": split_rows(texts, self.corpus, "text")}
        if answers:
            split["sft"] = split_rows(answers, self.corpus, "sft")
        write_json(self.corpus / "split.json", split)
        for kind, counts in split.items():
            self.console.print(f"{kind}: {counts['train']:,} training rows, {counts['test']:,} test rows")

    @property
    def has_answers(self) -> bool:
        return (self.corpus / "sft_train.jsonl").exists()

    @property
    def sudoku(self) -> Path | None:
        """The held-out sudokus, if answers to sudokus are what is trained."""
        return None if self.args.data else self.corpus / "sudoku_test.jsonl"

    # 2: tokenizer

    def make_tokenizer(self) -> None:
        """Byte-level BPE on the training rows."""
        from nanollada.trainers.data.tokenizers import train_tokenizer

        folder = self.folder / "tokenizer"
        if (folder / "tokenizer.json").exists():
            return
        files = [self.corpus / f"{kind}_train.jsonl" for kind in ("text", "sft")]
        texts = (text for file in files if file.exists() for row in read_rows(file) for text in texts_of(row))
        tokenizer = train_tokenizer(texts, 6400 if self.args.size == "32m" else 2048, show_progress=True)
        tokenizer.save_pretrained(self.folder / "tokenizer.partial")
        os.replace(self.folder / "tokenizer.partial", folder)

    # 3 to 6: training

    def train(self, stage: str) -> None:
        """One recipe, with this run's paths; goes on from the last checkpoint of a killed run."""
        if stage.endswith("_sft") and not self.has_answers:
            self.console.print("no rows with answers: the pretrained model stays as it is")
            return
        if (self.folder / stage / "run.json").exists():
            return
        from nanollada.trainers import run
        from nanollada.trainers.registry import TRAINERS

        recipe = RECIPES / f"quickstart_{stage}.yaml"
        run.main(
            TRAINERS[stage.removesuffix("_sft")], ["--config", str(recipe), *self.overrides(stage)], next_steps=False
        )

    def overrides(self, stage: str) -> list[str]:
        """What this run changes in a recipe, as command-line arguments."""
        import yaml

        recipe = yaml.safe_load((RECIPES / f"quickstart_{stage}.yaml").read_text())
        kind = "sft" if stage.endswith("_sft") else "text"
        chosen = {
            "data": self.corpus / f"{kind}_train.jsonl",
            "eval_data": self.corpus / f"{kind}_test.jsonl",
            "output_dir": self.folder / stage,
            "on_bad_rows": self.args.on_bad_rows,
            "seed": self.args.seed,
        }
        if any((self.folder / stage).glob("checkpoint-*")):
            chosen["resume_from_checkpoint"] = "last"
        if "model_name_or_path" in recipe:
            chosen["model_name_or_path"] = self.folder / Path(recipe["model_name_or_path"]).name
        else:
            chosen["tokenizer_name_or_path"] = self.folder / "tokenizer"
        if self.args.size == "32m":
            shape = FULL_SIZE if stage == "ar" else {"learning_rate": FULL_SIZE["learning_rate"]}
            chosen |= {**shape, "max_length": 256}
        elif self.args.data:
            chosen["max_length"] = 256
        for name in ("max_steps", "eval_steps", "save_steps"):
            chosen[name] = max(2, round(recipe[name] * self.args.steps_share))
        return [part for name, value in chosen.items() for part in (f"--{name}", str(value))]

    # 7 to 10: numbers, texts, folders

    def final(self, kind: str) -> Path:
        """The folder of the last model of a kind, "ar" or "diffusion"."""
        return self.folder / (f"{kind}_sft" if self.has_answers else kind)

    def evaluate(self) -> None:
        """Bits per byte of the test rows, before and after SFT, and exact match on the held-out sudokus."""
        from nanollada.hub_upload.evaluation_file import EVALUATION, save_evaluation
        from nanollada.scripts.evaluation.checkpoint import evaluate_checkpoint

        for stage in STAGES:
            checkpoint = self.folder / stage
            if not self.done(stage) or self.evaluated(stage):
                continue
            run = read_json(checkpoint / "run.json")
            kinds = ("text", "sft") if stage.endswith("_sft") else ("text",)
            data = [str(self.corpus / f"{kind}_test.jsonl") for kind in kinds]
            length = run["data"]["max_length"]
            options = {"samples": 8, "seed": self.args.seed, "batch_size": 32, "max_length": length}
            evaluation = evaluate_checkpoint(str(checkpoint), data, on_bad_rows=self.args.on_bad_rows, **options)
            if stage.endswith("_sft") and self.sudoku is not None:
                options = {"metrics": ["exact_match"], "seed": self.args.seed, "batch_size": 100}
                evaluation["results"] += evaluate_checkpoint(str(checkpoint), str(self.sudoku), **options)["results"]
            save_evaluation(evaluation, checkpoint / EVALUATION)
            write_json(self.folder / "results.json", {**self.results(), stage: evaluation})

    def results(self) -> dict[str, dict]:
        """What this program measured, by stage; a checkpoint's evaluation.json has other programs' results as well."""
        path = self.folder / "results.json"
        return read_json(path) if path.exists() else {}

    def evaluated(self, stage: str) -> bool:
        """Whether the stage's model, as it is now, has its results here and in its evaluation.json."""
        from nanollada.hub_upload.evaluation_file import EVALUATION, VERSION, model_digests

        checkpoint, known = self.folder / stage, self.results().get(stage, {})
        now = {"version": VERSION, **model_digests(checkpoint)}
        current = all(known.get(name) == value for name, value in now.items())
        return current and (checkpoint / EVALUATION).exists()

    def limit(self) -> dict:
        """
        How much a model may write, where that isn't the checkpoint's to say: models of a user's texts may never end
        one, and nobody reads a page of it here.
        """
        return {"max_new_tokens": MOST_NEW_TOKENS} if self.args.data else {}

    def prompts(self) -> list:
        """What the two models are compared on: questions and a sudoku, or what the user's test rows begin with."""
        if self.sudoku is not None:
            questions = [[{"role": "user", "content": question}] for question in PROMPTS]
            return [*questions, read_rows(self.sudoku)[0]["prompt"]]
        rows = read_rows(self.corpus / ("sft_test.jsonl" if self.has_answers else "text_test.jsonl"))[:3]
        return [row["text"][:60] if "text" in row else row.get("prompt") or row["messages"][:-1] for row in rows]

    def compare(self) -> None:
        """Both models on the same prompts: text, seconds, tokens per second and per forward."""
        from nanollada.scripts.decoding.comparison import CompareArguments, compare, comparison_table
        from nanollada.scripts.decoding.settings import DecodingArguments

        path = self.folder / "comparison.json"
        if not path.exists():
            pair = {kind: str(self.final(kind)) for kind in ("ar", "diffusion")}
            args = CompareArguments(**pair, prompts=self.prompts(), repeats=2, seed=self.args.seed)
            write_json(path, compare(args, DecodingArguments(**self.limit())))
        self.console.print(comparison_table(json.loads(path.read_text())))

    def export(self) -> None:
        """A Hub folder of each model, loaded and run in a clean process without nanollada."""
        from nanollada.hub_upload.export import export
        from nanollada.hub_upload.verify import verify

        language = None if self.args.data else "en"
        for kind, twin in (("ar", "diffusion"), ("diffusion", "ar")):
            folder, report = self.folder / "hub" / f"nanollada-{kind}", self.folder / f"verified_{kind}.json"
            if report.exists():
                continue
            options = {"license": "apache-2.0", "language": language, "twin": f"nanollada-{twin}"}
            if kind == "diffusion":
                self.denoise()
                options["picture"] = self.folder / "denoising.png"
            export(self.final(kind), folder, **options, overwrite=folder.exists())
            write_json(report, verify(folder))
            self.console.print(f"{folder}: verified")

    def denoise(self) -> tuple:
        """The last of the prompts and how it is answered, which `denoising.png` shows."""
        from nanollada.scripts.first_run.page import draw_denoising, record

        prompt = self.prompts()[-1]
        trace = record(self.final("diffusion"), prompt, self.args.seed, **self.limit())
        draw_denoising(trace, self.folder / "denoising.png")
        return prompt, trace

    def report(self) -> None:
        """`report.html`: the table, the loss curves, the comparison and a denoising (also in `denoising.png`)."""
        from nanollada.scripts.first_run.page import shown_prompt, write_report

        prompt, trace = self.denoise()
        stages = [stage for stage in STAGES if self.done(stage)]
        write_report(self.folder / "report.html", self.folder, stages, trace, shown_prompt(prompt))

    def done(self, stage: str) -> bool:
        return (self.folder / stage / "run.json").exists()

    def next_commands(self) -> list[str]:
        """What to try on the diffusion model, ready to paste: a prompt, and a chat where it has learnt to."""
        prompt, words = self.prompts()[-1], ["--checkpoint", self.final("diffusion"), "--watch"]
        if isinstance(prompt, str):
            limit = [part for name, value in self.limit().items() for part in (f"--{name}", value)]
            return [command_of("generate", *words, "--prompt", prompt, *limit)]
        words.append("--chat")
        return [command_of("generate", *words, "--prompt", prompt[-1]["content"]), command_of("generate", *words)]

    def finish(self) -> list[str]:
        """The table, where everything is, and what to try next; last, what speaks against the run."""
        from nanollada.scripts.first_run.expected import DISTRUST, doubts
        from nanollada.scripts.first_run.page import results_table

        self.console.rule("[bold]done[/bold]")
        self.console.print(results_table(self.folder, [stage for stage in STAGES if self.done(stage)]))
        where = {
            "report": self.folder / "report.html",
            "models": f"{self.final('ar')}, {self.final('diffusion')}",
            "Hub folders (verified)": f"{self.folder}/hub/nanollada-ar, {self.folder}/hub/nanollada-diffusion",
            "losses": f"{self.folder}/*/loss.png and metrics.jsonl",
            "time": f"{self.time()} (this call)",
        }
        for name, place in where.items():
            self.console.print(f"[bold]{name}[/bold]: {place}", soft_wrap=True)
        self.console.print("\nNext:")
        for line in self.next_commands():
            self.console.print(line, soft_wrap=True, markup=False, highlight=False)
        against = doubts(self.folder)
        if against:
            self.console.print(f"\n[bold red]{DISTRUST}[/bold red]", soft_wrap=True)
        for doubt in against:
            self.console.print(f"- {doubt}", soft_wrap=True, markup=False, highlight=False)
        return against


def main(argv: list[str] | None = None) -> int:
    """Runs what the command line says; returns the exit status: 3 where the run distrusts itself, 130 for Ctrl-C."""
    from nanollada.trainers.commands.parser import Parser

    (args,) = Parser(QuickstartArguments).parse_args_and_config(argv)
    if find_spec("matplotlib") is None:
        raise ValueError(
            "the first run needs matplotlib (pip install 'nanollada[quickstart]'), which is not installed"
        )
    run = Quickstart(args)
    try:
        return 3 if run.run() else 0
    except KeyboardInterrupt as stop:  # of a training with what it saved
        again = command_of("quickstart", *(sys.argv[1:] if argv is None else argv))
        print(getattr(stop, "saved", "interrupted"), f"Go on with: {again}", sep="\n", file=sys.stderr)
        return 130
