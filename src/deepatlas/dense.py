"""The map at every voxel of an exam: its coordinates, and the atlas seen through them.

Everything is evaluated slab by slab, so that beside the result itself little memory is taken.

Source: §2.1 (``c_n = F(x_n)``), figures 1 and 4 (the atlas alone, and aligned to an exam).
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from deepatlas import grid
from deepatlas.checkpoint import Model
from deepatlas.embedding import Embedded, embed
from deepatlas.prepare import WINDOW_HU, grid_to_box
from deepatlas.refine import settled
from deepatlas.volume import Volume

BLOCK_VOXELS = 2**20


def coordinates(model: Model, exam: Volume, mm: bool = False, embedded: Embedded | None = None) -> np.ndarray:
    """The coordinate of every voxel of an exam, on the exam's own grid, float32 (i, j, k, 3).

    In atlas units, −1 ... +1, or in mm (RAS) of the seed exam. A voxel outside the prepared box, which is air or
    table, gets the coordinate of the nearest point of the box.

    Raises:
        ExamError: the exam cannot be prepared.
    """
    embedded = embedded or settled(model, exam, embed(model, exam))
    linear, offset = model.atlas_to_mm[:3, :3], model.atlas_to_mm[:3, 3]
    result = np.empty((*exam.shape, 3), dtype=np.float32)
    for block, box in blocks(embedded, exam):
        c = grid.sample(embedded.c_atlas, box)[0]
        if mm:
            c = (torch.einsum("ab,bijk->aijk", linear, c.double()) + offset.view(3, 1, 1, 1)).float()
        result[block] = c.permute(1, 2, 3, 0).numpy()
    return result


def aligned_atlas(model: Model, exam: Volume, embedded: Embedded | None = None) -> np.ndarray:
    """The atlas as an exam sees it, ``X ∘ c``, on the exam's own grid: HU from −256 to +256, float32 (i, j, k).

    Outside the prepared box there is −256.

    Raises:
        ExamError: the exam cannot be prepared.

    Source: figure 4.
    """
    embedded = embedded or settled(model, exam, embed(model, exam))
    result = np.empty(exam.shape, dtype=np.float32)
    step = 2 / (embedded.prepared.size - 1)
    for block, box in blocks(embedded, exam):
        value = grid.sample(model.atlas, grid.sample(embedded.c_atlas, box))
        result[block] = hounsfield(value * (box.abs() <= 1 + step).all(dim=1, keepdim=True))[0, 0].numpy()
    return result


def atlas_volume(model: Model) -> Volume:
    """The atlas alone, HU from −256 to +256, placed in the seed exam's mm. Source: figure 1."""
    affine = model.atlas_to_mm.numpy() @ grid_to_box(model.atlas.shape[-1])
    return Volume(hounsfield(model.atlas)[0, 0].numpy(), affine)


def hounsfield(value: Tensor) -> Tensor:
    """The network's 0 ... 1 as HU."""
    return value * (2 * WINDOW_HU) - WINDOW_HU


def blocks(embedded: Embedded, exam: Volume, voxels: int = BLOCK_VOXELS) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
    """Slabs of an exam's grid, and the places of their voxels in its prepared box, (1, 3, i, j, k)."""
    to_box = np.linalg.inv(embedded.prepared.box_to_mm) @ exam.affine
    linear, offset = to_box[:3, :3], to_box[:3, 3]
    thick = max(1, voxels // (exam.shape[1] * exam.shape[2]))
    across = [np.multiply.outer(linear[:, axis], np.arange(exam.shape[axis])) for axis in range(3)]
    plane = across[1][:, None, :, None] + across[2][:, None, None, :] + offset[:, None, None, None]
    for start in range(0, exam.shape[0], thick):
        slab = slice(start, min(start + thick, exam.shape[0]))
        box = across[0][:, slab, None, None] + plane
        yield (slab, slice(None), slice(None)), torch.from_numpy(box.astype(np.float32))[None]
