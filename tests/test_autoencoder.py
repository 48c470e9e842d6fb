"""The feature autoencoder: the histogram map of the paper, shapes, and that it learns."""

import numpy as np
import torch

from deepatlas.autoencoder import Autoencoder, histogram_map

TABLE = {-256: 0.0, -100: 0.15, 10: 0.30, 50: 0.70, 100: 0.85, 256: 1.0}
"""§5.3.1: raw Hounsfield units and normalised values."""


def ball(size: int = 12) -> torch.Tensor:
    """An image of air, fat, muscle and bone in shells."""
    axis = np.linspace(-1, 1, size)
    radius = np.sqrt(sum(a**2 for a in np.meshgrid(axis, axis, axis, indexing="ij")))
    hu = np.select([radius > 0.9, radius > 0.7, radius > 0.3], [-256, -90, 55], 200)
    return torch.from_numpy((hu + 256) / 512).float()[None, None]


def test_the_histogram_map_at_the_knots_of_the_paper_and_between_them():
    hu = np.array([*TABLE, -178, -45, 30, 75, 178], dtype=np.float64)
    expected = [*TABLE.values(), 0.075, 0.225, 0.50, 0.775, 0.925]
    np.testing.assert_allclose(histogram_map(torch.from_numpy((hu + 256) / 512)).numpy(), expected, atol=1e-12)
    dense = np.linspace(-256, 256, 301)
    expected = np.interp(dense, list(TABLE), list(TABLE.values()))
    np.testing.assert_allclose(histogram_map(torch.from_numpy((dense + 256) / 512)).numpy(), expected, atol=1e-12)


def test_beyond_the_window_the_histogram_map_stays_at_its_ends():
    assert histogram_map(torch.tensor([-3.0, 4.0])).tolist() == [0.0, 1.0]


def test_features_and_reconstructions_stand_on_the_image_s_grid_and_on_half_of_it():
    torch.manual_seed(0)
    model = Autoencoder(widths=(8, 12))
    image = torch.rand(2, 1, 12, 10, 8)
    fine, coarse = model.features(image)
    assert fine.shape == (2, 8, 12, 10, 8)
    assert coarse.shape == (2, 12, 6, 5, 4)
    assert [tuple(out.shape) for out in model(image)] == [(2, 1, 12, 10, 8), (2, 1, 6, 5, 4)]
    for feature in (fine, coarse):
        assert feature.min() < 0  # leaky: what is below 0 is kept, small
        assert feature.max() > -feature.min()


def test_reconstructions_are_not_squashed():
    model = Autoencoder()
    with torch.no_grad():
        for head in model.heads:
            head.bias.fill_(7.0)
        assert all(out.mean() > 5 for out in model(ball()))


def test_the_loss_falls_on_one_image_and_reaches_every_parameter():
    torch.manual_seed(0)
    model, image = Autoencoder(), ball()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(25):
        optimiser.zero_grad()
        loss = model.loss(image)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_the_loss_is_the_error_of_both_reconstructions():
    torch.manual_seed(0)
    model, image = Autoencoder(), ball()
    with torch.no_grad():
        for head in model.heads:
            head.weight.zero_()
            head.bias.zero_()
        target = histogram_map(image)
        coarse = torch.nn.functional.interpolate(target, size=(6, 6, 6), mode="trilinear", align_corners=True)
        expected = target.square().mean() + coarse.square().mean()
        torch.testing.assert_close(model.loss(image), expected)
