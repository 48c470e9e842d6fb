"""One-shot propagation against ANTs and elastix, on the exams of `EXAMS`, from arrays in memory to a label array.

The peers run in an environment of their own (``make bench-peers`` makes it), one exam after the other and each right
after ours, with the same two threads and their default parameter maps.
"""

import json
import os
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks.measure import Row

EXAMS = ("pt_201", "pt_206", "pt_210", "pt_215", "pt_221", "pt_226", "pt_231", "pt_237")
SEED = "pt_200"
THREADS = "2"
LIMIT_S = float(os.environ.get("PEERS_LIMIT_S", "600"))
"""Seconds after which a registration is stopped; it then counts as not done and the time as a lower bound."""
METHODS = {"vs_ants": ("ants_syn",), "vs_elastix": ("elastix_rigid", "elastix_rigid_affine", "elastix_bspline")}
PYTHON = Path(os.environ.get("PEERS_PYTHON", ".peers/bin/python"))


class Unavailable(Exception):
    """The exams or the peers are not here."""


def row(name: str) -> Row:
    """Median time of an exam and mean Dice, ours and theirs."""
    ours, theirs = _ours(), {method: _theirs(method) for method in METHODS[name]}
    method = METHODS[name][-1]
    done = theirs[method]
    notes = [f"ours Dice {_mean(ours['dice']):.3f}"]
    for label, one in theirs.items():
        late = f", {one['late']} of {len(EXAMS)} stopped at {LIMIT_S:.0f} s" if one["late"] else ""
        notes.append(f"{label} {np.median(one['seconds']):.2f} s Dice {_mean(one['dice']):.3f}{late}")
    seconds = float(np.median(ours["seconds"])), float(np.median(done["seconds"]))
    return Row(name, *seconds, seconds[1] / seconds[0], note="; ".join(notes))


def _mean(scores: list[dict[str, float]]) -> float:
    """Mean over structures of the mean over exams; an exam that was not done counts 0."""
    names = sorted({name for one in scores for name in one})
    return float(np.mean([np.mean([one[name] for one in scores if name in one]) for name in names])) if names else 0.0


@cache
def _exams() -> dict[str, tuple[Path, Path]]:
    folder = os.environ.get("DEEPATLAS_DATA")
    if not folder:
        raise Unavailable("needs DEEPATLAS_DATA, the folder that holds openkbp/")
    data = Path(folder) / "openkbp"
    found = {SEED: tuple(data / "train" / part / f"{SEED}.nii.gz" for part in ("images", "labels"))}
    for name in EXAMS:
        found[name] = tuple(data / "validation" / part / f"{name}.nii.gz" for part in ("images", "labels"))
    return found


def _names() -> dict[str, int]:
    return json.loads((Path(os.environ["DEEPATLAS_DATA"]) / "openkbp" / "labels.json").read_text(encoding="utf-8"))


def _dice(found: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    from deepatlas.metrics import dice

    return {name: dice(found == n, truth == n) for name, n in _names().items() if (truth == n).any()}


@cache
def _ours() -> dict:
    import torch

    import deepatlas
    from deepatlas.files import read_exam, read_labels
    from deepatlas.locate import define, locate
    from deepatlas.outputs import label_map

    exams = _exams()
    torch.set_num_threads(int(THREADS))
    model = deepatlas.load("head-neck-ct")
    seed = read_exam(exams[SEED][0])
    labels = read_labels(exams[SEED][1], like=seed)
    model = define(model, [(seed, labels)], _names())
    seconds, scores = [], []
    for turn, name in enumerate((EXAMS[0], *EXAMS)):  # the first once more, to compile
        exam = read_exam(exams[name][0])
        began = time.perf_counter()
        found = label_map(locate(model, exam, _names()), exam.shape)
        if turn:
            seconds.append(time.perf_counter() - began)
            scores.append(_dice(found, read_labels(exams[name][1], like=exam).array))
    return {"seconds": seconds, "dice": scores}


@cache
def _theirs(method: str) -> dict:
    from deepatlas.files import read_labels

    exams = _exams()
    if not PYTHON.exists():
        raise Unavailable(f"needs {PYTHON}: run `make bench-peers`")
    seconds, scores, late = [], [], 0
    environment = os.environ | {
        "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": THREADS,
        "OMP_NUM_THREADS": THREADS,
        "MKL_NUM_THREADS": THREADS,
    }
    for name in EXAMS:
        truth = read_labels(exams[name][1]).array
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "found"
            command = [PYTHON, Path(__file__).with_name("peers_worker.py"), method, *exams[SEED], exams[name][0], out]
            try:
                subprocess.run(command, env=environment, timeout=LIMIT_S + 30, check=True, capture_output=True)
                seconds.append(json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))["seconds"])
                scores.append(_dice(np.load(out.with_suffix(".npy")), truth))
            except subprocess.TimeoutExpired:
                late += 1
                seconds.append(LIMIT_S)
                scores.append(dict.fromkeys(_dice(truth, truth), 0.0))
    return {"seconds": seconds, "dice": scores, "late": late}
