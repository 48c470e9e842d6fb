"""The coordinate network: encoder, decoder and multi-resolution heads.

Source: §2.2, §5.2.1, §5.2.2, figure 2. The paper prints 4,277,617 parameters but not the depth F of its feature maps;
`parameter_count` gives ours. The wide heads cost nothing: between the head's last convolution and the shared one
stands nothing that is not linear, so the two are folded into one kernel inside autograd, and no tensor of F channels
exists at full resolution.
"""

from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from deepatlas import grid, kernels_cpu
from deepatlas.config import NetworkConfig
from deepatlas.shapes import Coordinates, Features, Image

LEAK = 0.1
"""Slope of every leaky ReLU (§2.2)."""


class Convolution(nn.Module):
    """Pre-activation block: group normalisation → leaky ReLU → weight-standardised 3³ convolution.

    Source: §2.2, references 15-17.
    """

    def __init__(self, channels_in: int, channels_out: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(min(groups, channels_in), channels_in)
        self.weight = nn.Parameter(torch.empty(channels_out, channels_in, 3, 3, 3))
        self.gain = nn.Parameter(torch.ones(channels_out))
        self.bias = nn.Parameter(torch.zeros(channels_out))
        nn.init.kaiming_normal_(self.weight, a=LEAK)

    def forward(self, x: Features) -> Features:
        return F.conv3d(activated(x, self.norm), standardise(self.weight, self.gain), self.bias, padding=1)


def activated(x: Features, norm: nn.GroupNorm) -> Features:
    """Group normalisation → leaky ReLU. On a CPU a fused kernel on channels-last maps, else PyTorch's."""
    x = x if x.is_cuda else x.to(norm.weight.dtype)  # a mixed convolution leaves bfloat16, which the kernel is not for
    if grid.has_kernel(x, norm.weight):
        return _Activated.apply(channels_last(x), norm.weight, norm.bias, norm.num_groups, norm.eps)
    return F.leaky_relu(norm(x), LEAK)


class _Activated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, groups: int, eps: float):
        rows = weight.detach().numpy(), bias.detach().numpy()
        out, *ctx.taken = kernels_cpu.normalise(_by_voxel(x), groups, *rows, LEAK, eps)
        ctx.save_for_backward(x, weight)
        return _by_channel(out, x.shape)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad = _by_voxel(channels_last(grad))
        found = kernels_cpu.normalise_backward(grad, _by_voxel(x), *ctx.taken, weight.detach().numpy(), LEAK)
        return _by_channel(found[0], x.shape), *(torch.from_numpy(part) for part in found[1:]), None, None


def _by_voxel(x: Features) -> np.ndarray:
    """A channels-last map as (batch, voxel, channel)."""
    return x.detach().permute(0, 2, 3, 4, 1).flatten(1, 3).numpy()


def _by_channel(rows: np.ndarray, shape: torch.Size) -> Features:
    """The way back, without a copy."""
    return torch.from_numpy(rows).view(shape[0], *shape[2:], shape[1]).permute(0, 4, 1, 2, 3)


def channels_last(x: Features) -> Features:
    """The same values, on a CPU with the channels of a voxel side by side: there a 3³ convolution of few channels and
    its gradients are up to ten times faster, and every layer after it keeps the form."""
    return x if x.is_cuda else x.to(memory_format=torch.channels_last_3d)


def channels_first(x: Features) -> Features:
    """The way back, for what reads one channel after the other; its gradient turns into the other form again."""
    return x if x.is_cuda else _ChannelsFirst.apply(x)


class _ChannelsFirst(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.contiguous()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad.contiguous(memory_format=torch.channels_last_3d)


def standardise(
    weight: Float[Tensor, "out in a b c"], gain: Float[Tensor, "out"], eps: float = 1e-5
) -> Float[Tensor, "out in a b c"]:
    """Each output channel's kernel with mean 0 and variance 1/fan-in, times its gain. Source: reference 17."""
    variance, mean = torch.var_mean(weight, dim=(1, 2, 3, 4), keepdim=True, correction=0)
    scale = gain.view(-1, 1, 1, 1, 1) * torch.rsqrt(variance * weight[0].numel() + eps)
    return (weight - mean) * scale


class Residual(nn.Module):
    """A pair of pre-activation blocks with a residual connection; 1³ projection where the depth changes."""

    def __init__(self, channels_in: int, channels_out: int, groups: int) -> None:
        super().__init__()
        self.first = Convolution(channels_in, channels_out, groups)
        self.second = Convolution(channels_out, channels_out, groups)
        self.skip = nn.Conv3d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Features) -> Features:
        return self.skip(x) + self.second(self.first(x))


