"""Exports to frameworks: the ResNets of detectron2 and mmseg, by their own names, take them."""

import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pixel_level_contrastive_learning import export
from pixel_level_contrastive_learning.backbones.checkpoint import BackboneCard, save_backbone
from pixel_level_contrastive_learning.backbones.factory import build_backbone

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


class ConvNorm(nn.Conv2d):
    """A convolution of detectron2, which holds its norm."""

    def __init__(self, given: int, gives: int, side: int, stride: int = 1) -> None:
        super().__init__(given, gives, side, stride, side // 2, bias=False)
        self.norm = nn.BatchNorm2d(gives)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class DetectronBlock(nn.Module):
    """``BasicBlock`` or ``BottleneckBlock`` (STRIDE_IN_1X1 False) of detectron2."""

    def __init__(self, given: int, width: int, stride: int, deep: bool) -> None:
        super().__init__()
        gives = 4 * width if deep else width
        if given != gives:
            self.shortcut = ConvNorm(given, gives, 1, stride)
        self.conv1 = ConvNorm(given, width, 1) if deep else ConvNorm(given, width, 3, stride)
        self.conv2 = ConvNorm(width, width, 3, stride if deep else 1)
        if deep:
            self.conv3 = ConvNorm(width, gives, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x).relu())
        y = self.conv3(y.relu()) if hasattr(self, "conv3") else y
        return (y + (self.shortcut(x) if hasattr(self, "shortcut") else x)).relu()


class DetectronResNet(nn.Module):
    """``build_resnet_backbone`` of detectron2: stem and res2 to res5."""

    def __init__(self, depth: int, channels: int) -> None:
        super().__init__()
        self.stem = nn.Module()
        self.stem.conv1 = ConvNorm(channels, 64, 7, 2)
        given, deep = 64, depth >= 50
        for stage, count in enumerate(BLOCKS[depth], 2):
            width = 64 * 2 ** (stage - 2)
            gives, blocks = width * (4 if deep else 1), []
            for number in range(count):
                stride = 2 if stage > 2 and number == 0 else 1
                blocks.append(DetectronBlock(given, width, stride, deep))
                given = gives
            self.add_module(f"res{stage}", nn.Sequential(*blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(self.stem.conv1(x).relu(), 3, 2, 1)
        return self.res5(self.res4(self.res3(self.res2(x))))


def norm_shapes(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for part in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{part}", (width,)
    yield f"{name}.num_batches_tracked", ()


def mmseg_shapes(depth: int, channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of ``ResNet`` (style pytorch) in mmseg, by what its layers are called."""
    yield "conv1.weight", (64, channels, 7, 7)
    yield from norm_shapes("bn1", 64)
    given, deep = 64, depth >= 50
    for stage, count in enumerate(BLOCKS[depth], 1):
        width = 64 * 2 ** (stage - 1)
        gives = 4 * width if deep else width
        for number in range(count):
            block = f"layer{stage}.{number}"
            sides = [(given, width, 1), (width, width, 3), (width, gives, 1)]
            for place, (i, o, side) in enumerate(
                sides if deep else [(given, width, 3), (width, width, 3)], 1
            ):
                yield f"{block}.conv{place}.weight", (o, i, side, side)
                yield from norm_shapes(f"{block}.bn{place}", o)
            if given != gives:
                yield f"{block}.downsample.0.weight", (gives, given, 1, 1)
                yield from norm_shapes(f"{block}.downsample.1", gives)
            given = gives


@torch.no_grad()
@pytest.mark.parametrize(("depth", "channels"), [(18, 3), (34, 1), (50, 5), (101, 3)])
def test_the_resnets_of_detectron2_and_mmseg_take_an_export(depth, channels, tmp_path) -> None:
    model = f"torchvision/resnet{depth}"
    net = build_backbone(model, channels=channels)
    for norm in (module for module in net.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean.normal_(std=0.1)
        norm.running_var.uniform_(0.8, 1.2)
    half = (0.5,) * channels
    layers = {"pixel_layer": "layer4", "instance_layer": "avgpool"}
    card = BackboneCard(
        model=model, channels=channels, image_size=(64, 64), mean=half, std=half, **layers
    )
    save_backbone(tmp_path / "backbone.safetensors", net, card)

    detectron = DetectronResNet(depth, channels)
    weights = pickle.loads(export(tmp_path, "detectron2").path.read_bytes())["model"]
    detectron.load_state_dict({name: torch.as_tensor(tensor) for name, tensor in weights.items()})
    x = torch.rand(1, channels, 64, 64)
    net.fc, net.avgpool = nn.Identity(), nn.Identity()
    expected = net.eval()(x).unflatten(1, (-1, 2, 2))
    torch.testing.assert_close(detectron.eval()(x), expected)

    state = torch.load(export(tmp_path, "mmseg").path, weights_only=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert shapes == dict(mmseg_shapes(depth, channels))
    original = net.state_dict()
    assert all(torch.equal(tensor, original[name]) for name, tensor in state.items())
