"""Preparation: the same cube from any storage order, and everything found at its place in mm."""

import os
import tracemalloc
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from deepatlas import masks
from deepatlas.errors import ExamError
from deepatlas.prepare import foreground, grid_to_box, prepare, sample_mm, window
from deepatlas.volume import Volume, apply, reorder, to_ras

ORDERS = [(perm, flips) for perm in permutations(range(3)) for flips in product((False, True), repeat=3)]


def affine_of(linear: np.ndarray, origin: tuple[float, float, float] = (-60.0, 20.0, 310.0)) -> np.ndarray:
    """A 4×4 affine from its linear part."""
    matrix = np.eye(4)
    matrix[:3, :3] = linear
    matrix[:3, 3] = origin
    return matrix


def oblique() -> np.ndarray:
    """Two turns, 20° about z and then 15° about x."""
    a, b = np.deg2rad([20.0, 15.0])
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    return about_x @ about_z


SPACING = np.diag([3.0, 2.2, 4.1])
AFFINES = {
    "anisotropic": affine_of(SPACING),
    "left-handed": affine_of(np.diag([-1.0, 1.0, 1.0]) @ SPACING),
    "oblique": affine_of(oblique() @ SPACING),
    "oblique, left-handed, permuted": affine_of(oblique() @ np.diag([1.0, -1.0, 1.0]) @ SPACING[:, [2, 0, 1]]),
    "sheared": affine_of(np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.25], [0.0, 0.0, 1.0]]) @ SPACING),
}


def blob(affine: np.ndarray, centre_mm: np.ndarray, shape=(50, 63, 40), sigma_mm=16.0) -> Volume:
    """Air with one round blob of 2000 HU above it, computed voxel by voxel from its place in mm."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    distance = np.linalg.norm(apply(affine, index) - centre_mm, axis=-1)
    return Volume((-1000.0 + 2000.0 * np.exp(-0.5 * (distance / sigma_mm) ** 2)).astype(np.float32), affine)


def centroid(weights: np.ndarray) -> np.ndarray:
    """Mean index under the weights, (3,)."""
    index = np.stack(np.meshgrid(*map(np.arange, weights.shape), indexing="ij"), axis=-1)
    return (index * weights[..., None]).sum(axis=(0, 1, 2)) / weights.sum()


def body(shape=(37, 45, 30), affine=AFFINES["anisotropic"], seed=0) -> Volume:
    """A lopsided patient with a lung and some texture in int16, not symmetric under any turn or mirror."""
    i, j, k = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    array = np.full(shape, -1024.0)
    inside = (i / 0.7) ** 2 + (j / 0.5) ** 2 + ((k - 0.2) / 0.8) ** 2 < 1
    inside |= (np.abs(i - 0.5) < 0.2) & (np.abs(j - 0.2) < 0.3) & (np.abs(k + 0.3) < 0.5)
    array[inside] = np.random.default_rng(seed).normal(40, 80, inside.sum())
    array[((i + 0.2) ** 2 + j**2 + (k - 0.3) ** 2) < 0.04] = -1000
    return Volume(np.rint(array).astype(np.int16), affine)


@pytest.mark.parametrize("shape", [(37, 45, 30), (16, 90, 33), (2, 64, 200)])
@pytest.mark.parametrize("size", [16, 32])
def test_same_as_interpolation_and_pooling(shape, size):
    """The weights per axis give what torch's interpolation and pooling give, one after the other."""
    array = np.random.default_rng(1).uniform(-1000, 1500, shape).astype(np.float32)
    prepared = prepare(Volume(array, np.diag([1.0, 1.0, 1.0, 1.0])), size, "exam")
    exact = torch.from_numpy(array.astype(np.float64))[None, None]
    fine = F.interpolate(exact, (2 * size,) * 3, mode="trilinear", align_corners=True)
    np.testing.assert_allclose(prepared.hu, F.avg_pool3d(fine, 2)[0, 0].numpy(), rtol=0, atol=2e-3)


