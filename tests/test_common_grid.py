"""The grid that images of one part of the body are brought to: where they lie on it, and what they have in common."""

import numpy as np
import pytest
import torch

from deepatlas import common_grid
from deepatlas.common_grid import Frame
from deepatlas.errors import ExamError, LabelError
from deepatlas.volume import Volume, apply, to_ras
from exact import places_of, rotated
from oblique import OFFSETS, STORED, TURNS, centre, off_middle, scan


def box_of(inside: np.ndarray) -> tuple[slice, ...]:
    """Where a mask lies."""
    return tuple(slice(where.min(), where.max() + 1) for where in np.nonzero(inside))


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("degrees", TURNS)
@pytest.mark.parametrize("spacing", [(2.0, 2, 2), (0.7, 1.2, 2.5)])
@pytest.mark.parametrize("shape", [(16, 16, 32), (15, 16, 9), (13, 11, 7)])
def test_an_image_of_the_frames_own_spacing_is_kept_voxel_for_voxel(shape, spacing, degrees, stored):
    volume = scan(shape, spacing, degrees, stored=stored)
    frame = common_grid.frame_for([volume], scaling="0:1")
    assert frame.shape == (16, 16, 32 if shape[2] == 32 else 16)
    found = common_grid.placed(volume, frame)
    where = box_of(found.inside)
    assert tuple(one.stop - one.start for one in where) == shape
    assert found.inside.sum() == np.prod(shape)
    np.testing.assert_allclose(found.image[where], to_ras(volume).array, atol=1e-5)
    assert not found.image[~found.inside].any()
    middles = [(one.start + one.stop - 1) / 2 for one in where]
    assert (np.abs(np.subtract(middles, (np.array(frame.shape) - 1) / 2)) <= 0.5).all()
    np.testing.assert_allclose(
        frame.points_mm(volume)[where], places_of(shape, to_ras(volume).affine), atol=1e-3 * max(spacing)
    )


@pytest.mark.parametrize("stated", [0.7, 1.2, 0.9765625, 0.35])
def test_a_spacing_as_a_file_holds_it_is_the_frames_own(stated):
    """NIfTI holds spacings as float32, which lie a little beside the number that was meant."""
    spacing = (float(np.float32(stated)), 1.5, 3.0)
    volume = scan((16, 16, 16), spacing)
    found = common_grid.placed(volume, common_grid.frame_for([volume], scaling="0:1"))
    assert found.inside.all()
    np.testing.assert_allclose(found.image, volume.array, atol=1e-5)


@pytest.mark.parametrize("spacing", [None, 1.7, 3.1])
@pytest.mark.parametrize("degrees", TURNS)
@pytest.mark.parametrize("shape", [(16, 14, 12), (15, 13, 9), (16, 13, 12)])
def test_the_storage_order_of_an_image_changes_nothing(shape, degrees, spacing):
    first = None
    for stored in STORED:
        volume = scan(shape, (1.3, 2.1, 1.7), degrees, stored=stored)
        frame = common_grid.frame_for([volume], spacing)
        found, points = common_grid.placed(volume, frame), frame.points_mm(volume)
        if first is None:
            first = (frame, found, points)
        assert frame == first[0]
        np.testing.assert_allclose(points, first[2], atol=1e-6)
        np.testing.assert_array_equal(found.inside, first[1].inside)
        np.testing.assert_allclose(found.image, first[1].image, atol=1e-4)


@pytest.mark.parametrize("degrees", TURNS)
def test_a_frame_lies_middle_on_middle_along_the_axes_of_the_image(degrees):
    volume, frame = scan((15, 12, 9), (1.3, 2.1, 4.0), degrees, stored="ILA"), Frame((32, 16, 48), (2.0, 3.0, 1.1))
    points = frame.points_mm(volume)
    np.testing.assert_allclose(points.mean(axis=(0, 1, 2)), centre(volume), atol=1e-6)
    for axis in range(3):
        step = np.diff(points, axis=axis).reshape(-1, 3)
        expected = rotated(degrees)[:, axis] * frame.spacing_mm[axis]
        np.testing.assert_allclose(step, np.broadcast_to(expected, step.shape), atol=1e-6)
    np.testing.assert_allclose(apply(frame.to_mm(volume), np.indices(frame.shape).reshape(3, -1).T[[0, 5, 700]]),
                               points.reshape(-1, 3)[[0, 5, 700]], atol=1e-9)  # fmt: skip


