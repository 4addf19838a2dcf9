"""Backbones: from a name to a network."""

import sys
from urllib.error import URLError

import pytest
import timm
import torch
from torch import nn
from torchvision import models

from pixel_level_contrastive_learning.backbones.factory import (
    LayerInfo,
    build_backbone,
    default_image_size,
    default_statistics,
    list_layers,
)
from pixel_level_contrastive_learning.backbones.stem import adapt_input_conv
from pixel_level_contrastive_learning.modules.feature_info import FeatureInfo

# Names.


def open_test_resnet() -> nn.Module:
    """timm's network, with the start that ours begins with."""
    net: nn.Module = timm.create_model("test_resnet", zero_init_last=False)
    return net


@pytest.mark.parametrize(
    ("model", "plain"),
    [
        ("torchvision/resnet18", models.resnet18),
        ("torchvision/mobilenet_v3_small", models.mobilenet_v3_small),
        ("timm/test_resnet", open_test_resnet),
        ("timm/test_resnet.r160_in1k", open_test_resnet),
    ],
)
def test_a_network_is_what_its_library_builds(model, plain) -> None:
    torch.manual_seed(3)
    net = build_backbone(model)
    torch.manual_seed(3)
    expected = plain().state_dict()
    assert net.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (
            "torchvision/resnet5O",
            "model is 'torchvision/resnet5O'; torchvision has no such network: perhaps "
            "torchvision/resnet50 or torchvision/resnet152 or torchvision/resnet34",
        ),
        ("timm/convnext_atoo", "timm has no such network: perhaps timm/convnext_atto or "),
        ("timm/convnext_atoo.d2_in1k", "timm has no such network: perhaps timm/convnext_atto"),
        (
            "resnet18",
            "model is 'resnet18'; it has no library: perhaps torchvision/resnet18 or timm/resnet18",
        ),
        (
            "nets/mine.py",
            "model is 'nets/mine.py'; it has no library: give torchvision/NAME, timm/NAME, "
            "hf://OWNER/NAME or path/to/file.py:function",
        ),
        ("torchvision/zzz", "torchvision has no such network: give torchvision/NAME"),
        ("torchvision/fcn_resnet50", "torchvision has no such network"),
        ("", "it has no library: give"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(model, complaint) -> None:
    with pytest.raises(ValueError) as error:
        build_backbone(model)
    assert complaint in str(error.value)


def test_senseless_values_are_refused_together() -> None:
    with pytest.raises(ValueError) as error:
        build_backbone("torchvision/resnet18", channels=0, image_size=(0, 3))
    assert [line.split(" is ")[0] for line in str(error.value).split("\n")] == [
        "channels",
        "image_size",
    ]


def test_without_timm_there_is_torchvision(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    build_backbone("torchvision/squeezenet1_1")
    with pytest.raises(ModuleNotFoundError) as error:
        build_backbone("timm/resnet18")
    assert error.value.name == "timm"


# Channels and sizes.


@pytest.mark.parametrize(
    ("model", "channels"),
    [
        ("torchvision/resnet18", 1),
        ("torchvision/resnet18", 5),
        ("torchvision/swin_t", 2),
        ("torchvision/mobilenet_v3_small", 4),
        ("torchvision/convnext_tiny", 5),
        ("torchvision/googlenet", 2),
        ("timm/test_convnext", 1),
        ("timm/test_efficientnet", 5),
    ],
)
def test_images_of_any_channels_are_taken(model, channels) -> None:
    net = build_backbone(model, channels=channels, image_size=(64, 96)).eval()
    assert net(torch.rand(1, channels, 64, 96)).shape == (1, 1000)


def test_random_kernels_are_not_repeated() -> None:
    stem = build_backbone("torchvision/mobilenet_v3_small", channels=6).features[0][0].weight
    assert not torch.equal(stem[:, 0], stem[:, 3])


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "regnety_002"])
def test_random_blocks_of_timm_begin_open(name) -> None:
    def shut(net: nn.Module) -> int:
        norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
        return sum(not norm.weight.any() for norm in norms)

    assert shut(build_backbone(f"timm/{name}")) == 0
    assert shut(timm.create_model(name)) > 0


