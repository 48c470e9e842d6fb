"""Regions lie where their anatomy lies, in any exam; what is cut out stands upright and goes back to its place."""

import base64
import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch

from deepatlas import checkpoint, files
from deepatlas.atlas import REGION_NODES, Region
from deepatlas.checkpoint import MARGIN, Model
from deepatlas.config import NetworkConfig
from deepatlas.errors import ModelError, RegionError, StructureError
from deepatlas.files import Exam
from deepatlas.locate import ABSENT, PRESENT, define
from deepatlas.markups import Box, aligned_box
from deepatlas.networks import CoordinateNetwork
from deepatlas.prepare import AIR_HU
from deepatlas.regions import (
    Shown,
    crop,
    crop_record,
    from_box,
    from_structures,
    paste,
    recorded_exam,
    region_of,
    show,
    view_grid,
)
from deepatlas.volume import Volume, apply, reorder
from exact import (
    CENTRE,
    FRAME,
    OTHER,
    RADIUS,
    affine_of,
    balls,
    bent,
    blank,
    cube_between,
    dice,
    exact,
    in_body,
    moved_by,
    places_of,
    rotated,
    scan,
    unbent,
    unmoved,
)

ATLAS_TO_MM = FRAME @ np.diag([1 / MARGIN] * 3 + [1.0])
CORNERS = np.stack(np.meshgrid(*[(-1.0, 1.0)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
LOW, HIGH = np.array([-20.0, -40.0, 5.0]), np.array([50.0, 15.0, 75.0])
"""A cube of the seed exam that lies wholly in the patient."""


@pytest.fixture(scope="module")
def model() -> Model:
    """A model that knows two balls."""
    exam, places = scan((4.0, 3.0, 5.0), (5, -8, 12))
    labels = Volume(balls(places, CENTRE, OTHER, radius=RADIUS), exam.affine)
    plain = blank()
    return define(plain, [(exam, labels)], {"ball": 1, "other": 2}, embedded=[exact(plain, exam)])


def cube(low_mm: np.ndarray = LOW, high_mm: np.ndarray = HIGH, name: str = "cube") -> Region:
    """A region between two places of the seed exam."""
    return cube_between(low_mm, high_mm, name)


def limits_mm(region: Region) -> np.ndarray:
    """The corners of a region as places of the seed exam."""
    return apply(ATLAS_TO_MM, region.box_atlas.double().numpy())


def nodes_mm(region: Region) -> np.ndarray:
    """Its nodes there."""
    low, high = limits_mm(region)
    steps = np.stack(np.meshgrid(*[np.linspace(0, 1, REGION_NODES)] * 3, indexing="ij"), axis=-1)
    return low + steps * (high - low)


def test_a_region_around_a_structure_has_its_extent_in_mm(model):
    plain = from_structures(model, "around", ["ball"])
    np.testing.assert_allclose(limits_mm(plain), [CENTRE - RADIUS, CENTRE + RADIUS], atol=3.0)
    wide = from_structures(model, "around", ["ball"], margin_mm=12.5)
    np.testing.assert_allclose(limits_mm(wide) - limits_mm(plain), [[-12.5] * 3, [12.5] * 3], atol=1e-3)
    assert wide.name == "around"
    inside = ((nodes_mm(wide) - CENTRE) ** 2).sum(axis=-1) < RADIUS**2
    assert dice(wide.counted.numpy(), inside) > 0.9


def test_a_region_around_several_structures_holds_them_all(model):
    both = from_structures(model, "both", ["ball", "other"])
    low, high = np.minimum(CENTRE, OTHER) - RADIUS, np.maximum(CENTRE, OTHER) + RADIUS
    np.testing.assert_allclose(limits_mm(both), [low, high], atol=3.0)
    inside = [((nodes_mm(both) - centre) ** 2).sum(axis=-1) < RADIUS**2 for centre in (CENTRE, OTHER)]
    assert dice(both.counted.numpy(), inside[0] | inside[1]) > 0.9


def test_a_structure_without_a_voxel_or_a_name_makes_no_region(model):
    empty = replace(model.structure("ball"), name="empty", mask=torch.zeros_like(model.structure("ball").mask))
    with pytest.raises(RegionError, match="hollow"):
        from_structures(model.with_structures(empty), "hollow", ["empty"])
    with pytest.raises(StructureError, match="'ghost'"):
        from_structures(model, "hollow", ["ball", "ghost"])


@pytest.mark.parametrize("degrees", [(0, 0, 0), (15, -25, 40)])
@pytest.mark.parametrize("turn", [(0, 0, 0), (-20, 10, 35)])
def test_a_region_of_a_turned_box_is_the_upright_cube_around_it(model, degrees, turn):
    pose = affine_of(rotated(turn), (6, -4, 9))  # exam → seed exam
    exam, _ = scan((3, 4, 5), degrees, body=moved_by(pose))
    box = Box(apply(np.linalg.inv(pose), np.array([15.0, -10, 40])), rotated((10, 20, 30)), np.array([60.0, 40, 80]))
    corners = box.centre_mm + (CORNERS * box.size_mm / 2) @ box.axes.T
    in_seed = apply(pose, corners)
    region = from_box(model, "drawn", exact(model, exam, body=moved_by(pose)), box)
    np.testing.assert_allclose(limits_mm(region), [in_seed.min(axis=0), in_seed.max(axis=0)], atol=0.05)
    assert region.name == "drawn"
    assert region.counted.all()


def test_a_box_that_reaches_beyond_the_patient_counts_only_the_patient(model):
    exam, _ = scan((4, 4, 4))
    box = aligned_box(np.array([60.0, -60.0, -10.0]), np.array([128.0, 20.0, 70.0]))
    region = from_box(model, "flank", exact(model, exam), box)
    np.testing.assert_allclose(limits_mm(region), box.limits_mm, atol=0.05)
    counted = region.counted.numpy()
    assert counted[in_body(nodes_mm(region))].all()
    assert not counted[~in_body(nodes_mm(region), depth_mm=-20.0)].any()
    with pytest.raises(RegionError, match="flank lies outside the patient"):
        from_box(model, "flank", exact(model, exam), aligned_box(np.full(3, 200.0), np.full(3, 260.0)))


POSES = {
    "upright": (affine_of(np.eye(3), (8, -5, 12)), ((4, 4, 4), (0, 0, 0))),
    "turned patient": (affine_of(rotated((-25, 10, 40)), (5, 3, -6)), ((3, 4, 5), (0, 0, 0))),
    "turned exam": (affine_of(np.eye(3)), ((2.5, 4, 6), (20, -15, 30))),
    "stretched patient": (affine_of(rotated((5, 5, 5)) @ np.diag([0.9, 1.1, 1.05])), ((4, 4, 4), (5, -10, 0))),
}


@pytest.mark.parametrize("name", POSES)
def test_a_region_is_shown_where_its_anatomy_lies(model, name):
    pose, (spacing, degrees) = POSES[name]
    exam, _ = scan(spacing, degrees, body=moved_by(pose))
    shown = show(model, cube(), exact(model, exam, body=moved_by(pose)))
    truth = np.linalg.inv(pose) @ aligned_box(LOW, HIGH).to_mm
    np.testing.assert_allclose(apply(shown.to_mm, CORNERS), apply(truth, CORNERS), atol=0.05)
    assert (shown.status, shown.coverage) == ("present", 1.0)
    if name != "stretched patient":
        np.testing.assert_allclose(shown.box.centre_mm, apply(truth, np.zeros(3)), atol=0.05)
        np.testing.assert_allclose(shown.box.axes, np.linalg.inv(pose)[:3, :3], atol=1e-3)
        np.testing.assert_allclose(shown.box.size_mm, HIGH - LOW, atol=0.05)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 0.97])
@pytest.mark.parametrize("turn", [(0, 0, 0), (-15, 10, 25)])
def test_a_region_cut_off_is_placed_whole_and_says_how_much_is_there(model, share, turn):
    pose = affine_of(rotated(turn), (5, 3, -6))
    top = LOW[2] + share * (HIGH[2] - LOW[2])
    to_exam = np.linalg.inv(pose)
    turned, _ = scan((4, 4, 4), low=(-110, -120, -100), high=(130, 80, top))
    exam = Volume(turned.array, to_exam @ turned.affine)  # its last plane cuts the anatomy at right angles
    seen = exact(model, exam, body=moved_by(pose))
    shown = show(model, cube(), seen)
    assert shown.coverage == pytest.approx(share, abs=1.5 / REGION_NODES)
    assert shown.status == ("present" if shown.coverage >= PRESENT else "cut_off")
    truth = to_exam @ aligned_box(LOW, HIGH).to_mm
    np.testing.assert_allclose(apply(shown.to_mm, CORNERS), apply(truth, CORNERS), atol=0.1)


def test_coverage_counts_only_anatomy(model):
    exam, _ = scan((4, 4, 4), high=(130, 80, 40))
    half = cube()
    lower = torch.from_numpy(nodes_mm(half)[..., 2] < 30)
    assert show(model, replace(half, counted=lower), exact(model, exam)).coverage == 1.0
    upper = show(model, replace(half, counted=~lower), exact(model, exam))
    assert upper.coverage == pytest.approx((40 - 30) / (75 - 30), abs=0.08)
    nothing = show(model, replace(half, counted=torch.zeros_like(lower)), exact(model, exam))
    assert nothing.coverage == pytest.approx((40 - 5) / (75 - 5), abs=0.08)


def test_a_region_beyond_the_scan_is_absent_and_has_no_place(model):
    exam, _ = scan((4, 4, 4), high=(130, 80, LOW[2] - 10))
    shown = show(model, cube(), exact(model, exam))
    assert (shown.coverage, shown.status, shown.to_mm, shown.box) == (0.0, "absent", None, None)
    assert show(model, cube(), exact(model, exam))[:2] == (0.0, "absent")


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_region_of_which_a_thin_layer_is_in_view(model, layers):
    heights = nodes_mm(cube())[0, 0, :, 2]
    edge = (heights[layers - 1] + heights[layers]) / 2
    exam, _ = scan((4, 4, 4), low=(-110, -120, edge - 160), high=(130, 80, edge))
    seen = exact(model, exam)
    shown = show(model, cube(), seen)
    assert shown.coverage == pytest.approx(layers / REGION_NODES, abs=0.01)
    assert (shown.to_mm is None) == (shown.coverage < ABSENT or layers == 1)
    if shown.to_mm is not None:
        np.testing.assert_allclose(apply(shown.to_mm, CORNERS), apply(aligned_box(LOW, HIGH).to_mm, CORNERS), atol=0.5)


def test_a_bent_patient_has_the_region_about_its_anatomy(model):
    exam, _ = scan((4, 4, 4), (10, -5, 10), body=bent)
    region = cube()
    shown = show(model, region, exact(model, exam, body=bent))
    truth = unbent(nodes_mm(region).reshape(-1, 3))
    cube_nodes = np.stack(np.meshgrid(*[np.linspace(-1, 1, REGION_NODES)] * 3, indexing="ij"), -1).reshape(-1, 3)
    design = np.hstack([cube_nodes, np.ones((len(cube_nodes), 1))])
    best = np.linalg.lstsq(design, truth, rcond=None)[0]
    off = np.linalg.norm(apply(shown.to_mm, CORNERS) - np.hstack([CORNERS, np.ones((8, 1))]) @ best, axis=1)
    rest = np.linalg.norm(design @ best - truth, axis=1)
    assert off.max() < rest.max()  # as good as the plain fit to the true places
    assert shown.coverage == 1.0


def test_an_exam_unlike_any_learned_shows_nothing(model):
    exam, _ = scan((4, 4, 4))
    seen = exact(model, exam)
    assert show(model, cube(), seen)[:2] == (1.0, "present")
    assert show(replace(model, familiar=1.5), cube(), seen) == (0.0, "absent", None)


LINEARS = {
    "turned": rotated((20, 30, 40)) * [30.0, 20, 50],
    "sheared": rotated((20, 30, 40)) @ np.array([[30.0, 6, -4], [0, 20, 5], [2, 0, 50]]),
    "mirrored": np.diag([-1.0, 1, 1]) @ rotated((20, 30, 40)) * [30.0, 20, 50],
}


@pytest.mark.parametrize("name", LINEARS)
def test_the_box_of_a_region_is_right_handed_with_unit_axes(name):
    to_mm = affine_of(LINEARS[name], (1, 2, 3))
    box = Shown(1.0, "present", to_mm).box
    np.testing.assert_allclose(box.axes.T @ box.axes, np.eye(3), atol=1e-12)
    assert np.linalg.det(box.axes) == pytest.approx(1.0)
    np.testing.assert_array_equal(box.centre_mm, [1, 2, 3])
    assert (box.size_mm > 0).all()
    if name == "turned":
        np.testing.assert_allclose(box.axes, rotated((20, 30, 40)), atol=1e-12)
        np.testing.assert_allclose(box.size_mm, [60, 40, 100])
    if name == "sheared":  # near to the cube's image: no edge is off by more than the shear
        np.testing.assert_allclose(box.to_mm[:3, :3], LINEARS[name], atol=8.0)


BOX = Shown(1.0, "present", Box(np.array([10.0, -5, 30]), rotated((15, -20, 35)), np.array([60.0, 41, 80])).to_mm)


def test_the_grid_of_the_view_has_the_spacing_asked_for_and_the_box_s_middle():
    for spacing, shape in ((2.0, (30, 21, 40)), ((3.0, 5.0, 7.0), (20, 9, 12))):
        found, affine = view_grid(BOX, spacing)
        assert found == shape
        np.testing.assert_allclose(affine[:3, :3], rotated((15, -20, 35)) * spacing, atol=1e-9)
        np.testing.assert_allclose(apply(affine, (np.array(shape) - 1) / 2), [10, -5, 30], atol=1e-9)
        extent = np.array(shape) * spacing
        assert (extent >= np.array([60, 41, 80]) - 1e-6).all()
        assert (extent < np.array([60, 41, 80]) + spacing).all()


def test_the_grid_of_the_view_of_a_given_size_fills_the_box():
    shape, affine = view_grid(BOX, 1.0, size=16)
    assert shape == (16, 16, 16)
    outer = apply(affine, CORNERS * 8 + 7.5)  # faces of the outermost voxels
    np.testing.assert_allclose(outer, apply(BOX.to_mm, CORNERS), atol=1e-9)


def test_a_grid_is_not_thinner_than_two_voxels_nor_larger_than_memory():
    assert view_grid(BOX, 500.0)[0] == (2, 2, 2)
    with pytest.raises(RegionError, match="larger spacing"):
        view_grid(BOX, 0.05)


BLOBS = [(np.array([30.0, -20.0, 54.0]), 400.0), (np.array([0.0, -5.0, 25.0]), 200.0)]


def blob_exam(spacing, degrees=(0, 0, 0), body=unmoved, **field) -> Volume:
    """An exam of the patient with two smooth blobs of bone in water."""
    exam, places = scan(spacing, degrees, body=body, **field)
    distance = [((body(places) - centre) ** 2).sum(axis=-1) for centre, _ in BLOBS]
    blobs = sum(peak * np.exp(-d / (2 * 7.0**2)) for d, (_, peak) in zip(distance, BLOBS, strict=True))
    return Volume(np.where(exam.array > -900, blobs, -1000).astype(np.float32), exam.affine)


def centroid(image: nib.Nifti1Image, around: np.ndarray, reach: float = 18.0) -> np.ndarray:
    """Centre of mass around a place, in mm by the image's affine."""
    places = places_of(image.shape, image.affine)
    values = image.get_fdata() * (((places - around) ** 2).sum(axis=-1) < reach**2)
    return (places * values[..., None]).sum(axis=(0, 1, 2)) / values.sum()


@pytest.mark.parametrize("name", POSES)
@pytest.mark.parametrize("how", [{"spacing_mm": 2.0}, {"spacing_mm": np.array([2.0, 3.0, 1.5])}, {"size": 28}])
def test_a_crop_shows_everything_at_its_place(model, tmp_path, name, how):
    pose, (spacing, degrees) = POSES[name]
    exam = blob_exam(spacing, degrees, moved_by(pose))
    shown = show(model, cube(), exact(model, exam, body=moved_by(pose)))
    shape, affine = view_grid(shown, **({"spacing_mm": 1.0} | how))
    cut = crop(exam, shape, affine)
    assert cut.shape == shape
    nib.save(nib.Nifti1Image(cut, affine), tmp_path / "crop.nii")
    read = nib.load(tmp_path / "crop.nii")
    for centre, _ in BLOBS:
        truth = apply(np.linalg.inv(pose), centre)
        np.testing.assert_allclose(centroid(read, truth), truth, atol=0.3)


def test_the_crop_of_a_turned_patient_stands_upright(model):
    crops = []
    for pose, spacing, degrees in (
        (affine_of(np.eye(3)), (3, 3, 3), (0, 0, 0)),
        (affine_of(rotated((-30, 15, 50)), (4, 2, -5)), (3, 3, 3), (10, 5, 0)),
    ):
        exam = blob_exam(spacing, degrees, moved_by(pose))
        shown = show(model, cube(), exact(model, exam, body=moved_by(pose)))
        crops.append(crop(exam, *view_grid(shown, 2.6)))
    upright, turned = crops
    assert upright.shape == turned.shape
    assert np.abs(upright - turned).max() < 30
    assert np.abs(upright - turned).mean() < 2
    assert np.ptp(upright) > 350
    for centre, peak in BLOBS:  # and upright is R, A, S
        index = np.rint((centre - (LOW + HIGH) / 2) / 2.6 + (np.array(turned.shape) - 1) / 2).astype(int)
        assert turned[tuple(index)] > 0.8 * peak


def test_the_way_an_exam_is_stored_does_not_change_its_crop():
    exam = blob_exam((3, 4, 5), (10, 5, -20))
    shape, affine = view_grid(BOX, 3.0)
    plain = crop(exam, shape, affine)
    stored = reorder(exam, (2, 0, 1), (True, True, False))
    np.testing.assert_allclose(crop(stored, shape, affine), plain, atol=0.05)


def test_beyond_the_exam_a_crop_is_air(model):
    exam = blob_exam((4, 4, 4), high=(130, 80, 40))
    shown = show(model, cube(), exact(model, exam))
    shape, affine = view_grid(shown, 2.0)
    cut = crop(exam, shape, affine)
    height = places_of(shape, affine)[..., 2]
    last = exam.corners_mm()[:, 2].max() + 2.0
    assert (cut[height > last + 0.01] == AIR_HU).all()
    assert (cut[height < last - 0.01] > -100).all()
    far = affine.copy()
    far[:3, 3] += 1000
    assert (crop(exam, shape, far) == AIR_HU).all()


def test_a_linear_image_is_cropped_exactly():
    exam, places = scan((3, 4, 5), (10, 5, -20))
    slope = np.array([1.5, -2.0, 0.7])
    ramp = Volume((places @ slope).astype(np.float32), exam.affine)
    for spacing in (1.5, 8.0):
        shape, affine = view_grid(BOX, spacing)
        np.testing.assert_allclose(crop(ramp, shape, affine), places_of(shape, affine) @ slope, atol=0.05)


def test_a_coarse_crop_does_not_alias():
    exam, _ = scan((2, 2, 2), low=(-40, -40, -40), high=(50, 50, 50))
    stripes = np.where(np.indices(exam.shape)[0] % 2, 100.0, -100.0).astype(np.float32)
    shape, affine = view_grid(Shown(1.0, "present", aligned_box(np.full(3, -21.0), np.full(3, 29.0)).to_mm), 10.0)
    assert np.abs(crop(Volume(stripes, exam.affine), shape, affine)).max() < 10


@pytest.mark.parametrize("degrees", [(0, 0, 0), (20, -15, 30)])
def test_a_crop_of_labels_holds_only_numbers_that_were_there(degrees):
    exam, places = scan((3, 4, 5), degrees, low=(-60, -70, -40), high=(60, 60, 60))
    labels = balls(places, CENTRE, OTHER).astype(np.uint16) * 300
    for spacing in (1.5, 6.0):
        shape, affine = view_grid(BOX, spacing)
        cut = crop(Volume(labels, exam.affine), shape, affine, labels=True)
        assert cut.dtype == np.uint16
        assert set(np.unique(cut)) == {0, 300, 600}
        nearest = np.rint(apply(np.linalg.inv(exam.affine), places_of(shape, affine))).astype(int)
        there = ((nearest >= 0) & (nearest < exam.shape)).all(axis=-1)
        assert not there.all()
        assert (cut[~there] == 0).all()
        assert dice(cut[there] == 300, balls(places_of(shape, affine), CENTRE, OTHER)[there] == 1) > 0.88
        assert (cut[there] == labels[tuple(nearest[there].T)]).mean() > 0.999


@pytest.mark.parametrize("degrees", [(0, 0, 0), (20, -15, 30)])
def test_labels_of_a_crop_are_pasted_back_to_where_they_were(degrees):
    exam, places = scan((3, 4, 5), degrees)
    labels = balls(places, [10.0, -5, 30], radius=15)
    shape, affine = view_grid(BOX, 1.0)
    cut = crop(Volume(labels, exam.affine), shape, affine, labels=True)
    back = paste(Volume(cut, affine), exam.shape, exam.affine)
    assert back.dtype == labels.dtype
    assert (labels == 1).sum() > 200
    np.testing.assert_array_equal(back, labels)


def test_values_of_a_crop_are_pasted_back_and_elsewhere_there_is_what_was_asked_for():
    exam, places = scan((3, 4, 5), (20, -15, 30))
    slope = np.array([1.5, -2.0, 0.7])
    shape, affine = view_grid(BOX, 2.0)
    ramp = (places_of(shape, affine) @ slope + 500).astype(np.float32)
    back = paste(Volume(ramp, affine), exam.shape, exam.affine, outside=-7.0)
    index = apply(np.linalg.inv(affine), places)
    last = np.array(shape) - 1
    well_in = ((index >= 0) & (index <= last)).all(axis=-1)
    beyond = ((index < -0.51) | (index > last + 0.51)).any(axis=-1)
    assert well_in.sum() > 500
    np.testing.assert_allclose(back[well_in], places[well_in] @ slope + 500, atol=0.05)
    assert (back[beyond] == -7).all()
    near = ((index > -0.49) & (index < last + 0.49)).all(axis=-1)
    assert (back[near] != -7).all()
    assert (paste(Volume(ramp, affine), exam.shape, exam.affine)[beyond] == 0).all()


def test_a_crop_that_reaches_beyond_the_exam_or_misses_it_is_pasted():
    exam, places = scan((4, 4, 4), low=(0, -40, 0), high=(60, 40, 60))
    shape, affine = view_grid(BOX, 2.0)
    whole = paste(Volume(np.full(shape, 3, np.uint8), affine), exam.shape, exam.affine)
    index = apply(np.linalg.inv(affine), places)
    near = ((index > -0.49) & (index < np.array(shape) - 0.51)).all(axis=-1)
    far = ((index < -0.51) | (index > np.array(shape) - 0.49)).any(axis=-1)
    assert 0.1 < near.mean() < 0.9
    assert (whole[near] == 3).all()
    assert (whole[far] == 0).all()
    away = affine_of(affine[:3, :3], affine[:3, 3] + 500)
    assert not paste(Volume(np.full(shape, 3, np.uint8), away), exam.shape, exam.affine).any()


SECRET = b"DOE^JANE"
SHEAR = affine_of(rotated((12, -7, 25)) * [-1.5, 2.0, 3.0], (-100, 55, 7))


def recorded(kind=nib.Nifti1Header, endianness="<") -> Exam:
    """An exam whose header is full of a patient's name, with codes that are not the usual ones."""
    header = kind(endianness=endianness)
    header.set_data_dtype(np.int16)
    header.set_data_shape((9, 8, 7))
    header.set_sform(SHEAR, code=3)
    header.set_qform(SHEAR, code=2)
    header.set_xyzt_units("mm", "sec")
    for field in header:
        if header.template_dtype[field].kind == "S" and field not in ("magic", "regular"):
            header[field] = SECRET
    return Exam(np.zeros((9, 8, 7), np.int16), SHEAR, header, "case 7")


def record(exam: Exam) -> dict:
    """The JSON of a crop of it, read back."""
    shape, affine = view_grid(BOX, 2.0)
    return json.loads(json.dumps(crop_record(exam, cube(), BOX, shape, affine)))


@pytest.mark.parametrize("kind", [nib.Nifti1Header, nib.Nifti2Header])
@pytest.mark.parametrize("endianness", ["<", ">"])
def test_the_record_of_a_crop_brings_its_exam_s_grid_back(kind, endianness, tmp_path):
    exam = recorded(kind, endianness)
    about = record(exam)
    back = recorded_exam(about, "crop.json")
    assert (back.shape, back.name) == ((9, 8, 7), "case 7")
    np.testing.assert_array_equal(back.affine, exam.affine)
    assert isinstance(back.header, kind)
    for field in ("sform_code", "qform_code", "xyzt_units", "pixdim", "srow_x", "quatern_b", "qoffset_x"):
        np.testing.assert_array_equal(back.header[field], exam.header[field])
    files.write_labels(tmp_path / "back.nii.gz", np.ones((9, 8, 7), np.uint8), back)
    written = nib.load(tmp_path / "back.nii.gz")
    assert (int(written.header["sform_code"]), int(written.header["qform_code"])) == (3, 2)
    np.testing.assert_array_equal(written.affine, exam.header.get_sform())
    shape, affine = view_grid(BOX, 2.0)
    assert about["crop"] == {"shape": list(shape), "affine": affine.tolist()}
    assert (about["roi"], about["status"], about["coverage"]) == ("cube", "present", 1.0)
    assert (about["frame"], about["unit"]) == ("RAS", "mm")


@pytest.mark.parametrize("kind", [nib.Nifti1Header, nib.Nifti2Header])
def test_nothing_that_may_name_a_patient_is_in_the_record_of_a_crop(kind):
    exam = recorded(kind)
    assert SECRET in bytes(exam.header.binaryblock)
    about = record(exam)
    assert SECRET.decode() not in json.dumps(about)
    assert SECRET not in base64.b64decode(about["original"]["header"])
    assert SECRET in bytes(exam.header.binaryblock)  # the exam itself keeps what it had


def test_the_usual_texts_of_a_header_are_not_in_the_record_of_a_crop():
    exam = recorded()
    for field in ("descrip", "aux_file", "db_name", "intent_name"):
        exam.header[field] = b"ROE^RICHARD"[:18]
    assert b"ROE^RICHARD" not in base64.b64decode(record(exam)["original"]["header"])


def spoil(*path, value) -> dict:
    """The record of a crop with one entry replaced."""
    about = record(recorded())
    part = about
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return about


def without(*path) -> dict:
    """The record of a crop that lacks one entry."""
    about = record(recorded())
    part = about
    for key in path[:-1]:
        part = part[key]
    del part[path[-1]]
    return about


HEADER = base64.b64encode(bytes(nib.Nifti1Header().binaryblock)).decode()
BROKEN = {
    "nothing": {},
    "another format": spoil("format", value="x"),
    "a later version": spoil("version", value=2),
    "no original": without("original"),
    "an original that is a list": spoil("original", value=[1]),
    "no original at all": spoil("original", value=None),
    "no exam": without("exam"),
    "no header": without("original", "header"),
    "a header that is no text": spoil("original", "header", value=5),
    "a header that is not base64": spoil("original", "header", value="%%%"),
    "a header cut short": spoil("original", "header", value=HEADER[:200]),
    "an empty header": spoil("original", "header", value=""),
    "a header of noise": spoil("original", "header", value=base64.b64encode(bytes(range(174)) * 2).decode()),
    "no shape": without("original", "shape"),
    "a flat shape": spoil("original", "shape", value=[5, 5]),
    "an empty shape": spoil("original", "shape", value=[5, 0, 5]),
    "a negative shape": spoil("original", "shape", value=[-5, -5, 5]),
    "a shape of words": spoil("original", "shape", value=["a", 5, 5]),
    "a shape beyond memory": spoil("original", "shape", value=[10**6] * 3),
    "an infinite shape": spoil("original", "shape", value=[float("inf"), 5, 5]),
    "a short affine": spoil("original", "affine", value=[[1, 0, 0, 0]]),
    "a ragged affine": spoil("original", "affine", value=[[1, 0], [1]]),
    "a singular affine": spoil("original", "affine", value=np.zeros((4, 4)).tolist()),
    "an affine of words": spoil("original", "affine", value="abc"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_record_that_is_none_is_refused(fault):
    with pytest.raises(RegionError, match=r"nose\.json is not what `deepatlas crop` wrote") as refusal:
        recorded_exam(BROKEN[fault], "nose.json")
    assert "\n" not in str(refusal.value)


def test_a_region_is_known_by_its_name_or_by_a_structure_s(model):
    known = model.with_regions(cube())
    assert region_of(known, "cube") is known.regions["cube"]
    np.testing.assert_allclose(limits_mm(region_of(known, "ball")), [CENTRE - RADIUS, CENTRE + RADIUS], atol=3.0)
    with pytest.raises(RegionError, match="'ghost'; it knows: cube, ball, other"):
        region_of(known, "ghost")
    with pytest.raises(RegionError, match="none"):
        region_of(blank(), "ghost")


@pytest.fixture
def folder(tmp_path):
    """A model of two regions on disk, and the regions."""
    torch.manual_seed(1)
    network = CoordinateNetwork(NetworkConfig(size=8, widths=(4, 8), head_channels=6, groups=2))
    some = torch.rand(*(REGION_NODES,) * 3) > 0.7
    named = [cube(), replace(cube(LOW - 9.7, HIGH + 3.3, "Kopf / 頭"), counted=some)]
    checkpoint.save(replace(blank(), network=network).with_regions(*named), tmp_path / "one")
    return tmp_path / "one", named


def test_regions_come_back_with_the_model(folder):
    path, named = folder
    back = checkpoint.load(path).regions
    assert list(back) == ["cube", "Kopf / 頭"]
    for one in named:
        other = back[one.name]
        assert other.name == one.name
        assert torch.equal(other.box_atlas, one.box_atlas)
        assert torch.equal(other.counted, one.counted)
        assert other.counted.dtype == torch.bool


def test_a_region_of_the_same_name_replaces_and_old_models_have_none(folder):
    path, _ = folder
    loaded = checkpoint.load(path)
    changed = loaded.with_regions(cube(LOW, HIGH + 5))
    checkpoint.save_structures(changed, path)
    assert list(checkpoint.load(path).regions) == ["cube", "Kopf / 頭"]
    np.testing.assert_allclose(limits_mm(checkpoint.load(path).regions["cube"])[1], HIGH + 5, atol=1e-3)
    np.testing.assert_allclose(limits_mm(loaded.regions["cube"])[1], HIGH, atol=1e-3)
    about = json.loads((path / "model.json").read_text(encoding="utf-8"))
    del about["regions"]
    (path / "model.json").write_text(json.dumps(about), encoding="utf-8")
    assert checkpoint.load(path).regions == {}


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "cube", "box_atlas": [[0, 0, 0]], "counted": "ff" * 512},
        {"name": "cube", "box_atlas": [[0, 0, 0], [1, 1, 1]], "counted": "ff" * 511},
        {"name": "cube", "box_atlas": [[0, 0, 0], [1, 1, 1]], "counted": "xy"},
        {"name": "cube", "counted": "ff" * 512},
        5,
    ],
)
def test_a_region_that_is_none_is_refused_with_its_model(folder, entry):
    path, _ = folder
    about = json.loads((path / "model.json").read_text(encoding="utf-8"))
    about["regions"].append(entry)
    (path / "model.json").write_text(json.dumps(about), encoding="utf-8")
    with pytest.raises(ModelError, match="does not describe a model"):
        checkpoint.load(path)
