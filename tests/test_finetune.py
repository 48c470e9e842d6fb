"""Supervised fine-tuning: what it learns, what it leaves alone, and that a stopped training goes on to the bit."""

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from deepatlas import affine, augment, checkpoint, finetune, grid, masks, prepare, segmentation, store
from deepatlas.autoencoder import Autoencoder
from deepatlas.checkpoint import Model
from deepatlas.config import Augmentation, FineTuning, NetworkConfig
from deepatlas.embedding import embed
from deepatlas.errors import CohortError, ModelError, StructureError
from deepatlas.files import read_exam, read_labels
from deepatlas.locate import define
from deepatlas.masks import LabelMaps
from deepatlas.networks import CoordinateNetwork
from deepatlas.volume import apply
from exact import dice

SIZE = 16
NAMES = {"ball": 5, "cube": 9}
SETTINGS = FineTuning(
    steps=100,
    rate=0.01,
    warm_up=5,
    astray=0.0,
    bend=0.0,
    augmentation=Augmentation(scale=0.0, rotation=0.0, translation=0.0, cut=0.0, tone=0.0),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four bodies with a bright ball and a dark cube, each in a place of its own, that only the image tells; one lacks
    the cube, one has no label map."""
    where = tmp_path_factory.mktemp("exams")
    (where / "images").mkdir()
    (where / "labels").mkdir()
    affine = np.diag([-10.0, 10.0, 10.0, 1.0])
    affine[:3, 3] = (75, -75, -75)
    places = apply(affine, np.moveaxis(np.indices((16, 16, 16)), 0, -1))
    for number, name in enumerate("abcd"):
        ball = np.linalg.norm(places - [25, 20 * number - 30, 10], axis=-1) < 26
        cube = (np.abs(places - [-30, 30 - 20 * number, -10]) < 21).all(axis=-1) & (name != "b")
        hu = np.where((np.abs(places) < 72).all(axis=-1), 20, -1000) + 180 * ball - 120 * cube
        nib.Nifti1Image(hu.astype(np.int16), affine).to_filename(where / "images" / f"{name}.nii.gz")
        if name != "d":
            labels = np.where(ball, 5, np.where(cube, 9, 0)).astype(np.int16)
            nib.Nifti1Image(labels, affine).to_filename(where / "labels" / f"{name}.nii.gz")
    store.build(where / "images", where / "cohort.h5", SIZE, "exam", workers=0)
    torch.manual_seed(0)
    blank = Model(
        network=CoordinateNetwork(NetworkConfig(size=SIZE, widths=(8, 16), head_channels=8, groups=4)),
        autoencoder=Autoencoder(),
        atlas=torch.zeros(1, 1, 8, 8, 8),
        seed_box_to_mm=torch.diag(torch.tensor([75.0, 75.0, 75.0, 1.0], dtype=torch.float64)),
        region="exam",
        level=0,
        seed_exam="a",
        structures={},
    )
    exams = [
        (read_exam(where / "images" / f"{n}.nii.gz"), read_labels(where / "labels" / f"{n}.nii.gz")) for n in "abc"
    ]
    checkpoint.save(define(blank, exams, NAMES), where / "model")
    return where


@pytest.fixture(scope="module")
def labels(folder) -> LabelMaps:
    return masks.read(folder / "cohort.h5", folder / "labels", NAMES)


@pytest.fixture(scope="module")
def tuned(folder, labels) -> Path:
    """The folder of a training that was never stopped."""
    run(folder, folder / "tuned", labels)
    return folder / "tuned"


def run(folder: Path, out: Path, labels: LabelMaps, settings: FineTuning = SETTINGS, **how) -> Model:
    return finetune.finetune(folder / "cohort.h5", out, folder / "model", labels, settings, **how)


def test_a_structure_is_drawn_where_the_image_shows_it(folder, labels, tuned):
    model = checkpoint.load(tuned)
    for number, name in enumerate("abc"):
        exam = read_exam(folder / "images" / f"{name}.nii.gz")
        likely = segmentation.probabilities(model, exam, embed(model, exam))[0]
        for channel in range(2):
            drawn = labels.maps[number] == channel + 1
            if drawn.any():
                assert dice(likely[channel] > 0.5, drawn) > 0.85


def test_the_map_and_the_library_stay_as_they_are(folder, tuned):
    for name in ("weights.safetensors", "structures.safetensors"):
        assert (tuned / name).read_bytes() == (folder / "model" / name).read_bytes()
    assert checkpoint.load(tuned).segmented == {"ball": 0, "cube": 1}
    assert checkpoint.load(folder / "model").head is None


def test_a_head_starts_from_the_backbone_of_the_map_and_every_layer_learns(folder, labels):
    data = finetune.load_cohort(folder / "cohort.h5", finetune.Preset("x", NetworkConfig(size=SIZE)), "cpu", labels)
    base = checkpoint.load(folder / "model")
    begun = finetune.Run(data, base, SETTINGS)
    backbone = {name: value.clone() for name, value in begun.network.backbone.state_dict().items()}
    for name, value in base.network.backbone.state_dict().items():
        assert torch.equal(backbone[name], value)
    for step in range(3):
        begun.step(step)
    still = [name for name, value in begun.network.backbone.state_dict().items() if torch.equal(value, backbone[name])]
    assert not still
    assert begun.drawn == [0, 1, 2]  # the exam without a label map takes no part


def test_a_head_is_trained_on(folder, labels, tuned, tmp_path):
    data = finetune.load_cohort(folder / "cohort.h5", finetune.Preset("x", NetworkConfig(size=SIZE)), "cpu", labels)
    base = checkpoint.load(tuned)
    begun = finetune.Run(data, base, SETTINGS).network.state_dict()
    for name, value in base.head.state_dict().items():
        assert torch.equal(begun[name], value)
    with pytest.raises(ModelError, match="width 16"):
        finetune.Run(data, base, replace(SETTINGS, width=8))
    swapped = data._replace(labels=replace(labels, names=labels.names[::-1]))
    with pytest.raises(ModelError, match="ball, cube"):
        finetune.Run(swapped, base, SETTINGS)


def test_on_crops_the_odds_are_those_of_the_model_above(folder, labels):
    """It did not learn from these labels, so it is as sure on these exams as on others."""
    data = finetune.load_cohort(folder / "cohort.h5", finetune.Preset("x", NetworkConfig(size=SIZE)), "cpu", labels)
    whole = 0.9 * grid.identity((33,) * 3)  # face to face of the cube
    crops = data._replace(start=torch.cat([whole + 0.01 * exam for exam in range(len(data.names))]))
    run = finetune.Run(crops, checkpoint.load(folder / "model"), SETTINGS)
    for exam in run.drawn:
        expected = 0.9 * (SIZE - 1) / SIZE * grid.identity(tuple(run.c_atlas[exam].shape[2:])) + 0.01 * exam
        torch.testing.assert_close(run.c_atlas[exam], expected)


def test_what_is_not_drawn_teaches_nothing(folder, labels):
    base = checkpoint.load(folder / "model")
    data = finetune.load_cohort(folder / "cohort.h5", finetune.Preset("x", NetworkConfig(size=SIZE)), "cpu", labels)
    only_b = finetune.Run(data, base, SETTINGS)
    only_b.drawn = [1]
    only_b.step(0)
    last = only_b.network.last
    assert last.bias.grad[0] != 0
    assert last.bias.grad[1] == 0  # the cube is not drawn on it


def test_an_edge_within_a_voxel_is_a_share_of_it():
    drawn = torch.zeros(8, 8, 8, dtype=torch.uint8)
    drawn[2:5, :, :4], drawn[6:, 6:, 6:] = 2, 1
    found = finetune.shares(drawn, 3, (4, 4, 4))
    assert found[1, :, 0, 0].tolist() == [0, 255, 128, 0]
    assert found[1, :, 0, 2:].max() == 0
    assert found[0].sum() == found[0, 3, 3, 3] == 255
    assert found[2].max() == 0
    assert finetune.shares(drawn, 3, (5, 8, 2)).shape == (3, 8, 8, 2)


def test_left_and_right_change_places_by_name():
    names = ("lung_left", "heart", "right_eye", "lung_right", "ear_left")
    assert finetune.mirrored_names(names) == [3, 1, 2, 0, 4]


def test_a_mirrored_step_learns_the_mirrored_exam(folder, labels):
    """With the sides of exam and labels changed beforehand, a mirrored step is a plain one."""
    base = checkpoint.load(folder / "model")
    sides = replace(labels, names=("left", "right"))
    known = {side: replace(base.structures[name], name=side) for side, name in zip(sides.names, NAMES, strict=True)}
    data = finetune.load_cohort(folder / "cohort.h5", finetune.Preset("x", NetworkConfig(size=SIZE)), "cpu", sides)
    one = finetune.Run(data, replace(base, structures=known), replace(SETTINGS, mirrored=True))
    seen = {}
    one.network.register_forward_hook(lambda _, given, __: seen.update(image=given[0], odds=given[1]))
    terms = one.step(1)
    mirrored = dict(seen)
    plain = finetune.Run(data, replace(base, structures=known), SETTINGS)
    plain.network.register_forward_hook(lambda _, given, __: seen.update(image=given[0], odds=given[1]))
    straight = plain.step(1)
    assert torch.equal(mirrored["image"], seen["image"].flip(2))
    assert torch.equal(mirrored["odds"], seen["odds"].flip(2)[:, [1, 0]])
    assert terms["loss"] == pytest.approx(straight["loss"], rel=1e-5)  # a head begins as the odds: as good on each side


def test_a_head_on_a_grid_of_its_own_draws_as_well(folder, tmp_path):
    store.build(folder / "images", tmp_path / "fine.h5", 2 * SIZE, "exam", workers=0)
    labels = masks.read(tmp_path / "fine.h5", folder / "labels", NAMES)
    settings = replace(SETTINGS, steps=300, shape=(14, 18, 24), mixed=True)
    with pytest.raises(CohortError, match="--size 32"):
        run(folder, tmp_path / "tuned", masks.read(folder / "cohort.h5", folder / "labels", NAMES), settings)
    finetune.finetune(tmp_path / "fine.h5", tmp_path / "tuned", folder / "model", labels, settings)
    model = checkpoint.load(tmp_path / "tuned")
    assert model.head.shape == (14, 18, 24)
    exam = read_exam(folder / "images" / "a.nii.gz")
    embedded = embed(model, exam)
    likely = segmentation.probabilities(model, exam, embedded)
    assert likely.shape == (1, 2, 14, 18, 24)
    fine = prepare.prepare(exam, 2 * SIZE, "exam")
    to_box = torch.from_numpy(np.linalg.inv(embedded.prepared.box_to_mm) @ fine.box_to_mm)[None].float()
    at = grid.sample(likely, affine.apply(to_box, grid.identity(fine.hu.shape)))[0]
    for channel in range(2):
        assert dice(at[channel] > 0.5, labels.maps[0] == channel + 1) > 0.85


@pytest.mark.parametrize("shape", [(14, 18, 24), (32, 10, 11)])
def test_labels_are_read_where_they_are_drawn(folder, tmp_path, shape):
    """The middle of a half-space that is drawn lies where it does, whatever parts of voxels are kept of it."""
    store.build(folder / "images", tmp_path / "fine.h5", 2 * SIZE, "exam", workers=0)
    labels = masks.read(tmp_path / "fine.h5", folder / "labels", NAMES)
    data = finetune.load_cohort(tmp_path / "fine.h5", finetune.Preset("x", NetworkConfig(size=SIZE)), "cpu", labels)
    run = finetune.Run(data, checkpoint.load(folder / "model"), replace(SETTINGS, shape=shape))
    for axis in range(3):
        run.kept.clear()
        labels.maps[0] = 0
        labels.maps[0].movedim(axis, 0)[:24] = 1  # up to the middle between nodes 23 and 24
        line = torch.zeros(1, 3, 2001, 1, 1)
        line[0, axis, :, 0, 0] = torch.linspace(-1, 1, 2001)
        found = run.inside(0, line)[0, 0, :, 0, 0]
        edge = line[0, axis, int((found < 0.5).nonzero()[0]), 0, 0]
        assert float(edge) == pytest.approx(2 * 23.5 / 31 - 1, abs=0.002)


@pytest.mark.parametrize("shape", [(14, 18, 24), (20, 12, 31)])
def test_a_grid_of_its_own_shows_each_place_as_it_is(tmp_path, shape):
    """HU that grow evenly along every axis are read back at the nodes, in training and in prediction."""
    (tmp_path / "images").mkdir()
    affine = np.diag([-10.0, 10.0, 10.0, 1.0])
    affine[:3, 3] = (75, -75, -75)
    slope = np.array([1.0, -0.7, 0.5])
    hu = apply(affine, np.moveaxis(np.indices((16, 16, 16)), 0, -1)) @ slope
    for name in "ab":
        nib.Nifti1Image(hu.astype(np.float32), affine).to_filename(tmp_path / "images" / f"{name}.nii.gz")
    store.build(tmp_path / "images", tmp_path / "fine.h5", 2 * SIZE, "exam", workers=0)
    data = finetune.load_cohort(tmp_path / "fine.h5", finetune.Preset("x", NetworkConfig(size=SIZE)), "cpu")
    nodes = np.moveaxis(grid.identity(shape, torch.float64)[0].numpy(), 0, -1)

    view = data.view([0], augment.keyed(0), SETTINGS.augmentation, shape=shape)
    expected = prepare.window(apply(data.box_to_mm[0].numpy(), nodes) @ slope)
    np.testing.assert_allclose(view.seen[0, 0], expected, atol=0.002)  # the cohort holds whole HU

    exam = read_exam(tmp_path / "images" / "a.nii.gz")
    prepared = prepare.prepare(exam, SIZE, "exam")
    expected = prepare.window(apply(prepared.box_to_mm, nodes) @ slope)
    np.testing.assert_allclose(segmentation.shown(exam, prepared, shape)[0, 0], expected, atol=0.002)


def test_a_stopped_training_goes_on_to_the_bit(folder, labels, tuned, tmp_path):
    class Stop(Exception):
        pass

    def stop(at):
        if at.step == 40:
            raise Stop

    often = replace(SETTINGS, checkpoint_minutes=0.0)
    with pytest.raises(Stop):
        run(folder, tmp_path / "model", labels, often, on_progress=stop)
    with pytest.raises(ModelError, match="--resume"):
        run(folder, tmp_path / "model", labels, often)
    with pytest.raises(ModelError, match="settings"):
        run(folder, tmp_path / "model", labels, replace(often, bend=0.1), resume=True)
    base = checkpoint.load(folder / "model")
    ball = base.structures["ball"]
    for other in (
        base.with_structures(replace(ball, mask=ball.mask.flip(0))),
        replace(base, network=CoordinateNetwork(base.network.config)),
    ):
        checkpoint.save(other, tmp_path / "other")
        with pytest.raises(ModelError, match="another --from"):
            finetune.finetune(folder / "cohort.h5", tmp_path / "model", tmp_path / "other", labels, often, resume=True)
    run(folder, tmp_path / "model", labels, often, resume=True)
    assert (tmp_path / "model" / "head.safetensors").read_bytes() == (tuned / "head.safetensors").read_bytes()


def test_another_cohort_or_an_unknown_structure_is_refused(folder, labels, tmp_path):
    strange = LabelMaps(("ball", "spleen"), labels.maps, labels.ends)
    with pytest.raises(StructureError, match="spleen"):
        run(folder, tmp_path / "model", strange)
    store.build(folder / "images", tmp_path / "other.h5", SIZE, "200mm", workers=0)
    with pytest.raises(CohortError, match="200mm"):
        finetune.finetune(tmp_path / "other.h5", tmp_path / "model", folder / "model", labels, SETTINGS)
    assert not (tmp_path / "model").exists()


def test_a_head_that_does_not_fit_is_not_loaded(tuned, tmp_path):
    for old, new in (('"width": 16', '"width": 9'), ('"ball": 0', '"ball": 2'), ('"ball": 0', '"spleen": 0')):
        broken = tmp_path / new.strip('"').replace('": ', "-")
        broken.mkdir()
        for path in tuned.glob("*.*"):
            (broken / path.name).write_bytes(path.read_bytes())
        text = (broken / "model.json").read_text(encoding="utf-8")
        assert old in text
        (broken / "model.json").write_text(text.replace(old, new), encoding="utf-8")
        with pytest.raises(ModelError):
            checkpoint.load(broken)


def begun(folder: Path, labels: LabelMaps, settings: FineTuning) -> finetune.Run:
    """A fine-tuning before its first step."""
    data = finetune.load_cohort(folder / "cohort.h5", finetune.Preset("x", NetworkConfig(size=SIZE)), "cpu", labels)
    return finetune.Run(data, checkpoint.load(folder / "model"), settings)


def test_the_rate_rises_then_falls_along_a_cosine_and_the_terms_are_weighted(folder, labels):
    run = begun(folder, labels, replace(SETTINGS, entropy=7.0, clip=1e-3))
    rates = []
    for step in (0, 50, 99):
        terms = run.step(step)
        rates.append(run.optimiser.param_groups[0]["lr"])
        assert terms["loss"] == pytest.approx(terms["dice"] + 7 * terms["entropy"], rel=1e-5)
        gradient = torch.stack([value.grad.norm() for value in run.network.parameters()]).norm()
        assert terms["gradient"] > 0.01
        assert float(gradient) == pytest.approx(1e-3, rel=0.01)
    assert rates[0] == pytest.approx(0.01 / 5, rel=1e-3)
    assert rates[1] == pytest.approx(0.01 * (0.01 + 0.99 / 2))
    assert rates[2] == pytest.approx(0.0001, rel=0.05)


def test_the_map_that_a_head_is_given_is_off_by_as_much_as_said(folder, labels, monkeypatch):
    monkeypatch.setattr(finetune.atlas, "log_odds", lambda _structures, c_atlas: c_atlas)  # its odds are the map itself

    run = begun(folder, labels, SETTINGS)
    view = run.data.view([0, 1, 2] * 8, augment.keyed(1), SETTINGS.augmentation)
    found = {}
    for astray in (0.0, 0.1, 0.2):
        run.settings = replace(SETTINGS, astray=astray)
        found[astray] = run.odds(view, augment.keyed(2))
    exact, near, far = found.values()
    own = torch.cat([run.c_atlas[exam] for exam in (0, 1, 2)]).repeat(8, 1, 1, 1, 1)
    torch.testing.assert_close(exact, grid.resize(own, (SIZE,) * 3))
    torch.testing.assert_close(far - exact, 2 * (near - exact), atol=1e-5, rtol=1e-4)
    corner = (far - exact)[..., ::15, ::15, ::15]  # control points: normal, times up to .2
    assert float(corner.std()) == pytest.approx(0.2 / 3**0.5, rel=0.3)