@pytest.mark.parametrize("model", ["timm/test_vit", "timm/test_maxvit", "timm/test_coatnet"])
def test_networks_of_fixed_size_are_built_for_the_images(model) -> None:
    net = build_backbone(model, channels=2, image_size=(64, 128)).eval()
    assert net(torch.rand(1, 2, 64, 128)).shape == (1, 1000)


def test_transformers_of_torchvision_are_built_for_the_images() -> None:
    net = build_backbone("torchvision/vit_b_32", channels=2, image_size=64).eval()
    assert net(torch.rand(1, 2, 64, 64)).shape == (1, 1000)
    with pytest.raises(ValueError) as error:
        build_backbone("torchvision/vit_b_32", image_size=(64, 96))
    assert str(error.value) == (
        "torchvision/vit_b_32 takes square images only, not 64x96; give one side, or use a ViT of "
        "timm, such as timm/vit_base_patch16_224"
    )
    with pytest.raises(ValueError) as error:
        build_backbone("torchvision/vit_b_32", image_size=(50, 50))
    assert str(error.value) == (
        "torchvision/vit_b_32 cannot be built for images of 50x50: Input shape indivisible by "
        "patch size!; it is made for 224x224"
    )


@pytest.mark.parametrize(
    ("model", "size"),
    [
        ("torchvision/resnet50", None),
        ("torchvision/swin_t", None),
        ("torchvision/vit_b_16", (224, 224)),
        ("torchvision/maxvit_t", (224, 224)),
        ("timm/convnext_tiny", None),
        ("timm/test_vit", (160, 160)),
        ("timm/swinv2_tiny_window8_256", (256, 256)),
        ("my.nets:build", None),
    ],
)
def test_the_size_that_a_network_wants(model, size) -> None:
    assert default_image_size(model) == size


def test_the_statistics_that_a_network_expects() -> None:
    red = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert default_statistics("torchvision/resnet50", 3) == red
    assert default_statistics("timm/resnet50", 3) == red
    assert default_statistics("timm/test_vit", 2) == ((0.5, 0.5), (0.5, 0.5))
    mean, std = default_statistics("torchvision/resnet50", 2)
    assert mean == pytest.approx([1.347 / 3] * 2)
    assert std == pytest.approx([0.678 / 3] * 2)


# Pretrained weights, fetched from a library that has them at hand.


@pytest.fixture
def fetched(monkeypatch) -> dict[str, torch.Tensor]:
    """The weights that any name leads to; fill it."""
    state: dict[str, torch.Tensor] = {}
    get = "torchvision.models._api.load_state_dict_from_url"
    monkeypatch.setattr(get, lambda *_, **__: dict(state))
    hub = "timm.models._builder.load_state_dict_from_hf"
    monkeypatch.setattr(hub, lambda *_, **__: dict(state))
    return state


@pytest.mark.parametrize(
    ("model", "stem"),
    [
        ("torchvision/mobilenet_v3_small", "features.0.0.weight"),
        ("timm/test_resnet", "conv1.0.weight"),
    ],
)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pretrained_weights_are_kept_for_any_channels(model, stem, channels, fetched) -> None:
    fetched.update(build_backbone(model).state_dict())
    net = build_backbone(model, channels=channels, pretrained=True)
    for name, value in net.state_dict().items():
        expected = fetched[name]
        if name == stem and channels != 3:
            expected = adapt_input_conv(channels, expected)
        torch.testing.assert_close(value, expected)


def test_pretrained_transformers_are_fitted_to_the_images(fetched) -> None:
    fetched.update(build_backbone("timm/test_vit").state_dict())
    net = build_backbone("timm/test_vit", channels=2, image_size=(64, 96), pretrained=True)
    assert torch.equal(net.head.weight, fetched["head.weight"])
    assert net.pos_embed.shape[1] == 4 * 6 + 1
    assert net.eval()(torch.rand(1, 2, 64, 96)).shape == (1, 1000)


