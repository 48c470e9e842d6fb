"""Structures in atlas space: made from labelled exams by the map, found in any exam by sampling.

A structure is a soft mask on a small grid of its own in the atlas. From one labelled exam it is a pull: for every node
t of that grid the place y with c(y) = t is solved for, and the label map is sampled there. From several it is the
least-squares mask of eq. 14. A soft mask needs a level, which is calibrated on the exams that made it.

Source: §5.2.7, eq. 14.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from deepatlas import grid, warp
from deepatlas.config import CUBE
from deepatlas.errors import RegionError, StructureError
from deepatlas.networks import VoxelClassifier
from deepatlas.shapes import Coordinates, Mask

LEVELS = torch.linspace(0.1, 0.9, 33)
"""Candidates for the level of a structure."""


SUREST = 1e-3
"""A mask is never surer than this that a place is in a structure, or is not."""

SMOOTH = 1.0
"""Weight of the roughness of a least-squares mask, relative to the points of a node: with 0.02 the mask learned the
errors of the maps that made it by heart (held-out training exams: Dice .446 against .480)."""


@dataclass(frozen=True)
class Structure:
    """A named structure in the atlas."""

    name: str
    label: int
    """The number it is written with in label maps."""
    mask: Float[Tensor, "i j k"]
    """Soft membership, 0 ... 1, at the nodes of its own grid."""
    known: Float[Tensor, "i j k"]
    """1 where labelled exams reached a node, 0 where nothing is known."""
    box_atlas: Float[Tensor, "2 3"]
    """Atlas coordinates of the first and the last node of its grid."""
    level: float
    """A voxel belongs to the structure where the sampled mask exceeds this."""
    exams: int
    """How many labelled exams made it."""
    tissue: Float[Tensor, "part part part bin bin"] | None = None
    """How HU move the log odds of the mask in each part of its box (`deepatlas.tissue`); None: not at all."""
    classifier: VoxelClassifier | None = None
    """What many exams taught of its look (`deepatlas.classifier`), instead of HU alone."""

    def renamed(self, name: str) -> "Structure":
        """The same structure under another name."""
        return replace(self, name=name)

    def to_own_box(self, c_atlas: Float[Tensor, "batch 3 *points"]) -> Float[Tensor, "batch 3 *points"]:
        """Atlas coordinates in the box frame of the structure's own grid (beyond ±1: outside of it)."""
        shape = (1, 3) + (1,) * (c_atlas.dim() - 2)
        low, high = (side.to(c_atlas).view(shape) for side in self.box_atlas)
        return (c_atlas - low) / (high - low) * 2 - 1

    def membership(self, c_atlas: Float[Tensor, "batch 3 *points"]) -> Float[Tensor, "batch 1 *points"]:
        """The mask sampled at atlas coordinates; 0 beyond its grid. ``M ∘ c_n`` of eq. 14."""
        own = self.to_own_box(c_atlas)
        return grid.sample(self.mask[None, None].to(own), own) * grid.inside(own)

    def nodes_atlas(self) -> Float[Tensor, "1 3 i j k"]:
        """Atlas coordinates of the nodes of its grid."""
        low, high = self.box_atlas[0].view(1, 3, 1, 1, 1), self.box_atlas[1].view(1, 3, 1, 1, 1)
        return low + (grid.identity(tuple(self.mask.shape)) + 1) / 2 * (high - low)


def log_odds(structures: Iterable[Structure | None], c_atlas: Coordinates) -> Float[Tensor, "batch structure i j k"]:
    """Log odds of structures at coordinates, 0 at the level of each; of an unknown one (None) as if it were far off."""
    found = []
    for one in structures:
        inside = torch.zeros_like(c_atlas[:, :1]) if one is None else one.membership(c_atlas)
        level = torch.tensor(0.5 if one is None else one.level)
        found.append(torch.logit(inside.clamp(SUREST, 1 - SUREST)) - torch.logit(level))
    return torch.cat(found, dim=1)


REGION_NODES = 16
"""A region is looked for by so many nodes along each edge."""


