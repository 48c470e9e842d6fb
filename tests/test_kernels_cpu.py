"""The fused kernels: the same numbers as the plain forms, however the work is split."""

import gc

import numba
import numpy as np
import pytest
import torch

from deepatlas import grid, kernels_cpu, losses, networks, warp
from deepatlas.kernels_cpu import inversion, sampling
from deepatlas.kernels_cpu.memory import result_array

SHAPE = (7, 5, 6)
COUNT = 2500  # more than two chunks, and no multiple of one


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Numbers of a generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def bent_map(batch: int, dtype: torch.dtype) -> torch.Tensor:
    """A turned, stretched and bent map of a grid of unequal sides, another one for each exam."""
    where = grid.identity(SHAPE, torch.float64).expand(batch, -1, -1, -1, -1)
    x, y, z = where.unbind(1)
    size = torch.arange(1, batch + 1, dtype=torch.float64).view(-1, 1, 1, 1) * 0.04
    bent = torch.stack([x - 0.5 * y + size * torch.sin(3 * z), 0.6 * y + 0.5 * x, 0.8 * z + size * torch.cos(2 * x)])
    return bent.transpose(0, 1).contiguous().to(dtype)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def problem(request):
    """A map, points to find in it (one in six not wanted), and what the solver needs beside them."""
    c_p = bent_map(2, request.param)
    target = draw(1, 2, 3, COUNT, dtype=request.param) * 0.6
    active = torch.rand(2, 1, COUNT, generator=torch.Generator().manual_seed(2)) > 1 / 6
    forward = warp.linear_part(c_p)
    return c_p, target, active, forward, torch.linalg.inv(forward)


def invert(c_p, target, active, forward, inverse, steps=8, tolerance=1e-3):
    """The kernel, with torch tensors on both sides."""
    found = kernels_cpu.invert(
        grid.flat(c_p),
        SHAPE,
        grid.flat(target),
        active[:, 0].numpy(),
        inverse[:, :3, :3].contiguous().numpy(),
        inverse[:, :3, 3].contiguous().numpy(),
        steps,
        tolerance,
        warp._floor(forward).numpy(),
    )
    return tuple(torch.from_numpy(part) for part in found)


def test_a_result_is_nobodys_memory_while_it_or_a_view_of_it_is_held():
    first = result_array((2, 3), np.float32)
    first[:] = 1
    view = torch.from_numpy(first)[1:, 1:].view(-1)
    address = first.ctypes.data
    del first
    second = result_array((2, 3), np.float32)
    second[:] = 2
    assert second.ctypes.data != address
    assert view.tolist() == [1, 1]
    part = second[1]
    del second
    result_array((2, 3), np.float32)[:] = 3
    assert part.tolist() == [2, 2, 2]
    del view
    gc.collect()
    assert result_array((2, 3), np.float32).ctypes.data == address


def test_parts_give_every_thread_work_and_no_more(monkeypatch):
    for threads, batch, parts in ((1, 1, 1), (1, 8, 1), (2, 1, 2), (4, 2, 2), (6, 4, 1), (64, 1, 16), (64, 3, 5)):
        monkeypatch.setattr(numba, "get_num_threads", lambda threads=threads: threads)
        assert kernels_cpu.parts_for(batch, 10**5) == parts
        assert kernels_cpu.parts_for(batch, 10) == 1


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_number_of_channels_is_sampled_as_by_the_plain_form(channels, dtype):
    results = []
    for form in (grid.sample, grid.sample_reference):
        field = draw(3, 2, channels, *SHAPE, dtype=dtype).requires_grad_()
        where = (0.8 * draw(4, 2, 3, COUNT, dtype=dtype)).requires_grad_()
        values = form(field, where)
        results.append((values, *torch.autograd.grad(values, (field, where), draw(5, *values.shape, dtype=dtype))))
    close = 2e-5 if dtype == torch.float32 else 1e-10
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, atol=close, rtol=close)


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_the_parts_of_an_adjoint_add_up_to_the_whole(parts):
    field, where = draw(3, 2, 3, *SHAPE), draw(4, 2, 3, COUNT)
    grad = draw(5, 2, 3, COUNT)
    given = grid.flat(field), SHAPE, grid.flat(where), grid.flat(grad), True, True
    (whole, to_points), (together, same) = (kernels_cpu.sample_backward(*given, parts=n) for n in (1, parts))
    np.testing.assert_array_equal(to_points, same)
    np.testing.assert_allclose(whole, together, atol=1e-10)


