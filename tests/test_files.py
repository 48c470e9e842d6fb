"""Files: what is written lies bit for bit on the input's grid, and every fault gets its one line."""

import contextlib
import gzip
import json
import os
import struct
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepatlas import files
from deepatlas.errors import DeepAtlasError, ExamError, LabelError
from deepatlas.files import (
    check_same_grid,
    exam_name,
    find_exams,
    find_inputs,
    read_exam,
    read_labels,
    read_names,
    write_image,
    write_labels,
)
from deepatlas.volume import Volume

SHAPE = (20, 18, 12)
STRAIGHT = np.array([[-2.0, 0, 0, 20], [0, -2.0, 0, 30], [0, 0, 2.5, -100], [0, 0, 0, 1.0]])
COS, SIN = np.cos(0.3), np.sin(0.3)
OBLIQUE = np.array([[2 * COS, -2 * SIN, 0, 5], [2 * SIN, 2 * COS, 0, 7], [0, 0, 2.5, 11.125], [0, 0, 0, 1.0]])
SHEARED = np.array([[2.0, 0, 0, 5], [0, 2.0, 0.7, 7], [0, 0, 2.4, 11], [0, 0, 0, 1.0]])
GEOMETRY = (
    "qform_code",
    "sform_code",
    "quatern_b",
    "quatern_c",
    "quatern_d",
    "qoffset_x",
    "qoffset_y",
    "qoffset_z",
    "srow_x",
    "srow_y",
    "srow_z",
    "pixdim",
    "xyzt_units",
)


