"""DeepAtlas, the 2019 system: a registration and a segmentation network that teach each other from few labels.

    u = R(I_m, I_t)     φ⁻¹ = id + u     I_m ∘ φ⁻¹ ≈ I_t        registration of a moving image to a target
    F(I)                                                        segmentation: a probability of every class

==========================  ============================================================================
registration step, F held   L_i(I_m∘φ⁻¹, I_t) + λ_r L_r(u) + λ_a L_a(S_m∘φ⁻¹, S_t); where an image has no
                            labels S is F's soft answer
segmentation step, R held   target unlabelled: λ_c L_a(S_m∘φ⁻¹, F(I_t)) + λ_sp L_sp(F(I_m), S_m)
                            moving unlabelled: λ_c L_a(F(I_m)∘φ⁻¹, S_t) + λ_sp L_sp(F(I_t), S_t)
                            both labelled: λ_sp L_sp(F(I_m), S_m); none labelled: nothing
                            ours: λ_sp L_sp(F(I_m∘φ⁻¹ in the tone of I_t), S_m∘φ⁻¹), I_m labelled
==========================  ============================================================================

L_i is `losses.correlation`, L_r `losses.bending_energy`, L_a and L_sp are `losses.soft_dice`. The last line is not in
the paper: the labels of a labelled image in the shape of another one are true however far off the registration is.

Source: Xu and Niethammer 2019. The authors' weights were not found; `deepatlas.config.RegSeg` says what ours are.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import NoneType
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from scipy import ndimage
from torch import Generator, Tensor, nn

from deepatlas import atlas_grid, augment, checkpoint, grid, losses
from deepatlas.atlas_grid import AtlasGrid
from deepatlas.common_grid import HALVINGS, Cases, Frame, Placed, Pose, Template, placed
from deepatlas.config import RegSeg
from deepatlas.errors import ExamError, LabelError, ModelError
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
from deepatlas.networks import LEAK, Backbone, channels_first, channels_last
from deepatlas.shapes import Coordinates, Image, Mask
from deepatlas.transforms import Transform
from deepatlas.volume import Volume, apply, planes_mm

FORMAT = "deepatlas-regseg"
VERSION = 1
MAP = "map"
"""Folder of the coordinate map within a model folder."""
LAID = {NoneType: "middle", Template: "template", AtlasGrid: "atlas"}
"""How `model.json` calls what images are laid onto."""


# ── the two networks ───────────────────────────────────────────────────────────────────────────────────────────────


class RegistrationNetwork(nn.Module):
    """(moving, target) → displacement u in voxels, on the target's grid: ``I_m ∘ (id + u) ≈ I_t``.

    A light U-Net: encoder 16-32-32-32-32 with stride 2; decoder 32-32-32-8-8, the last at full size; 3³ to 3 channels.
    It looks ``passes`` times, each time at the moving image as it lies by then, and adds what still lacks:
    ``id + u ← (id + u) ∘ (id + v)`` (the paper: once). It begins as the identity.
    """

    def __init__(
        self,
        passes: int = 3,
        encoder: tuple[int, ...] = (16, 32, 32, 32, 32),
        decoder: tuple[int, ...] = (32, 32, 32, 8, 8),
    ) -> None:
        super().__init__()
        self.passes = passes
        down = zip((2, *encoder), encoder, strict=False)
        self.encoder = nn.ModuleList(nn.Conv3d(a, b, 3, 2, 1) for a, b in down)
        up = zip((encoder[-1], *decoder), (*encoder[-2::-1], 2), decoder, strict=False)
        self.decoder = nn.ModuleList(nn.Conv3d(a + skip, b, 3, 1, 1) for a, skip, b in up)
        self.last = nn.Conv3d(decoder[-1], 3, 3, 1, 1)
        nn.init.normal_(self.last.weight, std=1e-5)
        nn.init.zeros_(self.last.bias)

    def forward(self, moving: Image, target: Image) -> Coordinates:
        """Images are 0 ... 1."""
        shift = self._look(moving, target)
        for _ in range(self.passes - 1):
            more = self._look(grid.sample(moving, phi_box(shift)), target)
            shift = more + grid.sample(shift, phi_box(more))
        return shift

    def _look(self, moving: Image, target: Image) -> Coordinates:
        """One pass of the U-Net."""
        x = channels_last(torch.cat([moving, target], dim=1))
        skips = []
        for convolution in self.encoder:
            skips.append(x)
            x = F.leaky_relu(convolution(x), LEAK)
        for convolution in self.decoder:
            skip = skips.pop()
            x = torch.cat([F.interpolate(x, size=skip.shape[2:], mode="nearest"), skip], dim=1)
            x = F.leaky_relu(convolution(x), LEAK)
        return channels_first(self.last(x))


class SegmentationNetwork(nn.Module):
    """Image → probabilities of the background and of every class. A light U-Net of 8 to 64 channels."""

    def __init__(self, classes: int, widths: tuple[int, ...] = (8, 16, 32, 64)) -> None:
        super().__init__()
        self.backbone = Backbone(widths, groups=4)
        self.last = nn.Conv3d(widths[0], classes + 1, 1)

    def forward(self, image: Image) -> Float[Tensor, "batch class i j k"]:
        """Softmax over the classes."""
        features = self.backbone(image)[0]
        return channels_first(self.last(F.leaky_relu(features, LEAK))).softmax(dim=1)


class Networks(NamedTuple):
    """Both of them."""

    registration: RegistrationNetwork
    segmentation: SegmentationNetwork


def networks_for(classes: int, seed: int = 0, passes: int = 3) -> Networks:
    """Two fresh networks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Networks(RegistrationNetwork(passes), SegmentationNetwork(classes))


