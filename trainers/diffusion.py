"""Trains the masked-diffusion model: `accelerate launch trainers/diffusion.py --config scripts/recipes/<recipe>.yaml`.

Full rows (LLaDA 1.0, MDLM), blocks of any length (BD3-LM, LLaDA 2.0) and schedules of block lengths are settings of
one objective. `--model_name_or_path` with an AR checkpoint is the AR→diffusion initialisation: same parameters, same
names.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch

from nanollada.modeling_nanollada import NanoLLaDAForMaskedLM
from nanollada.trainers import run
from nanollada.trainers.base import NanoLLaDATrainer, NanoLLaDATrainingArguments
from nanollada.trainers.commands.ending import run_program
from nanollada.trainers.decoding.defaults import diffusion_defaults, longest_row
from nanollada.trainers.decoding.threshold import choose_threshold
from nanollada.trainers.noise.adaptation import noisy_embeddings, partly_causal_mask
from nanollada.trainers.noise.block_lengths import BlockLengthSchedule
from nanollada.trainers.noise.blocks import block_ids_of
from nanollada.trainers.noise.corruption import Corruption, Lexicon
from nanollada.trainers.noise.keys import STREAM_ATTENTION, STREAM_EMBEDDING, keyed_uniform
from nanollada.trainers.noise.registry import CORRUPTIONS
from nanollada.trainers.objectives import (
    confidence_entropy,
    repetition_unlikelihood,
    token_cross_entropy,
    weighted_loss,
)
from nanollada.trainers.run import TrainerEntry
from nanollada.trainers.scoring.likelihood import model_inputs
from nanollada.trainers.weights.adapters import check_unchanged

EOS_PADDINGS = ("none", "block", "max_length")
# What `run.json` says of the objective, beside the corruption's own settings.
REPORTED = (
    "corruption",
    "confidence_weight",
    "mask_embedding_noise",
    "mask_embedding_noise_steps",
    "attention_annealing_steps",
    "variable_length_probability",
    "eos_padding",
    "repetition_penalty_weight",
)
LEAST = {
    "block_length": 0,
    "eval_block_length": 0,
    "confidence_weight": 0,
    "mask_embedding_noise": 0,
    "mask_embedding_noise_steps": 0,
    "attention_annealing_steps": 0,
    "eos_padding_block": 1,
    "repetition_penalty_weight": 0,
    "repetition_penalty_min_run": 2,
    "threshold_rows": 0,
}


CORRUPTION_SETTINGS = tuple(dict.fromkeys(settings for kind in CORRUPTIONS.values() for settings in kind.settings))
COUNTED_ROWS = 4096  # whose targets are the law of the tokens that take another's place


@dataclass
class DiffusionConfig(*CORRUPTION_SETTINGS, NanoLLaDATrainingArguments):
    """
    Settings of masked-diffusion pretraining and SFT (the rows decide which). The defaults are LLaDA 1.0's objective
    with its low-variance estimator; `block_length` makes it BD3-LM's.

    Raises:
        `ValueError`: for unknown names and values out of range.
    """

    block_length: int | None = field(
        default=None, metadata={"help": "Tokens of a block; 0: the whole row. Default: the checkpoint's."}
    )
    block_length_schedule: str | None = field(
        default=None,
        metadata={"help": "Pairs (share of the run's tokens, block length), e.g. [[0.2, 4], [0.5, 0], [0.3, 32]]."},
    )
    eval_block_length: int | None = field(
        default=None, metadata={"help": "Block length of the evaluation; default: the one that the run ends with."}
    )
    corruption: Literal[tuple(CORRUPTIONS)] = field(
        default="masking",
        metadata={"help": "; ".join(f"{name}: {kind.help}" for name, kind in CORRUPTIONS.items()) + "."},
    )
    confidence_weight: float = field(
        default=0.0, metadata={"help": "Weight of the entropy of right predictions (LLaDA 2.0's CAP, λ)."}
    )
    mask_embedding_noise: float = field(
        default=0.0,
        metadata={"help": "S.d. of Gaussian noise on mask embeddings in the first steps, e.g. after an AR start."},
    )
    mask_embedding_noise_steps: int = field(
        default=0, metadata={"help": "The steps in which that noise falls linearly to nothing."}
    )
    label_shift: bool | None = field(
        default=None,
        metadata={
            "help": "After an AR start: predict each token from the position before it, as AR does (DiffuLLaMA, "
            "Dream). Kept in the checkpoint; whole rows only. Default: the checkpoint's."
        },
    )
    attention_annealing_steps: float = field(
        default=0.0,
        metadata={
            "help": "After an AR start: steps in which attention grows from causal to full, each later position "
            "visible with probability (step + 1) / steps (DiffuLLaMA: 10,000). Below 1: their share of the run, as "
            "with warmup_steps. Whole rows only."
        },
    )
    variable_length_probability: float = field(
        default=0.01, metadata={"help": "Pretraining: share of rows cut to a random length (LLaDA: 1 %%)."}
    )
    eos_padding: Literal[EOS_PADDINGS] = field(
        default="max_length",
        metadata={"help": "SFT: fill answers with learnt EOS to max_length (LLaDA 1.0), to the next block, or none."},
    )
    eos_padding_block: int = field(default=32, metadata={"help": "Block of eos_padding=block, in tokens."})
    repetition_penalty_weight: float = field(
        default=0.0, metadata={"help": "Weight of the unlikelihood of wrong repeats in the model's own draft."}
    )
    repetition_penalty_min_run: int = field(default=2, metadata={"help": "Shortest run of equal tokens it punishes."})
    threshold_rows: int | None = field(
        default=None,
        metadata={
            "help": "SFT: held-out rows on which the `threshold` that the model decodes with is chosen at the end; 0: "
            "none. Default: up to 128, as many as 2 %% of training's compute pay for, and none if those are few."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        for name, allowed in (("eos_padding", EOS_PADDINGS), ("corruption", CORRUPTIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        self._check_corruption()
        if not 0 <= self.variable_length_probability <= 1:
            raise ValueError(
                f"`variable_length_probability` must lie in [0, 1], got {self.variable_length_probability}"
            )
        for name, least in LEAST.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"`{name}` must be >= {least}, got {getattr(self, name)}")
        if (self.mask_embedding_noise > 0) != (self.mask_embedding_noise_steps > 0):
            raise ValueError(
                "`mask_embedding_noise` and `mask_embedding_noise_steps` go together, got "
                f"{self.mask_embedding_noise} and {self.mask_embedding_noise_steps}"
            )
        if self.block_length_schedule is not None:
            if self.block_length is not None:
                raise ValueError(
                    "`block_length` must not be given with `block_length_schedule`, got "
                    f"{self.block_length} and {self.block_length_schedule}"
                )
            BlockLengthSchedule(self.block_length_schedule)

    def _check_corruption(self):
        chosen = CORRUPTIONS[self.corruption]
        for settings in CORRUPTION_SETTINGS:
            settings.check(self)
            if settings in chosen.settings:
                continue
            for name, default in vars(settings()).items():
                if (value := getattr(self, name)) != default:
                    kinds = " or ".join(name for name, kind in CORRUPTIONS.items() if settings in kind.settings)
                    raise ValueError(f"`{name}` is for `corruption` {kinds}, got {value!r} with {self.corruption}")
        if chosen.check is not None:
            chosen.check(self)


class DiffusionTrainer(NanoLLaDATrainer):
    """
    The bound of LLaDA (2502.09992, Eq. 3, and Eq. 5 for SFT) and, with blocks, of BD3-LM and LLaDA 2.0 (2512.15745,
    Eq. 1): weighted cross-entropy of the masked targets, labels unshifted.

    The model's config holds the block length in force, so every checkpoint carries its own.
    """

    masks = True
    threshold = None  # chosen when the model is trained
    _edits = 0.0  # since the last log: targets, how many were replaced, their nats, how many are right
    config_class, model_class = DiffusionConfig, NanoLLaDAForMaskedLM

    @staticmethod
    def needs_edit_tokens(args) -> bool:
        needs = CORRUPTIONS[args.corruption].edit_tokens
        return needs is not None and needs(args)

    def set_up_objective(self) -> None:
        model, args = self.model, self.args
        sharded, kind = self.is_fsdp_enabled or self.is_deepspeed_enabled, CORRUPTIONS[args.corruption]
        if args.threshold_rows and sharded:
            raise ValueError(
                f"`threshold_rows` needs whole weights on every rank: it must be 0 with FSDP or DeepSpeed, got "
                f"{args.threshold_rows}"
            )
        self.drafts = kind.drafts is not None and kind.drafts(args)
        if self.drafts and sharded:
            raise ValueError(
                f"`corruption` {args.corruption} with the model's own drafts needs whole weights on every rank: it "
                f"must not run under FSDP or DeepSpeed, got {kind.settings_of(args)}"
            )
        self.lexicon = None
        if kind.lexicon:
            counted = Lexicon.of(self.train_dataset.sample(COUNTED_ROWS), model.config, self.processing_class)
            self.lexicon = counted.to(args.device)
        block_length = args.block_length if args.block_length is not None else model.config.block_length or 0
        self.schedule = BlockLengthSchedule(args.block_length_schedule or [[1.0, block_length]])
        shift = model.config.label_shift if args.label_shift is None else args.label_shift
        for name, value in (("label_shift", shift), ("attention_annealing_steps", args.attention_annealing_steps)):
            if value and any(length for _, length in self.schedule.phases):
                raise ValueError(
                    f"`{name}` is for whole rows: every block length must be 0, got {self.schedule.phases}"
                )
        if shift and args.eval_block_length:
            raise ValueError(
                f"`label_shift` is for whole rows: `eval_block_length` must be 0, got {args.eval_block_length}"
            )
        check_unchanged(model, block_length=self.schedule.last or None, label_shift=shift)
        model.config.label_shift = shift
        self.set_block_length()

    @property
    def eval_block_length(self) -> int:
        """The block length at which held-out rows are scored, the same in every phase; 0 is the whole row."""
        return self.schedule.last if self.args.eval_block_length is None else self.args.eval_block_length

    def set_block_length(self) -> None:
        """Takes up the phase of the step to come; the model's config, which is saved after it, names it, too."""
        self.block_length = self.schedule.at(self.state.global_step, self.state.max_steps)
        self.model.config.block_length = self.block_length or None

    def begin_step(self) -> None:
        self.set_block_length()

    def decoding_defaults(self):
        fields = diffusion_defaults(
            longest_row(self.rows),
            self.rows.format == "sft",
            self.model.config.block_length,
            self.args.eos_padding,
            self.args.eos_padding_block,
        )
        return fields if self.threshold is None else fields | {"threshold": self.threshold}

    def choose_decoding(self):
        facts = super().choose_decoding()
        if self.rows is None or self.rows.format != "sft":
            return facts
        choice = choose_threshold(self)
        self.threshold = choice["threshold"]
        return {"generation_config": self.set_decoding(), "threshold": choice}

    def train(self, *args, **kwargs):
        self.threshold = None  # of what was trained before
        return super().train(*args, **kwargs)

    def micro_batch_loss(self, model, inputs, num_items_in_batch):
        # 1. noise that belongs to the row, with its labels and weights
        noise = self.corruption(inputs, model_inputs(inputs))
        rows = torch.arange(len(inputs["input_ids"]), device=inputs["input_ids"].device).repeat(noise.copies)
        context, supervised = self.context_of(inputs, rows, noise), noise.supervised
        masks = (noise.noisy_input_ids == self.model.config.mask_token_id).sum()
        # 2. logits only where there is a label
        extras = self.args.confidence_weight or self.args.repetition_penalty_weight or noise.edited is not None
        if not extras:
            context |= {
                "labels": noise.labels,
                "loss_weights": noise.weights,
                "num_items_in_batch": num_items_in_batch,
            }
        else:
            context |= {"logits_to_keep": supervised}
        context |= {"edit_tokens": True} if self.needs_edit_tokens(self.args) else {}
        with noisy_embeddings(self.model, self.embedding_noise(noise, inputs)):
            outputs = model(noise.noisy_input_ids, **context)
        if not extras:
            return outputs.loss, masks
        # 3. the losses that need logits
        logits = outputs.logits  # [N, V]
        if noise.edited is not None:
            self.count_edits(logits.detach(), noise, (inputs["labels"] != -100).sum())
        loss = weighted_loss(logits, noise.labels[supervised], noise.weights[supervised], num_items_in_batch)
        extra = self.additional_loss(logits, noise, (inputs["labels"] != -100).sum(-1))
        return loss + extra / num_items_in_batch, masks

    def context_of(self, inputs: dict, rows: torch.LongTensor, noise: Corruption | None = None) -> dict:
        """What the model reads beside the noisy ids of the batch's rows `rows`, in the columns of the `noise`."""
        context = {name: value[rows] for name, value in model_inputs(inputs).items()}
        context = context if noise is None else noise.context(context)
        clean = inputs["input_ids"][rows]  # [R, L]
        context |= self.block_inputs(clean)
        future = self.visible_future(inputs)
        if future is not None:
            given = (context.get("attention_mask"), context.pop("document_ids", None))
            context["attention_mask"] = partly_causal_mask(future[rows], self.model.config, self.model.dtype, *given)
            context.setdefault("position_ids", torch.arange(clean.shape[1], device=clean.device).expand_as(clean))
        return context

    def draft(self, inputs: dict) -> Callable:
        """The model's own predictions as they stand, for `corrupt`: see [`CorruptionKind`]."""

        def draft(noisy_input_ids, where, rows):
            context, training = self.context_of(inputs, rows % len(inputs["input_ids"])), self.model.training
            self.model.eval()
            with torch.no_grad():
                logits = self.model(noisy_input_ids, logits_to_keep=where, **context).logits  # [N, V]
            self.model.train(training)
            return logits

        return draft

    def block_inputs(self, clean: torch.LongTensor) -> dict:
        """What the model needs to predict every block from itself and the clean ones before it."""
        block_length = self.block_length if self.block_length < clean.shape[1] else 0  # covers the rows
        return {"block_length": block_length, "clean_input_ids": clean if block_length else None}

    def corruption(self, inputs: dict, context: dict) -> Corruption:
        """What of a micro-batch is hidden or changed, and with which weights."""
        kind, clean = CORRUPTIONS[self.args.corruption], inputs["input_ids"]
        blocks = block_ids_of(
            self.block_length, context.get("position_ids"), context.get("document_ids"), clean.shape, clean.device
        )
        tools = {"draft": self.draft(inputs) if self.drafts else None} if kind.drafts is not None else {}
        tools |= {"lexicon": self.lexicon} if kind.lexicon else {}
        tools |= {"document_ids": context.get("document_ids")} if kind.documents else {}
        return kind.corrupt(
            clean,
            inputs["labels"] != -100,  # what may be hidden: targets, never a prompt or padding
            self.model.config,
            seed=self.args.seed,
            index=inputs["index"],
            rank=inputs["rank"],
            epoch=inputs["epoch"],
            block_ids=blocks,
            **tools,
            **kind.settings_of(self.args),
        )

    def embedding_noise(self, noise: Corruption, inputs: dict) -> torch.Tensor | None:
        """`[B, L, hidden]`: Gaussian noise at the masks (LLaDA 2.0, §3.3), in the run's first steps."""
        steps = self.args.mask_embedding_noise_steps
        if self.state.global_step >= steps:
            return None
        deviation = self.args.mask_embedding_noise * (1 - self.state.global_step / steps)
        length, hidden_size = noise.noisy_input_ids.shape[1], self.model.config.hidden_size
        uniform = keyed_uniform(
            self.args.seed, inputs["index"], inputs["epoch"], STREAM_EMBEDDING, length * hidden_size
        )
        normal = torch.special.ndtri(uniform.clamp(min=2.0**-54)).float().view(-1, length, hidden_size)
        masks = noise.noisy_input_ids == self.model.config.mask_token_id
        return deviation * normal.repeat(noise.copies, 1, 1) * masks[..., None]

    def visible_future(self, inputs: dict) -> torch.BoolTensor | None:
        """`[B, L, L]`: the later positions that a row sees while attention is annealed (DiffuLLaMA, §3.2)."""
        steps = self.args.attention_annealing_steps
        steps = math.ceil(steps * self.state.max_steps) if steps < 1 else steps
        if not self.model.training or self.state.global_step + 1 >= steps:
            return None
        length, rate = inputs["input_ids"].shape[1], (self.state.global_step + 1) / steps
        # A pair's draw has a number of its own, whatever the batch's padding: pairs are counted key by key.
        key, query = torch.tril_indices(length, length, offset=-1, device=inputs["input_ids"].device)  # query < key
        draws = keyed_uniform(self.args.seed, inputs["index"], inputs["epoch"], STREAM_ATTENTION, len(key))
        visible = torch.zeros(len(draws), length, length, dtype=torch.bool, device=draws.device)
        visible[:, query, key] = draws < rate
        return visible

    def additional_loss(self, logits: torch.Tensor, noise: Corruption, row_targets: torch.Tensor) -> torch.Tensor:
        """What the options add to the bound, as a sum over tokens."""
        extra = logits.new_zeros((), dtype=torch.float32)
        if self.args.confidence_weight:
            labels, rows = noise.labels[noise.supervised], noise.supervised.nonzero()[:, 0]
            entropy = confidence_entropy(logits, labels, rows, row_targets.repeat(noise.copies))
            extra = extra + self.args.confidence_weight * entropy / noise.copies
        if self.args.repetition_penalty_weight:
            run = self.args.repetition_penalty_min_run
            penalty = repetition_unlikelihood(logits, noise.noisy_input_ids, noise.labels, run)
            extra = extra + self.args.repetition_penalty_weight * penalty
        return extra

    def count_edits(self, logits: torch.Tensor, noise: Corruption, targets: torch.Tensor) -> None:
        """For the next log: how the tokens fare that are visible and may be wrong."""
        labels, edited = noise.labels[noise.supervised], noise.edited[noise.supervised]
        logits, labels = logits[edited], labels[edited]  # [E, V], [E]
        nats, right = token_cross_entropy(logits, labels).sum(), (logits.argmax(-1) == labels).sum()
        self._edits = self._edits + torch.stack((targets.float(), edited.sum().float(), nats.float(), right.float()))

    def log(self, logs, *args, **kwargs):
        """Adds, over all ranks since the last log, how many targets were replaced, and how the model corrects them."""
        if "loss" in logs and self.model.training and torch.is_tensor(self._edits):
            targets, edited, nats, right = self.accelerator.reduce(self._edits, "sum").tolist()
            logs["replaced_rate"] = round(edited / max(targets, 1), 4)
            if edited:
                logs |= {"edit_loss": round(nats / edited, 4), "edit_accuracy": round(right / edited, 4)}
            self._edits = 0.0
        super().log(logs, *args, **kwargs)

    def objective(self) -> dict:
        """What `run.json` says of the objective."""
        kind = CORRUPTIONS[self.args.corruption]
        settings = kind.settings_of(self.args) | {name: getattr(self.args, name) for name in REPORTED}
        settings["label_shift"] = self.model.config.label_shift
        return {"name": kind.objective, "block_lengths": self.schedule.phases, **settings}

    @staticmethod
    def data_settings(args) -> dict:
        """What the objective asks of `prepare_data`."""
        block_length = args.eos_padding_block if args.eos_padding == "block" else None
        return {"eos_padding": args.eos_padding, "block_length": block_length}

    @staticmethod
    def variable_length(args, format: str) -> float:
        """Share of rows cut to a random length: pretraining only, where a row is any stretch of text."""
        return args.variable_length_probability if format == "pretrain" else 0.0


TRAINER = TrainerEntry(
    "diffusion", DiffusionTrainer, DiffusionConfig, NanoLLaDAForMaskedLM, "Trains the masked-diffusion model."
)

main = partial(run.main, TRAINER)

if __name__ == "__main__":
    run_program(main)
