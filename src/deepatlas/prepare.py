"""From an exam of any grid to the small cube the network sees, and the affine that leads back.

The cube always runs R, A, S. Its `box` frame is −1…+1 over the centres of its corner voxels, axis x along array axis i,
y along j, z along k; `Prepared.box_to_mm` takes box points to patient space, so that every answer finds its way back
through affines and nothing is ever flipped back.

Source: DeepATLAS (Chang 2024), §5.5.2 (resampling) and §5.5.3 (foreground).
"""

from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from deepatlas.config import CUBE
from deepatlas.errors import ExamError
from deepatlas.volume import Volume, apply, planes_mm, to_ras

AIR_HU = -1024.0
"""What lies outside the field of view, and the floor of every HU: paddings below it are raised to it."""

WINDOW_HU = 256.0
"""The network sees −256…+256 HU as 0…1."""

FOREGROUND_HU = -900.0
FOREGROUND_SIGMA = 0.7
FOREGROUND_LEAST = 0.01
BODY_LEAST = 0.001
"""The first pass of `region="body"`, and a fixed cube, may hold this little: a slab of neck filled 0.6 % of a real
field of view."""

COARSE_SIZE = 64

OBLIQUE = 0.01
"""An exam is oblique where one of its axes leans by so much, as a cosine, towards another axis of the patient."""


@dataclass(frozen=True)
class Prepared:
    """An exam on the prepared grid.

    Attributes:
        hu: HU before any windowing, float32 (n, n, n), axes R, A, S.
        foreground: the patient, bool (n, n, n).
        box_to_mm: box (−1…+1 over the centres of the corner voxels) → mm (RAS+), (4, 4) float64.
    """

    hu: np.ndarray
    foreground: np.ndarray
    box_to_mm: np.ndarray

    @property
    def image(self) -> np.ndarray:
        """What the network sees: HU clipped to ±256 and scaled to 0…1, float32 (n, n, n)."""
        return window(self.hu)

    @property
    def size(self) -> int:
        """Voxels along each axis."""
        return self.hu.shape[0]

    def pooled(self) -> "Prepared":
        """Every 2³ voxels as one: the exam at half the size, in a box half a fine voxel smaller on every side."""
        half = self.size // 2
        hu = self.hu.reshape(half, 2, half, 2, half, 2).mean(axis=(1, 3, 5))
        seen = self.foreground.reshape(half, 2, half, 2, half, 2).mean(axis=(1, 3, 5)) >= 0.5
        shrink = np.diag([(self.size - 2) / (self.size - 1)] * 3 + [1.0])
        return Prepared(hu, seen, self.box_to_mm @ shrink)

    @property
    def volume(self) -> Volume:
        """The prepared HU as a volume with its own voxel → mm affine."""
        return Volume(self.hu, self.box_to_mm @ grid_to_box(self.size))


def window(hu: np.ndarray) -> np.ndarray:
    """Clip HU to ±256 and scale to 0…1, float32."""
    return ((np.clip(hu, -WINDOW_HU, WINDOW_HU) + WINDOW_HU) / (2 * WINDOW_HU)).astype(np.float32)


def grid_to_box(size: int) -> np.ndarray:
    """Index 0…size−1 of the prepared grid → box −1…+1, (4, 4) float64."""
    matrix = np.diag([2.0 / (size - 1)] * 3 + [1.0])
    matrix[:3, 3] = -1.0
    return matrix


