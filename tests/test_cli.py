"""The command line: what each command writes, what it says, and the code it ends with.

The model is overfitted to one small exam, oblique, left-handed and anisotropic, so that its answers there are known.
"""

import csv
import gzip
import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch

import deepatlas
from deepatlas import checkpoint, classifier, files, grid, outputs, refine, regions
from deepatlas.autoencoder import Autoencoder
from deepatlas.checkpoint import MARGIN, Model
from deepatlas.classifier import Taught
from deepatlas.config import PRESETS, AutoencoderStage, LevelStage, NetworkConfig, WarmStage
from deepatlas.embedding import embed, likeness_of
from deepatlas.errors import ExamError
from deepatlas.networks import CoordinateNetwork, VoxelClassifier
from deepatlas.prepare import prepare
from deepatlas.volume import apply
from refusing import refused

SHAPE = (34, 26, 22)
TURN = np.array([[np.cos(0.15), -np.sin(0.15), 0], [np.sin(0.15), np.cos(0.15), 0], [0, 0, 1]])
AFFINE = np.eye(4)
AFFINE[:3, :3] = TURN @ np.diag([-6.0, 7.0, 9.0])  # det < 0, anisotropic, turned in plane
AFFINE[:3, 3] = (110, -80, -90)
NAMES = {"organ": 7, "gland": 300}
CENTRES = {7: (-30, 5, 10), 300: (35, -5, -25)}
RADII = {7: 30, 300: 24}


def anatomy(affine=AFFINE, shape=SHAPE):
    """HU and labels of a small body: an ellipsoid with a bright ball and a dark one."""
    points = apply(affine, np.stack(np.indices(shape), axis=-1)) - apply(affine, (np.array(shape) - 1) / 2)
    hu = np.full(shape, -1000, np.int16)
    hu[((points / (85, 75, 85)) ** 2).sum(axis=-1) < 1] = 40
    labels = np.zeros(shape, np.uint16)
    for number, value in ((7, 200), (300, -120)):
        inside = np.linalg.norm(points - CENTRES[number], axis=-1) < RADII[number]
        hu[inside], labels[inside] = value, number
    return hu, labels


def save(path, array, affine=AFFINE):
    """Write a NIfTI whose two forms have different codes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine)
    image.set_sform(affine, 2)
    image.set_qform(affine, 1)
    image.header["descrip"] = b"DOE^JANE"
    nib.save(image, path)
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A model folder without structures, whose map of the exam is MARGIN times the place in its box."""
    folder = tmp_path_factory.mktemp("trained")
    exam = files.read_exam(save(folder / "one.nii.gz", anatomy()[0]))
    prepared = prepare(exam, 16)
    torch.manual_seed(0)
    network = CoordinateNetwork(NetworkConfig(size=16, widths=(8, 16), head_channels=8))
    image = torch.from_numpy(prepared.image)[None, None]
    wanted = MARGIN * grid.identity((16, 16, 16))
    adam = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(250):
        adam.zero_grad()
        loss = (network(image) - wanted).square().mean()
        loss.backward()
        adam.step()
        if loss.item() < 0.001:
            break
    assert loss.item() < 0.01, "the fixture's network did not learn its exam"
    atlas = grid.sample(image, grid.identity((16, 16, 16)) / MARGIN)
    model = Model(network, Autoencoder(), atlas, torch.from_numpy(prepared.box_to_mm), "body", 0, "one", {})
    checkpoint.save(model, folder / "model")
    return folder / "model"


@pytest.fixture(scope="session")
def taught(trained, tmp_path_factory):
    """The same model with two structures."""
    folder = tmp_path_factory.mktemp("taught") / "small"
    shutil.copytree(trained, folder)
    hu, labels = anatomy()
    exam = save(folder.parent / "one.nii.gz", hu)
    drawn = save(folder.parent / "drawn.nii.gz", labels)
    model = deepatlas.define(deepatlas.load(folder), exam, drawn, NAMES)
    checkpoint.save_structures(model, folder)
    return folder


@pytest.fixture
def work(tmp_path):
    """A folder with images/, labels/ and labels.json for one exam, `one`."""
    hu, labels = anatomy()
    save(tmp_path / "images" / "one.nii.gz", hu)
    save(tmp_path / "labels" / "one.nii.gz", labels)
    (tmp_path / "labels.json").write_text(json.dumps(NAMES))
    return tmp_path


def dice(a, b):
    """Overlap of two masks."""
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


COMMANDS = (
    *(
        "prepare",
        "pretrain",
        "finetune",
        "define",
        "structures",
        "locate",
        "propose",
        "vote",
        "embed",
        "atlas",
        "evaluate",
    ),
    *("points", "mark", "boxes", "roi", "crop", "uncrop", "coverage", "register", "evaluate"),
    *("models", "info", "phantoms", "demo"),
)


def test_help_and_version(call):
    code, out, _ = call("--help")
    assert code == 0
    for command in COMMANDS:
        assert command in out
    assert call("--version")[:2] == (0, f"deepatlas {deepatlas.__version__}\n")


