"""Supervised fine-tuning: from a trained map and the label maps of some exams, a segmentation of its structures.

Source: §3.3.3. All layers are optimised, from labelled exams alone; the map itself is left as it is.
"""

import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Generator, Tensor

from deepatlas import atlas, augment, checkpoint, grid, losses
from deepatlas.checkpoint import Model
from deepatlas.config import FineTuning, Preset
from deepatlas.errors import CohortError, StructureError
from deepatlas.loop import (
    Progress,
    Reporter,
    State,
    check_folder,
    csv_log,
    optimiser_of,
    read_state,
    save_state,
    tensors_of,
)
from deepatlas.machine import denormals_are_zero, keep_freed_memory
from deepatlas.masks import LabelMaps
from deepatlas.networks import SegmentationHead
from deepatlas.views import Cohorted, batch_of, load_cohort

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
        start_from: the trained map, with the structures in its library.
        labels: what is drawn on the cohort's exams, `deepatlas.masks.read`.
        resume: continue a training that was stopped; to the bit with the same number of threads.

    Raises:
        CohortError: prepared otherwise than the model's exams.
        StructureError: a structure is not in the model's library.
        ModelError: nothing to resume, or another training than the one begun.

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
    check_folder(out, resume)
    run = Run(data, base, settings, device)
    about = {"settings": asdict(settings), "exams": data.names, "labels": str(labels), "--from": base.seed_exam}
    about = json.loads(json.dumps(about))
    folder = out / "training"
    folder.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    first = run.restore(folder, about) if resume else 0
    stages = [("fine-tuning", settings.steps, None)]
    with csv_log(folder / "log.csv", resume, COLUMNS) as write_row, denormals_are_zero():
        report = Reporter(stages, (0, first), on_progress, write_row)
        saved = time.monotonic()
        for step in range(first, settings.steps):
            report.step(0, step, "fine-tuning", settings.steps, run.step(step))
            if time.monotonic() - saved > 60 * settings.checkpoint_minutes:
                run.save(folder, about, step + 1)
                saved = time.monotonic()
    run.save(folder, about, settings.steps)
    model = run.model()
    checkpoint.save(model, out)
    return model


KEPT_BYTES = 2**30
"""Memory for label maps as shares of voxels."""


def shares(drawn: UInt8[Tensor, "m m m"], structures: int, size: int) -> UInt8[Tensor, "structure n n n"]:
    """How much of a coarser grid's voxels each structure of a label map fills, 0 ... 255: an edge can lie in one."""
    every = drawn.shape[-1] // size
    found = torch.empty(structures, *(size,) * 3, dtype=torch.uint8)
    for channel in range(structures):
        found[channel] = F.avg_pool3d((drawn == channel + 1).float()[None], every)[0].mul(255).round()
    return found


class Run:
    """The head and its optimiser. Every step draws its chance from the seed and the step alone."""

    def __init__(self, data: Cohorted, base: Model, settings: FineTuning, device: str = "cpu") -> None:
        self.data, self.base, self.settings, self.device = data, base, settings, device
        self.map = copy.deepcopy(base.network).to(device)
        self.structures = [base.structures[name] for name in data.labels.names]
        self.kept: dict[int, Tensor] = {}
        """What `inside` found."""
        self.drawn = [n for n, ends in enumerate(data.labels.ends) if bool((ends[:, 0] < torch.inf).any())]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.network = SegmentationHead(base.network.config, len(self.structures), settings.width)
        self.network.backbone.load_state_dict(base.network.backbone.state_dict())
        self.network.to(device).train().requires_grad_(True)
        self.optimiser = torch.optim.Adam(self.network.parameters(), settings.rate)

    def step(self, step: int) -> dict[str, float]:
        """One step down the loss; its terms."""
        s = self.settings
        chance = self.chance(step)
        exams = [self.drawn[n] for n in batch_of(len(self.drawn), s.batch, step, s.seed)]
        view = self.data.view(exams, chance, s.augmentation, s.bend)
        known = self.data.drawn(view, self.data.size).known()
        inside = grid.sample(torch.stack([self.inside(exam) for exam in exams]), view.places_box)
        found = self.network(view.seen, self.odds(view.seen, chance))
        apart = losses.soft_dice(found.sigmoid() * known, inside * known).mean()
        entropy = F.binary_cross_entropy_with_logits(found, inside, known.float())
        loss = apart + s.entropy * entropy
        self.optimiser.param_groups[0]["lr"] = s.rate_at(step)
        self.optimiser.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), s.clip)
        self.optimiser.step()
        terms = {"loss": loss, "dice": apart, "entropy": entropy, "gradient": norm}
        return {name: float(value.detach()) for name, value in terms.items()}

    def inside(self, exam: int) -> Float[Tensor, "structure n n n"]:
        """How much of each voxel of an exam a structure fills, 0 ... 1."""
        if exam not in self.kept:
            found = shares(self.data.labels.maps[exam], len(self.structures), self.data.size).to(self.device)
            if (len(self.kept) + 1) * found.nbytes > KEPT_BYTES:
                return found.float() / 255
            self.kept[exam] = found
        return self.kept[exam].float() / 255

    @torch.no_grad()
    def odds(self, seen: Tensor, chance: Generator) -> Tensor:
        """What the map says of an exam, a little moved: on exams that it was trained on it is surer than on others."""
        c_atlas = self.map(seen, self.base.level)
        off = augment.draw_bend(len(seen), chance, self.settings.astray).to(c_atlas)
        c_atlas = c_atlas + grid.resize(off, tuple(c_atlas.shape[2:]))
        return grid.resize(atlas.log_odds(self.structures, c_atlas), tuple(seen.shape[2:]))

    def chance(self, step: int) -> Generator:
        """The generator of one step."""
        return augment.keyed(self.settings.seed, step)

    def model(self) -> Model:
        """The map with the head as it stands."""
        names = {name: channel for channel, name in enumerate(self.data.labels.names)}
        return replace(self.base, head=self.network.cpu().eval().requires_grad_(False), segmented=names)

    def save(self, folder: Path, about: dict, step: int) -> None:
        """Write the state to resume from."""
        tensors = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        save_state(folder, State(0, step, tensors | tensors_of(self.optimiser, "adam.")), about)

    def restore(self, folder: Path, about: dict) -> int:
        """Read the state back; the step to go on with."""
        state = read_state(folder, about)
        self.network.load_state_dict(checkpoint.under(state.tensors, "network."))
        optimiser_of(self.optimiser, checkpoint.under(state.tensors, "adam."))
        return state.step
