"""Voxel classifiers: what many labelled exams teach of how a structure looks, and where it ends.

The mask of a structure in the atlas says where it ought to lie, and `deepatlas.tissue` counts which HU occur in it.
Where many exams are labelled, perceptrons learn more: of a point near the structure they see the HU of what surrounds
it, near by and twice as far, what the mask says there and around, and where in the structure it lies; they add to the
odds of the mask. They learn from single points of all exams at once, in about a minute for each structure.

The members of a classifier learn from other parts of the exams, and each exam is judged by a member that did not learn
from it: so the level of the structure is chosen, and whether the classifier is better than the mask and kept.

Source: ours; auto-context (Tu and Bai 2010), where classifiers of voxels are given the odds of an earlier answer.
"""

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from scipy import ndimage, special
from torch import Tensor

from deepatlas import grid, tissue
from deepatlas.atlas import LEVELS, SUREST, Structure
from deepatlas.config import Classifying
from deepatlas.embedding import Embedded
from deepatlas.networks import VoxelClassifier
from deepatlas.places import linear_to_atlas, nearest_rotation
from deepatlas.prepare import sample_mm
from deepatlas.volume import Volume, apply, corners_mm, planes_mm

STEP_MM = 3.0
"""Spacing of the grid on which points and what surrounds them lie."""

REACH = 3
"""Nodes of the HU seen on every side of a point; of those twice as far apart, as many."""

NEAR = 0.02
"""Membership from which a point is looked at closer."""

LEAST_ODDS = float(np.log(NEAR / (1 - NEAR)))

LOWEST_HU, HIGHEST_HU, UNIT_HU = -320.0, 700.0, 200.0
"""HU are clipped to these and divided by the last."""

ODDS = 3.0
"""Log odds are divided by this."""

HU_WEIGHTS = (0.0, 0.5, 1.0)
"""How much the HU of the exam's own voxels, finer than the grid, may still move the odds (`deepatlas.tissue`)."""

JUDGED_MM = 2.0
"""Exams with voxels finer than this are judged on every n-th."""

FAR = 20.0
"""Log odds of what cannot be."""


def _cube(reach: int, step: int = 1) -> Int[np.ndarray, "offset 3"]:
    """Steps from a node to those around it."""
    return step * (np.moveaxis(np.indices((2 * reach + 1,) * 3), 0, -1).reshape(-1, 3) - reach)


HU_NEAR, HU_FAR, ODDS_AROUND = _cube(REACH), _cube(REACH, 2), _cube(1, 2)
MARGIN = 2 * REACH
"""Nodes around the points that the grid has to hold."""


class Surroundings(NamedTuple):
    """The part of an exam in which a structure may lie, on a grid of its own, and the points to look at."""

    affine: Float[np.ndarray, "4 4"]
    """Index of the grid → mm."""
    near: Float[Tensor, "i j k"]
    """HU, clipped and scaled."""
    far: Float[Tensor, "i j k"]
    """The same, smoothed: what is seen of it lies two nodes apart."""
    odds: Float[Tensor, "i j k"]
    """Log odds of the mask."""
    points: Int[Tensor, "point 3"]
    """Indices of the points near the structure."""
    own_box: Float[Tensor, "point 3"]
    """Where in the structure they lie (`Structure.to_own_box`)."""

    def inputs(self, rows: Int[Tensor, "row"]) -> Float[Tensor, "row inputs"]:
        """What a classifier is given of some of the points."""
        strides = torch.tensor(self.near.stride())
        start = (self.points[rows].long() * strides).sum(dim=1, keepdim=True)

        def around(values: Tensor, offsets: np.ndarray) -> Tensor:
            return values.flatten()[start + (torch.from_numpy(offsets) * strides).sum(dim=1)].float()

        parts = [around(self.near, HU_NEAR), around(self.far, HU_FAR), around(self.odds, ODDS_AROUND) / ODDS]
        return torch.cat([*parts, self.own_box[rows]], dim=1)

    def given(self, rows: Int[Tensor, "row"]) -> Float[Tensor, "row"]:
        """The log odds of the mask at some of the points."""
        return self.odds[tuple(self.points[rows].long().T)].float()


