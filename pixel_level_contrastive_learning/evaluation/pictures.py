"""Pictures of an evaluation: predicted masks beside the true ones, and the label curve."""

from __future__ import annotations

import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ..data.image import to_rgb
from ..data.segmentation import IGNORED
from .results import Evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .metrics import PreparedSplit

SIDE = 3.2
"""Inches of the longer side of one picture, at `DPI` dots an inch."""
DPI = 100
TEXT = 12
"""Points of names and legends: a report shows five pictures a row at two thirds of their size."""
LETTER, PATCH = 0.6 * TEXT / 72, 0.8
"""Inches of a letter, wide ones included, and of the colour before a name with the space around."""
MOST_NAMED = 30
"""Classes that a legend names, at most."""
COLOURS = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"
"""Of the lines of a plot: colours of Okabe and Ito, which colour-blind readers tell apart."""
MARKERS = "sD^vPo"
"""Of these lines, one each."""
MARK = "a panel of pixel_level_contrastive_learning"
"""What stands in a panel's file as the software that wrote it, and tells it from a stranger's."""


def class_colours(count: int) -> Tensor:
    """A colour for each class and black for ignored pixels, ``(256, 3)`` float in [0, 1]."""
    from matplotlib import colormaps

    table = torch.zeros(256, 3)
    if count <= 20:
        order = [*range(0, 20, 2), *range(1, 20, 2)]  # strong colours before pale ones
        colours = np.array(colormaps["tab20"].colors)[order]  # type: ignore[attr-defined]
        table[:20] = torch.from_numpy(colours)
    else:
        golden = (torch.arange(256) * 0.618034) % 1  # neighbouring ids far apart in hue
        table = torch.from_numpy(colormaps["hsv"](golden.numpy())[:, :3]).float()
    table[IGNORED] = 0
    return table


def write_panels(
    folder: Path,
    split: PreparedSplit,
    predictions: Mapping[str, Mapping[int, Tensor]],
) -> list[Path]:
    """Write a PNG for each image that predictions were kept of, in place of earlier panels.

    Predictions are class ids ``(height, width)``, of each network by its name, by the image's
    place in the split. Returns the files, in the order of the images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in filter(is_panel, folder.glob("*.png")):
        path.unlink()
    colours = class_colours(len(split.classes))
    written = []
    for index in sorted(set().union(*predictions.values())):
        sample = split.sample(index)
        image = rearrange(to_rgb(sample.pixels), "rgb h w -> h w rgb")
        pictures = {"image": image, "truth": colours[sample.mask.long()]}
        for name, kept in predictions.items():
            pictures[name] = colours[kept[index].long()]
        seen = torch.unique(
            torch.cat(
                [sample.mask.flatten(), *(kept[index].flatten() for kept in predictions.values())]
            )
        )
        plain = re.sub(r"[^\w.-]+", "_", Path(split.dataset.name(index)).stem)[:60]
        path = folder / f"{index:04d}_{plain}.png"
        classes = {split.classes[i]: colours[i] for i in seen.tolist() if i < len(split.classes)}
        draw(path, pictures, classes, (sample.mask.shape[0], sample.mask.shape[1]))
        written.append(path)
    return written


def is_panel(path: Path) -> bool:
    """Whether a file was written by `draw`."""
    return path.is_file() and MARK.encode() in path.read_bytes()[:1000]


def draw(
    path: Path, pictures: Mapping[str, Tensor], classes: Mapping[str, Tensor], size: Sequence[int]
) -> None:
    """Draw pictures ``(h, w, 3)`` beside each other under their names, and the classes below."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    height, width = (SIDE * side / max(size) for side in size)
    across = len(pictures) * (width + 0.1)
    titles = {name: textwrap.fill(name, max(6, int(width / LETTER))) for name in pictures}
    above = 0.1 + 0.2 * max(title.count("\n") + 1 for title in titles.values())
    # A legend names as many classes in a row as its longest name allows.
    longest = max(6, int((across - PATCH) / LETTER))
    names = [textwrap.wrap(name, longest) for name in list(classes)[:MOST_NAMED]]
    widest = max((len(line) for lines in names for line in lines), default=0)
    columns = max(1, int(across / (PATCH + widest * LETTER)))
    below = 0.25 + 0.25 * max(map(sum, np.array_split([*map(len, names)], columns)))
    total = above + height + below
    figure = Figure((across, total), dpi=DPI)
    for number, (name, picture) in enumerate(pictures.items()):
        part = 1 / len(pictures)
        axes = figure.add_axes((number * part + 0.01, below / total, part - 0.02, height / total))
        axes.imshow(picture.clamp(0, 1).numpy(), extent=(0, size[1], 0, size[0]))
        axes.set_axis_off()
        axes.set_title(titles[name], fontsize=TEXT, parse_math=False)
    patches = [
        Patch(color=tuple(colour.tolist()), label="\n".join(lines))
        for lines, colour in zip(names, classes.values(), strict=False)
    ]
    legend = figure.legend(
        handles=patches, loc="lower center", ncols=columns, fontsize=TEXT - 1, frameon=False
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name may hold dollars
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whatever letters its names are made of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a box in place of a letter is no harm
        figure.savefig(path, metadata={"Software": MARK})


def draw_label_curve(path: Path, evaluation: Evaluation, protocol: str) -> None:
    """Draw mean IoU over the number of masks as a PNG: a line for each network, with its spread."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure((6.4, 4.2), dpi=2 * DPI, layout="constrained")
    axes = figure.add_subplot()
    for number, row in enumerate(evaluation.rows):
        points = sorted(row.curves[protocol])
        masks = [point.masks for point in points]
        middle, spread = (np.array([point[k] for point in points]) for k in (1, 2))
        place = (number - 1) % len(COLOURS)
        repeats = max(0, number - 1) // len(COLOURS)  # of a colour, which another marker then has
        colour, marker = COLOURS[place], MARKERS[(place + repeats) % len(MARKERS)]
        if number == 0 and not row.baselines:
            colour = "0.55"
        axes.plot(masks, middle, f"{marker}-", color=colour, markersize=4, label=row.name)
        axes.fill_between(masks, middle - spread, middle + spread, color=colour, alpha=0.15, lw=0)
    axes.set_xscale("log")
    axes.set_xticks(masks, [str(count) for count in masks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("masks used")
    axes.set_ylabel(f"mIoU on {evaluation.settings.get('split', 'val')} ({protocol})")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    for text in axes.legend(frameon=False, fontsize=8).get_texts():
        text.set_parse_math(False)
    save(figure, path)
