"""Fused Triton kernels of `grid` and `warp` for CUDA tensors: the functions of `kernels_cpu`, one program per block.

Only the sampler, the implicit solve and their adjoints: what else is fused on a CPU is a handful of memory-bound
passes on a GPU. The mathematics is that of `deepatlas.kernels_cpu.sampling` and `.inversion`, and both are held equal
to the plain PyTorch forms; without a GPU the tests run these kernels in Triton's interpreter.

Adjoints add atomically, so their last bits change from run to run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128
SIZES = ["ni", "nj", "nk"]
"""Never made constants: an axis of one node would become the number 1, which has no type."""


def sample(field: Tensor, points: Tensor) -> Tensor:
    """Trilinear values of a field (batch, channel, i, j, k) at points (batch, 3, point): (batch, channel, point)."""
    batch, channels, *shape = field.shape
    field, points = field.contiguous(), points.contiguous()
    count = points.shape[2]
    out = torch.empty(batch, channels, count, dtype=field.dtype, device=field.device)
    _sample[(triton.cdiv(count, BLOCK), batch)](field, points, out, channels, *shape, count, BLOCK)
    return out


def sample_backward(
    field: Tensor, points: Tensor, grad: Tensor, want_field: bool, want_points: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Adjoint of `sample`: gradients to the field and to the points, each None where it is not wanted."""
    batch, channels, *shape = field.shape
    field, points, grad = field.contiguous(), points.contiguous(), grad.contiguous()
    count = points.shape[2]
    grad_field = torch.zeros_like(field) if want_field else None
    grad_points = torch.empty_like(points) if want_points else None
    _sample_backward[(triton.cdiv(count, BLOCK), batch)](
        field,
        points,
        grad,
        grad if grad_field is None else grad_field,
        grad if grad_points is None else grad_points,
        channels,
        *shape,
        count,
        want_field,
        want_points,
        BLOCK,
    )
    return grad_field, grad_points


