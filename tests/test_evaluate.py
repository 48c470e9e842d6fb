"""Scores of label maps written to disk, each with a value worked out by hand."""

import csv
import json
import os

import nibabel as nib
import numpy as np
import pytest

from deepatlas import evaluate as scoring
from deepatlas.errors import ExamError, LabelError

NAMES = {"cord": 1, "gland": 2}
SHAPE = (20, 16, 18)
# Axes run left, back and down, 2 × 3 × 4 mm, turned by 0.1 rad in plane: not RAS, not isotropic, not aligned.
TURN = np.array([[np.cos(0.1), -np.sin(0.1), 0], [np.sin(0.1), np.cos(0.1), 0], [0, 0, 1]])
AFFINE = np.eye(4)
AFFINE[:3, :3] = TURN @ np.diag([-2.0, -3.0, -4.0])
AFFINE[:3, 3] = (30, 40, 50)


def save(folder, name, boxes, affine=AFFINE, shape=SHAPE, order=(0, 1, 2)):
    """Write a label map in which each number fills a box of voxels, its axes stored in another order if asked."""
    array = np.zeros(shape, np.uint8)
    for number, ends in boxes.items():
        array[tuple(slice(*pair) for pair in ends)] = number
    columns = np.eye(4)[:, [*order, 3]]
    folder.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(np.ascontiguousarray(array.transpose(order)), affine @ columns), folder / name)


CORD = ((8, 10), (8, 10), (4, 12))
GLAND = ((2, 6), (2, 6), (2, 6))


@pytest.fixture
def folders(tmp_path):
    """Predictions and truth, still empty."""
    return tmp_path / "out", tmp_path / "labels"


def case_of(results, exam, structure):
    """The one case of an exam and a structure."""
    (case,) = [case for case in results["cases"] if (case["exam"], case["structure"]) == (exam, structure)]
    return case


def test_a_perfect_prediction(folders):
    out, labels = folders
    for exam in ("a", "b"):
        save(labels, f"{exam}.nii.gz", {1: CORD, 2: GLAND})
        save(out, f"{exam}_seg.nii.gz", {1: CORD, 2: GLAND})
    results = scoring.evaluate(out, labels, NAMES)
    assert (results["mean_dice"], results["mean_hd95_mm"]) == (1, 0)
    assert results["structures"]["cord"]["dice"] == {"mean": 1, "low": 1, "high": 1, "n": 2}
    assert results["structures"]["gland"]["centroid_mm"] == {"mean": 0, "median": 0, "low": 0, "high": 0, "n": 2}
    assert results["missed"] == results["without_prediction"] == results["without_truth"] == []
    assert results["left_out"] == {"neither": 0, "predicted_not_drawn": 0, "excluded": 0}


def test_large_label_numbers_take_no_memory_of_their_own(tmp_path):
    huge = {"one": 300, "huge": 2_000_000_000}
    for name in ("truth", "guess"):
        array = np.zeros((12, 14, 9), np.int32)
        array[2:6, 3:9, 2:7], array[8:11, 3:9, 2:7] = huge.values()
        (tmp_path / name).mkdir()
        nib.save(nib.Nifti1Image(array, AFFINE), tmp_path / name / ("a.nii.gz" if name == "truth" else "a_seg.nii.gz"))
    found = scoring.evaluate(tmp_path / "guess", tmp_path / "truth", huge)
    assert {name: one["dice"]["mean"] for name, one in found["structures"].items()} == {"one": 1.0, "huge": 1.0}


def test_a_shifted_prediction(folders):
    """Moved by one voxel of 2 mm along i: Dice 3/4, and the centroid and the far faces lie 2 mm away."""
    out, labels = folders
    save(labels, "a.nii.gz", {2: GLAND})
    save(out, "a_seg.nii.gz", {2: ((3, 7), (2, 6), (2, 6))})
    case = case_of(scoring.evaluate(out, labels, NAMES), "a", "gland")
    assert case["dice"] == 0.75
    assert case["hd95_mm"] == pytest.approx(2, rel=1e-5)
    assert case["centroid_mm"] == pytest.approx(2, rel=1e-5)
    assert case["status"] == "found"


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_in_range_cuts_along_the_body(folders, order):
    """A cord of the right width that runs on beyond the drawn part is right in range, however the axes are stored."""
    out, labels = folders
    save(labels, "a.nii.gz", {1: CORD}, order=order)
    save(out, "a_seg.nii.gz", {1: ((8, 10), (8, 10), (0, 16))}, order=order)
    results = scoring.evaluate(out, labels, NAMES)
    case = case_of(results, "a", "cord")
    assert case["dice"] == pytest.approx(2 * 8 / (8 + 16))
    assert case["hd95_mm"] > 4
    assert (case["dice_in_range"], case["hd95_in_range_mm"]) == (1, 0)
    assert results["structures"]["cord"]["dice_in_range"]["mean"] == 1
    assert "Dice in range" in scoring.table(results)


