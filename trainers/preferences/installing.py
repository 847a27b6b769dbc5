"""How the score gets into TRL's `DPOTrainer`: in place of the forward that it gives a model."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from trl.trainer import dpo_trainer
from trl.trainer.utils import FusedCausalLMOutput

from nanollada.trainers.noise.blocks import block_ids_of
from nanollada.trainers.preferences.masks import draw_masks
from nanollada.trainers.preferences.score import Score, score_masks

NAME = "add_fused_lm_head"  # what of trl.trainer.dpo_trainer binds the forward


@dataclass
class ScoreCalls:
    """
    The scores of one loss, in the order in which TRL asks for them: the policy's, then the reference's.

    Attributes:
        scores (`list[Score]`): Those so far, detached.
        reference_only (`bool`): Whether all are the reference's, as they are when it is computed beforehand.
    """

    scores: list[Score] = field(default_factory=list)
    reference_only: bool = False

    def begin(self, reference_only: bool = False) -> None:
        self.scores, self.reference_only = [], reference_only

    @property
    def of_reference(self) -> bool:
        """Whether the next score is the reference's."""
        return self.reference_only or len(self.scores) > 0


def install_score(model, calls: ScoreCalls, *, estimator: str, draws: int) -> None:
    """
    Gives a model the forward that TRL's `DPOTrainer` calls with `fused_lm_head=True`: of the labels it returns
    weighted log-probabilities whose sum is the ELBO. All other calls are the model's own.

    TRL reads columns 1.. of these: column j is the token at place j here as there, so that nothing is shifted.
    `entropy`, `mean_logits` and `is_top1` are zeros: the metrics that TRL makes of them are not the diffusion model's.

    Args:
        model ([`NanoLLaDAForMaskedLM`] or `peft.PeftModel`): Policy or reference.
        calls ([`ScoreCalls`]): Notes the scores; the same for policy and reference.
        estimator (`str`), draws (`int`): As in `draw_masks`.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = model.forward

    @functools.wraps(type(model).forward)
    def forward(
        self, *args, fused_lm_head=False, labels=None, index=None, seed=None, step=None, use_cache=None, **kwargs
    ):
        if not fused_lm_head:
            given = {"labels": labels, "index": index, "seed": seed, "step": step, "use_cache": use_cache}
            return own(*args, **{name: value for name, value in given.items() if value is not None}, **kwargs)
        input_ids, attention_mask = kwargs.pop("input_ids"), kwargs.pop("attention_mask")
        if index is None:
            raise ValueError("`index` must be a column of the batch: masks are keyed by a row's number, got none")
        others = [name for name, value in kwargs.items() if value is not None]
        if others:
            raise ValueError(f"`inputs` must hold what a score reads, got {', '.join(others)} beside that")
        targets, block_length = labels != -100, self.config.block_length
        if targets[:, 0].any():
            raise ValueError("`prompt` must hold at least one token, got an answer that begins the row")
        noise = draw_masks(
            input_ids,
            targets,
            self.config,
            estimator=estimator,
            draws=draws,
            seed=seed,
            index=index,
            step=step,
            block_ids=block_ids_of(block_length, None, None, input_ids.shape, input_ids.device),
            reference=calls.of_reference,
        )
        score = score_masks(own, noise, input_ids, attention_mask, block_length)
        calls.scores.append(Score(score.log_probs.detach(), score.draws, score.right, score.masked))
        zeros = torch.zeros_like(score.log_probs)
        return FusedCausalLMOutput(
            log_probs=score.log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), label_mask=targets
        )

    model._install_forward(forward)


@contextmanager
def in_place_of_fused_head(install) -> Iterator[None]:
    """
    Within it, `DPOTrainer.__init__` calls `install(model)` where it would give a model its own scoring forward.

    Raises:
        `RuntimeError`: if it never did: this TRL scores in another way.
    """
    given, models = getattr(dpo_trainer, NAME), []

    def add(model, temperature=1.0, cast_lm_head_to_fp32=False, outputs=("log_probs",)):
        models.append(model)
        install(model)

    setattr(dpo_trainer, NAME, add)
    try:
        yield
    finally:
        setattr(dpo_trainer, NAME, given)
    if not models:
        raise RuntimeError(f"TRL's DPOTrainer must call `{NAME}`, got no call: this version scores in another way")
