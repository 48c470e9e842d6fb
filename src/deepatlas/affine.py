"""Homogeneous maps, (batch, 4, 4): build, apply, fit. Composition is ``@``, the inverse `torch.linalg.inv`."""

import torch
from jaxtyping import Float
from torch import Tensor

from deepatlas.shapes import Affine


def apply(matrix: Affine, points: Float[Tensor, "batch 3 *points"]) -> Float[Tensor, "batch 3 *points"]:
    """``matrix @ (x, y, z, 1)`` for every point; a batch of 1 on either side is used for all of the other."""
    flat = points.flatten(2)
    moved = matrix[:, :3, :3] @ flat + matrix[:, :3, 3:]
    return moved.reshape(moved.shape[0], *points.shape[1:])


def from_parts(linear: Float[Tensor, "batch 3 3"], offset: Float[Tensor, "batch 3"]) -> Affine:
    """The map ``x → linear x + offset``."""
    matrix = torch.zeros(linear.shape[0], 4, 4, dtype=linear.dtype, device=linear.device)
    matrix[:, :3, :3], matrix[:, :3, 3], matrix[:, 3, 3] = linear, offset, 1
    return matrix


def rotation(angles: Float[Tensor, "batch 3"]) -> Float[Tensor, "batch 3 3"]:
    """Turns about the first, second and third axis in radians, the third applied first."""
    zero, one = torch.zeros_like(angles[:, 0]), torch.ones_like(angles[:, 0])
    c, s = angles.cos(), angles.sin()
    rows = [
        [one, zero, zero, zero, c[:, 0], -s[:, 0], zero, s[:, 0], c[:, 0]],
        [c[:, 1], zero, s[:, 1], zero, one, zero, -s[:, 1], zero, c[:, 1]],
        [c[:, 2], -s[:, 2], zero, s[:, 2], c[:, 2], zero, zero, zero, one],
    ]
    first, second, third = (torch.stack(row, dim=-1).view(-1, 3, 3) for row in rows)
    return first @ second @ third


def fit(
    source: Float[Tensor, "batch 3 point"],
    target: Float[Tensor, "batch 3 point"],
    weight: Float[Tensor, "batch 1 point"],
    ridge: float = 1e-6,
) -> Affine:
    """The affine map that takes ``source`` to ``target`` with the least weighted sum of squares.

    Where the points do not span the space (or carry no weight) the ridge keeps the answer finite.

    Source: §5.2.4 (`B_T · A ≈ B_n`).
    """
    total = weight.sum(dim=2, keepdim=True).clamp_min(1e-12)
    mean_source = (source * weight).sum(dim=2, keepdim=True) / total
    mean_target = (target * weight).sum(dim=2, keepdim=True) / total
    x, y = source - mean_source, target - mean_target
    covariance = (x * weight) @ x.transpose(1, 2) / total
    scale = covariance.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None].clamp_min(1e-12)
    covariance = covariance + ridge * scale * torch.eye(3, dtype=x.dtype, device=x.device)
    linear = torch.linalg.solve(covariance, (x * weight) @ y.transpose(1, 2) / total).transpose(1, 2)
    return from_parts(linear, (mean_target - linear @ mean_source)[:, :, 0])
