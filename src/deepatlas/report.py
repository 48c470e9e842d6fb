"""Reports people look at: pictures of exams with what was found in them, tables, and one HTML file that holds all.

Pictures follow the radiologist's habit: the patient's right on the left, the head up; seen from the side, the front on
the left. They show phantoms and real exams alike.
"""

import base64
import csv
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from zlib import crc32

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deepatlas import checkpoint
from deepatlas.errors import ExamError
from deepatlas.files import Exam
from deepatlas.found import Found
from deepatlas.volume import Volume, ras_order, reorder

WINDOW_HU = (-200.0, 300.0)
ATLAS_HU = (-256.0, 256.0)
AXES = {"coronal": 1, "sagittal": 0, "axial": 2}
"""Which patient axis a view looks along."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #1c2126 }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.2rem } img { max-width: 100%; display: block; margin: .5rem 0 1.2rem }
table { border-collapse: collapse; margin: .6rem 0 } th, td { padding: .15rem .8rem; text-align: right }
th { border-bottom: 2px solid #8a949e } td { border-bottom: 1px solid #dde2e6 }
th:first-child, td:first-child { text-align: left } .note { color: #56616b }
"""


def picture(
    exam: Volume,
    aligned: np.ndarray | None = None,
    masks: Mapping[str, np.ndarray] | None = None,
    truth: Mapping[str, np.ndarray] | None = None,
    views: Sequence[str] = ("coronal", "sagittal"),
) -> bytes:
    """A mosaic as PNG: a row per view; the exam, the aligned atlas beside it, and masks over the exam.

    Args:
        exam: HU.
        aligned: the atlas on the exam's grid, HU from −256 to 256.
        masks: what was found, drawn as lines; boolean, on the exam's grid. A structure's color hangs on its name.
        truth: what is right, drawn as areas.
        views: of "coronal", "sagittal" and "axial".

    Raises:
        ExamError: an array that is not on the exam's grid, or an unknown view.
    """
    masks, truth = dict(masks or {}), dict(truth or {})
    for name, array in {**masks, **truth, **({} if aligned is None else {"the aligned atlas": aligned})}.items():
        if array.shape != exam.shape:
            raise ExamError(f"Expected {name} on the exam's grid {exam.shape}, got {array.shape}; sample it there.")
    if not views or not set(views) <= set(AXES):
        raise ExamError(f"Expected views among {', '.join(AXES)}, got {', '.join(views) or 'none'}; choose some.")
    colors = _colors(dict.fromkeys([*truth, *masks]))
    columns = ["exam", *([] if aligned is None else ["atlas, aligned"])]
    columns += [_title(masks, truth)] if masks or truth else []
    looks = [(axis, _slice_index(exam, axis, truth or masks)) for axis in (AXES[view] for view in views)]
    sizes = [_look(exam, exam.array, *look)[1] for look in looks]
    heights = [2.6 * size[1] / size[0] for size in sizes]
    figure = Figure(figsize=(2.6 * len(columns), sum(heights) + 0.3), dpi=110, facecolor="black")
    axes = figure.subplots(len(looks), len(columns), squeeze=False, gridspec_kw={"height_ratios": heights})
    figure.subplots_adjust(0, 0, 1, 1 - 0.3 / (sum(heights) + 0.3), 0.02, 0.02)
    for number, (row, look) in enumerate(zip(axes, looks, strict=True)):
        for cell, title in zip(row, columns, strict=True):
            over = title not in ("exam", "atlas, aligned")
            array, window = (aligned, ATLAS_HU) if title == "atlas, aligned" else (exam.array, WINDOW_HU)
            shown, (width, height) = _look(exam, array, *look)
            cell.imshow(
                shown, cmap="gray", vmin=window[0], vmax=window[1], extent=(0, width, 0, height), origin="lower"
            )
            if over:
                _draw(cell, exam, look, masks, truth, colors)
            cell.set_axis_off()
            if number == 0:
                cell.set_title(title, color="white", fontsize=9, pad=4)
    return _png(figure)


def curve(log: Path) -> bytes | None:
    """The training log (`training/log.csv`) as a PNG: the loss of each stage, and what the map does; None if empty."""
    with log.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return None
    figure = Figure(figsize=(8, 4.6), dpi=100, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    begun = 0
    for number, (stage, group) in enumerate(groupby(rows, key=lambda row: row["stage"])):
        part = list(group)
        steps = [begun + int(row["step"]) for row in part]
        above.plot(steps, [_number(row.get("loss")) for row in part], ".-", color=f"C{number}", label=stage)
        for key, line in (("converged", "-"), ("folded", ":")):
            values = [_number(row.get(key)) for row in part]
            if not np.isnan(values).all():
                below.plot(steps, values, line, color=f"C{number}")
        begun = steps[-1]
    above.set(ylabel="loss", yscale="log")
    above.legend(fontsize=8, ncols=2)
    below.set(ylabel="share of voxels\nconverged –, folded ···", xlabel="step", ylim=(-0.02, 1.02))
    return _png(figure)


def table(rows: Sequence[Sequence[object]]) -> str:
    """Rows as an HTML table, the first of them its head; floats as they are formatted by the caller."""
    cells = [[html.escape(str(cell)) for cell in row] for row in rows]
    head = "".join(f"<th>{cell}</th>" for cell in cells[0])
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in cells[1:])
    return f"<table>\n<tr>{head}</tr>\n{body}</table>\n"


