"""The explorer's data: its images, and feature maps so small that a page compares them live."""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import einsum, rearrange
from torch import Tensor, cat
from torch.nn.functional import interpolate

from ..augment import Colour, Photometry
from ..backbones.checkpoint import BackboneCard, Loaded
from ..data.sources import open_source
from ..evaluation.baselines import random_net
from ..evaluation.correspondence import some_images
from ..evaluation.features import Preparation, Reader, resized
from ..views import Placement, cut_views, draw_maps
from .matches import fit_size
from .pca import centred, principal_components

RANDOM, TRAINED = "Random weights", "Trained weights"
SHOWN_SIDE = 480
"""Pixels of the longer side of an image on the page."""
MAX_ASPECT = 2
"""Longer side over shorter side, at most; what lies beyond is cut off at both ends."""
WHOLE = torch.eye(3)[:2]
"""The map of a view that is the whole image."""
OTHER_VIEW = Placement((0.5, 0.75), prob_hflip=1.0)
"""The other view of an image: mirrored, a quarter to a half of it."""
OTHER_COLOUR = Photometry(prob_jitter=1.0, prob_gray=0.0, prob_blur=0.0)
"""Its colours: changed as in training, but for what makes pictures hard to look at."""
MAX_SHIFTS = 4
"""Shifts of an image along each side, at most, for a finer map."""
MAX_CELLS = 40
"""Cells of the longer side of a map, at most: the eye sees no more, and the page stays small."""
BORDER = 3
"""Cells of mirror image around an image that are read and thrown away, since convolutions see the
zeros they pad with: with three, what a ResNet-18 of random weights gives for a plain image differs
from cell to cell by a cosine of 0.01, with none by 0.34."""
DIMENSIONS = 32
"""Numbers a cell: enough that cosines come out as of all channels, to a few hundredths."""


class Sample(NamedTuple):
    """An image at the size of the page, or a view of one."""

    name: str
    pixels: Tensor  # (c, h, w) float32 in [0, 1], all channels
    source: int  # number of the image it shows
    to_source: Tensor  # (2, 3) map from its unit square to that of the whole image

    @property
    def size(self) -> tuple[int, int]:
        """Its ``(height, width)`` on the page."""
        return self.pixels.shape[-2], self.pixels.shape[-1]


def read_samples(images: Any, prepare: Preparation, count: int) -> list[Sample]:
    """At most ``count`` images that are for this network, evenly spread over all."""

    def fit(_: Preparation, pixels: Tensor) -> Tensor:
        middle = crop_to_aspect(pixels)
        size = fit_size(middle.shape[-2:], SHOWN_SIDE)
        return resized(middle[None], size, antialias=True)[0].clamp(0, 1)

    items, _ = some_images(open_source(images), [prepare], count, SHOWN_SIDE, fit)
    names = relative_names([name for name, _ in items])
    return [Sample(name, items[k][1][0], k, WHOLE) for k, name in enumerate(names)]


def crop_to_aspect(pixels: Tensor) -> Tensor:
    """The middle of an image that is longer than `MAX_ASPECT` times its width."""
    h, w = pixels.shape[-2:]
    height, width = min(h, MAX_ASPECT * w), min(w, MAX_ASPECT * h)
    top, left = (h - height) // 2, (w - width) // 2
    return pixels[:, top : top + height, left : left + width]


def relative_names(names: Sequence[str]) -> list[str]:
    """Names without the folder that they share, so that a page tells nothing of the machine."""
    if not any(os.path.isabs(name) or os.sep in name for name in names):
        return [printable(name) for name in names]
    paths = [os.path.abspath(name) for name in names]
    try:
        folder = os.path.commonpath([os.path.dirname(path) for path in paths])
    except ValueError:  # on different drives
        return [printable(Path(path).name) for path in paths]
    return [printable(Path(os.path.relpath(path, folder)).as_posix()) for path in paths]


def printable(name: str) -> str:
    """A file's name as text that can be written; bytes that are no text are marked."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def other_view(sample: Sample, seed: int) -> Sample:
    """Another view of an image: cut out, mirrored, changed in colour. Moves no generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        to_image = draw_maps(1, sample.size, OTHER_VIEW)
        cut = cut_views(sample.pixels[None], to_image, sample.size)
        changed = Colour(OTHER_COLOUR, len(sample.pixels))(cut)[0]
    height, width = sample.size
    to_source = to_image[0] / torch.tensor([[width], [height]])
    return Sample(f"another view of {sample.name}", changed, sample.source, to_source)


def extract_maps(
    loaded: Loaded, inputs: Sequence[Tensor], device: torch.device, *, fixed: bool
) -> tuple[dict[str, list[Tensor]], tuple[int, int]]:
    """Maps of the pixel layer by both networks, of one input size if ``fixed``; a view's grid."""
    card = loaded.card
    maps, grid = {}, (1, 1)
    for name, net in ((RANDOM, random_net(card, card.seed)), (TRAINED, loaded.net)):
        reader = Reader(net.to(device), [card.shown_layer], card.channels, card.image_size)
        grid = reader.layouts[reader.layers[0]].grid
        stride = None if fixed else stride_of(reader, card)
        maps[name] = [fine_map(reader, pixels, stride) for pixels in inputs]
    return maps, grid


