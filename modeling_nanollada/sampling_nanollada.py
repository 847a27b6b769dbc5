"""The choices of a denoising step: which distribution, which positions, which tokens."""

from dataclasses import dataclass

import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process as processors

from .commit_nanollada import (
    above_threshold,
    best,
    commit_quota,
    commit_ramp,
    commit_ratio,
    hierarchical,
    remdm_rates,
    stable,
    within_entropy,
    within_factor,
)

# Of transformers' logits processors, those whose rule needs one position's scores alone. The rest reads left to right.
SHAPERS = (processors.SuppressTokensLogitsProcessor, processors.LogitNormalization)
WARPERS = tuple(
    getattr(processors, f"{name}LogitsWarper")
    for name in ("Temperature", "TopK", "TopP", "TopH", "MinP", "Typical", "Epsilon", "Eta")
)


@dataclass
class Step:
    """
    Where a block stands.

    Args:
        rows (`torch.LongTensor` of shape `(rows,)`): The rows at work.
        masked (`torch.LongTensor` of shape `(rows,)`): Their masks of the block before its first step.
        steps (`torch.LongTensor` of shape `(rows,)`): Their steps.
        index (`int`): This step, from 0.
    """

    rows: torch.LongTensor
    masked: torch.LongTensor
    steps: torch.LongTensor
    index: int


