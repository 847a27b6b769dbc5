"""Where a run begins: at a checkpoint, at its first step, or nowhere, because it is finished."""

import difflib
import logging
from dataclasses import dataclass
from pathlib import Path

from nanollada.modeling_nanollada.loading_nanollada import check_files
from nanollada.trainers.records import read_json
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
        facts, state = read_json(Path(folder) / "run.json"), read_json(Path(folder) / STATE)
    except ValueError:
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
        state = read_json(Path(resume) / STATE)
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
