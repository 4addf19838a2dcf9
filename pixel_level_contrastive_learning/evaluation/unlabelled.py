"""Unlabelled images: what can be said of weights without masks. Correspondence and health."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from math import isfinite
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from ..data.raster import SCALES, Unreadable, upright
from ..data.sources import Source, open_source
from .contenders import RANDOM, SHUT, line_up
from .correspondence import Correspondence, ViewPairs, draw_pairs, matched
from .features import Reader
from .health import Gauge, gauge, verdict
from .outcome import CLEAR, LUCK, Evaluation, Row, gain, may_be_luck
from .preparation import Preparation, Size

log = logging.getLogger(__name__)

MOST_IMAGES = 64
"""Images that are looked at, spread evenly over all."""
SHOWN = 5
"""Images left out that are named; the others are counted."""
MOST_CELLS = 4096
"""Cells that spread and rank are taken of."""
HIT, KEPT, NEAR = "hit@1", "hit@1, colours kept", "hit within 2 cells"
CHANCE, NEAR_CHANCE = "hit@1 by chance", "within 2 cells by chance"
BY_COLOUR = 0.8
"""Share of the hits with colours kept under which, once colours are changed, a network that finds
no more than random weights is said to go by colour. On street scenes a trained one kept 0.94 of
them, one trained without any change of colour 0.75, random weights all."""


def without_labels(
    weights: str | Path,
    images: str | Path,
    layers: Sequence[str] | None,
    size: int | Size | None,
    seeds: range,
    device: torch.device,
) -> Evaluation:
    """Judge weights and random ones by images alone.

    Args:
        weights: As for `evaluate`.
        images: A folder, a list of paths and so on, see `open_source`.
        layers: Layers whose features are judged; None for the one that was trained.
        size: Pixels a side of the views, or ``(height, width)``; None for those of the training.
        seeds: Each decides the views and the random weights of a repeat.
        device: Where to compute.

    Raises:
        ValueError: No image can be read and is for this network.
    """
    source = open_source(images)
    field = line_up(weights, source)
    card = field.card
    views = (size, size) if isinstance(size, int) else size or card.image_size
    prepare = Preparation.of(card, views, field.contenders[-1].build(seeds[0]))
    seen, refused = some_images(source, prepare)
    notes = list(field.notes)
    for note in left_out(refused):
        log.warning(note)
        notes.append(note)
    names = list(layers) if layers else [card.pixel_layer]
    changed, kept = (
        [draw_pairs(seen, views, seed, recoloured=new) for seed in seeds] for new in (True, False)
    )
    rows = []
    for contender in field.contenders:
        figures = []
        for seed, pairs, plain in zip(seeds, changed, kept, strict=True):
            net = contender.build(seed).to(device)
            reader = Reader(net, names, card.channels, views)
            figures.append(judged(reader, pairs, plain, prepare))
            log.info("%s, seed %d: hit@1 %.3f", contender.name, seed, figures[-1][HIT])
        rows.append(Row.of(contender.name, figures))
    return Evaluation(
        weights=str(weights),
        data=str(images),
        protocol="correspondence",
        settings={
            "images": len(seen),
            "layers": names,
            "views": "{}x{}".format(*views),
            "seeds": len(seeds),
        },
        rows=tuple(rows),
        sentence=what_it_means(rows),
        notes=tuple(notes),
    )


def some_images(source: Source, prepare: Preparation) -> tuple[list[Tensor], list[str]]:
    """Images ``(c, h, w)`` in [0, 1], and what is wrong with those that cannot be used.

    Large ones are made smaller, their shorter side at least twice that of the views.

    Raises:
        ValueError: None can be used.
    """
    wanted = 2 * prepare.shortest
    seen: list[Tensor] = []
    refused: list[str] = []
    for index in evenly(len(source), MOST_IMAGES):
        try:
            opened = source.open(index)
            prepare.statistics.accepts(opened)
            fitting = [s for s in SCALES if min(opened.size) >= wanted * s]
            raster = opened.raster(max(fitting, default=1))
        except Unreadable as error:
            refused.append(f"{source.name(index)}: {error}")
            continue
        pixels = prepare.in_range(upright(raster.pixels, opened.orientation), source.name(index))
        shorter = min(pixels.shape[-2:])
        smaller = Preparation(prepare.statistics, min(wanted, shorter))
        seen.append(smaller.resized(pixels))
        if len(seen) == MOST_IMAGES:
            break
    if not seen:
        raise ValueError(none_left(refused, prepare))
    return seen, refused


def evenly(length: int, count: int) -> list[int]:
    """All numbers below ``length``: first ``count`` evenly spread, then the others."""
    first = [length * k // count for k in range(min(count, length))] if length > count else []
    return list(dict.fromkeys([*first, *range(length)]))


def left_out(refused: Sequence[str]) -> list[str]:
    """What is to be said of images that cannot be used."""
    more = len(refused) - SHOWN
    rest = [f"left out {more} more images"] if more > 0 else []
    return [*(f"left out {own}" for own in refused[:SHOWN]), *rest]


def none_left(refused: Sequence[str], prepare: Preparation) -> str:
    """The complaint about images none of which can be used."""
    form = prepare.statistics
    return (
        f"none of {len(refused)} images can be used, the first because of {refused[0]}; give a "
        "folder of images that open in a viewer and are as the network knows them: "
        f"{form.channels} channels{', 8-bit' if form.low is None else ''}"
    )


def judged(
    reader: Reader, pairs: ViewPairs, plain: ViewPairs, prepare: Preparation
) -> dict[str, float]:
    """The figures of a network on views drawn before, with colours changed and with them kept."""
    form = prepare.statistics
    found: Correspondence = matched(reader, pairs, form.mean, form.std)
    kept = matched(reader, plain, form.mean, form.std)
    health = health_of(reader, pairs.one, prepare)
    return {
        HIT: found.hit1,
        KEPT: kept.hit1,
        NEAR: found.hit_near,
        CHANCE: found.chance,
        NEAR_CHANCE: found.chance_near,
        "spread": health.spread,
        "effective rank": health.effective_rank,
    }


def health_of(reader: Reader, pixels: Tensor, prepare: Preparation, batch: int = 16) -> Gauge:
    """Spread and rank of some cells of all views ``(n, c, h, w)`` in [0, 1]."""
    each = max(1, MOST_CELLS // len(pixels))
    dice = torch.Generator().manual_seed(0)
    kept = []
    for first in range(0, len(pixels), batch):
        maps = reader(prepare.normalised(pixels[first : first + batch])).cpu()
        for cells in rearrange(maps, "b c h w -> b (h w) c"):
            kept.append(cells[torch.randperm(len(cells), generator=dice)[:each]])
    return gauge(torch.cat(kept))


def what_it_means(rows: Sequence[Row]) -> str:
    """The figures in words."""
    random, start, ours = rows[0].scores, rows[-2:][0], rows[-1].scores
    found = (
        f"A cell finds its own spot in another view of its image in {ours[HIT]:.0%} of cases "
        f"({random[HIT]:.0%} with random weights, {ours[CHANCE]:.1%} by chance)"
    )
    health = str(verdict(ours["spread"], ours["effective rank"]))
    if not isfinite(ours["spread"]):
        return f"{found}. {health}"
    if ours[HIT] < min(BY_COLOUR * ours[KEPT], CLEAR * random[HIT]):
        health = (
            f"It goes by colour: with colours left as they are it finds {ours[KEPT]:.0%}. Change "
            f"colour more in training (--jitter, --prob-gray). {health}"
        )
    if len(rows) == 1:
        return f"{found}. {health}"
    begun = "random weights"
    if len(rows) == 3:
        begun = "what it started from"
        found += f"; {begun} finds it in {start.scores[HIT]:.0%}"
    gained = gain(rows[-1], start, HIT)
    if gained < 0:
        return f"{found}: fewer than {begun}. {health}"
    if gained == 0:
        return f"{found}: no clear gain over {begun}. {health}"
    better = f"{found}: the weights tell spots apart better than {begun}"
    if gain(rows[-1], rows[0], HIT) < 1:
        return f"{better}, but no better than random weights do. {health}"
    if start.name in (RANDOM, SHUT) and may_be_luck(rows[-1], start, HIT):
        return f"{found}: {LUCK} {health}"
    return f"{better}. {health}"
