"""The choices of a denoising step: which distribution, which positions, which tokens."""

import math
from dataclasses import replace

import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process as processors

from .commit_nanollada import best, commit_quota, commit_ramp, commit_ratio, entropy
from .rule_nanollada import Decision, Step
from .rules_nanollada import editor_of, edits_tokens, rule_of

# Of transformers' logits processors, those whose rule needs one position's scores alone. The rest reads left to right.
SHAPERS = (processors.SuppressTokensLogitsProcessor, processors.LogitNormalization)
WARPERS = tuple(
    getattr(processors, f"{name}LogitsWarper")
    for name in ("Temperature", "TopK", "TopP", "TopH", "MinP", "Typical", "Epsilon", "Eta")
)


class Sampler:
    """
    Settings and the rule that they switch on, the noise's generator and, for KLASS, the distributions of the step
    before.
    """

    def __init__(self, settings, logits_processor, eos_ids, mask_token_id, generator, edit_token_ids=(None, None)):
        if settings.eos_policy != "none" and len(eos_ids) == 0:
            raise ValueError(f"`eos_policy` must be 'none' without an `eos_token_id`, got {settings.eos_policy!r}")
        self.settings, self.eos_ids, self.generator = settings, eos_ids, generator
        self.rule = rule_of(settings)
        self.mask_token_id = mask_token_id
        self.shapers = LogitsProcessorList(item for item in logits_processor if not isinstance(item, WARPERS))
        self.warpers = LogitsProcessorList(item for item in logits_processor if isinstance(item, WARPERS))
        by_sample = settings.remasking == "low_confidence" and settings.position_score == "sampled_prob"
        self.by_sample = by_sample and self.rule.ranks
        self.edit_token_ids = edit_token_ids  # `<|delete|>` and `<|insert|>`, if the model has them
        controls = [token for token in edit_token_ids if token is not None and not edits_tokens(settings)]
        never = [torch.tensor([mask_token_id, *controls], device=eos_ids.device)]
        self.never = torch.cat(never + [eos_ids] * (settings.eos_policy == "forbid"))
        self.before = None
        edits = editor_of(settings)
        self.editor = None if edits is None else edits.editor(self, settings._pad_token_tensor)

    def start_block(self, rows: int, width: int) -> None:
        """Forgets the block before."""
        self.before = None
        self.memory = {}  # the rule's own
        self.block_shape = (rows, width)
        if self.editor is not None:
            self.editor.start_block(rows, width)

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

    def decide(self, step: Step, ids) -> Decision:
        """What a step does; `ids`, `[R, L]`, are the whole rows, mask tokens included."""
        if self.rule.reads_all:
            return self.rule.function(step, self)
        row_of = step.active.nonzero()[:, 0]  # [N]
        drawn = self.draw(step.logits, ids, row_of) if self.by_sample else None
        decision = self.choose(self.rank(step, drawn)) if self.rule.ranks else self.rule.function(step, self)
        selected, nothing = decision.selected & step.active, torch.zeros_like(step.active)
        chosen = selected[step.active]  # [N]
        drawn = drawn[chosen] if self.by_sample else self.draw(step.logits[chosen], ids, row_of[chosen])
        if self.editor is not None:
            self.editor.note(step, selected, step.logits[chosen], drawn)
        tokens = step.ids if decision.tokens is None else decision.tokens
        reopened = nothing if decision.reopened is None else decision.reopened & step.decided
        replaced = nothing if decision.replaced is None else decision.replaced & step.decided & ~reopened
        return Decision(selected, tokens.masked_scatter(selected, drawn), reopened, replaced)

    def rank(self, step: Step, tokens) -> Step:
        """The step with scores; `tokens`, `[N]`, are given where the drawn token's probability is the score."""
        scores, late = self.score(step.logits, tokens), torch.zeros_like(step.active)
        if self.settings.eos_policy == "last":
            ends = torch.isin(step.logits.argmax(-1) if tokens is None else tokens, self.eos_ids)
            late = late.masked_scatter(step.active, ends)
            late &= (step.active & ~late).any(1, keepdim=True)  # unless there are no others
        if self.settings.eos_policy == "cut":
            log_share = step.logits[:, self.eos_ids].logsumexp(-1) - step.logits.logsumexp(-1)  # [N]
            ends = step.spread(log_share, -torch.inf) > -math.log(2)
            late = step.active & (ends.cumsum(1) > ends.long())  # behind the first of them
        # No score spans more than ln V.
        return replace(step, ranked=step.spread(scores, -torch.inf) - 1e3 * late, late=late)

    def choose(self, step: Step) -> Decision:
        """What the rule takes of a ranked step; at least the schedule's share, or one token under a ramp."""
        settings, still_open = self.settings, step.active.sum(1)
        limit = step.active.shape[1] if settings.max_commits is None else settings.max_commits
        if settings.commit_schedule == "ramp":
            ramp = commit_ramp(step.masked, still_open, settings.ramp_start, settings.ramp_end)
            limit = ramp.clamp(max=limit)  # [R]
            share = limit if self.rule.function is None else torch.ones_like(limit)
        else:
            if settings.commit_schedule == "ratio":
                share = commit_ratio(still_open, step.steps, step.index)
            else:
                share = commit_quota(step.masked, step.steps, step.index)
            # what `max_commits` left over is owed after the last step
            share = torch.where(step.steps > step.index, share.clamp(min=1), still_open)
        if self.rule.function is None:
            return Decision(best(step.ranked, share.clamp(max=limit)))
        decision = self.rule.function(step, self)
        chosen = (decision.selected & step.active) | best(step.ranked, share)
        if settings.max_commits is not None or settings.commit_schedule == "ramp":
            chosen = best(step.ranked.masked_fill(~chosen, -torch.inf), share.new_zeros(share.shape) + limit)
        return replace(decision, selected=chosen)

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

    def noise(self, shape, device):
        """Uniform on [0, 1), float64, from the caller's generator wherever it lives."""
        source = device if self.generator is None else self.generator.device
        return torch.rand(shape, generator=self.generator, dtype=torch.double, device=source).to(device)
