"""Coregistration of two exams through their coordinates: linear and deformable, also where fields of view differ.

Both lead from the fixed exam to the moving one, see `deepatlas.transforms`.

Source: §4 (coregistration without optimisation), §5.1.1 (Φ = c_m⁻¹ ∘ c_f).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from deepatlas import affine, warp
from deepatlas.autoencoder import Intensities
from deepatlas.config import FINE, Weights
from deepatlas.embedding import Embedded
from deepatlas.errors import ExamError
from deepatlas.fitting import carried, fit
from deepatlas.machine import denormals_are_zero
from deepatlas.objective import Atlas, Exams
from deepatlas.places import linear_to_atlas, nearest_rotation, robust_affine
from deepatlas.prepare import Prepared, grid_to_box
from deepatlas.shapes import Coordinates
from deepatlas.transforms import Transform, inverse_consistency_mm
from deepatlas.volume import apply

KINDS = ("rigid", "similarity", "affine")
LEAST_MATCHES = 200
"""Voxels of the fixed exam that must have a counterpart."""

BLEND_MM = 30.0
"""Beyond the common anatomy the displacement fades into the linear map over about this distance."""


@dataclass(frozen=True)
class Registration(Transform):
    """Φ from the fixed exam to the moving one, and how far it can be trusted."""

    overlap: float
    """Share of the fixed patient that has a counterpart in the moving exam."""
    folded: float
    """Share of the overlap where Φ folds."""
    residual_mm: float
    """Median distance between Φ and the linear map over the overlap."""


def register(
    fixed: Embedded,
    moving: Embedded,
    kind: str = "affine",
    deformable: bool = True,
    fine: tuple[Prepared, Prepared] | None = None,
) -> Registration:
    """Register two exams by their maps.

    Args:
        kind: of the linear map: "rigid", "similarity" or "affine".
        deformable: False stops at the linear map.
        fine: both exams prepared for a comparison of their images; then Φ is fitted to them as well, see `fitted`.

    Raises:
        ExamError: the two exams have next to no anatomy in common.
    """
    if kind not in KINDS:
        raise ExamError(f"Expected one of {', '.join(KINDS)}, got {kind!r}; choose one.")
    phi_box, valid = matches(fixed, moving)
    if valid.sum() < LEAST_MATCHES:
        raise ExamError(
            f"The two exams have next to no anatomy in common: {int(valid.sum())} of "
            f"{int(fixed.foreground.sum())} voxels have a counterpart; choose exams whose fields of view meet."
        )
    if fine is not None and deformable:
        phi_box = fitted(fixed, moving, phi_box, valid, fine)
    to_mm = fixed.prepared.box_to_mm @ grid_to_box(fixed.prepared.size)
    here = apply(to_mm, np.moveaxis(np.indices(valid.shape), 0, -1))
    there = apply(moving.prepared.box_to_mm, np.moveaxis(phi_box[0].double().numpy(), 0, -1))
    expected = np.linalg.inv(linear_to_atlas(moving)) @ linear_to_atlas(fixed)
    linear = _linear(here[valid], there[valid], expected, kind)
    apart = there - apply(linear, here)
    shift = spread(apart, valid, np.linalg.norm(to_mm[:3, :3], axis=0)) if deformable else 0 * apart
    found = Transform(linear, np.ascontiguousarray(np.moveaxis(shift, -1, 0)).astype(np.float32), to_mm)
    return Registration(
        **vars(found),
        overlap=float(valid.sum() / fixed.foreground.sum()),
        folded=float((found.determinants()[valid] <= 0).mean()),
        residual_mm=float(np.median(np.linalg.norm(apart[valid], axis=-1))),
    )


def matches(fixed: Embedded, moving: Embedded) -> tuple[torch.Tensor, np.ndarray]:
    """Φ_box = c_m⁻¹ ∘ c_f at the nodes of the fixed exam, (1, 3, n, n, n), and where it was found, (n, n, n)."""
    found = warp.implicit(moving.c_atlas, fixed.c_atlas, moving.foreground, fixed.foreground)
    return found.phi_box, found.valid[0, 0].numpy()


def overlap_points(fixed: Embedded, moving: Embedded) -> np.ndarray:
    """Voxels of the fixed exam that have a counterpart, (point, 3) mm."""
    _, valid = matches(fixed, moving)
    return apply(fixed.prepared.box_to_mm @ grid_to_box(fixed.prepared.size), np.argwhere(valid))


def describe(
    there: Registration, back: Registration, fixed: Embedded, moving: Embedded, names: tuple[str, str]
) -> dict[str, Any]:
    """The report of a registration there and back, in types that JSON knows."""
    apart = inverse_consistency_mm(there, back, overlap_points(fixed, moving))
    return {
        "fixed": names[0],
        "moving": names[1],
        "deformable": bool(there.shift_mm.any()),
        "matrix_ras_mm": np.round(there.linear, 6).tolist(),
        "overlap": round(there.overlap, 4),
        "folded": round(there.folded, 6),
        "residual_mm": round(there.residual_mm, 3),
        "inverse_consistency_mm": {
            "median": round(float(np.median(apart)), 3),
            "p95": round(float(np.percentile(apart, 95)), 3),
        },
    }


def _linear(source: np.ndarray, target: np.ndarray, expected: np.ndarray, kind: str) -> np.ndarray:
    """The robust affine map, or the rotation (and scale) nearest to it about the middle of the matches."""
    matrix = robust_affine(source, target, expected)
    if kind == "affine":
        return matrix
    middle = source.mean(axis=0)
    result = np.eye(4)
    result[:3, :3] = nearest_rotation(matrix[:3, :3], scaled=kind == "similarity")
    result[:3, 3] = apply(matrix, middle) - result[:3, :3] @ middle
    return result


def spread(shift: np.ndarray, valid: np.ndarray, spacing_mm: np.ndarray) -> np.ndarray:
    """A displacement known in some voxels, (i, j, k, 3), continued into the others: it fades to 0 over `BLEND_MM`."""
    distance, nearest = ndimage.distance_transform_edt(~valid, sampling=spacing_mm, return_indices=True)
    filled = shift[tuple(nearest)] * np.exp(-((distance / BLEND_MM) ** 2))[..., None]
    soft = np.stack([ndimage.gaussian_filter(filled[..., axis], 1.0, mode="nearest") for axis in range(3)], axis=-1)
    return np.where(valid[..., None], filled, soft)


def fitted(
    fixed: Embedded, moving: Embedded, phi_box: Coordinates, valid: np.ndarray, fine: tuple[Prepared, Prepared]
) -> Coordinates:
    """Φ with a smooth residual that brings the moving image closer to the fixed one; it stands where the atlas stands
    in training.

    Args:
        phi_box, valid: as `matches` gives them.
        fine: both exams prepared for the comparison, finer than the maps if wanted.

    Source: ours, see `deepatlas.fitting`.
    """
    shape = (fine[0].size,) * 3
    to_fixed = torch.from_numpy(np.linalg.inv(fixed.prepared.box_to_mm) @ fine[0].box_to_mm)[None]
    to_moving = torch.from_numpy(np.linalg.inv(fine[1].box_to_mm) @ moving.prepared.box_to_mm)[None].float()
    start = affine.apply(to_moving, carried(phi_box, to_fixed, shape))
    shown = carried(torch.from_numpy(valid)[None, None].float(), to_fixed, shape) > 0.5
    views, template = (
        (torch.from_numpy(one.image)[None, None], torch.from_numpy(one.box_to_mm[None, :3, :3]).float()) for one in fine
    )
    with denormals_are_zero():
        found = fit(start, Exams(views[0], shown, views[1]), Atlas(*template), Intensities(), Weights(), FINE)
    moved = carried(found.residual, torch.linalg.inv(to_fixed), tuple(phi_box.shape[2:]))
    return phi_box + torch.einsum("nab,nbijk->naijk", torch.linalg.inv(to_moving[:, :3, :3]), moved)
