"""How one exam's anatomy differs in shape and pose from the canonical body, smooth and invertible."""

from dataclasses import dataclass

import numpy as np

_SMALLEST_DETERMINANT = 0.3  # of the drawn change of shape, where it is checked; the map between checks stays above 0.2


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
    rotation = rotation_of(rng.uniform(-bounds, bounds))
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


def rotation_of(angles: np.ndarray) -> np.ndarray:
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles), np.sin(angles)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x
