"""What the AR and the diffusion trainer share: exact normalisation, and evaluation."""

import math
import time
from dataclasses import dataclass, field

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from nanollada.trainers.arguments import check_inherited, check_reporters, check_schedule
from nanollada.trainers.callbacks import MetricsCallback
from nanollada.trainers.console.lines import show_lines
from nanollada.trainers.data.collator import Collator
from nanollada.trainers.data.prepare import PreparedData
from nanollada.trainers.decoding.defaults import length_limit, longest_row, set_defaults
from nanollada.trainers.resuming.stepping import SteppingTrainer
from nanollada.trainers.scoring.likelihood import Likelihood, evaluate_likelihood
from nanollada.trainers.weights.averaging import AveragingTrainer, check_averaging


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

    Subclasses implement `micro_batch_loss`. Rows are those of `prepare_data`. Evaluation scores the held-out rows with
    `evaluate_likelihood`: always the likelihood (or its bound), whatever the training objective.

    Raises:
        `ValueError`: under `torch.nn.DataParallel` (several GPUs in one process).
    """

    loss_is_scaled_for_ga = True
    masks = False  # whether only a part of the targets is predicted at a time
    rows: PreparedData | None = None  # what it trains on; from there the generation config's defaults are

    def __init__(self, model, args: NanoLLaDATrainingArguments, train_dataset, collator: Collator, **kwargs):
        if args.n_gpu > 1:
            raise ValueError(
                f"Several GPUs need one process each (accelerate launch), got {args.n_gpu} in one process"
            )
        for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"`{name}` must be None: losses and scores are the objective's own, got {kwargs[name]}"
                )
        self._window = {"targets": 0, "masked": 0, "seconds": time.perf_counter()}
        super().__init__(model, args, train_dataset, data_collator=collator, **kwargs)
        self.model_accepts_loss_kwargs = True  # num_items_in_batch is counted and given to compute_loss
        self.add_callback(MetricsCallback(args.plot_loss))
        show_lines(self)

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
        if self.rows is None:
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
        likelihood = self.likelihood(eval_dataset if eval_dataset is not None else self.eval_dataset)
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

    def likelihood(self, rows) -> Likelihood:
        """
        Scores rows over all ranks, each row exactly once, with the averaged weights if there is an average.

        Raises:
            `ValueError`: for fewer rows than ranks.
        """
        size, rank, ranks = self.args.per_device_eval_batch_size, self.args.process_index, self.args.world_size
        if isinstance(rows, dict):
            raise ValueError(f"`eval_dataset` must be rows and not a dictionary of several, got {sorted(rows)}")
        if rows is None or len(rows) < ranks:
            raise ValueError(f"`eval_dataset` must have a row for each of {ranks} ranks, got {rows and len(rows)}")
        if self.is_fsdp_enabled:  # a forward takes weights from every rank: all ranks run the same ones, on all rows
            rank, ranks = 0, 1
        mine = range(rank, len(rows), ranks)
        collate = Collator(self.data_collator.pad_token_id)  # without the training collator's variable length
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
