"""What is written about exams: the answer for one (label map and JSON), what a registration leaves, and the list of
those that failed.

The JSON of an exam holds no path and nothing from its header but its file's name.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from deepatlas import checkpoint, files, transforms
from deepatlas.checkpoint import Model
from deepatlas.errors import DeepAtlasError, ExamError, StructureError, memory_as_such
from deepatlas.files import Exam
from deepatlas.found import Found
from deepatlas.transforms import Transform
from deepatlas.volume import Volume

FILE_ENDINGS = (*files.SUFFIXES, ".json", ".csv")
"""Names that end so are of files."""


def describe(exam: Exam, found: dict[str, Found], model: Model, familiar: bool) -> dict[str, Any]:
    """What was found in an exam, in types that JSON knows: shares to 4 digits, ml to 3, mm (RAS) to 2.

    An absent structure keeps its coverage; what it does not have is None. `repairs` is there only where the exam was
    mended on the way in.

    Args:
        familiar: whether the exam looks like those that the model learned from; else nothing is placed in it.
    """
    answer = {
        "exam": exam.name,
        "frame": "RAS",
        "unit": "mm",
        "model": model.name,
        "version": checkpoint.VERSION,
        "familiar": familiar,
        "structures": {name: _entry(one) for name, one in found.items()},
        "low_confidence": [name for name, one in found.items() if one.unsure],
    }
    return answer | ({"repairs": list(exam.repairs)} if exam.repairs else {})


def label_map(found: dict[str, Found], shape: tuple[int, int, int]) -> np.ndarray:
    """One array with every mask, its value the structure's number.

    Raises:
        StructureError: two structures have the same number.
    """
    check_numbers((one.name, one.label) for one in found.values())
    array = np.zeros(shape, dtype=np.int32)
    together = {id(one.owner): one.owner for one in found.values() if one.owner is not None}
    for owner in together.values():
        labels = np.zeros(int(owner.max()) + 2, dtype=np.int32)  # the last entry stays 0 and is that of -1
        for one in found.values():
            if one.owner is owner:
                labels[one.number] = one.label
        array = np.where(labels[owner] != 0, labels[owner], array)
    return array


def check_numbers(structures: Iterable[tuple[str, int]]) -> None:
    """Refuse structures (name, number) that cannot stand in one label map."""
    seen: dict[int, str] = {}
    for name, number in structures:
        if number in seen:
            raise StructureError(
                f"Expected one number per structure, but {seen[number]} and {name} both have {number}; locate them "
                "one at a time with --structures, or define one again with another number."
            )
        seen[number] = name


def write_answer(folder: Path, exam: Exam, found: dict[str, Found], model: Model, familiar: bool) -> tuple[Path, Path]:
    """Write `<exam>_seg.nii.gz` on the exam's own grid and `<exam>.json`; each appears whole or not at all."""
    seg, about = answer_paths(folder, exam.name)
    files.write_labels(seg, label_map(found, exam.shape), exam)
    checkpoint.write_text(about, json.dumps(describe(exam, found, model, familiar), indent=1, allow_nan=False))
    return seg, about


def answer_paths(folder: Path, name: str) -> tuple[Path, Path]:
    """Where the answer for an exam is written: its label map and its JSON."""
    return folder / f"{name}_seg.nii.gz", folder / f"{name}.json"


def registration_paths(folder: Path) -> list[Path]:
    """All that `write_registration` can write, and the report that goes with it."""
    fields = ("displacement.nii.gz", "jacobian.nii.gz")
    return [folder / name for name in ("moved.nii.gz", "moved_seg.nii.gz", "linear.tfm", "report.json", *fields)]


def write_registration(
    folder: Path,
    found: Transform,
    fixed: Exam,
    moving: Volume,
    labels: Volume | None = None,
    linear: bool = False,
    outside: float = files.AIR_HU,
) -> None:
    """Write the moved image, the transforms as ITK reads them and the map of the change of volume, in place of all that
    an earlier registration left in the folder.

    Args:
        labels: of the moving exam, to be moved too.
        linear: leave out the fields, which are those of a linear map.
        outside: what the moved image holds where the moving one does not reach.
    """
    image = transforms.moved(found, fixed, moving, outside=outside)
    drawn = None if labels is None else transforms.moved(found, fixed, labels, labels=True)
    vectors = None if linear else transforms.displacement(found, fixed)
    change = None if linear else transforms.jacobian(vectors, fixed)
    for path in registration_paths(folder):  # only now, when nothing can fail but the writing
        path.unlink(missing_ok=True)
    files.write_image(folder / "moved.nii.gz", image, fixed)
    if not linear:
        files.write_vectors(folder / "displacement.nii.gz", vectors, fixed)
        files.write_image(folder / "jacobian.nii.gz", change, fixed)
    if labels is not None:
        files.write_labels(folder / "moved_seg.nii.gz", drawn, fixed)
    checkpoint.write_text(folder / "linear.tfm", transforms.itk_transform(found.linear))


