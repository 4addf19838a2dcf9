"""Correspondence: whether a cell finds its own spot in another view, without any labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..augment import VIEW_ONE, VIEW_TWO, Colour, Normalise, Photometry, blur_of
from ..blocks import Block, blocks
from ..checks import raise_together, whole
from ..geometry import Positives
from ..views import Placement, cut_views, draw_maps
from .features import Reader

PLACEMENT = Placement((0.5, 0.9), prob_hflip=0.5)
"""How the two views lie in their image: a quarter to four fifths of its area."""
THRESHOLD = 0.7
"""A match is right under this distance of centres, in cell diagonals: the paper's positives."""
NEAR = 1.5
"""A match is near under this one: two sides of a square cell are 1.41 diagonals."""


class Correspondence(NamedTuple):
    """How often cells of one view find their spot in the other.

    Attributes:
        hit1: Share of cells whose most similar cell of the other view is a true positive.
        hit_near: Share of them whose most similar cell lies within two cells of the right spot.
        chance: What `hit1` would be if the match were drawn blindly.
        chance_near: What `hit_near` would be.
        cells: Cells that were asked: those that see a spot which the other view sees as well.
    """

    hit1: float
    hit_near: float
    chance: float
    chance_near: float
    cells: int


class ViewPairs(NamedTuple):
    """Two views of each image: pixels ``(n, c, h, w)`` in [0, 1] and maps ``(n, 2, 3)``."""

    one: Tensor
    two: Tensor
    map_one: Tensor
    map_two: Tensor


def draw_pairs(
    images: Sequence[Tensor], size: tuple[int, int], seed: int, *, recoloured: bool = True
) -> ViewPairs:
    """Two views of each image, the same at each call and for every run.

    Args:
        images: ``(c, h, w)`` float in [0, 1], of any sizes, all of the same channels.
        size: ``(height, width)`` of the views.
        seed: Decides the views. No generator outside moves on.
        recoloured: Whether their colours are changed, as much as in the authors' code, whose blur
            is scaled to the views. Either way they lie in the same places.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's alone
        channels = images[0].shape[0]
        sizes = [(own.shape[-2], own.shape[-1]) for own in images]
        maps = [torch.cat([draw_maps(1, own, PLACEMENT) for own in sizes]) for _ in range(2)]
        views = []
        sharpness = blur_of(min(size))
        for at, authors in zip(maps, (VIEW_ONE, VIEW_TWO), strict=True):
            photometry = replace(authors, sigma=sharpness)
            cuts = [cut_views(own[None], at[i : i + 1], size) for i, own in enumerate(images)]
            cut = torch.cat(cuts)
            views.append(changed(cut, photometry, channels) if recoloured else cut)
    return ViewPairs(*views, *maps)


def changed(pixels: Tensor, photometry: Photometry, channels: int) -> Tensor:
    """Views changed in colour."""
    views: Tensor = Colour(photometry, channels)(pixels)
    return views


@torch.no_grad()
def correspondence(
    net: nn.Module,
    images: Sequence[Tensor],
    layer: str | None = None,
    *,
    size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    seed: int = 0,
    batch: int = 16,
) -> Correspondence:
    """How often a cell's most similar cell in another view of the image sees the same spot.

    Likeness is the cosine of features. A share of 1 is out of reach: where the views show one
    surface from edge to edge, nothing tells its cells apart.

    Args:
        net: The network, read in eval mode; modes are restored.
        images: ``(c, h, w)`` float in [0, 1], best ones that were not trained on.
        layer: The layer to read; None takes the deepest map, see `Reader`.
        size: ``(height, width)`` of the views.
        mean: Per-channel mean they are normalised with.
        std: Per-channel standard deviation, likewise.
        seed: Decides the views; equal seeds compare networks on equal views.
        batch: Images that are run at once.

    Raises:
        ValueError: No image, no cell that both views see, or a layer that gives no map.
    """
    raise_together(whole("batch", batch, 1))
    if len(images) == 0:
        raise ValueError("images is empty; give at least one image (c, h, w)")
    reader = Reader(net, [layer] if layer else None, images[0].shape[0], size)
    return matched(reader, draw_pairs(images, size, seed), mean, std, batch)


def matched(
    reader: Callable[[Tensor], Tensor],
    pairs: ViewPairs,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    batch: int = 16,
) -> Correspondence:
    """The same, of views that were drawn before."""
    normalise = Normalise(mean, std)
    sums = torch.zeros(5, dtype=torch.float64)
    for start in range(0, len(pairs.one), batch):
        part = ViewPairs(*(tensor[start : start + batch] for tensor in pairs))
        one, two = (reader(normalise(pixels)).cpu() for pixels in (part.one, part.two))
        sums += hits(one, two, part.map_one, part.map_two)
    *shares, cells = sums.tolist()
    if cells == 0:
        raise ValueError(
            f"in {len(pairs.one)} images no cell of one view lies in the other; give more images, "
            "or read a layer with more cells"
        )
    hit1, hit_near, chance, chance_near = (share / cells for share in shares)
    return Correspondence(hit1, hit_near, chance, chance_near, int(cells))


def hits(one: Tensor, two: Tensor, map_one: Tensor, map_two: Tensor) -> Tensor:
    """Sums over the cells with a true positive: hits, near hits, both chances, and their count.

    Args:
        one: ``(b, c, h, w)`` features of view one.
        two: ``(b, c, h', w')`` features of view two.
        map_one: ``(b, 2, 3)`` view maps.
        map_two: ``(b, 2, 3)`` likewise.

    Returns:
        ``(5,)`` float64.
    """
    grid_one, grid_two = ((view.shape[-2], view.shape[-1]) for view in (one, two))
    rules = [
        Positives(map_one, map_two, grid_one, grid_two, threshold)
        for threshold in (THRESHOLD, NEAR)
    ]
    cells_one, cells_two = (
        normalize(rearrange(view, "b c h w -> b (h w) c"), dim=-1) for view in (one, two)
    )
    sums = torch.zeros(5, dtype=torch.float64)
    for block in blocks(rules[0].shape):
        likeness = cells_one[block.images, block.rows] @ cells_two[block.images].mT
        sums += tally(likeness.argmax(dim=-1), rules, block)
    return sums


def tally(found: Tensor, rules: Sequence[Positives], block: Block) -> Tensor:
    """The same sums for one block; ``found`` is ``(images, rows)``, the match of each cell."""
    right, near = (rule.block(block) for rule in rules)
    asked = right.any(dim=-1)
    chosen = [table.gather(-1, found[..., None])[..., 0] for table in (right, near)]
    chances = [table.double().mean(dim=-1) for table in (right, near)]
    figures = torch.stack([*(hit.double() for hit in chosen), *chances, asked.double()])
    return (figures * asked).sum(dim=(1, 2))
