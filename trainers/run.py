"""A whole run: from the arguments to the files, and from the files of a run that was killed."""

import difflib
import inspect
import json
import logging
import multiprocessing
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from transformers import set_seed

from nanollada.modeling_nanollada.loading_nanollada import check_files
from nanollada.trainers import records
from nanollada.trainers.data.prepare import Collator, DataArguments, prepare_data
from nanollada.trainers.models import ModelArguments, load_model_and_tokenizer, own_process_group
from nanollada.trainers.records import file_digest, hardware, versions, write_json
from nanollada.trainers.resuming.checkpoints import (
    STATE,
    check_checkpoint,
    checkpoints_of,
    last_complete_checkpoint,
    step_of,
    was_finished,
)

logger = logging.getLogger(__name__)

LAST = ("last", "true", "True", True)


@dataclass(frozen=True)
class TrainerEntry:
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
    def program(self) -> str | None:
        """`trainers/<name>.py`, where trainer and config are from; `None` for classes that no program here runs."""
        files = {Path(inspect.getfile(part)).resolve() for part in (self.trainer_class, self.config_class)}
        file = files.pop()
        here = Path(__file__).resolve().parent
        return f"{here.name}/{file.name}" if not files and file.parent == here else None


def train(
    trainer: TrainerEntry,
    *,
    data: DataArguments,
    args,
    model: ModelArguments | None = None,
    command: str | None = None,
) -> dict:
    """
    A whole run: model, tokenizer and data from their arguments, training (or resuming), evaluation, and the files.

    `train(TRAINERS["diffusion"], data=DataArguments(data=["my.jsonl"]), model=ModelArguments(…),
    args=DiffusionConfig(output_dir="run", …))` does what `trainers/diffusion.py` does with the same options.

    `args.output_dir` then holds the model, the tokenizer, `run.json`, `trainer_state.json`, `metrics.jsonl` and
    `loss.png`. Resuming a run that is finished changes nothing, and says so.

    Args:
        trainer ([`TrainerEntry`]): What is trained, and how: one of `registry.TRAINERS`.
        data ([`~trainers.data.prepare.DataArguments`]): The rows.
        args: The trainer's config.
        model ([`~trainers.models.ModelArguments`], *optional*): The model and its tokenizer.
        command (`str`, *optional*): What `run.json` names as the command of the run. Defaults to this process's.

    Returns:
        `dict`: the facts in `run.json`; `sha256` (of its files) on the rank alone that writes them.

    Raises:
        `ValueError`: if `output_dir` holds checkpoints of an earlier run and `resume_from_checkpoint` is not given; if
            the checkpoint is damaged, or lies behind the run's last step; if `max_length` exceeds the model's
            `max_position_embeddings`.
        `FloatingPointError`: if the run diverges, naming the step.
    """
    entry, chosen = trainer, model or ModelArguments()
    resume = checkpoint_to_resume(args)
    set_seed(args.seed)
    model, tokenizer = load_model_and_tokenizer(entry.model_class, chosen, args.seed)
    check_length(data.max_length, model.config)
    with args.main_process_first(desc="preparing data"):
        rows = prepare_data(data, tokenizer, seed=args.seed, **entry.trainer_class.data_settings(args))
    trainer = entry.trainer_class(
        model,
        args,
        rows.train,
        Collator(tokenizer.pad_token_id, entry.trainer_class.variable_length(args, rows.format), args.seed),
        eval_dataset=rows.eval,
        processing_class=tokenizer,
    )
    finished = finished_run(args, resume, trainer.planned_steps())
    if finished is not None:
        return finished
    trainer.accelerator.wait_for_everyone()  # every rank has read the folder
    started = time.perf_counter()
    if trainer.is_world_process_zero() and resume is None:
        (Path(args.output_dir) / "run.json").unlink(missing_ok=True)  # of an earlier run, which this one replaces
    trainer.train(resume_from_checkpoint=resume)
    trainer.check_weights()
    facts = {
        "nanollada_version": versions()["nanollada"],
        "model_class": entry.model_class.__name__,
        "init": chosen.model_name_or_path,
        "objective": trainer.objective(),
        "command": command or records.command(),
        "seed": args.seed,
        "ema_decay": args.ema_decay,
        "data": rows.report,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "tokens_seen": int(trainer.state.num_input_tokens_seen),
        "parameters": model.num_parameters(),
        "seconds": round(time.perf_counter() - started, 1),
        "hardware": hardware(),
        "versions": versions(),
        **trainer.final_evaluation(rows.eval),
    }
    _write_last_files(trainer, facts)
    return facts