@pytest.mark.parametrize("kind", AFFINES)
@pytest.mark.parametrize("region", ["exam", "body"])
def test_a_blob_is_found_at_its_mm(kind, region):
    affine = AFFINES[kind]
    centre_mm = apply(affine, np.array([27.3, 26.1, 21.8]))
    prepared = prepare(blob(affine, centre_mm), 32, region)
    found = centroid(np.maximum(prepared.hu + 200.0, 0.0))  # a round level set, whatever the cut does to the tails
    expected = apply(np.linalg.inv(prepared.box_to_mm @ grid_to_box(32)), centre_mm)
    assert np.abs(found - expected).max() < 0.1
    peak = apply(prepared.box_to_mm @ grid_to_box(32), found)
    assert np.abs(peak - centre_mm).max() < 0.1 * prepared.volume.spacing_mm.max() * np.sqrt(3)


def test_box_corners_are_the_centres_of_the_pooled_corner_voxels():
    """Index ½ and 2n−1½ of the fine grid: for 128 voxels and n = 64, voxels ½ and 126½ of the exam."""
    array = np.broadcast_to(np.arange(128.0)[:, None, None], (128, 128, 128)).astype(np.float32)
    prepared = prepare(Volume(array, np.diag([2.0, 2.0, 2.0, 1.0])), 64, "exam")
    np.testing.assert_allclose(apply(prepared.box_to_mm, [[-1, -1, -1], [1, 1, 1]]), [[1.0] * 3, [253.0] * 3])
    np.testing.assert_allclose(prepared.hu[:, 5, 7], 2 * np.arange(64) + 0.5, atol=1e-4)


@pytest.mark.parametrize("region", ["exam", "body"])
@pytest.mark.parametrize("kind", ["anisotropic", "oblique, left-handed, permuted", "sheared"])
def test_all_48_storage_orders_prepare_to_the_same_array(region, kind):
    volume = body(affine=AFFINES[kind])
    expected = prepare(volume, 16, region)
    for order in ORDERS:
        prepared = prepare(reorder(volume, *order), 16, region)
        np.testing.assert_array_equal(prepared.hu, expected.hu)
        np.testing.assert_array_equal(prepared.foreground, expected.foreground)
        np.testing.assert_allclose(prepared.box_to_mm, expected.box_to_mm, rtol=0, atol=1e-9)


@pytest.mark.parametrize("region", ["body", "200mm"])
def test_an_oblique_exam_is_read_along_the_axes_of_the_patient(region):
    """An upright ellipsoid on a straight grid and on an oblique one around it: the network sees the same."""

    def scan(linear: np.ndarray) -> Volume:
        affine = affine_of(linear)
        affine[:3, 3] -= apply(affine, (np.array((64, 72, 60)) - 1) / 2) - np.array([10.0, -5.0, 30.0])
        away = apply(affine, np.moveaxis(np.indices((64, 72, 60)), 0, -1)) - np.array([10.0, -5.0, 30.0])
        inside = np.linalg.norm(away / [30.0, 50.0, 75.0], axis=-1) < 1
        return Volume(np.where(inside, 40 + away[..., 2], -1000).astype(np.float32), affine)

    straight, leaning = (prepare(scan(linear), 24, region) for linear in (np.eye(3) * 3, oblique() @ np.eye(3) * 3))
    np.testing.assert_allclose(leaning.box_to_mm[:3, :3], np.diag(np.diagonal(leaning.box_to_mm)[:3]))
    np.testing.assert_allclose(leaning.box_to_mm, straight.box_to_mm, atol=4.0)  # mm: a voxel more or less
    overlap = 2 * (leaning.foreground & straight.foreground).sum()
    assert overlap / (leaning.foreground.sum() + straight.foreground.sum()) > 0.9
    own = prepare(scan(oblique() @ np.eye(3) * 3), 24, region, upright=False)
    np.testing.assert_allclose(own.box_to_mm[:3, :3] / np.linalg.norm(own.box_to_mm[:3, :3], axis=0), oblique())


