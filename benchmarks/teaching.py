"""What label maps by the 2019 segmentation teach the coordinate map.

``python -m benchmarks.teaching --work W --json FILE``: ten training exams have labels. The 2019 system learns from them
and from all other training exams, laid on the shipped map's atlas, and segments those. The map then goes on twice, from
the same images, but from other label maps: the ten that were drawn (``drawn``), or these and what was found in all
other exams (``predicted``). All structures are made from the ten. What was trained stays in the work folder.
"""

import argparse
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.adaptation import by_structure, scores, trained
from benchmarks.bridge import SCALING, SPACING_MM, grid_of
from benchmarks.localisation import exam_of, faulty, folder, names, validation
from benchmarks.regseg import tell
from deepatlas import checkpoint, files, masks, regseg, store
from deepatlas.config import JOINT, REGSEG_CT
from deepatlas.errors import ExamError
from deepatlas.library import define_files, without_faults
from deepatlas.metrics import dice, paired_difference

LABELLED = 10
SETTINGS = replace(REGSEG_CT, registration=500, segmentation=0, semi=600, joint=200)
ROUND = replace(JOINT, name="teaching", consolidation=(replace(JOINT.consolidation[0], steps=600),))
IN_PART = ("spinal_cord", "esophagus")
"""Drawn as far as a planner needed them."""


def labelled_exams() -> list[str]:
    """Training exams in which every structure is drawn and none is known to be wrong."""
    wrong = {exam for exams in faulty().values() for exam in exams}
    drawn = []
    for path in files.find_exams(folder() / "train" / "labels"):
        shown = np.unique(files.read_labels(path).array).tolist()
        if files.exam_name(path) not in wrong and set(names().values()) <= set(shown):
            drawn.append(files.exam_name(path))
    return sorted(drawn[n] for n in np.random.default_rng(0).permutation(len(drawn))[:LABELLED])


def segmenter(model: checkpoint.Model, labelled: list[str], out: Path) -> regseg.Model:
    """The 2019 system from all training exams and the labels of some."""
    if not (out / "model.json").exists():
        atlas = grid_of(model)
        frame = atlas.frame(SPACING_MM["atlas"], SCALING)
        paths = {files.exam_name(path): path for path in files.find_exams(folder() / "train" / "images")}
        drawn = {name: files.read_labels(folder() / "train" / "labels" / paths[name].name) for name in labelled}
        images = ((name, files.read_image(path), drawn.get(name)) for name, path in paths.items())
        cases, left = atlas.cases(images, frame, tuple(names().values()))
        print(f"left out: {left}", flush=True)
        resume = (out / "training" / "state.json").exists()
        regseg.train(cases, frame, names(), SETTINGS, out, None, resume, tell("regseg"), atlas)
    return regseg.load(out)


def predictions(model: regseg.Model, labelled: list[str], drawn: Path, out: Path) -> None:
    """A folder of label maps: the drawn ones of some exams, and what is found in all others."""
    for path in files.find_exams(folder() / "train" / "images"):
        if (out / path.name).exists():
            continue
        if files.exam_name(path) in labelled:
            shutil.copy(drawn / path.name, out)
            continue
        exam = files.read_exam(path)
        try:
            files.write_labels(out / path.name, regseg.segment(model, exam), exam)
        except ExamError as error:
            print(f"{path.name}: {error}", flush=True)


def segmentation_scores(model: regseg.Model) -> dict[str, dict[str, float]]:
    """Dice of every drawn structure of every validation exam by the 2019 segmentation itself."""
    each = {}
    for name in validation():
        exam, labels = exam_of(name)
        truth = without_faults(labels, name, names(), faulty()).array
        found = regseg.segment(model, exam)
        each[name] = {one: dice(truth == n, found == n) for one, n in names().items() if (truth == n).any()}
    return each


def summary(each: dict[str, dict[str, dict[str, float]]]) -> dict:
    """Means over the structures' means, and what predictions gain over either other map, paired by exam."""
    means = {arm: by_structure(exams) for arm, exams in each.items()}
    per_exam = {arm: np.array([np.mean(list(one.values())) for one in exams.values()]) for arm, exams in each.items()}
    return {
        "dice": {arm: round(float(np.mean(list(one.values()))), 4) for arm, one in means.items()},
        "structures": means,
        "predicted_minus": {
            other: paired_difference(per_exam["predicted"], per_exam[other])._asdict() for other in ("before", "drawn")
        },
    }


def main() -> int:
    """Train, score, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.teaching", description=__doc__)
    parser.add_argument("--model", default="head-neck-ct", help="the coordinate map, learned without labels")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is trained")
    parser.add_argument("--json", type=Path, required=True, help="write the results here")
    asked = parser.parse_args()
    start = checkpoint.find(asked.model)
    base, labelled = checkpoint.load(start), labelled_exams()
    label_maps = {arm: asked.work / f"{arm}-labels" for arm in ("drawn", "predicted")}
    for maps in label_maps.values():
        maps.mkdir(parents=True, exist_ok=True)
    for name in labelled:
        shutil.copy(folder() / "train" / "labels" / f"{name}.nii.gz", label_maps["drawn"])
    found = segmenter(base, labelled, asked.work / "regseg")
    predictions(found, labelled, label_maps["drawn"], label_maps["predicted"])
    each = {"regseg": segmentation_scores(found)}
    cohort, images = asked.work / "train.h5", folder() / "train" / "images"
    if not cohort.exists():
        store.build(images, cohort, JOINT.prepared_size, base.region)
    models = {"before": base}
    for arm, maps in label_maps.items():
        taught = masks.read(cohort, maps, names(), IN_PART)
        models[arm] = trained(asked.work / arm, cohort, ROUND, start, taught)
    for arm, model in models.items():
        bare = replace(model, structures={}, finer={})
        made = define_files(bare, images, label_maps["drawn"], names())
        each[arm] = scores(made.model, folder() / "validation" / "images", folder() / "validation" / "labels")
    result = summary(each) | {"labelled": labelled}
    print(result["dice"], flush=True)
    asked.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
