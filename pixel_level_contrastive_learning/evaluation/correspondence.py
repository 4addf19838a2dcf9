"""Correspondence: whether a cell finds its own spot in another view, without any labels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import normalize

from ..augment import VIEW_ONE, VIEW_TWO, Colour, Normalise, blur_of
from ..blocks import Block, blocks
from ..data.image import ImageError
from ..data.sources import Source, open_source
from ..geometry import Positives
from ..views import Placement, cut_views, draw_maps
from .baselines import input_sizes, layers_read, line_up, prepare_all
from .comparison import CLEAR, LUCK, gain, in_words, may_be_luck
from .features import Preparation, Reader, Size
from .health import Gauge, gauge, verdict
from .results import Evaluation, Row

log = logging.getLogger(__name__)

PLACEMENT = Placement((0.5, 0.9), prob_hflip=0.5)
"""How the two views lie in their image: a quarter to four fifths of its area."""
THRESHOLD = 0.7
"""A match is right under this distance of centres, in cell diagonals: the paper's positives."""
NEAR = 1.5
"""A match is near under this one: two sides of a square cell are 1.41 diagonals."""
MOST_IMAGES = 64
"""Images that are looked at, spread evenly over all."""
SHOWN = 5
"""Images left out that are named; the others are counted."""
MOST_CELLS = 4096
"""Cells that spread and rank are taken of."""
HIT, KEPT, HIT_NEAR = "hit@1", "hit@1, colours kept", "hit within 2 cells"
CHANCE, NEAR_CHANCE = "hit@1 by chance", "within 2 cells by chance"
BY_COLOUR = 0.8
"""Share of the hits with colours kept under which, once colours are changed, a network that finds
no more than random weights is said to go by colour. On street scenes a trained one kept 0.94 of
them, one trained without any change of colour 0.75, random weights all."""


class Correspondence(NamedTuple):
    """How often cells of one view find their spot in the other."""

    hit1: float  # share of cells whose most similar cell of the other view is a true positive
    hit_near: float  # share of them whose most similar cell lies within two cells of the right spot
    chance: float  # what hit1 would be if the match were drawn blindly
    chance_near: float  # what hit_near would be
    cells: int  # cells that were asked: those that see a spot which the other view sees as well


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
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        maps = [torch.cat([draw_maps(1, full, PLACEMENT) for full in sizes]) for _ in range(2)]
        views = []
        sharpness = blur_of(min(size))
        for at, authors in zip(maps, (VIEW_ONE, VIEW_TWO), strict=True):
            photometry = replace(authors, sigma=sharpness)
            cuts = [cut_views(image[None], at[i : i + 1], size) for i, image in enumerate(images)]
            cut = torch.cat(cuts)
            views.append(Colour(photometry, channels).forward(cut) if recoloured else cut)
    return ViewPairs(*views, *maps)


@torch.no_grad()
def measure_correspondence(
    reader: Callable[[Tensor], Tensor],
    pairs: ViewPairs,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    batch: int = 16,
) -> Correspondence:
    """How often a cell's most similar cell in another view of the image sees the same spot.

    Likeness is the cosine of features. A share of 1 is out of reach: where the views show one
    surface from edge to edge, nothing tells its cells apart.

    Args:
        reader: Gives the features of views.
        pairs: Views in [0, 1].
        mean: Per-channel mean they are normalised with.
        std: Per-channel standard deviation, likewise.
        batch: Images that are run at once.

    Raises:
        ValueError: No cell that both views see.
    """
    normalise = Normalise(mean, std)
    sums = torch.zeros(5, dtype=torch.float64)
    for *views, map_one, map_two in zip(*(torch.split(each, batch) for each in pairs), strict=True):
        one, two = (reader(normalise(pixels)).cpu() for pixels in views)
        sums += hits(one, two, map_one, map_two)
    *shares, cells = sums.tolist()
    if cells == 0:
        raise ValueError(
            f"in {len(pairs.one)} images no cell of one view falls inside the other; use more "
            "images, or read a layer with more cells"
        )
    hit1, hit_near, chance, chance_near = (share / cells for share in shares)
    return Correspondence(hit1, hit_near, chance, chance_near, int(cells))


