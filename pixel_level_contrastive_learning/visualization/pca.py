"""What a network sees, as colours and as likeness: feature maps as pictures.

Only the directions of features count: they are scaled to length 1, as in the losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import einsum, rearrange
from PIL import Image as Pillow
from PIL import ImageDraw
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import interpolate, normalize, pad

from ..checks import raise_together
from .matches import fit_size, to_pil

MIN_REACH = 0.05
"""An axis reaches at least this far to either side of gray, in features of length 1: the features
of a collapsed network, which differ less, look gray."""
CLIPPED = 0.01
"""Share of cells at either end of an axis whose colour is clipped."""
GAP = 4
"""Pixels between pictures."""


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

    def project(self, cells: Tensor) -> Tensor:
        """Where cells ``(n, c)`` lie on the axes, ``(n, 3)``, gray at 0."""
        return (cells - self.mean) @ self.axes - self.middle

    def colours(self, cells: Tensor, shape: Sequence[int]) -> Tensor:
        """Cells ``(n * h * w, c)`` as colours ``(n, 3, h, w)`` in [0, 1]."""
        n, _, h, w = shape
        colours = (0.5 + self.project(cells)).clamp(0, 1)
        return rearrange(colours, "(n h w) rgb -> n rgb h w", n=n, h=h, w=w)


def pca_colours(features: Tensor, basis: Basis | None = None) -> tuple[Tensor, Basis]:
    """Feature maps as colours: their first three principal components as red, green and blue.

    Cells of one colour have similar features; which colour it is means nothing. Each component is
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

    >>> colours, basis = pca_colours(torch.rand(2, 64, 7, 7))
    >>> colours.shape
    torch.Size([2, 3, 7, 7])
    >>> later, _ = pca_colours(torch.rand(1, 64, 9, 9), basis)  # colours mean the same
    """
    raise_together(check_maps(features))
    cells = unit_cells(features)
    if basis is None:
        basis = fit_basis(cells, cells.mean(dim=0), principal_components(cells, 3), MIN_REACH)
    elif len(basis.mean) != cells.shape[1]:
        raise ValueError(
            f"basis has {len(basis.mean)} channels, but the features have {cells.shape[1]}; use "
            "one that was found for this layer"
        )
    return basis.colours(cells, features.shape), basis


def aligned_colours(features: Tensor, previous: Tensor) -> tuple[Tensor, Basis]:
    """`pca_colours` of the same images at a later step, rotated to look like the previous ones."""
    raise_together(check_maps(features))
    n, _, h, w = features.shape
    if tuple(previous.shape) != (n, 3, h, w):
        raise ValueError(
            f"previous has shape {tuple(previous.shape)}; it must be ({n}, 3, {h}, {w}): the "
            "colours of the same images at the same layer"
        )
    cells = unit_cells(features)
    # Components come in any order and sign, and features drift: colours would jump from step to
    # step. So the components are rotated as a whole: orthogonal Procrustes (Schoenemann, 1966);
    # stretched first, else the strongest alone would decide the rotation.
    unaligned = fit_basis(cells, cells.mean(dim=0), principal_components(cells, 3), MIN_REACH)
    target = rearrange(previous.detach().to("cpu", torch.float32), "n rgb h w -> (n h w) rgb") - 0.5
    left, _, right = torch.linalg.svd(unaligned.project(cells).mT @ target)
    # A rotated cube sticks out of the cube of colours: make it smaller, but never stretch again.
    basis = fit_basis(cells, unaligned.mean, unaligned.axes @ (left @ right), 0.5)
    return basis.colours(cells, features.shape), basis


def check_maps(features: object) -> str | None:
    """The error message about anything but feature maps."""
    if isinstance(features, Tensor) and features.ndim == 4 and features.numel() > 0:
        return None
    received = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
    return f"features is {received}; it must be maps (n, c, h, w), such as the outputs of a layer"


def unit_cells(features: Tensor) -> Tensor:
    """Each cell's features, ``(n * h * w, c)`` float32 on the CPU, scaled to length 1."""
    cells = rearrange(features.detach(), "n c h w -> (n h w) c").to("cpu", torch.float32)
    return normalize(cells, dim=1)


def principal_components(cells: Tensor, count: int) -> Tensor:
    """The principal directions ``(c, count)`` of cells ``(n, c)``, strongest first, then zeros."""
    cells = cells - cells.mean(dim=0)
    _, vectors = torch.linalg.eigh((cells.mT @ cells).double())  # weakest first
    strongest = vectors.flip(1)[:, :count].float()
    signs = torch.where((cells @ strongest).pow(3).sum(dim=0) < 0, -1.0, 1.0)
    return pad(strongest * signs, (0, count - strongest.shape[1]))


