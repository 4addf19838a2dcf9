"""Samples: a few images for people to look at, as they are and as the network is fed them."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import repeat
from torch import Tensor
from torch.nn.functional import interpolate

from ..augment import Colour, Photometry
from ..data.raster import SCALES, Unreadable, upright
from ..data.sources import Source, open_source
from ..evaluation.preparation import Preparation
from ..evaluation.unlabelled import evenly, left_out, none_left
from ..views import Placement, cut_views, draw_maps

log = logging.getLogger(__name__)

SHOWN_SIDE = 480
"""Pixels of the longer side of an image on the page."""
LONGEST = 2
"""Longer side over shorter side, at most; what lies beyond is cut off at both ends."""
WHOLE = torch.eye(3)[:2]
"""The map of a view that is the whole image."""
OTHER_VIEW = Placement((0.5, 0.75), prob_hflip=1.0)
"""The other view of an image: mirrored, a quarter to a half of it."""
OTHER_COLOUR = Photometry(prob_jitter=1.0, prob_gray=0.0, prob_blur=0.0)
"""Its colours: changed as in training, but for what makes pictures hard to look at."""


class Sample(NamedTuple):
    """An image, or a view of one.

    Attributes:
        name: What it is called, for people.
        pixels: ``(c, h, w)`` float32 in [0, 1], all channels, at the size of the page.
        source: Number of the image it shows.
        to_source: ``(2, 3)`` map from its unit square to that of the whole image.
    """

    name: str
    pixels: Tensor
    source: int
    to_source: Tensor

    @property
    def whole(self) -> bool:
        """Whether it is the whole image."""
        return bool((self.to_source == WHOLE).all())

    @property
    def size(self) -> tuple[int, int]:
        """Its ``(height, width)`` on the page."""
        return self.pixels.shape[-2], self.pixels.shape[-1]


def read_samples(images: Any, prepare: Preparation, count: int) -> list[Sample]:
    """Some images, evenly spread over all of them.

    Args:
        images: A folder, a list of paths, a sequence of images and so on, see `open_source`.
        prepare: How the network is fed, which says how values become [0, 1].
        count: How many, at most.

    Raises:
        ValueError: There is no image that can be read and is for this network.
    """
    source = open_source(images)
    chosen: list[tuple[int, Tensor]] = []
    refused: list[str] = []
    for index in evenly(len(source), count):
        try:
            pixels = read(source, index, prepare)
        except Unreadable as error:
            refused.append(f"{source.name(index)}: {error}")
            continue
        chosen.append((index, prepare.in_range(pixels, source.name(index))))
        if len(chosen) == count:
            break
    if not chosen:
        raise ValueError(none_left(refused, prepare))
    for note in left_out(refused):
        log.warning(note)
    names = short_names([source.name(index) for index, _ in chosen])
    return [
        Sample(name, fitted(pixels), number, WHOLE)
        for number, (name, (_, pixels)) in enumerate(zip(names, chosen, strict=True))
    ]


def read(source: Source, index: int, prepare: Preparation) -> Tensor:
    """The upright pixels ``(c, h, w)`` of an image, decoded no larger than is needed.

    Raises:
        Unreadable: It is no image, or none for this network.
    """
    opened = source.open(index)
    prepare.statistics.accepts(opened)
    scale = max(s for s in SCALES if s == 1 or min(opened.size) >= SHOWN_SIDE * s)
    pixels = upright(opened.raster(scale).pixels, opened.orientation)
    return middle_part(pixels)


def middle_part(pixels: Tensor) -> Tensor:
    """The middle of a strip that is longer than `LONGEST` times its width."""
    h, w = pixels.shape[-2:]
    height, width = min(h, LONGEST * w), min(w, LONGEST * h)
    top, left = (h - height) // 2, (w - width) // 2
    return pixels[:, top : top + height, left : left + width]


def fitted(pixels: Tensor) -> Tensor:
    """Pixels at the size of the page, larger or smaller than they were."""
    scale = SHOWN_SIDE / max(pixels.shape[-2:])
    h, w = (max(1, round(side * scale)) for side in pixels.shape[-2:])
    return interpolate(pixels[None], (h, w), mode="bilinear", antialias=True)[0].clamp(0, 1)


def short_names(names: Sequence[str]) -> list[str]:
    """Names without the folder that they share, so that a page tells nothing of the machine."""
    if not any(os.path.isabs(name) or os.sep in name for name in names):
        return [readable(name) for name in names]
    paths = [os.path.abspath(name) for name in names]
    try:
        folder = os.path.commonpath([os.path.dirname(path) for path in paths])
    except ValueError:  # on drives of their own
        return [readable(Path(path).name) for path in paths]
    return [readable(Path(os.path.relpath(path, folder)).as_posix()) for path in paths]


def readable(name: str) -> str:
    """The name as text that can be written: bytes that are none are marked."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def other_view(sample: Sample, seed: int) -> Sample:
    """Another view of an image: cut out, mirrored, changed in colour, as in training.

    Args:
        sample: The whole image.
        seed: Decides the view. No generator outside moves on.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = draw_maps(1, sample.size, OTHER_VIEW)
        cut = cut_views(sample.pixels[None], drawn, sample.size)
        changed = Colour(OTHER_COLOUR, len(sample.pixels))(cut)[0]
    height, width = sample.size
    to_source = drawn[0] / torch.tensor([[width], [height]])
    return Sample(f"another view of {sample.name}", changed, sample.source, to_source)


def fed(sample: Sample, prepare: Preparation) -> Tensor:
    """What the network is fed: ``(c, h, w)`` normalised, at its size."""
    return prepare.normalised(prepare.resized(sample.pixels))


def rgb(pixels: Tensor) -> Tensor:
    """Images ``(..., c, h, w)`` of any channels as three for the eye: the first ones, or gray."""
    if pixels.shape[-3] >= 3:
        return pixels[..., :3, :, :]
    return repeat(pixels[..., 0, :, :], "... h w -> ... rgb h w", rgb=3)
