"""Images of one part of the body, any modality, brought to one grid.

They are laid middle on middle, along the axes nearest to R, A, S, and then moved by whole nodes onto what they have in
common.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy import ndimage
from torch import Tensor

from deepatlas.errors import ExamError, LabelError
from deepatlas.prepare import sample_mm
from deepatlas.shapes import Image, Mask
from deepatlas.transforms import Transform
from deepatlas.volume import Volume, to_ras

HALVINGS = 4
"""Times a network may halve the grid: its sizes are multiples of 2⁴."""
LARGEST_GRID = 128
"""Nodes along the longest axis of a grid that nobody chose the spacing of."""

LARGEST_CLASS = 255
"""Label maps are kept in bytes."""


@dataclass(frozen=True)
class Frame:
    """A grid of one size and spacing, laid over every image middle on middle, along the axes nearest to R, A, S."""

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    scaling: str = "percentile"
    """How intensities become 0 ... 1: "percentile" (1st to 99th of what is above the least value), or "LOW:HIGH"."""

    def to_mm(self, volume: Volume, nodes: tuple[int, int, int] = (0, 0, 0)) -> np.ndarray:
        """Index of the grid → mm of an image, (4, 4). Voxels of the grid's own spacing are kept as they are.

        Args:
            nodes: so far is the grid moved from its place in the middle of the image.
        """
        ras = to_ras(volume)
        step = np.array(self.spacing_mm) / ras.spacing_mm
        own = np.abs(step - 1) < 1e-3
        step = np.where(own, 1.0, step)
        start = (np.array(ras.shape) - 1) / 2 - step * (np.array(self.shape) - 1) / 2
        start = np.where(own, np.floor(start), start)
        matrix = np.diag([*step, 1.0])
        matrix[:3, 3] = start + step * np.array(nodes)
        return ras.affine @ matrix

    def points_mm(self, volume: Volume, pose: "Pose | None" = None) -> np.ndarray:
        """Places of the grid's nodes in an image, (i, j, k, 3) mm.

        Args:
            pose: of the grid in the image; middle on middle by default.
        """
        pose = pose or Pose.affine(self.to_mm(volume))
        return pose.there.points(self.nodes())

    def nodes(self) -> np.ndarray:
        """The index of every node, (i, j, k, 3)."""
        return np.moveaxis(np.indices(self.shape), 0, -1)


class Pose(NamedTuple):
    """Where the grid lies in an image."""

    there: Transform
    """Index of the grid → mm of the image."""
    back: Transform
    """mm of the image → index of the grid."""

    @classmethod
    def affine(cls, to_mm: np.ndarray) -> "Pose":
        """By a matrix, index → mm (4, 4)."""
        return cls(Transform.affine(to_mm), Transform.affine(np.linalg.inv(to_mm)))


def frame_for(volumes: list[Volume], spacing_mm: float | None = None, scaling: str = "percentile") -> Frame:
    """The grid that holds every image whole, of their median spacing unless one is asked for.

    Raises:
        ExamError: the scaling cannot be read.
    """
    limits_of(scaling, np.zeros(2))
    upright = [to_ras(volume) for volume in volumes]
    extents = np.max([volume.spacing_mm * volume.shape for volume in upright], axis=0)
    spacing = np.median([volume.spacing_mm for volume in upright], axis=0)
    spacing = np.maximum(spacing, extents / LARGEST_GRID) if spacing_mm is None else np.full(3, spacing_mm)
    multiple = 2**HALVINGS
    shape = np.ceil(np.round(extents / spacing, 3) / multiple) * multiple
    return Frame(tuple(int(n) for n in shape), tuple(round(float(s), 6) for s in spacing), scaling)


def limits_of(scaling: str, values: np.ndarray) -> tuple[float, float]:
    """The two intensities that become 0 and 1.

    Raises:
        ExamError: neither "percentile" nor "LOW:HIGH".
    """
    if scaling == "percentile":
        above = values[values > values.min()]
        low, high = np.percentile(above, (1, 99)) if len(above) else (0.0, 1.0)
        if not low < high:  # two values
            low, high = values.min(), values.max()
        return float(low), float(max(high, low + 1e-6))
    try:
        low, high = (float(part) for part in scaling.split(":"))
        if -np.inf < low < high < np.inf:
            return low, high
    except ValueError:
        pass
    raise ExamError(f'Expected a scaling "percentile" or "LOW:HIGH" such as "-256:256", got {scaling!r}.')


class Placed(NamedTuple):
    """An image on the grid."""

    image: Float[np.ndarray, "i j k"]
    """0 ... 1."""
    inside: np.ndarray
    """Where the image reaches, boolean (i, j, k): its edge is no anatomy."""
    pose: Pose


def placed(volume: Volume, frame: Frame, pose: Pose | None = None) -> Placed:
    """An image on the grid; 0 beyond its edges.

    Args:
        pose: of the grid in the image; middle on middle by default.
    """
    pose = pose or Pose.affine(frame.to_mm(volume))
    values = np.asarray(volume.array, np.float32)
    low, high = limits_of(frame.scaling, values)
    coarser = np.array(frame.spacing_mm) / to_ras(volume).spacing_mm.clip(1e-6)
    smooth = Volume(values, volume.affine)
    if coarser.max() > 1.2:  # what the grid cannot hold must not alias
        ras = to_ras(smooth)
        smooth = Volume(ndimage.gaussian_filter(ras.array, 0.4 * np.where(coarser > 1.2, coarser, 0)), ras.affine)
    found = sample_mm(smooth, frame.points_mm(volume, pose), outside=np.nan)
    inside = np.isfinite(found)
    image = np.where(inside, np.clip((found - low) / (high - low), 0, 1), 0).astype(np.float32)
    return Placed(image, inside, pose)


class Cases(NamedTuple):
    """Images on the grid, and whichever labels exist."""

    names: list[str]
    image: Image
    inside: Mask
    labels: Tensor
    """Class of every voxel, (case, i, j, k) uint8, 0 is background; all 0 where there are no labels."""
    labelled: Tensor
    """Which have labels, boolean (case,)."""
    classes: int
    """Beside the background."""

    def picked(self, cases: list[int], labelled: list[int] | None = None) -> "Cases":
        """Some of the cases; with ``labelled``, the only ones of them whose labels are used."""
        has = self.labelled.clone()
        if labelled is not None:
            has &= torch.isin(torch.arange(len(has)), torch.tensor(labelled))
        names = [self.names[case] for case in cases]
        return Cases(names, self.image[cases], self.inside[cases], self.labels[cases], has[cases], self.classes)


def cases_of(
    volumes: dict[str, Volume],
    labels: dict[str, Volume],
    frame: Frame,
    numbers: tuple[int, ...],
    poses: dict[str, Pose] | None = None,
) -> Cases:
    """Images (by name) and the label maps that exist on one grid.

    Args:
        numbers: number of each class in the label maps, in the order of the network's answers.
        poses: of the grid in each image; middle on middle by default.

    Raises:
        LabelError: a label map holds none of the numbers, or there are more of them than a byte tells apart.
    """
    if len(numbers) > LARGEST_CLASS:
        raise LabelError(
            f"Expected at most {LARGEST_CLASS} classes, got {len(numbers)}; name those to learn by a table of names."
        )
    images, insides, maps = [], [], []
    for name, volume in volumes.items():
        image, inside, pose = placed(volume, frame, poses[name] if poses else None)
        images.append(image)
        insides.append(inside)
        drawn = np.zeros(frame.shape, np.uint8)
        if name in labels:
            found = sample_mm(labels[name], frame.points_mm(volume, pose), order="nearest", outside=0)
            for number, value in enumerate(numbers, start=1):
                drawn[found == value] = number
            if not drawn.any():
                raise LabelError(f"The labels of {name} hold none of {', '.join(map(str, numbers))}; leave it out.")
        maps.append(drawn)
    return Cases(
        list(volumes),
        torch.from_numpy(np.stack(images))[:, None],
        torch.from_numpy(np.stack(insides))[:, None],
        torch.from_numpy(np.stack(maps)),
        torch.tensor([name in labels for name in volumes]),
        len(numbers),
    )


def joined(parts: list[Cases]) -> Cases:
    """Cases read one by one, as one."""
    names = [name for part in parts for name in part.names]
    tensors = [torch.cat(tensors) for tensors in zip(*(part[1:5] for part in parts), strict=True)]
    return Cases(names, *tensors, parts[0].classes)


class Template(NamedTuple):
    """What the images have in common, on the grid. Each is laid onto it by whole nodes, as crops of one structure are
    not all cut around the same middle; the 2019 system takes images that are aligned already."""

    image: Image
    inside: Mask
    """Where most of them reach."""

    def nodes(self, image: Image, inside: Mask) -> tuple[int, int, int]:
        """How far an image has to be moved: the offset of the largest correlation where both reach, of those up to a
        quarter of the grid that keep half of the image."""
        size = tuple(n + n // 4 for n in self.image.shape[2:])
        ours, theirs = (
            torch.fft.rfftn(torch.cat([m, m * a, m * a * a]).double(), s=size, dim=(2, 3, 4))
            for m, a in ((self.inside.float(), self.image), (inside.float(), image))
        )

        def summed(a: int, b: int) -> Tensor:
            """Σ ours(x) · theirs(x + offset), of the powers a and b, for every offset."""
            return torch.fft.irfftn(ours[a, 0].conj() * theirs[b, 0], s=size)

        count = summed(0, 0)
        safe = count.clamp_min(1)
        spread_a, spread_b = (
            summed(*pair) - summed(*half) ** 2 / safe for pair, half in (((2, 0), (1, 0)), ((0, 2), (0, 1)))
        )
        r = (summed(1, 1) - summed(1, 0) * summed(0, 1) / safe) / (spread_a * spread_b).clamp_min(1e-6).sqrt()
        r[count < 0.5 * inside.sum()] = -1
        for axis, (n, whole) in enumerate(zip(self.image.shape[2:], size, strict=True)):
            offset = torch.arange(whole)
            far = torch.minimum(offset, whole - offset) > n // 4
            r.movedim(axis, 0)[far] = -1
        found = np.unravel_index(int(r.argmax()), size)
        return tuple(int(n if n <= whole // 2 else n - whole) for n, whole in zip(found, size, strict=True))


def laid_together(cases: Cases, rounds: int = 3) -> tuple[Cases, Template]:
    """Cases moved onto their mean, which sharpens by that; and the mean."""
    offsets = [(0, 0, 0)] * len(cases.names)
    for _ in range(rounds):
        moved_cases = _moved_by(cases, offsets)
        reached = moved_cases.inside.float().sum(dim=0, keepdim=True)
        mean = (moved_cases.image * moved_cases.inside).sum(dim=0, keepdim=True) / reached.clamp_min(1)
        template = Template(mean, reached > len(cases.names) / 2)
        offsets = [template.nodes(cases.image[n : n + 1], cases.inside[n : n + 1]) for n in range(len(offsets))]
    return _moved_by(cases, offsets), template


def _moved_by(cases: Cases, offsets: list[tuple[int, int, int]]) -> Cases:
    """Every case at ``x + offset``; nothing where it does not reach."""

    def moved_part(part: Tensor) -> Tensor:
        result = torch.zeros_like(part)
        for case, offset in enumerate(offsets):
            there = [slice(max(o, 0), n + min(o, 0)) for o, n in zip(offset, part.shape[-3:], strict=True)]
            here = [slice(max(-o, 0), n + min(-o, 0)) for o, n in zip(offset, part.shape[-3:], strict=True)]
            result[(case, ..., *here)] = part[(case, ..., *there)]
        return result

    return cases._replace(**{name: moved_part(getattr(cases, name)) for name in ("image", "inside", "labels")})
