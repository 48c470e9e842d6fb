"""Structures defined on one exam are found at the right mm in others, turned, anisotropic, cropped, stored anyhow.

The map is exact here: every exam gets the coordinates of one known frame. What is tested is all that stands around
the network.
"""

import sys
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch

from deepatlas import grid
from deepatlas.checkpoint import MARGIN, Model
from deepatlas.embedding import Likeness
from deepatlas.errors import ExamError, StructureError
from deepatlas.found import Found
from deepatlas.locate import ABSENT, PRESENT, define, locate, owners_reference
from deepatlas.tissue import BINS, PARTS
from deepatlas.volume import Volume, apply, reorder
from exact import CENTRE, FRAME, OTHER, RADIUS, balls, blank, dice, exact, scan


@pytest.fixture
def model(monkeypatch) -> Model:
    """A model that knows no structure yet; `embed` gives the true map."""
    monkeypatch.setattr(sys.modules["deepatlas.locate"], "embed", exact)
    return blank()


def defined(model: Model, names: dict[str, int] | None = None, **how) -> Model:
    """The model after one labelled exam."""
    exam, places = scan(**({"spacing": (4.0, 3.0, 5.0), "degrees": (5, -8, 12)} | how))
    return define(model, [(exam, Volume(balls(places, CENTRE, OTHER), exam.affine))], names or {"ball": 1})


def check(found: Found, exam: Volume, truth: np.ndarray, least: float = 0.9) -> None:
    """A ball that is wholly there, found where it is."""
    assert found.status == "present"
    assert found.coverage >= PRESENT
    assert found.mask.shape == exam.shape
    assert found.mask.dtype == bool
    assert dice(found.mask, truth) > least
    np.testing.assert_allclose(found.centroid_mm, CENTRE, atol=1.0)
    assert found.volume_ml == pytest.approx(4 / 3 * np.pi * RADIUS**3 / 1000, rel=0.08)
    low, high = np.array(found.box_mm)
    room = exam.spacing_mm.max() + 2.5
    np.testing.assert_allclose(low, CENTRE - RADIUS, atol=room)
    np.testing.assert_allclose(high, CENTRE + RADIUS, atol=room)
    assert 0 <= found.confidence <= 1


@pytest.mark.parametrize(("degrees", "spacing"), [((0, 0, 0), (3, 3, 3)), ((20, -15, 30), (2.5, 4, 6))])
def test_a_structure_of_one_exam_is_found_in_a_turned_anisotropic_one(model, degrees, spacing):
    exam, places = scan(spacing, degrees)
    found = locate(defined(model), exam)
    assert list(found) == ["ball"]
    assert (found["ball"].name, found["ball"].label) == ("ball", 1)
    check(found["ball"], exam, balls(places, CENTRE) == 1)


def test_the_way_an_exam_is_stored_does_not_matter(model):
    ready = defined(model)
    exam, places = scan((5, 4, 6), (10, 5, -20))
    truth = balls(places, CENTRE) == 1
    plain = locate(ready, exam)["ball"]
    for number, order in enumerate(permutations(range(3))):
        flips = tuple(bool(number >> bit & 1) for bit in range(3))
        stored = reorder(exam, order, flips)
        found = locate(ready, stored)["ball"]
        check(found, stored, reorder(Volume(truth, exam.affine), order, flips).array)
        assert dice(found.mask, reorder(Volume(plain.mask, exam.affine), order, flips).array) > 0.999
        np.testing.assert_allclose(found.centroid_mm, plain.centroid_mm, atol=0.05)
        np.testing.assert_allclose(found.box_mm, plain.box_mm, atol=1e-6)


