"""The whole path on phantoms, whose truth is known: train, mark structures once, find them in exams never seen, report.

Beside every number stands that of the simplest rival: the affine map that lays one body's box onto the other's.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from deepatlas import checkpoint, dense, evaluate, files, outputs, phantom, places, report, store
from deepatlas.checkpoint import Model
from deepatlas.config import PRESETS, Fitting, Preset
from deepatlas.embedding import Embedded, embed, familiar
from deepatlas.found import Found
from deepatlas.locate import define, locate
from deepatlas.loop import Progress
from deepatlas.phantom import STRUCTURES, PhantomExam
from deepatlas.prepare import sample_mm
from deepatlas.pretrain import pretrain
from deepatlas.refine import mean_of, refine, template_of
from deepatlas.volume import Volume, apply

PARTS = ("exams", "unseen", "cohort.h5", "model", "found", "plain", "affine", "report.html", "results.json")
"""What the demo makes in its folder."""

SHOWN = ("whole", "trunk", "neck_chest", "chest_abdomen", "abdomen_pelvis")
"""Fields of view of the phantoms: a third of them whole, the others partial."""

COARSE = Fitting(steps=50, learned=False, smooth=0.5)
SUPPLE = Fitting(steps=30, rate=0.006, nodes=16, size=96, learned=False, smooth=0.5)
STIFF = replace(SUPPLE, nodes=12, window=12)
"""How an exam's map is refined: coarsely, then on a finer grid in two ways, of which the mean is taken."""

POINTS = 20_000
BODY_HU = -950.0
GOALS = {"dice": 0.75, "error_mm": 6.0, "affine_dice": 0.45, "affine_error_mm": 20.0}


class Case(NamedTuple):
    """One exam never seen in training."""

    name: str
    field_of_view: str
    error_mm: np.ndarray
    """Distance between the true place of a voxel and the place its coordinate names, in mm of the seed exam."""
    plain_mm: np.ndarray
    """The same with one pass of the network for the exam; the seed exam's map is the refined one."""
    affine_mm: np.ndarray
    """The same for the affine of body box to body box."""
    solved: float
    """Share of these voxels for which the seed exam holds the coordinate, to within a voxel."""
    seconds: float
    """Time to read the exam, map it, refine the map, and locate and write every structure."""
    picture: bytes


