"""`deepatlas regseg`: train, register, segment, evaluate.

What a training makes of a folder is seen in what it is given; for the answers a model stands in whose two networks are
known, so that what is tested is all that stands around them.
"""

import gzip
import json
import shutil
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from deepatlas import files, regseg, transforms
from deepatlas.cli import main
from deepatlas.common_grid import Frame
from deepatlas.volume import Volume, apply, reorder
from exact import affine_of, dice, places_of, rotated
from refusing import refused
from standins import model_of

FRAME = Frame((16, 32, 16), (4.0, 3.0, 5.0), "0:1")
SHIFT = np.array([1.0, 0.0, 2.0])
"""Of the known registration, in steps of the frame."""
STEPS = {"one": (0, 0, 0), "two": (1, 0, 2), "three": (0, 1, -1), "bare": (0, 2, 0)}
"""How far the body lies from the middle of each image; "bare" has no labels."""
DEGREES = {"one": (10, -5, 20), "two": (-8, 15, -12), "three": (0, 0, 0), "bare": (5, 5, 5)}
STORED = {
    "one": ((2, 0, 1), (True, True, False)),
    "two": ((0, 1, 2), (True, False, False)),
    "three": ((1, 2, 0), (False, False, True)),
    "bare": ((0, 1, 2), (False, False, False)),
}
TEXT = b"DOE^JANE"
SMALL = ["--registration", 1, "--segmentation", 1, "--joint", 2, "--scaling", "0:1"]


def body(steps) -> np.ndarray:
    """A bright core in a grey block, steps of the frame from its middle: every voxel in the order R, A, S."""
    away = np.moveaxis(np.indices(FRAME.shape), 0, -1) - (np.array(FRAME.shape) - 1) / 2 - steps
    return np.where((np.abs(away) < [1, 2, 1.6]).all(-1), 0.9, np.where((np.abs(away) < [3, 5, 3]).all(-1), 0.55, 0.1))


def numbers(values: np.ndarray) -> np.ndarray:
    return np.where(values > 0.7, 17, np.where(values > 0.4, 3, 0)).astype(np.uint8)


def volume(name: str, values: np.ndarray) -> Volume:
    """Values of an image as it is stored."""
    turn = rotated(DEGREES[name]) * FRAME.spacing_mm
    corner = np.array([20.0 * len(name), -30, 7]) - turn @ ((np.array(FRAME.shape) - 1) / 2)
    return reorder(Volume(values, affine_of(turn, corner)), *STORED[name])


def save(path: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    """Write a NIfTI whose header names somebody."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = nib.Nifti1Image(array, affine)
    picture.set_sform(affine, 2)
    picture.set_qform(affine, 1)
    for field in ("descrip", "aux_file", "db_name", "intent_name"):
        picture.header[field] = TEXT
    nib.save(picture, path)
    return path


def array_of(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Four images, and below them the labels of three; a fourth label map is of no image."""
    folder = tmp_path_factory.mktemp("images")
    for name, steps in STEPS.items():
        noise = np.random.default_rng(len(name)).uniform(-0.05, 0.05, FRAME.shape)
        image = volume(name, (body(steps) + noise).astype(np.float32))
        save(folder / f"{name}.nii.gz", image.array, image.affine)
        drawn = volume(name, numbers(body(steps)))
        save(folder / "labels" / f"{name if name != 'bare' else 'nobody'}.nii.gz", drawn.array, drawn.affine)
    return folder


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory) -> Path:
    """A model that learned almost nothing."""
    folder = tmp_path_factory.mktemp("trained") / "little"
    words = ["regseg", "train", "-i", images, "-l", images / "labels", "-o", folder, *SMALL]
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    assert not end.value.code
    return folder


@pytest.fixture
def known(monkeypatch, tmp_path) -> Path:
    """A folder in whose place a known model is read: it shifts by SHIFT, and knows classes by their intensity."""
    (tmp_path / "known").mkdir()
    monkeypatch.setattr(regseg, "load", lambda folder: model_of(FRAME, SHIFT, name=folder.name))
    return tmp_path / "known"


