"""The programs by the names of the console command, and the commands that start them where the user stands."""

import difflib
import os
import shlex
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

CONSOLE = "nanollada"
ROOT = Path(__file__).resolve().parents[2]  # of a checkout, or the installed package
FOLDERS = {"recipe": "scripts/recipes", "suite": "scripts/suites"}


@dataclass(frozen=True)
class Program:
    """
    What `nanollada NAME` runs: `main` of a module.

    Attributes:
        file (`str`): The module's file, from the root of a checkout.
        help (`str`): What it does, in one line.
    """

    file: str
    help: str

    @property
    def module(self) -> str:
        """Its installed name."""
        return f"{CONSOLE}.{self.file.removesuffix('.py').replace('/', '.')}"

    @property
    def trains(self) -> bool:
        """Whether `accelerate launch` starts it, on several processes as well."""
        return self.file.startswith("trainers/")


PROGRAMS: dict[str, Program] = {
    "quickstart": Program("scripts/quickstart.py", "from text to two models, numbers and Hub folders, in minutes"),
    "train-tokenizer": Program("scripts/train_tokenizer.py", "train a tokenizer on your text"),
    "train-causal": Program("trainers/causal.py", "train an autoregressive model: pretraining and SFT"),
    "train-diffusion": Program("trainers/diffusion.py", "train a masked-diffusion model: pretraining and SFT"),
    "train-dpo": Program("trainers/dpo.py", "train either on preference pairs: DPO, VRPO"),
    "train-grpo": Program("trainers/grpo.py", "train either on checked answers of its own: GRPO"),
    "generate": Program("scripts/generate.py", "continue a prompt, fill gaps, or chat"),
    "compare": Program("scripts/compare.py", "an AR and a diffusion model side by side on the same prompts"),
    "demo": Program("scripts/demo.py", "both models in a browser, step by step"),
    "evaluate": Program("scripts/evaluate.py", "bits per byte, exact match, or a whole suite of tasks"),
    "lm-eval": Program("scripts/lm_eval_nanollada.py", "EleutherAI's harness on our checkpoints"),
    "benchmark": Program("scripts/benchmark.py", "speed of training and decoding on this machine"),
    "study": Program("scripts/study.py", "compare objectives at equal parameters and tokens"),
    "post-training-study": Program(
        "scripts/post_training_study.py", "compare DPO under shared and naive masks, and GRPO by replay and ELBO"
    ),
    "editing-study": Program("scripts/editing_study.py", "compare decoding with and without edits"),
    "puzzles": Program("scripts/puzzles.py", "rows of problems with checkable answers"),
    "pairs": Program("scripts/pairs.py", "preference pairs of a model's own right and wrong answers"),
    "convert": Program("scripts/convert_checkpoint.py", "bring foreign checkpoints here, take ours there"),
    "merge": Program("scripts/merge_checkpoints.py", "the mean of several checkpoints"),
    "export": Program("hub_upload/export.py", "make a Hub folder of a checkpoint"),
    "verify": Program("hub_upload/verify.py", "check a Hub folder in a clean process"),
    "upload": Program("hub_upload/upload.py", "push a Hub folder (a dry run without --push)"),
}


def name_of(file: str) -> str:
    """The name of the program that a file of the checkout is, `trainers/causal.py`."""
    return next(name for name, program in PROGRAMS.items() if program.file == file)


def nearest(word: str, words: Iterable[str]) -> str:
    """`": did you mean `a` or `b`?"` with the words nearest to one that is none of them; empty where none is near."""
    words = list(words)
    near = [other for other in words if len(word) > 2 and other.startswith(word)][:3]
    near += [other for other in difflib.get_close_matches(word, words) if other not in near]
    return f": did you mean {' or '.join(f'`{other}`' for other in near[:3])}?" if near else ""


def is_console() -> bool:
    """Whether this process is the console command, or `python -m nanollada`."""
    program = Path(sys.argv[0])
    return program.stem == CONSOLE or program.name == "__main__.py" and program.parent.name in (CONSOLE, "package")


def shown_name() -> str:
    """What help calls the running program."""
    return " ".join([CONSOLE, *sys.argv[1:2]]) if is_console() else Path(sys.argv[0]).name


def has_files() -> bool:
    """Whether the programs are files that a user starts: in a checkout, unless the console command was chosen."""
    return (ROOT / "pyproject.toml").is_file() and not is_console()


def command_of(name: str, *words: object) -> str:
    """
    The command of a program as it can be pasted where the user stands, quoted for a shell: with the checkout's files
    if those are in use, with the console command otherwise; by paths where this environment is not activated.

    Args:
        name (`str`): One of `PROGRAMS`.
        words: What follows: options, values, paths.
    """
    program = PROGRAMS[name]
    if has_files():
        path = ROOT / program.file
        start = [_tool("accelerate"), "launch"] if program.trains else [_tool("python")]
        start.append(min(os.path.relpath(path), str(path), key=len))
    elif program.trains and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        start = [_tool("accelerate"), "launch", "-m", program.module]
    else:
        start = [_tool(CONSOLE), name]
    return shlex.join([*start, *map(str, words)])


def _tool(name: str) -> str:
    """A program of this environment: its name if the shell finds this one by it, else its path."""
    own = Path(sys.executable).with_name(name)
    first = shutil.which(name)
    if not own.exists() or first is not None and Path(first).absolute() == own:
        return name
    return min(os.path.relpath(own), str(own), key=len)


def recorded_command(name: str, words: Iterable[object]) -> str:
    """The command of a program for a record: as `command_of`, without anything of this machine."""
    program, words = PROGRAMS[name], list(map(str, words))
    if not has_files():
        return shlex.join([CONSOLE, name, *words])
    return shlex.join([*(("accelerate", "launch") if program.trains else ("python",)), program.file, *words])


def named_file(name: str, kind: str, argument: str) -> Path:
    """
    The file of a recipe or suite: the one at this path, or the one that comes with the package, by its bare name.

    Args:
        name (`str`): A path, or a name with or without `.yaml`.
        kind (`str`): One of `FOLDERS`.
        argument (`str`): What the caller calls it, for the error.

    Raises:
        `ValueError`: if there is neither, naming the nearest that there are.
    """
    path = Path(name)
    if path.is_file():
        return path
    files = {file.stem: file for file in sorted((ROOT / FOLDERS[kind]).glob("*.yaml"))}
    stem = path.name.removesuffix(".yaml")
    if path.parent == Path() and stem in files:
        return files[stem]
    near = f": did you mean `{stem}`?" if stem in files else nearest(stem, files)
    among = near or f"; those that come with nanollada: {', '.join(files)}"
    raise ValueError(f"`{argument}` must be a file or the name of a {kind}, got {name}{among}")
