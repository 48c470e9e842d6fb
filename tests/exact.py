"""Exams whose every map is known: what stands around the network can be held against closed forms.

A `body` says where a place of an exam lies in the seed exam, mm → mm. It makes both the image and the map, so that the
true correspondence of two exams is the body of the one and the inverse body of the other.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from deepatlas import grid
from deepatlas.atlas import REGION_NODES, Region
from deepatlas.autoencoder import Autoencoder
from deepatlas.checkpoint import MARGIN, Model
from deepatlas.config import NetworkConfig
from deepatlas.embedding import Embedded
from deepatlas.prepare import prepare
from deepatlas.volume import Volume, apply

FRAME = np.array([[130.0, 0, 0, 10], [0, 110, 0, -20], [0, 0, 160, 30], [0, 0, 0, 1]])
"""Box → mm of the seed exam: the atlas."""
RADII = np.array([105.0, 85.0, 150.0])
"""Of the patient, an ellipsoid around the middle of the seed exam."""
CENTRE, RADIUS = np.array([35.0, 10.0, 50.0]), 28.0
OTHER = np.array([-30.0, -35.0, 10.0])

Body = Callable[[np.ndarray], np.ndarray]


class Exact(nn.Module):
    """In the place of a network; `exact` says what it would answer."""

    def __init__(self) -> None:
        super().__init__()
        self.config = NetworkConfig(size=24)
        self.offset = nn.Parameter(torch.zeros(3))

    def forward(self, image, level=0):
        raise AssertionError("the map is known")


def blank() -> Model:
    """A model that knows no structure and no region."""
    torch.manual_seed(0)
    return Model(
        network=Exact(),
        autoencoder=Autoencoder().requires_grad_(False),
        atlas=torch.rand(1, 1, 12, 12, 12),
        seed_box_to_mm=torch.from_numpy(FRAME),
        region="exam",
        level=0,
        seed_exam="seed",
        structures={},
    )


def cube_between(low_mm, high_mm, name: str) -> Region:
    """A region between two places of the seed exam."""
    to_atlas = np.linalg.inv(FRAME @ np.diag([1 / MARGIN] * 3 + [1.0]))
    box = torch.from_numpy(apply(to_atlas, np.stack([low_mm, high_mm]))).float()
    return Region(name, box, torch.ones(*(REGION_NODES,) * 3).bool())


def unmoved(places: np.ndarray) -> np.ndarray:
    """The body of the seed exam itself."""
    return places


def moved_by(matrix: np.ndarray) -> Body:
    """A body that differs by an affine map."""
    return lambda places: apply(matrix, places)


def bent(places: np.ndarray) -> np.ndarray:
    """A body bent by up to 6 mm along each axis; nowhere folded."""
    x, y, z = np.moveaxis(np.asarray(places) / 28, -1, 0)
    return places + 6 * np.stack([np.sin(y + 1), np.sin(z - 0.5), np.sin(x + 0.3)], axis=-1)


def unbent(places: np.ndarray) -> np.ndarray:
    """The inverse of `bent`, by a contraction that halves the error at least every step."""
    found = places
    for _ in range(60):
        found = found - (bent(found) - places)
    return found


def coordinates(places: np.ndarray, body: Body = unmoved) -> np.ndarray:
    """The true coordinates of places (..., 3) mm."""
    return MARGIN * apply(np.linalg.inv(FRAME), body(places))


def exact(model: Model, exam: Volume, region: str = "exam", body: Body = unmoved) -> Embedded:
    """An exam with its true coordinates, in a box that is turned where the exam's grid is."""
    prepared = prepare(exam, model.size, region, upright=False)
    where = grid.identity((model.size,) * 3, torch.float64)[0].flatten(1).T.numpy()
    c = coordinates(apply(prepared.box_to_mm, where), body).T.reshape(1, 3, *(model.size,) * 3)
    return Embedded(prepared, torch.from_numpy(c).float())


def rotated(degrees: tuple[float, float, float]) -> np.ndarray:
    """A rotation about the three axes."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        i, j = [a for a in range(3) if a != axis]
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    return matrix


def affine_of(linear: np.ndarray, shift=(0.0, 0.0, 0.0)) -> np.ndarray:
    """A linear map and a shift as one matrix, (4, 4)."""
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = linear, shift
    return matrix


def in_body(places: np.ndarray, body: Body = unmoved, depth_mm: float = 0.0) -> np.ndarray:
    """Whether places lie in the patient, and about so deep below its surface."""
    return (((body(places) - FRAME[:3, 3]) / (RADII - depth_mm)) ** 2).sum(axis=-1) < 1


def texture(places: np.ndarray, body: Body = unmoved) -> np.ndarray:
    """HU within the patient."""
    return 40 * np.sin(body(places) / 9).sum(axis=-1)


def scan(
    spacing, degrees=(0.0, 0.0, 0.0), low=(-110, -120, -110), high=(130, 80, 170), body: Body = unmoved
) -> tuple[Volume, np.ndarray]:
    """An exam of the patient on a turned grid around a field of view, and the mm of its voxels."""
    turn, extent = rotated(degrees), np.array(high) - low
    shape = np.ceil(extent / np.array(spacing)).astype(int) + 1
    affine = np.eye(4)
    affine[:3, :3] = turn * spacing
    middle = (np.array(low) + high) / 2
    affine[:3, 3] = middle - affine[:3, :3] @ ((shape - 1) / 2)
    places = places_of(shape, affine)
    hu = np.where(in_body(places, body), texture(places, body), -1000)
    return Volume(hu.astype(np.int16), affine), places


def places_of(shape, affine: np.ndarray) -> np.ndarray:
    """The mm of every voxel of a grid."""
    return apply(affine, np.moveaxis(np.indices(tuple(shape)), 0, -1))


def balls(places: np.ndarray, *centres: np.ndarray, radius: float = RADIUS) -> np.ndarray:
    """A label map with ball n + 1 around centre n; later ones cover earlier ones."""
    labels = np.zeros(places.shape[:3], np.uint8)
    for number, centre in enumerate(centres, start=1):
        labels[((places - centre) ** 2).sum(axis=-1) < radius**2] = number
    return labels


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Overlap of two masks."""
    return 2 * (a & b).sum() / (a.sum() + b.sum())
