"""Run by the peers' own Python: ``peers_worker.py METHOD SEED_IMAGE SEED_LABELS EXAM OUT`` → OUT.npy, OUT.json.

Only the registration and the warp of the labels are timed, from images in memory to a label array.
"""

import json
import sys
import time

import numpy as np


def ants_syn(seed: str, labels: str, exam: str) -> tuple[np.ndarray, float]:
    """SyN with its own affine, all defaults."""
    import ants

    fixed, moving, marked = (ants.image_read(path) for path in (exam, seed, labels))
    began = time.perf_counter()
    found = ants.registration(fixed, moving, "SyN")
    moved = ants.apply_transforms(fixed, marked, found["fwdtransforms"], interpolator="nearestNeighbor")
    array = moved.numpy()
    return array, time.perf_counter() - began


def elastix(maps: list[str], seed: str, labels: str, exam: str) -> tuple[np.ndarray, float]:
    """The default parameter maps of elastix, one after the other."""
    import itk

    fixed, moving, marked = (itk.imread(path, itk.F) for path in (exam, seed, labels))
    began = time.perf_counter()
    parameters = itk.ParameterObject.New()
    for name in maps:
        parameters.AddParameterMap(itk.ParameterObject.GetDefaultParameterMap(name))
    _, transform = itk.elastix_registration_method(
        fixed, moving, parameter_object=parameters, number_of_threads=2, log_to_console=False
    )
    transform.SetParameter("FinalBSplineInterpolationOrder", "0")
    transform.SetParameter("ResampleInterpolator", "FinalNearestNeighborInterpolator")
    moved = itk.transformix_filter(marked, transform, log_to_console=False)
    array = np.moveaxis(np.asarray(moved), [0, 1, 2], [2, 1, 0])
    return array, time.perf_counter() - began


METHODS = {
    "ants_syn": ants_syn,
    "elastix_rigid": lambda *paths: elastix(["rigid"], *paths),
    "elastix_rigid_affine": lambda *paths: elastix(["rigid", "affine"], *paths),
    "elastix_bspline": lambda *paths: elastix(["rigid", "affine", "bspline"], *paths),
}

if __name__ == "__main__":
    method, *paths, out = sys.argv[1:]
    array, seconds = METHODS[method](*paths)
    np.save(f"{out}.npy", np.rint(array).astype(np.int16))
    with open(f"{out}.json", "w", encoding="utf-8") as file:
        json.dump({"seconds": seconds}, file)
