"""Supervised fine-tuning: from a trained map and the label maps of some exams, a segmentation of its structures.

Source: §3.3.3. All layers are optimised, from labelled exams alone; the map itself is left as it is.
"""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Generator, Tensor

from deepatlas import atlas, augment, checkpoint, grid, losses
from deepatlas.checkpoint import Model
from deepatlas.config import FineTuning, Preset
from deepatlas.errors import CohortError, ModelError, StructureError
from deepatlas.loop import (
    Descent,
    Progress,
    Stage,
    State,
    check_folder,
    go_through,
    optimiser_of,
    read_state,
    save_state,
    tensors_of,
)
from deepatlas.machine import keep_freed_memory
from deepatlas.masks import LabelMaps
from deepatlas.networks import SegmentationHead
from deepatlas.shapes import Coordinates
from deepatlas.views import Cohorted, View, batch_of, load_cohort

COLUMNS = ("stage", "step", "seconds", "loss", "dice", "entropy", "gradient")


def finetune(
    cohort: Path,
    out: Path,
    start_from: Path,
    labels: LabelMaps,
    settings: FineTuning | None = None,
    resume: bool = False,
    device: str = "cpu",
    on_progress: Callable[[Progress], None] | None = None,
) -> Model:
    """Train a segmentation of the structures that are drawn, and write the model with it.

    Args:
        cohort: exams as the model prepares them, or the crops of its cube.
        out: model folder; ``training/`` inside it holds the log and the state to resume from.
        start_from: the trained map, with the structures in its library; where it has a head, that is trained on.
        labels: what is drawn on the cohort's exams, `deepatlas.masks.read`.
        resume: continue a training that was stopped; to the bit with the same number of threads.

    Raises:
        CohortError: prepared otherwise than the model's exams, or too coarse for the head's own grid.
        StructureError: a structure is not in the model's library.
        ModelError: nothing to resume, another training than the one begun, or another head to go on from.

    Source: §3.3.3.
    """
    settings = settings or FineTuning()
    base = checkpoint.load(start_from)
    unknown = [name for name in labels.names if name not in base.structures]
    if unknown:
        raise StructureError(
            f"The map of {base.name} does not know {', '.join(unknown)}; make them with `deepatlas define` first."
        )
    data = load_cohort(cohort, Preset("fine-tuning", base.network.config), device, labels)
    if data.region != base.region:
        raise CohortError(
            f"The model sees {base.region!r}, the cohort holds {data.region!r}; prepare it for this model."
        )
    if settings.shape is not None and data.fine is None:
        raise CohortError(
            f"A grid of the head's own needs exams of twice the map's size; prepare them with --size {2 * data.size}."
        )
    check_folder(out, resume)
    run = Run(data, base, settings, device)
    about = {"settings": asdict(settings), "exams": data.names, "labels": str(labels)}
    about["--from"] = [base.seed_exam, base.level, _checksum(base, labels.names)]
    about = json.loads(json.dumps(about))
    folder = out / "training"
    folder.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    first = run.restore(folder, about) if resume else (0, 0)
    save, minutes = partial(run.save, folder, about), settings.checkpoint_minutes
    go_through(run.stages(), first, folder / "log.csv", save, minutes, on_progress, columns=COLUMNS)
    model = run.model()
    checkpoint.save(model, out)
    return model


def _checksum(base: Model, names: tuple[str, ...]) -> str:
    """Of all that a training takes from the map: its weights, those of its head, its structures."""
    weights = [part.state_dict().values() for part in (base.network, base.head) if part is not None]
    known = [(s.mask, s.known, s.box_atlas, torch.tensor(s.level)) for s in (base.structures[name] for name in names)]
    return checkpoint.checksum(*chain(*weights, *known))


KEPT_BYTES = 2**30
"""Memory for label maps as shares of voxels."""