def prepare(volume: Volume, size: int = 64, region: str = "body", upright: bool = True) -> Prepared:
    """Bring an exam to the grid the network sees.

    Axes are permuted and flipped to the nearest RAS; HU are interpolated linearly, corners kept, to (2·size)³ and
    averaged over 2³; the foreground is found on the result. An oblique or sheared exam is read along the axes of the
    patient, or the network would see a leaning one. The paper prepares the full extent of the exam
    (`region="exam"`). A slab of neck in a field of view four times as wide then has few voxels left, so by default
    (`region="body"`) a first pass finds the patient, the exam is cut to its bounding box with a margin of one coarse
    voxel, and the cut is prepared. A table that does not touch the patient there is left outside where it can be.
    Where the anatomy of a cohort has about one size, a cube of fixed extent around the centre of that bounding box
    (`region="320mm"`) keeps the scale known; what lies beyond the exam is air.

    Args:
        volume: HU and the affine voxel → mm.
        size: voxels along each axis of the result, at least 4.
        region: "body", "exam", or the edge of a cube such as "320mm".
        upright: read an oblique exam along the patient's axes; else along those of its own that are nearest.

    Raises:
        ExamError: the volume is too thin, or less than 1 % of what is prepared is foreground (of a fixed cube .1 %).

    Source: §5.5.2–3; `region="body"` is ours.
    """
    if size < 4:
        raise ExamError(f"Expected a prepared size of at least 4 voxels, got {size}; 64 is usual.")
    extent_mm = fixed_extent_mm(region)
    if min(volume.shape) < 2:
        raise ExamError(f"Expected at least 2 voxels along each axis, got shape {volume.shape}; pass a whole exam.")
    ras = to_ras(volume)
    if upright and oblique(ras):
        return _along_patient(ras, size, region)
    if extent_mm is not None:
        return _fixed_cube(ras, size, extent_mm)
    if region == "body":
        ras = _cut_to_body(ras)
    hu = _pooled(ras.array, size)
    return Prepared(hu, foreground(hu), ras.affine @ _box_to_voxel(ras.shape, size))


def oblique(volume: Volume) -> bool:
    """Whether an axis of the exam leans away from the patient's, by `OBLIQUE` or more."""
    ras = to_ras(volume)
    leaning = ras.affine[:3, :3] / ras.spacing_mm
    return bool(np.abs(leaning - np.diag(np.diagonal(leaning))).max() >= OBLIQUE)


def prepare_cube(volume: Volume, size: int, box_to_mm: np.ndarray, least: float = FOREGROUND_LEAST) -> Prepared:
    """What an exam shows in a cube that lies anywhere in it, also turned; air where the exam does not reach.

    HU are read linearly at (2·size)³ points and averaged over 2³, as `prepare` does.

    Args:
        box_to_mm: −1 … +1 over the cube, its corners included → mm (RAS), (4, 4).
        least: the share of it that has to be foreground.

    Raises:
        ExamError: hardly any of the patient lies in the cube.

    Source: §5.2.4.
    """
    fine = np.diag([2.0 / (2 * size)] * 3 + [1.0])  # index of a point → box: points stand in the middle of their voxels
    fine[:3, 3] = 0.5 / size - 1.0
    to_mm = box_to_mm @ fine
    hu = np.empty((size,) * 3, dtype=np.float32)
    planes = planes_mm((2 * size,) * 3, to_mm)
    for plane in range(size):
        pair = [sample_mm(volume, next(planes)) for _ in range(2)]
        hu[plane] = np.mean(pair, axis=0).reshape(size, 2, size, 2).mean(axis=(1, 3))
    hu = np.maximum(hu, AIR_HU)
    return Prepared(hu, foreground(hu, least), box_to_mm @ np.diag([(size - 1) / size] * 3 + [1.0]))


def fixed_extent_mm(region: str) -> float | None:
    """The edge of the cube that a region such as "320mm" names; None for "body" and "exam".

    Raises:
        ExamError: anything else.
    """
    if region in ("body", "exam"):
        return None
    if region.startswith(CUBE):
        raise ExamError("The model sees a cube that a coarser model has to find first; give that model instead.")
    number = region.removesuffix("mm")
    if region.endswith("mm") and number.replace(".", "", 1).isdigit() and 16 <= float(number) <= 4000:
        return float(number)
    raise ExamError(f'Expected region "body", "exam" or a cube such as "320mm", got "{region}"; choose one.')


