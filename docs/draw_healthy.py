"""Draw the pictures of docs/healthy-run.md: a good run, a collapsed one, one that goes by colour.

python docs/draw_healthy.py GOOD COLLAPSED COLOUR    # three run directories

Curves are the runs' own metrics, smoothed as in the report. Colours are the first three principal
components of the features of one image that was not trained on, over the course of the runs, as the
runs drew them. The commands of the three runs are in docs/healthy-run.md.
"""

import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from PIL import Image

from pixel_level_contrastive_learning.evaluation.health import COLLAPSED_RANK, COLLAPSED_SPREAD
from pixel_level_contrastive_learning.evaluation.pictures import COLOURS
from pixel_level_contrastive_learning.visualization.curves import curve, read_metrics, running_mean

NAMES = "good", "collapsed", "goes by colour"
INK, GRID = "#344054", "#d9dee7"
PANELS = (
    ("pixel_cosine", "Mean cosine of matching pixels", None),
    ("loss", "Loss", None),
    ("spread", "Spread of the features", COLLAPSED_SPREAD),
    ("effective_rank", "Effective rank of the features", COLLAPSED_RANK),
    ("hit1", "Cells that find their spot, colours changed", None),
    ("hit1_colours_kept", "Cells that find their spot, colours kept", None),
)
HERE = Path(__file__).parent
SHOWN = 6  # steps
SIDE, GAP = 160, 4  # of a picture in pictures/*.png, and between them


def curves(runs: list[Path]) -> None:
    """Draw the metrics of the three runs, a panel a metric."""
    metrics = [read_metrics(run) for run in runs]
    mpl.rcParams["font.size"] = 9
    figure, axes = plt.subplots(3, 2, figsize=(9.6, 8.4), layout="constrained")
    for panel, (name, title, bound) in zip(axes.flat, PANELS, strict=True):
        for label, colour, columns in zip(NAMES, COLOURS, metrics, strict=False):
            steps, values = curve(columns, name)
            if name == "pixel_cosine" and not any(values):
                continue  # its pixel branch was left out
            panel.plot(steps, running_mean(values), color=colour, label=label, linewidth=1.8)
        if bound is not None:
            panel.axhline(bound, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        panel.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
        panel.grid(axis="y", color=GRID)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(length=0, labelcolor=INK)
        low = 0 if name != "pixel_cosine" else None
        panel.set_ylim(bottom=low)
    axes[0, 0].legend(frameon=False)
    for panel in axes[-1]:
        panel.set_xlabel("step", color=INK)
    figure.savefig(HERE / "healthy-run.png", dpi=140, facecolor="white")


def colours(runs: list[Path]) -> None:
    """Put the runs' pictures of one image below each other, a row a run."""
    figure, axes = plt.subplots(len(runs), SHOWN, figsize=(9.6, 5.2), layout="constrained")
    for row, name, run in zip(axes, NAMES, runs, strict=True):
        paths = sorted((run / "pictures").glob("step-*.png"))
        shown = min(SHOWN, len(paths))
        for k, panel in enumerate(row[:shown]):
            path = paths[(len(paths) - 1) * k // (shown - 1)]
            panel.imshow(components(path))
            panel.set_title(f"step {int(path.stem[5:])}", fontsize=9, color=INK)
        for panel in row:
            panel.set_xticks([])
            panel.set_yticks([])
            panel.spines[:].set_visible(False)
        row[0].set_ylabel(name, color=INK, fontweight="bold")
    figure.savefig(HERE / "healthy-colours.png", dpi=120, facecolor="white")


def components(path: Path) -> np.ndarray:
    """The colours of the last image in a run's picture; they lie below it."""
    with Image.open(path) as picture:
        left, top = picture.width - SIDE, SIDE + GAP
        return np.asarray(picture.crop((left, top, left + SIDE, top + SIDE)))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    folders = [Path(name) for name in sys.argv[1:]]
    curves(folders)
    colours(folders)
