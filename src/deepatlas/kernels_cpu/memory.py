"""Memory that is used again: fresh pages cost a kernel as much as its arithmetic.

glibc hands large arrays back to the system as soon as they are freed and fetches new pages for the next one.
"""

import threading
import weakref

import numpy as np

_KEPT = threading.local()
_MOST_KEPT = 2**26
"""Bytes of one piece of working memory that a thread keeps for the next call."""

_RETURNED: dict[int, list[np.ndarray]] = {}
_MOST_RETURNED = 2**27
"""Bytes of results that nobody holds any more and that are kept for the next ones."""


def working_memory(use: str, shape: tuple[int, ...], dtype) -> np.ndarray:
    """An array of whatever numbers, valid until this thread asks again for the same use."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    held = getattr(_KEPT, use, None)
    if held is None or held.size < size:
        held = np.empty(size, np.uint8)
        if size <= _MOST_KEPT:
            setattr(_KEPT, use, held)
    return held[:size].view(dtype).reshape(shape)


def result_array(shape: tuple[int, ...], dtype) -> np.ndarray:
    """An array of whatever numbers, for a result: its memory is used again once nobody holds it, nor a view of it."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if not size:
        return np.empty(shape, dtype)
    waiting = _RETURNED.get(size)
    try:
        memory = waiting.pop() if waiting else np.empty(size, np.uint8)
    except IndexError:  # another thread was faster
        memory = np.empty(size, np.uint8)
    lent = _Lent(memory, shape, np.dtype(dtype))
    weakref.finalize(lent, _take_back, memory).atexit = False
    return np.asarray(lent)


def forget_results() -> None:
    """Give the kept memory of results back."""
    _RETURNED.clear()


class _Lent:
    """What an array, and every view of it, holds of its memory. An array in this place would not do: NumPy lets a view
    hold the last array below it."""

    def __init__(self, memory: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> None:
        place = memory.ctypes.data, False
        self.__array_interface__ = {"shape": shape, "typestr": dtype.str, "data": place, "version": 3}


def _take_back(memory: np.ndarray) -> None:
    if sum(size * len(waiting) for size, waiting in list(_RETURNED.items())) + memory.size <= _MOST_RETURNED:
        _RETURNED.setdefault(memory.size, []).append(memory)
