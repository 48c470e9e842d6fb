"""Procedural CT exams, head to pelvis, whose anatomy and whose true coordinates are known at every point.

One canonical body is a function of a point: `anatomy(points_canonical, appearance)` gives its HU and its label. An exam
looks at that body through a smooth invertible map, `Deformation.to_canonical`, so for every voxel

    labels[voxel] = anatomy(to_canonical(affine(voxel))).label

holds by construction, and the right answer for any pair of exams is `p.from_canonical(q.to_canonical(points_mm))`.
Both frames are in mm with RAS+ axes: +x is the patient's right, +y anterior, +z superior. In the canonical frame z = 0
lies just below the hip joints and the crown at 976 mm; x = 0 is the midline.

Chance is drawn in `draw_deformation`, `draw_appearance` and `draw_acquisition`, and applied in `acquire`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.ndimage import gaussian_filter

from deepatlas.volume import Volume

AIR_HU = -1000.0

# fmt: off
_NAMES = [
    "brain", "eye_left", "eye_right", "mandible", "trachea", "spinal_cord", "humerus_left", "humerus_right",
    "lung_left", "lung_right", "heart", "aorta", "sternum", "liver", "spleen", "stomach", "kidney_left",
    "kidney_right", "vertebra_T6", "vertebra_L1", "vertebra_L4", "psoas_left", "psoas_right", "sacrum", "hip_left",
    "hip_right", "bladder", "femoral_head_left", "femoral_head_right",
]
# fmt: on
STRUCTURES: dict[str, int] = {name: number for number, name in enumerate(_NAMES, start=1)}

# Canonical z in mm, low to high, that each field of view is meant to show (before jitter).
FIELDS_OF_VIEW: dict[str, tuple[float, float]] = {
    "whole": (0.0, 980.0),
    "head_neck": (700.0, 980.0),
    "neck_chest": (420.0, 850.0),
    "chest": (375.0, 730.0),
    "chest_abdomen": (200.0, 730.0),
    "abdomen": (210.0, 500.0),
    "abdomen_pelvis": (0.0, 500.0),
    "pelvis": (-10.0, 270.0),
    "trunk": (0.0, 730.0),
}

_LARGEST_AXIS = 130  # voxels
_SMALLEST_DETERMINANT = 0.3  # of the drawn change of shape, where it is checked; the map between checks stays above 0.2


# --- the map ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Deformation:
    """The map from an exam's mm to canonical mm: `to_canonical(p) = q + waves(q) + bumps(q)`, `q = linear p + offset`.

    `waves(q) = sum_k amplitude_k sin(vector_k . q + phase_k)` changes the body at large, and
    `bumps(q) = sum_m (shift_m + swell_m (q - centre_m)) (1 - |q - centre_m|^2 / 8 width_m^2)^4`, each within
    sqrt(8) widths, moves and resizes single organs. Lengths in mm, wave vectors in rad/mm, RAS+ on both sides.
    """

    linear: np.ndarray  # (3, 3)
    offset_mm: np.ndarray  # (3,)
    wave_vectors: np.ndarray  # (k, 3), rad/mm
    wave_phases: np.ndarray  # (k,)
    wave_amplitudes_mm: np.ndarray  # (k, 3)
    bump_centres_mm: np.ndarray  # (m, 3), canonical
    bump_widths_mm: np.ndarray  # (m,)
    bump_shifts_mm: np.ndarray  # (m, 3)
    bump_swells: np.ndarray  # (m,), negative where the exam's organ is larger

    def to_canonical(self, points_mm: np.ndarray) -> np.ndarray:
        """Canonical mm, (..., 3) float64, of the exam's points in mm, (..., 3)."""
        posed = np.asarray(points_mm, float) @ self.linear.T + self.offset_mm
        return posed + self._displacement(posed)

    def jacobian(self, points_mm: np.ndarray) -> np.ndarray:
        """Derivative of `to_canonical` at points in exam mm: (..., 3, 3), rows canonical, columns exam."""
        posed = np.asarray(points_mm, float) @ self.linear.T + self.offset_mm
        return self._shape_jacobian(posed) @ self.linear

    def from_canonical(self, points_canonical: np.ndarray, tolerance_mm: float = 1e-4) -> np.ndarray:
        """The exam's mm, (..., 3) float64, of canonical points: the inverse of `to_canonical`, by damped Newton.

        Raises RuntimeError if a point stays farther than `tolerance_mm` (in canonical mm) from its target.
        """
        target = np.asarray(points_canonical, float)
        goal = target.reshape(-1, 3)
        posed = goal.copy()
        miss = goal - posed - self._displacement(posed)
        step_length = np.ones(len(goal))
        for _ in range(60):
            size = np.linalg.norm(miss, axis=1)
            (open_,) = np.nonzero(size > 0.1 * tolerance_mm)
            if len(open_) == 0:
                break
            step = np.linalg.solve(self._shape_jacobian(posed[open_]), miss[open_][..., None])[..., 0]
            trial = posed[open_] + step_length[open_, None] * step
            trial_miss = goal[open_] - trial - self._displacement(trial)
            better = np.linalg.norm(trial_miss, axis=1) < size[open_]
            posed[open_[better]] = trial[better]
            miss[open_[better]] = trial_miss[better]
            step_length[open_] = np.where(better, np.minimum(1.0, 2.0 * step_length[open_]), 0.5 * step_length[open_])
        worst_mm = float(np.linalg.norm(miss, axis=1).max(initial=0.0))
        if not worst_mm <= tolerance_mm:
            raise RuntimeError(
                f"from_canonical: expected every point within {tolerance_mm} mm of its target, the worst is "
                f"{worst_mm:.3g} mm away; is the deformation invertible (det of `jacobian` above 0)?"
            )
        return ((posed - self.offset_mm) @ np.linalg.inv(self.linear).T).reshape(target.shape)

    def _displacement(self, posed: np.ndarray) -> np.ndarray:
        flat = posed.reshape(-1, 3)
        total = np.empty_like(flat)
        for start in range(0, len(flat), 8192):  # what one core's cache holds
            here = flat[start : start + 8192]
            moved = np.sin(here @ self.wave_vectors.T + self.wave_phases) @ self.wave_amplitudes_mm
            for centre, width, shift, swell in self._bumps():
                near = np.flatnonzero(np.abs(here[:, 2] - centre[2]) < np.sqrt(8) * width)
                away = here[near] - centre
                height = _bump(np.einsum("nc,nc->n", away, away) / width**2) ** 4
                away *= swell
                away += shift
                moved[near] += height[:, None] * away
            total[start : start + 8192] = moved
        return total.reshape(posed.shape)

    def _shape_jacobian(self, posed: np.ndarray) -> np.ndarray:
        total = np.broadcast_to(np.eye(3), (*posed.shape, 3)).copy()
        for vector, phase, amplitude in zip(self.wave_vectors, self.wave_phases, self.wave_amplitudes_mm, strict=True):
            total += np.cos(posed @ vector + phase)[..., None, None] * np.outer(amplitude, vector)
        for centre, width, shift, swell in self._bumps():
            away = posed - centre
            base = _bump(np.einsum("...c,...c->...", away, away) / width**2)
            total += (base**4 * swell)[..., None, None] * np.eye(3)
            slope = -(base**3)[..., None] * away / width**2
            total += (shift + swell * away)[..., :, None] * slope[..., None, :]
        return total

    def _bumps(self):
        return zip(self.bump_centres_mm, self.bump_widths_mm, self.bump_shifts_mm, self.bump_swells, strict=True)


