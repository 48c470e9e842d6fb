"""Chance is drawn here from a `torch.Generator`, and applied by functions that hold none but the noise of a tone.

Source: §5.5.2 (scaling 70-130 %, rotation ±0.5 rad, translation ±8 of 64 voxels) and §5.2.5 (random crops of the
template).
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from deepatlas import affine, grid
from deepatlas.shapes import Affine, Coordinates, Image, Mask


def keyed(*key: int) -> Generator:
    """The generator of one step: its chance comes from the numbers of the key (seed, stage, step, ...) alone."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return Generator().manual_seed(int(state >> np.uint64(1)))


def draw_uniform(shape: tuple[int, ...], low: float, high: float, generator: Generator) -> Tensor:
    """Uniform numbers of a generator."""
    return torch.rand(shape, generator=generator) * (high - low) + low


def draw_affine(
    mm_per_box: Float[Tensor, "batch 3 3"],
    generator: Generator,
    scale: float = 0.3,
    rotation: float = 0.5,
    translation: float = 0.25,
) -> Affine:
    """Random maps from an augmented box to the box of the exam.

    Args:
        mm_per_box: linear part of box → mm; a turn is one of the patient, also where the box is not a cube.
        scale: zoom of each axis within 1 ± scale.
        rotation: radians about each axis, ± rotation.
        translation: in box units, ± translation (8 of 64 voxels are 0.25).

    Source: §5.5.2.
    """
    batch = len(mm_per_box)
    zoom = draw_uniform((batch, 3), 1 - scale, 1 + scale, generator)
    turn = _turn_in_box(draw_uniform((batch, 3), -rotation, rotation, generator), mm_per_box)
    shift = draw_uniform((batch, 3), -translation, translation, generator)
    return affine.from_parts(turn @ torch.diag_embed(zoom).to(turn), shift.to(turn))


def draw_crop(
    mm_per_box: Float[Tensor, "batch 3 3"],
    generator: Generator,
    least: tuple[float, float, float] = (0.5, 0.5, 0.15),
    rotation: float = 0.25,
) -> Affine:
    """Random crops: maps from a crop's box to the box of the exam it is cut from.

    A crop spans from ``least`` to 1.15 of each axis (R, A, S) and lies anywhere in the exam: a part of a body fills
    its prepared grid just as a whole body does.

    Source: §5.2.5.
    """
    batch = len(mm_per_box)
    low = torch.tensor(least)
    span = torch.rand((batch, 3), generator=generator) * (1.15 - low) + low
    centre = draw_uniform((batch, 3), -1, 1, generator) * (1 - span).clamp_min(0.1)
    turn = _turn_in_box(draw_uniform((batch, 3), -rotation, rotation, generator), mm_per_box)
    return affine.from_parts(turn @ torch.diag_embed(span).to(turn), centre.to(turn))


def _turn_in_box(angles: Float[Tensor, "batch 3"], mm_per_box: Float[Tensor, "batch 3 3"]) -> Tensor:
    """A rotation of the patient as a map of box coordinates."""
    return torch.linalg.solve(mm_per_box, affine.rotation(angles).to(mm_per_box) @ mm_per_box)


class Cut(NamedTuple):
    """Half-spaces ``normal · x < offset`` in the box frame; what lies outside one of them is not in the scan."""

    normal: Float[Tensor, "batch plane 3"]
    offset: Float[Tensor, "batch plane"]


def draw_cut(batch: int, generator: Generator, probability: float = 0.5, least: float = 0.25) -> Cut:
    """Random limits of the field of view: the ends are cut off with a probability, right and left with
    .4 of it, back and front with .2.

    The ends (axis k) are cut up to ``least`` of the centre, the sides half as deep.
    """
    normal = torch.cat([torch.eye(3), -torch.eye(3)])[None].repeat(batch, 1, 1)
    normal = normal + draw_uniform((batch, 6, 3), -0.08, 0.08, generator)
    depth = torch.tensor([0.5, 0.5, 1.0, 0.5, 0.5, 1.0]) * (1 - least)
    offset = 1 - torch.rand((batch, 6), generator=generator) * depth
    spared = torch.rand((batch, 6), generator=generator) > probability * torch.tensor([0.4, 0.2, 1.0, 0.4, 0.2, 1.0])
    return Cut(normal, torch.where(spared, torch.inf, offset))