def write_review(path: Path, found: dict[str, dict[str, Found]]) -> None:
    """Write what was found in many exams as a table, the lowest confidence first and what is absent last."""
    rows = [(exam, one) for exam, structures in found.items() for one in structures.values()]
    rows.sort(key=lambda row: 2.0 if row[1].confidence is None else row[1].confidence)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["exam", "structure", "status", "confidence", "coverage", "volume_ml", "mask"])
    for exam, one in rows:
        numbers = ["" if value is None else f"{value:.4g}" for value in (one.confidence, one.coverage, one.volume_ml)]
        writer.writerow([exam, one.name, one.status, *numbers, answer_paths(Path(), exam)[0].name])
    checkpoint.write_text(path, table.getvalue().rstrip("\n"))


def targets(asked: Path, exams: list[Path], output: Path, suffix: str, endings: tuple[str, ...]) -> dict[Path, Path]:
    """Where the answer for each exam goes: into a folder by its name where a folder was asked for, else to `output`.

    Args:
        endings: of which the name of a single answer must have one.

    Raises:
        ExamError: `output` is not named like a file where one is asked for.
    """
    if asked.is_dir():
        return {path: output / f"{files.exam_name(path)}{suffix}" for path in exams}
    check_file(output, endings)
    return {exams[0]: output}


def check_file(path: Path, endings: tuple[str, ...]) -> None:
    """Refuse an output that cannot be a file.

    Raises:
        ExamError: it is a folder, or its name has none of the endings.
    """
    if path.is_dir() or not path.name.lower().endswith(endings):
        got = f"the folder {path}" if path.is_dir() else path.name
        raise ExamError(f"Expected an output file ending in {' or '.join(endings)}, got {got}; name a file.")


def claim(paths: Iterable[Path], overwrite: bool) -> None:
    """Make the folders of outputs, and refuse, before any work, those that exist already.

    Raises:
        ExamError: an output exists and `overwrite` is not set, or its folder is named like a file or cannot be made.
    """
    paths = list(paths)
    folders = list(dict.fromkeys(path.parent for path in paths))
    for path in paths:
        if path.is_dir() and path.name.lower().endswith(FILE_ENDINGS):
            raise ExamError(f"Expected to write the file {path}, got a folder of that name; choose another place.")
    for folder in folders:
        if folder.name.lower().endswith(FILE_ENDINGS) and not folder.is_dir():
            raise ExamError(f"Expected an output folder, got {folder}, which is named like a file; name a folder.")
    present = [path for path in paths if path.exists()]
    if present and not overwrite:
        more = f" and {len(present) - 1} more" if len(present) > 1 else ""
        raise ExamError(
            f"Expected new outputs, but {present[0]}{more} exists already; add --overwrite to replace, "
            "or choose another place."
        )
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ExamError(
                f"Expected to write into {folder}, but cannot ({error.strerror}); choose another."
            ) from None


def each(
    paths: list[Path], work: Callable[[Path], None], on_done: Callable[[int, int, str], None] | None = None
) -> dict[str, str]:
    """Do something with every exam; one that fails is noted and the rest goes on.

    Args:
        on_done: called after each as `on_done(done, total, name)`.

    Returns:
        Exam name → why it failed, without its folder.
    """
    failed = {}
    for done, path in enumerate(paths, start=1):
        try:
            with memory_as_such():
                work(path)
        except (DeepAtlasError, MemoryError) as error:
            failed[files.exam_name(path)] = reason(error, path)
        if on_done is not None:
            on_done(done, len(paths), files.exam_name(path))
    return failed


def reason(error: DeepAtlasError | MemoryError, *paths: Path) -> str:
    """Why an exam failed, in a line that names its files but not their folders."""
    text = str(error)
    if isinstance(error, MemoryError):
        text = f"{paths[0].name}: expected an exam that fits into memory, ran out of it; crop or coarsen the exam."
    for path in paths:
        text = text.replace(str(path), path.name)
    return " ".join(text.split())


def write_failed(path: Path, failed: dict[str, str], done: Iterable[str] = ()) -> None:
    """Write the list of exams that failed (name → reason), or remove it where there is none.

    What an earlier run noted about exams that are not in `done` stays; no `done` begins the list anew.
    """
    done = set(done)
    if done:
        failed = {name: text for name, text in read_failed(path).items() if name not in done} | failed
    if failed:
        checkpoint.write_text(path, json.dumps(failed, indent=1, sort_keys=True))
    else:
        path.unlink(missing_ok=True)


def read_failed(path: Path) -> dict[str, str]:
    """The list of exams that failed (name → reason); empty where there is none that can be read."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _entry(one: Found) -> dict[str, Any]:
    return {
        "label": one.label,
        "status": one.status,
        "coverage": _rounded(one.coverage, 4),
        "confidence": _rounded(one.confidence, 4),
        "volume_ml": _rounded(one.volume_ml, 3),
        "centroid": _rounded(one.centroid_mm, 2),
        "box": _rounded(one.box_mm, 2),
    }


def _rounded(value: Any, digits: int) -> Any:
    """A number, or nested tuples of them as lists, rounded; None stays None."""
    if value is None:
        return None
    if isinstance(value, tuple):
        return [_rounded(item, digits) for item in value]
    return round(float(value), digits)
