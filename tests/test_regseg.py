"""The 2019 system: what each network learns from, where images lie, what is answered, and trainings that are stopped.

No network is good after a few steps, so where answers are asked for, stand-ins give them and the truth is known.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from deepatlas import augment, checkpoint, common_grid, grid, loop, losses, regseg, regseg_scores, transforms
from deepatlas.common_grid import Frame
from deepatlas.config import Augmentation, RegSeg
from deepatlas.errors import ExamError, LabelError, ModelError
from deepatlas.regseg import Model, Networks, Run, View, registration_terms, segmentation_terms
from deepatlas.volume import Volume
from exact import dice, places_of, rotated
from oblique import OFFSETS, STORED, centre, off_middle, scan
from standins import Answers, model_of, never, shifting

SHIPPED = Path(__file__).parents[1] / "models" / "head-neck-ct"

# ── what the networks learn from ───────────────────────────────────────────────────────────────────────────────────

SHAPE = (20, 24, 22)
WEIGHTS = RegSeg(window=None, bending=0.7, anatomy=2.0, carried=0.5, supervised=3.0)
WAVE = torch.tensor([2.0, -1.5, 2.5]).view(1, 3, 1, 1, 1) * torch.from_numpy(
    np.prod(np.sin(np.pi * np.moveaxis(np.indices(SHAPE), 0, -1) / (np.array(SHAPE) - 1)), axis=-1)
)
"""A displacement in voxels that ends at the faces of the grid: no point leaves it."""
WHOLE = torch.tensor([1.0, 0.0, -2.0])
EITHER = [(True, True), (True, False), (False, True), (False, False)]


def smooth(seed: int, channels: int = 1, shape=SHAPE, nodes: int = 6) -> torch.Tensor:
    """A smooth random field, 0 ... 1."""
    return grid.resize(torch.rand(1, channels, *(nodes,) * 3, generator=torch.Generator().manual_seed(seed)), shape)


def view(seed: int, labelled: bool, margin: int = 0, shape=SHAPE, bent: bool = False) -> View:
    """An image with soft labels, which are to be used only if it is labelled, within a margin of nothing.

    All images are alike, so that it matters what is laid on what; a bent one is what WAVE makes of the others.
    """
    inside = torch.zeros(1, 1, *shape, dtype=torch.bool)
    inside[0, 0, margin : shape[0] - margin, margin : shape[1] - margin, margin : shape[2] - margin] = True
    common = smooth(0, 1, shape, nodes=9)
    image = 0.8 * (torch.from_numpy(pulled(common))[None].float() if bent else common) + 0.2 * smooth(seed, 1, shape)
    labels = sorted_by(image + 0.1 * smooth(seed + 1, 1, shape), 0.47, 0.57, 40.0)
    return View(image, inside, labels, torch.tensor([labelled]))


def sorted_by(image: torch.Tensor, low: float, high: float, slope: float) -> torch.Tensor:
    """Three soft classes: up to a limit, up to another, and above."""
    first, second = slope * (image - low), slope * (image - high)
    return torch.cat([0 * image, first, first + second], dim=1).softmax(dim=1)


def unsure(image: torch.Tensor) -> torch.Tensor:
    """What the stand-in says: others than the labels, and less sure."""
    return sorted_by(image, 0.50, 0.62, 25.0)


def answering(shift=WAVE[0], segmentation=unsure) -> Networks:
    return Networks(Answers(shifting(shift)), Answers(segmentation))


def pulled(field: torch.Tensor) -> np.ndarray:
    """A field at x + WAVE, by PyTorch's own sampling in float64."""
    size = torch.tensor(SHAPE).view(1, 3, 1, 1, 1) - 1
    index = torch.from_numpy(np.indices(SHAPE))[None] + WAVE
    return grid.sample_reference(field.double(), 2 * index / size - 1)[0].numpy()


def rolled(field: torch.Tensor) -> np.ndarray:
    """A field at x + WHOLE, away from the faces: voxel i of the result is voxel i + 1, k is k − 2."""
    return np.roll(field[0].double().numpy(), (-1, 2), (1, 3))


def plain(field: torch.Tensor) -> np.ndarray:
    return field[0].double().numpy()


def apart(a: np.ndarray, b: np.ndarray, mask: np.ndarray | bool = True) -> float:
    """1 − Dice of soft masks (class, i, j, k), over the classes but the first, the background."""
    mask = np.broadcast_to(mask, a.shape)[0]
    pairs = [(one[mask], other[mask]) for one, other in zip(a[1:], b[1:], strict=True)]
    return 1 - float(np.mean([2 * (x * y).sum() / ((x**2).sum() + (y**2).sum()) for x, y in pairs]))


def unlike(a: np.ndarray, b: np.ndarray, mask: np.ndarray | bool = True) -> float:
    """1 − correlation."""
    mask = np.broadcast_to(mask, a.shape)
    return 1 - float(np.corrcoef(a[mask], b[mask])[0, 1])


def known(one: View) -> torch.Tensor:
    """The labels where there are any, else what the network says."""
    return one.labels if one.labelled.item() else unsure(one.image)


def near(expected: float):
    return pytest.approx(expected, abs=1e-3)


def roughly(expected: float):
    """Under a mask of some hundred voxels, one more or less."""
    return pytest.approx(expected, abs=4e-3)


def gradients(network: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in network.parameters() if p.grad is not None]


def learning(seed: int = 1) -> Networks:
    """Two real networks, whose displacement is not nothing."""
    networks = regseg.networks_for(2, seed)
    nn.init.normal_(networks.registration.last.weight, std=0.05)
    return networks


SMALL = (16, 16, 16)


@pytest.mark.parametrize("labelled", EITHER)
def test_a_registration_learns_from_likeness_bending_and_labels_or_what_stands_for_them(labelled):
    moving, target = view(7, labelled[0]), view(15, labelled[1], bent=True)
    found = registration_terms(answering(), moving, target, WEIGHTS)
    likeness = unlike(pulled(moving.image), plain(target.image))
    bending = float(losses.bending_energy(WAVE))
    anatomy = apart(pulled(known(moving)), plain(known(target)))
    assert float(found["similarity"]) == near(likeness)
    assert float(found["bending"]) == pytest.approx(bending, rel=1e-4)
    assert float(found["anatomy"]) == near(anatomy)
    assert float(found["loss"]) == pytest.approx(likeness + 0.7 * bending + 2 * anatomy, abs=3e-3)
    sides = [(one.labels, unsure(one.image)) for one in (moving, target)]
    others = [apart(pulled(sides[0][a]), plain(sides[1][b])) for a in (0, 1) for b in (0, 1)]
    others.remove(anatomy)
    others += [apart(plain(known(moving)), plain(known(target))), apart(plain(known(moving)), pulled(known(target)))]
    assert min(abs(other - anatomy) for other in others) > 0.01  # what else it could have been


