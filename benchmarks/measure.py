"""Measuring: interleaved repeats, peak memory, and what the machine can do at best."""

import ctypes
import gc
import statistics
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from deepatlas.kernels_cpu.memory import forget_results

MIB = 1 << 20


class Row(NamedTuple):
    """One line of the table."""

    row: str
    ours_s: float | None
    reference_s: float | None
    ratio: float | None
    """reference / ours, except in the rows named `step_share_*`: ours / reference, a share."""
    memory_ratio: float | None = None
    """Peak memory of the reference over ours."""
    bound_fraction: float | None = None
    """Time that the bytes or the operations need at the machine's measured rates, over ours."""
    note: str = ""


def interleaved(*runs: Callable[[], object], repeats: int = 5, seconds: float = 60.0) -> list[float]:
    """Median seconds of each run; they take turns, so that a busy machine slows them alike.

    Each is called once before, to compile and to warm its caches. Stops early once ``seconds`` are spent, after at
    least two turns.
    """
    for run in runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    began = time.perf_counter()
    for turn in range(repeats):
        if turn > 1 and time.perf_counter() - began > seconds:
            break
        for run, spent in zip(runs, times, strict=True):
            _wait()
            start = time.perf_counter()
            run()
            _wait()
            spent.append(time.perf_counter() - start)
    return [statistics.median(spent) for spent in times]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(run: Callable[[], object]) -> int:
    """The most memory a call held above what was held before: of the process, or of the GPU where there is one."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        _wait()
        return torch.cuda.max_memory_allocated() - before
    forget_results()
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).malloc_trim(0)
    with _Watch() as watch:
        run()
    return watch.most - watch.before


class _Watch:
    """Samples the resident memory of the process every millisecond."""

    def __enter__(self) -> "_Watch":
        self.before = self.most = _resident()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        return self

    def _sample(self) -> None:
        while not self.over.wait(0.001):
            self.most = max(self.most, _resident())

    def __exit__(self, *_) -> None:
        self.most = max(self.most, _resident())
        self.over.set()
        self.thread.join()


def _resident() -> int:
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@cache
def copy_bytes_per_second() -> float:
    """Bytes read plus bytes written per second by a copy of 256 MiB."""
    source = torch.ones(64 * MIB, device=device())
    target = torch.empty_like(source)
    (seconds,) = interleaved(lambda: target.copy_(source), repeats=7)
    return 2 * source.numel() * 4 / seconds


@cache
def operations_per_second() -> float:
    """Float32 operations per second of a product of two 2048² matrices."""
    a, b = (torch.randn(2048, 2048, device=device()) for _ in range(2))
    (seconds,) = interleaved(lambda: a @ b, repeats=7)
    return 2 * 2048**3 / seconds


def bound_seconds(values: float, operations: float = 0.0) -> float:
    """The least time for reading and writing so many float32 values and doing so many operations."""
    return max(4 * values / copy_bytes_per_second(), operations / operations_per_second())


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
