"""Networks small enough to be evaluated in a second, and what they are evaluated on."""

import pytest
from small_nets import chain
from torch import nn

from pixel_level_contrastive_learning.data.segmentation import SegmentationDataset, open_labelled
from pixel_level_contrastive_learning.evaluation.features import Reader

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


@pytest.fixture
def plain() -> nn.Sequential:
    """Gives the averages of patches of 4 x 4 pixels as features."""
    net = chain(patches=nn.Conv2d(3, 3, 4, stride=4, bias=False, groups=3))
    nn.init.constant_(net.patches.weight, 1 / 16)
    return net


@pytest.fixture
def model(tmp_path) -> str:
    """The name of a small network in a file of one's own."""
    path = tmp_path / "networks" / "own.py"
    path.parent.mkdir(parents=True)
    path.write_text(NETWORK)
    return f"{path}:small"


@pytest.fixture
def reader(plain) -> Reader:
    """Of the averages of the labelled images' patches."""
    return Reader(plain, ["patches"], 3, (32, 48))


@pytest.fixture
def train(labelled) -> SegmentationDataset:
    """The ten labelled images."""
    return open_labelled(labelled)[0]


@pytest.fixture
def val(labelled) -> SegmentationDataset:
    """The four labelled images."""
    return open_labelled(labelled)[1]
