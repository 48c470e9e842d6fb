"""What a site's own unlabeled exams give: ``python -m benchmarks.adaptation --work W --json FILE``.

The training exams are halved by turns. A model learns from one half, its structures are made from that half's labels;
then it goes on from the other half's exams without their labels (``adapted``), and beside it, as many steps, from its
own half again (``longer``). All three are scored on the other half and on the validation exams with the same
structures. What was trained stays in the work folder, and a run that was stopped goes on.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.localisation import faulty, folder, mask_of, names
from benchmarks.regseg import tell
from deepatlas import checkpoint, store
from deepatlas.config import CPU, FINE, ConsolidationStage, Fitting, LevelStage, Preset
from deepatlas.files import exam_name, find_exams, read_exam, read_labels
from deepatlas.library import define_files, without_faults
from deepatlas.locate import locate
from deepatlas.masks import LabelMaps
from deepatlas.metrics import dice, paired_difference
from deepatlas.pretrain import pretrain

FIRST = replace(
    CPU,
    name="adaptation-first",
    autoencoder=replace(CPU.autoencoder, steps=200),
    warm=replace(CPU.warm, steps=400),
    levels=(
        LevelStage(steps=250, rate=0.004, warm_up=40, loss_size=32),
        LevelStage(steps=350, rate=0.003, warm_up=40, loss_size=32),
    ),
    consolidation=(
        ConsolidationStage(Fitting(steps=30, nodes=12, size=48, window=8, smooth=0.3), steps=600),
        ConsolidationStage(FINE, steps=1200, borrow=0.5),
    ),
)
"""Preset `cpu`, shortened to what half of the exams can teach within an hour."""

ROUND = replace(FIRST, name="adaptation-round", consolidation=(ConsolidationStage(FINE, steps=1200, borrow=0.5),))
MODELS = ("before", "longer", "adapted")


def halves(work: Path) -> tuple[Path, Path]:
    """Two folders of links to every other training exam each, and a cohort beside each."""
    paths = find_exams(folder() / "train" / "images")
    for half, some in (("own", paths[::2]), ("other", paths[1::2])):
        (work / half).mkdir(parents=True, exist_ok=True)
        for path in some:
            link = work / half / path.name
            if not link.exists():
                link.symlink_to(path.resolve())
        if not (work / f"{half}.h5").exists():
            store.build(work / half, work / f"{half}.h5", FIRST.prepared_size, "340mm")
    return work / "own", work / "other"


def trained(
    out: Path, cohort: Path, preset: Preset, start_from: Path | None = None, labels: LabelMaps | None = None
) -> checkpoint.Model:
    """A training, once; one that was stopped goes on."""
    if not (out / "done").exists():
        resume = (out / "training" / "state.json").exists()
        told = tell(out.name)
        pretrain(cohort, out, preset, start_from=start_from, resume=resume, on_progress=told, labels=labels)
        (out / "done").touch()
    return checkpoint.load(out)


def scores(model: checkpoint.Model, images: Path, labels: Path) -> dict[str, dict[str, float]]:
    """Dice of every drawn structure of every exam of a folder."""
    found = {}
    for path in find_exams(images):
        exam, name = read_exam(path), exam_name(path)
        drawn = without_faults(read_labels(labels / path.name, like=exam), name, names(), faulty()).array
        answers = locate(model, exam)
        found[name] = {
            one: dice(drawn == number, mask_of(answers[one], exam))
            for one, number in names().items()
            if one in answers and (drawn == number).any()
        }
    return found


def summary(each: dict[str, dict[str, dict[str, float]]]) -> dict:
    """Means over the structures' means, and what the adapted model gains, paired by exam."""
    means = {model: by_structure(exams) for model, exams in each.items()}
    per_exam = {name: np.array([np.mean(list(one.values())) for one in exams.values()]) for name, exams in each.items()}
    return {
        "dice": {model: round(float(np.mean(list(one.values()))), 4) for model, one in means.items()},
        "structures": means,
        "exams": len(per_exam["before"]),
        "adapted_minus": {
            other: paired_difference(per_exam["adapted"], per_exam[other])._asdict() for other in MODELS[:2]
        },
    }


def by_structure(exams: dict[str, dict[str, float]]) -> dict[str, float]:
    """Mean Dice of each structure over the exams that have it."""
    return {
        name: round(float(np.mean([one[name] for one in exams.values() if name in one])), 4)
        for name in names()
        if any(name in one for one in exams.values())
    }


def main() -> int:
    """Train, score, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adaptation", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for what is trained")
    parser.add_argument("--json", type=Path, required=True, help="write the results here")
    asked = parser.parse_args()
    own, other = halves(asked.work)
    first = asked.work / "before"
    trained(first, own.with_suffix(".h5"), FIRST)
    if not checkpoint.load(first).structures:
        made = define_files(checkpoint.load(first), own, folder() / "train" / "labels", names(), exclude=faulty())
        checkpoint.save_structures(made.model, first)
    models = {"before": checkpoint.load(first)}
    for name, half in (("adapted", other), ("longer", own)):
        models[name] = trained(asked.work / name, half.with_suffix(".h5"), ROUND, first)
    places = {
        "other_half": (other, folder() / "train" / "labels"),
        "validation": (folder() / "validation" / "images", folder() / "validation" / "labels"),
    }
    result = {}
    for place, (images, labels) in places.items():
        result[place] = summary({name: scores(models[name], images, labels) for name in MODELS})
        print(place, result[place]["dice"], flush=True)
    asked.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
