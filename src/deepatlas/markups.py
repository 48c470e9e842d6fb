"""Points and boxes on disk: our JSON, CSV tables, and 3D Slicer's `.mrk.json`.

In memory everything is in mm, RAS+. A file says which frame its numbers are in; CSV cannot, so there the caller does.
LPS, the frame of DICOM, ITK and Slicer, differs by the sign of the first two axes.
"""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from deepatlas.errors import MarkupError

FRAMES = ("RAS", "LPS")
SCHEMA = (
    "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/Schema/"
    "markups-schema-v1.0.3.json#"
)
"""What Slicer wants to read in a markups file."""

_SIGN = {"RAS": np.array([1.0, 1.0, 1.0]), "LPS": np.array([-1.0, -1.0, 1.0])}


@dataclass(frozen=True)
class Box:
    """A box in the patient, turned in any way."""

    centre_mm: np.ndarray
    """(3,), RAS."""
    axes: np.ndarray
    """(3, 3): columns are the directions of its edges, unit length, right-handed."""
    size_mm: np.ndarray
    """(3,): lengths of its edges."""

    @property
    def to_mm(self) -> np.ndarray:
        """−1 … +1 along its edges → mm, (4, 4)."""
        matrix = np.eye(4)
        matrix[:3, :3] = self.axes * (self.size_mm / 2)
        matrix[:3, 3] = self.centre_mm
        return matrix

    def wider(self, margin_mm: float) -> "Box":
        """The same box with every side moved outwards."""
        return replace(self, size_mm=self.size_mm + 2 * margin_mm)

    @property
    def limits_mm(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest corner of the axis-aligned box around it."""
        reach = np.abs(self.axes) @ (self.size_mm / 2)
        return self.centre_mm - reach, self.centre_mm + reach


def aligned_box(low_mm: np.ndarray, high_mm: np.ndarray) -> Box:
    """The box between two corners, its edges along the axes of the patient."""
    low, high = np.asarray(low_mm, dtype=np.float64), np.asarray(high_mm, dtype=np.float64)
    return Box((low + high) / 2, np.eye(3), high - low)


def read_points(path: Path, frame: str = "RAS") -> dict[str, np.ndarray]:
    """Named points, (3,) mm RAS each.

    Args:
        path: JSON ``{"frame": "RAS", "unit": "mm", "points": {name: [x, y, z]}}``, CSV with the columns name, x, y, z,
            or Slicer's `.mrk.json`. A point that is null or not placed is left out.
        frame: of a CSV, and of a JSON that does not say it.

    Raises:
        MarkupError: missing, broken, of another unit, without a point, or with a name twice.
    """
    text = _read(path)
    if path.name.lower().endswith(".csv"):
        pairs = _csv_points(text, path)
    else:
        about = _json(text, path)
        if "markups" in about:
            pairs, frame = _slicer_points(about, path)
        else:
            frame = _frame(about, path, frame)
            pairs = list(_table(about, "points", path).items())
    points: dict[str, np.ndarray] = {}
    for name, place in pairs:
        if place is None:
            continue
        if name in points:
            raise MarkupError(f"{path.name}: point {name!r} stands there twice; give every point its own name.")
        points[name] = _vector(place, f"point {name!r}", path) * _SIGN[frame]
    if not points:
        raise MarkupError(f"{path.name}: expected at least one point, found none; check the file.")
    return points


def points_text(
    points: Mapping[str, np.ndarray | None], path: Path, confidence: Mapping[str, float] | None = None, frame="RAS"
) -> str:
    """The text of a file of points, of the kind that its name asks for; a point that is None is null or left out."""
    placed = {name: None if mm is None else np.round(mm * _SIGN[frame], 3).tolist() for name, mm in points.items()}
    confidence = {name: round(float(value), 4) for name, value in (confidence or {}).items()}
    name_lower = path.name.lower()
    if name_lower.endswith(".csv"):
        out = io.StringIO()
        rows = csv.writer(out, lineterminator="\n")
        rows.writerow(["name", "x", "y", "z", "confidence"])
        for name, place in placed.items():
            rows.writerow([name, *(place or ["", "", ""]), confidence.get(name, "")])
        return out.getvalue().rstrip("\n")
    if name_lower.endswith(".mrk.json"):
        controls = [
            {
                "id": str(number),
                "label": name,
                "description": f"confidence {confidence[name]}" if name in confidence else "",
                "position": (np.array(points[name]) * _SIGN["LPS"]).tolist(),
                "positionStatus": "defined",
            }
            for number, (name, place) in enumerate(placed.items(), start=1)
            if place is not None
        ]
        markup = {"type": "Fiducial", "coordinateSystem": "LPS", "coordinateUnits": "mm", "controlPoints": controls}
        return json.dumps({"@schema": SCHEMA, "markups": [markup]}, indent=1)
    about: dict[str, Any] = {"frame": frame, "unit": "mm", "points": placed}
    return json.dumps(about | ({"confidence": confidence} if confidence else {}), indent=1)


def read_boxes(path: Path, frame: str = "RAS") -> dict[str, Box]:
    """Named boxes, in mm RAS.

    Args:
        path: JSON ``{"frame": "RAS", "unit": "mm", "boxes": {name: {...}}}``, or with a single ``"box": {...}``; a box
            is ``{"min": [x, y, z], "max": [x, y, z]}`` or ``{"center": ..., "size": ..., "axes": [[...], ...]}``, one
            row per edge, or null, which is left out. Or Slicer's `.mrk.json` with ROIs.
        frame: of a JSON that does not say it.

    Raises:
        MarkupError: missing, broken, of another unit, without a box, or a box without extent.
    """
    about = _json(_read(path), path)
    if "markups" in about:
        return _slicer_boxes(about, path)
    frame = _frame(about, path, frame)
    if "box" in about:
        about = {"boxes": {"box": about["box"]}}
    there = {name: one for name, one in _table(about, "boxes", path).items() if one is not None}
    return {name: _box(one, f"box {name!r}", path, frame) for name, one in there.items()}


def boxes_text(boxes: Mapping[str, Box | None], path: Path, frame: str = "RAS") -> str:
    """The text of a file of boxes, of the kind that its name asks for; a box that is None is null or left out."""
    if path.name.lower().endswith(".mrk.json"):
        sign = _SIGN["LPS"]
        markups = [
            {
                "type": "ROI",
                "coordinateSystem": "LPS",
                "coordinateUnits": "mm",
                "roiType": "Box",
                "center": (box.centre_mm * sign).tolist(),
                "orientation": (box.axes * sign[:, None]).ravel().tolist(),
                "size": box.size_mm.tolist(),
                "insideOut": False,
                "controlPoints": [
                    {"id": "1", "label": name, "position": (box.centre_mm * sign).tolist(), "positionStatus": "defined"}
                ],
            }
            for name, box in boxes.items()
            if box is not None
        ]
        return json.dumps({"@schema": SCHEMA, "markups": markups}, indent=1)
    about = {name: None if box is None else _entry(box, frame) for name, box in boxes.items()}
    return json.dumps({"frame": frame, "unit": "mm", "boxes": about}, indent=1)


def _entry(box: Box, frame: str) -> dict[str, list]:
    sign = _SIGN[frame]
    ends = np.stack(box.limits_mm) * sign
    numbers = {
        "center": box.centre_mm * sign,
        "size": box.size_mm,
        "axes": (box.axes * sign[:, None]).T,
        "min": ends.min(axis=0),
        "max": ends.max(axis=0),
    }
    return {key: np.round(value, 6 if key == "axes" else 3).tolist() for key, value in numbers.items()}


def _box(one: Any, what: str, path: Path, frame: str) -> Box:
    if not isinstance(one, dict):
        raise MarkupError(f'{path.name}: {what} should have "min" and "max", or "center" and "size"; mend the file.')
    sign = _SIGN[frame]
    if "center" in one and "size" in one:
        centre, size = (_vector(one[key], what, path) for key in ("center", "size"))
        rows = one.get("axes", np.diag(sign).tolist())
        if not isinstance(rows, list) or len(rows) != 3:
            raise MarkupError(f"{path.name}: the axes of {what} should be three directions; mend the file.")
        axes = np.stack([_vector(row, what, path) for row in rows], axis=1) * sign[:, None]
        box = Box(centre * sign, axes, size)
    elif "min" in one and "max" in one:
        ends = np.stack([_vector(one[key], what, path) * sign for key in ("min", "max")])
        if not (np.diff(ends * sign, axis=0) > 0).all():
            raise MarkupError(f"{path.name}: the max of {what} should exceed its min; mend the file.")
        box = aligned_box(ends.min(axis=0), ends.max(axis=0))
    else:
        raise MarkupError(f'{path.name}: {what} should have "min" and "max", or "center" and "size"; mend the file.')
    return _checked(box, what, path)


def _checked(box: Box, what: str, path: Path) -> Box:
    if not (box.size_mm > 0).all():
        raise MarkupError(f"{path.name}: {what} has no extent; give it a size in mm along every axis.")
    if not np.allclose(box.axes.T @ box.axes, np.eye(3), atol=1e-3):
        raise MarkupError(f"{path.name}: the axes of {what} should be unit vectors at right angles; mend the file.")
    if np.linalg.det(box.axes) < 0:  # the same box, told right-handed
        box = Box(box.centre_mm, box.axes * [1, 1, -1], box.size_mm)
    return box


def _slicer_points(about: dict, path: Path) -> tuple[list[tuple[str, Any]], str]:
    pairs, frames = [], set()
    for markup in _markups(about, path):
        if markup.get("type") not in ("Fiducial", "PointList"):
            continue
        frames.add(_slicer_frame(markup, path))
        for number, control in enumerate(_controls(markup, path), start=1):
            placed = control.get("positionStatus", "defined") == "defined"
            pairs.append((control.get("label") or f"point {number}", control.get("position") if placed else None))
    if len(frames) > 1:
        raise MarkupError(f"{path.name}: its lists are in different frames; save them one by one.")
    return pairs, frames.pop() if frames else "LPS"


def _slicer_boxes(about: dict, path: Path) -> dict[str, Box]:
    boxes = {}
    for number, markup in enumerate(_markups(about, path), start=1):
        if markup.get("type") != "ROI":
            continue
        labels = [control.get("label") for control in _controls(markup, path)]
        name = next(filter(None, labels), f"box {number}")
        if name in boxes:
            raise MarkupError(f"{path.name}: box {name!r} stands there twice; give every box its own name.")
        orientation = markup.get("orientation", [1, 0, 0, 0, 1, 0, 0, 0, 1])
        if not isinstance(orientation, list) or len(orientation) != 9:
            raise MarkupError(f"{path.name}: the orientation of {name!r} should be nine numbers; save it anew.")
        frame = _slicer_frame(markup, path)
        columns = [orientation[axis::3] for axis in range(3)]
        one = {"center": markup.get("center"), "size": markup.get("size"), "axes": columns}
        boxes[name] = _box(one, f"box {name!r}", path, frame)
    if not boxes:
        raise MarkupError(f"{path.name}: expected at least one box, found none; check the file.")
    return boxes


def _markups(about: dict, path: Path) -> list[dict]:
    markups = about["markups"]
    if not isinstance(markups, list) or not all(isinstance(one, dict) for one in markups):
        raise MarkupError(f"{path.name}: its markups cannot be read; save it from Slicer again.")
    return markups


def _controls(markup: dict, path: Path) -> list[dict]:
    """The control points of a list or a box, which have to be in mm."""
    controls, unit = markup.get("controlPoints", []), markup.get("coordinateUnits", "mm")
    if unit not in ("mm", ["mm"] * 3):
        raise MarkupError(f"{path.name}: expected coordinates in mm, got {unit!r:.40}; convert them.")
    if not isinstance(controls, list) or not all(
        isinstance(one, dict) and isinstance(one.get("label", ""), str) for one in controls
    ):
        raise MarkupError(f"{path.name}: its control points cannot be read; save it from Slicer again.")
    return controls


def _slicer_frame(markup: dict, path: Path) -> str:
    frame = markup.get("coordinateSystem", "LPS")
    return _known_frame({"0": "RAS", "1": "LPS"}.get(str(frame), frame), path)  # older files have numbers


def _frame(about: dict, path: Path, default: str) -> str:
    if about.get("unit", "mm") != "mm":
        raise MarkupError(f'{path.name}: expected the unit "mm", got {about["unit"]!r}; convert the numbers.')
    return _known_frame(about.get("frame", default), path)


def _known_frame(frame: Any, path: Path) -> str:
    if frame not in FRAMES:
        raise MarkupError(f"{path.name}: expected the frame RAS or LPS, got {frame!r}; say which one it is.")
    return frame


def _csv_points(text: str, path: Path) -> list[tuple[str, Any]]:
    try:
        rows = list(csv.DictReader(io.StringIO(text)))
    except csv.Error as error:
        raise MarkupError(f"{path.name}: expected a table of points, got something else ({error}).") from None
    if not rows or not {"name", "x", "y", "z"} <= set(rows[0]):
        raise MarkupError(f"{path.name}: expected the columns name, x, y, z, and a row per point; mend the table.")
    if any(None in row for row in rows):
        raise MarkupError(f"{path.name}: a row has more cells than the first one names; write 1.5, not 1,5.")
    if not all(row["name"] for row in rows):
        raise MarkupError(f"{path.name}: a point has no name; give every row one.")
    return [(row["name"], [row[axis] for axis in "xyz"] if any(row[axis] for axis in "xyz") else None) for row in rows]


def _table(about: dict, key: str, path: Path) -> dict[str, Any]:
    table = about.get(key)
    if not isinstance(table, dict) or not table:
        raise MarkupError(
            f'{path.name}: expected "{key}", from name to numbers in mm, found none; see docs/formats.md.'
        )
    return table


def _vector(value: Any, what: str, path: Path) -> np.ndarray:
    try:
        vector = np.array([float(number) for number in value], dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        vector = np.zeros(0)
    if isinstance(value, str) or vector.shape != (3,) or not np.isfinite(vector).all():
        raise MarkupError(f"{path.name}: {what} should have three finite numbers, got {value!r:.60}; mend the file.")
    return vector


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise MarkupError(f"Expected points or boxes in {path}, but it cannot be read ({error}); check it.") from None


def _json(text: str, path: Path) -> dict:
    try:
        about = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise MarkupError(f"{path.name}: expected JSON, got something else ({error}); mend the file.") from None
    if not isinstance(about, dict):
        raise MarkupError(f"{path.name}: expected a JSON object, got a {type(about).__name__}; mend the file.")
    return about


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no name stands twice."""
    about = dict(pairs)
    if len(about) < len(pairs):
        raise ValueError("a name stands there twice")
    return about