@pytest.mark.parametrize("margins", [(4, 4), (4, 6), (6, 4)])
def test_what_an_image_does_not_show_counts_for_nothing(margins):
    moving, target = view(1, True, margins[0]), view(11, True, margins[1])
    both = rolled(moving.inside.double()) * plain(target.inside.double()) > 0.5
    found = registration_terms(answering(WHOLE), moving, target, WEIGHTS)
    assert float(found["similarity"]) == roughly(unlike(rolled(moving.image), plain(target.image), both))
    assert float(found["anatomy"]) == roughly(apart(rolled(moving.labels), plain(target.labels), both))
    junk = [
        one._replace(
            image=torch.where(one.inside, one.image, smooth(90)),
            labels=torch.where(one.inside, one.labels, smooth(91, 3)),
        )
        for one in (moving, target)
    ]
    again = registration_terms(answering(WHOLE), *junk, WEIGHTS)
    assert float(again["loss"]) == pytest.approx(float(found["loss"]), abs=1e-5)
    for labelled in ((True, False), (False, True)):
        pairs = [
            [one._replace(labelled=torch.tensor([has])) for one, has in zip(pair, labelled, strict=True)]
            for pair in ((moving, target), junk)
        ]
        terms = [segmentation_terms(answering(WHOLE), *pair, WEIGHTS) for pair in pairs]
        assert float(terms[0]["anatomy"]) == roughly(apart(rolled(known(pairs[0][0])), plain(known(pairs[0][1])), both))
        labels = pairs[0][labelled.index(True)]
        own = plain(labels.inside) > 0
        assert float(terms[0]["supervised"]) == roughly(apart(plain(unsure(labels.image)), plain(labels.labels), own))
        assert float(terms[1]["loss"]) == pytest.approx(float(terms[0]["loss"]), abs=1e-5)


def test_what_lies_beyond_the_moving_image_counts_for_nothing_where_it_fills_the_grid():
    """With u = 3 along i the last three planes of the target have no counterpart."""
    moving, target = view(1, True), view(11, False)
    beyond = torch.zeros(1, 1, *SHAPE, dtype=torch.bool)
    beyond[:, :, -3:] = True
    other = target._replace(image=torch.where(beyond, smooth(90), target.image))
    networks = answering((3.0, 0, 0))
    for terms_of in (registration_terms, segmentation_terms):
        one, two = (terms_of(networks, moving, given, WEIGHTS) for given in (target, other))
        assert float(one["loss"]) == pytest.approx(float(two["loss"]), abs=1e-5)


@pytest.mark.parametrize("labelled", [(True, False), (False, True)])
def test_a_segmentation_learns_through_the_registration_where_one_image_has_labels(labelled):
    moving, target = view(7, labelled[0]), view(15, labelled[1], bent=True)
    found = segmentation_terms(answering(), moving, target, WEIGHTS)
    drawn = moving if labelled[0] else target
    anatomy = apart(pulled(known(moving)), plain(known(target)))
    supervised = apart(plain(unsure(drawn.image)), plain(drawn.labels))
    assert float(found["anatomy"]) == near(anatomy)
    assert float(found["supervised"]) == near(supervised)
    assert float(found["loss"]) == pytest.approx(0.5 * anatomy + 3 * supervised, abs=3e-3)
    free = target if labelled[0] else moving
    others = [apart(plain(known(moving)), plain(known(target))), apart(pulled(moving.labels), plain(target.labels))]
    assert min(abs(other - anatomy) for other in others) > 0.01
    assert abs(apart(plain(unsure(free.image)), plain(free.labels)) - supervised) > 0.01


def test_with_labels_on_both_sides_a_segmentation_learns_from_the_moving_image_alone():
    networks, pair = learning(), (view(1, True, shape=SMALL), view(11, True, shape=SMALL))
    alone = 3.0 * losses.soft_dice(networks.segmentation(pair[0].image)[:, 1:], pair[0].labels[:, 1:])
    wanted = torch.autograd.grad(alone.sum(), list(networks.segmentation.parameters()))
    for weight in (0.0, 2.0, 50.0):
        networks.segmentation.zero_grad()
        terms = segmentation_terms(networks, *pair, replace(WEIGHTS, carried=weight))
        terms["loss"].backward()
        assert float(terms["supervised"].detach()) == pytest.approx(float(alone.detach()) / 3, rel=1e-5)
        for found, gradient in zip(gradients(networks.segmentation), wanted, strict=True):
            torch.testing.assert_close(found, gradient, atol=1e-6, rtol=1e-3)
    assert max(float(gradient.abs().max()) for gradient in wanted) > 1e-3


def test_with_labels_on_one_side_both_images_teach_the_segmentation():
    networks, pair = learning(), [view(1, True, shape=SMALL), view(11, False, shape=SMALL)]
    for moving, target in (pair, pair[::-1]):
        networks.segmentation.zero_grad()
        segmentation_terms(networks, moving, target, replace(WEIGHTS, supervised=0.0))["loss"].backward()
        assert max(float(gradient.abs().max()) for gradient in gradients(networks.segmentation)) > 1e-4


def test_a_pair_without_labels_does_not_move_the_segmentation():
    networks = learning()
    terms = segmentation_terms(networks, view(1, False, shape=SMALL), view(11, False, shape=SMALL), WEIGHTS)
    assert float(terms["loss"].detach()) == 0
    if terms["loss"].requires_grad:
        terms["loss"].backward()
    assert not any(gradient.any() for gradient in gradients(networks.segmentation))
    assert not gradients(networks.registration)


def test_in_a_batch_every_pair_is_taken_by_what_it_has():
    pairs = [(view(n, m, shape=SMALL), view(n + 50, t, shape=SMALL)) for n, (m, t) in enumerate(EITHER)]
    batch = [View(*(torch.cat(part) for part in zip(*side, strict=True))) for side in zip(*pairs, strict=True)]
    networks = learning()
    for terms_of in (registration_terms, segmentation_terms):
        with torch.no_grad():
            singles = [terms_of(networks, *pair, WEIGHTS) for pair in pairs]
            together = terms_of(networks, *batch, WEIGHTS)
        assert len({round(float(one["loss"]), 4) for one in singles}) == 4
        for term, value in together.items():
            assert float(value) == pytest.approx(np.mean([float(one[term]) for one in singles]), abs=2e-5), term


@pytest.mark.parametrize("labelled", EITHER[:3])
def test_the_network_that_is_held_gets_no_gradient(labelled):
    networks = learning()
    pair = (view(1, labelled[0], shape=SMALL), view(11, labelled[1], shape=SMALL))
    registration_terms(networks, *pair, WEIGHTS)["loss"].backward()
    assert all(gradient.any() for gradient in gradients(networks.registration)[-2:])
    assert not gradients(networks.segmentation)
    networks.registration.zero_grad()
    segmentation_terms(networks, *pair, WEIGHTS)["loss"].backward()
    assert all(gradient.any() for gradient in gradients(networks.segmentation)[-2:])
    assert not gradients(networks.registration)


def test_without_a_weight_on_anatomy_a_registration_does_not_ask_the_segmentation():
    moving, target = view(1, False), view(11, True)
    found = registration_terms(answering(segmentation=never), moving, target, replace(WEIGHTS, anatomy=0.0))
    expected = unlike(pulled(moving.image), plain(target.image)) + 0.7 * float(losses.bending_energy(WAVE))
    assert float(found["loss"]) == near(expected)


def test_a_displacement_in_voxels_is_brought_into_the_box():
    index = np.moveaxis(np.indices(SHAPE), 0, -1) + np.moveaxis(WAVE[0].numpy(), 0, -1)
    expected = 2 * index / (np.array(SHAPE) - 1) - 1
    np.testing.assert_allclose(np.moveaxis(regseg.phi_box(WAVE.float())[0].numpy(), 0, -1), expected, atol=1e-6)


