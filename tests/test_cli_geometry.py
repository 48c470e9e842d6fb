"""The commands about places: points, boxes, roi, crop, uncrop, coverage, register.

No network is trained: every exam gets the true coordinates of one small patient, who was turned, shifted and scaled (or
bent) between the exams. So every answer is known in closed form, and what is tested is all that stands around the map.
"""

import base64
import csv
import gzip
import importlib
import json
import shutil
from itertools import product
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pytest
import torch

import deepatlas
from deepatlas import checkpoint, embedding, files, grid
from deepatlas.autoencoder import Autoencoder
from deepatlas.checkpoint import MARGIN, Model
from deepatlas.cli import main
from deepatlas.config import NetworkConfig
from deepatlas.embedding import Embedded
from deepatlas.networks import CoordinateNetwork
from deepatlas.prepare import prepare
from deepatlas.volume import apply
from refusing import refused

SIZE = 24
NAMES = {"organ": 7, "gland": 300}
CENTRES = {"organ": (-30, 5, 10), "gland": (35, -5, -25)}
RADII = {"organ": 30, "gland": 24}
FLIP = np.array([-1, -1, 1])
TEXT = b"DOE^JANE"


def turned(about_x: float, about_z: float) -> np.ndarray:
    """A rotation about z after one about x."""
    (a, b), (c, d) = ((np.cos(angle), np.sin(angle)) for angle in (about_x, about_z))
    return np.array([[c, -d, 0], [d, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, a, -b], [0, b, a]])


def matrix(linear, shift) -> np.ndarray:
    return np.vstack([np.column_stack([linear, shift]), [0, 0, 0, 1]])


class Scan(NamedTuple):
    """How an exam shows the patient."""

    pose: np.ndarray
    """Body → mm of the exam."""
    steps: np.ndarray
    """Its voxel axes, mm, in columns."""
    low: tuple = (-100, -90, -100)
    high: tuple = (100, 90, 100)
    """The field of view around the body, mm along the voxel axes."""
    bent: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(np.ceil((np.array(self.high) - self.low) / np.linalg.norm(self.steps, axis=0)).astype(int) + 1)

    @property
    def affine(self) -> np.ndarray:
        middle = self.steps / np.linalg.norm(self.steps, axis=0) @ (np.add(self.low, self.high) / 2)
        return matrix(self.steps, self.pose[:3, 3] + middle - self.steps @ ((np.array(self.shape) - 1) / 2))

    @property
    def places(self) -> np.ndarray:
        return apply(self.affine, np.moveaxis(np.indices(self.shape), 0, -1))

    def body(self, mm: np.ndarray) -> np.ndarray:
        """The body's own coordinates of places in the exam."""
        points = apply(np.linalg.inv(self.pose), mm)
        points[..., 0] += self.bent * np.sin(points[..., 1] / 40)
        return points


ONE = Scan(matrix(np.eye(3), (15, -20, 40)), turned(0, 0.15) @ np.diag([-6.0, 7, 9]))  # left-handed
TWO = Scan(matrix(1.1 * turned(0.2, 0.3), (-8, 30, -70)), turned(-0.1, 0.1)[:, [1, 0, 2]] @ np.diag([8.0, 6, 7]))
SLAB = Scan(matrix(turned(0, -0.25), (0, 10, 5)), np.diag([-7.0, -7, 5]), low=(-100, -90, 15))
BENT = Scan(matrix(turned(0.1, -0.2), (3, 4, 5)), np.diag([8.0, 8, 8]), bent=10.0)
FEET = Scan(np.eye(4), np.diag([7.0, 7, 5]), high=(100, 90, -25))
SCANS = {"one": ONE, "two": TWO, "slab": SLAB, "bent": BENT, "feet": FEET}
TO_TWO = TWO.pose @ np.linalg.inv(ONE.pose)


def ramp(body: np.ndarray) -> np.ndarray:
    """HU within the patient: linear, so that linear interpolation keeps it."""
    return 40 + body @ [0.8, -0.6, 0.5]


def in_body(body: np.ndarray, share: float = 1.0) -> np.ndarray:
    return ((body / (85, 75, 85)) ** 2).sum(axis=-1) < share**2


def image(scan: Scan) -> np.ndarray:
    body = scan.body(scan.places)
    return np.where(in_body(body), ramp(body), -1000).astype(np.float32)


def labels(scan: Scan) -> np.ndarray:
    body = scan.body(scan.places)
    array = np.zeros(scan.shape, np.uint16)
    for name, number in NAMES.items():
        array[np.linalg.norm(body - CENTRES[name], axis=-1) < RADII[name]] = number
    return array


def save(path, array, affine):
    """Write a NIfTI whose two forms have different codes, and whose header names somebody."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = nib.Nifti1Image(array, affine)
    picture.set_sform(affine, 2)
    picture.set_qform(affine, 1)
    for field in ("descrip", "aux_file", "db_name", "intent_name"):
        picture.header[field] = TEXT
    picture.header.extensions.append(nib.nifti1.Nifti1Extension("comment", TEXT))
    nib.save(picture, path)
    return path


def exact(model, exam):
    """In the place of `deepatlas.embedding.embed`: the true coordinates of an exam, by its name."""
    prepared = prepare(exam, SIZE, "exam")
    mm = apply(prepared.box_to_mm, grid.identity((SIZE,) * 3, torch.float64)[0].flatten(1).T.numpy())
    c = apply(np.linalg.inv(model.atlas_to_mm.numpy()) @ ONE.pose, SCANS[exam.name].body(mm))
    return Embedded(prepared, torch.from_numpy(c.T.reshape(1, 3, *(SIZE,) * 3)).float())


@pytest.fixture(scope="module", autouse=True)
def known_maps():
    with pytest.MonkeyPatch.context() as patch:
        for module in (embedding, importlib.import_module("deepatlas.locate")):
            patch.setattr(module, "embed", exact)
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Every exam, and its label map."""
    folder = tmp_path_factory.mktemp("images")
    for name, scan in SCANS.items():
        save(folder / f"{name}.nii.gz", image(scan), scan.affine)
        save(folder / "labels" / f"{name}.nii.gz", labels(scan), scan.affine)
    return folder


@pytest.fixture(scope="module")
def taught(images, tmp_path_factory):
    """A model of exam one, with two structures."""
    prepared = prepare(files.read_exam(images / "one.nii.gz"), SIZE, "exam")
    seen = torch.from_numpy(prepared.image)[None, None]
    torch.manual_seed(0)
    model = Model(
        CoordinateNetwork(NetworkConfig(size=SIZE, widths=(8, 16), head_channels=8)),
        Autoencoder(),
        grid.sample(seen, grid.identity((SIZE,) * 3) / MARGIN),
        torch.from_numpy(prepared.box_to_mm),
        "exam",
        0,
        "one",
        {},
    )
    deepatlas.define(model, images / "one.nii.gz", images / "labels" / "one.nii.gz", NAMES)
    folder = tmp_path_factory.mktemp("taught") / "small"
    checkpoint.save(model, folder)
    return folder


@pytest.fixture
def model(taught, tmp_path):
    """A copy that may be changed."""
    return shutil.copytree(taught, tmp_path / "model")


@pytest.fixture
def some(images, tmp_path):
    """A function that puts a few exams into a folder; "bad" is one that cannot be read."""

    def folder(*names):
        (tmp_path / "some").mkdir()
        for name in names:
            if name == "bad":
                (tmp_path / "some" / "bad.nii.gz").write_bytes(b"not a NIfTI")
            else:
                shutil.copy(images / f"{name}.nii.gz", tmp_path / "some")
        return tmp_path / "some"

    return folder


def told(path, about):
    path.write_text(json.dumps(about))
    return path


def marked(path, points, frame="RAS"):
    return told(path, {"frame": frame, "unit": "mm", "points": points})


