"""Exams, label maps and label names on disk: NIfTI-1 and NIfTI-2 in one file, plain or gzipped.

What cannot be used is refused with one line that names the file, what was expected, what came and what to do. What was
repaired on the way in is said in `Exam.repairs` and as a warning. What is written lies bit for bit on the input's grid.
"""

import gzip
import io
import json
import os
import warnings
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np

from deepatlas.errors import DeepAtlasError, ExamError, LabelError
from deepatlas.volume import Volume, checked_affine, corners_mm, spacing_mm

SUFFIXES = (".nii.gz", ".nii")
MAX_VOXELS = 2**30
"""Exams beyond this many voxels are refused before anything is allocated."""

LEAST_MM = 16.0
LEAST_VOXELS = 4
SPACING_MM = (0.1, 20.0)
BAD_VOXELS = 0.001
"""The share of NaN or infinite voxels that is still filled with air."""

AIR_HU = -1024
TISSUE_HU = (-150, 250)
TISSUE_LEAST = 0.002
SAME_GRID_MM = 1e-3
_GZIP_RATIO = 1032  # deflate cannot pack tighter
_TRAILING_BYTES = 65536


@dataclass(frozen=True)
class Exam(Volume):
    """A volume read from a file.

    Attributes:
        array: HU (i, j, k), int16 where the file stores it so, else float32.
        affine: voxel → mm (RAS+), (4, 4) float64.
        header: the NIfTI header as read, kept so that results can be written on the same grid.
        name: the file's name without its suffix.
        repairs: one line for each thing that was mended on the way in.
    """

    header: nib.Nifti1Header
    name: str
    repairs: tuple[str, ...] = ()


class _Raw(NamedTuple):
    array: np.ndarray  # as stored, without slope and intercept
    header: nib.Nifti1Header