@pytest.mark.parametrize("stored", ["RAS", "ILA"])
@pytest.mark.parametrize("degrees", TURNS)
def test_on_a_coarser_frame_a_ramp_stays_and_what_it_cannot_hold_is_blurred(degrees, stored):
    shape, spacing = (34, 28, 24), np.array([1.0, 1.5, 2.0])
    frame = Frame((16, 16, 32), (3.0, 4.5, 2.0), "0:1")  # nodes lie on voxels, two of three are left out along i and j
    empty = scan(shape, spacing, degrees, stored=stored)
    slope = np.array([0.004, -0.006, 0.005])
    ramp = 0.5 + (places_of(empty.shape, empty.affine) - centre(empty)) @ slope
    found = common_grid.placed(Volume(ramp.astype(np.float32), empty.affine), frame)
    deep = tuple(slice(one.start + 2, one.stop - 2) for one in box_of(found.inside))
    expected = 0.5 + (frame.points_mm(empty) - centre(empty)) @ slope
    assert np.ptp(expected[deep]) > 0.1
    np.testing.assert_allclose(found.image[deep], expected[deep], atol=1e-3)
    board = np.indices(shape)[:2].sum(axis=0) % 2
    found = common_grid.placed(scan(shape, spacing, degrees, stored=stored, array=board), frame)
    assert np.abs(found.image[deep] - 0.5).max() < 0.05
    kept = np.indices(shape)[2] % 2  # along the axis whose spacing is the frame's own
    found = common_grid.placed(scan(shape, spacing, degrees, stored=stored, array=kept), frame)
    assert set(np.unique(found.image[deep].round(4))) == {0, 1}


def test_a_frame_holds_every_image_at_their_median_spacing_in_multiples_of_sixteen():
    volumes = [
        scan((30, 20, 10), (1.0, 1.0, 3.0), stored="SAR"),
        scan((20, 24, 12), (1.0, 2.0, 3.5)),
        scan((10, 10, 49), (1.5, 1.0, 0.5), stored="ILA"),
    ]
    frame = common_grid.frame_for(volumes)
    assert frame.spacing_mm == (1.0, 1.0, 3.0)
    assert frame.shape == (32, 48, 16)  # for 30, 48 and 42 mm
    assert frame.scaling == "percentile"
    for volume in volumes:
        index = apply(np.linalg.inv(frame.to_mm(volume)), volume.corners_mm())
        assert (index > -0.51).all()
        assert (index < np.array(frame.shape) - 0.49).all()
    asked = common_grid.frame_for(volumes, 2.0, "0:50")
    assert asked == Frame((16, 32, 32), (2.0, 2.0, 2.0), "0:50")


def test_a_large_image_is_brought_to_a_grid_that_can_be_afforded_unless_a_spacing_is_asked_for():
    volume = Volume(np.zeros((300, 20, 20), np.uint8), np.diag([0.5, 1, 1, 1]))
    frame = common_grid.frame_for([volume])
    assert frame.shape == (128, 32, 32)
    assert frame.spacing_mm == pytest.approx((150 / 128, 1, 1), abs=1e-5)
    assert common_grid.frame_for([volume], 0.5).shape == (304, 48, 48)


def test_intensities_are_scaled_by_percentiles_above_the_least_or_between_two_limits():
    values = np.full((16, 16, 16), -5.0, np.float32)
    values.flat[1000:1101] = np.arange(101) + 100  # 1st and 99th: 101 and 199
    volume = Volume(values, np.eye(4))
    expected = np.clip((values - 101) / 98, 0, 1)
    np.testing.assert_allclose(common_grid.placed(volume, Frame((16,) * 3, (1.0,) * 3)).image, expected, atol=1e-5)
    limited = common_grid.placed(volume, Frame((16,) * 3, (1.0,) * 3, "-105:195")).image
    np.testing.assert_allclose(limited, np.clip((values + 105) / 300, 0, 1), atol=1e-5)


def test_an_image_of_two_values_keeps_them_apart():
    values = np.zeros((16, 16, 16), np.float32)
    values[4:9, 3:12, 5:9] = 1000
    found = common_grid.placed(Volume(values, np.eye(4)), Frame((16,) * 3, (1.0,) * 3)).image
    np.testing.assert_allclose(found, values / 1000, atol=1e-5)


