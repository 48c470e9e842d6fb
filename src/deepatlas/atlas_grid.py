"""A region of a trained atlas as the grid that images are laid on, each by its coordinate map.

The bridge between the two systems: the networks of `deepatlas.regseg` then begin with images that lie on each other as
well as the map knows, however they were cut; what one of them does not show is beyond its edge.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from deepatlas import checkpoint, places, regions, register
from deepatlas.atlas import Region
from deepatlas.common_grid import HALVINGS, LARGEST_GRID, Cases, Frame, Pose, cases_of, joined
from deepatlas.embedding import embed
from deepatlas.errors import ExamError, LabelError, RegionError
from deepatlas.refine import settled
from deepatlas.transforms import Transform
from deepatlas.volume import Volume, apply


@dataclass(frozen=True)
class AtlasGrid:
    """A coordinate map and the region of its atlas that the grid is laid over."""

    model: checkpoint.Model
    region: Region

    @classmethod
    def of(cls, model: checkpoint.Model, name: str) -> "AtlasGrid":
        """From the name of a region or a structure; of the model only what is needed is kept.

        Raises:
            RegionError: neither is known.
        """
        region = regions.region_of(model, name)
        alone = {"structures": {}, "landmarks": {}, "finer": {}, "head": None, "segmented": {}}
        return cls(replace(model, regions={region.name: region}, **alone), region)

    def frame(self, spacing_mm: float, scaling: str = "percentile") -> Frame:
        """The grid over the region, as large as on the exam that the atlas lies on.

        Raises:
            RegionError: it would have more nodes along an axis than fit.
        """
        to_mm = self.model.atlas_to_mm.numpy()[:3, :3] @ self.region.to_atlas().numpy()[:3, :3]
        edges = 2 * np.linalg.norm(to_mm, axis=0)
        multiple = 2**HALVINGS
        shape = tuple(multiple * math.ceil(edge / spacing_mm / multiple - 0.05) for edge in edges)
        if max(shape) > LARGEST_GRID:
            raise RegionError(
                f"Expected a grid of at most {LARGEST_GRID} nodes an axis, got {shape}; enlarge --spacing."
            )
        return Frame(shape, tuple(round(float(e / n), 6) for e, n in zip(edges, shape, strict=True)), scaling)

    def pose(self, volume: Volume, frame: Frame) -> Pose:
        """The grid in an image as its map lays it: every node where the coordinate of that node is found. Where the
        image does not show it, the displacement fades into the affine map nearest to all that was found.

        Raises:
            ExamError: it shows next to nothing of the region, or cannot be prepared.
        """
        embedded = settled(self.model, volume, embed(self.model, volume))
        shown = regions.show(self.model, self.region, embedded)
        if shown.to_mm is None:
            raise ExamError(
                f"Expected an image of {self.region.name}, but it shows {shown.coverage:.0%} of it; leave it out."
            )
        count = np.array(frame.shape)
        cells = np.diag([*(2 / count), 1.0])  # a node stands for a cell; cells fill the cube from −1 to +1
        cells[:3, 3] = 1 / count - 1
        to_mm, to_atlas = shown.to_mm @ cells, self.region.to_atlas().numpy() @ cells
        nodes = frame.nodes().reshape(-1, 3)
        here = apply(to_mm, nodes)
        found = places.from_atlas(embedded, torch.from_numpy(apply(to_atlas, nodes).T)[None])
        c_atlas, inside = places.to_atlas(embedded, here)
        index = apply(np.linalg.inv(to_atlas), c_atlas[0].T.double().numpy())

        def shift(apart: np.ndarray, known: np.ndarray) -> np.ndarray:
            whole = register.spread(apart.reshape(*frame.shape, 3), known.reshape(frame.shape), spacing_mm)
            return np.moveaxis(whole, -1, 0)

        spacing_mm = np.linalg.norm(to_mm[:3, :3], axis=0)
        box = apply(np.linalg.inv(embedded.prepared.box_to_mm), found.points_mm)
        within = found.valid & (np.abs(box) < 1 - 1e-4).all(axis=1)  # on a face it may have been held there
        there = Transform(to_mm, shift(found.points_mm - here, within), np.eye(4))
        inside &= places.in_patient(embedded, here)
        return Pose(there, Transform(np.linalg.inv(to_mm), shift(index - nodes, inside), to_mm))

    def cases(
        self, images: Iterable[tuple[str, Volume, Volume | None]], frame: Frame, numbers: tuple[int, ...]
    ) -> tuple[Cases, dict[str, str]]:
        """Images on the grid, taken one by one, as full images may not fit in memory; and why others were left out.

        Args:
            images: name, image, and its labels if it has any.
            numbers: as for `common_grid.cases_of`.

        Raises:
            ExamError: none of them lies on the region.
        """
        parts, left = [], {}
        for name, image, labels in images:
            maps = {} if labels is None else {name: labels}
            try:
                parts.append(cases_of({name: image}, maps, frame, numbers, {name: self.pose(image, frame)}))
            except (ExamError, LabelError) as error:
                left[name] = str(error)
        if not parts:
            why = next(iter(left.values()), "there are none.")
            raise ExamError(f"Expected images of {self.region.name}, but none can be used; the first: {why}")
        return joined(parts), left


def save(laid: AtlasGrid, folder: Path, half: bool = False) -> None:
    """Write a model folder that knows one region and no structure."""
    checkpoint.save(laid.model, folder, half)


def load(folder: Path) -> AtlasGrid:
    """Read what `save` wrote.

    Raises:
        ModelError: not a model. RegionError: not of one region.
    """
    model = checkpoint.load(folder)
    if len(model.regions) != 1:
        raise RegionError(f"Expected a model of one region in {folder}, got {len(model.regions)}; copy it again.")
    return AtlasGrid(model, next(iter(model.regions.values())))
