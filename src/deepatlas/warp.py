"""Warps: their Jacobians, and the implicit warp between two coordinate maps with its closed-form gradient.

Source: §5.1.1. The method differs from the printed recursion in its step (a chord start with the inverse of the
moving map, then Newton), in its gradient (the implicit function theorem instead of unrolling) and in that it says
where it failed; `implicit_recursive` keeps the recursion for comparison.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from deepatlas import affine, grid, kernels_cpu
from deepatlas.shapes import Coordinates, Mask

_ON_FACE = 0.1  # voxels: a point on a face of p's box counts as inside when its residual is below this


class Implicit(NamedTuple):
    """An implicit warp and where it can be trusted."""

    phi_box: Coordinates
    """Φ on q's grid: the place in p's box (frame box) whose coordinate is c_q(v). Differentiable in both maps."""
    residual: Float[Tensor, "batch 1 i j k"]
    """|J̄_p⁻¹ (c_q − c_p∘Φ)| in voxels of p's grid; infinite where nothing was solved."""
    valid: Mask
    """Converged to below one voxel, inside p's box, not folded, and foreground in q (and in p, where given)."""
    reachable: Mask
    """Foreground in q whose Φ lies inside p's box and in p's foreground, converged or not."""


def jacobian(field: Coordinates) -> Float[Tensor, "batch 3 3 i j k"]:
    """∂ field / ∂ box by central differences (one-sided at the faces): entry [a, b] is d(channel a)/d(axis b)."""
    spacing = [2.0 / max(n - 1, 1) for n in field.shape[2:]]
    return torch.stack(torch.gradient(field, spacing=spacing, dim=(2, 3, 4)), dim=2)


def determinant(matrix: Float[Tensor, "batch 3 3 *points"]) -> Float[Tensor, "batch *points"]:
    """det of the 3×3 matrices on axes 1 and 2."""
    (a, b, c), (d, e, f), (g, h, i) = (row.unbind(1) for row in matrix.unbind(1))
    return a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)


def to_mm(
    jacobian: Float[Tensor, "batch 3 3 *points"], mm_out: Float[Tensor, "_ 3 3"], mm_in: Float[Tensor, "batch 3 3"]
) -> Float[Tensor, "batch 3 3 *points"]:
    """A Jacobian per box unit as one from mm to mm, so that any rotation is free of cost."""
    turned = mm_out.expand(len(jacobian), 3, 3) @ jacobian.flatten(2)
    turned = turned.unflatten(2, (3, -1)).transpose(1, 2).flatten(2)
    return (torch.linalg.inv(mm_in).mT @ turned).unflatten(2, (3, -1)).transpose(1, 2).reshape(jacobian.shape)


def determinants(
    field: Coordinates, mm_out: Float[Tensor, "_ 3 3"], mm_in: Float[Tensor, "batch 3 3"], mask: Mask
) -> tuple[Float[Tensor, "batch 1 i j k"], Float[Tensor, "batch 1 i j k"]]:
    """det J, the change of volume, and det Ĵ, with its columns made unit vectors; both from mm to mm.

    Args:
        field: a warp or a coordinate map.
        mm_out, mm_in: linear parts of the frames it leads to and from → mm.
        mask: where they are wanted; elsewhere they are 1, and without a gradient.

    Source: eq. 11.
    """
    if grid.has_kernel(field, mm_in):
        out_mm = mm_out.to(field.dtype).expand(len(field), 3, 3).contiguous()
        return _Determinants.apply(field, out_mm, torch.linalg.inv(mm_in).contiguous(), mask)
    return determinants_reference(field, mm_out, mm_in, mask)


def determinants_reference(field, mm_out, mm_in, mask) -> tuple[Tensor, Tensor]:
    """`determinants` in plain PyTorch: what the kernel is held equal to."""
    det, unit = both_determinants(to_mm(jacobian(field), mm_out, mm_in))
    return torch.where(mask, det, 1.0), torch.where(mask, unit, 1.0)


def both_determinants(matrix: Float[Tensor, "batch 3 3 *points"]) -> tuple[Tensor, Tensor]:
    """det J and det Ĵ of Jacobians, (batch, 1, *points)."""
    det = determinant(matrix)[:, None]
    return det, det / matrix.square().sum(dim=1).clamp_min(1e-12).prod(dim=1)[:, None].sqrt()


