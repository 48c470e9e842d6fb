"""Grids: sampling is held to a second path, its adjoint to its definition, and resizing to what it must keep."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch.autograd import gradcheck

import deepatlas
from deepatlas import grid

SHAPES = st.tuples(*[st.integers(1, 9) for _ in range(3)])
LAWS = settings(max_examples=40, deadline=None, derandomize=True)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Numbers of a generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def places(seed: int, batch: int, *trailing: int, reach: float = 1.3, dtype=torch.float64) -> torch.Tensor:
    """Points in and around the box."""
    uniform = torch.rand(batch, 3, *trailing, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((uniform * 2 - 1) * reach).to(dtype)


def ramp(shape: tuple[int, int, int], dtype=torch.float64) -> torch.Tensor:
    """Two linear functions of the box coordinates, as channels."""
    x, y, z = grid.identity(shape, dtype)[0]
    return torch.stack([1 + 2 * x - 3 * y + 0.5 * z, 4 * z - x])[None]


def test_identity_names_the_corners_and_the_axes():
    where = grid.identity((3, 4, 6), torch.float64)
    assert where.shape == (1, 3, 3, 4, 6)
    assert where[0, :, 0, 0, 0].tolist() == [-1, -1, -1]
    assert where[0, :, -1, 0, -1].tolist() == [1, -1, 1]
    np.testing.assert_allclose(where[0, 1, 2, :, 3].numpy(), [-1, -1 / 3, 1 / 3, 1], atol=1e-15)
    assert grid.identity((1, 2, 2))[0, 0].abs().max() == 0


@given(SHAPES, st.integers(1, 5), st.sampled_from([torch.float32, torch.float64]))
@LAWS
def test_sampling_at_the_identity_changes_nothing(shape, channels, dtype):
    field = draw(0, 1, channels, *shape, dtype=dtype)
    torch.testing.assert_close(grid.sample(field, grid.identity(shape, dtype)), field, atol=TOLERANCE[dtype], rtol=0)


def test_sampling_agrees_with_scipy_on_unequal_axes():
    field, where = draw(1, 1, 1, 4, 7, 5), places(2, 1, 50, reach=1.0)
    index = (where[0].numpy() + 1) / 2 * (np.array([[4], [7], [5]]) - 1)
    expected = ndimage.map_coordinates(field[0, 0].numpy(), index, order=1)
    np.testing.assert_allclose(grid.sample(field, where)[0, 0].numpy(), expected, atol=1e-12)


@given(SHAPES, st.integers(1, 5), st.integers(1, 3), st.sampled_from(list(TOLERANCE)), st.integers(0, 2**16))
@LAWS
def test_the_kernel_is_the_reference_in_values_and_both_gradients(shape, channels, batch, dtype, seed):
    results = []
    for function in (grid.sample, grid.sample_reference):
        field = draw(seed, batch, channels, *shape, dtype=dtype).requires_grad_()
        where = places(seed + 1, batch, 3, 7, dtype=dtype).requires_grad_()
        value = function(field, where)
        weight = draw(seed + 2, *value.shape, dtype=dtype)
        results.append((value, *torch.autograd.grad((value * weight).sum(), (field, where))))
    for kernel, reference in zip(*results, strict=True):
        scale = max(1.0, float(reference.detach().abs().max()))
        torch.testing.assert_close(kernel, reference, atol=TOLERANCE[dtype] * scale, rtol=0)


def test_points_on_cell_faces():
    shape = (5, 3, 9)  # nodes at binary fractions: every node and every half step is met exactly
    field = draw(3, 1, 2, *shape)
    fine = grid.identity((9, 5, 17), torch.float64)
    expected = grid.resize(field, (9, 5, 17))
    torch.testing.assert_close(grid.sample(field, fine), expected)
    gradients = []
    for function in (grid.sample, grid.sample_reference):
        leaf = field.clone().requires_grad_()
        gradients.append(torch.autograd.grad((function(leaf, fine) * draw(4, *expected.shape)).sum(), leaf)[0])
    torch.testing.assert_close(*gradients)


def test_points_outside_take_the_nearest_face_and_have_no_gradient_across_it():
    field = draw(5, 1, 2, 4, 5, 6)
    where = torch.tensor([[[1.5, -7.0, 0.2], [0.1, 0.3, -1.01], [0.4, 3.0, -0.3]]], dtype=torch.float64)
    where.requires_grad_()
    value = grid.sample(field, where)
    torch.testing.assert_close(value, grid.sample(field, where.detach().clamp(-1, 1)))
    (gradient,) = torch.autograd.grad(value.sum(), where)
    outside = where.detach().abs() > 1
    assert (gradient[outside] == 0).all()
    assert (gradient[~outside] != 0).all()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_nan_and_infinity_are_harmless(dtype):
    field = draw(6, 1, 2, 4, 5, 6, dtype=dtype).requires_grad_()
    nan, inf = float("nan"), float("inf")
    where = torch.tensor([[[nan, inf, -inf, 1e30, nan], [0, nan, inf, -1e30, nan], [0, 0.5, -inf, 1e38, nan]]])
    where = where.to(dtype).requires_grad_()
    value = grid.sample(field, where)
    assert torch.isfinite(value).all()
    torch.testing.assert_close(value[0, :, 2], field[0, :, 0, -1, 0])
    torch.testing.assert_close(value[0, :, 3], field[0, :, -1, 0, -1])
    to_field, to_points = torch.autograd.grad(value.sum(), (field, where))
    assert torch.isfinite(to_field).all()
    assert (to_points[~torch.isfinite(where)] == 0).all()
    assert torch.isfinite(to_points).all()
    assert grid.inside(where.detach())[0, 0].tolist() == [False] * 5


def test_one_field_serves_a_batch_and_gathers_its_gradient():
    field, where = draw(7, 1, 2, 4, 3, 5).requires_grad_(), places(8, 3, 6)
    value = grid.sample(field, where)
    for row in range(3):
        torch.testing.assert_close(value[row : row + 1], grid.sample(field, where[row : row + 1]))
    together = torch.autograd.grad((value * draw(9, *value.shape)).sum(), field)[0]
    apart = grid.splat(draw(9, *value.shape), where, (4, 3, 5)).sum(dim=0, keepdim=True)
    torch.testing.assert_close(together, apart)
    with pytest.raises(RuntimeError):
        grid.sample(draw(7, 2, 1, 3, 3, 3), where)


def test_strides_do_not_matter():
    field, where = draw(10, 1, 2, 6, 4, 5), places(11, 1, 4, 4, 4)
    value = grid.sample(field.permute(0, 1, 4, 2, 3), where.permute(0, 1, 3, 2, 4))
    plain = grid.sample(field.permute(0, 1, 4, 2, 3).contiguous(), where.permute(0, 1, 3, 2, 4).contiguous())
    assert torch.equal(value, plain)


def test_a_type_without_a_kernel_goes_the_other_way():
    field, where = draw(12, 1, 1, 4, 4, 4), places(13, 1, 9)
    assert not grid.has_kernel(field, where.float())
    assert not grid.has_kernel(field.bfloat16(), where.bfloat16())
    assert grid.has_kernel(field, where)
    half = grid.sample(field.bfloat16(), where.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), grid.sample(field, where), atol=0.1, rtol=0)


@pytest.mark.parametrize("function", [grid.sample, grid.sample_reference])
def test_gradients_of_sampling_are_those_of_finite_differences(function):
    field = draw(14, 2, 3, 3, 4, 5).requires_grad_()
    where = places(15, 2, 5, reach=1.2)
    index = (where + 1) / 2 * (torch.tensor([3.0, 4.0, 5.0]).view(1, 3, 1) - 1)
    assert (index - index.round()).abs().min() > 1e-3  # no kink within a step
    assert gradcheck(function, (field, where.requires_grad_()), eps=1e-6, atol=1e-7)


@given(SHAPES, st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**16))
@LAWS
def test_splat_is_the_adjoint_of_sample(shape, channels, batch, seed):
    field, where = draw(seed, batch, channels, *shape), places(seed + 1, batch, 11)
    values = draw(seed + 2, batch, channels, 11)
    pulled = (grid.sample(field, where) * values).sum()
    pushed = (field * grid.splat(values, where, shape)).sum()
    torch.testing.assert_close(pulled, pushed)


def test_splat_keeps_the_sum_and_both_paths_agree(monkeypatch):
    values, where = draw(16, 2, 2, 30), places(17, 2, 30)
    fused = grid.splat(values, where, (5, 4, 3))
    torch.testing.assert_close(fused.sum(dim=(2, 3, 4)), values.sum(dim=2))
    monkeypatch.setattr(grid, "has_kernel", lambda *_: False)
    torch.testing.assert_close(grid.splat(values, where, (5, 4, 3)), fused)


@given(SHAPES, SHAPES)
@LAWS
def test_resizing_keeps_the_corners_to_the_bit(before, after):
    after = tuple(max(2, n) if m > 1 else n for n, m in zip(after, before, strict=True))
    field = draw(18, 1, 2, *before, dtype=torch.float32)
    corners = (slice(None), slice(None), *[slice(None, None, max(1, n - 1)) for n in before])
    resized = grid.resize(field, after)
    assert resized.shape[2:] == after
    ends = (slice(None), slice(None), *[slice(None, None, max(1, n - 1)) for n in after])
    assert torch.equal(resized[ends], field[corners].expand_as(resized[ends]))


@given(*[st.tuples(*[st.integers(2, 9) for _ in range(3)]) for _ in range(2)])
@LAWS
def test_a_linear_field_is_reproduced_by_resizing_and_by_sampling(before, after):
    torch.testing.assert_close(grid.resize(ramp(before), after), ramp(after))
    where = places(19, 1, 20, reach=1.0)
    x, y, z = where[0]
    expected = torch.stack([1 + 2 * x - 3 * y + 0.5 * z, 4 * z - x])[None]
    torch.testing.assert_close(grid.sample(ramp(before), where), expected)


def test_the_same_shape_is_the_same_field():
    field = draw(20, 1, 1, 4, 5, 6)
    assert grid.resize(field, (4, 5, 6)) is field
    assert grid.shrink(field, (4, 5, 6)) is field


def test_shrinking_keeps_constants_and_slopes_and_removes_what_a_coarse_grid_cannot_hold():
    shape, coarse = (17, 13, 9), (9, 7, 5)
    torch.testing.assert_close(grid.shrink(torch.full((1, 2, *shape), 3.25), coarse), torch.full((1, 2, *coarse), 3.25))
    inner = (slice(None), slice(None), *[slice(1, -1)] * 3)
    torch.testing.assert_close(grid.shrink(ramp(shape), coarse)[inner], ramp(coarse)[inner])
    i, j, k = np.indices(shape)
    for axis in (i, j, k):
        stripes = torch.from_numpy((axis % 2).astype(np.float64))[None, None]
        shrunk = grid.shrink(stripes, coarse)
        torch.testing.assert_close(shrunk[inner], torch.full_like(shrunk[inner], 0.5))
        assert grid.resize(stripes, coarse)[inner].std() < 1e-12  # aliased: all nodes fall on stripes of one kind
        assert (grid.resize(stripes, coarse)[inner] - 0.5).abs().min() > 0.4


def test_inside_counts_the_faces():
    where = torch.tensor([[[1.0, 1.0001, 0.0], [-1.0, 0.0, 0.5], [1.0, 0.0, float("nan")]]])
    assert grid.inside(where)[0, 0].tolist() == [True, False, False]


def test_the_only_grid_sample_stands_in_grid():
    for path in Path(deepatlas.__file__).parent.rglob("*.py"):
        uses = path.read_text(encoding="utf-8").count("F.grid_sample(")
        assert uses == (path.name == "grid.py"), path.name


# Splines


def test_equal_control_points_give_a_uniform_field_and_a_ramp_stays_one():
    uniform = grid.spline(torch.full((1, 2, 6, 5, 4), 0.7, dtype=torch.float64), (9, 8, 7))
    torch.testing.assert_close(uniform, torch.full((1, 2, 9, 8, 7), 0.7, dtype=torch.float64))
    control = torch.arange(7, dtype=torch.float64).view(1, 1, 7, 1, 1).expand(-1, -1, -1, 4, 4)
    ramp = grid.spline(control, (11, 3, 3))[0, 0, :, 1, 1]
    torch.testing.assert_close(ramp, torch.linspace(1, 5, 11, dtype=torch.float64))


def test_a_spline_is_the_cubic_one_of_scipy():
    interpolate = pytest.importorskip("scipy.interpolate")
    control = torch.randn(1, 1, 9, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    control = control[:, :, :, :1, :1].expand(-1, -1, -1, 4, 4)
    ours = grid.spline(control, (33, 2, 2))[0, 0, :, 0, 0]
    knots = range(-2, 11)  # control point i stands over knot i + 2
    theirs = interpolate.BSpline(knots, control[0, 0, :, 0, 0].numpy(), 3)(torch.linspace(1, 7, 33).numpy())
    torch.testing.assert_close(ours, torch.from_numpy(theirs), atol=1e-6, rtol=0)


@LAWS
@given(SHAPES, st.integers(0, 9))
def test_a_filled_field_is_kept_where_it_is_known_and_goes_on_beyond(shape, seed):
    field, known = draw(seed, 2, 3, *shape), draw(seed + 1, 2, 1, *shape) > 0.5
    filled = grid.filled(torch.where(known, field, torch.nan), known)
    assert torch.equal(filled[known.expand_as(field)], field[known.expand_as(field)])
    for one, given_, there in zip(
        filled.flatten(0, 1), field.flatten(0, 1), known.repeat_interleave(3, 0)[:, 0], strict=True
    ):
        reach = given_[there] if there.any() else torch.zeros(1, dtype=field.dtype)
        assert reach.min() - 1e-9 <= one.min()
        assert one.max() <= reach.max() + 1e-9


def test_a_field_is_filled_by_what_is_near():
    field = ramp((16, 16, 16))
    known = grid.identity((16, 16, 16))[:, :1] < 0.4
    hole = known & ~(grid.identity((16, 16, 16)).abs() < 0.15).all(dim=1, keepdim=True)
    filled = grid.filled(field, hole)
    assert (filled - field)[known.expand_as(field) & ~hole].abs().max() < 0.4
