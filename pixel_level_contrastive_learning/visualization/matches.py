"""The picture of matches: two views side by side, lines between cells that see the same spot."""

from __future__ import annotations

from collections.abc import Sequence
from colorsys import hls_to_rgb
from typing import NamedTuple

import torch
from einops import rearrange
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont
from PIL.Image import Image
from torch import Tensor

from ..checks import raise_together, whole
from ..geometry import cell_centres, positive_mask

VIEW_SIDE = 336
"""Pixels of the longer side of a drawn view."""
GAP = 28
"""Pixels between the views."""
MARGIN = 8
"""Pixels around the views, so that dots at their edges are whole."""
CAPTION = 46
"""Pixels below the views, for the caption."""
DIMMED = 0.45
"""Brightness that is left to cells without a match."""
MIN_CELL = 10
"""Pixels of a cell below which its edges would hide the picture."""
SUPERSAMPLING = 2
"""Lines and words are drawn this many times larger and averaged down, which makes them smooth."""

Box = tuple[int, int, int, int]
"""Left, top, right, bottom: edges in pixels of the picture."""


class Match(NamedTuple):
    """Two matching cells, each by its number, row by row."""

    one: int
    two: int


def pairs_picture(
    view_one: Tensor,
    view_two: Tensor,
    map_one: Tensor,
    map_two: Tensor,
    grid: tuple[int, int],
    threshold: float,
    lines: int = 12,
) -> Image:
    """Two views side by side: matched cells bright, others dim, lines between some pairs.

    What lies around the views is transparent, so that the picture suits any page. The caption
    counts the pairs, or says that the views share no cell. Compares all cells of one view with all
    of the other, a quadratic cost.

    Args:
        view_one: ``(3, h, w)`` float RGB in [0, 1], as the network sees it but not normalised.
        view_two: The other view, likewise.
        map_one: ``(2, 3)`` float map of view one, unit square to source pixels.
        map_two: The other's.
        grid: Cells ``(h, w)`` of the map that the pixel loss compares.
        threshold: Distance in cell diagonals under which two cells match.
        lines: How many pairs to join, spread over the picture; 0 joins none.

    Returns:
        An RGBA picture.

    Raises:
        ValueError: A view is not ``(3, h, w)``, or a number is out of range.

    >>> whole_image = torch.tensor([[64.0, 0, 0], [0, 64, 0]])
    >>> left_half = torch.tensor([[32.0, 0, 0], [0, 64, 0]])
    >>> views = torch.rand(2, 3, 64, 64)
    >>> pairs_picture(*views, whole_image, left_half, (7, 7), 0.7).mode
    'RGBA'
    """
    raise_together(
        check_view("view_one", view_one), check_view("view_two", view_two), whole("lines", lines, 0)
    )
    one, two = (to_image.detach().to("cpu", torch.float32)[None] for to_image in (map_one, map_two))
    matches = positive_mask(one, two, grid, grid, threshold)[0]
    matched = matches.any(dim=1), matches.any(dim=0)
    drawn = [
        draw_view(*view_and_mask, grid)
        for view_and_mask in zip((view_one, view_two), matched, strict=True)
    ]
    canvas, boxes = side_by_side(drawn)
    selected = spread_matches(matches, one, two, grid, lines)
    return draw_over(canvas, boxes, selected, grid, count_words(matches))


def check_view(name: str, view: object) -> str | None:
    """The error message about anything but an RGB image."""
    if isinstance(view, Tensor) and view.ndim == 3 and view.shape[0] == 3:
        return None
    received = tuple(view.shape) if isinstance(view, Tensor) else type(view).__name__
    return (
        f"{name} is {received}; it must be a tensor (3, h, w), RGB in [0, 1]: choose three channels"
    )


def count_words(matches: Tensor) -> str:
    """The caption for matches ``(n1, n2)``: how many there are."""
    if not matches.any():
        return "no pairs: the views share no cell"
    share = matches.any(dim=1).float().mean().item()
    return f"{int(matches.sum())} pairs; {share:.0%} of the left view's cells have one"


def spread_matches(
    matches: Tensor, one: Tensor, two: Tensor, grid: tuple[int, int], count: int
) -> list[Match]:
    """At most ``count`` of the matches ``(n1, n2)``, by farthest point sampling in view one."""
    cells = matches.any(dim=1).nonzero().squeeze(1)
    if len(cells) == 0 or count == 0:
        return []
    centres_one, centres_two = (cell_centres(to_image, grid)[0] for to_image in (one, two))
    distance = torch.cdist(centres_one[cells], centres_two)
    nearest = distance.where(matches[cells], torch.inf).argmin(dim=1)  # of several, the nearest
    places = centres_one[cells]
    chosen = [int((places - places.mean(dim=0)).norm(dim=1).argmin())]
    distances = torch.cdist(places, places[chosen]).squeeze(1)
    while len(chosen) < min(count, len(cells)):
        chosen.append(int(distances.argmax()))
        distances = torch.minimum(distances, (places - places[chosen[-1]]).norm(dim=1))
    order = sorted(chosen, key=lambda index: places[index].tolist())  # colours follow the places
    return [Match(int(cells[index]), int(nearest[index])) for index in order]


