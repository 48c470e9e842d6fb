"""The cascade: crops of a region, finer models on them, and who answers for what.

No network is trained for the geometry: every model gives the true coordinates of one patient, so answers are known.
"""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from deepatlas import cascade, checkpoint, classifier, files, grid, library, store
from deepatlas.atlas import Region
from deepatlas.autoencoder import Autoencoder
from deepatlas.cascade import Cutter
from deepatlas.checkpoint import MARGIN, Model
from deepatlas.classifier import Taught
from deepatlas.config import FINER, ConsolidationStage, Fitting, NetworkConfig
from deepatlas.embedding import Embedded
from deepatlas.errors import CohortError, ExamError, RegionError, StructureError
from deepatlas.files import as_exam
from deepatlas.locate import define
from deepatlas.networks import CoordinateNetwork, VoxelClassifier
from deepatlas.prepare import prepare_cube
from deepatlas.pretrain import Run, pretrain
from deepatlas.views import load_cohort
from deepatlas.volume import Volume, apply
from refusing import refused

SIZE = 24
NAMES = {"inner": 1, "outer": 2}
CENTRES = {"inner": (20, 10, 15), "outer": (-55, 0, -40)}
RADII = {"inner": 14, "outer": 18}
ATLAS_TO_MM = np.diag([110.0, 110, 110, 1])
CUBE = Region.whole("core", torch.tensor([[-0.1, -0.2, -0.15], [0.5, 0.4, 0.45]]))
POSE = np.array([[0.96, -0.28, 0, 12], [0.28, 0.96, 0, -5], [0, 0, 1, 30], [0, 0, 0, 1]])
"""Atlas's mm → mm of the exam."""


def exam(low=(-95, -90, -95), high=(95, 90, 95), name="one"):
    """A ball with a ramp of HU in it, turned, and its label map."""
    affine = np.diag([-4.0, 3.5, 5, 1])
    affine[:3, 3] = (95, low[1], low[2])
    shape = tuple(int(n) for n in (np.subtract(high, low) / [4, 3.5, 5] + 1))
    affine[:3, 3] += POSE[:3, 3]
    body = apply(np.linalg.inv(POSE) @ affine, np.moveaxis(np.indices(shape), 0, -1))
    hu = np.where(np.linalg.norm(body, axis=-1) < 85, 30 + body @ [0.8, -0.5, 0.6], -1000.0).astype(np.float32)
    labels = np.zeros(shape, np.uint16)
    for key, number in NAMES.items():
        labels[np.linalg.norm(body - CENTRES[key], axis=-1) < RADII[key]] = number
    return as_exam(Volume(hu, affine), name), Volume(labels, affine)


def exact(model, prepared):
    """In the place of `map_prepared`: the true coordinates, in the frame of the model's atlas."""
    mm = apply(prepared.box_to_mm, grid.identity((prepared.size,) * 3, torch.float64)[0].flatten(1).T.numpy())
    c = apply(np.linalg.inv(model.atlas_to_mm.numpy()) @ np.linalg.inv(POSE), mm)
    return Embedded(prepared, torch.from_numpy(c.T.reshape(1, 3, *(prepared.size,) * 3)).float().clamp(-1, 1))


@pytest.fixture
def known_maps(monkeypatch):
    for name in ("deepatlas.embedding", "deepatlas.cascade"):
        monkeypatch.setattr(sys.modules[name], "map_prepared", exact)


def model_of(region, to_mm, finer=None):
    torch.manual_seed(0)
    return Model(
        network=CoordinateNetwork(NetworkConfig(size=SIZE, widths=(8, 8), head_channels=8)),
        autoencoder=Autoencoder(),
        atlas=torch.zeros(1, 1, 16, 16, 16),
        seed_box_to_mm=torch.from_numpy(to_mm @ np.diag([MARGIN] * 3 + [1])),
        region=region,
        level=0,
        seed_exam="seed",
        structures={},
        regions={"core": CUBE},
        finer=finer or {},
    )


@pytest.fixture
def wide():
    """A model with a finer one of its cube."""
    seed_to_mm = ATLAS_TO_MM @ CUBE.to_atlas().numpy()  # the cube −1 … +1 → mm
    core = model_of(CUBE.as_text(), seed_to_mm @ np.diag([1 / MARGIN] * 3 + [1]))
    return model_of("exam", ATLAS_TO_MM, {"core": core})


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_a_cube_is_written_and_read():
    again = Region.from_text(replace(CUBE, name="upper neck").as_text())
    assert again.name == "upper neck"
    torch.testing.assert_close(again.box_atlas, CUBE.box_atlas)
    for text in ("cube 0 0 0 1 1 1", "cube 0 0 0 1 1 -1 neck", "body", "cube a b c d e f neck"):
        with pytest.raises(RegionError):
            Region.from_text(text)


