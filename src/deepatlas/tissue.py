"""What a structure looks like: how much more often HU occur in it than next to it.

A mask in the atlas knows where a structure lies and nothing of the exam at hand. The HU of a voxel, and of its
surroundings (the prepared exam, whose voxels are means over some millimetres), move the odds of the mask: bone leaves
the tongue to the tongue, air leaves the cord. What lies next to a structure differs from side to side (bone behind an
esophagus, air before it), so the box of its mask is split in thirds along each axis, each with its own table. They come
from the labelled exams that made the mask, by counting, the same way for every structure. Not in the paper.

Source: ours; the product of a spatial prior and a tissue likelihood, as in unified segmentation.
"""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

LOWEST, WIDTH, BINS = -320.0, 20.0, 47
"""HU of the bins: the first holds everything below -300, the last everything from 600 on."""

PARTS = 3
"""Parts of a structure's box along each axis."""

WEIGHT = 0.75
"""Neighbouring voxels repeat each other, so their log odds count less than the counts say."""

MOST = 2.0
"""Log odds move by so much at most."""

NEAR = 0.05
"""Membership from which a voxel counts as in or next to a structure."""

RARE = 1e-4
"""Added to the share of every pair of bins, so that what was hardly seen says little."""

LENT = 30.0
"""Each part borrows so many exams' worth of the whole box's counts: from one exam, all parts say nearly the same."""


def bins_of(hu: np.ndarray) -> np.ndarray:
    """The bin of each HU; NaN is in the first."""
    place = np.nan_to_num((np.asarray(hu, dtype=np.float32) - LOWEST) / WIDTH, nan=0.0, posinf=BINS, neginf=0.0)
    return place.clip(0, BINS - 1).astype(np.int64)


def parts_of(own_box: Float[Tensor, "batch 3 *points"]) -> Int[Tensor, "3 batch *points"]:
    """Which part of a structure's box points lie in, along each axis; −1 ... +1 is the box (`Structure.to_own_box`)."""
    return ((own_box + 1) * (PARTS / 2)).long().clamp(0, PARTS - 1).movedim(1, 0)


def counted(
    parts: Int[Tensor, "3 point"], own: np.ndarray, around: np.ndarray, inside: np.ndarray
) -> Float[Tensor, "2 part part part bin bin"]:
    """The shares of parts and pairs of HU outside and inside of a structure in one exam.

    Args:
        parts: where in the structure's box voxels near the structure lie, `parts_of`.
        own, around: HU of these voxels, and of their surroundings, (point,).
        inside: which of them belong to it, (point,) bool.
    """
    shape = (*(PARTS,) * 3, BINS, BINS)
    index = np.ravel_multi_index((*parts.numpy(), bins_of(own), bins_of(around)), shape)
    sides = [np.bincount(index[chosen], minlength=int(np.prod(shape))) for chosen in (~inside, inside)]
    return torch.stack([torch.from_numpy(side / max(1, side.sum())).view(shape) for side in sides]).float()


def log_odds(shares: list[Float[Tensor, "2 part part part bin bin"]]) -> Float[Tensor, "part part part bin bin"]:
    """How the HU of a voxel and of its surroundings move the log odds of a structure in each part of its box, from
    `counted` of its exams.

    An exam counts as much as any other. Shares are smoothed over neighbouring bins.
    """
    mean = torch.stack(shares).mean(dim=0).flatten(1, 3)
    lent = LENT / len(shares) / PARTS**3
    mean = (mean + lent * mean.sum(dim=1, keepdim=True)) / (mean.sum(dim=(2, 3), keepdim=True) + lent)
    kernel = torch.exp(-0.5 * torch.arange(-3.0, 4.0) ** 2)
    kernel = (kernel[:, None] * kernel) / kernel.sum() ** 2
    padded = F.pad(mean.flatten(0, 1)[:, None], (3, 3, 3, 3), mode="replicate")
    outside, inside = F.conv2d(padded, kernel[None, None]).view(mean.shape) + RARE
    return (WEIGHT * (inside / outside).log()).clamp(-MOST, MOST).view(*(PARTS,) * 3, BINS, BINS)


def moved(
    membership: Float[Tensor, "batch 1 *points"],
    log_odds: Float[Tensor, "part part part bin bin"],
    parts: Int[Tensor, "3 batch *points"],
    own: np.ndarray,
    around: np.ndarray,
) -> Float[Tensor, "batch 1 *points"]:
    """A membership, 0 ... 1, after the HU of the voxels (and of their surroundings), each (batch, *points), have
    spoken."""
    odds = log_odds[(*parts, torch.from_numpy(bins_of(own)), torch.from_numpy(bins_of(around)))].exp()[:, None]
    favoured = membership * odds
    return favoured / (favoured + 1 - membership)
