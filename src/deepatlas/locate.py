"""Finding structures: define them once, find them in any exam on the exam's own grid.

Every answer goes atlas → box → mm → voxel through affines, for any grid; only the part of an exam in which a
structure can lie is sampled. What is not in the scan is said to be absent, and no mask is written elsewhere.

Source: §2.2 (a forward pass labels every voxel), §3.2.1 (propagation by linear resampling), §5.2.7 (structures).
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from deepatlas import atlas, grid, kernels_cpu, tissue, warp
from deepatlas.atlas import Drawn, Structure
from deepatlas.checkpoint import Model
from deepatlas.embedding import IN_VIEW, Embedded, Likeness, embed, familiar, likeness_of
from deepatlas.errors import StructureError
from deepatlas.found import Found, extent
from deepatlas.prepare import sample_mm
from deepatlas.refine import settled
from deepatlas.segmentation import redrawn_by_classifiers, redrawn_by_head
from deepatlas.volume import Volume, apply

PRESENT = 0.95
"""Coverage from which a structure counts as wholly in the scan."""

ABSENT = 0.14
"""Coverage below which a structure counts as not in the scan."""

COVERAGE_POINTS = 3000
"""At most so many nodes of a structure are looked for."""

DEFINE_SPACING_MM = 2.0
"""Label maps finer than this are read at this spacing when a structure is made from several exams."""

LEAST_POINTS = 100
"""What has fewer voxels then is read as finely as it was drawn."""

SPREAD_MM = 4.0
"""How surely a structure that was drawn on a single exam lies there in another, as the width of a Gaussian. Of n exams,
whose mean is surer, it is a √n-th part."""


def define(
    model: Model,
    exams: Iterable[tuple[Volume, Volume]],
    names: Mapping[str, int],
    embedded: Iterable[Embedded] = (),
    required: bool = True,
) -> Model:
    """The model with structures made from labelled exams; those of the same name are replaced, the others kept.

    An exam on which a structure has no voxel takes no part in that structure: not drawn is not absent.

    Args:
        exams: pairs of an exam and its label map on the same grid.
        names: structure → number in the label maps.
        embedded: maps of the exams in the same order, where they are known already.
        required: refuse a structure that has no voxel in any exam, instead of leaving it out.

    Raises:
        StructureError: a structure has no voxel in any exam.

    Source: §5.2.7; see `deepatlas.atlas` for one exam and for several.
    """
    maps = iter(embedded)
    samples: list[_Labelled] = []
    for exam, labels in exams:
        samples.append(_Labelled.read(model, exam, labels, names, next(maps, None)))
        samples = _lightened(samples)
    if not required:
        names = {name: number for name, number in names.items() if any(number in s.shown for s in samples)}
    return model.with_structures(*(_made(model, name, number, samples) for name, number in names.items()))


class _Labelled(NamedTuple):
    """A labelled exam, reduced to what structures are made of."""

    embedded: Embedded | None
    labels: Volume | None
    """Both only while no other exam shows one of the structures, see `_lightened`."""
    shown: frozenset[int]
    """Numbers of the structures that it shows."""
    c_atlas: Tensor
    """(3, point): coordinates of the label map's voxels (thinned where it is fine) in the patient."""
    values: np.ndarray
    """(point,): label numbers there."""
    own: np.ndarray
    """(point,): HU there."""
    around: np.ndarray
    """(point,): HU of the prepared exam there."""

    @classmethod
    def read(cls, model, exam: Volume, labels: Volume, names: Mapping[str, int], known: Embedded | None) -> "_Labelled":
        embedded = known or settled(model, exam, embed(model, exam))
        stride = np.maximum(1, np.floor(DEFINE_SPACING_MM / labels.spacing_mm + 1e-6)).astype(int)
        index = np.stack(
            np.meshgrid(*[np.arange(0, n, s) for n, s in zip(labels.shape, stride, strict=True)], indexing="ij"), -1
        )
        index = np.concatenate([index.reshape(-1, 3), _thin(labels, stride, names.values())])
        box = apply(np.linalg.inv(embedded.prepared.box_to_mm) @ labels.affine, index)
        inside = (np.abs(box) <= 1).all(axis=1)
        index, box = index[inside], torch.from_numpy(box[inside].T.astype(np.float32))[None]
        here = (grid.sample(embedded.foreground.float(), box) > 0.5)[0, 0]
        c = grid.sample(embedded.c_atlas, box[:, :, here])[0]
        around = grid.sample(torch.from_numpy(embedded.prepared.hu)[None, None], box[:, :, here])[0, 0].numpy()
        index = tuple(index[here.numpy()].T)
        values = labels.array[index]
        shown = frozenset(np.unique(values).tolist()) & set(names.values())
        return cls(embedded, labels, shown, c, values, exam.array[index], around)

    def tissue(self, structure: Structure) -> Tensor:
        """What the structure and what is next to it looks like here."""
        near = structure.membership(self.c_atlas[None])[0, 0] > tissue.NEAR
        parts = tissue.parts_of(structure.to_own_box(self.c_atlas[None, :, near]))[:, 0]
        near = near.numpy()
        return tissue.counted(parts, self.own[near], self.around[near], self.values[near] == structure.label)

    def found(self, structure: Structure) -> tuple[Tensor, Tensor]:
        """The membership of points in its box or drawn, as `locate` finds it, and which of them were drawn.

        A single exam's own HU would speak for its own drawing, so there the mask speaks alone.
        """
        inside = torch.from_numpy(self.values == structure.label)
        own_box = structure.to_own_box(self.c_atlas[None])
        near = grid.inside(own_box)[0, 0] | inside
        value = structure.membership(self.c_atlas[None, :, near])
        if structure.exams > 1:
            hu = (part[None, near.numpy()] for part in (self.own, self.around))
            value = tissue.moved(value, structure.tissue, tissue.parts_of(own_box[:, :, near]), *hu)
        return value[0, 0], inside[near]

    def drawn(self, number: int, box_atlas: Tensor | None = None) -> Drawn:
        """The points of one structure, limited to a box of the atlas."""
        inside = torch.from_numpy((self.values == number).astype(np.float32))
        if box_atlas is None:
            return Drawn(self.c_atlas[:, inside > 0], inside[inside > 0])
        near = ((self.c_atlas >= box_atlas[0][:, None]) & (self.c_atlas <= box_atlas[1][:, None])).all(dim=0)
        near |= inside > 0
        return Drawn(self.c_atlas[:, near], inside[near])