class _Determinants(torch.autograd.Function):
    @staticmethod
    def forward(ctx, field, out_mm, in_mm, mask):
        wanted = mask.expand(len(field), *mask.shape[1:]).bool()
        det, unit = (torch.empty_like(field[:, :1], memory_format=torch.contiguous_format) for _ in range(2))
        ctx.save_for_backward(field, out_mm, in_mm, wanted)
        kernels_cpu.determinants(
            grid.flat(field),
            tuple(field.shape[2:]),
            out_mm.numpy(),
            in_mm.numpy(),
            grid.flat(wanted)[:, 0],
            grid.flat(det)[:, 0],
            grid.flat(unit)[:, 0],
        )
        return det, unit

    @staticmethod
    def backward(ctx, grad_det, grad_unit):
        field, out_mm, in_mm, wanted = ctx.saved_tensors
        nodes = field[0, 0].numel()
        parts = kernels_cpu.parts_for(len(field), nodes)
        buffers = torch.zeros(parts, len(field), 3, nodes, dtype=field.dtype)
        kernels_cpu.determinants_backward(
            grid.flat(field),
            tuple(field.shape[2:]),
            out_mm.numpy(),
            in_mm.numpy(),
            grid.flat(wanted)[:, 0],
            grid.flat(grad_det)[:, 0],
            grid.flat(grad_unit)[:, 0],
            buffers.numpy(),
        )
        return buffers.sum(0).view_as(field), None, None, None


def linear_part(c_atlas: Coordinates, foreground: Mask | None = None) -> Float[Tensor, "batch 4 4"]:
    """The affine map box → atlas nearest to a coordinate map over the foreground; its linear part is J̄."""
    place = grid.identity(c_atlas.shape[2:], c_atlas.dtype, c_atlas.device).flatten(2)
    values = c_atlas.detach().flatten(2)
    weight = torch.ones_like(values[:, :1]) if foreground is None else foreground.flatten(2).to(values.dtype)
    return affine.fit(place.expand_as(values), values, weight + 1e-6)


def inverse_part(c_atlas: Coordinates, foreground: Mask | None = None) -> Float[Tensor, "batch 4 4"]:
    """The affine map atlas → box nearest to the inverse of a coordinate map; the identity where that is singular."""
    return _safe_inverse(linear_part(c_atlas, foreground))


def implicit(
    c_p: Coordinates,
    c_q: Float[Tensor, "batch 3 *points"],
    foreground_p: Mask | None = None,
    foreground_q: Tensor | None = None,
    steps: int = 8,
    tolerance: float = 1e-3,
) -> Implicit:
    """Find Φ with ``c_p(Φ(v)) = c_q(v)``, that is ``Φ = c_p⁻¹ ∘ c_q``, so that ``x_p ∘ Φ ≈ x_q``.

    Voxels are independent of each other. Each starts at the affine inverse of c_p, takes one chord step, then Newton
    steps on the trilinear interpolant, each accepted only if it brings the residual down (else halved) and never
    longer than 8 voxels. At the solution, with λ = J_p(y)⁻ᵀ g for the incoming gradient g,
    ``∂L/∂c_q = λ`` and ``∂L/∂c_p = −splat(λ, y)``; nothing of the iteration is stored.

    Args:
        c_p: coordinate map of the moving exam, atlas frame, on its grid.
        c_q: coordinates to find, atlas frame: a map on the fixed exam's grid, or any list of points.
        foreground_p, foreground_q: where the maps mean something; outside q's nothing is solved.
        steps: at most so many steps after the start.
        tolerance: a voxel stops when its residual is below this, in voxels of p's grid.

    Returns:
        `Implicit`; nothing is unflagged.

    Source: §5.1.1, eq. 1 and 4-7, read as c_p ∘ Φ = c_q (eq. 1 as printed goes from atlas to atlas).
    """
    trailing = c_q.shape[2:]
    target = c_q.flatten(2)
    if min(c_p.shape[2:]) < 2:
        raise ValueError(f"Expected a map of at least 2 nodes along each axis, got {tuple(c_p.shape[2:])}.")
    if c_p.shape[0] != c_q.shape[0]:
        c_p = c_p.expand(c_q.shape[0], *c_p.shape[1:])
    active = (
        torch.ones_like(target[:, :1], dtype=torch.bool) if foreground_q is None else foreground_q.flatten(2).bool()
    ) & torch.isfinite(target).all(dim=1, keepdim=True)
    forward = _regular(linear_part(c_p, foreground_p))
    inverse = torch.linalg.inv(forward)
    y, residual, det = _Invert.apply(c_p, target, active, forward, inverse, steps, tolerance)
    # a solution held back by a face of the box lies beyond it, unless it solves the equation there
    held = (y.abs() >= 1).any(dim=1, keepdim=True) & (residual[:, None] > _ON_FACE)
    reachable = active & ~held
    if foreground_p is not None:
        reachable = reachable & (grid.sample(foreground_p.to(c_p.dtype), y.detach()) > 0.5)
    sign = torch.sign(determinant(forward[:, :3, :3, None]))[:, None]
    valid = reachable & (residual[:, None] < 1) & (det[:, None] * sign > 0)
    batch = c_q.shape[0]
    return Implicit(
        y.reshape(batch, 3, *trailing),
        residual.reshape(batch, 1, *trailing),
        valid.reshape(batch, 1, *trailing),
        reachable.reshape(batch, 1, *trailing),
    )


