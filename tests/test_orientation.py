"""Exams stored turned are put right by what they show; mirrored ones are reported and left alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from deepatlas import grid, orientation
from deepatlas.autoencoder import Autoencoder
from deepatlas.checkpoint import MARGIN, Model
from deepatlas.cli.reading import mapped
from deepatlas.config import NetworkConfig
from deepatlas.embedding import embed
from deepatlas.prepare import prepare
from deepatlas.volume import Volume, apply

WAYS = orientation.cube_symmetries()


class Upright(nn.Module):
    """A network that takes every exam for an upright one of the seed's pose."""

    def __init__(self) -> None:
        super().__init__()
        self.config = NetworkConfig(size=24)
        self.offset = nn.Parameter(torch.zeros(3))

    def forward(self, image, level=0):
        return MARGIN * grid.identity(tuple(image.shape[2:]))


@pytest.fixture(scope="module")
def exam() -> Volume:
    """A patient without any symmetry."""
    affine = np.diag([6.0, 6.0, 6.0, 1.0])
    affine[:3, 3] = -150
    places = apply(affine, np.moveaxis(np.indices((51, 51, 51)), 0, -1))
    hu = np.full((51, 51, 51), -1000.0)

    def put(centre, radii, value):
        hu[(((places - centre) / np.array(radii)) ** 2).sum(axis=-1) < 1] = value

    put((0, 0, 0), (110, 90, 135), 0.0)
    put((50, 20, 60), (30, 35, 25), 200.0)
    put((-40, -30, 20), (25, 30, 50), -200.0)
    put((20, 40, -60), (45, 25, 30), 120.0)
    put((-30, 45, -30), (20, 20, 60), -120.0)
    return Volume(hu.astype(np.int16), affine)


@pytest.fixture(scope="module")
def model(exam) -> Model:
    """A model whose atlas is the exam."""
    torch.manual_seed(0)
    prepared = prepare(exam, 24, "320mm")
    image = torch.from_numpy(prepared.image)[None, None]
    where = grid.identity((32, 32, 32)) / MARGIN
    return Model(
        network=Upright(),
        autoencoder=Autoencoder().requires_grad_(False),
        atlas=grid.sample(image, where) * grid.inside(where),
        seed_box_to_mm=torch.from_numpy(prepared.box_to_mm),
        region="320mm",
        level=0,
        seed_exam="seed",
        structures={},
    )


def test_there_are_48_ways_and_24_are_proper():
    assert np.array_equal(WAYS[0], np.eye(3))
    assert len({way.tobytes() for way in WAYS}) == 48
    assert [round(np.linalg.det(way)) for way in WAYS] == [1] * 24 + [-1] * 24


@pytest.mark.parametrize("number", [1, 7, 12, 23, 30, 47])
def test_a_turned_preparation_is_the_preparation_of_the_turned_exam(number, exam, model):
    way = WAYS[number]
    turned = prepare(orientation.put_right(exam, way), 24, "320mm")
    mine = orientation._turned(model, prepare(exam, 24, "320mm"), way).prepared
    np.testing.assert_allclose(mine.hu, turned.hu, atol=0.1)
    assert np.array_equal(mine.foreground, turned.foreground)
    places = np.array([[0.3, -0.2, 0.5], [-1, 1, 1]])
    middle = apply(exam.affine, (np.array(exam.shape) - 1) / 2)
    about_origin = apply(mine.box_to_mm, places)
    np.testing.assert_allclose(about_origin + middle - way @ middle, apply(turned.box_to_mm, places), atol=0.5)


@pytest.mark.parametrize("number", [0, 3, 9, 14, 20, 23])
def test_an_exam_stored_turned_is_put_right(number, exam, model):
    wrong = orientation.put_right(exam, WAYS[number])
    found = orientation.upright(model, wrong)
    assert np.array_equal(found.turn, WAYS[number].T)
    assert found.turned == (number > 0)
    assert not found.mirrored


@pytest.mark.parametrize("number", [24, 33, 47])
def test_a_mirrored_exam_is_reported_and_not_flipped(number, exam, model):
    found = orientation.upright(model, orientation.put_right(exam, WAYS[number]))
    assert found.mirrored
    assert np.linalg.det(found.turn) > 0


def test_answers_stay_in_the_frame_of_the_exams_own_header(exam, model):
    wrong = orientation.put_right(exam, WAYS[14])
    straight, turned = embed(model, exam), orientation.embed_upright(model, wrong)[0]
    assert torch.equal(straight.c_atlas, turned.c_atlas)
    box = np.array([[0.4, -0.3, 0.6]])
    voxel = apply(exam.inverse, apply(straight.prepared.box_to_mm, box))
    np.testing.assert_allclose(apply(wrong.inverse, apply(turned.prepared.box_to_mm, box)), voxel, atol=1e-6)


def test_a_turn_in_words():
    about_head = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]])
    assert orientation.words(np.eye(3)) == ["right", "front", "head"]
    assert orientation.words(about_head) == ["front", "left", "head"]


def test_an_exam_that_is_no_more_alike_when_turned_stays_as_it_is(exam, model):
    vague = replace(model, atlas=torch.full_like(model.atlas, 0.5))
    assert not orientation.upright(vague, orientation.put_right(exam, WAYS[9])).turned


def test_where_a_turn_was_taken_the_sides_are_to_be_checked(model, exam):
    _, notes = mapped(model, orientation.put_right(exam, WAYS[14]), orient=True)
    assert len(notes) == 1
    assert "check left and right" in notes[0]
    assert mapped(model, exam, orient=True)[1] == []