def outside_cut(cut: Cut, points_box: Float[Tensor, "batch 3 i j k"]) -> Tensor:
    """Where a field of view has been cut off: boolean (batch, 1, i, j, k)."""
    lost = torch.zeros_like(points_box[:, :1], dtype=torch.bool)
    for plane in range(cut.offset.shape[1]):
        if torch.isinf(cut.offset[:, plane]).all():  # asked of the CPU, where it was drawn: a GPU would be waited for
            continue
        normal, offset = (part[:, plane].to(points_box) for part in cut)
        height = torch.einsum("ba,baijk->bijk", normal, points_box)[:, None]
        lost |= height > offset.view(-1, 1, 1, 1, 1)
    return lost


class Borrowed(NamedTuple):
    """The view of another exam: what of an exam would be seen, had it been cut as that one was."""

    seen: Float[Tensor, "batch 1 i j k"]
    """1 where it would be seen, in the exam's box."""
    centre: Float[Tensor, "batch 3"]
    """Middle of the box around it, in the exam's box: a fixed extent is prepared around it."""


def borrow_view(
    own: Mask,
    c_atlas: Coordinates,
    lent: Float[Tensor, "batch 1 x y z"],
    taken: Float[Tensor, "batch"],
    ends: Float[Tensor, "batch 2"],
) -> Borrowed:
    """Cut exams as others are, by the shapes of those in the atlas, and to a part of their length.

    Fields of view are cut by scanners, but also by hand and by dose; a network that has seen whole exams only takes
    such a cut for the surface of the body. Where a loan leaves less than `LEAST_SEEN` of the exam, it is not taken.

    Args:
        own: the patient in each exam.
        c_atlas: its map, on the same grid.
        lent: what the other exam shows, in the atlas.
        taken: 1 where the loan is wanted, 0 where the exam stays whole.
        ends: the part that is kept of what then shows along axis k (feet to head), 0 ... 1.
    """
    shared = own & (grid.sample(lent, c_atlas) > 0.5)
    enough = shared.flatten(1).sum(dim=1) > LEAST_SEEN * own.flatten(1).sum(dim=1)
    wanted = (enough & (taken > 0)).view(-1, 1, 1, 1, 1)
    seen = torch.where(wanted, shared, True)
    size = torch.tensor(own.shape[2:], device=own.device) - 1
    middles = []
    for number, (low, high) in enumerate(ends.tolist()):
        if high - low >= 1 and not wanted[number]:
            middles.append(torch.zeros(3, device=own.device))
            continue
        shown = (seen[number] & own[number])[0].nonzero()
        first, last = int(shown[:, 2].min()), int(shown[:, 2].max())
        kept = [first + round(end * (last - first)) for end in (low, high)]
        within = shown[(shown[:, 2] >= kept[0]) & (shown[:, 2] <= kept[1])]
        if len(within):  # else that part of the length is a gap in what shows, and all of it is kept
            seen[number, :, :, :, : kept[0]] = False
            seen[number, :, :, :, kept[1] + 1 :] = False
            shown = within
        middles.append((shown.amin(dim=0) + shown.amax(dim=0)) / size - 1.0)
    return Borrowed(seen.to(c_atlas), torch.stack(middles).to(c_atlas))


