"""How well the 2019 system segments and registers labelled images (`deepatlas.regseg`).

Source: Xu and Niethammer 2019: Dice of a segmentation, and of the labels that a registration lays on others.
"""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deepatlas.errors import ExamError, LabelError
from deepatlas.metrics import bootstrap_interval, dice
from deepatlas.regseg import Model, register, register_placed, segment
from deepatlas.transforms import Transform, folded, moved
from deepatlas.volume import Volume


class Scores(NamedTuple):
    """Dice of each class, NaN where neither holds it, and where it is a registration the share that folds."""

    dice: dict[str, float]
    folded: float = 0.0

    @property
    def mean(self) -> float:
        """Over the classes."""
        return _mean(list(self.dice.values()))


def score_segmentation(model: Model, volume: Volume, labels: Volume) -> Scores:
    """A segmentation against the labels, on the image's own grid."""
    return Scores(_dice(model, labels.array, segment(model, volume)))


def score_registration(
    model: Model, fixed: tuple[Volume, Volume], moving: tuple[Volume, Volume], found: Transform | None = None
) -> Scores:
    """Labels of the moving image, moved, against those of the fixed one, on its own grid.

    Args:
        fixed, moving: an image and its labels.
        found: the registration, where it is known already.
    """
    found = found or register(model, fixed[0], moving[0])
    laid = moved(found, fixed[1], moving[1], labels=True)
    return Scores(_dice(model, fixed[1].array, laid), folded(found, fixed[0]))


def random_pairs(names: list[str], count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Different (moving, fixed) pairs of exams, or all there are.

    Raises:
        ExamError: fewer than two exams.
    """
    if len(names) < 2:
        raise ExamError(f"Expected at least 2 exams to pair, got {len(names)}; give more.")
    every = [(a, b) for a in names for b in names if a != b]
    chosen = np.random.default_rng(seed).permutation(len(every))[:count]
    return [every[n] for n in chosen]


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """A table of pairs with the columns moving, fixed.

    Raises:
        ExamError: it cannot be read, or has other columns.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            pairs = [(row["moving"], row["fixed"]) for row in csv.DictReader(file)]
        if not pairs or not all(moving and fixed for moving, fixed in pairs):
            raise ValueError("no pairs" if not pairs else "a name is missing")
        return pairs
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise ExamError(f"Expected a table with columns moving,fixed in {path} ({error}); mend it.") from None


def check_classes(model: Model, exams: dict[str, tuple[Volume, Volume]], pairs: list[tuple[str, str]]) -> None:
    """Refuse label maps by which nothing can be scored.

    Args:
        exams, pairs: as for `scores`.

    Raises:
        LabelError: no exam of the pairs has a class of the model in its label map.
    """
    numbers = list(model.classes.values())
    if not any(np.isin(exams[name][1].array, numbers).any() for name in {name for pair in pairs for name in pair}):
        said = ", ".join(f"{name} {number}" for name, number in model.classes.items())
        raise LabelError(f"Expected labels of {said} in the exams of the pairs, found none; give the model's labels.")


def scores(
    model: Model,
    exams: dict[str, tuple[Volume, Volume]],
    pairs: list[tuple[str, str]],
    on_done: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Dice of the segmentation of exams and of the registration of (moving, fixed) pairs, in types that JSON knows.

    Args:
        exams: image and labels by name.
    """
    told, total = on_done or (lambda *_: None), len(exams) + len(pairs)
    found: dict[str, Scores] = {}
    for name, both in exams.items():
        found[name] = score_segmentation(model, *both)
        told(len(found), total, name)
    on_grid = {name: model.place(exams[name][0]) for name in {name for pair in pairs for name in pair}}
    laid = []
    for moving, fixed in pairs:
        transform = register_placed(model, on_grid[fixed], on_grid[moving])
        laid.append(score_registration(model, exams[fixed], exams[moving], transform))
        told(len(found) + len(laid), total, f"{moving} on {fixed}")
    return {
        "segmentation": _summary(list(found.values())) | {"exams": {n: _rounded(s) for n, s in found.items()}},
        "registration": _summary(laid)
        | {
            "folded": float(np.mean([one.folded for one in laid])) if laid else None,
            "pairs": [{"moving": m, "fixed": f, "dice": _rounded(s)} for (m, f), s in zip(pairs, laid, strict=True)],
        },
    }


def _summary(found: list[Scores]) -> dict[str, Any]:
    """Mean Dice over classes and exams, its 95 % interval, and the mean of each class."""
    means = np.array([one.mean for one in found])
    each = {name: _known(_mean([one.dice[name] for one in found])) for name in (found[0].dice if found else ())}
    low, high = (_known(end) for end in bootstrap_interval(means))
    return {"mean": _known(_mean(list(means))), "low": low, "high": high, "classes": each}


def _mean(values: list[float]) -> float:
    """Without what is not known; NaN where nothing is."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def _known(value: float) -> float | None:
    """As JSON has it."""
    return None if np.isnan(value) else float(value)


def _rounded(found: Scores) -> dict[str, float | None]:
    return {name: None if np.isnan(value) else round(value, 4) for name, value in found.dice.items()}


def _dice(model: Model, truth: np.ndarray, found: np.ndarray) -> dict[str, float]:
    return {name: dice(truth == number, found == number) for name, number in model.classes.items()}
