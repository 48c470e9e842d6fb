"""What one exam's tissues look like."""

from dataclasses import dataclass

import numpy as np

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
