"""Fused CPU kernels of `grid`, `warp`, `losses`, `networks` and `locate`: one pass, in registers, parallel over voxels.

Compiled by Numba on first use and cached, so no compiler is needed on the user's machine. Every kernel takes
contiguous NumPy arrays of one floating type. Tests hold these functions equal to the plain PyTorch forms that stand
beside their callers.

Fields are flattened to ``(batch, channel, i * j * k)`` with ``shape = (i, j, k)``; points are ``(batch, 3, point)``
in the box frame. A point outside the box takes the value at the nearest face and has no gradient there; NaN is read as
the lower face.
"""

from deepatlas.kernels_cpu.cells import parts_for
from deepatlas.kernels_cpu.claiming import claim
from deepatlas.kernels_cpu.inversion import invert, invert_backward
from deepatlas.kernels_cpu.moments import moments, moments_backward
from deepatlas.kernels_cpu.normalising import normalise, normalise_backward
from deepatlas.kernels_cpu.regularity import determinants, determinants_backward
from deepatlas.kernels_cpu.sampling import sample, sample_backward

__all__ = [
    "claim",
    "determinants",
    "determinants_backward",
    "invert",
    "invert_backward",
    "moments",
    "moments_backward",
    "normalise",
    "normalise_backward",
    "parts_for",
    "sample",
    "sample_backward",
]
