"""Looking at the network while it learns: correspondence, a probe, pictures of what it sees.

All of it is done by the process that writes, in eval mode, on images that never change, and leaves
the network and its training as they were.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from ..backbones.checkpoint import BackboneCard
from ..backbones.state_dict import LAST
from ..data.image import SCALES, Unreadable, upright
from ..data.sources import Source
from ..data.statistics import Statistics
from ..evaluation.correspondence import ViewPairs, draw_pairs, matched
from ..evaluation.features import Preparation, Reader
from ..evaluation.probes import Diverged, probed
from ..geometry import box_to_map
from ..views import cut_views
from ..visualization.matches import pairs_picture
from ..visualization.pca import aligned_colours, colours_picture, pca_colours
from .metrics import Figures
from .run_dir import BEST, PROBE_FILE, RunDirectory
from .training_step import PretrainTask, cut

if TYPE_CHECKING:
    from ..data.dataset import Pairs
    from ..data.segmentation import Labelled


class Checkpoints(Callback):
    """Saves every so many steps, at the end, and when the run was asked to stop.

    Args:
        directory: The folder of the run.
        every: Steps between checkpoints.
        keep: How many to keep.
        figures: Judged before each checkpoint, so that no broken network is ever saved.
    """

    def __init__(self, directory: RunDirectory, every: int, keep: int, figures: Figures) -> None:
        self.directory = directory
        self.every = every
        self.keep = keep
        self.figures = figures
        self.saved = -1

    def on_train_start(self, _: Trainer, task: Any) -> None:
        self.saved = task.done

    def on_train_batch_end(self, trainer: Trainer, task: Any, *_: Any) -> None:
        if task.done % self.every == 0:
            self.save(trainer, task)

    def on_train_end(self, trainer: Trainer, task: Any) -> None:
        self.save(trainer, task)

    def save(self, trainer: Trainer, task: PretrainTask) -> None:
        """Save now, once a step; every process takes part, one writes."""
        if self.saved == task.done:
            return
        self.figures.settle(trainer)
        path = self.directory.checkpoint_path(task.done)
        trainer.save_checkpoint(path, weights_only=False)
        self.saved = task.done
        if trainer.is_global_zero:
            self.directory.name_also(path, LAST)
            self.directory.prune(self.keep)


class Preview(Callback):
    """Draws the pairs of the first batch, and of later ones in their place: what is compared now.

    Two views side by side, matched pixels joined.

    Args:
        folder: Where to.
        threshold: Distance under which cells match.
        every: Steps between pictures; 0 draws the first batch alone.
        count: How many images to draw.
    """

    def __init__(self, folder: Path, threshold: float, every: int, count: int = 4) -> None:
        self.folder = folder
        self.threshold = threshold
        self.every = every
        self.count = count

    def on_train_batch_start(
        self, trainer: Trainer, task: Any, batch: Pairs, batch_idx: int
    ) -> None:
        due = batch_idx == 0 or (self.every > 0 and task.done % self.every == 0)
        if due and trainer.is_global_zero:
            draw_batch_pairs(task, batch, self.folder, self.threshold, self.count)


def draw_batch_pairs(
    task: PretrainTask, batch: Pairs, folder: Path, threshold: float, count: int
) -> list[Path]:
    """Draw the matched pixels of the first images of a batch as ``pairs-0.png`` and so on."""
    some: Pairs = cut(batch, slice(0, count))
    views = [
        rgb(view.pixels * task.normalise.std + task.normalise.mean) for view in task.views(some)
    ]
    grid = task.learner.online_encoder.pixel_tap.reading.grid
    folder.mkdir(exist_ok=True)
    paths = []
    for number in range(len(some.one)):
        one, two = (view[number].cpu() for view in views)
        maps = some.map_one[number].cpu(), some.map_two[number].cpu()
        picture = pairs_picture(one, two, *maps, grid, threshold)
        paths.append(folder / f"pairs-{number}.png")
        picture.save(paths[-1])
    return paths


def rgb(pixels: Tensor) -> Tensor:
    """Images ``(b, c, h, w)`` of any channels as three, in [0, 1], for the eye."""
    if pixels.shape[1] < 3:
        pixels = pixels[:, :1].expand(-1, 3, -1, -1)
    return pixels[:, :3].clamp(0, 1)


LOG = logging.getLogger("pixel_level_contrastive_learning")
PICTURED = 4
"""Images that are drawn."""
COMPARED = 32
"""Pairs of views of held-out images that are compared: of few images several each, for a share of a
hundred cells goes up and down by chance."""

NOT_FINITE = (
    "in eval mode the network gives features that are NaN or infinite: it diverges; stop, and "
    "train with a smaller lr"
)


class Watching(Callback):
    """Draws what the network sees of some images, and asks whether cells find their spot.

    Before the first step, every so many steps, and after the last. The figures ``hit1``,
    ``hit1_colours_kept`` and ``hit_near``, and ``hit_cells`` that they are shares of, stand in the
    lines of `metrics.jsonl` until they are measured anew.

    Args:
        directory: The folder of the run.
        figures: Where the figures go.
        card: How images are brought to the network.
        images: Images to look at.
        held_out: Whether these are kept from training, so that correspondence means something.
        statistics: The form images are brought to.
        every: Steps between pictures.
    """

    def __init__(
        self,
        directory: RunDirectory,
        figures: Figures,
        card: BackboneCard,
        images: Source,
        *,
        held_out: bool,
        statistics: Statistics,
        every: int,
    ) -> None:
        self.folder = directory.path / "pictures"
        self.figures = figures
        self.card = card
        self.every = every
        seen = whole_images(images, statistics, card.image_size, COMPARED if held_out else PICTURED)
        self.pictured = seen[:PICTURED]
        self.pairs: list[ViewPairs] = []  # with their colours changed, and with them kept
        if held_out and len(seen):
            repeated = list(seen) * (COMPARED // len(seen))
            self.pairs = [
                draw_pairs(repeated, card.image_size, seed=0, recoloured=new)
                for new in (True, False)
            ]
        self.reader: Reader | None = None
        self.colours: Tensor | None = None
        self.looked_at = -1

    def on_save_checkpoint(self, _: Trainer, __: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["colours"] = self.colours

    def on_load_checkpoint(self, _: Trainer, __: Any, checkpoint: dict[str, Any]) -> None:
        self.colours = checkpoint.get("colours")

    def on_train_start(self, trainer: Trainer, task: Any) -> None:
        if trainer.is_global_zero and len(self.pictured):
            layer = [self.card.pixel_layer]
            self.reader = Reader(task.learner.net, layer, self.card.channels, self.card.image_size)
            self.look(task)

    def on_train_batch_end(self, _: Trainer, task: Any, *__: Any) -> None:
        if task.done % self.every == 0:
            self.look(task)

    def on_train_end(self, _: Trainer, task: Any) -> None:
        self.look(task)

    def look(self, task: PretrainTask) -> None:
        """Look now, once a step."""
        if self.reader is None or self.looked_at == task.done:
            return
        self.looked_at = task.done
        reader, precision = self.reader, task.trainer.precision_plugin

        def read(pixels: Tensor) -> Tensor:
            with precision.forward_context():  # in float32 a look takes four times a bfloat16 one
                return reader(pixels)

        features = read(task.normalise(self.pictured.to(task.device))).cpu()
        if not features.isfinite().all():
            LOG.warning("step %d: %s", task.done, NOT_FINITE)
            return
        if self.pairs:
            found, kept = (
                matched(read, pairs, self.card.mean, self.card.std) for pairs in self.pairs
            )
            self.figures.health |= {
                "hit1": found.hit1,
                "hit1_colours_kept": kept.hit1,
                "hit_near": found.hit_near,
                "hit_cells": found.cells,
            }
            LOG.info(
                "step %d: %.1f %% of cells find their spot in another view (%.1f %% by chance)",
                task.done,
                100 * found.hit1,
                100 * found.chance,
            )
        n, _, h, w = features.shape
        # A resumed run may look at other images than before, or at other sizes.
        if self.colours is None or self.colours.shape != (n, 3, h, w):
            self.colours, _ = pca_colours(features)
        else:
            self.colours, _ = aligned_colours(features, self.colours)
        self.folder.mkdir(exist_ok=True)
        picture = colours_picture(rgb(self.pictured), self.colours)
        picture.save(self.folder / f"step-{task.done:08d}.png")


def whole_images(
    source: Source, statistics: Statistics, size: tuple[int, int], count: int
) -> Tensor:
    """Some images ``(n, c, *size)``, float32 in [0, 1]: the largest middle part of this shape.

    Those that cannot be read are left out.
    """
    h, w = size
    found: list[Tensor] = []
    for index in range(len(source)):
        if len(found) == count:
            break
        try:
            opened = source.open(index)
            statistics.accepts(opened)
            height, width = opened.size
            scale = max(s for s in SCALES if s == 1 or (height >= h * s and width >= w * s))
            pixels = upright(opened.raster(scale).pixels, opened.orientation)
        except Unreadable:
            continue
        formed = statistics.form(pixels)
        unit = formed.float() / 255 if formed.dtype == torch.uint8 else formed
        height, width = unit.shape[-2:]
        zoom = min(height / h, width / w)
        left, top = (width - w * zoom) / 2, (height - h * zoom) / 2
        box = torch.tensor([[left, top, left + w * zoom, top + h * zoom]])
        found.append(cut_views(unit[None], box_to_map(box, torch.tensor([False])), size)[0])
    return torch.stack(found) if found else torch.empty(0, statistics.channels, h, w)


class Probe(Callback):
    """Fits a probe to the frozen features, and keeps the best checkpoint.

    Before the first step, to have something to compare with and to find out at once whether it can
    be done; every so many steps; and after the last. Where a run was killed during a probe, that
    comes first when it is resumed.

    Args:
        directory: The folder of the run.
        figures: Where the figure goes, as ``probe_miou``.
        checkpoints: Saves at every probe.
        card: How images are brought to the network.
        labelled: Images and masks to learn from, and those to judge by.
        protocol: ``linear`` or ``knn``.
        every: Steps between probes.
        steps: Steps of the run.
    """

    def __init__(
        self,
        directory: RunDirectory,
        figures: Figures,
        checkpoints: Checkpoints,
        card: BackboneCard,
        labelled: Sequence[Labelled],
        *,
        protocol: str,
        every: int,
        steps: int,
    ) -> None:
        self.directory = directory
        self.figures = figures
        self.checkpoints = checkpoints
        self.card = card
        self.protocol = protocol
        self.every = every
        self.steps = steps
        self.train, self.judged = labelled
        self.file = directory.path / PROBE_FILE

    def on_train_start(self, trainer: Trainer, task: Any) -> None:
        if task.done % self.every == 0:
            if trainer.is_global_zero and task.done not in self.scores():  # else killed meanwhile
                self.probe(task)
            trainer.strategy.barrier()

    def on_train_batch_end(self, trainer: Trainer, task: Any, *_: Any) -> None:
        if task.done % self.every and task.done != self.steps:
            return
        self.checkpoints.save(trainer, task)
        if trainer.is_global_zero:
            self.probe(task)
        trainer.strategy.barrier()

    def probe(self, task: PretrainTask) -> None:
        """Probe now, and keep the checkpoint of this step if it is the best so far."""
        net, card = task.learner.net, self.card
        reader = Reader(net, [card.pixel_layer], card.channels, card.image_size)
        prepare = Preparation.of(card, net=net)
        try:
            scored = probed(reader, self.train, self.judged, prepare, protocol=self.protocol)
        except Diverged:
            LOG.warning("step %d: not probed: %s", task.done, NOT_FINITE)
            return
        miou = float(scored.scores.miou)
        best = max((own for step, own in self.scores().items() if step > 0), default=-1.0)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": task.done, "miou": miou}) + "\n")
        self.figures.health |= {"probe_miou": miou}
        is_best = task.done > 0 and miou > best
        LOG.info("step %d: mean IoU of the probe %.4f%s", task.done, miou, " (best)" * is_best)
        if is_best:
            path = self.directory.checkpoint_path(task.done)
            # A run whose numbered checkpoints are gone was resumed from the link to the last.
            self.directory.name_also(path if path.exists() else path.with_name(LAST), BEST)

    def scores(self) -> dict[int, float]:
        """The figures of earlier probes by their steps."""
        if not self.file.exists():
            return {}
        held = [json.loads(line) for line in self.file.read_text().splitlines()]
        return {line["step"]: line["miou"] for line in held}