@dataclass(frozen=True)
class Region:
    """A named cube of the atlas (§5.2.4), its edges along the atlas axes."""

    name: str
    box_atlas: Float[Tensor, "2 3"]
    """Its lowest and its highest corner."""
    counted: Bool[Tensor, "i j k"]
    """Which of its `REGION_NODES`³ nodes lie in anatomy: an exam covers the region as far as it shows these."""

    @classmethod
    def whole(cls, name: str, box_atlas: Float[Tensor, "2 3"]) -> "Region":
        """A region all of whose nodes count."""
        return cls(name, box_atlas.float(), torch.ones(*(REGION_NODES,) * 3).bool())

    @classmethod
    def from_text(cls, text: str) -> "Region":
        """The region that `as_text` wrote.

        Raises:
            RegionError: something else.
        """
        words = text.removeprefix(CUBE).split(maxsplit=6)
        try:
            box_atlas = torch.tensor([float(word) for word in words[:6]]).view(2, 3)
            if not (text.startswith(CUBE) and (box_atlas[0] < box_atlas[1]).all()):
                raise ValueError
            return cls.whole(words[6], box_atlas)
        except (ValueError, IndexError, RuntimeError):
            raise RegionError(
                f"Expected the cube that a finer model sees, got {text!r}; copy the model again."
            ) from None

    def as_text(self) -> str:
        """The cube as the preparation of a finer model is called: its box of the atlas and its name."""
        return f"{CUBE}{' '.join(f'{number:.4f}' for number in self.box_atlas.flatten().tolist())} {self.name}"

    def nodes_atlas(self) -> Float[Tensor, "1 3 i j k"]:
        """Atlas coordinates of its nodes."""
        low, high = self.box_atlas[0].view(1, 3, 1, 1, 1), self.box_atlas[1].view(1, 3, 1, 1, 1)
        return low + (grid.identity(tuple(self.counted.shape)) + 1) / 2 * (high - low)

    def to_atlas(self) -> Float[Tensor, "4 4"]:
        """−1 … +1 along its edges → atlas, float64."""
        low, high = self.box_atlas.double()
        matrix = torch.diag(torch.cat([(high - low) / 2, torch.ones(1, dtype=torch.float64)]))
        matrix[:3, 3] = (low + high) / 2
        return matrix


class Drawn(NamedTuple):
    """One structure as drawn on one exam: its label map's voxels as points."""

    c_atlas: Float[Tensor, "3 point"]
    """Atlas coordinate of every voxel in and around the structure."""
    inside: Float[Tensor, "point"]
    """1 in the structure, 0 outside of it."""


def own_grid(drawn: list[Drawn], spacing_atlas: Float[Tensor, "3"], margin_nodes: int = 4) -> tuple[Tensor, tuple]:
    """The box and the shape of the grid that holds a structure, from where its voxels lie in the atlas.

    Stray voxels must not blow it up: per exam the box spans the whole structure, over exams its 2nd and 98th
    percentile of the lower and upper sides.

    Raises:
        StructureError: no exam has a voxel of the structure.
    """
    spans = []
    for exam in drawn:
        points = exam.c_atlas[:, exam.inside > 0.5]
        if points.shape[1]:
            spans.append(torch.stack([points.amin(dim=1), points.amax(dim=1)]))
    if not spans:
        raise StructureError("Expected at least one labelled voxel, found none; check the label map and its numbers.")
    spans = torch.stack(spans)
    low = torch.quantile(spans[:, 0], 0.02, dim=0) - margin_nodes * spacing_atlas
    high = torch.quantile(spans[:, 1], 0.98, dim=0) + margin_nodes * spacing_atlas
    low, high = low.clamp(-1, 1), high.clamp(-1, 1)
    shape = ((high - low) / spacing_atlas).ceil().long() + 1
    shape = shape.clamp(4, 160)
    return torch.stack([low, high]), tuple(int(n) for n in shape)


def pull(
    c_atlas: Coordinates, foreground: Mask, occupancy, nodes_atlas: Float[Tensor, "1 3 i j k"]
) -> tuple[Tensor, Tensor]:
    """The mask of one labelled exam in the atlas, and where it is known.

    Args:
        c_atlas: the exam's map on its prepared grid.
        foreground: where the exam shows the patient.
        occupancy: function of points in the exam's box (1, 3, point) → membership 0 ... 1 (point,).
        nodes_atlas: where the mask is wanted.

    Source: §5.2.7 with a single exam: ``M(t) = m(c⁻¹(t))``.
    """
    found = warp.implicit(c_atlas, nodes_atlas, foreground)
    shape = tuple(nodes_atlas.shape[2:])
    values = occupancy(found.phi_box.flatten(2)).view(shape)
    known = found.valid[0, 0].to(values.dtype)
    return values * known, known