def test_nothing_found_in_range(folders):
    """A prediction above the drawn part only: found, Dice 0, and in range charged as a miss."""
    out, labels = folders
    save(labels, "a.nii.gz", {1: CORD})
    save(out, "a_seg.nii.gz", {1: ((8, 10), (8, 10), (13, 16))})
    results = scoring.evaluate(out, labels, NAMES)
    case = case_of(results, "a", "cord")
    assert (case["dice"], case["dice_in_range"], case["status"]) == (0, 0, "found")
    assert case["hd95_in_range_mm"] == pytest.approx(np.sqrt(4**2 + 6**2 + 32**2), rel=1e-5)
    assert results["missed"] == []


def test_drawn_but_not_found_is_missed(folders):
    out, labels = folders
    for exam in ("a", "b"):
        save(labels, f"{exam}.nii.gz", {1: CORD, 2: GLAND})
    save(out, "a_seg.nii.gz", {1: CORD, 2: GLAND})
    save(out, "b_seg.nii.gz", {1: CORD})
    results = scoring.evaluate(out, labels, NAMES)
    assert results["missed"] == [{"exam": "b", "structure": "gland"}]
    case = case_of(results, "b", "gland")
    diagonal = pytest.approx(np.sqrt(8**2 + 12**2 + 16**2), rel=1e-5)
    assert case == {
        "exam": "b",
        "structure": "gland",
        "dice": 0,
        "hd95_mm": diagonal,
        "centroid_mm": None,
        "dice_in_range": 0,
        "hd95_in_range_mm": diagonal,
        "status": "missed",
    }
    gland = results["structures"]["gland"]
    assert (gland["dice"]["mean"], gland["dice"]["n"], gland["centroid_mm"]["n"]) == (0.5, 2, 1)
    assert results["mean_dice"] == 0.75


def test_what_is_not_drawn_is_left_out_and_counted(folders):
    out, labels = folders
    for exam, drawn, found in [("a", {1: CORD}, {1: CORD, 2: GLAND}), ("b", {1: CORD}, {1: CORD}), ("c", {}, {})]:
        save(labels, f"{exam}.nii.gz", drawn)
        save(out, f"{exam}_seg.nii.gz", found)
    results = scoring.evaluate(out, labels, NAMES)
    assert results["left_out"] == {"neither": 3, "predicted_not_drawn": 1, "excluded": 0}
    assert [case["structure"] for case in results["cases"]] == ["cord", "cord"]
    assert results["structures"]["gland"]["dice"] == {"mean": None, "low": None, "high": None, "n": 0}
    assert results["mean_dice"] == 1  # a structure that nobody drew is in no mean


def test_mean_dice_is_the_mean_of_the_structures_means(folders):
    """Three cords right, one gland missed: 1/2, not 3/4."""
    out, labels = folders
    for exam in ("a", "b", "c"):
        save(labels, f"{exam}.nii.gz", {1: CORD, **({2: GLAND} if exam == "a" else {})})
        save(out, f"{exam}_seg.nii.gz", {1: CORD})
    assert scoring.evaluate(out, labels, NAMES)["mean_dice"] == 0.5


def test_excluded_labels_are_in_no_score(folders):
    out, labels = folders
    for exam in ("a", "b"):
        save(labels, f"{exam}.nii.gz", {1: CORD, 2: GLAND})
        save(out, f"{exam}_seg.nii.gz", {1: CORD} if exam == "a" else {2: GLAND})
    exclude = {"cord": ["b", "an_exam_of_another_folder"], "gland": ["a"]}
    results = scoring.evaluate(out, labels, NAMES, exclude)
    assert results["left_out"]["excluded"] == 2
    assert results["missed"] == []
    assert results["mean_dice"] == 1
    assert scoring.evaluate(out, labels, NAMES)["mean_dice"] == 0.5


