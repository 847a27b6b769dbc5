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
    """
    A field of the generation config. Whatever its type, `None` is unset.

    Args:
        type (`type`): `bool`, `int`, `float` or `str`.
        allowed (`tuple`): Of a number its range, else its values.
        help (`str`): What it does, in a line.
        default (*optional*): What unset means.
    """

    type: type
    allowed: tuple = (True, False)
    help: str = ""
    default: object = None

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
    """
    Where a block of w columns stands in the R rows at work, which have N open positions together.

    Args:
        rows, masked, steps (`torch.LongTensor` of shape `(R,)`): The rows, their masks of the block before its first
            step, and their steps.
        index (`int`): This step, from 0.
        active, decided (`torch.BoolTensor` of shape `(R, w)`): Open positions, and those that were open before.
        ids (`torch.LongTensor` of shape `(R, w)`): The tokens now.
        logits (`torch.FloatTensor` of shape `(N, vocab_size)`): The model's, as positions are ranked by.
        ranked (`torch.DoubleTensor` of shape `(R, w)`, *optional*): Scores, the higher the sooner; −∞ where nothing is
            open. `None` for a rule that ranks nothing.
        late (`torch.BoolTensor` of shape `(R, w)`, *optional*): What `eos_policy` puts behind all others.
    """

    rows: torch.LongTensor
    masked: torch.LongTensor
    steps: torch.LongTensor
    index: int
    active: torch.BoolTensor
    decided: torch.BoolTensor
    ids: torch.LongTensor
    logits: torch.FloatTensor
    ranked: torch.DoubleTensor | None = None
    late: torch.BoolTensor | None = None

    def spread(self, values: torch.Tensor, fill: float) -> torch.DoubleTensor:
        """Values of the open positions, `(N,)`, on their places, `(R, w)`."""
        values = values.double()
        return values.new_full(self.active.shape, fill).masked_scatter(self.active, values)


@dataclass
class Decision:
    """
    What a step does to R rows and w columns of a block. From the sampler all parts are tensors.

    Args:
        selected (`torch.BoolTensor` of shape `(R, w)`): Open positions that get a token.
        tokens (`torch.LongTensor` of shape `(R, w)`): The tokens of what is selected or replaced. A rule leaves those
            of `selected` to the sampler, which draws them.
        reopened, replaced (`torch.BoolTensor` of shape `(R, w)`): Decided positions that are masked again, and those
            that get another token.
    """

    selected: torch.BoolTensor
    tokens: torch.LongTensor | None = None
    reopened: torch.BoolTensor | None = None
    replaced: torch.BoolTensor | None = None


@dataclass(frozen=True)
class Rule:
    """
    A way to decide. Fields of the generation config, their checks, options and documentation follow from the entries.

    Args:
        help, source (`str`): What a step commits, in a few words, and who says so.
        function (`Callable`, *optional*): From a [`Step`] and the [`Sampler`] to a [`Decision`]. `None`: the share of
            `commit_schedule` alone.
        settings (`dict[str, Setting]`): Its own fields. The first is its switch: the rule is on where that is set, and
            the others need it. At most one rule is on, and one that refines it.
        refines (`str`, *optional*): The rule that must be on with it, and in whose place it is asked.
        check (`Callable`): From the generation config to what is wrong with it, or "".
        needs_probability (`bool`): Scores must be probabilities.
        ranks (`bool`): It looks at scores, and commits at least the share of `commit_schedule`.
        draws (`bool`): It draws random numbers of its own.
        revises (`bool`): It takes decisions back: a block has all its steps, be they more than its masks, and an EOS
            ends a row only after its block.
    """

    help: str
    source: str
    function: Callable[[Step, object], Decision] | None = None
    settings: dict[str, Setting] = field(default_factory=dict)
    refines: str | None = None
    check: Callable[[object], str] = lambda settings: ""
    needs_probability: bool = False
    ranks: bool = True
    draws: bool = False
    revises: bool = False

    @property
    def switch(self) -> str | None:
        return next(iter(self.settings), None)
