"""Fused CPU kernels of `grid` and `warp`: one pass, all in registers, parallel over voxels.

Compiled by Numba on first use and cached, so no compiler is needed on the user's machine. Every kernel takes
contiguous NumPy arrays of one floating type. A point outside the box takes the value at the nearest face and has no
gradient there; NaN is read as the lower face. Tests hold these functions equal to the plain PyTorch forms that stand
in `grid` and `warp`.

Fields are flattened to ``(batch, channel, i * j * k)`` with ``shape = (i, j, k)``; points are ``(batch, 3, point)``
in the box frame.
"""

import numba
import numpy as np
from numba import njit, prange

_FAST = {"contract"}  # nothing that assumes away NaN or infinity, nothing that moves a point to another cell
_CHUNK = 1024


@njit(inline="always", fastmath=_FAST)
def _cell(coordinate, last, half, one, zero):
    """Lower node, offset in its cell (0 ... 1), and d(index)/d(coordinate), along an axis of ``last + 1`` nodes."""
    x = (coordinate + one) * half * last
    slope = half * last
    if not x > zero:
        x = zero
        slope = zero
    elif x >= last:
        x = last
        slope = zero
    node = np.floor(x)
    if node > last - one:
        node = max(last - one, zero)
    return int(node), x - node, slope


@njit(parallel=True, fastmath=_FAST, cache=True)
def sample(field, shape, points, out):
    """Trilinear values of ``field`` at ``points``, written to ``out`` (batch, channel, point)."""
    one, half, zero = field.dtype.type(1), field.dtype.type(0.5), field.dtype.type(0)
    li, lj, lk = field.dtype.type(shape[0] - 1), field.dtype.type(shape[1] - 1), field.dtype.type(shape[2] - 1)
    step_i, step_j = shape[1] * shape[2] * (shape[0] > 1), shape[2] * (shape[1] > 1)
    step_k = 1 * (shape[2] > 1)
    channels, count = field.shape[1], points.shape[2]
    chunks = (count + _CHUNK - 1) // _CHUNK
    for task in prange(points.shape[0] * chunks):
        b, start = task // chunks, (task % chunks) * _CHUNK
        for n in range(start, min(start + _CHUNK, count)):
            i, fi, _ = _cell(points[b, 0, n], li, half, one, zero)
            j, fj, _ = _cell(points[b, 1, n], lj, half, one, zero)
            k, fk, _ = _cell(points[b, 2, n], lk, half, one, zero)
            o = (i * shape[1] + j) * shape[2] + k
            for c in range(channels):
                f = field[b, c]
                v00 = f[o] + fk * (f[o + step_k] - f[o])
                v01 = f[o + step_j] + fk * (f[o + step_j + step_k] - f[o + step_j])
                o1 = o + step_i
                v10 = f[o1] + fk * (f[o1 + step_k] - f[o1])
                v11 = f[o1 + step_j] + fk * (f[o1 + step_j + step_k] - f[o1 + step_j])
                v0 = v00 + fj * (v01 - v00)
                v1 = v10 + fj * (v11 - v10)
                out[b, c, n] = v0 + fi * (v1 - v0)


