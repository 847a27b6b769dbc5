"""Reinforcement learning with GRPO: `accelerate launch trainers/grpo.py --config scripts/recipes/<recipe>.yaml`.

A policy writes several answers to a prompt, rewards judge them, and what did better than its group becomes likelier.
An AR checkpoint is trained by TRL's `GRPOTrainer` itself; a diffusion one by the subclass here, which decodes with the
diffusion `generate` and scores what was decoded by an estimator of `rollouts.likelihoods`.
"""

import copy
import logging
from dataclasses import dataclass, field
from functools import partial

import torch
from trl import GRPOConfig, GRPOTrainer
from trl.extras.profiling import profiling_context
from trl.models import unwrap_model_for_generation
from trl.trainer import grpo_trainer

from nanollada.modeling_nanollada import NanoLLaDAForMaskedLM
from nanollada.modeling_nanollada.loading_nanollada import load_model
from nanollada.modeling_nanollada.rules_nanollada import OWN_SETTINGS
from nanollada.trainers import run
from nanollada.trainers.commands.ending import run_program
from nanollada.trainers.data.feedback.prompts import PromptArguments, prepare_prompts
from nanollada.trainers.rewards.registry import reward_functions
from nanollada.trainers.rollouts.decoding import Decoding
from nanollada.trainers.rollouts.generating import left_padded, seed_of, split, write_rollouts
from nanollada.trainers.rollouts.likelihoods import ESTIMATORS, Scores
from nanollada.trainers.rollouts.options import (
    DIFFUSION_ONLY,
    REFUSED_ARGUMENTS,
    check_autoregressive,
    check_diffusion,
    check_reference,
    rollout_settings,
)
from nanollada.trainers.rollouts.policy import drop_thresholds, replaced, switch_off_dropout
from nanollada.trainers.rollouts.rollouts import Rollouts
from nanollada.trainers.tuning.entry import TuningEntry
from nanollada.trainers.tuning.trainer import resumable
from nanollada.trainers.weights.adapters import is_adapted

logger = logging.getLogger(__name__)


# What TRL takes as it comes, or refuses in the first step.
LEAST = {
    "score_steps": 1,
    "num_iterations": 1,
    "max_completion_length": 1,
    "beta": 0,
    "epsilon": 0,
    "epsilon_high": 0,
}
CHOICES = {
    "loss_type": ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "vespo", "luspo"),
    "scale_rewards": ("none", "group", "batch", True, False),
}


@dataclass
class DiffusionGRPOConfig(GRPOConfig):
    """
    TRL's `GRPOConfig` for both kinds of policy, with the estimator of a diffusion policy's likelihood.

    Losses are summed over tokens and not scaled by a group's spread of rewards (Dr. GRPO, arXiv 2503.20783), which is
    the policy gradient itself; numbers are float32, for ratios near 1.

    Raises:
        `ValueError`: as TRL's, and for unknown names and values out of range.
    """

    estimator: str | None = field(
        default=None,
        metadata={
            "choices": list(ESTIMATORS),
            "help": "Diffusion: how a rollout's likelihood is scored. Default: replay. "
            + "; ".join(f"{name}: {estimator.help}" for name, estimator in ESTIMATORS.items()),
        },
    )
    score_steps: int | None = field(
        default=None,
        metadata={
            "help": "Diffusion: replay scores so many of a rollout's steps, drawn anew for each, and weighs them "
            "up; elbo uses so many masks. Default: all steps, each number of masks once."
        },
    )
    reward_funcs: list[str] = field(
        default_factory=lambda: ["puzzle"],
        metadata={"help": "Rewards, which are added up: names of `rewards.registry`, or package.module:function."},
    )
    importance_sampling_level: str | None = field(
        default=None,
        metadata={"help": "A ratio for each token, or one for the sequence. Default: token; sequence under elbo."},
    )
    loss_type: str = field(default="dr_grpo", metadata={"help": "TRL's: grpo, dr_grpo, dapo, bnpo, cispo, sapo, …"})
    scale_rewards: str = field(
        default="none", metadata={"help": "none; group, batch: advantages over the rewards' standard deviation there."}
    )
    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate."})
    disable_dropout: bool = field(default=True, metadata={"help": "No dropout: it would change every ratio."})
    bf16: bool | None = field(default=False, metadata={"help": "bf16 mixed precision; scores stay float32."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Recompute activations in the backward pass, which saves memory. Default: no."}
    )

    def __post_init__(self):
        if self.estimator is not None and self.estimator not in ESTIMATORS:
            raise ValueError(f"`estimator` must be one of {', '.join(ESTIMATORS)}, got {self.estimator!r}")
        for name, least in LEAST.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"`{name}` must be >= {least}, got {value}")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"`{name}` must be one of {', '.join(map(str, allowed))}, got {getattr(self, name)!r}"
                )
        if self.importance_sampling_level is None:
            self.importance_sampling_level = ESTIMATORS[self.estimator or "replay"].ratio
        super().__post_init__()


