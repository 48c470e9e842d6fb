"""Two exams of one patient lie on each other, turned, bent, and where their fields of view differ."""

import json
from functools import cache

import numpy as np
import pytest

from deepatlas import files
from deepatlas.embedding import Embedded
from deepatlas.errors import ExamError
from deepatlas.prepare import AIR_HU, prepare
from deepatlas.register import (
    KINDS,
    Registration,
    describe,
    matches,
    overlap_points,
    register,
)
from deepatlas.transforms import displacement, inverse_consistency_mm, itk_transform, moved
from deepatlas.volume import Volume, apply, reorder
from exact import (
    CENTRE,
    FRAME,
    OTHER,
    affine_of,
    balls,
    bent,
    blank,
    dice,
    exact,
    in_body,
    moved_by,
    places_of,
    rotated,
    scan,
    texture,
    unbent,
    unmoved,
)

MODEL = blank()
TURN = rotated((8, -6, 12))


def about_the_middle(linear: np.ndarray, shift) -> np.ndarray:
    """A linear map about the middle of the patient, then a shift, (4, 4)."""
    middle = FRAME[:3, 3]
    return affine_of(linear, middle + shift - linear @ middle)


POSES = {
    "rigid": about_the_middle(TURN, (9, -4, 14)),
    "similarity": about_the_middle(0.92 * TURN, (9, -4, 14)),
    "affine": about_the_middle(TURN @ np.array([[0.9, 0.1, 0], [0, 1.05, -0.08], [0.05, 0, 0.95]]), (9, -4, 14)),
}


OTHERWISE = {"spacing": (3, 5, 4), "degrees": (5, 10, -15)}


def pair(body, spacing=(4, 3, 5), degrees=(0, 0, 0), moving=None) -> tuple[Volume, Embedded, Volume, Embedded]:
    """A fixed exam in which the patient is posed by ``body``, and a moving one of the seed exam's patient: the true
    map from fixed to moving is ``body`` itself."""
    fixed, _ = scan(spacing, degrees, body=body)
    other, _ = scan(**(moving or OTHERWISE))
    return fixed, exact(MODEL, fixed, body=body), other, exact(MODEL, other)


@cache
def bent_pair() -> tuple[Volume, Embedded, Volume, Embedded, Registration]:
    """The same, bent, and registered."""
    exams = pair(bent, degrees=(-10, 5, 8))
    return *exams, register(exams[1], exams[3])


def common(fixed: Volume, moving: Volume, body, depth_mm: float = 25.0) -> np.ndarray:
    """Which voxels of the fixed exam lie deep in the patient and well in both fields of view."""
    places = places_of(fixed.shape, fixed.affine)
    inner = in_body(places, body, depth_mm)
    for exam, where in ((fixed, places), (moving, body(places))):
        index = apply(exam.inverse, where) / (np.array(exam.shape) - 1)
        inner &= ((index > 0.08) & (index < 0.92)).all(axis=-1)
    return inner


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("degrees", [(0, 0, 0), (-20, 15, 30)])
def test_a_linear_map_is_recovered(kind, degrees):
    body = moved_by(POSES[kind])
    fixed, here, moving, there = pair(body, degrees=degrees)
    found = register(here, there, kind, deformable=False)
    points = places_of(fixed.shape, fixed.affine)[common(fixed, moving, body)]
    np.testing.assert_allclose(apply(found.linear, points), apply(POSES[kind], points), atol=0.05)
    np.testing.assert_allclose(found.linear[:3, :3], POSES[kind][:3, :3], atol=1e-3)
    np.testing.assert_allclose(found.points(points), apply(POSES[kind], points), atol=0.05)
    assert not found.shift_mm.any()
    assert found.residual_mm < 0.02
    assert found.folded == 0.0


def test_the_map_leads_from_the_fixed_exam_to_the_moving_one():
    _, here, _, there = pair(moved_by(POSES["rigid"]))
    onward, backward = register(here, there), register(there, here)
    point = CENTRE[None]
    np.testing.assert_allclose(onward.points(point), apply(POSES["rigid"], point), atol=0.1)
    np.testing.assert_allclose(backward.points(point), apply(np.linalg.inv(POSES["rigid"]), point), atol=0.1)
    assert np.linalg.norm(onward.points(point) - backward.points(point)) > 20


