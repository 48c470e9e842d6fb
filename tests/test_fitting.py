"""A map that is off is brought back by the image alone, and one that fits is not made worse."""

from dataclasses import replace

import pytest
import torch

from deepatlas import grid
from deepatlas.autoencoder import Autoencoder
from deepatlas.config import Fitting, Weights
from deepatlas.fitting import fit
from deepatlas.masks import Masks
from deepatlas.objective import Atlas, Exams

SIZE = 20
HOW = Fitting(steps=30, rate=0.01, nodes=5, size=SIZE)


@pytest.fixture(scope="module")
def scene():
    """A textured atlas, and an exam that is the atlas itself: its true map is the identity."""
    chance = torch.Generator().manual_seed(3)
    coarse = torch.rand(1, 1, 8, 8, 8, generator=chance)
    image = grid.resize(coarse, (SIZE,) * 3)
    torch.manual_seed(0)
    autoencoder = Autoencoder().requires_grad_(False)
    mm = torch.eye(3)[None] * 100
    exam = Exams(image, torch.ones_like(image, dtype=torch.bool), mm)
    return exam, Atlas(image, mm), autoencoder


def test_a_displaced_map_is_brought_back(scene):
    exam, atlas, autoencoder = scene
    truth = grid.identity((SIZE,) * 3)
    start = (truth + torch.tensor([0.08, -0.06, 0.05]).view(1, 3, 1, 1, 1)).clamp(-1, 1)
    found = fit(start, exam, atlas, autoencoder, Weights(window=8), HOW)
    moved = start + found.residual
    inner = (slice(None), slice(None), *(slice(4, -4),) * 3)
    before = (start - truth)[inner].norm(dim=1).mean()
    after = (moved - truth)[inner].norm(dim=1).mean()
    assert after < 0.4 * before
    assert (found.after < found.before).all()


def test_a_perfect_map_is_left_alone(scene):
    exam, atlas, autoencoder = scene
    truth = grid.identity((SIZE,) * 3)
    found = fit(truth, exam, atlas, autoencoder, Weights(window=8), HOW)
    assert (found.after <= found.before).all()
    assert found.residual.abs().max() < 0.02


def test_every_exam_of_a_batch_keeps_its_own_best(scene):
    exam, atlas, autoencoder = scene
    truth = grid.identity((SIZE,) * 3)
    start = torch.cat([truth, (truth + 0.07).clamp(-1, 1)])
    both = Exams(*(part.expand(2, *part.shape[1:]) for part in exam[:3]))
    found = fit(start, both, atlas, autoencoder, Weights(window=8), HOW)
    alone = fit(start[1:], exam, atlas, autoencoder, Weights(window=8), HOW)
    assert torch.allclose(found.residual[1], alone.residual[0], atol=2e-3)
    assert found.residual[0].abs().max() < 0.02


def test_a_drawn_structure_is_matched_where_the_image_says_nothing(scene):
    exam, atlas, autoencoder = scene
    where = grid.identity((SIZE,) * 3)
    shift = torch.tensor([0.15, 0.0, 0.0]).view(1, 3, 1, 1, 1)
    blank = torch.full_like(exam.image, 0.5)
    number = (where.norm(dim=1) < 0.35).to(torch.uint8)
    known = torch.tensor([-torch.inf, torch.inf]).view(1, 1, 2)
    drawn = Masks(number, where[:, 2], known, torch.ones_like(number, dtype=torch.bool))
    soft = ((where - shift).norm(dim=1, keepdim=True) < 0.35).float()
    flat = Atlas(torch.full_like(atlas.image, 0.5), atlas.mm_per_atlas, soft)
    found = fit(where, exam._replace(image=blank, masks=drawn), flat, autoencoder, Weights(window=8, labels=1), HOW)
    middle = found.residual[0, 0][number[0] > 0].mean()
    assert float(middle) == pytest.approx(0.15, abs=0.04)
    assert float(found.labels) < 0.2
    silent = fit(where, exam._replace(image=blank), flat, autoencoder, Weights(window=8, labels=1), HOW)
    assert float(silent.residual.abs().max()) < 0.01
    assert float(silent.labels) == 0


def test_the_end_of_a_view_is_not_fitted_as_if_it_were_an_edge_of_the_body():
    where = grid.identity((SIZE,) * 3)
    shown = where[:, 2:] < 0.2
    atlas = Atlas(torch.full((1, 1, SIZE, SIZE, SIZE), 0.5), torch.diag(torch.tensor([90.0, 120.0, 70.0]))[None])
    exam = Exams(0.5 * shown, shown, torch.diag(torch.tensor([80.0, 110.0, 150.0]))[None])
    weights = Weights(explicit=0, edges=1)  # both are even, but for the edge where the exam ends
    found = fit(where, exam, atlas, Autoencoder().requires_grad_(False), weights, replace(HOW, steps=3))
    assert found.before.item() == pytest.approx(0, abs=1e-9)
    assert found.residual.abs().max() < 1e-6
