"""The baselines of the 2019 system on hippocampus MR: each network alone, one taught by the other held, both together.

``python -m benchmarks.regseg one-label --work W --json FILE [--model FOLDER]`` (three choices of the one label),
``... curve`` (1, 5, 10 and all labels). All arms have the same images, augmentation and number of steps per network;
what is trained stays in the work folder, so that a run which was stopped goes on.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deepatlas import common_grid, files, regseg, regseg_scores
from deepatlas.config import RegSeg
from deepatlas.loop import Progress
from deepatlas.metrics import paired_difference
from deepatlas.volume import Volume

RESULTS = Path(__file__).parents[1] / "docs" / "results"
VALIDATION = RESULTS / "hippocampus-validation.txt"
PAIRS = RESULTS / "hippocampus-pairs.csv"
CHOICES = 3
SETTINGS = RegSeg()
ARMS = ("registration_alone", "segmentation_alone", "semi", "joint")


class Data(NamedTuple):
    """The exams, and those to learn from on the grid."""

    exams: dict[str, tuple[Volume, Volume]]
    cases: common_grid.Cases
    """All but the validation exams, all with their labels."""
    frame: common_grid.Frame
    classes: dict[str, int]
    validation: list[str]
    pairs: list[tuple[str, str]]
    """(moving, fixed) validation exams."""
    laid: common_grid.Template
    """What the cases were laid onto."""


def read() -> Data:
    """Read the folder ``$DEEPATLAS_DATA/hippocampus``."""
    folder = Path(os.environ["DEEPATLAS_DATA"]) / "hippocampus"
    volumes = {files.exam_name(path): files.read_image(path) for path in files.find_exams(folder / "images")}
    labels = {name: files.read_labels(folder / "labels" / f"{name}.nii.gz", like=one) for name, one in volumes.items()}
    classes = files.read_names(folder / "labels.json")
    validation = files.read_list(VALIDATION)
    train = {name: one for name, one in volumes.items() if name not in validation}
    frame = common_grid.frame_for(list(train.values()))
    cases = common_grid.cases_of(train, {name: labels[name] for name in train}, frame, tuple(classes.values()))
    cases, laid = common_grid.laid_together(cases)
    exams = {name: (volumes[name], labels[name]) for name in volumes}
    return Data(exams, cases, frame, classes, validation, regseg_scores.read_pairs(PAIRS), laid)


def choices(data: Data, count: int, times: int = CHOICES) -> list[list[int]]:
    """Which cases have labels, some times over; the same for every arm."""
    total = len(data.cases.names)
    return [np.random.default_rng((count, n)).permutation(total)[:count].tolist() for n in range(times)]


class Bench:
    """Trains arms, each once."""

    def __init__(self, data: Data, work: Path, settings: RegSeg) -> None:
        self.data, self.work, self.settings = data, work, settings
        self.minutes: dict[str, float] = {}

    def model(self, name: str, labelled: list[int], start: regseg.Networks | None, **stages: int) -> regseg.Model:
        """A training by some stages, from networks or from scratch; read back where it was done before.

        Raises:
            ModelError: it was done with other settings.
        """
        folder = self.work / name
        begun, done = (folder / "training" / "state.json").exists(), (folder / "model.json").exists()
        began = time.monotonic()
        none = dict.fromkeys(("registration", "segmentation", "semi", "guided", "joint"), 0)
        settings = replace(self.settings, **none | stages)
        cases = self.data.cases.picked(list(range(len(self.data.cases.names))), labelled)
        given = cases, self.data.frame, self.data.classes, settings, folder, start, begun
        regseg.train(*given, tell(name), self.data.laid)
        if not done:
            (folder / "minutes.txt").write_text(f"{(time.monotonic() - began) / 60:.2f}", encoding="utf-8")
        self.minutes[name] = float((folder / "minutes.txt").read_text(encoding="utf-8"))
        return regseg.load(folder)

    def arms(self, count: int, number: int, labelled: list[int]) -> dict[str, regseg.Model]:
        """The four arms of one choice of labels; where all are labelled the choices are seeds."""
        s, here = self.settings, f"{count}-{number}"
        seed = number if len(labelled) == len(self.data.cases.names) else s.seed
        begun = self.model("registration", [], None, registration=s.registration)
        alone = self.model("registration-more", [], begun.networks, registration=s.joint)

        def taught(name: str, start: regseg.Networks | None, **stages: int) -> regseg.Model:
            return self.model(f"{here}-{name}", labelled, start, seed=seed, **stages)

        later = s.joint // s.ratio
        if len(labelled) < len(self.data.cases.names):
            first = taught("first", _with(begun, seed), semi=s.segmentation)
        else:
            first = taught("first", None, segmentation=s.segmentation)
        held, both = (regseg.Networks(one.networks.registration, first.networks.segmentation) for one in (alone, begun))
        return {
            "registration_alone": alone,
            "segmentation_alone": taught("segmentation", None, segmentation=s.segmentation + later),
            "semi": taught("semi", held, semi=later),
            "joint": taught("joint", both, joint=s.joint),
        }

    def scores(self, arm: str, model: regseg.Model, labelled: list[int]) -> dict[str, Any]:
        """Segmentation of the validation exams, the listed pairs, and the first labelled exam onto all others."""
        exams = {exam: self.data.exams[exam] for exam in self.data.validation}
        if "registration" not in HAS[arm]:
            return regseg_scores.scores(model, exams, [])
        kept = self.work / f"scores-{arm}.json"  # the same for every choice of labels
        if arm == "registration_alone" and kept.exists():
            about = json.loads(kept.read_text(encoding="utf-8"))
        else:
            about = regseg_scores.scores(model, exams, self.data.pairs)
            kept.write_text(json.dumps(about), encoding="utf-8")
        labelled_exam = self.data.exams[self.data.cases.names[labelled[0]]]
        laid = [regseg_scores.score_registration(model, exam, labelled_exam) for exam in exams.values()]
        return about | {"from_labelled": float(np.mean([one.mean for one in laid]))}


def _with(registration: regseg.Model, seed: int) -> regseg.Networks:
    """A fresh segmentation network beside a trained registration."""
    fresh = regseg.networks_for(len(registration.classes), seed)
    return regseg.Networks(registration.networks.registration, fresh.segmentation)


def tell(name: str):
    """Say where a training stands, every minute."""
    spoken = [0.0]

    def line(at: Progress) -> None:
        if time.monotonic() - spoken[0] > 60 or at.done == at.total:
            spoken[0] = time.monotonic()
            terms = ", ".join(f"{key} {value:.3f}" for key, value in at.terms.items())
            print(f"{name} {at.stage} {at.step}/{at.steps}: {terms}; {at.seconds_left:.0f} s left", flush=True)

    return line


HAS = {
    "registration_alone": ("registration",),
    "segmentation_alone": ("segmentation",),
    "semi": ("segmentation",),
    "joint": ("registration", "segmentation"),
}
"""What each arm trains; the semi arm's registration is the one alone."""


