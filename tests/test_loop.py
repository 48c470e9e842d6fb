"""A step of a training: its gradient is clipped to a length, that of the networks alone."""

import pytest
import torch
from torch import nn

from deepatlas.loop import Descent


def test_a_gradient_is_cut_to_its_largest_length_and_told_as_it_was():
    network = nn.Linear(2, 1, bias=False)
    atlas = nn.Parameter(torch.zeros(1))
    before = network.weight.detach().clone()
    optimiser = torch.optim.SGD([*network.parameters(), atlas], lr=1.0)
    loss = (network.weight * torch.tensor([[30.0, -40.0]])).sum() + 7 * atlas.sum()
    assert Descent(5.0).step(optimiser, loss, network) == pytest.approx(50)
    torch.testing.assert_close(network.weight - before, torch.tensor([[-3.0, 4.0]]))
    assert atlas.item() == -7  # not one of the network's


def test_a_short_gradient_is_left_as_it_is():
    network = nn.Linear(2, 1, bias=False)
    before = network.weight.detach().clone()
    optimiser = torch.optim.SGD(network.parameters(), lr=1.0)
    Descent(5.0).step(optimiser, (network.weight * torch.tensor([[3.0, -1.0]])).sum(), network)
    torch.testing.assert_close(network.weight - before, torch.tensor([[-3.0, 1.0]]))