def corners(centre, axes, size) -> np.ndarray:
    """Eight corners of a box, in an order that does not depend on how its axes are told."""
    signs = np.array(list(product((-0.5, 0.5), repeat=3)))
    places = np.asarray(centre) + (signs * size) @ np.asarray(axes).T
    return places[np.lexsort(np.round(places).T)]


def told_corners(one) -> np.ndarray:
    return corners(one["center"], np.transpose(one["axes"]), one["size"])


MARKS = {"a": [-10.0, 5, 60], "b": [40.0, -30, 20]}  # mm of exam one
LOST = {"beyond": [400.0, 0, 0]}
BOX = {"center": [15, -20, 40], "size": [60, 50, 70], "axes": np.eye(3).tolist()}
"""Of exam one, around the middle of the body, along the axes of the atlas."""


@pytest.fixture
def drawn(tmp_path):
    """A file with a box drawn on exam one."""
    return told(tmp_path / "box.json", {"frame": "RAS", "unit": "mm", "box": BOX})


# points


def test_points_go_where_the_patient_went(call, taught, images, tmp_path):
    asked = marked(tmp_path / "p.json", MARKS | LOST)
    out = tmp_path / "new" / "out.json"
    common = ["points", "-m", taught, "-f", images / "one.nii.gz", "-p", asked]
    code, said, _ = call(*common, "-t", images / "two.nii.gz", "-o", out)
    assert code == 0
    assert "2 of 3 points lie in two" in said
    answer = json.loads(out.read_text())
    assert answer.keys() == {"frame", "unit", "points", "confidence"}
    assert (answer["frame"], answer["unit"]) == ("RAS", "mm")
    assert list(answer["points"]) == ["a", "b", "beyond"]
    assert answer["points"]["beyond"] is None
    for name, mm in MARKS.items():
        np.testing.assert_allclose(answer["points"][name], apply(TO_TWO, mm), atol=0.1)
    assert answer["confidence"].keys() == MARKS.keys()
    assert all(0 <= sure <= 1 for sure in answer["confidence"].values())


def test_points_between_exams_that_are_fitted_to_each_other_go_to_the_same_place(call, taught, images, tmp_path):
    asked = marked(tmp_path / "p.json", MARKS | LOST)
    out = tmp_path / "out.json"
    common = ["points", "-m", taught, "-f", images / "one.nii.gz", "-p", asked, "-t", images / "two.nii.gz"]
    assert call(*common, "-o", out, "--pairwise")[0] == 0
    found = json.loads(out.read_text())["points"]
    assert found.pop("beyond") is None
    for name, mm in found.items():  # the fit has little to go by: a smooth ramp
        np.testing.assert_allclose(mm, apply(TO_TWO, MARKS[name]), atol=8)
    assert call(*common, "-o", tmp_path / "plain.json")[0] == 0
    assert found != {n: mm for n, mm in json.loads((tmp_path / "plain.json").read_text())["points"].items() if mm}


def test_a_point_outside_the_view_of_the_other_exam_is_null(call, taught, images, tmp_path):
    high, low = apply(ONE.pose, [[0, 0, 50], [0, 0, -40]])
    asked = marked(tmp_path / "p.json", {"high": high.tolist(), "low": low.tolist()})
    out = tmp_path / "out.json"
    assert (
        call("points", "-m", taught, "-f", images / "one.nii.gz", "-p", asked, "-t", images / "slab.nii.gz", "-o", out)[
            0
        ]
        == 0
    )
    answer = json.loads(out.read_text())
    np.testing.assert_allclose(answer["points"]["high"], apply(SLAB.pose, [0, 0, 50]), atol=0.1)
    assert answer["points"]["low"] is None
    assert list(answer["confidence"]) == ["high"]


def test_points_of_every_kind_of_file_go_to_the_same_place(call, taught, images, tmp_path):
    common = ["points", "-m", taught, "-f", images / "one.nii.gz", "-t", images / "two.nii.gz", "-p"]
    lps = {name: (FLIP * mm).tolist() for name, mm in MARKS.items()}
    rows = [f"{name},{x},{y},{z}" for name, (x, y, z) in lps.items()]
    (tmp_path / "p.csv").write_text("\n".join(["name,x,y,z", *rows]))
    listed = [{"label": name, "position": mm, "positionStatus": "defined"} for name, mm in lps.items()]
    listed = {"type": "Fiducial", "coordinateSystem": "LPS", "controlPoints": listed}
    told(tmp_path / "p.mrk.json", {"markups": [listed]})
    marked(tmp_path / "lps.json", lps, "LPS")
    wanted = {name: apply(TO_TWO, mm) for name, mm in MARKS.items()}
    assert call(*common, tmp_path / "lps.json", "-o", tmp_path / "ras.json")[0] == 0
    assert call(*common, tmp_path / "lps.json", "-o", tmp_path / "flipped.json", "--frame", "LPS")[0] == 0
    assert call(*common, tmp_path / "p.csv", "-o", tmp_path / "out.csv", "--frame", "LPS")[0] == 0
    assert call(*common, tmp_path / "p.mrk.json", "-o", tmp_path / "out.mrk.json")[0] == 0
    ras, flipped = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("ras", "flipped"))
    rows = {row["name"]: row for row in csv.DictReader((tmp_path / "out.csv").read_text().splitlines())}
    (markup,) = json.loads((tmp_path / "out.mrk.json").read_text())["markups"]
    assert (ras["frame"], flipped["frame"], markup["coordinateSystem"]) == ("RAS", "LPS", "LPS")
    listed = {one["label"]: one["position"] for one in markup["controlPoints"]}
    for name, mm in wanted.items():
        np.testing.assert_allclose(ras["points"][name], mm, atol=0.1)
        np.testing.assert_allclose(flipped["points"][name], FLIP * mm, atol=0.1)
        np.testing.assert_allclose([float(rows[name][axis]) for axis in "xyz"], FLIP * mm, atol=0.1)
        np.testing.assert_allclose(listed[name], FLIP * mm, atol=0.1)
        assert float(rows[name]["confidence"]) == pytest.approx(ras["confidence"][name], abs=1e-3)


def test_a_point_in_the_air_beside_the_patient_is_nowhere(call, taught, images, tmp_path):
    beside = marked(tmp_path / "p.json", MARKS | {"air": [0, 130, 40]})
    one, out = images / "one.nii.gz", tmp_path / "o.json"
    assert call("points", "-m", taught, "-f", one, "-p", beside, "-t", one, "-o", out)[0] == 0
    points = json.loads(out.read_text())["points"]
    assert points["air"] is None
    np.testing.assert_allclose(points["a"], MARKS["a"], atol=0.1)


def test_points_in_a_folder_go_on_after_a_broken_exam(call, taught, images, some, tmp_path):
    asked = marked(tmp_path / "p.json", MARKS)
    common = ["points", "-m", taught, "-f", images / "one.nii.gz", "-p", asked]
    code, _, err = call(*common, "-t", some("one", "bad", "two"), "-o", tmp_path / "out")
    assert code == 3
    assert "failed: bad: " in err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"one.json", "two.json", "failed.json"}
    failed = json.loads((tmp_path / "out" / "failed.json").read_text())
    assert list(failed) == ["bad"]
    assert str(tmp_path) not in failed["bad"]
    found = json.loads((tmp_path / "out" / "one.json").read_text())["points"]
    for name, mm in MARKS.items():
        np.testing.assert_allclose(found[name], mm, atol=0.1)


