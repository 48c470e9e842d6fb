"""Score a folder of predicted label maps against ground truth, and one set of scores against another.

What is counted, and how:

| truth | prediction | what happens |
| --- | --- | --- |
| drawn | found | scored |
| drawn | empty, or no file | missed: Dice 0, HD95 the diagonal of the truth's box, no centroid error |
| empty | anything | left out and counted: an empty label means "not drawn", not "absent" |
| on the exclude list | anything | left out and counted |

A structure drawn only as far as somebody needed it (a spinal cord, an esophagus) is also scored in range: both masks
cut to the slices, along the array axis nearest to superior–inferior, from the truth's lowest to its highest.
"""

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from deepatlas import files, metrics, volume
from deepatlas.errors import LabelError

SCORES = ("dice", "hd95_mm", "centroid_mm", "dice_in_range", "hd95_in_range_mm")
COLUMNS = ("exam", "structure", *SCORES, "status")
FEW = 4096
"""Label numbers up to here are looked for one by one."""

Results = dict[str, Any]


def evaluate(
    predictions: Path, truth: Path, names: dict[str, int], exclude: dict[str, list[str]] | None = None
) -> Results:
    """Score the label maps `predictions/<exam>_seg.nii.gz` against `truth/<exam>.nii.gz`.

    Args:
        predictions: folder of predicted label maps, voxel values as in `names`.
        truth: folder of ground truth on the same grids, or one file. Numbers that `names` does not hold are ignored.
        names: number of each structure to score, from 1.
        exclude: for each structure, the exams whose label is known to be wrong. They are in no score.

    Returns:
        A dictionary that JSON can hold (NaN is None):

        - `mean_dice`, `mean_hd95_mm`: means over structures of the structures' means;
        - `structures`: for each name and each of `dice`, `hd95_mm`, `centroid_mm`, `dice_in_range`, `hd95_in_range_mm`
          the `mean`, its 95 % bootstrap interval `low` and `high`, and `n`; `centroid_mm` has the `median` too;
        - `cases`: one entry for each exam and structure scored, with `status` "found" or "missed";
        - `missed`: exam and structure of what was drawn but not found;
        - `left_out`: how many were `neither` drawn nor predicted, `predicted_not_drawn`, `excluded`;
        - `without_prediction`: exams that have no prediction file; what is drawn in them is missed;
        - `without_truth`: prediction files that have no truth and are in no score.

    Raises:
        LabelError: no truth has a prediction, two grids differ, or a label map, `names` or `exclude` cannot be used.
        ExamError: a folder is missing or holds no label map.
    """
    predictions, truth = Path(predictions), Path(truth)
    exclude = exclude or {}
    _check_names(names, exclude)
    truths = _label_maps(truth)
    guesses = {
        exam.removesuffix("_seg"): path for exam, path in _label_maps(predictions).items() if exam.endswith("_seg")
    }
    if not truths.keys() & guesses.keys():
        raise LabelError(
            f"Expected predictions named <exam>_seg.nii.gz for the exams of {truth}, found none in {predictions}; "
            f"{next(iter(truths))}_seg.nii.gz would be one."
        )
    cases: list[dict[str, Any]] = []
    left_out = {"neither": 0, "predicted_not_drawn": 0, "excluded": 0}
    for exam, path in truths.items():
        left = {name for name in names if exam in exclude.get(name, ())}
        left_out["excluded"] += len(left)
        asked = {name: number for name, number in names.items() if name not in left}
        found, neither, not_drawn = _score_exam(exam, path, guesses.get(exam), asked)
        cases += found
        left_out["neither"] += neither
        left_out["predicted_not_drawn"] += not_drawn
    structures = {name: _summary([case for case in cases if case["structure"] == name]) for name in names}
    return {
        "mean_dice": _mean([scores["dice"]["mean"] for scores in structures.values()]),
        "mean_hd95_mm": _mean([scores["hd95_mm"]["mean"] for scores in structures.values()]),
        "structures": structures,
        "cases": cases,
        "missed": [
            {"exam": case["exam"], "structure": case["structure"]} for case in cases if case["status"] == "missed"
        ],
        "left_out": left_out,
        "without_prediction": [exam for exam in truths if exam not in guesses],
        "without_truth": [exam for exam in guesses if exam not in truths],
    }


