"""Structures in the atlas: pulled through known maps, solved for like any least squares, and given their level."""

import numpy as np
import pytest
import torch

from deepatlas import affine, atlas, grid
from deepatlas.atlas import Drawn, Structure
from deepatlas.errors import StructureError

BOX = torch.tensor([[-0.5, -0.4, -0.6], [0.3, 0.5, 0.2]])


def turned_map(size: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """A turned, stretched map box → atlas, and its matrix."""
    turn = affine.rotation(torch.tensor([[0.2, -0.3, 0.5]]))
    matrix = affine.from_parts(
        turn @ torch.diag_embed(torch.tensor([[0.7, 0.8, 0.6]])), torch.tensor([[0.1, 0.0, -0.1]])
    )
    return affine.apply(matrix, grid.identity((size,) * 3)), matrix


def soft_ball(points: torch.Tensor, centre=(0.0, 0.1, -0.2), radius: float = 0.3) -> torch.Tensor:
    """A soft membership in closed form, of (..., 3, point): 1 at the centre, ½ at the radius."""
    place = torch.tensor(centre).view(3, 1)
    return torch.sigmoid((radius - (points - place).norm(dim=-2)) / 0.08)


def structure(mask: torch.Tensor, box: torch.Tensor = BOX, level: float = 0.5) -> Structure:
    """A structure around a mask."""
    return Structure("liver", 5, mask, torch.ones_like(mask), box, level, 1)


def points_in(box: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Points spread over a box of the atlas, (3, point)."""
    uniform = torch.rand(3, count, generator=torch.Generator().manual_seed(seed))
    return box[0][:, None] + uniform * (box[1] - box[0])[:, None]


def test_a_structure_knows_its_own_grid():
    made = structure(torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(0)))
    nodes = made.nodes_atlas()
    assert nodes.shape == (1, 3, 3, 5, 4)
    torch.testing.assert_close(nodes[0, :, 0, 0, 0], BOX[0])
    torch.testing.assert_close(nodes[0, :, -1, -1, -1], BOX[1])
    torch.testing.assert_close(made.to_own_box(nodes), grid.identity((3, 5, 4)))
    torch.testing.assert_close(made.membership(nodes * 0.999999 + 1e-7)[0, 0], made.mask, atol=1e-4, rtol=0)
    beyond = BOX[1].view(1, 3, 1) + torch.tensor([[[0.01], [0.0], [0.0]]])
    assert made.membership(beyond).item() == 0
    assert made.membership(BOX.mean(dim=0).view(1, 3, 1)).item() > 0
    assert made.membership(torch.full((1, 3, 1), torch.nan)).item() == 0
    assert made.renamed("spleen") != made
    assert (made.renamed("spleen").name, made.renamed("spleen").label) == ("spleen", 5)


def test_one_exam_pulls_a_known_mask_through_a_known_map():
    c, matrix = turned_map()
    nodes = structure(torch.zeros(9, 11, 8)).nodes_atlas()
    inverse = torch.linalg.inv(matrix)

    def occupancy(points_box):
        return soft_ball(affine.apply(matrix, points_box)[0])

    foreground = torch.ones(1, 1, 20, 20, 20, dtype=torch.bool)
    mask, known = atlas.pull(c, foreground, occupancy, nodes)
    reached = (affine.apply(inverse, nodes).abs() <= 1).all(dim=1)[0]
    near_face = ((affine.apply(inverse, nodes).abs() - 1).abs() < 0.02).any(dim=1)[0]
    assert 0.5 < reached.float().mean() < 1
    assert torch.equal(known.bool() | near_face, reached | near_face)
    expected = soft_ball(nodes[0].flatten(1)).view(9, 11, 8) * known
    torch.testing.assert_close(mask, expected, atol=2e-3, rtol=0)
    assert mask.max() > 0.9


def test_what_the_patient_does_not_reach_is_unknown_and_not_background():
    c, matrix = turned_map()
    left = (grid.identity((20, 20, 20))[:, :1] < 0).contiguous()
    nodes = structure(torch.zeros(9, 9, 9)).nodes_atlas()
    mask, known = atlas.pull(c, left, lambda points: torch.ones(points.shape[2]), nodes)
    x = affine.apply(torch.linalg.inv(matrix), nodes)[0, 0]
    assert (known[x > 0.06] == 0).all()
    assert (known[(x < -0.06) & (x > -0.9)] == 1).float().mean() > 0.8
    assert torch.equal(mask, known)


def test_the_grid_of_a_structure_spans_its_voxels_and_a_margin():
    inside = torch.tensor([1.0, 1.0, 0.0])
    c = torch.tensor([[0.1, 0.3, -0.9], [0.0, 0.2, 0.9], [-0.2, 0.4, 0.9]])
    spacing = torch.tensor([0.05, 0.1, 0.02])
    box, shape = atlas.own_grid([Drawn(c, inside)], spacing, margin_nodes=2)
    torch.testing.assert_close(box, torch.tensor([[0.0, -0.2, -0.24], [0.4, 0.4, 0.44]]))
    assert all(abs(n - expected) <= 1 for n, expected in zip(shape, (9, 7, 35), strict=True))
    step = (box[1] - box[0]) / (torch.tensor(shape) - 1)
    assert (step <= spacing * 1.0001).all()
    box, shape = atlas.own_grid([Drawn(torch.tensor([[0.99], [-0.99], [0.0]]), torch.ones(1))], spacing)
    assert box.abs().max() <= 1
    assert min(shape) >= 4


def test_an_exam_far_off_does_not_blow_the_grid_up():
    exams = [Drawn(points_in(BOX / 2, 200, seed), torch.ones(200)) for seed in range(60)]
    exams.append(Drawn(torch.full((3, 5), 0.95), torch.ones(5)))
    box, _ = atlas.own_grid(exams, torch.full((3,), 0.02))
    assert (box[1] < 0.6).all()
    nothing = Drawn(torch.full((3, 5), 0.95), torch.zeros(5))
    assert torch.equal(atlas.own_grid([*exams, nothing], torch.full((3,), 0.02))[0], box)


def test_a_structure_without_a_voxel_is_refused():
    with pytest.raises(StructureError, match="check the label map"):
        atlas.own_grid([Drawn(torch.zeros(3, 4), torch.zeros(4))], torch.full((3,), 0.02))


def explicit(points: torch.Tensor, box: torch.Tensor, shape: tuple[int, int, int]) -> np.ndarray:
    """The matrix of trilinear sampling, (point, node), written out node by node as a product of hats."""
    index = (points - box[0][:, None]) / (box[1] - box[0])[:, None] * (torch.tensor(shape)[:, None] - 1)
    hats = [
        np.clip(1 - np.abs(index[a].double().numpy()[:, None] - np.arange(n)), 0, None) for a, n in enumerate(shape)
    ]
    return np.einsum("pi,pj,pk->pijk", *hats).reshape(points.shape[1], -1)


def differences(shape: tuple[int, int, int]) -> np.ndarray:
    """The differences between neighbouring nodes, (edge, node)."""
    number, rows = np.arange(np.prod(shape)).reshape(shape), []
    for axis in range(3):
        for a, b in zip(np.delete(number, -1, axis).ravel(), np.delete(number, 0, axis).ravel(), strict=True):
            row = np.zeros(number.size)
            row[[a, b]] = -1, 1
            rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("smooth", [0.05, 1.0])
def test_several_exams_are_solved_like_any_least_squares(smooth):
    shape = (4, 5, 3)
    drawn = []
    for seed in range(3):
        c = points_in(BOX, 150, seed)
        noise = 0.1 * torch.randn(150, generator=torch.Generator().manual_seed(10 + seed))
        drawn.append(Drawn(c, (soft_ball(c) * 0.6 + 0.2 + noise).clamp(0, 1)))
    mask, known = atlas.least_squares(drawn, BOX, shape, smooth=smooth, iterations=200)
    rows = explicit(torch.cat([d.c_atlas for d in drawn], dim=1), BOX, shape)
    values = torch.cat([d.inside for d in drawn]).double().numpy()
    edges = np.sqrt(smooth * len(values) / np.prod(shape)) * differences(shape)
    expected = np.linalg.lstsq(np.vstack([rows, edges]), np.append(values, np.zeros(len(edges))), rcond=None)[0]
    np.testing.assert_allclose(mask.numpy().ravel(), expected.clip(0, 1), atol=3e-3)
    assert mask.std() > 0.05
    assert torch.equal(known.bool().flatten(), torch.from_numpy(rows.sum(axis=0) > 0))


def test_several_exams_through_known_maps_reproduce_a_known_mask():
    drawn = [Drawn(points_in(BOX * 1.2, 6000, seed), torch.zeros(0)) for seed in range(4)]
    drawn = [Drawn(d.c_atlas, (soft_ball(d.c_atlas) > 0.5).float()) for d in drawn]
    shape = (13, 14, 12)
    mask, known = atlas.least_squares(drawn, BOX, shape, smooth=0.01)
    inner = (slice(1, -1),) * 3
    truth = soft_ball(structure(mask).nodes_atlas()[0].flatten(1)).view(shape)
    assert known[inner].all()
    clear = (truth - 0.5).abs() > 0.35  # a step is smeared over a node
    assert ((mask > 0.5) == (truth > 0.5))[inner][clear[inner]].float().mean() > 0.995
    assert 2 * ((mask > 0.5) & (truth > 0.5)).sum() / ((mask > 0.5).sum() + (truth > 0.5).sum()) > 0.93


def test_nodes_that_nobody_reached_are_marked_and_follow_their_neighbours():
    c = points_in(torch.stack([BOX[0], torch.tensor([-0.1, 0.5, 0.2])]), 2000, 0)
    mask, known = atlas.least_squares([Drawn(c, torch.full((2000,), 0.8))], BOX, (9, 6, 6))
    assert known[:4].all()
    assert not known[6:].any()
    torch.testing.assert_close(mask, torch.full_like(mask, 0.8), atol=0.02, rtol=0)


def ramp() -> Structure:
    """A structure whose membership is (x + 1) / 2."""
    mask = torch.linspace(0, 1, 5)[:, None, None].expand(5, 4, 4).contiguous()
    return structure(mask, torch.tensor([[-1.0] * 3, [1.0] * 3]))


def test_the_level_is_the_one_of_the_highest_mean_dice():
    chance = torch.Generator().manual_seed(0)
    values = [torch.rand(4000, generator=chance) for _ in range(4)]
    found = [(some, some > threshold) for some, threshold in zip(values, (0.3, 0.3, 0.3, 0.7), strict=True)]
    assert atlas.calibrated_level(found[:3]) == pytest.approx(0.3, abs=0.02)
    assert atlas.calibrated_level([found[3], found[3]]) == pytest.approx(0.7, abs=0.02)
    levels = np.linspace(0.1, 0.9, 33)
    dice = np.zeros(33)  # of the mixture, in closed form: |over| = 1 - level, |drawn| = 1 - threshold
    for threshold in (0.3, 0.3, 0.3, 0.7):
        dice += 2 * (1 - np.maximum(levels, threshold)) / (2 - levels - threshold)
    assert atlas.calibrated_level(found) == pytest.approx(levels[dice.argmax()], abs=0.04)


def test_a_single_exam_keeps_the_volume_it_drew():
    values = torch.linspace(0, 1, 4000)
    found = [(values, values < 0.25)]  # a quarter, at the wrong end: Dice would take the lowest level
    assert atlas.calibrated_level(found) == pytest.approx(0.75, abs=0.001)


def test_an_exam_on_which_it_is_not_drawn_has_no_say_in_the_level():
    values = torch.rand(4000, generator=torch.Generator().manual_seed(6))
    found = [(values, values > 0.4)] * 2
    nothing = torch.rand(9000, generator=torch.Generator().manual_seed(7)), torch.zeros(9000).bool()
    assert atlas.calibrated_level([*found, nothing, nothing]) == atlas.calibrated_level(found)
