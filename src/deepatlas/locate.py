"""Finding structures: define them once, find them in any exam on the exam's own grid.

Every answer goes atlas → box → mm → voxel through affines, for any grid; only the part of an exam in which a
structure can lie is sampled. What is not in the scan is said to be absent, and no mask is written elsewhere.

Source: §2.2 (a forward pass labels every voxel), §3.2.1 (propagation by linear resampling), §5.2.7 (structures).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from deepatlas import atlas, grid, warp
from deepatlas.atlas import Drawn, Structure
from deepatlas.checkpoint import Model
from deepatlas.errors import StructureError
from deepatlas.objective import likeness
from deepatlas.prepare import Prepared, prepare, sample_mm
from deepatlas.shapes import Coordinates
from deepatlas.volume import Volume, apply

PRESENT = 0.95
"""Coverage from which a structure counts as wholly in the scan."""

ABSENT = 0.05
"""Coverage below which a structure counts as not in the scan."""

COVERAGE_POINTS = 3000
"""At most so many nodes of a structure are looked for."""

DEFINE_SPACING_MM = 2.0
"""Label maps finer than this are read at this spacing when a structure is made from several exams."""


class Embedded(NamedTuple):
    """An exam with its coordinate map."""

    prepared: Prepared
    c_atlas: Coordinates
    """(1, 3, n, n, n) on the prepared grid, atlas frame."""

    @property
    def foreground(self) -> Tensor:
        """(1, 1, n, n, n) bool."""
        return torch.from_numpy(self.prepared.foreground)[None, None]


@dataclass(frozen=True)
class Found:
    """One structure in one exam."""

    name: str
    label: int
    status: str
    """"present", "cut_off" or "absent"."""
    coverage: float
    """Share of the structure's atlas mask whose place lies in the scan."""
    confidence: float | None
    """0 ... 1, from the likeness of the aligned atlas and the exam around the structure, and the map's regularity."""
    volume_ml: float | None
    centroid_mm: tuple[float, float, float] | None
    box_mm: tuple[tuple[float, float, float], tuple[float, float, float]] | None
    """Corners of the axis-aligned box around the mask, RAS mm."""
    mask: np.ndarray | None
    """Boolean, on the exam's own grid; None where absent."""


def embed(model: Model, exam: Volume) -> Embedded:
    """The coordinate map of an exam.

    Raises:
        ExamError: the exam cannot be prepared (too thin, or nothing but air).

    Source: ``c_n = F(x_n)``, §2.1.
    """
    prepared = prepare(exam, model.size, model.region)
    image = torch.from_numpy(prepared.image)[None, None]
    with torch.inference_mode():
        c = model.network(image.to(model.network.offset.device), model.level).cpu()
    return Embedded(prepared, grid.resize(c.clone(), prepared.hu.shape))


def define(
    model: Model, exams: Iterable[tuple[Volume, Volume]], names: Mapping[str, int], embedded: Iterable[Embedded] = ()
) -> Model:
    """The model with structures made from labelled exams; those of the same name are replaced, the others kept.

    An exam on which a structure has no voxel takes no part in that structure: not drawn is not absent.

    Args:
        exams: pairs of an exam and its label map on the same grid.
        names: structure → number in the label maps.
        embedded: maps of the exams in the same order, where they are known already.

    Raises:
        StructureError: a structure has no voxel in any exam.

    Source: §5.2.7; see `deepatlas.atlas` for one exam and for several.
    """
    maps = iter(embedded)
    samples = [_Labelled.read(model, exam, labels, names, next(maps, None)) for exam, labels in exams]
    return model.with_structures(*(_made(model, name, number, samples) for name, number in names.items()))


class _Labelled(NamedTuple):
    """A labelled exam, reduced to what structures are made of."""

    embedded: Embedded
    labels: Volume
    c_atlas: Tensor
    """(3, point): coordinates of the label map's voxels (thinned where it is fine) in the patient."""
    values: np.ndarray
    """(point,): label numbers there."""

    @classmethod
    def read(cls, model, exam: Volume, labels: Volume, names: Mapping[str, int], known: Embedded | None) -> "_Labelled":
        embedded = known or embed(model, exam)
        stride = np.maximum(1, np.floor(DEFINE_SPACING_MM / labels.spacing_mm + 1e-6)).astype(int)
        index = np.stack(
            np.meshgrid(*[np.arange(0, n, s) for n, s in zip(labels.shape, stride, strict=True)], indexing="ij"), -1
        )
        index = index.reshape(-1, 3)
        box = apply(np.linalg.inv(embedded.prepared.box_to_mm) @ labels.affine, index)
        inside = (np.abs(box) <= 1).all(axis=1)
        index, box = index[inside], torch.from_numpy(box[inside].T.astype(np.float32))[None]
        here = (grid.sample(embedded.foreground.float(), box) > 0.5)[0, 0]
        c = grid.sample(embedded.c_atlas, box[:, :, here])[0]
        return cls(embedded, labels, c, labels.array[tuple(index[here.numpy()].T)])

    def drawn(self, number: int, box_atlas: Tensor | None = None) -> Drawn:
        """The points of one structure, limited to a box of the atlas."""
        inside = torch.from_numpy((self.values == number).astype(np.float32))
        if box_atlas is None:
            return Drawn(self.c_atlas[:, inside > 0], inside[inside > 0])
        near = ((self.c_atlas >= box_atlas[0][:, None]) & (self.c_atlas <= box_atlas[1][:, None])).all(dim=0)
        near |= inside > 0
        return Drawn(self.c_atlas[:, near], inside[near])