def test_a_sheared_left_handed_exam(model):
    exam, places = scan((4, 4, 4))
    skew = exam.affine.copy()
    skew[:3, :3] = np.array([[-4.0, 0.4, 0.0], [0.0, 4.0, 0.8], [0.3, 0.0, 4.5]])
    middle = (np.array(exam.shape) - 1) / 2
    skew[:3, 3] = exam.affine[:3, :3] @ middle + exam.affine[:3, 3] - skew[:3, :3] @ middle
    places = apply(skew, np.moveaxis(np.indices(exam.shape), 0, -1))
    inside = (((places - FRAME[:3, 3]) / [105, 85, 150]) ** 2).sum(axis=-1) < 1
    sheared = Volume(np.where(inside, 30, -1000).astype(np.int16), skew)
    check(locate(defined(model), sheared)["ball"], sheared, balls(places, CENTRE) == 1)


def test_an_exam_prepared_by_its_body_gives_the_same(model):
    exam, places = scan((3, 4, 5), (0, 10, 0), low=(-200, -190, -200), high=(220, 150, 260))
    ready = defined(model)
    found = locate(ready, exam, embedded=exact(ready, exam, "body"))["ball"]
    check(found, exam, balls(places, CENTRE) == 1)


def test_beyond_the_prepared_box_nothing_is_claimed(model):
    exam, places = scan((4, 3, 5), (0, 0, 15))
    ready = defined(model)
    seen = exact(ready, exam, "90mm")
    found = locate(ready, exam, embedded=seen)["ball"]
    beyond = np.abs(apply(np.linalg.inv(seen.prepared.box_to_mm), places)).max(axis=-1) > 1 + 2.1 / 23  # a step
    truth = balls(places, CENTRE) == 1
    assert (truth & beyond).sum() > 100
    assert not (found.mask & beyond).any()
    assert found.status == "cut_off"
    points = np.random.default_rng(0).uniform(-1, 1, (40000, 3))
    points = CENTRE + RADIUS * points[(points**2).sum(axis=1) < 1]
    share = (np.abs(apply(np.linalg.inv(seen.prepared.box_to_mm), points)) <= 1).all(axis=1).mean()
    assert found.coverage == pytest.approx(share, abs=0.04)


def test_a_field_of_view_without_the_structure_says_so_and_has_no_mask(model):
    exam, _ = scan((4, 4, 4), (5, 5, 5), high=(130, 80, CENTRE[2] - RADIUS - 15))
    found = locate(defined(model), exam)["ball"]
    assert (found.status, found.mask) == ("absent", None)
    assert found.coverage < ABSENT
    for nothing in (found.confidence, found.volume_ml, found.centroid_mm, found.box_mm):
        assert nothing is None


def test_half_in_view_is_cut_off_with_half_the_coverage(model):
    exam, places = scan((4, 4, 4), high=(130, 80, CENTRE[2]))
    found = locate(defined(model), exam)["ball"]
    truth = balls(places, CENTRE) == 1
    assert found.status == "cut_off"
    assert found.coverage == pytest.approx(0.5, abs=0.12)
    assert dice(found.mask, truth) > 0.85
    assert found.volume_ml == pytest.approx(truth.sum() * 0.064, rel=0.2)
    assert found.box_mm[1][2] <= CENTRE[2] + 4
    assert found.centroid_mm[2] < CENTRE[2]


def test_what_lies_in_air_is_not_found_there(model):
    exam, _ = scan((4, 4, 4))
    array = exam.array.copy()
    places = apply(exam.affine, np.moveaxis(np.indices(exam.shape), 0, -1))
    array[places[..., 2] > CENTRE[2] - RADIUS - 20] = -1000  # in view, but the patient ends before
    found = locate(defined(model), Volume(array, exam.affine))["ball"]
    assert found.status == "absent"
    assert found.mask is None