def spread(mask: Float[Tensor, "i j k"], nodes: Iterable[float]) -> Float[Tensor, "i j k"]:
    """A mask of few exams, blurred by a Gaussian of so many nodes along each axis: these cannot tell how far others
    differ from them, and a mask near zero and one would leave the HU of another exam (`deepatlas.tissue`) nothing to
    decide. It stays as high as it was, or what is thinner than the blur would be lost.
    """
    blurred = mask[None, None]
    for axis, width in enumerate(nodes):
        reach = int(np.ceil(3 * width))
        kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / width) ** 2)
        kernel = kernel / kernel.sum()
        shape = [1, 1, 1, 1, 1]
        shape[2 + axis] = len(kernel)
        padding = [0] * 6
        padding[4 - 2 * axis] = padding[5 - 2 * axis] = reach
        blurred = F.conv3d(F.pad(blurred, padding), kernel.view(shape))
    return blurred[0, 0] * (mask.max() / blurred.max().clamp_min(1e-6))


def least_squares(
    drawn: list[Drawn], box_atlas: Tensor, shape: tuple[int, int, int], smooth: float = SMOOTH, iterations: int = 40
) -> tuple[Tensor, Tensor]:
    """``min_M Σ_n |M ∘ c_n − m_n|² + smooth · |∇M|²`` by conjugate gradients, and where it is known.

    The first term is linear in M: its normal equations need only `grid.sample` and `grid.splat`. The second keeps
    nodes that nobody reached from being free; it is weighed per point and vanishes where there are many.

    Source: §5.2.7, eq. 14.
    """
    low, high = box_atlas[0].view(3, 1), box_atlas[1].view(3, 1)
    points = torch.cat([exam.c_atlas for exam in drawn], dim=1)
    values = torch.cat([exam.inside for exam in drawn])
    own = ((points - low) / (high - low) * 2 - 1)[None]
    keep = grid.inside(own)[0, 0]
    own, values = own[:, :, keep].contiguous(), values[keep].view(1, 1, -1)
    reached = grid.splat(torch.ones_like(values), own, shape)
    weight = smooth * reached.sum() / reached.numel()

    def normal(mask: Tensor) -> Tensor:
        return grid.splat(grid.sample(mask, own), own, shape) + weight * _negative_laplacian(mask)

    solution = torch.zeros(1, 1, *shape)
    residual = grid.splat(values, own, shape)
    direction, size = residual, residual.square().sum()
    start = size
    for _ in range(iterations):
        if size <= 1e-8 * start:
            break
        image = normal(direction)
        step = size / (direction * image).sum().clamp_min(1e-30)
        solution, residual = solution + step * direction, residual - step * image
        size, before = residual.square().sum(), size
        direction = residual + size / before * direction
    return solution[0, 0].clamp(0, 1), (reached[0, 0] > 0).to(values.dtype)


def _negative_laplacian(mask: Tensor) -> Tensor:
    padded = F.pad(mask, (1,) * 6, mode="replicate")
    total = 6 * mask
    for axis in (2, 3, 4):
        n = mask.shape[axis]
        for start in (0, 2):
            window = padded.narrow(axis, start, n)
            for other in (2, 3, 4):
                if other != axis:
                    window = window.narrow(other, 1, mask.shape[other])
            total = total - window
    return total


def calibrated_level(found: list[tuple[Float[Tensor, "point"], Bool[Tensor, "point"]]]) -> float:
    """The level at which a structure has the highest mean Dice over the exams it was drawn on.

    With a single exam Dice would only repeat the drawing, and the level is the one that keeps the drawn volume.

    Args:
        found: for each exam the membership of points in and around the structure, as `deepatlas.locate.locate` finds
            it, and which of them were drawn.
    """
    scores = torch.zeros(len(LEVELS))
    for values, inside in found:
        if not inside.any():
            continue
        over = values[None] > LEVELS[:, None]
        total = over.sum(dim=1) + inside.sum()
        if len(found) == 1:
            scores -= (over.sum(dim=1) - inside.sum()).abs() / inside.sum()
        else:
            scores += 2 * (over & inside).sum(dim=1) / total
    best = (scores >= scores.max() - 1e-9).nonzero()[:, 0]
    return float(LEVELS[best[len(best) // 2]])
