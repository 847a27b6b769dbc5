"""Records how a text comes about, forward pass by forward pass."""

import math
import time
from collections.abc import Iterator

from transformers.generation.streamers import BaseStreamer

ABSENT = -1  # a place of an AR row that nothing was written to yet
NOTHING = "`trace` must have recorded a `generate` call, got one without a forward pass"


class StepRecorder(BaseStreamer):
    """
    A streamer that keeps what each forward pass decided; for one `generate` call with one row, AR or diffusion.

    It asks for no confidence, which costs the model another softmax per step: for calls that are timed.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's.

    Attributes:
        prompt (`list[int]`): Token ids of the prompt, masks included.
        ids (`list[int]`): The row as it is now, undecided places as mask tokens.
        steps (`list[list[tuple[int, int]]]`): For each forward pass (column, token id) of what it changed.
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
        self.ids: list[int] = []
        self.steps: list[list[tuple[int, int]]] = []
        self.confidence: list[dict[int, float]] = []
        self.seconds: list[float] = []
        self.pending: list[float] = []  # the confidence of the step whose draft comes next
        self.kept = 0
        self.is_diffusion = False
        self.ended = False

    def put(self, value):
        """The prompt, then finished columns: of an AR model one per forward pass."""
        ids = _single_row(value)
        if self.prompt is None:
            self.prompt, self.ids = ids, list(ids)
            mask = self.tokenizer.mask_token_id
            self.kept = ids.index(mask) if mask in ids else len(ids)
            return
        if not self.is_diffusion:
            self.kept = len(self.ids)
            self._change(self.kept, ids)
        self.kept += len(ids)

    def put_draft(self, value):
        """The undecided end of the row, or more of it, after each denoising step."""
        ids = _single_row(value)
        if not self.is_diffusion:
            self.is_diffusion = True
            new = self.kept + len(ids) - len(self.ids)  # a draft reaches to the row's last column
            self.ids += [self.tokenizer.mask_token_id] * new
        self._change(len(self.ids) - len(ids), ids)

    def end(self):
        """What was put is all that counts."""
        self.ended = True

    def _change(self, start: int, ids: list[int]) -> None:
        old = self.ids[start:] + [ABSENT] * (start + len(ids) - len(self.ids))
        changes = [(start + i, new) for i, (was, new) in enumerate(zip(old, ids, strict=True)) if was != new]
        known = enumerate(self.pending, start=start)
        self.ids[start:] = ids
        self.confidence.append({column: value for column, value in known if not math.isnan(value)})
        self.pending = []
        self.seconds.append(time.perf_counter() - self.started)
        self.steps.append(changes)  # last: who looks on from another thread counts these

    @property
    def decided(self) -> int:
        """Tokens that were decided and kept."""
        columns = {column for changes in self.steps for column, _ in changes if column < self.kept}
        return sum(self.ids[column] != self.tokenizer.mask_token_id for column in columns)

    @property
    def tokens_per_forward(self) -> float:
        """Tokens kept, by forward passes; 0.0 before the first."""
        return self.decided / max(len(self.steps), 1)

    def rows(self) -> Iterator[list[int]]:
        """The row before the first forward pass and after each; columns not written to yet are −1."""
        fill = self.tokenizer.mask_token_id if self.is_diffusion else ABSENT
        steps = list(self.steps)  # before the length: `generate` may be at work in another thread
        ids = self.prompt + [fill] * (len(self.ids) - len(self.prompt))
        yield list(ids)
        for changes in steps:
            for column, token in changes:
                ids[column] = token
            yield list(ids)


class TraceRecorder(StepRecorder):
    """A [`StepRecorder`] that also keeps the model's confidence in what is open, for pages that show it."""

    def put_confidence(self, value):
        """Of the columns of the draft that comes next the largest probability, NaN where nothing was open."""
        self.pending = _single_row(value)


def _single_row(value) -> list:
    if value.dim() > 1 and value.shape[0] > 1:
        raise ValueError(f"a trace shows one row: `input_ids` must have batch size 1, got {value.shape[0]}")
    return value.reshape(-1).tolist()
