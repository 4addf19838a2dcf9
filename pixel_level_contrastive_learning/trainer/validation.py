"""Looking at the network while it trains: correspondence, a probe, pictures of its features.

All of it is done by the process that writes, in eval mode, on images that never change, and leaves
the network and its training as they were.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from shlex import quote

import torch
from torch import Tensor

from .. import run_layout
from ..augment import Normalise
from ..backbones.checkpoint import BackboneCard
from ..data.dataset import TwoViewBatch
from ..data.image import ImageError, to_rgb
from ..data.segmentation import SegmentationDataset
from ..data.sources import Source
from ..data.statistics import Statistics, read_image
from ..evaluation.correspondence import ViewPairs, draw_pairs, measure_correspondence
from ..evaluation.features import Preparation, Reader
from ..evaluation.metrics import PreparedSplit, SampleCache
from ..evaluation.probes import DivergedError, ProbeTask, run_probes
from ..files import write_whole
from ..geometry import box_to_map
from ..pixel_cl import PixelCL
from ..views import cut_views
from ..visualization.matches import pairs_picture
from ..visualization.pca import aligned_colours, colours_picture, pca_colours
from .auto import RunPlan
from .build import TrainingData
from .logging import LOG
from .metrics import append_lines
from .run_dir import RunDir
from .training_step import TrainingStep, make_views, move_batch, slice_batch

PICTURED = 4
"""Images whose features are drawn."""
COMPARED = 32
"""Pairs of views of held-out images that are compared: of few images several each, for a share of
a hundred cells goes up and down by chance."""
PREVIEWS = 4
"""Images whose pairs of views are drawn."""
NOT_FINITE = (
    "in eval mode the network gives NaN or infinite features: it is diverging; stop the run and "
    "train with a lower lr"
)


class FeaturePictures:
    """Draws features of some images, and measures whether cells find their spot in another view.

    The held-out images are looked at, or those trained on where there are none. Colours are aligned
    to those of the last picture of the run that is resumed; ``hit1``, ``hit1_colours_kept``,
    ``hit_near``, ``hit_cells`` and the step they are of go to ``latest``.
    """

    def __init__(
        self,
        folder: Path,
        card: BackboneCard,
        data: TrainingData,
        colours: Tensor | None,
        latest: dict[str, float],
    ) -> None:
        self.folder, self.card, self.latest = folder / run_layout.PICTURES, card, latest
        held_out = len(data.held_out) > 0
        images, count = (data.held_out, COMPARED) if held_out else (data.train, PICTURED)
        views = central_views(images, data.statistics, card.image_size, count)
        self.pictured = views[:PICTURED]
        repeated = list(views) * (COMPARED // max(1, len(views)) if held_out else 0)
        # With their colours changed, and with them kept.
        self.pairs: list[ViewPairs] = [
            draw_pairs(repeated, card.image_size, seed=0, recoloured=recoloured)
            for recoloured in ((True, False) if repeated else ())
        ]
        self.colours = colours
        self.reader: Reader | None = None  # looking through the network costs more than a picture
        self.drawn_at = -1

    def draw(self, step: TrainingStep) -> None:
        """Measure and draw now, once a step."""
        if not len(self.pictured) or self.drawn_at == step.step:
            return
        self.drawn_at = step.step
        card = self.card
        if self.reader is None:
            net, layers = step.learner.net, [card.shown_layer]
            self.reader = Reader(net, layers, card.channels, card.image_size)
        reader = self.reader

        def read(pixels: Tensor) -> Tensor:
            with step.fabric.autocast():  # as fast as the training
                return reader(pixels)

        features = read(step.normalise(self.pictured.to(step.fabric.device))).cpu()
        if not features.isfinite().all():
            LOG.warning("step %d: %s", step.step, NOT_FINITE)
            return
        if self.pairs:
            changed, kept = (
                measure_correspondence(read, pairs, card.mean, card.std) for pairs in self.pairs
            )
            self.latest |= {
                "hit1": changed.hit1,
                "hit1_colours_kept": kept.hit1,
                "hit_near": changed.hit_near,
                "hit_cells": changed.cells,
                "hit_step": step.step,
            }
            LOG.info(
                "step %d: %.1f %% of cells find the same spot in another view (%.1f %% by chance)",
                step.step,
                100 * changed.hit1,
                100 * changed.chance,
            )
        n, _, h, w = features.shape
        # A resumed run may look at other images than before, or at other sizes.
        if self.colours is None or self.colours.shape != (n, 3, h, w):
            self.colours, _ = pca_colours(features)
        else:
            self.colours, _ = aligned_colours(features, self.colours)
        picture = colours_picture(to_rgb(self.pictured).clamp(0, 1), self.colours)
        path = self.folder / f"{run_layout.STEP}{step.step:08d}.png"
        write_whole(path, partial(picture.save, format="PNG"))


class Probe:
    """Fits a probe to the frozen features, notes its mean IoU, and marks the best checkpoint.

    The checkpoint of the step is saved already. Of the splits one is fitted on and one scored on;
    ``probe_miou`` goes to ``latest``.
    """

    def __init__(
        self,
        run_dir: RunDir,
        card: BackboneCard,
        splits: Sequence[SegmentationDataset],
        protocol: str,
        latest: dict[str, float],
    ) -> None:
        self.run_dir, self.path = run_dir, run_dir.path / run_layout.PROBE
        self.card, self.protocol = card, protocol
        self.train, self.val = splits
        self.latest = latest

    def run(self, step: TrainingStep) -> None:
        """Probe now, and mark the step's checkpoint if no step after the first was better."""
        net, card = step.learner.net, self.card
        reader = Reader(net, [card.shown_layer], card.channels, card.image_size, fast=True)
        prepare = Preparation.of(card, net=net)
        try:
            train, val = (  # each image is read once: none is worth keeping
                PreparedSplit(split, prepare, cache=SampleCache(0))
                for split in (self.train, self.val)
            )
            (result,) = run_probes(
                reader, [ProbeTask(self.protocol, train, (card.shown_layer,))], val
            )
        except DivergedError:
            LOG.warning("step %d: probe skipped: %s", step.step, NOT_FINITE)
            return
        miou = float(result.scores.miou)
        note = best_note(self.scores(), miou) if step.step > 0 else ""
        append_lines(self.path, [{"step": step.step, "miou": miou}])
        self.latest |= {"probe_miou": miou}
        LOG.info("step %d: probe reaches a mean IoU of %.4f%s", step.step, miou, note)
        if note:
            self.run_dir.mark_best(step.step)

    def log_best(self) -> None:
        """Log which checkpoint is the best, and how to use it."""
        scores = {step: miou for step, miou in self.scores().items() if step > 0}
        if scores:
            step = max(scores, key=scores.__getitem__)  # the first of those that are equal
            path = self.run_dir.checkpoints / run_layout.BEST
            LOG.info(
                f"best step by the probe: {step}, mIoU {scores[step]:.4f}: {path} "
                f"(pixelcl export {quote(str(path))})"
            )

    def scores(self) -> dict[int, float]:
        """Mean IoU of the probes so far, by step."""
        return probe_scores(self.path)


