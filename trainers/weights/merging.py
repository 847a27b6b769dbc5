"""Means of weights: of a run's best evaluated states, and of checkpoints."""

import logging
import math
import os
import shutil
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nanollada.modeling_nanollada.loading_nanollada import is_adapter
from nanollada.trainers.records import read_json, write_json, written_beside

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
# What makes a folder of weights a checkpoint that loads by itself. Records of the run stay behind.
BESIDE_WEIGHTS = (
    "config.json",
    "generation_config.json",
    "*.py",
    "*.jinja",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
)


class MergeCandidates:
    """
    The evaluated states of a run that its top-k merge may need, on disk: `step-N.safetensors` and `index.json`.

    Kept are the k best so far and the k best up to each of the last two checkpoints, so that a run resumed from there
    (from the older one if the newest is damaged) merges what an unbroken one would. Every file appears only when it is
    complete.

    Args:
        folder (`str` or `os.PathLike`): Its own folder.
        k (`int`): States to merge.
        writes (`bool`): Whether this process owns the files; the others only keep count.

    Attributes:
        losses (`dict[int, float]`): `eval_loss` (nats per token) of every evaluated state by its step.
    """

    def __init__(self, folder: str | os.PathLike, k: int, writes: bool = True):
        self.folder, self.k, self.writes = Path(folder), k, writes
        self.losses, self._checkpoints = {}, [0]

    def start(self, step: int):
        """
        Begins at step 0, or goes on after the checkpoint of `step`: what came later is done again, and dropped.

        Raises:
            `ValueError`: if a resumed run has no index or lacks one of its k best states.
        """
        self.losses, self._checkpoints = {}, [step]
        if step:
            self.losses = {at: loss for at, loss in self._read_index().items() if at <= step}
        gone = [at for at in self.best() if not self._path(at).is_file()]
        if gone:
            raise ValueError(
                "`resume_from_checkpoint` must be the newest checkpoint of a run with the same `merge_top_k`, "
                f"got step {step}, and {self._path(gone[0])} is gone"
            )
        self._write()

    def add(self, step: int, loss: float, weights: dict[str, torch.Tensor]):
        """Counts an evaluated state in and keeps its weights if it is among the best."""
        if not math.isfinite(loss):
            logger.warning("The state of step %d cannot be merged: its `eval_loss` is %s", step, loss)
            return
        self.losses[step] = loss
        if self.writes and step in self.best():
            save_whole_tensors(weights, self._path(step))
        self._write()

    def saved(self, step: int):
        """There is a complete checkpoint of `step`: nothing resumes from before the one that preceded it."""
        self._checkpoints = [*self._checkpoints, step][-2:]
        self._write()

    def best(self, until: int | None = None) -> list[int]:
        """Steps of the (at most) k states with the lowest loss, the best first; the earlier one at equal losses."""
        steps = [step for step in self.losses if until is None or step <= until]
        return sorted(steps, key=lambda step: (self.losses[step], step))[: self.k]

    def mean(self) -> dict[str, torch.Tensor]:
        """The mean of the best states, in float64."""
        return mean_of_files([self._path(step) for step in sorted(self.best())])

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step}.safetensors"

    def _read_index(self) -> dict[int, float]:
        path = self.folder / "index.json"
        if not path.is_file():
            raise ValueError(f"`merge_top_k` needs the states evaluated before the checkpoint, got no {path}")
        return {line["step"]: line["eval_loss"] for line in read_json(path)["evaluated"]}

    def _write(self):
        """The index first, then away with what it does not need: a kill in between leaves a file too many."""
        if not self.writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [{"step": step, "eval_loss": loss} for step, loss in sorted(self.losses.items())]
        write_json(self.folder / "index.json", {"best": self.best(), "evaluated": lines})
        needed = {self._path(step) for until in (None, *self._checkpoints) for step in self.best(until)}
        for file in set(self.folder.glob("step-*.safetensors*")) - needed:
            file.unlink()