def test_an_exam_without_a_prediction_is_missed(folders):
    out, labels = folders
    save(labels, "a.nii.gz", {1: CORD})
    save(labels, "b.nii.gz", {1: CORD, 2: GLAND})
    save(out, "a_seg.nii.gz", {1: CORD})
    save(out, "c_seg.nii.gz", {1: CORD})
    results = scoring.evaluate(out, labels, NAMES)
    assert results["without_prediction"] == ["b"]
    assert results["without_truth"] == ["c"]
    assert results["missed"] == [{"exam": "b", "structure": "cord"}, {"exam": "b", "structure": "gland"}]
    assert results["structures"]["cord"]["dice"]["mean"] == 0.5


def test_no_prediction_at_all_is_refused(folders):
    out, labels = folders
    save(labels, "a.nii.gz", {1: CORD})
    save(out, "a.nii.gz", {1: CORD})  # not named as a prediction
    with pytest.raises(LabelError, match=r"a_seg\.nii\.gz"):
        scoring.evaluate(out, labels, NAMES)


def test_a_folder_that_is_not_there_is_refused(folders):
    out, labels = folders
    save(labels, "a.nii.gz", {1: CORD})
    with pytest.raises(ExamError, match="out"):
        scoring.evaluate(out, labels, NAMES)


