"""Every odd file is read right, or refused in our own words; none crashes, hangs or eats memory."""

import re
import resource
import time
from contextlib import suppress
from functools import cache

import numpy as np
import pytest
import torch
from corpus.odd_files import Odd, all_files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from pixel_level_contrastive_learning import PixelCL, View
from pixel_level_contrastive_learning.augment import Normalise
from pixel_level_contrastive_learning.data.decoding import open_image, stack_in
from pixel_level_contrastive_learning.data.image import ImageError
from pixel_level_contrastive_learning.data.loader import build_loader
from pixel_level_contrastive_learning.data.sources import open_source
from pixel_level_contrastive_learning.data.statistics import measure

FILES = {odd.name: odd for odd in all_files()}
READ = [name for name, odd in FILES.items() if odd.images]
SEEDS = [name for name in READ if "200 MB" not in name and len(FILES[name].content) < 10_000][::8]
SECONDS, MEBIBYTES = 10, 1024


@cache
def learner(channels: int) -> PixelCL:
    """A small learner for images of so many channels."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(channels, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1), nn.AdaptiveAvgPool2d(1)
    )
    layers = {"hidden_layer_pixel": "1", "hidden_layer_instance": "2"}
    return PixelCL(
        net, 32, **layers, projection_size=8, projection_hidden_size=8, channels=channels
    )


def place(odd: Odd, folder) -> str:
    """The path of a file, alone in its folder."""
    path = folder / odd.name
    path.write_bytes(odd.content)
    return str(path)


def test_there_are_many() -> None:
    assert len(FILES) == len(all_files()) >= 150


@pytest.mark.parametrize("name", READ)
def test_pixels_are_right_up_to_a_step(tmp_path, name) -> None:
    odd = FILES[name]
    source = open_source(place(odd, tmp_path))
    assert len(source) == len(odd.images)
    for index, expected in enumerate(odd.images):
        opened = source.open(index)
        pixels = opened.read().numpy()
        assert (opened.size, opened.channels) == (pixels.shape[1:], len(pixels))
        assert opened.high_depth == (pixels.dtype == np.float32)
        assert pixels.shape == expected.shape
        assert np.abs(pixels - expected.astype(np.float64)).max() <= odd.near
    statistics = measure(source)
    channels = statistics.channels
    assert np.isfinite([*statistics.mean, *statistics.std]).all()
    loader = build_loader(source, statistics, image_size=(32, 32), batch_size=2, max_broken=0)
    batch = next(iter(loader))
    views = [
        view.float() / (255 if view.dtype == torch.uint8 else 1) for view in (batch.one, batch.two)
    ]
    normalise = Normalise(statistics.mean, statistics.std)
    maps = batch.map_one, batch.map_two
    loss = learner(channels)(tuple(View(normalise(v), m) for v, m in zip(views, maps, strict=True)))
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("name", [name for name in FILES if name not in READ])
def test_refusals_are_ours(tmp_path, name) -> None:
    odd = FILES[name]
    with pytest.raises(ValueError) as error:
        measure(open_source(place(odd, tmp_path)), channels=7)
    with pytest.raises(ImageError) as reason:
        open_image(odd.content).read()
    assert re.match(odd.refusal, str(reason.value))
    assert "\n" not in str(reason.value)
    try:
        header = f"channels is 7, but the images have {open_image(odd.content).channels}"
    except ImageError:
        header = odd.name
    assert header in str(error.value)


def used() -> float:
    """The most memory that this process has used, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def survives(content: bytes) -> None:
    """A file is read or refused within time and memory."""
    began, before = time.perf_counter(), used()
    for read in (lambda: open_image(content).read(), lambda: stack_in(content)):
        with suppress(ImageError):  # any other exception fails
            read()
    assert time.perf_counter() - began < SECONDS
    assert used() - before < MEBIBYTES


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.parametrize("name", SEEDS)
def test_mutated_headers_neither_crash_nor_hang(name, data) -> None:
    content = bytearray(FILES[name].content)
    end = min(len(content), 400)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, end - 4))
        kind = data.draw(st.sampled_from(("flip", "absurd", "cut", "zero")))
        if kind == "flip":
            content[start] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            content = content[: max(start, 4)]
            break
        else:
            content[start : start + 4] = bytes(4) if kind == "zero" else b"\x7f\xff\xff\xff"
    survives(bytes(content))