@pytest.mark.parametrize("name", ["p.csv", "p.mrk.json"])
def test_in_a_folder_every_answer_is_a_file_like_the_first(call, taught, images, some, tmp_path, name):
    listed = {"type": "Fiducial", "controlPoints": [{"label": "a", "position": [10, -5, 60]}]}
    text = "name,x,y,z\na,-10,5,60\n" if name == "p.csv" else json.dumps({"markups": [listed]})
    (tmp_path / name).write_text(text)
    common = ["points", "-m", taught, "-f", images / "one.nii.gz", "-p", tmp_path / name]
    assert call(*common, "-t", some("two"), "-o", tmp_path / "out")[0] == 0
    (path,) = (tmp_path / "out").iterdir()
    assert path.name == name.replace("p", "two", 1)


def test_bad_points_are_refused(call, taught, images, tmp_path):
    one, two = images / "one.nii.gz", images / "two.nii.gz"
    out = tmp_path / "out.json"
    good = marked(tmp_path / "p.json", MARKS)

    def asked(path, source=one, target=two, model=taught):
        return call("points", "-m", model, "-f", source, "-p", path, "-t", target, "-o", out)

    refused(asked(tmp_path / "none.json"), "none.json")
    refused(asked(marked(tmp_path / "frame.json", MARKS, "XYZ")), "frame.json", "XYZ")
    refused(asked(told(tmp_path / "unit.json", {"unit": "cm", "points": MARKS})), "unit.json", "cm")
    refused(asked(told(tmp_path / "list.json", [1])), "list.json")
    refused(asked(good, source=images / "none.nii.gz"), "none.nii.gz")
    refused(asked(good, target=images / "none.nii.gz"), "none.nii.gz")
    refused(asked(good, model=tmp_path / "nowhere"), "nowhere")
    assert not out.exists()
    assert call("points", "-m", taught, "-f", one, "-p", good, "-t", two, "-o", out, "--frame", "XYZ")[0] == 2
    assert call("points", "-m", taught, "-f", one, "-t", two, "-o", out)[0] == 2
    assert call("points", "-m", taught, "-t", two, "-o", out, "--pairwise")[0] == 2


# boxes


def test_a_box_turns_and_grows_with_the_patient(call, taught, images, drawn, tmp_path):
    common = ["boxes", "-m", taught, "-f", images / "one.nii.gz", "--box", drawn, "-i", images / "two.nii.gz", "-o"]
    assert call(*common, tmp_path / "out.json")[0] == 0
    assert call(*common, tmp_path / "lps.json", "--frame", "LPS")[0] == 0
    assert call(*common, tmp_path / "aligned.json", "--aligned")[0] == 0
    wanted = corners(apply(TO_TWO, BOX["center"]), turned(0.2, 0.3), 1.1 * np.array(BOX["size"]))
    ras, lps, aligned = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("out", "lps", "aligned"))
    assert (ras["frame"], ras["unit"], list(ras["boxes"]), lps["frame"]) == ("RAS", "mm", ["box"], "LPS")
    np.testing.assert_allclose(told_corners(ras["boxes"]["box"]), wanted, atol=0.2)
    there = told_corners(lps["boxes"]["box"]) * FLIP
    np.testing.assert_allclose(there[np.lexsort(np.round(there).T)], wanted, atol=0.2)
    low, high = wanted.min(axis=0), wanted.max(axis=0)
    for one in (ras["boxes"]["box"], aligned["boxes"]["box"]):
        np.testing.assert_allclose([one["min"], one["max"]], [low, high], atol=0.2)
    np.testing.assert_allclose(aligned["boxes"]["box"]["size"], high - low, atol=0.3)
    np.testing.assert_allclose(np.abs(aligned["boxes"]["box"]["axes"]), np.eye(3))


def test_a_box_turned_in_the_patient_comes_back_as_it_was_drawn(call, taught, images, tmp_path):
    axes, one, out = turned(0.5, -0.3), images / "one.nii.gz", tmp_path / "out.json"
    box = told(tmp_path / "box.json", {"frame": "RAS", "unit": "mm", "box": BOX | {"axes": axes.T.tolist()}})
    assert call("boxes", "-m", taught, "-f", one, "--box", box, "-i", one, "-o", out)[0] == 0
    found = json.loads(out.read_text())["boxes"]["box"]
    np.testing.assert_allclose(told_corners(found), corners(BOX["center"], axes, np.array(BOX["size"])), atol=0.5)


def test_boxes_around_structures_and_null_where_they_are_not(call, taught, images, tmp_path):
    code, said, _ = call("boxes", "-m", taught, "-i", images / "slab.nii.gz", "-o", tmp_path / "out.json")
    assert code == 0
    assert "1 of 2 boxes lie in slab" in said
    found = json.loads((tmp_path / "out.json").read_text())["boxes"]
    assert list(found) == ["organ", "gland"]
    assert found["gland"] is None
    np.testing.assert_allclose(found["organ"]["center"], apply(SLAB.pose, CENTRES["organ"]), atol=3)
    np.testing.assert_allclose(found["organ"]["size"], 2 * RADII["organ"], atol=9)  # a voxel of exam one
    assert (
        call("boxes", "-m", taught, "-i", images / "two.nii.gz", "--roi", "gland", "-o", tmp_path / "b.mrk.json")[0]
        == 0
    )
    (markup,) = json.loads((tmp_path / "b.mrk.json").read_text())["markups"]
    assert markup["controlPoints"][0]["label"] == "gland"
    np.testing.assert_allclose(FLIP * markup["center"], apply(TWO.pose, CENTRES["gland"]), atol=3)


def test_boxes_in_a_folder_go_on_after_a_broken_exam(call, taught, some, tmp_path):
    code, _, err = call("boxes", "-m", taught, "-i", some("bad", "two"), "--roi", "organ,gland", "-o", tmp_path / "out")
    assert code == 3
    assert "failed: bad: " in err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"two.json", "failed.json"}
    assert list(json.loads((tmp_path / "out" / "failed.json").read_text())) == ["bad"]


def test_bad_boxes_are_refused(call, taught, images, drawn, tmp_path):
    one, two, out = images / "one.nii.gz", images / "two.nii.gz", tmp_path / "out.json"
    common = ["boxes", "-m", taught, "-i", two, "-o", out]
    assert call(*common, "--box", drawn)[0] == 2
    assert call(*common, "-f", one)[0] == 2
    assert call(*common, "--frame", "XYZ")[0] == 2
    refused(call(*common, "--roi", "organ,nose"), "nose", "gland")
    flat = told(tmp_path / "flat.json", {"box": {"min": [0, 0, 0], "max": [10, 0, 10]}})
    refused(call(*common, "-f", one, "--box", flat), "flat.json")
    far = told(tmp_path / "far.json", {"box": {"min": [500, 0, 0], "max": [510, 10, 10]}})
    refused(call(*common, "-f", one, "--box", far), "outside the patient")
    assert not out.exists()


# roi


def test_a_region_around_structures_has_its_margin(call, model, images):
    sizes = {}
    for name, listed, margin in (("tight", "organ", 0), ("wide", "organ", 12), ("both", "organ,gland", 0)):
        code, said, _ = call("roi", "-m", model, "--name", name, "--structures", listed, "--margin", margin)
        assert code == 0
        assert said.startswith(f"{name}: ")
        assert said.endswith("mm in the seed exam.\n")
        low, high = checkpoint.load(model).regions[name].box_atlas.numpy()
        sizes[name] = (high - low) * np.linalg.norm(checkpoint.load(model).atlas_to_mm.numpy()[:3, :3], axis=0)
        assert [float(word) for word in said.split(":")[1].split(" mm")[0].split("×")] == pytest.approx(
            sizes[name], abs=1
        )
    assert list(checkpoint.load(model).regions) == ["tight", "wide", "both"]
    np.testing.assert_allclose(sizes["tight"], 2 * RADII["organ"], atol=9)
    np.testing.assert_allclose(sizes["wide"] - sizes["tight"], 24, atol=1e-3)
    ends = np.array([CENTRES["organ"], CENTRES["gland"]])  # the patient is upright, his grid is not
    reach = np.array([[RADII["organ"]], [RADII["gland"]]])
    np.testing.assert_allclose(sizes["both"], (ends + reach).max(axis=0) - (ends - reach).min(axis=0), atol=9)
    assert list(checkpoint.load(model).structures) == list(NAMES)


