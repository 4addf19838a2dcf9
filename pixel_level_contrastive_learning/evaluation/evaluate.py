"""The table: what weights are worth beside random ones, with labels or without."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from ..backbones.checkpoint import BackboneCard
from ..checks import Pages, one_of, raise_together, share, size_pair, whole
from ..data.image import ImageError
from ..data.segmentation import SegmentationDataset, open_labelled
from ..data.sources import FileSource, Source, open_source
from ..data.statistics import read_image
from ..files import check_writable
from ..run_layout import PREDICTIONS
from .baselines import RANDOM, SHUT, Contender, Field, line_up
from .correspondence import Correspondence, ViewPairs, draw_pairs, matched
from .features import Preparation, Reader, Size, chosen_device
from .finetuning import STEPS, finetuned
from .health import Gauge, gauge, verdict
from .metrics import Scored, Scores
from .probes import probed
from .results import CLEAR, LUCK, Evaluation, Row, gain, may_be_luck, write_panels

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
    pages: Pages | None = None,
    nodata: float | None = None,
) -> Evaluation:
    """Judge weights and random ones by images alone.

    Args:
        weights: As for `evaluate`.
        images: A folder, a list of paths and so on, see `open_source`.
        layers: Layers whose features are judged; None for the one that was trained.
        size: Pixels a side of the views, or ``(height, width)``; None for those of the training.
        seeds: Each decides the views and the random weights of a repeat.
        device: Where to compute.
        pages: What several images in a file are read as, see `open_source`.
        nodata: The value of images where nothing was measured, likewise.

    Raises:
        ValueError: No image can be read and is for this network.
    """
    source = open_source(images, pages=pages, nodata=nodata)
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
        sentence=what_it_means_without_labels(rows),
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
            read = read_image(source, index, prepare.statistics, wanted)
        except ImageError as error:
            refused.append(f"{source.name(index)}: {error}")
            continue
        pixels = prepare.in_range(read, source.name(index))
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


def what_it_means_without_labels(rows: Sequence[Row]) -> str:
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


PROTOCOLS = ("linear", "knn", "finetune")
FINETUNE_SEEDS = 3
"""Seeds of fine-tuning unless a number is given; the other protocols take one."""
PICTURES = 8
"""Images of which predictions are drawn, spread evenly over the split."""


def evaluate(
    weights: str | Path,
    *,
    data: str | Path | None = None,
    images: str | Path | None = None,
    protocol: str = "linear",
    layers: Sequence[str] | None = None,
    fraction: float = 1.0,
    seeds: int | None = None,
    seed: int = 0,
    size: int | Size | None = None,
    split: str = "val",
    steps: int = STEPS,
    out: str | Path | None = None,
    device: str | None = None,
    pages: Pages | None = None,
    nodata: float | None = None,
    ids: str | None = None,
    colours: str | Path | None = None,
) -> Evaluation:
    """What weights are worth: the same network with random weights stands beside them.

    Where training did not start from random weights, those it started from stand there too.

    With labels, ``linear`` fits one linear layer to frozen features, ``knn`` lets the nearest
    training cells vote, and ``finetune`` trains the whole network with a U-Net-like decoder. Mean
    IoU counts the classes that are in the masks or were predicted. Without labels, cells of one
    view of an image look for their spot in another, and the features' health is measured.

    Args:
        weights: A run directory, a file of `save_backbone` or `export`, ``torchvision/NAME``,
            ``timm/NAME``, or ``random:MODEL``.
        data: Folder with ``images/{train,val}`` and ``masks/{train,val}``, see `open_labelled`.
        images: Images without labels instead, best ones that were not trained on.
        protocol: ``linear``, ``knn`` or ``finetune``.
        layers: Layers whose features are judged, several stacked. Default: the one that was
            trained, else the deepest map. Fine-tuning reads a map of each stride instead.
        fraction: Share of the training images whose masks are used, above 0, at most 1.
        seeds: How often to repeat, each time with the next seed: other random weights, another
            share of the masks, another start of the decoder. Default: 3 for fine-tuning, else 1.
        seed: The first seed.
        size: What images are fed at: the shorter side in pixels, or exactly ``(height, width)``.
            Default: 1.4 times the views of the training, the scale it saw. Masks keep their size.
            Without labels the size of the views, by default that of the training.
        split: Which images to judge by.
        steps: Updates of fine-tuning.
        out: Folder for ``evaluation.json``, without labels ``correspondence.json``, and pictures.
        device: Where to compute; default: a GPU if there is one.
        pages: What several images in a file are read as, see `open_source`.
        nodata: The value of images where nothing was measured, likewise.
        ids: The id of each value in the masks, see `open_labelled`.
        colours: A file with the class of each colour in the masks, likewise.

    Raises:
        ValueError: Values out of range (all at once), weights or layers that are not there, or
            masks that are wrong, with the files' names.
    """
    raise_together(
        one_of("protocol", protocol, PROTOCOLS),
        share("fraction", fraction),
        None if seeds is None else whole("seeds", seeds, 1),
        whole("seed", seed, 0),
        None if size is None else size_pair("size", size),
        whole("steps", steps, 1),
        data_or_images(data, images),
        finetuning_alone(protocol, layers, steps) if data is not None else None,
        *(
            needs_labels(name, value, usual)
            for name, value, usual in (
                ("protocol", protocol, "linear"),
                ("fraction", fraction, 1.0),
                ("split", split, "val"),
                ("steps", steps, STEPS),
                ("ids", ids, None),
                ("colours", colours, None),
            )
            if data is None and images is not None
        ),
    )
    if isinstance(weights, nn.Module):
        raise ValueError(
            f"weights is a {type(weights).__name__}; give the folder of its run (result.run_dir), "
            "or a file of its weights with a card, see save_card"
        )
    if out is not None:
        check_writable("out", out)
    place = chosen_device(device)
    if data is None:
        assert images is not None
        repeats = range(seed, seed + (seeds or 1))
        found = without_labels(weights, images, layers, size, repeats, place, pages, nodata)
    else:
        train, judged = open_labelled(
            data, ("train", split), ids=ids, colours=colours, pages=pages, nodata=nodata
        )
        field = line_up(weights, FileSource([str(path) for path in train.images]))
        count = seeds or (FINETUNE_SEEDS if protocol == "finetune" else 1)
        prepare = Preparation.of(field.card, size, field.contenders[-1].build(seed))
        repeats = range(seed, seed + count)
        plan = Plan(train, judged, prepare, protocol, layers, fraction, repeats, steps)
        if split == "train":
            field.notes.append("Judged by the very images it learned from, and so too kindly.")
        found = with_labels(str(weights), str(data), split, field, plan, out, place)
    if out is not None:
        found.write(out)
    return found


def data_or_images(data: object, images: object) -> str | None:
    """The complaint about neither or both."""
    if (data is None) != (images is None):
        return None
    given = "neither" if data is None else "both"
    return (
        f"{given} of data and images given; give data (a folder of images and masks) to evaluate "
        "with labels, or images to evaluate without"
    )


def needs_labels(name: str, value: object, usual: object) -> str | None:
    """The complaint about a setting that means nothing where there are no labels."""
    if value == usual:
        return None
    return f"{name} is {value!r}, which is about labels; give data, or leave it out with images"


def finetuning_alone(protocol: str, layers: Sequence[str] | None, steps: int) -> str | None:
    """The complaint about layers where a map of each stride is read, or steps where none are."""
    if protocol == "finetune" and layers is not None:
        return (
            f"layers is {list(layers)}, but fine-tuning reads a map of each stride; leave it out, "
            "or take protocol linear or knn"
        )
    if protocol in ("linear", "knn") and steps != STEPS:
        return f"steps is {steps}, which is about fine-tuning; take that protocol, or leave it out"
    return None


class Plan(NamedTuple):
    """How networks are judged by labels."""

    train: SegmentationDataset
    judged: SegmentationDataset
    prepare: Preparation
    protocol: str
    layers: Sequence[str] | None
    fraction: float
    seeds: range
    steps: int

    def chance(self, contender: Contender) -> bool:
        """Whether a seed changes what a contender reaches."""
        return contender.by_seed or self.fraction < 1 or self.protocol == "finetune"

    def run(self, net: nn.Module, card: BackboneCard, seed: int, keep: Sequence[int]) -> Scored:
        """What a network reaches with a seed."""
        train = self.train.share(self.fraction, seed) if self.fraction < 1 else self.train
        if self.protocol == "finetune":
            return finetuned(
                net, train, self.judged, self.prepare, steps=self.steps, seed=seed, keep=keep
            )
        size = first_size(self.judged, self.prepare)
        reader = Reader(net, self.layers or [card.pixel_layer], card.channels, size)
        return probed(
            reader, train, self.judged, self.prepare, protocol=self.protocol, seed=seed, keep=keep
        )


def first_size(split: SegmentationDataset, prepare: Preparation) -> Size:
    """The ``(height, width)`` at which a split's first image is fed."""
    mask = split.read(0, prepare.shortest).mask
    return prepare.fitted((mask.shape[0], mask.shape[1]))


