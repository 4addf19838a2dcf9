"""Small networks, and views of nothing in particular, that tests share."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pixel_level_contrastive_learning import View
from pixel_level_contrastive_learning.geometry import box_to_map


def chain(**layers: nn.Module) -> nn.Sequential:
    """Layers that run one after the other, each under its name."""
    net = nn.Sequential()
    for name, layer in layers.items():
        net.add_module(name, layer)
    return net


class SmallNet(nn.Sequential):
    """Maps of stride 8 and 16, their average, and a head that nothing reaches."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 8, 8, 8)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.deep = nn.Conv2d(8, 12, 2, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flat = nn.Flatten()
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:  # in a forward of its own, since torch compiles none of torch's
            x = layer(x)
        return x


class Calls(nn.Module):
    """A layer whose forward is a function of its layers and its input."""

    def __init__(self, function: Callable[[nn.Module, Tensor], object], **layers: nn.Module):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> object:
        return self.function(self, x)


def overlapping_views(count: int = 4) -> tuple[View, View]:
    """Two noisy views of each image, of 64 x 64 pixels, the second mirrored."""
    boxes = torch.tensor([[0.0, 0, 96, 96], [30, 10, 110, 90]])
    maps = box_to_map(boxes, torch.tensor([False, True]))
    one, two = (
        View(torch.rand(count, 3, 64, 64), to_image.expand(count, 2, 3)) for to_image in maps
    )
    return one, two
