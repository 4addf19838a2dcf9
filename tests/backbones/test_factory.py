"""Backbones: from a name to a network."""

import os
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import timm
import torch
from torch import nn
from torchvision import models

from pixel_level_contrastive_learning.backbones.factory import (
    TappableLayer,
    build_backbone,
    default_image_size,
    default_statistics,
    own_net,
    tappable_layers,
)
from pixel_level_contrastive_learning.backbones.stem import spread_kernels

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
    assert all(torch.equal(held, expected[name]) for name, held in net.state_dict().items())


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
            "model is 'nets/mine.py'; it has no library: give torchvision/NAME, timm/NAME or "
            "path/to/file.py:function",
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


def test_an_own_function_is_built(tmp_path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from torch import nn\ndef net(channels): return nn.Conv2d(channels, 8, 3)\n")
    assert build_backbone(f"{file}:net", channels=6).in_channels == 6


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
    with pytest.raises(ValueError, match="timm is not installed; pip install timm"):
        build_backbone("timm/resnet18")


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
        "torchvision/vit_b_32 takes square images only, not 64x96; give one side, or take a ViT of "
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
    for name, held in net.state_dict().items():
        expected = fetched[name]
        if name == stem and channels != 3:
            expected = spread_kernels(expected, channels)
        torch.testing.assert_close(held, expected)


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
def test_without_a_connection_one_is_told_what_to_do(model, monkeypatch) -> None:
    def down(*_, **__):
        raise URLError("Name or service not known")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", down)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", down)
    with pytest.raises(ConnectionError) as error:
        build_backbone(model, pretrained=True)
    assert str(error.value) == (
        f"the pretrained weights of {model} could not be fetched: <urlopen error Name or service "
        "not known>; look at the connection, or fetch them on another machine and give the file, "
        "or start from random weights"
    )


def test_weights_that_nobody_made_are_refused() -> None:
    without = next(name for name in timm.list_models() if not timm.is_model_pretrained(name))
    with pytest.raises(ValueError) as error:
        build_backbone(f"timm/{without}", pretrained=True)
    assert str(error.value) == (
        f"timm has no weights for timm/{without}; start from random ones, or give a file"
    )


# Layers.


def test_the_layers_of_a_resnet() -> None:
    net = build_backbone("torchvision/resnet18", channels=2)
    before = {name: held.clone() for name, held in net.state_dict().items()}
    layers = {layer.name: layer for layer in tappable_layers(net, 2, (128, 192))}
    for name, stride, channels, grid in (
        ("conv1", 2, 64, (64, 96)),
        ("maxpool", 4, 64, (32, 48)),
        ("layer1", 4, 64, (32, 48)),
        ("layer2", 8, 128, (16, 24)),
        ("layer3", 16, 256, (8, 12)),
        ("layer4", 32, 512, (4, 6)),
    ):
        assert layers[name] == TappableLayer(name, layers[name].type_name, stride, channels, grid)
    assert layers["avgpool"].grid == (1, 1)
    assert layers["layer4"].type_name == "Sequential"
    assert "layer4.1" not in layers  # gives the very tensor of layer4
    assert "layer4.0" in layers
    assert all(torch.equal(held, before[name]) for name, held in net.state_dict().items())


def test_the_layers_of_a_transformer_and_its_refusal() -> None:
    net = build_backbone("timm/test_vit", image_size=(64, 96))
    layers = {layer.name: layer for layer in tappable_layers(net, 3, (64, 96))}
    assert layers["norm"] == TappableLayer("norm", "LayerNorm", 16, 64, (4, 6))
    with pytest.raises(ValueError, match="cannot take images of shape"):
        tappable_layers(net, 4, (64, 96))


def test_of_layers_with_one_output_the_shortest_name_is_listed() -> None:
    inner = nn.Sequential(nn.Conv2d(3, 4, 3))
    net = nn.Sequential(inner, nn.Sequential(nn.Identity()))
    assert [layer.name for layer in tappable_layers(net, 3, (32, 32))] == ["0"]


def test_frozen_layers_are_not_listed() -> None:
    net = build_backbone("torchvision/resnet18")
    net.conv1.requires_grad_(False)
    names = [layer.name for layer in tappable_layers(net, 3, (64, 64))]
    assert "conv1" not in names
    assert "layer1" in names


SOURCE = """
from dataclasses import dataclass

import layers_beside
import torch
from torch import nn


@dataclass
class Settings:
    width: int = 4


def build(channels, image_size=(1, 1)):
    net = layers_beside.stem(channels, Settings().width)
    net.image_size = image_size
    return net


def late(seed=0):  # its first convolution is not the one that sees the image
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.stem = nn.Conv2d(4, 2, 1), nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.head(self.stem(x))

    return Late()


def rgb():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())


def learned(pretrained=False):
    net = rgb()
    return net.requires_grad_(not pretrained)


def nothing():
    return "a network"


NUMBER = 7
"""


