"""Run by the peers' own Python: ``peers_worker.py METHOD SEED_IMAGE SEED_LABELS EXAM FOLDER [--stopped]``.

Writes the moved labels and the seconds into the folder: ``found.npy``, ``found.json``. Only the registration and the
warp of the labels are timed, from images in memory to a label array. With ``--stopped``: moves the labels by the last
step that a run stopped before left in the folder, and prints which that was.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

MAPS = {
    "elastix_rigid": ["rigid"],
    "elastix_rigid_affine": ["rigid", "affine"],
    "elastix_bspline": ["rigid", "affine", "bspline"],
}


def ants_syn(seed: str, labels: str, exam: str) -> tuple[np.ndarray, float]:
    """SyN with its own affine, all defaults."""
    import ants

    fixed, moving, marked = (ants.image_read(path) for path in (exam, seed, labels))
    began = time.perf_counter()
    found = ants.registration(fixed, moving, "SyN")
    moved = ants.apply_transforms(fixed, marked, found["fwdtransforms"], interpolator="nearestNeighbor")
    array = moved.numpy()
    return array, time.perf_counter() - began


def elastix(maps: list[str], seed: str, labels: str, exam: str, folder: str) -> tuple[np.ndarray, float]:
    """The default parameter maps of elastix, one after the other."""
    import itk

    fixed, moving, marked = (itk.imread(path, itk.F) for path in (exam, seed, labels))
    parameters, register = itk.ParameterObject.New(), itk.elastix_registration_method  # loaded here, at first use
    began = time.perf_counter()
    for name in maps:
        one = itk.ParameterObject.GetDefaultParameterMap(name)
        one["WriteTransformParametersEachResolution"] = ["true"]
        parameters.AddParameterMap(one)
    _, transform = (
        register(  # its threads by the environment: number_of_threads crashes on several metrics (ITKElastix issue 160)
            fixed, moving, parameter_object=parameters, output_directory=folder, log_to_console=False
        )
    )
    return _moved(transform, marked), time.perf_counter() - began


def stopped(maps: list[str], labels: str, folder: str) -> tuple[np.ndarray, str]:
    """The labels moved by the last transform written, and its name."""
    import itk

    marked = itk.imread(labels, itk.F)
    last = max(Path(folder).glob("TransformParameters.*.txt"), key=lambda path: path.stat().st_mtime)
    _, stage, *resolution, _ = last.name.split(".")
    chain = [str(last.with_name(f"TransformParameters.{n}.txt")) for n in range(int(stage))] + [str(last)]
    transform = itk.ParameterObject.New()
    transform.ReadParameterFiles(chain)
    reached = f"resolution {int(resolution[0][1:]) + 1}" if resolution else "all resolutions"
    return _moved(transform, marked), f"{maps[int(stage)]}, {reached} done"


def _moved(transform, marked) -> np.ndarray:
    import itk

    transform.SetParameter("FinalBSplineInterpolationOrder", "0")
    transform.SetParameter("ResampleInterpolator", "FinalNearestNeighborInterpolator")
    moved = itk.transformix_filter(marked, transform, log_to_console=False)
    return np.moveaxis(np.asarray(moved), [0, 1, 2], [2, 1, 0])


def main(method: str, seed: str, labels: str, exam: str, folder: str, *rest: str) -> None:
    """Register, or take up what a stopped run left."""
    if rest:
        array, stood = stopped(MAPS[method], labels, folder)
        print(stood)
    else:
        array, seconds = (
            elastix(MAPS[method], seed, labels, exam, folder) if method in MAPS else ants_syn(seed, labels, exam)
        )
        Path(folder, "found.json").write_text(json.dumps({"seconds": seconds}), encoding="utf-8")
    np.save(Path(folder, "found.npy"), np.rint(array).astype(np.int16))


if __name__ == "__main__":
    main(*sys.argv[1:])