def hounsfield(shape=SHAPE, kind=np.int16) -> np.ndarray:
    """Air around a block of tissue with some texture."""
    array = np.full(shape, -1000, kind)
    inner = tuple(slice(n // 4, n - n // 4) for n in shape)
    array[inner] = np.random.default_rng(0).integers(-80, 120, array[inner].shape)
    return array


def make(path: Path, array=None, affine=STRAIGHT, sform=1, qform=1, kind=nib.Nifti1Image, **fields) -> Path:
    """Write a NIfTI file with the given form codes and header fields."""
    image = kind(hounsfield() if array is None else array, affine)
    image.set_qform(affine, qform, strip_shears=True)
    image.set_sform(affine, sform)
    image.header.set_xyzt_units("mm")
    for key, value in fields.items():
        image.header[key] = value
    image.to_filename(path)
    return path


def patch(path: Path, offset: int, form: str, *values: float) -> Path:
    """Overwrite bytes of an uncompressed file."""
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, offset, *values)
    path.write_bytes(data)
    return path


def header_of(path: Path) -> nib.Nifti1Header:
    """The header as stored, unchecked."""
    return nib.load(path).header


def refused(path: Path, *words: str, error: type[DeepAtlasError] = ExamError, read=read_exam) -> None:
    """Reading is refused with one line that names the file and holds the words."""
    with pytest.raises(error) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert Path(path).name in message
    for word in ("expected", *words):
        assert word.lower() in message.lower(), message


# Reading


def test_an_exam_is_read_as_stored(tmp_path):
    exam = read_exam(make(tmp_path / "one.nii.gz", affine=OBLIQUE))
    assert exam.name == "one"
    assert exam.array.dtype == np.int16
    np.testing.assert_array_equal(exam.array, hounsfield())
    np.testing.assert_allclose(exam.affine, OBLIQUE, atol=1e-5)
    assert exam.repairs == ()


@pytest.mark.parametrize("kind", [">i2", "<i2", "u2", "i4", "f4", "f8"])
@pytest.mark.parametrize("image", [nib.Nifti1Image, nib.Nifti2Image])
def test_slope_and_type(tmp_path, kind, image):
    """Any stored type, either byte order, with a slope: the HU are those that were meant."""
    truth = hounsfield().astype(np.float32)
    stored = ((truth + 1000.0) * 2).astype(kind)
    picture = image(stored, OBLIQUE)
    picture.header.set_data_dtype(np.dtype(kind))
    picture.to_filename(tmp_path / "one.nii")
    at = 112 if image is nib.Nifti1Image else 176
    patch(tmp_path / "one.nii", at, "<ff" if at == 112 else "<dd", 0.5, -1000.0)
    exam = read_exam(tmp_path / "one.nii")
    np.testing.assert_array_equal(exam.array, truth)
    assert exam.array.dtype == np.float32


def test_big_endian_files(tmp_path):
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(">i2")
    nib.Nifti1Image(hounsfield(), STRAIGHT, header).to_filename(tmp_path / "one.nii")
    exam = read_exam(tmp_path / "one.nii")
    np.testing.assert_array_equal(exam.array, hounsfield())
    assert exam.array.dtype.isnative
    write_labels(tmp_path / "labels.nii.gz", (exam.array > 0).astype(int), exam)
    np.testing.assert_array_equal(read_labels(tmp_path / "labels.nii.gz", like=exam).array, hounsfield() > 0)


@pytest.mark.parametrize("slope", [0.0, float("nan"), float("inf")])
def test_a_slope_that_is_none_does_not_scale(tmp_path, slope):
    exam = read_exam(patch(make(tmp_path / "one.nii"), 112, "<ff", slope, 5.0))
    np.testing.assert_array_equal(exam.array, hounsfield())


def test_the_name_does_not_decide_what_is_gzip(tmp_path):
    plain = make(tmp_path / "one.nii")
    (tmp_path / "two.nii.gz").write_bytes(plain.read_bytes())
    (tmp_path / "three.nii").write_bytes(gzip.compress(plain.read_bytes()))
    for name in ("two.nii.gz", "three.nii"):
        np.testing.assert_array_equal(read_exam(tmp_path / name).array, hounsfield())


def test_one_volume_with_four_axes_is_one_volume(tmp_path):
    exam = read_exam(make(tmp_path / "one.nii", hounsfield()[..., None]))
    assert exam.shape == SHAPE


def test_names_and_folders(tmp_path):
    assert exam_name("a/b/pt_1.v2.nii.gz") == "pt_1.v2"
    assert exam_name("PT.NII") == "PT"
    make(tmp_path / "b.nii.gz")
    make(tmp_path / "a.nii")
    make(tmp_path / ".hidden.nii")
    (tmp_path / "notes.txt").write_text("no exam")
    (tmp_path / "c.nii").symlink_to(tmp_path / "a.nii")
    (tmp_path / "broken.nii").symlink_to(tmp_path / "nowhere.nii")
    assert [path.name for path in find_exams(tmp_path)] == ["a.nii", "b.nii.gz", "c.nii"]
    assert find_exams(tmp_path / "a.nii") == [tmp_path / "a.nii"]
    make(tmp_path / "a.nii.gz")
    with pytest.raises(ExamError, match="one exam per name"):
        find_exams(tmp_path)


def test_a_label_map_beside_its_exam_is_no_exam(tmp_path):
    for name in ("a", "a_seg", "b_seg"):
        make(tmp_path / f"{name}.nii.gz")
    assert [exam_name(path) for path in find_inputs(tmp_path)] == ["a", "b_seg"]
    assert [exam_name(path) for path in find_exams(tmp_path)] == ["a", "a_seg", "b_seg"]
    assert find_inputs(tmp_path / "a_seg.nii.gz") == [tmp_path / "a_seg.nii.gz"]


def test_no_exams(tmp_path):
    with pytest.raises(ExamError, match="found none"):
        find_exams(tmp_path)
    with pytest.raises(ExamError, match="does not exist"):
        find_exams(tmp_path / "nowhere")


# Faults


def test_missing_file_and_folder(tmp_path):
    refused(tmp_path / "nowhere.nii", "does not exist")
    refused(tmp_path, "folder")


def test_not_nifti(tmp_path):
    for content in (b"", b"hello", b"\0" * 1000, gzip.compress(b"\x89PNG" * 200)):
        (tmp_path / "one.nii.gz").write_bytes(content)
        refused(tmp_path / "one.nii.gz", "NIfTI")


@pytest.mark.parametrize("keep", [30, 300, 0.5, -9, -4])
def test_truncated_gzip(tmp_path, keep):
    data = make(tmp_path / "one.nii.gz").read_bytes()
    cut = int(len(data) * keep) if isinstance(keep, float) else keep
    (tmp_path / "one.nii.gz").write_bytes(data[:cut])
    refused(tmp_path / "one.nii.gz", "gzip", "copy")


def test_damaged_gzip(tmp_path):
    """A wrong checksum, a flipped bit and bytes after the end are all seen."""
    data = make(tmp_path / "one.nii.gz").read_bytes()
    for bad in (data[:-8] + b"\0\0\0\0" + data[-4:], data + b"more", data[:700] + bytes([data[700] ^ 16]) + data[701:]):
        (tmp_path / "one.nii.gz").write_bytes(bad)
        refused(tmp_path / "one.nii.gz", "gzip")


def test_a_gzip_that_goes_on(tmp_path):
    plain = make(tmp_path / "one.nii").read_bytes()
    (tmp_path / "one.nii.gz").write_bytes(gzip.compress(plain + b"\0" * 10_000_000))
    refused(tmp_path / "one.nii.gz", "found more")


def test_cut_off_without_gzip(tmp_path):
    data = make(tmp_path / "one.nii").read_bytes()
    (tmp_path / "one.nii").write_bytes(data[:-1])
    refused(tmp_path / "one.nii", "cannot hold")


@pytest.mark.parametrize("name", ["one.nii", "one.nii.gz"])
def test_a_header_that_claims_too_much(tmp_path, name):
    """32767³ voxels in a small file are refused before memory is taken."""
    plain = patch(make(tmp_path / "one.nii"), 40, "<4h", 3, 32767, 32767, 32767).read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(plain) if name.endswith("gz") else plain)
    refused(tmp_path / name, "cannot hold")