def phi_box(shift_voxels: Coordinates) -> Coordinates:
    """``id + u`` in the box frame, from u in voxels."""
    shape = tuple(shift_voxels.shape[2:])
    scale = shift_voxels.new_tensor([2 / (n - 1) for n in shape]).view(1, 3, 1, 1, 1)
    return grid.identity(shape).to(shift_voxels) + scale * shift_voxels


# ── the two steps ──────────────────────────────────────────────────────────────────────────────────────────────────


class View(NamedTuple):
    """A batch of images as drawn."""

    image: Image
    inside: Mask
    labels: Float[Tensor, "batch class i j k"]
    """One channel per class, background first; soft, as they were moved with the image."""
    labelled: Tensor
    """Boolean (batch,)."""


def registration_terms(networks: Networks, moving: View, target: View, weights: RegSeg) -> dict[str, Tensor]:
    """The loss of a registration step and its terms, means over the batch; F is held.

    With ``weights.anatomy`` 0 it is the unsupervised registration, and F is not asked.
    """
    shift = networks.registration(moving.image, target.image)
    where = phi_box(shift)
    channels = [moving.image, moving.inside.to(moving.image)]
    if weights.anatomy:
        with torch.no_grad():
            drawn = [_drawn_or_found(networks.segmentation, view) for view in (moving, target)]
        channels.append(drawn[0])
    warped = grid.sample(torch.cat(channels, dim=1), where)
    seen = _seen(target, warped[:, 1:2], where)
    terms = {
        "similarity": 1 - losses.correlation(warped[:, :1], target.image, seen, weights.window).mean(),
        "bending": losses.bending_energy(shift).mean(),
    }
    loss = terms["similarity"] + weights.bending * terms["bending"]
    if weights.anatomy:
        terms["anatomy"] = losses.soft_dice(warped[:, 3:], drawn[1][:, 1:], seen).mean()
        loss = loss + weights.anatomy * terms["anatomy"]
    return {"loss": loss} | terms


def _seen(target: View, inside: Tensor, where: Coordinates) -> Mask:
    """Where the target reaches, and the moving image at the places it is asked for (``inside``, sampled there)."""
    return target.inside & (inside > 0.99) & grid.inside(where)


def _drawn_or_found(segmentation: SegmentationNetwork, view: View) -> Tensor:
    """The labels where there are any, else the network's soft answer."""
    if view.labelled.all():
        return view.labels
    return torch.where(view.labelled.view(-1, 1, 1, 1, 1), view.labels, segmentation(view.image))


