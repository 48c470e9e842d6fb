"""Supervised fine-tuning: what it learns, what it leaves alone, and that a stopped training goes on to the bit."""

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from deepatlas import checkpoint, finetune, masks, segmentation, store
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
        embedded = embed(model, read_exam(folder / "images" / f"{name}.nii.gz"))
        likely = segmentation.probabilities(model, embedded)[0]
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
    found = finetune.shares(drawn, 3, 4)
    assert found[1, :, 0, 0].tolist() == [0, 255, 128, 0]
    assert found[1, :, 0, 2:].max() == 0
    assert found[0].sum() == found[0, 3, 3, 3] == 255
    assert found[2].max() == 0


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
    for old, new in (('"width": 8', '"width": 9'), ('"ball": 0', '"ball": 2'), ('"ball": 0', '"spleen": 0')):
        broken = tmp_path / new.strip('"').replace('": ', "-")
        broken.mkdir()
        for path in tuned.glob("*.*"):
            (broken / path.name).write_bytes(path.read_bytes())
        text = (broken / "model.json").read_text(encoding="utf-8")
        assert old in text
        (broken / "model.json").write_text(text.replace(old, new), encoding="utf-8")
        with pytest.raises(ModelError):
            checkpoint.load(broken)
