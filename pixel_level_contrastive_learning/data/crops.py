"""Cut views out of one decoded image, at whatever scale it was decoded.

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
from .image import DecodedImage, largest_scale, to_tensor

ANTIALIAS_BELOW = 4.0
"""Source pixels per view pixel below which torch's antialiasing resamples a crop at once. That is
sharper and faster, but its kernel is cut off at the crop's edges, where views are then shifted by
0.095 of a view's pixel: under half a source pixel up to here."""


class CroppedView(NamedTuple):
    """Pixels ``(c, h, w)``, and the map ``(2, 3)`` from the view's unit square to source pixels."""

    pixels: Tensor
    to_image: Tensor
    """The map asked for, its edges moved by less than a view pixel so that none is blended."""


class Span(NamedTuple):
    """One side of a crop, in pixels of the decoded image."""

    start: int
    length: int
    """A multiple of ``power``."""
    power: int
    """How many pixels are averaged to one before the view is sampled."""


def best_scale(maps: Tensor, size: tuple[int, int]) -> int:
    """The largest scale at which no view of size ``(h, w)`` and map ``(b, 2, 3)`` is enlarged."""
    h, w = size
    covered = torch.linalg.vector_norm(maps[..., :2], dim=-2) / maps.new_tensor((w, h))
    return largest_scale(covered.min().item() + 1e-6)


def cut_view(
    decoded: DecodedImage, source_size: tuple[int, int], to_image: Tensor, size: tuple[int, int]
) -> CroppedView:
    """Cut one view.

    Args:
        decoded: The image.
        source_size: ``(height, width)`` of the full image.
        to_image: ``(2, 3)`` float map from the view's unit square to pixels of the full image.
        size: ``(h, w)`` of the view.

    Example:
        >>> pixels = torch.arange(12, dtype=torch.uint8).view(1, 3, 4)
        >>> to_image = torch.tensor([[2.0, 0, 1], [0, 2, 1]])  # 2 x 2 pixels from (1, 1) on
        >>> cut_view(DecodedImage(pixels), (3, 4), to_image, (2, 2)).pixels.tolist()
        [[[5, 6], [9, 10]]]
    """
    ((_, skew, _), (shear, _, _)) = to_image.tolist()
    if skew == shear == 0:
        return cut_crop(decoded, source_size, to_image, size)
    return cut_rotated(decoded, source_size, to_image, size)


def cut_crop(
    decoded: DecodedImage, source_size: tuple[int, int], to_image: Tensor, size: tuple[int, int]
) -> CroppedView:
    """Cut a view whose sides lie along the image's."""
    (across, _, left), (_, down, top) = to_image.tolist()  # numbers: small tensors are slow
    (h, w), (height, width), (x, y), scale = size, source_size, decoded.origin, decoded.scale
    xs = span(min(left, left + across), abs(across), width, w, scale, x)
    ys = span(min(top, top + down), abs(down), height, h, scale, y)
    box = (xs.start, ys.start, xs.start + xs.length, ys.start + ys.length)
    pixels = averaged_crop(decoded, box, (ys.power, xs.power))
    if pixels.shape[1:] != size:
        antialias = scale * max(xs.power, ys.power) == 1
        batch = pixels.permute(1, 2, 0)[None].permute(0, 3, 1, 2)  # torch sees: channels last
        pixels = functional.interpolate(batch, size, mode="bilinear", antialias=antialias)[0]
    flips = [-1] * (across < 0) + [-2] * (down < 0)
    pixels = pixels.flip(flips) if flips else pixels
    (a, c), (e, f) = edges(xs, across < 0, scale, x), edges(ys, down < 0, scale, y)
    return CroppedView(pixels, torch.tensor(((a, 0.0, c), (0.0, e, f))))


