"""The rows of optimizer step s depend on (seed, s) alone, whatever the ranks, accumulation, workers or interruptions.

A pass over the rows is cut into optimizer steps of batch · accumulation · ranks rows; its last step has the rest. A
data loader asks for (step, micro-batch), and each rank takes its own rows of the step by their place in it. Every rank
has the same number of micro-batches: one without a row for this rank holds a row without targets, and one without a
row for any rank is not computed.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, Sampler

from nanollada.trainers.data.packing import IGNORE

COUNTS = ("documents", "rows", "target_tokens", "bytes", "dropped_tokens", "truncated_rows")


class RowStream(IterableDataset):
    """
    Rows that are read anew at each pass.

    Args:
        read (`Callable`): From a report to the rows of one pass; it counts into the report while they are taken.
        report (`dict`): The caller's. A plain iteration counts into it; a trainer sets it to what its steps have read.
        shuffled (`Sequence`): What the rows come from and has a `set_epoch`: datasets that shuffle anew at each pass.
    """

    def __init__(self, read: Callable[[dict], Iterator[dict]], report: dict[str, Any], shuffled: Sequence = ()):
        self._read, self.report, self._shuffled = read, report, shuffled

    def set_epoch(self, epoch: int) -> None:
        """The pass that is read next."""
        for dataset in self._shuffled:
            dataset.set_epoch(epoch)

    def __iter__(self):
        return self._read(self.report)

    def read(self, counts: dict) -> tuple[Iterator[dict], dict]:
        """The rows of one pass, and a report of its own that goes on from `counts`."""
        report = {**self.report, **counts, "skipped_rows": Counter(counts["skipped_rows"])}
        return self._read(report), report

    def set_counts(self, counts: dict) -> None:
        """Makes the caller's report that of `counts`."""
        self.report.update({**counts, "skipped_rows": Counter(counts["skipped_rows"])})


def counts_of(report: dict | None) -> dict | None:
    """The numbers of a report that grow while a stream is read."""
    if report is None:
        return None
    return {**{name: report[name] for name in COUNTS}, "skipped_rows": dict(report["skipped_rows"])}