def segmentation_terms(networks: Networks, moving: View, target: View, weights: RegSeg) -> dict[str, Tensor]:
    """The loss of a segmentation step and its terms, means over the batch; R is held.

    Pairs without any label give 0, and pairs of two labelled images have no anatomy term: it would be a constant.
    """
    one = moving.labelled ^ target.labelled
    found_m = networks.segmentation(moving.image)
    found_t = networks.segmentation(target.image) if (~moving.labelled | one).any() else target.labels
    of_m = losses.soft_dice(found_m[:, 1:], moving.labels[:, 1:], moving.inside)
    of_t = losses.soft_dice(found_t[:, 1:], target.labels[:, 1:], target.inside)
    none = torch.zeros_like(of_m)
    supervised = torch.where(moving.labelled, of_m, torch.where(target.labelled, of_t, none))
    anatomy = none
    if weights.carried and one.any():
        with torch.no_grad():
            where = phi_box(networks.registration(moving.image, target.image))
        labelled = (view.labelled.view(-1, 1, 1, 1, 1) for view in (moving, target))
        sides = zip(labelled, (moving.labels, target.labels), (found_m, found_t), strict=True)
        s_m, s_t = (torch.where(has, drawn, found) for has, drawn, found in sides)
        warped = grid.sample(torch.cat([moving.inside.to(s_m), s_m[:, 1:]], dim=1), where)
        apart = losses.soft_dice(warped[:, 1:], s_t[:, 1:], _seen(target, warped[:, :1], where))
        anatomy = torch.where(one, apart, none)
    loss = weights.carried * anatomy.mean() + weights.supervised * supervised.mean()
    return {"loss": loss, "anatomy": anatomy.mean(), "supervised": supervised.mean()}


# ── training ───────────────────────────────────────────────────────────────────────────────────────────────────────

KEPT_BYTES = 2**29
"""Memory for pairs that the registration laid onto each other."""

COLUMNS = ("stage", "step", "seconds", "loss", "similarity", "bending", "anatomy", "supervised", "segmentation")


@dataclass(frozen=True)
class Model:
    """Two trained networks and the grid they see."""

    networks: Networks
    frame: Frame
    classes: dict[str, int]
    """Name of each class → its number in label maps, in the order of the network's answers."""
    name: str = "regseg"
    laid: Template | AtlasGrid | None = None
    """What images are laid onto: a mean of images by whole nodes, a region of an atlas by its map; None: middle on
    middle."""

    def place(self, volume: Volume) -> Placed:
        """An image on the grid.

        Raises:
            ExamError: it does not show the region that the networks were trained on.
        """
        if isinstance(self.laid, AtlasGrid):
            return placed(volume, self.frame, self.laid.pose(volume, self.frame))
        middle = placed(volume, self.frame)
        if self.laid is None:
            return middle
        image, inside = (torch.from_numpy(part)[None, None] for part in middle[:2])
        return placed(volume, self.frame, Pose.affine(self.frame.to_mm(volume, self.laid.nodes(image, inside))))


def schedule(cases: Cases, settings: RegSeg) -> RegSeg:
    """The stages that fit the labels: where images lack them the segmentation network learns with the registration held
    ("semi"), as the paper does from one label; where all have them it learns alone first."""
    if not cases.labelled.all() and not settings.semi:
        return replace(settings, semi=settings.segmentation, segmentation=0)
    return settings


