"""The rules by which benchmarks make landmarks, and their sums."""

import numpy as np
import pytest
from benchmarks import adaptation, bridge, landmarks

from deepatlas.transforms import Transform
from deepatlas.volume import Volume, apply

NAMES = {"brainstem": 1, "mandible": 2, "esophagus": 3}


@pytest.fixture(autouse=True)
def table(monkeypatch):
    """The structures' numbers without the data."""
    for module in (landmarks, adaptation, bridge):
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
