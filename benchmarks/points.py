"""Points carried from one exam to another: plainly, each map refined, and both exams fitted to each other.

``python -m benchmarks.points phantoms --model demo/model --json FILE``: random points of phantoms that the demo's model
never saw, whose true places are known. ``... exams --json FILE``: middles of drawn structures, from training exams to
validation exams, one of each a pair.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.localisation import CUT_STRUCTURES, exam_of, faulty, folder, names, validation
from deepatlas import checkpoint, demo, files, pairs, phantom, places
from deepatlas.checkpoint import Model
from deepatlas.embedding import Embedded, embed
from deepatlas.refine import mean_of, refine, settled, template_of
from deepatlas.volume import Volume, apply

WAYS = (demo.SUPPLE, replace(demo.SUPPLE, nodes=20), replace(demo.STIFF, steps=60))
"""How phantoms are fitted to each other; chosen on cohort seeds 2 and 3."""

Tell = Callable[[str, np.ndarray], None]
"""Takes the name of a way and its errors (point,) in mm."""


def phantoms(model: Model, seed: int, count: int, tell: Tell) -> None:
    """From phantoms of a cohort to the one that the demo's structures were drawn on."""
    first = phantom.cohort_exam(0, 0, demo.SHOWN)
    target = embed(model, first.image)
    target = refined(model, first.image, refine(model, first.image, target, demo.COARSE))
    template = template_of(model, first.image, target)
    for index in range(count):
        exam = phantom.cohort_exam(index, seed, demo.SHOWN)
        plain = embed(model, exam.image)
        points_mm, true_mm = demo.known_places(first, exam, plain)
        coarse = refine(model, exam.image, plain, demo.COARSE, template=template)
        both = pairs.fitted(model, (exam.image, first.image), (coarse, target), WAYS)
        tell("plain", apart(places.carry(plain, target, points_mm).points_mm, true_mm))
        fine = refined(model, exam.image, refine(model, exam.image, plain, demo.COARSE))
        tell("refined", apart(places.carry(fine, target, points_mm).points_mm, true_mm))
        tell_ways(both, points_mm, true_mm, tell)


def refined(model: Model, exam: Volume, embedded: Embedded) -> Embedded:
    """As the demo refines a map."""
    return mean_of([refine(model, exam, embedded, how) for how in (demo.SUPPLE, demo.STIFF)])


def exams(model: Model, count: int, tell: Tell) -> None:
    """From random training exams to validation exams."""
    paths = files.find_exams(folder() / "train" / "images")
    chance = np.random.default_rng(0)
    for name in validation()[:count]:
        path = paths[chance.integers(len(paths))]
        source = files.read_exam(path)
        labels = files.read_labels(folder() / "train" / "labels" / path.name, like=source)
        target, drawn = exam_of(name)
        here, there = middles(files.exam_name(path), labels), middles(name, drawn)
        both_drawn = [structure for structure in here if structure in there]
        if not both_drawn:
            continue
        points_mm, true_mm = (np.array([one[s] for s in both_drawn]) for one in (here, there))
        maps = tuple(settled(model, one, embed(model, one)) for one in (source, target))
        tell("plain", apart(places.carry(*maps, points_mm).points_mm, true_mm))
        fine = [refine(model, one, start) for one, start in zip((source, target), maps, strict=True)]
        tell("refined", apart(places.carry(*fine, points_mm).points_mm, true_mm))
        tell_ways(pairs.fitted(model, (source, target), maps), points_mm, true_mm, tell)


def middles(name: str, labels: Volume) -> dict[str, np.ndarray]:
    """Centroids in mm of what is drawn on an exam, but for known faults."""
    masks = {s: labels.array == names()[s] for s in CUT_STRUCTURES if name not in faulty().get(s, [])}
    return {s: apply(labels.affine, np.argwhere(mask).mean(axis=0)) for s, mask in masks.items() if mask.any()}


def tell_ways(both: pairs.Pair, points_mm: np.ndarray, true_mm: np.ndarray, tell: Tell) -> None:
    """The places by either way and their middle."""
    tell("source fitted", apart(places.carry(both.source_fitted, both.target, points_mm).points_mm, true_mm))
    tell("target fitted", apart(places.carry(both.source, both.target_fitted, points_mm).points_mm, true_mm))
    tell("both ways", apart(both.carry(points_mm).points_mm, true_mm))


def apart(found_mm: np.ndarray, true_mm: np.ndarray) -> np.ndarray:
    """Distances."""
    return np.linalg.norm(found_mm - true_mm, axis=1)


def main() -> int:
    """Carry, compare, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.points", description=__doc__)
    parser.add_argument("what", choices=("phantoms", "exams"))
    parser.add_argument("--model", default="head-neck-ct", help="phantoms: that of the demo")
    parser.add_argument("--seed", type=int, default=1, help="of the cohort of phantoms; the demo looks at 1")
    parser.add_argument("--count", type=int, default=6, help="of exams")
    parser.add_argument("--json", type=Path, required=True, help="write the results here")
    asked = parser.parse_args()
    model = checkpoint.load(checkpoint.find(asked.model))
    errors: dict[str, list[np.ndarray]] = {}

    def tell(way: str, errors_mm: np.ndarray) -> None:
        errors.setdefault(way, []).append(errors_mm)
        print(f"{way}: {np.median(errors_mm):.2f} mm, of all {np.median(np.concatenate(errors[way])):.2f}", flush=True)

    if asked.what == "phantoms":
        phantoms(model, asked.seed, asked.count, tell)
    else:
        exams(model, asked.count, tell)
    result = {
        way: {
            "points": sum(len(one) for one in each),
            "median_mm": round(float(np.median(np.concatenate(each))), 2),
            "p90_mm": round(float(np.percentile(np.concatenate(each), 90)), 2),
            "each_median_mm": [round(float(np.median(one)), 2) for one in each],
        }
        for way, each in errors.items()
    }
    asked.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
