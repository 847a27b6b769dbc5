"""Averages of weights: the exponential moving average of a run, and the mean of its best states or of checkpoints."""

import json
import logging
import math
import os
import shutil
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from nanollada.trainers.resuming.trainer import ResumingTrainer

logger = logging.getLogger(__name__)

EMA_FILE = "ema.safetensors"
MERGE_FOLDER = "merge"
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


class ExponentialMovingAverage:
    """
    The exponential moving average of all parameters: `average ← decay · average + (1 − decay) · weights`.

    It begins at the weights it is made from, without bias correction: after n updates these still count `decay**n`, so
    that 1 / (1 − decay) should be well below the number of steps. Tied weights are averaged once; buffers (constants
    in nanollada's models) are not averaged.

    Args:
        model (`torch.nn.Module`): Where the average begins.
        decay (`float`): In [0, 1); 0 is the weights themselves.

    Attributes:
        weights (`dict[str, torch.Tensor]`): The average by parameter name, in float32 or the model's wider dtype.
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        self._update = get_ema_multi_avg_fn(decay)
        self.weights = {
            name: parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
            for name, parameter in model.named_parameters()
        }

    @torch.no_grad()
    def update(self, model: torch.nn.Module):
        """Counts the model's present weights in."""
        pairs = [(self.weights[name], parameter) for name, parameter in model.named_parameters()]
        averages = [average for average, _ in pairs]
        self._update(averages, [parameter.to(average.dtype) for average, parameter in pairs], None)

    @contextmanager
    def in_place_of(self, model: torch.nn.Module):
        """
        The model computes with the average inside, with its own weights, bit for bit, afterwards.

        Values are copied into the parameters, whose identity and address optimizer, DDP and compiled code rely on.
        """
        own = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        try:
            copy_weights(model, self.weights)
            yield
        finally:
            copy_weights(model, own)

    def save(self, folder: str | os.PathLike):
        """Writes `ema.safetensors`; the file appears only when it is complete."""
        save_atomically(self.weights, Path(folder) / EMA_FILE)

    def load(self, folder: str | os.PathLike):
        """
        Goes on from the average in a checkpoint.

        Raises:
            `ValueError`: if it has no `ema.safetensors`, and if that holds other tensors than this average.
        """
        path = Path(folder) / EMA_FILE
        if not path.is_file():
            raise ValueError(f"`ema_decay` needs the average in the checkpoint, got no {EMA_FILE} in {path.parent}")
        found = load_file(path)
        layout, expected = _layout(found), _layout(self.weights)
        if layout != expected:
            odd = sorted(name for name in layout | expected if layout.get(name) != expected.get(name))
            raise ValueError(f"{path} must hold the average of this model's parameters, got a difference in {odd[0]}")
        for name, average in self.weights.items():
            average.copy_(found[name])


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
            save_atomically(weights, self._path(step))
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
        return {line["step"]: line["eval_loss"] for line in json.loads(path.read_text())["evaluated"]}

    def _write(self):
        """The index first, then away with what it does not need: a kill in between leaves a file too many."""
        if not self.writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [{"step": step, "eval_loss": loss} for step, loss in sorted(self.losses.items())]
        path = self.folder / "index.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"best": self.best(), "evaluated": lines}, indent=2) + "\n")
        os.replace(partial, path)
        needed = {self._path(step) for until in (None, *self._checkpoints) for step in self.best(until)}
        for file in set(self.folder.glob("step-*.safetensors*")) - needed:
            file.unlink()


