"""The Triton kernels: the numbers of the plain forms, on a GPU where there is one, else in Triton's interpreter.

The interpreter has to be asked for before Triton is imported, so it runs in a process of its own.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

SCRIPT = """
import json, torch
from deepatlas import grid, kernels_gpu, warp

device = "cuda" if torch.cuda.is_available() else "cpu"
grid.has_kernel = grid.has_gpu_kernel = lambda *_: False  # from here on the plain forms
chance = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(*shape, generator=chance).to(device)


def apart(a, b):
    return float((a - b).abs().max())


out = {}
for name, shape, channels in (("odd", (5, 4, 6), 3), ("flat", (5, 1, 3), 2), ("one", (4, 4, 4), 1)):
    field, where = draw(2, channels, *shape), 0.8 * draw(2, 3, 200)
    where[0, :, 0], where[0, :, 1] = 1.0, -1.0  # on the corners
    where[1, 0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    field.requires_grad_(), where.requires_grad_()
    values = grid.sample(field, where)
    grad = draw(*values.shape)
    expected = torch.autograd.grad(values, (field, where), grad)
    found = kernels_gpu.sample_backward(field.detach(), where.detach(), grad, True, True)
    inner = (where.abs() < 1).expand_as(where) & torch.isfinite(where)  # at a face either side's slope is right
    out[name] = [
        apart(kernels_gpu.sample(field.detach(), where.detach()), values),
        apart(found[0], expected[0]),
        apart(found[1][inner], expected[1][inner]),
        float(found[1][~inner].abs().nan_to_num(9.0).max()),
    ]

shape = (6, 5, 7)
x, y, z = grid.identity(shape)[0].to(device)
bent = torch.stack([x - 0.4 * y + 0.05 * torch.sin(3 * z), 0.6 * y + 0.4 * x, 0.8 * z + 0.05 * torch.cos(2 * x)])
c_p = torch.stack([bent, 0.9 * bent + 0.02]).contiguous()
target, active = 0.5 * draw(2, 3, 300), torch.rand(2, 300, generator=chance).to(device) > 0.2
forward = warp.linear_part(c_p)
inverse, floor = torch.linalg.inv(forward), warp._floor(forward)
expected = warp.invert_reference(c_p, target, active[:, None], inverse, floor, 12, 1e-5)
found = kernels_gpu.invert(c_p, target, active, inverse, floor, 12, 1e-5)
solved = active & (expected[1] < 1e-3)
out["solved"] = float(solved.float().mean())
out["same"] = float(((found[1] < 1e-3) == (expected[1] < 1e-3))[active].float().mean())
out["place"] = apart(found[0].transpose(1, 2)[solved], expected[0].transpose(1, 2)[solved])
out["idle"] = apart(found[0].transpose(1, 2)[~active], expected[0].transpose(1, 2)[~active])
out["idle residual"] = float(found[1][~active].min())
grad = draw(2, 3, 300)
wanted = warp._implicit_gradient(c_p, expected[0], active[:, None], forward, floor, grad)
to_target, to_field = kernels_gpu.invert_backward(c_p, expected[0], active, forward, floor, grad)
out["to target"] = apart(to_target, wanted)
out["to field"] = apart(to_field, -grid.splat(wanted, expected[0], shape))
print(json.dumps(out))
"""


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from deepatlas import kernels_gpu as gpu

KINDS = {"active": "*i8", "tolerance": "fp32"} | dict.fromkeys(
    ["channels", "ni", "nj", "nk", "count", "steps"], "i32"
) | dict.fromkeys(["BLOCK", "WANT_FIELD", "WANT_POINTS"], "constexpr")
for kernel in (gpu._sample, gpu._sample_backward, gpu._invert, gpu._invert_backward):
    signature = {name: KINDS.get(name, "*fp32") for name in kernel.arg_names}
    fixed = {name: 128 if name == "BLOCK" else True for name, kind in signature.items() if kind == "constexpr"}
    made = triton.compile(ASTSource(kernel, signature, constexprs=fixed), target=GPUTarget("cuda", 90, 32))
    assert ".target sm_90" in made.asm["ptx"]
"""


def run(script, **environment):
    """What a script prints, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_kernels_compile_for_a_gpu_that_is_not_here(tmp_path):
    run(COMPILE, TRITON_CACHE_DIR=str(tmp_path))


@pytest.fixture(scope="module")
def apart():
    """Largest differences between the kernels and the plain forms."""
    mode = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    return json.loads(run(SCRIPT, **mode).splitlines()[-1])


@pytest.mark.parametrize("name", ["odd", "flat", "one"])
def test_the_sampler_and_its_adjoint_are_the_plain_ones(apart, name):
    values, to_field, to_points, held = apart[name]
    assert values < 1e-5
    assert to_field < 1e-5
    assert to_points < 2e-5
    assert held == 0  # beyond a face, and where the place is not a number, there is no gradient


def test_the_solver_is_its_reference(apart):
    assert 0.2 < apart["solved"] < 0.8
    assert apart["same"] > 0.98
    assert apart["place"] < 1e-4
    assert apart["idle"] < 1e-5
    assert apart["idle residual"] == float("inf")


def test_the_gradient_of_the_solver_is_its_reference(apart):
    assert apart["to target"] < 1e-3
    assert apart["to field"] < 1e-3
