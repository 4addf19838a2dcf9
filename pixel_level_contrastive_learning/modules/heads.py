"""The heads that are trained beside the backbone and thrown away after."""

from torch import nn


def map_head(channels: int, hidden: int, out: int) -> nn.Sequential:
    """The pixel projector: 1x1 convolution, batch norm, ReLU, 1x1 convolution (sec. 4.1)."""
    return nn.Sequential(
        nn.Conv2d(channels, hidden, 1),
        nn.BatchNorm2d(hidden),
        nn.ReLU(inplace=True),
        nn.Conv2d(hidden, out, 1),
    )


def vector_head(channels: int, hidden: int, out: int) -> nn.Sequential:
    """The same for vectors ``(b, c)``: the instance projector and its predictor."""
    return nn.Sequential(
        nn.Linear(channels, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, out),
    )
