"""The self-supervised objective: explicit and implicit registration, both with similarity and smoothness.

Source: §2.3 and §5.1. Where the paper gives no weight, ours were chosen on validation exams (`docs/recipes.md`).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from deepatlas import grid, losses, warp
from deepatlas.autoencoder import Autoencoder, Intensities
from deepatlas.config import Weights
from deepatlas.masks import Masks
from deepatlas.shapes import Coordinates, Features, Image, Mask


class Exams(NamedTuple):
    """A batch on the grid of the loss."""

    image: Image
    foreground: Mask
    """Where the exam shows the patient and the network could see it."""
    mm_per_box: Float[Tensor, "batch 3 3"]
    """Linear part of box → mm, augmentation included: Jacobians are taken from mm to mm."""
    masks: Masks | None = None
    """What is drawn on them, in joint training."""


class Atlas(NamedTuple):
    """The learnable template X."""

    image: Float[Tensor, "1 1 i j k"]
    mm_per_atlas: Float[Tensor, "1 3 3"]
    """Linear part of atlas → mm of the seed exam."""
    masks: Float[Tensor, "1 structure x y z"] | None = None
    """The same structures in the atlas, in joint training: the further channels of X′ (eq. 13)."""


class Terms(NamedTuple):
    """The loss and what it is made of, each a mean over the batch."""

    loss: Tensor
    explicit: Tensor
    """1 − feature correlation of X ∘ c_n and x_n."""
    implicit: Tensor
    edges: Tensor
    smooth_explicit: Tensor
    smooth_implicit: Tensor
    unsolved: Tensor
    labels: Tensor
    """How far drawn structures are off in both registrations; 0 where none are given."""
    folded: Tensor
    """Share of foreground voxels with det ≤ 0 in Φ_E."""
    converged: Tensor
    """Share of the foreground in both exams' views where Φ_I was found."""


def objective(c_atlas: Coordinates, exams: Exams, atlas: Atlas, autoencoder: Autoencoder, weights: Weights) -> Terms:
    """loss_Φ_E + loss_Φ_I of a batch; each exam q is paired with the one before it, p. Source: eq. 2 and 3."""
    target = autoencoder_features(autoencoder, exams.image, exams.mm_per_box)
    explicit = explicit_terms(c_atlas, exams, atlas, autoencoder, target, weights.window)
    implicit = implicit_terms(c_atlas, exams, autoencoder, target, weights.window)
    terms = {
        "explicit": explicit.similarity.mean(),
        "implicit": _mean(implicit.similarity, implicit.overlap),
        "edges": explicit.edges.mean() + _mean(implicit.edges, implicit.overlap),
        "smooth_explicit": explicit.smooth.mean(),
        "smooth_implicit": _mean(implicit.smooth, implicit.overlap),
        "unsolved": _mean(implicit.unsolved, implicit.overlap),
        "labels": explicit.labels.mean() + _mean(implicit.labels, implicit.overlap),
    }
    loss = sum(getattr(weights, name) * value for name, value in terms.items())
    return Terms(
        loss=loss, folded=explicit.folded.mean(), converged=_mean(implicit.converged, implicit.overlap), **terms
    )


class Explicit(NamedTuple):
    """The atlas-to-exam registration, one number per exam."""

    similarity: Tensor
    edges: Tensor
    smooth: Tensor
    folded: Tensor
    labels: Tensor


def explicit_terms(
    c_atlas: Coordinates,
    exams: Exams,
    atlas: Atlas,
    autoencoder: Autoencoder | Intensities,
    target: "Target",
    window: int | None,
    compared: Mask | None = None,
) -> Explicit:
    """``X ∘ Φ_E ~ x_n`` with Φ_E = c_n; ``compared`` is where images are, else in the whole foreground.

    Source: §5.1.2, eq. 3 and 13.
    """
    moved = _warp_atlas(atlas, c_atlas)
    compared = exams.foreground if compared is None else compared
    similarity, edges = _similarity(autoencoder, moved, target, compared, window)
    smooth, folded = losses.smoothness(c_atlas, atlas.mm_per_atlas, exams.mm_per_box, exams.foreground)
    labels = torch.zeros_like(similarity)
    if exams.masks is not None:
        labels = label_errors(atlas, c_atlas, exams.masks)
    return Explicit(similarity, edges, smooth, folded, labels)


