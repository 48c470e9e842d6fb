"""What HU say about a structure: counting, smoothing, and the odds they move."""

import numpy as np
import pytest
import torch

from deepatlas import tissue
from deepatlas.tissue import BINS, MOST


def test_every_hu_has_a_bin_and_nan_the_first():
    hu = np.array([-2000, -301, -299, 0, 19, 21, 599, 601, 9000, np.nan, np.inf, -np.inf])
    assert tissue.bins_of(hu).tolist() == [0, 0, 1, 16, 16, 17, 45, 46, 46, 0, 46, 0]


def test_counts_are_shares_of_pairs_inside_and_outside():
    shares = tissue.counted(np.array([30.0, 30, -100, 400]), np.array([30.0, 30, 30, 400]), np.array([1, 1, 1, 0]) > 0)
    assert shares.shape == (2, BINS, BINS)
    torch.testing.assert_close(shares.sum(dim=(1, 2)), torch.ones(2))
    outside, inside = shares
    thirty, fat, bone = tissue.bins_of(np.array([30.0, -100, 400]))
    assert inside[thirty, thirty] == pytest.approx(2 / 3)
    assert inside[fat, thirty] == pytest.approx(1 / 3)
    assert outside[bone, bone] == 1
    assert tissue.counted(np.zeros(0), np.zeros(0), np.zeros(0, bool)).sum() == 0  # nothing was drawn near


def test_what_occurs_inside_speaks_for_a_structure_what_occurs_outside_against_it_and_the_rest_not():
    rng = np.random.default_rng(0)
    inside = np.arange(4000) < 2000
    hu = np.where(inside, 40.0, 300.0) + rng.normal(0, 15, 4000)
    table = tissue.log_odds([tissue.counted(hu, hu, inside)])
    forty, bone, air = tissue.bins_of(np.array([40.0, 300, -1000]))
    assert table[forty, forty] == pytest.approx(MOST)
    assert table[bone, bone] == pytest.approx(-MOST)
    assert abs(float(table[air, air])) < 1e-3
    alike = rng.normal(40, 15, 4000)
    table = tissue.log_odds([tissue.counted(alike, alike, inside)])
    assert table.abs().max() < 0.4


def test_a_membership_moves_by_its_odds():
    table = torch.zeros(BINS, BINS)
    table[17, 20] = np.log(3)
    moved = tissue.moved(torch.tensor([0.0, 0.25, 0.5, 1.0]), table, np.full(4, 30.0), np.full(4, 90.0))
    torch.testing.assert_close(moved, torch.tensor([0.0, 0.5, 0.75, 1.0]))
    kept = tissue.moved(torch.tensor([0.0, 0.25, 1.0]), table, np.zeros(3), np.zeros(3))
    torch.testing.assert_close(kept, torch.tensor([0.0, 0.25, 1.0]))
