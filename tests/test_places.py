"""Places and coordinates lead to each other in any exam, and what an exam does not hold has no place in it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from deepatlas import grid
from deepatlas.checkpoint import MARGIN, Model
from deepatlas.places import (
    carry,
    confidence,
    from_atlas,
    in_patient,
    nearest_rotation,
    robust_affine,
    to_atlas,
)
from deepatlas.volume import Volume, apply, reorder
from exact import (
    CENTRE,
    FRAME,
    RADII,
    affine_of,
    bent,
    blank,
    coordinates,
    exact,
    in_body,
    moved_by,
    rotated,
    scan,
    unbent,
    unmoved,
)

SHIFT = np.array([12.0, -7.0, 20.0])
SHIFTED = affine_of(np.eye(3), SHIFT)
TURNED = affine_of(rotated((12, -9, 15)) * 1.1, SHIFT)


@pytest.fixture(scope="module")
def model() -> Model:
    """A model that knows nothing by name."""
    return blank()


def left_handed(exam: Volume) -> Volume:
    """The same exam, stored with its axes permuted and one of them reversed."""
    stored = reorder(exam, (2, 0, 1), (False, True, False))
    assert np.linalg.det(stored.affine) < 0
    return stored


EXAMS = {
    "upright": ((4, 4, 4), (0, 0, 0), lambda exam: exam),
    "turned, anisotropic": ((2.5, 4, 6), (20, -15, 30), lambda exam: exam),
    "left-handed": ((5, 4, 3), (-10, 5, 20), left_handed),
}


def any_exam(how: str, **more) -> Volume:
    spacing, degrees, stored = EXAMS[how]
    return stored(scan(spacing, degrees, **more)[0])


def within(exam: Volume, body=unmoved, count: int = 400, depth_mm: float = 15.0) -> np.ndarray:
    """Places in the patient and well within an exam."""
    voxels = np.random.default_rng(1).uniform(0.06, 0.94, (8 * count, 3)) * (np.array(exam.shape) - 1)
    places = apply(exam.affine, voxels)
    return places[in_body(places, body, depth_mm)][:count]


@pytest.mark.parametrize("how", EXAMS)
def test_a_place_has_the_coordinate_of_its_anatomy_and_leads_back(model, how):
    exam = any_exam(how, body=moved_by(TURNED))
    seen = exact(model, exam, body=moved_by(TURNED))
    points = within(exam, moved_by(TURNED))
    assert len(points) == 400
    c, inside = to_atlas(seen, points)
    assert inside.all()
    np.testing.assert_allclose(c[0].T, coordinates(points, moved_by(TURNED)), atol=1e-5)
    back = from_atlas(seen, c)
    assert back.valid.all()
    np.testing.assert_allclose(back.points_mm, points, atol=0.02)


@pytest.mark.parametrize("how", EXAMS)
def test_a_bent_map_is_undone(model, how):
    exam = any_exam(how, body=bent)
    seen = exact(model, exam, body=bent)
    points = within(exam, bent)
    c, _ = to_atlas(seen, points)
    back = from_atlas(seen, c)
    assert back.valid.all()
    assert np.linalg.norm(back.points_mm - points, axis=1).max() < 0.05
    again, _ = to_atlas(seen, back.points_mm)
    np.testing.assert_allclose(again, c, atol=2e-4)


@pytest.mark.parametrize("how", EXAMS)
def test_what_lies_beyond_an_exam_or_nowhere_is_outside(model, how):
    exam = any_exam(how)
    seen = exact(model, exam)
    last = np.array(exam.shape) - 1.0
    middle = last / 2
    faces = [np.where(np.arange(3) == axis, end, middle) for axis in range(3) for end in (0.0, last[axis])]
    outwards = np.sign(faces - middle)
    step = (last + 1) / model.size
    beyond, before = (apply(exam.affine, faces + outwards * step * sign) for sign in (1, -1))
    assert to_atlas(seen, before)[1].all()
    c, inside = to_atlas(seen, beyond)
    assert not inside.any()
    assert torch.isfinite(c).all()
    _, known = to_atlas(seen, np.array([[np.nan, 0, 0], CENTRE]))
    assert known.tolist() == [False, True]


def test_a_coordinate_beyond_the_scan_or_in_air_has_no_place(model):
    exam, _ = scan((4, 4, 4), high=(130, 80, 60))
    seen = exact(model, exam)
    wanted = np.array([[20, 0, 40], [20, 0, 80], [20, 0, 100], FRAME[:3, 3] - 0.95 * RADII * [1, 1, 0], [20, 0, 0]])
    places = from_atlas(seen, torch.from_numpy(coordinates(wanted).T.astype(np.float32))[None])
    assert places.valid.tolist() == [True, False, False, False, True]
    np.testing.assert_allclose(places.points_mm[[0, 4]], wanted[[0, 4]], atol=0.02)
    nowhere = from_atlas(seen, torch.full((1, 3, 1), torch.nan))
    assert not nowhere.valid.any()


def test_what_lies_in_the_patient(model):
    exam = any_exam("left-handed")
    points = np.random.default_rng(0).uniform(-160, 180, (4000, 3))
    index = apply(exam.inverse, points)
    clear = 12.0  # a prepared voxel
    step = clear / exam.spacing_mm
    deep = ((index > step) & (index < np.array(exam.shape) - 1 - step)).all(axis=1) & in_body(points, depth_mm=clear)
    beyond = ((index < -1) | (index > np.array(exam.shape))).any(axis=1) | ~in_body(points, depth_mm=-2 * clear)
    found = in_patient(exact(model, exam), points)
    assert deep.sum() > 300
    assert beyond.sum() > 300
    assert found[deep].all()
    assert not found[beyond].any()


@pytest.mark.parametrize("source", EXAMS)
@pytest.mark.parametrize("target", EXAMS)
def test_points_are_carried_to_where_the_same_anatomy_lies(model, source, target):
    one = any_exam(source, body=moved_by(SHIFTED))
    other = any_exam(target, body=moved_by(TURNED), high=(130, 80, 70))
    points = within(one, moved_by(SHIFTED))
    truth = apply(np.linalg.inv(TURNED) @ SHIFTED, points)
    found = carry(exact(model, one, body=moved_by(SHIFTED)), exact(model, other, body=moved_by(TURNED)), points)
    index = apply(other.inverse, truth) / (np.array(other.shape) - 1)
    clear = 1.5 / model.size
    well_in, well_out = ((index > clear) & (index < 1 - clear)).all(axis=1), ((index < 0) | (index > 1)).any(axis=1)
    assert well_in.sum() > 80
    assert well_out.sum() > 30
    assert found.valid[well_in].all()
    assert not found.valid[well_out].any()
    off = np.linalg.norm(found.points_mm - truth, axis=1)
    assert off[well_in].max() < 0.05
    assert off[found.valid].max() < 0.1 * (other.spacing_mm * other.shape).max() / model.size  # held by a face


def test_the_way_there_is_not_the_way_back(model):
    one, other = scan((4, 3, 5))[0], scan((3, 4, 4), (5, 5, 5), body=moved_by(SHIFTED))[0]
    here, there = exact(model, one), exact(model, other, body=moved_by(SHIFTED))
    point = CENTRE[None]
    np.testing.assert_allclose(carry(here, there, point).points_mm, point - SHIFT, atol=0.02)
    np.testing.assert_allclose(carry(there, here, point).points_mm, point + SHIFT, atol=0.02)


def test_a_bend_between_two_exams_is_followed_both_ways(model):
    one, other = any_exam("turned, anisotropic"), any_exam("left-handed", body=bent)
    here, there = exact(model, one), exact(model, other, body=bent)
    for source, target, exam, truth in ((here, there, one, unbent), (there, here, other, bent)):
        points = within(exam, depth_mm=25.0)
        expected = truth(points)
        found = carry(source, target, points)
        assert found.valid.mean() > 0.8  # their turned fields of view differ at the corners
        off = np.linalg.norm(found.points_mm - expected, axis=1)[found.valid]
        assert np.linalg.norm(expected - points, axis=1).mean() > 5
        assert off.max() < 0.5  # linear interpolation: 3 · h² / 8 · |u''| = 0.3 mm at most on nodes 10 mm apart


def test_a_point_outside_of_its_own_exam_is_not_carried(model):
    small, _ = scan((4, 4, 4), high=(130, 80, 20))
    large, _ = scan((4, 4, 4))
    points = np.array([CENTRE, [20, 0, 0], [np.nan, 0, 0]])
    found = carry(exact(model, small), exact(model, large), points)
    assert found.valid.tolist() == [False, True, False]
    assert carry(exact(model, large), exact(model, large), points).valid.tolist() == [True, True, False]


def test_confidence_falls_at_the_places_where_the_exam_does_not_look_like_the_atlas(model):
    exam, places = scan((4, 3, 5), (10, -5, 8))
    clean = exact(model, exam)
    image = torch.from_numpy(clean.prepared.image)[None, None]
    nodes = grid.identity((40,) * 3, torch.float64).flatten(2)[0].T.numpy() / MARGIN
    to_box = np.linalg.inv(clean.prepared.box_to_mm) @ FRAME
    where = torch.from_numpy(apply(to_box, nodes).T.reshape(1, 3, 40, 40, 40)).float()
    alike = replace(model, atlas=grid.sample(image, where) * grid.inside(where))
    blocks = np.random.default_rng(0).integers(-250, 250, (20, 20, 20))
    chequered = blocks[tuple(np.moveaxis(places // 35, -1, 0).astype(int))]
    spoiled = np.where((places[..., 2] > 40) & (exam.array > -900), chequered, exam.array).astype(np.int16)
    points = within(exam, depth_mm=30.0)
    before, after = (confidence(alike, seen, points) for seen in (clean, exact(model, Volume(spoiled, exam.affine))))
    below, above = points[:, 2] < 0, points[:, 2] > 60
    assert min(below.sum(), above.sum()) > 50
    assert ((after >= 0) & (after <= 1)).all()
    assert before.min() > 0.75
    lost = before - after
    assert np.abs(lost[below]).mean() < 0.06  # the features' normalisation spans the exam
    assert lost[above].mean() > 0.2


POINTS = np.random.default_rng(2).uniform(-80, 80, (300, 3))
ANY = affine_of(np.array([[1.1, 0.2, -0.1], [-0.3, 0.8, 0.05], [0.1, -0.2, 1.3]]), (5, -9, 40))


def test_an_affine_map_is_recovered():
    np.testing.assert_allclose(robust_affine(POINTS, apply(ANY, POINTS)), ANY, atol=2e-4)


@pytest.mark.parametrize("scattered", [True, False])
def test_a_fifth_of_gross_errors_counts_for_nothing(scattered):
    chance = np.random.default_rng(3)
    target = apply(ANY, POINTS)
    wrong = chance.permutation(len(POINTS))[: len(POINTS) // 5]
    target[wrong] += chance.uniform(-300, 300, (len(wrong), 3)) if scattered else np.array([200.0, 0, -100.0])
    assert np.abs(apply(robust_affine(POINTS, target), POINTS) - apply(ANY, POINTS)).max() < 0.01


def test_noise_is_averaged_out():
    noise = np.random.default_rng(4).normal(0, 2.0, POINTS.shape)
    off = apply(robust_affine(POINTS, apply(ANY, POINTS) + noise), POINTS) - apply(ANY, POINTS)
    assert np.sqrt((off**2).mean()) < 2.0 * 1.3 * np.sqrt(4 / len(POINTS))


def test_where_points_say_nothing_the_expectation_decides():
    one = robust_affine(POINTS[:1], POINTS[:1] + 5, expected=2 * np.eye(3))
    np.testing.assert_allclose(one[:3, :3], 2 * np.eye(3), atol=1e-9)
    np.testing.assert_allclose(apply(one, POINTS[:1]), POINTS[:1] + 5)
    layer = POINTS * [1, 1, 0]
    turned = rotated((0, 0, 40))
    found = robust_affine(layer, apply(affine_of(turned, (3, 4, 5)), layer), expected=np.diag([1.0, 1.0, 3.0]))
    np.testing.assert_allclose(found[:3, :2], turned[:, :2], atol=1e-3)
    np.testing.assert_allclose(found[:3, 2], [0, 0, 3], atol=1e-9)


LINEAR = {
    "stretched": ANY[:3, :3],
    "mirrored": np.diag([1.0, -1.2, 0.9]) @ rotated((10, 20, 30)),
    "point-mirrored": -rotated((5, 50, -20)) * [1.0, 1.1, 1.3],
    "small": 0.01 * ANY[:3, :3],
}


@pytest.mark.parametrize("name", LINEAR)
def test_the_nearest_rotation_is_proper_and_none_is_nearer(name):
    linear = LINEAR[name]
    found = nearest_rotation(linear)
    np.testing.assert_allclose(found.T @ found, np.eye(3), atol=1e-12)
    assert np.linalg.det(found) == pytest.approx(1.0)
    chance = np.random.default_rng(5)
    others = [rotated(angles) for angles in chance.uniform(-180, 180, (300, 3))]
    others += [found @ rotated(angles) for angles in chance.normal(0, 1, (300, 3))]
    least = np.linalg.norm(found - linear)
    assert min(np.linalg.norm(other - linear) for other in others) > least
    scaled = nearest_rotation(linear, scaled=True)
    others = [found * scale * np.cbrt(abs(np.linalg.det(linear))) for scale in np.linspace(0, 2, 400)]
    assert np.linalg.norm(scaled - linear) <= min(np.linalg.norm(other - linear) for other in others)


@pytest.mark.parametrize("scale", [0.3, 1.0, 1.7])
def test_a_rotation_and_its_scale_are_told(scale):
    turn = rotated((30, -70, 110))
    np.testing.assert_allclose(nearest_rotation(scale * turn), turn, atol=1e-12)
    np.testing.assert_allclose(nearest_rotation(scale * turn, scaled=True), scale * turn, atol=1e-12)