def _regular(forward: Tensor) -> Tensor:
    """The affine maps themselves; the identity where one is singular or not finite (an untrained network)."""
    good = torch.linalg.det(forward[:, :3, :3]).abs() > 1e-8
    eye = torch.eye(4, dtype=forward.dtype, device=forward.device).expand_as(forward)
    return torch.where(good[:, None, None], forward, eye)


def _safe_inverse(forward: Tensor) -> Tensor:
    """Inverse of the affine maps; the identity where a map is singular."""
    return torch.linalg.inv(_regular(forward))


def _floor(forward: Tensor) -> Tensor:
    """The least local determinant that a Newton step or a gradient uses: a third of the mean one."""
    return torch.linalg.det(forward[:, :3, :3]) / 3


class _Invert(torch.autograd.Function):
    @staticmethod
    def forward(ctx, c_p, target, active, forward, inverse, steps, tolerance):
        floor = _floor(forward)
        if grid.has_kernel(c_p, target):
            found = kernels_cpu.invert(
                grid.flat(c_p),
                tuple(c_p.shape[2:]),
                grid.flat(target),
                active[:, 0].contiguous().numpy(),
                inverse[:, :3, :3].contiguous().numpy(),
                inverse[:, :3, 3].contiguous().numpy(),
                steps,
                tolerance,
                floor.numpy(),
            )
            y, residual, det = (torch.from_numpy(part) for part in found)
        elif grid.has_gpu_kernel(c_p, target):
            from deepatlas import kernels_gpu

            y, residual, det = kernels_gpu.invert(c_p, target, active[:, 0], inverse, floor, steps, tolerance)
        else:
            y, residual, det = invert_reference(c_p, target, active, inverse, floor, steps, tolerance)
        ctx.save_for_backward(c_p, y, active, forward, floor)
        ctx.mark_non_differentiable(residual, det)
        return y, residual, det

    @staticmethod
    def backward(ctx, grad, _residual, _det):
        c_p, y, active, forward, floor = ctx.saved_tensors
        if grid.has_kernel(c_p, y):
            found = kernels_cpu.invert_backward(
                grid.flat(c_p),
                tuple(c_p.shape[2:]),
                grid.flat(y),
                active[:, 0].contiguous().numpy(),
                forward[:, :3, :3].contiguous().numpy(),
                floor.numpy(),
                grid.flat(grad),
            )
            grad_target, grad_p = (torch.from_numpy(part) for part in found)
            grad_p = grad_p.view(c_p.shape)
        elif grid.has_gpu_kernel(c_p, y):
            from deepatlas import kernels_gpu

            grad_target, grad_p = kernels_gpu.invert_backward(c_p, y, active[:, 0], forward, floor, grad)
        else:
            grad_target = _implicit_gradient(c_p, y, active, forward, floor, grad)
            grad_p = -grid.splat(grad_target, y, tuple(c_p.shape[2:]))
        return grad_p, grad_target, None, None, None, None, None


def local_jacobian(field: Coordinates, points_box: Float[Tensor, "batch 3 point"]) -> Float[Tensor, "batch 3 3 point"]:
    """Jacobian of the trilinear interpolant of a field at points, per box unit (the cell's own, not a mean of two)."""
    shape = field.shape[2:]
    last = torch.tensor([n - 1 for n in shape], dtype=field.dtype, device=field.device).view(1, 3, 1)
    x = ((points_box.clamp(-1, 1) + 1) * 0.5 * last).nan_to_num(0.0)
    node = torch.minimum(x.floor(), last - 1).clamp_min(0)
    f = (x - node)[:, :, None]
    node = node.long()
    flat = field.flatten(2)

    def corner(di: int, dj: int, dk: int) -> Tensor:
        index = ((node[:, 0] + di) * shape[1] + node[:, 1] + dj) * shape[2] + node[:, 2] + dk
        return flat.gather(2, index[:, None].expand(-1, flat.shape[1], -1))

    c = {(a, b, d): corner(a, b, d) for a in (0, 1) for b in (0, 1) for d in (0, 1)}
    fi, fj, fk = f[:, 0], f[:, 1], f[:, 2]

    def mix(v00, v01, v10, v11, s, t):
        return (1 - s) * ((1 - t) * v00 + t * v01) + s * ((1 - t) * v10 + t * v11)

    along_i = mix(*(c[1, b, d] - c[0, b, d] for b in (0, 1) for d in (0, 1)), fj, fk)
    along_j = mix(*(c[a, 1, d] - c[a, 0, d] for a in (0, 1) for d in (0, 1)), fi, fk)
    along_k = mix(*(c[a, b, 1] - c[a, b, 0] for a in (0, 1) for b in (0, 1)), fi, fj)
    return torch.stack([along_i, along_j, along_k], dim=2) * (last * 0.5)[:, None]