def test_more_voxels_than_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_VOXELS", 4000)
    refused(make(tmp_path / "one.nii"), "at most 4000")


@pytest.mark.parametrize(("offset", "form", "value"), [(108, "<f", -5.0), (108, "<f", float("nan")), (70, "<h", 77)])
def test_broken_header_fields(tmp_path, offset, form, value):
    refused(patch(make(tmp_path / "one.nii"), offset, form, value), "header")


@pytest.mark.parametrize(
    ("shape", "word"),
    [
        ((40, 40), "many slices"),
        ((40, 40, 1), "many slices"),
        ((20, 18, 12, 2), "several"),
        ((20, 18, 3), "at least 4 voxels"),
        ((20, 18, 6), "at least"),
    ],
)
def test_wrong_shapes(tmp_path, shape, word):
    array = np.full(shape, -1000, np.int16)
    array.flat[::2] = 20
    refused(make(tmp_path / "one.nii", array), word)


def test_no_voxels(tmp_path):
    refused(patch(make(tmp_path / "one.nii"), 40, "<4h", 3, 20, 0, 12), "empty")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_few_bad_voxels_are_filled_with_air_and_said(tmp_path, bad):
    array = hounsfield(kind=np.float32)
    array[9, 9, 6] = bad
    with pytest.warns(UserWarning, match="1 voxels were NaN"):
        exam = read_exam(make(tmp_path / "one.nii", array))
    assert exam.array[9, 9, 6] == -1024
    assert len(exam.repairs) == 1
    array[5:15, 5:15] = bad
    refused(make(tmp_path / "one.nii", array), "NaN")


def test_overflow_of_the_type(tmp_path):
    array = hounsfield(kind=np.float64)
    array[5:15, 5:15] = 1e300
    refused(make(tmp_path / "one.nii", array), "infinite")


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.full(SHAPE, -1000, np.int16), ("-1000", "everywhere")),
        (hounsfield() + 1024, ("air near -1000", "subtract 1024")),
        (((hounsfield() + 1000) // 8).astype(np.uint8), ("air near -1000", "only CT")),
        (0.02 + 0.0002 * (hounsfield() + 1000.0), ("air near -1000",)),
        (np.random.default_rng(0).normal(0, 1, SHAPE), ("air near -1000",)),
        (np.where(hounsfield() > -500, -990, -1000).astype(np.int16), ("soft tissue", "0.00%")),
        (hounsfield().astype(np.complex64), ("real numbers",)),
    ],
)
def test_not_ct(tmp_path, array, words):
    refused(make(tmp_path / "one.nii", array), *words)