@pytest.fixture
def file(tmp_path) -> Path:
    """A file with functions, and one beside it that it imports."""
    (tmp_path / "my_nets.py").write_text(SOURCE)
    (tmp_path / "layers_beside.py").write_text(
        "from torch import nn\ndef stem(i, o): return nn.Sequential(nn.Conv2d(i, o, 3))\n"
    )
    yield tmp_path / "my_nets.py"
    sys.modules.pop("layers_beside", None)
    sys.modules.pop("my_nets", None)


def test_a_function_is_told_what_its_signature_takes(file) -> None:
    before = list(sys.path)
    net = own_net(f"{file}:build", 5, (32, 48), False)
    assert net[0].in_channels == 5
    assert net.image_size == (32, 48)
    assert own_net(f"{file}:build", 5, None, False).image_size == (1, 1)
    assert sys.path == before


def test_a_module_is_found_from_where_one_stands(file, monkeypatch) -> None:
    monkeypatch.chdir(file.parent)
    assert own_net("my_nets:build", 2, None, False)[0].in_channels == 2


def test_a_path_from_here_and_from_home(file, monkeypatch) -> None:
    monkeypatch.chdir(file.parent)
    monkeypatch.setenv("HOME", str(file.parent))
    for name in ("my_nets.py", f".{os.sep}my_nets.py", f"~{os.sep}my_nets.py"):
        assert own_net(f"{name}:rgb", 3, None, False)[0].in_channels == 3


def test_a_stem_is_adapted_where_the_function_knows_of_no_channels(file) -> None:
    assert own_net(f"{file}:rgb", 4, (32, 32), False)(torch.rand(1, 4, 8, 8)).shape[1] == 4


def test_a_network_that_takes_the_images_is_left_as_it_is(file) -> None:
    net = own_net(f"{file}:late", 3, (32, 32), False)
    assert (net.head.in_channels, net.stem.in_channels) == (4, 3)


def test_a_changed_file_is_read_anew(file) -> None:
    own_net(f"{file}:rgb", 3, None, False)
    file.write_text(SOURCE.replace("nn.Conv2d(3, 4, 3), nn.ReLU()", "nn.Conv2d(3, 99, 3)"))
    os.utime(file, (1, 1))  # as if written within the same second
    assert own_net(f"{file}:rgb", 3, None, False)[0].out_channels == 99


def test_weights_of_ones_own_are_asked_for(file) -> None:
    assert not own_net(f"{file}:learned", 3, None, True)[0].weight.requires_grad
    assert own_net(f"{file}:learned", 3, None, False)[0].weight.requires_grad
    with pytest.raises(ValueError, match=r"my_nets\.py:rgb takes no pretrained="):
        own_net(f"{file}:rgb", 3, None, True)


def test_what_is_not_there_is_named(file) -> None:
    with pytest.raises(ValueError) as error:
        own_net(f"{file}:biuld", 3, None, False)
    assert str(error.value) == f"{file} has no function 'biuld'; perhaps build"
    with pytest.raises(ValueError, match="has no function 'NUMBER'; name a function"):
        own_net(f"{file}:NUMBER", 3, None, False)
    with pytest.raises(ValueError, match=r"there is no file no\.py; give the path"):
        own_net("no.py:build", 3, None, False)
    with pytest.raises(ValueError, match="there is no module 'no_nets'; give a path"):
        own_net("no_nets:build", 3, None, False)
    with pytest.raises(ValueError, match=r"gave str; it must return a torch\.nn\.Module"):
        own_net(f"{file}:nothing", 3, None, False)


@pytest.mark.parametrize(
    "source", ["import no_such_library", "def build():\n    import no_such_library"]
)
def test_modules_that_are_nowhere_are_named(file, source) -> None:
    file.write_text(source)
    with pytest.raises(ValueError, match=r"my_nets.py:build imports no_such_library, which is not"):
        own_net(f"{file}:build", 3, None, False)


def test_a_function_may_import_what_lies_beside_it_when_it_is_called(file) -> None:
    file.write_text("def build():\n    from layers_beside import stem\n    return stem(3, 4)")
    sys.modules.pop("layers_beside", None)
    path = list(sys.path)
    assert isinstance(own_net(f"{file}:build", 3, None, False), nn.Module)
    assert sys.path == path


def test_classes_serve_as_functions() -> None:
    assert isinstance(own_net("torch.nn:Identity", 3, None, False), nn.Identity)