@pytest.fixture
def given(monkeypatch) -> list:
    """What the training is given, and no training."""
    calls = []
    names = ("cases", "frame", "classes", "settings", "out", "start", "resume")
    monkeypatch.setattr(
        regseg, "train", lambda *some, **more: calls.append(dict(zip(names, some, strict=False)) | more)
    )
    return calls


def listed(path: Path, *names: str) -> Path:
    path.write_text("\n".join(["# a list", "", *names]) + "\n")
    return path


# train


def test_train_writes_a_model_that_the_other_commands_use(call, trained, images, tmp_path):
    model = regseg.load(trained)
    assert model.classes == {"class_3": 3, "class_17": 17}
    assert model.frame == FRAME
    assert (trained / "training" / "log.csv").read_text().startswith("stage,step,")
    code, _, _ = call("regseg", "segment", "-m", trained, "-i", images / "one.nii.gz", "-o", tmp_path / "seg")
    assert code == 0
    assert set(np.unique(array_of(tmp_path / "seg" / "one_seg.nii.gz"))) <= {0, 3, 17}
    pair = ["-f", images / "one.nii.gz", "-v", images / "two.nii.gz"]
    assert call("regseg", "register", "-m", trained, *pair, "-o", tmp_path / "reg")[0] == 0
    report = json.loads((tmp_path / "reg" / "report.json").read_text())
    assert (report["fixed"], report["moving"], report["model"]) == ("one", "two", "little")
    both = ["-i", images, "-l", images / "labels", "-o", tmp_path / "scores.json"]
    assert call("regseg", "evaluate", "-m", trained, *both, "--count", 2)[0] == 0
    assert len(json.loads((tmp_path / "scores.json").read_text())["registration"]["pairs"]) == 2


def test_train_keeps_what_is_there_and_goes_on_with_it_if_told(call, trained, images, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "little")
    before = (folder / "weights.safetensors").read_bytes()
    words = ["regseg", "train", "-i", images, "-l", images / "labels", "-o", folder, *SMALL]
    refused(call(*words), "already holds", "--resume")
    refused(call(*words, "--resume", "--seed", 5), "resume with the same")
    code, out, _ = call(*words, "--resume")
    assert code == 0
    assert "4 images, 3 of them with labels" in out
    assert (folder / "weights.safetensors").read_bytes() == before
    refused(call(*words, "--resume", "-o", tmp_path / "new"), "nothing to resume")


def test_all_images_are_trained_on_with_whichever_labels_exist(call, given, images, tmp_path):
    code, out, _ = call("regseg", "train", "-i", images, "-l", images / "labels", "-o", tmp_path / "m", "--seed", 9)
    assert code == 0
    assert "4 images, 3 of them with labels" in out
    (one,) = given
    labelled = dict(zip(one["cases"].names, one["cases"].labelled.tolist(), strict=True))
    assert labelled == {"one": True, "two": True, "three": True, "bare": False}
    assert one["classes"] == {"class_3": 3, "class_17": 17}
    assert one["frame"].spacing_mm == pytest.approx(FRAME.spacing_mm)
    assert (one["frame"].shape, one["frame"].scaling) == (FRAME.shape, "percentile")
    assert (one["settings"].seed, one["resume"]) == (9, False)
    assert (one["settings"].segmentation, one["settings"].semi) == (
        0,
        regseg.RegSeg().segmentation,
    )  # one has no labels
    assert one["settings"].registration == regseg.RegSeg().registration
    assert one["out"] == tmp_path / "m"
    for name in ("one", "two"):
        number = one["cases"].names.index(name)
        truth = numbers(body(STEPS[name]))
        classes = np.select([truth == 3, truth == 17], [1, 2])
        for found, before in (
            (one["cases"].labels[number], classes),
            (one["cases"].inside[number, 0], np.ones_like(classes)),
        ):
            moved = [ndimage.shift(before, offset, order=0) for offset in product(range(-4, 5), repeat=3)]
            assert any(np.array_equal(found.numpy(), one_of) for one_of in moved)  # as it is, but for whole nodes


