"""Images laid on a region of an atlas by their coordinate maps; here the maps are the truth."""

import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from deepatlas import atlas_grid, checkpoint, common_grid, files, regseg
from deepatlas.atlas_grid import AtlasGrid
from deepatlas.config import REGSEG_CT, NetworkConfig
from deepatlas.errors import ExamError, RegionError
from deepatlas.networks import CoordinateNetwork
from deepatlas.volume import Volume, apply
from exact import (
    CENTRE,
    OTHER,
    affine_of,
    balls,
    bent,
    blank,
    cube_between,
    exact,
    moved_by,
    places_of,
    rotated,
    scan,
    unbent,
    unmoved,
)
from standins import model_of

LOW, HIGH = np.array([-45.0, -55.0, -10.0]), np.array([60.0, 25.0, 85.0])
STRETCH = affine_of(rotated((-8, 5, 12)) @ np.diag([1.1, 0.95, 1.05]), (6, -9, 14))
"""The moving patient's mm → the seed patient's."""
SHORT = {"low": (-110, -120, -110), "high": (130, 80, 35)}
"""A field of view that ends within the region."""
TRUNK = cube_between(LOW, HIGH, "trunk")
SCALING = "-150:150"


@pytest.fixture
def laid(monkeypatch) -> AtlasGrid:
    """A map that knows every patient's truth: exams with spacings of 4 mm show the moving one."""
    monkeypatch.setattr(atlas_grid, "embed", lambda model, exam: exact(model, exam, body=body_of(exam)))
    return AtlasGrid.of(blank().with_regions(TRUNK), "trunk")


def body_of(exam: Volume):
    return moved_by(STRETCH) if np.allclose(exam.spacing_mm, 4, atol=1e-3) else unmoved


def moving_exam(**fov) -> Volume:
    return scan((4, 4, 4), (10, -5, 8), body=moved_by(STRETCH), **fov)[0]


def test_the_grid_covers_the_region_with_cells_of_about_the_spacing_asked_for(laid):
    frame = laid.frame(5.0, SCALING)
    assert all(n % 16 == 0 for n in frame.shape)
    assert frame.scaling == SCALING
    np.testing.assert_allclose(np.multiply(frame.shape, frame.spacing_mm), HIGH - LOW, rtol=1e-4)
    assert 2.5 < min(frame.spacing_mm) <= max(frame.spacing_mm) <= 5.3
    exam, _ = scan((3, 3, 5))
    points = frame.points_mm(exam, laid.pose(exam, frame))
    half = np.array(frame.spacing_mm) / 2
    np.testing.assert_allclose(points[0, 0, 0], LOW + half, atol=0.05)
    np.testing.assert_allclose(points[-1, -1, -1], HIGH - half, atol=0.05)


@pytest.mark.parametrize("fov", [{}, SHORT])
def test_the_same_node_is_the_same_anatomy_in_every_exam_however_it_was_cut(laid, fov):
    frame = laid.frame(5.0, SCALING)
    fixed, moving = scan((3, 3, 3))[0], moving_exam(**fov)
    where = [laid.pose(exam, frame) for exam in (fixed, moving)]
    points = [frame.points_mm(exam, pose) for exam, pose in zip((fixed, moving), where, strict=True)]
    np.testing.assert_allclose(apply(STRETCH, points[1]), points[0], atol=0.1)
    one, other = (common_grid.placed(exam, frame, pose) for exam, pose in zip((fixed, moving), where, strict=True))
    both = one.inside & other.inside
    assert both.mean() > 0.3
    assert other.inside.all() == (not fov)
    assert np.corrcoef(one.image[both], other.image[both])[0, 1] > 0.97


def test_a_registration_and_a_segmentation_are_in_the_places_of_the_images_themselves(laid):
    model = replace(model_of(laid.frame(5.0, SCALING)), laid=laid)
    fixed, moving = scan((3, 3, 3))[0], moving_exam()
    points = np.random.default_rng(0).uniform(LOW, HIGH, (200, 3))
    found = regseg.register(model, fixed, moving).points(points)
    np.testing.assert_allclose(apply(STRETCH, found), points, atol=0.1)
    segmented = regseg.segment(model, moving)
    places = apply(STRETCH, places_of(moving.shape, moving.affine))
    beyond = ((places < LOW - 1) | (places > HIGH + 1)).any(axis=-1)
    assert not segmented[beyond].any()
    assert (segmented[~beyond] > 0).mean() > 0.2


@pytest.mark.parametrize("fov", [{}, SHORT])
def test_a_bent_body_is_laid_by_its_map_and_not_by_an_affine_map_alone(monkeypatch, fov):
    monkeypatch.setattr(atlas_grid, "embed", lambda model, exam: exact(model, exam, body=bent))
    laid = AtlasGrid.of(blank().with_regions(TRUNK), "trunk")
    frame = laid.frame(5.0, SCALING)
    exam = scan((4, 4, 4), (10, -5, 8), body=bent, **fov)[0]
    pose = laid.pose(exam, frame)
    anatomy = LOW + (frame.nodes() + 0.5) * frame.spacing_mm  # of the seed patient
    points = frame.points_mm(exam, pose)
    shown = (apply(exam.inverse, points) > 1).all(axis=-1) & (
        apply(exam.inverse, points) < np.array(exam.shape) - 2
    ).all(axis=-1)
    assert shown.mean() > 0.3
    apart = np.linalg.norm(bent(points) - anatomy, axis=-1)[shown]
    affine = np.linalg.norm(bent(apply(pose.there.linear, frame.nodes())) - anatomy, axis=-1)[shown]
    assert np.percentile(apart, 99) < 0.6
    assert np.percentile(affine, 95) > 2
    index = pose.back.points(unbent(anatomy))
    assert np.percentile(np.linalg.norm((index - frame.nodes()) * frame.spacing_mm, axis=-1)[shown], 95) < 0.6
    fixed = scan((3, 3, 3), body=bent)[0]
    model = replace(model_of(frame), laid=laid)
    found = regseg.register(model, fixed, exam)  # the same patient in both
    here = unbent(anatomy)[shown]
    assert np.percentile(np.linalg.norm(found.points(here) - here, axis=-1), 95) < 0.8