@njit(parallel=True, fastmath=_FAST, cache=True)
def sample_backward(field, shape, points, grad, grad_points, buffers, want_points, want_field):
    """Adjoint of `sample`: fills ``grad_points`` and adds to ``buffers`` (part, batch, channel, i * j * k).

    The points of an exam are split among the parts, so no two threads write to the same buffer.
    """
    one, half, zero = field.dtype.type(1), field.dtype.type(0.5), field.dtype.type(0)
    li, lj, lk = field.dtype.type(shape[0] - 1), field.dtype.type(shape[1] - 1), field.dtype.type(shape[2] - 1)
    step_i, step_j = shape[1] * shape[2] * (shape[0] > 1), shape[2] * (shape[1] > 1)
    step_k = 1 * (shape[2] > 1)
    channels, count, parts = field.shape[1], points.shape[2], buffers.shape[0]
    length = (count + parts - 1) // parts
    for task in prange(points.shape[0] * parts):
        b, part = task // parts, task % parts
        for n in range(part * length, min((part + 1) * length, count)):
            i, fi, si = _cell(points[b, 0, n], li, half, one, zero)
            j, fj, sj = _cell(points[b, 1, n], lj, half, one, zero)
            k, fk, sk = _cell(points[b, 2, n], lk, half, one, zero)
            o = (i * shape[1] + j) * shape[2] + k
            o1 = o + step_i
            gi, gj, gk = one - fi, one - fj, one - fk
            di, dj, dk = zero, zero, zero
            for c in range(channels):
                g = grad[b, c, n]
                if want_points:
                    f = field[b, c]
                    a000, a001 = f[o], f[o + step_k]
                    a010, a011 = f[o + step_j], f[o + step_j + step_k]
                    a100, a101 = f[o1], f[o1 + step_k]
                    a110, a111 = f[o1 + step_j], f[o1 + step_j + step_k]
                    v00, v01 = a000 + fk * (a001 - a000), a010 + fk * (a011 - a010)
                    v10, v11 = a100 + fk * (a101 - a100), a110 + fk * (a111 - a110)
                    di += g * (v10 + fj * (v11 - v10) - v00 - fj * (v01 - v00))
                    dj += g * (gi * (v01 - v00) + fi * (v11 - v10))
                    dk += g * (
                        gi * (gj * (a001 - a000) + fj * (a011 - a010)) + fi * (gj * (a101 - a100) + fj * (a111 - a110))
                    )
                if want_field:
                    w = buffers[part, b, c]
                    gi0, gi1 = g * gi, g * fi
                    w[o] += gi0 * gj * gk
                    w[o + step_k] += gi0 * gj * fk
                    w[o + step_j] += gi0 * fj * gk
                    w[o + step_j + step_k] += gi0 * fj * fk
                    w[o1] += gi1 * gj * gk
                    w[o1 + step_k] += gi1 * gj * fk
                    w[o1 + step_j] += gi1 * fj * gk
                    w[o1 + step_j + step_k] += gi1 * fj * fk
            if want_points:
                grad_points[b, 0, n] = di * si
                grad_points[b, 1, n] = dj * sj
                grad_points[b, 2, n] = dk * sk


@njit(inline="always", fastmath=_FAST)
def _value_and_jacobian(field, b, shape, y0, y1, y2, constants, jac, value):
    """Three channels of ``field[b]`` and their Jacobian per box unit at the clamped point (y0, y1, y2)."""
    one, half, zero, li, lj, lk = constants
    step_i, step_j = shape[1] * shape[2], shape[2]
    i, fi, _ = _cell(y0, li, half, one, zero)
    j, fj, _ = _cell(y1, lj, half, one, zero)
    k, fk, _ = _cell(y2, lk, half, one, zero)
    gi, gj = one - fi, one - fj
    o = (i * shape[1] + j) * shape[2] + k
    o1 = o + step_i
    for c in range(3):
        f = field[b, c]
        a000, a001 = f[o], f[o + 1]
        a010, a011 = f[o + step_j], f[o + step_j + 1]
        a100, a101 = f[o1], f[o1 + 1]
        a110, a111 = f[o1 + step_j], f[o1 + step_j + 1]
        v00, v01 = a000 + fk * (a001 - a000), a010 + fk * (a011 - a010)
        v10, v11 = a100 + fk * (a101 - a100), a110 + fk * (a111 - a110)
        v0, v1 = v00 + fj * (v01 - v00), v10 + fj * (v11 - v10)
        value[c] = v0 + fi * (v1 - v0)
        jac[c, 0] = (v1 - v0) * half * li
        jac[c, 1] = (gi * (v01 - v00) + fi * (v11 - v10)) * half * lj
        jac[c, 2] = (
            (gi * (gj * (a001 - a000) + fj * (a011 - a010)) + fi * (gj * (a101 - a100) + fj * (a111 - a110)))
            * half
            * lk
        )


@njit(inline="always", fastmath=_FAST)
def _determinant(m):
    return (
        m[0, 0] * (m[1, 1] * m[2, 2] - m[1, 2] * m[2, 1])
        - m[0, 1] * (m[1, 0] * m[2, 2] - m[1, 2] * m[2, 0])
        + m[0, 2] * (m[1, 0] * m[2, 1] - m[1, 1] * m[2, 0])
    )