def test_a_crop_shows_the_exam_where_its_box_says():
    volume, _ = exam()
    to_mm = POSE @ np.diag([40.0, 30, 50, 1])
    crop = prepare_cube(volume, 16, to_mm)
    mm = apply(crop.box_to_mm, np.moveaxis(grid.identity((16,) * 3, torch.float64)[0].numpy(), 0, -1))
    truth = 30 + apply(np.linalg.inv(POSE), mm) @ [0.8, -0.5, 0.6]
    np.testing.assert_allclose(crop.hu, truth, atol=0.05)
    np.testing.assert_allclose(crop.box_to_mm, to_mm @ np.diag([15 / 16] * 3 + [1]))
    far = to_mm.copy()
    far[2, 3] += 75
    assert (prepare_cube(volume, 16, far).hu[:, :, -1] == -1024).all()  # beyond the exam there is air
    far[2, 3] += 400
    with pytest.raises(ExamError):
        prepare_cube(volume, 16, far)


def test_a_cutter_gives_the_crop_and_the_coordinates_to_start_from(wide, known_maps):
    row = Cutter([wide], CUBE, 16)(exam()[0])
    places = apply(row.box_to_mm, np.moveaxis(grid.identity((16,) * 3, torch.float64)[0].numpy(), 0, -1))
    cube = 2 * (apply(np.linalg.inv(ATLAS_TO_MM) @ np.linalg.inv(POSE), places) - CUBE.box_atlas[0].numpy()) / 0.6 - 1
    assert np.abs(cube).max() < 1
    inner = 15 / 16 * grid.identity((16,) * 3)
    start = grid.sample(torch.from_numpy(row.start.astype(np.float32))[None], inner)[0].numpy()
    np.testing.assert_allclose(np.moveaxis(start, 0, -1), MARGIN * cube, atol=0.01)
    short, _ = exam(high=(95, 90, -60))
    with pytest.raises(ExamError, match="core"):
        Cutter([wide], CUBE, 16)(short)


def test_each_structure_is_answered_by_the_finest_model_that_holds_it(wide, known_maps, monkeypatch):
    volume, labels = exam()
    wide = define(wide, [(volume, labels)], NAMES)
    assert cascade.holds(wide, wide.finer["core"], wide.structures["inner"])
    assert not cascade.holds(wide, wide.finer["core"], wide.structures["outer"])
    seen = cascade.look_closer(wide, wide.finer["core"], volume, cascade.embed(wide, volume))
    core = define(wide.finer["core"], [(volume, labels)], {"inner": 1}, embedded=[seen])
    wide = replace(wide, finer={"core": core})
    asked = []
    module = sys.modules["deepatlas.locate"]
    plain = module.locate
    monkeypatch.setattr(module, "locate", lambda m, e, names, x: asked.append(list(names)) or plain(m, e, names, x))
    found = cascade.locate(wide, volume)
    assert asked == [["inner", "outer"], ["inner"]]
    for name, number in NAMES.items():
        assert dice(found[name].mask, labels.array == number) > 0.85
    assert found["inner"].owner is found["outer"].owner
    assert not (found["inner"].mask & found["outer"].mask).any()
    np.testing.assert_allclose(found["inner"].centroid_mm, apply(POSE, np.array(CENTRES["inner"], float)), atol=2)


def test_a_look_is_preferred_to_a_finer_map_without_one(wide, known_maps, monkeypatch):
    volume, labels = exam()
    wide = define(wide, [(volume, labels)], NAMES)
    inner = replace(wide.structures["inner"], classifier=VoxelClassifier(1, 4))
    seen = cascade.look_closer(wide, wide.finer["core"], volume, cascade.embed(wide, volume))
    core = define(wide.finer["core"], [(volume, labels)], {"inner": 1}, embedded=[seen])
    wide = replace(wide.with_structures(inner), finer={"core": core})
    asked = []
    monkeypatch.setattr(cascade, "look_closer", lambda *_: asked.append(True))
    found = cascade.locate(wide, volume)
    assert (asked, found["inner"].status) == ([], "present")
    looks = core.with_structures(replace(core.structures["inner"], classifier=VoxelClassifier(1, 4)))
    deeper = replace(core, finer={"kernel": replace(core, segmented={"inner": 0})})
    for drawing in (looks, replace(core, segmented={"inner": 0}), deeper):
        cascade.locate(replace(wide, finer={"core": drawing}), volume)
        assert asked.pop()


