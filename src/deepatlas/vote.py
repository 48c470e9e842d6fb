"""Several labelled exams by vote: each lays its labels over an exam by its own Φ, and counts where it looks alike.

Beside the structures of the library, which are least squares over the same exams (eq. 14). Not in the paper.

Source: Φ_pq of §5.1.1; weights by local similarity as in multi-atlas segmentation.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from deepatlas import grid, warp
from deepatlas.checkpoint import Model
from deepatlas.dense import blocks
from deepatlas.locate import Embedded, Found, locate
from deepatlas.prepare import Prepared, sample_mm
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
    labels: Volume
    fine: Prepared | None = None
    """The exam prepared for a comparison of images; then its Φ is fitted to them."""


def vote(
    model: Model,
    exam: Volume,
    embedded: Embedded,
    voters: list[Voter],
    numbers: list[int],
    fine: Prepared | None = None,
) -> np.ndarray:
    """The structure with most votes at every voxel of the exam's own grid, counted from 0; −1 below `LEVEL`.

    A voter has no say about a structure that was not drawn on it.

    Args:
        numbers: of the structures, in the voters' label maps.
        fine: the exam prepared for a comparison of images, where voters are as well.
    """
    fields = [_laid(model, embedded, one, fine) for one in voters]
    drawn = [[bool((one.labels.array == number).any()) for number in numbers] for one in voters]
    owner = np.full(exam.shape, -1, dtype=np.int16)
    for block, box in blocks(embedded, exam):
        votes = np.zeros((len(numbers), *box.shape[2:]), dtype=np.float32)
        voices = np.full_like(votes, 1e-6)
        for one, field, has in zip(voters, fields, drawn, strict=True):
            there = grid.sample(field, box)[0].numpy() * grid.inside(box)[0].numpy()
            say = there[3]
            places_mm = apply(one.embedded.prepared.box_to_mm, np.moveaxis(there[:3], 0, -1))
            found = sample_mm(one.labels, places_mm, order="nearest", outside=0)
            for row in np.flatnonzero(has):
                votes[row] += say * (found == numbers[row])
                voices[row] += say
        share = votes / voices
        owner[block] = np.where(share.max(axis=0) > LEVEL, share.argmax(axis=0), -1)
    return owner


LEVEL = 0.5


def _laid(model: Model, embedded: Embedded, one: Voter, fine: Prepared | None) -> Float[Tensor, "1 4 i j k"]:
    """Φ from the exam to a voter's box, and the weight of its word there: local similarity, 0 where Φ was not found."""
    found = warp.implicit(one.embedded.c_atlas, embedded.c_atlas, one.embedded.foreground, embedded.foreground)
    phi_box = found.phi_box
    if fine is not None and one.fine is not None:
        phi_box = fitted(embedded, one.embedded, phi_box, found.valid[0, 0].numpy(), (fine, one.fine))
    images = (torch.from_numpy(side.prepared.image)[None, None] for side in (embedded, one.embedded))
    own, other = next(images), grid.sample(next(images), phi_box)
    features = [model.autoencoder.features(image)[0] for image in (other, own)]
    return torch.cat([phi_box, _local_correlation(*features) ** SHARPNESS * found.valid], dim=1)


def locate_by_vote(
    model: Model,
    exam: Volume,
    embedded: Embedded,
    voters: list[Voter],
    names: Mapping[str, int],
    fine: Prepared | None = None,
) -> dict[str, Found]:
    """Structures of the library: whether they are there as `deepatlas.locate.locate` says, where they are by vote.

    Args:
        names: structure → number in the voters' label maps.
    """
    owner = vote(model, exam, embedded, voters, list(names.values()), fine)
    voted = {}
    for number, (name, one) in enumerate(locate(model, exam, names, embedded).items()):
        index = np.argwhere(owner == number) if one.status != "absent" else np.zeros((0, 3), dtype=int)
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