class Sampler:
    """Settings, the noise's generator and, for KLASS, the distributions of the step before."""

    def __init__(self, settings, logits_processor, eos_ids, mask_token_id, generator):
        if settings.eos_policy != "none" and len(eos_ids) == 0:
            raise ValueError(f"`eos_policy` must be 'none' without an `eos_token_id`, got {settings.eos_policy!r}")
        self.settings, self.eos_ids, self.generator = settings, eos_ids, generator
        self.mask_token_id = mask_token_id
        self.shapers = LogitsProcessorList(item for item in logits_processor if not isinstance(item, WARPERS))
        self.warpers = LogitsProcessorList(item for item in logits_processor if isinstance(item, WARPERS))
        self.by_sample = settings.remasking == "low_confidence" and settings.position_score == "sampled_prob"
        never = [torch.tensor([mask_token_id], device=eos_ids.device)]
        self.never = torch.cat(never + [eos_ids] * (settings.eos_policy == "forbid"))
        self.before = None

    def start_block(self, rows: int, width: int) -> None:
        """Forgets the block before."""
        self.before = None
        self.block_shape = (rows, width)

    def shape(self, logits, ids, row_of, visible):
        """
        The model's distribution as positions are ranked by: repetition penalty, processors, EOS policy.

        Args:
            logits (`torch.FloatTensor` of shape `(positions, vocab_size)`): Of the open positions, row by row.
            ids (`torch.LongTensor` of shape `(rows, length)`): The rows, mask tokens included.
            row_of (`torch.LongTensor` of shape `(positions,)`): The row of each position.
            visible (`torch.BoolTensor` of shape `(rows, length)`): What is no padding.
        """
        penalty = self.settings.repetition_penalty
        if penalty != 1:
            seen = logits.new_zeros(len(ids), logits.shape[1] + 1, dtype=torch.bool)  # [R, V + 1]
            hidden = (ids == self.mask_token_id) | ~visible
            seen = seen.scatter(1, ids.masked_fill(hidden, logits.shape[1]), True)[row_of, :-1]
            logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
        if self.shapers:
            logits = self.shapers(ids[row_of], logits)
        return logits.index_fill(1, self.never, -torch.inf)

    def select(self, logits, ids, row_of, active, step: Step):
        """
        The positions that `step` commits, and their tokens.

        Args:
            logits, ids, row_of: As in `shape`.
            active (`torch.BoolTensor` of shape `(rows, width)`): The open positions of the block.

        Returns:
            `torch.BoolTensor` of shape `(rows, width)`, and the tokens there, row by row.
        """
        tokens = self.draw(logits, ids, row_of) if self.by_sample else None
        scores = self.score(logits, tokens)  # [N]
        if self.settings.eos_policy == "last":
            late = torch.isin(tokens if self.by_sample else logits.argmax(-1), self.eos_ids)  # [N]
            others = torch.zeros(len(active), dtype=torch.bool, device=late.device).scatter_reduce(
                0, row_of, ~late, "amax"
            )
            scores = scores - 1e3 * (late & others[row_of])  # no score spans more than ln V
        ranked = _spread(scores, active, -torch.inf)  # [R, W]
        selected = active & self.choose(ranked, logits, active, step)
        chosen = selected[active]  # [N]
        return selected, tokens[chosen] if self.by_sample else self.draw(logits[chosen], ids, row_of[chosen])

    def choose(self, ranked, logits, active, step: Step):
        """`[R, W]`: what the commit rule takes; at least the schedule's share, or one token under a ramp."""
        settings, still_open = self.settings, active.sum(1)
        limit = active.shape[1] if settings.max_commits is None else settings.max_commits
        if settings.commit_schedule == "ramp":
            ramp = commit_ramp(step.masked, still_open, settings.ramp_start, settings.ramp_end)
            limit = ramp.clamp(max=limit)  # [R]
            share = limit if settings.commit_rule() == "quota" else torch.ones_like(limit)
        elif settings.commit_schedule == "ratio":
            share = commit_ratio(still_open, step.steps, step.index)
        else:
            share = commit_quota(step.masked, step.steps, step.index)
        if settings.commit_schedule != "ramp":  # what `max_commits` left over is owed after the last step
            share = torch.where(step.steps > step.index, share.clamp(min=1), still_open)
        if settings.commit_rule() == "quota":
            return best(ranked, share.clamp(max=limit))
        chosen = self.confident(ranked, logits, active, step) | best(ranked, share)
        if settings.max_commits is None and settings.commit_schedule != "ramp":
            return chosen
        return best(ranked.masked_fill(~chosen, -torch.inf), share.new_zeros(share.shape) + limit)

    def confident(self, ranked, logits, active, step: Step):
        """`[R, W]`: what the rule takes by confidence alone."""
        settings, rule = self.settings, self.settings.commit_rule()
        if rule == "factor":
            return within_factor(ranked, settings.factor)
        if rule == "entropy_bound":
            late = ranked < -500  # what `eos_policy` puts last
            entropies = _spread(entropy(logits), active, torch.inf).masked_fill(late, torch.inf)
            return within_entropy(entropies, settings.entropy_bound)
        if rule == "hierarchical":
            return hierarchical(ranked, settings.threshold, settings.low_threshold)
        if rule == "klass":
            divergence = _spread(self.divergence(logits, active, step.rows), active, torch.inf)
            return stable(ranked, divergence, settings.threshold, settings.kl_threshold)
        return above_threshold(ranked, settings.threshold)

    def divergence(self, logits, active, rows):
        """`[N]`: KL of each open position's distribution to that of the step before, in nats; +∞ if there was none."""
        now = logits.log_softmax(-1, dtype=torch.double)
        if self.before is None:
            self.before = now.new_full((*self.block_shape, now.shape[-1]), torch.nan)
        where = (rows[active.nonzero()[:, 0]], active.nonzero()[:, 1])
        before = self.before[where]
        self.before[where] = now
        ratio = torch.where(now.isneginf(), 0, now - before)  # 0 · (−∞ − x) is 0
        return (now.exp() * ratio).sum(-1).nan_to_num(nan=torch.inf, posinf=torch.inf)

    def score(self, logits, tokens):
        """`[N]`, the higher the sooner."""
        if self.settings.remasking == "random":
            return self.noise((len(logits),), logits.device)
        if self.settings.position_score == "entropy":
            return -entropy(logits)
        log_probs = logits.log_softmax(-1, dtype=torch.double)  # float32 would tie what is nearly certain
        if self.settings.position_score == "sampled_prob":
            return log_probs.gather(1, tokens[:, None])[:, 0].exp()
        if self.settings.position_score == "margin":
            first, second = log_probs.topk(2).values.exp().unbind(-1)
            return first - second
        return log_probs.amax(-1).exp()

    def draw(self, logits, ids, row_of):
        """One token from each distribution, `[N]`: argmax of z/T + Gumbel noise, in float64; T = 0 has no noise."""
        if self.settings.temperature == 0:
            return logits.argmax(-1)
        logits = self.warpers(ids[row_of], logits.double())
        return (logits - (-self.noise(logits.shape, logits.device).log()).log()).argmax(-1)

    def remask(self, logits, ids, row_of, active, decided, step: Step):
        """
        A step of ReMDM: `selected` and tokens as in `select`, and which of the block's `decided` positions are masked
        again. Three draws of noise: for the open ones, for the decided ones, for the tokens.
        """
        sigma, decide = remdm_rates(step.steps, step.index, self.settings.remdm, self.settings.remdm_eta)
        selected = active & (self.noise(active.shape, active.device) < decide[:, None])
        again = decided & (self.noise(active.shape, active.device) < sigma[:, None])
        chosen = selected[active]
        return selected, self.draw(logits[chosen], ids, row_of[chosen]), again

    def noise(self, shape, device):
        """Uniform on [0, 1), float64, from the caller's generator wherever it lives."""
        source = device if self.generator is None else self.generator.device
        return torch.rand(shape, generator=self.generator, dtype=torch.double, device=source).to(device)


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """`[N]`, nats."""
    return torch.special.entr(logits.softmax(-1, dtype=torch.double)).sum(-1)


def _spread(values, active, fill):
    """`[N]` values of the open positions on their places `[R, W]`."""
    spread = torch.full(active.shape, fill, dtype=torch.double, device=values.device)
    return spread.masked_scatter(active, values.double())
