"""The coordinate network: its size, its folded heads, and levels that begin where the one above stands."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepatlas import grid
from deepatlas.config import COMPACT, DEMO, NetworkConfig
from deepatlas.networks import LEAK, CoordinateNetwork, Head, parameter_count, standardise

SMALL = NetworkConfig(size=16, widths=(8, 12, 16), head_channels=10, groups=4)
STRIDED = NetworkConfig(size=24, widths=(8, 12), head_channels=10, groups=4, stem_stride=2)
PRINTED = 4_277_617
"""Parameters of the paper's network (§5.2.1)."""


def images(config: NetworkConfig, batch: int = 2) -> torch.Tensor:
    """Random images of a network's size."""
    return torch.rand(batch, 1, *(config.size,) * 3, generator=torch.Generator().manual_seed(0))


def network(config: NetworkConfig) -> CoordinateNetwork:
    """A network whose every number is drawn, gains included."""
    torch.manual_seed(1)
    made = CoordinateNetwork(config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith(("bias", "gain", "offset")):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def test_the_paper_s_size_is_within_one_percent_of_the_printed_count():
    made = CoordinateNetwork(NetworkConfig())
    assert parameter_count(made) == 4_249_152
    assert abs(parameter_count(made) - PRINTED) < 0.01 * PRINTED
    assert NetworkConfig().sizes == (64, 32, 16, 8, 4)
    assert parameter_count(CoordinateNetwork(COMPACT)) < PRINTED / 2
    made.requires_grad_(False)
    assert parameter_count(made) == 0


def unfolded(head: Head, x: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """The two convolutions a head stands for: 3³ to F channels, then the shared 1³ to three."""
    x = F.leaky_relu(head.last.norm(head.block(x)), LEAK)
    wide = F.conv3d(x, standardise(head.last.weight, head.last.gain), head.last.bias, padding=1)
    assert wide.shape[1] == shared.shape[1]
    return head.gain * F.conv3d(wide, shared[:, :, None, None, None])


def test_a_folded_head_is_its_two_convolutions():
    torch.manual_seed(2)
    head = Head(8, 32, 4, gain=0.7)
    nn.init.normal_(head.last.bias)
    shared, x = torch.randn(3, 32) * 32**-0.5, torch.randn(2, 8, 5, 6, 7)
    torch.testing.assert_close(head(x, shared), unfolded(head, x, shared), atol=1e-6, rtol=1e-6)
    head.double()
    shared = shared.double().requires_grad_()
    inputs = (shared, *head.parameters())
    one, other = (
        torch.autograd.grad((out.square() * 0.1).sum(), inputs)
        for out in (head(x.double(), shared), unfolded(head, x.double(), shared))
    )
    for folded, plain in zip(one, other, strict=True):
        torch.testing.assert_close(folded, plain)


def test_standardised_kernels_have_mean_0_and_variance_1_over_the_fan_in():
    weight = 3 + 0.5 * torch.randn(6, 4, 3, 3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gain = torch.tensor([1.0, 2.0, 0.5, 1.0, 0.0, -1.0], dtype=torch.float64)
    out = standardise(weight, gain).flatten(1)
    torch.testing.assert_close(out.mean(dim=1), torch.zeros(6, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(out.var(dim=1, correction=0), gain**2 / (4 * 27), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(standardise(5 * weight - 2, gain).flatten(1), out, atol=1e-5, rtol=0)
    assert torch.isfinite(standardise(torch.ones(2, 1, 3, 3, 3), torch.ones(2))).all()


@pytest.mark.parametrize("config", [SMALL, STRIDED], ids=["plain", "strided stem"])
def test_every_level_gives_coordinates_on_its_own_grid(config):
    made = network(config)
    assert made.coarsest == len(config.widths) - 1
    for level, size in enumerate(config.sizes):
        with torch.no_grad():
            c = made(images(config), level)
        assert c.shape == (2, 3, size, size, size)
        assert c.dtype == torch.float32
        assert (c.abs() < 1).all()
        assert c.std() > 0.01
    features = made.backbone(images(config), 1)
    assert features[0] is None
    assert features[1].shape[1:] == (config.widths[1], *(config.sizes[1],) * 3)


def test_exams_of_a_batch_do_not_meet():
    made, batch = network(SMALL), images(SMALL, 3)
    with torch.no_grad():
        together, alone = made(batch), made(batch[1:2])
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=0)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_saturated_coordinates_stay_finite_with_finite_gradients():
    made = network(SMALL)
    with torch.no_grad():
        made.offset.copy_(torch.tensor([50.0, -50.0, 0.0]))
    c = made(images(SMALL))
    assert torch.isfinite(c).all()
    assert (c.abs() <= 1).all()
    c.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in made.parameters())


@pytest.mark.parametrize("level", [0, 1, 2])
def test_gradients_reach_all_that_a_level_uses_and_nothing_else(level):
    made = network(SMALL)
    (made(images(SMALL), level).square().sum()).backward()
    for name, parameter in made.named_parameters():
        parts = name.split(".")
        part = ".".join(parts[:2])
        finer = parts[0] == "heads" and int(parts[1]) < level
        finer |= part.startswith("backbone.decoder") and int(parts[2]) < level
        if finer:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


class Affine(nn.Module):
    """In the place of the coarsest head: an affine map with a slight bend, as after the warm start."""

    def forward(self, x, shared):
        where = grid.identity(tuple(x.shape[2:])).expand(len(x), -1, -1, -1, -1)
        turn = torch.tensor([[0.8, 0.15, 0.0], [-0.15, 0.75, 0.1], [0.0, -0.1, 0.85]])
        c = torch.einsum("ab,nbijk->naijk", turn, where) + 0.04 * torch.sin(2.5 * where.roll(1, dims=1))
        return torch.atanh(c.clamp(-0.99, 0.99))


@pytest.mark.parametrize("config", [DEMO.network, SMALL, NetworkConfig(size=64, widths=(8,) * 5, head_channels=8)])
def test_a_new_level_begins_as_the_level_above(config):
    torch.manual_seed(4)
    made = CoordinateNetwork(config)
    assert [float(head.gain.detach()) for head in made.heads] == [0.0] * made.coarsest + [1.0]
    made.heads[made.coarsest] = Affine()
    image, shape = images(config, 1), (64, 64, 64)
    with torch.no_grad():
        maps = [made(image, level) for level in range(made.coarsest + 1)]
    for finer, above in pairwise(maps):
        torch.testing.assert_close(finer, grid.resize(above, tuple(finer.shape[2:])), atol=2e-6, rtol=0)
        jump = (grid.resize(finer, shape) - grid.resize(above, shape)).norm(dim=1) * 63 / 2
        assert float(jump.mean()) <= 0.25
        assert math.isfinite(float(jump.max()))
    made.heads[0].gain.data.fill_(1.0)
    with torch.no_grad():
        assert (made(image, 0) - maps[0]).abs().max() > 0.05  # the gain is what holds it back


def test_half_precision_inside_keeps_the_coordinates_and_their_type():
    torch.manual_seed(0)
    network = CoordinateNetwork(NetworkConfig(size=16, widths=(8, 16), head_channels=8))
    image = torch.rand(2, 1, 16, 16, 16)
    exact = network(image)
    network.mixed = True
    rough = network(image)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.05
    rough.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)