def test_lists_say_whose_labels_are_used_and_which_images_are_not(call, given, images, tmp_path):
    words = ["regseg", "train", "-i", images, "-l", images / "labels", "-o", tmp_path / "m"]
    only = listed(tmp_path / "only.txt", "two.nii.gz  # by name or by file")
    code, out, _ = call(*words, "--labeled", only, "--leave-out", listed(tmp_path / "out.txt", "three"))
    assert code == 0
    assert "3 images, 1 of them with labels" in out
    cases, settings = given[0]["cases"], given[0]["settings"]
    assert dict(zip(cases.names, cases.labelled.tolist(), strict=True)) == {"one": False, "two": True, "bare": False}
    assert (settings.segmentation, settings.semi) == (0, regseg.RegSeg().segmentation)  # one label: the other way


def test_options_reach_the_training(call, given, images, tmp_path):
    (tmp_path / "names.json").write_text('{"core": 17}')
    code, _, _ = call(
        "regseg", "train", "-i", images, "-l", images / "labels", "-o", tmp_path / "m", "--names",
        tmp_path / "names.json", "--scaling", "0:2", "--spacing", 5, "--registration", 7, "--segmentation", 0,
        "--joint", 8,
    )  # fmt: skip
    assert code == 0
    one = given[0]
    assert one["classes"] == {"core": 17}
    assert one["cases"].classes == 1
    assert set(np.unique(one["cases"].labels.numpy())) == {0, 1}
    assert one["frame"] == Frame((16, 32, 16), (5.0, 5.0, 5.0), "0:2")
    settings = one["settings"]
    assert (settings.registration, settings.segmentation, settings.joint) == (7, 0, 8)


def test_a_training_that_cannot_be_is_refused(call, images, tmp_path):
    labels, model = images / "labels", tmp_path / "model"
    words = ["regseg", "train", "-i", images, "-o", model, *SMALL, "-l"]
    lists = {
        "nemo": "nemo",  # nobody has that name
        "bare": "labels of bare",  # an image without labels
        "nobody": "nobody",  # labels without an image
    }
    for name, said in lists.items():
        line = refused(call(*words, labels, "--labeled", listed(tmp_path / "list.txt", "one", name)), said)
        assert "no an" not in line
    left = listed(tmp_path / "left.txt", "one")
    refused(call(*words, labels, "--labeled", left, "--leave-out", left), "one")
    refused(call(*words, labels, "--labeled", listed(tmp_path / "empty.txt")), "empty.txt")
    refused(call(*words, labels, "--labeled", tmp_path / "none.txt"), "none.txt")
    refused(call(*words, labels, "--scaling", "low"), "LOW:HIGH")
    everything = listed(tmp_path / "all.txt", *STEPS)
    refused(call(*words, labels, "--leave-out", everything))
    (tmp_path / "names.json").write_text('{"core": 17}')
    refused(call(*words, labels, "--leave-out", everything, "--names", tmp_path / "names.json"))
    refused(call(*words, labels, "--leave-out", listed(tmp_path / "most.txt", "one", "two", "bare")), "2 images")
    (tmp_path / "names.json").write_text('{"none": 44}')
    refused(call(*words, labels, "--names", tmp_path / "names.json"), "44")
    refused(call(*words, tmp_path / "no labels"), "no labels")
    (tmp_path / "other").mkdir()
    shutil.copy(labels / "nobody.nii.gz", tmp_path / "other")
    refused(call(*words, tmp_path / "other"), "label")
    shutil.copy(labels / "two.nii.gz", tmp_path / "other" / "one.nii.gz")  # drawn on another grid
    refused(call(*words, tmp_path / "other"), "one.nii.gz")
    assert not model.exists()