def hits(one: Tensor, two: Tensor, map_one: Tensor, map_two: Tensor) -> Tensor:
    """Sums over the cells with a true positive: hits, near hits, both chances, and their count.

    Of features ``(b, c, h, w)`` of two views and their maps ``(b, 2, 3)``; ``(5,)`` float64.
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


def tally(matches: Tensor, rules: Sequence[Positives], block: Block) -> Tensor:
    """The same sums for one block; ``matches`` is ``(images, rows)``, the match of each cell."""
    right, near = (rule.block(block) for rule in rules)
    asked = right.any(dim=-1)
    chosen = [table.gather(-1, matches[..., None])[..., 0] for table in (right, near)]
    chances = [table.double().mean(dim=-1) for table in (right, near)]
    figures = torch.stack([*(hit.double() for hit in chosen), *chances, asked.double()])
    return (figures * asked).sum(dim=(1, 2))


def evaluate_unlabelled(
    weights: Sequence[str | Path],
    images: str | Path,
    layers: Sequence[str] | None,
    size: int | Size | None,
    seeds: range,
    device: torch.device,
    reading: Mapping[str, Any],
) -> Evaluation:
    """Evaluate weights beside random ones on images alone, all given as `evaluate` takes them.

    Each seed decides the views and the random weights of a repeat; ``reading`` opens the images.

    Raises:
        ValueError: No image can be read and is for this network.
    """
    source = open_source(images, **reading)
    contenders, notes = line_up(weights, source, layers)
    views = (size, size) if isinstance(size, int) else size
    prepared = prepare_all(contenders, views, seeds[0], views=True)
    forms = {prepare.form: prepare for prepare in prepared.values()}
    wanted = 2 * max(prepare.shortest for prepare in forms.values())

    def smaller(prepare: Preparation, pixels: Tensor) -> Tensor:
        shorter = min(2 * prepare.shortest, *pixels.shape[-2:])
        return replace(prepare, size=shorter).resized(pixels)

    used, unused = some_images(source, list(forms.values()), MOST_IMAGES, wanted, smaller)
    seen = dict(zip(forms, zip(*(each for _, each in used), strict=True), strict=True))
    figures: dict[str, list[dict[str, float]]] = {contender.name: [] for contender in contenders}
    for seed in seeds:
        pairs: dict[object, list[ViewPairs]] = {}
        for contender in contenders:
            prepare, card = prepared[contender.name], contender.card
            assert isinstance(prepare.size, tuple)
            if prepare.form not in pairs:
                pairs[prepare.form] = [
                    draw_pairs(seen[prepare.form], prepare.size, seed, recoloured=new)
                    for new in (True, False)
                ]
            names = list(layers or [card.shown_layer])
            net = contender.build(seed).to(device)
            reader = Reader(net, names, card.channels, prepare.size, fast=True)
            changed, plain = pairs[prepare.form]
            reached = figures_of(reader, changed, plain, prepare)
            figures[contender.name].append(reached)
            net.cpu()  # it is kept for other seeds, and needs no room on the device
            log.info("%s, seed %d: hit@1 %.3f", contender.name, seed, reached[HIT])
    rows = [
        Row.of(contender.name, figures[contender.name], baselines=contender.baselines)
        for contender in contenders
    ]
    return Evaluation(
        weights=", ".join(map(str, weights)),
        data=str(images),
        protocol="correspondence",
        settings={
            "images": len(used),
            "layers": layers_read(contenders, layers),
            "views": input_sizes(prepared.values()),
            "seeds": len(seeds),
        },
        rows=tuple(rows),
        sentence=in_words(rows, correspondence_in_words),
        notes=(*notes, *unused),
    )


def some_images(
    source: Source,
    forms: Sequence[Preparation],
    count: int,
    shortest: int,
    fit: Callable[[Preparation, Tensor], Tensor],
) -> tuple[list[tuple[str, list[Tensor]]], list[str]]:
    """Names and pixels of images, evenly spread over all, and notes on those that cannot be used.

    They are decoded with a shorter side of at least ``shortest``, and ``fit`` gives pixels
    ``(c, h, w)`` in [0, 1] of each form the size that is wanted.

    Raises:
        ValueError: None can be used.
    """
    images: list[tuple[str, list[Tensor]]] = []
    refused: list[str] = []
    for index in evenly(len(source), count):
        name = source.name(index)
        try:
            image = source.open(index)
            for prepare in forms:
                prepare.statistics.check(image)
            read = image.read(shortest)
        except ImageError as error:
            refused.append(f"{name}: {error}")
            continue
        images.append((name, [fit(prepare, prepare.in_range(read, name)) for prepare in forms]))
        if len(images) == count:
            break
    if not images:
        raise ValueError(none_left(refused, forms[0]))
    notes = left_out(refused)
    for note in notes:
        log.warning(note)
    return images, notes


def evenly(length: int, count: int) -> list[int]:
    """All numbers below ``length``: first ``count`` evenly spread, then the others."""
    first = [length * k // count for k in range(min(count, length))] if length > count else []
    return list(dict.fromkeys([*first, *range(length)]))


def left_out(refused: Sequence[str]) -> list[str]:
    """What is to be said of images that cannot be used."""
    more = len(refused) - SHOWN
    rest = [f"left out {more} more images"] if more > 0 else []
    return [*(f"left out {reason}" for reason in refused[:SHOWN]), *rest]


def none_left(refused: Sequence[str], prepare: Preparation) -> str:
    """The error message about images none of which can be used."""
    form = prepare.statistics
    return (
        f"none of {len(refused)} images can be used; the first: {refused[0]}; give a "
        "folder of images that open in a viewer and match the network's input: "
        f"{form.channels} channels{', 8-bit' if form.low is None else ''}"
    )


def figures_of(
    reader: Reader, pairs: ViewPairs, plain: ViewPairs, prepare: Preparation
) -> dict[str, float]:
    """The figures of a network on views drawn before, with colours changed and with them kept."""
    form = prepare.statistics
    recoloured: Correspondence = measure_correspondence(reader, pairs, form.mean, form.std)
    kept = measure_correspondence(reader, plain, form.mean, form.std)
    health = health_of(reader, pairs.one, prepare)
    return {
        HIT: recoloured.hit1,
        KEPT: kept.hit1,
        HIT_NEAR: recoloured.hit_near,
        CHANCE: recoloured.chance,
        NEAR_CHANCE: recoloured.chance_near,
        "spread": health.spread,
        "effective rank": health.effective_rank,
    }


def health_of(reader: Reader, pixels: Tensor, prepare: Preparation) -> Gauge:
    """Spread and rank of some cells of all views ``(n, c, h, w)`` in [0, 1]."""
    each = max(1, MOST_CELLS // len(pixels))
    generator = torch.Generator().manual_seed(0)
    kept = []
    for batch in torch.split(pixels, 16):
        maps = reader(prepare.normalised(batch)).cpu()
        for cells in rearrange(maps, "b c h w -> b (h w) c"):
            kept.append(cells[torch.randperm(len(cells), generator=generator)[:each]])
    return gauge(torch.cat(kept))


def correspondence_in_words(rows: Sequence[Row]) -> str:
    """The figures of weights in words, in the last row, beside random ones and their start."""
    random, start, ours = rows[0].scores, rows[-2:][0], rows[-1].scores
    rival = max(start, rows[0], key=lambda row: row.scores[HIT])
    text = (
        f"Cells find the same spot in another view of the image {ours[HIT]:.0%} of the time "
        f"({random[HIT]:.0%} with random weights, {ours[CHANCE]:.1%} by chance)"
    )
    health = str(verdict(ours["spread"], ours["effective rank"]))
    if len(rows) == 1 or not isfinite(ours["spread"]):
        return f"{text}. {health}"
    if ours[HIT] < min(BY_COLOUR * ours[KEPT], CLEAR * random[HIT]):
        health = (
            f"Matching relies on colour: {ours[KEPT]:.0%} with colours unchanged. Use stronger "
            f"colour augmentation in training (--jitter, --prob-gray). {health}"
        )
    base = "random weights"
    if len(rows) == 3:
        base = "the starting weights"
        text += f"; {start.scores[HIT]:.0%} with {base}"
    gained = gain(rows[-1], start, HIT)
    if gained < 0:
        return f"{text}: less often than {base}. {health}"
    if gained == 0:
        return f"{text}: no clear gain over {base}. {health}"
    better = f"{text}: clearly better than {base}"
    if gain(rows[-1], rows[0], HIT) < 1:
        return f"{better}, but not than random weights. {health}"
    if may_be_luck(rows[-1], rival, HIT):
        return f"{text}: {LUCK} {health}"
    return f"{better}. {health}"