def test_several_exams_make_one_structure_and_undrawn_ones_take_no_part(model):
    pairs = []
    for spacing, degrees in (((4, 3, 5), (5, -8, 12)), ((3, 5, 4), (-10, 0, 5)), ((4, 4, 4), (0, 15, 0))):
        exam, places = scan(spacing, degrees)
        pairs.append((exam, Volume(balls(places, CENTRE), exam.affine)))
    exam, places = scan((3, 4, 3), (0, 7, 7))
    truth = balls(places, CENTRE) == 1
    both = define(model, pairs, {"ball": 1})
    assert both.structure("ball").exams == 3
    check(locate(both, exam)["ball"], exam, truth, least=0.85)
    undrawn = [(pairs[1][0], Volume(np.zeros(pairs[1][0].shape, np.uint8), pairs[1][0].affine))]
    with_undrawn = define(model, [*pairs, *undrawn * 3], {"ball": 1})
    assert with_undrawn.structure("ball").exams == 3
    assert torch.equal(with_undrawn.structure("ball").mask, both.structure("ball").mask)
    assert with_undrawn.structure("ball").level == both.structure("ball").level


def test_defining_again_replaces_and_leaves_the_others(model):
    first = defined(model, {"ball": 1, "other": 2})
    exam, places = scan((4, 4, 4))
    again = define(first, [(exam, Volume(balls(places, OTHER), exam.affine))], {"ball": 1})
    assert list(again.structures) == ["ball", "other"]
    assert again.structure("other") is first.structure("other")
    assert again.network is first.network
    np.testing.assert_allclose(locate(again, exam, ["ball"])["ball"].centroid_mm, OTHER, atol=1.0)
    np.testing.assert_allclose(locate(first, exam)["ball"].centroid_mm, CENTRE, atol=1.0)
    assert model.structures == {}


def test_a_name_that_training_never_heard_of(model):
    name = "Xylophon 7 / 左"
    exam, places = scan((4, 4, 4))
    known = define(model, [(exam, Volume(37 * balls(places, CENTRE), exam.affine))], {name: 37})
    check(locate(known, exam)[name], exam, balls(places, CENTRE) == 1)
    assert locate(known, exam)[name].label == 37
    assert known.network is model.network


def test_an_undrawn_or_unknown_structure_is_refused(model):
    exam, places = scan((5, 5, 5))
    with pytest.raises(StructureError, match="ghost: no labelled exam has a voxel of number 9"):
        define(model, [(exam, Volume(balls(places, CENTRE), exam.affine))], {"ghost": 9})
    with pytest.raises(StructureError, match="'ghost'; it knows: ball"):
        locate(defined(model), exam, ["ghost"])
    with pytest.raises(ExamError):
        locate(defined(model), Volume(np.full((9, 9, 9), -1000, np.int16), np.diag([5.0, 5, 5, 1])))


def test_only_what_is_asked_for_is_located(model):
    exam, _ = scan((5, 5, 5))
    ready = defined(model, {"ball": 1, "other": 2})
    assert list(locate(ready, exam)) == ["ball", "other"]
    assert list(locate(ready, exam, ["other"])) == ["other"]
    assert locate(ready, exam, []) == {}
    assert locate(model, exam) == {}


def test_where_structures_overlap_a_voxel_belongs_to_one(model):
    exam, places = scan((4, 4, 4))
    near = CENTRE + np.array([20.0, 0, 0])
    both = model
    for centre, name in ((CENTRE, "one"), (near, "two")):
        both = define(both, [(exam, Volume(balls(places, centre), exam.affine))], {name: 1})
    alone = {name: locate(both, exam, [name])[name].mask for name in ("one", "two")}
    found = locate(both, exam)
    assert (alone["one"] & alone["two"]).sum() > 200
    assert not (found["one"].mask & found["two"].mask).any()
    assert np.array_equal(found["one"].mask | found["two"].mask, alone["one"] | alone["two"])
    side = ((places - (CENTRE + near) / 2) @ (near - CENTRE)) > 0
    shared = alone["one"] & alone["two"]
    nearer = found["two"].mask[shared] == side[shared]
    assert nearer.mean() > 0.6


