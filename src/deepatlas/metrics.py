"""How well one mask agrees with another, and whether one list of scores beats another.

Pure functions of NumPy arrays. A mask is an array (i, j, k) whose nonzero voxels are inside; two masks share one grid.
Places and distances are in mm, RAS+, through the full voxel → mm affine: anisotropic, oblique, left-handed and sheared
ones included.

What an empty mask gives is fixed here and nowhere else:

| truth | prediction | dice | hd95_mm, centroid_error_mm |
| --- | --- | --- | --- |
| drawn | found | 0…1 | mm |
| drawn | empty | 0 | NaN: no distance exists; `hd95_missing_mm(truth)` is the price to enter instead |
| empty | found | 0 | NaN |
| empty | empty | NaN: nothing was asked | NaN |
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Real, Shaped
from scipy import ndimage, stats
from scipy.spatial import cKDTree

Mask = Shaped[np.ndarray, "i j k"]
Affine = Real[np.ndarray, "4 4"]

_ROUNDING = 1e-12  # differences whose spread is below this share of the values' size are taken for equal


class Interval(NamedTuple):
    """The two ends of an interval, in the unit of the values."""

    low: float
    high: float


class Difference(NamedTuple):
    """Mean of `a − b` over `n` pairs, the interval of that mean, and the two-sided p-value of no difference."""

    mean: float
    low: float
    high: float
    p: float
    n: int


def dice(truth: Mask, prediction: Mask) -> float:
    """Share of two masks that they have in common, `2 |Y ∩ Ŷ| / (|Y| + |Ŷ|)`, from 0 to 1.

    One empty mask gives 0, two empty masks give NaN.

    Source: §5.6.1, eq. 15.

    Raises:
        ValueError: the masks differ in shape.

    >>> truth = np.zeros((4, 4, 4), bool); truth[:2] = True
    >>> prediction = np.zeros((4, 4, 4), bool); prediction[1:3] = True
    >>> dice(truth, prediction)
    0.5
    """
    truth, prediction = _same_grid(truth, prediction)
    total = np.count_nonzero(truth) + np.count_nonzero(prediction)
    return float(2.0 * np.count_nonzero(truth & prediction) / total) if total else float("nan")


def surface_mm(mask: Mask, affine: Affine) -> Float[np.ndarray, "n 3"]:
    """Centres, in mm, of the voxels of a mask that share a face with the outside; beyond the array is outside.

    An empty mask gives shape (0, 3).
    """
    mask = np.asarray(mask).astype(bool)
    box = _box(mask)
    if box is None:
        return np.zeros((0, 3))
    crop = mask[tuple(slice(low, high) for low, high in box)]
    edge = crop & ~ndimage.binary_erosion(crop)  # 6 neighbours; nothing of the mask lies outside its own box
    return _apply(affine, np.argwhere(edge) + box[:, 0])


def directed_hd95_mm(a: Mask, b: Mask, affine: Affine) -> float:
    """95th percentile, over the surface voxels of `a`, of the distance in mm to the nearest surface voxel of `b`.

    Surface voxel centres stand for the surface (`surface_mm`); the percentile interpolates linearly between ranks.
    MONAI computes the same value with `directed=True`, for axis-aligned grids. Not symmetric. NaN where
    either mask is empty.

    Source: §5.6.1, the `HD95(A, B)` of eq. 16.

    Raises:
        ValueError: the masks differ in shape.
    """
    a, b = _same_grid(a, b)
    return _directed(surface_mm(a, affine), surface_mm(b, affine))


def hd95_mm(truth: Mask, prediction: Mask, affine: Affine) -> float:
    """Symmetric 95th percentile Hausdorff distance in mm: the *mean* of the two directed values.

    Implementations disagree on this one number: MONAI and DeepMind's surface-distance take the larger of the two
    directed values, MedPy the percentile of both sets of distances pooled. The paper takes their mean, and so does
    this; it is never above the larger of the two.
    NaN where either mask is empty; `hd95_missing_mm` is what a structure that was not found is charged.

    Source: §5.6.1, eq. 16, `0.5 (HD95(Y, Ŷ) + HD95(Ŷ, Y))`.

    Raises:
        ValueError: the masks differ in shape.

    >>> truth = np.zeros((9, 9, 9), bool); truth[4, 4, 2] = True
    >>> prediction = np.zeros((9, 9, 9), bool); prediction[4, 4, 6] = True
    >>> hd95_mm(truth, prediction, np.diag([1.0, 1.0, 2.5, 1.0]))
    10.0
    """
    truth, prediction = _same_grid(truth, prediction)
    a, b = surface_mm(truth, affine), surface_mm(prediction, affine)
    return 0.5 * (_directed(a, b) + _directed(b, a))


def hd95_missing_mm(truth: Mask, affine: Affine) -> float:
    """What a structure that was drawn but not found is charged as HD95: the diagonal of the truth's own box, in mm.

    The box is the smallest box of whole voxels around the truth, outer faces included, so one voxel has the length of
    its own diagonal. Where shear makes the box's diagonals unequal, the longest counts. NaN for an empty mask.
    The paper does not say what it does here.
    """
    box = _box(np.asarray(truth).astype(bool))
    if box is None:
        return float("nan")
    size = (box[:, 1] - box[:, 0]).astype(float)
    signs = np.array([[1, 1, 1], [-1, 1, 1], [1, -1, 1], [1, 1, -1]])
    return float(np.linalg.norm((signs * size) @ np.asarray(affine, float)[:3, :3].T, axis=1).max())


def centroid_mm(mask: Mask, affine: Affine) -> Float[np.ndarray, "3"]:
    """Mean position of a mask's voxel centres, in mm. Three NaN for an empty mask."""
    mask = np.asarray(mask)
    if not mask.any():
        return np.full(3, np.nan)
    return _apply(affine, np.argwhere(mask).mean(axis=0))


