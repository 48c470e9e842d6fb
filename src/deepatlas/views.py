"""What trainings draw: the exams of a cohort in memory, and batches of them in random pose, bend, view and tone.

Source: §5.5.2; chance comes from the caller's generator (`deepatlas.augment`).
"""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from deepatlas import affine, augment, grid
from deepatlas.config import Augmentation, Preset
from deepatlas.errors import CohortError
from deepatlas.masks import LabelMaps, Masks
from deepatlas.objective import Exams
from deepatlas.prepare import Prepared, window
from deepatlas.shapes import Coordinates
from deepatlas.store import Cohort


class View(NamedTuple):
    """A batch as drawn: what the network sees, and what the loss compares."""

    exams: list[int]
    seen: Tensor
    image: Tensor
    foreground: Tensor
    mm_per_box: Tensor
    places_box: Tensor
    """Where every voxel lies in its exam's box."""


class Fine(NamedTuple):
    """The exams at twice the size that the network sees."""

    hu: Tensor
    """(exam, 1, 2n, 2n, 2n) int16: windowed when it is used."""
    foreground: Tensor
    box_to_mm: Tensor


class Cohorted(NamedTuple):
    """The cohort in memory, ready to be sampled."""

    names: list[str]
    image: Tensor
    """(exam, 1, n, n, n), 0 ... 1."""
    foreground: Tensor
    box_to_mm: Tensor
    """(exam, 4, 4) float64."""
    size: int
    region: str
    fine: Fine | None = None
    start: Tensor | None = None
    """Of crops, the maps that the model above gives them: (exam, 3, m, m, m), see `deepatlas.store.CohortArrays`."""
    labels: LabelMaps | None = None
    """What is drawn on the exams, on the finest arrays there are; in joint training and fine-tuning."""

    @property
    def finest(self) -> int:
        """Voxels along each axis of the finest arrays there are."""
        return self.fine.hu.shape[-1] if self.fine else self.size

    def views(self, exams: list[int], size: int) -> tuple[Exams, Tensor]:
        """Exams as they are on a grid of any size, and their boxes → mm: from the fine arrays where that is finer."""
        fine = self.fine if size > self.size else None
        image = torch.from_numpy(window(fine.hu[exams].numpy())).to(self.image) if fine else self.image[exams]
        foreground, box_to_mm = ((fine or self).foreground[exams], (fine or self).box_to_mm[exams])
        shape = (size,) * 3
        seen = grid.resize(foreground.to(image), shape) > 0.5
        masks = self.masks(exams, grid.identity(shape, device=image.device), box_to_mm)
        return Exams(grid.shrink(image, shape), seen, box_to_mm[:, :3, :3].to(image), masks), box_to_mm

    def starts(self, exams: list[int], size: int) -> Coordinates:
        """The maps of crops that the model above gives them, on a grid of any size over their boxes."""
        inner = (self.size - 1) / self.size  # the middle of the outermost voxels, in the cube
        places = inner * grid.identity((size,) * 3, device=self.image.device)
        return grid.sample(self.start[exams].to(self.image), places.expand(len(exams), -1, -1, -1, -1))

    def masks(self, exams: list[int], places_box: Coordinates, box_to_mm: Tensor) -> Masks | None:
        """What is drawn at places in boxes of exams, where anything is."""
        if self.labels is None:
            return None
        return self.labels.at(exams, self.in_finest(exams, places_box, box_to_mm))

    def view(
        self,
        exams: list[int],
        chance: Generator,
        how: Augmentation,
        bend: float = 0.0,
        crop: bool = False,
        borrowed: augment.Borrowed | None = None,
        shaped: Coordinates | None = None,
        shape: tuple[int, int, int] | None = None,
    ) -> View:
        """Exams as a network is to see them, and as the loss compares them.

        Args:
            how: poses, cuts and tone.
            bend: amplitude of a random smooth deformation, in box units.
            crop: show random crops instead of other poses.
            borrowed: show no more than other exams show.
            shaped: displacements in the exams' boxes, to the shapes of others.
            shape: of another grid than the network's, on which the exams are shown from the finest arrays there are.
        """
        batch, device = len(exams), self.image.device
        arrays = self if shape is None or self.fine is None else self.fine
        shape = shape or (self.size,) * 3
        box = self.box_to_mm[exams, :3, :3].float().to(device)
        if crop:
            matrix = augment.draw_crop(box, chance)
        else:
            matrix = augment.draw_affine(box, chance, how.scale, how.rotation, how.translation)
        if borrowed is not None:
            matrix[:, :3, 3] += borrowed.centre
        cut = augment.draw_cut(batch, chance, how.cut)
        tone = augment.draw_tone(batch, chance, how.tone).to(device)
        places = augment.place(matrix, shape)
        if bend:
            places = places + grid.resize(augment.draw_bend(batch, chance, bend).to(device), shape)
        if shaped is not None:
            places = places + grid.sample(shaped, places)
        within = grid.inside(places)
        own = places if arrays is self else self.in_finest(exams, places, self.box_to_mm[exams])
        image = self.image[exams] if arrays is self else torch.from_numpy(window(arrays.hu[exams].numpy())).to(places)
        image = grid.sample(image, own) * within
        foreground = (grid.sample(arrays.foreground[exams].float(), own) > 0.5) & within
        lost = augment.outside_cut(cut, places)
        if borrowed is not None:
            lost |= grid.sample(borrowed.seen, places) < 0.5
        seen = augment.apply_tone(torch.where(lost, 0.0, image), tone, chance)
        mm_per_box = box @ matrix[:, :3, :3]
        return View(exams, seen, image, foreground & ~lost, mm_per_box, places)

    def in_finest(self, exams: list[int], places_box: Coordinates, box_to_mm: Tensor) -> Coordinates:
        """Places in boxes of exams, in the boxes of their finest arrays."""
        to_finest = torch.linalg.inv((self.fine or self).box_to_mm[exams]) @ box_to_mm
        return affine.apply(to_finest.to(places_box), places_box)

    def drawn(self, view: View, size: int | None = None) -> Masks | None:
        """What is drawn on a batch where it is shown, on its own grid or one of another size; None where nothing is
        drawn at all."""
        shape = tuple(view.seen.shape[2:]) if size is None else (size,) * 3
        places, shown = (grid.resize(part.float(), shape) for part in (view.places_box, view.foreground))
        masks = self.masks(view.exams, places, self.box_to_mm[view.exams])
        return masks and masks.only(shown > 0.5)


