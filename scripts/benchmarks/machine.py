"""What a machine can do, and processes of their own to measure in."""

import os
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}


def in_fresh_process(function: Callable, **arguments):
    """
    The result of `function(**arguments)` in a process of its own: its memory is its own, and nothing is warm.

    Args:
        function (`Callable`): Of a module's top level. Arguments and result must survive pickling.

    Raises:
        `RuntimeError`: if the process fails, from what it raised.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_without_bars) as pool:
        try:
            return pool.submit(function, **arguments).result()
        except Exception as error:
            raise RuntimeError(f"{function.__module__}:{function.__name__} failed for {arguments}: {error}") from error


def _without_bars() -> None:
    os.environ["TQDM_DISABLE"] = "1"


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
    from torch.utils.benchmark import Timer

    size = size or MATMUL_SIZE[device]
    rates = {}
    for dtype, name in PRECISIONS.items():
        first, second = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
        timer = Timer("first @ second", globals=locals(), num_threads=threads or torch.get_num_threads())
        timer.timeit(1)  # the first product is slower
        rates[name] = 2 * size**3 / timer.adaptive_autorange(min_run_time=seconds, max_run_time=4 * seconds).median
    return rates
