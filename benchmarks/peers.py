"""One-shot propagation against ANTs and elastix, on the exams of `EXAMS`, from arrays in memory to a label array.

The peers run in an environment of their own (``make bench-peers`` makes it), each exam right after ours, with the same
two threads and their default parameter maps. Labels known to be faulty are left out.
"""

import json
import os
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from benchmarks.measure import Row

EXAMS = ("pt_201", "pt_206", "pt_210", "pt_215", "pt_221", "pt_226", "pt_231", "pt_237")
SEED = "pt_200"
THREADS = "2"
LIMIT_S = float(os.environ.get("PEERS_LIMIT_S", "600"))
"""Seconds after which a registration is stopped. It then counts with that time, and with the labels moved by the last
step it had finished."""
METHODS = {"vs_ants": ("ants_syn",), "vs_elastix": ("elastix_rigid", "elastix_rigid_affine", "elastix_bspline")}
PYTHON = Path(os.environ.get("PEERS_PYTHON", ".peers/bin/python"))
WORKER = Path(__file__).with_name("peers_worker.py")
FAULTS = Path(__file__).parents[1] / "docs" / "results" / "openkbp-label-faults.json"


class Unavailable(Exception):
    """The exams or the peers are not here."""


class Trial(NamedTuple):
    """One exam by one method."""

    seconds: float
    dice: dict[str, float]
    """By structure, of those drawn in the exam."""
    stood: str = ""
    """Where it stood when it was stopped."""


def row(name: str) -> Row:
    """Median time of an exam and mean Dice, ours and theirs."""
    require()
    ours: list[Trial] = []
    theirs: dict[str, list[Trial]] = {method: [] for method in METHODS[name]}
    for exam in EXAMS:
        ours.append(_ours(exam))
        for method, trials in theirs.items():
            trials.append(_theirs(method, exam))
    notes = [f"ours Dice {_mean(ours):.3f}"]
    for method, trials in theirs.items():
        stopped = [trial.stood for trial in trials if trial.stood]
        above = ", ".join(name for name, dice in _by_structure(trials).items() if dice > _by_structure(ours)[name])
        late = f" ({len(stopped)} of {len(trials)} stopped: {', '.join(sorted(set(stopped)))})" if stopped else ""
        notes.append(
            f"{method} {_seconds(trials):.2f} s Dice {_mean(trials):.3f}{late}, above ours in {above or 'none'}"
        )
    seconds, reference = _seconds(ours), _seconds(theirs[METHODS[name][-1]])
    return Row(name, seconds, reference, reference / seconds, note="; ".join(notes))


def _seconds(trials: list[Trial]) -> float:
    return median(trial.seconds for trial in trials)


def _by_structure(trials: list[Trial]) -> dict[str, float]:
    """Mean over the exams."""
    names = sorted({name for trial in trials for name in trial.dice})
    return {name: float(np.mean([one.dice[name] for one in trials if name in one.dice])) for name in names}


def _mean(trials: list[Trial]) -> float:
    return float(np.mean(list(_by_structure(trials).values())))


def require() -> None:
    """Raise `Unavailable` where the exams or the peers are not here."""
    if not os.environ.get("DEEPATLAS_DATA"):
        raise Unavailable("needs DEEPATLAS_DATA, the folder that holds openkbp/")
    if not PYTHON.exists():
        raise Unavailable(f"needs {PYTHON}: run `make bench-peers`")


def _paths(exam: str) -> tuple[Path, Path]:
    """Image and labels."""
    part = Path(os.environ["DEEPATLAS_DATA"]) / "openkbp" / ("train" if exam == SEED else "validation")
    return part / "images" / f"{exam}.nii.gz", part / "labels" / f"{exam}.nii.gz"


def _names() -> dict[str, int]:
    return json.loads((Path(os.environ["DEEPATLAS_DATA"]) / "openkbp" / "labels.json").read_text(encoding="utf-8"))


def _dice(exam: str, found: np.ndarray) -> dict[str, float]:
    from deepatlas.files import read_labels
    from deepatlas.metrics import dice

    faults = json.loads(FAULTS.read_text(encoding="utf-8"))
    truth = read_labels(_paths(exam)[1]).array
    sound = {name: n for name, n in _names().items() if exam not in faults.get(name, ())}
    return {name: dice(found == n, truth == n) for name, n in sound.items() if (truth == n).any()}


@cache
def _model():
    """The shipped model, taught by one exam; it has located that exam once, so everything is compiled."""
    import torch

    import deepatlas
    from deepatlas.files import read_exam, read_labels
    from deepatlas.locate import define, locate

    torch.set_num_threads(int(THREADS))
    image, labels = _paths(SEED)
    seed = read_exam(image)
    model = define(deepatlas.load("head-neck-ct"), [(seed, read_labels(labels, like=seed))], _names())
    locate(model, seed, _names())
    return model


def _ours(exam: str, repeats: int = 3) -> Trial:
    """The plain pass."""
    from deepatlas.files import read_exam
    from deepatlas.locate import locate
    from deepatlas.outputs import label_map

    volume, spent = read_exam(_paths(exam)[0]), []
    for _ in range(repeats):
        began = time.perf_counter()
        found = label_map(locate(_model(), volume, _names()), volume.shape)
        spent.append(time.perf_counter() - began)
    return Trial(median(spent), _dice(exam, found))


def _theirs(method: str, exam: str) -> Trial:
    found, seconds, stood = propagate(method, *_paths(SEED), _paths(exam)[0])
    return Trial(seconds, _dice(exam, found), stood)


def propagate(method: str, moving: Path, labels: Path, fixed: Path) -> tuple[np.ndarray, float, str]:
    """The labels of a moving image on the grid of a fixed one by a peer's registration, the seconds it took, and where
    it stood if it was stopped."""
    environment = os.environ | {
        "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": THREADS,
        "OMP_NUM_THREADS": THREADS,
        "MKL_NUM_THREADS": THREADS,
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [PYTHON, WORKER, method, moving, labels, fixed, folder]
        seconds, stood = LIMIT_S, ""
        try:
            subprocess.run(command, env=environment, timeout=LIMIT_S, check=True, capture_output=True)
            seconds = json.loads((Path(folder) / "found.json").read_text(encoding="utf-8"))["seconds"]
        except subprocess.TimeoutExpired:
            stood = subprocess.run(
                [*command, "--stopped"], env=environment, check=True, capture_output=True, text=True
            ).stdout.splitlines()[-1]
        return np.load(Path(folder) / "found.npy"), seconds, stood