def test_a_region_is_a_box_drawn_on_an_exam_and_replaces_one_of_its_name(call, model, images, drawn):
    assert call("roi", "-m", model, "--name", "mid", "--structures", "organ")[0] == 0
    common = ["roi", "-m", model, "--name", "mid", "-i", images / "one.nii.gz", "--box", drawn]
    code, said, _ = call(*common)
    assert code == 0
    assert "60 × 50 × 70 mm" in said
    assert "instead of the one before" in said
    assert "80 × 70 × 90 mm" in call(*common, "--margin", 10)[1]
    assert list(checkpoint.load(model).regions) == ["mid"]


def test_a_region_that_cannot_be_is_refused(call, model, taught, images, drawn, tmp_path, monkeypatch):
    one, common = images / "one.nii.gz", ["roi", "-m", model, "--name", "mid"]
    for usage in (
        [],
        ["--structures", "organ", "-i", one, "--box", drawn],
        ["--structures", "organ", "-i", one],
        ["--box", drawn],
        ["-i", one],
        ["--structures", "organ", "--margin", -1],
    ):
        assert call(*common, *usage)[0] == 2, usage
    refused(call(*common, "--structures", "organ,nose"), "nose", "gland")
    refused(call(*common, "--structures", ","), "mid")
    refused(call("roi", "-m", model, "--name", "gland", "--structures", "organ"), "gland")
    pair = told(tmp_path / "pair.json", {"boxes": {"a": BOX, "b": BOX}})
    refused(call(*common, "-i", one, "--box", pair), "pair.json", "2")
    far = told(tmp_path / "far.json", {"box": {"min": [500, 0, 0], "max": [510, 10, 10]}})
    refused(call(*common, "-i", one, "--box", far), "mid", "outside the patient")
    refused(call(*common, "-i", one, "--box", tmp_path / "none.json"), "none.json")
    assert checkpoint.load(model).regions == {}
    monkeypatch.setattr(checkpoint, "shipped", lambda: [taught])
    refused(call("roi", "-m", taught, "--name", "mid", "--structures", "organ"), "copy")


def test_a_structure_does_not_take_the_name_of_a_region(call, model, images, tmp_path):
    assert call("roi", "-m", model, "--name", "mid", "--structures", "organ")[0] == 0
    names = told(tmp_path / "labels.json", {"mid": 7})
    drawn = ["-l", images / "labels" / "one.nii.gz", "--names", names]
    refused(call("define", "-m", model, "-i", images / "one.nii.gz", *drawn), "mid", "region")
    refused(call("structures", "rename", "organ", "mid", "-m", model), "mid", "region")
    assert list(checkpoint.load(model).structures) == list(NAMES)


@pytest.mark.parametrize(
    "how",
    [
        ["--name", "mid", "--margin", "inf"],
        ["--name", ""],
        ["--name", "a,b"],
    ],
)
def test_a_region_of_no_use_is_not_saved(call, model, how):
    assert call("roi", "-m", model, "--structures", "organ", *how)[0] in (1, 2)
    assert checkpoint.load(model).regions == {}


# crop and uncrop


@pytest.fixture
def with_mid(call, model, images, drawn):
    """A model with the region `mid`: the box drawn on exam one."""
    assert call("roi", "-m", model, "--name", "mid", "-i", images / "one.nii.gz", "--box", drawn)[0] == 0
    return model


def test_a_crop_lies_where_its_affine_says(call, with_mid, images, tmp_path):
    out = tmp_path / "crop.nii.gz"
    code, said, _ = call("crop", "-m", with_mid, "-i", images / "two.nii.gz", "--roi", "mid", "--spacing", 2, "-o", out)
    assert code == 0
    assert "mid, present, coverage 100%" in said
    crop = nib.load(out)
    assert crop.shape == (33, 28, 39)  # 1.1 · (60, 50, 70) / 2, and one more where rounding leaves a crumb
    np.testing.assert_allclose(crop.affine[:3, :3] / 2, turned(0.2, 0.3), atol=1e-3)
    places = apply(crop.affine, np.moveaxis(np.indices(crop.shape), 0, -1))
    np.testing.assert_allclose(places.mean(axis=(0, 1, 2)), apply(TO_TWO, BOX["center"]), atol=0.1)
    np.testing.assert_allclose(np.asarray(crop.dataobj), ramp(TWO.body(places)), atol=0.1)


def test_the_standard_view_is_the_same_in_every_exam(call, with_mid, images, tmp_path):
    views = []
    for name in ("one", "two"):
        out = tmp_path / f"{name}_view.nii.gz"
        assert (
            call("crop", "-m", with_mid, "-i", images / f"{name}.nii.gz", "--roi", "mid", "--size", 12, "-o", out)[0]
            == 0
        )
        views.append(nib.load(out))
    assert [view.shape for view in views] == [(12, 12, 12)] * 2
    one, two = (np.asarray(view.dataobj) for view in views)
    np.testing.assert_allclose(one, two, atol=0.2)
    assert one.std() > 5
    np.testing.assert_allclose(views[1].header.get_zooms(), 1.1 * np.array(views[0].header.get_zooms()), rtol=1e-2)


def test_without_a_spacing_a_crop_is_as_fine_as_its_exam(call, with_mid, images, tmp_path):
    out = tmp_path / "crop.nii"
    assert call("crop", "-m", with_mid, "-i", images / "two.nii.gz", "--roi", "mid", "-o", out)[0] == 0
    np.testing.assert_allclose(nib.load(out).header.get_zooms(), 6, rtol=1e-5)
    assert (tmp_path / "crop.json").exists()


def test_the_json_beside_a_crop_says_where_it_came_from(call, with_mid, images, tmp_path):
    out = tmp_path / "crop.nii.gz"
    assert call("crop", "-m", with_mid, "-i", images / "two.nii.gz", "--roi", "mid", "--spacing", 3, "-o", out)[0] == 0
    about, given, crop = (
        json.loads((tmp_path / "crop.json").read_text()),
        nib.load(images / "two.nii.gz"),
        nib.load(out),
    )
    assert (about["exam"], about["roi"], about["status"], about["coverage"]) == ("two", "mid", "present", 1)
    assert (about["frame"], about["unit"]) == ("RAS", "mm")
    assert tuple(about["crop"]["shape"]) == crop.shape
    np.testing.assert_allclose(about["crop"]["affine"], crop.affine, atol=1e-4)
    assert tuple(about["original"]["shape"]) == given.shape
    np.testing.assert_allclose(about["original"]["affine"], given.affine, atol=1e-5)


def test_an_uncropped_label_map_is_the_one_it_was_cropped_from(call, model, images, tmp_path):
    exam, drawn = images / "two.nii.gz", images / "labels" / "two.nii.gz"
    assert call("roi", "-m", model, "--name", "zone", "--structures", "organ,gland", "--margin", 5)[0] == 0
    crop, full = tmp_path / "crop.nii.gz", tmp_path / "full.nii.gz"
    assert call("crop", "-m", model, "-i", exam, "--roi", "zone", "--spacing", 2, "-l", drawn, "-o", crop)[0] == 0
    assert call("uncrop", "-i", crop, "--crop", tmp_path / "crop.json", "-o", full)[0] == 0
    cut, pasted, given = nib.load(crop), nib.load(full), nib.load(drawn)
    assert np.asarray(cut.dataobj).dtype.kind == "u"
    assert pasted.shape == given.shape
    assert np.array_equal(pasted.affine, given.affine)
    for form in ("sform_code", "qform_code"):
        assert int(pasted.header[form]) == int(given.header[form])
    index = apply(np.linalg.inv(cut.affine), TWO.places)
    inside = ((index >= 0) & (index <= np.array(cut.shape) - 1)).all(axis=-1)
    outside = ((index < -1) | (index > cut.shape)).any(axis=-1)
    values, truth = np.asarray(pasted.dataobj), np.asarray(given.dataobj)
    assert np.count_nonzero(truth[inside] == 7) > 200
    assert np.count_nonzero(truth[inside] == 300) > 20
    np.testing.assert_array_equal(values[inside], truth[inside])  # 2 mm are finer than half a voxel of the exam
    assert not values[outside].any()


