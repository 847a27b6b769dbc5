"""Edits: when the masks of a block are gone, some of its tokens are looked at again, and may give way to others.

The model's word on a token is p(x_i | the others). Of visible tokens it has one if it was trained to edit (LLaDA 2.1,
arXiv 2602.08676: "replace"), of a masked token in any case (T2M, arXiv 2604.18738: "remask"), and that one is exact.
One token a step is a step of coordinate ascent when greedy, and of Gibbs sampling when drawn; several at once are
neither (of the 729 rows of a Markov chain, 378 end in a circle).
"""

import torch

from .commit_nanollada import best
from .rule_nanollada import Decision, Step


class Editor:
    """
    Edits of the rows of a block.

    Greedy, a row's best edits go first, and it is done when none is left, or when its block is what it was before.
    With draws, its tokens are drawn anew from left to right, one a step, as long as there are steps: a sweep of Gibbs
    sampling takes as many as the block has tokens.

    Args:
        sampler ([`Sampler`]): For its settings and draws.
        pad_token_id (`torch.LongTensor`, *optional*): Like the ends of text, it is not proposed.
    """

    def __init__(self, sampler, pad_token_id=None):
        self.sampler, self.settings = sampler, sampler.settings
        self.draws = self.settings.temperature > 0
        self.remasks = self.settings.edit_rule == "remask"
        self.one_by_one = self.draws or self.remasks
        ends = sampler.eos_ids if pad_token_id is None else torch.cat((sampler.eos_ids, pad_token_id.view(-1)))
        self.never = ends.to(sampler.eos_ids.device)

    def start_block(self, rows: int, width: int) -> None:
        """Forgets the block before."""
        self.sureness = torch.zeros(rows, width, dtype=torch.double, device=self.sampler.eos_ids.device)  # [B, w]

    def note(self, step: Step, selected: torch.BoolTensor, logits: torch.FloatTensor, drawn: torch.LongTensor) -> None:
        """Keeps how probable the tokens were that a step decided: `drawn`, `[n]`, of `logits`, `[n, V]`."""
        if self.remasks and not self.draws:
            probability = logits.softmax(-1, dtype=torch.double).gather(1, drawn[:, None])[:, 0]  # [n]
            self.sureness[step.rows] = self.sureness[step.rows].masked_scatter(selected, probability)

    def start(self, places: torch.BoolTensor, ids: torch.LongTensor) -> None:
        """The tokens `ids`, `[B, w]`, of the block may change at `places`, `[B, w]`."""
        self.count = places.sum(1)  # [B]
        self.turn = places.long().cumsum(1) - 1  # [B, w], from left to right
        if self.remasks and not self.draws:  # the least sure first; those of a prompt or behind an end never
            order = self.sureness.masked_fill(~places, torch.inf).argsort(dim=1, stable=True)
            self.turn = order.argsort(dim=1)
        self.turn = self.turn.masked_fill(~places, -1)
        self.places, self.past = places, [ids]
        self.unchanged = torch.zeros_like(self.count)  # steps since a row's last change

    def read(self, rows: torch.LongTensor, index: int) -> torch.BoolTensor:
        """What step `index` looks at, `[R, w]`: all that may change, or one position of each row."""
        if not self.one_by_one:
            return self.places[rows]
        return self.turn[rows] == (index % self.count[rows])[:, None]

    def decide(self, step: Step, ids: torch.LongTensor) -> Decision:
        """
        The edits of a step, and the rows that are done.

        Args:
            step ([`Step`]): With the logits of its positions `read`.
            ids (`torch.LongTensor` of shape `(rows, length)`): The whole rows.
        """
        logits, old = step.logits.index_fill(1, self.never, -torch.inf), step.ids[step.read]  # [N, V], [N]
        if self.draws:
            row_of = step.read.nonzero()[:, 0]
            tokens = self.sampler.draw(logits, ids, row_of)
            chosen = step.read & (step.spread(tokens, -1) != step.ids)
        else:
            tokens, gain = best_edits(logits, old, self.settings.edit_threshold, self.settings.edit_margin)
            most = torch.full_like(step.rows, self.settings.max_edits)
            chosen = best(step.spread(gain, -torch.inf), most)
        tokens = step.spread(tokens, -1).long()
        return Decision(
            selected=torch.zeros_like(chosen),
            tokens=tokens,
            reopened=torch.zeros_like(chosen),
            replaced=chosen,
            finished=self.finished(step, chosen, tokens.where(chosen, step.ids)),
        )

    def finished(self, step: Step, chosen: torch.BoolTensor, new: torch.LongTensor) -> torch.BoolTensor:
        """`[R]`: rows in which nothing is left to edit, or that go round in circles; never those that draw."""
        if self.draws:
            return torch.zeros_like(chosen[:, 0])
        self.unchanged[step.rows] = torch.where(chosen.any(1), 0, self.unchanged[step.rows] + 1)
        if self.remasks:
            return self.unchanged[step.rows] >= self.count[step.rows]
        seen = torch.stack([(new == past[step.rows]).all(1) for past in self.past]).any(0)
        self.past.append(self.past[-1].index_copy(0, step.rows, new))
        return seen


def best_edits(logits: torch.Tensor, old: torch.LongTensor, threshold: float, margin: float):
    """
    Each position's likeliest token, and what it gains, log p(new) − log p(old) in nats. The gain is −∞ where there is
    nothing to do: the token is the likeliest, the new one's probability not above `threshold`, or the gain not above
    `margin`. With exact conditionals one edit adds its gain to the row's log-probability.

    Args:
        logits (`torch.FloatTensor` of shape `(positions, vocab_size)`): The model's.
        old (`torch.LongTensor` of shape `(positions,)`): The tokens now.

    Returns:
        `torch.LongTensor` and `torch.DoubleTensor` of shape `(positions,)`.
    """
    log_probs = logits.log_softmax(-1, dtype=torch.double)
    highest, tokens = log_probs.max(-1)
    gain = highest - log_probs.gather(1, old[:, None])[:, 0]
    worth = (tokens != old) & (highest.exp() > threshold) & (gain > margin)
    return tokens, gain.masked_fill(~worth, -torch.inf)
