"""A tiny run: a network of some hundred weights, a dozen images, a handful of steps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

TINY = """
from torch import nn


def tiny(channels=3):
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1),
        nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
    )


def frozen(channels=3):
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, 2, 1), nn.GroupNorm(1, 8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, 1), nn.GroupNorm(1, 16), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
    )
"""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of twelve images."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(12):
        dice = torch.Generator().manual_seed(number)
        coarse = torch.rand(1, 3, 6, 6, generator=dice)
        pixels = torch.nn.functional.interpolate(coarse, (48, 56), mode="bilinear")[0]
        to_pil_image(pixels).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run with the settings below."""
    return tmp_path / "run"


@pytest.fixture
def settings(tmp_path: Path, run: Path, images: Path) -> Callable[..., dict[str, Any]]:
    """Settings of a run of six steps, and those given."""
    (tmp_path / "nets.py").write_text(TINY)
    small: dict[str, Any] = {
        "data": (str(images),),
        "out": str(run),
        "model": f"{tmp_path / 'nets.py'}:tiny",
        "image_size": 32,
        "batch_size": 4,
        "steps": 6,
        "checkpoint_every": 2,
        "keep_checkpoints": 9,
        "workers": 0,
        "projection_size": 16,
        "projection_hidden_size": 16,
        "picture_every": 0,
        "precision": "float32",
        "loggers": (),
    }
    return lambda **changes: small | changes


def as_flags(settings: dict[str, Any]) -> list[str]:
    """Settings as arguments of the command line."""
    flags: list[str] = []
    for name, value in settings.items():
        if name == "data":
            continue
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            flags.append(flag)
        else:
            values = value if isinstance(value, tuple) else (value,)
            flags += [flag, *map(str, values)]
    return [*settings.get("data", ()), *flags]


@pytest.fixture
def flags(settings: Callable[..., dict[str, Any]]) -> Callable[..., list[str]]:
    """The same as arguments of the command line."""
    return lambda **changes: as_flags(settings(**changes))