def test_hu_that_are_no_numbers_are_refused():
    volume = body()
    array = volume.array.astype(np.float32)
    array[tuple(n // 2 for n in volume.shape)] = np.nan
    with pytest.raises(ExamError, match="finite"):
        prepare(Volume(array, volume.affine), 16)


@pytest.mark.parametrize("kind", AFFINES)
def test_voxel_to_box_and_back(kind):
    """Voxel of the user's grid → mm → box → mm → voxel, for every storage order."""
    volume = body(affine=AFFINES[kind])
    points = np.random.default_rng(2).uniform(0, 29, (50, 3))
    for order in ORDERS[::5]:
        stored = reorder(volume, *order)
        prepared = prepare(stored, 16)
        points_mm = apply(stored.affine, points)
        points_box = apply(np.linalg.inv(prepared.box_to_mm), points_mm)
        assert np.abs(apply(prepared.box_to_mm, points_box) - points_mm).max() <= 1e-4


def test_body_spends_the_grid_on_the_patient():
    """A small patient in a wide field, beside a table that does not touch: the cut holds him and not the table."""
    array = np.full((120, 100, 80), -1024, np.int16)
    array[50:80, 40:70, 10:60] = 30
    array[40:90, 5:9, 10:60] = 200  # smaller than the patient
    volume = Volume(array, np.diag([2.0, 2.0, 3.0, 1.0]))
    whole = prepare(volume, 32, "exam")
    cut = prepare(volume, 32, "body")
    assert whole.foreground.mean() < 0.08
    assert cut.foreground.mean() > 5 * whole.foreground.mean()
    low, high = apply(cut.box_to_mm, [[-1, -1, -1], [1, 1, 1]])
    assert np.all(low < np.array([50, 40, 10]) * [2, 2, 3])
    assert np.all(high > np.array([79, 69, 59]) * [2, 2, 3])
    assert low[1] > 9 * 2  # the table is outside
    assert np.all(high - low < np.array([40, 40, 60]) * [2, 2, 3])


def test_foreground_fills_holes_and_keeps_the_largest():
    hu = np.full((32, 32, 32), -1000.0, np.float32)
    hu[4:24, 4:24, 4:24] = 0.0
    hu[10:16, 10:16, 10:16] = -1000.0  # a hole
    hu[28:31, 28:31, 28:31] = 0.0  # a crumb
    mask = foreground(hu)
    assert mask[4:24, 4:24, 4:24].all()
    assert not mask[27:, 27:, 27:].any()
    assert mask.sum() < 23**3


def test_foreground_comes_from_unclipped_hu():
    """Lung at −800 HU is patient, though the network's window shows it as air."""
    hu = np.full((16, 16, 16), -1024.0, np.float32)
    hu[3:13, 3:13, 3:13] = -800.0
    assert foreground(hu)[4:12, 4:12, 4:12].all()
    np.testing.assert_array_equal(np.unique(window(hu)), [0.0])


def test_window():
    np.testing.assert_allclose(window(np.array([-3000.0, -256.0, 0.0, 128.0, 256.0, 3000.0])), [0, 0, 0.5, 0.75, 1, 1])
    prepared = prepare(body(), 16)
    np.testing.assert_allclose(prepared.image, np.clip((prepared.hu + 256) / 512, 0, 1), atol=1e-6)
    assert prepared.image.dtype == np.float32


def test_padding_below_air_is_air():
    volume = body()
    padded = Volume(np.where(volume.array == -1024, np.int16(-32768), volume.array), volume.affine)
    np.testing.assert_array_equal(prepare(padded, 16).hu, prepare(volume, 16).hu)


@pytest.mark.parametrize("region", ["exam", "body"])
def test_only_air_is_refused(region):
    with pytest.raises(ExamError, match="patient above -900 HU"):
        prepare(Volume(np.full((20, 20, 20), -1000, np.int16), np.eye(4)), 16, region)


@pytest.mark.parametrize(
    ("volume", "size", "region", "message"),
    [(body(), 2, "body", "size"), (body(), 16, "head", "region"), (body((1, 20, 20)), 16, "exam", "2 voxels")],
)
def test_bad_arguments(volume, size, region, message):
    with pytest.raises(ExamError, match=message):
        prepare(volume, size, region)


def test_sampling_a_linear_field_is_exact():
    affine = AFFINES["oblique, left-handed, permuted"]
    index = np.stack(np.meshgrid(*map(np.arange, (9, 10, 11)), indexing="ij"), axis=-1)
    volume = Volume((2 * index[..., 0] - 3 * index[..., 1] + 5 * index[..., 2]).astype(np.float32), affine)
    points = np.random.default_rng(3).uniform(0, 8, (40, 3))
    np.testing.assert_allclose(sample_mm(volume, apply(affine, points)), points @ [2, -3, 5], atol=1e-4)
    nearest = np.rint(points) @ [2, -3, 5]
    np.testing.assert_allclose(sample_mm(volume, apply(affine, points), "nearest"), nearest)


def test_sampling_outside():
    volume = Volume(np.full((4, 4, 4), 7, np.int16), np.eye(4))
    points = np.array([[-0.4, 0, 0], [-0.6, 0, 0], [3.4, 3.4, 3.4], [3.6, 0, 0], [np.nan, 0, 0], [np.inf, 0, 0]])
    expected = [7, -1024, 7, -1024, -1024, -1024]
    np.testing.assert_array_equal(sample_mm(volume, points), expected)
    np.testing.assert_array_equal(sample_mm(volume, points, "nearest"), expected)
    assert sample_mm(volume, points, "nearest").dtype == np.int16
    with pytest.raises(ExamError, match="order"):
        sample_mm(volume, points, "cubic")


def test_a_large_exam_needs_little_memory():
    """Neither a float copy of the exam nor the fine grid is held: the peak stays far below one float32 copy."""
    array = np.full((256, 256, 200), -1024, np.int16, order="F")
    array[60:200, 60:200] = 20
    volume = Volume(array, np.diag([-0.8, -0.8, 1.5, 1.0]))
    tracemalloc.start()
    prepare(volume, 32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * array.size * 0.75


@pytest.mark.parametrize("name", ["pt_200", "pt_1"])
def test_real_exams_stand_upright(name):
    """Right parotid on the +x side of the left one, brainstem above the larynx, mandible in front of the cord."""
    from deepatlas.files import read_exam, read_labels

    folder = os.environ.get("DEEPATLAS_DATA")
    if not folder or not (Path(folder) / "openkbp").is_dir():
        pytest.skip("needs DEEPATLAS_DATA, a folder that holds openkbp/")
    train = Path(folder) / "openkbp" / "train"
    exam = read_exam(train / "images" / f"{name}.nii.gz")
    labels = read_labels(train / "labels" / f"{name}.nii.gz", like=exam)
    prepared = prepare(exam)
    table = {str(number): number for number in (1, 2, 3, 4, 7)}
    ranks = masks.on_grid(labels, prepared.box_to_mm, prepared.size, table, table)
    shares = [(ranks == rank).astype(np.float32) for rank in range(1, 6)]
    assert to_ras(exam).affine[0, 0] > 0
    centres = {number: centroid(share) for number, share in zip([1, 2, 3, 4, 7], shares, strict=True) if share.any()}
    assert {2, 3, 4} <= set(centres)
    assert centres[3][0] > centres[4][0] + 5
    assert centres[3][2] > centres[2][2]
    if 1 in centres:
        assert centres[1][2] > centres[2][2]
    if 7 in centres:
        assert centres[7][1] > centres[2][1]
    for number, share in zip([1, 2, 3, 4, 7], shares, strict=True):
        if number in centres:
            assert (share * prepared.foreground).sum() > 0.99 * share.sum()


@pytest.mark.parametrize("region", ["body", "exam", "300mm"])
def test_pooling_a_fine_preparation_stays_in_its_place(region):
    """HU linear in the place stay linear in the place, in mm; the foreground is the same body."""
    where = np.stack(np.meshgrid(*[np.arange(n) for n in (40, 50, 60)], indexing="ij"), -1)
    body = ((where - np.array([20, 25, 30])) ** 2 / np.array([15, 20, 25]) ** 2).sum(-1) < 1
    affine = np.diag([4.0, 3.0, 3.5, 1.0])
    exam = Volume(np.where(body, 10.0 + where @ np.array([1.0, 2.0, -1.0]), -1000.0).astype(np.float32), affine)
    fine = prepare(exam, 32, region)
    coarse = fine.pooled()
    assert coarse.size == 16
    box = np.stack(np.meshgrid(*[np.linspace(-1, 1, 16)] * 3, indexing="ij"), -1)
    voxel = apply(np.linalg.inv(affine) @ coarse.box_to_mm, box)
    deep = ((voxel - np.array([20, 25, 30])) ** 2 / np.array([10, 15, 20]) ** 2).sum(-1) < 1
    assert deep.sum() > 50
    np.testing.assert_allclose(coarse.hu[deep], (10.0 + voxel @ np.array([1.0, 2.0, -1.0]))[deep], atol=0.01)
    assert coarse.foreground[deep].all()
