"""A whole run: from the arguments to the files, and from the files of a run that was killed."""

import json
import shlex
import sys
import time
from pathlib import Path

from transformers import set_seed

from nanollada.trainers.data import Collator, DataArguments, prepare_data
from nanollada.trainers.rows import file_digest
from nanollada.trainers.setup import (
    ModelArguments,
    hardware,
    last_complete_checkpoint,
    load_model_and_tokenizer,
    own_process_group,
    versions,
)


def train(
    trainer_class, model_class, model_args: ModelArguments, data_args: DataArguments, args, command: str | None = None
) -> dict:
    """
    A whole run: model, tokenizer and data from their arguments, training (or resuming), evaluation, and the files.

    `args.output_dir` then holds the model, the tokenizer, `run.json`, `trainer_state.json`, `metrics.jsonl` and
    `loss.png`.

    Args:
        trainer_class, model_class: What is trained, and how.
        model_args, data_args, args: Parsed arguments; `args` is the trainer's config.
        command (`str`, *optional*): What `run.json` names as the command of the run.

    Returns:
        `dict`: the facts in `run.json`; `sha256` (of its files) on the rank alone that writes them.

    Raises:
        `ValueError`: if `output_dir` holds checkpoints of an earlier run and `resume_from_checkpoint` is not given.
    """
    resume = _checkpoint_to_resume(args)
    set_seed(args.seed)
    model, tokenizer = load_model_and_tokenizer(model_class, model_args, args.seed)
    with args.main_process_first(desc="preparing data"):
        data = prepare_data(data_args, tokenizer, seed=args.seed, **trainer_class.data_settings(args))
    trainer = trainer_class(
        model,
        args,
        data.train,
        Collator(tokenizer.pad_token_id, trainer_class.variable_length(args, data.format), args.seed),
        eval_dataset=data.eval,
        processing_class=tokenizer,
    )
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume)
    facts = {
        "nanollada_version": versions()["nanollada"],
        "model_class": model_class.__name__,
        "init": model_args.model_name_or_path,
        "objective": trainer.objective(),
        "command": command,
        "seed": args.seed,
        "ema_decay": args.ema_decay,
        "data": data.report,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "tokens_seen": int(trainer.state.num_input_tokens_seen),
        "parameters": model.num_parameters(),
        "seconds": round(time.perf_counter() - started, 1),
        "hardware": hardware(),
        "versions": versions(),
        **trainer.final_evaluation(data.eval),
    }
    trainer.save_model(args.output_dir)
    trainer.save_state()
    if trainer.is_world_process_zero():
        facts["sha256"] = _saved_digests(Path(args.output_dir))
        (Path(args.output_dir) / "run.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    return facts


def _saved_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that hold the model, by name: of these is the `evaluation` in `run.json`."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")])
    return {path.name: file_digest(path) for path in files}


def _checkpoint_to_resume(args) -> str | None:
    """`resume_from_checkpoint`: a folder, or "last" (also "true") for the newest complete one of `output_dir`."""
    newest = last_complete_checkpoint(args.output_dir)
    if args.resume_from_checkpoint in ("last", "true", "True", True):
        return newest
    if args.resume_from_checkpoint is None and newest is not None:
        raise ValueError(
            "`output_dir` must not hold checkpoints of another run: give `--resume_from_checkpoint last` to go on "
            f"from {Path(newest).name}, or another folder, got {args.output_dir}"
        )
    return args.resume_from_checkpoint


def main(trainer_class, config_class, model_class, argv: list[str] | None = None) -> dict:
    """Parses `--config recipe.yaml` and the command line over it, and runs `train`."""
    from trl import TrlParser

    parser = TrlParser((ModelArguments, DataArguments, config_class))
    argv = sys.argv[1:] if argv is None else argv
    script = f"trainers/{trainer_class.__name__.removesuffix('Trainer').lower()}.py"
    command = shlex.join(["accelerate", "launch", script, *map(str, argv)])
    with own_process_group():  # which the arguments start
        model_args, data_args, args = parser.parse_args_and_config(argv)
        return train(trainer_class, model_class, model_args, data_args, args, command)