def surroundings(structure: Structure, exam: Volume, embedded: Embedded) -> Surroundings | None:
    """What there is to see of a structure in an exam; None where it lies nowhere in it.

    The grid stands upright as the map says, however the patient lies in the file.
    """
    size = embedded.prepared.size
    member = structure.membership(embedded.c_atlas)[0, 0].numpy() > 0
    nodes = np.argwhere(member & embedded.prepared.foreground)
    if not len(nodes):
        return None
    affine = np.eye(4)
    affine[:3, :3] = STEP_MM * nearest_rotation(linear_to_atlas(embedded)).T
    to_grid = np.linalg.inv(affine) @ embedded.prepared.box_to_mm
    places = apply(to_grid, nodes / (size - 1) * 2 - 1)
    reach = MARGIN + np.abs(to_grid[:3, :3]).sum(axis=1) * 2 / (size - 1)
    affine[:3, 3] = apply(affine, places.min(axis=0) - reach)
    shape = tuple(int(n) for n in np.ceil(np.ptp(places, axis=0) + 2 * reach) + 1)
    near = torch.from_numpy(_hu(exam, affine, shape)).clamp(LOWEST_HU, HIGHEST_HU) / UNIT_HU
    box = apply(np.linalg.inv(embedded.prepared.box_to_mm) @ affine, np.moveaxis(np.indices(shape), 0, -1))
    box = torch.from_numpy(np.moveaxis(box, -1, 0).astype(np.float32))[None]
    c_atlas = grid.sample(embedded.c_atlas, box)
    member = structure.membership(c_atlas)[0, 0]
    seen = embedded.shows(box)
    points = ((member > NEAR) & seen)[(slice(MARGIN, -MARGIN),) * 3].nonzero() + MARGIN
    own_box = structure.to_own_box(c_atlas)[0][:, *points.T].T
    odds = torch.logit(member.clamp(SUREST, 1 - SUREST))
    return Surroundings(affine, near.half(), _smoothed(near).half(), odds.half(), points.short(), own_box)


