"""What a decoding rule is made of: its settings, what it sees of a step, and what it decides. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Ranges of numbers, in words and as a test.
NOT_NEGATIVE = (">= 0", lambda value: 0 <= value < math.inf)
POSITIVE = ("> 0", lambda value: 0 < value < math.inf)
AT_LEAST_ONE = (">= 1", lambda value: value >= 1)
SHARE = ("in (0, 1]", lambda value: 0 < value <= 1)
PROBABILITY = ("in [0, 1]", lambda value: 0 <= value <= 1)
BELOW_ONE = ("in [0, 1)", lambda value: 0 <= value < 1)
_LARGEST = 2**31  # no integer reaches it


@dataclass(frozen=True)
class Setting:
    """A field of the generation config. Whatever its type, `None` is unset."""

    type: type  # bool, int, float or str
    allowed: tuple = (True, False)  # of a number its range, else its values
    help: str = ""  # what it does, in a line
    default: object = None  # what unset means

    def refusal(self, name: str, value) -> str:
        """What is wrong with a value, or ""."""
        if value is None:
            return ""
        if self.type in (bool, str):
            good = isinstance(value, self.type) and value in self.allowed
            return "" if good else f"`{name}` must be one of {self.allowed}, got {value!r}"
        kind, types = ("an integer", int) if self.type is int else ("a number", (int, float))
        if not isinstance(value, types) or isinstance(value, bool) or not self.allowed[1](value):
            return f"`{name}` must be {kind} {self.allowed[0]}, got {value!r}"
        too_large = self.type is int and value >= _LARGEST
        return f"`{name}` must be below {_LARGEST}, got {value!r}" if too_large else ""


@dataclass
class Step:
    """Where a block of w columns stands in the R rows at work, which have N open positions together."""

    rows: torch.LongTensor  # [R]
    masked: torch.LongTensor  # [R], the block's masks before its first step
    steps: torch.LongTensor  # [R], the block's steps
    index: int  # this step, from 0
    active: torch.BoolTensor  # [R, w], open positions
    decided: torch.BoolTensor  # [R, w], those that were open before
    ids: torch.LongTensor  # [R, w], the tokens now
    logits: torch.FloatTensor  # [N, V], the model's, as positions are ranked by
    read: torch.BoolTensor | None = None  # [R, w], where the logits are of; the open positions where nobody says
    before: torch.LongTensor | None = None  # [R, w], the token before each in its block, or −1; if the rule reads all
    ranked: torch.DoubleTensor | None = None  # [R, w], the higher the sooner, −∞ where not open; if the rule ranks
    late: torch.BoolTensor | None = None  # [R, w], what `eos_policy` puts behind all others; if the rule ranks

    def __post_init__(self):
        self.read = self.active if self.read is None else self.read

    def spread(self, values: torch.Tensor, fill: float) -> torch.DoubleTensor:
        """Values of the positions that were read, `(N,)`, on their places, `(R, w)`."""
        values = values.double()
        return values.new_full(self.read.shape, fill).masked_scatter(self.read, values)


@dataclass
class Decision:
    """What a step does to R rows and w columns of a block."""

    selected: torch.BoolTensor | None = None  # [R, w], open positions that get a token
    tokens: torch.LongTensor | None = None  # [R, w], of the replaced; those of the selected are the sampler's to draw
    reopened: torch.BoolTensor | None = None  # [R, w], decided positions that are masked again
    replaced: torch.BoolTensor | None = None  # [R, w], decided positions that get another token
    rewritten: torch.LongTensor | None = None  # [R, w], all ids afterwards, masks being open; in place of the above
    origin: torch.LongTensor | None = None  # [R, w], with `rewritten`: the column that each stood in, −1: it is new
    finished: torch.BoolTensor | None = None  # [R], the rows whose block is done; of rules that say so themselves


@dataclass(frozen=True)
class Rule:
    """A way to decide. Fields of the generation config, their checks, options and documentation follow from it."""

    help: str  # what a step commits, in a few words
    source: str  # who says so
    # From a step and the sampler; `None` is the share of `commit_schedule` alone.
    function: Callable[[Step, object], Decision] | None = None
    # Its own fields. The first is its switch: the rule is on where that is set, and the others need it. At most one
    # rule is on, and one that refines it.
    settings: dict[str, Setting] = field(default_factory=dict)
    refines: str | None = None  # the rule that must be on with it, and in whose place it is asked
    check: Callable[[object], str] = lambda settings: ""  # what is wrong with the generation config, or ""
    needs_probability: bool = False  # of the scores
    ranks: bool = True  # it looks at scores, and commits at least the share of `commit_schedule`
    draws: bool = False  # it draws random numbers of its own
    # It takes decisions back: a block has all its steps, be they more than its masks, and an EOS ends a row only after
    # its block.
    revises: bool = False
    reads_all: bool = False  # it gets logits of all that is generated in the block, and says itself when to stop
    # It is asked when a block's masks are gone, and stands beside the rule that decided them: from the sampler and the
    # pad token to the [`Editor`]. It has no function then.
    editor: Callable[[object, object], object] | None = None
    resizes: bool = False  # rows grow and shrink; it stands beside the rule that decides, and has no function
    edit_tokens: bool = False  # it executes `<|delete|>` and `<|insert|>`, which nobody else proposes

    @property
    def beside(self) -> bool:
        """Whether it is on together with a rule that decides."""
        return self.editor is not None or self.resizes

    @property
    def switch(self) -> str | None:
        return next(iter(self.settings), None)
