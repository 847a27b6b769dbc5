"""Trains on preference pairs: `accelerate launch trainers/dpo.py --model_name_or_path CHECKPOINT --data pairs.jsonl`.

An AR checkpoint is trained by TRL's `DPOTrainer` as it is. For a diffusion checkpoint the same trainer compares ELBOs,
under the same masks for policy and reference (VRPO, LLaDA 1.5, 2505.19223); all else is TRL's.
"""

import copy
from dataclasses import dataclass, field
from typing import Literal

import torch
from datasets.fingerprint import Hasher
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from nanollada.modeling_nanollada import NanoLLaDAForMaskedLM
from nanollada.modeling_nanollada.loading_nanollada import check_tokenizer, load_tokenizer
from nanollada.trainers.models import ModelArguments, load_model_and_tokenizer
from nanollada.trainers.preferences.installing import ScoreCalls, in_place_of_fused_head, install_score
from nanollada.trainers.preferences.masks import ESTIMATORS, EVALUATION
from nanollada.trainers.preferences.pairs import PAIR, KeyedCollator, padding_for
from nanollada.trainers.preferences.settings import check_settings

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
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Compute activations anew in the backward pass: less memory, more time."}
    )

    def __post_init__(self):
        super().__post_init__()
        for name, allowed in (("estimator", ESTIMATORS), ("eos_padding", EOS_PADDINGS)):
            value = getattr(self, name)
            if value not in allowed and not (name == "eos_padding" and value is None):
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {value!r}")
        if self.num_masks < 1:
            raise ValueError(f"`num_masks` must be >= 1, got {self.num_masks}")


class DiffusionDPOTrainer(DPOTrainer):
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
        others: TRL's. `train_dataset`: TRL's columns, or `prompt_ids`, `chosen_ids`, `rejected_ids`; with `index`, the
            rows' keys, or without.

    Raises:
        `ValueError`: for models of another kind or in other blocks, and for what a score can't do, naming it.
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
        collator = data_collator or DataCollatorForPreference(
            pad_token_id=processing_class.pad_token_id,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            pad_to_multiple_of=args.pad_to_multiple_of,
        )
        padding = padding_for(
            args.eos_padding, model.config, model.generation_config, processing_class.eos_token_id, args.max_length
        )
        self._calls, self._precomputing = ScoreCalls(), None

        def install(model):
            install_score(model, self._calls, estimator=args.estimator, draws=args.num_masks)

        with in_place_of_fused_head(install):
            super().__init__(
                model,
                ref_model,
                args,
                KeyedCollator(collator, padding),
                train_dataset,
                eval_dataset,
                processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
                peft_config=peft_config,
            )

    @staticmethod
    def _loaded(model, args, tokenizer) -> tuple:
        if isinstance(model, str):
            model, tokenizer = load_model_and_tokenizer(
                NanoLLaDAForMaskedLM, ModelArguments(model_name_or_path=model), args.seed, tokenizer
            )
        elif tokenizer is None:
            tokenizer = load_tokenizer(model.name_or_path, "processing_class")
        check_tokenizer(model, tokenizer)
        return model, tokenizer

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        columns = next(iter(dataset))
        if not all(name in columns for name in PAIR):
            dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if "index" not in columns:
            dataset = dataset.map(lambda row, number: {"index": number}, with_indices=True)
        return dataset

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


def check_models(model, ref_model, peft_config) -> None:
    """
    Raises:
        `ValueError`: unless both denoise, in the same blocks and with the same vocabulary; and for an adapter that
            puts tokens before the row.
    """
    for name, one in (("model", model), ("ref_model", ref_model)):
        if one is not None and getattr(one, "is_diffusion", None) is not True:
            raise ValueError(f"`{name}` must be a NanoLLaDAForMaskedLM, got a {type(one).__name__}")
    for name in () if ref_model is None else ("block_length", "vocab_size", "label_shift"):
        own, other = getattr(model.config, name), getattr(ref_model.config, name)
        if own != other:
            raise ValueError(f"`ref_model` must have the policy's `{name}`, got {other} and {own}")
    configs = [peft_config] if peft_config is not None else list(getattr(model, "peft_config", {}).values())
    for config in configs:
        if config.is_prompt_learning:
            raise ValueError(f"`peft_config` must adapt weights, got {config.peft_type.value}, which adds tokens")


def score_variance(log_ratios: torch.Tensor, beta: float) -> torch.Tensor:
    """
    The variance of each pair's preference score that its masks cause, `(pairs,)`.

    Half the mean square of the differences of successive draws, over the number of draws: the variance of their mean
    if they are independent, and more if they come from strata.

    Args:
        log_ratios (`torch.Tensor` of shape `(draws, 2 * pairs)`): Policy − reference in nats, draw by draw, all chosen
            answers first. At least two draws.
        beta (`float`): Of the score; the variance has the unit nats² · β².
    """
    chosen, rejected = log_ratios.chunk(2, dim=1)
    scores = beta * (chosen - rejected)  # [D, B]
    return (scores[1:] - scores[:-1]).square().mean(0) / 2 / len(scores)