def test_an_exam_that_does_not_show_the_cube_is_answered_by_the_wide_model(wide, known_maps):
    volume, labels = exam()
    wide = define(wide, [(volume, labels)], NAMES)
    core = wide.finer["core"].with_structures(wide.structures["inner"])
    short, _ = exam(high=(95, 90, -30))
    found = cascade.locate(replace(wide, finer={"core": core}), short)
    assert (found["inner"].status, found["outer"].status) == ("absent", "cut_off")


def written(folder, *names):
    """The exam and its label map under each of the names, as `define_files` takes them."""
    volume, labels = exam()
    for part in ("images", "labels"):
        (folder / part).mkdir()
    for name in names:
        files.write_image(folder / "images" / f"{name}.nii.gz", volume.array, volume)
        files.write_labels(folder / "labels" / f"{name}.nii.gz", labels.array, volume)
    return folder / "images", folder / "labels", NAMES


def test_defining_teaches_finer_models_what_they_hold(wide, known_maps, tmp_path):
    made = library.define_files(wide, *written(tmp_path, "one")).model
    assert list(made.structures) == ["inner", "outer"]
    assert list(made.finer["core"].structures) == ["inner"]
    checkpoint.save(made, tmp_path / "model")
    again = checkpoint.load(tmp_path / "model")
    assert list(again.finer["core"].structures) == ["inner"]
    assert again.finer["core"].region == CUBE.as_text()
    assert [one.name for one in checkpoint.lineage(tmp_path / "model" / "finer" / "core")] == ["model", "core"]
    assert list(library.renamed(again, "inner", "kernel").finer["core"].structures) == ["kernel"]
    assert not again.without("inner").finer["core"].structures


def test_looks_are_learned_of_the_widest_model(wide, known_maps, tmp_path, monkeypatch):
    volume, _ = exam()
    given, counted = [], []

    def instead(structures, labelled, how=None, on_done=None):
        structures = list(structures)
        given.append(([one.name for one in structures], [embedded for *_, embedded in labelled]))
        return [Taught(replace(one, classifier=VoxelClassifier(1, 4)), 3, 0.5, 0.6) for one in structures[:1]]

    monkeypatch.setattr(classifier, "taught", instead)
    arguments = (wide, *written(tmp_path, "0", "1", "2"))
    made = library.define_files(*arguments, learn=True, on_done=lambda *at: counted.append(at))
    ((names, seen),) = given
    assert (names, len(seen)) == (["inner", "outer"], 3)
    assert counted == [(n, 3, str(n - 1)) for n in (1, 2, 3)] * 2
    for one in seen:
        torch.testing.assert_close(one.c_atlas, cascade.embed(wide, volume).c_atlas)
    assert [one.structure.name for one in made.looks] == ["inner"]
    assert [one.classifier is None for one in made.model.structures.values()] == [False, True]
    assert made.model.finer["core"].structures["inner"].classifier is None
    again = library.define_files(*arguments)  # a structure that is made anew has no look
    assert again.looks == []
    assert all(one.classifier is None for one in again.model.structures.values())


@pytest.mark.parametrize(("gone", "used"), [(2, {"core": 2, "look": 3}), (3, {"core": 3, "look": 2})])
def test_an_exam_that_cannot_be_read_again_is_noted(wide, known_maps, tmp_path, monkeypatch, gone, used):
    """Exams are read for the masks, once more for the finer model, and once more for the looks."""
    read, times, looks = files.read_exam, [], []

    def instead(path):
        times.append(path.name)
        if path.name == "1.nii.gz" and times.count(path.name) == gone:
            raise MemoryError
        return read(path)

    monkeypatch.setattr(files, "read_exam", instead)
    monkeypatch.setattr(classifier, "taught", lambda known, labelled, **_: looks.extend(labelled) or [])
    made = library.define_files(wide, *written(tmp_path, "0", "1", "2"), learn=True)
    assert list(made.failed) == ["1"]
    assert "memory" in made.failed["1"]
    assert {name: one.exams for name, one in made.model.structures.items()} == {"inner": 3, "outer": 3}
    assert {"core": made.model.finer["core"].structures["inner"].exams, "look": len(looks)} == used


