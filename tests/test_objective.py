"""The objective: zero where nothing is left to gain, finite everywhere, and blind to the order of the exams."""

import math

import pytest
import torch

from deepatlas import affine, grid, losses, warp
from deepatlas.autoencoder import Autoencoder
from deepatlas.config import Weights
from deepatlas.masks import Masks
from deepatlas.objective import (
    Atlas,
    Exams,
    Terms,
    _erode,
    _unsolved,
    autoencoder_features,
    cut_off,
    explicit_terms,
    implicit_terms,
    label_errors,
    objective,
    spacing_mm,
)

SIZE = 16
WHOLE = Weights(window=None)


def image_at(points: torch.Tensor) -> torch.Tensor:
    """A smooth image with structure in all directions, of box points."""
    x, y, z = points.unbind(1)
    wave = torch.sin(4 * x + 1) + torch.cos(3 * y - z) + torch.sin(3 * z + 0.5 * x) * torch.cos(2 * y)
    return (0.5 + wave / 6)[:, None]


def boxes(batch: int) -> torch.Tensor:
    """The linear part box → mm of boxes of unequal sides, oblique."""
    turn = affine.rotation(torch.tensor([[0.1, -0.2, 0.3]]))
    return (turn @ torch.diag_embed(torch.tensor([[150.0, 110.0, 240.0]]))).repeat(batch, 1, 1)


@pytest.fixture
def autoencoder() -> Autoencoder:
    """Random features are features too."""
    torch.manual_seed(0)
    return Autoencoder().requires_grad_(False)


def alike(batch: int = 3) -> tuple[torch.Tensor, Exams, Atlas]:
    """Exams that are all the same, an atlas that is made of them, and the map that says so."""
    where = grid.identity((SIZE,) * 3)
    exams = Exams(
        image_at(where).repeat(batch, 1, 1, 1, 1),
        (where.norm(dim=1, keepdim=True) < 0.95).repeat(batch, 1, 1, 1, 1),
        boxes(batch),
    )
    atlas = Atlas(image_at(grid.identity((61,) * 3) / 0.9), boxes(1) / 0.9)
    return 0.9 * where.repeat(batch, 1, 1, 1, 1), exams, atlas


