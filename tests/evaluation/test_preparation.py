"""Preparation: values, channels and sizes as a backbone's card says."""

import pytest
import torch
from torch import Tensor, nn

from pixel_level_contrastive_learning.evaluation.preparation import Preparation
from pixel_level_contrastive_learning.weights import BackboneCard


def card(**settings) -> BackboneCard:
    plain = {
        "model": "torchvision/resnet18",
        "channels": 3,
        "image_size": (100, 200),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.25, 0.5),
        "pixel_layer": "layer4",
        "instance_layer": "avgpool",
    }
    return BackboneCard(**plain | settings)


def test_whole_images_are_fed_at_the_scale_of_the_views() -> None:
    prepare = Preparation.of(card())
    assert prepare.size == prepare.shortest == 140
    assert prepare.fitted((280, 560)) == (140, 280)
    assert prepare.fitted((560, 280)) == (280, 140)


@pytest.mark.parametrize(("size", "fed"), [(50, (50, 75)), ((48, 32), (48, 32))])
def test_a_size_is_the_shorter_side_or_both(size, fed) -> None:
    prepare = Preparation.of(card(), size)
    assert prepare.fitted((200, 300)) == fed
    assert prepare.resized(torch.rand(3, 200, 300)).shape == (3, *fed)


def test_an_image_decoded_smaller_is_fed_at_the_same_size() -> None:
    prepare = Preparation.of(card(), 50)
    assert prepare.resized(torch.rand(3, 101, 151), (201, 301)).shape == (3, 50, 75)


def test_networks_of_a_fixed_size_get_it() -> None:
    fixed = card(model="torchvision/vit_b_16", image_size=(96, 96))
    assert Preparation.of(fixed).size == (96, 96)
    assert Preparation.of(fixed, (96, 96)).size == (96, 96)
    with pytest.raises(ValueError) as error:
        Preparation.of(fixed, 128)
    assert str(error.value) == (
        "size is 128, but torchvision/vit_b_16 was built for images of 96x96 and takes no others; "
        "leave size out"
    )


class Picky(nn.Module):
    """A network that takes images of one size, or of sides that are multiples of 32."""

    def __init__(self, only: tuple[int, int] | None) -> None:
        super().__init__()
        self.only = only

    def forward(self, images: Tensor) -> Tensor:
        shape = tuple(images.shape[-2:])
        assert shape == self.only if self.only else all(side % 32 == 0 for side in shape)
        return images


def test_networks_that_refuse_whole_images_get_them_at_the_size_of_the_views() -> None:
    own = card(model="nets.py:picky", image_size=(96, 64))
    for net in (Picky((96, 64)), Picky(None)):
        assert Preparation.of(own, net=net).size == (96, 64)
        assert net.training
    assert Preparation.of(own, net=nn.Identity()).size == round(1.4 * 64)


@pytest.mark.parametrize("size", [65, (64, 96)])
def test_a_size_that_the_network_refuses_is_named(size) -> None:
    own = card(model="nets.py:picky", image_size=(96, 64))
    with pytest.raises(ValueError, match=r"which nets.py:picky refuses; give the 96 and 64 pixels"):
        Preparation.of(own, size, Picky((96, 64)))
    assert Preparation.of(own, (96, 64), Picky((96, 64))).size == (96, 64)


def test_a_size_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="size is 0; it must be a whole number of pixels"):
        Preparation.of(card(), 0)


def test_bytes_become_parts_of_one_and_are_normalised() -> None:
    prepare = Preparation.of(card(), 2)
    unit = prepare.in_range(torch.full((3, 2, 2), 255, dtype=torch.uint8), "a.png")
    assert unit.unique().tolist() == [1]
    assert prepare.normalised(unit)[:, 0, 0].tolist() == [1, 2, 1]


def test_deep_values_are_scaled_as_in_training() -> None:
    prepare = Preparation.of(card(low=(100, 0, 0), high=(300, 1, 1)), 2)
    raw = torch.tensor([50.0, 100, 200, 400]).view(1, 2, 2).expand(3, -1, -1)
    assert prepare.in_range(raw, "a.tif")[0].flatten().tolist() == [0, 0, 0.5, 1]


def test_deep_values_are_refused_by_weights_that_know_bytes() -> None:
    with pytest.raises(ValueError) as error:
        Preparation.of(card()).in_range(torch.rand(3, 2, 2), "some/a.tif")
    assert str(error.value) == (
        "some/a.tif holds 16-bit or float values, but these weights were trained on 8-bit images; "
        "give weights that were trained on such data, or write the images as 8-bit"
    )


def test_gray_becomes_colour_and_colour_gray() -> None:
    gray = torch.full((1, 2, 2), 51, dtype=torch.uint8)
    assert Preparation.of(card(), 2).in_range(gray, "a").shape == (3, 2, 2)
    one = card(channels=1, mean=(0.5,), std=(0.5,))
    colour = torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1)
    assert Preparation.of(one, 2).in_range(colour, "a").item() == pytest.approx(76 / 255)


def test_other_channels_are_refused_by_name() -> None:
    with pytest.raises(ValueError) as error:
        Preparation.of(card()).in_range(torch.zeros(5, 2, 2, dtype=torch.uint8), "a.tif")
    assert str(error.value) == (
        "a.tif has 5 channels, but the network takes 3; give images of 3 channels, or weights that "
        "were trained on 5"
    )
