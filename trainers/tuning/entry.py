"""What a program that tunes a policy is, and how its run is set up."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from transformers import TrainingArguments

from nanollada.trainers.arguments import (
    REFUSED,
    TRANSFORMERS_OWN,
    WORKING,
    check_processes,
    check_reporters,
    default_of,
)
from nanollada.trainers.console.callbacks import MetricsCallback
from nanollada.trainers.console.lines import show_lines
from nanollada.trainers.models import check_length, peft_config_of
from nanollada.trainers.run import RunEntry
from nanollada.trainers.tuning.policy import PolicyArguments, load_policy, load_reference
from nanollada.trainers.weights.adapters import is_adapted, name_base


@dataclass(frozen=True)
class TuningEntry(RunEntry):
    """
    A program that trains a checkpoint further with a trainer of TRL's.

    Attributes:
        name, help: As of [`~trainers.run.RunEntry`].
        config_class: A subclass of TRL's config, of the program's own file.
        data_class: The options of its rows.
        load_rows (`Callable`): `load_rows(data, tokenizer, args, config)`, with the policy's config, gives
            [`~trainers.data.prepare.PreparedData`].
        build (`Callable`): `build(policy=, reference=, tokenizer=, rows=, data=, args=, peft_config=)` gives a trainer
            of a class that [`~trainers.tuning.trainer.resumable`] made.
        objective (`Callable`): `objective(trainer)` gives what `run.json` says of it.
        needs_reference (`Callable`): `needs_reference(args)` says whether there is one.
        curve (`tuple[str, str]`): The number that is drawn over the steps, and its axis.
    """

    name: str
    help: str
    config_class: type
    data_class: type
    load_rows: Callable
    build: Callable
    objective: Callable
    needs_reference: Callable
    curve: tuple[str, str] = ("loss", "loss")

    @property
    def arguments(self) -> tuple[type, ...]:
        return (PolicyArguments, self.data_class, self.config_class)

    def set_up(self, model: PolicyArguments, data, args):
        """
        The trainer, with its policy, its reference and its rows.

        Raises:
            `ValueError`: for a reference that nothing compares with; and as `check_tuning`, `load_policy` and
                `load_reference`.
        """
        check_tuning(args)
        needed = self.needs_reference(args)
        if model.ref_model_name_or_path is not None and not needed:
            raise ValueError(
                "`ref_model_name_or_path` must be left out: these settings compare with no reference, got "
                f"{model.ref_model_name_or_path}"
            )
        policy, tokenizer = load_policy(model, args.seed)
        if (longest := getattr(args, "max_length", None)) is not None:
            check_length(longest, policy.config)
        with args.main_process_first(desc="preparing data"):
            rows = self.load_rows(data, tokenizer, args, policy.config)
        adapter = peft_config_of(model)
        own_reference = needed and (adapter is None or model.ref_model_name_or_path is not None)
        reference = load_reference(model, policy, args.seed) if own_reference else None
        trainer = self.build(
            policy=policy,
            reference=reference,
            tokenizer=tokenizer,
            rows=rows,
            data=data,
            args=args,
            peft_config=adapter,
        )
        if is_adapted(trainer.model):
            name_base(trainer.model)
        trainer.rows, trainer.objective = rows, partial(self.objective, trainer)
        trainer.add_callback(MetricsCallback(curve=self.curve))
        show_lines(trainer)
        return trainer


_OURS = "the policy is loaded by `model_name_or_path`, strictly"
# What TRL's configs and transformers' have, and a run does not do: the reason.
NOT_TUNING = {
    **{name: reason for name, reason in REFUSED.items() if name.startswith(("hub_", "push_"))},
    "model_init_kwargs": _OURS,
    "trust_remote_code": _OURS,
    "pad_token": "the checkpoint's tokenizer has one",
    "router_aux_loss_coef": "there are no experts",
    "use_vllm": "vLLM does not run these models",
}
for _name in ("label_smoothing_factor", "data_seed", "train_sampling_strategy", "length_column_name"):
    NOT_TUNING[_name] = REFUSED[_name]
for _name in ("auto_find_batch_size", "ignore_data_skip", "parallelism_config", "use_cache", "enable_jit_checkpoint"):
    NOT_TUNING[_name] = REFUSED[_name]
for _name in ("use_liger_kernel", "liger_kernel_config", "do_predict", "restore_callback_states_from_checkpoint"):
    NOT_TUNING[_name] = REFUSED[_name]


def check_tuning(args) -> None:
    """
    Checks what a config of TRL's has inherited.

    Raises:
        `ValueError`: naming a field that does nothing here, or is unknown, and several GPUs in one process.
    """
    known = WORKING | TRANSFORMERS_OWN | REFUSED.keys() | NOT_TUNING.keys()
    new = {field.name for field in dataclasses.fields(TrainingArguments)} - known
    for field in dataclasses.fields(args):
        name, value = field.name, getattr(args, field.name)
        if value == default_of(field):
            continue
        if name in NOT_TUNING:
            raise ValueError(f"`{name}` must be {default_of(field)!r}: {NOT_TUNING[name]}, got {value!r}")
        if name in new:
            raise ValueError(f"`{name}` is new in this transformers and not known to do anything here, got {value!r}")
    check_reporters(args)
    check_processes(args)
