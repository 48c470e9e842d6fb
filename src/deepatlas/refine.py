"""Refinement at test time: bend one exam's map until the atlas fits the exam better.

Not in the paper. The network is left alone; a smooth residual on a coarse grid is added to its map and optimised
against the explicit objective of this one exam. `docs/recipes.md` has what it gives and costs.
"""

from dataclasses import dataclass, field

import torch

from deepatlas import grid
from deepatlas.checkpoint import Model
from deepatlas.config import Weights
from deepatlas.locate import Embedded
from deepatlas.objective import Atlas, Exams, autoencoder_features, explicit_terms


@dataclass(frozen=True)
class Refinement:
    """Settings of a refinement, chosen on validation exams."""

    steps: int = 40
    rate: float = 0.006
    """Adam's rate, in atlas units."""
    nodes: int = 12
    """Nodes of the residual along each axis."""
    size: int = 48
    """Nodes of the grid on which images are compared."""
    weights: Weights = field(default_factory=Weights)


def refine(model: Model, embedded: Embedded, how: Refinement | None = None) -> Embedded:
    """The exam with a map that fits the atlas better; never one that fits it worse.

    Args:
        embedded: an exam with its map, from `deepatlas.locate.embed`.

    Returns:
        The same exam with the map ``c + residual`` of the lowest loss seen.

    Source: ours, on the explicit objective of §5.1.2 (eq. 3).
    """
    how = how or Refinement()
    shape = (how.size,) * 3
    image = grid.shrink(torch.from_numpy(embedded.prepared.image)[None, None], shape)
    foreground = grid.resize(embedded.foreground.float(), shape) > 0.5
    mm_per_box = torch.from_numpy(embedded.prepared.box_to_mm[None, :3, :3]).float()
    exam = Exams(image, foreground, mm_per_box)
    atlas = Atlas(model.atlas, model.atlas_to_mm[None, :3, :3].float())
    target = autoencoder_features(model.autoencoder, image, mm_per_box)
    start = grid.resize(embedded.c_atlas, shape)
    residual = torch.zeros(1, 3, *(how.nodes,) * 3, requires_grad=True)
    optimiser = torch.optim.Adam([residual], lr=how.rate)
    lowest, best = torch.inf, residual.detach().clone()
    for step in range(how.steps + 1):
        c_atlas = start + grid.resize(residual, shape)
        terms = explicit_terms(c_atlas, exam, atlas, model.autoencoder, target, how.weights.window)
        loss = (
            how.weights.explicit * terms.similarity
            + how.weights.edges * terms.edges
            + how.weights.smooth_explicit * terms.smooth
        ).mean()
        if float(loss.detach()) < lowest:
            lowest, best = float(loss.detach()), residual.detach().clone()
        if step < how.steps:
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    c_atlas = (embedded.c_atlas + grid.resize(best, tuple(embedded.c_atlas.shape[2:]))).clamp(-1, 1)
    return Embedded(embedded.prepared, c_atlas)