def test_values_are_pasted_linearly_and_are_0_elsewhere(call, with_mid, images, tmp_path):
    crop, full = tmp_path / "crop.nii.gz", tmp_path / "full.nii.gz"
    assert call("crop", "-m", with_mid, "-i", images / "one.nii.gz", "--roi", "mid", "--spacing", 4, "-o", crop)[0] == 0
    code, said, _ = call("uncrop", "-i", crop, "--crop", tmp_path / "crop.json", "-o", full)
    assert code == 0
    assert "on the grid of one" in said
    cut, pasted = nib.load(crop), nib.load(full)
    index = apply(np.linalg.inv(cut.affine), ONE.places)
    inside = ((index >= 0) & (index <= np.array(cut.shape) - 1)).all(axis=-1)
    values = np.asarray(pasted.dataobj)
    np.testing.assert_allclose(values[inside], ramp(ONE.body(ONE.places))[inside], atol=0.1)
    assert inside.sum() > 300
    assert not values[((index < -1) | (index > cut.shape)).any(axis=-1)].any()


def test_whole_numbers_below_0_are_pasted_as_they_are(call, with_mid, images, tmp_path):
    crop = tmp_path / "crop.nii.gz"
    assert call("crop", "-m", with_mid, "-i", images / "one.nii.gz", "--roi", "mid", "--spacing", 4, "-o", crop)[0] == 0
    cut = nib.load(crop)
    result = np.full(cut.shape, -3, np.int16)
    result[: len(result) // 2] = 1000
    mine = save(tmp_path / "mine.nii.gz", result, cut.affine)
    assert call("uncrop", "-i", mine, "--crop", tmp_path / "crop.json", "-o", tmp_path / "full.nii.gz")[0] == 0
    assert set(np.unique(np.asarray(nib.load(tmp_path / "full.nii.gz").dataobj))) == {-3, 0, 1000}


def test_crops_of_a_folder_go_on_where_a_region_is_not_there(call, taught, some, tmp_path):
    code, _, err = call(
        "crop", "-m", taught, "-i", some("bad", "slab", "two"), "--roi", "gland", "--spacing", 4, "-o", tmp_path / "out"
    )
    assert code == 3
    assert "failed: slab: " in err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"two.nii.gz", "two.json", "failed.json"}
    failed = json.loads((tmp_path / "out" / "failed.json").read_text())
    assert list(failed) == ["bad", "slab"]
    assert "gland is not in this scan" in failed["slab"]


def test_a_crop_that_cannot_be_is_refused(call, taught, images, some, tmp_path):
    out, two = ["-o", tmp_path / "crop.nii.gz"], images / "two.nii.gz"
    common = ["crop", "-m", taught, "--roi", "gland"]
    refused(call("crop", "-m", taught, "--roi", "nose", "-i", two, *out), "nose", "organ", "gland")
    refused(call(*common, "-i", images / "slab.nii.gz", *out), "slab.nii.gz", "gland")
    refused(call(*common, "-i", two, "-l", images / "labels" / "one.nii.gz", *out), "one.nii.gz")
    refused(call(*common, "-i", two, "--spacing", 4, "-o", tmp_path / "crop.mha"), "crop.mha")
    huge = checkpoint.load(taught)
    low, high = torch.tensor([-0.9] * 3), torch.tensor([0.9] * 3)
    region = deepatlas.atlas.Region("all", torch.stack([low, high]), torch.ones(16, 16, 16).bool())
    checkpoint.save(huge.with_regions(region), tmp_path / "huge")
    refused(call("crop", "-m", tmp_path / "huge", "--roi", "all", "-i", two, "--spacing", 0.1, *out), "spacing")
    assert call(*common, "-i", two, *out, "--spacing", 2, "--size", 16)[0] == 2
    assert call(*common, "-i", some("one", "two"), "-l", images / "labels" / "one.nii.gz", *out)[0] == 2
    assert not any(tmp_path.glob("crop*"))


def test_uncrop_wants_the_json_of_a_crop(call, with_mid, images, tmp_path):
    crop, out = tmp_path / "crop.nii.gz", tmp_path / "full.nii.gz"
    assert call("crop", "-m", with_mid, "-i", images / "one.nii.gz", "--roi", "mid", "--spacing", 8, "-o", crop)[0] == 0
    about = json.loads((tmp_path / "crop.json").read_text())
    original = about["original"]
    broken = [
        {},
        about | {"version": 99},
        about | {"format": "other"},
        {key: value for key, value in about.items() if key != "original"},
        about | {"original": original | {"header": "DOE^JANE"}},
        about | {"original": original | {"shape": [3, 4]}},
        about | {"original": original | {"shape": [10**6] * 3}},
        about | {"original": original | {"affine": np.zeros((4, 4)).tolist()}},
        about | {"original": original | {"affine": [[1, 0]]}},
    ]
    for record in broken:
        refused(call("uncrop", "-i", crop, "--crop", told(tmp_path / "x.json", record), "-o", out), "x.json")
    (tmp_path / "x.json").write_text("a diary")
    refused(call("uncrop", "-i", crop, "--crop", tmp_path / "x.json", "-o", out), "x.json")
    refused(call("uncrop", "-i", crop, "--crop", tmp_path / "none.json", "-o", out), "none.json")
    refused(call("uncrop", "-i", tmp_path / "none.nii.gz", "--crop", tmp_path / "crop.json", "-o", out), "none.nii.gz")
    assert not out.exists()


def test_uncrop_refuses_half_a_header(call, with_mid, images, tmp_path):
    crop = tmp_path / "crop.nii.gz"
    assert call("crop", "-m", with_mid, "-i", images / "one.nii.gz", "--roi", "mid", "--spacing", 8, "-o", crop)[0] == 0
    about = json.loads((tmp_path / "crop.json").read_text())
    about["original"]["header"] = about["original"]["header"][:100]
    refused(
        call("uncrop", "-i", crop, "--crop", told(tmp_path / "x.json", about), "-o", tmp_path / "f.nii.gz"), "x.json"
    )


def test_uncrop_refuses_the_result_of_another_crop(call, with_mid, images, tmp_path):
    for name, spacing in (("a", 8), ("b", 9)):
        crop = tmp_path / f"{name}.nii.gz"
        assert (
            call("crop", "-m", with_mid, "-i", images / "one.nii.gz", "--roi", "mid", "--spacing", spacing, "-o", crop)[
                0
            ]
            == 0
        )
    refused(
        call("uncrop", "-i", tmp_path / "a.nii.gz", "--crop", tmp_path / "b.json", "-o", tmp_path / "f.nii.gz"), "crop"
    )


def test_labels_stored_as_floats_are_labels_all_the_same(call, with_mid, images, tmp_path):
    crop = tmp_path / "crop.nii.gz"
    assert call("crop", "-m", with_mid, "-i", images / "one.nii.gz", "--roi", "mid", "--spacing", 8, "-o", crop)[0] == 0
    image = nib.load(crop)
    numbers = np.where(np.indices(image.shape).sum(axis=0) % 3 == 0, 300.0, 0.0).astype(np.float32)
    nib.save(nib.Nifti1Image(numbers, image.affine), tmp_path / "result.nii.gz")
    out = tmp_path / "full.nii.gz"
    assert call("uncrop", "-i", tmp_path / "result.nii.gz", "--crop", tmp_path / "crop.json", "-o", out)[0] == 0
    assert set(np.unique(np.asarray(nib.load(out).dataobj))) == {0, 300}


