"""Phantoms: what is called true about them is true, and they are as hard as exams are."""

import json

import nibabel as nib
import numpy as np
import pytest

from deepatlas.phantom import (
    FIELDS_OF_VIEW,
    STRUCTURES,
    Appearance,
    Deformation,
    PhantomExam,
    acquire,
    anatomy,
    cohort_exam,
    draw,
    draw_acquisition,
    draw_appearance,
    draw_deformation,
    write_cohort,
)


@pytest.fixture(scope="module")
def whole() -> PhantomExam:
    return draw(5, "whole")


@pytest.fixture(scope="module")
def partial() -> dict[str, PhantomExam]:
    return {word: draw(100 + n, word) for n, word in enumerate(FIELDS_OF_VIEW) if word != "whole"}


def voxels_mm(volume, every: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Indices (n, 3) of every `every`-th voxel, and their mm."""
    voxels = np.indices(volume.array.shape).reshape(3, -1).T[::every]
    return voxels, nib.affines.apply_affine(volume.affine, voxels)


def centroid_mm(exam: PhantomExam, name: str) -> np.ndarray:
    return nib.affines.apply_affine(exam.labels.affine, np.argwhere(exam.labels.array == STRUCTURES[name]).mean(0))


def deformations() -> list[Deformation]:
    return [draw_deformation(np.random.default_rng(seed)) for seed in range(6)]


def exam_points_mm(deformation: Deformation, count: int, seed: int) -> np.ndarray:
    """Points of an exam that cover the body and its margin, by the affine part alone: no use is made of the inverse."""
    posed = np.random.default_rng(seed).uniform([-220, -150, -60], [220, 150, 1020], (count, 3))
    return (posed - deformation.offset_mm) @ np.linalg.inv(deformation.linear).T


def test_the_same_seed_draws_the_same_exam_and_another_seed_another():
    one, again, other = draw(3, "pelvis"), draw(3, "pelvis"), draw(4, "pelvis")
    for part in ("image", "labels"):
        assert getattr(one, part).array.tobytes() == getattr(again, part).array.tobytes()
        assert getattr(one, part).affine.tobytes() == getattr(again, part).affine.tobytes()
    assert one.appearance == again.appearance != other.appearance
    assert one.image.array.shape != other.image.array.shape or (one.image.array != other.image.array).any()


def test_from_canonical_is_the_inverse():
    for seed, deformation in enumerate(deformations()):
        points_mm = exam_points_mm(deformation, 3000, seed)
        back_mm = deformation.from_canonical(deformation.to_canonical(points_mm))
        assert np.abs(back_mm - points_mm).max() < 0.01


def test_from_canonical_refuses_a_map_that_folds():
    fold = Deformation(
        linear=np.eye(3),
        offset_mm=np.zeros(3),
        wave_vectors=np.array([[0.05, 0.0, 0.0]]),
        wave_phases=np.zeros(1),
        wave_amplitudes_mm=np.array([[80.0, 0.0, 0.0]]),
        bump_centres_mm=np.zeros((0, 3)),
        bump_widths_mm=np.zeros(0),
        bump_shifts_mm=np.zeros((0, 3)),
        bump_swells=np.zeros(0),
    )
    x = np.linspace(-100, 100, 50)
    with pytest.raises(RuntimeError, match="invertible"):
        fold.from_canonical(np.stack([x, 0 * x, 0 * x], -1))


def test_the_jacobian_is_the_maps_derivative():
    for seed, deformation in enumerate(deformations()):
        points_mm, step = exam_points_mm(deformation, 300, seed), 1e-3
        columns = [
            (deformation.to_canonical(points_mm + step * axis) - deformation.to_canonical(points_mm - step * axis))
            / (2 * step)
            for axis in np.eye(3)
        ]
        np.testing.assert_allclose(deformation.jacobian(points_mm), np.stack(columns, -1), atol=1e-5)


def test_the_map_never_folds():
    # The strong ones would fold if the drawing did not hold them back.
    strong = [draw_deformation(np.random.default_rng(seed), strength=4.0) for seed in range(3)]
    for seed, deformation in enumerate([*deformations(), *strong]):
        points_mm = exam_points_mm(deformation, 20000, seed)
        # Per unit of the affine part, and not on the grid where the drawing looks.
        change = np.linalg.det(deformation.jacobian(points_mm)) / np.linalg.det(deformation.linear)
        assert change.min() > 0.2
        assert change.max() > 1.2, "a map that changes no volume is no test of a method"


def test_labels_are_the_anatomy_at_the_canonical_point(whole, partial):
    for exam in (whole, *partial.values()):
        voxels, points_mm = voxels_mm(exam.labels, every=11)
        _, label = anatomy(exam.deformation.to_canonical(points_mm), Appearance())
        # Blocks of other lengths may round the last bit otherwise: one voxel in 10,000 may sit on an edge.
        assert (label == exam.labels.array[tuple(voxels.T)]).mean() > 0.9999
        assert (label > 0).mean() > 0.03


def test_the_image_is_the_anatomy_blurred_and_noisy(whole):
    voxels, points_mm = voxels_mm(whole.image, every=11)
    hu, label = anatomy(whole.deformation.to_canonical(points_mm), whole.appearance)
    image = whole.image.array[tuple(voxels.T)]
    for name in ("liver", "lung_left", "brain", "psoas_right", "bladder"):
        mine = label == STRUCTURES[name]
        assert abs(np.median(image[mine] - hu[mine])) < 12, name


def test_right_is_right(partial):
    for word in ("abdomen", "abdomen_pelvis", "chest_abdomen", "trunk"):
        exam = partial[word]
        assert centroid_mm(exam, "liver")[0] > centroid_mm(exam, "spleen")[0] + 60
        assert centroid_mm(exam, "kidney_right")[0] > centroid_mm(exam, "kidney_left")[0] + 60


def test_the_body_is_the_right_way_round(whole):
    at = {name: centroid_mm(whole, name) for name in STRUCTURES}
    for name in STRUCTURES:
        if name.endswith("_right"):
            assert at[name][0] > at[name.replace("_right", "_left")][0] + 30, name
    assert at["stomach"][0] < at["liver"][0] - 60
    assert at["sternum"][1] > at["heart"][1] > at["vertebra_T6"][1], "the sternum is in front"
    upwards = ["bladder", "vertebra_L4", "vertebra_L1", "heart", "humerus_left", "mandible", "brain"]
    heights = [at[name][2] for name in upwards]
    assert heights == sorted(heights)
    heart_canonical = whole.deformation.to_canonical(at["heart"])
    assert heart_canonical[0] < -10, "the heart leans to the left"


def test_a_whole_exam_holds_every_structure(whole):
    for exam in (whole, draw(1, "whole")):
        labels = exam.labels
        counts = np.bincount(labels.array.ravel(), minlength=len(STRUCTURES) + 1)
        litres = counts * abs(np.linalg.det(labels.affine)) * 1e-6
        assert {name for name, number in STRUCTURES.items() if litres[number] < 0.002} == set()
        assert 0.6 < litres[STRUCTURES["liver"]] < 3.5
        assert 0.5 < litres[STRUCTURES["brain"]] < 2.0
        assert counts[0] > 0.5 * labels.array.size


def test_partial_fields_hold_what_they_should(partial):
    expected = {
        "head_neck": ({"brain", "eye_left", "mandible"}, {"heart", "liver", "bladder"}),
        "neck_chest": ({"heart", "mandible", "lung_left"}, {"bladder", "kidney_right", "eye_left"}),
        "chest": ({"heart", "lung_left", "lung_right", "sternum", "vertebra_T6"}, {"brain", "bladder"}),
        "chest_abdomen": ({"heart", "liver", "kidney_left"}, {"brain", "bladder"}),
        "abdomen": ({"liver", "spleen", "kidney_left", "vertebra_L1"}, {"brain", "bladder", "mandible"}),
        "abdomen_pelvis": ({"liver", "bladder", "sacrum"}, {"brain", "mandible"}),
        "pelvis": ({"bladder", "femoral_head_left", "sacrum"}, {"heart", "liver", "brain"}),
        "trunk": ({"bladder", "heart", "liver", "lung_right"}, {"brain", "mandible"}),
    }
    assert set(expected) == set(partial)
    names = {number: name for name, number in STRUCTURES.items()}
    for word, exam in partial.items():
        present = {names[number] for number in np.unique(exam.labels.array) if number}
        shown, hidden = expected[word]
        assert shown <= present, word
        assert not hidden & present, word
        assert exam.field_of_view == word


def test_hounsfield_units_are_those_of_ct(whole):
    image, labels = whole.image.array, whole.labels.array
    assert image.dtype == np.int16
    assert labels.dtype == np.uint8
    assert image.min() >= -1024
    median = {name: np.median(image[labels == number]) for name, number in STRUCTURES.items()}
    assert median["lung_left"] < -500
    assert median["lung_right"] < -500
    assert median["trachea"] < -500
    assert all(0 < median[name] < 80 for name in ("brain", "psoas_left"))
    assert all(median[name] > 150 for name in ("mandible", "femoral_head_left", "hip_left"))
    assert (image > 600).sum() > 200
    voxels, points_mm = voxels_mm(whole.image, every=7)
    canonical = whole.deformation.to_canonical(points_mm)
    outside = canonical[:, 1] > 150  # in front of every belly, and away from the table
    assert outside.sum() > 50
    assert abs(np.median(image[tuple(voxels[outside].T)]) + 1000) < 10


def test_the_table_lies_below_the_body_and_apart_from_it():
    rng = np.random.default_rng(8)
    deformation, appearance = draw_deformation(rng), draw_appearance(rng)
    acquisition = draw_acquisition(rng, deformation, "abdomen")
    image, _ = acquire(deformation, appearance, acquisition)
    _, points_mm = voxels_mm(image)
    body = anatomy(deformation.to_canonical(points_mm), appearance)[0] > -999
    y_mm, hu = points_mm[:, 1], image.array.reshape(-1)
    skin_mm = y_mm[body].min()
    assert (hu[y_mm < skin_mm - acquisition.table_gap_mm] > -500).sum() > 500, "there is a table"
    gap = (y_mm < skin_mm - 4) & (y_mm > skin_mm - acquisition.table_gap_mm + 4)
    if gap.any():
        assert np.median(hu[gap]) < -900, "and air above it"


def test_anatomy_outside_the_body_is_air_without_a_label():
    far = np.array([[500.0, 0, 400], [0, 0, 1500], [0, -400, 400], [0, 300, 900]])
    hu, label = anatomy(far.reshape(2, 2, 3), Appearance())
    assert hu.shape == label.shape == (2, 2)
    assert (hu == -1000).all()
    assert (label == 0).all()


def test_labels_do_not_depend_on_the_appearance():
    points = np.random.default_rng(0).uniform([-180, -110, 0], [180, 110, 970], (20000, 3))
    plain, label = anatomy(points, Appearance())
    for seed in range(3):
        hu, same = anatomy(points, draw_appearance(np.random.default_rng(seed)))
        np.testing.assert_array_equal(same, label)
        assert np.abs(hu - plain).mean() > 3


def test_exams_are_stored_in_many_orientations_and_spacings(partial):
    axes, oblique, anisotropic = set(), 0, 0
    deformation = draw_deformation(np.random.default_rng(0))
    for seed in range(40):
        acquisition = draw_acquisition(np.random.default_rng(seed), deformation, "pelvis")
        axes.add((acquisition.storage_order, acquisition.storage_flips))
        oblique += np.count_nonzero(np.abs(acquisition.affine[:3, :3]) > 1e-9) > 3
        spacing_mm = nib.affines.voxel_sizes(acquisition.affine)
        anisotropic += spacing_mm.max() > 1.2 * spacing_mm.min()
        assert max(acquisition.shape) <= 132
    assert len(axes) >= 8
    assert 5 <= oblique <= 30
    assert anisotropic >= 5
    stored = {"".join(nib.aff2axcodes(exam.labels.affine)) for exam in partial.values()}
    assert len(stored) >= 3


def test_the_truth_carries_labels_and_matching_boxes_does_not(whole):
    """Labels of one whole exam, looked up from another: by the true map, and by stretching one body's box to fit."""
    other = draw(2, "whole")
    voxels, points_mm = voxels_mm(other.labels, every=7)
    label = other.labels.array[tuple(voxels.T)]
    canonical = other.deformation.to_canonical(points_mm)
    body_mm = points_mm[anatomy(canonical, other.appearance)[0] > -999]
    _, whole_mm = voxels_mm(whole.labels, every=7)
    whole_mm = whole_mm[anatomy(whole.deformation.to_canonical(whole_mm), whole.appearance)[0] > -999]
    stretch = (whole_mm.max(0) - whole_mm.min(0)) / (body_mm.max(0) - body_mm.min(0))

    named = label > 0
    true_mm = whole.deformation.from_canonical(canonical[named])
    guess_mm = whole_mm.min(0) + (points_mm[named] - body_mm.min(0)) * stretch

    def agreement(found_mm: np.ndarray) -> float:
        index = np.rint(nib.affines.apply_affine(np.linalg.inv(whole.labels.affine), found_mm)).astype(int)
        held = ((index >= 0) & (index < whole.labels.array.shape)).all(1)
        return float((whole.labels.array[tuple(index[held].T)] == label[named][held]).mean())

    assert agreement(true_mm) > 0.88
    assert agreement(guess_mm) < 0.75
    assert np.median(np.linalg.norm(true_mm - guess_mm, axis=1)) > 12


def test_an_unknown_field_of_view_is_refused():
    with pytest.raises(ValueError, match="head_neck"):
        draw(0, "left toe")


def test_a_written_cohort_can_be_drawn_again(tmp_path):
    mix = ("pelvis", "head_neck")
    paths = write_cohort(tmp_path, 2, seed=11, fields_of_view=mix)
    assert [path.name for path in paths] == [f"phantom_{n:03d}.nii.gz" for n in range(2)]
    assert json.loads((tmp_path / "labels.json").read_text()) == STRUCTURES
    for index, path in enumerate(paths):
        exam = cohort_exam(index, 11, mix)
        assert exam.name == path.name.removesuffix(".nii.gz")
        for volume, file in ((exam.image, path), (exam.labels, tmp_path / "labels" / path.name)):
            read = nib.load(file)
            assert read.get_data_dtype() == volume.array.dtype
            np.testing.assert_array_equal(np.asarray(read.dataobj), volume.array)
            np.testing.assert_allclose(read.affine, volume.affine, atol=1e-3)
        assert exam.field_of_view == "whole" if index == 0 else exam.field_of_view in mix


def test_the_mix_of_fields_of_view_is_a_third_whole():
    from deepatlas.phantom.cohorts import _draw_field_of_view

    words = [_draw_field_of_view(np.random.default_rng([1, n]), tuple(FIELDS_OF_VIEW)) for n in range(600)]
    assert 0.27 < words.count("whole") / len(words) < 0.40
    assert set(words) == set(FIELDS_OF_VIEW)
    assert {_draw_field_of_view(np.random.default_rng(n), ("chest",)) for n in range(9)} == {"chest"}
