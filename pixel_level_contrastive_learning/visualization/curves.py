"""The curves of a run: which metrics stand in one chart, and what to look for in them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from io import StringIO
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, pad

from .. import run_layout
from ..evaluation.health import COLLAPSED_RANK, COLLAPSED_SPREAD
from ..evaluation.pictures import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Metrics = Mapping[str, Sequence[float]]
"""The metrics of a run, a column each, as `read_metrics` gives them."""


class Chart(NamedTuple):
    """What stands in one chart.

    Attributes:
        title: What is shown.
        unit: What the vertical axis counts.
        curves: Name in the metrics and name for people, for each curve.
        meaning: What to look for, a sentence.
        limits: Ends of the vertical axis, as far as they are fixed.
        bound: A value that should not be fallen under, and its name.
        logarithmic: Whether the axis is.
        noisy: Whether a running mean is drawn over the values.
    """

    title: str
    unit: str
    curves: tuple[tuple[str, str], ...]
    meaning: str
    limits: tuple[float | None, float | None] = (None, None)
    bound: tuple[float, str] | None = None
    logarithmic: bool = False
    noisy: bool = True


class Line(NamedTuple):
    """A curve as it is drawn: its name for people, its points, and their running mean."""

    label: str
    steps: list[float]
    values: list[float]
    mean: list[float]


CHARTS = (
    Chart(
        "Similarity of pairs",
        "mean cosine, -1 to 1",
        (("pixel_cosine", "pixel"), ("instance_cosine", "instance")),
        "The figure to watch: it should rise towards 1. A dip after a quick start is normal, since "
        "the target stops being trivially similar.",
        limits=(None, 1.02),
    ),
    Chart(
        "Correspondence",
        "share of cells, 0 to 1",
        (("hit1", "colours changed"), ("hit1_colours_kept", "colours kept")),
        "On held-out images: how often a cell's most similar cell in the other view sees the same "
        "spot. A wide gap between the curves means that matching relies on colour.",
        limits=(0, None),
    ),
    Chart(
        "Probe",
        "mean IoU, 0 to 1",
        (("probe_miou", "probe"),),
        "How well a probe on the features predicts masks. It should rise; if it falls again, "
        "best.ckpt has better weights.",
    ),
    Chart(
        "Loss",
        "weighted sum of both terms",
        (("loss", "loss"),),
        "Falls as the cosines rise. On its own it does not show a collapse: a collapsed run has a "
        "very low loss.",
    ),
    Chart(
        "Spread",
        "0 collapsed, 1 even",
        (("spread", "spread"),),
        "How much the directions of the cells' features differ.",
        limits=(0, None),
        bound=(COLLAPSED_SPREAD, "collapsed below"),
    ),
    Chart(
        "Effective rank",
        "directions in use",
        (("effective_rank", "effective rank"),),
        "The number of directions in which features vary. It may fall at first, then should hold "
        "or rise.",
        limits=(0, None),
        bound=(COLLAPSED_RANK, "collapsed below"),
    ),
    Chart(
        "Matching cells",
        "pairs per image",
        (("positive_pairs", "pairs"),),
        "How many cells of two views see the same spot. It depends on the crops and the size of "
        "the map, not on learning.",
        limits=(0, None),
    ),
    Chart(
        "Gradient",
        "norm",
        (("grad_norm", "gradient norm"),),
        "Sudden peaks mean that the learning rate is close to too high.",
        logarithmic=True,
    ),
    Chart(
        "Learning rate",
        "learning rate",
        (("lr", "learning rate"),),
        "Warm-up, then cosine decay.",
        limits=(0, None),
        noisy=False,
    ),
    Chart(
        "Speed",
        "images per second",
        (("images_per_second", "images/s"),),
        "The first step is slow because of start-up.",
        limits=(0, None),
    ),
)


OPTIONAL = ("pixel_cosine", "instance_cosine")
"""Metrics that are 0 at all steps where their loss is off."""
SELDOM = ("spread", "effective_rank", "hit1", "hit1_colours_kept", "probe_miou")
"""Metrics that are repeated, step by step, until they are measured again."""
MEASURED_AT = dict.fromkeys(("hit1", "hit1_colours_kept"), "hit_step")
"""The metric that tells the step at which another was measured, where that is known."""
MAX_POINTS = 240
"""Points a curve is drawn with, at most: runs have any number of steps."""
WINDOW = 15
"""Points of the running mean, where there are many."""
MARKED = 30
"""Points up to which each is marked."""


class Palette(NamedTuple):
    """The colours of a chart: words, lines of the grid, the curves, and a bound."""

    ink: str = "#475467"
    grid: str = "#d9dee7"
    curves: tuple[str, ...] = COLOURS
    bound: str = COLOURS[1]


PLACEHOLDERS = Palette("#010101", "#020202", ("#030303", "#040404"), "#050505")
"""Colours that no chart has else; a page has its own, light or dark, in these variables."""
CSS_VARIABLES = ("--soft", "--line", "--one", "--two", "--bad")


def read_metrics(path: str | Path) -> dict[str, list[float]]:
    """The metrics of a run, a column each; NaN where a step has none.

    Args:
        path: A run's folder or its ``metrics.jsonl``. A last line that was cut short, as by a
            killed run, is left out.

    Raises:
        ValueError: A line is no JSON object.
        OSError: There is no such file.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as run:
    ...     _ = (Path(run) / "metrics.jsonl").write_text('{"step": 1, "loss": 8}')
    ...     read_metrics(run)
    {'step': [1.0], 'loss': [8.0]}
    """
    path = Path(path)
    path = path / run_layout.METRICS if path.is_dir() else path
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path}, line {number}, is {line[:60]!r}, which is not a JSON object; the file "
                "was changed after the run: fix or delete the line"
            ) from error
    names = dict.fromkeys(name for row in rows for name in row)
    return {
        name: [float(v) if isinstance(v := row.get(name), (int, float)) else nan for row in rows]
        for name in names
    }


def curves_figure(metrics: Metrics) -> Figure:
    """All charts of a run as one matplotlib figure.

    Args:
        metrics: Columns of equal length, as `read_metrics` gives them.

    Raises:
        ValueError: There is nothing to draw.

    >>> figure = curves_figure({"step": [1, 2, 3], "loss": [8.0, 6.5, 6.0]})
    >>> [axes.get_title(loc="left") for axes in figure.axes]
    ['Loss']
    """
    from matplotlib.figure import Figure

    charts = charts_of(metrics)
    if not charts:
        raise ValueError("metrics hold no steps yet; let the run take a few steps first")
    rows = -(-len(charts) // 2)
    figure = Figure(figsize=(9.6, 2.7 * rows), layout="constrained")
    for number, (chart, lines) in enumerate(charts):
        axes = figure.add_subplot(rows, 2, number + 1)
        axes.set_title(chart.title, loc="left", fontsize=11, fontweight="bold")
        draw_chart(axes, chart, lines, Palette())
    return figure


def charts_of(metrics: Metrics) -> list[tuple[Chart, list[Line]]]:
    """The charts for which there are metrics, with their curves."""
    charts = [(chart, lines_of(chart, metrics)) for chart in CHARTS]
    return [(chart, lines) for chart, lines in charts if lines]


def lines_of(chart: Chart, metrics: Metrics) -> list[Line]:
    """The curves of a chart for which there are metrics."""
    lines = []
    for name, label in chart.curves:
        steps, values = curve(metrics, name)
        if values:
            mean = running_mean(values) if chart.noisy else values
            lines.append(Line(label, steps, values, mean))
    return lines


def curve(metrics: Metrics, name: str) -> tuple[list[float], list[float]]:
    """The steps and values of a metric, as at most `MAX_POINTS` means of neighbours; no gaps."""
    place = MEASURED_AT.get(name, "step")
    place = place if place in metrics else "step"
    steps, values = (
        torch.tensor(metrics.get(column, ()), dtype=torch.float64) for column in (place, name)
    )
    count = min(len(steps), len(values))
    points = torch.stack((steps[:count], values[:count]))
    points = points[:, points.isfinite().all(dim=0)]
    if points.shape[1] == 0 or (name in OPTIONAL and not points[1].any()):
        return [], []
    if name in SELDOM:
        repeated = points[1] if place == "step" else points[0]
        points = points[:, repeated.diff(prepend=repeated[:1] - 1) != 0]
    parts: Sequence[Tensor] = points.tensor_split(min(points.shape[1], MAX_POINTS), dim=1)
    means = torch.stack([part.mean(dim=1) for part in parts], dim=1)
    return means[0].tolist(), means[1].tolist()


def running_mean(values: Sequence[float]) -> list[float]:
    """The running mean, over fewer points where there are few; as many values as before."""
    width = min(WINDOW, len(values) // 8) // 2 * 2 + 1
    if width <= 1:
        return list(values)
    edges = width // 2
    line = torch.tensor(values, dtype=torch.float64)[None, None]
    return avg_pool1d(pad(line, (edges, edges), mode="replicate"), width, 1)[0, 0].tolist()


def draw_chart(axes: Axes, chart: Chart, lines: Sequence[Line], palette: Palette) -> None:
    """Draw one chart: each curve thin as it was and strong as its running mean."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    for line, colour in zip(lines, palette.curves, strict=False):
        style: dict[str, Any] = {"color": colour, "solid_capstyle": "round"}
        marker = "o" if len(line.values) <= MARKED else None
        axes.plot(line.steps, line.values, linewidth=1, alpha=0.35, **style)
        axes.plot(
            line.steps, line.mean, linewidth=1.8, marker=marker, ms=3, label=line.label, **style
        )
    if chart.logarithmic and axes.dataLim.ymax > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    low, high = chart.limits
    top = max(axes.get_ylim()[1], 2 * chart.bound[0] if chart.bound else 0)
    axes.set_ylim(bottom=low, top=1.06 * top if low == 0 and high is None else high)
    if chart.bound is not None:
        value, meaning = chart.bound
        axes.axhline(value, color=palette.bound, linewidth=1, linestyle=(0, (4, 3)))
        place: Any = (1, value), (0, 3), ("axes fraction", "data"), "offset points"
        axes.annotate(f"{meaning} {value:g}", *place, color=palette.bound, fontsize=8, ha="right")
    axes.set_xlabel("step", color=palette.ink, fontsize=8.5)
    axes.set_ylabel(chart.unit, color=palette.ink, fontsize=8.5)
    axes.tick_params(labelsize=8.5, labelcolor=palette.ink, length=0, which="both")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(axis="y", color=palette.grid, linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(palette.grid)
    axes.margins(x=0.01)
    if len(chart.curves) > 1 and axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8.5, labelcolor=palette.ink, loc="lower right", ncols=2)


def chart_svg(chart: Chart, lines: Sequence[Line]) -> str:
    """One chart as an ``<svg>`` element for a page, in the page's colours and fonts."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    file = StringIO()
    # Words stay words, and equal charts give equal text.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.title}):
        figure = Figure(figsize=(3.5, 2.1), layout="constrained")
        draw_chart(figure.add_subplot(), chart, lines, PLACEHOLDERS)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[a-z0-9.]+_\d+"', "", text)  # the same in all charts
    for number, variable in enumerate(CSS_VARIABLES, 1):
        text = text.replace(f"#{3 * f'0{number}'}", f"var({variable})")
    return text.replace("<svg ", '<svg aria-hidden="true" ', 1)


def chart_words(chart: Chart, lines: Sequence[Line]) -> str:
    """A chart for those who do not see it: where each curve began, ended, and lay between."""
    parts = [
        f"{label} from {mean[0]:.3g} at step {steps[0]:.0f} to {mean[-1]:.3g} at step "
        f"{steps[-1]:.0f}, between {min(mean):.3g} and {max(mean):.3g}"
        for label, steps, _, mean in lines
    ]
    return f"{chart.title}, {chart.unit}: {'; '.join(parts)}."
