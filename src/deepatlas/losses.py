"""Similarity and smoothness: pure functions of tensors, each under a mask, each returning one number per exam.

Source: §5.1.3 to §5.1.6.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from deepatlas import grid
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


def correlation(
    a: Features, b: Features, mask: Float[Tensor, "batch 1 i j k"], window: int | None = None
) -> Float[Tensor, "batch"]:
    """Product-moment correlation under a mask, per exam and channel, averaged over the channels.

    The mask enters here and nowhere earlier: multiplied into the images it would print its own edges into both.

    Args:
        window: None: one correlation over the whole exam, as eq. 9 reads. Else over cubes of so many voxels, half
            overlapping, averaged by how much of the mask each holds. Over the whole exam the contrast of air and
            tissue decides and a blurred atlas scores well; in a window the anatomy has to match
            (`docs/recipes.md` has both). A window that is flat in either map counts about 0.

    Source: eq. 9; which axes the sums run over is not said.
    """
    weight = mask.to(a.dtype)
    whole = _moments(a, b, weight, None)
    if window is None:
        _, covariance, variance_a, variance_b = whole
        return (covariance / (variance_a * variance_b + 1e-12).sqrt()).mean(dim=1)[:, 0, 0, 0]
    share, covariance, variance_a, variance_b = _moments(a, b, weight, window)
    noise_a, noise_b = (FLAT * variance.detach() + 1e-8 for variance in whole[2:])
    r = covariance / ((variance_a + noise_a) * (variance_b + noise_b)).sqrt()
    share = share * (share > 0.05)
    return ((r.mean(dim=1, keepdim=True) * share).flatten(1).sum(dim=1)) / share.flatten(1).sum(dim=1).clamp_min(1e-6)


FLAT = 0.02
"""A window counts as flat where its variance is below this share of the exam's."""


def _moments(a: Features, b: Features, weight: Tensor, window: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Share of the mask, covariance and both variances, over the whole exam or per window."""

    def pooled(x: Tensor) -> Tensor:
        if window is None:
            return x.mean(dim=(2, 3, 4), keepdim=True)
        return F.avg_pool3d(x, window, max(1, window // 2))

    share = pooled(weight)
    scale = 1 / share.clamp_min(1e-6)
    masked_a, masked_b = a * weight, b * weight
    mean_a, mean_b = pooled(masked_a) * scale, pooled(masked_b) * scale
    covariance = pooled(masked_a * b) * scale - mean_a * mean_b
    variance_a = (pooled(masked_a * a) * scale - mean_a**2).clamp_min(0)
    variance_b = (pooled(masked_b * b) * scale - mean_b**2).clamp_min(0)
    return share, covariance, variance_a, variance_b


def prewitt(image: Features, spacing_mm: Float[Tensor, "batch 3"]) -> Features:
    """Magnitude of the Prewitt gradient, per centimetre, so that grids of different spacing agree.

    Source: §5.1.5. It is computed on an image and then warped with it (eq. 12, 13).
    """
    total = torch.zeros_like(image)
    for axis in (2, 3, 4):
        before, _, after = grid.neighbours(image, axis)
        derivative = 0.5 * (after - before)
        for other in {2, 3, 4} - {axis}:
            before, here, after = grid.neighbours(derivative, other)
            derivative = (before + here + after) / 3
        total = total + (derivative * (10.0 / spacing_mm[:, axis - 2].view(-1, 1, 1, 1, 1))) ** 2
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
