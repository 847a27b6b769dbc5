"""Whole checkpoints: a manifest of every file, written last, and what is read of it before a run goes on."""

import json
import logging
import os
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from nanollada.trainers.records import file_digest, flush, write_json

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "trainer_state.json"
# What a run can't go on without, as patterns of transformers' layouts: one process or DDP, FSDP, DeepSpeed.
NEEDED = {
    "model.safetensors": ("model*.safetensors", "adapter_model.safetensors", "pytorch_model*", "global_step*"),
    "optimizer.pt": ("optimizer.pt", "optimizer*.bin", "optimizer_*", "global_step*"),
    "scheduler.pt": ("scheduler.pt", "global_step*"),
    "rng_state.pth": ("rng_state*.pth",),
    STATE: (STATE,),
}


def write_manifest(folder: str | os.PathLike, step: int) -> None:
    """
    Ends a checkpoint: all of its files go to the disk, then `manifest.json` with their sizes and SHA-256.

    The manifest appears only when it is complete, so that a folder with one was written to its end.
    """
    folder = Path(folder)
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST and path.suffix != ".partial":
            flush(path)
            files[name] = {"size": path.stat().st_size, "sha256": file_digest(path)}
    write_json(folder / MANIFEST, {"step": step, "files": files})


def was_finished(folder: Path) -> bool:
    """Whether a checkpoint was once written to its end, as far as can be seen; else a kill cut its writing off."""
    return (folder / MANIFEST).exists() or _json_fault(folder / STATE) is None


def fault_of(folder: str | os.PathLike, needed: tuple[str, ...] = tuple(NEEDED)) -> str | None:
    """
    What is wrong with a checkpoint: its first missing or broken file and why, or `None` if it is whole.

    With a manifest every file must have its size and its SHA-256. One of an older nanollada has none: its files must
    be there and open (archives with their own checksums, safetensors with their lengths). `needed` are the names, of
    `NEEDED`, of what a checkpoint must hold at least.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return "there is no such folder"
    manifest = folder / MANIFEST
    fault = _manifest_fault(folder) if manifest.exists() else _json_fault(folder / STATE)
    if fault:
        return fault
    for name in needed:
        if not any(True for pattern in NEEDED[name] for _ in folder.glob(pattern)):
            return f"{name} is missing"
    return None if manifest.exists() else _reading_fault(folder)


def _manifest_fault(folder: Path) -> str | None:
    fault = _json_fault(folder / MANIFEST)
    if fault:
        return fault
    content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all({"size", "sha256"} <= set(entry) for entry in files.values()):
        return f"{MANIFEST} is broken (it doesn't list files with `size` and `sha256`)"
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["size"]:
            return f"{name} is broken ({path.stat().st_size} of {entry['size']} bytes)"
    for name, entry in files.items():  # sizes first: they cost nothing
        if file_digest(folder / name) != entry["sha256"]:
            return f"{name} is broken (its SHA-256 is not the one that was written)"
    return None


def _json_fault(path: Path) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{path.name} is broken ({error})"
    return None


def _reading_fault(folder: Path) -> str | None:
    for path in sorted([*folder.glob("*.pt"), *folder.glob("*.pth"), *folder.glob("*.safetensors")]):
        try:
            damaged = _read(path)
        except (OSError, SafetensorError, zipfile.BadZipFile) as error:
            return f"{path.name} is broken ({error})"
        if damaged:
            return f"{path.name} is broken (the checksum of {damaged} is wrong)"
    return None


def _read(path: Path) -> str | None:
    """Opens a file of tensors; of torch's archives it returns the first part with a wrong checksum."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt"):
            return None
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


def checkpoints_of(folder: str | os.PathLike) -> list[Path]:
    """All `checkpoint-N` of a run, whole or not, the newest first."""
    paths = [path for path in Path(folder).glob("checkpoint-*") if path.is_dir()]
    return sorted((path for path in paths if step_of(path) is not None), key=step_of, reverse=True)


def step_of(path: str | os.PathLike) -> int | None:
    """The step in a checkpoint's name, or `None`."""
    number = Path(path).name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() else None


def rotate_checkpoints(newest: Path, limit: int | None, best: str | None) -> None:
    """
    Deletes checkpoints of a run until `limit` are left: first those of later steps, which the run has gone back from,
    then the oldest. By the steps in their names: a folder's time is not reliable on every file system.

    Args:
        newest (`Path`): The one just written, which stays.
        limit (`int`, *optional*): None or 0: all stay.
        best (`str`, *optional*): The one with the best model, which stays, too.
    """
    others = [path for path in checkpoints_of(newest.parent) if path != newest and path != Path(best or newest)]
    kept = 2 if best and Path(best) != newest and Path(best).is_dir() else 1
    others.sort(key=lambda path: (step_of(path) < step_of(newest), step_of(path)))
    for path in others[: max(len(others) + kept - limit, 0)] if limit else []:
        shutil.rmtree(path, ignore_errors=True)


def last_complete_checkpoint(folder: str | os.PathLike) -> str | None:
    """
    The newest whole checkpoint of a run, or `None`. Those passed over are named in the log, with the reason.

    Raises:
        `ValueError`: if none is whole, and one was damaged after it was written: a run that starts anew would hide it.
    """
    faults = {}
    for path in checkpoints_of(folder):
        fault = fault_of(path)
        if fault is None:
            if faults:
                logger.warning("%s is the newest whole checkpoint of %s", path.name, folder)
            if not (path / MANIFEST).exists():
                logger.warning(
                    "%s has no %s (an older nanollada wrote it): its files open, their bytes are not checked",
                    path,
                    MANIFEST,
                )
            return str(path)
        faults[path] = fault
        logger.warning("%s is passed over: %s", path, fault)
    damaged = [f"{path.name}: {fault}" for path, fault in faults.items() if was_finished(path)]
    if damaged:
        raise ValueError(
            f"`output_dir` must hold a whole checkpoint to go on from, got {folder} with {'; '.join(damaged)}"
        )
    return None


def check_checkpoint(folder: str | os.PathLike) -> None:
    """
    Checks a checkpoint that was asked for by name.

    Raises:
        `ValueError`: naming the folder, the file, and what is wrong with it.
    """
    fault = fault_of(folder)
    if fault:
        raise ValueError(f"`resume_from_checkpoint` must be a whole checkpoint, got {folder}: {fault}")
