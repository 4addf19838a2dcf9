"""The heads that are trained beside the backbone and thrown away after.

The paper's (sec. 4.1) are two layers with batch norm between them. The projectors here end in a
batch norm without weights besides: cosines only see how projections differ if what they all share
is taken away, and with a fast optimiser a network learns what they share first. Without it any two
pixels of a batch have a cosine of 0.98 within 25 steps, and nothing is left to learn from.
"""

from torch import nn


def map_projector(channels: int, hidden: int, out: int) -> nn.Sequential:
    """From maps ``(b, channels, h, w)`` to ``(b, out, h, w)``: each channel of mean 0."""
    return nn.Sequential(
        nn.Conv2d(channels, hidden, 1),
        nn.BatchNorm2d(hidden),
        nn.ReLU(inplace=True),
        nn.Conv2d(hidden, out, 1, bias=False),
        nn.BatchNorm2d(out, affine=False),
    )


def vector_projector(channels: int, hidden: int, out: int) -> nn.Sequential:
    """The same from vectors ``(b, channels)`` to ``(b, out)``."""
    return nn.Sequential(
        nn.Linear(channels, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, out, bias=False),
        nn.BatchNorm1d(out, affine=False),
    )


def predictor(size: int, hidden: int) -> nn.Sequential:
    """From what the online network says of an image to what the target will say of it."""
    return nn.Sequential(
        nn.Linear(size, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, size),
    )