def borrow_shape(
    places: Coordinates,
    shown: Mask,
    c_lender: Coordinates,
    lender: Mask,
    to_lender: Affine,
) -> Coordinates:
    """A displacement in the boxes of exams that gives each the shape of another; its pose and size stay its own.

    Exams differ from each other in ways that random bends do not: a network learns them from as many shapes as there
    are pairs of exams. Where one of the two shows nothing the displacement goes on as it is next to it.

    Args:
        places: where the nodes of a grid over the atlas lie in each exam's box, ``c⁻¹``.
        shown: which of them it shows.
        c_lender: the maps of those whose shapes are borrowed, each on its own box.
        lender: the patient there.
        to_lender: exam's box → lender's box, from the affine parts of both maps.

    Returns:
        ``c⁻¹ ∘ c_lender ∘ to_lender`` minus the identity, on a grid of as many nodes as ``c_lender`` has.
    """
    here = grid.identity(tuple(c_lender.shape[2:]), c_lender.dtype, c_lender.device)
    there = affine.apply(to_lender, here)
    of_lender = grid.sample(torch.cat([c_lender, lender.to(c_lender)], dim=1), there)
    own = grid.sample(torch.cat([places, shown.to(places)], dim=1), of_lender[:, :3])
    known = (own[:, 3:] > 0.999) & (of_lender[:, 3:] > 0.5) & grid.inside(there)
    return grid.filled(own[:, :3] - here, known)


def draw_ends(batch: int, generator: Generator, probability: float = 0.4, least: float = 0.35) -> Tensor:
    """The part of its length that is kept of an exam, (batch, 2) within 0 ... 1; all of it but with a probability."""
    length = draw_uniform((batch,), least, 1, generator)
    low = torch.rand(batch, generator=generator) * (1 - length)
    cut = torch.rand(batch, generator=generator) < probability
    return torch.stack([torch.where(cut, low, 0.0), torch.where(cut, low + length, 1.0)], dim=1)


LEAST_SEEN = 0.1
"""Share of an exam that a borrowed view has to leave."""


def draw_bend(batch: int, generator: Generator, amplitude: float = 0.06, nodes: int = 5) -> Coordinates:
    """A smooth random displacement in the box frame, on a coarse grid: to be added to box coordinates."""
    coarse = torch.randn((batch, 3, nodes, nodes, nodes), generator=generator)
    size = torch.rand((batch, 1, 1, 1, 1), generator=generator) * amplitude
    return coarse * size


def draw_tone(batch: int, generator: Generator, amount: float) -> Float[Tensor, "batch 3"]:
    """Contrast, brightness and noise of an exam: gain 1 ± amount, offset ± amount / 4, sigma up to amount / 8."""
    gain = draw_uniform((batch, 1), 1 - amount, 1 + amount, generator)
    offset = draw_uniform((batch, 1), -amount / 4, amount / 4, generator)
    return torch.cat([gain, offset, draw_uniform((batch, 1), 0, amount / 8, generator)], dim=1)


def apply_tone(image: Image, tone: Float[Tensor, "batch 3"], generator: Generator) -> Image:
    """Change soft-tissue contrast, keeping air at 0 and bone at 1."""
    gain, offset, sigma = (tone[:, a].view(-1, 1, 1, 1, 1) for a in range(3))
    noise = torch.randn(image.shape, generator=generator).to(image) * sigma
    inner = ((image - 0.5) * gain + 0.5 + offset + noise).clamp(0, 1)
    return torch.where((image > 0) & (image < 1), inner, image)


def tone_between(image: Image, other: Image, seen: Mask, cells: int = 6) -> Image:
    """What of the difference of an image to another one that lies on it changes slowly: added to the image, it has the
    other's contrast and shading.

    Args:
        seen: where both are known.
        cells: the difference is a mean over each of so many parts of every axis.

    Source: the appearance transforms of Zhao et al., Data augmentation using learned transformations for one-shot
    medical image segmentation, CVPR 2019; here without a network of their own.
    """
    known = seen.to(image)
    slow = F.adaptive_avg_pool3d((other - image) * known, cells)
    slow = slow / F.adaptive_avg_pool3d(known, cells).clamp_min(1e-3)
    return F.interpolate(slow, size=image.shape[2:], mode="trilinear", align_corners=False)


def place(matrix: Affine, shape: tuple[int, int, int]) -> Coordinates:
    """Where every voxel of an augmented grid lies in the exam's box."""
    return affine.apply(matrix, grid.identity(shape, matrix.dtype, matrix.device))
