"""Structures drawn on the exams of a cohort, on its grids: what joint training learns from beside the images.

Not drawn is not absent: an exam on which a structure has no voxel says nothing about it. Of a structure that is drawn
in part only, such as a spinal cord as far as a planner needed it, an exam says nothing beyond its drawn slices.

Source: §5.1.5, eq. 12 and 13 ("any segmentation masks, when available, are binarized and concatenated").
"""

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from deepatlas import files
from deepatlas.errors import LabelError
from deepatlas.prepare import grid_to_box, sample_mm
from deepatlas.shapes import Coordinates, Mask
from deepatlas.store import Cohort
from deepatlas.volume import Volume, apply

MOST = 254
"""Structures that a training can learn from."""

NEAR = 4
"""Voxels around what is drawn on an exam within which labels are compared; farther off the image alone decides."""


class Masks(NamedTuple):
    """What is drawn at places of a batch of exams."""

    number: UInt8[Tensor, "batch i j k"]
    """Which structure, counted from 1; 0 for none."""
    height: Float[Tensor, "batch i j k"]
    """Where the places lie along k of their exam's box."""
    ends: Float[Tensor, "batch structure 2"]
    """From where to where along k an exam speaks of a structure."""
    seen: Bool[Tensor, "batch i j k"]
    """Where the exam is shown."""

    def only(self, seen: Mask) -> "Masks":
        """The same where no more is shown than this."""
        return self._replace(seen=self.seen & seen[:, 0])

    def known(self) -> Bool[Tensor, "batch structure i j k"]:
        """Whether an exam says anything about a structure there."""
        low, high = self.ends[..., None, None, None].unbind(2)
        height = self.height[:, None]
        return (height >= low) & (height <= high) & self.seen[:, None]

    def inside(self) -> Float[Tensor, "batch structure i j k"]:
        """Each structure as 0 and 1."""
        structures = torch.arange(1, self.ends.shape[1] + 1, device=self.number.device)
        return (self.number[:, None] == structures.view(1, -1, 1, 1, 1)).float()

    def near(self) -> list[Int[Tensor, "point"]]:
        """Of each exam the voxels, in the order of memory, that lie within `NEAR` of something drawn, or next to it."""
        drawn = (self.number > 0).float()[:, None]
        pairs = F.max_pool3d(drawn, tuple(min(2, n) for n in drawn.shape[2:]), ceil_mode=True)
        reach = -(-NEAR // 2)
        for axis in range(3):
            kernel, pad = [1, 1, 1], [0, 0, 0]
            kernel[axis], pad[axis] = 2 * reach + 1, reach
            pairs = F.max_pool3d(pairs, kernel, 1, pad)
        for axis, nodes in zip((2, 3, 4), self.number.shape[1:], strict=True):
            pairs = pairs.repeat_interleave(2, dim=axis).narrow(axis, 0, nodes)
        return [one.flatten().nonzero()[:, 0] for one in pairs]

    def points(self, exam: int, index: Int[Tensor, "point"]) -> "Masks":
        """Of one exam these voxels alone, as a batch of one in a row."""
        parts = (part[exam].flatten()[index].view(1, 1, 1, -1) for part in (self.number, self.height, self.seen))
        number, height, seen = parts
        return Masks(number, height, self.ends[exam : exam + 1], seen)


@dataclass(frozen=True)
class LabelMaps:
    """The label maps of a cohort, in the order of its exams."""

    names: tuple[str, ...]
    """The structures; number n + 1 in `maps` is the n-th."""
    maps: UInt8[Tensor, "exam n n n"]
    """On the prepared grid of each exam."""
    ends: Float[Tensor, "exam structure 2"]
    """From where to where along k of its box an exam speaks of a structure; from +∞ to −∞ where it was not drawn."""

    @classmethod
    def of(
        cls, names: Iterable[str], maps: UInt8[Tensor, "exam n n n"], drawn_in_part: Iterable[str] = ()
    ) -> "LabelMaps":
        """From label maps on the prepared grids.

        Args:
            drawn_in_part: structures that end where drawing stopped.
        """
        names = tuple(names)
        ends = torch.empty(len(maps), len(names), 2)
        height = torch.linspace(-1, 1, maps.shape[-1])
        for exam, number_map in enumerate(maps):
            for row, name in enumerate(names):
                slices = (number_map == row + 1).any(dim=0).any(dim=0).nonzero()[:, 0]
                if not len(slices):
                    ends[exam, row] = torch.tensor([torch.inf, -torch.inf])
                elif name in drawn_in_part:
                    ends[exam, row] = height[slices[[0, -1]]]
                else:
                    ends[exam, row] = torch.tensor([-torch.inf, torch.inf])
        return cls(names, maps, ends)

    def at(self, exams: list[int], places_box: Coordinates) -> Masks:
        """What is drawn at places in the boxes of exams; nothing outside of them."""
        size = self.maps.shape[-1]
        within = (places_box.abs() <= 1).all(dim=1)
        index = ((places_box.clamp(-1, 1) + 1) * ((size - 1) / 2)).round().long().cpu()
        rows = torch.tensor(exams).view(-1, 1, 1, 1)
        number = self.maps[rows, index[:, 0], index[:, 1], index[:, 2]].to(places_box.device) * within
        return Masks(number, places_box[:, 2].expand(number.shape), self.ends[exams].to(places_box), within)

    def __str__(self) -> str:
        """What tells these label maps from others."""
        drawn = (self.ends[..., 0] < torch.inf).sum(dim=0).tolist()
        told = ", ".join(f"{name} in {count}" for name, count in zip(self.names, drawn, strict=True))
        return f"{told} exams ({zlib.crc32(self.maps.numpy().tobytes()) ^ zlib.crc32(self.ends.numpy().tobytes()):08x})"


def read(
    cohort: Path,
    folder: Path,
    table: dict[str, int],
    drawn_in_part: Iterable[str] = (),
    exclude: dict[str, list[str]] | None = None,
    on_done: Callable[[int, int, str], None] | None = None,
) -> LabelMaps:
    """Read the label maps of a cohort's exams; exams without one are learned from by their images alone.

    Args:
        folder: label maps, each named like its exam, or like its exam and `_seg`.
        table: structure → number in the label maps.
        exclude: for each structure, the exams whose label is known to be wrong; there it counts as not drawn.

    Raises:
        LabelError: a file cannot be read, no exam has a label map, or none shows any of the structures.
    """
    if not 0 < len(table) <= MOST:
        raise LabelError(f"Expected 1 to {MOST} structures to learn from, got {len(table)}; choose some.")
    unknown = [name for name in drawn_in_part if name not in table]
    if unknown:
        raise LabelError(f"Expected the name of a structure, got {unknown[0]!r}; there are {', '.join(table)}.")
    paths = {files.exam_name(path).removesuffix("_seg"): path for path in files.find_exams(folder)}
    paths |= {files.exam_name(path): path for path in paths.values()}
    with Cohort(cohort) as opened:
        exams, size, box_to_mm = opened.names, opened.size, opened.box_to_mm()
    maps = np.zeros((len(exams), size, size, size), np.uint8)
    for number, exam in enumerate(exams):
        if exam in paths:
            wanted = {name: n for name, n in table.items() if exam not in (exclude or {}).get(name, [])}
            maps[number] = on_grid(files.read_labels(paths[exam]), box_to_mm[number], size, table, wanted)
        if on_done is not None:
            on_done(number + 1, len(exams), exam)
    if not maps.any():
        raise LabelError(
            f"Expected label maps of the cohort's exams in {folder}, found nothing drawn; check their names."
        )
    return LabelMaps.of(table, torch.from_numpy(maps), drawn_in_part)


def on_grid(
    labels: Volume, box_to_mm: Float[np.ndarray, "4 4"], size: int, table: dict[str, int], wanted: Iterable[str]
) -> UInt8[np.ndarray, "n n n"]:
    """A label map on the prepared grid of an exam: the rank of each structure in the table, counted from 1.

    The nearest voxel decides.
    """
    ranks = np.zeros(labels.shape, np.uint8)
    for position, (name, number) in enumerate(table.items(), start=1):
        if name in wanted:
            ranks[labels.array == number] = position
    nodes_mm = apply(box_to_mm @ grid_to_box(size), np.moveaxis(np.indices((size,) * 3), 0, -1))
    return sample_mm(Volume(ranks, labels.affine), nodes_mm, "nearest", 0)