def train(
    cases: Cases,
    frame: Frame,
    classes: dict[str, int],
    settings: RegSeg,
    out: Path | None = None,
    start: Networks | None = None,
    resume: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    laid: Template | AtlasGrid | None = None,
) -> Model:
    """Train both networks by the stages of the settings, one after the other; those of 0 steps are left out.

    Args:
        out: model folder; ``training/`` in it holds the log and the state to resume from. None: nothing is written.
        start: networks to go on from; they are left as they are.
        resume: continue a training that was stopped, to the bit with the same number of threads.
        laid: what the cases were laid onto; the model keeps it.

    Raises:
        LabelError: a stage needs labels and there are none.
        ExamError: fewer than two images.
        ModelError: nothing to resume, another training than the one begun, or the folder is taken.
    """
    if len(cases.names) < 2:
        raise ExamError(f"Expected at least 2 images to pair, got {len(cases.names)}; give a folder of more.")
    if not cases.labelled.any() and settings.segmentation + settings.semi + settings.joint:
        raise LabelError("Expected at least one labelled image, got none; list one, or train the registration only.")
    run = Run(cases, frame, settings, start)
    about = {"settings": asdict(settings), "cases": cases.names, "frame": asdict(frame), "classes": classes}
    about |= {"labelled": cases.labelled.tolist(), "images": _seen_by(cases, laid)}
    about = json.loads(json.dumps(about))
    first = (0, 0)
    folder = None if out is None else out / "training"
    if folder is not None:
        check_folder(out, resume)
        folder.mkdir(parents=True, exist_ok=True)
        first = run.restore(folder, about) if resume else first
    keep_freed_memory()
    log, keep = (folder / "log.csv", partial(run.save, folder, about)) if folder else (None, lambda *_: None)
    go_through(run.stages(), first, log, keep, settings.checkpoint_minutes, on_progress, run.enter, COLUMNS)
    model = Model(Networks(*(network.eval() for network in run.networks)), frame, classes, laid=laid)
    if out is not None:
        save(model, out)
    return model


def _seen_by(cases: Cases, laid: Template | AtlasGrid | None) -> list[str]:
    """What tells the images of a training from others. Those on an atlas differ in their last bits with the number of
    threads, so there the map is told."""
    if isinstance(laid, AtlasGrid):
        told = (*laid.model.network.state_dict().values(), laid.region.box_atlas)
    else:
        told = (cases.image, cases.inside, cases.labels)
    return [LAID[type(laid)], checkpoint.checksum(*told)]