def whole_pixels(side: int, scale: int, origin: int) -> tuple[int, int]:
    """The first decoded pixel that stands for ``scale`` source pixels, and how many do so."""
    count = max(side // scale, 1)
    return (-(-side // scale) - count if origin else 0), count


def span(start: float, length: float, side: int, view: int, scale: int, origin: int = 0) -> Span:
    """Where one side of a crop, in source pixels, comes to lie on whole decoded pixels."""
    lowest, whole = whole_pixels(side, scale, origin)
    wanted = length / scale
    power = 1 if length / view < ANTIALIAS_BELOW else power_below(wanted / view + 1e-6)
    power = min(power, whole)
    count = max(min(round(wanted / power), whole // power), 1) * power
    first = round((start - origin) / scale + (wanted - count) / 2)
    return Span(min(max(first, lowest), lowest + whole - count), count, power)


def edges(span: Span, flipped: bool, scale: int, origin: int) -> tuple[float, float]:
    """Extent and start of a span in source pixels, from its end backwards where it is flipped."""
    extent, start = float(span.length * scale), float(origin + span.start * scale)
    return (-extent, start + extent) if flipped else (extent, start)


def cut_rotated(
    decoded: DecodedImage, source_size: tuple[int, int], to_image: Tensor, size: tuple[int, int]
) -> CroppedView:
    """Sample a view of any map, out of the upright box of pixels around it."""
    scale, origin = decoded.scale, torch.tensor(decoded.origin)
    sides = zip(source_size[::-1], decoded.origin, strict=True)
    (left, width), (top, height) = (whole_pixels(side, scale, start) for side, start in sides)
    to_pixels = to_image / scale
    to_pixels[:, 2] -= origin / scale
    # The outermost pixels may stand for fewer: move a view that reaches into them.
    first, end = torch.tensor([left, top]), torch.tensor([left + width, top + height])
    low, high = corners(to_pixels)
    before = torch.where(first > 0, first - low, 0).clamp(min=0)
    to_pixels[:, 2] += torch.minimum(before, (end - high).clamp(min=0))
    to_pixels[:, 2] -= torch.minimum((high - end).clamp(min=0), (low - first).clamp(min=0))

    low, high = corners(to_pixels)
    # One more pixel of the view on each side, so that the edges of the box are not visible.
    margin = int(to_pixels[:, :2].norm(dim=0).max().item() / min(size)) + 1
    starts = ((low - first).to(torch.int64) - margin).tolist()
    stops = ((high - first).to(torch.int64) + 1 + margin).tolist()
    ((down, across),) = reductions(to_pixels[None], size)
    x0, x1 = divisible(starts[0], stops[0], width, across)
    y0, y1 = divisible(starts[1], stops[1], height, down)
    box = (left + x0, top + y0, left + x1, top + y1)
    pixels = averaged_crop(decoded, box, (1, 1))
    inside = to_pixels - torch.tensor([[0, 0, box[0]], [0, 0, box[1]]])
    view = cut_views(pixels[None].float(), inside[None], size)[0]
    view = view.round().to(torch.uint8) if pixels.dtype == torch.uint8 else view
    adjusted = to_pixels * scale
    adjusted[:, 2] += origin
    return CroppedView(view, adjusted)


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


def averaged_crop(
    decoded: DecodedImage, box: tuple[int, int, int, int], power: tuple[int, int]
) -> Tensor:
    """A box ``(x0, y0, x1, y1)`` of the pixels, averaged by powers ``(down, across)``."""
    x0, y0, x1, y1 = box
    pixels, factor = decoded.pixels, (power[1], power[0])
    if not isinstance(pixels, Tensor):
        return to_tensor(pixels.crop(box) if factor == (1, 1) else pixels.reduce(factor, box))
    crop = pixels[:, y0:y1, x0:x1]
    if factor == (1, 1):
        return crop
    if crop.dtype == torch.uint8 and len(crop) in (1, 3):
        from PIL import Image  # twenty times as fast as pooling in float

        array = rearrange(crop, "c h w -> h w c").contiguous().numpy()
        image = Image.fromarray(array[..., 0] if len(crop) == 1 else array)
        return to_tensor(image.reduce(factor))
    smaller = averaged_down(crop[None].float(), power)[0]
    return smaller.round().to(torch.uint8) if crop.dtype == torch.uint8 else smaller
