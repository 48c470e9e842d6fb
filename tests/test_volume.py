"""Volumes: every voxel keeps its place in mm, whatever the storage order and the affine."""

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepatlas.errors import ExamError
from deepatlas.volume import Volume, apply, checked_affine, corners_mm, ras_order, reorder, to_ras

ORDERS = [(perm, flips) for perm in permutations(range(3)) for flips in product((False, True), repeat=3)]
SHAPE = (3, 4, 5)


def turn(x: float, y: float, z: float) -> np.ndarray:
    """Rotation by three angles in radians, (3, 3)."""
    cx, cy, cz = np.cos([x, y, z])
    sx, sy, sz = np.sin([x, y, z])
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def affine_of(linear: np.ndarray, origin: tuple[float, float, float] = (-31.5, 12.25, 407.0)) -> np.ndarray:
    """A 4×4 affine from its linear part."""
    matrix = np.eye(4)
    matrix[:3, :3] = linear
    matrix[:3, 3] = origin
    return matrix


SPACING = np.diag([0.9, 1.7, 3.2])
SHEAR = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.3], [0.0, 0.0, 1.0]])
AFFINES = {
    "straight": affine_of(SPACING),
    "left-handed": affine_of(np.diag([-1.0, 1.0, 1.0]) @ SPACING),
    "oblique": affine_of(turn(0.3, -0.2, 0.4) @ SPACING),
    "sheared": affine_of(SHEAR @ turn(0.1, 0.2, -0.1) @ SPACING),
}


def numbered() -> np.ndarray:
    """An array in which every voxel has a value of its own."""
    return np.arange(np.prod(SHAPE)).reshape(SHAPE)


def places(volume: Volume) -> np.ndarray:
    """mm of every voxel, in the order of the voxels' values, (60, 3); built voxel by voxel."""
    result = np.empty((volume.array.size, 3))
    for index in np.ndindex(*volume.shape):
        result[volume.array[index]] = volume.affine[:3, :3] @ np.array(index, float) + volume.affine[:3, 3]
    return result


def test_there_are_48_orders():
    assert len(set(ORDERS)) == 48


@pytest.mark.parametrize("kind", AFFINES)
def test_reorder_keeps_every_voxel_in_its_place(kind):
    volume = Volume(numbered(), AFFINES[kind])
    truth = places(volume)
    for perm, flips in ORDERS:
        stored = reorder(volume, perm, flips)
        assert stored.shape == tuple(SHAPE[axis] for axis in perm)
        assert np.abs(places(stored) - truth).max() <= 1e-4


@pytest.mark.parametrize("kind", AFFINES)
def test_all_48_storage_orders_come_out_the_same(kind):
    volume = Volume(numbered(), AFFINES[kind])
    expected = to_ras(volume)
    assert np.all(np.diagonal(expected.affine)[:3] > 0)
    for order in ORDERS:
        again = to_ras(reorder(volume, *order))
        np.testing.assert_array_equal(again.array, expected.array)
        np.testing.assert_allclose(again.affine, expected.affine, rtol=0, atol=1e-9)


def test_a_tie_is_settled_without_the_storage_order():
    volume = Volume(numbered(), affine_of(turn(0.0, 0.0, np.pi / 4) * 2.0))
    expected = to_ras(volume)
    for order in ORDERS:
        np.testing.assert_array_equal(to_ras(reorder(volume, *order)).array, expected.array)


def test_order_of_a_known_affine():
    # i runs to the head, j to the left, k to the back
    affine = affine_of(np.array([[0.0, -2.0, 0.0], [0.0, 0.0, -3.0], [4.0, 0.0, 0.0]]))
    assert ras_order(affine) == ((1, 2, 0), (True, True, False))
    ras = to_ras(Volume(np.zeros((5, 6, 7)), affine))
    assert ras.shape == (6, 7, 5)
    np.testing.assert_allclose(ras.affine[:3, :3], np.diag([2.0, 3.0, 4.0]))
    np.testing.assert_allclose(ras.affine[:3, 3], [-31.5 - 2.0 * 5, 12.25 - 3.0 * 6, 407.0])


@settings(max_examples=60, deadline=None)
@given(
    angles=st.tuples(*[st.floats(-3.1, 3.1)] * 3),
    spacing=st.tuples(*[st.floats(0.2, 8.0)] * 3),
    mirror=st.booleans(),
    points=st.lists(st.tuples(*[st.floats(-500, 500)] * 3), min_size=1, max_size=5),
)
def test_there_and_back(angles, spacing, mirror, points):
    linear = turn(*angles) @ np.diag(spacing) @ np.diag([-1.0 if mirror else 1.0, 1.0, 1.0])
    volume = Volume(numbered(), affine_of(linear))
    np.testing.assert_allclose(volume.spacing_mm, spacing, rtol=1e-9)
    assert np.abs(apply(volume.affine, apply(volume.inverse, points)) - np.array(points)).max() <= 1e-4
    ras = to_ras(volume)
    diagonal = np.diagonal(ras.affine)[:3] / ras.spacing_mm
    assert np.all(diagonal >= 0)
    assert np.prod(diagonal) >= np.prod(np.abs(np.diagonal(linear)) / np.array(spacing)) - 1e-6


def test_corners():
    corners = corners_mm((2, 3, 4), np.diag([2.0, 3.0, 4.0, 1.0]))
    assert {tuple(corner) for corner in corners} == set(product((0.0, 2.0), (0.0, 6.0), (0.0, 12.0)))


@pytest.mark.parametrize(
    ("affine", "message"),
    [
        (np.eye(3), "4×4"),
        (np.full((4, 4), np.nan), "finite"),
        (np.ones((4, 4)), "last row"),
        (np.diag([1.0, 1.0, 0.0, 1.0]), "inverted"),
        (affine_of(np.array([[1.0, 1.0, 0.0], [0.0, 0.0001, 0.0], [0.0, 0.0, 1.0]])), "inverted"),
    ],
)
def test_bad_affines_are_refused(affine, message):
    with pytest.raises(ExamError, match=message):
        checked_affine(affine)


def test_only_three_axes():
    with pytest.raises(ExamError, match="three axes"):
        Volume(np.zeros((2, 2, 2, 2)), np.eye(4))
