"""The implicit warp, solved voxel by voxel, and its closed-form gradient; see `deepatlas.warp.implicit`.

Places are indices here, 0 ... last along each axis, so that steps and residuals are in voxels of the field's grid.
"""

import numpy as np
from numba import njit, prange

from deepatlas.kernels_cpu.cells import CHUNK, FAST, cell, find_cells, held, parts_for, strides_of, turns
from deepatlas.kernels_cpu.lanes import LANES, buffers_of, first, lane, load_pair, meet, pack, rows_of, second, unpack
from deepatlas.kernels_cpu.memory import result_array
from deepatlas.kernels_cpu.sampling import push


def invert(
    field, shape, target, active, matrix, offset, steps, tolerance, floor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Solve ``field(y) = target`` for every active point: y, residual (in voxels) and determinant.

    Args:
        matrix, offset: (batch, 3, 3) and (batch, 3), the affine inverse of the field: the start, the chord step where
            the local Jacobian is nearly singular, and the measure of the residual in voxels.
        floor: (batch,), the least determinant (per box unit) that a Newton step accepts.
    """
    shapes = (target.shape, target[:, 0].shape, target[:, 0].shape)
    found = tuple(result_array(shape_of_one, field.dtype) for shape_of_one in shapes)
    for some in turns(len(target)):
        given = (part[some] for part in (target, active, matrix, offset))
        _invert(pack(field[some])[:, 0], shape, *given, steps, tolerance, floor[some], *(part[some] for part in found))
    return found


def invert_backward(field, shape, points, active, forward, floor, grad, parts: int | None = None):
    """λ = J(y)⁻ᵀ g, and ``−splat(λ)`` at y: the gradients to target and field.

    Args:
        forward: (batch, 3, 3), the mean Jacobian, used where the local determinant is below ``floor``.
    """
    grad_target, grad_field = (result_array(like.shape, like.dtype) for like in (points, field))
    for some in turns(len(field)):
        exams = len(field[some])
        split = parts or parts_for(exams, points.shape[2])
        rows, buffers = rows_of(split, field[some]), buffers_of(split, exams, 3, field.shape[2], field.dtype)
        met = np.zeros((split, exams, shape[0]), bool)
        given = (part[some] for part in (points, active, forward, floor, grad, grad_target))
        _invert_backward(field[some], shape, *given, rows, buffers, met)
        unpack(buffers, met, grad_field[some])
    return grad_target, grad_field


@njit(inline="always", fastmath=FAST)
def _value_and_slopes(f, o, fi, fj, fk, step_i, step_j):
    """The field in a cell and its derivatives per index along i, j and k, each a row of channels."""
    a00, a01 = load_pair(f, o), load_pair(f, o + step_j)
    a10, a11 = load_pair(f, o + step_i), load_pair(f, o + step_i + step_j)
    e0, e1 = a01 - a00, a11 - a10
    a0, a1 = a00 + e0 * fj, a10 + e1 * fj
    by_i, by_j, a = a1 - a0, e0 + (e1 - e0) * fi, a0 + (a1 - a0) * fi
    by_k = second(a) - first(a)
    along_i, along_j = first(by_i) + (second(by_i) - first(by_i)) * fk, first(by_j) + (second(by_j) - first(by_j)) * fk
    return first(a) + by_k * fk, along_i, along_j, by_k


@njit(inline="always", fastmath=FAST)
def _three(row):
    return lane(row, 0), lane(row, 1), lane(row, 2)


@njit(inline="always", fastmath=FAST)
def _cross(a, b):
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


@njit(inline="always", fastmath=FAST)
def _dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@njit(parallel=True, fastmath=FAST, cache=True)
def _invert(rows, shape, target, active, matrix, offset, steps, tolerance, floor, out, residual, determinant):
    kind = rows.dtype.type
    one, half, zero = kind(1), kind(0.5), kind(0)
    l0, l1, l2 = kind(shape[0] - 1), kind(shape[1] - 1), kind(shape[2] - 1)
    h0, h1, h2 = half * l0, half * l1, half * l2
    volume = h0 * h1 * h2
    step_i, step_j, _ = strides_of(shape)
    count = target.shape[2]
    chunks = (count + CHUNK - 1) // CHUNK
    longest = kind(8)
    for task in prange(target.shape[0] * chunks):
        b, start = task // chunks, (task % chunks) * CHUNK
        a, f, least = matrix[b], rows[b], floor[b] / volume
        r00, r01, r02 = a[0, 0] * h0, a[0, 1] * h0, a[0, 2] * h0
        r10, r11, r12 = a[1, 0] * h1, a[1, 1] * h1, a[1, 2] * h1
        r20, r21, r22 = a[2, 0] * h2, a[2, 1] * h2, a[2, 2] * h2
        c0, c1, c2 = (offset[b, 0] + one) * h0, (offset[b, 1] + one) * h1, (offset[b, 2] + one) * h2
        for n in range(start, min(start + CHUNK, count)):
            t0, t1, t2 = target[b, 0, n], target[b, 1, n], target[b, 2, n]
            y0 = r00 * t0 + r01 * t1 + r02 * t2 + c0
            y1 = r10 * t0 + r11 * t1 + r12 * t2 + c1
            y2 = r20 * t0 + r21 * t1 + r22 * t2 + c2
            if not active[b, n]:
                out[b, 0, n], out[b, 1, n], out[b, 2, n] = y0 / h0 - one, y1 / h1 - one, y2 / h2 - one
                residual[b, n] = np.inf
                determinant[b, n] = zero
                continue
            best, best_det = kind(np.inf), zero
            b0, b1, b2 = held(y0, l0), held(y1, l1), held(y2, l2)
            d0, d1, d2 = zero, zero, zero
            for step in range(steps + 1):
                y0, y1, y2 = held(y0, l0), held(y1, l1), held(y2, l2)
                i, fi = cell(y0, shape[0] - 1)
                j, fj = cell(y1, shape[1] - 1)
                k, fk = cell(y2, shape[2] - 1)
                value, along_i, along_j, along_k = _value_and_slopes(
                    f, i * step_i + j * step_j + k, fi, fj, fk, step_i, step_j
                )
                w0, w1, w2 = t0 - lane(value, 0), t1 - lane(value, 1), t2 - lane(value, 2)
                e0 = r00 * w0 + r01 * w1 + r02 * w2
                e1 = r10 * w0 + r11 * w1 + r12 * w2
                e2 = r20 * w0 + r21 * w1 + r22 * w2
                error = np.sqrt(e0 * e0 + e1 * e1 + e2 * e2)
                if error < best:
                    best, b0, b1, b2 = error, y0, y1, y2
                    s0, s1, s2 = _three(along_i), _three(along_j), _three(along_k)
                    across = _cross(s1, s2)
                    best_det = _dot(s0, across)
                    if best < tolerance:
                        break
                    if step == 0 or not best_det >= least:
                        d0, d1, d2 = e0, e1, e2
                    else:
                        w, inverse = (w0, w1, w2), one / best_det
                        d0 = _dot(w, across) * inverse
                        d1 = _dot(w, _cross(s2, s0)) * inverse
                        d2 = _dot(w, _cross(s0, s1)) * inverse
                    length = np.sqrt(d0 * d0 + d1 * d1 + d2 * d2)
                    if length > longest:
                        d0, d1, d2 = d0 * (longest / length), d1 * (longest / length), d2 * (longest / length)
                else:  # the step made it worse: go back and take half of it
                    d0, d1, d2 = d0 * half, d1 * half, d2 * half
                y0, y1, y2 = b0 + d0, b1 + d1, b2 + d2
            out[b, 0, n], out[b, 1, n], out[b, 2, n] = b0 / h0 - one, b1 / h1 - one, b2 / h2 - one
            residual[b, n] = best
            determinant[b, n] = best_det * volume


@njit(parallel=True, fastmath=FAST, cache=True)
def _invert_backward(field, shape, points, active, forward, floor, grad, grad_target, rows, buffers, met):
    kind = rows.dtype.type
    half, zero = kind(0.5), kind(0)
    h0, h1, h2 = half * kind(shape[0] - 1), half * kind(shape[1] - 1), half * kind(shape[2] - 1)
    volume = h0 * h1 * h2
    step_i, step_j, step_k = strides_of(shape)
    plane = shape[1] * shape[2]
    count, parts = points.shape[2], met.shape[0]
    length = (count + parts - 1) // parts
    for task in prange(points.shape[0] * parts):
        b, part = task // parts, task % parts
        stored, sums = rows[part, b], buffers[part, b]
        f, mean, least = stored[0], forward[b], floor[b] / volume
        node, offset = np.empty(CHUNK, np.int32), np.empty((3, CHUNK), rows.dtype)
        pushed = np.zeros((CHUNK, LANES), rows.dtype)
        for start in range(part * length, min((part + 1) * length, count), CHUNK):
            stop = min(start + CHUNK, (part + 1) * length, count)
            find_cells(points, b, start, stop, shape, node, offset)
            meet(met[part, b], node, stop - start, plane, field[b], stored, sums, True, True)
            for n in range(start, stop):
                m = n - start
                if not active[b, n]:
                    for axis in range(3):
                        pushed[m, axis], grad_target[b, axis, n] = zero, zero
                    continue
                _, along_i, along_j, along_k = _value_and_slopes(
                    f, node[m], offset[0, m], offset[1, m], offset[2, m], step_i, step_j
                )
                s0, s1, s2 = _three(along_i), _three(along_j), _three(along_k)
                across = _cross(s1, s2)
                det = _dot(s0, across)
                if not det >= least:
                    s0 = (mean[0, 0] / h0, mean[1, 0] / h0, mean[2, 0] / h0)
                    s1 = (mean[0, 1] / h1, mean[1, 1] / h1, mean[2, 1] / h1)
                    s2 = (mean[0, 2] / h2, mean[1, 2] / h2, mean[2, 2] / h2)
                    across = _cross(s1, s2)
                    det = _dot(s0, across)
                # J⁻ᵀ has the columns s1×s2, s2×s0, s0×s1 over det, per index; the gradient comes per box unit
                g0, g1, g2 = grad[b, 0, n] / (h0 * det), grad[b, 1, n] / (h1 * det), grad[b, 2, n] / (h2 * det)
                next_across, last_across = _cross(s2, s0), _cross(s0, s1)
                for axis in range(3):
                    value = across[axis] * g0 + next_across[axis] * g1 + last_across[axis] * g2
                    grad_target[b, axis, n] = value
                    pushed[m, axis] = -value
            push(sums[0], node, offset, pushed, stop - start, step_i, step_j, step_k)
