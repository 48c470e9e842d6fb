"""Regions: cubes of the atlas, found in any exam, cut out to a standard view, and pasted back.

A region is defined once, from structures or from a box drawn on one exam. In another exam its nodes are found one by
one, and the affine map that fits them best says where the whole cube lies: turned with the patient, and placed also
where a part of it is beyond the scan. Every structure of the library is a region too.

Source: §5.2.4, figure 8.
"""

import base64
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from scipy import ndimage

from deepatlas import files, grid
from deepatlas.atlas import REGION_NODES, Region
from deepatlas.checkpoint import Model
from deepatlas.embedding import Embedded, familiar
from deepatlas.errors import ExamError, RegionError
from deepatlas.files import Exam
from deepatlas.locate import ABSENT, PRESENT
from deepatlas.markups import Box
from deepatlas.places import (
    Places,
    from_atlas,
    in_patient,
    linear_to_atlas,
    nearest_rotation,
    robust_affine,
    to_atlas,
)
from deepatlas.places import carry as places_in
from deepatlas.prepare import AIR_HU, sample_mm
from deepatlas.volume import Volume, apply, corners_mm, planes_mm

LARGEST_CROP = 2**28
"""Voxels."""


class Shown(NamedTuple):
    """A region in an exam."""

    coverage: float
    """Share of its nodes whose place lies in the scan."""
    status: str
    """"present", "cut_off" or "absent"."""
    to_mm: np.ndarray | None
    """−1 … +1 along the cube's edges → mm (RAS) of the exam, (4, 4), affine; None where absent."""

    @property
    def box(self) -> Box | None:
        """The turned box nearest to the cube's image."""
        if self.to_mm is None:
            return None
        linear = self.to_mm[:3, :3]
        axes = nearest_rotation(linear / np.linalg.norm(linear, axis=0))
        return Box(self.to_mm[:3, 3].copy(), axes, 2 * np.abs((axes * linear).sum(axis=0)))


def region_of(model: Model, name: str) -> Region:
    """A region of the model, or the box around a structure of that name.

    Raises:
        RegionError: neither is known.
    """
    if name in model.regions:
        return model.regions[name]
    if name in model.structures:
        return from_structures(model, name, [name])
    known = ", ".join([*model.regions, *model.structures]) or "none"
    raise RegionError(f"The model knows no region or structure {name!r}; it knows: {known}.")


def from_structures(model: Model, name: str, structures: Iterable[str], margin_mm: float = 0.0) -> Region:
    """The box of the atlas around structures, wider by a margin on every side (mm of the seed exam).

    The structures themselves are what an exam has to show to cover it.

    Raises:
        StructureError: an unknown structure. RegionError: they have no voxel in the atlas.
    """
    chosen = [model.structure(one) for one in structures]
    low, high = np.full(3, np.inf), np.full(3, -np.inf)
    for one in chosen:
        nodes = one.nodes_atlas()[0][:, one.mask > one.level].numpy()
        if nodes.size:
            low, high = np.minimum(low, nodes.min(axis=1)), np.maximum(high, nodes.max(axis=1))
    if not np.isfinite(low).all():
        raise RegionError(f"The structures of {name} have no voxel in the atlas; define them again.")
    margin = margin_mm / np.linalg.norm(model.atlas_to_mm.numpy()[:3, :3], axis=0)
    region = Region.whole(name, torch.from_numpy(np.stack([low - margin, high + margin])))
    within = [one.membership(region.nodes_atlas())[0, 0] > one.level for one in chosen]
    return replace(region, counted=torch.stack(within).any(dim=0))


def fields_of_view() -> dict[str, dict[str, dict[str, Any]]]:
    """The lists that come with the program: list → region → the structures it lies around, its margin, and the region
    it is cut from in a second step (`in`).

    "whole-body" has the six large and fourteen small fields of view of §5.2.4; the paper names them, the structures and
    margins are ours.
    """
    return json.loads(Path(__file__).with_name("fields_of_view.json").read_text(encoding="utf-8"))


