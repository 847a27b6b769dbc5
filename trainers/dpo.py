"""Trains on preference pairs: `accelerate launch trainers/dpo.py --config scripts/recipes/<recipe>.yaml`.

An AR checkpoint is trained by TRL's `DPOTrainer` as it is. For a diffusion checkpoint the same trainer compares ELBOs,
under the same masks for policy and reference (VRPO, LLaDA 1.5, 2505.19223); all else is TRL's.
"""

import copy
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Literal

from datasets.fingerprint import Hasher
from trl import DPOConfig, DPOTrainer

from nanollada.modeling_nanollada.loading_nanollada import check_tokenizer, load_tokenizer
from nanollada.trainers import run
from nanollada.trainers.arguments import default_of
from nanollada.trainers.commands.ending import run_program
from nanollada.trainers.data.feedback.preferences import PreferenceArguments, PreparedRows, prepare_preferences
from nanollada.trainers.preferences.installing import ScoreCalls, in_place_of_fused_head, install_score
from nanollada.trainers.preferences.masks import ESTIMATORS, EVALUATION
from nanollada.trainers.preferences.pairs import KeyedCollator, padding_for, trl_collator
from nanollada.trainers.preferences.score import score_variance
from nanollada.trainers.preferences.settings import check_models, check_settings, check_whole
from nanollada.trainers.tuning.entry import TuningEntry
from nanollada.trainers.tuning.policy import PolicyArguments, load_policy
from nanollada.trainers.tuning.trainer import resumable

EOS_PADDINGS = ("none", "block", "max_length")
SCORE_VERSION = 1  # of the masks and weights that precomputed scores of a reference were made with
# TRL's metrics of logits and next tokens, which a score of masked tokens doesn't have.
NOT_OURS = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy")
_NO_LOGITS = "a score has no logits"


