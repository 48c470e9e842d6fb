"""Grids: identity, trilinear sampling and its adjoint, corner-kept resizing. The only `grid_sample` stands here.

All coordinates are in the box frame: -1 ... +1 from the centre of the first to the centre of the last node, channel
``a`` for array axis ``a``. PyTorch's reversed axis order is met once, in `sample_reference`.
"""

from functools import cache
from importlib.util import find_spec

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from deepatlas import kernels_cpu
from deepatlas.shapes import Features


def identity(
    shape: tuple[int, int, int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Float[Tensor, "1 3 i j k"]:
    """The box coordinate of every node of a grid: `sample(f, identity(f.shape[2:])) == f`."""
    axes = [torch.linspace(-1, 1, n, dtype=dtype, device=device) if n > 1 else torch.zeros(1) for n in shape]
    return torch.stack(torch.meshgrid(*[a.to(dtype).to(device) for a in axes], indexing="ij"))[None]


def inside(coords_box: Float[Tensor, "batch 3 *points"]) -> Tensor:
    """Where a point lies in the box, faces included: boolean (batch, 1, *points). NaN lies outside."""
    return (coords_box.abs() <= 1).all(dim=1, keepdim=True)


def resize(field: Features, shape: tuple[int, int, int]) -> Features:
    """Linear resampling that keeps the corners in place.

    Source: §5.2.2.
    """
    if tuple(field.shape[2:]) == tuple(shape):
        return field
    return F.interpolate(field, size=tuple(shape), mode="trilinear", align_corners=True)


def spline(control: Features, shape: tuple[int, int, int]) -> Features:
    """A smooth field on a grid from few control points: cubic B-splines along each axis.

    Args:
        control: (batch, channel, n, n, n) with n ≥ 4, evenly spaced; the outermost lie one step outside the box, so
            that each place in it has four neighbours along every axis. Equal control points give a uniform field.
    """
    for axis, nodes in zip((2, 3, 4), shape, strict=True):
        weights = _spline_weights(control.shape[axis], nodes).to(control)
        control = (control.movedim(axis, -1) @ weights).movedim(-1, axis)
    return control.contiguous()


@cache
def _spline_weights(controls: int, nodes: int) -> Float[Tensor, "control node"]:
    """How much of each control point every node of an axis takes."""
    place = torch.linspace(1, controls - 2, nodes, dtype=torch.float64)
    away = (torch.arange(controls, dtype=torch.float64)[:, None] - place).abs()
    near, far = 2 / 3 - away**2 + away**3 / 2, (2 - away).clamp_min(0) ** 3 / 6
    return torch.where(away < 1, near, far)


def neighbours(field: Features, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """A field shifted by one node down, as it is, and shifted by one up along an axis; the faces repeat."""
    first, last = field.narrow(axis, 0, 1), field.narrow(axis, field.shape[axis] - 1, 1)
    inner = field.shape[axis] - 1
    before = torch.cat([first, field.narrow(axis, 0, inner)], dim=axis)
    after = torch.cat([field.narrow(axis, 1, inner), last], dim=axis)
    return before, field, after


def shrink(image: Features, shape: tuple[int, int, int]) -> Features:
    """`resize` to a coarser grid after a (1 2 1)/4 blur along each axis, so that no detail is aliased."""
    if tuple(image.shape[2:]) == tuple(shape):
        return image
    for axis in (2, 3, 4):
        before, here, after = neighbours(image, axis)
        image = 0.25 * (before + after) + 0.5 * here
    return resize(image, shape)


def filled(field: Features, known: Tensor) -> Features:
    """A field where it is known; elsewhere what is near, as a mean over ever larger cubes (0 where nothing is known).

    Args:
        known: boolean, (batch, 1, i, j, k).
    """
    field = torch.where(known, field, 0.0)
    if max(field.shape[2:]) == 1:
        return field
    pairs = tuple(min(2, n) for n in field.shape[2:])
    mass = F.avg_pool3d(known.to(field), pairs, ceil_mode=True)
    mean = F.avg_pool3d(field, pairs, ceil_mode=True) / mass.clamp_min(1e-6)
    above = F.interpolate(filled(mean, mass > 0), size=field.shape[2:], mode="trilinear", align_corners=False)
    return torch.where(known, field, above)


def sample(
    field: Float[Tensor, "batch channel i j k"], coords_box: Float[Tensor, "batch 3 *points"]
) -> Float[Tensor, "batch channel *points"]:
    """Pull: trilinear values of a field at box coordinates, ``(field ∘ coords)``.

    Args:
        field: values at the nodes of a grid; a batch of 1 is used for every exam.
        coords_box: where to sample, any number of trailing axes. A point outside the box takes the value at the
            nearest face and has no gradient there; NaN and infinity are harmless.

    Returns:
        Values, differentiable in both arguments. By a fused kernel on a CPU in float32 or float64 and on a CUDA GPU in
        float32, else by PyTorch.

    Source: §5.1.1 ("linear interpolation resampling").
    """
    if field.shape[0] != coords_box.shape[0]:
        field = field.expand(coords_box.shape[0], *field.shape[1:])
    if has_kernel(field, coords_box) or has_gpu_kernel(field, coords_box):
        return _Sample.apply(field, coords_box)
    return sample_reference(field, coords_box)


def sample_reference(field: Features, coords_box: Float[Tensor, "batch 3 *points"]) -> Tensor:
    """`sample` in plain PyTorch: what the kernels are held equal to."""
    points = torch.nan_to_num(coords_box, nan=-1.0, posinf=1e6, neginf=-1e6).clamp(-1e6, 1e6)
    trailing = points.shape[2:]
    where = points.flatten(2).transpose(1, 2).flip(-1)[:, :, None, None]
    values = F.grid_sample(field, where, mode="bilinear", padding_mode="border", align_corners=True)
    return values.reshape(*values.shape[:2], *trailing)


def splat(
    values: Float[Tensor, "batch channel *points"],
    coords_box: Float[Tensor, "batch 3 *points"],
    shape: tuple[int, int, int],
) -> Features:
    """Push: the adjoint of `sample`, ``⟨sample(f, y), v⟩ = ⟨f, splat(v, y)⟩`` for every field f."""
    field = torch.zeros(values.shape[0], values.shape[1], *shape, dtype=values.dtype, device=values.device)
    if has_kernel(field, coords_box) or has_gpu_kernel(field, coords_box):
        return _sample_backward(field, coords_box, values, want_field=True, want_points=False)[0]
    field.requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(sample_reference(field, coords_box), field, values)
    return gradient


def has_kernel(*tensors: Tensor) -> bool:
    """Whether the fused CPU kernels serve these tensors: one device, one type, float32 or float64."""
    kinds = {(t.device.type, t.dtype) for t in tensors}
    return len(kinds) == 1 and kinds <= {("cpu", torch.float32), ("cpu", torch.float64)}


def has_gpu_kernel(*tensors: Tensor) -> bool:
    """Whether the Triton kernels serve these tensors: one CUDA device, float32, and Triton is there."""
    return _triton() and len({t.device for t in tensors}) == 1 and all(_cuda_float32(t) for t in tensors)


def _cuda_float32(tensor: Tensor) -> bool:
    return tensor.is_cuda and tensor.dtype == torch.float32


@cache
def _triton() -> bool:
    return find_spec("triton") is not None


def flat(tensor: Tensor) -> np.ndarray:
    """A contiguous NumPy view (batch, channel, everything else)."""
    return tensor.detach().contiguous().flatten(2).numpy()


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(ctx, field: Tensor, coords: Tensor) -> Tensor:
        ctx.save_for_backward(field, coords)
        if field.is_cuda:
            from deepatlas import kernels_gpu

            return kernels_gpu.sample(field, coords.flatten(2)).view(*field.shape[:2], *coords.shape[2:])
        out = torch.from_numpy(kernels_cpu.sample(flat(field), tuple(field.shape[2:]), flat(coords)))
        return out.view(*out.shape[:2], *coords.shape[2:])

    @staticmethod
    def backward(ctx, grad: Tensor):
        field, coords = ctx.saved_tensors
        return _sample_backward(field, coords, grad, *ctx.needs_input_grad)


def _sample_backward(field: Tensor, coords: Tensor, grad: Tensor, want_field: bool, want_points: bool):
    if field.is_cuda:
        from deepatlas import kernels_gpu

        given = field, coords.flatten(2), grad.flatten(2)
        to_field, to_points = kernels_gpu.sample_backward(*given, want_field, want_points)
        return to_field, None if to_points is None else to_points.view(coords.shape)
    shape = tuple(field.shape[2:])
    found = kernels_cpu.sample_backward(flat(field), shape, flat(coords), flat(grad), want_field, want_points)
    to_field, to_points = (None if part is None else torch.from_numpy(part) for part in found)
    return (
        None if to_field is None else to_field.view_as(field),
        None if to_points is None else to_points.view(coords.shape),
    )