class DiffusionGRPOTrainer(GRPOTrainer):
    """
    TRL's `GRPOTrainer` for a masked-diffusion policy.

    Rollouts are written by the diffusion `generate`, in the rows that the checkpoint was trained for (its blocks, its
    `eos_policy`), one token a step unless `args.generation_kwargs` say otherwise.
    Likelihoods are those of the canvas that the decoder left, as it was, with all tokens that it decided: TRL's own
    rows are cut behind the first EOS, and the model would see another canvas.

    Args:
        model (`str`, [`NanoLLaDAForMaskedLM`] or `peft.PeftModel`): The policy, or its folder.
        reward_funcs, train_dataset, eval_dataset, processing_class, reward_processing_classes, callbacks, optimizers,
            peft_config: As in TRL.
        args ([`DiffusionGRPOConfig`], *optional*): Settings.
        ref_model ([`NanoLLaDAForMaskedLM`], *optional*): For `beta` above 0; by default the policy as it is given, or
            without its adapter.

    Attributes:
        dropped_decoding (`dict`): What the policy's generation config said about thresholds, and no longer says.

    Raises:
        `ValueError`: for a model of another kind, and as `check_diffusion` and `rollout_settings`.
    """

    def __init__(
        self,
        model,
        reward_funcs,
        args=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        *,
        ref_model=None,
        **kwargs,
    ):
        for name, reason in REFUSED_ARGUMENTS.items():
            if value := kwargs.pop(name, None):
                raise ValueError(f"`{name}` must be None: {reason}, got {value!r}")
        if isinstance(model, str):
            model = load_model(NanoLLaDAForMaskedLM, model, "model")
        if not getattr(model, "is_diffusion", False):
            raise ValueError(f"`model` must be a NanoLLaDAForMaskedLM, got a {type(model).__name__}")
        args = args or DiffusionGRPOConfig(f"{model.name_or_path.split('/')[-1] or 'nanollada'}-grpo")
        if not isinstance(args, DiffusionGRPOConfig):
            raise ValueError(f"`args` must be a DiffusionGRPOConfig, got a {type(args).__name__}")
        args.estimator = args.estimator or "replay"
        check_diffusion(args)
        check_reference(args, ref_model, is_adapted(model) or kwargs.get("peft_config"))
        self.estimator = ESTIMATORS[args.estimator]
        self.dropped_decoding = drop_thresholds(model)
        if self.dropped_decoding:
            logger.warning(
                "Decoding thresholds were chosen for the model as it was, and go: %s", self.dropped_decoding
            )
        switch_off_dropout(model)
        # TRL would put another `forward` on the model, which scores next tokens, and load the reference from a path.
        names = {"add_fused_lm_head": _leave_forward, "create_model_from_path": partial(_reference, model, ref_model)}
        with replaced(grpo_trainer, **names):
            super().__init__(model, reward_funcs, args, train_dataset, eval_dataset, processing_class, **kwargs)
        config = self.base_model.config
        self.generation_config = rollout_settings(args, config, self.base_model.generation_config, self.eos_token_ids)
        self._decoding = Decoding.of(self.generation_config, config)
        self._rollouts, self._scores, self._eval_batch = None, None, 0

    @property
    def base_model(self) -> NanoLLaDAForMaskedLM:
        """The policy without what accelerate and PEFT put around it."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if is_adapted(model) else model

    # ---- what is written

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        """The completions' ids up to their first EOS, as TRL has them; the canvas behind them is kept."""
        if images is not None or multimodal_fields:
            raise ValueError("`train_dataset` must hold texts: a diffusion policy sees no images, got some")
        ids, mask = left_padded(prompt_ids, self._tokenizer.pad_token_id, self.pad_to_multiple_of)
        device = self.accelerator.device
        around = unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        )
        with (
            profiling_context(self, "generate"),
            around,
            torch.no_grad(),
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            self._rollouts, completion_ids = write_rollouts(
                self.base_model, ids.to(device), mask.to(device), self.generation_config, self._generator()
            )
        return completion_ids, None

    def _generator(self) -> torch.Generator:
        """Of a generation's draws, which depend on (seed, training step, rank) alone; in evaluation on its batch."""
        number = (self._step, 0) if self.model.training else (self._eval_batch, 1)
        self._eval_batch += not self.model.training
        seed = seed_of(self.args.seed, *number, 1 + self.accelerator.process_index)
        return torch.Generator(self.accelerator.device).manual_seed(seed)

    def evaluation_loop(self, *args, **kwargs):
        """Each evaluation draws with the same numbers."""
        self._eval_batch = 0
        return super().evaluation_loop(*args, **kwargs)

    # ---- what is scored

    def _generate_and_score_completions(self, inputs):
        """As TRL's, with the whole canvas in place of the prompt and the cut completion."""
        self._scoring_seed = seed_of(self.args.seed, self._step, int(not self.model.training), 0)
        batch = super()._generate_and_score_completions(inputs)
        rollouts, self._rollouts = self._rollouts, None
        kept = batch["completion_mask"].bool().any(1, keepdim=True)  # [B, 1], all but for `mask_truncated_completions`
        sampled = (rollouts.commit_steps >= 0) & kept  # [B, W]
        return batch | {
            "prompt_ids": rollouts.canvas[:, :0],
            "prompt_mask": rollouts.attention_mask[:, :0],
            "completion_ids": rollouts.canvas,
            "completion_mask": sampled.int(),
            "num_items_in_batch": self.accelerator.gather(sampled.sum()).sum(),
            "commit_steps": rollouts.commit_steps,
            "attention_mask": rollouts.attention_mask,
            "prompt_length": torch.tensor(rollouts.prompt_length),
            "scoring_seed": torch.tensor(self._scoring_seed),
        }

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **kwargs
    ):
        """Those of the rollouts at hand, `[B, W]`: `input_ids` are TRL's own rows and are not read."""
        if self._scores is not None:  # of the current policy, for its loss
            return self._scores.log_probs, self._scores.entropies, None
        parts = [
            self._score(model, rows, self._scoring_seed).log_probs
            for rows in split(self._rollouts, batch_size or len(input_ids))
        ]
        return torch.cat(parts), None, None

    def _score(self, model, rollouts: Rollouts, seed: int, entropy: bool = False) -> Scores:
        with self.accelerator.autocast():
            return self.estimator.score(
                model, rollouts, self._decoding, steps=self.args.score_steps, seed=seed, entropy=entropy
            )

    def _compute_loss(self, model, inputs):
        """As TRL's, where a token counts by its weight: that of the steps that are scored, for all of them."""
        parts = (inputs[name] for name in ("completion_ids", "commit_steps", "attention_mask"))
        rollouts = Rollouts(*parts, prompt_length=int(inputs["prompt_length"]))
        scores = self._score(model, rollouts, int(inputs["scoring_seed"]), entropy=self.estimator.exact)
        if scores.entropies is None:  # TRL wants some
            scores.entropies = torch.zeros_like(scores.log_probs)
        if not self._entropy_bonus_enabled:  # nobody asks for its gradient, and the distributions take memory
            scores.entropies = scores.entropies.detach()
        self._scores = scores
        weights = scores.weights * inputs["completion_mask"].any(1, keepdim=True)
        try:
            loss = super()._compute_loss(model, {**inputs, "completion_mask": weights})
        finally:
            self._scores = None
        self._note(rollouts, scores)
        return loss

    def get_high_entropy_mask(self, entropies, mask, threshold):
        """As TRL's, which multiplies entropies by a mask of 0 and 1; ours holds weights."""
        return super().get_high_entropy_mask(entropies, (mask > 0).to(entropies.dtype), threshold)

    def _note(self, rollouts: Rollouts, scores: Scores) -> None:
        """Metrics of the rollouts, over all ranks; what TRL's would say that isn't so here goes."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        if not self.estimator.exact:
            metrics.pop("entropy")
        sampled = rollouts.commit_steps >= 0
        sums = torch.stack(
            [
                torch.tensor(float(len(sampled)), device=sampled.device),
                (rollouts.commit_steps.amax(1) + 1).sum(),
                sampled.sum(),
                (scores.weights > 0).sum(),
                scores.total().detach().sum(),
            ]
        )
        rows, steps, tokens, scored, total = self.accelerator.reduce(sums, "sum").tolist()
        metrics["rollouts/steps"].append(steps / rows)
        metrics["rollouts/tokens"].append(tokens / rows)
        metrics["rollouts/scored_share"].append(scored / max(tokens, 1))
        metrics["rollouts/log_likelihood"].append(total / rows)


def _leave_forward(model, temperature=1.0, cast_lm_head_to_fp32=False, outputs=("log_probs",)) -> None:
    """In place of TRL's `add_fused_lm_head`, with its signature: the forward stays what it is."""


