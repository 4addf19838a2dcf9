"""The pairs picture: two views side by side, lines between cells that see the same spot."""

from __future__ import annotations

from colorsys import hls_to_rgb
from math import ceil
from typing import TYPE_CHECKING, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import interpolate

from ..checks import raise_together, whole
from ..evaluation.features import Reader
from ..geometry import cell_centres, positive_mask

if TYPE_CHECKING:
    from PIL.Image import Image

VIEW_SIDE = 336
"""Pixels that the longer side of a view is drawn with."""
GAP = 28
"""Pixels between the views."""
FINER = 2
"""Lines are drawn this many times larger and averaged down, which makes them smooth."""
MARGIN = 8
"""Pixels around the views, so that dots at their edges are whole."""
CAPTION = 46
"""Pixels below the views, for the words."""
DIMMED = 0.45
"""Brightness that is left to cells without a match."""
SMALLEST_CELL = 10
"""Pixels below which the edges of cells would hide the picture."""


class Line(NamedTuple):
    """A pair of matching cells, each by its number, row by row."""

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

    What lies around the views is transparent, so that the picture suits any page. The words below
    it count the pairs; where the views share no cell, they say so. Compares all cells of one view
    with all of the other, a quadratic cost.

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
    """
    raise_together(
        rgb_view("view_one", view_one), rgb_view("view_two", view_two), whole("lines", lines, 0)
    )
    one, two = (own.detach().to("cpu", torch.float32)[None] for own in (map_one, map_two))
    matches = positive_mask(one, two, grid, grid, threshold)[0]
    views = view_one, view_two
    matched = matches.any(dim=1), matches.any(dim=0)
    canvas, corners = mount([lit(v, m, grid) for v, m in zip(views, matched, strict=True)])
    joined = spread_lines(matches, one, two, grid, lines)
    draw_lines(canvas, corners, joined, grid)
    return captioned(canvas, in_words(int(matches.sum()), int(matched[0].sum()), grid))


def rgb_view(name: str, view: Tensor) -> str | None:
    """The complaint about anything but an RGB image."""
    if isinstance(view, Tensor) and view.ndim == 3 and view.shape[0] == 3:
        return None
    found = tuple(view.shape) if isinstance(view, Tensor) else type(view).__name__
    return f"{name} is {found}; it must be a tensor (3, h, w), RGB in [0, 1]: choose three channels"


def in_words(pairs: int, cells: int, grid: tuple[int, int]) -> str:
    """How many pairs there are, for the reader of the picture."""
    if pairs == 0:
        return "no pairs: the views share no cell"
    return f"{pairs} pairs; {cells / (grid[0] * grid[1]):.0%} of the left view's cells have one"


def spread_lines(
    matches: Tensor, one: Tensor, two: Tensor, grid: tuple[int, int], count: int
) -> list[Line]:
    """Pairs far from each other: each begins at the cell farthest from those already chosen.

    Args:
        matches: ``(n1, n2)`` bool.
        one: ``(1, 2, 3)`` map of view one.
        two: ``(1, 2, 3)`` map of view two.
        grid: Cells ``(h, w)``.
        count: How many, at most.
    """
    cells = matches.any(dim=1).nonzero().squeeze(1)
    if len(cells) == 0 or count == 0:
        return []
    centres_one, centres_two = (cell_centres(own, grid)[0] for own in (one, two))
    distance = torch.cdist(centres_one[cells], centres_two)
    nearest = distance.where(matches[cells], torch.inf).argmin(dim=1)  # of several, the nearest
    places = centres_one[cells]
    chosen = [int((places - places.mean(dim=0)).norm(dim=1).argmin())]
    away = torch.cdist(places, places[chosen]).squeeze(1)
    while len(chosen) < min(count, len(cells)):
        chosen.append(int(away.argmax()))
        away = torch.minimum(away, (places - places[chosen[-1]]).norm(dim=1))
    order = sorted(chosen, key=lambda index: places[index].tolist())  # colours follow the places
    return [Line(int(cells[index]), int(nearest[index])) for index in order]


# Drawing.


def picture(pixels: Tensor) -> Image:
    """An RGB image ``(3, h, w)`` with values in [0, 1] as a Pillow image."""
    from PIL import Image as Pillow

    bytes_ = (pixels.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Pillow.fromarray(rearrange(bytes_, "rgb h w -> h w rgb").numpy())


def lit(view: Tensor, matched: Tensor, grid: tuple[int, int]) -> Image:
    """A view in its drawn size: cells without a match dimmed, the edges of cells shown.

    Args:
        view: ``(3, h, w)`` RGB in [0, 1].
        matched: ``(cells,)`` bool.
        grid: Cells ``(h, w)``.
    """
    from PIL import Image as Pillow

    h, w = view.shape[1:]
    scale = VIEW_SIDE / max(h, w)
    size = max(1, round(w * scale)), max(1, round(h * scale))
    bright = picture(view).resize(size, Pillow.Resampling.BICUBIC)
    table = rearrange(matched, "(h w) -> h w", h=grid[0]).to(torch.uint8) * 255
    where = Pillow.fromarray(table.cpu().numpy()).resize(size, Pillow.Resampling.NEAREST)
    dim = bright.point(lambda value: value * DIMMED)
    shown = Pillow.composite(bright, dim, where)
    if min(size[0] / grid[1], size[1] / grid[0]) < SMALLEST_CELL:
        return shown
    return Pillow.blend(shown, with_edges(shown, grid), 0.22)


def with_edges(image: Image, grid: tuple[int, int]) -> Image:
    """The image with white lines where its cells meet."""
    from PIL import ImageDraw

    edged = image.copy()
    pen = ImageDraw.Draw(edged)
    (h, w), (width, height) = grid, image.size
    for column in range(1, w):
        pen.line([(column * width / w, 0), (column * width / w, height)], "white")
    for row in range(1, h):
        pen.line([(0, row * height / h), (width, row * height / h)], "white")
    return edged


def mount(images: list[Image]) -> tuple[Image, list[tuple[int, int, int, int]]]:
    """The images side by side on a transparent ground, corners rounded; and each one's box."""
    from PIL import Image as Pillow
    from PIL import ImageDraw

    height = max(image.height for image in images)
    width = sum(image.width for image in images) + GAP * (len(images) - 1)
    size = width + 2 * MARGIN, height + MARGIN + CAPTION
    canvas = Pillow.new("RGBA", size, (0, 0, 0, 0))
    boxes, left = [], MARGIN
    for image in images:
        top = MARGIN + (height - image.height) // 2
        large = Pillow.new("L", (image.width * FINER, image.height * FINER), 0)
        shape = ImageDraw.Draw(large)
        shape.rounded_rectangle([0, 0, large.width - 1, large.height - 1], 8 * FINER, fill=255)
        canvas.paste(image, (left, top), large.resize(image.size, Pillow.Resampling.BOX))
        boxes.append((left, top, left + image.width, top + image.height))
        left += image.width + GAP
    return canvas, boxes