def stride_of(reader: Reader, card: BackboneCard) -> int | None:
    """Pixels from one row of cells to the next; None where every image has as many as a view."""
    height, width = card.image_size

    def rows(side: int) -> int:
        return reader(torch.zeros(1, card.channels, side, width)).shape[-2]

    # Height divided by rows is not exact where the last row reaches beyond the image or leaves a
    # remainder: make the view so high that one row more or less does not matter.
    count = rows(height)
    estimate = round(height / count)
    extra = 4 * estimate**2
    gained = rows(height + extra) - count
    if gained == 0:
        return None
    stride = round(extra / gained)
    # Without padding, rows are missing, and a border of larger cells makes up for them.
    return stride if rows(stride * (count + 1)) == count + 1 else estimate


def fine_map(reader: Reader, pixels: Tensor, stride: int | None, cells: int = 24) -> Tensor:
    """A layer's map of one image, about ``cells`` long: shifts are read, their maps interleaved."""
    # A map of 7x7 cells shows little of where things are. Moving the image by fractions of a cell
    # keeps what the network itself gives for a spot, at the scale it was trained on.
    # A network of a fixed input size (no stride) gets the image as it is and no border.
    border = 0 if stride is None else BORDER
    if stride is not None:
        h, w = (max(1, round(side / stride)) * stride for side in pixels.shape[1:])
        pixels = resized(pixels[None], (h, w), antialias=True)[0]
    _, height, width = pixels.shape
    margin = border * (stride or 0)

    def read(batch: Tensor) -> Tensor:
        maps = reader(batch).cpu()
        h, w = maps.shape[-2:]
        return maps[..., border : h - border, border : w - border]

    unshifted = read(mirrored(pixels, margin, margin)[None])[0]
    _, h, w = unshifted.shape
    shifts = min(MAX_SHIFTS, ceil(cells / max(h, w)))
    if shifts == 1:
        size = fit_size((h, w), min(MAX_CELLS, max(h, w)))
        return interpolate(unshifted[None], size, mode="area")[0]
    down, across = (
        [round(((k + 0.5) / shifts - 0.5) * side / cell_count) for k in range(shifts)]
        for side, cell_count in ((height, h), (width, w))
    )
    y, x = max(map(abs, down)), max(map(abs, across))
    padded = mirrored(pixels, margin + y, margin + x)
    windows = padded.unfold(1, height + 2 * margin, 1).unfold(2, width + 2 * margin, 1)
    rows = (torch.stack([windows[:, y + dy, x + dx] for dx in across]) for dy in down)
    maps = torch.stack([read(row) for row in rows])
    return rearrange(maps, "down across c h w -> c (h down) (w across)")


def mirrored(pixels: Tensor, rows: int, columns: int) -> Tensor:
    """Pixels ``(c, h, w)`` with their mirror image around them, over and over where it is wide."""
    widths = (0, 0), (rows, rows), (columns, columns)
    return torch.from_numpy(np.pad(pixels.numpy(), widths, mode="symmetric"))  # not in torch


def quantized(maps: Sequence[Tensor], dimensions: int = DIMENSIONS) -> list[dict[str, Any]]:
    """Maps ``(c, h, w)`` of one layer as int8 principal components of their cells, in base64."""
    # A page that subtracts the mean of any two maps from both gets what `centred` gives for them.
    directions = centred(*maps)
    cells = cat([rearrange(direction, "c h w -> (h w) c") for direction in directions])
    axes = principal_components(cells, min(dimensions, cells.shape[1]))
    units = ((cells @ axes).abs().amax(dim=0) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    rounded = [float(f"{unit:.4g}") for unit in units.tolist()]
    entries = []
    for direction in directions:
        numbers = (einsum(direction, axes, "c h w, c d -> h w d") / units).round().to(torch.int8)
        data = b64encode(numbers.numpy().tobytes()).decode("ascii")
        entries.append(
            {"h": numbers.shape[0], "w": numbers.shape[1], "units": rounded, "data": data}
        )
    return entries


def explorer_data(
    samples: Sequence[Sample], pictures: Sequence[str], networks: Mapping[str, Sequence[Tensor]]
) -> dict[str, Any]:
    """What the page's script needs: the samples, their data URIs, their maps by each network."""
    maps = zip(*(quantized(network_maps) for network_maps in networks.values()), strict=True)
    return {
        "networks": list(networks),
        "images": [
            {
                "name": sample.name,
                "whole": bool((sample.to_source == WHOLE).all()),
                "source": sample.source,
                "map": sample.to_source.flatten().tolist(),
                "width": sample.size[1],
                "height": sample.size[0],
                "src": picture,
                "maps": list(image_maps),
            }
            for sample, picture, image_maps in zip(samples, pictures, maps, strict=True)
        ],
    }