def test_confidence_is_the_dice_that_membership_leads_one_to_expect(model, monkeypatch):
    """Where the likeness is perfect: of a mask that is 0 or 1 it is 1, of a vague one as much as is counted here."""
    exam, _ = scan((3.0, 3.0, 4.0))
    ready = defined(model)
    monkeypatch.setattr(Likeness, "around", lambda *_: 1.0)
    for sharp in (False, True):
        mask = ready.structures["ball"].mask
        one = replace(ready.structures["ball"], mask=(mask > 0.4).float() if sharp else mask, tissue=None, level=0.4)
        seen = exact(ready, exam)
        found = locate(ready.with_structures(one), exam, embedded=seen)["ball"]
        index = np.stack(np.indices(exam.shape), axis=-1).reshape(-1, 3)
        box = apply(np.linalg.inv(seen.prepared.box_to_mm) @ exam.affine, index).T[None].astype(np.float32)
        member = one.membership(grid.sample(seen.c_atlas, torch.from_numpy(box)))[0, 0].numpy()
        own = found.mask.ravel()
        expected = 2 * member[own].sum() / (own.sum() + member[member > 0.05].sum())
        assert found.confidence == pytest.approx(expected, abs=2e-3)
        assert found.confidence > 0.85 if sharp else found.confidence < 0.85


def test_confidence_falls_where_the_exam_does_not_look_like_the_atlas(model):
    exam, _ = scan((4, 4, 4))
    ready = defined(model)
    seen = exact(ready, exam)
    image = torch.from_numpy(seen.prepared.image)[None, None]
    where = grid.identity((40,) * 3) / MARGIN
    to_box = torch.from_numpy(np.linalg.inv(seen.prepared.box_to_mm) @ FRAME).float()
    places = torch.einsum("ab,nbijk->naijk", to_box[:3, :3], where) + to_box[:3, 3].view(1, 3, 1, 1, 1)
    alike = replace(ready, atlas=grid.sample(image, places) * grid.inside(places))
    high, low = (locate(one, exam)["ball"].confidence for one in (alike, ready))
    assert high > 0.8
    assert low < high - 0.3


@pytest.mark.parametrize("degrees", [(0, 0, 0), (20, -15, 30)])
def test_one_pass_over_blocks_gives_the_owners_that_sampling_everything_gives(model, degrees):
    exam, places = scan((4.0, 3.0, 5.0), degrees, low=(-60, -120, -90))
    centres = np.random.default_rng(0).uniform(-60, 60, (12, 3)) + np.array([20, 0, 30])
    ready = define(
        model,
        [(exam, Volume(balls(places, *centres, radius=25), exam.affine))],
        {f"ball {n}": n + 1 for n in range(len(centres))},
    )
    seen = exact(ready, exam)
    seen = seen._replace(c_atlas=seen.c_atlas + 0.02 * torch.sin(9 * seen.c_atlas.roll(1, 1)))
    found = locate(ready, exam, embedded=seen)
    whole = owners_reference(list(ready.structures.values()), seen, exam, slice(None))
    for number, one in enumerate(found.values()):
        assert one.status != "absent"
        mask, expected = one.mask, whole == number
        assert (mask != expected).sum() <= 1e-3 * expected.sum()  # a score of exactly 0 may round either way
        mm = places[mask]
        np.testing.assert_allclose(one.centroid_mm, mm.mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(
            np.diff(one.box_mm, axis=0)[0], np.ptp(mm, axis=0) + np.abs(exam.affine[:3, :3]).sum(1)
        )
    assert np.array_equal(whole[3:9:2], owners_reference(list(ready.structures.values()), seen, exam, slice(3, 9, 2)))


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int16, np.int32])
@pytest.mark.parametrize("order", ["C", "F", "strided"])
def test_hu_are_read_as_the_exam_stores_them(model, kind, order):
    exam, _ = scan((6.0, 5.0, 7.0), (20, -15, 30))
    rng = np.random.default_rng(1)
    hu = exam.array + rng.normal(0, 150, exam.shape)
    array = np.asarray(hu, dtype=kind, order="C" if order == "strided" else order)
    stored = np.repeat(array, 2, axis=1)[:, ::2] if order == "strided" else array
    ready = defined(model)
    table = torch.from_numpy(rng.normal(0, 1, (PARTS, PARTS, PARTS, BINS, BINS))).float()
    ready = ready.with_structures(replace(ready.structures["ball"], tissue=table))
    noisy, seen = Volume(stored, exam.affine), exact(ready, exam)
    found = locate(ready, noisy, embedded=seen)["ball"].mask
    expected = owners_reference([ready.structures["ball"]], seen, Volume(array, exam.affine), slice(None)) == 0
    assert (found != expected).sum() <= 1e-3 * expected.sum()
    plain = ready.with_structures(replace(ready.structures["ball"], tissue=None))
    differ = locate(plain, noisy, embedded=seen)["ball"].mask != expected
    assert differ.sum() > 0.02 * expected.sum()  # the table has a say


