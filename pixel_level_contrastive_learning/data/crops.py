"""Cutting views out of one decoded image, wherever it stands and whatever it was decoded at.

As in `views.cut_views`, what is much larger than its view is averaged down by the largest power of
two that leaves it at least the view's resolution, then sampled bilinearly. Here a JPEG's decoder
does the first of it, only the crop is averaged, and 8-bit values stay 8-bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from ..views import averaged_down, cut_views, power_below, reductions
from .image import SCALES, DecodedImage, LazyImage, Orientation, tensor_of

Rows = tuple[tuple[float, float, float], tuple[float, float, float]]
"""A view map as plain numbers: ``x = a u + b v + c`` and ``y = d u + e v + f``."""


AT_ONCE = 4.0
"""Source pixels a view pixel below which a crop is resampled at once, by torch's antialiasing. That
is sharper and faster, but its kernel is cut off at the crop's edges, where views are then shifted
by 0.095 of a view's pixel: under half a source pixel up to here."""


class Cut(NamedTuple):
    """A view and where it lies.

    Attributes:
        pixels: ``(c, h, w)`` uint8, or float32 raw values.
        to_image: ``(2, 3)`` float32 map from the view's unit square to source pixels: the map that
            was asked for, its edges moved by less than a pixel of the view so that none is blended.
    """

    pixels: Tensor
    to_image: Tensor


class Span(NamedTuple):
    """One side of an upright crop, in pixels of the raster.

    Attributes:
        start: The first.
        length: How many; a multiple of ``power``.
        power: How many are averaged to one before the view is sampled.
    """

    start: int
    length: int
    power: int


def best_scale(maps: Tensor, size: tuple[int, int]) -> int:
    """The smallest image to decode: the largest of `SCALES` at which no view is enlarged.

    Args:
        maps: ``(b, 2, 3)`` maps of all views that are cut from the image.
        size: ``(h, w)`` of the views.
    """
    h, w = size
    covered = torch.linalg.vector_norm(maps[..., :2], dim=-2) / maps.new_tensor((w, h))
    smallest = covered.min().item() + 1e-6
    return max((scale for scale in SCALES if scale <= smallest), default=1)


def cut(raster: DecodedImage, opened: LazyImage, to_image: Tensor, size: tuple[int, int]) -> Cut:
    """Cut one view.

    Args:
        raster: What was decoded.
        opened: The file it came from.
        to_image: ``(2, 3)`` float map to pixels of the upright source image.
        size: ``(h, w)`` of the view.
    """
    stored = to_stored(rows_of(to_image), opened)
    (a, b, _), (d, e, _) = stored
    if b == d == 0:
        return cut_upright(raster, opened, stored, size, swapped=False)
    if a == e == 0:
        return cut_upright(raster, opened, stored, size, swapped=True)
    return cut_turned(raster, opened, stored, size)


def cut_upright(
    raster: DecodedImage, opened: LazyImage, stored: Rows, size: tuple[int, int], *, swapped: bool
) -> Cut:
    """Cut a view whose sides lie along the raster's, if need be with ``u`` and ``v`` swapped."""
    (a, b, c), (d, e, f) = stored
    across, down = (b, d) if swapped else (a, e)
    view = size[::-1] if swapped else size
    height, width = opened.stored_size
    xs = span(min(c, c + across), abs(across), width, view[1], raster.scale)
    ys = span(min(f, f + down), abs(down), height, view[0], raster.scale)
    box = (xs.start, ys.start, xs.start + xs.length, ys.start + ys.length)
    pixels = region(raster, box, (ys.power, xs.power))
    if pixels.shape[1:] != view:
        at_once = raster.scale * max(xs.power, ys.power) == 1
        batch = pixels.permute(1, 2, 0)[None].permute(0, 3, 1, 2)  # torch sees: channels last
        pixels = functional.interpolate(batch, view, mode="bilinear", antialias=at_once)[0]
    flips = [-1] * (across < 0) + [-2] * (down < 0)
    pixels = pixels.flip(flips) if flips else pixels

    x, y = edges(xs, across < 0, raster.scale), edges(ys, down < 0, raster.scale)
    found: Rows = ((x[0], 0.0, x[1]), (0.0, y[0], y[1]))
    if swapped:
        found = ((0.0, x[0], x[1]), (y[0], 0.0, y[1]))
    return Cut(pixels.mT if swapped else pixels, torch.tensor(to_upright(found, opened)))


