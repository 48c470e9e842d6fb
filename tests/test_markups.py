"""Points and boxes on disk: a place is the same place in every kind of file, and every fault gets its one line."""

import csv
import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from deepatlas.errors import MarkupError
from deepatlas.markups import Box, aligned_box, boxes_text, points_text, read_boxes, read_points

COS, SIN = np.cos(0.4), np.sin(0.4)
TURNED = np.array([[COS, -SIN, 0], [SIN, COS, 0], [0, 0, 1.0]])
POINTS = {"carina": np.array([1.5, -20.25, 300.125]), "Höhe, links": np.array([-40.0, 0.0, -7.5])}
LOW, HIGH = np.array([-10.0, 20.0, -300.0]), np.array([30.0, 25.0, -200.0])


def write(path: Path, content) -> Path:
    """A file with a text, or with an object as JSON."""
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def fiducials(*controls, system="LPS", kind="Fiducial", **more) -> dict:
    """What Slicer saves for one list of points."""
    return {"markups": [{"type": kind, "coordinateSystem": system, "controlPoints": list(controls), **more}]}


def control(label, position, status="defined") -> dict:
    return {"label": label, "position": position, "positionStatus": status}


def slicer_roi(label="R", center=(0, 0, 0), size=(2, 2, 2), system="LPS", **more) -> dict:
    """What Slicer saves for one ROI, without the frame around it."""
    about = {"type": "ROI", "coordinateSystem": system, "center": list(center), "size": list(size)}
    return about | {"controlPoints": [control(label, list(center))]} | more


def corners(box: Box) -> np.ndarray:
    """Its eight corners in mm, in an order that does not depend on how its axes are told."""
    signs = np.array(list(product((-0.5, 0.5), repeat=3)))
    places = box.centre_mm + (signs * box.size_mm) @ box.axes.T
    return places[np.lexsort(np.round(places, 2).T)]


def same_points(got: dict, wanted: dict, atol: float = 1e-9) -> None:
    assert list(got) == list(wanted)
    for name, mm in wanted.items():
        np.testing.assert_allclose(got[name], mm, atol=atol)


def refused(read, path: Path, *words: str) -> None:
    """Reading is refused with one line that names the file and holds the words."""
    with pytest.raises(MarkupError) as caught:
        read(path)
    message = str(caught.value)
    assert path.name in message
    assert "\n" not in message
    for word in words:
        assert word.lower() in message.lower(), message


# Points


def test_the_same_point_in_files_of_both_frames_is_the_same_place(tmp_path):
    flipped = {name: [-mm[0], -mm[1], mm[2]] for name, mm in POINTS.items()}
    plain = {name: mm.tolist() for name, mm in POINTS.items()}
    rows = "".join(f'"{name}",{x},{y},{z}\n' for name, (x, y, z) in flipped.items())
    controls = [control(name, mm) for name, mm in flipped.items()]
    files = [
        (write(tmp_path / "ras.json", {"frame": "RAS", "unit": "mm", "points": plain}), "RAS"),
        (write(tmp_path / "lps.json", {"frame": "LPS", "unit": "mm", "points": flipped}), "RAS"),
        (write(tmp_path / "silent.json", {"points": flipped}), "LPS"),
        (write(tmp_path / "lps.CSV", "name,x,y,z\n" + rows), "LPS"),
        (write(tmp_path / "slicer.mrk.json", fiducials(*controls)), "RAS"),
    ]
    for path, frame in files:
        same_points(read_points(path, frame), POINTS)


def test_a_frame_that_a_json_says_is_not_overruled(tmp_path):
    path = write(tmp_path / "p.json", {"frame": "RAS", "points": {"a": [1, 2, 3]}})
    same_points(read_points(path, "LPS"), {"a": [1, 2, 3]})


def test_a_table_without_a_word_is_ras(tmp_path):
    same_points(read_points(write(tmp_path / "p.csv", "name,x,y,z\na,1,2,3\n")), {"a": [1, 2, 3]})
    same_points(read_points(write(tmp_path / "p.json", {"points": {"a": [1, 2, 3]}})), {"a": [1, 2, 3]})