class Backbone(nn.Module):
    """Encoder and decoder with additive skips: image → one feature map per resolution, finest first.

    Source: §2.2. Resampling keeps corners in place (§5.2.2).
    """

    def __init__(self, widths: tuple[int, ...], groups: int, stem_stride: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, widths[0], {1: 3, 2: 4}[stem_stride], stem_stride, padding=1)
        before = (widths[0], *widths[:-1])
        self.encoder = nn.ModuleList(Residual(a, b, groups) for a, b in zip(before, widths, strict=True))
        self.decoder = nn.ModuleList(Residual(b, a, groups) for a, b in pairwise(widths))

    def forward(self, image: Image, finest: int = 0) -> list[Features | None]:
        """Features at every resolution from ``finest`` down; finer ones are not computed and stand as None."""
        x = self.stem(channels_last(image))
        skips = []
        for level, block in enumerate(self.encoder):
            if level:
                x = grid.resize(x, tuple(n // 2 for n in x.shape[2:]))
            x = block(x)
            skips.append(x)
        features: list[Features | None] = [None] * len(skips)
        features[-1] = x
        for level in range(len(skips) - 2, finest - 1, -1):
            x = skips[level] + grid.resize(self.decoder[level](x), tuple(skips[level].shape[2:]))
            features[level] = x
        return features


class Head(nn.Module):
    """Dense head of one resolution: residual block, then a convolution block to F channels, ready to be folded.

    Source: §2.2.1. ``gain`` is ours: it starts at 0, so a new level begins as a copy of the one above it.
    """

    def __init__(self, channels: int, head_channels: int, groups: int, gain: float) -> None:
        super().__init__()
        self.block = Residual(channels, channels, groups)
        self.last = Convolution(channels, head_channels, groups)
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, x: Features, shared: Float[Tensor, "3 feature"]) -> Float[Tensor, "batch 3 i j k"]:
        """``gain · shared · f_l``: the two linear maps folded into one kernel, equal up to rounding."""
        x = self.block(x)
        x = activated(x, self.last.norm)
        weight = torch.einsum("of,fcijk->ocijk", shared, standardise(self.last.weight, self.last.gain))
        return F.conv3d(x, self.gain * weight, self.gain * (shared @ self.last.bias), padding=1)


class CoordinateNetwork(nn.Module):
    """``c_n = F(x_n)``: an atlas coordinate for every voxel.

    With z_L = W f_L + b at the coarsest resolution and z_l = atanh(c_{l+1} upsampled) + g_l W f_l at every other one,
    c_l = tanh z_l. The shared W is a bare 1³ convolution, the same weights at all levels; as g_l starts at 0, each
    level begins as the map of the level above, resampled.

    Source: §2.2.1 and figure 2.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.mixed = False
        """Compute in bfloat16 up to the logits, which are float32 always."""
        levels = len(config.widths)
        self.backbone = Backbone(config.widths, config.groups, config.stem_stride)
        self.heads = nn.ModuleList(
            Head(width, config.head_channels, config.groups, gain=float(level == levels - 1))
            for level, width in enumerate(config.widths)
        )
        self.shared = nn.Parameter(torch.empty(3, config.head_channels))
        self.offset = nn.Parameter(torch.zeros(3))
        nn.init.normal_(self.shared, std=0.5 * config.head_channels**-0.5)

    @property
    def coarsest(self) -> int:
        """Index of the coarsest level, the first to be trained."""
        return len(self.heads) - 1

    def forward(self, image: Image, level: int = 0) -> Coordinates:
        """The map of one level on its own grid, atlas frame; `grid.resize` brings it to any other.

        Args:
            image: (batch, 1, size, size, size), 0 ... 1, axes R, A, S.
            level: 0 is the finest; levels finer than it are not computed.
        """
        with torch.autocast(image.device.type, torch.bfloat16, enabled=self.mixed):
            features = self.backbone(image, level)
            pushes = [head(f, self.shared) for head, f in zip(self.heads[level:], features[level:], strict=True)]
        logits = pushes.pop().float() + self.offset.view(1, 3, 1, 1, 1)
        while pushes:
            finer = pushes.pop().float()
            above = grid.resize(torch.tanh(logits), tuple(finer.shape[2:]))
            logits = torch.atanh(above.clamp(-1 + 1e-6, 1 - 1e-6)) + finer
        return torch.tanh(logits)


class SegmentationHead(nn.Module):
    """(image, log odds by the map) → log odds of every structure: on a backbone, two finer levels of its own.

    It sees the image on a grid of its own, which may be finer than the backbone's and other than a cube: ``shape``
    along R, A, S. It begins as the odds it is given.

    Source: §3.3.3; that it is given the map's odds and adds to them, and its own levels, are ours.
    """

    def __init__(
        self, config: NetworkConfig, channels: int, width: int = 16, shape: tuple[int, int, int] | None = None
    ) -> None:
        super().__init__()
        self.channels, self.width, self.size = channels, width, config.size
        self.shape = shape or (config.size,) * 3
        self.mixed = False
        """Compute in bfloat16 up to what is added, which is float32 always."""
        groups, deep = config.groups, 2 * width
        self.backbone = Backbone(config.widths, groups, config.stem_stride)
        self.given = nn.Conv3d(1 + channels, width, 3, padding=1)
        self.enter = Residual(width, width, groups)
        self.down = Residual(width, deep, groups)
        self.coarse = Residual(config.widths[0], deep, groups)
        self.middle = Residual(deep, deep, groups)
        self.up = Residual(deep, width, groups)
        self.fine = Residual(width, width, groups)
        self.last = nn.Conv3d(width, channels, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(
        self, image: Image, odds: Float[Tensor, "batch structure i j k"]
    ) -> Float[Tensor, "batch structure i j k"]:
        """Image and odds on the grid of the head."""
        shape = tuple(image.shape[2:])
        half = tuple(n // 2 for n in shape)
        with torch.autocast(image.device.type, torch.bfloat16, enabled=self.mixed):
            far = self.coarse(self.backbone(grid.resize(image, (self.size,) * 3))[0])
            near = self.enter(self.given(channels_last(torch.cat([image, odds / 4], dim=1))))
            x = self.down(grid.resize(near, half)) + grid.resize(far, half)
            x = near + grid.resize(self.up(self.middle(x)), shape)
            added = self.last(F.leaky_relu(self.fine(x), LEAK))
        return odds + channels_first(added.float())


class VoxelClassifier(nn.Module):
    """(what surrounds a point) → what is added to the log odds that it belongs to a structure.

    Perceptrons of two hidden layers side by side, the members; each learned from other exams (`deepatlas.classifier`).
    They begin by adding nothing.

    Source: ours.
    """

    INPUTS = 2 * 7**3 + 3**3 + 3
    """Numbers that are given of a point: HU near by and farther, odds around, and where in the structure it lies."""

    def __init__(self, members: int, width: int) -> None:
        super().__init__()
        sizes = (self.INPUTS, width, width // 2, 1)
        self.members, self.width = members, width
        self.weights = nn.ParameterList(torch.empty(members, *size) for size in pairwise(sizes))
        self.biases = nn.ParameterList(torch.zeros(members, 1, size) for size in sizes[1:])
        self.register_buffer("level", torch.tensor(0.5))
        """A voxel belongs to the structure where its probability exceeds this."""
        self.register_buffer("hu", torch.tensor(0.0))
        """How much the HU of a voxel move its log odds afterwards (`deepatlas.tissue`)."""
        for weight in self.weights[:-1]:
            nn.init.normal_(weight, std=(2 / weight.shape[1]) ** 0.5)
        nn.init.zeros_(self.weights[-1])

    def forward(self, x: Float[Tensor, "point inputs"]) -> Float[Tensor, "member point"]:
        """Of every point, by each member."""
        layers = list(zip(self.weights, self.biases, strict=True))
        x = x.expand(self.members, -1, -1)
        for weight, bias in layers[:-1]:
            x = F.relu(torch.baddbmm(bias, x, weight))
        return torch.baddbmm(layers[-1][1], x, layers[-1][0])[..., 0]


def parameter_count(module: nn.Module) -> int:
    """Trainable numbers of a module."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
