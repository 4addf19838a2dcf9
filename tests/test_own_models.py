"""Own models: networks built by a function of the user's."""

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pixel_level_contrastive_learning.own_models import own_net

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
