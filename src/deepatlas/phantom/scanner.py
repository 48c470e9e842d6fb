"""How one exam was taken and stored: field of view, grid, blur, gain, noise, the table, the order on disk."""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

from deepatlas.phantom.bending import Deformation, rotation_of
from deepatlas.phantom.body import BODY
from deepatlas.phantom.looks import Appearance
from deepatlas.phantom.organs import anatomy
from deepatlas.volume import Volume

# Canonical z in mm, low to high, that each field of view is meant to show (before jitter).
FIELDS_OF_VIEW: dict[str, tuple[float, float]] = {
    "whole": (0.0, 980.0),
    "head_neck": (700.0, 980.0),
    "neck_chest": (420.0, 850.0),
    "chest": (375.0, 730.0),
    "chest_abdomen": (200.0, 730.0),
    "abdomen": (210.0, 500.0),
    "abdomen_pelvis": (0.0, 500.0),
    "pelvis": (-10.0, 270.0),
    "trunk": (0.0, 730.0),
}

_LARGEST_AXIS = 130  # voxels


@dataclass(frozen=True)
class Acquisition:
    """How one exam was taken and stored: the voxel grid in the exam's mm, the scanner's faults, the storage order."""

    shape: tuple[int, int, int]  # of the grid before storage order, axes near R, A, S
    affine: np.ndarray  # (4, 4) of that grid, voxel -> RAS+ mm
    storage_order: tuple[int, int, int]  # stored axis n is grid axis storage_order[n]
    storage_flips: tuple[bool, bool, bool]  # of the grid's axes
    blur_voxels: float
    noise_hu: float
    noise_blur_voxels: float
    gain_vectors: np.ndarray  # (2, 3) rad/mm, of the slow change of gain
    gain_phases: np.ndarray  # (2,)
    gain_amplitude: float  # a share of HU + 1000
    table_gap_mm: float
    noise_seed: int


def draw_acquisition(rng: np.random.Generator, deformation: Deformation, field_of_view: str) -> Acquisition:
    """Draw a grid that shows `field_of_view` of the patient, with jitter, anisotropic, sometimes oblique.

    Raises ValueError if `field_of_view` is not a key of `FIELDS_OF_VIEW`.
    """
    low_z, high_z = canonical_range(field_of_view)
    whole = field_of_view == "whole"
    oblique = rng.random() < 0.35
    angles = rng.uniform(-1, 1, 3) * np.radians(3.0 if whole else 8.0)
    axes = rotation_of(angles) if oblique else np.eye(3)

    # The field of view is what the scout image would show: the body's outline, seen from the grid's own axes.
    jitter_mm = rng.uniform(-22, 22, 2) if not whole else np.array([rng.uniform(-25, 25), rng.uniform(5, 30)])
    ends = np.array([[0.0, 0.0, low_z], [0.0, 0.0, high_z]])
    bottom, top = (deformation.from_canonical(ends) @ axes)[:, 2] + jitter_mm
    z = np.linspace(low_z, min(high_z, 970), 24)
    half, front, back = (table(z) for table in BODY[:3])
    middle = (front + back) / 2
    outline = np.concatenate(
        [np.stack(side, -1) for side in ((half, middle, z), (-half, middle, z), (0 * z, front, z), (0 * z, back, z))]
    )
    seen = deformation.from_canonical(outline) @ axes
    low, high = seen.min(0) - np.array([12, 34, 0]), seen.max(0) + np.array([12, 14, 0])
    low[2], high[2] = bottom, top
    if not whole:  # a reconstruction circle narrower than the patient, off its centre
        widest = (high - low)[0] * rng.uniform(0.72, 1.0)
        if field_of_view == "head_neck":
            widest = min(widest, rng.uniform(230, 330))
        centre = (low + high)[0] / 2 + rng.uniform(-0.03, 0.03) * widest
        low[0], high[0] = centre - widest / 2, centre + widest / 2
        low[1] += rng.uniform(-10, 12)
        high[1] += rng.uniform(-14, 14)

    in_plane = rng.uniform(2.9, 4.0)
    spacing_mm = np.array([in_plane, in_plane, rng.uniform(3.0, 6.0)])
    spacing_mm = np.maximum(spacing_mm, (high - low) / (_LARGEST_AXIS - 1))
    spacing_mm[:2] = spacing_mm[:2].max()
    shape = tuple(int(n) for n in np.floor((high - low) / spacing_mm) + 1)
    affine = np.eye(4)
    affine[:3, :3] = axes * spacing_mm
    affine[:3, 3] = axes @ low

    usual = [(False, False, False), (True, True, False), (True, False, False), (True, True, True)]
    if rng.random() < 0.7:
        order, flips = (0, 1, 2), usual[rng.integers(len(usual))]
    else:
        order = tuple(int(axis) for axis in rng.permutation(3))
        flips = tuple(bool(flip) for flip in rng.integers(0, 2, 3))
    directions = rng.standard_normal((2, 3))
    directions *= 2 * np.pi / rng.uniform(300, 700, (2, 1)) / np.linalg.norm(directions, axis=1, keepdims=True)
    return Acquisition(
        shape=shape,
        affine=affine,
        storage_order=order,
        storage_flips=flips,
        blur_voxels=rng.uniform(0.35, 0.6),
        noise_hu=rng.uniform(5, 25),
        noise_blur_voxels=rng.uniform(0.4, 0.8),
        gain_vectors=directions,
        gain_phases=rng.uniform(0, 2 * np.pi, 2),
        gain_amplitude=rng.uniform(0, 0.006),
        table_gap_mm=rng.uniform(9, 14),
        noise_seed=int(rng.integers(2**31)),
    )