def _bump(squared: np.ndarray) -> np.ndarray:
    """The fourth root of a bump, from the squared distance in widths: like exp(-squared / 8), but 0 from 8 on."""
    return np.maximum(1 - squared / 8, 0)


# Organs that move and grow on their own: canonical centre, width of the bump, largest shift, largest swell.
_MOVING = (
    ((65.0, 15.0, 410.0), 75.0, 10.0, 0.18),  # liver
    ((-60.0, 35.0, 395.0), 50.0, 9.0, 0.25),  # stomach
    ((-100.0, -45.0, 395.0), 45.0, 7.0, 0.22),  # spleen
    ((-25.0, 30.0, 505.0), 60.0, 8.0, 0.18),  # heart
    ((60.0, -42.0, 322.0), 45.0, 8.0, 0.20),  # right kidney
    ((-60.0, -42.0, 350.0), 45.0, 8.0, 0.20),  # left kidney
    ((0.0, 38.0, 100.0), 45.0, 6.0, 0.30),  # bladder
    ((0.0, 50.0, 260.0), 70.0, 12.0, 0.15),  # bowel
    ((0.0, 60.0, 800.0), 60.0, 6.0, 0.12),  # jaw
)


def draw_deformation(rng: np.random.Generator, tilt_degrees: float = 11.0, strength: float = 1.0) -> Deformation:
    """Draw how one patient lies and is built.

    A turn of up to 11 degrees about z and up to `tilt_degrees` about x and y, a shift, stature and girth (width and
    depth apart) of 0.85 to 1.15, six waves of 180 to 480 mm, and organs that move by themselves. The waves and bumps
    are multiplied by `strength`, then scaled down together until the determinant of the change
    of shape is above 0.3 on a 20 mm grid.
    """
    bounds = np.radians([tilt_degrees, tilt_degrees, 11.0])
    rotation = _rotation(rng.uniform(-bounds, bounds))
    girth = rng.uniform(0.87, 1.13)
    scale = np.array([girth, girth * rng.uniform(0.94, 1.06), rng.uniform(0.85, 1.15)]).clip(0.85, 1.15)
    linear = np.diag(1 / scale) @ rotation.T
    shift_mm = rng.uniform([-60, -60, -400], [60, 60, 400])

    count = 6
    directions = rng.standard_normal((count, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    wavelengths_mm = np.linspace(180, 480, count) * rng.uniform(0.92, 1.08, count)
    amplitudes = rng.standard_normal((count, 3))
    amplitudes *= (0.022 * wavelengths_mm * rng.uniform(0.7, 1.3, count))[:, None] / np.linalg.norm(
        amplitudes, axis=1, keepdims=True
    )
    moving = len(_MOVING)
    wanders = rng.uniform(-1, 1, (moving, 3)) * np.array([shift for _, _, shift, _ in _MOVING])[:, None]
    swells = rng.uniform(-1, 1, moving) * np.array([swell for _, _, _, swell in _MOVING])
    phases = rng.uniform(0, 2 * np.pi, count)

    axes = [np.arange(-200, 201, 20), np.arange(-130, 131, 20), np.arange(-40, 1001, 20)]
    check_canonical = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3).astype(float)
    while True:
        deformation = Deformation(
            linear=linear,
            offset_mm=np.array([0.0, 0.0, 480.0]) - linear @ shift_mm,
            wave_vectors=directions * (2 * np.pi / wavelengths_mm)[:, None],
            wave_phases=phases,
            wave_amplitudes_mm=amplitudes * strength,
            bump_centres_mm=np.array([centre for centre, _, _, _ in _MOVING]),
            bump_widths_mm=np.array([width for _, width, _, _ in _MOVING]),
            bump_shifts_mm=wanders * strength,
            bump_swells=swells * strength,
        )
        determinants = np.linalg.det(deformation._shape_jacobian(check_canonical))
        if determinants.min() > _SMALLEST_DETERMINANT:
            return deformation
        strength *= 0.93


def _rotation(angles: np.ndarray) -> np.ndarray:
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles), np.sin(angles)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


# --- the anatomy ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Appearance:
    """What one exam's tissues look like, in HU; labels do not depend on it."""

    fat: float = -100.0
    muscle: float = 55.0
    lung: float = -850.0
    bone: float = 1.0  # density, a factor on every bone's HU above soft tissue
    artery: float = 180.0
    vein: float = 130.0
    myocardium: float = 100.0
    liver: float = 100.0
    spleen: float = 115.0
    cortex: float = 170.0  # of the kidneys
    medulla: float = 130.0
    bladder: float = 8.0
    stomach: float = 30.0
    stomach_gas_mm: float = 48.0  # canonical y above which the stomach holds gas
    bowel: float = 35.0
    bowel_gas: float = 0.25  # share of the loops that hold gas, roughly
    bowel_phase: float = 0.0  # where the loops lie


def draw_appearance(rng: np.random.Generator) -> Appearance:
    """Draw one exam's HU: contrast phase (none, arterial, portal), bone density, fat, and how full the bowel is."""
    phase = rng.choice(["none", "arterial", "portal"], p=[0.35, 0.25, 0.4])
    wobble = rng.uniform(-1, 1, 6)
    artery, vein, muscle_of_heart, liver, spleen, cortex, medulla = {
        "none": (42, 42, 40, 58, 48, 34, 30),
        "arterial": (320, 90, 110, 72, 125, 210, 90),
        "portal": (165, 160, 100, 112, 118, 185, 165),
    }[str(phase)]
    strength = 1 + 0.2 * wobble[0]
    drawn = {
        "fat": rng.uniform(-115, -88),
        "muscle": rng.uniform(46, 64),
        "lung": rng.uniform(-890, -790),
        "bone": rng.uniform(0.75, 1.3),
        "artery": artery * strength,
        "vein": vein * strength,
        "myocardium": muscle_of_heart * strength,
        "liver": liver + 10 * wobble[1],
        "spleen": spleen + 10 * wobble[2],
        "cortex": cortex * strength,
        "medulla": medulla * strength,
        "bladder": rng.uniform(0, 18),
        "stomach": rng.choice([15.0, 40.0, 160.0], p=[0.45, 0.4, 0.15]) + 8 * wobble[3],
        "stomach_gas_mm": rng.uniform(38, 62),
        "bowel": rng.choice([30.0, 45.0, 180.0], p=[0.5, 0.35, 0.15]) + 10 * wobble[4],
        "bowel_gas": rng.uniform(0.05, 0.45),
        "bowel_phase": rng.uniform(0, 2 * np.pi),
    }
    return Appearance(**{name: float(value) for name, value in drawn.items()})


class _Table(NamedTuple):
    """A curve over canonical z, interpolated without overshoot and read from a 1 mm table."""

    z: np.ndarray
    values: np.ndarray

    def __call__(self, z: np.ndarray) -> np.ndarray:
        return np.interp(z, self.z, self.values).astype(np.float32)


def _tables(rows: Sequence[Sequence[float]]) -> tuple[_Table, ...]:
    columns = np.array(rows, float).T
    z = np.arange(columns[0][0], columns[0][-1] + 0.5)
    return tuple(_Table(z, PchipInterpolator(columns[0], column)(z)) for column in columns[1:])


