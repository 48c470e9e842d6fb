"""Similarity and smoothness: pure functions of tensors, each under a mask, each returning one number per exam.

Source: §5.1.3 to §5.1.6.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from deepatlas.shapes import Features, Mask
from deepatlas.warp import determinant

HUBER_DELTA = 0.5
"""δ of eq. 10, "for all experiments" (§5.1.4)."""

FOLDED = 0.05
"""Below this determinant the logarithm is continued by its tangent, so that the gradient still unfolds."""


def huber(a: Tensor, delta: float = HUBER_DELTA) -> Tensor:
    """½a² below δ, δ(|a| − ½δ) beyond. Source: eq. 10."""
    size = a.abs()
    return torch.where(size < delta, 0.5 * a * a, delta * (size - 0.5 * delta))


def masked_mean(values: Float[Tensor, "batch 1 i j k"], mask: Float[Tensor, "batch 1 i j k"]) -> Float[Tensor, "batch"]:
    """Mean over the mask per exam; 0 where the mask is empty."""
    weight = mask.to(values.dtype)
    total = weight.flatten(1).sum(dim=1)
    return (torch.where(mask > 0, values, 0.0) * weight).flatten(1).sum(dim=1) / total.clamp_min(1.0)


def correlation(a: Features, b: Features, mask: Float[Tensor, "batch 1 i j k"]) -> Float[Tensor, "batch"]:
    """Product-moment correlation over the masked voxels, per exam and channel, averaged over the channels.

    A channel that is constant in either map under the mask says nothing and counts 0. The mask enters here and
    nowhere earlier: multiplied into the images it would print its own edges into both.

    Source: eq. 9; which axes the sums run over is not said, per exam and channel is our choice.
    """
    weight = mask.to(a.dtype).flatten(2)
    weight = weight / weight.sum(dim=2, keepdim=True).clamp_min(1.0)
    a, b = a.flatten(2), b.flatten(2)
    mean_a, mean_b = (a * weight).sum(dim=2, keepdim=True), (b * weight).sum(dim=2, keepdim=True)
    a, b = a - mean_a, b - mean_b
    weighted_a = a * weight
    covariance = (weighted_a * b).sum(dim=2)
    variance_a, variance_b = (weighted_a * a).sum(dim=2), (b * b * weight).sum(dim=2)
    return (covariance / (variance_a * variance_b + 1e-12).sqrt()).mean(dim=1)


def prewitt(image: Features, spacing_mm: Float[Tensor, "batch 3"]) -> Features:
    """Magnitude of the Prewitt gradient, per centimetre, so that grids of different spacing agree.

    Source: §5.1.5. It is computed on an image and then warped with it (eq. 12, 13).
    """
    total = torch.zeros_like(image)
    smooth, edge = image.new_tensor([1.0, 1.0, 1.0]) / 3, image.new_tensor([-0.5, 0.0, 0.5])
    for axis in range(3):
        derivative = image
        for other in range(3):
            shape = [1, 1, 1, 1, 1]
            shape[2 + other] = 3
            kernel = (edge if other == axis else smooth).view(shape)
            pad = [0, 0, 0, 0, 0, 0]
            pad[2 * (2 - other)] = pad[2 * (2 - other) + 1] = 1
            derivative = F.conv3d(F.pad(derivative, pad, mode="replicate"), kernel)
        total = total + (derivative * (10.0 / spacing_mm[:, axis].view(-1, 1, 1, 1, 1))) ** 2
    return (total + 1e-8).sqrt()


def log_determinant(determinants: Tensor, floor: float = FOLDED) -> Tensor:
    """log of a determinant, continued linearly below ``floor``: finite, and with a gradient, where a map folds."""
    safe = determinants.clamp_min(floor)
    return safe.log() + (determinants - safe) / floor


def smoothness(
    jacobian_mm: Float[Tensor, "batch 3 3 i j k"], mask: Mask
) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"]]:
    """How far a warp is from uniform and from locally rigid, under a mask; and its folded share.

    Args:
        jacobian_mm: Jacobian with both sides in isotropic mm: only then is every rotation free.
        mask: where it counts.

    Returns:
        ``huber(log det J − mean) + huber(log det Ĵ)`` averaged, and the share of masked voxels with det J ≤ 0.

    Source: eq. 10 and 11. The printed target log det Ĵ → 1 cannot be reached (unit columns give det ≤ 1); 0, the
    value of every locally conformal map without shear, is meant.
    """
    det = determinant(jacobian_mm)[:, None]
    uniform = det / masked_mean(det.detach().abs(), mask).clamp_min(1e-6).view(-1, 1, 1, 1, 1)
    log_det = log_determinant(uniform)
    columns = jacobian_mm.square().sum(dim=1).clamp_min(1e-12).sqrt().prod(dim=1)[:, None]
    log_shear = log_determinant(det / columns)
    mean = masked_mean(log_det, mask).view(-1, 1, 1, 1, 1)
    roughness = masked_mean(huber(log_det - mean) + huber(log_shear), mask)
    return roughness, masked_mean((det <= 0).to(det.dtype), mask)
