"""Refinement at test time: bend one exam's map until the atlas fits the exam better.

Not in the paper. The network is left alone; see `deepatlas.fitting`. `docs/recipes.md` has what it gives and costs.
"""

import torch

from deepatlas import grid
from deepatlas.checkpoint import Model
from deepatlas.config import Fitting, Weights
from deepatlas.fitting import fit
from deepatlas.locate import Embedded
from deepatlas.machine import denormals_are_zero
from deepatlas.objective import Atlas, Exams


def refine(model: Model, embedded: Embedded, how: Fitting | None = None, weights: Weights | None = None) -> Embedded:
    """The same exam with a map that fits the atlas better; never one that fits it worse.

    Args:
        embedded: an exam with its map, from `deepatlas.locate.embed`.

    Source: ours, on the explicit objective of §5.1.2 (eq. 3).
    """
    how = how or Fitting()
    shape = (how.size,) * 3
    exam = Exams(
        image=grid.shrink(torch.from_numpy(embedded.prepared.image)[None, None], shape),
        foreground=grid.resize(embedded.foreground.float(), shape) > 0.5,
        mm_per_box=torch.from_numpy(embedded.prepared.box_to_mm[None, :3, :3]).float(),
    )
    atlas = Atlas(model.atlas, model.atlas_to_mm[None, :3, :3].float())
    start = grid.resize(embedded.c_atlas, shape)
    with denormals_are_zero():
        found = fit(start, exam, atlas, model.autoencoder, weights or Weights(), how)
    c_atlas = embedded.c_atlas + grid.resize(found.residual, tuple(embedded.c_atlas.shape[2:]))
    return Embedded(embedded.prepared, c_atlas.clamp(-1, 1))
