"""What a network sees, as colours and as likeness: from feature maps to pictures.

All of it compares directions: features are scaled to length 1, as the losses do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from einops import einsum, rearrange
from torch import Tensor
from torch.nn.functional import interpolate, normalize, pad

from ..checks import raise_together
from .matches import picture

if TYPE_CHECKING:
    from PIL.Image import Image

FLATTEST = 0.05
"""Reach of an axis, in features of length 1, that is never stretched over all colours: what differs
less looks gray, as the features of a collapsed network should."""
CLIPPED = 0.01
"""Share of cells at either end of an axis whose colour is clipped."""


class Basis(NamedTuple):
    """How features become colours: ``0.5 + (unit features - mean) @ axes - middle``.

    Attributes:
        mean: ``(c,)`` what is taken from features of length 1.
        axes: ``(c, 3)`` directions that become red, green and blue, scaled.
        middle: ``(3,)`` what becomes gray.
    """

    mean: Tensor
    axes: Tensor
    middle: Tensor


def pca_colours(features: Tensor, basis: Basis | None = None) -> tuple[Tensor, Basis]:
    """Feature maps as colours: their first three principal components as red, green and blue.

    Cells of one colour have like features; which colour it is means nothing. Each component is
    stretched so that all but 1 % of the cells at either end fit, and its sign is such that the
    larger deviations lie above.

    Args:
        features: ``(n, c, h, w)`` float; the maps share their components, so that colours mean the
            same in all of them.
        basis: Components found before, so that other maps get comparable colours; None finds them.

    Returns:
        ``(n, 3, h, w)`` float32 in [0, 1], and the components.

    Raises:
        ValueError: The maps are no such tensor, or the basis is for other channels.
    """
    raise_together(feature_maps(features))
    cells = unit_cells(features)
    if basis is None:
        basis = stretched(cells, cells.mean(dim=0), components(cells, 3), FLATTEST)
    elif len(basis.mean) != cells.shape[1]:
        raise ValueError(
            f"basis is of {len(basis.mean)} channels, but the features have {cells.shape[1]}; take "
            "one that was found for this layer"
        )
    return coloured(cells, basis, features.shape), basis


def aligned_colours(features: Tensor, previous: Tensor) -> tuple[Tensor, Basis]:
    """The same images' colours at a later step, turned so that they are like the earlier ones.

    Principal components come in any order and sign, and the features themselves drift as a network
    learns, so that colours would jump from step to step. The three components are turned (or
    mirrored) as a whole to fit the earlier colours best: orthogonal Procrustes (Schoenemann, 1966).

    Args:
        features: ``(n, c, h, w)`` float, of the same images as before.
        previous: ``(n, 3, h, w)`` colours of the step before.

    Returns:
        ``(n, 3, h, w)`` float32 in [0, 1], and the components.

    Raises:
        ValueError: The maps are no such tensor, or the earlier colours are for other maps.
    """
    raise_together(feature_maps(features))
    n, _, h, w = features.shape
    if tuple(previous.shape) != (n, 3, h, w):
        raise ValueError(
            f"previous has shape {tuple(previous.shape)}; it must be ({n}, 3, {h}, {w}): the "
            "colours of the same images at the same layer"
        )
    cells = unit_cells(features)
    # Stretched first: else the strongest component alone would decide the turn.
    own = stretched(cells, cells.mean(dim=0), components(cells, 3), FLATTEST)
    wanted = rearrange(previous.detach().to("cpu", torch.float32), "n rgb h w -> (n h w) rgb") - 0.5
    left, _, right = torch.linalg.svd(scores(cells, own).mT @ wanted)
    # A turned cube sticks out of the cube of colours: make it smaller, but never stretch again.
    basis = stretched(cells, own.mean, own.axes @ (left @ right), 0.5)
    return coloured(cells, basis, features.shape), basis


def feature_maps(features: object) -> str | None:
    """The complaint about anything but feature maps."""
    if isinstance(features, Tensor) and features.ndim == 4 and features.numel() > 0:
        return None
    found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
    return f"features is {found}; it must be maps (n, c, h, w), as dense_features gives them"


def unit_cells(features: Tensor) -> Tensor:
    """Each cell's features, ``(n * h * w, c)`` float32 on the CPU, scaled to length 1."""
    cells = rearrange(features.detach(), "n c h w -> (n h w) c").to("cpu", torch.float32)
    return normalize(cells, dim=1)


def components(cells: Tensor, count: int) -> Tensor:
    """The principal directions ``(c, count)`` of cells ``(n, c)``, strongest first.

    Directions that are not there, of fewer channels than asked for, are zero.
    """
    cells = cells - cells.mean(dim=0)
    _, vectors = torch.linalg.eigh((cells.mT @ cells).double())  # weakest first
    strongest = vectors.flip(1)[:, :count].float()
    signs = torch.where((cells @ strongest).pow(3).sum(dim=0) < 0, -1.0, 1.0)
    return pad(strongest * signs, (0, count - strongest.shape[1]))


def stretched(cells: Tensor, mean: Tensor, axes: Tensor, flattest: float) -> Basis:
    """The axes scaled so that nearly all cells fit in a length of 1, or do not fill it.

    Args:
        cells: ``(n, c)`` features of length 1.
        mean: ``(c,)``.
        axes: ``(c, 3)``.
        flattest: Reach to either side that a flatter axis is taken to have.
    """
    ends = torch.tensor((CLIPPED, 1 - CLIPPED))
    low, high = nearest_quantiles((cells - mean) @ axes, ends)
    length = 2 * ((high - low) / 2).clamp(min=flattest)
    return Basis(mean, axes / length, (low + high) / 2 / length)


