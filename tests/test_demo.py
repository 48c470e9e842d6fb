"""The demo in small: everything it promises is written, and its measure of coordinates is right."""

import json
from dataclasses import replace
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch

from deepatlas import demo, phantom
from deepatlas.config import DEMO, AutoencoderStage, LevelStage, NetworkConfig, WarmStage
from deepatlas.embedding import Embedded
from deepatlas.prepare import grid_to_box, prepare
from deepatlas.volume import apply

TINY = replace(
    DEMO,
    network=NetworkConfig(size=16, widths=(8, 16), head_channels=8, stem_stride=1),
    autoencoder=AutoencoderStage(steps=2, batch=2, rate=0.003),
    warm=WarmStage(steps=20, batch=4, rate=0.004),
    levels=(LevelStage(steps=2, rate=0.003, warm_up=1, loss_size=16),),
    consolidation=(),
    batch=2,
    atlas_size=16,
)


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A demo with a model too small to be good, and what it said."""
    out = tmp_path_factory.mktemp("demo")
    (out / "mine.txt").write_text("kept")
    said = []
    results = demo.run(out, TINY, exams=2, unseen=1, on_stage=said.append)
    return out, results, said


def test_the_demo_writes_everything(shown):
    out, results, said = shown
    assert {path.name for path in out.iterdir()} == {*demo.PARTS, "mine.txt"}
    assert json.loads((out / "results.json").read_text()) == results
    assert any("Training" in line for line in said)
    seg, exam = (nib.load(out / part) for part in ("found/phantom_000_seg.nii.gz", "unseen/images/phantom_000.nii.gz"))
    assert seg.shape == exam.shape
    assert np.array_equal(seg.affine, exam.affine)


def test_the_test_exams_are_never_trained_on(shown):
    out = shown[0]
    ours, other = (nib.load(out / part / "images" / "phantom_000.nii.gz") for part in ("exams", "unseen"))
    assert ours.shape != other.shape or not np.array_equal(ours.dataobj, other.dataobj)


def test_the_report_holds_the_numbers_of_both(shown):
    out, results, _ = shown
    page = (out / "report.html").read_text()
    assert page.count("data:image/png") == 2  # one exam and the training curve
    for side in ("ours", "plain", "affine"):
        assert f"{results[side]['mean_dice']:.3f}" in page
        assert f"{results[side]['median_mm']:.1f}" in page
    assert "liver" in page
    assert str(out) not in page


def test_a_poor_model_is_said_to_miss_the_goals(shown):
    results = shown[1]
    assert results["ours"]["mean_dice"] < 0.75
    assert any("misses the goals" in line for line in demo.summary(results))
    good = results | {"remarks": []}
    assert len(demo.summary(good)) == 3


def true_map(exam, first, box_to_mm):
    """The map of an exam as it should be: coordinates are places in the box `box_to_mm` of the first exam."""
    prepared = prepare(exam.image, 32)
    nodes = np.stack(np.indices((32,) * 3), axis=-1)
    places = apply(prepared.box_to_mm @ grid_to_box(32), nodes)
    true_mm = first.deformation.from_canonical(exam.deformation.to_canonical(places), tolerance_mm=0.01)
    c = 0.9 * apply(np.linalg.inv(box_to_mm), true_mm)
    return Embedded(prepared, torch.from_numpy(np.moveaxis(c, -1, 0).astype(np.float32))[None])


def test_the_coordinate_error_of_the_true_map_is_small_and_of_a_shifted_one_is_the_shift():
    first, other = phantom.draw(1, "chest"), phantom.draw(2, "chest")
    frame = prepare(first.image, 32).box_to_mm
    seed_map, exam_map = true_map(first, first, frame), true_map(other, first, frame)
    ours, affine, solved = demo.coordinate_error(first, seed_map, other, exam_map)
    assert len(ours) == len(affine) > 1000
    assert np.median(ours) < 0.5
    assert np.median(affine) > 10
    assert solved > 0.95
    shift_mm = np.array([0, 6.0, 0])
    moved = exam_map.c_atlas + torch.from_numpy(0.9 * np.linalg.inv(frame)[:3, :3] @ shift_mm).float().view(
        1, 3, 1, 1, 1
    )
    shifted, again, _ = demo.coordinate_error(first, seed_map, other, exam_map._replace(c_atlas=moved))
    assert np.median(shifted) == pytest.approx(6, abs=0.3)
    assert np.array_equal(again, affine)


def test_the_affine_of_an_exam_to_itself_changes_nothing():
    exam = phantom.draw(3, "pelvis")
    own = true_map(exam, exam, prepare(exam.image, 32).box_to_mm)
    assert np.allclose(demo.body_affine(own, own), np.eye(4))
    laid = demo.affine_labels(exam, own, exam.image, own)
    assert np.array_equal(laid, exam.labels.array)
    half = SimpleNamespace(prepared=SimpleNamespace(size=32, foreground=np.zeros((32,) * 3, bool)))
    half.prepared.foreground[8:24] = True
    whole = SimpleNamespace(prepared=SimpleNamespace(size=32, foreground=np.ones((32,) * 3, bool)))
    ends = apply(demo.body_affine(half, whole), [[8 / 31 * 2 - 1, -1, -1], [23 / 31 * 2 - 1, 1, 1]])
    assert np.allclose(ends, [[-1] * 3, [1] * 3])