def image(png: bytes, what: str) -> str:
    """A picture as an HTML element that holds its data."""
    return f'<img alt="{html.escape(what)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">\n'


def heading(text: str) -> str:
    """A heading."""
    return f"<h2>{html.escape(text)}</h2>\n"


def paragraph(text: str, note: bool = False) -> str:
    """A paragraph of plain text."""
    return f"<p{' class=note' if note else ''}>{html.escape(text)}</p>\n"


def answer(exam: Exam, found: Mapping[str, Found], aligned: np.ndarray) -> str:
    """What was found in an exam: a picture, and a line for every structure.

    Args:
        aligned: the atlas on the exam's grid, HU.
    """
    masks = {name: one.mask for name, one in found.items() if one.mask is not None}
    rows = [["structure", "status", "coverage", "confidence", "ml", "centroid, mm (RAS)"]]
    for one in found.values():
        row = [one.name.replace("_", " "), one.status.replace("_", " "), f"{one.coverage:.0%}"]
        if one.mask is None:
            rows.append([*row, "–", "–", "–"])
            continue
        sure = f"{one.confidence:.0%}{' (low)' if one.unsure else ''}"
        rows.append([*row, sure, f"{one.volume_ml:.1f}", ", ".join(f"{x:.0f}" for x in one.centroid_mm)])
    shown = picture(exam, aligned, masks, views=("coronal", "sagittal", "axial"))
    notes = "".join(paragraph(f"Mended: {repair}.", note=True) for repair in exam.repairs)
    seen = image(shown, f"{exam.name}: exam, aligned atlas, structures found")
    return heading(exam.name) + notes + seen + table(rows)


def write(path: Path, title: str, parts: Sequence[str]) -> Path:
    """Write one HTML file that needs nothing beside it."""
    name = html.escape(title)
    page = (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{name}</title><style>{STYLE}</style></head>\n<body>\n<h1>{name}</h1>\n{''.join(parts)}</body>\n</html>"
    )
    checkpoint.write_text(path, page)
    return path


def _look(exam: Volume, array: np.ndarray, axis: int, index: int) -> tuple[np.ndarray, tuple[float, float]]:
    """A slice as a picture whose first row is its lowest, and its width and height in mm."""
    ras = reorder(Volume(array, exam.affine), *ras_order(exam.affine))
    across, up = (other for other in range(3) if other != axis)
    shown = np.take(ras.array, index, axis=axis).T[:, ::-1]  # right, or front, to the left
    extent = ras.spacing_mm * ras.shape
    return shown, (float(extent[across]), float(extent[up]))


def _slice_index(exam: Volume, axis: int, masks: Mapping[str, np.ndarray]) -> int:
    """The slice that shows most structures, and among those most of each; without any, the middle one."""
    order = ras_order(exam.affine)
    shape = reorder(exam, *order).shape
    score = np.zeros(shape[axis])
    others = tuple(other for other in range(3) if other != axis)
    for mask in masks.values():
        area = np.count_nonzero(reorder(Volume(mask, exam.affine), *order).array, axis=others)
        score += area / max(int(area.max()), 1) + 0.2 * (area > 0)
    return int(np.argmax(score)) if score.any() else shape[axis] // 2


def _draw(cell, exam: Volume, look: tuple[int, int], masks: Mapping, truth: Mapping, colors: Mapping) -> None:
    for name, color in colors.items():
        for array, filled in ((truth.get(name), True), (masks.get(name), False)):
            if array is None:
                continue
            shown, (width, height) = _look(exam, array, *look)
            if not shown.any() or min(shown.shape) < 2:
                continue
            x = (np.arange(shown.shape[1]) + 0.5) * width / shown.shape[1]
            y = (np.arange(shown.shape[0]) + 0.5) * height / shown.shape[0]
            if filled:
                cell.contourf(x, y, shown.astype(float), levels=[0.5, 1.5], colors=[color], alpha=0.45)
            else:
                cell.contour(x, y, shown.astype(float), levels=[0.5], colors=[color], linewidths=1.1)


def _title(masks: Mapping, truth: Mapping) -> str:
    if masks and truth:
        return "found (lines) over truth (areas)"
    return "found" if masks else "truth"


def _colors(names: Iterable[str]) -> dict[str, tuple[float, ...]]:
    """A color for each name, the same in every picture."""
    return {name: colormaps["hsv"](crc32(name.encode()) / 2**32) for name in names}


def _number(text: str | None) -> float:
    return float(text) if text else float("nan")


def _png(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=figure.get_facecolor())
    return buffer.getvalue()