@dataclass
class DiffusionDPOConfig(DPOConfig):
    """
    TRL's `DPOConfig`, with what a diffusion model's score needs. Numbers are float32 and activations are kept by
    default: the models are small, and differences of ELBOs too fine for bfloat16.

    Raises:
        `ValueError`: for unknown names and values out of range.
    """

    estimator: Literal[tuple(ESTIMATORS)] = field(
        default="elbo",
        metadata={
            "help": "Diffusion: " + "; ".join(f"{name}: {kind.help}" for name, kind in ESTIMATORS.items()) + "."
        },
    )
    num_masks: int = field(default=8, metadata={"help": "Diffusion: masks per answer (VRPO: 8)."})
    eos_padding: Literal[EOS_PADDINGS] | None = field(
        default=None,
        metadata={
            "help": "Diffusion: learnt EOS behind answers, as in SFT: to max_length, to the next block, or none. "
            "Default: block for a checkpoint that decodes in blocks, else none."
        },
    )
    eval_seed: int = field(default=0, metadata={"help": "Diffusion: seed of the masks of held-out pairs."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate."})
    bf16: bool | None = field(default=False, metadata={"help": "Compute in bfloat16."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "The older name of activation_checkpointing."}
    )

    def __post_init__(self):
        super().__post_init__()
        for name, allowed in (("estimator", ESTIMATORS), ("eos_padding", EOS_PADDINGS)):
            value = getattr(self, name)
            if value not in allowed and not (name == "eos_padding" and value is None):
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {value!r}")
        for name, least in {"num_masks": 1, "beta": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be >= {least}, got {getattr(self, name)}")


class DiffusionDPOTrainer(PreparedRows, DPOTrainer):
    """
    TRL's `DPOTrainer` whose scores are ELBOs (VRPO, 2505.19223, §3): `num_masks` masks per answer, in even strata of
    the number of masked tokens, the same for policy and reference. With both equal the loss is ln 2 without noise.

    All loss types of TRL read scores of whole answers and mean here what they mean there; "sft" is the ELBO per token.
    A block model's score is its block ELBO (`config.block_length`), each block given the clean ones before it. Masks
    depend on (seed, row, draw, step) alone: not on ranks, accumulation or resuming. With `precompute_ref_log_probs`
    they don't depend on the step, and a pair has the same masks in all epochs.

    Beside TRL's `rewards/…` and `logps/…` it logs `score/variance`, the variance of the preference score
    β·(log-ratio of chosen − log-ratio of rejected) that comes from the masks, the mean over the pairs. It is estimated
    from the differences of successive draws: without bias for independent draws ("naive"), from above for strata, not
    at all for one mask or a precomputed reference. `masked_token_accuracy` is how many of the masked tokens of the
    chosen answers the policy knows.

    Args:
        model (`str`, [`NanoLLaDAForMaskedLM`] or `peft.PeftModel`): The policy.
        ref_model ([`NanoLLaDAForMaskedLM`], *optional*): Default: the policy as it is now; of an adapter that starts
            (`peft_config`), the model without it.
        args ([`DiffusionDPOConfig`], *optional*): With `eos_padding`, see `preferences.pairs.padding_for`.
        others: TRL's. Datasets are of any shape that `preference_rows` reads; `index`, a row's key, may stand in them.

    Raises:
        `ValueError`: for models of another kind, in other blocks or in shards, and for what a score can't do, by name.
    """

    def __init__(
        self,
        model,
        ref_model=None,
        args: DiffusionDPOConfig | None = None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        compute_metrics=None,
        callbacks=None,
        optimizers=(None, None),
        quantization_config=None,
        peft_config=None,
    ):
        args = DiffusionDPOConfig("diffusion-dpo") if args is None else args
        if not isinstance(args, DiffusionDPOConfig):
            raise ValueError(f"`args` must be a DiffusionDPOConfig, got a {type(args).__name__}")
        for name, value in {"compute_metrics": compute_metrics, "quantization_config": quantization_config}.items():
            if value is not None:
                raise ValueError(f"`{name}` must be None: {_NO_LOGITS}, or another's model, got {value}")
        check_settings(args)
        model, processing_class = self._loaded(model, args, processing_class)
        check_models(model, ref_model, peft_config)
        if ref_model is None and not (peft_config or hasattr(model, "peft_config") or args.precompute_ref_log_probs):
            ref_model = copy.deepcopy(model).requires_grad_(False).eval()
        self.padding = padding_for(
            args.eos_padding, model.config, model.generation_config, processing_class.eos_token_id, args.max_length
        )
        collator = data_collator or trl_collator(args, processing_class.pad_token_id)
        self._calls, self._precomputing = ScoreCalls(), None

        def install(model):
            install_score(model, self._calls, estimator=args.estimator, draws=args.num_masks)

        with in_place_of_fused_head(install):
            super().__init__(
                model,
                ref_model,
                args,
                KeyedCollator(collator, self.padding),
                train_dataset,
                eval_dataset,
                processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
                peft_config=peft_config,
            )

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        check_whole(self)

    @staticmethod
    def _loaded(model, args, tokenizer) -> tuple:
        own = None
        if isinstance(model, str):
            model, own = load_policy(PolicyArguments(model_name_or_path=model), args.seed)
        if tokenizer is None:
            tokenizer = own or load_tokenizer(model.name_or_path, "processing_class")
        check_tokenizer(model, tokenizer)
        return model, tokenizer

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if "index" not in self._signature_columns:
            self._signature_columns.append("index")

    def noise_key(self, train: bool) -> dict:
        """What masks depend on beside rows and draws: `seed` and `step`."""
        if not train:
            return {"seed": self.args.eval_seed, "step": EVALUATION}
        return {"seed": self.args.seed, "step": 0 if self.args.precompute_ref_log_probs else self.state.global_step}

    def _precompute_ref_logps(self, dataset, name, batch_size):
        # TRL's cache knows the rows and the weights; here scores hang on the masks, too
        args, weights = self.args, self._precompute_model_hash
        self._precomputing = self.noise_key(train=dataset is self.train_dataset)
        score = (SCORE_VERSION, args.estimator, args.num_masks, self._precomputing, self.model.config.block_length)
        rows = (args.max_length, args.truncation_mode, repr(self.data_collator), args.bf16, args.fp16)
        self._precompute_model_hash = Hasher.hash((weights, score, rows))
        try:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        finally:
            self._precompute_model_hash, self._precomputing = weights, None

    def compute_ref_log_probs(self, model, inputs):
        self._calls.begin(reference_only=True)
        return super().compute_ref_log_probs(model, {**inputs, **self._precomputing})

    def _compute_loss(self, model, inputs, return_outputs):
        if return_outputs:
            raise ValueError(f"`return_outputs` must be False: {_NO_LOGITS}, got True")
        mode = "train" if self.model.training else "eval"
        self._calls.begin()
        loss = super()._compute_loss(model, {**inputs, **self.noise_key(mode == "train")}, False)
        for name in NOT_OURS:
            self._metrics[mode].pop(name)
        self._log_scores(self._metrics[mode])
        return loss

    def _log_scores(self, metrics) -> None:
        policy, *reference = self._calls.scores
        if reference and len(policy.draws) > 1:
            variance = score_variance(policy.draws - reference[0].draws, self.beta)
            metrics["score/variance"].append(self.accelerator.gather_for_metrics(variance).mean().item())
        right, masked = (self.accelerator.gather_for_metrics(x.chunk(2)[0]) for x in (policy.right, policy.masked))
        metrics["masked_token_accuracy"].append((right.sum() / masked.sum().clamp(min=1)).item())

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        return super().prediction_step(model, inputs, True, ignore_keys)  # there are no logits to return


class CausalDPOTrainer(PreparedRows, DPOTrainer):
    """TRL's `DPOTrainer`, unchanged, on rows that are tokens already."""


DIFFUSION_ONLY = ("estimator", "num_masks", "eos_padding", "eval_seed")


def check_causal(args: DiffusionDPOConfig) -> None:
    """
    Raises:
        `ValueError`: naming a field of the diffusion model's score that an AR model has no use for.
    """
    defaults = {item.name: default_of(item) for item in fields(args)}
    for name in DIFFUSION_ONLY:
        if (value := getattr(args, name)) != defaults[name]:
            raise ValueError(f"`{name}` must be left out for an AR checkpoint, whose score is exact, got {value!r}")


def load_rows(data: PreferenceArguments, tokenizer, args: DiffusionDPOConfig, config):
    """The pairs of a run, as tokens."""
    return prepare_preferences(data, tokenizer, args.max_length)


def build(*, policy, reference, tokenizer, rows, data, args, peft_config) -> DPOTrainer:
    """
    The trainer of a policy: TRL's of an AR model, the one above of a diffusion model.

    Raises:
        `ValueError`: as `check_causal` and as the trainers.
    """
    if not policy.is_diffusion:
        check_causal(args)
    kind = DiffusionDPOTrainer if policy.is_diffusion else CausalDPOTrainer
    return resumable(kind)(
        policy,
        reference,
        args,
        train_dataset=rows.train,
        eval_dataset=rows.eval,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def objective(trainer: DPOTrainer) -> dict:
    """What `run.json` says of the objective."""
    args, diffusion = trainer.args, isinstance(trainer, DiffusionDPOTrainer)
    names = ("loss_type", "loss_weights", "beta", "label_smoothing", "precompute_ref_log_probs", "sync_ref_model")
    settings = {name: getattr(args, name) for name in names}
    if diffusion:
        padding, block_length = trainer.padding, trainer.model.config.block_length
        settings |= {"estimator": args.estimator, "num_masks": args.num_masks, "block_length": block_length}
        settings["eos_padding"] = "none" if padding is None else padding.kind
    return {"name": f"DPO on {'ELBOs' if diffusion else 'log-likelihoods'}", **settings}


TRAINER = TuningEntry(
    "dpo",
    "Trains an AR or a diffusion model on preference pairs, against a reference.",
    DiffusionDPOConfig,
    PreferenceArguments,
    load_rows,
    build,
    objective,
    needs_reference=lambda args: True,
    curve=("loss", "preference loss"),
)

main = partial(run.main, TRAINER)

if __name__ == "__main__":
    run_program(main)
