"""A whole run: from the arguments to the files."""

import inspect
import logging
import multiprocessing
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from transformers import set_seed
from transformers.trainer_utils import has_length

from nanollada.trainers import records
from nanollada.trainers.commands.programs import command_of, name_of, recorded_command
from nanollada.trainers.console.overview import beginning, commands_for, ending, plan_of, say
from nanollada.trainers.data.prepare import DataArguments
from nanollada.trainers.models import ModelArguments, load_model_and_tokenizer, own_process_group, peft_config_of
from nanollada.trainers.records import file_digest, hardware, versions, write_json
from nanollada.trainers.resuming.checkpoints import checkpoints_of
from nanollada.trainers.resuming.finished import checkpoint_to_resume, finished_run
from nanollada.trainers.resuming.stopping import interrupted
from nanollada.trainers.weights import adapters

logger = logging.getLogger(__name__)


class RunEntry:
    """
    What `main` and `train` need to know of a program of `trainers/`. Its entries are frozen dataclasses.

    Attributes:
        name (`str`): In the registry.
        help (`str`): The first line of its help.
        config_class (`type`): Of the program's own file.
        arguments (`tuple[type, ...]`): The classes of its options: the model's, the rows', the trainer's.
    """

    @property
    def parts(self) -> tuple[type, ...]:
        """The classes that are the program's own."""
        return (self.config_class,)

    @property
    def program(self) -> str | None:
        """`trainers/<name>.py`, where its own classes are from; `None` for classes that no program here runs."""
        files = {Path(inspect.getfile(part)).resolve() for part in self.parts}
        file = files.pop()
        here = Path(__file__).resolve().parent
        return f"{here.name}/{file.name}" if not files and file.parent == here else None

    @property
    def console(self) -> str | None:
        """Its name among the programs; `None` as for `program`: `train` then notes this process's command."""
        return self.program and name_of(self.program)

    def set_up(self, model: ModelArguments, data, args):
        """A trainer with its model and, as `rows`, its data; it trains, saves and evaluates as `train` asks it to."""
        raise NotImplementedError


@dataclass(frozen=True)
class TrainerEntry(RunEntry):
    """
    What a program of `trainers/` trains, and how: its name in the registry, classes, and the first line of its help.

    Attributes:
        trainer_class, config_class: Of the program's own file.
        model_class: Which model it builds or loads.
    """

    name: str
    trainer_class: type
    config_class: type
    model_class: type
    help: str

    @property
    def parts(self) -> tuple[type, ...]:
        return (self.trainer_class, self.config_class)

    @property
    def arguments(self) -> tuple[type, ...]:
        return (ModelArguments, DataArguments, self.config_class)

    def set_up(self, model: ModelArguments, data: DataArguments, args):
        own, tokenizer = load_model_and_tokenizer(self.model_class, model, args.seed)
        adapter = peft_config_of(model)
        return self.trainer_class(own, args, processing_class=tokenizer, data_args=data, peft_config=adapter)


def train(
    trainer: RunEntry,
    *,
    data,
    args,
    model: ModelArguments | None = None,
    command: str | None = None,
    next_steps: bool = True,
) -> dict:
    """
    A whole run: model, tokenizer and data from their arguments, training (or resuming), evaluation, and the files.

    `train(TRAINERS["diffusion"], data=DataArguments(data=["my.jsonl"]), model=ModelArguments(…),
    args=DiffusionConfig(output_dir="run", …))` does what `trainers/diffusion.py` does with the same options.

    `args.output_dir` then holds the model, the tokenizer, `run.json`, `trainer_state.json`, `metrics.jsonl` and
    `loss.png`. Resuming a run that is finished changes nothing, and says so.

    Args:
        trainer ([`RunEntry`]): What is trained, and how: one of `registry.TRAINERS`.
        data ([`~trainers.data.prepare.DataArguments`]): The rows; of another class for DPO and GRPO, see `arguments`.
        args: The trainer's config.
        model ([`~trainers.models.ModelArguments`], *optional*): The model and its tokenizer; the entry's own class.
        command (`str`, *optional*): What `run.json` names as the command of the run. Defaults to this process's.
        next_steps (`bool`, *optional*, defaults to `True`): Whether to end with the commands that use the model.

    Returns:
        `dict`: the facts in `run.json`; `sha256` (of its files) on the rank alone that writes them.

    Raises:
        `ValueError`: if `output_dir` holds checkpoints of an earlier run and `resume_from_checkpoint` is not given; if
            the checkpoint is damaged, or lies behind the run's last step; if `max_length` exceeds the model's
            `max_position_embeddings`.
        `FloatingPointError`: if the run diverges, naming the step.
        [`~trainers.resuming.stopping.Interrupted`]: a `KeyboardInterrupt`, behind a checkpoint, at Ctrl-C or SIGTERM.
    """
    entry, chosen = trainer, model or trainer.arguments[0]()
    resume = checkpoint_to_resume(args)
    set_seed(args.seed)
    trainer = entry.set_up(chosen, data, args)
    rows = trainer.rows
    steps = trainer.planned_steps()
    finished = finished_run(args, resume, steps)
    if finished is not None:
        return finished
    trainer.accelerator.wait_for_everyone()  # every rank has read the folder
    started = time.perf_counter()
    if trainer.is_world_process_zero() and resume is None:
        (Path(args.output_dir) / "run.json").unlink(missing_ok=True)  # of an earlier run, which this one replaces
    facts = {
        "nanollada_version": versions()["nanollada"],
        "model_class": type(adapters.bare(trainer.plain_model)).__name__,
        "init": chosen.model_name_or_path,
        "command": command or records.command(),
        **_facts_before(trainer, steps, rows.report),
    }
    say(args, beginning(facts, resume, args.output_dir))
    trainer.train(resume_from_checkpoint=resume)
    trainer.check_weights()
    facts |= {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "tokens_seen": trainer.tokens_seen,
        "seconds": round(time.perf_counter() - started, 1),
        **trainer.final_evaluation(rows.eval),
    }
    _write_last_files(trainer, facts)
    say(args, ending(facts, args.output_dir))
    if next_steps:
        say(args, commands_for(facts, args.output_dir, _first_words(trainer.processing_class, rows)))
    return facts


