"""Where a point lies among the nodes of a grid, and how work is split."""

from collections.abc import Iterator

import numba
import numpy as np
from numba import njit

FAST = {"contract"}  # nothing that assumes away NaN or infinity, nothing that moves a point to another cell
CHUNK = 512
"""Points that one task takes at a time."""

MOST_PARTS = 16
"""Of the points of an exam: each part has rows of its own, of which it touches the planes that its points lie in."""


def parts_for(batch: int, points: int) -> int:
    """In how many parts the points of an exam are taken so that every thread has work of its own."""
    return max(1, min(min(MOST_PARTS, numba.get_num_threads()) // batch, points // CHUNK))


def turns(batch: int) -> Iterator[slice]:
    """The exams of a batch, as many at a time as there are threads: what is packed for them stays in the cache."""
    together = max(1, numba.get_num_threads())
    for first in range(0, batch, together):
        yield slice(first, min(first + together, batch))


@njit(inline="always", fastmath=FAST)
def cell(index, last):
    """Lower node of the cell that holds a place ``index`` in 0 ... ``last``, and the place in the cell, 0 ... 1."""
    node = min(int(index), max(last - 1, 0))
    return node, index - type(index)(node)


@njit(inline="always", fastmath=FAST)
def held(index, last):
    """An index, held in 0 ... ``last``; NaN becomes 0."""
    return min(index, last) if index > 0 else last - last


@njit(inline="always", fastmath=FAST)
def strides_of(shape):
    """Steps in a flattened field to the next node of each axis; 0 along an axis of one node."""
    return shape[1] * shape[2] * (shape[0] > 1), shape[2] * (shape[1] > 1), 1 * (shape[2] > 1)


@njit(inline="always", fastmath=FAST)
def find_cells(points, b, start, stop, shape, node, offset):
    """`cell` of the points ``start`` ... ``stop`` of an exam: flat index of the lowest corner, place in the cell."""
    kind = offset.dtype.type
    for axis in range(3):
        last = kind(shape[axis] - 1)
        half_last = kind(0.5) * last
        highest = np.int32(max(shape[axis] - 2, 0))
        stride = np.int32(shape[1] * shape[2] if axis == 0 else (shape[2] if axis == 1 else 1))
        for n in range(start, stop):
            x = held((points[b, axis, n] + kind(1)) * half_last, last)
            lower = min(np.int32(x), highest)
            offset[axis, n - start] = x - kind(lower)
            node[n - start] = lower * stride + (node[n - start] if axis else np.int32(0))