class Run:
    """Both networks and their optimisers. Every step draws its chance from the seed, the stage and the step alone."""

    def __init__(self, cases: Cases, frame: Frame, settings: RegSeg, start: Networks | None) -> None:
        self.cases, self.frame, self.settings = cases, frame, settings
        self.networks = copy.deepcopy(start) if start else networks_for(cases.classes, settings.seed)
        self.networks.registration.passes = settings.passes
        for network in self.networks:
            network.to(memory_format=torch.channels_last_3d).train().requires_grad_(True)
        self.drawn = [n for n, has in enumerate(cases.labelled.tolist()) if has]
        self.spoken = float("nan")
        """Loss of the last segmentation step of the alternation, for the log."""
        self.kept: dict[tuple[int, int], Tensor] = {}
        """What `laid` found since R last learned."""
        self.enter()

    def stages(self) -> list[Stage]:
        """Name, steps and step function of every stage, in order."""
        alone = replace(self.settings, anatomy=0.0, carried=0.0, lent=0.0)
        every = [
            ("registration", self.settings.registration, partial(self.registration_step, alone)),
            ("segmentation", self.settings.segmentation, partial(self.segmentation_step, alone)),
            ("semi", self.settings.semi, partial(self.segmentation_step, self.settings)),
            ("guided", self.settings.guided, partial(self.registration_step, self.settings)),
            ("joint", self.settings.joint, self.joint_step),
        ]
        return [(name, steps, partial(self.at_rate, steps, step_of)) for name, steps, step_of in every if steps]

    def at_rate(self, steps: int, step_of: Callable, stage: int, step: int) -> dict[str, float]:
        """A step of a stage of so many at its rate: it rises at first, then falls along a cosine to a tenth."""
        rate = self.settings.rate * min(1.0, (step + 1) / self.settings.warm_up)
        for optimiser in self.optimisers:
            optimiser.param_groups[0]["lr"] = rate * (0.1 + 0.45 * (1 + np.cos(np.pi * step / steps)))
        return step_of(stage, step)

    def enter(self, stage: int = 0) -> None:
        """Fresh optimisers for a stage: registration, segmentation."""
        self.optimisers = [torch.optim.Adam(network.parameters(), self.settings.rate) for network in self.networks]
        self.descents = [Descent(self.settings.clip) for _ in self.networks]

    def learn(self, which: int, terms: dict[str, Tensor]) -> dict[str, float]:
        """A step of one network down its loss; the terms as numbers."""
        self.descents[which].step(self.optimisers[which], terms["loss"], self.networks[which])
        if which == 0:
            self.kept.clear()
        return {key: float(value.detach()) for key, value in terms.items()}

    def registration_step(self, settings: RegSeg, stage: int, step: int) -> dict[str, float]:
        """R learns, F is held."""
        return self.learn(0, registration_terms(self.networks, *self.pair(stage, step), settings))

    def segmentation_step(self, settings: RegSeg, stage: int, step: int) -> dict[str, float]:
        """F learns, R is held: from labelled images, a share of them in the shape and tone of others, and from pairs
        drawn as R knows them."""
        chance = self.chance(stage, step, 1)
        share = settings.lent if len(self.drawn) == 1 else settings.lent / 2  # several show shapes of their own
        lent = torch.rand(1, generator=chance).item() < share
        seen = self.lent(chance) if lent else self.view(_some(self.drawn, settings.batch, chance), chance)
        terms = segmentation_terms(self.networks, seen, seen, settings)
        if settings.carried:
            paired = segmentation_terms(self.networks, *self.half_labelled(chance), settings)
            terms = {key: terms[key] + value for key, value in paired.items()}
        return self.learn(1, terms)

    def joint_step(self, stage: int, step: int) -> dict[str, float]:
        """A registration step, and after every ``ratio`` of them one of segmentation."""
        terms = self.registration_step(self.settings, stage, step)
        if (step + 1) % self.settings.ratio == 0:
            self.spoken = self.segmentation_step(self.settings, stage, step)["loss"]
        return terms | {"segmentation": self.spoken}

    def chance(self, stage: int, step: int, part: int = 0) -> Generator:
        """The generator of one step."""
        return augment.keyed(self.settings.seed, stage, step, part)

    def pair(self, stage: int, step: int) -> tuple[View, View]:
        """Random pairs of different images."""
        chance = self.chance(stage, step)
        count = len(self.cases.names)
        moving = torch.randint(count, (self.settings.batch,), generator=chance)
        other = (moving + 1 + torch.randint(count - 1, (self.settings.batch,), generator=chance)) % count
        views = (self.view(cases.tolist(), chance, self.settings.gentle) for cases in (moving, other))
        return next(views), next(views)

    def half_labelled(self, chance: Generator) -> tuple[View, View]:
        """Random pairs with labels on at least one side, the moving one half of the time."""
        labelled = _some(self.drawn, self.settings.batch, chance)
        free = [n for n in range(len(self.cases.names)) if n not in set(labelled)]
        other, share = _some(free or labelled, self.settings.batch, chance), self.settings.gentle
        views = [self.view(cases, chance, share) for cases in (labelled, other)]
        swap = bool(torch.rand(1, generator=chance) < 0.5)
        return (views[1], views[0]) if swap else (views[0], views[1])

    def lent(self, chance: Generator) -> View:
        """Labelled images in the shape and tone of others, as R lays them there."""
        count = len(self.cases.names)
        labelled = _some(self.drawn, self.settings.batch, chance)
        steps = torch.randint(1, count, (len(labelled),), generator=chance).tolist()
        pairs = [(case, (case + step) % count) for case, step in zip(labelled, steps, strict=True)]
        laid = torch.cat([self.laid(*pair) for pair in pairs])
        where = self.where(len(labelled), chance)
        there, tone = grid.sample(laid, where).split((3, 1), dim=1)
        return self.seen_at(labelled, there, chance, grid.inside(where), tone)

    def laid(self, case: int, other: int) -> Float[Tensor, "1 4 i j k"]:
        """The places of an image in the shape of another, as R lays it there, and the tone from it to that one.

        One labelled image has few others to be laid on, so pairs are kept for as long as R is held.
        """
        if (case, other) in self.kept:
            return self.kept[case, other]
        moving, target = self.cases.image[[case]], self.cases.image[[other]]
        with torch.no_grad():
            phi = phi_box(self.networks.registration(moving, target))
        inside = self.cases.inside[[case]].to(moving)
        warped = grid.sample(torch.cat([moving, inside], dim=1), phi)
        seen = self.cases.inside[[other]] & (warped[:, 1:] > 0.99) & grid.inside(phi)
        laid = torch.cat([phi, augment.tone_between(warped[:, :1], target, seen)], dim=1)
        if (len(self.kept) + 1) * laid.nbytes <= KEPT_BYTES:
            self.kept[case, other] = laid
        return laid

    def view(self, cases: list[int], chance: Generator, share: float = 1.0) -> View:
        """Images and labels under a random affine map, bend and contrast; only a share of the former two."""
        return self.seen_at(cases, self.where(len(cases), chance, share), chance)

    def where(self, count: int, chance: Generator, share: float = 1.0) -> Coordinates:
        """Random affine maps and bends of the grid."""
        how, shape = self.settings.augmentation.gentler(share), tuple(self.cases.image.shape[2:])
        finest = min(self.frame.spacing_mm)  # a turn depends on the proportions of the box alone
        sides = [(n - 1) * (mm / finest) for n, mm in zip(shape, self.frame.spacing_mm, strict=True)]
        box = torch.diag(torch.tensor(sides)).expand(count, 3, 3)
        matrix = augment.draw_affine(box, chance, how.scale, how.rotation, how.translation)
        bend = grid.resize(augment.draw_bend(count, chance, share * self.settings.bend), shape)
        return augment.place(matrix, shape) + bend

    def seen_at(
        self,
        cases: list[int],
        where: Coordinates,
        chance: Generator,
        known: Mask | bool = True,
        added: Image | float = 0.0,
    ) -> View:
        """Images and labels at some places, under a random contrast.

        Args:
            known: False where the places themselves are not known.
            added: to the images.
        """
        images, insides = self.cases.image[cases], self.cases.inside[cases]
        hot = F.one_hot(self.cases.labels[cases].long(), self.cases.classes + 1).movedim(-1, 1).to(images)
        moved = grid.sample(torch.cat([images, insides.to(images), hot], dim=1), where)
        inside = (moved[:, 1:2] > 0.99) & grid.inside(where) & known
        tone = augment.draw_tone(len(images), chance, self.settings.augmentation.tone)
        image = augment.apply_tone((moved[:, :1] + added).clamp(0, 1) * inside, tone, chance)
        return View(image, inside, moved[:, 2:], self.cases.labelled[cases])

    def save(self, folder: Path, about: dict, stage: int, step: int) -> None:
        """Write the state to resume from: tensors first, then where they stand."""
        tensors = {}
        for name, network, optimiser in zip(Networks._fields, self.networks, self.optimisers, strict=True):
            tensors |= {f"{name}.{k}": v for k, v in network.state_dict().items()}
            tensors |= tensors_of(optimiser, f"adam.{name}.")
        save_state(folder, State(stage, step, tensors), about)

    def restore(self, folder: Path, about: dict) -> tuple[int, int]:
        """Read the state back; the stage and the step to go on with."""
        stage, step, tensors, _ = read_state(folder, about)
        for name, network, optimiser in zip(Networks._fields, self.networks, self.optimisers, strict=True):
            network.load_state_dict(checkpoint.under(tensors, f"{name}."))
            optimiser_of(optimiser, checkpoint.under(tensors, f"adam.{name}."))
        return stage, step


