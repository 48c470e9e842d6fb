"""The feature autoencoder: what the similarity of two images is measured in.

Source: §5.3, figure 7.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepatlas import grid
from deepatlas.networks import LEAK, Residual, channels_first, channels_last
from deepatlas.shapes import Features, Image

HOUNSFIELD = (-256.0, -100.0, 10.0, 50.0, 100.0, 256.0)
NORMALISED = (0.0, 0.15, 0.30, 0.70, 0.85, 1.0)
"""The nonlinear histogram map of §5.3.1: HU → reconstruction target."""


def histogram_map(image: Tensor) -> Tensor:
    """The target of the reconstruction: piecewise linear in HU, most contrast among soft tissues.

    Args:
        image: 0 ... 1 for -256 ... +256 HU.

    Source: §5.3.1.
    """
    hu = image * 512 - 256
    out = torch.zeros_like(image)
    knots = zip(pairwise(HOUNSFIELD), pairwise(NORMALISED), strict=True)
    for (x0, x1), (y0, y1) in knots:
        out = out + ((hu - x0) / (x1 - x0)).clamp(0, 1) * (y1 - y0)
    return out


class Autoencoder(nn.Module):
    """Two resolutions, a reconstruction head at each, no activation on the reconstructions.

    Source: §5.3 and §5.3.2; the blocks are those of the coordinate network.
    """

    def __init__(self, widths: tuple[int, int] = (8, 16), groups: int = 4) -> None:
        super().__init__()
        self.mixed = False
        """Compute features in bfloat16; they come out in the image's type."""
        fine, coarse = widths
        self.stem = nn.Conv3d(1, fine, 3, padding=1)
        self.fine = Residual(fine, fine, groups)
        self.coarse = Residual(fine, coarse, groups)
        self.decoder = Residual(coarse, fine, groups)
        self.heads = nn.ModuleList([nn.Conv3d(fine, 1, 3, padding=1), nn.Conv3d(coarse, 1, 3, padding=1)])

    def features(self, image: Image) -> tuple[Features, Features]:
        """R_0 and R_1: the encoder's maps after the leaky ReLU, at the image's grid and at half of it."""
        with torch.autocast(image.device.type, torch.bfloat16, enabled=self.mixed):
            fine, coarse = self._encode(image)
        return channels_first(fine).to(image), channels_first(coarse).to(image)

    def _encode(self, image: Image) -> tuple[Features, Features]:
        fine = self.fine(self.stem(channels_last(image)))
        coarse = self.coarse(grid.resize(fine, tuple(n // 2 for n in image.shape[2:])))
        return F.leaky_relu(fine, LEAK), F.leaky_relu(coarse, LEAK)

    def forward(self, image: Image) -> tuple[Features, Features]:
        """Reconstructions of the histogram-mapped image at both resolutions, unbounded."""
        fine, coarse = self._encode(image)
        decoded = fine + grid.resize(self.decoder(coarse), tuple(image.shape[2:]))
        return self.heads[0](F.leaky_relu(decoded, LEAK)), self.heads[1](coarse)

    def loss(self, image: Image) -> Tensor:
        """Mean squared error of both reconstructions."""
        target = histogram_map(image)
        fine, coarse = self(image)
        return F.mse_loss(fine, target) + F.mse_loss(coarse, grid.resize(target, tuple(coarse.shape[2:])))


class Intensities:
    """R_0 and R_1 without learning: the histogram-mapped image and the image itself, at its grid and at half of it.

    Ours, for `deepatlas.fitting` on fine grids, where the autoencoder's convolutions are most of the time.
    """

    def features(self, image: Image) -> tuple[Features, Features]:
        """Two channels at both resolutions."""
        fine = torch.cat([histogram_map(image), image], dim=1)
        return fine, grid.shrink(fine, tuple(n // 2 for n in image.shape[2:]))
