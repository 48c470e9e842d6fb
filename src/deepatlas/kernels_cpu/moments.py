"""Moments of two maps over cubes of voxels, and their adjoint; see `deepatlas.losses.cube_sums`."""

from numba import njit, prange

from deepatlas.kernels_cpu.cells import FAST


@njit(parallel=True, fastmath=FAST, cache=True)
def moments(a, b, weight, shape, side, out):
    """Sums over cubes of ``side`` voxels of w, wa, wb, waa, wbb, wab, into ``out`` (batch, channel, 6, cube)."""
    cubes = ((shape[0] + side - 1) // side, (shape[1] + side - 1) // side, (shape[2] + side - 1) // side)
    for task in prange(a.shape[0] * a.shape[1] * cubes[0]):
        n, slab = task // cubes[0], task % cubes[0]
        batch, channel = n // a.shape[1], n % a.shape[1]
        fa, fb, fw = a[batch, channel], b[batch, channel], weight[batch, 0]
        into = out[batch, channel]
        for i in range(slab * side, min((slab + 1) * side, shape[0])):
            for j in range(shape[1]):
                row = (i * shape[1] + j) * shape[2]
                for ck in range(cubes[2]):
                    s, sa, sb, saa, sbb, sab = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
                    for o in range(row + ck * side, row + min((ck + 1) * side, shape[2])):
                        w = fw[o]
                        x, y = fa[o], fb[o]
                        wx, wy = w * x, w * y
                        s += w
                        sa += wx
                        sb += wy
                        saa += wx * x
                        sbb += wy * y
                        sab += wx * y
                    cube = (slab * cubes[1] + j // side) * cubes[2] + ck
                    into[0, cube] += s
                    into[1, cube] += sa
                    into[2, cube] += sb
                    into[3, cube] += saa
                    into[4, cube] += sbb
                    into[5, cube] += sab


@njit(parallel=True, fastmath=FAST, cache=True)
def moments_backward(a, b, weight, shape, side, grad, grad_a, grad_b, want_b):
    """Adjoint of `moments` in the two maps: ``w (g_a + 2 g_aa a + g_ab b)``, and the same for b."""
    kind = a.dtype.type
    cubes = ((shape[0] + side - 1) // side, (shape[1] + side - 1) // side, (shape[2] + side - 1) // side)
    for task in prange(a.shape[0] * a.shape[1] * shape[0]):
        n, i = task // shape[0], task % shape[0]
        batch, channel = n // a.shape[1], n % a.shape[1]
        fa, fb, fw, g = a[batch, channel], b[batch, channel], weight[batch, 0], grad[batch, channel]
        for j in range(shape[1]):
            row = (i * shape[1] + j) * shape[2]
            for ck in range(cubes[2]):
                cube = ((i // side) * cubes[1] + j // side) * cubes[2] + ck
                ga, gb, gab = kind(g[1, cube]), kind(g[2, cube]), kind(g[5, cube])
                gaa, gbb = kind(2 * g[3, cube]), kind(2 * g[4, cube])
                for o in range(row + ck * side, row + min((ck + 1) * side, shape[2])):
                    grad_a[batch, channel, o] = fw[o] * (ga + gaa * fa[o] + gab * fb[o])
                    if want_b:
                        grad_b[batch, channel, o] = fw[o] * (gb + gbb * fb[o] + gab * fa[o])