def _thin(labels: Volume, stride: np.ndarray, numbers: Iterable[int]) -> np.ndarray:
    """Voxels of structures of which thinning a label map leaves less than `LEAST_POINTS`, those that it leaves out."""
    if (stride == 1).all():
        return np.zeros((0, 3), dtype=int)
    drawn = np.argwhere(np.isin(labels.array, list(numbers)))
    left = (drawn % stride == 0).all(axis=1)
    values = labels.array[tuple(drawn.T)]
    few = [number for number in np.unique(values) if (values[left] == number).sum() < LEAST_POINTS]
    return drawn[~left & np.isin(values, few)]


def _lightened(samples: list[_Labelled]) -> list[_Labelled]:
    """Samples without what only a structure needs that no other exam shows: the map and the label map."""
    times = Counter(number for one in samples for number in one.shown)
    return [
        one if any(times[number] == 1 for number in one.shown) else one._replace(embedded=None, labels=None)
        for one in samples
    ]


def _made(model: Model, name: str, number: int, samples: list[_Labelled]) -> Structure:
    spacing_mm = 2.0
    per_mm = torch.from_numpy(1 / np.linalg.norm(model.atlas_to_mm.numpy()[:3, :3], axis=0)).float()
    with_it = [s for s in samples if number in s.shown]
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
    nodes_mm = (box[1] - box[0]) / (torch.tensor(shape) - 1) / per_mm
    mask = atlas.spread(mask, (SPREAD_MM / len(with_it) ** 0.5 / nodes_mm).tolist())
    made = Structure(name, number, mask, known, box, 0.5, len(with_it))
    made = replace(made, tissue=tissue.log_odds([sample.tissue(made) for sample in with_it]))
    return replace(made, level=atlas.calibrated_level([sample.found(made) for sample in with_it]))


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
        embedded: the exam's map, where it is known already; else the network's, looked at again where it is in doubt
            (`deepatlas.refine.settled`).

    Returns:
        One `Found` per structure, masks on the exam's own grid. Where masks would overlap, a voxel goes to the
        structure that exceeds its level most.

    Raises:
        StructureError: an unknown name. ExamError: an exam that cannot be prepared.
    """
    wanted = [model.structure(name) for name in (model.structures if structures is None else structures)]
    embedded = embedded or settled(model, exam, embed(model, exam))
    embedded = embedded._replace(alike=likeness_of(model, embedded))
    known = familiar(model, embedded)
    coverages = [reached if known else 0.0 for reached in _coverages(wanted, embedded)]
    # an exam unlike any that was learned has coordinates without meaning
    claims = _claim(wanted, coverages, embedded, exam)
    found = {one.name: _found(one, n, coverages[n], claims, exam, embedded.alike) for n, one in enumerate(wanted)}
    found = redrawn_by_classifiers(model, exam, embedded, found)
    return redrawn_by_head(model, exam, embedded, found) if model.segmented else found


def _coverages(structures: list[Structure], embedded: Embedded) -> list[float]:
    """For each structure the share of its nodes whose place was found inside the scan."""
    points = [torch.zeros(3, 0)]
    for structure in structures:
        nodes = structure.nodes_atlas()[0][:, structure.mask > structure.level]
        points.append(nodes[:, :: nodes.shape[1] // COVERAGE_POINTS + 1])
    found = warp.implicit(embedded.c_atlas, torch.cat(points, dim=1)[None], embedded.foreground)
    shares = found.valid[0, 0].float().split([part.shape[1] for part in points])[1:]
    return [float(share.mean()) if len(share) else 0.0 for share in shares]


class _Claims(NamedTuple):
    """What each of some structures got of an exam."""

    owner: np.ndarray
    """The structure of every voxel, −1 for none."""
    counts: np.ndarray
    """Voxels of each structure."""
    sums: np.ndarray
    """(structure, 2): membership of all voxels in and next to it, and of its own."""
    spans: np.ndarray
    """(structure, axis, 3): of the places of its voxels in mm the sum, the lowest and the highest."""

    def expected_dice(self, number: int) -> float:
        """Dice of a mask if its membership is right: ``2 Σ_mask p / (|mask| + Σ p)``."""
        everywhere, own = self.sums[number]
        return float(2 * own / (self.counts[number] + everywhere))


def _claim(wanted: list[Structure], coverages: list[float], embedded: Embedded, exam: Volume) -> _Claims:
    """For every voxel the structure that claims it most, from one pass over the blocks that structures can lie in."""
    to_box = np.linalg.inv(embedded.prepared.box_to_mm) @ exam.affine
    nothing = np.zeros((3, 2), dtype=np.int64)
    regions = [
        nothing if coverage < ABSENT else _region(structure, embedded, to_box, exam.shape)
        for structure, coverage in zip(wanted, coverages, strict=True)
    ]
    owner = np.full(exam.shape, -1, dtype=np.int16)
    counts = np.zeros((exam.shape[0], len(wanted)), dtype=np.int64)
    sums = np.zeros((*counts.shape, 2))
    spans = np.tile([0.0, np.inf, -np.inf], (*counts.shape, 3, 1))
    if not wanted:
        return _Claims(owner, counts.sum(axis=0), sums.sum(axis=0), spans.sum(axis=0))
    sizes = [structure.mask.numel() for structure in wanted]
    array = exam.array if exam.array.dtype in (np.int16, np.int32, np.float32) else exam.array.astype(np.float32)
    array = array if array.flags.forc else np.ascontiguousarray(array)
    prepared = torch.from_numpy(np.stack([embedded.prepared.hu, embedded.prepared.foreground]).astype(np.float32))
    unmoved = torch.zeros(*(tissue.PARTS,) * 3, tissue.BINS, tissue.BINS)
    kernels_cpu.claim(
        torch.cat([embedded.c_atlas[0], prepared]).numpy(),
        array.ravel(order="K"),
        np.array(array.strides) // array.itemsize,
        to_box[:3],
        np.asarray(exam.affine, dtype=np.float64)[:3],
        np.float32(1 + 2 / (embedded.prepared.size - 1)),
        np.float32(IN_VIEW),
        np.stack(regions),
        torch.cat([structure.mask.flatten() for structure in wanted]).float().numpy(),
        np.cumsum([0, *sizes[:-1]]),
        np.array([structure.mask.shape for structure in wanted]),
        torch.stack([structure.box_atlas for structure in wanted]).float().numpy(),
        np.array([structure.level for structure in wanted], dtype=np.float32),
        torch.stack([unmoved if one.tissue is None else one.tissue for one in wanted]).exp().numpy(),
        np.array([tissue.LOWEST, tissue.WIDTH], dtype=np.float32),
        np.float32(tissue.NEAR),
        owner,
        counts,
        sums,
        spans,
    )
    together = np.stack([spans[..., 0].sum(axis=0), spans[..., 1].min(axis=0), spans[..., 2].max(axis=0)], axis=-1)
    return _Claims(owner, counts.sum(axis=0), sums.sum(axis=0), together)


def _region(structure: Structure, embedded: Embedded, to_box: np.ndarray, shape) -> np.ndarray:
    """The block of the exam's voxels that can belong to a structure, (3, 2): first and one past the last."""
    near = grid.inside(structure.to_own_box(embedded.c_atlas) * 0.999)[0, 0].numpy() & embedded.prepared.foreground
    if not near.any():
        return np.zeros((3, 2), dtype=np.int64)
    size = near.shape[0]
    ends = [np.flatnonzero(near.any(axis=tuple({0, 1, 2} - {axis})))[[0, -1]] for axis in range(3)]
    corners = (np.array(ends) + np.array([-1, 1])) / (size - 1) * 2 - 1
    points = np.stack(np.meshgrid(*corners, indexing="ij"), axis=-1).reshape(-1, 3)
    voxels = apply(np.linalg.inv(to_box), points)
    low = np.clip(np.floor(voxels.min(axis=0)), 0, np.array(shape) - 1).astype(np.int64)
    high = np.clip(np.ceil(voxels.max(axis=0)) + 1, low + 1, shape).astype(np.int64)
    return np.stack([low, high], axis=1)