def against(results: Results, other: Results) -> dict[str, Any]:
    """Paired differences, ours minus the other's, over the cases that both hold.

    Each entry of `structures`, and `overall`, has for `dice` and for `hd95_mm` the `mean` difference, its 95 % interval
    `low` and `high`, `p` of a paired t-test, and `n` (`metrics.paired_difference` says what few or equal values give).
    `overall` pools all cases, as the paper does, though the structures of one exam are not independent of each other;
    `by_exam` takes one mean per exam first and is the more careful. `only_ours` and `only_other` count the cases
    without a partner.

    Source: §5.6.2.

    Raises:
        LabelError: the two have no case in common, or `other` is not a result of `evaluate`.
    """
    ours, theirs = _by_case(results), _by_case(other)
    pairs = [(key, ours[key], theirs[key]) for key in ours if key in theirs]
    if not pairs:
        raise LabelError(
            "Expected results with exams and structures in common, found none; compare results on the same exams."
        )
    structures = list(dict.fromkeys(structure for (_, structure), _, _ in pairs))
    exams = list(dict.fromkeys(exam for (exam, _), _, _ in pairs))

    def differences(groups: list[list[tuple[Any, dict, dict]]]) -> dict[str, Any]:
        """One paired difference per score, each group of pairs giving one pair of means."""
        found = {}
        for score in ("dice", "hd95_mm"):
            sides = [
                np.array([np.mean([pair[side][score] for pair in group]) for group in groups], float) for side in (1, 2)
            ]
            found[score] = _plain(metrics.paired_difference(*sides)._asdict())
        return found

    return {
        "structures": {name: differences([[pair] for pair in pairs if pair[0][1] == name]) for name in structures},
        "overall": differences([[pair] for pair in pairs]),
        "by_exam": differences([[pair for pair in pairs if pair[0][0] == exam] for exam in exams]),
        "only_ours": len(ours) - len(pairs),
        "only_other": len(theirs) - len(pairs),
    }


def read_results(path: Path) -> Results:
    """Read what `write_results` wrote.

    Raises:
        LabelError: the file is missing, or is no result of `evaluate`.
    """
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LabelError(f"Expected results of `deepatlas evaluate` in {path}, cannot read them: {error}.") from error
    _by_case(results, str(path))
    return results


