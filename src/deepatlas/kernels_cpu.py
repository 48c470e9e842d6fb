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


@njit(inline="always", fastmath=_FAST)
def _matrix_mm(f, i, j, k, shape, out_mm, in_mm, slopes, jac, product):
    """Jacobian of a field by central differences (one-sided at the faces), from mm to mm, into ``product``."""
    for axis in range(3):
        at = i if axis == 0 else (j if axis == 1 else k)
        stride = shape[1] * shape[2] if axis == 0 else (shape[2] if axis == 1 else 1)
        o = (i * shape[1] + j) * shape[2] + k
        low, high = o - stride * (at > 0), o + stride * (at < shape[axis] - 1)
        slope = slopes[axis] * (1 if 0 < at < shape[axis] - 1 else 2)
        for c in range(3):
            jac[c, axis] = (f[c, high] - f[c, low]) * slope
    for r in range(3):
        p0 = out_mm[r, 0] * jac[0, 0] + out_mm[r, 1] * jac[1, 0] + out_mm[r, 2] * jac[2, 0]
        p1 = out_mm[r, 0] * jac[0, 1] + out_mm[r, 1] * jac[1, 1] + out_mm[r, 2] * jac[2, 1]
        p2 = out_mm[r, 0] * jac[0, 2] + out_mm[r, 1] * jac[1, 2] + out_mm[r, 2] * jac[2, 2]
        for c in range(3):
            product[r, c] = p0 * in_mm[0, c] + p1 * in_mm[1, c] + p2 * in_mm[2, c]


@njit(inline="always", fastmath=_FAST)
def _column_square(m, c, least):
    return max(m[0, c] * m[0, c] + m[1, c] * m[1, c] + m[2, c] * m[2, c], least)


@njit(parallel=True, fastmath=_FAST, cache=True)
def determinants(field, shape, out_mm, in_mm, wanted, det, unit):
    """det J and det Ĵ (unit columns) of a field from mm to mm; 1 where they are not wanted.

    ``out_mm`` and ``in_mm`` (batch, 3, 3) stand left and right of the Jacobian per box unit.
    """
    kind = field.dtype.type
    least = kind(1e-12)
    for task in prange(field.shape[0] * shape[0]):
        b, i = task // shape[0], task % shape[0]
        slopes = np.empty(3, field.dtype)
        for axis in range(3):
            slopes[axis] = kind(0.25) * (shape[axis] - 1)
        jac, m = np.empty((3, 3), field.dtype), np.empty((3, 3), field.dtype)
        for j in range(shape[1]):
            for k in range(shape[2]):
                o = (i * shape[1] + j) * shape[2] + k
                if not wanted[b, o]:
                    det[b, o], unit[b, o] = kind(1), kind(1)
                    continue
                _matrix_mm(field[b], i, j, k, shape, out_mm[b], in_mm[b], slopes, jac, m)
                d = _determinant(m)
                lengths = _column_square(m, 0, least) * _column_square(m, 1, least) * _column_square(m, 2, least)
                det[b, o], unit[b, o] = d, d / np.sqrt(lengths)


@njit(parallel=True, fastmath=_FAST, cache=True)
def determinants_backward(field, shape, out_mm, in_mm, wanted, grad_det, grad_unit, buffers):
    """Adjoint of `determinants`: adds to ``buffers`` (part, batch, 3, i * j * k)."""
    kind = field.dtype.type
    least = kind(1e-12)
    parts = buffers.shape[0]
    length = (shape[0] + parts - 1) // parts
    for task in prange(field.shape[0] * parts):
        b, part = task // parts, task % parts
        out, inn, w = out_mm[b], in_mm[b], buffers[part, b]
        slopes = np.empty(3, field.dtype)
        for axis in range(3):
            slopes[axis] = kind(0.25) * (shape[axis] - 1)
        jac, m, g = np.empty((3, 3), field.dtype), np.empty((3, 3), field.dtype), np.empty((3, 3), field.dtype)
        for i in range(part * length, min((part + 1) * length, shape[0])):
            for j in range(shape[1]):
                for k in range(shape[2]):
                    o = (i * shape[1] + j) * shape[2] + k
                    if not wanted[b, o]:
                        continue
                    _matrix_mm(field[b], i, j, k, shape, out, inn, slopes, jac, m)
                    squares = (_column_square(m, 0, least), _column_square(m, 1, least), _column_square(m, 2, least))
                    over = 1 / np.sqrt(squares[0] * squares[1] * squares[2])
                    to_cofactor = grad_det[b, o] + grad_unit[b, o] * over
                    to_column = grad_unit[b, o] * _determinant(m) * over
                    for c in range(3):
                        c1, c2 = (c + 1) % 3, (c + 2) % 3
                        shrink = to_column / squares[c] * (squares[c] > least)
                        for r in range(3):
                            r1, r2 = (r + 1) % 3, (r + 2) % 3
                            g[r, c] = to_cofactor * (m[r1, c1] * m[r2, c2] - m[r1, c2] * m[r2, c1]) - shrink * m[r, c]
                    for r in range(3):  # back through the product: outᵀ g innᵀ
                        p0 = out[0, r] * g[0, 0] + out[1, r] * g[1, 0] + out[2, r] * g[2, 0]
                        p1 = out[0, r] * g[0, 1] + out[1, r] * g[1, 1] + out[2, r] * g[2, 1]
                        p2 = out[0, r] * g[0, 2] + out[1, r] * g[1, 2] + out[2, r] * g[2, 2]
                        for axis in range(3):
                            at = i if axis == 0 else (j if axis == 1 else k)
                            stride = shape[1] * shape[2] if axis == 0 else (shape[2] if axis == 1 else 1)
                            slope = slopes[axis] * (1 if 0 < at < shape[axis] - 1 else 2)
                            pull = (p0 * inn[axis, 0] + p1 * inn[axis, 1] + p2 * inn[axis, 2]) * slope
                            w[r, o + stride * (at < shape[axis] - 1)] += pull
                            w[r, o - stride * (at > 0)] -= pull