# coverage


def test_coverage_is_a_table_of_exams_and_regions(call, taught, some, tmp_path):
    out = tmp_path / "new" / "coverage.csv"
    code, said, _ = call(
        "coverage", "-m", taught, "-i", some("slab", "two"), "--roi", "organ,gland", "-o", out, "--at-least", 0.9
    )
    assert code == 0
    assert said.split() == ["two"]
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert list(rows[0]) == ["exam", "roi", "coverage", "status"]
    assert [(row["exam"], row["roi"], row["status"]) for row in rows] == [
        ("slab", "organ", "cut_off"),
        ("slab", "gland", "absent"),
        ("two", "organ", "present"),
        ("two", "gland", "present"),
    ]
    height = CENTRES["organ"][2] + RADII["organ"] - 15  # of the cap of the organ that the slab shows
    share = height**2 * (3 * RADII["organ"] - height) / (4 * RADII["organ"] ** 3)
    assert float(rows[0]["coverage"]) == pytest.approx(share, abs=0.06)
    assert float(rows[1]["coverage"]) == 0
    assert float(rows[2]["coverage"]) > 0.99


def test_an_exam_unlike_any_that_was_learned_covers_nothing(call, model, images, tmp_path):
    about = json.loads((model / "model.json").read_text())
    told(model / "model.json", about | {"familiar": 2.0})
    out = tmp_path / "coverage.csv"
    code, _, err = call("coverage", "-m", model, "-i", images / "one.nii.gz", "--roi", "organ,gland", "-o", out)
    assert (code, err.count("one: unlike every exam that the model learned from")) == (0, 1)
    assert list(csv.reader(out.read_text().splitlines()))[1] == ["one", "organ", "0.0000", "absent"]


def test_nothing_is_placed_in_an_exam_unlike_any_that_was_learned(call, model, images, tmp_path):
    about = json.loads((model / "model.json").read_text())
    told(model / "model.json", about | {"familiar": 2.0})
    one, asked = images / "one.nii.gz", marked(tmp_path / "p.json", MARKS)
    assert call("boxes", "-m", model, "-i", one, "--roi", "organ", "-o", tmp_path / "b.json")[0] == 0
    assert json.loads((tmp_path / "b.json").read_text())["boxes"] == {"organ": None}
    refused(call("crop", "-m", model, "-i", one, "--roi", "organ", "-o", tmp_path / "c.nii.gz"), "not in this scan")
    refused(call("points", "-m", model, "-f", one, "-p", asked, "-t", one, "-o", tmp_path / "o.json"), "unlike")
    refused(call("mark", "-m", model, "-i", one, "-p", asked), "unlike")
    refused(call("register", "-m", model, "-f", one, "-v", one, "-o", tmp_path / "r"), "unlike")


def test_coverage_of_a_folder_goes_on_after_a_broken_exam(call, taught, some, tmp_path):
    out = tmp_path / "out" / "coverage.csv"
    code, _, err = call("coverage", "-m", taught, "-i", some("bad", "two"), "--roi", "organ", "-o", out)
    assert code == 3
    assert "failed: bad: " in err
    assert [row["exam"] for row in csv.DictReader(out.read_text().splitlines())] == ["two"]
    (path,) = out.parent.glob("*failed.json")
    assert list(json.loads(path.read_text())) == ["bad"]


def test_coverage_that_cannot_be_told_is_refused(call, taught, images, tmp_path):
    out = tmp_path / "coverage.csv"
    refused(call("coverage", "-m", taught, "-i", images / "two.nii.gz", "--roi", "organ,nose", "-o", out), "nose")
    refused(call("coverage", "-m", taught, "-i", tmp_path / "none", "--roi", "organ", "-o", out), "none")
    assert call("coverage", "-m", taught, "-i", images / "two.nii.gz", "-o", out)[0] == 2
    assert not out.exists()


def test_coverage_of_nothing_is_refused(call, taught, images, tmp_path):
    assert call("coverage", "-m", taught, "-i", images / "two.nii.gz", "--roi", ",", "-o", tmp_path / "c.csv")[0] in (
        1,
        2,
    )


def test_a_single_exam_that_cannot_be_read_has_no_coverage(call, taught, some, tmp_path):
    out = tmp_path / "coverage.csv"
    refused(call("coverage", "-m", taught, "-i", some("bad") / "bad.nii.gz", "--roi", "organ", "-o", out), "bad.nii.gz")


# register


def itk_matrix(path) -> np.ndarray:
    """A linear ITK transform (LPS) as a matrix mm → mm, RAS."""
    lines = dict(line.split(": ", 1) for line in path.read_text().splitlines() if ": " in line)
    numbers = np.array(lines["Parameters"].split(), dtype=float)
    assert lines["FixedParameters"].split() == ["0"] * 3
    flip = np.diag([*FLIP, 1])
    return flip @ matrix(numbers[:9].reshape(3, 3), numbers[9:]) @ flip


def test_a_linear_registration_is_the_patients_motion(call, taught, images, tmp_path):
    out = tmp_path / "out"
    code, said, _ = call(
        "register", "-m", taught, "-f", images / "one.nii.gz", "-v", images / "two.nii.gz", "-o", out, "--linear",
        "-l", images / "labels" / "two.nii.gz",
    )  # fmt: skip
    assert code == 0
    assert "of one has a counterpart in two" in said
    assert {path.name for path in out.iterdir()} == {"moved.nii.gz", "moved_seg.nii.gz", "linear.tfm", "report.json"}
    np.testing.assert_allclose(itk_matrix(out / "linear.tfm"), TO_TWO, atol=0.05)
    report = json.loads((out / "report.json").read_text())
    assert (report["fixed"], report["moving"], report["linear"]) == ("one", "two", "affine")
    assert (report["deformable"], report["refined"], report["folded"]) == (False, False, 0)
    np.testing.assert_allclose(report["matrix_ras_mm"], TO_TWO, atol=0.05)
    assert report["overlap"] > 0.9  # all but the rim of the patient
    assert report["inverse_consistency_mm"]["median"] < 0.1
    moved, seg = nib.load(out / "moved.nii.gz"), nib.load(out / "moved_seg.nii.gz")
    for one in (moved, seg):
        assert one.shape == ONE.shape
        assert np.array_equal(one.affine, nib.load(images / "one.nii.gz").affine)
        assert (int(one.header["sform_code"]), int(one.header["qform_code"])) == (2, 1)
    body = ONE.body(ONE.places)
    deep = in_body(body, 0.8)
    np.testing.assert_allclose(np.asarray(moved.dataobj)[deep], ramp(body)[deep], atol=0.2)
    values, truth = np.asarray(seg.dataobj), labels(ONE)
    assert set(np.unique(values)) == {0, 7, 300}
    for number in NAMES.values():
        a, b = values == number, truth == number
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.9


@pytest.mark.parametrize(("kind", "scale"), [("rigid", 1.0), ("similarity", 1.1)])
def test_a_linear_map_may_be_held_to_a_kind(call, taught, images, tmp_path, kind, scale):
    common = ["register", "-m", taught, "-f", images / "one.nii.gz", "-v", images / "two.nii.gz", "--linear"]
    assert call(*common, "--kind", kind, "-o", tmp_path / "out")[0] == 0
    found = itk_matrix(tmp_path / "out" / "linear.tfm")
    np.testing.assert_allclose(found[:3, :3], scale * turned(0.2, 0.3), atol=1e-3)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["linear"] == kind
    assert call(*common, "--kind", "bent", "-o", tmp_path / "other")[0] == 2