def centroid_error_mm(truth: Mask, prediction: Mask, affine: Affine) -> float:
    """Distance in mm between the centroids of two masks. NaN where either is empty.

    Raises:
        ValueError: the masks differ in shape.
    """
    truth, prediction = _same_grid(truth, prediction)
    return float(np.linalg.norm(centroid_mm(truth, affine) - centroid_mm(prediction, affine)))


def paired_difference(a: Real[np.ndarray, " n"], b: Real[np.ndarray, " n"], level: float = 0.95) -> Difference:
    """Mean of `a − b` over pairs, its confidence interval and the p-value of a paired two-sided t-test.

    A pair with a NaN or an infinity on either side is left out and not counted in `n`. Where the t-test has no answer:

    - no pair: everything is NaN;
    - one pair: the mean is the difference; interval and p are NaN;
    - all differences equal (to rounding): the interval is the mean itself; p is 1 where it is 0, otherwise 0.

    Source: §5.6.2.

    Raises:
        ValueError: the two lists differ in length, or have more than one axis.

    >>> paired_difference(np.array([2.0, 4.0, 6.0]), np.array([1.0, 2.0, 3.0])).mean
    2.0
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(
            f"Expected two lists of equal length, got shapes {a.shape} and {b.shape}; pass one value per pair."
        )
    both = np.isfinite(a) & np.isfinite(b)
    a, b = a[both], b[both]
    difference, n = a - b, int(both.sum())
    nan = float("nan")
    if n == 0:
        return Difference(nan, nan, nan, nan, 0)
    mean = float(difference.mean())
    if n == 1:
        return Difference(mean, nan, nan, nan, 1)
    noise = _ROUNDING * max(np.abs(a).max(), np.abs(b).max())
    spread = float(difference.std(ddof=1))
    if spread <= noise:
        return Difference(mean, mean, mean, 1.0 if abs(mean) <= noise else 0.0, n)
    error = spread / np.sqrt(n)
    reach = float(stats.t.ppf(0.5 + level / 2, n - 1)) * error
    p = 2.0 * float(stats.t.sf(abs(mean) / error, n - 1))
    return Difference(mean, float(mean - reach), float(mean + reach), p, n)


def bootstrap_interval(
    values: Real[np.ndarray, " n"], seed: int = 0, level: float = 0.95, draws: int = 2000
) -> Interval:
    """Percentile bootstrap interval of the mean: resample with replacement, keep the middle `level` of the means.

    The same values and seed give the same interval. NaN and infinite values are left out. Fewer than two values give
    NaN at both ends: one value says nothing about its spread.
    """
    values = np.asarray(values, float).ravel()
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return Interval(float("nan"), float("nan"))
    random = np.random.default_rng(seed)
    means = [values[random.integers(0, len(values), len(values))].mean() for _ in range(draws)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def _directed(a_mm: np.ndarray, b_mm: np.ndarray) -> float:
    """95th percentile of the distances from points (n, 3) to the nearest of (m, 3); NaN where either set is empty."""
    if not len(a_mm) or not len(b_mm):
        return float("nan")
    distances, _ = cKDTree(b_mm).query(a_mm)
    return float(np.percentile(distances, 95))


def _apply(affine: np.ndarray, points: np.ndarray) -> np.ndarray:
    matrix = np.asarray(affine, dtype=float)
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def _box(mask: np.ndarray) -> np.ndarray | None:
    """First index and last index + 1 of the True voxels along each axis, (3, 2); None for an empty mask."""
    box = []
    for axis in range(3):
        hit = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        if not len(hit):
            return None
        box.append((hit[0], hit[-1] + 1))
    return np.array(box)


def _same_grid(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        raise ValueError(f"Expected two masks on one grid, got shapes {a.shape} and {b.shape}; resample one first.")
    return a.astype(bool), b.astype(bool)