@njit(parallel=True, fastmath=_FAST, cache=True)
def moments(a, b, weight, shape, side, out):
    """Sums over cubes of ``side`` voxels of w, wa, wb, waa, wbb, wab, into ``out`` (batch, channel, 6, cube)."""
    cubes = ((shape[0] + side - 1) // side, (shape[1] + side - 1) // side, (shape[2] + side - 1) // side)
    for task in prange(a.shape[0] * a.shape[1] * cubes[0]):
        n, slab = task // cubes[0], task % cubes[0]
        batch, channel = n // a.shape[1], n % a.shape[1]
        fa, fb, fw = a[batch, channel], b[batch, channel], weight[batch, 0]
        into = out[batch, channel]
        for i in range(slab * side, min((slab + 1) * side, shape[0])):
            for j in range(shape[1]):
                row = (i * shape[1] + j) * shape[2]
                for ck in range(cubes[2]):
                    s, sa, sb, saa, sbb, sab = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
                    for o in range(row + ck * side, row + min((ck + 1) * side, shape[2])):
                        w = fw[o]
                        x, y = fa[o], fb[o]
                        wx, wy = w * x, w * y
                        s += w
                        sa += wx
                        sb += wy
                        saa += wx * x
                        sbb += wy * y
                        sab += wx * y
                    cube = (slab * cubes[1] + j // side) * cubes[2] + ck
                    into[0, cube] += s
                    into[1, cube] += sa
                    into[2, cube] += sb
                    into[3, cube] += saa
                    into[4, cube] += sbb
                    into[5, cube] += sab


@njit(parallel=True, fastmath=_FAST, cache=True)
def moments_backward(a, b, weight, shape, side, grad, grad_a, grad_b, want_b):
    """Adjoint of `moments` in the two maps: ``w (g_a + 2 g_aa a + g_ab b)``, and the same for b."""
    kind = a.dtype.type
    cubes = ((shape[0] + side - 1) // side, (shape[1] + side - 1) // side, (shape[2] + side - 1) // side)
    for task in prange(a.shape[0] * a.shape[1] * shape[0]):
        n, i = task // shape[0], task % shape[0]
        batch, channel = n // a.shape[1], n % a.shape[1]
        fa, fb, fw, g = a[batch, channel], b[batch, channel], weight[batch, 0], grad[batch, channel]
        for j in range(shape[1]):
            row = (i * shape[1] + j) * shape[2]
            for ck in range(cubes[2]):
                cube = ((i // side) * cubes[1] + j // side) * cubes[2] + ck
                ga, gb, gab = kind(g[1, cube]), kind(g[2, cube]), kind(g[5, cube])
                gaa, gbb = kind(2 * g[3, cube]), kind(2 * g[4, cube])
                for o in range(row + ck * side, row + min((ck + 1) * side, shape[2])):
                    grad_a[batch, channel, o] = fw[o] * (ga + gaa * fa[o] + gab * fb[o])
                    if want_b:
                        grad_b[batch, channel, o] = fw[o] * (gb + gbb * fb[o] + gab * fa[o])


@njit(inline="always", fastmath=_FAST)
def _trilinear(f, start, shape, i, j, k, fi, fj, fk):
    """One value of a field that lies flat in ``f`` from ``start``; every axis has at least two nodes."""
    o = start + (i * shape[1] + j) * shape[2] + k
    down, right = shape[1] * shape[2], shape[2]
    v00 = f[o] + fk * (f[o + 1] - f[o])
    v01 = f[o + right] + fk * (f[o + right + 1] - f[o + right])
    o += down
    v10 = f[o] + fk * (f[o + 1] - f[o])
    v11 = f[o + right] + fk * (f[o + right + 1] - f[o + right])
    v0, v1 = v00 + fj * (v01 - v00), v10 + fj * (v11 - v10)
    return v0 + fi * (v1 - v0)


@njit(parallel=True, fastmath=_FAST, cache=True)
def claim(
    c, seen, to_box, to_mm, reach, least_seen, regions, masks, starts, shapes, sides, levels, owner, counts, spans
):
    """For every voxel of an exam the structure that exceeds its level most, in one pass; −1 where none does.

    ``c`` (3, n, n, n) and ``seen`` (n, n, n) are the exam's map and foreground; ``to_box`` (3, 4) and ``to_mm`` lead
    from voxels there and to the patient. Only voxels within ``±reach`` of the box and with more than ``least_seen`` of
    foreground are asked for. Structure s is asked for in the block ``regions[s]`` (3, 2) of voxels; its mask lies in
    ``masks`` from ``starts[s]``, of shape ``shapes[s]``, between the atlas coordinates ``sides[s]`` (2, 3). ``counts``
    (plane, s) and ``spans`` (plane, s, 3, 3) collect how many voxels each got, and of their places in mm the sum, the
    lowest and the highest.
    """
    kind = c.dtype.type
    one, half, zero = kind(1), kind(0.5), kind(0)
    size = c.shape[1]
    grid, last = (size, size, size), kind(size - 1)
    field, view = c.reshape(3, size**3), seen.reshape(size**3)
    structures = len(levels)
    for i in prange(owner.shape[0]):
        near = np.empty(structures, np.int64)
        for j in range(owner.shape[1]):
            count, k_low, k_high = 0, owner.shape[2], 0
            for s in range(structures):
                r = regions[s]
                if r[0, 0] <= i < r[0, 1] and r[1, 0] <= j < r[1, 1]:
                    near[count] = s
                    count += 1
                    k_low, k_high = min(k_low, r[2, 0]), max(k_high, r[2, 1])
            for k in range(k_low, k_high):
                x = kind(to_box[0, 0] * i + to_box[0, 1] * j + to_box[0, 2] * k + to_box[0, 3])
                y = kind(to_box[1, 0] * i + to_box[1, 1] * j + to_box[1, 2] * k + to_box[1, 3])
                z = kind(to_box[2, 0] * i + to_box[2, 1] * j + to_box[2, 2] * k + to_box[2, 3])
                if abs(x) > reach or abs(y) > reach or abs(z) > reach:
                    continue
                ci, fi, _ = _cell(x, last, half, one, zero)
                cj, fj, _ = _cell(y, last, half, one, zero)
                ck, fk, _ = _cell(z, last, half, one, zero)
                if not _trilinear(view, 0, grid, ci, cj, ck, fi, fj, fk) > least_seen:
                    continue
                u = _trilinear(field[0], 0, grid, ci, cj, ck, fi, fj, fk)
                v = _trilinear(field[1], 0, grid, ci, cj, ck, fi, fj, fk)
                w = _trilinear(field[2], 0, grid, ci, cj, ck, fi, fj, fk)
                winner, height = -1, zero
                for n in range(count):
                    s = near[n]
                    if not regions[s, 2, 0] <= k < regions[s, 2, 1]:
                        continue
                    low, high = sides[s, 0], sides[s, 1]
                    if u < low[0] or u > high[0] or v < low[1] or v > high[1] or w < low[2] or w > high[2]:
                        continue
                    shape = (shapes[s, 0], shapes[s, 1], shapes[s, 2])
                    mi, gi, _ = _cell((u - low[0]) / (high[0] - low[0]) * 2 - one, kind(shape[0] - 1), half, one, zero)
                    mj, gj, _ = _cell((v - low[1]) / (high[1] - low[1]) * 2 - one, kind(shape[1] - 1), half, one, zero)
                    mk, gk, _ = _cell((w - low[2]) / (high[2] - low[2]) * 2 - one, kind(shape[2] - 1), half, one, zero)
                    score = _trilinear(masks, starts[s], shape, mi, mj, mk, gi, gj, gk) - levels[s]
                    score /= one - levels[s]
                    if score > height:
                        winner, height = s, score
                if winner < 0:
                    continue
                owner[i, j, k] = winner
                counts[i, winner] += 1
                for axis in range(3):
                    mm = to_mm[axis, 0] * i + to_mm[axis, 1] * j + to_mm[axis, 2] * k + to_mm[axis, 3]
                    span = spans[i, winner, axis]
                    span[0] += mm
                    span[1] = min(span[1], mm)
                    span[2] = max(span[2], mm)


def parts_for(batch: int) -> int:
    """How many buffers an adjoint needs so that every thread has work of its own."""
    return max(1, min(8, numba.get_num_threads()) // batch)
