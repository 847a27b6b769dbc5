"""The runs of a study: each is a process of its own, and what is done is not done again."""

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import asdict
from graphlib import TopologicalSorter
from pathlib import Path

from nanollada.trainers.commands.programs import name_of, recorded_command
from nanollada.trainers.records import provenance, read_json, write_json

SCRIPTS = Path(__file__).parents[1]
OF_A_CALL = ("runs", "seeds", "jobs", "minutes", "only")  # the runs' own processes get `only` and no others


class Cells:
    """
    Runs by name and seed in a folder. A kind of study says what they are (`names`, `needs`), what is `done`, how to
    `prepare` and `do` one, and how to `report`.

    Args:
        args: The settings of a study, with `output`, `part`, `runs`, `seeds`, `jobs`, `minutes` and `only`; kept in
            the folder, which serves no other ones.
        options (`list[str]`): Command-line arguments for every training.

    Raises:
        `ValueError`: if the folder holds a study with other settings.
    """

    program: str  # its file in scripts/
    free: tuple[str, ...] = ("output", "part", *OF_A_CALL)  # what may differ between two calls for the same folder

    def __init__(self, args, options: list[str] | None = None):
        self.args, self.options = args, list(options or [])
        self.folder = Path(args.output)
        settings = {name: value for name, value in asdict(args).items() if name not in self.free}
        settings["options"] = self.options
        path = self.folder / "settings.json"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, settings)  # once: the runs' own processes begin at the same time
        earlier = read_json(path)
        if changed := [name for name in settings if settings[name] != earlier.get(name)]:
            raise ValueError(
                f"`output` holds a study with another `{changed[0]}`: choose another folder, got {self.folder}"
            )

    def run_folder(self, name: str, seed: int) -> Path:
        return self.folder / f"{name}-{seed}"

    def command(self) -> dict:
        """The command of this process and what it runs on, for its numbers."""
        name = name_of(f"scripts/{self.program}")
        return {**provenance(), "command": recorded_command(name, sys.argv[1:])}

    def plan(self) -> list[tuple[str, int]]:
        """The runs of this call, seed by seed, each behind the one that it starts from; finished ones are left out."""
        order = []
        for seed in self.args.seeds:
            for name in self.args.runs or self.names():
                order += [(needed, seed) for needed in (self.needs(name), name) if needed]
        return [run for run in dict.fromkeys(order) if not self.done(*run)]

    def run(self) -> dict[str, dict]:
        """
        Prepares, runs what is not done, as many at a time as `jobs`, and returns the report on all that is.

        Raises:
            `RuntimeError`: with the end of its log, if a run failed; the others that were running are finished first.
        """
        self.prepare()
        runs, started, failed = self.plan(), time.perf_counter(), []
        before = {run: {(self.needs(run[0]), run[1])} & set(runs) for run in runs}
        order = TopologicalSorter(before)
        order.prepare()
        count = itertools.count(1)

        def do(run: tuple[str, int]) -> None:
            late = self.args.minutes is not None and time.perf_counter() - started > 60 * self.args.minutes
            if not (late or failed):
                print(f"{time.perf_counter() - started:7.0f} s  {next(count)}/{len(runs)}  {run[0]}-{run[1]}")
                if self.start(*run).wait():
                    failed.append(run)

        in_order(order, do, self.args.jobs)
        if failed:
            log = self.run_folder(*failed[0]).with_suffix(".log")
            raise RuntimeError(f"{failed[0][0]}-{failed[0][1]} failed: {log}\n{log.read_text()[-2000:]}")
        return self.report()

    def start(self, name: str, seed: int) -> subprocess.Popen:
        """
        A run in a process of its own, with its share of the cores, unless `OMP_NUM_THREADS` says how many; what it
        prints goes to `<name>-<seed>.log`.
        """
        threads = max(1, (os.cpu_count() or 1) // self.args.jobs)
        environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", **os.environ}
        command = [sys.executable, str(SCRIPTS / self.program), *self.arguments(), "--only", f"{name}-{seed}"]
        with open(self.run_folder(name, seed).with_suffix(".log"), "w") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def arguments(self) -> list[str]:
        """This study's settings as command-line arguments, without those of the whole call."""
        given = {name: value for name, value in asdict(self.args).items() if name not in OF_A_CALL}
        return options_of({name: value for name, value in given.items() if value not in (None, [])}) + self.options

    def finished(self, names) -> dict[str, list[Path]]:
        """The folders of the finished runs by name; names without one are left out."""
        folders = {}
        for name in names:
            paths = sorted(self.folder.glob(f"{name}-*/"), key=lambda path: path.name)
            folders[name] = [path for path in paths if self.done(name, int(path.name.rpartition("-")[2]))]
        return {name: paths for name, paths in folders.items() if paths}


def in_order(order: TopologicalSorter, do: Callable, jobs: int) -> None:
    """Does everything that is sorted, each behind what it needs, as many at a time as `jobs`."""
    with ThreadPoolExecutor(jobs) as pool, ExitStack() as at_the_end:
        at_the_end.callback(pool.shutdown, wait=False, cancel_futures=True)  # interrupted: nothing new begins
        running = {}
        while order.is_active():
            running |= {pool.submit(do, node): node for node in order.get_ready()}
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                order.done(running.pop(future))
                future.result()


def options_of(values: dict) -> list[str]:
    """Command-line arguments of options by name."""
    return [part for name, value in values.items() for part in (f"--{name}", *listed(value))]


def listed(value) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def options_by_name(words: list[str]) -> dict[str, str | list[str]]:
    """
    Options for the trainers by name, of command-line arguments; a list where several values follow a name.

    Raises:
        `ValueError`: for values without a name, and names without a value.
    """
    options, values = {}, []
    for word in words:
        if word.startswith("--"):
            options[word[2:]] = values = []
        else:
            values.append(word)
    if not all(options.values()) or (words and not words[0].startswith("--")):
        raise ValueError(f"options for the trainers must be `--name value`, got {words}")
    return {name: values if len(values) > 1 else values[0] for name, values in options.items()}