def load_cohort(path: Path, preset: Preset, device: str, labels: LabelMaps | None = None) -> Cohorted:
    """Read a cohort.

    Raises:
        CohortError: fewer than two exams, of another size than the preset's, or other exams than the labels'.
    """
    with Cohort(path) as cohort:
        arrays = cohort.load()
        size, region = cohort.size, cohort.region
    if len(arrays.names) < 2:
        raise CohortError(f"{path} holds {len(arrays.names)} exam; a map is learned from pairs, bring at least 2.")
    wanted = preset.prepared_size
    if size not in (wanted, 2 * preset.network.size):
        raise CohortError(
            f"{path} is prepared at {size}³, preset {preset.name!r} expects {wanted}³; prepare it with --size {wanted}."
        )
    if labels is not None and tuple(labels.maps.shape[:2]) != (len(arrays.names), size):
        raise CohortError(
            f"{path} holds {len(arrays.names)} exams at {size}³, the labels are of {len(labels.maps)} at "
            f"{labels.maps.shape[1]}³; read them for this cohort."
        )
    names, fine = list(arrays.names), None
    if size > preset.network.size:
        hu, seen, box_to_mm = (torch.from_numpy(part) for part in (arrays.hu, arrays.foreground, arrays.box_to_mm))
        fine = Fine(hu[:, None], seen[:, None].to(device), box_to_mm)
    shape = (len(names), *(preset.network.size,) * 3)
    image, foreground = torch.empty(shape), torch.empty(shape, dtype=torch.bool)
    box_to_mm = torch.empty(len(names), 4, 4, dtype=torch.float64)
    for exam, parts in enumerate(zip(arrays.hu, arrays.foreground, arrays.box_to_mm, strict=True)):  # to hold one alone
        one = Prepared(*parts).pooled() if fine else Prepared(*parts)
        image[exam] = torch.from_numpy(window(one.hu))
        foreground[exam] = torch.from_numpy(one.foreground)
        box_to_mm[exam] = torch.from_numpy(one.box_to_mm)
    image, seen = image[:, None].to(device), foreground[:, None].to(device)
    start = None if arrays.start is None else torch.from_numpy(arrays.start.astype(np.float32))
    return Cohorted(names, image, seen, box_to_mm, preset.network.size, region, fine, start, labels)


def batch_of(exams: int, batch: int, step: int, seed: int) -> list[int]:
    """The exams of a step: the cohort is gone through in a random order, again and again."""
    chosen = []
    for place in range(step * batch, (step + 1) * batch):
        turn, index = divmod(place, exams)
        chosen.append(_order(exams, seed, turn)[index])
    return chosen


@lru_cache(maxsize=4)
def _order(exams: int, seed: int, turn: int) -> tuple[int, ...]:
    """The order of the exams in a turn."""
    return tuple(np.random.default_rng((seed, turn)).permutation(exams).tolist())


def by_anatomy(data: Cohorted) -> list[int]:
    """The exams by their foreground in mm³, largest first: that one seeds the atlas. Source: §5.2.5."""
    share = data.foreground.float().mean(dim=(1, 2, 3, 4)).double().cpu()
    volume = share * torch.linalg.det(data.box_to_mm[:, :3, :3]).abs()
    return torch.argsort(volume, descending=True, stable=True).tolist()
