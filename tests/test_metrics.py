"""Metrics against values worked out by hand, a brute-force second path, and laws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from deepatlas import metrics

ANISOTROPIC = np.diag([1.0, 2.0, 3.0, 1.0])
# Left-handed, turned 30° in plane, axes swapped, not isotropic, shifted.
TURNED = np.array(
    [
        [0.0, -2.0 * np.cos(0.5), 3.0 * np.sin(0.5), 40.0],
        [0.0, 2.0 * np.sin(0.5), 3.0 * np.cos(0.5), -70.0],
        [1.5, 0.0, 0.0, 12.0],
        [0.0, 0.0, 0.0, 1.0],
    ]
)
SHEARED = np.array([[1.0, 0.6, 0.2, 5.0], [0.0, 2.0, 0.9, -3.0], [0.3, 0.0, 2.5, 8.0], [0.0, 0.0, 0.0, 1.0]])
AFFINES = {"anisotropic": ANISOTROPIC, "turned": TURNED, "sheared": SHEARED}


def cube(low, high, shape=(16, 14, 12)):
    """A mask with the voxels low ≤ index < high inside."""
    mask = np.zeros(shape, bool)
    mask[tuple(slice(*ends) for ends in zip(low, high, strict=True))] = True
    return mask


def blob(seed, shape=(9, 8, 7), share=0.25):
    """A ragged mask with holes and touching the array's edges."""
    return np.random.default_rng(seed).random(shape) < share


def to_mm(affine, index):
    """One index through an affine, written out."""
    return affine[:3, :3] @ np.asarray(index, float) + affine[:3, 3]


def brute_surface(mask):
    """Indices of the voxels with a face neighbour outside, one voxel at a time."""
    found = []
    for index in np.argwhere(mask):
        for axis in range(3):
            for step in (-1, 1):
                other = index.copy()
                other[axis] += step
                inside = 0 <= other[axis] < mask.shape[axis]
                if not inside or not mask[tuple(other)]:
                    found.append(tuple(index))
    return sorted(set(found))


def brute_directed(a, b, affine):
    """The definition: every surface voxel of a, the nearest of b, the value 95 % of the way up the sorted list."""
    b_mm = [to_mm(affine, index) for index in brute_surface(b)]
    nearest = sorted(min(np.linalg.norm(to_mm(affine, p) - q) for q in b_mm) for p in brute_surface(a))
    place = 0.95 * (len(nearest) - 1)
    low = int(place)
    high = min(low + 1, len(nearest) - 1)
    return nearest[low] + (place - low) * (nearest[high] - nearest[low])


def test_dice_of_shifted_cubes():
    truth, prediction = cube((2, 2, 2), (6, 6, 6)), cube((3, 2, 2), (7, 6, 6))
    assert metrics.dice(truth, prediction) == 0.75  # 3 of 4 slabs in common
    assert metrics.dice(truth, cube((2, 2, 2), (4, 6, 6))) == pytest.approx(2 * 32 / (64 + 32))
    assert metrics.dice(truth, cube((7, 2, 2), (9, 4, 4))) == 0


def test_dice_reads_any_nonzero_value_as_inside():
    truth, prediction = cube((2, 2, 2), (6, 6, 6)), cube((3, 2, 2), (7, 6, 6))
    assert metrics.dice(truth.astype(np.uint8) * 200, prediction.astype(np.float32) * 0.5) == 0.75


def test_empty_masks():
    full, empty = cube((2, 2, 2), (6, 6, 6)), np.zeros((16, 14, 12), bool)
    assert metrics.dice(full, empty) == 0
    assert metrics.dice(empty, full) == 0
    assert np.isnan(metrics.dice(empty, empty))
    for truth, prediction in [(full, empty), (empty, full), (empty, empty)]:
        assert np.isnan(metrics.hd95_mm(truth, prediction, ANISOTROPIC))
        assert np.isnan(metrics.directed_hd95_mm(truth, prediction, ANISOTROPIC))
        assert np.isnan(metrics.centroid_error_mm(truth, prediction, ANISOTROPIC))
    assert np.isnan(metrics.hd95_missing_mm(empty, ANISOTROPIC))
    assert np.isnan(metrics.centroid_mm(empty, ANISOTROPIC)).all()
    assert metrics.surface_mm(empty, ANISOTROPIC).shape == (0, 3)


@pytest.mark.parametrize("score", [metrics.dice, metrics.hd95_mm, metrics.directed_hd95_mm, metrics.centroid_error_mm])
def test_masks_on_two_grids_are_refused(score):
    affine = () if score is metrics.dice else (ANISOTROPIC,)
    with pytest.raises(Exception, match=r"one grid|[Tt]ype-check"):  # the shape checker of the test run may speak first
        score(np.ones((4, 4, 4), bool), np.ones((1, 4, 4), bool), *affine)


def test_surface_is_the_shell():
    points = metrics.surface_mm(cube((2, 3, 4), (7, 8, 9)), np.eye(4))
    assert len(points) == 5**3 - 3**3
    assert set(map(tuple, points)) >= {(2, 3, 4), (6, 7, 8), (4, 5, 4)}
    assert (4, 5, 6) not in set(map(tuple, points))


