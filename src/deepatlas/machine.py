"""Two habits of processors and C libraries that cost a training more than half of its time, put right."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_GIB = 1 << 30


@contextmanager
def denormals_are_zero() -> Iterator[None]:
    """Air is exactly 0 in most of a batch, and its gradients would be denormal numbers, slow by a factor of 3."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def keep_freed_memory() -> bool:
    """Ask glibc to reuse the memory of freed tensors rather than to return and fetch it page by page.

    A step frees and allocates tensors of tens of MB by the hundred; fresh pages cost a third of it. It holds for the
    whole process and leaves the peak as it is, so trainings ask for it and nothing else does.

    Returns:
        Whether it was done: elsewhere than on glibc there is nothing to ask.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, 2 * _GIB - 1), mallopt(_M_TOP_PAD, _GIB // 16)])