def test_another_grid_is_refused(folders):
    out, labels = folders
    save(labels, "a.nii.gz", {1: CORD})
    save(out, "a_seg.nii.gz", {1: CORD}, shape=(20, 16, 17))
    with pytest.raises(LabelError, match="expected the exam's"):
        scoring.evaluate(out, labels, NAMES)
    moved = AFFINE.copy()
    moved[2, 3] += 1
    save(out, "a_seg.nii.gz", {1: CORD}, affine=moved)
    with pytest.raises(LabelError, match="expected the exam's"):
        scoring.evaluate(out, labels, NAMES)
    flipped = AFFINE @ np.array([[-1, 0, 0, 19], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    save(out, "a_seg.nii.gz", {1: CORD}, affine=flipped)  # the same corners in space, stored the other way round
    with pytest.raises(LabelError, match="expected the exam's"):
        scoring.evaluate(out, labels, NAMES)
    moved[2, 3] = AFFINE[2, 3] + 0.0005
    save(out, "a_seg.nii.gz", {1: CORD}, affine=moved)
    assert scoring.evaluate(out, labels, NAMES)["mean_dice"] == 1


@pytest.mark.parametrize("names", [{}, {"cord": 0}, {"cord": 1, "gland": 1}, {"cord": "1"}, {"cord": True}])
def test_names_that_cannot_be_used(folders, names):
    out, labels = folders
    save(labels, "a.nii.gz", {1: CORD})
    save(out, "a_seg.nii.gz", {1: CORD})
    with pytest.raises(Exception, match=r"Expected|[Tt]ype-check"):
        scoring.evaluate(out, labels, names)


@pytest.mark.parametrize("exclude", [{"chord": ["a"]}, {"cord": "a"}])
def test_exclusions_that_cannot_be_used(folders, exclude):
    out, labels = folders
    save(labels, "a.nii.gz", {1: CORD})
    save(out, "a_seg.nii.gz", {1: CORD})
    with pytest.raises(Exception, match=r"Expected|[Tt]ype-check"):
        scoring.evaluate(out, labels, NAMES, exclude)


def results_of(**dice):
    """Results with the given Dice per case, named exam__structure; HD95 is ten times what is missing."""
    cases = [
        {
            "exam": key.split("__")[0],
            "structure": key.split("__")[1],
            "dice": value,
            "hd95_mm": 10 * (1 - value),
            "centroid_mm": 1.0,
            "dice_in_range": value,
            "hd95_in_range_mm": 0.0,
            "status": "found",
        }
        for key, value in dice.items()
    ]
    return {"cases": cases}


def test_against_pairs_the_cases_that_both_hold():
    ours = results_of(a__cord=0.8, b__cord=0.7, a__gland=0.9, c__gland=0.1)
    other = results_of(b__cord=0.4, a__gland=0.8, a__cord=0.6, d__gland=1.0)
    found = scoring.against(ours, other)
    cord = found["structures"]["cord"]
    assert (cord["dice"]["mean"], cord["dice"]["n"]) == (pytest.approx(0.25), 2)
    assert cord["hd95_mm"]["mean"] == pytest.approx(-2.5)
    # Differences 0.2 and 0.3: t = 0.25 / 0.05 with one degree of freedom, p = 1 − (2/π) arctan t.
    assert cord["dice"]["p"] == pytest.approx(1 - 2 / np.pi * np.arctan(5))
    gland = found["structures"]["gland"]["dice"]
    assert (gland["mean"], gland["n"], gland["p"], gland["low"]) == (pytest.approx(0.1), 1, None, None)
    assert (found["overall"]["dice"]["mean"], found["overall"]["dice"]["n"]) == (pytest.approx(0.2), 3)
    by_exam = found["by_exam"]["dice"]  # a: mean of 0.2 and 0.1, b: 0.3
    assert (by_exam["mean"], by_exam["n"]) == (pytest.approx(0.225), 2)
    assert (found["only_ours"], found["only_other"]) == (1, 1)
    json.dumps(found, allow_nan=False)


def test_against_refuses_what_cannot_be_compared():
    with pytest.raises(LabelError, match="in common"):
        scoring.against(results_of(a__cord=0.8), results_of(b__cord=0.8))
    with pytest.raises(LabelError, match="cases"):
        scoring.against(results_of(a__cord=0.8), {"mean_dice": 0.3})


def test_results_go_to_json_and_csv_and_back(folders, tmp_path):
    out, labels = folders
    for exam in ("a", "b"):
        save(labels, f"{exam}.nii.gz", {1: CORD, 2: GLAND})
    save(out, "a_seg.nii.gz", {1: CORD, 2: GLAND})
    results = scoring.evaluate(out, labels, NAMES)
    written = scoring.write_results(results, tmp_path / "new" / "scores.json")
    assert [path.name for path in written] == ["scores.json", "scores.csv"]
    assert sorted(os.listdir(tmp_path / "new")) == ["scores.csv", "scores.json"]
    assert scoring.read_results(written[0]) == results
    with written[1].open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["exam"], row["structure"], float(row["dice"])) for row in rows] == [
        (case["exam"], case["structure"], case["dice"]) for case in results["cases"]
    ]
    assert rows[-1]["centroid_mm"] == ""


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "scores.json"
    scoring.write_results(results_of(a__cord=0.8), path)
    before = path.read_text(encoding="utf-8")

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(LabelError, match="disk full"):
        scoring.write_results(results_of(a__cord=0.1), path)
    assert path.read_text(encoding="utf-8") == before
    assert sorted(os.listdir(tmp_path)) == ["scores.csv", "scores.json"]


def test_results_that_cannot_be_read_or_written(tmp_path):
    with pytest.raises(LabelError, match="json"):
        scoring.write_results(results_of(a__cord=0.8), tmp_path / "scores.csv")
    with pytest.raises(LabelError, match="cannot read"):
        scoring.read_results(tmp_path / "nowhere.json")
    (tmp_path / "list.json").write_text("[1, 2]", encoding="utf-8")
    with pytest.raises(LabelError, match="results of"):
        scoring.read_results(tmp_path / "list.json")


def test_the_table_shows_what_was_scored_and_what_was_not(folders):
    out, labels = folders
    for exam in ("a", "b"):
        save(labels, f"{exam}.nii.gz", {1: CORD})
    save(out, "a_seg.nii.gz", {1: CORD})
    results = scoring.evaluate(out, labels, NAMES)
    other = json.loads(json.dumps(results))
    other["cases"][0]["dice"] = 0.5
    results["against"] = scoring.against(results, other)
    text = scoring.table(results)
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.split()}
    assert text.splitlines()[1].split()[:4] == ["cord", "2", "1", "0.500"]
    assert text.splitlines()[2].split()[:4] == ["gland", "0", "0", "–"]
    assert "2 neither drawn nor predicted" in text
    assert "counted as missed: b." in text
    assert rows["overall"][1:3] == ["2", "+0.250"]
    assert "in range" not in text