def _hu(exam: Volume, affine: np.ndarray, shape: tuple[int, int, int]) -> Float[np.ndarray, "i j k"]:
    """HU on a grid; those of voxels that are finer than it are averaged."""
    width = np.maximum(1, (STEP_MM / exam.spacing_mm - 1 + 1e-6) // 2 * 2 + 1).astype(int)  # an odd number of voxels
    block = _block(exam, corners_mm(shape, affine), width // 2)
    part = exam.array[block].astype(np.float32)
    part = ndimage.uniform_filter(part, width, mode="nearest") if width.max() > 1 else part
    return sample_mm(Volume(part, _affine_of(exam, block)), apply(affine, np.moveaxis(np.indices(shape), 0, -1)))


def _smoothed(values: Float[Tensor, "i j k"]) -> Float[Tensor, "i j k"]:
    """Each node with its neighbours, by a quarter, a half and a quarter along every axis."""
    result = values
    for axis in range(3):
        padded = torch.cat([result.narrow(axis, 0, 1), result, result.narrow(axis, -1, 1)], dim=axis)
        nodes = values.shape[axis]
        sides = padded.narrow(axis, 0, nodes) + padded.narrow(axis, 2, nodes)
        result = 0.5 * result + 0.25 * sides
    return result


class Voxels(NamedTuple):
    """Voxels of an exam that may belong to a structure."""

    block: tuple[slice, slice, slice]
    """The part of the exam that they lie in."""
    near: Bool[np.ndarray, "i j k"]
    """Which of the block."""
    index: Float[np.ndarray, "3 voxel"]
    """Where they lie on the grid of `Surroundings`."""
    moved: Float[np.ndarray, "voxel"]
    """By how much their HU move the log odds, see `deepatlas.tissue`."""


def voxels_of(structure: Structure, exam: Volume, embedded: Embedded, seen: Surroundings) -> Voxels:
    """The voxels of an exam, within the patient, that the mask calls possible."""
    block = _block(exam, corners_mm(seen.near.shape, seen.affine))
    near = np.zeros([part.stop - part.start for part in block], dtype=bool)
    to_grid = np.linalg.inv(seen.affine) @ _affine_of(exam, block)
    odds = seen.odds.float().numpy()
    for plane, index in enumerate(planes_mm(near.shape, to_grid)):  # of the grid here, not mm
        near[plane] = _read(odds, np.moveaxis(index, -1, 0)) > LEAST_ODDS
    index = apply(to_grid, np.argwhere(near))
    box = apply(np.linalg.inv(embedded.prepared.box_to_mm) @ seen.affine, index)
    box = torch.from_numpy(box.T.astype(np.float32))[None]
    view = embedded.shows(box)
    near[near] = view.numpy()
    index, box = index[view.numpy()].T.astype(np.float32), box[:, :, view]
    if structure.tissue is None:
        return Voxels(block, near, index, np.zeros(index.shape[1], np.float32))
    parts = tissue.parts_of(structure.to_own_box(grid.sample(embedded.c_atlas, box)))[:, 0]
    own = exam.array[block][near]
    around = grid.sample(torch.from_numpy(embedded.prepared.hu)[None, None], box)[0, 0].numpy()
    bins = (torch.from_numpy(tissue.bins_of(hu)) for hu in (own, around))
    return Voxels(block, near, index, structure.tissue[(*parts, *bins)].numpy())


def _block(
    exam: Volume, corners: Float[np.ndarray, "corner 3"], margin: int | np.ndarray = 0
) -> tuple[slice, slice, slice]:
    """The voxels of an exam around places in mm, and so many more on each side."""
    voxels = apply(exam.inverse, corners)
    low = np.clip(np.floor(voxels.min(axis=0)).astype(int) - margin, 0, np.array(exam.shape) - 1)
    high = np.clip(np.ceil(voxels.max(axis=0)).astype(int) + 1 + margin, low + 1, exam.shape)
    return tuple(slice(int(first), int(last)) for first, last in zip(low, high, strict=True))


def _affine_of(exam: Volume, block: tuple[slice, slice, slice]) -> Float[np.ndarray, "4 4"]:
    """Voxel of a part of an exam → mm."""
    shift = np.eye(4)
    shift[:3, 3] = [part.start for part in block]
    return exam.affine @ shift


def _read(values: np.ndarray, index: Float[np.ndarray, "3 *voxels"]) -> Float[np.ndarray, "*voxels"]:
    """Values on a grid at places between its nodes; far below anything beyond it."""
    return ndimage.map_coordinates(values, index, order=1, mode="constant", cval=-FAR, output=np.float32)


class Sample(NamedTuple):
    """A structure as drawn on one exam."""

    seen: Surroundings
    share: Float[Tensor, "point"]
    """The drawing at the points, read linearly: 0 ... 1."""
    index: Float[np.ndarray, "3 voxel"]
    """Of the exam's own voxels near the structure, thinned where they are fine; see `Voxels`."""
    moved: Float[np.ndarray, "voxel"]
    inside: Bool[np.ndarray, "voxel"]
    """Which of them were drawn."""
    drawn: int
    """How many voxels of the exam, thinned alike, were drawn, near or not."""

    @classmethod
    def of(cls, structure: Structure, exam: Volume, labels: Volume, embedded: Embedded) -> "Sample | None":
        """From the exam's label map; None where nothing of the structure was drawn, or the map does not show it."""
        drawn = labels.array == structure.label
        seen = surroundings(structure, exam, embedded) if drawn.any() else None
        if seen is None or not len(seen.points):
            return None
        share = sample_mm(
            Volume(drawn.astype(np.float32), labels.affine), apply(seen.affine, seen.points.numpy()), outside=0.0
        )
        voxels = voxels_of(structure, exam, embedded, seen)
        every = np.maximum(1, np.floor(JUDGED_MM / exam.spacing_mm + 1e-6)).astype(int)
        own = np.argwhere(voxels.near) + [part.start for part in voxels.block]
        kept = (own % every == 0).all(axis=1)
        index, moved, inside = voxels.index[:, kept], voxels.moved[kept], drawn[tuple(own[kept].T)]
        count = int(drawn[tuple(slice(None, None, n) for n in every)].sum())
        return cls(seen, torch.from_numpy(share).half(), index, moved, inside, count)

    def write(self, path: Path) -> None:
        """To a file of its own."""
        seen = {name: np.asarray(value) for name, value in self.seen._asdict().items()}
        np.savez(path, **seen, **{name: np.asarray(value) for name, value in self._asdict().items() if name != "seen"})

    @classmethod
    def read(cls, path: Path) -> "Sample":
        """What `write` wrote."""
        with np.load(path) as file:
            seen = (torch.from_numpy(file[name]) for name in Surroundings._fields[1:])
            rest = (file[name] for name in ("index", "moved", "inside"))
            share = torch.from_numpy(file["share"])
            return cls(Surroundings(file["affine"], *seen), share, *rest, int(file["drawn"]))

    def scores(self, odds: Float[np.ndarray, "i j k"]) -> Float[np.ndarray, "weight level"]:
        """Dice on the exam's own voxels with each of `HU_WEIGHTS`, at each of `LEVELS`.

        Args:
            odds: log odds on the grid of what is seen.
        """
        read, levels = _read(odds, self.index), torch.logit(LEVELS).numpy()[:, None]
        over = np.stack([read + weight * self.moved > levels for weight in HU_WEIGHTS])
        return 2 * (over & self.inside).sum(axis=2) / np.maximum(over.sum(axis=2) + self.drawn, 1)


class Taught(NamedTuple):
    """What learning the look of a structure came to."""

    structure: Structure
    """With a classifier, where that is better than the mask with its HU."""
    exams: int
    alone: float
    """Mean Dice of the mask with its HU, see `learn`."""
    learned: float
    """Mean Dice of the classifier on exams of which its members did not learn."""


def taught(
    structures: Iterable[Structure],
    labelled: Iterable[tuple[Volume, Volume, Embedded]],
    how: Classifying | None = None,
    on_done: Callable[[int, int, str], None] | None = None,
) -> list[Taught]:
    """Learn how structures look, of those that enough exams show.

    What is learned from waits in a temporary folder: that of one structure at a time is held in memory.

    Args:
        structures: of one model, made from these exams.
        labelled: the exams, their label maps and their coordinates.
        on_done: called after each structure as `on_done(done, total, name)`.
    """
    how, structures, result = how or Classifying(), list(structures), []
    with tempfile.TemporaryDirectory() as folder:
        waiting: list[list[Path]] = [[] for _ in structures]
        for exam, labels, embedded in labelled:
            for number, (one, own) in enumerate(zip(structures, waiting, strict=True)):
                if (sample := Sample.of(one, exam, labels, embedded)) is not None:
                    own.append(Path(folder, f"{number}-{len(own)}.npz"))
                    sample.write(own[-1])
        for done, (one, own) in enumerate(zip(structures, waiting, strict=True), start=1):
            if len(own) >= how.least_exams:
                network, alone, learned = learn([Sample.read(path) for path in own], how)
                better = replace(one, classifier=network) if learned > alone else one
                result.append(Taught(better, len(own), alone, learned))
            if on_done is not None:
                on_done(done, len(structures), one.name)
    return result


def learn(samples: list[Sample], how: Classifying) -> tuple[VoxelClassifier, float, float]:
    """A classifier, the mean Dice of the mask without it, and its own: of each exam by the member that did not learn
    from it. Both with the weight of HU and at the level that are best for them on these exams.

    Member m learns from all samples but number m, m + members, m + 2 members, ...
    """
    chance = torch.Generator().manual_seed(how.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(how.seed)
        network = VoxelClassifier(how.members, how.width)
    optimiser = torch.optim.AdamW(network.parameters(), how.rate, weight_decay=how.decay)
    steps = -(-len(samples) * how.points // how.batch)
    for step in range(steps):
        chosen = torch.randint(len(samples), (how.batch // how.together,), generator=chance)
        drawn = [_drawn(samples[n], how.together, chance) for n in chosen]
        inputs, given, share = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        left_out = (chosen % how.members).repeat_interleave(how.together)
        learned = (left_out != torch.arange(how.members)[:, None]).float()
        found = network(inputs) + given
        loss = F.binary_cross_entropy_with_logits(found, share.expand_as(found), learned, reduction="sum")
        fall = 0.5 * (1 + np.cos(np.pi * step / steps))
        optimiser.param_groups[0]["lr"] = how.rate * fall * min(1.0, (step + 1) / how.warm_up)
        optimiser.zero_grad()
        (loss / (how.batch - how.batch / how.members)).backward()
        optimiser.step()
    network.requires_grad_(False)
    alone = np.mean([sample.scores(sample.seen.odds.float().numpy()) for sample in samples], axis=0)
    added = (_added(network, sample.seen)[n % how.members] for n, sample in enumerate(samples))
    pairs = zip(samples, added, strict=True)
    scores = np.mean([sample.scores(_odds(sample.seen, more)) for sample, more in pairs], axis=0)
    best = np.unravel_index(scores.argmax(), scores.shape)
    network.hu.copy_(torch.tensor(HU_WEIGHTS[best[0]]))
    network.level.copy_(LEVELS[best[1]])
    return network, float(alone.max()), float(scores.max())


def _drawn(sample: Sample, count: int, chance: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Some points of a sample: what is seen of them, the odds of the mask, and what was drawn."""
    rows = torch.randint(len(sample.share), (count,), generator=chance)
    return sample.seen.inputs(rows), sample.seen.given(rows), sample.share[rows].float()


AT_ONCE = 16_384
"""Points that a classifier looks at in one go."""


@torch.no_grad()
def _added(network: VoxelClassifier, seen: Surroundings) -> Float[Tensor, "member point"]:
    parts = torch.arange(len(seen.points)).split(AT_ONCE)
    return torch.cat([network(seen.inputs(rows)) for rows in parts], dim=1)


def _odds(seen: Surroundings, added: Float[Tensor, "point"]) -> Float[np.ndarray, "i j k"]:
    odds = seen.odds.float()
    odds[tuple(seen.points.long().T)] += added
    return odds.numpy()


def likely(
    structure: Structure, exam: Volume, embedded: Embedded
) -> tuple[tuple[slice, slice, slice], Float[np.ndarray, "i j k"]]:
    """A part of an exam, and the probability that its voxels belong to a structure by its classifier, the mean of its
    members; 0 outside of the patient and where the mask calls it impossible."""
    network, seen = structure.classifier, surroundings(structure, exam, embedded)
    if seen is None:
        return (slice(0),) * 3, np.zeros((0, 0, 0), dtype=np.float32)
    voxels = voxels_of(structure, exam, embedded, seen)
    odds = _odds(seen, _added(network, seen).mean(dim=0))
    found = np.zeros(voxels.near.shape, dtype=np.float32)
    found[voxels.near] = special.expit(_read(odds, voxels.index) + float(network.hu) * voxels.moved)
    return voxels.block, found