def compare(bench: Bench, count: int, chosen: list[list[int]]) -> dict[str, Any]:
    """All arms over the choices of labels: means, their spread, folded share, and paired differences."""
    found: dict[str, list[dict]] = {arm: [] for arm in ARMS}
    for number, labelled in enumerate(chosen):
        for arm, model in bench.arms(count, number, labelled).items():
            path = bench.work / f"scores-{count}-{number}-{arm}.json"
            if not path.exists():
                path.write_text(json.dumps(bench.scores(arm, model, labelled)), encoding="utf-8")
            found[arm].append(json.loads(path.read_text(encoding="utf-8")))
            means = {part: f"{found[arm][-1][part]['mean']:.4f}" for part in HAS[arm]}
            print(f"{count} labels, choice {number}, {arm}: {means}", flush=True)
    result: dict[str, Any] = {arm: _summary(arm, runs) for arm, runs in found.items()}
    result["joint_minus_alone"] = {
        "registration": _difference(found, "registration", "pairs", "registration_alone"),
        "segmentation": _difference(found, "segmentation", "exams", "segmentation_alone"),
    }
    names = bench.data.cases.names
    return result | {
        "labelled": [[names[case] for case in one[:10]] for one in chosen],
        "labels": count,
        "settings": asdict(bench.settings),
        "minutes": {name: spent for name, spent in bench.minutes.items() if "-" not in name or _of(name, count)},
    }


def _of(name: str, count: int) -> bool:
    return name.startswith((f"{count}-", "registration"))


def _summary(arm: str, runs: list[dict]) -> dict[str, Any]:
    about: dict[str, Any] = {}
    for part in ("registration", "segmentation"):
        has = part in HAS[arm]
        means = [run[part]["mean"] for run in runs]
        about[f"{part}_dice"] = round(float(np.mean(means)), 4) if has else None
        about[f"{part}_spread"] = round(float(np.ptp(means)), 4) if has else None
        about[f"{part}_each"] = [round(mean, 4) for mean in means] if has else None
        about[f"{part}_classes"] = [run[part]["classes"] for run in runs] if has else None
    if "registration" in HAS[arm]:
        about["from_labelled"] = [round(run["from_labelled"], 4) for run in runs]
        about["folded"] = max(run["registration"]["folded"] for run in runs)
    return about


def _difference(found: dict[str, list[dict]], part: str, of: str, other: str) -> dict[str, float]:
    """Joint minus an arm alone, paired by exam or by pair of exams, means over the choices."""

    def each(arm: str) -> np.ndarray:
        runs = []
        for run in found[arm]:
            cases = run[part][of]
            scores = cases.values() if isinstance(cases, dict) else [pair["dice"] for pair in cases]
            runs.append([np.mean(list(one.values())) for one in scores])
        return np.mean(runs, axis=0)

    return paired_difference(each("joint"), each(other))._asdict()


def main() -> int:
    """Train, score, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.regseg", description=__doc__)
    parser.add_argument("what", choices=("one-label", "curve"))
    parser.add_argument("--work", type=Path, required=True, help="folder for what is trained")
    parser.add_argument("--json", type=Path, required=True, help="write the results here")
    parser.add_argument("--model", type=Path, help="write the joint model of the first choice here")
    parser.add_argument("--counts", default="5,10,all", help="of labels, for the curve")
    parser.add_argument("--choices", type=int, default=CHOICES, help="of the labelled images, for the curve")
    asked = parser.parse_args()
    data = read()
    bench = Bench(data, asked.work, SETTINGS)
    command = {"command": f"python -m benchmarks.regseg {asked.what} --work W --json FILE"}
    if asked.what == "one-label":
        write(asked.json, compare(bench, 1, choices(data, 1)) | command)
        if asked.model:
            regseg.save(regseg.load(asked.work / "1-0-joint"), asked.model, half=True)
        return 0
    command["command"] += f" --counts {asked.counts} --choices {asked.choices}"
    every = len(data.cases.names)
    result = json.loads(asked.json.read_text(encoding="utf-8")) if asked.json.exists() else {}
    for count in [every if n == "all" else int(n) for n in asked.counts.split(",")]:
        result[str(count)] = compare(bench, count, choices(data, count, asked.choices)) | command
        write(asked.json, result)  # what is known so far; other counts stay
    return 0


def write(path: Path, result: dict[str, Any]) -> None:
    """As JSON."""
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
