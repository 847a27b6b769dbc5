"""What a run says of itself, once before it trains and once when its files are written: the facts in `run.json`."""

import logging

from tqdm import tqdm
from transformers.trainer_utils import SchedulerType, has_length

from nanollada.trainers.commands.programs import command_of


def say(args, text: str) -> None:
    """Prints on the first process, past a progress bar; nothing where `log_level` is "error" or "critical"."""
    if not args.process_index and args.get_process_log_level() <= logging.WARNING:
        tqdm.write(text)


def block(title: str, lines: dict[str, str | None]) -> str:
    """A title, and names with what they are, aligned, a line each; those without a value are left out."""
    width = max(map(len, lines)) + 2
    return "\n".join([title, *(f"  {name:<{width}}{value}" for name, value in lines.items() if value is not None)])


# What a row is, by the format of the rows.
ROWS = {
    "pretrain": "texts, packed into rows of {} tokens",
    "sft": "prompts with answers, rows of up to {} tokens",
    "preference": "prompts with a better and a worse answer",
    "prompt": "prompts, each answered by the model and rewarded",
}
TEXTS = ("pretrain", "sft")  # formats whose rows have a likelihood that `evaluate` scores
HELD_OUT = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", "eval_reward", "eval_reward_std")


def plan_of(trainer, steps: int, report: dict) -> dict:
    """
    How a run trains, for `run.json`.

    Args:
        trainer: Before it trains.
        steps (`int`): All that are planned.
        report (`dict`): Of the rows, see [`~trainers.data.prepare.PreparedData`].

    Returns:
        `dict`: `steps` and `epochs` that are planned (`None` for a stream), `rows_per_step` with its factors
            `device_rows`, `accumulation` and `processes`, `step_tokens` (target tokens, the mean; `None` where they
            are not known before), `device`, `precision`, `learning_rate`, `schedule` (in words).
    """
    args, known = trainer.args, has_length(trainer.train_dataset)
    tokens = report.get("target_tokens") if known else None
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    autocast = trainer.accelerator.mixed_precision
    weights = str(trainer.model.dtype).removeprefix("torch.")
    return {
        "steps": steps,
        "epochs": steps * rows / (trainer.uses_of_a_row * report["rows"]) if known else None,
        "rows_per_step": rows,
        "device_rows": args.per_device_train_batch_size,
        "accumulation": args.gradient_accumulation_steps,
        "processes": args.world_size,
        "step_tokens": round(rows * tokens / report["rows"]) if tokens is not None else None,
        "device": args.device.type,
        "precision": weights if autocast == "no" else f"{autocast}, weights {weights}",
        "learning_rate": args.learning_rate,
        "schedule": schedule_in_words(args, steps),
    }


