"""A labelled folder and a network, both small enough to be evaluated in a second."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

COLOURS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]])
NETWORK = """
from torch import nn

def small(channels=3):
    net = nn.Sequential()
    net.add_module("stem", nn.Conv2d(channels, 8, 3, stride=2, padding=1))
    net.add_module("norm", nn.BatchNorm2d(8))
    net.add_module("act", nn.ReLU())
    net.add_module("body", nn.Conv2d(8, 16, 3, stride=2, padding=1))
    net.add_module("pool", nn.AdaptiveAvgPool2d(1))
    net.add_module("flat", nn.Flatten())
    net.add_module("head", nn.Linear(16, 5))
    return net
"""


class Plain(nn.Module):
    """Gives the averages of patches of 4 x 4 pixels as features."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, channels, 4, stride=4, bias=False, groups=channels)
        nn.init.constant_(self.patches.weight, 1 / 16)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.patches(pixels)


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture
def plain() -> Plain:
    return Plain()


@pytest.fixture
def model(tmp_path) -> str:
    """The name of a small network in a file of one's own."""
    path = tmp_path / "networks" / "own.py"
    path.parent.mkdir(parents=True)
    path.write_text(NETWORK)
    return f"{path}:small"


@pytest.fixture
def labelled(tmp_path) -> Path:
    """Ten and four images of 32 x 48 pixels whose three classes are three colours and noise."""
    dice = np.random.default_rng(0)
    folder = tmp_path / "labelled"
    for split, count in (("train", 10), ("val", 4)):
        for number in range(count):
            mask = np.kron(dice.integers(0, 3, (4, 6)), np.ones((8, 8), int))
            image = COLOURS[mask] + dice.integers(-20, 20, (32, 48, 3))
            mask[:2] = 255
            save(folder / "images" / split / f"{number}.png", image)
            save(folder / "masks" / split / f"{number}.png", mask)
    (folder / "classes.txt").write_text("0 red\n1 green\n2 blue\n")
    return folder
