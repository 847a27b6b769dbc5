"""Records how a text comes about, forward pass by forward pass."""

import math
import time
from collections import Counter
from collections.abc import Iterator

from transformers.generation.streamers import BaseStreamer

ABSENT = -1  # a place of an AR row that nothing was written to yet
DECIDED, EDITS = "decided", ("edited", "masked again", "removed", "added")  # what a step does to a token
NOTHING = "`trace` must have recorded a `generate` call, got one without a forward pass"


class StepRecorder(BaseStreamer):
    """
    A streamer that keeps what each forward pass decided; for one `generate` call with one row, AR or diffusion.

    It asks for no confidence, which costs the model another softmax per step: for calls that are timed.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's.

    Attributes:
        prompt (`list[int]`): Token ids of the prompt, masks included.
        start (`list[int]`): The row before the first forward pass.
        ids (`list[int]`): The row as it is now, undecided places as mask tokens.
        when (`list[int]`): Of each column the forward pass, from 1, that decided its token; 0: none did.
        steps (`list[list[tuple[int, int]]]`): For each forward pass (column, token id) of what it changed.
        moves (`list[list[int] | None]`): For each forward pass that moved tokens the column in which each column's
            stood before, −1 for a mask that came in; what it changed, it changed afterwards.
        counts (`list[Counter]`): For each forward pass how many tokens it did what to: `DECIDED`, and `EDITS`.
        confidence (`list[dict[int, float]]`): For each forward pass, by column, the largest probability of what was
            open in it; empty of an AR model, and where nobody asked for it ([`TraceRecorder`] does).
        seconds (`list[float]`): For each forward pass the seconds since this object was made: make it right before
            `generate` is called.
        kept (`int`): Columns of the row that are final. When generation has ended, later ones are no part of the text.
        ended (`bool`): Whether it has.

    Raises:
        `ValueError`: for a batch of several rows.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.started = time.perf_counter()
        self.prompt: list[int] | None = None
        self.start: list[int] = []
        self.ids: list[int] = []
        self.when: list[int] = []
        self.steps: list[list[tuple[int, int]]] = []
        self.moves: list[list[int] | None] = []
        self.counts: list[Counter] = []
        self.confidence: list[dict[int, float]] = []
        self.seconds: list[float] = []
        self.pending: list[float] = []  # the confidence of the step whose draft comes next
        self.moved: list[int] = []  # where its columns stood
        self.kept = 0
        self.is_diffusion = False
        self.ended = False

    def put(self, value):
        """The prompt, then finished columns: of an AR model one per forward pass."""
        ids = _single_row(value)
        if self.prompt is None:
            self.prompt, self.start, self.ids, self.when = ids, ids, list(ids), [0] * len(ids)
            mask = self.tokenizer.mask_token_id
            self.kept = ids.index(mask) if mask in ids else len(ids)
            return
        if not self.is_diffusion:
            self.kept = len(self.ids)
            self._change(self.kept, ids)
        self.kept += len(ids)

    def put_moves(self, value):
        """Of the columns of the draft that comes next the one that each stood in before; −1: a mask that came in."""
        self.moved = _single_row(value)

    def put_draft(self, value):
        """The undecided end of the row, or more of it, after each denoising step."""
        ids = _single_row(value)
        if not self.is_diffusion:
            self.is_diffusion = True
            width = max(self.moved) + 1 if self.moved else self.kept + len(ids)  # a draft reaches to the last column
            self.ids += [self.tokenizer.mask_token_id] * (width - len(self.ids))
            self.start, self.when = list(self.ids), [0] * width
        self._change(self.kept, ids)

    def end(self):
        """What was put is all that counts."""
        self.ended = True

    def _change(self, start: int, ids: list[int]) -> None:
        mask, counts = self.tokenizer.mask_token_id, Counter()
        known = {column: value for column, value in enumerate(self.pending, start) if not math.isnan(value)}
        moves = [*range(start), *self.moved] if self.moved else None
        if moves is not None:
            counts = +Counter(removed=len(set(range(len(self.ids))) - set(moves)), added=moves.count(-1))
            self.ids, self.when = moved(self.ids, moves, mask), moved(self.when, moves, 0)
            known = {column: known[old] for column, old in enumerate(moves) if old in known}
        missing = start + len(ids) - len(self.ids)
        self.ids, self.when = self.ids + [ABSENT] * missing, self.when + [0] * missing
        changes = [(column, new) for column, new in enumerate(ids, start) if new != self.ids[column]]
        for column, new in changes:
            counts[_effect(self.ids[column], new, mask)] += 1
            self.when[column] = len(self.steps) + 1 if new != mask else 0
        self.ids[start:] = ids
        self.confidence.append(known)
        self.moves.append(moves)
        self.counts.append(counts)
        self.pending, self.moved = [], []
        self.seconds.append(time.perf_counter() - self.started)
        self.steps.append(changes)  # last: who looks on from another thread counts these

    @property
    def decided(self) -> int:
        """Tokens that were decided and kept; one that was replaced is one."""
        return sum(when > 0 for when in self.when[: self.kept])

    @property
    def tokens_per_forward(self) -> float:
        """Tokens kept, by forward passes; 0.0 before the first."""
        return self.decided / max(len(self.steps), 1)

    def edits(self, step: int | None = None) -> dict[str, int]:
        """How often each of `EDITS` was done up to a step, by default the last; what was not is left out."""
        total = sum(self.counts[:step], Counter())
        return {name: total[name] for name in EDITS if total[name]}

    def newest(self, step: int) -> set[int]:
        """Columns that a step, from 1, changed."""
        moves = self.moves[step - 1] or []
        return {column for column, _ in self.steps[step - 1]} | {i for i, old in enumerate(moves) if old < 0}

    def caption(self, step: int) -> str:
        """`2 decided, 1 edited`: what a step, from 1, did."""
        counts = self.counts[step - 1]
        return ", ".join(f"{counts[name]} {name}" for name in (DECIDED, *EDITS) if counts[name]) or "no change"

    def rows(self) -> Iterator[list[int]]:
        """The row before the first forward pass and after each; columns not written to yet are −1."""
        steps = list(self.steps)  # before the length: `generate` may be at work in another thread
        ids = list(self.start)
        if not self.is_diffusion:
            ids += [ABSENT] * (len(self.ids) - len(ids))
        yield list(ids)
        for changes, moves in zip(steps, self.moves, strict=False):
            ids = ids if moves is None else moved(ids, moves, self.tokenizer.mask_token_id)
            for column, token in changes:
                ids[column] = token
            yield list(ids)


class TraceRecorder(StepRecorder):
    """A [`StepRecorder`] that also keeps the model's confidence in what is open, for pages that show it."""

    def put_confidence(self, value):
        """Of the columns of the draft that comes next the largest probability, NaN where nothing was open."""
        self.pending = _single_row(value)


def moved(values: list, moves: list[int], fill) -> list:
    """Values by column, after [`StepRecorder`]'s `moves`; `fill` in what came in."""
    return [fill if old < 0 else values[old] for old in moves]


def _effect(old: int, new: int, mask: int) -> str:
    if new == mask:
        return "masked again"
    return DECIDED if old in (mask, ABSENT) else "edited"


def _single_row(value) -> list:
    if value.dim() > 1 and value.shape[0] > 1:
        raise ValueError(f"a trace shows one row: `input_ids` must have batch size 1, got {value.shape[0]}")
    return value.reshape(-1).tolist()
