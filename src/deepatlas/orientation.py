"""Exams whose header lies about how they are turned: found by the map, and put right.

Not in the paper. Every way to turn a cube onto itself is tried, and the one in which the exam looks most like the
atlas is kept. A mirror image is reported and never applied: the body is nearly symmetric, and a silent mirror swaps
left and right.
"""

from dataclasses import replace
from itertools import permutations, product
from typing import NamedTuple

import numpy as np
import torch

from deepatlas import grid
from deepatlas.checkpoint import Model
from deepatlas.embedding import Embedded, embed, likeness_of
from deepatlas.prepare import Prepared, prepare
from deepatlas.volume import Volume, apply

GAIN = 0.03
"""An exam is turned (or called mirrored) only where that makes it more like the atlas by this much."""


class Upright(NamedTuple):
    """How an exam has to be turned to be upright."""

    turn: np.ndarray
    """(3, 3): rotation of the patient, RAS → RAS, about the middle of the exam."""
    likeness: float
    """Of the exam so turned to the atlas, 0 … 1."""
    as_stored: float
    """The same as the header has it."""
    mirrored: bool
    """A mirror image would look more like the atlas than any turn does. Nothing is done about it."""

    @property
    def turned(self) -> bool:
        """The header was wrong."""
        return not np.array_equal(self.turn, np.eye(3))


def words(turn: np.ndarray) -> list[str]:
    """What lies, in truth, in the direction that the header calls right, front and head."""
    names = (("right", "left"), ("front", "back"), ("head", "feet"))
    return [names[int(np.abs(column).argmax())][int(column.sum() < 0)] for column in turn.T]


def cube_symmetries() -> list[np.ndarray]:
    """The 48 ways to permute and flip three axes, (3, 3): the identity first, the 24 proper ones before the rest."""
    matrices = [
        np.eye(3)[list(order)] * signs for order in permutations(range(3)) for signs in product((1, -1), repeat=3)
    ]
    return sorted(matrices, key=lambda m: (np.linalg.det(m) < 0, -np.trace(m)))


def upright(model: Model, exam: Volume) -> Upright:
    """Find how an exam is turned. The network sees it 48 times.

    Raises:
        ExamError: the exam cannot be prepared.
    """
    prepared = prepare(exam, model.size, model.region)
    scores = [(likeness_of(model, _turned(model, prepared, matrix)).of_exam(), matrix) for matrix in cube_symmetries()]
    as_stored = scores[0][0]
    best, turn = max(scores[:24], key=lambda one: one[0])
    if best < as_stored + GAIN:
        best, turn = scores[0]
    mirror = max(score for score, _ in scores[24:])
    return Upright(turn, best, as_stored, mirror > best + GAIN)


def embed_upright(model: Model, exam: Volume) -> tuple[Embedded, Upright]:
    """The map of an exam that may be stored turned, and how it was. Everything stays in the frame of its own header.

    Raises:
        ExamError: the exam cannot be prepared.
    """
    found = upright(model, exam)
    if not found.turned:
        return embed(model, exam), found
    right = put_right(exam, found.turn)
    embedded = embed(model, right)
    back = exam.affine @ np.linalg.inv(right.affine)
    return embedded._replace(prepared=replace(embedded.prepared, box_to_mm=back @ embedded.prepared.box_to_mm)), found


def put_right(exam: Volume, turn: np.ndarray) -> Volume:
    """The exam with its affine turned about the middle of the exam; the array stays as it is."""
    middle = apply(exam.affine, (np.array(exam.shape) - 1) / 2)
    matrix = np.eye(4)
    matrix[:3, :3] = turn
    matrix[:3, 3] = middle - turn @ middle
    return replace(exam, affine=matrix @ exam.affine)


def _turned(model: Model, prepared: Prepared, turn: np.ndarray) -> Embedded:
    """What the network makes of a prepared exam after a turn of the patient."""
    order = [int(np.flatnonzero(row)[0]) for row in turn]
    flips = [axis for axis, row in enumerate(turn) if row.sum() < 0]
    hu, foreground = (np.flip(np.transpose(part, order), flips).copy() for part in (prepared.hu, prepared.foreground))
    move = np.eye(4)
    move[:3, :3] = turn
    there = Prepared(hu, foreground, move @ prepared.box_to_mm @ np.linalg.inv(move))
    with torch.inference_mode():
        image = torch.from_numpy(there.image)[None, None].to(model.network.offset.device)
        c_atlas = model.network(image, model.level).cpu()
    return Embedded(there, grid.resize(c_atlas.clone(), there.hu.shape))
