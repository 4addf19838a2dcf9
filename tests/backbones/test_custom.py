"""Functions of the user, in a file or a module, that build a network."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from pixel_level_contrastive_learning.backbones.factory import build_backbone

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


READY = rgb()


NUMBER = 7
"""


@pytest.fixture
def file(tmp_path) -> Iterator[Path]:
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
    net = build_backbone(f"{file}:build", channels=5, image_size=(32, 48))
    assert net[0].in_channels == 5
    assert net.image_size == (32, 48)
    assert build_backbone(f"{file}:build", channels=5).image_size == (1, 1)
    assert sys.path == before


def test_a_module_is_found_from_where_one_stands(file, monkeypatch) -> None:
    monkeypatch.chdir(file.parent)
    assert build_backbone("my_nets:build", channels=2)[0].in_channels == 2


def test_a_path_from_here_and_from_home(file, monkeypatch) -> None:
    monkeypatch.chdir(file.parent)
    monkeypatch.setenv("HOME", str(file.parent))
    for name in ("my_nets.py", f".{os.sep}my_nets.py", f"~{os.sep}my_nets.py"):
        assert build_backbone(f"{name}:rgb")[0].in_channels == 3


def test_a_stem_is_adapted_where_the_function_knows_of_no_channels(file) -> None:
    assert (
        build_backbone(f"{file}:rgb", channels=4, image_size=(32, 32))(
            torch.rand(1, 4, 8, 8)
        ).shape[1]
        == 4
    )


def test_a_network_that_takes_the_images_is_left_as_it_is(file) -> None:
    net = build_backbone(f"{file}:late", image_size=(32, 32))
    assert (net.head.in_channels, net.stem.in_channels) == (4, 3)


SOURCE_OF_REFUSALS = """
from torch import nn

class Picky(nn.Module):
    def __init__(self, stem):
        super().__init__()
        self.stem = stem

    def forward(self, x):
        if x.shape[-1] != 32:
            raise ValueError("I take 32 pixels only")
        return self.stem(x.flatten(1) if isinstance(self.stem, nn.Linear) else x)

def with_stem():
    return Picky(nn.Conv2d(3, 4, 3))

def without_stem():
    return Picky(nn.Linear(3 * 32 * 32, 4))
"""


@pytest.mark.parametrize("function", ["with_stem", "without_stem"])
def test_what_a_network_itself_refuses_is_not_taken_for_its_channels(tmp_path, function) -> None:
    (tmp_path / "picky.py").write_text(SOURCE_OF_REFUSALS)
    name = f"{tmp_path / 'picky.py'}:{function}"
    message = rf"picky\.py:{function} builds .* 64, 64\): I take 32 pixels only; .* channels= and"
    with pytest.raises(ValueError, match=message):
        build_backbone(name, image_size=64)
    for size in (32, None):
        assert build_backbone(name, image_size=size).stem.weight.shape[0] == 4


def test_a_changed_file_is_read_anew(file) -> None:
    build_backbone(f"{file}:rgb")
    file.write_text(SOURCE.replace("nn.Conv2d(3, 4, 3), nn.ReLU()", "nn.Conv2d(3, 99, 3)"))
    os.utime(file, (1, 1))  # as if written within the same second
    assert build_backbone(f"{file}:rgb")[0].out_channels == 99


def test_each_file_imports_what_lies_beside_it_whatever_lay_beside_another(tmp_path) -> None:
    def build(folder: str, channels: int) -> nn.Module:
        file = tmp_path / folder / "net.py"
        file.parent.mkdir(exist_ok=True)
        (file.parent / "parts").mkdir(exist_ok=True)
        (file.parent / "parts" / "stem.py").write_text(
            f"from torch import nn\nlayer = nn.Conv2d(3, {channels}, 3)\n"
        )
        file.write_text(
            "from parts.stem import layer\nfrom torch import nn\n"
            "def build(): return nn.Sequential(layer)\n"
        )
        return build_backbone(f"{file}:build")

    assert build("one", channels=4)[0].out_channels == 4
    assert build("two", channels=16)[0].out_channels == 16
    assert build("one", channels=4)[0].out_channels == 4


def test_pretrained_weights_of_a_custom_model_are_asked_for(file) -> None:
    assert not build_backbone(f"{file}:learned", pretrained=True)[0].weight.requires_grad
    assert build_backbone(f"{file}:learned")[0].weight.requires_grad
    with pytest.raises(ValueError, match=r"my_nets\.py:rgb takes no pretrained="):
        build_backbone(f"{file}:rgb", pretrained=True)


def test_what_is_not_there_is_named(file) -> None:
    with pytest.raises(ValueError) as error:
        build_backbone(f"{file}:biuld")
    assert str(error.value) == f"{file} has no function 'biuld'; perhaps build"
    with pytest.raises(ValueError, match="has no function 'NUMBER'; name a function"):
        build_backbone(f"{file}:NUMBER")
    with pytest.raises(ValueError, match="READY is a network; name a function that returns one"):
        build_backbone(f"{file}:READY")
    with pytest.raises(ValueError, match=r"there is no file no\.py; give the path"):
        build_backbone("no.py:build")
    with pytest.raises(ValueError, match="there is no module 'no_nets'; give a path"):
        build_backbone("no_nets:build")
    with pytest.raises(ValueError, match=r"gave str; it must return a torch\.nn\.Module"):
        build_backbone(f"{file}:nothing")


@pytest.mark.parametrize("function", ["needs", "Needs"])
def test_an_argument_that_nothing_gives_is_named(file, function) -> None:
    file.write_text(
        "from torch import nn\n\ndef needs(depth, channels=3, *more, **others):\n    ...\n\n"
        "class Needs(nn.Module):\n    def __init__(self, depth):\n        super().__init__()"
    )
    with pytest.raises(
        ValueError, match=rf"{function} .*missing .* 'depth'; give the argument a default, or"
    ):
        build_backbone(f"{file}:{function}")


@pytest.mark.parametrize(
    "source", ["import no_such_library", "def build():\n    import no_such_library"]
)
def test_modules_that_are_nowhere_are_named(file, source) -> None:
    file.write_text(source)
    with pytest.raises(ValueError, match=r"my_nets.py:build imports no_such_library, which cannot"):
        build_backbone(f"{file}:build")


def test_a_file_inside_a_package_is_named_as_a_module(file) -> None:
    file.write_text("from .layers_beside import stem\n\ndef build():\n    return stem(3, 4)")
    folder = file.parent
    with pytest.raises(ValueError, match=rf"run in .* and give {folder.name}\.my_nets:build"):
        build_backbone(f"{file}:build")


def test_a_function_may_import_what_lies_beside_it_when_it_is_called(file) -> None:
    file.write_text("def build():\n    from layers_beside import stem\n    return stem(3, 4)")
    sys.modules.pop("layers_beside", None)
    path = list(sys.path)
    assert isinstance(build_backbone(f"{file}:build"), nn.Module)
    assert sys.path == path


def test_classes_serve_as_functions() -> None:
    assert isinstance(build_backbone("torch.nn:Identity"), nn.Identity)
