"""Copies of an exam, mapped and brought back: they agree where the network turns with the exam."""

import numpy as np
import pytest
import torch
from torch import nn

from deepatlas import affine, grid
from deepatlas.autoencoder import Autoencoder
from deepatlas.checkpoint import Model
from deepatlas.config import Augmentation, NetworkConfig
from deepatlas.consistency import _brought_back, agree
from deepatlas.embedding import Embedded
from deepatlas.prepare import Prepared

POSES = Augmentation(scale=0.08, rotation=0.12, translation=0.08, cut=0.0, tone=0.0)
SIZE = 24


class Reading(nn.Module):
    """Reads a coordinate off the grey value, so that its map turns with the exam; `drift` adds what does not."""

    def __init__(self, drift: float) -> None:
        super().__init__()
        self.config = NetworkConfig(size=SIZE)
        self.offset = nn.Parameter(torch.zeros(3))
        self.drift = drift

    def forward(self, image, level=0):
        return (image - 0.5).repeat(1, 3, 1, 1, 1) + self.drift * grid.identity(tuple(image.shape[2:]))


def scene(drift: float) -> tuple[Model, Embedded]:
    """An exam whose grey values rise smoothly, and a model that reads them."""
    where = grid.identity((SIZE,) * 3)[0].numpy()
    hu = (120 * where[0] + 60 * where[1] - 40 * where[2]).astype(np.float32)
    prepared = Prepared(hu, np.ones_like(hu, dtype=bool), np.diag([100.0, 100.0, 100.0, 1.0]))
    network = Reading(drift)
    model = Model(
        network=network,
        autoencoder=Autoencoder().requires_grad_(False),
        atlas=torch.zeros(1, 1, 8, 8, 8),
        seed_box_to_mm=torch.diag(torch.tensor([100.0, 100.0, 100.0, 1.0], dtype=torch.float64)),
        region="exam",
        level=0,
        seed_exam="seed",
        structures={},
    )
    with torch.no_grad():
        return model, Embedded(prepared, network(torch.from_numpy(prepared.image)[None, None]))


INNER = (slice(None), slice(None), *(slice(5, -5),) * 3)


def test_copies_of_a_map_that_turns_with_the_exam_agree():
    model, embedded = scene(0.0)
    agreed = agree(model, embedded, copies=4, how=POSES)
    assert torch.allclose(agreed.embedded.c_atlas[INNER], embedded.c_atlas[INNER], atol=2e-3)
    assert agreed.spread_mm[INNER].max() < 0.5
    assert agreed.spread_mm.shape == (1, 1, SIZE, SIZE, SIZE)


def test_what_does_not_turn_with_the_exam_is_spread():
    model, embedded = scene(0.5)
    still = agree(scene(0.0)[0], scene(0.0)[1], copies=4, how=POSES).spread_mm[INNER].mean()
    assert agree(model, embedded, copies=4, how=POSES).spread_mm[INNER].mean() > 10 * still


def test_the_spread_is_in_mm_of_the_seed_exam():
    model, embedded = scene(0.5)
    spread = agree(model, embedded, copies=3, how=POSES).spread_mm
    twice = Model(
        **{**model.__dict__, "seed_box_to_mm": model.seed_box_to_mm @ torch.diag(torch.tensor([2.0, 2, 2, 1]).double())}
    )
    assert torch.allclose(agree(twice, embedded, copies=3, how=POSES).spread_mm, 2 * spread, rtol=1e-4)


def test_no_copies_change_nothing_and_a_seed_decides():
    model, embedded = scene(0.5)
    assert torch.equal(agree(model, embedded, copies=0).embedded.c_atlas, embedded.c_atlas)
    first, again, other = (agree(model, embedded, copies=2, seed=n).embedded.c_atlas for n in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("copies", [1, 3])
def test_where_no_copy_reaches_the_exams_own_map_stands(copies):
    model, embedded = scene(0.5)
    far = Augmentation(scale=0.0, rotation=0.0, translation=0.4, cut=0.0, tone=0.0)
    corners = agree(model, embedded, copies=copies, how=far).embedded.c_atlas
    assert torch.isfinite(corners).all()


def test_a_copys_map_is_brought_back_where_it_reaches():
    where, own = grid.identity((21,) * 3), torch.full((1, 3, 21, 21, 21), 9.0)
    matrix = affine.from_parts(torch.diag(torch.tensor([0.8, 1.25, 1.0]))[None], torch.tensor([[0.4, 0.0, -0.3]]))
    found = _brought_back(grid.identity((11,) * 3), matrix, own)
    there = (where - torch.tensor([0.4, 0.0, -0.3]).view(1, 3, 1, 1, 1)) / torch.tensor([0.8, 1.25, 1.0]).view(
        1, 3, 1, 1, 1
    )
    sure = (there.abs().amax(dim=1, keepdim=True) - 1).abs() > 0.01
    expected = torch.where(there.abs().amax(dim=1, keepdim=True) <= 1, there, own)
    assert (found == 9).any()
    torch.testing.assert_close(found * sure, expected * sure)