class _AveragingCallback(TrainerCallback):
    """Tells the trainer of steps and checkpoints."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.start_averaging(state)

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer.ema is not None and not self.trainer.accelerator.optimizer_step_was_skipped:
            self.trainer.ema.update(self.trainer.plain_model)

    def on_save(self, args, state, control, **kwargs):
        if self.trainer.candidates is not None:
            self.trainer.candidates.saved(state.global_step)


class AveragingTrainer(ResumingTrainer):
    """
    Trainer with `args.ema_decay` and `args.merge_top_k`.

    With an average, whatever leaves the training uses it: evaluation, `save_model`, the states to merge and, with
    `load_best_model_at_end`, the best model, whose average comes back with its weights. Training itself, and
    `model.safetensors` in a `checkpoint-N`, keep the raw weights; their average lies beside them in `ema.safetensors`.

    Raises:
        `ValueError`: for FSDP and DeepSpeed with either, and for resuming from a checkpoint that lacks the average, or
            has one that `ema_decay` of 0 would drop.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.ema, self.candidates = None, None
        if not self.args.ema_decay and not self.args.merge_top_k:
            return
        sharded = {"FSDP": self.is_fsdp_enabled, "DeepSpeed": self.is_deepspeed_enabled}
        for name in (name for name, enabled in sharded.items() if enabled):
            raise ValueError(f"`ema_decay` and `merge_top_k` need whole weights on every rank, got {name}")
        if self.args.merge_top_k:
            folder = Path(self.args.output_dir) / MERGE_FOLDER
            self.candidates = MergeCandidates(folder, self.args.merge_top_k, self.args.process_index == 0)
        self.add_callback(_AveragingCallback(self))

    @property
    def plain_model(self) -> torch.nn.Module:
        """The model without the wrappers of ranks and compilation."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def averaged_weights(self):
        """Context in which the model computes with the average, if there is one."""
        return nullcontext() if self.ema is None else self.ema.in_place_of(self.plain_model)

    def start_averaging(self, state):
        """Begins both averages, or goes on with them, before the first step."""
        if state.global_step == 0 and self.args.ema_decay:
            self.ema = ExponentialMovingAverage(self.plain_model, self.args.ema_decay)
        if self.candidates is not None:
            check_evaluations(self.args, state.max_steps, state.num_train_epochs)
            self.candidates.start(state.global_step)

    def offer_for_merge(self, loss: float):
        """A candidate for the merge: the weights that were just evaluated in training."""
        if self.candidates is None or not self.control.should_evaluate:  # also called by hand, and before training
            return
        with self.averaged_weights():
            self.candidates.add(self.state.global_step, loss, dict(self.plain_model.named_parameters()))

    def final_evaluation(self, rows) -> dict:
        """
        Scores what `save_model` will save; with `merge_top_k` that is the merge, which the model then holds.

        Args:
            rows (`Sequence[dict]`, *optional*): Held-out rows; needed for a merge.

        Returns:
            `dict`: For `run.json`: `evaluation` and, with `merge_top_k`, `merge` with `k` (states that were merged),
                their `steps` and `eval_losses`, and `evaluation_last`, of the weights at the end of training.
        """
        evaluation = self.likelihood(rows).to_dict() if rows is not None else None
        if self.candidates is None:
            return {"evaluation": evaluation}
        steps = self.candidates.best()
        losses = [self.candidates.losses[step] for step in steps]
        merge = {"k": len(steps), "steps": steps, "eval_losses": losses, "evaluation_last": evaluation}
        if len(steps) < self.candidates.k:
            logger.warning("`merge_top_k` of %d found only %d evaluated states", self.candidates.k, len(steps))
        if not steps:
            return {"evaluation": evaluation, "merge": merge}
        self._load_merge()
        return {"evaluation": self.likelihood(rows).to_dict(), "merge": merge}

    def _load_merge(self):
        """The first rank has the files; the others get the weights from it."""
        self.ema = None
        if self.candidates.writes:
            copy_weights(self.plain_model, self.candidates.mean())
        if self.args.world_size > 1:
            for parameter in self.plain_model.parameters():
                torch.distributed.broadcast(parameter.data, 0)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """Saves the weights that evaluation sees; the checkpoints of a run hold the raw ones."""
        checkpoint = _internal_call and output_dir is not None
        with nullcontext() if checkpoint else self.averaged_weights():
            super().save_model(output_dir, _internal_call)

    def begin_checkpoint(self, folder: Path):
        """The average comes first; the manifest, which makes the checkpoint complete, last."""
        super().begin_checkpoint(folder)
        if self.ema is not None:
            self.ema.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint, *args, **kwargs):
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        if self.args.ema_decay:
            self.ema = ExponentialMovingAverage(self.plain_model, self.args.ema_decay)
            self.ema.load(resume_from_checkpoint)
        elif (Path(resume_from_checkpoint) / EMA_FILE).is_file():
            raise ValueError(f"`ema_decay` must be > 0 to resume from a checkpoint with {EMA_FILE}, got 0")

    def _load_best_model(self):
        super()._load_best_model()
        if self.ema is not None:
            self.ema.load(self.state.best_model_checkpoint)


def check_averaging(args) -> None:
    """
    Checks `ema_decay` and `merge_top_k` of training arguments.

    Raises:
        `ValueError`: for values out of range; for a merge without evaluation, beside `load_best_model_at_end`, or of
            more states than the run evaluates, where the arguments alone say so.
    """
    if not 0 <= args.ema_decay < 1:
        raise ValueError(f"`ema_decay` must lie in [0, 1), got {args.ema_decay}")
    if args.merge_top_k < 0:
        raise ValueError(f"`merge_top_k` must be >= 0, got {args.merge_top_k}")
    if not args.merge_top_k:
        return
    if args.eval_strategy == IntervalStrategy.NO:
        raise ValueError(f"`merge_top_k` needs `eval_strategy` steps or epoch, got {args.merge_top_k} and no")
    if args.load_best_model_at_end:
        raise ValueError(
            "`merge_top_k` and `load_best_model_at_end` both choose the weights that are saved: give one, "
            f"got {args.merge_top_k} and True"
        )
    check_evaluations(args, args.max_steps, math.ceil(args.num_train_epochs) if args.max_steps <= 0 else math.inf)


def check_evaluations(args, max_steps: int, epochs: float) -> None:
    """
    Compares `merge_top_k` with the number of evaluations in a run of `max_steps` steps (≤ 0: unknown) and `epochs`.

    Raises:
        `ValueError`: if there are certainly fewer.
    """
    if args.eval_strategy == IntervalStrategy.EPOCH:
        evaluations = epochs - max(0, math.ceil(args.eval_delay) - 1)
    elif max_steps > 0:
        every = args.eval_steps if args.eval_steps >= 1 else math.ceil(max_steps * args.eval_steps)
        evaluations = math.ceil(max_steps / every) - max(0, math.ceil(args.eval_delay / every) - 1)  # also at the end
    else:
        return
    if evaluations < args.merge_top_k:
        raise ValueError(
            f"`merge_top_k` must be at most the number of evaluations, {max(0, evaluations)} in this run, "
            f"got {args.merge_top_k}"
        )


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
    output = None if output is None else Path(output).resolve()
    if output is not None and output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"`output` must be new or empty, got {output}")
    _check_configs(folders)
    mean = {name: tensor.float() for name, tensor in mean_of_files([folder / WEIGHTS for folder in folders]).items()}
    if output is not None:
        _write_checkpoint(mean, folders[0], output)
    return mean


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


@torch.no_grad()
def copy_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Copies values into all parameters, rounding them to the parameters' dtype."""
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])