def test_a_structure_that_only_a_broken_exam_shows_takes_nothing_from_the_others(wide, known_maps, tmp_path):
    images, labels, _ = written(tmp_path, "0", "1")
    volume, drawn = exam()
    files.write_labels(labels / "1.nii.gz", 5 * (drawn.array == 1), volume)
    (images / "1.nii.gz").write_bytes((images / "1.nii.gz").read_bytes()[:2000])
    made = library.define_files(wide, images, labels, NAMES | {"lost": 5})
    assert (made.defined, made.undrawn, list(made.failed)) == (["inner", "outer"], ["lost"], ["1"])
    with pytest.raises(StructureError, match="lost"):
        library.define_files(wide, images, labels, NAMES | {"lost": 5}, required=True)


def test_memory_that_torch_runs_out_of_fails_one_exam(wide, known_maps, tmp_path, monkeypatch):
    embed, asked = library.embed, []

    def instead(model, volume):
        asked.append(volume.name)
        if volume.name == "1":
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] can't allocate memory: you tried to allocate 9e9 bytes"
            )
        return embed(model, volume)

    monkeypatch.setattr(library, "embed", instead)
    made = library.define_files(wide, *written(tmp_path, "0", "1"))
    assert list(made.failed) == ["1"]
    assert "memory" in made.failed["1"]
    assert made.defined == ["inner", "outer"]


@pytest.fixture
def crops(wide, known_maps, tmp_path):
    """A cohort of crops, and the folder of the model that cut them."""
    (tmp_path / "images").mkdir()
    for name in ("one", "two", "three"):
        volume, _ = exam(name=name)
        files.write_image(tmp_path / "images" / f"{name}.nii.gz", volume.array, volume)
    short, _ = exam(high=(95, 90, -60))
    files.write_image(tmp_path / "images" / "short.nii.gz", short.array, short)
    report = store.build(
        tmp_path / "images", tmp_path / "crops.h5", 2 * SIZE, CUBE.as_text(), cut=Cutter([wide], CUBE, 2 * SIZE)
    )
    assert (report.added, list(report.failed)) == (3, ["short"])
    checkpoint.save(replace(wide, finer={}), tmp_path / "model")
    return tmp_path / "crops.h5", tmp_path / "model"


TINY = replace(
    FINER,
    network=NetworkConfig(size=SIZE, widths=(8, 8), head_channels=8),
    consolidation=(ConsolidationStage(Fitting(steps=2, nodes=5, size=32, learned=False, atlas_steps=0), steps=2),),
    batch=2,
    atlas_size=16,
)


def test_training_on_crops_begins_with_the_cube_of_the_atlas_and_the_coordinates_given(crops):
    cohort, folder = crops
    base = checkpoint.load(folder)
    run = Run.begin(load_cohort(cohort, TINY, "cpu"), TINY, None, base, "cpu")
    np.testing.assert_allclose(
        run.model().atlas_to_mm.numpy(), ATLAS_TO_MM @ CUBE.to_atlas().numpy() @ np.diag([1 / MARGIN] * 3 + [1])
    )
    data = run.data
    places = apply(data.box_to_mm[0].numpy(), np.moveaxis(grid.identity((SIZE,) * 3, torch.float64)[0].numpy(), 0, -1))
    truth = apply(np.linalg.inv(run.model().atlas_to_mm.numpy()) @ np.linalg.inv(POSE), places)
    np.testing.assert_allclose(np.moveaxis(run._predicted([0], 0)[0].numpy(), 0, -1), truth, atol=0.01)
    assert not torch.allclose(run._predicted([0], 2), run._predicted([0], 0), atol=0.01)  # later the network's own


def test_a_finer_model_is_trained_and_found_where_it_lies(crops):
    cohort, folder = crops
    trained = pretrain(cohort, folder / "finer" / "core", TINY, start_from=folder)
    assert trained.region == CUBE.as_text()
    assert list(checkpoint.load(folder).finer) == ["core"]


def test_crops_without_the_model_that_cut_them_are_refused(crops, tmp_path):
    with pytest.raises(CohortError, match="--from"):
        pretrain(crops[0], tmp_path / "out", TINY)


def test_the_command_line_refuses_what_it_cannot_do(crops, call, tmp_path):
    _, folder = crops
    code, _, err = call("prepare", "-i", tmp_path / "images", "-o", tmp_path / "c.h5", "--roi", "core")
    assert code == 2
    assert "--model" in err
    result = call("prepare", "-i", tmp_path / "images", "-o", tmp_path / "c.h5", "-m", folder, "--roi", "toe")
    refused(result, "toe", "core")
    refused(call("locate", "-m", folder, "-i", tmp_path / "images", "-o", tmp_path / "out", "--cascade"), "finer")


def test_a_finer_model_alone_says_where_it_belongs(wide):
    with pytest.raises(ExamError, match="cube"):
        cascade.embed(wide.finer["core"], exam()[0])