@pytest.mark.parametrize("channels", [1, 3])
def test_only_the_planes_that_points_lie_in_are_read_and_the_others_get_no_gradient(channels):
    shape = (9, 4, 5)
    field, grad = draw(3, 1, channels, *shape), draw(5, 1, channels, 2000)
    where = 0.9 * (2 * torch.rand(1, 3, 2000, generator=torch.Generator().manual_seed(1)) - 1)
    where[:, 0] = 0.125 * where[:, 0] - 0.25  # between the third and the fourth plane, and next to them
    known = kernels_cpu.sample(grid.flat(field), shape, grid.flat(where))
    field[:, :, 6:] = torch.nan
    given = grid.flat(field), shape, grid.flat(where)
    for parts in (1, 3):
        kernels_cpu.sample_backward(*given, grid.flat(grad) * 1e3, True, True, parts)  # leaves numbers in the memory
        np.testing.assert_array_equal(kernels_cpu.sample(*given, parts), known)
        to_field, to_points = kernels_cpu.sample_backward(*given, grid.flat(grad), True, True, parts)
        to_field = to_field.reshape(channels, *shape)
        assert (to_field[:, :2] == 0).all()
        assert (to_field[:, 6:] == 0).all()
        np.testing.assert_allclose(to_field.sum(axis=(1, 2, 3)), grad[0].sum(dim=1), rtol=1e-4, atol=1e-3)
        assert np.isfinite(to_points).all()


def test_the_number_of_threads_does_not_change_a_training_gradient(monkeypatch):
    gradients = []
    for parts in (1, 5):
        for module in (sampling, inversion):
            monkeypatch.setattr(module, "parts_for", lambda batch, points, parts=parts: parts)
        c_p, c_q = bent_map(2, torch.float64).requires_grad_(), (bent_map(2, torch.float64) * 0.7).requires_grad_()
        phi = warp.implicit(c_p, c_q).phi_box
        moved = grid.sample(c_p, phi)
        gradients.append(torch.autograd.grad((phi * draw(6, *phi.shape)).sum() + moved.square().sum(), (c_p, c_q)))
    for one, many in zip(*gradients, strict=True):
        torch.testing.assert_close(one, many, atol=1e-10, rtol=0)


def test_only_what_is_wanted_is_computed():
    field, where, grad = draw(7, 1, 2, *SHAPE), draw(8, 1, 3, 50), draw(9, 1, 2, 50)
    given = grid.flat(field), SHAPE, grid.flat(where), grid.flat(grad)
    none, to_points = kernels_cpu.sample_backward(*given, False, True)
    assert none is None
    assert to_points.any()
    to_field, none = kernels_cpu.sample_backward(*given, True, False)
    assert none is None
    assert np.isclose(to_field.sum(), grad.sum())


def test_the_solver_is_its_reference(problem):
    c_p, target, active, forward, inverse = problem
    y, residual, det = invert(*problem)
    reference = warp.invert_reference(c_p, target, active, inverse, warp._floor(forward), 8, 1e-3)
    tight = c_p.dtype == torch.float64
    same = (residual - reference[1]).abs() < (1e-9 if tight else 1e-3)  # also the voxels outside, which stop at a face
    same |= ~active[:, 0]
    assert same.float().mean() > (0.9999 if tight else 0.99)
    solved = active[:, 0] & (residual < 1e-3) & (reference[1] < 1e-3)
    assert 0.3 < solved.float().mean() < 0.8
    apart = (y - reference[0]).abs().amax(dim=1)
    assert apart[solved].max() < (1e-9 if tight else 2e-3)  # both stopped within 1e-3 voxels
    assert (det - reference[2])[solved].abs().max() < (1e-8 if tight else 0.1)


def test_what_is_not_wanted_is_placed_by_the_affine_and_flagged(problem):
    _, target, active, _, inverse = problem
    y, residual, det = invert(*problem)
    idle = ~active[:, 0]
    affine_place = inverse[:, :3, :3] @ target + inverse[:, :3, 3:]
    for row in range(2):
        torch.testing.assert_close(y[row][:, idle[row]], affine_place[row][:, idle[row]])
    assert torch.isinf(residual[idle]).all()
    assert (det[idle] == 0).all()


def test_a_solution_never_leaves_the_box_and_more_steps_never_make_it_worse(problem):
    active = problem[2][:, 0]
    before = torch.full_like(problem[1][:, 0], torch.inf)
    for steps in (0, 1, 2, 4, 8, 16):
        y, residual, _ = invert(*problem, steps=steps)
        assert (residual <= before)[active].all()
        assert (y.abs().amax(dim=1)[active] <= 1).all()
        before = residual


