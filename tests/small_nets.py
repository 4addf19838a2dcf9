"""Small networks for tests of hooks and feature info."""

from collections.abc import Callable

from torch import Tensor, nn


def chain(**layers: nn.Module) -> nn.Sequential:
    """Layers that run one after the other, each under its name."""
    net = nn.Sequential()
    for name, layer in layers.items():
        net.add_module(name, layer)
    return net


def small_net(channels: int = 3) -> nn.Sequential:
    """Maps of stride 8 and 16, their average, and a head."""
    return chain(
        stem=nn.Conv2d(channels, 8, 8, 8),
        norm=nn.BatchNorm2d(8),
        act=nn.ReLU(inplace=True),
        deep=nn.Conv2d(8, 12, 2, 2),
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(),
        head=nn.Linear(12, 5),
    )


class Calls(nn.Module):
    """A layer whose forward is a function of its layers and its input."""

    def __init__(self, function: Callable[[nn.Module, Tensor], object], **layers: nn.Module):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> object:
        return self.function(self, x)
