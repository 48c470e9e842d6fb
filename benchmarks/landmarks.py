"""Landmarks for the head-and-neck model: ``python -m benchmarks.landmarks --json FILE [--write]``.

Each is a rule on a label map (the foremost of the mandible is the chin), so that no one has to mark points by hand. The
training exams teach them, `--write` stores them in the model, and the validation exams say how far off they are found.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.localisation import faulty, folder, names
from deepatlas import checkpoint, places
from deepatlas.embedding import embed
from deepatlas.files import exam_name, find_exams, read_exam, read_labels
from deepatlas.library import without_faults
from deepatlas.volume import Volume, apply

CAP_MM = 4.0
"""A landmark is the mean of the voxels so near to the outermost one."""

MARGIN_MM = 10.0
"""The exam has to go on for so much beyond a landmark, or its cut end would be marked."""

RULES = {
    "chin": ("mandible", (0, 1, 0), 0),
    "mandible_angle_right": ("mandible", (0, -1, -1), 1),
    "mandible_angle_left": ("mandible", (0, -1, -1), -1),
    "brainstem_base": ("brainstem", (0, 0, -1), 0),
    "esophagus_inlet": ("esophagus", (0, 0, 1), 0),
}
"""Structure, direction to its outermost voxel (RAS), side of its middle that counts: 1 right, -1 left, 0 both."""


def points_of(exam: Volume, labels: Volume) -> dict[str, np.ndarray]:
    """The landmarks of a label map, in mm; without those at a cut end."""
    found = {}
    for name, (structure, direction, side) in RULES.items():
        inside = apply(labels.affine, np.argwhere(labels.array == names()[structure]))
        if not len(inside):
            continue
        half = inside[(inside[:, 0] - np.median(inside[:, 0])) * side >= 0]
        along = half @ (np.array(direction) / np.linalg.norm(direction))
        point = half[along > along.max() - CAP_MM].mean(axis=0)
        beyond = point + MARGIN_MM * np.array([0, 0, np.sign(direction[2])])
        if _shown(exam, beyond):
            found[name] = point
    return found


def _shown(exam: Volume, point_mm: np.ndarray) -> bool:
    """Whether the exam shows anything but the black beyond its cut on the plane of a point."""
    plane = np.rint(apply(exam.inverse, point_mm[None])[0]).astype(int)
    axis = int(np.abs(exam.affine[2, :3]).argmax())
    return bool(0 <= plane[axis] < exam.shape[axis] and (exam.array.take(plane[axis], axis) > -500).any())


def marked(model: checkpoint.Model, part: str) -> Iterator[tuple]:
    """The labelled exams of ``train`` or ``validation``: name, map and landmarks."""
    labels_of = {exam_name(path): path for path in find_exams(folder() / part / "labels")}
    for path in find_exams(folder() / part / "images"):
        name = exam_name(path)
        if name not in labels_of:
            continue
        exam = read_exam(path)
        labels = without_faults(read_labels(labels_of[name], like=exam), name, names(), faulty())
        points = points_of(exam, labels)
        if points:
            yield name, embed(model, exam), points


def errors(model: checkpoint.Model) -> dict[str, dict]:
    """How far from the rule's point each landmark is found on the validation exams."""
    found: dict[str, list[float]] = {name: [] for name in model.landmarks}
    unseen = dict.fromkeys(model.landmarks, 0)
    for _, embedded, points in marked(model, "validation"):
        for name in points.keys() & model.landmarks.keys():
            place = places.from_atlas(embedded, torch.tensor(model.landmarks[name]).view(1, 3, 1))
            if place.valid[0]:
                found[name].append(float(np.linalg.norm(place.points_mm[0] - points[name])))
            else:
                unseen[name] += 1
    return {
        name: {
            "exams": len(off),
            "called_outside": unseen[name],
            "median_mm": round(float(np.median(off)), 1),
            "p90_mm": round(float(np.percentile(off, 90)), 1),
        }
        for name, off in found.items()
        if off
    }


def main() -> int:
    """Teach, score, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.landmarks", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/head-neck-ct"))
    parser.add_argument("--json", type=Path, required=True, help="write the errors here")
    parser.add_argument("--write", action="store_true", help="store the landmarks in the model")
    asked = parser.parse_args()
    model = checkpoint.load(asked.model)
    model = replace(model, landmarks=places.landmarks(marked(model, "train")).c_atlas)
    result = errors(model)
    print(json.dumps(result, indent=1))
    asked.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if asked.write:
        checkpoint.save_structures(model, asked.model)
    return 0


if __name__ == "__main__":
    sys.exit(main())
