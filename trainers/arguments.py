"""Every field of transformers' `TrainingArguments`: it works here, is transformers' own, or is refused by name."""

import dataclasses
import logging

from transformers import TrainingArguments
from transformers.integrations import is_tensorboard_available, is_trackio_available
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.trainer_utils import SchedulerType

logger = logging.getLogger(__name__)

# What decides a run's rows, steps, numbers or files, and does here what transformers' help says.
WORKING = frozenset(
    """
    output_dir num_train_epochs max_steps per_device_train_batch_size per_device_eval_batch_size
    gradient_accumulation_steps average_tokens_across_devices seed full_determinism
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps
    optim optim_args optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm
    neftune_noise_alpha bf16 fp16 tf32 use_cpu gradient_checkpointing gradient_checkpointing_kwargs
    activation_checkpointing activation_checkpointing_kwargs
    logging_strategy logging_steps logging_first_step include_num_input_tokens_seen disable_tqdm
    eval_strategy eval_steps eval_delay eval_on_start do_eval
    save_strategy save_steps save_total_limit save_only_model resume_from_checkpoint
    load_best_model_at_end metric_for_best_model greater_is_better
    dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context accelerator_config
    """.split()
)
# What transformers, accelerate or torch act on without us, and no row, loss or file of a run depends on.
TRANSFORMERS_OWN = frozenset(
    """
    local_rank log_level log_level_replica log_on_each_node report_to run_name project
    trackio_space_id trackio_bucket_id trackio_static_space_id debug skip_memory_metrics torch_empty_cache_steps
    torch_compile torch_compile_backend torch_compile_mode
    ddp_backend ddp_timeout ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph
    fsdp fsdp_config deepspeed do_train prediction_loss_only
    """.split()
)
_ROWS = "a step's rows depend on its number alone"
_SCORE = "evaluation is the likelihood of the held-out rows, row by row"
_ORDER = "rows come in an order of `seed`"
_HUB = "publishing is hub_upload/, which checks what it sends"
# What would do nothing here, or something else than it says: the reason. The only value is the default's.
REFUSED = {
    "label_smoothing_factor": "the loss is the objective's",
    "data_seed": _ORDER,
    "train_sampling_strategy": _ORDER,
    "length_column_name": _ORDER,
    "auto_find_batch_size": _ROWS,
    "ignore_data_skip": _ROWS,
    "dataloader_in_order": _ROWS,
    "parallelism_config": "processes share the rows of a step, and not a row",
    "remove_unused_columns": "rows keep their keys",
    "label_names": "the targets are `labels`",
    "use_cache": "training needs no cache",
    "use_liger_kernel": "there is no kernel for this model",
    "liger_kernel_config": "there is no kernel for this model",
    "logging_nan_inf_filter": "a loss that is not finite ends the run, and is not hidden",
    "eval_accumulation_steps": _SCORE,
    "eval_do_concat_batches": _SCORE,
    "eval_use_gather_object": _SCORE,
    "include_for_metrics": _SCORE,
    "batch_eval_metrics": _SCORE,
    "bf16_full_eval": _SCORE,
    "fp16_full_eval": _SCORE,
    "do_predict": "a run has nothing to predict",
    "enable_jit_checkpoint": "a killed run goes on from its last checkpoint of `save_steps`",
    "restore_callback_states_from_checkpoint": "early stopping goes on by itself, with the patience that is given",
    "save_on_each_node": "a checkpoint is one folder that all processes see",
    "push_to_hub": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_token": _HUB,
    "hub_private_repo": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
}
# A value that asks for what happens anyway; other people's scripts pass it.
ASKED_ANYWAY = (("label_names", ["labels"]),)
# A setting of ours that only these schedules read.
SCHEDULES = {
    "lr_decay_ratio": (SchedulerType.WARMUP_STABLE_DECAY,),
    "min_lr_ratio": (SchedulerType.WARMUP_STABLE_DECAY, SchedulerType.COSINE_WITH_MIN_LR),
}


# `report_to`: what the extra `logging` has.
REPORTERS = {"tensorboard": is_tensorboard_available, "trackio": is_trackio_available}


def default_of(field: dataclasses.Field):
    """A dataclass field's default value."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def check_inherited(args) -> None:
    """
    Checks the fields that training arguments have from transformers, as they were given.

    Raises:
        `ValueError`: naming a field with another value than its default that is refused here, or that this nanollada
            doesn't know (a newer transformers has it).
    """
    own = {field.name: default_of(field) for field in dataclasses.fields(args)}
    for field in dataclasses.fields(TrainingArguments):
        name, value = field.name, getattr(args, field.name)
        if name in WORKING or name in TRANSFORMERS_OWN or value == own[name] or (name, value) in ASKED_ANYWAY:
            continue
        if name not in REFUSED:
            raise ValueError(f"`{name}` is new in this transformers and not known to do anything here, got {value!r}")
        raise ValueError(f"`{name}` must be {own[name]!r}: {REFUSED[name]}, got {value!r}")


def check_processes(args) -> None:
    """
    Raises:
        `ValueError`: for several GPUs in one process (`torch.nn.DataParallel`).
    """
    if args.n_gpu > 1:
        raise ValueError(f"Several GPUs need one process each (accelerate launch), got {args.n_gpu} in one process")


def check_reporters(args) -> None:
    """
    Raises:
        `ValueError`: for a `report_to` that transformers doesn't know, and one whose package is missing.
    """
    for name in (name for name in args.report_to if name not in REPORTERS):
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ValueError(f"`report_to` must be none, all or some of {known}, got {name!r}")
        if name not in get_available_reporting_integrations():
            raise ValueError(f"`report_to` {name} needs its package, which is not installed, got none")
    for name in (name for name in args.report_to if name in REPORTERS):
        if not REPORTERS[name]():
            raise ValueError(f"`report_to` {name} needs its package (pip install 'nanollada[logging]'), got none")


def check_schedule(args) -> None:
    """
    Checks that the schedule reads what is given for it; what it doesn't read is named in the log.

    Raises:
        `ValueError`: for `lr_decay_ratio` or `min_lr_ratio` beside `lr_scheduler_kwargs` that say the same.
    """
    defaults = {field.name: default_of(field) for field in dataclasses.fields(args)}
    kwargs = args.lr_scheduler_kwargs if isinstance(args.lr_scheduler_kwargs, dict) else {}
    twins = {"lr_decay_ratio": ("num_decay_steps",), "min_lr_ratio": ("min_lr_ratio", "min_lr_rate", "min_lr")}
    for name, schedules in SCHEDULES.items():
        value = getattr(args, name)
        if value == defaults[name]:
            continue
        if args.lr_scheduler_type not in schedules:  # a recipe's, under another schedule on the command line
            names = " and ".join(schedule.value for schedule in schedules)
            chosen = args.lr_scheduler_type.value
            logger.warning("`%s` of %s does nothing under %s: it is for %s", name, value, chosen, names)
            continue
        both = [twin for twin in twins[name] if twin in kwargs]
        if both:
            raise ValueError(
                f"`{name}` must not be given with `lr_scheduler_kwargs` {both[0]}, got {value} and {kwargs}"
            )