@dataclass(frozen=True)
class StepShape:
    """
    How an optimizer step is divided.

    Args:
        batch (`int`): Rows of a micro-batch.
        accumulation (`int`): Micro-batches of a step on each rank.
        rank (`int`), ranks (`int`): This process, and how many there are.
        seed (`int`): Of the rows' order.
        drop_last (`bool`): Whether a pass's last step is left out if it isn't full.
    """

    batch: int
    accumulation: int = 1
    rank: int = 0
    ranks: int = 1
    seed: int = 42
    drop_last: bool = False

    @property
    def rows(self) -> int:
        """Rows of a full step, over all ranks."""
        return self.batch * self.accumulation * self.ranks

    def micro_batches(self, rows: int) -> int:
        """How many micro-batches hold a row of any rank, in a step of so many rows."""
        return -(-rows // (self.batch * self.ranks))

    def share(self, rows: int, micro_batch: int) -> range:
        """This rank's places in a step of so many rows; the micro-batches that no rank has rows for come first."""
        turn = micro_batch - (self.accumulation - self.micro_batches(rows))
        if turn < 0:
            return range(0)
        start = min((turn * self.ranks + self.rank) * self.batch, rows)
        return range(start, min(start + self.batch, rows))


@dataclass(frozen=True)
class Anchor:
    """Where a stream's pass begins: its number, its first optimizer step, and what was counted before it."""

    epoch: int = 0
    step: int = 0
    counts: dict | None = None


@dataclass(frozen=True)
class Window:
    """
    An optimizer step: its number in the run, its pass, its number there, how many rows it has, and whether it is the
    pass's last. Of a stream also what was counted up to it, and where the pass of the next step begins.
    """

    step: int
    epoch: int
    number: int
    rows: int
    last: bool
    counts: dict | None = None
    anchor: Anchor | None = None


@dataclass(frozen=True)
class Share:
    """A rank's part in a micro-batch: how many rows it has, and whether no rank has any."""

    window: Window
    rows: int
    idle: bool


class Steps(Dataset):
    """The rows of a run by optimizer step: `self[step, micro_batch]` is this rank's share and its rows."""

    def __init__(self, rows, shape: StepShape):
        self.rows, self.shape = rows, shape

    def __getitem__(self, key: tuple[int, int]) -> tuple[Share, list[dict]]:
        step, micro_batch = key
        window = self.window(step)
        mine = self.shape.share(window.rows, micro_batch)
        idle = micro_batch < self.shape.accumulation - self.shape.micro_batches(window.rows)
        return Share(window, len(mine), idle), [self.row(window, place) for place in mine or range(1)]

    def window(self, step: int) -> Window:
        """What optimizer step `step` (from 0) consists of."""
        raise NotImplementedError

    def row(self, window: Window, place: int) -> dict:
        """A row of a step, with its `rank` in the pass and its `epoch`, for the noise."""
        raise NotImplementedError

    def sample(self, count: int) -> Iterator[dict]:
        """Up to `count` rows of the first pass, whatever the step and the rank."""
        raise NotImplementedError


def digest_of(rows) -> str:
    """SHA-256 of the tokens and targets of map-style rows, in their order."""
    digest = hashlib.sha256()
    if not hasattr(rows, "with_format"):
        for row in rows:
            digest.update(repr([[int(token) for token in row[name]] for name in ("input_ids", "labels")]).encode())
        return digest.hexdigest()
    for batch in rows.select_columns(["input_ids", "labels"]).with_format("arrow").iter(4096):
        for name in ("input_ids", "labels"):
            column = batch.column(name).combine_chunks()
            for part in (column.value_lengths(), column.flatten()):
                digest.update(part.to_numpy(zero_copy_only=False).astype("int64").tobytes())
    return digest.hexdigest()


def digest_of_columns(dataset) -> str:
    """SHA-256 of the rows of a `datasets.Dataset`, whatever its columns, in their order."""
    digest = hashlib.sha256(repr(dataset.features).encode())
    for batch in dataset.with_format("arrow").iter(4096):
        for column in batch.combine_chunks().columns:
            digest.update(repr(column.to_pylist()).encode())
    return digest.hexdigest()


class PreparedSteps(Steps):
    """
    Of map-style rows: a permutation per pass that depends on (seed, pass) alone.

    Raises:
        `ValueError`: for fewer rows than a step if the last, partial step is left out.
    """

    def __init__(self, rows, shape: StepShape):
        super().__init__(rows, shape)
        self.epoch, self.order = None, None
        self.per_pass = len(rows) // shape.rows if shape.drop_last else -(-len(rows) // shape.rows)
        if not self.per_pass:
            raise _no_full_step(len(rows), shape)

    def __len__(self):
        return len(self.rows)

    def window(self, step):
        epoch, number = divmod(step, self.per_pass)
        rows = min(self.shape.rows, len(self.rows) - number * self.shape.rows)
        return Window(step, epoch, number, rows, number + 1 == self.per_pass)

    def row(self, window, place):
        if self.epoch != window.epoch:
            generator = torch.Generator().manual_seed((self.shape.seed << 20) + window.epoch)
            self.epoch, self.order = window.epoch, torch.randperm(len(self.rows), generator=generator)
        rank = window.number * self.shape.rows + place
        return {**self.rows[int(self.order[rank])], "rank": rank, "epoch": window.epoch}

    def sample(self, count):
        total = len(self.rows)
        return (self.rows[place * total // min(count, total)] for place in range(min(count, total)))


class StreamedSteps(Steps):
    """
    Of a stream, in its own order; every rank reads all of it and takes its rows. A row's rank is its `index`.

    Raises:
        `ValueError`: when a pass has no rows (or none that fill a step, if partial steps are left out).
    """

    def __init__(self, rows, shape: StepShape):
        super().__init__(rows, shape)
        self.beginning = Anchor(counts=counts_of(getattr(rows, "report", None)))
        self.start(self.beginning)

    def start(self, anchor: Anchor) -> None:
        """Reads from the beginning of a pass on; a step behind it is reached by reading."""
        self.anchor, self._reader, self._window, self._step_rows = anchor, None, None, []

    def __getstate__(self):  # a worker reads for itself
        return {**self.__dict__, "_reader": None, "_window": None, "_step_rows": []}

    def window(self, step):
        if step < self.anchor.step:
            self.start(self.beginning)
        if self._reader is None or step < self._window.step:
            self._reader = self._windows()
            self._window, self._step_rows = next(self._reader)
        while self._window.step < step:
            self._window, self._step_rows = next(self._reader)
        return self._window

    def row(self, window, place):
        row = self._step_rows[place]
        return {**row, "rank": row["index"], "epoch": window.epoch}

    def sample(self, count):
        return islice(self._open(self.beginning)[0], count)

    def _windows(self) -> Iterator[tuple[Window, list[dict]]]:
        anchor = self.anchor
        while True:
            for window, rows in self._pass(anchor):
                yield window, rows
            anchor = window.anchor

    def _pass(self, anchor: Anchor) -> Iterator[tuple[Window, list[dict]]]:
        size, drop_last = self.shape.rows, self.shape.drop_last
        source, report = self._open(anchor)
        rows, step, last = list(islice(source, size)), anchor.step, False
        if len(rows) < (size if drop_last else 1):
            raise _no_full_step(len(rows), self.shape)
        while not last:
            counts = counts_of(report)
            following = list(islice(source, size))
            last = len(following) < (size if drop_last else 1)
            if last:
                counts = counts_of(report)  # with what the pass's end has dropped
            after = Anchor(anchor.epoch + 1, step + 1, counts) if last else anchor
            yield Window(step, anchor.epoch, step - anchor.step, len(rows), last, counts, after), rows
            rows, step = following, step + 1

    def _open(self, anchor: Anchor) -> tuple[Iterator[dict], dict | None]:
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(anchor.epoch)
        if isinstance(self.rows, RowStream):
            return self.rows.read(anchor.counts)
        return iter(self.rows), None


def _no_full_step(rows: int, shape: StepShape) -> ValueError:
    if shape.drop_last:
        return ValueError(f"`dataloader_drop_last` needs {shape.rows} rows for a full step, got {rows} in a pass")
    return ValueError(f"`train_dataset` must hold rows, got {rows} in a pass")


class MicroBatches(Sampler):
    """
    Keys of a data loader: the micro-batches of a pass, or without `per_pass` those of every step to come.

    Args:
        accumulation (`int`): Micro-batches of a step.
        per_pass (`int`, *optional*): Steps of a pass.
    """

    def __init__(self, accumulation: int, per_pass: int | None):
        self.accumulation, self.per_pass, self.first = accumulation, per_pass, 0

    def begin(self, step: int) -> None:
        """Turns to the pass of a step."""
        self.first = step // self.per_pass * self.per_pass if self.per_pass else 0

    def __len__(self):
        if self.per_pass is None:
            raise TypeError("a stream has no length")
        return self.per_pass * self.accumulation

    def __iter__(self):
        step = self.first
        while self.per_pass is None or step < self.first + self.per_pass:
            yield from ([(step, micro_batch)] for micro_batch in range(self.accumulation))
            step += 1


@dataclass
class StepCollator:
    """
    From one item of `Steps` to a batch, with the `Share` under `share`.

    A rank without rows gets a row of another without its targets, and with an `attention_mask` of zeros, so that it
    counts no tokens.

    Args:
        collate (`Callable`): Makes a batch of rows.
    """

    collate: Callable[[list[dict]], dict[str, torch.Tensor]] = field()

    def __call__(self, items: list[tuple[Share, list[dict]]]) -> dict[str, Any]:
        ((share, rows),) = items
        batch = dict(self.collate(rows))
        if missing := [name for name in ("input_ids", "labels") if name not in batch]:
            raise ValueError(f"`data_collator` must return {missing[0]!r}, got {sorted(batch)}")
        for name in {"index", "rank", "epoch"} & rows[0].keys():  # of the noise, which a collator need not know
            batch.setdefault(name, torch.tensor([int(row[name]) for row in rows]))
        if not share.rows:
            batch["labels"] = torch.full_like(batch["labels"], IGNORE)
            batch["attention_mask"] = torch.zeros_like(batch["labels"])
        return {**batch, "share": share}
