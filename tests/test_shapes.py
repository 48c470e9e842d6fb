"""The names of tensors say what they hold, and refuse what they do not."""

import torch

from deepatlas import shapes


def holds(name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor is what a name of `shapes` stands for."""
    return isinstance(tensor, getattr(shapes, name))


def test_images_have_one_channel_and_coordinates_three():
    one, three = torch.zeros(2, 1, 4, 5, 6), torch.zeros(2, 3, 4, 5, 6)
    assert holds("Image", one)
    assert not holds("Image", three)
    assert holds("Coordinates", three)
    assert not holds("Coordinates", one)
    assert holds("Features", three)
    assert not holds("Features", three[0])


def test_masks_are_boolean_and_the_rest_is_floating():
    field = torch.zeros(1, 1, 4, 5, 6)
    assert holds("Mask", field.bool())
    assert not holds("Mask", field)
    assert not holds("Image", field.long())
    assert holds("Image", field.double())


def test_points_and_affines():
    assert holds("Points", torch.zeros(2, 3, 11))
    assert not holds("Points", torch.zeros(2, 11, 3))
    assert holds("Affine", torch.eye(4)[None])
    assert not holds("Affine", torch.eye(4))
    assert not holds("Affine", torch.zeros(1, 3, 4))
