"""A map Φ from a fixed exam to a moving one, mm → mm (RAS), and what is made from it.

The moved image at x is the moving image at Φ(x). Files follow ITK: transforms in LPS that map points of the fixed image
to the moving one, displacement fields as vectors in LPS mm.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from deepatlas.prepare import AIR_HU, sample_mm
from deepatlas.volume import Volume, apply, planes_mm


@dataclass(frozen=True)
class Transform:
    """Φ: a linear map, and a shift from it at the nodes of a grid."""

    linear: np.ndarray
    """(4, 4)."""
    shift_mm: np.ndarray
    """(3, i, j, k): Φ(x) − linear(x) at the nodes of a grid on the fixed exam; 0 for a linear map."""
    to_mm: np.ndarray
    """Index of those nodes → mm of the fixed exam, (4, 4)."""

    @classmethod
    def affine(cls, matrix: np.ndarray) -> "Transform":
        """A linear map (4, 4) alone."""
        return cls(matrix, np.zeros((3, 1, 1, 1)), np.eye(4))

    def points(self, points_mm: np.ndarray) -> np.ndarray:
        """Φ of points (..., 3) mm of the fixed exam; beyond the grid the shift of the nearest node."""
        if self.shift_mm[0].size == 1:
            return apply(self.linear, points_mm) + self.shift_mm.ravel()
        index = np.moveaxis(apply(np.linalg.inv(self.to_mm), points_mm), -1, 0)
        shift = [ndimage.map_coordinates(part, index, order=1, mode="nearest") for part in self.shift_mm]
        return apply(self.linear, points_mm) + np.stack(shift, axis=-1)

    def determinants(self) -> np.ndarray:
        """det of Φ's Jacobian at the nodes, (i, j, k): the change of volume, ≤ 0 where Φ folds."""
        return np.linalg.det(self.linear[:3, :3] + _gradient(self.shift_mm, self.to_mm))


def moved(
    transform: Transform, fixed: Volume, moving: Volume, labels: bool = False, outside: float = AIR_HU
) -> np.ndarray:
    """The moving image (or label map) on the fixed exam's grid: ``moving ∘ Φ``; `outside` (labels: 0) beyond it."""
    result = np.empty(fixed.shape, dtype=moving.array.dtype if labels else np.float32)
    how = {"order": "nearest", "outside": 0} if labels else {"outside": outside}
    for plane, points in enumerate(planes_mm(fixed.shape, fixed.affine)):
        result[plane] = sample_mm(moving, transform.points(points), **how)
    return result


SLAB = 16
"""Planes of an exam that are differentiated in one go."""


def displacement(transform: Transform, fixed: Volume) -> np.ndarray:
    """Φ(x) − x in mm at every voxel of the fixed exam, as ITK stores it: (i, j, k, 1, 3), LPS, float32."""
    result = np.empty((*fixed.shape, 1, 3), dtype=np.float32)
    for plane, points in enumerate(planes_mm(fixed.shape, fixed.affine)):
        result[plane, :, :, 0] = (transform.points(points) - points) * [-1, -1, 1]
    return result


def jacobian(vectors: np.ndarray, fixed: Volume) -> np.ndarray:
    """det of Φ's Jacobian at every voxel of the fixed exam, (i, j, k) float32, from its `displacement`."""
    result = np.empty(fixed.shape, dtype=np.float32)
    for first in range(0, len(result), SLAB):  # the derivatives of a whole exam take many times its memory
        block = slice(max(first - 1, 0), first + SLAB + 1)
        shift = np.moveaxis(vectors[block, :, :, 0] * [-1, -1, 1], -1, 0)
        found = np.linalg.det(np.eye(3) + _gradient(shift, fixed.affine))
        result[first : first + SLAB] = found[first - block.start :][:SLAB]
    return result


def folded(transform: Transform, fixed: Volume) -> float:
    """Share of the nodes in the fixed image where Φ folds."""
    nodes = np.moveaxis(np.indices(transform.shift_mm.shape[1:]), 0, -1)
    voxels = apply(fixed.inverse @ transform.to_mm, nodes)
    inside = ((voxels >= -0.5 - 1e-6) & (voxels <= np.array(fixed.shape) - 0.5 + 1e-6)).all(axis=-1)
    return float((transform.determinants()[inside] <= 0).mean())


def itk_transform(linear: np.ndarray) -> str:
    """A linear map mm → mm (RAS) as an ITK transform file, LPS, fixed points → moving points."""
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])
    matrix = flip @ linear @ flip
    numbers = [*matrix[:3, :3].ravel(), *matrix[:3, 3]]
    return "\n".join(
        [
            "#Insight Transform File V1.0",
            "#Transform 0",
            "Transform: AffineTransform_double_3_3",
            f"Parameters: {' '.join(f'{number:.12g}' for number in numbers)}",
            "FixedParameters: 0 0 0",
        ]
    )


def inverse_consistency_mm(forward: Transform, backward: Transform, points_mm: np.ndarray) -> np.ndarray:
    """How far points of the fixed exam are from themselves after Φ there and back, (point,) mm."""
    return np.linalg.norm(backward.points(forward.points(points_mm)) - points_mm, axis=-1)


def _gradient(shift_mm: np.ndarray, to_mm: np.ndarray) -> np.ndarray:
    """Derivative per mm of a shift (3, i, j, k) on a grid: (i, j, k, 3, 3), rows are the shift's components."""
    along = np.stack(np.gradient(shift_mm, axis=(1, 2, 3)), axis=-1)
    return np.moveaxis(along, 0, 3) @ np.linalg.inv(to_mm[:3, :3])
