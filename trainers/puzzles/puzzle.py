"""What a puzzle is: how problems are drawn, what a right answer is, and on which side of a split problems stand."""

import hashlib
import random
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field

TEST_SHARE = 0.1
DRAWS = 10_000  # in vain, before the problems count as used up


@dataclass(frozen=True)
class Option:
    """What an option of a puzzle may be."""

    rule: str
    holds: Callable[[object], bool]


def whole(low: int, high: int) -> Option:
    """A whole number within bounds, both included."""
    return Option(f"a whole number from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


@dataclass(frozen=True)
class Puzzle:
    """
    A kind of problem; [`~trainers.puzzles.registry.PUZZLES`] has them all.

    Args:
        name (`str`): Under which programs and suites know it.
        help (`str`): One line.
        draw (`Callable`): `draw(rng, **options)` makes a row with "prompt", "answer" and the columns that `verify`
            reads; `draw(rng, side, **options)` if `has_sides`.
        verify (`Callable`): `verify(row, answer)`, whether an answer (stripped) is right. Any right one is, malformed
            ones are just wrong.
        columns (`Callable`): `columns(row)`, what `verify` reads of a row that somebody else wrote; a `ValueError`
            names what is wrong with it.
        has_form (`Callable`): `has_form(row, answer)`, whether an answer (stripped) looks like one, right or wrong.
        share (`Callable`, *optional*): `share(row, answer)`, how much of an answer is right, from 0 to 1 of a right
            one. For answers of parts.
        options (`dict[str, Option]`): Of `draw`.
        has_sides (`bool`, defaults to `False`): Whether `draw` itself keeps training and test problems apart.
            Otherwise the prompt's text decides.
    """

    name: str
    help: str
    draw: Callable[..., dict]
    verify: Callable[[dict, str], bool]
    columns: Callable[[dict], dict]
    has_form: Callable[[dict, str], bool]
    share: Callable[[dict, str], float] | None = None
    options: dict[str, Option] = field(default_factory=dict)
    has_sides: bool = False

    def make_rows(
        self, count: int, seed: int, side: str = "test", unlike: Container[str] = (), /, **options
    ) -> list[dict]:
        """
        Different problems of one side, the same ones for the same arguments.

        Args:
            count (`int`): How many.
            seed (`int`): Of the draws.
            side (`str`, defaults to `"test"`): "test" or "train". No problem is on both.
            unlike (`Container[str]`): Prompts of problems that are left out; all others are drawn as without.
            options: Of the puzzle.

        Raises:
            `ValueError`: for a `count` below 1, options that the puzzle does not have or that are out of range, and if
                there are fewer such problems than `count`, or too few to be found.
        """
        if side not in ("test", "train"):
            raise ValueError(f"`side` must be 'test' or 'train', got {side!r}")
        if count < 1:
            raise ValueError(f"`rows` must be at least 1, got {count}")
        self.check_options(options)
        rows = {}
        for row in self._drawn(random.Random(f"{seed}/{self.name}/{side}"), side, options):
            if row["prompt"] not in unlike:
                rows[row["prompt"]] = row
            if len(rows) == count:
                return list(rows.values())
        left = f"the {side} problems of {self.name} with {options}{' that are left' if unlike else ''}"
        raise ValueError(f"`rows` must not exceed {left}, got {count}")

    def check_options(self, options: dict) -> None:
        """
        Raises:
            `ValueError`: for options that the puzzle does not have or that are out of range.
        """
        for name, value in options.items():
            if name not in self.options:
                known = ", ".join(self.options)
                raise ValueError(f"`{name}` must be an option of {self.name} ({known}), got {value!r}")
            if not self.options[name].holds(value):
                raise ValueError(f"`{name}` must be {self.options[name].rule}, got {value!r}")

    def _drawn(self, rng: random.Random, side: str, options: dict) -> Iterator[dict]:
        """Problems of the side, until so many draws in a row have given nothing new."""
        seen, vain = set(), 0
        sides = (side,) if self.has_sides else ()
        while vain < DRAWS:
            row = self.draw(rng, *sides, **options)
            right_side = self.has_sides or side_of(row["prompt"]) == side
            vain = vain + 1 if row["prompt"] in seen or not right_side else 0
            seen.add(row["prompt"])
            if not vain:
                yield row


def needed(row: dict, name: str):
    """A column of somebody's row, which must be there."""
    if row.get(name) is None:
        raise ValueError(f"missing field: `{name}`")
    return row[name]


def side_of(prompt: str) -> str:
    """The side of a problem, "test" or "train", by its text alone."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") < TEST_SHARE * 2**64 else "train"
