"""The canonical body's outline, cavity and spine as curves over z, and the points that organs are painted on."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.interpolate import PchipInterpolator

from deepatlas.phantom.looks import STRUCTURES, Appearance


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
BODY = _tables(
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
CAVITY = _tables(
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
SPINE = _tables(
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
LEVELS = [f"L{n}" for n in range(5, 0, -1)] + [f"T{n}" for n in range(12, 0, -1)] + [f"C{n}" for n in range(7, 0, -1)]
_HEIGHTS_MM = np.concatenate([np.linspace(38, 35, 5), np.linspace(31, 21, 12), np.full(7, 18.2)])
EDGES_MM = 203.0 + np.concatenate([[0.0], np.cumsum(_HEIGHTS_MM * (832 - 203) / _HEIGHTS_MM.sum())])


class Scene(NamedTuple):
    """The points inside the body, sorted by z, with their HU and label as painted so far (later wins)."""

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    hu: np.ndarray
    label: np.ndarray
    cavity: np.ndarray  # superellipse radius in CAVITY: 1 on its wall, 9 above and below it
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


def ripple(x: np.ndarray, y: np.ndarray, z: np.ndarray, wavelength_mm: float, phase: float = 0.0) -> np.ndarray:
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


def depth_below_skin(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Roughly the mm below the skin, negative outside the body."""
    half, front, back = (table(z) for table in BODY[:3])
    trunk = (1 - _outline(BODY, x, y, z, 2.3)) * np.minimum(half, (front - back) / 2)
    trunk[z < 8] = -1
    low = z < 60
    thigh = (1 - np.hypot((np.abs(x[low]) - 92) / 86, (y[low] + 12) / 95)) * 86
    trunk[low] = np.maximum(trunk[low], thigh)
    nose = (z > 835) & (z < 872) & (y > 85) & (np.abs(x) < 16)
    bridge = 14 - np.hypot(x[nose], 0.8 * (y[nose] - 98 + 0.45 * (z[nose] - 852)))
    trunk[nose] = np.maximum(trunk[nose], bridge)
    return trunk


def undressed(x: np.ndarray, y: np.ndarray, z: np.ndarray, depth_mm: np.ndarray, look: Appearance) -> Scene:
    """Skin, fat, muscle with fat between, and the cavity's own fat."""
    texture = ripple(x, y, z, 38)
    skin_mm = np.float32(3)
    fat_mm = skin_mm + BODY[3](z) * (1 + 0.35 * np.sin(z / 47) * (y > 0) + 0.3 * texture)
    hu = np.full(len(x), look.muscle, np.float32) + 9 * texture
    hu[np.abs(ripple(x, y, z, 62, 1.0)) < 0.045] = look.fat + 40
    hu[depth_mm < fat_mm] = look.fat
    hu[depth_mm < skin_mm] = 20

    cavity = np.full(len(x), 9, np.float32)
    start, stop = np.searchsorted(z, [56, 707])
    inner = slice(start, stop)
    cavity[inner] = _outline(CAVITY, x[inner], y[inner], z[inner], 2.2)
    right = x > 0
    dome_mm = np.where(right, np.float32(486), np.float32(470))
    dome_mm -= 45 * ((np.abs(x) - np.where(right, np.float32(62), np.float32(70))) / 72) ** 2
    dome_mm -= 55 * ((y - 18) / 80) ** 2
    hu[cavity < 1] = look.fat
    return Scene(x, y, z, hu, np.zeros(len(x), np.uint8), cavity, np.maximum(dome_mm, 372))


def bone_hu(look: Appearance, hu: float | np.ndarray) -> np.ndarray:
    return 40 + look.bone * (np.asarray(hu, np.float32) - 40)


def paint_long_bone(scene: Scene, found: tuple[np.ndarray, np.ndarray], look: Appearance, structure=None) -> None:
    """Cortex outside, marrow within, for what `ball` and `tube` found."""
    where, r = found
    x, y, z = scene.at(where)
    scene.paint(where, bone_hu(look, np.where(r > 0.72, 620, 230 + 60 * ripple(x, y, z, 17))), structure)
