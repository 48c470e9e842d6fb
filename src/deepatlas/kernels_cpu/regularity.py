"""Determinants of the Jacobian of a map, from mm to mm, and their adjoint; see `deepatlas.warp.determinants`."""

import numpy as np
from numba import njit, prange

from deepatlas.kernels_cpu.cells import FAST


@njit(inline="always", fastmath=FAST)
def _determinant(m):
    return (
        m[0, 0] * (m[1, 1] * m[2, 2] - m[1, 2] * m[2, 1])
        - m[0, 1] * (m[1, 0] * m[2, 2] - m[1, 2] * m[2, 0])
        + m[0, 2] * (m[1, 0] * m[2, 1] - m[1, 1] * m[2, 0])
    )


@njit(inline="always", fastmath=FAST)
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


@njit(inline="always", fastmath=FAST)
def _column_square(m, c, least):
    return max(m[0, c] * m[0, c] + m[1, c] * m[1, c] + m[2, c] * m[2, c], least)


@njit(parallel=True, fastmath=FAST, cache=True)
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


@njit(parallel=True, fastmath=FAST, cache=True)
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