@pytest.mark.parametrize("frame", ["RAS", "LPS"])
@pytest.mark.parametrize("name", ["p.json", "p.csv", "p.mrk.json", "P.MRK.JSON"])
def test_points_come_back_as_they_were_written(tmp_path, name, frame):
    path = write(tmp_path / name, points_text(POINTS, tmp_path / name, {"carina": 0.5}, frame))
    same_points(read_points(path, frame), POINTS)


def test_a_file_written_in_lps_has_the_first_two_signs_flipped():
    texts = {frame: json.loads(points_text(POINTS, Path("p.json"), frame=frame)) for frame in ("RAS", "LPS")}
    assert {frame: about["frame"] for frame, about in texts.items()} == {"RAS": "RAS", "LPS": "LPS"}
    assert texts["RAS"]["points"]["carina"] == [1.5, -20.25, 300.125]
    assert texts["LPS"]["points"]["carina"] == [-1.5, 20.25, 300.125]
    rows = list(csv.DictReader(points_text(POINTS, Path("p.csv"), frame="LPS").splitlines()))
    assert [float(rows[0][axis]) for axis in "xyz"] == [-1.5, 20.25, 300.125]


def test_our_json_says_what_its_numbers_are():
    about = json.loads(points_text(POINTS | {"gone": None}, Path("p.json"), {"carina": np.float32(0.25)}))
    assert about == {
        "frame": "RAS",
        "unit": "mm",
        "points": {"carina": [1.5, -20.25, 300.125], "Höhe, links": [-40.0, 0.0, -7.5], "gone": None},
        "confidence": {"carina": 0.25},
    }
    assert "confidence" not in json.loads(points_text(POINTS, Path("p.json")))


def test_slicers_own_kind_is_lps_whatever_the_frame():
    for frame in ("RAS", "LPS"):
        about = json.loads(points_text(POINTS | {"gone": None}, Path("p.mrk.json"), {"carina": 0.25}, frame))
        (markup,) = about["markups"]
        assert "markups-schema" in about["@schema"]
        assert (markup["type"], markup["coordinateSystem"], markup["coordinateUnits"]) == ("Fiducial", "LPS", "mm")
        assert [one["label"] for one in markup["controlPoints"]] == list(POINTS)
        assert markup["controlPoints"][0]["position"] == [-1.5, 20.25, 300.125]
        assert "0.25" in markup["controlPoints"][0]["description"]
        assert len({one["id"] for one in markup["controlPoints"]}) == len(POINTS)


@pytest.mark.parametrize("name", ["p.json", "p.csv", "p.mrk.json"])
def test_a_point_without_a_place_is_left_out(tmp_path, name):
    path = write(tmp_path / name, points_text({"gone": None, "there": np.array([1.0, 2, 3])}, tmp_path / name))
    same_points(read_points(path), {"there": [1, 2, 3]})


def test_a_table_may_have_more_columns_in_any_order(tmp_path):
    path = write(tmp_path / "p.csv", "\ufeffz,note,y,name,x\n3,keen,2,a,1\n\n6,,5,b,4\n,,,c,\n")
    same_points(read_points(path), {"a": [1, 2, 3], "b": [4, 5, 6]})


@pytest.mark.parametrize(("system", "sign"), [("LPS", -1), ("RAS", 1), ("1", -1), ("0", 1), (1, -1), (0, 1)])
def test_slicer_says_its_frame_in_words_or_numbers(tmp_path, system, sign):
    path = write(tmp_path / "p.mrk.json", fiducials(control("a", [1, 2, 3]), system=system))
    same_points(read_points(path), {"a": [sign * 1, sign * 2, 3]})
    path = write(tmp_path / "b.mrk.json", {"markups": [slicer_roi(center=(1, 2, 3), system=system)]})
    np.testing.assert_allclose(read_boxes(path)["R"].centre_mm, [sign * 1, sign * 2, 3])


def test_slicer_without_a_frame_is_lps(tmp_path):
    about = {"markups": [{"type": "Fiducial", "controlPoints": [{"label": "a", "position": [1, 2, 3]}]}]}
    same_points(read_points(write(tmp_path / "p.mrk.json", about)), {"a": [-1, -2, 3]})