def cut_off(c_atlas: Coordinates, foreground: Mask, atlas: Image) -> Mask:
    """Voxels next to a place where the atlas shows the body and the exam shows nothing: the view ends there, not the
    body, and its edge must not be matched as if it were anatomy.

    Source: ours; the paper's exams are whole.
    """
    lacking = (grid.sample(atlas, c_atlas) > BODY) & ~foreground
    return F.max_pool3d(lacking.to(c_atlas.dtype), 3, 1, 1) > 0


BODY = 0.15
"""Value of the atlas, 0 ... 1, from which a place counts as body."""


class ImplicitTerms(NamedTuple):
    """The exam-to-exam registration, one number per pair."""

    similarity: Tensor
    edges: Tensor
    smooth: Tensor
    labels: Tensor
    unsolved: Tensor
    converged: Tensor
    overlap: Tensor
    """1 where the pair shows common anatomy, as far as the maps can tell; the others count for nothing."""


def _mean(values: Tensor, overlap: Tensor) -> Tensor:
    """Mean over the pairs that overlap."""
    return (values * overlap).sum() / overlap.sum().clamp_min(1)


LEAST_OVERLAP = 0.02
"""Share of an exam's foreground that has to lie in the other exam's view."""


def implicit_terms(
    c_atlas: Coordinates, exams: Exams, autoencoder: Autoencoder, target: "Target", window: int | None
) -> ImplicitTerms:
    """``x_p ∘ Φ_I ~ x_q`` with Φ_I = c_p⁻¹ ∘ c_q. Source: §5.1.1, eq. 2 and 12."""

    def partner(x: Tensor) -> Tensor:
        return x.roll(1, dims=0)

    c_p, foreground_p, mm_p = partner(c_atlas), partner(exams.foreground), partner(exams.mm_per_box)
    found = warp.implicit(c_p, c_atlas, foreground_p, exams.foreground)
    moved = grid.sample(torch.cat([partner(exams.image), partner(target.edges)], dim=1), found.phi_box)
    similarity, edges = _similarity(autoencoder, (moved[:, :1], moved[:, 1:]), target, found.valid, window)
    smooth, _ = losses.smoothness(found.phi_box, mm_p, exams.mm_per_box, _erode(found.valid))
    unsolved = _unsolved(c_p, c_atlas, found, foreground_p, exams.foreground)
    solved, reachable, whole = (m.flatten(1).sum(dim=1) for m in (found.valid, found.reachable, exams.foreground))
    overlap = (reachable > LEAST_OVERLAP * whole).to(similarity.dtype)
    labels = torch.zeros_like(similarity)
    if exams.masks is not None:
        inside, known = exams.masks.inside(), exams.masks.known()
        both = known & (grid.sample(partner(known.to(inside)), found.phi_box.detach()) > 0.5) & found.valid
        labels = losses.label_error(grid.sample(partner(inside), found.phi_box), inside, both)
    return ImplicitTerms(similarity, edges, smooth, labels, unsolved, solved / reachable.clamp_min(1), overlap)


class Target(NamedTuple):
    """What a fixed image is compared by; computed once per batch."""

    features: tuple[Features, Features]
    edges: Features


def autoencoder_features(autoencoder: Autoencoder | Intensities, image: Image, mm_per_box: Tensor) -> Target:
    """Features of fixed images, without gradient. Source: §5.1.3."""
    with torch.no_grad():
        return Target(autoencoder.features(image), losses.prewitt(image, spacing_mm(mm_per_box, image)))


def spacing_mm(mm_per_box: Float[Tensor, "batch 3 3"], image: Features) -> Float[Tensor, "batch 3"]:
    """Millimetres between the nodes of a grid along each axis."""
    steps = torch.tensor([2.0 / (n - 1) for n in image.shape[2:]], dtype=mm_per_box.dtype, device=mm_per_box.device)
    return mm_per_box.norm(dim=1) * steps


def _warp_atlas(atlas: Atlas, c_atlas: Coordinates) -> tuple[Image, Features]:
    """X ∘ Φ_E and its edge channel ∘ Φ_E. Source: eq. 8 and 13."""
    shape = tuple(c_atlas.shape[2:])
    coarse = grid.resize(atlas.image, shape)
    edges = losses.prewitt(coarse, spacing_mm(atlas.mm_per_atlas, coarse))
    return grid.sample(atlas.image, c_atlas), grid.sample(edges, c_atlas)


