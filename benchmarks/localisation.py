"""What the map answers on the validation exams: ``python -m benchmarks.localisation presence --json FILE``.

Lists of cuts and pairs are committed under `docs/results/`; ``--make`` writes them anew from the label maps.
"""

import argparse
import io
import json
import os
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import nibabel
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

import deepatlas
from benchmarks import peers
from deepatlas import dense, orientation, register, report, transforms, vote
from deepatlas.checkpoint import Model
from deepatlas.config import FINE
from deepatlas.embedding import Embedded, embed
from deepatlas.files import Exam, exam_name, find_exams, read_exam, read_labels
from deepatlas.found import Found
from deepatlas.library import define_files, without_faults
from deepatlas.locate import define, locate
from deepatlas.metrics import dice
from deepatlas.prepare import prepare
from deepatlas.refine import refine, settled
from deepatlas.volume import Volume, apply, to_ras

RESULTS = Path(__file__).parents[1] / "docs" / "results"
CUTS, PAIRS = RESULTS / "presence-cuts.json", RESULTS / "register-pairs.json"
CUT_STRUCTURES = ("brainstem", "parotid_right", "parotid_left", "larynx", "mandible")
"""Cord and esophagus are drawn only as far as a planner needed: where they end is not known."""

KINDS = {"present": 0.0, "cut_off": 0.5, "absent": 1.0}
GAP_MM = 10.0
"""A structure that is removed wholly is removed with so much beside it; an uncut one keeps so much."""


def folder() -> Path:
    """The exams."""
    where = os.environ.get("DEEPATLAS_DATA")
    if not where:
        sys.exit("needs DEEPATLAS_DATA, the folder that holds openkbp/")
    return Path(where) / "openkbp"


def names() -> dict[str, int]:
    """Structure → number."""
    return json.loads((folder() / "labels.json").read_text(encoding="utf-8"))


def faulty() -> dict[str, list[str]]:
    """Structure → exams whose label is wrong."""
    return json.loads((RESULTS / "openkbp-label-faults.json").read_text(encoding="utf-8"))


def validation() -> list[str]:
    """Names of the validation exams."""
    return sorted(path.name.removesuffix(".nii.gz") for path in (folder() / "validation" / "images").glob("*.nii.gz"))


def exam_of(name: str) -> tuple[Exam, Volume]:
    """A validation exam and its label map."""
    exam = read_exam(folder() / "validation" / "images" / f"{name}.nii.gz")
    return exam, read_labels(folder() / "validation" / "labels" / f"{name}.nii.gz", like=exam)


def slab(volume: Volume, low: int, high: int) -> Volume:
    """The slices low … high − 1 of an exam, counted from the feet: a shorter scan."""
    ras = to_ras(volume)
    shift = np.eye(4)
    shift[2, 3] = low
    return Volume(np.ascontiguousarray(ras.array[:, :, low:high]), ras.affine @ shift)


# --- presence ---------------------------------------------------------------------------------------------------------


def make_cuts() -> list[dict]:
    """Cuts along the body that remove a structure wholly, half of it, or nothing: four an exam."""
    cuts, chance = [], np.random.default_rng(0)
    for number, name in enumerate(validation()):
        exam, labels = exam_of(name)
        ras, step = to_ras(labels).array, float(to_ras(labels).spacing_mm[2])
        shown = np.flatnonzero((to_ras(exam).array > -500).any(axis=(0, 1)))
        drawn = [s for s in CUT_STRUCTURES if (ras == names()[s]).any() and name not in faulty().get(s, [])]
        for turn, kind in enumerate(("absent", "cut_off", "present", "absent" if number % 2 else "cut_off")):
            structure = drawn[(number + turn) % len(drawn)]
            slices = np.flatnonzero((ras == names()[structure]).any(axis=(0, 1)))
            from_above = bool(chance.integers(2))
            gap = int(np.ceil(GAP_MM / step))
            volume = (ras == names()[structure]).sum(axis=(0, 1))
            half = int(np.searchsorted(np.cumsum(volume), volume.sum() / 2))
            low, high = {
                ("absent", True): (shown[0], slices[0] - gap),
                ("absent", False): (slices[-1] + 1 + gap, shown[-1] + 1),
                ("cut_off", True): (shown[0], half),
                ("cut_off", False): (half, shown[-1] + 1),
                ("present", True): (shown[0], min(slices[-1] + 1 + gap, shown[-1] + 1)),
                ("present", False): (max(slices[0] - gap, shown[0]), shown[-1] + 1),
            }[kind, from_above]
            if (high - low) * step < 60:  # too little is left: cut from the other side
                continue
            cuts.append({"exam": name, "structure": structure, "truth": kind, "slices": [int(low), int(high)]})
    return cuts


