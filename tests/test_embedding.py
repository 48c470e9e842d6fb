"""The likeness of an exam and the atlas aligned to it: high by the true map, low by another, nothing where it folds."""

import numpy as np
import pytest
import torch

from deepatlas import grid
from deepatlas.embedding import Embedded, embed, likeness_of
from deepatlas.prepare import Prepared
from test_refine import SIZE, scene


@pytest.fixture(scope="module")
def shown():
    """A model, and an exam with its true map."""
    model, exam, truth = scene()
    return model, Embedded(exam, truth)


def test_the_true_map_is_liked_best(shown):
    model, seen = shown
    best = likeness_of(model, seen).of_exam()
    assert 0.9 < best <= 1
    last = best
    for shift in (0.03, 0.06, 0.12):
        now = likeness_of(model, Embedded(seen.prepared, seen.c_atlas + shift)).of_exam()
        assert now < last
        last = now


def test_a_fold_is_liked_nowhere(shown):
    model, seen = shown
    mirrored = seen.c_atlas * torch.tensor([-1.0, 1.0, 1.0]).view(1, 3, 1, 1, 1)
    assert likeness_of(model, Embedded(seen.prepared, mirrored)).of_exam() == 0


def test_only_the_patient_counts(shown):
    model, seen = shown
    half = seen.prepared.foreground.copy()
    half[: SIZE // 2] = False
    c_atlas = seen.c_atlas.clone()
    c_atlas[:, :, : SIZE // 2 - 4] = 0.9  # nonsense beside the patient
    spoilt = Embedded(Prepared(seen.prepared.hu, half, seen.prepared.box_to_mm), c_atlas)
    assert likeness_of(model, spoilt).of_exam() > 0.85


def test_what_is_known_is_not_measured_again(shown):
    model, seen = shown
    known = likeness_of(model, Embedded(seen.prepared, seen.c_atlas + 0.1))
    assert likeness_of(model, seen._replace(alike=known)) is known


def test_a_map_lies_on_the_grid_that_was_prepared(shown):
    model, seen = shown
    found = embed(model, seen.prepared.volume)
    size = found.prepared.hu.shape
    assert found.c_atlas.shape == (1, 3, *size)
    assert found.foreground.shape == (1, 1, *size)
    assert np.array_equal(found.foreground[0, 0].numpy(), found.prepared.foreground)
    assert found.c_atlas.abs().max() <= 1
    own = model.network(torch.from_numpy(found.prepared.image)[None, None], model.level)
    torch.testing.assert_close(found.c_atlas, grid.resize(own, size).detach(), atol=1e-5, rtol=0)
