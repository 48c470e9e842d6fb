"""The likeness of an exam and the atlas aligned to it: high by the true map, low by another, nothing where it folds."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from deepatlas import embedding, grid
from deepatlas.checkpoint import MARGIN
from deepatlas.embedding import Embedded, embed, likeness_of
from deepatlas.prepare import Prepared, sample_mm
from deepatlas.volume import Volume, apply
from exact import rotated
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


@pytest.mark.parametrize("leans", [False, True])
def test_an_oblique_exam_is_read_as_it_looks_more_like_the_atlas(shown, monkeypatch, leans):
    """The grid alone leans, or the patient with it; the network would see what it knows only where he is upright."""
    model, seen = shown
    model = replace(model, region="150mm")
    turn = np.eye(4)
    turn[:3, :3] = rotated((0, 25, 0))
    straight = seen.prepared.volume
    oblique = Volume(straight.array, turn @ straight.affine)
    if not leans:
        places = apply(oblique.affine, np.moveaxis(np.indices(oblique.shape), 0, -1))
        oblique = Volume(sample_mm(straight, places), oblique.affine)

    def upright_map(_, prepared: Prepared) -> Embedded:
        share = np.linalg.norm(prepared.box_to_mm[:3, 0]) / np.linalg.norm(seen.prepared.box_to_mm[:3, 0])
        return Embedded(prepared, MARGIN * share * grid.identity(prepared.hu.shape))

    monkeypatch.setattr(embedding, "map_prepared", upright_map)
    found = embed(model, oblique)
    axes = found.prepared.box_to_mm[:3, :3] / np.linalg.norm(found.prepared.box_to_mm[:3, :3], axis=0)
    np.testing.assert_allclose(axes, turn[:3, :3] if leans else np.eye(3), atol=1e-9)