def test_a_displacement_leads_from_the_fixed_exam_to_the_moving_one(call, taught, images, tmp_path):
    out = tmp_path / "out"
    assert call("register", "-m", taught, "-f", images / "bent.nii.gz", "-v", images / "one.nii.gz", "-o", out)[0] == 0
    fields = {"displacement.nii.gz", "jacobian.nii.gz"}
    assert {path.name for path in out.iterdir()} == {"moved.nii.gz", "linear.tfm", "report.json"} | fields
    field = nib.load(out / "displacement.nii.gz")
    assert field.shape == (*BENT.shape, 1, 3)
    assert field.get_data_dtype() == np.float32
    assert int(field.header["intent_code"]) == 1007  # NIFTI_INTENT_VECTOR
    assert np.array_equal(field.affine, nib.load(images / "bent.nii.gz").affine)
    body = BENT.body(BENT.places)
    deep = in_body(body, 0.8)
    there = BENT.places + FLIP * np.asarray(field.dataobj)[:, :, :, 0]
    wanted = apply(ONE.pose, body)
    assert np.linalg.norm(there - wanted, axis=-1)[deep].max() < 1
    linear = apply(itk_matrix(out / "linear.tfm"), BENT.places)
    assert np.linalg.norm(linear - wanted, axis=-1)[deep].max() > 2  # the bend is beyond a linear map
    np.testing.assert_allclose(np.asarray(nib.load(out / "moved.nii.gz").dataobj)[deep], ramp(body)[deep], atol=1)
    report = json.loads((out / "report.json").read_text())
    assert report["deformable"]
    assert report["folded"] == 0
    assert report["residual_mm"] > 0.3


