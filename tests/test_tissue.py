"""What HU say about a structure: counting, smoothing, and the odds they move."""

import numpy as np
import pytest
import torch

from deepatlas import tissue
from deepatlas.tissue import BINS, MOST, PARTS


def test_every_hu_has_a_bin_and_nan_the_first():
    hu = np.array([-2000, -301, -299, 0, 19, 21, 599, 601, 9000, np.nan, np.inf, -np.inf])
    assert tissue.bins_of(hu).tolist() == [0, 0, 1, 16, 16, 17, 45, 46, 46, 0, 46, 0]


def test_a_box_has_three_parts_along_each_axis():
    places = torch.tensor([[-1.0, -0.4, 0.0], [-0.3, 0.3, 0.4], [1.0, 1.2, -7.0]]).T[None]
    assert tissue.parts_of(places)[:, 0].T.tolist() == [[0, 0, 1], [1, 1, 2], [2, 2, 0]]


def middle(count: int) -> torch.Tensor:
    """Points in the middle of the box."""
    return torch.ones(3, count, dtype=torch.int64)


def test_counts_are_shares_of_parts_and_pairs_inside_and_outside():
    parts = torch.tensor([[0, 0, 1, 2]] * 3)
    own, around = np.array([30.0, 30, -100, 400]), np.array([30.0, 30, 30, 400])
    shares = tissue.counted(parts, own, around, np.array([1, 1, 1, 0]) > 0)
    assert shares.shape == (2, PARTS, PARTS, PARTS, BINS, BINS)
    torch.testing.assert_close(shares.flatten(1).sum(dim=1), torch.ones(2))
    outside, inside = shares
    thirty, fat, bone = tissue.bins_of(np.array([30.0, -100, 400]))
    assert inside[0, 0, 0, thirty, thirty] == pytest.approx(2 / 3)
    assert inside[1, 1, 1, fat, thirty] == pytest.approx(1 / 3)
    assert outside[2, 2, 2, bone, bone] == 1
    nothing = tissue.counted(middle(0), np.zeros(0), np.zeros(0), np.zeros(0, bool))
    assert nothing.sum() == 0  # nothing was drawn near


def test_what_occurs_inside_speaks_for_a_structure_what_occurs_outside_against_it_and_the_rest_not():
    rng = np.random.default_rng(0)
    inside = np.arange(4000) < 2000
    hu = np.where(inside, 40.0, 300.0) + rng.normal(0, 15, 4000)
    table = tissue.log_odds([tissue.counted(middle(4000), hu, hu, inside)])
    forty, bone, air = tissue.bins_of(np.array([40.0, 300, -1000]))
    for part in ((1, 1, 1), (0, 2, 1)):  # what a part did not see it has from the whole box
        assert table[part][forty, forty] == pytest.approx(MOST)
        assert table[part][bone, bone] == pytest.approx(-MOST)
        assert abs(float(table[part][air, air])) < 1e-3
    alike = rng.normal(40, 15, 4000)
    table = tissue.log_odds([tissue.counted(middle(4000), alike, alike, inside)])
    assert table.abs().max() < 0.4


def test_with_many_exams_each_part_speaks_for_itself_with_one_the_whole_box_does():
    """Before the structure lies air, behind it bone."""
    rng = np.random.default_rng(0)
    parts = torch.from_numpy(rng.integers(0, PARTS, (3, 6000)))
    inside = rng.random(6000) < 0.5
    behind = parts[0].numpy() == 2
    hu = np.where(inside, 40.0, np.where(behind, 300.0, -1000.0))
    hu[inside & behind] = -1000.0  # where air is part of it
    shares = tissue.counted(parts, hu, hu, inside)
    (air,) = tissue.bins_of(np.array([-1000.0]))
    many, one = tissue.log_odds([shares] * 500), tissue.log_odds([shares])
    assert many[2, 1, 1, air, air] > 1
    assert many[0, 1, 1, air, air] < -1
    assert abs(float(one[2, 1, 1, air, air] - one[0, 1, 1, air, air])) < 1


def test_a_membership_moves_by_the_odds_of_its_part():
    table = torch.zeros(PARTS, PARTS, PARTS, BINS, BINS)
    table[1, 1, 1, 17, 20] = np.log(3)
    membership, hu = torch.tensor([[[0.0, 0.25, 0.5, 1.0]]]), (np.full((1, 4), 30.0), np.full((1, 4), 90.0))
    moved = tissue.moved(membership, table, middle(4)[:, None], *hu)
    torch.testing.assert_close(moved, torch.tensor([[[0.0, 0.5, 0.75, 1.0]]]))
    for parts, of_hu in ((middle(4), (np.zeros((1, 4)),) * 2), (0 * middle(4), hu)):
        torch.testing.assert_close(tissue.moved(membership, table, parts[:, None], *of_hu), membership)