def foreground(hu: np.ndarray, least: float = FOREGROUND_LEAST) -> np.ndarray:
    """The patient in a pooled, unclipped volume: smooth, above −900 HU, holes filled, largest component; bool.

    Raises:
        ExamError: less than `least` of the volume remains, or a value is NaN or infinite.

    Source: §5.5.3.
    """
    if not np.isfinite(hu).all():
        raise ExamError("Expected finite HU, got NaN or infinity; give such voxels the HU of air.")
    smooth = ndimage.gaussian_filter(np.asarray(hu, dtype=np.float32), FOREGROUND_SIGMA, mode="nearest")
    mask = ndimage.binary_fill_holes(smooth > FOREGROUND_HU)
    components, count = ndimage.label(mask)
    if count > 1:
        mask = components == 1 + int(np.argmax(np.bincount(components.ravel())[1:]))
    share = float(mask.mean())
    if share < least:
        raise ExamError(
            f"Expected a patient above {FOREGROUND_HU:.0f} HU in at least {least:.1%} of the exam, found "
            f"{share:.2%}; check that the values are HU and that the exam shows more than air."
        )
    return mask


def sample_mm(volume: Volume, points_mm: np.ndarray, order: str = "linear", outside: float = AIR_HU) -> np.ndarray:
    """Values of a volume at points (..., 3) in mm: float32 for "linear", the volume's own type for "nearest".

    A voxel reaches half a step beyond its centre; points beyond the last voxels, and points that are not finite, get
    `outside`.
    """
    if order not in ("linear", "nearest"):
        raise ExamError(f'Expected order "linear" or "nearest", got "{order}"; choose one of the two.')
    points_mm = np.asarray(points_mm, dtype=np.float64)
    finite = np.isfinite(points_mm).all(axis=-1)
    points = apply(volume.inverse, np.where(finite[..., None], points_mm, 0.0))
    inside = finite & ((points >= -0.5 - 1e-6) & (points <= np.array(volume.shape) - 0.5 + 1e-6)).all(axis=-1)
    points = np.where(inside[..., None], points, 0.0)
    last = np.array(volume.shape) - 1
    if order == "nearest":
        index = np.clip(np.rint(points).astype(np.int64), 0, last)
        values = volume.array[tuple(np.moveaxis(index, -1, 0))]
    else:
        coordinates = np.moveaxis(np.clip(points, 0.0, last), -1, 0)
        values = ndimage.map_coordinates(volume.array, coordinates, output=np.float32, order=1, mode="nearest")
    return np.where(inside, values, np.asarray(outside, dtype=values.dtype))


def _cut_to_body(ras: Volume) -> Volume:
    """The exam within the bounding box of its foreground, widened by one voxel of the coarse grid; a view."""
    mask = foreground(_pooled(ras.array, COARSE_SIZE), BODY_LEAST)
    start = []
    stop = []
    for axis, voxels in enumerate(ras.shape):
        occupied = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        step = (voxels - 1) / (2 * COARSE_SIZE - 1)  # exam voxels in one step of the fine grid
        first = int(np.floor((2 * (occupied[0] - 1) + 0.5) * step))
        last = int(np.ceil((2 * (occupied[-1] + 1) + 0.5) * step))
        start.append(max(first, 0))
        stop.append(min(max(last, start[axis] + 1), voxels - 1) + 1)
    shift = np.eye(4)
    shift[:3, 3] = start
    return Volume(ras.array[tuple(map(slice, start, stop))], ras.affine @ shift)


def _fixed_cube(ras: Volume, size: int, extent_mm: float) -> Prepared:
    """A cube of fixed extent around the centre of the patient's bounding box; air where the exam does not reach."""
    body = _cut_to_body(ras)
    centre = ras.inverse @ body.affine @ np.array([*((np.array(body.shape) - 1) / 2), 1.0])
    step = extent_mm / (2 * size) / ras.spacing_mm  # exam voxels in one step of the fine grid
    places = (np.arange(2 * size) - (2 * size - 1) / 2) * step[:, None] + centre[:3, None]
    weights = [_pooling(points, n) for points, n in zip(places, ras.shape, strict=True)]
    reached = [np.array([sum(row.values()) for row in table]) for table in weights]
    hu = _contract(ras.array, weights)
    hu += np.float32(AIR_HU) * (1 - np.einsum("i,j,k->ijk", *reached)).astype(np.float32)
    box_to_voxel = np.diag([*((size - 1) * step), 1.0])
    box_to_voxel[:3, 3] = centre[:3]
    return Prepared(hu, foreground(hu, BODY_LEAST), ras.affine @ box_to_voxel)


