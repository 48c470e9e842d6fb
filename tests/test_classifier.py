"""Voxel classifiers: what they are shown of an exam, what they learn from, and what `locate` draws by them."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deepatlas import checkpoint, classifier
from deepatlas.atlas import LEVELS
from deepatlas.classifier import STEP_MM, Sample, learn, surroundings, taught, voxels_of
from deepatlas.config import Classifying
from deepatlas.errors import ModelError
from deepatlas.locate import define, locate
from deepatlas.networks import CoordinateNetwork, VoxelClassifier
from deepatlas.volume import Volume, apply
from exact import (
    CENTRE,
    FRAME,
    OTHER,
    RADII,
    RADIUS,
    affine_of,
    balls,
    blank,
    dice,
    exact,
    in_body,
    moved_by,
    places_of,
    rotated,
    scan,
)

QUICK = Classifying(least_exams=6, width=24, points=30_000, batch=1024, together=128, rate=4e-3, warm_up=10)
SHIFTS = np.array([[6, 0, -5], [-7, 4, 0], [0, -6, 6], [5, 5, 5], [-5, -4, -6], [0, 7, 0], [-6, 0, 6], [4, -6, -4]])
"""mm: where the ball truly lies in each exam, which the map does not know."""


def bright(shift: np.ndarray, spacing=(4, 4, 4), degrees=(0.0, 0.0, 0.0), **field) -> tuple[Volume, Volume]:
    """An exam whose ball is brighter than the rest and off its place, and its label map."""
    exam, places = scan(spacing, degrees, **field)
    labels = balls(places, CENTRE + shift)
    hu = np.where(labels > 0, 220, exam.array)
    return Volume(hu.astype(np.int16), exam.affine), Volume(labels.astype(np.int16), exam.affine)


@pytest.fixture(scope="module")
def labelled() -> list[tuple[Volume, Volume]]:
    return [bright(shift) for shift in SHIFTS]


@pytest.fixture(autouse=True)
def known_maps(monkeypatch):
    monkeypatch.setattr(sys.modules["deepatlas.locate"], "embed", exact)


@pytest.fixture(scope="module")
def model(labelled):
    """A model whose mask of the ball is the mean of its places, without HU."""
    maps = [exact(blank(), exam) for exam, _ in labelled]
    known = define(blank(), labelled, {"ball": 1}, embedded=maps)
    return known.with_structures(replace(known.structures["ball"], tissue=None))


@pytest.fixture(scope="module")
def samples(model, labelled) -> list[Sample]:
    return [Sample.of(model.structures["ball"], exam, labels, exact(model, exam)) for exam, labels in labelled]


@pytest.fixture(scope="module")
def learned(samples) -> tuple[VoxelClassifier, float, float]:
    return learn(samples, QUICK)


def ramp(places: np.ndarray) -> np.ndarray:
    return 20 + places @ np.array([1.5, -0.8, 1.1])


@pytest.fixture(scope="module")
def on_a_ramp(model):
    """What is seen of the ball where HU rise evenly, on a turned grid."""
    exam, places = scan((3.5, 4.5, 3), (20, -15, 30))
    exam = Volume(ramp(places).astype(np.float32), exam.affine)
    return surroundings(model.structures["ball"], exam, exact(model, exam))


def test_what_is_seen_lies_where_it_says(model, on_a_ramp):
    places = places_of(on_a_ramp.near.shape, on_a_ramp.affine)
    close = np.linalg.norm(places - CENTRE, axis=-1) < RADIUS + 10
    for hu in (on_a_ramp.near, on_a_ramp.far):
        np.testing.assert_allclose(200 * hu[close].float(), ramp(places)[close], atol=0.3)
    np.testing.assert_allclose(np.diag(on_a_ramp.affine), [STEP_MM] * 3 + [1])
    points = places[tuple(on_a_ramp.points.T.numpy())]
    far = np.linalg.norm(points - CENTRE, axis=-1)
    assert far.max() < RADIUS + 30
    everywhere = np.linalg.norm(places - CENTRE, axis=-1)
    assert len(far[far < RADIUS - 8]) == (everywhere < RADIUS - 8).sum()
    middle = on_a_ramp.own_box[np.linalg.norm(points - CENTRE, axis=-1).argmin()]
    assert middle.abs().max() < 0.2


def test_the_grid_stands_upright_however_the_patient_lies(model):
    pose = affine_of(rotated((20, -30, 170)), (15, -10, 20))
    exam, _ = scan((4, 4, 4), low=(-250, -250, -250), high=(250, 250, 250), body=moved_by(pose))
    ball = model.structures["ball"]
    seen = surroundings(ball, exam, exact(model, exam, body=moved_by(pose)))
    still = surroundings(ball, *(lambda one: (one, exact(model, one)))(scan((4, 4, 4))[0]))
    np.testing.assert_allclose(seen.affine[:3, :3], STEP_MM * pose[:3, :3].T, atol=0.1)
    assert 0.8 < len(seen.points) / len(still.points) < 1.25


def test_a_point_is_shown_what_surrounds_it(on_a_ramp):
    rows = torch.tensor([0, len(on_a_ramp.points) // 2, len(on_a_ramp.points) - 1])
    inputs = on_a_ramp.inputs(rows)
    assert inputs.shape == (3, VoxelClassifier.INPUTS)
    nodes = on_a_ramp.points[rows]
    start = 0
    for values, reach, step in ((on_a_ramp.near, 3, 1), (on_a_ramp.far, 3, 2), (on_a_ramp.odds / 3, 1, 2)):
        for row, (i, j, k) in enumerate(nodes.tolist()):
            around = [slice(n - reach * step, n + reach * step + 1, step) for n in (i, j, k)]
            part = inputs[row, start : start + (2 * reach + 1) ** 3]
            torch.testing.assert_close(part, values[tuple(around)].flatten().float(), atol=2e-3, rtol=1e-3)
        start += (2 * reach + 1) ** 3
    torch.testing.assert_close(inputs[:, start:], on_a_ramp.own_box[rows])


def test_nothing_is_seen_of_what_an_exam_does_not_show(model):
    exam, _ = scan((4, 4, 4), high=(130, 80, CENTRE[2] - 60))
    assert surroundings(model.structures["ball"], exam, exact(model, exam)) is None


def test_fine_voxels_are_averaged():
    noise = np.random.default_rng(0).normal(0, 100, (60, 60, 60)).astype(np.float32)
    exam = Volume(noise + np.float32(50), np.diag([1 + 1e-9, 1, 1 - 1e-9, 1]))  # as a turned affine is read back
    affine = np.diag([3.0, 3, 3, 1])
    affine[:3, 3] = 6
    found = classifier._hu(exam, affine, (16, 16, 16))
    blocks = exam.array[5:53, 5:53, 5:53].reshape(16, 3, 16, 3, 16, 3).mean(axis=(1, 3, 5))
    np.testing.assert_allclose(found, blocks, atol=1e-3)


def test_exams_of_fine_voxels_are_judged_on_every_nth(model):
    exam, labels = bright(np.zeros(3), (1, 1.5, 2.5), low=CENTRE - 60, high=CENTRE + 60)
    embedded = exact(model, exam)
    sample = Sample.of(model.structures["ball"], exam, labels, embedded)
    every = labels.array[::2] > 0
    assert sample.drawn == every.sum() == sample.inside.sum()
    odds = sample.seen.odds.float().numpy()
    whole = voxels_of(model.structures["ball"], exam, embedded, sample.seen)
    assert 1.9 < whole.index.shape[1] / sample.index.shape[1] < 2.1
    mask = np.zeros(exam.shape, bool)
    mask[whole.block][whole.near] = classifier._read(odds, whole.index) > 0
    middle = len(LEVELS) // 2
    assert float(LEVELS[middle]) == 0.5
    np.testing.assert_allclose(sample.scores(odds)[0, middle], dice(mask[::2], every), atol=1e-6)


def test_a_classifier_begins_by_adding_nothing_and_its_members_stand_apart():
    network, x = VoxelClassifier(3, 8), torch.randn(5, VoxelClassifier.INPUTS)
    assert not network(x).any()
    torch.nn.init.normal_(network.weights[-1])
    before = network(x)
    assert before.shape == (3, 5)
    with torch.no_grad():
        network.weights[0][1] *= 2
    changed = (network(x) != before).any(dim=1)
    assert changed.tolist() == [False, True, False]


def test_a_member_learns_nothing_from_the_exams_that_judge_it(samples):
    network, _, _ = learn(samples[:1], replace(QUICK, points=4000))
    last = network.weights[-1].abs().amax(dim=(1, 2))
    assert last[0] == 0
    assert (last[1:] > 0).all()


def test_the_look_of_a_structure_is_learned(samples, learned):
    network, alone, score = learned
    truth = np.mean([sample.scores(sample.seen.odds.float().numpy()) for sample in samples], axis=0)
    assert alone == truth.max() < 0.85
    assert score > 0.95
    assert 0.1 <= float(network.level) <= 0.9


def test_learning_repeats_itself(samples):
    first, second = (learn(samples[:3], replace(QUICK, points=1000)) for _ in range(2))
    assert first[1:] == second[1:]
    for one, other in zip(first[0].state_dict().values(), second[0].state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_samples_come_back_from_disk(samples, tmp_path):
    samples[0].write(tmp_path / "one.npz")
    back = Sample.read(tmp_path / "one.npz")
    for before, after in zip([*samples[0].seen, *samples[0][1:]], [*back.seen, *back[1:]], strict=True):
        np.testing.assert_array_equal(np.asarray(before), np.asarray(after))
        assert type(before) is type(after)


def test_a_look_that_few_exams_show_is_not_learned(model, labelled):
    few = ((exam, labels, exact(model, exam)) for exam, labels in labelled[:5])
    assert taught(model.structures.values(), few, QUICK) == []


def test_a_classifier_that_is_no_better_is_not_kept(model):
    """Nothing in these exams says where the ball was drawn: it lies off its place by chance."""
    chance = np.random.default_rng(1)
    exams = []
    for shift in SHIFTS:
        exam, places = scan((4, 4, 4))
        noise = Volume(
            np.where(exam.array > -900, chance.normal(0, 60, exam.shape), -1000).astype(np.int16), exam.affine
        )
        exams.append((noise, Volume(balls(places, CENTRE + shift).astype(np.int16), exam.affine), exact(model, noise)))
    (one,) = taught(model.structures.values(), exams, QUICK)
    assert (one.exams, one.structure.classifier) == (8, None)
    assert one.learned <= one.alone < 0.9


def test_a_classifier_that_adds_nothing_is_not_kept(model, labelled):
    """Level and weight are chosen on the exams that judge: that alone must not speak for it."""
    maps = [(exam, labels, exact(model, exam)) for exam, labels in labelled]
    (one,) = taught(model.structures.values(), maps, replace(QUICK, points=100, rate=0.0))
    assert (one.learned, one.structure.classifier) == (one.alone, None)


def test_settings_that_leave_nobody_to_judge_are_refused():
    for wrong in ({"members": 1}, {"together": 9000}, {"together": 0}):
        with pytest.raises(ValueError, match="members"):
            replace(QUICK, **wrong)


def test_what_is_learned_is_drawn(model, labelled):
    maps = [(exam, labels, exact(model, exam)) for exam, labels in labelled]
    counted = []
    (one,) = taught(model.structures.values(), maps, QUICK, lambda *at: counted.append(at))
    assert counted == [(1, 1, "ball")]
    assert (one.exams, one.structure.name) == (8, "ball")
    exam, labels = bright(np.array([-3.0, -6, 4]), (2, 3, 5), (20, -15, 30))
    by_map = locate(model, exam)["ball"]
    found = locate(model.with_structures(one.structure), exam)["ball"]
    assert dice(by_map.mask, labels.array > 0) < 0.87
    assert dice(found.mask, labels.array > 0) > 0.93
    assert (found.status, found.label, found.coverage) == ("present", 1, by_map.coverage)
    np.testing.assert_allclose(found.centroid_mm, CENTRE + np.array([-3, -6, 4]), atol=1)


def test_each_structure_learns_from_the_exams_that_show_it(model, labelled, monkeypatch):
    """What is learned from waits on disk, and nothing of it is left there."""
    ball = model.structures["ball"]
    both = [ball, replace(ball, name="second", label=2)]
    maps = [
        (exam, Volume(labels.array * (2 if number == 3 else 1), labels.affine), exact(model, exam))
        for number, (exam, labels) in enumerate(labelled)
    ]
    folders, learned_from = [], []
    temporary = classifier.tempfile.TemporaryDirectory

    def folder():
        folders.append(temporary())
        return folders[-1]

    def instead(samples, how):
        learned_from.append([sample.drawn for sample in samples])
        return VoxelClassifier(1, 4), 0.5, 0.6

    monkeypatch.setattr(classifier.tempfile, "TemporaryDirectory", folder)
    monkeypatch.setattr(classifier, "learn", instead)
    made = taught(both, maps, replace(QUICK, least_exams=1))
    assert [(one.structure.name, one.exams) for one in made] == [("ball", 7), ("second", 1)]
    drawn = [int((labels.array > 0).sum()) for _, labels in labelled]
    assert learned_from == [drawn[:3] + drawn[4:], drawn[3:4]]
    assert not any(Path(one.name).exists() for one in folders)


def drawing(**radii: float):
    """In the place of `classifier.likely`: balls around `CENTRE`, surer the farther a voxel lies from the surface."""

    def instead(structure, exam, embedded):
        far = np.linalg.norm(places_of(exam.shape, exam.affine) - CENTRE, axis=-1)
        likely = 1 / (1 + np.exp((far - radii[structure.name]) / 10))
        return (slice(None),) * 3, likely.astype(np.float32)

    return instead


@pytest.fixture
def two(labelled):
    """A model of two structures, the first of which has a classifier."""
    exam, places = scan((4, 4, 4))
    known = define(
        blank(), [(exam, Volume(balls(places, CENTRE, OTHER).astype(np.int16), exam.affine))], {"a": 1, "b": 2}
    )
    return known.with_structures(replace(known.structures["a"], classifier=VoxelClassifier(1, 4)))


def by_the_map(model, exam):
    return locate(model.with_structures(replace(model.structures["a"], classifier=None)), exam)


def test_other_structures_keep_what_a_classifier_leaves_them(two, monkeypatch):
    exam, places = scan((4, 3, 5), (5, -8, 12))
    before = by_the_map(two, exam)
    monkeypatch.setattr(classifier, "likely", drawing(a=75))
    found = locate(two, exam)
    np.testing.assert_array_equal(found["a"].mask, np.linalg.norm(places - CENTRE, axis=-1) < 75)
    np.testing.assert_array_equal(found["b"].mask, before["b"].mask & ~found["a"].mask)
    assert 0 < found["b"].mask.sum() < before["b"].mask.sum()
    assert found["a"].volume_ml == pytest.approx(found["a"].mask.sum() * 4 * 3 * 5 / 1000)
    assert 0 <= found["a"].confidence <= 1


def test_a_voxel_goes_to_the_classifier_that_exceeds_its_level_most(two, monkeypatch):
    exam, _ = scan((4, 4, 4))
    surer = VoxelClassifier(1, 4)
    surer.level.fill_(0.2)
    both = two.with_structures(replace(two.structures["b"], classifier=surer))
    monkeypatch.setattr(classifier, "likely", drawing(a=60, b=55))
    found = locate(both, exam)
    likely = [drawing(a=60, b=55)(both.structures[name], exam, None)[1] for name in "ab"]
    exceeds = [(likely[0] - 0.5) / 0.5, (likely[1] - 0.2) / 0.8]
    np.testing.assert_array_equal(found["a"].mask, (exceeds[0] > 0) & (exceeds[0] >= exceeds[1]))
    np.testing.assert_array_equal(found["b"].mask, (exceeds[1] > 0) & (exceeds[0] < exceeds[1]))
    assert found["a"].mask.any()


def test_where_a_classifier_draws_nothing_the_map_answers(two, monkeypatch):
    exam, _ = scan((4, 4, 4))
    before = by_the_map(two, exam)
    monkeypatch.setattr(classifier, "likely", drawing(a=-50))
    found = locate(two, exam)
    for name in "ab":
        np.testing.assert_array_equal(found[name].mask, before[name].mask)
        assert found[name].confidence == before[name].confidence


def test_a_classifier_draws_within_the_patient_what_the_mask_calls_possible():
    skin = FRAME[:3, 3] + [RADII[0], 0, 0]
    exam, places = scan((4, 4, 4))
    labels = Volume(balls(places, skin).astype(np.int16), exam.affine)
    known = define(blank(), [(exam, labels)], {"a": 1})
    everything = VoxelClassifier(1, 4)
    with torch.no_grad():
        everything.biases[-1].fill_(50)
    mask = locate(known.with_structures(replace(known.structures["a"], classifier=everything)), exam)["a"].mask
    far = np.linalg.norm(places - skin, axis=-1)
    assert mask[in_body(places) & (far < RADIUS)].all()
    assert not mask[far > RADIUS + 25].any()
    outside = ~in_body(places, depth_mm=-14) & (far < RADIUS)  # the map's nodes lie 10 mm apart
    assert outside.any()
    assert not mask[outside].any()


def test_a_structure_is_drawn_to_the_end_of_a_cut_exam(two):
    cut, _ = scan((2, 2, 2.5), high=(130, 80, CENTRE[2] + 1))
    before = by_the_map(two, cut)["a"].mask
    found = locate(two, cut)["a"].mask
    for last in (-1, -2, -3):
        assert found[..., last].sum() > 0.9 * before[..., last].sum() > 0


def test_what_is_absent_is_not_drawn(two, monkeypatch):
    cut, _ = scan((4, 4, 4), high=(130, 80, CENTRE[2] - 45))
    before = by_the_map(two, cut)
    monkeypatch.setattr(classifier, "likely", drawing(a=500))
    found = locate(two, cut)
    assert (found["a"].status, found["a"].mask) == ("absent", None)
    np.testing.assert_array_equal(found["b"].mask, before["b"].mask)


def test_voxels_lie_where_they_say_and_their_hu_speak(labelled):
    maps = [exact(blank(), exam) for exam, _ in labelled]
    ball = define(blank(), labelled, {"ball": 1}, embedded=maps).structures["ball"]
    exam, labels = bright(np.array([3, 3, 3]), (3, 5, 4), (20, -15, 30))
    embedded = exact(blank(), exam)
    seen = surroundings(ball, exam, embedded)
    voxels = voxels_of(ball, exam, embedded, seen)
    own = np.argwhere(voxels.near) + [part.start for part in voxels.block]
    np.testing.assert_allclose(apply(seen.affine, voxels.index.T), apply(exam.affine, own), atol=1e-3)
    inside = labels.array[tuple(own.T)] > 0
    assert inside.sum() == (labels.array > 0).sum()
    assert voxels.moved[inside].mean() > 0.5  # bright as the ball is in the exams that were counted
    assert voxels.moved[~inside].mean() < 0
    scores = Sample.of(ball, exam, labels, embedded).scores(np.zeros(seen.near.shape, np.float32))
    for row, hu in enumerate((0, 0.5, 1)):
        likely = 1 / (1 + np.exp(-hu * voxels.moved))
        truth = [dice(likely > level, inside) for level in LEVELS.numpy()]
        np.testing.assert_allclose(scores[row], truth, atol=1e-3)


@pytest.fixture
def stored(model, learned, tmp_path):
    """A model with a classifier for one of two structures, and its folder."""
    network = CoordinateNetwork(replace(model.network.config, widths=(8, 8), head_channels=8))
    ball = replace(model.structures["ball"], classifier=learned[0])
    whole = replace(model, network=network).with_structures(replace(ball, name="plain", classifier=None), ball)
    checkpoint.save(whole, tmp_path / "m")
    return whole, tmp_path / "m"


def test_classifiers_come_back_and_go_with_their_structure(stored):
    whole, folder = stored
    again = checkpoint.load(folder).structures
    assert again["plain"].classifier is None
    found = again["ball"].classifier
    for name, value in whole.structures["ball"].classifier.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, atol=1e-3, rtol=1e-3)
    assert not any(weight.requires_grad for weight in found.parameters())
    checkpoint.save_structures(whole.without("ball"), folder)
    assert not (folder / "classifiers.safetensors").exists()
    assert checkpoint.load(folder).structures["plain"].classifier is None


@pytest.mark.parametrize("sizes", [[3, 10**9], [0, 24], [3], "3 24", [3, 48]])
def test_classifiers_that_do_not_fit_are_refused(stored, sizes):
    folder = stored[1]
    about = json.loads((folder / "model.json").read_text())
    place = next(n for n, one in enumerate(about["structures"]) if one["name"] == "ball")
    about["structures"][place]["classifier"] = sizes
    (folder / "model.json").write_text(json.dumps(about))
    with pytest.raises(ModelError):
        checkpoint.load(folder)


def test_a_model_without_its_classifiers_is_refused(stored):
    (stored[1] / "classifiers.safetensors").unlink()
    with pytest.raises(ModelError, match="classifiers"):
        checkpoint.load(stored[1])
