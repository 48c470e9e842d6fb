"""The rules by which benchmarks make landmarks, and their sums."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from benchmarks import adaptation, bridge, landmarks, points, teaching

from deepatlas import files
from deepatlas.errors import ExamError
from deepatlas.transforms import Transform
from deepatlas.volume import Volume, apply

NAMES = {"brainstem": 1, "mandible": 2, "esophagus": 3}


@pytest.fixture(autouse=True)
def table(monkeypatch):
    """The structures' numbers without the data."""
    for module in (landmarks, adaptation, bridge, points, teaching):
        monkeypatch.setattr(module, "names", lambda: NAMES)


def horseshoe() -> tuple[Volume, Volume]:
    """A jaw with its chin in front (+y) and angles behind and below, in an exam stored from left to right."""
    affine = np.diag([-2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = (80, -70, -90)
    exam = Volume(np.zeros((80, 80, 90), dtype=np.float32), affine)
    x, y, z = np.moveaxis(apply(affine, np.moveaxis(np.indices(exam.shape), 0, -1)), -1, 0)
    angle = np.arctan2(y, x)
    jaw = (np.abs(np.hypot(x, y) - 40) < 5) & (np.abs(angle - np.pi / 2) < 1.4) & (np.abs(z + y / 4) < 8)
    return exam, Volume(np.where(jaw, 2, 0).astype(np.uint8), affine)


def test_landmarks_lie_where_their_rule_says_in_patient_space():
    found = landmarks.points_of(*horseshoe())
    assert found.keys() == {"chin", "mandible_angle_right", "mandible_angle_left"}
    np.testing.assert_allclose(found["chin"], (0, 43, -10), atol=4)
    right, left = found["mandible_angle_right"], found["mandible_angle_left"]
    assert right[0] > 30
    np.testing.assert_allclose(left, right * (-1, 1, 1), atol=2.5)
    assert right[1] < 15


def test_a_landmark_at_a_cut_end_is_not_marked():
    exam, labels = horseshoe()
    angle = landmarks.points_of(exam, labels)["mandible_angle_right"]
    array = exam.array.copy()
    array[:, :, : int(apply(exam.inverse, angle)[2]) - 2] = -1000
    cut = landmarks.points_of(Volume(array, exam.affine), labels)
    assert cut.keys() == {"chin"}


def test_means_over_structures_and_what_adaptation_gains():
    scores = {"a": {"brainstem": 0.5, "mandible": 0.7}, "b": {"brainstem": 0.7}, "c": {"mandible": 0.9}}
    better = {exam: {name: dice + 0.1 for name, dice in one.items()} for exam, one in scores.items()}
    found = adaptation.summary({"before": scores, "longer": scores, "adapted": better})
    assert found["structures"]["before"] == {"brainstem": 0.6, "mandible": 0.8}
    assert found["dice"] == {"before": 0.7, "longer": 0.7, "adapted": 0.8}
    assert found["adapted_minus"]["before"]["mean"] == pytest.approx(0.1)
    assert found["exams"] == 3


def test_a_registration_of_the_bridge_is_scored_by_the_structures_that_both_exams_show():
    labels = np.zeros((12, 12, 12), np.uint8)
    labels[2:6, 2:6, 2:6], labels[7:10, 7:10, 7:10] = 1, 2
    other = np.where(labels == 2, 3, labels)
    shown = [(None, Volume(one, np.eye(4))) for one in (labels, other)]
    still, by_two = (Transform(np.eye(4), np.full((3, 2, 2, 2), shift), np.eye(4)) for shift in (0.0, 2.0))
    assert bridge.score(still, shown[0], shown[0]) == 1
    assert bridge.score(still, *shown) == 1  # the brainstem; the others are shown by one exam each
    assert bridge.score(by_two, *shown) == pytest.approx(1 / 8)


def test_points_are_compared_by_middles_without_known_faults(monkeypatch):
    monkeypatch.setattr(points, "CUT_STRUCTURES", ("brainstem", "mandible"))
    monkeypatch.setattr(points, "faulty", lambda: {"mandible": ["b"]})
    labels = np.zeros((8, 8, 8), np.uint8)
    labels[1:4, 2, 3], labels[6, 6, 5:8] = 1, 2
    drawn = Volume(labels, np.diag([-2.0, 2.0, 3.0, 1.0]))
    assert {name: place.tolist() for name, place in points.middles("a", drawn).items()} == {
        "brainstem": [-4, 4, 9],
        "mandible": [-12, 12, 18],
    }
    assert points.middles("b", drawn).keys() == {"brainstem"}
    assert points.apart(np.array([[0.0, 3, 4]]), np.zeros((1, 3))).tolist() == [5]


def written(folder: Path, exams: dict[str, np.ndarray]) -> None:
    """Images and label maps of training exams; a label map shows the structures of the given numbers."""
    for part in ("images", "labels"):
        (folder / "train" / part).mkdir(parents=True)
    for name, numbers in exams.items():
        labels = np.zeros((5, 5, 5), np.int16)
        labels[1:4] = np.resize(numbers, (3, 5, 5))
        for part, array in (("images", np.where(labels > 0, 40, -1000)), ("labels", labels)):
            image = nib.Nifti1Image(array.astype(np.int16), np.diag([9.0, 9, 9, 1]))
            image.to_filename(folder / "train" / part / f"{name}.nii.gz")


def test_the_map_is_taught_by_whole_label_maps_and_by_predictions_for_the_others(tmp_path, monkeypatch):
    written(tmp_path, {"a": [1, 2, 3], "b": [1, 2, 3], "c": [1, 3], "d": [3, 2, 1], "e": [3]})
    monkeypatch.setattr(teaching, "folder", lambda: tmp_path)
    monkeypatch.setattr(teaching, "faulty", lambda: {"mandible": ["b"]})
    assert teaching.labelled_exams() == ["a", "d"]

    def segment(_model, exam):
        if exam.name == "c":
            raise ExamError("nothing of it is shown")
        return np.full(exam.shape, 2, np.int32)

    monkeypatch.setattr(teaching.regseg, "segment", segment)
    out = tmp_path / "predicted"
    out.mkdir()
    teaching.predictions(None, ["a", "d"], tmp_path / "train" / "labels", out)
    shown = {files.exam_name(path): np.unique(files.read_labels(path).array).tolist() for path in out.iterdir()}
    assert shown == {"a": [0, 1, 2, 3], "d": [0, 1, 2, 3], "b": [2], "e": [2]}


def test_what_predictions_gain_is_paired_by_exam():
    scores = {"a": {"brainstem": 0.5, "mandible": 0.7}, "b": {"brainstem": 0.7}}
    better = {exam: {name: dice + 0.1 for name, dice in one.items()} for exam, one in scores.items()}
    found = teaching.summary({"regseg": scores, "before": scores, "drawn": scores, "predicted": better})
    assert found["dice"] == {"regseg": 0.65, "before": 0.65, "drawn": 0.65, "predicted": 0.75}
    assert found["predicted_minus"]["drawn"]["mean"] == pytest.approx(0.1)