def test_paddings_and_metal_are_ct(tmp_path):
    array = hounsfield()
    array[0] = -32768
    array[9, 9, 6] = 30000
    assert read_exam(make(tmp_path / "one.nii", array)).array.min() == -32768


@pytest.mark.parametrize("broken", [np.zeros(4), np.full(4, np.nan)])
def test_a_broken_sform_gives_way_to_the_qform(tmp_path, broken):
    path = patch(make(tmp_path / "one.nii", affine=OBLIQUE), 280, "<4f", *broken)
    with pytest.warns(UserWarning, match="sform is broken"):
        exam = read_exam(path)
    np.testing.assert_allclose(exam.affine, OBLIQUE, atol=1e-5)
    assert "qform was used" in exam.repairs[0]
    write_labels(tmp_path / "labels.nii", exam.array > 0, exam)
    for field in GEOMETRY:  # the file's own forms, the broken one too
        assert header_of(path)[field].tobytes() == header_of(tmp_path / "labels.nii")[field].tobytes(), field
    patch(path, 252, "<h", 0)  # no qform either
    refused(path, "broken sform")


def test_a_broken_qform_is_said(tmp_path):
    path = patch(make(tmp_path / "one.nii", affine=OBLIQUE), 256, "<3f", 2.0, 2.0, 2.0)
    with pytest.warns(UserWarning, match="qform is broken"):
        exam = read_exam(path)
    np.testing.assert_allclose(exam.affine, OBLIQUE, atol=1e-5)


def test_no_form_at_all(tmp_path):
    refused(make(tmp_path / "one.nii", sform=0, qform=0), "neither")


def test_forms_that_contradict_each_other(tmp_path):
    path = patch(make(tmp_path / "one.nii"), 268, "<f", 25.0)  # the qform's origin, 5 mm away
    refused(path, "agree", "image.set_qform(image.get_sform())", "prefer")
    assert read_exam(path, prefer="sform").affine[0, 3] == 20.0
    picture = nib.load(path)
    picture.set_qform(picture.get_sform())
    nib.save(picture, tmp_path / "mended.nii")
    assert read_exam(tmp_path / "mended.nii").affine[0, 3] == 20.0
    assert read_exam(path, prefer="qform").affine[0, 3] == 25.0
    with pytest.raises(ExamError, match="prefer"):
        read_exam(path, prefer="both")


def test_a_sheared_sform_is_taken_though_no_qform_can_say_it(tmp_path):
    exam = read_exam(make(tmp_path / "one.nii", affine=SHEARED))
    np.testing.assert_allclose(exam.affine, SHEARED, atol=1e-5)


@pytest.mark.parametrize(("factor", "units"), [(0.01, 2), (50.0, 2), (0.001, 1)])
def test_absurd_spacing(tmp_path, factor, units):
    affine = STRAIGHT @ np.diag([factor, factor, factor, 1.0])
    words = ("metres",) if units == 1 else ()
    refused(make(tmp_path / "one.nii", affine=affine, xyzt_units=units), "voxels of 0.1 to 20 mm", *words)


@pytest.mark.parametrize("code", [0, 1, 255])
def test_voxels_without_a_size_in_bytes_are_refused(tmp_path, code):
    path = make(tmp_path / "one.nii")
    content = bytearray(path.read_bytes())
    content[70:72] = code.to_bytes(2, "little")
    path.write_bytes(content)
    refused(path, "NIfTI header")


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_byte_of_the_header_may_be_wrong(tmp_path_factory, data):
    """Whatever stands in a header, the answer is an exam or a refusal, never another error."""
    folder = tmp_path_factory.getbasetemp()
    path = folder / "fuzz.nii"
    start = folder / "fuzz_start.nii"
    if not start.exists():
        make(start)
    content = bytearray(start.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 347))
        some = data.draw(st.binary(min_size=1, max_size=4))
        content[at : at + len(some)] = some
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with contextlib.suppress(ExamError):
            exam = read_exam(path)
            assert np.isfinite(exam.array).all()
            assert np.isfinite(exam.affine).all()


# Labels


