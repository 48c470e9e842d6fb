"""Votes: exams that look alike count, those on which a structure was not drawn have no say."""

import numpy as np
import pytest
import torch

from deepatlas import grid
from deepatlas import vote as vote_module
from deepatlas.checkpoint import MARGIN, Model
from deepatlas.embedding import Embedded, Likeness
from deepatlas.found import Found
from deepatlas.prepare import Prepared
from deepatlas.volume import Volume
from deepatlas.vote import Voter, locate_by_vote, vote
from exact import blank

SIZE = 24
PLAIN = Found("ball", 3, "present", 1.0, 0.5, None, None, None, None, -1)
NAMES = {"ball": 3, "rod": 5}


@pytest.fixture
def model() -> Model:
    """Its random features are features too."""
    torch.manual_seed(0)
    return blank()


def exam(seed: int = 0, shift: float = 0.0) -> Embedded:
    """A textured exam; a shift moves all of it along R, and its map with it."""
    where = grid.identity((SIZE,) * 3) + torch.tensor([shift, 0, 0]).view(1, 3, 1, 1, 1)
    x, y, z = where[0].numpy()
    hu = 200 * np.sin(5 * x + 3 * seed) * np.cos(4 * y - seed) + 100 * np.sin(6 * z + seed)
    return Embedded(
        Prepared(hu.astype(np.float32), np.ones((SIZE,) * 3, bool), np.diag([60.0, 60, 60, 1])), MARGIN * where
    )


def labels(shift: float = 0.0, *numbers: int) -> Volume:
    """A label map on the exam's grid."""
    where = grid.identity((SIZE,) * 3)[0].numpy() + np.array([shift, 0, 0]).reshape(3, 1, 1, 1)
    array = np.zeros((SIZE,) * 3, np.uint8)
    if 3 in numbers:
        array[(where**2).sum(axis=0) < 0.3] = 3
    if 5 in numbers:
        array[(np.abs(where[0] - 0.6) < 0.15) & (np.abs(where[1]) < 0.15)] = 5
    affine = np.diag([120 / (SIZE - 1)] * 3 + [1.0])
    affine[:3, 3] = -60
    return Volume(array, affine)


def owners(model: Model, here: Embedded, *voters: tuple[Embedded, Volume]) -> np.ndarray:
    """The outcome on the exam's grid."""
    image = Volume(here.prepared.hu, labels().affine)
    return vote(model, image, here, [Voter(*one) for one in voters], list(NAMES.values())).owner


def test_an_exam_that_votes_about_itself_repeats_its_labels(model):
    one, drawn = exam(), labels(0.0, 3, 5)
    owner = owners(model, one, (one, drawn))
    for number, value in enumerate(NAMES.values()):
        assert ((owner == number) != (drawn.array == value)).mean() < 0.02


def test_a_shifted_exam_votes_at_the_right_place(model):
    here, there = exam(), exam(shift=0.25)
    owner = owners(model, here, (there, labels(0.25, 3)))
    truth = labels(0.0, 3).array == 3
    assert 2 * ((owner == 0) & truth).sum() / ((owner == 0).sum() + truth.sum()) > 0.9


def test_where_a_structure_was_not_drawn_an_exam_has_no_say(model):
    one = exam()
    alone = owners(model, one, (one, labels(0.0, 3, 5)))
    with_others = owners(model, one, (one, labels(0.0, 3, 5)), (one, labels(0.0, 3)), (one, labels(0.0, 3)))
    assert (alone == 1).any()
    assert np.array_equal(alone == 1, with_others == 1)


def test_the_exam_that_looks_alike_outvotes_the_one_that_does_not(model):
    one, other = exam(), exam(seed=2)
    right, wrong = labels(0.0, 3), labels(0.5, 3)
    owner = owners(model, one, (one, right), (other, wrong))
    assert (owner == 0)[right.array == 3].mean() > 0.9
    assert (owner == 0)[(wrong.array == 3) & (right.array == 0)].mean() < 0.1


def test_nobody_owns_what_most_say_is_nothing(model):
    one = exam()
    assert (owners(model, one, (one, labels(0.0, 3)), (one, labels()), (one, labels(0.0, 3, 5))) == 1).sum() > 0
    apart = [(one, labels(shift, 3)) for shift in (-1.2, 0.0, 1.2)]
    assert not (owners(model, one, *apart) == 0).any()


def test_confidence_is_of_the_voted_mask_and_what_nobody_drew_is_not_told_of(model, monkeypatch):
    """Two voters who disagree about half of a ball leave it less sure than two who agree."""
    one, image = exam(), Volume(exam().prepared.hu, labels().affine)
    monkeypatch.setattr(Likeness, "around", lambda self, structure: 1.0)
    monkeypatch.setattr(vote_module, "locate", lambda model, exam, names, embedded: dict.fromkeys(names, PLAIN))
    monkeypatch.setattr(vote_module, "likeness_of", lambda model, embedded: Likeness(None, None, None))
    monkeypatch.setattr(Model, "structure", lambda self, name: None)
    agreed, split = (
        locate_by_vote(model, image, one, [Voter(one, labels(0.0, 3)), Voter(one, labels(shift, 3))], NAMES)
        for shift in (0.0, 0.3)
    )
    assert list(agreed) == list(split) == ["ball"]
    assert agreed["ball"].confidence > 0.95
    assert split["ball"].confidence < 0.85


def test_a_vote_counts_by_the_fourth_power_of_its_likeness(model, monkeypatch):
    one, outcome = exam(), {}
    for others in (5, 6):  # (.9 / .6)^4 is 5.06
        alike = iter([0.9] + [0.6] * others)
        monkeypatch.setattr("deepatlas.vote.local_correlation", lambda _a, image, _b: 0 * image + next(alike))  # noqa: B023
        outcome[others] = owners(model, one, (one, labels(0.0, 3)), *[(one, labels(0.8, 3))] * others)
    sure = (labels(0.0, 3).array == 3) & (labels(0.8, 3).array == 0)
    assert (outcome[5] == 0)[sure].mean() > 0.95
    assert not (outcome[6] == 0)[sure].any()


def test_beyond_the_prepared_box_nobody_has_a_say(model):
    one = exam()
    size = 20
    affine = np.diag([160 / (size - 1)] * 3 + [1.0])
    affine[:3, 3] = -80
    image, drawn = (Volume(np.full((size,) * 3, value, np.float32), affine) for value in (0, 3))
    owner = vote(model, image, one, [Voter(one, drawn)], [3]).owner
    away = np.abs(np.indices(owner.shape) * 160 / (size - 1) - 80).max(axis=0)  # the box ends at 60 mm
    assert (owner[away > 60] == -1).all()
    assert (owner[away < 60] == 0).mean() > 0.9
