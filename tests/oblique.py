"""Images on oblique grids, stored in any order of axes, and crops whose anatomy lies off their middle."""

import numpy as np

from deepatlas.common_grid import Placed, Pose
from deepatlas.volume import Volume, reorder
from exact import affine_of, rotated

STORED = {
    "RAS": ((0, 1, 2), (False, False, False)),
    "LPS": ((0, 1, 2), (True, True, False)),
    "SAR": ((2, 1, 0), (False, False, False)),
    "ILA": ((2, 0, 1), (True, True, False)),
    "ASL": ((1, 2, 0), (False, False, True)),
}
TURNS = [(0, 0, 0), (12, -20, 15)]


def scan(shape, spacing, degrees=(0, 0, 0), middle=(5.0, -7, 11), stored="RAS", array=None) -> Volume:
    """An image on an oblique grid around a place, stored in some order; every voxel another value, 0 ... 1."""
    if array is None:
        array = np.random.default_rng(0).permutation(np.linspace(0.05, 0.95, np.prod(shape))).reshape(shape)
    linear = rotated(degrees) * spacing
    corner = np.array(middle) - linear @ ((np.array(shape) - 1) / 2)
    return reorder(Volume(np.asarray(array, np.float32), affine_of(linear, corner)), *STORED[stored])


def centre(volume: Volume) -> np.ndarray:
    return volume.corners_mm().mean(axis=0)


def off_middle(seed: int, offset: tuple[int, int, int]) -> Placed:
    """A soft blob and two satellites in noise, away from the middle; the image ends before the grid does."""
    where = np.indices((32, 32, 16)).transpose(1, 2, 3, 0) - np.array([16, 15, 8]) - np.array(offset)
    image = np.zeros((32, 32, 16))
    for centre, width in (((0, 0, 0), 5.0), ((6, 3, 1), 2.0), ((-5, 6, -2), 2.5)):
        image += np.exp(-(((where - np.array(centre)) / width) ** 2).sum(axis=-1))
    image += 0.02 * np.random.default_rng(seed).random(image.shape)
    inside = np.zeros(image.shape, bool)
    inside[3:29, 2:30, 1:15] = True
    return Placed((image * inside).astype(np.float32), inside, Pose.affine(np.eye(4)))


OFFSETS = [(0, 0, 0), (3, -2, 1), (-4, 1, 0), (2, 5, -2), (-1, -4, 2)]