def test_only_placed_points_of_point_lists_count(tmp_path):
    about = fiducials(
        control("a", [0, 0, 1]),
        control("preview", [9, 9, 9], "preview"),
        control("undefined", [0, 0, 0], "undefined"),
        control("", [0, 0, 4]),
    )
    about["markups"] += [slicer_roi(), {"type": "Line", "controlPoints": [control("end", [5, 5, 5])]}]
    about["markups"] += fiducials(control("b", [0, 0, 2]), kind="PointList")["markups"]
    same_points(
        read_points(write(tmp_path / "p.mrk.json", about)), {"a": [0, 0, 1], "point 4": [0, 0, 4], "b": [0, 0, 2]}
    )


def test_what_slicer_saved_is_known_by_its_content(tmp_path):
    path = write(tmp_path / "renamed.json", fiducials(control("a", [1, 2, 3])))
    same_points(read_points(path), {"a": [-1, -2, 3]})


def points(place, **more) -> dict:
    return {"frame": "RAS", "unit": "mm", "points": {"a": place}} | more


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("p.json", "a diary", "JSON"),
        ("p.json", "", "JSON"),
        ("p.json", [1, 2, 3], "list"),
        ("p.json", {}, "points"),
        ("p.json", {"points": {}}, "points"),
        ("p.json", {"points": [[1, 2, 3]]}, "points"),
        ("p.json", {"boxes": {"a": {"min": [0, 0, 0], "max": [1, 1, 1]}}}, "points"),
        ("p.json", points([1, 2, 3], unit="cm"), "'cm'"),
        ("p.json", points([1, 2, 3], unit=None), "mm"),
        ("p.json", points([1, 2, 3], frame="LAS"), "'LAS'"),
        ("p.json", points([1, 2, 3], frame=["RAS"]), "frame"),
        ("p.json", points(None), "at least one"),
        ("p.json", points([1, 2]), "'a'"),
        ("p.json", points([1, 2, 3, 4]), "'a'"),
        ("p.json", points([[1, 2, 3]]), "'a'"),
        ("p.json", points([1, 2, "left"]), "'a'"),
        ("p.json", points(7), "'a'"),
        ("p.json", points([1, 2, float("nan")]), "finite"),
        ("p.json", points([1, 2, float("inf")]), "finite"),
        ("p.csv", "", "columns"),
        ("p.csv", "name,x,y,z\n", "row"),
        ("p.csv", "name,x,y\na,1,2\n", "columns"),
        ("p.csv", "name;x;y;z\na;1;2;3\n", "columns"),
        ("p.csv", "name,x,y,z\na,1,,3\n", "'a'"),
        ("p.csv", "name,x,y,z\na,1,2\n", "'a'"),
        ("p.csv", "name,x,y,z\na,1,2,nan\n", "finite"),
        ("p.csv", "name,x,y,z\na,,,\n", "at least one"),
        ("p.csv", "name,x,y,z\na,1,5,2,5,3,5\n", "1.5"),
        ("p.csv", "name,x,y,z\na,1,2,3\na,4,5,6\n", "twice"),
        ("p.mrk.json", {"markups": 5}, "markups"),
        ("p.mrk.json", {"markups": ["a"]}, "markups"),
        ("p.mrk.json", {"markups": []}, "at least one"),
        ("p.mrk.json", {"markups": [slicer_roi()]}, "at least one"),
        ("p.mrk.json", fiducials(control("a", [1, 2, 3], "undefined")), "at least one"),
        ("p.mrk.json", fiducials(control("a", [1, 2, 3]), control("a", [4, 5, 6])), "twice"),
        ("p.mrk.json", fiducials(control("a", [1, 2])), "'a'"),
        ("p.mrk.json", fiducials(control("a", [1, 2, 3]), system="IJK"), "'IJK'"),
        (
            "p.mrk.json",
            {
                "markups": fiducials(control("a", [1, 2, 3]))["markups"]
                + fiducials(control("b", [1, 2, 3]), system="RAS")["markups"]
            },
            "frames",
        ),
    ],
)
def test_bad_points_are_refused(tmp_path, name, content, word):
    refused(read_points, write(tmp_path / name, content), word)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.json", '{"points": {"a": [1, 2, 3], "a": [4, 5, 6]}}'),
        ("p.json", points("123")),
        ("p.json", points([10**400, 0, 0])),
        ("p.json", "[" * 100_000),
        ("p.csv", "name,x,y,z\na,1,2," + "3" * 200_000 + "\n"),
        ("p.csv", "x,y,z,name\n1,2,3\n"),
        ("p.mrk.json", fiducials("a")),
        ("p.mrk.json", fiducials() | {"markups": [{"type": "Fiducial", "controlPoints": None}]}),
        ("p.mrk.json", fiducials(control(["a"], [1, 2, 3]))),
        ("p.mrk.json", fiducials(control("a", [1, 2, 3]), coordinateUnits="cm")),
    ],
)
def test_odd_points_are_refused_too(tmp_path, name, content):
    refused(read_points, write(tmp_path / name, content))