@pytest.mark.parametrize("scaling", ["", "low", "5", "5:1", "3:3", "1:2:3", "a:b", "nan:1"])
def test_a_scaling_that_cannot_be_read_is_refused(scaling):
    with pytest.raises(ExamError, match="LOW:HIGH"):
        common_grid.frame_for([scan((16, 16, 16), (1.0, 1, 1))], scaling=scaling)


@pytest.mark.parametrize("stored", STORED)
def test_labels_lie_where_their_image_lies(stored):
    shape, degrees = (15, 13, 10), (12, -20, 15)
    drawn = np.random.default_rng(1).choice([0, 3, 9, 17], shape)
    image = scan(shape, (0.7, 1.2, 2.5), degrees)
    other = scan(shape, (0.7, 1.2, 2.5), degrees, stored=stored, array=drawn)
    labels = Volume(other.array.astype(np.uint16), other.affine)
    frame = common_grid.frame_for([image], scaling="0:1")
    cases = common_grid.cases_of({"a": image, "b": image}, {"b": labels}, frame, (17, 3))
    assert (cases.names, cases.classes, cases.labelled.tolist()) == (["a", "b"], 2, [False, True])
    assert cases.image.shape == cases.inside.shape == (2, 1, 16, 16, 16)
    assert not cases.labels[0].any()
    where = box_of(cases.inside[1, 0].numpy())
    expected = 2 * (drawn == 3) + (drawn == 17)  # in the order of the numbers; 9 is none of them
    np.testing.assert_array_equal(cases.labels[1].numpy()[where], expected)
    np.testing.assert_array_equal(cases.image[1, 0].numpy(), common_grid.placed(image, frame).image)
    with pytest.raises(LabelError, match=r"b hold none of 4, 5"):
        common_grid.cases_of({"b": image}, {"b": labels}, frame, (4, 5))


def test_more_classes_than_fit_into_a_byte_are_refused():
    numbers = np.arange(16**3).reshape((16,) * 3)
    image, frame = scan((16,) * 3, (1.0, 1, 1)), Frame((16,) * 3, (1.0,) * 3)
    labels = {"a": Volume(numbers.astype(np.uint16), image.affine)}
    most = common_grid.cases_of({"a": image}, labels, frame, tuple(range(1, 256)))
    assert most.labels.unique().tolist() == list(range(256))
    with pytest.raises(LabelError, match="at most 255 classes, got 256"):
        common_grid.cases_of({"a": image}, labels, frame, tuple(range(1, 257)))


def test_labels_may_be_set_aside():
    image, frame = scan((16,) * 3, (1.0, 1, 1)), Frame((16,) * 3, (1.0,) * 3)
    ones = Volume(np.ones((16,) * 3, np.uint8), image.affine)
    cases = common_grid.cases_of(dict.fromkeys("abcd", image), {"a": ones, "c": ones, "d": ones}, frame, (1,))
    some = cases.picked([3, 1, 0], labelled=[0, 1])
    assert (some.names, some.labelled.tolist()) == (["d", "b", "a"], [False, False, True])
    assert cases.picked([2, 1]).labelled.tolist() == [True, False]
    assert cases.labelled.tolist() == [True, False, True, True]


def test_cases_are_laid_together_wherever_they_were_cut():
    parts = [off_middle(number, offset) for number, offset in enumerate(OFFSETS)]
    images, insides = (torch.from_numpy(np.stack([one[part] for one in parts]))[:, None] for part in (0, 1))
    labels = (images[:, 0] > 0.5).to(torch.uint8)
    given = common_grid.Cases([str(n) for n in range(5)], images, insides, labels, torch.ones(5, dtype=torch.bool), 1)
    found, template = common_grid.laid_together(given)
    truth = found.labels.float()
    for other in range(1, 5):  # the same voxels, but for the noise
        same = 2 * (truth[0] * truth[other]).sum() / (truth[0].sum() + truth[other].sum())
        assert float(same) > 0.97
    assert not given.labels[0].equal(given.labels[3])  # and what was given stays as it was
    places = [template.nodes(images[n : n + 1], insides[n : n + 1]) for n in range(5)]
    apart = np.array(places) - np.array(places[0])
    np.testing.assert_array_equal(apart, np.array(OFFSETS) - np.array(OFFSETS[0]))
