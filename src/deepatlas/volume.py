"""An exam in memory: an array and the affine that says where each voxel lies in the patient.

Two frames meet here. `voxel` is the array index (i, j, k); `mm` is patient space, RAS+: x grows to the patient's
right, y to the front, z to the head. One 4×4 matrix leads from the first to the second, and nothing guesses it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from deepatlas.errors import ExamError


@dataclass(frozen=True)
class Volume:
    """An array (i, j, k) and its affine, voxel → mm (RAS+): oblique, sheared and left-handed ones are welcome.

    Raises:
        ExamError: the array is not three-dimensional, or the affine cannot be inverted.
    """

    array: np.ndarray
    affine: np.ndarray

    def __post_init__(self) -> None:
        """Check the array's rank and the affine, and keep the affine in float64."""
        if np.ndim(self.array) != 3:
            raise ExamError(
                f"Expected an array with three axes (i, j, k), got shape {np.shape(self.array)}; pass one volume."
            )
        object.__setattr__(self, "affine", checked_affine(self.affine))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of voxels along i, j and k."""
        return tuple(self.array.shape)

    @property
    def spacing_mm(self) -> np.ndarray:
        """Length in mm of one step along i, j and k, shape (3,)."""
        return spacing_mm(self.affine)

    @property
    def inverse(self) -> np.ndarray:
        """The affine mm → voxel, (4, 4) float64."""
        return np.linalg.inv(self.affine)

    def corners_mm(self) -> np.ndarray:
        """Centres of the eight corner voxels in mm, shape (8, 3)."""
        return corners_mm(self.shape, self.affine)


def checked_affine(affine: np.ndarray) -> np.ndarray:
    """The affine as a (4, 4) float64 array, or an ExamError that says why it cannot place voxels."""
    matrix = np.array(affine, dtype=np.float64)
    if matrix.shape != (4, 4):
        raise ExamError(f"Expected a 4×4 affine, got shape {matrix.shape}; pass the voxel → mm matrix.")
    if not np.isfinite(matrix).all():
        raise ExamError("Expected a finite affine, got NaN or infinity; give the exam a valid sform or qform.")
    if not np.array_equal(matrix[3], [0.0, 0.0, 0.0, 1.0]):
        raise ExamError(
            f"Expected an affine with last row 0 0 0 1, got {matrix[3].tolist()}; pass a voxel → mm matrix."
        )
    lengths = spacing_mm(matrix)
    if lengths.min() <= 0 or not np.linalg.cond(matrix[:3, :3] / lengths) < 1e3:
        raise ExamError(
            "Expected an affine that can be inverted, got a singular one (two axes coincide, or one has no length); "
            "give the exam a valid sform or qform."
        )
    return matrix


def spacing_mm(affine: np.ndarray) -> np.ndarray:
    """Length in mm of one step along each voxel axis, shape (3,)."""
    return np.linalg.norm(np.asarray(affine, dtype=np.float64)[:3, :3], axis=0)


def apply(affine: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Map points (..., 3) through a 4×4 affine: `p ↦ A p + t`, in float64."""
    matrix = np.asarray(affine, dtype=np.float64)
    return np.asarray(points, dtype=np.float64) @ matrix[:3, :3].T + matrix[:3, 3]


def corners_mm(shape: tuple[int, int, int], affine: np.ndarray) -> np.ndarray:
    """Centres in mm of the eight corner voxels of a grid, shape (8, 3)."""
    ends = [(0, n - 1) for n in shape]
    return apply(affine, np.stack(np.meshgrid(*ends, indexing="ij"), axis=-1).reshape(-1, 3))


def planes_mm(shape: tuple[int, int, int], affine: np.ndarray) -> Iterator[np.ndarray]:
    """Places in mm of a grid's voxels, one plane (j, k, 3) after the other: the whole would take much memory."""
    index = np.moveaxis(np.indices((1, *shape[1:]))[:, 0], 0, -1)
    for plane in range(shape[0]):
        yield apply(affine, index + np.array([plane, 0, 0]))


def ras_order(affine: np.ndarray) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """Which voxel axis runs nearest to R, A and S, and whether it runs the wrong way.

    Of the six ways to give each patient axis one voxel axis, the one with the largest product of the absolute cosines
    between them is taken. A tie, as with a turn of exactly 45°, is settled by the directions themselves and not by the
    storage order, so that the same exam always comes out the same.

    Args:
        affine: voxel → mm, (4, 4).

    Returns:
        `(perm, flips)`: voxel axis `perm[a]` runs along patient axis a (0 R, 1 A, 2 S), against it where `flips[a]`.
    """
    matrix = checked_affine(affine)[:3, :3]
    cosines = matrix / np.linalg.norm(matrix, axis=0)

    def rank(order: tuple[int, int, int]) -> tuple[float, ...]:
        chosen = cosines[:, order]
        diagonal = np.diagonal(chosen)
        aligned = chosen * np.where(diagonal < 0, -1.0, 1.0)
        return (round(float(np.prod(np.abs(diagonal))), 9), *np.round(aligned, 9).ravel().tolist())

    perm = max([(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)], key=rank)
    return perm, tuple(bool(cosines[axis, perm[axis]] < 0) for axis in range(3))


def reorder(volume: Volume, perm: tuple[int, int, int], flips: tuple[bool, bool, bool]) -> Volume:
    """Store the same exam with its axes permuted and then flipped; every voxel keeps its place in mm.

    Axis a of the result is axis `perm[a]` of the input, reversed where `flips[a]`. The array is a view.
    """
    array = np.transpose(volume.array, perm)
    array = array[tuple(slice(None, None, -1) if flip else slice(None) for flip in flips)]
    step = np.zeros((4, 4))  # index in the result -> index in the input
    step[3, 3] = 1.0
    for axis, (source, flip) in enumerate(zip(perm, flips, strict=True)):
        step[source, axis] = -1.0 if flip else 1.0
        step[source, 3] = volume.array.shape[source] - 1 if flip else 0.0
    return Volume(array, volume.affine @ step)


def to_ras(volume: Volume) -> Volume:
    """The same exam with its array axes nearest to R, A and S: nothing is resampled, obliquity stays in the affine."""
    return reorder(volume, *ras_order(volume.affine))