def exam_name(path: Path | str) -> str:
    """The file's name without `.nii` or `.nii.gz`."""
    name = Path(path).name
    for suffix in SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def find_exams(path: Path | str) -> list[Path]:
    """The NIfTI file at `path`, or all of them in that folder (not below it), sorted by name. Links are followed.

    Raises:
        ExamError: nothing is there, or two files have the same name but for `.nii` and `.nii.gz`.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ExamError(f"Expected an exam or a folder of exams, but {path} does not exist; check the path.")
    found = [
        entry
        for entry in path.iterdir()
        if entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".") and entry.is_file()
    ]
    if not found:
        raise ExamError(f"Expected .nii or .nii.gz files in {path}, found none; give the folder that holds the exams.")
    by_name: dict[str, Path] = {}
    for entry in sorted(found):
        name = exam_name(entry)
        if name in by_name:
            raise ExamError(
                f"Expected one exam per name, found {by_name[name].name} and {entry.name}; remove or rename one."
            )
        by_name[name] = entry
    return [by_name[name] for name in sorted(by_name)]


def find_inputs(path: Path | str) -> list[Path]:
    """What `find_exams` finds, without label maps that lie in the folder of their exam: `X_seg` beside `X`.

    Raises:
        ExamError: see `find_exams`.
    """
    found = {exam_name(one): one for one in find_exams(path)}
    return [one for name, one in found.items() if not (name.endswith("_seg") and name.removesuffix("_seg") in found)]


def read_exam(path: Path | str, prefer: str | None = None) -> Exam:
    """Read a CT exam.

    Args:
        path: a NIfTI file.
        prefer: "sform" or "qform", for files whose two forms contradict each other by more than 1 mm.

    Raises:
        ExamError: the file is missing, broken, not three-dimensional, not placed in space, too thin, or not CT in HU.
    """
    path = Path(path)
    raw = _read_raw(path, ExamError)
    affine, repairs = _affine(raw, path, prefer, ExamError)
    _check_extent(raw.array.shape, affine, raw.header, path)
    array, filled = _hounsfield(raw, path)
    repairs = repairs + filled
    _check_intensity(array, path)
    for repair in repairs:
        warnings.warn(f"{path.name}: {repair}", stacklevel=2)
    return Exam(array, affine, raw.header, exam_name(path), repairs)


def read_labels(path: Path | str, like: Volume | None = None) -> Volume:
    """Read a label map: uint8, uint16 or int32, whichever is the smallest that holds its numbers. 0 is background.

    Args:
        path: a NIfTI file of whole numbers; a float file will do where every value is whole.
        like: the exam that the labels were drawn on; its grid must be the same to 1e-3 mm.

    Raises:
        LabelError: the file is missing or broken, a value is not a whole number ≥ 0, or the grid is another one.
    """
    path = Path(path)
    raw = _read_raw(path, LabelError)
    affine, _ = _affine(raw, path, None, LabelError)
    values = _scaled(raw, path, LabelError)
    if values.dtype.kind == "f":
        if not np.isfinite(values).all() or not np.array_equal(values, np.rint(values)):
            raise LabelError(
                f"{path.name}: expected whole numbers, got fractions or NaN; save the label map without interpolation."
            )
    elif values.dtype.kind not in "iub":
        raise LabelError(f"{path.name}: expected whole numbers, got {values.dtype}; save the label map as uint8.")
    least, most = int(values.min()), int(values.max())
    if least < 0 or most > np.iinfo(np.int32).max:
        raise LabelError(f"{path.name}: expected labels from 0 to 2147483647, got {least} to {most}; renumber them.")
    labels = Volume(values.astype(_label_type(most)), affine)
    if like is not None:
        check_same_grid(labels, like, path.name)
    return labels


def read_values(path: Path | str) -> Volume:
    """Read any volume as it is, for results, not for exams: whole numbers, however stored, as int32, others as float32.

    Raises:
        ExamError: missing, broken, not three-dimensional, or not placed in space.
    """
    path = Path(path)
    raw = _read_raw(path, ExamError)
    affine, _ = _affine(raw, path, None, ExamError)
    values = _scaled(raw, path, ExamError)
    whole = values.dtype.kind in "iub" or ((np.abs(values) < 2**31).all() and np.array_equal(values, np.rint(values)))
    return Volume(values.astype(np.int32 if whole else np.float32), affine)


def read_image(path: Path | str) -> Exam:
    """Read an image of any modality: `read_exam` without what only CT has.

    Raises:
        ExamError: missing, broken, not three-dimensional, not placed in space, the same everywhere, or not finite.
    """
    path = Path(path)
    raw = _read_raw(path, ExamError)
    affine, repairs = _affine(raw, path, None, ExamError)
    values = _scaled(raw, path, ExamError)
    if not np.isfinite(values).all():
        raise ExamError(f"{path.name}: expected finite values, got NaN or infinity; export it again.")
    if values.min() == values.max():
        raise ExamError(f"{path.name}: expected an image, got {float(values.min()):g} everywhere; export it again.")
    return Exam(values, affine, raw.header, exam_name(path), repairs)


def read_list(path: Path | str) -> list[str]:
    """Names of exams, one a line; empty lines and what follows a # are left out.

    Raises:
        ExamError: it cannot be read, or names nothing.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ExamError(f"Expected a list of exams, but {path} cannot be read ({_why(error)}).") from None
    names = [exam_name(line.split("#")[0].strip()) for line in lines]
    if not any(names):
        raise ExamError(f"Expected one exam a line in {path}, found none; write their names.")
    return list(dict.fromkeys(filter(None, names)))


def as_exam(volume: Volume, name: str = "volume") -> Exam:
    """A volume that no file holds yet, with a header, so that it can be written."""
    header = nib.Nifti1Image(np.zeros(volume.shape, np.uint8), volume.affine).header
    header.set_xyzt_units("mm")
    return Exam(volume.array, volume.affine, header, name)


def check_same_grid(labels: Volume, like: Volume, name: str = "labels") -> None:
    """Raise LabelError where two grids differ in shape, or by more than 1e-3 mm at a corner."""
    if labels.shape != like.shape:
        raise LabelError(
            f"{name}: expected the exam's shape {like.shape}, got {labels.shape}; draw the labels on the exam itself."
        )
    apart = float(np.abs(labels.corners_mm() - like.corners_mm()).max())
    if not apart <= SAME_GRID_MM:
        raise LabelError(
            f"{name}: expected the exam's affine, but a corner lies {apart:.3g} mm away; draw the labels on the exam "
            "itself, or resample them to it."
        )


