"""A point goes both ways between two exams that were fitted to each other."""

import numpy as np
import torch

from deepatlas import pairs, places
from deepatlas.config import Fitting
from deepatlas.embedding import Embedded
from deepatlas.pairs import Pair
from deepatlas.volume import apply
from test_refine import OFF, SIZE, scene

HOW = Fitting(steps=30, rate=0.01, nodes=5, size=SIZE, learned=False, window=8)
POINTS = np.random.default_rng(0).uniform(-60, 60, (200, 3))


def apart(pair: Pair) -> float:
    """Median distance from where they were: both exams show the same."""
    return float(np.median(np.linalg.norm(pair.carry(POINTS).points_mm - POINTS, axis=1)))


def test_two_exams_that_are_laid_apart_come_together():
    model, exam, truth = scene()
    maps = Embedded(exam, truth + OFF), Embedded(exam, truth)
    before = Pair(*maps, *maps)
    after = pairs.fitted(model, (exam.volume, exam.volume), maps, [HOW, HOW])
    assert apart(after) < 0.4 * apart(before)
    assert after[:2] == maps
    for fitted, start in zip(after[2:], maps, strict=True):  # each moved towards where the other lay
        moved = (fitted.c_atlas - start.c_atlas)[..., 4:-4, 4:-4, 4:-4].mean(dim=(2, 3, 4))
        expected = -OFF if start is maps[0] else OFF
        assert torch.allclose(moved, expected.view(1, 3), atol=0.03)


def test_a_point_lies_in_the_middle_of_both_places():
    _, exam, truth = scene()
    here = Embedded(exam, truth)
    shift_mm = apply(exam.box_to_mm, OFF.view(1, 3).double().numpy())[0] / 0.9
    for fitted in ((here, Embedded(exam, truth + OFF)), (Embedded(exam, truth - OFF), here)):
        found = Pair(here, here, *fitted).carry(POINTS)
        assert found.valid.all()
        np.testing.assert_allclose(found.points_mm, POINTS - shift_mm / 2, atol=0.5)


def test_where_one_way_finds_no_place_the_other_says():
    _, exam, truth = scene()
    here, away = Embedded(exam, truth), Embedded(exam, truth - OFF)
    edge = np.array([[95.0, 0, 0], [0, 0, 90], [-95, 0, 0], [0, 0, 300]])
    pair = Pair(here, here, here, away)
    alone = places.carry(here, away, edge)
    found = pair.carry(edge)
    assert alone.valid.tolist() == [False, True, True, False]
    assert found.valid.tolist() == [True, True, True, False]
    np.testing.assert_allclose(found.points_mm[0], edge[0], atol=0.5)
    np.testing.assert_allclose(found.points_mm[1:3], (edge + alone.points_mm)[1:3] / 2, atol=0.5)
