"""Masks by a segmentation head: what it says is drawn where it says, and what it may not say stays the map's."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from deepatlas import atlas, grid, library, segmentation
from deepatlas.config import NetworkConfig
from deepatlas.locate import define, locate
from deepatlas.networks import SegmentationHead
from deepatlas.prepare import prepare
from deepatlas.volume import Volume, apply
from exact import CENTRE, OTHER, balls, blank, dice, exact, scan

SHIFTED, SMALLER = CENTRE + np.array([9.0, -6.0, 8.0]), 20.0
"""Where the head draws the ball, which the map draws around `CENTRE`."""
NAMES = {"ball": 4, "other": 7}


class Drawing(nn.Module):
    """In the place of a head: channel 0 is a ball at a known place of mm, channel 1 nothing at all."""

    channels, width, shape = 2, 8, (24, 24, 24)

    def __init__(self, box_to_mm: np.ndarray) -> None:
        super().__init__()
        self.box_to_mm, self.odds = box_to_mm, None

    def forward(self, image, odds):
        self.odds = odds
        where = grid.identity(tuple(image.shape[2:]), torch.float64)[0].flatten(1).T.numpy()
        far = np.linalg.norm(apply(self.box_to_mm, where) - SHIFTED, axis=1).reshape(image.shape[2:])
        return torch.stack([torch.from_numpy(SMALLER - far).float(), torch.full(image.shape[2:], -9.0)])[None]


@pytest.fixture
def exam():
    return scan((4, 3, 5), (20, -15, 30))


@pytest.fixture
def model(monkeypatch, exam):
    """A model that knows two structures, with a head that speaks for both."""
    monkeypatch.setattr(sys.modules["deepatlas.locate"], "embed", exact)
    labelled, places = scan((4, 3, 5), (5, -8, 12))
    labels = Volume(balls(places, CENTRE, OTHER).astype(np.int16), labelled.affine)
    known = define(blank(), [(labelled, labels)], {"ball": 1, "other": 2})
    structures = {name: replace(one, label=NAMES[name]) for name, one in known.structures.items()}
    box_to_mm = prepare(exam[0], known.size, known.region, upright=False).box_to_mm
    return replace(known, structures=structures, head=Drawing(box_to_mm), segmented={"ball": 0, "other": 1})


def test_a_structure_is_drawn_where_the_head_says(model, exam):
    found = locate(model, exam[0])
    truth = np.linalg.norm(exam[1] - SHIFTED, axis=-1) < SMALLER
    assert dice(found["ball"].mask, truth) > 0.9
    assert (found["ball"].label, found["ball"].status) == (4, "present")
    np.testing.assert_allclose(found["ball"].centroid_mm, SHIFTED, atol=1.5)  # drawn on nodes 10 mm apart
    assert 0 <= found["ball"].confidence <= 1


def test_where_the_head_finds_nothing_the_map_answers(model, exam):
    by_map = locate(replace(model, segmented={}), exam[0])
    found = locate(model, exam[0])
    np.testing.assert_array_equal(found["other"].mask, by_map["other"].mask)
    assert found["other"].confidence == by_map["other"].confidence
    only = locate(replace(model, segmented={"other": 1}), exam[0])
    np.testing.assert_array_equal(only["ball"].mask, by_map["ball"].mask)


def test_what_the_map_calls_absent_is_not_drawn(model, monkeypatch):
    cut, _ = scan((4, 4, 4), (5, 5, 5), high=(130, 80, CENTRE[2] - 45))
    monkeypatch.setattr(segmentation, "probabilities", lambda *_: torch.ones(1, 2, 24, 24, 24))
    found = locate(model, cut)
    assert (found["ball"].status, found["ball"].mask) == ("absent", None)


def test_the_head_draws_to_the_end_of_a_cut_exam(model, monkeypatch):
    cut, _ = scan((2, 2, 2.5), high=(130, 80, CENTRE[2] + 1))
    monkeypatch.setattr(
        segmentation, "probabilities", lambda *_: torch.tensor([0.9, 0.1]).expand(1, 24, 24, 24, 2).movedim(-1, 1)
    )
    by_map = locate(replace(model, segmented={}), cut)["ball"].mask
    found = locate(model, cut)["ball"].mask
    for last in (-1, -2, -3):
        assert (found & by_map)[..., last].sum() == by_map[..., last].sum() > 0


def test_the_head_is_given_the_odds_of_the_map(model, exam):
    locate(model, exam[0])
    where = grid.identity((24,) * 3, torch.float64)[0].flatten(1).T.numpy()
    places = apply(model.head.box_to_mm, where).reshape(24, 24, 24, 3)
    odds = model.head.odds[0]
    for channel, centre in enumerate((CENTRE, OTHER)):
        far = np.linalg.norm(places - centre, axis=-1)
        assert (odds[channel][torch.from_numpy(far < 20)] > 0).all()
        assert (odds[channel][torch.from_numpy(far > 36)] < 0).all()


def test_odds_are_even_at_the_level_of_a_structure(model):
    where = grid.identity((12,) * 3)
    one = model.structures["ball"]
    odds = atlas.log_odds([one, None], where)
    inside = one.membership(where)
    assert ((odds[:, :1] > 0) == (inside > one.level)).all()
    assert odds[:, 1].max() < -6


def test_a_head_begins_as_the_odds_it_is_given():
    torch.manual_seed(0)
    head = SegmentationHead(NetworkConfig(size=16, widths=(8, 8), groups=4, stem_stride=2), channels=3)
    image, odds = torch.rand(2, 1, 16, 16, 16), torch.randn(2, 3, 16, 16, 16)
    torch.testing.assert_close(head(image, odds), odds)
    nn.init.normal_(head.last.weight)
    assert (head(image, odds) - odds).abs().min() > 0
    assert not torch.allclose(head(image, 0 * odds), head(image, odds) - odds)  # what it adds depends on the odds


def test_a_structure_that_is_made_anew_is_the_maps_again(model, exam):
    remade = model.with_structures(model.structures["ball"])
    assert remade.segmented == {"other": 1}
    assert model.without("ball").segmented == {"other": 1}
    assert library.renamed(model, "ball", "globe").segmented == {"globe": 0, "other": 1}
    locate(remade, exam[0])
    assert model.head.odds[0, 0].max() < -6  # nobody knows any more what that channel stood for
