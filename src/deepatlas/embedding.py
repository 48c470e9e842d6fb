"""An exam with its coordinate map, and how well that map makes it look like the atlas."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from deepatlas import grid
from deepatlas.atlas import Structure
from deepatlas.checkpoint import Model
from deepatlas.errors import ExamError
from deepatlas.objective import likeness
from deepatlas.prepare import Prepared, oblique, prepare
from deepatlas.shapes import Coordinates
from deepatlas.volume import Volume

IN_VIEW = 0.25
"""Share of foreground from which a voxel counts as in the patient."""


class Likeness(NamedTuple):
    """How well an exam looks like the atlas aligned to it, on a grid of half the nodes."""

    c_atlas: Coordinates
    local: Tensor
    """Local correlation of features, 0 ... 1, and 0 where the map folds; (1, 1, i, j, k)."""
    foreground: Tensor

    def of_exam(self) -> float:
        """Mean over the patient."""
        return float((self.local * self.foreground).sum() / self.foreground.sum().clamp_min(1))

    def around(self, structure: Structure) -> float:
        """Mean in and next to a structure."""
        member = (structure.membership(self.c_atlas) > 0.5 * structure.level).float()
        weight = F.max_pool3d(member, 3, 1, 1) * self.foreground
        return float((self.local * weight).sum() / weight.sum().clamp_min(1))


class Embedded(NamedTuple):
    """An exam with its coordinate map."""

    prepared: Prepared
    c_atlas: Coordinates
    """(1, 3, n, n, n) on the prepared grid, atlas frame."""
    alike: Likeness | None = None
    """How well it fits to the atlas of the model that made it, where that is known already."""

    @property
    def foreground(self) -> Tensor:
        """(1, 1, n, n, n) bool."""
        return torch.from_numpy(self.prepared.foreground)[None, None]

    def shows(self, points_box: Float[Tensor, "1 3 *points"]) -> Bool[Tensor, "*points"]:
        """Whether places lie in the patient; the outermost voxels of the prepared box reach beyond their middle."""
        within = (points_box.abs() <= 1 + 2 / (self.prepared.size - 1)).all(dim=1, keepdim=True)
        return (within & (grid.sample(self.foreground.float(), points_box) > IN_VIEW))[0, 0]


def embed(model: Model, exam: Volume) -> Embedded:
    """The coordinate map of an exam.

    An oblique exam is read along the patient's axes, and once more along its own: where the patient leaned and the grid
    with him, that one looks more like the atlas, and counts.

    Raises:
        ExamError: the exam cannot be prepared (too thin, or nothing but air).

    Source: ``c_n = F(x_n)``, §2.1.
    """
    upright = map_prepared(model, prepare(exam, model.size, model.region))
    if not oblique(exam):
        return upright
    leaning = map_prepared(model, prepare(exam, model.size, model.region, upright=False))
    ways = [one._replace(alike=likeness_of(model, one)) for one in (upright, leaning)]
    return max(ways, key=lambda one: one.alike.of_exam())


def map_prepared(model: Model, prepared: Prepared) -> Embedded:
    """The coordinate map of an exam that is prepared already."""
    image = torch.from_numpy(prepared.image)[None, None]
    with torch.inference_mode():
        c = model.network(image.to(model.network.offset.device), model.level).cpu()
    return Embedded(prepared, grid.resize(c.clone(), prepared.hu.shape))


def likeness_of(model: Model, embedded: Embedded) -> Likeness:
    """How well an exam looks like the atlas aligned to it by its map."""
    if embedded.alike is not None:
        return embedded.alike
    shape = tuple(n // 2 for n in embedded.prepared.hu.shape)
    c_atlas = grid.resize(embedded.c_atlas, shape)
    image = grid.shrink(torch.from_numpy(embedded.prepared.image)[None, None], shape)
    local = likeness(c_atlas, image, model.atlas, model.autoencoder)
    foreground = grid.resize(embedded.foreground.float(), shape)
    return Likeness(c_atlas, local, foreground)


def familiar(model: Model, embedded: Embedded) -> bool:
    """Whether an exam looks like those that the model learned from; else its coordinates mean nothing."""
    return likeness_of(model, embedded).of_exam() >= model.familiar


def check_familiar(model: Model, embedded: Embedded, name: str) -> None:
    """Refuse an exam whose coordinates mean nothing.

    Raises:
        ExamError: it is unlike those that the model learned from.
    """
    if not familiar(model, embedded):
        raise ExamError(
            f"{name} is unlike every exam that {model.name} learned from, so that nothing can be placed in it; choose "
            "an exam of that part of the body, or see what `locate --orient` makes of it."
        )
