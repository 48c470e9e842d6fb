"""Procedural CT exams, head to pelvis, whose anatomy and whose true coordinates are known at every point.

One canonical body is a function of a point: `anatomy(points_canonical, appearance)` gives its HU and its label. An exam
looks at that body through a smooth invertible map, `Deformation.to_canonical`, so for every voxel

    labels[voxel] = anatomy(to_canonical(affine(voxel))).label

holds by construction, and the right answer for any pair of exams is `p.from_canonical(q.to_canonical(points_mm))`.
Both frames are in mm with RAS+ axes: +x is the patient's right, +y anterior, +z superior. In the canonical frame z = 0
lies just below the hip joints and the crown at 976 mm; x = 0 is the midline.

Chance is drawn in `draw_deformation`, `draw_appearance` and `draw_acquisition`, and applied in `acquire`.
"""

from deepatlas.phantom.bending import Deformation, draw_deformation
from deepatlas.phantom.cohorts import PhantomExam, cohort_exam, cohort_paths, draw, write_cohort
from deepatlas.phantom.looks import AIR_HU, STRUCTURES, Appearance, draw_appearance
from deepatlas.phantom.organs import anatomy
from deepatlas.phantom.scanner import FIELDS_OF_VIEW, Acquisition, acquire, draw_acquisition

__all__ = [
    "AIR_HU",
    "FIELDS_OF_VIEW",
    "STRUCTURES",
    "Acquisition",
    "Appearance",
    "Deformation",
    "PhantomExam",
    "acquire",
    "anatomy",
    "cohort_exam",
    "cohort_paths",
    "draw",
    "draw_acquisition",
    "draw_appearance",
    "draw_deformation",
    "write_cohort",
]
