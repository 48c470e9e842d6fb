"""Chance: drawn from a generator and from nothing else, within its limits, and applied without any."""

import math

import pytest
import torch

from deepatlas import affine, augment, grid

MANY = 2000


def chance(seed: int = 0) -> torch.Generator:
    """A generator."""
    return torch.Generator().manual_seed(seed)


def boxes(batch: int) -> torch.Tensor:
    """The linear part box → mm of oblique exams of unequal sides, float64."""
    turn = affine.rotation(torch.tensor([[0.1, -0.2, 0.3]], dtype=torch.float64))
    return (turn @ torch.diag_embed(torch.tensor([[160.0, 120.0, 400.0]], dtype=torch.float64))).repeat(batch, 1, 1)


def parts(matrix: torch.Tensor, mm_per_box: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The turn of the patient and the zooms along the box that make a map ``B⁻¹ R B Z`` up."""
    in_mm = mm_per_box @ matrix[:, :3, :3]
    zoom = in_mm.norm(dim=1) / mm_per_box.norm(dim=1)
    return in_mm @ torch.linalg.inv(mm_per_box @ torch.diag_embed(zoom)), zoom


DRAWS = {
    "uniform": lambda g: augment.draw_uniform((4, 2), -1, 1, g),
    "affine": lambda g: augment.draw_affine(boxes(4), g),
    "crop": lambda g: augment.draw_crop(boxes(4), g),
    "cut": lambda g: torch.cat([part.flatten() for part in augment.draw_cut(4, g)]),
    "bend": lambda g: augment.draw_bend(4, g),
    "tone": lambda g: augment.draw_tone(4, g, 0.3),
    "noise": lambda g: augment.apply_tone(torch.full((4, 1, 3, 3, 3), 0.4), torch.tensor([[1.0, 0.0, 0.1]] * 4), g),
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_depends_on_its_generator_alone(name):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = DRAWS[name](chance(7))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(DRAWS[name](chance(7)), first)
    assert not torch.equal(DRAWS[name](chance(8)), first)
    generator = chance(7)
    assert not torch.equal(DRAWS[name](generator), DRAWS[name](generator))


def fills(values: torch.Tensor, low: float, high: float) -> bool:
    """Whether values keep to a range and come near both of its ends."""
    room = 0.02 * (high - low)
    return bool(low <= values.min() < low + room and high - room < values.max() <= high)


def test_affine_maps_keep_to_the_ranges_of_the_paper():
    matrix = augment.draw_affine(boxes(MANY), chance())
    turn, zoom = parts(matrix, boxes(MANY))
    for axis in range(3):
        assert fills(zoom[:, axis], 0.7 - 1e-6, 1.3 + 1e-6)
        assert fills(matrix[:, axis, 3], -0.25, 0.25)
    is_a_turn_of_the_patient(turn, 0.5)
    assert matrix[:, 3].eq(torch.tensor([0.0, 0.0, 0.0, 1.0])).all()


def is_a_turn_of_the_patient(turn: torch.Tensor, most: float) -> None:
    """Rotations in mm about each axis by up to so many radians: no shear, no mirror, also where the box is long."""
    eye = torch.eye(3).double().expand_as(turn)
    torch.testing.assert_close(turn @ turn.transpose(1, 2), eye, atol=1e-5, rtol=0)
    assert (torch.linalg.det(turn) > 0).all()
    assert fills(torch.asin(turn[:, 0, 2]), -most, most)  # about the second axis
    assert fills(torch.atan2(-turn[:, 1, 2], turn[:, 2, 2]), -most, most)  # about the first
    assert fills(torch.atan2(-turn[:, 0, 1], turn[:, 0, 0]), -most, most)  # about the third


def test_crops_are_parts_of_the_exam_at_the_scale_of_their_own():
    matrix = augment.draw_crop(boxes(MANY), chance(), least=(0.5, 0.6, 0.15), rotation=0.25)
    turn, span = parts(matrix, boxes(MANY))
    for axis, least in enumerate((0.5, 0.6, 0.15)):
        assert fills(span[:, axis], least - 1e-6, 1.15 + 1e-6)
        room = (1 - span[:, axis]).clamp_min(0.1)  # its upright box stays in the exam, or nearly
        assert (matrix[:, axis, 3].abs() <= room + 1e-6).all()
        assert fills(matrix[:, axis, 3] / room, -1 - 1e-5, 1 + 1e-5)
    is_a_turn_of_the_patient(turn, 0.25)


def test_maps_come_in_the_type_of_the_boxes():
    for draw in (augment.draw_affine, augment.draw_crop):
        assert draw(boxes(2).float(), chance()).dtype == torch.float32
        torch.testing.assert_close(draw(boxes(2).float(), chance()).double(), draw(boxes(2), chance()))


def test_without_any_range_nothing_moves():
    matrix = augment.draw_affine(boxes(2), chance(), scale=0, rotation=0, translation=0)
    nowhere = grid.identity((3, 4, 5), torch.float64).expand(2, -1, -1, -1, -1)
    torch.testing.assert_close(augment.place(matrix, (3, 4, 5)), nowhere)


def test_a_grid_is_placed_by_the_map():
    matrix = augment.draw_affine(boxes(2), chance())
    placed = augment.place(matrix, (3, 4, 5))
    corner = torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(placed[1, :, -1, 0, -1], (matrix[1] @ corner)[:3])
    torch.testing.assert_close(placed, affine.apply(matrix, grid.identity((3, 4, 5), torch.float64)))


def test_cuts_take_away_what_lies_beyond_a_plane():
    where = grid.identity((9, 9, 9)).expand(2, -1, -1, -1, -1)
    normal = torch.tensor([[[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]], [[0.0, -1.0, 0.0], [0.6, 0.8, 0.0]]])
    offset = torch.tensor([[0.3, math.inf], [0.5, math.inf]])
    lost = augment.outside_cut(augment.Cut(normal, offset), where)
    assert lost.dtype == torch.bool
    assert torch.equal(lost[0], where[0, 2:] > 0.3)
    assert torch.equal(lost[1], where[1, 1:2] < -0.5)
    both = augment.outside_cut(augment.Cut(normal, torch.tensor([[0.3, 0.1], [0.5, 0.9]])), where)
    assert torch.equal(both[0], (where[0, 2:] > 0.3) | (where[0, :1] > 0.1))


def test_cuts_come_as_often_and_as_deep_as_said():
    cut = augment.draw_cut(MANY, chance(), probability=0.5, least=0.25)
    made = torch.isfinite(cut.offset).float().mean(dim=0)
    torch.testing.assert_close(made, torch.tensor([0.2, 0.1, 0.5] * 2), atol=0.04, rtol=0)
    for plane in range(6):
        offset = cut.offset[:, plane][torch.isfinite(cut.offset[:, plane])]
        assert fills(offset, 0.25 if plane % 3 == 2 else 0.625, 1.0)
        direction = torch.zeros(3)
        direction[plane % 3] = 1 if plane < 3 else -1
        assert ((cut.normal[:, plane] - direction).abs() <= 0.08).all()
    assert torch.isinf(augment.draw_cut(MANY, chance(), probability=0.0).offset).all()
    assert not augment.outside_cut(cut, torch.zeros(MANY, 3, 1, 1, 1)).any()  # the centre stays


def test_bends_are_as_large_as_said():
    bend = augment.draw_bend(MANY, chance(), amplitude=0.1, nodes=4)
    assert bend.shape == (MANY, 3, 4, 4, 4)
    size = bend.flatten(1).std(dim=1)
    assert 0.1 < size.max() < 0.12
    assert size.min() < 0.001
    assert abs(float(size.mean()) - 0.05) < 0.003


def test_tones_keep_to_their_ranges():
    tone = augment.draw_tone(MANY, chance(), 0.4)
    for column, (low, high) in enumerate(((0.6, 1.4), (-0.1, 0.1), (0.0, 0.05))):
        assert fills(tone[:, column].double(), low - 1e-7, high + 1e-7)


def test_air_and_bone_stay_to_the_bit_and_the_rest_changes_as_said():
    image = torch.tensor([0.0, 1.0, 0.5, 0.4, 0.99, 0.01]).view(1, 1, 1, 2, 3).repeat(2, 1, 1, 1, 1)
    toned = augment.apply_tone(image, torch.tensor([[1.2, 0.05, 0.0], [0.5, -0.02, 0.0]]), chance())
    torch.testing.assert_close(toned[0].flatten(), torch.tensor([0.0, 1.0, 0.55, 0.43, 1.0, 0.0]))
    torch.testing.assert_close(toned[1].flatten(), torch.tensor([0.0, 1.0, 0.48, 0.43, 0.725, 0.235]))
    noisy = augment.apply_tone(image, torch.tensor([[1.0, 0.0, 0.3]] * 2), chance())
    assert torch.equal(noisy[image == 0], image[image == 0])
    assert torch.equal(noisy[image == 1], image[image == 1])
    assert ((noisy >= 0) & (noisy <= 1)).all()
    assert (noisy != image).any()


def test_the_noise_is_as_strong_as_said():
    image = torch.full((1, 1, 20, 20, 20), 0.5)
    noisy = augment.apply_tone(image, torch.tensor([[1.0, 0.1, 0.05]]), chance())
    assert abs(float(noisy.mean()) - 0.6) < 0.003
    assert abs(float(noisy.std()) - 0.05) < 0.002


def test_the_tone_between_images_is_what_of_their_difference_changes_slowly():
    generator = chance()
    image = 0.3 + 0.2 * torch.rand((2, 1, 24, 24, 24), generator=generator)
    shade = 0.1 + 0.1 * grid.identity((24, 24, 24))[:, :1].expand(2, -1, -1, -1, -1)
    quick = 0.2 * (torch.rand(image.shape, generator=generator) - 0.5)
    seen = torch.ones_like(image, dtype=torch.bool)
    seen[:, :, :, :, 17:] = False
    other = torch.where(seen, image + shade + quick, 5.0)
    found = augment.tone_between(image, other, seen)
    assert (found - shade)[:, :, 2:-2, :, :16].abs().max() < 0.03  # over the faces it goes on as it was
    assert found.abs().max() < 0.25
    assert augment.tone_between(image, image, seen).abs().max() < 1e-6


WHOLE = torch.tensor([[0.0, 1.0]])


def lent_below(height: float) -> torch.Tensor:
    """What an exam shows that ends at a height of the atlas."""
    return (grid.identity((16,) * 3)[:, 2:] < height).float()


def test_a_borrowed_view_is_what_both_exams_show():
    where = grid.identity((20,) * 3)
    own = where.norm(dim=1, keepdim=True) < 0.8
    borrowed = augment.borrow_view(own, where, lent_below(0.0), torch.ones(1), WHOLE)
    assert torch.equal(borrowed.seen > 0, own & (where[:, 2:] < 0))
    assert torch.allclose(borrowed.centre, torch.tensor([[0.0, 0.0, -0.4]]), atol=0.06)


@pytest.mark.parametrize(("height", "taken"), [(0.0, 0.0), (-0.55, 1.0)])
def test_a_view_that_is_not_wanted_or_leaves_too_little_is_not_borrowed(height, taken):
    where = grid.identity((20,) * 3)
    own = where.norm(dim=1, keepdim=True) < 0.8
    borrowed = augment.borrow_view(own, where, lent_below(height), torch.full((1,), taken), WHOLE)
    assert borrowed.seen.all()
    assert not borrowed.centre.any()


def test_a_view_that_leaves_a_little_more_than_a_tenth_is_borrowed():
    where = grid.identity((20,) * 3)
    own = where.norm(dim=1, keepdim=True) < 0.8
    shares = {}
    for height in (-0.55, -0.45):
        left = float((own & (where[:, 2:] < height + 0.05)).sum() / own.sum())
        borrowed = augment.borrow_view(own, where, lent_below(height), torch.ones(1), WHOLE)
        shares[left] = bool((borrowed.seen > 0)[own].all())
    assert [0.05 < left < 0.1 for left in shares] == [True, False]
    assert list(shares.values()) == [True, False]


def test_a_part_of_the_length_is_kept_and_seen_from_its_middle():
    where = grid.identity((21,) * 3)
    own = where.abs().amax(dim=1, keepdim=True) < 0.85
    kept = augment.borrow_view(own, where, lent_below(2.0), torch.zeros(1), torch.tensor([[0.5, 1.0]]))
    height = where[:, 2:]
    assert (height[kept.seen > 0] > -0.06).all()
    assert kept.seen[own & (height > 0.06)].all()
    assert torch.allclose(kept.centre, torch.tensor([[0.0, 0.0, 0.4]]), atol=1e-5)


def test_drawn_ends_lie_in_order_and_most_exams_keep_theirs():
    ends = augment.draw_ends(MANY, chance(), probability=0.4, least=0.35)
    length = ends[:, 1] - ends[:, 0]
    assert (ends >= 0).all()
    assert (ends <= 1).all()
    assert fills(length[length < 1], 0.35, 1.0)
    assert abs(float((length < 1).float().mean()) - 0.4) < 0.05


def test_a_part_of_the_length_in_which_nothing_shows_is_not_asked_for():
    where = grid.identity((21,) * 3)
    own = (where[:, 2:].abs() > 0.6) & (where[:, :1].abs() < 0.5)
    kept = augment.borrow_view(own, where, lent_below(2.0), torch.zeros(1), torch.tensor([[0.3, 0.7]]))
    assert kept.seen.all()
    assert torch.isfinite(kept.centre).all()


def shape_of(lender: torch.Tensor, to_lender: torch.Tensor | None = None, shown: bool | torch.Tensor = True):
    """What an exam whose map is 0.8 of the place in its box takes of a lender's map."""
    places = grid.identity((17,) * 3) / 0.8
    shown = grid.inside(places) & shown
    patient = torch.ones(1, 1, *lender.shape[2:], dtype=torch.bool)
    return augment.borrow_shape(places, shown, lender, patient, torch.eye(4)[None] if to_lender is None else to_lender)


def test_a_borrowed_shape_is_how_the_two_maps_differ_but_for_pose():
    here = grid.identity((16,) * 3)
    bump = (
        0.1
        * torch.exp(-4 * here.square().sum(dim=1, keepdim=True))
        * torch.tensor([1.0, -0.5, 0.2]).view(1, 3, 1, 1, 1)
    )
    assert torch.allclose(shape_of(0.8 * here), torch.zeros(()), atol=1e-5)
    assert torch.allclose(shape_of(0.8 * (here + bump)), bump, atol=0.01)
    pose = affine.from_parts(torch.diag(torch.tensor([0.9, 1.1, 0.8]))[None], torch.tensor([[0.1, 0.0, -0.1]]))
    moved = affine.apply(torch.linalg.inv(pose), here)  # the same body elsewhere in its box
    assert shape_of(0.8 * moved, pose).abs().max() < 0.01


def test_a_borrowed_shape_goes_on_where_nothing_is_shown():
    here = grid.identity((16,) * 3)
    lower = grid.identity((17,) * 3)[:, 2:] < 0
    shifted = 0.8 * (here + torch.tensor([0.05, 0.0, 0.0]).view(1, 3, 1, 1, 1))
    assert torch.allclose(shape_of(shifted, shown=lower)[:, 0], torch.tensor(0.05), atol=1e-4)
    assert not shape_of(shifted, shown=False).any()
