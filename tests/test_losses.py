"""Similarity and smoothness: known values, and the changes that must make no difference."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepatlas import affine, grid, losses, warp

SHAPE = (9, 8, 10)
WINDOWS = [None, 4]
LAWS = settings(max_examples=25, deadline=None, derandomize=True)
ANGLES = st.tuples(*[st.floats(-math.pi, math.pi) for _ in range(3)])
EXTENTS = st.tuples(*[st.floats(100.0, 1700.0) for _ in range(3)])


def draw(seed: int, *shape: int) -> torch.Tensor:
    """Numbers of a generator, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ball(radius: float, batch: int = 1) -> torch.Tensor:
    """A mask that is no box."""
    inside = grid.identity(SHAPE, torch.float64).norm(dim=1, keepdim=True) < radius
    return inside.expand(batch, -1, -1, -1, -1)


def test_huber_in_both_pieces_and_where_they_meet():
    a = torch.tensor([0.0, 0.25, -0.25, 0.5, -0.5, 2.0, -3.0], dtype=torch.float64)
    expected = [0, 0.03125, 0.03125, 0.125, 0.125, 0.875, 1.375]
    np.testing.assert_allclose(losses.huber(a).numpy(), expected, atol=1e-15)
    assert float(losses.huber(torch.tensor(3.0), delta=2.0)) == 4.0
    meet = torch.tensor([0.5 - 1e-9, 0.5 + 1e-9], dtype=torch.float64, requires_grad=True)
    slopes = torch.autograd.grad(losses.huber(meet).sum(), meet)[0]
    torch.testing.assert_close(slopes, torch.full_like(slopes, 0.5), atol=1e-8, rtol=0)


def test_a_masked_mean_is_a_mean_and_nothing_beyond_the_mask_reaches_it():
    values, mask = draw(0, 2, 1, *SHAPE), ball(0.8, 2)
    expected = [values[row][mask[row]].mean() for row in range(2)]
    torch.testing.assert_close(losses.masked_mean(values, mask), torch.stack(expected))
    spoiled = torch.where(mask, values, torch.nan)
    torch.testing.assert_close(losses.masked_mean(spoiled, mask), torch.stack(expected))
    assert losses.masked_mean(values, torch.zeros_like(mask)).tolist() == [0, 0]


def test_the_correlation_is_that_of_numpy_under_the_mask():
    a, b, mask = draw(1, 2, 3, *SHAPE), draw(2, 2, 3, *SHAPE), ball(0.8, 2)
    b = b + 0.7 * a
    for row in range(2):
        inside = mask[row, 0].numpy()
        expected = np.mean([np.corrcoef(a[row, c].numpy()[inside], b[row, c].numpy()[inside])[0, 1] for c in range(3)])
        assert math.isclose(float(losses.correlation(a, b, mask)[row]), expected, abs_tol=1e-9)


