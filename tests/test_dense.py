"""The map at every voxel: slabs that cover a grid, values worked out by hand, and what stands outside the box."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from deepatlas import dense, grid
from deepatlas.checkpoint import MARGIN
from deepatlas.embedding import Embedded
from deepatlas.prepare import Prepared, grid_to_box
from deepatlas.volume import Volume, apply

SHAPE = (13, 10, 8)
AFFINE = np.array([[0.0, -3, 0.2, 20], [2, 0, 0, -5], [0, 0.1, -5, 30], [0, 0, 0, 1]])  # oblique, left-handed
EXAM = Volume(np.zeros(SHAPE, np.int16), AFFINE)
NODES = 9


def cut_box():
    """Box → mm of a prepared box that holds only the middle of the exam."""
    centre = apply(AFFINE, (np.array(SHAPE) - 1) / 2)
    matrix = np.diag([8.0, 7.0, 9.0, 1.0])
    matrix[:3, 3] = centre
    return matrix


@pytest.fixture
def embedded():
    """An exam whose coordinate is MARGIN times the place in its box."""
    ones = np.ones((NODES,) * 3)
    prepared = Prepared(ones.astype(np.float32), ones > 0, cut_box())
    return Embedded(prepared, MARGIN * grid.identity((NODES,) * 3))


def model(atlas):
    """What of a model is needed here: its frame is the exam's own."""
    to_mm = torch.from_numpy(cut_box()) @ torch.diag(torch.tensor([1 / MARGIN] * 3 + [1.0], dtype=torch.float64))
    return SimpleNamespace(atlas=atlas, atlas_to_mm=to_mm)


def places_box():
    """Where every voxel of the exam lies in the box, worked out in one go."""
    return apply(np.linalg.inv(cut_box()) @ AFFINE, np.stack(np.indices(SHAPE), axis=-1))


@pytest.mark.parametrize("voxels", [1, 200, 10**6])
def test_slabs_cover_the_grid_once_and_know_their_places(embedded, voxels):
    count = np.zeros(SHAPE, int)
    for block, box in dense.blocks(embedded, EXAM, voxels):
        count[block] += 1
        assert np.allclose(box[0].numpy(), np.moveaxis(places_box()[block], -1, 0), atol=1e-5)
        assert box[0, 0].numel() <= max(voxels, SHAPE[1] * SHAPE[2])
    assert (count == 1).all()


def test_coordinates_are_those_of_the_nearest_point_of_the_box(embedded):
    wanted = places_box().clip(-1, 1)
    assert (np.abs(places_box()) > 1.2).any()
    units = dense.coordinates(model(None), EXAM, embedded=embedded)
    assert (units.dtype, units.shape) == (np.float32, (*SHAPE, 3))
    assert np.allclose(units, MARGIN * wanted, atol=1e-5)
    mm = dense.coordinates(model(None), EXAM, mm=True, embedded=embedded)
    assert np.allclose(mm, apply(cut_box(), wanted), atol=1e-3)


def test_the_aligned_atlas_is_dark_outside_the_box(embedded):
    bright = dense.aligned_atlas(model(torch.ones(1, 1, 4, 4, 4)), EXAM, embedded)
    far = np.abs(places_box()).max(axis=-1)
    assert (bright[far < 1] == 256).all()
    assert (bright[far > 1 + 2 / (NODES - 1) + 1e-6] == -256).all()


def test_the_atlas_alone_lies_where_its_coordinates_say():
    atlas = torch.zeros(1, 1, 5, 5, 5)
    atlas[0, 0, 4, 1, 0] = 1
    alone = dense.atlas_volume(model(atlas))
    assert (alone.array[4, 1, 0], alone.array[0, 0, 0]) == (256, -256)
    in_atlas = apply(grid_to_box(5), [4, 1, 0])
    assert np.allclose(in_atlas, [1, -0.5, -1])
    assert np.allclose(apply(alone.affine, [4, 1, 0]), apply(cut_box(), in_atlas / MARGIN))
