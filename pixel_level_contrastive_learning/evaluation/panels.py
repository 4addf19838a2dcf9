"""Panels: an image, its mask and what networks made of it, side by side in a PNG."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor

from .labelled import IGNORED, Labelled
from .preparation import Preparation

SIDE = 3.2
"""Inches of the longer side of one picture, at `DPI` dots an inch."""
DPI = 100
MOST_NAMED = 30
"""Classes that a legend names, at most."""
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


def as_rgb(pixels: Tensor) -> Tensor:
    """Pixels ``(c, h, w)`` in [0, 1] of any channels as ``(h, w, 3)``: the first three, or gray."""
    if len(pixels) >= 3:
        return rearrange(pixels[:3], "c h w -> h w c")
    return repeat(pixels[0], "h w -> h w c", c=3)


def write_panels(
    folder: Path,
    split: Labelled,
    prepare: Preparation,
    predictions: Mapping[str, Mapping[int, Tensor]],
) -> list[Path]:
    """Write a PNG for each image that predictions were kept of, in place of earlier panels.

    Args:
        folder: Where to, made where there is none.
        split: Images with masks.
        prepare: How pixels become values in [0, 1].
        predictions: Of each network, by its name: class ids ``(height, width)`` by the image's
            place in the split.

    Returns:
        The files, in the order of the images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in filter(is_panel, folder.glob("*.png")):
        path.unlink()
    colours = class_colours(len(split.classes))
    written = []
    for index in sorted(set().union(*predictions.values())):
        example = split.read(index, prepare.shortest)
        image = as_rgb(prepare.in_range(example.pixels, str(split.images[index])))
        pictures = {"image": image, "truth": colours[example.mask.long()]}
        for name, kept in predictions.items():
            pictures[name] = colours[kept[index].long()]
        seen = torch.unique(
            torch.cat(
                [example.mask.flatten(), *(own[index].flatten() for own in predictions.values())]
            )
        )
        plain = re.sub(r"[^\w.-]+", "_", Path(example.name).stem)
        path = folder / f"{index:04d}_{plain}.png"
        classes = {split.classes[i]: colours[i] for i in seen.tolist() if i < len(split.classes)}
        draw(path, pictures, classes, (example.mask.shape[0], example.mask.shape[1]))
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
    named = dict(list(classes.items())[:MOST_NAMED])
    columns = max(1, int(len(pictures) * width / 1.3))
    below = 0.25 + 0.2 * -(-len(named) // columns)
    figure = Figure((len(pictures) * (width + 0.1), height + 0.3 + below), dpi=DPI)
    total = height + 0.3 + below
    for number, (name, picture) in enumerate(pictures.items()):
        part = 1 / len(pictures)
        axes = figure.add_axes((number * part + 0.01, below / total, part - 0.02, height / total))
        axes.imshow(picture.clamp(0, 1).numpy(), extent=(0, size[1], 0, size[0]))
        axes.set_axis_off()
        axes.set_title(name, fontsize=8, parse_math=False, wrap=True)
    patches = [Patch(color=tuple(colour.tolist()), label=name) for name, colour in named.items()]
    legend = figure.legend(
        handles=patches, loc="lower center", ncols=columns, fontsize=7, frameon=False
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name may hold dollars
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a box in place of a letter is no harm
        figure.savefig(path, metadata={"Software": MARK})