def merge_checkpoints(folders: list[str | os.PathLike], output: str | os.PathLike | None = None) -> dict:
    """
    The parameter mean of checkpoints (WSM; LLaDA2.0, "Top-k checkpoint merge"), summed in float64.

    Merges `model.safetensors`, which in a run's `checkpoint-N` are the raw weights, also with an `ema_decay`.

    Args:
        folders (`list[str]`): Checkpoints of one model, at least two.
        output (`str`, *optional*): New folder for a complete checkpoint: the mean, and the first folder's config,
            tokenizer and code. Appears only when it is complete.

    Returns:
        `dict[str, torch.Tensor]`: The mean by tensor name, float32.

    Raises:
        `ValueError`: for fewer than two folders, for one without config or weights, for configs or tensors (names,
            shapes, dtypes) that differ, and for an `output` that is not empty.
    """
    folders = [Path(folder) for folder in folders]
    if len(folders) < 2:
        raise ValueError(f"`folders` must name at least two checkpoints, got {len(folders)}")
    with nullcontext() if output is None else new_folder(output) as folder:
        _check_configs(folders)
        mean = mean_of_files([folder / WEIGHTS for folder in folders])
        mean = {name: tensor.float() for name, tensor in mean.items()}
        if folder is not None:
            _write_checkpoint(mean, folders[0], folder)
    return mean


@contextmanager
def new_folder(output: str | os.PathLike):
    """
    A folder for the body to fill, which then takes its place: one that exists is whole.

    Raises:
        `ValueError`: for an `output` that is not empty.
    """
    output = Path(output).resolve()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"`output` must be new or empty, got {output}")
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, output)  # onto nothing or an empty folder
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def mean_of_files(paths: list[Path]) -> dict[str, torch.Tensor]:
    """
    The mean of safetensors files, tensor by tensor, in float64.

    Raises:
        `ValueError`: naming the file and the first tensor that it lacks, that only it has, or that has another shape
            or dtype than in the first file.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, "pt")) for path in paths]
        slices = [{name: file.get_slice(name) for name in file.keys()} for file in files]
        layouts = [{name: (part.get_shape(), part.get_dtype()) for name, part in own.items()} for own in slices]
        for path, layout in zip(paths, layouts, strict=True):
            _check_layout(path, layout, paths[0], layouts[0])
        return {name: sum(file.get_tensor(name).double() for file in files) / len(files) for name in layouts[0]}


def save_whole_tensors(weights: dict[str, torch.Tensor], path: Path) -> None:
    """Writes a safetensors file that appears only when it is complete."""
    tensors = {name: weight.detach().contiguous() for name, weight in weights.items()}
    with written_beside(path) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})


def _check_layout(path: Path, layout: dict, first_path: Path, first_layout: dict) -> None:
    for name in sorted(layout | first_layout):
        theirs, first = _describe(layout.get(name)), _describe(first_layout.get(name))
        if theirs != first:
            raise ValueError(f"{path}: {name} must be as in {first_path} ({first}), got {theirs}")


def _describe(entry: tuple | None) -> str:
    return "missing" if entry is None else f"shape {entry[0]}, dtype {entry[1]}"


def _check_configs(folders: list[Path]) -> None:
    configs = []
    for folder in folders:
        for name in ("config.json", WEIGHTS):
            if not (folder / name).is_file():
                one = (
                    ", which holds an adapter (merge each with its model first)" if is_adapter(folder) else " without"
                )
                raise ValueError(f"`folders` must hold checkpoints with {name}, got {folder}{one}")
        config = read_json(folder / "config.json")
        configs.append({name: value for name, value in config.items() if name != "transformers_version"})
    for folder, config in zip(folders, configs, strict=True):
        odd = [name for name in sorted(config | configs[0]) if config.get(name) != configs[0].get(name)]
        if odd:
            theirs, first = config.get(odd[0]), configs[0].get(odd[0])
            raise ValueError(f"{folder}: `{odd[0]}` must be as in {folders[0]} ({first}), got {theirs}")


def _write_checkpoint(weights: dict[str, torch.Tensor], source: Path, folder: Path) -> None:
    for file in {file for pattern in BESIDE_WEIGHTS for file in source.glob(pattern) if file.is_file()}:
        shutil.copyfile(file, folder / file.name)
    write_json(folder / "config.json", read_json(source / "config.json") | {"dtype": "float32"})
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
