"""Two exams fitted to each other, both ways: where the points of one lie in the other.

Maps that were fitted to the atlas meet in a mean of many exams. Here each exam's map is fitted to the other exam, laid
in the atlas by its own map. A point goes once by the fitted map of the source and once by that of the target, and lies
in the middle of both places, whose errors differ.

Not in the paper; `docs/recipes.md` has what it gives.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from deepatlas import places
from deepatlas.checkpoint import Model
from deepatlas.config import FINE, Fitting
from deepatlas.embedding import Embedded
from deepatlas.places import Places
from deepatlas.refine import mean_of, refine, template_of
from deepatlas.volume import Volume


class Pair(NamedTuple):
    """Two exams, each with its map and with the one that was fitted to the other exam."""

    source: Embedded
    target: Embedded
    source_fitted: Embedded
    target_fitted: Embedded

    def carry(self, points_mm: np.ndarray) -> Places:
        """Points (point, 3) mm of the source in the target; where one of the two ways finds no place, by the other."""
        ways = [
            places.carry(self.source_fitted, self.target, points_mm),
            places.carry(self.source, self.target_fitted, points_mm),
        ]
        valid = np.stack([way.valid for way in ways])
        weight = np.where(valid.any(axis=0), valid, True)[..., None]
        found = (weight * np.stack([way.points_mm for way in ways])).sum(axis=0) / weight.sum(axis=0)
        return Places(found, valid.any(axis=0))


def fitted(
    model: Model,
    exams: tuple[Volume, Volume],
    maps: tuple[Embedded, Embedded],
    ways: Sequence[Fitting] = (FINE,),
) -> Pair:
    """Fit two exams to each other.

    Args:
        exams, maps: of the source and of the target.
        ways: how to fit; of several the mean is taken.

    Source: ours, see `deepatlas.refine`.
    """

    def fit(exam: Volume, start: Embedded, other: Volume, laid: Embedded) -> Embedded:
        template = template_of(model, other, laid)
        return mean_of([refine(model, exam, start, how, template=template) for how in ways])

    return Pair(*maps, fit(exams[0], maps[0], exams[1], maps[1]), fit(exams[1], maps[1], exams[0], maps[0]))