def run(
    out: Path,
    preset: Preset = PRESETS["demo"],
    exams: int = 24,
    unseen: int = 6,
    seed: int = 0,
    on_stage: Callable[[str], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Run the demo in a folder and write `report.html` and `results.json` there.

    What an earlier demo left in the folder is replaced.

    Args:
        exams, unseen: how many phantoms to train on, and how many others to look at.
        on_stage: called with a line as each part begins.

    Returns:
        The numbers, as in `results.json`.
    """
    say = on_stage or (lambda line: None)
    clock = _Clock()
    _clear(out)
    say(f"Drawing {exams} + {unseen} phantoms")
    phantom.write_cohort(out / "exams", exams, seed, SHOWN)
    phantom.write_cohort(out / "unseen", unseen, seed + 1, SHOWN)
    clock.lap("phantoms")
    say("Preparing the cohort")
    store.build(out / "exams" / "images", out / "cohort.h5", preset.prepared_size, workers=0)
    clock.lap("prepare")
    first = phantom.cohort_exam(0, seed, SHOWN)
    say(f"Training preset {preset.name} on {exams} unlabeled exams")
    pretrain(out / "cohort.h5", out / "model", preset, seed_exam=first.name, on_progress=on_progress)
    clock.lap("training")
    say(f"Defining {len(STRUCTURES)} structures on {first.name} alone")
    model = checkpoint.load(out / "model")
    seed_map = _refined(model, first.image, embed(model, first.image))
    drawn = {name: number for name, number in STRUCTURES.items() if (first.labels.array == number).any()}
    model = define(model, [(first.image, first.labels)], drawn, embedded=[seed_map])
    checkpoint.save_structures(model, out / "model")
    clock.lap("define")
    template = template_of(model, first.image, seed_map)
    cases = []
    for index in range(unseen):
        say(f"Locating in unseen exam {index + 1} of {unseen}")
        exam = phantom.cohort_exam(index, seed + 1, SHOWN)
        cases.append(_case(out, model, first, seed_map, template, exam))
    clock.lap("locate")
    scores = evaluate.evaluate(out / "found", out / "unseen" / "labels", drawn)
    plain = evaluate.evaluate(out / "plain", out / "unseen" / "labels", drawn)
    rival = evaluate.evaluate(out / "affine", out / "unseen" / "labels", drawn)
    clock.lap("evaluate")
    results = _results(cases, scores, plain, rival, clock.seconds)
    checkpoint.write_text(out / "results.json", json.dumps(results, indent=1))
    _write_report(out, results, cases, scores, rival)
    return results


def summary(results: dict[str, Any]) -> list[str]:
    """The numbers of a demo in a few lines."""
    ours, plain, rival = results["ours"], results["plain"], results["affine"]
    return [
        f"Mean one-shot Dice on exams never seen: {ours['mean_dice']:.3f}  (affine of body boxes: "
        f"{rival['mean_dice']:.3f})",
        f"Coordinate error inside the body: median {ours['median_mm']:.1f} mm, 90th percentile {ours['p90_mm']:.1f} mm"
        f"  (affine: {rival['median_mm']:.1f} and {rival['p90_mm']:.1f} mm)",
        f"One pass of the network over the unseen exams, not refined: Dice {plain['mean_dice']:.3f}, "
        f"median {plain['median_mm']:.1f} mm",
        *results["remarks"],
    ]


def coordinate_error(
    first: PhantomExam, seed_map: Embedded, exam: PhantomExam, exam_map: Embedded
) -> tuple[np.ndarray, np.ndarray, float]:
    """How far, in mm of the seed exam, voxels of an exam are placed from their true place there (`known_places`).

    Where the coordinate has no exact counterpart there, the nearest that the solver found counts.

    Returns:
        Errors of the map and of the affine map from body box to body box, one per place, and the share solved.
    """
    points_mm, true_mm = known_places(first, exam, exam_map)
    found = places.carry(exam_map, seed_map, points_mm)
    box = apply(np.linalg.inv(exam_map.prepared.box_to_mm), points_mm)
    rival_mm = apply(seed_map.prepared.box_to_mm @ body_affine(exam_map, seed_map), box)
    errors = [np.linalg.norm(place - true_mm, axis=1) for place in (found.points_mm, rival_mm)]
    return errors[0], errors[1], float(found.valid.mean())


def known_places(first: PhantomExam, exam: PhantomExam, exam_map: Embedded) -> tuple[np.ndarray, np.ndarray]:
    """Random places in the body of an exam, and where they truly lie in the seed exam, each (place, 3) mm.

    They are nodes of the prepared grid whose true place lies in the seed exam's field of view.
    """
    size = exam_map.prepared.size
    index = np.argwhere(exam_map.prepared.foreground)
    index = index[np.random.default_rng(0).permutation(len(index))[: 2 * POINTS]]
    points_mm = apply(exam_map.prepared.box_to_mm, index / (size - 1) * 2.0 - 1.0)
    canonical = exam.deformation.to_canonical(points_mm)
    true_mm = first.deformation.from_canonical(canonical)
    voxel = apply(first.image.inverse, true_mm)
    kept = ((voxel >= -0.5) & (voxel <= np.array(first.image.shape) - 0.5)).all(axis=1)
    kept &= phantom.anatomy(canonical, exam.appearance)[0] > BODY_HU
    return points_mm[kept][:POINTS], true_mm[kept][:POINTS]


def body_affine(exam_map: Embedded, seed_map: Embedded) -> np.ndarray:
    """The affine map that lays the box around one body onto the box around the seed's: box → box, (4, 4)."""
    (low, high), (seed_low, seed_high) = _body(exam_map), _body(seed_map)
    matrix = np.eye(4)
    scale = (seed_high - seed_low) / (high - low)
    matrix[:3, :3] = np.diag(scale)
    matrix[:3, 3] = seed_low - scale * low
    return matrix


def affine_labels(first: PhantomExam, seed_map: Embedded, exam: Volume, exam_map: Embedded) -> np.ndarray:
    """The seed exam's labels laid onto an exam by `body_affine`, on the exam's own grid."""
    to_box = np.linalg.inv(exam_map.prepared.box_to_mm) @ exam.affine
    to_seed_mm = seed_map.prepared.box_to_mm @ body_affine(exam_map, seed_map) @ to_box
    index = np.moveaxis(np.indices(exam.shape, dtype=np.float32), 0, -1)
    return sample_mm(first.labels, apply(to_seed_mm, index), order="nearest", outside=0)


def _case(out: Path, model: Model, first: PhantomExam, seed_map: Embedded, template: Tensor, exam: PhantomExam) -> Case:
    for part in ("found", "plain", "affine"):
        (out / part).mkdir(exist_ok=True)
    began = time.monotonic()
    read = files.read_exam(out / "unseen" / "images" / f"{exam.name}.nii.gz")
    plain_map = embed(model, read)
    exam_map = _refined(model, read, plain_map, template)
    found = locate(model, read, embedded=exam_map)
    outputs.write_answer(out / "found", read, found, model, familiar(model, exam_map))
    seconds = time.monotonic() - began
    plain = locate(model, read, embedded=plain_map)
    outputs.write_answer(out / "plain", read, plain, model, familiar(model, plain_map))
    rival = affine_labels(first, seed_map, read, exam_map)
    files.write_labels(outputs.answer_paths(out / "affine", exam.name)[0], rival, read)
    error_mm, affine_mm, solved = coordinate_error(first, seed_map, exam, exam_map)
    plain_mm, _, _ = coordinate_error(first, seed_map, exam, plain_map)
    picture = report.picture(read, dense.aligned_atlas(model, read, exam_map), _masks(found), _truth(exam))
    return Case(exam.name, exam.field_of_view, error_mm, plain_mm, affine_mm, solved, seconds, picture)


def _refined(model: Model, exam: Volume, embedded: Embedded, template: Tensor | None = None) -> Embedded:
    embedded = refine(model, exam, embedded, COARSE, template=template)
    return mean_of([refine(model, exam, embedded, how, template=template) for how in (SUPPLE, STIFF)])


def _masks(found: dict[str, Found]) -> dict[str, np.ndarray]:
    return {name: one.mask for name, one in found.items() if one.mask is not None}


def _truth(exam: PhantomExam) -> dict[str, np.ndarray]:
    masks = {name: exam.labels.array == number for name, number in STRUCTURES.items()}
    return {name: mask for name, mask in masks.items() if mask.any()}


def _body(embedded: Embedded) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest corner of the body in the prepared box."""
    index = np.argwhere(embedded.prepared.foreground)
    ends = np.stack([index.min(axis=0), index.max(axis=0)]) / (embedded.prepared.size - 1) * 2.0 - 1.0
    return ends[0], ends[1]


def _results(cases: list[Case], scores: dict, plain: dict, rival: dict, seconds: dict[str, float]) -> dict[str, Any]:
    ours = _numbers(scores["mean_dice"], np.concatenate([case.error_mm for case in cases]))
    one_pass = _numbers(plain["mean_dice"], np.concatenate([case.plain_mm for case in cases]))
    affine = _numbers(rival["mean_dice"], np.concatenate([case.affine_mm for case in cases]))
    remarks = []
    if ours["mean_dice"] < GOALS["dice"] or ours["median_mm"] > GOALS["error_mm"]:
        remarks.append(f"This misses the goals, Dice {GOALS['dice']} and median {GOALS['error_mm']:.0f} mm.")
    if affine["mean_dice"] > GOALS["affine_dice"] or affine["median_mm"] < GOALS["affine_error_mm"]:
        remarks.append(
            f"The affine map alone reaches more than Dice {GOALS['affine_dice']} or "
            f"{GOALS['affine_error_mm']:.0f} mm: these phantoms are too alike."
        )
    return {
        "ours": ours,
        "plain": one_pass,
        "affine": affine,
        "remarks": remarks,
        "structures": {
            name: {"dice": one["dice"]["mean"], "affine": rival["structures"][name]["dice"]["mean"]}
            for name, one in scores["structures"].items()
        },
        "missed": scores["missed"],
        "cases": [
            {
                "exam": case.name,
                "field_of_view": case.field_of_view,
                "median_mm": _percentile(case.error_mm, 50),
                "p90_mm": _percentile(case.error_mm, 90),
                "affine_median_mm": _percentile(case.affine_mm, 50),
                "affine_p90_mm": _percentile(case.affine_mm, 90),
                "solved": round(case.solved, 4),
                "seconds": round(case.seconds, 2),
                "dice": _mean_dice(scores, case.name),
                "affine_dice": _mean_dice(rival, case.name),
            }
            for case in cases
        ],
        "seconds": {part: round(spent, 1) for part, spent in seconds.items()},
    }


def _numbers(dice: float | None, errors_mm: np.ndarray) -> dict[str, float]:
    return {
        "mean_dice": round(dice or 0.0, 4),
        "median_mm": _percentile(errors_mm, 50),
        "p90_mm": _percentile(errors_mm, 90),
    }


def _percentile(values: np.ndarray, share: float) -> float:
    return round(float(np.percentile(values, share)), 2)


def _mean_dice(scores: dict, exam: str) -> float | None:
    values = [case["dice"] for case in scores["cases"] if case["exam"] == exam]
    return round(float(np.mean(values)), 4) if values else None


def _write_report(out: Path, results: dict[str, Any], cases: list[Case], scores: dict, rival: dict) -> None:
    parts = [report.paragraph(line) for line in summary(results)]
    parts.append(
        report.paragraph(
            "The map was learned without any label. Every structure was then drawn on one exam, and found in exams "
            "that were never seen, each map fitted to that one exam first. Coordinate error: the distance between the "
            "true place of a voxel in the seed exam and the place its coordinate names there, over voxels of the body "
            "that the seed exam shows.",
            note=True,
        )
    )
    head = ["exam", "shows", "Dice", "affine", "median mm", "90 % mm", "affine median", "affine 90 %", "solved", "s"]
    rows = [
        [
            *(case["exam"], case["field_of_view"], _digits(case["dice"], 3), _digits(case["affine_dice"], 3)),
            *(f"{case[key]:.1f}" for key in ("median_mm", "p90_mm", "affine_median_mm", "affine_p90_mm")),
            *(f"{case['solved']:.1%}", f"{case['seconds']:.1f}"),
        ]
        for case in results["cases"]
    ]
    ours, affine = results["ours"], results["affine"]
    rows.append(
        [
            *("all", "", f"{ours['mean_dice']:.3f}", f"{affine['mean_dice']:.3f}"),
            *(f"{side[key]:.1f}" for side in (ours, affine) for key in ("median_mm", "p90_mm")),
            *("", ""),
        ]
    )
    parts += [report.heading("Exams"), report.table([head, *rows])]
    parts.append(
        report.paragraph(
            "Affine: the map that lays the box around one body onto the box around the other, and nothing else. "
            "Solved: the share of voxels whose coordinate has an exact counterpart in the seed exam; the others count "
            "with the nearest. The last line's Dice is the mean over structures.",
            note=True,
        )
    )
    for case in cases:
        parts += [report.heading(f"{case.name}, {case.field_of_view.replace('_', ' ')}")]
        parts.append(report.image(case.picture, f"{case.name}: exam, aligned atlas, structures found over the truth"))
    rows = [["structure", "exams", "missed", "Dice", "95 % interval", "affine", "HD95 mm", "affine"]]
    missed = [one["structure"] for one in scores["missed"]]
    for name, one in scores["structures"].items():
        dice, other = one["dice"], rival["structures"][name]
        interval = f"{_digits(dice['low'], 2)} – {_digits(dice['high'], 2)}"
        rows.append(
            [
                *(name.replace("_", " "), dice["n"], missed.count(name), _digits(dice["mean"], 3), interval),
                *(_digits(other["dice"]["mean"], 3), _digits(one["hd95_mm"]["mean"], 1)),
                _digits(other["hd95_mm"]["mean"], 1),
            ]
        )
    parts += [report.heading("Structures"), report.table(rows)]
    curve = report.curve(out / "model" / "training" / "log.csv")
    parts += [report.heading("Training"), report.image(curve, "loss over the steps")] if curve else []
    spent = [["part", "s"], *([part, f"{value:.1f}"] for part, value in results["seconds"].items())]
    parts += [report.heading("Time"), report.table(spent)]
    report.write(out / "report.html", "deepatlas: from unlabeled exams to one-shot masks", parts)


def _digits(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _clear(out: Path) -> None:
    """Remove what an earlier demo made, and nothing else."""
    out.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        path = out / part
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


class _Clock:
    """Seconds of each part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, part: str) -> None:
        """A part has ended."""
        now = time.monotonic()
        self.seconds[part], self._last = now - self._last, now