# Outline of the body: z, half width, front y, back y, fat under the skin (mm).
_BODY = _tables(
    [
        (-20, 178, 85, -108, 22),
        (40, 186, 96, -120, 26),
        (100, 183, 106, -124, 27),
        (160, 172, 112, -116, 25),
        (230, 157, 112, -106, 22),
        (300, 151, 112, -103, 19),
        (380, 155, 116, -107, 15),
        (450, 162, 119, -112, 13),
        (550, 172, 119, -116, 12),
        (620, 187, 108, -116, 11),
        (655, 196, 94, -110, 11),
        (690, 182, 74, -102, 10),
        (715, 128, 57, -92, 9),
        (735, 80, 50, -82, 8),
        (755, 61, 48, -77, 7),
        (777, 59, 62, -76, 6),
        (790, 63, 94, -78, 5),
        (812, 68, 103, -82, 5),
        (850, 73, 103, -90, 4),
        (890, 79, 101, -95, 3),
        (920, 78, 95, -95, 3),
        (945, 68, 78, -83, 3),
        (962, 48, 52, -60, 3),
        (972, 22, 24, -32, 3),
        (976, 1, -3, -5, 3),
    ]
)
# The inside of the ribs, the belly's wall and the pelvis: z, half width, front y, back y.
_CAVITY = _tables(
    [
        (55, 40, 55, -55),
        (75, 58, 66, -66),
        (110, 78, 80, -72),
        (170, 104, 88, -66),
        (230, 118, 88, -62),
        (300, 121, 88, -68),
        (370, 127, 90, -78),
        (450, 136, 95, -90),
        (550, 134, 90, -94),
        (620, 114, 71, -90),
        (670, 80, 40, -76),
        (695, 48, 8, -62),
        (708, 8, -25, -45),
    ]
)
# The spine: z, y of the vertebral bodies' centre, half width, half depth.
_SPINE = _tables(
    [
        (195, -46, 27, 19),
        (260, -36, 26, 19),
        (310, -36, 25, 18.5),
        (370, -42, 23, 17.5),
        (450, -54, 20, 16),
        (560, -66, 17, 15),
        (650, -60, 15, 13),
        (716, -42, 14, 11),
        (770, -28, 13, 10),
        (835, -30, 12, 9),
    ]
)
_LEVELS = [f"L{n}" for n in range(5, 0, -1)] + [f"T{n}" for n in range(12, 0, -1)] + [f"C{n}" for n in range(7, 0, -1)]
_HEIGHTS_MM = np.concatenate([np.linspace(38, 35, 5), np.linspace(31, 21, 12), np.full(7, 18.2)])
_EDGES_MM = 203.0 + np.concatenate([[0.0], np.cumsum(_HEIGHTS_MM * (832 - 203) / _HEIGHTS_MM.sum())])


