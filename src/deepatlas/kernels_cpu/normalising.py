"""Group normalisation and leaky ReLU in one pass over the voxels, and their adjoint; see `deepatlas.networks`.

Maps are ``(batch, voxel, channel)`` here, the channels of a voxel side by side. PyTorch's own form reads such a map
five times forward and is slow backward.
"""

import numpy as np
from numba import njit, prange

from deepatlas.kernels_cpu.cells import FAST

_BLOCK = 2048
"""Voxels that one task takes at a time."""


def normalise(x: np.ndarray, groups: int, weight: np.ndarray, bias: np.ndarray, leak: float, eps: float):
    """``leaky(scale · x + shift)``, with the scale (batch, channel), mean and 1/deviation (batch, group) it took."""
    batch, voxels, channels = x.shape
    sums = _sums(x, -(-voxels // _BLOCK)).sum(axis=1).reshape(batch, 2, groups, channels // groups).sum(axis=3)
    count = voxels * (channels // groups)
    mean = sums[:, 0] / count
    rstd = 1 / np.sqrt(np.maximum(sums[:, 1] / count - mean**2, 0) + eps)
    scale = np.repeat(rstd, channels // groups, axis=1) * weight
    shift = bias - np.repeat(mean, channels // groups, axis=1) * scale
    scale, shift = scale.astype(x.dtype), shift.astype(x.dtype)
    out = np.empty_like(x)
    _apply(x, scale, shift, x.dtype.type(leak), out)
    return out, scale, shift, mean, rstd


def normalise_backward(grad, x, scale, shift, mean, rstd, weight, leak: float):
    """Gradients to x, weight and bias."""
    batch, voxels, channels = x.shape
    each = channels // mean.shape[1]
    sums = _gradient_sums(grad, x, scale, shift, x.dtype.type(leak), -(-voxels // _BLOCK)).sum(axis=1)
    to_bias, to_product = sums[:, 0], sums[:, 1]  # of g and of g · x, per channel
    mean_c, rstd_c = np.repeat(mean, each, axis=1), np.repeat(rstd, each, axis=1)
    to_weight = (to_product - to_bias * mean_c) * rstd_c
    count = voxels * each

    def over_group(values):
        return np.repeat(values.reshape(batch, -1, each).sum(axis=2), each, axis=1) / count

    # dx = rstd (w g − mean(w g) − x̂ mean(w g x̂)), with x̂ = (x − mean) rstd
    first, second = over_group(weight * to_bias), over_group(weight * to_weight)
    slope = -(rstd_c**2) * second
    offset = -rstd_c * first - slope * mean_c
    out = np.empty_like(x)
    _apply_gradient(grad, x, scale, shift, x.dtype.type(leak), slope.astype(x.dtype), offset.astype(x.dtype), out)
    return out, to_weight.sum(axis=0).astype(x.dtype), to_bias.sum(axis=0).astype(x.dtype)


@njit(parallel=True, fastmath=FAST | {"reassoc"}, cache=True)
def _sums(x, blocks):
    """Sums of x and x² per channel and block, float64: (batch, block, 2, channel)."""
    batch, voxels, channels = x.shape
    sums = np.zeros((batch, blocks, 2, channels))
    for task in prange(batch * blocks):
        b, block = task // blocks, task % blocks
        a, s = np.zeros(channels, x.dtype), np.zeros(channels, x.dtype)
        for n in range(block * _BLOCK, min((block + 1) * _BLOCK, voxels)):
            for c in range(channels):
                value = x[b, n, c]
                a[c] += value
                s[c] += value * value
        sums[b, block, 0] = a
        sums[b, block, 1] = s
    return sums


@njit(parallel=True, fastmath=FAST, cache=True)
def _apply(x, scale, shift, leak, out):
    batch, voxels, channels = x.shape
    blocks = (voxels + _BLOCK - 1) // _BLOCK
    for task in prange(batch * blocks):
        b, block = task // blocks, task % blocks
        for n in range(block * _BLOCK, min((block + 1) * _BLOCK, voxels)):
            for c in range(channels):
                z = x[b, n, c] * scale[b, c] + shift[b, c]
                out[b, n, c] = max(z, leak * z)


@njit(parallel=True, fastmath=FAST | {"reassoc"}, cache=True)
def _gradient_sums(grad, x, scale, shift, leak, blocks):
    """Sums of g and g x per channel and block, with g the gradient before the ReLU."""
    batch, voxels, channels = x.shape
    one = x.dtype.type(1)
    sums = np.zeros((batch, blocks, 2, channels))
    for task in prange(batch * blocks):
        b, block = task // blocks, task % blocks
        a, s = np.zeros(channels, x.dtype), np.zeros(channels, x.dtype)
        for n in range(block * _BLOCK, min((block + 1) * _BLOCK, voxels)):
            for c in range(channels):
                value = x[b, n, c]
                g = grad[b, n, c] * (one if value * scale[b, c] + shift[b, c] > 0 else leak)
                a[c] += g
                s[c] += g * value
        sums[b, block, 0] = a
        sums[b, block, 1] = s
    return sums


@njit(parallel=True, fastmath=FAST, cache=True)
def _apply_gradient(grad, x, scale, shift, leak, slope, offset, out):
    batch, voxels, channels = x.shape
    one = x.dtype.type(1)
    blocks = (voxels + _BLOCK - 1) // _BLOCK
    for task in prange(batch * blocks):
        b, block = task // blocks, task % blocks
        for n in range(block * _BLOCK, min((block + 1) * _BLOCK, voxels)):
            for c in range(channels):
                value = x[b, n, c]
                g = grad[b, n, c] * (one if value * scale[b, c] + shift[b, c] > 0 else leak)
                out[b, n, c] = scale[b, c] * g + slope[b, c] * value + offset[b, c]
