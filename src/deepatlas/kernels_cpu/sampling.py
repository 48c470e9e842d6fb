"""The trilinear sampler and its adjoint; see `deepatlas.grid.sample`."""

import numpy as np
from numba import njit, prange

from deepatlas.kernels_cpu.cells import CHUNK, FAST, find_cells, parts_for, strides_of, turns
from deepatlas.kernels_cpu.lanes import (
    buffers_of,
    first,
    load,
    load_pair,
    meet,
    rows_of,
    second,
    store,
    store_products,
    unpack,
)
from deepatlas.kernels_cpu.memory import result_array


def sample(field: np.ndarray, shape: tuple[int, int, int], points: np.ndarray, parts: int | None = None) -> np.ndarray:
    """Trilinear values of ``field`` at ``points``: (batch, channel, point).

    The points of an exam are split among ``parts`` threads, and each packs the planes of the field that it comes to.
    """
    if shape[2] == 1:  # every node needs one after it
        return sample(np.repeat(field, 2, axis=2), (*shape[:2], 2), points, parts)
    out = result_array((*field.shape[:2], points.shape[2]), field.dtype)
    for some in turns(len(points)):
        split = parts or parts_for(len(field[some]), points.shape[2])
        met = np.zeros((split, len(field[some]), shape[0]), bool)
        _sample(field[some], shape, points[some], rows_of(split, field[some]), met, out[some])
    return out