def test_the_windowed_correlation_is_that_of_numpy_window_by_window():
    a, b, mask = draw(3, 1, 2, *SHAPE), draw(4, 1, 2, *SHAPE), ball(0.9)
    b = b + 0.7 * a
    total, weight = 0.0, 0.0
    inside = mask[0, 0].numpy()
    for corner in np.ndindex(*[(n - 4) // 2 + 1 for n in SHAPE]):
        cube = tuple(slice(2 * start, 2 * start + 4) for start in corner)
        share = inside[cube].mean()
        if share <= 0.05:
            continue
        for channel in range(2):
            x, y = (f[0, channel].numpy()[cube][inside[cube]] for f in (a, b))
            flat = [losses.FLAT * f[0, channel].numpy()[inside].var() + 1e-8 for f in (a, b)]
            covariance = np.mean(x * y) - x.mean() * y.mean()
            total += share / 2 * covariance / np.sqrt((x.var() + flat[0]) * (y.var() + flat[1]))
        weight += share
    assert math.isclose(float(losses.correlation(a, b, mask, window=4)), total / weight, abs_tol=1e-9)


@pytest.mark.parametrize("window", WINDOWS)
@given(gain=st.floats(0.2, 5.0), offset=st.floats(-3.0, 3.0))
@LAWS
def test_contrast_and_brightness_do_not_matter(window, gain, offset):
    a, b, mask = draw(5, 1, 2, *SHAPE), draw(6, 1, 2, *SHAPE), ball(0.9)
    b = b + a
    before = losses.correlation(a, b, mask, window)
    torch.testing.assert_close(losses.correlation(gain * a + offset, b, mask, window), before, atol=1e-6, rtol=0)
    torch.testing.assert_close(losses.correlation(a, -gain * b + offset, mask, window), -before, atol=1e-6, rtol=0)


@pytest.mark.parametrize("window", WINDOWS)
def test_alike_is_one_and_opposite_is_minus_one(window):
    a, mask = draw(7, 2, 2, *SHAPE), ball(0.9, 2)
    one = losses.correlation(a, a, mask, window)
    least = 0.999 if window is None else 0.95  # windows are damped where they are flat
    assert (one > least).all()
    assert (one <= 1 + 1e-9).all()
    torch.testing.assert_close(losses.correlation(a, -a, mask, window), -one)


@pytest.mark.parametrize("window", WINDOWS)
def test_masked_voxels_do_not_matter(window):
    a, b, mask = draw(8, 1, 2, *SHAPE).requires_grad_(), draw(9, 1, 2, *SHAPE), ball(0.8)
    value = losses.correlation(a, b, mask, window)
    (gradient,) = torch.autograd.grad(value.sum(), a)
    beyond = (~mask).expand_as(a)
    assert (gradient[beyond] == 0).all()
    assert (gradient[~beyond] != 0).any()
    changed = torch.where(mask, a, 100 * draw(10, 1, 2, *SHAPE))
    torch.testing.assert_close(losses.correlation(changed, b, mask, window), value, atol=1e-9, rtol=0)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("level", [0.0, 0.7])
def test_a_constant_map_and_an_empty_mask_are_finite(window, level):
    for a, mask in ((torch.full((1, 2, *SHAPE), level), ball(0.8)), (draw(11, 1, 2, *SHAPE).float(), ball(0.0))):
        a.requires_grad_()
        value = losses.correlation(a, draw(12, 1, 2, *SHAPE).float(), mask, window)
        assert value.abs() < 0.05
        assert torch.isfinite(torch.autograd.grad(value.sum(), a)[0]).all()


def turned(angles, extents_in, extents_out, linear=None) -> torch.Tensor:
    """The Jacobian, mm to mm, of a warp between boxes of unequal sides that is ``linear`` (a turn) in mm."""
    linear = affine.rotation(torch.tensor([angles], dtype=torch.float64)) if linear is None else linear
    mm_in = affine.rotation(torch.tensor([[0.2, 0.1, -0.3]], dtype=torch.float64)) @ torch.diag_embed(
        torch.tensor([extents_in], dtype=torch.float64) / 2
    )
    mm_out = torch.diag_embed(torch.tensor([extents_out], dtype=torch.float64) / 2)
    in_boxes = torch.linalg.inv(mm_out) @ linear @ mm_in
    field = affine.apply(affine.from_parts(in_boxes, torch.zeros(1, 3).double()), grid.identity(SHAPE, torch.float64))
    return warp.to_mm(warp.jacobian(field), mm_out, mm_in)


def roughness_of(jacobian_mm, mask):
    """Roughness and folded share of a warp that is known by its Jacobians."""
    return losses.roughness(*warp.both_determinants(jacobian_mm), mask)


EVERYWHERE = torch.ones(1, 1, *SHAPE, dtype=torch.bool)


@given(ANGLES, EXTENTS, EXTENTS)
@LAWS
def test_any_rotation_is_free_between_boxes_of_any_sides(angles, extents_in, extents_out):
    roughness, folded = roughness_of(turned(angles, extents_in, extents_out), EVERYWHERE)
    assert float(roughness) < 1e-12
    assert float(folded) == 0


def test_per_box_unit_a_rotation_would_not_be_free():
    mm = torch.diag_embed(torch.tensor([[200.0, 200.0, 850.0]], dtype=torch.float64))
    turn = affine.rotation(torch.tensor([[0.5, 0.0, 0.0]], dtype=torch.float64))
    jacobian = (torch.linalg.inv(mm) @ turn @ mm)[..., None, None, None].expand(1, 3, 3, *SHAPE)
    c, s = math.cos(0.5), math.sin(0.5)
    log_shear = -math.log(math.hypot(c, s * 200 / 850) * math.hypot(c, s * 850 / 200))
    assert -0.75 < log_shear < -0.6
    expected = 0.5 * (abs(log_shear) - 0.25)
    torch.testing.assert_close(roughness_of(jacobian, EVERYWHERE)[0], torch.tensor([expected]).double())


@given(st.floats(0.3, 3.0), EXTENTS)
@LAWS
def test_uniform_scaling_is_free(scale, extents):
    linear = scale * affine.rotation(torch.tensor([[0.4, -0.3, 1.0]], dtype=torch.float64))
    assert float(roughness_of(turned(None, extents, (300, 300, 300), linear), EVERYWHERE)[0]) < 1e-12


def test_the_size_of_a_map_changes_nothing_about_its_roughness():
    noise = 0.1 * draw(14, 1, 3, 3, *SHAPE)
    rough = torch.eye(3, dtype=torch.float64).view(1, 3, 3, 1, 1, 1) + noise
    small, large = (roughness_of(size * rough, EVERYWHERE)[0] for size in (0.2, 5.0))
    torch.testing.assert_close(small, large)  # det 0.008 is small, not folded
    assert float(small) > 0.005


def test_shear_and_uneven_growth_cost_what_they_should():
    shear = torch.eye(3, dtype=torch.float64)[None].clone()
    shear[0, 0, 1] = 0.75  # columns (1, 0, 0) and (0.75, 1, 0): det 1, lengths 1 and 1.25
    roughness, _ = roughness_of(turned(None, (300, 400, 900), (500, 300, 400), shear), EVERYWHERE)
    assert math.isclose(float(roughness), 0.5 * math.log(1.25) ** 2, rel_tol=1e-9)
    grown = torch.eye(3, dtype=torch.float64).view(1, 3, 3, 1, 1, 1).repeat(1, 1, 1, *SHAPE)
    grown[..., :4] *= 0.8
    grown[..., 4:] *= 1.1
    small, large = 3 * math.log(0.8), 3 * math.log(1.1)
    mean = 0.4 * small + 0.6 * large
    expected = sum(share * float(losses.huber(torch.tensor(v - mean))) for share, v in ((0.4, small), (0.6, large)))
    assert math.isclose(float(roughness_of(grown, EVERYWHERE)[0]), expected, rel_tol=1e-6)


def test_folded_voxels_are_counted_under_the_mask_and_pushed_to_unfold():
    jacobian = torch.eye(3, dtype=torch.float64).view(1, 3, 3, 1, 1, 1).repeat(1, 1, 1, *SHAPE)
    jacobian[0, 2, 2, 4, 4, :3] = torch.tensor([-0.4, 0.0, 0.03], dtype=torch.float64)
    jacobian[0, 2, 2, 0, 0, 0] = -1
    jacobian.requires_grad_()
    mask = EVERYWHERE.clone()
    mask[0, 0, 0] = False
    roughness, folded = roughness_of(jacobian, mask)
    assert math.isclose(float(folded), 2 / float(mask.sum()))
    (gradient,) = torch.autograd.grad(roughness.sum(), jacobian)
    assert torch.isfinite(gradient).all()
    assert (gradient[0, 2, 2, 4, 4, :3] < 0).all()  # descent raises the determinant
    assert (gradient[:, :, :, 0] == 0).all()


def test_beyond_the_mask_a_warp_may_be_anything():
    jacobian = turned((0.1, 0.2, 0.3), (300, 400, 900), (500, 300, 400)).clone()
    mask = ball(0.8)
    jacobian[..., :2] = 1e3 * draw(13, 1, 3, 3, *SHAPE)[..., :2]
    mask = mask.clone()
    mask[..., :2] = False
    assert float(roughness_of(jacobian, mask)[0]) < 1e-12


def test_the_logarithm_of_a_determinant_is_continued_without_a_kink():
    floor = losses.FOLDED
    d = torch.tensor([floor * (1 - 1e-7), floor, floor * (1 + 1e-7), 1.0, -2.0], dtype=torch.float64)
    value = losses.log_determinant(d)
    torch.testing.assert_close(value[:3], torch.full((3,), math.log(floor), dtype=torch.float64), atol=1e-6, rtol=0)
    assert float(value[3]) == 0
    assert math.isclose(float(value[4]), math.log(floor) + (-2.0 - floor) / floor)


@given(st.floats(-5.0, 5.0), st.floats(1e-3, 2.0))
@LAWS
def test_the_logarithm_of_a_determinant_grows_everywhere(d, step):
    pair = torch.tensor([d, d + step], dtype=torch.float64, requires_grad=True)
    value = losses.log_determinant(pair)
    assert value[1] > value[0]
    slope = torch.autograd.grad(value.sum(), pair)[0]
    expected = 1 / pair.detach().clamp_min(losses.FOLDED)
    torch.testing.assert_close(slope, expected)


def test_the_edges_of_a_ramp_are_its_slope_per_centimetre_on_any_grid():
    slope = torch.tensor([0.01, -0.02, 0.005], dtype=torch.float64)  # per mm
    spacings = torch.tensor([[2.0, 2.0, 2.0], [1.0, 3.0, 5.5]], dtype=torch.float64)
    steps = torch.from_numpy(np.indices(SHAPE).astype(np.float64))[None]
    image = torch.einsum("a,ba,baijk->bijk", slope, spacings, steps.expand(2, -1, -1, -1, -1))[:, None]
    edges = losses.prewitt(image, spacings)
    inner = edges[:, :, 1:-1, 1:-1, 1:-1]
    torch.testing.assert_close(inner, torch.full_like(inner, 10 * float(slope.norm())), atol=1e-6, rtol=0)


def test_where_nothing_changes_there_are_no_edges_and_the_gradient_is_finite():
    image = torch.full((1, 1, *SHAPE), 0.4, requires_grad=True)
    edges = losses.prewitt(image, torch.tensor([[1.0, 2.0, 3.0]]))
    assert edges.max() < 2e-4
    assert torch.isfinite(torch.autograd.grad(edges.sum(), image)[0]).all()


@pytest.mark.parametrize("window", [0, 1, 5])
def test_a_window_that_cannot_be_halved_is_refused(window):
    a = draw(20, 1, 1, *SHAPE)
    with pytest.raises(ValueError, match="even window"):
        losses.correlation(a, a, ball(0.9), window)


def steps_of(shape) -> torch.Tensor:
    """Index of every voxel, (3, i, j, k) float64."""
    return torch.from_numpy(np.indices(shape).astype(np.float64))


def test_no_affine_displacement_costs_bending():
    linear, offset = draw(30, 2, 3, 3), draw(31, 2, 3, 1, 1, 1)
    shift = torch.einsum("bca,aijk->bcijk", linear, steps_of(SHAPE)) + offset
    assert losses.bending_energy(shift).shape == (2,)
    assert (losses.bending_energy(shift) < 1e-24).all()
    shift[1, 2, 4, 4, 4] += 1e-3
    assert float(losses.bending_energy(shift)[1]) > 1e-9


def test_the_bending_of_a_quadratic_displacement_is_the_sum_of_its_squared_second_derivatives():
    curved = draw(32, 2, 3, 3, 3)
    curved = curved + curved.transpose(2, 3)  # of u_c along a and b; differences of a quadratic are exact
    x = steps_of(SHAPE)
    shift = 0.5 * torch.einsum("bcde,dijk,eijk->bcijk", curved, x, x)
    torch.testing.assert_close(losses.bending_energy(shift), curved.square().sum(dim=(1, 2, 3)))
    alone = torch.zeros(1, 3, *SHAPE, dtype=torch.float64)
    alone[0, 1] = x[0] * x[2]  # counts twice: along ab and along ba
    torch.testing.assert_close(losses.bending_energy(alone), torch.tensor([2.0], dtype=torch.float64))


def test_bending_is_a_mean_over_the_exam():
    shift = torch.zeros(1, 3, *SHAPE, dtype=torch.float64)
    shift[0, 0] = steps_of(SHAPE)[2] ** 3 / 6  # its second derivative at x is x, and so is the difference
    expected = np.mean(np.arange(1, SHAPE[2] - 1) ** 2)
    assert math.isclose(float(losses.bending_energy(shift)), expected, rel_tol=1e-12)


WIDE = (20, 16, 18)


def slabs(*ends) -> torch.Tensor:
    """Masks (1, class, i, j, k) float64 that hold planes ``first`` up to ``last`` of the first axis."""
    masks = torch.zeros(1, len(ends), *WIDE, dtype=torch.float64)
    for mask, (first, last) in zip(masks[0], ends, strict=True):
        mask[first:last] = 1
    return masks


def apart(a, b, mask=None) -> float:
    """`soft_dice` of one exam, to what a voxel more or less may make."""
    return round(float(losses.soft_dice(a, b, mask).detach()), 3)


def test_equal_masks_are_not_apart_soft_or_not():
    soft = torch.rand(2, 3, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(losses.soft_dice(soft, soft), torch.zeros(2).double(), atol=1e-12, rtol=0)
    assert apart(slabs((0, 5), (3, 9)), slabs((0, 5), (3, 9))) == 0


def test_disjoint_half_overlapping_and_half_sure_masks():
    assert apart(slabs((0, 10)), slabs((10, 20))) == 1
    assert apart(slabs((0, 10)), slabs((5, 15))) == 0.5
    assert apart(slabs((0, 5)), slabs((0, 15))) == 0.5  # 2 · 5 / (5 + 15)
    assert apart(slabs((0, 10)), 0.5 * slabs((0, 10))) == 0.2  # 1 − 2 · ½ / (1 + ¼)
    assert apart(0.5 * slabs((0, 10)), 0.5 * slabs((5, 15))) == 0.5
    assert apart(slabs((0, 10)), slabs((20, 20))) == 1


def test_overlap_is_a_mean_over_the_classes_and_of_every_exam_alone():
    a, b = slabs((0, 10), (0, 10), (4, 8)), slabs((0, 10), (5, 15), (8, 12))
    assert apart(a, b) == 0.5  # of 0, 0.5 and 1
    both = losses.soft_dice(torch.cat([a, a]), torch.cat([b, a]))
    torch.testing.assert_close(both, torch.tensor([0.5, 0.0], dtype=torch.float64), atol=1e-3, rtol=0)


def test_a_class_that_neither_holds_counts_as_equal():
    assert apart(slabs((20, 20)), slabs((20, 20))) == 0
    assert apart(slabs((0, 10), (20, 20)), slabs((10, 20), (20, 20))) == 0.5


def test_overlap_is_blind_beyond_the_mask():
    a, b = slabs((0, 10)).requires_grad_(), slabs((5, 15))
    mask = slabs((5, 20)) > 0
    assert apart(a, b, mask) == round(1 - 2 * 5 / (5 + 10), 3)
    (gradient,) = torch.autograd.grad(losses.soft_dice(a, b, mask).sum(), a)
    assert (gradient[~mask] == 0).all()
    assert (gradient[mask] != 0).any()
    assert apart(torch.where(mask, a, 7.0), b, mask) == apart(a, b, mask)
    assert apart(a, b, torch.zeros_like(mask)) == 0


def test_the_error_of_labels_is_relative_to_what_is_drawn():
    inside = torch.zeros(3, 2, 4, 4, 4, dtype=torch.float64)
    inside[:, 0, :2] = 1
    inside[0, 1, 0, 0, :3] = 1
    known = torch.ones(3, 2, 4, 4, 4, dtype=torch.bool)
    known[1, 1] = known[2] = False
    assert losses.label_error(inside, inside, known).tolist() == [0, 0, 0]
    assert losses.label_error(torch.zeros_like(inside), inside, known).tolist() == [1, 1, 0]
    elsewhere = inside.flip(2)
    elsewhere[0, 1] = inside[0, 1].roll(1, dims=0)
    assert losses.label_error(elsewhere, inside, known).tolist() == [2, 2, 0]
    assert losses.label_error(0.5 * inside, inside, known).tolist() == [0.25, 0.25, 0]
    half = known.clone()
    half[0, :, 1:] = False
    assert float(losses.label_error(elsewhere, inside, half)[0]) == 1  # what lies elsewhere is not known to be wrong
