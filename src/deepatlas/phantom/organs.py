"""The canonical body: HU and label of any point, organ by organ; later paint wins."""

import numpy as np

from deepatlas.phantom.body import (
    BODY,
    CAVITY,
    EDGES_MM,
    LEVELS,
    SPINE,
    Scene,
    bone_hu,
    depth_below_skin,
    paint_long_bone,
    ripple,
    undressed,
)
from deepatlas.phantom.looks import AIR_HU, STRUCTURES, Appearance


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
    depth_mm = depth_below_skin(x[inside], y[inside], z[inside])
    inside, depth_mm = inside[depth_mm > 0], depth_mm[depth_mm > 0]
    if len(inside):
        scene = undressed(x[inside], y[inside], z[inside], depth_mm, appearance)
        _paint_chest(scene, appearance)
        _paint_belly(scene, appearance)
        _paint_pelvis(scene, appearance)
        _paint_spine(scene, appearance)
        _paint_shoulders(scene, appearance)
        _paint_head(scene, appearance)
        hu[inside] = scene.hu
        label[inside] = scene.label
    return hu.reshape(points.shape[:-1]), label.reshape(points.shape[:-1])


def _paint_chest(scene: Scene, look: Appearance) -> None:
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
    scene.paint(near[bone], bone_hu(look, value[bone]))

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
        value = look.lung - 0.35 * dy + 25 * ripple(dx, dy, dz, 26)
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
    sheet = y - CAVITY[1](z) - 3
    bone = (np.abs(sheet) < 8) & (np.abs(x) < np.interp(z, [488, 510, 615, 650], [8, 17, 16, 24]))
    near, sheet, z = near[bone], sheet[bone], z[bone]
    joint = np.abs((z - 488) / 27 % 1 - 0.5) < 0.06
    scene.paint(near, bone_hu(look, np.where((np.abs(sheet) > 5) & ~joint, 480, 190 - 90 * joint)), "sternum")


