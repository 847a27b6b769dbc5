"""What the kinds of tasks share: a task, a row, the model under test, an outcome, and what a kind's entry says."""

import re
import types
import typing
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict, validated_field

from nanollada.trainers.data.files import BadRow, DataError
from nanollada.trainers.data.formats import checked_text
from nanollada.trainers.scoring.kind import is_diffusion

# ---- settings: a dataclass whose types and rules are checked, in words and by tests

WORDS = {str: "a string", bool: "true or false", int: "a whole number", dict: "a mapping"}
WORDS[dict[str, str]] = "a mapping of names to names"


def setting(default: Any, rule: str, fits: Callable[[Any], bool]) -> Any:
    """A field of a task whose values have a rule beside their type, in words and as a test; `None` is unset."""

    def validate(value):
        if value is not None and not fits(value):
            raise ValueError(rule)

    given = {"default_factory": default.copy} if isinstance(default, dict) else {"default": default}
    return validated_field(validate, metadata={"rule": rule}, **given)


def whole(low: int, default: int | None = None) -> Any:
    """A field of whole numbers from `low` on."""
    return setting(default, f"a whole number from {low} on", lambda value: value >= low)


def one_of(names: typing.Iterable[str], default: str | None = None) -> Any:
    """A field of names."""
    return setting(default, f"one of {', '.join(names)}", lambda value: value in names)


def mapping(**default) -> Any:
    """A field of a mapping."""
    return field(default_factory=default.copy)


def default_of(item: Field) -> Any:
    """The value of a setting that is not given."""
    return item.default if item.default_factory is MISSING else item.default_factory()


def rule_of(item: Field) -> str:
    """What a setting must be, in words: its own rule, or its type's."""
    if "rule" in item.metadata:
        return item.metadata["rule"]
    parts = typing.get_args(item.type)
    kind = parts[0] if types.NoneType in parts else item.type  # of an optional one
    return WORDS[kind] if kind in WORDS else f"one of {', '.join(typing.get_args(kind))}"


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


OF_DATA = ("data_split", "data_config", "columns", "match", "template")


def settings(cls: type) -> type:
    """A dataclass whose fields are checked by type and rule whenever they are set: what a kind of task may say."""
    return strict(dataclass(cls))


@settings
class Task:
    """One entry of a suite's `tasks`; a kind of task adds its own settings."""

    name: str  # of letters, digits, `_`, `-`, `.`; a file's name, too
    kind: str
    language: Literal["en", "zh"] | None = None  # how contexts and answers are joined and compared
    data: str | None = None  # file, glob, folder or name of a dataset; none where the rows are made
    data_split: str | None = None  # by default "train"
    data_config: str | None = None  # by default the dataset's only one
    columns: dict[str, str] | None = None  # this protocol's names to the data's
    match: str | None = setting(None, "a regular expression", _is_pattern)  # of the JSON of the rows that are used
    limit: int | None = whole(1)  # at most so many rows, evenly spread over all of them

    needs_data: ClassVar[bool] = True

    @classmethod
    def own(cls) -> dict[str, Field]:
        """The settings that this kind has beside those of every task."""
        return {item.name: item for item in fields(cls) if item.name not in Task.__dataclass_fields__}

    def complete(self, given: dict, wrong: Callable[[str, str, Any], ValueError]) -> None:
        """
        What follows from other settings, and what they contradict.

        Args:
            given (`dict`): The task as the suite has it.
            wrong (`Callable`): Makes the error of a setting, a rule and a value.
        """
        if self.data is not None:
            return
        if self.needs_data:
            raise wrong("data", "given", None)
        if idle := [name for name in OF_DATA if name in given]:
            raise wrong(idle[0], "left out where there is no `data`", given[idle[0]])

    def settings(self) -> dict:
        """What the results depend on beside model and data: all but what is nothing, and is so by default."""
        kept = {}
        for item in fields(self):
            value, default = getattr(self, item.name), default_of(item)
            nothing = value is None or (value == default and default in ("", {}))
            if not nothing and item.name not in ("name", "kind", "language", "data"):
                kept[item.name] = value
        return kept


# ---- rows