def canonical_range(field_of_view: str) -> tuple[float, float]:
    if field_of_view not in FIELDS_OF_VIEW:
        raise ValueError(f"field_of_view: expected one of {', '.join(FIELDS_OF_VIEW)}; got {field_of_view!r}")
    return FIELDS_OF_VIEW[field_of_view]


def acquire(deformation: Deformation, appearance: Appearance, acquisition: Acquisition) -> tuple[Volume, Volume]:
    """Scan: the image (int16 HU) and its labels (uint8), as stored. Nothing is left to chance here."""
    grid = np.moveaxis(np.indices(acquisition.shape, dtype=np.float64), 0, -1)
    points_mm = grid @ acquisition.affine[:3, :3].T + acquisition.affine[:3, 3]
    hu, label = anatomy(deformation.to_canonical(points_mm), appearance)

    # The table is the scanner's, not the patient's: level in exam mm, a gap below the lowest skin.
    body = hu > -999
    if body.any():
        y_mm, x_mm = points_mm[..., 1], points_mm[..., 0]
        top_mm = y_mm[body].min() - acquisition.table_gap_mm
        below_mm = top_mm - y_mm
        centre_mm = x_mm[body].mean()
        slab = (below_mm > 0) & (below_mm < 18) & (np.abs(x_mm - centre_mm) < 190)
        hu[slab] = np.where((below_mm[slab] < 5) | (below_mm[slab] > 13), -60, -880)

    hu = gaussian_filter(hu, acquisition.blur_voxels)
    gain = np.zeros(acquisition.shape, np.float32)
    points32 = points_mm.astype(np.float32)
    for vector, phase in zip(acquisition.gain_vectors, acquisition.gain_phases, strict=True):
        gain += np.sin(points32 @ vector.astype(np.float32) + np.float32(phase))
    hu += np.float32(acquisition.gain_amplitude) * gain * (hu + 1000)
    noise = np.random.default_rng(acquisition.noise_seed).standard_normal(acquisition.shape, dtype=np.float32)
    noise = gaussian_filter(noise, acquisition.noise_blur_voxels)
    hu += noise * (acquisition.noise_hu / noise.std())
    image = np.rint(hu).clip(-1024, 3071).astype(np.int16)

    turn = np.zeros((4, 4))
    turn[3, 3] = 1
    for stored, axis in enumerate(acquisition.storage_order):
        flip = acquisition.storage_flips[axis]
        turn[axis, stored] = -1 if flip else 1
        turn[axis, 3] = acquisition.shape[axis] - 1 if flip else 0
    flipped = [axis for axis in range(3) if acquisition.storage_flips[axis]]
    affine = acquisition.affine @ turn

    def store(array: np.ndarray) -> Volume:
        turned = np.flip(array, flipped).transpose(acquisition.storage_order)
        return Volume(array=np.ascontiguousarray(turned), affine=affine.copy())

    return store(image), store(label)