def write_results(results: Results, path: Path) -> tuple[Path, Path]:
    """Write results as JSON, and their cases as CSV beside it; each file appears whole or not at all.

    A value that does not exist is `null` in JSON and an empty cell in CSV.

    Returns:
        The two paths, JSON first.

    Raises:
        LabelError: the path does not end in .json, or cannot be written.
    """
    path, table_path = Path(path), beside(path)
    text = json.dumps(_plain(results), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    rows = io.StringIO(newline="")
    writer = csv.DictWriter(rows, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(_plain(results["cases"]))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(path, text)
        _write_whole(table_path, rows.getvalue())
    except OSError as error:
        raise LabelError(f"Cannot write the results to {path} ({error}); choose a folder you may write to.") from error
    return path, table_path


def beside(path: Path) -> Path:
    """Where the table of results goes.

    Raises:
        LabelError: the path of the results does not end in .json.
    """
    if Path(path).suffix.lower() != ".json":
        raise LabelError(f"Expected a path that ends in .json for the results, got {path}; the CSV goes beside it.")
    return Path(path).with_suffix(".csv")


def table(results: Results) -> str:
    """Results as a plain table, a line per structure; where `results["against"]` holds `against(…)`, its numbers too.

    The interval behind each Dice is that of its mean. Nothing is colored, and a value that does not exist is a dash.
    """
    partial = any(
        scores["dice_in_range"]["mean"] != scores["dice"]["mean"] for scores in results["structures"].values()
    )
    missed = [case["structure"] for case in results["missed"]]
    head = ["structure", "n", "missed", "Dice", "95 % interval", "HD95 mm", "centroid mm"]
    head += ["Dice in range", "HD95 in range"] if partial else []
    rows = [head]
    for name, scores in results["structures"].items():
        row = [name, str(scores["dice"]["n"]), str(missed.count(name)), _digits(scores["dice"]["mean"], 3)]
        row += [f"{_digits(scores['dice']['low'], 3)} – {_digits(scores['dice']['high'], 3)}"]
        row += [_digits(scores["hd95_mm"]["mean"], 1), _digits(scores["centroid_mm"]["mean"], 1)]
        if partial:
            row += [_digits(scores["dice_in_range"]["mean"], 3), _digits(scores["hd95_in_range_mm"]["mean"], 1)]
        rows.append(row)
    mean = ["mean", str(len(results["cases"])), str(len(missed)), _digits(results["mean_dice"], 3), ""]
    rows.append([*mean, _digits(results["mean_hd95_mm"], 1), *[""] * (len(head) - 6)])
    lines = _columns(rows)
    left = results["left_out"]
    lines += [
        "",
        f"Left out: {left['neither']} neither drawn nor predicted, "
        f"{left['predicted_not_drawn']} predicted but not drawn, {left['excluded']} excluded.",
    ]
    notes = {"without_prediction": "No prediction, counted as missed", "without_truth": "No truth, not scored"}
    for key, words in notes.items():
        if results[key]:
            lines.append(f"{words}: {', '.join(results[key])}.")
    if "against" in results:
        lines += ["", "Against the other results (ours − other, paired t-test):", *_against_lines(results["against"])]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _score_exam(
    exam: str, truth_path: Path, guess_path: Path | None, names: dict[str, int]
) -> tuple[list[dict[str, Any]], int, int]:
    """Cases of one exam, how many structures were neither drawn nor predicted, and how many predicted but not drawn."""
    truth = files.read_labels(truth_path)
    if guess_path is None:
        predicted_array = np.zeros_like(truth.array)
    else:
        guess = files.read_labels(guess_path)
        files.check_same_grid(guess, truth, f"{guess_path} against {truth_path}")
        predicted_array = guess.array
    drawn, predicted = (_boxes(array, sorted(names.values())) for array in (truth.array, predicted_array))
    up = volume.ras_order(truth.affine)[0][2]
    cases, neither, not_drawn = [], 0, 0
    for name, number in names.items():
        if number not in drawn:
            neither += number not in predicted
            not_drawn += number in predicted
            continue
        low, high = drawn[number]
        if number in predicted:
            low, high = np.minimum(low, predicted[number][0]), np.maximum(high, predicted[number][1])
        box = tuple(slice(*ends) for ends in zip(low, high, strict=True))
        affine = truth.affine.copy()
        affine[:3, 3] = volume.apply(truth.affine, low)
        y, y_hat = truth.array[box] == number, predicted_array[box] == number
        ends = [end[up] - low[up] for end in drawn[number]]
        in_range = tuple(slice(*ends) if axis == up else slice(None) for axis in range(3))
        case = {"exam": exam, "structure": name, "dice": metrics.dice(y, y_hat), "hd95_mm": _hd95(y, y_hat, affine)}
        case["centroid_mm"] = metrics.centroid_error_mm(y, y_hat, affine)
        case["dice_in_range"] = metrics.dice(y[in_range], y_hat[in_range])
        case["hd95_in_range_mm"] = _hd95(y[in_range], y_hat[in_range], affine)
        case["status"] = "found" if number in predicted else "missed"
        cases.append(_plain(case))
    return cases, neither, not_drawn


def _hd95(truth: np.ndarray, prediction: np.ndarray, affine: np.ndarray) -> float:
    """HD95, or the price of a miss where the prediction is empty."""
    return metrics.hd95_mm(truth, prediction, affine) if prediction.any() else metrics.hd95_missing_mm(truth, affine)


def _summary(cases: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean, interval and count of each score over the cases of one structure."""
    found = {}
    for score in SCORES:
        values = np.array([case[score] for case in cases if case[score] is not None], float)
        interval = metrics.bootstrap_interval(values)
        entry = {"mean": values.mean() if len(values) else None, "low": interval.low, "high": interval.high}
        if score == "centroid_mm":
            entry["median"] = np.median(values) if len(values) else None
        found[score] = _plain({**entry, "n": len(values)})
    return found


def _boxes(array: np.ndarray, numbers: list[int]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """First index and last index + 1 along each axis, for each of some numbers, rising, that the array holds."""
    if numbers[-1] > FEW:  # an entry for every number up to the largest would take much memory
        place = np.searchsorted(numbers, array).clip(max=len(numbers) - 1)
        array = np.where(np.array(numbers)[place] == array, place + 1, 0)
    else:
        numbers = list(range(1, numbers[-1] + 1))
    return {
        number: (np.array([s.start for s in box]), np.array([s.stop for s in box]))
        for number, box in zip(numbers, ndimage.find_objects(array, len(numbers)), strict=True)
        if box is not None
    }


def _check_names(names: dict[str, int], exclude: dict[str, list[str]]) -> None:
    """Refuse a table of names, or of exclusions, that would score the wrong thing in silence."""
    numbers = list(names.values())
    if not names or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in numbers):
        raise LabelError(f"Expected names with whole numbers from 1 (0 is background), got {names}; mend the table.")
    if len(set(numbers)) < len(numbers):
        raise LabelError(f"Expected one number for each name, got {names}; two structures cannot share one.")
    files.check_exclusions(exclude, names)


def _label_maps(folder: Path) -> dict[str, Path]:
    """Label maps of a folder by exam name, in order."""
    return {files.exam_name(path): path for path in files.find_exams(folder)}


def _by_case(results: Any, where: str = "the other results") -> dict[tuple[str, str], dict[str, Any]]:
    try:
        return {(case["exam"], case["structure"]): {s: case[s] for s in SCORES} for case in results["cases"]}
    except (KeyError, TypeError) as error:
        raise LabelError(
            f"Expected {where} to be results of `deepatlas evaluate`, but {error} is not there."
        ) from error


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _plain(value: Any) -> Any:
    """The same thing in types that JSON knows; what is not finite becomes None."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def _write_whole(path: Path, text: str) -> None:
    """Write beside the target and move into place."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8", newline="")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _digits(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _columns(rows: list[list[str]]) -> list[str]:
    """Rows as lines: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def _against_lines(found: dict[str, Any]) -> list[str]:
    rows = [["structure", "n", "Dice", "p", "HD95 mm", "p"]]
    entries = {**found["structures"], "overall": found["overall"], "by exam": found["by_exam"]}
    for name, entry in entries.items():
        dice, hd95 = entry["dice"], entry["hd95_mm"]
        row = [name, str(dice["n"]), "–" if dice["mean"] is None else f"{dice['mean']:+.3f}", _digits(dice["p"], 4)]
        rows.append([*row, "–" if hd95["mean"] is None else f"{hd95['mean']:+.1f}", _digits(hd95["p"], 4)])
    return _columns(rows)