def from_list(model: Model, name: str) -> tuple[list[Region], dict[str, list[str]]]:
    """The regions of a shipped list that the model's library allows, and the others with the structures they need.

    A region is made around those of its structures that the library has, at least one.

    Raises:
        RegionError: no such list.
    """
    lists = fields_of_view()
    if name not in lists:
        raise RegionError(f"There is no list {name!r}; there are: {', '.join(lists)}.")
    made, lacking = [], {}
    for region, about in lists[name].items():
        known = [one for one in about["around"] if one in model.structures]
        if known and region not in model.structures:
            made.append(from_structures(model, region, known, about["margin_mm"]))
        else:
            lacking[region] = about["around"]
    return made, lacking


def from_box(model: Model, name: str, embedded: Embedded, box: Box) -> Region:
    """The box of the atlas around a box drawn on an exam.

    What the exam shows of the patient there is what another exam has to show to cover it.

    Raises:
        RegionError: hardly any of the box lies in the patient.
    """
    cube, shown = _cube_nodes(), drawn_in_patient(name, embedded, box)
    c, _ = to_atlas(embedded, apply(box.to_mm, cube))
    expected = linear_to_atlas(embedded) @ box.to_mm[:3, :3]
    to_atlas_box = robust_affine(cube[shown], c[0].T.double().numpy()[shown], expected, least=0.0)
    corners = apply(to_atlas_box, np.stack(np.meshgrid(*[(-1, 1)] * 3, indexing="ij"), axis=-1).reshape(-1, 3))
    region = Region.whole(name, torch.from_numpy(np.stack([corners.min(axis=0), corners.max(axis=0)])))
    valid = from_atlas(embedded, region.nodes_atlas().flatten(2)).valid
    return replace(region, counted=torch.from_numpy(valid).view_as(region.counted))


def drawn_in_patient(name: str, embedded: Embedded, box: Box) -> np.ndarray:
    """Which nodes of a box drawn on an exam lie in the patient, (node,) bool.

    Raises:
        RegionError: hardly any.
    """
    shown = in_patient(embedded, apply(box.to_mm, _cube_nodes()))
    if shown.sum() < LEAST_NODES:
        raise RegionError(f"The box of {name} lies outside the patient; its numbers are mm, RAS unless said otherwise.")
    return shown


LEAST_NODES = 8
"""So many nodes must be found before an affine map is fitted to them."""


def show(model: Model, region: Region, embedded: Embedded) -> Shown:
    """Where a region lies in an exam; nowhere in one of another kind than the model learned from.

    Source: §5.2.4, least squares over all nodes of the cube; robust, because single nodes can be wrong.
    """
    if not familiar(model, embedded):
        return Shown(0.0, "absent", None)
    places = from_atlas(embedded, region.nodes_atlas().flatten(2))
    counted = region.counted.flatten().numpy()
    coverage = float(places.valid[counted].mean()) if counted.any() else float(places.valid.mean())
    if coverage < ABSENT or places.valid.sum() < LEAST_NODES:
        return Shown(coverage, "absent", None)
    edges = (region.box_atlas[1] - region.box_atlas[0]).double().numpy() / 2
    return _shown(coverage, places, np.linalg.inv(linear_to_atlas(embedded)) * edges)


def carry(model: Model, name: str, box: Box, source: Embedded, target: Embedded) -> Shown:
    """Where a box drawn on one exam lies in another; its edges keep their directions in the patient.

    Raises:
        RegionError: hardly any of the box lies in the patient of the first exam.
    """
    shown = drawn_in_patient(name, source, box)
    places = places_in(source, target, apply(box.to_mm, _cube_nodes()))
    coverage = float(places.valid[shown].mean())
    if not familiar(model, target) or coverage < ABSENT or places.valid.sum() < LEAST_NODES:
        return Shown(coverage if familiar(model, target) else 0.0, "absent", None)
    return _shown(
        coverage, places, np.linalg.solve(linear_to_atlas(target), linear_to_atlas(source)) @ box.to_mm[:3, :3]
    )