def test_an_image_that_cannot_be_used_stops_the_training(call, images, tmp_path):
    shutil.copytree(images, tmp_path / "some")
    (tmp_path / "some" / "two.nii.gz").write_bytes(b"not a NIfTI")
    words = ["regseg", "train", "-i", tmp_path / "some", "-l", images / "labels", "-o", tmp_path / "model", *SMALL]
    refused(call(*words), "two.nii.gz")
    flat = volume("two", np.full(FRAME.shape, 7, np.int16))
    save(tmp_path / "some" / "two.nii.gz", flat.array, flat.affine)
    refused(call(*words), "two.nii.gz", "everywhere")
    assert not (tmp_path / "model").exists()


# register

FILES = {"moved.nii.gz", "displacement.nii.gz", "jacobian.nii.gz", "linear.tfm", "report.json"}


def register(known, images, out, *more) -> list:
    pair = ["-f", images / "one.nii.gz", "-v", images / "two.nii.gz"]
    return ["regseg", "register", "-m", known, *pair, "-o", out, *more]


def true_map(points: np.ndarray, shift=SHIFT) -> np.ndarray:
    """From the middle of image one along its axes, and the shift, along the axes of image two."""
    middles = [volume(name, np.zeros(FRAME.shape)).corners_mm().mean(axis=0) for name in ("one", "two")]
    along = (points - middles[0]) @ rotated(DEGREES["one"]) + np.multiply(shift, FRAME.spacing_mm)
    return middles[1] + along @ rotated(DEGREES["two"]).T


def test_register_writes_what_lies_on_the_fixed_image(call, known, images, tmp_path):
    out, labels = tmp_path / "out", images / "labels" / "two.nii.gz"
    code, said, _ = call(*register(known, images, out, "-l", labels))
    assert code == 0
    assert str(out) in said
    assert {path.name for path in out.iterdir()} == FILES | {"moved_seg.nii.gz"}
    fixed = nib.load(images / "one.nii.gz")
    for name in ("moved", "moved_seg", "displacement", "jacobian"):
        picture = nib.load(out / f"{name}.nii.gz")
        assert picture.shape[:3] == fixed.shape
        assert np.array_equal(picture.affine, fixed.affine)
    points = places_of(fixed.shape, fixed.affine)
    there = points + array_of(out / "displacement.nii.gz")[:, :, :, 0] * [-1, -1, 1]
    np.testing.assert_allclose(there, true_map(points), atol=2e-3)
    np.testing.assert_allclose(array_of(out / "jacobian.nii.gz"), 1, atol=1e-3)
    np.testing.assert_array_equal(
        array_of(out / "moved_seg.nii.gz"), array_of(images / "labels" / "one.nii.gz")
    )  # the second body lies SHIFT further
    moving = files.read_image(images / "two.nii.gz")
    index = np.rint(apply(moving.inverse, true_map(points))).astype(int)
    within = ((index >= 0) & (index < moving.shape)).all(axis=-1)
    values = array_of(out / "moved.nii.gz")
    np.testing.assert_allclose(values[within], moving.array[tuple(index[within].T)], atol=1e-3)
    assert within.mean() < 0.9
    np.testing.assert_allclose(values[~within], moving.array.min(), atol=1e-6)


def test_a_label_map_of_an_earlier_pair_does_not_stay(call, known, images, tmp_path):
    out, labels = tmp_path / "out", images / "labels" / "two.nii.gz"
    assert call(*register(known, images, out, "-l", labels))[0] == 0
    assert call(*register(known, images, out, "--overwrite"))[0] == 0
    assert {path.name for path in out.iterdir()} == FILES


def test_the_report_of_a_registration(call, known, images, tmp_path):
    code, said, _ = call(*register(known, images, tmp_path / "out"))
    assert code == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["fixed"], report["moving"], report["model"]) == ("one", "two", "known")
    assert report["folded"] == 0
    fixed = files.read_image(images / "one.nii.gz")
    points = places_of(fixed.shape, fixed.affine)
    moved = np.linalg.norm(true_map(points) - points, axis=-1)
    assert report["displacement_mm"]["median"] == pytest.approx(np.median(moved), abs=0.01)
    assert report["displacement_mm"]["p95"] == pytest.approx(np.percentile(moved, 95), abs=0.01)
    twice = 2 * np.linalg.norm(SHIFT * FRAME.spacing_mm)  # the stand-in shifts the same way there and back
    assert report["inverse_consistency_mm"] == pytest.approx({"median": twice, "p95": twice}, abs=0.01)
    assert "0.00% folds" in said