def _paint_belly(scene: Scene, look: Appearance) -> None:
    # Loops of bowel in the cavity's fat.
    near = scene.within((-125, -42, 95), (125, 95, 400))
    near = near[(scene.cavity[near] < 0.96) & (scene.z[near] < scene.dome_mm[near] - 8)]
    near = near[(scene.label[near] == 0) & (scene.hu[near] < look.fat + 20)]  # vessels and organs keep their place
    x, y, z = scene.at(near)
    bend = 9 * np.sin(x / 23 + look.bowel_phase) + 9 * np.cos(z / 27)
    loop = ripple(x + bend, y - bend, z + bend, 46, look.bowel_phase)
    wall = (loop > -0.16) & (loop < 0.02)
    lumen = loop >= 0.02
    gas = (
        lumen & (loop > 0.1) & (ripple(x, y, z, 105, 2 * look.bowel_phase) + 0.006 * (y - 20) > 1 - 2 * look.bowel_gas)
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
        stool = ripple(x, y, z, 13)
        fill = np.where(
            stool + 0.5 * ripple(x, y, z, 90, look.bowel_phase) > 1.1 - 1.6 * look.bowel_gas, -850, 25 + 45 * stool
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
    scene.paint(where[keep], look.spleen + 8 * ripple(x, y, z, 19), "spleen")
    for centre, radii in (((-62, 32, 405), (40, 40, 52)), ((-24, 52, 358), (50, 25, 25))):
        where, r = scene.ball(centre, radii)
        keep = under_dome(where) & ((scene.label[where] == 0) | (scene.label[where] == STRUCTURES["stomach"]))
        where, r = where[keep], r[keep]
        x, y, z = scene.at(where)
        fold = (r > 0.87) | ((r > 0.74) & (ripple(x, y, z, 15) > 0.15))
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
    value = look.liver + 8 * ripple(x, y, z, 31)
    scene.paint(near, np.where(vessel > 1.85, look.vein + 15, value), "liver")
    where, r = scene.ball((52, 38, 358), (17, 20, 29))
    scene.paint(where, np.where(r > 0.85, 45, 8))
    where, r = scene.tube([(30, 22, 330), (22, 22, 352), (-45, -8, 372)], [15, 12, 9])
    keep = scene.label[where] == 0
    x, y, z = scene.at(where[keep])
    scene.paint(where[keep], 0.6 * look.liver + 20 + 25 * ripple(x, y, z, 11))


def _paint_pelvis(scene: Scene, look: Appearance) -> None:
    where, r = scene.tube([(0, -44, 60), (0, -46, 125)], 17)
    x, y, z = scene.at(where)
    scene.paint(where, np.where(r > 0.8, look.muscle, -100 + 120 * ripple(x, y, z, 16)))
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
    value = np.where((s > 0.82) | line, 420, 150 + 40 * ripple(x, y, z, 15))
    scene.paint(near[bone], bone_hu(look, value[bone]), "sacrum")

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
        scene.paint(near[bone], bone_hu(look, value[bone]), hip)
        paint_long_bone(scene, scene.ball((side * 84, -2, 78), (37, 37, 40)), look, hip)
        for path, radius in (
            ([(side * 66, 8, 72), (side * 40, 46, 66), (side * 9, 54, 50)], [13, 10, 12]),
            ([(side * 80, -22, 62), (side * 66, -42, 28), (side * 55, -28, 8)], [18, 17, 11]),
            ([(side * 55, -28, 8), (side * 12, 46, 40)], [9, 9]),
        ):
            paint_long_bone(scene, scene.tube(path, radius), look, hip)
        joint, _ = scene.ball((side * 92, 0, 70), 28.5)
        scene.paint(joint, 70)
        paint_long_bone(scene, scene.tube([(side * 92, 0, 70), (side * 135, -8, 40)], 15), look)
        shaft = [(side * 140, -10, 52), (side * 138, -8, 10), (side * 118, 0, -170)]
        paint_long_bone(scene, scene.tube(shaft, [18, 17, 15]), look)
        where, r = scene.ball((side * 92, 0, 70), 26)
        x, y, z = scene.at(where)
        scene.paint(where, bone_hu(look, np.where(r > 0.88, 560, 300 + 50 * ripple(x, y, z, 14))), head)


def _paint_spine(scene: Scene, look: Appearance) -> None:
    near = scene.within((-48, -115, 203), (48, -2, 832))
    x, y, z = scene.at(near)
    middle, half, deep = (table(z) for table in SPINE)
    level = np.interp(z, EDGES_MM, np.arange(len(EDGES_MM))).astype(np.float32)
    number = np.minimum(level.astype(int), len(LEVELS) - 1)
    part = level - number
    canal_y = middle - deep - 8.5
    reach = np.interp(z, [203, 390, 420, 690, 720, 832], [40, 36, 34, 32, 24, 22]).astype(np.float32)
    canal = np.hypot(x, y - canal_y)

    # Arch, transverse and spinous processes, with gaps between the levels.
    arch = (canal < 15) & (part > 0.2) & (part < 0.88)
    transverse = (np.abs(y - canal_y + 3) < 7) & (np.abs(x) < reach) & (part > 0.38) & (part < 0.74)
    spinous = (np.abs(x) < 4.5) & (y < canal_y - 8) & (y > canal_y - 34 + 0.25 * half) & (part > 0.05) & (part < 0.68)
    spinous &= y > BODY[2](z) + 12
    bone = arch | transverse | spinous
    scene.paint(near[bone], bone_hu(look, 430 + 120 * ripple(x[bone], y[bone], z[bone], 11)))

    waist = 1 - 0.1 * np.sin(np.pi * part)
    s = np.hypot(x / half, (y - middle) / deep) / waist
    body = s < 1
    disc = (part < 0.1) | (part > 0.9)
    plate = (part < 0.2) | (part > 0.8)
    value = np.where((s > 0.84) | plate, 460, 190 + 45 * ripple(x, y, z, 13))
    scene.paint(near[body], bone_hu(look, value[body]))
    for name in ("T6", "L1", "L4"):
        scene.label[near[body & ~disc & (number == LEVELS.index(name))]] = STRUCTURES[f"vertebra_{name}"]
    scene.paint(near[body & disc], np.where(s[body & disc] > 0.75, 110, 70))

    near = scene.within((-12, -115, 203), (12, -15, 848))
    x, y, z = scene.at(near)
    canal_y = SPINE[0](z) - SPINE[2](z) - 8.5
    r = np.hypot(x, y - canal_y)
    cord = (r < 9) & (z > 352)
    scene.paint(near[(r < 9) & (z <= 352)], 12)
    scene.paint(near[cord], np.where(r[cord] < 6, 42, 8), "spinal_cord")


def _paint_shoulders(scene: Scene, look: Appearance) -> None:
    near = scene.within((-150, -118, 530), (150, -10, 672))
    s = scene.cavity[near]
    x, y, z = scene.at(near)
    blade = (s > 1.15) & (s < 1.23) & (y < -25) & (np.abs(x) > 52 + 0.25 * (672 - z)) & (np.abs(x) < 145)
    scene.paint(near[blade], bone_hu(look, 420))
    for side, name in ((1, "humerus_right"), (-1, "humerus_left")):
        clavicle = [(side * 17, 60, 656), (side * 60, 46, 676), (side * 110, 4, 688), (side * 146, -12, 680)]
        paint_long_bone(scene, scene.tube(clavicle, 7.5), look)
        paint_long_bone(scene, scene.tube([(side * 128, -38, 650), (side * 98, -80, 664)], [13, 6]), look)
        paint_long_bone(scene, scene.ball((side * 158, -16, 645), (24, 26, 28)), look, name)


def _paint_head(scene: Scene, look: Appearance) -> None:
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
    scene.paint(where[keep], np.where((r[keep] > 0.8) | (ripple(x, y, z, 18) > 0.2), bone_hu(look, 420), 40))
    for side in (1, -1):
        scene.paint(scene.ball((side * 26, 56, 838), (14, 20, 16))[0], -950)
        scene.paint(scene.ball((side * 7, 40, 852), (6, 14, 8))[0], -900)
        arch = [(side * 46, 66, 848), (side * 64, 40, 848), (side * 62, 2, 846)]
        paint_long_bone(scene, scene.tube(arch, 6), look)
        where, r = scene.ball((side * 54, -16, 838), (15, 20, 20))
        x, y, z = scene.at(where)
        scene.paint(where, np.where((r < 0.75) & (ripple(x, y, z, 9) > 0), -500, bone_hu(look, 650)))
    near = scene.within((-36, 38, 798), (36, 98, 824))
    x, y, z = scene.at(near)
    s = np.hypot(x / 28, (y - 50) / 37)
    row = (s > 0.72) & (s < 1.06) & (y > 46) & (np.sin(np.arctan2(y - 50, x) * 22) > -0.6)
    scene.paint(near[row], bone_hu(look, 1350))

    near = scene.within((-62, -6, 776), (62, 100, 856))
    x, y, z = scene.at(near)
    s = np.hypot(x / 50, (y - 14) / 76)
    jaw = (s > 0.78) & (s < 1.03) & (y > 12) & (z > 781 + 0.1 * (90 - y)) & (z < 804)
    ramus = (np.abs(np.abs(x) - 50) < 6.5) & (y > 2 + 0.1 * (z - 800)) & (y < 34) & (z > 788) & (z < 850)
    bone = jaw | ramus
    scene.paint(near[bone], bone_hu(look, 620 + 150 * ripple(x[bone], y[bone], z[bone], 14)), "mandible")

    # Skull round the brain, the brain, its ventricles.
    near = scene.within((-76, -94, 824), (76, 98, 972))
    x, y, z = scene.at(near)
    base = z - (842 + 0.22 * (y + 20).clip(-30, 80))
    outer = np.sqrt((x / 74) ** 2 + ((y - 2) / 91) ** 2 + ((z - 897) / 72) ** 2)
    inner = np.sqrt((x / 66.5) ** 2 + ((y - 2) / 83.5) ** 2 + ((z - 897) / 64) ** 2)
    skull = (outer < 1) & (base > -9) & ~((base < 0) & (np.hypot(x, y + 44) < 14))
    middle = np.abs(outer + inner - 2.05) < 0.035
    scene.paint(near[skull], bone_hu(look, np.where(middle & (base > 0), 600, 950))[skull])
    brain = (inner < 1) & (base > 0)
    near, x, y, z, inner = near[brain], x[brain], y[brain], z[brain], inner[brain]
    folds = ripple(x, y, z, 17)
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
        scene.paint(where, np.where(r > 0.84, bone_hu(look, 500), look.fat))
        scene.paint(scene.tube([(side * 33, 78, 870), (side * 18, 48, 868)], 3.5)[0], 40)
        where, r = scene.ball((side * 33, 84, 870), 13.5)
        scene.paint(where, np.where(r > 0.85, 45, 12), name)