@pytest.mark.parametrize("kind", ["rigid", "similarity"])
def test_a_simpler_map_than_the_true_one_keeps_the_turn_and_the_middle(kind):
    body = moved_by(POSES["similarity"])
    fixed, here, moving, there = pair(body)
    found = register(here, there, kind, deformable=False)
    np.testing.assert_allclose(found.linear[:3, :3], TURN * (0.92 if kind == "similarity" else 1.0), atol=1e-3)
    middle = overlap_points(here, there).mean(axis=0)
    np.testing.assert_allclose(apply(found.linear, middle), apply(POSES["similarity"], middle), atol=0.05)
    if kind == "rigid":
        whole = register(here, there, kind)  # the deformation adds what the linear map lacks
        points = places_of(fixed.shape, fixed.affine)[common(fixed, moving, body)]
        assert np.linalg.norm(apply(found.linear, points) - body(points), axis=1).mean() > 2
        assert np.linalg.norm(whole.points(points) - body(points), axis=1).max() < 0.3


def test_another_kind_is_refused():
    _, here, _, there = pair(unmoved)
    with pytest.raises(ExamError, match="rigid, similarity, affine, got 'spline'"):
        register(here, there, "spline")


def test_the_deformation_is_the_true_one():
    fixed, _, moving, _, found = bent_pair()
    inner = common(fixed, moving, bent)
    points = places_of(fixed.shape, fixed.affine)[inner]
    off = np.linalg.norm(found.points(points) - bent(points), axis=1)
    assert off.max() < 0.7  # of 10 mm, from nodes 10 mm apart: 3 · h² / 8 · |u''| = 0.3 mm, for either map
    assert off.mean() < 0.25
    assert np.linalg.norm(bent(points) - points, axis=1).mean() > 5
    field = displacement(found, fixed)
    assert field.shape == (*fixed.shape, 1, 3)
    assert field.dtype == np.float32
    lps = (bent(points) - points) * [-1, -1, 1]
    assert np.linalg.norm(field[inner][:, 0] - lps, axis=1).mean() < 0.25
    assert found.folded == 0.0
    assert 1 < found.residual_mm < 12


def test_the_moved_image_and_labels_lie_on_the_fixed_ones():
    fixed, _, moving, _, found = bent_pair()
    inner = common(fixed, moving, bent)
    places = places_of(fixed.shape, fixed.affine)
    image = moved(found, fixed, moving)
    assert image.shape == fixed.shape
    assert image.dtype == np.float32
    off = np.abs(image - fixed.array)[inner]
    before = np.abs(texture(places) - fixed.array)[inner]
    assert off.mean() < 0.15 * before.mean()
    drawn = Volume(balls(places_of(moving.shape, moving.affine), CENTRE, OTHER).astype(np.uint16) * 500, moving.affine)
    labels = moved(found, fixed, drawn, labels=True)
    assert labels.dtype == np.uint16
    assert set(np.unique(labels)) == {0, 500, 1000}
    truth = balls(bent(places), CENTRE, OTHER)
    for number in (1, 2):
        assert dice(labels == 500 * number, truth == number) > 0.92
        assert dice(balls(places, CENTRE, OTHER) == number, truth == number) < 0.9


def test_beyond_the_moving_exam_there_is_air_and_no_label():
    fixed, here, moving, there = pair(unmoved, moving=OTHERWISE | {"high": (130, 80, 60)})
    found = register(here, there, deformable=False)
    places = places_of(fixed.shape, fixed.affine)
    index = apply(moving.inverse, places)
    beyond = ((index < -0.6) | (index > np.array(moving.shape) - 0.4)).any(axis=-1)
    assert beyond.mean() > 0.2
    assert (moved(found, fixed, moving)[beyond] == AIR_HU).all()
    ones = Volume(np.ones(moving.shape, np.uint8), moving.affine)
    labels = moved(found, fixed, ones, labels=True)
    assert (labels[beyond] == 0).all()
    assert labels[((index > -0.4) & (index < np.array(moving.shape) - 0.6)).all(axis=-1)].all()


HALF = {"spacing": (4, 4, 4), "degrees": (0, 0, 0), "low": (-110, -120, FRAME[2, 3])}


def test_the_overlap_of_exams_that_share_half_their_length():
    _, here, _, there = pair(unmoved, spacing=(4, 4, 4), moving=HALF)
    found = register(here, there)
    assert found.overlap == pytest.approx(0.5, abs=0.04)  # the upper half of an ellipsoid
    assert register(there, here).overlap > 0.95
    points = overlap_points(here, there)
    assert len(points) == round(found.overlap * here.prepared.foreground.sum())
    assert points[:, 2].min() > FRAME[2, 3] - 2
    assert in_body(points, depth_mm=-20).all()
    phi, valid = matches(here, there)
    there_mm = apply(there.prepared.box_to_mm, np.moveaxis(phi[0].double().numpy(), 0, -1))
    np.testing.assert_allclose(there_mm[valid], points, atol=1.2)  # nodes near a face may be 0.1 node off