@pytest.mark.parametrize(("most", "kind"), [(7, np.uint8), (300, np.uint16), (70000, np.int32)])
@pytest.mark.parametrize("stored", [np.int32, np.float32])
def test_labels_are_whole_numbers_of_the_smallest_type(tmp_path, most, kind, stored):
    exam = read_exam(make(tmp_path / "one.nii"))
    array = np.zeros(SHAPE, stored)
    array[3, 4, 5] = most
    labels = read_labels(make(tmp_path / "labels.nii.gz", array), like=exam)
    assert labels.array.dtype == kind
    assert labels.array[3, 4, 5] == most
    assert np.count_nonzero(labels.array) == 1


@pytest.mark.parametrize("value", [0.5, -1, np.nan, 2.0**40])
def test_other_labels_are_refused(tmp_path, value):
    array = np.zeros(SHAPE, np.float64)
    array[3, 4, 5] = value
    refused(make(tmp_path / "labels.nii", array), error=LabelError, read=read_labels)


def test_missing_labels_are_a_label_error(tmp_path):
    refused(tmp_path / "nowhere.nii", "does not exist", error=LabelError, read=read_labels)
    refused(make(tmp_path / "x.nii", sform=0, qform=0), "neither", error=LabelError, read=read_labels)


def test_labels_of_another_grid(tmp_path):
    exam = read_exam(make(tmp_path / "one.nii"))
    moved = STRAIGHT.copy()
    moved[0, 3] += 0.002
    array = np.zeros(SHAPE, np.uint8)
    with pytest.raises(LabelError, match="mm away"):
        read_labels(make(tmp_path / "moved.nii", array, moved), like=exam)
    with pytest.raises(LabelError, match="shape"):
        read_labels(make(tmp_path / "short.nii", array[:-1]), like=exam)
    moved[0, 3] -= 0.0015
    read_labels(make(tmp_path / "near.nii", array, moved), like=exam)
    check_same_grid(Volume(array, STRAIGHT), exam)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "JSON"),
        ("[1, 2]", "something else"),
        ("{}", "something else"),
        ('{"a": 0}', "at least 1"),
        ('{"a": 1.5}', "at least 1"),
        ('{"a": true}', "at least 1"),
        ('{"a": "1"}', "at least 1"),
        ('{"a": 1, "b": 1}', "once"),
        ('{"a": 1, "a": 2}', "once"),
        ('{" ": 1}', "once"),
        ('{"a": {"b": 1}}', "at least 1"),
    ],
)
def test_bad_tables_of_names(tmp_path, text, word):
    (tmp_path / "labels.json").write_text(text)
    refused(tmp_path / "labels.json", word, error=LabelError, read=read_names)


def test_names(tmp_path):
    (tmp_path / "labels.json").write_text(json.dumps({"larynx": 6, "Nasenhöhle": 300}), encoding="utf-8")
    assert read_names(tmp_path / "labels.json") == {"larynx": 6, "Nasenhöhle": 300}
    with pytest.raises(LabelError, match="cannot be read"):
        read_names(tmp_path / "nowhere.json")


# Writing