def draw_lines(
    canvas: Image,
    boxes: list[tuple[int, int, int, int]],
    lines: list[Line],
    grid: tuple[int, int],
) -> None:
    """Draw the lines in colours of one lightness, each with a white rim and a dot at both ends."""
    from PIL import Image as Pillow
    from PIL import ImageDraw

    layer = Pillow.new("RGBA", (canvas.width * FINER, canvas.height * FINER), (0, 0, 0, 0))
    pen = ImageDraw.Draw(layer)
    for number, line in enumerate(lines):
        ends = [middle(box, cell, grid) for box, cell in zip(boxes, line, strict=True)]
        hue = number / max(len(lines), 1)
        colour = tuple(round(255 * part) for part in hls_to_rgb(hue, 0.5, 0.85))
        for width, radius, ink in ((4, 6.5, (255, 255, 255, 210)), (2, 4.5, (*colour, 255))):
            pen.line([(x * FINER, y * FINER) for x, y in ends], ink, round(width * FINER))
            for x, y in ends:
                pen.ellipse([(v + way * radius) * FINER for way in (-1, 1) for v in (x, y)], ink)
    canvas.alpha_composite(layer.resize(canvas.size, Pillow.Resampling.BOX))


def middle(box: tuple[int, int, int, int], cell: int, grid: tuple[int, int]) -> tuple[float, float]:
    """Where a cell's centre lies in the picture, ``(x, y)``."""
    (h, w), (left, top, right, bottom) = grid, box
    row, column = divmod(cell, w)
    return left + (right - left) * (column + 0.5) / w, top + (bottom - top) * (row + 0.5) / h


def captioned(canvas: Image, words: str) -> Image:
    """The picture with words on a dark label below the views."""
    from PIL import Image as Pillow
    from PIL import ImageDraw, ImageFont

    font = ImageFont.load_default(19 * FINER)
    layer = Pillow.new("RGBA", (canvas.width * FINER, canvas.height * FINER), (0, 0, 0, 0))
    pen = ImageDraw.Draw(layer)
    foot = layer.width / 2, layer.height - 20 * FINER
    left, top, right, bottom = pen.textbbox(foot, words, font, anchor="mm")
    around = 12 * FINER, 8 * FINER
    label = [left - around[0], top - around[1], right + around[0], bottom + around[1]]
    pen.rounded_rectangle(label, 8 * FINER, fill=(16, 20, 28, 215))
    pen.text(foot, words, (255, 255, 255, 255), font, anchor="mm")
    return Pillow.alpha_composite(canvas, layer.resize(canvas.size, Pillow.Resampling.BOX))


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