def fit_size(size: Sequence[int], side: int) -> tuple[int, int]:
    """The size ``(height, width)`` whose longer side is ``side``, its aspect kept."""
    height, width = (max(1, round(length * side / max(size))) for length in size)
    return height, width


def to_pil(pixels: Tensor) -> Image:
    """An RGB image ``(3, h, w)`` with values in [0, 1] as a Pillow image, rounded."""
    rounded = (pixels.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Pillow.fromarray(rearrange(rounded, "rgb h w -> h w rgb").numpy())


def draw_view(view: Tensor, matched: Tensor, grid: tuple[int, int]) -> Image:
    """A view as it is drawn: cells that are not ``matched`` dimmed, edges of cells shown."""
    h, w = grid
    height, width = size = fit_size(view.shape[1:], VIEW_SIDE)
    bright = to_pil(view).resize(size[::-1], Pillow.Resampling.BICUBIC)
    table = rearrange(matched, "(h w) -> h w", h=h).to(torch.uint8) * 255
    mask = Pillow.fromarray(table.cpu().numpy()).resize(bright.size, Pillow.Resampling.NEAREST)
    dimmed = Pillow.composite(bright, bright.point(lambda value: value * DIMMED), mask)
    if min(width / w, height / h) < MIN_CELL:
        return dimmed
    edged = dimmed.copy()
    pen = ImageDraw.Draw(edged)
    for x in (column * width / w for column in range(1, w)):
        pen.line([(x, 0), (x, height)], "white")
    for y in (row * height / h for row in range(1, h)):
        pen.line([(0, y), (width, y)], "white")
    return Pillow.blend(dimmed, edged, 0.22)


def side_by_side(images: Sequence[Image]) -> tuple[Image, list[Box]]:
    """The images on a transparent ground, corners rounded; and each one's box."""
    height = max(image.height for image in images)
    width = sum(image.width for image in images) + GAP * (len(images) - 1)
    size = width + 2 * MARGIN, height + MARGIN + CAPTION
    canvas = Pillow.new("RGBA", size, (0, 0, 0, 0))
    boxes, left = [], MARGIN
    for image in images:
        top = MARGIN + (height - image.height) // 2
        mask = Pillow.new("L", (image.width * SUPERSAMPLING, image.height * SUPERSAMPLING), 0)
        corners = [0, 0, mask.width - 1, mask.height - 1]
        ImageDraw.Draw(mask).rounded_rectangle(corners, 8 * SUPERSAMPLING, fill=255)
        canvas.paste(image, (left, top), mask.resize(image.size, Pillow.Resampling.BOX))
        boxes.append((left, top, left + image.width, top + image.height))
        left += image.width + GAP
    return canvas, boxes


def draw_over(
    canvas: Image, boxes: list[Box], matches: list[Match], grid: tuple[int, int], caption: str
) -> Image:
    """The canvas with a line for each match, dots at its ends, and the caption below on a label."""
    s = SUPERSAMPLING
    layer = Pillow.new("RGBA", (canvas.width * s, canvas.height * s), (0, 0, 0, 0))
    pen = ImageDraw.Draw(layer)
    lines = []
    for number, match in enumerate(matches):
        ends = [cell_position(box, cell, grid) for box, cell in zip(boxes, match, strict=True)]
        colour = tuple(round(255 * c) for c in hls_to_rgb(number / len(matches), 0.5, 0.85))
        lines.append((ends, ((255, 255, 255, 210), (*colour, 255))))
    for ends, inks in lines:
        for width, ink in zip((4, 2), inks, strict=True):
            pen.line([(x * s, y * s) for x, y in ends], ink, width * s)
    for ends, inks in lines:  # over all lines, which would hide them
        for radius, ink in zip((6.5, 4.5), inks, strict=True):
            for x, y in ends:
                pen.ellipse([(v + sign * radius) * s for sign in (-1, 1) for v in (x, y)], ink)
    font = ImageFont.load_default(19 * s)
    anchor = layer.width / 2, layer.height - 20 * s
    left, top, right, bottom = pen.textbbox(anchor, caption, font, anchor="mm")
    label = [left - 12 * s, top - 8 * s, right + 12 * s, bottom + 8 * s]
    pen.rounded_rectangle(label, 8 * s, fill=(16, 20, 28, 215))
    pen.text(anchor, caption, (255, 255, 255, 255), font, anchor="mm")
    return Pillow.alpha_composite(canvas, layer.resize(canvas.size, Pillow.Resampling.BOX))


def cell_position(box: Box, cell: int, grid: tuple[int, int]) -> tuple[float, float]:
    """Where a cell's centre lies in the picture, ``(x, y)``."""
    (h, w), (left, top, right, bottom) = grid, box
    row, column = divmod(cell, w)
    return left + (right - left) * (column + 0.5) / w, top + (bottom - top) * (row + 0.5) / h