def invert(
    field: Tensor,
    target: Tensor,
    active: Tensor,
    inverse: Tensor,
    floor: Tensor,
    steps: int,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve ``field(y) = target`` for the active points: y (batch, 3, point), residual in voxels, determinant.

    Args:
        field: (batch, 3, i, j, k).
        active: (batch, point) bool.
        inverse: (batch, 4, 4), the affine inverse of the field.
        floor: (batch,), the least determinant that a Newton step accepts.
    """
    field, target = field.contiguous(), target.contiguous()
    batch, count = target.shape[0], target.shape[2]
    out, residual, determinant = (
        torch.empty_like(target),
        torch.empty_like(target[:, 0]),
        torch.empty_like(target[:, 0]),
    )
    _invert[(triton.cdiv(count, BLOCK), batch)](
        field,
        target,
        active.to(torch.int8).contiguous(),
        inverse[:, :3].to(field.dtype).contiguous(),
        floor.to(field.dtype).contiguous(),
        out,
        residual,
        determinant,
        steps,
        tolerance,
        *field.shape[2:],
        count,
        BLOCK,
    )
    return out, residual, determinant


def invert_backward(
    field: Tensor, points: Tensor, active: Tensor, forward: Tensor, floor: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """λ = J(y)⁻ᵀ g, and ``−splat(λ)`` at y: the gradients to target and field.

    Args:
        forward: (batch, 4, 4), whose linear part is the mean Jacobian, used where the local determinant is below
            ``floor``.
    """
    field, points, grad = field.contiguous(), points.contiguous(), grad.contiguous()
    batch, count = points.shape[0], points.shape[2]
    grad_target, grad_field = torch.empty_like(points), torch.zeros_like(field)
    _invert_backward[(triton.cdiv(count, BLOCK), batch)](
        field,
        points,
        active.to(torch.int8).contiguous(),
        forward[:, :3, :3].to(field.dtype).contiguous(),
        floor.to(field.dtype).contiguous(),
        grad,
        grad_target,
        grad_field,
        *field.shape[2:],
        count,
        BLOCK,
    )
    return grad_target, grad_field


@triton.jit
def _held(x, last):
    """An index, held in 0 ... last; NaN becomes 0."""
    x = tl.where(x > 0, x, 0.0)
    return tl.where(x < last, x, last.to(x.dtype))


@triton.jit
def _cell(x, nodes):
    """Lower node of the cell that holds an index, and the place in the cell."""
    node = tl.minimum(x.to(tl.int32), tl.maximum(nodes - 2, 0))
    return node, x - node.to(x.dtype)


@triton.jit
def _index(points, base, n, count, axis, mask, nodes):
    """A box coordinate as an index, held in the grid, and its slope: 0 where it was held."""
    last = nodes - 1
    half = last * 0.5
    x = tl.load(points + base + axis * count + n, mask=mask, other=0.0)
    x = (x + 1) * half
    slope = tl.where((x > 0) & (x < last), half, 0.0).to(x.dtype)
    return _held(x, last), slope


@triton.jit
def _corners(f, o, si, sj, sk, mask):
    """The values at the lower and the upper k of the four edges of a cell, by (i, j)."""
    a00, b00 = tl.load(f + o, mask=mask, other=0.0), tl.load(f + o + sk, mask=mask, other=0.0)
    a01, b01 = tl.load(f + o + sj, mask=mask, other=0.0), tl.load(f + o + sj + sk, mask=mask, other=0.0)
    o = o + si
    a10, b10 = tl.load(f + o, mask=mask, other=0.0), tl.load(f + o + sk, mask=mask, other=0.0)
    a11, b11 = tl.load(f + o + sj, mask=mask, other=0.0), tl.load(f + o + sj + sk, mask=mask, other=0.0)
    return a00, a01, a10, a11, b00, b01, b10, b11


@triton.jit
def _value_and_slopes(f, o, si, sj, sk, fi, fj, fk, mask):
    """One channel in a cell, and its derivatives per index along i, j and k."""
    a00, a01, a10, a11, b00, b01, b10, b11 = _corners(f, o, si, sj, sk, mask)
    d00, d01, d10, d11 = b00 - a00, b01 - a01, b10 - a10, b11 - a11
    v00, v01, v10, v11 = a00 + d00 * fk, a01 + d01 * fk, a10 + d10 * fk, a11 + d11 * fk
    e0, e1 = v01 - v00, v11 - v10
    v0, v1 = v00 + e0 * fj, v10 + e1 * fj
    d0, d1 = d00 + (d01 - d00) * fj, d10 + (d11 - d10) * fj
    return v0 + (v1 - v0) * fi, v1 - v0, e0 + (e1 - e0) * fi, d0 + (d1 - d0) * fi


@triton.jit
def _push(w, o, si, sj, sk, fi, fj, fk, g, mask):
    """Add g to the eight corners of a cell, by the weights that a sample is made of."""
    g1 = g * fi
    g0 = g - g1
    g01, g11 = g0 * fj, g1 * fj
    g00, g10 = g0 - g01, g1 - g11
    tl.atomic_add(w + o, g00 - g00 * fk, mask=mask)
    tl.atomic_add(w + o + sk, g00 * fk, mask=mask)
    tl.atomic_add(w + o + sj, g01 - g01 * fk, mask=mask)
    tl.atomic_add(w + o + sj + sk, g01 * fk, mask=mask)
    tl.atomic_add(w + o + si, g10 - g10 * fk, mask=mask)
    tl.atomic_add(w + o + si + sk, g10 * fk, mask=mask)
    tl.atomic_add(w + o + si + sj, g11 - g11 * fk, mask=mask)
    tl.atomic_add(w + o + si + sj + sk, g11 * fk, mask=mask)


@triton.jit
def _steps(ni, nj, nk):
    """Steps in a flattened field to the next node of each axis; 0 along an axis of one node."""
    return tl.where(ni > 1, nj * nk, 0), tl.where(nj > 1, nk, 0), tl.where(nk > 1, 1, 0)


@triton.jit(do_not_specialize=SIZES)
def _sample(field, points, out, channels, ni, nj, nk, count, BLOCK: tl.constexpr):
    n, b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    mask = n < count
    si, sj, sk = _steps(ni, nj, nk)
    x, _ = _index(points, b * 3 * count, n, count, 0, mask, ni)
    y, _ = _index(points, b * 3 * count, n, count, 1, mask, nj)
    z, _ = _index(points, b * 3 * count, n, count, 2, mask, nk)
    i, fi = _cell(x, ni)
    j, fj = _cell(y, nj)
    k, fk = _cell(z, nk)
    o = (i * nj + j) * nk + k
    nodes = ni * nj * nk
    for c in range(channels):
        f = field + (b * channels + c) * nodes
        value, _, _, _ = _value_and_slopes(f, o, si, sj, sk, fi, fj, fk, mask)
        tl.store(out + (b * channels + c) * count + n, value, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _sample_backward(
    field,
    points,
    grad,
    grad_field,
    grad_points,
    channels,
    ni,
    nj,
    nk,
    count,
    WANT_FIELD: tl.constexpr,
    WANT_POINTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n, b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    mask = n < count
    si, sj, sk = _steps(ni, nj, nk)
    x, slope_i = _index(points, b * 3 * count, n, count, 0, mask, ni)
    y, slope_j = _index(points, b * 3 * count, n, count, 1, mask, nj)
    z, slope_k = _index(points, b * 3 * count, n, count, 2, mask, nk)
    i, fi = _cell(x, ni)
    j, fj = _cell(y, nj)
    k, fk = _cell(z, nk)
    o = (i * nj + j) * nk + k
    nodes = ni * nj * nk
    to_i, to_j, to_k = tl.zeros_like(x), tl.zeros_like(x), tl.zeros_like(x)
    for c in range(channels):
        g = tl.load(grad + (b * channels + c) * count + n, mask=mask, other=0.0)
        if WANT_POINTS:
            f = field + (b * channels + c) * nodes
            _, along_i, along_j, along_k = _value_and_slopes(f, o, si, sj, sk, fi, fj, fk, mask)
            to_i += g * along_i
            to_j += g * along_j
            to_k += g * along_k
        if WANT_FIELD:
            _push(grad_field + (b * channels + c) * nodes, o, si, sj, sk, fi, fj, fk, g, mask)
    if WANT_POINTS:
        tl.store(grad_points + b * 3 * count + n, to_i * slope_i, mask=mask)
        tl.store(grad_points + b * 3 * count + count + n, to_j * slope_j, mask=mask)
        tl.store(grad_points + b * 3 * count + 2 * count + n, to_k * slope_k, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _invert(
    field,
    target,
    active,
    inverse,
    floor,
    out,
    residual,
    determinant,
    steps,
    tolerance,
    ni,
    nj,
    nk,
    count,
    BLOCK: tl.constexpr,
):
    n, b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    mask = n < count
    wanted = mask & (tl.load(active + b * count + n, mask=mask, other=0) > 0)
    si, sj, sk = _steps(ni, nj, nk)
    nodes = ni * nj * nk
    f = field + b * 3 * nodes
    t0 = tl.load(target + b * 3 * count + n, mask=mask, other=0.0)
    t1 = tl.load(target + b * 3 * count + count + n, mask=mask, other=0.0)
    t2 = tl.load(target + b * 3 * count + 2 * count + n, mask=mask, other=0.0)
    h0, h1, h2 = ((ni - 1) * 0.5).to(t0.dtype), ((nj - 1) * 0.5).to(t0.dtype), ((nk - 1) * 0.5).to(t0.dtype)
    volume = h0 * h1 * h2
    least = tl.load(floor + b) / volume
    a = inverse + b * 12
    r00, r01, r02 = tl.load(a) * h0, tl.load(a + 1) * h0, tl.load(a + 2) * h0
    r10, r11, r12 = tl.load(a + 4) * h1, tl.load(a + 5) * h1, tl.load(a + 6) * h1
    r20, r21, r22 = tl.load(a + 8) * h2, tl.load(a + 9) * h2, tl.load(a + 10) * h2
    start0 = r00 * t0 + r01 * t1 + r02 * t2 + (tl.load(a + 3) + 1) * h0
    start1 = r10 * t0 + r11 * t1 + r12 * t2 + (tl.load(a + 7) + 1) * h1
    start2 = r20 * t0 + r21 * t1 + r22 * t2 + (tl.load(a + 11) + 1) * h2
    y0, y1, y2 = _held(start0, ni - 1), _held(start1, nj - 1), _held(start2, nk - 1)
    b0, b1, b2 = y0, y1, y2
    best, det = tl.full(y0.shape, float("inf"), y0.dtype), tl.zeros_like(y0)
    d0, d1, d2 = tl.zeros_like(y0), tl.zeros_like(y0), tl.zeros_like(y0)
    step = 0
    going = wanted
    while (step <= steps) & (tl.max(going.to(tl.int32), axis=0) > 0):
        i, fi = _cell(y0, ni)
        j, fj = _cell(y1, nj)
        k, fk = _cell(y2, nk)
        o = (i * nj + j) * nk + k
        v0, i0, j0, k0 = _value_and_slopes(f, o, si, sj, sk, fi, fj, fk, going)
        v1, i1, j1, k1 = _value_and_slopes(f + nodes, o, si, sj, sk, fi, fj, fk, going)
        v2, i2, j2, k2 = _value_and_slopes(f + 2 * nodes, o, si, sj, sk, fi, fj, fk, going)
        w0, w1, w2 = t0 - v0, t1 - v1, t2 - v2
        e0 = r00 * w0 + r01 * w1 + r02 * w2
        e1 = r10 * w0 + r11 * w1 + r12 * w2
        e2 = r20 * w0 + r21 * w1 + r22 * w2
        error = tl.sqrt(e0 * e0 + e1 * e1 + e2 * e2)
        better = going & (error < best)
        c0, c1, c2 = j1 * k2 - j2 * k1, j2 * k0 - j0 * k2, j0 * k1 - j1 * k0
        here = i0 * c0 + i1 * c1 + i2 * c2
        best, det = tl.where(better, error, best), tl.where(better, here, det)
        b0, b1, b2 = tl.where(better, y0, b0), tl.where(better, y1, b1), tl.where(better, y2, b2)
        newton = (here >= least) & (step > 0)
        over = 1 / tl.where(newton, here, 1.0)
        p0 = tl.where(newton, (w0 * c0 + w1 * c1 + w2 * c2) * over, e0)
        p1 = tl.where(
            newton,
            (w0 * (k1 * i2 - k2 * i1) + w1 * (k2 * i0 - k0 * i2) + w2 * (k0 * i1 - k1 * i0)) * over,
            e1,
        )
        p2 = tl.where(
            newton,
            (w0 * (i1 * j2 - i2 * j1) + w1 * (i2 * j0 - i0 * j2) + w2 * (i0 * j1 - i1 * j0)) * over,
            e2,
        )
        short = 8 / tl.maximum(tl.sqrt(p0 * p0 + p1 * p1 + p2 * p2), 8.0)
        d0 = tl.where(better, p0 * short, d0 * 0.5)
        d1 = tl.where(better, p1 * short, d1 * 0.5)
        d2 = tl.where(better, p2 * short, d2 * 0.5)
        y0, y1, y2 = _held(b0 + d0, ni - 1), _held(b1 + d1, nj - 1), _held(b2 + d2, nk - 1)
        going = going & (best >= tolerance)
        step += 1
    b0, b1, b2 = tl.where(wanted, b0, start0), tl.where(wanted, b1, start1), tl.where(wanted, b2, start2)
    tl.store(out + b * 3 * count + n, b0 / h0 - 1, mask=mask)
    tl.store(out + b * 3 * count + count + n, b1 / h1 - 1, mask=mask)
    tl.store(out + b * 3 * count + 2 * count + n, b2 / h2 - 1, mask=mask)
    tl.store(residual + b * count + n, best, mask=mask)
    tl.store(determinant + b * count + n, det * volume, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _invert_backward(
    field,
    points,
    active,
    forward,
    floor,
    grad,
    grad_target,
    grad_field,
    ni,
    nj,
    nk,
    count,
    BLOCK: tl.constexpr,
):
    n, b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    mask = n < count
    wanted = mask & (tl.load(active + b * count + n, mask=mask, other=0) > 0)
    si, sj, sk = _steps(ni, nj, nk)
    nodes = ni * nj * nk
    base = b * 3 * count
    x, _ = _index(points, base, n, count, 0, mask, ni)
    y, _ = _index(points, base, n, count, 1, mask, nj)
    z, _ = _index(points, base, n, count, 2, mask, nk)
    i, fi = _cell(x, ni)
    j, fj = _cell(y, nj)
    k, fk = _cell(z, nk)
    o = (i * nj + j) * nk + k
    h0, h1, h2 = ((ni - 1) * 0.5).to(x.dtype), ((nj - 1) * 0.5).to(x.dtype), ((nk - 1) * 0.5).to(x.dtype)
    f = field + b * 3 * nodes
    _, i0, j0, k0 = _value_and_slopes(f, o, si, sj, sk, fi, fj, fk, wanted)
    _, i1, j1, k1 = _value_and_slopes(f + nodes, o, si, sj, sk, fi, fj, fk, wanted)
    _, i2, j2, k2 = _value_and_slopes(f + 2 * nodes, o, si, sj, sk, fi, fj, fk, wanted)
    i0, i1, i2 = i0 * h0, i1 * h0, i2 * h0  # per box unit
    j0, j1, j2 = j0 * h1, j1 * h1, j2 * h1
    k0, k1, k2 = k0 * h2, k1 * h2, k2 * h2
    local = i0 * (j1 * k2 - j2 * k1) + i1 * (j2 * k0 - j0 * k2) + i2 * (j0 * k1 - j1 * k0) >= tl.load(floor + b)
    local = local & wanted
    m = forward + b * 9
    i0, i1, i2 = (
        tl.where(local, i0, tl.load(m)),
        tl.where(local, i1, tl.load(m + 3)),
        tl.where(local, i2, tl.load(m + 6)),
    )
    j0, j1, j2 = (
        tl.where(local, j0, tl.load(m + 1)),
        tl.where(local, j1, tl.load(m + 4)),
        tl.where(local, j2, tl.load(m + 7)),
    )
    k0, k1, k2 = (
        tl.where(local, k0, tl.load(m + 2)),
        tl.where(local, k1, tl.load(m + 5)),
        tl.where(local, k2, tl.load(m + 8)),
    )
    c0, c1, c2 = j1 * k2 - j2 * k1, j2 * k0 - j0 * k2, j0 * k1 - j1 * k0
    over = 1 / (i0 * c0 + i1 * c1 + i2 * c2)
    g0 = tl.load(grad + base + n, mask=wanted, other=0.0) * over
    g1 = tl.load(grad + base + count + n, mask=wanted, other=0.0) * over
    g2 = tl.load(grad + base + 2 * count + n, mask=wanted, other=0.0) * over
    l0 = c0 * g0 + (k1 * i2 - k2 * i1) * g1 + (i1 * j2 - i2 * j1) * g2
    l1 = c1 * g0 + (k2 * i0 - k0 * i2) * g1 + (i2 * j0 - i0 * j2) * g2
    l2 = c2 * g0 + (k0 * i1 - k1 * i0) * g1 + (i0 * j1 - i1 * j0) * g2
    tl.store(grad_target + base + n, l0, mask=mask)
    tl.store(grad_target + base + count + n, l1, mask=mask)
    tl.store(grad_target + base + 2 * count + n, l2, mask=mask)
    w = grad_field + b * 3 * nodes
    _push(w, o, si, sj, sk, fi, fj, fk, -l0, wanted)
    _push(w + nodes, o, si, sj, sk, fi, fj, fk, -l1, wanted)
    _push(w + 2 * nodes, o, si, sj, sk, fi, fj, fk, -l2, wanted)