class _Scene(NamedTuple):
    """The points inside the body, sorted by z, with their HU and label as painted so far (later wins)."""

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    hu: np.ndarray
    label: np.ndarray
    cavity: np.ndarray  # superellipse radius in _CAVITY: 1 on its wall, 9 above and below it
    dome_mm: np.ndarray  # z of the diaphragm over this point

    def within(self, low: Sequence[float], high: Sequence[float]) -> np.ndarray:
        """Indices of the points in the box from `low` to `high`."""
        start, stop = np.searchsorted(self.z, [low[2], high[2]])
        x, y = self.x[start:stop], self.y[start:stop]
        return start + np.flatnonzero((x > low[0]) & (x < high[0]) & (y > low[1]) & (y < high[1]))

    def at(self, near: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.x[near], self.y[near], self.z[near]

    def paint(self, where: np.ndarray, hu: float | np.ndarray, structure: str | None = None) -> None:
        self.hu[where] = hu
        self.label[where] = STRUCTURES[structure] if structure else 0

    def ball(self, centre: Sequence[float], radii: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        """Points in an ellipsoid and their normalised radius, 0 at the centre and 1 on the surface."""
        centre, radii = np.array(centre, np.float32), np.broadcast_to(np.float32(radii), 3)
        near = self.within(centre - radii, centre + radii)
        x, y, z = self.at(near)
        r = np.sqrt(
            ((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2 + ((z - centre[2]) / radii[2]) ** 2
        )
        inside = r < 1
        return near[inside], r[inside]

    def tube(self, path: Sequence[Sequence[float]], radius: float | Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        """Points in a chain of (tapered) capsules along `path`, and their distance from the axis over the radius."""
        path = np.array(path, np.float32)
        radii = np.broadcast_to(np.float32(radius), len(path))
        found, ratios = [], []
        for start, end, r0, r1 in zip(path[:-1], path[1:], radii[:-1], radii[1:], strict=True):
            wide = max(r0, r1)
            near = self.within(np.minimum(start, end) - wide, np.maximum(start, end) + wide)
            x, y, z = (values - s for values, s in zip(self.at(near), start, strict=True))
            axis = end - start
            along = ((x * axis[0] + y * axis[1] + z * axis[2]) / (axis @ axis)).clip(0, 1)
            apart = np.sqrt((x - along * axis[0]) ** 2 + (y - along * axis[1]) ** 2 + (z - along * axis[2]) ** 2)
            ratio = apart / (r0 + along * (r1 - r0))
            found.append(near[ratio < 1])
            ratios.append(ratio[ratio < 1])
        where, ratio = np.concatenate(found), np.concatenate(ratios)
        order = np.lexsort((ratio, where))
        where, ratio = where[order], ratio[order]
        first = np.ones(len(where), bool)
        first[1:] = where[1:] != where[:-1]
        return where[first], ratio[first]


def _ripple(x: np.ndarray, y: np.ndarray, z: np.ndarray, wavelength_mm: float, phase: float = 0.0) -> np.ndarray:
    """A fixed texture in -1...1: three plane waves that share no direction with the axes."""
    k = np.float32(2 * np.pi / wavelength_mm)
    phase = np.float32(phase)
    total = np.sin(k * (0.9 * x + 0.35 * y + 0.3 * z) + phase)
    total += np.sin(k * (-0.4 * x + 0.85 * y - 0.35 * z) + np.float32(2.1) + phase)
    total += np.sin(k * (0.2 * x - 0.45 * y + 0.87 * z) + np.float32(4.4) - phase)
    return total / 3


def _outline(tables: tuple[_Table, ...], x: np.ndarray, y: np.ndarray, z: np.ndarray, power: float) -> np.ndarray:
    """Superellipse radius: 1 on the outline that `tables` give at z, and the shorter half axis times (1 - it) deep."""
    half, front, back = (table(z) for table in tables[:3])
    u = np.abs(x) / half
    v = np.abs(y - (front + back) / 2) / ((front - back) / 2)
    return (u**power + v**power) ** np.float32(1 / power)


def anatomy(points_canonical: np.ndarray, appearance: Appearance) -> tuple[np.ndarray, np.ndarray]:
    """The canonical body at any points.

    `points_canonical`: (..., 3), canonical mm, RAS+. Returns HU (..., float32), -1000 outside the body, and labels
    (..., uint8) numbered by `STRUCTURES`, 0 for everything that has no name.
    """
    points = np.asarray(points_canonical)
    x, y, z = (np.ascontiguousarray(points[..., axis]).reshape(-1).astype(np.float32) for axis in range(3))
    hu = np.full(len(x), AIR_HU, np.float32)
    label = np.zeros(len(x), np.uint8)

    (inside,) = np.nonzero((np.abs(x) < 200) & (y > -130) & (y < 125) & (z < 977))
    inside = inside[np.argsort(z[inside], kind="stable")]
    depth_mm = _depth(x[inside], y[inside], z[inside])
    inside, depth_mm = inside[depth_mm > 0], depth_mm[depth_mm > 0]
    if len(inside):
        scene = _scene(x[inside], y[inside], z[inside], depth_mm, appearance)
        _paint_chest(scene, appearance)
        _paint_belly(scene, appearance)
        _paint_pelvis(scene, appearance)
        _paint_spine(scene, appearance)
        _paint_shoulders(scene, appearance)
        _paint_head(scene, appearance)
        hu[inside] = scene.hu
        label[inside] = scene.label
    return hu.reshape(points.shape[:-1]), label.reshape(points.shape[:-1])


def _depth(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Roughly the mm below the skin, negative outside the body."""
    half, front, back = (table(z) for table in _BODY[:3])
    trunk = (1 - _outline(_BODY, x, y, z, 2.3)) * np.minimum(half, (front - back) / 2)
    trunk[z < 8] = -1
    low = z < 60
    thigh = (1 - np.hypot((np.abs(x[low]) - 92) / 86, (y[low] + 12) / 95)) * 86
    trunk[low] = np.maximum(trunk[low], thigh)
    nose = (z > 835) & (z < 872) & (y > 85) & (np.abs(x) < 16)
    bridge = 14 - np.hypot(x[nose], 0.8 * (y[nose] - 98 + 0.45 * (z[nose] - 852)))
    trunk[nose] = np.maximum(trunk[nose], bridge)
    return trunk


def _scene(x: np.ndarray, y: np.ndarray, z: np.ndarray, depth_mm: np.ndarray, look: Appearance) -> _Scene:
    """Skin, fat, muscle with fat between, and the cavity's own fat."""
    texture = _ripple(x, y, z, 38)
    skin_mm = np.float32(3)
    fat_mm = skin_mm + _BODY[3](z) * (1 + 0.35 * np.sin(z / 47) * (y > 0) + 0.3 * texture)
    hu = np.full(len(x), look.muscle, np.float32) + 9 * texture
    hu[np.abs(_ripple(x, y, z, 62, 1.0)) < 0.045] = look.fat + 40
    hu[depth_mm < fat_mm] = look.fat
    hu[depth_mm < skin_mm] = 20

    cavity = np.full(len(x), 9, np.float32)
    start, stop = np.searchsorted(z, [56, 707])
    inner = slice(start, stop)
    cavity[inner] = _outline(_CAVITY, x[inner], y[inner], z[inner], 2.2)
    right = x > 0
    dome_mm = np.where(right, np.float32(486), np.float32(470))
    dome_mm -= 45 * ((np.abs(x) - np.where(right, np.float32(62), np.float32(70))) / 72) ** 2
    dome_mm -= 55 * ((y - 18) / 80) ** 2
    hu[cavity < 1] = look.fat
    return _Scene(x, y, z, hu, np.zeros(len(x), np.uint8), cavity, np.maximum(dome_mm, 372))


def _bone(look: Appearance, hu: float | np.ndarray) -> np.ndarray:
    return 40 + look.bone * (np.asarray(hu, np.float32) - 40)


def _paint_long_bone(scene: _Scene, found: tuple[np.ndarray, np.ndarray], look: Appearance, structure=None) -> None:
    """Cortex outside, marrow within, for what `ball` and `tube` found."""
    where, r = found
    x, y, z = scene.at(where)
    scene.paint(where, _bone(look, np.where(r > 0.72, 620, 230 + 60 * _ripple(x, y, z, 17))), structure)


def _paint_chest(scene: _Scene, look: Appearance) -> None:
    # Ribs: rings round the cavity that fall towards the front; cartilage in front.
    near = scene.within((-150, -115, 335), (150, 115, 706))
    near = near[(scene.cavity[near] < 1.095) & (scene.cavity[near] > 0.99)]
    x, y, z = scene.at(near)
    spacing = np.interp(z, [340, 700], [30, 21]).astype(np.float32)
    level = (z + 0.36 * (y + 90)) / spacing
    bone = (level - np.floor(level) < 0.43) & (np.abs(x) > 16)
    bone &= z > 338 + 145 * (1 - np.abs(x) / 118).clip(0, 1) * (y > 5) + 25 * (y < -40)
    cartilage = (y > 52) & (np.abs(x) < 75)
    core = (np.abs(scene.cavity[near] - 1.042) < 0.025) & ~cartilage
    value = np.where(cartilage, 130, np.where(core, 330, 560))
    scene.paint(near[bone], _bone(look, value[bone]))

    # Lungs: what the cavity holds above the diaphragm and beside the mediastinum.
    near = scene.within((-140, -100, 370), (140, 100, 706))
    x, y, z = scene.at(near)
    middle = np.where(x > 0, np.float32(24), np.float32(27)) - 0.12 * np.abs(y) + 5 * np.sin(z / 21)
    lung = (scene.cavity[near] < 0.985) & (z > scene.dome_mm[near]) & (np.abs(x) > middle)
    near = near[lung]
    x, y, z = scene.at(near)
    for side, name, hilum in ((1, "lung_right", (40, -18, 560)), (-1, "lung_left", (-42, -18, 566))):
        mine = x * side > 0
        here = near[mine]
        dx, dy, dz = x[mine] - hilum[0], y[mine] - hilum[1], z[mine] - hilum[2]
        far = np.sqrt(dx * dx + dy * dy + dz * dz) + np.float32(1)
        nx, ny, nz = dx / far, dy / far, dz / far
        split = np.where(far > 62, np.float32(2), np.float32(1))
        branch = np.sin(split * (11 * nx + 4 * ny) + 1) + np.sin(split * (12 * ny - 4 * nz))
        branch += np.sin(split * (12 * nz + 5 * nx) + 2)
        value = look.lung - 0.35 * dy + 25 * _ripple(dx, dy, dz, 26)
        value = np.where(branch > 1.75 + 0.006 * far, -120 - 2.2 * far, value)
        fissure = np.abs(dz + 0.9 * dy + 12) < 1.8
        value[fissure] = -640
        scene.paint(here, value, name)

    # Great vessels that have no name, then the heart, then the aorta.
    for path, radius in (
        ([(24, 14, 520), (27, 18, 640)], 10),
        ([(27, 18, 640), (10, 30, 652), (-45, 30, 668)], 7),
        ([(20, -6, 250), (24, -4, 380), (26, 10, 470)], 12),
        ([(24, -4, 238), (50, 0, 160), (70, 40, 60)], 8),
        ([(-6, -8, 238), (-48, 0, 160), (-70, 40, 60)], 8),
    ):
        scene.paint(scene.tube(path, radius)[0], look.vein)
    for path, radius in (
        ([(-14, 42, 545), (-22, 18, 575), (-50, -12, 570), (-72, -20, 560)], [14, 13, 10, 6]),
        ([(-22, 18, 575), (10, 2, 568), (45, -14, 560), (70, -20, 550)], [13, 11, 10, 6]),
    ):
        scene.paint(scene.tube(path, radius)[0], look.vein)
    where, r = scene.ball((-24, 30, 503), (62, 50, 54))
    keep = (scene.cavity[where] < 0.97) & (scene.z[where] > scene.dome_mm[where] + 1)
    where, r = where[keep], r[keep]
    x, y, z = scene.at(where)
    septum = np.abs((x + 26) * 0.75 + (y - 28) * -0.65) < 5.5
    floor = np.abs((x + 24) * 0.5 + (y - 30) * 0.5 - (z - 513) * 0.75) < 3
    wall = (r > 0.82) | septum | floor
    value = np.where(wall, look.myocardium, np.where(x > -26, look.vein, look.artery))
    scene.paint(where, np.where(r > 0.95, look.fat + 30, value), "heart")
    where, _ = scene.tube(
        [
            (8, 24, 528),
            (14, 22, 575),
            (6, 10, 606),
            (-10, -14, 614),
            (-22, -34, 596),
            (-22, -38, 500),
            (-14, -24, 420),
            (-9, -9, 370),
            (-8, -7, 240),
        ],
        [15, 15, 14, 13.5, 13, 12.5, 12, 11.5, 10],
    )
    scene.paint(where, look.artery, "aorta")
    scene.paint(scene.tube([(-2, -40, 690), (0, -38, 560), (-18, -18, 440)], 7)[0], look.muscle - 15)

    where, r = scene.tube([(0, 18, 786), (0, 12, 745), (1, -8, 680), (3, -22, 596)], 11.5)
    scene.paint(where, np.where(r < 0.8, -990, 60), "trachea")
    for path in ([(3, -22, 596), (38, -18, 562)], [(3, -22, 596), (-40, -18, 566)]):
        where, r = scene.tube(path, [9.5, 7])
        scene.paint(where, np.where(r < 0.75, -980, 40))

    near = scene.within((-24, 20, 488), (24, 112, 652))
    x, y, z = scene.at(near)
    sheet = y - _CAVITY[1](z) - 3
    bone = (np.abs(sheet) < 8) & (np.abs(x) < np.interp(z, [488, 510, 615, 650], [8, 17, 16, 24]))
    near, sheet, z = near[bone], sheet[bone], z[bone]
    joint = np.abs((z - 488) / 27 % 1 - 0.5) < 0.06
    scene.paint(near, _bone(look, np.where((np.abs(sheet) > 5) & ~joint, 480, 190 - 90 * joint)), "sternum")


def _paint_belly(scene: _Scene, look: Appearance) -> None:
    # Loops of bowel in the cavity's fat.
    near = scene.within((-125, -42, 95), (125, 95, 400))
    near = near[(scene.cavity[near] < 0.96) & (scene.z[near] < scene.dome_mm[near] - 8)]
    near = near[(scene.label[near] == 0) & (scene.hu[near] < look.fat + 20)]  # vessels and organs keep their place
    x, y, z = scene.at(near)
    bend = 9 * np.sin(x / 23 + look.bowel_phase) + 9 * np.cos(z / 27)
    loop = _ripple(x + bend, y - bend, z + bend, 46, look.bowel_phase)
    wall = (loop > -0.16) & (loop < 0.02)
    lumen = loop >= 0.02
    gas = (
        lumen & (loop > 0.1) & (_ripple(x, y, z, 105, 2 * look.bowel_phase) + 0.006 * (y - 20) > 1 - 2 * look.bowel_gas)
    )
    scene.paint(near[wall], look.muscle + 10)
    scene.paint(near[lumen], look.bowel)
    scene.paint(near[gas], -880)
    for path in (
        [(92, -22, 190), (96, -20, 250), (88, 5, 308)],
        [(88, 5, 308), (45, 58, 300), (-35, 60, 318), (-88, 15, 350)],
        [(-94, -14, 350), (-100, -24, 260), (-88, -10, 200), (-50, 0, 160), (-5, -30, 140), (0, -42, 70)],
    ):
        where, r = scene.tube(path, 19)
        keep = (scene.cavity[where] < 0.985) & (scene.label[where] == 0)
        where, r = where[keep], r[keep]
        x, y, z = scene.at(where)
        stool = _ripple(x, y, z, 13)
        fill = np.where(
            stool + 0.5 * _ripple(x, y, z, 90, look.bowel_phase) > 1.1 - 1.6 * look.bowel_gas, -850, 25 + 45 * stool
        )
        scene.paint(where, np.where(r > 0.84, look.muscle, fill))

    for side, name in ((1, "psoas_right"), (-1, "psoas_left")):
        where, r = scene.tube(
            [(side * 31, -36, 365), (side * 40, -32, 280), (side * 58, 6, 180), (side * 82, 28, 75)], [12, 19, 22, 14]
        )
        scene.paint(where, look.muscle + 6 * (r < 0.5), name)

    # Kidneys: cortex, medulla in pyramids, fat at the hilum.
    for side, name, centre in ((1, "kidney_right", (63, -40, 320)), (-1, "kidney_left", (-61, -40, 352))):
        where, r = scene.ball(centre, (38, 35, 66))
        scene.paint(where, look.fat)
        where, r = scene.ball(centre, (29, 26, 56))
        x, y, z = scene.at(where)
        around = np.sin(5 * np.arctan2(z - centre[2], 2 * (y - centre[1]))) > -0.35
        value = np.where((r > 0.72) | ~around, look.cortex, look.medulla)
        hollow = (r < 0.42) | (
            ((x - centre[0]) * side < -8) & (np.abs(z - centre[2]) < 13) & (np.abs(y - centre[1]) < 9)
        )
        value = np.where(hollow, look.fat + 50, value)
        scene.paint(where, value, name)

    # Spleen, stomach, then the liver over both, each below the diaphragm.
    def under_dome(where: np.ndarray) -> np.ndarray:
        return (scene.z[where] < scene.dome_mm[where] - 4) & (scene.cavity[where] < 0.975)

    where, r = scene.ball((-94, -40, 386), (38, 48, 56))
    keep = under_dome(where) & (scene.label[where] == 0)
    x, y, z = scene.at(where[keep])
    scene.paint(where[keep], look.spleen + 8 * _ripple(x, y, z, 19), "spleen")
    for centre, radii in (((-62, 32, 405), (40, 40, 52)), ((-24, 52, 358), (50, 25, 25))):
        where, r = scene.ball(centre, radii)
        keep = under_dome(where) & ((scene.label[where] == 0) | (scene.label[where] == STRUCTURES["stomach"]))
        where, r = where[keep], r[keep]
        x, y, z = scene.at(where)
        fold = (r > 0.87) | ((r > 0.74) & (_ripple(x, y, z, 15) > 0.15))
        value = np.where(y > look.stomach_gas_mm, -920, look.stomach)
        scene.paint(where, np.where(fold, look.muscle + 15, value), "stomach")

    near = scene.within((-60, -92, 318), (138, 110, 488))
    x, y, z = scene.at(near)
    inside = under_dome(near) & (z > 322 + 0.78 * (112 - x).clip(-9, None) + 0.12 * (y + 40))
    inside &= (y > -76 + 1.0 * (48 - x).clip(0, None)) & (scene.label[near] != STRUCTURES["kidney_right"])
    inside &= np.hypot(x - 25, y - 2) > 15
    near = near[inside]
    x, y, z = scene.at(near)
    vessel = np.sin(np.arctan2(y + 10, x - 25) * 6 + z / 30) + np.sin((z - 0.4 * x) / 10.5) + np.sin((x + y) / 14)
    value = look.liver + 8 * _ripple(x, y, z, 31)
    scene.paint(near, np.where(vessel > 1.85, look.vein + 15, value), "liver")
    where, r = scene.ball((52, 38, 358), (17, 20, 29))
    scene.paint(where, np.where(r > 0.85, 45, 8))
    where, r = scene.tube([(30, 22, 330), (22, 22, 352), (-45, -8, 372)], [15, 12, 9])
    keep = scene.label[where] == 0
    x, y, z = scene.at(where[keep])
    scene.paint(where[keep], 0.6 * look.liver + 20 + 25 * _ripple(x, y, z, 11))


def _paint_pelvis(scene: _Scene, look: Appearance) -> None:
    where, r = scene.tube([(0, -44, 60), (0, -46, 125)], 17)
    x, y, z = scene.at(where)
    scene.paint(where, np.where(r > 0.8, look.muscle, -100 + 120 * _ripple(x, y, z, 16)))
    where, r = scene.ball((0, 34, 99), (43, 34, 34))
    scene.paint(where, np.where(r > 0.88, 45, look.bladder), "bladder")
    scene.paint(scene.ball((0, 16, 56), (24, 19, 18))[0], 50)

    near = scene.within((-58, -108, 95), (58, -20, 208))
    x, y, z = scene.at(near)
    centre = np.interp(z, [95, 125, 160, 208], [-74, -86, -80, -50]).astype(np.float32)
    half = np.interp(z, [95, 130, 208], [13, 28, 52]).astype(np.float32)
    s = np.hypot(x / half, (y - centre) / 19)
    hole = (np.hypot(np.abs(x) - 20, y - centre + 2) < 5) & (np.abs((z - 100) / 26 % 1 - 0.5) < 0.28)
    bone = (s < 1) & ~hole
    line = np.abs((z - 100) / 26 % 1 - 0.02) < 0.08
    value = np.where((s > 0.82) | line, 420, 150 + 40 * _ripple(x, y, z, 15))
    scene.paint(near[bone], _bone(look, value[bone]), "sacrum")

    for side, hip, head in ((1, "hip_right", "femoral_head_right"), (-1, "hip_left", "femoral_head_left")):
        low = (38, -100, 78) if side > 0 else (-152, -100, 78)
        high = (152, 90, 250) if side > 0 else (-38, 90, 250)
        near = scene.within(low, high)
        x, y, z = scene.at(near)
        s = scene.cavity[near]
        crest = z < 238 - 0.0035 * (y - 5) ** 2
        bone = (s > 0.985) & (s < 1.15) & crest & (y < 20 + 0.32 * (z - 90)) & (y > -84)
        marrow = np.abs(s - 1.068) < 0.045
        value = np.where(marrow, 170, 520)
        scene.paint(near[bone], _bone(look, value[bone]), hip)
        _paint_long_bone(scene, scene.ball((side * 84, -2, 78), (37, 37, 40)), look, hip)
        for path, radius in (
            ([(side * 66, 8, 72), (side * 40, 46, 66), (side * 9, 54, 50)], [13, 10, 12]),
            ([(side * 80, -22, 62), (side * 66, -42, 28), (side * 55, -28, 8)], [18, 17, 11]),
            ([(side * 55, -28, 8), (side * 12, 46, 40)], [9, 9]),
        ):
            _paint_long_bone(scene, scene.tube(path, radius), look, hip)
        joint, _ = scene.ball((side * 92, 0, 70), 28.5)
        scene.paint(joint, 70)
        _paint_long_bone(scene, scene.tube([(side * 92, 0, 70), (side * 135, -8, 40)], 15), look)
        shaft = [(side * 140, -10, 52), (side * 138, -8, 10), (side * 118, 0, -170)]
        _paint_long_bone(scene, scene.tube(shaft, [18, 17, 15]), look)
        where, r = scene.ball((side * 92, 0, 70), 26)
        x, y, z = scene.at(where)
        scene.paint(where, _bone(look, np.where(r > 0.88, 560, 300 + 50 * _ripple(x, y, z, 14))), head)


def _paint_spine(scene: _Scene, look: Appearance) -> None:
    near = scene.within((-48, -115, 203), (48, -2, 832))
    x, y, z = scene.at(near)
    middle, half, deep = (table(z) for table in _SPINE)
    level = np.interp(z, _EDGES_MM, np.arange(len(_EDGES_MM))).astype(np.float32)
    number = np.minimum(level.astype(int), len(_LEVELS) - 1)
    part = level - number
    canal_y = middle - deep - 8.5
    reach = np.interp(z, [203, 390, 420, 690, 720, 832], [40, 36, 34, 32, 24, 22]).astype(np.float32)
    canal = np.hypot(x, y - canal_y)

    # Arch, transverse and spinous processes, with gaps between the levels.
    arch = (canal < 15) & (part > 0.2) & (part < 0.88)
    transverse = (np.abs(y - canal_y + 3) < 7) & (np.abs(x) < reach) & (part > 0.38) & (part < 0.74)
    spinous = (np.abs(x) < 4.5) & (y < canal_y - 8) & (y > canal_y - 34 + 0.25 * half) & (part > 0.05) & (part < 0.68)
    spinous &= y > _BODY[2](z) + 12
    bone = arch | transverse | spinous
    scene.paint(near[bone], _bone(look, 430 + 120 * _ripple(x[bone], y[bone], z[bone], 11)))

    waist = 1 - 0.1 * np.sin(np.pi * part)
    s = np.hypot(x / half, (y - middle) / deep) / waist
    body = s < 1
    disc = (part < 0.1) | (part > 0.9)
    plate = (part < 0.2) | (part > 0.8)
    value = np.where((s > 0.84) | plate, 460, 190 + 45 * _ripple(x, y, z, 13))
    scene.paint(near[body], _bone(look, value[body]))
    for name in ("T6", "L1", "L4"):
        scene.label[near[body & ~disc & (number == _LEVELS.index(name))]] = STRUCTURES[f"vertebra_{name}"]
    scene.paint(near[body & disc], np.where(s[body & disc] > 0.75, 110, 70))

    near = scene.within((-12, -115, 203), (12, -15, 848))
    x, y, z = scene.at(near)
    canal_y = _SPINE[0](z) - _SPINE[2](z) - 8.5
    r = np.hypot(x, y - canal_y)
    cord = (r < 9) & (z > 352)
    scene.paint(near[(r < 9) & (z <= 352)], 12)
    scene.paint(near[cord], np.where(r[cord] < 6, 42, 8), "spinal_cord")


def _paint_shoulders(scene: _Scene, look: Appearance) -> None:
    near = scene.within((-150, -118, 530), (150, -10, 672))
    s = scene.cavity[near]
    x, y, z = scene.at(near)
    blade = (s > 1.15) & (s < 1.23) & (y < -25) & (np.abs(x) > 52 + 0.25 * (672 - z)) & (np.abs(x) < 145)
    scene.paint(near[blade], _bone(look, 420))
    for side, name in ((1, "humerus_right"), (-1, "humerus_left")):
        clavicle = [(side * 17, 60, 656), (side * 60, 46, 676), (side * 110, 4, 688), (side * 146, -12, 680)]
        _paint_long_bone(scene, scene.tube(clavicle, 7.5), look)
        _paint_long_bone(scene, scene.tube([(side * 128, -38, 650), (side * 98, -80, 664)], [13, 6]), look)
        _paint_long_bone(scene, scene.ball((side * 158, -16, 645), (24, 26, 28)), look, name)


def _paint_head(scene: _Scene, look: Appearance) -> None:
    # Throat and mouth.
    for path, radius in (
        ([(0, 16, 784), (0, 14, 812), (0, 16, 838)], [9, 8, 10]),
        ([(0, 16, 840), (0, 52, 842), (0, 84, 842)], [9, 8, 7]),
    ):
        scene.paint(scene.tube(path, radius)[0], -970)
    for side in (1, -1):
        scene.paint(scene.ball((side * 22, 18, 742), (12, 14, 26))[0], 105)
        scene.paint(scene.tube([(side * 34, 12, 700), (side * 33, 6, 800)], 7)[0], look.vein)
        scene.paint(scene.tube([(side * 22, 2, 690), (side * 26, 2, 800)], 5)[0], look.artery)

    # Upper jaw with its sinuses, and the teeth.
    where, r = scene.ball((0, 58, 835), (48, 36, 26))
    keep = scene.hu[where] > -500
    x, y, z = scene.at(where[keep])
    scene.paint(where[keep], np.where((r[keep] > 0.8) | (_ripple(x, y, z, 18) > 0.2), _bone(look, 420), 40))
    for side in (1, -1):
        scene.paint(scene.ball((side * 26, 56, 838), (14, 20, 16))[0], -950)
        scene.paint(scene.ball((side * 7, 40, 852), (6, 14, 8))[0], -900)
        arch = [(side * 46, 66, 848), (side * 64, 40, 848), (side * 62, 2, 846)]
        _paint_long_bone(scene, scene.tube(arch, 6), look)
        where, r = scene.ball((side * 54, -16, 838), (15, 20, 20))
        x, y, z = scene.at(where)
        scene.paint(where, np.where((r < 0.75) & (_ripple(x, y, z, 9) > 0), -500, _bone(look, 650)))
    near = scene.within((-36, 38, 798), (36, 98, 824))
    x, y, z = scene.at(near)
    s = np.hypot(x / 28, (y - 50) / 37)
    row = (s > 0.72) & (s < 1.06) & (y > 46) & (np.sin(np.arctan2(y - 50, x) * 22) > -0.6)
    scene.paint(near[row], _bone(look, 1350))

    near = scene.within((-62, -6, 776), (62, 100, 856))
    x, y, z = scene.at(near)
    s = np.hypot(x / 50, (y - 14) / 76)
    jaw = (s > 0.78) & (s < 1.03) & (y > 12) & (z > 781 + 0.1 * (90 - y)) & (z < 804)
    ramus = (np.abs(np.abs(x) - 50) < 6.5) & (y > 2 + 0.1 * (z - 800)) & (y < 34) & (z > 788) & (z < 850)
    bone = jaw | ramus
    scene.paint(near[bone], _bone(look, 620 + 150 * _ripple(x[bone], y[bone], z[bone], 14)), "mandible")

    # Skull round the brain, the brain, its ventricles.
    near = scene.within((-76, -94, 824), (76, 98, 972))
    x, y, z = scene.at(near)
    base = z - (842 + 0.22 * (y + 20).clip(-30, 80))
    outer = np.sqrt((x / 74) ** 2 + ((y - 2) / 91) ** 2 + ((z - 897) / 72) ** 2)
    inner = np.sqrt((x / 66.5) ** 2 + ((y - 2) / 83.5) ** 2 + ((z - 897) / 64) ** 2)
    skull = (outer < 1) & (base > -9) & ~((base < 0) & (np.hypot(x, y + 44) < 14))
    middle = np.abs(outer + inner - 2.05) < 0.035
    scene.paint(near[skull], _bone(look, np.where(middle & (base > 0), 600, 950))[skull])
    brain = (inner < 1) & (base > 0)
    near, x, y, z, inner = near[brain], x[brain], y[brain], z[brain], inner[brain]
    folds = _ripple(x, y, z, 17)
    value = np.where(inner + 0.1 * folds > 0.86, 42, 32) + 3 * folds
    value = np.where((inner > 0.9) & (folds < -0.32), 6, value)
    value = np.where((np.abs(x) < 1.6) & (z > 905), 10, value)
    small = (y < -20) & (z < 872)
    value = np.where(small, 40 + 8 * np.sin(z / 1.8), value)
    value = np.where(small & (np.abs(y + 20) < 3), 8, value)
    ventricle = (np.hypot((np.abs(x) - 14) / 10, (z - 908 + 0.004 * (y - 5) ** 2) / 14) < 1) & (np.abs(y - 4) < 42)
    value = np.where(ventricle, 6, value)
    scene.paint(near, value, "brain")
    for side, name in ((1, "eye_right"), (-1, "eye_left")):
        where, r = scene.tube([(side * 33, 82, 870), (side * 18, 46, 868)], [21, 11])
        scene.paint(where, np.where(r > 0.84, _bone(look, 500), look.fat))
        scene.paint(scene.tube([(side * 33, 78, 870), (side * 18, 48, 868)], 3.5)[0], 40)
        where, r = scene.ball((side * 33, 84, 870), 13.5)
        scene.paint(where, np.where(r > 0.85, 45, 12), name)


# --- the scanner ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Acquisition:
    """How one exam was taken and stored: the voxel grid in the exam's mm, the scanner's faults, the storage order."""

    shape: tuple[int, int, int]  # of the grid before storage order, axes near R, A, S
    affine: np.ndarray  # (4, 4) of that grid, voxel -> RAS+ mm
    storage_order: tuple[int, int, int]  # stored axis n is grid axis storage_order[n]
    storage_flips: tuple[bool, bool, bool]  # of the grid's axes
    blur_voxels: float
    noise_hu: float
    noise_blur_voxels: float
    gain_vectors: np.ndarray  # (2, 3) rad/mm, of the slow change of gain
    gain_phases: np.ndarray  # (2,)
    gain_amplitude: float  # a share of HU + 1000
    table_gap_mm: float
    noise_seed: int


def draw_acquisition(rng: np.random.Generator, deformation: Deformation, field_of_view: str) -> Acquisition:
    """Draw a grid that shows `field_of_view` of the patient, with jitter, anisotropic, sometimes oblique.

    Raises ValueError if `field_of_view` is not a key of `FIELDS_OF_VIEW`.
    """
    low_z, high_z = _canonical_range(field_of_view)
    whole = field_of_view == "whole"
    oblique = rng.random() < 0.35
    angles = rng.uniform(-1, 1, 3) * np.radians(3.0 if whole else 8.0)
    axes = _rotation(angles) if oblique else np.eye(3)

    # The field of view is what the scout image would show: the body's outline, seen from the grid's own axes.
    jitter_mm = rng.uniform(-22, 22, 2) if not whole else np.array([rng.uniform(-25, 25), rng.uniform(5, 30)])
    ends = np.array([[0.0, 0.0, low_z], [0.0, 0.0, high_z]])
    bottom, top = (deformation.from_canonical(ends) @ axes)[:, 2] + jitter_mm
    z = np.linspace(low_z, min(high_z, 970), 24)
    half, front, back = (table(z) for table in _BODY[:3])
    middle = (front + back) / 2
    outline = np.concatenate(
        [np.stack(side, -1) for side in ((half, middle, z), (-half, middle, z), (0 * z, front, z), (0 * z, back, z))]
    )
    seen = deformation.from_canonical(outline) @ axes
    low, high = seen.min(0) - np.array([12, 34, 0]), seen.max(0) + np.array([12, 14, 0])
    low[2], high[2] = bottom, top
    if not whole:  # a reconstruction circle narrower than the patient, off its centre
        widest = (high - low)[0] * rng.uniform(0.72, 1.0)
        if field_of_view == "head_neck":
            widest = min(widest, rng.uniform(230, 330))
        centre = (low + high)[0] / 2 + rng.uniform(-0.03, 0.03) * widest
        low[0], high[0] = centre - widest / 2, centre + widest / 2
        low[1] += rng.uniform(-10, 12)
        high[1] += rng.uniform(-14, 14)

    in_plane = rng.uniform(2.9, 4.0)
    spacing_mm = np.array([in_plane, in_plane, rng.uniform(3.0, 6.0)])
    spacing_mm = np.maximum(spacing_mm, (high - low) / (_LARGEST_AXIS - 1))
    spacing_mm[:2] = spacing_mm[:2].max()
    shape = tuple(int(n) for n in np.floor((high - low) / spacing_mm) + 1)
    affine = np.eye(4)
    affine[:3, :3] = axes * spacing_mm
    affine[:3, 3] = axes @ low

    usual = [(False, False, False), (True, True, False), (True, False, False), (True, True, True)]
    if rng.random() < 0.7:
        order, flips = (0, 1, 2), usual[rng.integers(len(usual))]
    else:
        order = tuple(int(axis) for axis in rng.permutation(3))
        flips = tuple(bool(flip) for flip in rng.integers(0, 2, 3))
    directions = rng.standard_normal((2, 3))
    directions *= 2 * np.pi / rng.uniform(300, 700, (2, 1)) / np.linalg.norm(directions, axis=1, keepdims=True)
    return Acquisition(
        shape=shape,
        affine=affine,
        storage_order=order,
        storage_flips=flips,
        blur_voxels=rng.uniform(0.35, 0.6),
        noise_hu=rng.uniform(5, 25),
        noise_blur_voxels=rng.uniform(0.4, 0.8),
        gain_vectors=directions,
        gain_phases=rng.uniform(0, 2 * np.pi, 2),
        gain_amplitude=rng.uniform(0, 0.006),
        table_gap_mm=rng.uniform(9, 14),
        noise_seed=int(rng.integers(2**31)),
    )


def _canonical_range(field_of_view: str) -> tuple[float, float]:
    if field_of_view not in FIELDS_OF_VIEW:
        raise ValueError(f"field_of_view: expected one of {', '.join(FIELDS_OF_VIEW)}; got {field_of_view!r}")
    return FIELDS_OF_VIEW[field_of_view]


def acquire(deformation: Deformation, appearance: Appearance, acquisition: Acquisition) -> tuple[Volume, Volume]:
    """Scan: the image (int16 HU) and its labels (uint8), as stored. Nothing is left to chance here."""
    grid = np.moveaxis(np.indices(acquisition.shape, dtype=np.float64), 0, -1)
    points_mm = grid @ acquisition.affine[:3, :3].T + acquisition.affine[:3, 3]
    hu, label = anatomy(deformation.to_canonical(points_mm), appearance)

    # The table is the scanner's, not the patient's: level in exam mm, a gap below the lowest skin.
    body = hu > -999
    if body.any():
        y_mm, x_mm = points_mm[..., 1], points_mm[..., 0]
        top_mm = y_mm[body].min() - acquisition.table_gap_mm
        below_mm = top_mm - y_mm
        centre_mm = x_mm[body].mean()
        slab = (below_mm > 0) & (below_mm < 18) & (np.abs(x_mm - centre_mm) < 190)
        hu[slab] = np.where((below_mm[slab] < 5) | (below_mm[slab] > 13), -60, -880)

    hu = gaussian_filter(hu, acquisition.blur_voxels)
    gain = np.zeros(acquisition.shape, np.float32)
    points32 = points_mm.astype(np.float32)
    for vector, phase in zip(acquisition.gain_vectors, acquisition.gain_phases, strict=True):
        gain += np.sin(points32 @ vector.astype(np.float32) + np.float32(phase))
    hu += np.float32(acquisition.gain_amplitude) * gain * (hu + 1000)
    noise = np.random.default_rng(acquisition.noise_seed).standard_normal(acquisition.shape, dtype=np.float32)
    noise = gaussian_filter(noise, acquisition.noise_blur_voxels)
    hu += noise * (acquisition.noise_hu / noise.std())
    image = np.rint(hu).clip(-1024, 3071).astype(np.int16)

    turn = np.zeros((4, 4))
    turn[3, 3] = 1
    for stored, axis in enumerate(acquisition.storage_order):
        flip = acquisition.storage_flips[axis]
        turn[axis, stored] = -1 if flip else 1
        turn[axis, 3] = acquisition.shape[axis] - 1 if flip else 0
    flipped = [axis for axis in range(3) if acquisition.storage_flips[axis]]
    affine = acquisition.affine @ turn

    def store(array: np.ndarray) -> Volume:
        turned = np.flip(array, flipped).transpose(acquisition.storage_order)
        return Volume(array=np.ascontiguousarray(turned), affine=affine.copy())

    return store(image), store(label)


# --- exams and cohorts ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PhantomExam:
    """One exam with the truth about it."""

    name: str
    image: Volume  # int16, HU
    labels: Volume  # uint8, numbered by STRUCTURES
    deformation: Deformation  # this exam's mm <-> canonical mm
    appearance: Appearance
    field_of_view: str


def draw(seed: int | Sequence[int], field_of_view: str | None = None, name: str | None = None) -> PhantomExam:
    """One exam, the same to the bit for the same arguments.

    `field_of_view` is a key of `FIELDS_OF_VIEW`; None draws one, whole a third of the time. Raises ValueError for
    another word.

    >>> exam = draw(0, "chest")
    >>> bool((exam.labels.array == STRUCTURES["heart"]).any())
    True
    """
    rng = np.random.default_rng(seed)
    drawn = _draw_field_of_view(rng, tuple(FIELDS_OF_VIEW))
    field_of_view = drawn if field_of_view is None else field_of_view
    _canonical_range(field_of_view)
    # A long body would leave the scanner's bore if it lay as askew as a head can.
    deformation = draw_deformation(rng, tilt_degrees=4.0 if field_of_view in ("whole", "trunk") else 11.0)
    appearance = draw_appearance(rng)
    acquisition = draw_acquisition(rng, deformation, field_of_view)
    image, labels = acquire(deformation, appearance, acquisition)
    return PhantomExam(
        name=f"phantom_{seed}" if name is None else name,
        image=image,
        labels=labels,
        deformation=deformation,
        appearance=appearance,
        field_of_view=field_of_view,
    )


def _draw_field_of_view(rng: np.random.Generator, mix: Sequence[str]) -> str:
    partial = [word for word in mix if word != "whole"]
    whole, which = rng.random() < 1 / 3, rng.integers(max(len(partial), 1))
    if not partial or (whole and "whole" in mix):
        return "whole"
    return partial[which]


def cohort_exam(index: int, seed: int, fields_of_view: Sequence[str] = tuple(FIELDS_OF_VIEW)) -> PhantomExam:
    """Exam `index` of the cohort `seed`, as `write_cohort` writes it; exam 0 is a whole one.

    `fields_of_view` is the mix to draw the others from; where it has "whole", a third are.
    """
    field_of_view = "whole"
    if index > 0:
        field_of_view = _draw_field_of_view(np.random.default_rng([seed, index, 1]), fields_of_view)
    return draw([seed, index], field_of_view, name=f"phantom_{index:03d}")


def write_cohort(
    folder: str | Path, count: int, seed: int, fields_of_view: Sequence[str] = tuple(FIELDS_OF_VIEW)
) -> list[Path]:
    """Write `count` exams and return the paths of their images.

    `images/phantom_000.nii.gz` (int16 HU), `labels/phantom_000.nii.gz` (uint8) and `labels.json` (name to number).
    `cohort_exam(index, seed, fields_of_view)` gives any of them back with its true coordinates.
    """
    folder = Path(folder)
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "labels.json").write_text(json.dumps(STRUCTURES, indent=2) + "\n")
    paths = []
    for index in range(count):
        exam = cohort_exam(index, seed, fields_of_view)
        for part, volume in (("images", exam.image), ("labels", exam.labels)):
            nifti = nib.Nifti1Image(volume.array, volume.affine)
            nifti.header.set_xyzt_units("mm")
            nib.save(nifti, folder / part / f"{exam.name}.nii.gz")
        paths.append(folder / "images" / f"{exam.name}.nii.gz")
    return paths