@pytest.mark.parametrize("parts", [1, 4])
def test_the_gradient_of_the_solver_is_its_reference(problem, parts):
    c_p, target, active, forward, _ = problem
    y, _, _ = invert(*problem, steps=12)
    grad, floor = draw(10, *target.shape, dtype=c_p.dtype), warp._floor(forward)
    to_target, to_field = kernels_cpu.invert_backward(
        grid.flat(c_p),
        SHAPE,
        grid.flat(y),
        active[:, 0].numpy(),
        forward[:, :3, :3].contiguous().numpy(),
        floor.numpy(),
        grid.flat(grad),
        parts=parts,
    )
    tolerance = 1e-9 if c_p.dtype == torch.float64 else 2e-3
    expected = warp._implicit_gradient(c_p, y, active, forward, floor, grad)
    torch.testing.assert_close(torch.from_numpy(to_target), expected, atol=tolerance, rtol=tolerance)
    pushed = -grid.splat(expected, y, SHAPE)
    torch.testing.assert_close(torch.from_numpy(to_field).view_as(pushed), pushed, atol=10 * tolerance, rtol=tolerance)


def mm(batch: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Linear parts of boxes of unequal sides, turned a little."""
    sides = torch.diag(torch.tensor([120.0, 200.0, 90.0], dtype=torch.float64))
    return (sides + 5 * draw(seed, batch, 3, 3)).to(dtype)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_determinants_and_their_gradient_are_those_of_the_plain_form(batch):
    mask = torch.rand(batch, 1, *SHAPE, generator=torch.Generator().manual_seed(4)) > 0.3
    weights = draw(5, 2, batch, 1, *SHAPE)
    results = []
    for form in (warp.determinants, warp.determinants_reference):
        field = bent_map(batch, torch.float64).requires_grad_()
        both = form(field, mm(1, 6, torch.float64), mm(batch, 7, torch.float64), mask)
        (grad,) = torch.autograd.grad(sum((w * d).sum() for w, d in zip(weights, both, strict=True)), field)
        results.append((*both, grad))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-10, rtol=1e-10)


def test_determinants_have_the_gradient_they_claim():
    mask = torch.ones(1, 1, 3, 4, 2, dtype=torch.bool)
    field = (grid.identity((3, 4, 2), torch.float64) + 0.1 * draw(8, 1, 3, 3, 4, 2)).requires_grad_()
    spaces = mm(1, 9, torch.float64) / 100, mm(1, 10, torch.float64) / 100
    assert torch.autograd.gradcheck(lambda f: warp.determinants(f, *spaces, mask), (field,), atol=1e-7)


@pytest.mark.parametrize("side", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_over_cubes_and_their_gradient_are_those_of_the_plain_form(side, dtype):
    weight = (torch.rand(2, 1, *SHAPE, generator=torch.Generator().manual_seed(11)) > 0.4).to(dtype)
    results = []
    for form in (losses.cube_sums, losses.cube_sums_reference):
        a, b = (draw(seed, 2, 3, *SHAPE, dtype=dtype).requires_grad_() for seed in (12, 13))
        sums = form(a, b, weight, side)
        results.append((sums, *torch.autograd.grad((sums * draw(14, *sums.shape)).sum(), (a, b))))
    for ours, plain in zip(*results, strict=True):
        close = 1e-5 if dtype == torch.float32 else 1e-10
        torch.testing.assert_close(ours, plain, atol=close, rtol=close)


def test_sums_over_cubes_have_the_gradient_they_claim():
    a, b = (draw(seed, 1, 2, 3, 4, 5).requires_grad_() for seed in (15, 16))
    weight = torch.ones(1, 1, 3, 4, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: losses.cube_sums(a, b, weight, 2), (a, b))


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (6, 3), (8, 8), (16, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalisation_and_its_gradient_are_those_of_the_plain_form(channels, groups, dtype, monkeypatch):
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(groups, channels).to(dtype)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    x = (3 + 2 * draw(17, 2, channels, 17, 15, 13, dtype=dtype)).requires_grad_()  # more than one block of voxels
    push = draw(18, *x.shape, dtype=dtype)
    results = []
    for kernel in (True, False):
        monkeypatch.setattr(grid, "has_kernel", lambda *_, kernel=kernel: kernel)
        values = networks.activated(x, norm)
        results.append((values, *torch.autograd.grad(values, (x, norm.weight, norm.bias), push)))
    for ours, plain in zip(*results, strict=True):
        close = 1e-4 if dtype == torch.float32 else 1e-9
        torch.testing.assert_close(ours, plain, atol=close, rtol=close)


def test_normalisation_has_the_gradient_it_claims():
    norm = torch.nn.GroupNorm(2, 4).double()
    assert torch.autograd.gradcheck(lambda x: networks.activated(x, norm), (draw(19, 2, 4, 2, 3, 2).requires_grad_(),))