def test_fresh_networks_leave_images_where_they_are_and_give_probabilities():
    networks = regseg.networks_for(3)
    image, other = smooth(0, 1, (16, 32, 48)), smooth(1, 1, (16, 32, 48))
    with torch.no_grad():
        shift, found = networks.registration(image, other), networks.segmentation(image)
    assert shift.shape == (1, 3, 16, 32, 48)
    assert shift.abs().max() < 0.01
    assert found.shape == (1, 4, 16, 32, 48)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(1, 16, 32, 48))
    assert found.min() >= 0


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_every_pass_looks_at_the_image_as_it_lies_and_the_passes_are_one_displacement(passes, monkeypatch):
    """The image shows where its voxels are, which no sampling blurs."""
    network = regseg.RegistrationNetwork(passes)
    waves = [WAVE[0], -0.5 * WAVE[0].flip(0), 0.7 * WAVE[0].roll(1, 0)]
    seen = []
    monkeypatch.setattr(
        network, "_look", lambda moving, _: (seen.append(moving), waves[len(seen) - 1][None].float())[1]
    )
    place = grid.identity(SHAPE)
    shift = network(place, smooth(4))
    assert len(seen) == passes
    for n in range(passes):
        torch.testing.assert_close(seen[n], place, atol=1e-5, rtol=0)
        place = grid.sample(place, regseg.phi_box(waves[n][None].float()))
    torch.testing.assert_close(regseg.phi_box(shift), place, atol=1e-5, rtol=0)


def test_a_training_looks_as_often_as_its_settings_say_and_the_model_keeps_it(tmp_path):
    settings = replace(NO_STEPS, registration=1, passes=2)
    model = regseg.train(cohort(), CUBE, CLASSES, settings, tmp_path / "model", start=regseg.networks_for(2, passes=4))
    assert model.networks.registration.passes == 2
    assert regseg.load(tmp_path / "model").networks.registration.passes == 2


# ── registering ────────────────────────────────────────────────────────────────────────────────────────────────────

FRAME = Frame((16, 32, 16), (4.0, 3.0, 5.0), "0:1")
FIXED = {"shape": (20, 33, 18), "spacing": (2.5, 2.2, 3.7), "degrees": (10, -5, 20), "middle": (12.0, -40, 7)}
MOVING = {"shape": (27, 22, 15), "spacing": (1.9, 3.3, 4.4), "degrees": (-8, 15, -12), "middle": (-60.0, 5, 90)}


def expected_map(shift_voxels: np.ndarray, points: np.ndarray, spacing=FRAME.spacing_mm) -> np.ndarray:
    """Φ: from the fixed image's middle along its axes, a shift in steps of the frame, along the moving one's axes."""
    along = (points - FIXED["middle"]) @ rotated(FIXED["degrees"])
    return MOVING["middle"] + (along + shift_voxels * spacing) @ rotated(MOVING["degrees"]).T


@pytest.mark.parametrize("stored", [("RAS", "RAS"), ("ILA", "ASL"), ("LPS", "SAR")])
def test_a_registration_leads_from_the_fixed_to_the_moving_image_in_mm(stored):
    fixed, moving = scan(**FIXED, stored=stored[0]), scan(**MOVING, stored=stored[1])
    shift = np.array([1.5, -2.0, 0.75])
    found = regseg.register(model_of(FRAME, shift), fixed, moving)
    points = places_of(fixed.shape, fixed.affine)
    np.testing.assert_allclose(found.points(points), expected_map(shift, points), atol=1e-4)
    np.testing.assert_allclose(found.determinants(), 1, atol=1e-6)


def test_images_of_the_frames_own_spacing_are_registered_voxel_on_voxel():
    own = {"spacing": FRAME.spacing_mm}
    fixed = scan(**FIXED | own | {"shape": (16, 30, 14)}, stored="ILA")
    moving = scan(**MOVING | own | {"shape": (14, 32, 16)}, stored="ASL")
    shift = np.array([1.0, -2.0, 3.0])
    found = regseg.register(model_of(FRAME, shift), fixed, moving)
    points = places_of(fixed.shape, fixed.affine)
    np.testing.assert_allclose(found.points(points), expected_map(shift, points), atol=1e-4)


def test_the_registration_network_is_given_the_moving_image_and_then_the_fixed_one():
    fixed, moving = scan(**FIXED), scan(**MOVING)
    given = []

    def keep(*images):
        given.extend(images)
        return torch.zeros(1, 3, *FRAME.shape)

    model = model_of(FRAME)
    regseg.register(replace(model, networks=Networks(Answers(keep), Answers(never))), fixed, moving)
    for image, volume in zip(given, (moving, fixed), strict=True):
        np.testing.assert_array_equal(image[0, 0].numpy(), common_grid.placed(volume, FRAME).image)


def linear_shift(gradient: np.ndarray) -> np.ndarray:
    """A displacement in voxels that is linear in the index, (3, i, j, k)."""
    index = np.indices(FRAME.shape) - ((np.array(FRAME.shape) - 1) / 2)[:, None, None, None]
    return np.einsum("ab,bijk->aijk", gradient, index)


@pytest.mark.parametrize("stored", [("RAS", "RAS"), ("ILA", "ASL")])
def test_the_change_of_volume_is_that_of_the_displacement_in_voxels(stored):
    gradient = np.array([[0.10, -0.20, 0.05], [0.15, -0.30, 0.10], [-0.05, 0.20, 0.25]])
    fixed, moving = scan(**FIXED, stored=stored[0]), scan(**MOVING, stored=stored[1])
    model = model_of(FRAME, linear_shift(gradient))
    found = regseg.register(model, fixed, moving)
    np.testing.assert_allclose(found.determinants(), np.linalg.det(np.eye(3) + gradient), atol=1e-5)
    assert transforms.folded(found, fixed) == 0
    mirrored = model_of(FRAME, linear_shift(np.diag([0, 0, -1.5])))
    assert transforms.folded(regseg.register(mirrored, fixed, moving), fixed) == 1


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_folds_are_counted_where_the_fixed_image_is(share):
    """The upper planes along j run backwards: so do those of the image, and no more of the grid's."""
    first = int(32 * (1 - share))
    shift = np.zeros((3, *FRAME.shape))
    shift[1] = np.minimum(0, -3.0 * (np.arange(32) - first))[None, :, None]
    fixed = scan(**FIXED | {"shape": (16, 30, 16), "spacing": (4.1, 3.1, 5.1), "degrees": (0, 0, 0)})
    model = model_of(FRAME, shift)
    found = transforms.folded(regseg.register(model, fixed, scan(**MOVING)), fixed)
    assert found == pytest.approx(share, abs=1.01 / 31)
    shorter = scan(**FIXED | {"shape": (16, 15, 16), "spacing": (4.1, 3.1, 5.1), "degrees": (0, 0, 0)})
    found = transforms.folded(regseg.register(model, shorter, scan(**MOVING)), shorter)
    assert found == pytest.approx({0.25: 0.0, 0.5: 0.5}[share], abs=1.01 / 15)


# ── segmenting ─────────────────────────────────────────────────────────────────────────────────────────────────────


def blocks(places: np.ndarray, middle) -> np.ndarray:
    """Intensities of the background, of class 3 and within it of class 17, at places in mm."""
    away = np.abs(places - middle)
    return np.where((away < [6, 5, 7]).all(-1), 0.9, np.where((away < [12, 14, 13]).all(-1), 0.55, 0.1))