def test_it_is_kept_with_the_model_and_knows_one_region_alone(laid, tmp_path):
    network = CoordinateNetwork(NetworkConfig(size=16, widths=(8, 16), head_channels=8))
    model = replace(laid.model, network=network).with_regions(TRUNK, replace(TRUNK, name="other"))
    frame = laid.frame(5.0, SCALING)
    kept = regseg.Model(regseg.networks_for(2), frame, {"a": 1, "b": 2}, laid=AtlasGrid.of(model, "trunk"))
    regseg.save(kept, tmp_path / "model")
    read = regseg.load(tmp_path / "model")
    assert isinstance(read.laid, AtlasGrid)
    assert read.frame == frame
    exam, _ = scan((5, 5, 5))
    np.testing.assert_allclose(*(frame.points_mm(exam, one.place(exam).pose) for one in (read, kept)), atol=1e-2)
    checkpoint.save(model, tmp_path / "two")
    with pytest.raises(RegionError, match="one region"):
        atlas_grid.load(tmp_path / "two")


def test_what_cannot_be_laid_is_refused(laid):
    with pytest.raises(RegionError, match="no region or structure 'leg'"):
        AtlasGrid.of(laid.model, "leg")
    with pytest.raises(RegionError, match="enlarge --spacing"):
        laid.frame(0.5)
    legs, _ = scan((6, 6, 6), high=(130, 80, -40))
    with pytest.raises(ExamError, match="trunk, but it shows 0%"):
        laid.pose(legs, laid.frame(5.0))
    for given, why in (([("legs", legs, None)], "shows 0%"), ([], "there are none")):
        with pytest.raises(ExamError, match=f"none can be used.*{why}"):
            laid.cases(given, laid.frame(5.0), (1,))


def test_the_command_line_trains_on_the_atlas_and_leaves_out_what_does_not_show_the_region(laid, call, tmp_path):
    network = CoordinateNetwork(NetworkConfig(size=16, widths=(8, 16), head_channels=8))
    checkpoint.save(replace(laid.model, network=network), tmp_path / "map")
    (tmp_path / "labels").mkdir()
    exams = {"seed": scan((5, 5, 5)), "cut": scan((4, 4, 4), (10, -5, 8), body=moved_by(STRETCH), **SHORT)}
    exams["legs"] = scan((6, 6, 6), high=(130, 80, -40))
    exams["drawn_beside"] = scan((6, 6, 6))
    for name, (exam, _) in exams.items():
        nib.save(nib.Nifti1Image(exam.array, exam.affine), tmp_path / f"{name}.nii.gz")
    seed, places = exams["seed"]
    nib.save(nib.Nifti1Image(balls(places, CENTRE, OTHER), seed.affine), tmp_path / "labels" / "seed.nii.gz")
    beside, places = exams["drawn_beside"]
    far = (places[..., 2] < LOW[2] - 30).astype(np.uint8)
    nib.save(nib.Nifti1Image(far, beside.affine), tmp_path / "labels" / "drawn_beside.nii.gz")
    given = ("regseg", "train", "-i", tmp_path, "-l", tmp_path / "labels", "-o", tmp_path / "out", "--scaling", SCALING)
    code, _, said = call(*given, "--start", tmp_path / "map")
    assert code == 2
    assert "--roi" in said
    steps = ("--registration", 1, "--segmentation", 1, "--joint", 1)
    code, out, said = call(*given, "--start", tmp_path / "map", "--roi", "trunk", "--spacing", 8, *steps)
    assert code == 0, said
    assert "legs is left out" in said
    assert "drawn_beside is left out" in said
    assert "trained on 2 images, 1 of them with labels" in out
    assert json.loads((tmp_path / "out" / "model.json").read_text())["laid"] == "atlas"
    settings = json.loads((tmp_path / "out" / "training" / "state.json").read_text())["settings"]["settings"]
    assert (settings["window"], settings["bending"]) == (REGSEG_CT.window, REGSEG_CT.bending)
    model = regseg.load(tmp_path / "out")
    exam = files.read_image(tmp_path / "cut.nii.gz")
    points = [model.frame.points_mm(exam, pose) for pose in (model.place(exam).pose, laid.pose(exam, model.frame))]
    np.testing.assert_allclose(*points, atol=0.05)
    code, _, said = call(
        "regseg", "segment", "-m", tmp_path / "out", "-i", tmp_path / "legs.nii.gz", "-o", tmp_path / "s"
    )
    assert code == 1
    assert "trunk" in said
