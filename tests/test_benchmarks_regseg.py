"""A tiny version of the one-label comparison: every arm is trained, scored and compared as the real one is."""

from dataclasses import replace

import numpy as np
import pytest
from benchmarks import regseg as comparison

from deepatlas import common_grid, regseg, regseg_scores
from deepatlas.config import RegSeg
from deepatlas.errors import ModelError
from deepatlas.volume import Volume

CLASSES = {"core": 3, "shell": 5}
SETTINGS = replace(RegSeg(), registration=3, segmentation=2, joint=4, ratio=2, batch=1)


@pytest.fixture
def data():
    """Six balls with a shell, of unequal size and place; two of them to look at."""
    where = np.indices((16, 16, 16)).transpose(1, 2, 3, 0)
    exams = {}
    for number in range(6):
        far = np.linalg.norm(where - 7.5 - np.array([number % 3 - 1, 0, number % 2]), axis=-1)
        labels = np.where(far < 3, 3, np.where(far < 5 + number / 4, 5, 0)).astype(np.uint8)
        image = (100.0 * (labels == 3) + 60.0 * (labels == 5) + far).astype(np.float32)
        exams[f"exam_{number}"] = (Volume(image, np.eye(4)), Volume(labels, np.eye(4)))
    train = {name: exams[name] for name in list(exams)[:4]}
    frame = common_grid.Frame((16, 16, 16), (1.0, 1.0, 1.0))
    volumes, labels = ({name: both[part] for name, both in train.items()} for part in (0, 1))
    cases = common_grid.cases_of(volumes, labels, frame, tuple(CLASSES.values()))
    cases, laid = common_grid.laid_together(cases)
    unseen = list(exams)[4:]
    return comparison.Data(exams, cases, frame, CLASSES, unseen, regseg_scores.random_pairs(unseen, 2), laid)


def test_every_arm_is_trained_and_scored(data, tmp_path, monkeypatch):
    steps: dict[str, int] = {}
    original = regseg.Run.registration_step, regseg.Run.segmentation_step
    monkeypatch.setattr(regseg.Run, "registration_step", counted(steps, "registration", original[0]))
    monkeypatch.setattr(regseg.Run, "segmentation_step", counted(steps, "segmentation", original[1]))
    bench = comparison.Bench(data, tmp_path, SETTINGS)
    chosen = comparison.choices(data, 1)[:2]
    found = comparison.compare(bench, 1, chosen)
    for arm in comparison.ARMS:
        for part in ("registration", "segmentation"):
            score = found[arm][f"{part}_dice"]
            assert (score is None) == (part not in comparison.HAS[arm])
            assert score is None or 0 <= score <= 1
    for part in ("registration", "segmentation"):
        mean = found["joint"][f"{part}_dice"] - found[f"{part}_alone"][f"{part}_dice"]
        assert found["joint_minus_alone"][part]["mean"] == pytest.approx(mean, abs=2e-4)
    assert found["joint_minus_alone"]["registration"]["n"] == 2
    # one registration for both choices, 3 + 4 steps; the same number for each joint training, 4 of them its own
    assert steps["registration"] == 3 + 4 + 2 * 4
    # alone 2 + 4 / 2; 2 that semi and joint have in common, and each of them 2 more
    assert steps["segmentation"] == 2 * ((2 + 4 // 2) + 2 + 2 * 4 // 2)
    again = comparison.compare(comparison.Bench(data, tmp_path, SETTINGS), 1, chosen)
    assert again == found  # read back, nothing is trained twice
    assert steps["registration"] == 3 + 4 + 2 * 4
    with pytest.raises(ModelError, match="another settings"):
        comparison.compare(comparison.Bench(data, tmp_path, replace(SETTINGS, bending=0.7)), 1, chosen)


def counted(steps, name, original):
    """The function, which also counts its calls."""

    def run(self, *given):
        steps[name] = steps.get(name, 0) + 1
        return original(self, *given)

    return run


def test_choices_are_the_same_for_every_arm_and_differ_from_each_other(data):
    assert comparison.choices(data, 2) == comparison.choices(data, 2)
    assert len({tuple(one) for one in comparison.choices(data, 1)}) > 1


def test_where_all_images_are_labelled_the_choices_are_seeds(data, tmp_path):
    bench = comparison.Bench(data, tmp_path, replace(SETTINGS, registration=1, segmentation=1, joint=2))
    arms = [bench.arms(4, number, labelled) for number, labelled in enumerate(comparison.choices(data, 4)[:2])]
    for arm in ("segmentation_alone", "semi", "joint"):
        one, other = (dict(each[arm].networks.segmentation.named_parameters()) for each in arms)
        assert any(not values.equal(other[name]) for name, values in one.items())