def _reference(model, given, model_id, architecture=None, **kwargs):
    """In place of TRL's `create_model_from_path`: the reference that is given, or a copy of the policy as it is."""
    return copy.deepcopy(model) if given is None else given


def load_rows(data: PromptArguments, tokenizer, args: DiffusionGRPOConfig, config):
    """The prompts of a run, none of which leaves too little room to answer."""
    return prepare_prompts(data, tokenizer, config.max_position_embeddings - args.max_completion_length)


def build(*, policy, reference, tokenizer, rows, data, args, peft_config) -> GRPOTrainer:
    """
    The trainer of a policy: TRL's of an AR model, the one above of a diffusion model.

    Raises:
        `ValueError`: as `check_autoregressive`, `reward_functions` and the trainers.
    """
    rewards = reward_functions(args.reward_funcs)
    given = {"eval_dataset": rows.eval, "processing_class": tokenizer, "peft_config": peft_config}
    if policy.is_diffusion:
        return resumable(DiffusionGRPOTrainer)(policy, rewards, args, rows.train, ref_model=reference, **given)
    check_autoregressive(args)
    check_reference(args, reference, peft_config)
    if args.disable_dropout:
        switch_off_dropout(policy)
    with replaced(grpo_trainer, create_model_from_path=partial(_reference, policy, reference)):
        return resumable(GRPOTrainer)(policy, rewards, args, rows.train, **given)


