"""Homogeneous maps: rotations that are rotations, and fits that find the map that made the points."""

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepatlas import affine

ANGLES = st.tuples(*[st.floats(-3.0, 3.0) for _ in range(3)])


def points(batch: int, count: int, seed: int = 0) -> torch.Tensor:
    """Points of a generator, float64."""
    return torch.randn(batch, 3, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sheared() -> torch.Tensor:
    """Two maps without any symmetry; the second is left-handed."""
    linear = torch.tensor(
        [[[1.2, 0.3, -0.1], [-0.2, 0.8, 0.4], [0.1, -0.5, 1.5]], [[0.2, 1.1, 0.0], [0.9, 0.1, 0.3], [-0.2, 0.4, 0.7]]],
        dtype=torch.float64,
    )
    return affine.from_parts(linear, torch.tensor([[0.5, -2.0, 3.0], [7.0, 0.0, -1.0]], dtype=torch.float64))


def test_applying_is_the_matrix_product_with_homogeneous_points():
    p, matrix = points(2, 7), sheared()
    expected = np.einsum("bij,bjn->bin", matrix.numpy(), np.concatenate([p.numpy(), np.ones((2, 1, 7))], axis=1))
    np.testing.assert_allclose(affine.apply(matrix, p).numpy(), expected[:, :3], atol=1e-12)


def test_trailing_axes_and_a_batch_of_one_on_either_side():
    p, matrix = points(2, 24).view(2, 3, 2, 3, 4), sheared()
    assert affine.apply(matrix, p).shape == (2, 3, 2, 3, 4)
    torch.testing.assert_close(affine.apply(matrix[:1], p)[1], affine.apply(matrix[:1], p[1:])[0])
    torch.testing.assert_close(affine.apply(matrix, p[:1])[1], affine.apply(matrix[1:], p[:1])[0])


def test_composition_is_the_product_and_the_inverse_leads_back():
    p, matrix = points(1, 9), sheared()
    there = affine.apply(matrix[:1], p)
    torch.testing.assert_close(affine.apply(matrix[1:] @ matrix[:1], p), affine.apply(matrix[1:], there))
    torch.testing.assert_close(affine.apply(torch.linalg.inv(matrix[:1]), there), p)


def test_quarter_turns_take_axes_to_axes():
    quarter = math.pi / 2
    for axis, (source, target) in enumerate(((1, 2), (2, 0), (0, 1))):  # x: y to z; y: z to x; z: x to y
        angles = torch.zeros(1, 3, dtype=torch.float64)
        angles[0, axis] = quarter
        moved = affine.rotation(angles)[0] @ torch.eye(3, dtype=torch.float64)[source]
        torch.testing.assert_close(moved, torch.eye(3, dtype=torch.float64)[target])


def test_the_third_turn_is_applied_first():
    turn = affine.rotation(torch.tensor([[math.pi / 2, 0.0, math.pi / 2]], dtype=torch.float64))[0]
    moved = turn @ torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)  # about z to y, then about x to z
    torch.testing.assert_close(moved, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))


@given(ANGLES)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_a_rotation_keeps_lengths_and_handedness(angles):
    turn = affine.rotation(torch.tensor([angles], dtype=torch.float64))[0]
    torch.testing.assert_close(turn @ turn.T, torch.eye(3, dtype=torch.float64))
    assert math.isclose(float(torch.linalg.det(turn)), 1.0, abs_tol=1e-12)


def test_a_fit_finds_the_map_that_made_the_points():
    p, matrix = points(2, 40), sheared()
    found = affine.fit(p, affine.apply(matrix, p), torch.ones(2, 1, 40, dtype=torch.float64), ridge=0.0)
    torch.testing.assert_close(found, matrix)


def test_points_without_weight_do_not_pull():
    p, matrix = points(2, 40), sheared()
    target, weight = affine.apply(matrix, p), torch.rand(2, 1, 40, dtype=torch.float64) + 0.1
    target[:, :, ::3], weight[:, :, ::3] = 1e3, 0.0
    torch.testing.assert_close(affine.fit(p, target, weight, ridge=0.0), matrix)


def test_a_weighted_fit_is_the_weighted_least_squares_solution():
    p, target = points(1, 30, seed=1), points(1, 30, seed=2)
    weight = torch.rand(1, 1, 30, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rows = np.concatenate([p[0].numpy(), np.ones((1, 30))]).T * np.sqrt(weight[0, 0].numpy())[:, None]
    values = target[0].numpy().T * np.sqrt(weight[0, 0].numpy())[:, None]
    expected = np.linalg.lstsq(rows, values, rcond=None)[0].T
    found = affine.fit(p, target, weight, ridge=0.0)[0, :3].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-10)


def test_the_ridge_keeps_points_in_a_plane_and_empty_sums_finite():
    p = points(2, 20)
    p[:, 2] = 0.25
    weight = torch.ones(2, 1, 20, dtype=torch.float64)
    weight[1] = 0
    found = affine.fit(p, 2 * p, weight)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(affine.apply(found, p)[0], 2 * p[0], atol=1e-4, rtol=0)
