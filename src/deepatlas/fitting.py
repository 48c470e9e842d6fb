"""Fitting maps to exams one by one: a smooth residual on the network's map, against the explicit objective.

Not in the paper. The network predicts a map in one pass and leaves some of the objective on the table; a few dozen
steps on the exam itself take it. `pretrain` teaches the network what was found so (consolidation), `refine` uses it on
one exam at test time.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from deepatlas import affine, grid
from deepatlas.autoencoder import Autoencoder, Intensities
from deepatlas.config import Fitting, Weights
from deepatlas.objective import Atlas, Exams, autoencoder_features, cut_off, explicit_terms
from deepatlas.shapes import Affine, Coordinates, Features


class Fitted(NamedTuple):
    """The residuals found, and per exam the loss before and after."""

    residual: Coordinates
    """(batch, 3, i, j, k) on the exams' grid, atlas units: to be added to the maps."""
    before: Tensor
    after: Tensor
    labels: Tensor
    """How far drawn structures are still off; 0 where none are given."""


def fit(
    c_atlas: Coordinates, exams: Exams, atlas: Atlas, autoencoder: Autoencoder, weights: Weights, how: Fitting
) -> Fitted:
    """The residual per exam that brings its explicit loss down most, of those seen in ``how.steps`` steps of Adam.

    Args:
        c_atlas: maps to start from, on the exams' grid.
        exams: images on the grid they are compared on; with masks, where the fit is to the atlas's masks as well.

    Source: ours, on §5.1.2 (eq. 3).
    """
    describe = autoencoder if how.learned else Intensities()
    weights = replace(weights, window=how.window, smooth_explicit=how.smooth)
    start = c_atlas.detach()
    target = autoencoder_features(describe, exams.image, exams.mm_per_box)
    compared = exams.foreground & ~cut_off(start, exams.foreground, atlas.image)
    shape = tuple(start.shape[2:])
    control = torch.zeros(len(start), 3, *(how.nodes,) * 3, device=start.device, requires_grad=True)
    optimiser = torch.optim.Adam([control], lr=how.rate)
    best, before = control.detach().clone(), None
    lowest = torch.full((len(start),), torch.inf, device=start.device)
    off = torch.zeros_like(lowest)
    for step in range(how.steps + 1):
        moved = start + grid.spline(control, shape)
        terms = explicit_terms(moved, exams, atlas, describe, target, weights.window, compared)
        loss = (
            weights.explicit * terms.similarity
            + weights.edges * terms.edges
            + weights.smooth_explicit * terms.smooth
            + weights.labels * terms.labels
        )
        better = loss.detach() < lowest
        lowest = torch.where(better, loss.detach(), lowest)
        off = torch.where(better, terms.labels.detach(), off)
        best = torch.where(better.view(-1, 1, 1, 1, 1), control.detach(), best)
        before = loss.detach() if before is None else before
        if step < how.steps:
            (control.grad,) = torch.autograd.grad(loss.sum(), control)
            optimiser.step()
    return Fitted(grid.spline(best, shape), before, lowest, off)


def carried(field: Features, to_field_box: Affine, shape: tuple[int, int, int]) -> Features:
    """A field seen from another box: its values at the nodes of a grid there. Coarse and fine preparations of an exam
    have boxes that differ by a fraction of a voxel.

    Args:
        to_field_box: that box → the field's own.
    """
    return grid.sample(field, affine.apply(to_field_box.to(field), grid.identity(shape).to(field)))
