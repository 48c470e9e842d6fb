"""Several labelled exams by vote: each lays its labels over an exam by its own Φ, and counts where it looks alike.

Beside the structures of the library, which are least squares over the same exams (eq. 14). Not in the paper.

Source: Φ_pq of §5.1.1; weights by local similarity as in multi-atlas segmentation.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deepatlas import grid, warp
from deepatlas.checkpoint import Model
from deepatlas.dense import blocks
from deepatlas.locate import Embedded, Found, locate
from deepatlas.prepare import Prepared, prepare_labels
from deepatlas.register import fitted
from deepatlas.volume import Volume, apply

SHARPNESS = 4.0
"""Power of the local similarity in a vote."""

WINDOW = 5
"""Voxels of half the prepared grid over which similarity is taken."""


@dataclass(frozen=True)
class Voter:
    """A labelled exam, ready to vote."""

    embedded: Embedded
    shares: Tensor
    """(structure, n, n, n): how much of each prepared voxel a structure fills."""
    drawn: Tensor
    """(structure,) bool: it was drawn on this exam; elsewhere it has no say about it."""
    fine: Prepared | None = None
    """The exam prepared for a comparison of images; then its Φ is fitted to them."""


def voter(embedded: Embedded, labels: Volume, names: Mapping[str, int], fine: Prepared | None = None) -> Voter:
    """A labelled exam that can vote about structures."""
    shares = torch.from_numpy(prepare_labels(labels, embedded.prepared, list(names.values())))
    return Voter(embedded, shares, shares.flatten(1).amax(dim=1) > 0, fine)


def vote(model: Model, embedded: Embedded, voters: list[Voter], fine: Prepared | None = None) -> Tensor:
    """The share of the votes for each structure, (structure, n, n, n) on the exam's prepared grid, 0 … 1.

    Args:
        fine: the exam prepared for a comparison of images, where voters are as well.
    """
    image = torch.from_numpy(embedded.prepared.image)[None, None]
    features = model.autoencoder.features(image)[0]
    total = torch.zeros_like(voters[0].shares)
    weight = torch.full_like(total, 1e-6)
    for one in voters:
        found = warp.implicit(one.embedded.c_atlas, embedded.c_atlas, one.embedded.foreground, embedded.foreground)
        phi_box = found.phi_box
        if fine is not None and one.fine is not None:
            phi_box = fitted(embedded, one.embedded, phi_box, found.valid[0, 0].numpy(), (fine, one.fine))
        other = torch.from_numpy(one.embedded.prepared.image)[None, None]
        laid = grid.sample(torch.cat([other, one.shares[None]], dim=1), phi_box)
        alike = _local_correlation(model.autoencoder.features(laid[:, :1])[0], features) ** SHARPNESS
        say = (alike * found.valid)[0] * one.drawn.view(-1, 1, 1, 1)
        total += say * laid[0, 1:]
        weight += say
    return total / weight


def locate_by_vote(
    model: Model,
    exam: Volume,
    embedded: Embedded,
    voters: list[Voter],
    names: Mapping[str, int],
    fine: Prepared | None = None,
) -> dict[str, Found]:
    """Structures of the library, whether they are there as `deepatlas.locate.locate` says, where they are by vote.

    Args:
        names: structure → number in the voters' label maps, in their order.
    """
    library = locate(model, exam, names, embedded)
    there = [name for name, one in library.items() if one.status != "absent"]
    owner = masks(vote(model, embedded, voters, fine), embedded, exam)
    voted = {}
    for number, (name, one) in enumerate(library.items()):
        index = np.argwhere(owner == number) if name in there else np.zeros((0, 3), dtype=int)
        if not len(index):
            voted[name] = replace(one, status="absent", confidence=None, owner=None, **NOWHERE)
            continue
        places, half = apply(exam.affine, index), np.abs(exam.affine[:3, :3]).sum(axis=1) / 2
        voted[name] = replace(
            one,
            owner=owner,
            number=number,
            volume_ml=float(len(index) * abs(np.linalg.det(exam.affine[:3, :3])) / 1000),
            centroid_mm=tuple(places.mean(axis=0).tolist()),
            box_mm=(tuple((places.min(axis=0) - half).tolist()), tuple((places.max(axis=0) + half).tolist())),
        )
    return voted


NOWHERE = {"volume_ml": None, "centroid_mm": None, "box_mm": None}


def _local_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of features in windows, 0 … 1, (1, 1, i, j, k)."""
    means = [F.avg_pool3d(f, WINDOW, 1, WINDOW // 2, count_include_pad=False) for f in (a, b, a * a, b * b, a * b)]
    mean_a, mean_b, aa, bb, ab = means
    variance = (aa - mean_a**2).clamp_min(0) * (bb - mean_b**2).clamp_min(0)
    r = (ab - mean_a * mean_b).sum(dim=1, keepdim=True) / (variance.sqrt().sum(dim=1, keepdim=True) + 1e-6)
    return r.clamp(0, 1)


def masks(shares: Tensor, embedded: Embedded, exam: Volume, level: float = 0.5) -> np.ndarray:
    """The structure with the largest share at every voxel of the exam's own grid, counted from 0; −1 below `level`."""
    owner = np.full(exam.shape, -1, dtype=np.int16)
    for block, box in blocks(embedded, exam):
        value, which = (grid.sample(shares[None], box) * grid.inside(box))[0].max(dim=0)
        owner[block] = torch.where(value > level, which, -1).numpy()
    return owner