def _write_last_files(trainer, facts: dict) -> None:
    """Model, tokenizer and state, and `run.json` last and at once: a folder with one is a finished run's."""
    folder = Path(trainer.args.output_dir)
    if trainer.is_world_process_zero():
        (folder / "run.json").unlink(missing_ok=True)  # of the shorter run that this one went on from
    trainer.save_model(trainer.args.output_dir)
    trainer.save_state()
    if trainer.is_world_process_zero():
        facts["sha256"] = _saved_digests(folder)
        write_json(folder / "run.json", facts)


def _saved_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that hold the model, by name: of these is the `evaluation` in `run.json`."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")])
    return {path.name: file_digest(path) for path in files}


def check_length(max_length: int, config) -> None:
    """
    Raises:
        `ValueError`: for rows that are longer than the model's positions.
    """
    if max_length > config.max_position_embeddings:
        raise ValueError(
            "`max_length` must be at most the model's `max_position_embeddings`, got "
            f"{max_length} and {config.max_position_embeddings}"
        )


# ---- where a run begins


def checkpoint_to_resume(args) -> str | None:
    """
    `resume_from_checkpoint`: a folder, or "last" (also "true") for the newest whole one of `output_dir`.

    Raises:
        `ValueError`: for a folder that is not a whole checkpoint, and without `resume_from_checkpoint` if `output_dir`
            holds checkpoints; as `last_complete_checkpoint`.
    """
    if args.resume_from_checkpoint in LAST:
        newest = last_complete_checkpoint(args.output_dir)
        if newest is None and _finished_record(args.output_dir) is None:
            _say_that_it_begins(Path(args.output_dir))
        return newest
    if args.resume_from_checkpoint is not None:
        check_checkpoint(args.resume_from_checkpoint)
        return args.resume_from_checkpoint
    there = next((path for path in checkpoints_of(args.output_dir) if was_finished(path)), None)
    if there is not None:
        raise ValueError(
            "`output_dir` must not hold checkpoints of another run: give `--resume_from_checkpoint last` to go on "
            f"from {there.name}, or another folder, got {args.output_dir}"
        )
    return None


def _say_that_it_begins(folder: Path) -> None:
    siblings = folder.absolute().parent
    names = [path.name for path in siblings.iterdir() if path.is_dir()] if siblings.is_dir() else []
    others = [name for name in names if name != folder.name and checkpoints_of(siblings / name)]
    near = difflib.get_close_matches(folder.name, others, n=1, cutoff=0.75)
    hint = f" ({siblings / near[0]} holds checkpoints: was it meant?)" if near else ""
    logger.warning(
        "`resume_from_checkpoint`: %s holds no checkpoint, so the run starts from the beginning%s", folder, hint
    )


@dataclass(frozen=True)
class _Finished:
    """
    What a finished run left: its facts, its last step, the steps it was planned for, and the patience of its early
    stopping, if that ended it.
    """

    facts: dict
    step: int
    planned: int
    patience: int | None