@pytest.mark.parametrize("radius", [2.5, 5.0])
def test_a_structure_thinner_than_the_spread_is_not_lost(model, radius):
    exam, places = scan((1.5, 1.5, 1.5), low=(-20, -20, -20), high=(60, 60, 60))
    inside = np.linalg.norm(places - CENTRE, axis=-1) < radius
    ready = define(model, [(exam, Volume(inside.astype(np.uint8), exam.affine))], {"lens": 1})
    found = locate(ready, exam)["lens"]
    assert found.status == "present"
    np.testing.assert_allclose(found.centroid_mm, places[inside].mean(axis=0), atol=2.5)


@pytest.mark.parametrize("place", [31, 32])
def test_a_structure_of_a_single_fine_plane_is_not_lost(model, place):
    """Label maps finer than 2 mm are thinned: every other plane is left."""
    exam, places = scan((0.9, 3.0, 3.0), low=(10, -10, 30), high=(70, 40, 80))
    sheet = np.zeros(exam.shape, np.uint8)
    sheet[place, 5:12, 5:12] = 1
    ready = define(model, [(exam, Volume(sheet, exam.affine))] * 2, {"sheet": 1})
    assert ready.structure("sheet").exams == 2
    found = locate(ready, exam)["sheet"]
    np.testing.assert_allclose(found.centroid_mm, places[sheet > 0].mean(axis=0), atol=2.5)


def test_the_more_exams_the_less_a_mask_is_spread(model):
    exam, places = scan((4.0, 4.0, 4.0))
    labelled = (exam, Volume(balls(places, CENTRE), exam.affine))
    few, many = (define(model, [labelled] * n, {"ball": 1}).structure("ball").mask for n in (2, 16))
    unsure_few, unsure_many = (int(((mask > 0.1) & (mask < 0.9)).sum()) for mask in (few, many))
    assert unsure_few > 1.1 * unsure_many


def test_bone_next_to_a_soft_structure_is_left_out(model):
    """A ball drawn on one exam; in another, half of where it should be has turned into bone."""
    exam, places = scan((4.0, 4.0, 4.0))
    inside = np.linalg.norm(places - CENTRE, axis=-1) < RADIUS
    soft = Volume(np.where(inside, 40, 300).astype(np.float32), exam.affine)
    ready = define(model, [(soft, Volume(inside.astype(np.uint8), exam.affine))], {"ball": 1})
    bone = inside & (np.linalg.norm(places - CENTRE, axis=-1) > 0.8 * RADIUS)
    changed = Volume(np.where(bone, 300, soft.array), exam.affine)
    mask = locate(ready, changed, embedded=exact(ready, changed))["ball"].mask
    assert mask[inside & ~bone].mean() > 0.95
    assert mask[bone].mean() < 0.7