def test_surface_needs_a_shared_face():
    """A hole open only across an edge or a corner does not make a voxel surface."""
    mask = blob(7, share=0.85)
    assert sorted(map(tuple, metrics.surface_mm(mask, np.eye(4)))) == brute_surface(mask)


def test_surface_ends_at_the_edge_of_the_array():
    assert len(metrics.surface_mm(np.ones((4, 4, 4), bool), np.eye(4))) == 4**3 - 2**3


@pytest.mark.parametrize(("axis", "expected_mm"), [(0, 3.0), (1, 6.0), (2, 9.0)])
def test_hd95_of_plates_moved_apart(axis, expected_mm):
    """Two plates, one voxel thick, 3 voxels apart: every surface voxel lies exactly that far from the other plate."""
    low, high = [2, 2, 2], [10, 10, 10]
    low[axis], high[axis] = 2, 3
    moved_low, moved_high = list(low), list(high)
    moved_low[axis], moved_high[axis] = 5, 6
    truth, prediction = cube(low, high), cube(moved_low, moved_high)
    assert metrics.hd95_mm(truth, prediction, ANISOTROPIC) == pytest.approx(expected_mm)
    assert metrics.directed_hd95_mm(truth, prediction, ANISOTROPIC) == pytest.approx(expected_mm)


def test_hd95_of_a_cube_moved_as_a_whole():
    """A cube shifted by 4 voxels of 1 mm: its far face, a sixth of the shell, is 4 mm away."""
    truth, prediction = cube((2, 2, 2), (8, 8, 8)), cube((6, 2, 2), (12, 8, 8))
    assert metrics.hd95_mm(truth, prediction, ANISOTROPIC) == pytest.approx(4.0)


def test_hd95_is_the_mean_of_the_two_directions():
    """A plate with a tongue on one side: the two directed values differ; neither the larger nor the pool is taken."""
    truth = cube((2, 2, 2), (3, 8, 8))
    prediction = truth | cube((2, 2, 2), (12, 3, 3))
    there = metrics.directed_hd95_mm(truth, prediction, ANISOTROPIC)
    back = metrics.directed_hd95_mm(prediction, truth, ANISOTROPIC)
    # Truth is part of the prediction's surface; of the 36 + 9 voxels of the prediction, nine lie 1…9 mm away.
    assert there == 0
    assert back == pytest.approx(np.percentile([0] * 36 + list(range(1, 10)), 95))
    assert metrics.hd95_mm(truth, prediction, ANISOTROPIC) == pytest.approx(back / 2)


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES.keys())
@pytest.mark.parametrize("seed", [0, 1])
def test_directed_value_agrees_with_the_definition(affine, seed):
    a, b = blob(seed, share=0.5), blob(seed + 10, share=0.03)
    expected = brute_directed(a, b, affine)
    assert metrics.directed_hd95_mm(a, b, affine) == pytest.approx(expected, abs=1e-9)
    assert metrics.directed_hd95_mm(b, a, affine) != pytest.approx(expected, abs=1e-3)


def test_missing_costs_the_diagonal_of_the_truths_box():
    truth = cube((3, 3, 3), (7, 6, 5)) & ~cube((4, 4, 4), (5, 5, 5))
    assert metrics.hd95_missing_mm(truth, ANISOTROPIC) == pytest.approx(np.sqrt(4**2 + 6**2 + 6**2))
    turned = np.sqrt((4 * 1.5) ** 2 + (3 * 2.0) ** 2 + (2 * 3.0) ** 2)
    assert metrics.hd95_missing_mm(truth, TURNED) == pytest.approx(turned)
    assert metrics.hd95_missing_mm(cube((3, 3, 3), (4, 4, 4)), np.eye(4)) == pytest.approx(np.sqrt(3))


@pytest.mark.parametrize("flipped", [(1, 1, 1), (-1, 1, 1), (1, -1, 1), (1, 1, -1)])
def test_missing_in_a_sheared_grid_takes_the_longest_diagonal(flipped):
    truth = cube((3, 3, 3), (7, 6, 5))
    affine = SHEARED @ np.diag([*flipped, 1.0])
    corners = [to_mm(affine, (i, j, k)) for i in (2.5, 6.5) for j in (2.5, 5.5) for k in (2.5, 4.5)]
    expected = max(np.linalg.norm(p - q) for p in corners for q in corners)
    assert metrics.hd95_missing_mm(truth, affine) == pytest.approx(expected)


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES.keys())
def test_centroid_lies_where_the_affine_says(affine):
    box = cube((2, 3, 4), (7, 5, 11))
    assert metrics.centroid_mm(box, affine) == pytest.approx(to_mm(affine, (4, 3.5, 7)))
    moved = cube((4, 4, 1), (9, 6, 8))
    assert metrics.centroid_error_mm(box, moved, affine) == pytest.approx(np.linalg.norm(affine[:3, :3] @ [2, 1, -3]))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from(sorted(AFFINES)))
