"""Measures what this machine makes of the package; every figure with its spread, beside what the hardware can do.

python scripts/benchmark.py train --data rows.jsonl --size 32m --max_length 256
python scripts/benchmark.py generate --model checkpoint --ar_model its_twin --score_data answers.jsonl

`--help` after the command lists its options.
"""

import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMANDS = {"train": "nanollada.scripts.benchmarks.training", "generate": "nanollada.scripts.benchmarks.decoding"}
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}


def in_fresh_process(function: str, **arguments) -> dict:
    """
    The result of `function(**arguments)` in a process of its own: its memory is its own, and nothing is warm.

    Args:
        function (`str`): `module:name`. Arguments and result must survive JSON.

    Raises:
        `RuntimeError`: if the process fails, with the end of what it wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        job = json.dumps({"function": function, "arguments": arguments, "result": str(result)})
        command = [sys.executable, "-m", "nanollada.scripts.benchmarks.machine", "call", job]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TQDM_DISABLE": "1"})
        if done.returncode:
            raise RuntimeError(f"{function} failed for {arguments}:\n{done.stderr[-3000:]}")
        return json.loads(result.read_text())


def _call(job: str) -> None:
    job = json.loads(job)
    module, name = job["function"].split(":")
    found = getattr(importlib.import_module(module), name)(**job["arguments"])
    Path(job["result"]).write_text(json.dumps(found))


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest of repeated measurements."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def device_name() -> str:
    """ "cuda" where there is a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize(device: str) -> None:
    """Waits until a GPU has done what it was told."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory(device: str) -> int:
    """
    Bytes at the peak of this process: of the GPU's tensors, or of resident memory.

    Raises:
        `RuntimeError`: for resident memory where there is no `/proc` (`ru_maxrss` would count the parent's).
    """
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        raise RuntimeError("peak memory is read from /proc/self/status, which this system does not have")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def matmul_rates(device: str, threads: int | None = None, size: int | None = None, seconds: float = 1.0) -> dict:
    """
    FLOP/s of a large square product on this device, the ceiling that shares are taken of.

    Args:
        device (`str`): "cpu" or "cuda".
        threads (`int`, *optional*): CPU threads; torch's default otherwise.
        size (`int`, *optional*): Rows and columns; 2,048 on the CPU, 8,192 on a GPU.
        seconds (`float`, defaults to 1.0): How long each precision is measured.

    Returns:
        `dict[str, float]`: the median of products of random matrices, by "fp32" (on a GPU without TF32) and "bf16".
    """
    import torch

    if threads:
        torch.set_num_threads(threads)
    size = size or MATMUL_SIZE[device]
    rates = {}
    for dtype, name in PRECISIONS.items():
        first, second = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
        times, end = [], time.perf_counter() + seconds
        while time.perf_counter() < end or len(times) < 4:
            synchronize(device)
            start = time.perf_counter()
            first @ second
            synchronize(device)
            times.append(time.perf_counter() - start)
        rates[name] = 2 * size**3 / statistics.median(times[1:])
    return rates


def main(argv: list[str] | None = None):
    """Hands over to the command that the first argument names, and returns what it returns."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["call"]:
        return _call(argv[1])
    if argv[:1] == ["--help"] or argv[:1] == ["-h"]:
        return print(__doc__)
    if not argv or argv[0] not in COMMANDS:
        raise SystemExit(f"the first argument must be one of {', '.join(COMMANDS)}, got {argv[0] if argv else 'none'}")
    return importlib.import_module(COMMANDS[argv[0]]).main(argv[1:])


if __name__ == "__main__":
    main()