def test_help_of_every_command_loads_nothing_heavy():
    code = (
        "import sys\n"
        "from deepatlas.cli import main\n"
        f"words = '{' '.join(COMMANDS)}'\n"
        "for word in words.split():\n"
        "    try:\n        main([word, '--help'])\n"
        "    except SystemExit as end:\n        assert not end.code, word\n"
        "heavy = {'torch', 'numba', 'nibabel', 'scipy', 'matplotlib', 'h5py', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_the_program_ends_with_its_codes(tmp_path):
    for arguments, code in ((["--version"], 0), (["info", str(tmp_path / "none")], 1), (["locate"], 2)):
        done = subprocess.run(
            [sys.executable, "-m", "deepatlas", *arguments], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PyTorch brings another OpenMP elsewhere")
def test_threads_sleep_while_they_wait_unless_asked_otherwise(tmp_path):
    for given, expected in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        surroundings = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
        done = subprocess.run(
            [sys.executable, "-m", "deepatlas", "info", str(tmp_path / "none")],
            env=surroundings | {"OMP_DISPLAY_ENV": "true"} | given,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert f"OMP_WAIT_POLICY = '{expected}'" in done.stderr


@pytest.mark.parametrize("options", [(), ("--refine",)])
def test_a_doubtful_exam_is_looked_at_again(options, call, taught, work, tmp_path, monkeypatch):
    folder, exam = tmp_path / "doubtful", work / "images" / "one.nii.gz"
    shutil.copytree(taught, folder)
    about = json.loads((folder / "model.json").read_text())
    model = deepatlas.load(taught)
    about["familiar"] = likeness_of(model, embed(model, files.read_exam(exam))).of_exam() / 1.2
    (folder / "model.json").write_text(json.dumps(about))
    ways = []
    monkeypatch.setattr(refine, "refine", lambda model, exam, embedded, how=None: ways.append(how) or embedded)
    assert call("locate", "-m", folder, "-i", exam, "-o", work / "out", *options)[0] == 0
    assert ways == [None if "--refine" in options else refine.AGAIN]


def test_locate_writes_masks_on_the_exams_own_grid(call, taught, work):
    exam = work / "images" / "one.nii.gz"
    code, out, _ = call("locate", "-m", taught, "-i", exam, "-o", work / "out")
    assert code == 0
    assert "organ" in out
    seg, given = nib.load(work / "out" / "one_seg.nii.gz"), nib.load(exam)
    assert seg.shape == given.shape
    assert np.array_equal(seg.affine, given.affine)
    assert (int(seg.header["sform_code"]), int(seg.header["qform_code"])) == (2, 1)
    values, truth = np.asarray(seg.dataobj), anatomy()[1]
    assert set(np.unique(values)) == {0, 7, 300}
    for number in NAMES.values():
        assert dice(values == number, truth == number) > 0.7
    assert not (work / "out" / "failed.json").exists()


def test_a_report_shows_what_was_found_in_every_exam(call, taught, work):
    code, out, _ = call("locate", "-m", taught, "-i", work / "images", "-o", work / "out", "--report")
    assert code == 0
    assert "report.html" in out
    page = (work / "out" / "report.html").read_text()
    assert "<h2>one</h2>" in page
    assert page.count("data:image/png;base64,") == len(list((work / "images").glob("*.nii.gz")))
    assert "<td>organ</td><td>present</td>" in page
    refused(call("locate", "-m", taught, "-i", work / "images", "-o", work / "out", "--report"), "--overwrite")
    assert call("locate", "-m", taught, "-i", work / "images", "-o", work / "out", "--overwrite")[0] == 0
    assert not (work / "out" / "report.html").exists()


def test_the_json_of_an_exam_is_the_contract(call, taught, work):
    assert call("locate", "-m", taught, "-i", work / "images", "-o", work / "out")[0] == 0
    text = (work / "out" / "one.json").read_text()
    answer = json.loads(text)
    assert answer.keys() == {"exam", "frame", "unit", "structures", "low_confidence", "model", "version", "familiar"}
    assert answer["familiar"] is True
    assert (answer["exam"], answer["frame"], answer["unit"]) == ("one", "RAS", "mm")
    assert "DOE" not in text
    assert str(work) not in text
    assert list(answer["structures"]) == list(NAMES)
    keys = {"label", "status", "coverage", "confidence", "volume_ml", "centroid", "box"}
    mask = np.asarray(nib.load(work / "out" / "one_seg.nii.gz").dataobj)
    for name, number in NAMES.items():
        one = answer["structures"][name]
        assert one.keys() == keys
        assert (one["label"], one["status"]) == (number, "present")
        places = apply(AFFINE, np.argwhere(mask == number))
        assert one["centroid"] == pytest.approx(places.mean(axis=0).tolist(), abs=0.01)
        assert one["volume_ml"] == pytest.approx(len(places) * 6 * 7 * 9 / 1000, abs=1e-3)
        low, high = np.array(one["box"])
        assert (low < places.min(axis=0)).all()
        assert (high > places.max(axis=0)).all()
        assert 0.95 <= one["coverage"] <= 1
        assert 0 <= one["confidence"] <= 1
    unsure = [name for name, one in answer["structures"].items() if one["confidence"] < 0.6]
    assert answer["low_confidence"] == unsure


def test_an_exam_unlike_all_that_was_learned_says_so(call, taught, work):
    shutil.copytree(taught, work / "model")
    about = json.loads((work / "model" / "model.json").read_text())
    (work / "model" / "model.json").write_text(json.dumps(about | {"familiar": 2.0}))
    said = "one: unlike every exam that the model learned from: nothing was placed in it"
    code, out, _ = call("locate", "-m", work / "model", "-i", work / "images", "-o", work / "out")
    assert (code, said in out.splitlines()) == (0, True)
    answer = json.loads((work / "out" / "one.json").read_text())
    assert answer["familiar"] is False
    assert {one["status"] for one in answer["structures"].values()} == {"absent"}
    examples = ["-e", work / "images", "-l", work / "labels", "--names", work / "labels.json"]
    code, _, err = call("vote", "-m", work / "model", "-i", work / "images", *examples, "-o", work / "voted")
    assert (code, said in err.splitlines()) == (0, True)
    assert json.loads((work / "voted" / "one.json").read_text())["familiar"] is False


def test_an_absent_structure_has_nulls(call, taught, work):
    model = checkpoint.load(taught)
    far = model.structures["organ"]
    box = torch.tensor([[2.0, 2.0, 2.0], [3.0, 3.0, 3.0]])  # no coordinate lies there
    absent = type(far)("nowhere", 9, far.mask, far.known, box, far.level, 1)
    checkpoint.save(model.with_structures(absent), work / "model")
    assert call("locate", "-m", work / "model", "-i", work / "images", "-o", work / "out")[0] == 0
    one = json.loads((work / "out" / "one.json").read_text())["structures"]["nowhere"]
    assert one["status"] == "absent"
    assert one["coverage"] < 0.05
    assert [one[key] for key in ("confidence", "volume_ml", "centroid", "box")] == [None] * 4
    assert not (np.asarray(nib.load(work / "out" / "one_seg.nii.gz").dataobj) == 9).any()


def test_a_folder_goes_on_after_a_broken_exam(call, taught, work):
    (work / "images" / "bad.nii.gz").write_bytes(b"not a NIfTI")
    (work / "images" / "notes.txt").write_text("not an exam")
    code, out, err = call("locate", "-m", taught, "-i", work / "images", "-o", work / "out", "--structures", "organ")
    assert code == 3
    assert "one: 1 present" in out
    assert "failed: bad: " in err
    failed = json.loads((work / "out" / "failed.json").read_text())
    assert list(failed) == ["bad"]
    assert str(work) not in failed["bad"]
    assert {path.name for path in (work / "out").iterdir()} == {"one_seg.nii.gz", "one.json", "failed.json"}
    hu = anatomy()[0]
    save(work / "images" / "bad.nii.gz", hu)  # mended: its entry goes
    assert call("locate", "-m", taught, "-i", work / "images" / "bad.nii.gz", "-o", work / "out")[0] == 0
    assert not (work / "out" / "failed.json").exists()


def test_a_run_on_other_exams_keeps_what_failed_before(call, taught, work):
    (work / "bad.nii.gz").write_bytes(b"not a NIfTI")
    refused(call("locate", "-m", taught, "-i", work / "bad.nii.gz", "-o", work / "out"), "bad.nii.gz")
    assert call("locate", "-m", taught, "-i", work / "images", "-o", work / "out")[0] == 0
    assert list(json.loads((work / "out" / "failed.json").read_text())) == ["bad"]


def test_a_folder_is_resumed(call, taught, work):
    """As after Ctrl-C: one exam has its answer, of another only the label map was written, a third is broken."""
    images = work / "images"
    for name in ("half", "new"):
        shutil.copy(images / "one.nii.gz", images / f"{name}.nii.gz")
    (images / "bad.nii.gz").write_bytes(b"not a NIfTI")
    arguments = ["locate", "-m", taught, "-o", work / "out", "--structures", "organ", "-i"]
    assert call(*arguments, images / "one.nii.gz")[0] == 0
    (work / "out" / "one_seg.nii.gz").write_bytes(b"mine")
    (work / "out" / "half_seg.nii.gz").write_bytes(b"a part")
    refused(call(*arguments, images), "--overwrite")
    code, out, err = call(*arguments, images, "--resume")
    assert code == 3
    assert [line.split(":")[0] for line in out.splitlines()] == ["half", "new"]
    assert "failed: bad: " in err
    assert (work / "out" / "one_seg.nii.gz").read_bytes() == b"mine"
    assert set(np.unique(np.asarray(nib.load(work / "out" / "half_seg.nii.gz").dataobj))) == {0, 7}
    save(images / "bad.nii.gz", anatomy()[0])
    assert call(*arguments, images, "--resume")[0] == 0
    assert (work / "out" / "bad.json").exists()
    assert not (work / "out" / "failed.json").exists()
    (work / "out" / "failed.json").write_text(json.dumps({"elsewhere": "broken"}))
    assert call(*arguments, images, "--resume")[:2] == (0, "")
    assert json.loads((work / "out" / "failed.json").read_text()) == {"elsewhere": "broken"}
    for wrong in ("--overwrite", "--report"):
        assert call(*arguments, images, "--resume", wrong)[0] == 2


def test_an_exam_that_failed_is_not_resumed_as_done_by_its_older_answer(call, taught, work):
    arguments = ["locate", "-m", taught, "-i", work / "images", "-o", work / "out", "--structures", "organ"]
    assert call(*arguments)[0] == 0
    (work / "images" / "one.nii.gz").write_bytes(b"damaged since")
    assert call(*arguments, "--overwrite")[0] == 3
    assert (work / "out" / "one.json").exists()
    assert call(*arguments, "--resume")[0] == 3
    assert list(json.loads((work / "out" / "failed.json").read_text())) == ["one"]
    save(work / "images" / "one.nii.gz", anatomy()[0])
    code, out, _ = call(*arguments, "--resume")
    assert (code, "organ" in out) == (0, True)
    assert not (work / "out" / "failed.json").exists()


def test_existing_outputs_are_kept_unless_told(call, taught, work):
    arguments = ["locate", "-m", taught, "-i", work / "images", "-o", work / "out", "--structures", "organ"]
    assert call(*arguments)[0] == 0
    seg = work / "out" / "one_seg.nii.gz"
    seg.write_bytes(b"mine")
    refused(call(*arguments), "--overwrite", "one_seg.nii.gz")
    assert seg.read_bytes() == b"mine"
    assert call(*arguments, "--overwrite")[0] == 0
    assert set(np.unique(np.asarray(nib.load(seg).dataobj))) == {0, 7}


def test_a_reason_names_no_folder_and_is_one_line(tmp_path):
    path = tmp_path / "DOE" / "case.nii.gz"
    said = outputs.reason(ExamError(f"Expected {path},\n  got nothing."), path)
    assert said == "Expected case.nii.gz, got nothing."
    assert "case.nii.gz" in outputs.reason(MemoryError(), path)


def test_links_are_followed(call, taught, work):
    (work / "linked").mkdir()
    (work / "linked" / "alias.nii.gz").symlink_to(work / "images" / "one.nii.gz")
    (work / "model").symlink_to(taught)
    assert call("locate", "-m", work / "model", "-i", work / "linked", "-o", work / "out")[0] == 0
    assert json.loads((work / "out" / "alias.json").read_text())["exam"] == "alias"


def test_define_from_the_command_line(call, trained, work):
    shutil.copytree(trained, work / "model")
    arguments = ["-i", work / "images" / "one.nii.gz", "-l", work / "labels" / "one.nii.gz"]
    arguments += ["--names", work / "labels.json"]
    code, out, _ = call("define", "-m", work / "model", *arguments, "--structures", "organ")
    assert code == 0
    assert out == "organ: number 7, from 1 exam.\n"
    (work / "twin.json").write_text(json.dumps({"twin": 7}))
    code, out, _ = call("define", "-m", work / "model", *arguments[:4], "--names", work / "twin.json")
    assert code == 0
    for word in ("Defined, but", "organ", "twin", "--structures"):
        assert word in out
    assert call("structures", "remove", "twin", "-m", work / "model")[0] == 0
    assert call("define", "-m", work / "model", *arguments)[0] == 0  # replaces organ, adds gland
    known = checkpoint.load(work / "model").structures
    assert {name: one.label for name, one in known.items()} == NAMES
    (work / "other.json").write_text('{"never_named": 300, "undrawn": 4}')
    code, out, _ = call("define", "-m", work / "model", *arguments[:4], "--names", work / "other.json")
    assert code == 0
    assert "left out: undrawn" in out
    assert list(checkpoint.load(work / "model").structures) == ["organ", "gland", "never_named"]


def test_define_from_folders(call, trained, work):
    hu, labels = anatomy()
    save(work / "images" / "two.nii.gz", hu)
    save(work / "labels" / "two_seg.nii.gz", labels)
    save(work / "images" / "unlabelled.nii.gz", hu)
    save(work / "images" / "crooked.nii.gz", hu)
    save(work / "labels" / "crooked.nii.gz", labels[:-1])
    arguments = ["-i", work / "images", "-l", work / "labels", "--names", work / "labels.json"]
    code, _, err = call("define", "-m", trained, *arguments, "-o", work / "new")
    assert code == 3
    assert "failed: crooked: " in err
    assert list(json.loads((work / "new" / "failed.json").read_text())) == ["crooked"]
    assert {one.exams for one in checkpoint.load(work / "new").structures.values()} == {2}
    assert checkpoint.load(trained).structures == {}
    refused(call("define", "-m", trained, *arguments, "-o", work / "new"), "another folder")


def test_exams_and_answers_may_share_a_folder(call, taught, trained, work):
    folder = work / "images"
    for _ in range(2):
        assert call("locate", "-m", taught, "-i", folder, "-o", folder, "--overwrite")[0] == 0
    assert {path.name for path in folder.iterdir()} == {"one.nii.gz", "one_seg.nii.gz", "one.json"}
    arguments = ("-m", trained, "-i", folder, "-l", folder, "--names", work / "labels.json", "-o", work / "new")
    code, out, _ = call("define", *arguments)
    assert (code, "organ: number 7, from 1 exam." in out) == (0, True)
    (folder / "one_seg.nii.gz").unlink()
    refused(call("define", *arguments[:-1], work / "none"), "label map named like an exam")


def test_define_says_what_looks_came_to(call, taught, work, monkeypatch):
    shutil.copytree(taught, work / "model")
    arguments = ["-m", work / "model", "-i", work / "images", "-l", work / "labels", "--names", work / "labels.json"]
    code, out, _ = call("define", *arguments, "--learn")
    assert (code, "Dice" in out) == (0, False)  # one exam is too few
    assert f"No look, which needs 10 exams that show the structure: {', '.join(NAMES)}." in out.splitlines()
    learned = []

    def instead(structures, labelled, how=None, on_done=None):
        learned.append(len(list(labelled)))
        first, second = structures
        classified = replace(first, classifier=VoxelClassifier(1, 4))
        return [Taught(classified, 12, 0.5, 0.625), Taught(second, 11, 0.75, 0.7)]

    monkeypatch.setattr(classifier, "taught", instead)
    code, out, _ = call("define", *arguments, "--learn")
    assert (code, learned) == (0, [1])
    first, second = checkpoint.load(work / "model").structures.values()
    assert f"{first.name}: Dice 0.625 by its look, 0.500 by the map alone: kept." in out
    assert f"{second.name}: Dice 0.700 by its look, 0.750 by the map alone: not kept." in out
    assert (first.classifier is None, second.classifier is None) == (False, True)
    assert "No look" not in out
    assert json.loads(call("info", work / "model", "--json")[1])["looks"] == [first.name]
    code, out, _ = call("define", *arguments)
    assert (code, f"the look was that of the old drawing: {first.name}" in out) == (0, True)
    assert json.loads(call("info", work / "model", "--json")[1])["looks"] == []


def test_structures_are_listed_renamed_and_removed(call, taught, work):
    shutil.copytree(taught, work / "model")
    assert call("structures", "rename", "organ", "liver", "-m", work / "model")[0] == 0
    assert json.loads(call("structures", "list", "-m", work / "model", "--json")[1]) == {"liver": 7, "gland": 300}
    assert "liver" in call("structures", "list", "-m", work / "model")[1]
    refused(call("structures", "rename", "liver", "gland", "-m", work / "model"), "gland", "in use")
    refused(call("structures", "rename", "organ", "x", "-m", work / "model"), "organ")
    refused(call("structures", "remove", "organ", "-m", work / "model"), "organ")
    assert call("structures", "remove", "liver", "-m", work / "model")[0] == 0
    assert list(checkpoint.load(work / "model").structures) == ["gland"]


def test_proposals_come_with_a_list_that_begins_with_the_least_sure(call, taught, work):
    shutil.copy(work / "images" / "one.nii.gz", work / "images" / "two.nii.gz")
    (work / "images" / "broken.nii.gz").write_bytes(b"no exam")
    code, _, _ = call("propose", "-m", taught, "-i", work / "images", "-o", work / "out")
    assert code == 3
    rows = list(csv.DictReader((work / "out" / "review.csv").read_text().splitlines()))
    assert sorted((row["exam"], row["structure"]) for row in rows) == [
        (exam, name) for exam in ("one", "two") for name in ("gland", "organ")
    ]
    sure = [float(row["confidence"]) for row in rows]
    assert sure == sorted(sure)
    assert all((work / "out" / row["mask"]).exists() for row in rows)
    assert list(json.loads((work / "out" / "failed.json").read_text())) == ["broken"]


def test_proposals_go_back_through_define(call, taught, trained, work):
    assert call("propose", "-m", taught, "-i", work / "images", "-o", work / "out")[0] == 0
    code, said, _ = call(
        *("define", "-m", trained, "-i", work / "images", "-l", work / "out", "--names", work / "labels.json"),
        *("-o", work / "again"),
    )
    assert code == 0
    assert "organ: number 7, from 1 exam" in said


def test_an_exam_that_votes_about_itself_is_found_as_drawn(call, taught, work):
    common = ("-e", work / "images", "-l", work / "labels", "--names", work / "labels.json")
    assert call("vote", "-m", taught, "-i", work / "images", *common, "-o", work / "out")[0] == 0
    found = np.asarray(nib.load(work / "out" / "one_seg.nii.gz").dataobj)
    truth = anatomy()[1]
    for number in NAMES.values():
        assert (
            2 * ((found == number) & (truth == number)).sum() / ((found == number).sum() + (truth == number).sum())
            > 0.8
        )
    about = json.loads((work / "out" / "one.json").read_text())["structures"]["organ"]
    assert about["status"] == "present"
    places = apply(AFFINE, np.argwhere(found == 7))
    np.testing.assert_allclose(about["centroid"], places.mean(axis=0), atol=0.01)


def test_a_vote_about_a_structure_the_library_does_not_know_is_refused(call, trained, work):
    common = ("-e", work / "images", "-l", work / "labels", "--names", work / "labels.json")
    code, _, err = call("vote", "-m", trained, "-i", work / "images", *common, "-o", work / "out")
    assert code == 1
    assert "organ" in err


def test_a_single_exam_that_cannot_be_read_is_not_voted_upon(call, taught, work):
    broken = work / "broken.nii.gz"
    broken.write_bytes(b"no exam")
    common = ("-e", work / "images", "-l", work / "labels", "--names", work / "labels.json")
    refused(call("vote", "-m", taught, "-i", broken, *common, "-o", work / "out"), "broken.nii.gz")


def test_copies_and_orientation_leave_a_good_exam_where_it_is(call, taught, work):
    assert call("locate", "-m", taught, "-i", work / "images", "-o", work / "plain")[0] == 0
    how = ("--copies", 2, "--orient")
    assert call("locate", "-m", taught, "-i", work / "images", "-o", work / "careful", *how)[0] == 0
    plain, careful = (json.loads((work / part / "one.json").read_text()) for part in ("plain", "careful"))
    assert "repairs" not in careful
    assert plain["structures"]["organ"]["status"] == careful["structures"]["organ"]["status"] == "present"


def test_embed_in_mm_names_the_place_of_every_voxel(call, taught, work):
    exam = work / "images" / "one.nii.gz"
    assert call("embed", "-m", taught, "-i", exam, "-o", work / "mm", "--mm")[0] == 0
    assert call("embed", "-m", taught, "-i", exam, "-o", work / "atlas")[0] == 0
    coords, units = (nib.load(work / kind / "one_coords.nii.gz") for kind in ("mm", "atlas"))
    assert coords.shape == (*SHAPE, 3)
    assert coords.get_data_dtype() == np.float32
    assert np.array_equal(coords.affine, nib.load(exam).affine)
    hu = anatomy()[0]
    places = apply(AFFINE, np.argwhere(hu > -500))
    named = np.asarray(coords.dataobj)[hu > -500]
    assert np.median(np.linalg.norm(named - places, axis=1)) < 8  # the exam is its own seed
    in_units = np.asarray(units.dataobj)
    assert np.abs(in_units).max() <= 1
    there = apply(checkpoint.load(taught).atlas_to_mm.numpy(), in_units)
    assert np.allclose(there, np.asarray(coords.dataobj), atol=1e-2)
    refused(call("embed", "-m", taught, "-i", exam, "-o", work / "mm"), "--overwrite")


def test_the_atlas_alone_and_aligned(call, taught, work):
    exam = work / "images" / "one.nii.gz"
    assert call("atlas", "-m", taught, "-o", work / "alone.nii.gz")[0] == 0
    assert call("atlas", "-m", taught, "-o", work / "aligned.nii.gz", "-i", exam)[0] == 0
    hu, labels = anatomy()
    alone, aligned = (files.read_exam(work / f"{name}.nii.gz") for name in ("alone", "aligned"))
    assert -256 <= alone.array.min() < 0 < alone.array.max() <= 256
    centre = AFFINE @ [*(np.array(SHAPE) - 1) / 2, 1]
    for number, bright in ((7, True), (300, False)):  # the organ shines and the gland is dark where they truly lie
        voxel = np.rint(apply(alone.inverse, centre[:3] + CENTRES[number])).astype(int)
        assert (alone.array[tuple(voxel)] > 100) == bright
    assert np.array_equal(aligned.affine, nib.load(exam).affine)
    organ, gland, body = (np.median(aligned.array[part]) for part in (labels == 7, labels == 300, hu == 40))
    assert organ > body + 40
    assert gland < body - 40
    assert aligned.array[0, 0, 0] == -256


@pytest.mark.parametrize("faults", ['{"organ": "one"}', '{"organ": 5}', '{"orgen": ["one"]}', '["organ"]'])
def test_faults_that_would_leave_out_something_else_are_refused(call, trained, work, faults):
    (work / "faults.json").write_text(faults)
    common = ["-i", work / "images", "-l", work / "labels", "--names", work / "labels.json"]
    refused(call("define", "-m", trained, *common, "-o", work / "new", "--exclude", work / "faults.json"), "xpected")


def test_faults_of_exams_that_are_not_there_are_said(call, taught, work):
    (work / "faults.json").write_text('{"organ": ["noe", "one"], "gland": ["noe", "eno"]}')
    said = "faults.json: not among the exams here: eno, noe."
    common = ["-l", work / "labels", "--names", work / "labels.json", "--exclude", work / "faults.json"]
    code, _, err = call("define", "-m", taught, "-i", work / "images", *common, "-o", work / "new")
    assert (code, said in err.splitlines()) == (0, True)
    assert call("prepare", "-i", work / "images", "-o", work / "cohort.h5", "--size", 16)[0] == 0
    _, _, err = call("pretrain", "-c", work / "cohort.h5", *common, "-o", work / "model", "--seed-exam", "none")
    assert said in err.splitlines()
    assert call("locate", "-m", taught, "-i", work / "images", "-o", work / "out")[0] == 0
    scored = ["-p", work / "out", "-t", work / "labels", *common[2:]]
    code, _, err = call("evaluate", *scored, "-o", work / "results.json")
    assert (code, said in err.splitlines()) == (0, True)


def test_evaluate_and_against(call, taught, work):
    assert call("locate", "-m", taught, "-i", work / "images", "-o", work / "out")[0] == 0
    arguments = ["evaluate", "-p", work / "out", "-t", work / "labels", "--names", work / "labels.json", "-o"]
    code, out, _ = call(*arguments, work / "results.json")
    assert code == 0
    assert "organ" in out
    results = json.loads((work / "results.json").read_text())
    assert results["mean_dice"] > 0.7
    assert {"mean", "low", "high", "n"} <= results["structures"]["organ"]["hd95_mm"].keys()
    assert (work / "results.csv").exists()
    refused(call(*arguments, work / "results.json"), "--overwrite")
    (work / "faults.json").write_text('{"organ": ["one"]}')
    code, _, _ = call(
        *arguments, work / "less.json", "--against", work / "results.json", "--exclude", work / "faults.json"
    )
    assert code == 0
    less = json.loads((work / "less.json").read_text())
    assert less["left_out"]["excluded"] == 1
    assert less["against"]["structures"]["gland"]["dice"]["mean"] == 0
    (work / "faults.json").write_text("[")
    refused(call(*arguments, work / "x.json", "--exclude", work / "faults.json"), "faults.json")
    (work / "x.csv").write_text("precious")
    refused(call(*arguments, work / "x.json"), "x.csv")
    refused(call(*arguments, work / "x.txt"), ".json")
    assert (work / "x.csv").read_text() == "precious"


def test_prepare_extends_a_cohort_and_lists_what_failed(call, work):
    save(work / "images" / "flat.nii.gz", np.zeros(SHAPE, np.int16))
    arguments = ["prepare", "-i", work / "images", "-o", work / "cohort.h5", "--size", 16, "--workers", 0]
    code, out, err = call(*arguments)
    assert code == 3
    assert "1 exams added" in out
    assert "failed: flat: " in err
    assert list(json.loads((work / "cohort.h5.failed.json").read_text())) == ["flat"]
    (work / "images" / "flat.nii.gz").unlink()
    code, out, _ = call(*arguments)
    assert (code, "0 exams added, 1 kept" in out) == (0, True)
    assert not (work / "cohort.h5.failed.json").exists()
    assert call(*arguments, "--region", "moon")[0] == 2


def test_pretrain_refuses_what_it_cannot_do(call, work):
    assert call("prepare", "-i", work / "images", "-o", work / "c.h5", "--size", 16, "--workers", 0)[0] == 0
    arguments = ["pretrain", "-c", work / "c.h5", "-o", work / "model"]
    assert call(*arguments, "--preset", "huge")[0] == 2
    refused(call("pretrain", "-c", work / "none.h5", "-o", work / "model"), "none.h5")
    refused(call(*arguments, "--from", work / "nowhere"), "nowhere")
    refused(call(*arguments, "--device", "warp"), "warp", "cpu")
    assert call(*arguments, "--labels", work / "labels")[0] == 2
    assert call(*arguments, "--in-part", "cord")[0] == 2


def test_pretrain_writes_a_model_and_can_be_resumed(call, work, monkeypatch):
    tiny = replace(
        PRESETS["demo"],
        network=NetworkConfig(size=16, widths=(8, 16), head_channels=8),
        autoencoder=AutoencoderStage(steps=2, batch=2, rate=0.003),
        warm=WarmStage(steps=2, batch=2, rate=0.004),
        levels=(LevelStage(steps=2, rate=0.003, warm_up=1, loss_size=16),) * 2,
        consolidation=(),
        batch=2,
        atlas_size=16,
    )
    monkeypatch.setitem(PRESETS, "tiny", tiny)
    save(work / "images" / "two.nii.gz", anatomy()[0])
    assert call("prepare", "-i", work / "images", "-o", work / "c.h5", "--size", 16, "--workers", 0)[0] == 0
    arguments = ["pretrain", "-c", work / "c.h5", "-o", work / "model", "--preset", "tiny"]
    refused(call(*arguments, "--resume"), "nothing to resume")
    code, out, err = call(*arguments, "--seed-exam", "two")
    assert code == 0
    assert "seed exam two" in out
    assert "8/8 level" in err
    assert "voxels from the level above" in err  # the jump at the change of level is printed
    about = json.loads(call("info", work / "model", "--json")[1])
    assert (about["seed_exam"], about["level"], about["structures"]) == ("two", 0, [])
    refused(call(*arguments, "--seed-exam", "two"), "--resume")
    assert call(*arguments, "--seed-exam", "two", "--resume")[0] == 0
    assert logging.getLogger("deepatlas").handlers == []
    arguments[4] = work / "joint"
    refused(call(*arguments, "--labels", work / "labels", "--names", work / "none.json"), "none.json")
    code, out, _ = call(*arguments, "--labels", work / "labels", "--names", work / "labels.json")
    assert (code, "Labels: " in out) == (0, True)
    refused(call(*arguments, "--labels", work / "labels", "--names", work / "none.json"), "--resume")  # before reading


def test_finetune_writes_a_model_that_draws_by_its_head_until_it_is_defined_anew(call, taught, work, monkeypatch):
    save(work / "images" / "two.nii.gz", anatomy()[0])
    about = json.loads(call("info", taught, "--json")[1])
    size = ["--size", 2 * about["size"], "--region", about["region"], "--workers", 0]
    assert call("prepare", "-i", work / "images", "-o", work / "c.h5", *size)[0] == 0
    arguments = ["finetune", "-c", work / "c.h5", "-o", work / "tuned", "--from", taught, "-l", work / "labels"]
    arguments += ["--names", work / "labels.json", "--steps", 2, "--mirrored", "--mixed", "--shape"]
    assert call(*arguments, 4, 10, 10)[0] == 2
    arguments += [10, 12, 14]
    code, out, err = call(*arguments)
    assert (code, "Labels: " in out, "2/2 fine-tuning" in err) == (0, True, True)
    assert f"draws {', '.join(NAMES)}" in out
    refused(call(*arguments), "--resume")
    assert json.loads(call("info", work / "tuned", "--json")[1])["fine-tuned"] == sorted(NAMES)
    assert call("locate", "-m", work / "tuned", "-i", work / "images" / "one.nii.gz", "-o", work / "found")[0] == 0
    first = next(iter(NAMES))
    again = ["define", "-m", work / "tuned", "-i", work / "images" / "one.nii.gz", "-l", work / "labels" / "one.nii.gz"]
    code, out, _ = call(*again, "--names", work / "labels.json", "--structures", first)
    assert (code, f"by the map again, the head had learned the old drawing: {first}" in out) == (0, True)
    assert json.loads(call("info", work / "tuned", "--json")[1])["fine-tuned"] == sorted(set(NAMES) - {first})


def test_the_demo_says_what_it_does_and_found(call, work, monkeypatch):
    def run(out, on_stage, on_progress):
        on_stage(f"working in {out.name}")
        return {}

    monkeypatch.setattr("deepatlas.demo.run", run)
    monkeypatch.setattr("deepatlas.demo.summary", lambda results: ["all was found"])
    code, said, err = call("demo", "-o", work / "demo")
    assert code == 0
    assert "all was found" in said
    assert "report.html" in said
    assert "working in demo" in err


def test_the_demo_keeps_what_is_there(call, work):
    (work / "demo").mkdir()
    (work / "demo" / "report.html").write_text("mine")
    refused(call("demo", "-o", work / "demo"), "report.html", "--overwrite")
    assert (work / "demo" / "report.html").read_text() == "mine"


def test_models_lists_what_was_shipped(call, taught, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "shipped", lambda: [taught])
    assert json.loads(call("models", "--json")[1]) == [
        {"name": "small", "kind": "map", "version": checkpoint.VERSION, "structures": ["organ", "gland"]}
    ]
    assert "small (map, version 1): organ, gland" in call("models")[1]
    monkeypatch.chdir(tmp_path)
    about = json.loads(call("info", "small", "--json")[1])
    assert (about["name"], about["seed_exam"], about["size"]) == ("small", "one", 16)
    assert [one["label"] for one in about["structures"]] == [7, 300]
    assert "organ (7)" in call("info", "small")[1]
    refused(call("structures", "remove", "organ", "-m", "small"), "copy")  # what was shipped is not changed
    refused(call("info", "large"), "small")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "model.json").write_text("{}")
    refused(call("info", "strange"), "does not describe a model")


def test_info_names_regions_and_landmarks(call, taught, tmp_path):
    model = checkpoint.load(taught)
    region = regions.from_structures(model, "both", list(NAMES), 5.0)
    landmarks = {f"point {n}": (0.0, 0.0, 0.1 * n) for n in range(2)}
    checkpoint.save(replace(model.with_regions(region), landmarks=landmarks), tmp_path / "model")
    about = json.loads(call("info", tmp_path / "model", "--json")[1])
    assert (about["regions"], about["landmarks"]) == (["both"], list(landmarks))
    _, out, _ = call("info", tmp_path / "model")
    assert {"regions     both", "landmarks   point 0, point 1"} <= set(out.splitlines())
    many = {f"point {n}": (0.0, 0.0, 0.01 * n) for n in range(30)}
    checkpoint.save_structures(replace(model, landmarks=many), tmp_path / "model")
    _, out, _ = call("info", tmp_path / "model")
    assert {"regions     none", "landmarks   30, named by --json"} <= set(out.splitlines())


def test_phantoms(call, tmp_path):
    assert call("phantoms", "-o", tmp_path / "p", "-n", 1, "--seed", 3)[0] == 0
    assert [path.name for path in (tmp_path / "p" / "images").iterdir()] == ["phantom_000.nii.gz"]
    assert json.loads((tmp_path / "p" / "labels.json").read_text())["liver"] == 14
    refused(call("phantoms", "-o", tmp_path / "p", "-n", 1), "--overwrite")


def bad_exam(kind, path):
    """Write an exam with a fault."""
    hu = anatomy()[0]
    affine = AFFINE.copy()
    if kind == "text":
        path.write_text("a diary")
        return
    if kind == "flat":
        hu = hu[:, :, :1]
    elif kind == "many":
        hu = np.stack([hu] * 3, axis=-1)
    elif kind == "nan":
        hu = np.where(hu > 0, np.nan, hu).astype(np.float32)
    elif kind == "constant":
        hu = np.zeros_like(hu)
    elif kind == "air":
        hu = np.full_like(hu, -1000)
        hu[0, 0, 0] = -999
    elif kind == "spacing":
        affine[:3, :3] *= 0.001
    save(path, hu, affine)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif kind in ("singular", "empty"):
        raw = bytearray(gzip.decompress(path.read_bytes()))
        if kind == "singular":
            raw[252:256] = b"\0" * 4  # both codes
            raw[254:256] = (2).to_bytes(2, "little")
            raw[280:328] = b"\0" * 48  # srow
        else:
            raw[42:44] = b"\0\0"
        path.write_bytes(gzip.compress(bytes(raw)))


@pytest.mark.parametrize(
    "kind", ["text", "truncated", "flat", "many", "nan", "empty", "constant", "air", "singular", "spacing"]
)
def test_bad_exams_are_refused_in_one_line(call, taught, tmp_path, kind):
    path = tmp_path / "case.nii.gz"
    bad_exam(kind, path)
    for command in (["locate"], ["embed"]):
        line = refused(call(*command, "-m", taught, "-i", path, "-o", tmp_path / "out"), "xpected")
        assert line.rstrip().endswith(".")
    assert not (tmp_path / "out" / "case_seg.nii.gz").exists()


def test_bad_labels_and_names_are_refused(call, trained, work):
    shutil.copytree(trained, work / "model")
    one, drawn = work / "images" / "one.nii.gz", work / "labels" / "one.nii.gz"
    base = ["define", "-m", work / "model", "-i", one, "-l"]
    names = ["--names", work / "labels.json"]
    labels = anatomy()[1]
    moved = AFFINE.copy()
    moved[0, 3] += 5
    refused(call(*base, save(work / "moved.nii.gz", labels, moved), *names), "moved.nii.gz", "mm away")
    refused(call(*base, save(work / "short.nii.gz", labels[:-1]), *names), "short.nii.gz", "shape")
    refused(call(*base, save(work / "soft.nii.gz", labels.astype(np.float32) / 2 + 0.3), *names), "whole numbers")
    refused(call(*base, save(work / "blank.nii.gz", labels * 0), *names), "number 7")
    refused(call(*base, work / "none.nii.gz", *names), "none.nii.gz")
    refused(call(*base, drawn, *names, "--structures", "nose"), "nose", "organ")
    (work / "labels.json").write_text("organ")
    refused(call(*base, drawn, *names), "labels.json")
    (work / "labels.json").write_text('{"organ": 7, "undrawn": 5}')
    refused(call(*base, drawn, *names, "--structures", "undrawn"), "undrawn")
    assert checkpoint.load(work / "model").structures == {}


def test_bad_models_and_folders_are_refused(call, taught, trained, work):
    one, out = work / "images" / "one.nii.gz", ["-o", work / "out"]
    (work / "void").mkdir()
    refused(call("locate", "-m", taught, "-i", work / "void", *out), "void")
    refused(call("locate", "-m", taught, "-i", work / "nowhere", *out), "nowhere")
    refused(call("locate", "-m", work / "void", "-i", one, *out), "model.json")
    refused(call("locate", "-m", "no-such-model", "-i", one, *out), "no-such-model")
    refused(call("locate", "-m", taught, "-i", one, *out, "--structures", "organ,nose"), "nose", "gland")
    refused(call("locate", "-m", trained, "-i", one, *out), "define")
    shutil.copytree(taught, work / "old")
    about = json.loads((work / "old" / "model.json").read_text())
    (work / "old" / "model.json").write_text(json.dumps(about | {"version": 0}))
    refused(call("locate", "-m", work / "old", "-i", one, *out), "version 0")
    assert not (work / "out").exists()
    (work / "out").write_text("a file")
    refused(call("locate", "-m", taught, "-i", one, *out), "out")


def test_two_structures_cannot_share_a_number_in_one_label_map(call, taught, work):
    model = checkpoint.load(taught)
    twin = model.structures["organ"].renamed("twin")
    checkpoint.save(model.with_structures(twin), work / "model")
    arguments = ["locate", "-m", work / "model", "-i", work / "images", "-o", work / "out"]
    refused(call(*arguments), "organ", "twin", "--structures")
    assert call(*arguments, "--structures", "twin")[0] == 0


def test_the_door_is_the_face_a_user_meets(trained, work):
    model = deepatlas.load(trained)
    one = work / "images" / "one.nii.gz"
    deepatlas.define(model, exam=one, labels=work / "labels" / "one.nii.gz", names={"larynx": 7})
    found = deepatlas.locate(model, one)["larynx"]
    assert dice(found.mask, anatomy()[1] == 7) > 0.7
    assert found.coverage > 0.95
    assert np.linalg.norm(np.array(found.centroid_mm) - (AFFINE @ [*(np.array(SHAPE) - 1) / 2, 1])[:3] - CENTRES[7]) < 9
    assert deepatlas.locate.__name__ == "deepatlas.locate"  # still the module it also is
    with pytest.raises(AttributeError, match="nothing"):
        _ = deepatlas.nothing