def span(start: float, length: float, side: int, view: int, scale: int) -> Span:
    """Where a side of a crop comes to lie on whole pixels of the raster.

    Args:
        start: Where it begins, in source pixels.
        length: How long it is, in source pixels.
        side: The source image's side.
        view: The view's side in pixels.
        scale: Source pixels a pixel of the raster.
    """
    whole = max(side // scale, 1)  # the last pixel may stand for fewer: leave it out
    wanted = length / scale
    power = 1 if length / view < AT_ONCE else min(power_below(wanted / view + 1e-6), whole)
    count = max(min(round(wanted / power), whole // power), 1) * power
    first = round(start / scale + (wanted - count) / 2)
    return Span(min(max(first, 0), whole - count), count, power)


def edges(span: Span, flipped: bool, scale: int) -> tuple[float, float]:
    """Extent and origin of a span in source pixels, from its end backwards where it is flipped."""
    extent, origin = float(span.length * scale), float(span.start * scale)
    return (-extent, origin + extent) if flipped else (extent, origin)


def cut_turned(raster: DecodedImage, opened: LazyImage, stored: Rows, size: tuple[int, int]) -> Cut:
    """Sample a view of any map, out of the upright box of pixels around it."""
    height, width = (max(side // raster.scale, 1) for side in opened.stored_size)
    to_raster = torch.tensor(stored) / raster.scale
    # The last pixel may stand for fewer: move a view that reaches into it.
    low, high = corners(to_raster)
    beyond = (high - torch.tensor([width, height])).clamp(min=0)
    to_raster[:, 2] -= torch.minimum(beyond, low.clamp(min=0))

    (left, top), (right, bottom) = (ends.tolist() for ends in corners(to_raster))
    # A pixel of the view more on each side, so that the box's own edges are not seen.
    margin = int(to_raster[:, :2].norm(dim=0).max().item() / min(size)) + 1
    ((down, across),) = reductions(to_raster[None], size)
    x0, x1 = divisible(int(left) - margin, int(right) + 1 + margin, width, across)
    y0, y1 = divisible(int(top) - margin, int(bottom) + 1 + margin, height, down)
    box = (x0, y0, x1, y1)
    pixels = region(raster, box, (1, 1))
    inside = to_raster - torch.tensor([[0, 0, box[0]], [0, 0, box[1]]])
    view = cut_views(pixels[None].float(), inside[None], size)[0]
    view = view.round().to(torch.uint8) if pixels.dtype == torch.uint8 else view
    found = to_upright(rows_of(to_raster * raster.scale), opened)
    return Cut(view, torch.tensor(found))


def divisible(start: int, stop: int, side: int, power: int) -> tuple[int, int]:
    """A stretch of at least ``start..stop`` that averages evenly, if there is one inside a side."""
    start, stop = max(start, 0), min(stop, side)
    length = -(-(stop - start) // power) * power
    if length > side:
        return 0, side
    start = min(start, side - length)
    return start, start + length


def corners(to_image: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest and the highest ``(x, y)`` of a view's corners, from its map ``(2, 3)``."""
    points = to_image @ torch.tensor([[0.0, 1, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1]])
    return points.amin(dim=1), points.amax(dim=1)


def region(raster: DecodedImage, box: tuple[int, int, int, int], power: tuple[int, int]) -> Tensor:
    """Part of the raster, averaged to ``1 / power`` of its height and width.

    Args:
        raster: What was decoded.
        box: ``(x0, y0, x1, y1)`` in its pixels; its sides are multiples of ``power``.
        power: ``(down, across)``.

    Returns:
        ``(c, h, w)``, of the raster's type.
    """
    x0, y0, x1, y1 = box
    pixels, factor = raster.pixels, (power[1], power[0])
    if not isinstance(pixels, Tensor):
        part = pixels.crop(box) if factor == (1, 1) else pixels.reduce(factor, box)
        return tensor_of(part)
    crop = pixels[:, y0:y1, x0:x1]
    if factor == (1, 1):
        return crop
    if crop.dtype == torch.uint8 and len(crop) in (1, 3):
        from PIL import Image  # twenty times as fast as pooling in float

        channels_last = rearrange(crop, "c h w -> h w c").contiguous().numpy()
        image = Image.fromarray(channels_last[..., 0] if len(crop) == 1 else channels_last)
        return tensor_of(image.reduce(factor))
    smaller = averaged_down(crop[None].float(), power)[0]
    return smaller.round().to(torch.uint8) if crop.dtype == torch.uint8 else smaller


def rows_of(to_image: Tensor) -> Rows:
    """A map ``(2, 3)`` as plain numbers: tensors of six are slow to reckon with."""
    (a, b, c), (d, e, f) = to_image.tolist()
    return (a, b, c), (d, e, f)


def to_stored(rows: Rows, opened: LazyImage) -> Rows:
    """A map to the upright image as a map to the stored one."""
    height, width = opened.stored_size
    turn: Orientation = opened.orientation
    x, y = rows[::-1] if turn.swapped else rows
    return (
        mirrored(x, width) if turn.left_right else x,
        mirrored(y, height) if turn.upside_down else y,
    )


def to_upright(rows: Rows, opened: LazyImage) -> Rows:
    """A map to the stored image as a map to the upright one."""
    height, width = opened.stored_size
    turn = opened.orientation
    x = mirrored(rows[0], width) if turn.left_right else rows[0]
    y = mirrored(rows[1], height) if turn.upside_down else rows[1]
    return (y, x) if turn.swapped else (x, y)


def mirrored(row: tuple[float, float, float], side: int) -> tuple[float, float, float]:
    """One coordinate counted from the other end of its side."""
    return -row[0], -row[1], side - row[2]
