"""The cascade: finer models, each of which sees a cube of the atlas above it, as that model finds the cube in an exam.

A region of a model (`deepatlas.regions`) is cut out of every exam (`Cutter`), a finer model is trained on the crops
(`deepatlas.pretrain`, from the model above), and lies in the folder ``finer/NAME`` of the model above. Its atlas is the
cube. `locate` hands each structure to the finest model that holds it, but for those whose look the model above learned.

Source: §5.2.4, figure 6; up to two serial crops.
"""

from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch

from deepatlas import affine, grid, regions
from deepatlas import locate as plain
from deepatlas.atlas import Region, Structure
from deepatlas.checkpoint import MARGIN, Model
from deepatlas.embedding import Embedded, embed, likeness_of, map_prepared
from deepatlas.errors import ExamError
from deepatlas.found import Found, redrawn
from deepatlas.prepare import prepare_cube
from deepatlas.refine import settled
from deepatlas.shapes import Coordinates
from deepatlas.store import START_NODES, Row
from deepatlas.volume import Volume

LEAST_SHOWN = 0.5
"""Share of a region that an exam has to show for its crop to be learned from, or asked."""

LESS_SEEN = 0.1
"""A finer model that sees so much less of a structure than the one above it, because the cube ends there, is not
believed."""

WITHIN = 0.98
"""Share of a structure that has to lie in the cube of a finer model for that model to know it."""


def cube_of(model: Model, finer: Model) -> Region:
    """The cube of the atlas that a finer model sees, with what the model knows of it beside."""
    region = Region.from_text(finer.region)
    known = model.regions.get(region.name)
    same = known is not None and torch.allclose(known.box_atlas, region.box_atlas, atol=1e-4)
    return known if same else region


def look_closer(model: Model, finer: Model, exam: Volume, embedded: Embedded) -> Embedded | None:
    """The map of an exam by a finer model; None where the exam does not show its cube.

    Args:
        embedded: the exam with the map of the model above.

    Source: §5.2.4.
    """
    shown = regions.show(model, cube_of(model, finer), embedded)
    if shown.to_mm is None or shown.coverage < LEAST_SHOWN:
        return None
    try:
        return map_prepared(finer, prepare_cube(exam, finer.size, shown.to_mm))
    except ExamError:  # next to nothing of the patient
        return None


def embed_by(models: list[Model], exam: Volume, embedded: Embedded | None = None) -> Embedded | None:
    """The map of an exam by the last of models, each within the view of the one before it; None where it does not
    show that much.

    Args:
        embedded: the exam with the map of the first model, where it is known already.
    """
    embedded = embedded or settled(models[0], exam, embed(models[0], exam))
    for above, finer in pairwise(models):
        embedded = look_closer(above, finer, exam, embedded)
        if embedded is None:
            return None
    return embedded


def holds(model: Model, finer: Model, structure: Structure) -> bool:
    """Whether a structure of the library lies in the cube of a finer model."""
    nodes = structure.nodes_atlas()[0][:, structure.mask > structure.level]
    low, high = cube_of(model, finer).box_atlas
    inside = ((nodes >= low[:, None]) & (nodes <= high[:, None])).all(dim=0)
    return bool(len(inside)) and float(inside.float().mean()) >= WITHIN


def locate(
    model: Model, exam: Volume, structures: Iterable[str] | None = None, embedded: Embedded | None = None
) -> dict[str, Found]:
    """`deepatlas.locate.locate`, each structure by the finest model that holds it.

    A model that has learned how a structure looks (`deepatlas.classifier`) is preferred to a finer one whose map has to
    draw it alone. Where masks of different models meet, the finer one keeps the voxel.

    Raises:
        StructureError: an unknown name. ExamError: an exam that cannot be prepared.

    Source: §5.2.4.
    """
    names = list(model.structures if structures is None else structures)
    embedded = embedded or settled(model, exam, embed(model, exam))
    embedded = embedded._replace(alike=likeness_of(model, embedded))
    found = plain.locate(model, exam, names, embedded)
    closer: dict[str, Found] = {}
    for finer in model.finer.values():
        asked = [name for name in names if _finer_knows(model, finer, name) and found[name].status != "absent"]
        seen = look_closer(model, finer, exam, embedded) if asked else None
        if seen is not None:
            for name, one in locate(finer, exam, asked, seen).items():
                rival = closer.get(name)
                sees = one.status != "absent" and one.coverage > found[name].coverage - LESS_SEEN
                if sees and (rival is None or one.confidence > rival.confidence):
                    closer[name] = replace(one, label=found[name].label)
    return _together(found, closer, exam) if closer else found


def _finer_knows(model: Model, finer: Model, name: str) -> bool:
    """Whether a finer model is asked for a structure."""
    if name not in finer.structures or model.structures[name].classifier is None:
        return name in finer.structures
    return finer.structures[name].classifier is not None or name in finer.fine_tuned


def _together(found: dict[str, Found], closer: dict[str, Found], exam: Volume) -> dict[str, Found]:
    """The answers of two models as one, the finer ones above the others."""
    best = {name: closer.get(name, one) for name, one in found.items()}
    owner = np.full(exam.shape, -1, dtype=np.int16)
    numbers = {name: number for number, name in enumerate(best)}
    for name in sorted(best, key=lambda name: name in closer):  # the finer ones last
        if best[name].mask is not None:
            owner[best[name].mask] = numbers[name]
    return redrawn(best, owner, exam)


class Cutter:
    """Cuts a region out of exams, as the cohort of a finer model wants it.

    Args:
        models: the model whose region it is, below those above it.
        size: voxels along each axis of a crop.
    """

    def __init__(self, models: list[Model], region: Region, size: int) -> None:
        self.models, self.region, self.size = models, region, size

    def __call__(self, exam: Volume) -> Row:
        """The crop, with the coordinates it is given by the model.

        Raises:
            ExamError: the exam hardly shows the region.
        """
        embedded = embed_by(self.models, exam)
        shown = regions.show(self.models[-1], self.region, embedded) if embedded else None
        if shown is None or shown.to_mm is None or shown.coverage < LEAST_SHOWN:
            share = shown.coverage if shown else 0.0
            raise ExamError(f"Shows {share:.0%} of {self.region.name}, at least {LEAST_SHOWN:.0%} is needed.")
        crop = prepare_cube(exam, self.size, shown.to_mm)
        start = coordinates_in(self.region, embedded, shown.to_mm)
        return Row.of(crop, getattr(exam, "repairs", ()), start.numpy().astype(np.float16))


def coordinates_in(region: Region, embedded: Embedded, to_mm: np.ndarray) -> Coordinates:
    """The coordinates that a model gives to a cube of an exam, in the frame of the cube's own atlas.

    Args:
        to_mm: the cube −1 … +1 → mm of the exam.

    Returns:
        (3, m, m, m) over the cube from face to face, m = `START_NODES`.
    """
    to_box = torch.from_numpy(np.linalg.inv(embedded.prepared.box_to_mm) @ to_mm)[None].float()
    c_atlas = grid.sample(embedded.c_atlas, affine.apply(to_box, grid.identity((START_NODES,) * 3)))[0]
    low, high = region.box_atlas[..., None, None, None]
    return (MARGIN * (2 * (c_atlas - low) / (high - low) - 1)).clamp(-0.999, 0.999)