def _shown(coverage: float, places: Places, expected: np.ndarray) -> Shown:
    """Where a cube lies whose nodes were found."""
    to_mm = robust_affine(_cube_nodes()[places.valid], places.points_mm[places.valid], expected)
    return Shown(coverage, "present" if coverage >= PRESENT else "cut_off", to_mm)


def _cube_nodes() -> np.ndarray:
    """Nodes of the cube −1 … +1, (node, 3)."""
    return grid.identity((REGION_NODES,) * 3, torch.float64).flatten(2)[0].T.numpy()


def view_grid(shown: Shown, spacing_mm: np.ndarray | float, size: int | None = None) -> tuple[tuple, np.ndarray]:
    """The grid of the standard view of a region: its shape, and voxel → mm of the exam.

    Its axes are the region's, at right angles; the shape follows from the spacing, or the spacing from the shape.

    Raises:
        RegionError: too many voxels.
    """
    box = shown.box
    spacing = np.broadcast_to(np.asarray(spacing_mm, dtype=np.float64), (3,))
    if size is not None:
        shape, spacing = (size,) * 3, box.size_mm / size
    else:
        shape = tuple(int(n) for n in np.maximum(2, np.ceil(box.size_mm / spacing - 0.05)))
    if np.prod(shape, dtype=np.float64) > LARGEST_CROP:
        raise RegionError(f"Expected a crop of at most {LARGEST_CROP} voxels, got {shape}; choose a larger spacing.")
    affine = np.eye(4)
    affine[:3, :3] = box.axes * spacing
    affine[:3, 3] = box.centre_mm - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return shape, affine


def crop(exam: Volume, shape: tuple, affine: np.ndarray, labels: bool = False) -> np.ndarray:
    """An exam on another grid: linear, after a blur where the grid is coarser; labels by the nearest voxel.

    Outside the exam there is air, or 0 in labels.
    """
    source = exam
    if not labels:
        coarser = np.linalg.norm(np.linalg.inv(exam.affine)[:3, :3] @ affine[:3, :3], axis=1)
        sigma = 0.4 * np.sqrt(np.maximum(coarser**2 - 1, 0))
        source = _part(exam, shape, affine, 3 * sigma + 2)
        if sigma.max() > 0.3:
            blurred = ndimage.gaussian_filter(source.array.astype(np.float32), sigma, mode="nearest")
            source = Volume(blurred, source.affine)
    result = np.empty(shape, dtype=exam.array.dtype if labels else np.float32)
    how = {"order": "nearest", "outside": 0} if labels else {"outside": AIR_HU}
    for plane, points in enumerate(planes_mm(shape, affine)):
        result[plane] = sample_mm(source, points, **how)
    return result


def _part(exam: Volume, shape: tuple, affine: np.ndarray, margin: np.ndarray) -> Volume:
    """The block of an exam that another grid lies in, with a margin in voxels; a view."""
    block = _covered(exam.shape, exam.affine, shape, affine, margin)
    return Volume(exam.array[block], exam.affine @ _shift(block))


def _covered(shape: tuple, affine: np.ndarray, by_shape: tuple, by_affine: np.ndarray, margin=0.0) -> tuple[slice, ...]:
    """The block of a grid, at least a voxel thick, in which another grid lies, with a margin in voxels."""
    ends = [(-0.5, n - 0.5) for n in by_shape]
    corners = apply(np.linalg.inv(affine) @ by_affine, np.stack(np.meshgrid(*ends, indexing="ij"), axis=-1))
    last = np.array(shape) - 1
    first = np.clip(np.floor(corners.min(axis=(0, 1, 2)) - margin), 0, last).astype(int)
    end = np.clip(np.ceil(corners.max(axis=(0, 1, 2)) + margin), first, last).astype(int) + 1
    return tuple(map(slice, first, end))