def presence(model: Model) -> dict:
    """Statuses on the committed cuts against the truth, and how often a drawn, uncut structure is called absent."""
    cuts = json.loads(CUTS.read_text(encoding="utf-8"))
    table = {truth: dict.fromkeys(KINDS, 0) for truth in KINDS}
    cases = []
    for cut in cuts:
        exam, _ = exam_of(cut["exam"])
        found = locate(model, slab(exam, *cut["slices"]), [cut["structure"]])[cut["structure"]]
        table[cut["truth"]][found.status] += 1
        cases.append(cut | {"status": found.status, "coverage": round(found.coverage, 3)})
    whole, missed = 0, 0
    for name in validation():
        exam, labels = exam_of(name)
        found = locate(model, exam)
        for structure, number in names().items():
            if (labels.array == number).any() and name not in faulty().get(structure, []):
                whole += 1
                missed += found[structure].status == "absent"
    recall = {truth: row[truth] / max(1, sum(row.values())) for truth, row in table.items()}
    return {
        "cuts": len(cuts),
        "removed_called_absent": round(recall["absent"], 4),
        "uncut_called_absent": round(missed / whole, 4),
        "balanced_accuracy": round(float(np.mean(list(recall.values()))), 4),
        "table": table,
        "cases": cases,
    }


# --- orientation ------------------------------------------------------------------------------------------------------


def turns(model: Model, exams: int = 33) -> dict:
    """Copies stored as if turned by one of the 24 rotations or mirrored: how many are put right, and reported."""
    ways = orientation.cube_symmetries()
    right, mirrors, called, cases = 0, 0, 0, []
    for number, name in enumerate(validation()[:exams]):
        exam, _ = exam_of(name)
        for way in (ways[(5 * number) % 24], ways[24 + (5 * number) % 24]):
            proper = np.linalg.det(way) > 0
            wrong = Volume(exam.array, orientation.put_right(exam, way).affine)
            found = orientation.upright(model, wrong)
            if proper:
                right += np.array_equal(found.turn, way.T)
            else:
                mirrors += 1
                called += found.mirrored
            cases.append(
                {
                    "exam": name,
                    "proper": bool(proper),
                    "right": bool(np.array_equal(found.turn, way.T)),
                    "mirrored": found.mirrored,
                    "likeness": round(found.likeness, 3),
                }
            )
    return {
        "turned": exams,
        "put_right": round(right / exams, 4),
        "mirrored": mirrors,
        "mirrored_reported": round(called / max(1, mirrors), 4),
        "cases": cases,
    }


# --- coregistration ---------------------------------------------------------------------------------------------------


def make_pairs() -> list[dict]:
    """Twenty pairs; of every second one the exams are shortened so that they share less than half their length."""
    chance, found = np.random.default_rng(1), []
    order = [str(name) for name in chance.permutation(validation())]
    for number in range(20):
        fixed, moving = order[number], order[(number + 7) % len(order)]
        pair = {"fixed": fixed, "moving": moving, "fixed_slices": None, "moving_slices": None}
        if number % 2:
            for role, upper in (("fixed", True), ("moving", False)):
                pair[f"{role}_slices"] = _part(pair[role], upper)
        found.append(pair)
    return found


def _part(name: str, upper: bool) -> list[int]:
    """The upper or the lower part of an exam; both hold the slices around the mandible's lower end."""
    exam, labels = exam_of(name)
    ras = to_ras(labels).array
    shown = np.flatnonzero((to_ras(exam).array > -500).any(axis=(0, 1)))
    marks = [np.flatnonzero((ras == names()[s]).any(axis=(0, 1))) for s in ("mandible", "parotid_left", "brainstem")]
    middle = next((int(np.median(m)) for m in marks if len(m)), int(shown.mean()))
    reach = int(0.3 * (shown[-1] - shown[0]) / 2)
    return [middle - reach, int(shown[-1]) + 1] if upper else [int(shown[0]), middle + reach]


