"""Trains the masked-diffusion model: `accelerate launch trainers/diffusion.py --config scripts/recipes/<recipe>.yaml`.

`--model_name_or_path` with an AR checkpoint is the AR→diffusion initialisation: same parameters, same names.
"""

from dataclasses import dataclass, field

from nanollada.modeling_nanollada import NanoLLaDAForMaskedLM
from nanollada.trainers.base import NanoLLaDATrainer, NanoLLaDATrainingArguments, main
from nanollada.trainers.corruption import NOISE_SCHEDULES, check_settings, corrupt
from nanollada.trainers.likelihood import model_inputs
from nanollada.trainers.objectives import repetition_unlikelihood

EOS_PADDINGS = ("none", "block", "max_length")


@dataclass
class DiffusionConfig(NanoLLaDATrainingArguments):
    """
    Settings of masked-diffusion pretraining and SFT (the rows decide which). The defaults are LLaDA 1.0's objective
    with its low-variance estimator.

    Raises:
        `ValueError`: for unknown names and values out of range.
    """

    mask_count: str = field(
        default="exact", metadata={"help": "exact: k of L masked, k uniform (less noise); bernoulli: the paper's."}
    )
    noise_schedule: str = field(
        default="linear",
        metadata={"help": "By formula: " + "; ".join(f"{k}: alpha = {v.formula}" for k, v in NOISE_SCHEDULES.items())},
    )
    weighting: str = field(
        default="elbo",
        metadata={"help": "elbo: the likelihood bound; unweighted: every masked token alike (a `random` mask rate)."},
    )
    time_epsilon: float = field(default=1e-3, metadata={"help": "Smallest time of the bernoulli masks (LLaDA's eps)."})
    variable_length_probability: float = field(
        default=0.01, metadata={"help": "Pretraining: share of rows cut to a random length (LLaDA: 1 %)."}
    )
    eos_padding: str = field(
        default="max_length",
        metadata={"help": "SFT: fill answers with learnt EOS to max_length (LLaDA 1.0), to the next block, or none."},
    )
    eos_padding_block: int = field(default=32, metadata={"help": "Block of eos_padding=block, in tokens."})
    repetition_penalty_weight: float = field(
        default=0.0, metadata={"help": "Weight of the unlikelihood of wrong repeats in the model's own draft."}
    )
    repetition_penalty_min_run: int = field(default=2, metadata={"help": "Shortest run of equal tokens it punishes."})

    def __post_init__(self):
        super().__post_init__()
        check_settings(self.mask_count, self.noise_schedule, self.weighting, self.time_epsilon)
        if self.eos_padding not in EOS_PADDINGS:
            raise ValueError(f"`eos_padding` must be one of {', '.join(EOS_PADDINGS)}, got {self.eos_padding!r}")
        if not 0 <= self.variable_length_probability <= 1:
            raise ValueError(
                f"`variable_length_probability` must lie in [0, 1], got {self.variable_length_probability}"
            )
        for name, least in (
            ("eos_padding_block", 1),
            ("repetition_penalty_weight", 0),
            ("repetition_penalty_min_run", 2),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be >= {least}, got {getattr(self, name)}")


class DiffusionTrainer(NanoLLaDATrainer):
    """LLaDA's bound (Eq. 3, and Eq. 5 for SFT): weighted cross-entropy of the masked targets, labels unshifted."""

    masks = True

    def predictions(self, model, inputs):
        # 1. what may be masked: targets, never a prompt or padding
        targets = inputs["labels"] != -100  # [B, L]
        # 2. noise that belongs to the row, with its weights
        noise = corrupt(
            inputs["input_ids"],
            targets,
            self.model.config.mask_token_id,
            seed=self.args.seed,
            index=inputs["index"],
            rank=inputs["rank"],
            epoch=inputs["epoch"],
            mask_count=self.args.mask_count,
            noise_schedule=self.args.noise_schedule,
            weighting=self.args.weighting,
            time_epsilon=self.args.time_epsilon,
        )
        masked = noise.masked_indices
        # 3. logits only where something is hidden
        logits = model(noise.noisy_input_ids, logits_to_keep=masked, **model_inputs(inputs)).logits  # [N, V]
        # 4. the option against stuttering
        extra = None
        if self.args.repetition_penalty_weight:
            extra = self.args.repetition_penalty_weight * repetition_unlikelihood(
                logits, inputs["input_ids"], masked, self.args.repetition_penalty_min_run
            )
        return logits, inputs["input_ids"][masked], noise.weights[masked], extra

    def objective(self) -> dict:
        """What `run.json` says of the objective."""
        names = (
            "mask_count",
            "noise_schedule",
            "weighting",
            "time_epsilon",
            "variable_length_probability",
            "eos_padding",
            "repetition_penalty_weight",
        )
        return {"name": "masked diffusion bound", **{name: getattr(self.args, name) for name in names}}

    @staticmethod
    def data_settings(args) -> dict:
        """What the objective asks of `prepare_data`."""
        block_length = args.eos_padding_block if args.eos_padding == "block" else None
        return {"eos_padding": args.eos_padding, "block_length": block_length}

    @staticmethod
    def variable_length(args, format: str) -> float:
        """Share of rows cut to a random length: pretraining only, where a row is any stretch of text."""
        return args.variable_length_probability if format == "pretrain" else 0.0


if __name__ == "__main__":
    main(DiffusionTrainer, DiffusionConfig, NanoLLaDAForMaskedLM)
