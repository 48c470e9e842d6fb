"""Self-consistency: the maps of several augmented copies of an exam, brought back and averaged; their spread is how
unsure the map is.

Not in the paper.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from deepatlas import augment, grid
from deepatlas.checkpoint import Model
from deepatlas.config import Augmentation
from deepatlas.embedding import Embedded
from deepatlas.shapes import Coordinates

GENTLE = Augmentation(scale=0.08, rotation=0.12, translation=0.08, cut=0.0, tone=0.15)


class Agreed(NamedTuple):
    """What the copies say together."""

    embedded: Embedded
    """The exam with the mean of their maps."""
    spread_mm: Float[Tensor, "1 1 i j k"]
    """Their standard deviation, in mm of the seed exam, on the prepared grid."""


def agree(model: Model, embedded: Embedded, copies: int = 8, seed: int = 0, how: Augmentation = GENTLE) -> Agreed:
    """The mean map of an exam and of augmented copies of it.

    Args:
        embedded: the exam with the network's own map, which counts as one more copy.
        copies: how many others.
        seed: of their poses and tones.
    """
    prepared = embedded.prepared
    chance = Generator().manual_seed(seed)
    image = torch.from_numpy(prepared.image)[None, None]
    mm_per_box = torch.from_numpy(prepared.box_to_mm[None, :3, :3]).float()
    shape = tuple(image.shape[2:])
    maps = [embedded.c_atlas]
    for _ in range(copies):
        matrix = augment.draw_affine(mm_per_box, chance, how.scale, how.rotation, how.translation)
        places = augment.place(matrix, shape)
        seen = augment.apply_tone(
            grid.sample(image, places) * grid.inside(places), augment.draw_tone(1, chance, how.tone), chance
        )
        with torch.inference_mode():
            c_copy = model.network(seen.to(model.network.offset.device), model.level).cpu().clone()
        maps.append(_brought_back(c_copy, matrix, embedded.c_atlas))
    together = torch.cat(maps)
    mean = together.mean(dim=0, keepdim=True)
    away = torch.einsum("ab,nbijk->naijk", model.atlas_to_mm[:3, :3].float(), together - mean)
    spread = away.square().sum(dim=1, keepdim=True).mean(dim=0, keepdim=True).sqrt()
    return Agreed(Embedded(prepared, mean), spread)


def _brought_back(c_copy: Coordinates, matrix: Tensor, own: Coordinates) -> Coordinates:
    """A copy's map on the exam's own grid; where the copy does not reach, the exam's own map."""
    there = augment.place(torch.linalg.inv(matrix), tuple(own.shape[2:]))
    fine = grid.resize(c_copy, tuple(own.shape[2:]))
    return torch.where(grid.inside(there), grid.sample(fine, there), own)