def probe_scores(path: Path) -> dict[int, float]:
    """The mean IoU of each probe in a file, by step; none where there is no file."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["step"]: line["miou"] for line in lines}


def best_note(scores: Mapping[int, float], miou: float) -> str:
    """What stands beside a mean IoU above all before it, by step; nothing beside another."""
    if miou <= max((score for step, score in scores.items() if step > 0), default=-1.0):
        return ""
    start = scores.get(0, miou)
    return " (best)" if start <= miou else f" (best so far, but below {start:.4f} at step 0)"


def central_views(
    source: Source, statistics: Statistics, size: tuple[int, int], count: int
) -> Tensor:
    """Some images ``(n, c, *size)``, float32 in [0, 1]: the largest middle part of this shape.

    Those that cannot be read are left out.
    """
    h, w = size
    views: list[Tensor] = []
    for index in range(len(source)):
        if len(views) == count:
            break
        with suppress(ImageError):
            image = statistics.convert(read_image(source, index, statistics, size))
            pixels = image.float() / 255 if image.dtype == torch.uint8 else image
            height, width = pixels.shape[-2:]
            zoom = min(height / h, width / w)
            left, top = (width - w * zoom) / 2, (height - h * zoom) / 2
            box = torch.tensor([[left, top, left + w * zoom, top + h * zoom]])
            to_image = box_to_map(box, torch.tensor([False]))
            views.append(cut_views(pixels[None], to_image, size)[0])
    return torch.stack(views) if views else torch.empty(0, statistics.channels, h, w)


def draw_batch(
    batch: TwoViewBatch,
    learner: PixelCL,
    normalise: Normalise,
    plan: RunPlan,
    folder: Path,
    count: int = PREVIEWS,
) -> list[Path]:
    """Draw what the loss compares: two views of each image side by side, matched cells joined."""
    samples: TwoViewBatch = slice_batch(batch, slice(0, count))
    device = normalise.mean.device
    views = [
        to_rgb(view.pixels * normalise.std + normalise.mean).clamp(0, 1).cpu()
        for view in make_views(move_batch(samples, device), normalise, plan)
    ]
    grid = learner.online_encoder.pixel_hooks[0].layout.grid
    previews = folder / run_layout.PREVIEW
    paths = []
    for number, (one, two) in enumerate(zip(*views, strict=True)):
        maps = samples.map_one[number], samples.map_two[number]
        paths.append(previews / f"{run_layout.PAIRS}{number}.png")
        picture = pairs_picture(one, two, *maps, grid, plan.distance_thres)
        write_whole(paths[-1], partial(picture.save, format="PNG"))
    return paths