def write_labels(path: Path | str, array: np.ndarray, like: Exam) -> Path:
    """Write a label map on the grid of `like`: same shape, affine, forms and codes, bit for bit. Atomic.

    Raises:
        LabelError: another shape than the exam's, or values that are not whole numbers ≥ 0.
        ExamError: the file cannot be written.
    """
    array = np.asarray(array)
    if array.shape != like.shape:
        raise LabelError(
            f"Expected labels of the exam's shape {like.shape}, got {array.shape}; sample them to its grid."
        )
    if array.dtype.kind not in "iub":
        raise LabelError(f"Expected labels as whole numbers, got {array.dtype}; round them first.")
    least, most = (int(array.min()), int(array.max())) if array.size else (0, 0)
    if least < 0 or most > np.iinfo(np.int32).max:
        raise LabelError(f"Expected labels from 0 to 2147483647, got {least} to {most}; renumber them.")
    return _write(Path(path), array.astype(_label_type(most)), like)


def write_image(path: Path | str, array: np.ndarray, like: Exam) -> Path:
    """Write values (i, j, k) or (i, j, k, c) on the grid of `like`: same affine, forms and codes, bit for bit. Atomic.

    Floats are written as float32, booleans as uint8, other integers as they are (64 bits as 32).

    Raises:
        ExamError: another grid than the exam's, or the file cannot be written.
    """
    array = np.asarray(array)
    if array.ndim not in (3, 4) or array.shape[:3] != like.shape:
        raise ExamError(
            f"Expected an image of the exam's shape {like.shape}, got {array.shape}; sample it to its grid."
        )
    if array.dtype.kind == "f":
        kind = np.float32
    elif array.dtype.kind == "b":
        kind = np.uint8
    elif array.dtype.kind in "iu":
        kind = array.dtype.newbyteorder("=") if array.dtype.itemsize <= 4 else np.int32
    else:
        raise ExamError(f"Expected an image of real numbers, got {array.dtype}; convert it first.")
    return _write(Path(path), array.astype(kind), like)


def write_vectors(path: Path | str, vectors: np.ndarray, like: Exam) -> Path:
    """Write a displacement field (i, j, k, 1, 3), LPS mm, on the grid of `like`, marked as vectors for ITK. Atomic."""
    if vectors.shape != (*like.shape, 1, 3):
        raise ExamError(f"Expected vectors of shape {(*like.shape, 1, 3)}, got {vectors.shape}.")
    return _write(Path(path), vectors.astype(np.float32), like, intent="vector")


def read_names(path: Path | str) -> dict[str, int]:
    """The table of label names, a JSON object from structure to number: `{"larynx": 6, "mandible": 7}`.

    Raises:
        LabelError: missing, not JSON, or not a table of distinct whole numbers ≥ 1.
    """
    path = Path(path)
    expected = f'{path.name}: expected a JSON object such as {{"larynx": 6}}'
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_Pairs)
    except OSError as error:
        raise LabelError(f"Expected a table of label names, but {path} cannot be read ({_why(error)}).") from None
    except ValueError as error:
        raise LabelError(f"{expected}, got something that is not JSON ({error}); mend the file.") from None
    if not isinstance(pairs, _Pairs) or not pairs:
        raise LabelError(f"{expected}, got something else; write one name and number per structure.")
    names: dict[str, int] = {}
    for name, number in pairs:
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise LabelError(f'{expected}, got {number!r:.40} for "{name}"; numbers are whole and at least 1.')
        if not name.strip() or name in names or number in names.values():
            raise LabelError(f'{expected}, got "{name}": {number} twice or without a name; each may stand once.')
        names[name] = number
    return names