@njit(inline="always", fastmath=_FAST)
def _solve(m, determinant, r0, r1, r2):
    """The solution x of ``m x = r`` by Cramer's rule."""
    inverse = 1 / determinant
    x0 = (
        r0 * (m[1, 1] * m[2, 2] - m[1, 2] * m[2, 1])
        + r1 * (m[0, 2] * m[2, 1] - m[0, 1] * m[2, 2])
        + r2 * (m[0, 1] * m[1, 2] - m[0, 2] * m[1, 1])
    )
    x1 = (
        r0 * (m[1, 2] * m[2, 0] - m[1, 0] * m[2, 2])
        + r1 * (m[0, 0] * m[2, 2] - m[0, 2] * m[2, 0])
        + r2 * (m[0, 2] * m[1, 0] - m[0, 0] * m[1, 2])
    )
    x2 = (
        r0 * (m[1, 0] * m[2, 1] - m[1, 1] * m[2, 0])
        + r1 * (m[0, 1] * m[2, 0] - m[0, 0] * m[2, 1])
        + r2 * (m[0, 0] * m[1, 1] - m[0, 1] * m[1, 0])
    )
    return x0 * inverse, x1 * inverse, x2 * inverse


@njit(parallel=True, fastmath=_FAST, cache=True)
def invert(field, shape, target, active, matrix, offset, steps, tolerance, floor, out, residual, determinant):
    """Solve ``field(y) = target`` for every active point; see `deepatlas.warp.implicit` for the method.

    ``matrix`` (batch, 3, 3) and ``offset`` (batch, 3) are the affine inverse of the field: the start, the chord step
    where the local Jacobian is nearly singular, and the measure of the residual in voxels. ``floor`` (batch,) is the
    least determinant a Newton step accepts.
    """
    kind = field.dtype.type
    one, half, zero = kind(1), kind(0.5), kind(0)
    li, lj, lk = kind(shape[0] - 1), kind(shape[1] - 1), kind(shape[2] - 1)
    constants = (one, half, zero, li, lj, lk)
    count = target.shape[2]
    chunks = (count + _CHUNK - 1) // _CHUNK
    longest = kind(8)
    for task in prange(target.shape[0] * chunks):
        b, start = task // chunks, (task % chunks) * _CHUNK
        a = matrix[b]
        jac = np.empty((3, 3), field.dtype)
        value = np.empty(3, field.dtype)
        for n in range(start, min(start + _CHUNK, count)):
            t0, t1, t2 = target[b, 0, n], target[b, 1, n], target[b, 2, n]
            y0 = a[0, 0] * t0 + a[0, 1] * t1 + a[0, 2] * t2 + offset[b, 0]
            y1 = a[1, 0] * t0 + a[1, 1] * t1 + a[1, 2] * t2 + offset[b, 1]
            y2 = a[2, 0] * t0 + a[2, 1] * t1 + a[2, 2] * t2 + offset[b, 2]
            if not active[b, n]:
                out[b, 0, n], out[b, 1, n], out[b, 2, n] = y0, y1, y2
                residual[b, n] = np.inf
                determinant[b, n] = zero
                continue
            best, best_det = kind(np.inf), zero
            b0, b1, b2 = min(max(y0, -one), one), min(max(y1, -one), one), min(max(y2, -one), one)
            d0, d1, d2 = zero, zero, zero
            for step in range(steps + 1):
                y0, y1, y2 = min(max(y0, -one), one), min(max(y1, -one), one), min(max(y2, -one), one)
                _value_and_jacobian(field, b, shape, y0, y1, y2, constants, jac, value)
                r0, r1, r2 = t0 - value[0], t1 - value[1], t2 - value[2]
                e0 = a[0, 0] * r0 + a[0, 1] * r1 + a[0, 2] * r2
                e1 = a[1, 0] * r0 + a[1, 1] * r1 + a[1, 2] * r2
                e2 = a[2, 0] * r0 + a[2, 1] * r1 + a[2, 2] * r2
                error = np.sqrt((e0 * li) ** 2 + (e1 * lj) ** 2 + (e2 * lk) ** 2) * half
                if error < best:
                    best, b0, b1, b2 = error, y0, y1, y2
                    best_det = _determinant(jac)
                    if best < tolerance:
                        break
                    if step == 0 or best_det < floor[b]:
                        d0, d1, d2 = e0, e1, e2
                    else:
                        d0, d1, d2 = _solve(jac, best_det, r0, r1, r2)
                    length = np.sqrt((d0 * li) ** 2 + (d1 * lj) ** 2 + (d2 * lk) ** 2) * half
                    if length > longest:
                        d0, d1, d2 = d0 * (longest / length), d1 * (longest / length), d2 * (longest / length)
                else:  # the step made it worse: go back and take half of it
                    d0, d1, d2 = d0 * half, d1 * half, d2 * half
                y0, y1, y2 = b0 + d0, b1 + d1, b2 + d2
            out[b, 0, n], out[b, 1, n], out[b, 2, n] = b0, b1, b2
            residual[b, n] = best
            determinant[b, n] = best_det