@pytest.fixture
def bending(monkeypatch, known) -> np.ndarray:
    """A known model whose displacement is linear in the index; its gradient."""
    gradient = np.array([[0.10, -0.20, 0.05], [0.15, -0.30, 0.10], [-0.05, 0.20, 0.25]])
    index = np.indices(FRAME.shape) - ((np.array(FRAME.shape) - 1) / 2)[:, None, None, None]
    model = model_of(FRAME, np.einsum("ab,bijk->aijk", gradient, index))
    monkeypatch.setattr(regseg, "load", lambda _: model)
    return gradient


def test_the_jacobian_on_disk_is_the_change_of_volume(call, known, bending, images, tmp_path):
    assert call(*register(known, images, tmp_path / "out"))[0] == 0
    change = array_of(tmp_path / "out" / "jacobian.nii.gz")
    np.testing.assert_allclose(change, np.linalg.det(np.eye(3) + bending), atol=1e-3)


def test_itk_makes_the_moved_image_of_the_written_displacement(call, known, bending, images, tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    out = tmp_path / "out"
    assert call(*register(known, images, out))[0] == 0
    fixed, moving = (sitk.ReadImage(str(images / f"{name}.nii.gz"), sitk.sitkFloat32) for name in ("one", "two"))
    field = sitk.ReadImage(str(out / "displacement.nii.gz"), sitk.sitkVectorFloat64)
    theirs = sitk.Resample(moving, fixed, sitk.DisplacementFieldTransform(field), sitk.sitkLinear, -9.0)
    theirs = sitk.GetArrayFromImage(theirs).transpose(2, 1, 0)
    ours = array_of(out / "moved.nii.gz")
    seen = theirs > -8
    inner = seen.copy()
    for axis in range(3):
        inner &= np.roll(seen, 1, axis) & np.roll(seen, -1, axis)
    assert inner.mean() > 0.3
    assert np.abs(theirs - ours)[inner].max() < 2e-3
    assert np.ptp(ours[inner]) > 0.5
    linear = sitk.ReadTransform(str(out / "linear.tfm"))
    point = files.read_image(images / "one.nii.gz").affine[:3, 3]
    expected = true_map(point[None], (0, 0, 0))[0] * [-1, -1, 1]
    np.testing.assert_allclose(linear.TransformPoint((point * [-1, -1, 1]).tolist()), expected, atol=1e-3)


def test_a_registration_that_cannot_be_is_refused(call, known, images, tmp_path):
    out = tmp_path / "out"
    refused(call(*register(known, images, out, "-l", images / "labels" / "one.nii.gz")), "one.nii.gz")
    refused(call(*register(known, images, out, "-v", tmp_path / "none.nii.gz")), "none.nii.gz")
    (tmp_path / "bad.nii.gz").write_bytes(b"not a NIfTI")
    refused(call(*register(known, images, out, "-f", tmp_path / "bad.nii.gz")), "bad.nii.gz")
    assert not list(out.glob("*"))


def test_a_model_of_the_other_kind_is_refused(call, images, trained, tmp_path):
    out = tmp_path / "out"
    refused(call(*register("head-neck-ct", images, out)), "deepatlas-regseg")
    refused(call("regseg", "segment", "-m", "head-neck-ct", "-i", images, "-o", out), "deepatlas-regseg")
    refused(call(*register(tmp_path / "nowhere", images, out)), "nowhere")
    one = images / "one.nii.gz"
    refused(call("locate", "-m", trained, "-i", one, "-o", out), "deepatlas-regseg")
    assert not list(out.glob("*"))


# segment


def test_segment_writes_label_maps_on_the_images_own_grid(call, known, images, tmp_path):
    for name in ("one", "three"):
        code, said, _ = call("regseg", "segment", "-m", known, "-i", images / f"{name}.nii.gz", "-o", tmp_path / "out")
        assert code == 0
        assert "ball 3, core 17" in said
        path = tmp_path / "out" / f"{name}_seg.nii.gz"
        np.testing.assert_array_equal(array_of(path), array_of(images / "labels" / f"{name}.nii.gz"))
        assert np.array_equal(nib.load(path).affine, nib.load(images / f"{name}.nii.gz").affine)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"one_seg.nii.gz", "three_seg.nii.gz"}