def _along_patient(volume: Volume, size: int, region: str) -> Prepared:
    """An oblique exam in a box along the patient's axes: around all of it, around the patient, or a fixed cube."""
    corners, extent_mm = volume.corners_mm(), fixed_extent_mm(region)
    low, high = corners.min(axis=0), corners.max(axis=0)
    if region != "exam":
        coarse = prepare_cube(volume, COARSE_SIZE, _box_between(low, high), BODY_LEAST)
        occupied = np.argwhere(coarse.foreground)
        ends = np.stack([occupied.min(axis=0) - 1, occupied.max(axis=0) + 1])
        low, high = np.clip(apply(coarse.volume.affine, ends), low, high)
    least = FOREGROUND_LEAST
    if extent_mm is not None:
        centre, least = (low + high) / 2, BODY_LEAST
        low, high = centre - extent_mm / 2, centre + extent_mm / 2
    found = prepare_cube(volume, size, _box_between(low, high), least)
    # the corners of the box are no part of the exam: nothing there is patient, however smooth the foreground
    last = np.array(volume.shape) - 0.5
    planes = planes_mm(found.hu.shape, volume.inverse @ found.volume.affine)  # in voxels of the exam
    reached = np.stack([((plane >= -0.5) & (plane <= last)).all(axis=-1) for plane in planes])
    return replace(found, foreground=found.foreground & reached)


def _box_between(low_mm: np.ndarray, high_mm: np.ndarray) -> np.ndarray:
    """−1 … +1 over a box along the patient's axes → mm, (4, 4) float64."""
    matrix = np.diag([*((high_mm - low_mm) / 2), 1.0])
    matrix[:3, 3] = (low_mm + high_mm) / 2
    return matrix


def _box_to_voxel(shape: tuple[int, int, int], size: int) -> np.ndarray:
    """Box → index of the exam that was prepared, (4, 4) float64."""
    scale = (np.array(shape) - 1.0) / (2 * size - 1)  # exam voxels in one step of the fine grid
    matrix = np.diag([*(scale * (size - 1)), 1.0])
    matrix[:3, 3] = scale * (size - 0.5)
    return matrix


def _pooled(array: np.ndarray, size: int) -> np.ndarray:
    """Linear with corners kept to (2·size)³, then the mean over 2³; float32 (size, size, size)."""
    return _contract(array, [_pooling(np.linspace(0.0, n - 1.0, 2 * size), n) for n in array.shape])


def _pooling(points: np.ndarray, voxels: int) -> list[dict[int, float]]:
    """Interpolation at two neighbouring points and their mean, as weights: per pooled index, voxel → weight.

    Weights that fall outside 0…voxels−1 are dropped, so values outside count as 0.
    """
    rows: list[dict[int, float]] = []
    for pair in points.reshape(-1, 2):
        row: dict[int, float] = {}
        for point in pair:
            low = int(np.floor(point))
            for index, weight in ((low, 1.0 - (point - low)), (low + 1, point - low)):
                if 0 <= index < voxels and weight > 1e-12:
                    row[index] = row.get(index, 0.0) + 0.5 * weight
        rows.append(row)
    return rows


def _contract(array: np.ndarray, weights: list[list[dict[int, float]]]) -> np.ndarray:
    """HU, at least those of air, with one weight table per axis, float32. Neither a float copy of the exam nor the fine
    grid is ever held.

    The axes are taken in the fixed order S, A, R: sums in another order would round differently.
    """
    for axis in (2, 1, 0):
        source = np.moveaxis(array, axis, 0)
        result = np.zeros((len(weights[axis]), *source.shape[1:]), dtype=np.float32)
        for total, row in zip(result, weights[axis], strict=True):
            for index, weight in row.items():
                plane = np.maximum(source[index], AIR_HU) if axis == 2 else source[index]
                total += np.float32(weight) * plane.astype(np.float32)
        array = np.moveaxis(result, 0, axis)
    return np.ascontiguousarray(array)
