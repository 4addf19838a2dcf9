"""The explorer: the images it shows, and feature maps so small that a page compares them live."""

from __future__ import annotations

import logging
import os
from base64 import b64encode
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import einsum, rearrange
from torch import Tensor, cat
from torch.nn.functional import interpolate

from ..augment import Colour, Photometry
from ..data.image import ImageError, to_rgb
from ..data.sources import Source, open_source
from ..data.statistics import read_image
from ..evaluation.evaluate import evenly, left_out, none_left
from ..evaluation.features import Preparation
from ..views import Placement, cut_views, draw_maps
from .matches import picture
from .pca import centred, components

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

WHOLE = torch.eye(3)[:2]
"""The map of a view that is the whole image."""


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


SHOWN_SIDE = 480
"""Pixels of the longer side of an image on the page."""
LONGEST = 2
"""Longer side over shorter side, at most; what lies beyond is cut off at both ends."""
OTHER_VIEW = Placement((0.5, 0.75), prob_hflip=1.0)
"""The other view of an image: mirrored, a quarter to a half of it."""
OTHER_COLOUR = Photometry(prob_jitter=1.0, prob_gray=0.0, prob_blur=0.0)
"""Its colours: changed as in training, but for what makes pictures hard to look at."""


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
        except ImageError as error:
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
        ImageError: It is no image, or none for this network.
    """
    return middle_part(read_image(source, index, prepare.statistics, SHOWN_SIDE))


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


DIMENSIONS = 32
"""Numbers a cell: enough that cosines come out as of all channels, to a few hundredths."""


def packed(maps: Sequence[Tensor], dimensions: int = DIMENSIONS) -> list[dict[str, Any]]:
    """Maps as text, from which a page computes how alike any two cells are.

    The strongest principal components of features of length 1 are kept, less the mean over all
    cells, each as whole numbers from -127 to 127 of its own unit. A page that takes the mean of any
    two maps from both has what `centred` gives for them.

    Args:
        maps: ``(c, h, w)`` float each, of one layer.
        dimensions: How many components.

    Returns:
        For each map its ``h``, ``w``, ``units`` (one number a component), and ``data``: int8 in
        base64, a cell after the other, row by row.
    """
    directions = centred(*maps)
    cells = cat([rearrange(own, "c h w -> (h w) c") for own in directions])
    axes = components(cells, min(dimensions, cells.shape[1]))
    units = ((cells @ axes).abs().amax(dim=0) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    held = []
    for own in directions:
        numbers = (einsum(own, axes, "c h w, c d -> h w d") / units).round().to(torch.int8)
        h, w, _ = numbers.shape
        data = text(numbers.numpy().tobytes())
        held.append({"h": h, "w": w, "units": rounded(units), "data": data})
    return held


def rounded(numbers: Tensor) -> list[float]:
    """Numbers with the digits that matter."""
    return [float(f"{number:.4g}") for number in numbers.tolist()]


def cargo(samples: Sequence[Sample], networks: Mapping[str, Sequence[Tensor]]) -> dict[str, Any]:
    """All that the explorer needs, as plain lists and texts.

    Args:
        samples: The images, and other views of them.
        networks: For each network, by its name for people, the maps ``(c, h, w)`` of all samples.
    """
    maps = [packed(own) for own in networks.values()]
    return {
        "networks": list(networks),
        "images": [
            {
                "name": sample.name,
                "whole": sample.whole,
                "source": sample.source,
                "map": sample.to_source.flatten().tolist(),
                "width": sample.size[1],
                "height": sample.size[0],
                "src": jpeg(picture(to_rgb(sample.pixels))),
                "maps": [own[number] for own in maps],
            }
            for number, sample in enumerate(samples)
        ],
    }


def jpeg(image: Image) -> str:
    """A photograph as a data URI."""
    held = BytesIO()
    image.convert("RGB").save(held, "JPEG", quality=82, optimize=True)
    return f"data:image/jpeg;base64,{text(held.getvalue())}"


def webp(image: Image) -> str:
    """A photograph with transparent parts as a data URI."""
    held = BytesIO()
    image.save(held, "WEBP", quality=85)
    return f"data:image/webp;base64,{text(held.getvalue())}"


def text(content: bytes) -> str:
    """Bytes as base64."""
    return b64encode(content).decode("ascii")