def test_beyond_the_common_anatomy_the_deformation_fades_into_the_linear_map():
    fixed, here, _, there = pair(bent, spacing=(4, 4, 4), moving=HALF)
    found = register(here, there)
    points = places_of(fixed.shape, fixed.affine)
    points = points[in_body(points, bent, 20)]
    apart = np.linalg.norm(found.points(points) - apply(found.linear, points), axis=1)
    shared, far = bent(points)[:, 2] > FRAME[2, 3] + 20, bent(points)[:, 2] < FRAME[2, 3] - 80
    assert apart[shared].mean() > 2
    assert apart[far].max() < 0.05
    steps = np.abs(np.diff(found.shift_mm, axis=3)).max()
    assert steps < 8  # no cliff of the whole displacement between two nodes


def test_exams_with_nothing_in_common_are_refused():
    _, here, _, there = pair(unmoved, spacing=(4, 4, 4), moving=HALF)
    below, _ = scan((4, 4, 4), high=(130, 80, FRAME[2, 3] - 30))
    with pytest.raises(ExamError, match=r"0 of \d+ voxels have a counterpart"):
        register(exact(MODEL, below), there)
    register(here, there)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [1, 2])
def test_exams_that_share_a_thin_layer_are_refused_or_keep_their_size(kind, layers):
    fixed, _ = scan((4, 4, 4), low=(-110, -120, FRAME[2, 3]))
    here = exact(MODEL, fixed)
    heights = apply(here.prepared.box_to_mm, np.array([[0, 0, -1 + 2 * k / 23] for k in range(3)]))[:, 2]
    top = (heights[layers - 1] + heights[layers]) / 2
    moving, _ = scan((4, 4, 4), low=(-110, -120, top - 160), high=(130, 80, top))
    there = exact(MODEL, moving)
    assert matches(here, there)[1].any(axis=(0, 1)).sum() == layers
    try:
        found = register(here, there, kind)
    except ExamError:
        return
    np.testing.assert_allclose(found.linear[:3, :3], np.eye(3), atol=0.02)
    assert found.folded == 0.0


def wavy(reach_mm: float, wave_mm: float = 100.0):
    """A body pushed to and fro along z; it folds where the push exceeds the wave."""

    def body(places: np.ndarray) -> np.ndarray:
        push = reach_mm * np.sin(2 * np.pi * places[..., 2] / wave_mm)
        return places + np.stack([0 * push, 0 * push, push], axis=-1)

    return body


@pytest.mark.parametrize("slope", [0.0, 0.6, 1.8, 3.0])
def test_the_folded_share_is_that_of_the_map(slope):
    fixed, here, _, there = pair(unmoved, spacing=(4, 4, 4), degrees=(0, 0, 0))
    here = exact(MODEL, fixed, body=wavy(slope * 100 / (2 * np.pi)))
    found = register(here, there)
    points = overlap_points(here, there)
    step = np.linalg.norm(found.to_mm[:3, 2])
    damped = slope * np.sinc(2 * step / 100)  # by differences over two nodes
    truth = (1 + damped * np.cos(2 * np.pi * points[:, 2] / 100) <= 0).mean()
    assert found.folded == pytest.approx(truth, abs=0.04)
    assert (found.folded > 0.1) == (slope > 1)


def test_there_and_back_leads_home():
    fixed, here, moving, there, onward = bent_pair()
    backward = register(there, here)
    points = places_of(fixed.shape, fixed.affine)[common(fixed, moving, bent)]
    apart = inverse_consistency_mm(onward, backward, points)
    assert apart.max() < 0.8
    assert np.median(apart) < 0.2
    back = backward.points(points)
    assert np.linalg.norm(back - unbent(points), axis=1).mean() < 0.3


def linear_only(matrix: np.ndarray) -> Registration:
    """A registration that is nothing but a linear map."""
    return Registration(matrix, np.zeros((3, 4, 4, 4), np.float32), np.eye(4), 1.0, 0.0, 0.0)


def test_inverse_consistency_is_the_distance_from_home():
    points = np.random.default_rng(0).uniform(-50, 50, (20, 3))
    first, second = POSES["affine"], POSES["rigid"]
    expected = np.linalg.norm(apply(second @ first, points) - points, axis=1)
    np.testing.assert_allclose(inverse_consistency_mm(linear_only(first), linear_only(second), points), expected)
    home = inverse_consistency_mm(linear_only(first), linear_only(np.linalg.inv(first)), points)
    np.testing.assert_allclose(home, 0, atol=1e-9)