def _made(model: Model, name: str, number: int, samples: list[_Labelled]) -> Structure:
    spacing_mm = 2.0
    per_mm = torch.from_numpy(1 / np.linalg.norm(model.atlas_to_mm.numpy()[:3, :3], axis=0)).float()
    with_it = [s for s in samples if (s.values == number).any()]
    if not with_it:
        raise StructureError(
            f"{name}: no labelled exam has a voxel of number {number} within the patient; "
            "check the label map and the table of names."
        )
    box, shape = atlas.own_grid([s.drawn(number) for s in with_it], spacing_mm * per_mm)
    drawn = [s.drawn(number, box) for s in with_it]
    blank = Structure(name, number, torch.zeros(shape), torch.zeros(shape), box, 0.5, len(with_it))
    if len(with_it) == 1:
        only = with_it[0]
        mask, known = atlas.pull(
            only.embedded.c_atlas, only.embedded.foreground, _occupancy(only, number), blank.nodes_atlas()
        )
    else:
        mask, known = atlas.least_squares(drawn, box, shape)
    made = Structure(name, number, mask, known, box, 0.5, len(with_it))
    level = atlas.calibrated_level(made, drawn)
    return Structure(name, number, mask, known, box, level, len(with_it))


def _occupancy(sample: _Labelled, number: int):
    """Membership at points of the exam's box: the label map read linearly."""
    volume = Volume((sample.labels.array == number).astype(np.float32), sample.labels.affine)

    def at(points_box: Float[Tensor, "1 3 point"]) -> Tensor:
        points_mm = apply(sample.embedded.prepared.box_to_mm, points_box[0].T.double().numpy())
        return torch.from_numpy(sample_mm(volume, points_mm, outside=0.0))

    return at


def locate(
    model: Model, exam: Volume, structures: Iterable[str] | None = None, embedded: Embedded | None = None
) -> dict[str, Found]:
    """Find structures in an exam.

    Args:
        structures: names of the library; all of it by default.
        embedded: the exam's map, where it is known already.

    Returns:
        One `Found` per structure, masks on the exam's own grid. Where masks would overlap, a voxel goes to the
        structure that exceeds its level most.

    Raises:
        StructureError: an unknown name. ExamError: an exam that cannot be prepared.
    """
    wanted = [model.structure(name) for name in (model.structures if structures is None else structures)]
    embedded = embedded or embed(model, exam)
    alike = _likeness(model, embedded)
    known = alike.of_exam() >= model.familiar
    to_box = np.linalg.inv(embedded.prepared.box_to_mm) @ exam.affine
    best = {}
    claims = []
    for structure, reached in zip(wanted, _coverages(wanted, embedded), strict=True):
        coverage = reached if known else 0.0  # an exam unlike any that was learned has coordinates without meaning
        region = None if coverage < ABSENT else _region(structure, embedded, to_box, exam.shape)
        claims.append((structure, coverage, region, _scores(structure, embedded, to_box, region)))
    owner = _owners(claims, exam.shape)
    for number, (structure, coverage, region, score) in enumerate(claims):
        mask = None
        if score is not None:
            mask = np.zeros(exam.shape, dtype=bool)
            mask[region] = (score > 0) & (owner[region] == number)
        best[structure.name] = _found(structure, coverage, mask, region, exam, alike)
    return best