def _facts_before(trainer, steps: int, report: dict) -> dict:
    """What `run.json` says and is known before training; counts of a stream are filled in while it is read."""
    return {
        "objective": trainer.objective(),
        "seed": trainer.args.seed,
        "ema_decay": getattr(trainer.args, "ema_decay", 0.0),
        "data": report,
        "training": plan_of(trainer, steps, report),
        "parameters": trainer.model.num_parameters(),
        "adapter": adapters.describe(trainer.model),
        "hardware": hardware(),
        "versions": versions(),
    }


def _first_words(tokenizer, rows) -> str:
    """A prompt of the kind that the model knows: what the first held-out (or training) row begins with."""
    if rows.format != "pretrain":
        return ""  # asked in a chat
    stored = rows.eval if rows.eval is not None else rows.train
    ids = stored[0]["input_ids"][:8] if has_length(stored) else []  # a stream is not read for it
    return tokenizer.decode(ids, skip_special_tokens=True).strip() or "The"


def _write_last_files(trainer, facts: dict) -> None:
    """Model, tokenizer and state, and `run.json` last and at once: a folder with one is a finished run's."""
    folder = Path(trainer.args.output_dir)
    if trainer.is_world_process_zero():
        (folder / "run.json").unlink(missing_ok=True)  # of the shorter run that this one went on from
    trainer.save_model(trainer.args.output_dir)
    trainer.save_state()
    facts["decoding"] = trainer.choose_decoding()  # behind the model, which takes no harm if this is broken off
    if trainer.is_world_process_zero():
        trainer.plain_model.generation_config.save_pretrained(folder)
        facts["sha256"] = _saved_digests(folder)
        write_json(folder / "run.json", facts)


def _saved_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that hold the model, by name: of these is the `evaluation` in `run.json`."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("config.json"), *folder.glob("adapter_config.json")])
    return {path.name: file_digest(path) for path in files}


def use_fork_server(args) -> None:
    """
    With several ranks, data workers come from a process without threads: a fork beside those of gloo or NCCL may copy
    a lock that nobody frees. Not for callers from Python: a fork server imports their script once more.
    """
    wanted = args.world_size > 1 and args.dataloader_num_workers and args.dataloader_multiprocessing_context is None
    if wanted and "forkserver" in multiprocessing.get_all_start_methods():
        args.dataloader_multiprocessing_context = "forkserver"
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["__main__", "nanollada.trainers.base"])  # which workers then need not import


def main(trainer: RunEntry, argv: list[str] | None = None, next_steps: bool = True) -> dict:
    """
    Parses `--config recipe.yaml` and the command line over it, and runs `train`.

    Raises:
        [`~trainers.resuming.stopping.Interrupted`]: at Ctrl-C or SIGTERM, saying what is saved and how to go on.
    """
    from nanollada.trainers.commands.parser import Parser

    parser = Parser(trainer.arguments, description=trainer.help)
    argv = sys.argv[1:] if argv is None else argv
    command = trainer.console and recorded_command(trainer.console, argv)
    with own_process_group():  # which the arguments start
        model, data, args = parser.parse_args_and_config(argv)
        use_fork_server(args)
        try:
            return train(trainer, data=data, args=args, model=model, command=command, next_steps=next_steps)
        except KeyboardInterrupt as error:  # its frames hold the trainer, and so the group's threads: a new one leaves
            newest = next(iter(checkpoints_of(args.output_dir)), None)
            again = trainer.console and command_of(trainer.console, *resuming_arguments(argv))
            stop = interrupted(error, args, newest, again)
    raise stop


def resuming_arguments(argv: list[str]) -> list[str]:
    """A command line that goes on from the newest checkpoint, whatever it went on from before."""
    name, kept, words = "--resume_from_checkpoint", [], iter(map(str, argv))
    for word in words:
        if word == name:
            next(words, None)
        elif not word.startswith(f"{name}="):
            kept.append(word)
    return [*kept, name, "last"]
