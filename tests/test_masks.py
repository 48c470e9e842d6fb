"""Label maps on the grids of a cohort: what an exam says, what it does not say, and where."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from deepatlas import grid, masks, store
from deepatlas.errors import LabelError
from deepatlas.masks import NEAR, LabelMaps, Masks
from deepatlas.volume import apply
from exact import OTHER, affine_of, balls, places_of, rotated

SIZE = 24
TABLE = {"ball": 7, "other": 300}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three exams on turned, anisotropic grids, left-handed ones among them, with a ball each in a known place of mm;
    the third has no label map."""
    where = tmp_path_factory.mktemp("exams")
    (where / "images").mkdir()
    (where / "labels").mkdir()
    for number, name in enumerate("abc"):
        affine = affine_of(rotated((10.0 * number, -8.0, 5.0)) @ np.diag([(-1) ** number * 7.0, 6.0, 9.0]))
        shape = (30, 34, 28)
        affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
        places = places_of(shape, affine)
        hu = np.where((places / [80, 70, 100]) ** 2 @ np.ones(3) < 1, 40, -1000).astype(np.int16)
        nib.Nifti1Image(hu, affine).to_filename(where / "images" / f"{name}.nii.gz")
        drawn = balls(places, np.array([20.0, 10.0, 30.0]), OTHER, radius=22)
        if name == "b":
            drawn[drawn == 2] = 0
        if name != "c":
            numbers = np.array([0, 7, 300], np.int16)[drawn]
            suffix = "_seg" if name == "b" else ""
            nib.Nifti1Image(numbers, affine).to_filename(where / "labels" / f"{name}{suffix}.nii.gz")
    store.build(where / "images", where / "cohort.h5", SIZE, workers=0)
    return where


@pytest.fixture(scope="module")
def read(folder) -> LabelMaps:
    return masks.read(folder / "cohort.h5", folder / "labels", TABLE)


def test_what_is_drawn_is_found_at_its_place_in_mm(folder, read):
    with store.Cohort(folder / "cohort.h5") as cohort:
        boxes = cohort.box_to_mm()
    assert read.names == ("ball", "other")
    for exam, row, centre in ((0, 0, (20, 10, 30)), (0, 1, OTHER), (1, 0, (20, 10, 30))):
        nodes = grid.identity((SIZE,) * 3)[0].flatten(1).T.numpy()
        drawn = nodes[read.maps[exam].flatten().numpy() == row + 1]
        middle = apply(boxes[exam], drawn).mean(axis=0)
        assert np.linalg.norm(middle - np.array(centre)) < 3
    assert not (read.maps[1] == 2).any()
    assert not read.maps[2].any()


def test_not_drawn_is_not_absent(read):
    everywhere = grid.identity((SIZE,) * 3)
    known = read.at([0, 1, 2], everywhere.expand(3, -1, -1, -1, -1)).known()
    assert known.flatten(2).all(dim=2).tolist() == [[True, True], [True, False], [False, False]]
    assert not known[1, 1].any()
    assert not known[2].any()


def test_beyond_its_drawn_slices_nothing_is_known_of_a_structure_drawn_in_part(read):
    partly = LabelMaps.of(read.names, read.maps, drawn_in_part=["ball"])
    everywhere = grid.identity((SIZE,) * 3)
    found = partly.at([0], everywhere)
    slices = (read.maps[0] == 1).any(dim=0).any(dim=0)
    assert 2 < slices.sum() < SIZE
    torch.testing.assert_close(found.known()[0, 0], slices.expand(SIZE, SIZE, SIZE))
    assert found.known()[0, 1].all()
    assert torch.equal(found.inside()[0, 0], (read.maps[0] == 1).float())


def test_places_of_a_turned_view_read_the_nearest_node(read):
    torch.manual_seed(1)
    places = (torch.rand(2, 3, 5, 6, 7) - 0.5) * 2.4
    found = read.at([1, 0], places)
    for batch, exam in enumerate([1, 0]):
        for voxel in np.ndindex(5, 6, 7):
            place = places[(batch, slice(None), *voxel)]
            outside = bool((place.abs() > 1).any())
            index = tuple(((place + 1) / 2 * (SIZE - 1)).round().long().clamp(0, SIZE - 1).tolist())
            assert int(found.number[(batch, *voxel)]) == (0 if outside else int(read.maps[exam][index]))
            assert bool(found.seen[(batch, *voxel)]) != outside
    hidden = found.only(torch.zeros(2, 1, 5, 6, 7, dtype=torch.bool))
    assert not hidden.known().any()


def test_near_is_within_some_voxels_of_anything_drawn():
    number = torch.zeros(1, 15, 16, 17, dtype=torch.uint8)
    number[0, 7, 3, 9] = 2
    shape = number.shape
    found = Masks(number, torch.zeros(shape), torch.zeros(1, 2, 2), torch.ones(shape, dtype=torch.bool))
    (near,) = found.near()
    there = torch.zeros(number.numel(), dtype=torch.bool)
    there[near] = True
    there = there.view(shape[1:])
    assert there[7 - NEAR : 8 + NEAR, 0 : 4 + NEAR, 9 - NEAR : 10 + NEAR].all()
    there[6 - NEAR : 9 + NEAR, 0 : 5 + NEAR, 8 - NEAR : 11 + NEAR] = False  # or next to it
    assert not there.any()
    few = found.points(0, near)
    assert float(few.inside().sum()) == 1
    assert few.inside().shape == (1, 2, 1, 1, len(near))


def test_labels_known_to_be_wrong_count_as_not_drawn(folder):
    found = masks.read(folder / "cohort.h5", folder / "labels", TABLE, exclude={"ball": ["a"]})
    assert not (found.maps[0] == 1).any()
    assert (found.maps[0] == 2).any()
    assert (found.maps[1] == 1).any()


def test_label_maps_tell_what_they_hold(read):
    assert str(read).startswith("ball in 2, other in 1 exams (")
    other = read.maps.clone()
    other[0, 0, 0, 0] = 1
    assert str(LabelMaps.of(read.names, other)) != str(read)
    assert str(LabelMaps.of(read.names, read.maps.clone())) == str(read)


@pytest.mark.parametrize(
    ("table", "in_part", "expected"),
    [
        ({}, (), "1 to 254 structures"),
        ({f"s{n}": n for n in range(1, 300)}, (), "1 to 254 structures"),
        ({"nothing": 9}, (), "found nothing drawn"),
        (TABLE, ("cord",), "got 'cord'"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(table, in_part, expected, folder):
    with pytest.raises(LabelError, match=expected):
        masks.read(folder / "cohort.h5", folder / "labels", table, in_part)


def test_label_maps_of_other_exams_are_refused(folder, tmp_path):
    labels = nib.load(folder / "labels" / "a.nii.gz")
    labels.to_filename(tmp_path / "z.nii.gz")
    with pytest.raises(LabelError, match="check their names"):
        masks.read(folder / "cohort.h5", tmp_path, TABLE)
