"""What the AR and the diffusion trainer share: exact normalisation, and evaluation."""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import SchedulerType

from nanollada.modeling_nanollada.loading_nanollada import check_tokenizer, load_tokenizer
from nanollada.trainers.arguments import check_inherited, check_processes, check_reporters, check_schedule
from nanollada.trainers.console.callbacks import MetricsCallback
from nanollada.trainers.console.lines import show_lines
from nanollada.trainers.data.collator import Collator
from nanollada.trainers.data.prepare import (
    DataArguments,
    PreparedData,
    checked_dataset,
    format_of,
    is_tokenized,
    needs_tokenizer,
    prepare_data,
    prepare_datasets,
    without_sources,
)
from nanollada.trainers.decoding.defaults import length_limit, longest_row, set_defaults
from nanollada.trainers.models import ModelArguments, add_edit_tokens, check_length, load_model_and_tokenizer
from nanollada.trainers.resuming.stepping import SteppingTrainer
from nanollada.trainers.scoring.likelihood import Likelihood, evaluate_likelihood
from nanollada.trainers.weights.adapters import adapted, is_adapted
from nanollada.trainers.weights.averaging import AveragingTrainer, check_averaging

_SCORES = "losses and scores are the objective's own"
# What TRL's trainers or transformers' take and these can't.
REFUSED = {
    "compute_loss_func": _SCORES,
    "compute_metrics": _SCORES,
    "preprocess_logits_for_metrics": _SCORES,
    "quantization_config": "a quantised model is none of ours",
    "model_init": "the model is `model`",
}


@dataclass
class NanoLLaDATrainingArguments(TrainingArguments):
    """
    transformers' `TrainingArguments` with the fields and defaults that both trainers share.

    Raises:
        `ValueError`: for values that don't fit together, naming them.
    """

    learning_rate: float = field(default=3e-4, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=0.1, metadata={"help": "AdamW's weight decay."})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's second decay."})
    warmup_steps: float = field(default=0.02, metadata={"help": "Warm-up: steps, or below 1 a share of the run."})
    lr_scheduler_type: SchedulerType | str = field(
        default="warmup_stable_decay",
        metadata={"help": "warmup_stable_decay (WSD), cosine_with_min_lr, or any of transformers'."},
    )
    lr_decay_ratio: float = field(default=0.2, metadata={"help": "WSD: the share of the steps that decays."})
    min_lr_ratio: float = field(
        default=0.1,
        metadata={
            "help": "WSD and cosine_with_min_lr: the share of the peak that the learning rate falls to. As "
            "transformers counts, that is one step after the last: the last of n decay steps is at (n - 1)/n."
        },
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between logs."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Rows keep their keys."})
    metric_for_best_model: str | None = field(
        default="eval_loss", metadata={"help": "eval_loss: held-out nats per token, a bound for diffusion."}
    )
    greater_is_better: bool | None = field(default=False, metadata={"help": "A loss is better when smaller."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Only false: a loss that is not finite ends the run, and is not hidden."}
    )
    include_num_input_tokens_seen: str = field(
        default="non_padding", metadata={"help": "Counts the tokens of the run for run.json."}
    )
    eval_samples: int = field(
        default=4, metadata={"help": "Diffusion: masks per held-out row, even. Always the same masks."}
    )
    eval_seed: int = field(default=0, metadata={"help": "Seed of the evaluation noise."})
    early_stopping_patience: int = field(
        default=0, metadata={"help": "Stop after so many evaluations without improvement; 0: never."}
    )
    early_stopping_min_delta: float = field(default=0.0, metadata={"help": "What counts as improvement, in nats."})
    ema_decay: float = field(
        default=0.0, metadata={"help": "Decay of an average of the weights, which is evaluated and saved; 0: none."}
    )
    merge_top_k: int = field(
        default=0, metadata={"help": "Save the mean of the k evaluated states with the lowest eval_loss; 0: the last."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "DDP: every parameter is used; searching the graph for others costs time."}
    )
    plot_loss: bool | None = field(
        default=None, metadata={"help": "Draw loss.png. Default: if matplotlib (the extra `plots`) is installed."}
    )
    report_to: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={"help": "Where logs go beside metrics.jsonl: tensorboard, trackio (the extra `logging`), wandb, …"},
    )

    def __post_init__(self):
        check_inherited(self)
        super().__post_init__()
        check_schedule(self)
        check_reporters(self)
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        for name in ("lr_decay_ratio", "min_lr_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie in [0, 1], got {getattr(self, name)}")
        if self.eval_samples < 2 or self.eval_samples % 2:
            raise ValueError(f"`eval_samples` must be a positive even number, got {self.eval_samples}")
        if self.early_stopping_patience < 0:
            raise ValueError(f"`early_stopping_patience` must be >= 0, got {self.early_stopping_patience}")
        if self.early_stopping_patience and not (self.load_best_model_at_end or self.merge_top_k):
            raise ValueError(
                "`early_stopping_patience` needs `load_best_model_at_end` or `merge_top_k` (the best is kept), "
                f"got {self.early_stopping_patience}, {self.load_best_model_at_end} and {self.merge_top_k}"
            )
        check_averaging(self)