def test_a_folder_is_segmented_past_an_image_that_cannot_be_read(call, known, images, tmp_path):
    shutil.copytree(images, tmp_path / "some", ignore=shutil.ignore_patterns("labels"))
    (tmp_path / "some" / "bad.nii.gz").write_bytes(b"not a NIfTI")
    out = tmp_path / "out"
    words = ["regseg", "segment", "-m", known, "-i", tmp_path / "some", "-o", out]
    code, _, err = call(*words)
    assert code == 3
    assert "bad" in err
    assert {path.name for path in out.iterdir()} == {f"{name}_seg.nii.gz" for name in STEPS} | {"failed.json"}
    failed = json.loads((out / "failed.json").read_text())
    assert list(failed) == ["bad"]
    assert str(tmp_path) not in failed["bad"]
    np.testing.assert_array_equal(array_of(out / "two_seg.nii.gz"), array_of(images / "labels" / "two.nii.gz"))
    shutil.copy(images / "one.nii.gz", tmp_path / "some" / "bad.nii.gz")
    assert call(*words, "--overwrite")[0] == 0
    assert not (out / "failed.json").exists()


def test_a_single_image_that_cannot_be_read_is_refused(call, known, tmp_path):
    (tmp_path / "bad.nii.gz").write_bytes(b"not a NIfTI")
    words = ["regseg", "segment", "-m", known, "-o", tmp_path / "out", "-i"]
    refused(call(*words, tmp_path / "bad.nii.gz"), "bad.nii.gz")
    refused(call(*words, tmp_path / "nowhere"), "nowhere")
    assert not list((tmp_path / "out").glob("*"))


# evaluate


def evaluate(known, images, out, *more) -> list:
    return ["regseg", "evaluate", "-m", known, "-i", images, "-l", images / "labels", "-o", out, *more]


def table(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows) + "\n")
    return path


def overlap(moving: str, fixed: str) -> dict[str, float]:
    """Dice of the labels, moved by SHIFT, against those of the fixed image."""
    laid, truth = numbers(body(np.subtract(STEPS[moving], SHIFT))), numbers(body(STEPS[fixed]))
    return {name: dice(laid == number, truth == number) for name, number in (("ball", 3), ("core", 17))}


def test_evaluate_scores_labelled_images_and_pairs_of_them(call, known, images, tmp_path):
    pairs = table(tmp_path / "pairs.csv", "moving,fixed", "two,one", "one,two", "three,one")
    code, said, _ = call(*evaluate(known, images, tmp_path / "out.json", "--pairs", pairs))
    assert code == 0
    about = json.loads((tmp_path / "out.json").read_text(), parse_constant=pytest.fail)
    assert set(about["segmentation"]["exams"]) == {"one", "two", "three"}
    assert about["segmentation"]["mean"] == 1
    found = {(one["moving"], one["fixed"]): one["dice"] for one in about["registration"]["pairs"]}
    assert found[("two", "one")] == {"ball": 1, "core": 1}
    wanted = [overlap(*pair) for pair in found]
    for scored, truth in zip(found.values(), wanted, strict=True):
        assert scored == pytest.approx(truth, abs=1e-4)
    assert about["registration"]["mean"] == pytest.approx(np.mean([list(one.values()) for one in wanted]), abs=1e-6)
    assert "1.000 over 3 exams" in said
    assert "over 3 pairs" in said


