"""Supervised segmentation on top of a map, by voxel classifiers or by a head: where these find structures.

The map knows where a structure ought to be, the head where in this exam it ends. The head is given the image and the
log odds of every structure by the map, and adds to these: it begins as the map's own answer, and what is not in the
scan is still the map's to say.

Source: §3.3.3 (the last convolution replaced by a new two-layer head, all layers optimised); the map's odds are ours.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from deepatlas import affine, atlas, classifier, grid, tissue
from deepatlas.atlas import Structure
from deepatlas.checkpoint import Model
from deepatlas.dense import blocks
from deepatlas.embedding import Embedded, likeness_of
from deepatlas.found import Found, redrawn
from deepatlas.prepare import Prepared, prepare_cube
from deepatlas.shapes import Image
from deepatlas.volume import Volume

NEAR = 0.02
"""Probability from which a voxel is looked at closer."""


def probabilities(model: Model, exam: Volume, embedded: Embedded) -> Float[Tensor, "1 structure i j k"]:
    """By the model's head, one channel each, on the head's grid over the exam's prepared box."""
    shape = model.head.shape
    image = shown(exam, embedded.prepared, shape)
    at = grid.resize(embedded.c_atlas, (model.network.config.sizes[model.level],) * 3)
    known: list[Structure | None] = [None] * model.head.channels
    for name, channel in model.segmented.items():
        known[channel] = model.structures[name]
    with torch.no_grad():
        odds = grid.resize(atlas.log_odds(known, at), shape)
        return model.head(image, odds).sigmoid()


def shown(exam: Volume, prepared: Prepared, shape: tuple[int, int, int]) -> Image:
    """An exam on a grid over its prepared box; where that is another than the prepared, from twice as many voxels, as
    the cohort that a head learns from holds them."""
    if shape == prepared.hu.shape:
        return torch.from_numpy(prepared.image)[None, None]
    faces = np.diag([prepared.size / (prepared.size - 1)] * 3 + [1.0])
    fine = prepare_cube(exam, 2 * prepared.size, prepared.box_to_mm @ faces)
    to_fine = torch.from_numpy(np.linalg.inv(fine.box_to_mm) @ prepared.box_to_mm)[None].float()
    return grid.sample(torch.from_numpy(fine.image)[None, None], affine.apply(to_fine, grid.identity(shape)))


def redrawn_by_head(model: Model, exam: Volume, embedded: Embedded, found: dict[str, Found]) -> dict[str, Found]:
    """Answers of the map with masks by the model's head, for the structures it knows.

    Probabilities are read linearly on the exam's own grid, where the HU of its voxels move them (`deepatlas.tissue`).
    Nothing is drawn outside of the patient. What the map calls absent stays absent, and where the head finds nothing of
    a structure the map's mask stays.
    Confidence is the lesser of the Dice that the probabilities lead one to expect and the likeness around.
    """
    names = [name for name in model.segmented if name in found and found[name].status != "absent"]
    if not names:
        return found
    likely = probabilities(model, exam, embedded)[:, [model.segmented[name] for name in names]]
    owner = np.full(exam.shape, -1, dtype=np.int16)
    counts, sums = np.zeros(len(names), dtype=np.int64), np.zeros((len(names), 2))
    numbers = np.array([list(found).index(name) for name in names], dtype=np.int16)
    for block, box in blocks(embedded, exam):
        inside = embedded.shows(box)
        at = grid.sample(likely, box[:, :, inside])[0]
        near = at.amax(dim=0) > NEAR
        inside[inside.clone()] = near
        at = _seen_closer(model, names, at[:, near], embedded, box[:, :, inside], exam.array[block][inside.numpy()])
        most, which = at.max(dim=0)
        own = most > 0.5
        part = np.full(inside.shape, -1, dtype=np.int16)
        part[inside.numpy()] = np.where(own.numpy(), numbers[which.numpy()], -1)
        owner[block] = part
        sums[:, 0] += at.sum(dim=1).numpy()
        sums[:, 1] += np.bincount(which[own], most[own], len(names))
        counts += np.bincount(which[own], minlength=len(names))
    drawn = [
        _Drawn(name, int(count), float(own), float(everywhere))
        for name, count, (everywhere, own) in zip(names, counts, sums, strict=True)
    ]
    return _above_the_maps(model, exam, embedded, found, owner, drawn)