@pytest.mark.parametrize("read", [read_points, read_boxes])
def test_a_file_that_cannot_be_read_is_refused(tmp_path, read):
    refused(read, tmp_path / "none.json", "cannot be read")
    (tmp_path / "folder.json").mkdir()
    refused(read, tmp_path / "folder.json", "cannot be read")
    (tmp_path / "latin.json").write_bytes('{"points": {"Höhe": [1, 2, 3]}}'.encode("latin-1"))
    refused(read, tmp_path / "latin.json", "cannot be read")


# Boxes


def boxes(one, **more) -> dict:
    return {"frame": "RAS", "unit": "mm", "boxes": {"a": one}} | more


def test_an_aligned_box_is_told_by_its_corners_or_by_its_centre(tmp_path):
    flip = np.array([-1, -1, 1])
    ends = np.sort(np.stack([LOW * flip, HIGH * flip]), axis=0)
    middle, size = (LOW + HIGH) / 2, (HIGH - LOW).tolist()
    tellings = [
        boxes({"min": LOW.tolist(), "max": HIGH.tolist()}),
        boxes({"min": ends[0].tolist(), "max": ends[1].tolist()}, frame="LPS"),
        boxes({"center": middle.tolist(), "size": size}),
        boxes({"center": (middle * flip).tolist(), "size": size}, frame="LPS"),
        boxes({"center": middle.tolist(), "size": size, "axes": [[1, 0, 0], [0, 1, 0], [0, 0, 1]]}),
        {"box": {"min": LOW.tolist(), "max": HIGH.tolist()}},
    ]
    for about in tellings:
        ((name, box),) = read_boxes(write(tmp_path / "b.json", about)).items()
        assert name == ("box" if "box" in about else "a")
        np.testing.assert_allclose(box.limits_mm, [LOW, HIGH])
        np.testing.assert_allclose(corners(box), corners(aligned_box(LOW, HIGH)))


def test_the_frame_of_a_silent_json_is_the_callers(tmp_path):
    path = write(tmp_path / "b.json", {"box": {"min": [1, 2, 3], "max": [2, 4, 6]}})
    np.testing.assert_allclose(read_boxes(path, "LPS")["box"].limits_mm, [[-2, -4, 3], [-1, -2, 6]])


def test_axes_are_one_row_per_edge(tmp_path):
    edge = [COS, SIN, 0]
    path = write(
        tmp_path / "b.json", boxes({"center": [5, 0, 0], "size": [20, 2, 2], "axes": [edge, [-SIN, COS, 0], [0, 0, 1]]})
    )
    far = corners(read_boxes(path)["a"]) - [5, 0, 0]
    assert (far @ edge).max() == pytest.approx(10)
    assert np.abs(far @ [-SIN, COS, 0]).max() == pytest.approx(1)


def test_a_turned_box_is_the_same_in_both_frames(tmp_path):
    told = {"center": [5, 6, 7], "size": [20, 10, 4], "axes": TURNED.T.tolist()}
    flip = np.diag([-1, -1, 1])
    other = {"center": [-5, -6, 7], "size": [20, 10, 4], "axes": (TURNED.T @ flip).tolist()}
    here = read_boxes(write(tmp_path / "ras.json", boxes(told)))["a"]
    there = read_boxes(write(tmp_path / "lps.json", boxes(other, frame="LPS")))["a"]
    np.testing.assert_allclose(corners(here), corners(there), atol=1e-9)
    np.testing.assert_allclose(corners(here), corners(Box(np.array([5.0, 6, 7]), TURNED, np.array([20.0, 10, 4]))))