@pytest.mark.parametrize(("sform", "qform"), [(1, 1), (2, 0), (0, 1), (4, 2)])
@pytest.mark.parametrize("affine", [STRAIGHT, OBLIQUE, SHEARED], ids=["straight", "oblique", "sheared"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_geometry_is_written_bit_for_bit(tmp_path, sform, qform, affine, kind):
    source = make(tmp_path / "one.nii.gz", affine=affine, sform=sform, qform=qform, kind=kind)
    exam = read_exam(source)
    write_labels(tmp_path / "labels.nii.gz", exam.array > 0, exam)
    write_image(tmp_path / "image.nii", np.zeros(SHAPE, np.float64), exam)
    for written in ("labels.nii.gz", "image.nii"):
        before, after = header_of(source), header_of(tmp_path / written)
        assert type(before) is type(after)
        for field in GEOMETRY:
            assert before[field].tobytes() == after[field].tobytes(), field
        assert nib.load(tmp_path / written).shape == SHAPE
    labels = read_labels(tmp_path / "labels.nii.gz", like=exam)
    np.testing.assert_array_equal(labels.affine, exam.affine)
    np.testing.assert_array_equal(labels.array, exam.array > 0)


def test_slope_and_window_of_the_exam_do_not_touch_the_labels(tmp_path):
    source = make(tmp_path / "one.nii", hounsfield() + 1000, cal_max=300, cal_min=-200)
    exam = read_exam(patch(source, 112, "<ff", 1.0, -1000.0))
    write_labels(tmp_path / "labels.nii.gz", np.full(SHAPE, 3), exam)
    np.testing.assert_array_equal(nib.load(tmp_path / "labels.nii.gz").get_fdata(), 3.0)
    header = header_of(tmp_path / "labels.nii.gz")
    assert header["cal_max"] == header["cal_min"] == 0
    assert header.get_data_dtype() == np.uint8
    write_labels(tmp_path / "labels.nii", np.full(SHAPE, 3), exam)
    stored = (tmp_path / "labels.nii").read_bytes()
    assert stored[352:] == b"\3" * np.prod(SHAPE)
    assert struct.unpack_from("<2f", stored, 112) == (1.0, 0.0)


def test_free_text_of_the_header_is_not_passed_on(tmp_path):
    text = dict.fromkeys(("descrip", "aux_file", "db_name", "intent_name"), b"Doe^Jane")
    exam = read_exam(make(tmp_path / "one.nii", **text))
    assert b"Doe^Jane" in (tmp_path / "one.nii").read_bytes()
    write_labels(tmp_path / "labels.nii", np.zeros(SHAPE, int), exam)
    assert b"Doe" not in (tmp_path / "labels.nii").read_bytes()


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int16, np.uint8, bool, np.int64])
def test_images_of_any_kind_and_with_channels(tmp_path, kind):
    exam = read_exam(make(tmp_path / "one.nii"))
    array = np.random.default_rng(0).integers(0, 2, (*SHAPE, 3)).astype(kind)
    write_image(tmp_path / "image.nii.gz", array, exam)
    back = np.asarray(nib.load(tmp_path / "image.nii.gz").dataobj)
    np.testing.assert_array_equal(back, array)


def test_bad_arrays_are_not_written(tmp_path):
    exam = read_exam(make(tmp_path / "one.nii"))
    target = tmp_path / "out.nii.gz"
    with pytest.raises(LabelError, match="shape"):
        write_labels(target, np.zeros((3, 3, 3), int), exam)
    with pytest.raises(LabelError, match="whole"):
        write_labels(target, np.zeros(SHAPE), exam)
    with pytest.raises(LabelError, match="-1"):
        write_labels(target, np.full(SHAPE, -1), exam)
    with pytest.raises(ExamError, match="shape"):
        write_image(target, np.zeros((3, 3, 3)), exam)
    with pytest.raises(ExamError, match="real"):
        write_image(target, np.zeros(SHAPE, complex), exam)
    with pytest.raises(ExamError, match="ending"):
        write_image(tmp_path / "out.mha", np.zeros(SHAPE), exam)
    with pytest.raises(ExamError, match="could not"):
        write_image(tmp_path / "nowhere" / "out.nii", np.zeros(SHAPE), exam)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.nii"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    exam = read_exam(make(tmp_path / "one.nii"))
    target = write_labels(tmp_path / "out.nii.gz", np.ones(SHAPE, int), exam)
    before = target.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ExamError, match="No space"):
        write_labels(target, np.zeros(SHAPE, int), exam)
    assert target.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.nii", "out.nii.gz"]


def test_real_exam(tmp_path):
    folder = os.environ.get("DEEPATLAS_DATA")
    if not folder or not (Path(folder) / "openkbp").is_dir():
        pytest.skip("needs DEEPATLAS_DATA, a folder that holds openkbp/")
    source = Path(folder) / "openkbp" / "train" / "images" / "pt_200.nii.gz"
    exam = read_exam(source)
    assert exam.shape == (128, 128, 128)
    assert exam.array.min() == -1024
    assert set(read_names(Path(folder) / "openkbp" / "labels.json").values()) == set(range(1, 8))
    write_labels(tmp_path / "out.nii.gz", exam.array > 300, exam)
    for field in GEOMETRY:
        assert header_of(source)[field].tobytes() == header_of(tmp_path / "out.nii.gz")[field].tobytes()
    hippocampus = sorted((Path(folder) / "hippocampus" / "images").glob("*.nii.gz"))
    if hippocampus:
        refused(hippocampus[0], "CT in HU")