def shares(
    drawn: UInt8[Tensor, "m m m"], structures: int, shape: tuple[int, int, int]
) -> UInt8[Tensor, "structure i j k"]:
    """How much of a voxel each structure of a label map fills, 0 ... 255: an edge can lie in one.

    On the coarsest grid that parts of the label map make up and that is no coarser than ``shape``.
    """
    every = [max(1, drawn.shape[0] // nodes) for nodes in shape]
    found = torch.empty(structures, *(drawn.shape[0] // n for n in every), dtype=torch.uint8)
    for channel in range(structures):
        found[channel] = F.avg_pool3d((drawn == channel + 1).float()[None], every)[0].mul(255).round()
    return found


def mirrored_names(names: tuple[str, ...]) -> list[int]:
    """For each structure the one that takes its place where left and right change: itself, if no name says other."""
    swapped = [re.sub("left|right", lambda side: {"left": "right", "right": "left"}[side[0]], name) for name in names]
    return [names.index(other) if other in names else own for own, other in enumerate(swapped)]


class Run:
    """The head and its optimiser. Every step draws its chance from the seed and the step alone."""

    def __init__(self, data: Cohorted, base: Model, settings: FineTuning, device: str = "cpu") -> None:
        self.data, self.base, self.settings, self.device = data, base, settings, device
        self.structures = [base.structures[name] for name in data.labels.names]
        self.other_side = mirrored_names(data.labels.names)
        self.kept: dict[int, Tensor] = {}
        """What `inside` found."""
        self.drawn = [n for n, ends in enumerate(data.labels.ends) if bool((ends[:, 0] < torch.inf).any())]
        self.c_atlas = {exam: self._map(exam) for exam in self.drawn}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.network = SegmentationHead(base.network.config, len(self.structures), settings.width, settings.shape)
        if base.head is None:
            self.network.backbone.load_state_dict(base.network.backbone.state_dict())
        else:
            self.go_on(base)
        self.descent = Descent(settings.clip)
        self.network.mixed = settings.mixed
        self.network.to(device).train().requires_grad_(True)
        self.optimiser = torch.optim.Adam(self.network.parameters(), settings.rate)

    def go_on(self, base: Model) -> None:
        """Begin with the head of a fine-tuned model."""
        drawn = sorted(base.segmented, key=base.segmented.get)
        same = (drawn, base.head.width, base.head.shape)
        if same != (list(self.data.labels.names), self.network.width, self.network.shape):
            raise ModelError(
                f"{base.name} has a head of width {base.head.width} on a grid of {base.head.shape} that draws "
                f"{', '.join(drawn)}; go on with the same, or start from a model without a head."
            )
        self.network.load_state_dict(base.head.state_dict())

    def stages(self) -> list[Stage]:
        """A single one."""
        return [("fine-tuning", self.settings.steps, lambda _, step: self.step(step))]

    def step(self, step: int) -> dict[str, float]:
        """One step down the loss; its terms."""
        s = self.settings
        chance = self.chance(step)
        exams = [self.drawn[n] for n in batch_of(len(self.drawn), s.batch, step, s.seed)]
        view = self.data.view(exams, chance, s.augmentation, s.bend, shape=s.shape)
        known = self.data.drawn(view).known()
        places_finest = self.data.in_finest(exams, view.places_box, self.data.box_to_mm[exams])
        inside = torch.cat([self.inside(exam, at[None]) for exam, at in zip(exams, places_finest, strict=True)])
        seen, odds = view.seen, self.odds(view, chance)
        if s.mirrored and step % 2:
            seen = seen.flip(2)
            known, inside, odds = (part[:, self.other_side].flip(2) for part in (known, inside, odds))
        found = self.network(seen, odds)
        apart = losses.soft_dice(found.sigmoid() * known, inside * known).mean()
        entropy = F.binary_cross_entropy_with_logits(found, inside, known.float())
        loss = apart + s.entropy * entropy
        self.optimiser.param_groups[0]["lr"] = s.rate_at(step)
        norm = self.descent.step(self.optimiser, loss, self.network)
        terms = {"loss": loss, "dice": apart, "entropy": entropy}
        return {name: float(value.detach()) for name, value in terms.items()} | {"gradient": norm}

    def inside(self, exam: int, places_finest: Coordinates) -> Float[Tensor, "1 structure i j k"]:
        """How much of a voxel a structure fills, 0 ... 1, at places in the box of an exam's finest arrays."""
        found = self.kept.get(exam)
        if found is None:
            found = shares(self.data.labels.maps[exam], len(self.structures), self.network.shape).to(self.device)
            if (len(self.kept) + 1) * found.nbytes <= KEPT_BYTES:
                self.kept[exam] = found
        nodes = self.data.labels.maps.shape[-1]
        cells = torch.tensor(found.shape[1:], device=self.device).view(1, 3, 1, 1, 1)
        every = nodes // cells
        index = ((places_finest + 1) / 2 * (nodes - 1) - (every - 1) / 2) / every
        return grid.sample(found[None].float() / 255, 2 * index / (cells - 1) - 1)

    @torch.no_grad()
    def _map(self, exam: int) -> Coordinates:
        """The map of an exam as it is: of a crop that of the model above, which did not learn these labels.

        A map that did is surer of the exams it learned from than of others: a head that is given its odds leans on
        them, and learns less from the image.
        """
        if self.data.start is not None:
            return self.data.starts([exam], self.base.network.config.sizes[self.base.level])
        return self.base.network(self.data.image[[exam]].cpu(), self.base.level).to(self.device)

    def odds(self, view: View, chance: Generator) -> Float[Tensor, "batch structure i j k"]:
        """What the map says of exams, a little moved (`FineTuning.astray`)."""
        own = torch.cat([self.c_atlas[exam] for exam in view.exams])
        c_atlas = grid.sample(own, grid.resize(view.places_box, tuple(own.shape[2:])))
        off = augment.draw_bend(len(own), chance, self.settings.astray).to(own)
        c_atlas = c_atlas + grid.resize(off, tuple(own.shape[2:]))
        return grid.resize(atlas.log_odds(self.structures, c_atlas), tuple(view.seen.shape[2:]))

    def chance(self, step: int) -> Generator:
        """The generator of one step."""
        return augment.keyed(self.settings.seed, step)

    def model(self) -> Model:
        """The map with the head as it stands."""
        names = {name: channel for channel, name in enumerate(self.data.labels.names)}
        return replace(self.base, head=self.network.cpu().eval().requires_grad_(False), segmented=names)

    def save(self, folder: Path, about: dict, stage: int, step: int) -> None:
        """Write the state to resume from."""
        tensors = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        save_state(folder, State(stage, step, tensors | tensors_of(self.optimiser, "adam.")), about)

    def restore(self, folder: Path, about: dict) -> tuple[int, int]:
        """Read the state back; the stage and the step to go on with."""
        state = read_state(folder, about)
        self.network.load_state_dict(checkpoint.under(state.tensors, "network."))
        optimiser_of(self.optimiser, checkpoint.under(state.tensors, "adam."))
        return state.stage, state.step
