"""Decoding with greedy edits in plain loops: one row at a time, no batch, no padding, no cache, every logit."""

import torch
from generation_models import MASK, PAD, reference_blocks

CONTROLS = (62, 63)  # <|delete|> and <|insert|>


class PlainEdits:
    """
    Writes behind a prompt and edits: masks first, block by block, then the block's tokens.

    Attributes:
        row (`list[int]`): All tokens, up to the end of the model's last block.
        steps (`list[int]`): The step in which each place got its token, −1 where none did.
        passes (`int`): Forward passes.
        edits (`int`): Tokens that gave way.
    """

    def __init__(
        self, model, prompt, new, ends, *, block_length=None, steps=None, cfg_scale=0.0, eos_policy="none",
        early_stop=True, edit_threshold=None, edit_margin=0.7, max_edits=1, max_post_steps=16, edit_rule="replace",
    ):  # fmt: skip
        self.model, self.ends, self.start, self.total = model, set(ends), len(prompt), len(prompt) + new
        self.cfg_scale, self.eos_policy, self.early_stop = cfg_scale, eos_policy, early_stop or eos_policy == "cut"
        self.threshold, self.margin = edit_threshold, edit_margin
        self.max_edits, self.budget = max_edits, max_post_steps
        grid = model.config.block_length
        width = self.total if grid is None else -(-self.total // grid) * grid
        self.row = list(prompt) + [MASK] * (width - len(prompt))
        self.given = [token != MASK for token in self.row]
        self.steps, self.passes, self.edits, self.sure = [-1] * width, 0, 0, {}
        blocks = reference_blocks(model, self.row, self.start, self.total, block_length or grid or max(new, 1))
        edit = {"replace": self.replace, "remask": self.remask}[edit_rule]
        for block in blocks:
            over = self.fill(block, steps)
            if edit_threshold is not None:
                edit(block)
            if over:
                break

    @torch.no_grad()
    def read(self, row):
        """Log-probabilities of the tokens that may be written, `[W, V]`."""
        logits = self.model(torch.tensor([row])).logits[0]
        if self.cfg_scale:
            hidden = [MASK if given else token for token, given in zip(row, self.given, strict=True)]
            other = self.model(torch.tensor([hidden])).logits[0]
            logits = other + (self.cfg_scale + 1) * (logits - other)
        logits[:, [MASK, *CONTROLS]] = -torch.inf
        if self.eos_policy == "forbid":
            logits[:, list(self.ends)] = -torch.inf
        return logits.log_softmax(-1)

    def write(self, place, token):
        self.row[place], self.steps[place] = token, self.passes

    def end(self):
        """The place of the first end of text that was generated behind the prompt."""
        return next((i for i in range(self.start, self.total) if self.row[i] in self.ends), self.total)

    def fill(self, block, steps):
        """Equal shares of the block's masks, the likeliest first; whether the row is over."""
        todo, count = set(block), min(steps or len(block), len(block))
        for step in range(count):
            if not todo:
                break
            scores = self.read(self.row).exp()
            best = {i: int(scores[i].argmax()) for i in todo}
            late = dict.fromkeys(todo, False)
            if self.eos_policy == "last":
                late = {i: best[i] in self.ends for i in todo}
            elif self.eos_policy == "cut":
                first = min((i for i in todo if scores[i, list(self.ends)].sum() > 0.5), default=self.total)
                late = {i: i > first for i in todo}
            order = sorted(todo, key=lambda i: (late[i], -float(scores[i].max()), i))
            for place in order[: len(block) // count + (step < len(block) % count)]:
                self.write(place, best[place])
                self.sure[place] = float(scores[place].max())
                todo.remove(place)
            self.passes += 1
            end = self.end()
            if self.eos_policy == "cut":
                todo = {i for i in todo if i < end}
            if self.early_stop and end < self.total and MASK not in self.row[:end]:
                return True
        return False

    def editable(self, block):
        end = self.end()
        return [i for i in block if i < end and self.row[i] != MASK and self.row[i] not in self.ends]

    def shown(self, block):
        """The row as an edit reads it: of what the block wrote behind an end of text, nothing."""
        end = self.end()
        return [MASK if i in block and i > end else token for i, token in enumerate(self.row)]

    def better(self, scores, place):
        """The likeliest token of a place and what it gains, or `None`."""
        scores = scores[place].clone()
        scores[[PAD, *self.ends]] = -torch.inf
        scores = scores.log_softmax(-1)
        token, old = int(scores.argmax()), self.row[place]
        gain = float(scores[token] - scores[old])
        good = token != old and float(scores[token].exp()) > self.threshold and gain > self.margin
        return (gain, token) if good else None

    def replace(self, block):
        """The best edits of each step, until there are none or the block is as it was before."""
        places, seen = self.editable(block), {tuple(self.row)}
        for _ in range(self.budget if places else 0):
            scores = self.read(self.shown(block))
            found = {i: edit for i in places if (edit := self.better(scores, i))}
            for place in sorted(found, key=lambda i: (-found[i][0], i))[: self.max_edits]:
                self.write(place, found[place][1])
                self.edits += 1
            self.passes += 1
            if tuple(self.row) in seen:
                break
            seen.add(tuple(self.row))

    def remask(self, block):
        """One masked token a step, the least sure first, round and round until a whole round changes nothing."""
        places = sorted(self.editable(block), key=lambda i: (self.sure[i], i))
        unchanged = 0
        for step in range(self.budget if places else 0):
            place = places[step % len(places)]
            shown = self.shown(block)
            shown[place] = MASK
            scores = self.read(shown)
            edit = self.better(scores, place)
            if edit:
                self.write(place, edit[1])
                self.edits += 1
            self.passes += 1
            unchanged = 0 if edit else unchanged + 1
            if unchanged == len(places):
                break

    def output(self):
        """What `generate` gives: pads behind the first end of text."""
        kept = self.end() + 1
        return self.row[: min(kept, self.total)] + [PAD] * (self.total - kept)

    def kept(self):
        """Tokens decided and kept."""
        return sum(step >= 0 for step in self.steps[: min(self.end() + 1, self.total)])