def numbers(values: np.ndarray) -> np.ndarray:
    return np.where(values > 0.7, 17, np.where(values > 0.4, 3, 0))


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("shape", [(16, 32, 16), (15, 31, 13), (14, 27, 16)])
def test_a_segmentation_on_the_frames_own_spacing_is_exact(shape, stored):
    noise = np.random.default_rng(3).choice([0.1, 0.55, 0.9], shape)
    volume = scan(shape, FRAME.spacing_mm, (10, -5, 20), stored=stored, array=noise)
    found = regseg.segment(model_of(FRAME), volume)
    assert found.dtype.kind == "i"
    np.testing.assert_array_equal(found, numbers(volume.array))


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("spacing", [(1.1, 2.3, 1.7), (5.0, 3.5, 2.0)])
def test_a_segmentation_lies_on_the_images_own_grid(spacing, stored):
    shape = tuple(np.ceil(np.array([56, 60, 64]) / spacing).astype(int))
    empty = scan(shape, spacing, (10, -5, 20), stored=stored)
    turned = places_of(empty.shape, empty.affine) - centre(empty)
    away = turned @ rotated((10, -5, 20)) - [3, -4, 2]  # off the middle, so that every mirror image differs
    image = Volume(blocks(away, (0, 0, 0)).astype(np.float32), empty.affine)
    found, truth = regseg.segment(model_of(FRAME), image), numbers(image.array)
    assert found.shape == empty.shape
    assert set(np.unique(found)) == {0, 3, 17}
    edges = [np.abs(np.abs(away) - size) for size in ([6, 5, 7], [12, 14, 13])]
    clear = np.all([(edge > 2.0 * np.maximum(FRAME.spacing_mm, spacing)).all(-1) for edge in edges], axis=0)
    deep = np.all([(edge > 1.01 * np.array(FRAME.spacing_mm)).all(-1) for edge in edges], axis=0)
    assert clear.any()
    np.testing.assert_array_equal(found[clear], truth[clear])
    assert (found[deep] == truth[deep]).mean() > 0.97
    assert dice(found > 0, truth > 0) > 0.85


def test_classes_may_have_any_numbers_in_any_order():
    array = np.random.default_rng(3).choice([0.1, 0.55, 0.9], FRAME.shape)
    volume = scan(FRAME.shape, FRAME.spacing_mm, array=array)
    found = regseg.segment(model_of(FRAME, classes={"far": 70000, "near": 2}), volume)
    np.testing.assert_array_equal(found, np.where(array > 0.7, 2, np.where(array > 0.4, 70000, 0)))


# ── scoring ────────────────────────────────────────────────────────────────────────────────────────────────────────


def drawn(volume: Volume) -> Volume:
    return Volume(numbers(volume.array).astype(np.uint16), volume.affine)


def pictured(shift=(0, 0, 0), stored="RAS") -> tuple[Volume, Volume]:
    """Blocks that were moved by so many steps of the frame, and their labels."""
    empty = scan(FRAME.shape, FRAME.spacing_mm)
    away = places_of(empty.shape, empty.affine) - centre(empty) - np.multiply(shift, FRAME.spacing_mm)
    image = scan(FRAME.shape, FRAME.spacing_mm, array=blocks(away, (0, 0, 0)), stored=stored)
    return image, drawn(image)


def test_a_registration_is_scored_by_the_labels_it_carries():
    fixed, moving = pictured(), pictured((1, 0, 2), stored="ILA")
    upright = pictured((1, 0, 2))[1].array
    right, wrong, none = (model_of(FRAME, shift) for shift in ((1.0, 0, 2), (-1.0, 0, -2), (0.0, 0, 0)))
    found = regseg_scores.score_registration(right, fixed, moving)
    assert (found.dice, found.mean, found.folded) == ({"ball": 1.0, "core": 1.0}, 1.0, 0.0)
    still = regseg_scores.score_registration(none, fixed, moving)
    for name, number in (("ball", 3), ("core", 17)):
        assert still.dice[name] == pytest.approx(dice(fixed[1].array == number, upright == number))
    assert still.mean == pytest.approx(np.mean(list(still.dice.values())))
    assert regseg_scores.score_registration(wrong, fixed, moving).mean < still.mean < 1
    known_map = regseg.register(right, fixed[0], moving[0])
    assert regseg_scores.score_registration(none, fixed, moving, known_map).mean == 1


def test_a_segmentation_is_scored_class_by_class():
    image, labels = pictured()
    assert regseg_scores.score_segmentation(model_of(FRAME), image, labels).dice == {"ball": 1.0, "core": 1.0}
    dull = regseg_scores.score_segmentation(model_of(FRAME, limits=(0.4, 2.0)), image, labels)  # core is taken for ball
    both = [np.count_nonzero(labels.array == number) for number in (3, 17)]
    assert dull.dice["ball"] == pytest.approx(2 * both[0] / (2 * both[0] + both[1]))
    assert dull.dice["core"] == 0


def test_the_scores_of_many_are_means_and_json():
    exams = {"a": pictured(), "b": pictured((1, 0, 0)), "c": pictured((0, 0, 1))}
    pairs, told = [("a", "b"), ("b", "a"), ("c", "a")], []
    model = model_of(FRAME, limits=(0.4, 2.0))
    found = regseg_scores.scores(model, exams, pairs, lambda *said: told.append(said))
    json.dumps(found, allow_nan=False)
    assert [said[:2] for said in told] == [(n, 6) for n in range(1, 7)]
    each = [regseg_scores.score_segmentation(model, *exams[name]) for name in "abc"]
    assert found["segmentation"]["mean"] == pytest.approx(np.mean([one.mean for one in each]))
    assert found["segmentation"]["classes"]["ball"] == pytest.approx(np.mean([one.dice["ball"] for one in each]))
    assert set(found["segmentation"]["exams"]) == {"a", "b", "c"}
    laid = [regseg_scores.score_registration(model, exams[fixed], exams[moving]) for moving, fixed in pairs]
    assert found["registration"]["mean"] == pytest.approx(np.mean([one.mean for one in laid]))
    assert found["registration"]["low"] <= found["registration"]["mean"] <= found["registration"]["high"]
    assert found["registration"]["folded"] == 0
    assert [(one["moving"], one["fixed"]) for one in found["registration"]["pairs"]] == pairs
    for one, score in zip(found["registration"]["pairs"], laid, strict=True):
        assert one["dice"] == pytest.approx(score.dice, abs=1e-4)


@pytest.mark.parametrize("pairs", [[], [("a", "a")]])
def test_the_scores_of_few_are_json_too(pairs):
    found = regseg_scores.scores(model_of(FRAME), {"a": pictured()}, pairs)
    json.dumps(found, allow_nan=False)
    assert found["segmentation"]["mean"] == 1
    assert len(found["registration"]["pairs"]) == len(pairs)


def test_a_class_that_nobody_holds_has_no_score():
    image, labels = pictured()
    halves = Volume(np.where(labels.array == 17, 0, labels.array).astype(np.uint16), labels.affine)
    exams = {name: (Volume(np.minimum(image.array, 0.6), image.affine), halves) for name in "ab"}
    exams["b"] = (exams["b"][0], Volume(0 * halves.array, halves.affine))
    found = regseg_scores.scores(model_of(FRAME), exams, [("a", "a"), ("a", "b")])
    json.dumps(found, allow_nan=False)
    assert found["segmentation"]["exams"]["a"]["core"] is None
    assert found["segmentation"]["classes"]["core"] is None
    assert found["segmentation"]["classes"]["ball"] == pytest.approx(found["segmentation"]["mean"])
    nothing = {"a": (Volume(np.minimum(image.array, 0.3), image.affine), Volume(0 * halves.array, halves.affine))}
    json.dumps(regseg_scores.scores(model_of(FRAME), nothing, [("a", "a")]), allow_nan=False)


def test_random_pairs_are_different_exams_and_no_pair_comes_twice():
    names = list("abcde")
    every = regseg_scores.random_pairs(names, 1000)
    assert len(every) == len(set(every)) == 20
    assert all(moving != fixed for moving, fixed in every)
    some = regseg_scores.random_pairs(names, 7, seed=1)
    assert len(set(some)) == 7
    assert some == regseg_scores.random_pairs(names, 7, seed=1) != regseg_scores.random_pairs(names, 7, seed=2)
    with pytest.raises(ExamError, match="at least 2"):
        regseg_scores.random_pairs(["a"], 3)


