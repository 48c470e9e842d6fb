"""Fifty structures in a large exam that is already in memory."""

import numpy as np
import torch

from benchmarks.measure import MIB, Row, interleaved, peak_bytes
from deepatlas import grid, phantom
from deepatlas.atlas import Structure
from deepatlas.autoencoder import Autoencoder
from deepatlas.checkpoint import MARGIN, Model
from deepatlas.config import COMPACT
from deepatlas.embedding import embed
from deepatlas.locate import locate, owners_reference
from deepatlas.networks import CoordinateNetwork
from deepatlas.prepare import prepare
from deepatlas.volume import Volume

SHAPE = (512, 512, 400)
STRUCTURES = 50
EVERY = 16
"""The reference is timed and compared on every 16th plane: it needs minutes for the whole exam."""


def large_exam() -> Volume:
    """A whole phantom, its voxels repeated to 512×512×400."""
    small = phantom.cohort_exam(0, 0).image
    index = [np.arange(n) * s // n for n, s in zip(SHAPE, small.shape, strict=True)]
    affine = small.affine @ np.diag([*(s / n for n, s in zip(SHAPE, small.shape, strict=True)), 1.0])
    return Volume(small.array[np.ix_(*index)], affine)


def model_of(exam: Volume, structures: int) -> Model:
    """An untrained compact model with ellipsoids all over the body as its library."""
    torch.manual_seed(0)
    network = CoordinateNetwork(COMPACT)
    prepared = prepare(exam, COMPACT.size, "body")
    chance = np.random.default_rng(0)
    library = {}
    for number in range(structures):
        half = chance.uniform(0.2, 0.45, 3)
        middle = chance.uniform(-0.85, 0.85, 3) * (1 - half)
        where = grid.identity((40, 40, 40))[0]
        mask = ((1.15 - where.norm(dim=0)) * 2).clamp(0, 1)
        box = torch.from_numpy(np.stack([middle - half, middle + half]) * MARGIN).float()
        name = f"structure {number}"
        library[name] = Structure(name, number + 1, mask, torch.ones_like(mask), box, 0.5, 1)
    return Model(
        network=network,
        autoencoder=Autoencoder(),
        atlas=torch.from_numpy(prepared.image)[None, None],
        seed_box_to_mm=torch.from_numpy(prepared.box_to_mm),
        region="body",
        level=0,
        seed_exam="phantom",
        structures=library,
    )


def locate_50() -> Row:
    """`locate` of all structures at once against sampling every structure on the whole grid."""
    exam = large_exam()
    model = model_of(exam, STRUCTURES)
    seen = embed(model, exam)  # its map means nothing: a nearly affine one takes its place
    where = grid.identity(tuple(seen.c_atlas.shape[2:]))
    seen = seen._replace(c_atlas=(MARGIN * where + 0.01 * torch.sin(5 * where.roll(1, 1))).clamp(-1, 1))
    found = {}

    def ours() -> None:
        embed(model, exam)  # the pass of the network counts
        found.update(locate(model, exam, embedded=seen))

    planes = range(0, SHAPE[0], EVERY)
    library = list(model.structures.values())
    owners = {}

    def reference() -> None:
        for plane in planes:
            owners[plane] = owners_reference(library, seen, exam, slice(plane, plane + 1))

    seconds = interleaved(ours, reference, repeats=3, seconds=60)
    memory = peak_bytes(ours)
    owner = next(one.owner for one in found.values() if one.owner is not None)
    differ = float(np.mean([(owner[plane] != owners[plane][0]).mean() for plane in planes]))
    covered = _covered(library, seen)
    whole = seconds[1] * EVERY
    note = (
        f"{SHAPE}, boxes cover {covered:.0%} of the body, {memory / MIB:.0f} MiB above the exam; reference on every "
        f"{EVERY}th plane, times {EVERY}; share of its voxels that differ {differ:.1e}"
    )
    return Row("locate_50", seconds[0], whole, whole / seconds[0], note=note)


def _covered(library: list[Structure], seen) -> float:
    """Share of the body's voxels that lie in the box of a structure."""
    inside = torch.zeros_like(seen.foreground)
    for structure in library:
        inside |= grid.inside(structure.to_own_box(seen.c_atlas))
    return float(inside[seen.foreground].float().mean())