@njit(parallel=True, fastmath=_FAST, cache=True)
def invert_backward(field, shape, points, active, forward, floor, grad, grad_target, buffers):
    """λ = J(y)⁻ᵀ g into ``grad_target``; ``−splat(λ)`` at y into ``buffers`` (part, batch, 3, i * j * k).

    ``forward`` (batch, 3, 3) is the mean Jacobian, used where the local determinant is below ``floor``.
    """
    kind = field.dtype.type
    one, half, zero = kind(1), kind(0.5), kind(0)
    li, lj, lk = kind(shape[0] - 1), kind(shape[1] - 1), kind(shape[2] - 1)
    constants = (one, half, zero, li, lj, lk)
    step_i, step_j = shape[1] * shape[2], shape[2]
    count, parts = points.shape[2], buffers.shape[0]
    length = (count + parts - 1) // parts
    for task in prange(points.shape[0] * parts):
        b, part = task // parts, task % parts
        jac = np.empty((3, 3), field.dtype)
        turned = np.empty((3, 3), field.dtype)
        value = np.empty(3, field.dtype)
        for n in range(part * length, min((part + 1) * length, count)):
            if not active[b, n]:
                continue
            y0, y1, y2 = points[b, 0, n], points[b, 1, n], points[b, 2, n]
            _value_and_jacobian(field, b, shape, y0, y1, y2, constants, jac, value)
            local = _determinant(jac) >= floor[b]
            for c in range(3):
                for d in range(3):
                    turned[d, c] = jac[c, d] if local else forward[b, c, d]
            l0, l1, l2 = _solve(turned, _determinant(turned), grad[b, 0, n], grad[b, 1, n], grad[b, 2, n])
            grad_target[b, 0, n], grad_target[b, 1, n], grad_target[b, 2, n] = l0, l1, l2
            i, fi, _ = _cell(y0, li, half, one, zero)
            j, fj, _ = _cell(y1, lj, half, one, zero)
            k, fk, _ = _cell(y2, lk, half, one, zero)
            gi, gj, gk = one - fi, one - fj, one - fk
            o = (i * shape[1] + j) * shape[2] + k
            o1 = o + step_i
            for c in range(3):
                g = -(l0 if c == 0 else (l1 if c == 1 else l2))
                w = buffers[part, b, c]
                gi0, gi1 = g * gi, g * fi
                w[o] += gi0 * gj * gk
                w[o + 1] += gi0 * gj * fk
                w[o + step_j] += gi0 * fj * gk
                w[o + step_j + 1] += gi0 * fj * fk
                w[o1] += gi1 * gj * gk
                w[o1 + 1] += gi1 * gj * fk
                w[o1 + step_j] += gi1 * fj * gk
                w[o1 + step_j + 1] += gi1 * fj * fk


def parts_for(batch: int) -> int:
    """How many buffers an adjoint needs so that every thread has work of its own."""
    return max(1, min(8, numba.get_num_threads()) // batch)