def test_laws_of_two_masks(seed, other, name):
    a, b, affine = blob(seed), blob(other), AFFINES[name]
    assert metrics.dice(a, a) == 1
    assert metrics.hd95_mm(a, a, affine) == 0
    assert 0 <= metrics.dice(a, b) <= 1
    assert metrics.dice(a, b) == metrics.dice(b, a)
    assert metrics.hd95_mm(a, b, affine) == pytest.approx(metrics.hd95_mm(b, a, affine))
    corners = [to_mm(affine, (i, j, k)) for i in (0, 8) for j in (0, 7) for k in (0, 6)]
    assert 0 <= metrics.hd95_mm(a, b, affine) <= max(np.linalg.norm(p - q) for p in corners for q in corners)
    # A wider array, with the affine moved along, changes nothing; twice the spacing doubles every distance.
    wide = [np.pad(mask, ((2, 1), (3, 0), (0, 4))) for mask in (a, b)]
    moved = affine.copy()
    moved[:3, 3] = to_mm(affine, (-2, -3, 0))
    assert metrics.hd95_mm(*wide, moved) == pytest.approx(metrics.hd95_mm(a, b, affine))
    assert metrics.centroid_mm(wide[0], moved) == pytest.approx(metrics.centroid_mm(a, affine))
    assert metrics.hd95_mm(a, b, np.diag([2, 2, 2, 1]) @ affine) == pytest.approx(2 * metrics.hd95_mm(a, b, affine))


def test_paired_difference_is_the_t_test():
    random = np.random.default_rng(3)
    a = random.normal(0.7, 0.1, 20)
    b = a - random.normal(0.02, 0.05, 20)
    found, expected = metrics.paired_difference(a, b), stats.ttest_rel(a, b)
    interval = expected.confidence_interval(0.95)
    assert found.mean == pytest.approx(np.mean(a) - np.mean(b))
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high, found.n) == (pytest.approx(interval.low), pytest.approx(interval.high), 20)
    back = metrics.paired_difference(b, a)
    assert (back.mean, back.low, back.p) == (pytest.approx(-found.mean), pytest.approx(-found.high), found.p)


def test_paired_difference_by_hand():
    """Differences 1, 2, 3: mean 2, standard error 1/√3, t = 2√3; with two degrees of freedom p = 1 − t / √(t² + 2)."""
    found = metrics.paired_difference(np.array([2.0, 4.0, 6.0]), np.array([1.0, 2.0, 3.0]))
    t = 2 * np.sqrt(3)
    assert (found.mean, found.n) == (2.0, 3)
    assert found.p == pytest.approx(1 - t / np.sqrt(t**2 + 2))


def test_paired_difference_where_the_t_test_has_no_answer():
    none = metrics.paired_difference(np.array([]), np.array([]))
    assert none.n == 0
    assert np.isnan([none.mean, none.low, none.high, none.p]).all()
    one = metrics.paired_difference(np.array([3.0]), np.array([1.0]))
    assert (one.mean, one.n) == (2.0, 1)
    assert np.isnan([one.low, one.high, one.p]).all()
    a = np.array([0.1, 0.5, 0.7])
    assert metrics.paired_difference(a, a) == (0, 0, 0, 1, 3)
    same = metrics.paired_difference(a + 0.2, a)
    assert same[:3] == pytest.approx((0.2, 0.2, 0.2))
    assert (same.p, same.n) == (0, 3)


def test_paired_difference_leaves_out_pairs_with_nan():
    a, b = np.array([2.0, np.nan, 4.0, 6.0, 9.0]), np.array([1.0, 5.0, 2.0, 3.0, np.nan])
    assert metrics.paired_difference(a, b) == metrics.paired_difference(a[[0, 2, 3]], b[[0, 2, 3]])


def test_paired_difference_refuses_lists_of_two_lengths():
    with pytest.raises(Exception, match=r"equal length|[Tt]ype-check"):
        metrics.paired_difference(np.zeros(3), np.zeros(1))


def test_bootstrap_interval_is_near_the_normal_one():
    values = np.random.default_rng(5).normal(0.6, 0.1, 400)
    low, high = metrics.bootstrap_interval(values)
    error = values.std() / np.sqrt(len(values))
    assert (low, high) == (
        pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error),
        pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error),
    )
    narrow = metrics.bootstrap_interval(values, level=0.5)
    assert low < narrow.low < values.mean() < narrow.high < high


def test_bootstrap_interval_repeats_and_is_defined():
    values = np.append(np.random.default_rng(0).random(30), np.nan)
    assert metrics.bootstrap_interval(values, seed=1) == metrics.bootstrap_interval(values[:30], seed=1)
    assert metrics.bootstrap_interval(values, seed=1, draws=50) != metrics.bootstrap_interval(values, seed=2, draws=50)
    assert metrics.bootstrap_interval(np.array([0.3, 0.3])) == pytest.approx((0.3, 0.3))
    assert np.isnan(metrics.bootstrap_interval(np.array([0.3]))).all()
    assert np.isnan(metrics.bootstrap_interval(np.array([]))).all()
