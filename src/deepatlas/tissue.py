"""What a structure looks like: how much more often HU occur in it than next to it.

A mask in the atlas knows where a structure lies and nothing of the exam at hand. The HU of a voxel, and of its
surroundings (the prepared exam, whose voxels are means over some millimetres), move the odds of the mask: bone leaves
the tongue to the tongue, air leaves the cord. It comes from the labelled exams that made the mask, by counting, the
same way for every structure. Not in the paper.

Source: ours; the product of a spatial prior and a tissue likelihood, as in unified segmentation.
"""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

LOWEST, WIDTH, BINS = -320.0, 20.0, 47
"""HU of the bins: the first holds everything below -300, the last everything from 600 on."""

WEIGHT = 0.75
"""Neighbouring voxels repeat each other, so their log odds count less than the counts say."""

MOST = 2.0
"""Log odds move by so much at most."""

NEAR = 0.05
"""Membership from which a voxel counts as in or next to a structure."""

RARE = 1e-4
"""Added to the share of every pair of bins, so that what was hardly seen says little."""


def bins_of(hu: np.ndarray) -> np.ndarray:
    """The bin of each HU; NaN is in the first."""
    place = np.nan_to_num((np.asarray(hu, dtype=np.float32) - LOWEST) / WIDTH, nan=0.0, posinf=BINS, neginf=0.0)
    return place.clip(0, BINS - 1).astype(np.int64)


def counted(own: np.ndarray, around: np.ndarray, inside: np.ndarray) -> Float[Tensor, "2 bin bin"]:
    """The shares of pairs of HU outside and inside of a structure in one exam.

    Args:
        own, around: HU of voxels near the structure, and of their surroundings, (point,).
        inside: which of them belong to it, (point,) bool.
    """
    pairs = bins_of(own) * BINS + bins_of(around)
    sides = [np.bincount(pairs[chosen], minlength=BINS**2) for chosen in (~inside, inside)]
    return torch.stack([torch.from_numpy(side / max(1, side.sum())).view(BINS, BINS) for side in sides]).float()


def log_odds(shares: list[Float[Tensor, "2 bin bin"]]) -> Float[Tensor, "bin bin"]:
    """How the HU of a voxel and of its surroundings move the log odds of a structure, from `counted` of its exams.

    An exam counts as much as any other. Shares are smoothed over neighbouring bins.
    """
    mean = torch.stack(shares).mean(dim=0)
    kernel = torch.exp(-0.5 * torch.arange(-3.0, 4.0) ** 2)
    kernel = (kernel[:, None] * kernel) / kernel.sum() ** 2
    outside, inside = F.conv2d(F.pad(mean[:, None], (3, 3, 3, 3), mode="replicate"), kernel[None, None])[:, 0] + RARE
    return (WEIGHT * (inside / outside).log()).clamp(-MOST, MOST)


def moved(membership: Tensor, log_odds: Float[Tensor, "bin bin"], own: np.ndarray, around: np.ndarray) -> Tensor:
    """A membership, 0 ... 1, after the HU of the voxels (and of their surroundings) have spoken."""
    odds = log_odds[torch.from_numpy(bins_of(own)), torch.from_numpy(bins_of(around))].exp()
    favoured = membership * odds
    return favoured / (favoured + 1 - membership)
