"""What every written record shares: files that are whole, strict JSON, digests, and how a figure came about.

`write_whole` and `write_json` leave no half file under the final name; `provenance` says command, hardware, versions.
"""

import hashlib
import json
import math
import os
import platform
import shlex
import sys
import uuid
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from nanollada.trainers.commands.programs import CONSOLE, PROGRAMS, ROOT, is_console, name_of, recorded_command


def flush(path: Path) -> None:
    """Waits until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def written_beside(path: str | os.PathLike):
    """
    A path for the body to write a file to. It then takes the file's place, on the disk: a file that exists is whole,
    after a kill and after a power cut. Its folder is made. Its name is nobody else's: the last of two processes that
    write one file wins.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        flush(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    if os.name == "posix":
        flush(path.parent)


def write_whole(path: str | os.PathLike, text: str) -> None:
    """A text file, see `written_beside`."""
    with written_beside(path) as partial:
        partial.write_bytes(text.encode())


def write_json(path: str | os.PathLike, value, indent: int = 2) -> None:
    """A whole file of strict JSON."""
    write_whole(path, strict_json(value, indent=indent, ensure_ascii=False) + "\n")


def strict_json(value, **kwargs) -> str:
    """JSON that strict readers take: `json.dumps` with `null` for numbers that are not finite."""
    return json.dumps(_finite(value), allow_nan=False, **kwargs)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: str | os.PathLike) -> dict:
    """
    A file's JSON object.

    Raises:
        `ValueError`: naming the file, if it is not there or holds no JSON object.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be a JSON file: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def file_digest(file: str | os.PathLike) -> str:
    """SHA-256 of a file."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def command() -> str:
    """The command of this process, for its figures: that of a program of ours, else a file's name and the words."""
    path, words = Path(sys.argv[0]), sys.argv[1:]
    if is_console():
        return shlex.join([CONSOLE, *words])
    file = path.resolve()
    file = file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else None
    if file in {program.file for program in PROGRAMS.values()}:
        return recorded_command(name_of(file), words)
    return shlex.join([path.name, *words])


def hardware() -> str:
    """One line on what this process runs on."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    return f"CPU, {platform.machine()}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    return {name: version(name) for name in ("nanollada", "torch", "transformers", "accelerate", "datasets", "trl")}


def provenance() -> dict:
    """`command`, `hardware` and `versions` of this process."""
    return {"command": command(), "hardware": hardware(), "versions": versions()}