def check_exclusions(exclude: dict[str, list[str]], names: Iterable[str]) -> None:
    """Refuse a table of label faults, structure → exams, that would leave out something else in silence.

    Raises:
        LabelError: a structure that is not among the names, or exams that are not a list of names.
    """
    known = list(names)
    if unknown := [name for name in exclude if name not in known]:
        raise LabelError(f"Expected structures among {known} in the exclude list, got {unknown}; mend the names.")
    for name, exams in exclude.items():
        if not isinstance(exams, list) or not all(isinstance(exam, str) for exam in exams):
            raise LabelError(f'Expected a list of exam names to exclude for {name}, got {exams!r}; write ["exam", …].')


class _Pairs(list):
    """A JSON object as its pairs, so that a name given twice is seen."""


def _label_type(most: int) -> type:
    return np.uint8 if most <= 255 else np.uint16 if most <= 65535 else np.int32


def _why(error: BaseException) -> str:
    text = str(getattr(error, "strerror", None) or error).splitlines()
    return text[0] if text else type(error).__name__


def _read_raw(path: Path, refuse: type[DeepAtlasError]) -> _Raw:
    """Header and stored values. Sizes are checked before memory is taken; a gzip stream is read to its checksum."""
    if not path.exists():
        raise refuse(f"Expected a NIfTI file, but {path} does not exist; check the path.")
    if path.is_dir():
        raise refuse(f"Expected a NIfTI file, but {path} is a folder; give one file.")
    try:
        size = path.stat().st_size
        with open(path, "rb") as plain:
            zipped = plain.read(2) == b"\x1f\x8b"
            plain.seek(0)
            stream = gzip.GzipFile(fileobj=plain) if zipped else plain
            header = _read_header(stream, path, refuse)
            shape = _shape(header, path, refuse)
            kind = header.get_data_dtype()
            wanted = int(np.prod([int(n) for n in shape], dtype=object)) * kind.itemsize
            start = int(header["vox_offset"])
            capacity = (size * _GZIP_RATIO if zipped else size) - start
            if wanted > capacity:
                raise refuse(
                    f"{path.name}: expected {wanted} bytes for shape {shape}, but a file of {size} bytes cannot hold "
                    "them; copy or export it again."
                )
            if wanted // kind.itemsize > MAX_VOXELS:
                raise refuse(f"{path.name}: expected at most {MAX_VOXELS} voxels, got shape {shape}; crop the exam.")
            stream.seek(start)
            data = stream.read(wanted)
            if zipped and len(data) == wanted and len(stream.read(_TRAILING_BYTES + 1)) > _TRAILING_BYTES:
                raise refuse(f"{path.name}: expected {wanted} bytes of voxels, found more; export the exam again.")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise refuse(
            f"{path.name}: expected a whole gzip file, got a damaged one ({_why(error)}); copy it again."
        ) from None
    except OSError as error:
        raise refuse(f"Expected a NIfTI file, but {path} cannot be read ({_why(error)}); check it.") from None
    if len(data) != wanted:
        raise refuse(f"{path.name}: expected {wanted} bytes of voxels, got {len(data)}; copy the file again.")
    return _Raw(np.frombuffer(data, dtype=kind).reshape(shape, order="F"), header)


def _read_header(stream: io.BufferedIOBase, path: Path, refuse: type[DeepAtlasError]) -> nib.Nifti1Header:
    start = stream.read(540)
    if start[344:348] == b"n+1\0":
        kind, length = nib.Nifti1Header, 348
    elif start[4:8] == b"n+2\0" and len(start) == 540:
        kind, length = nib.Nifti2Header, 540
    else:
        raise refuse(
            f"{path.name}: expected a NIfTI file (.nii or .nii.gz), got something else; convert it to NIfTI first."
        )
    try:
        header = kind(start[:length], check=False)
        if not header.get_data_dtype().itemsize:
            raise ValueError("voxels of no data type")
        header.get_data_shape()
        least = length + 4
        if not least <= float(header["vox_offset"]) < 2**31:
            raise ValueError(f"voxels begin at byte {float(header['vox_offset']):g}")
    except (nib.spatialimages.HeaderDataError, ValueError, KeyError, OverflowError) as error:
        raise refuse(f"{path.name}: expected a sound NIfTI header, got {_why(error)}; export the exam again.") from None
    return header


