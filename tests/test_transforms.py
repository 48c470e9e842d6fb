"""Maps between exams in mm, whatever grid they are held on; `test_register` has those of real registrations."""

import numpy as np
import pytest

from deepatlas.transforms import SLAB, Transform, displacement, jacobian, moved
from deepatlas.volume import Volume, apply, reorder
from exact import affine_of, places_of, rotated

NODES = affine_of(rotated((12, -20, 15)) * [-4, 6, 5], (-30, 10, 40))
"""Of the grid that a map is held on: oblique, anisotropic and left-handed."""
SHAPE = (7, 6, 8)
GRADIENT = np.array([[0.10, -0.20, 0.05], [0.15, -0.30, 0.10], [-0.05, 0.20, 0.25]])
LINEAR = affine_of(1.1 * rotated((5, 10, -8)), (9, -4, 14))


def sheared(gradient=GRADIENT, linear=LINEAR) -> Transform:
    """A linear map, and a shift from it that is linear in space."""
    middle = apply(NODES, (np.array(SHAPE) - 1) / 2)
    shift = (places_of(SHAPE, NODES) - middle) @ np.asarray(gradient).T
    return Transform(linear, np.moveaxis(shift, -1, 0), NODES)


def inner_grid(stored=None) -> Volume:
    """An exam whose voxels all lie within the nodes, on a grid of its own."""
    turn, spacing = rotated((-10, 5, 8)), np.array([2.0, 3.0, 1.5])
    corner = apply(NODES, (np.array(SHAPE) - 1) / 2) - turn * spacing @ [2, 1.5, 2.5]
    values = np.random.default_rng(0).normal(size=(5, 4, 6)).astype(np.float32)
    volume = Volume(values, affine_of(turn * spacing, corner))
    index = apply(np.linalg.inv(NODES), places_of(volume.shape, volume.affine))
    assert (index >= 0).all()
    assert (index <= np.array(SHAPE) - 1).all()
    return reorder(volume, *stored) if stored else volume


STORED = [None, ((2, 0, 1), (True, False, True)), ((1, 0, 2), (False, False, True))]


def test_between_the_nodes_the_shift_is_linear_and_beyond_them_that_of_the_nearest():
    found = sheared()
    middle = apply(NODES, (np.array(SHAPE) - 1) / 2)
    points = apply(NODES, np.random.default_rng(1).uniform(0, np.array(SHAPE) - 1, (50, 3)))
    expected = apply(LINEAR, points) + (points - middle) @ GRADIENT.T
    np.testing.assert_allclose(found.points(points), expected, atol=1e-9)
    beyond, nearest = apply(NODES, [[-3.0, 2, 9], [4, 30, 1]]), apply(NODES, [[0.0, 2, 7], [4, 5, 1]])
    shift = (nearest - middle) @ GRADIENT.T
    np.testing.assert_allclose(found.points(beyond), apply(LINEAR, beyond) + shift, atol=1e-9)


def test_the_change_of_volume_of_a_map_that_is_linear_in_space():
    found = sheared()
    assert found.determinants().shape == SHAPE
    np.testing.assert_allclose(found.determinants(), np.linalg.det(LINEAR[:3, :3] + GRADIENT), atol=1e-9)
    np.testing.assert_allclose(sheared(0 * GRADIENT).determinants(), 1.1**3, atol=1e-9)
    mirrored = sheared(np.diag([-2.0, 0, 0]), np.eye(4))
    np.testing.assert_allclose(mirrored.determinants(), -1, atol=1e-9)


@pytest.mark.parametrize("stored", STORED)
def test_the_jacobian_map_of_an_exam_is_that_of_the_transform(stored):
    volume, found = inner_grid(stored), sheared()
    field = displacement(found, volume)
    change = jacobian(field, volume)
    assert (change.shape, change.dtype) == (volume.shape, np.float32)
    np.testing.assert_allclose(change, np.linalg.det(LINEAR[:3, :3] + GRADIENT), atol=1e-4)


def test_the_jacobian_map_has_no_seams_between_its_slabs():
    field = np.random.default_rng(0).normal(0, 2, (2 * SLAB + 1, 5, 4, 1, 3)).astype(np.float32)
    volume = Volume(np.zeros(field.shape[:3], np.int16), np.diag([2.0, 3, 4, 1]))
    vectors = field[:, :, :, 0] * [-1, -1, 1]  # RAS
    along = np.stack(np.gradient(vectors, axis=(0, 1, 2)), axis=-1) / [2, 3, 4]
    np.testing.assert_allclose(jacobian(field, volume), np.linalg.det(np.eye(3) + along), atol=1e-4)


@pytest.mark.parametrize("stored", STORED)
def test_a_displacement_is_the_map_less_the_place_in_lps(stored):
    volume, found = inner_grid(stored), sheared()
    field = displacement(found, volume)
    assert (field.shape, field.dtype) == ((*volume.shape, 1, 3), np.float32)
    places = places_of(volume.shape, volume.affine)
    there = places + field[:, :, :, 0] * [-1, -1, 1]
    middle = apply(NODES, (np.array(SHAPE) - 1) / 2)
    np.testing.assert_allclose(there, apply(LINEAR, places) + (places - middle) @ GRADIENT.T, atol=1e-4)


@pytest.mark.parametrize("stored", STORED)
def test_a_shift_by_whole_voxels_moves_every_voxel_whole(stored):
    still = inner_grid()
    steps = np.array([2, -1, 1])
    shift = np.broadcast_to((still.affine[:3, :3] @ steps)[:, None, None, None], (3, *SHAPE))
    found = Transform(np.eye(4), shift, NODES)
    values = np.random.default_rng(2).normal(size=still.shape).astype(np.float32)
    drawn = np.random.default_rng(3).integers(1, 600, still.shape).astype(np.uint16)
    results = []
    for array, how in ((values, {"outside": -7.0}), (drawn, {"labels": True, "outside": -7.0})):
        moving = Volume(array, still.affine)
        laid = moved(found, reorder(still, *stored) if stored else still, moving, **how)
        upright = Volume(laid, (reorder(still, *stored) if stored else still).affine)
        back = np.moveaxis(np.rint(apply(upright.inverse, places_of(still.shape, still.affine))).astype(int), -1, 0)
        results.append(laid[tuple(back)])
    source = np.moveaxis(np.indices(still.shape), 0, -1) + steps
    within = ((source >= 0) & (source < still.shape)).all(axis=-1)
    assert 0.1 < within.mean() < 0.9
    for laid, array, outside in zip(results, (values, drawn), (-7.0, 0), strict=True):
        np.testing.assert_allclose(laid[within], array[tuple(np.moveaxis(source[within], -1, 0))], atol=1e-5)
        assert (laid[~within] == outside).all()
    assert results[0].dtype == np.float32
    assert results[1].dtype == np.uint16