def _finished_record(folder: str) -> _Finished | None:
    try:
        facts = json.loads((Path(folder) / "run.json").read_text(encoding="utf-8"))
        state = json.loads((Path(folder) / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if facts.get("steps") != state.get("global_step"):
        return None
    patience = None
    if state["global_step"] < state["max_steps"]:
        saved = state["stateful_callbacks"]
        saved = saved.get("EarlyStopping") or saved.get("EarlyStoppingCallback") or {}
        patience = saved.get("args", {}).get("early_stopping_patience")
    return _Finished(facts, state["global_step"], state["max_steps"], patience)


def finished_run(args, resume: str | None, planned: int) -> dict | None:
    """
    Compares a run that is to go on with what its folder says.

    Args:
        args: The trainer's config.
        resume (`str`, *optional*): The checkpoint to go on from.
        planned (`int`): The last step of the run that is asked for.

    Returns:
        `dict`, *optional*: the facts in `run.json` if that run is finished already: nothing is to be done.

    Raises:
        `ValueError`: if the checkpoint, or a finished run without one, is behind the last step that is asked for.
    """
    asked = "max_steps" if args.max_steps > 0 else "num_train_epochs"
    record = _finished_record(args.output_dir) if args.resume_from_checkpoint is not None else None
    step = step_of(resume) if resume is not None else None
    if resume is not None:
        state = json.loads((Path(resume) / STATE).read_text(encoding="utf-8"))
        step = state["global_step"]
        if planned < step:
            raise ValueError(
                f"`{asked}` must not end before the checkpoint, got {getattr(args, asked)} ({planned} steps) and "
                f"{Path(resume).name} of step {step}"
            )
    newest = args.resume_from_checkpoint in LAST or step == getattr(record, "step", None)
    if record is not None and newest and (step or 0) <= record.step:
        if planned < record.step:
            raise ValueError(
                f"`{asked}` must not end before the finished run, got {getattr(args, asked)} ({planned} steps) and "
                f"{args.output_dir} with {record.step} steps"
            )
        if _is_finished(args, record, planned) and _has_last_files(args, record, resume):
            ending = "early stopping ended it" if record.step < record.planned else f"`{asked}` is reached"
            logger.warning(
                "the run in %s is finished: %s at step %d. Nothing is changed", args.output_dir, ending, record.step
            )
            return record.facts
    if record is not None and resume is None:
        raise ValueError(
            f"`{asked}` must be that of the finished run, which left no checkpoint to go on from: {args.output_dir} "
            f"ended at step {record.step}, got {planned} steps"
        )
    if resume is None:
        return None
    _check_best_model(args, state)
    if state["max_steps"] != planned:
        logger.warning(
            "the run goes on from step %d to %d, but was planned for %d steps: learning rate, warm-up and every other "
            "schedule are now those of %d steps, so its weights are not those of an unbroken run",
            step,
            planned,
            state["max_steps"],
            planned,
        )
    return None


def _has_last_files(args, record: _Finished, resume: str | None) -> bool:
    """
    Whether the files of a finished run are there and can be read; else a checkpoint writes them again. Other bytes are
    no fault: whoever changed a file knows.

    Raises:
        `ValueError`: naming the file, where there is no checkpoint.
    """
    folder, names = Path(args.output_dir), (*record.facts.get("sha256", ()), "tokenizer.json", "tokenizer_config.json")
    fault = next((f"{name} is missing" for name in names if not (folder / name).is_file()), None)
    try:
        check_files(folder)
    except ValueError as error:
        fault = fault or str(error)
    if fault is None:
        return True
    if resume is None:
        raise ValueError(
            "`output_dir` must hold the files of the finished run, which left no checkpoint to write them again, got "
            f"{folder}: {fault}"
        )
    logger.warning("the run in %s is finished, but %s: its last files are written again", folder, fault)
    return False


def _is_finished(args, record: _Finished, planned: int) -> bool:
    """Longer than planned, or with more patience, a finished run goes on."""
    if record.step < record.planned and record.patience is not None:
        return 0 < args.early_stopping_patience <= record.patience
    return planned == record.step


def _check_best_model(args, state: dict) -> None:
    best = state.get("best_model_checkpoint")
    if args.load_best_model_at_end and best and not Path(best).is_dir():
        raise ValueError(
            f"`load_best_model_at_end` needs the checkpoint with the best model so far, got {best}, which is gone"
        )


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


def main(trainer: TrainerEntry, argv: list[str] | None = None) -> dict:
    """Parses `--config recipe.yaml` and the command line over it, and runs `train`."""
    from trl import TrlParser

    parser = TrlParser((ModelArguments, DataArguments, trainer.config_class), description=trainer.help)
    argv = sys.argv[1:] if argv is None else argv
    program = trainer.program  # none of somebody else's classes: `train` notes this process's command
    command = program and shlex.join(["accelerate", "launch", program, *map(str, argv)])
    with own_process_group():  # which the arguments start
        model, data, args = parser.parse_args_and_config(argv)
        use_fork_server(args)
        return train(trainer, data=data, args=args, model=model, command=command)