def _shape(header: nib.Nifti1Header, path: Path, refuse: type[DeepAtlasError]) -> tuple[int, int, int]:
    shape = tuple(int(n) for n in header.get_data_shape())
    if any(n < 1 for n in shape) or not shape:
        raise refuse(f"{path.name}: expected voxels, got the empty shape {shape}; export the exam again.")
    if len(shape) > 3 and any(n != 1 for n in shape[3:]):
        raise refuse(
            f"{path.name}: expected one volume, got shape {shape} with several; save one of them as its own file."
        )
    if len(shape) < 3 or min(shape[:3]) < 2:
        raise refuse(f"{path.name}: expected a volume of many slices, got shape {shape}; give the whole series.")
    return shape[:3]


def _affine(
    raw: _Raw, path: Path, prefer: str | None, refuse: type[DeepAtlasError]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The sform if it is valid, else the qform; both must agree unless one is preferred or the sform is sheared."""
    if prefer not in (None, "sform", "qform"):
        raise refuse(f'Expected prefer "sform" or "qform", got "{prefer}"; choose one of the two.')
    header = raw.header
    forms: dict[str, np.ndarray] = {}
    broken = []
    for form, code, get in (
        ("sform", int(header["sform_code"]), header.get_sform),
        ("qform", int(header["qform_code"]), header.get_qform),
    ):
        if code > 0:
            try:
                with np.errstate(all="ignore"):
                    forms[form] = checked_affine(get())
            except (DeepAtlasError, nib.spatialimages.HeaderDataError, ValueError, np.linalg.LinAlgError):
                broken.append(form)
    if not forms:
        what = f"a broken {' and '.join(broken)}" if broken else "neither (both codes are 0)"
        raise refuse(f"{path.name}: expected a valid sform or qform, got {what}; export the exam with its orientation.")
    if prefer in forms:
        return forms[prefer], ()
    if len(forms) == 2 and not _sheared(forms["sform"]):
        shape = raw.array.shape
        apart = float(np.abs(corners_mm(shape, forms["sform"]) - corners_mm(shape, forms["qform"])).max())
        if apart > 1.0:
            raise refuse(
                f"{path.name}: expected sform and qform to agree, but a corner differs by {apart:.3g} mm; copy the "
                "one that holds over the other, such as the sform with nibabel's `image.set_qform(image.get_sform())` "
                "or FSL's `fslorient -copysform2qform`; in Python, `deepatlas.files.read_exam` takes prefer."
            )
    chosen = "sform" if "sform" in forms else "qform"
    return forms[chosen], tuple(f"its {form} is broken, the {chosen} was used" for form in broken)


def _sheared(affine: np.ndarray) -> bool:
    """Whether the axes are not at right angles; a qform cannot say that, so it is no witness then."""
    axes = affine[:3, :3] / spacing_mm(affine)
    return bool(np.abs(axes.T @ axes - np.eye(3)).max() > 1e-3)


def _check_extent(shape: tuple[int, int, int], affine: np.ndarray, header: nib.Nifti1Header, path: Path) -> None:
    spacing = spacing_mm(affine)
    if spacing.min() < SPACING_MM[0] or spacing.max() > SPACING_MM[1]:
        unit = {1: " and a header in metres", 3: " and a header in micrometres"}.get(int(header["xyzt_units"]) & 7, "")
        raise ExamError(
            f"{path.name}: expected voxels of {SPACING_MM[0]:g} to {SPACING_MM[1]:g} mm, got "
            f"{' × '.join(f'{length:.4g}' for length in spacing)}{unit}; correct the affine to mm."
        )
    extent = spacing * shape
    if extent.min() < LEAST_MM or min(shape) < LEAST_VOXELS:
        raise ExamError(
            f"{path.name}: expected at least {LEAST_VOXELS} voxels and {LEAST_MM:g} mm along each axis, got "
            f"{' × '.join(map(str, shape))} voxels and {' × '.join(f'{length:.4g}' for length in extent)} mm; "
            "give the whole series."
        )


def _scaled(raw: _Raw, path: Path, refuse: type[DeepAtlasError]) -> np.ndarray:
    """Stored values with slope and intercept: the stored type where there are none, else float32."""
    if raw.array.dtype.kind not in "iufb":
        raise refuse(
            f"{path.name}: expected real numbers, got voxels of type {raw.array.dtype}; export one grey channel."
        )
    try:
        slope, intercept = raw.header.get_slope_inter()
    except nib.spatialimages.HeaderDataError as error:
        raise refuse(
            f"{path.name}: expected a finite slope and intercept, got {_why(error)}; mend the header."
        ) from None
    native = raw.array.dtype.newbyteorder("=")
    if slope is None or (slope == 1 and intercept == 0):
        return raw.array.astype(native, copy=False)
    with np.errstate(over="ignore", invalid="ignore"):
        return raw.array.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _hounsfield(raw: _Raw, path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """HU as int16 or float32, with the few voxels that are not numbers filled with air."""
    values = _scaled(raw, path, ExamError)
    if values.dtype.kind != "f":
        fits = np.can_cast(values.dtype, np.int16)
        return values.astype(np.int16 if fits else np.float32), ()
    with np.errstate(over="ignore"):
        values = values.astype(np.float32, copy=False)
    bad = ~np.isfinite(values)
    count = int(bad.sum())
    if not count:
        return values, ()
    if count > BAD_VOXELS * values.size:
        raise ExamError(
            f"{path.name}: expected finite HU, got {count} of {values.size} voxels NaN or infinite; export it again."
        )
    return np.where(bad, np.float32(AIR_HU), values), (f"{count} voxels were NaN or infinite and hold air now",)


def _check_intensity(array: np.ndarray, path: Path) -> None:
    """Refuse what cannot be HU: nothing as dark as air or fat, or almost nothing in the range of soft tissue."""
    least, most = float(array.min()), float(array.max())
    got = f"got {least:g} to {most:g}"
    if least == most:
        raise ExamError(f"{path.name}: expected an exam, {got} everywhere; export it again.")
    if least > TISSUE_HU[0]:
        hint = "subtract 1024 if it is CT stored without its offset" if most > 1000 else "only CT in HU can be used"
        raise ExamError(f"{path.name}: expected CT in HU with air near -1000, {got}; {hint}.")
    tissue = float(np.count_nonzero((array >= TISSUE_HU[0]) & (array <= TISSUE_HU[1]))) / array.size
    if tissue < TISSUE_LEAST:
        raise ExamError(
            f"{path.name}: expected CT in HU with soft tissue from {TISSUE_HU[0]} to {TISSUE_HU[1]}, {got} with "
            f"{tissue:.2%} of the voxels there; check that the values are HU and that a patient is in it."
        )


def without_text(header: nib.Nifti1Header) -> nib.Nifti1Header:
    """A header without its free text, which may name a patient."""
    header = header.copy()
    for text in ("descrip", "aux_file", "db_name", "data_type", "intent_name", "unused_str"):
        if text in header:
            header[text] = b""
    return header


def _write(path: Path, array: np.ndarray, like: Exam, intent: str = "none") -> Path:
    """Write beside the target and move into place. The header's free text is left out."""
    suffix = next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)
    if suffix is None:
        raise ExamError(f"Expected a file name ending in .nii or .nii.gz, got {path.name}; rename it.")
    header = without_text(like.header)
    header.set_data_dtype(array.dtype)
    header.set_intent(intent)
    header.set_slope_inter(1, 0)
    header["cal_max"] = header["cal_min"] = 0
    header["vox_offset"] = 0
    image = (nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image)(array, None, header)
    part = path.with_name(f".{exam_name(path)}.{os.getpid()}{suffix}")
    try:
        image.to_filename(part)
        os.replace(part, path)
    except OSError as error:
        raise ExamError(
            f"Expected to write {path}, but could not ({_why(error)}); check the folder and its space."
        ) from None
    finally:
        part.unlink(missing_ok=True)
    return path