def test_pairs_are_read_by_the_names_of_the_columns(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("fixed,moving,why\na,b,because\nc,a,\n")
    assert regseg_scores.read_pairs(path) == [("b", "a"), ("a", "c")]


@pytest.mark.parametrize("text", ["one,two\na,b\n", "a,b\nc,d\n", "moving,fixed\na\n", "moving\na\n", "", "one,two\n"])
def test_a_table_that_is_none_of_pairs_is_refused(tmp_path, text):
    path = tmp_path / "pairs.csv"
    path.write_text(text)
    with pytest.raises(ExamError, match="moving,fixed"):
        regseg_scores.read_pairs(path)
    with pytest.raises(ExamError, match="moving,fixed"):
        regseg_scores.read_pairs(tmp_path / "none.csv")


# ── training ───────────────────────────────────────────────────────────────────────────────────────────────────────

CLASSES = {"ball": 3, "core": 17}
CUBE = Frame((16, 16, 16), (2.0, 2.0, 2.0), "0:1")
STILL = Augmentation(scale=0.0, rotation=0.0, translation=0.0, cut=0.0, tone=0.0)
PAPER = RegSeg(carried=0.3, lent=0.0)
NO_STEPS = replace(PAPER, registration=0, segmentation=0, semi=0, guided=0, joint=0, batch=1)


def phantom(middle, radius: float = 5.0) -> tuple[Volume, Volume]:
    """A soft bright ball, voxels from the middle, with a core; and its labels."""
    away = np.linalg.norm(np.moveaxis(np.indices((16, 16, 16)), 0, -1) - 7.5 - middle, axis=-1)
    labels = np.where(away < radius / 2, 17, np.where(away < radius, 3, 0)).astype(np.uint8)
    affine = np.diag([2.0, 2, 2, 1])
    return Volume(np.exp(-((away / radius) ** 2)).astype(np.float32), affine), Volume(labels, affine)


def cohort(labelled=(0, 2), count: int = 4) -> common_grid.Cases:
    middles = np.random.default_rng(0).uniform(-2, 2, (count, 3))
    phantoms = {f"case{n}": phantom(middle) for n, middle in enumerate(middles)}
    labels = {name: pair[1] for n, (name, pair) in enumerate(phantoms.items()) if n in labelled}
    return common_grid.cases_of({name: pair[0] for name, pair in phantoms.items()}, labels, CUBE, (3, 17))


@pytest.fixture(scope="module")
def cases() -> common_grid.Cases:
    return cohort()


def weights(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: values.clone() for name, values in network.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(values, other[name]) for name, values in one.items())


@pytest.mark.parametrize(
    ("steps", "moves"),
    [
        ({"registration": 1}, (True, False)),
        ({"segmentation": 1}, (False, True)),
        ({"semi": 1}, (False, True)),
        ({"guided": 1}, (True, False)),
        ({"joint": 2, "ratio": 3}, (True, False)),
        ({"joint": 1, "ratio": 1}, (True, True)),
    ],
)
def test_a_stage_moves_its_own_network_and_leaves_the_other_to_the_bit(cases, steps, moves):
    settings = replace(NO_STEPS, seed=5, **steps)
    start = [weights(network) for network in regseg.networks_for(2, seed=5)]
    model = regseg.train(cases, CUBE, CLASSES, settings)
    assert tuple(not same(weights(net), before) for net, before in zip(model.networks, start, strict=True)) == moves
    assert (model.frame, model.classes) == (CUBE, CLASSES)
    assert not any(network.training for network in model.networks)


def test_stages_come_in_order_and_the_alternation_takes_one_step_of_segmentation_for_many(cases, monkeypatch):
    asked, told = [], []
    for name in ("registration_terms", "segmentation_terms"):
        original = getattr(regseg, name)
        monkeypatch.setattr(
            regseg, name, lambda *given, name=name, original=original: (asked.append(name[0]), original(*given))[1]
        )
    settings = replace(NO_STEPS, registration=1, segmentation=1, semi=1, guided=1, joint=5, ratio=2)
    regseg.train(cases, CUBE, CLASSES, settings, on_progress=told.append)
    assert "".join(asked) == "r" + "s" + "ss" + "r" + "rrssrrssr"  # beside a pair always a labelled image alone
    assert [at.stage for at in told] == ["registration", "segmentation", "semi", "guided", "joint"]
    assert (told[-1].done, told[-1].total) == (9, 9)
    assert all(np.isfinite(at.terms["loss"]) for at in told)


def test_each_stage_is_taught_by_its_own_terms(monkeypatch):
    seen = []
    for name in ("registration_terms", "segmentation_terms"):
        original = getattr(regseg, name)
        monkeypatch.setattr(
            regseg, name, lambda *given, original=original: (seen.append(given[1:]), original(*given))[1]
        )
    settings = replace(NO_STEPS, registration=1, segmentation=1, semi=2, guided=1, joint=1, ratio=1)
    regseg.train(cohort((2,)), CUBE, CLASSES, settings)
    assert [weights.anatomy for _, _, weights in seen] == [0, 0, *(8 * [settings.anatomy])]
    has = [(moving.labelled.item(), target.labelled.item()) for moving, target, _ in seen]
    for step in (1, 2, 4, 8):  # alone, and beside every pair: the labelled image itself
        assert has[step] == (True, True)
    for step in (3, 5, 9):  # with the registration: one image has labels and the other has none
        assert sorted(has[step]) == [False, True]
    for step in (0, 6, 7):
        assert not torch.equal(seen[step][0].image, seen[step][1].image)


def test_the_rate_of_a_stage_rises_then_falls_along_a_cosine_and_gradients_are_cut(cases):
    settings = replace(NO_STEPS, registration=40, rate=0.01, warm_up=5, clip=1e-3)
    run = Run(cases, CUBE, settings, None)
    ((_, _, step_of),) = run.stages()
    rates = []
    for step in (0, 20, 39):
        step_of(0, step)
        rates.append(run.optimisers[0].param_groups[0]["lr"])
        gradient = torch.stack([part.norm() for part in gradients(run.networks.registration)]).norm()
        assert float(gradient) == pytest.approx(1e-3, rel=0.01)
    assert rates[0] == pytest.approx(0.002)
    assert rates[1] == pytest.approx(0.01 * (0.1 + 0.9 / 2))
    assert rates[2] == pytest.approx(0.001, rel=0.02)


def test_a_training_goes_on_from_networks_that_are_there(cases):
    start = learning(7)
    before = [weights(network) for network in start]
    model = regseg.train(cases, CUBE, CLASSES, replace(NO_STEPS, registration=1, rate=1e-4), start=start)
    assert same(weights(model.networks.segmentation), before[1])
    for name, values in model.networks.registration.state_dict().items():
        torch.testing.assert_close(values, before[0][name], atol=1.1e-4, rtol=0)  # Adam's first step
    assert not same(weights(model.networks.registration), before[0])


def test_labels_are_moved_with_their_images(cases):
    wild = Augmentation(scale=0.2, rotation=0.4, translation=0.2, cut=0.0, tone=0.0)
    cases = cases._replace(image=(cases.labels[:, None] / 2).float())  # the image says what the label is
    run = Run(cases, CUBE, replace(NO_STEPS, augmentation=wild, bend=0.05), None)
    seen = run.view([0, 2, 0], run.chance(0, 0))
    assert seen.labelled.tolist() == [True, True, True]
    torch.testing.assert_close(seen.labels.sum(dim=1), torch.ones(3, *SMALL), atol=1e-5, rtol=0)
    said = (seen.labels[:, 1:2] + 2 * seen.labels[:, 2:3]) / 2
    torch.testing.assert_close(seen.image, said * seen.inside, atol=1e-5, rtol=0)
    assert 0.1 < seen.inside.float().mean() < 0.99  # the edge of the image came into view
    assert not torch.equal(seen.image[0], seen.image[2])
    again, other = (run.view([0, 2, 0], run.chance(0, step)) for step in (0, 1))
    assert torch.equal(again.image, seen.image)
    assert not torch.equal(other.image, seen.image)


def test_without_augmentation_a_view_is_the_case(cases):
    run = Run(cases, CUBE, replace(NO_STEPS, augmentation=STILL, bend=0.0), None)
    seen = run.view([3, 2], run.chance(1, 1))
    torch.testing.assert_close(seen.image, cases.image[[3, 2]], atol=1e-5, rtol=0)
    assert seen.labelled.tolist() == [False, True]
    assert torch.equal(seen.labels.argmax(dim=1), cases.labels[[3, 2]].long())


def test_a_turn_is_one_of_the_patient_where_voxels_are_no_cubes():
    spacing = (1.0, 1.5, 6.0)
    turned = replace(NO_STEPS, augmentation=replace(STILL, rotation=0.15), bend=0.0)
    where = Run(cohort(), Frame(SMALL, spacing, "0:1"), turned, None).where(1, augment.keyed(0))
    half_mm = (np.array(SMALL) - 1) / 2 * spacing
    index = np.moveaxis(where[0].numpy(), 0, -1).astype(float) * half_mm
    step_mm = np.stack([np.gradient(index, mm, axis=axis)[8, 8, 8] for axis, mm in enumerate(spacing)], axis=-1)
    np.testing.assert_allclose(step_mm.T @ step_mm, np.eye(3), atol=1e-4)
    assert np.abs(step_mm - np.eye(3)).max() > 0.02


def test_a_lent_view_is_a_labelled_image_in_the_shape_and_tone_of_another():
    """Case 1 is case 0 moved by whole voxels and brighter; only case 0 has labels, and R knows the move."""
    image = smooth(3, 1, SMALL, nodes=8) * 0.6 + 0.1
    labels = (image[:, 0] > 0.35).to(torch.uint8) + (image[:, 0] > 0.45)
    images = torch.cat([image, torch.from_numpy(rolled(image))[None].float() + 0.2])
    inside = torch.zeros_like(images, dtype=torch.bool)
    inside[0], inside[1, :, 1:-1, :, 3:] = True, True
    both = torch.cat([labels, torch.zeros_like(labels)])
    cases = common_grid.Cases(["a", "b"], images, inside, both, torch.tensor([True, False]), 2)
    run = Run(cases, CUBE, replace(NO_STEPS, augmentation=STILL, bend=0.0), None)
    run.networks = answering(WHOLE)
    seen = run.lent(run.chance(0, 0))
    assert seen.labelled.tolist() == [True]
    deep = (slice(2, -2), slice(2, -2), slice(4, -2))
    torch.testing.assert_close(seen.image[0, 0][deep], images[1, 0][deep], atol=1e-3, rtol=0)
    assert torch.equal(seen.labels.argmax(dim=1)[0][deep], torch.from_numpy(rolled(labels[None]))[0].long()[deep])
    assert seen.inside[0, 0][deep].all()
    assert not seen.inside[0, 0, -1:].any()  # x + 1 is beyond the labelled image
    assert not seen.inside[0, 0, :, :, :2].any()  # and so is k − 2


def test_lent_views_are_drawn_as_freely_as_others_and_from_all_images():
    run = numbered((2,))
    run.networks = answering(torch.zeros(3))
    drawn = [which(run.lent(run.chance(0, step))) for step in range(30)]
    assert {case for one in drawn for case in one} == {0, 1, 3}  # in the tone of the others
    wild = Run(cohort((2,)), CUBE, replace(NO_STEPS, batch=2), None)
    one, again, other = (wild.lent(wild.chance(0, step)) for step in (0, 0, 1))
    assert torch.equal(one.image, again.image)
    assert not torch.equal(one.image, other.image)
    assert not torch.equal(one.labels[0], one.labels[1])


def test_lent_views_teach_in_place_of_others_where_the_registration_is_held(monkeypatch):
    seen, lent = [], []
    terms, lend = regseg.segmentation_terms, Run.lent
    monkeypatch.setattr(regseg, "segmentation_terms", lambda *given: (seen.append(given[1:3]), terms(*given))[1])
    monkeypatch.setattr(Run, "lent", lambda run, chance: (lent.append(lend(run, chance)), lent[-1])[1])
    settings = replace(NO_STEPS, segmentation=1, semi=2, joint=1, ratio=1, carried=0.0, lent=1.0)
    regseg.train(cohort((2,)), CUBE, CLASSES, settings)
    assert len(lent) == 3  # not where the segmentation is alone
    assert all(moving is target and target is view for (moving, target), view in zip(seen[1:], lent, strict=True))
    assert all(view.labelled.all() for view in lent)
    seen.clear(), lent.clear()
    regseg.train(cohort((0, 2)), CUBE, CLASSES, replace(settings, semi=30, joint=0))
    assert 5 < len(lent) < 25  # of 30: half where several have labels
    seen.clear(), lent.clear()
    regseg.train(cohort((2,)), CUBE, CLASSES, replace(settings, carried=0.3))
    assert len(seen) == 1 + 2 * 3  # carried labels teach beside them


def test_pairs_that_were_laid_are_kept_until_the_registration_learns(monkeypatch):
    asked = []
    forward = regseg.RegistrationNetwork.forward
    monkeypatch.setattr(
        regseg.RegistrationNetwork, "forward", lambda self, *given: (asked.append(1), forward(self, *given))[1]
    )
    run = Run(cohort((2,)), CUBE, NO_STEPS, learning())
    first = run.laid(2, 0)
    assert torch.equal(run.laid(2, 0), first)
    assert not torch.equal(run.laid(2, 1), first)
    assert len(asked) == 2
    run.segmentation_step(run.settings, 0, 0)
    assert torch.equal(run.laid(2, 0), first)
    run.registration_step(run.settings, 0, 0)
    assert not torch.equal(run.laid(2, 0), first)
    run.kept.clear()
    monkeypatch.setattr(regseg, "KEPT_BYTES", 1.5 * first.nbytes)
    run.laid(2, 0), run.laid(2, 1)
    assert set(run.kept) == {(2, 0)}


def numbered(labelled: tuple[int, ...]) -> Run:
    """A run whose images say which case they are."""
    cases = cohort(labelled)
    cases = cases._replace(image=torch.ones_like(cases.image) * torch.arange(4).view(4, 1, 1, 1, 1) / 10 + 0.1)
    return Run(cases, CUBE, replace(NO_STEPS, augmentation=STILL, bend=0.0, batch=2), None)


def which(seen: View) -> list[int]:
    return (10 * seen.image[:, 0, 8, 8, 8] - 1).round().int().tolist()


def test_pairs_are_of_different_images_and_all_of_them_come():
    run = numbered((0, 2))
    pairs = [pair for step in range(40) for pair in zip(*(which(seen) for seen in run.pair(0, step)), strict=True)]
    assert all(moving != target for moving, target in pairs)
    assert len(set(pairs)) == 12


@pytest.mark.parametrize("labelled", [(2,), (0, 2), (0, 1, 2, 3)])
def test_pairs_for_the_segmentation_have_labels_on_a_side_that_changes(labelled):
    run = numbered(labelled)
    views = [run.half_labelled(run.chance(0, step, 1)) for step in range(60)]
    assert all((moving.labelled | target.labelled).all() for moving, target in views)
    if len(labelled) == 1:
        assert all(which(moving) != which(target) for moving, target in views)
        share = np.mean([moving.labelled.all().item() for moving, _ in views])
        assert 0.3 < share < 0.7
    seen = {case for pair in views for one in pair for case in which(one)}
    assert seen == {0, 1, 2, 3}


def test_where_labels_are_missing_the_segmentation_learns_through_the_registration():
    settings = RegSeg(segmentation=70)
    for labelled in ((1,), (0, 1)):
        assert regseg.schedule(cohort(labelled), settings) == replace(settings, semi=70, segmentation=0)
    assert regseg.schedule(cohort((0, 1, 2, 3)), settings) == settings
    asked = replace(settings, semi=9)
    assert regseg.schedule(cohort((1,)), asked) == asked


@pytest.mark.parametrize("stage", ["segmentation", "semi", "joint"])
def test_a_stage_that_needs_labels_refuses_to_go_without(stage, tmp_path):
    with pytest.raises(LabelError, match="labelled image"):
        regseg.train(cohort(()), CUBE, CLASSES, replace(NO_STEPS, **{stage: 1}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_registration_needs_no_labels_but_two_images(tmp_path):
    settings = replace(NO_STEPS, registration=1)
    model = regseg.train(cohort(()), CUBE, CLASSES, settings, tmp_path / "out")
    assert (tmp_path / "out" / "model.json").exists()
    assert np.isfinite(regseg.register(model, phantom(0)[0], phantom(1)[0]).shift_mm).all()
    with pytest.raises(ExamError, match="at least 2 images"):
        regseg.train(cohort((0,), 1), CUBE, CLASSES, settings)


class StoppedError(Exception):
    """Somebody pulled the plug."""


STAGES = replace(
    NO_STEPS, registration=2, segmentation=1, semi=2, guided=1, joint=3, ratio=2, checkpoint_minutes=0.0, seed=3
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "model"
    regseg.train(cohort(), CUBE, CLASSES, STAGES, folder)
    return folder


def stopped(folder: Path, stage: str, step: int, monkeypatch, cases: common_grid.Cases | None = None) -> None:
    """Begin a training and stop it after a step: what was kept last is the state before it."""
    monkeypatch.setattr(loop, "LOG_EVERY", 1)

    def pull(at):
        if (at.stage, at.step) == (stage, step):
            raise StoppedError

    with pytest.raises(StoppedError):
        regseg.train(cases or cohort(), CUBE, CLASSES, STAGES, folder, on_progress=pull)
    assert not (folder / "model.json").exists()


@pytest.mark.parametrize(
    ("stage", "step"), [("registration", 2), ("segmentation", 1), ("semi", 2), ("joint", 1), ("joint", 3)]
)
def test_a_stopped_training_goes_on_to_the_bit(uninterrupted, tmp_path, monkeypatch, stage, step):
    whole, told = regseg.load(uninterrupted), []
    stopped(tmp_path / "model", stage, step, monkeypatch)
    left = tmp_path / "model" / "training" / "state-0-1.safetensors.4711.part"
    left.touch()  # killed while it was written
    model = regseg.train(
        cohort(), CUBE, CLASSES, STAGES, tmp_path / "model", resume=True, on_progress=lambda at: told.append(at)
    )
    assert (told[0].stage, told[0].step) == (stage, step)  # it went on, and did not begin anew
    assert not left.exists()
    for network, other, stored in zip(
        model.networks, whole.networks, regseg.load(tmp_path / "model").networks, strict=True
    ):
        assert same(weights(network), weights(other))
        assert same(weights(network), weights(stored))


def test_the_log_of_a_resumed_training_holds_every_step_once(tmp_path, monkeypatch):
    log = tmp_path / "model" / "training" / "log.csv"

    def rows() -> list[list[str]]:
        return [line.split(",")[:3] for line in log.read_text().splitlines()[1:]]

    stopped(tmp_path / "model", "joint", 3, monkeypatch)  # logged, and not kept
    head, *kept = (line.split(",") for line in log.read_text().splitlines())
    later = [[stage, step, str(float(seconds) + 700), *rest] for stage, step, seconds, *rest in kept]
    text = "\n".join(",".join(line) for line in (head, *later))
    log.write_text(text + "\njoint,3,70")  # killed within a line
    regseg.train(cohort(), CUBE, CLASSES, STAGES, tmp_path / "model", resume=True)
    steps = {"registration": 2, "segmentation": 1, "semi": 2, "guided": 1, "joint": 3}
    assert [row[:2] for row in rows()] == [[stage, str(n + 1)] for stage, count in steps.items() for n in range(count)]
    seconds = [float(row[2]) for row in rows()]
    assert seconds == sorted(seconds)
    assert seconds[-1] >= 700


def test_a_finished_training_may_be_resumed_and_stays(uninterrupted):
    before = (uninterrupted / "weights.safetensors").read_bytes()
    told = []
    regseg.train(cohort(), CUBE, CLASSES, STAGES, uninterrupted, resume=True, on_progress=told.append)
    assert not told
    assert (uninterrupted / "weights.safetensors").read_bytes() == before


def test_a_training_is_resumed_as_what_it_was_begun(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    stopped(folder, "segmentation", 1, monkeypatch)
    kept = {path.name: path.read_bytes() for path in (folder / "training").iterdir()}
    given = {"cases": cohort(), "frame": CUBE, "classes": CLASSES, "settings": STAGES}
    others = {
        "another seed": {"settings": replace(STAGES, seed=4)},
        "more steps": {"settings": replace(STAGES, joint=4)},
        "another augmentation": {"settings": replace(STAGES, augmentation=STILL)},
        "other labels": {"cases": cohort((0, 1))},
        "other images": {"cases": cohort((0, 2), 5)},
        "other names": {"cases": cohort()._replace(names=list("abcd"))},
        "brighter images": {"cases": cohort()._replace(image=cohort().image + 0.1)},
        "labels elsewhere": {"cases": cohort()._replace(labels=cohort().labels.flip(1))},
        "images on a template": {"laid": common_grid.Template(cohort().image[:1], cohort().inside[:1])},
        "another frame": {"frame": replace(CUBE, scaling="0:2")},
        "other classes": {"classes": {"ball": 3, "core": 18}},
    }
    for what, other in others.items():
        with pytest.raises(ModelError, match="resume with the same"):
            regseg.train(**given | other, out=folder, resume=True)
        assert {path.name: path.read_bytes() for path in (folder / "training").iterdir()} == kept, what


def test_folders_that_are_taken_or_hold_nothing_to_resume_are_refused(uninterrupted, tmp_path, monkeypatch):
    given = (cohort(), CUBE, CLASSES, STAGES)
    with pytest.raises(ModelError, match="nothing to resume"):
        regseg.train(*given, tmp_path / "new", resume=True)
    before = (uninterrupted / "weights.safetensors").read_bytes()
    with pytest.raises(ModelError, match="already holds"):
        regseg.train(*given, uninterrupted)
    assert (uninterrupted / "weights.safetensors").read_bytes() == before
    stopped(tmp_path / "half", "registration", 2, monkeypatch)
    with pytest.raises(ModelError, match="--resume"):
        regseg.train(*given, tmp_path / "half")


def test_a_state_that_was_damaged_is_refused(tmp_path, monkeypatch):
    stopped(tmp_path / "model", "registration", 2, monkeypatch)
    state = tmp_path / "model" / "training" / "state.json"
    text = state.read_text()
    for broken in (text[: len(text) // 2], "[]", "{}"):
        state.write_text(broken)
        with pytest.raises(ModelError):
            regseg.train(cohort(), CUBE, CLASSES, STAGES, tmp_path / "model", resume=True)


def test_a_registration_of_balls_that_moved_is_learned():
    pair = {"left": phantom((-2, 0, 1), 3.5), "right": phantom((2, 0, -1))}
    cases = common_grid.cases_of({n: p[0] for n, p in pair.items()}, {n: p[1] for n, p in pair.items()}, CUBE, (3, 17))
    settings = replace(NO_STEPS, registration=80, warm_up=1, batch=2, bending=0.05, augmentation=STILL, bend=0.0)
    told = []
    model = regseg.train(cases, CUBE, CLASSES, settings, on_progress=told.append)
    assert len(told) == 4
    assert told[-1].terms["loss"] < 0.5 * told[0].terms["loss"]
    fresh = Model(regseg.networks_for(2), CUBE, CLASSES)
    before, after = (
        np.mean(
            [
                regseg_scores.score_registration(one, *two).mean
                for two in (tuple(pair.values()), tuple(pair.values())[::-1])
            ]
        )
        for one in (fresh, model)
    )
    assert after > before + 0.1


# ── on disk ────────────────────────────────────────────────────────────────────────────────────────────────────────

HARD = Frame((16, 32, 48), (0.703125, 1.2, 3.000001), "-256:256")


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> tuple[Model, Path]:
    model = Model(learning(), HARD, {"zeta": 17, "alpha": 3}, "made")
    folder = tmp_path_factory.mktemp("stored") / "made"
    regseg.save(model, folder)
    return model, folder


def test_a_model_comes_back_to_the_bit(stored):
    model, folder = stored
    again = regseg.load(folder)
    assert (again.frame, again.name) == (HARD, "made")
    assert list(again.classes.items()) == [("zeta", 17), ("alpha", 3)]
    for network, other in zip(model.networks, again.networks, strict=True):
        assert same(weights(network), weights(other))
        assert not other.training
        assert not any(p.requires_grad for p in other.parameters())


def test_half_precision_is_near_and_half_as_large(stored, tmp_path):
    model, folder = stored
    regseg.save(model, tmp_path / "half", half=True)
    for network, other in zip(model.networks, regseg.load(tmp_path / "half").networks, strict=True):
        for name, values in other.state_dict().items():
            assert values.dtype == torch.float32
            torch.testing.assert_close(values, network.state_dict()[name], rtol=1e-3, atol=1e-6)
        assert not same(weights(network), weights(other))
    sizes = [(one / "weights.safetensors").stat().st_size for one in (folder, tmp_path / "half")]
    assert 0.45 < sizes[1] / sizes[0] < 0.6


def test_loading_a_model_leaves_the_worlds_chance_alone(stored):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    regseg.load(stored[1])
    assert torch.equal(torch.rand(3), expected)


def test_the_two_kinds_of_models_are_not_taken_for_each_other(stored):
    with pytest.raises(ModelError, match=r"deepatlas-regseg") as refusal:
        checkpoint.load(stored[1])
    assert "expected format" in str(refusal.value)
    with pytest.raises(ModelError, match=r"expected format 'deepatlas-regseg', got '(?!deepatlas-regseg)"):
        regseg.load(SHIPPED)


def changed(about: dict, **changes) -> str:
    return json.dumps(about | changes)


DAMAGES = {
    "not JSON": lambda about: "{",
    "a list": lambda about: "[]",
    "another version": lambda about: changed(about, version=99),
    "no frame": lambda about: changed(about, frame=None),
    "a frame without a spacing": lambda about: changed(about, frame={"shape": [16, 16, 16], "scaling": "0:1"}),
    "a flat frame": lambda about: changed(about, frame=about["frame"] | {"shape": [16, 16]}),
    "a frame that cannot be halved": lambda about: changed(about, frame=about["frame"] | {"shape": [16, 15, 16]}),
    "no pass": lambda about: changed(about, passes=0),
    "an empty frame": lambda about: changed(about, frame=about["frame"] | {"shape": [16, 0, 16]}),
    "a frame without steps": lambda about: changed(about, frame=about["frame"] | {"spacing_mm": [1, 0, 1]}),
    "no structures": lambda about: changed(about, structures=None),
    "names without numbers": lambda about: changed(about, structures=["ball", "core"]),
    "a structure without a number": lambda about: changed(about, structures=[{"name": "a"}, about["structures"][1]]),
    "a number that is none": lambda about: changed(
        about, structures=[{"name": "a", "label": None}, about["structures"][1]]
    ),
    "one structure more": lambda about: changed(about, structures=[*about["structures"], {"name": "b", "label": 4}]),
    "a structure twice": lambda about: changed(about, structures=2 * about["structures"][:1]),
    "an empty list": lambda about: changed(about, structures=[]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_description_is_refused(stored, tmp_path, damage):
    regseg.save(stored[0], tmp_path / "model")
    path = tmp_path / "model" / "model.json"
    path.write_text(DAMAGES[damage](json.loads(path.read_text())))
    with pytest.raises(ModelError):
        regseg.load(tmp_path / "model")


def test_damaged_and_missing_weights_are_refused(stored, tmp_path):
    regseg.save(stored[0], tmp_path / "model")
    path = tmp_path / "model" / "weights.safetensors"
    whole = path.read_bytes()
    for broken in (whole[:1000], whole[:-5], b"", b"\xff" * 64):
        path.write_bytes(broken)
        with pytest.raises(ModelError):
            regseg.load(tmp_path / "model")
    path.unlink()
    with pytest.raises(ModelError, match="missing"):
        regseg.load(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"model\.json"):
        regseg.load(tmp_path / "empty")


def test_a_loaded_model_answers_as_before(stored):
    model = regseg.train(cohort(), CUBE, CLASSES, replace(NO_STEPS, registration=1, segmentation=1))
    image, other = phantom((1, -2, 0))[0], phantom((-1, 0, 2))[0]
    folder = stored[1].parent / "again"
    regseg.save(model, folder)
    again = regseg.load(folder)
    assert np.array_equal(regseg.segment(again, image), regseg.segment(model, image))
    one, two = (regseg.register(each, image, other) for each in (model, again))
    assert np.array_equal(one.shift_mm, two.shift_mm)


# Laid onto a template


def test_a_registration_begins_where_the_template_lays_both_images():
    shape, parts = (32, 32, 16), [off_middle(number, offset) for number, offset in enumerate(OFFSETS[:2])]
    fixed, moving = (Volume(part.image, np.diag([2.0, 1.5, 3.0, 1.0])) for part in parts)
    template = common_grid.Template(
        torch.from_numpy(parts[0].image)[None, None], torch.from_numpy(parts[0].inside)[None, None]
    )
    model = Model(regseg.networks_for(1), Frame(shape, (2.0, 1.5, 3.0)), {"blob": 1}, laid=template)
    found = regseg.register(model, fixed, moving)
    inner = places_of(shape, fixed.affine).reshape(-1, 3)[[500, 4000, 9000]]
    shift = np.array(OFFSETS[1]) * [2.0, 1.5, 3.0]
    np.testing.assert_allclose(found.points(inner), inner + shift, atol=1e-2)  # the fresh network's u is next to 0


def test_a_template_is_kept_with_the_model(tmp_path):
    part = off_middle(3, (1, 2, 0))
    template = common_grid.Template(torch.from_numpy(part.image)[None, None], torch.from_numpy(part.inside)[None, None])
    model = Model(regseg.networks_for(1), Frame((32, 32, 16), (1.0,) * 3), {"blob": 1}, laid=template)
    regseg.save(model, tmp_path / "model")
    read = regseg.load(tmp_path / "model").laid
    assert read.image.equal(template.image)
    assert read.inside.equal(template.inside)
    regseg.save(replace(model, laid=None), tmp_path / "plain")
    assert regseg.load(tmp_path / "plain").laid is None