def sample_backward(
    field: np.ndarray,
    shape: tuple[int, int, int],
    points: np.ndarray,
    grad: np.ndarray,
    want_field: bool,
    want_points: bool,
    parts: int | None = None,
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Adjoint of `sample`: gradients to the field and to the points, each None where it is not wanted.

    No two parts write to the same buffer.
    """
    batch, channels, nodes = field.shape
    if shape[2] == 1:
        given = np.repeat(field, 2, axis=2), (*shape[:2], 2), points, grad
        to_field, to_points = sample_backward(*given, want_field, want_points, parts)
        return None if to_field is None else to_field.reshape(batch, channels, nodes, 2).sum(axis=3), to_points
    grad_field = result_array(field.shape, field.dtype) if want_field else None
    grad_points = result_array(points.shape if want_points else (batch, 3, 0), field.dtype)
    for some in turns(batch):
        exams = len(field[some])
        split = parts or parts_for(exams, points.shape[2])
        rows = rows_of(split, field[some] if want_points else field[some, :, :0])
        buffers = buffers_of(split, exams, channels, nodes if want_field else 0, field.dtype)
        met = np.zeros((split, exams, shape[0]), bool)
        given = field[some], shape, points[some], grad[some], grad_points[some]
        _sample_backward(*given, rows, buffers, met, want_points, want_field)
        if want_field:
            unpack(buffers, met, grad_field[some])
    return grad_field, grad_points if want_points else None


@njit(parallel=True, fastmath=FAST, cache=True)
def _sample(field, shape, points, rows, met, out):
    step_i, step_j, _ = strides_of(shape)
    plane = shape[1] * shape[2]
    count, parts = points.shape[2], met.shape[0]
    length = (count + parts - 1) // parts
    for task in prange(points.shape[0] * parts):
        b, part = task // parts, task % parts
        stored = rows[part % len(rows), b]
        node, offset = np.empty(CHUNK, np.int32), np.empty((3, CHUNK), rows.dtype)
        values = np.empty((CHUNK,) + rows.shape[4:], rows.dtype)  # noqa: RUF005 (Numba)
        lanes = values.reshape(CHUNK, -1)
        for start in range(part * length, min((part + 1) * length, count), CHUNK):
            stop = min(start + CHUNK, (part + 1) * length, count)
            find_cells(points, b, start, stop, shape, node, offset)
            meet(met[part, b], node, stop - start, plane, field[b], stored, stored, True, False)
            for group in range(len(stored)):
                f = stored[group]
                for m in range(stop - start):
                    o, fi, fj, fk = node[m], offset[0, m], offset[1, m], offset[2, m]
                    v00, v01 = load_pair(f, o), load_pair(f, o + step_j)
                    v10, v11 = load_pair(f, o + step_i), load_pair(f, o + step_i + step_j)
                    v0, v1 = v00 + (v01 - v00) * fj, v10 + (v11 - v10) * fj
                    v = v0 + (v1 - v0) * fi
                    store(values, m, first(v) + (second(v) - first(v)) * fk)
                for place in range(min(lanes.shape[1], out.shape[1] - group * lanes.shape[1])):
                    for m in range(stop - start):
                        out[b, group * lanes.shape[1] + place, start + m] = lanes[m, place]


@njit(parallel=True, fastmath=FAST, cache=True)
def _sample_backward(field, shape, points, grad, grad_points, rows, buffers, met, want_points, want_field):
    kind = rows.dtype.type
    step_i, step_j, step_k = strides_of(shape)
    plane = shape[1] * shape[2]
    count, parts = points.shape[2], met.shape[0]
    length = (count + parts - 1) // parts
    for task in prange(points.shape[0] * parts):
        b, part = task // parts, task % parts
        stored, sums = rows[part % len(rows), b], buffers[part, b]
        node, offset = np.empty(CHUNK, np.int32), np.zeros((3, CHUNK), rows.dtype)
        pushed = np.zeros((CHUNK,) + rows.shape[4:], rows.dtype)  # noqa: RUF005 (Numba)
        lanes = pushed.reshape(CHUNK, -1)
        products, work = np.zeros((CHUNK, 8), rows.dtype), np.empty((14, CHUNK), rows.dtype)
        for start in range(part * length, min((part + 1) * length, count), CHUNK):
            stop = min(start + CHUNK, (part + 1) * length, count)
            find_cells(points, b, start, stop, shape, node, offset)
            meet(met[part, b], node, stop - start, plane, field[b], stored, sums, want_points, want_field)
            for group in range(len(stored)):
                for place in range(min(lanes.shape[1], grad.shape[1] - group * lanes.shape[1])):
                    for m in range(stop - start):
                        lanes[m, place] = grad[b, group * lanes.shape[1] + place, start + m]
                for place in range(grad.shape[1] - group * lanes.shape[1], lanes.shape[1]):
                    lanes[:, place] = 0
                if want_points:
                    f = stored[group]
                    for m in range(stop - start):
                        o = node[m]
                        v00, v01 = load_pair(f, o), load_pair(f, o + step_j)
                        v10, v11 = load_pair(f, o + step_i), load_pair(f, o + step_i + step_j)
                        store_products(products, m, load(pushed, m), v00, v01, v10, v11)
                    for corner in range(8):
                        for m in range(CHUNK):
                            work[corner, m] = products[m, corner] + (work[corner, m] if group else kind(0))
                if want_field:
                    push(sums[group], node, offset, pushed, stop - start, step_i, step_j, step_k)
            if want_points:
                slopes(work, offset)
                for axis in range(3):
                    half_last = kind(0.5) * kind(shape[axis] - 1)
                    for m in range(stop - start):
                        x = (points[b, axis, start + m] + kind(1)) * half_last
                        moves = (x > kind(0)) & (x < half_last + half_last)
                        grad_points[b, axis, start + m] = work[8 + axis, m] * half_last if moves else kind(0)


@njit(inline="always", fastmath=FAST)
def slopes(work, offset):
    """From eight values at the corners of cells (rows 0 to 7, the last axis slowest) and the places in the cells, the
    derivatives along the axes (rows 8 to 10); one array and a fixed length, or compilers see no vector in it."""
    for axis in range(3):
        for m in range(CHUNK):
            work[11 + axis, m] = offset[axis, m]
    for m in range(CHUNK):
        fi, fj, fk = work[11, m], work[12, m], work[13, m]
        d00, d01 = work[4, m] - work[0, m], work[5, m] - work[1, m]
        d10, d11 = work[6, m] - work[2, m], work[7, m] - work[3, m]
        a00, a01 = work[0, m] + d00 * fk, work[1, m] + d01 * fk
        a10, a11 = work[2, m] + d10 * fk, work[3, m] + d11 * fk
        d0, d1 = d00 + (d01 - d00) * fj, d10 + (d11 - d10) * fj
        e0, e1 = a01 - a00, a11 - a10
        work[8, m] = (a10 - a00) + ((a11 - a01) - (a10 - a00)) * fj
        work[9, m] = e0 + (e1 - e0) * fi
        work[10, m] = d0 + (d1 - d0) * fi


@njit(inline="always", fastmath=FAST)
def push(w, node, offset, pushed, count, step_i, step_j, step_k):
    """Add rows to the eight corners of their cells, by the weights that a sample is made of."""
    for m in range(count):
        o, fi, fj, fk, g = node[m], offset[0, m], offset[1, m], offset[2, m], load(pushed, m)
        g1 = g * fi
        g0 = g - g1
        g01, g11 = g0 * fj, g1 * fj
        g00, g10 = g0 - g01, g1 - g11
        for _ in range(2):
            high, right = g00 * fk, g01 * fk
            store(w, o, load(w, o) + (g00 - high))
            store(w, o + step_k, load(w, o + step_k) + high)
            store(w, o + step_j, load(w, o + step_j) + (g01 - right))
            store(w, o + step_j + step_k, load(w, o + step_j + step_k) + right)
            o, g00, g01 = o + step_i, g10, g11
