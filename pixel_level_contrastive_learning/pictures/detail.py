"""Detail: maps of a size for the eye, finer than a layer's stride and no finer than one can see."""

from __future__ import annotations

from math import ceil

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import interpolate

from ..evaluation.features import Reader

FINEST = 4
"""Shifts of an image along each side, at most, for a finer map."""
MOST_CELLS = 40
"""Cells of the longer side of a map, at most: more is nothing to the eye, and much to carry."""
BORDER = 3
"""Cells around an image that are read and thrown away: with three, what a ResNet-18 of random
weights gives for a plain image differs from cell to cell by a cosine of 0.01, with none by 0.34."""


def fine_map(reader: Reader, pixels: Tensor, stride: int | None, cells: int = 24) -> Tensor:
    """A layer's map of one image, finer than its stride: the image is shifted and read again.

    A map of 7x7 cells says little of where things are. Here the image is moved by fractions of a
    cell, its border mirrored, and the maps are put together: every cell is what the network itself
    gives for a spot, at the scale it was trained on. Around the image `BORDER` cells of its mirror
    image are read and thrown away, since convolutions see the zeros they pad with, and would show
    where a cell lies rather than what is there. Up to 16 runs of the network.

    Args:
        reader: Reads the layer.
        pixels: ``(c, h, w)`` float, normalised. Resized to whole cells.
        stride: Pixels a cell covers each way; None for a network of a fixed input size, which gets
            the image as it is and no border.
        cells: How many cells the longer side should have, about.

    Returns:
        ``(channels, h', w')`` float32 on the CPU, `MOST_CELLS` long at most.
    """
    border = 0
    if stride is not None:
        size = [max(1, round(side / stride)) * stride for side in pixels.shape[-2:]]
        pixels = interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]
        border = BORDER * stride
    height, width = pixels.shape[-2:]
    plain = reader(mirrored(pixels, border, border)[None])[0].cpu()
    crop = 0 if stride is None else BORDER
    plain = inside(plain, crop)
    _, h, w = plain.shape
    finer = min(FINEST, ceil(cells / max(h, w)))
    if finer == 1:
        return no_finer(plain, MOST_CELLS)
    down, across = (
        [round(((k + 0.5) / finer - 0.5) * side / own) for k in range(finer)]
        for side, own in ((height, h), (width, w))
    )
    y, x = max(map(abs, down)), max(map(abs, across))
    around = mirrored(pixels, border + y, border + x)
    size = [height + 2 * border, width + 2 * border]

    def shifted(dy: int, dx: int) -> Tensor:
        return around[:, y + dy :, x + dx :][:, : size[0], : size[1]]

    rows = [torch.stack([shifted(dy, dx) for dx in across]) for dy in down]
    maps = torch.stack([inside(reader(row).cpu(), crop) for row in rows])
    return rearrange(maps, "down across c h w -> c (h down) (w across)")


def no_finer(own: Tensor, most: int) -> Tensor:
    """A map ``(c, h, w)`` averaged down until its longer side has at most ``most`` cells."""
    h, w = own.shape[-2:]
    if max(h, w) <= most:
        return own
    size = [max(1, round(side * most / max(h, w))) for side in (h, w)]
    return interpolate(own[None], size, mode="area")[0]


def mirrored(pixels: Tensor, rows: int, columns: int) -> Tensor:
    """Pixels ``(c, h, w)`` with their mirror image around them, over and over where it is wide."""
    where = [
        reflection(side, by) for side, by in zip(pixels.shape[1:], (rows, columns), strict=True)
    ]
    return pixels[:, where[0]][:, :, where[1]]


def reflection(side: int, by: int) -> Tensor:
    """Which of ``side`` pixels stand in a row that goes on ``by`` pixels at both ends."""
    place = torch.arange(-by, side + by).remainder(2 * side)
    return torch.minimum(place, 2 * side - 1 - place)


def inside(maps: Tensor, border: int) -> Tensor:
    """Maps ``(..., h, w)`` without their border."""
    h, w = maps.shape[-2:]
    return maps[..., border : h - border, border : w - border]