def _shift(block: tuple[slice, ...]) -> np.ndarray:
    """Index in a block → index in the whole, (4, 4)."""
    matrix = np.eye(4)
    matrix[:3, 3] = [part.start for part in block]
    return matrix


CROP_FORMAT, CROP_VERSION = "deepatlas-crop", 1


def crop_record(exam: Exam, region: Region, shown: Shown, shape: tuple, affine: np.ndarray) -> dict[str, Any]:
    """What `uncrop` needs to know of a crop, and where it lies, in types that JSON knows."""
    return {
        "format": CROP_FORMAT,
        "version": CROP_VERSION,
        "exam": exam.name,
        "roi": region.name,
        "status": shown.status,
        "coverage": round(shown.coverage, 4),
        "frame": "RAS",
        "unit": "mm",
        "crop": {"shape": [int(n) for n in shape], "affine": affine.tolist()},
        "original": {
            "shape": list(exam.shape),
            "affine": exam.affine.tolist(),
            "header": base64.b64encode(bytes(files.without_text(exam.header).binaryblock)).decode(),
        },
    }


def recorded_exam(about: dict[str, Any], name: str) -> Exam:
    """The grid of the exam that a crop was cut from; its array is empty memory.

    Raises:
        RegionError: not the JSON of a crop.
    """
    try:
        if about["format"] != CROP_FORMAT or about["version"] != CROP_VERSION:
            raise ValueError(f"format {about['format']} {about['version']}")
        original = about["original"]
        block = base64.b64decode(original["header"], validate=True)
        kind = nib.Nifti2Header if len(block) == nib.Nifti2Header.sizeof_hdr else nib.Nifti1Header
        shape = tuple(int(n) for n in original["shape"])
        if len(shape) != 3 or not 0 < np.prod(shape, dtype=float) <= files.MAX_VOXELS:
            raise ValueError(f"shape {shape}")
        array = np.broadcast_to(np.uint8(0), shape)
        return Exam(array, np.array(original["affine"], dtype=np.float64), kind(block), str(about["exam"]))
    except (KeyError, TypeError, ValueError, OverflowError, ExamError, WrapStructError, HeaderDataError) as error:
        raise RegionError(
            f"{name} is not what `deepatlas crop` wrote ({error}); give the JSON beside the crop."
        ) from None


def check_on_crop(result: Volume, about: dict[str, Any]) -> None:
    """Refuse a result that does not lie on the grid of the recorded crop."""
    try:
        shape = tuple(int(n) for n in about["crop"]["shape"])
        affine = np.array(about["crop"]["affine"], dtype=np.float64).reshape(4, 4)
        if len(shape) != 3 or not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-12:
            raise ValueError(f"shape {shape}")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise RegionError(
            f"The record of the crop of {about['exam']} is damaged ({error}); give the JSON beside the crop."
        ) from None
    if result.shape != shape or np.abs(result.corners_mm() - corners_mm(shape, affine)).max() > files.SAME_GRID_MM * 10:
        raise RegionError(
            f"Expected a result on the grid of the crop of {about['exam']}, {shape}, got another, {result.shape}; give "
            "the JSON that was written beside this very crop."
        )


def paste(result: Volume, shape: tuple, affine: np.ndarray, outside: float = 0.0) -> np.ndarray:
    """A result on a crop's grid, brought back to the exam's own: labels by the nearest voxel, values linearly.

    Only the part of the exam that the crop covers is visited; elsewhere there is `outside`.
    """
    labels = result.array.dtype.kind in "iub"
    full = np.full(shape, outside, dtype=result.array.dtype if labels else np.float32)
    block = _covered(shape, affine, result.shape, result.affine)
    part = full[block]
    for plane, points in enumerate(planes_mm(part.shape, affine @ _shift(block))):
        part[plane] = sample_mm(result, points, order="nearest" if labels else "linear", outside=outside)
    return full