def with_labels(
    weights: str,
    data: str,
    split: str,
    field: Field,
    plan: Plan,
    out: str | Path | None,
    device: torch.device,
) -> Evaluation:
    """Judge all networks by labels, and draw what they predict."""
    keep = [len(plan.judged) * i // PICTURES for i in range(PICTURES)] if out is not None else []
    rows: list[Row] = []
    predictions: dict[str, dict[int, Tensor]] = {}
    for contender in field.contenders:
        scored: list[Scored] = []
        for seed in plan.seeds if plan.chance(contender) else plan.seeds[:1]:
            net = contender.build(seed).to(device)
            scored.append(plan.run(net, field.card, seed, () if scored else keep))
            log.info("%s, seed %d: mIoU %.3f", contender.name, seed, scored[-1].scores.miou)
        predictions[contender.name] = scored[0].kept
        rows.append(
            labelled_row(contender.name, [own.scores for own in scored], plan.judged.classes)
        )
    if out is not None:
        folder = Path(out).expanduser() / PREDICTIONS
        write_panels(folder, plan.judged, plan.prepare, predictions)
    settings: dict[str, Any] = {
        "split": split,
        "layers": list(plan.layers or [field.card.pixel_layer]),
        "fraction": plan.fraction,
        "seeds": len(plan.seeds),
        "fed at": fed_at(plan.prepare),
    }
    if plan.protocol == "finetune":
        settings |= {"layers": "one of each stride", "steps": plan.steps}
    return Evaluation(
        weights=weights,
        data=data,
        protocol=plan.protocol,
        settings=settings,
        rows=tuple(rows),
        sentence=what_it_means(rows, plan.protocol, split),
        notes=tuple(field.notes),
    )


def labelled_row(name: str, scores: Sequence[Scores], classes: Sequence[str]) -> Row:
    """The row of a network that was judged by labels, for each seed."""
    figures = [{"mIoU": own.miou, "pixel accuracy": own.accuracy} for own in scores]
    return Row.of(name, figures, [dict(zip(classes, own.iou, strict=True)) for own in scores])


def fed_at(prepare: Preparation) -> str:
    """At what size images are fed, in words."""
    if isinstance(prepare.size, tuple):
        return "{}x{}".format(*prepare.size)
    return f"shorter side {prepare.size}"


def what_it_means(rows: Sequence[Row], protocol: str, split: str) -> str:
    """The figures in words: how much is gained over random weights, and whether it is a gain."""
    random, start, ours = rows[0], rows[-2:][0], rows[-1]
    rival = max(start, random, key=lambda row: row.scores["mIoU"])
    reached, base = ours.scores["mIoU"], random.scores["mIoU"]
    figure = f"{NAMES[protocol]} reaches {reached:.3f} mIoU on {split}"
    if len(rows) == 1:
        return f"{figure} with random weights: what other weights of this network have to beat."
    beside = f"{figure}, {reached / max(base, 1e-9):.2f} times random weights ({base:.3f})"
    if len(rows) == 3:
        begun = start.scores["mIoU"]
        beside += f" and {reached / max(begun, 1e-9):.2f} times what it started from ({begun:.3f})"
    if gain(ours, random, "mIoU") < 0:
        return (
            f"{beside}: worse than random. Look at the loss and at the features' health (evaluate "
            "with images in place of data), and at whether other layers do better."
        )
    if gain(ours, start, "mIoU") < 0:
        return f"{beside}: training made them worse. Keep the others, or train with a lower lr."
    if gain(ours, rival, "mIoU") < 1:
        return f"{beside}: no clear gain. Train for longer, on more images, or try other layers."
    if rival.name in (RANDOM, SHUT) and may_be_luck(ours, rival, "mIoU"):
        return f"{beside}: {LUCK}"
    compared = "random ones" if rival is random else "those it started from"
    return f"{beside}: the weights know more of these classes than {compared} do."


NAMES = {"linear": "A linear probe", "knn": "A vote of neighbours", "finetune": "Fine-tuning"}
