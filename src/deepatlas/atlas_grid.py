"""A region of a trained atlas as the grid that images are laid on, each by its coordinate map.

The bridge between the two systems: registration networks (`deepatlas.regseg`) then begin with images that lie on each
other up to what an affine map cannot do, however they were cut; what one of them does not show is beyond its edge.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from deepatlas import checkpoint, regions
from deepatlas.atlas import Region
from deepatlas.common_grid import HALVINGS, LARGEST_GRID, Frame
from deepatlas.errors import ExamError, RegionError
from deepatlas.locate import embed
from deepatlas.volume import Volume


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
        return cls(replace(model, structures={}, landmarks={}, finer={}, regions={region.name: region}), region)

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

    def to_mm(self, volume: Volume, frame: Frame) -> np.ndarray:
        """Index of the grid → mm of an image, (4, 4): the affine map nearest to where its own map finds the region.

        Raises:
            ExamError: it shows next to nothing of the region, or cannot be prepared.
        """
        shown = regions.show(self.region, embed(self.model, volume))
        if shown.to_mm is None:
            raise ExamError(
                f"Expected an image of {self.region.name}, but it shows {shown.coverage:.0%} of it; leave it out."
            )
        count = np.array(frame.shape)
        cells = np.diag([*(2 / count), 1.0])  # a node stands for a cell; cells fill the cube from −1 to +1
        cells[:3, 3] = 1 / count - 1
        return shown.to_mm @ cells


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
