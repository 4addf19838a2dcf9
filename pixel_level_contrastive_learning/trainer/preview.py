"""The pairs of a batch as pictures: what the loss compares."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, Trainer
from torch import Tensor

from ..pictures.pairs import pairs_picture
from .task import PretrainTask, cut

if TYPE_CHECKING:
    from ..data.pairs import Pairs


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
            draw_pairs(task, batch, self.folder, self.threshold, self.count)


def draw_pairs(
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