def _coverages(structures: list[Structure], embedded: Embedded) -> list[float]:
    """For each structure the share of its nodes whose place was found inside the scan."""
    points = [torch.zeros(3, 0)]
    for structure in structures:
        nodes = structure.nodes_atlas()[0][:, structure.mask > structure.level]
        points.append(nodes[:, :: nodes.shape[1] // COVERAGE_POINTS + 1])
    found = warp.implicit(embedded.c_atlas, torch.cat(points, dim=1)[None], embedded.foreground)
    shares = found.valid[0, 0].float().split([part.shape[1] for part in points])[1:]
    return [float(share.mean()) if len(share) else 0.0 for share in shares]


def _region(structure: Structure, embedded: Embedded, to_box: np.ndarray, shape) -> tuple[slice, ...] | None:
    """The block of the exam's voxels that can belong to a structure; None where none can."""
    near = grid.inside(structure.to_own_box(embedded.c_atlas) * 0.999)[0, 0].numpy() & embedded.prepared.foreground
    if not near.any():
        return None
    size = near.shape[0]
    corners = np.array([[axis[0] - 1, axis[-1] + 1] for axis in map(np.unique, np.nonzero(near))])
    corners = corners / (size - 1) * 2 - 1
    points = np.stack(np.meshgrid(*corners, indexing="ij"), axis=-1).reshape(-1, 3)
    voxels = apply(np.linalg.inv(to_box), points)
    low = np.clip(np.floor(voxels.min(axis=0)), 0, np.array(shape) - 1).astype(int)
    high = np.clip(np.ceil(voxels.max(axis=0)) + 1, low + 1, shape).astype(int)
    return tuple(slice(a, b) for a, b in zip(low, high, strict=True))


def _scores(structure: Structure, embedded: Embedded, to_box: np.ndarray, region) -> np.ndarray | None:
    """How far the sampled mask exceeds its level, −1 ... +1, on a block of the exam; None where there is none."""
    if region is None:
        return None
    axes = [np.arange(s.start, s.stop) for s in region]
    linear, offset = to_box[:3, :3], to_box[:3, 3]
    parts = [np.multiply.outer(linear[:, a], axes[a]) for a in range(3)]
    box = parts[0][:, :, None, None] + parts[1][:, None, :, None] + parts[2][:, None, None, :]
    box = torch.from_numpy((box + offset[:, None, None, None]).astype(np.float32))[None]
    step = 2 / (embedded.prepared.size - 1)
    in_view = (box.abs() <= 1 + step).all(dim=1, keepdim=True)
    value = structure.membership(grid.sample(embedded.c_atlas, box)) * in_view
    value = value * (grid.sample(embedded.foreground.float(), box) > 0.25)
    score = (value - structure.level) / (1 - structure.level)
    return torch.where(value > structure.level, score, -1.0)[0, 0].numpy()


def _owners(claims, shape) -> np.ndarray:
    """For every voxel the structure that claims it most."""
    owner = np.full(shape, -1, dtype=np.int16)
    height = np.zeros(shape, dtype=np.float32)
    for number, (_, _, region, score) in enumerate(claims):
        if score is None:
            continue
        wins = score > height[region]
        owner[region][wins] = number
        height[region][wins] = score[wins]
    return owner


def _found(structure, coverage, mask, region, exam, alike) -> Found:
    nothing = Found(structure.name, structure.label, "absent", coverage, None, None, None, None, None)
    if mask is None or not mask.any():
        return nothing
    voxels = np.argwhere(mask[region]) + [s.start for s in region]
    places = apply(exam.affine, voxels)
    half = np.abs(exam.affine[:3, :3]).sum(axis=1) / 2
    volume = len(voxels) * abs(np.linalg.det(exam.affine[:3, :3])) / 1000
    box = (tuple((places.min(axis=0) - half).tolist()), tuple((places.max(axis=0) + half).tolist()))
    return Found(
        name=structure.name,
        label=structure.label,
        status="present" if coverage >= PRESENT else "cut_off",
        coverage=coverage,
        confidence=_confidence(structure, alike),
        volume_ml=float(volume),
        centroid_mm=tuple(places.mean(axis=0).tolist()),
        box_mm=box,
        mask=mask,
    )


class _Likeness(NamedTuple):
    """How well an exam looks like the atlas aligned to it, on a grid of half the nodes."""

    c_atlas: Coordinates
    local: Tensor
    """Local correlation of features, 0 ... 1, and 0 where the map folds; (1, 1, i, j, k)."""
    foreground: Tensor

    def of_exam(self) -> float:
        """Mean over the patient."""
        return float((self.local * self.foreground).sum() / self.foreground.sum().clamp_min(1))


def _likeness(model: Model, embedded: Embedded) -> _Likeness:
    shape = tuple(n // 2 for n in embedded.prepared.hu.shape)
    c_atlas = grid.resize(embedded.c_atlas, shape)
    image = grid.shrink(torch.from_numpy(embedded.prepared.image)[None, None], shape)
    local = likeness(c_atlas, image, model.atlas, model.autoencoder)
    foreground = grid.resize(embedded.foreground.float(), shape)
    return _Likeness(c_atlas, local, foreground)


def _confidence(structure: Structure, alike: _Likeness) -> float:
    """Mean likeness in and next to the structure."""
    member = (structure.membership(alike.c_atlas) > 0.5 * structure.level).float()
    weight = F.max_pool3d(member, 3, 1, 1) * alike.foreground
    return float((alike.local * weight).sum() / weight.sum().clamp_min(1))
