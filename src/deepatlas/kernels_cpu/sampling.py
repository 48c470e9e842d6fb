"""The trilinear sampler and its adjoint; see `deepatlas.grid.sample`."""

import numpy as np
from numba import njit, prange

from deepatlas.kernels_cpu.cells import CHUNK, FAST, find_cells, parts_for, strides_of, turns
from deepatlas.kernels_cpu.lanes import buffers_of, first, load, load_pair, pack, second, store, total, unpack


def sample(field: np.ndarray, shape: tuple[int, int, int], points: np.ndarray, out: np.ndarray) -> None:
    """Trilinear values of ``field`` at ``points``, written to ``out`` (batch, channel, point)."""
    for some in turns(len(points)):
        _sample(pack(field[some], shape[2] == 1), shape, points[some], out[some])


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

    The points of an exam are split among ``parts`` buffers, so that no two threads write to the same one.
    """
    batch, channels, nodes = field.shape
    grad_field = np.empty_like(field) if want_field else None
    grad_points = np.empty(points.shape if want_points else (batch, 3, 0), field.dtype)
    for some in turns(batch):
        exams = len(field[some])
        rows = pack(field[some] if want_points else field[some, :, :0], shape[2] == 1)
        buffers = buffers_of(parts or parts_for(exams), exams, channels, nodes if want_field else 0, field.dtype)
        _sample_backward(rows, shape, points[some], grad[some], grad_points[some], buffers, want_points, want_field)
        if want_field:
            unpack(buffers, grad_field[some])
    return grad_field, grad_points if want_points else None


@njit(parallel=True, fastmath=FAST, cache=True)
def _sample(rows, shape, points, out):
    step_i, step_j, _ = strides_of(shape)
    count = points.shape[2]
    chunks = (count + CHUNK - 1) // CHUNK
    for task in prange(points.shape[0] * chunks):
        b, start = task // chunks, (task % chunks) * CHUNK
        stop = min(start + CHUNK, count)
        node, offset = np.empty(CHUNK, np.int32), np.empty((3, CHUNK), rows.dtype)
        values = np.empty((CHUNK,) + rows.shape[3:], rows.dtype)  # noqa: RUF005 (Numba)
        find_cells(points, b, start, stop, shape, node, offset)
        for group in range(rows.shape[1]):
            f = rows[b, group]
            for m in range(stop - start):
                o, fi, fj, fk = node[m], offset[0, m], offset[1, m], offset[2, m]
                v00, v01 = load_pair(f, o), load_pair(f, o + step_j)
                v10, v11 = load_pair(f, o + step_i), load_pair(f, o + step_i + step_j)
                v0, v1 = v00 + (v01 - v00) * fj, v10 + (v11 - v10) * fj
                v = v0 + (v1 - v0) * fi
                store(values, m, first(v) + (second(v) - first(v)) * fk)
            lanes = values.reshape(CHUNK, -1)
            for place in range(min(lanes.shape[1], out.shape[1] - group * lanes.shape[1])):
                for m in range(stop - start):
                    out[b, group * lanes.shape[1] + place, start + m] = lanes[m, place]


@njit(parallel=True, fastmath=FAST, cache=True)
def _sample_backward(rows, shape, points, grad, grad_points, buffers, want_points, want_field):
    kind = rows.dtype.type
    step_i, step_j, step_k = strides_of(shape)
    count, parts = points.shape[2], buffers.shape[0]
    length = (count + parts - 1) // parts
    for task in prange(points.shape[0] * parts):
        b, part = task // parts, task % parts
        node, offset = np.empty(CHUNK, np.int32), np.empty((3, CHUNK), rows.dtype)
        pushed = np.zeros((CHUNK,) + rows.shape[3:], rows.dtype)  # noqa: RUF005 (Numba)
        lanes = pushed.reshape(CHUNK, -1)
        buffers[part, b] = 0
        for start in range(part * length, min((part + 1) * length, count), CHUNK):
            stop = min(start + CHUNK, (part + 1) * length, count)
            find_cells(points, b, start, stop, shape, node, offset)
            for group in range(rows.shape[1]):
                for place in range(min(lanes.shape[1], grad.shape[1] - group * lanes.shape[1])):
                    for m in range(stop - start):
                        lanes[m, place] = grad[b, group * lanes.shape[1] + place, start + m]
                for place in range(grad.shape[1] - group * lanes.shape[1], lanes.shape[1]):
                    lanes[:, place] = 0
                if want_points:
                    f = rows[b, group]
                    if group == 0:
                        grad_points[b, :, start:stop] = 0
                    for m in range(stop - start):
                        o, fi, fj, fk, g = node[m], offset[0, m], offset[1, m], offset[2, m], load(pushed, m)
                        a00, a01 = load_pair(f, o), load_pair(f, o + step_j)
                        a10, a11 = load_pair(f, o + step_i), load_pair(f, o + step_i + step_j)
                        e0, e1 = a01 - a00, a11 - a10
                        a0, a1 = a00 + e0 * fj, a10 + e1 * fj
                        by_i, by_j, a = a1 - a0, e0 + (e1 - e0) * fi, a0 + (a1 - a0) * fi
                        grad_points[b, 0, start + m] += total((first(by_i) + (second(by_i) - first(by_i)) * fk) * g)
                        grad_points[b, 1, start + m] += total((first(by_j) + (second(by_j) - first(by_j)) * fk) * g)
                        grad_points[b, 2, start + m] += total((second(a) - first(a)) * g)
                if want_field:
                    push(buffers[part, b, group], node, offset, pushed, stop - start, step_i, step_j, step_k)
            if want_points:
                for axis in range(3):
                    slope = kind(0.5) * kind(shape[axis] - 1)
                    for n in range(start, stop):
                        x = (points[b, axis, n] + kind(1)) * slope
                        grad_points[b, axis, n] *= slope if kind(0) < x < slope + slope else kind(0)


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
