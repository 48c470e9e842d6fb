"""Pictures the right way round, and reports that need nothing beside them."""

import base64
import io
import re

import numpy as np
import pytest
from matplotlib.image import imread

from deepatlas import report
from deepatlas.errors import ExamError
from deepatlas.volume import Volume, reorder


def lit(right=False, front=False, head=False, shape=(20, 24, 28)):
    """An exam in air, RAS, with one bright quarter at its right or left, front or back, head or feet."""
    array = np.full(shape, -1000, np.int16)
    ends = [
        slice(n - n // 3, n) if high else slice(0, n // 3) for n, high in zip(shape, (right, front, head), strict=True)
    ]
    array[tuple(ends)] = 400
    return Volume(array, np.diag([2.0, 2.0, 4.0, 1.0]))


def pixels(png):
    """A PNG as grey values, first row on top."""
    return imread(io.BytesIO(png))[..., :3].mean(axis=-1)


def brightest(picture):
    """Where the light of a picture lies: (from the top, from the left), 0 ... 1."""
    rows, columns = np.nonzero(picture > 0.9)
    return rows.mean() / picture.shape[0], columns.mean() / picture.shape[1]


def without_title(picture):
    """The picture below its title."""
    return picture[40:]


@pytest.mark.parametrize("stored", [((0, 1, 2), (False, False, False)), ((2, 0, 1), (True, False, True))])
@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("head", [False, True])
def test_right_is_on_the_left_and_the_head_is_up(stored, right, head):
    exam = lit(right=right, front=True, head=head)
    shown = reorder(exam, *stored)
    bright = reorder(Volume(exam.array > 0, exam.affine), *stored).array
    plain = without_title(pixels(report.picture(shown, views=["coronal"])))  # the middle slice shows no light
    assert plain.max() < 0.9
    picture = without_title(pixels(report.picture(shown, truth={"light": bright}, views=["coronal"])))
    half = picture[:, : picture.shape[1] // 2]  # the exam, without the areas over it
    down, across = brightest(half)
    assert (across < 0.5) == right
    assert (down < 0.5) == head


@pytest.mark.parametrize("front", [False, True])
def test_the_front_is_on_the_left_seen_from_the_side(front):
    exam = lit(front=front, head=True)
    picture = without_title(pixels(report.picture(exam, truth={"light": exam.array > 0}, views=["sagittal"])))
    down, across = brightest(picture[:, : picture.shape[1] // 2])
    assert (across < 0.5) == front
    assert down < 0.5


def test_a_slice_has_the_shape_of_the_patient():
    exam = lit()
    png = pixels(report.picture(exam, views=["coronal"]))
    height, width = without_title(png).shape
    assert height / width == pytest.approx(28 * 4 / (20 * 2), rel=0.06)  # spacing counts, not voxels


def test_found_is_drawn_as_lines_over_areas():
    exam = lit()
    truth, found = np.zeros(exam.shape, bool), np.zeros(exam.shape, bool)
    truth[4:10, 8:16, 10:18] = True
    found[8:16, 8:16, 10:18] = True
    both = report.picture(exam, exam.array * 0.0, {"organ": found}, {"organ": truth})
    other = report.picture(exam, exam.array * 0.0, {"organ": truth}, {"organ": truth})
    none = report.picture(exam, exam.array * 0.0, {}, {"organ": truth})
    assert both.startswith(b"\x89PNG")
    assert len({both, other, none}) == 3
    title = imread(io.BytesIO(both))[:30, :, :3]
    assert (title.min(axis=-1) > 0.9).any()


def test_a_structure_has_the_same_color_in_every_picture():
    colors = report._colors(["liver", "spleen"])
    assert colors["spleen"] == report._colors(["spleen"])["spleen"]
    assert colors["spleen"] != colors["liver"]


def test_arrays_of_another_grid_and_unknown_views_are_refused():
    exam = lit()
    with pytest.raises(ExamError, match="organ"):
        report.picture(exam, masks={"organ": np.zeros((2, 2, 2), bool)})
    with pytest.raises(ExamError, match="aligned"):
        report.picture(exam, np.zeros((2, 2, 2)))
    with pytest.raises(ExamError, match="coronal"):
        report.picture(exam, views=["oblique"])


def test_the_training_log_becomes_a_curve(tmp_path):
    log = tmp_path / "log.csv"
    head = "stage,step,seconds,loss,folded,converged\n"
    log.write_text(head)
    assert report.curve(log) is None
    log.write_text(head + "warm,20,1,0.5,,\nwarm,40,2,0.3,,\nlevel 4³,20,3,1.5,0.01,0.9\n", encoding="utf-8")
    first = report.curve(log)
    assert first.startswith(b"\x89PNG")
    log.write_text(head + "warm,20,1,0.5,,\nwarm,40,2,0.1,,\nlevel 4³,20,3,1.5,0.01,0.9\n", encoding="utf-8")
    assert report.curve(log) != first


def test_a_report_is_one_file_and_its_words_are_escaped(tmp_path):
    png = report.picture(lit(), views=["axial"])
    parts = [
        report.heading("a & b"),
        report.paragraph("<script>"),
        report.table([["name", "Dice"], ["<liver>", 0.5]]),
        report.image(png, 'the "picture"'),
    ]
    page = report.write(tmp_path / "report.html", "x < y", parts).read_text()
    assert "<script>" not in page
    assert "<td>&lt;liver&gt;</td><td>0.5</td>" in page
    assert "<title>x &lt; y</title>" in page
    assert "a &amp; b" in page
    assert "http" not in page
    (data,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(data) == png
