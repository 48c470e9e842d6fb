"""Which structure a voxel belongs to, for all structures in one pass; see `deepatlas.locate.locate`."""

import numpy as np
from numba import njit, prange

from deepatlas.kernels_cpu.cells import FAST, cell, held


@njit(inline="always", fastmath=FAST)
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


@njit(inline="always", fastmath=FAST)
def _within(coordinate, low, high, nodes):
    """The cell of an atlas coordinate in a structure's own grid of so many nodes from ``low`` to ``high``."""
    last = type(coordinate)(nodes - 1)
    return cell(held((coordinate - low) / (high - low) * last, last), nodes - 1)


@njit(inline="always", fastmath=FAST)
def _part(coordinate, low, high, parts):
    """Which of so many parts between ``low`` and ``high`` a coordinate within them lies in."""
    return min(int((coordinate - low) / (high - low) * type(coordinate)(parts)), parts - 1)


@njit(inline="always", fastmath=FAST)
def bin_of(hu, bins, count):
    """The bin of an HU; the first and the last are open, NaN is in the first."""
    place = (hu - bins[0]) / bins[1]
    return int(min(place, type(place)(count - 1))) if place > 0 else 0


@njit(parallel=True, fastmath=FAST, cache=True)
def claim(
    fields,
    hu,
    strides,
    to_box,
    to_mm,
    reach,
    least_seen,
    regions,
    masks,
    starts,
    shapes,
    sides,
    levels,
    odds,
    bins,
    near_least,
    owner,
    counts,
    sums,
    spans,
):
    """For every voxel of an exam the structure that exceeds its level most, in one pass; −1 where none does.

    ``fields`` (5, n, n, n) are the exam's map, its prepared HU and its foreground; ``hu`` is the exam itself, flat,
    with ``strides`` from voxel to voxel along each axis. ``odds`` (s, part, part, part, bin, bin) multiplies the odds
    of a mask by what the HU of a voxel and of its surroundings say in that part of its box, in ``bins`` (lowest,
    width). ``to_box`` (3, 4) and ``to_mm`` lead from voxels there and to the patient. Only voxels within ``±reach`` of
    the box and with more than ``least_seen`` of foreground are asked for. Structure s is asked for in the block
    ``regions[s]`` (3, 2) of voxels; its mask lies in ``masks`` from ``starts[s]``, of shape ``shapes[s]``, between the
    atlas coordinates ``sides[s]`` (2, 3). ``counts`` (plane, s) and ``spans`` (plane, s, 3, 3)
    collect how many voxels each got, and of their places in mm the sum, the lowest and the highest; ``sums`` (plane, s,
    2) the membership of all voxels whose mask is above ``near_least``, and of those that it got.
    """
    kind = fields.dtype.type
    one, half, zero = kind(1), kind(0.5), kind(0)
    size = fields.shape[1]
    grid, last = (size, size, size), kind(size - 1)
    field = fields.reshape(5, size**3)
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
                ci, fi = cell(held((x + one) * half * last, last), size - 1)
                cj, fj = cell(held((y + one) * half * last, last), size - 1)
                ck, fk = cell(held((z + one) * half * last, last), size - 1)
                if not _trilinear(field[4], 0, grid, ci, cj, ck, fi, fj, fk) > least_seen:
                    continue
                u = _trilinear(field[0], 0, grid, ci, cj, ck, fi, fj, fk)
                v = _trilinear(field[1], 0, grid, ci, cj, ck, fi, fj, fk)
                w = _trilinear(field[2], 0, grid, ci, cj, ck, fi, fj, fk)
                winner, height, member = -1, zero, zero
                own, around = -1, -1
                for n in range(count):
                    s = near[n]
                    if not regions[s, 2, 0] <= k < regions[s, 2, 1]:
                        continue
                    low, high = sides[s, 0], sides[s, 1]
                    if u < low[0] or u > high[0] or v < low[1] or v > high[1] or w < low[2] or w > high[2]:
                        continue
                    shape = (shapes[s, 0], shapes[s, 1], shapes[s, 2])
                    mi, gi = _within(u, low[0], high[0], shape[0])
                    mj, gj = _within(v, low[1], high[1], shape[1])
                    mk, gk = _within(w, low[2], high[2], shape[2])
                    value = _trilinear(masks, starts[s], shape, mi, mj, mk, gi, gj, gk)
                    if not value > zero:
                        continue
                    if own < 0:
                        own = bin_of(kind(hu[i * strides[0] + j * strides[1] + k * strides[2]]), bins, odds.shape[4])
                        around = bin_of(_trilinear(field[3], 0, grid, ci, cj, ck, fi, fj, fk), bins, odds.shape[4])
                    pi = _part(u, low[0], high[0], odds.shape[1])
                    pj = _part(v, low[1], high[1], odds.shape[1])
                    pk = _part(w, low[2], high[2], odds.shape[1])
                    favoured = value * odds[s, pi, pj, pk, own, around]
                    near_enough = value > near_least
                    value = favoured / (favoured + (one - value))
                    if near_enough:
                        sums[i, s, 0] += value
                    score = (value - levels[s]) / (one - levels[s])
                    if score > height:
                        winner, height, member = s, score, value
                if winner < 0:
                    continue
                owner[i, j, k] = winner
                counts[i, winner] += 1
                sums[i, winner, 1] += member
                for axis in range(3):
                    mm = to_mm[axis, 0] * i + to_mm[axis, 1] * j + to_mm[axis, 2] * k + to_mm[axis, 3]
                    span = spans[i, winner, axis]
                    span[0] += mm
                    span[1] = min(span[1], mm)
                    span[2] = max(span[2], mm)