def redrawn_by_classifiers(model: Model, exam: Volume, embedded: Embedded, found: dict[str, Found]) -> dict[str, Found]:
    """Answers of the map with masks by the voxel classifiers of structures that have one (`deepatlas.classifier`).

    Of these a voxel goes to the one that exceeds its level most; the others keep what is left. Absence, empty masks and
    confidence are as in `redrawn_by_head`.
    """
    owner, most = np.full(exam.shape, -1, dtype=np.int16), np.zeros(exam.shape, dtype=np.float32)
    chance, everywhere = most.copy(), {}
    for number, (name, one) in enumerate(found.items()):
        structure = model.structures[name]
        if structure.classifier is None or one.status == "absent":
            continue
        block, likely = classifier.likely(structure, exam, embedded)
        level = float(structure.classifier.level)
        better = (score := (likely - level) / (1 - level)) > most[block]
        owner[block][better], most[block][better], chance[block][better] = number, score[better], likely[better]
        everywhere[name] = float(likely.sum())
    if not everywhere:
        return found
    owned = owner >= 0
    counts = np.bincount(owner[owned], minlength=len(found))
    own = np.bincount(owner[owned], chance[owned], len(found))
    numbers = {name: number for number, name in enumerate(found)}
    drawn = [_Drawn(name, int(counts[n := numbers[name]]), float(own[n]), total) for name, total in everywhere.items()]
    return _above_the_maps(model, exam, embedded, found, owner, drawn)


class _Drawn(NamedTuple):
    """A structure that was drawn anew."""

    name: str
    count: int
    """Voxels of its mask."""
    own: float
    """Probability of these voxels together."""
    everywhere: float
    """That of all voxels."""


def _above_the_maps(
    model: Model,
    exam: Volume,
    embedded: Embedded,
    found: dict[str, Found],
    owner: np.ndarray,
    drawn: list[_Drawn],
) -> dict[str, Found]:
    """New masks above those of the map, which keep what is left to them; where nothing was drawn, the map's stays.

    Args:
        owner: whose of `found` a voxel became, −1 for nobody's; extended by the map's masks.
    """
    drawn = [one for one in drawn if one.count]
    names = {one.name for one in drawn}
    for number, (name, one) in enumerate(found.items()):
        if name not in names and one.mask is not None:
            owner[(owner < 0) & one.mask] = number
    result = redrawn(found, owner, exam)
    alike = likeness_of(model, embedded)
    for one in drawn:
        expected = 2 * one.own / (one.count + one.everywhere)
        result[one.name] = replace(result[one.name], confidence=min(expected, alike.around(model.structures[one.name])))
    return result


def _seen_closer(
    model: Model,
    names: list[str],
    likely: Float[Tensor, "structure point"],
    embedded: Embedded,
    points_box: Float[Tensor, "1 3 point"],
    own: np.ndarray,
) -> Float[Tensor, "structure point"]:
    """Probabilities after the HU of the exam's own voxels have spoken, as they do for the map: they are finer than the
    network's grid. See `deepatlas.tissue`."""
    c_atlas = grid.sample(embedded.c_atlas, points_box)
    around = grid.sample(torch.from_numpy(embedded.prepared.hu)[None, None], points_box)[0].numpy()
    result = likely.clone()
    for row, name in enumerate(names):
        one = model.structures[name]
        if one.tissue is not None:
            parts = tissue.parts_of(one.to_own_box(c_atlas))
            result[row] = tissue.moved(likely[row][None, None], one.tissue, parts, own[None], around)[0, 0]
    return result