def label_errors(atlas: Atlas, c_atlas: Coordinates, masks: Masks) -> Float[Tensor, "batch"]:
    """The further channels of ``X′ ∘ Φ_E ~ x′_n``, near what is drawn.

    Args:
        c_atlas: maps on a grid of their own, which may be coarser than that of the masks.

    Source: eq. 13.
    """
    errors, places = [], grid.identity(tuple(masks.number.shape[1:]), device=c_atlas.device).flatten(2)
    for exam, near in enumerate(masks.near()):
        there, drawn = grid.sample(c_atlas[exam : exam + 1], places[:, :, near]), masks.points(exam, near)
        moved = grid.sample(atlas.masks, there[:, :, None, None])
        errors.append(losses.label_error(moved, drawn.inside(), drawn.known()))
    return torch.cat(errors)


def _similarity(autoencoder, moved: tuple[Image, Features], target: Target, mask: Tensor, window: int | None):
    """1 − correlation of features, averaged over the two resolutions, and the error of the edge channel, per exam."""
    fine, coarse = autoencoder.features(moved[0])
    weight = mask.to(fine.dtype)
    weight_coarse = grid.resize(weight, tuple(coarse.shape[2:]))
    weight_coarse = weight_coarse * (weight_coarse > 0.5)
    r_fine = losses.correlation(fine, target.features[0], weight, window)
    r_coarse = losses.correlation(coarse, target.features[1], weight_coarse, window and window // 2)
    edges = losses.masked_mean((moved[1] - target.edges).square(), weight)
    return 1 - 0.5 * (r_fine + r_coarse), edges


def _erode(mask: Mask) -> Mask:
    """Voxels whose six neighbours are in the mask too: where central differences are."""
    outside = (~mask).to(torch.float32)
    reach = [F.max_pool3d(outside, kernel, 1, pad) for kernel, pad in _NEIGHBOURS]
    return (reach[0] + reach[1] + reach[2]) == 0


_NEIGHBOURS = (((3, 1, 1), (1, 0, 0)), ((1, 3, 1), (0, 1, 0)), ((1, 1, 3), (0, 0, 1)))


def _unsolved(c_p, c_q, found: warp.Implicit, foreground_p, foreground_q) -> Float[Tensor, "batch"]:
    """Residual of the implicit solve in voxels where it did not converge, per voxel of the whole foreground."""
    failed = found.reachable & ~found.valid
    inverse = warp.inverse_part(c_p, foreground_p)[:, :3, :3]
    gap = c_q - grid.sample(c_p, found.phi_box.detach())
    half = torch.tensor([(n - 1) / 2 for n in c_p.shape[2:]], device=c_p.device).view(1, 3, 1)
    voxels = ((inverse @ gap.flatten(2)) * half).view_as(gap)
    size = (voxels.square().sum(dim=1, keepdim=True) + 1e-12).sqrt()
    total = (losses.huber(size) * failed).flatten(1).sum(dim=1)
    return total / foreground_q.flatten(1).sum(dim=1).clamp_min(1)


def likeness(c_atlas: Coordinates, image: Image, atlas: Tensor, autoencoder: Autoencoder) -> Float[Tensor, "b 1 i j k"]:
    """Likeness of an exam and the atlas aligned to it: local correlation of features, 0 ... 1; 0 where the map folds.

    Args:
        c_atlas: map of the exam, on the grid of ``image``.
        atlas: X, (1, 1, n, n, n).
    """
    with torch.no_grad():
        local = local_correlation(autoencoder, grid.sample(atlas, c_atlas), image)
        return local * (warp.determinant(warp.jacobian(c_atlas))[:, None] > 0)


def local_correlation(autoencoder: Autoencoder, one: Image, other: Image) -> Float[Tensor, "b 1 i j k"]:
    """Correlation of the features of two images in windows of 5 voxels around every voxel, 0 ... 1."""
    a, b = (autoencoder.features(image)[0] for image in (one, other))
    moments = (a, b, a * a, b * b, a * b)
    mean_a, mean_b, aa, bb, ab = (F.avg_pool3d(f, 5, 1, 2, count_include_pad=False) for f in moments)
    variance = (aa - mean_a**2).clamp_min(0) * (bb - mean_b**2).clamp_min(0)
    local = (ab - mean_a * mean_b).sum(dim=1, keepdim=True) / (variance.sqrt().sum(dim=1, keepdim=True) + 1e-6)
    return local.clamp(0, 1)