def nearest_quantiles(scores: Tensor, shares: Tensor) -> Tensor:
    """The values ``(shares, 3)`` under which these shares of the scores ``(n, 3)`` lie."""
    # Not torch.quantile, which refuses more than 16 million values.
    index = (shares * (len(scores) - 1)).round().long()
    return scores.sort(dim=0).values[index]


def scores(cells: Tensor, basis: Basis) -> Tensor:
    """Where cells ``(n, c)`` lie on the axes, ``(n, 3)``, gray at 0."""
    return (cells - basis.mean) @ basis.axes - basis.middle


def coloured(cells: Tensor, basis: Basis, shape: Sequence[int]) -> Tensor:
    """Cells ``(n * h * w, c)`` as colours ``(n, 3, h, w)`` in [0, 1]."""
    n, _, h, w = shape
    colours = (0.5 + scores(cells, basis)).clamp(0, 1)
    return rearrange(colours, "(n h w) rgb -> n rgb h w", n=n, h=h, w=w)


def likeness(features: Tensor, cell: tuple[int, int], other: Tensor | None = None) -> Tensor:
    """How much each cell of a map resembles one cell: the cosine of their features.

    Features behind a ReLU all point the same way and resemble each other; take the mean over the
    cells from them first, see `centred`.

    Args:
        features: ``(c, h, w)`` float, the map of the cell asked for.
        cell: Its ``(row, column)``; below 0 counts from the end.
        other: ``(c, h', w')`` float, the map to compare with; None takes the same.

    Returns:
        ``(h', w')`` float32 in [-1, 1].

    Raises:
        ValueError: The maps are of other channels, or the cell lies outside.
    """
    other = features if other is None else other
    if features.ndim != 3 or other.ndim != 3 or len(features) != len(other):
        raise ValueError(
            f"features are {tuple(features.shape)} and {tuple(other.shape)}; they must be maps "
            "(c, h, w) of the same layer"
        )
    (row, column), (_, h, w) = cell, features.shape
    if not (-h <= row < h and -w <= column < w):
        raise ValueError(f"cell is {cell}; it must be (row, column) on a map of {h}x{w} cells")
    chosen = normalize(features[:, row, column].float(), dim=0)
    return einsum(chosen, normalize(other.float(), dim=0), "c, c h w -> h w").clamp(-1, 1)


def centred(*maps: Tensor) -> list[Tensor]:
    """Maps ``(c, h, w)`` of length 1 in each cell, less the mean over the cells of all of them."""
    directions = [normalize(own.detach().to("cpu", torch.float32), dim=0) for own in maps]
    total = sum(own.sum(dim=(1, 2)) for own in directions)
    mean = total / sum(own[0].numel() for own in directions)
    return [own - rearrange(mean, "c -> c 1 1") for own in directions]


# Pictures of them.


def colours_picture(images: Tensor, *colours: Tensor, side: int = 160) -> Image:
    """Images in a row, and below each what the network sees of it, a row for each network or step.

    Args:
        images: ``(n, 3, h, w)`` float RGB in [0, 1].
        colours: ``(n, 3, h', w')`` each, as `pca_colours` gives them.
        side: Pixels that the longer side of an image is drawn with.

    Returns:
        An RGB picture, its gaps white.
    """
    h, w = images.shape[-2:]
    size = max(1, round(side * h / max(h, w))), max(1, round(side * w / max(h, w)))
    rows = [interpolate(images.cpu().float(), size, mode="bilinear", antialias=True)]
    rows += [interpolate(own.cpu().float(), size, mode="bilinear") for own in colours]
    framed = pad(torch.stack(rows), (0, 4, 0, 4), value=1.0)
    whole = rearrange(framed, "row n rgb h w -> rgb (row h) (n w)")
    return picture(whole[:, :-4, :-4])


def likeness_picture(
    images: Sequence[Tensor], features: Sequence[Tensor], cell: tuple[int, int], side: int = 320
) -> Image:
    """Two images side by side, bright where they resemble one cell of the first, which is ringed.

    Args:
        images: Two images ``(3, h, w)`` float RGB in [0, 1].
        features: Their maps ``(c, h', w')``; `centred` makes differences plain.
        cell: The cell's ``(row, column)`` in the first map.
        side: Pixels that the longer side of an image is drawn with.

    Returns:
        An RGB picture, its gap white.
    """
    from PIL import Image as Pillow
    from PIL import ImageDraw

    drawn = []
    for image, own in zip(images, features, strict=True):
        h, w = image.shape[-2:]
        size = max(1, round(side * h / max(h, w))), max(1, round(side * w / max(h, w)))
        alike = likeness(features[0], cell, own).clamp(min=0).cpu()
        shown = interpolate(image[None].cpu().float(), size, mode="bilinear", antialias=True)
        light = interpolate(alike[None, None], size, mode="bilinear")
        drawn.append(picture((shown * (0.12 + 0.88 * light))[0]))
    (row, column), (_, h, w) = cell, features[0].shape
    x = (column % w + 0.5) * drawn[0].width / w
    y = (row % h + 0.5) * drawn[0].height / h
    pen = ImageDraw.Draw(drawn[0])
    for radius, ink in ((7, "black"), (6, "white"), (5, "white")):
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], outline=ink)
    width = drawn[0].width + 8 + drawn[1].width
    canvas = Pillow.new("RGB", (width, max(one.height for one in drawn)), "white")
    canvas.paste(drawn[0], (0, 0))
    canvas.paste(drawn[1], (drawn[0].width + 8, 0))
    return canvas