@pytest.mark.parametrize("deformable", [True, False])
def test_the_report_is_json_and_says_what_was_found(deformable):
    _, here, _, there, _ = bent_pair()
    found = register(here, there, "rigid", deformable)
    back = register(there, here, "rigid", deformable)
    about = json.loads(json.dumps(describe(found, back, here, there, ("a", "b"))))
    assert (about["fixed"], about["moving"]) == ("a", "b")
    assert about["deformable"] is deformable
    np.testing.assert_allclose(about["matrix_ras_mm"], found.linear, atol=1e-6)
    assert about["overlap"] == pytest.approx(found.overlap, abs=1e-4)
    apart = about["inverse_consistency_mm"]
    backward = register(there, here, "rigid", deformable)
    truth = inverse_consistency_mm(found, backward, overlap_points(here, there))
    assert apart["median"] == pytest.approx(np.median(truth), abs=1e-3)
    assert apart["median"] <= apart["p95"] < 5


STORED = {
    "oblique": lambda exam: exam,
    "left-handed": lambda exam: reorder(exam, (0, 1, 2), (False, True, False)),
    "permuted": lambda exam: reorder(exam, (2, 0, 1), (True, False, False)),
}


@pytest.mark.parametrize("fixed_stored", STORED)
@pytest.mark.parametrize("moving_stored", ["oblique", "left-handed"])
def test_itk_makes_the_same_image_of_the_written_transforms(fixed_stored, moving_stored, tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    body = lambda places: apply(POSES["rigid"], bent(places))  # noqa: E731
    fixed = STORED[fixed_stored](scan((5, 6, 7), (-10, 5, 8), body=body)[0])
    moving = STORED[moving_stored](scan((6, 5, 6), (5, 10, -15))[0])
    here, there = exact(MODEL, fixed, body=body), exact(MODEL, moving)
    like = files.as_exam(fixed)
    files.write_image(tmp_path / "fixed.nii", fixed.array, like)
    files.write_image(tmp_path / "moving.nii", moving.array, files.as_exam(moving))
    images = [sitk.ReadImage(str(tmp_path / name), sitk.sitkFloat32) for name in ("fixed.nii", "moving.nii")]
    for deformable in (False, True):
        found = register(here, there, "similarity", deformable)
        if deformable:
            files.write_vectors(tmp_path / "displacement.nii.gz", displacement(found, fixed), like)
            field = sitk.ReadImage(str(tmp_path / "displacement.nii.gz"), sitk.sitkVectorFloat64)
            transform = sitk.DisplacementFieldTransform(field)
        else:
            (tmp_path / "linear.tfm").write_text(itk_transform(found.linear), encoding="utf-8")
            transform = sitk.ReadTransform(str(tmp_path / "linear.tfm"))
        theirs = sitk.Resample(images[1], images[0], transform, sitk.sitkLinear, AIR_HU)
        ours = moved(found, fixed, moving)
        off = np.abs(sitk.GetArrayFromImage(theirs).transpose(2, 1, 0) - ours)
        assert (ours > -500).mean() > 0.2
        assert off.max() < 0.05
    still = sitk.Resample(images[1], images[0], sitk.Transform(3, sitk.sitkIdentity), sitk.sitkLinear, AIR_HU)
    assert np.abs(sitk.GetArrayFromImage(still).transpose(2, 1, 0) - ours).mean() > 20


def test_refining_brings_the_images_closer():
    def off_by(places: np.ndarray) -> np.ndarray:
        return places + 7 * np.exp(-((places - FRAME[:3, 3]) ** 2).sum(axis=-1, keepdims=True) / 2 / 60**2) * [1, -1, 1]

    fixed, _, moving, there = pair(unmoved, spacing=(4, 4, 4))
    wrong = exact(MODEL, fixed, body=off_by)
    inner = common(fixed, moving, unmoved)
    points = places_of(fixed.shape, fixed.affine)[inner]
    images = tuple(prepare(exam, 48, "exam") for exam in (fixed, moving))
    rough, fine = (register(wrong, there, fine=one) for one in (None, images))
    apart = [np.abs(moved(found, fixed, moving) - fixed.array)[inner].mean() for found in (rough, fine)]
    error = [np.linalg.norm(found.points(points) - points, axis=1).mean() for found in (rough, fine)]
    assert error[0] == pytest.approx(np.linalg.norm(off_by(points) - points, axis=1).mean(), abs=0.5)
    assert apart[1] < 0.6 * apart[0]
    assert error[1] < 0.6 * error[0]
    assert fine.folded == 0.0
    assert fine.overlap == rough.overlap