def pairs(model: Model, refined: bool = False, ants: bool = False) -> dict:
    """Mean Dice of the structures both exams show, after the linear and the deformable registration, and after that of
    ANTs where it is asked for."""
    cases = []
    kinds = ("linear", "deformable", *(["ants"] if ants else []))
    if ants:
        peers.require()
    for pair in json.loads(PAIRS.read_text(encoding="utf-8")):
        (fixed, fixed_labels), (moving, moving_labels) = exam_of(pair["fixed"]), exam_of(pair["moving"])
        if pair["fixed_slices"]:
            fixed, fixed_labels = (slab(v, *pair["fixed_slices"]) for v in (fixed, fixed_labels))
            moving, moving_labels = (slab(v, *pair["moving_slices"]) for v in (moving, moving_labels))
        began = time.monotonic()
        maps = [embed(model, exam) for exam in (fixed, moving)]
        fine = None
        if refined:
            fine = tuple(prepare(exam, FINE.size, model.region) for exam in (fixed, moving))
            maps = [refine(model, exam, one) for exam, one in zip((fixed, moving), maps, strict=True)]
        case = dict(pair)
        shared = [n for n in names().values() if all((one.array == n).any() for one in (fixed_labels, moving_labels))]
        laid = {}
        for kind in ("linear", "deformable"):
            there = register.register(*maps, deformable=kind == "deformable", fine=fine)
            laid[kind] = transforms.moved(there, fixed, moving_labels, labels=True)
        case |= {"overlap": round(there.overlap, 3), "folded": round(there.folded, 5), "structures": len(shared)}
        case["seconds"] = round(time.monotonic() - began, 2)
        if ants:
            laid["ants"] = _by_ants(fixed, moving, moving_labels)
        for kind in kinds:
            case[kind] = round(float(np.mean([dice(laid[kind] == n, fixed_labels.array == n) for n in shared])), 4)
        cases.append(case)
    short = [case for case in cases if case["fixed_slices"]]
    whole = [case for case in cases if not case["fixed_slices"]]

    def mean(some: list[dict], key: str) -> float:
        return round(float(np.mean([case[key] for case in some])), 4)

    return {key: {"all": mean(cases, key), "whole": mean(whole, key), "short": mean(short, key)} for key in kinds} | {
        "folded": mean(cases, "folded"),
        "cases": cases,
    }


def _by_ants(fixed: Volume, moving: Volume, labels: Volume) -> np.ndarray:
    """The moving labels on the fixed grid by ANTs SyN with its own affine."""
    with tempfile.TemporaryDirectory() as place:
        paths = []
        for name, volume in (("moving", moving), ("labels", labels), ("fixed", fixed)):
            paths.append(Path(place) / f"{name}.nii.gz")
            nibabel.save(nibabel.Nifti1Image(np.asarray(volume.array, np.float32), volume.affine), paths[-1])
        return peers.propagate("ants_syn", *paths)[0]


# --- confidence -------------------------------------------------------------------------------------------------------


def calibration(model: Model) -> dict:
    """Confidence against Dice of every drawn structure of the validation exams."""
    cases = []
    for name in validation():
        exam, labels = exam_of(name)
        for structure, one in locate(model, exam).items():
            truth = labels.array == names()[structure]
            if truth.any() and name not in faulty().get(structure, []) and one.mask is not None:
                place = apply(exam.affine, np.argwhere(truth)).mean(axis=0)
                off = float(np.linalg.norm(np.array(one.centroid_mm) - place))
                cases.append(
                    {
                        "exam": name,
                        "structure": structure,
                        "confidence": round(one.confidence, 4),
                        "dice": round(dice(one.mask, truth), 4),
                        "centroid_mm": round(off, 2),
                    }
                )
    confidence, score = (np.array([case[key] for case in cases]) for key in ("confidence", "dice"))
    ranks = [np.argsort(np.argsort(values)) for values in (confidence, score)]
    bins = np.quantile(confidence, np.linspace(0, 1, 6))
    rows = []
    for low, high in pairwise(bins):
        here = (confidence >= low) & (confidence <= high)
        rows.append(
            {"confidence": round(float(confidence[here].mean()), 3), "dice": round(float(score[here].mean()), 3)}
        )
    return {"rank_correlation": round(float(np.corrcoef(*ranks)[0, 1]), 3), "bins": rows, "cases": cases}


