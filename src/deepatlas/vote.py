"""Several labelled exams by vote: each lays its labels over an exam by its own Φ, and counts where it looks alike.

Beside the structures of the library, which are least squares over the same exams (eq. 14). Not in the paper.

Source: Φ_pq of §5.1.1; weights by local similarity as in multi-atlas segmentation.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int16
from torch import Tensor

from deepatlas import grid
from deepatlas.checkpoint import Model
from deepatlas.dense import blocks
from deepatlas.embedding import Embedded, likeness_of
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


class Outcome(NamedTuple):
    """What a vote came to."""

    owner: Int16[np.ndarray, "i j k"]
    """The structure of every voxel, counted from 0; −1 where none has more than `LEVEL`."""
    expected_dice: Float[np.ndarray, "structure"]
    """Dice of each mask if the shares of the votes are probabilities: ``2 Σ_mask p / (|mask| + Σ p)``."""


def vote(
    model: Model,
    exam: Volume,
    embedded: Embedded,
    voters: list[Voter],
    numbers: list[int],
    fine: Prepared | None = None,
) -> Outcome:
    """The structure with most votes at every voxel of the exam's own grid.

    A voter has no say about a structure that was not drawn on it.

    Args:
        numbers: of the structures, in the voters' label maps.
        fine: the exam prepared for a comparison of images, where voters are as well.
    """
    fields = [_laid(model, embedded, one, fine) for one in voters]
    drawn = [[bool((one.labels.array == number).any()) for number in numbers] for one in voters]
    owner = np.full(exam.shape, -1, dtype=np.int16)
    everywhere, own = np.zeros((2, len(numbers)))
    counts = np.zeros(len(numbers), dtype=np.int64)
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
        everywhere += share.sum(axis=(1, 2, 3))
        for row in range(len(numbers)):
            mask = owner[block] == row
            counts[row] += mask.sum()
            own[row] += share[row][mask].sum()
    return Outcome(owner, 2 * own / np.maximum(counts + everywhere, 1e-6))


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

    What no voter has drawn is not told of.

    Args:
        names: structure → number in the voters' label maps.
    """
    names = {name: n for name, n in names.items() if any((one.labels.array == n).any() for one in voters)}
    outcome = vote(model, exam, embedded, voters, list(names.values()), fine)
    found = redrawn(locate(model, exam, names, embedded), outcome.owner, exam)
    alike = likeness_of(model, embedded)
    for (name, one), expected in zip(found.items(), outcome.expected_dice, strict=True):
        if one.status != "absent":
            sure = min(float(expected), alike.around(model.structure(name)))
            found[name] = replace(one, confidence=sure)
    return found