def fit_basis(cells: Tensor, mean: Tensor, axes: Tensor, min_reach: float) -> Basis:
    """The axes ``(c, 3)`` scaled so that nearly all cells ``(n, c)`` lie within 0.5 of gray."""
    ordered = ((cells - mean) @ axes).sort(dim=0).values  # torch.quantile takes 16 million at most
    clipped = round(CLIPPED * (len(cells) - 1))
    low, high = ordered[clipped], ordered[-1 - clipped]
    length = 2 * ((high - low) / 2).clamp(min=min_reach)
    return Basis(mean, axes / length, (low + high) / 2 / length)


def likeness(features: Tensor, cell: tuple[int, int], other: Tensor | None = None) -> Tensor:
    """Cosine similarity ``(h', w')`` of each cell of a map ``(c, h', w')`` to one cell."""
    other = features if other is None else other
    if features.ndim != 3 or other.ndim != 3 or len(features) != len(other):
        raise ValueError(
            f"features are {tuple(features.shape)} and {tuple(other.shape)}; they must be maps "
            "(c, h, w) of the same layer"
        )
    (row, column), (_, h, w) = cell, features.shape
    if not (-h <= row < h and -w <= column < w):
        raise ValueError(f"cell is {cell}; it must be (row, column) on a map of {h}x{w} cells")
    direction = normalize(features[:, row, column].float(), dim=0)
    return einsum(direction, normalize(other.float(), dim=0), "c, c h w -> h w").clamp(-1, 1)


def centred(*maps: Tensor) -> list[Tensor]:
    """Maps ``(c, h, w)`` of length 1 in each cell, less the mean over the cells of all of them."""
    directions = [normalize(features.detach().to("cpu", torch.float32), dim=0) for features in maps]
    total = sum(direction.sum(dim=(1, 2)) for direction in directions)
    mean = total / sum(direction[0].numel() for direction in directions)
    return [direction - rearrange(mean, "c -> c 1 1") for direction in directions]


def colours_picture(images: Tensor, *colours: Tensor, side: int = 160) -> Image:
    """Images ``(n, 3, h, w)`` in [0, 1] in a row, and their `pca_colours` in rows below."""
    size = fit_size(images.shape[-2:], side)
    rows = [interpolate(images.cpu().float(), size, mode="bilinear", antialias=True)]
    rows += [interpolate(maps.cpu().float(), size, mode="bilinear") for maps in colours]
    framed = pad(torch.stack(rows), (0, GAP, 0, GAP), value=1.0)
    mosaic = rearrange(framed, "row n rgb h w -> rgb (row h) (n w)")
    return to_pil(mosaic[:, :-GAP, :-GAP])


def likeness_picture(
    images: Sequence[Tensor], features: Sequence[Tensor], cell: tuple[int, int], side: int = 320
) -> Image:
    """Two images side by side, bright where they resemble one cell of the first, which is ringed.

    Args:
        images: Two images ``(3, h, w)`` float RGB in [0, 1].
        features: Their maps ``(c, h', w')``. Features behind a ReLU all resemble each other:
            `centred` takes out their mean.
        cell: The cell's ``(row, column)`` in the first map; below 0 counts from the end.
        side: Pixels of the longer side of a drawn image.

    Returns:
        An RGB picture, its gap white.

    Raises:
        ValueError: The maps are of other channels, or the cell lies outside.

    >>> likeness_picture(torch.rand(2, 3, 64, 64), torch.rand(2, 16, 7, 7), (3, 3)).size
    (648, 320)
    """
    pictures = []
    for image, feature_map in zip(images, features, strict=True):
        size = fit_size(image.shape[-2:], side)
        similarity = likeness(features[0], cell, feature_map).clamp(min=0).cpu()
        resized = interpolate(image[None].cpu().float(), size, mode="bilinear", antialias=True)
        light = interpolate(similarity[None, None], size, mode="bilinear")
        pictures.append(to_pil((resized * (0.12 + 0.88 * light))[0]))
    one, two = pictures
    (row, column), (_, h, w) = cell, features[0].shape
    x, y = (column % w + 0.5) * one.width / w, (row % h + 0.5) * one.height / h
    pen = ImageDraw.Draw(one)
    for radius, ink in ((7, "black"), (6, "white"), (5, "white")):
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], outline=ink)
    canvas = Pillow.new("RGB", (one.width + 8 + two.width, max(one.height, two.height)), "white")
    canvas.paste(one, (0, 0))
    canvas.paste(two, (one.width + 8, 0))
    return canvas
