"""The demo: drawn scenes, a ResNet-18 pretrained on them, a table and a report."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from ..checks import raise_together, whole
from ..data.sources import IMAGES
from ..evaluation.evaluate import evaluate
from ..evaluation.results import Evaluation
from ..trainer.trainer import pretrain
from ..visualization.report import visualize
from .scenes import are_drawn, save_scenes

SCENES = {"train": 400, "val": 100}
FED_AT = 180
"""Side in pixels at which scenes of 160 are judged: the scale at which views show them, on
average."""


class Demonstration(NamedTuple):
    """What the demo has to show."""

    evaluation: Evaluation
    report: Path


def demonstrate(out: Path, *, steps: int, overwrite: bool = False) -> Demonstration:
    """Draw scenes, pretrain on them, evaluate and write the report.

    Args:
        out: Folder for all of it.
        steps: Steps of pretraining.
        overwrite: Whether to replace an earlier demo.

    Raises:
        ValueError: No steps, or the folder is in use.
    """
    scenes, run, report = out / "scenes", out / "run", out / "report.html"
    raise_together(whole("steps", steps, 1))
    used = out.exists() and any(out.iterdir())
    if used and not overwrite:
        raise ValueError(
            f"out is {str(out)!r}, which is not empty; replace the demo in it (--overwrite), or "
            "name another folder"
        )
    if used and not are_drawn(scenes):
        raise ValueError(
            f"out is {str(out)!r}, which holds no demo to replace; name another folder"
        )
    shutil.rmtree(scenes, ignore_errors=True)  # those of a demo that was cut off may be half drawn
    save_scenes(scenes, SCENES)
    images = scenes / IMAGES
    pretrain(
        images / "train",
        run,
        model="torchvision/resnet18",
        image_size=96,
        crop_area=(0.3, 0.75),  # what is shown of a scene is as large as in whole views of 128
        batch_size=20,
        pixel_layer="layer3",  # 6 x 6 cells of a view; layer4 has 3 x 3, larger than the shapes
        loss="pixcontrast",  # in so few steps it learns more than PixPro does
        lr=9e-3,  # more than by default, and blocks that begin shut: a linear probe gains by both,
        zero_init_residual=True,  # fine-tuning loses (docs/decisions.md)
        steps=steps,
        devices=1,  # a step of this size gains nothing by more
        overwrite=overwrite,
    )
    evaluation = evaluate(run, data=scenes, size=FED_AT, out=run)
    return Demonstration(evaluation, visualize(run, images=images / "val", out=report))
