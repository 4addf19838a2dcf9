"""Dense features: what layers give, as maps, resized and stacked."""

import pytest
import torch
from small_cards import small_card
from small_nets import chain
from torch import Tensor, nn
from torch.nn.functional import interpolate

from pixel_level_contrastive_learning.backbones.checkpoint import BackboneCard
from pixel_level_contrastive_learning.evaluation import features
from pixel_level_contrastive_learning.evaluation.features import (
    Preparation,
    Reader,
    chosen_device,
    native_bfloat16,
)


@pytest.fixture
def net() -> nn.Sequential:
    return chain(
        one=nn.Conv2d(3, 4, 3, stride=2, padding=1),
        norm=nn.BatchNorm2d(4),
        two=nn.Conv2d(4, 5, 3, stride=2, padding=1),
        drop=nn.Dropout(0.9),
    )


def read(net: nn.Module, images: Tensor, *layers: str, fast: bool = False) -> Tensor:
    """The features of images."""
    size = images.shape[2], images.shape[3]
    return Reader(net, layers, images.shape[1], size, fast=fast)(images)


def test_a_layer_gives_what_it_gives_in_eval_mode(net) -> None:
    images = torch.rand(5, 3, 16, 24)
    maps = read(net, images, "two")
    net.eval()
    torch.testing.assert_close(maps, net.two(net.norm(net.one(images))).detach())


def test_features_are_read_in_bfloat16_where_the_device_has_it(net, monkeypatch) -> None:
    images = torch.rand(2, 3, 16, 24)
    exact = read(net, images, "two")
    for native in (True, False):
        monkeypatch.setattr(features, "native_bfloat16", lambda kind, native=native: native)
        fast = read(net, images, "two", fast=True)
        assert fast.dtype == torch.float32
        torch.testing.assert_close(fast, exact, atol=0.02, rtol=0.02)
        assert torch.equal(fast, exact) is not native


def test_a_network_in_halves_is_read_in_halves(net, monkeypatch) -> None:
    monkeypatch.setattr(features, "native_bfloat16", lambda _: True)
    images = torch.rand(2, 3, 16, 24)
    exact = read(net, images, "two")
    torch.testing.assert_close(
        read(net.half(), images, "two", fast=True), exact, atol=0.01, rtol=0.01
    )


def test_layers_are_resized_to_the_finest_and_stacked(net) -> None:
    images = torch.rand(2, 3, 16, 24)
    both = read(net, images, "two", "one")
    one, two = (read(net, images, name) for name in ("one", "two"))
    assert both.shape == (2, 9, 8, 12)
    torch.testing.assert_close(
        both, torch.cat([interpolate(two, (8, 12), mode="bilinear"), one], 1)
    )


def test_choices_of_layers_are_read_in_one_forward(net) -> None:
    images = torch.rand(2, 3, 16, 24)
    calls = []
    net.one.register_forward_hook(lambda *_: calls.append(1))
    reader = Reader(net, ["one", "two"], 3, (16, 24))
    calls.clear()
    maps = list(reader.read(images, [["two"], ["one", "two"]]))
    assert len(calls) == 1
    torch.testing.assert_close(maps[0], read(net, images, "two"))
    torch.testing.assert_close(maps[1], read(net, images, "one", "two"))


def test_the_network_stays_as_it_was(net) -> None:
    net.norm.eval()
    for weight in net.parameters():
        weight.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    images, state = torch.rand(2, 3, 16, 16), torch.get_rng_state()
    read(net, images, "two")
    assert [net.training, net.norm.training, net.drop.training] == [True, False, True]
    assert not any(weight.requires_grad for weight in net.parameters())
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(layer._forward_hooks for layer in net.modules())


def test_a_network_that_cannot_be_copied_is_refused_in_words() -> None:
    net = nn.utils.spectral_norm(nn.Conv2d(3, 4, 3))
    net(torch.rand(2, 3, 8, 8))  # leaves a weight that is no leaf, which deepcopy refuses
    with pytest.raises(ValueError, match=r"Conv2d cannot be copied.*utils\.parametrizations"):
        Reader(net, None, 3, (8, 8))


@pytest.mark.parametrize("name", ["cuda:9", "tpu9000"])
def test_a_device_that_is_not_here_is_refused(name) -> None:
    assert chosen_device("cpu") == torch.device("cpu")
    with pytest.raises(
        ValueError, match=f"device is '{name}', which is not available; choose from cpu"
    ):
        chosen_device(name)


def card(**settings) -> BackboneCard:
    plain = {"model": "torchvision/resnet18", "image_size": (100, 200), "std": (0.5, 0.25, 0.5)}
    return small_card(**plain | settings)


def test_whole_images_are_fed_at_the_scale_of_the_views() -> None:
    prepare = Preparation.of(card())
    assert prepare.size == prepare.shortest == 140
    assert prepare.fitted((280, 560)) == (140, 280)
    assert prepare.fitted((560, 280)) == (280, 140)


def test_strips_are_fed_with_no_more_pixels_than_an_image_of_sixteen_to_one() -> None:
    prepare = Preparation.of(card(), 320)
    assert prepare.fitted((40, 640)) == (320, 5120)
    assert prepare.fitted((40, 4000)) == (128, 12800)  # as many pixels
    assert prepare.fitted((4000, 40)) == (12800, 128)
    assert prepare.fitted((1, 10**7))[0] == 1


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
        "size is 128, but torchvision/vit_b_16 was built for images of 96x96 only; leave size out"
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
    picky = card(model="nets.py:picky", image_size=(96, 64))
    for net in (Picky((96, 64)), Picky(None)):
        assert Preparation.of(picky, net=net).size == (96, 64)
        assert net.training
    assert Preparation.of(picky, net=nn.Identity()).size == round(1.4 * 64)


@pytest.mark.parametrize("size", [65, (64, 96)])
def test_a_size_that_the_network_refuses_is_named(size) -> None:
    picky = card(model="nets.py:picky", image_size=(96, 64))
    with pytest.raises(ValueError, match=r"which nets.py:picky does not accept; give 96 64"):
        Preparation.of(picky, size, Picky((96, 64)))
    assert Preparation.of(picky, (96, 64), Picky((96, 64))).size == (96, 64)


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


def test_bfloat16_is_native_where_the_processor_says_so(monkeypatch) -> None:
    for amx, avx in ((True, False), (False, True), (False, False)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        assert native_bfloat16("cpu") is (amx or avx)
    assert not native_bfloat16("mps")
    for capability, native in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        assert native_bfloat16("cuda") is native