def test_left_handed_axes_are_told_right_handed(tmp_path):
    left = TURNED * [1, -1, 1]
    assert np.linalg.det(left) < 0
    told = {"center": [5, 6, 7], "size": [20, 10, 4], "axes": left.T.tolist()}
    box = read_boxes(write(tmp_path / "b.json", boxes(told)))["a"]
    assert np.linalg.det(box.axes) == pytest.approx(1)
    np.testing.assert_allclose(corners(box), corners(Box(np.array([5.0, 6, 7]), left, np.array([20.0, 10, 4]))))


@pytest.mark.parametrize("frame", ["RAS", "LPS"])
@pytest.mark.parametrize("name", ["b.json", "b.mrk.json", "B.MRK.JSON"])
def test_boxes_come_back_as_they_were_written(tmp_path, name, frame):
    wanted = {"flat": aligned_box(LOW, HIGH), "turned": Box(np.array([1.0, -2, 3]), TURNED, np.array([20.0, 10, 4]))}
    found = read_boxes(write(tmp_path / name, boxes_text(wanted, tmp_path / name, frame)))
    assert list(found) == list(wanted)
    for key, box in wanted.items():
        np.testing.assert_allclose(corners(found[key]), corners(box), atol=2e-3)


def test_a_box_in_our_json_has_its_limits_in_the_files_frame():
    box = Box(np.array([1.0, -2, 3]), TURNED, np.array([20.0, 10, 4]))
    for frame, flip in (("RAS", [1, 1, 1]), ("LPS", [-1, -1, 1])):
        about = json.loads(boxes_text({"a": box, "gone": None}, Path("b.json"), frame))
        assert (about["frame"], about["unit"], about["boxes"]["gone"]) == (frame, "mm", None)
        one, places = about["boxes"]["a"], corners(box) * flip
        np.testing.assert_allclose(one["min"], places.min(axis=0), atol=1e-3)
        np.testing.assert_allclose(one["max"], places.max(axis=0), atol=1e-3)
        assert one["center"] == [flip[0] * 1, flip[1] * -2, 3]
        assert one["size"] == [20, 10, 4]
        np.testing.assert_allclose(one["axes"][0], [flip[0] * COS, flip[1] * SIN, 0], atol=1e-6)


def test_slicers_roi_has_its_axes_in_columns(tmp_path):
    flip = np.diag([-1, -1, 1])
    lps = flip @ TURNED
    about = {"markups": [slicer_roi("a", (-5, -6, 7), (20, 10, 4), orientation=lps.ravel().tolist())]}
    box = read_boxes(write(tmp_path / "b.mrk.json", about))["a"]
    wanted = Box(np.array([5.0, 6, 7]), TURNED, np.array([20.0, 10, 4]))
    np.testing.assert_allclose(corners(box), corners(wanted), atol=1e-9)
    (markup,) = json.loads(boxes_text({"a": wanted, "gone": None}, Path("b.mrk.json")))["markups"]
    assert (markup["type"], markup["roiType"], markup["coordinateSystem"]) == ("ROI", "Box", "LPS")
    assert markup["center"] == [-5, -6, 7]
    np.testing.assert_allclose(np.reshape(markup["orientation"], (3, 3)), lps, atol=1e-9)


def test_slicers_rois_without_a_label_are_counted(tmp_path):
    about = {"markups": [slicer_roi(""), fiducials()["markups"][0], slicer_roi("b")]}
    assert list(read_boxes(write(tmp_path / "b.mrk.json", about))) == ["box 1", "b"]


@pytest.mark.parametrize(
    "name",
    [
        "b.mrk.json",
        "b.json",
    ],
)
def test_a_box_that_is_not_there_is_left_out(tmp_path, name):
    wanted = {"gone": None, "a": aligned_box(LOW, HIGH)}
    assert list(read_boxes(write(tmp_path / name, boxes_text(wanted, Path(name))))) == ["a"]


