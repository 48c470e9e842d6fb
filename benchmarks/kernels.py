"""The sampler and the implicit warp against their plain PyTorch forms, forward and backward."""

import torch
import torch.nn.functional as F

from benchmarks.measure import Row, bound_seconds, device, interleaved, peak_bytes
from deepatlas import grid, warp

SIZE = 64
NEWTON_OPERATIONS = 220
"""Of one Newton step in one voxel: eight corners of three channels, a 3×3 solve, the residual in voxels."""
NEWTON_STEPS = 4
"""A smooth map is solved in about so many."""


def maps(batch: int, size: int = SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    """Two smooth coordinate maps of turned, bent exams whose views differ."""
    where = grid.identity((size,) * 3, device=device())
    found = []
    for seed, amount in ((0, 0.05), (1, 0.08)):
        chance = torch.Generator().manual_seed(seed)
        coarse = (torch.randn(batch, 3, 5, 5, 5, generator=chance) * amount * 0.5).to(device())
        turn = 0.15 * torch.randn(batch, 3, 3, generator=chance).to(device())
        linear = 0.75 * torch.eye(3, device=device()) + 0.3 * (turn - turn.mT)
        found.append((linear @ where.flatten(2)).view(batch, 3, *(size,) * 3) + grid.resize(coarse, (size,) * 3))
    return found[0].contiguous(), found[1].contiguous()


def implicit_warp(batch: int = 4) -> Row:
    """`warp.implicit` against the paper's recursion of 20 steps on `grid_sample`, unrolled by autograd."""
    c_p, c_q = (c.requires_grad_() for c in maps(batch))
    push = torch.randn(c_p.shape, generator=torch.Generator().manual_seed(2)).to(device())

    def ours():
        return torch.autograd.grad(warp.implicit(c_p, c_q).phi_box, (c_p, c_q), push)

    def reference():
        return torch.autograd.grad(warp.implicit_recursive(c_p, c_q, steps=20), (c_p, c_q), push)

    seconds = interleaved(ours, reference, repeats=5, seconds=40)
    memory = [peak_bytes(run) for run in (ours, reference)]
    with torch.no_grad():
        found = warp.implicit(c_p, c_q)
        theirs = warp.implicit_recursive(c_p, c_q, steps=20)
        left = [_left(c_p, c_q, phi, found.valid) for phi in (found.phi_box, theirs)]
    points = batch * SIZE**3
    least = bound_seconds(points * (3 * 2 + 3 + 1 + 3 * 3 + 3 * 2), points * NEWTON_OPERATIONS * (NEWTON_STEPS + 1))
    return Row(
        "implicit_warp",
        *seconds,
        seconds[1] / seconds[0],
        memory[1] / memory[0],
        least / seconds[0],
        f"largest residual where both maps overlap: {left[0]:.1e} voxel, recursion {left[1]:.1e}",
    )


def _left(c_p, c_q, phi, valid) -> float:
    """Largest residual of a solution in voxels."""
    gap = (c_q - grid.sample(c_p, phi)).norm(dim=1, keepdim=True)
    return float(gap[valid].max() / 0.75 * (SIZE - 1) / 2)


def sampler(batch: int) -> Row:
    """`grid.sample` against `grid_sample`, three channels, gradients to the field and to the points."""
    c_p, c_q = maps(batch)
    field, points = c_p.requires_grad_(), c_q.clamp(-1, 1).requires_grad_()
    push = torch.randn(field.shape, generator=torch.Generator().manual_seed(3)).to(device())
    theirs_points = points.detach().permute(0, 2, 3, 4, 1).flip(-1).contiguous().requires_grad_()

    def ours():
        return torch.autograd.grad(grid.sample(field, points), (field, points), push)

    def reference():
        values = F.grid_sample(field, theirs_points, padding_mode="border", align_corners=True)
        return torch.autograd.grad(values, (field, theirs_points), push)

    seconds = interleaved(ours, reference, repeats=9, seconds=15)
    memory = [peak_bytes(run) for run in (ours, reference)]
    values = batch * SIZE**3 * (3 + 3 + 3 + 3 + 3 + 3 + 3)  # points twice, field twice, values, both gradients
    return Row(
        f"sampler_b{batch}",
        *seconds,
        seconds[1] / seconds[0],
        memory[1] / max(memory[0], 1),
        bound_seconds(values) / seconds[0],
    )