def _solve(matrix: Float[Tensor, "batch 3 3 point"], right: Float[Tensor, "batch 3 point"]) -> Tensor:
    moved = matrix.permute(0, 3, 1, 2)
    return torch.linalg.solve(moved, right.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)


def invert_reference(c_p, target, active, inverse, floor, steps: int, tolerance: float):
    """The solve of `implicit` in plain PyTorch: what the kernel is held equal to. Returns y, residual, determinant."""
    last = torch.tensor([n - 1 for n in c_p.shape[2:]], dtype=c_p.dtype, device=c_p.device).view(1, 3, 1)
    linear = inverse[:, :3, :3]

    def voxels(step: Tensor) -> Tensor:
        return (step * last * 0.5).norm(dim=1, keepdim=True)

    start = affine.apply(inverse, target)
    y = start.clamp(-1, 1).nan_to_num(0.0)
    best = y
    residual = torch.full_like(target[:, :1], torch.inf)
    det = torch.zeros_like(residual)
    delta = torch.zeros_like(y)
    eye = torch.eye(3, dtype=c_p.dtype, device=c_p.device)[None, :, :, None]
    for step in range(steps + 1):
        y = y.clamp(-1, 1)
        wanted = target - grid.sample_reference(c_p, y)
        chord = linear @ wanted
        error = voxels(chord)
        going = active & (residual >= tolerance)
        better = going & (error < residual)
        jac = local_jacobian(c_p, y)
        here = determinant(jac)[:, None]
        best = torch.where(better, y, best)
        residual = torch.where(better, error, residual)
        det = torch.where(better, here, det)
        regular = (here >= floor[:, None, None]) & better & (step > 0)
        newton = _solve(torch.where(regular[:, None], jac, eye), wanted)
        proposed = torch.where(regular, newton, chord)
        proposed = proposed * (8 / voxels(proposed).clamp_min(8))
        delta = torch.where(better, proposed, delta * 0.5)
        y = torch.where(going & (residual >= tolerance), best + delta, best)
    best = torch.where(active, best, start)
    residual = torch.where(active, residual, torch.inf)
    return best, residual[:, 0], det[:, 0]


def _implicit_gradient(c_p, y, active, forward, floor, grad):
    """λ = J_p(y)⁻ᵀ g, with the mean Jacobian where the local one is nearly singular."""
    jac = local_jacobian(c_p, y)
    regular = (determinant(jac) >= floor[:, None])[:, None, None]
    jac = torch.where(regular, jac, forward[:, :3, :3, None])
    return torch.where(active, _solve(jac.transpose(1, 2), grad), 0.0)


def implicit_recursive(c_p: Coordinates, c_q: Coordinates, steps: int = 20, printed: bool = False) -> Coordinates:
    """The paper's recursion, unrolled and differentiable: Φ ← Φ + D (c_q − c_p∘Φ), in the box frame.

    Args:
        printed: take D as printed, the mean Jacobian of c_q; else the inverse of the mean Jacobian of c_p, the
            choice of D that converges on turned, cropped and unequal pairs (`tests/test_warp.py` compares them).

    Source: §5.1.1, eq. 5-7.
    """
    if printed:
        direction = jacobian(c_q).flatten(3).mean(dim=3)
    else:
        direction = _safe_inverse(affine.from_parts(jacobian(c_p).flatten(3).mean(dim=3), c_p.new_zeros(len(c_p), 3)))
        direction = direction[:, :3, :3]
    shape = c_q.shape[2:]
    phi = grid.identity(shape, c_q.dtype, c_q.device) + (direction @ (c_q - c_p).flatten(2)).view_as(c_q)
    for _ in range(steps):
        wanted = c_q - grid.sample_reference(c_p, phi)
        phi = phi + (direction @ wanted.flatten(2)).view_as(phi)
    return phi