def test_evaluate_may_be_held_to_some_exams_and_some_random_pairs(call, known, images, tmp_path):
    some = listed(tmp_path / "some.txt", "three", "one")
    code, _, _ = call(*evaluate(known, images, tmp_path / "out.json", "--exams", some))
    assert code == 0
    about = json.loads((tmp_path / "out.json").read_text(), parse_constant=pytest.fail)
    assert set(about["segmentation"]["exams"]) == {"one", "three"}
    laid = [(one["moving"], one["fixed"]) for one in about["registration"]["pairs"]]
    assert set(laid) == {("one", "three"), ("three", "one")}
    chosen = []
    for number in (1, 1, 2, 3, 4, 5):
        words = evaluate(known, images, tmp_path / "out.json", "--count", 3, "--seed", number, "--overwrite")
        assert call(*words)[0] == 0
        about = json.loads((tmp_path / "out.json").read_text())
        chosen.append([(one["moving"], one["fixed"]) for one in about["registration"]["pairs"]])
        assert len(set(chosen[-1])) == 3
    assert chosen[0] == chosen[1]
    assert any(one != chosen[0] for one in chosen)


def test_a_single_pair_gives_json(call, known, images, tmp_path):
    pairs = table(tmp_path / "pairs.csv", "moving,fixed", "two,one")
    assert call(*evaluate(known, images, tmp_path / "out.json", "--pairs", pairs))[0] == 0
    about = json.loads((tmp_path / "out.json").read_text(), parse_constant=lambda word: pytest.fail(f"{word} in JSON"))
    assert about["registration"]["mean"] == 1


@pytest.mark.parametrize(
    "rows",
    [
        ("one,two", "two,one"),
        ("first,second", "two,one"),
        ("moving,fixed", "two"),
        ("moving,fixed", "two", "nemo,one"),
        ("moving,fixed", "two,nemo"),
        ("moving,fixed", "two,bare"),
        ("moving,fixed",),
        (),
    ],
)
def test_pairs_that_cannot_be_are_refused(call, known, images, tmp_path, rows):
    pairs = table(tmp_path / "pairs.csv", *rows)
    refused(call(*evaluate(known, images, tmp_path / "out.json", "--pairs", pairs)), "pairs")
    assert not (tmp_path / "out.json").exists()


def test_an_evaluation_that_cannot_be_is_refused(call, known, images, tmp_path):
    out = tmp_path / "out.json"
    for name in ("nemo", "bare", "nobody"):
        refused(call(*evaluate(known, images, out, "--exams", listed(tmp_path / "list.txt", "one", name))), name)
    refused(call(*evaluate(known, images, out, "--exams", listed(tmp_path / "list.txt", "one"))), "at least 2")
    refused(call(*evaluate(known, images, out, "--pairs", tmp_path / "none.csv")), "none.csv")
    refused(call(*evaluate(known, images, out, "-l", tmp_path / "nowhere")), "nowhere")
    assert not out.exists()


@pytest.mark.parametrize("kind", ["shape", "place"])
def test_labels_on_another_grid_than_their_image_are_not_scored(call, known, images, tmp_path, kind):
    labels = shutil.copytree(images / "labels", tmp_path / "labels")
    if kind == "shape":
        shutil.copy(labels / "two.nii.gz", labels / "one.nii.gz")
    else:
        drawn = nib.load(labels / "one.nii.gz")
        save(labels / "one.nii.gz", np.asarray(drawn.dataobj), affine_of(np.eye(3), (30, 0, 0)) @ drawn.affine)
    refused(call(*evaluate(known, images, tmp_path / "out.json", "-l", labels)), "one.nii.gz")
    assert not (tmp_path / "out.json").exists()


# all of them


@pytest.fixture
def commands(known, images, tmp_path) -> dict:
    """Every command that answers, and what it writes into work/."""
    work = tmp_path / "work"
    label = ["-l", images / "labels" / "two.nii.gz"]
    return {
        "register": (register(known, images, work, *label), sorted(FILES | {"moved_seg.nii.gz"})),
        "segment": (["regseg", "segment", "-m", known, "-i", images / "one.nii.gz", "-o", work], ["one_seg.nii.gz"]),
        "evaluate": (evaluate(known, images, work / "scores.json"), ["scores.json"]),
    }


