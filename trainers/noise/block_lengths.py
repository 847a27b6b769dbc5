"""The block length over a run: LLaDA 2.0's warm-up, stable and decay phases (2512.15745, §3) as a list of pairs."""

import json
import math
from collections.abc import Sequence


class BlockLengthSchedule:
    """
    Phases of a run, each with its block length: `[[0.1, 1], [0.1, 4], [0.1, 32], [0.4, 0], [0.3, 32]]`.

    The block length is a function of the share of the run's optimizer steps that is done, so a resumed run goes on
    where it was. Rows of pretraining are full, so a share of steps is that share of the run's tokens.

    Args:
        phases (`Sequence` or `str`): Pairs of a share of the run and a block length (0: the whole row), or their JSON.
            The shares sum to 1.

    Raises:
        `ValueError`: for anything else.
    """

    def __init__(self, phases: Sequence | str):
        if isinstance(phases, str):
            try:
                phases = json.loads(phases)
            except ValueError as error:
                raise ValueError(f"`block_length_schedule` must be JSON, got {phases!r}") from error
        self.phases = [self._checked(phase) for phase in phases]
        total = math.fsum(share for share, _ in self.phases)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"`block_length_schedule` must have shares that sum to 1, got {total:g}")

    @staticmethod
    def _checked(phase) -> tuple[float, int]:
        pair = isinstance(phase, Sequence) and len(phase) == 2 and all(isinstance(x, (int, float)) for x in phase)
        if not pair or not 0 < phase[0] <= 1 or phase[1] != int(phase[1]) or phase[1] < 0:
            raise ValueError(
                "`block_length_schedule` must hold pairs of a share in (0, 1] and a block length >= 0 (0: the whole "
                f"row), got {phase!r}"
            )
        return float(phase[0]), int(phase[1])

    def at(self, step: int, max_steps: int) -> int:
        """The block length of the optimizer step that follows `step` finished ones."""
        end = 0.0
        for share, block_length in self.phases:
            end += share
            if step < round(end * max_steps):
                return block_length
        return self.last

    @property
    def last(self) -> int:
        """The block length that the run ends with."""
        return self.phases[-1][1]