UNIT = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
CUBE = {"center": [0, 0, 0], "size": [2, 2, 2]}


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("b.json", "a diary", "JSON"),
        ("b.json", {"points": {"a": [1, 2, 3]}}, "boxes"),
        ("b.json", {"boxes": {}}, "boxes"),
        ("b.json", boxes(CUBE, unit="cm"), "'cm'"),
        ("b.json", boxes(CUBE, frame="RPS"), "'RPS'"),
        ("b.json", boxes([0, 0, 0, 1, 1, 1]), "'a'"),
        ("b.json", boxes({"min": [0, 0, 0]}), "max"),
        ("b.json", boxes({"center": [0, 0, 0]}), "size"),
        ("b.json", boxes({"min": [0, 0, 0], "max": [1, 0, 1]}), "exceed"),
        ("b.json", boxes({"min": [0, 0, 0], "max": [1, -1, 1]}), "exceed"),
        ("b.json", boxes({"min": [0, 0, 0], "max": [1, -1, 1]}, frame="LPS"), "exceed"),
        ("b.json", boxes({"min": [0, 0, 0], "max": [1, float("nan"), 1]}), "finite"),
        ("b.json", boxes({"min": [0, 0, 0], "max": [1, 1]}), "'a'"),
        ("b.json", boxes(CUBE | {"size": [2, 0, 2]}), "extent"),
        ("b.json", boxes(CUBE | {"size": [2, -2, 2]}), "extent"),
        ("b.json", boxes(CUBE | {"center": [0, float("inf"), 2]}), "finite"),
        ("b.json", boxes(CUBE | {"axes": UNIT[:2]}), "axes"),
        ("b.json", boxes(CUBE | {"axes": 1}), "axes"),
        ("b.json", boxes(CUBE | {"axes": [[1, 0, 0], [0.1, 1, 0], [0, 0, 1]]}), "right angles"),
        ("b.json", boxes(CUBE | {"axes": [[2, 0, 0], [0, 1, 0], [0, 0, 1]]}), "unit vectors"),
        ("b.json", boxes(CUBE | {"axes": [[0, 0, 0], [0, 1, 0], [0, 0, 1]]}), "unit vectors"),
        ("b.json", boxes(CUBE | {"axes": [[1, 0, 0], [1, 0, 0], [0, 0, 1]]}), "right angles"),
        ("b.mrk.json", fiducials(control("a", [1, 2, 3])), "box"),
        ("b.mrk.json", {"markups": [slicer_roi(size=(2, 0, 2))]}, "extent"),
        ("b.mrk.json", {"markups": [slicer_roi(size=())]}, "'R'"),
        ("b.mrk.json", {"markups": [slicer_roi(orientation=[1, 0, 0])]}, "nine"),
        ("b.mrk.json", {"markups": [slicer_roi(orientation=[1, 0, 0, 0.5, 1, 0, 0, 0, 1])]}, "right angles"),
        ("b.mrk.json", {"markups": [slicer_roi(system="ITK")]}, "'ITK'"),
        ("b.mrk.json", {"markups": [{"type": "ROI", "coordinateSystem": "LPS"}]}, "finite"),
    ],
)
def test_bad_boxes_are_refused(tmp_path, name, content, word):
    refused(read_boxes, write(tmp_path / name, content), word)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("b.json", '{"boxes": {"a": {"min": [0,0,0], "max": [1,1,1]}, "a": {"min": [0,0,0], "max": [2,2,2]}}}'),
        ("b.mrk.json", {"markups": [slicer_roi(), slicer_roi(center=(5, 5, 5))]}),
        ("b.mrk.json", {"markups": [slicer_roi(controlPoints=["a"])]}),
        ("b.mrk.json", {"markups": [slicer_roi(coordinateUnits="cm")]}),
    ],
)
def test_odd_boxes_are_refused_too(tmp_path, name, content):
    refused(read_boxes, write(tmp_path / name, content))


def test_a_box_leads_to_mm_and_can_be_made_wider():
    box = Box(np.array([1.0, 2, 3]), TURNED, np.array([20.0, 10, 4]))
    ends = box.to_mm @ [[1, -1], [0, 0], [0, 0], [1, 1]]
    np.testing.assert_allclose(ends[:3, 0], [1 + 10 * COS, 2 + 10 * SIN, 3])
    np.testing.assert_allclose(ends[:3, 1], [1 - 10 * COS, 2 - 10 * SIN, 3])
    wide = box.wider(5)
    np.testing.assert_allclose(wide.size_mm, [30, 20, 14])
    np.testing.assert_allclose(wide.to_mm[:3, 3], [1, 2, 3])
    np.testing.assert_allclose(np.linalg.norm(wide.to_mm[:3, :3], axis=0), [15, 10, 7])
    np.testing.assert_allclose(box.limits_mm, [corners(box).min(axis=0), corners(box).max(axis=0)])