def test_pretrained_transformers_of_torchvision_are_fitted_to_the_images(fetched) -> None:
    fetched.update(build_backbone("torchvision/vit_b_32").state_dict())
    nn.init.normal_(fetched["encoder.pos_embedding"])
    net = build_backbone("torchvision/vit_b_32", channels=1, image_size=(64, 64), pretrained=True)
    state = net.state_dict()
    assert torch.equal(state["heads.head.weight"], fetched["heads.head.weight"])
    given = fetched["encoder.pos_embedding"]
    assert state["encoder.pos_embedding"].shape == (1, 5, 768)
    assert torch.equal(state["encoder.pos_embedding"][:, 0], given[:, 0])
    torch.testing.assert_close(
        state["conv_proj.weight"], fetched["conv_proj.weight"].sum(1, keepdim=True)
    )


@pytest.mark.parametrize("model", ["torchvision/mobilenet_v3_small", "timm/test_resnet"])
def test_a_failed_download_says_what_to_do(model, monkeypatch) -> None:
    def down(*_, **__):
        raise URLError("Name or service not known")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", down)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", down)
    with pytest.raises(ConnectionError) as error:
        build_backbone(model, pretrained=True)
    assert str(error.value) == (
        f"the pretrained weights of {model} could not be downloaded: <urlopen error Name or "
        "service not known>; check the connection and the free disk space, or download them on "
        "another machine and give the file, or start from random weights"
    )


def test_models_without_pretrained_weights_are_refused() -> None:
    without = next(name for name in timm.list_models() if not timm.is_model_pretrained(name))
    with pytest.raises(ValueError) as error:
        build_backbone(f"timm/{without}", pretrained=True)
    assert str(error.value) == (
        f"timm has no weights for timm/{without}; start from random ones, or give a file"
    )


# Layers.


def test_the_layers_of_a_resnet() -> None:
    net = build_backbone("torchvision/resnet18", channels=2)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    layers = {layer.name: layer for layer in list_layers(FeatureInfo(net, 2, (128, 192)))}
    for name, stride, channels, grid in (
        ("conv1", 2, 64, (64, 96)),
        ("maxpool", 4, 64, (32, 48)),
        ("layer1", 4, 64, (32, 48)),
        ("layer2", 8, 128, (16, 24)),
        ("layer3", 16, 256, (8, 12)),
        ("layer4", 32, 512, (4, 6)),
    ):
        assert layers[name] == LayerInfo(name, layers[name].type_name, stride, channels, grid)
    assert layers["avgpool"].grid == (1, 1)
    assert layers["layer4"].type_name == "Sequential"
    assert "layer4.1" not in layers  # gives the very tensor of layer4
    assert "layer4.0" in layers
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_layers_of_a_transformer_and_its_refusal() -> None:
    net = build_backbone("timm/test_vit", image_size=(64, 96))
    layers = {layer.name: layer for layer in list_layers(FeatureInfo(net, 3, (64, 96)))}
    assert layers["norm"] == LayerInfo("norm", "LayerNorm", 16, 64, (4, 6))
    with pytest.raises(ValueError, match="cannot take images of shape"):
        list_layers(FeatureInfo(net, 4, (64, 96)))


def test_of_layers_with_one_output_the_shortest_name_is_listed() -> None:
    inner = nn.Sequential(nn.Conv2d(3, 4, 3))
    net = nn.Sequential(inner, nn.Sequential(nn.Identity()))
    assert [layer.name for layer in list_layers(FeatureInfo(net, 3, (32, 32)))] == ["0"]


def test_frozen_layers_are_not_listed() -> None:
    net = build_backbone("torchvision/resnet18")
    net.conv1.requires_grad_(False)
    names = [layer.name for layer in list_layers(FeatureInfo(net, 3, (64, 64)))]
    assert "conv1" not in names
    assert "layer1" in names
