"""The explorer's cargo: small, and as good as the features for telling what is alike."""

from base64 import b64decode

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from pixel_level_contrastive_learning.visualization.explorer import (
    WHOLE,
    Sample,
    cargo,
    jpeg,
    packed,
    webp,
)
from pixel_level_contrastive_learning.visualization.pca import centred, likeness


def features(height: int, width: int, channels: int = 64) -> Tensor:
    """Features as behind a ReLU, of few kinds of things, with noise."""
    kinds = torch.rand(7, channels, generator=torch.Generator().manual_seed(1))
    shares = torch.rand(height, width, 7).pow(4)
    return rearrange(shares @ kinds + 0.02 * torch.rand(height, width, channels), "h w c -> c h w")


def unpacked(held: dict) -> Tensor:
    """What the page makes of a packed map: ``(d, h, w)``."""
    numbers = np.frombuffer(b64decode(held["data"]), np.int8).reshape(held["h"], held["w"], -1)
    return rearrange(
        torch.from_numpy(numbers.copy()) * torch.tensor(held["units"]), "h w d -> d h w"
    )


@pytest.mark.parametrize(("height", "width"), [(6, 8), (12, 5)])
def test_likeness_comes_out_as_of_all_channels(height, width) -> None:
    maps = [features(6, 8), features(height, width), 3 * features(9, 9)]
    one, two = (unpacked(own) for own in packed(maps)[:2])
    # As the page does: the mean over the cells of the two is taken from both.
    count = one[0].numel() + two[0].numel()
    mean = ((one.sum((1, 2)) + two.sum((1, 2))) / count)[:, None, None]
    for cell in ((0, 0), (5, 7), (2, 4)):
        expected = likeness(centred(*maps[:2])[0], cell, centred(*maps[:2])[1])
        found = likeness(one - mean, cell, two - mean)
        assert (found - expected).abs().max() < 0.05


def test_numbers_fill_eight_bits_and_units_their_digits() -> None:
    held = packed([features(6, 8)], dimensions=16)[0]
    numbers = np.frombuffer(b64decode(held["data"]), np.int8).reshape(48, 16)
    assert (np.abs(numbers).max(axis=0) == 127).all()
    assert len(held["units"]) == 16
    assert all(len(f"{unit:.4g}") >= len(str(unit)) - 2 for unit in held["units"])


def test_features_of_few_channels_are_packed_as_they_are() -> None:
    assert len(packed([torch.rand(2, 4, 4)])[0]["units"]) == 2


def test_a_collapsed_map_is_packed_without_harm() -> None:
    held = packed([torch.ones(8, 4, 4)])[0]
    assert torch.isfinite(unpacked(held)).all()


def test_the_cargo_holds_each_picture_and_its_maps() -> None:
    view = torch.tensor([[-0.5, 0, 0.75], [0, 0.5, 0.25]])
    samples = [
        Sample("a", torch.rand(3, 20, 30), 0, WHOLE),
        Sample("other", torch.rand(3, 20, 30), 0, view),
    ]
    maps = [features(4, 6), features(4, 6)]
    held = cargo(samples, {"Random": maps, "Trained": maps})
    assert held["networks"] == ["Random", "Trained"]
    first, second = held["images"]
    assert (first["whole"], second["whole"]) == (True, False)
    assert second["map"] == [-0.5, 0, 0.75, 0, 0.5, 0.25]
    assert (first["width"], first["height"]) == (30, 20)
    assert len(first["maps"]) == 2
    assert first["src"].startswith("data:image/jpeg;base64,")


def test_pictures_are_held_by_their_uris() -> None:
    gray = Image.new("RGBA", (8, 4), (128, 128, 128, 0))
    assert jpeg(gray).startswith("data:image/jpeg;base64,")
    assert webp(gray).startswith("data:image/webp;base64,")