def test_itk_reads_what_register_writes(call, taught, images, tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    out = tmp_path / "out"
    assert call("register", "-m", taught, "-f", images / "bent.nii.gz", "-v", images / "one.nii.gz", "-o", out)[0] == 0
    field = sitk.DisplacementFieldTransform(sitk.ReadImage(str(out / "displacement.nii.gz"), sitk.sitkVectorFloat64))
    linear = sitk.ReadTransform(str(out / "linear.tfm"))
    for body in ((0, 0, 0), (30, -40, 20), (-35, 30, -45)):
        mm = apply(BENT.pose, np.subtract(body, (10 * np.sin(body[1] / 40), 0, 0)))
        np.testing.assert_allclose(FLIP * field.TransformPoint((FLIP * mm).tolist()), apply(ONE.pose, body), atol=0.5)
        there = apply(itk_matrix(out / "linear.tfm"), mm)
        np.testing.assert_allclose(FLIP * linear.TransformPoint((FLIP * mm).tolist()), there, atol=1e-6)


def test_exams_of_different_views_are_registered_where_they_meet(call, taught, images, tmp_path):
    out = tmp_path / "out"
    assert call("register", "-m", taught, "-f", images / "one.nii.gz", "-v", images / "slab.nii.gz", "-o", out)[0] == 0
    report = json.loads((out / "report.json").read_text())
    cap = 1 - 15 / 85  # of the body's height above the middle that the slab shows
    assert report["overlap"] == pytest.approx(cap**2 * (3 - cap) / 4, abs=0.05)
    np.testing.assert_allclose(itk_matrix(out / "linear.tfm"), SLAB.pose @ np.linalg.inv(ONE.pose), atol=0.05)
    body = ONE.body(ONE.places)
    moved = np.asarray(nib.load(out / "moved.nii.gz").dataobj)
    assert (moved[body[..., 2] < 5] < -900).all()
    shown = in_body(body, 0.8) & (body[..., 2] > 20)
    np.testing.assert_allclose(moved[shown], ramp(body)[shown], atol=0.3)


def test_nothing_of_an_earlier_registration_stays(call, taught, images, tmp_path):
    out = tmp_path / "out"
    arguments = ["register", "-m", taught, "-f", images / "one.nii.gz", "-o", out, "-v"]
    labels = ["-l", images / "labels" / "two.nii.gz"]
    assert call(*arguments, images / "two.nii.gz", *labels)[0] == 0
    (out / "note.txt").write_text("mine")
    for name in ("moved.nii.gz", "linear.tfm", "report.json"):
        (out / name).unlink()
    left = {path.name for path in out.iterdir()}
    refused(call(*arguments, images / "bent.nii.gz", "--linear"), "--overwrite")
    refused(call(*arguments, images / "none.nii.gz", "--linear", "--overwrite"), "none.nii.gz")
    assert {path.name for path in out.iterdir()} == left
    assert call(*arguments, images / "bent.nii.gz", "--linear", "--overwrite")[0] == 0
    assert {path.name for path in out.iterdir()} == {"moved.nii.gz", "linear.tfm", "report.json", "note.txt"}


def test_exams_that_cannot_be_registered_are_refused(call, taught, images, tmp_path):
    out, common = tmp_path / "out", ["register", "-m", taught, "-o", tmp_path / "out", "-f"]
    one, feet = images / "one.nii.gz", images / "feet.nii.gz"
    refused(call(*common, images / "slab.nii.gz", "-v", feet), "anatomy in common")
    refused(call(*common, images / "none.nii.gz", "-v", one), "none.nii.gz")
    refused(call(*common, one, "-v", images / "none.nii.gz"), "none.nii.gz")
    refused(call(*common, one, "-v", feet, "-l", images / "labels" / "two.nii.gz"), "two.nii.gz")
    assert not list(out.glob("*"))


# Lists of fields of view


def test_a_list_adds_the_regions_whose_structures_are_known(model, call):
    assert call("structures", "rename", "-m", model, "organ", "larynx")[0] == 0
    code, out, _ = call("roi", "-m", model, "--list", "head-neck")
    assert code == 0
    assert "throat: " in out
    assert "jaw: left out, it needs one of mandible." in out
    made = checkpoint.load(model).regions
    assert set(made) == {"core", "throat"}
    low, high = (
        side * np.diag(checkpoint.load(model).atlas_to_mm.numpy())[:3] for side in made["throat"].box_atlas.numpy()
    )
    np.testing.assert_allclose(high - low, 2 * (RADII["organ"] + 25), atol=12)


def test_lists_that_cannot_be(model, call):
    refused(call("roi", "-m", model, "--list", "toes"), "toes", "whole-body", "head-neck")
    refused(call("roi", "-m", model, "--list", "head-neck"), "knows no structure")
    code, _, err = call("roi", "-m", model, "--list", "head-neck", "--name", "mine")
    assert (code, "--list" in err) == (2, True)
    code, _, err = call("roi", "-m", model, "--structures", "organ")
    assert (code, "--name" in err) == (2, True)


def test_the_whole_body_list_has_the_papers_fields_of_view():
    listed = deepatlas.regions.fields_of_view()["whole-body"]
    assert [sum("in" in one for one in listed.values()), len(listed)] == [14, 20]
    assert all(one.get("in", "head") in listed for one in listed.values())


# Landmarks


def test_landmarks_of_several_exams_are_found_where_they_are(model, images, call, tmp_path):
    for folder in ("exams", "points"):
        (tmp_path / folder).mkdir()
    body = {"near": (-20.0, 10, 5), "far": (30.0, -20, 20)}
    for name in ("one", "two", "bent"):
        shutil.copy(images / f"{name}.nii.gz", tmp_path / "exams")
    for name, shift in (("one", 0.0), ("two", 0.0)):
        placed = {k: apply(SCANS[name].pose, np.add(v, shift)[None].astype(float))[0].tolist() for k, v in body.items()}
        told(tmp_path / "points" / f"{name}.json", {"frame": "RAS", "unit": "mm", "points": placed})
    code, out, _ = call("mark", "-m", model, "-i", tmp_path / "exams", "-p", tmp_path / "points")
    assert (code, "2 landmarks from 2 exams" in out) == (0, True)
    code, _, _ = call("points", "-m", model, "-t", images / "two.nii.gz", "-o", tmp_path / "found.json")
    assert code == 0
    found = json.loads((tmp_path / "found.json").read_text())["points"]
    for name, place in body.items():
        np.testing.assert_allclose(found[name], apply(TWO.pose, np.array(place)[None])[0], atol=0.5)
    code, _, _ = call("points", "-m", model, "-t", images / "slab.nii.gz", "-o", tmp_path / "slab.json")
    found = json.loads((tmp_path / "slab.json").read_text())["points"]
    assert found["near"] is None  # below the slab
    assert found["far"] is not None


def test_landmarks_that_cannot_be(model, images, call, tmp_path):
    refused(call("points", "-m", model, "-t", images / "two.nii.gz", "-o", tmp_path / "o.json"), "landmark", "mark")
    outside = told(tmp_path / "p.json", {"frame": "RAS", "unit": "mm", "points": {"tip": [900, 0, 0]}})
    refused(call("mark", "-m", model, "-i", images / "one.nii.gz", "-p", outside), "tip", "outside")
    refused(call("mark", "-m", model, "-i", images / "one.nii.gz", "-p", outside), "outside in one")
    (tmp_path / "none").mkdir()
    refused(call("mark", "-m", model, "-i", images, "-p", tmp_path / "none"), "named like an exam")
    code, _, err = call("points", "-m", model, "-p", outside, "-t", images / "two.nii.gz", "-o", tmp_path / "o.json")
    assert code == 2
    assert "--from" in err


def test_mark_says_what_it_leaves_out(model, some, call, tmp_path):
    points = tmp_path / "points"
    points.mkdir()
    near, tip = apply(ONE.pose, np.array([[-20.0, 10, 5], [30, -20, 20]])).tolist()
    told(points / "one.json", {"frame": "RAS", "unit": "mm", "points": {"near": near, "tip": tip}})
    near = apply(TWO.pose, np.array([[-20.0, 10, 5]]))[0].tolist()
    told(points / "two.json", {"frame": "RAS", "unit": "mm", "points": {"near": near, "tip": [900, 0, 0]}})
    told(points / "tow.mrk.json", {})
    (points / "notes.txt").write_text("mine")
    code, out, err = call("mark", "-m", model, "-i", some("one", "two", "bent"), "-p", points)
    assert code == 0
    assert out.splitlines()[:2] == ["near: from 2 exams.", "tip: from 1 exam."]
    assert "tip: left out in two" in err
    assert "tow.mrk.json: left out" in err
    assert len(err.splitlines()) == 2


# All of them


@pytest.fixture
def commands(with_mid, images, drawn, tmp_path):
    """Every command that writes files, and the files that it writes into work/."""
    one, two, work = images / "one.nii.gz", images / "two.nii.gz", tmp_path / "work"
    asked = marked(tmp_path / "p.json", MARKS)
    crop = ["crop", "-m", with_mid, "-i", one, "--roi", "mid", "--spacing", 6, "-o"]
    with pytest.raises(SystemExit):
        main([str(word) for word in (*crop, tmp_path / "given.nii.gz")])
    uncrop = ["uncrop", "-i", tmp_path / "given.nii.gz", "--crop", tmp_path / "given.json", "-o", work / "full.nii.gz"]
    return {
        "points": (["points", "-m", with_mid, "-f", one, "-p", asked, "-t", two, "-o", work / "p.json"], ["p.json"]),
        "boxes": (["boxes", "-m", with_mid, "-i", two, "-o", work / "b.json"], ["b.json"]),
        "crop": ([*crop, work / "crop.nii.gz"], ["crop.nii.gz", "crop.json"]),
        "uncrop": (uncrop, ["full.nii.gz"]),
        "coverage": (["coverage", "-m", with_mid, "-i", two, "--roi", "mid", "-o", work / "c.csv"], ["c.csv"]),
        "register": (
            ["register", "-m", with_mid, "-f", one, "-v", two, "-o", work],
            ["moved.nii.gz", "linear.tfm", "report.json", "displacement.nii.gz", "jacobian.nii.gz"],
        ),
    }


@pytest.mark.parametrize("name", ["points", "boxes", "crop", "uncrop", "coverage", "register"])
def test_outputs_that_exist_are_kept_unless_told(call, commands, tmp_path, name):
    arguments, written = commands[name]
    for output in written:
        (tmp_path / "work").mkdir(exist_ok=True)
        (tmp_path / "work" / output).write_bytes(b"mine")
        refused(call(*arguments), "--overwrite", output)
        assert [path.name for path in (tmp_path / "work").iterdir()] == [output]
        assert (tmp_path / "work" / output).read_bytes() == b"mine"
        (tmp_path / "work" / output).unlink()
    (tmp_path / "work" / written[0]).write_bytes(b"mine")
    assert call(*arguments, "--overwrite")[0] == 0
    assert {path.name for path in (tmp_path / "work").iterdir()} == set(written)
    assert (tmp_path / "work" / written[0]).read_bytes() != b"mine"


@pytest.mark.parametrize("name", ["points", "boxes", "crop", "uncrop", "coverage"])
def test_an_output_is_a_file_for_an_exam_and_a_folder_for_a_folder(call, commands, some, tmp_path, name):
    arguments, (written, *_) = commands[name]
    arguments = arguments[:-1]
    refused(call(*arguments, f"{tmp_path}/new/"), "output file", "new")
    for there in (tmp_path / "there", tmp_path / "dir" / written):
        there.mkdir(parents=True)
        refused(call(*arguments, there, "--overwrite"), "output file", "the folder")
    if name in ("points", "boxes", "crop"):  # the others write one file, whatever they are given
        arguments[arguments.index("-t" if name == "points" else "-i") + 1] = some("two")
        refused(call(*arguments, tmp_path / "work" / written), "output folder", written)
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "work" / written).exists()


def test_what_is_written_names_nothing_of_the_header_and_no_folder(call, commands, images, tmp_path):
    assert TEXT in gzip.decompress((images / "two.nii.gz").read_bytes())
    for name, (arguments, _) in commands.items():
        assert call(*arguments)[0] == 0, name
    written = list((tmp_path / "work").iterdir())
    assert len(written) == sum(len(names) for _, names in commands.values())
    contents = [path.read_bytes() for path in written]
    contents += [
        gzip.decompress(content) for path, content in zip(written, contents, strict=True) if path.suffix == ".gz"
    ]
    record = json.loads((tmp_path / "work" / "crop.json").read_text())
    contents.append(base64.b64decode(record["original"]["header"]))
    for content in contents:
        for word in (TEXT, str(tmp_path).encode(), str(images).encode()):
            assert word not in content


def test_the_unused_type_of_a_header_is_text_too(call, with_mid, images, tmp_path):
    """`data_type` of NIfTI-1 has room for ten letters, and some programs write into it."""
    picture = nib.load(images / "one.nii.gz")
    picture.header["data_type"] = TEXT
    nib.save(picture, tmp_path / "one.nii")
    assert TEXT in (tmp_path / "one.nii").read_bytes()
    out = tmp_path / "crop.nii"
    assert call("crop", "-m", with_mid, "-i", tmp_path / "one.nii", "--roi", "mid", "--spacing", 6, "-o", out)[0] == 0
    assert call("uncrop", "-i", out, "--crop", tmp_path / "crop.json", "-o", tmp_path / "full.nii")[0] == 0
    header = base64.b64decode(json.loads((tmp_path / "crop.json").read_text())["original"]["header"])
    assert TEXT not in header
    assert TEXT not in (tmp_path / "full.nii").read_bytes()
