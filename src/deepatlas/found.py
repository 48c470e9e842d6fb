"""What was found of a structure in an exam, and how the masks of several answers are brought together."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from deepatlas.volume import Volume, apply

LOW_CONFIDENCE = 0.6
"""An answer below this is flagged (`docs/recipes.md` has confidence against Dice)."""


@dataclass(frozen=True)
class Found:
    """One structure in one exam."""

    name: str
    label: int
    status: str
    """"present", "cut_off" or "absent"."""
    coverage: float
    """Share of the structure's atlas mask whose place lies in the scan."""
    confidence: float | None
    """0 ... 1, the lesser of the Dice that the mask's membership leads one to expect, and the likeness of the aligned
    atlas and the exam around it (0 where the map folds)."""
    volume_ml: float | None
    centroid_mm: tuple[float, float, float] | None
    box_mm: tuple[tuple[float, float, float], tuple[float, float, float]] | None
    """Corners of the axis-aligned box around the mask, RAS mm."""
    owner: np.ndarray | None
    """On the exam's own grid: which structure a voxel belongs to, counted from 0, −1 for none; one array for all that
    was looked for together. None where absent."""
    number: int
    """This structure's number in it."""

    @property
    def unsure(self) -> bool:
        """It was found, but with little confidence."""
        return self.confidence is not None and self.confidence < LOW_CONFIDENCE

    def without_mask(self) -> "Found":
        """The same without its array: of many exams, what can be kept in memory."""
        return replace(self, owner=None)

    @property
    def mask(self) -> np.ndarray | None:
        """Boolean, on the exam's own grid; None where absent. Made anew at every call."""
        return None if self.owner is None else self.owner == self.number


NOWHERE = {"volume_ml": None, "centroid_mm": None, "box_mm": None}


def redrawn(found: dict[str, Found], owner: np.ndarray, exam: Volume) -> dict[str, Found]:
    """The same structures with other masks; one without a voxel left is absent.

    Args:
        owner: which of them a voxel belongs to, counted from 0, −1 for none; on the exam's own grid.
    """
    result = {}
    for number, (name, one) in enumerate(found.items()):
        index = np.argwhere(owner == number) if one.status != "absent" else np.zeros((0, 3), dtype=int)
        if not len(index):
            result[name] = replace(one, status="absent", confidence=None, owner=None, number=-1, **NOWHERE)
            continue
        places = apply(exam.affine, index)
        span = np.stack([places.sum(axis=0), places.min(axis=0), places.max(axis=0)], axis=1)
        result[name] = replace(one, owner=owner, number=number, **extent(len(index), span, exam))
    return result


def extent(count: int, span: np.ndarray, exam: Volume) -> dict[str, Any]:
    """Volume, centroid and box of so many voxels of an exam, from the sum, the lowest and the highest of their places
    in mm, (axis, 3)."""
    half = np.abs(exam.affine[:3, :3]).sum(axis=1) / 2
    return {
        "volume_ml": float(count * abs(np.linalg.det(exam.affine[:3, :3])) / 1000),
        "centroid_mm": tuple((span[:, 0] / count).tolist()),
        "box_mm": (tuple((span[:, 1] - half).tolist()), tuple((span[:, 2] + half).tolist())),
    }