def owners_reference(structures: list[Structure], embedded: Embedded, exam: Volume, planes: slice) -> np.ndarray:
    """The owner of every voxel of some planes, each structure sampled everywhere in plain PyTorch: what the one pass
    of `locate` is held equal to."""
    to_box = np.linalg.inv(embedded.prepared.box_to_mm) @ exam.affine
    axes = [np.arange(n) for n in exam.shape]
    axes[0] = axes[0][planes]
    linear, offset = to_box[:3, :3], to_box[:3, 3]
    parts = [np.multiply.outer(linear[:, a], axes[a]) for a in range(3)]
    box = parts[0][:, :, None, None] + parts[1][:, None, :, None] + parts[2][:, None, None, :]
    box = torch.from_numpy((box + offset[:, None, None, None]).astype(np.float32))[None]
    in_view = embedded.shows(box)
    around = grid.sample(torch.from_numpy(embedded.prepared.hu)[None, None], box)[:, 0].numpy()
    owner = torch.full(box.shape[2:], -1, dtype=torch.int16)
    height = torch.zeros(box.shape[2:])
    for number, structure in enumerate(structures):
        c_atlas = grid.sample(embedded.c_atlas, box)
        value = structure.membership(c_atlas) * in_view
        if structure.tissue is not None:
            parts = tissue.parts_of(structure.to_own_box(c_atlas))
            value = tissue.moved(value, structure.tissue, parts, exam.array[planes][None], around)
        score = ((value - structure.level) / (1 - structure.level))[0, 0]
        owner = torch.where(score > height, number, owner)
        height = torch.maximum(score, height)
    return owner.numpy()


def _found(structure: Structure, number: int, coverage: float, claims: _Claims, exam: Volume, alike: Likeness) -> Found:
    count = int(claims.counts[number])
    if not count:
        return Found(structure.name, structure.label, "absent", coverage, None, None, None, None, None, -1)
    return Found(
        name=structure.name,
        label=structure.label,
        status="present" if coverage >= PRESENT else "cut_off",
        coverage=coverage,
        confidence=min(claims.expected_dice(number), alike.around(structure)),
        owner=claims.owner,
        number=number,
        **extent(count, claims.spans[number], exam),
    )
