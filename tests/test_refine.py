"""Refinement bends the map of one exam towards the atlas and touches nothing else."""

from dataclasses import replace

import numpy as np
import torch

from deepatlas import affine, grid
from deepatlas.autoencoder import Autoencoder
from deepatlas.checkpoint import MARGIN, Model
from deepatlas.config import Fitting, NetworkConfig, Weights
from deepatlas.embedding import Embedded, likeness_of
from deepatlas.fitting import Fitted
from deepatlas.networks import CoordinateNetwork
from deepatlas.prepare import Prepared, prepare
from deepatlas.refine import DOUBTFUL, mean_of, refine, settled, template_of

SIZE = 20


def scene() -> tuple[Model, Prepared, torch.Tensor]:
    """A model whose atlas is a texture, an exam that shows its inner part, and the exam's true map."""
    chance = torch.Generator().manual_seed(5)
    texture = grid.resize(torch.rand(1, 1, 8, 8, 8, generator=chance), (SIZE,) * 3)
    torch.manual_seed(0)
    box_to_mm = np.diag([100.0, 100.0, 100.0, 1.0])
    model = Model(
        network=CoordinateNetwork(NetworkConfig(size=16, widths=(8, 8), head_channels=8)),
        autoencoder=Autoencoder().requires_grad_(False),
        atlas=texture,
        seed_box_to_mm=torch.from_numpy(box_to_mm),
        region="body",
        level=0,
        seed_exam="seed",
        structures={},
    )
    # the exam shows the inner part of the atlas: its true map is MARGIN times its place in the box
    truth = MARGIN * grid.identity((SIZE,) * 3)
    hu = (grid.sample(texture, truth)[0, 0] * 512 - 256).numpy()
    exam = Prepared(hu, np.ones((SIZE,) * 3, dtype=bool), box_to_mm)
    return model, exam, truth


OFF = torch.tensor([0.06, -0.07, 0.05]).view(1, 3, 1, 1, 1)


def test_a_map_that_is_off_comes_closer_to_the_truth():
    model, exam, truth = scene()
    start = Embedded(exam, truth + OFF)
    how = Fitting(steps=30, rate=0.01, nodes=5, size=SIZE)
    better = refine(model, exam.volume, start, how, Weights(window=8))
    inner = (slice(None), slice(None), *(slice(4, -4),) * 3)
    before = (start.c_atlas - truth)[inner].norm(dim=1).mean()
    after = (better.c_atlas - truth)[inner].norm(dim=1).mean()
    assert after < 0.4 * before
    assert better.prepared is exam
    assert better.c_atlas.abs().max() <= 1


def test_a_doubtful_map_is_looked_at_again_and_no_other():
    model, exam, truth = scene()
    start = Embedded(exam, truth + OFF)
    reached = likeness_of(model, start).of_exam()
    assert reached < likeness_of(model, Embedded(exam, truth)).of_exam()
    inner = (slice(None), slice(None), *(slice(4, -4),) * 3)

    def error(familiar: float) -> float:
        found = settled(replace(model, familiar=familiar), exam.volume, start)
        assert found.alike is None or found.alike.of_exam() == reached
        return float((found.c_atlas - truth)[inner].norm(dim=1).mean())

    off = float((OFF * torch.ones_like(truth))[inner].norm(dim=1).mean())
    assert error(familiar=1.01 * reached / DOUBTFUL) < 0.7 * off
    for familiar in (0.0, 0.99 * reached / DOUBTFUL, 1.01 * reached):  # of a sure map, and of another kind of exam
        assert error(familiar) == off


def test_a_grid_finer_than_the_networks_is_prepared_from_the_exam():
    model, exam, _ = scene()
    fine = exam.volume  # the network's input is half of it, in a box of its own
    coarse = prepare(fine, SIZE // 2, model.region)
    matrix = np.linalg.inv(exam.box_to_mm) @ coarse.box_to_mm
    shape = (SIZE // 2,) * 3
    truth = MARGIN * affine.apply(torch.from_numpy(matrix)[None].float(), grid.identity(shape))
    how = Fitting(steps=30, rate=0.01, nodes=5, size=SIZE, learned=False, window=8)
    better = refine(model, fine, Embedded(coarse, truth + OFF), how)
    inner = (slice(None), slice(None), *(slice(2, -2),) * 3)
    assert (better.c_atlas - truth)[inner].norm(dim=1).mean() < 0.4 * OFF.norm()
    assert better.prepared is coarse
    assert better.c_atlas.shape[2:] == shape


def test_the_template_of_an_exam_shows_it_where_its_map_says_and_the_atlas_elsewhere():
    model, exam, truth = scene()
    moved = truth + OFF
    template = template_of(model, exam.volume, Embedded(exam, moved))
    inner = (..., *(slice(2, -2),) * 3)
    shown = grid.sample(template, moved)
    assert (shown[0, 0].numpy() - exam.image)[inner].std() < 0.03
    assert (grid.sample(model.atlas, moved)[0, 0].numpy() - exam.image)[inner].std() > 0.06
    torch.testing.assert_close(template[..., 0, 0, 0], model.atlas[..., 0, 0, 0])  # beyond the exam


def test_the_mean_of_maps_is_that_of_their_coordinates():
    _, exam, truth = scene()
    both = mean_of([Embedded(exam, truth), Embedded(exam, truth + OFF)])
    torch.testing.assert_close(both.c_atlas, truth + OFF / 2)


def test_a_refined_map_stays_in_the_atlas(monkeypatch):
    model, exam, truth = scene()
    push = torch.tensor([0.3, -0.2, 0.0]).view(1, 3, 1, 1, 1)

    def push_out(start, *_):
        return Fitted(push.expand_as(start), *(torch.zeros(1),) * 3)

    monkeypatch.setattr("deepatlas.refine.fit", push_out)
    better = refine(model, exam.volume, Embedded(exam, truth), Fitting(size=SIZE))
    low, high = torch.tensor([[-0.6, -1.0, -0.9], [1.0, 0.7, 0.9]])  # from -.9 ... .9
    torch.testing.assert_close(better.c_atlas.amin(dim=(0, 2, 3, 4)), low)
    torch.testing.assert_close(better.c_atlas.amax(dim=(0, 2, 3, 4)), high)