def _some(choices: list[int], count: int, chance: Generator) -> list[int]:
    """Random ones of a list, with repeats."""
    return [choices[n] for n in torch.randint(len(choices), (count,), generator=chance).tolist()]


# ── use ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def segment(model: Model, volume: Volume) -> np.ndarray:
    """The class of every voxel of an image, on its own grid, as numbers of the label maps: (i, j, k) int32."""
    image, _, pose = model.place(volume)
    with torch.no_grad():
        found = model.networks.segmentation(torch.from_numpy(image)[None, None])[0].numpy()
    last, numbers = np.array(model.frame.shape) - 1, np.array([0, *model.classes.values()], np.int32)
    result = np.empty(volume.shape, np.int32)
    for plane, points in enumerate(planes_mm(volume.shape, volume.affine)):
        index = pose.back.points(points)
        # each class is brought back linearly, then the most probable is taken: never linear on class numbers
        back = [ndimage.map_coordinates(one, np.moveaxis(index, -1, 0), order=1, mode="nearest") for one in found]
        beyond = ((index < -0.5) | (index > last + 0.5)).any(axis=-1)  # of the grid, where nothing is known
        result[plane] = np.where(beyond, 0, numbers[np.argmax(back, axis=0)])
    return result


def register(model: Model, fixed: Volume, moving: Volume) -> Transform:
    """Φ from the fixed image to the moving one, mm → mm: both laid onto what they have in common, then u."""
    return register_placed(model, model.place(fixed), model.place(moving))