def random_maps(batch: int, seed: int, size: float) -> torch.Tensor:
    """Maps with noise, folded where there is much of it."""
    noise = torch.randn(batch, 3, SIZE, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    return (0.8 * grid.identity((SIZE,) * 3) + size * noise).clamp(-1, 1)


def different(batch: int, seed: int = 1) -> Exams:
    """Exams that have little in common."""
    shift = torch.rand(batch, 3, 1, 1, 1, generator=torch.Generator().manual_seed(seed)) - 0.5
    where = grid.identity((SIZE,) * 3) + shift
    return Exams(image_at(where), where.abs().amax(dim=1, keepdim=True) < 1.1, boxes(batch))


def labelled(atlas: Atlas, exams: Exams, shift: float = 0.0) -> tuple[Atlas, Exams]:
    """The same with two balls drawn on every exam, and where the map that says the exams are alike puts them."""
    structures, batch = ((-0.3, 0.35), (0.4, 0.25)), len(exams.image)

    def within(places, centre, radius):
        return (places - torch.tensor([centre + shift, 0.0, 0.0]).view(1, 3, 1, 1, 1)).norm(dim=1) < radius

    fine, coarse = grid.identity((61,) * 3) / 0.9, grid.identity((SIZE,) * 3)
    soft = torch.stack([within(fine, *one).float() for one in structures], dim=1)
    shift = 0.0
    number = sum(n * within(coarse, *one).to(torch.uint8) for n, one in enumerate(structures, start=1))
    ends = torch.tensor([-torch.inf, torch.inf]).expand(batch, 2, 2)
    height = coarse[:, 2].expand(batch, *(SIZE,) * 3)
    seen = torch.ones(batch, *(SIZE,) * 3, dtype=torch.bool)
    drawn = Masks(number.expand(batch, *(SIZE,) * 3), height, ends, seen).only(exams.foreground)
    return atlas._replace(masks=soft), exams._replace(masks=drawn)


def test_drawn_structures_are_matched_by_both_registrations(autoencoder):
    c, exams, atlas = alike()
    right, drawn = labelled(atlas, exams)
    wrong, _ = labelled(atlas, exams, shift=0.3)
    assert float(label_errors(right, c, drawn.masks).max()) < 0.12  # half a voxel at a ball's surface
    assert float(label_errors(wrong, c, drawn.masks).min()) > 0.5
    coarse = grid.resize(c, (SIZE // 2,) * 3)  # a map may be coarser than what is drawn
    assert torch.allclose(label_errors(right, coarse, drawn.masks), label_errors(right, c, drawn.masks), atol=0.01)
    perfect = objective(c, drawn, right, autoencoder, WHOLE)
    assert float(perfect.labels) < 0.12
    assert float(objective(c, exams, atlas, autoencoder, WHOLE).labels) == 0
    moved = c.clone()
    moved[1] = moved[1] + torch.tensor([0.15, 0.0, 0.0]).view(3, 1, 1, 1)
    moved.requires_grad_()
    terms = objective(moved, drawn, right, autoencoder, WHOLE)
    assert float(terms.labels.detach()) > float(perfect.labels) + 0.1
    (gradient,) = torch.autograd.grad(terms.labels, moved)
    assert float(gradient[1, 0].sum()) > 0  # less of the shift is better
    silent = drawn._replace(masks=drawn.masks.only(torch.zeros_like(drawn.foreground)))
    assert float(objective(c, silent, right, autoencoder, WHOLE).labels) == 0


def test_the_perfect_map_of_equal_exams_leaves_nothing(autoencoder):
    terms = objective(*alike(), autoencoder, WHOLE)
    assert float(terms.implicit) < 1e-4
    assert float(terms.explicit) < 0.01
    assert float(terms.edges) < 0.01
    assert float(terms.smooth_explicit) < 1e-6
    assert float(terms.smooth_implicit) < 1e-4
    assert float(terms.unsolved) < 1e-5
    assert float(terms.folded) == 0
    assert float(terms.converged) == 1
    assert float(terms.loss) < 0.05


def test_in_windows_the_perfect_map_is_near_its_least(autoencoder):
    c, exams, atlas = alike()
    good = objective(c, exams, atlas, autoencoder, Weights(window=8))
    bad = objective(c + 0.1, exams, atlas, autoencoder, Weights(window=8))
    assert float(good.explicit) < 0.15
    assert float(good.implicit) < 0.15
    assert float(bad.explicit) > float(good.explicit) + 0.05
    assert float(bad.implicit) == pytest.approx(float(good.implicit), abs=0.01)  # a common shift is no matter of pairs


def test_a_wrong_map_of_one_exam_is_seen_by_both_registrations(autoencoder):
    c, exams, atlas = alike()
    c = c.clone()
    c[1] = c[1] + torch.tensor([0.15, -0.1, 0.1]).view(3, 1, 1, 1)
    terms = objective(c, exams, atlas, autoencoder, WHOLE)
    assert float(terms.explicit) > 0.03
    assert float(terms.implicit) > 0.06


def test_the_loss_is_the_weighted_sum_of_its_terms(autoencoder):
    weights = Weights(1.5, 0.5, None, 2.0, 0.25, 0.75, 3.0, 0.6)
    maps, exams = random_maps(3, 2, 0.03), different(3)
    atlas, exams = labelled(alike(1)[2], exams)
    terms = objective(maps, exams, atlas, autoencoder, weights)
    named = ("explicit", "implicit", "edges", "smooth_explicit", "smooth_implicit", "unsolved", "labels")
    expected = sum(getattr(weights, name) * getattr(terms, name) for name in named)
    torch.testing.assert_close(terms.loss, expected)
    assert all(float(getattr(terms, name)) > 0 for name in named)


def run(maps: torch.Tensor, exams: Exams, atlas: Atlas, autoencoder: Autoencoder) -> tuple[Terms, list[torch.Tensor]]:
    """The terms, and the gradients to the maps and to the atlas."""
    maps, image = maps.clone().requires_grad_(), atlas.image.clone().requires_grad_()
    terms = objective(maps, exams, Atlas(image, atlas.mm_per_atlas), autoencoder, Weights(window=8))
    return terms, list(torch.autograd.grad(terms.loss, (maps, image)))


@pytest.mark.parametrize("size", [0.0, 0.01, 0.1, 1.0])
def test_terms_and_gradients_are_finite_on_any_map(size, autoencoder):
    terms, gradients = run(random_maps(3, 3, size), different(3), alike(1)[2], autoencoder)
    assert all(math.isfinite(float(term.detach())) for term in terms)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert gradients[0].abs().max() > 0
    assert 0 <= float(terms.folded) <= 1
    assert 0 <= float(terms.converged) <= 1


@pytest.mark.parametrize("kind", ["constant", "saturated", "no foreground", "no overlap", "one direction"])
def test_terms_and_gradients_are_finite_where_there_is_nothing_to_learn(kind, autoencoder):
    maps, exams = random_maps(2, 4, 0.02), different(2)
    if kind == "constant":
        maps = torch.full_like(maps, 0.2)
    elif kind == "saturated":
        maps = torch.ones_like(maps)
    elif kind == "no foreground":
        exams = exams._replace(foreground=torch.zeros_like(exams.foreground))
    elif kind == "no overlap":
        maps = maps * 0.3 + torch.tensor([0.5, -0.5]).view(2, 1, 1, 1, 1)
    else:
        maps = maps[:, :1].expand_as(maps)
    terms, gradients = run(maps, exams, alike(1)[2], autoencoder)
    assert all(math.isfinite(float(term.detach())) for term in terms)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_pairs_without_common_anatomy_count_for_nothing(autoencoder):
    c, exams, atlas = alike(4)
    c = 0.3 * c
    c = torch.cat([c[:2] - 0.5, c[2:] + 0.5])  # pairs 3→0 and 1→2 have nothing in common
    terms = objective(c, exams, atlas, autoencoder, WHOLE)
    assert float(terms.implicit) < 1e-3
    assert float(terms.converged) == 1
    apart = objective(torch.cat([c[:1], c[2:3]]), Exams(*(x[:2] for x in exams[:3])), atlas, autoencoder, WHOLE)
    for name in ("implicit", "smooth_implicit", "unsolved", "converged"):
        assert float(getattr(apart, name)) == 0


def test_the_order_of_the_exams_matters_only_to_the_pairing(autoencoder):
    maps, exams, atlas = random_maps(4, 5, 0.03), different(4), alike(1)[2]

    def terms_in(order: list[int]) -> Terms:
        return objective(maps[order], Exams(*(x[order] for x in exams[:3])), atlas, autoencoder, Weights(window=8))

    given = terms_in([0, 1, 2, 3])
    for turned in ([1, 2, 3, 0], [3, 0, 1, 2]):  # the same pairs
        for one, other in zip(given, terms_in(turned), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    mixed = terms_in([2, 0, 1, 3])
    for name in ("explicit", "smooth_explicit", "folded"):
        torch.testing.assert_close(getattr(given, name), getattr(mixed, name), atol=1e-5, rtol=1e-4)
    assert abs(float(given.implicit - mixed.implicit)) > 1e-5


def test_beyond_the_foreground_a_map_and_an_image_cost_nothing_explicit(autoencoder):
    c, exams, atlas = alike()
    hidden = ~exams.foreground
    inner = torch.nn.functional.max_pool3d(hidden.float(), 3, 1, 1) == 0
    exams = exams._replace(foreground=inner)  # central differences reach one voxel further
    maps = c.clone().requires_grad_()
    terms = objective(maps, exams, atlas, autoencoder, Weights(implicit=0, edges=1, smooth_implicit=0, unsolved=0))
    (gradient,) = torch.autograd.grad(terms.smooth_explicit + terms.folded, maps)
    assert (gradient[hidden.expand_as(c)] == 0).all()


def test_jacobians_from_mm_to_mm_are_those_of_the_map_in_mm():
    linear = torch.tensor([[1.0, 0.2, -0.1], [0.0, 0.9, 0.3], [0.1, 0.0, 1.2]])
    mm_in, mm_out = boxes(2), torch.diag_embed(torch.tensor([[90.0, 200.0, 130.0]]))
    in_boxes = torch.linalg.inv(mm_out) @ linear @ mm_in
    field = affine.apply(affine.from_parts(in_boxes, torch.zeros(2, 3)), grid.identity((4, 5, 6)))
    found = warp.to_mm(warp.jacobian(field), mm_out, mm_in)
    torch.testing.assert_close(found, linear.view(1, 3, 3, 1, 1, 1).expand_as(found), atol=1e-4, rtol=0)


def test_the_spacing_of_an_oblique_grid_in_mm():
    found = spacing_mm(boxes(2), torch.zeros(2, 1, 11, 6, 25))
    torch.testing.assert_close(found, torch.tensor([[30.0, 44.0, 20.0]] * 2))


def test_a_voxel_is_surrounded_where_its_six_neighbours_are():
    mask = torch.ones(1, 1, 5, 6, 7, dtype=torch.bool)
    mask[0, 0, 2, 3, 3] = False
    eroded = _erode(mask)
    expected = mask.clone()
    for i, j, k in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        expected[0, 0, 2 + i, 3 + j, 3 + k] = expected[0, 0, 2 - i, 3 - j, 3 - k] = False
    assert torch.equal(eroded, expected)


def test_what_the_solver_leaves_is_paid_in_voxels_with_the_place_held_fixed():
    where = grid.identity((8, 8, 8))
    place = where.clone().requires_grad_()
    everywhere = torch.ones(1, 1, 8, 8, 8, dtype=torch.bool)
    half = torch.zeros_like(everywhere)
    half[..., :4] = True
    shift = torch.tensor([2.0, 0.0, 0.0]).view(1, 3, 1, 1, 1) * 2 / 7  # two voxels of p's grid
    found = warp.Implicit(place, torch.full_like(where[:, :1], 2.0), ~everywhere, half)
    c_q = (0.5 * (where + shift)).requires_grad_()
    value = _unsolved(0.5 * where, c_q, found, everywhere, everywhere)
    expected = float(losses.huber(torch.tensor(2.0))) / 2  # on half of the foreground
    assert float(value.detach()) == pytest.approx(expected, rel=1e-3)
    gradient, to_place = torch.autograd.grad(value.sum(), (c_q, place), allow_unused=True)
    assert to_place is None
    assert (gradient[:, 0][half[:, 0]] > 0).all()
    assert (gradient[:, :, ..., 4:] == 0).all()
    solved = found._replace(valid=half)
    assert float(_unsolved(0.5 * where, c_q.detach(), solved, everywhere, everywhere)) == 0


def test_only_voxels_at_a_cut_count_as_cut_off():
    where = grid.identity((24,) * 3)
    body = where.norm(dim=1, keepdim=True) < 0.8
    below = where[:, 2:] < 0.2
    lost = cut_off(where, body & below, body.float())
    step = 2 / 23
    assert lost[body & below & (where[:, 2:] > 0.2 - step) & (where[:, :2].norm(dim=1, keepdim=True) < 0.5)].all()
    assert not lost[body & below & (where[:, 2:] < 0.2 - 2 * step)].any()


def test_what_is_not_compared_has_no_part_in_the_likeness(autoencoder):
    maps, exams, atlas = alike(1)
    upper = grid.identity((SIZE,) * 3)[:, 2:] > 0
    spoiled = autoencoder_features(autoencoder, exams.image, exams.mm_per_box)
    spoiled.edges[upper] = 7.0
    whole = explicit_terms(maps, exams, atlas, autoencoder, spoiled, None)
    part = explicit_terms(maps, exams, atlas, autoencoder, spoiled, None, exams.foreground & ~upper)
    assert whole.edges > 1
    assert part.edges < 0.1
    assert part.smooth == whole.smooth


SHAPE = (14, 16, 18)
LINEAR = torch.tensor(
    [
        [[0.50, 0.10, 0.00], [-0.08, 0.45, 0.05], [0.00, 0.06, 0.40]],
        [[0.42, -0.15, 0.03], [0.10, 0.55, 0.00], [-0.05, 0.00, 0.35]],
    ]
)
OFFSET = torch.tensor([[0.10, -0.05, 0.20], [-0.10, 0.10, -0.15]])
MM_PER_BOX = affine.rotation(torch.tensor([[0.1, -0.2, 0.3], [-0.4, 0.2, 0.1]])) @ torch.diag_embed(
    torch.tensor([[150.0, 110.0, 240.0], [90.0, 170.0, 120.0]])
)
MM_PER_ATLAS = affine.rotation(torch.tensor([[0.3, 0.1, -0.2]])) @ torch.diag_embed(
    torch.tensor([[210.0, 130.0, 90.0]])
)


def unequal() -> tuple[torch.Tensor, Exams]:
    """Two exams of unequal oblique boxes and foregrounds that show part of each other, and their maps, affine."""
    where = grid.identity(SHAPE)
    c = affine.apply(affine.from_parts(LINEAR, OFFSET), where.repeat(2, 1, 1, 1, 1))
    foreground = torch.cat([where.norm(dim=1, keepdim=True) < 1.1, where.sum(dim=1, keepdim=True) > -1.2])
    return c, Exams(image_at(c), foreground, MM_PER_BOX)


def between() -> torch.Tensor:
    """Where each of the two lies in the other's box: c_p⁻¹ ∘ c_q, beyond the box too."""
    maps = affine.from_parts(LINEAR, OFFSET)
    return affine.apply(torch.linalg.inv(maps[[1, 0]]) @ maps, grid.identity(SHAPE).repeat(2, 1, 1, 1, 1))


def roughness_of(mm_to_mm: torch.Tensor) -> list[float]:
    """Eq. 10 and 11 of linear maps: their volume changes alike everywhere, so that the shear alone is left."""
    shear = (torch.linalg.det(mm_to_mm) / mm_to_mm.norm(dim=1).prod(dim=1)).log().abs()
    return [0.5 * a * a if a < 0.5 else 0.5 * (a - 0.25) for a in shear.tolist()]


def test_the_smoothness_of_a_linear_map_is_that_of_its_shear_in_mm(autoencoder):
    c, exams = unequal()
    atlas = Atlas(image_at(grid.identity((20,) * 3)), MM_PER_ATLAS)
    target = autoencoder_features(autoencoder, exams.image, exams.mm_per_box)
    found = explicit_terms(c, exams, atlas, autoencoder, target, None)
    expected = roughness_of(MM_PER_ATLAS @ LINEAR @ torch.linalg.inv(MM_PER_BOX))
    assert min(expected) > 0.002
    assert found.smooth.tolist() == pytest.approx(expected, rel=1e-3)
    found = implicit_terms(c, exams, autoencoder, target, None)
    other = [1, 0]
    expected = roughness_of(MM_PER_BOX[other] @ torch.linalg.inv(LINEAR[other]) @ LINEAR @ torch.linalg.inv(MM_PER_BOX))
    assert min(expected) > 0.002
    assert found.smooth.tolist() == pytest.approx(expected, rel=1e-3)
    assert found.converged.tolist() == [1, 1]


def test_a_pair_is_compared_where_both_exams_show_it_and_nowhere_else(autoencoder):
    c, exams = unequal()
    there, other = between(), [1, 0]
    beyond = (there.abs() > 1.03).any(dim=1, keepdim=True)  # a place on a face counts as inside
    beyond |= grid.sample(exams.foreground[other].float(), there) < 0.5
    assert all(
        0.1 < float((beyond & exams.foreground)[exam].sum() / exams.foreground[exam].sum()) < 0.9 for exam in other
    )
    target = autoencoder_features(autoencoder, exams.image, exams.mm_per_box)
    slope = torch.tensor([3.0, -2.0, 1.0]).view(1, 3, 1, 1, 1)
    edges = (slope * c).sum(dim=1, keepdim=True) + torch.tensor([0.0, 2.0]).view(2, 1, 1, 1, 1)
    target = target._replace(edges=edges)
    found = implicit_terms(c, exams, autoencoder, target, None)
    assert found.overlap.tolist() == [1, 1]
    assert found.edges.tolist() == pytest.approx([4, 4], rel=0.01)
    fine, coarse = (part.clone() for part in target.features)
    shown = exams.foreground & ~beyond
    fine[~shown.expand_as(fine)] = 7.0
    half = grid.resize(shown.float(), tuple(coarse.shape[2:])) > 0.5
    coarse[~half.expand_as(coarse)] = 7.0
    again = implicit_terms(c, exams, autoencoder, target._replace(features=(fine, coarse)), None)
    torch.testing.assert_close(again.similarity, found.similarity)


def test_of_a_pair_structures_are_compared_where_both_exams_know_them(autoencoder):
    c, exams = unequal()
    target = autoencoder_features(autoencoder, exams.image, exams.mm_per_box)
    height = grid.identity(SHAPE)[:, 2].repeat(2, 1, 1, 1)
    number = torch.ones_like(height, dtype=torch.uint8)
    number[1] = height[1] < 2 / (SHAPE[2] - 1)  # one slice further than it is known
    ends = torch.tensor([[[-torch.inf, torch.inf]], [[-torch.inf, 0.0]]])
    drawn = Masks(number, height, ends, torch.ones_like(number, dtype=torch.bool))
    found = implicit_terms(c, exams._replace(masks=drawn), autoencoder, target, None)
    assert found.labels.tolist() == pytest.approx([0, 0], abs=1e-6)
    everything = drawn._replace(ends=ends[:1].repeat(2, 1, 1))
    wrong = implicit_terms(c, exams._replace(masks=everything), autoencoder, target, None)
    assert float(wrong.labels.min()) > 0.1


def test_the_edges_of_the_atlas_are_per_cm_of_the_atlas(autoencoder):
    slope = torch.tensor([0.2, -0.1, 0.15])
    height = (slope.view(1, 3, 1, 1, 1) * grid.identity((21, 25, 29))).sum(dim=1, keepdim=True)
    c, exams = 0.7 * grid.identity(SHAPE).repeat(2, 1, 1, 1, 1), unequal()[1]
    target = autoencoder_features(autoencoder, exams.image, exams.mm_per_box)
    target = target._replace(edges=torch.zeros_like(target.edges))
    found = explicit_terms(c, exams, Atlas(0.5 + height, MM_PER_ATLAS), autoencoder, target, None)
    per_cm = 10 * torch.linalg.solve(MM_PER_ATLAS[0].T, slope).norm()
    assert found.edges.tolist() == pytest.approx([float(per_cm.square())] * 2, rel=1e-3)
