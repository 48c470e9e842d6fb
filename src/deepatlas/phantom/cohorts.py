"""Exams and cohorts, the same to the bit for the same seed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from deepatlas.phantom.bending import Deformation, draw_deformation
from deepatlas.phantom.looks import STRUCTURES, Appearance, draw_appearance
from deepatlas.phantom.scanner import FIELDS_OF_VIEW, acquire, canonical_range, draw_acquisition
from deepatlas.volume import Volume


@dataclass(frozen=True)
class PhantomExam:
    """One exam with the truth about it."""

    name: str
    image: Volume  # int16, HU
    labels: Volume  # uint8, numbered by STRUCTURES
    deformation: Deformation  # this exam's mm <-> canonical mm
    appearance: Appearance
    field_of_view: str


def draw(seed: int | Sequence[int], field_of_view: str | None = None, name: str | None = None) -> PhantomExam:
    """One exam, the same to the bit for the same arguments.

    `field_of_view` is a key of `FIELDS_OF_VIEW`; None draws one, whole a third of the time. Raises ValueError for
    another word.

    >>> exam = draw(0, "chest")
    >>> bool((exam.labels.array == STRUCTURES["heart"]).any())
    True
    """
    rng = np.random.default_rng(seed)
    drawn = _draw_field_of_view(rng, tuple(FIELDS_OF_VIEW))
    field_of_view = drawn if field_of_view is None else field_of_view
    canonical_range(field_of_view)
    # A long body would leave the scanner's bore if it lay as askew as a head can.
    deformation = draw_deformation(rng, tilt_degrees=4.0 if field_of_view in ("whole", "trunk") else 11.0)
    appearance = draw_appearance(rng)
    acquisition = draw_acquisition(rng, deformation, field_of_view)
    image, labels = acquire(deformation, appearance, acquisition)
    return PhantomExam(
        name=f"phantom_{seed}" if name is None else name,
        image=image,
        labels=labels,
        deformation=deformation,
        appearance=appearance,
        field_of_view=field_of_view,
    )


def _draw_field_of_view(rng: np.random.Generator, mix: Sequence[str]) -> str:
    partial = [word for word in mix if word != "whole"]
    whole, which = rng.random() < 1 / 3, rng.integers(max(len(partial), 1))
    if not partial or (whole and "whole" in mix):
        return "whole"
    return partial[which]


def cohort_exam(index: int, seed: int, fields_of_view: Sequence[str] = tuple(FIELDS_OF_VIEW)) -> PhantomExam:
    """Exam `index` of the cohort `seed`, as `write_cohort` writes it; exam 0 is a whole one.

    `fields_of_view` is the mix to draw the others from; where it has "whole", a third are.
    """
    field_of_view = "whole"
    if index > 0:
        field_of_view = _draw_field_of_view(np.random.default_rng([seed, index, 1]), fields_of_view)
    return draw([seed, index], field_of_view, name=_name(index))


def cohort_paths(folder: Path, count: int) -> list[Path]:
    """The files that `write_cohort` writes."""
    exams = [folder / part / f"{_name(index)}.nii.gz" for part in ("images", "labels") for index in range(count)]
    return [folder / "labels.json", *exams]


def _name(index: int) -> str:
    return f"phantom_{index:03d}"


def write_cohort(
    folder: str | Path, count: int, seed: int, fields_of_view: Sequence[str] = tuple(FIELDS_OF_VIEW)
) -> list[Path]:
    """Write `count` exams and return the paths of their images.

    `images/phantom_000.nii.gz` (int16 HU), `labels/phantom_000.nii.gz` (uint8) and `labels.json` (name to number).
    `cohort_exam(index, seed, fields_of_view)` gives any of them back with its true coordinates.
    """
    folder = Path(folder)
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "labels.json").write_text(json.dumps(STRUCTURES, indent=2) + "\n")
    paths = []
    for index in range(count):
        exam = cohort_exam(index, seed, fields_of_view)
        for part, volume in (("images", exam.image), ("labels", exam.labels)):
            nifti = nib.Nifti1Image(volume.array, volume.affine)
            nifti.header.set_xyzt_units("mm")
            nib.save(nifti, folder / part / f"{exam.name}.nii.gz")
        paths.append(folder / "images" / f"{exam.name}.nii.gz")
    return paths