def schedule_in_words(args, steps: int) -> str:
    """What the learning rate does over the steps of a run."""
    warmup, kind = args.get_warmup_steps(steps), SchedulerType(args.lr_scheduler_type)
    if not hasattr(args, "min_lr_ratio"):  # TRL's configs leave all to transformers
        shape = kind.value
    elif args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY:
        kwargs = args.lr_scheduler_kwargs or {}
        decay = kwargs.get("num_decay_steps", -int(-args.lr_decay_ratio * steps // 1))
        floor = f"{kwargs.get('min_lr_ratio', args.min_lr_ratio):.0%}"
        shape = f"constant, then falling to {floor} over the last {decay:,}"
    elif args.lr_scheduler_type == SchedulerType.COSINE_WITH_MIN_LR and not args.lr_scheduler_kwargs:
        shape = f"then a cosine down to {args.min_lr_ratio:.0%}"
    else:
        shape = kind.value
    return f"warm-up over {warmup:,} step{'s' if warmup != 1 else ''}, {shape}" if warmup else shape


def beginning(facts: dict, resumed: str | None, output_dir: str) -> str:
    """
    The block before training.

    Args:
        facts (`dict`): What `run.json` will hold and is known before: `model_class`, `init`, `parameters`,
            `objective`, `data`, `training` (of `plan_of`).
        resumed (`str`, *optional*): The checkpoint that the run goes on from.
        output_dir (`str`): Where it writes.
    """
    data, plan = facts["data"], facts["training"]
    counted = plan["epochs"] is not None
    held_out = f"{data['eval']['rows']:,} held out" if data["eval"]["rows"] else "none held out"
    rows = f"{data['rows']:,} to train on" if counted else "a stream to train on"
    factors = f"{plan['device_rows']} a device × {plan['accumulation']} accumulated × {plan['processes']} "
    factors += "process" if plan["processes"] == 1 else "processes"
    tokens = f", about {plan['step_tokens']:,} target tokens" if plan["step_tokens"] is not None else ""
    epochs = f" ({plan['epochs']:.3g} epochs)" if counted else ""
    lines = {
        "model": f"{facts['model_class']}, {facts['parameters']:,} parameters, "
        + (f"from {facts['init']}" if facts["init"] else "fresh"),
        "objective": facts["objective"]["name"],
        "rows": f"{rows}, {held_out}: {ROWS[data['format']].format(data.get('max_length'))}",
        "epoch": f"{data['target_tokens']:,} target tokens" if plan["step_tokens"] is not None else None,
        "steps": f"{plan['steps']:,}{epochs}",
        "a step": f"{plan['rows_per_step']:,} rows ({factors}){tokens}",
        "device": f"{facts['hardware']}; {plan['precision']}",
        "learning rate": f"{plan['learning_rate']:g}: {plan['schedule']}",
        "writes to": output_dir,
        "goes on from": resumed,
    }
    return block("Training", lines) + "\n"


def ending(facts: dict, output_dir: str) -> str:
    """The block behind training: where the model is, its figures, the time, and what to do with it."""
    scores = figures(facts["evaluation"]) if facts["evaluation"] else metrics_in_words(facts.get("metrics"))
    lines = {
        "model": output_dir,
        "held out": scores or "no rows were held out: nothing was scored",
        "time": f"{clock(facts['seconds'])} for {facts['steps']:,} steps, {facts['tokens_seen']:,} tokens",
    }
    return "\n" + block("Done", lines)


def figures(evaluation: dict) -> str:
    """Nats per token and bits per byte with their errors; ≤ marks a bound."""
    nats, bits = (f"{evaluation[name]:.3f}" for name in ("nats_per_token", "bits_per_byte"))
    errors = {"masks": "bits_per_byte_standard_error", "rows": "bits_per_byte_sampling_error"}
    errors = {what: evaluation[name] for what, name in errors.items()}  # exact: no masks; a single row: no error
    errors = ", ".join(f"± {error:.3f} over {what}" for what, error in errors.items() if error)
    sign = "≤ " if evaluation["bound"] else ""
    kind = "a bound" if evaluation["bound"] else "exact"
    return f"{sign}{nats} nats per token, {sign}{bits} bits per byte ({', '.join(filter(None, (kind, errors)))})"


def metrics_in_words(metrics: dict | None) -> str:
    """The held-out figures of a run that are not of its likelihood."""
    shown = {name.removeprefix("eval_"): value for name, value in (metrics or {}).items() if name in HELD_OUT}
    return ", ".join(f"{name} {value:.4g}" for name, value in shown.items())


def commands_for(facts: dict, output_dir: str, prompt: str) -> str:
    """Commands that use the model: a chat, or a text that goes on from `prompt`; and the scores of texts."""
    data = facts["data"]
    ask = ["--prompt", prompt] if data["format"] == "pretrain" else ["--chat"]
    commands = {"write": command_of("generate", "--checkpoint", output_dir, *ask)}
    if data["format"] in TEXTS:
        sources, length = data["eval"]["sources"] or data["sources"], ["--max_length", str(data["max_length"])]
        commands["score"] = command_of("evaluate", "--checkpoint", output_dir, "--data", *sources, *length)
    return block("Next", commands)


def clock(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