@dataclass(frozen=True)
class Row:
    """One row as it was read, its place (file and 1-based row), and what a check made of it."""

    source: str
    number: int
    values: dict

    def error(self, reason: str) -> DataError:
        return DataError(f"{self.source}, row {self.number}: {reason}")

    @contextmanager
    def faults(self):
        """Within it, what is wrong is of this row."""
        try:
            yield
        except (ValueError, BadRow) as error:
            raise self.error(str(error)) from error

    def text(self, name: str) -> str:
        """
        A column that must be a text.

        Raises:
            `DataError`: naming file and row, for one that is missing, empty, no string or no Unicode.
        """
        if name not in self.values:
            raise self.error(f"missing field: `{name}`; there are {', '.join(sorted(self.values))}")
        return self.string(name, self.values[name])

    def string(self, name: str, value: Any) -> str:
        """As `text`, of a value that stands deeper in the row."""
        with self.faults():
            return checked_text(value, name, False)


@dataclass(frozen=True)
class Planned:
    """A task, its checked rows and the digest of its data."""

    task: Task
    rows: list[Row]
    digest: str | None

    @property
    def source(self) -> str:
        """What `data` says in a result."""
        puzzle = getattr(self.task, "puzzle", None)
        made = f"puzzle: {puzzle}" if puzzle else "no data"
        return self.task.data if self.task.data is not None else made


# ---- a model, and what came of it


@dataclass
class Bench:
    """A model under test, of `load_checkpoint`, and how it is tested."""

    model: Any
    tokenizer: Any
    samples: int = 128  # Monte Carlo masks per scored text of a diffusion model, even
    seed: int = 0  # of the masks, and of whatever is drawn
    batch_size: int = 16
    judge: tuple | None = None  # a causal model and its tokenizer
    progress: Callable[[int], Any] = field(default=lambda count: None)  # is told how many rows were done

    @property
    def is_diffusion(self) -> bool:
        return is_diffusion(self.model)

    def noise(self, task: Task) -> dict:
        """What `score_rows` and `score_continuations` get for the masks."""
        block_length = task.eval_block_length if self.is_diffusion else None  # AR has none
        return {"samples": self.samples, "seed": self.seed, "block_length": block_length}

    def require_room(self, row: Row, tokens: int, what: str) -> None:
        """Raises a `DataError` for what is longer than the model's positions; nothing is cut."""
        most = self.model.config.max_position_embeddings
        if tokens > most:
            raise row.error(f"{what} must fit into `max_position_embeddings`, got {tokens} tokens and {most}")


@dataclass
class Outcome:
    """The figures of a task, a record of each row, and the settings that decided them beside the task's own."""

    results: list[dict]
    records: list[dict]
    settings: dict = field(default_factory=dict)


# ---- a kind of task


@dataclass(frozen=True)
class Metric:
    """A figure of a kind: what it means, its unit, and whether the plot has it."""

    definition: str
    unit: str = "share"
    drawn: bool = True

    @property
    def digits(self) -> int:
        """Behind the point, in a table."""
        return 3 if self.unit.startswith(("bits", "nats", "s/")) else 2


@dataclass(frozen=True)
class Kind:
    """All that the suite knows of a kind of task."""

    title: str  # of its table
    task: type[Task]  # its settings
    check_row: Callable[[Row, Task], dict]  # from a row as it was read to what `run` needs
    run: Callable[[Bench, Task, list[Row]], Outcome]
    metrics: dict[str, Metric]  # what it may give
    make_rows: Callable[[Task, int], list[dict]] | None = None  # of a task without `data`, from a seed
    steps: Callable[[Task, list[Row]], int | None] = lambda task, rows: len(rows)  # units of work; None: unknown
    # (context, answer) of the rows, for the check of the bounds' errors; answers of these sizes count
    short: Callable[[Bench, Task, list[Row], range], list[tuple[list[int], list[int]]]] | None = None
    scored: bool = False  # by likelihoods, with masks for a diffusion model
    judged: bool = False  # the judge has a part in its figures
    timed: bool = False  # the machine has a part in its figures
    diffusion_only: bool = False  # AR models have no settings for it
    may_repeat: bool = False  # a row may be there twice
