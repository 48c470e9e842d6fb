"""Several labelled exams by vote: each lays its labels over an exam by its own Φ, and counts where it looks alike.

Beside the structures of the library, which are least squares over the same exams (eq. 14). Not in the paper.

Source: Φ_pq of §5.1.1; weights by local similarity as in multi-atlas segmentation.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from deepatlas import grid
from deepatlas.checkpoint import Model
from deepatlas.dense import blocks
from deepatlas.embedding import Embedded
from deepatlas.found import Found, redrawn
from deepatlas.locate import locate
from deepatlas.objective import local_correlation
from deepatlas.prepare import Prepared, sample_mm
from deepatlas.register import fitted, matches
from deepatlas.volume import Volume, apply

SHARPNESS = 4.0
"""Power of the local similarity in a vote."""

LEVEL = 0.5
"""A voxel goes to the structure for which more than this share of the votes is."""


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


def _laid(model: Model, embedded: Embedded, one: Voter, fine: Prepared | None) -> Float[Tensor, "1 4 i j k"]:
    """Φ from the exam to a voter's box, and the weight of its word there: local similarity, 0 where Φ was not found."""
    phi_box, valid = matches(embedded, one.embedded)
    if fine is not None and one.fine is not None:
        phi_box = fitted(embedded, one.embedded, phi_box, valid, (fine, one.fine))
    own, other = (torch.from_numpy(side.prepared.image)[None, None] for side in (embedded, one.embedded))
    alike = local_correlation(model.autoencoder, grid.sample(other, phi_box), own)
    return torch.cat([phi_box, alike**SHARPNESS * torch.from_numpy(valid)], dim=1)


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
    return redrawn(locate(model, exam, names, embedded), owner, exam)
