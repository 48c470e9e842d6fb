"""Refinement at test time: bend one exam's map until the atlas fits the exam better.

Not in the paper. The network is left alone; see `deepatlas.fitting`. `docs/recipes.md` has what it gives and costs.
"""

import numpy as np
import torch
from torch import Tensor

from deepatlas import affine, grid, warp
from deepatlas.checkpoint import Model
from deepatlas.config import FINE, Fitting, Weights
from deepatlas.embedding import Embedded, likeness_of
from deepatlas.fitting import carried, fit
from deepatlas.machine import denormals_are_zero
from deepatlas.objective import Atlas, Exams
from deepatlas.prepare import prepare
from deepatlas.volume import Volume


def refine(
    model: Model,
    exam: Volume,
    embedded: Embedded,
    how: Fitting | None = None,
    weights: Weights | None = None,
    template: Tensor | None = None,
) -> Embedded:
    """The same exam with a map that fits the atlas better; never one that fits it worse.

    Args:
        exam: prepared anew where ``how`` compares on a finer grid than the network's.
        embedded: the exam with its map, from `deepatlas.embedding.embed`.
        template: an image in the atlas's place, (1, 1, n, n, n), such as `template_of`.

    Source: ours, on the explicit objective of §5.1.2 (eq. 3).
    """
    how = how or FINE
    shape = (how.size,) * 3
    coarse = embedded.prepared
    fine = prepare(exam, how.size, model.region) if how.size > coarse.size else coarse
    to_coarse = torch.from_numpy(np.linalg.inv(coarse.box_to_mm) @ fine.box_to_mm)[None]
    views = Exams(
        image=grid.shrink(torch.from_numpy(fine.image)[None, None], shape),
        foreground=grid.resize(torch.from_numpy(fine.foreground)[None, None].float(), shape) > 0.5,
        mm_per_box=torch.from_numpy(fine.box_to_mm[None, :3, :3]).float(),
    )
    atlas = Atlas(model.atlas if template is None else template, model.atlas_to_mm[None, :3, :3].float())
    with denormals_are_zero():
        start = carried(embedded.c_atlas, to_coarse, shape)
        found = fit(start, views, atlas, model.autoencoder, weights or Weights(), how)
    moved = carried(found.residual, torch.linalg.inv(to_coarse), tuple(embedded.c_atlas.shape[2:]))
    return Embedded(coarse, (embedded.c_atlas + moved).clamp(-1, 1))


DOUBTFUL = 1.4
"""An exam whose likeness to the aligned atlas is below so many times what makes it familiar is looked at again: that is
84 % of what 19 of 20 training exams reach. Chosen on cuts of training exams."""

AGAIN = Fitting(steps=15, rate=0.012, nodes=8, learned=False, window=8, smooth=0.3)
"""A second look: on intensities, in a second or two."""


def settled(model: Model, exam: Volume, embedded: Embedded) -> Embedded:
    """The map as it is, or a fitted one where the network's hardly makes the exam look like the atlas.

    The network lays a thin slab, such as the top of a head, a cm or two from where it belongs, and finds there what is
    not in it. Exams that are not of the kind that was learned are left alone: a fit would make them look alike.

    Args:
        embedded: the exam with the network's map.
    """
    alike = likeness_of(model, embedded)
    if model.familiar <= alike.of_exam() < DOUBTFUL * model.familiar:
        return refine(model, exam, embedded, AGAIN)
    return embedded._replace(alike=alike)


def mean_of(maps: list[Embedded]) -> Embedded:
    """The mean of several maps of one exam: fits over different control points err differently."""
    return Embedded(maps[0].prepared, torch.stack([one.c_atlas for one in maps]).mean(dim=0))


def template_of(model: Model, exam: Volume, embedded: Embedded) -> Tensor:
    """One exam in the atlas's place, (1, 1, n, n, n); the atlas where it shows nothing.

    Structures that were drawn on a single exam lie in the atlas by that exam's own map. Fitted to that very exam,
    another one finds them whatever the error of that map is.

    Args:
        embedded: the exam with the map that its structures were made by.
    """
    shape = tuple(model.atlas.shape[2:])
    fine = prepare(exam, 2 * embedded.prepared.size, model.region)
    found = warp.implicit(embedded.c_atlas, grid.identity(shape), embedded.foreground)
    to_fine = torch.from_numpy(np.linalg.inv(fine.box_to_mm) @ embedded.prepared.box_to_mm)[None].float()
    image = grid.sample(torch.from_numpy(fine.image)[None, None], affine.apply(to_fine, found.phi_box))
    return torch.where(found.valid, image, model.atlas)