def save_atomically(weights: dict[str, torch.Tensor], path: Path) -> None:
    """Writes a safetensors file that appears only when it is complete."""
    partial = path.with_name(path.name + ".partial")
    tensors = {name: weight.detach().contiguous() for name, weight in weights.items()}
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, path)


def _layout(weights: dict[str, torch.Tensor]) -> dict[str, tuple]:
    return {name: (weight.shape, weight.dtype) for name, weight in weights.items()}


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
                raise ValueError(f"`folders` must hold checkpoints with {name}, got {folder} without")
        config = json.loads((folder / "config.json").read_text("utf-8"))
        configs.append({name: value for name, value in config.items() if name != "transformers_version"})
    for folder, config in zip(folders, configs, strict=True):
        odd = [name for name in sorted(config | configs[0]) if config.get(name) != configs[0].get(name)]
        if odd:
            theirs, first = config.get(odd[0]), configs[0].get(odd[0])
            raise ValueError(f"{folder}: `{odd[0]}` must be as in {folders[0]} ({first}), got {theirs}")


def _write_checkpoint(weights: dict[str, torch.Tensor], source: Path, output: Path) -> None:
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for file in {file for pattern in BESIDE_WEIGHTS for file in source.glob(pattern) if file.is_file()}:
            shutil.copyfile(file, partial / file.name)
        config = json.loads((source / "config.json").read_text("utf-8")) | {"dtype": "float32"}
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        save_file(weights, partial / WEIGHTS, metadata={"format": "pt"})
        os.replace(partial, output)  # onto nothing or an empty folder
    finally:
        shutil.rmtree(partial, ignore_errors=True)