def register_placed(model: Model, fixed: Placed, moving: Placed) -> Transform:
    """`register`, of images that lie on the model's grid already."""
    with torch.no_grad():
        shift = model.networks.registration(*(torch.from_numpy(one.image)[None, None] for one in (moving, fixed)))
    to_fixed, to_moving = fixed.pose.there.linear, moving.pose.there.linear
    linear, here = to_moving @ np.linalg.inv(to_fixed), apply(to_fixed, model.frame.nodes())
    u = Transform(np.eye(4), shift[0].numpy(), np.eye(4))
    there = moving.pose.there.points(u.points(fixed.pose.back.points(here)))
    return Transform(linear, np.moveaxis(there - apply(linear, here), -1, 0), to_fixed)


# ── on disk ────────────────────────────────────────────────────────────────────────────────────────────────────────


def save(model: Model, folder: Path, half: bool = False) -> None:
    """Write a model folder: ``weights.safetensors``, then ``model.json``. ``half`` stores half precision."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = torch.float16 if half else torch.float32
    tensors = {
        f"{name}.{k}": v.to(kind)
        for name, network in zip(Networks._fields, model.networks, strict=True)
        for k, v in network.state_dict().items()
    }
    if isinstance(model.laid, Template):
        tensors |= {f"template.{name}": part.to(kind) for name, part in model.laid._asdict().items()}
    if isinstance(model.laid, AtlasGrid):
        atlas_grid.save(model.laid, folder / MAP, half)
    checkpoint.write_tensors(folder / "weights.safetensors", tensors)
    about = {"format": FORMAT, "version": VERSION, "frame": asdict(model.frame)}
    about |= {"passes": model.networks.registration.passes, "laid": LAID[type(model.laid)]}
    about["structures"] = [{"name": name, "label": number} for name, number in model.classes.items()]
    checkpoint.write_text(folder / "model.json", json.dumps(about, indent=1))


def load(folder: Path) -> Model:
    """Read a model folder.

    Raises:
        ModelError: not a model of this system, another version, or files that do not fit their description.
    """
    about = checkpoint.describe(folder, FORMAT, VERSION)
    try:
        frame = about["frame"]
        frame = Frame(
            tuple(int(n) for n in frame["shape"]), tuple(float(s) for s in frame["spacing_mm"]), str(frame["scaling"])
        )
        whole = all(n >= 1 and n % 2**HALVINGS == 0 for n in frame.shape)
        if (len(frame.shape), len(frame.spacing_mm)) != (3, 3) or not whole or not min(frame.spacing_mm) > 0:
            raise ValueError(f"a grid of {frame.shape}, {frame.spacing_mm} mm")
        if not int(about["passes"]) >= 1:
            raise ValueError(f"{about['passes']} passes")
        classes = {str(one["name"]): int(one["label"]) for one in about["structures"]}
        networks = networks_for(len(classes), passes=int(about["passes"]))
        parts = [(f"{name}.", network) for name, network in zip(Networks._fields, networks, strict=True)]
        shapes = {p + k: tuple(v.shape) for p, network in parts for k, v in network.state_dict().items()}
        kind = {name: kind for kind, name in LAID.items()}[about["laid"]]
        if kind is Template:
            shapes |= {f"template.{part}": (1, 1, *frame.shape) for part in Template._fields}
        tensors = checkpoint.read_tensors(folder / "weights.safetensors", shapes, {"F16", "F32"})
        laid = None
        if kind is Template:
            laid = Template(tensors["template.image"].float(), tensors["template.inside"] > 0.5)
        if kind is AtlasGrid:
            laid = atlas_grid.load(folder / MAP)
        for prefix, network in parts:
            network.load_state_dict({k: v.float() for k, v in checkpoint.under(tensors, prefix).items()})
            network.to(memory_format=torch.channels_last_3d).eval().requires_grad_(False)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{folder / 'model.json'} does not describe a model ({error}); copy it again.") from error
    return Model(networks, frame, classes, folder.name, laid)