def mask_of(found: Found, exam: Exam) -> np.ndarray:
    """Of a structure, empty where it is absent."""
    return np.zeros(exam.shape, bool) if found.mask is None else found.mask


VOTERS = 10
"""The first so many training exams."""


def votes(model: Model) -> dict:
    """Structures from ten labelled exams, of the validation exams: by their least squares (eq. 14, with HU) and by
    their weighted vote."""
    train = folder() / "train"
    paths = find_exams(train / "images")[:VOTERS]
    with tempfile.TemporaryDirectory() as links:
        for path in paths:
            (Path(links) / path.name).symlink_to(path)
        made = define_files(model, Path(links), train / "labels", names(), exclude=faulty()).model
    voters = []
    for path in paths:
        exam = read_exam(path)
        drawn = read_labels(train / "labels" / path.name, like=exam)
        drawn = without_faults(drawn, exam_name(path), names(), faulty())
        voters.append(vote.Voter(embed(model, exam), drawn))
    cases = []
    for name in validation():
        exam, labels = exam_of(name)
        embedded = embed(made, exam)
        ways = {
            "least squares": locate(made, exam, embedded=embedded),
            "vote": vote.locate_by_vote(made, exam, embedded, voters, names()),
        }
        for structure, number in names().items():
            truth = labels.array == number
            if truth.any() and name not in faulty().get(structure, []):
                scores = {way: dice(mask_of(found[structure], exam), truth) for way, found in ways.items()}
                cases.append({"exam": name, "structure": structure} | {way: round(d, 4) for way, d in scores.items()})
    table = {
        structure: {
            way: round(float(np.mean([case[way] for case in cases if case["structure"] == structure])), 4)
            for way in ("least squares", "vote")
        }
        for structure in names()
    }
    means = {way: round(float(np.mean([row[way] for row in table.values()])), 4) for way in ("least squares", "vote")}
    return {"voters": [exam_name(path) for path in paths], "mean": means, "structures": table, "cases": cases}


DRAWS = {1: 10, 2: 10, 3: 10, 5: 5, 10: 5}
"""So many labelled exams, drawn by chance so often."""


def label_counts(model: Model) -> dict:
    """Dice on the validation exams by how many training exams are labelled, of those that show every structure."""
    train, chance = folder() / "train", np.random.default_rng(0)
    pool = {}
    for path in find_exams(train / "images"):
        exam = read_exam(path)
        drawn = read_labels(train / "labels" / path.name, like=exam)
        drawn = without_faults(drawn, exam_name(path), names(), faulty())
        if np.isin(list(names().values()), drawn.array).all():
            pool[exam_name(path)] = (exam, drawn, embed(model, exam))
    shown = {}
    for name in validation():
        exam, truth = exam_of(name)
        shown[name] = (exam, truth, settled(model, exam, embed(model, exam)))
    cases = []
    for count, draws in DRAWS.items():
        for _ in range(draws):
            chosen = sorted(chance.choice(list(pool), count, replace=False).tolist())
            exams, maps = [pool[name][:2] for name in chosen], [pool[name][2] for name in chosen]
            means = _means(define(model, exams, names(), embedded=maps), shown)
            cases.append({"labelled": count, "exams": chosen, "mean": round(float(np.mean(list(means.values()))), 4)})
            cases[-1] |= {"structures": means}
    table = {}
    for count in DRAWS:
        means = [case["mean"] for case in cases if case["labelled"] == count]
        table[count] = {"mean": round(float(np.mean(means)), 4), "lowest": min(means), "highest": max(means)}
    return {"drawn_from": len(pool), "table": table, "cases": cases}


def _means(made: Model, shown: dict[str, tuple[Exam, Volume, Embedded]]) -> dict[str, float]:
    """Mean Dice of each structure over exams with their label maps and coordinates."""
    scores = {structure: [] for structure in names()}
    for name, (exam, truth, embedded) in shown.items():
        found = locate(made, exam, list(names()), embedded=embedded)
        for structure, number in names().items():
            here = truth.array == number
            if here.any() and name not in faulty().get(structure, []):
                scores[structure].append(dice(mask_of(found[structure], exam), here))
    return {structure: round(float(np.mean(values)), 4) for structure, values in scores.items()}


OUT_OF_PLACE = {
    "brainstem": (250, None),
    "spinal_cord": (250, None),
    "parotid_right": (None, -500),
    "parotid_left": (None, -500),
}
"""HU above (bone) or below (air) which nothing of a structure can be."""


