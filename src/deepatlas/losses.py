"""Similarity, smoothness and overlap: pure functions of tensors, each returning one number per exam.

Source: §5.1.3 to §5.1.6; bending energy and overlap: the 2019 system.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from deepatlas import grid, kernels_cpu
from deepatlas.shapes import Coordinates, Features, Mask
from deepatlas.warp import determinants

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
        window: None: one correlation over the whole exam, as eq. 9 reads. Else over cubes of so many voxels (even),
            half overlapping, averaged by how much of the mask each holds. Over the whole exam the contrast of air and
            tissue decides and a blurred atlas scores well; in a window the anatomy has to match
            (`docs/recipes.md` has both). A window that is flat in either map counts about 0.

    Raises:
        ValueError: a window that is odd or smaller than 2 cannot be halved.

    Source: eq. 9; which axes the sums run over is not said.
    """
    if window is not None and (window < 2 or window % 2):
        raise ValueError(f"Expected an even window of at least 2 voxels, got {window}.")
    weight = mask.to(a.dtype)
    if window is None:
        sums = cube_sums(a, b, weight, max(a.shape[2:])).sum(dim=(3, 4, 5), keepdim=True)
        _, covariance, variance_a, variance_b = _moments(sums)
        return (covariance / (variance_a * variance_b + 1e-12).sqrt()).mean(dim=1)[:, 0, 0, 0].to(a.dtype)
    side = window // 2
    sums = cube_sums(a, b, weight, side)
    whole = _moments(sums.detach().sum(dim=(3, 4, 5), keepdim=True))
    noise_a, noise_b = (FLAT * variance + 1e-8 for variance in whole[2:])
    whole_cubes = [n // side for n in a.shape[2:]]
    inner = sums[:, :, :, : whole_cubes[0], : whole_cubes[1], : whole_cubes[2]]
    windows = 8 * F.avg_pool3d(inner.flatten(1, 2), 2, 1).unflatten(1, inner.shape[1:3])
    total, covariance, variance_a, variance_b = _moments(windows)
    r = covariance / ((variance_a + noise_a) * (variance_b + noise_b)).sqrt()
    share = total[:, :1] / (2 * side) ** 3
    share = share * (share > 0.05)
    mean = (r.mean(dim=1, keepdim=True) * share).flatten(1).sum(dim=1) / share.flatten(1).sum(dim=1).clamp_min(1e-6)
    return mean.to(a.dtype)


FLAT = 0.02
"""A window counts as flat where its variance is below this share of the exam's."""


def cube_sums(
    a: Features, b: Features, weight: Float[Tensor, "batch 1 i j k"], side: int
) -> Float[Tensor, "batch channel 6 x y z"]:
    """Sums of w, wa, wb, waa, wbb and wab over cubes of ``side`` voxels, in float64; the last ones may be smaller.

    Differentiable in both maps, not in the weight.
    """
    if grid.has_kernel(a, b, weight):
        return _CubeSums.apply(a, b, weight, side)
    return cube_sums_reference(a, b, weight, side)


def cube_sums_reference(a, b, weight, side: int) -> Tensor:
    """`cube_sums` in plain PyTorch: what the kernel is held equal to."""
    if len(a) > 1:  # exam by exam: six float64 maps per channel of a large batch would pass 2³¹ numbers
        each = zip(a.split(1), b.split(1), weight.split(1), strict=True)
        return torch.cat([cube_sums_reference(*one, side) for one in each])
    a, b, weight = a.double(), b.double(), weight.double().expand_as(a)
    terms = torch.stack([weight, weight * a, weight * b, weight * a * a, weight * b * b, weight * a * b], dim=2)
    missing = [-n % side for n in a.shape[2:]]
    padded = F.pad(terms.flatten(1, 2), (0, missing[2], 0, missing[1], 0, missing[0]))
    return (side**3 * F.avg_pool3d(padded, side)).unflatten(1, terms.shape[1:3])


class _CubeSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, weight, side):
        ctx.save_for_backward(a, b, weight)
        ctx.side = side
        cubes = [-(-n // side) for n in a.shape[2:]]
        out = torch.zeros(*a.shape[:2], 6, *cubes, dtype=torch.float64)
        shape = tuple(a.shape[2:])
        kernels_cpu.moments(grid.flat(a), grid.flat(b), grid.flat(weight), shape, side, out.flatten(3).numpy())
        return out

    @staticmethod
    def backward(ctx, grad):
        a, b, weight = ctx.saved_tensors
        want_b = ctx.needs_input_grad[1]
        grad_a, grad_b = torch.empty_like(a.contiguous()), torch.empty_like(b.contiguous() if want_b else b[:0])
        kernels_cpu.moments_backward(
            *(grid.flat(x) for x in (a, b, weight)),
            tuple(a.shape[2:]),
            ctx.side,
            grad.contiguous().flatten(3).numpy(),
            grad_a.flatten(2).numpy(),
            grad_b.flatten(2).numpy(),
            want_b,
        )
        return grad_a, grad_b if want_b else None, None, None


def _moments(sums: Float[Tensor, "batch channel 6 *cubes"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight, covariance and both variances, from sums as of `cube_sums`."""
    total, a, b, aa, bb, ab = sums.unbind(2)
    scale = 1 / total.clamp_min(1e-6)
    mean_a, mean_b = a * scale, b * scale
    variance_a, variance_b = ((xx * scale - mean**2).clamp_min(0) for xx, mean in ((aa, mean_a), (bb, mean_b)))
    return total, ab * scale - mean_a * mean_b, variance_a, variance_b


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
    field: Coordinates, mm_out: Float[Tensor, "_ 3 3"], mm_in: Float[Tensor, "batch 3 3"], mask: Mask
) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"]]:
    """How far a warp is from uniform and from locally rigid, under a mask; and its folded share.

    Args:
        field: a warp or a coordinate map.
        mm_out, mm_in: linear parts of the frames it leads to and from → mm: only with isotropic units on both sides
            is every rotation free.
        mask: where it counts.

    Returns:
        ``huber(log det J − mean) + huber(log det Ĵ)`` averaged, and the share of masked voxels with det J ≤ 0.

    Source: eq. 10 and 11. The printed target log det Ĵ → 1 cannot be reached (unit columns give det ≤ 1); 0, the
    value of every locally conformal map without shear, is meant.
    """
    return roughness(*determinants(field, mm_out, mm_in, mask), mask)


def roughness(
    det: Float[Tensor, "batch 1 i j k"], unit: Float[Tensor, "batch 1 i j k"], mask: Mask
) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"]]:
    """`smoothness` from det J and det Ĵ. Source: eq. 10 and 11."""
    uniform = det / masked_mean(det.detach().abs(), mask).clamp_min(1e-6).view(-1, 1, 1, 1, 1)
    log_det, log_shear = log_determinant(uniform), log_determinant(unit)
    mean = masked_mean(log_det, mask).view(-1, 1, 1, 1, 1)
    rough = masked_mean(huber(log_det - mean) + huber(log_shear), mask)
    return rough, masked_mean((det <= 0).to(det.dtype), mask)


def label_error(
    moved: Float[Tensor, "batch structure i j k"],
    inside: Float[Tensor, "batch structure i j k"],
    known: Bool[Tensor, "batch structure i j k"],
) -> Float[Tensor, "batch"]:
    """Squared error of warped masks relative to the size of the drawn ones, averaged over the structures drawn.

    0 where all is right, 1 where nothing is found, 2 where it is found elsewhere: a cord counts as much as a mandible.

    Args:
        moved: masks, 0 ... 1, as a warp lays them.
        inside: the drawn ones.
        known: where they are known, see `deepatlas.masks`.

    Source: §5.1.5 (MSE); per structure, because an average over all voxels would forget the small ones.
    """
    error = torch.where(known, moved - inside, 0.0).square().flatten(2).sum(dim=2)
    size = torch.where(known, inside, 0.0).flatten(2).sum(dim=2)
    drawn = (size > 0).to(error)
    return (error / size.clamp_min(1) * drawn).sum(dim=1) / drawn.sum(dim=1).clamp_min(1)


def bending_energy(shift: Coordinates) -> Float[Tensor, "batch"]:
    """Mean squared second derivatives of a displacement, per exam; 0 for every affine one.

    ``Σ_c Σ_ab (∂²u_c / ∂a∂b)²``, by differences of neighbours: in voxels where the displacement is in voxels.

    Source: the 2019 system's L_r.
    """
    total = shift.new_zeros(len(shift))
    for a in (2, 3, 4):
        along = shift.diff(dim=a)
        for b in range(a, 5):
            square = along.diff(dim=b).square().flatten(1).mean(dim=1)
            total = total + (1 if a == b else 2) * 3 * square
    return total


def soft_dice(
    a: Float[Tensor, "batch class i j k"], b: Float[Tensor, "batch class i j k"], mask: Mask | None = None
) -> Float[Tensor, "batch"]:
    """1 − Dice of soft masks, ``2 Σab / (Σa² + Σb²)``, averaged over the classes; 0 where they are equal, soft or not.

    A class that neither holds counts as equal: 1 voxel is added above and below.

    Source: the 2019 system's L_a and L_sp.
    """
    if mask is not None:
        a, b = a * mask, b * mask
    both = (a * b).flatten(2).sum(dim=2)
    each = a.square().flatten(2).sum(dim=2) + b.square().flatten(2).sum(dim=2)
    return 1 - ((2 * both + 1) / (each + 1)).mean(dim=1)
