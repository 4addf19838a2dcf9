"""The demo: draw scenes, pretrain a ResNet-18 on them, evaluate it and write the report."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..checks import raise_together, whole
from ..data.folders import IMAGES
from ..evaluation.evaluate import evaluate
from ..evaluation.results import Evaluation
from ..files import check_writable
from ..trainer.logging import logging_to
from ..trainer.trainer import pretrain
from ..visualization.report import visualize
from .scenes import CLASSES_FILE, CLASSES_TEXT, save_scenes

SCENES = {"train": 400, "val": 100}
FRACTIONS = 0.02, 0.1, 1.0
"""Shares of the masks in the label curve: 8, 40 and 400 of them."""


def run_demo(out: Path, *, steps: int, overwrite: bool = False) -> tuple[Evaluation, Path]:
    """Run the whole demo in a folder: the evaluation of its backbone, and the report."""
    raise_together(whole("steps", steps, 1))
    check_writable("out", out)
    out = out.expanduser()
    scenes, run = out / "scenes", out / "run"
    in_use = out.exists() and any(out.iterdir())
    if in_use and not overwrite:
        raise ValueError(
            f"out is {str(out)!r}, which is not empty; replace the demo in it (--overwrite), or "
            "name another folder"
        )
    mark = scenes / CLASSES_FILE
    if in_use and not (mark.is_file() and mark.read_bytes() == CLASSES_TEXT.encode()):
        raise ValueError(
            f"out is {str(out)!r}, which is not a demo to replace; name another folder"
        )
    shutil.rmtree(scenes, ignore_errors=True)  # an interrupted demo leaves them half drawn
    save_scenes(scenes, SCENES)
    images = scenes / IMAGES
    pretrain(
        images / "train",
        run,
        model="torchvision/resnet18",
        image_size=96,
        crop_area=(0.3, 0.75),  # as much of a scene, at the same scale, as in whole views of 128
        batch_size=20,
        pixel_layer="layer3",  # 6 x 6 cells of a view; layer4 has 3 x 3, larger than the shapes
        loss="pixcontrast",  # in so few steps it learns more than PixPro
        lr=9e-3,  # above the default, and blocks that begin as identities: a linear probe gains by
        zero_init_residual=True,  # both, fine-tuning loses (docs/decisions.md)
        steps=steps,
        devices=1,  # more gain nothing at this size
        overwrite=overwrite,
    )
    # Views show scenes of 160 pixels as if they had 180, on average.
    with logging_to(terminal=True):  # it takes as long as the training: show each result
        evaluation = evaluate(
            run, data=scenes, size=180, out=run, protocol="linear", fractions=FRACTIONS
        )
    return evaluation, visualize(run, images=images / "val")