def faults(model: Model) -> dict:
    """Labels whose voxels hold what their structure cannot be: share of bone in cords, of air in parotids."""
    del model
    shares = []
    for name in validation():
        exam, labels = exam_of(name)
        for structure, (most, least) in OUT_OF_PLACE.items():
            hu = exam.array[labels.array == names()[structure]]
            if len(hu):
                odd = hu > most if least is None else hu < least
                shares.append({"exam": name, "structure": structure, "out_of_place": round(float(odd.mean()), 3)})
    shares.sort(key=lambda one: -one["out_of_place"])
    return {"most": shares[:8], "cases": shares}


def calibration_picture(found: dict) -> Figure:
    """Confidence against Dice, a point for every answer, and the means of fifths."""
    figure = Figure(figsize=(5, 4), dpi=110, layout="constrained")
    axes = figure.subplots()
    for number, structure in enumerate(dict.fromkeys(case["structure"] for case in found["cases"])):
        cases = [case for case in found["cases"] if case["structure"] == structure]
        xy = [[case[key] for case in cases] for key in ("confidence", "dice")]
        axes.plot(*xy, "o", ms=3.5, alpha=0.7, color=f"C{number}", label=structure.replace("_", " "))
    axes.plot(*[[one[key] for one in found["bins"]] for key in ("confidence", "dice")], "k-", label="means of fifths")
    axes.set(xlabel="confidence", ylabel="Dice", xlim=(0, 1), ylim=(0, 1))
    axes.legend(fontsize=7, loc="lower right")
    return figure


FAILURES = ("pt_221", "pt_211", "pt_232", "pt_216")
"""Exams of the lowest Dice, a reason each: labels off the image, a tilted stub, a larynx, an esophagus."""


def failures_picture(model: Model) -> Figure:
    """The worst answers: found (lines) over the labels (areas), from the front and from the side."""
    figure = Figure(figsize=(9, 4.4 * len(FAILURES)), dpi=60, facecolor="black", layout="constrained")
    for axes, name in zip(figure.subplots(len(FAILURES)), FAILURES, strict=True):
        exam, labels = exam_of(name)
        embedded = embed(model, exam)
        found = {key: one.mask for key, one in locate(model, exam, embedded=embedded).items() if one.mask is not None}
        drawn = {key: labels.array == number for key, number in names().items() if (labels.array == number).any()}
        png = report.picture(exam, dense.aligned_atlas(model, exam, embedded), found, drawn)
        axes.imshow(imread(io.BytesIO(png)))
        axes.set_axis_off()
        axes.set_title(name, color="white", fontsize=11)
    return figure


TASKS = {
    "presence": presence,
    "orientation": turns,
    "pairs": pairs,
    "votes": votes,
    "labels": label_counts,
    "calibration": calibration,
    "faults": faults,
}


def main() -> int:
    """Run a task and print its numbers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.localisation", description=__doc__)
    parser.add_argument("task", choices=(*TASKS, "failures"))
    parser.add_argument("--model", default="head-neck-ct")
    parser.add_argument("--refine", action="store_true", help="for pairs: maps and deformation fitted to the images")
    parser.add_argument("--ants", action="store_true", help="for pairs: ANTs SyN beside it (`make bench-peers` first)")
    parser.add_argument("--make", action="store_true", help="write the list of cuts or pairs, and stop")
    parser.add_argument("--json", type=Path, help="write all of it here")
    parser.add_argument("--png", type=Path, help="for calibration and failures: write the picture here")
    asked = parser.parse_args()
    if asked.make:
        path, made = {"presence": (CUTS, make_cuts), "pairs": (PAIRS, make_pairs)}[asked.task]
        path.write_text("[\n" + ",\n".join(json.dumps(one) for one in made()) + "\n]\n", encoding="utf-8")
        return 0
    if asked.task == "failures":
        failures_picture(deepatlas.load(asked.model)).savefig(asked.png, facecolor="black")
        return 0
    torch.manual_seed(0)
    how = {key: True for key, wanted in (("refined", asked.refine), ("ants", asked.ants)) if wanted}
    found = TASKS[asked.task](deepatlas.load(asked.model), **how)
    for key, value in found.items():
        if key != "cases":
            print(f"{key}: {value}")
    if asked.png:
        calibration_picture(found).savefig(asked.png)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
