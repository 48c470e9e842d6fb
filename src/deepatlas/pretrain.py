"""Training a map from unlabeled exams: one recipe, read downwards.

autoencoder → template warm start → each level coarse to fine, each beginning as a copy of the one above (§5.2.3,
§5.2.5, §5.2.6, §5.3.2). Chance is keyed by stage and step, so a training that was stopped continues to the bit.
No label is read here; joint training (§5.1.5) is handed what `deepatlas.masks` read.
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint as checkpointed

from deepatlas import affine, augment, checkpoint, grid, warp
from deepatlas.atlas import Region
from deepatlas.autoencoder import Autoencoder, Intensities
from deepatlas.checkpoint import MARGIN, Model
from deepatlas.config import CUBE, Augmentation, ConsolidationStage, LevelStage, Preset
from deepatlas.errors import CohortError, ModelError
from deepatlas.fitting import carried, fit
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
from deepatlas.networks import CoordinateNetwork
from deepatlas.objective import (
    Atlas,
    Exams,
    autoencoder_features,
    explicit_terms,
    label_errors,
    likeness,
    objective,
)
from deepatlas.shapes import Coordinates
from deepatlas.store import Cohort
from deepatlas.views import Cohorted, batch_of, by_anatomy, load_cohort

LOG = logging.getLogger(__name__)
ATLAS_RATE = 0.002
"""Of the atlas while maps are fitted."""


class Lent(NamedTuple):
    """What exams lend each other, by their fitted maps."""

    shown: Tensor
    """Where the atlas is shown by each exam, (exam, 1, m, m, m) bool."""
    places: Tensor
    """Where in its box, (exam, 3, m, m, m), in half precision."""
    to_atlas: Tensor
    """The affine part of its map, (exam, 4, 4)."""


def pretrain(
    cohort: Path,
    out: Path,
    preset: Preset,
    seed_exam: str | None = None,
    start_from: Path | None = None,
    resume: bool = False,
    device: str = "cpu",
    on_progress: Callable[[Progress], None] | None = None,
    labels: LabelMaps | None = None,
) -> Model:
    """Train a map and write it as a model folder.

    Args:
        cohort: HDF5 cohort (`deepatlas.store`).
        out: model folder; ``training/`` inside it holds the log and the state to resume from.
        preset: sizes, steps, rates; see `deepatlas.config.PRESETS`.
        seed_exam: the exam that seeds the atlas; the one that shows most anatomy by default. Says nothing with
            ``start_from``, whose atlas is gone on with.
        start_from: a trained model to go on from: its frame and its structures are kept, only the last level is
            trained.
        resume: continue a training that was stopped; to the bit on a CPU with the same number of threads.
        on_progress: called every few steps.
        labels: structures drawn on exams of the cohort, for joint training; see `deepatlas.masks.read`. The model's
            library is not made of them: that is what `deepatlas.locate.define` does.

    Raises:
        CohortError: too few exams, another preparation than the model's, or an unknown seed exam.
        ModelError: nothing to resume, or another preset or cohort than the one it was begun with.

    Source: §5.2.3, §5.2.5, §5.2.6, §5.3.2; §5.1.5 with labels.
    """
    base = checkpoint.load(start_from) if start_from else None
    if base is not None and _holds_crops(cohort):  # a finer model is of the size of the one above it
        preset = replace(preset, network=base.network.config)
    data = load_cohort(cohort, preset, device, labels)
    training = out / "training"
    check_folder(out, resume)
    run = Run.begin(data, preset, seed_exam, base, device)
    settings = {"preset": asdict(preset), "exams": data.names, "seed_exam": run.seed_name, "--from": _frame(base)}
    settings["--labels"] = None if labels is None else str(labels)
    settings = json.loads(json.dumps(settings))
    training.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    first = run.restore(training, settings) if resume else (0, 0)
    if resume and (out / "model.json").exists():
        run.keep_library(checkpoint.load(out))

    def save(stage: int, step: int) -> None:
        run.save(training, settings, stage, step)
        checkpoint.save(run.model(), out)

    go_through(run.stages(), first, training / "log.csv", save, preset.checkpoint_minutes, on_progress, run.enter)
    model = familiar(run.model(), data)
    checkpoint.save(model, out)
    return model


def _frame(base: Model | None) -> list | None:
    """What tells the models apart that a training can go on from."""
    return None if base is None else [base.region, base.seed_exam, base.seed_box_to_mm.tolist()]


FAMILIAR_SHARE = 0.6


def familiar(model: Model, data: Cohorted) -> Model:
    """The model with the likeness that an exam must reach to count as of the kind that was learned.

    It is `FAMILIAR_SHARE` of the 5th percentile of the training exams. Needs no label.
    """
    shape = (data.size // 2,) * 3
    means = []
    for exam in range(len(data.names)):
        image, foreground = data.image[exam : exam + 1], grid.resize(data.foreground[exam : exam + 1].float(), shape)
        with torch.no_grad():
            c_atlas = grid.resize(model.network.forward(image, model.level), shape)
        local = likeness(c_atlas, grid.shrink(image, shape), model.atlas, model.autoencoder)
        means.append(float((local * foreground).sum() / foreground.sum().clamp_min(1)))
    return replace(model, familiar=FAMILIAR_SHARE * float(np.quantile(means, 0.05)))


class Run:
    """The networks, the atlas and the optimiser of a training. Every step draws its chance from stage and step."""

    def __init__(self, data: Cohorted, preset: Preset, seed_index: int, device: str) -> None:
        self.data, self.preset, self.device = data, preset, device
        self.seed_index = seed_index
        self.seed_name = data.names[seed_index]
        self.by_anatomy = by_anatomy(data)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(preset.seed)
            self.network = CoordinateNetwork(preset.network).to(device)
            self.autoencoder = Autoencoder().to(device)
        if str(device).startswith("cuda"):
            self.network.mixed = self.autoencoder.mixed = preset.mixed
            if preset.compiled:  # for steps alone: the few other maps call `forward`, as each shape costs a graph
                self.network.compile(dynamic=False)
        where = grid.identity((preset.atlas_size,) * 3, device=device) / MARGIN
        seed, box_to_mm = data.views([seed_index], min(data.finest, max(data.size, preset.atlas_size)))
        to_seed = torch.linalg.inv(box_to_mm) @ data.box_to_mm[[seed_index]]
        inside_seed = affine.apply(to_seed.to(where), where)
        self.atlas = torch.nn.Parameter((grid.sample(seed.image, inside_seed) * grid.inside(inside_seed)).contiguous())
        self.seed_box_to_mm = data.box_to_mm[seed_index].clone()
        self.library: dict[str, dict] = {}
        """What the model knows beside its map, of a training that goes on in the same frame."""
        self.begun_by_crops = data.start is not None
        """Maps come from the cohort until the network has learned some."""
        structures = len(data.labels.names) if data.labels else 0
        self.masks = torch.nn.Parameter(torch.zeros(1, structures, *(3 * preset.atlas_size // 4,) * 3, device=device))
        """The structures of joint training in the atlas; made from the maps where a stage begins."""
        self.level = self.network.coarsest
        self.optimiser: torch.optim.Adam | None = None
        self.from_model = False
        self.crops = data.region in ("body", "exam")  # else every exam is shown at the scale of the seed
        self.descent = Descent(preset.clip)
        finest = (preset.network.sizes[0],) * 3
        fitted = len(data.names) if preset.consolidation else 0
        self.targets = torch.zeros(fitted, 3, *finest, device=device)
        """Maps fitted to the exams, on the finest level's grid; filled by the first fitting."""
        self.lent: Lent | None = None
        """Made from the maps when it is first wanted."""

    @classmethod
    def begin(cls, data: Cohorted, preset: Preset, seed_exam: str | None, base: Model | None, device: str) -> "Run":
        """A fresh training, or one that goes on from a trained model."""
        if seed_exam is not None and seed_exam not in data.names:
            raise CohortError(
                f"The cohort has no exam {seed_exam!r} to seed the atlas with; it has {data.names[0]}, ..."
            )
        index = data.names.index(seed_exam) if seed_exam else by_anatomy(data)[0]
        run = cls(data, preset, index, device)
        if data.region.startswith(CUBE):
            run.go_closer(base)
        elif base is not None:
            if (base.size, base.region) != (data.size, data.region):
                raise CohortError(
                    f"The model prepares exams at {base.size}³ with region {base.region!r}, the cohort holds "
                    f"{data.size}³ with {data.region!r}; prepare it again."
                )
            run.take_over(base)
            run.atlas.data.copy_(grid.resize(base.atlas, tuple(run.atlas.shape[2:])))
            run.seed_box_to_mm = base.seed_box_to_mm
            run.keep_library(base)
        return run

    def keep_library(self, model: Model) -> None:
        """Keep what a model knows in the same frame."""
        self.library = {part: getattr(model, part) for part in ("structures", "regions", "landmarks", "finer")}

    def take_over(self, base: Model) -> None:
        """Begin with the networks of a trained model."""
        if base.network.config != self.preset.network:
            raise ModelError("The model's network is not of the preset's size; choose the preset it was trained with.")
        self.network.load_state_dict(base.network.state_dict())
        self.autoencoder.load_state_dict(base.autoencoder.state_dict())
        self.seed_name, self.level, self.from_model = base.seed_exam, base.level, True

    def go_closer(self, base: Model | None) -> None:
        """Begin with the cube of a trained model's atlas that the cohort's crops show. Source: §5.2.4."""
        if base is None or not self.preset.consolidation or self.data.start is None:
            raise CohortError(
                "The cohort holds crops made by a model; train on them with --from that model and a preset that fits "
                'maps, such as "finer".'
            )
        self.take_over(base)
        if base.region == self.data.region:  # a finer model that is trained on
            self.atlas.data.copy_(grid.resize(base.atlas, tuple(self.atlas.shape[2:])))
            self.seed_box_to_mm, self.begun_by_crops = base.seed_box_to_mm, False
            self.keep_library(base)
            return
        name = Region.from_text(self.data.region).name
        if name not in base.regions and name not in base.structures:
            raise CohortError(f"The crops show {name}, which {base.name} does not know; give the model that cut them.")
        cube = Region.from_text(self.data.region).to_atlas()
        where = grid.identity(tuple(self.atlas.shape[2:])) / MARGIN
        self.atlas.data.copy_(grid.sample(base.atlas, affine.apply(cube[None].float(), where)))
        self.seed_box_to_mm = base.atlas_to_mm @ cube

    def stages(self) -> list[Stage]:
        """Name, steps and step function of every stage, in order."""
        preset, coarsest = self.preset, self.network.coarsest
        levels = [
            (f"level {preset.network.sizes[coarsest - n]}³", stage.steps, self.level_step)
            for n, stage in enumerate(preset.levels)
        ]
        rounds = []
        for number, stage in enumerate(preset.consolidation):
            batches = -(-len(self.learned_from(stage)) // preset.batch)
            rounds.append((f"fitting {number + 1}", batches, partial(self._fitting_step, stage)))
            rounds.append((f"consolidation {number + 1}", stage.steps, partial(self._consolidation_step, stage)))
        if self.from_model:
            name = f"level {preset.network.sizes[self.level]}³"
            return rounds or [(name, self._of_level().steps, self.level_step)]
        return [
            ("autoencoder", preset.autoencoder.steps, self._autoencoder_step),
            ("warm start", preset.warm.steps, self.warm_step),
            *levels,
            *rounds,
        ]

    def learned_from(self, stage: ConsolidationStage) -> list[int]:
        """The exams a round of consolidation uses, in the order of the cohort."""
        exams = len(self.data.names)
        return sorted(self.by_anatomy[: max(2, round(stage.whole * exams))])

    def enter(self, number: int) -> None:
        """Make the optimiser of a stage; say how far the map jumps where a finer level begins."""
        name = self.stages()[number][0]
        trained = list(self.autoencoder.parameters()) if name == "autoencoder" else list(self.network.parameters())
        for parameter in self.autoencoder.parameters():
            parameter.requires_grad_(name == "autoencoder")
        if name.startswith("level"):
            trained += [self.atlas, self.masks]
            before, self.level = self.level, self._level_of(number)
            if before != self.level:
                LOG.info("%s begins %.3f voxels from the level above", name, self._jump(before, self.level))
            self._lay_masks(list(range(len(self.data.names))), lambda exam: self._predicted([exam], number))
        if name.startswith("fitting"):
            trained = [self.atlas]
        if name.startswith("consolidation"):
            self.level = 0
            self.lent = None
        self.network.zero_grad()  # a stage that leaves the network alone must not judge it by its last gradient
        self.optimiser = torch.optim.Adam(trained, lr=1e-3, betas=(0.9, 0.99))

    def _fitting_step(self, stage: ConsolidationStage, number: int, step: int) -> dict[str, float]:
        """Fit maps to the next few exams, keep them as what the network is to learn, and sharpen the atlas by them."""
        learned_from, finest = self.learned_from(stage), (self.preset.network.sizes[0],) * 3
        if step == 0:
            with torch.no_grad():
                for exam in range(len(self.data.names)):
                    c_atlas = self._predicted([exam], number)
                    self.targets[[exam]] = grid.resize(c_atlas, finest).clamp(-0.999, 0.999)
                self.atlas.data.copy_(self.mean_atlas(learned_from))
                self._lay_masks(learned_from, lambda exam: self.targets[[exam]])
        exams = learned_from[step * self.preset.batch : (step + 1) * self.preset.batch]
        how, shape = stage.fitting, (stage.fitting.size,) * 3
        views, box_to_mm = self.data.views(exams, how.size)
        to_coarse = torch.linalg.inv(self.data.box_to_mm[exams]) @ box_to_mm
        with torch.no_grad():
            c_atlas = self._predicted(exams, number)
            start = carried(c_atlas, to_coarse, shape)
        weights, atlas = self.preset.weights, Atlas(self.atlas, self._mm_per_atlas(), self.masks.detach())
        found = fit(start, views, atlas._replace(image=self.atlas.detach()), self.autoencoder, weights, how)
        fitted = start + found.residual
        describe = self.autoencoder if how.learned else Intensities()
        target = autoencoder_features(describe, views.image, views.mm_per_box)
        for _ in range(stage.fitting.atlas_steps):
            terms = explicit_terms(fitted, views, atlas, describe, target, how.window)
            loss = (weights.explicit * terms.similarity + weights.edges * terms.edges).mean()
            self._descend(loss, self.network, ATLAS_RATE)
        moved = carried(found.residual, torch.linalg.inv(to_coarse), finest)
        self.targets[exams] = (grid.resize(c_atlas, finest) + moved).clamp(-0.999, 0.999)
        if exams[-1] == learned_from[-1]:
            if not how.atlas_steps:
                self.atlas.data.copy_(self.mean_atlas(learned_from))
            self._lay_masks(learned_from, lambda exam: self.targets[[exam]])
        terms = {"loss": found.after, "explicit": found.before, "labels": found.labels}
        return {name: float(values.mean()) for name, values in terms.items()}

    def _predicted(self, exams: list[int], number: int) -> Tensor:
        """The network's maps; before it has seen any crop, those that the model above gives them."""
        if number > 0 or not self.begun_by_crops:
            return self.network.forward(self.data.image[exams], self.level)
        return self.data.starts(exams, self.data.size)

    def mean_atlas(self, exams: list[int]) -> Tensor:
        """The mean of exams, each carried into the atlas by its target; the atlas as it is where none reaches.

        As fine as the exams are, where the atlas so far was learned on coarse grids.
        """
        shape = tuple(self.atlas.shape[2:])
        total = torch.zeros(1, 2, *shape, device=self.device)
        for exam in exams:
            views, box_to_mm = self.data.views([exam], self.data.finest)
            to_coarse = torch.linalg.inv(self.data.box_to_mm[[exam]]) @ box_to_mm
            c_atlas = carried(self.targets[[exam]], to_coarse, tuple(views.image.shape[2:]))
            seen = views.foreground.to(views.image)
            total += grid.splat(torch.cat([views.image * seen, seen], dim=1), c_atlas, shape)
        known = total[:, 1:] > 0.5
        return torch.where(known, total[:, :1] / total[:, 1:].clamp_min(0.5), self.atlas.detach())

    @torch.no_grad()
    def _lay_masks(self, exams: list[int], map_of: Callable[[int], Tensor]) -> None:
        """Make the structures in the atlas anew: how often each is drawn on the exams that say anything there.

        Source: eq. 14, as a mean of what is carried there instead of least squares.
        """
        if self.data.labels is None:
            return
        shape = tuple(self.masks.shape[2:])
        inside, known = torch.zeros_like(self.masks), torch.zeros_like(self.masks)
        for exam in exams:
            views, box_to_mm = self.data.views([exam], min(self.data.finest, shape[0]))
            to_coarse = torch.linalg.inv(self.data.box_to_mm[[exam]]) @ box_to_mm
            places = carried(map_of(exam), to_coarse, tuple(views.image.shape[2:]))
            drawn = views.masks.only(views.foreground)
            speaks = drawn.known().to(inside)
            known += grid.splat(speaks, places, shape)
            inside += grid.splat(drawn.inside() * speaks, places, shape)
        self.masks.data.copy_(inside / known.clamp_min(0.5))

    def _consolidation_step(self, stage: ConsolidationStage, number: int, step: int) -> dict[str, float]:
        """The fitted maps, bent and turned with the exams, as targets of the finest level."""
        learned_from, chance = self.learned_from(stage), self._chance(number, step)
        places = batch_of(len(learned_from), self.preset.batch, step, self.preset.seed + 1 + number)
        exams = [learned_from[place] for place in places]
        gentle = self.preset.augmentation.gentler(stage.gentle)
        borrowed = self._borrowed(exams, chance, stage.borrow) if stage.borrow else None
        shaped = self._shaped(exams, chance, stage.shapes) if stage.shapes else None
        view = self.data.view(exams, chance, gentle, stage.bend, borrowed=borrowed, shaped=shaped)
        shape = tuple(self.targets.shape[2:])
        truth = grid.sample(self.targets[exams], grid.resize(view.places_box, shape))
        weight = grid.resize(view.foreground.float(), shape)
        c_atlas = self.maps(view.seen, 0)
        gap_mm = torch.einsum("bac,bcijk->baijk", self._mm_per_atlas(), c_atlas - truth)
        distance = (gap_mm.square().sum(dim=1, keepdim=True) + 1.0).sqrt()  # robust: a fitted map can be wrong
        error = (distance * weight).sum() / weight.sum().clamp_min(1)
        rate = stage.rate * min(1.0, (step + 1) / 50) * (1 - 0.95 * step / stage.steps)
        off = torch.zeros(())
        if (masks := self.data.drawn(view, self.data.size)) is not None:
            off = label_errors(Atlas(self.atlas, self._mm_per_atlas(), self.masks.detach()), c_atlas, masks).mean()
        norm = self._descend(0.05 * error + self.preset.weights.labels * off, self.network, rate)
        error, off = float(error.detach()), float(off.detach())
        return {"loss": error, "rms_mm": error, "labels": off, "gradient": norm}

    def _borrowed(self, exams: list[int], chance: Generator, probability: float) -> augment.Borrowed:
        """The views of random other exams, laid over these by the fitted maps."""
        shown = self._lend().shown
        lenders = torch.randint(len(shown), (len(exams),), generator=chance)
        taken = (torch.rand(len(exams), generator=chance) < probability).to(self.targets)
        ends = augment.draw_ends(len(exams), chance)
        return augment.borrow_view(self._patient(exams), self.targets[exams], shown[lenders].float(), taken, ends)

    def _shaped(self, exams: list[int], chance: Generator, probability: float) -> Coordinates:
        """Displacements to the shapes of random other exams, a random part of the way."""
        lent = self._lend()
        lenders = torch.randint(len(lent.places), (len(exams),), generator=chance)
        share = torch.rand(len(exams), generator=chance) * (torch.rand(len(exams), generator=chance) < probability)
        to_lender = torch.linalg.inv(lent.to_atlas[lenders]) @ lent.to_atlas[exams]
        places, patient = lent.places[exams].to(self.targets), self._patient(lenders.tolist())
        whole = augment.borrow_shape(places, lent.shown[exams], self.targets[lenders], patient, to_lender)
        return share.to(whole).view(-1, 1, 1, 1, 1) * whole

    def _patient(self, exams: list[int]) -> Tensor:
        """The foreground of exams on the grid of the targets."""
        return grid.resize(self.data.foreground[exams].float(), tuple(self.targets.shape[2:])) > 0.5

    def _lend(self) -> Lent:
        """What every exam shows of the atlas, and where."""
        if self.lent is None:
            parts = []
            places = grid.identity((3 * self.data.size // 4,) * 3, device=self.device)
            for exam in range(len(self.data.names)):
                foreground = self.data.foreground[[exam]]
                c_atlas = grid.resize(self.targets[[exam]], tuple(foreground.shape[2:]))
                found = warp.implicit(c_atlas, places, foreground)
                parts.append((found.valid, found.phi_box.half(), warp.linear_part(c_atlas, foreground)))
            self.lent = Lent(*(torch.cat(part) for part in zip(*parts, strict=True)))
        return self.lent

    def maps(self, seen: Tensor, level: int) -> Tensor:
        """The network's maps; of a few exams at a time, forgotten and computed again for their gradient, where the
        preset says so: the same gradient in a part of the memory."""
        if self.preset.together is None:
            return self.network(seen, level)
        parts = seen.split(self.preset.together)
        return torch.cat([checkpointed(self.network, part, level, use_reentrant=False) for part in parts])

    def _mm_per_atlas(self) -> Tensor:
        return (self.seed_box_to_mm[:3, :3] / MARGIN).float().to(self.device)[None]

    def _of_level(self) -> LevelStage:
        """How the level is trained; one finer than any of the preset, as the last of them."""
        return self.preset.levels[min(self.network.coarsest - self.level, len(self.preset.levels) - 1)]

    def _level_of(self, number: int) -> int:
        return self.level if self.from_model else self.network.coarsest - (number - 2)

    @torch.no_grad()
    def _jump(self, before: int, after: int) -> float:
        """Mean distance between two levels' maps of the seed exam, in voxels of the prepared grid."""
        shape = (self.data.size,) * 3
        image = self.data.image[self.seed_index : self.seed_index + 1]
        a, b = (grid.resize(self.network.forward(image, level), shape) for level in (before, after))
        return float((a - b).norm(dim=1).mean() * (self.data.size - 1) / 2 / MARGIN)

    def _autoencoder_step(self, number: int, step: int) -> dict[str, float]:
        stage = self.preset.autoencoder
        exams = batch_of(len(self.data.names), stage.batch, step, self.preset.seed)
        view = self.data.view(exams, self._chance(number, step), self.preset.augmentation)
        sizes = sorted({level.loss_size for level in self.preset.levels})  # every grid it will be used on, in turn
        loss = self.autoencoder.loss(grid.shrink(view.image, (sizes[step % len(sizes)],) * 3))
        self._descend(loss, self.autoencoder, stage.rate * self._decay(step))
        return {"loss": float(loss.detach())}

    def warm_step(self, number: int, step: int) -> dict[str, float]:
        """Crops of the seed exam, whose coordinates are known: `MARGIN` times the place in the seed's box."""
        stage, generator = self.preset.warm, self._chance(number, step)
        view = self.data.view([self.seed_index] * stage.batch, generator, Augmentation(), stage.bend, self.crops)
        shape = (16, 16, 16)
        c_atlas = grid.resize(self.maps(view.seen, self.network.coarsest), shape)
        truth = MARGIN * grid.resize(view.places_box, shape)
        weight = grid.resize(view.foreground.float(), shape)
        error = ((c_atlas - truth).square().sum(dim=1, keepdim=True) * weight).sum() / weight.sum().clamp_min(1)
        self._descend(error, self.network, stage.rate * min(1.0, (step + 1) / 30) * self._decay(step))
        mm_per_box = self.seed_box_to_mm[:3, :3].norm(dim=0).mean()
        return {"loss": float(error.detach()), "rms_mm": float(error.detach().sqrt() / MARGIN * mm_per_box)}

    def level_step(self, number: int, step: int) -> dict[str, float]:
        stage = self._of_level()
        clock = [time.perf_counter()]
        exams = batch_of(len(self.data.names), self.preset.batch, step, self.preset.seed + 1 + number)
        view = self.data.view(exams, self._chance(number, step), self.preset.augmentation)
        clock.append(time.perf_counter())
        shape = (stage.loss_size,) * 3
        c_atlas = grid.resize(self.maps(view.seen, self.level), shape)
        clock.append(time.perf_counter())
        foreground = grid.resize(view.foreground.float(), shape) > 0.5
        masks = self.data.drawn(view, stage.loss_size)
        terms = objective(
            c_atlas,
            Exams(grid.shrink(view.image, shape), foreground, view.mm_per_box, masks),
            Atlas(self.atlas, self._mm_per_atlas(), self.masks),
            self.autoencoder,
            self.preset.weights,
        )
        clock.append(time.perf_counter())
        warm = min(1.0, 0.1 + 0.9 * (step + 1) / max(stage.warm_up, 1))
        norm = self._descend(terms.loss, self.network, stage.rate * warm * self._decay(step))
        clock.append(time.perf_counter())
        seconds = dict(zip(("s_augment", "s_network", "s_objective", "s_backward"), np.diff(clock), strict=True))
        return {
            k: float(v.detach()) if isinstance(v, Tensor) else float(v)
            for k, v in (terms._asdict() | {"gradient": norm} | seconds).items()
        }

    def _descend(self, loss: Tensor, clipped: torch.nn.Module, rate: float) -> float:
        """One step of Adam."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        return self.descent.step(self.optimiser, loss, clipped)

    def _decay(self, step: int) -> float:
        return self.preset.decay ** (step // self.preset.decay_every)

    def _chance(self, stage: int, step: int) -> Generator:
        """The generator of one step, from the preset's seed, the stage and the step alone."""
        return augment.keyed(self.preset.seed, stage, step)

    def model(self) -> Model:
        """The model as it stands."""
        return Model(
            network=self.network,
            autoencoder=self.autoencoder,
            atlas=self.atlas.detach().clamp(0, 1),
            seed_box_to_mm=self.seed_box_to_mm,
            region=self.data.region,
            level=self.level,
            seed_exam=self.seed_name,
            **({"structures": {}} | self.library),
        )

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"autoencoder.{k}": v for k, v in self.autoencoder.state_dict().items()}
        tensors["atlas"] = self.atlas.detach()
        tensors["targets"] = self.targets
        if self.data.labels is not None:
            tensors["masks"] = self.masks.detach()
        return tensors | (tensors_of(self.optimiser, "adam.") if self.optimiser else {})

    def save(self, folder: Path, settings: dict, stage: int, step: int) -> None:
        """Write the state to resume from: tensors first, then where they stand."""
        done = stage > 0 and step == 0  # a stage has ended; the next one makes its own optimiser
        if done:
            self.optimiser = None
        save_state(folder, State(stage, step, self._tensors(), self.level), settings)

    def restore(self, folder: Path, settings: dict) -> tuple[int, int]:
        """Read the state back; the stage and the step to go on with."""
        stage, step, tensors, level = read_state(folder, settings)
        if step:
            self.level = level  # so that entering the stage is no jump
            self.enter(stage)
            optimiser_of(self.optimiser, checkpoint.under(tensors, "adam."))
        self.level = level
        self.network.load_state_dict(checkpoint.under(tensors, "network."))
        self.autoencoder.load_state_dict(checkpoint.under(tensors, "autoencoder."))
        self.atlas.data.copy_(tensors["atlas"])
        self.targets.copy_(tensors["targets"])
        if self.data.labels is not None:
            self.masks.data.copy_(tensors["masks"])
        return stage, step


def _holds_crops(path: Path) -> bool:
    with Cohort(path) as cohort:
        return cohort.region.startswith(CUBE)
