"""The outcome of an evaluation: figures of several networks, as a table, a sentence and a file."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import StringIO
from math import isnan, nan
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Self

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ..data.image import to_rgb
from ..data.segmentation import IGNORED, SegmentationDataset
from ..files import write_whole
from .features import Preparation

LABELLED_FILE, UNLABELLED_FILE = "evaluation.json", "correspondence.json"
"""What evaluations with labels and without are written to, so that neither replaces the other."""
CLEAR = 1.05
"""Times another figure from which a gain is called one; less may be chance."""
ONE_DRAW = 1.25
"""Times a single draw of random weights from which a gain is called one: on sixty drawn scenes
another draw reached up to 1.17 times the first."""
LUCK = (
    "more than one draw of random weights, though another draw may reach as much. Repeat with "
    "--seeds 3."
)
TABLE_WIDTH = 110
"""Columns of text that a table takes, at most."""


@dataclass(frozen=True)
class Row:
    """What one network reached.

    Attributes:
        name: Which.
        scores: Each figure, the mean over the seeds.
        deviations: Its standard deviation over the seeds; 0 of a single one.
        classes: IoU of each class, mean over the seeds; NaN of one that is nowhere.
        seeds: The figures for each seed.
    """

    name: str
    scores: dict[str, float]
    deviations: dict[str, float] = field(default_factory=dict)
    classes: dict[str, float] = field(default_factory=dict)
    seeds: tuple[dict[str, float], ...] = ()

    @classmethod
    def of(
        cls,
        name: str,
        seeds: Sequence[Mapping[str, float]],
        classes: Sequence[Mapping[str, float]] = (),
    ) -> Self:
        """Of the figures for each seed."""
        figures = {key: [own[key] for own in seeds] for key in seeds[0]}
        return cls(
            name,
            {key: fmean(values) for key, values in figures.items()},
            {key: stdev(values) if len(values) > 1 else 0.0 for key, values in figures.items()},
            {
                key: known_mean([own[key] for own in classes])
                for key in (classes[0] if classes else ())
            },
            tuple(dict(own) for own in seeds),
        )


def known_mean(values: Sequence[float]) -> float:
    """The mean of the values that are not NaN; NaN where all are."""
    known = [value for value in values if not isnan(value)]
    return fmean(known) if known else nan


def gain(ours: Row, other: Row, key: str) -> int:
    """1 if a figure is clearly more than another row's, -1 if clearly less, else 0."""
    reached, base = ours.scores[key], other.scores[key]
    noise = 2 * max(row.deviations.get(key, 0.0) for row in (ours, other))
    if reached > max(CLEAR * base, base + noise):
        return 1
    return -1 if reached < base - noise and reached * CLEAR < base else 0


def may_be_luck(ours: Row, random: Row, key: str) -> bool:
    """Whether another draw of random weights might reach what ours do."""
    return len(random.seeds) == 1 and ours.scores[key] < ONE_DRAW * random.scores[key]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        weights: What was evaluated.
        data: On which images.
        protocol: ``linear``, ``knn``, ``finetune`` or ``correspondence``.
        settings: All else that decided the figures.
        rows: A row for each network: random weights first, those asked for last.
        sentence: What the figures mean.
        notes: What else the reader should know.
    """

    weights: str
    data: str
    protocol: str
    settings: dict[str, Any]
    rows: tuple[Row, ...]
    sentence: str
    notes: tuple[str, ...] = ()

    @property
    def ours(self) -> Row:
        """The row of the weights that were asked for."""
        return self.rows[-1]

    def table(self, width: int = TABLE_WIDTH) -> str:
        """The figures as text: a column for each network, a line for each figure.

        Args:
            width: Characters a line, at most.
        """
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD, title=Text(self.title), title_justify="left")
        table.add_column("")
        for row in self.rows:
            table.add_column(Text(row.name, overflow="fold"), justify="right")
        for key in self.rows[0].scores:
            table.add_row(
                key, *(shown(row.scores[key], row.deviations.get(key, 0)) for row in self.rows)
            )
        base = self.rows[0].scores.get("mIoU")
        if base:
            ratios = (f"{row.scores['mIoU'] / base:.2f}" for row in self.rows)
            table.add_row("mIoU, times random", *ratios)
        if self.ours.classes:
            table.add_section()
        for key in self.ours.classes:
            cells = (shown(row.classes[key], 0) for row in self.rows)
            table.add_row(Text(f"IoU {key}"), *cells)
        text = StringIO()
        Console(file=text, width=width, no_color=True, highlight=False).print(table)
        lines = (line.rstrip() for line in text.getvalue().splitlines())
        return "\n".join([*lines, *self.notes])

    @property
    def title(self) -> str:
        """What the table shows."""
        settings = ", ".join(f"{key} {in_short(value)}" for key, value in self.settings.items())
        return f"{self.protocol} on {self.data}: {settings}"

    def to_json(self) -> str:
        """As JSON text; NaN becomes null."""
        return json.dumps(without_nan(asdict(self)), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` wrote."""
        held = json.loads(text)
        rows = [
            Row(
                name=row["name"],
                scores=with_nan(row["scores"]),
                deviations=with_nan(row["deviations"]),
                classes=with_nan(row["classes"]),
                seeds=tuple(with_nan(own) for own in row["seeds"]),
            )
            for row in held["rows"]
        ]
        return cls(**held | {"rows": tuple(rows), "notes": tuple(held["notes"])})

    @property
    def labelled(self) -> bool:
        """Whether the figures are about masks."""
        return self.protocol != "correspondence"

    def write(self, out: str | Path) -> Path:
        """Write the file into a folder, made where there is none; where it is.

        With labels it is ``evaluation.json``, without ``correspondence.json``.
        """
        path = Path(out).expanduser() / (LABELLED_FILE if self.labelled else UNLABELLED_FILE)
        write_whole(path, self.to_json())
        return path


def in_short(value: object) -> str:
    """A setting for people."""
    return " + ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def shown(value: float, deviation: float) -> str:
    """A figure for people, with its spread over the seeds."""
    if isnan(value):
        return "-"
    digits = 3 if abs(value) < 2 else 1
    return f"{value:.{digits}f}" + (f" ± {deviation:.{digits}f}" if deviation else "")


def without_nan(held: Any) -> Any:
    """The same with None for NaN, which JSON does not have."""
    if isinstance(held, float) and isnan(held):
        return None
    if isinstance(held, dict):
        return {key: without_nan(own) for key, own in held.items()}
    return [without_nan(own) for own in held] if isinstance(held, (list, tuple)) else held


def with_nan(held: Mapping[str, float | None]) -> dict[str, float]:
    """The same with NaN for None."""
    return {key: nan if own is None else own for key, own in held.items()}


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


def write_panels(
    folder: Path,
    split: SegmentationDataset,
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
        shown = to_rgb(prepare.in_range(example.pixels, str(split.images[index])))
        image = rearrange(shown, "rgb h w -> h w rgb")
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