def objective(trainer: GRPOTrainer) -> dict:
    """What `run.json` says of the objective."""
    args, diffusion = trainer.args, isinstance(trainer, DiffusionGRPOTrainer)
    names = ["reward_funcs", "reward_weights", "scale_rewards", "loss_type", "importance_sampling_level", "beta"]
    names += ["num_generations", "num_iterations", "temperature", "max_completion_length"]
    settings = {name: getattr(args, name) for name in names + list(DIFFUSION_ONLY if diffusion else ())}
    if not diffusion:
        return {"name": "GRPO", **settings}
    decoding = trainer.generation_config.to_diff_dict()
    own = {name: decoding[name] for name in OWN_SETTINGS if name in decoding}
    dropped = {"decoding": own, "dropped_decoding": trainer.dropped_decoding}
    return {"name": f"GRPO, likelihood by {args.estimator}", **settings, **dropped}


TRAINER = TuningEntry(
    "grpo",
    "Trains an AR or a diffusion model by rewards for its own answers.",
    DiffusionGRPOConfig,
    PromptArguments,
    load_rows,
    build,
    objective,
    needs_reference=lambda args: args.beta > 0,
    curve=("reward", "mean reward"),
)

main = partial(run.main, TRAINER)

if __name__ == "__main__":
    run_program(main)
