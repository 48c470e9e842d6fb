"""From a place in an exam to its anatomical coordinate and back; points, boxes, crops and registrations are made of it.

A coordinate that an exam does not hold has no place there, and says so: nothing is answered with the nearest guess.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from deepatlas import affine, grid, warp
from deepatlas.checkpoint import Model
from deepatlas.embedding import Embedded, likeness_of
from deepatlas.errors import MarkupError
from deepatlas.volume import apply

ROBUST_ROUNDS = 5
LEAST_SCALE = 0.5
"""Matches better than this, in mm, are not told apart by the robust fit."""


class Places(NamedTuple):
    """Where coordinates lie in an exam."""

    points_mm: np.ndarray
    """(point, 3) RAS; where there is none, the nearest that was found."""
    valid: np.ndarray
    """(point,) bool: the exam holds the coordinate within the patient."""


def to_atlas(embedded: Embedded, points_mm: np.ndarray) -> tuple[Float[Tensor, "1 3 point"], np.ndarray]:
    """The coordinates of points (point, 3) mm of an exam, and whether they lie within what was prepared of it."""
    box = apply(np.linalg.inv(embedded.prepared.box_to_mm), points_mm)
    inside = np.isfinite(box).all(axis=1) & (np.abs(box) <= 1 + 1 / (embedded.prepared.size - 1)).all(axis=1)
    where = torch.from_numpy(np.where(inside[:, None], box, 0.0).T.astype(np.float32))[None]
    return grid.sample(embedded.c_atlas, where), inside


def in_patient(embedded: Embedded, points_mm: np.ndarray) -> np.ndarray:
    """Whether points (point, 3) mm lie in the patient as the exam shows it, (point,) bool."""
    box = apply(np.linalg.inv(embedded.prepared.box_to_mm), points_mm)
    where = torch.from_numpy(box.T.astype(np.float32))[None]
    return ((grid.sample(embedded.foreground.float(), where) > 0.5) & grid.inside(where))[0, 0].numpy()


def from_atlas(embedded: Embedded, c_atlas: Float[Tensor, "1 3 point"]) -> Places:
    """Where coordinates lie in an exam: ``c⁻¹``. Source: §5.1.1, by `deepatlas.warp.implicit`."""
    found = warp.implicit(embedded.c_atlas, c_atlas.float(), embedded.foreground)
    points_mm = apply(embedded.prepared.box_to_mm, found.phi_box[0].T.double().numpy())
    return Places(points_mm, found.valid[0, 0].numpy())


def confidence(model: Model, embedded: Embedded, points_mm: np.ndarray) -> np.ndarray:
    """How well the exam looks like the atlas around points (point, 3) mm: local correlation of features, 0 … 1."""
    alike = likeness_of(model, embedded)
    box = apply(np.linalg.inv(embedded.prepared.box_to_mm), points_mm).clip(-1, 1)
    smooth = F.avg_pool3d(alike.local * alike.foreground, 3, 1, 1) / F.avg_pool3d(alike.foreground, 3, 1, 1).clamp_min(
        1e-3
    )
    return grid.sample(smooth, torch.from_numpy(box.T.astype(np.float32))[None])[0, 0].clamp(0, 1).numpy()


def carry(source: Embedded, target: Embedded, points_mm: np.ndarray) -> Places:
    """Points of one exam in another: ``c_t⁻¹ ∘ c_s``. Points outside the source exam have no place."""
    c, inside = to_atlas(source, points_mm)
    box = apply(np.linalg.inv(source.prepared.box_to_mm), points_mm)
    inside &= source.shows(torch.from_numpy(box.T.astype(np.float32))[None]).numpy()
    places = from_atlas(target, c)
    return Places(places.points_mm, places.valid & inside)


class Landmarks(NamedTuple):
    """Named points of the atlas, and which of the marks they were made of."""

    c_atlas: dict[str, tuple[float, float, float]]
    exams: dict[str, int]
    """Of how many exams each is the median."""
    outside: list[tuple[str, str]]
    """Name and exam of the points that lie beyond the patient, which were left out."""


def landmarks(marked: Iterable[tuple[str, Embedded, Mapping[str, np.ndarray]]]) -> Landmarks:
    """Named points as atlas coordinates, from the exams they were marked on: of several, the median along each axis.

    Args:
        marked: names of exams, their maps, and name → point (3,) mm; a point beyond the patient is left out.

    Raises:
        MarkupError: a point that lies beyond the patient in every exam.
    """
    found: dict[str, list[np.ndarray]] = {}
    outside: list[tuple[str, str]] = []
    for exam, embedded, points in marked:
        for name, point_mm in points.items():
            c_atlas, _ = to_atlas(embedded, point_mm[None])
            places = found.setdefault(name, [])
            if in_patient(embedded, point_mm[None])[0]:
                places.append(c_atlas[0, :, 0].numpy())
            else:
                outside.append((name, exam))
    lost = [name for name, places in found.items() if not places]
    if lost:
        exams = ", ".join(exam for name, exam in outside if name == lost[0])
        raise MarkupError(
            f"Expected {lost[0]} within the patient, but it lies outside in {exams}; its numbers are mm, RAS unless "
            "said otherwise: correct the point or the frame."
        )
    medians = {name: tuple(map(float, np.median(places, axis=0))) for name, places in found.items()}
    return Landmarks(medians, {name: len(places) for name, places in found.items()}, outside)


def robust_affine(
    source: np.ndarray, target: np.ndarray, expected: np.ndarray | None = None, least: float = LEAST_SCALE
) -> np.ndarray:
    """The affine map from points (point, 3) to points, (4, 4), by least squares in which far outliers count little.

    Tukey's weights at 4.7 times the median residual, in a few rounds.

    Args:
        expected: its linear part (3, 3) as far as is known otherwise; it decides the directions in which the points say
            nothing, such as that across a single layer of them. The identity by default.
        least: residuals below this are all the same.

    Source: §5.2.4 (`B_T · A ≈ B_n`); the weights and the expectation are ours.
    """
    known = np.eye(3) if expected is None else expected
    x, y = (torch.from_numpy(np.asarray(points, dtype=np.float64).T)[None] for points in (source, target))
    rest = y - torch.from_numpy(known) @ x
    weight = torch.ones_like(x[:, :1])
    for _ in range(ROBUST_ROUNDS):
        matrix = affine.fit(x, rest, weight, ridge=1e-5)
        distance = (affine.apply(matrix, x) - rest).norm(dim=1, keepdim=True)
        scale = 4.7 * distance.median().clamp_min(max(least, 1e-9))
        weight = (1 - (distance / scale).square()).clamp_min(0).square()
    found = matrix[0].numpy()
    found[:3, :3] += known
    return found


def linear_to_atlas(embedded: Embedded) -> np.ndarray:
    """The linear part (3, 3) of an exam's map as a whole, mm → atlas."""
    to_atlas_box = warp.linear_part(embedded.c_atlas.double(), embedded.foreground)[0, :3, :3].numpy()
    return to_atlas_box @ np.linalg.inv(embedded.prepared.box_to_mm[:3, :3])


def nearest_rotation(linear: np.ndarray, scaled: bool = False) -> np.ndarray:
    """The proper rotation (3, 3) nearest to a linear map, times the mean of its stretches where ``scaled``."""
    u, stretch, v = np.linalg.svd(linear)
    sign = np.array([1.0, 1.0, np.sign(np.linalg.det(u @ v))])
    return (u * sign) @ v * (float((stretch * sign).mean()) if scaled else 1.0)