@pytest.mark.parametrize("name", ["register", "segment", "evaluate"])
def test_outputs_that_exist_are_kept_unless_told(call, commands, tmp_path, name):
    arguments, written = commands[name]
    (tmp_path / "work").mkdir()
    for output in written:
        (tmp_path / "work" / output).write_bytes(b"mine")
        refused(call(*arguments), "--overwrite", output)
        assert [path.name for path in (tmp_path / "work").iterdir()] == [output]
        assert (tmp_path / "work" / output).read_bytes() == b"mine"
        (tmp_path / "work" / output).unlink()
    (tmp_path / "work" / written[0]).write_bytes(b"mine")
    assert call(*arguments, "--overwrite")[0] == 0
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == written
    assert (tmp_path / "work" / written[0]).read_bytes() != b"mine"


@pytest.mark.parametrize("name", ["register", "segment"])
def test_a_folder_for_results_is_not_named_like_a_file(call, commands, tmp_path, name):
    arguments, _ = commands[name]
    arguments[arguments.index("-o") + 1] = tmp_path / "one_seg.nii.gz"
    refused(call(*arguments), "output folder", "one_seg.nii.gz")
    assert not (tmp_path / "one_seg.nii.gz").exists()


def test_what_is_written_names_nothing_of_the_header_and_no_folder(call, commands, trained, images, tmp_path):
    assert TEXT in gzip.decompress((images / "one.nii.gz").read_bytes())
    for name, (arguments, _) in commands.items():
        assert call(*arguments)[0] == 0, name
    written = [*(tmp_path / "work").iterdir(), *(path for path in trained.rglob("*") if path.is_file())]
    for path in written:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        for word in (TEXT, str(tmp_path).encode(), str(images).encode()):
            assert word not in content, path.name


def test_help_of_every_command(call):
    assert "train" in call("regseg", "--help")[1]
    for command in ("train", "register", "segment", "evaluate"):
        code, out, _ = call("regseg", command, "--help")
        assert code == 0
        assert "--output" in out


def test_the_transform_on_disk_is_the_one_of_the_library(call, known, images, tmp_path):
    assert call(*register(known, images, tmp_path / "out"))[0] == 0
    fixed, moving = (files.read_image(images / f"{name}.nii.gz") for name in ("one", "two"))
    found = regseg.register(model_of(FRAME, SHIFT), fixed, moving)
    assert (tmp_path / "out" / "linear.tfm").read_text().strip() == transforms.itk_transform(found.linear)
    np.testing.assert_array_equal(
        array_of(tmp_path / "out" / "displacement.nii.gz"), transforms.displacement(found, fixed)
    )


def test_info_tells_of_a_pair_of_networks(call):
    about = json.loads(call("info", "hippocampus-regseg", "--json")[1])
    assert about["structures"][0] == {"name": "hippocampus_anterior", "label": 1}
    assert (about["grid"], about["spacing_mm"]) == ("48 × 64 × 48", "1 × 1 × 1")
    assert "hippocampus_posterior (2)" in call("info", "hippocampus-regseg")[1]


def test_labels_without_a_class_of_the_model_are_refused(call, known, images, tmp_path):
    for path in (images / "labels").iterdir():
        drawn = array_of(path)
        save(tmp_path / "labels" / path.name, np.where(drawn > 0, 200, 0).astype(np.uint8), nib.load(path).affine)
    words = evaluate(known, images, tmp_path / "out.json", "-l", tmp_path / "labels")
    refused(call(*words), "ball 3, core 17", "found none")
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("more", [("--count", 3), ("--seed", 0)])
def test_a_table_of_pairs_leaves_nothing_to_chance(call, known, images, tmp_path, more):
    pairs = table(tmp_path / "pairs.csv", "moving,fixed", "two,one")
    code, _, err = call(*evaluate(known, images, tmp_path / "out.json", "--pairs", pairs, *more))
    assert code == 2
    assert "--pairs" in err
    assert not (tmp_path / "out.json").exists()