class NanoLLaDATrainer(SteppingTrainer, AveragingTrainer):
    """
    Trainer whose loss is a weighted sum over the target tokens of the whole optimizer step.

    Subclasses implement `micro_batch_loss`. Evaluation scores the held-out rows with `evaluate_likelihood`: always the
    likelihood (or its bound), whatever the training objective.

    `DiffusionTrainer(model, DiffusionConfig("runs/mine"), train_dataset=dataset, processing_class=tokenizer)` trains
    as TRL's `SFTTrainer` does, on the rows that `trainers/diffusion.py` would make of the same texts in a file.

    Args:
        model (`str`, `PreTrainedModel` or `peft.PeftModel`): A model, or the folder or name of a checkpoint. For
            diffusion an AR checkpoint's is the AR→diffusion initialisation.
        args ([`NanoLLaDATrainingArguments`], *optional*): The trainer's own config. Without it the defaults, in a
            folder named after the model.
        data_collator (`Callable`, *optional*): Makes batches of rows, in place of [`Collator`]. The rows' keys of the
            noise are added where it leaves them out.
        train_dataset (`datasets.Dataset` or `datasets.IterableDataset`): Texts (`text`), chats (`messages`,
            `conversations`), `prompt` with `completion`, `instruction` with `output`; or rows with `input_ids`, taken
            as they are; also a list or a stream of rows of `prepare_data`. Not needed with sources in `data_args`.
        eval_dataset (`datasets.Dataset`, *optional*): Held-out rows, spelt alike.
        processing_class (`PreTrainedTokenizerBase`, *optional*): The tokenizer. Default: that of the model's name.
        data_args ([`~trainers.data.prepare.DataArguments`], *optional*): How rows are made (`max_length`, …); without
            `train_dataset` also where they come from.
        peft_config (`peft.PeftConfig`, *optional*): An adapter, which alone is trained and saved.
        formatting_func (`Callable`, *optional*): Makes a text of a dataset's row.
        kwargs: transformers' own: `callbacks`, `optimizers`, `optimizer_cls_and_kwargs`.

    Attributes:
        rows ([`~trainers.data.prepare.PreparedData`]): What is trained and evaluated on.

    Raises:
        `ValueError`: under `torch.nn.DataParallel` (several GPUs in one process); for a model of the other kind, a
            config that isn't the trainer's, no rows, and arguments that do nothing here; as `check_tokenizer`,
            `prepare_datasets` and `adapted`.
    """

    loss_is_scaled_for_ga = True
    uses_of_a_row = 1  # in a pass
    masks = False  # whether only a part of the targets is predicted at a time
    config_class = NanoLLaDATrainingArguments
    model_class = None  # whose checkpoints a `model` that is a path names

    def __init__(
        self,
        model,
        args: NanoLLaDATrainingArguments | None = None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        *,
        data_args: DataArguments | None = None,
        peft_config=None,
        formatting_func=None,
        **kwargs,
    ):
        for name, reason in REFUSED.items():
            if (value := kwargs.pop(name, None)) is not None:
                raise ValueError(f"`{name}` must be None: {reason}, got {value}")
        args = self._checked_arguments(args, model)
        if isinstance(processing_class, str):
            raise ValueError(f"`processing_class` must be a tokenizer, got {processing_class!r} (load it first)")
        if not (data_collator is None or callable(data_collator)):
            kind = type(data_collator).__name__
            raise ValueError(f"`data_collator` must make batches: `train_dataset` comes after it, got a {kind}")
        model, tokenizer = self._loaded(model, args, processing_class)
        self.data_args = data_args
        if tokenizer is None and needs_tokenizer(train_dataset, eval_dataset):
            tokenizer = _tokenizer_of(model)
        if self.needs_edit_tokens(args):
            self._teach_edit_tokens(model, tokenizer, peft_config)
        if tokenizer is not None:
            check_tokenizer(model, tokenizer)
        with args.main_process_first(desc="preparing data"):
            self.rows = self._prepared(args, model, tokenizer, train_dataset, eval_dataset, formatting_func)
        if peft_config is not None:
            model = adapted(model, peft_config, args.seed)
        if is_adapted(model) and args.gradient_checkpointing:
            model.enable_input_require_grads()
        self.pad_token_id = model.config.pad_token_id
        if data_collator is None:
            self.rows.format = self.rows.format or format_of(self.rows.train)
            share = self.variable_length(args, self.rows.format)
            data_collator = Collator(self.pad_token_id, share, args.seed)
        self._window = {"targets": 0, "masked": 0, "seconds": time.perf_counter()}
        kwargs |= {"data_collator": data_collator, "eval_dataset": self.rows.eval, "processing_class": tokenizer}
        super().__init__(model, args, self.rows.train, **kwargs)
        self.model_accepts_loss_kwargs = True  # num_items_in_batch is counted and given to compute_loss
        self.add_callback(MetricsCallback(args.plot_loss))
        show_lines(self)
        self.set_up_objective()

    def _checked_arguments(self, args, model) -> NanoLLaDATrainingArguments:
        if args is None:
            name = model if isinstance(model, str) else model.name_or_path
            name = Path(name or "nanollada").name
            args = self.config_class(output_dir=f"{name}-{self.config_class.__name__.removesuffix('Config').lower()}")
        if not isinstance(args, self.config_class):
            raise ValueError(f"`args` must be a {self.config_class.__name__}, got a {type(args).__name__}")
        check_processes(args)
        return args

    def _loaded(self, model, args, tokenizer) -> tuple:
        """The model, and its tokenizer if it is given or was loaded with it."""
        if isinstance(model, str):
            set_seed(args.seed)
            return load_model_and_tokenizer(
                self.model_class, ModelArguments(model_name_or_path=model), args.seed, tokenizer
            )
        if getattr(model, "is_diffusion", None) is not self.model_class.is_diffusion:
            raise ValueError(f"`model` must be a {self.model_class.__name__}, got a {type(model).__name__}")
        return model, tokenizer

    @staticmethod
    def needs_edit_tokens(args) -> bool:
        """Whether the labels hold `<|delete|>` and `<|insert|>`."""
        return False

    def _teach_edit_tokens(self, model, tokenizer, peft_config) -> None:
        if model.config.edit_token_ids:
            return
        if tokenizer is None:
            raise ValueError(
                "`processing_class` must be given for a model without <|delete|> and <|insert|>, got None"
            )
        if peft_config is not None:
            raise ValueError(
                "`use_peft` (or `peft_config`) needs a checkpoint that knows <|delete|> and <|insert|>: an adapter "
                "does not carry new rows of the embedding (train one run without an adapter first), got "
                f"{model.name_or_path}"
            )
        add_edit_tokens(model, tokenizer)

    def _prepared(self, args, model, tokenizer, train_dataset, eval_dataset, formatting_func) -> PreparedData:
        data_args, settings = self.data_args, {"seed": args.seed, **self.data_settings(args)}
        if train_dataset is None:
            if data_args is None or not data_args.data or eval_dataset is not None:
                raise ValueError(
                    "`train_dataset` must be given, or the rows' sources as `data` of `data_args` (then with "
                    f"`eval_data`, not `eval_dataset`), got {train_dataset} and {data_args}"
                )
            check_length(data_args.max_length, model.config)
            return prepare_data(data_args, tokenizer, **settings)
        if not all(dataset is None or is_tokenized(dataset) for dataset in (train_dataset, eval_dataset)):
            check_length((data_args or DataArguments()).max_length, model.config)
        return prepare_datasets(train_dataset, eval_dataset, data_args, tokenizer, formatting_func, **settings)

    def _rows_of(self, dataset):
        """Rows to score, made of a dataset as those of `eval_dataset`."""
        made = is_tokenized(checked_dataset(dataset, "eval_dataset"))
        data_args = None if made or self.data_args is None else without_sources(self.data_args)
        return prepare_datasets(None, dataset, data_args, self.processing_class, seed=self.args.seed).eval

    def set_up_objective(self) -> None:
        """Called at the end of `__init__`: what the objective checks and keeps."""

    def create_accelerator_and_postprocess(self):
        """FSDP2 in bf16: weights and activations only. By default the loss and its weights would be rounded, too."""
        super().create_accelerator_and_postprocess()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version == 2 and self.args.bf16:
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )

    def micro_batch_loss(self, model, inputs: dict, num_items_in_batch) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Runs the model on a micro-batch.

        Args:
            inputs (`dict`): A collated batch.
            num_items_in_batch (`torch.Tensor` or `int`): Target tokens of the whole optimizer step.

        Returns:
            Σ weight·CE (and additional losses) over `num_items_in_batch`, and how many tokens were supervised.
        """
        raise NotImplementedError

    @property
    def eval_block_length(self) -> int | None:
        """The block length at which held-out rows are scored; 0 the whole row, `None` the model's."""
        return None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Σ weight·CE / target tokens of the step, over accumulation and ranks."""
        targets = (inputs["labels"] != -100).sum()
        loss, supervised = self.micro_batch_loss(
            model, inputs, num_items_in_batch if num_items_in_batch is not None else targets
        )
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP averages gradients over ranks
        self._window["targets"] += targets
        self._window["masked"] += supervised
        return (loss, {}) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        """Adds throughput and the share of targets that were masked, over all ranks since the last log."""
        if "loss" in logs and self.model.training:
            counts = torch.tensor([float(self._window["targets"]), float(self._window["masked"])])
            targets, masked = self.accelerator.reduce(counts.to(self.args.device), "sum").tolist()
            now = time.perf_counter()
            logs["target_tokens_per_second"] = round(targets / (now - self._window["seconds"]), 1)
            if self.masks:
                logs["masked_rate"] = round(masked / max(targets, 1), 4)
            self._window = {"targets": 0, "masked": 0, "seconds": now}
        super().log(logs, *args, **kwargs)

    # ---- what the model is trained for, in its generation config

    def decoding_defaults(self) -> dict:
        """Fields of the generation config that say how the model decodes of its own accord."""
        return length_limit(longest_row(self.rows), self.rows.format == "sft")

    def set_decoding(self) -> dict:
        """Writes them, and nothing else about lengths and denoising, into the model's generation config."""
        if not self.rows.format:  # a caller's own rows and batches
            return {}
        fields = self.decoding_defaults()
        set_defaults(self.plain_model, fields)
        return fields

    def choose_decoding(self) -> dict:
        """What is chosen by trying the trained model, once it is saved; for `run.json`, with the defaults."""
        return {"generation_config": self.set_decoding()}

    def train(self, *args, **kwargs):
        """As transformers', of a model that says from the start what it is trained for."""
        self.set_decoding()
        return super().train(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """A checkpoint's block length may be that of a phase: its defaults go with it."""
        self.set_decoding()
        super().save_model(output_dir, _internal_call)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Fills in what WSD and cosine with a floor need to know."""
        kwargs = dict(self.args.lr_scheduler_kwargs or {})
        if self.args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY:
            kwargs.setdefault("num_decay_steps", math.ceil(self.args.lr_decay_ratio * num_training_steps))
            kwargs.setdefault("min_lr_ratio", self.args.min_lr_ratio)
        elif self.args.lr_scheduler_type == SchedulerType.COSINE_WITH_MIN_LR and "min_lr" not in kwargs:
            kwargs.setdefault("min_lr_rate", self.args.min_lr_ratio)
        self.args.lr_scheduler_kwargs = kwargs
        return super().create_scheduler(num_training_steps, optimizer)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """
        Held-out nats per token (`eval_loss`) and bits per byte, with the same masks at every call.

        Returns:
            `dict`: `eval_loss`, `eval_bits_per_byte`, `eval_bits_per_byte_standard_error` (of the noise alone),
                `eval_tokens`, `eval_bytes`.
        """
        started = time.perf_counter()
        likelihood = self.likelihood(self.eval_dataset if eval_dataset is None else self._rows_of(eval_dataset))
        metrics = {
            "loss": likelihood.nats_per_token,
            "bits_per_byte": likelihood.bits_per_byte,
            "bits_per_byte_standard_error": likelihood.bits_per_byte_standard_error,
            "tokens": likelihood.tokens,
            "bytes": likelihood.bytes,
        }
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.offer_for_merge(likelihood.nats_per_token)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._window["seconds"] += time.perf_counter() - started  # evaluation is not throughput
        return metrics

    def predict(self, *args, **kwargs):
        """Refused: `likelihood` scores rows, and a model's `generate` writes."""
        raise ValueError(
            "`predict` has no meaning here: use `evaluate` for scores and `generate` for texts, got a call"
        )

    def push_to_hub(self, *args, **kwargs):
        """Refused: `hub_upload` makes a folder that loads anywhere, checks it in a clean process, and sends it."""
        raise ValueError("`push_to_hub` must not be called: publishing is hub_upload/, which checks what it sends")

    def likelihood(self, rows) -> Likelihood:
        """
        Scores rows over all ranks, each row exactly once, with the averaged weights if there is an average.

        Raises:
            `ValueError`: for fewer rows than ranks.
        """
        size, rank, ranks = self.args.per_device_eval_batch_size, self.args.process_index, self.args.world_size
        if rows is None or len(rows) < ranks:
            raise ValueError(f"`eval_dataset` must have a row for each of {ranks} ranks, got {rows and len(rows)}")
        if self.is_fsdp_enabled:  # a forward takes weights from every rank: all ranks run the same ones, on all rows
            rank, ranks = 0, 1
        mine = range(rank, len(rows), ranks)
        collate = Collator(self.pad_token_id)  # without the training collator's variable length
        batches = (collate([rows[i] for i in mine[at : at + size]]) for at in range(0, len(mine), size))
        with self.averaged_weights(), self.compute_loss_context_manager():
            part = evaluate_likelihood(
                self.accelerator.unwrap_model(self.model),
                batches,
                samples=self.args.eval_samples,
                seed=self.args.eval_seed,
                block_length=self.eval_block_length,
            )
        if ranks == 1:
            return part
        sums = torch.tensor(part.sums(), dtype=torch.double, device=self.args.device)
        return part.from_sums(self.accelerator.reduce(sums, "sum").tolist(), part.bound, part.estimator)


def _tokenizer_of(model):
    """The tokenizer beside a model's weights."""
    if not model.name_or_path:
        raise ValueError("`processing_class` must be given to make rows: the model names no checkpoint, got None")
    return load_tokenizer(model.name_or_path, "processing_class")
